"""offload.export_checkpoint(), describe_checkpoint() and `offload checkpoint`."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import offload
from offload.cli import main
from test_checkpoints import assert_bits, steps
from test_save_checkpoint import PLACEMENTS, host_values, wrapped

pytestmark = pytest.mark.usefixtures("device")


@pytest.mark.parametrize("name", PLACEMENTS)
def test_fp32_of_a_16_bit_model_are_its_masters(name: str, tmp_path: Path) -> None:
    model, optimizer = wrapped(torch.bfloat16, PLACEMENTS[name])
    steps(model, optimizer)
    offload.save_checkpoint(tmp_path, model, optimizer, tag="one")
    for dtype, expected in (
        ("fp32", {name: optimizer.state[p]["master"] for name, p in model.named_parameters()}),
        ("bf16", {name: model.state_dict()[name] for name, _ in model.named_parameters()}),
    ):
        path = offload.export_checkpoint(tmp_path, tmp_path / f"{dtype}.safetensors", dtype=dtype)
        assert_bits(load_file(path), host_values(expected))
        weights = offload.checkpoint_weights(tmp_path, dtype=dtype)
        assert weights.pop("head.weight") is weights["embedding.weight"], "tied"
        assert_bits(weights, host_values(expected))
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    with pytest.raises(offload.InvalidArgument, match="dtype='int8'"):
        offload.export_checkpoint(tmp_path, tmp_path / "x", dtype="int8")
    with pytest.raises(offload.InvalidArgument, match="dtype='int8'"):
        offload.checkpoint_weights(tmp_path, dtype="int8")


def test_an_export_that_is_refused_leaves_the_file_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = wrapped(torch.bfloat16, PLACEMENTS["host"])
    offload.save_checkpoint(tmp_path / "saved", model, optimizer, tag="one")
    out = tmp_path / "model.safetensors"
    out.write_text("before")

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(offload.StorageError, match=r"needs [\d,]+ bytes: .*No space left"):
        offload.export_checkpoint(tmp_path / "saved", out, dtype="fp32")
    assert out.read_text() == "before" and sorted(p.name for p in tmp_path.iterdir()) == [out.name, "saved"]


def test_hugging_face_reads_the_export(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters()), optimizer="host", gradients="host")
    model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    offload.save_checkpoint(tmp_path / "saved", model, optimizer, tag="one")
    folder = tmp_path / "exported"
    folder.mkdir()
    config.save_pretrained(folder)
    offload.export_checkpoint(tmp_path / "saved", folder / "model.safetensors", dtype="bf16")
    loaded, report = transformers.LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_bits(host_values(loaded.state_dict()), host_values(model.state_dict()))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, optimizer = wrapped(torch.bfloat16, PLACEMENTS["host"])
    steps(model, optimizer)
    directory = str(tmp_path / "saved")
    offload.save_checkpoint(directory, model, optimizer, tag="one", client_state={"epoch": 1})
    assert main(["checkpoint", "show", directory]) == 0
    shown = json.loads(capsys.readouterr().out)
    count = sum(p.numel() for p in model.parameters())
    assert shown["tag"] == "one" and shown["client_state"] == ["epoch"]
    assert shown["elements_by_dtype"] == {"bfloat16": count}
    assert shown["optimizers"] == [{"groups": 1, "parameters": 21, "with_state": 21}]
    out = tmp_path / "model.safetensors"
    assert main(["checkpoint", "export", directory, "--out", str(out), "--dtype", "fp32"]) == 0
    assert sum(value.numel() for value in load_file(out).values()) == count
    path = tmp_path / "saved" / "one" / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert main(["checkpoint", "show", directory]) == 1
    assert "optimizer.safetensors has" in capsys.readouterr().err
