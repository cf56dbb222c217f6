"""The table of DeepSpeed's keys is whole, its page is up to date, and the command shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from offload.cli import main
from offload.deepspeed._docs import document
from offload.deepspeed._sections import SECTIONS, nearest
from offload.deepspeed._surface import REQUIRED, Key, Section
from offload.deepspeed._values import coerce

HERE = Path(__file__).parent
CONFIGS = HERE / "deepspeed_configs"
# Every key that DeepSpeed 0.19.8 reads, by section; arguments of optimizers and schedules under the names of those.
KEYS = (HERE / "deepspeed_keys.txt").read_text().split()
# Keys that it does not read, or refuses, and people write: each has a better answer than "unknown".
MISTAKEN = {
    "activation_checkpointing.partitioned_activations",
    "bf16.check_overflow",
    "optimizer.Adagrad.max_grad_norm",
    "optimizer.Adam.max_grad_norm",
    "optimizer.Lion.max_grad_norm",
}
# Sections that stand between two names of the list.
BETWEEN = {"checkpoint.parallel_write", "timers.throughput"}


def every_key() -> list[tuple[Section, Key]]:
    return [(section, key) for section in SECTIONS.values() for key in section.keys]


def test_the_table_has_every_key_and_no_other() -> None:
    ours = [
        f"{section.path}.{name}".removeprefix(".")
        for section, key in every_key()
        for name in (key.name, key.also)
        if name
    ]
    assert len(ours) == len(set(ours))
    assert set(ours) == set(KEYS) | MISTAKEN | BETWEEN


@pytest.mark.parametrize("section", SECTIONS.values(), ids=lambda section: section.path or "top")
def test_each_row_is_sound(section: Section) -> None:
    for key in section.keys:
        assert key.text.endswith((".", "?")), f"{key.name}: the text is a sentence"
        assert key.now is None or section.find(key.now) is not None
        if key.default is not REQUIRED and key.standing != "refused" and key.now is None:
            assert coerce(key.default, key, any_case=False) == key.default, key.name
        if section.path and "." in section.path and not section.path.startswith(("optimizer.", "scheduler.")):
            outer, _, name = section.path.rpartition(".")
            assert SECTIONS[outer].find(name) is not None


def test_the_page_is_the_table() -> None:
    page = HERE.parents[1] / "docs" / "deepspeed.md"
    assert page.read_text() == document(), "run: python -m offload.deepspeed._docs > docs/deepspeed.md"


def test_nearest() -> None:
    assert nearest("zero_optimisation", SECTIONS[""]) == "zero_optimization"
    assert nearest("cpu_checkpointing", SECTIONS[""]) == "activation_checkpointing.cpu_checkpointing"
    assert nearest("train_batch_size", SECTIONS["fp16"]) == "train_batch_size, at the top level"
    assert nearest("lr", SECTIONS[""]) is None and nearest("unheard_of", SECTIONS["fp16"]) is None


@pytest.mark.parametrize("name", ["trainer_zero3_offload", "accelerate_zero3", "chat_zero3_bf16"])
def test_check_accepts(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(CONFIGS / f"{name}.json")
    assert main(["config", "check", path]) == 0
    assert capsys.readouterr().out == f"{path}: accepted\n"


def test_check_refuses_with_every_reason(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(CONFIGS / "masked_language_model.json")
    assert main(["config", "check", path]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("error: sparse_attention") and lines[1].startswith("error: optimizer.type='OneBitAdam'")
    assert lines[2] == f"{path}: refused, 2 errors"


def write(folder: Path, config: dict[str, Any]) -> str:
    path = folder / "ds.json"
    path.write_text(json.dumps(config))
    return str(path)


def test_check_is_strict_and_explain_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, {"train_batch_size": 8, "zero_optimisation": {"stage": 3}, "bfloat16": {"enabled": True}})
    assert main(["config", "check", path]) == 1
    text = capsys.readouterr().out
    assert "error: zero_optimisation: unknown key" in text and "warning: bfloat16 is the old spelling of bf16" in text
    assert main(["config", "explain", path]) == 0
    text = capsys.readouterr().out
    assert "warning: zero_optimisation: unknown key" in text and "note: gradient_clipping" in text
    assert "optimizer states, master weights  device" in text


def test_explain_names_class_and_placement(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["config", "explain", str(CONFIGS / "chat_zero3_bf16.json")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["zero_optimization.offload_param.device", '"cpu"', "honoured"] in [line[:3] for line in lines]
    assert ["zero_optimization.memory_efficient_linear", "false", "no", "effect"] in [line[:4] for line in lines]
    assert lines[2][:3] == ["train_micro_batch_size_per_gpu", "2", "honoured"], "in the order of the file"
    assert ["optimizer", "states,", "master", "weights", "50%", "on", "the", "host,"] in [line[:8] for line in lines]
    assert ["samples", "a", "step", "16", "=", "2", "a", "micro-batch", "x", "8"] in lines


def test_explain_does_not_send_its_reader_to_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its table says of each key why it has no effect; the log of initialize names them and this command."""
    file = tmp_path / "config.json"
    file.write_text('{"train_batch_size": 4, "zero_optimization": {"stage": 3, "overlap_comm": true}}')
    for options in ([], ["--json"]):
        assert main(["config", "explain", str(file), *options]) == 0
        shown = capsys.readouterr().out
        assert "zero_optimization.overlap_comm" in shown and "config explain" not in shown


def test_explain_knows_what_the_trainer_fills_in(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["config", "explain", str(CONFIGS / "trainer_zero3_offload.json")]) == 0
    text = capsys.readouterr().out
    assert "The Trainer fills in: per_device_train_batch_size." in text
    assert "samples a step                    filled in by the Trainer" in text and "error" not in text


def test_explain_shows_what_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "explain", str(CONFIGS / "masked_language_model.json")]) == 0
    text = capsys.readouterr().out
    assert text.count("error: ") == 2 and "resolved" not in text


def test_explain_says_what_lives_on_disk(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["config", "explain", str(CONFIGS / "infinity_nvme.json")]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "weights disk, through a cache in host memory, on the device while in use" in lines
    assert "optimizer states, master weights disk" in lines and "files /local_nvme" in lines


def test_a_missing_file_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "check", "no/such/file.json"]) == 2
    assert "no/such/file.json: No such file" in capsys.readouterr().err
