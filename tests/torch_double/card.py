"""`torch.card`: what offload and its tests use of torch.cuda, for the device of card.cpp. A plugin of pytest.

Compute is done when it is submitted, on whichever stream. The copies of the driver double beside it are as late as a
card may make them, and two uses of memory that no wait orders fail their test (driver_double/order.h).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import os
import re
import sys
import time
import types
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_double_card  # built by __main__.py
from driver_double import DriverDouble

_DEVICE_TYPE = 20  # c10::DeviceType::PrivateUse1
_BYTES = 80 << 30  # as a card tells; what is asked for comes out of the host's

# Tests, by the beginnings of their names, of what this device does not have.
_BEYOND_IT = (
    # work of torch's that is not done yet, and graphs, which record work
    "test_cuda_graphs.py::test_copies_end_while_another_model_is_captured",
    "test_stream_rules.py::test_h_our_streams_do_not_join_the_legacy_stream",
    # memory pools: that torch's allocator goes by them
    "test_unified_tensors.py::test_a_pool_takes_forward_and_backward",
    # cuDNN's recurrent layers, which cast a weight once: the cells here use it at every time, and a streamed weight
    # that autocast finds twice in a unit is cast twice
    "test_together_models.py::test_offloaded_equals_resident[card-lstm-autocast]",
)

# Tests that race by what they do, the races by their text, and why no harm comes of them.
_HARMLESS = {
    # It writes to what autograd saved, while its bytes leave: whatever was copied, backward refuses it by its version.
    "test_writing_to_what_was_saved_is_the_error": re.compile(
        r" on the default stream writes .* while a copy to_host "
    ),
}


@functools.cache
def _stream_of_driver(_: int) -> int:
    return torch_double_card.compute_stream()


class Stream(torch.Stream):
    """One of 32, as torch has them, which the driver knows; 0 is the default one."""

    _numbers = itertools.cycle(range(32))

    def __new__(cls, *_: Any, **__: Any) -> Stream:
        return cls.of(_stream_of_driver(next(cls._numbers)))

    @classmethod
    def of(cls, handle: int, *_: Any) -> Stream:
        return super().__new__(cls, stream_id=handle, device_index=0, device_type=_DEVICE_TYPE)

    @property
    def cuda_stream(self) -> int:
        return self.stream_id


def _event(**options: Any) -> torch.Event:
    return torch.Event(device="card", **options)


@contextlib.contextmanager
def _computing_on(stream: torch.Stream | None) -> Iterator[None]:
    before = torch_double_card.current_stream()
    torch_double_card.exchange_stream(before if stream is None else stream.stream_id)
    try:
        yield
    finally:
        torch_double_card.exchange_stream(before)


def _module(native: Any) -> types.ModuleType:
    module = types.ModuleType("torch.card")
    properties = types.SimpleNamespace(name="host memory", total_memory=_BYTES, uuid="0", major=9, minor=0)
    facts = {
        "is_available": True,
        "is_initialized": True,
        "is_current_stream_capturing": False,
        "is_bf16_supported": True,
        "_is_in_bad_fork": False,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": properties.name,
        "get_device_capability": (properties.major, properties.minor),
        "get_device_properties": properties,
        "mem_get_info": (_BYTES, _BYTES),
        "get_amp_supported_dtype": [torch.float16, torch.bfloat16],
        "get_rng_state_all": [],
    }
    for name, value in facts.items():
        setattr(module, name, lambda *_, value=value, **__: value)
    for name in ("init", "_lazy_init", "set_device", "empty_cache", "manual_seed", "manual_seed_all",
                 "set_rng_state", "set_per_process_memory_fraction"):  # fmt: skip
        setattr(module, name, lambda *_, **__: None)
    module.synchronize = lambda *_: _driver.synchronize()
    module.device = lambda _: contextlib.nullcontext()
    module.stream = _computing_on
    module.current_stream = lambda *_: Stream.of(native.current_stream())
    module.default_stream = lambda *_: Stream.of(0)
    module.ExternalStream = Stream.of
    module.get_rng_state = lambda *_: torch.zeros(0, dtype=torch.uint8, device="cpu")
    module.memory_allocated = module.memory_reserved = lambda *_: native.allocated_bytes()
    module.max_memory_allocated = module.max_memory_reserved = lambda *_: native.peak_bytes()
    module.reset_peak_memory_stats = lambda *_: native.reset_peak_bytes()
    module._sleep = lambda cycles: time.sleep(cycles / 1e9)
    module.Stream, module.Event = Stream, _event
    return module


def _from_dlpack(capsule: Any, given: Any = torch.utils.dlpack.from_dlpack) -> torch.Tensor:
    """As torch's; to DLPack CUDA is device 2, and a device from outside 12."""
    address = ctypes.pythonapi.PyCapsule_GetPointer
    address.restype, address.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    kind = ctypes.c_int32.from_address(address(capsule, b"dltensor") + ctypes.sizeof(ctypes.c_void_p))
    if kind.value == 2:
        kind.value = 12
    return given(capsule)


def _install() -> None:
    torch.utils.rename_privateuse1_backend("card")
    module = _module(torch_double_card)
    torch._register_device_module("card", module)
    sys.modules["torch.card"] = module
    torch.utils.generate_methods_for_privateuse1_backend()
    torch.utils.dlpack.from_dlpack = _from_dlpack


_driver = DriverDouble(Path(os.environ["OFFLOAD_CUDA_DRIVER"]))
_install()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """Copies as late as a card may make them, and every use of memory watched from setup to teardown."""
    _driver.set_late(True)
    _driver.watch(True)
    return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A race fails the phase of the test that it is found in."""
    report = yield
    count, texts = _driver.races()
    if count == 0:
        return report
    _driver.watch(True)
    known = [races for name, races in _HARMLESS.items() if name in item.nodeid]
    told = texts.splitlines()
    if count == len(told) and all(any(races.search(text) for races in known) for text in told):
        return report
    report.outcome = "failed"
    report.longrepr = f"{report.longrepr or ''}\n{count} races: nothing orders\n{texts}"
    return report


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Only what runs on this device, and can."""

    def stays(item: pytest.Item) -> bool:
        spec = getattr(item, "callspec", None)
        on_card = spec is not None and spec.params.get("device") == "card"
        return on_card and not f"{item.path.name}::{item.name}".startswith(_BEYOND_IT)

    config.hook.pytest_deselected(items=[item for item in items if not stays(item)])
    items[:] = [item for item in items if stays(item)]
