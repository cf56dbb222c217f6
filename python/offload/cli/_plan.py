"""`offload plan`: what will fit, where, and how fast, before anything is bought, rented, downloaded or allocated."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import offload

from ._plan_model import decoder_of_depth, described, model_of
from ._plan_text import pieces, refusal
from ._progress import now_at, shown
from ._table import show

__all__ = ["run_plan"]

_EXIT_NOTHING_FITS = 2
_MOST_SEQUENCES = 2**16
# What the largest model is looked for with, least offloaded first; the first of each pair is its name.
_LARGEST: dict[str, dict[str, Any]] = {
    "nothing offloaded": {"optimizer": "device", "gradients": "device", "params": "device"},
    "all on the host": {"optimizer": "host", "gradients": "host", "params": "host"},
    "states and weights on disk": {
        "optimizer": "disk",
        "gradients": "host",
        "params": "disk",
        "disk_path": "DIRECTORY",
    },
}
# Options that replace a figure of the hardware, and what `Hardware.having` calls it.
_OVERRIDES = {
    "--gpu-memory": "device_memory",
    "--host-memory": "host_memory",
    "--link": "link",
    "--host-bandwidth": "host_bandwidth",
    "--disk-bandwidth": "disk_bandwidth",
    "--mfu": "mfu",
}


def run_plan(options: argparse.Namespace) -> int:
    """Prints the prediction, as text or as JSON; 2 where nothing fits, with the numbers on stderr."""
    with shown("offload plan"):
        result = _predicted(options)
    if options.json:
        print(json.dumps(result, indent=2), flush=True)
    else:
        show(pieces(result))
    if result["refusal"] is None:
        return 0
    print(f"offload: {refusal(result)}", file=sys.stderr)
    return _EXIT_NOTHING_FITS


def _predicted(options: argparse.Namespace) -> dict[str, Any]:
    if options.interconnect is not None and options.gpus == 1:
        raise offload.InvalidArgument(f"--interconnect {options.interconnect} joins several GPUs: give --gpus too")
    if options.gpus > 1 and options.interconnect is None:
        joins = ", ".join(offload.Hardware.INTERCONNECTS)
        raise offload.InvalidArgument(f"--gpus {options.gpus} needs --interconnect, what joins them: one of {joins}")
    now_at("building the model without its weights")
    model = model_of(options)
    hardware = _hardware(options)
    now_at("predicting steps")
    formats = {"moments": options.moments, "master": options.master}
    prediction = offload.predict(
        model,
        hardware,
        batches=_batches(options),
        length=options.length,
        checkpointing=not options.no_checkpointing,
        optimizer_class=options.optimizer_class,
        gpus=options.gpus,
        interconnect=options.interconnect,
        **_leaving(options),
        **formats,
    )
    now_at("looking for the largest models that fit")
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    return {
        "schema_version": 1,
        "model": described(model),
        "dtype": options.dtype,
        "optimizer_class": options.optimizer_class,
        **formats,
        "activation_format": options.activation_format,
        "notes": _notes(model, prediction),
        **_as_json(prediction),
        "largest": _largest(prediction.hardware, vocabulary, getattr(torch, options.dtype), formats),
    }


def _leaving(options: argparse.Namespace) -> dict[str, Any]:
    """In a lossy format activations leave; otherwise both are shown."""
    if options.activation_format == "exact":
        return {}
    places = "host" if options.no_checkpointing else "checkpoints"
    return {"activations": places, "activation_format": options.activation_format}


def _hardware(options: argparse.Namespace) -> offload.Hardware:
    if options.hardware is None:
        now_at("measuring this machine")
        print("offload: measuring this machine; --hardware names another", file=sys.stderr)
        hardware = offload.measure_hardware()
    else:
        hardware = offload.Hardware.preset(options.hardware)
    for option, name in _OVERRIDES.items():
        value = getattr(options, option[2:].replace("-", "_"))
        try:
            hardware = hardware.having(**{name: value})
        except offload.InvalidArgument as error:
            raise offload.InvalidArgument(f"{option} {value}: {error}") from None
    return hardware


def _batches(options: argparse.Namespace) -> list[int]:
    """Sequences a step and card, each number once."""
    if options.tokens is None:
        return _within_reach(options.batch, "--batch")
    for tokens in options.tokens:
        if tokens % options.length:
            raise offload.InvalidArgument(
                f"--tokens {tokens} are no whole sequences of {options.length}: give a multiple, or another --length"
            )
    return _within_reach([tokens // options.length for tokens in options.tokens], "--tokens")


def _within_reach(batches: list[int], option: str) -> list[int]:
    """A prediction plays each micro-batch of a step."""
    if max(batches) > _MOST_SEQUENCES:
        raise offload.InvalidArgument(
            f"{option}: {max(batches):,} sequences a step and GPU; give at most {_MOST_SEQUENCES:,}"
        )
    return sorted(set(batches))


def _as_json(prediction: offload.Prediction) -> dict[str, Any]:
    """The prediction as JSON has it: no sets, and of the plan what it chose and why."""
    plan, cheapest = prediction.plan, prediction.cheapest()
    found = {field.name: getattr(prediction, field.name) for field in dataclasses.fields(prediction)}
    return found | {
        "hardware": dataclasses.asdict(prediction.hardware),
        "plan": None if plan is None else _placement_of(plan) | {"reason": list(plan.reason)},
        "placements": [dataclasses.asdict(placed) for placed in prediction.placements],
        "cheapest": None if cheapest is None else prediction.placements.index(cheapest),
        "steps": [dataclasses.asdict(step) for step in prediction.steps],
        "fastest": [prediction.steps.index(step) for step in prediction.fastest()],
    }


def _notes(model: nn.Module, prediction: offload.Prediction) -> list[str]:
    notes = []
    if prediction.hardware.kind == "cpu":
        notes.append("no accelerator here: the CPU computes, and offloading saves no memory; try --hardware 4090")
    if getattr(model, "config", None) is None:
        notes.append("the model has no config that tells of attention: what that computes is not counted")
    if prediction.gpus > 1:
        notes.append(
            f"{prediction.gpus} GPUs over {prediction.interconnect} are arithmetic: training in several processes is "
            "not supported yet"
        )
    return notes


def _placement_of(plan: offload.Plan) -> dict[str, Any]:
    return {kind: getattr(plan, kind) for kind in ("optimizer", "gradients", "params", "activations")}


def _largest(
    hardware: offload.Hardware, vocabulary: int | None, dtype: torch.dtype, options: dict[str, Any]
) -> list[dict[str, Any]]:
    """The deepest decoder of Llama's proportions that fits, by where it is kept; 0 layers where none does."""

    def parameters(layers: int, places: dict[str, Any]) -> int:
        """Of the decoder, 0 where it does not fit."""
        model = decoder_of_depth(layers, vocabulary, dtype)
        try:
            offload.estimate(model, hardware=hardware, **options, **places)
        except (offload.InvalidArgument, offload.OutOfHostMemory):
            return 0
        return sum(parameter.numel() for parameter in model.parameters())

    found: list[dict[str, Any]] = []
    fits = 0
    for name, places in _LARGEST.items():
        if "disk" in places.values() and (options["moments"] != "fp32" or options["master"] == "bf16"):
            continue  # what is on disk is exact
        fits = _last(lambda layers: parameters(layers, places) > 0, start=fits)  # noqa: B023  # called now
        found.append({"kept": name, "parameters": parameters(fits, places) if fits else 0, "layers": fits})
    return found


def _last(holds: Callable[[int], bool], start: int) -> int:
    """The last number for which it holds, of those from 1 on; 0 if there is none. It is looked for from `start` on."""
    last = start if start and holds(start) else 0
    step = 1
    while holds(last + step):
        last += step
        step *= 2
    while step := step // 2:  # it holds for last, and not for last + 2 * step
        if holds(last + step):
            last += step
    return last
