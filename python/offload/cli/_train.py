"""`offload train`: the demo run, its checks against runs without offload, and its report."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from typing import Any

import torch

from ._corpus import read_corpus
from ._device import compute_device, make_deterministic
from ._table import Piece, Table, facts, format_bytes, show
from ._training import Run, train

__all__ = ["run_train"]

_CHECK_STEPS = 20
_KINDS = ("weights", "working", "master", "moments", "gradients", "window", "cache", "backups")
_EXIT_CHECK_FAILED = 1
_EXIT_INTERRUPTED = 130
# Plain torch.optim.AdamW orders its operations differently, so each step differs by a few fp32 roundings, which
# flip some bf16 weights. Ten times what was measured over 20 steps (5e-7 and 6e-4); a wrong step shows as 1e-1.
_LOSS_TOLERANCE = {"float32": 5e-6, "bfloat16": 6e-3}


def run_train(options: argparse.Namespace) -> int:
    """Trains, checks if asked, prints the report; returns the exit code."""
    device = compute_device(options.device)
    if options.check:
        make_deterministic(device)
    corpus = read_corpus()
    check_steps = min(_CHECK_STEPS, options.steps)
    run = train(
        options,
        corpus,
        label="offloaded",
        steps=options.steps,
        snapshot_step=check_steps if options.check else 0,
        placement="host",
        device=device,
    )
    report = _report(options, run)
    exit_code = _EXIT_INTERRUPTED if run.interrupted else 0
    if options.check and not run.interrupted:
        report["check"], interrupted = _check(options, corpus, run, check_steps, device)
        if interrupted:
            exit_code = _EXIT_INTERRUPTED
        elif not all(entry["ok"] for entry in report["check"].values()):
            exit_code = _EXIT_CHECK_FAILED
    show(_pieces(report), file=sys.stderr if options.json else sys.stdout)
    if options.json:
        print(json.dumps(report))
    return exit_code


def _check(
    options: argparse.Namespace, corpus: torch.Tensor, run: Run, steps: int, device: torch.device
) -> tuple[dict[str, Any], bool]:
    """Results by reference run, and whether Ctrl-C stopped the checks."""
    results: dict[str, Any] = {}
    references = [("nothing_offloaded", "device"), ("plain_torch", None)]
    if options.moments != "fp32" or options.master == "bf16":  # plain torch has no such format
        references.pop()
    for name, placement in references:
        reference = train(
            options,
            corpus,
            label=name.replace("_", " "),
            steps=steps,
            snapshot_step=steps,
            placement=placement,
            device=device,
        )
        if reference.interrupted:
            return results, True
        loss_difference = _largest(a - b for a, b in zip(run.losses, reference.losses, strict=False))
        weight_difference = _largest(
            (run.weights[key].double() - reference.weights[key].double()).abs().max().item() for key in run.weights
        )
        if placement is None:
            ok = loss_difference <= _LOSS_TOLERANCE[options.dtype]
        else:
            ok = run.losses[:steps] == reference.losses and all(
                torch.equal(run.weights[key], reference.weights[key]) for key in run.weights
            )
        results[name] = {
            "ok": ok,
            "steps": steps,
            "largest_loss_difference": loss_difference,
            "largest_weight_difference": weight_difference,
            "tokens_per_s": reference.tokens_per_s,
            "peak_device_bytes": reference.peak.nbytes,
        }
    return results, False


def _largest(differences: Iterable[float]) -> float:
    """The largest magnitude; NaN where any is, which Python's own `max` passes over."""
    return torch.tensor(list(differences), dtype=torch.float64).abs().max().item()


def _report(options: argparse.Namespace, run: Run) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "interrupted": run.interrupted,
        "steps": len(run.losses),
        "dtype": options.dtype,
        "activation_format": options.activation_format,
        "moments": options.moments,
        "master": run.plan.master,
        "device": run.plan.device_kind,
        "parameters": run.plan.trainable_count,
        "loss_first": run.losses[0] if run.losses else None,
        "loss_last": run.losses[-1] if run.losses else None,
        "losses": run.losses,
        "tokens_per_s": run.tokens_per_s,
        "seconds": run.seconds,
        "bytes": {
            "device_without_offload": {kind: getattr(run.plan.resident, kind) for kind in _KINDS},
            "device": {kind: getattr(run.plan.device, kind) for kind in _KINDS},
            "host": {kind: getattr(run.plan.host, kind) for kind in _KINDS},
            "disk": {kind: getattr(run.plan.disk, kind) for kind in _KINDS},
        },
        "peak_device": {"bytes": run.peak.nbytes, "source": run.peak.source},
        "host_memory": {
            "used_bytes": run.stats.pool["peak_used_bytes"],
            "obtained_bytes": run.stats.pool["mapped_bytes"],
            "budget_bytes": run.plan.host_capacity,
        },
        "hidden_share": run.stats.hidden_share,
        "stats": run.stats.to_dict(),
    }


def _pieces(report: dict[str, Any]) -> list[Piece]:
    sizes, stats = report["bytes"], report["stats"]
    tiers = [tier.replace("_without_offload", ", nothing offloaded") for tier in sizes]
    rows: list[tuple[str, ...]] = [("bytes", *tiers)]
    kinds = [kind for kind in _KINDS if any(sizes[tier][kind] for tier in sizes)]
    rows += [(kind, *(_cell(sizes[tier][kind]) for tier in sizes)) for kind in kinds]
    rows.append(("total", *(_cell(sum(sizes[tier].values())) for tier in sizes)))
    hidden = "no update yet" if report["hidden_share"] is None else f"{report['hidden_share']:.1%}"
    lines = [
        ("run", f"{report['parameters']:,} parameters, {report['dtype']}, on {report['device']}"),
        ("steps", f"{report['steps']}{' (stopped)' if report['interrupted'] else ''}"),
        ("loss, first to last", _loss(report)),
        ("tokens/s", f"{report['tokens_per_s']:,.0f}"),
        ("weights on the device", f"{format_bytes(stats['peak_weight_bytes'])} at most"),
        ("peak on the device", _peak(report)),
        ("host memory", _host_memory(report)),
        ("host update", f"{stats['update_s']:.2f} s in all ({stats['isa']})"),
        ("of it hidden", hidden),
    ]
    if stats["activations"]:
        names = ("offloaded_bytes", "saved_bytes", "sent_bytes")
        left, saved, sent = (format_bytes(stats["activations"][key]) for key in names)
        form = report["activation_format"]
        on_the_way = "" if form == "exact" else f", {sent} on their way ({form})"
        lines.append(("activations off the device", f"{left} of {saved} a forward{on_the_way}"))
    if stats["disk"]:
        moved = stats["disk"]
        lines.append(
            ("disk", f"{format_bytes(moved['read_bytes'])} read, {format_bytes(moved['written_bytes'])} written")
        )
        if moved["window_bytes"]:
            lines.append(("states on disk", f"{format_bytes(moved['kept_bytes'])} found in the window, not read"))
        if "weights_cache_bytes" in moved:
            read, kept = (format_bytes(moved[f"weights_{verb}_bytes"]) for verb in ("read", "kept"))
            lines.append(("weights on disk", f"{read} read, {kept} found in the cache, not read"))
    lines += [(f"check: {name.replace('_', ' ')}", _verdict(name, entry)) for name, entry in _checks(report)]
    return [facts(lines), "", Table(rows)]


def _cell(nbytes: int) -> str:
    return format_bytes(nbytes) if nbytes else "-"


def _checks(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return list(report.get("check", {}).items())


def _loss(report: dict[str, Any]) -> str:
    if report["loss_first"] is None:
        return "no step ended"
    return f"{report['loss_first']:.4f} to {report['loss_last']:.4f}"


def _peak(report: dict[str, Any]) -> str:
    peak = report["peak_device"]
    if not peak["bytes"]:
        return "not measured yet"
    resident = report.get("check", {}).get("nothing_offloaded", {}).get("peak_device_bytes")
    beside = "" if not resident else f", {format_bytes(resident)} with nothing offloaded"
    return f"{format_bytes(peak['bytes'])}{beside}, activations included ({peak['source']})"


def _host_memory(report: dict[str, Any]) -> str:
    memory = report["host_memory"]
    used, obtained, budget = (format_bytes(memory[f"{kind}_bytes"]) for kind in ("used", "obtained", "budget"))
    holds = memory["obtained_bytes"] <= memory["budget_bytes"]
    return f"{used} used at most, {obtained} obtained: {'within' if holds else 'OVER'} the budget of {budget}"


def _verdict(name: str, entry: dict[str, Any]) -> str:
    differences = (
        f"largest difference: loss {entry['largest_loss_difference']:.2g}, "
        f"weights {entry['largest_weight_difference']:.2g}"
    )
    expected = "equal to rounding" if name == "plain_torch" else "equal bit for bit"
    return f"{expected if entry['ok'] else 'NOT ' + expected} over {entry['steps']} steps ({differences})"
