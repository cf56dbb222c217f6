"""diffusers: a UNet under Accelerate, with its scheduler, clipping and an average of the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from outcomes import OFFLOADED, Outcome, assert_offloaded_equals_resident, wrap
from torch import nn

import offload
from training import RESIDENT

pytestmark = pytest.mark.usefixtures("device")

SIZE = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "norm_num_groups": 4}
BLOCKS = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}


def train(
    placement: dict[str, Any] | None, out: Path, device: torch.device, precision: str = "no", resume: bool = False
) -> Outcome:
    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps the device of the process's first Accelerator
    GradientState._reset_state()
    torch.manual_seed(0)
    accelerator = Accelerator(
        gradient_accumulation_steps=2, mixed_precision=precision, cpu=device.type == "cpu", project_dir=str(out)
    )
    model = UNet2DModel(**SIZE, **BLOCKS).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, wrapped = wrap(model, optimizer, placement)
    average = EMAModel(model.state_dict().values(), decay=0.9, model_cls=UNet2DModel, model_config=model.config)
    schedule = get_cosine_schedule_with_warmup(wrapped, num_warmup_steps=1, num_training_steps=8)
    model, optimizer, schedule = accelerator.prepare(model, wrapped, schedule)
    noises = DDPMScheduler(num_train_timesteps=10)
    outcome = Outcome(optimizer=wrapped)
    if resume:
        accelerator.load_state(str(out / "state"))
    for step in range(4 if resume else 0, 8):
        generator = torch.Generator("cpu").manual_seed(step)
        images, noise = (torch.randn(2, 1, 8, 8, generator=generator, device="cpu").to(device) for _ in range(2))
        levels = torch.randint(10, (2,), generator=generator, device="cpu").to(device)
        with accelerator.accumulate(model):
            guess = model(noises.add_noise(images, noise, levels), levels).sample
            loss = nn.functional.mse_loss(guess.float(), noise)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                outcome.numbers.append(float(accelerator.clip_grad_norm_(model.parameters(), 0.3)))
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients and not resume:
            with offload.full_params(accelerator.unwrap_model(model)) if placement else torch.no_grad():
                average.step(model.parameters())
        outcome.numbers.append(loss.item())
        if step == 3 and not resume:
            accelerator.save_state(str(out / "state"))
        if step == 5:
            with torch.no_grad():
                outcome.numbers.append(model(images, levels).sample.square().sum().item())
    outcome.keep(accelerator.unwrap_model(model).state_dict())
    if not resume:
        outcome.keep({str(number): value for number, value in enumerate(average.shadow_params)}, "average.")
    return outcome


@pytest.mark.parametrize("name", OFFLOADED)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_unet(precision: str, name: str, tmp_path: Path, device: torch.device) -> None:
    resident = train(RESIDENT, tmp_path / "resident", device, precision)
    plain = train(None, tmp_path / "plain", device, precision)
    assert resident.numbers == pytest.approx(plain.numbers, rel=1e-3 if precision == "no" else 3e-2)
    offloaded = train(OFFLOADED[name], tmp_path / "offloaded", device, precision)
    assert_offloaded_equals_resident(offloaded, resident)
    again = train(OFFLOADED[name], tmp_path / "offloaded", device, precision, resume=True)
    assert again.numbers == resident.numbers[-len(again.numbers) :] and len(again.numbers) == 7
    averages = {key: value for key, value in resident.tensors.items() if key.startswith("average.")}
    assert_offloaded_equals_resident(Outcome(resident.numbers, again.tensors | averages, again.optimizer), resident)
