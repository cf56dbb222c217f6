"""Where activations leave: `offload_activations` around any code, and the forward of a wrapped model."""

from __future__ import annotations

import itertools
import sys
import threading
import weakref
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from ._activation_format import open_format
from ._activation_order import DEFAULT_KEEP
from ._activations import Activations
from ._config import ActivationForm, Config, check_activation_form, format_size, parse_size
from ._copy_lanes import open_lanes
from ._engine import open_device
from ._errors import InvalidArgument
from ._interrupts import Uninterrupted
from ._probe import named_device, probe_host
from ._weight_casts import WeightCasts

__all__ = ["ActivationRegion", "ModelRegion", "offload_activations"]

# Of the available host memory, where no budget is given: the rest is for everyone else.
_HOST_SHARE = 0.9

# From torch 2.8.
_innermost_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def offload_activations(
    device: str | torch.device | None = None,
    *,
    budget: int | str | None = None,
    keep: int | float | str | None = None,
    min_bytes: int | str | None = None,
    format: ActivationForm = "exact",
) -> ActivationRegion:
    """What autograd saves inside the context leaves the device and is back when backward needs it, with the same bits
    unless a lossy format is asked for.

        region = offload.offload_activations()
        for batch in data:
            with region:
                loss = model(batch)
            loss.backward()

    Backward may run inside or after the context, several times, in part or never. Use one region for all steps: it
    owns the host memory, and remembers the order of backward. Parameters, and views of them, stay where they are.

    Args:
        device: where activations are, `"cpu"` or a CUDA device; None takes the current one. Others are left alone.
        budget: host memory to use (`"8GiB"` or bytes); what does not fit stays on the device. None measures.
        keep: what may stay on the device of what is saved, the most recent: bytes (`"1GiB"`, an int) or a share (a
            float, 0.0 to 1.0); as much is brought back ahead of backward. None is an eighth.
        min_bytes: smaller tensors stay on the device; None is 64 KiB.
        format: `"int8"` or `"fp8"` for a byte an element, and a scale for every 256, on the way and on the host. Lossy:
            the gradients differ. Only fp32, bf16 and fp16 tensors that gradients flow through are rounded, and not what
            stays on the device. What torch.compile's code saves is exact: autograd sees no gradient of it. A small
            number beside a large one may come back as zero: an operation whose backward divides by what it saved is
            better kept outside.

    Raises:
        InvalidArgument: an argument that is not legal. DeviceError: the device does not answer.
    """
    place = named_device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
    if isinstance(keep, float) and not 0.0 <= keep <= 1.0:
        raise InvalidArgument(f"keep={keep}: a share is between 0.0 and 1.0; give bytes as an int or text")
    kept = DEFAULT_KEEP if keep is None else keep if isinstance(keep, float) else _size("keep", keep)
    host = int(probe_host().available_bytes * _HOST_SHARE) if budget is None else _size("budget", budget)
    smallest = None if min_bytes is None else _size("min_bytes", min_bytes)
    check_activation_form("format", format)
    settings = Config()
    lanes = open_lanes(
        place, open_device(place), budget=host, pin=settings.pins_on(place.type), poison=settings.poison_enabled
    )
    return ActivationRegion(
        Activations(
            lanes,
            place,
            budget=host,
            keep=kept,
            min_bytes=smallest,
            form=open_format(format, place),
            poison=settings.poison_enabled,
        )
    )


class ActivationRegion:
    """The context that `offload_activations` returns; may be entered many times, also within itself.

    What was saved inside keeps the host memory and the lanes alive until the graph is gone.
    """

    def __init__(self, activations: Activations) -> None:
        self._activations = activations
        self._hooks = saved_tensors_hooks(activations.pack, activations.unpack)

    def __enter__(self) -> ActivationRegion:
        self._activations.begin()
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def stats(self) -> dict[str, int]:
        """Of the latest forward: bytes that could leave, that left, what these were on their way (`sent_bytes`), and
        what the host budget kept on the device."""
        return self._activations.stats()

    def fallbacks(self) -> list[str]:
        """Every slower path that is taken, one sentence each."""
        return self._activations.fallbacks()

    def __repr__(self) -> str:
        return f"<ActivationRegion: {format_size(self.stats()['offloaded_bytes'])} off the device>"


class ModelRegion:
    """The context around the forward of a wrapped model, where activations leave and casts of streamed weights are
    packed: the model's hooks enter and leave it.

    torch calls the hook that leaves after an `Exception`, but not after Ctrl-C: the next forward of any wrapped model
    leaves it then, or `unwrap`. Until that, what other code saves in this thread goes the same way, and comes back the
    same.
    """

    def __init__(self, model: nn.Module, activations: Activations | None, casts: WeightCasts) -> None:
        self._model = weakref.ref(model)
        self._activations = activations
        self._casts = casts
        self._hooks = saved_tensors_hooks(casts.pack, casts.unpack)

    def enter(self) -> None:
        model = self._model()
        assert model is not None
        if in_torch_func():  # it takes no hooks on what it saves: that stays
            self._casts.refuse_wrapped_by_torch_func(model.parameters())
            return
        _leave_interrupted(entering=self)
        if self._activations is not None:
            self._activations.begin(itertools.chain(model.parameters(), model.buffers()))
        elif not self._casts.expected() and self not in _entered():  # of nested calls all enter, as all leave
            return
        with Uninterrupted():
            self._hooks.__enter__()
            _entered().append(self)

    def leave(self) -> None:
        entered = _entered()
        if self not in entered:
            return
        while entered[-1] is not self:  # of a model within this one
            _leave_innermost()
        _leave_innermost()

    def remove(self) -> None:
        """What was interrupted in this thread is left, unless hooks of the user's are around."""
        _leave_interrupted()

    def _is_over(self, entering: bool) -> bool:
        model = self._model()
        # The model may call itself; the hook that enters is called in the call that it is for.
        running = 0 if model is None else _running_forwards(model) - entering
        return _entered().count(self) > max(0, running)

    def _is_innermost(self) -> bool:
        if _innermost_hooks is None:
            return self._is_asked()
        hooks = _innermost_hooks(False)
        return hooks is not None and hooks[0] is self._hooks.pack_hook

    def _is_asked(self) -> bool:
        """Has autograd save a tensor, to see whether it asks our hooks: before torch 2.8 nothing else tells."""
        before = self._casts.asked_count
        with torch.inference_mode(False), torch.enable_grad():
            torch.ones((), device="cpu", requires_grad=True).exp()
        return self._casts.asked_count != before


class _Thread(threading.local):
    """As torch keeps its hooks: the regions that this thread is in, the innermost last."""

    def __init__(self) -> None:
        self.entered: list[ModelRegion] = []


_thread = _Thread()


def _entered() -> list[ModelRegion]:
    return _thread.entered


def _leave_innermost() -> None:
    with Uninterrupted():
        _entered().pop()._hooks.__exit__()


def _leave_interrupted(entering: ModelRegion | None = None) -> None:
    """Leaves regions whose forward was ended by Ctrl-C, as far as they are innermost."""
    entered = _entered()
    while entered and entered[-1]._is_over(entered[-1] is entering) and entered[-1]._is_innermost():
        _leave_innermost()


def in_torch_func() -> bool:
    """Whether this is run by torch.func.grad, vjp, vmap or their kin, whose tensors have no memory of their own."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _running_forwards(model: nn.Module) -> int:
    """How many calls of `model` this thread is in."""
    count = 0
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals.get("self") is model:
            count += 1
        frame = frame.f_back
    return count


def _size(name: str, value: int | float | str) -> int:
    if isinstance(value, float):
        raise InvalidArgument(f"{name}={value}: give bytes as an int, or text such as '8GiB'")
    try:
        return parse_size(value)
    except InvalidArgument as error:
        raise InvalidArgument(f"{name}: {error}") from None
