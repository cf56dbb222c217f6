"""The optimizer and the schedule that a config names, with the arguments of their constructors."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from offload import InvalidArgument

from ._check import Report, check, joined, missing
from ._settings import Optimizer, Placement, Scheduler
from ._surface import Key, Section, honoured
from ._surface_training import OPTIMIZERS, REFUSED_OPTIMIZERS, SCHEDULERS

__all__ = ["check_named_placement", "placement_rule", "resolve_optimizer", "resolve_scheduler"]

_NATIVE = {"adam": "Adam", "adamw": "AdamW", "lion": "Lion", "adagrad": "Adagrad"}
_OPTIMIZERS = {section.path.removeprefix("optimizer."): section for section in OPTIMIZERS}
_OPTIMIZERS["AdamW"] = _OPTIMIZERS["Adam"]
_SCHEDULERS = {section.path.removeprefix("scheduler."): section for section in SCHEDULERS}
# What classes that do the same elsewhere have around a name: FusedAdam, DeepSpeedCPUAdam, adamw_torch_fused, AdamW8bit.
_DECORATION = re.compile(r"deepspeed|hybrid|fused|cpu|torch|paged|8bit|32bit|bnb|hf|_")
_TRAINER_FILLS = {key.name: key.trainer for key in _OPTIMIZERS["Adam"].keys}


def resolve_optimizer(section: Mapping[str, Any], report: Report) -> Optimizer | None:
    """The optimizer of the checked section, None where it names none; what is wrong goes into the report."""
    name, params = section["type"], section["params"] or {}
    if name is None:
        if params:
            report.doubts.append("optimizer.params without optimizer.type: no optimizer is made; write the type")
        return None
    if name.lower() in REFUSED_OPTIMIZERS:
        report.errors.append(f"optimizer.type={name!r}: not available. {REFUSED_OPTIMIZERS[name.lower()]}")
        return None
    native = _NATIVE.get(name.lower())
    if native is None:
        arguments = _torch_arguments("optimizer", name, report)
        given = check(arguments, params, report, "optimizer.params") if arguments else {}
        if "betas" in params:
            _check_betas(given, report)
        made = Optimizer(name, _constructor_arguments(given, params))
        _try_out("optimizer", made, report)
        return made
    if native in ("Adam", "AdamW"):
        return _adam(native, params, report)
    values = check(_OPTIMIZERS[native], params, report, "optimizer.params")
    _check_betas(values, report)
    names = [key.name for key in _OPTIMIZERS[native].keys if key.standing == "honoured"]
    return Optimizer(native, _constructor_arguments(values, names))


def check_named_placement(placement: Placement, optimizer: Optimizer | None, report: Report) -> None:
    """An error for an optimizer named in the config that cannot train where the config puts things."""
    if optimizer is None:
        return
    amsgrad = bool(optimizer.params.get("amsgrad"))
    if optimizer.name not in _NATIVE.values() or amsgrad:
        reason = placement_rule(placement, optimizer.name + (" with amsgrad" if amsgrad else ""))
        if reason is not None:
            report.errors.append(reason)


def placement_rule(placement: Placement, name: str) -> str | None:
    """Why an optimizer that steps by its own code cannot train so, and what to write; None where it can."""
    ratio = placement.optimizer_ratio
    zero, native = "zero_optimization", "Adam, AdamW, Lion or Adagrad (without amsgrad)"
    if placement.optimizer == "host" and 0.0 < ratio < 1.0:
        return (
            f"{zero}.offload_optimizer.ratio={ratio:g}: {name} steps over all of its parameters in one place: "
            f"write 0 or 1, or take {native}, which take any share"
        )
    for kind, place in (("offload_optimizer", placement.optimizer), ("offload_param", placement.params)):
        if place == "disk":
            return (
                f"{zero}.{kind}.device='nvme': {name} steps over tensors in memory: write 'cpu' in offload_optimizer "
                f"and offload_param, or take {native}"
            )
    if placement.params == "host" and (placement.optimizer == "device" or ratio == 0.0):
        return (
            f"{zero}.offload_param.device='cpu': {name} steps over all weights at once, and none would be there: write "
            f"offload_optimizer: {{'device': 'cpu'}} too, or take {native}"
        )
    return None


def _adam(name: str, params: Mapping[str, Any], report: Report) -> Optimizer:
    section = _OPTIMIZERS[name]
    torch_adam = str(params.get("torch_adam")).lower() in ("true", "1")
    if torch_adam:
        # Torch's own arguments are legal too; those that both have keep their types and ranges.
        own = _torch_arguments("optimizer", name, report)
        assert own is not None
        more = tuple(key for key in own.keys if section.find(key.name) is None)
        section = Section(section.path, section.text, (*section.keys, *more), arguments=True)
    values = check(section, params, report, "optimizer.params")
    _check_betas(values, report)
    decoupled = name == "AdamW" or values["adam_w_mode"]
    if name == "Adam" and decoupled and values["weight_decay"] and "adam_w_mode" not in params:
        report.notices.append(
            "optimizer.type='Adam' decays weights as AdamW does, here as in DeepSpeed; write adam_w_mode: false for "
            "Adam's own way"
        )
    switches = ("torch_adam", "adam_w_mode", "bias_correction", "fp32_optimizer_states", "max_grad_norm")
    if torch_adam or values["amsgrad"]:
        # What is not given has torch's defaults with torch_adam (AdamW: weight_decay 0.01), and DeepSpeed's without.
        names = [key.name for key in section.keys if key.name in params or not torch_adam]
    else:
        names = ["lr", "betas", "eps", "weight_decay"]
    kept = [name for name in names if name not in switches]
    made = Optimizer(name, _constructor_arguments(values, kept), torch_adam or values["amsgrad"], decoupled)
    if torch_adam:
        _try_out("optimizer", made, report)
    return made


def resolve_scheduler(section: Mapping[str, Any], report: Report) -> Scheduler | None:
    """The schedule of the checked section, None where it names none; what is wrong goes into the report."""
    name, params = section["type"], section["params"] or {}
    if name is None:
        if params:
            report.doubts.append("scheduler.params without scheduler.type: no schedule is made; write the type")
        return None
    own = _SCHEDULERS.get(name)
    if own is None:
        arguments = _torch_arguments("scheduler", name, report)
        given = check(arguments, params, report, "scheduler.params") if arguments else {}
        made = Scheduler(name, _constructor_arguments(given, params))
        _try_out("scheduler", made, report)
        return made
    values = check(own, params, report, "scheduler.params")
    for key in missing(own, params, report, "scheduler.params"):
        report.errors.append(f"scheduler.params.{key} is missing: {name} needs it")
    if values.get("warmup_type", "log") not in ("log", "linear"):
        report.doubts.append(
            f"scheduler.params.warmup_type={values['warmup_type']!r}: must be 'log' or 'linear'; 'log' is used, as "
            "DeepSpeed does"
        )
        values["warmup_type"] = "log"
    lists = {key: len(value) for key, value in values.items() if isinstance(value, list)}
    if len(set(lists.values())) > 1 or 0 in lists.values():
        told = ", ".join(f"{key} has {count} values" for key, count in lists.items())
        report.errors.append(f"scheduler.params: {told}: write one number, or a list with one for each parameter group")
    return Scheduler(name, _constructor_arguments(values, values))


def _constructor_arguments(values: Mapping[str, Any], names: Any) -> Mapping[str, Any]:
    return MappingProxyType(
        {name: tuple(values[name]) if name == "betas" else values[name] for name in names if name in values}
    )


def _check_betas(values: dict[str, Any], report: Report) -> None:
    if "betas" not in values:
        return
    betas = values["betas"]
    try:
        first, second = (float(beta) for beta in betas)
        legal = 0.0 <= first < 1.0 and 0.0 <= second < 1.0
    except (TypeError, ValueError):
        legal = False
    if legal:
        values["betas"] = [first, second]
    else:
        values["betas"] = ()
        report.errors.append(f"optimizer.params.betas={betas!r}: must be two numbers, 0 or more and less than 1")


def _torch_arguments(kind: str, name: str, report: Report) -> Section | None:
    """The arguments of torch's class of this name, as a section; None, and an error, where torch has none."""
    import torch

    home: Any = torch.optim if kind == "optimizer" else torch.optim.lr_scheduler
    base = torch.optim.Optimizer if kind == "optimizer" else torch.optim.lr_scheduler.LRScheduler
    found = getattr(home, name, None)
    if not (isinstance(found, type) and issubclass(found, base)) or found is base:
        own = _OPTIMIZERS if kind == "optimizer" else _SCHEDULERS
        torchs = [other for other in dir(home) if isinstance(getattr(home, other), type) and other[0].isupper()]
        spelt = {other.lower(): other for other in (*torchs, *own)}
        plain = _DECORATION.sub("", name.lower())
        near = [plain] if plain in spelt else difflib.get_close_matches(name.lower(), spelt, n=1)
        hint = f"did you mean {spelt[near[0]]!r}?" if near else f"write one of {', '.join(own)}"
        module = "torch.optim" if kind == "optimizer" else "torch.optim.lr_scheduler"
        report.errors.append(f"{joined(kind, 'type')}={name!r}: no class of {module}, nor of DeepSpeed's: {hint}")
        return None
    text = f"Argument of torch's {name}."
    # The first is what the class works on: the parameters, or the optimizer.
    arguments = list(inspect.signature(found).parameters)[1:]
    keys: tuple[Key, ...] = tuple(
        honoured(argument, "any", None, text, trainer=_TRAINER_FILLS.get(argument)) for argument in arguments
    )
    return Section(f"{kind}.{name}", "", keys, arguments=True)


def _try_out(kind: str, named: Optimizer | Scheduler, report: Report) -> None:
    """An error for what torch's class refuses: it is made once, of a parameter that nobody trains."""
    if any(path.startswith(kind) for path in report.unfilled) or any(path.startswith(kind) for path in report.errors):
        return
    from ._optimizers import try_out

    try:
        try_out(named)
    except InvalidArgument as error:
        report.errors.append(str(error))
