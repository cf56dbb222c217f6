"""A small training with one fault in it, and what became of it: the runner behind test_faults.py.

The training goes on as a user's would: a step that raised is repeated from its start, and when that is refused, what
can be saved is saved and everything is dropped. Runs in a child process, because a lost CUDA context is lost for the
process: `run_batch` is its main function.
"""

from __future__ import annotations

import contextlib
import gc
import os
import time
import warnings
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from driver_double import DriverDouble
from torch import Tensor, nn

import offload
from offload import _copy_lanes, _engine, _native
from training import HOST, batches, loss_of, make_model, same_bits
from what_lives import collect, threads

STEPS = 3
MICRO_BATCHES = 2
_TINY = {"vocabulary": 16, "width": 8, "depth": 1}
# Refused so often, nothing changes any more.
_ATTEMPTS = 3
# What is given back late is given back long before.
_LATE_SECONDS = 20.0
_LANE_THREADS = ("offload-to_host", "offload-to_dev", "offload-step")


@dataclass(frozen=True)
class Fault:
    """What goes wrong: `control(*arguments)` of the scene, of the double or of the HostDevice, as `phase` begins."""

    control: str
    arguments: tuple[Any, ...]
    phase: str = "load"
    step: int = 1

    def __str__(self) -> str:
        return f"{self.control}{self.arguments} at {self.phase}"


@dataclass
class Outcome:
    """`end`: "not wrapped", "went on" or "refused". `problems` is empty when every rule was kept."""

    end: str = "not wrapped"
    errors: list[tuple[str, str, str]] = field(default_factory=list)  # (phase, type, message)
    pageable: str = ""  # the reason that stats gave
    warned: bool = False
    readable: int = 0  # parameters that could be saved, of `parameters`
    parameters: int = 0
    leaked: dict[str, int] = field(default_factory=dict)  # by what the double counts
    problems: list[str] = field(default_factory=list)

    @property
    def first_error(self) -> str:
        return self.errors[0][1] if self.errors else ""


class Scene:
    """One training on `device_kind` ("cuda": the double) with `fault` in it."""

    def __init__(self, double: DriverDouble, fault: Fault | None, device_kind: str) -> None:
        self.double = double
        self.fault = fault
        self.device_kind = device_kind
        self.device: Any = None
        self.driver_path = double.path
        self.index = 0
        self.budget = "1MiB"  # pages are touched as they are obtained: a few make a test quick
        self.eaten: list[Any] = []
        self.phase = ""
        self.losses: list[float] = []
        self.snapshots: list[dict[str, Tensor]] = []
        self.model: nn.Module | None = None
        self.optimizer: Any = None

    def enter(self, phase: str, step: int = 1) -> None:
        self.phase = phase
        fault = self.fault
        if fault is None or fault.phase != phase or fault.step != step:
            return
        self.fault = None
        for owner in (self, self.double if self.device_kind == "cuda" else self.device):
            if hasattr(owner, fault.control):
                getattr(owner, fault.control)(*fault.arguments)
                return
        raise AssertionError(f"nobody has the control {fault.control}")

    # --- controls of the scene ------------------------------------------------------------------------------

    def set_driver(self, path: str) -> None:
        self.driver_path = path

    def set_index(self, index: int) -> None:
        self.index = index

    def set_budget(self, budget: str) -> None:
        self.budget = budget

    def eat_host_memory(self) -> None:
        """Takes what is left of the host budget, until the step is repeated."""
        pool = self.optimizer._engine.pool
        for power in range(20, 7, -1):  # from the whole budget down to the smallest block
            with contextlib.suppress(offload.OutOfHostMemory):
                while True:
                    self.eaten.append(pool.acquire(1 << power, "staging"))

    def grow_unpinned(self) -> None:
        """The pool needs pages that it does not have yet, and the driver refuses to register them."""
        self.double.fail("cuMemHostRegister_v2", 1, 2)  # CUDA_ERROR_OUT_OF_MEMORY
        pool = self.optimizer._engine.pool
        self.eaten.append(pool.acquire(pool.stats()["mapped_bytes"], "staging"))

    def lose_context(self) -> None:
        """The device fails in a copy that is none of the training's."""
        self.double.fail_copy("to_host", 1, 700)  # CUDA_ERROR_ILLEGAL_ADDRESS
        source, destination = torch.zeros(4), torch.zeros(4)
        ticket = self.optimizer._engine.transfers.submit_to_host(destination.data_ptr(), source.data_ptr(), 16)
        with contextlib.suppress(offload.DeviceError):
            ticket.wait()

    # --- the training ---------------------------------------------------------------------------------------

    def open_device(self, _: torch.device) -> _native.Device:
        if self.device_kind == "host":
            self.device = _native.HostDevice()
        else:
            self.device = _native.CudaDevice(self.index, driver_path=self.driver_path)
        self.enter("opened")
        return self.device

    def wrap(self) -> None:
        model = make_model(**_TINY)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        _copy_lanes._SMALL_BYTES = 0  # a submission for each gradient, as a large model has
        self.enter("load")
        self.model, self.optimizer = offload.wrap(
            model, optimizer, **HOST, device="cpu", pin=True, host_budget=self.budget
        )

    def train_step(self, step: int) -> None:
        assert self.model is not None
        data = list(batches(STEPS * MICRO_BATCHES, vocabulary=16))[step * MICRO_BATCHES :][:MICRO_BATCHES]
        losses = []
        self.eaten.clear()
        self.optimizer.zero_grad()
        for number, tokens in enumerate(data):
            self.enter("forward" if number == 0 else "second forward", step)
            loss = loss_of(self.model, tokens) / MICRO_BATCHES
            self.enter("backward" if number == 0 else "accumulation", step)
            loss.backward()
            losses.append(loss.item())
        self.enter("clip", step)
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
        self.enter("step", step)
        self.optimizer.step()
        self.losses += losses

    def save_and_load(self) -> None:
        """What is loaded equals what is there, so training is not changed by it."""
        self.optimizer.synchronize()
        self.enter("state_dict")
        saved = self.optimizer.state_dict()
        self.enter("load_state_dict")
        self.optimizer.load_state_dict(saved)

    def unwrap(self) -> None:
        self.enter("unwrap")
        assert self.model is not None
        offload.unwrap(self.model, self.optimizer)

    def drop(self) -> None:
        self.enter("drop")
        self.model = self.optimizer = self.device = None
        self.eaten.clear()
        collect()


def _values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


class Reference:
    """The same training without a fault on HostDevice: the loss of every batch, the weights after every step."""

    def __init__(self, double: DriverDouble) -> None:
        scene = Scene(double, None, "host")
        _engine.open_device = scene.open_device
        scene.wrap()
        self.weights = [_values(scene.model)]
        for step in range(STEPS):
            scene.train_step(step)
            self.weights.append(_values(scene.model))
        self.losses = scene.losses
        scene.drop()


def run_fault(
    double: DriverDouble,
    reference: Reference,
    fault: Fault | None,
    device_kind: str = "cuda",
    may_leak: Collection[str] = (),
) -> Outcome:
    """Trains with `fault`, drops everything, and tells what became of it."""
    double.reset()
    before = {what: double.live(what) for what in _LIVE}
    outcome = Outcome()
    scene = Scene(double, fault, device_kind)
    _engine.open_device = scene.open_device
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _train(scene, reference, outcome)
        if scene.fault is not None and outcome.end != "not wrapped" and scene.fault.phase != "drop":
            outcome.problems.append(f"the fault was never armed: {scene.fault}")
        _try(scene, outcome, scene.drop)
    outcome.warned = any("pageable" in str(warning.message) for warning in caught)
    _check_released(double, before, outcome, may_leak)
    return outcome


_LIVE = ("contexts", "streams", "events", "registrations", "pending_copies", "pushed_contexts")


def _try(scene: Scene, outcome: Outcome, action: Callable[[], None]) -> bool:
    """Runs `action`; any error must be one of ours."""
    try:
        action()
    except offload.OffloadError as error:
        # Without its frames, which keep the engine alive.
        outcome.errors.append((scene.phase, type(error).__name__, str(error)))
        error.__traceback__ = None
        return False
    except Exception as error:
        outcome.errors.append((scene.phase, type(error).__name__, str(error)))
        outcome.problems.append(f"{scene.phase} raised {type(error).__name__}, no OffloadError: {error}")
        return False
    return True


def _train(scene: Scene, reference: Reference, outcome: Outcome) -> None:
    if not _try(scene, outcome, scene.wrap):
        return
    assert scene.model is not None
    step, refusals = 0, 0
    while step < STEPS and refusals < _ATTEMPTS:
        if _try(scene, outcome, lambda step=step: scene.train_step(step)):
            step, refusals = step + 1, 0
        else:
            refusals += 1
    reason = scene.optimizer.stats().pageable_reason
    outcome.pageable = reason or ""
    if step == STEPS:
        _try(scene, outcome, scene.save_and_load)
    went_on = step == STEPS and _try(scene, outcome, scene.optimizer.synchronize)
    outcome.end = "went on" if went_on else "refused"
    if not went_on and outcome.errors[-1][1] not in ("StateError", "DeviceError"):
        outcome.problems.append(f"refused with {outcome.errors[-1]}")
    _check_values(scene.model, reference, outcome, went_on)
    if went_on and scene.losses != reference.losses:
        outcome.problems.append("went on with other losses")
    if _try(scene, outcome, scene.unwrap) and went_on:
        _check_values(scene.model, reference, outcome, went_on)


def _check_values(model: nn.Module, reference: Reference, outcome: Outcome, went_on: bool) -> None:
    """A parameter can be read, with the value of some step (of the last one if training went on), or refuses."""
    outcome.readable = outcome.parameters = 0
    for name, parameter in model.named_parameters():
        outcome.parameters += 1
        try:
            value = parameter.detach().clone()
        except offload.OffloadError:
            continue
        outcome.readable += 1
        legal = reference.weights[-1:] if went_on else reference.weights
        if not any(same_bits(value, weights[name]) for weights in legal):
            outcome.problems.append(f"{name} has a value of no step (NaN: {bool(value.isnan().any())})")
    if went_on and outcome.readable < outcome.parameters:
        outcome.problems.append("went on with weights that cannot be read")
    try:
        model.state_dict()
    except offload.OffloadError:
        if outcome.readable == outcome.parameters:
            outcome.problems.append("state_dict() refuses readable weights")


def _check_released(double: DriverDouble, before: dict[str, int], outcome: Outcome, may_leak: Collection[str]) -> None:
    def late() -> bool:
        return bool(threads(*_LANE_THREADS)) or any(
            double.live(what) != before[what] for what in _LIVE if what not in may_leak
        )

    # Pages that a copy still used when their pool died are freed when another one dies.
    deadline = time.monotonic() + _LATE_SECONDS
    while late() and time.monotonic() < deadline:
        _native.HostPool(slab_bytes=1 << 20)
        os.sched_yield()
    for what in _LIVE:
        if double.live(what) != before[what]:
            outcome.leaked[what] = double.live(what) - before[what]
    if double.misuses()[0]:
        outcome.problems.append(f"broke a rule of the driver: {double.misuses()}")
    if left := threads(*_LANE_THREADS):
        outcome.problems.append(f"threads live on: {left}")


def _begin(library: str) -> tuple[DriverDouble, Reference]:
    torch.set_num_threads(1)
    gc.freeze()  # what is imported never goes: collections need not look at it
    double = DriverDouble(Path(library))
    return double, Reference(double)


def run_batch(
    library: str, faults: Iterable[tuple[Fault | None, Collection[str]]], device_kind: str, connection: Connection
) -> None:
    """The main function of a child process: sends one outcome a fault, with what it may leak."""
    double, reference = _begin(library)
    for fault, may_leak in faults:
        connection.send(run_fault(double, reference, fault, device_kind, may_leak))
    connection.close()


def count_calls(library: str, entries: Iterable[str], connection: Connection) -> None:
    """The main function of a child process: sends how often a training without a fault calls each entry."""
    double, reference = _begin(library)
    outcome = run_fault(double, reference, None)
    connection.send((outcome, {entry: double.calls(entry) for entry in entries}))
    connection.close()


_CALLED_UNTIL_THE_END = (
    "cuCtxPushCurrent_v2", "cuStreamWaitEvent", "cuStreamDestroy_v2", "cuEventRecord", "cuEventSynchronize",
    "cuEventDestroy_v2", "cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2", "cuMemHostUnregister",
    "cuDevicePrimaryCtxRelease_v2",
)  # fmt: skip


def leave(library: str, what: str) -> None:
    """Ends the process, here as it returns, with a wrapped model alive and `what`."""
    torch.set_num_threads(1)
    double = DriverDouble(Path(library))
    scene = Scene(double, None, "cuda")
    _engine.open_device = scene.open_device
    scene.wrap()
    for step in range(STEPS):
        scene.train_step(step)
    if "in flight" not in what:
        scene.optimizer.synchronize()
    print(f"trained {STEPS} steps", flush=True)
    if "context lost" in what:
        scene.lose_context()
    if what == "lanes held":
        double.hold("to_host")
        double.hold("to_device")
        scene.optimizer.zero_grad()
        loss_of(scene.model, next(batches(1, vocabulary=16))).backward()
    if what == "driver refuses all":
        for entry in _CALLED_UNTIL_THE_END:
            double.fail(entry, 1, 999, lasting=True)  # CUDA_ERROR_UNKNOWN
    # As a user's program has it.
    global model, optimizer
    model, optimizer = scene.model, scene.optimizer
