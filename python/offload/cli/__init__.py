"""The `offload` command.

Exit codes: 0 done; 1 a check failed; 2 bad arguments, a package is missing, a file cannot be written, or nothing fits
(`plan`); 130 stopped by Ctrl-C; 141 nobody reads what is printed.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from ._arguments import Parser, Several, amount, count, ending, memory_size, place_or_share, positive, seed
from ._bench_options import add_bench
from ._plan_options import add_plan

__all__ = ["main"]

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
EXIT_NO_READER = 141  # 128 + SIGPIPE

_DTYPES = ("bfloat16", "float32")
# The extra of this package that brings one which is missing.
_EXTRAS = {"transformers": "demo", "matplotlib": "plot"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code. Commands import torch; parsing does not."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller, as `>&-` does: what would be printed goes nowhere
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  # for as long as the process
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return EXIT_USAGE
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path that the terminal's encoding has no letters for
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch without it: offload needs none
    try:
        from offload import OffloadError
    except KeyboardInterrupt:
        return _stopped()
    try:
        code = _run(arguments)
        sys.stdout.flush()  # here, where a pipe that nobody reads can be told
        return code
    except KeyboardInterrupt:
        return _stopped()
    except BrokenPipeError:  # `offload plan | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left goes nowhere, without an error
        return EXIT_NO_READER
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get(error.name or "")
        remedy = f"`pip install 'offload[{extra}]'`" if extra else f"install {error.name}"
        print(f"offload: {error}: {remedy}", file=sys.stderr)
    except (OffloadError, OSError) as error:
        print(f"offload: {error}", file=sys.stderr)
    return EXIT_USAGE


def _run(arguments: argparse.Namespace) -> int:
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


def _stopped() -> int:
    print("offload: stopped", file=sys.stderr)
    return EXIT_INTERRUPTED


def _version() -> str:
    try:
        return version("offload")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "unknown (not installed)"


def _parser() -> Parser:
    parser = Parser(
        prog="offload",
        description="Train PyTorch models far larger than the device's memory.",
        epilog=ending(
            "offload env                                      what is here",
            "offload plan --params 8e9 --hardware 4090        what fits, and how fast",
            "offload train --size 5M --check                  the same bits as without",
            "offload trace --size 5M --html trace.html        where the time goes",
            title="to begin with",
        ),
    )
    parser.add_argument("--version", action="version", version=f"offload {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    _add_env(commands)
    add_plan(commands)
    _add_train(commands)
    _add_memory(commands)
    add_bench(commands)
    _add_config(commands)
    _add_checkpoint(commands)
    _add_trace(commands)
    return parser


def _add_env(commands: argparse._SubParsersAction[Parser]) -> None:
    env = commands.add_parser(
        "env",
        help="what offload finds on this machine",
        description="Shows host, device and disks as offload finds them, and why a slower way is taken.",
        epilog=ending("offload env", "offload env --disk-path /nvme0 /nvme1", "offload env --json > bug-report.json"),
    )
    env.add_argument(
        "--disk-path", nargs="+", action=Several, default=(), metavar="DIR", help="directories for the disk tier"
    )
    env.add_argument("--json", action="store_true", help="one JSON object")


def _add_train(commands: argparse._SubParsersAction[Parser]) -> None:
    train = commands.add_parser(
        "train",
        help="train a small language model with optimizer, gradients and weights on the host or on disk",
        description="Trains a Llama-style model with random weights on the Python standard library's own "
        "sources (byte tokens), with optimizer states and gradients on the host, or states and weights on disk. "
        "Needs `transformers`.",
        epilog=ending(
            "offload train --size 5M --check",
            "offload train --size 100M --params host --activations checkpoints",
            "offload train --optimizer disk --params disk --disk-path . --host-budget 64MiB",
        ),
    )
    _add_training(train, steps=200)
    train.add_argument(
        "--check",
        action="store_true",
        help="repeat the first 20 steps with nothing offloaded (bits must agree) and with plain PyTorch "
        "(must agree to rounding)",
    )
    train.add_argument("--json", action="store_true", help="one JSON object on stdout; everything else on stderr")


def _add_memory(commands: argparse._SubParsersAction[Parser]) -> None:
    memory = commands.add_parser(
        "memory",
        help="who owns which bytes in which tier while the model of `train` trains, beside the plan",
        description="Runs a few steps of `offload train` and shows who owns which bytes in which tier: now, at most "
        "and as planned. Needs `transformers`.",
        epilog=ending("offload memory --params host", "offload memory --moments int8 --json"),
    )
    _add_training(memory, steps=3)
    memory.add_argument("--json", action="store_true", help="one JSON object on stdout; everything else on stderr")


def _add_training(train: Parser, *, steps: int) -> None:
    """The options of the demo's model, its placement and its loop."""
    train.add_argument("--size", type=count, default=5_000_000, metavar="N", help="parameters, about (default 5M)")
    train.add_argument("--layers", type=positive, default=6, help="transformer blocks (default 6)")
    train.add_argument("--hidden", type=positive, default=None, help="hidden size; overrides --size")
    train.add_argument("--dtype", choices=_DTYPES, default="bfloat16", help="of the model (default bfloat16)")
    train.add_argument("--device", default=None, help="compute device (default: the accelerator, or the CPU)")
    train.add_argument(
        "--optimizer",
        type=place_or_share,
        default="host",
        metavar="WHERE",
        help="where optimizer states are: host (default), device, disk, unified, auto, the host's share, as 0.7, or "
        "shares of several, as unified=0.6,host=0.4",
    )
    train.add_argument(
        "--disk-path", nargs="+", action=Several, default=None, metavar="DIR", help="directories for what is on disk"
    )
    train.add_argument(
        "--host-budget",
        type=memory_size,
        default=None,
        metavar="SIZE",
        help="on the host, as '8GiB' (default: measured)",
    )
    train.add_argument(
        "--params",
        choices=("auto", "device", "host", "disk"),
        default="auto",
        help="where weights are; auto keeps them on the device if its budget holds them (default auto)",
    )
    train.add_argument(
        "--device-budget",
        type=memory_size,
        default=None,
        metavar="SIZE",
        help="for weights on the device, as '24GiB' (default: measured)",
    )
    train.add_argument(
        "--activations",
        type=place_or_share,
        default="device",
        metavar="WHERE",
        help="device (default), host, checkpoints, auto, a share that may leave as 0.5, or host bytes as 8GiB",
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
    train.add_argument("--steps", type=positive, default=steps, help=f"optimizer steps (default {steps})")
    train.add_argument("--batch", type=positive, default=4, help="sequences a micro-batch (default 4)")
    train.add_argument("--length", type=positive, default=128, help="tokens a sequence (default 128)")
    train.add_argument("--accumulate", type=positive, default=2, help="micro-batches a step (default 2)")
    train.add_argument("--lr", type=amount, default=1e-3, help="peak learning rate (default 1e-3)")
    train.add_argument("--seed", type=seed, default=0, help="of weights and batches (default 0)")


def _add_config(commands: argparse._SubParsersAction[Parser]) -> None:
    config = commands.add_parser(
        "config",
        help="what a DeepSpeed config means here",
        description="Reads a DeepSpeed config as offload.deepspeed.initialize would.",
        epilog=ending("offload config check ds_config.json", "offload config explain ds_config.json"),
    )
    actions = config.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, text in (
        ("explain", "every key of a DeepSpeed config: what it does here, or why nothing, and the placement"),
        ("check", "whether a DeepSpeed config is accepted; keys that would have no effect are refused if misspelt"),
    ):
        action = actions.add_parser(
            name, help=text, description=f"Shows {text}.", epilog=ending(f"offload config {name} ds_config.json")
        )
        action.add_argument(
            "file", help="a JSON or Hjson file; 'auto' may stand where Hugging Face's Trainer fills it in"
        )
        action.add_argument("--json", action="store_true", help="one JSON object")


def _add_checkpoint(commands: argparse._SubParsersAction[Parser]) -> None:
    checkpoint = commands.add_parser(
        "checkpoint",
        help="look into a checkpoint, or export its weights",
        description="Reads what offload.save_checkpoint wrote.",
        epilog=ending(
            "offload checkpoint show runs/tuned",
            "offload checkpoint export runs/tuned --out model.safetensors",
        ),
    )
    saved = Parser(add_help=False)
    saved.add_argument("directory", metavar="DIR", help="of checkpoints, as given to offload.save_checkpoint")
    saved.add_argument("--tag", default=None, help="of the checkpoint (default: the latest)")
    actions = checkpoint.add_subparsers(dest="action", metavar="ACTION", required=True)

    def add(name: str, text: str, example: str) -> Parser:
        return actions.add_parser(name, parents=[saved], help=text, description=f"It {text}.", epilog=ending(example))

    add("show", "verifies every byte and prints what is in it, as JSON", "offload checkpoint show runs/tuned")
    export = add(
        "export",
        "writes weights to one safetensors file, as Hugging Face reads it",
        "offload checkpoint export runs/tuned --out model.safetensors --dtype bf16",
    )
    export.add_argument("--out", required=True, metavar="FILE", help="such as model.safetensors")
    export.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), default="bf16", help="of the weights (default bf16)"
    )
    export.add_argument("--json", action="store_true", help="what was written, as one JSON object")


def _add_trace(commands: argparse._SubParsersAction[Parser]) -> None:
    trace = commands.add_parser(
        "trace",
        help="where the time of a step goes: the demo training, traced",
        description="Trains as `offload train` does and records copies, updates, waits, disk and memory: what is "
        "hidden, what is waited for, and the setting that would help most. `offload trace report FILE` reads a trace "
        "that was saved. To trace your own training use offload.trace().",
        epilog=ending(
            "offload trace --html trace.html",
            "offload trace --params host --out trace.json",
            "offload trace report trace.json --html trace.html",
        ),
    )
    _add_training(trace, steps=12)
    trace.add_argument("--out", default=None, metavar="FILE", help="the trace as JSON, which ui.perfetto.dev opens")
    _add_trace_output(trace)
    actions = trace.add_subparsers(dest="action", metavar="report")
    report = actions.add_parser(
        "report",
        help="the report of a saved trace",
        description="Prints the report of a trace that was saved, writes its page, or joins it with torch.profiler's.",
        epilog=ending(
            "offload trace report trace.json --html trace.html",
            "offload trace report trace.json --profiler torch.json --out both.json",
        ),
    )
    report.add_argument("file", metavar="FILE", help="JSON, as --out or offload.trace(path) wrote it")
    report.add_argument(
        "--profiler", default=None, metavar="FILE", help="what torch.profiler exported of the same run, to join in"
    )
    report.add_argument("--out", default=None, metavar="FILE", help="for the trace, with that of --profiler joined in")
    _add_trace_output(report)


def _add_trace_output(trace: Parser) -> None:
    trace.add_argument("--html", default=None, metavar="FILE", help="a page with timeline, memory and the verdict")
    trace.add_argument("--json", action="store_true", help="the report as one JSON object on stdout")
