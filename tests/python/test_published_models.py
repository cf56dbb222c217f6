"""Models by their published names: shapes with the published number of parameters, and what a name may look like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import offload
from offload._model_sizes import token_costs
from offload._units import find_units
from offload.cli import _plan, main
from offload.cli._plan_model import published
from offload.cli._published_models import PUBLISHED, nearest_name, published_name

# As their publishers count them.
PARAMETERS = {
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "Llama-3-70B": 70_553_706_496,
    "Llama-3.3-70B": 70_553_706_496,
    "Llama-3.1-405B": 405_853_388_800,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Llama-2-7B": 6_738_415_616,
    "Llama-2-13B": 13_015_864_320,
    "Llama-2-70B": 68_976_648_192,
    "Mistral-7B": 7_241_732_096,
    "Mistral-7B-v0.3": 7_248_023_552,
    "Mixtral-8x7B": 46_702_792_704,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen2.5-72B": 72_706_203_648,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
    "Gemma-2-2B": 2_614_341_888,
    "Gemma-2-9B": 9_241_705_984,
    "Gemma-2-27B": 27_227_128_320,
    "GPT-2": 124_439_808,
    "GPT-2-medium": 354_823_168,
    "GPT-2-large": 774_030_080,
    "GPT-2-XL": 1_557_611_200,
    "TinyLlama-1.1B": 1_100_048_384,
    "SmolLM2-135M": 134_515_008,
    "SmolLM2-360M": 361_821_120,
    "SmolLM2-1.7B": 1_711_376_384,
}


def test_every_model_has_the_published_number_of_parameters() -> None:
    found = {name: sum(p.numel() for p in published(name, torch.bfloat16).parameters()) for name in PUBLISHED}
    assert found == PARAMETERS


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("Llama-3.1-8B", "Llama-3.1-8B"),
        ("llama-3.1-8b", "Llama-3.1-8B"),
        ("meta-llama/Llama-3.1-8B-Instruct", "Llama-3.1-8B"),
        ("meta-llama/Meta-Llama-3-70B", "Llama-3-70B"),
        ("Llama-2-7b-chat-hf", "Llama-2-7B"),
        ("mistralai/Mistral-7B-v0.1", "Mistral-7B"),
        ("mistralai/Mistral-7B-Instruct-v0.2", "Mistral-7B"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "Mistral-7B-v0.3"),
        ("Mixtral-8x7B-Instruct-v0.1", "Mixtral-8x7B"),
        ("google/gemma-2-9b-it", "Gemma-2-9B"),
        ("openai-community/gpt2", "GPT-2"),
        ("gpt2-xl", "GPT-2-XL"),
        ("Llama-3.1-9B", None),
        ("Mistral-7B-v0.4", None),
        ("8B", None),
    ],
)
def test_what_a_name_may_look_like(given: str, name: str | None) -> None:
    assert published_name(given) == name


def test_every_name_means_itself() -> None:
    assert [published_name(name) for name in PUBLISHED] == [*PUBLISHED]


def test_the_nearest_name() -> None:
    assert nearest_name("Lama-3.1-8B") == "Llama-3.1-8B" and nearest_name("qwen2.5-7") == "Qwen2.5-7B"
    assert nearest_name("resnet50") is None


def test_a_tied_head_counts_once_and_of_experts_a_token_passes_two() -> None:
    mixtral, tied = (published(name, torch.bfloat16) for name in ("Mixtral-8x7B", "Llama-3.2-1B"))
    costs = token_costs(mixtral, find_units(mixtral), 2048)
    assert costs.operations["layers.0"] == 2 * 2048 * 4096 - 2 * 0.75 * 8 * 3 * 4096 * 14336
    assert tied.get_parameter("head.weight") is tied.get_parameter("embedding.weight")
    assert token_costs(tied, find_units(tied), 2048).lookups == frozenset()


@pytest.fixture
def no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_plan, "_largest", lambda *_: [])


@pytest.mark.usefixtures("no_search")
def test_offload_plan_takes_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "meta-llama/Llama-3.1-8B", "--hardware", "h200", "--batch", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["trainable_count"] == PARAMETERS["Llama-3.1-8B"] and found["notes"] == []
    assert found["model"] == "Llama-3.1-8B, layers 32, hidden 4,096, vocabulary 128,256"


@pytest.mark.usefixtures("no_search")
def test_a_path_wins_over_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gpt2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "gpt2", "--hardware", "h200"]) == 2
    assert "gpt2/config.json cannot be read" in capsys.readouterr().err


def test_a_typo_is_answered_with_the_nearest_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "Lama-3.1-8B", "--hardware", "h200"]) == 2
    error = capsys.readouterr().err
    assert "no name that is known: did you mean 'Llama-3.1-8B'? Nothing is downloaded" in error
    assert all(name in error for name in PUBLISHED)


def test_the_same_model_as_transformers_builds_it() -> None:
    """In bytes, in what a token costs, and in seconds."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256}
    heads: dict[str, Any] = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64}
    config = transformers.LlamaConfig(**sizes, **heads, tie_word_embeddings=True)
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    ours = published("Llama-3.2-1B", torch.bfloat16)
    one, other = (offload.predict(model, "h200", batches=[4]) for model in (theirs, ours))
    assert one.placements == other.placements and one.sequence_bytes == other.sequence_bytes
    assert [step.seconds for step in one.steps] == pytest.approx([step.seconds for step in other.steps])
