"""What a token costs: by hand, and beside what autograd saves of small models."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import nn

from offload._model_sizes import _kept_by, token_costs
from offload._token_costs import TokenCosts
from offload._units import find_units
from offload.cli._plan_model import _Gelu, _Norm, decoder, published


def test_activations_by_hand() -> None:
    """Hidden 128, two blocks: each keeps its input, and one all; logits take 10 bytes."""
    model = decoder(2, 128, vocabulary=1000, dtype=torch.bfloat16)
    units = find_units(model)
    costs = token_costs(model, units, 64)
    query = key = value = output = 128 + 128  # of one head, which has a key of its own
    norm = 3 * 128  # its input in fp32, and what it scales
    block = query + key + value + output + 3 * (128 + 448) + 2 * norm
    assert costs.activation_bytes(7, 2, checkpointing=False) == 7 * (2 * (2 * block + norm + 128) + 10 * 1000)
    assert costs.activation_bytes(7, 2, checkpointing=True) == 7 * (2 * (2 * 128 + block + norm + 128) + 10 * 1000)
    assert set(costs.lookups) == {"embedding.weight"} and costs.logits == 1000
    # Causal attention in one head of 128: scores and their product, over half of 64 keys on average.
    assert costs.operations == {
        "embedding": 0,
        "layers.0": 2 * 64 * 128,
        "layers.1": 2 * 64 * 128,
        "norm": 0,
        "head": 0,
    }


def saved_by_autograd(model: nn.Module, tokens: torch.Tensor) -> int:
    """Bytes of all that a forward keeps, but for weights and buffers."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(input_ids=tokens, labels=tokens)
    del output
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def llama_of(attention: str, layers: int, *, key_heads: int = 2, dropout: float = 0.0) -> Any:
    """Whose logits weigh little, for the estimate has more copies of them than outlive the forward."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 128, "intermediate_size": 448, "num_hidden_layers": layers, "vocab_size": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": key_heads, "attention_dropout": dropout}
    config = transformers.LlamaConfig(**sizes, **heads, attn_implementation=attention, use_cache=False)
    return transformers.LlamaForCausalLM(config)


def gpt2_of(attention: str, layers: int, *, dropout: float = 0.0) -> Any:
    """Without other dropout, whose masks are of bytes on a GPU alone."""
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 128, "n_head": 4, "n_layer": layers, "vocab_size": 16, "bos_token_id": 0, "eos_token_id": 0}
    drops = {"attn_pdrop": dropout, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    config = transformers.GPT2Config(**sizes, **drops, attn_implementation=attention, use_cache=False)
    return transformers.GPT2LMHeadModel(config)


def fuses_shared_key_heads() -> bool:
    """Whether torch's attention on the CPU keeps no scores where heads share their keys; that of torch 2.6 does."""
    queries, keys = (torch.zeros(1, heads, 64, 8, requires_grad=True) for heads in (4, 2))
    saved: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        nn.functional.scaled_dot_product_attention(queries, keys, keys, is_causal=True, enable_gqa=True)
    return max(saved) < 4 * 64 * 64


def estimated_and_counted(model: nn.Module, length: int) -> tuple[int, int]:
    """Bytes of the activations of two sequences on this CPU, and what autograd saves."""
    dtype = next(model.parameters()).dtype
    costs = token_costs(model, find_units(model), length, "cpu")
    estimate = costs.activation_bytes(2 * length, dtype.itemsize, checkpointing=False)
    return estimate, saved_by_autograd(model, torch.zeros(2, length, dtype=torch.long))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_activations_beside_what_autograd_saves(attention: str) -> None:
    estimate, counted = estimated_and_counted(llama_of(attention, 6).to(torch.bfloat16), 64)
    assert estimate == pytest.approx(counted, rel=0.1)
    estimate, counted = estimated_and_counted(llama_of(attention, 2).to(torch.bfloat16), 512)
    assert estimate == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("make", [llama_of, gpt2_of])
def test_attention_that_is_not_fused_on_the_cpu_keeps_its_scores(make: Any, dtype: torch.dtype) -> None:
    """With dropout none is, in any torch."""
    model = make("sdpa", 2, dropout=0.1).to(dtype).train()
    estimate, counted = estimated_and_counted(model, 512)
    assert estimate == pytest.approx(counted, rel=0.1)
    on_a_card, on_the_cpu = (token_costs(model, find_units(model), 512, kind) for kind in ("cuda", "cpu"))
    assert set(on_a_card.scores.values()) == {0} and set(on_the_cpu.scores.values()) == {4 * 512}
    products = {name: operations for name, operations in on_a_card.operations.items() if operations > 0}
    assert products and all(on_the_cpu.operations[name] == 2 * count for name, count in products.items())


def test_heads_that_share_keys_keep_scores_on_the_cpu_where_torch_does_not_fuse_them() -> None:
    for key_heads, is_fused in ((4, True), (2, fuses_shared_key_heads())):
        model = llama_of("sdpa", 2, key_heads=key_heads)
        costs = token_costs(model, find_units(model), 512, "cpu")
        assert set(costs.scores.values()) == {0 if is_fused else 4 * 512}
        assert costs.wide_attention is not is_fused


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_activations_of_gpt2_beside_what_autograd_saves(dtype: torch.dtype, attention: str) -> None:
    """Its gelu is written out, and keeps three times as much as its input beside that."""
    for layers, length in ((6, 64), (2, 512)):
        estimate, counted = estimated_and_counted(gpt2_of(attention, layers).to(dtype), length)
        assert estimate == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize(
    ("module", "dtype", "kept"),
    [
        (nn.LayerNorm(64), torch.bfloat16, (64, 0)),  # its input
        (nn.LayerNorm(64), torch.float32, (64, 0)),
        (_Norm(64), torch.bfloat16, (3 * 64, 64)),  # its input in fp32, and what it scales
        (_Norm(64).requires_grad_(False), torch.bfloat16, (2 * 64, 64)),
        (_Norm(64), torch.float32, (2 * 64, 0)),
        (nn.Sequential(nn.LayerNorm(64)), torch.float32, None),  # no single module
        (nn.BatchNorm1d(64), torch.float32, None),  # it would remember
    ],
)
def test_what_a_norm_keeps_is_asked_of_itself(
    module: nn.Module, dtype: torch.dtype, kept: tuple[int, int] | None
) -> None:
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert _kept_by(module.to(dtype), 64, dtype) == kept
    assert all(torch.equal(tensor.to(dtype), module.state_dict()[name]) for name, tensor in before.items())


def test_what_an_activation_keeps_beside_its_input() -> None:
    for module, times in ((nn.SiLU(), 0), (nn.GELU(), 0), (_Gelu(), 3), (nn.Identity(), 0)):
        for dtype in (torch.bfloat16, torch.float32):
            assert _kept_by(module, 64, dtype, with_input=False) == (times * 64, 0)
    assert _kept_by(nn.CrossEntropyLoss(), 64, torch.float32) is None, "it takes two"


def test_gpt2_by_name_and_from_its_config_keep_as_much() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(attn_implementation="sdpa", attn_pdrop=0.0)
    with torch.device("meta"):
        models = transformers.GPT2LMHeadModel(config).to(torch.bfloat16), published("GPT-2", torch.bfloat16)
    written, named = (
        token_costs(model, find_units(model), 64).activation_bytes(64, 2, checkpointing=False) for model in models
    )
    assert named == pytest.approx(written, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("make", [llama_of, gpt2_of])
def test_scores_are_what_eager_attention_keeps_beside_the_rest(make: Any, dtype: torch.dtype) -> None:
    """Within 7 %: what Llama repeats of its keys and values, one to two heads, is not counted."""
    options = {"key_heads": 4} if make is llama_of and not fuses_shared_key_heads() else {}
    fused, eager = (
        estimated_and_counted(make(attention, 2, **options).to(dtype), 512) for attention in ("sdpa", "eager")
    )
    scores = 2 * 2 * 4 * 512 * 512  # of two layers, sequences, and four heads
    kept = {(llama_of, 2): 4 + 2, (llama_of, 4): 4, (gpt2_of, 2): 2, (gpt2_of, 4): 4}[make, dtype.itemsize]
    assert eager[0] - fused[0] == kept * scores
    assert eager[1] - fused[1] == pytest.approx(kept * scores, rel=0.07)


def scores_alone(*, wide_softmax: bool) -> TokenCosts:
    """One score a token, with dropout."""
    return TokenCosts({"a": 0}, {"a": 1}, True, wide_softmax, {}, {}, frozenset(), 0, {}, frozenset("a"))


def test_a_byte_an_element_by_hand() -> None:
    model = decoder(2, 128, vocabulary=1000, dtype=torch.bfloat16)
    costs = token_costs(model, find_units(model), 64)
    assert costs.reached == {"layers.0", "layers.1", "norm", "head"}
    matrices = 4 * (128 + 128) + 3 * (128 + 448)
    norm = 2 * 128  # its input, of fp32, and what it scales
    block = {False: matrices + 2 * norm, True: 128}
    for checkpointing, itemsize in itertools.product((False, True), (2, 4)):
        sent = costs.sent_bytes(7, itemsize, checkpointing=checkpointing)
        counts = [7 * block[checkpointing]] * 2 + [7 * norm, 7 * 128]
        assert [*sent.values()] == [0] + [count + 4 * -(-count // 256) for count in counts]


def test_before_anything_trains_all_counts_as_exact() -> None:
    model = decoder(3, 128, vocabulary=1000, dtype=torch.bfloat16)
    model.requires_grad_(False)
    model.get_submodule("layers.1").requires_grad_(True)
    costs = token_costs(model, find_units(model), 64)
    assert costs.reached == {"layers.2", "norm", "head"}
    sent, saved = (way(2, 2, checkpointing=False) for way in (costs.sent_bytes, costs.saved_bytes))
    assert {unit for unit in saved if sent[unit] == saved[unit]} == {"embedding", "layers.0", "layers.1"}


def test_scores_in_a_byte_and_masks_as_they_are() -> None:
    for wide_softmax in (True, False):  # what dropout drops and what it leaves, and the mask
        assert scores_alone(wide_softmax=wide_softmax).sent_bytes(128, 2, checkpointing=False)["a"] == 256 + 4 + 128
    saved: dict[tuple[bool, int], int] = {(True, 2): 2, (True, 4): 1, (False, 2): 1, (False, 4): 1}
    for (wide_softmax, itemsize), count in saved.items():
        costs = dataclasses.replace(scores_alone(wide_softmax=wide_softmax), drops_scores=False)
        assert costs.sent_bytes(256, itemsize, checkpointing=False)["a"] == count * (256 + 4)
    # All of it in fp32: the scores once, or what dropout drops and what it leaves, and its mask.
    for drops_scores, (count, mask_bytes) in {False: (1, 0), True: (2, 4)}.items():
        costs = dataclasses.replace(scores_alone(wide_softmax=True), drops_scores=drops_scores, wide_attention=True)
        sent = costs.sent_bytes(128, 2, checkpointing=False)["a"]
        assert sent == count * 128 + 4 * -(-count * 128 // 256) + 128 * mask_bytes
        assert costs.saved_bytes(1, 2, checkpointing=False)["a"] == 4 * count + mask_bytes


def test_dropout_of_scores_keeps_what_it_drops_and_what_it_leaves() -> None:
    saved = scores_alone(wide_softmax=True).saved_bytes
    assert [saved(1, itemsize, checkpointing=False)["a"] for itemsize in (2, 4)] == [4 + 1 + 2, 4 + 1 + 4]
    saved = scores_alone(wide_softmax=False).saved_bytes
    assert [saved(1, itemsize, checkpointing=False)["a"] for itemsize in (2, 4)] == [2 + 1 + 2, 4 + 1 + 4]


def test_eager_attention_computes_what_is_masked_afterwards_and_a_checkpoint_keeps_no_scores() -> None:
    fused, eager = (token_costs(model, find_units(model), 64) for model in (gpt2_of("sdpa", 2), gpt2_of("eager", 2)))
    assert eager.operations["transformer.h.0"] == 2 * fused.operations["transformer.h.0"] > 0
    assert set(eager.inputs) == {"transformer.h.0", "transformer.h.1"}  # and neither of the two embeddings
    score_bytes = 64 * 4 * 64 * 4
    whole, blocks_alone = (
        eager.activation_bytes(64, 4, checkpointing=way) - fused.activation_bytes(64, 4, checkpointing=way)
        for way in (False, True)
    )
    assert (whole, blocks_alone) == (2 * score_bytes, score_bytes)  # of one block, as it is recomputed
