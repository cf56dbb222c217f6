"""The oracle: offloaded training equals resident training bit for bit, whatever the loop does."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

import offload
from offload._adamw import AdamWHyper, adamw_step_, round_to_weight
from training import (
    HOST,
    RESIDENT,
    Run,
    assert_offloaded,
    assert_same_bits,
    batches,
    loss_of,
    make_model,
    same_bits,
    train,
    wrapped_run,
)

pytestmark = pytest.mark.usefixtures("device")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LOOPS: dict[str, dict[str, Any]] = {
    "plain": {"clip": None},
    "clip": {},
    "accumulate": {"micro_batches": 4},
    "zero in place": {"micro_batches": 2, "set_to_none": False},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS.keys())
def test_offloaded_equals_resident(dtype: torch.dtype, loop: dict[str, Any]) -> None:
    model = make_model(dtype)
    offloaded = wrapped_run(model, HOST, **loop)
    assert_offloaded(offloaded.optimizer)
    assert_same_bits(offloaded, wrapped_run(model, RESIDENT, **loop))


@pytest.mark.parametrize("placement", [{"optimizer": "host", "gradients": "device"}], ids=["optimizer alone"])
def test_optimizer_alone_on_the_host(placement: dict[str, str]) -> None:
    model = make_model(torch.bfloat16)
    offloaded = wrapped_run(model, placement, micro_batches=2, set_to_none=False)
    assert_offloaded(offloaded.optimizer)
    assert_same_bits(offloaded, wrapped_run(model, RESIDENT, micro_batches=2, set_to_none=False))


@pytest.mark.parametrize("options", [{"master": "fp32"}, {"lazy": False}, {"poison": True}], ids=str)
def test_options_do_not_change_bits(options: dict[str, Any]) -> None:
    model = make_model(torch.bfloat16)
    assert_same_bits(wrapped_run(model, {**HOST, **options}), wrapped_run(model, RESIDENT))


def test_resident_matches_stock_adamw_on_fp32() -> None:
    model = make_model()
    wrapped = wrapped_run(model, RESIDENT, steps=20)
    plain_model = copy.deepcopy(model)
    plain = train(plain_model, torch.optim.AdamW(plain_model.parameters(), lr=1e-2), steps=20)
    for ours, stock in zip(wrapped.losses, plain.losses, strict=True):
        assert ours == pytest.approx(stock, rel=2e-4)
    for name, value in plain.weights.items():
        torch.testing.assert_close(wrapped.weights[name], value, rtol=2e-3, atol=2e-4)


def test_bf16_matches_plain_adamw_over_fp32_masters() -> None:
    """The same model trained by a loop in plain torch that keeps fp32 masters: the same bits."""
    model = make_model(torch.bfloat16)
    ours = wrapped_run(model, HOST, steps=8, clip=None)
    plain = copy.deepcopy(model)
    masters = {name: p.detach().float() for name, p in plain.named_parameters()}
    moments = {name: (torch.zeros_like(m), torch.zeros_like(m)) for name, m in masters.items()}
    hyper = AdamWHyper(1e-2, 0.9, 0.999, 1e-8, 1e-2, decoupled=True, maximize=False)
    losses = []
    for step, tokens in enumerate(batches(8), start=1):
        loss = loss_of(plain, tokens)
        loss.backward()
        losses.append(loss.item())
        for name, p in plain.named_parameters():
            adamw_step_(masters[name], *moments[name], p.grad, hyper.scalars(step))
            with torch.no_grad():
                p.copy_(round_to_weight(masters[name], torch.bfloat16))
            p.grad = None
    assert ours.losses == losses


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_hyperparameters_change_every_step(kind: Any) -> None:
    def run(placement: dict[str, str]) -> Run:
        model = make_model()
        groups = [
            {"params": list(model.embedding.parameters()), "lr": 3e-3, "weight_decay": 0.0},
            {"params": [p for n, p in model.named_parameters() if not n.startswith("embedding")], "betas": (0.8, 0.9)},
        ]
        optimizer = kind(groups, lr=1e-2, weight_decay=0.1, eps=1e-6)

        def change(step: int, _: nn.Module, wrapped: Any) -> None:
            wrapped.param_groups[0]["lr"] *= 0.5
            wrapped.param_groups[1]["betas"] = (0.8 + step / 100, 0.9)
            wrapped.param_groups[1]["maximize"] = step == 3
            wrapped.param_groups[1]["eps"] = 1e-6 * (step + 1)

        model, wrapped = offload.wrap(model, optimizer, **placement)
        return train(model, wrapped, each_step=change)

    assert_same_bits(run(HOST), run(RESIDENT))


@pytest.mark.parametrize("before", [True, False], ids=["before wrap", "after wrap"])
def test_schedulers(before: bool, recwarn: pytest.WarningsRecorder) -> None:
    def run(placement: dict[str, str]) -> Run:
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6) if before else None
        model, wrapped = offload.wrap(model, optimizer, **placement)
        if scheduler is None:
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(wrapped, 6)
        result = train(model, wrapped, scheduler=scheduler)
        assert wrapped.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)
        return result

    assert_same_bits(run(HOST), run(RESIDENT))
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]


def test_tied_and_frozen_weights() -> None:
    model = make_model(torch.bfloat16, tied=True)
    for p in model.blocks[1].parameters():
        p.requires_grad_(False)
    offloaded = wrapped_run(model, HOST, micro_batches=2)
    assert_same_bits(offloaded, wrapped_run(model, RESIDENT, micro_batches=2))
    assert offloaded.model.head.weight is offloaded.model.embedding.weight
    for name, value in model.blocks[1].state_dict().items():
        assert same_bits(value, offloaded.weights[f"blocks.1.{name}"])
    frozen = {id(p) for p in offloaded.model.blocks[1].parameters()}
    assert not frozen & {id(p) for p in offloaded.optimizer.state}


def test_parameters_without_a_gradient_this_step() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: torch.Tensor, skip: int) -> torch.Tensor:
            for index, layer in enumerate(self.layers):
                if index != skip:
                    x = x + torch.tanh(layer(x))
            return x

    def run(placement: dict[str, str]) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = Branches()
        model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **placement)
        for step in range(7):
            model(torch.ones(2, 8) * (step + 1), step % 3).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        steps = {state["step"].item() for state in optimizer.state.values()}
        assert steps == {4.0, 5.0}
        return [p.detach().clone() for p in model.parameters()]

    for one, other in zip(run(HOST), run(RESIDENT), strict=True):
        assert same_bits(one, other)


def test_two_optimizers() -> None:
    def run(placement: dict[str, str]) -> list[torch.Tensor]:
        model = make_model()
        first = torch.optim.AdamW(model.blocks.parameters(), lr=1e-2)
        second = torch.optim.Adam([*model.embedding.parameters(), *model.norm.parameters()], lr=3e-3)
        model, (a, b) = offload.wrap(model, (first, second), **placement)
        for index, tokens in enumerate(batches(6)):
            loss_of(model, tokens).backward()
            a.step()
            if index % 2:
                b.step()
                b.zero_grad()
            a.zero_grad()
        assert len(a.state) == 18 and len(b.state) == 3
        return [p.detach().clone() for p in model.parameters()]

    for one, other in zip(run(HOST), run(RESIDENT), strict=True):
        assert same_bits(one, other)


def test_fp16_scaler_with_a_skipped_step() -> None:
    """Autocast to fp16 with GradScaler; the scale is far too large at first, so steps overflow and are skipped."""

    def run(placement: dict[str, str] | None) -> tuple[list[float], list[torch.Tensor], list[float]]:
        model = make_model()
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if placement is not None:
            model, optimizer = offload.wrap(model, optimizer, **placement)
        scaler = torch.amp.GradScaler(torch.get_default_device().type, init_scale=2.0**34, growth_interval=2)
        losses, scales = [], []
        for tokens in batches(24):
            with torch.autocast(torch.get_default_device().type, dtype=torch.float16):
                loss = loss_of(model, tokens)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses.append(loss.item())
            scales.append(scaler.get_scale())
        return losses, [p.detach().clone() for p in model.parameters()], scales

    host, resident, stock = run(HOST), run(RESIDENT), run(None)
    assert host[0] == resident[0]
    assert host[2] == resident[2] == stock[2]
    assert host[2][0] < 2.0**34, "no step was skipped"
    assert host[2][-1] > min(host[2]), "the scale never grew again"
    for one, other in zip(host[1], resident[1], strict=True):
        assert same_bits(one, other)


def test_wrapping_an_optimizer_that_has_trained() -> None:
    """States of the stock optimizer go on; going resident -> host in the middle changes no bit."""

    def run(placements: list[dict[str, str]]) -> list[torch.Tensor]:
        model = make_model()
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-2)
        data = batches(8)
        for placement in placements:
            model, wrapped = offload.wrap(model, optimizer, **placement)
            for _ in range(4):
                loss_of(model, next(data)).backward()
                wrapped.step()
                wrapped.zero_grad()
            model, optimizer = offload.unwrap(model, wrapped)
        assert next(iter(optimizer.state.values()))["step"].item() == 8
        return [p.detach().clone() for p in model.parameters()]

    for one, other in zip(run([HOST, RESIDENT]), run([RESIDENT, HOST]), strict=True):
        assert same_bits(one, other)


def test_unwrap_wants_every_optimizer() -> None:
    model = make_model()
    pair = torch.optim.AdamW(model.blocks.parameters()), torch.optim.AdamW(model.embedding.parameters())
    model, wrapped = offload.wrap(model, pair, **HOST)
    with pytest.raises(offload.InvalidArgument, match="all 2"):
        offload.unwrap(model, wrapped[0])
    loss_of(model, next(batches(1))).backward()
    wrapped[0].step()  # nothing was changed
    assert offload.unwrap(model, wrapped)[1] == pair


def test_unwrap_leaves_nothing() -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = {key: value for key, value in vars(model.blocks[0]).items() if key.endswith("hooks")}
    model, wrapped = offload.wrap(model, optimizer, **HOST)
    loss_of(model, next(batches(1))).backward()
    expected = {name: p.grad.cell.materialize().clone() for name, p in model.named_parameters()}
    wrapped.step()
    plain_model, plain = offload.unwrap(model, wrapped)
    assert plain_model is model and plain is optimizer
    for name, p in model.named_parameters():
        assert type(p) is nn.Parameter and type(p.grad) is torch.Tensor
        assert same_bits(p.grad, expected[name])
        assert not p._post_accumulate_grad_hooks
        assert "_offload_resolve" not in vars(p)
    for module in model.modules():
        assert not module._forward_pre_hooks
    assert before == {key: value for key, value in vars(model.blocks[0]).items() if key.endswith("hooks")}
    loss_of(model, next(batches(1))).backward()
    plain.step()
    with pytest.raises(offload.StateError, match="not wrapped"):
        offload.unwrap(model, wrapped)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_written_after_wrap_reseed_the_master(dtype: torch.dtype) -> None:
    def run(placement: dict[str, str]) -> Run:
        def write(step: int, model: nn.Module, _: Any) -> None:
            if step == 2:
                with torch.no_grad():
                    model.blocks[0].up.weight[:2] *= 0.5
            if step == 3:
                saved = {name: value.clone() for name, value in model.state_dict().items()}
                model.load_state_dict({name: value * 0 for name, value in saved.items()})
                model.load_state_dict(saved)

        return wrapped_run(make_model(dtype), placement, each_step=write)

    written = run(HOST)
    assert_same_bits(written, run(RESIDENT))
    assert written.losses != wrapped_run(make_model(dtype), HOST).losses


def test_resync_after_data_writes() -> None:
    def run(placement: dict[str, str]) -> Run:
        def write(step: int, model: nn.Module, optimizer: Any) -> None:
            if step == 1:
                model.blocks[0].up.weight.data.mul_(0.25)
                optimizer.resync()

        return wrapped_run(make_model(torch.bfloat16), placement, each_step=write)

    assert_same_bits(run(HOST), run(RESIDENT))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("resync", [False, True], ids=["noticed", "resync"])
def test_new_storage_for_a_parameter_is_followed(dtype: torch.dtype, resync: bool) -> None:
    """`p.data = ...` bumps no version; the old storage may be gone, so nothing may be uploaded there."""

    def run(placement: dict[str, str]) -> Run:
        def replace(step: int, model: nn.Module, optimizer: Any) -> None:
            if step == 1:
                for p in model.blocks[1].parameters():
                    p.data = p.data * 0.5
                if resync:
                    optimizer.resync()

        return wrapped_run(make_model(dtype), placement, each_step=replace)

    replaced = run(HOST)
    assert_same_bits(replaced, run(RESIDENT))
    assert replaced.losses != wrapped_run(make_model(dtype), HOST).losses


@pytest.mark.parametrize("placement", [HOST, RESIDENT], ids=["host", "resident"])
def test_another_dtype_after_wrap_is_refused(placement: dict[str, str]) -> None:
    model = make_model()
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **placement)
    for p in model.parameters():  # which model.bfloat16() would refuse
        p.data = p.data.bfloat16()
    loss_of(model, next(batches(1))).backward()
    with pytest.raises(offload.StateError, match=r"embedding\.weight.*unwrap"):
        optimizer.step()


def test_optimizer_state_dict_round_trip() -> None:
    """Save in the middle, load into a fresh wrap on another tier: the same bits as never stopped."""
    import io

    def half(model: nn.Module, optimizer: Any, seed: int) -> None:
        for tokens in batches(3, seed=seed):
            loss_of(model, tokens).backward()
            optimizer.step()
            optimizer.zero_grad()

    model = make_model(torch.bfloat16)
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **HOST)
    half(model, optimizer, 1)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    half(model, optimizer, 2)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    for placement in (HOST, RESIDENT):
        other = make_model(torch.bfloat16, seed=9)
        other, resumed = offload.wrap(other, torch.optim.AdamW(other.parameters(), lr=5.0), **placement)
        groups = resumed.param_groups
        resumed.load_state_dict(saved["optimizer"])
        other.load_state_dict(saved["model"])
        assert resumed.param_groups is groups and groups[0]["lr"] == 1e-2
        half(other, resumed, 2)
        for one, two in zip(model.parameters(), other.parameters(), strict=True):
            assert same_bits(one.detach(), two.detach())


@pytest.mark.cpu_only
def test_standalone_adamw_equals_the_wrapped_one() -> None:
    for dtype in DTYPES:
        model = make_model(dtype)
        ours = wrapped_run(model, RESIDENT, clip=None)
        plain = copy.deepcopy(model)
        assert_same_bits(ours, train(plain, offload.AdamW(plain.parameters(), lr=1e-2), clip=None))


def test_a_default_device_of_the_user_does_not_reach_the_engine() -> None:
    """`torch.set_default_device` moves what the user makes; the tensors that offload makes say where they are."""

    def run(default: str | None) -> list[torch.Tensor]:
        model = make_model(torch.bfloat16)
        data = list(batches(4))
        stock = torch.optim.AdamW(model.parameters(), lr=1e-2)
        with torch.device(default) if default else nullcontext():
            model, optimizer = offload.wrap(model, stock, **HOST)
            for tokens in data:
                loss_of(model, tokens).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
            saved = optimizer.state_dict()
            optimizer.load_state_dict(saved)
            optimizer.stats()
            model, stock = offload.unwrap(model, optimizer)
        states = [*saved["state"].values(), *stock.state.values()]
        return [*model.parameters(), *(value for state in states for value in state.values())]

    for one, other in zip(run("meta"), run(None), strict=True):
        assert same_bits(one.detach(), other.detach())
