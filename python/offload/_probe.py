"""Facts of this machine: host facts from /proc, /sys and cgroups, device facts from torch on demand."""

from __future__ import annotations

import dataclasses
import os
import resource
from pathlib import Path
from typing import TYPE_CHECKING

from ._errors import DeviceError, InvalidArgument

if TYPE_CHECKING:
    import torch

__all__ = ["DeviceFacts", "HostFacts", "named_device", "probe_device", "probe_host", "probe_process"]


@dataclasses.dataclass(frozen=True)
class HostFacts:
    """What the host offers this process; None where the system does not say.

    available_bytes is the smaller of MemAvailable and what the cgroup limit leaves. cpu_count obeys the
    affinity mask; cpu_quota is the cgroup's, in CPUs. huge_pages is the transparent huge page setting.
    memlock_bytes None means unlimited.
    """

    total_bytes: int
    available_bytes: int
    cgroup_limit_bytes: int | None
    cpu_count: int
    cpu_quota: float | None
    numa_node_count: int
    huge_pages: str | None
    memlock_bytes: int | None


@dataclasses.dataclass(frozen=True)
class DeviceFacts:
    """One compute device: torch's name and kind, bytes in all and free; what torch caches and nobody uses is free."""

    name: str
    kind: str
    total_bytes: int
    free_bytes: int


def probe_host(root: Path = Path("/")) -> HostFacts:
    """Facts of the host as seen by this process. `root` lets tests stand in a tree of their own."""
    memory = _meminfo(root / "proc/meminfo")
    available = memory.get("MemAvailable", memory.get("MemFree", 0))
    limit, used = _cgroup_memory(root)
    if limit is not None:
        available = min(available, max(0, limit - used))
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return HostFacts(
        total_bytes=memory.get("MemTotal", 0),
        available_bytes=available,
        cgroup_limit_bytes=limit,
        cpu_count=len(os.sched_getaffinity(0)),
        cpu_quota=_cgroup_quota(root),
        numa_node_count=max(1, len(list((root / "sys/devices/system/node").glob("node[0-9]*")))),
        huge_pages=_selected(_read(root / "sys/kernel/mm/transparent_hugepage/enabled")),
        memlock_bytes=None if soft == resource.RLIM_INFINITY else soft,
    )


def probe_process(root: Path = Path("/")) -> dict[str, int]:
    """Bytes of this process in memory, now (`resident`) and at most (`peak_resident`); 0 where the system says none."""
    status = _meminfo(root / "proc/self/status")
    resident = status.get("VmRSS", 0)
    return {"resident": resident, "peak_resident": max(resident, status.get("VmHWM", 0))}


def named_device(name: str | torch.device) -> torch.device:
    """The device of an option `device=`: the CPU, or a CUDA device with its index. Raises InvalidArgument for others
    and for one that is not here."""
    import torch

    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise InvalidArgument(f"device={name!r} is no device that torch knows: {error}") from error
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if device.type not in ("cpu", "cuda") or (device.index or 0) >= count:
        raise InvalidArgument(
            f"device={name!r}: there is no such device here; legal are 'cpu'"
            + "".join(f", 'cuda:{index}'" for index in range(torch.cuda.device_count()))
        )
    if device.type == "cpu":
        return torch.device("cpu")  # as its tensors say: none would be found to lie on "cpu:0"
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


def probe_device(name: str | None = None) -> DeviceFacts:
    """Facts of the device that torch calls `name`; None takes the accelerator, or the CPU without one.

    A CPU device has the host's memory. Raises DeviceError for a device that torch cannot reach. Probing
    an accelerator makes its context in this process.
    """
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"device {name!r} is not a torch device: {error}") from error
    if device.type == "cpu":
        host = probe_host()
        return DeviceFacts("cpu", "cpu", host.total_bytes, host.available_bytes)
    if device.type != "cuda":
        raise DeviceError(f"device {name!r} is not supported: use 'cuda', 'cuda:N' or 'cpu'")
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise DeviceError(f"device {name!r} does not exist: torch sees {count} CUDA devices")
    index = torch.cuda.current_device() if device.index is None else device.index
    free, total = torch.cuda.mem_get_info(index)
    cached = torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)
    return DeviceFacts(f"cuda:{index}", "cuda", total, free + cached)


def _meminfo(path: Path) -> dict[str, int]:
    """Bytes by name; the kernel writes kB and means KiB."""
    facts = {}
    for line in _read(path).splitlines():
        name, _, value = line.partition(":")
        number = value.split()
        if number and number[0].isdigit():
            facts[name] = int(number[0]) * 1024
    return facts


def _cgroup_folders(root: Path, controller: str) -> list[Path]:
    """Our cgroup of `controller` and its ancestors, innermost first: each may limit us."""
    folders = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            mount = root / "sys/fs/cgroup" / controllers
            mount = mount if mount.is_dir() else root / "sys/fs/cgroup" / controller
        else:
            continue
        inner = mount / path.strip("/")
        while inner != mount:
            folders.append(inner)
            inner = inner.parent
        folders.append(mount)  # also where a container sees its own group when its path is hidden
    return folders


def _cgroup_memory(root: Path) -> tuple[int | None, int]:
    """The tightest memory limit in bytes and what is used under it, page cache that can go taken off."""
    tightest: tuple[int | None, int] = (None, 0)
    for folder in _cgroup_folders(root, "memory"):
        limit = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes")
        # v1 writes "no limit" as a huge number just under 2**63.
        if limit is None or limit >= 2**60:
            continue
        used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes") or 0
        reclaimable = _stat(folder / "memory.stat", ("inactive_file", "total_inactive_file"))
        used = max(0, used - reclaimable)
        if tightest[0] is None or limit - used < tightest[0] - tightest[1]:
            tightest = (limit, used)
    return tightest


def _cgroup_quota(root: Path) -> float | None:
    quotas = []
    for folder in _cgroup_folders(root, "cpu"):
        parts = _read(folder / "cpu.max").split()
        if len(parts) == 2 and parts[0].isdigit():
            quotas.append(int(parts[0]) / int(parts[1]))
        quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        if quota and period:
            quotas.append(quota / period)
    return min(quotas, default=None)


def _stat(path: Path, names: tuple[str, ...]) -> int:
    values = dict(line.split(maxsplit=1) for line in _read(path).splitlines() if " " in line)
    return max((int(values[name]) for name in names if name in values), default=0)


def _number(path: Path) -> int | None:
    """The file's non-negative number; None for "max", -1 and files that are not there."""
    text = _read(path).strip()
    return int(text) if text.isdigit() else None


def _selected(text: str) -> str | None:
    """The bracketed word of a sysfs choice: `always [madvise] never`."""
    _, _, rest = text.partition("[")
    return rest.partition("]")[0] or None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""  # older kernels, other cgroup versions and containers leave files out
