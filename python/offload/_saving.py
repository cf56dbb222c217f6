"""save_checkpoint(): model, optimizers and what the user adds, in one directory that is whole or not there.

    save = offload.save_checkpoint(directory, model, optim, tag="step10", client_state={...}, async_save=True)
    save.wait()
    loaded = offload.load_checkpoint(directory, model, optim, tag=None)     # loaded.tag, .path, .client_state

A checkpoint is a directory of four files. Plain torch and safetensors read them without offload:

    model.safetensors      the weights and buffers by their names in `model.state_dict()`; tied ones once
    optimizer.safetensors  optimizer states as `NAME.KEY`, such as `layers.0.weight.exp_avg`
    state.pt               `torch.load(..., weights_only=True)`: "client_state", "tied" (name -> name of the same
                           weight), "excluded" (names of weights that were left out), "frozen" (of those that
                           required no gradients), "model_extra", "model_metadata", and "optimizers": for each its
                           "param_groups" as torch packs them, "names" (index -> NAME), "keys" (index -> the KEYs of its
                           tensors) and "state" (index -> what is no tensor)
    manifest.json          bytes and CRC-32 of each file
"""

from __future__ import annotations

import contextlib
import io
import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import _durable_files as durable
from ._checkpoint_directory import check_tag, commit
from ._directory_lock import DirectoryLock
from ._disk_snapshot import DiskSnapshot, open_snapshot
from ._durable_files import WrittenFile
from ._engine import Engine, StateWatch
from ._errors import InvalidArgument
from ._moments import Int8Moment
from ._optimizer import OffloadOptimizer
from ._probe import probe_host
from ._running_save import CheckpointSave, beginning, finish_saves, remember, wait_until_written
from ._snapshot import CopyBeforeChange, TensorFile, Value, copied, shared_names
from ._stored_values import LentWeight, SplitMaster, StoredValue
from ._units import check_module
from ._wrap import as_list, engine_of

__all__ = ["save_checkpoint"]

MODEL_FILE, OPTIMIZER_FILE, STATE_FILE = "model.safetensors", "optimizer.safetensors", "state.pt"
_METADATA = {"format": "pt"}

Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None


def save_checkpoint(
    directory: str | os.PathLike[str],
    model: nn.Module,
    optim: Optimizers = None,
    *,
    tag: str,
    client_state: Mapping[str, Any] | None = None,
    async_save: bool = False,
    save_latest: bool = True,
    keep: int | None = None,
    exclude_frozen: bool = False,
) -> CheckpointSave:
    """Saves a checkpoint as `directory/tag`; a kill at any instant leaves the last good one.

    Args:
        directory: of checkpoints; made if it is not there. A checkpoint of the same tag is replaced.
        model: any module, wrapped or not. Weights on the host are read there, without a copy of them all.
        optim: its optimizer or optimizers, wrapped or not; None saves weights alone.
        tag: the checkpoint's name, such as "step1000".
        client_state: what else the run needs: numbers, text, tensors and containers of them, such as a scheduler's
            state_dict. What `torch.load(weights_only=True)` would refuse is refused here.
        async_save: returns while the files are written; the bits are those of this call. States that a step changes
            meanwhile are copied first, so up to the bytes that are still to be written: its updates wait for that, and
            not the call. Where it is more than half of the memory available, the step waits for the writer instead.
            What is on disk neither copies nor waits where the file system has reflinks and room for them:
            docs/reliability.md.
        save_latest: makes this the checkpoint that `load_checkpoint` takes without a tag.
        keep: leaves that many of the newest checkpoints, and that of `latest`; None removes nothing.
        exclude_frozen: leaves out parameters that do not require gradients; loading leaves those as the model has them.

    Returns:
        The save; `wait()` returns when it is on disk. Another save, and the end of the program, wait too.

    Raises:
        InvalidArgument: a tag, state or dtype that cannot be saved. Nothing is written.
        StorageError: the disk refused, with the bytes needed and free. Nothing is left of this checkpoint. Of an
            asynchronous save it is raised by its `wait`, or by the next save or load, which then does nothing else.
        StateError: another process, whose number it has, or another thread is saving into this directory now.
    """
    check_tag(tag)
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 1):
        raise InvalidArgument(f"keep={keep!r}: give the number of checkpoints to leave, 1 or more, or None for all")
    check_module(model)
    if client_state is not None and not isinstance(client_state, Mapping):
        raise InvalidArgument(f"client_state={client_state!r}: give a dict, or None")
    optimizers = as_list(optim)
    with beginning():
        finish_saves()
        begun, write = _begin(
            Path(directory).absolute(),  # the program may change its directory meanwhile
            model,
            optimizers,
            tag=tag,
            client_state=dict(client_state or {}),
            async_save=async_save,
            save_latest=save_latest,
            keep=keep,
            exclude_frozen=exclude_frozen,
        )
    write()
    return begun


def _begin(
    directory: Path,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    tag: str,
    client_state: dict[str, Any],
    async_save: bool,
    save_latest: bool,
    keep: int | None,
    exclude_frozen: bool,
) -> tuple[CheckpointSave, Callable[[], None]]:
    """The save, whose writer runs if it is asynchronous, and what is left for the caller to do."""
    state_bytes, optimizer_file, model_file = _contents(
        model, optimizers, client_state, staged=async_save, exclude_frozen=exclude_frozen
    )

    def write(folder: Path) -> Mapping[str, WrittenFile]:
        written = {STATE_FILE: durable.write_bytes(folder / STATE_FILE, state_bytes)}
        # States first: a step that comes meanwhile then has less to copy.
        for name, file in ((OPTIMIZER_FILE, optimizer_file), (MODEL_FILE, model_file)):
            written[name] = durable.write_file(folder / name, file.nbytes, file.take)
        return written

    lock = DirectoryLock(directory)
    nbytes = len(state_bytes) + optimizer_file.nbytes + model_file.nbytes
    snapshot: DiskSnapshot | None = None

    def end() -> None:
        lock.release()
        if snapshot is not None:
            snapshot.close()

    def save() -> None:
        try:
            commit(lock, tag, nbytes, write, set_latest=save_latest, keep=keep)
        finally:
            end()

    running = CheckpointSave(lock.directory / tag)
    if not async_save:
        return running, save

    files = (optimizer_file, model_file)
    try:
        engines = _engines_of(model, optimizers)
        if any(file.reads_disk() for file in files):
            disks = [engine.disk for engine in engines if engine.disk is not None]
            snapshot = open_snapshot(disks, lock.directory, nbytes)
        for file in files:
            if snapshot is not None:
                file.read_from(snapshot)
        guard = CopyBeforeChange(files, lambda: probe_host().available_bytes, lambda: wait_until_written(running))
        running.start(save, _watch(engines, optimizers, guard, running, keeps_disk=snapshot is not None))
    except BaseException:
        if running.is_done:  # else it ends by itself
            end()
        raise
    remember(running)
    return running, lambda: None


def _engines_of(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> list[Engine]:
    found = [engine_of(model), *(one._engine for one in optimizers if isinstance(one, OffloadOptimizer))]
    return list(dict.fromkeys(engine for engine in found if engine is not None))


def _watch(
    engines: Sequence[Engine],
    optimizers: Sequence[torch.optim.Optimizer],
    guard: CopyBeforeChange,
    save: CheckpointSave,
    *,
    keeps_disk: bool,
) -> Callable[[], None]:
    """Has `guard` asked before engines and stock optimizers write to states; returns what ends that."""

    def before_change() -> None:
        if not save.is_done:
            guard.before_change()

    def before_update(tensors: Iterable[Tensor]) -> Future[None] | None:
        return None if save.is_done else guard.before_update(tensors)

    def before_end() -> None:
        if not save.is_done:
            guard.before_end()

    watch = StateWatch(before_change, before_update, before_end, keeps_disk)
    for engine in engines:
        engine.watch_states(watch)
    handles = []
    for optimizer in optimizers:
        if not isinstance(optimizer, OffloadOptimizer):
            handles.append(optimizer.register_step_pre_hook(lambda *_: before_change()))
            handles.append(optimizer.register_load_state_dict_pre_hook(lambda *_: before_change()))

    # Weakly: the save that ran last is known until the next one, and must not keep a model that was dropped.
    asked = weakref.WeakSet(engines)
    guarding = weakref.ref(guard)

    def end() -> None:
        for handle in handles:
            handle.remove()
        for engine in asked:
            if engine.watch is watch:  # else that of the next save: a thread that waited for this one is late
                engine.watch_states(None)
        if (still := guarding()) is not None:
            still.end()

    return end


# --- what is saved ------------------------------------------------------------------------------------------


def _contents(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    client_state: dict[str, Any],
    *,
    staged: bool,
    exclude_frozen: bool,
) -> tuple[bytes, TensorFile, TensorFile]:
    """state.pt, and the two files of tensors; `staged` copies what others than the optimizers may change."""
    weights, extra, metadata = model_values(model)
    frozen = _frozen_names(model) & weights.keys()
    excluded = frozen if exclude_frozen else set()
    weights = {name: value for name, value in weights.items() if name not in excluded}
    tied = shared_names(weights)
    names = {id(p): name for name, p in model.named_parameters()}
    states: dict[str, Value] = {}
    described = []
    for index, optimizer in enumerate(optimizers):
        packed = optimizer.state_dict_in_place() if isinstance(optimizer, OffloadOptimizer) else optimizer.state_dict()
        described.append(_describe(packed, parameter_names(optimizer, index, names), states))
    state = {
        "client_state": client_state,
        "tied": tied,
        "excluded": sorted(excluded),
        "frozen": sorted(frozen),
        "model_extra": extra,
        "model_metadata": metadata,
        "optimizers": described,
    }
    state_bytes = _serialized(state)
    current = _on_host(model, weights) if staged else {}
    values: dict[str, Value] = {}
    for name, value in weights.items():
        if name in tied:
            continue
        if isinstance(value, LentWeight):  # on disk: read when it is written, or before it changes
            values[name] = value.stored
        else:
            values[name] = copied(value) if staged and name not in current else current.get(name, value)
    if staged:
        states = {name: _staged(value) for name, value in states.items()}
    return state_bytes, TensorFile(states, _METADATA), TensorFile(values, _METADATA)


def _frozen_names(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}


def _staged(value: Value) -> Value:
    if not isinstance(value, (Tensor, Int8Moment)) or value.device.type == "cpu":
        return value
    return copied(value if isinstance(value, Tensor) else value.join())


def model_values(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """The tensors of the model's state_dict, live where they can be; what else is in it; and its versions by module."""
    engine = engine_of(model)
    with engine.streaming.copies.lending() if engine is not None else contextlib.nullcontext():
        everything = model.state_dict()
    tensors = {name: value for name, value in everything.items() if isinstance(value, Tensor)}
    extra = {name: value for name, value in everything.items() if name not in tensors}
    metadata = {name: dict(value) for name, value in getattr(everything, "_metadata", {}).items()}
    return tensors, extra, metadata


def _on_host(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By name, host tensors that equal these weights and are not written to unannounced."""
    engine = engine_of(model)
    if engine is None:
        return {}
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        state, weight = engine.states.get(id(parameter)), weights.get(name)
        if weight is None or isinstance(weight, LentWeight):
            continue
        if parameter in engine.streaming:
            if weight.data_ptr() == engine.streaming.host_weight(parameter).data_ptr():
                found[name] = weight
        elif (
            state is not None
            and state.has_host_weight()
            and state.version == parameter._version
            and state.address == parameter.data_ptr() == weight.data_ptr()
        ):
            found[name] = state.working_weight()
    return found


def parameter_names(optimizer: torch.optim.Optimizer, index: int, names: Mapping[int, str]) -> list[list[str]]:
    """The model's name of each parameter by group; one that is not the model's is named by its position."""
    return [
        [names.get(id(p), f"optimizer{index}.group{number}.{place}") for place, p in enumerate(group["params"])]
        for number, group in enumerate(optimizer.param_groups)
    ]


def _describe(packed: Mapping[str, Any], names: list[list[str]], states: dict[str, Value]) -> dict[str, Any]:
    """Moves the tensors of a packed state_dict into `states`; returns the rest."""
    name_of = {
        index: name
        for group, group_names in zip(packed["param_groups"], names, strict=True)
        for index, name in zip(group["params"], group_names, strict=True)
    }
    rest: dict[Any, Any] = {}
    keys: dict[Any, list[str]] = {}
    for index, entries in packed["state"].items():
        if index not in name_of or not isinstance(entries, Mapping):
            rest[index] = entries  # of no parameter: some classes keep such
            continue
        rest[index], keys[index] = {}, []
        for key, value in entries.items():
            name = f"{name_of[index]}.{key}"
            if isinstance(value, (Tensor, SplitMaster, StoredValue, Int8Moment)) and name not in states:
                states[name] = value
                keys[index].append(key)
            else:
                rest[index][key] = value
    return {"param_groups": packed["param_groups"], "names": name_of, "keys": keys, "state": rest}


def _serialized(state: Mapping[str, Any]) -> bytes:
    """Raises `InvalidArgument` naming the entry that `torch.load(weights_only=True)` would not give back."""
    content = io.BytesIO()
    try:
        torch.save(dict(state), content)
        content.seek(0)
        torch.load(content, weights_only=True, map_location="cpu")
        return content.getvalue()
    except Exception as error:
        path, value = _culprit("", state)
        raise InvalidArgument(
            f"{path} is a {type(value).__name__}, which torch.load(weights_only=True) does not load: save numbers, "
            "text, tensors, and dicts, lists and tuples of them"
        ) from error


def _culprit(path: str, value: Any) -> tuple[str, Any]:
    """The innermost entry that does not survive saving, and where it is."""
    items = value.items() if isinstance(value, Mapping) else ()
    for key, item in items:
        if not _survives(item):
            return _culprit(f"{path}[{key!r}]" if path else str(key), item)
    return path, value


def _survives(value: Any) -> bool:
    try:
        content = io.BytesIO()
        torch.save(value, content)
        content.seek(0)
        torch.load(content, weights_only=True, map_location="cpu")
    except Exception:
        return False
    return True
