"""Reading and editing a gradient that is on the host: whatever torch shows or keeps, a held gradient does too."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from grad_store import HostStore, as_the_optimizer_reads, cell_of, same_bits
from offload._errors import StateError
from offload._grad_cell import Owner
from offload._host_grad import HostGrad, hold

SHAPE = (6, 5)


def held_parameter(value: Tensor, *, delayed: bool = True) -> tuple[nn.Parameter, HostStore]:
    """A parameter whose gradient is `value`, held."""
    parameter = nn.Parameter(torch.zeros_like(value))
    parameter.grad = value.clone()
    store = HostStore(delayed=delayed)
    cell = hold(parameter, "weight", store)
    assert cell is not None and cell.owner is Owner.HOST
    return parameter, store


def some(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(5)).to(dtype)


def edit_view(p: nn.Parameter) -> None:
    assert p.grad is not None
    p.grad.view(-1)[3] *= 2


def edit_kept_view(p: nn.Parameter) -> None:
    assert p.grad is not None
    row = p.grad[2]
    p.grad.mul_(3)
    row.add_(1)
    p.grad.mul_(0.7)
    row.copy_(row + p.grad[0])


def edit_data(p: nn.Parameter) -> None:
    assert p.grad is not None
    p.grad.data.mul_(0.1)
    p.grad.data[1] = 4
    p.grad.detach().neg_()


def edit_numpy(p: nn.Parameter) -> None:
    assert p.grad is not None
    array = p.grad.numpy()
    p.grad.add_(1)
    array[0, 0] = array[1, 1] * 2


def edit_masked(p: nn.Parameter) -> None:
    assert p.grad is not None
    p.grad[p.grad > 0] = -1
    p.grad[torch.tensor([1, 2]), 0] = 5


def edit_out(p: nn.Parameter) -> None:
    assert p.grad is not None
    torch.add(p.grad, 1, out=p.grad)
    torch.mul(torch.ones(SHAPE), 3, out=p.grad.T.t())


def edit_dlpack(p: nn.Parameter) -> None:
    assert p.grad is not None
    torch.from_dlpack(p.grad)[1].zero_()


def edit_split(p: nn.Parameter) -> None:
    assert p.grad is not None
    for index, piece in enumerate(torch.unsafe_split(p.grad, 2)):
        piece.mul_(index + 2)
    for row in p.grad:
        row.div_(3)


def edit_address(p: nn.Parameter) -> None:
    assert p.grad is not None
    address = p.grad.data_ptr()
    p.grad.mul_(2)
    assert address == p.grad.data_ptr()
    array = (np.ctypeslib.ctypes.c_float * p.grad.numel()).from_address(address)
    array[7] = 1.5


EDITS: list[Callable[[nn.Parameter], object]] = [
    edit_view,
    edit_kept_view,
    edit_data,
    edit_numpy,
    edit_masked,
    edit_out,
    edit_dlpack,
    edit_split,
    edit_address,
    lambda p: p.grad.__setitem__(0, 1),
    lambda p: p.grad.copy_(torch.arange(5)),
    lambda p: p.grad.copy_(p.grad.flip(0)),
    lambda p: p.grad.copy_(p.grad),
    lambda p: p.grad.fill_(2).add_(p.grad, alpha=0.3),
    lambda p: p.grad.clamp_(-0.5, 0.5),
    lambda p: p.grad.addcmul_(p.grad, p.grad),
    lambda p: p.grad.zero_().mul_(-1),
    lambda p: p.grad.nan_to_num_(0.0),
    lambda p: torch._foreach_add_([p.grad, torch.ones(SHAPE)], [torch.ones(SHAPE), p.grad]),
    lambda p: torch._foreach_mul_([p.grad, torch.ones(3)], 0.3),
    lambda p: torch._foreach_lerp_([p.grad], [torch.ones(SHAPE)], 0.25),
    lambda p: setattr(p.grad, "data", torch.ones(SHAPE)),
    lambda p: torch._foreach_mul_([p.grad], [0.3]),
    lambda p: p.grad.mul_(torch.tensor([1.0, 2, 3, 4, 5])),
    lambda p: p.grad.div_(3, rounding_mode="floor"),
    lambda p: p.grad.share_memory_().mul_(2),
]


@pytest.mark.parametrize("index", range(len(EDITS)))
@pytest.mark.parametrize("delayed", [False, True])
def test_edits_write_back(index: int, delayed: bool) -> None:
    plain = nn.Parameter(torch.zeros(SHAPE))
    plain.grad = some()
    parameter, _ = held_parameter(some(), delayed=delayed)
    for p in (plain, parameter):
        EDITS[index](p)
    assert type(plain.grad) is Tensor and isinstance(parameter.grad, HostGrad)
    assert same_bits(plain.grad, parameter.grad)
    step = cell_of(parameter.grad).for_step()
    assert same_bits(plain.grad, as_the_optimizer_reads(step, parameter.shape))
    if EDITS[index] is not edit_address and index != len(EDITS) - 1:  # a raw address keeps it on the device for good
        assert cell_of(parameter.grad).owner is Owner.HOST


READS: list[Callable[[Tensor], Any]] = [
    lambda g: g + 1,
    lambda g: g.norm(),
    lambda g: g.norm(dim=0),
    lambda g: torch.linalg.vector_norm(g, 2, dtype=torch.float64),
    lambda g: torch.linalg.vector_norm(g, 3, dim=(0, 1), keepdim=True),
    lambda g: g.double().sum(),
    lambda g: g @ g.T,
    lambda g: torch.stack([g, g]),
    lambda g: g.clone(),
    lambda g: g.cpu().to(torch.bfloat16),
    lambda g: g.isfinite().all(),
    lambda g: torch.cat(g.split(2)),
    lambda g: torch.tensor(g.tolist()),
    lambda g: torch.tensor(np.asarray(g)),
    lambda g: torch.from_dlpack(g).clone(),
    lambda g: torch.tensor(g[0, 0].item()),
    lambda g: g.new_zeros(3),
    lambda g: torch.zeros_like(g),
    lambda g: torch.empty(SHAPE).copy_(g),
    lambda g: torch._foreach_mul([g, g], 0.5)[1],
    lambda g: torch._foreach_pow(2.0, [g, g])[1],
    lambda g: torch._foreach_norm([g, torch.ones(3)], 2.0)[0],
    lambda g: torch._foreach_norm([g, torch.ones(3, dtype=torch.float64)], 1)[0],
    lambda g: torch.frombuffer(bytearray(bytes(g.untyped_storage())), dtype=torch.float32),
    lambda g: copy.deepcopy(g),
    lambda g: pickle.loads(pickle.dumps(g)),
]


@pytest.mark.parametrize("index", range(len(READS)))
@pytest.mark.parametrize("scaled", [False, True])
def test_reads(index: int, scaled: bool) -> None:
    parameter, store = held_parameter(some())
    gradient, plain = parameter.grad, some()
    assert gradient is not None
    if scaled:
        gradient.mul_(1 / 3)
        plain.mul_(1 / 3)
    count = store.to_host_count
    for _ in range(2):
        expected, actual = READS[index](plain), READS[index](gradient)
        assert type(actual) is Tensor
        assert same_bits(expected, actual)
        del actual
    cell = cell_of(gradient)
    if cell.owner is Owner.DEVICE:  # something reached the memory: the next use finds that nothing does any more
        gradient.sum()
    elif store.to_host_count == count:
        assert cell.owner is Owner.HOST
    assert cell.owner is Owner.HOST
    assert same_bits(plain, gradient)


def test_repr_save_and_deepcopy_give_plain_tensors() -> None:
    parameter, _ = held_parameter(some())
    gradient = parameter.grad
    assert gradient is not None
    assert repr(gradient) == repr(some()) and f"{gradient}" == f"{some()}"
    file = io.BytesIO()
    torch.save({"gradient": gradient, "again": gradient}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert type(loaded["gradient"]) is Tensor
    assert same_bits(loaded["gradient"], some()) and same_bits(loaded["again"], some())
    both = copy.deepcopy([gradient, gradient])
    assert both[0] is both[1] and type(both[0]) is Tensor
    assert cell_of(gradient).owner is Owner.HOST


def test_a_kept_gradient_keeps_its_value() -> None:
    parameter, store = held_parameter(some())
    kept = parameter.grad
    parameter.grad = None
    parameter.grad = torch.ones(SHAPE)
    hold(parameter, "weight", store)
    assert kept is not None and same_bits(kept, some())
    assert parameter.grad is not None and same_bits(parameter.grad, torch.ones(SHAPE))


def test_bytes_given_to_a_step_never_change() -> None:
    parameter, store = held_parameter(some())
    gradient = parameter.grad
    assert gradient is not None
    steps = [cell_of(gradient).for_step()]
    gradient.mul_(2)
    steps.append(cell_of(gradient).for_step())
    view = gradient[0]
    steps.append(cell_of(gradient).for_step())  # of an owner that a view reaches
    assert cell_of(gradient).owner is Owner.DEVICE
    view.fill_(3)
    gradient.zero_()
    steps.append(cell_of(gradient).for_step())
    gradient.copy_(torch.ones(SHAPE))
    store.land()
    expected = [some(), some() * 2, some() * 2, torch.zeros(SHAPE)]
    for step, value in zip(steps, expected, strict=True):
        assert same_bits(as_the_optimizer_reads(step, gradient.shape), value)


def test_the_device_copy_departs_when_the_last_alias_is_gone() -> None:
    parameter, _ = held_parameter(some())
    gradient = parameter.grad
    assert gradient is not None
    cell = cell_of(gradient)
    view = gradient.view(-1)
    gradient.add_(1)
    assert cell.owner is Owner.DEVICE and same_bits(view, gradient.flatten())
    view.mul_(2)
    expected = view.clone()
    del view
    cell.settle()
    assert cell.owner is Owner.HOST and same_bits(gradient.flatten(), expected)


def test_a_refused_departure_loses_nothing() -> None:
    parameter = nn.Parameter(torch.zeros(SHAPE))
    parameter.grad = some()
    store = HostStore()
    store.refuse = True
    with pytest.raises(MemoryError):
        hold(parameter, "weight", store)
    assert same_bits(cell_of(parameter.grad)._copy, some())
    store.refuse = False
    assert hold(parameter, "weight", store).owner is Owner.HOST
    assert same_bits(parameter.grad, some())
    other = nn.Parameter(torch.zeros(3))
    other.grad = torch.ones(3)
    hold(other, "other", store)
    store.refuse = True
    with pytest.raises(MemoryError):
        torch._foreach_add_([parameter.grad, other.grad], [torch.ones(SHAPE), torch.ones(3, dtype=torch.float64)])
    store.refuse = False
    assert same_bits(parameter.grad, some() + 1)
    assert other.grad.tolist() == [2.0] * 3


def test_a_failing_operation_leaves_the_gradient_as_it_was() -> None:
    parameter, _ = held_parameter(some())
    with pytest.raises(RuntimeError):
        parameter.grad.add_(torch.ones(7))
    with pytest.raises(RuntimeError):
        parameter.grad.copy_(torch.ones(7))
    assert same_bits(parameter.grad, some())


def test_changing_the_shape_in_place_is_refused() -> None:
    parameter, _ = held_parameter(some())
    for change in (lambda g: g.t_(), lambda g: g.resize_(3), lambda g: g.unsqueeze_(0)):
        with pytest.raises(StateError, match="assign a new tensor"):
            change(parameter.grad)
    with pytest.raises(StateError, match="'weight'"):
        parameter.grad.data = torch.ones(3)
    assert same_bits(parameter.grad, some())


def test_reading_under_inference_mode_leaves_a_gradient_that_can_be_edited() -> None:
    parameter, _ = held_parameter(some())
    with torch.inference_mode():
        norm = nn.utils.clip_grad_norm_([parameter], 0.1)
        parameter.grad.add_(1)
        view = parameter.grad[0]
    parameter.grad.mul_(2)
    parameter.grad.add_(1)
    del view
    plain = nn.Parameter(torch.zeros(SHAPE))
    plain.grad = some()
    assert same_bits(nn.utils.clip_grad_norm_([plain], 0.1), norm)
    assert same_bits(plain.grad.add_(1).mul_(2).add_(1), parameter.grad)


def test_a_foreign_operator_may_edit_what_it_calls_constant() -> None:
    with torch.library._scoped_library("offload_test", "FRAGMENT") as library:
        library.define("sneaky(Tensor x) -> ()")
        library.impl("sneaky", lambda x: x.numpy().__imul__(2) and None, "CPU")
        parameter, _ = held_parameter(torch.ones(1))
        torch.ops.offload_test.sneaky(parameter.grad)
        assert cell_of(parameter.grad).owner is Owner.DEVICE
        assert parameter.grad.tolist() == [2.0]
        assert as_the_optimizer_reads(cell_of(parameter.grad).for_step(), parameter.shape).tolist() == [2.0]
