"""The page of a trace: it renders in a browser that has no network, and says what the report says."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from offload._trace_page import page
from offload._trace_records import ClockSample, MemorySample, Span, TraceData
from offload._trace_report import analyse

MS = 1_000_000
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# It asks nothing of a network, and writes to its own new directory alone.
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    "--window-size=1280,1400",
)  # fmt: skip


def hand_made(name: str = "blocks.0") -> TraceData:
    spans = []
    for at in (0, 100 * MS, 200 * MS):
        spans += [
            Span("step", f"step {at}", at, at + 100 * MS),
            Span("phase", "forward", at, at + 40 * MS),
            Span("compute", name, at, at + 40 * MS),
            Span("wait", name, at, at + 20 * MS, kind="update"),
            Span("host_update", f"{name}.weight", at, at + 30 * MS, 4096),
            Span("to_host", name, at + 50 * MS, at + 60 * MS, 2**20, "gradients"),
        ]
    return TraceData(
        0,
        300 * MS,
        0,
        tuple(spans),
        memory=(MemorySample("host", "master", 0, 2**30), MemorySample("device", "weights", 5, 2**20)),
        clocks=tuple(ClockSample(at, "cuda:0", 1200, 1980, ("power cap",)) for at in range(3)),
        models=({"device": "cpu", "optimizer": "host", "master": "split", "moments": "fp32", "trainable_count": 9},),
        lost_count=7,
        recording_ns=6 * MS,
    )


def test_the_page_asks_nothing_of_a_network() -> None:
    data = hand_made()
    text = page(data, analyse(data))
    assert not re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?\s*(?:https?:|//)""", text)
    assert "default-src 'none'" in text  # nor could it
    assert html.escape(analyse(data).verdict) in text  # also where no script runs


def test_names_of_units_cannot_leave_the_data() -> None:
    data = hand_made("</script><b>")
    text = page(data, analyse(data))
    assert "</script><b>" not in text and "<\\/script><b>" in text


def test_a_long_trace_shows_its_last_steps() -> None:
    steps = [Span("step", str(at), at, at + 10) for at in range(0, 40, 10)]
    many = [Span("to_host", "p", at, at + 1, 1) for at in range(40) for _ in range(4000)]
    data = TraceData(0, 40, 0, tuple(sorted([*steps, *many], key=lambda span: span.begin_ns)))
    text = page(data, analyse(data))
    shown = int(re.search(r'"hidden_spans":(\d+)', text)[1])  # type: ignore[index]
    assert shown == 2 + 2 * 40_000


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium: apt-get install chromium, or your system's like of it")
def test_it_renders(tmp_path: Path) -> None:
    data = hand_made()
    report = analyse(data)
    assert report.advice is not None
    path = tmp_path / "trace.html"
    path.write_text(page(data, report))
    assert CHROMIUM is not None
    done = subprocess.run(
        [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()],
        capture_output=True,
        encoding="utf-8",
        timeout=100,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    dom = html.unescape(done.stdout)
    assert report.verdict in dom
    # What only the script puts there: a track a lane with its drawing, a row a tier, the advice and the warnings.
    body = dom[: dom.index('id="data"')]
    for lane in ("step", "phase", "compute", "wait", "host_update", "to_host"):
        assert f'data-lane="{lane}"' in body
    for tier in ("host", "device"):
        assert f'data-tier="{tier}"' in body
    assert body.count("<canvas") == 6 + 2 + 2  # and two axes
    assert report.advice.setting in body and "7 records were lost" in body and "power cap" in body
    assert "20.00 ms" in body and "exposed: host optimizer" in body
    assert "of it the trace's own hooks</td><td>2.00 ms</td><td>2 %</td>" in body
    assert "of 300.00 ms" in body  # written when everything was drawn
