"""`optimizer.state` of a wrapped optimizer takes what is written to it, as torch's own does."""

from __future__ import annotations

import copy
import io
from collections import defaultdict
from collections.abc import Callable, MutableMapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import any_order_looks
import offload
from offload._native_updater import NativeUpdater
from training import HOST, RESIDENT, assert_offloaded, batches, loss_of, make_model, same_bits

pytestmark = pytest.mark.usefixtures("device")

STREAMED = HOST | {"params": "host"}
Optimizer = Callable[[nn.Module], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Optimizer] = {
    "native": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
    "as itself": lambda model: torch.optim.NAdam(model.parameters(), lr=1e-2),
}
each_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


def edit(step: int, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    """What users and frameworks do between steps."""
    if step == 0:  # as Lightning moves states
        for entries in optimizer.state.values():
            assert isinstance(entries, MutableMapping)
            for key, value in entries.items():
                if key != "step":
                    entries[key] = value.clone().mul_(0.5) if value.ndim else value
    elif step == 1:
        first = optimizer.state[parameters[0]]
        optimizer.state[parameters[0]] = {key: value.clone() for key, value in first.items()} | {
            "exp_avg": torch.full_like(first["exp_avg"], 1e-3)
        }
    elif step == 2:
        optimizer.state.pop(parameters[1])
        del optimizer.state[parameters[2]]
    elif step == 3:
        optimizer.state.clear()
    elif step == 4:
        optimizer.state = defaultdict(dict)


def trained(make: Optimizer, placement: dict[str, str] | None) -> tuple[list[float], list[Tensor], Any]:
    model = make_model()
    optimizer: Any = make(model)
    if placement is not None:
        model, optimizer = offload.wrap(model, optimizer, **placement)
    parameters, found = list(model.parameters()), []
    for step, tokens in enumerate(batches(6)):
        loss = loss_of(model, tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        edit(step, optimizer, parameters)
        found.append(loss.item())
    return found, [value.clone() for value in model.state_dict().values()], optimizer


@each_optimizer
def test_what_is_written_is_what_the_next_step_reads(make: Optimizer, device: torch.device) -> None:
    plain = trained(make, None)[0]
    expected, *others = (trained(make, placement) for placement in (RESIDENT, HOST, STREAMED))
    assert expected[0] == pytest.approx(plain, rel=1e-4)
    if make is OPTIMIZERS["as itself"] and device.type != "cpu":  # on either tier with that one's own rounding
        expected, *others = others
        assert expected[0] == pytest.approx(plain, rel=1e-4)
    for found, weights, optimizer in others:
        assert optimizer.stats().transfers["to_host_bytes"] > 0
        assert found == expected[0]
        assert all(same_bits(one, other) for one, other in zip(weights, expected[1], strict=True))


@each_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_entry_from_elsewhere_goes_where_the_state_lies(make: Optimizer, dtype: torch.dtype) -> None:
    """Lightning moves states to the model's device before and after a fit; here they come in another dtype."""
    model = make_model(dtype)
    model, optimizer = offload.wrap(model, make(model), **HOST)
    loss_of(model, next(batches(1))).backward()
    optimizer.step()
    host_bytes = optimizer.stats().host_bytes
    before = copy.deepcopy(optimizer.state_dict())
    for parameter, entries in optimizer.state.items():
        for key in ("exp_avg", "exp_avg_sq"):
            live = entries[key]
            entries[key] = live.clone()
            assert optimizer.state[parameter][key].data_ptr() == live.data_ptr() or make is OPTIMIZERS["as itself"]
            assert same_bits(entries[key], live) and entries[key].device == live.device
    after = optimizer.state_dict()
    assert after["state"].keys() == before["state"].keys()
    for index, entries in before["state"].items():
        for key, value in entries.items():
            assert same_bits(after["state"][index][key], value), key
    assert optimizer.stats().host_bytes == host_bytes


def test_states_are_made_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who goes through those on disk, as Lightning does at the end of a fit, holds one and not all of them."""
    model = make_model(torch.bfloat16)
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters()), **HOST)
    loss_of(model, next(batches(1))).backward()
    optimizer.step()
    asked, dump = [], NativeUpdater.dump

    def watched(self: NativeUpdater, groups: list[dict[str, Any]], **options: Any) -> Any:
        asked.append([id(parameter) for group in groups for parameter in group["params"]])
        return dump(self, groups, **options)

    monkeypatch.setattr(NativeUpdater, "dump", watched)
    for parameter, entries in optimizer.state.items():
        assert asked.pop() == [id(parameter)] and not asked
        assert entries["master"].dtype == torch.float32


def test_what_is_no_state_is_refused_and_changes_nothing() -> None:
    model = make_model()
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters()), **HOST)
    loss_of(model, next(batches(1))).backward()
    optimizer.step()
    optimizer.synchronize()  # its weights are on their way until then
    assert_offloaded(optimizer)
    parameter = model.head.weight
    before = optimizer.state[parameter]["exp_avg"].clone()
    for name, value in {"exp_avg": torch.zeros(3), "step": torch.tensor(-1.0)}.items():
        with pytest.raises(offload.InvalidArgument, match=name):
            optimizer.state[parameter][name] = value
    with pytest.raises(offload.InvalidArgument, match="no 'exp_avg'"):
        del optimizer.state[parameter]["exp_avg"]
    with pytest.raises(KeyError):
        del optimizer.state[nn.Parameter(torch.ones(1))]
    with pytest.raises(offload.StateError, match="use load_state_dict"):
        optimizer.state = {parameter: {}}
    assert same_bits(optimizer.state[parameter]["exp_avg"], before)


def test_as_a_mapping() -> None:
    model = make_model()
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters()), **HOST)
    assert not optimizer.state and len(optimizer.state) == 0 and optimizer.state[model.head.weight] == {}
    loss_of(model, next(batches(1))).backward()
    optimizer.step()
    assert list(map(id, optimizer.state)) == list(map(id, model.parameters()))
    assert model.head.weight in optimizer.state and torch.ones(3) not in optimizer.state
    assert optimizer.state.get(nn.Parameter(torch.ones(1)), 5) == 5 and optimizer.state.get(model.head.weight)
    copied = copy.deepcopy(optimizer.state)
    assert type(copied) is dict and all(type(entries) is dict for entries in copied.values())
    assert len(copied) == len(optimizer.state) and "exp_avg" in repr(optimizer.state[model.head.weight])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert all(type(entries) is dict for entries in loaded["state"].values())


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adagrad])
@pytest.mark.parametrize("placement", [HOST, STREAMED], ids=["host", "streamed"])
def test_a_parameter_without_elements_has_the_state_of_every_other_placement(
    placement: dict[str, Any], kind: type[torch.optim.Optimizer]
) -> None:
    def states(placement: dict[str, Any]) -> Any:
        model = make_model(torch.bfloat16)
        model.nothing = nn.Parameter(torch.empty(0, 3, dtype=torch.bfloat16))
        model, optimizer = offload.wrap(model, kind(model.parameters(), lr=1e-2), **placement)
        for tokens in batches(2):
            (loss_of(model, tokens) + model.nothing.sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
        saved = copy.deepcopy(optimizer.state_dict()["state"])
        optimizer.load_state_dict(optimizer.state_dict())
        offload.unwrap(model, optimizer)
        return saved

    found, expected = states(placement), states(RESIDENT)
    assert expected[0]["step"] == 2.0 and expected[0]["master"].shape == (0, 3)
    assert any_order_looks.difference(expected, found) is None
