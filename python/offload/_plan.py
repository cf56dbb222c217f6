"""The byte rule: sizes and budgets in, placement and bytes by tier out. Pure functions, no devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from ._config import Config, Tier, format_size
from ._errors import InvalidArgument, OutOfHostMemory

__all__ = ["ParameterSize", "Plan", "TierBytes", "make_plan"]

Placement = Literal["device", "host"]
ActivationPlacement = Literal["device", "host", "checkpoints"]
MasterForm = Literal["none", "fp32", "split", "mixed"]

# See [Note: bytes a parameter].
_SPLIT_MASTER_BYTES = 2
_FP32_MASTER_BYTES = 4
# Of a measured device, what is left to activations and workspace: their size is not known before the
# first step, and a quarter is what transformer training with checkpointing rarely exceeds.
_ACTIVATION_SHARE = 0.25
# Of what the host budget has left, what activations may take: they are most of what is not planned by size.
_ACTIVATIONS_HOST_SHARE = 0.75
# Of a measured host, what is left to everyone else (data loaders, page cache of the data).
_HOST_SHARE_FOR_OTHERS = 0.10


@dataclasses.dataclass(frozen=True)
class ParameterSize:
    """One parameter as the plan sees it; a tied parameter appears once.

    numel counts elements, itemsize is bytes an element, dtype_name is torch's (`"bfloat16"`). may_split: its
    optimizer can use a split master. moment_bytes: what that keeps beside a master, an element. unit: what it is
    streamed with; stays: it is on the device all the same.
    """

    name: str
    numel: int
    itemsize: int
    dtype_name: str
    trainable: bool = True
    unit: str = ""
    may_split: bool = True
    moment_bytes: int = 8
    stays: bool = False


@dataclasses.dataclass(frozen=True)
class TierBytes:
    """Bytes of one tier by kind.

    working: host copies of weights, the source of their upload; gradients: also, on the host,
    the copies that a host update of device gradients reads.
    """

    weights: int = 0
    working: int = 0
    master: int = 0
    moments: int = 0
    gradients: int = 0

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Plan:
    """What was chosen, what it takes and why.

    `device` and `host` are bytes by kind; `resident` is what the device would hold with nothing
    offloaded. Capacities are the budgets the choice was made against, in bytes. activation_host_bytes: what
    activations may take on the host, beside `host`.
    """

    optimizer: Placement
    gradients: Placement
    params: Placement
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

    def explain(self) -> str:
        """The plan as text: one line a kind, then the reasons."""
        return _table(self.device, self.host) + "\n" + "\n".join(f"- {line}" for line in self.reason)


# [Note: bytes a parameter] By tier, for weights of 2 bytes (bf16, fp16) and of 4 (fp32):
#   device   weight 2 | 4; of weights on the host only those that stay, and the window: the largest unit, times one
#            more than are sent for ahead
#   states on the device   moments 4 + 4 (Lion, Adagrad: 4); master 4 for 16-bit weights; an fp32 weight is its
#            own master
#   states on the host     moments as there; 16-bit: a working copy of 2 and a master of 4, or of 2 when it is
#            split (the working copy is its upper half); fp32: a master of 4, which is the working copy
#   weights on the host    a working copy of 2 | 4, where no state on the host has it already
#   gradient 2 | 4, where gradients live; a host update of device gradients needs them on the host too
# A frozen parameter has its weight and nothing else.

_Choice = tuple[Placement, Placement, Placement]  # optimizer, gradients, params


def make_plan(
    parameters: Sequence[ParameterSize],
    config: Config,
    *,
    device_kind: str,
    device_bytes: int,
    host_bytes: int,
    gradient_itemsize: int | None = None,
    notes: Sequence[str] = (),
) -> Plan:
    """Chooses placements for `parameters` and counts bytes.

    device_kind: `"cpu"`, `"cuda"`, ...; device_bytes: free device memory, including what these weights
    already take there; host_bytes: available host memory. Budgets of `config` replace the measured figures.
    gradient_itemsize: bytes of a gradient element, None for that of the parameter. notes: further reasons.

    Raises InvalidArgument when the device budget is too small for what was asked, or for anything under
    "auto", and OutOfHostMemory when the host budget is; both list what is needed and available by kind.
    """
    _check_masters(parameters, config)
    sizes = _Sizes(parameters, config, gradient_itemsize)
    device_capacity, device_note = _device_capacity(config, device_bytes)
    host_capacity, host_note = _host_capacity(config, host_bytes)

    candidates = _candidates(config)
    tried: list[str] = []
    for choice in candidates:
        device, host = sizes.by_tier(*choice)
        if device.total <= device_capacity:
            break
        tried.append(
            f"{_words(choice)} would take {format_size(device.total)} of {format_size(device_capacity)} device memory"
        )
    else:
        raise InvalidArgument(_too_small("device", device, host, device_capacity, device_note, config))
    if host.total > host_capacity:
        raise OutOfHostMemory(_too_small("host", device, host, host_capacity, host_note, config))

    optimizer, gradients, params = choice
    reason = [*tried, f"{_words(choice)}: {_chosen(config)}"]
    reason.append(f"device: {format_size(device.total)} of {format_size(device_capacity)} ({device_note})")
    reason.append(f"host: {format_size(host.total)} of {format_size(host_capacity)} ({host_note})")
    activations, activation_host_bytes = _activations(config, host_capacity - host.total)
    if activations == "device":
        reason.append("activations stay on the device")
    else:
        what = "what checkpoints save leaves" if activations == "checkpoints" else "activations leave"
        reason.append(f"{what} in forward and may take {format_size(activation_host_bytes)} on the host")
    reason += notes
    if device_kind == "cpu":
        reason.append("the compute device is the CPU: both tiers are one memory, and offloading saves none")
    return Plan(
        optimizer=optimizer,
        gradients=gradients,
        params=params,
        activations=activations,
        master=sizes.master_form(optimizer),
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
    )


class _Sizes:
    """Sums by kind over the parameters, wherever they end up."""

    def __init__(self, parameters: Sequence[ParameterSize], config: Config, gradient_itemsize: int | None) -> None:
        trainable = [p for p in parameters if p.trainable]
        self.host_masters = {_host_master_of(p, config) for p in trainable}
        self.weights = sum(p.numel * p.itemsize for p in parameters)
        self.window = sum(p.numel * p.itemsize for p in parameters if p.stays) + _window_bytes(parameters, config)
        # fp32 masters on the host are what their weights are uploaded from.
        self.upload_masters = sum(p.numel * p.itemsize for p in trainable if p.itemsize == 4)
        self.gradients = sum(p.numel * (gradient_itemsize or p.itemsize) for p in trainable)
        self.moments = sum(p.numel * p.moment_bytes for p in trainable)
        self.working = sum(p.numel * p.itemsize for p in trainable if p.itemsize == 2)
        self.device_master = sum(p.numel * _FP32_MASTER_BYTES for p in trainable if p.itemsize == 2)
        self.host_master = sum(p.numel * _host_master_bytes(p, config) for p in trainable)

    def master_form(self, optimizer: Placement) -> MasterForm:
        """How the masters that are stored beside weights are stored."""
        stored = self.host_masters - {"none"}
        if not stored:
            return "none"
        if optimizer == "device":
            return "fp32"
        return "mixed" if len(stored) > 1 else stored.pop()

    def by_tier(self, optimizer: Placement, gradients: Placement, params: Placement) -> tuple[TierBytes, TierBytes]:
        """Device and host bytes of one choice."""
        on_host = optimizer == "host"
        working = self.working if on_host else 0
        if params == "host":
            working = self.weights - (self.upload_masters if on_host else 0)
        device = TierBytes(
            weights=self.weights if params == "device" else min(self.weights, self.window),
            master=0 if on_host else self.device_master,
            moments=0 if on_host else self.moments,
            gradients=self.gradients if gradients == "device" else 0,
        )
        host = TierBytes(
            working=working,
            master=self.host_master if on_host else 0,
            moments=self.moments if on_host else 0,
            gradients=self.gradients if on_host or gradients == "host" else 0,
        )
        return device, host


def _host_master_of(parameter: ParameterSize, config: Config) -> Literal["none", "fp32", "split"]:
    if parameter.itemsize == 4:
        return "none"
    if parameter.may_split and parameter.dtype_name == "bfloat16" and config.master != "fp32":
        return "split"
    return "fp32"


def _host_master_bytes(parameter: ParameterSize, config: Config) -> int:
    return _SPLIT_MASTER_BYTES if _host_master_of(parameter, config) == "split" else _FP32_MASTER_BYTES


def _check_masters(parameters: Sequence[ParameterSize], config: Config) -> None:
    for parameter in parameters:
        if parameter.trainable and parameter.dtype_name not in ("float32", "bfloat16", "float16"):
            raise InvalidArgument(
                f"parameter {parameter.name!r} is {parameter.dtype_name}: trainable parameters are float32, "
                "bfloat16 or float16; convert it or set requires_grad=False"
            )
        if parameter.trainable and parameter.dtype_name == "float16" and config.master == "split":
            raise InvalidArgument(
                f"master='split' needs bfloat16 and parameter {parameter.name!r} is float16: use 'auto' or 'fp32'"
            )


def _window_bytes(parameters: Sequence[ParameterSize], config: Config) -> int:
    units: dict[str, int] = {}
    for parameter in parameters:
        if not parameter.stays:
            units[parameter.unit] = units.get(parameter.unit, 0) + parameter.numel * parameter.itemsize
    return (1 + config.prefetch) * max(units.values(), default=0)


def _candidates(config: Config) -> list[_Choice]:
    """Placements of (optimizer, gradients, params) that the config allows, the least offloaded first."""
    order: list[tuple[Placement, Placement]] = [
        ("device", "device"),
        ("host", "device"),
        ("device", "host"),
        ("host", "host"),
    ]
    if config.optimizer == config.gradients == "auto":
        order.remove(("device", "host"))  # optimizer states go first
    pairs = [pair for pair in order if _allows(config.optimizer, pair[0]) and _allows(config.gradients, pair[1])]
    on_device: list[_Choice] = [(*pair, "device") for pair in pairs]
    on_host: list[_Choice] = [(*pair, "host") for pair in pairs]
    if config.params == "auto":
        return [*on_device, on_host[-1]]  # weights go last
    return on_host if config.params == "host" else on_device


def _words(choice: _Choice) -> str:
    optimizer, gradients, params = choice
    return f"optimizer on the {optimizer}, gradients on the {gradients} and params on the {params}"


def _allows(asked: Tier, placement: Placement) -> bool:
    return asked in ("auto", placement)


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
    return "the least offloading that fits the device budget"


def _too_small(
    tier: Literal["device", "host"],
    device: TierBytes,
    host: TierBytes,
    capacity: int,
    note: str,
    config: Config,
) -> str:
    needed = device.total if tier == "device" else host.total
    offloads_all = _candidates(config)[-1] == ("host", "host", "host")
    if tier == "host":
        remedy = "raise host_budget, free host memory, or keep more on the device"
    elif offloads_all:
        remedy = "raise device_budget, or use a model with smaller units: this is what offloading all of it leaves"
    else:
        remedy = (
            "raise device_budget, or let optimizer='auto', gradients='auto' and params='auto' move more to the host"
        )
    return (
        f"the {tier} budget is too small: {format_size(needed)} needed, {format_size(capacity)} available "
        f"({note}); {remedy}\n{_table(device, host)}"
    )


def _table(device: TierBytes, host: TierBytes) -> str:
    rows = [("", "device", "host")]
    rows += [
        (field.name, format_size(getattr(device, field.name)), format_size(getattr(host, field.name)))
        for field in dataclasses.fields(TierBytes)
    ]
    rows.append(("total", format_size(device.total), format_size(host.total)))
    return "\n".join(f"{kind:<10}{on_device:>14}{on_host:>14}" for kind, on_device, on_host in rows)
