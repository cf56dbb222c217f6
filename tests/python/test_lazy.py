"""The lazy step: it returns before the update ran, and every read sees the finished values."""

from __future__ import annotations

import copy
import io
import queue
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from programs import Program, Programs
from torch import nn

import offload
from offload._pending import PendingParameter
from training import HOST, batches, loss_of, make_model, same_bits

pytestmark = pytest.mark.usefixtures("device")


def submitted(held: bool = True) -> tuple[nn.Module, Any, dict[str, torch.Tensor]]:
    """A model after a step whose update the held sequencer has not begun, and the values it will have."""
    reference = make_model()
    model = copy.deepcopy(reference)
    values = {}
    for candidate, hold in ((reference, False), (model, held)):
        candidate, optimizer = offload.wrap(
            candidate, torch.optim.AdamW(candidate.parameters(), lr=1e-2), poison=True, **HOST
        )
        loss_of(candidate, next(batches(1))).backward()
        if hold:
            optimizer._engine.pipeline.hold()
        optimizer.step()
        if not hold:
            values = {name: p.detach().clone() for name, p in candidate.named_parameters()}
    return model, optimizer, values


def releasing(optimizer: Any) -> Callable[[], int]:
    """Lets the sequencer go as soon as somebody waits, and records that somebody did."""
    pipeline = optimizer._engine.pipeline

    class Releasing:
        waited = 0

        def wait(self, tickets: Any) -> None:
            Releasing.waited += 1
            pipeline.release()
            pipeline.wait(tickets)

        def __getattr__(self, name: str) -> Any:
            return getattr(pipeline, name)

    optimizer._engine.pipeline = Releasing()
    return lambda: Releasing.waited


def test_step_returns_before_the_update() -> None:
    model, optimizer, _ = submitted()
    assert all(type(p) is PendingParameter for p in model.parameters())
    assert not any(ticket.done for ticket in optimizer._engine._tickets.values())
    optimizer._engine.pipeline.release()
    optimizer.synchronize()
    assert all(type(p) is nn.Parameter for p in model.parameters())


def test_metadata_does_not_wait() -> None:
    model, optimizer, _ = submitted()
    waited = releasing(optimizer)
    weight = model.blocks[0].up.weight
    assert weight.shape == (48, 24) and weight.dtype == torch.float32 and weight.device == torch.get_default_device()
    assert weight.requires_grad and weight.is_leaf and weight.numel() == 48 * 24 and weight.dim() == 2
    assert weight.stride() == (24, 1) and weight.is_contiguous() and len(weight) == 48
    assert isinstance(weight, nn.Parameter) and weight.grad is not None and hash(weight) == id(weight)
    assert weight._version > 0
    weight.requires_grad_(True)
    weight.grad = None
    assert len(list(model.parameters())) == len({*model.parameters()})
    assert waited() == 0
    optimizer._engine.pipeline.release()


READS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "arithmetic": lambda model, _: model.blocks[0].up.weight * 1,
    "detach": lambda model, _: model.blocks[0].up.weight.detach(),
    "data": lambda model, _: model.blocks[0].up.weight.data,
    "clone": lambda model, _: model.blocks[0].up.weight.clone(),
    "numpy": lambda model, _: torch.tensor(model.blocks[0].up.weight.detach().cpu().numpy()),
    "index": lambda model, _: model.blocks[0].up.weight[:],
    "tolist": lambda model, _: torch.tensor(model.blocks[0].up.weight.tolist()),
    "deepcopy": lambda model, _: copy.deepcopy(model.blocks[0].up.weight).detach(),
    "deepcopy of the model": lambda model, _: copy.deepcopy(model).blocks[0].up.weight.detach(),
    "state_dict": lambda model, _: model.state_dict()["blocks.0.up.weight"],
    "state_dict keep_vars": lambda model, _: model.state_dict(keep_vars=True)["blocks.0.up.weight"] + 0,
    "stack": lambda model, _: torch.stack([model.blocks[0].up.weight])[0],
    "foreach": lambda model, _: torch._foreach_mul([model.blocks[0].up.weight], 1.0)[0],
    "out=": lambda model, _: torch.mul(model.blocks[0].up.weight.detach(), 1.0, out=torch.empty(48, 24)),
    "ema": lambda model, _: torch.zeros(48, 24).lerp_(model.blocks[0].up.weight.detach(), 1.0),
    "parameters_to_vector": lambda model, _: nn.utils.parameters_to_vector([model.blocks[0].up.weight]).view(48, 24),
}


@pytest.mark.parametrize("name", READS)
def test_every_read_sees_the_finished_value(name: str) -> None:
    model, optimizer, expected = submitted()
    waited = releasing(optimizer)
    value = READS[name](model, optimizer)
    assert waited() > 0
    assert same_bits(value.detach(), expected["blocks.0.up.weight"])


def test_reading_one_parameter_leaves_the_others_pending() -> None:
    model, optimizer, expected = submitted()
    releasing(optimizer)
    assert same_bits(model.blocks[0].up.weight.detach().norm(), expected["blocks.0.up.weight"].norm())
    assert type(model.blocks[0].up.weight) is nn.Parameter
    assert type(model.blocks[1].up.weight) is PendingParameter


def test_torch_save_of_a_pending_model() -> None:
    model, optimizer, expected = submitted()
    releasing(optimizer)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for name, value in loaded.named_parameters():
        assert type(value) is nn.Parameter and same_bits(value.detach(), expected[name])
    loss_of(loaded, next(batches(1))).backward()
    assert type(loaded.blocks[0].up.weight.grad) is torch.Tensor


def test_a_thread_that_reads_leaves_the_next_step_pending() -> None:
    """It has waited for one step, and gets to go on when the training thread has submitted the next."""
    model, optimizer, _ = submitted()
    pipeline = optimizer._engine.pipeline
    seen: queue.Queue[str] = queue.Queue()
    goes_on = threading.Event()

    class Late:
        def wait(self, tickets: Any) -> None:
            reads = threading.current_thread() is reader
            if reads and goes_on.is_set():
                seen.put("waits again")
            pipeline.wait(tickets)
            if reads and not goes_on.is_set():
                seen.put("waited")
                assert goes_on.wait(60)

        def __getattr__(self, name: str) -> Any:
            return getattr(pipeline, name)

    weight = model.blocks[1].up.weight
    values: list[float] = []

    def read() -> None:
        values.append(weight.norm().item())
        seen.put("read")

    reader = threading.Thread(target=read)
    optimizer._engine.pipeline = Late()
    reader.start()
    pipeline.release()
    try:
        assert seen.get(timeout=60) == "waited"
        optimizer.zero_grad()
        loss_of(model, next(batches(1, seed=2))).backward()
        pipeline.hold()
        optimizer.step()
        goes_on.set()
        assert seen.get(timeout=60) == "waits again"
        assert type(weight) is PendingParameter
        assert id(weight) in optimizer._engine._tickets
    finally:
        goes_on.set()
        pipeline.release()
        reader.join()
    assert values == [weight.norm().item()]


def test_evaluation_forward_full_params_and_optimizer_state() -> None:
    tokens = next(batches(1, seed=7))
    outcomes = []
    for read in range(3):
        model, optimizer, _ = submitted()
        releasing(optimizer)
        if read == 0:
            model.eval()
            with torch.no_grad():
                outcomes.append(loss_of(model, tokens).item())
        elif read == 1:
            with offload.full_params(model) as full:
                assert all(type(p) is nn.Parameter for p in full.parameters())
            with torch.inference_mode():
                outcomes.append(loss_of(model, tokens).item())
        else:
            assert all(s["exp_avg"].abs().sum() > 0 for s in optimizer.state_dict()["state"].values())
            outcomes.append(loss_of(model, tokens).item())
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_a_unit_waits_for_its_own_chunks_only() -> None:
    """With the lane that brings weights held, a unit that has no update is computed; another one waits."""
    model = make_model()
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **HOST)
    loss_of(model, next(batches(1))).backward()
    for p in model.blocks[0].parameters():
        p.grad = None
    optimizer._engine.pipeline.hold()
    optimizer.step()
    model.blocks[0](torch.zeros(1, 2, 24))  # would hang if it waited for the others
    assert type(model.blocks[1].up.weight) is PendingParameter
    optimizer._engine.pipeline.release()
    optimizer.synchronize()


def test_updates_run_in_the_order_of_the_forward() -> None:
    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in reversed(self.layers):
                x = layer(x)
            return x

    model = Reversed()
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters()), **HOST)
    model(torch.ones(1, 4)).sum().backward()
    submissions: list[list[int]] = []
    pipeline = optimizer._engine.pipeline

    class Recording:
        def submit(self, jobs: Any, stream: int, **options: Any) -> Any:
            submissions.append([job[0] for job in jobs])
            return pipeline.submit(jobs, stream, **options)

        def __getattr__(self, name: str) -> Any:
            return getattr(pipeline, name)

    optimizer._engine.pipeline = Recording()
    optimizer.step()
    slots = optimizer._engine.slots
    order = [slots[id(layer.weight)] for layer in reversed(model.layers)]
    assert [slot for slot in submissions[0] if slot in order] == order


def test_step_twice_without_a_forward() -> None:
    def run(lazy: bool) -> list[torch.Tensor]:
        model = make_model()
        model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), lazy=lazy, **HOST)
        loss_of(model, next(batches(1))).backward()
        for _ in range(3):
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    for one, other in zip(run(True), run(False), strict=True):
        assert same_bits(one, other)


def test_step_between_forward_and_backward_is_refused_by_autograd() -> None:
    model = make_model()
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **HOST)
    loss_of(model, next(batches(1))).backward()
    loss = loss_of(model, next(batches(1)))
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.cpu_only
def test_a_failed_upload_names_the_parameter_and_is_final() -> None:
    model = make_model()
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **HOST)
    loss_of(model, next(batches(1))).backward()
    optimizer._engine.device.fail_copy("to_device", 1)
    optimizer.step()
    with pytest.raises(offload.OffloadError, match="embedding.weight"):
        loss_of(model, next(batches(1)))
    with pytest.raises(offload.StateError):
        optimizer.step()


def test_model_and_optimizer_dropped_with_work_in_flight() -> None:
    import gc

    for first in ("model", "optimizer"):
        model, optimizer, _ = submitted()
        optimizer._engine.pipeline.release()
        if first == "model":
            del model
            gc.collect()
            del optimizer
        else:
            del optimizer
            gc.collect()
            del model
        gc.collect()


def test_dataloader_workers_forked_after_the_first_step() -> None:
    model, optimizer, _ = submitted(held=False)
    data = torch.utils.data.TensorDataset(torch.arange(16, device="cpu"))
    loader = torch.utils.data.DataLoader(data, batch_size=4, num_workers=2)
    for tokens in batches(2):
        with torch.device("cpu"):  # a forked worker cannot use CUDA
            assert sum(batch[0].sum().item() for batch in loader) == 120
        loss_of(model, tokens).backward()
        optimizer.step()
    optimizer.synchronize()


EXIT = """
import torch, offload
from training import HOST, batches, loss_of, make_model
model = make_model(width=128)
model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters()), **HOST)
loss_of(model, next(batches(1))).backward()
held = sys.argv[1:] == ["held"]
if held:
    optimizer._engine.device.hold("to_device")
optimizer.step()
if not held:
    loss = loss_of(model, next(batches(1)))
    loss.backward()
print("done")
"""


@pytest.mark.cpu_only
def test_interpreter_exit_with_work_in_flight(programs: Programs) -> None:
    """Neither hangs nor crashes, in whatever order the interpreter tears things down."""
    for ended in programs.run_all({how: Program(EXIT, [how]) for how in ("running", "held")}).values():
        assert (ended.status, ended.out) == (0, "done\n"), ended.err
