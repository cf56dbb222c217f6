"""The byte rule: sizes and budgets in, placement and bytes by tier out. Pure functions, no devices."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Literal

from ._config import Config, Tier, format_size
from ._disk_window import CacheSize, DiskWindow, image_bytes, plan_cache, plan_window
from ._errors import InvalidArgument, OutOfHostMemory
from ._hybrid import Rates, StateBytes, keep_fastest
from ._parameter_size import MASTER_BYTES, MasterFormat, ParameterSize, largest_unit, states_that_stay
from ._tier_bytes import TierBytes, table
from ._unified_plan import MemoryKind, check_room, words_of_unified

__all__ = ["ParameterSize", "Plan", "TierBytes", "make_plan"]

Placement = Literal["device", "host"]
ParamsPlacement = Literal["device", "host", "disk"]
OptimizerPlacement = Literal["device", "host", "disk", "unified", "mixed"]
ActivationPlacement = Literal["device", "host", "checkpoints"]
MasterForm = Literal["none", "fp32", "split", "bf16", "mixed"]

# See [Note: bytes a parameter].
# Of a measured device, what is left to activations and workspace: their size is not known before the
# first step, and a quarter is what transformer training with checkpointing rarely exceeds.
_ACTIVATION_SHARE = 0.25
# Of what the host budget has left, what activations may take: they are most of what is not planned by size.
_ACTIVATIONS_HOST_SHARE = 0.75
# Of what the host budget has left, what the window of states on disk takes, and no more than so many bytes: it keeps
# what fits of states that are many times larger as a rule.
_WINDOW_SHARE, _MOST_WINDOW_BYTES = 0.5, 1 << 30
# Of what the host budget has left then, what weights on disk pass through, and no more than all of them take: sums of
# gradients over micro-batches take the rest for a while.
_CACHE_SHARE = 0.75
# How many units of weights are sent for ahead of their use. With one, the link waits from the end of an upload until
# the next touch sends for another; with a second one queued behind it, it does not while touches come as fast as
# uploads. More would only smooth units of unequal size. Neither the rate of the link nor the compute of a unit is
# known here, so the second one is taken wherever its memory is there.
_LEAST_PREFETCH, _WANTED_PREFETCH = 1, 2
# Of a measured host, what is left to everyone else (data loaders, page cache of the data).
_HOST_SHARE_FOR_OTHERS = 0.10


@dataclasses.dataclass(frozen=True)
class Plan:
    """What was chosen, what it takes and why.

    `device`, `host`, `disk` and `unified` are bytes by kind, of which `unified` counts against the host's budget;
    `resident` is what the device would hold with nothing offloaded.
    Capacities are the budgets the choice was made against, in bytes. activation_host_bytes: what activations may take
    on the host, beside `host`. prefetch: units of weights that are sent for ahead, with params off the device.
    kept_states: with a mixed optimizer, the parameters whose states stay on the device. disk_window: with the optimizer
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
    prefetch: int = _LEAST_PREFETCH
    kept_states: frozenset[str] = frozenset()
    disk: TierBytes = dataclasses.field(default_factory=TierBytes)
    disk_window: DiskWindow | None = None
    weight_cache: CacheSize | None = None
    unified: TierBytes = dataclasses.field(default_factory=TierBytes)

    def keeps_state(self, name: str) -> bool:
        """Whether the optimizer state of this parameter is the device's: there, or in unified memory."""
        return self.optimizer in _UPDATED_BY_DEVICE or name in self.kept_states

    def gradient_leaves(self, name: str) -> bool:
        """Whether the gradient of this parameter leaves the device: not to come back for a state that stays."""
        return self.gradients == "host" and name not in self.kept_states

    def explain(self) -> str:
        """The plan as text: one line a kind, then the reasons."""
        tiers = table(self.device, self.host, self.disk, self.unified)
        return tiers + "\n" + "\n".join(f"- {line}" for line in self.reason)


# [Note: bytes a parameter] By tier, for weights of 2 bytes (bf16, fp16) and of 4 (fp32):
#   device   weight 2 | 4; of weights on the host only those that stay, and the window: the largest unit, times one
#            more than are sent for ahead
#   states on the device   moments 4 + 4 (Lion, Adagrad: 4), in bf16 half of it, in int8 a quarter and 4 for each scale;
#            master 4 for 16-bit weights; an fp32 weight is its own master
#   states in unified memory   as on the device: the master of an fp32 weight is the weight, and is there
#   states on the host     moments as there; 16-bit: a working copy of 2 and a master of 4, or of 2 when it is
#            split (the working copy is its upper half); fp32: a master of 4, which is the working copy
#   bf16 masters           none: the weight on the device, or the working copy on the host, is the master
#   states on disk         as on the host, but for the working copy of 16-bit weights, which stays there; an fp32 weight
#            on the device has none, and one on the host is its own master there. The host has the window too
#   weights on the host    a working copy of 2 | 4, where no state on the host has it already
#   weights on disk        2 | 4 there; on the host only a cache of them. The upper half of a split master is the weight
#            on disk; the lower half is where the moments are
#   gradient 2 | 4, where gradients live; a host update of device gradients needs them on the host too
# A frozen parameter has its weight and nothing else. With a mixed optimizer each state counts where it is, and
# gradients on the host are those of the states there.

_Choice = tuple[OptimizerPlacement, Placement, ParamsPlacement]  # optimizer, gradients, params
_UPDATED_BY_DEVICE: tuple[OptimizerPlacement, ...] = ("device", "unified")


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
    shares with the host, for states in unified memory. measure: gives the machine's rates; asked once, where "auto"
    finds that not all states fit the device and may keep some of them there. notes: further reasons.

    Raises InvalidArgument when the device budget is too small for what was asked, or for anything under
    "auto", and OutOfHostMemory when the host budget is; both list what is needed and available by kind.
    """
    _check_masters(parameters, config)
    sizes = _Sizes(parameters, config, gradient_itemsize)
    device_capacity, device_note = _device_capacity(config, device_bytes)
    host_capacity, host_note = _host_capacity(config, host_bytes)

    tried: list[str] = []
    refusal: str | None = None  # of the least offloading that fits the device, and not the host
    measured = None if measure is None or config.optimizer != "auto" else functools.cache(measure)
    for choice in _candidates(config, may_store=all(p.may_be_stored for p in sizes.trainable)):
        kept = sizes.kept_states(choice[0], choice[2])
        device, host = sizes.by_tier(*choice, kept=kept)
        hybrid = None
        room = device_capacity - device.total
        if measured is not None and choice[0] == "host" and choice[2] == "device" and room > 0:
            hybrid = keep_fastest(sizes.state_bytes(choice[1]), room, measured())
            if hybrid.kept:
                choice, kept = ("mixed", *choice[1:]), hybrid.kept
                device, host = sizes.by_tier(*choice, kept=kept)
        unified = sizes.in_unified(choice[0])
        on_host = host.total + unified.total
        cache = sizes.cache(0) if choice[2] == "disk" else None  # the smallest one: the window leaves room for it
        left = host_capacity - on_host - (0 if cache is None else cache.nbytes)
        window = sizes.window(left) if choice[0] == "disk" else None
        if window is not None:
            host = dataclasses.replace(host, window=window.nbytes)
            on_host += window.nbytes
        if cache is not None:
            cache = sizes.cache(int((host_capacity - on_host) * _CACHE_SHARE))
            host = dataclasses.replace(host, cache=cache.nbytes)
            on_host += cache.nbytes
        if device.total > device_capacity:
            tried.append(_over(choice, device.total, device_capacity, "device"))
        elif on_host > host_capacity:
            tried.append(_over(choice, on_host, host_capacity, "host"))
            refusal = refusal or _too_small("host", (device, host, unified), host_capacity, host_note, config)
        else:
            break
    else:
        if refusal is not None:
            raise OutOfHostMemory(refusal)
        raise InvalidArgument(_too_small("device", (device, host, unified), device_capacity, device_note, config))

    optimizer, gradients, params = choice
    check_room(memory_kind, unified.total, device.total, device_bytes)
    if optimizer == "mixed" and not kept:
        optimizer = "host"
    prefetch = config.prefetch or _LEAST_PREFETCH
    if config.prefetch is None and params != "device":
        wider, _ = sizes.by_tier(*choice, kept=kept, prefetch=_WANTED_PREFETCH)
        if wider.total <= device_capacity:
            device, prefetch = wider, _WANTED_PREFETCH
    reason = [*tried, f"{_words(choice)}: {_chosen(config)}"]
    reason.append(f"device: {format_size(device.total)} of {format_size(device_capacity)} ({device_note})")
    if params != "device":
        reason.append(f"units of weights sent for ahead of their use: {prefetch}")
    if kept:
        reason.append(sizes.words_of(kept))
    if hybrid is not None:
        reason.append(hybrid.words())
    reason.append(f"host: {format_size(on_host)} of {format_size(host_capacity)} ({host_note})")
    if optimizer == "unified":
        reason.append(words_of_unified(memory_kind, unified.total, sizes.copied_bytes()))
    disk = sizes.on_disk(optimizer, params)
    if disk.total:
        ways = [f"a window of {format_size(host.window)}"] if window is not None else []
        ways += [f"a cache of {format_size(host.cache)} for weights"] if params == "disk" else []
        where = ", ".join(config.disk_paths)
        reason.append(f"disk: {format_size(disk.total)} in {where}, through {' and '.join(ways)} in host memory")
    activations, activation_host_bytes = _activations(config, host_capacity - on_host)
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
        disk=disk,
        disk_window=window,
        weight_cache=cache,
        unified=unified,
    )


class _Sizes:
    """Sums by kind over the parameters, wherever they end up."""

    def __init__(self, parameters: Sequence[ParameterSize], config: Config, gradient_itemsize: int | None) -> None:
        self.parameters = parameters
        self.trainable = [p for p in parameters if p.trainable]
        self.config = config
        self.gradient_itemsize = gradient_itemsize
        self.weights = sum(p.numel * p.itemsize for p in parameters)
        self.stays = sum(p.numel * p.itemsize for p in parameters if p.stays)
        self.largest_unit = largest_unit(parameters)
        self.prefetch = config.prefetch or _LEAST_PREFETCH

    def kept_states(self, optimizer: OptimizerPlacement, params: ParamsPlacement) -> frozenset[str]:
        """The parameters whose states stay on the device when a share of them is to leave."""
        if optimizer != "mixed":
            return frozenset()
        assert isinstance(self.config.optimizer, float)
        return states_that_stay(self.trainable, self.config.optimizer, by_unit=params != "device")

    def state_bytes(self, gradients: Placement) -> list[StateBytes]:
        """Each state as `keep_fastest` weighs it, with weights on the device."""
        return [self._state_bytes_of(p, gradients) for p in self.trainable]

    def _state_bytes_of(self, parameter: ParameterSize, gradients: Placement) -> StateBytes:
        gradient, weight = self._gradient_bytes([parameter]), parameter.numel * parameter.itemsize
        master = parameter.numel * _host_master_bytes(parameter, self.config)
        # The host reads and writes the states. A gradient comes in and is read; a 16-bit weight is written, read where
        # it is the master or half of it, and goes out; an fp32 one, which is the master, goes out.
        passes = 1 if parameter.itemsize == 4 else 2 if _host_master_of(parameter, self.config) == "fp32" else 3
        return StateBytes(
            name=parameter.name,
            kept=parameter.state_bytes + (gradient if gradients == "host" else 0),
            to_host=gradient,
            to_device=weight,
            host_update=2 * (gradient + parameter.moments + master) + passes * weight,
            # There a weight that is its own master is read and written.
            device_update=gradient + 2 * parameter.state_bytes + (1 if parameter.device_master else 2) * weight,
        )

    def words_of(self, kept: frozenset[str]) -> str:
        total = sum(p.state_bytes for p in self.trainable)
        away = [p for p in self.trainable if p.name not in kept]
        return (
            f"optimizer states of {len(away)} of {len(self.trainable)} parameters are on the host, "
            f"{sum(p.state_bytes for p in away) / total:.1%} of their bytes; the model's first that fit stay"
        )

    def master_form(self, optimizer: OptimizerPlacement, kept: frozenset[str]) -> MasterForm:
        """How the masters that are stored beside weights are stored."""
        forms: set[MasterForm] = {
            "fp32"
            if not p.is_master and (optimizer in _UPDATED_BY_DEVICE or p.name in kept)
            else _host_master_of(p, self.config)
            for p in self.trainable
            if p.itemsize == 2
        }
        if not forms:
            return "none"
        return "mixed" if len(forms) > 1 else forms.pop()

    def by_tier(
        self,
        optimizer: OptimizerPlacement,
        gradients: Placement,
        params: ParamsPlacement,
        *,
        kept: frozenset[str] = frozenset(),
        prefetch: int | None = None,
    ) -> tuple[TierBytes, TierBytes]:
        """Device and host bytes of one choice. prefetch: None for the configured or least one."""
        window = self.stays + (1 + (prefetch or self.prefetch)) * self.largest_unit
        staying = [p for p in self.trainable if optimizer in _UPDATED_BY_DEVICE or p.name in kept]
        leaving = [p for p in self.trainable if optimizer not in _UPDATED_BY_DEVICE and p.name not in kept]
        # What stays on the device has a copy on the host, and is counted so though most of it has it on disk.
        copied = [p for p in leaving if params != "disk" or p.stays]
        working = sum(p.numel * p.itemsize for p in copied if p.itemsize == 2)
        mastered = [p for p in leaving if p.itemsize == 2] + [p for p in copied if p.itemsize == 4]
        on_disk = optimizer == "disk"
        if params == "host":  # fp32 masters on the host are what their weights are uploaded from
            working = self.weights
            if not on_disk:
                working -= sum(p.numel * p.itemsize for p in leaving if p.itemsize == 4)
        gone = [] if gradients == "device" else leaving or staying
        states = _states_of_device(staying if optimizer != "unified" else ())
        device = dataclasses.replace(
            states,
            weights=self.weights if params == "device" else min(self.weights, window),
            gradients=self._gradient_bytes(self.trainable) - self._gradient_bytes(gone),
        )
        host = TierBytes(
            working=working,
            master=0 if on_disk else sum(p.numel * _host_master_bytes(p, self.config) for p in mastered),
            moments=0 if on_disk else sum(p.moments for p in leaving),
            gradients=self._gradient_bytes(leaving or gone),
        )
        return device, host

    def in_unified(self, optimizer: OptimizerPlacement) -> TierBytes:
        """Bytes of the states in unified memory."""
        return _states_of_device(self.trainable if optimizer == "unified" else ())

    def copied_bytes(self) -> int:
        """What an update on the host copies at a step: gradients there, and weights back."""
        return self._gradient_bytes(self.trainable) + sum(p.numel * p.itemsize for p in self.trainable)

    def on_disk(self, optimizer: OptimizerPlacement, params: ParamsPlacement) -> TierBytes:
        """Disk bytes of states and weights, but for what rounding to blocks adds."""
        working = self.weights if params == "disk" else 0
        if optimizer != "disk":
            return TierBytes(working=working)
        return TierBytes(
            working=working,
            master=sum(
                p.numel * _host_master_bytes(p, self.config)
                for p in self.trainable
                if p.itemsize == 2 or params == "device"
            ),
            moments=sum(p.numel * p.moment_bytes for p in self.trainable),
        )

    def cache(self, wanted_bytes: int) -> CacheSize:
        """What weights on disk pass through, at most `wanted_bytes` unless that is too little."""
        units: dict[str, list[int]] = {}
        for p in self.parameters:
            units.setdefault(p.unit, []).append(p.numel * p.itemsize)
        return plan_cache([image_bytes(sizes) for sizes in units.values()], wanted_bytes, self.config.disk_block_bytes)

    def window(self, host_bytes_left: int) -> DiskWindow:
        """What states on disk pass through, of what the host budget leaves."""
        wanted = self.config.disk_window_bytes
        if wanted is None:
            wanted = min(int(host_bytes_left * _WINDOW_SHARE), _MOST_WINDOW_BYTES)
        largest = max((_host_master_bytes(p, self.config) + p.moment_bytes for p in self.trainable), default=1)
        return plan_window([p.numel for p in self.trainable], largest, wanted)

    def _gradient_bytes(self, parameters: Sequence[ParameterSize]) -> int:
        return sum(p.numel * (self.gradient_itemsize or p.itemsize) for p in parameters)


def _states_of_device(parameters: Sequence[ParameterSize]) -> TierBytes:
    """Masters and moments in the form that the device updates."""
    return TierBytes(master=sum(p.device_master for p in parameters), moments=sum(p.moments for p in parameters))


def _host_master_of(parameter: ParameterSize, config: Config) -> MasterFormat:
    if parameter.is_master:
        return "bf16"
    if parameter.may_split and parameter.dtype_name == "bfloat16" and config.master != "fp32":
        return "split"
    return "fp32"


def _host_master_bytes(parameter: ParameterSize, config: Config) -> int:
    return MASTER_BYTES[_host_master_of(parameter, config)]


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
    order: list[tuple[OptimizerPlacement, Placement]] = [
        ("device", "device"),
        ("host", "device"),
        ("mixed", "device"),
        ("unified", "device"),
        ("device", "host"),
        ("host", "host"),
        ("mixed", "host"),
        ("unified", "host"),
    ]
    if optimizer == config.gradients == "auto":
        order.remove(("device", "host"))  # optimizer states go first
    pairs = [pair for pair in order if _allows(optimizer, pair[0]) and _allows(config.gradients, pair[1])]
    on_disk: list[tuple[OptimizerPlacement, Placement]] = []
    if optimizer == "disk" or (optimizer == "auto" and config.disk_path is not None and may_store):
        places: tuple[Placement, ...] = ("device", "host")
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
    share = config.optimizer
    if not isinstance(share, float):
        return share
    return "device" if share == 0.0 else "host" if share == 1.0 else "mixed"


def _words(choice: _Choice) -> str:
    optimizer, gradients, params = choice
    states = "optimizer in part on the host" if optimizer == "mixed" else f"optimizer on the {optimizer}"
    states = {"disk": "optimizer on disk", "unified": "optimizer in unified memory"}.get(optimizer, states)
    weights = "params on disk" if params == "disk" else f"params on the {params}"
    return f"{states}, gradients on the {gradients} and {weights}"


def _allows(asked: Tier | Literal["mixed"], placement: OptimizerPlacement) -> bool:
    return asked == placement or (asked == "auto" and placement not in ("mixed", "unified"))


def _device_capacity(config: Config, device_bytes: int) -> tuple[int, str]:
    given = config.device_budget_bytes
    if given is not None:
        return given, f"the given budget; {format_size(device_bytes)} measured"
    return (
        int(device_bytes * (1 - _ACTIVATION_SHARE)),
        f"{format_size(device_bytes)} measured, {_ACTIVATION_SHARE:.0%} left to activations and workspace",
    )


def _host_capacity(config: Config, host_bytes: int) -> tuple[int, str]:
    given = config.host_budget_bytes
    if given is not None:
        return given, f"the given budget; {format_size(host_bytes)} measured"
    return (
        int(host_bytes * (1 - _HOST_SHARE_FOR_OTHERS)),
        f"{format_size(host_bytes)} measured, {_HOST_SHARE_FOR_OTHERS:.0%} left to others",
    )


def _activations(config: Config, host_bytes_left: int) -> tuple[ActivationPlacement, int]:
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
    tiers: tuple[TierBytes, TierBytes, TierBytes],
    capacity: int,
    note: str,
    config: Config,
) -> str:
    device, host, unified = tiers
    needed = device.total if tier == "device" else host.total + unified.total
    states, gradients, params = _candidates(config)[-1]
    offloads_all = states not in ("device", "mixed") and gradients == "host" and params in ("host", "disk")
    if tier == "host":
        remedy = "raise host_budget, free host memory, or keep more on the device"
        if config.disk_path is None:
            remedy += "; with disk_path= optimizer states and weights may live on disk"
    elif offloads_all:
        remedy = "raise device_budget, or use a model with smaller units: this is what offloading all of it leaves"
    else:
        remedy = (
            "raise device_budget, or let optimizer='auto', gradients='auto' and params='auto' move more to the host"
        )
    return (
        f"the {tier} budget is too small: {format_size(needed)} needed, {format_size(capacity)} available "
        f"({note}); {remedy}\n{table(device, host, unified=unified)}"
    )


def _over(choice: _Choice, needed: int, capacity: int, tier: str) -> str:
    return f"{_words(choice)} would take {format_size(needed)} of {format_size(capacity)} {tier} memory"
