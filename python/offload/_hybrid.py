"""Which optimizer states stay on the device when not all of them fit: those with which a step's update is shortest.

[Note: the time of an update] The host updates its states while the device updates its own, so the longer of the two
counts. The host's part is as long as the slowest of three that run at once: gradients that leave, weights that come
back, and the traffic of host memory, copies included, for they share it. Compute is left out: what of the host's part
hides behind the next forward is not known before a model runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ._parameter_size import MASTER_BYTES, ParameterSize, host_master, link_bytes

# Of the states on the host, the shares that are tried for the device to update, and how much shorter an update must
# become to be told of.
_SHARES_TRIED = [step / 20 for step in range(1, 21)]
_WORTH_TELLING = 0.9

__all__ = ["Hybrid", "Rates", "StateBytes", "keep_fastest", "state_bytes"]


@dataclasses.dataclass(frozen=True)
class Rates:
    """Bytes a second, measured on this machine.

    to_host, to_device: of copies. host_update, device_update: what AdamW reads and writes in the memory it runs over.
    """

    to_host: float
    to_device: float
    host_update: float
    device_update: float

    def __str__(self) -> str:
        return ", ".join(
            f"{field.name.replace('_', ' ')} {getattr(self, field.name) / 1e9:.3g} GB/s"
            for field in dataclasses.fields(self)
        )


@dataclasses.dataclass(frozen=True)
class StateBytes:
    """The state of one parameter, in bytes.

    kept: what it takes on the device, with the gradient where that leaves unless the state stays. The others are what
    one update copies, reads and writes, if it runs on the host or on the device; link_read, link_written: if the device
    updates the state on the host. state: what there is of it.
    """

    name: str
    kept: int
    to_host: int
    to_device: int
    host_update: int
    device_update: int
    state: int
    link_read: int
    link_written: int


def state_bytes(
    parameter: ParameterSize, master: str, gradient_itemsize: int | None, *, gradient_leaves: bool
) -> StateBytes:
    """The state of a parameter whose weight is on the device. master, gradient_itemsize: as in `make_plan`."""
    gradient, weight = parameter.numel * (gradient_itemsize or parameter.itemsize), parameter.numel * parameter.itemsize
    form = host_master(parameter, master)
    # The host reads and writes the states. A gradient comes in and is read; a 16-bit weight is written, read where
    # it is the master or half of it, and goes out; an fp32 one, which is the master, goes out.
    passes = 1 if parameter.itemsize == 4 else 2 if form == "fp32" else 3
    link_read, link_written = link_bytes(parameter, master, streamed=False)
    return StateBytes(
        name=parameter.name,
        kept=parameter.state_bytes + (gradient if gradient_leaves else 0),
        to_host=gradient,
        to_device=weight,
        host_update=2 * (gradient + parameter.moments + parameter.numel * MASTER_BYTES[form]) + passes * weight,
        # There a weight that is its own master is read and written.
        device_update=gradient + 2 * parameter.state_bytes + (1 if parameter.device_master else 2) * weight,
        state=parameter.state_bytes,
        link_read=link_read,
        link_written=link_written,
    )


@dataclasses.dataclass(frozen=True)
class _Work:
    """Bytes of one update of all states: the host's part, and the device's."""

    to_host: int
    to_device: int
    host_update: int
    device_update: int

    def keeping(self, state: StateBytes) -> _Work:
        """With this one on the device."""
        return _Work(
            self.to_host - state.to_host,
            self.to_device - state.to_device,
            self.host_update - state.host_update,
            self.device_update + state.device_update,
        )

    def seconds(self, rates: Rates) -> tuple[float, float]:
        """Of the host's part and of the device's."""
        copies = max(self.to_host / rates.to_host, self.to_device / rates.to_device)
        return max(copies, self.host_update / rates.host_update), self.device_update / rates.device_update


@dataclasses.dataclass(frozen=True)
class UnifiedShares:
    """Shares of the states, as `optimizer=` takes them, with some that the device updates on the host; and seconds."""

    shares: dict[str, float]
    seconds: float

    def words(self) -> str:
        """It is the user's choice: whether it pays goes by compute, which is not known here."""
        return (
            f"with optimizer={self.shares} it is predicted to take {self.seconds * 1e3:.3g} ms, if the device reads "
            "and writes host memory as fast as it copies (offload bench unified measures that): its part comes before "
            "the next forward, so it pays where steps are too short to hide the host's update"
        )


@dataclasses.dataclass(frozen=True)
class Hybrid:
    """Whose states stay, and the seconds of an update: of both parts, and with all states on the host.

    unified: what would be shorter by much, if anything.
    """

    kept: frozenset[str]
    host_seconds: float
    device_seconds: float
    all_on_host_seconds: float
    rates: Rates
    unified: UnifiedShares | None = None

    def words(self) -> str:
        longer = max(self.host_seconds, self.device_seconds)
        return (
            f"an update is predicted to take {longer * 1e3:.3g} ms ({self.host_seconds * 1e3:.3g} on the host beside "
            f"{self.device_seconds * 1e3:.3g} on the device), and {self.all_on_host_seconds * 1e3:.3g} ms with all "
            f"states on the host; rates: {self.rates}"
        )

    def words_of_step(self) -> str:
        """What that means for a step: both parts begin where its backward ends, the host's beside a forward."""
        return (
            f"a step is predicted to take its backward and then the longer of {self.host_seconds * 1e3:.3g} ms on the "
            f"host and of the next forward with {self.device_seconds * 1e3:.3g} ms on the device before it"
        )


def keep_fastest(states: Sequence[StateBytes], room_bytes: int, rates: Rates) -> Hybrid:
    """Keeps, in the model's order, each state that fits into `room_bytes` and makes the update shorter.

    The first ones, as in `states_that_fit`: the next forward begins with them, and it would wait for the host.
    """
    work = _Work(
        sum(state.to_host for state in states),
        sum(state.to_device for state in states),
        sum(state.host_update for state in states),
        0,
    )
    all_on_host = shortest = max(work.seconds(rates))
    kept = []
    for state in states:
        if not 0 < state.kept <= room_bytes:
            continue
        tried = work.keeping(state)
        seconds = max(tried.seconds(rates))
        if seconds < shortest:
            work, shortest = tried, seconds
            room_bytes -= state.kept
            kept.append(state.name)
    on_host = [state for state in states if state.name not in kept]
    unified = _with_unified(states, on_host, work, room_bytes, rates)
    return Hybrid(frozenset(kept), *work.seconds(rates), all_on_host, rates, unified)


def _with_unified(
    states: Sequence[StateBytes], on_host: Sequence[StateBytes], work: _Work, room_bytes: int, rates: Rates
) -> UnifiedShares | None:
    """The share of `on_host` with which the longest of all that runs at once is shortest: both ways of the link, the
    traffic of host memory, and the device, which reads and writes while it updates. Its gradients fit `room_bytes`."""
    total, away = (sum(state.state for state in group) for group in (states, on_host))
    gradients = sum(state.kept - state.state for state in on_host)
    fitting = [share for share in _SHARES_TRIED if share * gradients <= room_bytes]
    if away == 0 or not fitting:
        return None
    read, written = sum(state.link_read for state in on_host), sum(state.link_written for state in on_host)
    device_update = work.device_update / rates.device_update

    def seconds(share: float) -> float:
        left = 1 - share
        return max(
            (left * work.to_host + share * written) / rates.to_host,
            (left * work.to_device + share * read) / rates.to_device,
            (left * work.host_update + share * (read + written)) / rates.host_update,
            device_update + share * max(read / rates.to_device, written / rates.to_host),
        )

    best = min(fitting, key=seconds)
    if seconds(best) > _WORTH_TELLING * max(work.seconds(rates)):
        return None
    shares = {"device": round(1 - away / total, 2), "unified": round(best * away / total, 2)}
    shares["host"] = round(1 - sum(shares.values()), 2)
    return UnifiedShares({place: share for place, share in shares.items() if share > 0}, seconds(best))
