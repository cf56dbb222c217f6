"""Streamed parameters in kinds of models and ways to call them. Streamed equals resident, bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import offload
from training import HOST, RESIDENT, Block, batches, loss_of, make_model

pytestmark = pytest.mark.usefixtures("device")

ALL = {**HOST, "params": "host"}
WIDTH = 16


def losses_of(build: Callable[[], nn.Module], placement: dict[str, Any], call: Any = None, **loop: Any) -> list[float]:
    """Losses and final weights of a few steps; `call(model, step)` gives the loss."""
    torch.manual_seed(0)
    model = build()
    model, optimizer = offload.wrap(
        model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), **placement
    )
    losses = []
    for step in range(loop.get("steps", 4)):
        torch.manual_seed(step)
        loss = call(model, step) if call is not None else model(torch.randn(3, 4, WIDTH)).square().mean()
        loss.backward()
        losses.append(loss.item())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    if placement.get("params") == "host":
        stats = optimizer.stats()
        weights = stats.host_bytes["weights"]
        assert stats.device_bytes["weights"] < weights and stats.transfers["to_device_bytes"] > weights
    losses += [value.double().sum().item() for value in model.state_dict().values()]
    return losses


def assert_streams_exactly(build: Callable[[], nn.Module], call: Any = None, **loop: Any) -> None:
    # With 2 units ahead these models are all on the device between steps.
    assert losses_of(build, ALL | {"prefetch": 1}, call, **loop) == losses_of(build, RESIDENT, call, **loop)


def stack(make: Callable[[], nn.Module], depth: int = 4) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*(make() for _ in range(depth)))


class Listed(nn.Module):
    """Blocks that are called in turn by `step(block, x)`."""

    def __init__(self, make: Callable[[], nn.Module], step: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(make() for _ in range(4))
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.step(block, x) * self.scale
        return x


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("span", [1, 2])
def test_activation_checkpointing(reentrant: bool, span: int) -> None:
    def call(model: nn.Module, step: int) -> Tensor:
        x = torch.randn(3, WIDTH, requires_grad=True)
        for start in range(0, 4, span):
            part = model.blocks[start : start + span]
            x = checkpoint(lambda x, part=part: nn.Sequential(*part)(x), x, use_reentrant=reentrant)
        return x.square().mean()

    def whole(model: nn.Module, step: int) -> Tensor:
        return checkpoint(model, torch.randn(3, WIDTH, requires_grad=True), use_reentrant=reentrant).square().mean()

    assert_streams_exactly(lambda: Listed(lambda: Block(WIDTH), lambda block, x: block(x)), whole)

    class Parts(nn.Module):
        """Its own forward is never called by what backward recomputes."""

        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block(WIDTH) for _ in range(4))

    assert_streams_exactly(Parts, call)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["no", "reentrant", "not reentrant"])
def test_huggingface(name: str, checkpointing: bool | None) -> None:
    import transformers

    size = {"num_hidden_layers": 3, "num_attention_heads": 2, "hidden_size": 16, "vocab_size": 64}
    config = {
        "llama": lambda: transformers.LlamaConfig(intermediate_size=32, tie_word_embeddings=True, **size),
        "gpt2": lambda: transformers.GPT2Config(n_layer=3, n_head=2, n_embd=16, vocab_size=64, n_positions=32),
        "mixtral": lambda: transformers.MixtralConfig(
            intermediate_size=32, num_key_value_heads=2, num_local_experts=4, output_router_logits=True, **size
        ),
    }[name]()

    def build() -> nn.Module:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        if checkpointing is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        return model.train()

    def call(model: nn.Module, step: int) -> Tensor:
        tokens = next(batches(1, seed=step, vocabulary=64))
        return model(input_ids=tokens, labels=tokens).loss

    assert_streams_exactly(build, call)


def test_generation_with_a_cache_between_steps() -> None:
    import transformers

    config = transformers.LlamaConfig(
        intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, hidden_size=16, vocab_size=64
    )

    def run(placement: dict[str, str]) -> list[Any]:
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **placement)
        seen = []
        for tokens in batches(3, vocabulary=64):
            model.train()
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            model.eval()
            seen.append(model.generate(tokens, max_new_tokens=6, do_sample=False, pad_token_id=0).tolist())
        return seen

    assert run(ALL) == run(RESIDENT)


def test_low_rank_adapters_over_frozen_weights() -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = Block(WIDTH).requires_grad_(False)
            self.a, self.b = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.b(self.a(x))

    assert_streams_exactly(stack(Adapted))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_over_fp32_weights(dtype: torch.dtype) -> None:
    def call(model: nn.Module, step: int) -> Tensor:
        with torch.autocast(torch.get_default_device().type, dtype=dtype):
            return loss_of(model, next(batches(1, seed=step)))

    assert_streams_exactly(make_model, call)


def test_encoder_with_attention_that_uses_the_weights_of_its_parts() -> None:
    def build() -> nn.Module:
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.0, batch_first=True)
        return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)

    assert_streams_exactly(build)

    def evaluate(model: nn.Module, step: int) -> Tensor:
        model.eval()
        with torch.no_grad():
            model(torch.randn(3, 4, WIDTH))
        return model.train()(torch.randn(3, 4, WIDTH)).square().mean()

    assert_streams_exactly(build, evaluate)


def test_batch_norm_and_convolutions() -> None:
    def block() -> nn.Module:
        return nn.Sequential(nn.Conv1d(4, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU(inplace=True))

    assert_streams_exactly(stack(block))


def test_recurrent_layers() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.LSTM(WIDTH, WIDTH, batch_first=True) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)[0]
            return x

    assert_streams_exactly(Recurrent)


class Overlapping(nn.Module):
    """Two weights in one memory, as the upper half and the whole of a matrix."""

    def __init__(self) -> None:
        super().__init__()
        memory = torch.randn(WIDTH, WIDTH) / 4
        self.whole = nn.Parameter(memory, requires_grad=False)
        self.upper = nn.Parameter(memory[: WIDTH // 2], requires_grad=False)
        self.free = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.free(x @ self.whole)
        return x + (x @ self.upper.T) @ self.upper


def test_weights_that_overlap_still_do() -> None:
    assert_streams_exactly(stack(Overlapping))
    model = stack(Overlapping)()
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters()), **ALL)
    with offload.full_params(model), torch.no_grad():
        model[0].whole.zero_()
        assert not model[0].upper.any()
    model, _ = offload.unwrap(model, optimizer)
    with torch.no_grad():
        model[1].whole.zero_()
    assert not model[0].upper.any() and not model[1].upper.any() and model[2].upper.any()


@dataclasses.dataclass
class Output:
    hidden: Tensor
    extra: dict[str, Any]


class Wrapping(nn.Module):
    """Returns what pytree does not look into."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(WIDTH)

    def forward(self, x: Tensor) -> Output:
        x = self.block(x)
        return Output(x, {"norm": [x.norm()]})


class InPlace(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        view = y.view(-1)
        return view.mul_(0.5).view_as(y)


class Viewing(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).view(x.shape)


class Keeping(Block):
    """Leaves a loss of its own in an attribute."""

    def forward(self, x: Tensor) -> Tensor:
        self.losses = [self.down(self.up(x.detach())).tanh().mean()]
        return super().forward(x)


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return gradient * weight * 2, (gradient * x * 2).flatten(0, -2).sum(0)


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH))
        self.list = nn.ParameterList(torch.randn(WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return Doubling.apply(x, self.weight) * self.list[0] + self.list[1]


class Sometimes(Block):
    """Every other time it returns its input, as dropped layers do."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x if self.calls % 2 else super().forward(x)


def edited(block: nn.Module, x: Tensor) -> Tensor:
    y = block(x)
    y.view(-1).add_(1)
    return y.mul_(2)


@pytest.mark.parametrize(
    ("make", "step"),
    [
        (Wrapping, lambda block, x: block(x).hidden + 0 * block(x).extra["norm"][0]),
        (lambda: InPlace(WIDTH), lambda block, x: block(x)),
        (lambda: Block(WIDTH), edited),
        (lambda: Viewing(WIDTH), lambda block, x: block(x).mul_(2)),
        (Custom, lambda block, x: block(x)),
        (lambda: Sometimes(WIDTH), lambda block, x: block(x)),
        (lambda: Block(WIDTH), lambda block, x: block(block(x)) + block(x)),
        (lambda: nn.Linear(WIDTH, WIDTH), lambda block, x: x @ block.weight + block.bias),
        (lambda: nn.Linear(WIDTH, WIDTH), lambda block, x: block(x) @ block.weight + block.bias.pow(2)),
    ],
    ids=[
        "dataclass",
        "in place",
        "edited",
        "edited view",
        "custom function",
        "dropped",
        "many calls",
        "weights from outside",
        "weights from outside after the forward",
    ],
)
def test_blocks(make: Callable[[], nn.Module], step: Callable[[nn.Module, Tensor], Tensor]) -> None:
    assert_streams_exactly(lambda: Listed(make, step))


def test_losses_left_in_attributes() -> None:
    def call(model: nn.Module, step: int) -> Tensor:
        model(torch.randn(3, WIDTH))
        return sum(block.losses[0] for block in model)

    assert_streams_exactly(stack(lambda: Keeping(WIDTH)), call)


def test_models_called_several_times_a_step_and_graphs_that_are_kept() -> None:
    def call(model: nn.Module, step: int) -> Tensor:
        first = model(torch.randn(3, WIDTH)).square().mean()
        second = model(torch.randn(3, WIDTH)).square().mean()
        second.backward(retain_graph=True)
        second.backward()
        with torch.no_grad():
            model(torch.randn(3, WIDTH))
        return first + model(torch.randn(3, WIDTH)).square().mean()

    assert_streams_exactly(lambda: Listed(lambda: Block(WIDTH), lambda block, x: block(x)), call)
    assert_streams_exactly(stack(lambda: Block(WIDTH)), call)


def test_a_gradient_of_the_input() -> None:
    def call(model: nn.Module, step: int) -> Tensor:
        x = torch.randn(3, WIDTH, requires_grad=True)
        (gradient,) = torch.autograd.grad(model(x).sum(), x)
        return (model(x) * gradient).mean()

    assert_streams_exactly(stack(lambda: Block(WIDTH)), call)


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_training_goes_on_after_an_exception(where: str, error: type[BaseException]) -> None:
    class Raising(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            if where == "forward":
                raise error("stop")
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            raise error("stop")

    class Fragile(Block):
        fails = False

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(Raising.apply(x) if self.fails else x)

    def call(model: nn.Module, step: int) -> Tensor:
        if step in (0, 2):
            model[1].fails = True
            with pytest.raises(error):
                model(torch.randn(3, WIDTH, requires_grad=True)).sum().backward()
            model[1].fails = False
            for p in model.parameters():
                p.grad = None
        return model(torch.randn(3, WIDTH)).square().mean()

    assert_streams_exactly(stack(lambda: Fragile(WIDTH)), call)


@pytest.mark.parametrize("how", ["compile()", "torch.compile"])
def test_compiled_blocks(how: str) -> None:
    compiled = 0

    def backend(graph: Any, _: Any) -> Any:
        nonlocal compiled
        compiled += 1
        return graph.forward

    def build() -> nn.Module:
        torch._dynamo.reset()
        model = stack(lambda: Block(WIDTH), 3)()
        for index, block in enumerate(model):
            if how == "compile()":
                block.compile(backend=backend)
            else:
                model[index] = torch.compile(block, backend=backend)
        return model

    def call(model: nn.Module, step: int) -> Tensor:
        if step == 2:
            counts.append(compiled)
        return model(torch.randn(3, WIDTH)).square().mean()

    counts: list[int] = []
    assert_streams_exactly(build, call, steps=6)
    assert counts[0] > 0 and compiled == 2 * counts[0], "a step compiled again"
