"""DeepSpeed's async I/O over the same disk: a side of `offload bench disk` where it is installed and can be built."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
import tempfile
import time
from typing import Any

import torch

__all__ = ["DeepSpeedSide", "deepspeed_refusal"]

_THREADS = 4  # of each direction


def deepspeed_refusal() -> str | None:
    """Why DeepSpeed's async I/O cannot be measured here; None if it can. Builds nothing but a probe of libaio."""
    if importlib.util.find_spec("deepspeed") is None:
        return "not installed"
    with contextlib.redirect_stdout(sys.stderr):
        try:
            compatible = _builder().is_compatible()
        except Exception as error:  # of another package, at its import or its probe
            return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return None if compatible else "its async I/O cannot be built here; it needs libaio with its headers"


def _builder() -> Any:
    return importlib.import_module("deepspeed.ops.op_builder").AsyncIOBuilder()


class DeepSpeedSide:
    """A handle for each direction, as its own swapper has it, and a window of its page-locked buffers.

    Its handles wait for all that they were given, so a window is submitted as a whole.
    """

    def __init__(self, path: str, block_count: int, *, block: int, chunk: int, window: int) -> None:
        with contextlib.redirect_stdout(sys.stderr):  # it builds its library aloud at its first use
            library = _builder().load()
        self._block, self._chunk = block, chunk
        descriptor, self._name = tempfile.mkstemp(dir=path)
        try:
            os.posix_fallocate(descriptor, 0, block_count * block)
        finally:
            os.close(descriptor)
        self._handles = {
            verb: library.aio_handle(block_size=block, queue_depth=window, intra_op_parallelism=_THREADS)
            for verb in ("read", "write")
        }
        example = torch.empty(0, dtype=torch.uint8)
        self._buffers: dict[str, list[torch.Tensor]] = {
            verb: [handle.new_cpu_locked_tensor(chunk * block, example) for _ in range(window // chunk)]
            for verb, handle in self._handles.items()
        }
        for number, buffer in enumerate(self._buffers["write"]):
            buffer.fill_(number + 1)
        self.seconds({"write": (0, block_count)})

    def seconds(self, spans: dict[str, tuple[int, int]]) -> float:
        start = time.perf_counter()
        at = {verb: first for verb, (first, _) in spans.items()}
        while at:
            for verb in at:
                at[verb] = self._submit(verb, at[verb], spans[verb][1])
            for verb in at:
                self._handles[verb].wait()
            at = {verb: block for verb, block in at.items() if block < spans[verb][1]}
        return time.perf_counter() - start

    def _submit(self, verb: str, block: int, end: int) -> int:
        """Submits a window from `block` on; returns where the next one begins."""
        handle = self._handles[verb]
        submit = handle.async_pread if verb == "read" else handle.async_pwrite
        for buffer in self._buffers[verb]:
            count = min(self._chunk, end - block)
            if count > 0:
                submit(buffer[: count * self._block], self._name, block * self._block)
                block += count
        return block

    def check(self) -> None:
        """A figure for bytes that did not move would be the best of all."""
        self._buffers["read"][0].zero_()
        self.seconds({"read": (0, self._chunk)})
        if not torch.equal(self._buffers["read"][0], self._buffers["write"][0]):
            raise AssertionError("DeepSpeed's async I/O gave other bytes than were written")

    def close(self) -> None:
        for verb, handle in self._handles.items():
            for buffer in self._buffers.pop(verb):
                handle.free_cpu_locked_tensor(buffer)
        os.unlink(self._name)
