"""Optimizer states on disk: the bits of states in host memory, through a window that is far smaller than they are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import offload
from training import HOST, RESIDENT, Run, assert_same_bits, batches, loss_of, make_model, same_bits, train

pytestmark = pytest.mark.usefixtures("device", "disk_calls")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTH = 64
# The smallest window there is: three frames of a thousand elements, and three for loads and saves.
SMALLEST = {"disk_window": 0, "disk_block": 4096}

Optimizers = dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]]
OPTIMIZERS: Optimizers = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-2, weight_decay=0.1),
    "Lion": lambda parameters: offload.Lion(parameters, lr=1e-3),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=1e-2, initial_accumulator_value=0.1),
}


def on_disk(path: Path, **options: Any) -> dict[str, Any]:
    return {"optimizer": "disk", "gradients": "host", "disk_path": path, **SMALLEST, **options}


def run(model: nn.Module, placement: dict[str, Any], kind: str = "AdamW", **loop: Any) -> Run:
    model = copy.deepcopy(model)
    optimizer = OPTIMIZERS[kind](list(model.parameters()))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    model, wrapped = offload.wrap(model, optimizer, **placement)
    return train(model, wrapped, steps=5, micro_batches=2, scheduler=schedule, **loop)


def wide(dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    return make_model(dtype, width=WIDTH, **options)


# --- the same bits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_placement_and_format_trains_to_the_same_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    model = wide(dtype, tied=True)
    expected = run(model, RESIDENT)
    assert_same_bits(run(model, HOST), expected)
    for params in ("device", "host"):
        for gradients in ("device", "host"):
            for master in ("auto", "fp32") if dtype == torch.bfloat16 else ("auto",):
                placement = on_disk(tmp_path, params=params, gradients=gradients, master=master)
                trained = run(model, placement)
                assert_same_bits(trained, expected)
                stats = trained.optimizer.stats()
                assert stats.host_bytes["moments"] == stats.host_bytes["master"] == 0
                assert stats.disk["allocated_bytes"] > 4 * stats.disk["window_bytes"]
                assert stats.disk["read_bytes"] > 0 and stats.disk["written_bytes"] > stats.disk["allocated_bytes"]
                offload.unwrap(trained.model, trained.optimizer)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_native_optimizer(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = wide(dtype)
    expected = run(model, HOST, kind)
    (tmp_path / "second").mkdir()
    paths = [tmp_path, str(tmp_path / "second")]
    trained = run(model, on_disk(tmp_path, disk_path=paths, disk_queue_depth=2), kind)
    assert_same_bits(trained, expected)
    assert len(trained.optimizer._engine.homes.store.store.stats()) == 2


@pytest.mark.parametrize("params", ["device", "host", "disk"])
def test_a_frozen_model_has_a_disk_for_what_trains_later(params: str, tmp_path: Path) -> None:
    def trained(**placement: Any) -> Run:
        model = wide().requires_grad_(False)
        model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **placement)
        optimizer.step()
        model.blocks.requires_grad_(True)
        return train(model, optimizer, steps=3)

    found = trained(**on_disk(tmp_path, params=params))
    assert_same_bits(found, trained(**RESIDENT, params="device"))
    assert found.optimizer.stats().disk["written_bytes"] > 0


def test_what_trains_later_may_take_more_an_element(tmp_path: Path) -> None:
    """bf16 blocks train at first, with masters of half the size, and then the fp32 rest too."""

    def trained(**placement: Any) -> Run:
        model = wide(vocabulary=200).requires_grad_(False)
        model.blocks.to(torch.bfloat16).requires_grad_(True)
        model.norm.register_forward_pre_hook(lambda _, given: (given[0].float(),))
        model.embedding.register_forward_hook(lambda *given: given[-1].bfloat16())
        model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **placement)
        train(model, optimizer, steps=2)
        model.requires_grad_(True)
        return train(model, optimizer, steps=2)

    # The smallest window ends at pages that hide the difference.
    assert_same_bits(trained(**on_disk(tmp_path, disk_window="4MiB")), trained(**RESIDENT))


class Odd(nn.Module):
    """Parameters of every layout: transposed, with a dimension of one, of one element, of none, one never used."""

    def __init__(self) -> None:
        super().__init__()
        self.transposed = nn.Parameter(torch.randn(70, 40).t() * 0.1)
        self.column = nn.Parameter(torch.randn(70, 1))
        self.scale = nn.Parameter(torch.ones(()))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.unused = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.transposed + self.column.squeeze(1)) * self.scale + self.empty.sum()


def train_odd(placement: dict[str, Any]) -> tuple[list[Tensor], dict[Any, Any]]:
    torch.manual_seed(0)
    model = Odd()
    parameters = list(model.parameters())
    groups = [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 1e-3, "weight_decay": 0.0}]
    model, optimizer = offload.wrap(model, torch.optim.AdamW(groups, lr=1e-2), **placement)
    x = torch.randn(8, 40)
    for step in range(5):
        model(x).square().mean().backward()
        if step == 2:  # a skipped step
            optimizer.zero_grad()
        optimizer.step(grad_scale=0.5)
        optimizer.zero_grad()
    weights = [value.clone() for value in model.state_dict().values()]
    return weights, optimizer.state_dict()["state"]


@pytest.mark.parametrize("params", ["device", "host"])
def test_odd_layouts_groups_and_skipped_steps(params: str, tmp_path: Path) -> None:
    weights, states = train_odd({**HOST, "params": params})
    disk_weights, disk_states = train_odd(on_disk(tmp_path, params=params))
    for one, other in zip(weights, disk_weights, strict=True):
        assert same_bits(one, other)
    assert_same_states(disk_states, states)


def test_a_scaler_unscales_skips_and_clips(tmp_path: Path, device: torch.device) -> None:
    def trained(placement: dict[str, Any]) -> dict[str, Tensor]:
        model = wide()
        model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **placement)
        scaler = torch.amp.GradScaler(device.type, init_scale=2.0**126, growth_interval=2)
        for tokens in batches(5):
            scaler.scale(loss_of(model, tokens)).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return {name: value.clone() for name, value in model.state_dict().items()}

    expected, found = trained(HOST), trained(on_disk(tmp_path))
    assert all(same_bits(found[name], expected[name]) for name in expected)


# --- the window ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("params", ["device", "host"])
def test_host_bytes_stay_within_the_plan(dtype: torch.dtype, params: str, tmp_path: Path) -> None:
    trained = run(wide(dtype), on_disk(tmp_path, params=params))
    stats, plan = trained.optimizer.stats(), trained.optimizer.plan
    count = sum(1 for _ in trained.model.parameters())
    assert plan.host.master == plan.host.moments == 0
    assert stats.disk["window_bytes"] == plan.host.window == plan.disk_window.nbytes
    assert stats.host_bytes["window"] <= plan.host.window
    # Accumulation keeps the earlier sum while the next one leaves; blocks are rounded up.
    most = plan.host.total + plan.host.gradients + 3 * 256 * count
    assert stats.pool["peak_used_bytes"] <= most, (stats.pool, plan)
    assert plan.disk.master + plan.disk.moments <= stats.disk["allocated_bytes"]


def test_states_that_fit_the_window_are_read_once(tmp_path: Path) -> None:
    trained = run(wide(), on_disk(tmp_path, disk_window="64MiB"))
    disk = trained.optimizer.stats().disk
    assert disk["kept_bytes"] == 4 * disk["read_bytes"] > 0


def test_steps_alternate_so_that_the_window_is_used(tmp_path: Path) -> None:
    """What the last step left in the window is what the next one begins with."""
    trained = run(wide(), on_disk(tmp_path, disk_window="200KiB"))
    disk, window = trained.optimizer.stats().disk, trained.optimizer.plan.disk_window
    chunk_count = disk["written_bytes"] // window.frame_bytes // 5
    assert window.frame_count < chunk_count
    # Small tensors fill their frames in part.
    assert disk["kept_bytes"] >= 4 * window.frame_count * window.frame_bytes // 3


# --- saving and loading -------------------------------------------------------------------------------------


def assert_same_states(one: dict[Any, Any], other: dict[Any, Any]) -> None:
    assert one.keys() == other.keys()
    for index in one:
        assert one[index].keys() == other[index].keys()
        for key, value in one[index].items():
            assert same_bits(value.cpu().contiguous(), other[index][key].cpu().contiguous()), (index, key)


def begin(model: nn.Module, placement: dict[str, Any]) -> tuple[nn.Module, offload.OffloadOptimizer]:
    model = copy.deepcopy(model)
    return offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **placement)


FORMATS = [(torch.float32, "auto"), (torch.bfloat16, "auto"), (torch.bfloat16, "fp32")]


@pytest.mark.parametrize("params", ["device", "host"])
@pytest.mark.parametrize(("dtype", "master"), FORMATS, ids=str)
def test_a_state_dict_moves_between_host_and_disk(dtype: torch.dtype, master: str, params: str, tmp_path: Path) -> None:
    placements = {"host": {**HOST, "params": params}, "disk": on_disk(tmp_path, params=params, master=master)}
    first = {name: train(*begin(wide(dtype), placement), steps=3) for name, placement in placements.items()}
    states = {name: copy.deepcopy(run.optimizer.state_dict()) for name, run in first.items()}
    weights = {name: value.clone() for name, value in first["host"].model.state_dict().items()}
    assert_same_states(states["disk"]["state"], states["host"]["state"])
    expected = train(first["host"].model, first["host"].optimizer, steps=2)
    offload.unwrap(first["disk"].model, first["disk"].optimizer)

    for source, target in (("host", "disk"), ("disk", "host")):
        model, optimizer = begin(wide(dtype, seed=5), placements[target])
        train(model, optimizer, steps=1)
        optimizer.load_state_dict(states[source])
        model.load_state_dict(weights)
        assert_same_bits(train(model, optimizer, steps=2), expected)
        offload.unwrap(model, optimizer)


@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(("dtype", "master"), FORMATS, ids=str)
def test_a_checkpoint_is_that_of_the_call(dtype: torch.dtype, master: str, async_save: bool, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    placement = on_disk(tmp_path / "disk", master=master)
    host, disk = train(*begin(wide(dtype), HOST), steps=2), train(*begin(wide(dtype), placement), steps=2)
    offload.save_checkpoint(tmp_path / "host", host.model, host.optimizer, tag="t")
    save = offload.save_checkpoint(tmp_path / "saved", disk.model, disk.optimizer, tag="t", async_save=async_save)
    expected = train(disk.model, disk.optimizer, steps=2)  # changes the states while they are written
    save.wait()
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (tmp_path / "saved" / "t" / name).read_bytes() == (tmp_path / "host" / "t" / name).read_bytes()
    offload.load_checkpoint(tmp_path / "saved", disk.model, disk.optimizer)
    assert_same_bits(train(disk.model, disk.optimizer, steps=2), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unwrap_gives_what_it_gives_of_host_states(dtype: torch.dtype, tmp_path: Path) -> None:
    states = []
    for placement in (HOST, on_disk(tmp_path)):
        trained = train(*begin(wide(dtype), placement), steps=3)
        _, plain = offload.unwrap(trained.model, trained.optimizer)
        assert isinstance(plain, torch.optim.AdamW)
        states.append(plain.state_dict()["state"])
    assert_same_states(states[1], states[0])
    assert list(tmp_path.iterdir()) == []


def test_states_that_an_optimizer_has_go_to_disk(tmp_path: Path) -> None:
    model = wide()
    plain = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss_of(model, next(batches(1))).backward()
    plain.step()
    plain.zero_grad()
    runs = []
    for placement in (HOST, on_disk(tmp_path)):
        twin = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2)
        optimizer.load_state_dict(plain.state_dict())
        runs.append(train(*offload.wrap(twin, optimizer, **placement), steps=3))
    assert_same_bits(runs[1], runs[0])


# --- weights that the user writes ---------------------------------------------------------------------------


def edited(model: nn.Module, optimizer: offload.OffloadOptimizer, step: int) -> None:
    """A write that is noticed, one that needs resync(), and a swap there and back that must change nothing."""
    with torch.no_grad(), offload.full_params(model):
        weight = model.blocks[0].up.weight
        if step == 0:
            weight[3:5] = 0.25
        elif step == 1:
            weight.data[7] = -0.5
        elif step == 2:
            kept = {name: value.clone() for name, value in model.named_parameters()}
            for value in model.parameters():
                value.mul_(0.9)
            for name, value in model.named_parameters():
                value.copy_(kept[name])
    if step == 1:
        optimizer.resync()


@pytest.mark.parametrize("params", ["device", "host"])
@pytest.mark.parametrize(("dtype", "master"), FORMATS, ids=str)
def test_writes_to_weights_count(dtype: torch.dtype, master: str, params: str, tmp_path: Path) -> None:
    def trained(placement: dict[str, Any]) -> Run:
        model, optimizer = begin(wide(dtype), placement)
        return train(model, optimizer, steps=5, each_step=lambda step, m, o: edited(m, o, step))

    expected = trained({**HOST, "params": params})
    assert_same_bits(trained(on_disk(tmp_path, params=params, master=master)), expected)


def test_a_later_group_gets_space_of_its_own(tmp_path: Path) -> None:
    def trained(placement: dict[str, Any]) -> Run:
        model = wide()
        optimizer = torch.optim.AdamW(model.blocks.parameters(), lr=1e-2)
        model, wrapped = offload.wrap(model, optimizer, **placement)
        train(model, wrapped, steps=1)
        wrapped.add_param_group({"params": list(model.head.parameters()), "lr": 1e-3})
        return train(model, wrapped, steps=3)

    assert_same_bits(trained(on_disk(tmp_path)), trained(HOST))


def test_a_refused_group_leaves_its_space_to_the_next(tmp_path: Path) -> None:
    """A file gives nothing back before its end: what was reserved for the one must not be lost for the other."""
    model = wide()
    optimizer = torch.optim.AdamW(model.blocks.parameters(), lr=1e-2)
    model, wrapped = offload.wrap(model, optimizer, **on_disk(tmp_path, host_budget="16MiB"))
    disk, too_large = wrapped._engine.disk, nn.Parameter(torch.ones(1 << 23))
    before, taken = disk.allocated_bytes, []
    for parameters in ([model.head.weight, too_large], [model.head.weight, too_large], [model.head.weight]):
        with nullcontext() if len(parameters) == 1 else pytest.raises(offload.OutOfHostMemory):
            wrapped.add_param_group({"params": parameters, "lr": 1e-3})
        taken.append(disk.allocated_bytes - before)
    assert taken[0] > 0 and taken == [taken[0]] * 3
