"""The tables of `offload plan`: each placement stands once, with the figures of its JSON, however narrow they are."""

from __future__ import annotations

import functools
import re
import sys
from typing import Any

import pytest
import torch

import offload
from offload.cli import _plan
from offload.cli._plan_model import decoder_of_depth
from offload.cli._plan_text import pieces
from offload.cli._table import Table, show
from terminal import ESCAPES

KINDS = ("optimizer", "gradients", "params")


@functools.cache
def result(vocabulary: int = 128256) -> dict[str, Any]:
    """Of a decoder of which parts fit, with two batches: what `--json` prints."""
    model = decoder_of_depth(32, vocabulary, torch.bfloat16)
    prediction = offload.predict(model, offload.Hardware.preset("4090"), batches=(1, 4))
    formats = {"moments": "fp32", "master": "auto", "activation_format": "exact"}
    named = {"model": "a decoder", "dtype": "bfloat16", "optimizer_class": "adamw", "notes": [], "largest": []}
    return {**named, **formats, **_plan._as_json(prediction)}


def tables() -> dict[str, Table]:
    return {piece.title.partition(":")[0]: piece for piece in pieces(result()) if isinstance(piece, Table)}


def test_each_placement_stands_once_with_both_of_its_steps() -> None:
    found = result()
    header, *rows = tables()["Where it can be"].rows
    assert list(header) == ["#", "optimizer", "gradients", "weights", "device", "host", "disk", "stay", "leave"]
    places = [[re.sub(r"^\d+% host$", "mixed", cell) for cell in row[1:4]] for row in rows]
    half = len(found["placements"]) // 2
    assert len(rows) == half == len({tuple(place) for place in places}) and half > 6
    shown = {step["placement"]: step["seconds"] for step in found["steps"] if step["batch"] == 4}
    cells = set()
    for number, (row, place) in enumerate(zip(rows, places, strict=True)):
        assert row[0] == str(number + 1)
        for placement, activations, cell in ((number, "device", row[-2]), (number + half, "checkpoints", row[-1])):
            placed = found["placements"][placement]
            assert [placed["options"][kind] for kind in KINDS] == place
            assert placed["options"]["activations"] == activations
            assert cell == ("no" if placed["refusal"] else f"{shown[placement]:.2f} s")
            tiers = [sum(placed[tier].values()) / 2**30 for tier in ("device", "host", "disk")]
            assert list(row[4:7]) == [f"{gib:,.1f}" if gib else "-" for gib in tiers]
            cells.add(cell)
    # Weights on disk of which the cache holds all cost no time: two of the seven have the same.
    assert cells == {"no"} | {f"{seconds:.2f} s" for seconds in shown.values()} and len(cells) == 5


def test_the_fastest_of_each_batch_names_its_row() -> None:
    found = result()
    _, *rows = tables()["How fast it is"].rows
    assert len(rows) == 2
    half = len(found["placements"]) // 2
    for number, row in zip(found["fastest"], rows, strict=True):
        step = found["steps"][number]
        leaves = step["placement"] >= half
        assert list(row[:3]) == [
            f"{step['tokens']:,}",
            str(step["placement"] - half * leaves + 1),
            "leave" if leaves else "stay",
        ]


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("columns", [40, 60, 80])
def test_no_figure_is_lost_or_broken_in_a_narrow_terminal(
    columns: int, drawn: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    if drawn:
        pytest.importorskip("rich")
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.delenv("NO_COLOR", raising=False)
    show(pieces(result()))
    text = ESCAPES.sub("", capsys.readouterr().out)
    assert max(map(len, text.splitlines())) <= columns
    words = {word.rstrip(";.,") for word in text.split()}
    for table in tables().values():
        for row in table.rows[1:]:
            assert {word.rstrip(";.,") for cell in row for word in cell.split()} - words <= {"-"}


def test_the_answer_is_within_the_first_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which placement, how fast, what bounds it, what to write: a plan that `wrap` can take, and a faster one."""
    first, _, answer, *_ = pieces(result())
    assert isinstance(first, str) and isinstance(answer, Table)
    names = [name for name, _ in answer.rows]
    assert names[:3] == ["write", "speed", "bound"] and set(names) <= {"write", "speed", "bound", "faster", "note"}
    room = list(answer.lines(80))
    assert len(room) <= 12
    calls = [text for name, text in answer.rows if name in ("write", "faster")]
    taken: list[dict[str, Any]] = []
    monkeypatch.setattr(offload, "wrap", lambda model, optim, **options: taken.append(options))
    for call in calls:
        eval(call, {"offload": offload, "model": None, "optim": None, "DIRECTORY": "."})
    assert len(taken) == len(calls)
    for options in taken:
        offload.Config(**options)
