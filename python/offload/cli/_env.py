"""`offload env`: host, device and disks as offload finds them."""

from __future__ import annotations

import argparse
import json
from typing import Any

import offload

from ._table import format_bytes, table

__all__ = ["run_env"]


def run_env(arguments: argparse.Namespace) -> int:
    """Prints the facts, as a table or as JSON. Raises `StorageError` for a directory that cannot be used."""
    facts = offload.environment(arguments.disk_path)
    print(json.dumps(facts, indent=2) if arguments.json else _text(facts))
    return 0


def _text(facts: dict[str, Any]) -> str:
    host, device, refusal = facts["host"], facts["device"], facts["kernel_refusal"]
    lines = [
        f"host    {format_bytes(host['available_bytes'])} of {format_bytes(host['total_bytes'])} available, "
        f"{host['cpu_count']} CPUs, instruction set {facts['isa']}",
        f"device  {device['name']}, {format_bytes(device['free_bytes'])} of {format_bytes(device['total_bytes'])} free",
        f"kernels {'compiled for this device' if refusal is None else f'none: {refusal}'}",
    ]
    if facts["memory"] is not None:
        lines.append(f"memory  {facts['memory']['kind']}: {facts['memory']['meaning']}")
    if facts["disks"]:
        rows = [("disk", "file system", "free", "back-end", "O_DIRECT")]
        refusals = []
        for disk in facts["disks"]:
            direct = "yes" if disk["direct"] else "no"
            free = format_bytes(disk["free_bytes"])
            rows.append((disk["directory"], disk["file_system"], free, disk["backend"], direct))
            for what, refusal in (("io_uring", disk["uring_refusal"]), ("O_DIRECT", disk["direct_refusal"])):
                if refusal is not None:
                    refusals.append(f"{disk['directory']}: no {what}: {refusal}")
        lines += ["", table(rows), *refusals]
    return "\n".join(lines)
