"""`offload_activations`: what autograd saved comes back with the same bits, whatever happens to it in between."""

from __future__ import annotations

import gc
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

import offload
from activation_models import MODELS, Watch, assert_equal_runs, assert_nothing_left, pool_of, region_of, small, train
from offload import _activation_region, _activations, _native
from test_memory import Allocations
from training import same_bits

pytestmark = pytest.mark.usefixtures("device")


@pytest.mark.parametrize("keep", [0, 0.125], ids=["keep nothing", "keep an eighth"])
@pytest.mark.parametrize("name", MODELS)
def test_training_has_the_same_bits(device: torch.device, name: str, keep: float) -> None:
    region = region_of(device, keep=keep)
    run = train(name, region)
    assert region.stats()["offloaded_bytes"] >= (1 - keep) * region.stats()["saved_bytes"] * 0.75 > 0
    assert_nothing_left(region)
    assert_equal_runs(run, train(name, nullcontext()))


def test_autocast_has_the_same_bits_and_sends_no_weights(device: torch.device) -> None:
    region = region_of(device)
    assert_equal_runs(train("tiny", region, autocast=True), train("tiny", nullcontext(), autocast=True))
    model, x = nn.Linear(64, 64), torch.ones(1, 64, requires_grad=True)
    with region, torch.autocast(device.type, torch.bfloat16):
        y = model(x)
    assert region.stats()["saved_bytes"] < 64 * 64
    del y


# --- what is saved ------------------------------------------------------------------------------------------


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "whole": lambda x: x,
    "transposed": lambda x: x.t(),
    "gaps": lambda x: x[:, 3:17],
    "steps": lambda x: x[::3, ::2],
    "expanded": lambda x: x[:, :1].expand(-1, 50),
    "overlapping": lambda x: x.unfold(1, 8, 2),
    "offset": lambda x: x[5],
    "last element": lambda x: x[-1:, -1:],
    "scalar": lambda x: x[3, 3],
    "permuted": lambda x: x.view(4, 5, 24).permute(2, 0, 1),
    "as_strided": lambda x: x.as_strided((3, 4), (1, 7), 11),
    "complex": lambda x: torch.view_as_complex(x.view(20, 12, 2)),
    "conjugated": lambda x: torch.view_as_complex(x.view(20, 12, 2)).conj(),
    "half": lambda x: x.to(torch.float16)[:, 1:],
    "empty": lambda x: x[:0],
}


@pytest.mark.parametrize("kind", VIEWS)
def test_a_view_comes_back_as_itself(device: torch.device, kind: str) -> None:
    torch.manual_seed(0)
    leaf = torch.randn(20, 24, requires_grad=True)
    view = VIEWS[kind](leaf * 1)
    address, expected = view.data_ptr() % 64, view.detach().resolve_conj().clone(memory_format=torch.preserve_format)
    shape, strides = view.shape, view.stride()
    seen: list[Tensor] = []
    region = region_of(device)
    with region:
        loss = Watch.apply(view, seen)
    del view
    if kind not in ("conjugated", "empty"):
        assert region.stats()["offloaded_bytes"] > 0
    loss.abs().sum().backward()
    assert (seen[0].shape, seen[0].stride(), seen[0].data_ptr() % 64) == (shape, strides, address)
    assert torch.equal(seen[0].resolve_conj(), expected)


def test_what_is_saved_twice_leaves_once_and_comes_back_once(device: torch.device) -> None:
    region = region_of(device)
    transfers = region._activations._lanes._transfers
    moved = []
    for _ in range(2):  # the second knows the order of backward
        before = transfers.stats()
        x = torch.randn(64, 96, requires_grad=True) * 1
        with region:
            q, k, v = x.chunk(3, dim=1)
            loss = (q.sin() * q.cos() + k.sin() * v).sum() + x.pow(2).sum()
        loss.backward()
        after = transfers.stats()
        moved.append([after[f"{lane}_bytes"] - before[f"{lane}_bytes"] for lane in ("to_host", "to_device")])
    # x, which every one of q, k and v is a part of, and sin(q), cos(q), sin(k)
    assert moved[1] == [x.nbytes + 3 * q.nbytes] * 2


def test_a_recycled_address_is_another_tensor(device: torch.device) -> None:
    """A saved tensor's memory is given to the next one of its size: they are not the same tensor."""

    def run(region: Any) -> Tensor:
        x = torch.linspace(0.1, 1, 4096).requires_grad_()
        with region:
            total = torch.zeros(())
            for step in range(12):
                total = total + (x * (1 + step)).sin().sum()
        total.backward()
        return x.grad

    region = region_of(device)
    assert same_bits(run(region), run(nullcontext()))
    assert region.stats()["saved_bytes"] == 12 * 4096 * 4


def test_parameters_and_small_tensors_stay(device: torch.device) -> None:
    model = nn.Linear(64, 64)
    x = torch.ones(2, 64, requires_grad=True)
    region = offload.offload_activations(device, keep=0)
    with region:
        y = model(x * 1)
    assert region.stats() == {"saved_bytes": 0, "offloaded_bytes": 0, "sent_bytes": 0, "refused_bytes": 0}
    y.sum().backward()


# --- backward that is not one backward after one forward ----------------------------------------------------


def test_backward_may_run_twice(device: torch.device) -> None:
    grads = []
    region = region_of(device)
    for context in (region, nullcontext()):
        x = torch.linspace(0, 1, 512).requires_grad_()
        loss = small(context, x)
        for again in (True, True, False):
            loss.backward(retain_graph=again)
        grads.append(x.grad)
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
    assert same_bits(*grads)
    assert region.stats()["offloaded_bytes"] > 0
    del loss
    assert_nothing_left(region)


def test_several_forwards_before_backward_in_any_order(device: torch.device) -> None:
    grads = []
    for context in (region_of(device), region_of(device, keep=0.3), nullcontext()):
        x = torch.linspace(0, 1, 512).requires_grad_()
        for _ in range(3):
            losses = [small(context, x * scale) for scale in (1, 2, 3)]
            for position in (1, 0, 2):
                losses[position].backward()
        grads.append(x.grad)
    assert same_bits(grads[0], grads[2]) and same_bits(grads[1], grads[2])


def test_a_graph_may_outlive_later_steps_and_the_region(device: torch.device) -> None:
    x, y = (torch.linspace(0, 1, 512).requires_grad_() for _ in range(2))
    region = region_of(device, keep=0.5)
    late = small(region, x)
    for _ in range(3):
        small(region, torch.ones(700, requires_grad=True)).backward()
    pool = pool_of(region)
    del region
    gc.collect()
    late.backward()
    small(nullcontext(), y).backward()
    assert same_bits(x.grad, y.grad)
    del late
    assert pool.stats()["live_count"] == 0


def test_a_graph_without_backward_gives_its_memory_back(device: torch.device) -> None:
    region = region_of(device)
    gc.disable()
    try:
        for _ in range(3):
            loss = small(region, torch.ones(512, requires_grad=True))
            assert pool_of(region).stats()["live_count"] > 0
            del loss
            assert_nothing_left(region)
    finally:
        gc.enable()


def test_double_backward(device: torch.device) -> None:
    second = []
    for context in (region_of(device), nullcontext()):
        x = torch.linspace(0.1, 1, 512).requires_grad_()
        (first,) = torch.autograd.grad(small(context, x), x, create_graph=True)
        first.pow(2).sum().backward()
        second.append(x.grad)
    assert same_bits(*second)


def test_backward_in_another_thread(device: torch.device) -> None:
    x = torch.linspace(0, 1, 512).requires_grad_()
    region = region_of(device)
    loss = small(region, x)
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join(60)
    expected = torch.linspace(0, 1, 512).requires_grad_()
    small(nullcontext(), expected).backward()
    assert same_bits(x.grad, expected.grad)


def test_copies_on_their_way_are_counted_by_one_thread_at_a_time(device: torch.device) -> None:
    """One thread may be in a backward while another one saves: the ring has no lock of its own."""

    class Ring(deque[Any]):
        def append(self, copy: Any) -> None:
            changes.append(lock._is_owned())
            super().append(copy)

        def popleft(self) -> Any:
            changes.append(lock._is_owned())
            return super().popleft()

        def __iter__(self) -> Iterator[Any]:
            looks.append(lock._is_owned())
            return super().__iter__()

        def __delitem__(self, position: Any) -> None:
            changes.append(lock._is_owned())
            super().__delitem__(position)

    region = region_of(device)
    lock: Any = region._activations._lock
    lanes: Any = region._activations._lanes
    changes: list[bool] = []
    looks: list[bool] = []
    lanes._ring = Ring(lanes._ring)
    x = torch.linspace(0, 1, 512).requires_grad_()
    small(region, x).backward()
    assert len(changes) > 4 and all(changes)
    assert looks and all(looks)


def test_hooks_of_the_user_inside_keep_their_tensors(device: torch.device) -> None:
    packed: list[Tensor] = []
    x = torch.linspace(0, 1, 512).requires_grad_()
    region = region_of(device)
    with region:
        y = x.sin() * x.exp()
        before = region.stats()["saved_bytes"]
        with saved_tensors_hooks(lambda t: packed.append(t.detach()) or t.detach(), lambda t: t), torch.no_grad():
            y.exp()
        with saved_tensors_hooks(lambda t: packed.append(t.detach()) or t.detach(), lambda t: t):
            z = y.sin()
        with save_on_cpu():
            z = z.exp()
        with region, torch.no_grad():
            z.sin()
        assert region.stats()["saved_bytes"] == before > 0 and len(packed) == 1
        loss = z.cos().sum()
    loss.backward()
    expected = torch.linspace(0, 1, 512).requires_grad_()
    (expected.sin() * expected.exp()).sin().exp().cos().sum().backward()
    assert same_bits(x.grad, expected.grad)


def test_a_gradient_that_aliases_what_came_back_keeps_its_value(device: torch.device) -> None:
    class Alias(Watch):
        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
            return ctx.saved_tensors[0].view(-1), None

    region = region_of(device)
    x = torch.zeros(4096, requires_grad=True)
    with region:
        y = x + 3
        loss = Alias.apply(y, [])
    del y
    loss.sum().backward()
    del loss
    for _ in range(4):
        small(region, torch.ones(4096, requires_grad=True)).backward()
    assert torch.equal(x.grad, torch.full((4096,), 3.0))


# --- order and memory ---------------------------------------------------------------------------------------


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> _native.HostDevice:
    """The device of every region of the test."""
    made = _native.HostDevice()
    monkeypatch.setattr(_activation_region, "open_device", lambda _: made)
    return made


@pytest.mark.cpu_only
def test_forward_waits_for_no_copy(device: torch.device, native: Any) -> None:
    region = region_of(device)
    native.hold("to_host")
    x = torch.linspace(0, 1, 512).requires_grad_()
    loss = small(region, x)
    assert native.pending_count("to_host") == region.stats()["offloaded_bytes"] // x.nbytes > 0
    native.release("to_host")
    loss.backward()
    expected = torch.linspace(0, 1, 512).requires_grad_()
    small(nullcontext(), expected).backward()
    assert same_bits(x.grad, expected.grad)


def test_what_comes_next_is_on_its_way_before_backward_asks(device: torch.device) -> None:
    """From the second step on in the recorded order, here not the reverse of forward."""
    region = region_of(device, keep=4 * 4096)
    activations = region._activations
    begun: list[Any] = []
    late: list[int] = []
    start, wait = activations._start_return, activations._lanes.wait_upload

    def starting(saved: Any, stream: int) -> None:
        start(saved, stream)
        begun.append(saved.copy.ticket)

    def waiting(ticket: Any, lock: Any) -> None:
        if begun[-1] is ticket:
            late.append(len(begun))  # nothing was asked for after it: it was not prefetched
        wait(ticket, lock)

    activations._start_return, activations._lanes.wait_upload = starting, waiting
    for _ in range(3):
        late.clear()
        x = torch.linspace(0, 1, 1024).requires_grad_()
        with region:
            branches = [(x * scale).sin() for scale in range(12)]
            loss = torch.stack([branches[position].sum() for position in (3, 9, 1, 7, 5, 11, 0, 2, 4, 6, 8, 10)]).sum()
        loss.backward()
    assert region.stats()["offloaded_bytes"] >= 8 * 4096
    assert len(late) <= 1, late


def test_the_newest_stay_on_the_device(device: torch.device) -> None:
    region = region_of(device, keep=2 * 4096)
    with region:
        x = torch.ones(1024, requires_grad=True) * 1
        for _ in range(6):
            x = x.sin()
    ranges = [reference() for reference in region._activations._forward.ranges]
    assert [saved.source is not None for saved in ranges] == [False] * 4 + [True] * 2
    uploaded = region._activations._lanes._transfers.stats()["to_device_count"]
    x.sum().backward()
    assert region._activations._lanes._transfers.stats()["to_device_count"] - uploaded == 4


def test_no_page_is_obtained_after_the_first_step(device: torch.device) -> None:
    region = region_of(device, keep=0.2)
    mapped = set()
    for step in range(4):
        small(region, torch.ones(1 << 20, requires_grad=True)).backward()
        if step:
            mapped.add(pool_of(region).stats()["mapped_bytes"])
    assert len(mapped) == 1 and region.stats()["offloaded_bytes"] > 0


def test_every_copy_is_ordered_after_the_stream_of_its_tensor(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream is read when a tensor is saved, neither earlier nor when it departs."""
    region = region_of(device, keep=4096)
    lanes = region._activations._lanes
    streams: list[int] = []
    send = lanes.send
    monkeypatch.setattr(lanes, "send", lambda *args: streams.append(args[2]) or send(*args))
    with region:
        x = torch.ones(1024, requires_grad=True) * 1
        if device.type == "cuda":
            expected = [torch.cuda.Stream() for _ in range(4)]
            before = torch.cuda.current_stream()
            for stream in expected:
                stream.wait_stream(before)
                with torch.cuda.stream(stream):
                    x = x.sin()
                before = stream
            assert streams == [stream.cuda_stream for stream in expected[:3]]
            return
        for stream in (3, 4, 5, 6):
            monkeypatch.setattr(lanes, "compute_stream", lambda stream=stream: stream)
            x = x.sin()
    assert streams == [3, 4, 5]


@pytest.mark.cpu_only
def test_the_device_holds_about_what_is_kept(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_activations, "IN_FLIGHT_BYTES", 0)

    def peak(region: Any) -> int:
        x = torch.ones(1 << 16, requires_grad=True)
        with Allocations() as allocations, region:
            y = x
            for _ in range(32):
                y = y.sin()
            y.sum().backward()
        return allocations.peak // x.nbytes

    assert peak(nullcontext()) >= 32
    region = region_of(device, keep=4 << 18)
    peak(region)
    # Kept; on its way; the value, its gradient, the next of both, and one in use.
    assert peak(region) <= 4 + 4 + 5, (region.stats(), pool_of(region).stats())


# --- the door -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep": 1.5}, "keep=1.5: a share"),
        ({"keep": "lots"}, "keep: size 'lots'"),
        ({"budget": 0.5}, "budget=0.5: give bytes"),
        ({"min_bytes": -1}, "min_bytes: size -1"),
        ({"device": "meta"}, "no such device here; legal are 'cpu'"),
        ({"device": "gpu"}, "no device that torch knows"),
        ({"device": nn.Linear(2, 2)}, "no device that torch knows"),
        ({"device": "cuda:77"}, "no such device here"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(offload.InvalidArgument, match=words):
        offload.offload_activations(**options)
