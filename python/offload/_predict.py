"""`estimate` and `predict`: a model in, what training it would take and how long out. Nothing is moved or allocated."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from ._config import Config
from ._errors import InvalidArgument
from ._hardware import DISK_READ, DISK_WRITE, Hardware
from ._model_sizes import parameter_sizes, token_costs
from ._native_state import AdagradState, AdamWState, LionState, NativeState
from ._parameter_size import ParameterSize
from ._plan import Plan, make_plan
from ._prediction import Prediction, check_arguments, make_prediction, plan_on
from ._probe import probe_device, probe_host
from ._rates import measure_rates
from ._units import Unit, check_module, find_units

__all__ = ["estimate", "measure_hardware", "predict"]

# More bytes than any machine has.
_UNLIMITED = 2**62
_STATES: dict[str, type[NativeState]] = {
    "adam": AdamWState,
    "adamw": AdamWState,
    "lion": LionState,
    "adagrad": AdagradState,
}
# Rows of the square matrices whose product is timed: large enough for the peak, and done in a moment.
_ROWS = {"cuda": 8192, "cpu": 1024}
# Of the rate of one large product, what a whole model is expected to reach: a small Llama reached 0.35 of it on two CPU
# cores, where all that is not a product weighs more.
_SHARE_OF_A_PRODUCT = {"cuda": 0.75, "cpu": 0.4}
_ROUNDS = 3

OptimizerName = Literal["adam", "adamw", "lion", "adagrad"]


def estimate(
    model: nn.Module,
    *,
    hardware: Hardware | str | None = None,
    dtype: torch.dtype | None = None,
    config: Config | dict[str, Any] | None = None,
    **options: Any,
) -> Plan:
    """The plan of `wrap` for a model that trains under Adam; nothing is changed.

    model: any module, on the meta device too. hardware: what it is to fit, or the name of a preset; None: whatever
    memory there is, so that budgets are left out and "auto" offloads nothing. dtype: of its weights and gradients, None
    takes each parameter's own. config, options: as of `wrap`.

    Raises `InvalidArgument`, and `OutOfHostMemory` where the hardware's host is too small.
    """
    check_module(model)
    hardware = _known(hardware)
    if hardware is None:
        options |= {"device_budget": _UNLIMITED, "host_budget": _UNLIMITED}
    settings = Config.resolve(config, options)
    sizes = _sizes(model, find_units(model, settings.units), settings, "adamw")
    if dtype is not None:
        name = str(dtype).removeprefix("torch.")
        sizes = [dataclasses.replace(size, itemsize=dtype.itemsize, dtype_name=name) for size in sizes]
    if hardware is not None:
        return plan_on(sizes, settings, hardware)
    return make_plan(
        sizes,
        settings,
        gradient_itemsize=settings.gradient_itemsize,
        device_kind="cuda",
        device_bytes=_UNLIMITED,
        host_bytes=_UNLIMITED,
    )


def predict(
    model: nn.Module,
    hardware: Hardware | str | None = None,
    *,
    batches: Sequence[int] = (1, 4, 16),
    length: int = 2048,
    checkpointing: bool = True,
    optimizer_class: OptimizerName = "adamw",
    gpus: int = 1,
    interconnect: str | None = None,
    config: Config | dict[str, Any] | None = None,
    **options: Any,
) -> Prediction:
    """What training `model` would take in every placement, and how long its steps would be.

    Args:
        model: any module, on the meta device too; transformers are what the times are for. Parameters that do not
            require gradients are frozen.
        hardware: where, or the name of a preset; None measures this machine for about a second.
        batches: sequences a step and card; length: tokens of one.
        checkpointing: whether blocks are recomputed in backward (`torch.utils.checkpoint`).
        optimizer_class: `"adam"`, `"adamw"`, `"lion"` or `"adagrad"`.
        gpus, interconnect: cards that share states and gradients out, and what joins them, one of
            `Hardware.INTERCONNECTS`. Arithmetic: training in several processes is not supported yet.
        config, options: as of `wrap`; what is not "auto" is the only placement that is tried.

    The plan, its bytes included, is what `wrap` makes there. Activations are estimated from shapes, what a lossy
    `activation_format` rounds of them with it; inputs of checkpoints are known to the byte. Times are of a
    model of the pipeline (see `offload.forecast`), and figures of the hardware are as good as `Hardware.assumed` says.

    Returns a `Prediction`, whose `refusal` says so where nothing fits. Raises `InvalidArgument`.
    """
    check_module(model)
    hardware = _known(hardware)
    settings = Config.resolve(config, options)
    check_arguments(settings, batches, length, checkpointing, gpus, interconnect)
    if not isinstance(optimizer_class, str) or optimizer_class not in _STATES:
        raise InvalidArgument(f"optimizer_class={optimizer_class!r}: legal are {', '.join(map(repr, _STATES))}")
    units = find_units(model, settings.units)
    sizes = _sizes(model, units, settings, optimizer_class)
    if not sizes:
        raise InvalidArgument(f"this {type(model).__name__} has no parameters: there is nothing to predict")
    if hardware is None:
        hardware = measure_hardware()
    return make_prediction(
        sizes,
        token_costs(model, units, length, hardware.kind),
        settings,
        hardware,
        batches=batches,
        length=length,
        checkpointing=checkpointing,
        gpus=gpus,
        interconnect=interconnect,
    )


def _known(hardware: Hardware | str | None) -> Hardware | None:
    """The hardware, looked up where it is the name of a preset."""
    if isinstance(hardware, str):
        return Hardware.preset(hardware)
    if hardware is not None and not isinstance(hardware, Hardware):
        raise InvalidArgument(f"hardware={hardware!r}: give the name of a preset, an offload.Hardware, or None")
    return hardware


def measure_hardware() -> Hardware:
    """This machine: its accelerator, or the CPU without one; free memory and measured rates, in about a second.

    Disks are not measured.
    """
    device, host = probe_device(), probe_host()
    rates = measure_rates(torch.device(device.name), pin=device.kind != "cpu")
    return Hardware(
        name="this machine" if device.kind == "cpu" else torch.cuda.get_device_name(device.name),
        device_bytes=device.free_bytes,
        flops=_product_flops(torch.device(device.name), torch.bfloat16),
        fp32_flops=_product_flops(torch.device(device.name), torch.float32),
        mfu=_SHARE_OF_A_PRODUCT[device.kind],
        device_bandwidth=rates.device_update,
        to_host=rates.to_host,
        to_device=rates.to_device,
        host_bytes=host.available_bytes,
        host_bandwidth=rates.host_update,
        disk_read=DISK_READ,
        disk_write=DISK_WRITE,
        source="measured: matrix products, copies and updates, each by itself",
        assumed=("mfu", "disk_read", "disk_write"),
        kind=device.kind,
    )


def _product_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product, the best of a few."""
    rows = _ROWS[device.type]
    left, right = (torch.ones(rows, rows, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(1 + _ROUNDS):
        start = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * rows**3 / best


def _sizes(model: nn.Module, units: Sequence[Unit], settings: Config, optimizer: str) -> list[ParameterSize]:
    trained = {id(p): _STATES[optimizer] for p in model.parameters() if p.requires_grad}
    return parameter_sizes(model, units, trained, settings)
