"""Options: what is accepted, and that what is refused says why."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import offload
from offload._config import Config, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (0, 0),
        (123, 123),
        ("512", 512),
        ("512B", 512),
        ("24GiB", 24 * 2**30),
        ("24 gib", 24 * 2**30),
        ("1.5 GB", 1_500_000_000),
        ("2K", 2000),
        ("0.5MiB", 2**19),
        ("1 Ti", 2**40),
        ("9007199254740993", 2**53 + 1),  # would lose its last bit in a float
    ],
)
def test_parse_size(text: int | str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize(
    "bad", ["", "GiB", "-1GiB", "1 GiBs", "1e9", "ten", -1, 1.5, True, None, "9" * 5000, 2**70, "9" * 20]
)
def test_parse_size_refuses(bad: object) -> None:
    with pytest.raises(offload.InvalidArgument, match=r"24GiB|negative"):
        parse_size(bad)  # type: ignore[arg-type]


@given(st.integers(0, 2**50))
def test_format_size_is_read_back_to_its_precision(size: int) -> None:
    # Two decimals of the unit: a relative error of at most 0.005.
    assert math.isclose(parse_size(format_size(size)), size, rel_tol=0.006)


def test_defaults_offload_by_need() -> None:
    config = Config()
    assert (config.optimizer, config.gradients, config.lazy) == ("auto", "auto", True)
    assert config.device_budget_bytes is None and config.host_budget_bytes is None


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().optimizer = "host"  # type: ignore[misc]


def test_budgets_and_device_are_normalised() -> None:
    config = Config(device_budget="2GiB", host_budget=10, device=torch.device("cpu"))
    assert (config.device_budget_bytes, config.host_budget_bytes, config.device) == (2**31, 10, "cpu")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimizer": "gpu"}, ["optimizer='gpu'", "'device', 'host', 'disk', 'unified', 'auto'"]),
        ({"optimizer": "disk"}, ["optimizer='disk'", "disk_path"]),
        ({"disk_path": 7}, ["disk_path=7", "list of directories"]),
        ({"disk_path": []}, ["disk_path=[]", "a directory"]),
        ({"disk_window": "much"}, ["disk_window", "'much'"]),
        ({"disk_block": "10kB"}, ["disk_block='10kB'", "4096"]),
        ({"disk_block": "2GiB"}, ["disk_block='2GiB'", "1GiB"]),
        ({"disk_queue_depth": 0}, ["disk_queue_depth=0", "1 to 4096"]),
        ({"gradients": "disk"}, ["gradients='disk'", "not yet"]),
        ({"gradients": torch.ones(2)}, ["gradients=tensor", "'device', 'host', 'auto'"]),
        ({"optimizer": torch.ones(2)}, ["optimizer=tensor", "a share"]),
        ({"activations": torch.ones(2)}, ["activations=tensor", "a share"]),
        ({"moments": torch.ones(2)}, ["moments=tensor", "'fp32', 'bf16', 'int8'"]),
        ({"host_budget": 2**70}, ["host_budget", "more than any machine has"]),
        ({"params": "disk"}, ["params='disk'", "disk_path"]),
        ({"prefetch": 0}, ["prefetch=0", "1 or more"]),
        ({"units": "blocks"}, ["units='blocks'", "classes and names"]),
        ({"units": [3]}, ["units=[3]"]),
        ({"prefetch": True}, ["prefetch=True"]),
        ({"activations": "disk"}, ["activations='disk'", "not yet"]),
        ({"activations": "hsot"}, ["activations='hsot'", "'checkpoints'", "'8GiB'"]),
        ({"activations": 1.5}, ["activations=1.5", "0.0 to 1.0"]),
        ({"activations": True}, ["activations=True", "'host'"]),
        ({"activations": None}, ["activations=None", "'host'"]),
        ({"master": "fp16"}, ["master='fp16'", "'split'", "'bf16'"]),
        ({"lazy": 1}, ["lazy=1", "True"]),
        ({"pin": "yes"}, ["pin='yes'", "'auto'"]),
        ({"poison": 0}, ["poison=0", "None"]),
        ({"grad_dtype": "float32"}, ["grad_dtype='float32'", "None"]),
        ({"device_budget": "lots"}, ["device_budget", "'lots'"]),
        ({"host_budget": -5}, ["host_budget", "-5"]),
        ({"optimiser": "host"}, ["'optimiser'", "did you mean 'optimizer'"]),
        ({"xyzzy": 1}, ["'xyzzy'", "legal options are optimizer, gradients"]),
    ],
)
def test_bad_options_are_named(options: dict[str, object], words: list[str]) -> None:
    with pytest.raises(offload.InvalidArgument) as caught:
        Config.resolve(None, options)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("value", "share", "host_bytes"),
    [
        ("auto", 0.0, None), ("device", 0.0, None), ("host", 1.0, None), ("checkpoints", 1.0, None), (0.25, 0.25, None),
        (0.0, 0.0, None), ("8GiB", 1.0, 8 << 30), (4096, 1.0, 4096), (0, 0.0, 0),
    ],
)  # fmt: skip
def test_activations_take_places_shares_and_bytes(value: Any, share: float, host_bytes: int | None) -> None:
    config = Config(activations=value)
    assert (config.activation_share, config.activation_host_bytes) == (share, host_bytes)


def test_resolve_lays_options_over_the_config() -> None:
    base = Config(optimizer="host", lazy=False)
    assert Config.resolve(base, {}) == base
    assert Config.resolve(base, {"lazy": True}) == Config(optimizer="host", lazy=True)
    assert Config.resolve({"optimizer": "host"}, {"gradients": "host"}) == Config(optimizer="host", gradients="host")
    assert Config.resolve(None, {}) == Config()


def test_resolve_refuses_other_types() -> None:
    with pytest.raises(offload.InvalidArgument, match="config is a str"):
        Config.resolve("zero3", {})  # type: ignore[arg-type]


def test_poison_reads_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOAD_POISON", "1")
    assert Config().poison_enabled
    assert not Config(poison=False).poison_enabled
    monkeypatch.setenv("OFFLOAD_POISON", "0")
    assert not Config().poison_enabled
    assert Config(poison=True).poison_enabled
    monkeypatch.delenv("OFFLOAD_POISON")
    assert not Config().poison_enabled


def test_config_and_plan_need_no_torch() -> None:
    code = "import sys, offload._config, offload._plan, offload._stats; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
