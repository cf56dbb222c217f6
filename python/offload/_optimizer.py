"""OffloadOptimizer: the face of a torch optimizer whose states and update are the engine's."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ._adamw import AdamWHyper
from ._engine import Engine, Update
from ._errors import InvalidArgument, StateError
from ._hooks import Hooks
from ._parameter_state import ParameterState
from ._plan import Plan
from ._stats import Stats

NATIVE_OPTIMIZERS = (torch.optim.Adam, torch.optim.AdamW)


class OffloadOptimizer(torch.optim.Optimizer):
    """Returned by `offload.wrap` in the place of a `torch.optim.Adam` or `AdamW`.

    `param_groups` is the wrapped optimizer's own list, so schedulers made before or after `wrap` act on both.
    `step()` submits the update and returns; parameters become current when they are next used.
    """

    def __init__(self, original: torch.optim.Optimizer, engine: Engine, hooks: Hooks, parameters: list[Tensor]) -> None:
        self._running: Engine | None = engine
        self._hooks = hooks
        self._all_parameters = parameters
        self._original = original
        self._decoupled = type(original) is torch.optim.AdamW
        self._adopting = False
        super().__init__(original.param_groups, dict(original.defaults))
        self.param_groups = original.param_groups
        for group in self.param_groups:
            AdamWHyper.of_group(group, decoupled=self._decoupled)
            for parameter in group["params"]:
                self._adopt(parameter, original.state.get(parameter))
        original.state.clear()
        self._refusal = original.register_step_pre_hook(_refuse_step)
        self._adopting = True

    @property
    def _engine(self) -> Engine:
        if self._running is None:
            raise StateError("this optimizer was unwrapped: use the one that offload.unwrap returned")
        self._running.require_own_process()
        return self._running

    # --- parameters -----------------------------------------------------------------------------------------

    def _adopt(self, parameter: Parameter, saved: Mapping[str, Any] | None = None) -> None:
        if not parameter.requires_grad and not saved:
            return  # frozen: no state until it has a gradient
        state = self._engine.adopt(parameter)
        if saved:
            _load(state, saved)
        if parameter.requires_grad and self._engine.plan.gradients == "host":
            self._hooks.watch_gradient(parameter)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; the states of the new parameters are made at once, within the host budget."""
        super().add_param_group(param_group)
        if self._adopting:
            try:
                AdamWHyper.of_group(self.param_groups[-1], decoupled=self._decoupled)
                for parameter in self.param_groups[-1]["params"]:
                    self._adopt(parameter)
            except Exception:
                self.param_groups.pop()
                raise

    # --- the step -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Submits one update of every parameter that has a gradient; returns what `closure` returned.

        Hyperparameters are read now. Raises `InvalidArgument` naming the parameter for a gradient that cannot be used
        (nothing is changed then), and `StateError` after an earlier update failed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        updates = []
        for group in self.param_groups:
            hyper = AdamWHyper.of_group(group, decoupled=self._decoupled)
            updates += [Update(p, hyper) for p in group["params"] if p.grad is not None]
        self._engine.submit_step(updates)
        # A scheduler made before wrap() looks at the original to tell that it was stepped first.
        self._original._opt_called = True  # type: ignore[attr-defined]
        return loss

    def synchronize(self) -> None:
        """Waits for the submitted update: every parameter and state is current afterwards."""
        self._engine.synchronize()

    @torch.no_grad()
    def resync(self) -> None:
        """Re-seeds the masters from the model's weights: call it after writing through `parameter.data`.

        Writes by `copy_`, `load_state_dict` and other in-place operations are noticed without it.
        """
        self._engine.synchronize()
        for state in self._own_states():
            self._engine.reseed(state)

    # --- states ---------------------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """What was placed where, in bytes, and why."""
        return self._engine.plan

    def stats(self) -> Stats:
        """Bytes by tier, transfers, and how much of the host update was hidden, so far."""
        return self._engine.stats(self._all_parameters)

    def _own_states(self) -> list[ParameterState]:
        states = self._engine.states
        return [states[id(p)] for group in self.param_groups for p in group["params"] if id(p) in states]

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """As in torch: parameter -> step, exp_avg, exp_avg_sq, and the fp32 `master` of a 16-bit parameter.

        Current values: reading it waits for the submitted update. Tensors lie where the states do. A split master is
        joined into a new tensor; use `load_state_dict` to write one.
        """
        if not self._adopting:
            return defaultdict(dict)
        self._engine.synchronize()
        return defaultdict(dict, {state.parameter: _dump(state) for state in self._own_states() if state.step > 0})

    @state.setter
    def state(self, value: Any) -> None:
        if value:
            raise StateError("optimizer.state cannot be assigned: use load_state_dict()")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads torch's AdamW layout, in place: groups stay the same objects, moments stay fp32, on their tier.

        With a `master` the fp32 value is restored exactly, wherever the model's weight at the next step is its rounded
        value (model and optimizer may be loaded in any order); elsewhere, and without one, the weight is the master.
        Raises `InvalidArgument` when groups or shapes do not match; nothing is changed then.
        """
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        saved_groups = state_dict["param_groups"]
        counts = [len(group["params"]) for group in self.param_groups]
        saved_counts = [len(group["params"]) for group in saved_groups]
        if counts != saved_counts:
            raise InvalidArgument(
                f"the loaded state has groups of {saved_counts} parameters, this optimizer of {counts}"
            )
        pairs = [
            (parameter, state_dict["state"].get(index))
            for group, saved_group in zip(self.param_groups, saved_groups, strict=True)
            for parameter, index in zip(group["params"], saved_group["params"], strict=True)
        ]
        for parameter, saved in pairs:
            _check_saved(self._engine.name_of(parameter), parameter, saved)
        self._engine.synchronize()
        for group, saved_group in zip(self.param_groups, saved_groups, strict=True):
            group.update({key: copy.deepcopy(value) for key, value in saved_group.items() if key != "params"})
        for parameter, saved in pairs:
            if saved:
                self._adopt(parameter, saved)
            elif id(parameter) in self._engine.states:
                _reset(self._engine.states[id(parameter)])
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuses copy.copy(), copy.deepcopy(), pickle and torch.save()."""
        raise StateError(
            "an OffloadOptimizer cannot be copied or pickled, it belongs to one model and one process: save its "
            "state_dict(); for a copy give the copied model and a new optimizer to offload.wrap and load it there"
        )

    # --- the end --------------------------------------------------------------------------------------------

    def release(self) -> torch.optim.Optimizer:
        """Gives the states back to the wrapped optimizer and returns it; used by `offload.unwrap`."""
        self._engine.synchronize()
        self._refusal.remove()
        for state in self._own_states():
            if state.step > 0:
                self._original.state[state.parameter] = _plain(state)
        self._running = None
        return self._original


def _refuse_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    raise StateError(
        f"this {type(optimizer).__name__} was given to offload.wrap: call step() of the optimizer that wrap returned"
    )


def _dump(state: ParameterState) -> dict[str, Any]:
    dumped: dict[str, Any] = {
        "step": torch.tensor(float(state.step), device="cpu"),
        "exp_avg": state.exp_avg,
        "exp_avg_sq": state.exp_avg_sq,
    }
    if state.parameter.dtype != torch.float32:
        dumped["master"] = state.master_value()
    return dumped


def _plain(state: ParameterState) -> dict[str, Any]:
    """What stock torch would hold: moments in the parameter's dtype on its device."""
    device, dtype = state.parameter.device, state.parameter.dtype
    return {
        "step": torch.tensor(float(state.step), device="cpu"),
        "exp_avg": state.exp_avg.detach().to(device, dtype, copy=True),
        "exp_avg_sq": state.exp_avg_sq.detach().to(device, dtype, copy=True),
    }


def _check_saved(name: str, parameter: Tensor, saved: Mapping[str, Any] | None) -> None:
    if not saved:
        return
    if "max_exp_avg_sq" in saved:
        raise InvalidArgument(f"{name}: the state comes from amsgrad=True, which is not supported")
    for key in ("exp_avg", "exp_avg_sq", "master"):
        value = saved.get(key)
        if value is None and key != "master":
            raise InvalidArgument(f"{name}: the loaded state has no {key!r}; Adam and AdamW states can be loaded")
        if value is not None and value.shape != parameter.shape:
            raise InvalidArgument(f"{name}: {key} has shape {tuple(value.shape)}, not {tuple(parameter.shape)}")


@torch.no_grad()
def _load(state: ParameterState, saved: Mapping[str, Any]) -> None:
    _check_saved(state.name, state.parameter, saved)
    state.step = int(saved["step"])
    state.exp_avg.copy_(saved["exp_avg"])
    state.exp_avg_sq.copy_(saved["exp_avg_sq"])
    master = saved.get("master")
    if master is not None:
        state.set_master(master)


@torch.no_grad()
def _reset(state: ParameterState) -> None:
    state.step = 0
    state.exp_avg.zero_()
    state.exp_avg_sq.zero_()
