"""`deepspeed.zero`: building large models, reading their weights, and estimates of what training them takes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import offload

from . import _config, _placement
from ._casting import TORCH_DTYPES
from ._log import logger, show_log
from ._offload_config import ZeroParamStatus
from ._read import read

__all__ = [
    "GatheredParameters",
    "Init",
    "ZeroParamStatus",
    "estimate_zero2_model_states_mem_needs_all_cold",
    "estimate_zero2_model_states_mem_needs_all_live",
    "estimate_zero3_model_states_mem_needs_all_cold",
    "estimate_zero3_model_states_mem_needs_all_live",
    "register_external_parameter",
    "unregister_external_parameter",
]


class Init:
    """Inside the context modules are built in host memory, in the dtype of the config.

    `initialize` takes weights that `offload_param` puts on the host from there to the pool, unit by unit: they are
    never whole on the device, nor twice on the host, and the model may be larger than the device. So is a model that
    is built on the meta device and gets its weights by `load_state_dict(..., assign=True)`.

    module: an existing model, which is moved to host memory at once.
    remote_device, pin_memory: `"cpu"` or None; the pool locks its pages when `initialize` fills it, as the config says.
    config_dict_or_path, config: the DeepSpeed config, whose `fp16` or `bf16` says the dtype; "auto" may stand in it.
    enabled: False does nothing.
    dtype: of the weights, torch.float32, torch.bfloat16 or torch.float16; goes before the config's. With neither it is
    torch's default, which `initialize` casts (DeepSpeed's is fp16 then).
    mpu, groups, mem_efficient_linear, zero_quantized_*, tensor_overrides: accepted; one process partitions and sends
    nothing, linear layers are torch's, and tensors of a dtype that is written out keep it.

    Raises `InvalidArgument` for another `remote_device` or dtype, a `param_swapper`, a module without values, two
    configs, and what `initialize` refuses of the config.
    """

    def __init__(
        self,
        module: nn.Module | None = None,
        data_parallel_group: Any = None,
        mem_efficient_linear: bool = True,
        remote_device: str | None = None,
        pin_memory: bool = False,
        config_dict_or_path: Any = None,
        config: Any = None,
        enabled: bool = True,
        dtype: torch.dtype | None = None,
        mpu: Any = None,
        zero_param_parallel_group: Any = None,
        zero_quantized_weights: bool = False,
        zero_quantized_nontrainable_weights: bool = False,
        sequence_data_parallel_group: Any = None,
        param_swapper: Any = None,
        tensor_overrides: Any = None,
    ) -> None:
        where = getattr(remote_device, "value", remote_device)
        if where not in (None, "none", "cpu"):
            word = "there is no such place"
            if where == "nvme":
                word = "a model is built in host memory, and its weights go to disk in initialize()"
            raise offload.InvalidArgument(f"zero.Init(remote_device={where!r}): {word}; use 'cpu'")
        if param_swapper is not None:
            raise offload.InvalidArgument("zero.Init(param_swapper=...): weights go to disk without one; leave it out")
        if config is not None and config_dict_or_path is not None:
            raise offload.InvalidArgument("zero.Init: config_dict_or_path and config are both given: keep the first")
        if dtype is not None and dtype not in TORCH_DTYPES.values():
            raise offload.InvalidArgument(
                f"zero.Init(dtype={dtype}): legal are {', '.join(map(str, TORCH_DTYPES.values()))}"
            )
        given = config_dict_or_path if config_dict_or_path is not None else config
        if given is not None:
            # Its dtype alone is read, so what the Trainer fills in later may still say "auto".
            settings, report = _config.resolve(read(given), for_trainer=True)
            report.raise_refusals(strict=False)
            named = settings.precision.dtype
            dtype = dtype or (None if named == "fp32" else TORCH_DTYPES[named])
        self._dtype = dtype
        self._enabled = enabled
        self._entered: contextlib.ExitStack | None = None
        if module is not None and enabled:
            _placement.check_values(module)
            module.to("cpu", dtype)

    def __enter__(self) -> Init:
        if self._enabled:
            self._entered = contextlib.ExitStack()
            self._entered.enter_context(torch.device("cpu"))
            if self._dtype is not None:
                self._entered.callback(torch.set_default_dtype, torch.get_default_dtype())
                torch.set_default_dtype(self._dtype)
        return self

    def __exit__(self, *error: Any) -> None:
        entered, self._entered = self._entered, None
        if entered is not None:
            entered.close()


class GatheredParameters:
    """Inside the context these parameters are on the device and current, for reading and writing.

    params: a parameter, several, or a module. Plain parameters, of a model that no engine has, are left as they are.
    modifier_rank, fwd_module: accepted; what is written is kept in any case.
    """

    def __init__(
        self, params: Any, modifier_rank: int | None = None, fwd_module: Any = None, enabled: bool = True
    ) -> None:
        if isinstance(params, nn.Module):
            params = params.parameters()
        elif isinstance(params, Tensor):
            params = [params]
        self._params: list[Any] = list(params) if enabled else []
        self._entered: contextlib.ExitStack | None = None

    def __enter__(self) -> None:
        wanted: dict[nn.Module, list[nn.Parameter]] = {}
        for parameter in self._params:
            model = _placement.model_of(parameter)
            if model is not None:
                wanted.setdefault(model, []).append(parameter)
        with contextlib.ExitStack() as entered:
            for model, parameters in wanted.items():
                entered.enter_context(offload.full_params(model, parameters))
            self._entered = entered.pop_all()

    def __exit__(self, *error: Any) -> None:
        entered, self._entered = self._entered, None
        if entered is not None:
            entered.__exit__(*error)


def register_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Does nothing: weights that are used from outside their module are found in the first step."""


def unregister_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Does nothing, as `register_external_parameter`."""


# --- estimates ------------------------------------------------------------------------------------------------

# The options that DeepSpeed's tables show, by what `offload.wrap` is told.
_ZERO2 = {
    "offload_optimizer=cpu ": {"optimizer": "host", "gradients": "host", "params": "device"},
    "offload_optimizer=none": {"optimizer": "device", "gradients": "device", "params": "device"},
}
_ZERO3 = {
    "offload_param=cpu , offload_optimizer=cpu ": {"optimizer": "host", "gradients": "host", "params": "host"},
    "offload_param=none, offload_optimizer=cpu ": _ZERO2["offload_optimizer=cpu "],
    "offload_param=none, offload_optimizer=none": _ZERO2["offload_optimizer=none"],
}


def estimate_zero2_model_states_mem_needs_all_live(
    model: nn.Module, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5
) -> None:
    """Prints what weights, gradients and Adam's states of a model take in bf16, by placement.

    The bytes are those of offload's plan, which are exact: `additional_buffer_factor` is accepted and not applied.
    Raises `InvalidArgument` for more than one GPU.
    """
    _print_table(model, _ZERO2, num_gpus_per_node * num_nodes)


def estimate_zero3_model_states_mem_needs_all_live(
    model: nn.Module, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5
) -> None:
    """The same with weights on the host too; the device then holds the units that are in flight."""
    _print_table(model, _ZERO3, num_gpus_per_node * num_nodes)


def estimate_zero2_model_states_mem_needs_all_cold(
    total_params: int, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5
) -> None:
    """As the live estimate, of a number of parameters."""
    _print_table(_meta_model([int(total_params)]), _ZERO2, num_gpus_per_node * num_nodes)


def estimate_zero3_model_states_mem_needs_all_cold(
    total_params: int,
    largest_layer_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
) -> None:
    """As the live estimate, of a number of parameters in layers of `largest_layer_params`."""
    layers, rest = divmod(int(total_params), int(largest_layer_params))
    sizes = [int(largest_layer_params)] * layers + ([rest] if rest else [])
    _print_table(_meta_model(sizes), _ZERO3, num_gpus_per_node * num_nodes)


def _meta_model(sizes: Iterable[int]) -> nn.Module:
    return nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(size, 1, bias=False, device="meta") for size in sizes)})


def _rows(model: nn.Module, choices: dict[str, dict[str, Any]]) -> Iterator[str]:
    yield "  per CPU  |  per GPU |   Options"
    for name, options in choices.items():
        plan = offload.estimate(model, dtype=torch.bfloat16, **options)
        yield f"{plan.host.total / 2**30:9.2f}GB |{plan.device.total / 2**30:8.2f}GB | {name}"


def _print_table(model: nn.Module, choices: dict[str, dict[str, Any]], gpus: int) -> None:
    if gpus != 1:
        raise offload.InvalidArgument(f"an estimate for {gpus} GPUs: one process on one GPU is supported")
    count = sum(parameter.numel() for parameter in model.parameters())
    show_log()
    text = "\n".join(_rows(model, choices))
    logger.info("memory of weights, optimizer states and gradients: %dM parameters, 1 GPU\n%s", count // 10**6, text)
