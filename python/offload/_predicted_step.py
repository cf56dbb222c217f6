"""One step of a model on given hardware, with one placement: micro-batches that fit, bytes, seconds. Pure functions.

[Note: data-parallel sharding] With N cards each computes its own sequences and keeps an Nth of gradients, states and
host copies; weights on the device are whole. A step sums gradients to their owners once a micro-batch and gathers
weights, once after the update, or for each forward and backward where they are not kept: (N - 1) / N of their bytes on
each card's wire, both ways at once, at the share of its rate that collectives reach. It hides as copies do, so that the
longer of the two counts. Arithmetic alone: nothing here runs in several processes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

from ._activation_order import ActivationOrder, activation_order
from ._config import Config
from ._forecast import forecast
from ._hardware import INTERCONNECTS, Hardware
from ._parameter_size import ParameterSize
from ._plan import Plan
from ._step_work import Machine, UnitWork, transformer_compute, unit_works
from ._token_costs import TokenCosts

__all__ = ["WORTHWHILE", "Job", "StepPrediction", "UpdatesAhead"]

_COLLECTIVES_SHARE = 0.8
# What offloads more is preferred only if it is faster by more than forecasts are good for.
WORTHWHILE = 0.98


@dataclasses.dataclass(frozen=True)
class UpdatesAhead:
    """A step whose updates begin in backward: its seconds, those of one whose norm clips, and bytes of backups."""

    seconds: float
    clipped_seconds: float
    backup_bytes: int


@dataclasses.dataclass(frozen=True)
class StepPrediction:
    """One step of `batch` sequences a card, `tokens` on all cards, in `micro_batches`, with that placement, by number.

    activation_bytes, activation_host_bytes: of one micro-batch, the most that is on the device and on the host at once;
    activation_sent_bytes: of it over the link, each way; device_bytes: of a card with them. seconds, tokens_per_s: of a
    step. busy: the seconds of each lane, and of the network; bound_by: the lane below whose work no step can be;
    exposed: what compute waits for each. clipped_seconds: of a step whose norm clips, more than `seconds` where updates
    begin in backward. ahead: what `speculate=` would make of it in the host memory that is left; None where that is
    not worth it, or it is predicted already.
    """

    batch: int
    tokens: int
    micro_batches: int
    placement: int
    activation_bytes: int
    activation_host_bytes: int
    activation_sent_bytes: int
    device_bytes: int
    seconds: float
    tokens_per_s: float
    bound_by: str
    busy: Mapping[str, float]
    exposed: Mapping[str, float]
    clipped_seconds: float
    ahead: UpdatesAhead | None


@dataclasses.dataclass(frozen=True)
class Job:
    """What is trained on what: all that steps have in common. itemsize: of the elements of activations."""

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

    def step(
        self, plan: Plan, config: Config, *, placement: int, device_bytes: int, host_room: int, batch: int
    ) -> StepPrediction | None:
        """In as few micro-batches as the device's memory allows; None where it does not hold one sequence.

        config: the one that `plan` was made for. device_bytes: of a card without activations. host_room: what its share
        of the host has left beside them.
        """
        room = self.hardware.device_bytes - device_bytes
        held = functools.cache(lambda count: self._held(plan, config, count))
        stay = functools.cache(lambda count: self._stay_bytes(plan, count))  # most numbers of parts fail by it already
        counts = ((n, -(-batch // n)) for n in range(1, batch + 1))
        micro_batches = next((n for n, c in counts if stay(c) <= room and held(c).device_bytes <= room), None)
        if micro_batches is None:
            return None
        activations = held(-(-batch // micro_batches))
        works = [_sharded(work, self.gpus) for work in self._works(plan, config, batch * self.length // micro_batches)]
        forecast_with = functools.partial(
            forecast,
            works,
            _machine(self.hardware),
            micro_batches=micro_batches,
            prefetch=plan.prefetch,
            kept_activations=config.activation_keep,
            activation_host_bytes=plan.activation_host_bytes,
            window_bytes=0 if plan.disk_window is None else plan.disk_window.kept_bytes,
            cache_bytes=0 if plan.weight_cache is None else plan.weight_cache.image_bytes,
        )
        found = forecast_with(speculate_bytes=plan.host.backups // self.gpus)
        network = self._network_seconds(plan, micro_batches)
        seconds = max(found.seconds, network)
        busy, exposed = dict(found.busy), dict(found.exposed)
        if self.gpus > 1:
            busy["network"], exposed["network"] = network, seconds - found.seconds
        ahead = None
        spare = min(host_room - activations.host_bytes, sum(work.backup_bytes for work in works))
        if not plan.host.backups and spare > 0:
            other = forecast_with(speculate_bytes=spare)
            if max(other.seconds, network) < WORTHWHILE * seconds:
                clipped_seconds = max(other.clipped_seconds, network)
                ahead = UpdatesAhead(max(other.seconds, network), clipped_seconds, other.backup_bytes)
        tokens = batch * self.length * self.gpus
        return StepPrediction(
            batch=batch,
            tokens=tokens,
            micro_batches=micro_batches,
            placement=placement,
            activation_bytes=activations.device_bytes,
            activation_host_bytes=activations.host_bytes,
            activation_sent_bytes=activations.sent_bytes,
            device_bytes=device_bytes + activations.device_bytes,
            seconds=seconds,
            tokens_per_s=tokens / seconds,
            bound_by=found.bound_by if network <= found.bound_seconds else "network",
            busy=busy,
            exposed=exposed,
            clipped_seconds=max(found.clipped_seconds, network),
            ahead=ahead,
        )

    def _works(self, plan: Plan, config: Config, tokens: int) -> tuple[UnitWork, ...]:
        """The units in a micro-batch of so many tokens."""
        units = {p.unit for p in self.parameters}  # a unit whose parameters are all tied is another's
        compute = transformer_compute(
            self.parameters,
            tokens=tokens,
            flops=self.hardware.mfu * (self.hardware.flops if self.itemsize == 2 else self.hardware.fp32_flops),
            checkpointing=self.checkpointing,
            lookups=self.costs.lookups,
            attention={unit: more for unit, more in self.costs.operations.items() if unit in units},
        )
        sent = None
        if config.activation_format != "exact":
            sent = self.costs.sent_bytes(tokens, self.itemsize, checkpointing=self.checkpointing)
        return unit_works(
            self.parameters,
            plan,
            config,
            compute,
            self.costs.saved_bytes(tokens, self.itemsize, checkpointing=self.checkpointing),
            self.costs.inputs if self.checkpointing else (),
            sent,
        )

    def _held(self, plan: Plan, config: Config, count: int) -> ActivationOrder:
        """What becomes of the activations of `count` sequences; its device bytes are of what never leaves too."""
        tokens = count * self.length
        works = self._works(plan, config, tokens)
        saved = [nbytes for work in works for nbytes in work.saved_bytes]
        sent = [nbytes for work in works for nbytes in work.sent_bytes]
        order = activation_order(saved, config.activation_keep, plan.activation_host_bytes, sent=sent)
        all_of_it = self.costs.activation_bytes(tokens, self.itemsize, checkpointing=self.checkpointing)
        return dataclasses.replace(order, device_bytes=all_of_it - sum(saved) + order.device_bytes)

    def _stay_bytes(self, plan: Plan, count: int) -> int:
        """Of the activations of `count` sequences, what is on the device whatever leaves it."""
        tokens = count * self.length
        whole = self.costs.activation_bytes(tokens, self.itemsize, checkpointing=self.checkpointing)
        if plan.activations == "device":
            return whole
        return whole - sum(self.costs.saved_bytes(tokens, self.itemsize, checkpointing=self.checkpointing).values())

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


def _sharded(work: UnitWork, gpus: int) -> UnitWork:
    """A card's part of what a unit moves; its own sequences are its own, their compute and their activations."""
    if gpus == 1:
        return work
    names = [field.name for field in dataclasses.fields(work) if field.name.endswith("_bytes")]
    names = [name for name in names if not name.endswith("activation_bytes")]
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
