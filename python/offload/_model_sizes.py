"""A model as the plan sees it: its parameters, and what a token costs in it. Reads shapes, so meta tensors will do."""

from __future__ import annotations

import collections
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from ._config import Config
from ._parameter_size import ParameterSize
from ._parameter_state import ParameterState
from ._residency import can_be_streamed
from ._token_costs import TokenCosts
from ._units import Unit

__all__ = ["parameter_sizes", "token_costs"]

# In 16-bit elements: its input in fp32, and what it scales. Of norms that cannot be asked.
_NORM_KEEPS = 3
# How configs call the probability that a score of attention is dropped.
_SCORE_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")


def parameter_sizes(
    model: nn.Module, units: Sequence[Unit], trained: Mapping[int, type[ParameterState]], settings: Config
) -> list[ParameterSize]:
    """The model's parameters; `trained`: id -> the kind of its state."""
    unit_of = {id(parameter): unit for unit in units for _, parameter in unit.parameters}
    # Its forward is open while any other's is.
    root = next((unit for unit in units if unit.is_root and len(units) > 1), None)
    charged = {id(p): trained[id(p)].moment_bytes(settings.moments) for p in model.parameters() if id(p) in trained}
    are_exact = settings.moments == "fp32" and settings.master != "bf16"
    return [
        ParameterSize(
            name=name,
            numel=parameter.numel(),
            itemsize=parameter.element_size(),
            dtype_name=str(parameter.dtype).removeprefix("torch."),
            trainable=id(parameter) in trained,
            unit=unit_of[id(parameter)].name,
            may_split=id(parameter) in trained and trained[id(parameter)].may_split,
            moment_bytes=charged.get(id(parameter), (0, 0))[0],
            moment_block_bytes=charged.get(id(parameter), (0, 0))[1],
            may_be_stored=id(parameter) not in trained or (trained[id(parameter)].may_be_stored and are_exact),
            is_master=id(parameter) in trained and settings.master == "bf16" and parameter.dtype == torch.bfloat16,
            stays=unit_of[id(parameter)] is root or not can_be_streamed(parameter),
        )
        for name, parameter in model.named_parameters()
    ]


def token_costs(model: nn.Module, units: Sequence[Unit], length: int, device_kind: str = "cuda") -> TokenCosts:
    """What a token of a sequence of `length` costs on such a device: see [Note: what activations take].

    Shapes do not tell everything. From `model.config`, as Hugging Face's models have it, come the heads of attention,
    causal as in a decoder, whether it is eager, and how many experts a token passes; without it attention counts no
    operations and no scores, and every expert counts.
    """
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    classes = collections.Counter(type(unit.modules[0]) for unit in units if not unit.is_root)
    unfused = device_kind == "cpu" and _is_unfused_on_the_cpu(config)
    makes_scores = _is_eager(config) or unfused
    attention, active = _attention_operations(config, length, makes_scores), _active_experts(config)
    scores = _heads(config) * length if makes_scores else 0
    wide_softmax = True
    saved: dict[str, int] = {}
    inputs: dict[str, int] = {}
    operations: dict[str, float] = {}
    multiplied: set[int] = set()
    wide: dict[str, int] = {}
    reached: set[str] = set()
    is_trained = False  # anything before; those of the root may be used anywhere
    dtype = max(model.parameters(), key=Tensor.numel).dtype
    head: Tensor | None = None
    head_unit = ""
    for unit in units:
        if is_trained:
            reached.add(unit.name)
        is_trained |= not unit.is_root and any(parameter.requires_grad for _, parameter in unit.parameters)
        matrices = list(_matrices(unit))
        multiplied.update(map(id, matrices))
        # Two embeddings are no blocks.
        is_block = bool(matrices) and not unit.is_root and classes[type(unit.modules[0])] > 1
        kept = [_kept_by_norm(norm, dtype) for norm in _norms(unit)]
        saved[unit.name], wide[unit.name] = sum(count for count, _ in kept), sum(fp32 for _, fp32 in kept)
        operations[unit.name] = attention if is_block else 0.0
        for matrix in matrices:
            is_expert = "experts" in names[id(matrix)].split(".")
            share = active if is_expert else 1.0
            count = matrix.shape[0] if is_expert and matrix.dim() == 3 else 1
            rows = matrix.shape[-2] if count > 1 else matrix.shape[0]
            saved[unit.name] += round(share * (count * rows + matrix.numel() // rows))
            operations[unit.name] -= 2.0 * (1.0 - share) * matrix.numel()
        for activation, matrix in _activations(unit):
            is_expert = "experts" in names[id(matrix)].split(".")
            count = matrix.shape[0] if is_expert and matrix.dim() == 3 else 1
            kept_elements, fp32 = _kept_by(activation, max(matrix.shape[-2:]), dtype, with_input=False) or (0, 0)
            saved[unit.name] += round((active if is_expert else 1.0) * count * kept_elements)
            wide[unit.name] += round((active if is_expert else 1.0) * count * fp32)
        if is_block:
            inputs[unit.name] = _width(config, matrices)
            wide_softmax = _has_wide_softmax(type(unit.modules[0]))
        elif matrices and not (unit.is_root and len(units) > 1):
            head, head_unit = matrices[-1], unit.name
    if head is not None:
        saved[head_unit] -= head.shape[0]  # the logits, which count by themselves
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} - multiplied
    lookups = frozenset(name for key, name in names.items() if key in looked_up)
    return TokenCosts(
        saved=saved,
        scores=dict.fromkeys(inputs, scores),
        drops_scores=_score_dropout(config) > 0,
        wide_softmax=wide_softmax,
        inputs=inputs,
        operations=operations,
        lookups=lookups,
        logits=0 if head is None else head.shape[0],
        wide=wide,
        reached=frozenset(reached),
        wide_attention=unfused,
    )


def _matrices(unit: Unit) -> Iterator[Tensor]:
    """The unit's parameters that tokens are multiplied by, each once; rows are outputs."""
    own = {id(parameter) for _, parameter in unit.parameters}
    for module in unit.modules[0].modules():
        if isinstance(module, nn.Embedding):
            continue
        for parameter in module.parameters(recurse=False):
            if id(parameter) in own and parameter.dim() >= 2:
                own.remove(id(parameter))
                yield parameter


def _norms(unit: Unit) -> Iterator[nn.Module]:
    """The unit's modules that scale: those with a weight that is a vector, and no matrix."""
    own = {id(parameter) for _, parameter in unit.parameters}
    for module in unit.modules[0].modules():
        scale = dict(module.named_parameters(recurse=False))
        if "weight" in scale and id(scale["weight"]) in own and all(p.dim() == 1 for p in scale.values()):
            yield module


def _activations(unit: Unit) -> Iterator[tuple[nn.Module, Tensor]]:
    """The unit's modules that may be activations, each with the widest matrix beside it, whose output it is given."""
    own = {id(parameter) for _, parameter in unit.parameters}
    for parent in unit.modules[0].modules():
        beside = [p for module in (parent, *parent.children()) for p in module.parameters(recurse=False)]
        matrices = [p for p in beside if id(p) in own and p.dim() >= 2]
        for module in parent.children() if matrices else ():
            if not isinstance(module, nn.modules.dropout._DropoutNd) and next(module.parameters(), None) is None:
                yield module, max(matrices, key=lambda matrix: max(matrix.shape[-2:]))


def _kept_by_norm(norm: nn.Module, dtype: torch.dtype) -> tuple[int, int]:
    width: int = norm.weight.numel()  # type: ignore[operator]
    return _kept_by(norm, width, dtype) or (_NORM_KEEPS * width, width)


def _kept_by(module: nn.Module, width: int, dtype: torch.dtype, *, with_input: bool = True) -> tuple[int, int] | None:
    """What such a module keeps of one vector for its backward: elements of `dtype`, and of these those in fp32, which
    count twice where `dtype` has 16 bits. Its output is what comes next keeps, and a number a row counts nothing.

    It is asked: it computes with a vector. None where that tells nothing: it wants something else, or would remember.
    """
    if next(module.children(), None) or next(module.buffers(), None) is not None or module._forward_hooks:
        return None
    parameters = {  # made by shape: `ones_like` of a meta tensor makes torch import its compiler, for seconds
        name: torch.ones(p.shape, dtype=p.dtype, device="cpu", requires_grad=p.requires_grad)
        for name, p in module.named_parameters()
    }
    given = torch.ones(1, 1, width, dtype=dtype, device="cpu", requires_grad=True)
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            result = torch.func.functional_call(module, parameters, (given,))
        if result.shape != given.shape:
            return None
    except Exception:  # whatever a module raises that takes no vector
        return None
    for other in (result, *parameters.values(), *(() if with_input else (given,))):
        kept.pop(other.untyped_storage().data_ptr(), None)
    long = [tensor for tensor in kept.values() if tensor.numel() >= width]
    wide = sum(tensor.numel() for tensor in long if tensor.element_size() > dtype.itemsize)
    return sum(tensor.nbytes for tensor in long) // dtype.itemsize, wide


def _attention_operations(config: Any, length: int, makes_scores: bool) -> float:
    """Of a token in one block's forward: scores and their product with the values, over half the sequence, or over all
    of it where the other half is masked afterwards."""
    heads = _heads(config)
    size = _setting(config, "head_dim") or _setting(config, "hidden_size", "n_embd") // max(heads, 1)
    return (4.0 if makes_scores else 2.0) * length * heads * size


def _heads(config: Any) -> int:
    return _setting(config, "num_attention_heads", "n_head")


def _is_eager(config: Any) -> bool:
    """Whether attention is written out, as in models without another way, rather than torch's or a kernel's own."""
    return getattr(config, "_attn_implementation", None) == "eager"


def _is_unfused_on_the_cpu(config: Any) -> bool:
    """Whether torch's attention is operations of its own there: that of torch 2.6 is with fewer heads of keys than of
    queries, and every one with dropout. Heads and dropout decide it, lengths do not."""
    if getattr(config, "_attn_implementation", None) != "sdpa":
        return False
    heads = _heads(config) or 1
    queries = torch.empty(1, heads, 1, 8, device="cpu")
    keys = torch.empty(1, _setting(config, "num_key_value_heads") or heads, 1, 8, device="cpu")
    chosen = torch._fused_sdp_choice(queries, keys, keys, dropout_p=_score_dropout(config), enable_gqa=True)
    return bool(chosen == SDPBackend.MATH.value)


def _score_dropout(config: Any) -> float:
    """The probability that a score of attention is dropped."""
    return float(next((value for name in _SCORE_DROPOUTS if (value := getattr(config, name, None))), 0.0))


def _has_wide_softmax(block: type[nn.Module]) -> bool:
    """Whether eager attention beside this class takes its softmax in fp32: its code names that dtype, or is not found.

    No config says so. Most of Hugging Face's models do, and GPT-2 and BERT, and what descends from them, do not.
    """
    eager = getattr(sys.modules[block.__module__], "eager_attention_forward", None)
    code = getattr(eager, "__code__", None)
    return code is None or "float32" in code.co_names


def _active_experts(config: Any) -> float:
    """The share of the experts that a token passes."""
    experts = _setting(config, "num_experts", "num_local_experts", "n_routed_experts")
    chosen = _setting(config, "num_experts_per_tok", "num_experts_per_token", "top_k_experts")
    return min(1.0, chosen / experts) if experts and chosen else 1.0


def _width(config: Any, matrices: Sequence[Tensor]) -> int:
    """Elements of a block's input: as the config says, or the smaller side of the block's first matrix."""
    return _setting(config, "hidden_size", "n_embd") or min(matrices[0].shape[:2] if matrices else (0,))


def _setting(config: Any, *names: str) -> int:
    """The first of these numbers that the config has; 0 without one."""
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), 0)
