"""What a model takes on given hardware, in every placement, and how long its steps are. Pure functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ._config import Config, format_size
from ._errors import InvalidArgument, OutOfHostMemory
from ._hardware import INTERCONNECTS, Hardware
from ._parameter_size import ParameterSize
from ._plan import Attempt, Plan, make_plan, place_activations, try_placement
from ._predicted_step import WORTHWHILE, Job, StepPrediction
from ._tier_bytes import TierBytes
from ._token_costs import TokenCosts

__all__ = ["PlacedBytes", "Prediction", "check_arguments", "make_prediction", "plan_on"]

# What there is to choose from, the least offloaded first.
_PLACEMENTS = (
    ("device", "device", "device"),
    ("host", "device", "device"),
    ("host", "host", "device"),
    ("host", "host", "host"),
    ("disk", "host", "host"),
    ("disk", "host", "disk"),
)
_OPTIONS = ("optimizer", "gradients", "params", "activations")
# Stands for a directory that is not chosen yet; a plan opens none.
_SOME_DISK = "DIRECTORY"
_RULE_OF_THUMB = 40  # bytes a parameter
_PLENTY = 2**60


@dataclasses.dataclass(frozen=True)
class PlacedBytes:
    """One placement: the options of `wrap`, bytes of a card and of its share of host and disk by kind.

    Activations have no bytes here: they go by the batch. refusal: why it does not fit; None where it does. kept: the
    share of the optimizer's state bytes that stays on the device although others leave.
    """

    options: Mapping[str, str | int | float]
    device: TierBytes
    host: TierBytes
    disk: TierBytes
    refusal: str | None
    kept: float = 0.0


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Of a model on hardware. See `offload.predict`.

    plan: what `wrap` takes by itself there; None where it cannot, and with several cards. refusal: why nothing trains.
    device_capacity, host_capacity: bytes that a placement is to fit; the rest is left to activations and to others.
    placements: all that there are, `plan` among them, those whose activations leave after those whose stay. steps: of
    each that fits, for each batch, if its memory holds one sequence. resident_bytes: weights, gradients and states with
    nothing offloaded, beside rule_of_thumb_bytes: 40 GB a billion parameters, activations included. sequence_bytes:
    activations of one sequence of `length` tokens, if none leave.
    """

    hardware: Hardware
    gpus: int
    interconnect: str | None
    trainable_count: int
    frozen_count: int
    length: int
    checkpointing: bool
    device_capacity: int
    host_capacity: int
    resident_bytes: int
    rule_of_thumb_bytes: int
    sequence_bytes: int
    plan: Plan | None
    refusal: str | None
    placements: tuple[PlacedBytes, ...]
    steps: tuple[StepPrediction, ...]

    def fastest(self) -> list[StepPrediction]:
        """For each batch the step of the placement to take: the least offloaded of those that are as fast as any."""
        best: dict[int, StepPrediction] = {}
        for step in sorted(self.steps, key=self._off_the_device):
            known = best.get(step.batch)
            if known is None or step.seconds < known.seconds * WORTHWHILE:
                best[step.batch] = step
        return [best[batch] for batch in sorted(best)]

    def cheapest(self) -> PlacedBytes | None:
        """The placement that offloads least and fits, with the activations of the smallest batch."""
        smallest = min((step.batch for step in self.steps), default=0)
        steps = [step for step in self.steps if step.batch == smallest]
        least = min(steps, key=self._off_the_device, default=None)
        return None if least is None else self.placements[least.placement]

    def _off_the_device(self, step: StepPrediction) -> tuple[int, int]:
        """Bytes; of as many, the placement that leaves more on the device comes first."""
        placed = self.placements[step.placement]
        return placed.host.total + placed.disk.total + step.activation_host_bytes, -placed.device.total


def plan_on(parameters: Sequence[ParameterSize], config: Config, hardware: Hardware) -> Plan:
    """The plan that `wrap` makes on that hardware. Raises as `make_plan` does."""
    return make_plan(
        parameters,
        config,
        device_kind=hardware.kind,
        device_bytes=hardware.device_bytes,
        host_bytes=hardware.host_bytes,
        gradient_itemsize=config.gradient_itemsize,
        measure=None if hardware.kind == "cpu" else lambda: hardware.rates,
    )


def make_prediction(
    parameters: Sequence[ParameterSize],
    costs: TokenCosts,
    config: Config,
    hardware: Hardware,
    *,
    batches: Sequence[int],
    length: int,
    checkpointing: bool,
    gpus: int = 1,
    interconnect: str | None = None,
) -> Prediction:
    """See `offload.predict`; what `config` places as "auto" is tried everywhere."""
    plan, refusal = None, None
    if gpus == 1:
        try:
            plan = _plan_with_disk_last(parameters, config, hardware)
        except (InvalidArgument, OutOfHostMemory) as error:
            refusal = str(error)
    candidates: list[_Candidate] = []
    for settings in _activation_choices(config, checkpointing):
        candidates += [_candidate(parameters, choice, hardware, gpus) for choice in _choices(settings)]
        if plan is not None:
            own = _plan_with_disk_last(parameters, settings, hardware)
            if all(_options(own, settings) != one.placed.options for one in candidates):
                host_room = own.host_capacity - own.host.total
                candidates.append(_Candidate(_placed_by(own, settings, parameters), settings, own, host_room))
    if plan is None and refusal is None and all(one.plan is None for one in candidates):
        tried = [one.placed.refusal for one in candidates] or ["no placement but device, host and disk is sharded"]
        refusal = f"nothing fits {gpus} cards: {tried[-1]}"
    wide = sum(p.numel for p in parameters if p.itemsize > 2)
    itemsize = 4 if 2 * wide > sum(p.numel for p in parameters) else 2  # of what most elements are
    job = Job(parameters, costs, hardware, itemsize, length, checkpointing, gpus, interconnect)
    resident = _attempt(parameters, _placing(config, _PLACEMENTS[0]), hardware)
    steps = tuple(
        step
        for number, one in enumerate(candidates)
        for batch in batches
        if (step := _step(job, one, number, batch)) is not None
    )
    if refusal is None and not steps:
        refusal = (
            f"one sequence of {length} tokens has {format_size(job.sequence_bytes)} of activations, and no placement "
            "leaves room on the device for those that stay: give a shorter length"
            + ("" if checkpointing else ", or let blocks be recomputed")
        )
    trainable = sum(p.numel for p in parameters if p.trainable)
    return Prediction(
        hardware=hardware,
        gpus=gpus,
        interconnect=interconnect,
        trainable_count=trainable,
        frozen_count=sum(p.numel for p in parameters) - trainable,
        length=length,
        checkpointing=checkpointing,
        device_capacity=resident.device_capacity,
        host_capacity=resident.host_capacity,
        resident_bytes=resident.device.total,
        rule_of_thumb_bytes=_RULE_OF_THUMB * trainable,
        sequence_bytes=job.sequence_bytes,
        plan=plan,
        refusal=refusal,
        placements=tuple(one.placed for one in candidates),
        steps=steps,
    )


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """A placement, the options that ask for it, and the plan of one card that trains alone; None if it does not fit.

    host_room: what it leaves of a card's share of the host.
    """

    placed: PlacedBytes
    config: Config
    plan: Plan | None
    host_room: int


def _step(job: Job, candidate: _Candidate, number: int, batch: int) -> StepPrediction | None:
    if candidate.plan is None:
        return None
    device_bytes = candidate.placed.device.total
    return job.step(
        candidate.plan,
        candidate.config,
        placement=number,
        device_bytes=device_bytes,
        host_room=candidate.host_room,
        batch=batch,
    )


def check_arguments(
    config: Config,
    batches: Sequence[int],
    length: int,
    checkpointing: bool,
    gpus: int,
    interconnect: str | None,
) -> None:
    """Raises `InvalidArgument` for what `make_prediction` cannot count with."""
    if config.activations == "checkpoints" and not checkpointing:
        raise InvalidArgument(
            "activations='checkpoints' and checkpointing=False: there are no checkpoints to leave; pass "
            "checkpointing=True, or activations='host'"
        )
    if not isinstance(batches, Sequence) or isinstance(batches, str) or not batches:
        raise InvalidArgument(f"batches={batches!r}: give numbers of sequences a step, such as (1, 4, 16)")
    for name, value in [("length", length), ("gpus", gpus), *((f"batch {b}", b) for b in batches)]:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidArgument(f"{name} is {value!r}; give a whole number, 1 or more")
    if gpus > 1 and interconnect not in INTERCONNECTS:
        raise InvalidArgument(f"interconnect={interconnect!r} for {gpus} GPUs: give one of {', '.join(INTERCONNECTS)}")


def _plan_with_disk_last(parameters: Sequence[ParameterSize], config: Config, hardware: Hardware) -> Plan:
    """What `wrap` would choose; if that is nothing, what it would with a directory for what lives on disk."""
    try:
        return plan_on(parameters, config, hardware)
    except (InvalidArgument, OutOfHostMemory):
        if config.disk_path is not None or "auto" not in (config.optimizer, config.params):
            raise
        return plan_on(parameters, dataclasses.replace(config, disk_path=_SOME_DISK), hardware)


def _activation_choices(config: Config, checkpointing: bool) -> list[Config]:
    """`config` with activations on the device, and where they can leave; as it is where it says."""
    if config.activations != "auto":
        return [config]
    places = ("device", "checkpoints" if checkpointing else "host")
    return [dataclasses.replace(config, activations=place) for place in places]


def _choices(config: Config) -> list[Config]:
    """The placements that `config` leaves open, as options of their own."""
    found = []
    for choice in _PLACEMENTS:
        asked = (config.optimizer, config.gradients, config.params)
        if all(want in ("auto", have) for want, have in zip(asked, choice, strict=True)):
            try:
                found.append(_placing(config, choice))
            except InvalidArgument:
                continue  # lossy moments and masters are not for the disk
    return found


def _placing(config: Config, choice: tuple[Any, Any, Any]) -> Config:
    optimizer, gradients, params = choice
    disk = config.disk_path or (_SOME_DISK if "disk" in choice else None)
    return dataclasses.replace(config, optimizer=optimizer, gradients=gradients, params=params, disk_path=disk)


def _attempt(parameters: Sequence[ParameterSize], config: Config, hardware: Hardware) -> Attempt:
    return try_placement(
        parameters,
        config,
        device_bytes=hardware.device_bytes,
        host_bytes=hardware.host_bytes,
        gradient_itemsize=config.gradient_itemsize,
    )


def _candidate(parameters: Sequence[ParameterSize], config: Config, hardware: Hardware, gpus: int) -> _Candidate:
    """One placement, and whether a card's part of it fits the budgets that `wrap` would keep to."""
    whole = _attempt(parameters, config, hardware)
    part = whole
    if gpus > 1:
        shards = [dataclasses.replace(p, numel=-(-p.numel // gpus)) for p in parameters]
        part = _attempt(shards, config, hardware)
    device = dataclasses.replace(part.device, weights=whole.device.weights)
    refusal = None
    if device.total > part.device_capacity:
        refusal = f"the device is too small: {_of(device.total, part.device_capacity)}"
    elif part.host.total > part.host_capacity:
        refusal = f"host memory is too small: {_of(part.host.total, part.host_capacity)}"
    plan = None
    if refusal is None:
        # The bytes of a card's part have been compared; the plan says what the whole moves.
        alone = hardware if gpus == 1 else dataclasses.replace(hardware, device_bytes=_PLENTY, host_bytes=_PLENTY)
        _, left = place_activations(config, part.host_capacity - part.host.total)
        plan = dataclasses.replace(
            plan_on(parameters, config, alone),
            activation_host_bytes=left,
            disk_window=part.window,
            weight_cache=part.cache,
        )
    options = dict(zip(_OPTIONS, (*whole.choice, config.activations), strict=True))
    placed = PlacedBytes(options, device, part.host, part.disk, refusal)
    return _Candidate(placed, config, plan, part.host_capacity - part.host.total)


def _placed_by(plan: Plan, config: Config, parameters: Sequence[ParameterSize]) -> PlacedBytes:
    states = {p.name: p.state_bytes for p in parameters if p.trainable}
    kept = sum(states[name] for name in plan.kept_states) / max(1, sum(states.values()))
    return PlacedBytes(_options(plan, config), plan.device, plan.host, plan.disk, None, kept)


def _options(plan: Plan, config: Config) -> dict[str, str | int | float]:
    return dict(zip(_OPTIONS, (plan.optimizer, plan.gradients, plan.params, config.activations), strict=True))


def _of(needed: int, capacity: int) -> str:
    return f"{format_size(needed)} needed, {format_size(capacity)} available"
