"""The optimizers of plain pairs: torch's classes, with the package's update where that is native, and over fp32 masters
beside 16-bit weights.

Of the package they have the sequences of the updates in single torch operations, and nothing else.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import offload
from offload._adagrad import AdagradHyper, adagrad_step_
from offload._adamw import AdamWHyper, adamw_step_, round_to_weight
from offload._lion import LionHyper, lion_step_


class WithMasters(torch.optim.Optimizer):
    """What 16-bit weights have beside torch's states: an fp32 master, which the weight is the rounded value of."""

    def _master(self, p: Tensor) -> Tensor:
        """Where the weight is no more its rounded value, the weight counts."""
        if p.dtype == torch.float32:
            return p.detach()
        state = self.state[p]
        if "master" not in state:
            state["master"] = p.detach().float()
        master: Tensor = state["master"]
        written = round_to_weight(master, p.dtype).view(torch.int16) != p.detach().view(torch.int16)
        return master.copy_(torch.where(written, p.detach().float(), master))

    def resync(self) -> None:
        for p, state in self.state.items():
            if "master" in state:
                self._master(p)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        ids = [index for group in state_dict["param_groups"] for index in group["params"]]
        mine = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(ids, mine, strict=True):
            saved = state_dict["state"].get(index)
            if saved:
                self.state[p] = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in saved.items()}
                if p.dtype != torch.float32 and "master" not in saved:
                    self.state[p]["master"] = p.detach().float()


class Reference(WithMasters):
    """Over one of the native classes: its step is the package's sequence in torch operations."""

    moments: tuple[str, ...] = ("exp_avg", "exp_avg_sq")

    def _hyper(self, group: Mapping[str, Any]) -> Any:
        raise NotImplementedError

    def _apply(self, master: Tensor, state: dict[str, Any], gradient: Tensor, scalars: Any) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Any = None, *, grad_scale: float | Tensor = 1.0) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            hyper = self._hyper(group)
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    self._begin(p)
                state["step"] += 1
                master = self._master(p)
                gradient = p.grad if grad_scale == 1.0 else p.grad.float() * grad_scale
                self._apply(master, state, gradient, hyper.scalars(int(state["step"])))
                p.copy_(round_to_weight(master, p.dtype))
        return loss

    def _begin(self, p: Tensor) -> None:
        fresh = {key: torch.zeros_like(p, dtype=torch.float32) for key in self.moments}
        self.state[p].update({"step": torch.tensor(0.0), **fresh})


class ReferenceAdamW(Reference, torch.optim.AdamW):
    decoupled = True

    def _hyper(self, group: Mapping[str, Any]) -> Any:
        return AdamWHyper.of_group(group, decoupled=self.decoupled)

    def _apply(self, master: Tensor, state: dict[str, Any], gradient: Tensor, scalars: Any) -> None:
        adamw_step_(master, state["exp_avg"], state["exp_avg_sq"], gradient, scalars)


class ReferenceAdam(Reference, torch.optim.Adam):
    """The decay is part of the gradient, unless a group says otherwise."""

    decoupled = False
    _hyper, _apply = ReferenceAdamW._hyper, ReferenceAdamW._apply  # type: ignore[assignment]


class ReferenceLion(Reference, offload.Lion):
    moments = ("exp_avg",)

    def _hyper(self, group: Mapping[str, Any]) -> Any:
        return LionHyper.of_group(group)

    def _apply(self, master: Tensor, state: dict[str, Any], gradient: Tensor, scalars: Any) -> None:
        lion_step_(master, state["exp_avg"], gradient.float(), scalars)


class ReferenceAdagrad(Reference, torch.optim.Adagrad):
    """States are there from the start, as torch's, and in fp32. Those of a later group too, where torch has none."""

    moments = ("sum",)

    def __init__(self, params: Any, **options: Any) -> None:
        self._is_made = False
        super().__init__(params, **options)
        self._is_made = True
        for group in self.param_groups:
            self.begin(group["params"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if self._is_made:
            self.begin(p for p in self.param_groups[-1]["params"] if p.requires_grad)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        had = list(self.state)
        super().load_state_dict(state_dict)
        self.begin(p for p in had if p not in self.state)  # without a saved one: as the wrapped optimizer does

    def begin(self, parameters: Iterable[Tensor]) -> None:
        """Anew."""
        for p in parameters:
            self.state[p].clear()
            self._begin(p)
            self._master(p)

    def _begin(self, p: Tensor) -> None:
        super()._begin(p)
        self.state[p]["sum"].fill_(self.defaults["initial_accumulator_value"])

    def _hyper(self, group: Mapping[str, Any]) -> Any:
        return AdagradHyper.of_group(group)

    def _apply(self, master: Tensor, state: dict[str, Any], gradient: Tensor, scalars: Any) -> None:
        adagrad_step_(master, state["sum"], gradient, scalars)


class Masters(WithMasters):
    """A class of torch's that steps over the fp32 masters of 16-bit weights."""

    def __init__(self, params: Any, kind: type[torch.optim.Optimizer], **options: Any) -> None:
        params = list(params)
        self._inner = kind(params, **options)
        super().__init__(params, dict(self._inner.defaults))
        self.param_groups = self._inner.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.resync()
        groups = self.param_groups
        masters = {p: nn.Parameter(self._master(p)) for g in groups for p in g["params"] if p.grad is not None}
        for p, master in masters.items():
            master.grad = p.grad.float()
            self._inner.state[master] = {k: v for k, v in self.state[p].items() if k != "master"}
        self._inner.param_groups = [{**g, "params": [masters[p] for p in g["params"] if p in masters]} for g in groups]
        self._inner.step()
        for group, stepped in zip(groups, self._inner.param_groups, strict=True):
            group.update({key: value for key, value in stepped.items() if key != "params"})
        for p, master in masters.items():
            self.state[p].update(self._inner.state.pop(master))
            p.copy_(round_to_weight(master.detach(), p.dtype))
        return loss


# By name: torch's or our class that is wrapped, and its arguments.
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (torch.optim.AdamW, {"lr": 1e-2}),
    "AdamW up": (torch.optim.AdamW, {"lr": 1e-2, "maximize": True, "foreach": True}),
    "AdamW fused": (torch.optim.AdamW, {"lr": 1e-2, "fused": True}),
    "Adam": (torch.optim.Adam, {"lr": 1e-2, "weight_decay": 0.1}),
    "Adam decoupled": (torch.optim.Adam, {"lr": 1e-2, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    "Lion": (offload.Lion, {"lr": 1e-3, "weight_decay": 0.1}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 1e-2}),
    "Adagrad decays": (
        torch.optim.Adagrad,
        {"lr": 1e-2, "lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.5, "maximize": True},
    ),
    "SGD": (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9}),
    "SGD bare": (torch.optim.SGD, {"lr": 1e-2}),
    "SGD fused": (torch.optim.SGD, {"lr": 1e-2, "weight_decay": 0.1, "fused": True}),
    "Nesterov": (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "nesterov": True, "foreach": True}),
    "NAdam": (torch.optim.NAdam, {"lr": 1e-2}),
    "AMSGrad": (torch.optim.AdamW, {"lr": 1e-2, "amsgrad": True}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 1e-2, "momentum": 0.9, "centered": True, "foreach": True}),
    "ASGD": (torch.optim.ASGD, {"lr": 1e-2, "t0": 2.0}),
    "Adafactor": (torch.optim.Adafactor, {"lr": 1e-2}),
}
_REFERENCES: dict[Any, type[Reference]] = {
    torch.optim.AdamW: ReferenceAdamW,
    torch.optim.Adam: ReferenceAdam,
    torch.optim.Adagrad: ReferenceAdagrad,
    offload.Lion: ReferenceLion,
}
if "decoupled_weight_decay" not in inspect.signature(torch.optim.Adam).parameters:  # of newer torch
    del OPTIMIZERS["Adam decoupled"]
# These run as their own classes.
AS_ITSELF = tuple(n for n, (kind, options) in OPTIMIZERS.items() if kind not in _REFERENCES or "amsgrad" in options)


def _tell_autograd(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Of what it wrote, as all other steps do, and the wrapped one of this class: torch's fused kernels do not."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                torch.autograd.graph.increment_version(p)


def plain_optimizer(name: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """What a wrapped one of that name must equal to the bit."""
    kind, options = OPTIMIZERS[name]
    if name not in AS_ITSELF:
        optimizer: torch.optim.Optimizer = _REFERENCES[kind](parameters, **options)
    elif parameters[0].dtype == torch.float32:
        optimizer = kind(parameters, **options)
        if options.get("fused"):
            optimizer.register_step_post_hook(_tell_autograd)
    else:
        optimizer = Masters(parameters, kind, **options)
    # A GradScaler is to unscale gradients itself, not within a fused kernel.
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    return optimizer
