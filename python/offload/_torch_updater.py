"""TorchUpdater: any torch optimizer, run as its own class over fp32 masters.

A twin of the user's optimizer (the same class and attributes, its own groups, states and hooks) steps over masters in
the place of the model's parameters, on the tier of the states. The result has the bits of that class in plain torch
over fp32 masters, and for fp32 parameters those of the class over the model itself. It is as slow as plain torch, and
runs inside `step()`: only the way of the new weights back to the device is hidden.
"""

from __future__ import annotations

import copy
import inspect
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from . import _checkpoint, _trace
from ._adamw import AdamW
from ._checkpoint import Groups, SavedState
from ._engine import Engine
from ._errors import InvalidArgument
from ._grad_factors import GradScale, scaled
from ._parameter_state import ParameterState
from ._pending import noted_on

# How deep attributes of an optimizer are searched for parameters: a list of groups that hold lists.
_SEARCH_DEPTH = 3


class TorchUpdater:
    """Steps a twin of `original`; see the module's text and `_updater.Updater`."""

    def __init__(self, original: Optimizer, engine: Engine) -> None:
        self.engine = engine
        self._original = original
        self._twin = _twin_of(original)
        # By the identity of the model's parameter; what the twin has in its place.
        self._masters: dict[int, Parameter] = {}
        for group in original.param_groups:
            self.check_group(group)
            for parameter in group["params"]:
                if parameter.requires_grad or original.state.get(parameter):
                    engine.check_trainable(parameter)

    @property
    def announces_updates(self) -> bool:
        return False

    def begin(self) -> None:
        original = self._original
        parameters = [p for group in original.param_groups for p in group["params"]]
        for parameter in parameters:
            if parameter.requires_grad:
                self.adopt(parameter)
        known = {id(parameter) for parameter in parameters}
        others = {key: value for key, value in original.state.items() if id(key) not in known}
        self._take_states([(parameter, original.state.get(parameter)) for parameter in parameters], others)
        self.engine.torch_optimizers.append(self._twin)

    def check_group(self, group: Mapping[str, Any]) -> None:
        name = type(self._original).__name__
        for flag in ("differentiable", "capturable"):
            if group.get(flag):
                raise InvalidArgument(f"{name} has {flag}=True, which is not supported: pass {flag}=False")
        away = self.engine.plan.optimizer == "host" and self.engine.plan.device_kind != "cpu"
        if group.get("fused") and away:
            raise InvalidArgument(
                f"{name} has fused=True and its states are on the host, where that kernel is another one: pass "
                "fused=False, or optimizer='device'"
            )

    def adopt(self, parameter: Parameter) -> None:
        if id(parameter) in self._masters:
            return
        state = self.engine.adopt(parameter, ParameterState)
        master = Parameter(state.master_value().detach(), requires_grad=parameter.requires_grad)
        master.__dict__.update(noted_on(parameter))  # for the class to read
        self._masters[id(parameter)] = master

    @property
    def _fused(self) -> bool:
        """A fused kernel has its step counters where the parameters are."""
        return any(group.get("fused") for group in self._original.param_groups)

    @staticmethod
    def state_kind_of(optimizer: Optimizer) -> type[ParameterState]:
        return ParameterState

    # --- the step -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, groups: Groups, grad_scale: GradScale) -> None:
        """Runs the class's own step; its error passes unchanged, and leaves what plain torch would.

        The masters may be updated in part then, and the weights follow them: training can go on where it could there.
        """
        self._run(groups, lambda: _own_step(self._twin)(self._twin), grad_scale, is_step=True)

    def method(self, name: str) -> Callable[..., Any] | None:
        own = getattr(type(self._twin), name, None)
        # What a generator does it does later, when nothing brings its writes to the weights.
        if name.startswith("_") or not callable(own) or inspect.isgeneratorfunction(inspect.unwrap(own)):
            return None
        return partial(self._call, name)

    @torch.no_grad()
    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        call = partial(getattr(self._twin, name), *args, **kwargs)
        return self._run(self._original.param_groups, call, 1.0, is_step=False)

    def _run(self, groups: Groups, call: Callable[[], Any], grad_scale: GradScale, *, is_step: bool) -> Any:
        """What `call` does to the twin's masters, groups and gradients happens to the user's."""
        with_gradient = [p for group in groups for p in group["params"] if p.grad is not None]
        self.engine.step.check_gradients(with_gradient)
        for parameter in with_gradient:
            self.adopt(parameter)
        states = self._states(groups)
        self.engine.step.settle(states)
        gradients = self.engine.step.float32_gradients(with_gradient)
        if self.engine.plan.optimizer != "device":
            grad_scale = float(grad_scale)  # waits no longer than the gradients did
        gradients = [scaled(gradient, grad_scale) for gradient in gradients]
        self.engine.step.reseed_written(states)
        start = time.perf_counter()
        versions = {}
        for state in states:
            master = self._masters[id(state.parameter)]
            master.data = state.master_value()  # that of an fp32 parameter on the device may have moved with it
            versions[id(state)] = master._version
        given = {}
        for parameter, gradient in zip(with_gradient, gradients, strict=True):
            self._masters[id(parameter)].grad = gradient
            given[id(parameter)] = (gradient, gradient._version)
        self._give_groups(groups)
        try:
            return call()
        finally:
            self._take_groups(groups)
            for parameter in with_gradient:
                self._take_gradient(parameter, *given[id(parameter)])
            # What writes through `.data` shows in no version. A step does so over a gradient, another method anywhere.
            written = [
                state
                for state in states
                if self._take_master(state, versions[id(state)]) or id(state.parameter) in given or not is_step
            ]
            self.engine.step.publish(written, is_step=is_step)
            end = time.perf_counter()
            self.engine.torch_update_s += end - start
            for lane in ("host_update", "wait"):  # the training thread runs it itself
                _trace.record(lane, type(self._twin).__name__, int(start * 1e9), int(end * 1e9))

    def _give_groups(self, groups: Groups) -> None:
        """The twin sees the user's groups as they are now. A parameter that never had a gradient stands for itself."""
        self._twin.param_groups = [
            {**group, "params": [self._masters.get(id(p), p) for p in group["params"]]} for group in groups
        ]

    def _take_groups(self, groups: Groups) -> None:
        """Some classes keep numbers in their groups: they are the user's to see and to save."""
        for group, mine in zip(groups, self._twin.param_groups, strict=True):
            group.update({key: value for key, value in mine.items() if key != "params"})

    def _take_gradient(self, parameter: Parameter, given: Tensor, version: int) -> None:
        """Some classes edit or drop gradients: the parameter's own shows it, as far as it is not a widened copy."""
        master = self._masters[id(parameter)]
        left, master.grad = master.grad, None
        edited = left is not given or left._version != version
        if left is None:
            parameter.grad = None
        elif edited and parameter.grad is not None and parameter.grad.dtype == torch.float32:
            parameter.grad.copy_(left)

    def _take_master(self, state: ParameterState, version: int) -> bool:
        """Whether the class wrote to the master; one that it gave other storage (`p.data = ...`) is brought home."""
        master = self._masters[id(state.parameter)]
        home = state.master_value()
        if master.data_ptr() == home.data_ptr():
            return master._version != version
        home.copy_(master)
        master.data = home
        return True

    def _states(self, groups: Iterable[Mapping[str, Any]]) -> list[ParameterState]:
        states = self.engine.states
        return [states[id(p)] for group in groups for p in group["params"] if id(p) in states]

    # --- states ---------------------------------------------------------------------------------------------

    def dump(self, groups: Iterable[Mapping[str, Any]], *, joined: bool = True) -> dict[Any, Any]:
        states = self._states(groups)
        owners = {id(self._masters[id(state.parameter)]): state.parameter for state in states}
        dumped = {owners.get(id(key), key): values for key, values in self._twin.state.items()}
        for state in states:
            if state.parameter.dtype != torch.float32 and state.step > 0:
                dumped[state.parameter] = {**dumped.get(state.parameter, {}), "master": state.master_value()}
        return dumped

    def dump_one(self, parameter: Parameter) -> dict[str, Any]:
        values = self._twin.state.get(self._masters[id(parameter)], {})
        if parameter.dtype == torch.float32:
            return dict(values)
        return {**values, "master": self.engine.states[id(parameter)].master_value()}

    def keys(self, groups: Groups) -> list[Any]:
        return list(self.dump(groups))

    def take(self, key: Any, saved: SavedState | None) -> None:
        if isinstance(key, Parameter):
            self._check_master(key, saved)
            self._take_state(key, saved)
        elif saved is None:
            del self._twin.state[key]
        else:
            self._twin.state[key] = saved

    def check(
        self,
        groups: Groups,
        saved_groups: Groups,
        pairs: Iterable[tuple[Parameter, SavedState | None]],
        others: Mapping[Any, Any],
    ) -> None:
        for parameter, saved in pairs:
            self._check_master(parameter, saved)

    def _check_master(self, parameter: Parameter, saved: SavedState | None) -> None:
        """What else a class of its own keeps is known to nobody else."""
        master = (saved or {}).get("master")
        if master is not None:
            _checkpoint.check_entry(self.engine.name_of(parameter), parameter, "master", master, ("master",))

    def load(
        self, groups: Groups, pairs: Iterable[tuple[Parameter, SavedState | None]], others: Mapping[Any, Any]
    ) -> None:
        self._take_states(pairs, others)
        self._give_groups(groups)
        twin = self._twin
        # The class brings states and groups of its older versions up to date here.
        if type(twin).load_state_dict is Optimizer.load_state_dict:
            twin.__setstate__({"state": twin.state, "param_groups": twin.param_groups})
        else:  # in a way of its own, of what lies on its tier already
            twin.load_state_dict(Optimizer.state_dict(twin))
        self._take_groups(groups)

    @torch.no_grad()
    def _take_states(self, pairs: Iterable[tuple[Parameter, SavedState | None]], others: Mapping[Any, Any]) -> None:
        """Copies states to their tier; of those that stock torch saved for a 16-bit parameter, in fp32."""
        self._twin.state.clear()
        for parameter, saved in pairs:
            self._take_state(parameter, saved)
        self._twin.state.update(copy.deepcopy(dict(others)))

    @torch.no_grad()
    def _take_state(self, parameter: Parameter, saved: SavedState | None) -> None:
        if saved:
            self.adopt(parameter)
        elif id(parameter) not in self._masters:
            return
        self._twin.state.pop(self._masters[id(parameter)], None)
        state = self.engine.states[id(parameter)]
        state.step = 1 if saved else 0
        if saved and saved.get("master") is not None:
            state.set_master(saved["master"])
        else:
            state.seed_master()
        if not saved:
            return
        widen = parameter.dtype != torch.float32 and "master" not in saved
        master = self._masters[id(parameter)]
        values = {key: value for key, value in saved.items() if key != "master"}
        if values:
            self._twin.state[master] = _placed(None, values, master.device, widen=widen, fused=self._fused)

    def plain_states(self) -> dict[Any, Any]:
        groups = self._original.param_groups
        owners = {id(master): key for key, master in self._masters.items()}
        parameters = {id(p): p for group in groups for p in group["params"]}
        plain = {}
        for key, values in self._twin.state.items():
            parameter = parameters.get(owners.get(id(key), 0))
            if parameter is None:
                plain[key] = values
            else:
                plain[parameter] = _plain(None, values, parameter, fused=self._fused)
        return plain

    def release(self, states: Mapping[Any, Any]) -> None:
        self._original.state.update(states)
        self._original.__dict__.update(
            {name: value for name, value in vars(self._twin).items() if not _is_twins_own(name)}
        )


def _twin_of(original: Optimizer) -> Optimizer:
    twin: Optimizer = object.__new__(type(original))
    for name, value in vars(original).items():
        # The user's hooks stay with the original; schedulers set a `step` that is bound to it.
        if not _is_twins_own(name):
            twin.__dict__[name] = value
        elif name.endswith("_hooks"):
            twin.__dict__[name] = OrderedDict()
    twin.state = defaultdict(dict)
    twin.param_groups = []
    return twin


def _is_twins_own(attribute: str) -> bool:
    is_hooks = attribute.startswith("_optimizer_") and attribute.endswith("_hooks")
    return is_hooks or attribute in ("state", "param_groups", "step")


def _own_step(optimizer: Optimizer) -> Any:
    """The class's step without torch's wrapper: global step hooks run around ours already."""
    step: Any = type(optimizer).step
    return step.__wrapped__ if getattr(step, "hooked", False) else step


def _placed(key: Any, value: Any, device: torch.device, *, widen: bool, fused: bool) -> Any:
    """A copy of one entry of a saved state where its optimizer wants it; `step` is there only if it is fused."""
    if isinstance(value, Mapping):
        return {name: _placed(name, item, device, widen=widen, fused=fused) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_placed(key, item, device, widen=widen, fused=fused) for item in value)
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    if key == "step" and not fused:
        device = torch.device("cpu")
    dtype = torch.float32 if widen and value.is_floating_point() and value.itemsize == 2 else value.dtype
    return value.detach().to(device, dtype, copy=True)


def _plain(key: Any, value: Any, parameter: Tensor, *, fused: bool) -> Any:
    """What stock torch would hold for `parameter` in the place of one entry of its state."""
    if isinstance(value, Mapping):
        return {name: _plain(name, item, parameter, fused=fused) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(key, item, parameter, fused=fused) for item in value)
    if not isinstance(value, Tensor):
        return value
    device = value.device if key == "step" and not fused else parameter.device
    # Scalars are counters and factors, which torch keeps in fp32 beside 16-bit parameters too.
    narrow = value.dtype == torch.float32 and value.dim() > 0
    return value.to(device, parameter.dtype if narrow else value.dtype)


# --- the door -----------------------------------------------------------------------------------------------


def check_torch_optimizer(optimizer: Optimizer, model: nn.Module) -> None:
    """Raises `InvalidArgument` for an optimizer whose twin would not do what it does."""
    kind = type(optimizer)
    reason = None
    if isinstance(optimizer, torch.optim.LBFGS) or _needs_closure(kind):
        reason = "its step evaluates the model itself, and that would see weights which have not followed their masters"
    elif isinstance(optimizer, torch.optim.SparseAdam):
        reason = "it takes sparse gradients only, and offload dense ones; use torch.optim.AdamW and sparse=False"
    elif isinstance(optimizer, AdamW):
        reason = "it updates host memory by itself; use torch.optim.AdamW, which offload runs with the same code"
    elif kind.state_dict is not Optimizer.state_dict:
        reason = "it has a state_dict of its own, and offload saves and loads torch's layout"
    if reason is not None:
        raise InvalidArgument(f"{kind.__name__} is not supported: {reason}")
    known = {id(parameter) for parameter in model.parameters()}
    for name, value in vars(optimizer).items():
        if not _is_twins_own(name) and _reaches(value, known, _SEARCH_DEPTH):
            raise InvalidArgument(
                f"{kind.__name__} is not supported: its attribute {name!r} holds the model's parameters, and its step "
                "would go past their masters; an optimizer may keep them in param_groups and state only"
            )


def _needs_closure(kind: type[Optimizer]) -> bool:
    closure = inspect.signature(kind.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def _reaches(value: Any, known: set[int], depth: int) -> bool:
    """Whether `value` is, contains or identifies a parameter of `known`, which holds their ids."""
    if isinstance(value, (Tensor, int)):
        return id(value) in known or (type(value) is int and value in known)
    if isinstance(value, Optimizer):
        value = value.param_groups
    elif isinstance(value, nn.Module):
        value = list(value.parameters())
    if depth == 0:
        return False
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    return isinstance(value, (list, tuple, set, frozenset)) and any(_reaches(v, known, depth - 1) for v in value)
