"""timm: its models, optimizer factory, schedulers, clipping and averages."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import timm
import timm.optim
import timm.scheduler
import timm.utils
import torch
from outcomes import OFFLOADED, Outcome, assert_offloaded_equals_resident, wrap
from torch import nn

import offload
from training import RESIDENT

pytestmark = pytest.mark.usefixtures("device")

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
CONVNEXT = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32), "num_classes": 5}


def train(placement: dict[str, Any] | None, name: str, optimizer_name: str, clip: str, device: torch.device) -> Outcome:
    torch.manual_seed(0)
    model: Any = timm.create_model(name, **(VIT if name.startswith("vit") else CONVNEXT)).to(device)
    more = {"layer_decay": 0.75} if optimizer_name == "adamw" else {}
    optimizer = timm.optim.create_optimizer_v2(model, opt=optimizer_name, lr=1e-3, weight_decay=0.05, **more)
    model, optimizer = wrap(model, optimizer, placement)
    schedule, _ = timm.scheduler.create_scheduler_v2(
        optimizer, num_epochs=4, warmup_epochs=1, warmup_lr=1e-5, step_on_epochs=False, updates_per_epoch=2
    )
    averages = [timm.utils.ModelEmaV2(model, decay=0.9), timm.utils.ModelEmaV3(model, decay=0.9)]
    outcome = Outcome(optimizer=optimizer)
    for step in range(6):
        generator = torch.Generator("cpu").manual_seed(step)
        images = torch.randn(4, 3, 32, 32, generator=generator, device="cpu").to(device)
        loss = nn.functional.cross_entropy(model(images), torch.arange(4, device=device))
        (loss / 2).backward()
        outcome.numbers.append(loss.item())
        if step % 2 == 0:
            continue
        clipped = timm.models.model_parameters(model, exclude_head=clip == "agc")
        with present(model, placement):  # agc reads weights
            timm.utils.dispatch_clip_grad(clipped, value={"norm": 0.3, "value": 0.01, "agc": 0.02}[clip], mode=clip)
        outcome.numbers.append(float(sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None)))
        optimizer.step()
        optimizer.zero_grad()
        with present(model, placement):
            for average in averages:
                average.update(model)
        schedule.step_update(step)
    outcome.keep(model.state_dict())
    for number, average in enumerate(averages):
        outcome.keep(average.module.state_dict(), f"average{number}.")
    return outcome


def present(model: nn.Module, placement: dict[str, Any] | None) -> Any:
    return contextlib.nullcontext() if placement is None else offload.full_params(model)


@pytest.mark.parametrize("name", OFFLOADED)
@pytest.mark.parametrize("clip", ["norm", "value", "agc"])
@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "convnext_tiny"])
def test_models(model: str, clip: str, name: str, device: torch.device) -> None:
    resident = train(RESIDENT, model, "adamw", clip, device)
    assert resident.numbers == pytest.approx(train(None, model, "adamw", clip, device).numbers, rel=1e-3)
    assert_offloaded_equals_resident(train(OFFLOADED[name], model, "adamw", clip, device), resident)


# Those that save states in a way of their own are refused at wrap.
REFUSED = ["kron", "lookahead_adamw"]
# Those that load states in a way of their own.
LOADERS = ["adabelief", "adafactor", "laprop", "novograd"]
OPTIMIZERS = [
    *LOADERS, "adadelta", "adafactorbv", "adagrad", "adamax", "adamp", "adan", "adopt", "cadamw", "lamb", "lambc",
    "lars", "lion", "madgrad", "mars", "muon", "nadamw", "radam", "rmsproptf", "sgd", "sgdp",
]  # fmt: skip


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers(optimizer: str, device: torch.device) -> None:
    model = "vit_tiny_patch16_224"
    plain = train(None, model, optimizer, "norm", device)
    resident = train(RESIDENT, model, optimizer, "norm", device)
    assert resident.numbers == pytest.approx(plain.numbers, rel=1e-3)
    for name, placement in OFFLOADED.items():
        found = train(placement, model, optimizer, "norm", device)
        assert found.numbers == resident.numbers, name


@pytest.mark.parametrize("optimizer", REFUSED)
def test_optimizers_that_are_refused(optimizer: str, device: torch.device) -> None:
    with pytest.raises(offload.InvalidArgument, match=r"has a state_dict of its own"):
        train(RESIDENT, "vit_tiny_patch16_224", optimizer, "norm", device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("optimizer", LOADERS)
def test_optimizers_that_load_in_a_way_of_their_own(optimizer: str, dtype: torch.dtype, device: torch.device) -> None:
    """A run that goes on from a checkpoint has the bits of one that was not stopped."""

    def begin(placement: dict[str, Any]) -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        model: Any = timm.create_model("vit_tiny_patch16_224", **VIT).to(device, dtype)
        return offload.wrap(model, timm.optim.create_optimizer_v2(model, opt=optimizer, lr=1e-3), **placement)

    def train_on(model: nn.Module, optimizer: Any, steps: range) -> list[float]:
        losses = []
        for step in steps:
            generator = torch.Generator("cpu").manual_seed(step)
            images = torch.randn(4, 3, 32, 32, generator=generator, device="cpu").to(device, dtype)
            loss = nn.functional.cross_entropy(model(images).float(), torch.arange(4, device=device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    whole = list[float]()
    for placement in (RESIDENT, *OFFLOADED.values()):
        model, trained = begin(placement)
        losses = train_on(model, trained, range(3))
        saved = copy.deepcopy((model.state_dict(), trained.state_dict()))
        losses += train_on(model, trained, range(3, 6))
        whole = whole or losses
        assert losses == whole
        model, resumed = begin(placement)
        model.load_state_dict(saved[0])
        resumed.load_state_dict(saved[1])
        assert train_on(model, resumed, range(3, 6)) == whole[3:]
