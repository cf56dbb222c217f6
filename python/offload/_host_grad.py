"""Holding gradients: puts a HostGrad in place of `p.grad` as backward finishes it, and sends the bytes to the host."""

from __future__ import annotations

import threading
import weakref

import torch
from torch import Tensor

from . import _trace
from ._errors import InvalidArgument, StateError
from ._grad_cell import GradCell, GradStore, Owner, StepGradient
from ._grad_face import HostGrad, face_of, total_norm
from ._grad_factors import HostBytes
from ._uncompiled import not_compiled
from ._units import is_dense

__all__ = ["GradCell", "GradStore", "HostBytes", "HostGrad", "StepGradient", "hold", "total_norm"]

# Once, as it is for every gradient: see _grad_cell.
_DEVICE = Owner.DEVICE
_STRIDED = torch.strided
_graph_task = torch._C._current_graph_task_id
_is_inference = torch.is_inference_mode_enabled


def hold(parameter: Tensor, name: str, store: GradStore) -> GradCell | None:
    """Puts a HostGrad in place of `parameter.grad` and sends the bytes off; for post-accumulate-grad hooks.

    Returns the cell; None where the gradient stays as it is: none, no plain strided tensor, empty, overlapping, with
    history (`create_graph`), or part of larger memory (flat buffers, DDP buckets). A gradient that a hook of the user
    keeps a reference to stays its owner until that is dropped and the cell is next used.

    Raises InvalidArgument for a sparse or complex gradient, StateError when another thread's backward pass is writing
    the same gradient; both name the parameter.
    """
    gradient = parameter.grad
    if type(gradient) is HostGrad:  # the classes of tensors make isinstance() slow
        cell = gradient.cell
        del gradient
        _settle_in_backward(cell)
        return cell
    if gradient is None or not _can_hold(gradient, name):
        return None
    cell = GradCell(name, gradient, store)
    if _is_inference():
        with torch.inference_mode(False):  # an inference tensor could not be edited outside that mode
            parameter.grad = face_of(cell)
    else:
        parameter.grad = face_of(cell)
    del gradient  # the cell is to be the only one that refers to it
    _settle_in_backward(cell)
    return cell


def _can_hold(gradient: Tensor, name: str) -> bool:
    if gradient.layout is not _STRIDED:
        if "sparse" not in str(gradient.layout):
            return False
        raise InvalidArgument(
            f"the gradient of {name!r} is sparse ({gradient.layout}): offload needs dense gradients; build the "
            f"embedding with sparse=False, or leave this parameter on the device"
        )
    if gradient.dtype.is_complex:
        raise InvalidArgument(
            f"the gradient of {name!r} is complex ({gradient.dtype}): offload needs real parameters; leave this "
            f"parameter on the device, or hold its real and imaginary parts"
        )
    if type(gradient) is not Tensor:
        return False
    nbytes = gradient.nbytes
    if nbytes == 0 or gradient.requires_grad or gradient._is_view() or gradient.is_neg():
        return False
    # Else others live in the rest of that memory.
    return gradient.untyped_storage().nbytes() == nbytes and (gradient.is_contiguous() or is_dense(gradient))


class _BackwardPass:
    """One backward pass on one thread. Autograd keeps it among the pass's callbacks: it dies with the pass."""

    __slots__ = ("__weakref__", "task", "thread", "unit", "unsettled")

    def __init__(self, task: int) -> None:
        self.task = task
        self.thread = threading.get_ident()
        self.unsettled: GradCell | None = None
        self.unit = ""  # that made it, for traces

    @not_compiled
    def __call__(self) -> None:
        """Called at the end of the pass."""
        self.settle_previous()

    def settle_previous(self) -> None:
        """Older torch itself still refers to a gradient while its hooks run: what could not depart then does now."""
        if self.unsettled is not None:
            cell, self.unsettled = self.unsettled, None
            with _trace.naming(lambda: self.unit, "gradients"):
                cell.settle()


_local = threading.local()


def _settle_in_backward(cell: GradCell) -> None:
    """Settles a cell that this thread's backward pass has written to.

    Refuses two passes at once: autograd runs these hooks outside the lock of its accumulation. Passes within one
    another (reentrant checkpointing) run on one thread, and an accelerator's passes all run on its own thread: neither
    is concurrent.
    """
    task = _graph_task()
    if task == -1:
        cell.settle()
        return
    reference = getattr(_local, "backward_pass", None)
    current = None if reference is None else reference()
    if current is None or current.task != task:
        current = _BackwardPass(task)
        torch.autograd.Variable._execution_engine.queue_callback(current)
        _local.backward_pass = reference = weakref.ref(current)
    writer = None if cell.writer is None else cell.writer()
    if writer is not None and writer.thread != current.thread:
        raise StateError(
            f"two backward passes at once write the gradient of {cell.name!r}, and autograd can lose one of them: run "
            f"them one after the other, or clear the gradients and use a copy of the model for each thread"
        )
    cell.writer = reference
    if current.unsettled is not None:
        current.settle_previous()
    cell.settle()
    if cell.owner is _DEVICE:
        current.unit = _trace.current_name()
        current.unsettled = cell
