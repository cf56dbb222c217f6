"""Loading what DeepSpeed saves from one rank: files of its layout, written here from a run of our own."""

from __future__ import annotations

import argparse
import copy
import os
import sys
import types
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import offload
from deepspeed_training import STAGES, config_of
from offload.deepspeed._zero_checkpoint import ENGINE_ENTRY, is_zero_checkpoint, load_zero_checkpoint
from test_checkpoints import assert_bits, bits_of, steps
from training import HOST, TinyLM, batches, loss_of, make_model

pytestmark = pytest.mark.usefixtures("device")


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
    ]


def pair(dtype: torch.dtype, seed: int) -> tuple[TinyLM, offload.OffloadOptimizer]:
    model = make_model(dtype, seed=seed, tied=True)
    model.norm.requires_grad_(False)
    return offload.wrap(model, torch.optim.AdamW(groups_of(model), lr=1e-2), **HOST)


@pytest.fixture
def their_classes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Classes under DeepSpeed's names, there while files are written."""
    classes = {}
    for path, base in (
        ("deepspeed.runtime.fp16.loss_scaler.LossScaler", object),
        ("deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler", object),
        ("deepspeed.utils.tensor_fragment.fragment_address", object),
        ("deepspeed.runtime.zero.config.ZeroStageEnum", int),
    ):
        module, _, name = path.rpartition(".")
        classes[name] = type(name, (base,), {"__module__": module})
        for end in range(1, len(module.split(".")) + 1):
            part = ".".join(module.split(".")[:end])
            monkeypatch.setitem(sys.modules, part, sys.modules.get(part, types.ModuleType(part)))
        monkeypatch.setattr(sys.modules[module], name, classes[name], raising=False)
    return classes


def write(
    directory: Path,
    model: TinyLM,
    optimizer: offload.OffloadOptimizer,
    stage: int,
    classes: dict[str, Any],
    *,
    scale: dict[str, Any] | None = None,
    fused: bool = False,
    **entries: Any,
) -> None:
    """The files of one rank at `stage`; stage 1 has gaps between parameters, stage 3 groups in two parts.

    scale: of fp16, by their names. fused: stage 0 with the flat states of FusedAdam. entries: more of the model's file.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    weights = OrderedDict((name, value.cpu().clone()) for name, value in model.state_dict().items())
    state = {names[id(p)]: entries for p, entries in optimizer.state.items()}
    own = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]

    def master(name: str) -> torch.Tensor:
        return state[name].get("master", weights[name]).cpu()

    parts = own if stage < 3 else [half for group in own for half in (group[:2], group[2:])]
    indices = [[0], [1]] if stage < 3 else [[0, 1], [2, 3]]
    gap = 3 if stage == 1 else 0

    def flat(part: list[str], key: str) -> torch.Tensor:
        values = [master(name) if key == "master" else state[name][key].cpu() for name in part]
        return torch.cat([nn.functional.pad(value.flatten(), (0, gap)) for value in values])

    base = {
        "state": {
            index: {"step": state[part[0]]["step"], **{key: flat(part, key) for key in ("exp_avg", "exp_avg_sq")}}
            for index, part in enumerate(parts)
        },
        "param_groups": [{**group, "params": those} for group, those in zip(settings, indices, strict=True)],
    }
    masters = [flat(part, "master") for part in parts]
    scaler = classes["LossScaler" if scale is None else "DynamicLossScaler"]()
    scaler.__dict__.update({"cur_scale": 1.0} if scale is None else scale)
    states: dict[str, Any] = {"zero_stage": classes["ZeroStageEnum"](stage), "loss_scaler": scaler}
    if stage == 3:
        states |= {"optimizer_state_dict": base, "fp32_flat_groups": masters}
    else:
        states |= {"base_optimizer_state": base, "single_partition_of_fp32_groups": masters}
        states["param_slice_mappings"] = slices = []
        for part in parts:
            start = 0
            slices.append(OrderedDict())
            for name in part:
                slices[-1][name] = classes["fragment_address"]()
                slices[-1][name].__dict__.update(start=start, numel=weights[name].numel())
                start += weights[name].numel() + gap
    saved: dict[str, Any] = {
        "module": weights,
        "optimizer": None,
        "param_shapes": [OrderedDict((name, weights[name].shape) for name in part) for part in parts],
        "shared_params": {"head.weight": "embedding.weight"},
        "frozen_param_shapes": None,
        "global_steps": 3,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_config": {},
        "epoch": 7,
        "args": argparse.Namespace(epochs=9),
        **entries,
    }
    if stage == 3:
        frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
        saved["frozen_param_shapes"] = {name: weights[name].shape for name in frozen}
        saved["frozen_param_fragments"] = {name: weights[name].flatten() for name in frozen}
        saved["module"] = OrderedDict((name, torch.empty(0, dtype=value.dtype)) for name, value in weights.items())
    if stage == 0:
        whole = [name for group in own for name in group]
        position = {name: index for index, name in enumerate(whole)}
        saved["optimizer"] = inner = {
            "state": {position[name]: {k: v for k, v in state[name].items() if k != "master"} for name in whole},
            "param_groups": [
                {**group, "params": [position[name] for name in those]}
                for group, those in zip(settings, own, strict=True)
            ],
        }
        if weights["embedding.weight"].dtype != torch.float32:
            saved["optimizer"] = {
                "optimizer_state_dict": base if fused else inner,
                "fp32_groups_flat" if fused else "fp32_groups": (
                    masters if fused else [[master(name) for name in those] for those in own]
                ),
                **{name: value for name, value in (scale or {}).items() if name != "cur_hysteresis"},
            }
        saved["param_shapes"] = saved["shared_params"] = None
    folder = directory / "global_step3"
    folder.mkdir(parents=True)
    (directory / "latest").write_text("global_step3")
    torch.save(saved, folder / ("zero_pp_rank_0_" * (stage == 3) + "mp_rank_00_model_states.pt"))
    if stage > 0:
        torch.save({"optimizer_state_dict": states}, folder / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")


def avoid_ties(optimizer: offload.OffloadOptimizer) -> None:
    """Takes masters out of the middle between two bf16 weights, where we and DeepSpeed round apart; weights stay."""
    state = copy.deepcopy(optimizer.state_dict())
    for entries in state["state"].values():
        if "master" in entries:
            bits = entries["master"].view(torch.int32)
            bits[bits & 0xFFFF == 0x8000] += 1
    optimizer.load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_loads_with_its_bits(
    stage: int, dtype: torch.dtype, their_classes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = pair(dtype, 0)
    steps(model, optimizer)
    avoid_ties(optimizer)
    optimizer.param_groups[1]["lr"] = 0.5
    write(tmp_path, model, optimizer, stage, their_classes)
    monkeypatch.undo()  # no class of theirs is there when the files are read
    other, resumed = pair(dtype, 5)
    steps(other, resumed, count=1, seed=2)
    assert is_zero_checkpoint(tmp_path, "global_step3") and not is_zero_checkpoint(tmp_path, "other")
    loaded = load_zero_checkpoint(tmp_path, other, resumed)
    own = {"global_steps": 3, "lr_scheduler": None, "loss_scale": {"scale": 1.0} if stage else {}}
    client_state = {"epoch": 7, "args": argparse.Namespace(epochs=9), ENGINE_ENTRY: own}
    assert (loaded.tag, loaded.client_state) == ("global_step3", client_state)
    assert_bits(bits_of(other, resumed), bits_of(model, optimizer))
    assert [group["lr"] for group in resumed.param_groups] == [1e-2, 0.5]
    optimizer.param_groups[1]["lr"] = resumed.param_groups[1]["lr"] = 1e-2
    steps(model, optimizer, seed=3)
    steps(other, resumed, seed=3)
    assert_bits(bits_of(other, resumed), bits_of(model, optimizer))


FP16 = {"fp16": {"enabled": True, "initial_scale_power": 14, "loss_scale_window": 3, "hysteresis": 2}}
WARMUP = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.05, "warmup_num_steps": 9}}


def engine_of(stage: int, seed: int) -> Any:
    model = make_model(seed=seed, tied=True)
    model.norm.requires_grad_(False)
    zero = STAGES[f"stage {stage}"] if stage < 3 else STAGES["stage 3, all on the host"]
    config = config_of(zero=zero, scheduler=WARMUP, **FP16)
    return offload.initialize(model=model, model_parameters=groups_of(model), config=config)[0]


def train(engine: Any, seed: int) -> None:
    for tokens in batches(4, seed=seed):
        engine.backward(loss_of(engine, tokens))
        engine.step()


def position_of(engine: Any) -> tuple[Any, ...]:
    counters = (engine.global_steps, engine.global_samples, engine.skipped_steps)
    return (*counters, engine.get_lr(), engine.optimizer.cur_scale, engine.lr_scheduler.state_dict())


def write_engine(directory: Path, engine: Any, stage: int, classes: dict[str, Any], **more: Any) -> None:
    scale = engine.optimizer.loss_scaler.state_dict()
    names = {"cur_scale": "scale", "cur_iter": "step", "last_overflow_iter": "last_overflow"}
    write(
        directory,
        engine.module,
        engine.optimizer.optimizer,
        stage,
        classes,
        scale={"cur_hysteresis": scale["hysteresis"], **{theirs: scale[ours] for theirs, ours in names.items()}},
        lr_scheduler=engine.lr_scheduler.state_dict(),
        global_steps=engine.global_steps,
        global_samples=engine.global_samples,
        skipped_steps=engine.skipped_steps,
        **more,
    )


@pytest.mark.parametrize(("stage", "fused"), [(0, False), (0, True), (2, False), (3, False)])
def test_an_engine_goes_on_from_theirs(
    stage: int, fused: bool, their_classes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(stage, seed=0)
    train(engine, seed=1)
    assert engine.optimizer.cur_scale == 2.0**15  # other than at first
    write_engine(tmp_path, engine, stage, their_classes, fused=fused)
    monkeypatch.undo()
    other = engine_of(stage, seed=5)
    path, client_state = other.load_checkpoint(tmp_path)
    assert path == str(tmp_path / "global_step3")
    assert client_state == {"epoch": 7, "args": argparse.Namespace(epochs=9)}
    assert position_of(other) == position_of(engine) and other.global_steps == 4
    for one in (engine, other):
        train(one, seed=2)
    assert position_of(other) == position_of(engine)
    assert_bits(bits_of(other.module, other.optimizer.optimizer), bits_of(engine.module, engine.optimizer.optimizer))


def test_parts_of_theirs(their_classes: dict[str, Any], tmp_path: Path) -> None:
    engine = engine_of(2, seed=0)
    train(engine, seed=1)
    write_engine(tmp_path, engine, 2, their_classes)
    weights = {name: value.clone() for name, value in engine.module.state_dict().items()}
    other = engine_of(2, seed=5)
    fresh = position_of(other)
    other.load_checkpoint(tmp_path, load_module_only=True)
    assert position_of(other) == fresh and not other.optimizer.state
    assert_bits(dict(other.module.state_dict()), weights)
    other.load_checkpoint(tmp_path, tag="global_step3", load_optimizer_states=False, load_lr_scheduler_states=False)
    assert other.global_steps == 4 and not other.optimizer.state and other.get_lr() == fresh[3]
    with pytest.raises(offload.StorageError, match="no checkpoint 'absent'"):
        other.load_checkpoint(tmp_path, tag="absent")


def test_a_stage_as_python_3_11_pickles_enums(
    their_classes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first releases, Debian 12's among them, write `getattr(ZeroStageEnum, name)`."""
    kind = their_classes["ZeroStageEnum"]
    kind.__reduce_ex__ = lambda stage, _: (getattr, (kind, {1: "optimizer_states", 2: "gradients"}[stage]))
    kind.optimizer_states, kind.gradients = kind(1), kind(2)
    model, optimizer = pair(torch.bfloat16, 0)
    steps(model, optimizer)
    avoid_ties(optimizer)
    write(tmp_path, model, optimizer, 2, their_classes)
    (states,) = (tmp_path / "global_step3").glob("*optim_states.pt")
    assert b"getattr" in states.read_bytes()
    monkeypatch.undo()
    other, resumed = pair(torch.bfloat16, 5)
    load_zero_checkpoint(tmp_path, other, resumed)
    assert_bits(bits_of(other, resumed), bits_of(model, optimizer))


class Hostile:
    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self._reduced = call, arguments

    def __reduce__(self) -> Any:
        return self._reduced


def test_what_is_refused_changes_nothing(their_classes: dict[str, Any], tmp_path: Path) -> None:
    model, optimizer = pair(torch.bfloat16, 0)
    steps(model, optimizer)
    write(tmp_path, model, optimizer, 1, their_classes)
    other, resumed = pair(torch.bfloat16, 5)
    steps(other, resumed, count=1)
    before = bits_of(other, resumed)
    folder = tmp_path / "global_step3"
    path = folder / "mp_rank_00_model_states.pt"
    good = path.read_bytes()
    saved = torch.load(path, weights_only=False)

    def refused(error: type[Exception], message: str, **change: Any) -> None:
        if change:
            torch.save({**saved, **change}, path)
        with pytest.raises(error, match=message):
            load_zero_checkpoint(tmp_path, other, resumed)
        path.write_bytes(good)
        assert_bits(bits_of(other, resumed), before)

    refused(offload.StorageError, "nothing of it was run", epoch=Hostile(os.mkdir, str(tmp_path / "ran")))
    refused(offload.StorageError, "is no stage of ZeRO", epoch=Hostile(getattr, argparse.Namespace, "__init__"))
    assert not (tmp_path / "ran").exists()
    refused(offload.InvalidArgument, "saved by 2 data-parallel", dp_world_size=2)
    refused(offload.InvalidArgument, "of another model", module={"x": torch.zeros(1)})
    refused(
        offload.InvalidArgument,
        "it has no \\['norm.bias'",
        module={name: value for name, value in saved["module"].items() if name != "norm.bias"},
    )
    refused(offload.InvalidArgument, "not the same by name", param_shapes=saved["param_shapes"][::-1])
    other.register_buffer("rotation", torch.zeros(3))
    before = bits_of(other, resumed)
    refused(offload.InvalidArgument, "it has no \\['rotation'\\]")
    del other.rotation
    before = bits_of(other, resumed)
    path.write_bytes(good[: len(good) // 2])
    refused(offload.StorageError, "damaged")
    path.unlink()
    refused(offload.StorageError, "no DeepSpeed checkpoint")
