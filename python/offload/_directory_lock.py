"""One save at a time in a directory of checkpoints: a lock file in it says which process it is.

The lock is a record lock: the system releases that of a process that dies, so none is ever stale, and a forked child
does not have its parent's. It belongs to the process, and any closing of the file there would end it; so the saves of
one process are told apart by a table here.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import threading
import warnings
import weakref
from pathlib import Path

from ._errors import StateError, StorageError

__all__ = ["DirectoryLock"]

_LOCK_FILE = ".lock"
# struct flock of Linux: type, whence, start, length, process.
_RECORD = struct.Struct("hhqqi")
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

# Reentrant: the garbage collector may end another lock within its blocks.
_guard = threading.RLock()
# Of this process, by device and inode of the directory.
_held: weakref.WeakValueDictionary[tuple[int, int], DirectoryLock] = weakref.WeakValueDictionary()


def _forget_in_child() -> None:
    global _guard
    _guard = threading.RLock()  # the parent's may have been taken
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)


class DirectoryLock:
    """A directory of checkpoints, made if it is not there, and locked until `release()` or the end of this object.

    Raises `StateError` naming the process that is saving there, and `StorageError` when the disk refuses. Where the
    file system has no locks it warns, and nothing keeps others away.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.made = not directory.is_dir()
        self._path = directory / _LOCK_FILE
        self._file: int | None = None
        self._process = os.getpid()
        try:
            directory.mkdir(parents=True, exist_ok=True)
            facts = directory.stat()
            with _guard:
                key = facts.st_dev, facts.st_ino
                if key in _held:
                    raise _in_use(directory, os.getpid())
                _held[key] = self
            while not self._try_lock():
                pass
        except BaseException as error:
            self.release()  # now: who keeps the error keeps this object, which is a frame's of its traceback
            if isinstance(error, OSError):
                raise StorageError(f"the checkpoint was not saved: {directory} cannot be locked: {error}") from error
            raise

    def release(self) -> None:
        """Ends the lock; a directory that was made for it and has nothing in it goes. Cannot fail. Idempotent."""
        file, self._file = self._file, None
        if self._process != os.getpid():
            return  # a forked child has neither the lock nor the file's only name
        if file is not None:
            with contextlib.suppress(OSError):
                self._path.unlink()  # while it is locked, so that it is nobody else's
            with contextlib.suppress(OSError):
                os.close(file)
        with _guard:
            for key in [key for key, lock in _held.items() if lock is self]:
                del _held[key]
        if self.made:
            with contextlib.suppress(OSError):
                self.directory.rmdir()

    def __del__(self) -> None:
        self.release()

    def _try_lock(self) -> bool:
        """False: the file that was locked had just been removed by its owner."""
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = os.fstat(file)
            with contextlib.suppress(FileNotFoundError):
                named = os.stat(self._path)
                if (locked.st_dev, locked.st_ino) == (named.st_dev, named.st_ino):
                    self._file = file
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                holder = _holder_of(file)
                if holder == 0:  # it has just ended
                    return False
                raise _in_use(self.directory, holder) from None
            if error.errno not in _NO_LOCKS:
                raise
            self._file = file
            warnings.warn(
                f"{self.directory} is on a file system without locks ({error}): nothing keeps two processes from "
                "saving there at once",
                stacklevel=5,  # the caller of save_checkpoint()
            )
        finally:
            if self._file is None:
                os.close(file)
        return self._file is not None


def _holder_of(file: int) -> int:
    """The process that has the lock; 0 where there is none any more, and -1 for one that cannot be seen from here."""
    asked = _RECORD.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    kind, _, _, _, process = _RECORD.unpack(fcntl.fcntl(file, fcntl.F_GETLK, asked))
    return 0 if kind == fcntl.F_UNLCK else process or -1


def _in_use(directory: Path, process: int) -> StateError:
    who = "this process" if process == os.getpid() else "a process elsewhere" if process < 0 else "process"
    number = f" {process}" if process > 0 else ""
    return StateError(
        f"{who}{number} is saving a checkpoint into {directory}: wait until that save has ended, or give each run a "
        "directory of its own"
    )
