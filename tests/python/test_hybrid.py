"""`optimizer="auto"` keeps the states on the device with which an update is shortest, and no bit depends on which."""

from __future__ import annotations

import ast
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import offload
from offload import _rates, _wrap
from offload._config import Config
from offload._hybrid import Hybrid, Rates, StateBytes, keep_fastest
from offload._kernels import Found
from offload._parameter_size import ParameterSize
from offload._plan import Plan, make_plan
from training import RESIDENT, Run, assert_same_bits, make_model, train, wrapped_run

BIG = 2**50
GB = 10**9
# Of an H200 with 16 cores on PCIe 5, a desktop's RTX 4090, and a GH200.
H200 = Rates(to_host=53e9, to_device=55e9, host_update=160e9, device_update=4e12)
RTX_4090 = Rates(to_host=25e9, to_device=25e9, host_update=70e9, device_update=0.9e12)
GH200 = Rates(to_host=297e9, to_device=375e9, host_update=400e9, device_update=3.4e12)
# A host that outruns its device, as where the update is separate operations on a small card.
SLOW_DEVICE = Rates(to_host=25e9, to_device=25e9, host_update=250e9, device_update=80e9)


def layers(count: int, numel: int = 1000, dtype: str = "bfloat16") -> list[ParameterSize]:
    width = {"bfloat16": 2, "float16": 2, "float32": 4}[dtype]
    return [ParameterSize(f"layer{i}", numel, width, dtype) for i in range(count)]


def plan_for(parameters: list[ParameterSize], rates: Rates | Callable[[], Rates] | None = H200, **options: Any) -> Plan:
    return make_plan(
        parameters,
        Config(**options),
        device_kind="cuda",
        device_bytes=BIG,
        host_bytes=BIG,
        measure=(lambda: rates) if isinstance(rates, Rates) else rates,
    )


# --- what one update costs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "options", "by_host", "by_device", "copied"),
    [
        ("bfloat16", {}, 30, 28, 2),
        ("bfloat16", {"master": "fp32"}, 32, 28, 2),
        ("float16", {}, 32, 28, 2),
        ("float32", {}, 36, 28, 4),
        ("bfloat16", {"grad_dtype": "fp32"}, 34, 30, 2),
    ],
)
def test_bytes_of_an_update_follow_the_formula(
    dtype: str, options: dict[str, Any], by_host: int, by_device: int, copied: int
) -> None:
    """With a rate of a byte a second, seconds are bytes; which part counts, the slowest one decides."""
    for rates, seconds in [
        (Rates(BIG, BIG, 1.0, 28.0), by_host),
        (Rates(BIG, 1.0, BIG, BIG), copied),
        (Rates(1.0, BIG, BIG, BIG), 4 if "grad_dtype" in options else copied),
    ]:
        # Room for one of the two: what it leaves is what the host does for the other.
        wide = 4 if dtype == "float32" else 2
        budget = 2 * wide + 2 * (4 if "grad_dtype" in options else wide) + (8 if dtype == "float32" else 12)
        plan = make_plan(
            layers(2, 1, dtype),
            Config(device_budget=budget, gradients="device", **options),
            device_kind="cuda",
            device_bytes=BIG,
            host_bytes=BIG,
            gradient_itemsize=4 if "grad_dtype" in options else None,
            measure=lambda rates=rates: rates,
        )
        assert plan.kept_states == {"layer0"}
        words = f"{seconds * 1e3:.3g} on the host beside {by_device / rates.device_update * 1e3:.3g} on the device"
        assert (
            words in plan.explain() and f"and {2 * seconds * 1e3:.3g} ms with all states on the host" in plan.explain()
        )


# --- the choice ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rates", [H200, RTX_4090, GH200], ids=["h200", "4090", "gh200"])
def test_the_device_keeps_what_fits_its_budget(rates: Rates) -> None:
    """8 B parameters, of which a device updates its own in a fraction of the host's time."""
    model, all_on_host_ms = layers(80, 10**8), 8e9 * 30 / rates.host_update * 1e3
    plan = plan_for(model, rates, device_budget=80 * GB)  # weights and gradients 32, 48 left: 4 B states of 12 B
    assert (plan.optimizer, plan.gradients, plan.params, plan.master) == ("mixed", "device", "device", "mixed")
    assert plan.kept_states == {f"layer{i}" for i in range(40)}
    assert plan.device.total == 80 * GB and plan.host.moments == plan.device.moments == 32 * GB
    text = plan.explain()
    assert f"and {all_on_host_ms:.3g} ms with all states on the host" in text
    assert f"predicted to take {all_on_host_ms / 2:.3g} ms" in text
    assert (
        f"its backward and then the longer of {all_on_host_ms / 2:.3g} ms on the host and of the next forward" in text
    )
    assert "50.0% of their bytes" in text and f"to host {rates.to_host / 1e9:.3g} GB/s" in text


def test_gradients_leave_with_their_states_alone() -> None:
    plan = plan_for(layers(80, 10**8), device_budget=30 * GB)  # weights 16, and 14 for what stays
    assert (plan.optimizer, plan.gradients) == ("mixed", "host")
    assert plan.kept_states == {f"layer{i}" for i in range(10)}
    assert plan.device.total == 30 * GB and plan.device.gradients == 2 * GB and plan.host.gradients == 14 * GB


def test_a_slow_device_keeps_less_than_fits() -> None:
    """As long as it is not done before the host is."""
    model = layers(80, 10**8)
    plan = plan_for(model, SLOW_DEVICE, device_budget=126 * GB)  # 78 of 80 would fit
    # An element takes the host 0.12 ns, and the device 0.35.
    times = [max((80 - n) * 30 / 250, n * 28 / 80) for n in range(79)]
    assert len(plan.kept_states) == times.index(min(times)) == 20
    assert plan.device.total < plan.device_capacity


def test_nothing_stays_where_that_is_no_shorter() -> None:
    plan = plan_for(layers(4), Rates(1e12, 1e12, 1e12, 1e6), device_budget=60_000)
    assert plan.optimizer == "host" and plan.kept_states == frozenset()
    assert "on the host beside 0 on the device" in plan.explain()


def test_what_was_asked_for_is_not_measured() -> None:
    def refuse() -> Rates:
        raise AssertionError("measured without need")

    for options in (
        {},
        {"optimizer": "host", "device_budget": 60_000},
        {"optimizer": 0.5, "device_budget": 60_000},
        {"params": "host", "device_budget": 50_000},
    ):
        plan = plan_for(layers(4), refuse, **options)  # type: ignore[arg-type]
        assert not options or plan.optimizer in ("host", "mixed")
        assert "predicted" not in plan.explain()


def test_it_is_measured_once() -> None:
    calls = []

    def measure() -> Rates:
        calls.append(H200)
        return H200

    # Gradients on the device leave room for no state, and on the host for three.
    model = [*layers(3, 10), ParameterSize("large", 1000, 2, "bfloat16")]
    plan = plan_for(model, measure, device_budget=4 * 1030 + 1, host_budget=14_100)
    assert len(calls) == 1 and plan.gradients == "host"
    assert plan.kept_states == {"layer0", "layer1", "layer2"} and plan.host.total == 14_000


def test_what_stays_needs_no_host_memory() -> None:
    """The host alone would not hold all states."""
    model = layers(4)  # 14,000 B a state, its gradient and working weight on the host
    with pytest.raises(offload.OutOfHostMemory):
        plan_for(model, None, device_budget=40_000, host_budget=30_000)
    plan = plan_for(model, device_budget=40_000, host_budget=30_000)
    assert plan.optimizer == "mixed" and len(plan.kept_states) == 2 and plan.host.total == 28_000


sizes = st.lists(
    st.builds(
        lambda numel, dtype, trainable: (numel, dtype, trainable),
        st.integers(0, 10**6),
        st.sampled_from(["bfloat16", "float16", "float32"]),
        st.booleans(),
    ),
    min_size=1,
    max_size=8,
)
speeds = st.floats(1e6, 1e13)


@settings(deadline=None)
@given(sizes, st.integers(0, 10**8), st.builds(Rates, speeds, speeds, speeds, speeds))
def test_it_is_bounded_and_no_longer_than_all_on_the_host(model: list[Any], budget: int, rates: Rates) -> None:
    parameters = [
        ParameterSize(f"p{i}", numel, 4 if dtype == "float32" else 2, dtype, trainable)
        for i, (numel, dtype, trainable) in enumerate(model)
    ]
    try:
        plain = plan_for(parameters, None, device_budget=budget)
    except offload.InvalidArgument:
        with pytest.raises(offload.InvalidArgument):
            plan_for(parameters, rates, device_budget=budget)
        return
    plan = plan_for(parameters, rates, device_budget=budget)
    assert (plan.gradients, plan.params) == (plain.gradients, plain.params)
    assert plan.optimizer == plain.optimizer or (plain.optimizer, plan.optimizer) == ("host", "mixed")
    assert plan.device.total <= budget and plan.host.total <= plain.host.total


def state(name: str, kept: int = 14) -> StateBytes:
    """Of one bf16 element whose gradient leaves unless the state stays."""
    return StateBytes(name, kept, 2, 2, 30, 28, state=12, link_read=10, link_written=12)


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(0, 12), st.builds(Rates, speeds, speeds, speeds, speeds))
def test_of_equal_states_no_number_is_faster(count: int, fitting: int, rates: Rates) -> None:
    states = [state(f"s{i}") for i in range(count)]
    chosen = keep_fastest(states, 14 * fitting + 13, rates)

    def seconds(kept: int) -> float:
        left = count - kept
        host = max(2 * left / rates.to_host, 2 * left / rates.to_device, 30 * left / rates.host_update)
        return max(host, 28 * kept / rates.device_update)

    assert max(chosen.host_seconds, chosen.device_seconds) == min(map(seconds, range(min(count, fitting) + 1)))
    assert chosen.kept == {f"s{i}" for i in range(len(chosen.kept))} and chosen.all_on_host_seconds == seconds(0)


def test_a_state_that_does_not_fit_leaves_its_room_to_later_ones() -> None:
    states = [state(name, kept) for name, kept in [("a", 9), ("b", 0), ("c", 3), ("d", 3), ("e", 3)]]
    chosen = keep_fastest(states, 7, H200)
    assert isinstance(chosen, Hybrid) and chosen.kept == {"c", "d"}


def test_what_the_device_could_update_on_the_host_is_told() -> None:
    """At 60 % host memory is what takes longest, at 65 % the link's way to the host."""
    chosen = keep_fastest([state(f"s{i}") for i in range(100)], 200, H200)
    assert len(chosen.kept) == 14 and chosen.unified is None  # their gradients have no room any more
    roomy = [state(f"s{i}", kept=12) for i in range(100)]  # gradients stay on the device anyway
    chosen = keep_fastest(roomy, 0, H200)
    assert chosen.unified is not None and chosen.unified.shares == {"unified": 0.6, "host": 0.4}
    assert chosen.unified.seconds == pytest.approx(100 * (0.4 * 30 + 0.6 * 22) / 160e9)
    assert f"with optimizer={chosen.unified.shares} it is predicted to take" in chosen.unified.words()
    slow = dataclasses.replace(H200, to_host=5e9, to_device=5e9)
    assert keep_fastest(roomy, 0, slow).unified is None


def test_the_plan_takes_the_shares_that_it_tells() -> None:
    model = layers(40)
    plan = plan_for(model, gradients="device", device_budget=4000 * 40 + 12_000 * 8)
    (line,) = [line for line in plan.reason if "offload bench unified" in line]
    shares = ast.literal_eval(line[line.index("{") : line.index("}") + 1])
    assert list(shares) == ["device", "unified", "host"] and sum(shares.values()) == pytest.approx(1)
    told = plan_for(model, None, optimizer=shares, gradients="device", device_budget=plan.device_capacity)
    assert told.optimizer == "mixed" and told.kept_states == plan.kept_states and told.unified_states
    assert told.device.total <= told.device_capacity


# --- in training --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rates", [H200, SLOW_DEVICE], ids=["h200", "slow device"])
def test_no_bit_depends_on_the_choice(dtype: torch.dtype, rates: Rates, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_wrap, "_measure", lambda *_: lambda: rates)
    model = make_model(dtype)
    nbytes = sum(p.nbytes for p in model.parameters())
    expected = wrapped_run(model, RESIDENT)
    places = set()
    for times in (1.2, 2.2, 2.9, 9.0):
        run = wrapped_run(model, {"device_budget": int(times * nbytes)})
        assert_same_bits(run, expected)
        plan, stats = run.optimizer.plan, run.optimizer.stats()
        places.add((plan.optimizer, plan.gradients))
        assert plan.device.total <= int(times * nbytes)
        assert stats.device_bytes.get("moments", 0) == plan.device.moments
    assert places >= {("mixed", "host"), ("mixed", "device"), ("device", "device")}


@pytest.mark.usefixtures("device")
def test_a_class_that_steps_in_one_place_stays_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_wrap, "_measure", lambda *_: lambda: H200)

    def run(**placement: Any) -> Run:
        model = make_model()
        # A power of two: host and device agree whether they fuse its product with the addition or not.
        return train(*offload.wrap(model, torch.optim.SGD(model.parameters(), lr=0.125), **placement))

    nbytes = sum(p.nbytes for p in make_model().parameters())
    auto = run(device_budget=3 * nbytes)
    assert auto.optimizer.plan.optimizer == "host"
    assert_same_bits(auto, run(**RESIDENT))


# --- the rates ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", [True, False])
def test_rates_are_those_of_real_work(device: torch.device, kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernels:
        monkeypatch.setattr(_rates, "find_kernels", lambda _: Found(None, "the test wants none"))
    monkeypatch.setattr(_rates, "_HOST_ELEMENTS", 1 << 16)
    monkeypatch.setattr(_rates, "_DEVICE_ELEMENTS", 1 << 16)
    monkeypatch.setattr(_rates, "_COPY_BYTES", 1 << 18)
    clock = itertools.count()
    monkeypatch.setattr(_rates.time, "perf_counter", lambda: 0.25 * next(clock))
    rates = _rates.measure_rates(device, pin=False)
    # Each run takes a quarter of a second of this clock.
    assert rates == Rates(4 << 18, 4 << 18, 4 * 26 << 16, 4 * 28 << 16)


def test_the_cpu_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _wrap._measure(torch.device("cpu"), Config()) is None
    asked = _wrap._measure(torch.device("cuda", 0), Config(moments="int8", pin=False))
    seen: dict[str, Any] = {}
    assert asked is not None
    monkeypatch.setattr(_rates, "_copy_rates", lambda device, **options: seen.update(options) or (1.0, 2.0))
    monkeypatch.setattr(_rates, "_host_update", lambda: 3.0)
    monkeypatch.setattr(_rates, "_device_update", lambda device: 4.0)
    assert asked() == Rates(1.0, 2.0, 3.0, 4.0) and seen == {"pin": False}
