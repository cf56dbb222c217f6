"""Who owns which bytes: the summary agrees with torch's allocator, the pool's counters and the plan."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import offload
from offload import _activations
from offload._engine_stats import allocator_bytes
from offload._memory import MemoryRow, MemorySummary, summarize
from offload.cli import main
from test_memory import Allocations
from training import HOST, RESIDENT, batches, loss_of, make_model

pytestmark = [pytest.mark.usefixtures("device", "disk_calls"), pytest.mark.cpu_only]

BLOCK = 256
ALIGNMENT = 4 * 4096  # of frames that the disk reads into
PLACEMENTS: dict[str, dict[str, Any]] = {
    "device": RESIDENT,
    "host": HOST,
    "gradients on the device": {"optimizer": "host", "gradients": "device"},
    "a share": {"optimizer": 0.5, "gradients": "device"},
    "params": HOST | {"params": "host"},
    "activations": HOST | {"params": "host", "activations": 0.5},
    "disk": HOST | {"optimizer": "disk", "host_budget": "4MiB"},
    "all on disk": HOST | {"optimizer": "disk", "params": "disk", "host_budget": "4MiB"},
    "unified": {"optimizer": "unified", "gradients": "device"},
}


def wrapped(dtype: torch.dtype, tmp_path: Path, options: dict[str, Any]) -> tuple[Any, offload.OffloadOptimizer]:
    model = make_model(dtype, width=48)
    disk = {"disk_path": str(tmp_path), "disk_block": 4096} if "disk" in options.values() else {}
    return offload.wrap(model, torch.optim.AdamW(model.parameters()), **options, **disk)


def all_rows(summary: MemorySummary) -> list[MemoryRow]:
    tiers = [[*tier.rows, tier.total, *tier.beside] for tier in summary.tiers]
    return [*(row for rows in tiers for row in rows), summary.process, *summary.allocator]


@pytest.mark.parametrize("options", PLACEMENTS.values(), ids=PLACEMENTS)
def test_sums_are_those_of_the_allocator_and_of_the_pools(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_activations, "MIN_BYTES", 1)  # the model is small
    with Allocations() as allocations:
        model, optimizer = wrapped(torch.bfloat16, tmp_path, options)
        for tokens in batches(3):
            loss_of(model, tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
        loss_of(model, tokens).backward()
        optimizer.synchronize()
        # What landed leaves the ring when the next copy enters it.
        optimizer._engine.lanes.to_host(torch.zeros(1)).ticket.wait()
        summary = optimizer.memory_summary()
    engine = optimizer._engine
    pools = [engine.pool.stats()] + ([engine.activations.pool_stats()] if engine.activations else [])

    host, device = summary.tier("host"), summary.tier("device")
    assert host.total.now == sum(row.now for row in host.rows) == sum(pool["used_bytes"] for pool in pools)
    assert host.total.peak == sum(pool["peak_used_bytes"] for pool in pools) <= sum(row.peak for row in host.rows)
    assert host.beside[0].now == sum(pool["mapped_bytes"] for pool in pools)
    assert device.total.now == sum(row.now for row in device.rows)
    # The batch, its loss and scalars of a step are not ours; everything else that torch's allocator gave out is.
    assert abs(allocations.left - device.total.now) < 2048, (allocations.left, str(summary))
    for row in all_rows(summary):
        assert row.peak >= row.now >= 0, row
    assert json.loads(json.dumps(summary.to_dict()))["tiers"]["host"]["total"]["now"] == host.total.now


def assert_as_planned(summary: MemorySummary, parameter_count: int) -> None:
    """Every planned row at its peak: exact where bytes are counted as they are, within blocks where those are whole."""
    blocks = {"device": 0, "host": 3 * BLOCK * parameter_count, "disk": 3 * 4096 * parameter_count}
    for tier in summary.tiers:
        for row in tier.rows:
            if row.owner == "window":  # its plan has room for what its frames are aligned to
                assert row.planned is not None and row.planned - ALIGNMENT <= row.peak <= row.planned
            elif row.planned is not None:
                assert row.planned <= row.peak <= row.planned + blocks[tier.name], (tier.name, row)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", [name for name in PLACEMENTS if name not in ("params", "activations", "all on disk")])
def test_the_peak_is_what_the_plan_said(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, optimizer = wrapped(dtype, tmp_path, PLACEMENTS[name])
    for tokens in batches(2):
        loss_of(model, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.synchronize()
    assert_as_planned(optimizer.memory_summary(), len(list(model.parameters())))


@pytest.mark.parametrize("name", ["params", "all on disk"])
def test_streamed_weights_stay_within_what_the_plan_said(name: str, tmp_path: Path) -> None:
    model, optimizer = wrapped(torch.bfloat16, tmp_path, PLACEMENTS[name])
    padding = BLOCK * len(list(model.parameters()))  # each begins at a multiple of it
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    loss_of(model, next(batches(1))).backward()
    summary = optimizer.memory_summary()
    on_device = {row.owner: row for row in summary.tier("device").rows}["weights"]
    assert on_device.planned is not None and on_device.now < on_device.peak <= on_device.planned + padding < weights
    on_host = {row.owner: row for row in summary.tier("host").rows}["weights"]
    aligned = ALIGNMENT if name == "all on disk" else 0
    assert on_host.planned is not None and on_host.planned - aligned <= on_host.now <= on_host.planned + padding
    assert ("whole blocks" in str(summary)) == (name == "all on disk")
    if name == "all on disk":
        on_disk = {row.owner: row for row in summary.tier("disk").rows}
        assert on_disk["weights"].planned == weights <= on_disk["weights"].now
        assert sum(row.now for row in on_disk.values()) == optimizer.stats().disk["allocated_bytes"]


def test_activations_are_counted_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_activations, "MIN_BYTES", 1)
    model, optimizer = wrapped(torch.float32, tmp_path, HOST | {"activations": 0.5})
    loss = loss_of(model, next(batches(1)))
    saved = optimizer.stats().activations
    rows = {tier.name: {row.owner: row for row in tier.rows} for tier in optimizer.memory_summary().tiers}
    assert rows["device"]["activations"].now == saved["saved_bytes"] - saved["offloaded_bytes"] > 0
    assert saved["offloaded_bytes"] <= rows["host"]["activations"].now
    assert rows["device"]["activations"].peak < saved["saved_bytes"]
    loss.backward()
    rows = {tier.name: {row.owner: row for row in tier.rows} for tier in optimizer.memory_summary().tiers}
    assert rows["device"]["activations"].now == rows["host"]["activations"].now == 0
    assert rows["host"]["activations"].peak >= saved["offloaded_bytes"]


def test_activations_that_the_host_refuses_are_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_activations, "MIN_BYTES", 1)
    model, optimizer = wrapped(torch.float32, tmp_path, HOST | {"activations": "4KiB"})
    loss = loss_of(model, next(batches(1)))
    saved = optimizer.stats().activations
    assert saved["refused_bytes"] > 0
    rows = {row.owner: row for row in optimizer.memory_summary().tier("device").rows}
    assert rows["activations"].now == saved["saved_bytes"] - saved["offloaded_bytes"]
    del loss
    rows = {row.owner: row for row in optimizer.memory_summary().tier("device").rows}
    assert rows["activations"].now == 0


def test_what_the_allocator_of_a_card_has(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")
    for place, name in enumerate(names):
        monkeypatch.setattr(torch.cuda, name, lambda device, place=place: 10 * device.index + place)
    found = allocator_bytes(torch.device("cuda", 3))
    assert found == {"allocated": {"now": 30, "peak": 31}, "reserved": {"now": 32, "peak": 33}}
    assert allocator_bytes(torch.device("cpu")) == {}


def test_states_of_torchs_own_lie_beside_the_pool() -> None:
    model = make_model()
    optimizer = torch.optim.RMSprop(model.parameters())
    model, wrapped_optimizer = offload.wrap(model, optimizer, optimizer="host", gradients="host")
    loss_of(model, next(batches(1))).backward()
    wrapped_optimizer.step()
    host = wrapped_optimizer.memory_summary().tier("host")
    assert {row.owner for row in host.beside} == {"obtained from the system", "states of torch's own"}
    states = sum(p.nbytes for p in model.parameters()) + 4 * len(list(model.parameters()))  # square_avg, and a step
    assert host.beside[1].now == states and host.total.now == sum(row.now for row in host.rows)


def test_torchs_own_figures_stand_beside_ours() -> None:
    model, optimizer = offload.wrap(model := make_model(), torch.optim.AdamW(model.parameters()), **HOST)
    allocator = {"allocated": {"now": 1 << 20, "peak": 3 << 20}, "reserved": {"now": 4 << 20, "peak": 4 << 20}}
    process = {"resident": 5 << 20, "peak_resident": 6 << 20}
    summary = summarize(optimizer.stats(), optimizer.plan, process=process, allocator=allocator)
    assert summary.to_dict()["allocator"]["allocated by torch"] == {"now": 1 << 20, "peak": 3 << 20}
    weights = sum(p.nbytes for p in model.parameters())
    assert summary.tier("device").total.now == weights
    assert f"{((1 << 20) - weights) / 1024:.2f} KiB of what torch has allocated now are not offload's" in str(summary)
    assert re.search(r"resident memory of this process +5.00 MiB +6.00 MiB", str(summary))
    with pytest.raises(KeyError):
        summary.tier("disk")


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ["--layers", "2", "--hidden", "64", "--length", "16", "--batch", "2", "--params", "host"]
    assert main(["memory", *tiny, "--json"]) == 0
    output = capsys.readouterr()
    report = json.loads(output.out)
    owners = report["tiers"]["device"]["owners"]
    assert report["measured_peak_device"]["bytes"] >= owners["weights"]["peak"] > 0
    assert report["tiers"]["host"]["total"]["peak"] <= report["tiers"]["host"]["total"]["planned"] * 1.2
    for words in ("device  ", "at most", "planned", "resident memory of this process", "in the first steps (torch."):
        assert words in output.err
