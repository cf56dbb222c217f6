"""`offload bench link`: what it reports, and that a figure for bytes that did not move cannot be reported."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from bench_results import bench_results
from offload.cli import main
from offload.cli._bench_copies import Copy, Link, Side, busy_link


def test_link_reports_every_size_and_direction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "result.json"
    assert main(["bench", "link", "--quick", "--json", str(path)]) == 0
    result = bench_results(path)["link"]
    assert [(row["mode"], row["bytes"]) for row in result["rows"]] == [
        (mode, 65536 * 4**power) for mode in ("to_host", "to_device", "both") for power in range(4)
    ]
    for row in result["rows"]:
        rates = row["gb_per_s"]
        assert {"lanes", "raw"} <= set(rates) and len(rates["raw"]["samples"]) == 3
        assert row["share_of_raw"] == rates["lanes"]["median"] / rates["raw"]["median"] > 0
    assert result["submission_us"]["lanes"]["to_host"]["median"] > 0
    assert [(row["mode"], row["bytes"]) for row in result["small"]] == [
        (mode, 4096 * 4**power) for mode in ("to_host", "to_device") for power in range(3)
    ]
    assert all(row["gb_per_s"]["batches"]["median"] > 0 for row in result["small"])
    assert [row["copies"] for row in result["host_memory"]] == [None, "to_host", "to_device", "both"]
    for row in result["host_memory"]:
        assert row["gb_per_s"] > 0
        assert (row["copies_gb_per_s"] is None) == (row["copies"] is None)
    assert result["pin_refusal"] is None and result["copies_together"] == "in one call"
    assert "of raw copies" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["to_host", "both"])
def test_a_busy_link_copies_until_the_end_and_counts_what_it_copied(mode: str) -> None:
    class Copier:
        copied = 0

        def submit(self, copies: Sequence[Copy]) -> None:
            self.copied += sum(copy.nbytes for copy in copies)

        def wait(self) -> None:
            if self.copied >= 10 * per_pass:
                enough.set()

    per_pass = 512 * (2 if mode == "both" else 1)
    enough, copier = threading.Event(), Copier()
    side = Side(copier, Link(torch.device("cpu"), 1024).sides["raw"].pairs)  # type: ignore[arg-type]
    with busy_link(side, mode, 512) as rates:
        assert enough.wait(60)
    assert copier.copied == len(rates) * per_pass and all(rate > 0 for rate in rates)


@pytest.mark.parametrize("name", ["lanes", "batches", "raw"])
def test_both_sides_move_the_bytes(name: str) -> None:
    Link(torch.device("cpu"), 1 << 16).sides[name].check()


@pytest.mark.parametrize("lane", ["to_host", "to_device"])
def test_a_side_that_leaves_bytes_behind_is_found(lane: str) -> None:
    honest = Link(torch.device("cpu"), 1 << 16).sides["raw"]

    class Lossy:
        def submit(self, copies: Sequence[Copy]) -> None:
            honest.copier.submit([c._replace(nbytes=c.nbytes - (c.lane == lane)) for c in copies])

        def wait(self) -> None:
            honest.copier.wait()

    with pytest.raises(AssertionError, match=f"Lossy left bytes of the lane {lane} behind"):
        Side(Lossy(), honest.pairs).check()  # type: ignore[arg-type]


def test_copies_stay_inside_their_own_buffers() -> None:
    side = Link(torch.device("cpu"), 1024).sides["lanes"]
    copies = side.copies("both", 256, 6)  # four fit, so two start over
    assert [copy.lane for copy in copies] == ["to_host", "to_device"] * 6
    for lane, (device, host) in side.pairs.items():
        destination, source = (host, device) if lane == "to_host" else (device, host)
        offsets = [256 * (index % 4) for index in range(6)]
        mine = [copy for copy in copies if copy.lane == lane]
        assert [copy.destination - destination.data_ptr() for copy in mine] == offsets
        assert [copy.source - source.data_ptr() for copy in mine] == offsets
    assert {copy.nbytes for copy in side.copies("to_host", 256, 6)} == {256}
