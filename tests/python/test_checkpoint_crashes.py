"""A save that is killed or refused at any file operation leaves the last good checkpoint, or the new one."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import offload
from offload import _durable_files

# What a save and its clean-up change the disk with.
OPERATIONS = ("open", "pwrite", "fsync", "ftruncate", "replace", "mkdir", "rmdir", "unlink", "close")


def pair(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and the momentum that one step gave its optimizer; `seed` decides every bit."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
            parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    return model, optimizer


def save(directory: Path, seed: int, tag: str, **options: Any) -> None:
    offload.save_checkpoint(directory, *pair(seed), tag=tag, client_state={"seed": seed}, **options)


def loaded_seed(directory: Path) -> int:
    """Which save the directory gives; every bit of it is checked."""
    model, optimizer = pair(99)
    seed: int = offload.load_checkpoint(directory, model, optimizer).client_state["seed"]
    expected, its_optimizer = pair(seed)
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)
        momentum = optimizer.state[one]["momentum_buffer"]
        assert torch.equal(momentum, its_optimizer.state[other]["momentum_buffer"])
    return seed


def hidden(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob(".*"))


def strike(nth: int, then: Callable[[], None]) -> None:
    """From now on calls `then` instead of the n-th operation; half of a write is done before."""
    calls = 0

    def struck(real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls - 1 == nth:
                if name == "pwrite":
                    descriptor, content, position = arguments
                    os.lseek(descriptor, position, os.SEEK_SET)
                    os.write(descriptor, content[: len(content) // 2])
                then()
            return real(*arguments, **options)

        return call

    for name in OPERATIONS:
        setattr(os, name, struck(getattr(os, name), name))


def killed_at(nth: int, attempt: Callable[[], None]) -> bool:
    """Whether a child that runs `attempt` came to its n-th file operation, where it dies."""
    process = os.fork()
    if process == 0:
        try:
            strike(nth, lambda: os._exit(9))
            attempt()
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert code in (0, 9)
    return code == 9


SCENES: dict[str, tuple[str, dict[str, Any]]] = {
    "another tag": ("two", {}),
    "the same tag": ("one", {}),
    "retiring": ("two", {"keep": 1}),
}


@pytest.mark.parametrize(("tag", "options"), SCENES.values(), ids=SCENES.keys())
def test_killed_at_every_file_operation(tag: str, options: dict[str, Any], tmp_path: Path) -> None:
    original = tmp_path / "original"
    save(original, 1, "zero")
    save(original, 1, "one")
    found = []
    for nth in range(1000):
        directory = tmp_path / str(nth)
        shutil.copytree(original, directory)
        if not killed_at(nth, lambda directory=directory: save(directory, 2, tag, **options)):  # type: ignore[misc]
            break
        found.append(loaded_seed(directory))
        save(directory, 3, "three")  # the next save is not disturbed by what was left
        assert loaded_seed(directory) == 3 and hidden(directory) == []
        shutil.rmtree(directory)
    assert nth > 20
    assert found == sorted(found) and set(found) == {1, 2}  # once the new one is there, it stays


def test_killed_in_the_first_save_of_all(tmp_path: Path) -> None:
    for nth in range(1000):
        directory = tmp_path / str(nth)
        if not killed_at(nth, lambda directory=directory: save(directory, 2, "one")):  # type: ignore[misc]
            break
        try:
            assert loaded_seed(directory) == 2
        except offload.StorageError as error:
            assert "there is no checkpoint" in str(error)
        save(directory, 3, "one")
        assert loaded_seed(directory) == 3 and hidden(directory) == []


@pytest.mark.parametrize("tag", ["one", "two"], ids=["the same tag", "another tag"])
def test_refused_at_every_file_operation(tag: str, tmp_path: Path) -> None:
    """The disk says no once: the error is told, and what was there is there still, whole."""
    original = tmp_path / "original"
    save(original, 1, "one")
    refusals = 0
    for nth in range(1000):
        directory = tmp_path / str(nth)
        shutil.copytree(original, directory)
        refused = False

        def refuse() -> None:
            nonlocal refused
            refused = True
            raise OSError(errno.EIO, "Input/output error")

        real = {name: getattr(os, name) for name in OPERATIONS}
        try:
            strike(nth, refuse)
            save(directory, 2, tag)
            legal = {2}
        except offload.StorageError as error:
            assert "Input/output error" in str(error)
            legal = {1} if "was not saved" in str(error) else {1, 2} if "may not name it" in str(error) else set()
        finally:
            for name, function in real.items():
                setattr(os, name, function)
        if not refused:
            break
        refusals += 1 in legal
        assert loaded_seed(directory) in legal
        save(directory, 3, "three")
        assert loaded_seed(directory) == 3 and hidden(directory) == []
        shutil.rmtree(directory)
    assert refusals > 15


@pytest.mark.parametrize("exists", [False, True])
def test_a_full_disk_is_told_before_anything_is_written(
    exists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "there"
    if exists:
        save(directory, 1, "one")
    before = sorted(tmp_path.rglob("*"))
    real = os.statvfs

    def statvfs(path: Any) -> os.statvfs_result:
        facts = list(real(path))
        facts[4] = 3  # f_bavail
        return os.statvfs_result(facts)

    monkeypatch.setattr(os, "statvfs", statvfs)
    with pytest.raises(offload.StorageError, match=r"needs [\d,]+ bytes and .* has 12,288 free"):
        save(directory, 2, "two")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("nth", [0, 1, 2, 3])
def test_a_disk_that_fills_up_meanwhile_leaves_nothing(
    nth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, "one")
    before = sorted(tmp_path.rglob("*"))
    real, calls = os.pwrite, 0

    def pwrite(*arguments: Any) -> int:
        nonlocal calls
        calls += 1
        if calls > nth:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(offload.StorageError, match=r"No space left on device.* needs [\d,]+ bytes, .* [\d,]+ free"):
        save(tmp_path, 2, "two")
    monkeypatch.undo()
    assert sorted(tmp_path.rglob("*")) == before and loaded_seed(tmp_path) == 1


FILES = ("model.safetensors", "optimizer.safetensors", "state.pt", "manifest.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["flipped", "cut", "longer", "gone"])
def test_damage_is_named_and_nothing_is_loaded(name: str, harm: str, tmp_path: Path) -> None:
    save(tmp_path, 1, "one")
    path = tmp_path / "one" / name
    content = bytearray(path.read_bytes())
    if harm == "gone":
        path.unlink()
    elif harm == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif harm == "longer":
        path.write_bytes(bytes(content) + b"}")
    else:
        place = content.index(b"nbytes") if name == "manifest.json" else len(content) // 2
        content[place] ^= 1
        path.write_bytes(content)
    model, optimizer = pair(5)
    before = [p.clone() for p in model.parameters()] + [s["momentum_buffer"].clone() for s in optimizer.state.values()]
    what = "there is no checkpoint" if (name, harm) == ("manifest.json", "gone") else name
    with pytest.raises(offload.StorageError, match=what):
        offload.load_checkpoint(tmp_path, model, optimizer)
    after = [*model.parameters(), *(s["momentum_buffer"] for s in optimizer.state.values())]
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))


def test_many_chunks_are_written_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of many chunks by several threads; a flipped bit is named by its place."""
    monkeypatch.setattr(_durable_files, "CHUNK_BYTES", 4096)
    model = nn.Linear(150, 101)
    offload.save_checkpoint(tmp_path, model, tag="one")
    other = nn.Linear(150, 101)
    offload.load_checkpoint(tmp_path, other)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters(), strict=True))
    path = tmp_path / "one" / "model.safetensors"
    with path.open("r+b") as file:
        file.seek(9000)
        byte = file.read(1)
        file.seek(9000)
        file.write(bytes([byte[0] ^ 8]))
    with pytest.raises(offload.StorageError, match="between bytes 8,192 and 12,288"):
        offload.load_checkpoint(tmp_path, other)


def test_a_file_system_without_direct_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse_direct(path: Any, flags: int, *mode: Any, **options: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *mode, **options)

    monkeypatch.setattr(os, "open", refuse_direct)
    save(tmp_path, 4, "one")
    assert loaded_seed(tmp_path) == 4


def test_only_what_was_asked_for_is_removed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for seed in range(1, 6):
        save(tmp_path, seed, f"step{seed}", save_latest=seed == 2)
    save(tmp_path, 6, "step6", save_latest=False, keep=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "mine", "step2", "step5", "step6"]
    assert loaded_seed(tmp_path) == 2
