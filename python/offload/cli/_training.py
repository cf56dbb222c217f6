"""One training run of the demo: an ordinary PyTorch loop, offloaded or not."""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import offload

from ._corpus import VOCABULARY, batches
from ._peak import Peak, measured_peak
from ._progress import now_at, shown
from ._table import format_bytes

__all__ = ["Run", "build_model", "learning_rate_share", "train"]

_HEAD_SIZE = 64
# Models of fewer heads may have any multiple of this as their hidden size.
_NARROW_HEADS, _NARROW_STEP = 4, 8
_MOST_TIMES = 10  # as many parameters as were asked for: such a model is another one
_WARMUP_SHARE = 0.1
_FLOOR_SHARE = 0.1  # the cosine ends at this share of the peak learning rate
_CLIP_NORM = 1.0
_BETAS = (0.9, 0.95)
_WEIGHT_DECAY = 0.1
# So many are measured: the first learns what the second prefetches, as all others do.
_PEAK_STEPS = 2


@dataclasses.dataclass
class Run:
    """What a run produced so far. seconds covers whole steps; weights are taken after `snapshot_step`.

    peak: of device bytes in the first steps, of runs with `offload`, as memory is: who owned them at the end.
    """

    losses: list[float] = dataclasses.field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    weights: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    plan: Any = None
    stats: Any = None
    memory: Any = None
    interrupted: bool = False
    peak: Peak = dataclasses.field(default_factory=Peak)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


def build_model(options: argparse.Namespace) -> nn.Module:
    """A Llama-style model with random weights; equal options give equal bits."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    hidden = options.hidden or _hidden_for(options.size, options.layers)
    heads = _heads(hidden)
    if hidden % (2 * heads):  # the two halves of a head are turned against each other
        raise offload.InvalidArgument(f"--hidden {hidden}: give a multiple of {_HEAD_SIZE}, or an even number below it")
    parameters = _count(hidden, options.layers)  # made on the host, in fp32
    if options.hidden is None and parameters > _MOST_TIMES * options.size:
        raise offload.InvalidArgument(
            f"--size {options.size}: the smallest model of {options.layers} layers has {parameters:,} parameters; give "
            "a larger --size, or fewer --layers"
        )
    _check_room(f"the weights of {parameters:,} parameters", 4 * parameters, "--size, or --hidden and --layers")
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=_intermediate(hidden),
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        max_position_embeddings=options.length,
        use_cache=False,
    )
    torch.manual_seed(options.seed)
    model: nn.Module = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return model.to(getattr(torch, options.dtype))


def _hidden_for(params: int, layers: int) -> int:
    """The hidden size whose model comes nearest to `params` parameters: a multiple of the head size, but for narrow
    models, where these are far from each other."""
    guess = max(1, round(math.sqrt(params / (12 * layers)) / _HEAD_SIZE))
    sizes = [_HEAD_SIZE * heads for heads in range(max(1, guess - 2), guess + 3)]
    if guess <= _NARROW_HEADS:
        sizes += range(_NARROW_STEP, _HEAD_SIZE * _NARROW_HEADS, _NARROW_STEP)
    legal = (hidden for hidden in sizes if not hidden % (2 * _heads(hidden)))
    return min(legal, key=lambda hidden: abs(_count(hidden, layers) - params))


def _heads(hidden: int) -> int:
    return max(1, hidden // _HEAD_SIZE)


def _count(hidden: int, layers: int) -> int:
    """Parameters, but for the norms."""
    return layers * (4 * hidden**2 + 3 * hidden * _intermediate(hidden)) + 2 * VOCABULARY * hidden


def _check_room(what: str, nbytes: int, remedy: str) -> None:
    """Raises OutOfHostMemory for so many bytes where the host has no room for them."""
    available = offload.environment()["host"]["available_bytes"]
    if nbytes > available:
        raise offload.OutOfHostMemory(
            f"{what} take {format_bytes(nbytes)} in fp32, and {format_bytes(available)} of host memory are available: "
            f"give a smaller {remedy}"
        )


def _intermediate(hidden: int) -> int:
    """Llama's 8/3 of the hidden size, to a multiple of 16."""
    return max(16, round(hidden * 8 / 3 / 16) * 16)


def learning_rate_share(step: int, steps: int) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine down to a tenth."""
    warmup = max(1, int(steps * _WARMUP_SHARE))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return _FLOOR_SHARE + (1 - _FLOOR_SHARE) * 0.5 * (1 + math.cos(math.pi * progress))


class MasterAdamW(torch.optim.AdamW):
    """The reference for 16-bit weights: `torch.optim.AdamW` over fp32 masters, in plain PyTorch."""

    def __init__(self, parameters: list[nn.Parameter], **options: Any) -> None:
        self.weights = parameters
        self.masters = [parameter.detach().float() for parameter in parameters]
        super().__init__(self.masters, **options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for master, weight in zip(self.masters, self.weights, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
        result = super().step(closure)
        for master, weight in zip(self.masters, self.weights, strict=True):
            weight.copy_(master)
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        for weight in self.weights:
            weight.grad = None


def train(
    options: argparse.Namespace,
    corpus: Tensor,
    *,
    label: str,
    steps: int,
    snapshot_step: int,
    placement: str | None,
    device: torch.device,
    measures_peak: bool = True,
) -> Run:
    """Runs `steps` of the `options.steps` that the schedule spans; stops cleanly on Ctrl-C.

    placement: `"host"` (as the options say, gradients on the host) or `"device"` under offload, None for plain PyTorch.
    measures_peak: of device bytes, which makes the first steps slow.
    """
    if options.length >= len(corpus):
        raise offload.InvalidArgument(f"--length {options.length}: the text has {len(corpus):,} tokens; give fewer")
    run = Run()
    tokens = options.batch * options.length
    _check_room(f"the logits of {tokens:,} tokens", 4 * tokens * VOCABULARY, "--batch or --length")
    with shown(label, steps=steps) as progress:
        now_at("building the model")
        model, optimizer, offloaded = _prepare(options, placement, device)
        run.plan = offloaded.plan if offloaded else None
        schedule = LambdaLR(optimizer, lambda step: learning_rate_share(step, options.steps))
        inputs = batches(corpus, batch=options.batch, length=options.length, seed=options.seed)

        model.train()
        measuring = ExitStack()
        try:
            if offloaded and measures_peak:
                run.peak = measuring.enter_context(measured_peak(device, _live_bytes(model, offloaded)))
            for step in range(1, steps + 1):
                start = time.perf_counter()
                losses = []
                for _ in range(options.accumulate):
                    tokens = next(inputs).to(device)
                    loss = model(input_ids=tokens, labels=tokens).loss / options.accumulate
                    loss.backward()
                    losses.append(loss.detach())
                    run.tokens += tokens.numel()
                torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP_NORM)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                run.losses.append(float(torch.stack(losses).sum()))
                run.seconds += time.perf_counter() - start
                if step == _PEAK_STEPS:
                    measuring.close()
                progress.step(step, f"loss {run.losses[-1]:.4f}  {run.tokens_per_s:,.0f} tokens/s")
                if step == snapshot_step:
                    run.weights = _weights(model)
        except KeyboardInterrupt:
            run.interrupted = True
        finally:
            measuring.close()
    if offloaded:
        offloaded.synchronize()
        run.stats, run.memory = offloaded.stats(), offloaded.memory_summary()
        offload.unwrap(model, offloaded)
    return run


def _prepare(
    options: argparse.Namespace, placement: str | None, device: torch.device
) -> tuple[nn.Module, torch.optim.Optimizer, offload.OffloadOptimizer | None]:
    """Model and optimizer of a run; the third is the optimizer again when it is an offloading one."""
    where = _placement(options, placement)
    offload.Config(**where)  # what is not legal is told before the model is built
    model = build_model(options)  # on the CPU: wrap takes each weight to where it will be
    settings: dict[str, Any] = {"lr": options.lr, "betas": _BETAS, "weight_decay": _WEIGHT_DECAY}
    if placement is None:
        kind = torch.optim.AdamW if options.dtype == "float32" else MasterAdamW
        model.to(device)
        return model, kind(list(model.parameters()), **settings), None
    optimizer = torch.optim.AdamW(model.parameters(), **settings)
    model, offloaded = offload.wrap(model, optimizer, device=device, **where)
    return model, offloaded, offloaded


def _placement(options: argparse.Namespace, placement: str | None) -> dict[str, Any]:
    """The options of `wrap`."""
    where: dict[str, Any] = {"optimizer": "device", "params": "device", "gradients": placement or "device"}
    where |= {"moments": options.moments, "master": options.master}
    if placement == "host":
        where |= {
            "optimizer": options.optimizer,
            "params": options.params,
            "device_budget": options.device_budget,
            "host_budget": options.host_budget,
            "disk_path": options.disk_path,
            "activations": options.activations,
            "activation_format": options.activation_format,
        }
    return where


def _live_bytes(model: nn.Module, optimizer: offload.OffloadOptimizer) -> int:
    """What is on the device between two steps."""
    return sum(optimizer.stats().device_bytes.values()) + sum(buffer.nbytes for buffer in model.buffers())


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Host copies of all parameters."""
    state = model.state_dict()
    return {name: state[name].to("cpu", copy=True) for name, _ in model.named_parameters()}
