"""`offload trace` and `offload bench trace`; never how fast."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import offload
from offload.cli import main

SMALL = ["--layers", "2", "--hidden", "64", "--length", "16", "--batch", "1", "--device", "cpu"]


def test_it_traces_the_demo_and_reads_the_trace_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, page, again = (tmp_path / name for name in ("trace.json", "trace.html", "again.html"))
    assert main(["trace", *SMALL, "--steps", "3", "--out", str(trace), "--html", str(page), "--json"]) == 0
    output = capsys.readouterr()
    report = json.loads(output.out)
    assert report["steps"] == 2 and report["micro_batches"] == 2
    assert report["lanes"]["to_host"]["kinds"]["gradients"] > 0
    assert report["models"][0]["optimizer"] == "host"
    assert str(trace) in output.err and report["verdict"] in output.out
    assert "<canvas" not in page.read_text() and "traceEvents" in trace.read_text()

    assert main(["trace", "report", str(trace), "--html", str(again)]) == 0
    text = capsys.readouterr().out
    assert report["verdict"] in text and "2 steps of 2 micro-batches" in text
    assert again.read_text().startswith("<!doctype html>")


def test_a_trace_is_joined_with_a_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with offload.trace(tmp_path / "trace.json") as trace:
        pass
    at_us = (trace.data.begin_ns + trace.data.realtime_offset_ns) / 1000
    profile = {"traceEvents": [{"ph": "X", "name": "theirs", "ts": at_us, "dur": 1.0}]}
    (tmp_path / "profile.json").write_text(json.dumps(profile))
    arguments = ["trace", "report", str(tmp_path / "trace.json"), "--profiler", str(tmp_path / "profile.json")]
    assert main(arguments) == 2
    assert "--out" in capsys.readouterr().err
    assert main([*arguments, "--out", str(tmp_path / "both.json")]) == 0
    both = json.loads((tmp_path / "both.json").read_text())
    assert {"theirs", "process_name"} <= {event["name"] for event in both["traceEvents"]}


def test_a_file_that_is_no_trace_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "report", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err


def test_the_bench_reports_both_overheads(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    assert main(["bench", "trace", "--quick", "--device", "cpu", "--json", str(path)]) == 0
    result = json.loads(path.read_text())["results"]["trace"]
    assert len(result["overhead"]["samples"]) == 3 and len(result["added_us_per_unit"]["samples"]) == 4
    for share in (result["overhead"], result["cpu_overhead"]):
        low, high = share["median_between"]
        assert low <= share["median"] <= high and share["target"] == 0.01
    assert len(result["recording_share"]["samples"]) == 3 and 0 < result["recording_share"]["median"] < 1
    expected = result["added_us_per_unit"]["median"] * 1e-6 * result["units"] / result["off_step_s"]["median"]
    assert result["reckoned_overhead"] == pytest.approx(expected)
