"""The `offload` command.

Exit codes: 0 done; 1 a check failed; 2 bad arguments, a package is missing, or nothing fits (`plan`); 130 stopped by
Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ._plan_options import add_plan

__all__ = ["main"]

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it

_EPILOG = "exit codes: 0 done, 1 a check failed, 2 bad arguments or a missing package, 130 stopped by Ctrl-C"
_DTYPES = ("bfloat16", "float32")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code. Commands import torch; parsing does not."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return EXIT_USAGE
    from offload import OffloadError

    try:
        if arguments.command == "train":
            from ._train import run_train

            return run_train(arguments)
        if arguments.command == "memory":
            from ._memory import run_memory

            return run_memory(arguments)
        if arguments.command == "config":
            from ._config import run_config

            return run_config(arguments)
        if arguments.command == "checkpoint":
            from ._checkpoint import run_checkpoint

            return run_checkpoint(arguments)
        if arguments.command == "env":
            from ._env import run_env

            return run_env(arguments)
        if arguments.command == "plan":
            from ._plan import run_plan

            return run_plan(arguments)
        if arguments.command == "trace":
            from ._trace import run_trace, run_trace_report

            return run_trace(arguments) if arguments.action is None else run_trace_report(arguments)
        if arguments.part == "report":
            from ._bench_report import run_report

            return run_report(arguments)
        from ._bench import run_bench

        return run_bench(arguments)
    except KeyboardInterrupt:
        print("offload: stopped", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (OffloadError, ModuleNotFoundError) as error:
        print(f"offload: {error}", file=sys.stderr)
        return EXIT_USAGE


def _version() -> str:
    try:
        return version("offload")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "unknown (not installed)"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="offload",
        description="Train PyTorch models far larger than the device's memory.",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"offload {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    _add_env(commands)
    add_plan(commands, positive=_positive, count=_count)
    _add_train(commands)
    _add_memory(commands)
    _add_bench(commands)
    _add_config(commands)
    _add_checkpoint(commands)
    _add_trace(commands)
    return parser


def _add_env(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    env = commands.add_parser(
        "env",
        help="what offload finds on this machine",
        description="Shows host, device and disks as offload finds them, and why a slower way is taken.",
        epilog=_EPILOG,
    )
    env.add_argument("--disk-path", nargs="+", default=(), metavar="DIR", help="directories for the disk tier")
    env.add_argument("--json", action="store_true", help="one JSON object")


def _add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    train = commands.add_parser(
        "train",
        help="train a small language model with optimizer, gradients and weights on the host or on disk",
        description="Trains a Llama-style model with random weights on the Python standard library's own "
        "sources (byte tokens), with optimizer states and gradients on the host, or states and weights on disk. "
        "Needs `transformers`.",
        epilog=_EPILOG,
    )
    _add_training(train, steps=200)
    train.add_argument(
        "--check",
        action="store_true",
        help="repeat the first 20 steps with nothing offloaded (bits must agree) and with plain PyTorch "
        "(must agree to rounding)",
    )
    train.add_argument("--json", action="store_true", help="one JSON object on stdout; everything else on stderr")


def _add_memory(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    memory = commands.add_parser(
        "memory",
        help="who owns which bytes in which tier while the model of `train` trains, beside the plan",
        description="Runs a few steps of `offload train` and shows who owns which bytes in which tier: now, at most "
        "and as planned. Needs `transformers`.",
        epilog=_EPILOG,
    )
    _add_training(memory, steps=3)
    memory.add_argument("--json", action="store_true", help="one JSON object on stdout; everything else on stderr")


def _add_training(train: argparse.ArgumentParser, *, steps: int) -> None:
    """The options of the demo's model, its placement and its loop."""
    train.add_argument("--size", type=_count, default=5_000_000, metavar="N", help="parameters, about (default 5M)")
    train.add_argument("--layers", type=_positive, default=6, help="transformer blocks (default 6)")
    train.add_argument("--hidden", type=_positive, default=None, help="hidden size; overrides --size")
    train.add_argument("--dtype", choices=_DTYPES, default="bfloat16", help="of the model (default bfloat16)")
    train.add_argument("--device", default=None, help="compute device (default: the accelerator, or the CPU)")
    train.add_argument(
        "--optimizer",
        type=_place_or_share,
        default="host",
        metavar="WHERE",
        help="where optimizer states are: host (default), device, disk, unified, auto, or the host's share, as 0.7",
    )
    train.add_argument("--disk-path", nargs="+", default=None, metavar="DIR", help="directories for what is on disk")
    train.add_argument("--host-budget", default=None, metavar="SIZE", help="on the host, as '8GiB' (default: measured)")
    train.add_argument(
        "--params",
        choices=("auto", "device", "host", "disk"),
        default="auto",
        help="where weights are; auto keeps them on the device if its budget holds them (default auto)",
    )
    train.add_argument(
        "--device-budget",
        default=None,
        metavar="SIZE",
        help="for weights on the device, as '24GiB' (default: measured)",
    )
    train.add_argument(
        "--activations",
        type=_place_or_share,
        default="device",
        metavar="WHERE",
        help="device (default), host, a share that may leave such as 0.5, or host bytes such as 8GiB",
    )
    train.add_argument(
        "--activation-format",
        choices=("exact", "int8", "fp8"),
        default="exact",
        help="how activations travel; int8 and fp8 are lossy (default exact)",
    )
    train.add_argument(
        "--moments",
        choices=("fp32", "bf16", "int8"),
        default="fp32",
        help="how the optimizer stores them; bf16 and int8 are lossy (default fp32)",
    )
    train.add_argument(
        "--master",
        choices=("auto", "fp32", "split", "bf16"),
        default="auto",
        help="what is kept of 16-bit weights beside them; bf16 keeps nothing and is lossy (default auto)",
    )
    train.add_argument("--steps", type=_positive, default=steps, help=f"optimizer steps (default {steps})")
    train.add_argument("--batch", type=_positive, default=4, help="sequences a micro-batch (default 4)")
    train.add_argument("--length", type=_positive, default=128, help="tokens a sequence (default 128)")
    train.add_argument("--accumulate", type=_positive, default=2, help="micro-batches a step (default 2)")
    train.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (default 1e-3)")
    train.add_argument("--seed", type=int, default=0, help="of weights and batches (default 0)")


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    epilog = _EPILOG.replace("a check failed", "a check failed, a part of all failed, or something is worse")
    bench = commands.add_parser("bench", help="measure one part against its bound", epilog=epilog)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--quick", action="store_true", help="small sizes, few repeats: shows that it runs")
    shared.add_argument("--json", type=Path, default=None, metavar="FILE", help="also write the result to FILE")
    shared.add_argument(
        "--compare",
        type=Path,
        default=None,
        metavar="FILE",
        help="an earlier result of this machine: what is better or worse now; exit code 1 if anything is worse",
    )
    on_device = argparse.ArgumentParser(add_help=False, parents=[shared])
    on_device.add_argument("--device", default=None, help="compute device (default: the accelerator, or the CPU)")
    parts = bench.add_subparsers(dest="part", metavar="PART", required=True)

    def add(name: str, parent: argparse.ArgumentParser, text: str) -> argparse.ArgumentParser:
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
        "the device's update of states in unified memory beside the host's, and over pinned memory",
    )
    add("checkpoint", on_device, "a save beside the disk's own speed, and what an asynchronous one costs")
    _add_bench_disk(add("disk", shared, "files of the disk tier beside raw reads and writes of the same disk"))
    _add_bench_train(add("train", on_device, "a Llama-shaped bf16 model, offloaded beside resident"))
    _add_bench_plan(add("plan", shared, "steps of many settings beside what offload.forecast predicts of them"))
    _add_bench_largest(add("largest", on_device, "the largest model that the device and its host can train"))
    _add_bench_report(parts)
    add("all", on_device, "all of these that run here, each with its defaults")


def _add_bench_disk(disk: argparse.ArgumentParser) -> None:
    disk.add_argument("--disk-path", default=".", metavar="DIR", help="a directory on the disk (default: this one)")
    disk.add_argument("--gib", type=_positive, default=1, help="GiB of the file (default 1; with --quick 32 MiB)")


def _add_bench_train(train: argparse.ArgumentParser) -> None:
    train.add_argument("--size", choices=("tiny", "1b", "8b"), default="tiny", help="of the model (default tiny)")
    train.add_argument(
        "--tokens", type=_positive, nargs="+", default=None, metavar="N", help="tokens a step (default: by size)"
    )
    train.add_argument("--micro-batch", type=_positive, default=None, help="tokens a backward (default: all of a step)")
    train.add_argument("--vocabulary", type=_positive, default=None, help="of the model (default: by size)")
    train.add_argument("--steps", type=_positive, default=None, help="timed steps of each run (default: by size)")
    train.add_argument(
        "--offload",
        nargs="*",
        default=["optimizer+gradients"],
        metavar="KINDS",
        help="placements: kinds on the host (optimizer, gradients, params, activations) joined by +, or a share of one "
        "as optimizer:0.5, or optimizer:unified, activations:int8, activations:fp8 (default optimizer+gradients)",
    )
    train.add_argument(
        "--beside",
        nargs="*",
        choices=("compute", "resident", "torch", "fsdp2", "torchao", "deepspeed"),
        default=None,
        metavar="RUN",
        help="what they are compared with: compute, resident, torch (default these; all of a tiny model), fsdp2, "
        "torchao, deepspeed",
    )
    train.add_argument(
        "--host-budget", default=None, metavar="SIZE", help="for offload, as '110GiB' (default: measured)"
    )
    train.add_argument(
        "--device-cap", type=float, default=None, metavar="GIB", help="that torch may allocate in runs that offload"
    )
    train.add_argument("--no-checkpointing", action="store_true", help="keep activations instead of recomputing them")


def _add_bench_largest(largest: argparse.ArgumentParser) -> None:
    largest.add_argument("--size", choices=("tiny", "8b"), default=None, help="whose width it has (default: by device)")
    for tier in ("device", "host"):
        largest.add_argument(
            f"--{tier}-budget",
            default=None,
            metavar="SIZE",
            help=f"of the {tier}'s memory, as '24GiB' (default: measured)",
        )
    largest.add_argument("--derive-only", action="store_true", help="plan it and do not train it")


def _add_bench_plan(plan: argparse.ArgumentParser) -> None:
    plan.add_argument("--predict-only", action="store_true", help="measure rates and predict; run no setting")
    plan.add_argument(
        "--predictions",
        type=Path,
        default=None,
        metavar="FILE",
        help="that --predict-only --json wrote, to be measured",
    )


def _add_bench_report(parts: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    report = parts.add_parser(
        "report",
        help="tables and plots of what was measured",
        description="Turns JSON files of benches, or of make gpu-acceptance, into Markdown tables and plots.",
        epilog=_EPILOG,
    )
    report.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSON, as --json wrote it")
    report.add_argument("--compare", type=Path, default=None, metavar="FILE", help="what is better or worse than there")
    report.add_argument("--out", type=Path, default=None, metavar="FILE", help="for the Markdown (default: stdout)")
    report.add_argument(
        "--plots", type=Path, default=None, metavar="DIR", help="for PNG files; needs matplotlib (the extra 'plot')"
    )


def _add_config(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    config = commands.add_parser("config", help="what a DeepSpeed config means here", epilog=_EPILOG)
    actions = config.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, text in (
        ("explain", "every key of a DeepSpeed config: what it does here, or why nothing, and the placement"),
        ("check", "whether a DeepSpeed config is accepted; keys that would have no effect are refused if misspelt"),
    ):
        action = actions.add_parser(name, help=text, description=f"Shows {text}.", epilog=_EPILOG)
        action.add_argument(
            "file", help="a JSON or Hjson file; 'auto' may stand where Hugging Face's Trainer fills it in"
        )


def _add_checkpoint(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    checkpoint = commands.add_parser("checkpoint", help="look into a checkpoint, or export its weights", epilog=_EPILOG)
    saved = argparse.ArgumentParser(add_help=False)
    saved.add_argument("directory", metavar="DIR", help="of checkpoints, as given to offload.save_checkpoint")
    saved.add_argument("--tag", default=None, help="of the checkpoint (default: the latest)")
    actions = checkpoint.add_subparsers(dest="action", metavar="ACTION", required=True)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return actions.add_parser(name, parents=[saved], help=text, description=f"It {text}.", epilog=_EPILOG)

    add("show", "verifies every byte and prints what is in it, as JSON")
    export = add("export", "writes weights to one safetensors file, as Hugging Face reads it")
    export.add_argument("--out", required=True, metavar="FILE", help="such as model.safetensors")
    export.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), default="bf16", help="of the weights (default bf16)"
    )


def _add_trace(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    trace = commands.add_parser(
        "trace",
        help="where the time of a step goes: the demo training, traced",
        description="Trains as `offload train` does and records copies, updates, waits, disk and memory: what is "
        "hidden, what is waited for, and the setting that would help most. `offload trace report FILE` reads a trace "
        "that was saved. To trace your own training use offload.trace().",
        epilog=_EPILOG,
    )
    _add_training(trace, steps=12)
    trace.add_argument("--out", default=None, metavar="FILE", help="the trace as JSON, which ui.perfetto.dev opens")
    _add_trace_output(trace)
    actions = trace.add_subparsers(dest="action", metavar="report")
    report = actions.add_parser(
        "report",
        help="the report of a saved trace",
        description="Prints the report of a trace that was saved, writes its page, or joins it with torch.profiler's.",
        epilog=_EPILOG,
    )
    report.add_argument("file", metavar="FILE", help="JSON, as --out or offload.trace(path) wrote it")
    report.add_argument(
        "--profiler", default=None, metavar="FILE", help="what torch.profiler exported of the same run, to join in"
    )
    report.add_argument("--out", default=None, metavar="FILE", help="for the trace, with that of --profiler joined in")
    _add_trace_output(report)


def _add_trace_output(trace: argparse.ArgumentParser) -> None:
    trace.add_argument("--html", default=None, metavar="FILE", help="a page with timeline, memory and the verdict")
    trace.add_argument("--json", action="store_true", help="the report as one JSON object on stdout")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return value


def _place_or_share(text: str) -> str | float:
    """A share is a number with a point; everything else is checked by `offload.wrap`."""
    try:
        return float(text) if "." in text else text
    except ValueError:
        return text


def _count(text: str) -> int:
    """A number of parameters: 5000000, 5M or 1.5B."""
    factor = {"K": 10**3, "M": 10**6, "B": 10**9}.get(text[-1:].upper(), 1)
    try:
        value = int(float(text[:-1] if factor > 1 else text) * factor)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number such as 5000000, 5M or 1.5B") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} parameters are too few")
    return value
