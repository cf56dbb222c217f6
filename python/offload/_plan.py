"""The byte rule: sizes and budgets in, placement and bytes by tier out. Pure functions, no devices."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from ._config import Config, Tier, format_size
from ._disk_window import CacheSize, DiskWindow
from ._errors import InvalidArgument, OutOfHostMemory
from ._hybrid import Hybrid, Rates, keep_fastest
from ._parameter_size import ParameterSize
from ._plan_sizes import (
    LEAST_PREFETCH,
    MasterForm,
    OptimizerPlacement,
    ParamsPlacement,
    Placement,
    PlanSizes,
)
from ._tier_bytes import TierBytes, table
from ._unified_plan import MemoryKind

__all__ = ["Attempt", "ParameterSize", "Plan", "TierBytes", "make_plan", "place_activations", "try_placement"]

ActivationPlacement = Literal["device", "host", "checkpoints"]

# Of a measured device, what is left to activations and workspace: their size is not known before the
# first step, and a quarter is what transformer training with checkpointing rarely exceeds.
_ACTIVATION_SHARE = 0.25
# Of what the host budget has left, what activations may take: they are most of what is not planned by size.
_ACTIVATIONS_HOST_SHARE = 0.75
# Of what the host budget and the window of states on disk leave, what weights on disk pass through, and no more than
# all of them take: sums of gradients over micro-batches take the rest for a while.
_CACHE_SHARE = 0.75
# How many units of weights are sent for ahead of their use. With one, the link waits from the end of an upload until
# the next touch sends for another; with a second one queued behind it, it does not while touches come as fast as
# uploads. More would only smooth units of unequal size. Neither the rate of the link nor the compute of a unit is
# known here, so the second one is taken wherever its memory is there.
_WANTED_PREFETCH = 2
# Of a measured host, what is left to everyone else (data loaders, page cache of the data).
_HOST_SHARE_FOR_OTHERS = 0.10


@dataclasses.dataclass(frozen=True)
class Plan:
    """What was chosen, what it takes and why.

    `device`, `host` and `disk` are bytes by kind; `resident` is what the device would hold with nothing offloaded.
    Capacities are the budgets the choice was made against, in bytes. activation_host_bytes: what activations may take
    on the host, beside `host`. prefetch: units of weights that are sent for ahead, with params off the device.
    kept_states: with a mixed optimizer, the parameters whose states stay on the device; unified_states: those whose
    states the device updates on the host, with a mixed optimizer or a unified one. disk_window: with the optimizer
    on disk, what its states pass through. weight_cache: with params on disk, what they do.
    """

    optimizer: OptimizerPlacement
    gradients: Placement
    params: ParamsPlacement
    activations: ActivationPlacement
    master: MasterForm
    device_kind: str
    device: TierBytes
    host: TierBytes
    resident: TierBytes
    device_capacity: int
    host_capacity: int
    trainable_count: int
    frozen_count: int
    reason: tuple[str, ...]
    activation_host_bytes: int = 0
    prefetch: int = LEAST_PREFETCH
    kept_states: frozenset[str] = frozenset()
    unified_states: frozenset[str] = frozenset()
    disk: TierBytes = dataclasses.field(default_factory=TierBytes)
    disk_window: DiskWindow | None = None
    weight_cache: CacheSize | None = None

    def keeps_state(self, name: str) -> bool:
        """Whether the optimizer state of this parameter is on the device."""
        return self.optimizer == "device" or name in self.kept_states

    def updates_on_device(self, name: str) -> bool:
        """Whether the device updates this parameter, wherever its state is; of a name that is not known too."""
        return self.optimizer == "unified" or self.keeps_state(name) or name in self.unified_states

    def gradient_leaves(self, name: str) -> bool:
        """Whether the gradient of this parameter leaves the device: where all do, or the host updates it."""
        return self.gradients == "host" and not (self.optimizer == "mixed" and self.updates_on_device(name))

    def explain(self) -> str:
        """The plan as text: one line a kind, then the reasons."""
        tiers = table(self.device, self.host, self.disk)
        return tiers + "\n" + "\n".join(f"- {line}" for line in self.reason)


_Choice = tuple[OptimizerPlacement, Placement, ParamsPlacement]  # optimizer, gradients, params


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One choice of (optimizer, gradients, params): what it takes by tier, and the capacities that it is for, in bytes.

    kept, unified, window, cache: as `kept_states`, `unified_states`, `disk_window` and `weight_cache` of a Plan.
    hybrid: why those are kept.
    """

    choice: _Choice
    device: TierBytes
    host: TierBytes
    disk: TierBytes
    kept: frozenset[str]
    unified: frozenset[str]
    hybrid: Hybrid | None
    window: DiskWindow | None
    cache: CacheSize | None
    device_capacity: int
    host_capacity: int


def make_plan(
    parameters: Sequence[ParameterSize],
    config: Config,
    *,
    device_kind: str,
    device_bytes: int,
    host_bytes: int,
    gradient_itemsize: int | None = None,
    memory_kind: MemoryKind | None = None,
    measure: Callable[[], Rates] | None = None,
    notes: Sequence[str] = (),
) -> Plan:
    """Chooses placements for `parameters` and counts bytes.

    device_kind: `"cpu"`, `"cuda"`, ...; device_bytes: free device memory, including what these weights
    already take there; host_bytes: available host memory. Budgets of `config` replace the measured figures.
    gradient_itemsize: bytes of a gradient element, None for that of the parameter. memory_kind: what a CUDA device
    shares with the host, for states that it updates there. measure: gives the machine's rates; asked once, where "auto"
    finds that not all states fit the device and may keep some of them there. notes: further reasons.

    Raises InvalidArgument when the device budget is too small for what was asked, or for anything under
    "auto", and OutOfHostMemory when the host budget is; both list what is needed and available by kind.
    """
    _check_masters(parameters, config)
    sizes = PlanSizes(parameters, config, gradient_itemsize)
    device_capacity, device_note = _device_capacity(config, device_bytes)
    host_capacity, host_note = _host_capacity(config, host_bytes)

    tried: list[str] = []
    refusal: str | None = None  # of the least offloading that fits the device, and not the host
    measured = None if measure is None or config.optimizer != "auto" else functools.cache(measure)
    for choice in _candidates(config, may_store=all(p.may_be_stored for p in sizes.trainable)):
        attempt = _attempt(sizes, choice, device_capacity, host_capacity, measured)
        choice, device, host = attempt.choice, attempt.device, attempt.host
        if device.total > device_capacity:
            tried.append(_over(choice, device.total, device_capacity, "device"))
        elif host.total > host_capacity:
            tried.append(_over(choice, host.total, host_capacity, "host"))
            refusal = refusal or _too_small("host", (device, host), host_capacity, host_note, config)
        else:
            break
    else:
        if refusal is not None:
            raise OutOfHostMemory(refusal)
        raise InvalidArgument(_too_small("device", (device, host), device_capacity, device_note, config))

    kept, unified, hybrid, window = attempt.kept, attempt.unified, attempt.hybrid, attempt.window
    optimizer, gradients, params = choice
    if optimizer == "mixed" and not kept and not unified:
        optimizer = "host"
    prefetch = config.prefetch or LEAST_PREFETCH
    if config.prefetch is None and params != "device":
        wider, _ = sizes.by_tier(*choice, kept=kept, unified=unified, prefetch=_WANTED_PREFETCH)
        if wider.total <= device_capacity:
            device, prefetch = wider, _WANTED_PREFETCH
    reason = [*tried, f"{_words(choice)}: {_chosen(config)}"]
    reason.append(f"device: {format_size(device.total)} of {format_size(device_capacity)} ({device_note})")
    if params != "device":
        reason.append(f"units of weights sent for ahead of their use: {prefetch}")
    if kept:
        reason.append(sizes.words_of(kept))
    if hybrid is not None:
        reason += [hybrid.words(), hybrid.words_of_step()]
        if hybrid.unified is not None:
            reason.append(hybrid.unified.words())
    reason.append(f"host: {format_size(host.total)} of {format_size(host_capacity)} ({host_note})")
    if unified:
        reason.append(sizes.words_of_unified(unified, memory_kind, params))
    if host.backups:
        reason.append(f"updates may begin in backward, with {format_size(host.backups)} of backups on the host")
    disk = attempt.disk
    if disk.total:
        ways = [f"a window of {format_size(host.window)}"] if window is not None else []
        ways += [f"a cache of {format_size(host.cache)} for weights"] if params == "disk" else []
        where = ", ".join(config.disk_paths)
        reason.append(f"disk: {format_size(disk.total)} in {where}, through {' and '.join(ways)} in host memory")
    activations, activation_host_bytes = place_activations(config, host_capacity - host.total)
    if activations == "device":
        reason.append("activations stay on the device")
    else:
        what = "what checkpoints save leaves" if activations == "checkpoints" else "activations leave"
        reason.append(f"{what} in forward and may take {format_size(activation_host_bytes)} on the host")
        if config.activation_format != "exact":
            reason.append(
                f"activations are rounded to {config.activation_format}: lossy, training differs from exact ones"
            )
    if config.moments != "fp32":
        reason.append(f"moments are rounded to {config.moments}: lossy, training differs from fp32 moments")
    if any(p.is_master for p in sizes.trainable):
        reason.append("masters are the bf16 weights, rounded stochastically: lossy, training differs from fp32 masters")
    reason += notes
    if device_kind == "cpu":
        reason.append("the compute device is the CPU: both tiers are one memory, and offloading saves none")
    return Plan(
        optimizer=optimizer,
        gradients=gradients,
        params=params,
        activations=activations,
        master=sizes.master_form(optimizer, kept),
        device_kind=device_kind,
        device=device,
        host=host,
        resident=sizes.by_tier("device", "device", "device")[0],
        device_capacity=device_capacity,
        host_capacity=host_capacity,
        trainable_count=sum(p.numel for p in parameters if p.trainable),
        frozen_count=sum(p.numel for p in parameters if not p.trainable),
        reason=tuple(reason),
        activation_host_bytes=activation_host_bytes,
        prefetch=prefetch,
        kept_states=kept,
        unified_states=unified,
        disk=disk,
        disk_window=window,
        weight_cache=attempt.cache,
    )


def try_placement(
    parameters: Sequence[ParameterSize],
    config: Config,
    *,
    device_bytes: int,
    host_bytes: int,
    gradient_itemsize: int | None = None,
) -> Attempt:
    """What the first placement that `config` allows takes, whether or not it fits; arguments as of `make_plan`."""
    sizes = PlanSizes(parameters, config, gradient_itemsize)
    device_capacity, host_capacity = _device_capacity(config, device_bytes)[0], _host_capacity(config, host_bytes)[0]
    return _attempt(sizes, _candidates(config)[0], device_capacity, host_capacity, None)


def _attempt(
    sizes: PlanSizes,
    choice: _Choice,
    device_capacity: int,
    host_capacity: int,
    measured: Callable[[], Rates] | None,
) -> Attempt:
    """Bytes by tier of one choice: with rates, of states on the host those stay that make an update shorter."""
    kept = sizes.kept_states(choice[0], choice[2])
    unified = sizes.unified_states(choice[0], choice[2], kept)
    device, host = sizes.by_tier(*choice, kept=kept, unified=unified)
    hybrid = None
    room = device_capacity - device.total
    if measured is not None and choice[0] == "host" and choice[2] == "device" and room > 0:
        hybrid = keep_fastest(sizes.state_bytes(choice[1]), room, measured())
        if hybrid.kept:
            choice, kept = ("mixed", *choice[1:]), hybrid.kept
            device, host = sizes.by_tier(*choice, kept=kept)
    host = dataclasses.replace(host, backups=sizes.backups(*choice, kept | unified))
    cache = sizes.cache(0) if choice[2] == "disk" else None  # the smallest one: the window leaves room for it
    left = host_capacity - host.total - (0 if cache is None else cache.nbytes)
    window = sizes.window(left) if choice[0] == "disk" else None
    if window is not None:
        host = dataclasses.replace(host, window=window.nbytes)
    if cache is not None:
        cache = sizes.cache(int((host_capacity - host.total) * _CACHE_SHARE))
        host = dataclasses.replace(host, cache=cache.nbytes)
    disk = sizes.on_disk(choice[0], choice[2])
    return Attempt(choice, device, host, disk, kept, unified, hybrid, window, cache, device_capacity, host_capacity)


def _check_masters(parameters: Sequence[ParameterSize], config: Config) -> None:
    for parameter in parameters:
        if parameter.trainable and parameter.dtype_name not in ("float32", "bfloat16", "float16"):
            raise InvalidArgument(
                f"parameter {parameter.name!r} is {parameter.dtype_name}: trainable parameters are float32, "
                "bfloat16 or float16; convert it or set requires_grad=False"
            )
        if parameter.trainable and parameter.dtype_name == "float16" and config.master in ("split", "bf16"):
            raise InvalidArgument(
                f"master={config.master!r} needs bfloat16 and parameter {parameter.name!r} is float16: use 'auto' or "
                "'fp32'"
            )


def _candidates(config: Config, *, may_store: bool = True) -> list[_Choice]:
    """Placements of (optimizer, gradients, params) that the config allows, the least offloaded first, disk last."""
    optimizer = _optimizer_of(config)
    states: tuple[OptimizerPlacement, ...] = ("device", "host", "mixed", "unified")
    places: tuple[Placement, ...] = ("device", "host")
    order = [(one, place) for place in places for one in states]
    if optimizer == config.gradients == "auto":
        order.remove(("device", "host"))  # optimizer states go first
    pairs = [pair for pair in order if _allows(optimizer, pair[0]) and _allows(config.gradients, pair[1])]
    on_disk: list[tuple[OptimizerPlacement, Placement]] = []
    if optimizer == "disk" or (optimizer == "auto" and config.disk_path is not None and may_store):
        on_disk = [("disk", place) for place in places if _allows(config.gradients, place)]
    choices = _with_params(pairs, config) + _with_params(on_disk, config)
    if config.params == "auto" and config.disk_path is not None and may_store:
        choices.append((*(on_disk or pairs)[-1], "disk"))
    return choices


def _with_params(pairs: list[tuple[OptimizerPlacement, Placement]], config: Config) -> list[_Choice]:
    on_device: list[_Choice] = [(*pair, "device") for pair in pairs]
    on_host: list[_Choice] = [(*pair, "host") for pair in pairs]
    if config.params == "auto":
        return [*on_device, *on_host[-1:]]  # weights go last
    if config.params == "disk":
        return [(*pair, "disk") for pair in pairs]
    return on_host if config.params == "host" else on_device


def _optimizer_of(config: Config) -> Tier | Literal["mixed"]:
    if isinstance(config.optimizer, str):
        return config.optimizer
    shares: Mapping[Tier, float] = config.optimizer_shares
    places = [place for place, share in shares.items() if share > 0.0]
    return places[0] if len(places) == 1 else "mixed"


def _words(choice: _Choice) -> str:
    optimizer, gradients, params = choice
    states = {
        "mixed": "optimizer in part on the host",
        "disk": "optimizer on disk",
        "unified": "optimizer on the host and updated by the device",
    }.get(optimizer, f"optimizer on the {optimizer}")
    weights = "params on disk" if params == "disk" else f"params on the {params}"
    return f"{states}, gradients on the {gradients} and {weights}"


def _allows(asked: Tier | Literal["mixed"], placement: OptimizerPlacement) -> bool:
    return asked == placement or (asked == "auto" and placement not in ("mixed", "unified"))


def _device_capacity(config: Config, device_bytes: int) -> tuple[int, str]:
    given = config.device_budget_bytes
    if given is not None:
        return given, f"the given budget; {format_size(device_bytes)} free"
    return (
        int(device_bytes * (1 - _ACTIVATION_SHARE)),
        f"{format_size(device_bytes)} free, {_ACTIVATION_SHARE:.0%} left to activations and workspace",
    )


def _host_capacity(config: Config, host_bytes: int) -> tuple[int, str]:
    given = config.host_budget_bytes
    if given is not None:
        return given, f"the given budget; {format_size(host_bytes)} free"
    return (
        int(host_bytes * (1 - _HOST_SHARE_FOR_OTHERS)),
        f"{format_size(host_bytes)} free, {_HOST_SHARE_FOR_OTHERS:.0%} left to others",
    )


def place_activations(config: Config, host_bytes_left: int) -> tuple[ActivationPlacement, int]:
    """Where activations go, and what they may take on the host: gradients that the user keeps need the rest."""
    if config.activation_share == 0:
        return "device", 0
    most = int(host_bytes_left * _ACTIVATIONS_HOST_SHARE)
    if config.activation_host_bytes is not None:
        most = min(most, config.activation_host_bytes)
    return "checkpoints" if config.activations == "checkpoints" else "host", most


def _chosen(config: Config) -> str:
    if "auto" not in (config.optimizer, config.gradients, config.params):
        return "as asked"
    return "the least offloading that fits the budgets"


def _too_small(
    tier: Literal["device", "host"],
    tiers: tuple[TierBytes, TierBytes],
    capacity: int,
    note: str,
    config: Config,
) -> str:
    device, host = tiers
    needed = device.total if tier == "device" else host.total
    states, gradients, params = _candidates(config)[-1]
    offloads_all = states not in ("device", "mixed") and gradients == "host" and params in ("host", "disk")
    if tier == "host":
        remedy = "raise host_budget, free host memory, or keep more on the device"
        if config.disk_path is None:
            remedy += "; with disk_path= optimizer states and weights may live on disk"
        elif params != "disk":
            remedy += "; with params='disk' weights may live on disk too"
    elif offloads_all:
        remedy = "raise device_budget, or use a model with smaller units: this is what offloading all of it leaves"
    else:
        remedy = (
            "raise device_budget, or let optimizer='auto', gradients='auto' and params='auto' move more to the host"
        )
    return (
        f"the {tier} budget is too small: {format_size(needed)} needed, {format_size(capacity)} available "
        f"({note}); {remedy}\n{table(device, host)}"
    )


def _over(choice: _Choice, needed: int, capacity: int, tier: str) -> str:
    return f"{_words(choice)} would take {format_size(needed)} of {format_size(capacity)} {tier} memory"
