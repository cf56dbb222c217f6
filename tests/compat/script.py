"""One training script, run under DeepSpeed and under offload: `python script.py LIBRARY CASES OUTPUT`.

LIBRARY is `deepspeed` or `offload`; CASES names a JSON file with cases (see cases.py); OUTPUT gets, for each case, what
every micro-batch and every step showed, or the error. Everything below the imports is the same for both.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # which torch's optimizers import on first use: before the forks, not in each
from model import LENGTH, VOCABULARY, Model

LIBRARY = sys.argv[1]

if LIBRARY == "deepspeed":
    # What its launcher sets for one process.
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", DS_ACCELERATOR="cpu")
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.comm import torch as torch_backend

    # Two overrides of DeepSpeed, neither of which touches what it computes:
    # It refuses fp16 on CPUs whose matrix library has no kernels for it; torch computes there all the same.
    get_accelerator().is_fp16_supported = lambda: True
    # It compiles an extension for reductions between processes, of which there is one: a minute for nothing.
    torch_backend.build_shm_op = lambda: None
else:
    import offload.deepspeed as deepspeed

    deepspeed.initialize  # noqa: B018  # is imported when it is looked up


def number(value: Any) -> float | None:
    return None if value is None else float(value)


def train(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    if LIBRARY == "deepspeed":
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        deepspeed.init_distributed("gloo", dist_init_required=False)
    torch.manual_seed(case["seed"])
    model = Model()
    arguments: dict[str, Any] = {"model": model, "config": case["config"]}
    client = case.get("client")
    if client is not None:
        kind = getattr(torch.optim, client["optimizer"])
        arguments["optimizer"] = kind(model.parameters(), **client["params"])
        arguments["lr_scheduler"] = torch.optim.lr_scheduler.ExponentialLR(arguments["optimizer"], client["gamma"])
    else:
        arguments["model_parameters"] = model.parameters()
    engine, _, _, _ = deepspeed.initialize(**arguments)
    generator = torch.Generator().manual_seed(case["seed"] + 1)
    seen: dict[str, Any] = {"losses": [], "steps": []}
    while engine.global_steps < case["steps"]:
        boundary = engine.is_gradient_accumulation_boundary()
        tokens = torch.randint(VOCABULARY, (engine.train_micro_batch_size_per_gpu(), LENGTH + 1), generator=generator)
        loss = engine(tokens)
        engine.backward(loss)
        seen["losses"].append(loss.item())
        engine.step()
        if boundary:
            step = {
                "lr": engine.get_lr()[0],
                "norm": number(engine.get_global_grad_norm()),
                "skipped": engine.skipped_steps,
                "scale": number(getattr(engine.optimizer, "cur_scale", 1.0)),
            }
            seen["steps"].append(step)
    if case.get("save"):
        engine.save_checkpoint(str(folder / case["name"]), client_state={"words": "of the script"})
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        seen["weights"] = {name: p.detach().float().tolist() for name, p in engine.module.named_parameters()}
    engine.destroy()
    return seen


def run(case: dict[str, Any], folder: Path, sender: Connection) -> None:
    try:
        result = train(case, folder)
    except Exception:
        result = {"error": traceback.format_exc()}
    sender.send(result)


def main() -> None:
    torch.set_num_threads(1)
    cases, output = Path(sys.argv[2]), Path(sys.argv[3])
    results = {}
    for case in json.loads(cases.read_text()):
        # Each in a process of its own, which has the imports already: stage 3 of DeepSpeed leaves torch patched.
        receiver, sender = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(target=run, args=(case, output.parent, sender))
        process.start()
        sender.close()
        try:
            results[case["name"]] = receiver.recv()
        except EOFError:
            results[case["name"]] = {"error": "the process died"}
        process.join()
    output.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
