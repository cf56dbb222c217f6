"""`offload bench train`: a Llama-shaped bf16 model, offloaded beside other ways to train it, against a step's bound.

Runs of the same model on the same random tokens, with deterministic algorithms, by the tokens of a step:
  a placement  such as optimizer+gradients: `offload.wrap` with these kinds on the host
  resident     the same library with everything on the device; losses of placements must have the same bits
  torch        plain `torch.optim.AdamW(fused=True)` on the bf16 weights: no fp32 masters, bf16 moments, other losses
  compute      forward and backward alone, without hooks and without an update
  peers        other libraries that offload (_bench_peers.py)
Where all runs fit at once they take turns, block of steps after block; otherwise each is freed before the next.
`--device-cap` limits what torch may allocate in runs of placements alone: a larger model trains beside itself resident.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

import offload

from ._arguments import place_or_share
from ._bench_ceilings import ceilings
from ._bench_figures import Figure, figure
from ._bench_model import build, sizes_of
from ._bench_peers import PEERS, Unavailable, leaving_the_group
from ._bench_run import (
    AHEAD,
    KINDS,
    ROUNDED,
    Compute,
    Offloaded,
    Place,
    Run,
    Size,
    Training,
    free_bytes,
    plain_adamw,
    release,
    wrap_options,
)
from ._device import compute_device, make_deterministic
from ._model_shapes import MODELS, TINY, ModelShape
from ._progress import now_at
from ._table import Piece, Table, format_bytes

__all__ = ["conclude", "figures", "parse_places", "pieces", "run"]

_LANES = ("to_host", "to_device")
_BESIDE = ("compute", "resident", "torch")
_PEER_RUNS = ("torch", *PEERS)
_BLOCKS = 3  # of runs that take turns
# Of compute: a quarter where checkpoints are recomputed, a third else.
_FORWARD_SHARE = 0.25
# A run on the host and the device together: 18 bytes a parameter, and the gradients that are added up meanwhile.
_BYTES_OF_A_RUN = 18
_SHARE_FOR_ALL_RUNS = 0.5

_SIZES: dict[str, tuple[ModelShape, int, int, int]] = {  # shape, tokens a step, of a sequence, steps
    "tiny": (TINY, 64, 32, 6),
    "1b": (MODELS["Llama-3.2-1B"], 16384, 2048, 15),
    "8b": (MODELS["Llama-3.1-8B"], 8192, 2048, 6),
}

Start = Callable[[], Training]


def _size(options: argparse.Namespace) -> Size:
    """The size that was asked for. Raises `InvalidArgument` for tokens that do not fill whole sequences."""
    shape, default_tokens, longest, default_steps = _SIZES[options.size]
    all_tokens = tuple(options.tokens or (default_tokens,))
    sequence = min(*all_tokens, longest)
    micro_batch = options.micro_batch or max(all_tokens)
    for tokens in all_tokens:
        if tokens % sequence:
            raise offload.InvalidArgument(
                f"--tokens {tokens}: give at most {longest}, one sequence, or a multiple of {sequence}"
            )
        if tokens % min(tokens, micro_batch) or min(tokens, micro_batch) % sequence:
            raise offload.InvalidArgument(
                f"--micro-batch {micro_batch}: give a multiple of {sequence}, one sequence, that divides {tokens}, the "
                "tokens of a step"
            )
    return Size(
        shape=dataclasses.replace(shape, vocabulary=options.vocabulary or shape.vocabulary),
        tokens=all_tokens,
        sequence=sequence,
        steps=options.steps or (2 if options.quick else default_steps),
        micro_batch=micro_batch,
        checkpointing=not options.no_checkpointing,
    )


def parse_places(text: str) -> dict[str, Place]:
    """`"optimizer:0.5+gradients"` as `{"optimizer": 0.5, "gradients": "host"}`. Raises `InvalidArgument`."""
    places: dict[str, Place] = {}
    for part in text.split("+"):
        kind, _, share = part.partition(":")
        place = place_or_share(share) if share else "host"
        known = isinstance(place, float) or not share or (kind == "activations" and share in ROUNDED)
        known |= kind == "params" and share == AHEAD
        known |= kind == "optimizer" and (place == "unified" or isinstance(place, dict))
        places[kind] = place
        if kind not in KINDS or not known:
            raise offload.InvalidArgument(
                f"--offload {text}: give kinds joined by '+', of {', '.join(KINDS)}, such as optimizer+gradients, "
                "optimizer:0.5+gradients for half of the states, optimizer:unified, optimizer:unified=0.5,host=0.5, "
                "params:ahead, or activations:int8 or :fp8"
            )
    return places


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Times the runs. Seconds, bytes, and bandwidths in bytes a second.

    Yields a JSON-able dict whenever there is something new, the last one complete. `runs` by name: `setup_s`,
    `peak_device_bytes`, `losses` and `steps`, by tokens a step: `tokens`, `micro_batches`, `step_s`, `tokens_per_s`
    and `step_over_resident`; of placements `moved_bytes` a step, `share_of_link`, `hidden_share`, `bound` (what each
    lane of the forecast has to do), `bound_by`, `share_of_bound` and `forecast_s`. A run that did not come about has
    only `does_not_fit`, `unavailable` or `failed`, with the reason. `losses_equal_resident`: of all placements but
    those that round activations.
    """
    size = _size(options)
    placements = {text: parse_places(text) for text in options.offload}
    device = compute_device(options.device)
    cap = _fraction(options.device_cap, device)
    make_deterministic(device)
    starts = _starts(placements, options, size, device)
    fits = len(starts) * size.count * _BYTES_OF_A_RUN < _SHARE_FOR_ALL_RUNS * free_bytes(device)
    interleaved = fits and cap is None  # a cap is of one run
    result: dict[str, Any] = {
        "name": "train",
        "size": options.size,
        "device": str(device),
        "parameters": size.count,
        "vocabulary": size.shape.vocabulary,
        "micro_batch_tokens": size.micro_batch,
        "sequence_tokens": size.sequence,
        "device_cap_gib": options.device_cap,
        "gradient_checkpointing": size.checkpointing,
        "interleaved": interleaved,
        "ceilings_bytes_per_s": ceilings(device, quick=options.quick or options.size == "tiny"),
        "runs": {},
    }
    with leaving_the_group():
        for names in [tuple(starts)] if interleaved else [(name,) for name in starts]:
            with _capped(device, cap if names[0] in placements else None):
                for measured in _measure({name: starts[name] for name in names}, size, device):
                    result["runs"] |= measured
                    yield conclude(result)
            release(device)


def _starts(
    placements: Mapping[str, Mapping[str, Place]], options: argparse.Namespace, size: Size, device: torch.device
) -> dict[str, Start]:
    """How each run begins, by name, in the order of the runs: what others are compared with comes first."""
    offloaded = partial(Offloaded, size, device, host_budget=options.host_budget)
    beside: dict[str, Start] = {
        "compute": partial(Compute, size, device),
        "resident": partial(offloaded, {}),
        "torch": partial(plain_adamw, size, device),
        **{name: partial(start, size, device, options.host_budget) for name, start in PEERS.items()},
    }
    # A tiny model costs little beside any peer; others are named where they are wanted.
    wanted = options.beside
    if wanted is None:
        wanted = [*_BESIDE, *(PEERS if options.size == "tiny" else ())]
    return {name: start for name, start in beside.items() if name in wanted} | {
        text: partial(offloaded, places) for text, places in placements.items()
    }


def _measure(starts: Mapping[str, Start], size: Size, device: torch.device) -> Iterator[dict[str, Any]]:
    """Results by name of runs that take turns, after each number of tokens."""
    refused: dict[str, Any] = {}
    runs: dict[str, Run] = {}
    for name, start in starts.items():
        now_at(f"{name}: warming up")
        started = _started(name, start, size, device)
        if isinstance(started, Run):
            runs[name] = started
        else:
            refused[name] = started
    blocks = min(_BLOCKS, size.steps) if len(starts) > 1 else 1
    for tokens in size.tokens:
        for number in range(blocks):
            for name, one in runs.items():
                now_at(f"{name}: {tokens:,} tokens, block {number + 1} of {blocks}")
                one.block(tokens, size.steps // blocks + (number < size.steps % blocks))
        yield refused | {name: one.result() for name, one in runs.items()}


def _started(name: str, start: Start, size: Size, device: torch.device) -> Run | dict[str, str]:
    """The run, warmed up, or why there is none."""
    try:
        return Run(start, size, device)
    except (torch.OutOfMemoryError, offload.OutOfHostMemory) as error:
        return {"does_not_fit": _first_line(error)}
    except Unavailable as error:
        return {"unavailable": str(error)}
    except Exception as error:
        # A peer may fail in any way, which is to be shown beside what did run. Ours must not.
        if name not in PEERS:
            raise
        return {"failed": f"{type(error).__name__}: {_first_line(error)}"}


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def conclude(result: Mapping[str, Any]) -> dict[str, Any]:
    """The result with what its runs so far allow to say of each other."""
    measured = {name: one for name, one in result["runs"].items() if "steps" in one}
    compute = _medians(measured.get("compute"))
    resident = _medians(measured.get("resident"))
    rates = result["ceilings_bytes_per_s"]
    concluded: dict[str, Any] = {**result, "runs": dict(result["runs"])}
    equal = []
    for name, one in measured.items():
        if name == "compute":
            continue
        steps = []
        for row in one["steps"]:
            tokens, median = row["tokens"], row["step_s"]["median"]
            more: dict[str, Any] = {}
            if tokens in resident and name != "resident":
                more["step_over_resident"] = median / resident[tokens]
            if "moved_bytes" in row:
                more["share_of_link"] = {lane: row["moved_bytes"][lane] / median / rates[lane] for lane in _LANES}
            micro_batch = tokens // row["micro_batches"]
            if "places" in one and name != "resident" and micro_batch in compute:
                shape = dataclasses.replace(_SIZES[result["size"]][0], vocabulary=result["vocabulary"])
                step = _forecast(shape, one["places"], row["micro_batches"], compute[micro_batch], rates)
                more["bound"] = {f"{lane}_s": seconds for lane, seconds in step.busy.items() if seconds}
                more["bound_by"] = f"{step.bound_by}_s"
                more["share_of_bound"] = step.bound_seconds / median
                more["forecast_s"] = step.seconds
            steps.append(row | more)
        concluded["runs"][name] = {**one, "steps": steps}
        exact = "places" in one and one["places"]["activations"] not in ROUNDED
        if exact and name != "resident" and "resident" in measured:
            # While runs are still going on one of them is ahead.
            pairs = list(zip(one["losses"], measured["resident"]["losses"], strict=False))
            equal.append(all(loss == other for loss, other in pairs))
            concluded["runs"][name]["losses_equal_resident"] = equal[-1]
    if equal:
        concluded["losses_equal_resident"] = all(equal)
    concluded["absent_peers"] = {
        name: reason
        for name, one in result["runs"].items()
        if name in PEERS
        for reason in one.values()
        if "steps" not in one
    }
    return concluded


def _forecast(
    shape: ModelShape,
    places: Mapping[str, Place],
    micro_batches: int,
    micro_batch_s: float,
    rates: Mapping[str, float],
) -> offload.StepForecast:
    """Of a step with `places` on the host; activations do not count, nor does the device's own update, whose rate the
    ceilings do not have. micro_batch_s: forward and backward of one, alone."""
    options = wrap_options({kind: place for kind, place in places.items() if kind != "activations"})
    sizes, plan = _planned(shape, json.dumps(options))
    total = sum(size.numel for size in sizes)
    compute: dict[str, tuple[float, float]] = {}
    for size in sizes:
        forward, backward = compute.get(size.unit, (0.0, 0.0))
        share = micro_batch_s * size.numel / total
        compute[size.unit] = forward + _FORWARD_SHARE * share, backward + (1 - _FORWARD_SHARE) * share
    machine = offload.Machine(
        rates["to_host"],
        rates["to_device"],
        host_update=rates["host_memory_while_copying"],
        device_update=math.inf,
    )
    works = offload.unit_works(sizes, plan, offload.Config(**options), compute)
    return offload.forecast(works, machine, micro_batches=micro_batches, prefetch=plan.prefetch)


@functools.lru_cache
def _planned(shape: ModelShape, places: str) -> tuple[list[offload.ParameterSize], offload.Plan]:
    """Of a model that is never made; `places` as JSON."""
    meta = torch.device("meta")
    model = build(shape, 1, meta, meta, checkpointing=False)
    return sizes_of(model), offload.estimate(model, **json.loads(places))


def _medians(one: Mapping[str, Any] | None) -> dict[int, float]:
    """Seconds of a step by its tokens."""
    return {} if one is None else {row["tokens"]: row["step_s"]["median"] for row in one["steps"]}


def _fraction(cap_gib: float | None, device: torch.device) -> float | None:
    """The share of the device's memory that `cap_gib` GiB are. Raises `InvalidArgument` where nothing can be capped."""
    if cap_gib is None:
        return None
    if device.type != "cuda":
        raise offload.InvalidArgument(f"--device-cap {cap_gib:g}: only CUDA's allocator can be capped, not {device}")
    total = torch.cuda.mem_get_info(device)[1]
    if cap_gib * 2**30 > total:
        raise offload.InvalidArgument(f"--device-cap {cap_gib:g}: {device} has {total / 2**30:.1f} GiB")
    return cap_gib * 2**30 / total


@contextlib.contextmanager
def _capped(device: torch.device, fraction: float | None) -> Iterator[None]:
    """Torch allocates at most this share of the device's memory inside the context."""
    if fraction is None:
        yield
        return
    torch.cuda.set_per_process_memory_fraction(fraction, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def figures(result: Mapping[str, Any]) -> list[Figure]:
    """Steps of every run by their tokens; placements beside their bound and, at as many tokens, beside the peers."""
    rows = {(name, row["tokens"]): row for name, one in result["runs"].items() for row in one.get("steps", ())}
    found = []
    for (name, tokens), row in rows.items():
        label = f"{name}, {tokens:,} tokens"
        if name == "compute":
            found.append(figure(label, "s a step", row["step_s"], side="ceiling"))
            continue
        if name in _PEER_RUNS:
            found.append(figure(label, "s a step", row["step_s"], side="peer"))
            continue
        ceiling = None
        if "bound" in row:
            ceiling = f"its bound ({row['bound_by']})", row["share_of_bound"] * row["step_s"]["median"]
        peers = {peer: rows[peer, tokens]["step_s"] for peer in _PEER_RUNS if (peer, tokens) in rows}
        found.append(figure(label, "s a step", row["step_s"], ceiling=ceiling, peers=peers))
    return found


def pieces(result: dict[str, Any]) -> list[Piece]:
    """The table of a result; what its steps spread over is in the figures."""
    header = ("run", "tokens", "step s", "tokens/s", "of resident", "of bound", "hidden", "device peak")
    rows: list[Sequence[str]] = [header]
    refused = []
    for name, one in result["runs"].items():
        if name in result.get("absent_peers", {}):  # they have a line of their own
            continue
        if "steps" not in one:
            ((outcome, reason),) = one.items()
            refused.append(f"{name} {outcome.replace('_', ' ')}: {reason}")
            continue
        peak = one["peak_device_bytes"]
        for row in one["steps"]:
            resident = f"{1 / row['step_over_resident']:.3f}" if "step_over_resident" in row else "-"
            shares = [f"{row[key]:.3f}" if key in row else "-" for key in ("share_of_bound", "hidden_share")]
            memory = "-" if peak is None else format_bytes(peak)
            seconds, pace = f"{row['step_s']['median']:.4f}", f"{row['tokens_per_s']:,.0f}"
            rows.append((name, f"{row['tokens']:,}", seconds, pace, resident, *shares, memory))
    about = f"{result['size']}, {result['parameters']:,} parameters on {result['device']}"
    below = {7: "device peak", 6: "hidden share of the host update"}
    shown: list[Piece] = [about, Table(rows, below=below), *refused]
    if "losses_equal_resident" in result:
        equal = "equal bit for bit" if result["losses_equal_resident"] else "NOT EQUAL"
        shown.append(f"losses of offloaded and resident: {equal}")
    return shown
