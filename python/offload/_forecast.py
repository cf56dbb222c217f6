"""How long a step will take: what its units cost in, the machine's rates, and the seconds out. Pure functions.

[Note: the bound of a step] Each lane (compute, the link in both directions, the host optimizer, the disk in both
directions) needs its bytes, or operations, over its rate. No step is shorter than the longest of these: lanes can hide
behind each other, and not behind themselves. `forecast` gives that bound, and what the pipeline makes of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from ._activation_order import DEFAULT_KEEP, IN_FLIGHT_BYTES, RING_BYTES
from ._errors import InvalidArgument
from ._simulated_cache import cache_room
from ._simulated_windows import window_schedule
from ._simulator import Settings, simulate
from ._step_work import Machine, UnitWork

__all__ = ["StepForecast", "forecast"]


@dataclasses.dataclass(frozen=True)
class StepForecast:
    """Seconds of one step among many alike.

    bound_seconds: of the busiest lane, `bound_by`. busy: what each lane has to do. exposed: what compute waits for each
    lane; with the compute of `busy` that is `seconds`. clipped_seconds: of a step that takes back all updates that
    began in backward, as one does whose norm clips. backup_bytes: of those; nothing is gained by room for more.
    """

    seconds: float
    bound_seconds: float
    bound_by: str
    busy: Mapping[str, float]
    exposed: Mapping[str, float]
    clipped_seconds: float
    backup_bytes: int


def forecast(
    units: Sequence[UnitWork],
    machine: Machine,
    *,
    micro_batches: int = 1,
    prefetch: int = 1,
    clips: bool = True,
    lazy: bool = True,
    kept_activations: float = DEFAULT_KEEP,
    activation_host_bytes: int | None = None,
    window_bytes: int = 0,
    cache_bytes: int = 0,
    ring_bytes: int = RING_BYTES,
    in_flight_bytes: int = IN_FLIGHT_BYTES,
    speculate_bytes: int = 0,
) -> StepForecast:
    """One of many equal steps over `units`, which are in the order of the forward.

    micro_batches: of a step. prefetch: units of streamed weights that are sent for ahead. clips: the update waits for
    the norm of all gradients. lazy: `step()` returns while updates run. kept_activations: the share of what a
    micro-batch saves that stays on the device. activation_host_bytes: what it may take on the host; None: all that it
    takes. window_bytes, cache_bytes: host memory in which states and weights on disk stay until they are needed again.
    ring_bytes: device memory of gradients on their way. in_flight_bytes: of activations on their way to the host, where
    less may stay. speculate_bytes: host memory of backups, with which updates begin in backward: each costs its backup
    to be written, and the step keeps it, as no norm clips. They begin until the step's first update can.

    Raises `InvalidArgument` for no units, numbers that make no sense, and a lane that is needed and has no rate.
    """
    if not units:
        raise InvalidArgument("forecast: there are no units; give what each costs, as unit_works makes it")
    for name, value in {"micro_batches": micro_batches, "prefetch": prefetch}.items():
        if value < 1:
            raise InvalidArgument(f"forecast: {name} is {value}; give 1 or more")
    settings = Settings(
        micro_batches=micro_batches,
        prefetch=prefetch,
        clips=clips,
        lazy=lazy,
        kept_activations=kept_activations,
        activation_host_bytes=activation_host_bytes,
        window_bytes=window_bytes,
        cache_bytes=cache_bytes,
        ring_bytes=ring_bytes,
        in_flight_bytes=in_flight_bytes,
        speculate_bytes=speculate_bytes,
    )
    least = _least(units, machine, settings)
    bound_by = max(least, key=least.__getitem__)
    step = simulate(units, machine, settings)
    clipped = simulate(units, machine, dataclasses.replace(settings, throws_away=True)) if speculate_bytes else step
    return StepForecast(
        step.seconds,
        least[bound_by],
        bound_by,
        step.busy,
        step.exposed,
        clipped.seconds,
        step.backup_bytes,
    )


def _least(units: Sequence[UnitWork], machine: Machine, settings: Settings) -> dict[str, float]:
    """Seconds that each lane needs at least: see [Note: the bound of a step]."""

    def total(field: str) -> int:
        return sum(getattr(unit, field) for unit in units)

    streamed = [unit for unit in units if unit.weight_bytes]
    sent = [streamed[number] for touch in window_schedule(len(streamed), settings.prefetch) for number in touch]
    room = cache_room(units, settings.cache_bytes)
    count = settings.micro_batches
    order = settings.order_of(units)
    saved = count * order.sent_bytes
    gradients, stored = total("gradient_bytes"), total("stored_bytes")
    moved = {
        "to_host": count * gradients + saved + total("step_to_host_bytes") + total("crossing_to_host_bytes"),
        "to_device": count * sum(unit.weight_bytes for unit in sent)
        + (count - 1) * gradients
        + saved
        + total("step_to_device_bytes")
        + total("crossing_to_device_bytes")
        + total("upload_bytes"),
        "host_update": total("host_update_bytes") + total("crossing_bytes"),
        "disk_read": max(0, total("disk_read_bytes") - settings.window_bytes)
        # Updates, forwards and backwards go through all weights: each finds at most `room` bytes in the cache.
        + max(0, stored - room)
        + count * max(0, sum(unit.stored_bytes for unit in sent) - 2 * room),
        "disk_write": total("disk_write_bytes") + max(0, stored - room),
    }
    compute = count * sum(unit.forward_seconds + unit.backward_seconds for unit in units)
    compute += machine.seconds("device_update", total("device_update_bytes") + 2 * count * order.converted_bytes)
    return {"compute": compute} | {lane: machine.seconds(lane, nbytes) for lane, nbytes in moved.items()}
