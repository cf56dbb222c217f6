"""Every key that this DeepSpeed reads is in the table: fields of its config models, and what it asks dicts for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS as removed
from deepspeed.runtime.config import DeepSpeedConfig, HybridEngineConfig
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.tensor_parallel.config import TPConfig, TPTrainingConfig
from deepspeed.runtime.zenflow.zenflow_config import ZenFlowConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

from offload.deepspeed._sections import SECTIONS

MODELS: dict[type[DeepSpeedConfigModel], str] = {
    CometConfig: "comet",
    CommsLoggerConfig: "comms_logger",
    CompileConfig: "compile",
    CSVConfig: "csv_monitor",
    DeepSpeedBF16Config: "bf16",
    DeepSpeedFP16Config: "fp16",
    DeepSpeedThroughputTimerConfig: "timers.throughput",
    DeepSpeedZeroConfig: "zero_optimization",
    DeepSpeedZeroLeafModuleConfig: "zero_optimization.leaf_module",
    DeepSpeedZeroOffloadOptimizerConfig: "zero_optimization.offload_optimizer",
    DeepSpeedZeroOffloadParamConfig: "zero_optimization.offload_param",
    HybridEngineConfig: "hybrid_engine",
    TensorBoardConfig: "tensorboard",
    TPTrainingConfig: "tensor_parallel",
    WandbConfig: "wandb",
    ZenFlowConfig: "zero_optimization.zenflow",
}
# Models that no key of a training config holds, and one whose fields are for tensor parallelism alone.
ELSEWHERE = ("deepspeed.inference.", "deepspeed.monitor.config.DeepSpeedMonitorConfig")
INSIDE = {TPConfig: "tensor_parallel.tp"}


def known(path: str) -> bool:
    """Whether the table has the key, or lets every key of its section pass."""
    outer, _, name = path.rpartition(".")
    section = SECTIONS.get(outer)
    if section is not None:
        return section.open or section.find(name) is not None
    return bool(outer) and known(outer)  # inside an object that the table takes as a whole


def models(base: type) -> Iterator[type]:
    for model in base.__subclasses__():
        yield model
        yield from models(model)


def names_of(model: type[DeepSpeedConfigModel]) -> set[str]:
    return {name for field, info in model.model_fields.items() for name in (field, info.alias) if name}


@pytest.mark.parametrize(("model", "path"), MODELS.items(), ids=lambda value: getattr(value, "__name__", None))
def test_every_field_of_a_model_is_a_key(model: type[DeepSpeedConfigModel], path: str) -> None:
    assert sorted(name for name in names_of(model) if not known(f"{path}.{name}")) == []


# Written otherwise in a config than the value that stands for it, and an object whose own keys have the defaults.
OTHERWISE = {"tensor_parallel.dtype", "zero_optimization.leaf_module"}


@pytest.mark.parametrize(("model", "path"), MODELS.items(), ids=lambda value: getattr(value, "__name__", None))
def test_every_default_of_a_model_is_that_of_the_key(model: type[DeepSpeedConfigModel], path: str) -> None:
    differing = {}
    for field, info in model.model_fields.items():
        key = SECTIONS[path].find(info.alias or field)
        default = info.get_default(call_default_factory=True)
        default = getattr(default, "value", default)
        if key is not None and key.default != default and f"{path}.{key.name}" not in OTHERWISE:
            differing[key.name] = (key.default, default)
    assert differing == {}


def test_what_was_removed_since_is_known() -> None:
    """Old configs have these: the answer is better than "unknown key"."""
    assert [key for key in removed if not known(key)] == []


def test_every_model_is_one_of_these() -> None:
    others = {f"{model.__module__}.{model.__qualname__}" for model in models(DeepSpeedConfigModel)} - {
        f"{model.__module__}.{model.__qualname__}" for model in (*MODELS, *INSIDE)
    }
    assert sorted(name for name in others if not name.startswith(ELSEWHERE)) == []


class Asked(dict[str, Any]):
    """A config that notes which keys it is asked for, by dotted path."""

    def __init__(self, content: Mapping[str, Any], seen: set[str], path: str = "") -> None:
        super().__init__(
            {
                key: Asked(value, seen, f"{path}{key}.") if isinstance(value, dict) else value
                for key, value in content.items()
            }
        )
        self._seen, self._path = seen, path

    def __deepcopy__(self, memo: Any) -> Asked:
        return self

    def _note(self, key: object) -> None:
        if isinstance(key, str):
            self._seen.add(self._path + key)

    def get(self, key: str, default: Any = None) -> Any:
        self._note(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self._note(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self._note(key)
        return super().__contains__(key)

    def keys(self) -> Any:
        return _AskedKeys(self)


class _AskedKeys:
    def __init__(self, asked: Asked) -> None:
        self._asked = asked

    def __iter__(self) -> Iterator[str]:
        return dict.__iter__(self._asked)

    def __contains__(self, key: object) -> bool:
        return key in self._asked


# With every section that is read from a plain dict: what is in one is only asked for where it is there.
WHOLE: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "activation_checkpointing": {"profile": False},
    "aio": {"block_size": 1},
    "autotuning": {"enabled": False},
    "checkpoint": {"tag_validation": "Ignore", "parallel_write": {"pipeline_stage": False}},
    "comms_logger": {"enabled": False},
    "data_efficiency": {"enabled": False},
    "data_types": {"grad_accum_dtype": "fp32"},
    "datastates_ckpt": {},
    "expert_parallel": {"enabled": False},
    "flops_profiler": {"enabled": False},
    "optimizer": {"type": "Adam", "params": {"lr": 1e-3}},
    "pipeline": {},
    "scheduler": {"type": "WarmupLR", "params": {}},
    "timers": {"throughput": {"enabled": True}},
    "torch_autocast": {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []},
}


def test_every_key_that_is_asked_for_is_in_the_table() -> None:
    seen: set[str] = set()
    DeepSpeedConfig(Asked(WHOLE, seen))
    assert {"zero_optimization", "data_types.grad_accum_dtype", "optimizer.type", "gradient_clipping"} <= seen
    assert sorted(path for path in seen if not known(path)) == []
