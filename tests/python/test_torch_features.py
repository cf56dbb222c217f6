"""What torch itself has around models and optimizers means the same for a wrapped pair, to the bit."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim import lr_scheduler, swa_utils
from torch.optim.optimizer import register_optimizer_step_post_hook

import offload
from offload._pending import PendingParameter
from training import HOST, RESIDENT, batches, loss_of, make_model, same_bits

pytestmark = [
    pytest.mark.usefixtures("device"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning", "ignore:.*weight_norm.*:FutureWarning"),
]

STREAMED = HOST | {"params": "host"}
PLACEMENTS = {"host": HOST, "params": STREAMED, "activations": HOST | {"activations": "host"}}


def assert_offloaded(optimizer: offload.OffloadOptimizer) -> None:
    stats = optimizer.stats()
    assert stats.host_bytes["moments"] > 0 and "moments" not in stats.device_bytes
    assert stats.transfers["to_host_bytes"] > 0 and stats.transfers["to_device_bytes"] > 0


class Training:
    """A wrapped model, its optimizer, and what was found; `steps` runs the loop, a pause after each step."""

    def __init__(self, placement: dict[str, str], model: nn.Module | None = None, **adamw: Any) -> None:
        self.placement = placement
        self.model = make_model() if model is None else model
        self.plain_optimizer = torch.optim.AdamW(self.model.parameters(), **{"lr": 1e-2, **adamw})
        self.optimizer: Any = None
        self.found: list[float] = []

    def wrap(self) -> Training:
        self.model, self.optimizer = offload.wrap(self.model, self.plain_optimizer, **self.placement)
        return self

    def steps(self, count: int = 3, call: nn.Module | None = None) -> Iterator[Tensor]:
        for tokens in batches(count):
            loss = loss_of(call or self.model, tokens)
            loss.backward()
            self.found += [loss.item(), nn.utils.clip_grad_norm_(self.model.parameters(), 0.3).item()]
            self.optimizer.step()
            self.optimizer.zero_grad()
            yield tokens

    def end(self, *tensors: Tensor) -> Any:
        return self.found, [*self.model.state_dict().values(), *tensors], self.optimizer


def averaged(placement: dict[str, str]) -> Any:
    """AveragedModel is a plain copy; it reads streamed weights inside full_params."""
    one = Training(placement).wrap()
    average = swa_utils.AveragedModel(one.model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True)
    schedule = swa_utils.SWALR(one.optimizer, swa_lr=5e-3, anneal_epochs=3)
    for tokens in one.steps(4):
        schedule.step()
        with offload.full_params(one.model):
            average.update_parameters(one.model)
        one.found.append(loss_of(average, tokens).item())
    return one.end(*average.state_dict().values())


def batch_norm_updated(placement: dict[str, str]) -> Any:
    """update_bn over an average of a model with running statistics."""
    torch.manual_seed(0)
    blocks = (nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU()) for _ in range(3))
    model = nn.Sequential(nn.Linear(4, 6), *blocks)
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **placement)
    average = swa_utils.AveragedModel(model)
    inputs = [torch.randn(5, 4) for _ in range(4)]
    found = []
    for values in inputs:
        loss = model(values).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with offload.full_params(model):
            average.update_parameters(model)
        found.append(loss.item())
    swa_utils.update_bn(inputs, average)
    swa_utils.update_bn(inputs, model)
    return found, [*average.state_dict().values(), *model.state_dict().values()], optimizer


def other_weights_called(placement: dict[str, str]) -> Any:
    """functional_call and torch.func.grad with weights that are not the model's."""
    one = Training(placement).wrap()
    for tokens in one.steps():
        others = {name: value.detach().clone() for name, value in make_model(seed=4).named_parameters()}
        trained = {name: value.clone().requires_grad_() for name, value in others.items()}
        torch.func.functional_call(one.model, trained, (tokens[:, :-1],)).square().mean().backward()

        def loss(weights: dict[str, Tensor], tokens: Tensor = tokens) -> Tensor:
            return torch.func.functional_call(one.model, weights, (tokens[:, :-1],)).square().mean()

        gradients = torch.func.grad(loss)(others)
        for name, value in trained.items():
            assert value.grad is not None
            torch.testing.assert_close(gradients[name], value.grad)
            one.found.append(value.grad.sum().item())
        assert all(p.grad is None for p in one.model.parameters())
    return one.end()


def normed(norm: Callable[[nn.Module], nn.Module]) -> Callable[[dict[str, str]], Any]:
    def run(placement: dict[str, str]) -> Any:
        model = make_model()
        for block in model.blocks:
            norm(block.up)
        norm(model.head)
        one = Training(placement, model).wrap()
        for tokens in one.steps():
            with torch.no_grad():
                one.found.append(loss_of(one.model, tokens).item())
        return one.end()

    return run


def held_by_a_parent(placement: dict[str, str]) -> Any:
    """A module that holds the wrapped one: called, saved, loaded, cast and moved."""
    one = Training(placement).wrap()
    parent = nn.Sequential(one.model)
    for _ in one.steps(call=parent):
        saved = {name: value.clone() for name, value in parent.state_dict().items()}
        parent.load_state_dict(saved)
        parent.train().float().to(torch.get_default_device())
    return one.end(*parent.state_dict().values())


def copied(placement: dict[str, str]) -> Any:
    """deepcopy and torch.save give plain models that train on their own."""
    one = Training(placement).wrap()
    for tokens in one.steps():
        file = io.BytesIO()
        torch.save(one.model, file)
        file.seek(0)
        for copy_of in (copy.deepcopy(one.model), torch.load(file, weights_only=False)):
            assert all(type(parameter) is nn.Parameter for parameter in copy_of.parameters())
            loss_of(copy_of, tokens).backward()
            torch.optim.SGD(copy_of.parameters(), lr=0.1).step()
            one.found.append(loss_of(copy_of, tokens).item())
    return one.end()


def compiled(placement: dict[str, str]) -> Any:
    """torch.compile around the model, and then wrap around that."""
    whole: Any = torch.compile(make_model(), backend="aot_eager")
    one = Training(placement, whole).wrap()
    for _ in one.steps():
        pass
    return one.end()


def step_compiled(placement: dict[str, str]) -> Any:
    """Compiled code calls the wrapped optimizer's step, and compiles nothing of it."""
    one = Training(placement).wrap()
    one.optimizer.step = torch.compile(one.optimizer.step, backend="aot_eager")
    for _ in one.steps(4):
        pass
    return one.end()


def parts_saved(placement: dict[str, str]) -> Any:
    """state_dict() of a part, which is read and written before and after."""
    one = Training(placement).wrap()
    part, weight = one.model.blocks[1], one.model.blocks[1].up.weight  # type: ignore[index,union-attr]
    for _ in one.steps():
        before = {name: value.clone() for name, value in part.state_dict().items()}
        with offload.full_params(one.model), torch.no_grad():
            weight.mul_(0.5)
        for after in (part.state_dict()["up.weight"], one.model.state_dict()["blocks.1.up.weight"]):
            assert same_bits(after, before["up.weight"].cpu() * 0.5)
    return one.end()


def closure_called(placement: dict[str, str]) -> Any:
    """Forward, backward and clipping inside optimizer.step(), as Lightning has it."""
    one = Training(placement).wrap()
    for tokens in batches(4):

        def closure(tokens: Tensor = tokens) -> Tensor:
            one.optimizer.zero_grad()
            loss = loss_of(one.model, tokens)
            loss.backward()
            nn.utils.clip_grad_value_(one.model.parameters(), 0.01)
            return loss

        one.found.append(one.optimizer.step(closure).item())
    return one.end()


def as_a_vector(placement: dict[str, str]) -> Any:
    """parameters_to_vector and back, which writes through `.data`, and the parts of clip_grad_norm_."""
    one = Training(placement).wrap()
    for _ in one.steps():
        with offload.full_params(one.model), torch.no_grad():
            values = nn.utils.parameters_to_vector(one.model.parameters())
            nn.utils.vector_to_parameters(values * 0.9, one.model.parameters())
        one.optimizer.resync()
        loss_of(one.model, next(batches(1))).backward()
        norm = nn.utils.get_total_norm([p.grad for p in one.model.parameters() if p.grad is not None])
        nn.utils.clip_grads_with_norm_(one.model.parameters(), 0.2, norm)
        one.found.append(norm.item())
        one.optimizer.step()
        one.optimizer.zero_grad()
    return one.end()


def adversaries(placement: dict[str, str]) -> Any:
    """Two wrapped models in one graph, one of them frozen by turns."""
    torch.manual_seed(0)

    def network(inputs: int, outputs: int) -> nn.Module:
        blocks = (nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(3))
        return nn.Sequential(nn.Linear(inputs, 16), *blocks, nn.Linear(16, outputs))

    maker, judge = network(4, 8), network(8, 1)
    maker, of_maker = offload.wrap(maker, torch.optim.AdamW(maker.parameters(), lr=1e-2), **placement)
    judge, of_judge = offload.wrap(judge, torch.optim.AdamW(judge.parameters(), lr=1e-2), **placement)
    found = []
    for _ in range(4):
        noise, real = torch.randn(5, 4), torch.randn(5, 8)
        judge.requires_grad_(True)
        loss = judge(real).mean() - judge(maker(noise).detach()).mean()
        loss.backward()
        of_judge.step()
        of_judge.zero_grad()
        judge.requires_grad_(False)
        fooled = judge(maker(noise)).mean()
        fooled.backward()
        of_maker.step()
        of_maker.zero_grad()
        found += [loss.item(), fooled.item()]
    return found, [*maker.state_dict().values(), *judge.state_dict().values()], of_maker


def taught(placement: dict[str, str]) -> Any:
    """A teacher whose weights come and go too."""
    teacher, _ = offload.wrap(make_model(seed=9), None, params=placement.get("params", "device"))
    one = Training(placement).wrap()
    for tokens in one.steps():
        with torch.no_grad():
            wanted = teacher(tokens)
        loss = nn.functional.mse_loss(one.model(tokens), wanted)
        loss.backward()
        one.found.append(loss.item())
    return one.end()


def parts_called(placement: dict[str, str]) -> Any:
    """The forward of the wrapped model is never called, those of its parts are."""
    one = Training(placement).wrap()
    model: Any = one.model
    for tokens in batches(3):
        x = model.embedding(tokens[:, :-1])
        for block in model.blocks:
            x = block(x)
        loss = nn.functional.cross_entropy(model.head(model.norm(x)).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        one.optimizer.step()
        one.optimizer.zero_grad()
        one.found.append(loss.item())
    return one.end()


def saved_by_torch_distributed(placement: dict[str, str]) -> Any:
    """get_state_dict and set_state_dict, which makes the states of a fresh optimizer by a step over zeros."""
    from torch.distributed.checkpoint import state_dict as dcp

    one = Training(placement).wrap()
    for _ in one.steps():
        pass
    saved = copy.deepcopy(dcp.get_state_dict(one.model, one.optimizer))
    other = Training(placement, make_model(seed=3)).wrap()
    dcp.set_state_dict(other.model, other.optimizer, model_state_dict=saved[0], optim_state_dict=saved[1])
    for each in (one, other):
        each.found.clear()
        for _ in each.steps():
            pass
    assert one.found == other.found
    # Older torch keeps every model that it has named the parameters of.
    forget = getattr(getattr(dcp, "_get_fqns", None), "cache_clear", None)
    if forget is not None:
        forget()
    return one.end(*other.model.state_dict().values())


def padded_batches_evaluated(placement: dict[str, str]) -> Any:
    """torch's encoder packs them where the weights of its first layer are plain tensors when it is called."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.ModuleDict({"embedding": nn.Embedding(40, 16), "encoder": nn.TransformerEncoder(layer, 3)})
    one = Training(placement, model).wrap()
    encoder: Any = model["encoder"]
    for tokens in batches(3):
        x = model["embedding"](tokens)
        padding = torch.arange(x.shape[1]) >= torch.arange(2, 2 + len(x))[:, None]
        one.model.train()
        loss = encoder(x, src_key_padding_mask=padding).square().mean()
        loss.backward()
        one.optimizer.step()
        one.optimizer.zero_grad()
        one.model.eval()
        with torch.no_grad():
            packed = encoder(x, src_key_padding_mask=padding)
        if x.device.type == "cpu":  # the double of a card asks for every call of torch, so nothing is packed there
            assert not packed[padding[:, : packed.shape[1]]].any(), "it packs them"
        one.found += [loss.item(), packed.sum().item()]
    return one.end()


FEATURES: dict[str, Callable[[dict[str, str]], Any]] = {
    call.__name__: call
    for call in (averaged, batch_norm_updated, other_weights_called, held_by_a_parent, copied, compiled, step_compiled,
                 parts_saved, closure_called, as_a_vector, adversaries, taught, parts_called,
                 saved_by_torch_distributed, padded_batches_evaluated)
} | {
    "weight_norm": normed(parametrizations.weight_norm),
    "spectral_norm": normed(parametrizations.spectral_norm),
    "orthogonal": normed(parametrizations.orthogonal),
    "old weight_norm": normed(nn.utils.weight_norm),
    "old spectral_norm": normed(nn.utils.spectral_norm),
}  # fmt: skip


@pytest.mark.parametrize("feature", FEATURES)
def test_offloaded_equals_resident(feature: str) -> None:
    numbers, tensors, _ = FEATURES[feature](RESIDENT)
    for name, placement in PLACEMENTS.items():
        found, others, optimizer = FEATURES[feature](placement)
        assert_offloaded(optimizer)
        assert found == numbers, name
        assert len(others) == len(tensors), name
        assert all(same_bits(one, other) for one, other in zip(others, tensors, strict=True)), name


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=2),
    "LinearLR": lr_scheduler.LinearLR,
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lr_scheduler.PolynomialLR,
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, step_size_up=2, cycle_momentum=True),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=8),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.8)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.8)], optimizer=o
    ),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=1e-3, anneal_epochs=3),
}


@pytest.mark.parametrize("made", ["before wrap", "after wrap"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedulers(name: str, made: str) -> None:
    """Rates and betas follow the schedule of plain torch, a saved one goes on, and training is that of them."""

    def run(placement: dict[str, str] | None) -> tuple[list[Any], list[float]]:
        one = Training(placement or {})
        one.optimizer = one.plain_optimizer
        schedule = SCHEDULES[name](one.plain_optimizer) if made == "before wrap" else None
        if placement is not None:
            one.wrap()
        schedule = schedule or SCHEDULES[name](one.optimizer)
        seen = []
        for step, _ in enumerate(one.steps(6)):
            if name == "ReduceLROnPlateau":
                schedule.step(1.0)
            else:
                schedule.step()
            seen.append([(float(group["lr"]), group["betas"]) for group in one.optimizer.param_groups])
            if step == 3:
                schedule.load_state_dict(copy.deepcopy(schedule.state_dict()))
        if placement == HOST:
            assert_offloaded(one.optimizer)
        return seen, one.found

    plain, losses = run(None)
    seen, found = run(HOST)
    assert seen == plain == run(RESIDENT)[0]
    assert found == run(RESIDENT)[1] and found == pytest.approx(losses, rel=1e-4)


def test_step_hooks_of_before_and_after_wrap() -> None:
    """Those of the optimizer that was given run once a step, and are its own again after unwrap."""
    one, calls = Training(HOST), list[str]()
    early = one.plain_optimizer.register_step_pre_hook(lambda optimizer, *_: calls.append("pre"))
    one.plain_optimizer.register_step_post_hook(lambda optimizer, *_: calls.append("post"))
    one.wrap()
    late = one.optimizer.register_step_pre_hook(lambda optimizer, *_: calls.append("late"))
    everywhere = register_optimizer_step_post_hook(lambda optimizer, *_: calls.append(type(optimizer).__name__))
    try:
        for _ in one.steps(2):
            pass
    finally:
        everywhere.remove()
    assert calls == ["pre", "late", "post", "OffloadOptimizer"] * 2
    calls.clear()
    early.remove()
    with pytest.raises(offload.StateError, match="was given to offload.wrap"):
        one.plain_optimizer.step()
    model, plain = offload.unwrap(one.model, one.optimizer)
    loss_of(model, next(batches(1))).backward()
    plain.step()
    assert calls == ["late", "post"]
    late.remove()
    plain.step()
    assert calls == ["late", "post", "post"]


def test_torch_func_over_streamed_weights_is_refused() -> None:
    """Nothing tells when its backward needs a weight."""
    one = Training(STREAMED).wrap()
    block, x = one.model.blocks[0], torch.randn(2, 3, 24)  # type: ignore[index,union-attr]
    for transformed in (torch.func.grad(lambda value: block(value).sum()), torch.vmap(block)):
        with pytest.raises(offload.StateError, match="over weights that come and go"):
            transformed(x)
    with torch.no_grad():  # no backward comes
        assert torch.vmap(block)(x).shape == x.shape
    assert len(list(one.steps(2))) == 2, "it trains on"


def test_shapes_of_weights_that_are_away_are_no_access() -> None:
    one = Training(STREAMED).wrap()
    for parameter in one.model.parameters():
        for like in (torch.zeros_like(parameter), parameter.new_zeros(parameter.shape)):
            assert type(like) is Tensor and not like.requires_grad
            assert (like.shape, like.dtype, like.device) == (parameter.shape, parameter.dtype, parameter.device)


def test_noise_in_the_shape_of_weights_that_are_away() -> None:
    one = Training(STREAMED).wrap()
    for parameter in one.model.parameters():
        for like in (torch.rand_like, torch.randn_like, lambda given: torch.randint_like(given, 9)):
            found = []
            for shaped in (parameter, torch.empty(parameter.shape, dtype=parameter.dtype)):
                torch.manual_seed(0)
                found.append(like(shaped))
            assert type(found[0]) is Tensor and same_bits(*found)


class WithDictionary(nn.Module):
    """As PEFT's adapters keep their weights; torch names their types when it prints them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        for block in self.blocks:
            block.adapters = nn.ParameterDict({"default": nn.Parameter(torch.zeros(8))})

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) + block.adapters["default"]  # type: ignore[index]
        return x


@pytest.mark.parametrize("placement", [HOST, STREAMED], ids=["pending", "away"])
def test_a_model_prints_as_a_plain_one_and_waits_for_nothing(placement: dict[str, str]) -> None:
    model = WithDictionary()
    printed = repr(model)
    model, optimizer = offload.wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), **placement)
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    weight = model.blocks[2].adapters["default"]  # type: ignore[index,union-attr]
    assert type(weight) is PendingParameter
    assert repr(model) == printed and type(weight) is PendingParameter
    assert torch.typename(weight) == weight.type() == torch.empty(0).type()
    assert weight.is_same_size(torch.empty(8)) and not (weight.is_conj() or weight.is_neg())
    assert torch.result_type(weight, torch.empty(8, dtype=torch.float64)) == torch.float64
    assert type(weight) is PendingParameter
    optimizer.synchronize()
    with offload.full_params(model):
        assert weight.type(torch.float64).dtype == torch.float64
