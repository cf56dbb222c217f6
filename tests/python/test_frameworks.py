"""A wrapped model and optimizer in the hands of Hugging Face Trainer and Accelerate, which stay as they are."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import offload
from offload._pending import make_pending
from training import HOST, RESIDENT, batches, loss_of, make_model, same_bits

pytestmark = pytest.mark.usefixtures("device")

needs_accelerate = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed: pip install '.[test]'"
)
STREAMED = HOST | {"params": "host"}


def assert_offloaded(optimizer: offload.OffloadOptimizer) -> None:
    stats = optimizer.stats()
    assert stats.host_bytes["moments"] > 0 and "moments" not in stats.device_bytes
    assert stats.transfers["to_host_bytes"] > 0 and stats.transfers["to_device_bytes"] > 0


@pytest.mark.parametrize("placement", [HOST, STREAMED], ids=["pending", "away"])
def test_moving_a_model_to_where_it_computes_changes_nothing(placement: dict[str, str], device: torch.device) -> None:
    def run(moves: bool) -> list[float]:
        model = make_model()
        model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **placement)
        parameters, found = list(model.parameters()), []
        for tokens in batches(3):
            loss = loss_of(model, tokens)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if moves:
                for there in (device, device.type, torch.float32, parameters[0].dtype):
                    assert model.to(there) is model
                assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
            found.append(loss.item())
        assert_offloaded(optimizer)
        return found

    assert run(moves=True) == run(moves=False)


@pytest.mark.parametrize("placement", [HOST, STREAMED], ids=["pending", "away"])
def test_a_model_may_be_moved_to_the_cpu_and_back(placement: dict[str, str], device: torch.device) -> None:
    """Lightning does it after every fit, with the gradients of the last step still there."""

    def run(moves: bool) -> tuple[list[float], list[Tensor]]:
        model = make_model()
        model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **placement)
        found = []
        for tokens in batches(3):
            loss = loss_of(model, tokens)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if moves:
                model.cpu()
                model.to(device)
            found.append(loss.item())
        assert_offloaded(optimizer)
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        return found, [*model.state_dict().values(), *gradients]

    losses, tensors = run(moves=True)
    expected, others = run(moves=False)
    assert losses == expected and len(tensors) == len(others)
    assert all(same_bits(one, other) for one, other in zip(tensors, others, strict=True))


class InHostMemory:
    """What a streamed parameter on another device answers with."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def __call__(self) -> None:
        raise offload.StateError("it is away")

    def copy(self) -> nn.Parameter:
        raise offload.StateError("it is away")

    def on_host(self) -> Tensor:
        return self.value.clone()


@pytest.mark.cpu_only
@torch.no_grad()
def test_a_streamed_weight_has_its_value_on_the_host_and_stays_what_it_is() -> None:
    """`meta` stands for a device that this machine does not have."""
    value = torch.arange(3.0)
    parameter = nn.Parameter(torch.empty(3, device="meta"))
    make_pending(parameter, InHostMemory(value))
    for moved in (parameter.cpu(), parameter.to("cpu"), parameter.to("cpu", torch.float32)):
        assert same_bits(moved, value)
        parameter.data = moved  # what module.cpu() does with it
        assert parameter.is_meta
    moved.add_(1)
    for write in (lambda: setattr(parameter, "data", moved), lambda: parameter.to("cpu", torch.float64)):
        with pytest.raises(offload.StateError, match="it is away"):
            write()
    with torch.enable_grad(), pytest.raises(offload.StateError, match="it is away"):
        parameter.cpu()  # what it gives would be in no graph


@pytest.mark.parametrize("swap", ["copy_", "data"])
def test_weights_that_are_swapped_out_and_back_leave_training_as_it_was(swap: str) -> None:
    """As an average of the weights is for an evaluation: a master keeps its low bits."""

    def run(placement: dict[str, str], swaps: bool) -> tuple[list[float], dict[str, Any]]:
        model = make_model(torch.bfloat16)
        model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **placement)
        average = [torch.full_like(parameter, 0.01) for parameter in model.parameters()]
        found = []
        for step, tokens in enumerate(batches(6)):
            loss = loss_of(model, tokens)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
            for _ in range(2 if swaps and step % 2 else 0):
                with offload.full_params(model), torch.no_grad():
                    for parameter, other in zip(model.parameters(), average, strict=True):
                        kept = parameter.clone()
                        (parameter.data if swap == "data" else parameter).copy_(other)
                        other.copy_(kept)
                with torch.no_grad():
                    loss_of(model, tokens)
        return found, {name: value.clone() for name, value in model.state_dict().items()}

    losses, weights = run(RESIDENT, swaps=False)
    for placement in (HOST, STREAMED):
        found, others = run(placement, swaps=True)
        assert found == losses
        assert all(same_bits(others[name], value) for name, value in weights.items())


class Tokens(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.randint(64, (9,), generator=torch.Generator("cpu").manual_seed(index), device="cpu")
        return {"input_ids": tokens, "labels": tokens}


def trained(
    placement: dict[str, Any], out: Path, device: torch.device, resume: bool = False
) -> tuple[list[tuple[float, float]], list[Tensor], offload.OffloadOptimizer]:
    """What Trainer logged (losses and gradient norms), the weights and the optimizer."""
    import transformers

    if device.type != "cpu":  # the sampler of Trainer's loader works on the CPU, where torch 2.6 forgets the default
        torch.set_default_device(None)
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(vocab_size=64, **size))
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), device=device, **placement)
    arguments = transformers.TrainingArguments(
        output_dir=str(out), max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=2, save_steps=3,
        max_grad_norm=0.3, logging_steps=1, report_to=[], disable_tqdm=True, use_cpu=device.type == "cpu",
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=Tokens(),
        optimizers=(optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6)),
    )
    trainer.train(resume_from_checkpoint=str(out / "checkpoint-3") if resume else None)
    assert next(model.parameters()).device.type == device.type
    logs = [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "grad_norm" in entry]
    return logs, [value.clone() for value in model.state_dict().values()], optimizer


@needs_accelerate
@pytest.mark.parametrize("placement", [HOST, STREAMED], ids=["host", "params"])
def test_trainer(placement: dict[str, str], tmp_path: Path, device: torch.device) -> None:
    """Accumulates, clips, schedules, logs, saves; a run that goes on from its checkpoint has the same bits."""
    expected, weights, _ = trained(RESIDENT, tmp_path / "resident", device)
    logs, offloaded, optimizer = trained(placement, tmp_path / "offloaded", device)
    assert_offloaded(optimizer)
    assert len(expected) == 6 and min(norm for _, norm in expected) > 0.3, "it clips"
    assert logs == expected
    assert all(same_bits(one, other) for one, other in zip(offloaded, weights, strict=True))
    resumed, again, _ = trained(placement, tmp_path / "offloaded", device, resume=True)
    assert resumed == expected
    assert all(same_bits(one, other) for one, other in zip(again, weights, strict=True))


@needs_accelerate
def test_trainer_with_a_deepspeed_config(tmp_path: Path, device: torch.device) -> None:
    """One that was written for `TrainingArguments(deepspeed=...)`, as docs/deepspeed.md shows it."""
    config = Path(__file__).parent / "deepspeed_configs" / "trainer_zero3_offload.json"
    expected, weights, _ = trained(RESIDENT, tmp_path / "resident", device)
    logs, offloaded, optimizer = trained(offload.deepspeed.wrap_options(config), tmp_path / "offloaded", device)
    assert_offloaded(optimizer)
    plan = optimizer.plan
    assert (plan.optimizer, plan.gradients, plan.params) == ("host", "host", "host")
    assert logs == expected
    assert all(same_bits(one, other) for one, other in zip(offloaded, weights, strict=True))


@needs_accelerate
@pytest.mark.parametrize("placement", [HOST, STREAMED], ids=["host", "params"])
def test_accelerate(placement: dict[str, str], device: torch.device) -> None:
    """prepare(), accumulate(), clip_grad_norm_() and a scheduler that steps with the optimizer."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps the device of the process's first Accelerator
    GradientState._reset_state()

    def run(placement: dict[str, str]) -> tuple[list[float], list[Tensor], Any]:
        accelerator = Accelerator(gradient_accumulation_steps=2, cpu=device.type == "cpu")
        model = make_model()
        model, wrapped = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **placement)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(wrapped, T_max=4)
        model, optimizer, schedule = accelerator.prepare(model, wrapped, schedule)
        found = []
        for tokens in batches(8):
            with accelerator.accumulate(model):
                loss = loss_of(model, tokens)
                accelerator.backward(loss)
                found.append(loss.item())
                if accelerator.sync_gradients:
                    found.append(float(accelerator.clip_grad_norm_(model.parameters(), 0.3)))
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        assert wrapped.stats().steps == 4
        return found, [value.clone() for value in model.state_dict().values()], wrapped

    found, weights, optimizer = run(placement)
    assert_offloaded(optimizer)
    expected, resident, _ = run(RESIDENT)
    assert found == expected
    assert all(same_bits(one, other) for one, other in zip(weights, resident, strict=True))


def test_peft_is_wrapped_as_it_is() -> None:
    """A frozen base whose weights are streamed, and adapters that train: only those have states."""
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install '.[test]'")

    def run(placement: dict[str, str]) -> tuple[list[float], Any]:
        torch.manual_seed(0)
        base = make_model(torch.bfloat16)
        model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["up", "down"]))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        model, optimizer = offload.wrap(model, optimizer, **placement)
        found = []
        for tokens in batches(4):
            loss = loss_of(model, tokens)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found, optimizer

    found, optimizer = run(STREAMED)
    assert found == run(RESIDENT)[0]
    stats, plan = optimizer.stats(), optimizer.plan
    assert stats.peak_weight_bytes < plan.resident.weights and stats.host_bytes["moments"] > 0
    assert plan.trainable_count < plan.frozen_count
