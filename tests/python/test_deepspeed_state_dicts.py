"""`deepspeed.utils.zero_to_fp32`: state dicts of checkpoints, ours and theirs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import offload
import offload.deepspeed as deepspeed
from deepspeed_training import STAGES, config_of
from test_zero_checkpoint import groups_of, pair, steps, their_classes, write
from training import batches, loss_of, make_model

__all__ = ["their_classes"]

zero_to_fp32 = deepspeed.utils.zero_to_fp32
convert_zero_checkpoint_to_fp32_state_dict = zero_to_fp32.convert_zero_checkpoint_to_fp32_state_dict
convert_zero_checkpoint_to_state_dict = zero_to_fp32.convert_zero_checkpoint_to_state_dict
get_fp32_state_dict_from_zero_checkpoint = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint
load_state_dict_from_zero_checkpoint = zero_to_fp32.load_state_dict_from_zero_checkpoint
clone_tensors_for_torch_save = deepspeed.checkpoint.utils.clone_tensors_for_torch_save

pytestmark = pytest.mark.usefixtures("device")


def exact(model: Any, optimizer: Any) -> dict[str, Tensor]:
    """Every weight of the model in fp32: masters where there are some."""
    weights = {name: value.to("cpu", torch.float32) for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if "master" in optimizer.state[parameter]:
            weights[name] = optimizer.state[parameter]["master"].cpu()
    return weights


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].device.type == "cpu" and found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_theirs(stage: int, dtype: torch.dtype, their_classes: dict[str, Any], tmp_path: Path) -> None:
    model, optimizer = pair(dtype, 0)
    steps(model, optimizer)
    write(tmp_path, model, optimizer, stage, their_classes)
    expected = exact(model, optimizer)
    assert_equal(get_fp32_state_dict_from_zero_checkpoint(tmp_path), expected)
    without = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path), "global_step3", exclude_frozen_parameters=True)
    assert_equal(without, {name: value for name, value in expected.items() if not name.startswith("norm.")})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ours(precision: str, tmp_path: Path) -> None:
    model = make_model(tied=True)
    model.norm.requires_grad_(False)
    config = config_of(zero=STAGES["stage 3, all on the host"], bf16={"enabled": precision == "bf16"})
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups_of(model), config=config)
    for tokens in batches(2):
        engine.backward(loss_of(engine, tokens))
        engine.step()
    engine.save_checkpoint(tmp_path)
    expected = exact(engine.module, engine.optimizer)
    found = get_fp32_state_dict_from_zero_checkpoint(tmp_path)
    assert_equal(found, expected)
    assert found["head.weight"] is found["embedding.weight"]
    lazy = get_fp32_state_dict_from_zero_checkpoint(tmp_path, lazy_mode=True)
    assert_equal({name: value.contiguous() for name, value in lazy.items()}, expected)
    without = get_fp32_state_dict_from_zero_checkpoint(tmp_path, exclude_frozen_parameters=True)
    assert expected.keys() - without.keys() == {"norm.weight", "norm.bias"}

    other = make_model(seed=5, tied=True)
    assert load_state_dict_from_zero_checkpoint(other, tmp_path) is other
    assert_equal(dict(other.state_dict()), expected)
    backward = loss_of(engine, next(batches(1, seed=3)))
    engine.backward(backward)
    engine.step()
    load_state_dict_from_zero_checkpoint(engine.module, tmp_path)  # stays an engine's, where it was
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    again = {name: value.cpu().float() for name, value in engine.module_state_dict().items()}
    assert_equal(again, {name: value.to(dtype).float() for name, value in expected.items()})


def test_files_as_hugging_face_reads_them(tmp_path: Path) -> None:
    load_file = pytest.importorskip("safetensors.torch").load_file
    model, optimizer = pair(torch.bfloat16, 0)
    steps(model, optimizer)
    offload.save_checkpoint(tmp_path / "saved", model, optimizer, tag="one")
    expected = exact(model, optimizer)

    convert_zero_checkpoint_to_fp32_state_dict(tmp_path / "saved", tmp_path / "one")
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["pytorch_model.bin"]
    assert_equal(torch.load(tmp_path / "one/pytorch_model.bin", weights_only=True), expected)

    # An embedding of 40 x 24 has 3,840 bytes: more than a file may have.
    convert_zero_checkpoint_to_fp32_state_dict(tmp_path / "saved", tmp_path / "parts", "3KB", safe_serialization=True)
    index = json.loads((tmp_path / "parts/model.safetensors.index.json").read_text())
    files = sorted(path for path in (tmp_path / "parts").iterdir() if path.suffix == ".safetensors")
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors" and len(files) > 2
    parts = {path.name: load_file(path) for path in files}
    assert_equal({name: value for part in parts.values() for name, value in part.items()}, expected)
    assert index["weight_map"] == {name: file for file, part in parts.items() for name in part}
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in expected.values())
    for part in parts.values():
        assert len(part) == 1 or sum(value.nbytes for value in part.values()) <= 3000

    for dtype in ("bf16", "torch.bfloat16", torch.bfloat16):
        convert_zero_checkpoint_to_state_dict(tmp_path / "saved", tmp_path / "half", dtype, max_shard_size=None)
        half = torch.load(tmp_path / "half/pytorch_model.bin", weights_only=True)
        # As masters round: at an exact tie the weight beside a split master is the other neighbour.
        assert_equal(half, {name: value.bfloat16() for name, value in expected.items()})


def test_what_is_refused_writes_nothing(tmp_path: Path) -> None:
    for more, message in (({"dtype": "int8"}, "legal are"), ({"max_shard_size": "5 boxes"}, "'500MiB'")):
        with pytest.raises(offload.InvalidArgument, match=message):
            convert_zero_checkpoint_to_state_dict(tmp_path / "saved", tmp_path / "out", **more)
    with pytest.raises(offload.StorageError, match="no file 'latest'"):
        convert_zero_checkpoint_to_fp32_state_dict(tmp_path / "saved", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_clones_have_storages_of_their_own() -> None:
    flat = torch.arange(6.0)
    given = {"a": flat[:2], "b": [flat[2:], "text"], "c": (flat[0],)}
    found = clone_tensors_for_torch_save(given)
    assert found["b"][1] == "text" and type(found["c"]) is tuple
    for clone, value in ((found["a"], flat[:2]), (found["b"][0], flat[2:]), (found["c"][0], flat[0])):
        assert torch.equal(clone, value.cpu()) and clone.device.type == "cpu"
        assert clone.untyped_storage().nbytes() == value.numel() * 4
