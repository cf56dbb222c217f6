"""What a machine has and how fast it is: of known cards, by their data sheets, or as it was measured.

[Note: where the figures of a preset come from] Memory is what `nvidia-smi` shows of the card, in MiB. Operations a
second (dense; 16-bit inputs with fp32 sums, and fp32 without TF32) and memory bandwidth are NVIDIA's, from the data
sheet that `source` names. Of the operations training reaches a share, `mfu`, of all that it does, recomputed ones
included: an assumption, like all of the host, for cards are sold without one. Links are what copies of pinned memory
were measured to reach.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable
from typing import ClassVar

from ._config import parse_size
from ._errors import InvalidArgument
from ._hybrid import Rates

__all__ = ["DISK_READ", "DISK_WRITE", "INTERCONNECTS", "LINKS", "Hardware"]

# Bytes a second to the host and to the device, of 64 MiB and more. PCIe 5: an H200 (torch and registered memory, 2026);
# PCIe 4: an A100 (nvbandwidth); C2C: a GH200. Half the lanes, half of it; PCIe 3 half of PCIe 4.
LINKS: dict[str, tuple[float, float]] = {
    "pcie3x16": (12.5e9, 12.5e9),
    "pcie4x8": (12.5e9, 12.5e9),
    "pcie4x16": (25e9, 25e9),
    "pcie5x8": (26.5e9, 27.5e9),
    "pcie5x16": (53e9, 55e9),
    "nvlink-c2c": (297e9, 375e9),
}

# Bytes a second that one card sends and, at once, receives: the wire's own rate, of which collectives reach about 80 %.
INTERCONNECTS: dict[str, float] = {
    "10gbe": 1.25e9,
    "25gbe": 3.125e9,
    "100gbe": 12.5e9,
    "ib-hdr200": 25e9,
    "ib-ndr400": 50e9,
    "nvlink": 450e9,  # the fourth generation, in a server of eight cards
}

# Of a data sheet's memory bandwidth, what an update over it reaches: 3.4 of 4.0 TB/s on a GH200.
_STREAMED_SHARE = 0.85
# What a CUDA context and the libraries' workspaces take of a card.
_CONTEXT_BYTES = 512 << 20


@dataclasses.dataclass(frozen=True)
class _Card:
    """A preset, in the units of data sheets: MiB, TFLOP/s, GB/s."""

    memory_mib: int
    tflops: float
    fp32_tflops: float
    bandwidth: float
    link: str
    mfu: float
    host: str
    source: str


# GiB and GB/s of the host a card, and what is meant. A desktop has two channels, four modules slow them down; of their
# peak a streaming kernel reaches four fifths. A server's host is a card's share of one with eight of them.
_HOSTS = {
    "desktop-ddr4": (128, 40.0),
    "desktop-ddr5": (128, 60.0),
    "server-ddr4": (128, 100.0),
    "server-ddr5": (256, 150.0),
    "grace": (480, 400.0),  # LPDDR5X: 512 GB/s by its data sheet, STREAM 486, kernels of optimizers 240 to 290 so far
}
# One NVMe drive of the fourth PCIe generation, as it sustains reads and writes at once.
DISK_READ, DISK_WRITE = 5e9, 3e9

# The share reached: 150 of 165 TFLOP/s were measured on a 4090 at large batches and 126 with offloading; data centre
# cards, whose peak is further from what their power and memory sustain, train at 0.4 to 0.55 of it.
_CARDS: dict[str, _Card] = {
    "h200": _Card(143_771, 989, 67, 4800, "pcie5x16", 0.45, "server-ddr5", "NVIDIA H200 data sheet (SXM)"),
    "h100-80": _Card(81_559, 989, 67, 3350, "pcie5x16", 0.45, "server-ddr5", "NVIDIA H100 data sheet (SXM)"),
    "h100-pcie": _Card(81_559, 756, 51, 2000, "pcie5x16", 0.45, "server-ddr5", "NVIDIA H100 data sheet (PCIe)"),
    "gh200": _Card(97_871, 989, 67, 4000, "nvlink-c2c", 0.45, "grace", "NVIDIA GH200 data sheet (96 GB HBM3)"),
    "b200": _Card(
        183_359, 2250, 75, 8000, "pcie5x16", 0.4, "server-ddr5", "NVIDIA DGX B200 data sheet, an eighth of it"
    ),
    "a100-40": _Card(40_960, 312, 19.5, 1555, "pcie4x16", 0.5, "server-ddr4", "NVIDIA A100 data sheet (40 GB)"),
    "a100-80": _Card(81_920, 312, 19.5, 2039, "pcie4x16", 0.5, "server-ddr4", "NVIDIA A100 data sheet (80 GB, SXM)"),
    "l40s": _Card(46_068, 362, 91.6, 864, "pcie4x16", 0.45, "server-ddr5", "NVIDIA L40S data sheet"),
    "l4": _Card(23_034, 121, 30.3, 300, "pcie4x16", 0.45, "server-ddr5", "NVIDIA L4 data sheet"),
    "a6000": _Card(49_140, 155, 38.7, 768, "pcie4x16", 0.5, "desktop-ddr4", "NVIDIA RTX A6000 data sheet"),
    "3090": _Card(24_576, 71, 35.6, 936, "pcie4x16", 0.65, "desktop-ddr4", "NVIDIA GA102 white paper, appendix A"),
    "4090": _Card(24_564, 165.2, 82.6, 1008, "pcie4x16", 0.65, "desktop-ddr5", "NVIDIA Ada white paper, appendix A"),
    "5090": _Card(
        32_607, 209.5, 104.8, 1792, "pcie5x16", 0.6, "desktop-ddr5", "NVIDIA RTX Blackwell white paper, appendix A"
    ),
}
_ALSO_CALLED = {"h100": "h100-80", "a100": "a100-80"}


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One card and its share of a host: bytes, bytes a second, operations a second.

    device_bytes: free for training; host_bytes: available. flops, fp32_flops: dense operations a second with 16-bit
    inputs, and in fp32 as torch computes it where TF32 is not allowed; compute reaches the share `mfu` of them.
    device_bandwidth: of the card's memory, as an update streams it. to_host, to_device: of copies; host_bandwidth: what
    the update on the host streams while copies run. disk_read, disk_write: of all disks that states may live on.
    source: where the figures come from; assumed: names of the fields that nobody measured or published. kind: "cuda",
    or "cpu" where the CPU is the device and both memories are one.

    PRESETS names what `preset` knows, LINKS what `having` takes as a link, INTERCONNECTS what joins cards.

    Raises InvalidArgument for a figure that is not positive, and an `mfu` above 1.
    """

    PRESETS: ClassVar[tuple[str, ...]] = tuple(_CARDS)
    LINKS: ClassVar[tuple[str, ...]] = tuple(LINKS)
    INTERCONNECTS: ClassVar[tuple[str, ...]] = tuple(INTERCONNECTS)

    name: str
    device_bytes: int
    flops: float
    fp32_flops: float
    mfu: float
    device_bandwidth: float
    to_host: float
    to_device: float
    host_bytes: int
    host_bandwidth: float
    disk_read: float
    disk_write: float
    source: str
    assumed: tuple[str, ...] = ()
    kind: str = "cuda"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (int, float)) and not (value > 0 and math.isfinite(value)):
                raise InvalidArgument(f"hardware: {field.name} is {value:g}; give a positive number")
        if self.mfu > 1:
            raise InvalidArgument(f"hardware: mfu is {self.mfu:g}; give the share of the peak that is reached, 0 to 1")

    @property
    def rates(self) -> Rates:
        """As the plan weighs updates by."""
        return Rates(self.to_host, self.to_device, self.host_bandwidth, self.device_bandwidth)

    @classmethod
    def preset(cls, name: str) -> Hardware:
        """A known card, as `"4090"`, `"rtx-4090"` or `"H100"`. Raises InvalidArgument, which names those there are."""
        key = re.sub(r"^(nvidia|geforce|rtx|[\s_-])+", "", name.strip().lower()).replace("_", "-").replace(" ", "-")
        key = _ALSO_CALLED.get(key, key)
        card = _CARDS.get(key)
        if card is None:
            near = difflib.get_close_matches(key, cls.PRESETS, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise InvalidArgument(f"hardware {name!r} is not known: {hint}there are {', '.join(cls.PRESETS)}")
        to_host, to_device = LINKS[card.link]
        host_gib, host_gb_per_s = _HOSTS[card.host]
        return cls(
            name=key,
            device_bytes=(card.memory_mib << 20) - _CONTEXT_BYTES,
            flops=card.tflops * 1e12,
            fp32_flops=card.fp32_tflops * 1e12,
            mfu=card.mfu,
            device_bandwidth=card.bandwidth * 1e9 * _STREAMED_SHARE,
            to_host=to_host,
            to_device=to_device,
            host_bytes=host_gib << 30,
            host_bandwidth=host_gb_per_s * 1e9,
            disk_read=DISK_READ,
            disk_write=DISK_WRITE,
            source=f"{card.source}; copies as measured over {card.link}",
            assumed=("mfu", "host_bytes", "host_bandwidth", "disk_read", "disk_write"),
        )

    def having(
        self,
        *,
        device_memory: int | str | None = None,
        host_memory: int | str | None = None,
        link: str | float | None = None,
        host_bandwidth: str | float | None = None,
        disk_bandwidth: str | float | None = None,
        mfu: float | None = None,
    ) -> Hardware:
        """With these figures in the place of its own; None keeps one.

        Memory as bytes or text such as `"24GiB"`; rates as bytes a second or text: `"25GB/s"`, and `"25"` is GB/s. A
        link, which is both ways, may be one of LINKS; a disk reads and writes at its rate. Raises InvalidArgument.
        """
        given: dict[str, float] = {}
        if device_memory is not None:
            given["device_bytes"] = parse_size(device_memory)
        if host_memory is not None:
            given["host_bytes"] = parse_size(host_memory)
        if link is not None:
            rates = LINKS.get(link) if isinstance(link, str) else None
            given["to_host"], given["to_device"] = rates or (_rate("link", link, LINKS),) * 2
        if host_bandwidth is not None:
            given["host_bandwidth"] = _rate("host_bandwidth", host_bandwidth)
        if disk_bandwidth is not None:
            given["disk_read"] = given["disk_write"] = _rate("disk_bandwidth", disk_bandwidth)
        if mfu is not None:
            given["mfu"] = mfu
        assumed = tuple(name for name in self.assumed if name not in given)
        return dataclasses.replace(self, **given, assumed=assumed)  # type: ignore[arg-type]


def _rate(name: str, rate: str | float, names: Iterable[str] = ()) -> float:
    """Bytes a second."""
    if not isinstance(rate, str):
        return float(rate)
    number = rate.strip().removesuffix("/s")
    try:
        return float(number) * 1e9
    except ValueError:
        pass
    try:
        return float(parse_size(number))
    except InvalidArgument:
        others = f", or one of {', '.join(names)}" if names else ""
        raise InvalidArgument(f"{name} {rate!r} is not understood: give GB/s, as 25 or '25GB/s'{others}") from None
