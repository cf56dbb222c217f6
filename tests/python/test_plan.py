"""The byte rule: sums by formula, the least offloading that fits, and errors that carry the numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import offload
from offload._config import Config
from offload._plan import ParameterSize, Plan, TierBytes, make_plan
from offload._stats import Stats

BIG = 2**50
WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}


def parameter(name: str, numel: int, dtype: str = "bfloat16", *, trainable: bool = True) -> ParameterSize:
    return ParameterSize(name, numel, WIDTHS[dtype], dtype, trainable)


def plan_for(
    parameters: list[ParameterSize],
    config: Config | None = None,
    *,
    device_bytes: int = BIG,
    host_bytes: int = BIG,
    gradient_itemsize: int | None = None,
) -> Plan:
    return make_plan(
        parameters,
        config or Config(),
        device_kind="cuda",
        device_bytes=device_bytes,
        host_bytes=host_bytes,
        gradient_itemsize=gradient_itemsize,
    )


HOST = Config(optimizer="host", gradients="host")


@pytest.mark.parametrize(
    ("dtype", "master", "on_device", "on_host"),
    [
        ("bfloat16", "auto", TierBytes(weights=2), TierBytes(working=2, master=2, moments=8, gradients=2)),
        ("bfloat16", "split", TierBytes(weights=2), TierBytes(working=2, master=2, moments=8, gradients=2)),
        ("bfloat16", "fp32", TierBytes(weights=2), TierBytes(working=2, master=4, moments=8, gradients=2)),
        ("float16", "auto", TierBytes(weights=2), TierBytes(working=2, master=4, moments=8, gradients=2)),
        ("float32", "auto", TierBytes(weights=4), TierBytes(master=4, moments=8, gradients=4)),
    ],
)
def test_bytes_of_one_offloaded_parameter(dtype: str, master: str, on_device: TierBytes, on_host: TierBytes) -> None:
    plan = plan_for([parameter("p", 1, dtype)], Config(optimizer="host", gradients="host", master=master))
    assert (plan.device, plan.host) == (on_device, on_host)


@pytest.mark.parametrize(
    ("dtype", "on_device"),
    [
        ("bfloat16", TierBytes(weights=2, master=4, moments=8, gradients=2)),
        ("float32", TierBytes(weights=4, moments=8, gradients=4)),
    ],
)
def test_bytes_of_one_resident_parameter(dtype: str, on_device: TierBytes) -> None:
    plan = plan_for([parameter("p", 1, dtype)], Config(optimizer="device", gradients="device"))
    assert plan.device == plan.resident == on_device
    assert plan.host == TierBytes()


def test_host_update_of_device_gradients_needs_them_on_both_sides() -> None:
    plan = plan_for([parameter("p", 100)], Config(optimizer="host", gradients="device"))
    assert (plan.device.gradients, plan.host.gradients) == (200, 200)


def test_gradient_itemsize_overrides_the_dtype() -> None:
    assert plan_for([parameter("p", 100)], HOST, gradient_itemsize=4).host.gradients == 400


def test_frozen_parameters_have_weights_only() -> None:
    plan = plan_for([parameter("p", 100, trainable=False)], HOST)
    assert (plan.device, plan.host) == (TierBytes(weights=200), TierBytes())
    assert (plan.trainable_count, plan.frozen_count) == (0, 100)


def test_master_form() -> None:
    half, brain, full = parameter("h", 1, "float16"), parameter("b", 1), parameter("f", 1, "float32")
    assert plan_for([brain, full], HOST).master == "split"
    assert plan_for([half, brain], HOST).master == "mixed"
    assert plan_for([full], HOST).master == "none"
    assert plan_for([brain], Config(optimizer="device")).master == "fp32"


def test_auto_goes_optimizer_then_gradients() -> None:
    model = [parameter("p", 1000)]  # resident 16,000 B; states away 4,000 B; gradients away too 2,000 B
    for budget, placement in [
        (16_000, ("device", "device")),
        (15_999, ("host", "device")),
        (4_000, ("host", "device")),
        (3_999, ("host", "host")),
        (2_000, ("host", "host")),
    ]:
        plan = plan_for(model, Config(device_budget=budget))
        assert (plan.optimizer, plan.gradients) == placement
    with pytest.raises(offload.InvalidArgument):
        plan_for(model, Config(device_budget=1_999))


def test_auto_optimizer_stays_when_given_gradients_make_the_room() -> None:
    plan = plan_for([parameter("p", 1000)], Config(gradients="host", device_budget=14_000))
    assert (plan.optimizer, plan.gradients) == ("device", "host")


def layers(count: int = 8, numel: int = 100) -> list[ParameterSize]:
    return [ParameterSize(f"layer{i}", numel, 2, "bfloat16", unit=f"unit{i}") for i in range(count)]


@pytest.mark.parametrize("prefetch", [1, 3])
def test_weights_on_the_host_leave_a_window(prefetch: int) -> None:
    root = ParameterSize("scale", 10, 4, "float32", stays=True)
    frozen = ParameterSize("frozen", 50, 2, "bfloat16", trainable=False, unit="unit0")
    plan = plan_for(
        [root, frozen, *layers()], Config(params="host", optimizer="host", gradients="host", prefetch=prefetch)
    )
    assert plan.params == "host"
    assert plan.device == TierBytes(weights=40 + (1 + prefetch) * 2 * 150)
    # The fp32 weight's master is what it is uploaded from; the frozen weight has a working copy, too.
    assert plan.host == TierBytes(working=1700, master=1600 + 40, moments=8 * 810, gradients=1640)
    alone = plan_for(layers(), Config(params="host", optimizer="device", gradients="device", prefetch=1))
    assert (alone.host, alone.device.weights) == (TierBytes(working=1600), 400)
    assert plan_for(layers(2), Config(params="host", prefetch=9)).device.weights == 400


def test_a_second_unit_is_sent_for_ahead_where_its_memory_is_there() -> None:
    for budget, prefetch in [(600, 2), (599, 1), (400, 1)]:
        config = Config(params="host", optimizer="host", gradients="host", device_budget=budget)
        plan = plan_for(layers(), config)
        assert (plan.prefetch, plan.device.weights) == (prefetch, (1 + prefetch) * 200)
        assert f"ahead of their use: {prefetch}" in plan.explain()
    given = Config(params="host", optimizer="host", gradients="host", device_budget=600, prefetch=1)
    assert plan_for(layers(), given).device.weights == 400
    assert plan_for(layers(), Config(device_budget=600)).prefetch == 2


def test_auto_offloads_weights_last() -> None:
    assert plan_for(layers(), device_bytes=BIG).params == "device"
    resident = 8 * 100 * 2
    plan = plan_for(layers(), Config(device_budget=resident))
    assert (plan.optimizer, plan.gradients, plan.params) == ("host", "host", "device")
    plan = plan_for(layers(), Config(device_budget=resident // 4))
    assert (plan.optimizer, plan.gradients, plan.params) == ("host", "host", "host")
    assert "params on the device would take" in plan.explain()
    with pytest.raises(offload.InvalidArgument, match="smaller units"):
        plan_for(layers(), Config(device_budget=resident // 4 - 1))
    with pytest.raises(offload.InvalidArgument, match="params='auto'"):
        plan_for(layers(), Config(device_budget=resident // 4, params="device"))


def test_a_measured_device_leaves_a_quarter_to_activations() -> None:
    model = [parameter("p", 1000)]
    assert plan_for(model, device_bytes=21_334).optimizer == "device"  # 3/4 of it is 16,000.5
    assert plan_for(model, device_bytes=21_330).optimizer == "host"


def test_too_small_a_device_lists_the_numbers() -> None:
    with pytest.raises(offload.InvalidArgument) as caught:
        plan_for([parameter("p", 2**30)], Config(device_budget="1GiB"))
    for word in [
        "device budget",
        "2.00 GiB needed",
        "1.00 GiB available",
        "raise device_budget",
        "moments",
        "8.00 GiB",
    ]:
        assert word in str(caught.value)


def test_too_small_a_device_under_explicit_placement_points_at_auto() -> None:
    with pytest.raises(offload.InvalidArgument, match="optimizer='auto'"):
        plan_for([parameter("p", 2**30)], Config(optimizer="device", device_budget="4GiB"))


def test_too_small_a_host_lists_the_numbers() -> None:
    with pytest.raises(offload.OutOfHostMemory) as caught:
        plan_for([parameter("p", 2**30)], Config(optimizer="host", gradients="host", host_budget="13GiB"))
    for word in ["host budget", "14.00 GiB needed", "13.00 GiB available", "raise host_budget", "working"]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("params", "remedy"),
    [("host", "with params='disk' weights may live on disk too"), ("disk", "raise host_budget, free host memory")],
)
def test_too_small_a_host_beside_a_disk_says_what_else_may_go_there(params: str, remedy: str) -> None:
    config = Config(optimizer="disk", gradients="host", params=params, disk_path=".", host_budget="1KiB")
    with pytest.raises(offload.OutOfHostMemory) as caught:
        plan_for([parameter("p", 2**30)], config)
    assert remedy in str(caught.value) and ("params='disk'" in str(caught.value)) == (params == "host")


def test_unsupported_dtypes_are_named() -> None:
    with pytest.raises(offload.InvalidArgument, match=r"'double'.*float64"):
        plan_for([ParameterSize("double", 1, 8, "float64")])
    assert plan_for([ParameterSize("double", 1, 8, "float64", trainable=False)]).device.weights == 8
    with pytest.raises(offload.InvalidArgument, match=r"'half'.*float16"):
        plan_for([parameter("half", 1, "float16")], Config(master="split"))


def test_explain_says_what_and_why() -> None:
    text = plan_for([parameter("p", 2**30)], Config(device_budget="8GiB")).explain()
    for word in ["moments", "8.00 GiB", "optimizer on the host", "16.00 GiB", "the given budget"]:
        assert word in text


def test_on_the_cpu_the_plan_says_that_nothing_is_saved() -> None:
    plan = make_plan([parameter("p", 1)], HOST, device_kind="cpu", device_bytes=BIG, host_bytes=BIG)
    assert any("the compute device is the CPU" in line for line in plan.reason)


models = st.lists(
    st.builds(
        lambda numel, dtype, trainable: parameter("p", numel, dtype, trainable=trainable),
        st.integers(0, 10**6),
        st.sampled_from(sorted(WIDTHS)),
        st.booleans(),
    ),
    max_size=8,
)
placements = st.sampled_from(["device", "host"])


@given(models, placements, placements)
def test_offloading_moves_bytes_and_loses_none(model: list[ParameterSize], optimizer: str, gradients: str) -> None:
    plan = plan_for(model, Config(optimizer=optimizer, gradients=gradients, master="fp32"))
    assert plan.device.weights == sum(p.numel * p.itemsize for p in model)
    assert plan.device.moments + plan.host.moments == 8 * plan.trainable_count
    trainable = [p for p in model if p.trainable]
    gradient_bytes = sum(p.numel * p.itemsize for p in trainable)
    assert gradient_bytes in (plan.device.gradients, plan.host.gradients)
    # Every trainable element has an fp32 value on the tier of its optimizer state, and one only.
    fp32_weights = sum(4 * p.numel for p in trainable if p.itemsize == 4)
    exact = plan.host.master if optimizer == "host" else plan.device.master + fp32_weights
    assert exact == 4 * plan.trainable_count
    assert (plan.host.total == 0) == (not trainable_bytes(plan) or optimizer == gradients == "device")


def trainable_bytes(plan: Plan) -> int:
    return plan.trainable_count


@given(models, st.integers(0, 2 * 10**8), st.integers(0, 2 * 10**8))
def test_more_budget_never_offloads_more(model: list[ParameterSize], first: int, second: int) -> None:
    small, large = sorted((first, second))
    try:
        tight = plan_for(model, Config(device_budget=small))
    except offload.InvalidArgument:
        return
    roomy = plan_for(model, Config(device_budget=large))
    assert roomy.host.total <= tight.host.total
    assert roomy.device.total >= tight.device.total


@given(models, st.integers(0, 10**8))
def test_auto_is_the_least_that_fits(model: list[ParameterSize], budget: int) -> None:
    order = [("device", "device"), ("host", "device"), ("host", "host")]
    fits = [
        (optimizer, gradients)
        for optimizer, gradients in order
        if plan_for(model, Config(optimizer=optimizer, gradients=gradients)).device.total <= budget
    ]
    config = Config(device_budget=budget)
    if not fits:
        with pytest.raises(offload.InvalidArgument):
            plan_for(model, config)
        return
    plan = plan_for(model, config)
    assert (plan.optimizer, plan.gradients) == fits[0]
    assert plan.device.total <= budget


def stats(update_s: float, exposed_s: float) -> Stats:
    return Stats(
        steps=3,
        device_bytes={"weights": 2048},
        host_bytes={"moments": 4096},
        pool={"mapped_bytes": 8192, "live_count": 3},
        transfers={"to_host_bytes": 1024, "to_host_count": 2},
        isa="avx512",
        pinned=False,
        pageable_reason="the CPU device pins nothing",
        update_s=update_s,
        blocked_s=5.0,  # for uploads too, which is none of the update
        exposed_s=exposed_s,
        fallbacks=("SGD runs as its own class",),
    )


@pytest.mark.parametrize(("update_s", "exposed_s", "share"), [(0, 0, None), (2, 0.5, 0.75), (2, 3, 0.0), (2, 0, 1.0)])
def test_hidden_share(update_s: float, exposed_s: float, share: float | None) -> None:
    assert stats(update_s, exposed_s).hidden_share == share


def test_stats_as_dict_and_text() -> None:
    value = stats(2, 0.5)
    as_dict = value.to_dict()
    assert as_dict["hidden_share"] == 0.75
    assert as_dict["host_bytes"] == {"moments": 4096}
    assert as_dict["fallbacks"] == ["SGD runs as its own class"]
    for word in ["4.00 KiB", "75.0% hidden", "pageable (the CPU device pins nothing)", "avx512", "SGD runs"]:
        assert word in str(value)
