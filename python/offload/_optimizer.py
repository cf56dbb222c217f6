"""OffloadOptimizer: the face of a torch optimizer whose states and update are the engine's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from . import _checkpoint
from ._adamw import AdamWHyper
from ._engine import Engine, Update
from ._errors import StateError
from ._hooks import Hooks
from ._parameter_state import ParameterState
from ._plan import Plan
from ._stats import Stats

NATIVE_OPTIMIZERS = (torch.optim.Adam, torch.optim.AdamW)


_STATE_DICT_HOOKS = (
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


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
        for name in _STATE_DICT_HOOKS:  # the user's, whichever of the two they are registered on
            setattr(self, name, getattr(original, name))
        for group in self.param_groups:
            AdamWHyper.of_group(group, decoupled=self._decoupled)
            for parameter in group["params"]:
                self._take_over(parameter, original.state.get(parameter))
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

    def _adopt(self, parameter: Parameter, *, has_state: bool = False) -> None:
        if not parameter.requires_grad and not has_state:
            return  # frozen: no state until it has a gradient
        self._engine.adopt(parameter)
        if parameter.requires_grad and self._engine.plan.gradients == "host":
            self._hooks.watch_gradient(parameter)

    def _take_over(self, parameter: Parameter, saved: Mapping[str, Any] | None) -> None:
        """Goes on from the state that the wrapped optimizer has of a parameter."""
        self._adopt(parameter, has_state=bool(saved))
        if saved:
            _checkpoint.load(self._engine.states[id(parameter)], saved)

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

        Current values: reading it waits for the submitted update. Tensors lie where the states do, and as in torch
        they are the live ones, which the next `step()` writes to: save them, or deep-copy them, before it. A split
        master is joined into a new tensor; use `load_state_dict` to write one.
        """
        if not self._adopting:
            return defaultdict(dict)
        self._engine.synchronize()
        return defaultdict(
            dict, {state.parameter: _checkpoint.dump(state) for state in self._own_states() if state.step > 0}
        )

    @state.setter
    def state(self, value: Any) -> None:
        if value:
            raise StateError("optimizer.state cannot be assigned: use load_state_dict()")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads torch's AdamW layout, in place: groups stay the same objects, moments stay fp32, on their tier.

        With a `master` the fp32 value is restored exactly, wherever the model's weight at the next step is its rounded
        value (model and optimizer may be loaded in any order); elsewhere, and without one, the weight is the master.
        Hyperparameters are those loaded; `foreach`, `fused`, `capturable` and `differentiable` stay as they were.
        Raises `InvalidArgument` when groups, shapes or kind of state do not match or something is NaN, and
        `OutOfHostMemory`; nothing is changed then.
        """
        state_dict = dict(state_dict) if isinstance(state_dict, Mapping) else state_dict
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        pairs = _checkpoint.check(self.param_groups, state_dict, self._engine.name_of, decoupled=self._decoupled)
        self._engine.synchronize()
        for parameter, saved in pairs:
            if saved:
                self._adopt(parameter, has_state=True)  # may be over the host budget: before anything is changed
        for group, saved_group in zip(self.param_groups, state_dict["param_groups"], strict=True):
            _checkpoint.load_group(group, saved_group, decoupled=self._decoupled)
        states = self._engine.states
        for parameter, saved in pairs:
            if saved:
                _checkpoint.load(states[id(parameter)], saved)
            elif id(parameter) in states:
                _checkpoint.reset(states[id(parameter)])
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuses copy.copy(), copy.deepcopy(), pickle and torch.save()."""
        raise StateError(
            "an OffloadOptimizer cannot be copied or pickled, it belongs to one model and one process: save its "
            "state_dict(); for a copy give the copied model and a new optimizer to offload.wrap and load it there"
        )

    # --- the end --------------------------------------------------------------------------------------------

    def plain_states(self) -> dict[Tensor, dict[str, Any]]:
        """The states as stock torch would hold them."""
        return {state.parameter: _checkpoint.plain(state) for state in self._own_states() if state.step > 0}

    def release(self, states: Mapping[Tensor, dict[str, Any]]) -> torch.optim.Optimizer:
        """Gives `states` to the wrapped optimizer and returns it; this one refuses everything from now on."""
        self._refusal.remove()
        self._original.state.update(states)
        self._running = None
        del self._hooks, self._all_parameters
        return self._original


def _refuse_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    raise StateError(
        f"this {type(optimizer).__name__} was given to offload.wrap: call step() of the optimizer that wrap returned"
    )
