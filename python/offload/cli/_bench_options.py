"""The options of `offload bench`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ._arguments import Once, Parser, Several, ending, memory_size, positive

__all__ = ["add_bench"]

_EXITS = (
    "exit codes: 0 done, 1 a check failed, a part of all failed, or a figure is worse, 2 bad arguments or a missing "
    "package, 130 stopped by Ctrl-C, 141 nobody reads what is printed"
)


def add_bench(commands: argparse._SubParsersAction[Parser]) -> None:
    bench = commands.add_parser(
        "bench",
        help="measure one part against its bound",
        description="Each part measures what the machine gives, what offload makes of it and what the peers that are "
        "installed do, in turns, and checks the bytes that it moved. Shows tables; `--json` has all samples.",
        epilog=ending(
            "offload bench all --quick",
            "offload bench adamw --json result.json",
            "offload bench adamw --compare result.json",
            "offload bench report result.json --out report.md --plots plots",
            exits=_EXITS,
        ),
    )
    shared = Parser(add_help=False)
    shared.add_argument("--quick", action="store_true", help="small sizes, few repeats: shows that it runs")
    shared.add_argument(
        "--json",
        type=Path,
        default=None,
        metavar="FILE",
        help="also write the result to FILE; with - to stdout, and tables to stderr",
    )
    shared.add_argument(
        "--compare",
        type=Path,
        default=None,
        metavar="FILE",
        help="an earlier result of this machine: what is better or worse now; exit code 1 if anything is worse",
    )
    on_device = Parser(add_help=False, parents=[shared])
    on_device.add_argument("--device", default=None, help="compute device (default: the accelerator, or the CPU)")
    parts = bench.add_subparsers(dest="part", metavar="PART", required=True)

    def add(name: str, parent: Parser, text: str) -> Parser:
        epilog = ending(f"offload bench {name}", f"offload bench {name} --quick --json result.json", exits=_EXITS)
        return parts.add_parser(name, parents=[parent], help=text, description=f"Measures {text}.", epilog=epilog)

    add("adamw", shared, "the host update beside the memory's own speed and its peers")
    add("pool", shared, "what a block of host memory costs, and what the layout wastes")
    add("step", on_device, "how much of the host update hides, and what hooks cost")
    add("link", on_device, "the copy lanes beside raw copies on the same link")
    add("swap", on_device, "what streamed weights cost, and how much of the link they use")
    add("trace", on_device, "what a trace costs the steps that it records")
    add("activations", on_device, "activations on the host beside torch's save_on_cpu and beside none off the device")
    add("engine", on_device, "what the DeepSpeed engine costs over wrap, step by step")
    add("update", on_device, "the update of states that stay on the device beside its memory's own speed and torch")
    add(
        "unified",
        on_device,
        "the device's update of states on the host beside the host's, with a part for each, and over managed memory",
    )
    add("checkpoint", on_device, "a save beside the disk's own speed, and what an asynchronous one costs")
    _add_bench_disk(add("disk", shared, "files of the disk tier beside raw reads and writes of the same disk"))
    _add_bench_train(add("train", on_device, "a Llama-shaped bf16 model, offloaded beside resident"))
    _add_bench_plan(add("plan", shared, "steps of many settings beside what offload.forecast predicts of them"))
    _add_bench_largest(add("largest", on_device, "the largest model that the device and its host can train"))
    _add_bench_report(parts)
    add("all", on_device, "all of these that run here, each with its defaults")


def _add_bench_disk(disk: Parser) -> None:
    disk.add_argument(
        "--disk-path", action=Once, default=".", metavar="DIR", help="a directory on the disk (default: this one)"
    )
    disk.add_argument("--gib", type=positive, default=1, help="GiB of the file (default 1; with --quick 32 MiB)")


def _add_bench_train(train: Parser) -> None:
    train.add_argument("--size", choices=("tiny", "1b", "8b"), default="tiny", help="of the model (default tiny)")
    train.add_argument(
        "--tokens",
        type=positive,
        nargs="+",
        action=Several,
        default=None,
        metavar="N",
        help="tokens a step (default: by size)",
    )
    train.add_argument("--micro-batch", type=positive, default=None, help="tokens a backward (default: all of a step)")
    train.add_argument("--vocabulary", type=positive, default=None, help="of the model (default: by size)")
    train.add_argument("--steps", type=positive, default=None, help="timed steps of each run (default: by size)")
    train.add_argument(
        "--offload",
        nargs="*",
        action=Several,
        default=["optimizer+gradients"],
        metavar="KINDS",
        help="placements: kinds on the host (optimizer, gradients, params, activations) joined by +, or a share of one "
        "as optimizer:0.5, or optimizer:unified, optimizer:unified=0.5,host=0.5, params:ahead (run_ahead=), "
        "activations:int8, activations:fp8 (default optimizer+gradients)",
    )
    train.add_argument(
        "--beside",
        nargs="*",
        action=Several,
        choices=("compute", "resident", "torch", "fsdp2", "torchao", "deepspeed"),
        default=None,
        metavar="RUN",
        help="what they are compared with: compute, resident, torch (default these; all of a tiny model), fsdp2, "
        "torchao, deepspeed",
    )
    train.add_argument(
        "--host-budget",
        type=memory_size,
        default=None,
        metavar="SIZE",
        help="for offload, and what peers may take, as '110GiB' (default: measured)",
    )
    train.add_argument(
        "--device-cap", type=float, default=None, metavar="GIB", help="that torch may allocate in runs that offload"
    )
    train.add_argument("--no-checkpointing", action="store_true", help="keep activations instead of recomputing them")


def _add_bench_largest(largest: Parser) -> None:
    largest.add_argument("--size", choices=("tiny", "8b"), default=None, help="whose width it has (default: by device)")
    for tier in ("device", "host"):
        largest.add_argument(
            f"--{tier}-budget",
            default=None,
            metavar="SIZE",
            help=f"of the {tier}'s memory, as '24GiB' (default: measured)",
        )
    largest.add_argument("--derive-only", action="store_true", help="plan it and do not train it")


def _add_bench_plan(plan: Parser) -> None:
    plan.add_argument("--predict-only", action="store_true", help="measure rates and predict; run no setting")
    plan.add_argument(
        "--predictions",
        type=Path,
        default=None,
        metavar="FILE",
        help="that --predict-only --json wrote, to be measured",
    )


def _add_bench_report(parts: argparse._SubParsersAction[Parser]) -> None:
    report = parts.add_parser(
        "report",
        help="tables and plots of what was measured",
        description="Turns JSON files of benches, or of make gpu-acceptance, into Markdown tables and plots.",
        epilog=ending(
            "offload bench report result.json", "offload bench report new.json --compare result.json", exits=_EXITS
        ),
    )
    report.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSON, as --json wrote it")
    report.add_argument("--compare", type=Path, default=None, metavar="FILE", help="what is better or worse than there")
    report.add_argument("--out", type=Path, default=None, metavar="FILE", help="for the Markdown (default: stdout)")
    report.add_argument(
        "--plots", type=Path, default=None, metavar="DIR", help="for PNG files; needs matplotlib (the extra 'plot')"
    )
