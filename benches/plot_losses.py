"""Draws the losses of `offload train --json` runs as curves of one SVG: plot_losses.py OUT.svg LABEL=RUN.json ...

Each curve is the running mean of 2 % of its steps. The means of the last 5 % are printed, and how far each is from the
first one's.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

_WIDTH, _HEIGHT, _MARGIN = 720, 360, 48
_COLOURS = ("#1f2937", "#2563eb", "#dc2626", "#059669", "#d97706")


def _smooth(losses: list[float], window: int) -> list[float]:
    return [
        sum(losses[max(0, i + 1 - window) : i + 1]) / len(losses[max(0, i + 1 - window) : i + 1])
        for i in range(len(losses))
    ]


def _svg(curves: dict[str, list[float]]) -> str:
    steps = max(len(losses) for losses in curves.values())
    low = min(min(losses) for losses in curves.values())
    high = max(max(losses) for losses in curves.values())

    def x(step: int) -> float:
        return _MARGIN + step / max(1, steps - 1) * (_WIDTH - 2 * _MARGIN)

    def y(loss: float) -> float:
        return _HEIGHT - _MARGIN - (loss - low) / (high - low) * (_HEIGHT - 2 * _MARGIN)

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<path d="M{_MARGIN},{_MARGIN}V{_HEIGHT - _MARGIN}H{_WIDTH - _MARGIN}" fill="none" stroke="#6b7280"/>',
    ]
    lines += [
        f'<text x="{_MARGIN - 6}" y="{y(loss) + 4:.1f}" text-anchor="end">{loss:.2f}</text>'
        for loss in (low, (low + high) / 2, high)
    ]
    lines += [
        f'<text x="{x(step):.1f}" y="{_HEIGHT - _MARGIN + 18}" text-anchor="middle">{step}</text>'
        for step in (0, steps // 2, steps)
    ]
    for number, (label, losses) in enumerate(curves.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        stride = max(1, len(losses) // 500)  # a point is about a pixel wide
        points = " ".join(f"{x(i):.1f},{y(losses[i]):.1f}" for i in range(0, len(losses), stride))
        lines.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.2"/>')
        lines.append(f'<text x="{_WIDTH - _MARGIN - 120}" y="{_MARGIN + 18 * number}" fill="{colour}">{label}</text>')
    return "\n".join([*lines, "</svg>", ""])


def main() -> None:
    """Reads the runs, writes the picture, prints the last losses."""
    out, *runs = sys.argv[1:]
    losses = {}
    for run in runs:
        label, _, path = run.partition("=")
        losses[label] = json.loads(Path(path).read_text())["losses"]
    means = {label: sum(own[-max(1, len(own) // 20) :]) / max(1, len(own) // 20) for label, own in losses.items()}
    first = next(iter(means.values()))
    for label, mean in means.items():
        print(f"{label}: {mean:.4f} ({mean / first - 1:+.2%})")
    curves = {label: _smooth(own, max(1, len(own) // 50)) for label, own in losses.items()}
    Path(out).write_text(_svg(curves))


if __name__ == "__main__":
    main()
