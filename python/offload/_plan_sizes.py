"""What parameters take in each tier, for one choice of placements: sums over sizes, no budgets and no devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ._config import Config, Tier
from ._disk_window import CacheSize, DiskWindow, image_bytes, plan_cache, plan_window
from ._hybrid import StateBytes, state_bytes
from ._parameter_size import (
    MASTER_BYTES,
    ParameterSize,
    backup_bytes,
    host_master,
    largest_unit,
    link_bytes,
    states_that_fit,
)
from ._tier_bytes import TierBytes
from ._unified_plan import MemoryKind, words_of_unified

__all__ = [
    "LEAST_PREFETCH",
    "MasterForm",
    "OptimizerPlacement",
    "ParamsPlacement",
    "Placement",
    "PlanSizes",
]

Placement = Literal["device", "host"]
ParamsPlacement = Literal["device", "host", "disk"]
OptimizerPlacement = Literal["device", "host", "disk", "unified", "mixed"]
MasterForm = Literal["none", "fp32", "split", "bf16", "mixed"]

# Units of weights that are sent for ahead of their use, where nothing says more.
LEAST_PREFETCH = 1
# Of what the host budget has left, what the window of states on disk takes, and no more than so many bytes: it keeps
# what fits of states that are many times larger as a rule.
_WINDOW_SHARE, _MOST_WINDOW_BYTES = 0.5, 1 << 30
# What a backup is rounded up by: six arrays at most, each from a cache line on, in a block of 256 bytes.
_BACKUP_PADDING = 6 * 64 + 256

# [Note: bytes a parameter] By tier, for weights of 2 bytes (bf16, fp16) and of 4 (fp32):
#   device   weight 2 | 4; of weights on the host only those that stay, and the window: the largest unit, times one
#            more than are sent for ahead
#   states on the device   moments 4 + 4 (Lion, Adagrad: 4), in bf16 half of it, in int8 a quarter and 4 for each scale;
#            master 4 for 16-bit weights; an fp32 weight is its own master
#   states on the host     moments as there; 16-bit: a working copy of 2 and a master of 4, or of 2 when it is
#            split (the working copy is its upper half); fp32: a master of 4, which is the working copy
#   unified states         as on the host, but for gradients
#   bf16 masters           none: the weight on the device, or the working copy on the host, is the master
#   states on disk         as on the host, but for the working copy of 16-bit weights, which stays there; an fp32 weight
#            on the device has none, and one on the host is its own master there. The host has the window too
#   weights on the host    a working copy of 2 | 4, where no state on the host has it already
#   weights on disk        2 | 4 there; on the host only a cache of them. The upper half of a split master is the weight
#            on disk; the lower half is where the moments are
#   gradient 2 | 4, where gradients live; a host update of device gradients needs them on the host too
# A frozen parameter has its weight and nothing else. With a mixed optimizer each state counts where it is, and
# gradients on the host are those of the states that are updated there.


class PlanSizes:
    """Sums by kind over the parameters, wherever they end up."""

    def __init__(self, parameters: Sequence[ParameterSize], config: Config, gradient_itemsize: int | None) -> None:
        self.parameters = parameters
        self.trainable = [p for p in parameters if p.trainable]
        self.config = config
        self.gradient_itemsize = gradient_itemsize
        self.weights = sum(p.numel * p.itemsize for p in parameters)
        self.stays = sum(p.numel * p.itemsize for p in parameters if p.stays)
        self.largest_unit = largest_unit(parameters)
        self.prefetch = config.prefetch or LEAST_PREFETCH

    def kept_states(self, optimizer: OptimizerPlacement, params: ParamsPlacement) -> frozenset[str]:
        """The parameters whose states stay on the device when a share of them is to leave."""
        return self._share("device", self.trainable, params) if optimizer == "mixed" else frozenset()

    def unified_states(
        self, optimizer: OptimizerPlacement, params: ParamsPlacement, kept: frozenset[str]
    ) -> frozenset[str]:
        """The parameters whose states the device updates on the host."""
        if optimizer != "mixed":
            return frozenset(p.name for p in self.trainable) if optimizer == "unified" else frozenset()
        return self._share("unified", [p for p in self.trainable if p.name not in kept], params)

    def _share(self, place: Tier, candidates: Sequence[ParameterSize], params: ParamsPlacement) -> frozenset[str]:
        # Rounded, as 1 - 0.9 is a little less than a tenth.
        share = self.config.optimizer_shares.get(place, 0.0)
        room = round(share * sum(p.state_bytes for p in self.trainable))
        return states_that_fit(candidates, room, by_unit=params != "device")

    def state_bytes(self, gradients: Placement) -> list[StateBytes]:
        """Each state as `keep_fastest` weighs it, with weights on the device."""
        return [
            state_bytes(p, self.config.master, self.gradient_itemsize, gradient_leaves=gradients == "host")
            for p in self.trainable
        ]

    def words_of(self, kept: frozenset[str]) -> str:
        total = sum(p.state_bytes for p in self.trainable)
        away = [p for p in self.trainable if p.name not in kept]
        return (
            f"optimizer states of {len(away)} of {len(self.trainable)} parameters are on the host, "
            f"{sum(p.state_bytes for p in away) / total:.1%} of their bytes; the model's first that fit stay"
        )

    def words_of_unified(self, unified: frozenset[str], kind: MemoryKind | None, params: ParamsPlacement) -> str:
        """Of these states: what crosses the link in a step, beside what an update on the host would copy."""
        states = [p for p in self.trainable if p.name in unified]
        ways = [link_bytes(p, self.config.master, streamed=params != "device" and not p.stays) for p in states]
        copied = self._gradient_bytes(states) + sum(p.numel * p.itemsize for p in states)
        kept = sum(p.moments + p.numel * _host_master_bytes(p, self.config) for p in states)
        read, written = (sum(way) for way in zip(*ways, strict=True))
        return words_of_unified(kind, kept, read, written, copied)

    def master_form(self, optimizer: OptimizerPlacement, kept: frozenset[str]) -> MasterForm:
        """How the masters that are stored beside weights are stored."""
        forms: set[MasterForm] = {
            "fp32"
            if not p.is_master and (optimizer == "device" or p.name in kept)
            else host_master(p, self.config.master)
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
        unified: frozenset[str] = frozenset(),
        prefetch: int | None = None,
    ) -> tuple[TierBytes, TierBytes]:
        """Device and host bytes of one choice. prefetch: None for the configured or least one."""
        window = self.stays + (1 + (prefetch or self.prefetch)) * self.largest_unit
        staying = [p for p in self.trainable if optimizer == "device" or p.name in kept]
        leaving = [p for p in self.trainable if optimizer != "device" and p.name not in kept]
        by_host = [p for p in leaving if p.name not in unified]
        # What stays on the device has a copy on the host, and is counted so though most of it has it on disk.
        copied = [p for p in leaving if params != "disk" or p.stays]
        working = sum(p.numel * p.itemsize for p in copied if p.itemsize == 2)
        mastered = [p for p in leaving if p.itemsize == 2] + [p for p in copied if p.itemsize == 4]
        on_disk = optimizer == "disk"
        if params == "host":  # fp32 masters on the host are what their weights are uploaded from
            working = self.weights
            if not on_disk:
                working -= sum(p.numel * p.itemsize for p in leaving if p.itemsize == 4)
        gone = [] if gradients == "device" else by_host or self.trainable
        device = TierBytes(
            master=sum(p.device_master for p in staying),
            moments=sum(p.moments for p in staying),
            weights=self.weights if params == "device" else min(self.weights, window),
            gradients=self._gradient_bytes(self.trainable) - self._gradient_bytes(gone),
        )
        host = TierBytes(
            working=working,
            master=0 if on_disk else sum(p.numel * _host_master_bytes(p, self.config) for p in mastered),
            moments=0 if on_disk else sum(p.moments for p in leaving),
            gradients=self._gradient_bytes(by_host or gone),
        )
        return device, host

    def backups(
        self, optimizer: OptimizerPlacement, gradients: Placement, params: ParamsPlacement, by_device: frozenset[str]
    ) -> int:
        """What updates that run ahead of the step need on the host to be taken back, at most what was given.

        Only native updates of states in host memory run ahead, where gradients leave in backward and weights stay.
        """
        if optimizer not in ("host", "mixed") or gradients != "host" or params != "device":
            return 0
        states = sum(
            backup_bytes(p, self.config.master) + _BACKUP_PADDING
            for p in self.trainable
            if p.may_split and p.name not in by_device
        )
        return min(self.config.speculate_bytes, states)

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
        # What does not train yet may later, by an optimizer with two moments.
        moments = ParameterSize.moment_bytes
        largest = max(
            (
                _host_master_bytes(p, self.config) + (p.moment_bytes if p.trainable else moments)
                for p in self.parameters
            ),
            default=1,
        )
        return plan_window([p.numel for p in self.trainable], largest, wanted)

    def _gradient_bytes(self, parameters: Sequence[ParameterSize]) -> int:
        return sum(p.numel * (self.gradient_itemsize or p.itemsize) for p in parameters)


def _host_master_bytes(parameter: ParameterSize, config: Config) -> int:
    return MASTER_BYTES[host_master(parameter, config.master)]
