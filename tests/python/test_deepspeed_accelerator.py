"""`get_accelerator()`: the names of DeepSpeed's, on a card and on the CPU."""

from __future__ import annotations

import pytest
import torch

import offload
import offload.deepspeed as deepspeed
from offload.deepspeed.accelerator import Accelerator, _accelerator

# What of the accelerator is a function of torch.cuda's, where there is a card: by its name there, with these arguments.
OF_TORCH = {
    "set_device": ("set_device", (1,)),
    "device": ("device", (1,)),
    "device_count": ("device_count", ()),
    "synchronize": ("synchronize", (1,)),
    "empty_cache": ("empty_cache", ()),
    "memory_allocated": ("memory_allocated", (1,)),
    "max_memory_allocated": ("max_memory_allocated", (1,)),
    "memory_reserved": ("memory_reserved", (1,)),
    "memory_cached": ("memory_reserved", (1,)),
    "max_memory_reserved": ("max_memory_reserved", (1,)),
    "memory_stats": ("memory_stats", (1,)),
    "reset_max_memory_allocated": ("reset_peak_memory_stats", (1,)),
    "is_bf16_supported": ("is_bf16_supported", ()),
    "range_push": ("nvtx.range_push", ("forward",)),
    "range_pop": ("nvtx.range_pop", ()),
    "default_stream": ("default_stream", (1,)),
    "lazy_call": ("_lazy_call", (print,)),
    "ipc_collect": ("ipc_collect", ()),  # looked up
}
GIVE_NOTHING = {"set_device", "synchronize", "empty_cache", "reset_max_memory_allocated", "range_push", "range_pop",
                "lazy_call"}  # fmt: skip


@pytest.mark.parametrize("name", OF_TORCH)
def test_the_accelerator_of_a_card_asks_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, given = OF_TORCH[name]
    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr(f"torch.cuda.{asked}", lambda *arguments: calls.append(arguments) or "found")
    found = getattr(Accelerator("cuda"), name)(*given)
    assert calls == [given] and found == (None if name in GIVE_NOTHING else "found")


def test_the_accelerator_of_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (30, 80) if index == 1 else None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cuda, "default_generators", ("of 0", "of 1"))
    accelerator = Accelerator("cuda")
    assert accelerator.torch_device == torch.device("cuda", 1) and accelerator.current_device() == 1
    assert accelerator.current_device_name() == "cuda:1" and accelerator.device_name() == "cuda"
    assert (accelerator.available_memory(1), accelerator.total_memory(1)) == (30, 80)
    assert accelerator.supported_dtypes() == [torch.float32, torch.float16] and not accelerator.use_host_timers()
    assert (accelerator.default_generator(), accelerator.default_generator(0)) == ("of 1", "of 0")
    assert accelerator.communication_backend_name() == "nccl" and not accelerator.on_accelerator(torch.ones(1))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    assert torch.equal(accelerator.pin_memory(torch.ones(2), make_copy=False), torch.full((2,), 2.0))
    with pytest.raises(AttributeError, match="'cuda' has no 'nonsense'"):
        accelerator.nonsense  # noqa: B018


def test_an_accelerator_that_is_not_there(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    if device.type == "cuda":
        assert deepspeed.get_accelerator().torch_device == device
        return
    _accelerator.cache_clear()
    with pytest.raises(offload.InvalidArgument, match="DS_ACCELERATOR=cuda: torch sees no CUDA device"):
        deepspeed.get_accelerator()


def test_the_accelerator(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = deepspeed.get_accelerator()
    if device.type == "cuda":
        assert accelerator.torch_device == device and accelerator.communication_backend_name() == "nccl"
        assert accelerator.device_name(1) == "cuda:1" and accelerator.memory_allocated() >= 0
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    accelerator = deepspeed.get_accelerator()
    assert accelerator is deepspeed.get_accelerator()
    assert accelerator.torch_device == torch.device("cpu") and accelerator.device_name(3) == "cpu"
    assert accelerator.device_count() == 1 and accelerator.memory_allocated() == 0
    accelerator.synchronize()
    with accelerator.device(0):
        accelerator.range_push("nothing shows it")
        accelerator.range_pop()
    assert 0 < accelerator.available_memory() <= accelerator.total_memory() and accelerator.memory_cached() == 0
    assert torch.bfloat16 in accelerator.supported_dtypes() and accelerator.use_host_timers()
    assert accelerator.FloatTensor is torch.FloatTensor and torch.equal(
        accelerator.get_rng_state(), torch.get_rng_state()
    )
    with pytest.raises(AttributeError, match="'cpu' has no 'nonsense'"):
        accelerator.nonsense  # noqa: B018
    monkeypatch.setenv("DS_ACCELERATOR", "xpu")
    with pytest.raises(offload.InvalidArgument, match="DS_ACCELERATOR=xpu"):
        deepspeed.get_accelerator()
