"""The door of the command: what is misspelt, too large, unwritable or unread, and the help of every command."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import offload
from offload._config import format_size
from offload.cli import _parser, main
from offload.cli._arguments import Parser
from offload.cli._table import format_bytes

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "examples" / "deepspeed_cifar.json")
TINY = ["--layers", "1", "--hidden", "64", "--length", "16", "--batch", "1", "--accumulate", "1", "--steps", "1"]
PLAN = ["plan", "--layers", "2", "--hidden", "256", "--vocabulary", "1000", "--batch", "1", "--hardware", "4090"]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the parser says; nothing on stdout."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    output = capsys.readouterr()
    assert end.value.code == 2 and output.out == ""
    return output.err


@pytest.mark.parametrize(
    ("arguments", "nearest", "command"),
    [
        (["trian"], "'train'", "offload"),
        (["plan", "--prams", "8e9"], "'--params'", "offload plan"),
        (["train", "--learning-rat=1", "--stps", "4"], "'--steps'", "offload train"),
        (["bench", "adanw"], "'adamw'", "offload bench"),
        (["bench", "adamw", "--quik"], "'--quick'", "offload bench adamw"),
        (["config", "chek", "x.json"], "'check'", "offload config"),
        (["train", "--dtype", "bfloat"], "'bfloat16'", "offload train"),
    ],
)
def test_the_nearest_word_is_named(
    capsys: pytest.CaptureFixture[str], arguments: list[str], nearest: str, command: str
) -> None:
    said = refused(capsys, *arguments)
    assert f"did you mean {nearest}?" in said and said.endswith(f"`{command} --help` says more\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "--params", "1e30"], "1e30 parameters: give 1 to 1e+15"),
        (["plan", "--params", "inf"], "'inf' is not a number such as"),
        (["plan", "--params", "nan"], "'nan' is not a number such as"),
        (["plan", "--batch", "1.5"], "'1.5' is not a positive whole number"),
        (["train", "--steps", "-1"], "'-1' is not a positive whole number"),
        (["train", "--lr", "nan"], "'nan' is not a number from 0 on"),
        (["train", "--lr", "-1"], "'-1' is not a number from 0 on"),
        (["train", "--seed", str(2**64)], "'18446744073709551616' is not a whole number of 64 bits"),
        (["train", "--seed", "x"], "'x' is not a whole number of 64 bits"),
    ],
)
def test_numbers_say_what_is_legal(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert words in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("arguments", "option", "values"),
    [
        (["env", "--disk-path", "/a", "/b", "--disk-path", "/c"], "disk_path", ["/a", "/b", "/c"]),
        (["train", "--disk-path", "/a", "--steps", "3", "--disk-path", "/b"], "disk_path", ["/a", "/b"]),
        (["memory", "--disk-path", "/a", "--disk-path", "/b"], "disk_path", ["/a", "/b"]),
        (["trace", "--disk-path", "/a", "--disk-path", "/b"], "disk_path", ["/a", "/b"]),
        (["plan", "--batch", "2", "--batch", "4", "8"], "batch", [2, 4, 8]),
        (["plan", "--tokens", "64", "--tokens", "128"], "tokens", [64, 128]),
        (["bench", "train", "--tokens", "64", "--tokens", "128"], "tokens", [64, 128]),
        (["bench", "train", "--offload", "optimizer", "--offload", "params"], "offload", ["optimizer", "params"]),
        (["bench", "train", "--offload"], "offload", []),
        (["bench", "train", "--beside", "torch", "--beside", "resident"], "beside", ["torch", "resident"]),
    ],
)
def test_a_repeated_option_adds_to_its_values(arguments: list[str], option: str, values: list[Any]) -> None:
    """And what is not given has its default, however often the parser is used."""
    default = getattr(_parser().parse_args([a for a in arguments[:2] if not a.startswith("--")]), option)
    parser = _parser()
    for _ in range(2):
        assert getattr(parser.parse_args(arguments), option) == values
    assert getattr(parser.parse_args([a for a in arguments[:2] if not a.startswith("--")]), option) == default


def test_a_repeated_option_of_one_value_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "bench", "disk", "--disk-path", "/a", "--disk-path", "/b")
    assert "argument --disk-path: it takes one value here, and was given '/a' and '/b'" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*PLAN, "--host-memory", "64"], "argument --host-memory: '64' is a number of bytes: give a unit, as 64GiB"),
        ([*PLAN, "--gpu-memory", "-24GiB"], "argument --gpu-memory: '-24GiB' is negative: give a size such as 24GiB"),
        (["train", "--size", "-5M"], "argument --size: -5M parameters: give 1 to"),
        (["train", "--steps", "-3"], "argument --steps: '-3' is not a positive whole number"),
    ],
)
def test_numbers_that_cannot_be_meant(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert words in refused(capsys, *arguments)


def test_a_placement_is_refused_before_the_model_is_built(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload.cli._training.build_model", pytest.fail)
    assert main(["train", *TINY, "--optimizer", "gpu"]) == 2
    assert "optimizer='gpu': legal values are" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "./not/there"], "MODEL './not/there': there is no such file or directory; give a Hugging Face"),
        (["train", *TINY, "--hidden", "130"], "--hidden 130: give a multiple of 64"),
        (["train", *TINY, "--length", "10000000"], "--length 10000000: the text has "),
        (
            ["train", *TINY, "--size", "1e15", "--hidden", "1000000"],
            "of host memory are available: give a smaller --size",
        ),
        (["train", *TINY, "--batch", "1000000000000"], "of host memory are available: give a smaller --batch"),
        (["train", *TINY, "--optimizer", "disk"], "needs disk_path"),
        (["train", "--size", "1M", "--layers", "100000"], "--size 1000000: the smallest model of 100000 layers has 6"),
        ([*PLAN, "--batch", "65537"], "--batch: 65,537 sequences a step and GPU; give at most 65,536"),
        ([*PLAN[:-4], "--hardware", "4090", "--tokens", "65537", "--length", "1"], "--tokens: 65,537 sequences"),
        ([*PLAN, "--interconnect", "nvlink"], "--interconnect nvlink joins several GPUs: give --gpus too"),
        ([*PLAN, "--gpus", "8"], "--gpus 8 needs --interconnect, what joins them: one of 10gbe, 25gbe"),
        (["memory", *TINY, "--hidden", "7"], "--hidden 7: give a multiple of 64, or an even number below it"),
        ([*PLAN, "--gpu-memory", "0"], "--gpu-memory 0: "),
        ([*PLAN, "--host-memory", "much"], "--host-memory much: "),
        ([*PLAN, "--link", "pci"], "--link pci: "),
        ([*PLAN, "--mfu", "2"], "--mfu 2.0: "),
        (["plan", "json:dumps"], "failed with TypeError: dumps() missing 1 required positional argument: 'obj'"),
        (
            ["bench", "pool", "--quick", "--json", "/not/there/r.json"],
            "--json /not/there/r.json: give a file",
        ),
        (["bench", "report", "r.json", "--out", "/"], "--out /: give a file in a folder"),
        (["checkpoint", "export", "/not/there", "--out", "x"], "there is no checkpoint in /not/there"),
        (["checkpoint", "export", "/not/there", "--out", "/"], "--out /: give a file in a folder"),
    ],
)
def test_errors_name_the_option_and_what_to_do(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(arguments) in (1, 2)
    output = capsys.readouterr()
    assert words in output.err and output.out == "" and "Traceback" not in output.err


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
@pytest.mark.parametrize(
    ("arguments", "code"), [([*PLAN, "--length", "128"], 0), ([*PLAN, "--json"], 0), (["plan", "nowhere"], 2)]
)
def test_a_closed_stream_changes_nothing_else(
    closed: str, arguments: list[str], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`offload plan >&-`: Python has None in its place."""
    monkeypatch.setattr(sys, closed, None)
    assert main(arguments) == code


# What is no file of its kind, and what each command that reads one says of it.
NO_FILES = {
    "cut off": b'{"model_type": "llama", ',
    "a list": b"[1]",
    "a number": b"3",
    "not UTF-8": bytes(range(128, 256)),
    "empty": b"",
    "brackets": b"[" * 100_000,
    "other keys": b'{"schema_version": 1, "results": {"pool": 3}, "traceEvents": [1], "offload": {}, "model_type": []}',
    "an environment": b'{"schema_version": 1, "results": 3, "environment": {}, "zero_optimization": 3}',
    "a directory": None,
}
READERS = (
    ["plan", "FILE", "--hardware", "4090"],
    ["config", "check", "FILE"],
    ["config", "explain", "FILE", "--json"],
    ["trace", "report", "FILE"],
    ["trace", "report", "FILE", "--json"],
    ["bench", "report", "FILE"],
    ["checkpoint", "show", "FILE"],
)


@pytest.mark.parametrize("name", NO_FILES)
@pytest.mark.parametrize("command", READERS, ids=" ".join)
def test_a_file_of_another_kind_is_named_and_nothing_is_shown(
    name: str, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    content = NO_FILES[name]
    # A name that is base64 as well, which configs may be.
    Path("adir").mkdir() if content is None else Path("adir").write_bytes(content)
    code = main([word.replace("FILE", "adir") for word in command])
    output = capsys.readouterr()
    if command[0] == "config" and code != 2:  # an object, and a refused one
        assert name in ("empty", "other keys", "an environment") and "error" in output.out and output.err == ""
        return
    assert code == 2 or (command[0] == "checkpoint" and code == 1)
    assert output.out == "" and re.match(r"offload: (cannot read |\[Errno \d+\] |there is no )?.*adir", output.err)


def test_a_missing_package_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["train", *TINY]) == 2
    assert "`pip install 'offload[demo]'`" in capsys.readouterr().err


# --- help -----------------------------------------------------------------------------------------------------------


def parsers(parser: Parser) -> Iterator[Parser]:
    """All of them, the outermost first."""
    yield parser
    for action in parser._actions:
        if isinstance(action.choices, dict):
            for inner in action.choices.values():
                yield from parsers(inner)


@pytest.mark.parametrize("parser", list(parsers(_parser())), ids=lambda parser: parser.prog)
def test_help_describes_shows_examples_that_run_and_names_exit_codes(
    monkeypatch: pytest.MonkeyPatch, parser: Parser
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = parser.format_help()
    assert parser.description and "exit codes: 0" in text and "130" in text
    assert max(map(len, text.splitlines())) <= 80
    examples = re.findall(r"^  (offload .*?)(?:  +.*)?$", text.partition("positional")[2] or text, re.MULTILINE)
    assert examples
    for example in examples:
        arguments = example.partition(" >")[0].split()[1:]
        if arguments:
            _parser().parse_args(arguments)
    for action in parser._actions:
        assert action.help or isinstance(action.choices, dict), f"{parser.prog}: {action.dest}"


# --- stdout ---------------------------------------------------------------------------------------------------------


def run(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "offload", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=os.environ | environment,
    )


def test_a_reader_that_goes_away_is_no_error() -> None:
    with run("config", "explain", CONFIG) as command:
        assert command.stdout is not None and command.stderr is not None
        command.stdout.close()
        assert (command.stderr.read(), command.wait()) == ("", 141)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
def test_a_full_disk_is_an_error_without_a_traceback() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "offload", "config", "explain", CONFIG]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert "No space left on device" in done.stderr and "Traceback" not in done.stderr and done.returncode != 0


def test_names_that_the_terminal_has_no_letters_for(disk_path: str) -> None:
    directory = Path(disk_path) / "d\u00fcr f\u00fcr"
    directory.mkdir()
    settings = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii", "COLUMNS": "1000"}
    with run("env", "--disk-path", str(directory), **settings) as command:
        out, errors = command.communicate()
    assert command.returncode == 0, errors
    assert "d\\xfcr f\\xfcr" in out and "Traceback" not in errors


def documented() -> dict[str, set[str]]:
    """The keys in the table of docs/command.md, by command."""
    rows = re.findall(r"^\| `(offload [^`]+)` \| (.*) \|$", (ROOT / "docs" / "command.md").read_text(), re.MULTILINE)
    aside = re.compile(r"\([^)]*\)|;.*|, and with .*")  # what is said of a key, and of more of them
    return {command: set(re.findall(r"`(\w+)`", aside.sub("", keys))) for command, keys in rows}


def test_every_json_is_one_object_on_stdout_with_the_keys_that_are_documented(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = torch.nn.Linear(4, 4)
    offload.save_checkpoint(tmp_path / "saved", model, torch.optim.AdamW(model.parameters()), tag="last")
    saved, weights = str(tmp_path / "saved"), str(tmp_path / "model.safetensors")
    known = documented()
    shown = {
        "offload env --json": ["env", "--json"],
        "offload plan --json": [*PLAN, "--json"],
        "offload train --json": ["train", *TINY, "--json"],
        "offload memory --json": ["memory", *TINY, "--json"],
        "offload trace --json": ["trace", *TINY, "--json"],
        "offload config explain --json": ["config", "explain", CONFIG, "--json"],
        "offload checkpoint show": ["checkpoint", "show", saved],
        "offload checkpoint export --json": ["checkpoint", "export", saved, "--out", weights, "--json"],
        "offload bench --json -": ["bench", "pool", "--quick", "--json", "-"],
    }
    assert set(known) == set(shown)
    for command, arguments in shown.items():
        assert main(arguments) == 0
        found = json.loads(capsys.readouterr().out)
        assert set(found) == known[command], command


def test_config_check_says_in_json_why_it_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "ds.json"
    file.write_text('{"train_batch_size": 8, "zero_optimisation": {"stage": 2}}')
    assert main(["config", "check", str(file), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["accepted"] and "zero_optimization" in found["errors"][0]
    assert main(["config", "explain", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["key"]: row["class"] for row in found["keys"]}["train_batch_size"] == "honoured"


def test_sizes_are_written_as_the_library_writes_them() -> None:
    for size in (0, 1, 1023, 1024, 5_000_000, 2**30 - 1, 3 * 2**30, 7 * 2**40, 2**52):
        assert format_bytes(size) == format_size(size)
    assert format_bytes(24 << 30) == "24.00 GiB" and format_bytes(40 << 20) == "40.00 MiB"
