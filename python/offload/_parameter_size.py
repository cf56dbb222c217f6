"""A parameter as the plan sees it, and what follows from the sizes alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

__all__ = [
    "MASTER_BYTES",
    "MOMENT_BLOCK",
    "MasterFormat",
    "ParameterSize",
    "backup_bytes",
    "host_master",
    "largest_unit",
    "link_bytes",
    "states_that_fit",
]

# The master of a 16-bit weight: in fp32 beside it; the weight and 16 bits that make it fp32; the bf16 weight itself.
MasterFormat = Literal["fp32", "split", "bf16"]
# An element, beside the weight.
MASTER_BYTES: dict[MasterFormat, int] = {"fp32": 4, "split": 2, "bf16": 0}
# Elements that share a scale where moments are int8.
MOMENT_BLOCK = 256


@dataclasses.dataclass(frozen=True)
class ParameterSize:
    """One parameter as the plan sees it; a tied parameter appears once.

    numel counts elements, itemsize is bytes an element, dtype_name is torch's (`"bfloat16"`). may_split: its
    optimizer can use a split master; may_be_stored: it can have its states on disk. moment_bytes: what that keeps
    beside a master, an element, and moment_block_bytes for each MOMENT_BLOCK elements. unit: what it is streamed with;
    stays: it is on the device all the same. is_master: it is bf16, and all there is of its master.
    """

    name: str
    numel: int
    itemsize: int
    dtype_name: str
    trainable: bool = True
    unit: str = ""
    may_split: bool = True
    moment_bytes: int = 8
    moment_block_bytes: int = 0
    stays: bool = False
    may_be_stored: bool = True
    is_master: bool = False

    @property
    def moments(self) -> int:
        """Bytes of the moments."""
        return self.numel * self.moment_bytes + -(-self.numel // MOMENT_BLOCK) * self.moment_block_bytes

    @property
    def device_master(self) -> int:
        """Bytes of a master on the device, where an fp32 weight is its own."""
        return 0 if self.itemsize != 2 else self.numel * MASTER_BYTES["bf16" if self.is_master else "fp32"]

    @property
    def state_bytes(self) -> int:
        """What its optimizer state takes on the device: moments, and the fp32 master of a 16-bit weight."""
        return self.moments + self.device_master


def host_master(parameter: ParameterSize, master: str) -> MasterFormat:
    """The format of its master where the host updates it; `master` as in `Config`."""
    if parameter.is_master:
        return "bf16"
    if parameter.may_split and parameter.dtype_name == "bfloat16" and master != "fp32":
        return "split"
    return "fp32"


def backup_bytes(parameter: ParameterSize, master: str) -> int:
    """What an update on the host writes to, of states in memory; `master` as in `Config`."""
    working = parameter.itemsize if parameter.itemsize == 2 else 0
    return parameter.numel * (working + MASTER_BYTES[host_master(parameter, master)]) + parameter.moments


def link_bytes(parameter: ParameterSize, master: str, *, streamed: bool) -> tuple[int, int]:
    """What the device reads and writes on the host, where it updates a state there; `master` as in `Config`.

    The master of a weight that is on the device goes by that, and the host's copy of it is written too; a streamed one
    is read and written on the host.
    """
    form = host_master(parameter, master)
    beside = MASTER_BYTES[form] if parameter.itemsize == 2 else 0
    goes_by_weight = parameter.itemsize == 4 or form != "fp32"
    kept, weight = parameter.moments + parameter.numel * beside, parameter.numel * parameter.itemsize
    return kept + (weight if streamed and goes_by_weight else 0), kept + weight


def largest_unit(parameters: Sequence[ParameterSize]) -> int:
    """Bytes of the largest unit of weights that are streamed."""
    units: dict[str, int] = {}
    for parameter in parameters:
        if not parameter.stays:
            units[parameter.unit] = units.get(parameter.unit, 0) + parameter.numel * parameter.itemsize
    return max(units.values(), default=0)


def states_that_fit(parameters: Sequence[ParameterSize], room_bytes: int, *, by_unit: bool) -> frozenset[str]:
    """Names of the parameters, each in the model's order whose state fits what those before it leave of `room_bytes`.

    The first ones, as the next forward begins with them: it would wait for their update on the host, while that of the
    last ones has the whole forward to end in. by_unit: the parameters of a unit stay or leave together, as an update on
    the device brings the streamed weights of the whole unit there.
    """
    groups: dict[str, list[ParameterSize]] = {}
    for parameter in parameters:
        groups.setdefault(parameter.unit if by_unit else parameter.name, []).append(parameter)
    taken = []
    for group in groups.values():
        nbytes = sum(parameter.state_bytes for parameter in group)
        if 0 < nbytes <= room_bytes:
            room_bytes -= nbytes
            taken += group
    return frozenset(parameter.name for parameter in taken)
