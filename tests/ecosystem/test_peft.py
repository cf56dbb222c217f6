"""PEFT: adapters of many kinds over frozen weights, disabled, merged and saved between steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from outcomes import OFFLOADED, Outcome, assert_offloaded_equals_resident, wrap
from safetensors.torch import load_file

import offload
from training import RESIDENT, batches

pytestmark = pytest.mark.usefixtures("device")

SHARED: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
EMBEDDED = SHARED | {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}
METHODS: dict[str, Callable[[], Any]] = {
    "LoRA": lambda: peft.LoraConfig(r=4, lora_dropout=0.1, **SHARED),
    "LoRA of embeddings": lambda: peft.LoraConfig(r=4, **EMBEDDED),
    "LoRA and tokens": lambda: peft.LoraConfig(r=4, trainable_token_indices=[3, 4], **SHARED),
    "LoRA of a parameter": lambda: peft.LoraConfig(r=4, target_parameters=["mlp.gate_proj.weight"], **SHARED),
    "DoRA": lambda: peft.LoraConfig(r=4, use_dora=True, **SHARED),
    "AdaLoRA": lambda: peft.AdaLoraConfig(init_r=6, target_r=2, total_step=10, tinit=1, tfinal=2, **SHARED),
    "IA3": lambda: peft.IA3Config(feedforward_modules=["down_proj"], **SHARED),
    "LoHa": lambda: peft.LoHaConfig(r=4, **SHARED),
    "OFT": lambda: peft.OFTConfig(r=0, oft_block_size=4, **SHARED),
    "prompts": lambda: peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
}


def tune(method: str, placement: dict[str, Any], out: Path) -> Outcome:
    outcome = Outcome()
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=40, pad_token_id=0, **size))
    model: Any = peft.get_peft_model(base, METHODS[method]())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model, optimizer = wrap(model, torch.optim.AdamW(trained, lr=1e-2), placement)
    outcome.optimizer = optimizer
    # Merging and AdaLoRA's ranks read and write weights outside of forward.
    present = offload.full_params if placement.get("params") == "host" else contextlib.nullcontext
    torch.manual_seed(1)
    for step, tokens in enumerate(batches(4)):
        loss = model.train()(input_ids=tokens, labels=tokens).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
        if method == "AdaLoRA":
            with present(model):
                model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        with torch.no_grad(), model.eval().disable_adapter():
            plain = model(input_ids=tokens, labels=tokens).loss
        outcome.numbers += [loss.item(), norm.item(), plain.item()]
        if step == 1 and method != "prompts":
            with present(model):
                model.merge_adapter()
            with torch.no_grad():
                outcome.numbers.append(model(input_ids=tokens, labels=tokens).loss.item())
            with present(model):
                model.unmerge_adapter()
    outcome.keep(model.state_dict())
    model.save_pretrained(out)
    outcome.keep(load_file(out / "adapter_model.safetensors"), "saved.")
    return outcome


@pytest.mark.parametrize("name", OFFLOADED)
@pytest.mark.parametrize("method", METHODS)
def test_methods(method: str, name: str, tmp_path: Path, device: torch.device) -> None:
    resident = tune(method, RESIDENT, tmp_path / "resident")
    assert_offloaded_equals_resident(tune(method, OFFLOADED[name], tmp_path / "offloaded"), resident)
