"""Plain text tables."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["format_bytes", "table"]


def table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """`rows[0]` is the header; the first `left` columns are aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:left], widths, strict=False)]
        cells += [cell.rjust(width) for cell, width in zip(row[left:], widths[left:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join(lines)


def format_bytes(size_bytes: int) -> str:
    """MiB with one decimal: the sizes of a table stay comparable."""
    return f"{size_bytes / 2**20:,.1f} MiB"
