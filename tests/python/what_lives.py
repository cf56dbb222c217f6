"""What is alive in this process: threads, open files, pages of host pools; and what nobody refers to any more, gone."""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

# A flag of a thread in /proc: it is ending, so whoever joins it may have gone on already. Of linux/sched.h.
_PF_EXITING = 0x4
# Far beyond what a thread takes to begin or to end on a busy machine: only one that never does gets there.
_HANG_S = 60


def collect() -> None:
    """Collects garbage until there is none: the end of an engine or of an error frees more."""
    for _ in range(10):
        if gc.collect() == 0:
            return


def all_gone(references: Iterable[Callable[[], object]]) -> bool:
    """Collects until these weak references are dead.

    Autograd's thread for a device lets go of a backward a moment after that has ended: what it still holds at a
    collection is left for the next one.
    """
    deadline = time.monotonic() + _HANG_S
    waiting = list(references)
    while waiting and time.monotonic() < deadline:
        collect()
        waiting = [reference for reference in waiting if reference() is not None]
        os.sched_yield()
    return not waiting


def _threads() -> Iterator[tuple[str, str]]:
    """(number, name) of each thread. One that was joined is listed for a moment longer, and left out here."""
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it ended meanwhile
            before, _, after = (task / "stat").read_text().rpartition(")")
            if not int(after.split()[6]) & _PF_EXITING:
                yield task.name, before.partition("(")[2]


def threads(*prefixes: str) -> list[str]:
    """The names of the threads that begin with one of `prefixes`."""
    return sorted(name for _, name in _threads() if name.startswith(prefixes))


def thread_numbers() -> set[str]:
    return {number for number, _ in _threads()}


def all_sleep(prefix: str) -> bool:
    """Whether there was a moment at which every thread whose name begins so slept, and none had been woken.

    One that was woken counts as running from then on, and every rest is counted: there was such a moment between two
    looks at which all sleep and nobody has rested again.
    """
    looks: list[list[bytes]] = [[], []]
    for look in looks:
        for task in os.listdir("/proc/self/task"):
            try:
                with open(f"/proc/self/task/{task}/status", "rb") as file:
                    text = file.read()
            except OSError:  # it ended meanwhile
                return False
            if text.startswith(f"Name:\t{prefix}".encode()):
                if b"\nState:\tS" not in text:
                    return False
                look.append(text[text.index(b"\nvoluntary_ctxt_switches") :])
    return looks[0] == looks[1]


def open_files() -> set[tuple[str, str]]:
    """(descriptor, file) of each, but the one that lists them."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.add((name, os.readlink(f"/proc/self/fd/{name}")))
    return found


def pool_bytes() -> int:
    """Of mappings that a forked child would not get: those of host pools are marked so. Neighbours show as one."""
    total = size = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.startswith("Size:"):
            size = int(line.split()[1]) * 1024
        elif line.startswith("VmFlags:") and "dc" in line.split():
            total += size
    return total
