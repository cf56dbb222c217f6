"""Steps of a model whose weights are on disk, beside raw reads and writes and the same steps with weights in memory:
a part of `offload bench disk`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

import offload

from ._bench_spread import summary

__all__ = ["measure_weights"]

_WIDTH = 1024
_UNIT_BYTES = 2 * _WIDTH**2
_ROWS = 64  # of a batch
_CACHED_SHARE = 0.25  # of the weights, that the host's memory holds
_STEPS = 3  # in a sample: the disk is to stay busy from one step to the next


def measure_weights(path: str, weight_bytes: int, rounds: int, raw_gb_per_s: Callable[[str], float]) -> dict[str, Any]:
    """Steps of a bf16 model with about `weight_bytes` of weights on disk and its other states on the host.

    raw_gb_per_s: the disk's own rate now, of "read", "write" or "both"; each round asks for all three first.

    The dict has, as summaries in seconds a step, `step_s`; `on_host_s`, the same with weights that stream from the host
    without a disk; `in_memory_s`, with weights where they are needed; `larger_s`, the largest of that and of reading
    and writing as many bytes, each alone; and `both_s`, the larger of that and of reading and writing at once.
    `share_of_larger` and `share_of_both` are these over `step_s`.

    Raises AssertionError where the losses of the three are not the same, bit for bit.
    """
    depth = max(8, weight_bytes // _UNIT_BYTES)
    on_disk = _Steps(depth, params="disk", disk_path=path, host_budget=_budget(depth, path))
    on_host, in_memory = _Steps(depth, params="host"), _Steps(depth, params="device")
    step_s, host_s, memory_s, larger_s, both_s = [], [], [], [], []
    for number in range(rounds + 1):
        rates = {mode: raw_gb_per_s(mode) * 1e9 for mode in ("read", "write", "both")}
        before = on_disk.moved()
        seconds, streamed, resident = on_disk.seconds(), on_host.seconds(), in_memory.seconds()
        read, written = (after - earlier for after, earlier in zip(on_disk.moved(), before, strict=True))
        if number > 0:  # the first records the order in which units are needed
            step_s.append(seconds)
            host_s.append(streamed)
            memory_s.append(resident)
            larger_s.append(max(resident, read / _STEPS / rates["read"], written / _STEPS / rates["write"]))
            both_s.append(max(resident, (read + written) / _STEPS / rates["both"]))
    if not on_disk.losses == on_host.losses == in_memory.losses:
        raise AssertionError("weights on disk train to other losses than weights in memory")
    if not read or not written:
        raise AssertionError(f"{read} bytes of weights were read and {written} written: they were not on disk")
    cache_bytes = on_disk.stats()["weights_cache_bytes"]
    for steps in (on_disk, on_host, in_memory):
        steps.end()
    return {
        "weight_bytes": depth * _UNIT_BYTES,
        "cache_bytes": cache_bytes,
        "read_bytes": read // _STEPS,
        "written_bytes": written // _STEPS,
        "step_s": summary(step_s),
        "on_host_s": summary(host_s),
        "in_memory_s": summary(memory_s),
        "larger_s": summary(larger_s),
        "both_s": summary(both_s),
        "share_of_larger": summary([bound / own for bound, own in zip(larger_s, step_s, strict=True)]),
        "share_of_both": summary([bound / own for bound, own in zip(both_s, step_s, strict=True)]),
    }


def _model(depth: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(depth))).to(torch.bfloat16)


def _budget(depth: int, path: str) -> int:
    """Host bytes with which a part of the weights finds room beside everything else."""
    host = offload.estimate(_model(depth), optimizer="host", gradients="host", params="disk", disk_path=path).host
    cached = max(2 * _UNIT_BYTES, int(_CACHED_SHARE * depth * _UNIT_BYTES))
    # Sums of gradients take what the cache leaves: a quarter of it.
    return host.total - host.cache + int(cached / 0.75) + (1 << 20)


class _Steps:
    """Steps of one model in one placement."""

    def __init__(self, depth: int, **where: Any) -> None:
        model = _model(depth)
        plain = torch.optim.AdamW(model.parameters(), lr=1e-5)
        self._model, self._optimizer = offload.wrap(
            model, plain, device="cpu", optimizer="host", gradients="host", **where
        )
        self._batch = torch.ones(_ROWS, _WIDTH, dtype=torch.bfloat16)
        self.losses: list[float] = []

    def seconds(self) -> float:
        """Of a step, in a row of several."""
        start = time.perf_counter()
        for _ in range(_STEPS):
            loss = self._model(self._batch).square().mean()
            loss.backward()
            self._optimizer.step()
            self._optimizer.zero_grad()
            self.losses.append(loss.item())
        self._optimizer.synchronize()
        return (time.perf_counter() - start) / _STEPS

    def stats(self) -> Mapping[str, int]:
        return self._optimizer.stats().disk

    def moved(self) -> tuple[int, int]:
        """Bytes of weights read and written so far."""
        disk = self.stats()
        return disk["weights_read_bytes"], disk["weights_written_bytes"]

    def end(self) -> None:
        offload.unwrap(self._model, self._optimizer)
