"""README and docs are true: commands run, links lead somewhere, figures are the plan's, every error has its row."""

from __future__ import annotations

import ast
import dataclasses
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import offload
from offload._config import Config
from offload._parameter_size import ParameterSize
from offload._plan import make_plan
from offload.cli import _parser, main

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]

TINY = ["--layers", "2", "--hidden", "64", "--length", "16", "--batch", "2", "--accumulate", "1", "--steps", "2"]

# --- commands -----------------------------------------------------------------------------------------------

# What a command in a page gets beside its own words, so that it is small. The longest name that it begins with counts.
SMALL: dict[str, list[str]] = {
    "offload env": [],
    "offload plan": ["--batch", "1"],
    "offload train": TINY,
    "offload memory": TINY,
    "offload trace": TINY,
    "offload config": [],
    "offload checkpoint": [],
    "offload bench pool": ["--quick"],
    "offload bench report": [],
}
# Not run here, and why. Their words are parsed all the same.
NOT_RUN = {
    "offload bench": "minutes long, or in need of a disk's room; tests/python/test_bench*.py run each one with --quick",
    "offload bench report result.json --out report.md --plots": "needs matplotlib; test_bench_report.py draws with it",
    "make": "builds, or runs this test: CI runs it; here its target must be in the Makefile",
    "pip": "installs; tests/python/test_package.py looks at the package, here its extras must exist",
    "python examples/": "tests/python/test_examples.py and test_deepspeed_examples.py run them",
}


def blocks(path: Path) -> Iterator[tuple[str, str]]:
    """(language, text) of each fenced block."""
    yield from re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Every line of every block without a language, which are commands: without prompts and comments, in order."""
    found: dict[str, None] = {}
    for path in PAGES:
        if path.name == "design.md":
            continue  # its blocks are drawings
        for language, text in blocks(path):
            if language == "":
                lines = re.sub(r"\\\n", " ", text).splitlines()
                found.update(dict.fromkeys(line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()))
    return list(found)


def longest(command: str, names: dict[str, Any]) -> str | None:
    return max((name for name in names if command.startswith(name)), key=len, default=None)


def prepare(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that commands of the pages name, in the present directory."""
    monkeypatch.chdir(folder)
    (folder / "examples").mkdir()
    shutil.copy(ROOT / "examples/deepspeed_cifar.json", "examples/deepspeed_cifar.json")
    shutil.copy(ROOT / "examples/deepspeed_cifar.json", "ds_config.json")
    assert main(["bench", "pool", "--quick", "--json", "result.json"]) == 0
    shutil.copy("result.json", "new.json")
    model = torch.nn.Linear(4, 4)
    offload.save_checkpoint("runs/tuned", model, torch.optim.AdamW(model.parameters()), tag="last")


def test_every_command_is_run_or_has_a_reason_not_to_be() -> None:
    assert len(commands()) > 20
    homeless = [command for command in commands() if longest(command, SMALL | NOT_RUN) is None]
    assert homeless == [], "add it to SMALL, or to NOT_RUN with a reason"


@pytest.mark.usefixtures("disk_calls")
def test_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(tmp_path, monkeypatch)
    ran = 0
    for command in commands():
        name = longest(command, SMALL | NOT_RUN)
        if name is None or name in NOT_RUN or "<" in command:  # a reader puts a file of his own there
            continue
        code = main([*shlex.split(command)[1:], *SMALL[name]])
        output = capsys.readouterr()
        assert code == 0, f"{command}: {output.err}"
        ran += 1
    assert ran >= 8


def test_the_plan_that_the_readme_shows_is_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "README.md").read_text()
    command, shown = re.findall(r"`offload (plan [^`]*)` predicts:\n\n```text\n(.*?)```", text, re.DOTALL)[0]
    assert main(shlex.split(command)) == 0
    assert capsys.readouterr().out.startswith(shown)


@pytest.mark.parametrize("command", [command for command in commands() if command.startswith("offload ")])
def test_words_of_a_command_are_known(command: str) -> None:
    _parser().parse_args(shlex.split(re.sub(r"<\w+>", "x", command))[1:])


@pytest.mark.parametrize("command", [command for command in commands() if command.startswith(("make ", "pip "))])
def test_targets_and_extras_exist(command: str) -> None:
    words = shlex.split(command)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command
    for extra in re.findall(r"\[(\w+)\]", command):
        assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text(), command


def test_commands_in_sentences_are_known() -> None:
    """`offload word --flag` in a sentence: the word is a command, and its help knows the flag."""
    known = {action.dest: action for action in _parser()._actions}["command"].choices
    assert known is not None
    for path in PAGES:
        for code in re.findall(r"`offload ([a-z][^`]*)`", path.read_text()):
            if path.name == "design.md" and "|" in code:
                continue
            words = code.split()
            assert words[0] in known, f"{path.name}: offload {code}"
            parser, texts = known[words[0]], [known[words[0]].format_help()]
            for action in parser._actions:
                if isinstance(getattr(action, "choices", None), dict):
                    texts += [inner.format_help() for inner in action.choices.values()]
            for flag in re.findall(r"--[a-z][a-z-]*", code):
                assert flag in " ".join(texts), f"{path.name}: offload {code}"


# --- code ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_python_blocks_name_what_there_is(name: str) -> None:
    """README's own block is run whole, in test_package.py."""
    for language, text in blocks(ROOT / name):
        if language == "python":
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "offload":
                    assert hasattr(offload, node.attr), f"{name}: offload.{node.attr}"


def test_the_readme_is_short_and_names_every_option() -> None:
    text = (ROOT / "README.md").read_text()
    lines = text.splitlines()
    assert len(lines) <= 250
    assert lines.index('+model, optim = offload.wrap(model, optim, device="cuda")') < 40
    options = {field.name for field in dataclasses.fields(Config)} - {"poison"}  # which is for tests
    assert {name for name in options if f"`{name}`" not in text and f"`{name}=`" not in text} == set()


def test_every_part_of_bench_has_its_section_which_the_contents_name() -> None:
    page = ROOT / "docs/benchmarks.md"
    bench = {action.dest: action for action in _parser()._actions}["command"].choices["bench"]
    parts = {action.dest: action for action in bench._actions}["part"].choices
    sections = {name for name in anchors(page) if re.search(r"offload-bench-\w+$", name)}
    assert {name.rpartition("-")[2] for name in sections} == set(parts) - {"all", "report"}
    contents = page.read_text().split("\n## ")[0]
    assert {name for name in sections if f"(#{name})" not in contents} == set()
    first = re.findall(r"^## (.*)$", page.read_text(), re.MULTILINE)
    assert [title for title in first if f"**[{title}](#" not in contents] == []


# --- links --------------------------------------------------------------------------------------------------


def anchors(path: Path) -> set[str]:
    """Of its headings, as forges make them."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return {slug if not number else f"{slug}-{number}" for slug, count in found.items() for number in range(count + 1)}


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), f"{name}: {target}"
        if anchor:
            assert anchor in anchors(there), f"{name}: {target}"


SOURCES = [
    path
    for name in ("benches", "csrc", "examples", "kernels", "python", "tests")
    for path in (ROOT / name).rglob("*.*")
]
NOT_OURS = {"_name.py", "Python.h"}


@pytest.mark.parametrize("name", NAMES)
def test_source_files_that_a_page_names_exist(name: str) -> None:
    """By their last parts: `_engine.py`, `tests/python/test_engine.py`, `test_host_grad*.py`."""
    named = set(re.findall(r"`([\w./*-]+\.(?:cpp|cu|h|inl|py))`", (ROOT / name).read_text())) - NOT_OURS
    assert [file for file in sorted(named) if not any(path.match(file) for path in SOURCES)] == []


# --- figures ------------------------------------------------------------------------------------------------


def bytes_of(itemsize: int, placement: dict[str, str]) -> tuple[int, int, int]:
    """Bytes a parameter on the device, the host and the disk."""
    count = 1 << 20
    parameter = ParameterSize("weight", count, itemsize, "bfloat16" if itemsize == 2 else "float32", True)
    config = Config(**{"optimizer": "device", "gradients": "device", "params": "device"} | placement)
    plan = make_plan([parameter], config, device_kind="cuda", device_bytes=1 << 40, host_bytes=1 << 40)
    return plan.device.total // count, plan.host.total // count, plan.disk.total // count


def test_the_table_of_bytes_is_the_plans() -> None:
    text = (ROOT / "docs/placement.md").read_text()
    figures = r" \| (\d+)" * 5
    rows = re.findall(rf"^\| (nothing offloaded|`optimizer=\"host\".*?){figures} \|$", text, re.MULTILINE)
    assert len(rows) == 3
    for name, *numbers in rows:
        placement = dict(re.findall(r'(\w+)="(\w+)"', name))
        fp32 = bytes_of(4, placement)
        assert [int(number) for number in numbers] == [*bytes_of(2, placement), *fp32[:2]], name


# --- errors -------------------------------------------------------------------------------------------------


def raised_messages() -> Iterator[tuple[str, str]]:
    """(where, message) of what the package raises as errors of its own; what is filled in is `...`."""
    kinds = {"InvalidArgument", "OutOfHostMemory", "DeviceError", "StorageError", "StateError", "InternalError"}
    for path in sorted((ROOT / "python/offload").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in kinds and node.args:
                message = text_of(node.args[-1])
                if message is not None:
                    yield f"{path.name}:{node.lineno}", message


def text_of(node: ast.expr) -> str | None:
    """The text of a literal; None for what is made elsewhere."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values)
    if isinstance(node, ast.BinOp):
        left, right = text_of(node.left), text_of(node.right)
        return None if left is None or right is None else left + right
    return None


def symptoms() -> list[Callable[[str], bool]]:
    """For each message in the page's tables: whether its parts, between `...`, are in another one, in that order."""
    text = (ROOT / "docs/troubleshooting.md").read_text()
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| ")]
    quoted = [message for row in rows for message in re.findall(r"`([^`]+)`", row)]

    def matcher(message: str) -> Callable[[str], bool]:
        pattern = re.compile(".*".join(re.escape(part) for part in message.split("...")), re.DOTALL)
        return lambda other: pattern.search(other) is not None

    return [matcher(message) for message in quoted if len(message) > 4]


def test_every_message_leads_to_a_row() -> None:
    messages, known = list(raised_messages()), symptoms()
    assert len(messages) > 120
    own = [(where, text) for where, text in messages if len(text.replace("...", "").strip(" :;")) > 10]  # not another's
    lost = [f"{where}: {text}" for where, text in own if not any(matches(text) for matches in known)]
    assert lost == [], "docs/troubleshooting.md has no row whose first column quotes a part of it"


def test_every_error_class_and_variable_is_explained() -> None:
    text = (ROOT / "docs/troubleshooting.md").read_text()
    classes = [name for name in offload.__all__ if isinstance(getattr(offload, name), type)]
    for name in classes:
        if issubclass(getattr(offload, name), offload.OffloadError):
            assert f"`{name}`" in text or f"`offload.{name}`" in text
    read = set[str]()
    for path in [*(ROOT / "python").rglob("*.py"), *(ROOT / "csrc").rglob("*.cpp")]:
        read.update(
            re.findall(
                r"(?:getenv\(|environ(?:\.get\(|\[)|count_from_environment\()\s*\"(OFFLOAD_\w+)", path.read_text()
            )
        )
    assert read and all(f"`{name}`" in text for name in read), read
