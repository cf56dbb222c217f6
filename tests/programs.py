"""Programs of the tests in processes of their own, without each one's import of torch.

They are forked from a process that has imported it, and end as an interpreter does: by reaching their end.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Far beyond what a program takes on a busy machine: only one that hangs gets there.
HANG_S = 100

_SERVER = f"""
import faulthandler, gc, json, os, sys, types
import torch, torch._dynamo, offload, offload._wrap
gc.collect()  # what froze as garbage would keep what it refers to, a copy of sys.modules for one
gc.freeze()  # what is imported never goes: collections need not look at it
program = None
while program is None and (line := sys.stdin.readline()):
    children = []
    for given in json.loads(line):
        children.append(os.fork())
        if children[-1] == 0:
            program = given
            break
    else:
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)
if program is not None:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(program["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(os.open(program["err"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    sys.argv[1:] = program["arguments"]
    faulthandler.dump_traceback_later({HANG_S}, exit=True)
    sys.modules["__main__"] = types.ModuleType("__main__")  # one that is not frozen, and ends as that of a program does
    exec("import gc, json, os, sys", vars(sys.modules["__main__"]))
    exec(program["code"], vars(sys.modules["__main__"]))
"""


class Program(NamedTuple):
    """Python code that finds `arguments` in `sys.argv[1:]`, and gc, json, os and sys imported."""

    code: str
    arguments: Sequence[str] = ()


class Ended(NamedTuple):
    """How a program ended: its exit status, minus a signal's number, and what it wrote."""

    status: int
    out: str
    err: str


class Programs:
    """`folder` is where they write to. The first one starts the process that they are forked from."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._server: subprocess.Popen[str] | None = None

    def run(self, code: str, *arguments: str) -> Ended:
        return self.run_all({"": Program(code, arguments)})[""]

    def run_script(self, path: Path, *arguments: str) -> Ended:
        code = "import runpy; sys.argv[:] = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
        return self.run(code, str(path), *arguments)

    def run_all(self, programs: Mapping[str, Program]) -> dict[str, Ended]:
        """All at the same time."""
        written = [(self._folder / f"out{number}", self._folder / f"err{number}") for number in range(len(programs))]
        given = [
            {"code": program.code, "arguments": program.arguments, "out": str(out), "err": str(err)}
            for program, (out, err) in zip(programs.values(), written, strict=True)
        ]
        codes = self._ask(given)
        return {
            name: Ended(code, out.read_text(errors="replace"), err.read_text(errors="replace"))
            for name, code, (out, err) in zip(programs, codes, written, strict=True)
        }

    def _ask(self, given: Any) -> list[int]:
        if self._server is None:
            paths = [str(Path(__file__).with_name("python")), *filter(None, sys.path)]
            self._server = subprocess.Popen(
                [sys.executable, "-c", _SERVER],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        server = self._server
        assert server.stdin is not None and server.stdout is not None
        try:
            print(json.dumps(given), file=server.stdin, flush=True)
            codes: list[int] = json.loads(server.stdout.readline())
        except BaseException:  # the answer would be taken for that of the next question
            self.close()
            raise
        return codes

    def close(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            with contextlib.suppress(BrokenPipeError), server:
                server.kill()
