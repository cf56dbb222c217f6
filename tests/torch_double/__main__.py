"""The tests of a card where there is none: `python tests/torch_double [arguments of pytest]`.

offload takes CUDA devices alone, and no other device of torch may have that name. So a copy of the package and its
tests, in which `cuda` reads `card`, runs on the device of card.cpp; the native core's CUDA device runs over the driver
double, and kernels/*.cu run as C++. docs/reliability.md says what that proves.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

_TESTS = Path(__file__).resolve().parents[1]
_ROOT = _TESTS.parent
_BUILD = _ROOT / "build" / "torch-double"

sys.path.insert(0, str(_TESTS))

from driver_double import compile_double  # noqa: E402  # beside this folder
from host_kernels import compile_for_host  # noqa: E402

# Names of torch's, and the device's in strings.
_CUDA = re.compile(
    r"""(?<=\btorch\.)cuda\b|(?<=\bTensor\.)cuda\b|(?<=["'])cuda(?=["':])|(?<=\.)cuda(?=\(\))|(?<= on )cuda\b"""
)


def _copy_renamed(build: Path) -> Path:
    """The repository in `build`, as far as tests read it."""
    tree = build / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    unneeded = shutil.ignore_patterns("build", ".*", "results", "__pycache__", "*.so")
    shutil.copytree(_ROOT, tree, ignore=unneeded)
    for folder in ("python", "tests", "examples", "benches"):
        for path in (tree / folder).rglob("*.py"):
            path.write_text(_CUDA.sub("card", path.read_text()))
    return tree


def _load_with_torch(tests: Path) -> None:
    """Every process that imports torch has the device: torch loads what is named so in the metadata of a package."""
    package = tests / "torch_card-0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: torch-card\nVersion: 0\n")
    (package / "entry_points.txt").write_text("[torch.backends]\ncard = torch_double:load_card\n")


def main() -> None:
    from torch.utils.cpp_extension import load

    import offload._native

    _BUILD.mkdir(parents=True, exist_ok=True)
    tree = _copy_renamed(_BUILD)
    shutil.copy(offload._native.__file__, tree / "python" / "offload")
    _load_with_torch(tree / "tests")
    extension = _BUILD / "extension"
    extension.mkdir(exist_ok=True)
    (extension / "lock").unlink(missing_ok=True)  # of a build that was killed: torch would wait for it for good
    sources = [str(tree / "tests" / "torch_double" / name) for name in ("card.cpp", "operators.cpp")]
    flags = ["-O1", "-std=c++20"]  # older torch asks for C++17, before these
    load("torch_double_card", sources, build_directory=str(extension), extra_cflags=flags)
    environment = {
        **os.environ,
        "OFFLOAD_CUDA_DRIVER": str(compile_double(_BUILD)),
        "LD_LIBRARY_PATH": str(compile_for_host(_BUILD).parent),
        "PYTHONPATH": os.pathsep.join(map(str, (tree / "python", tree / "tests", extension))),
        "ACCELERATE_TORCH_DEVICE": "card",
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),  # of ninja
    }
    arguments = sys.argv[1:] or ["tests/python", "tests/torch_double/watching.py", "tests/torch_double/benches.py"]
    command = [sys.executable, "-m", "pytest", "-p", "torch_double.card", "-p", "no:cacheprovider", *arguments]
    os.chdir(tree)
    os.execve(sys.executable, command, environment)


if __name__ == "__main__":
    main()
