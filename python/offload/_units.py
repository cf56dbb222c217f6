"""Finds the units of a model: the sets of parameters that travel together.

A unit is a block (an element of a repeated ModuleList or Sequential) or, outside the blocks, a largest
subtree without blocks. Parameters held by modules that contain blocks go to one root unit.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn

from ._errors import InvalidArgument

__all__ = ["ROOT_NAME", "Unit", "UnitChoice", "check_module", "find_units", "is_dense"]

# Module classes and qualified names, or a predicate over modules.
UnitChoice = Sequence[type | str] | Callable[[nn.Module], bool]

# No module can have this name: it cannot be written as an attribute path.
ROOT_NAME = "(root)"
# A block is repeated: its list holds at least this many elements of its class with parameters.
_MIN_REPEATS = 2


@dataclasses.dataclass(frozen=True, eq=False)
class Unit:
    """Parameters that become ready together, before the forward of any of `modules`.

    name: the module's qualified name, or ROOT_NAME. parameters: (canonical name, parameter), each once;
    the canonical name is the first that `model.named_parameters()` gives, so that a tied parameter has
    one name in every unit that holds it.
    """

    name: str
    modules: tuple[nn.Module, ...]
    parameters: tuple[tuple[str, nn.Parameter], ...]
    is_root: bool


def check_module(model: object) -> None:
    """Raises `InvalidArgument` for what is no module, such as arguments in another order."""
    if not isinstance(model, nn.Module):
        raise InvalidArgument(f"model is a {type(model).__name__}: give a torch.nn.Module")


def find_units(model: nn.Module, choice: UnitChoice | None = None) -> list[Unit]:
    """The units of `model` in registration order, the root unit first where there is one.

    Blocks are the outermost modules of `choice`, or, for None, those that are repeated. Raises `InvalidArgument` for
    an entry of `choice` that no module with parameters and a forward fits.

    Every parameter belongs to at least one unit, a tied one to every unit that holds it. A unit's module
    has a forward of its own (the root may not); modules without one, such as ModuleList or ParameterDict,
    are never units, their parts are. A module that is registered twice is one unit.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    block_ids = {id(block) for block in (_blocks(model) if choice is None else _chosen(model, choice))}
    ancestor_ids = {id(module) for module in model.modules() if _contains(module, block_ids)}

    tops: list[tuple[str, nn.Module]] = []
    between: list[nn.Parameter] = []
    seen: set[int] = set()

    def visit(name: str, module: nn.Module) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        if not _holds_parameters(module):
            return
        if id(module) in block_ids or (id(module) not in ancestor_ids and _has_forward(module)):
            tops.append((name, module))
            return
        between.extend(module.parameters(recurse=False))
        for child_name, child in module.named_children():
            visit(f"{name}.{child_name}" if name else child_name, child)

    visit("", model)
    units = [
        _unit(name or ROOT_NAME, module, module.parameters(), names, is_root=module is model) for name, module in tops
    ]
    if between:
        units.insert(0, _unit(ROOT_NAME, model, iter(between), names, is_root=True))
    return units


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, each once, in some order of the dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _unit(
    name: str, module: nn.Module, parameters: Iterator[nn.Parameter], names: dict[int, str], *, is_root: bool
) -> Unit:
    unique = {id(parameter): parameter for parameter in parameters}
    return Unit(name, (module,), tuple((names[key], value) for key, value in unique.items()), is_root)


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Outermost elements of repeated lists; what is inside a block stays inside it."""
    repeated = _repeated_elements(model)
    for child in model.children():
        if id(child) in repeated and _has_forward(child):
            yield child
        else:
            yield from _blocks(child)


def _chosen(model: nn.Module, choice: UnitChoice) -> list[nn.Module]:
    able = [
        (name, module) for name, module in model.named_modules() if _holds_parameters(module) and _has_forward(module)
    ]
    if callable(choice):
        chosen = {id(module) for _, module in able if choice(module)}
        if not chosen:
            raise InvalidArgument(f"units={choice!r} chooses no module of this {type(model).__name__} with parameters")
    else:
        chosen = set()
        for entry in choice:
            fits = {id(m) for name, m in able if (name == entry if isinstance(entry, str) else isinstance(m, entry))}
            if not fits:
                raise InvalidArgument(
                    f"units: {entry!r} is no module of this {type(model).__name__} with parameters and a forward; give "
                    "classes or names as model.named_modules() has them"
                )
            chosen |= fits
    inner = {id(m) for _, outer in able if id(outer) in chosen for m in outer.modules() if m is not outer}
    return [module for _, module in able if id(module) in chosen - inner]


def _repeated_elements(module: nn.Module) -> set[int]:
    if not isinstance(module, (nn.ModuleList, nn.Sequential)):
        return set()
    # children() gives a module that is registered twice only once: the same layer reused is no repetition.
    elements = [child for child in module.children() if _holds_parameters(child)]
    counts = collections.Counter(type(element) for element in elements)
    return {id(element) for element in elements if counts[type(element)] >= _MIN_REPEATS}


def _contains(module: nn.Module, block_ids: set[int]) -> bool:
    return any(id(inner) in block_ids for inner in module.modules() if inner is not module)


def _has_forward(module: nn.Module) -> bool:
    """Whether the module can be called: ModuleList and its kin inherit the forward that raises."""
    return type(module).forward is not nn.Module.forward or "forward" in vars(module)


def _holds_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None
