"""What `optim.stats()` shows of an engine: bytes by tier, transfers, times and every slower path."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ._config import format_size
from ._engine import Engine
from ._host_grad import HostGrad
from ._native_state import NativeState
from ._pending import can_be_pending
from ._residency import why_resident
from ._speculation import why_not_ahead
from ._stats import ResidentWeight, Stats

_POOL_COUNTERS = (
    "budget_bytes", "mapped_bytes", "pinned_bytes", "used_bytes", "requested_bytes", "peak_used_bytes",
    "waiting_bytes", "live_count",
)  # fmt: skip


def engine_stats(engine: Engine, parameters: Sequence[Parameter], buffers: Mapping[str, Tensor]) -> Stats:
    """`parameters` and `buffers`: all of the model's, for the bytes on the device."""
    pools = [engine.pool.stats()]
    if engine.activations is not None:
        pools.append(engine.activations.pool_stats())
    pipeline = engine.pipeline.stats()
    resident_weights = sum(p.numel() * p.element_size() for p in parameters if p not in engine.streaming)
    gradients = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, HostGrad)]
    device = {
        "weights": resident_weights + engine.streaming.window.device_bytes,
        "gradients": sum(gradient.numel() * gradient.element_size() for gradient in gradients),
    }
    on_device = [state for state in engine.states.values() if not state.on_host]
    if on_device:
        device["master"] = sum(s.master.nbytes for s in on_device if s.master is not None)
        native = [state for state in on_device if isinstance(state, NativeState)]
        device["moments"] = sum(moment.nbytes for state in native for moment in state.moments.values())
    host, host_peak = (
        {tag: sum(pool[counter][tag] for pool in pools) for tag in pools[0][counter]}
        for counter in ("tag_bytes", "tag_peak_bytes")
    )
    peak_weight_bytes = resident_weights + engine.streaming.window.peak_bytes
    device_peak = {"weights": peak_weight_bytes, "gradients": max(engine.step.peak_gradient_bytes, device["gradients"])}
    known = {gradient.data_ptr() for gradient in gradients}  # an update on the host reads what p.grad still is
    passing = {"copies": sum(nbytes for at, nbytes in engine.lanes.in_ring().items() if at not in known)}
    device_peak["copies"] = engine.lanes.peak_ring_bytes
    if engine.activations is not None:
        saved, most_saved = engine.activations.device_bytes()
        passing = saved | {"copies": saved["copies"] + passing["copies"]}
        device_peak |= most_saved | {"copies": most_saved["copies"] + device_peak["copies"]}
    if engine.torch_optimizers:
        tier = host if engine.plan.optimizer == "host" else device
        tier["torch_states"] = sum(_state_bytes(optimizer.state) for optimizer in engine.torch_optimizers)
    fallbacks = [
        f"{state.name}: a Parameter subclass ({type(state.parameter).__name__}) cannot be pending, its update is "
        "waited for inside step()"
        for state in engine.states.values()
        if not state.by_device and not can_be_pending(state.parameter)
    ]
    pin_refusal = next((pool["pin_refusal"] for pool in pools if pool["pin_refused"]), "")
    if pin_refusal:
        fallbacks.append(f"host memory is pageable: {pin_refusal}")
    if engine.device.copies_together == "one by one":
        missing = engine.copy_kernel_refusal
        older = f"several at once need a driver for CUDA 12.8, or a kernel ({missing})"
        fallbacks.append(f"small copies go one by one: {older if missing else 'the driver refused to take several'}")
    activations = {} if engine.activations is None else engine.activations.stats()
    if activations.get("refused_bytes"):
        fallbacks.append(
            f"{format_size(activations['refused_bytes'])} of activations stayed on the device: host_budget is full"
        )
    if engine.activations is not None:
        fallbacks += engine.activations.fallbacks()
    by_device = [state for state in engine.states.values() if state.by_device]
    refusals = {state.kernel_refusal: None for state in by_device if isinstance(state, NativeState)}
    fallbacks += [f"the device updates states by separate torch operations: {why}" for why in refusals if why]
    paths = [] if engine.disk is None else engine.disk.stats()
    fallbacks += list(_disk_fallbacks(paths))
    if engine.disk is not None and engine.disk.snapshot_refusal is not None:
        fallbacks.append(
            "an asynchronous save copies what is on disk before it changes, or a step waits for the writer: "
            f"{engine.disk.snapshot_refusal}"
        )
    if engine.config.speculate_bytes and (why := why_not_ahead(engine)) is not None:
        fallbacks.append(f"no update begins in backward, as speculate= asks for: {why}")
    if engine.config.run_ahead and not engine.runs_ahead:
        params = engine.plan.params
        why = engine.pipeline.run_ahead_refusal if params == "host" else f"weights are on the {params}, not on the host"
        fallbacks.append(f"a forward waits for updates, against run_ahead=: {why}")
    fallbacks += [
        f"{type(optimizer).__name__} has no native update: its own torch operations run on the "
        f"{engine.plan.optimizer} inside step()"
        for optimizer in engine.torch_optimizers
    ]
    return Stats(
        steps=engine.step.count,
        device_bytes=device,
        host_bytes=host,
        pool={name: sum(pool[name] for pool in pools) for name in _POOL_COUNTERS},
        transfers=engine.transfers.stats(),
        isa=engine.isa,
        pinned=pools[0]["pinned_bytes"] > 0,
        pageable_reason=pin_refusal or None,
        update_s=pipeline["update_ns"] / 1e9 + engine.torch_update_s,
        blocked_s=pipeline["blocked_ns"] / 1e9 + engine.torch_update_s,
        exposed_s=pipeline["exposed_ns"] / 1e9 + engine.torch_update_s,
        fallbacks=tuple(fallbacks),
        peak_weight_bytes=peak_weight_bytes,
        activations=activations,
        resident_weights=tuple(_resident_weights(engine, parameters, buffers)),
        disk=_disk_counters(engine, paths, pipeline) if paths else {},
        passing_bytes=passing,
        device_peak_bytes=device_peak,
        host_peak_bytes=host_peak,
        speculation={} if engine.speculation is None else engine.speculation.stats(),
    )


def allocator_bytes(device: torch.device) -> dict[str, dict[str, int]]:
    """What torch's caching allocator has on a CUDA device, `now` and at its `peak`; empty for the CPU."""
    if device.type != "cuda":
        return {}
    return {
        "allocated": {
            "now": torch.cuda.memory_allocated(device),
            "peak": torch.cuda.max_memory_allocated(device),
        },
        "reserved": {"now": torch.cuda.memory_reserved(device), "peak": torch.cuda.max_memory_reserved(device)},
    }


def _disk_counters(engine: Engine, paths: Sequence[Mapping[str, Any]], pipeline: Mapping[str, int]) -> dict[str, int]:
    weights, store = engine.weights.cache_stats(), engine.disk
    assert store is not None
    return {
        "allocated_bytes": sum(path["allocated_bytes"] for path in paths),
        "window_bytes": engine.plan.host.window,
        "read_bytes": sum(path["read_bytes"] for path in paths),
        "written_bytes": sum(path["written_bytes"] for path in paths),
        "kept_bytes": pipeline["disk_kept_bytes"],
        "wait_ns": pipeline["disk_wait_ns"],
        "snapshot_count": store.snapshot_count,
        "snapshot_bytes": store.snapshot_bytes,
        "snapshot_peak_bytes": store.snapshot_peak_bytes,
        **{f"weights_{name}": value for name, value in weights.items()},
    }


def _disk_fallbacks(paths: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for path in paths:
        if path["backend"] != "io_uring":
            yield f"{path['directory']} is read and written by threads: io_uring is refused, {path['uring_refusal']}"
        if not path["direct"]:
            yield f"{path['directory']} is read and written through the page cache: {path['direct_refusal']}"
        if not path["reserved"]:
            yield f"{path['directory']} has no space reserved: {path['reservation_refusal']}"


def _resident_weights(
    engine: Engine, parameters: Sequence[Parameter], buffers: Mapping[str, Tensor]
) -> Iterator[ResidentWeight]:
    if engine.plan.params == "device":
        return
    for parameter in parameters:
        streamed = parameter in engine.streaming
        reason = engine.streaming.why_it_stays(parameter) if streamed else why_resident(parameter)
        if reason is not None and parameter.numel() > 0:
            yield ResidentWeight(engine.name_of(parameter), parameter.numel() * parameter.element_size(), reason)
    for name, buffer in buffers.items():
        if buffer.device == parameters[0].device and buffer.numel() > 0:
            yield ResidentWeight(name, buffer.numel() * buffer.element_size(), "a buffer: forward may write to it")


def _state_bytes(value: Any) -> int:
    """Of the tensors in a torch optimizer's state, however nested."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        return sum(_state_bytes(item) for item in value.values())
    return sum(_state_bytes(item) for item in value) if isinstance(value, (list, tuple)) else 0
