"""PyTorch Lightning and Fabric: a wrapped pair in the hands of both, which stay as they are."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning_fabric
import pytest
import pytorch_lightning as lightning
import torch
from outcomes import OFFLOADED, Outcome, assert_offloaded_equals_resident, wrap
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from pytorch_lightning.utilities import grad_norm
from torch import Tensor
from torch.utils.data import DataLoader

import offload
from training import RESIDENT, batches, loss_of, make_model

pytestmark = [pytest.mark.usefixtures("device"), pytest.mark.filterwarnings("ignore")]


class Module(lightning.LightningModule):
    """Wraps where its optimizer is made, or, with `early`, before Lightning moves it to the device."""

    def __init__(self, placement: dict[str, Any] | None, kind: Any, *, early: bool) -> None:
        super().__init__()
        self.placement, self.kind, self.early = placement, kind, early
        self.outcome = Outcome()
        self.model: Any = None if early else make_model()

    def wrap(self) -> None:
        optimizer = self.kind(self.model.parameters(), lr=1e-2)
        self.model, self.outcome.optimizer = wrap(self.model, optimizer, self.placement)

    def configure_model(self) -> None:
        if self.model is None:
            self.model = make_model(torch.get_default_dtype())
            self.wrap()

    def configure_optimizers(self) -> Any:
        if not self.early:
            self.wrap()
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.outcome.optimizer, T_max=8)
        return {"optimizer": self.outcome.optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, tokens: Tensor, index: int) -> Tensor:
        loss = loss_of(self.model, tokens)
        self.outcome.numbers.append(loss.item())
        self.log("loss", loss)
        return loss

    def validation_step(self, tokens: Tensor, index: int) -> None:
        loss = loss_of(self.model, tokens)
        self.log("val_loss", loss)
        self.outcome.numbers.append(loss.item())

    def test_step(self, tokens: Tensor, index: int) -> None:
        self.validation_step(tokens, index)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.outcome.numbers.append(float(grad_norm(self.model, 2)["grad_2.0_norm_total"]))


class ManualModule(Module):
    """Steps, clips and schedules by itself."""

    automatic_optimization = property(lambda self: False)  # type: ignore[assignment]

    def training_step(self, tokens: Tensor, index: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        loss = loss_of(self.model, tokens)
        self.manual_backward(loss / 2)
        if index % 2:
            self.clip_gradients(optimizer, gradient_clip_val=0.3, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad()
            self.lr_schedulers().step()  # type: ignore[union-attr]
        self.outcome.numbers.append(loss.item())


class PresentAverage(EMAWeightAveraging):
    """The average of a module whose weights come and go: they are present while it reads and swaps them."""

    def on_train_batch_end(self, trainer: Any, module: Any, *arguments: Any, **more: Any) -> None:
        with offload.full_params(module.model):
            super().on_train_batch_end(trainer, module, *arguments, **more)

    def on_train_end(self, trainer: Any, module: Any) -> None:
        with offload.full_params(module.model):
            super().on_train_end(trainer, module)

    def on_validation_epoch_start(self, trainer: Any, module: Any) -> None:
        with offload.full_params(module.model):
            super().on_validation_epoch_start(trainer, module)

    def on_validation_epoch_end(self, trainer: Any, module: Any) -> None:
        with offload.full_params(module.model):
            super().on_validation_epoch_end(trainer, module)


def fit(
    placement: dict[str, Any] | None,
    out: Path,
    device: torch.device,
    *,
    resume: Path | None = None,
    callbacks: Any = (),
    kind: Any = torch.optim.AdamW,
    early: bool = False,
    manual: bool = False,
    **options: Any,
) -> Outcome:
    torch.manual_seed(0)
    module = (ManualModule if manual else Module)(placement, kind, early=early)
    if not manual:
        options |= {"gradient_clip_val": 0.3, "accumulate_grad_batches": 2}
    saves = ModelCheckpoint(out, save_top_k=-1, every_n_train_steps=2, filename="{step}")
    trainer = lightning.Trainer(
        max_steps=6, accelerator="cpu" if device.type == "cpu" else "gpu", devices=1, logger=False,
        enable_progress_bar=False, enable_model_summary=False, val_check_interval=4,
        callbacks=[saves, *callbacks], **options,
    )  # fmt: skip
    loaders = [DataLoader(list(batches(count, seed=count)), batch_size=None) for count in (12, 2)]
    trainer.fit(module, *loaders, ckpt_path=None if resume is None else str(resume / "step=4.ckpt"))
    trainer.test(module, loaders[1], verbose=False)
    module.outcome.keep(module.state_dict())
    return module.outcome


def assert_same_training(name: str, tmp_path: Path, device: torch.device, **how: Any) -> None:
    """And the same after a resume, from a checkpoint of the other placement too."""
    resident = fit(RESIDENT, tmp_path / "resident", device, **how)
    offloaded = fit(OFFLOADED[name], tmp_path / "offloaded", device, **how)
    assert_offloaded_equals_resident(offloaded, resident)
    expected = fit(RESIDENT, tmp_path / "again", device, resume=tmp_path / "resident", **how)
    for source in ("resident", "offloaded"):
        again = fit(OFFLOADED[name], tmp_path / "again", device, resume=tmp_path / source, **how)
        assert_offloaded_equals_resident(again, expected)


@pytest.mark.parametrize("early", [False, True], ids=["configure_optimizers", "configure_model"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("name", OFFLOADED)
def test_automatic_optimisation(name: str, precision: str, early: bool, tmp_path: Path, device: torch.device) -> None:
    assert_same_training(name, tmp_path, device, precision=precision, early=early)


@pytest.mark.parametrize("name", OFFLOADED)
def test_manual_optimisation(name: str, tmp_path: Path, device: torch.device) -> None:
    assert_same_training(name, tmp_path, device, manual=True)


@pytest.mark.parametrize("name", OFFLOADED)
def test_an_optimizer_that_runs_as_itself(name: str, tmp_path: Path, device: torch.device) -> None:
    assert_same_training(name, tmp_path, device, kind=torch.optim.NAdam)


def test_it_is_the_training_of_lightning_alone(tmp_path: Path, device: torch.device) -> None:
    plain = fit(None, tmp_path / "plain", device)
    assert fit(RESIDENT, tmp_path / "resident", device).numbers == pytest.approx(plain.numbers, rel=1e-4)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("name", OFFLOADED)
def test_averages(name: str, precision: str, tmp_path: Path, device: torch.device) -> None:
    """They are swapped in for validation and copied into the model at the end."""
    of_resident, of_offloaded = ([PresentAverage(decay=0.9)] for _ in range(2))
    resident = fit(RESIDENT, tmp_path / "resident", device, callbacks=of_resident, precision=precision)
    offloaded = fit(OFFLOADED[name], tmp_path / "offloaded", device, callbacks=of_offloaded, precision=precision)
    assert_offloaded_equals_resident(offloaded, resident)
    if precision == "32-true":
        plain = fit(None, tmp_path / "plain", device, callbacks=[EMAWeightAveraging(decay=0.9)])
        assert resident.numbers == pytest.approx(plain.numbers, rel=1e-4)


def test_stochastic_weight_averaging(tmp_path: Path, device: torch.device) -> None:
    def callbacks() -> list[Any]:
        return [StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1)]

    resident = fit(RESIDENT, tmp_path / "resident", device, callbacks=callbacks(), max_epochs=4)
    offloaded = fit(OFFLOADED["host"], tmp_path / "offloaded", device, callbacks=callbacks(), max_epochs=4)
    assert_offloaded_equals_resident(offloaded, resident)


@pytest.mark.parametrize("name", OFFLOADED)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fabric(precision: Any, name: str, tmp_path: Path, device: torch.device) -> None:
    """setup(), accumulation, clipping, save() and load()."""

    def run(placement: dict[str, Any], out: Path, *, resume: bool = False) -> Outcome:
        fabric = lightning_fabric.Fabric(
            accelerator="cpu" if device.type == "cpu" else "gpu", devices=1, precision=precision
        )
        model, wrapped = wrap(*_pair(device), placement)
        outcome = Outcome(optimizer=wrapped)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(wrapped, T_max=8)
        prepared, optimizer = fabric.setup(model, wrapped)
        state = {"model": prepared, "optimizer": optimizer, "schedule": schedule}
        if resume:
            fabric.load(out / "state.ckpt", state)
        for step, tokens in enumerate(batches(8)):
            if resume and step < 4:
                continue
            with fabric.no_backward_sync(prepared, enabled=step % 2 == 0):
                loss = loss_of(prepared, tokens)
                fabric.backward(loss / 2)
            outcome.numbers.append(loss.item())
            if step % 2:
                outcome.numbers.append(float(fabric.clip_gradients(prepared, optimizer, max_norm=0.3)))
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            if step == 3 and not resume:
                fabric.save(out / "state.ckpt", state)
        outcome.keep(copy.deepcopy(dict(prepared.state_dict())))
        return outcome

    resident = run(RESIDENT, tmp_path / "resident")
    assert_offloaded_equals_resident(run(OFFLOADED[name], tmp_path / "offloaded"), resident)
    again = run(OFFLOADED[name], tmp_path / "resident", resume=True)
    assert again.numbers == resident.numbers[-len(again.numbers) :] and len(again.numbers) == 6
    assert_offloaded_equals_resident(Outcome(resident.numbers, again.tensors, again.optimizer), resident)


def _pair(device: torch.device) -> tuple[Any, Any]:
    model = make_model().to(device)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)
