"""The forecast of a step beside the engine itself, on a clock that only copies and compute move."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import offload
from engine_clock import Block, CheckpointedBlock, EngineClock
from offload import Machine, ParameterSize, _activations, _copy_lanes, _engine, _native, forecast, unit_works
from offload._activation_format import ActivationFormat
from offload._disk_window import CacheSize, DiskWindow
from offload._plan_sizes import PlanSizes

pytestmark = [pytest.mark.usefixtures("device"), pytest.mark.cpu_only]

_WEIGHTS = 2
# Larger than what shares an upload with others; a power of two, so that a chunk on disk is one weight's states.
_ELEMENTS = 256 << 10
_BYTES = 2 * _ELEMENTS
# What an update of a weight reads and writes, and what it writes to: its halves and two moments.
_UPDATE_BYTES, _BACKUP_BYTES = 30 * _ELEMENTS, 12 * _ELEMENTS
_FRAME_BYTES = 10 * _ELEMENTS  # of its states on disk: half of the master, and the moments

HOST = {"optimizer": "host", "gradients": "host", "params": "device"}
DISK = HOST | {"optimizer": "disk"}
STREAMED = DISK | {"params": "host", "prefetch": 1}
WEIGHTS = HOST | {"params": "disk", "prefetch": 1}
DEVICE = {"optimizer": "device", "gradients": "device", "params": "device"}
AWAY = {"activations": "host"}
CHECKPOINTS = {"activations": "checkpoints"}


@dataclasses.dataclass(frozen=True)
class Setting:
    """Options of `wrap`, and what a step is; bytes are counted in weights.

    link: rates to the host and to the device. seconds: of forward and of backward of a unit. saved: of each range that
    forward saves, which is one a weight, or a checkpointed unit's input. ring: of copies on their way (of
    activations: where less may stay); None: no limit. update: seconds of that of a weight on the host. backups: how
    many weights may be updated in backward. disk: rates of reads and of writes. window: of how many weights the states
    find room in host memory. cache: of how many units the weights do. within: how far the forecast may be off.
    """

    options: dict[str, Any]
    micro_batches: int = 1
    clips: bool = True
    link: tuple[float, float] = (2, 2)
    seconds: tuple[float, float] = (1, 2)
    saved: float = 0
    checkpointed: bool = False
    ring: float | None = None
    update: float = 0
    backups: int = 0
    units: int = 4
    disk: tuple[float, float] | None = None
    window: int = 8
    cache: int = 2
    within: float = 1e-3


SETTINGS = {
    "host": Setting(HOST, clips=False),
    "host, clipped": Setting(HOST),
    "host, slow to_host": Setting(HOST, link=(0.5, 2)),
    "host, slow to_device": Setting(HOST, link=(2, 0.4)),
    "host, three micro-batches": Setting(HOST, 3),
    "host, three micro-batches, slow links": Setting(HOST, 3, clips=False, link=(0.7, 0.6)),
    "host, not lazy": Setting(HOST | {"lazy": False}, link=(2, 1)),
    "slow updates": Setting(HOST, link=(2, 8), seconds=(1, 4), update=1),
    "slow updates, not lazy": Setting(HOST | {"lazy": False}, clips=False, update=0.5),
    "slow updates, two micro-batches": Setting(HOST, 2, link=(1, 1), update=1.5),
    "half of the states, slow updates": Setting(HOST | {"optimizer": 0.5}, link=(1, 1), update=1.5),
    # What began in backward has ended before the step's first update can begin: the first unit has no backup, and while
    # it goes backward, or its gradient leaves, the others are updated. Else some would be dropped.
    "in backward": Setting(HOST, link=(2, 8), seconds=(1, 4), update=1, backups=6),
    "in backward, not clipped": Setting(HOST, clips=False, link=(2, 8), seconds=(1, 4), update=1, backups=6),
    "in backward, not lazy": Setting(HOST | {"lazy": False}, link=(2, 4), update=0.5, backups=6),
    "in backward, half of them": Setting(HOST, link=(2, 0.4), update=0.7, backups=4),
    "in backward, slowly": Setting(HOST, link=(2, 8), seconds=(0.2, 4), update=1, backups=5),
    "in backward, begun after the step was submitted": Setting(
        HOST, link=(0.4, 8), seconds=(0.1, 0.2), update=0.7, backups=6
    ),
    "in backward, two micro-batches": Setting(HOST, 2, link=(1, 1), update=0.5, backups=5),
    "half of the states": Setting(HOST | {"optimizer": 0.5}, link=(1, 1)),
    "optimizer alone": Setting(HOST | {"gradients": "device"}, link=(1, 1)),
    "optimizer alone, two micro-batches": Setting(HOST | {"gradients": "device"}, 2, clips=False, link=(1, 1)),
    "gradients alone": Setting(HOST | {"optimizer": "device"}, link=(2, 1)),
    "gradients alone, two micro-batches": Setting(HOST | {"optimizer": "device"}, 2, link=(2, 1)),
    "all": Setting(HOST | {"params": "host", "prefetch": 1}),
    "all, slow to_device": Setting(HOST | {"params": "host", "prefetch": 1}, link=(2, 0.5)),
    "all, prefetch 2": Setting(HOST | {"params": "host", "prefetch": 2}, link=(2, 0.5)),
    "all, two micro-batches": Setting(HOST | {"params": "host", "prefetch": 1}, 2, link=(1, 0.8)),
    "device": Setting(DEVICE, 2, link=(1, 1)),
    "activations": Setting(DEVICE | AWAY, saved=1),
    "activations, slow to_host": Setting(DEVICE | AWAY, link=(0.7, 2), saved=1),
    "activations, slow to_device": Setting(DEVICE | AWAY, link=(2, 0.7), saved=1),
    "activations, large": Setting(DEVICE | AWAY, link=(1, 1), saved=4),
    "activations, two micro-batches": Setting(DEVICE | AWAY, 2, link=(1, 0.8), saved=1),
    "activations, a short ring": Setting(DEVICE | AWAY, link=(0.8, 0.8), saved=1, ring=2),
    "activations, a ring of less than one": Setting(DEVICE | AWAY, link=(0.8, 0.8), saved=1, ring=0.5),
    "half of the activations": Setting(DEVICE | {"activations": 0.5}, link=(0.5, 0.5), saved=1),
    "seven tenths of the activations": Setting(DEVICE | {"activations": 0.7}, link=(0.5, 0.5), saved=1),
    "activations in little host memory": Setting(DEVICE | {"activations": 3 * _BYTES}, link=(0.4, 0.5), saved=1),
    "host and activations": Setting(HOST | AWAY, saved=1),
    "host and activations, slow links": Setting(HOST | AWAY, clips=False, link=(0.8, 0.6), saved=1),
    "host and activations, two micro-batches": Setting(HOST | AWAY, 2, link=(1, 0.8), saved=1.5),
    "host and activations, a short ring": Setting(HOST | AWAY, 2, link=(0.9, 0.9), saved=1, ring=2),
    "half of the states and activations": Setting(HOST | AWAY | {"optimizer": 0.5}, link=(1, 1), saved=1),
    "all and activations": Setting(HOST | AWAY | {"params": "host", "prefetch": 1}, saved=1),
    "all and activations, slow links": Setting(
        HOST | AWAY | {"params": "host", "prefetch": 2}, link=(0.8, 0.5), saved=1
    ),
    "all and activations, two micro-batches": Setting(
        HOST | AWAY | {"params": "host", "prefetch": 1}, 2, link=(1, 0.8), saved=1
    ),
    "recomputed": Setting(HOST, saved=1, checkpointed=True),
    "checkpoints": Setting(DEVICE | CHECKPOINTS, link=(1, 1), saved=2, checkpointed=True),
    "checkpoints, slow links": Setting(DEVICE | CHECKPOINTS, link=(0.4, 0.6), saved=2, checkpointed=True),
    "checkpoints in a byte, slow links": Setting(
        DEVICE | CHECKPOINTS | {"activation_format": "int8"}, link=(0.4, 0.6), saved=2, checkpointed=True
    ),
    "half of the checkpoints in a byte": Setting(
        HOST | {"activations": 0.5, "activation_format": "fp8"}, 2, link=(0.5, 0.4), saved=4, checkpointed=True
    ),
    "half of what is recomputed": Setting(DEVICE | {"activations": 0.5}, link=(0.5, 0.5), saved=2, checkpointed=True),
    "host and checkpoints, two micro-batches": Setting(
        HOST | CHECKPOINTS, 2, link=(0.8, 0.6), saved=2, checkpointed=True
    ),
    "all and checkpoints": Setting(
        HOST | CHECKPOINTS | {"params": "host", "prefetch": 1}, link=(1, 0.7), saved=2, checkpointed=True
    ),
    "all and checkpoints, two micro-batches": Setting(
        HOST | CHECKPOINTS | {"params": "host", "prefetch": 2}, 2, link=(1, 1), saved=2, checkpointed=True
    ),
    "states on disk, all in the window": Setting(DISK, disk=(3, 3)),
    "states on disk": Setting(DISK, disk=(5, 5), units=6),
    "states on disk, slow reads": Setting(DISK, disk=(2, 9), units=6, seconds=(0.5, 1)),
    "states on disk, slow writes": Setting(DISK, disk=(9, 2), units=6, seconds=(0.5, 1)),
    "states on disk, slow updates": Setting(DISK, disk=(7, 7), units=6, link=(1, 1), update=0.6),
    "states on disk, a window of small chunks": Setting(
        DISK, disk=(5, 5), units=6, seconds=(0.5, 1), window=0, within=0.03
    ),
    "states on disk, not lazy": Setting(DISK | {"lazy": False}, clips=False, disk=(6, 4), units=6),
    "states on disk, two micro-batches": Setting(DISK, 2, disk=(2, 2), units=5, window=9, link=(0.7, 0.7)),
    # A unit that is in the window by half: every other step begins with the half that is there.
    "streamed weights and states on disk": Setting(
        STREAMED, clips=False, disk=(4, 16), units=8, window=9, link=(8, 2), seconds=(0.3, 0.5)
    ),
    "weights on disk, all in the cache": Setting(WEIGHTS, disk=(0.1, 0.1), cache=4),
    "weights on disk": Setting(WEIGHTS, disk=(2, 2), link=(4, 4)),
    "weights on disk, slow reads": Setting(WEIGHTS, disk=(1, 8), cache=3, units=6),
    "weights on disk, slow writes": Setting(WEIGHTS, disk=(8, 1), cache=3, units=6),
    "weights on disk, two micro-batches": Setting(
        WEIGHTS | {"prefetch": 2}, 2, disk=(2, 8), link=(4, 1), cache=4, units=6, update=0.5
    ),
    "weights on disk, read as fast as they are computed with": Setting(
        WEIGHTS, disk=(2, 2), link=(1, 2), cache=4, units=6, seconds=(0.3, 0.5), within=0.1
    ),
    "weights and states on disk": Setting(
        WEIGHTS | {"optimizer": "disk"}, 2, clips=False, disk=(2, 6), link=(8, 4), update=0.5, within=0.1
    ),
}


def ring_bytes(setting: Setting) -> int:
    return 1 << 40 if setting.ring is None else round(setting.ring * _BYTES)


def options_of(setting: Setting, path: Path | str = ".") -> dict[str, Any]:
    more: dict[str, Any] = {}
    if setting.backups:
        more["speculate"] = setting.backups * _BACKUP_BYTES
    if setting.disk is not None:
        more |= {"disk_path": path, "disk_block": _FRAME_BYTES, "disk_queue_depth": 24}
        more["disk_window"] = DiskWindow(_ELEMENTS, _FRAME_BYTES, setting.window).nbytes
    return setting.options | more


def model_of(setting: Setting, clock: Any) -> nn.Module:
    kind = CheckpointedBlock if setting.checkpointed else Block
    # What a checkpointed block saves as it is recomputed makes it be recomputed, and is too small to leave.
    saved = 1 if setting.checkpointed else round(setting.saved * _BYTES)
    return nn.Sequential(*(kind(clock, *setting.seconds, _WEIGHTS, _ELEMENTS, saved) for _ in range(setting.units)))


@functools.cache
def predicted(name: str) -> float:
    setting = SETTINGS[name]
    sizes = [
        ParameterSize(f"{unit}.weights.{number}", _ELEMENTS, 2, "bfloat16", unit=str(unit))
        for unit in range(setting.units)
        for number in range(_WEIGHTS)
    ]
    options = options_of(setting)
    config = offload.Config(**options)
    plan = offload.estimate(model_of(setting, None).to("meta"), **options)
    units = [str(unit) for unit in range(setting.units)]
    forward, backward = setting.seconds
    ranges = 1 if setting.checkpointed else _WEIGHTS
    saved = dict.fromkeys(units, ranges * round(setting.saved * _BYTES))
    sent = None
    if config.activation_format != "exact":  # no gradient flows through the input of the first
        sent = saved | {unit: ActivationFormat.packed_bytes(nbytes // 2) for unit, nbytes in [*saved.items()][1:]}
    works = unit_works(
        sizes,
        plan,
        config,
        dict.fromkeys(units, (forward, backward + forward * setting.checkpointed)),
        saved,
        units if setting.checkpointed else (),
        sent,
    )
    links = (rate * _BYTES for rate in setting.link)
    host_update = _UPDATE_BYTES / setting.update if setting.update else 1e30
    disk = (None, None) if setting.disk is None else (rate * _BYTES for rate in setting.disk)
    machine = Machine(*links, host_update, 1e30, *disk, synchronous=True)
    return forecast(
        works,
        machine,
        micro_batches=setting.micro_batches,
        clips=setting.clips,
        prefetch=config.prefetch or 1,
        lazy=config.lazy,
        kept_activations=config.activation_keep,
        activation_host_bytes=plan.activation_host_bytes,
        ring_bytes=ring_bytes(setting),
        in_flight_bytes=ring_bytes(setting),
        window_bytes=0 if plan.disk_window is None else plan.disk_window.kept_bytes,
        cache_bytes=setting.cache * _WEIGHTS * _BYTES,
        speculate_bytes=plan.host.backups,
    ).seconds


def measured(name: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> float:
    setting = SETTINGS[name]
    to_host, to_device = (rate * _BYTES for rate in setting.link)
    ahead_s = setting.update * (1 + 2 * _BACKUP_BYTES / _UPDATE_BYTES)
    rates = {"to_host": to_host, "to_device": to_device}
    if setting.disk is not None:
        rates |= {"disk_read": setting.disk[0] * _BYTES, "disk_write": setting.disk[1] * _BYTES}
    monkeypatch.setattr(_copy_lanes, "_RING_BYTES", ring_bytes(setting))
    monkeypatch.setattr(_activations, "IN_FLIGHT_BYTES", ring_bytes(setting))
    cache = CacheSize(setting.cache * _WEIGHTS * _BYTES, _FRAME_BYTES)
    monkeypatch.setattr(PlanSizes, "cache", lambda *_: cache)
    with EngineClock(monkeypatch, **rates, update_s=setting.update, ahead_s=ahead_s) as clock:
        model = model_of(setting, clock)
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        options = {"activations": "device"} | options_of(setting, path)
        model, optimizer = offload.wrap(model, optimizer, device="cpu", **options)
        elements = round(setting.saved * _BYTES) // 2 if setting.checkpointed else 1
        began = []
        count = 5 if setting.disk is None else 7  # where the disk is behind, it takes longer until all are alike
        for _ in range(count):
            began.append(clock.seconds)
            for _ in range(setting.micro_batches):
                model(torch.zeros(elements, dtype=torch.bfloat16)).sum().backward()
            if setting.clips:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)  # which leaves them alone
            optimizer.step()
            optimizer.zero_grad()
        optimizer.state_dict()  # once the last updates have ended
        speculation = optimizer.stats().speculation
        offload.unwrap(model, optimizer)
    if setting.backups:  # in each step but the first
        assert (speculation["kept"], speculation["thrown_away"]) == (4 * setting.backups, 0)
    # States are made, and orders recorded, in the first steps.
    return (began[-1] - began[-3]) / 2


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Seconds of a step of every setting by the engine."""
    found = {}
    for name in SETTINGS:
        with pytest.MonkeyPatch.context() as patch:
            found[name] = measured(name, tmp_path_factory.mktemp("disk"), patch)
    return found


@pytest.mark.parametrize("name", SETTINGS)
def test_the_engine_takes_the_seconds_of_the_forecast(name: str, steps: dict[str, float]) -> None:
    assert steps[name] == pytest.approx(predicted(name), rel=SETTINGS[name].within)


def test_the_forecast_orders_settings_as_the_engine_does(steps: dict[str, float]) -> None:
    exact = [name for name, setting in SETTINGS.items() if setting.within == Setting.within]
    for one, other in itertools.combinations(exact, 2):
        if abs(steps[one] - steps[other]) > 1e-3 * steps[one]:
            assert (steps[one] < steps[other]) == (predicted(one) < predicted(other)), f"{one} and {other}"


def test_a_measurement_that_fails_leaves_nothing_that_waits_for_the_clock(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Else the model that its traceback keeps would wait for ever when it goes, in whatever test that is."""
    waiting: list[_native.Ticket] = []
    wait = _native.Ticket.wait

    def fail(*_: object) -> None:
        (engine,) = _engine._engines
        waiting.extend(engine.lanes.in_flight())
        raise AssertionError("half-way")

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", fail)
    with pytest.raises(AssertionError, match="half-way"):
        measured("host, slow to_host", tmp_path, monkeypatch)
    assert waiting and all(wait(ticket, 60) for ticket in waiting)
