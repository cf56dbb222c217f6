"""What commands show people: lines of text and tables, laid out here; `rich` gives them weight on a terminal.

What is shown fits the terminal, or COLUMNS: a table that is too wide first moves columns below their rows, as it was
told, then breaks cells between words, and breaks a word only where nothing else is left. No cell is cut. In pipes and
files tables have 120 columns; sentences and facts stay in one line there, for whoever searches them.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Protocol, TextIO

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Piece", "Rows", "Table", "console_on", "facts", "format_bytes", "show", "show_report"]

Rows = Sequence[Sequence[str]]
Line = tuple[Literal["title", "header", "rule", "row", "below"], str]

_GAP = 2  # spaces between columns
_INDENT = 4  # of what stands below its row
_FIGURE = 12  # characters of one with its unit, such as 1,234.5 MiB
_IN_A_FILE = 120  # columns of what no terminal shows
_NOTHING = ("", "-")
_STYLES = {"title": "bold", "header": "bold", "below": "dim"}


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells, the first being the header unless `header` is False.

    The first `left` columns and the last `words`, which are running text, are aligned to the left, the others to the
    right. below: columns that leave a table which is too wide, the first of them first; they then stand below their
    rows, each behind the words that are its value here. A column in which nothing is said is left out.
    """

    rows: Rows
    left: int = 1
    title: str = ""
    header: bool = True
    words: int = 0
    below: Mapping[int, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return "\n".join(text for _, text in self.lines(_IN_A_FILE))

    def lines(self, room: int, rule: str = "-") -> Iterator[Line]:
        """What to show in so many columns, with what each line is. rule: what the line below the header is made of."""
        if self.title:
            yield from (("title", line) for line in textwrap.wrap(self.title, room))
            yield "title", ""
        columns = self._said()
        folded: list[int] = []
        for column in self.below:
            if self._width(columns) > room and column in columns:
                columns.remove(column)
                folded.append(column)
        widths = self._widths(columns, room)
        for number, row in enumerate(self.rows):
            is_header = self.header and number == 0
            yield from (("header" if is_header else "row", line) for line in self._row(row, columns, widths, is_header))
            if is_header:
                yield "rule", rule * (sum(widths) + _GAP * (len(widths) - 1))
            else:
                yield from (("below", line) for line in self._below(row, folded, room))

    def _said(self) -> list[int]:
        """The columns in which something is said; the first one always."""
        body = self.rows[self.header :]
        said = [any(row[column] not in _NOTHING for row in body) for column in range(len(self.rows[0]))]
        return [column for column, is_said in enumerate(said) if is_said or column == 0 or not body]

    def _width(self, columns: Sequence[int]) -> int:
        """With every cell in one line, but for those of the header."""
        widths = [max([self._least(0, column), *(len(row[column]) for row in self.rows[1:])]) for column in columns]
        return sum(widths) + _GAP * (len(columns) - 1)

    def _least(self, row: int, column: int) -> int:
        """The narrowest that a cell can be without a broken word, or a figure apart from its unit."""
        return _unbroken(self.rows[row][column], in_header=self.header and row == 0)

    def _widths(self, columns: Sequence[int], room: int) -> list[int]:
        """Of the columns in so much room: one by one those give way where it makes the fewest lines."""
        sizes = [[len(row[column]) for column in columns] for row in self.rows]
        least = [max(self._least(row, column) for row in range(len(self.rows))) for column in columns]
        widths = [max(1, *column) for column in zip(*sizes, strict=True)]

        def lines(narrowed: int) -> tuple[int, int]:
            """With one column narrower by one; of as many that of the widest."""
            tried = [width - (number == narrowed) for number, width in enumerate(widths)]
            heights = [max(-(-size // width) for size, width in zip(row, tried, strict=True)) for row in sizes]
            return sum(heights), -widths[narrowed]

        while sum(widths) + _GAP * (len(widths) - 1) > room:
            loose = [number for number, width in enumerate(widths) if width > max(1, least[number])]
            if loose:
                widths[min(loose, key=lines)] -= 1
            elif max(widths) > 1:
                widths[widths.index(max(widths))] -= 1  # words break
            else:
                break
        return widths

    def _row(self, row: Sequence[str], columns: Sequence[int], widths: Sequence[int], is_header: bool) -> Iterator[str]:
        cells = [_broken(row[column], width, is_header) for column, width in zip(columns, widths, strict=True)]
        for number in range(max(1, *map(len, cells))):
            line = []
            for column, width, broken in zip(columns, widths, cells, strict=True):
                text = broken[number] if number < len(broken) else ""
                to_left = column < self.left or column >= len(row) - self.words
                line.append(text.ljust(width) if to_left else text.rjust(width))
            yield (" " * _GAP).join(line).rstrip()

    def _below(self, row: Sequence[str], folded: Sequence[int], room: int) -> list[str]:
        said = [(self.below[column], row[column]) for column in sorted(folded) if row[column] not in _NOTHING]
        indent = " " * min(_INDENT, room - 1)
        return textwrap.wrap(
            "; ".join(" ".join(words).lstrip() for words in said),
            room,
            initial_indent=indent,
            subsequent_indent=indent,
            break_on_hyphens=False,
        )


class _WordBreaker(textwrap.TextWrapper):
    """Breaks paths and dotted names behind what joins their parts."""

    wordsep_re = wordsep_simple_re = re.compile(r"(\s+|(?<=[./_,:+=-])(?=\w))")


Piece = str | Table


def facts(rows: Iterable[tuple[str, str]]) -> Table:
    """Names and what is to be said of each; one without a name goes on with what is above it."""
    return Table(list(rows), header=False, words=1)


def show(pieces: Iterable[Piece], file: TextIO | None = None) -> None:
    """Prints one below the other. file: by default stdout."""
    file = sys.stdout if file is None else file
    console, columns = console_on(file), _columns(file)
    rule = "-" if console is None or console.options.ascii_only else "─"
    for piece in pieces:
        lines: Iterable[Line]
        if isinstance(piece, Table):
            lines = piece.lines(columns or (_IN_A_FILE if piece.header else sys.maxsize), rule)
        else:
            lines = [("row", _filled(piece, columns) if columns else piece)]
        for kind, line in lines:
            if console is None or kind not in _STYLES:
                print(line, file=file)
            else:
                _print_styled(console, line, _STYLES[kind])
    file.flush()


class Report(Protocol):
    """What the library reports of itself: `offload.MemorySummary`, `offload.TraceReport`."""

    def pieces(self) -> Sequence[str | Rows]: ...


def show_report(report: Report, beside: Sequence[str] = (), file: TextIO | None = None) -> None:
    """Prints it, with lines below."""
    show([*(piece if isinstance(piece, str) else Table(piece) for piece in report.pieces()), *beside], file)


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
    """In the unit that suits the size, as the library's own reports have it: `"1.50 GiB"`."""
    value, units = float(size_bytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(value) >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{size_bytes} B" if units[0] == "B" else f"{value:.2f} {units[0]}"


def _print_styled(console: Console, line: str, style: str) -> None:
    from rich.text import Text

    # Text, and never a string: in one `rich` reads [brackets] as its markup.
    console.print(Text(line, style=style), soft_wrap=True)


def _columns(file: TextIO) -> int | None:
    """Columns to fill: what COLUMNS says, else those of the terminal; None where there is none."""
    said = os.environ.get("COLUMNS", "")
    if said.isdigit() and int(said):
        return int(said)
    try:
        return os.get_terminal_size(file.fileno()).columns or _IN_A_FILE  # 0: a terminal of unknown size
    except (OSError, ValueError):  # not a terminal, or not a file at all
        return None


def _unbroken(cell: str, *, in_header: bool) -> int:
    """The length of what should stay in one line: a figure with its unit, else the longest word."""
    if len(cell) <= _FIGURE and not in_header:
        return len(cell)
    return max(map(len, (cell.replace("-", "- ") if in_header else cell).split()), default=0)


def _broken(cell: str, width: int, at_hyphens: bool) -> list[str]:
    indent = cell[: len(cell) - len(cell.lstrip())]
    kind = textwrap.TextWrapper if _unbroken(cell, in_header=at_hyphens) <= width else _WordBreaker
    return kind(width, subsequent_indent=indent, break_on_hyphens=at_hyphens).wrap(cell)


def _filled(text: str, width: int) -> str:
    """Its lines broken between words, and indented below their own beginning or that of their item."""
    lines = []
    for line in text.split("\n"):
        indent = " " * (len(line) - len(line.lstrip(" -")))
        wrapped = textwrap.wrap(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
        lines += wrapped or [""]
    return "\n".join(lines)
