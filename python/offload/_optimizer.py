"""OffloadOptimizer: the face of a torch optimizer whose states and update are the engine's."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from . import _checkpoint
from ._adamw import round_to_weight
from ._checkpoint import SavedState
from ._engine import Engine
from ._engine_stats import allocator_bytes, engine_stats
from ._errors import InvalidArgument, StateError
from ._grad_factors import GradScale
from ._hooks import Hooks
from ._host_grad import total_norm
from ._interrupts import Uninterrupted
from ._live_states import LiveStates
from ._memory import MemorySummary, summarize
from ._parameter_state import ParameterState
from ._pending import reading_metadata
from ._plan import Plan
from ._probe import probe_process
from ._stats import Stats
from ._uncompiled import not_compiled
from ._updater import Updater

_STEP_PRE_HOOKS = "_optimizer_step_pre_hooks"
_HOOKS = (
    _STEP_PRE_HOOKS,
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


class OffloadOptimizer(torch.optim.Optimizer):
    """Returned by `offload.wrap` in the place of a torch optimizer.

    `param_groups` is the wrapped optimizer's own list, so schedulers made before or after `wrap` act on both.
    `step()` submits the update of a native class and returns; another class has updated its masters by then. Parameters
    become current when they are next used.
    """

    def __init__(self, original: torch.optim.Optimizer, updater: Updater, hooks: Hooks, model: nn.Module) -> None:
        self._running: Updater | None = updater
        self._hooks = hooks
        self._all_parameters = list(model.parameters())
        self._model = weakref.ref(model)
        self._original = original
        self._adopting = False
        self._joined = True
        self._dumps = False
        # Their gradients are to leave: torch watches none of a parameter that needs no gradient yet.
        self._frozen = list[Parameter]()
        # Of copies: torch adds to groups what defaults have gained since, as they do in a load.
        super().__init__([dict(group) for group in original.param_groups], dict(original.defaults))
        self.param_groups = original.param_groups
        for name in _HOOKS:  # the user's, whichever of the two they are registered on
            setattr(self, name, getattr(original, name))
        self._watch()
        self._adopting = True

    def take_over(self) -> None:
        """The last act of `wrap`, which cannot fail: the wrapped optimizer gives up its states and steps no more."""
        self._original.state.clear()
        setattr(self._original, _STEP_PRE_HOOKS, OrderedDict())
        self._original.register_step_pre_hook(_refuse_step)
        # These hooks are of both.
        self._refusals = (
            self._original.register_state_dict_pre_hook(_refuse_state_dict),
            self._original.register_load_state_dict_pre_hook(_refuse_load_state_dict, prepend=True),
        )

    @property
    def _updater(self) -> Updater:
        if self._running is None:
            raise StateError("this optimizer was unwrapped: use the one that offload.unwrap returned")
        self._running.engine.require_own_process()
        return self._running

    @property
    def _engine(self) -> Engine:
        return self._updater.engine

    # --- parameters -----------------------------------------------------------------------------------------

    def _watch(self) -> None:
        engine = self._engine
        self._frozen = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if engine.config.grad_dtype is not None:  # one that is frozen may be trained later
                    self._hooks.widen_gradient(parameter)
                if not engine.plan.gradient_leaves(engine.name_of(parameter)):
                    continue
                if parameter.requires_grad:
                    self._hooks.watch_gradient(parameter)
                else:
                    self._frozen.append(parameter)

    def _watch_thawed(self) -> None:
        """Those that are trained now, whose first gradients stayed on the device until this step."""
        thawed = reading_metadata(lambda: [p for p in self._frozen if p.requires_grad])
        if thawed:
            with Uninterrupted():
                for parameter in thawed:
                    self._hooks.watch_gradient(parameter)
                self._frozen = reading_metadata(lambda: [p for p in self._frozen if not p.requires_grad])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; the states of the new parameters are made at once, within the host budget.

        Raises `InvalidArgument` for parameters that cannot be trained or lie where the model does not compute,
        `OutOfHostMemory` and `StorageError`; nothing was changed then.
        """
        if not self._adopting:
            super().add_param_group(param_group)
            return
        updater = self._updater
        self._original.add_param_group(param_group)  # its class may have checks and defaults of its own
        group = self.param_groups[-1]
        try:
            updater.check_group(group)
            trained = [parameter for parameter in group["params"] if parameter.requires_grad]
            updater.engine.make_room(trained, updater.state_kind_of(self._original))
            for parameter in trained:
                updater.adopt(parameter)
        except BaseException:
            self.param_groups.pop()
            raise
        self._watch()

    # --- the step -------------------------------------------------------------------------------------------

    @torch.no_grad()
    @not_compiled
    def step(self, closure: Callable[[], Any] | None = None, *, grad_scale: float | Tensor = 1.0) -> Any:
        """Submits one update of every parameter that has a gradient; returns what `closure` returned.

        Hyperparameters are read now. The update reads each gradient times `grad_scale`, a product in fp32 that is not
        rounded to the gradient's dtype: a loss scale and a clipping coefficient are undone here without losing what is
        too small for fp16. It may be a tensor of one element; one on the device that computes is not waited for.
        `p.grad` stays as it is.

        Raises `InvalidArgument` naming the parameter for a gradient that cannot be used, and for a `grad_scale` of
        several elements (nothing is changed then), `StateError` after an earlier update failed, and what the step of
        another class raises: masters, and weights with them, may then be updated in part, as in plain torch.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale = self._usable_scale(grad_scale)
        if not self._updater.announces_updates:
            self._engine.announce_change()
        self._updater.step(self.param_groups, scale)
        if self._frozen:
            self._watch_thawed()
        # A scheduler made before wrap() looks at the original to tell that it was stepped first.
        self._original._opt_called = True  # type: ignore[attr-defined]
        return loss

    def __getattr__(self, name: str) -> Any:
        """Methods that its class has beside those of every optimizer, as `train()` and `eval()` of schedule-free ones.

        They run as the step does, over the masters, and the weights follow what they write.
        """
        updater = self.__dict__.get("_running")
        method = None if updater is None else updater.method(name)
        if method is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return partial(self._run_method, method)

    @not_compiled
    def _run_method(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._engine.announce_change()
        return method(*args, **kwargs)

    @property
    def steps_made(self) -> int:
        """How many steps were made so far, by all optimizers of the model.

        An update and its count are one: Ctrl-C, or a hook that raises behind the update, comes after both.
        """
        return self._engine.step.count

    def _usable_scale(self, scale: float | Tensor) -> GradScale:
        """A tensor on the device as a copy in fp32, which the update may read after the caller's next write to it."""
        if isinstance(scale, Tensor) and (scale.numel() != 1 or scale.is_meta or scale.is_complex()):
            what = f"is {scale.dtype} of shape {tuple(scale.shape)} on {scale.device}"
            raise InvalidArgument(f"grad_scale {what}: give a number, or one real element")
        if not isinstance(scale, Tensor) or scale.device != self._engine.lanes.device:
            try:
                return float(scale)
            except (TypeError, ValueError) as error:
                raise InvalidArgument(f"grad_scale={scale!r}: give a number, or a tensor of one element") from error
        return scale.detach().reshape(()).to(torch.float32, copy=True)

    @not_compiled
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's. Gradients may be set to None while their parameters are pending."""
        if self._running is not None and self._running.engine.speculation is not None:
            self._running.engine.speculation.forget()
        if set_to_none:
            reading_metadata(super().zero_grad)
        else:
            super().zero_grad(set_to_none=False)

    @not_compiled
    def gradients(self) -> list[Tensor]:
        """`p.grad` of the parameters that have one, in the order of the groups: in one go, of pending ones too."""
        read: list[Tensor | None] = reading_metadata(lambda: [p.grad for g in self.param_groups for p in g["params"]])
        return [gradient for gradient in read if gradient is not None]

    @torch.no_grad()
    @not_compiled
    def grad_norm(self) -> Tensor:
        """The L2 norm over all elements of all gradients, summed in fp32: a scalar on their device; nothing is waited
        for. Once asked for it is taken as gradients leave, as that of `clip_grad_norm_` is.
        """
        return total_norm(self.gradients())

    @not_compiled
    def synchronize(self) -> None:
        """Waits for the submitted update: every parameter and state is current afterwards."""
        self._engine.synchronize()

    @torch.no_grad()
    @not_compiled
    def resync(self) -> None:
        """Re-seeds the masters from the model's weights: call it after writing through `parameter.data`.

        Writes by `copy_`, `load_state_dict` and other in-place operations are noticed without it.
        """
        self._engine.synchronize()
        self._engine.announce_change()
        for state in self._own_states():
            self._engine.step.reseed(state)

    # --- states ---------------------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """What was placed where, in bytes, and why."""
        return self._engine.plan

    @not_compiled
    def stats(self) -> Stats:
        """Bytes by tier, transfers, and how much of the host update was hidden, so far."""
        model = self._model()
        buffers = {} if model is None else dict(model.named_buffers())
        return engine_stats(self._engine, self._all_parameters, buffers)

    @not_compiled
    def memory_summary(self) -> MemorySummary:
        """Who owns which bytes in which tier, now and at most, beside what the plan predicted; `print` shows tables.

        The device's share is what offload keeps there; torch's own figures stand beside it, their peaks since the last
        `torch.cuda.reset_peak_memory_stats()`.
        """
        stats = self.stats()
        allocator = allocator_bytes(self._all_parameters[0].device) if self._all_parameters else {}
        return summarize(stats, self.plan, process=probe_process(), allocator=allocator)

    def _own_states(self) -> list[ParameterState]:
        states = self._engine.states
        return [states[id(p)] for group in self.param_groups for p in group["params"] if id(p) in states]

    @property
    def state(self) -> Any:
        """As in torch: parameter -> what its class keeps, and the fp32 `master` of a 16-bit parameter.

        Current values: reading it waits for the submitted update. Tensors lie where the states do, and as in torch
        they are the live ones, which the next `step()` writes to: save them, or deep-copy them, before it. A split
        master is joined into a new tensor, a bf16 one is the weight itself, and `moments` in bf16 or int8 are given as
        new ones in fp32, states on disk are read, each when it is asked for: what is written to those tensors is lost.
        What is assigned (`state[p]["exp_avg"] = tensor`) is copied into the state, wherever it and the tensor are, and
        a deleted state starts anew. Raises `InvalidArgument` for what is no state of the parameter.
        """
        if not self._adopting:
            return {}
        if self._dumps:
            self._engine.synchronize()
            return self._updater.dump(self.param_groups, joined=self._joined)
        return LiveStates(self._state_keys, self._read_state, self._take_state)

    @state.setter
    def state(self, value: Any) -> None:
        """Nothing but an empty one, with which every state starts anew."""
        if value:
            raise StateError("optimizer.state cannot be assigned: use load_state_dict()")
        if self._adopting:
            self.state.clear()

    def _state_keys(self) -> list[Any]:
        return self._updater.keys(self.param_groups)

    def _read_state(self, key: Any) -> Any:
        self._engine.synchronize()
        group = {"params": [key] if isinstance(key, Tensor) else []}
        return self._updater.dump([group]).get(key, {})

    def _take_state(self, key: Any, values: SavedState | None) -> None:
        if isinstance(key, Tensor):
            name = self._engine.name_of(key)
            if all(p is not key for group in self.param_groups for p in group["params"]):
                raise InvalidArgument(f"{name} is in no group of this optimizer: it has no state here")
            if not isinstance(values, Mapping | None):
                raise InvalidArgument(f"{name}: its state became {values!r}; it must be a dict of its entries")
        self._engine.synchronize()
        self._engine.announce_change()
        self._updater.take(key, values)

    @not_compiled
    def state_dict(self) -> dict[str, Any]:
        """As torch's: the values that `state` shows, in plain dicts."""
        self._dumps = True
        try:
            return super().state_dict()
        finally:
            self._dumps = False

    def state_of(self, parameter: Parameter) -> dict[str, Any]:
        """`state[parameter]`, and nothing of the others is read; empty for a parameter that is not trained.

        A native class shows its moments before the first step too.
        """
        self._engine.synchronize()
        is_own = any(p is parameter for group in self.param_groups for p in group["params"])
        return self._updater.dump_one(parameter) if is_own and id(parameter) in self._engine.states else {}

    @torch.no_grad()
    def write_state(self, parameter: Parameter, values: Mapping[str, Tensor]) -> None:
        """Writes entries of `state_of(parameter)`: tensors of its shape, in any float dtype, on any device.

        `master` is the fp32 weight of a parameter of any dtype: the parameter becomes its rounded value at once. As in
        torch, `state_dict()` and checkpoints have nothing of a parameter before its first step.
        Raises `InvalidArgument` for a parameter without a state, an entry that its state does not have, another shape
        and NaN; nothing is changed then.
        """
        engine, own = self._engine, self._own_states()
        if not isinstance(parameter, Tensor) or not isinstance(values, Mapping):
            what = f"a {type(parameter).__name__} and a {type(values).__name__}"
            raise InvalidArgument(f"write_state was given {what}: give a parameter and a dict of entries of its state")
        name = engine.name_of(parameter)
        if all(state.parameter is not parameter for state in own):
            raise InvalidArgument(f"{name} has no optimizer state: it is not trained, or by another optimizer")
        known = self.state_of(parameter)
        legal = {key for key, value in known.items() if isinstance(value, Tensor) and value.shape == parameter.shape}
        for key, value in values.items():
            _checkpoint.check_entry(name, parameter, key, value, legal | {"master"})
        self._engine.announce_change()
        master = values.get("master")
        if master is not None:
            with engine.streaming.present([parameter]):
                parameter.copy_(round_to_weight(master.to(parameter.device, torch.float32), parameter.dtype))
        kept = {key: value for key, value in values.items() if key != "master" or parameter.dtype != torch.float32}
        self._updater.take(parameter, known | kept)

    def state_dict_in_place(self) -> dict[str, Any]:
        """`state_dict()` without a new tensor: a split master is a `SplitMaster` of its live halves."""
        self._joined = False
        try:
            return self.state_dict()
        finally:
            self._joined = True

    def check_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Raises `InvalidArgument` for what `load_state_dict` refuses; hooks are not run."""
        pairs, others = _checkpoint.pair(self.param_groups, state_dict)
        self._updater.check(self.param_groups, state_dict["param_groups"], pairs, others)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the layout of the optimizer's class, in place: groups stay the same objects, states fp32 on their tier.

        Moments in a small format take the nearest values that it has; what the same format gave is loaded exactly.

        With a `master` the fp32 value is restored exactly, wherever the model's weight at the next step is its rounded
        value (model and optimizer may be loaded in any order); elsewhere, and without one, the weight is the master.
        Hyperparameters are those loaded; `foreach`, `fused`, `capturable` and `differentiable` stay as they were.
        Raises `InvalidArgument` when groups, shapes or kind of state do not match or something is NaN, and
        `OutOfHostMemory`; nothing is changed then.
        """
        engine = self._engine
        state_dict = dict(state_dict) if isinstance(state_dict, Mapping) else state_dict
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        pairs, others = _checkpoint.pair(self.param_groups, state_dict)
        self._updater.check(self.param_groups, state_dict["param_groups"], pairs, others)
        engine.synchronize()
        engine.announce_change()
        for parameter, saved in pairs:
            if saved:
                self._updater.adopt(parameter)  # may be over the host budget: before anything is changed
        for group, saved_group in zip(self.param_groups, state_dict["param_groups"], strict=True):
            _checkpoint.load_group(group, saved_group)
        self._updater.load(self.param_groups, pairs, others)
        self._watch()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuses copy.copy(), copy.deepcopy(), pickle and torch.save()."""
        raise StateError(
            "an OffloadOptimizer cannot be copied or pickled, it belongs to one model and one process: save its "
            "state_dict(); for a copy give the copied model and a new optimizer to offload.wrap and load it there"
        )

    # --- the end --------------------------------------------------------------------------------------------

    def plain_states(self) -> dict[Any, Any]:
        """The states as stock torch would hold them."""
        return self._updater.plain_states()

    def release(self, states: Mapping[Any, Any]) -> torch.optim.Optimizer:
        """Gives `states` to the wrapped optimizer and returns it; this one refuses everything from now on."""
        for refusal in self._refusals:
            refusal.remove()
        setattr(self._original, _STEP_PRE_HOOKS, getattr(self, _STEP_PRE_HOOKS))
        self._updater.release(states)
        self._running = None
        del self._hooks, self._all_parameters
        return self._original


def _refuse_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    _refuse(optimizer, "step()")


def _refuse_state_dict(optimizer: torch.optim.Optimizer) -> None:
    """It has no states to save."""
    _refuse(optimizer, "state_dict()")


def _refuse_load_state_dict(optimizer: torch.optim.Optimizer, state_dict: Any) -> None:
    """Nothing would use what it loads."""
    _refuse(optimizer, "load_state_dict()")


def _refuse(optimizer: torch.optim.Optimizer, call: str) -> None:
    if not isinstance(optimizer, OffloadOptimizer):
        raise StateError(
            f"this {type(optimizer).__name__} was given to offload.wrap: call {call} of the optimizer that wrap "
            "returned"
        )
