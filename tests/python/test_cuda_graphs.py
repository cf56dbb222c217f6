"""CUDA graphs over what comes and goes are refused, on any machine, and training goes on without them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from driver_double import DriverDouble
from torch import nn

import offload
from offload import _native
from test_streaming import streamed
from training import RESIDENT, batches, loss_of, make_model
from what_lives import collect

pytestmark = pytest.mark.usefixtures("device")


def test_copies_end_while_another_model_is_captured(device: torch.device, driver_double: DriverDouble) -> None:
    """During a capture the driver refuses to wait for events in other threads, and the capture is lost with that."""
    on_card = device.type == "cuda"
    native = _native.CudaDevice(device.index) if on_card else _native.CudaDevice(driver_path=driver_double.path)
    pool = _native.HostPool(native, budget_bytes=1 << 20, slab_bytes=1 << 20, pin=True)
    queue = _native.TransferQueue(native)
    source = torch.arange(1024, dtype=torch.int32)
    expected = source + 1
    buffers = [pool.acquire(4096, "staging") for _ in range(8)]
    graph = capturing = None
    if on_card:
        busy, capturing, graph = torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(busy):
            torch.cuda._sleep(1_000_000_000)  # the copies end in the capture, all but where this thread is late
    else:
        driver_double.hold("to_host")
    stream = busy.cuda_stream if on_card else 0
    tickets = [queue.submit_to_host(buffer.address, source.data_ptr(), 4096, stream) for buffer in buffers]
    if graph is not None:
        with torch.cuda.stream(capturing):
            graph.capture_begin()
            try:
                changed = source + 1
                assert all(ticket.wait(60) for ticket in tickets)
            finally:
                graph.capture_end()
        graph.replay()
        assert torch.equal(changed, expected)
    else:
        driver_double.set_capturing(True)
        driver_double.release("to_host")
        assert all(ticket.wait(60) for ticket in tickets)
        driver_double.set_capturing(False)
        assert driver_double.misuses() == (0, "")
    for buffer in buffers:
        assert torch.equal(torch.frombuffer(buffer, dtype=torch.int32)[:1024], source.cpu())


def test_a_pool_grows_and_goes_while_another_model_is_captured(driver_double: DriverDouble) -> None:
    """Registering memory is refused during a capture, too, in all threads that are not exempt from it."""
    collect()  # models of other tests hold memory of the double
    native = _native.CudaDevice(driver_path=driver_double.path)
    driver_double.set_capturing(True)
    pool = _native.HostPool(native, budget_bytes=1 << 20, slab_bytes=1 << 20, pin=True)
    buffer = pool.acquire(4096, "staging")
    assert not pool.stats()["pin_refused"]
    assert native.pinned_bytes == pool.stats()["pinned_bytes"] == 1 << 20
    del buffer, pool
    assert driver_double.live("registrations") == 0
    driver_double.set_capturing(False)
    assert driver_double.misuses() == (0, "")


@pytest.mark.parametrize("option", ["params", "activations"])
def test_capture_into_a_cuda_graph_is_refused(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch says during a capture, on any machine; afterwards training goes on."""
    model, optimizer = streamed(make_model(), {**RESIDENT, option: "host"})
    tokens = next(batches(1))
    expected = loss_of(make_model(), tokens).item()
    for mode in (torch.enable_grad, torch.no_grad):
        with monkeypatch.context() as patch, mode():
            patch.setattr(torch.cuda, "is_initialized", lambda: True)
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            with pytest.raises(offload.StateError, match=rf"CUDA graph.*{option}='device'"):
                model(tokens)
    loss = loss_of(model, tokens)
    assert loss.item() == expected
    loss.backward()
    optimizer.step()
    if option == "activations":
        region = offload.offload_activations(next(model.parameters()).device)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(offload.StateError, match="CUDA graph"), region:
            pass


def in_place(model: nn.Module, mode: str) -> nn.Module:
    model.compile(mode=mode)
    return model


def of_a_block(model: nn.Module, mode: str) -> nn.Module:
    model.blocks[1].compile(mode=mode)
    return model


def of_a_forward(model: nn.Module, mode: str) -> nn.Module:
    block = model.blocks[1]
    block.forward = torch.compile(block.forward, mode=mode)
    return model


def around(model: nn.Module, mode: str) -> nn.Module:
    return torch.compile(model, mode=mode)  # type: ignore[return-value]


COMPILED = {in_place: "the model", of_a_block: "blocks.1", of_a_forward: "blocks.1", around: "OptimizedModule around"}


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
@pytest.mark.parametrize("option", ["params", "activations"])
@pytest.mark.parametrize("compiled", COMPILED, ids=lambda compiled: compiled.__name__)
def test_modes_of_compile_that_use_graphs_are_refused(
    compiled: Callable[..., Any], option: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every forward is, until it is compiled otherwise."""
    model, optimizer = streamed(make_model(), {**RESIDENT, option: "host"})
    tokens = next(batches(1))
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    called = compiled(model, mode)
    message = rf"{COMPILED[compiled]}.*CUDA graphs.*{'weights' if option == 'params' else option} that come and go"
    for _ in range(2):
        with pytest.raises(offload.StateError, match=message):
            called(tokens)
    for name, module in model.named_modules():  # as it was
        module.__dict__.clear()
        module.__dict__.update(before[name])
    loss_of(model, tokens).backward()
    optimizer.step()
    expected = make_model()
    assert loss_of(expected, tokens).item() != loss_of(model, tokens).item()  # it was trained


def test_other_modes_and_compilers_are_taken() -> None:
    model, _ = streamed(make_model())
    model.blocks[0].compile(backend="aot_eager")
    model.blocks[1].compile(backend="eager")
    tokens = next(batches(1))
    assert loss_of(model, tokens).item() == loss_of(make_model(), tokens).item()


def test_nothing_is_asked_of_a_model_that_stays() -> None:
    for options, asks in (({**RESIDENT, "optimizer": "host"}, False), ({**RESIDENT, "activations": "host"}, True)):
        model, _ = streamed(make_model(), options)
        hooks = [repr(hook.__dict__) for hook in model._forward_pre_hooks.values()]
        assert any("CompiledGraphs" in hook for hook in hooks) == asks
