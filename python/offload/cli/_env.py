"""`offload env`: what offload finds on this machine and what could be better, made to be pasted into a bug report."""

from __future__ import annotations

import argparse
import json
from typing import Any

import offload

from ._table import format_bytes, table

__all__ = ["run_env"]


def run_env(arguments: argparse.Namespace) -> int:
    """Prints the facts, as text or as JSON. Raises `StorageError` for a directory that cannot be used."""
    facts = offload.environment(arguments.disk_path, measure=True)
    print(json.dumps(facts, indent=2) if arguments.json else _text(facts))
    return 0


def _text(facts: dict[str, Any]) -> str:
    versions, host, device, copies = facts["versions"], facts["host"], facts["device"], facts["copies"]
    limit, quota, locked = host["cgroup_limit_bytes"], host["cpu_quota"], host["memlock_bytes"]
    over = "in memory, there is no link" if device["kind"] == "cpu" else "over the link"
    lines = [
        f"offload   {versions['offload']}, Python {versions['python']}, torch {versions['torch']}, "
        f"NVIDIA driver {versions['driver'] or 'none'}, {versions['kernel']} {versions['machine']}",
        f"host      {format_bytes(host['available_bytes'])} of {format_bytes(host['total_bytes'])} available, "
        f"limit {'none' if limit is None else format_bytes(limit)}, huge pages {host['huge_pages'] or 'unknown'}, "
        f"may lock {'all' if locked is None else format_bytes(locked)}",
        f"cpu       {host['cpu_count']} CPUs, quota {'none' if quota is None else f'{quota:g}'}, "
        f"{host['numa_node_count']} NUMA nodes, instruction set {facts['isa']} of "
        f"{', '.join(facts['isas'])}",
        f"device    {device['name']}, {format_bytes(device['free_bytes'])} of {format_bytes(device['total_bytes'])} "
        "free",
    ]
    for number, gpu in enumerate(facts["gpus"]):
        link = gpu["link"]
        lanes = "" if link is None else f", PCIe {link['width']} lanes of {link['max_speed']}"
        lines.append(
            f"gpu {number}     {gpu['name']}, {format_bytes(gpu['total_bytes'])}, compute capability "
            f"{gpu['compute_capability']}, memory {gpu['memory_kind']}{lanes}"
        )
    if facts["memory"] is not None:
        lines.append(f"memory    {facts['memory']['kind']}: {facts['memory']['meaning']}")
    lines += [
        f"copies    {copies['to_device_gb_per_s']:.1f} GB/s to the device, {copies['to_host_gb_per_s']:.1f} GB/s to "
        f"the host, {over}",
        f"kernels   {'compiled for this device' if facts['kernel_refusal'] is None else facts['kernel_refusal']}",
        f"io_uring  {facts['uring_refusal'] or 'available'}",
    ]
    if facts["disks"]:
        rows = [("disk", "file system", "free", "back-end", "O_DIRECT")]
        for disk in facts["disks"]:
            direct = "yes" if disk["direct"] else "no"
            free = format_bytes(disk["free_bytes"])
            rows.append((disk["directory"], disk["file_system"], free, disk["backend"], direct))
        lines += ["", table(rows)]
    lines += ["", *(_advice(facts["findings"]))]
    return "\n".join(lines)


def _advice(findings: list[dict[str, str]]) -> list[str]:
    if not findings:
        return ["Nothing stands in the way."]
    lines = ["What stands in the way:"]
    for finding in findings:
        lines += [f"- {finding['subject']}: {finding['problem']}", f"  do: {finding['remedy']}"]
    return lines
