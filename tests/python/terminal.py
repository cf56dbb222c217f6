"""A pseudo-terminal, and what a person sees on it."""

from __future__ import annotations

import fcntl
import os
import re
import struct
import termios
import threading
from types import TracebackType
from typing import TextIO

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """`file` is a terminal of so many columns; what is written to it is `raw()` once it is closed."""

    def __init__(self, columns: int = 80) -> None:
        self._master, self.descriptor = os.openpty()
        fcntl.ioctl(self.descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        self.file: TextIO = os.fdopen(self.descriptor, "w", encoding="utf-8")
        self._read = bytearray()
        # A terminal holds a few KiB: whoever writes more waits for a reader.
        self._reader = threading.Thread(target=self._drain, daemon=True)
        self._reader.start()

    def _drain(self) -> None:
        while True:
            try:
                chunk = os.read(self._master, 1 << 16)
            except OSError:  # EIO: nobody has it open any more
                return
            self._read += chunk

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()
        self._reader.join()
        os.close(self._master)

    def raw(self) -> str:
        return self._read.decode().replace("\r\n", "\n")

    def text(self) -> str:
        """Without colours and movements."""
        return ESCAPES.sub("", self.raw())
