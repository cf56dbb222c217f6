"""What goes where, and how much memory may be used: the options of `offload.wrap`."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from ._activation_order import DEFAULT_KEEP
from ._errors import InvalidArgument

if TYPE_CHECKING:
    import torch

__all__ = [
    "ActivationForm", "Config", "Master", "Moments", "Tier", "check_activation_form", "format_size", "parse_size",
]  # fmt: skip

Tier = Literal["device", "host", "disk", "unified", "auto"]
Master = Literal["auto", "fp32", "split", "bf16"]
Moments = Literal["fp32", "bf16", "int8"]
ActivationForm = Literal["exact", "int8", "fp8"]

_TIERS = ("device", "host", "disk", "auto")
# What this release can do; the rest of _TIERS is refused as "not yet".
_SUPPORTED_TIERS: dict[str, tuple[str, ...]] = {
    "optimizer": ("device", "host", "disk", "unified", "auto"),
    "gradients": ("device", "host", "auto"),
    "params": ("device", "host", "disk", "auto"),
}
# Between which the optimizer's states can be shared, in the order in which the first parameters fill them.
_SHARED_PLACES = ("device", "unified", "host")
_SHARE_TOLERANCE = 1e-6
_ACTIVATION_PLACES = ("device", "host", "checkpoints", "auto")
# What the disk tier takes (csrc/storage/block_file.cpp).
_DISK_ALIGNMENT = 4096
_MOST_DISK_BLOCK = 1 << 30
_MOST_DISK_DEPTH = 4096
_UNIT_BYTES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNIT_BYTES |= {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*([kmgt]i?|)b?\s*", re.IGNORECASE)
_MOST_BYTES = 1 << 62  # what the native core counts with


def parse_size(size: int | str) -> int:
    """Bytes of a size such as `"24GiB"`, `"1.5 GB"`, `"512"` or an int.

    KiB, MiB, GiB, TiB are powers of 1024; kB, MB, GB, TB (and K, M, G, T) powers of 1000. Fractions of a
    byte are dropped. Raises InvalidArgument for anything else, negative numbers and more than 2**62 included.
    """
    nbytes = _read_size(size)
    if nbytes > _MOST_BYTES:
        raise InvalidArgument(f"size {size!r} is more than any machine has: give bytes or text such as '24GiB'")
    return nbytes


def _read_size(size: int | str) -> int:
    if isinstance(size, int) and not isinstance(size, bool):
        if size < 0:
            raise InvalidArgument(f"size {size} is negative: give bytes >= 0 or text such as '24GiB'")
        return size
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if match is None:
        raise InvalidArgument(f"size {size!r} is not understood: give bytes or text such as '24GiB'")
    digits, unit = match.groups()
    # Integers stay exact; only a fraction goes through a float.
    factor = _UNIT_BYTES[unit.lower()]
    return int(float(digits) * factor) if "." in digits else int(digits) * factor


def format_size(size_bytes: int) -> str:
    """Human text of a number of bytes, in powers of 1024: `"1.50 GiB"`."""
    value, units = float(size_bytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(value) >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{size_bytes} B" if units[0] == "B" else f"{value:.2f} {units[0]}"


@dataclasses.dataclass(frozen=True)
class Config:
    """The options of `offload.wrap`; immutable and checked when made.

    optimizer, gradients, params: where each kind of tensor lives: `"device"`, `"host"` or `"auto"` (the least that
        fits the budgets is offloaded, optimizer states first). optimizer is also `"disk"`: masters and moments of a
        native optimizer live in files, and pass through a window of host memory while they are updated; `"auto"` takes
        it last of all, and only with a disk_path. With `"unified"` states of a native optimizer lie on the host, within
        host_budget, and the device updates them there: they cross its link, gradients and weights do not. That is for
        devices that share memory with the host (see `offload.unified.classify`), and elsewhere for a part of the
        states; `"auto"` never takes it. It is also a share (a float, 0.0 to 1.0): at least so much of the bytes of its
        states lives on the host, the other states stay, the first in the model's order, and gradients with them. Or it
        is shares of `"device"`, `"unified"` and `"host"` that add up to 1 (`{"unified": 0.6, "host": 0.4}`): in this
        order the parameters fill them, the model's first ones first. Where the states of native optimizers do not all
        fit a CUDA device beside the weights, `"auto"` measures for a moment and keeps there, within the budget, those
        with which a step's update is shortest. The bits of training do not depend on it.
        params is also `"disk"`: weights live in such files, and pass through a cache of host memory, within
        host_budget, on their way to the device; native optimizers only. `"auto"` takes that after states on disk.
    activations: what autograd saves in forward: `"device"`, `"host"`, `"checkpoints"` (only what
        torch.utils.checkpoint saves leaves, the inputs of its blocks), a share (a float, 0.0 to 1.0: so much of it
        may leave, the first that was saved) or host bytes (`"8GiB"`, an int: no more may leave). `"auto"` keeps them
        on the device, as their size is not known before they run.
    activation_format: how activations travel: `"exact"`, and lossy `"int8"` and `"fp8"`: a byte an element and a scale
        for every 256 of them, half the bytes of bf16 and a quarter of fp32's. Only floating-point tensors that
        gradients flow through are rounded (what torch.compile's code saves is not seen as such), and backward alone
        reads what they were rounded to: losses differ from those of exact activations, and not between kernels and
        torch operations.
    device: the compute device, as torch names it: what is on the CPU is taken there; None: where the parameters are.
    device_budget: what weights, optimizer states and gradients may take on the device (`"24GiB"` or bytes);
        None measures the free memory and leaves a quarter of it to activations and workspace.
    host_budget: what offload may take on the host; None measures.
    disk_path: a directory that is there, or several on drives of their own, for the files of what lives on disk:
        private ones that no other process sees, and that go with this one. Not in memory (tmpfs), and not shared with
        another process.
    disk_window: the host bytes (`"4GiB"`, an int) that states on disk pass through, within host_budget; None: half of
        what the host budget leaves, at most 1 GiB. What they held last is not read again.
    disk_block: bytes of one transfer to or from the disk, a multiple of 4096: each has a checksum.
    disk_queue_depth: transfers under way at once, a path; None: 16 by io_uring, 8 by threads.
    speculate: host bytes (`"48GiB"`, an int), within host_budget, for backups that let updates begin in backward, ahead
        of `step()`: for runs that clip rarely, with steps too short to hide the update. Exact: an update that turns out
        otherwise (clipped, another gradient or rate) is taken back to the byte and done again. The parameters whose
        gradients come first have the room. None and 0: every update begins in `step()`.
    run_ahead: a forward does not wait while the host still updates a streamed weight (params="host"): the stream that
        uploads it does, so that what the unit computes is launched already when the weight comes. Exact. An update that
        fails is then told by the next unit, backward or step. For CUDA devices; elsewhere, and where the driver does
        not do it, the forward waits and `stats()` says why.
    units: what travels together: module classes and names (`[Block, "head"]`), or a predicate over modules; None
        finds the elements of repeated lists. What is in no unit so named is in the units around it.
    prefetch: how many units of weights are sent for ahead of their use, with params off the device: 1 or more; None
        lets the plan choose.
    master: the fp32 master of a 16-bit weight: `"split"` stores it as the bf16 weight plus a 16-bit remainder
        (bf16 only, exact), `"fp32"` beside the weight, `"auto"` splits where it can. fp32 weights need none. `"bf16"`
        is lossy and for bf16 weights under native optimizers: the weight itself is all that is kept, and each step
        rounds it stochastically.
    moments: how Adam, AdamW and Lion store their moments: `"fp32"`, and lossy `"bf16"` (half the bytes) and `"int8"`
        (a quarter, with a scale for every 256 elements). The step computes in fp32 and then rounds what it keeps,
        stochastically: the losses differ from those of fp32, and not between placements, devices and thread counts.
    rounding_seed: which random bits `moments` and a bf16 `master` are rounded with.
    lazy: `step()` returns while the update still runs; every read waits for it. False waits in `step()`.
    pin: page-lock host memory; `"auto"` does so when the device is an accelerator.
    poison: fill memory that must not be read with NaN (for tests); None reads `OFFLOAD_POISON`.
    grad_dtype: what gradients add up in: None, the parameter's own dtype, or `"fp32"`, which makes `p.grad` of 16-bit
        parameters fp32, at two bytes more an element (needs torch 2.10 or newer). As torch does it,
        each use of a tied weight is widened too, before they are added.

    Raises InvalidArgument naming the option, the value and what is legal.
    """

    optimizer: Tier | float | Mapping[Tier, float] = "auto"
    gradients: Tier = "auto"
    params: Tier = "auto"
    activations: str | int | float = "auto"
    activation_format: ActivationForm = "exact"
    device: str | torch.device | None = None
    device_budget: int | str | None = None
    host_budget: int | str | None = None
    disk_path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None
    disk_window: int | str | None = None
    disk_block: int | str = 1 << 20
    disk_queue_depth: int | None = None
    speculate: int | str | None = None
    run_ahead: bool = False
    prefetch: int | None = None
    units: Any = None
    master: Master = "auto"
    moments: Moments = "fp32"
    rounding_seed: int = 0
    lazy: bool = True
    pin: bool | Literal["auto"] = "auto"
    poison: bool | None = None
    grad_dtype: Literal["fp32"] | None = None

    def __post_init__(self) -> None:
        for kind, supported in _SUPPORTED_TIERS.items():
            if kind == "optimizer":
                object.__setattr__(self, "optimizer", _check_optimizer(self.optimizer, supported))
            else:
                _check_tier(kind, getattr(self, kind), supported)
        _check_activations(self.activations)
        check_activation_form("activation_format", self.activation_format)
        if self.activation_format != "exact" and self.activation_share == 0:
            raise InvalidArgument(
                f"activation_format={self.activation_format!r} with activations={self.activations!r}: none leave; pass "
                "activations='host', 'checkpoints', a share or host bytes"
            )
        if self.device is not None:
            object.__setattr__(self, "device", str(self.device))
        for name in ("device_budget", "host_budget", "speculate"):
            _check_budget(name, getattr(self, name))
        object.__setattr__(self, "disk_path", _check_disk_path(self.disk_path))
        for kind in ("optimizer", "params"):
            if getattr(self, kind) == "disk" and self.disk_path is None:
                raise InvalidArgument(f"{kind}='disk' needs disk_path: name a directory on a drive of this machine")
        if self.params == "disk" and self.optimizer_shares.get("unified"):
            raise InvalidArgument(
                f"optimizer={self.optimizer!r} with params='disk': the device does not update weights on disk; pass "
                "params='host', or optimizer='disk' or 'host'"
            )
        _check_budget("disk_window", self.disk_window)
        _check_disk_block(self.disk_block)
        depth = 1 if self.disk_queue_depth is None else self.disk_queue_depth
        if isinstance(depth, bool) or not isinstance(depth, int) or not 1 <= depth <= _MOST_DISK_DEPTH:
            raise InvalidArgument(
                f"disk_queue_depth={self.disk_queue_depth!r}: give transfers under way at once, 1 to "
                f"{_MOST_DISK_DEPTH}, or None"
            )
        ahead = 1 if self.prefetch is None else self.prefetch
        if isinstance(ahead, bool) or not isinstance(ahead, int) or ahead < 1:
            raise InvalidArgument(
                f"prefetch={self.prefetch!r}: give the number of units to send for ahead, 1 or more, or None"
            )
        object.__setattr__(self, "units", _check_units(self.units))
        _check_choice("master", self.master, ("auto", "fp32", "split", "bf16"))
        _check_choice("moments", self.moments, ("fp32", "bf16", "int8"))
        if self.moments != "fp32" and self.optimizer == "disk":
            raise InvalidArgument(
                f"moments={self.moments!r} with optimizer='disk': moments on disk are fp32; pass moments='fp32', or "
                "optimizer='host'"
            )
        for option in ("optimizer", "params"):
            if self.master == "bf16" and getattr(self, option) == "disk":
                raise InvalidArgument(
                    f"master='bf16' with {option}='disk': masters on disk are exact; pass master='auto', or "
                    f"{option}='host'"
                )
        if isinstance(self.rounding_seed, bool) or not isinstance(self.rounding_seed, int):
            raise InvalidArgument(f"rounding_seed={self.rounding_seed!r}: give an integer")
        _check_choice("lazy", self.lazy, (True, False))
        _check_choice("run_ahead", self.run_ahead, (True, False))
        _check_choice("pin", self.pin, ("auto", True, False))
        _check_choice("poison", self.poison, (None, True, False))
        _check_choice("grad_dtype", self.grad_dtype, (None, "fp32"))

    @property
    def gradient_itemsize(self) -> int | None:
        """Bytes of a gradient element; None: those of the parameter's."""
        return None if self.grad_dtype is None else 4

    @property
    def optimizer_shares(self) -> Mapping[Tier, float]:
        """By place, the share of the optimizer's states that is wanted there; empty for "auto"."""
        if isinstance(self.optimizer, float):
            return {"device": 1 - self.optimizer, "host": self.optimizer}
        if isinstance(self.optimizer, str):
            return {} if self.optimizer == "auto" else {self.optimizer: 1.0}
        return self.optimizer

    @property
    def device_budget_bytes(self) -> int | None:
        """The given device budget in bytes, None when it is to be measured."""
        return None if self.device_budget is None else parse_size(self.device_budget)

    @property
    def host_budget_bytes(self) -> int | None:
        """The given host budget in bytes, None when it is to be measured."""
        return None if self.host_budget is None else parse_size(self.host_budget)

    @property
    def speculate_bytes(self) -> int:
        """Host bytes for backups of states whose updates begin in backward."""
        return 0 if self.speculate is None else parse_size(self.speculate)

    @property
    def disk_window_bytes(self) -> int | None:
        """The given window of states on disk in bytes, None when the plan chooses it."""
        return None if self.disk_window is None else parse_size(self.disk_window)

    @property
    def disk_paths(self) -> tuple[str, ...]:
        """The directories of `disk_path`."""
        return () if self.disk_path is None else tuple(map(os.fspath, self.disk_path))  # type: ignore[arg-type]

    @property
    def disk_block_bytes(self) -> int:
        """Bytes of one transfer to or from the disk."""
        return parse_size(self.disk_block)

    @property
    def disk_settings(self) -> dict[str, Any]:
        """How the disk is read and written: `block_bytes` and `queue_depth`."""
        return {"block_bytes": self.disk_block_bytes, "queue_depth": self.disk_queue_depth}

    @property
    def activation_share(self) -> float:
        """The share of what autograd saves that may leave the device."""
        if isinstance(self.activations, float):
            return self.activations
        return 0.0 if self.activations in ("device", "auto", 0) else 1.0

    @property
    def activation_keep(self) -> float:
        """The share of it that stays, the most recent, where activations leave."""
        return max(DEFAULT_KEEP, 1 - self.activation_share)

    @property
    def activation_host_bytes(self) -> int | None:
        """The host bytes that activations may take at most, where they were given."""
        if isinstance(self.activations, float) or self.activations in _ACTIVATION_PLACES:
            return None
        return parse_size(self.activations)

    def pins_on(self, device_type: str) -> bool:
        """`pin`, or for `"auto"` whether a device of this type gains by it."""
        return device_type != "cpu" if self.pin == "auto" else bool(self.pin)

    @property
    def poison_enabled(self) -> bool:
        """`poison`, or what `OFFLOAD_POISON` says when that is None."""
        return os.environ.get("OFFLOAD_POISON", "0") not in ("", "0") if self.poison is None else self.poison

    @classmethod
    def resolve(cls, config: Config | Mapping[str, Any] | None, options: Mapping[str, Any]) -> Config:
        """`config` (a Config, a mapping of options or None) with `options` laid over it."""
        if config is not None and not isinstance(config, (Config, Mapping)):
            raise InvalidArgument(f"config is a {type(config).__name__}: give a Config, a dict or None")
        given = {} if config is None or isinstance(config, Config) else dict(config)
        given.update(options)
        names = [field.name for field in dataclasses.fields(cls)]
        for name in given:
            if name not in names:
                raise InvalidArgument(_unknown_option(name, names))
        return dataclasses.replace(config, **given) if isinstance(config, Config) else cls(**given)


def _is_share(value: object) -> bool:
    return isinstance(value, float) and 0.0 <= value <= 1.0


def _check_optimizer(value: Any, supported: tuple[str, ...]) -> Any:
    if _is_share(value):
        return value
    if isinstance(value, Mapping):
        known = all(place in _SHARED_PLACES and _is_share(share) for place, share in value.items())
        if not known or abs(sum(value.values()) - 1) > _SHARE_TOLERANCE:
            raise InvalidArgument(
                f"optimizer={value!r}: give shares of {_quoted(_SHARED_PLACES)}, floats of 0.0 to 1.0 that add up to 1"
            )
        return {place: value[place] for place in _SHARED_PLACES if value.get(place)}
    try:
        _check_tier("optimizer", value, supported)
    except InvalidArgument as error:
        raise InvalidArgument(
            f"{error}; and a share, a float from 0.0 to 1.0, or shares by place as {{'unified': 0.6, 'host': 0.4}}"
        ) from None
    return value


def _check_tier(kind: str, value: object, supported: tuple[str, ...]) -> None:
    if isinstance(value, str) and value in _TIERS and value not in supported:
        raise InvalidArgument(f"{kind}={value!r}: not yet in this release; legal now: {_quoted(supported)}")
    _check_choice(kind, value, supported)


def _check_disk_path(paths: Any) -> tuple[str, ...] | None:
    if paths is None:
        return None
    names = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    if not isinstance(names, (list, tuple)) or not names or not all(isinstance(n, (str, os.PathLike)) for n in names):
        raise InvalidArgument(f"disk_path={paths!r}: give a directory, a list of directories, or None")
    return tuple(os.fspath(name) for name in names)


def _check_disk_block(value: int | str) -> None:
    try:
        size = parse_size(value)
    except InvalidArgument as error:
        raise InvalidArgument(f"disk_block: {error}") from None
    if size % _DISK_ALIGNMENT or not 0 < size <= _MOST_DISK_BLOCK:
        raise InvalidArgument(f"disk_block={value!r}: legal are multiples of {_DISK_ALIGNMENT} bytes up to 1GiB")


def _check_units(units: Any) -> Any:
    if units is None or (callable(units) and not isinstance(units, type)):
        return units
    if isinstance(units, (list, tuple)) and units and all(isinstance(entry, (str, type)) for entry in units):
        return tuple(units)
    raise InvalidArgument(
        f"units={units!r}: give a list of module classes and names, a predicate over modules, or None"
    )


def _check_activations(value: object) -> None:
    if _is_share(value):
        return
    if isinstance(value, str) and value == "disk":
        raise InvalidArgument(f"activations='disk': not yet in this release; legal now: {_quoted(_ACTIVATION_PLACES)}")
    if isinstance(value, str) and value in _ACTIVATION_PLACES:
        return
    try:
        parse_size(value)  # type: ignore[arg-type]
    except InvalidArgument:
        raise InvalidArgument(
            f"activations={value!r}: legal values are {_quoted(_ACTIVATION_PLACES)}, a share as a float from 0.0 to "
            "1.0, and host bytes such as '8GiB'"
        ) from None


def check_activation_form(name: str, value: object) -> None:
    """Raises InvalidArgument for what is no `ActivationForm`; `name` is the option's."""
    _check_choice(name, value, ("exact", "int8", "fp8"))


def _check_choice(name: str, value: object, legal: tuple[object, ...]) -> None:
    # Identity for the flags: 1 == True would let integers pass for booleans.
    if not any(value is choice for choice in legal) and not (isinstance(value, str) and value in legal):
        raise InvalidArgument(f"{name}={value!r}: legal values are {_quoted(legal)}")


def _check_budget(name: str, value: int | str | None) -> None:
    if value is None:
        return
    try:
        parse_size(value)
    except InvalidArgument as error:
        raise InvalidArgument(f"{name}: {error}") from None


def _unknown_option(name: object, names: list[str]) -> str:
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"legal options are {', '.join(names)}"
    return f"unknown option {name!r}: {hint}"


def _quoted(choices: tuple[object, ...]) -> str:
    return ", ".join(repr(choice) for choice in choices)
