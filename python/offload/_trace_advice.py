"""The one setting that would help a traced run most, with the figures that say so."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ._config import format_size

if TYPE_CHECKING:
    from ._trace_report import TraceReport

__all__ = ["Advice", "advise", "duration"]

_LEAST_SHARE = 0.02  # of a step: less is within what steps differ by
_BUSY = 0.85  # of a step: a lane that works so much is the limit itself
# Bytes of DRAM traffic a parameter that the host update takes, by master and moments; docs/benchmarks.md.
_UPDATE_BYTES = {"fp32": 32, "split": 30}
_BF16_MOMENTS_SAVE = 8
# Bytes a parameter of master and moments in fp32, where the device keeps them.
_STATE_BYTES = 12
_SHARE_STEP = 0.05


@dataclasses.dataclass(frozen=True)
class Advice:
    """`setting`: what to change, as given to `offload.wrap`. saves_s: seconds a step, at most; because: the figures."""

    setting: str
    saves_s: float
    because: str


def advise(report: TraceReport) -> Advice | None:
    """The setting that saves most, None when none saves a fiftieth of a step."""
    found = [advice for model in report.models for advice in _candidates(report, model)]
    best = max(found, key=lambda advice: advice.saves_s, default=None)
    return best if best is not None and best.saves_s >= _LEAST_SHARE * report.step_s else None


def _candidates(report: TraceReport, model: Mapping[str, Any]) -> Iterator[Advice]:
    exposed = report.exposed_s
    if "host_update" in exposed and model.get("optimizer") in ("host", "mixed"):
        yield from _for_host_update(report, model)
    if any(lane in exposed for lane in ("disk_read", "disk_write")) and model.get("disk_bytes"):
        yield _for_disk(report, model)
    if "to_host" in exposed:
        yield from _for_to_host(report, model)
    if "to_device" in exposed and model.get("params") in ("host", "disk"):
        yield _for_to_device(report, model)


def _for_host_update(report: TraceReport, model: Mapping[str, Any]) -> Iterator[Advice]:
    busy, waited = report.lanes["host_update"].busy_s, report.exposed_s["host_update"]
    native = report.lanes["host_update"].nbytes > 0  # another class runs as itself, where its states are
    share = math.floor((1 - waited / busy) / _SHARE_STEP) * _SHARE_STEP if busy else 0.0
    figures = f"the host update takes {duration(busy)} a step and {duration(waited)} of it are waited for"
    if model.get("optimizer") == "host" and share > 0 and native:
        on_device = (1 - share) * _STATE_BYTES * model.get("trainable_count", 0)
        yield Advice(
            f"optimizer={share:.2f}",
            waited,
            f"{figures}; with {1 - share:.0%} of the states on the device ({format_size(round(on_device))} there) the "
            "rest hides",
        )
    traffic = _UPDATE_BYTES.get(model.get("master", ""))
    if model.get("moments") == "fp32" and traffic is not None and native:
        saves = min(waited, busy * _BF16_MOMENTS_SAVE / traffic)
        yield Advice(
            'moments="bf16"',
            saves,
            f"{figures}; bf16 moments (lossy) take {traffic - _BF16_MOMENTS_SAVE} of the {traffic} bytes of memory "
            f"traffic a parameter, at most {duration(saves)} less",
        )


def _for_disk(report: TraceReport, model: Mapping[str, Any]) -> Advice:
    waited = sum(report.exposed_s.get(lane, 0.0) for lane in ("disk_read", "disk_write"))
    busy = max(report.lanes[lane].busy_s for lane in ("disk_read", "disk_write") if lane in report.lanes)
    paths = model.get("disk_path_count", 1)
    share = f"{duration(busy)} of {duration(report.step_s)}"
    figures = f"the disk is busy for {share} a step, and {duration(waited)} are waited for"
    saves = min(waited, busy / (paths + 1))
    return Advice(
        f"a disk_path of {paths + 1} drives",
        saves,
        f"{figures}; one more of the same speed takes {duration(busy / (paths + 1))} off (or keep the "
        f"{format_size(model['disk_bytes'])} on the host, which takes all of it off)",
    )


def _for_to_host(report: TraceReport, model: Mapping[str, Any]) -> Iterator[Advice]:
    use, waited = report.lanes["to_host"], report.exposed_s["to_host"]
    leaving = use.kinds.get("activations", 0)
    figures = f"copies to the host take {duration(use.busy_s)} a step and {duration(waited)} of it are waited for"
    if leaving > use.nbytes / 2 and use.busy_s:
        keeps = max(0.0, 1 - waited / use.busy_s)
        yield Advice(
            f"activations={math.floor(keeps / _SHARE_STEP) * _SHARE_STEP:.2f}",
            waited * leaving / use.nbytes,
            f"{figures}; {leaving / use.nbytes:.0%} of the bytes are activations",
        )
    elif report.micro_batches > 1 and model.get("gradients") == "host":
        saves = waited * (1 - 1 / report.micro_batches)
        yield Advice(
            "one micro-batch a step (or fewer, larger ones)",
            saves,
            f"{figures}; gradients leave in each of {report.micro_batches:g} micro-batches and need to once, "
            f"{duration(saves)} less",
        )


def _for_to_device(report: TraceReport, model: Mapping[str, Any]) -> Advice:
    use, waited = report.lanes["to_device"], report.exposed_s["to_device"]
    share = use.busy_s / report.step_s
    figures = f"copies to the device take {duration(use.busy_s)} a step and {duration(waited)} of it are waited for"
    if share < _BUSY:
        ahead = model.get("prefetch", 1)
        return Advice(
            f"prefetch={ahead + 1}",
            waited,
            f"{figures}, while the link rests for {1 - share:.0%} of the step: {ahead} units sent for ahead are few",
        )
    factor = 1 + waited / report.compute_s if report.compute_s else 2.0
    return Advice(
        f"{factor:.1f} times the tokens in a micro-batch",
        waited,
        f"{figures}: the link works for {share:.0%} of the step, and {duration(report.compute_s)} of compute hide no "
        "more",
    )


def duration(seconds: float) -> str:
    """In milliseconds; from ten seconds on in those."""
    return f"{seconds * 1e3:,.2f} ms" if seconds < 10 else f"{seconds:,.2f} s"
