"""`offload bench report`: every figure of a result, and nothing that has failed left out."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from offload.cli import _bench_link, main
from offload.cli._bench_figures import figure

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = sorted((ROOT / "benches/results").glob("*.json"))


def spread(median: float) -> dict[str, Any]:
    return {"samples": [], "median": median, "p20": median / 2, "p80": 2 * median}


def step(tokens: int, seconds: float, **more: Any) -> dict[str, Any]:
    measured = {"step_s": spread(seconds), "tokens_per_s": tokens / seconds}
    return {"tokens": tokens, "micro_batches": tokens // 4096, **measured, **more}


def train(cap: float | None, **runs: Any) -> dict[str, Any]:
    model = {"size": "8b", "parameters": 7_000_000_000, "vocabulary": 32768, "device": "cuda:0"}
    model |= {"micro_batch_tokens": 8192, "sequence_tokens": 2048, "gradient_checkpointing": True}
    rates = {"to_host": 50e9, "host_memory_while_copying": 150e9}
    return {"name": "train", **model, "device_cap_gib": cap, "ceilings_bytes_per_s": rates, "runs": runs}


def run(*steps: dict[str, Any], peak: int | None = None, **more: Any) -> dict[str, Any]:
    return {"peak_device_bytes": peak, "losses": [], "steps": list(steps), **more}


OFFLOADED = {
    "step_over_resident": 1.25,
    "bound": {"compute_s": 1.0, "host_update_s": 1.5},
    "bound_by": "host_update_s",
    "share_of_bound": 0.75,
    "share_of_link": {"to_host": 0.5, "to_device": 0.25},
    "hidden_share": 0.875,
}
PLACES = {"places": {"optimizer": "host"}}
LINK = {
    "device": "cuda:0",
    "rows": [
        {"mode": mode, "bytes": size, "gb_per_s": {"lanes": spread(48.0), "raw": spread(50.0)}, "share_of_raw": 0.96}
        for mode in ("to_host", "to_device", "both")
        for size in (65536, 262144)
    ],
    "small": [{"mode": "to_device", "bytes": 4096, "gb_per_s": {"batches": spread(3.0), "raw": spread(4.0)}}],
    "submission_us": {"lanes": {"to_host": spread(5.0)}},
    "host_memory": [
        {"copies": None, "gb_per_s": 160.0, "copies_gb_per_s": None},
        {"copies": "both", "gb_per_s": 125.0, "copies_gb_per_s": spread(88.0)},
    ],
}
STEP = [
    figure("step", "s", spread(2.0)),
    figure("update", "s", spread(3.0)),
    figure("compute", "s", spread(1.0), side="ceiling"),
    figure("hooks", "us", spread(9.0)),
]
CONDITIONS = {
    "seconds": 12.0,
    "load_average": {"before": 0.25, "after": 2.0},
    "cpu_mhz": {"before": {"min": 2000.0, "median": 2600.0, "max": 2700.0}, "after": None},
    "others_cpus": 0.5,
    "stolen_cpus": 0.0,
    "gpu": {
        "source": "nvml",
        "before": {},
        "after": {},
        "during": {
            "samples": 11,
            "sm_mhz": {"min": 1410, "median": 1980, "max": 1980},
            "power_w": None,
            "limited_by": ["power cap"],
            "throttled_share": 0.25,
        },
    },
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The tiny model gains nothing by more, and a busy machine makes torch's threads wait for each other."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


@pytest.fixture
def acceptance(tmp_path: Path) -> Path:
    def section(part: str, result: Any, state: str = "done", **more: Any) -> dict[str, Any]:
        return {"state": state, "seconds": 12.0, "bench": {"results": {part: result}}, **more}

    ours = train(
        None,
        compute=run(step(8192, 1.0)),
        resident=run(step(8192, 1.6), step(16384, 3.0), peak=108 << 30, **PLACES),
        **{"optimizer+gradients": run(step(8192, 2.0, **OFFLOADED), peak=20 << 30, **PLACES)},
    )
    capped = train(24, **{"optimizer+gradients+params": run(step(8192, 9.0), peak=23 << 30, **PLACES)})
    largest = {
        "parameters": 14_000_000_000,
        "layers": 66,
        "places": {"optimizer": 0.5},
        "device_budget_bytes": 100 << 30,
    }
    largest |= {"host_budget_bytes": 110 << 30, "plan": {"device": {"weights": 2 << 30}, "host": {"weights": 27 << 30}}}
    report = {
        "schema_version": 1,
        "kind": "acceptance",
        "environment": {"date": "2026-11-21", "accelerator": "NVIDIA H200", "commit": "abc", "dirty": False},
        "sections": {
            "tests": {
                "state": "failed",
                "seconds": 400.0,
                "tests": {"passed": 900, "skipped": 1, "failed": 1, "not_passed": ["test_x::test_y[cuda]"]},
            },
            "link": section("link", LINK | {"figures": _bench_link.figures(LINK), "conditions": CONDITIONS}),
            "step": section("step", {"figures": STEP, "conditions": CONDITIONS | {"gpu": None}}),
            "pool": {"state": "stopped", "seconds": 40.0, "output": "mapping\nkilled | at last\n"},
            "train-8b": section("train", ours | {"losses_equal_resident": False}, "failed", output="losses"),
            "capped-8b": section("train", capped | {"losses_equal_resident": True}),
            "peers-8b-fsdp2": section("train", train(None, fsdp2=run(step(8192, 8.0), precision="fp32 masters"))),
            "peers-8b-torchao": section("train", train(None, torchao={"unavailable": "No module named 'torchao'"})),
            "largest": section("largest", largest | {"does_not_fit": "tried to allocate 1 GiB"}),
        },
    }
    path = tmp_path / "card.json"
    path.write_text(json.dumps(report))
    return path


def test_an_acceptance_report_shows_all_of_it(acceptance: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "report", str(acceptance)]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line in (
        "# card",
        "date 2026-11-21, accelerator NVIDIA H200, commit abc, dirty False",
        "| tests | failed | 400.0 | 900 passed, 1 skipped, 1 failed; test_x::test_y[cuda] |",
        "| pool | stopped | 40.0 | killed \\| at last |",
        "| lanes, to_host, 64 KiB | 48 | 24 | 96 | GB/s | 0.960 of raw copies |  |",
        "| raw, to_host, 64 KiB (ceiling) | 50 | 25 | 100 | GB/s |  |  |",
        "| small copies, batches, to_device, 4 KiB | 3 | 1.5 | 6 | GB/s | 0.750 of raw copies |  |",
        "| none | 160 | - |",
        "| both | 125 | 88 (44 to 176) |",
        "| submission, lanes, to_host | 5 | 2.5 | 10 | us |  |  |",
        "Measured in 12 s. CPU clock 2,600 MHz. Load average 0.2 before, 2.0 after. **Other processes used 0.5 CPUs.** "
        "**The GPU was throttled in 25% of samples.** GPU clock 1,410 to 1,980 MHz in 11 samples of nvml, limited by "
        "power cap.",
        "Ceilings, GB/s: to_host 50.0, host_memory_while_copying 150.0.",
        "| resident | 16,384 | 3 (1.5 to 6) | 5,461 | - | - | - | - | - | - | - | 108.0 |",
        "| optimizer+gradients | 8,192 | 2 (1 to 4) | 4,096 | 0.800 | 1.5000 | host_update | 1.33 | 0.50 | 0.25 | 0.88 "
        "| 20.0 |",
        "Losses of placements and resident: **NOT EQUAL**.",
        "| torchao |  | unavailable: No module named 'torchao' |" + "  |" * 9,
        "fsdp2: fp32 masters.",
        "Not trained: tried to allocate 1 GiB.",
        # Beside FSDP2 at the same tokens; what ran in 24 GiB of the card does not compete.
        "| peer | model | tokens | its tokens/s | resident, times as fast | optimizer+gradients, times as fast "
        "| optimizer+gradients+params, times as fast |",
        "| fsdp2 | 8b | 8,192 | 1,024 | 5.00 | 4.00 | - |",
        "| torchao | 8b |  | unavailable: No module named 'torchao' |  |  |  |",
    ):
        assert line in lines, line
    widths = [line.count(" | ") for line in lines if line.startswith("| optimizer+gradients |") or " step s |" in line]
    assert len(set(widths)) == 1, "a row is as wide as its header"


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_results_are_read(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.md"
    assert main(["bench", "report", str(path), "--out", str(out)]) == 0
    report, text = json.loads(path.read_text()), out.read_text()
    assert f"# {path.stem}\n" in text and report["environment"]["cpu"] in text
    (part,) = report["results"]
    assert f"## {part}\n" in text and text.count("\n| ") > 5


def test_a_real_result_of_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "train.json"
    sizes = ["--steps", "1", "--tokens", "32", "--beside", "resident"]
    assert main(["bench", "train", "--quick", "--device", "cpu", *sizes, "--json", str(path)]) == 0
    capsys.readouterr()
    other = path.with_name("other.json")
    other.write_bytes(path.read_bytes())
    assert main(["bench", "report", str(path), str(other)]) == 0
    text = capsys.readouterr().out
    assert text.count("| optimizer+gradients | 32 | ") == 2 and "equal bit for bit" in text and "**quick**" in text


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema_version": 3, "results": {}}', '{"schema_version": 1}'])
def test_a_file_that_no_bench_wrote_is_named(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    assert main(["bench", "report", str(path)]) == 2
    assert str(path) in capsys.readouterr().err
    assert main(["bench", "report", str(tmp_path / "none.json")]) == 2


class Recorder:
    """A Figure and its Axes: what was drawn, by image."""

    images: ClassVar[dict[str, Any]] = {}

    def __init__(self, **_: Any) -> None:
        self.lines: dict[str, tuple[list[float], list[float]]] = {}

    def subplots(self) -> Recorder:
        return self

    def barh(self, places: list[int], medians: list[float], *, xerr: Any, label: str, **_: Any) -> None:
        self.lines[label] = (medians, xerr)

    def plot(self, x: list[float], y: list[float], _style: str, *, label: str, **_: Any) -> None:
        self.lines[label] = (x, y)

    def savefig(self, path: Path, **_: Any) -> None:
        Recorder.images[path.name] = self.lines

    def __getattr__(self, _name: str) -> Any:
        return self

    def __call__(self, *_: Any, **__: Any) -> None:
        """Everything else that is asked of it, it does."""


def test_plots_show_medians(acceptance: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recorder, "images", {})
    figures = {"Figure": Recorder, "Axes": Recorder}
    for name in ("matplotlib", "matplotlib.axes", "matplotlib.figure"):
        module = types.ModuleType(name)
        module.__dict__.update(figures)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "offload.cli._report_plots", raising=False)
    out = tmp_path / "report.md"
    try:
        assert main(["bench", "report", str(acceptance), "--out", str(out), "--plots", str(tmp_path / "plots")]) == 0
    finally:
        sys.modules.pop("offload.cli._report_plots", None)  # it has the recorder
    assert list(Recorder.images) == ["card-link.png", "card-step.png", "card-train-8b-32768-8192.png"]
    link, bars, lines = Recorder.images.values()
    # Of the unit that most figures have; whiskers go from p20 to p80.
    assert bars == {"ours": ([2.0, 3.0], ([1.0, 1.5], [2.0, 3.0])), "ceiling": ([1.0], ([0.5], [1.0]))}
    assert link["both, lanes"] == ([64, 256], [48, 48]) and len(link) == 6
    assert lines["resident"] == ([8192, 16384], [5120, pytest.approx(5461.3, abs=0.1)])
    assert lines["fsdp2"] == ([8192], [1024]) and "compute" not in lines
    assert out.read_text().count("![card-") == 3


def test_plots_without_matplotlib_say_what_is_missing(
    acceptance: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    monkeypatch.delitem(sys.modules, "offload.cli._report_plots", raising=False)
    assert main(["bench", "report", str(acceptance), "--plots", str(tmp_path / "plots")]) == 2
    assert "matplotlib" in capsys.readouterr().err
