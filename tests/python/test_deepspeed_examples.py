"""The examples that are written for DeepSpeed: they run, learn, and go on from a checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

from programs import Programs

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(programs: Programs, name: str, *arguments: str) -> str:
    ended = programs.run_script(EXAMPLES / f"{name}.py", *arguments)
    assert ended.status == 0, ended.err
    return ended.out


def test_each_needs_one_changed_import() -> None:
    for path in EXAMPLES.glob("deepspeed_*.py"):
        imports = re.findall(r"^(?:import|from) .*\boffload\b.*", path.read_text(), re.MULTILINE)
        assert imports == ["import offload.deepspeed as deepspeed"]
        assert path.with_suffix(".json").is_file()


def test_images(programs: Programs) -> None:
    out = run(programs, "deepspeed_cifar", "--deepspeed", "--deepspeed_config", str(EXAMPLES / "deepspeed_cifar.json"))
    losses = [float(loss) for loss in re.findall(r"epoch \d: loss ([\d.]+)", out)]
    assert losses[1] < losses[0]
    accuracy = re.search(r"accuracy ([\d.]+)% after 64 steps", out)
    assert accuracy is not None and float(accuracy[1]) > 50  # ten classes


def test_a_language_model_that_is_stopped_and_goes_on(tmp_path: Path, programs: Programs) -> None:
    def steps(out: str) -> dict[int, str]:
        return {int(step): rest for step, rest in re.findall(r"^step (\d+): (.*)$", out, re.MULTILINE)}

    whole = steps(run(programs, "deepspeed_language_model", "--num_iterations", "20"))
    first = run(programs, "deepspeed_language_model", "--num_iterations", "10", "--checkpoint_dir", str(tmp_path))
    second = run(programs, "deepspeed_language_model", "--num_iterations", "10", "--checkpoint_dir", str(tmp_path))
    assert "a new run" in first and "resumed from" in second
    assert sorted(whole) == [10, 20]
    assert {**steps(first), **steps(second)} == whole
    assert (tmp_path / "pytorch_model.bin").is_file()
