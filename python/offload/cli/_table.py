"""What commands show people: lines of text and tables, drawn by `rich` on a terminal that has it, plain otherwise.

Plain text is the same wherever it goes: into logs, pipes and bug reports. What is drawn fits the terminal: running text
is broken between words, and no cell is cut.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Piece", "Rows", "Table", "console_on", "facts", "format_bytes", "show", "show_report"]

Rows = Sequence[Sequence[str]]

_GAP = 2  # spaces between columns
_FIGURE = 12  # characters of one with its unit, such as 1,234.5 MiB
# What it costs to break a word, or a figure from its unit, where a row costs the square of its lines; and how many
# times as much in a header, which is read with each of the rows. As it looks best on the tables of the commands.
_BROKEN, _IN_HEADER = 6, 12
_NARROWEST = 32  # columns for running text in a plain table, on the smallest terminal


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells, the first being the header unless `header` is False.

    The first `left` columns are aligned to the left, the others to the right. wraps: the last column is running text,
    which is broken into lines in a plain table too.
    """

    rows: Rows
    left: int = 1
    title: str = ""
    header: bool = True
    wraps: bool = False

    def __str__(self) -> str:
        rows = _wrapped(self.rows) if self.wraps else self.rows
        widths = _longest(rows)
        lines = [(" " * _GAP).join(self._aligned(row, widths)).rstrip() for row in rows]
        if self.header:
            lines.insert(1, "-" * (sum(widths) + _GAP * (len(widths) - 1)))
        return "\n".join([self.title, "", *lines] if self.title else lines)

    def _aligned(self, row: Sequence[str], widths: Sequence[int]) -> list[str]:
        left = [cell.ljust(width) for cell, width in zip(row[: self.left], widths, strict=False)]
        return left + [cell.rjust(width) for cell, width in zip(row[self.left :], widths[self.left :], strict=True)]

    def draw(self, console: Console) -> None:
        from rich import box, table
        from rich.text import Text

        if self.title:
            console.print(Text(self.title, style="bold"))
        drawn = table.Table(
            box=box.SIMPLE_HEAD if self.header else None,
            show_header=self.header,
            show_edge=False,
            pad_edge=False,
            # The box has a column of its own between two.
            padding=(0, _GAP - 1 if self.header else _GAP, 0, 0),
        )
        names = self.rows[0] if self.header else [""] * len(self.rows[0])
        # Text, and never a string: in one `rich` reads [brackets] as its markup.
        for column, (name, width) in enumerate(zip(names, self._narrowed(console.width), strict=True)):
            left = column < self.left
            drawn.add_column(Text(name), justify="left" if left else "right", overflow="fold", width=width)
        for row in self.rows[self.header :]:
            drawn.add_row(*map(Text, row))
        console.print(drawn)

    def _narrowed(self, room: int) -> list[int]:
        """The widths of the columns in so much room: one by one those give way where it costs the least to read."""
        cells = [[len(cell) for cell in row] for row in self.rows]
        whole = [[len(_whole(cell, header=self.header and row is self.rows[0])) for cell in row] for row in self.rows]
        widths = [max(1, width) for width in _longest(self.rows)]

        def cost(column: int) -> tuple[int, int]:
            """With one column narrower by one; of equal costs that of the widest."""
            tried = [width - (number == column) for number, width in enumerate(widths)]
            lines = [[-(-size // width) for size, width in zip(row, tried, strict=True)] for row in cells]
            breaks = [sum((size - 1) // width for size, width in zip(row, tried, strict=True) if size) for row in whole]
            if self.header:
                breaks[0] *= _IN_HEADER
            return sum(max(row) ** 2 for row in lines) + _BROKEN * sum(breaks), -widths[column]

        while sum(widths) + _GAP * (len(widths) - 1) > room and max(widths) > 1:
            widths[min((column for column, width in enumerate(widths) if width > 1), key=cost)] -= 1
        return widths


Piece = str | Table


def facts(rows: Iterable[tuple[str, str]]) -> Table:
    """Names and what is to be said of each; one without a name goes on with what is above it."""
    return Table(list(rows), left=2, header=False)


def show(pieces: Iterable[Piece], file: TextIO | None = None, plain: str | None = None) -> None:
    """Prints one below the other. file: by default stdout. plain: the plain text, if it is not that of the pieces."""
    file = sys.stdout if file is None else file
    console = console_on(file)
    if console is None:
        print("\n".join(map(str, pieces)) if plain is None else plain, file=file, flush=True)
        return
    for piece in pieces:
        if isinstance(piece, Table):
            piece.draw(console)
        else:
            print(_filled(piece, console.width), file=file)
    file.flush()


class Report(Protocol):
    """What the library reports of itself: `offload.MemorySummary`, `offload.TraceReport`."""

    def pieces(self) -> Sequence[str | Rows]: ...


def show_report(report: Report, beside: Sequence[str] = (), file: TextIO | None = None) -> None:
    """Prints it, with lines below; plain as `print` does, for a terminal that draws its tables."""
    pieces = [piece if isinstance(piece, str) else Table(piece) for piece in report.pieces()]
    show([*pieces, *beside], file, plain="\n".join([str(report), *beside]))


def console_on(file: TextIO) -> Console | None:
    """What `rich` draws on; None where text is to be plain: no terminal, a dumb one, NO_COLOR is set, or no `rich`."""
    if not file.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") in ("dumb", "unknown"):
        return None
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        return None
    return Console(file=file, highlight=False)


def format_bytes(size_bytes: int) -> str:
    """MiB with one decimal: the sizes of a table stay comparable."""
    return f"{size_bytes / 2**20:,.1f} MiB"


def _whole(cell: str, *, header: bool) -> str:
    """What of a cell should stay in one line: a figure with its unit, else its longest word."""
    return cell if len(cell) <= _FIGURE and not header else max(cell.split(), key=len, default="")


def _longest(rows: Rows) -> list[int]:
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def _wrapped(rows: Rows) -> list[Sequence[str]]:
    """The rows with the last column broken into lines that fit the terminal."""
    taken = sum(width + _GAP for width in _longest(rows)[:-1])
    width = max(shutil.get_terminal_size().columns - taken, _NARROWEST)
    lines: list[Sequence[str]] = []
    for *cells, text in rows:
        first, *others = textwrap.wrap(text, width) or [""]
        lines.append((*cells, first))
        lines += [(*[""] * len(cells), other) for other in others]
    return lines


def _filled(text: str, width: int) -> str:
    """Its lines broken between words, and indented below their own beginning or that of their item."""
    lines = []
    for line in text.split("\n"):
        indent = " " * (len(line) - len(line.lstrip(" -")))
        wrapped = textwrap.wrap(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
        lines += wrapped or [""]
    return "\n".join(lines)
