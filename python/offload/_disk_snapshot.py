"""What states and weights on disk were at a call, for who reads them while training changes them.

[Note: snapshots by reflink] An asynchronous save streams what is on disk from clones of the disk tier's files: the file
system keeps the old bytes by copy-on-write, so a step changes states on disk and waits for nothing. A clone has no name
and goes with the save, as it does with the process. What training overwrites meanwhile takes new space, up to all bytes
of the files. So clones are made where free space holds that and the checkpoint; where the space runs out all the same,
the write that finds none makes the clone give up its bytes (csrc/storage/scratch_file.h): the save fails, and not the
training. Where the file system refuses, or the space is too little, states on disk are copied before they change, or a
step waits for the writer (_snapshot.py), and `stats()` says why.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from ._config import format_size
from ._disk import DiskStore

__all__ = ["DiskSnapshot", "open_snapshot"]

# Of the bytes of the files, in 1/64: what the file system notes of blocks that are shared.
_NOTES_SHARE = 64


class DiskSnapshot:
    """The bytes of `stores` when this was made; any thread may read. Raises `StorageError` where a disk refuses."""

    def __init__(self, stores: Sequence[DiskStore]) -> None:
        self._clones: dict[DiskStore, DiskStore] = {}
        try:
            for store in stores:
                self._clones[store] = store.clone()
        except BaseException:
            self.close()
            raise
        for store in stores:
            store.snapshot_count += 1
            store.snapshot_bytes = store.allocated_bytes
            store.snapshot_peak_bytes = max(store.snapshot_peak_bytes, store.snapshot_bytes)

    def of(self, store: DiskStore) -> DiskStore:
        return self._clones[store]

    def close(self) -> None:
        """Gives its space back. Read nothing after it. Idempotent."""
        while self._clones:
            store, clone = self._clones.popitem()
            clone.close()
            store.snapshot_bytes = 0

    def __del__(self) -> None:
        self.close()


def open_snapshot(stores: Sequence[DiskStore], directory: str | os.PathLike[str], nbytes: int) -> DiskSnapshot | None:
    """A snapshot of the stores for a checkpoint of `nbytes` in `directory`; None where each store says why not."""
    snapshot = None
    try:
        refusal = _shortage(stores, directory, nbytes)
        if refusal is None:
            snapshot = DiskSnapshot(stores)
    except OSError as error:  # a StorageError too
        refusal = error.strerror or str(error)
    for store in stores:
        store.snapshot_refusal = refusal
    return snapshot


def _shortage(stores: Sequence[DiskStore], directory: str | os.PathLike[str], nbytes: int) -> str | None:
    """Which file system has too little space for what copy-on-write may take beside the checkpoint."""
    needed: dict[int, int] = {}
    places = {os.stat(directory).st_dev: directory}
    for store in stores:
        for path in store.stats():
            device = os.stat(path["directory"]).st_dev
            places.setdefault(device, path["directory"])
            taken = path["allocated_bytes"]
            needed[device] = needed.get(device, 0) + taken + taken // _NOTES_SHARE
    checkpoint_device = os.stat(directory).st_dev
    if checkpoint_device in needed:
        needed[checkpoint_device] += nbytes
    for device, size in needed.items():
        facts = os.statvfs(places[device])
        free = facts.f_bavail * facts.f_frsize
        if free < size:
            return (
                f"{os.fspath(places[device])} has {format_size(free)} free, and a reflink beside training may take "
                f"{format_size(size)}"
            )
    return None
