"""What a command tells on stderr while it works: a bar on a terminal, lines elsewhere, and nothing on stdout."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import offload
from offload.cli import _progress, main
from offload.cli._every import every
from offload.cli._progress import Progress, now_at, shown
from terminal import ESCAPES, Terminal

TINY = ["--layers", "2", "--hidden", "64", "--length", "16", "--batch", "2", "--accumulate", "1", "--steps", "12"]


@pytest.fixture(autouse=True)
def can_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the machine that tests says of its own terminal."""
    for name in ("NO_COLOR", "FORCE_COLOR", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything takes long enough to be shown, once before it begins and once when it is over."""

    @contextlib.contextmanager
    def around(seconds: float, call: Callable[[], object]) -> Iterator[None]:
        call()
        yield
        call()

    monkeypatch.setattr(_progress, "_FIRST_S", 0.0)
    monkeypatch.setattr(_progress, "_TERMINAL_S", 0.0)
    monkeypatch.setattr(_progress, "every", around)


def test_a_thread_ends_with_its_context() -> None:
    called = threading.Event()
    before = set(threading.enumerate())
    with every(1e-3, called.set):
        assert called.wait(60) and set(threading.enumerate()) - before
    assert not set(threading.enumerate()) - before


def test_what_is_over_soon_shows_nothing_and_a_log_a_line_in_ten_seconds() -> None:
    now = [0.0]
    stream = io.StringIO()
    progress = Progress("offload bench adamw", stream, lambda: now[0])
    for second in range(24):
        now[0] = second
        progress.at = f"round {second} of 24"
        progress.tick()
    progress.end()
    assert stream.getvalue().splitlines() == [
        f"offload bench adamw: {second} s, round {second} of 24" for second in (2, 12, 22)
    ]


def test_of_many_steps_a_log_has_a_tenth_and_of_slow_ones_where_they_are() -> None:
    now = [0.0]
    stream = io.StringIO()
    progress = Progress("offloaded", stream, lambda: now[0], steps=25)
    for number in range(1, 26):
        progress.step(number, f"loss {number}")
    lines = [f"offloaded: step {number}/25  loss {number}" for number in (1, *range(2, 25, 2), 25)]
    assert stream.getvalue().splitlines() == lines
    for second in (9, 10):
        now[0] = second
        progress.tick()
    progress.end()
    assert stream.getvalue().splitlines() == [*lines, "offloaded: 10 s, step 25/25  loss 25"]


@pytest.mark.parametrize("steps", [0, 8])
def test_a_terminal_has_a_bar_that_is_gone_at_the_end(steps: int) -> None:
    pytest.importorskip("rich")
    now = [0.0]
    with Terminal(100) as terminal:
        Progress("offload bench link", terminal.file, lambda: now[0]).end()
    assert terminal.raw() == "", "nothing was shown, nothing is erased"
    with Terminal(100) as terminal:
        progress = Progress("offload bench link", terminal.file, lambda: now[0], steps=steps)
        for second in (1, 2, 3):
            now[0] = second
            progress.step(second, "of [bold]all[/bold]") if steps else now_and(progress, f"round {second} of [9]")
            progress.tick()
        progress.end()
    for second in (2, 3):
        at = f"step {second}/8  of [bold]all[/bold]" if steps else f"round {second} of [9]"
        assert f"offload bench link: {second} s " in terminal.text() and f"━ {at}" in terminal.text()
    assert "link: 1 s" not in terminal.text()
    *_, last = terminal.raw().split("\x1b[2K")
    assert not ESCAPES.sub("", last).strip(), "nothing follows the last erasure of the line"
    assert terminal.raw().count("\x1b[?25l") == terminal.raw().count("\x1b[?25h") == 1, "the cursor is back"


def now_and(progress: Progress, at: str) -> None:
    progress.at = at


@pytest.mark.usefixtures("impatient")
def test_what_is_piped_away_stays_out_of_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    piped = io.StringIO()
    with monkeypatch.context() as patch, Terminal(100) as terminal:
        patch.setattr(sys, "stdout", piped)
        patch.setattr(sys, "stderr", terminal.file)
        with shown("offload env"):
            now_at("the [disk]")
            print("a result")
            print("a warning", file=sys.stderr)
        assert sys.stderr is terminal.file and sys.stdout is piped
    assert piped.getvalue() == "a result\n"
    assert "a warning\n" in terminal.text() and "━ the [disk]" in terminal.text() and "result" not in terminal.text()


@pytest.mark.usefixtures("impatient")
def test_training_with_json_has_its_bar_beside_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich")
    with monkeypatch.context() as patch, Terminal(100) as terminal:
        patch.setattr(sys, "stderr", terminal.file)
        assert main(["train", *TINY, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (
        f"━ step 12/12  loss {report['loss_last']:.4f}" in terminal.text() and "loss, first to last" in terminal.text()
    )
    assert "offloaded: step 1/" not in terminal.text(), "the bar takes the place of the lines"


@pytest.mark.usefixtures("impatient")
def test_training_without_rich_tells_in_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with monkeypatch.context() as patch, Terminal(100) as terminal:
        patch.setattr(sys, "stderr", terminal.file)
        assert main(["train", *TINY]) == 0
    steps = [line for line in terminal.raw().splitlines() if line.startswith("offloaded: step ")]
    assert [line.split()[2] for line in steps] == [f"{number}/12" for number in range(1, 13)]
    assert "\x1b" not in terminal.raw() and "tokens/s" in capsys.readouterr().out


@pytest.mark.usefixtures("impatient")
def test_every_command_that_may_take_long_tells_what_it_is_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = torch.nn.Linear(4, 4)
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters()), device="cpu")
    model(torch.ones(2, 4)).sum().backward()
    with offload.trace(tmp_path / "trace.json"):
        optimizer.step()
    offload.save_checkpoint(tmp_path, model, optimizer, tag="one")
    offload.unwrap(model, optimizer)
    tensors = str(tmp_path / "model.safetensors")
    small = ["--layers", "2", "--hidden", "64", "--vocabulary", "100", "--batch", "1", "--length", "16"]
    for command in (
        ["env", "--json"],
        ["plan", *small, "--hardware", "4090", "--json"],
        ["trace", "report", str(tmp_path / "trace.json"), "--json"],
        ["checkpoint", "show", str(tmp_path)],
        ["checkpoint", "export", str(tmp_path), "--out", tensors, "--dtype", "fp32"],
    ):
        assert main(command) == 0
        output = capsys.readouterr()
        name = " ".join(word for word in command[:2] if word.isalpha())
        assert f"offload {name}: 0 s" in output.err
        assert output.out.startswith(tensors) if "export" in command else json.loads(output.out)
