"""Known cards and their figures; what is given in the place of one of them; names that are not known."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

import offload
from offload import Hardware, InvalidArgument, _predict


@pytest.mark.parametrize("name", Hardware.PRESETS)
def test_every_preset_is_whole_and_says_where_its_figures_come_from(name: str) -> None:
    found = Hardware.preset(name)
    assert found.name == name and found.source.startswith("NVIDIA ") and found.kind == "cuda"
    assert {"mfu", "host_bytes", "host_bandwidth"} <= set(found.assumed) <= {f.name for f in dataclasses.fields(found)}
    # Figures in the wrong unit are off by a thousand: a card has 16 GiB to 1 TiB, 50 TFLOP/s to 5 PFLOP/s.
    assert 16 << 30 < found.device_bytes < 1 << 40 and 5e13 < found.flops < 5e15 and 0.3 <= found.mfu <= 0.7
    assert 1e13 < found.fp32_flops < found.flops
    assert 2e11 < found.device_bandwidth < 1e13 and 1e10 < found.to_host <= found.to_device < 1e12
    assert found.disk_write < found.disk_read < found.host_bandwidth < found.device_bandwidth
    assert found.rates.host_update == found.host_bandwidth and found.rates.device_update == found.device_bandwidth


def test_figures_of_a_card() -> None:
    found = Hardware.preset("h200")
    assert found.device_bytes == (143_771 - 512) << 20  # what nvidia-smi shows, less a context
    assert (found.flops, found.to_host, found.to_device) == (989e12, 53e9, 55e9)


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("H200", "h200"),
        ("rtx-4090", "4090"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("h100", "h100-80"),
        ("A100 40", "a100-40"),
    ],
)
def test_how_a_card_may_be_written(written: str, name: str) -> None:
    assert Hardware.preset(written).name == name


def test_an_unknown_card_is_refused_with_those_there_are() -> None:
    with pytest.raises(InvalidArgument, match=r"'4080' is not known: did you mean '4090'\? .*h200, h100-80"):
        Hardware.preset("4080")


def test_what_is_given_replaces_a_figure_and_is_no_assumption() -> None:
    card = Hardware.preset("4090")
    given = card.having(
        device_memory="20GiB",
        host_memory=64 << 30,
        link="pcie3x16",
        host_bandwidth="35GB/s",
        disk_bandwidth="7",
        mfu=0.5,
    )
    assert (given.device_bytes, given.host_bytes) == (20 << 30, 64 << 30)
    assert (given.to_host, given.to_device, given.host_bandwidth) == (12.5e9, 12.5e9, 35e9)
    assert (given.disk_read, given.disk_write, given.mfu) == (7e9, 7e9, 0.5) and given.assumed == ()
    assert card.having(link=11e9).to_host == 11e9 and card.having() == card


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"link": "fast"}, "link 'fast' is not understood.*nvlink-c2c"),
        ({"host_bandwidth": "much"}, "host_bandwidth 'much' is not understood: give GB/s"),
        ({"device_memory": "big"}, "size 'big' is not understood"),
        ({"mfu": 1.5}, "mfu is 1.5; give the share"),
        ({"mfu": 0.0}, "mfu is 0; give a positive number"),
        ({"disk_bandwidth": "-1"}, "disk_read is -1e[+]09"),
        ({"host_bandwidth": "nan"}, "host_bandwidth is nan"),
    ],
)
def test_figures_that_make_no_sense(options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        Hardware.preset("4090").having(**options)  # type: ignore[arg-type]


def test_a_product_is_timed_until_the_device_has_ended(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_predict, "_ROWS", {device.type: 64})
    waits: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    ticks = iter([0.0, 4.0, 10.0, 12.0, 20.0, 23.0, *(float(at) for at in range(30, 200, 10))])
    monkeypatch.setattr(_predict.time, "perf_counter", lambda: next(ticks))
    assert _predict._product_flops(device, torch.float32) == 2.0 * 64**3 / 2.0  # of the shortest
    assert waits == ([] if device.type == "cpu" else [device] * (1 + _predict._ROUNDS))


def test_this_machine_is_measured() -> None:
    found = offload.measure_hardware()
    assert found.kind == ("cuda" if torch.cuda.is_available() else "cpu") and re.match("measured", found.source)
    assert "host_bandwidth" not in found.assumed and "flops" not in found.assumed
    assert found.host_bytes > 0 and 1e8 < found.host_bandwidth < 1e13 and found.flops > 1e9
