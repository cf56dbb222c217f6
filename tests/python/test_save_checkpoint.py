"""offload.save_checkpoint() and load_checkpoint(): bits, placements, what is refused, and what plain torch reads."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import offload
from test_checkpoints import assert_bits, bits_of, steps
from training import HOST, RESIDENT, TinyLM, make_model

pytestmark = pytest.mark.usefixtures("device")

STREAMED = {**HOST, "params": "host"}
PLACEMENTS = {
    "host": HOST,
    "resident": RESIDENT,
    "streamed": STREAMED,
    "streamed, updated on the device": {**RESIDENT, "params": "host"},
    "updated by both": {"optimizer": {"unified": 0.6, "host": 0.4}, "gradients": "host"},
}


def wrapped(
    dtype: torch.dtype, placement: dict[str, Any], *, seed: int = 0, tied: bool = True
) -> tuple[TinyLM, offload.OffloadOptimizer]:
    model = make_model(dtype, seed=seed, tied=tied)
    return offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **placement)


@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("saved", PLACEMENTS.values(), ids=PLACEMENTS.keys())
def test_every_placement_loads_what_every_other_saved(
    saved: dict[str, Any], dtype: torch.dtype, async_save: bool, tmp_path: Path
) -> None:
    model, optimizer = wrapped(dtype, saved)
    steps(model, optimizer)
    expected = bits_of(model, optimizer)
    save = offload.save_checkpoint(
        tmp_path, model, optimizer, tag="first", client_state={"epoch": 2}, async_save=async_save
    )
    steps(model, optimizer, seed=3)
    save.wait()
    gone_on = bits_of(model, optimizer)
    for placement in PLACEMENTS.values():
        other, resumed = wrapped(dtype, placement, seed=5)
        steps(other, resumed, count=1, seed=2)
        loaded = offload.load_checkpoint(tmp_path, other, resumed)
        assert (loaded.tag, loaded.client_state) == ("first", {"epoch": 2})
        assert_bits(bits_of(other, resumed), expected)
        steps(other, resumed, seed=3)
        assert_bits(bits_of(other, resumed), gone_on)


def test_plain_torch_and_safetensors_read_it(tmp_path: Path) -> None:
    """As the documents show it, without a line of offload."""
    model, optimizer = wrapped(torch.bfloat16, HOST)
    steps(model, optimizer)
    offload.save_checkpoint(tmp_path, model, optimizer, tag="one", client_state={"epoch": 2})
    folder = tmp_path / (tmp_path / "latest").read_text()
    state = torch.load(folder / "state.pt", weights_only=True)
    assert state["client_state"] == {"epoch": 2} and state["tied"] == {"head.weight": "embedding.weight"}
    weights = load_file(folder / "model.safetensors")
    plain = make_model(torch.bfloat16, seed=3, tied=True)
    plain.load_state_dict(weights, strict=False)  # the tied name comes with the other
    assert_bits({name: value.cpu() for name, value in plain.state_dict().items()}, host_values(model.state_dict()))
    tensors = load_file(folder / "optimizer.safetensors")
    saved = state["optimizers"][0]
    states = {
        index: {key: tensors[f"{name}.{key}"] for key in saved["keys"].get(index, ())} | saved["state"].get(index, {})
        for index, name in saved["names"].items()
    }
    stock = torch.optim.AdamW(plain.parameters(), lr=7.0)
    stock.load_state_dict({"state": states, "param_groups": saved["param_groups"]})
    assert stock.param_groups[0]["lr"] == 1e-2
    own = optimizer.state_dict()["state"]
    for index, entries in states.items():
        assert entries.keys() == own[index].keys()
        assert_bits(entries, host_values(own[index]))


def host_values(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.cpu() for name, value in tensors.items()}


class Busy(nn.Module):
    """A module with everything that a state_dict may hold, and two optimizers' parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.two = nn.Linear(4, 4)
        self.two.requires_grad_(True)
        self.two.bias.requires_grad_(False)
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.note = "a"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.norm(self.one(x)))

    def get_extra_state(self) -> dict[str, Any]:
        return {"note": self.note}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.note = state["note"]


def busy(seed: int, wrapping: bool) -> tuple[Busy, list[torch.optim.Optimizer]]:
    torch.manual_seed(seed)
    model = Busy()
    model.note = f"seed {seed}"
    optimizers: list[Any] = [
        torch.optim.SGD([*model.one.parameters(), *model.norm.parameters()], lr=0.1, momentum=0.9),
        torch.optim.Adam([{"params": [model.two.weight]}, {"params": [model.two.bias], "lr": 1e-4}], amsgrad=seed > 9),
    ]
    if wrapping:
        _, wrapped_optimizers = offload.wrap(model, optimizers, **HOST)
        optimizers = list(wrapped_optimizers)
    for _ in range(seed):
        model(torch.randn(8, 4)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return model, optimizers


def all_bits(model: nn.Module, optimizers: list[Any]) -> dict[str, torch.Tensor]:
    bits = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    for number, optimizer in enumerate(optimizers):
        for index, entries in optimizer.state_dict()["state"].items():
            bits |= {f"{number}.{index}.{key}": value.clone() for key, value in entries.items() if value is not None}
    return bits


@pytest.mark.parametrize("wrapping", [False, True], ids=["plain", "wrapped"])
@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
def test_several_optimizers_buffers_and_extra_state(wrapping: bool, async_save: bool, tmp_path: Path) -> None:
    model, optimizers = busy(3, wrapping)
    expected = all_bits(model, optimizers)
    offload.save_checkpoint(tmp_path, model, optimizers, tag="one", async_save=async_save)
    model(torch.randn(8, 4))  # changes the running means
    for later in (False, True):
        other, others = busy(1, later)
        offload.load_checkpoint(tmp_path, other, others)
        assert_bits(all_bits(other, others), expected)
        assert other.note == "seed 3"


def test_loaded_states_of_a_stock_optimizer_are_its_own(tmp_path: Path) -> None:
    """The files may go, and nothing is read from their pages later."""
    model, optimizers = busy(2, False)
    expected = all_bits(model, optimizers)
    offload.save_checkpoint(tmp_path, model, optimizers, tag="one")
    other, others = busy(1, False)
    offload.load_checkpoint(tmp_path, other, others)
    for path in (tmp_path / "one").iterdir():
        with path.open("r+b") as file:
            file.truncate(0)
    assert_bits(all_bits(other, others), expected)


def test_parameters_are_found_by_name(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})

    def optimizer_of(first: str, second: str, model: nn.Module = model) -> torch.optim.Optimizer:
        parameters = [*model[first].parameters(), *model[second].parameters()]
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)

    optimizer = optimizer_of("a", "b")
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    offload.save_checkpoint(tmp_path, model, optimizer, tag="one")
    turned = optimizer_of("b", "a")
    offload.load_checkpoint(tmp_path, model, turned)
    for parameter in model.parameters():
        assert torch.equal(turned.state[parameter]["momentum_buffer"], optimizer.state[parameter]["momentum_buffer"])


def test_a_checkpoint_of_another_model_is_told_by_names(tmp_path: Path) -> None:
    def layers(*numbers: int) -> nn.Module:
        return nn.ModuleDict({str(number): nn.Linear(2, 2) for number in numbers})

    offload.save_checkpoint(tmp_path, layers(0, 1), tag="one")
    for numbers, told in (
        ([0], "of another model: this model has no 1.bias, 1.weight; strict=False loads the rest"),
        ([0, 2], "it has no 2.bias, 2.weight, and this model has no 1.bias, 1.weight; strict"),
        ([0, 1, 2, 3, 4], r"it has no 2.bias, 2.weight, 3.bias, 3.weight, 4.bias, ... \(6 names\); strict"),
    ):
        with pytest.raises(offload.InvalidArgument, match=told):
            offload.load_checkpoint(tmp_path, layers(*numbers))


def test_refusals_of_a_load_change_nothing(tmp_path: Path) -> None:
    model, optimizers = busy(2, False)
    offload.save_checkpoint(tmp_path, model, optimizers, tag="one")
    other, others = busy(1, True)
    before = all_bits(other, others)
    wider = nn.Linear(5, 4)
    refusals: list[tuple[str, Any, Any]] = [
        ("has 2 optimizers, and 1 were given", other, others[0]),
        ("of another model", nn.Linear(4, 4), None),
        ("the checkpoint has 1 groups, the optimizer 2", other, others[::-1]),
    ]
    for message, given, given_optimizers in refusals:
        with pytest.raises(offload.InvalidArgument, match=message):
            offload.load_checkpoint(tmp_path, given, given_optimizers)
    with pytest.raises(offload.StorageError, match=r"no checkpoint 'none' in .*; it has \['one'\]"):
        offload.load_checkpoint(tmp_path, other, tag="none")
    with pytest.raises(offload.StorageError, match="no file 'latest'"):
        offload.load_checkpoint(tmp_path / "nothing", other)
    for tag in (None, "one"):
        with pytest.raises(offload.StorageError, match=r"latest is a file: name|no checkpoint 'one' in .*latest"):
            offload.load_checkpoint(tmp_path / "latest", other, tag=tag)
    with pytest.raises(offload.InvalidArgument, match="model is a SGD: give a torch.nn.Module"):
        offload.load_checkpoint(tmp_path, torch.optim.SGD(other.parameters()), other)
    offload.save_checkpoint(tmp_path, nn.Linear(4, 4), tag="two")
    with pytest.raises(offload.InvalidArgument, match=r"weight has shape \(4, 4\) in the checkpoint, not \(4, 5\)"):
        offload.load_checkpoint(tmp_path, wider)
    assert_bits(all_bits(other, others), before)


def test_the_second_optimizer_is_checked_before_the_first_is_loaded(tmp_path: Path) -> None:
    model, optimizers = busy(2, True)
    optimizers[1].param_groups[0]["betas"] = (0.8, 0.9)
    offload.save_checkpoint(tmp_path, model, optimizers, tag="one")
    path = tmp_path / "one" / "optimizer.safetensors"
    tensors = load_file(path)
    tensors["two.weight.exp_avg"][0] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    manifest = json.loads((tmp_path / "one" / "manifest.json").read_text())
    content = path.read_bytes()
    manifest["files"][path.name] |= {"nbytes": len(content), "crc32": [zlib.crc32(content)]}
    (tmp_path / "one" / "manifest.json").write_text(json.dumps(manifest))
    other, others = busy(1, True)
    before = all_bits(other, others)
    with pytest.raises(offload.InvalidArgument, match="two.weight: exp_avg contains NaN"):
        offload.load_checkpoint(tmp_path, other, others)
    assert_bits(all_bits(other, others), before)


class Own:
    """No checkpoint may hold one: loading it would run code of its choosing."""


def test_refusals_of_a_save_write_nothing(tmp_path: Path) -> None:
    directory = tmp_path / "there"
    model = nn.Linear(2, 2)
    complex_model = nn.Linear(2, 2, dtype=torch.complex64)
    for message, given, options in [
        (r"client_state\['inner'\]\['bad'\] is a Own", model, {"client_state": {"inner": {"bad": Own()}}}),
        ("tag='a/b'", model, {"tag": "a/b"}),
        ("tag='.a'", model, {"tag": ".a"}),
        ("tag='latest'", model, {"tag": "latest"}),
        ("tag=''", model, {"tag": ""}),
        ("keep=0", model, {"keep": 0}),
        ("client_state='one': give a dict", model, {"client_state": "one"}),
        ("model is a NoneType: give a torch.nn.Module", None, {}),
        ("optim=3: give a torch.optim.Optimizer", model, {"optim": 3}),
        ("weight has dtype torch.complex64", complex_model, {}),
    ]:
        with pytest.raises(offload.InvalidArgument, match=message):
            offload.save_checkpoint(directory, given, **{"tag": "one", **options})
    assert not directory.exists()


@pytest.mark.parametrize("text", ["../one", "", ".one.unfinished", "a\0"])
def test_latest_may_not_lead_out_of_the_directory(text: str, tmp_path: Path) -> None:
    offload.save_checkpoint(tmp_path, nn.Linear(2, 2), tag="one")
    (tmp_path / "latest").write_text(text)
    with pytest.raises(offload.StorageError, match="holds no tag"):
        offload.load_checkpoint(tmp_path, nn.Linear(2, 2))


def test_a_pickle_in_the_place_of_the_state_runs_nothing(tmp_path: Path) -> None:
    """Even with a manifest that fits it."""
    offload.save_checkpoint(tmp_path, nn.Linear(2, 2), tag="one")
    path = tmp_path / "one" / "state.pt"
    torch.save({"client_state": Hostile(tmp_path / "ran")}, path)
    manifest = json.loads((tmp_path / "one" / "manifest.json").read_text())
    content = path.read_bytes()
    manifest["files"]["state.pt"] |= {"nbytes": len(content), "crc32": [zlib.crc32(content)]}
    (tmp_path / "one" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(offload.StorageError, match=r"state\.pt"):
        offload.load_checkpoint(tmp_path, nn.Linear(2, 2))
    assert not (tmp_path / "ran").exists()


class Hostile:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._path),)


def test_a_load_that_is_not_accepted_changes_nothing(tmp_path: Path) -> None:
    saved, model = make_model(seed=1), make_model(seed=2)
    offload.save_checkpoint(tmp_path, saved, tag="one", client_state={"epoch": 3})
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def refuse(client_state: dict[str, Any]) -> None:
        assert client_state == {"epoch": 3}
        raise KeyError("asked for by the test")

    with pytest.raises(KeyError, match="asked for"):
        offload.load_checkpoint(tmp_path, model, accept=refuse)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    offload.load_checkpoint(tmp_path, model, accept=dict)
    assert all(torch.equal(saved.state_dict()[name], value) for name, value in model.state_dict().items())
