"""Any order of what users do gives a wrapped pair the bits of a plain one, and the same errors."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

import any_order
import offload
from any_order import LOOKS, Side
from any_order_hooks import HookRules
from any_order_more import MoreRules
from offload import _activations
from plain_optimizers import AS_ITSELF, OPTIMIZERS, plain_optimizer
from plain_pair import Block, Fault, Model

pytestmark = pytest.mark.usefixtures("device")

SEEDS = st.integers(0, 5)
INDICES = st.integers(0, 15)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# What updates that begin in backward need.
AHEAD = {"optimizer": "host", "gradients": "host", "params": "device"}


@st.composite
def placements(draw: Any, dtype: str, optimizer: str) -> dict[str, Any]:
    """Options of `wrap` with which it trains exactly."""

    def one(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    chosen: dict[str, Any] = {"activations": one("device", "host", "checkpoints", 0.5), "lazy": one(True, True, False)}
    if optimizer in AS_ITSELF:
        chosen |= {"optimizer": one("host", "device"), "gradients": one("host", "device"), "params": "device"}
        if chosen["optimizer"] == "host":
            chosen["params"] = one("device", "host")
    elif one(True, False, False):
        chosen |= {**AHEAD, "speculate": one("1MiB", 2048)}
    else:
        chosen |= {
            "optimizer": one("host", "host", "device", 0.5, "disk", "unified", {"unified": 0.5, "host": 0.5}),
            "gradients": one("host", "host", "device"),
            "params": one("device", "host", "host", "disk"),
        }
        if chosen["params"] == "disk" and chosen["optimizer"] not in ("host", "device", "disk", 0.5):
            chosen["params"] = "host"
    if chosen["params"] != "device":
        chosen |= {"prefetch": one(None, 1, 3), "run_ahead": one(False, True)}
    if dtype != "fp32" and hasattr(torch.Tensor, "grad_dtype"):
        chosen["grad_dtype"] = one(None, None, "fp32")
    if dtype == "bf16" and optimizer not in AS_ITSELF:
        chosen["master"] = one("auto", "split", "fp32")
    if one(True, False):
        chosen["units"] = one(["blocks.0", "blocks.1"], [Block, "head"])
    return chosen


def kind_of(error: Exception | None) -> str:
    """Ours derive from the builtin that fits."""
    kinds = (Fault, ValueError, RuntimeError)
    return next((kind.__name__ for kind in kinds if isinstance(error, kind)), "")


def attempt(action: Any, *args: Any, **options: Any) -> tuple[Any, Exception | None]:
    try:
        return action(*args, **options), None
    except (Fault, RuntimeError, ValueError) as error:
        return None, error


class AnyOrder(HookRules, MoreRules, RuleBasedStateMachine):
    """Each rule is an action of `any_order`. A watchful machine looks at everything after each, others when told to.

    disk_path, directory: where states and weights on disk, and checkpoints, are.
    """

    disk_path = directory = ""
    kinds_of_optimizers = tuple(OPTIMIZERS)

    @initialize(data=st.data(), dtype=st.sampled_from(["fp32", "bf16", "bf16", "fp16"]))
    def begin(self, data: Any, dtype: str) -> None:
        self.dtype, self.failed = dtype, False
        self.watchful = data.draw(st.booleans(), label="watchful")
        self.pairs: list[tuple[Side, Side]] = []
        self.kinds: list[str] = []  # of their optimizers
        self.make_pair(data)

    def make_pair(self, data: Any) -> None:
        kinds = self.kinds_of_optimizers
        if torch.get_default_device().type != "cpu":  # there others run other code than on the host, with other bits
            kinds = tuple(kind for kind in kinds if kind not in AS_ITSELF)
        self.kind = data.draw(st.sampled_from(kinds), label="optimizer")
        self.kinds.append(self.kind)
        torch.manual_seed(len(self.pairs))
        model = Model(data.draw(st.booleans(), label="tied")).to(DTYPES[self.dtype])
        left_out = data.draw(st.booleans(), label="left out")
        self.plain, self.own = self.sides(model, copy.deepcopy(model), left_out, data)
        self.own.number = len(self.pairs)
        self.pairs.append((self.plain, self.own))

    # A plain and a wrapped pair, and whether the last block joins the optimizer later.
    def sides(self, model: Model, other: Model, left_out: bool, data: Any) -> tuple[Side, Side]:
        side = Side(model, plain_optimizer(self.kind, self.first_parameters(model, left_out)), wrapped=False)
        wrapped, options = OPTIMIZERS[self.kind]
        placement = self.placement(data)
        if placement.get("grad_dtype"):
            side.set_grad_dtype(torch.float32)
        optimizer: Any = wrapped(self.first_parameters(other, left_out), **options)
        other, optimizer = offload.wrap(other, optimizer, **placement)
        return side, Side(other, optimizer, wrapped=True)

    def placement(self, data: Any) -> dict[str, Any]:
        drawn = data.draw(placements(self.dtype, self.kind), label="placement")
        if "disk" in (drawn["optimizer"], drawn["params"]):
            drawn |= {"disk_path": self.disk_path, "disk_window": 0, "disk_block": 4096}
        return drawn

    def first_parameters(self, model: Model, left_out: bool) -> list[torch.nn.Parameter]:
        late = {id(p) for p in model.blocks[2].parameters()} if left_out else set()
        return [p for p in model.parameters() if id(p) not in late]

    def both(self, action: Any, *args: Any, **options: Any) -> None:
        """Runs it on both sides; what it gives must be equal, and so must the kind of an error."""
        self.failed = True
        (expected, error), (found, other) = (attempt(action, side, *args, **options) for side in (self.plain, self.own))
        if kind_of(error) != kind_of(other):
            raise AssertionError(f"{error!r} and {other!r}") from other or error
        difference = any_order.difference(expected, found, action.__name__)
        assert difference is None, difference
        if self.watchful:
            self.look_at_all()
        self.failed = False

    def look_at_all(self) -> None:
        for look in LOOKS.values():
            difference = any_order.difference(look(self.plain), look(self.own), look.__name__)
            assert difference is None, difference

    # --- a step ---------------------------------------------------------------------------------------------

    @rule(seed=SEEDS, autocast=st.booleans())
    def forward(self, seed: int, autocast: bool) -> None:
        self.both(any_order.forward, seed, autocast=autocast and self.dtype == "fp32")

    @rule(seed=SEEDS, scaled=st.booleans())
    def micro_batch(self, seed: int, scaled: bool) -> None:
        self.both(any_order.forward, seed)
        self.both(any_order.backward, -1, False, scaled)

    @precondition(lambda self: self.plain.graphs)
    @rule(which=st.integers(0, 9), retain=st.booleans(), scaled=st.booleans())
    def backward(self, which: int, retain: bool, scaled: bool) -> None:
        self.both(any_order.backward, which % len(self.plain.graphs), retain, scaled)

    @rule(seed=SEEDS, how=st.sampled_from(["no_grad", "inference", "grad"]))
    def evaluate(self, seed: int, how: str) -> None:
        self.both(any_order.evaluate, seed, how)

    @rule(norm=st.sampled_from([None, 0.1, 1e9]), kind=st.sampled_from([2.0, 2.0, float("inf"), 1.0]))
    def clip(self, norm: float | None, kind: float) -> None:
        self.both(any_order.clip, norm, kind)

    @precondition(lambda self: self.plain.graphs)
    @rule(which=st.integers(0, 9), index=INDICES, derivative=st.booleans())
    def backward_of_some(self, which: int, index: int, derivative: bool) -> None:
        action = any_order.derivative if derivative else any_order.backward_of_some
        self.both(action, which % len(self.plain.graphs), index)

    @rule(seed=SEEDS)
    def forward_in_full(self, seed: int) -> None:
        self.both(any_order.forward_in_full, seed)

    @rule(seed=SEEDS, where=st.sampled_from(["forward", "backward"]))
    def faulty(self, seed: int, where: str) -> None:
        self.both(any_order.faulty, seed, where)

    @rule(grad_scale=st.sampled_from([1.0, 1.0, 1.0, 0.125]), keeps_graphs=st.booleans())
    def step(self, grad_scale: float, keeps_graphs: bool) -> None:
        self.both(any_order.step, 1.0 if self.kind in AS_ITSELF else grad_scale, keeps_graphs)

    @rule(seed=SEEDS, count=st.integers(1, 3), accumulates=st.booleans())
    def train(self, seed: int, count: int, accumulates: bool) -> None:
        """What most steps are."""
        for number in range(count):
            for _ in range(1 + accumulates):
                self.both(any_order.forward, seed + number)
                self.both(any_order.backward, -1, False, False)
            self.both(any_order.clip, 1.0, 2.0)
            self.both(any_order.step, 1.0, False)
            self.both(any_order.zero_grad, True)

    @rule(seed=SEEDS)
    def closure_step(self, seed: int) -> None:
        self.both(any_order.closure_step, seed)

    @rule(unscale=st.booleans(), norm=st.sampled_from([None, 0.1, 1e9]), overflows=st.booleans())
    def scaled_step(self, unscale: bool, norm: float | None, overflows: bool) -> None:
        self.both(any_order.scaled_step, unscale, norm, overflows)

    @rule(to_none=st.booleans())
    def zero_grad(self, to_none: bool) -> None:
        self.both(any_order.zero_grad, to_none)

    # --- what is changed by hand ----------------------------------------------------------------------------

    @rule(key=st.sampled_from(["lr", "weight_decay", "betas"]), larger=st.booleans())
    def change_group(self, key: str, larger: bool) -> None:
        values = {"lr": (1e-3, 2e-2), "weight_decay": (0.0, 0.1), "betas": ((0.8, 0.9), (0.9, 0.999))}
        if key in self.plain.optimizer.param_groups[0]:
            self.both(lambda side: side.optimizer.param_groups[0].__setitem__(key, values[key][larger]))

    @rule()
    def schedule(self) -> None:
        self.both(lambda side: side.schedule.step())

    @rule(index=INDICES, how=st.sampled_from(
        ["none", "assign", "mul", "tensor", "div", "add", "row", "view", "data", "replace", "clone", "zero"]
    ))  # fmt: skip
    def edit_gradient(self, index: int, how: str) -> None:
        self.both(any_order.edit_gradient, index, how)

    @rule(index=INDICES, how=st.sampled_from(["mul", "copy", "row", "data"]))
    def write_weight(self, index: int, how: str) -> None:
        self.both(any_order.write_weight, index, how)

    @rule()
    def swap(self) -> None:
        self.both(any_order.swap)

    @rule(index=INDICES, how=st.sampled_from(["assign", "pop", "scaled", "step"]))
    def edit_state(self, index: int, how: str) -> None:
        self.both(any_order.edit_state, index, how)

    @rule(skipped=st.sampled_from([None, 0, 1, 2]), checkpointed=st.sampled_from([None, "yes", "reentrant"]))
    def change_model(self, skipped: int | None, checkpointed: str | None) -> None:
        for side in (self.plain, self.own):
            side.model.skipped, side.model.checkpointed = skipped, checkpointed

    # --- saves, loads ---------------------------------------------------------------------------------------

    @rule()
    def save(self) -> None:
        self.both(any_order.save)

    @precondition(lambda self: self.plain.saved is not None)
    @rule(what=st.sampled_from(["model", "optimizer", "both", "reversed", "assigned"]))
    def load(self, what: str) -> None:
        self.both(any_order.load, what)

    @rule()
    def add_group(self) -> None:
        self.both(any_order.add_group)

    @rule(index=INDICES)
    def toggle(self, index: int) -> None:
        self.both(any_order.toggle, index)

    @rule(seed=SEEDS, pickled=st.booleans())
    def copied(self, seed: int, pickled: bool) -> None:
        self.both(any_order.copied, seed, pickled)

    @rule(data=st.data())
    def again(self, data: Any) -> None:
        self.both(any_order.again, self.placement(data))

    @rule(data=st.data(), which=st.integers(0, 1))
    def another_pair(self, data: Any, which: int) -> None:
        """Goes on with another pair, which is made at first."""
        if which >= len(self.pairs):
            self.make_pair(data)
        self.plain, self.own = self.pairs[which]
        self.kind = self.kinds[which]

    @rule(data=st.data())
    def resume(self, data: Any) -> None:
        """Loads what the pair has into a fresh one under another placement."""
        number = self.own.number
        groups = len(self.plain.optimizer.param_groups)
        saved = [(s.model.state_dict(), s.optimizer.state_dict()) for s in (self.plain, self.own)]
        torch.manual_seed(9)
        model = Model(self.plain.model.head.weight is self.plain.model.embedding.weight).to(DTYPES[self.dtype])
        left_out = len([p for g in self.plain.optimizer.param_groups for p in g["params"]]) < len(self.plain.parameters)
        pair = self.sides(model, copy.deepcopy(model), left_out or groups > 1, data)
        for side, (weights, states) in zip(pair, saved, strict=True):
            if groups > 1:
                any_order.add_group(side)
            side.number = number
            side.model.load_state_dict(weights)
            side.optimizer.load_state_dict(states)
        offload.unwrap(self.own.model, self.own.optimizer)
        self.plain, self.own = self.pairs[number] = pair
        self.both(any_order.states)

    @rule(in_background=st.booleans())
    def save_files(self, in_background: bool) -> None:
        self.both(any_order.save_files, self.directory, in_background)

    @precondition(lambda self: self.plain.files is not None)
    @rule()
    def load_files(self) -> None:
        self.both(any_order.load_files, self.directory)

    @rule(index=INDICES)
    def hold_gradient(self, index: int) -> None:
        self.both(any_order.hold_gradient, index)

    @rule()
    def step_inside(self) -> None:
        """Refused where weights are streamed, with nothing changed."""
        if self.own.optimizer.plan.params == "device" or self.own.optimizer._optimizer_step_pre_hooks:
            return
        with self.own.full(), pytest.raises(offload.StateError, match="leave the context"):
            self.own.optimizer.step()

    @rule(look=st.sampled_from(list(LOOKS)))
    def look(self, look: str) -> None:
        self.both(LOOKS[look])

    def teardown(self) -> None:
        if getattr(self, "failed", True):  # what failed is told
            return
        for pair in self.pairs:
            self.plain, self.own = pair
            self.look_at_all()
            offload.unwrap(self.own.model, self.own.optimizer)


# So many programs anew in each run, instead of the few that are the same in all of them.
RANDOM_PROGRAMS = int(os.environ.get("OFFLOAD_ANY_ORDER", "0"))
# What fails is made shorter in these alone: that takes minutes, and the timeout of a run of all tests would hide it.
PHASES = [Phase.generate, Phase.shrink] if RANDOM_PROGRAMS else [Phase.generate]


def run_programs(
    machine: type[AnyOrder], monkeypatch: pytest.MonkeyPatch, disk_path: str, tmp_path: Path, programs: int
) -> None:
    monkeypatch.setattr(_activations, "MIN_BYTES", 1)  # the model is small
    monkeypatch.setattr(machine, "disk_path", disk_path)
    monkeypatch.setattr(machine, "directory", tmp_path / "checkpoints")
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=RANDOM_PROGRAMS or programs,
            stateful_step_count=30,
            derandomize=not RANDOM_PROGRAMS,
            database=None,
            deadline=None,
            phases=PHASES,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_any_order_gives_the_bits_of_a_plain_pair(
    monkeypatch: pytest.MonkeyPatch, disk_calls: Any, disk_path: str, tmp_path: Path
) -> None:
    run_programs(AnyOrder, monkeypatch, disk_path, tmp_path, programs=16)
