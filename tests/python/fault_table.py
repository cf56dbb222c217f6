"""The faults of test_faults.py: what is injected where, and what must come of it."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from faulty_training import Fault

# Codes of cuda.h.
OUT_OF_MEMORY, DEVICE_UNAVAILABLE, NO_DEVICE = 2, 46, 100
OPERATING_SYSTEM, ILLEGAL_ADDRESS, ECC_UNCORRECTABLE, LAUNCH_FAILED = 304, 700, 214, 719
NOT_PERMITTED, NOT_SUPPORTED, DRIVER_MISMATCH, UNKNOWN = 800, 801, 803, 999

REGISTER, UNREGISTER = "cuMemHostRegister_v2", "cuMemHostUnregister"
TO_HOST, TO_DEVICE = "cuMemcpyDtoHAsync_v2", "cuMemcpyHtoDAsync_v2"
CREATE_STREAM, CREATE_EVENT = "cuStreamCreateWithPriority", "cuEventCreate"
RECORD, SYNCHRONIZE, WAIT_EVENT = "cuEventRecord", "cuEventSynchronize", "cuStreamWaitEvent"


# What must become of the training, and the ends that allows. Where a fault hits depends on how far the lanes' threads
# have come, so some cases may end both ways.
ENDS = {
    "not wrapped": ("not wrapped",),
    "pageable": ("went on",),  # stats and a warning say why
    "pageable later": ("went on",),  # stats say why
    "went on": ("went on",),
    "refused": ("refused",),
    "goes on or refuses": ("went on", "refused"),
    "any": ("not wrapped", "went on", "refused"),
}


class Case(NamedTuple):
    name: str
    fault: Fault | None
    end: str  # of ENDS
    error: str = ""  # the type of the first error; "" if none is raised, "-" if one may be
    may_leak: tuple[str, ...] = ()  # of what the double counts


def _fails(entry: str, code: int, nth: int = 1, *, lasting: bool = False) -> tuple[str, tuple[Any, ...]]:
    return "fail", (entry, nth, code, lasting)


def _at(phase: str, control: tuple[str, tuple[Any, ...]], step: int = 1) -> Fault:
    return Fault(*control, phase=phase, step=step)


def driver_cases() -> list[Case]:
    """Faults of the driver as it is loaded."""
    load = [
        ("driver absent", ("set_driver", ("/nonexistent/libcuda.so.1",))),
        ("driver is no library", ("set_driver", (__file__,))),
        ("driver lacks every entry", ("set_driver", ("libm.so.6",))),
        ("driver too old", ("set_version", (11070,))),
        ("driver tells no version", _fails("cuDriverGetVersion", UNKNOWN, lasting=True)),
        ("cuInit refuses", _fails("cuInit", UNKNOWN)),
        ("cuInit finds another kernel module", _fails("cuInit", DRIVER_MISMATCH)),
        ("no device", ("set_device_count", (0,))),
        ("devices cannot be counted", _fails("cuDeviceGetCount", UNKNOWN)),
        ("wrong index", ("set_index", (5,))),
        ("device cannot be had", _fails("cuDeviceGet", UNKNOWN)),
        ("device lost at retain", _fails("cuDevicePrimaryCtxRetain", DEVICE_UNAVAILABLE)),
    ]
    return [Case(name, _at("load", control), "not wrapped", "DeviceError") for name, control in load]


def cuda_cases() -> list[Case]:
    wrap = [
        ("no stream", _fails(CREATE_STREAM, OUT_OF_MEMORY)),
        ("no second stream", _fails(CREATE_STREAM, OUT_OF_MEMORY, 2)),
        ("no priorities", _fails("cuCtxGetStreamPriorityRange", UNKNOWN)),
        ("no context to push", _fails("cuCtxPushCurrent_v2", UNKNOWN)),
    ]
    registration = [
        ("nobody knows about pinning", _fails("cuDeviceGetAttribute", UNKNOWN, lasting=True)),
        ("memory beyond memlock", _fails(REGISTER, OUT_OF_MEMORY, lasting=True)),
        ("registration not permitted", _fails(REGISTER, NOT_PERMITTED, lasting=True)),
        ("registration not supported", _fails(REGISTER, NOT_SUPPORTED, lasting=True)),
        ("registration refused by the system", _fails(REGISTER, OPERATING_SYSTEM, lasting=True)),
        ("registration refused once", _fails(REGISTER, OUT_OF_MEMORY)),
    ]
    refused = {
        "backward": (TO_HOST, RECORD, WAIT_EVENT),
        "accumulation": (TO_HOST, TO_DEVICE, RECORD, WAIT_EVENT),
        "clip": (TO_HOST,),
        "step": (TO_DEVICE, RECORD),
    }
    awaited = ("backward", "accumulation", "step", "forward")
    running = [
        ("backward", "to_host", ILLEGAL_ADDRESS, 1),
        ("backward", "to_host", ECC_UNCORRECTABLE, 4),
        ("accumulation", "to_host", ILLEGAL_ADDRESS, 1),
        ("accumulation", "to_device", ILLEGAL_ADDRESS, 1),
        ("clip", "to_host", LAUNCH_FAILED, 1),
        ("step", "to_device", ILLEGAL_ADDRESS, 1),
        ("step", "to_device", LAUNCH_FAILED, 4),
    ]
    lost = ("backward", "accumulation", "clip", "step", "forward", "state_dict", "load_state_dict", "unwrap")
    return [
        *(Case(name, _at("load", control), "not wrapped", "DeviceError") for name, control in wrap),
        *(Case(name, _at("load", control), "pageable") for name, control in registration),
        Case("later registration refused", _at("forward", ("grow_unpinned", ()), 0), "pageable later"),
        Case("no event", _at("backward", _fails(CREATE_EVENT, OUT_OF_MEMORY), 0), "goes on or refuses", "DeviceError"),
        *(
            Case(f"{entry} refused in {phase}", _at(phase, _fails(entry, UNKNOWN)), "goes on or refuses", "DeviceError")
            for phase, entries in refused.items()
            for entry in entries
        ),
        *(
            Case(
                f"{SYNCHRONIZE} refused in {phase}",
                _at(phase, _fails(SYNCHRONIZE, UNKNOWN)),
                "goes on or refuses",
                "-",
            )
            for phase in awaited
        ),
        *(
            Case(
                f"copy {nth} {direction} fails while it runs in {phase}",
                _at(phase, ("fail_copy", (direction, nth, code))),
                "refused",
                "DeviceError",
            )
            for phase, direction, code, nth in running
        ),
        *(
            Case(
                f"context lost before {phase}",
                _at(phase, ("lose_context", ())),
                "went on" if phase in _AFTER_TRAINING else "refused",
                "DeviceError",
            )
            for phase in lost
        ),
    ]


# The weights have come home: only what needs the device is refused.
_AFTER_TRAINING = ("state_dict", "load_state_dict", "unwrap")


# What the driver refuses to take back is leaked, and no more; without a context nothing can be given back.
GIVE_BACK = {
    UNREGISTER: ("registrations",),
    "cuStreamDestroy_v2": ("streams",),
    "cuEventDestroy_v2": ("events",),
    "cuDevicePrimaryCtxRelease_v2": ("contexts",),
    "cuCtxPopCurrent_v2": ("pushed_contexts",),
    "cuCtxPushCurrent_v2": ("registrations", "streams", "events"),
}


def give_back_cases() -> list[Case]:
    """The driver refuses to take something back at the end."""
    entries = [entry for entry in GIVE_BACK if "CtxP" not in entry]
    return [
        Case(f"{entry} refused", _at("unwrap", _fails(entry, UNKNOWN)), "went on", "", GIVE_BACK[entry])
        for entry in entries
    ]


# --- the sweep --------------------------------------------------------------------------------------------

# So many calls of an entry are chosen, if it has as many: the first, the last, some between. In each training one of
# them fails.
POINTS = int(os.environ.get("OFFLOAD_FAULT_POINTS", "8"))
# How often these are called depends on how far the lanes' threads have come: what there is at least.
VARYING = {CREATE_EVENT: 4, "cuEventDestroy_v2": 4, "cuDeviceGetAttribute": 1, REGISTER: 1, UNREGISTER: 1}

# Called while the driver is loaded, which happens once a process.
LOAD_ENTRIES = ("cuInit", "cuDriverGetVersion", "cuGetProcAddress_v2")
OTHER_ENTRIES = (
    "cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetAttribute", "cuDevicePrimaryCtxRetain",
    "cuCtxGetStreamPriorityRange", CREATE_STREAM, REGISTER, CREATE_EVENT, RECORD, SYNCHRONIZE, WAIT_EVENT,
    TO_HOST, TO_DEVICE,
)  # fmt: skip
SWEPT_ENTRIES = (*LOAD_ENTRIES, *OTHER_ENTRIES, *GIVE_BACK)


def sweep(entry: str, calls: int) -> list[Case]:
    """Trainings in which one of the `calls` calls of `entry` fails, counted from the opening of the device."""
    # Of those that vary as many are tried as the training may make, however few this one made.
    calls = max(calls, VARYING.get(entry, 1))
    count = min(calls, VARYING.get(entry, POINTS))
    last = max(count - 1, 1)
    return [
        Case(
            f"call {nth} of {entry}",
            _at("load", _fails(entry, UNKNOWN, nth)),
            "any",
            "-",
            GIVE_BACK.get(entry, ()),
        )
        for nth in sorted({1 + point * (calls - 1) // last for point in range(count)})
    ]


def host_cases() -> list[Case]:
    """The same rules on HostDevice and the pool."""
    copies = [
        ("backward", "to_host"),
        ("accumulation", "to_host"),
        ("accumulation", "to_device"),
        ("clip", "to_host"),
        ("step", "to_device"),
    ]
    return [
        Case("pin refused", _at("opened", ("fail_pin", (1,))), "pageable"),
        Case("budget too small", _at("load", ("set_budget", ("4KiB",))), "not wrapped", "OutOfHostMemory"),
        Case("no host memory for a gradient", _at("backward", ("eat_host_memory", ())), "went on", "OutOfHostMemory"),
        Case("no host memory for a sum", _at("accumulation", ("eat_host_memory", ())), "went on", "OutOfHostMemory"),
        *(
            Case(
                f"copy {direction} fails in {phase}",
                _at(phase, ("fail_copy", (direction, 1))),
                "goes on or refuses",
                "DeviceError",
            )
            for phase, direction in copies
        ),
    ]
