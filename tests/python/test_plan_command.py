"""`offload plan`: what it is asked about, what it prints, its JSON, its exit codes."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import offload
from offload.cli import _plan, _progress, main

# As published; the model has 8,030,261,248 parameters.
LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
SMALL = ["plan", "--layers", "2", "--hidden", "256", "--vocabulary", "1000"]
QUICK = ["--batch", "1", "--length", "128"]
NEW_USER = ["plan", "--params", "8e9", "--layers", "32", "--hidden", "4096", "--hardware", "4090"]


@pytest.fixture
def llama_3_8b(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_8B))
    return tmp_path


@pytest.fixture
def no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of something else: the search for the largest model plans some thirty."""
    monkeypatch.setattr(_plan, "_largest", lambda *_: [])


def reported(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    return capsys.readouterr().err


def test_help_names_every_preset_and_imports_no_torch() -> None:
    code = (
        "import sys\nfrom offload.cli import main\n"
        "try:\n    main(['plan', '--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "sys.exit('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    words = "".join(result.stdout.split())  # names are broken at the end of lines
    for name in (*offload.Hardware.PRESETS, *offload.Hardware.LINKS, *offload.Hardware.INTERCONNECTS):
        assert name in words
    assert "exit codes: 0 it fits, 2 nothing fits" in result.stdout


@pytest.mark.usefixtures("no_search")
@pytest.mark.parametrize("what", [".", "config.json"])
def test_a_hugging_face_config(llama_3_8b: Path, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    found = reported(capsys, "plan", str(llama_3_8b / what), "--hardware", "h200", *QUICK)
    assert found["trainable_count"] == 8_030_261_248 and found["resident_bytes"] == 16 * 8_030_261_248
    assert found["model"] == "LlamaForCausalLM, layers 32, hidden 4,096, vocabulary 128,256"
    assert found["notes"] == []


@pytest.mark.usefixtures("no_search")
def test_the_shape_of_llama_is_llama_3_8b(capsys: pytest.CaptureFixture[str]) -> None:
    assert reported(capsys, *NEW_USER[:1], *NEW_USER[3:], *QUICK)["trainable_count"] == 8_030_261_248
    assert reported(capsys, *NEW_USER, *QUICK)["trainable_count"] == pytest.approx(8e9, rel=1e-4)
    by_count_alone = reported(capsys, "plan", "--params", "70B", "--hardware", "b200", "--host-memory", "2TiB", *QUICK)
    assert by_count_alone["trainable_count"] == pytest.approx(70e9, rel=1e-3)


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = reported(capsys, *SMALL, "--hardware", "4090", "--tokens", "128", "512", "--length", "128")
    assert found["schema_version"] == 1
    assert set(found) == {
        "schema_version", "model", "dtype", "optimizer_class", "moments", "master", "activation_format", "notes",
        "hardware", "gpus", "interconnect", "trainable_count", "frozen_count", "length", "checkpointing",
        "device_capacity", "host_capacity", "resident_bytes", "rule_of_thumb_bytes", "sequence_bytes", "plan",
        "refusal", "placements", "cheapest", "steps", "fastest", "largest",
    }  # fmt: skip
    assert found["plan"]["optimizer"] == "device" and found["refusal"] is None and found["cheapest"] == 0
    placed = found["placements"][0]
    assert set(placed) == {"options", "device", "host", "disk", "refusal", "kept"}
    assert sum(placed["device"].values()) == found["resident_bytes"]
    step = found["steps"][found["fastest"][0]]
    assert set(step) == {
        "batch", "tokens", "micro_batches", "placement", "activation_bytes", "activation_host_bytes",
        "activation_sent_bytes", "device_bytes", "seconds", "tokens_per_s", "bound_by", "busy", "exposed",
        "clipped_seconds", "ahead",
    }  # fmt: skip
    assert [found["steps"][number]["batch"] for number in found["fastest"]] == [1, 4]
    assert found["hardware"]["name"] == "4090" and "mfu" in found["hardware"]["assumed"]
    kept = [row["kept"] for row in found["largest"]]
    counts = [row["parameters"] for row in found["largest"]]
    assert kept == ["nothing offloaded", "all on the host", "states and weights on disk"]
    assert 0 < counts[0] < counts[1] < counts[2]


def test_the_largest_model_fits_and_a_deeper_one_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    from offload.cli._plan_model import decoder_of_depth

    found = reported(capsys, *SMALL, "--hardware", "3090", *QUICK)
    hardware, row = offload.Hardware.preset("3090"), found["largest"][1]
    places: dict[str, Any] = dict.fromkeys(("optimizer", "gradients", "params"), "host")
    model = decoder_of_depth(row["layers"], 1000, torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == row["parameters"]
    offload.estimate(model, hardware=hardware, **places)
    with pytest.raises(offload.OutOfHostMemory):
        offload.estimate(decoder_of_depth(row["layers"] + 1, 1000, torch.bfloat16), hardware=hardware, **places)


def test_a_new_user_reads_the_answer_first(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(_progress, "_FIRST_S", math.inf)  # on a slow machine too
    monkeypatch.setenv("COLUMNS", "120")
    assert main(NEW_USER) == 0
    output = capsys.readouterr()
    assert output.err == ""
    first, empty, *lines = output.out.splitlines()
    assert first == "It fits, with 97% of the optimizer and gradients off the device." and empty == ""
    for line, (name, words) in zip(
        lines,
        [
            ("write", r"offload\.wrap\(model, optim\)"),
            ("speed", r"about [\d,]+ tokens/s, a step of 8,192 tokens in \d+\.\d\d s"),
            ("bound", r"by compute, busy \d+% of the step; compute waits for host update \d\.\d\d s"),
            ("faster", r"offload\.wrap\(model, optim, optimizer='host', gradients='host', params='host'\)"),
            ("speed", r"about [\d,]+ tokens/s, a step of 8,192 tokens in \d+\.\d\d s"),
            ("bound", r"by compute, busy \d+% of the step; compute waits for host update \d\.\d\d s"),
        ],
        strict=False,
    ):
        assert re.fullmatch(f"{name:<6}  {words}", line)
    text = "\n".join(lines)
    for words in (
        "8.7 billion",
        "the rule of thumb of 40 GB a billion",
        "* assumed: --mfu",
        "host update",
        "needs     119.2",
    ):
        assert words in text
    assert max(map(len, lines)) <= 120


@pytest.mark.usefixtures("no_search")
def test_the_call_has_the_options_that_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    small = [*SMALL, "--hardware", "4090", *QUICK]
    assert main([*small, "--moments", "int8", "--master", "bf16"]) == 0
    written = capsys.readouterr().out.splitlines()[2]
    assert written == "write  offload.wrap(model, optim, moments='int8', master='bf16')"
    assert main([*small, "--gpu-memory", "8MiB", "--host-memory", "20MiB"]) == 0
    assert capsys.readouterr().out.splitlines()[2] == "write  offload.wrap(model, optim, disk_path=DIRECTORY)"


@pytest.mark.usefixtures("no_search")
def test_activations_leave_where_nothing_else_fits(capsys: pytest.CaptureFixture[str]) -> None:
    """A sequence of which each of the blocks keeps 64 MiB, and a card that does not hold all of them."""
    deep = ["plan", "--layers", "8", "--hidden", "128", "--vocabulary", "16", "--hardware", "4090", "--batch", "1"]
    deep += ["--length", str(1 << 18)]
    needed = reported(capsys, *deep)
    memory = needed["resident_bytes"] + needed["sequence_bytes"] - (128 << 20)
    deep += ["--gpu-memory", str(memory)]
    found = reported(capsys, *deep)
    assert found["placements"][found["cheapest"]]["options"]["activations"] == "checkpoints"
    assert found["plan"]["activations"] == "device"
    assert main(deep) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith(
        "It fits, with checkpoints off the device. write offload.wrap(model, optim, optimizer='device', "
        "gradients='device', params='device', activations='checkpoints') speed"
    )
    assert "note offload.wrap(model, optim) leaves no room for the activations of 262,144 tokens" in text
    row = found["cheapest"] - len(found["placements"]) // 2 + 1
    assert f"#{row} with activations that leave is the least offloading that fits. A step is one of 262,144" in text
    assert re.search(rf" {row} device device device [\d.]+ - - no room [\d.]+ m?s ", text)


@pytest.mark.usefixtures("no_search")
def test_activations_in_a_byte_an_element_leave_everywhere(capsys: pytest.CaptureFixture[str]) -> None:
    small = [*SMALL, "--hardware", "4090", *QUICK]
    for more, place in (([], "checkpoints"), (["--no-checkpointing"], "host")):
        exact, found = (reported(capsys, *small, *more, *form) for form in ([], ["--activation-format", "int8"]))
        assert found["activation_format"] == "int8" and exact["activation_format"] == "exact"
        assert {placed["options"]["activations"] for placed in found["placements"]} == {place}
        half = [step["activation_sent_bytes"] for step in found["steps"]]
        whole = [step["activation_sent_bytes"] for step in exact["steps"] if step["activation_sent_bytes"]]
        assert len(half) == len(whole) and all(0 < 2 * one < 1.1 * two for one, two in zip(half, whole, strict=True))
        assert main([*small, *more, "--activation-format", "int8"]) == 0
        text = capsys.readouterr().out
        written = f"write  offload.wrap(model, optim, activations='{place}', activation_format='int8')"
        assert text.splitlines()[2] == written
        assert f"whose activations leave (`activations='{place}'`)" in text and " stay " not in text
        assert "adamw, activations int8, sequences" in text


@pytest.mark.usefixtures("no_search")
def test_updates_in_backward_are_shown_where_they_help(capsys: pytest.CaptureFixture[str]) -> None:
    """Where the device has no room for states, the host has some, and the update is what a step waits for."""
    model = [*NEW_USER[:-1], "h200", "--gpu-memory", "40GiB", "--batch", "4"]
    found = reported(capsys, *model, "--host-memory", "400GiB")
    best = min((s for s in found["steps"] if s["ahead"]), key=lambda step: step["ahead"]["seconds"])
    options = found["placements"][best["placement"]]["options"]
    assert (options["gradients"], options["params"]) == ("host", "device")
    ahead = best["ahead"]
    assert ahead["seconds"] < 0.98 * best["seconds"] < best["seconds"] < ahead["clipped_seconds"]
    gib = math.ceil(ahead["backup_bytes"] / 2**30)
    words = f"#{best['placement'] + 1} with `speculate='{gib}GiB'` 8,192 tokens in {ahead['seconds']:.2f} s"
    assert main([*model, "--host-memory", "400GiB"]) == 0
    assert words in " ".join(capsys.readouterr().out.split())
    # The states alone fill this host.
    found = reported(capsys, *model, "--host-memory", "118GiB")
    assert found["steps"] and all(step["ahead"] is None for step in found["steps"])


@pytest.mark.usefixtures("no_search")
def test_on_a_terminal_tables_are_drawn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert main([*SMALL, "--hardware", "4090", *QUICK]) == 0
    drawn = capsys.readouterr().out
    assert "───" in drawn and "Where it can be" in drawn and "device" in drawn
    monkeypatch.setitem(sys.modules, "rich.console", None)  # as if it were not installed
    assert main([*SMALL, "--hardware", "4090", *QUICK]) == 0
    assert "───" not in capsys.readouterr().out


def test_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    """The answer is of the placement that comes nearest, with what would be enough; with as much it fits."""
    too_large = ["plan", "--params", "70e9", "--hardware", "4090"]
    assert main([*too_large, "--json"]) == 2
    output = capsys.readouterr()
    found = json.loads(output.out)
    assert found["plan"] is None and found["cheapest"] is None and "912.71 GiB needed" in found["refusal"]
    needed = min(
        sum(placed["host"].values()) for placed in found["placements"] if placed["options"]["params"] == "disk"
    )
    reason = (
        f"t does not fit: it takes at least {needed / 2**30:.2f} GiB of host memory, of which 115.20 GiB may be used"
    )
    assert output.err.splitlines()[-1] == f"offload: i{reason}"
    assert main([*too_large]) == 2
    output = capsys.readouterr()
    first, _, remedy, here, *_ = output.out.splitlines()
    assert first == f"I{reason}." and output.err.splitlines()[-1] == f"offload: i{reason}"
    enough = re.match(r"fits  with --host-memory (\d+)GiB: ", remedy)
    assert enough is not None and "parameters of Llama's shape fit, with states and weights on disk" in here
    assert int(enough[1]) - 1 < needed / 0.9 / 2**30 <= int(enough[1])
    assert main([*too_large, "--host-memory", f"{enough[1]}GiB", "--batch", "1", "--json"]) == 0


@pytest.mark.usefixtures("no_search")
def test_no_placement_leaves_room_for_activations(capsys: pytest.CaptureFixture[str]) -> None:
    small = [*SMALL, "--hardware", "4090", "--batch", "1", "--length", str(1 << 24)]
    assert main(small) == 2
    output = capsys.readouterr()
    reason = r"t does not fit: one sequence of 16777216 tokens has .* give a shorter length"
    assert re.match(f"I{reason}\\.\n", output.out) and re.search(f"^offload: i{reason}$", output.err, re.MULTILINE)
    assert "may be used" not in output.out


@pytest.mark.usefixtures("no_search")
def test_what_is_given_in_the_place_of_a_preset(capsys: pytest.CaptureFixture[str]) -> None:
    given = [
        "--gpu-memory",
        "12GiB",
        "--host-memory",
        "1TiB",
        "--link",
        "pcie5x16",
        "--host-bandwidth",
        "35",
        "--mfu",
        "0.4",
    ]
    found = reported(capsys, *SMALL, "--hardware", "4090", *given, "--disk-bandwidth", "7GB/s", *QUICK)["hardware"]
    assert (found["device_bytes"], found["host_bytes"], found["assumed"]) == (12 << 30, 1 << 40, [])
    assert (found["to_device"], found["host_bandwidth"], found["mfu"], found["disk_read"]) == (55e9, 35e9, 0.4, 7e9)


@pytest.mark.usefixtures("no_search")
def test_several_gpus_are_said_to_be_arithmetic(capsys: pytest.CaptureFixture[str]) -> None:
    shared = [*SMALL, "--hardware", "a100-40", "--gpus", "4", *QUICK]
    found = reported(capsys, *shared, "--interconnect", "25gbe")
    assert "4 GPUs over 25gbe are arithmetic" in found["notes"][0] and "network" in found["steps"][0]["busy"]
    assert "--gpus 4 needs --interconnect, what joins them: one of 10gbe" in refused(capsys, *shared)


@pytest.mark.usefixtures("no_search")
def test_this_machine_is_measured_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = offload.Hardware.preset("4090")
    here = offload.Hardware(**{**vars(here), "name": "this machine", "kind": "cpu", "source": "measured: here"})
    monkeypatch.setattr(offload, "measure_hardware", lambda: here)
    assert main([*SMALL, *QUICK, "--dtype", "float32"]) == 0
    output = capsys.readouterr()
    assert "measuring this machine" in output.err and "82.6 TFLOP/s" in output.out
    assert "no accelerator here: the CPU computes" in output.out and "On the machine itself" not in output.out


def entry_points(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> None:
    module = ModuleType("models_of_a_user")
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, "models_of_a_user", module)


@pytest.mark.usefixtures("no_search")
def test_an_entry_point(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    made: list[nn.Module] = []

    def build() -> nn.Module:
        made.append(nn.Sequential(*(nn.Linear(64, 64) for _ in range(4))))
        return made[-1]

    entry_points(monkeypatch, build=build, number=lambda: 3)
    found = reported(capsys, "plan", "models_of_a_user:build", "--hardware", "4090", *QUICK)
    assert found["trainable_count"] == 4 * 65 * 64 and found["model"] == "Sequential"
    assert all(p.is_meta for p in made[0].parameters())  # nothing was allocated
    assert found["notes"] == ["the model has no config that tells of attention: what that computes is not counted"]
    assert "returned a int" in refused(capsys, "plan", "models_of_a_user:number", "--hardware", "4090")
    assert "has no attribute 'nothing'" in refused(capsys, "plan", "models_of_a_user:nothing")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no model: give a name such as Llama-3.1-8B, a Hugging Face config.json"),
        (["nowhere"], "'nowhere' is no file or directory here, no Python function and no name that is known. Nothing"),
        (["no_such_module:build"], "cannot be imported: No module named 'no_such_module'"),
        (["no_such_module:build", "--params", "8e9"], "--params beside MODEL: give the one or the other"),
        (["--params", "1000", "--layers", "2", "--hidden", "64"], "1,000 parameters are too few for 2 layers of 64"),
        (["--layers", "2"], "no model"),
        (["--params", "1e9", "--hardware", "abacus"], "hardware 'abacus' is not known"),
        (["--params", "1e9", "--hardware", "4090", "--tokens", "100"], "--tokens 100 are no whole sequences of 2048"),
        (["--params", "1e9", "--hardware", "4090", "--gpu-memory", "big"], "size 'big' is not understood"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, "plan", *arguments)


def test_files_that_are_no_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.json"
    assert "config.json cannot be read: No such file or directory; give a Hugging Face config.json" in refused(
        capsys, "plan", str(tmp_path)
    )
    no_config = (("{", "is no Hugging Face config"), ("[]", "no JSON object that names a 'model_type'"))
    for text, message in (*no_config, ("{}", "'model_type'"), ('{"model_type": ["llama"]}', "'model_type'")):
        file.write_text(text)
        assert message in refused(capsys, "plan", str(file))
    file.write_text('{"model_type": "from_the_future"}')
    pytest.importorskip("transformers")
    assert "refuses it" in refused(capsys, "plan", str(file))
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 10}
    for wrong in (
        {"hidden_size": -4},
        {"hidden_size": "big"},
        {"hidden_size": 4, "num_attention_heads": 0},
        {"hidden_size": 4_000_000_000},
        {"model_type": "vit"},
    ):
        file.write_text(json.dumps({"model_type": "llama", **sizes, **wrong}))
        said = refused(capsys, "plan", str(file), "--hardware", "4090")
        assert re.search(r"config\.json: transformers \S+ refuses it: .+; give the config of a language model", said)
        assert len(said.splitlines()[-1]) < 600
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "takes transformers, which is not installed; pip install" in refused(capsys, "plan", str(file))
