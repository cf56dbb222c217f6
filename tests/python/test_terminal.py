"""What commands show on a terminal: tables drawn by `rich`, with the cells of the plain text and none of them cut."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import offload
from offload.cli import _bench, _env, _plan, _train, main
from offload.cli._table import Piece, Table, facts, show, show_report
from terminal import Terminal

pytest.importorskip("rich")

CONFIGS = Path(__file__).with_name("deepspeed_configs")
RESULTS = Path(__file__).parents[2] / "benches" / "results"
CONFIG = str(CONFIGS / "chat_zero3_bf16.json")
TINY = ["--layers", "2", "--hidden", "64", "--length", "16", "--batch", "2", "--accumulate", "1", "--steps", "2"]
RULE = "─"

AWKWARD = Table(
    [
        ("name", "where it is", "bytes of it", "remark"),
        ("[bold]weights[/bold]", "/a/long/path/with[brackets]/and-no-space/at/all", "1,234.5 MiB", "none"),
        ("[/] :smile: [link=x]", "host", "7 MiB", "several words, which may stand in several lines"),
        ("", "-", "0", "[red]"),
    ],
    left=2,
    title="[Where] it is",
)


@pytest.fixture(autouse=True)
def can_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the machine that tests says of its own terminal."""
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def drawn(monkeypatch: pytest.MonkeyPatch, pieces: Iterable[Piece], columns: int) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    with Terminal(columns) as terminal:
        show(pieces, terminal.file)
    return terminal.text()


def plain(pieces: Iterable[Piece]) -> str:
    file = io.StringIO()
    show(pieces, file)
    return file.getvalue()


def cells(text: str) -> list[list[str]]:
    """By line, without rules and empty lines."""
    lines = (line.strip() for line in text.splitlines())
    return [re.split(r" {2,}", line) for line in lines if line.strip("─-")]


def characters(text: str) -> Counter[str]:
    return Counter("".join(text.replace(RULE, "").split()))


@pytest.mark.parametrize("columns", [20, 40, 60, 80, 120, 200])
def test_no_cell_is_cut_and_no_line_is_too_wide(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    text = drawn(monkeypatch, [AWKWARD], columns)
    assert characters(text) == characters(AWKWARD.title + "".join(map("".join, AWKWARD.rows)))
    assert max(map(len, text.splitlines())) <= columns
    if columns >= 80:
        assert "1,234.5 MiB" in text and "[bold]weights[/bold]" in text, "a long path gives way before them"


def test_brackets_are_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    text = drawn(monkeypatch, ["[bold]line[/bold] :smile:", AWKWARD, facts([("[b]name", "[i]value")])], 200)
    for words in (
        "[bold]line[/bold] :smile:",
        "[bold]weights[/bold]",
        "[/] :smile: [link=x]",
        "[red]",
        "[Where] it is",
    ):
        assert words in text
    assert cells(text)[-1] == ["[b]name", "[i]value"]


def test_lines_are_broken_between_words_and_stand_below_their_item(monkeypatch: pytest.MonkeyPatch) -> None:
    text = drawn(
        monkeypatch, ["- one two three four", "  do: five six seven", "", "/a/path/that-is/longer-than-a-line"], 14
    )
    assert text.splitlines() == [
        "- one two",
        "  three four",
        "  do: five six",
        "  seven",
        "",
        "/a/path/that-is/longer-than-a-line",
    ]


def test_facts_stand_beside_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = [facts([("host", "four GiB of memory"), ("", "and more"), ("io_uring", "no")])]
    assert plain(pieces) == "host      four GiB of memory\n          and more\nio_uring  no\n"
    lines = [line.rstrip() for line in drawn(monkeypatch, pieces, 20).splitlines()]
    assert lines == ["host      four GiB", "          of memory", "          and more", "io_uring  no"]


@pytest.mark.parametrize("reason", ["no rich", "NO_COLOR", "TERM=dumb", "a pipe"])
def test_plain_text_stays_what_it_was(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    pieces = ["a line of words", AWKWARD, Table([("kind", "bytes"), ("m", "1")])]
    if reason == "no rich":
        for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "rich", None)
    elif reason == "NO_COLOR":
        monkeypatch.setenv("NO_COLOR", "1")
    elif reason == "TERM=dumb":
        monkeypatch.setenv("TERM", "dumb")
    text = plain(pieces) if reason == "a pipe" else drawn(monkeypatch, pieces, 120)
    widths = [20, 47, 11, 36]  # of 47: a row of running text has a second line
    assert text.splitlines()[:4] == [
        "a line of words",
        "[Where] it is",
        "",
        "name".ljust(22) + "where it is".ljust(49) + "bytes of it" + "remark".rjust(38),
    ]
    assert text.splitlines()[4] == "-" * (sum(widths) + 6)
    assert text.endswith("\nkind  bytes\n-----------\nm         1\n")


# --- a table that is too wide ---------------------------------------------------------------------------------------

FIGURES = Table(
    [
        ("figure", "median", "unit", "of", "beside"),
        ("copies to the host", "12.5", "GB/s", "0.98 of raw copies on this link", "torch 1.20, another library 1.35"),
        ("copies to the device", "7", "GB/s", "", "-"),
    ],
    words=2,
    below={4: "times as fast as", 3: "reaches"},
)


def test_columns_leave_a_table_that_is_too_wide_one_by_one_as_it_says() -> None:
    wide, narrower, narrow = (list(FIGURES.lines(room)) for room in (120, 80, 40))
    assert [kind for kind, _ in wide] == ["header", "rule", "row", "row"]
    assert "0.98 of raw copies on this link  torch 1.20, another library 1.35" in wide[2][1]
    below = "    times as fast as torch 1.20, another library 1.35"
    assert [line for kind, line in narrower if kind == "below"] == [below]
    assert narrower[2][1].endswith("0.98 of raw copies on this link")
    assert [line for kind, line in narrow if kind == "below"] == [
        "    reaches 0.98 of raw copies on this",
        "    link; times as fast as torch 1.20,",
        "    another library 1.35",
    ]
    assert [line for kind, line in narrow if kind == "row"] == [
        "copies to the host      12.5  GB/s",
        "copies to the device       7  GB/s",
    ]


def test_cells_are_broken_between_words_before_any_word_is() -> None:
    table = Table([("key", "a long header"), ("zero_optimization.stage3_prefetch_bucket_size", "3e7")])
    assert str(Table(table.rows)).splitlines()[2].endswith("size            3e7")
    lines = [line for _, line in table.lines(40)]
    assert lines == [
        "key                               a long",
        "                                  header",
        "-" * 40,
        "zero_optimization.stage3_            3e7",
        "prefetch_bucket_size",
    ]


def test_a_column_that_says_nothing_is_left_out() -> None:
    table = Table([("kind", "disk", "host"), ("weights", "-", "1 MiB"), ("moments", "", "2 MiB")])
    assert str(table).splitlines()[0].split() == ["kind", "host"]
    assert str(Table([("kind", "disk")])).splitlines()[0].split() == ["kind", "disk"], "there is no row to tell by"


SENTENCE = ("word " * 60).rstrip()


def test_columns_are_those_of_the_environment_in_a_pipe_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    longest = max(map(len, plain([SENTENCE, FIGURES, facts([("said", SENTENCE)])]).splitlines()))
    assert 80 - len("word ") <= longest <= 80


@pytest.mark.parametrize("columns", ["0", "many", ""])
def test_in_a_pipe_only_tables_are_broken(monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert plain([SENTENCE, facts([("said", SENTENCE)])]).splitlines() == [SENTENCE, f"said  {SENTENCE}"]
    broken = plain([Table([("said", "too"), (SENTENCE, SENTENCE)])]).splitlines()
    assert 110 <= max(map(len, broken)) <= 120


# Of every committed result of a bench: nothing is wider than the terminal, no word is broken.
@pytest.mark.parametrize("room", [80, 120])
def test_tables_of_the_commands_fit_without_breaking_a_word(room: int) -> None:
    for path in RESULTS.glob("*.json"):
        for part, result in json.loads(path.read_text()).get("results", {}).items():
            if "figures" not in result:  # of an older release
                continue
            for piece in _bench._pieces(part, result):
                if isinstance(piece, Table):
                    lines = [line for _, line in piece.lines(room)]
                    assert max(map(len, lines)) <= room, f"{path.name}: {part}"
                    words = {word for row in piece.rows[1:] for cell in row for word in cell.split()} - {"-"}
                    shown = {word.removesuffix(";") for line in lines for word in line.split()}
                    assert {word.removesuffix(";") for word in words} <= shown


# --- the commands: what is drawn has the cells of the plain text ----------------------------------------------------


def both(monkeypatch: pytest.MonkeyPatch, command: Callable[[], object]) -> tuple[str, str]:
    """What a command writes to a wide terminal, and what to a pipe."""
    monkeypatch.setenv("COLUMNS", "400")
    with monkeypatch.context() as patch, Terminal(400) as terminal:
        patch.setattr(sys, "stdout", terminal.file)
        command()
    with monkeypatch.context() as patch:
        pipe = io.StringIO()
        patch.setattr(sys, "stdout", pipe)
        command()
    assert RULE in terminal.text() and RULE not in pipe.getvalue() and "\x1b" not in pipe.getvalue()
    return terminal.text(), pipe.getvalue()


def test_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_plan, "_largest", lambda *_: [{"kept": "[all]", "parameters": 10**9, "layers": 12}])
    small = ["plan", "--layers", "2", "--hidden", "256", "--vocabulary", "1000", "--batch", "1", "--length", "128"]
    text, piped = both(monkeypatch, lambda: main([*small, "--hardware", "4090"]))
    assert cells(text) == cells(piped) and ["[all]", "1.0 billion", "12", "1,536"] in cells(text)


def test_config_explain(monkeypatch: pytest.MonkeyPatch) -> None:
    text, piped = both(monkeypatch, lambda: main(["config", "explain", CONFIG]))
    assert cells(text) == cells(piped) and ["optimizer states, master weights"] in [line[:1] for line in cells(text)]


def test_env(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    directory = tmp_path / "[bold]disk"
    directory.mkdir()
    found = offload.environment([directory], measure=True)
    monkeypatch.setattr(_env.offload, "environment", lambda *_, **__: found)
    text, piped = both(monkeypatch, lambda: main(["env", "--disk-path", str(directory)]))
    assert cells(text) == cells(piped) and str(directory) in [line[0] for line in cells(text)]


def test_memory() -> None:
    model, optimizer = trained()
    summary = optimizer.memory_summary()
    offload.unwrap(model, optimizer)
    with pytest.MonkeyPatch.context() as monkeypatch:
        text, piped = both(monkeypatch, lambda: show_report(summary, ["- a line beside"]))
    assert cells(piped) == cells(f"{summary}\n- a line beside\n")
    assert cells(text) == cells(piped) and ["device", "now", "at most", "planned"] in cells(text)


def test_trace_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with offload.trace(path) as trace:
        offload.unwrap(*trained())
    text, piped = both(monkeypatch, lambda: main(["trace", "report", str(path)]))
    assert cells(piped) == cells(str(trace.report)) == cells(str(offload.trace.load(path).report))
    assert cells(text) == cells(piped) and ["lane", "busy", "hidden", "exposed", "bytes", "rate"] in cells(text)


def test_train(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *TINY, "--check", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    text, piped = both(monkeypatch, lambda: show(_train._pieces(report)))
    assert cells(text) == cells(piped) and ["bytes", "device, nothing offloaded", "device", "host"] in cells(text)


@pytest.mark.parametrize("part", ["activations", "plan"])
def test_bench(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    result = measured(part, -1)["results"][part]
    text, piped = both(monkeypatch, lambda: show(_bench._pieces(part, result)))
    assert cells(text) == cells(piped) and len(cells(text)) > len(result["figures"]) > 1


def test_bench_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    report = measured("activations", -1)
    for figure in report["results"]["activations"]["figures"]:
        for key in ("median", "p20", "p80"):
            figure[key] *= 2
    text, piped = both(monkeypatch, lambda: _bench._compare(measured("activations", 0), report, sys.stdout))
    assert cells(text) == cells(piped)
    assert ["part", "figure", "earlier", "now", "unit", "change", "verdict"] in cells(text)


def measured(part: str, number: int) -> dict[str, Any]:
    """One of the committed results of a part that have figures."""
    found = []
    for path in sorted(RESULTS.glob(f"*-2cpu-{part}-?.json")):
        report: dict[str, Any] = json.loads(path.read_text())
        if "figures" in report["results"][part]:
            found.append(report)
    return found[number]


def trained() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16))
    optimizer = torch.optim.AdamW(model.parameters())
    model, wrapped = offload.wrap(model, optimizer, optimizer="host", gradients="host", device="cpu")
    for _ in range(3):
        model(torch.ones(4, 16)).sum().backward()
        wrapped.step()
        wrapped.zero_grad()
    return model, wrapped


# --- the whole command, on a terminal of its own --------------------------------------------------------------------

WITHOUT_RICH = "import sys; sys.modules['rich'] = None; from offload.cli import main; sys.exit(main(sys.argv[1:]))"


def ran(*command: str, columns: int) -> str:
    with Terminal(columns) as terminal:
        one = terminal.descriptor
        status = subprocess.run([sys.executable, *command], stdin=one, stdout=one, stderr=one, check=False).returncode
    assert status == 0, terminal.text()
    return terminal.text()


def test_the_width_is_that_of_the_terminal() -> None:
    lines = ran("-m", "offload", "config", "explain", CONFIG, columns=90).splitlines()
    assert 80 < max(map(len, lines)) <= 90 and any(RULE in line for line in lines)


def test_without_rich_there_is_plain_text() -> None:
    lines = ran("-c", WITHOUT_RICH, "config", "explain", CONFIG, columns=120).splitlines()
    assert not any(RULE in line for line in lines) and any(set(line) == {"-"} for line in lines)


def test_rich_is_loaded_where_it_draws_and_nowhere_else() -> None:
    code = (
        "import sys; from offload.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('rich', 'torch') if name in sys.modules], file=sys.stderr)"
    )
    for arguments in (["--help"], ["plan", "--help"], ["config", "explain", CONFIG]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        assert done.stderr == "[]\n"
    assert ran("-c", code, "config", "explain", CONFIG, columns=80).splitlines()[-1] == "['rich']"
