"""What this machine gives, what it withholds, and the remedy for that: `offload.environment()` and `offload env`."""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import _native
from ._config import format_size
from ._disk import probe_disk
from ._probe import probe_device, probe_host

if TYPE_CHECKING:
    import torch

__all__ = ["Finding", "environment", "findings"]

_COPY_BYTES = 64 << 20
_COPIES = 5


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something that makes training slower or impossible here: what it is, and what to do."""

    subject: str
    problem: str
    remedy: str


def environment(disk_paths: Iterable[str | os.PathLike[str]] = (), *, measure: bool = False) -> dict[str, Any]:
    """What offload finds on this machine, ready for JSON; it names no user and no host, to be pasted into a report.

    versions: of offload, python, torch, the CUDA that torch was built for, the driver and the kernel; None for what is
    not there. host, device: as `HostFacts` and `DeviceFacts`. gpus: what torch sees, each with the kind of its memory
    and its PCIe link. memory: the facts of `offload.unified.classify` and their `meaning`; None where the device is the
    CPU. isa: of the host update, out of the isas that this CPU and build have, and isa_forced by OFFLOAD_FORCE_ISA.
    kernel_refusal: why states on the device are updated by separate torch operations; None where kernels do it.
    uring_refusal: why the disk tier would do without io_uring. disks: by path. copies: with `measure`, GB/s (1e9 bytes)
    of copies of 64 MiB between host and device, and why the host's memory could not be page-locked; takes about 0.1 s.
    findings: what could be better.

    A directory of `disk_paths` is opened as training would open it: raises StorageError for one that cannot be used.
    """
    import torch

    from ._kernels import find_kernels
    from ._unified import classify

    device = probe_device()
    memory = classify(device.name) if device.kind == "cuda" else None
    facts: dict[str, Any] = {
        "versions": _versions(),
        "host": dataclasses.asdict(probe_host()),
        "device": dataclasses.asdict(device),
        "gpus": list(_gpus()),
        "memory": None if memory is None else {**dataclasses.asdict(memory), "meaning": memory.meaning},
        "isa": _native.active_isa(),
        "isas": _native.available_isas(),
        "isa_forced": os.environ.get("OFFLOAD_FORCE_ISA"),
        "poison": os.environ.get("OFFLOAD_POISON", "0") not in ("", "0"),
        "kernel_refusal": find_kernels(torch.device(device.name)).refusal,
        "uring_refusal": _native.uring_refusal() or None,
        "disks": [dataclasses.asdict(probe_disk(path)) for path in disk_paths],
        "copies": _measured_copies(torch.device(device.name)) if measure else None,
    }
    return {**facts, "findings": [dataclasses.asdict(finding) for finding in findings(facts)]}


def findings(facts: Mapping[str, Any]) -> list[Finding]:
    """What stands in the way of speed or of training at all, by the facts of `environment`."""
    return [*_of_the_accelerator(facts), *_of_the_host(facts), *_of_disks(facts)]


def _of_the_accelerator(facts: Mapping[str, Any]) -> Iterator[Finding]:
    versions = facts["versions"]
    if facts["device"]["kind"] == "cpu":
        if versions["driver"] is None:
            problem = "no NVIDIA driver is loaded: the CPU computes, and offloading saves no memory"
            remedy = "`nvidia-smi` must list the card; a container needs `docker run --gpus all`"
        elif versions["cuda"] is None:
            problem = f"torch {versions['torch']} is built without CUDA, and this machine has an NVIDIA driver"
            remedy = "install torch from the index that pytorch.org names for CUDA"
        else:
            problem = "torch sees no CUDA device, though the NVIDIA driver is loaded"
            remedy = "look at CUDA_VISIBLE_DEVICES, and whether the driver is new enough for torch's CUDA"
        yield Finding("accelerator", problem, remedy)
    elif facts["kernel_refusal"] is not None:
        from ._kernels import how_to_install

        problem = f"states on the device are updated by separate torch operations: {facts['kernel_refusal']}"
        yield Finding("kernels", problem, how_to_install(versions["cuda"]))
    for gpu in facts["gpus"]:
        link = gpu["link"]
        if link is not None and link["width"] < link["max_width"]:
            yield Finding(
                "link",
                f"{gpu['name']} has {link['width']} PCIe lanes of {link['max_width']}",
                "another slot, a card that shares its lanes with this one, or the firmware's bifurcation",
            )
    copies = facts["copies"]
    if copies is not None and copies["pin_refusal"] is not None:
        yield Finding(
            "page-locked memory",
            f"copies are slower and not hidden: {copies['pin_refusal']}",
            "`ulimit -l unlimited`, `docker run --ulimit memlock=-1`, `LimitMEMLOCK=infinity` of a systemd unit, or "
            "`memory=` in .wslconfig",
        )


def _of_the_host(facts: Mapping[str, Any]) -> Iterator[Finding]:
    host = facts["host"]
    limit = host["cgroup_limit_bytes"]
    if limit is not None and limit < host["total_bytes"]:
        yield Finding(
            "host memory",
            f"this container or service may use {format_size(limit)} of the machine's "
            f"{format_size(host['total_bytes'])}",
            "`docker run --memory`, a pod's memory limit, or `MemoryMax=` of a systemd unit",
        )
    quota = host["cpu_quota"]
    if quota is not None and quota < host["cpu_count"]:
        yield Finding(
            "CPUs",
            f"the host update has the time of {quota:g} of {host['cpu_count']} CPUs",
            "`docker run --cpus`, a pod's cpu limit, or `CPUQuota=` of a systemd unit",
        )
    if host["huge_pages"] == "never":
        yield Finding(
            "huge pages",
            "host memory comes in small pages: mapping and page-locking it takes several times as long",
            "`echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled`",
        )
    if facts["isa_forced"]:
        problem = f"OFFLOAD_FORCE_ISA={facts['isa_forced']} chose the body of the host update"
        yield Finding("instruction set", problem, "`unset OFFLOAD_FORCE_ISA`; the bits are the same on each")
    elif facts["isa"] == "scalar" and facts["versions"]["machine"] == "x86_64":
        problem = "the CPU, or the virtual machine, has no AVX2: the host update is several times slower"
        yield Finding("instruction set", problem, "a CPU model that passes AVX2 on, such as `-cpu host` of QEMU")
    if facts["poison"]:
        yield Finding("OFFLOAD_POISON", "memory is filled with NaN, which takes time", "`unset OFFLOAD_POISON`")


def _of_disks(facts: Mapping[str, Any]) -> Iterator[Finding]:
    if facts["uring_refusal"] is not None:
        yield Finding(
            "io_uring",
            f"the disk tier would take threads, a little slower: {facts['uring_refusal']}",
            "`docker run --security-opt seccomp=...` with a profile that allows io_uring, or "
            "`sysctl -w kernel.io_uring_disabled=0`",
        )
    for disk in facts["disks"]:
        if disk["uring_refusal"] is not None and facts["uring_refusal"] is None:
            problem = f"no io_uring: {disk['uring_refusal']}"
            yield Finding(disk["directory"], problem, "`unset OFFLOAD_DISK_BACKEND`")
        if not disk["direct"]:
            yield Finding(
                disk["directory"],
                f"reads and writes pass through the page cache: {disk['direct_refusal']}",
                "a directory on ext4, xfs or btrfs",
            )


def _versions() -> dict[str, str | None]:
    import torch

    import offload

    return {
        "offload": offload.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": _driver_version(Path("/")),
        "kernel": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
    }


def _driver_version(root: Path) -> str | None:
    """Of NVIDIA's kernel module; None where it is not loaded."""
    try:
        found = re.search(r"\d+\.\d+(\.\d+)?", (root / "proc/driver/nvidia/version").read_text())
    except OSError:
        return None
    return found.group() if found else None


def _gpus() -> Iterator[dict[str, Any]]:
    import torch

    from ._unified import classify

    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield {
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "total_bytes": properties.total_memory,
            "memory_kind": classify(index).kind,
            "link": _link(_pci_address(properties), Path("/")),
        }


def _pci_address(properties: Any) -> str | None:
    """As in /sys/bus/pci/devices; None where torch is too old to say."""
    try:
        return f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
    except AttributeError:
        return None


def _link(address: str | None, root: Path) -> dict[str, Any] | None:
    """Lanes in use and possible, and the speed of one; None where the system does not say, as in a virtual machine.

    The speed that is in use falls while the card idles, so only what is possible is told.
    """
    if address is None:
        return None
    folder = root / "sys/bus/pci/devices" / address
    try:
        width, most = (int((folder / name).read_text()) for name in ("current_link_width", "max_link_width"))
        speed = (folder / "max_link_speed").read_text().strip()
    except (OSError, ValueError):
        return None
    return {"width": width, "max_width": most, "max_speed": speed} if width > 0 else None


def _measured_copies(device: torch.device) -> dict[str, Any]:
    """The best of a few copies each way, alone: the rate of the link, not of a training."""
    import torch

    on_cuda = device.type == "cuda"
    native = _native.CudaDevice(device.index or 0) if on_cuda else _native.HostDevice()
    pool = _native.HostPool(native, pin=on_cuda)
    host = pool.acquire(_COPY_BYTES, "staging")
    memoryview(host)[:] = bytes(_COPY_BYTES)  # its pages, before anything is timed
    other = torch.zeros(_COPY_BYTES, dtype=torch.uint8, device=device)
    if on_cuda:
        torch.cuda.synchronize(device)
    queue = _native.TransferQueue(native)
    ways = {
        "to_host": (queue.submit_to_host, host.address, other.data_ptr()),
        "to_device": (queue.submit_to_device, other.data_ptr(), host.address),
    }
    rates = {}
    for way, (submit, destination, source) in ways.items():
        seconds = []
        for _ in range(_COPIES):
            start = time.perf_counter()
            submit(destination, source, _COPY_BYTES).wait()
            seconds.append(time.perf_counter() - start)
        rates[f"{way}_gb_per_s"] = _COPY_BYTES / min(seconds) / 1e9
    return {"bytes": _COPY_BYTES, **rates, "pin_refusal": pool.stats()["pin_refusal"] or None}
