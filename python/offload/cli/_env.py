"""`offload env`: what offload finds on this machine and what could be better, made to be pasted into a bug report."""

from __future__ import annotations

import argparse
import json
from typing import Any

import offload

from ._progress import shown
from ._table import Piece, Table, facts, format_bytes, show

__all__ = ["run_env"]


def run_env(arguments: argparse.Namespace) -> int:
    """Prints the facts, as text or as JSON. Raises `StorageError` for a directory that cannot be used."""
    with shown("offload env"):
        found = offload.environment(arguments.disk_path, measure=True)
    if arguments.json:
        print(json.dumps({"schema_version": 1, **found}, indent=2))
    else:
        show(_pieces(found))
    return 0


def _pieces(found: dict[str, Any]) -> list[Piece]:
    versions, host, device, copies = found["versions"], found["host"], found["device"], found["copies"]
    limit, quota, locked = host["cgroup_limit_bytes"], host["cpu_quota"], host["memlock_bytes"]
    over = "in memory, there is no link" if device["kind"] == "cpu" else "over the link"
    rows = [
        (
            "offload",
            f"{versions['offload']}, Python {versions['python']}, torch {versions['torch']}, "
            f"NVIDIA driver {versions['driver'] or 'none'}, {versions['kernel']} {versions['machine']}",
        ),
        (
            "host",
            f"{format_bytes(host['available_bytes'])} of {format_bytes(host['total_bytes'])} available, "
            f"cgroup limit {'none' if limit is None else format_bytes(limit)}, "
            f"huge pages {host['huge_pages'] or 'unknown'}, "
            f"may lock {'all' if locked is None else format_bytes(locked)}",
        ),
        (
            "cpu",
            f"{host['cpu_count']} CPUs, quota {'none' if quota is None else f'{quota:g}'}, "
            f"{host['numa_node_count']} NUMA node{'' if host['numa_node_count'] == 1 else 's'}, "
            f"instruction set {found['isa']} of {', '.join(found['isas'])}",
        ),
        (
            "device",
            f"{device['name']}, {format_bytes(device['free_bytes'])} of {format_bytes(device['total_bytes'])} free",
        ),
    ]
    for number, gpu in enumerate(found["gpus"]):
        link = gpu["link"]
        lanes = "" if link is None else f", PCIe {link['width']} lanes of {link['max_speed']}"
        about = (
            f"{gpu['name']}, {format_bytes(gpu['total_bytes'])}, compute capability "
            f"{gpu['compute_capability']}, memory {gpu['memory_kind']}{lanes}"
        )
        rows.append((f"gpu {number}", about))
    if found["memory"] is not None:
        rows.append(("memory", f"{found['memory']['kind']}: {found['memory']['meaning']}"))
    rates = (
        f"{copies['to_device_gb_per_s']:.1f} GB/s to the device, {copies['to_host_gb_per_s']:.1f} GB/s to the host, "
        f"{over}"
    )
    kernels = "compiled for this device" if found["kernel_refusal"] is None else found["kernel_refusal"]
    rows += [("copies", rates), ("kernels", kernels), ("io_uring", found["uring_refusal"] or "available")]
    pieces: list[Piece] = [facts(rows)]
    if found["disks"]:
        disks = [("disk", "file system", "free", "back-end", "O_DIRECT", "reflinks")]
        for disk in found["disks"]:
            direct = "yes" if disk["direct"] else "no"
            free = format_bytes(disk["free_bytes"])
            reflinks = "yes" if disk["reflink"] else "no"
            disks.append((disk["directory"], disk["file_system"], free, disk["backend"], direct, reflinks))
        pieces += ["", Table(disks)]
    return [*pieces, "", *_advice(found["findings"])]


def _advice(findings: list[dict[str, str]]) -> list[str]:
    if not findings:
        return ["Nothing stands in the way."]
    lines = ["What stands in the way:"]
    for finding in findings:
        lines += [f"- {finding['subject']}: {finding['problem']}", f"  do: {finding['remedy']}"]
    return lines
