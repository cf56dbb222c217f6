"""The update of states on disk beside raw reads and writes of the same bytes: a part of `offload bench disk`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import offload

from ._bench_spread import summary

__all__ = ["measure_update"]

_WIDTH = 1024
_TARGET = 0.85
# A weight's remainder of 2 bytes and two fp32 moments.
_BYTES_PER_PARAMETER = 10


def measure_update(
    path: str, state_bytes: int, window_bytes: int, rounds: int, raw_gb_per_s: Callable[[str], float]
) -> dict[str, Any]:
    """Updates of a bf16 model whose states, about `state_bytes`, stream through `window_bytes` of host memory.

    raw_gb_per_s: the disk's own rate now, of "read", "write" or "both"; each round asks for all three first.

    The dict has, as summaries in seconds, `update_s`; `larger_s`, the larger of reading and writing the bytes that the
    update read and wrote, each alone; and `both_s`, of both at once. `share_of_larger` and `share_of_both` are these
    over `update_s`: above 1, the update was the faster.
    """
    depth = max(1, state_bytes // (_BYTES_PER_PARAMETER * _WIDTH**2))
    model = nn.Sequential(*(nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(depth))).to(torch.bfloat16)
    plain = torch.optim.AdamW(model.parameters(), lr=1e-5)
    _, optim = offload.wrap(
        model,
        plain,
        device="cpu",
        optimizer="disk",
        gradients="host",
        disk_path=path,
        disk_window=window_bytes,
    )
    batch = torch.ones(1, _WIDTH, dtype=torch.bfloat16)
    update_s, larger_s, both_s = [], [], []
    for number in range(rounds + 1):
        rates = {mode: raw_gb_per_s(mode) * 1e9 for mode in ("read", "write", "both")}
        model(batch).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # waits for the gradients
        before = optim.stats().disk
        start = time.perf_counter()
        optim.step()
        optim.synchronize()
        seconds = time.perf_counter() - start
        optim.zero_grad()
        disk = optim.stats().disk
        read, written = (disk[name] - before[name] for name in ("read_bytes", "written_bytes"))
        if number > 0:  # the first brings the states into being
            update_s.append(seconds)
            larger_s.append(max(read / rates["read"], written / rates["write"]))
            both_s.append((read + written) / rates["both"])
    return {
        "parameters": depth * _WIDTH**2,
        "window_bytes": disk["window_bytes"],
        "read_bytes": read,
        "written_bytes": written,
        "update_s": summary(update_s),
        "larger_s": summary(larger_s),
        "both_s": summary(both_s),
        "share_of_larger": summary([raw / own for raw, own in zip(larger_s, update_s, strict=True)])
        | {"target": _TARGET},
        "share_of_both": summary([raw / own for raw, own in zip(both_s, update_s, strict=True)]),
    }
