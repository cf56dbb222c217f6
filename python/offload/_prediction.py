"""What a model takes on given hardware, in every placement, and how long its steps are. Pure functions.

[Note: data-parallel sharding] With N cards each computes its own sequences and keeps an Nth of gradients, states and
host copies; weights on the device are whole. A step sums gradients to their owners once a micro-batch and gathers
weights, once after the update, or for each forward and backward where they are not kept: (N - 1) / N of their bytes on
each card's wire, both ways at once, at the share of its rate that collectives reach. It hides as copies do, so that the
longer of the two counts. Arithmetic alone: nothing here runs in several processes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ._config import Config, format_size
from ._errors import InvalidArgument, OutOfHostMemory
from ._forecast import forecast
from ._hardware import INTERCONNECTS, Hardware
from ._parameter_size import ParameterSize
from ._plan import Attempt, Plan, make_plan, try_placement
from ._step_work import Machine, UnitWork, transformer_compute, unit_works
from ._tier_bytes import TierBytes
from ._token_costs import TokenCosts

__all__ = ["PlacedBytes", "Prediction", "StepPrediction", "make_prediction", "plan_on"]

# What there is to choose from, the least offloaded first.
_PLACEMENTS = (
    ("device", "device", "device"),
    ("host", "device", "device"),
    ("host", "host", "device"),
    ("host", "host", "host"),
    ("disk", "host", "host"),
    ("disk", "host", "disk"),
)
_OPTIONS = ("optimizer", "gradients", "params")
# Stands for a directory that is not chosen yet; a plan opens none.
_SOME_DISK = "DIRECTORY"
_COLLECTIVES_SHARE = 0.8
_RULE_OF_THUMB = 40  # bytes a parameter
_PLENTY = 2**60
# A placement that offloads more is preferred only if it is faster by more than forecasts are good for.
_WORTHWHILE = 0.98


@dataclasses.dataclass(frozen=True)
class PlacedBytes:
    """One placement: the options of `wrap`, bytes of a card and of its share of host and disk by kind.

    refusal: why it does not fit; None where it does. kept: the share of the optimizer's state bytes that stays on the
    device although others leave.
    """

    options: Mapping[str, str]
    device: TierBytes
    host: TierBytes
    disk: TierBytes
    refusal: str | None
    kept: float = 0.0


@dataclasses.dataclass(frozen=True)
class StepPrediction:
    """One step of `batch` sequences a card, `tokens` on all cards, in `micro_batches`, with that placement, by number.

    activation_bytes: of one micro-batch; device_bytes: of a card with them. seconds, tokens_per_s: of a step. busy: the
    seconds of each lane, and of the network; bound_by: the lane below whose work no step can be; exposed: what compute
    waits for each.
    """

    batch: int
    tokens: int
    micro_batches: int
    placement: int
    activation_bytes: int
    device_bytes: int
    seconds: float
    tokens_per_s: float
    bound_by: str
    busy: Mapping[str, float]
    exposed: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Of a model on hardware. See `offload.predict`.

    plan: what `wrap` takes by itself there; None where it cannot, and with several cards. refusal: why nothing trains.
    device_capacity, host_capacity: bytes that a placement is to fit; the rest is left to activations and to others.
    placements: all that there are, the last one `plan` where it is none of the others. steps: of each that fits, for
    each batch, if its memory holds one sequence. resident_bytes: weights, gradients and states with nothing offloaded,
    beside rule_of_thumb_bytes: 40 GB a billion parameters, activations included. sequence_bytes: activations of one
    sequence of `length` tokens.
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
        for step in sorted(self.steps, key=lambda step: self._offloading(step.placement)):
            known = best.get(step.batch)
            if known is None or step.seconds < known.seconds * _WORTHWHILE:
                best[step.batch] = step
        return [best[batch] for batch in sorted(best)]

    def cheapest(self) -> PlacedBytes | None:
        """The placement that fits and offloads least."""
        fitting = [placed for placed in self.placements if placed.refusal is None]
        return min(fitting, key=lambda placed: placed.host.total + placed.disk.total, default=None)

    def _offloading(self, placement: int) -> int:
        placed = self.placements[placement]
        return placed.host.total + placed.disk.total


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
    _check(config, batches, length, gpus, interconnect)
    plan, refusal = None, None
    if gpus == 1:
        try:
            plan = _plan_with_disk_last(parameters, config, hardware)
        except (InvalidArgument, OutOfHostMemory) as error:
            refusal = str(error)
    candidates = [_candidate(parameters, settings, hardware, gpus) for settings in _choices(config)]
    if plan is not None and all(_options(plan) != one.placed.options for one in candidates):
        candidates.append(_Candidate(_placed_by(plan, parameters), config, plan))
    if plan is None and refusal is None and all(one.plan is None for one in candidates):
        tried = [one.placed.refusal for one in candidates] or ["no placement but device, host and disk is sharded"]
        refusal = f"nothing fits {gpus} cards: {tried[-1]}"
    wide = sum(p.numel for p in parameters if p.itemsize > 2)
    itemsize = 4 if 2 * wide > sum(p.numel for p in parameters) else 2  # of what most elements are
    job = _Job(parameters, costs, hardware, itemsize, length, checkpointing, gpus, interconnect)
    resident = _attempt(parameters, _placing(config, _PLACEMENTS[0]), hardware)
    steps = tuple(
        step
        for number, one in enumerate(candidates)
        for batch in batches
        if one.plan is not None and (step := job.step(one, one.plan, number, batch)) is not None
    )
    if refusal is None and not steps:
        refusal = (
            f"one sequence of {length} tokens has {format_size(job.sequence_bytes)} of activations, and no placement "
            "leaves as much of the device: give a shorter length"
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
    """A placement, the options that ask for it, and the plan of one card that trains alone; None if it does not fit."""

    placed: PlacedBytes
    config: Config
    plan: Plan | None


@dataclasses.dataclass(frozen=True)
class _Job:
    """What is trained on what: all that steps have in common."""

    parameters: Sequence[ParameterSize]
    costs: TokenCosts
    hardware: Hardware
    itemsize: int
    length: int
    checkpointing: bool
    gpus: int
    interconnect: str | None

    @property
    def sequence_bytes(self) -> int:
        return self.costs.activation_bytes(self.length, self.itemsize, checkpointing=self.checkpointing)

    def step(self, candidate: _Candidate, plan: Plan, number: int, batch: int) -> StepPrediction | None:
        """In as few micro-batches as the device's memory allows; None where it does not hold one sequence."""
        room = self.hardware.device_bytes - candidate.placed.device.total
        if room < self.sequence_bytes:
            return None
        micro_batches = -(-batch // (room // self.sequence_bytes))
        held = -(-batch // micro_batches) * self.sequence_bytes
        units = {p.unit for p in self.parameters}  # a unit whose parameters are all tied is another's
        compute = transformer_compute(
            self.parameters,
            tokens=batch * self.length // micro_batches,
            flops=self.hardware.mfu * (self.hardware.flops if self.itemsize == 2 else self.hardware.fp32_flops),
            checkpointing=self.checkpointing,
            lookups=self.costs.lookups,
            attention={unit: more for unit, more in self.costs.operations.items() if unit in units},
        )
        works = [_sharded(work, self.gpus) for work in unit_works(self.parameters, plan, candidate.config, compute)]
        found = forecast(
            works,
            _machine(self.hardware),
            micro_batches=micro_batches,
            prefetch=plan.prefetch,
            window_bytes=0 if plan.disk_window is None else plan.disk_window.nbytes,
            cache_bytes=0 if plan.weight_cache is None else plan.weight_cache.image_bytes,
        )
        network = self._network_seconds(plan, micro_batches)
        seconds = max(found.seconds, network)
        busy, exposed = dict(found.busy), dict(found.exposed)
        if self.gpus > 1:
            busy["network"], exposed["network"] = network, seconds - found.seconds
        tokens = batch * self.length * self.gpus
        return StepPrediction(
            batch=batch,
            tokens=tokens,
            micro_batches=micro_batches,
            placement=number,
            activation_bytes=held,
            device_bytes=candidate.placed.device.total + held,
            seconds=seconds,
            tokens_per_s=tokens / seconds,
            bound_by=found.bound_by if network <= found.bound_seconds else "network",
            busy=busy,
            exposed=exposed,
        )

    def _network_seconds(self, plan: Plan, micro_batches: int) -> float:
        """See [Note: data-parallel sharding]."""
        if self.gpus == 1 or self.interconnect is None:
            return 0.0
        trained = sum(p.numel * p.itemsize for p in self.parameters if p.trainable)
        gathered = trained
        if plan.params != "device":
            gathered = 2 * micro_batches * sum(p.numel * p.itemsize for p in self.parameters)
        on_the_wire = (gathered + micro_batches * trained) * (self.gpus - 1) / self.gpus
        return on_the_wire / (INTERCONNECTS[self.interconnect] * _COLLECTIVES_SHARE)


def _check(config: Config, batches: Sequence[int], length: int, gpus: int, interconnect: str | None) -> None:
    if config.activation_share > 0:
        raise InvalidArgument(
            f"activations={config.activations!r}: predictions are of activations on the device; leave it out"
        )
    for name, value in {"length": length, "gpus": gpus, **{f"batch {b}": b for b in batches}}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidArgument(f"{name} is {value!r}; give a whole number, 1 or more")
    if not batches:
        raise InvalidArgument("batches is empty; give numbers of sequences a step, such as (1, 4, 16)")
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
    elif part.on_host > part.host_capacity:
        refusal = f"host memory is too small: {_of(part.on_host, part.host_capacity)}"
    plan = None
    if refusal is None:
        # The bytes of a card's part have been compared; the plan says what the whole moves.
        alone = hardware if gpus == 1 else dataclasses.replace(hardware, device_bytes=_PLENTY, host_bytes=_PLENTY)
        plan = plan_on(parameters, config, alone)
    options = dict(zip(_OPTIONS, whole.choice, strict=True))
    return _Candidate(PlacedBytes(options, device, part.host, part.disk, refusal), config, plan)


def _placed_by(plan: Plan, parameters: Sequence[ParameterSize]) -> PlacedBytes:
    states = {p.name: p.state_bytes for p in parameters if p.trainable}
    kept = sum(states[name] for name in plan.kept_states) / max(1, sum(states.values()))
    return PlacedBytes(_options(plan), plan.device, plan.host, plan.disk, None, kept)


def _options(plan: Plan) -> dict[str, str]:
    return {name: getattr(plan, name) for name in _OPTIONS}


def _sharded(work: UnitWork, gpus: int) -> UnitWork:
    """A card's part of what a unit moves; it computes by itself what its own sequences need."""
    if gpus == 1:
        return work
    names = [field.name for field in dataclasses.fields(work) if field.name.endswith("_bytes")]
    return dataclasses.replace(work, **{name: -(-getattr(work, name) // gpus) for name in names})


def _machine(hardware: Hardware) -> Machine:
    return Machine(
        to_host=hardware.to_host,
        to_device=hardware.to_device,
        host_update=hardware.host_bandwidth,
        device_update=hardware.device_bandwidth,
        disk_read=hardware.disk_read,
        disk_write=hardware.disk_write,
        synchronous=hardware.kind == "cpu",
    )


def _of(needed: int, capacity: int) -> str:
    return f"{format_size(needed)} needed, {format_size(capacity)} available"
