"""DeepSpeed configs: what is read, what is accepted, what it resolves to, and what is said about the rest."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspeed_cases import BATCH, CONFIGS, adam, quiet, refusal, zero
from offload import InvalidArgument
from offload.deepspeed._config import load, resolve
from offload.deepspeed._read import read


def test_dicts_files_and_base64_are_one_config(tmp_path: Path) -> None:
    config = {**BATCH, "bf16": {"enabled": True}}
    path = tmp_path / "ds.json"
    path.write_text("\ufeff" + json.dumps(config), encoding="utf-8")
    text = base64.urlsafe_b64encode(json.dumps(config).encode()).decode()
    assert load(config) == load(path) == load(str(path)) == load(text)


def test_hjson_is_read(tmp_path: Path) -> None:
    pytest.importorskip("hjson")
    path = tmp_path / "ds.json"
    path.write_text("{\n  // samples\n  train_batch_size: 8,  # a step\n  'bf16': {enabled: true,},\n}\n")
    assert load(path) == load({**BATCH, "bf16": {"enabled": True}})


def test_without_hjson_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "hjson", None)
    path = tmp_path / "ds.json"
    path.write_text('{"train_batch_size": 8,}')
    with pytest.raises(ModuleNotFoundError, match="pip install hjson"):
        load(path)
    path.write_text('{"train_batch_size": 8}')
    assert load(path).batch.train == 8, "strict JSON needs no package"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"train_batch_size": 8, "train_batch_size": 9}', r"ds.json: duplicate keys \['train_batch_size'\]"),
        ('{"fp16": {"enabled": true, "enabled": true}}', r"duplicate keys \['enabled'\]"),
        ("[1]", "holds a list"),
    ],
)
def test_files_that_hold_no_config(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(InvalidArgument, match=message):
        load(path)


def test_a_file_that_is_neither_json_nor_hjson(tmp_path: Path) -> None:
    pytest.importorskip("hjson")
    path = tmp_path / "ds.json"
    path.write_text('{"train_batch_size": 8')
    with pytest.raises(InvalidArgument, match="neither JSON .* nor Hjson"):
        load(path)


def test_duplicates_in_hjson(tmp_path: Path) -> None:
    pytest.importorskip("hjson")
    path = tmp_path / "ds.json"
    path.write_text("{a: 1, a: 2,}")
    with pytest.raises(InvalidArgument, match="duplicate keys"):
        load(path)


def test_comments_are_no_settings() -> None:
    quiet({**BATCH, "_read_the_docs": "https://...", "comment": "of one card", "aio": {"//": "as measured"}})


@pytest.mark.parametrize("config", ["no/such/file.json", "bm90IGpzb24gYXQgYWxs\u00e9", "x" * 5000])
def test_a_path_that_leads_nowhere(config: str) -> None:
    assert "give the path" in refusal(config)


def test_other_types_are_named() -> None:
    assert "a list" in refusal([BATCH])


def test_defaults_are_deepspeeds() -> None:
    settings = quiet(BATCH)
    assert settings.gradient_clipping == 1.0 and "gradient_clipping" in settings.notices[0]
    assert settings.precision.dtype == "fp32" and settings.optimizer is None and settings.scheduler is None
    assert settings.placement.stage == 0 and settings.placement.pin_memory
    assert settings == quiet({**BATCH, "zero_optimization": None, "fp16": {}, "optimizer": None})
    assert quiet({**BATCH, "gradient_clipping": 0, "dump_state": None}).notices == ()
    assert quiet(zero(cpu_offload="auto", leaf_module=None)).placement.optimizer == "device"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((8, 2, 4), (8, 2, 4)),
        ((8, 2, None), (8, 2, 4)),
        ((8, None, 4), (8, 2, 4)),
        ((None, 2, 4), (8, 2, 4)),
        ((8, None, None), (8, 8, 1)),
        ((None, 2, None), (2, 2, 1)),
        ((8, 2, 3), None),
        ((8, 3, None), None),
        ((8, None, 3), None),
        ((2, 4, None), None),
        ((2, None, 4), None),
        ((None, None, 4), None),
        ((None, None, None), None),
        ((0, None, None), None),
        ((None, -1, None), None),
        ((8, None, 0), None),
    ],
)
def test_the_batch_triangle(given: tuple[Any, ...], expected: tuple[int, int, int] | None) -> None:
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    config = {name: value for name, value in zip(names, given, strict=True) if value is not None}
    if expected is None:
        message = refusal(config)
        wrong = {name: value for name, value in config.items() if value < 1} or config
        assert all(f"{name}={value}" in message for name, value in wrong.items())
    else:
        batch = quiet(config).batch
        assert (batch.train, batch.micro, batch.accumulation) == expected


def test_offloading() -> None:
    place = quiet(
        zero(offload_optimizer={"device": "cpu"}, offload_param={"device": "cpu", "pin_memory": False})
    ).placement
    assert (place.optimizer, place.gradients, place.params, place.pin_memory) == ("host", "host", "host", True)
    place = quiet(zero(offload_param={"device": "cpu", "pin_memory": False})).placement
    assert (place.optimizer, place.params, place.pin_memory) == ("device", "host", False)
    place = quiet(zero(offload_optimizer={"device": "cpu", "ratio": 0.25})).placement
    assert (place.optimizer, place.optimizer_ratio) == ("host", 0.25)
    config = {**BATCH, "activation_checkpointing": {"cpu_checkpointing": True}}
    settings = quiet(config)
    assert settings.placement.activations == "host" and settings.activation_checkpointing.configured


def test_precision() -> None:
    precision = quiet({**BATCH, "fp16": {"enabled": True, "auto_cast": True}}).precision
    assert precision.dtype == "fp16" and precision.skip_bad_steps and precision.cast_inputs
    scale = precision.loss_scale
    assert scale is not None and scale.static is None and scale.initial == 65536.0
    assert (scale.window, scale.hysteresis, scale.consecutive_hysteresis, scale.min_scale) == (1000, 2, False, 1.0)
    scale = quiet({**BATCH, "fp16": {"enabled": True, "loss_scale": 128}}).precision.loss_scale
    assert scale is not None and scale.static == scale.initial == 128.0
    assert quiet({**BATCH, "bf16": {"enabled": True}}).precision.skip_bad_steps
    assert not quiet({**BATCH, "bf16": {"enabled": True, "check_grad_overflow": False}}).precision.skip_bad_steps
    assert quiet({**BATCH, "bf16": {"enabled": True}}).precision.loss_scale is None
    cast = quiet(
        {**BATCH, "torch_autocast": {"enabled": True, "dtype": "torch.float16", "lower_precision_safe_modules": ["A"]}}
    ).precision
    assert cast.autocast is not None and cast.autocast.dtype == "fp16"
    assert cast.dtype == "fp32" and cast.loss_scale is not None
    cast = quiet({**BATCH, "torch_autocast": {"enabled": True}, "bf16": {"enabled": True}}).precision
    assert cast.autocast is not None and cast.autocast.dtype == cast.dtype == "bf16"


def test_optimizers_have_deepspeeds_defaults() -> None:
    optimizer = quiet(adam()).optimizer
    assert optimizer is not None and optimizer.adam_w_mode and not optimizer.torch_adam
    assert optimizer.params == {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    for name, mode, expected in (("adam", None, True), ("Adam", False, False), ("ADAMW", False, True)):
        params = {} if mode is None else {"adam_w_mode": mode}
        optimizer = quiet({**BATCH, "optimizer": {"type": name, "params": params}}).optimizer
        assert optimizer is not None and optimizer.adam_w_mode is expected
        assert optimizer.name in ("Adam", "AdamW")
    lion = quiet({**BATCH, "optimizer": {"type": "Lion", "params": {"lr": "1e-4"}}}).optimizer
    assert lion is not None and lion.params == {"lr": 1e-4, "betas": (0.9, 0.999), "weight_decay": 0.0}


def test_torchs_own_classes() -> None:
    optimizer = quiet(adam(lr=1e-4, torch_adam=True, fused=False)).optimizer
    assert optimizer is not None and optimizer.torch_adam and optimizer.params == {"lr": 1e-4, "fused": False}
    optimizer = quiet(adam(lr=1e-4, amsgrad=True)).optimizer
    assert optimizer is not None and optimizer.torch_adam and optimizer.params["amsgrad"]
    assert optimizer.params["weight_decay"] == 0.0, "not torch's 0.01"
    optimizer = quiet({**BATCH, "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}}).optimizer
    assert optimizer is not None and optimizer.params == {"lr": 0.1, "momentum": 0.9}
    scheduler = quiet({**BATCH, "scheduler": {"type": "StepLR", "params": {"step_size": 30}}}).scheduler
    assert scheduler is not None and scheduler.params == {"step_size": 30}


def test_schedulers() -> None:
    config = {
        **BATCH,
        "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 1e4, "warmup_num_steps": 0}},
    }
    scheduler = quiet(config).scheduler
    assert scheduler is not None and scheduler.params["total_num_steps"] == 10_000
    assert scheduler.params["warmup_num_steps"] == 0 and scheduler.params["warmup_type"] == "log"
    del config["scheduler"]["params"]["total_num_steps"]  # type: ignore[index]
    assert refusal(config) == "scheduler.params.total_num_steps is missing: WarmupDecayLR needs it"


def test_the_rest_of_the_settings() -> None:
    settings = quiet(
        {
            **BATCH,
            "steps_per_print": float("inf"),
            "wall_clock_breakdown": True,
            "managed_gradient_accumulation": False,
            "csv_monitor": {"enabled": True, "output_path": "out"},
            "flops_profiler": {"enabled": True, "top_modules": 3, "recompute_fwd_factor": 0.5},
            "checkpoint": {"tag_validation": "FAIL", "writer": {"type": "FAST", "decoupled": True}},
        }
    )
    assert settings.logging.steps_per_print is None and settings.logging.wall_clock_breakdown
    assert not settings.managed_accumulation and settings.csv_monitor.output_path == "out"
    assert settings.flops_profiler.recompute_fwd_factor == 0.5 and settings.flops_profiler.module_depth == -1
    assert settings.checkpoint.async_save


def test_the_config_is_left_alone() -> None:
    config = zero(cpu_offload=True, reduce_bucket_size=5e8)
    before = json.dumps(config)
    with pytest.warns(UserWarning, match="cpu_offload"):
        load(config)
    assert json.dumps(config) == before


@settings(deadline=None)
@given(
    whole=st.integers(0, 2**53),
    write=st.sampled_from([lambda n: n, float, str, lambda n: f" {n}.0"]),
)
def test_whole_numbers_however_written(whole: int, write: Any) -> None:
    assert quiet({**BATCH, "steps_per_print": write(whole)}).logging.steps_per_print == whole


@settings(deadline=None)
@given(st.floats(0, 1e6), st.sampled_from([float, repr]))
def test_numbers_however_written(number: float, write: Any) -> None:
    assert quiet({**BATCH, "gradient_clipping": write(number)}).gradient_clipping == number


@pytest.mark.parametrize("value", [True, 1, 1.0, "true", "True", "1", "on", "yes"])
def test_flags_however_written(value: Any) -> None:
    assert quiet({**BATCH, "bf16": {"enabled": value}}).precision.dtype == "bf16"


@settings(deadline=None)
@given(st.floats(allow_nan=True, allow_infinity=True).filter(lambda number: not number.is_integer()))
def test_what_is_no_whole_number(number: float) -> None:
    assert f"zero_optimization.sub_group_size={number!r}: must be a whole number" in refusal(
        zero(sub_group_size=number)
    )


def test_auto_is_filled_by_path() -> None:
    config = adam(lr="auto", weight_decay="auto") | {"fp16": {"enabled": "auto"}, "gradient_clipping": "auto"}
    values = {"optimizer.params.lr": 3e-4, "optimizer.params.weight_decay": 0.1, "gradient_clipping": 0.5}
    settings = quiet(config, auto={**values, "fp16.enabled": True, "unused": 1})
    assert settings.optimizer is not None and settings.optimizer.params["lr"] == 3e-4
    assert settings.gradient_clipping == 0.5 and settings.precision.dtype == "fp16"


@pytest.mark.parametrize(
    ("name", "placement", "dtype", "refused"),
    [
        ("trainer_zero3_offload", "host host", "fp32", 0),
        ("trainer_zero2", "host device", "bf16", 0),
        ("accelerate_zero3", "device device", "bf16", 0),
        ("image_classifier_fp16", "device device", "fp16", 0),
        ("old_language_model", "host device", "fp16", 0),
        ("chat_zero3_bf16", "host host", "bf16", 0),
        ("masked_language_model", "", "", 2),
        ("infinity_nvme", "disk disk", "bf16", 0),
    ],
)
def test_configs_as_people_have_them(name: str, placement: str, dtype: str, refused: int) -> None:
    if name == "old_language_model":
        pytest.importorskip("hjson")
    settings, report = resolve(read(CONFIGS / f"{name}.json"), for_trainer=True)
    assert len(report.refusals(strict=True)) == refused, report.refusals(strict=True)
    if not refused:
        assert f"{settings.placement.optimizer} {settings.placement.params}" == placement
        assert settings.precision.dtype == dtype


def test_nvme_and_aio_become_the_disk_tier(tmp_path: Path) -> None:
    zero = {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": str(tmp_path)}}
    config = {"train_batch_size": 1, "gradient_clipping": 0.0, "zero_optimization": zero}
    place = quiet(config).placement
    assert (place.optimizer, place.gradients, place.params) == ("disk", "host", "device")
    assert (place.disk_path, place.disk_block, place.disk_queue_depth) == ((str(tmp_path),), None, None)
    place = quiet({**config, "aio": {"block_size": 5000, "queue_depth": 16, "intra_op_parallelism": 4}}).placement
    assert (place.disk_block, place.disk_queue_depth) == (8192, 64)
    place = quiet({**config, "aio": {"queue_depth": 5000}}).placement
    assert (place.disk_block, place.disk_queue_depth) == (1 << 20, 4096)


def test_params_on_nvme_become_the_disk_tier(tmp_path: Path) -> None:
    nvme = [{"device": "nvme", "nvme_path": str(tmp_path / name)} for name in ("a", "b")]
    config = {"train_batch_size": 1, "gradient_clipping": 0.0, "aio": {"block_size": 8192}}
    place = quiet({**config, "zero_optimization": {"stage": 3, "offload_param": nvme[0]}}).placement
    assert (place.optimizer, place.gradients, place.params) == ("device", "device", "disk")
    assert (place.disk_path, place.disk_block) == ((str(tmp_path / "a"),), 8192)
    zero = {"stage": 3, "offload_param": nvme[0], "offload_optimizer": nvme[1]}
    place = quiet({**config, "zero_optimization": zero}).placement
    assert (place.optimizer, place.params) == ("disk", "disk")
    assert place.disk_path == (str(tmp_path / "b"), str(tmp_path / "a"))
    zero = {"stage": 3, "offload_param": nvme[0], "offload_optimizer": nvme[0]}
    assert quiet({**config, "zero_optimization": zero}).placement.disk_path == (str(tmp_path / "a"),)
