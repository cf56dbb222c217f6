"""Predictions: bytes by formula, the choice of `wrap`, activations that leave, steps, and several cards by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import offload
from offload import Hardware, InvalidArgument
from offload._disk_window import DiskWindow
from offload._model_sizes import token_costs
from offload._predicted_step import Job
from offload._units import find_units
from offload.cli._plan_model import decoder, decoder_of_depth

LLAMA_3_8B = 8_030_261_248
GIB = 2**30


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    """Llama-3-8B, in bf16 on the meta device."""
    return decoder_of_depth(32, 128_256, torch.bfloat16)


def card(**figures: Any) -> Hardware:
    return dataclasses.replace(Hardware.preset("4090"), **figures)


ROOMY = card(device_bytes=1 << 40, host_bytes=1 << 40)


def places(prediction: offload.Prediction) -> list[tuple[Any, ...]]:
    return [tuple(placed.options.values()) for placed in prediction.placements]


def test_bytes_of_llama_3_8b_in_every_placement(llama: nn.Module) -> None:
    found = offload.predict(llama, ROOMY, batches=[1])
    n = found.trainable_count
    assert n == LLAMA_3_8B and found.frozen_count == 0
    assert found.resident_bytes == 16 * n  # weight and gradient 2 each, master and two moments 4 each
    assert found.rule_of_thumb_bytes == 40 * n
    states = [
        ("device", "device", "device"),
        ("host", "device", "device"),
        ("host", "host", "device"),
        ("host", "host", "host"),
        ("disk", "host", "host"),
        ("disk", "host", "disk"),
    ]
    assert places(found) == [(*choice, where) for where in ("device", "checkpoints") for choice in states]
    totals = [(placed.device.total, placed.host.total, placed.disk.total) for placed in found.placements]
    head = 2 * 128_256 * 4096  # the largest unit; with one sent for ahead of it
    # On the host: weight, the other half of the master, moments and gradients.
    assert totals[:4] == [(16 * n, 0, 0), (4 * n, 14 * n, 0), (2 * n, 14 * n, 0), (2 * head, 14 * n, 0)]
    # On disk: half masters and moments; then the weights too.
    assert [disk for _, _, disk in totals[4:6]] == [10 * n, 12 * n]
    assert totals[6:] == totals[:6]  # activations go by the batch


@pytest.mark.parametrize("gib", [8, 20, 80, 200])
def test_the_plan_is_what_wrap_would_choose(llama: nn.Module, gib: int) -> None:
    """By the same code: an estimate for the hardware, and `make_plan` behind it."""
    hardware = card(device_bytes=gib * GIB, host_bytes=200 * GIB)
    plan, estimated = offload.predict(llama, hardware, batches=[1]).plan, offload.estimate(llama, hardware=hardware)
    assert plan == estimated
    expected = {
        8: ("host", "host", "host"),
        20: ("mixed", "host", "device"),
        80: ("mixed", "device", "device"),
        200: ("device", "device", "device"),
    }
    assert plan is not None and (plan.optimizer, plan.gradients, plan.params) == expected[gib]


def test_what_the_plan_keeps_is_a_placement_of_its_own(llama: nn.Module) -> None:
    found = offload.predict(llama, card(device_bytes=80 * GIB, host_bytes=200 * GIB), batches=[1])
    placed, leaving = (placed for placed in found.placements if placed.options["optimizer"] == "mixed")
    plan = found.plan
    assert plan is not None and [one.options["activations"] for one in (placed, leaving)] == ["device", "checkpoints"]
    assert (placed.device, placed.host) == (plan.device, plan.host) and 0 < placed.kept < 1
    assert (leaving.device, leaving.host, leaving.kept) == (placed.device, placed.host, placed.kept)
    assert found.cheapest() is placed


def test_nothing_is_allocated_and_the_model_is_as_it_was(llama: nn.Module) -> None:
    offload.predict(llama, "h200", batches=[1])
    assert all(p.is_meta for p in llama.parameters()) and not llama._forward_pre_hooks


def test_a_tied_head_is_multiplied_and_experts_are_not_all_passed() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 100}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    with torch.device("meta"):
        tied = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, tie_word_embeddings=True))
        experts = transformers.MixtralForCausalLM(
            transformers.MixtralConfig(**sizes, **heads, num_local_experts=8, num_experts_per_tok=2)
        )
    costs = token_costs(tied, find_units(tied), 16)
    assert costs.lookups == frozenset() and costs.logits == 100
    away = dict.fromkeys(("optimizer", "gradients", "params"), "host") | {"activations": "device"}
    found = offload.predict(tied.to(torch.bfloat16), ROOMY, batches=[1], length=16, checkpointing=False, **away)
    (step,) = found.steps
    n = sum(p.numel() for p in tied.parameters())
    operations = 3 * 16 * (2 * n + 2 * 2 * 16 * 64)  # the embedding's lookup is free, and the head is its product
    assert step.busy["compute"] == pytest.approx(operations / (ROOMY.flops * ROOMY.mfu))
    costs = token_costs(experts, find_units(experts), 16)
    passed = 2 * sum(p.numel() for n, p in experts.named_parameters() if ".layers.0." in n and ".experts." in n)
    assert passed == 2 * 8 * 3 * 64 * 96
    assert costs.operations["model.layers.0"] == 2 * 16 * 64 - 0.75 * passed


# An input of a block: 64 MiB.
LONG = 1 << 18
DEVICE = dict.fromkeys(("optimizer", "gradients", "params"), "device")


def deep() -> nn.Module:
    """Eight blocks of hidden 128 in bf16, whose logits weigh little."""
    return decoder(8, 128, vocabulary=16, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("activations", "may_leave", "on_device", "on_host"),
    [
        ("device", 0, 0, 0),
        # One of eight stays and another is saved, or comes back; as much as stays is on its way.
        ("checkpoints", 8, 1 + 1 + 1, 7),
        # The last norm saves three times as much, and the head as much as a block; an eighth of twelve stays, but the
        # newest always does.
        ("host", 12, 1 + 3 + 1.5, 11),
        # Six stay, and the first comes back while all that left may still be on their way.
        (0.5, 12, 6 + 1 + 6, 6),
        # Nine find the host full and stay, with the head's; one is back, and one and a half may still be on their way.
        ("128MiB", 12, 9 + 1 + 1 + 1.5, 2),
    ],
)
def test_activations_that_leave_by_hand(activations: Any, may_leave: int, on_device: float, on_host: int) -> None:
    found = offload.predict(deep(), ROOMY, batches=[1], length=LONG, activations=activations, **DEVICE)
    (step,) = found.steps
    block_input = 2 * 128 * LONG
    assert step.activation_bytes == found.sequence_bytes + (on_device - may_leave) * block_input
    assert step.activation_host_bytes == on_host * block_input
    assert step.device_bytes == found.resident_bytes + step.activation_bytes
    assert found.placements[0].options["activations"] == activations
    assert step.busy["to_host"] == pytest.approx(on_host * block_input / ROOMY.to_host)


def test_what_is_not_recomputed_leaves_range_by_range() -> None:
    model = deep()
    costs = token_costs(model, find_units(model), LONG)
    found = offload.predict(model, ROOMY, batches=[1], length=LONG, checkpointing=False, activations="host", **DEVICE)
    (step,) = found.steps
    saved = sum(costs.saved.values()) * 2 * LONG
    assert found.sequence_bytes == saved + 10 * 16 * LONG  # and the logits
    largest = max(costs.saved.values()) * 2 * LONG / 7  # of a block's seven matrices
    assert 0.875 * saved <= step.activation_host_bytes <= 0.875 * saved + largest
    stays = 10 * 16 * LONG + saved / 8 + saved / 8  # and as much on its way
    assert stays <= step.activation_bytes <= stays + 2 * largest


def test_activations_that_leave_cost_the_link_and_nothing_else() -> None:
    def steps(**figures: Any) -> list[float]:
        found = offload.predict(deep(), card(device_bytes=1 << 40, **figures), batches=[1], length=LONG, **DEVICE)
        return [step.seconds for step in found.steps]

    stay, leave = steps(to_host=1e15, to_device=1e15)
    assert leave == pytest.approx(stay, rel=1e-3)
    stay, leave = steps(to_host=1e7, to_device=1e15)
    block_input = 2 * 128 * LONG
    assert leave >= 7 * block_input / 1e7 > stay


def test_where_activations_do_not_fit_the_cheapest_lets_them_leave() -> None:
    """Between what is needed with one input of a block more than fits, and with all of them."""
    roomy = offload.predict(deep(), ROOMY, batches=[1], length=LONG, **DEVICE)
    tight = card(device_bytes=roomy.resident_bytes + roomy.sequence_bytes - 2 * 2 * 128 * LONG)
    found = offload.predict(deep(), tight, batches=[1], length=LONG)
    cheapest = found.cheapest()
    assert found.plan is not None and found.plan.activations == "device" and found.refusal is None
    assert cheapest is not None and cheapest.options == DEVICE | {"activations": "checkpoints"}
    assert all(found.placements[step.placement].options["activations"] == "checkpoints" for step in found.steps)
    (step,) = found.fastest()
    assert found.placements[step.placement] is cheapest and step.micro_batches == 1


def test_a_step_takes_as_many_micro_batches_as_memory_asks_for(llama: nn.Module) -> None:
    found = offload.predict(llama, card(device_bytes=40 * GIB, host_bytes=200 * GIB), batches=[1, 8], params="device",
                            gradients="host", optimizer="host", activations="device")  # fmt: skip
    (placed,) = found.placements
    one, eight = found.steps
    room = 40 * GIB - placed.device.total
    assert one.micro_batches == 1 and eight.micro_batches == -(-8 // (room // found.sequence_bytes)) > 1
    assert eight.device_bytes == placed.device.total + eight.activation_bytes <= 40 * GIB
    assert one.tokens == 2048 and eight.tokens_per_s == pytest.approx(8 * 2048 / eight.seconds)
    # 2 operations a parameter and token, three times with backward and once more for recomputed blocks; attention.
    each = 4 * (2 * (LLAMA_3_8B - 128_256 * 4096) + 32 * 2 * 2048 * 4096)
    hardware = found.hardware
    assert one.busy["compute"] == pytest.approx(2048 * each / (hardware.flops * hardware.mfu), rel=1e-3)
    # 2 bytes a gradient to the host; states and what else the host's memory sees of them 30.
    assert one.busy["to_host"] == pytest.approx(2 * LLAMA_3_8B / hardware.to_host)
    assert one.busy["host_update"] == pytest.approx(30 * LLAMA_3_8B / hardware.host_bandwidth)
    assert one.seconds >= max(one.busy.values()) and one.bound_by == "host_update"


def test_parts_that_cannot_fit_are_not_looked_at_closely(llama: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a step of 65,536 sequences those of which what never leaves is too much already."""
    looked: list[int] = []
    held = Job._held

    def counted(job: Job, plan: Any, config: Any, count: int) -> Any:
        looked.append(count)
        return held(job, plan, config, count)

    monkeypatch.setattr(Job, "_held", counted)
    found = offload.predict(llama, "h200", batches=[65_536], length=64, params="host")
    assert {step.placement for step in found.steps} and max(looked) < 65_536
    assert len(looked) < 20 * len(found.placements)


def test_fp32_computes_at_its_own_rate_and_a_few_wide_parameters_do_not_make_a_model_fp32() -> None:
    def seconds(dtype: torch.dtype, norms: torch.dtype) -> float:
        model = decoder(2, 256, vocabulary=512, dtype=dtype)
        for module in model.modules():
            if isinstance(module, nn.RMSNorm):
                module.to(norms)
        away = {"optimizer": "host", "gradients": "host"}  # so that compute is the model's alone
        return offload.predict(model, ROOMY, batches=[1], length=64, **away).steps[0].busy["compute"]

    half = seconds(torch.bfloat16, torch.bfloat16)
    assert seconds(torch.bfloat16, torch.float32) == half
    assert seconds(torch.float32, torch.float32) == pytest.approx(half * ROOMY.flops / ROOMY.fp32_flops)


def test_faster_links_memory_and_compute_never_make_a_step_slower(llama: nn.Module) -> None:
    base = card(host_bytes=200 * GIB)
    steps = offload.predict(llama, base, batches=[2], gradients="host", params="device").steps
    for name in ("flops", "to_host", "to_device", "host_bandwidth"):
        better = dataclasses.replace(base, **{name: 2 * getattr(base, name)})
        faster = offload.predict(llama, better, batches=[2], gradients="host", params="device").steps
        assert faster[0].seconds <= steps[0].seconds * 1.001, name


def test_states_on_disk_stay_in_the_frames_of_the_update_alone() -> None:
    """What others pass through (loads, saves) keeps nothing."""
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False, dtype=torch.bfloat16) for _ in range(24)))
    window = DiskWindow(1 << 20, 10 << 20, 16)  # a frame holds the states of a layer
    options: dict[str, Any] = {"optimizer": "disk", "gradients": "host", "params": "device", "disk_path": "."}
    found = offload.predict(model, ROOMY, batches=[1], activations="device", disk_window=window.nbytes, **options)
    assert ROOMY.disk_read is not None
    read = found.steps[0].busy["disk_read"] * ROOMY.disk_read
    assert read == pytest.approx(8 * window.frame_bytes)


def test_the_fastest_prefers_what_offloads_less(llama: nn.Module) -> None:
    """With all the memory there is everything stays on the device, at every batch."""
    found = offload.predict(llama, ROOMY, batches=[64, 128])
    assert [(step.batch, step.placement) for step in found.fastest()] == [(64, 0), (128, 0)]


def test_several_cards_by_hand() -> None:
    model = decoder(4, 256, vocabulary=512, dtype=torch.bfloat16)
    n = sum(p.numel() for p in model.parameters())
    whole = offload.predict(model, ROOMY, batches=[2], length=128)
    found = offload.predict(model, ROOMY, batches=[2], length=128, gpus=4, interconnect="10gbe")
    assert found.plan is None and found.refusal is None
    for alone, shared in zip(whole.placements[:4], found.placements[:4], strict=True):
        assert shared.device.weights == alone.device.weights  # whole; all else is shared out
        assert shared.host.total == -(-alone.host.total // 4)
        assert shared.device.moments == alone.device.moments // 4
    step = found.steps[0]
    # Gradients to their owners and weights back: 3/4 of 2 bytes each, at 80 % of 1.25 GB/s.
    assert step.busy["network"] == pytest.approx(0.75 * (2 * n + 2 * n) / (0.8 * 1.25e9))
    assert step.bound_by == "network" and step.seconds == step.busy["network"] and step.tokens == 4 * 2 * 128
    # Streamed weights are gathered for forward and for backward.
    streamed = next(s for s in found.steps if found.placements[s.placement].options["params"] == "host")
    assert streamed.busy["network"] == pytest.approx(0.75 * (2 * 2 * n + 2 * n) / (0.8 * 1.25e9))
    on_host = next(s for s in found.steps if s.placement == 2)
    alone = next(s for s in whole.steps if s.placement == 2)
    assert on_host.busy["host_update"] == pytest.approx(alone.busy["host_update"] / 4)
    assert on_host.busy["compute"] == alone.busy["compute"]
    leaving = next(s for s in found.steps if found.placements[s.placement].options["activations"] != "device")
    alone = next(s for s in whole.steps if s.placement == leaving.placement)
    # Activations are each card's own.
    assert leaving.activation_host_bytes == alone.activation_host_bytes > 0
    assert leaving.busy["to_host"] == pytest.approx(alone.busy["to_host"])


def test_weights_on_disk_pass_through_the_cache_of_a_card(llama: nn.Module) -> None:
    """Of its share of the host, not of all that there is."""
    hardware = card(host_bytes=16 * GIB, device_bytes=80 * GIB)
    options: dict[str, Any] = {"optimizer": "disk", "gradients": "host", "params": "disk", "activations": "device"}
    found = offload.predict(llama, hardware, batches=[1], gpus=2, interconnect="nvlink", **options, disk_path=".")
    host, step = found.placements[0].host, found.steps[0]
    states, weights = 10 * LLAMA_3_8B / 2, 2 * LLAMA_3_8B / 2
    assert hardware.disk_read is not None and 0 < host.cache < weights
    # The update, and forward and backward if all that is in the cache or on the device is not read.
    read = step.busy["disk_read"] * hardware.disk_read
    assert read >= states - host.window + 2 * (weights - host.cache)


def test_frozen_parameters_and_other_optimizers() -> None:
    model = decoder(2, 128, vocabulary=100, dtype=torch.bfloat16)
    model.get_submodule("embedding").requires_grad_(False)
    found = offload.predict(model, ROOMY, batches=[1], length=16, optimizer_class="lion", moments="bf16")
    assert found.frozen_count == 100 * 128
    # Trained: weight, gradient, fp32 master and one bf16 moment. Lossy moments have no way to the disk.
    assert found.resident_bytes == 2 * found.frozen_count + 10 * found.trainable_count
    assert not any("disk" in placed.options.values() for placed in found.placements)


def test_nothing_fits(llama: nn.Module) -> None:
    found = offload.predict(llama, card(device_bytes=GIB, host_bytes=GIB))
    assert found.plan is None and found.steps == () and found.fastest() == [] and found.cheapest() is None
    assert found.refusal is not None and "budget is too small" in found.refusal and "GiB needed" in found.refusal
    shared = offload.predict(llama, card(device_bytes=GIB, host_bytes=GIB), gpus=2, interconnect="nvlink")
    assert shared.refusal is not None and "nothing fits 2 cards: the device is too small" in shared.refusal


def test_updates_that_begin_in_backward_are_predicted_and_offered(llama: nn.Module) -> None:
    """What is offered is what asking for it gives. Backups take host memory; where little is left, less is offered."""
    away = {"optimizer": "host", "gradients": "host", "params": "device", "activations": "device"}
    places = {"batches": [4], "length": 2048, **away}
    roomy = dataclasses.replace(Hardware.preset("h200"), device_bytes=64 * GIB, host_bytes=400 * GIB)
    found = offload.predict(llama, roomy, **places)
    (step,) = found.steps
    assert step.ahead is not None and step.clipped_seconds == step.seconds > step.ahead.seconds
    assert 0 < step.ahead.backup_bytes < 12 * LLAMA_3_8B
    asked = offload.predict(llama, roomy, speculate=step.ahead.backup_bytes, **places)
    (begun,) = asked.steps
    assert begun.ahead is None
    assert (begun.seconds, begun.clipped_seconds) == (step.ahead.seconds, step.ahead.clipped_seconds)
    assert asked.placements[0].host.total == found.placements[0].host.total + step.ahead.backup_bytes
    update = begun.busy["host_update"] - step.busy["host_update"]
    assert update == pytest.approx(2 * step.ahead.backup_bytes / roomy.host_bandwidth)
    spare = found.host_capacity - found.placements[0].host.total
    for left in (step.ahead.backup_bytes // 2, 0):
        full = dataclasses.replace(roomy, host_bytes=roomy.host_bytes - round((spare - left) / 0.9))
        (less,) = offload.predict(llama, full, **places).steps
        assert (less.seconds, less.ahead is None) == (step.seconds, left == 0)
        assert less.ahead is None or 0 < less.ahead.backup_bytes <= left + 1


def test_several_cards_have_a_share_of_the_backups(llama: nn.Module) -> None:
    away = {"optimizer": "host", "gradients": "host", "params": "device", "activations": "device"}
    roomy = dataclasses.replace(Hardware.preset("h200"), host_bytes=400 * GIB)
    (step,) = offload.predict(llama, roomy, batches=[2], gpus=4, interconnect="nvlink", **away).steps
    assert step.ahead is not None and step.ahead.backup_bytes <= 12 * LLAMA_3_8B // 4


def test_activations_that_fit_nowhere_are_a_refusal(llama: nn.Module) -> None:
    found = offload.predict(llama, card(host_bytes=200 * GIB), length=1 << 16)
    assert found.plan is not None and found.steps == ()
    assert found.refusal is not None and "one sequence of 65536 tokens has" in found.refusal


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": []}, r"batches=\[\]: give numbers of sequences a step"),
        ({"batches": 4}, "batches=4: give numbers of sequences a step"),
        ({"length": None}, "length is None"),
        ({"optimizer_class": ["adamw"]}, r"optimizer_class=\['adamw'\]: legal are"),
        ({"batches": [0]}, "batch 0 is 0"),
        ({"length": -1}, "length is -1"),
        ({"gpus": 2}, "interconnect=None for 2 GPUs: give one of 10gbe"),
        ({"gpus": 2, "interconnect": "wifi"}, "interconnect='wifi'"),
        ({"activations": "checkpoints", "checkpointing": False}, "there are no checkpoints to leave"),
        ({"activations": "device", "activation_format": "int8"}, "activations='device': none leave"),
        ({"optimizer_class": "sgd"}, "optimizer_class='sgd': legal are 'adam'"),
        ({"optimiser": "host"}, "did you mean 'optimizer'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        offload.predict(decoder(2, 128, vocabulary=10, dtype=torch.bfloat16), "4090", **options)


def test_a_model_without_parameters() -> None:
    with pytest.raises(InvalidArgument, match="no parameters"):
        offload.predict(nn.Identity(), "4090")
