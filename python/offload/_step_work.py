"""What one step costs, unit by unit, under one placement, and the rates of the machine that it runs on. Pure."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Mapping, Sequence

from ._config import Config
from ._errors import InvalidArgument
from ._hybrid import state_bytes
from ._parameter_size import MASTER_BYTES, ParameterSize, backup_bytes, host_master, link_bytes
from ._plan import Plan

__all__ = ["LANES", "Machine", "UnitWork", "backups_of", "transformer_compute", "unit_works"]

LANES = ("compute", "to_host", "to_device", "host_update", "disk_read", "disk_write")
# Elements that are updated, and then uploaded, as one (see step_pipeline.h).
_CHUNK_ELEMENTS = 4 << 20
# A unit is followed in at most so many parts: more of them change a forecast by less than its rates are known.
_MOST_PARTS = 8
# A parameter of less than this share of its unit is no part of its own.
_LEAST_PART = 0.05


@dataclasses.dataclass(frozen=True)
class Machine:
    """Rates in bytes a second; None where the machine has no such lane.

    to_host, to_device: of copies. host_update: of what the update on the host reads and writes in memory, while copies
    run. device_update: of the update on the device, in its own memory, and of packing activations there. disk_read,
    disk_write: of all disk paths. flops: operations a second that the model's compute reaches; only
    `transformer_compute` reads it.
    synchronous: the training thread computes, so `step()` hands updates over when everything before it has ended: the
    CPU as the device. A GPU is told of them ahead of time.
    """

    to_host: float
    to_device: float
    host_update: float | None = None
    device_update: float | None = None
    disk_read: float | None = None
    disk_write: float | None = None
    flops: float | None = None
    synchronous: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            rate = getattr(self, field.name)
            if field.name != "synchronous" and rate is not None and not rate > 0:
                raise InvalidArgument(f"Machine: {field.name} is {rate}; give a positive rate, or None without one")

    def seconds(self, rate: str, nbytes: float) -> float:
        """What `nbytes` take at the rate of that name. Raises `InvalidArgument` for a rate that the machine lacks."""
        if nbytes == 0:
            return 0.0
        bytes_per_s: float | None = getattr(self, rate)
        if bytes_per_s is None:
            raise InvalidArgument(
                f"this placement needs {rate}, and the machine has none; give Machine({rate}=bytes a second)"
            )
        return nbytes / bytes_per_s


@dataclasses.dataclass(frozen=True)
class UnitWork:
    """What one unit costs in one step: bytes, and seconds of compute of one micro-batch.

    weight_bytes: come before its forward and its backward in each micro-batch; 0 where the weights stay.
    gradient_bytes: leave in the backward of each micro-batch, and come back to be added to in each but the first.
    activation_bytes: of what its forward saves, what may leave and is back for its backward, in each micro-batch.
    sent_activation_bytes: of these, on their way and on the host; None: as many. Others are packed for the way.
    step_to_host_bytes, step_to_device_bytes: are copied inside `step()`, before its update, while compute waits.
    crossing_to_device_bytes, crossing_to_host_bytes: of states on the host, read and written while the device updates
    them: over its link, and in the memory that updates on the host share.
    host_update_bytes, device_update_bytes: that its update reads and writes in memory.
    backup_bytes: of what its update on the host writes to, where that may begin in backward.
    upload_bytes: of resident weights, after their update on the host.
    disk_read_bytes, disk_write_bytes: of states, in an update.
    stored_bytes: of `weight_bytes`, what comes from the disk, and goes there after the update.
    parts: of about equal size, such as its large parameters, that leave, are updated and come back one by one; so does
    what each of them saves.
    checkpointed: its forward saves its input alone, before it begins, and its backward repeats it first, in seconds
    that `backward_seconds` contains.
    """

    name: str
    forward_seconds: float = 0.0
    backward_seconds: float = 0.0
    weight_bytes: int = 0
    gradient_bytes: int = 0
    activation_bytes: int = 0
    sent_activation_bytes: int | None = None
    step_to_host_bytes: int = 0
    step_to_device_bytes: int = 0
    crossing_to_device_bytes: int = 0
    crossing_to_host_bytes: int = 0
    host_update_bytes: int = 0
    device_update_bytes: int = 0
    backup_bytes: int = 0
    upload_bytes: int = 0
    disk_read_bytes: int = 0
    disk_write_bytes: int = 0
    stored_bytes: int = 0
    parts: int = 1
    checkpointed: bool = False

    @property
    def crossing_bytes(self) -> int:
        """Of states on the host that the device updates, read and written."""
        return self.crossing_to_device_bytes + self.crossing_to_host_bytes

    @property
    def saved_bytes(self) -> list[int]:
        """Of `activation_bytes`, those of each range of memory, in the order in which they are saved."""
        return self._of_ranges(self.activation_bytes)

    @property
    def sent_bytes(self) -> list[int]:
        """Of these ranges, on their way and on the host."""
        sent = self.sent_activation_bytes
        return self.saved_bytes if sent is None else self._of_ranges(sent)

    def _of_ranges(self, nbytes: int) -> list[int]:
        count = 1 if self.checkpointed else self.parts
        ends = [nbytes * number // count for number in range(count + 1)]
        return [end - begin for begin, end in itertools.pairwise(ends)] if self.activation_bytes else []

    @property
    def repeated_seconds(self) -> float:
        """Of its backward, those of the forward that it repeats."""
        return min(self.forward_seconds, self.backward_seconds) if self.checkpointed else 0.0


def unit_works(
    parameters: Sequence[ParameterSize],
    plan: Plan,
    config: Config,
    compute: Mapping[str, tuple[float, float]],
    activation_bytes: Mapping[str, int] | None = None,
    checkpointed: Collection[str] = (),
    sent_activation_bytes: Mapping[str, int] | None = None,
) -> tuple[UnitWork, ...]:
    """What the units of a model cost in a step under `plan`, in the order in which `parameters` name them.

    compute: seconds of forward and of backward of one micro-batch, by unit. activation_bytes: what a unit's forward
    saves in a micro-batch; it counts where the plan lets activations leave. checkpointed: names of units whose forward
    backward repeats; what these save is their input. sent_activation_bytes: of `activation_bytes` on their way, where
    these are packed. config: that of the plan.
    """
    units: dict[str, list[ParameterSize]] = {}
    for parameter in parameters:
        units.setdefault(parameter.unit, []).append(parameter)
    saved = activation_bytes if activation_bytes is not None and plan.activations != "device" else {}
    if plan.activations == "checkpoints":
        saved = {name: nbytes for name, nbytes in saved.items() if name in checkpointed}
    works = []
    for name, members in units.items():
        forward, backward = compute.get(name, (0.0, 0.0))
        costs = [_costs(parameter, plan, config) for parameter in members]
        works.append(
            UnitWork(
                name,
                forward,
                backward,
                activation_bytes=saved.get(name, 0),
                sent_activation_bytes=(sent_activation_bytes or {}).get(name),
                parts=_parts(members),
                checkpointed=name in checkpointed,
                **{
                    field: sum(cost.get(field, 0) for cost in costs)
                    for field in {key for cost in costs for key in cost}
                },
            )
        )
    return tuple(works)


def backups_of(units: Sequence[UnitWork], room: int) -> dict[tuple[int, int], int]:
    """Bytes of the backups of parts, by unit and part, in the order in which their gradients leave: each that finds
    room has one."""
    found = {}
    for number, unit in reversed([*enumerate(units)]):
        nbytes = unit.backup_bytes // unit.parts
        for part in reversed(range(unit.parts)):
            if 0 < nbytes <= room:
                found[number, part] = nbytes
                room -= nbytes
    return found


def transformer_compute(
    parameters: Sequence[ParameterSize],
    *,
    tokens: int,
    flops: float,
    checkpointing: bool,
    lookups: Collection[str] = (),
    attention: Mapping[str, float] | None = None,
) -> dict[str, tuple[float, float]]:
    """Seconds of forward and backward by unit: 2 operations a parameter and token forward, 4 backward, 6 if it repeats
    the forward.

    tokens: of a micro-batch. flops: operations a second. checkpointing: backward repeats the forward. lookups: names of
    parameters that are no matrix product, as embeddings. attention: operations of a token in the forward of a unit
    that no parameter takes part in: 4 * sequence * heads * head size, half of it where attention is causal.
    """
    operations: dict[str, float] = {}
    for parameter in parameters:
        operations.setdefault(parameter.unit, 0.0)
        if parameter.name not in lookups:
            operations[parameter.unit] += 2.0 * parameter.numel
    for unit, more in (attention or {}).items():
        operations[unit] += more
    again = 3.0 if checkpointing else 2.0
    return {unit: (one * tokens / flops, again * one * tokens / flops) for unit, one in operations.items()}


def _costs(parameter: ParameterSize, plan: Plan, config: Config) -> dict[str, int]:
    """Bytes of one parameter, by the fields of UnitWork."""
    weight = parameter.numel * parameter.itemsize
    streams = plan.params != "device" and not parameter.stays
    costs = {"weight_bytes": weight} if streams else {}
    if plan.params == "disk" and streams:
        costs["stored_bytes"] = weight
    if not parameter.trainable:
        return costs
    leaves = plan.gradient_leaves(parameter.name)
    one = state_bytes(parameter, config.master, config.gradient_itemsize, gradient_leaves=leaves)
    gradient = one.to_host
    if leaves:
        costs["gradient_bytes"] = gradient
    if plan.updates_on_device(parameter.name):
        costs["step_to_device_bytes"] = gradient if leaves else 0
        if plan.keeps_state(parameter.name):
            # A streamed weight comes to the device, and goes back.
            costs["step_to_device_bytes"] += weight if streams else 0
            costs["step_to_host_bytes"] = weight if streams else 0
            costs["device_update_bytes"] = one.device_update
        else:
            read, written = link_bytes(parameter, config.master, streamed=streams)
            costs |= {"crossing_to_device_bytes": read, "crossing_to_host_bytes": written}
            costs["device_update_bytes"] = gradient + (0 if streams else 2 * weight)
        return costs
    if not leaves:
        costs["step_to_host_bytes"] = gradient
    if not streams:
        costs["upload_bytes"] = weight
    costs["host_update_bytes"] = one.host_update
    if plan.optimizer != "disk" and leaves and plan.params == "device" and parameter.may_split:
        costs["backup_bytes"] = backup_bytes(parameter, config.master)
    if plan.optimizer == "disk":
        # A master on the host that is the weight has no second copy on the disk (see [Note: bytes a parameter]).
        has_master = parameter.itemsize == 2 or not streams
        master = MASTER_BYTES[host_master(parameter, config.master)] * parameter.numel if has_master else 0
        costs["disk_read_bytes"] = costs["disk_write_bytes"] = master + parameter.moments
    return costs


def _parts(parameters: Sequence[ParameterSize]) -> int:
    """How many of a unit's parameters, and chunks of those, are worth following."""
    total = sum(parameter.numel for parameter in parameters)
    large = [parameter.numel for parameter in parameters if parameter.numel >= _LEAST_PART * total > 0]
    return max(1, min(_MOST_PARTS, sum(max(1, round(count / _CHUNK_ELEMENTS)) for count in large)))
