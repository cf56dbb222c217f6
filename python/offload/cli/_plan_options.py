"""The options of `offload plan`."""

from __future__ import annotations

import argparse

from ._arguments import Parser, Several, count, memory_size, positive

__all__ = ["add_plan"]

_DESCRIPTION = """\
Says whether a model can be trained on a machine, where its weights, gradients and optimizer states can be, how long a
step takes and what bounds it, and which is the largest model that fits. No weight is allocated or downloaded.

Bytes and the choice are those of offload.wrap. Activations are estimated from shapes: each weight matrix keeps its
input and its output of every token, norms and activation functions what autograd saves of one vector, attention its
scores if the model's config says eager; with checkpointing a block keeps its input, and one block at a time all; logits
take 10 bytes each.
Each placement is shown with activations that stay and with activations that leave. What --activation-format rounds of
them is by the same estimate what gradients flow through; of checkpoints it is known to the byte. Times are those of a
model of the pipeline, fed with the hardware's rates: where these are assumed the report says so, and options set them.
"""
_EPILOG = """\
examples:
  offload plan --params 8e9 --layers 32 --hidden 4096 --hardware 4090
  offload plan Llama-3.1-8B --hardware 4090 --host-memory 64GiB
  offload plan ./Llama-3.1-8B --hardware h200 --host-memory 110GiB --batch 4 16
  offload plan config.json                         (this machine, measured)
  offload plan package.module:build --gpus 8 --interconnect ib-hdr200

exit codes: 0 it fits, 2 nothing fits, bad arguments or a missing package,
130 stopped by Ctrl-C, 141 nobody reads what is printed
"""


def add_plan(commands: argparse._SubParsersAction[Parser]) -> None:
    plan = commands.add_parser(
        "plan",
        help="what fits, where, and how fast, on this machine or another; nothing is allocated",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    _add_model(plan)
    _add_training(plan)
    _add_hardware(plan)
    plan.add_argument("--json", action="store_true", help="one JSON object")


def _add_model(plan: Parser) -> None:
    model = plan.add_argument_group("the model")
    model.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a Hugging Face config.json or the directory that has one (needs transformers), a function that "
        "returns a torch.nn.Module, as package.module:function, or a published name, as Llama-3.1-8B",
    )
    model.add_argument(
        "--params", type=count, metavar="N", help="in its place, parameters of a Llama-shaped decoder, as 8e9 or 8B"
    )
    model.add_argument("--layers", type=positive, metavar="N", help="its blocks (default: by --params)")
    model.add_argument("--hidden", type=positive, metavar="N", help="its hidden size (default: 128 a layer)")
    model.add_argument("--vocabulary", type=positive, metavar="N", help="its vocabulary (default 128256)")


def _add_training(plan: Parser) -> None:
    training = plan.add_argument_group("the training")
    training.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="of the model (default bfloat16)",
    )
    training.add_argument(
        "--optimizer-class",
        choices=("adam", "adamw", "lion", "adagrad"),
        default="adamw",
        help="whose states are counted (default adamw)",
    )
    training.add_argument(
        "--moments",
        choices=("fp32", "bf16", "int8"),
        default="fp32",
        help="how the optimizer stores them; bf16 and int8 are lossy (default fp32)",
    )
    training.add_argument(
        "--master",
        choices=("auto", "fp32", "split", "bf16"),
        default="auto",
        help="what is kept of 16-bit weights beside them; bf16 keeps nothing and is lossy (default auto)",
    )
    training.add_argument(
        "--activation-format",
        choices=("exact", "int8", "fp8"),
        default="exact",
        help="how activations travel; in int8 and fp8, a byte an element and lossy, they leave everywhere (default "
        "exact, where they stay or leave)",
    )
    size = training.add_mutually_exclusive_group()
    size.add_argument(
        "--batch",
        type=positive,
        nargs="+",
        action=Several,
        default=[1, 4, 16],
        metavar="N",
        help="sequences a step and GPU, one or several numbers (default 1 4 16)",
    )
    size.add_argument(
        "--tokens", type=positive, nargs="+", action=Several, metavar="N", help="or tokens a step and GPU"
    )
    training.add_argument("--length", type=positive, default=2048, metavar="N", help="tokens a sequence (default 2048)")
    training.add_argument(
        "--no-checkpointing", action="store_true", help="keep activations instead of recomputing blocks in backward"
    )


def _add_hardware(plan: Parser) -> None:
    from offload import Hardware  # needs no torch

    hardware = plan.add_argument_group("the hardware")
    hardware.add_argument(
        "--hardware", metavar="NAME", help=f"one of {', '.join(Hardware.PRESETS)} (default: this machine, measured)"
    )
    hardware.add_argument(
        "--gpu-memory", type=memory_size, metavar="SIZE", help="in the place of the preset's or what is free, as 24GiB"
    )
    hardware.add_argument("--host-memory", type=memory_size, metavar="SIZE", help="available to a GPU, as 110GiB")
    hardware.add_argument(
        "--link", metavar="RATE", help=f"GB/s of copies each way, as 25, or one of {', '.join(Hardware.LINKS)}"
    )
    hardware.add_argument(
        "--host-bandwidth", metavar="RATE", help="GB/s that the update on the host streams (bench adamw measures it)"
    )
    hardware.add_argument("--disk-bandwidth", metavar="RATE", help="GB/s that the disks read, and write")
    hardware.add_argument("--mfu", type=float, metavar="SHARE", help="of the peak that compute reaches, as 0.4")
    hardware.add_argument(
        "--gpus",
        type=positive,
        default=1,
        metavar="N",
        help="GPUs that share out states and gradients; arithmetic, not yet supported by training (default 1)",
    )
    hardware.add_argument(
        "--interconnect", metavar="NAME", help=f"what joins them: {', '.join(Hardware.INTERCONNECTS)}"
    )
