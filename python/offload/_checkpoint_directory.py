"""A directory of checkpoints, of which the last good one survives a kill at any instant.

[Note: the commit] A checkpoint is written into `.TAG.unfinished`, each file made durable, `manifest.json` last. Then
the directory gets its name `TAG` by one rename, and `latest`, a file that holds the tag, is replaced by another. A
checkpoint of the same name is first renamed to `.TAG.replaced`: where that exists and `TAG` does not, a kill fell
between the two renames, and it is still the checkpoint. Names with a leading dot are nobody's: the next save removes
them. A tag that has its name is whole, for every byte was durable before.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from . import _durable_files as durable
from ._directory_lock import DirectoryLock
from ._durable_files import WrittenFile
from ._errors import InvalidArgument, StorageError

__all__ = ["Manifest", "check_tag", "commit", "latest_tag", "open_checkpoint"]

MANIFEST = "manifest.json"
LATEST = "latest"
_FORMAT = "offload checkpoint"
_VERSION = 1
# Directory entries, and the blocks that a file does not fill.
_SPARE_BYTES = 64 << 10


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of: its files by name."""

    path: Path
    tag: str
    files: Mapping[str, WrittenFile]

    def verify(self) -> None:
        """Reads every file; raises `StorageError` naming the one that is missing, short or damaged, and where."""
        for name, written in self.files.items():
            durable.check_file(self.path / name, written)


def check_tag(tag: str) -> str:
    """The tag, if a directory can have that name; raises `InvalidArgument`."""
    if not isinstance(tag, str) or not tag or tag.startswith(".") or "/" in tag or "\0" in tag or tag == LATEST:
        raise InvalidArgument(
            f"tag={tag!r}: it becomes the name of a directory, so give text such as 'step1000', without '/', not "
            f"beginning with '.', and not {LATEST!r}"
        )
    return tag


def commit(
    lock: DirectoryLock,
    tag: str,
    nbytes: int,
    write: Callable[[Path], Mapping[str, WrittenFile]],
    *,
    set_latest: bool,
    keep: int | None,
) -> None:
    """Makes what `write` puts into the folder it is given the checkpoint `tag` of the locked directory.

    See [Note: the commit].
    `nbytes` is what `write` will write. `keep` leaves that many of the newest checkpoints, this one among them.
    Raises `StorageError` with the bytes needed and free when the disk refuses; everything is as it was then.
    """
    directory = lock.directory
    home, pointer = directory / tag, directory / f".{LATEST}.unfinished"
    unfinished, replaced = _aside(directory, tag, "unfinished"), _aside(directory, tag, "replaced")
    named = False
    try:
        _tidy(directory)
        free = _free_bytes(directory)
        if nbytes + _SPARE_BYTES > free:
            raise StorageError(_too_full(directory, tag, nbytes, free))
        unfinished.mkdir()
        files = write(unfinished)
        document = {
            "format": _FORMAT,
            "version": _VERSION,
            "tag": tag,
            "files": {name: asdict(written) for name, written in files.items()},
        }
        durable.write_bytes(unfinished / MANIFEST, (json.dumps(document) + "\n").encode())
        durable.sync_directory(unfinished)
        if set_latest:  # before the renames, after which nothing needs room any more
            durable.write_bytes(pointer, tag.encode())
        if lock.made:
            durable.sync_directory(directory.parent)
        if home.exists():
            durable.rename(home, replaced)
        named = True
        durable.rename(unfinished, home)
    except BaseException as error:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            if named and not unfinished.exists():
                os.replace(home, unfinished)
            _tidy(directory)
        if isinstance(error, OSError) and not isinstance(error, StorageError):
            raise StorageError(_refused(directory, tag, nbytes, error)) from error
        raise
    try:
        if set_latest:
            durable.rename(pointer, directory / LATEST)
    except OSError as error:
        raise StorageError(
            f"checkpoint {tag!r} is whole in {home}, but {directory / LATEST} may not name it: {error}"
        ) from error
    with contextlib.suppress(OSError):  # the checkpoint is there; the next save removes what is left
        durable.remove_tree(replaced)
        if keep is not None:
            _retire(directory, tag, keep)


def _aside(directory: Path, tag: str, state: str) -> Path:
    return directory / f".{tag}.{state}"


def _tidy(directory: Path) -> None:
    """Brings back a checkpoint that was about to be replaced, and removes what an earlier save left behind."""
    for path in directory.glob(".*.replaced"):
        home = directory / path.name[1 : -len(".replaced")]
        if not home.exists():
            durable.rename(path, home)
    for state in ("unfinished", "replaced", "retired"):
        for path in directory.glob(f".*.{state}"):
            if path.is_dir():
                durable.remove_tree(path)
            else:
                path.unlink()


def _retire(directory: Path, tag: str, keep: int) -> None:
    """Removes all but the newest checkpoints; the present one and that of `latest` stay."""
    kept = {tag, latest_tag(directory)}
    manifests = sorted(directory.glob(f"*/{MANIFEST}"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    others = [
        path.parent for path in manifests if path.parent.name not in kept and not path.parent.name.startswith(".")
    ]
    for old in others[max(0, keep - len(kept - {None})) :]:
        aside = _aside(directory, old.name, "retired")
        durable.rename(old, aside)  # at once: half of it never has the name of a checkpoint
        durable.remove_tree(aside)


def latest_tag(directory: Path) -> str | None:
    """What `latest` says; None without that file. Raises `StorageError` if it holds no tag."""
    try:
        text = (directory / LATEST).read_text("utf-8").strip()
    except FileNotFoundError:
        return None
    except NotADirectoryError as error:
        raise StorageError(f"{directory} is a file: name a directory that offload.save_checkpoint wrote") from error
    except UnicodeDecodeError as error:
        raise StorageError(
            f"{directory / LATEST} holds no tag ({error}): write the name of a checkpoint there"
        ) from error
    try:
        return check_tag(text)
    except InvalidArgument as error:
        raise StorageError(f"{directory / LATEST} holds no tag: {error}") from error


def open_checkpoint(directory: Path, tag: str | None) -> Manifest:
    """The manifest of the checkpoint `tag`, or of the one that `latest` names.

    Raises `StorageError` where there is none, or none that can be read.
    """
    if tag is None:
        tag = latest_tag(directory)
        if tag is None:
            raise StorageError(
                f"there is no checkpoint in {directory}: it has no file {LATEST!r}; name a directory that "
                "offload.save_checkpoint wrote, or pass tag= (--tag)"
            )
    path = directory / check_tag(tag)
    replaced = _aside(directory, tag, "replaced")
    if not path.exists() and replaced.exists():
        path = replaced
    try:
        document = json.loads((path / MANIFEST).read_text("utf-8"))
        if document["format"] != _FORMAT or document["version"] != _VERSION:
            raise StorageError(
                f"{path / MANIFEST} is of {document['format']!r} version {document['version']!r}, and this offload "
                f"reads {_FORMAT!r} version {_VERSION}: use the offload that wrote it"
            )
        files = {
            name: WrittenFile(int(file["nbytes"]), int(file["chunk_bytes"]), tuple(map(int, file["crc32"])))
            for name, file in document["files"].items()
        }
    except (FileNotFoundError, NotADirectoryError):
        found = sorted(found.parent.name for found in directory.glob(f"[!.]*/{MANIFEST}"))
        raise StorageError(f"there is no checkpoint {tag!r} in {directory}; it has {found or 'none'}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StorageError(f"{path / MANIFEST} is damaged ({error!r}): load another checkpoint") from error
    for name, file in files.items():
        chunks = -(-file.nbytes // file.chunk_bytes) if file.chunk_bytes > 0 else -1
        if "/" in name or chunks != len(file.crc32):
            raise StorageError(f"{path / MANIFEST} is damaged: its entry {name!r}; load another checkpoint")
    return Manifest(path, tag, files)


def _free_bytes(directory: Path) -> int:
    facts = os.statvfs(directory)
    return facts.f_bavail * facts.f_frsize


def _too_full(directory: Path, tag: str, nbytes: int, free: int) -> str:
    return (
        f"checkpoint {tag!r} needs {nbytes:,} bytes and {directory} has {free:,} free: make room there, or save "
        "elsewhere; nothing was written"
    )


def _refused(directory: Path, tag: str, nbytes: int, error: OSError) -> str:
    there = next(path for path in (directory, *directory.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    return (
        f"checkpoint {tag!r} was not saved: {error}. It needs {nbytes:,} bytes, and {there} has {free:,} free; earlier "
        "checkpoints are untouched, and nothing of this one is left"
    )
