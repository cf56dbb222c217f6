"""Models that are built on the CPU and wrapped for the device: values go straight to where they will be."""

from __future__ import annotations

import array
import copy
import mmap
import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import offload
from offload import _native, _residency, _wrap
from training import HOST, RESIDENT, Run, assert_same_bits, batches, loss_of, make_model, same_bits, train

pytestmark = pytest.mark.usefixtures("device")

STREAMED = {**HOST, "params": "host"}
PLACEMENTS = pytest.mark.parametrize(
    "placement",
    [STREAMED, {**RESIDENT, "params": "host"}, {**HOST, "params": "device"}, {**RESIDENT, "params": "device"}],
    ids=["all on the host", "params alone", "all but params", "resident"],
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def on_cpu(dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    model = make_model(dtype, **options).to("cpu")
    model.register_buffer("scale", torch.full((2,), 0.5, device="cpu"))
    return model


def values_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


# --- where things go ----------------------------------------------------------------------------------------


@PLACEMENTS
@DTYPES
def test_wrapped_from_the_cpu_equals_wrapped_there(
    device: torch.device, placement: dict[str, str], dtype: torch.dtype
) -> None:
    """With an optimizer that has states and a scheduler, which were made before."""

    def run(*, built_on: torch.device) -> tuple[Run, dict[str, Any]]:
        model = on_cpu(dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.01)
        optimizer.step()
        optimizer.zero_grad()
        if built_on != torch.device("cpu"):
            model.to(built_on)
            for state in optimizer.state.values():
                state.update({key: value.to(built_on) for key, value in state.items() if key != "step"})
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        before = [id(p) for p in model.parameters()]
        wrapped_model, wrapped = offload.wrap(model, optimizer, device=str(device), **placement)
        assert [id(p) for p in wrapped_model.parameters()] == before
        assert {p.device for p in model.parameters()} == {model.scale.device} == {device}
        done = train(wrapped_model, wrapped, scheduler=scheduler)
        _, plain = offload.unwrap(model, wrapped)
        assert plain is optimizer
        moments = [state["exp_avg"] for state in optimizer.state.values()]
        assert {p.device for p in model.parameters()} == {m.device for m in moments} == {device}
        return done, optimizer.state_dict()["state"]

    (one, states), (other, expected) = run(built_on=torch.device("cpu")), run(built_on=device)
    assert_same_bits(one, other)
    for index, state in expected.items():
        assert all(torch.equal(states[index][key], value) for key, value in state.items())


def test_a_model_with_some_weights_there_already(device: torch.device) -> None:
    model = on_cpu()
    expected = values_of(model)
    model.blocks[1].to(device)
    model, optimizer = offload.wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), device=str(device), **STREAMED)
    offload.unwrap(model, optimizer)
    for name, p in model.named_parameters():
        assert p.device == device and same_bits(p.detach().cpu(), expected[name])


# --- bytes --------------------------------------------------------------------------------------------------


@pytest.mark.cpu_only
@DTYPES
@pytest.mark.parametrize("run_bytes", [1, 64 << 20], ids=["unit by unit", "small ones together"])
def test_weights_never_lie_twice_on_the_host(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, run_bytes: int
) -> None:
    """The model's own storages, watched by torch's weak references, and what the pool has mapped for weights."""
    monkeypatch.setattr(_residency, "_RUN_BYTES", run_bytes)
    model = nn.Sequential(*(nn.Linear(256, 256, dtype=dtype) for _ in range(8))).requires_grad_(False)
    model.append(nn.Linear(256, 1, dtype=dtype))
    unit = sum(p.numel() * p.element_size() for p in model[0].parameters())
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    storages = [(p.untyped_storage()._weak_ref(), p.numel() * p.element_size()) for p in model.parameters()]

    def still_there() -> int:
        return sum(nbytes for storage, nbytes in storages if not torch.UntypedStorage._expired(storage))

    assert still_there() == weights
    optimizer = torch.optim.AdamW(model[-1].parameters())
    seen = []
    reserve = _native.HostPool.reserve

    def watched(pool: _native.HostPool, nbytes: int) -> None:
        reserve(pool, nbytes)
        seen.append(still_there() + pool.stats()["mapped_bytes"])

    monkeypatch.setattr(_native.HostPool, "reserve", watched)
    _, wrapped = offload.wrap(model, optimizer, **STREAMED)
    page = 4096 * (len(seen) + 4)
    if run_bytes == 1:
        assert len(seen) >= 9 and max(seen) <= weights + unit + page
    else:
        assert len(seen) == 1, "one registration for all of a small model"
    assert still_there() == 0
    assert wrapped.stats().host_bytes["weights"] >= weights
    for storage, _ in storages:
        torch.UntypedStorage._free_weak_ref(storage)


@pytest.mark.cpu_only
def test_what_the_weights_leave_goes_back_to_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pages that were theirs: malloc keeps freed blocks of this size in its heap, below those still in use."""
    run, count, block = 8 << 20, 48, 1 << 20
    monkeypatch.setattr(_residency, "_RUN_BYTES", run)
    torch.empty(16 << 20, dtype=torch.uint8).fill_(1)  # from here on such blocks come from the heap
    model = nn.Sequential(*(nn.utils.skip_init(nn.Linear, 512, 512, bias=False) for _ in range(count)))
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    # Whole pages: malloc puts a block's first and last bytes on pages that it shares with blocks already there.
    pages = [whole_pages(parameter.data_ptr(), parameter.nbytes) for parameter in model.parameters()]
    assert resident_bytes(pages) >= count * (block - mmap.PAGESIZE)
    seen = []
    reserve = _native.HostPool.reserve

    def watched(pool: _native.HostPool, nbytes: int) -> None:
        reserve(pool, nbytes)
        seen.append((resident_bytes(pages), pool.stats()["mapped_bytes"]))

    monkeypatch.setattr(_native.HostPool, "reserve", watched)
    offload.wrap(model, None, params="host")
    slack = 4 << 20  # what else the process puts there meanwhile
    assert len(seen) == count * block // run + 1, seen
    assert all(left + mapped <= count * block + run + slack for left, mapped in seen), seen
    assert resident_bytes(pages) <= slack, (resident_bytes(pages), seen)


def whole_pages(address: int, nbytes: int) -> range:
    """The numbers of the pages that lie in it."""
    return range(-(-address // mmap.PAGESIZE), (address + nbytes) // mmap.PAGESIZE)


def resident_bytes(pages: Sequence[range]) -> int:
    """Of these pages, the bytes that are in memory or swapped out: bits 63 and 62 of a page's word in pagemap."""
    file = os.open("/proc/self/pagemap", os.O_RDONLY)
    try:
        words = array.array("Q", b"".join(os.pread(file, 8 * len(part), 8 * part.start) for part in pages))
    finally:
        os.close(file)
    return mmap.PAGESIZE * sum(word >> 62 != 0 for word in words)


@pytest.mark.parametrize("kind", ["weights there", "weights on the CPU"])
def test_the_plan_counts_weights_where_they_are(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """The meta device stands for an accelerator: only bytes are asked for."""
    model = make_model()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    there = torch.device("meta")
    if kind == "weights there":
        model.to(there)
    figures = {"device": 1 << 30, "host": 1 << 30}
    monkeypatch.setattr(_wrap, "probe_device", lambda _: type("Facts", (), {"free_bytes": figures["device"]})())
    monkeypatch.setattr(_wrap, "probe_host", lambda: type("Facts", (), {"available_bytes": figures["host"]})())
    asked: dict[str, int] = {}

    def make_plan(*_: Any, device_bytes: int, host_bytes: int, **rest: Any) -> Any:
        asked.update(device=device_bytes, host=host_bytes)

    monkeypatch.setattr(_wrap, "make_plan", make_plan)
    settings = offload.Config()
    _wrap._plan(model, _wrap.find_units(model, None), [torch.optim.SGD(model.parameters())], settings, there)
    counted = "device" if kind == "weights there" else "host"
    assert asked == {**figures, counted: figures[counted] + weights}


# --- refusals and failures ----------------------------------------------------------------------------------


def failing_acquire(nth: int) -> Callable[..., Any]:
    acquire, calls = _native.HostPool.acquire, iter(range(10**6))

    def fail(pool: _native.HostPool, nbytes: int, tag: Any) -> Any:
        if next(calls) == nth:
            raise offload.OutOfHostMemory("no page is left")
        return acquire(pool, nbytes, tag)

    return fail


@DTYPES
@pytest.mark.parametrize("room", [True, False], ids=["room", "no room"])
@pytest.mark.parametrize("nth", [0, 3, 5, 9, 20])
def test_out_of_memory_in_the_middle_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, dtype: torch.dtype, room: bool, nth: int
) -> None:
    """Also where copies of what has left find no room: the parameters then keep the host bytes that they have."""
    model = on_cpu(dtype, tied=True)
    nn.init.normal_(model.blocks[2].norm.weight)
    expected = copy.deepcopy(model)
    before = [id(p) for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_native.HostPool, "acquire", failing_acquire(nth))
        if not room:

            def refuse(*_: Any, **__: Any) -> Any:
                raise MemoryError

            patch.setattr(_residency.Residency, "resident_copies", refuse)
        with pytest.raises(offload.OutOfHostMemory, match="no page is left"):
            offload.wrap(model, optimizer, device=str(device), **STREAMED)
    assert [id(p) for p in model.parameters()] == before and model.head.weight is model.embedding.weight
    assert model.scale.device.type == "cpu"
    for (name, p), original in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert type(p) is nn.Parameter and p.device.type == "cpu", name
        assert same_bits(p.detach(), original.detach()), name
        assert not p._post_accumulate_grad_hooks and not p.__dict__
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    again = torch.optim.AdamW(expected.parameters(), lr=1e-2)
    one = train(*offload.wrap(model, optimizer, device=str(device), **STREAMED))
    assert_same_bits(one, train(*offload.wrap(expected, again, device=str(device), **STREAMED)))


def test_more_than_the_host_budget_is_refused_before_anything_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool rounds every block up, the plan does not: a budget in between is the pool's to refuse."""
    monkeypatch.setattr(_residency, "_RUN_BYTES", 1)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    addresses = [p.data_ptr() for p in model.parameters()]
    needed = offload.estimate(model, **STREAMED).host.total
    with pytest.raises(offload.OutOfHostMemory, match="the reservation"):
        offload.wrap(model, optimizer, host_budget=needed, **STREAMED)
    assert [p.data_ptr() for p in model.parameters()] == addresses


class OwnWay(nn.Parameter):
    def to(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("must not be called")


def refusals(model: nn.Module) -> dict[str, Callable[[], None]]:
    def gradient() -> None:
        model.blocks[0].up.weight.grad = torch.zeros_like(model.blocks[0].up.weight)

    def subclass() -> None:
        model.blocks[0].up.weight = OwnWay(model.blocks[0].up.weight.detach())

    return {"blocks.0.up.weight has a gradient on cpu.*zero_grad": gradient, "OwnWay has its own way": subclass}


@pytest.mark.parametrize("number", [0, 1])
def test_parameters_that_cannot_go_are_named(device: torch.device, number: int) -> None:
    """The device that refuses is `meta` where there is no other: the check comes before any copy."""
    there = torch.device("meta") if device.type == "cpu" else device
    model = on_cpu()
    match, prepare = list(refusals(model).items())[number]
    prepare()
    engine = offload._wrap.Engine
    plan = offload.estimate(model, params="device")
    streaming = engine(torch.device("cpu"), plan, offload.Config(), _wrap.find_units(model, None)).streaming
    with pytest.raises(offload.InvalidArgument, match=match):
        _wrap.ResidentMove(model, there, streaming)
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_the_device_of_a_model(device: torch.device) -> None:
    model = on_cpu()
    assert _wrap.device_of(model, offload.Config(device=str(device))) == device
    if device.type == "cuda":
        model.head.to(device)
        assert _wrap.device_of(model, offload.Config(device=str(device))) == device
        with pytest.raises(
            offload.InvalidArgument, match=r"embedding\.weight on cpu and head\.weight on cuda.*device="
        ):
            _wrap.device_of(model, offload.Config())
        with pytest.raises(offload.InvalidArgument, match=r"device='cpu', but head\.weight is on cuda"):
            _wrap.device_of(model, offload.Config(device="cpu"))


def test_the_first_forward_finds_the_weights(device: torch.device) -> None:
    model = on_cpu()
    plain = copy.deepcopy(model).to(device)
    tokens = next(batches(1))
    model, _ = offload.wrap(model, torch.optim.SGD(model.parameters()), device=str(device), **STREAMED)
    with torch.no_grad():
        assert torch.equal(loss_of(model, tokens), loss_of(plain, tokens))
