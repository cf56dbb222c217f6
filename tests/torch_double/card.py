"""`torch.card`: what offload and its tests use of torch.cuda, for the device of card.cpp. A plugin of pytest.

Compute is done when it is submitted, on the one stream there is. The copies of the driver double beside it are as late
as a card may make them, and a use of memory that no wait orders with them fails its test (driver_double/order.h).
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
import types
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from driver_double import DriverDouble
from torch.utils.cpp_extension import load

_FOLDER = os.path.dirname(os.path.abspath(__file__))
_BYTES = 80 << 30  # as a card tells; what is asked for comes out of the host's

# Tests, by parts of their names, of what this device does not have.
_BEYOND_IT = (
    # streams beside the default one, graphs, memory pools
    *("_stream_saved", "_current_stream", "_its_stream_has", "_stream_of_its_tensor", "test_g_uploads", "test_h_our"),
    *("_is_captured", "_pool_takes"),
    # LSTM cells, torch.histc of integers, sparse and conjugated tensors, outputs without elements, torch.func
    *("lstm", "recurrent", "mixtral", "sparse", "_no_update_can_use", "conjugated", "card-empty", "jacobians"),
    *("card-forward_",),
    # unified memory, which DLPack gives to CUDA alone
    "test_unified_",
    # `parameter.data = ...` from another device, which torch allows between CPU and CUDA alone; so does Module.to()
    *("test_built_on_the_cpu", "_to_the_cpu_and_back", "_goes_to_the_host_pool", "_without_an_optimizer_streams"),
    *("_tied_and_unused_parameters[card-host]", "test_frameworks.py::test_trainer", "test_frameworks.py::test_acc"),
    # fused attention, whose memory is predicted
    *("_leaves_is_about", "_byte_an_element_is_about"),
    # processes of their own, which know this device by its old name
    *("_door_is_loaded", "_fork_and_an_exit", "_one_path_has_one_process"),
)

# Tests that race by what they do, the races by their text, and why no harm comes of them.
_HARMLESS = {
    # It writes to what autograd saved, while its bytes leave: whatever was copied, backward refuses it by its version.
    "test_writing_to_what_was_saved_is_the_error": re.compile(r" on compute writes .* while a copy to_host on "),
}


class Stream:
    """The one there is: 0, the default stream of CUDA."""

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = torch.device("card", 0)

    def synchronize(self) -> None:
        _driver.host_waits_for_compute()

    def wait_stream(self, _: Stream) -> None:
        pass

    def query(self) -> bool:
        _driver.host_waits_for_compute()
        return True


class Event:
    def __init__(self, **_: Any) -> None:
        self._recorded_s = 0.0
        self._position = 0

    def record(self, _: Any = None) -> None:
        self._recorded_s = time.perf_counter()
        self._position = _driver.compute_position()

    def synchronize(self) -> None:
        _driver.host_waits(self._position)

    def query(self) -> bool:
        _driver.host_waits(self._position)
        return True

    def elapsed_time(self, end: Event) -> float:
        return (end._recorded_s - self._recorded_s) * 1e3


def _module(native: Any) -> types.ModuleType:
    module = types.ModuleType("torch.card")
    stream = Stream()
    properties = types.SimpleNamespace(name="host memory", total_memory=_BYTES, uuid="0", major=9, minor=0)
    facts = {
        "is_available": True,
        "is_initialized": True,
        "is_current_stream_capturing": False,
        "is_bf16_supported": True,
        "_is_in_bad_fork": False,
        "device_count": 1,
        "current_device": 0,
        "current_stream": stream,
        "default_stream": stream,
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
    module.device = module.stream = lambda _: contextlib.nullcontext()
    module.get_rng_state = lambda *_: torch.zeros(0, dtype=torch.uint8, device="cpu")
    module.memory_allocated = module.memory_reserved = lambda *_: native.allocated_bytes()
    module.max_memory_allocated = module.max_memory_reserved = lambda *_: native.peak_bytes()
    module.reset_peak_memory_stats = lambda *_: native.reset_peak_bytes()
    module._sleep = lambda cycles: time.sleep(cycles / 1e9)
    module.Stream, module.Event = Stream, Event
    return module


def _install() -> None:
    torch.utils.rename_privateuse1_backend("card")
    built = os.environ["TORCH_DOUBLE_BUILD"]
    native = load("torch_double_card", [os.path.join(_FOLDER, "card.cpp")], build_directory=built, extra_cflags=["-O1"])
    module = _module(native)
    torch._register_device_module("card", module)
    sys.modules["torch.card"] = module
    torch.utils.generate_methods_for_privateuse1_backend()


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
        return on_card and not any(name in item.nodeid for name in _BEYOND_IT)

    config.hook.pytest_deselected(items=[item for item in items if not stays(item)])
    items[:] = [item for item in items if stays(item)]
