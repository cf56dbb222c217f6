"""Weights on disk: the bits of weights in host memory, through a cache that holds a part of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import offload
from test_disk_states import assert_same_states, begin, on_disk
from training import HOST, RESIDENT, Block, Run, assert_same_bits, batches, loss_of, make_model, same_bits, train

pytestmark = pytest.mark.usefixtures("device", "disk_calls")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def deep(dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    return make_model(dtype, width=64, depth=6, **options)


def weights_on_disk(path: Path, **options: Any) -> dict[str, Any]:
    return on_disk(path, params="disk", **{"optimizer": "host", **options})


def budget_for(model: nn.Module, placement: dict[str, Any], images: float = 2) -> int:
    """Host bytes with which the cache holds about so many of the model's largest units."""
    wrapped, optimizer = begin(model, placement)
    plan = optimizer.plan
    offload.unwrap(wrapped, optimizer)
    largest = max(sum(p.nbytes for p in block.parameters()) for block in model.blocks)
    # Sums of gradients over micro-batches take what the cache leaves. Blocks are rounded up.
    rounding = 3 * 256 * sum(1 for _ in model.parameters())
    return plan.host.total - plan.host.cache + rounding + int((images * largest + (32 << 10)) / 0.75)


def run(model: nn.Module, placement: dict[str, Any], **loop: Any) -> Run:
    return train(*begin(model, placement), **{"steps": 4, "micro_batches": 2, **loop})


def check_disk(run: Run) -> None:
    """Weights went to the disk and came back, again and again, through less memory than they take."""
    disk = run.optimizer.stats().disk
    plan = run.optimizer.plan
    assert plan.params == "disk" and disk["weights_cache_bytes"] == plan.host.cache < plan.disk.working
    assert disk["weights_read_bytes"] > 2 * plan.disk.working
    assert disk["weights_written_bytes"] > plan.disk.working


def finish(run: Run, path: Path) -> None:
    offload.unwrap(run.model, run.optimizer)
    assert list(path.iterdir()) == []


# --- the same bits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_placement_and_format_trains_to_the_same_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    model = deep(dtype, tied=True)
    expected = run(model, RESIDENT)
    cases = [
        {"optimizer": optimizer, "gradients": gradients, "master": master}
        for optimizer, gradients in (
            ("host", "device"),
            ("host", "host"),
            ("disk", "host"),
            ("device", "host"),
            (0.5, "host"),
        )
        for master in (("auto", "fp32") if dtype == torch.bfloat16 and gradients == "host" else ("auto",))
    ]
    for case in cases:
        placement = weights_on_disk(tmp_path, **case)
        placement["host_budget"] = budget_for(model, placement)
        trained = run(model, placement)
        assert_same_bits(trained, expected)
        check_disk(trained)
        finish(trained, tmp_path)


@pytest.mark.parametrize("images", [2, 3.5, 20])
@pytest.mark.parametrize("prefetch", [1, 3])
def test_caches_and_windows_of_every_size(images: float, prefetch: int, tmp_path: Path) -> None:
    model = deep()
    placement = weights_on_disk(tmp_path, prefetch=prefetch)
    trained = run(model, placement | {"host_budget": budget_for(model, placement, images)})
    assert_same_bits(trained, run(model, RESIDENT))
    disk = trained.optimizer.stats().disk
    if images == 20:  # all of them
        assert disk["weights_read_bytes"] == 0 and disk["weights_kept_bytes"] > 0


class Wandering(nn.Module):
    """The order of the units changes, one is used twice, one not always, and weights are used from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 64)
        self.blocks = nn.ModuleList(Block(64) for _ in range(5))
        self.head = nn.Linear(64, 40, bias=False)
        self.calls = 0

    def forward(self, tokens: Tensor) -> Tensor:
        self.calls += 1
        x = self.embedding(tokens)
        order = [0, 1, 2, 3, 4, 1] if self.calls % 3 else [4, 2, 0, 1]
        for number in order:
            block = self.blocks[number]
            x = checkpoint(block, x, use_reentrant=self.calls % 2 == 0) if number % 2 else block(x)
        return nn.functional.linear(x, self.head.weight)


@pytest.mark.parametrize("optimizer", ["host", "disk"])
def test_an_order_that_changes_and_checkpointed_blocks(optimizer: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Wandering()
    placement = weights_on_disk(tmp_path, optimizer=optimizer)
    trained = run(model, placement | {"host_budget": budget_for(model, placement)}, steps=6)
    assert_same_bits(trained, run(model, RESIDENT, steps=6))
    check_disk(trained)


def evaluate_and_look(step: int, model: nn.Module, optimizer: Any) -> None:
    """What users do between steps: an evaluation, a look at the weights, edits that count and ones that do not."""
    tokens = next(batches(1, seed=9))
    if step == 0:
        with torch.no_grad():
            for _ in range(2):
                loss_of(model, tokens)
    elif step == 1:
        assert all(not value.isnan().any() for value in model.state_dict().values())
        with torch.no_grad(), offload.full_params(model):
            model.blocks[2].up.weight[3:5] = 0.25
    elif step == 2:
        with torch.no_grad(), offload.full_params(model, [model.blocks[1].up.weight]):
            model.blocks[1].up.weight.data[7] = -0.5
        optimizer.resync()
    elif step == 3:
        model.load_state_dict({name: value * 0.9 for name, value in model.state_dict().items()})
    elif step == 4:
        with torch.no_grad(), offload.full_params(model):
            kept = {name: value.clone() for name, value in model.named_parameters()}
            for name, value in model.named_parameters():
                value.mul_(0.5).copy_(kept[name])
        loss_of(model, tokens).backward()  # and a backward whose gradients are dropped
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("dtype", "optimizer"),
    [(torch.float32, "host"), (torch.float32, "disk"), (torch.bfloat16, "disk"), (torch.bfloat16, "device")],
    ids=str,
)
def test_evaluation_and_edits_in_between(dtype: torch.dtype, optimizer: str, tmp_path: Path) -> None:
    model = deep(dtype)
    placement = weights_on_disk(tmp_path, optimizer=optimizer)
    placement["host_budget"] = budget_for(model, placement)
    trained = run(model, placement, steps=6, each_step=evaluate_and_look)
    assert_same_bits(trained, run(model, RESIDENT, steps=6, each_step=evaluate_and_look))
    check_disk(trained)


def test_autocast_and_groups_that_come_later(tmp_path: Path, device: torch.device) -> None:
    def trained(placement: dict[str, Any]) -> list[Tensor]:
        model = deep()
        model, optimizer = offload.wrap(model, torch.optim.Adam(model.blocks.parameters(), lr=1e-2), **placement)
        for step, tokens in enumerate(batches(5)):
            if step == 2:
                optimizer.add_param_group({"params": list(model.head.parameters()), "lr": 1e-3})
            with torch.autocast(device.type, torch.bfloat16):
                loss = loss_of(model, tokens)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return [value.clone() for value in model.state_dict().values()]

    placement = weights_on_disk(tmp_path)
    placement["host_budget"] = budget_for(deep(), placement)
    assert all(same_bits(*pair) for pair in zip(trained(placement), trained(HOST), strict=True))


# --- frozen weights and evaluation --------------------------------------------------------------------------


def test_frozen_weights_are_written_once(tmp_path: Path) -> None:
    model = deep(torch.bfloat16)
    for parameter in model.blocks.parameters():
        parameter.requires_grad_(False)

    def trained(placement: dict[str, Any]) -> Iterator[Run]:
        twin = copy.deepcopy(model)
        chosen = [p for p in twin.parameters() if p.requires_grad]
        twin, optimizer = offload.wrap(twin, torch.optim.AdamW(chosen, lr=1e-2), **placement)
        for _ in range(2):
            yield train(twin, optimizer, steps=3)

    placement = weights_on_disk(tmp_path)
    placement["host_budget"] = budget_for(model, placement)
    written = []
    for one, other in zip(trained(placement), trained(RESIDENT), strict=True):
        assert_same_bits(one, other)
        written.append(one.optimizer.stats().disk["weights_written_bytes"])
    frozen = sum(p.nbytes for p in model.blocks.parameters())
    assert one.optimizer.stats().disk["weights_read_bytes"] > 6 * frozen
    others = sum(p.nbytes for p in model.parameters()) - frozen
    assert written[1] - written[0] <= 3 * (others + 256 * 8)


def test_evaluation_alone(tmp_path: Path) -> None:
    model = deep()
    tokens = next(batches(1))
    with torch.no_grad():
        expected = model(tokens)
    values = copy.deepcopy(model.state_dict())
    model, nothing = offload.wrap(model, None, params="disk", disk_path=tmp_path, disk_block=4096, host_budget="1MiB")
    assert nothing is None
    for _ in range(3):
        with torch.no_grad():
            assert same_bits(model(tokens), expected)
    offload.unwrap(model, None)
    assert all(same_bits(value, values[name]) for name, value in model.state_dict().items())
    assert list(tmp_path.iterdir()) == []


# --- memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["host", "disk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_host_bytes_stay_within_the_plan_and_the_budget(dtype: torch.dtype, optimizer: str, tmp_path: Path) -> None:
    model = deep(dtype)
    placement = weights_on_disk(tmp_path, optimizer=optimizer)
    placement["host_budget"] = budget_for(model, placement)
    trained = run(model, placement)
    stats, plan = trained.optimizer.stats(), trained.optimizer.plan
    count = sum(1 for _ in model.parameters())
    assert stats.pool["peak_used_bytes"] <= plan.host.total + plan.host.gradients + 3 * 256 * count, (stats.pool, plan)
    assert stats.pool["mapped_bytes"] <= placement["host_budget"] == plan.host_capacity
    assert stats.host_bytes["weights"] <= plan.host.cache + plan.host.working
    assert plan.disk.total <= stats.disk["allocated_bytes"]
    assert plan.host.cache < plan.disk.working == sum(p.nbytes for p in model.parameters())


def test_a_budget_that_is_too_small_is_refused_with_numbers(tmp_path: Path) -> None:
    model = deep()
    with pytest.raises(
        offload.OutOfHostMemory, match=r"KiB needed, 300.00 KiB available(.|\n)*cache +0 B +\d"
    ) as error:
        begin(model, weights_on_disk(tmp_path, optimizer="disk", host_budget="300KiB"))
    assert list(tmp_path.iterdir()) == [] and "raise host_budget" in str(error.value)
    for parameter in model.parameters():
        assert type(parameter) is nn.Parameter and parameter.untyped_storage().nbytes() > 0


def test_who_cannot_train_weights_on_disk_is_told(tmp_path: Path) -> None:
    model = deep()
    with pytest.raises(offload.InvalidArgument, match=r"SGD cannot train weights on disk.*params='host'"):
        offload.wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), **weights_on_disk(tmp_path))
    with pytest.raises(offload.InvalidArgument, match="params='disk' needs disk_path"):
        offload.Config(params="disk")


def test_auto_takes_the_disk_for_weights_last(tmp_path: Path) -> None:
    model = deep()
    sizes: dict[str, Any] = {"device_budget": "400KiB", "disk_path": tmp_path, "disk_block": 4096}
    _, on_host = begin(model, {**sizes, "host_budget": "64MiB"})
    assert on_host.plan.params == "host" and on_host.plan.disk.total == 0
    wrapped, optimizer = begin(model, {**sizes, "host_budget": "800KiB"})
    plan = optimizer.plan
    assert (plan.optimizer, plan.gradients, plan.params) == ("disk", "host", "disk")
    assert plan.host.total <= 800 << 10 and "params on disk" in plan.explain() and "a cache of" in plan.explain()
    assert_same_bits(train(wrapped, optimizer, steps=3), train(*begin(model, HOST), steps=3))


# --- saving and loading -------------------------------------------------------------------------------------

FORMATS = [(torch.float32, "auto"), (torch.bfloat16, "auto"), (torch.bfloat16, "fp32")]


@pytest.mark.parametrize(
    ("dtype", "master", "optimizer", "async_save"),
    [
        (torch.float32, "auto", "host", False),
        (torch.float32, "auto", "disk", True),
        (torch.bfloat16, "auto", "host", True),
        (torch.bfloat16, "auto", "disk", True),
        (torch.bfloat16, "fp32", "disk", False),
    ],
    ids=str,
)
def test_a_checkpoint_is_that_of_the_call(
    dtype: torch.dtype, master: str, optimizer: str, async_save: bool, tmp_path: Path
) -> None:
    (tmp_path / "disk").mkdir()
    model = deep(dtype, tied=True)
    placement = weights_on_disk(tmp_path / "disk", optimizer=optimizer, master=master)
    placement["host_budget"] = budget_for(model, placement)
    host, disk = train(*begin(model, HOST), steps=2), train(*begin(model, placement), steps=2)
    offload.save_checkpoint(tmp_path / "host", host.model, host.optimizer, tag="t")
    save = offload.save_checkpoint(tmp_path / "saved", disk.model, disk.optimizer, tag="t", async_save=async_save)
    expected = train(disk.model, disk.optimizer, steps=2)  # changes weights while they are written
    save.wait()
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (tmp_path / "saved" / "t" / name).read_bytes() == (tmp_path / "host" / "t" / name).read_bytes()
    offload.load_checkpoint(tmp_path / "saved", disk.model, disk.optimizer)
    assert_same_bits(train(disk.model, disk.optimizer, steps=2), expected)


def test_hooks_of_state_dict_see_values(tmp_path: Path) -> None:
    """A checkpoint is streamed from disk, and what a user's hook makes of the weights is what is saved."""

    def halve(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
        state["head.weight"] = state["head.weight"] * 0.5

    (tmp_path / "disk").mkdir()
    model, optimizer = begin(deep(), weights_on_disk(tmp_path / "disk"))
    model.register_state_dict_post_hook(halve)
    train(model, optimizer, steps=1)
    offload.save_checkpoint(tmp_path / "saved", model, optimizer, tag="t")
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad(), offload.full_params(model):
        assert same_bits(expected["head.weight"] * 2, model.head.weight)
    offload.unwrap(model, optimizer)
    plain = deep(seed=3)
    offload.load_checkpoint(tmp_path / "saved", plain)
    assert all(same_bits(value, expected[name]) for name, value in plain.state_dict().items())


@pytest.mark.parametrize(("dtype", "master"), FORMATS, ids=str)
def test_states_move_between_tiers(dtype: torch.dtype, master: str, tmp_path: Path) -> None:
    placements = {"host": HOST, "disk": weights_on_disk(tmp_path, optimizer="disk", master=master)}
    first = {name: train(*begin(deep(dtype), placement), steps=3) for name, placement in placements.items()}
    states = {name: copy.deepcopy(run.optimizer.state_dict()) for name, run in first.items()}
    weights = {name: value.clone() for name, value in first["disk"].model.state_dict().items()}
    assert_same_states(states["disk"]["state"], states["host"]["state"])
    expected = train(first["host"].model, first["host"].optimizer, steps=2)
    plain, optimizer = offload.unwrap(first["disk"].model, first["disk"].optimizer)
    assert all(same_bits(value, weights[name]) for name, value in plain.state_dict().items())
    assert isinstance(optimizer, torch.optim.AdamW) and list(tmp_path.iterdir()) == []
    for source, target in (("host", "disk"), ("disk", "host")):
        model, wrapped = begin(deep(dtype, seed=5), placements[target])
        train(model, wrapped, steps=1)
        wrapped.load_state_dict(states[source])
        model.load_state_dict(weights)
        assert_same_bits(train(model, wrapped, steps=2), expected)
        offload.unwrap(model, wrapped)
