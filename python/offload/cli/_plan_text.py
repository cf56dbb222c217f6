"""`offload plan` as text: tables of `rich` on a terminal that has it, plain ones otherwise."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ._table import table

__all__ = ["printed"]

Rows = list[tuple[str, ...]]
# Of a step, what is worth a word.
_WORTH_SHOWING = 0.005
_LEAST_GIB = 2**30 // 10  # less is shown in MiB
_KINDS = {"optimizer": "optimizer", "gradients": "gradients", "params": "weights"}
_LANES = {
    "compute": "compute",
    "to_host": "copies to the host",
    "to_device": "copies to the device",
    "host_update": "host update",
    "disk_read": "disk reads",
    "disk_write": "disk writes",
    "network": "network",
}


def printed(result: Mapping[str, Any]) -> str:
    """The whole report: the verdict, what it is of, and the tables with their remarks."""
    lines = [_verdict(result), "", *_heading(result)]
    tables = [("Where it can be", *_places(result))]
    if result["steps"]:
        tables.append(("How fast it is", *_speeds(result)))
    tables.append(("The largest models of Llama's shape that would fit", *_largest(result)))
    for title, rows, remarks in tables:
        lines += ["", _table(title, rows), *remarks]
    if result["hardware"]["source"].startswith("measured"):
        return "\n".join(lines)
    return "\n".join([*lines, "", "On the machine itself, `offload plan` without --hardware measures the rates."])


def _verdict(result: Mapping[str, Any]) -> str:
    if result["refusal"] is not None:
        return "It does not fit."
    steps, placements = result["steps"], result["placements"]
    fastest = [steps[number] for number in result["fastest"]]
    middle = fastest[len(fastest) // 2]
    if result["plan"] is None:
        return f"It fits, with {_off(placements[middle['placement']])} off the device: about {_pace(middle)}."
    number = next(n for n, placed in enumerate(placements) if _matches(placed, result["plan"]))
    call = f"`offload.wrap(model, optim{_disk_path(placements[number])})`"
    own = [step for step in steps if step["placement"] == number and step["batch"] == middle["batch"]]
    if not own:
        by_itself = f"{call} leaves no room for activations"
        return f"It fits with {_call(placements, middle)}, about {_pace(middle)}; {by_itself}."
    taken = f"It fits: {call} takes {_off(placements[number])} off the device, about {_pace(own[0])}."
    if middle["placement"] == number:
        return taken
    return f"{taken}\nFaster is {_call(placements, middle)}: about {_figures(middle['tokens_per_s'])} tokens/s there."


def _call(placements: Sequence[Mapping[str, Any]], step: Mapping[str, Any]) -> str:
    """The call that asks for the placement of a step."""
    placed = placements[step["placement"]]
    options = ", ".join(f"{kind}={place!r}" for kind, place in placed["options"].items())
    return f"`offload.wrap(model, optim, {options}{_disk_path(placed)})`"


def _disk_path(placed: Mapping[str, Any]) -> str:
    return ", disk_path=DIRECTORY" if "disk" in placed["options"].values() else ""


def _pace(step: Mapping[str, Any]) -> str:
    return f"{_figures(step['tokens_per_s'])} tokens/s at {step['tokens']:,} tokens a step"


def _heading(result: Mapping[str, Any]) -> list[str]:
    hardware, gpus = result["hardware"], result["gpus"]
    star = {name: "*" if name in hardware["assumed"] else "" for name in hardware}
    trainable, frozen = result["trainable_count"], result["frozen_count"]
    each = result["resident_bytes"] / max(1, trainable + frozen)
    several, a_gpu = (f"{gpus} x ", " a GPU") if gpus > 1 else ("", "")
    formats = [
        f"{kind} {result[kind]}" for kind, usual in (("moments", "fp32"), ("master", "auto")) if result[kind] != usual
    ]
    lines = [
        f"model     {result['model']}: {trainable:,} parameters{f', {frozen:,} more frozen' if frozen else ''}",
        f"training  {', '.join([result['dtype'], result['optimizer_class'], *formats])}, sequences of "
        f"{result['length']:,} tokens{', checkpointing' if result['checkpointing'] else ''}",
        f"device    {several}{hardware['name']}: {_gib(hardware['device_bytes'])}, "
        f"{hardware['flops'] / 1e12:.3g} TFLOP/s, of which {hardware['mfu']:.0%}{star['mfu']} reached",
        f"link      {_rate(hardware['to_host'])} to the host, {_rate(hardware['to_device'])} to the device",
        f"host      {_gib(hardware['host_bytes'])}{star['host_bytes']}{a_gpu}, updates at "
        f"{_rate(hardware['host_bandwidth'])}{star['host_bandwidth']}",
        f"disk      reads {_rate(hardware['disk_read'])}{star['disk_read']}, writes {_rate(hardware['disk_write'])}"
        f"{star['disk_write']}",
        f"source    {hardware['source']}",
    ]
    if hardware["assumed"]:
        lines.append("          * assumed: --mfu, --host-memory, --host-bandwidth, --disk-bandwidth replace it")
    lines += [
        f"needs     {_gib(result['resident_bytes'])} for weights, gradients and optimizer states, {each:.3g} bytes a "
        "parameter,",
        f"          and {_gib(result['sequence_bytes'])} for the activations of each sequence, about",
        f"          (the rule of thumb of 40 GB a billion parameters: {_gib(result['rule_of_thumb_bytes'])})",
    ]
    lines += [f"note      {note}" for note in result["notes"]]
    return lines


def _places(result: Mapping[str, Any]) -> tuple[Rows, list[str]]:
    steps = result["steps"]
    batches = sorted({step["batch"] for step in steps})
    shown = batches[len(batches) // 2] if batches else None
    seconds = {step["placement"]: _seconds(step["seconds"]) for step in steps if step["batch"] == shown}
    rows: Rows = [("optimizer", "gradients", "weights", "device", "host", "disk", "fits")]
    if shown is not None:
        rows[0] += (f"step of {shown} x {result['length']:,}",)
    for number, placed in enumerate(result["placements"]):
        optimizer, gradients, params = (placed["options"][name] for name in _KINDS)
        if optimizer == "mixed":
            optimizer = f"{1 - placed['kept']:.0%} host"
        tiers = (_gib(sum(placed[tier].values())) for tier in ("device", "host", "disk"))
        fits = "no" if placed["refusal"] else "least" if number == result["cheapest"] else "yes"
        row = (optimizer, gradients, params, *tiers, fits)
        rows.append(row if shown is None else (*row, seconds.get(number, "")))
    room = f"{_gib(result['device_capacity'])} of the device and {_gib(result['host_capacity'])} of the host"
    return rows, [
        f"To fit is to fit {room}: the rest is for activations, and for others.",
        *(["`least` is the least offloading that fits."] if result["cheapest"] is not None else []),
    ]


def _speeds(result: Mapping[str, Any]) -> tuple[Rows, list[str]]:
    rows: Rows = [
        ("batch", "tokens", "in parts", "device", "step", "tokens/s", "computing", "waits for", "off the device")
    ]
    for number in result["fastest"]:
        step = result["steps"][number]
        rows.append(
            (
                str(step["batch"]),
                f"{step['tokens']:,}",
                str(step["micro_batches"]),
                _gib(step["device_bytes"]),
                _seconds(step["seconds"]),
                _figures(step["tokens_per_s"]),
                f"{step['busy']['compute'] / step['seconds']:.0%}",
                _waits(step),
                _off(result["placements"][step["placement"]]),
            )
        )
    smallest = result["steps"][result["fastest"][0]]
    lanes = sorted(((lane, s) for lane, s in smallest["busy"].items() if s), key=lambda item: -item[1])
    busy = ", ".join(f"{_LANES[lane]} {_seconds(seconds)}" for lane, seconds in lanes)
    return rows, [
        "Each batch with the placement that is fastest; in parts: micro-batches of a step, as many as memory asks for.",
        f"Batch {smallest['batch']} needs: {busy}.",
    ]


def _waits(step: Mapping[str, Any]) -> str:
    """The lane that compute waits for longest."""
    lane = max(step["exposed"], key=step["exposed"].__getitem__)
    seconds = step["exposed"][lane]
    return f"{_LANES[lane]} {_seconds(seconds)}" if seconds > _WORTH_SHOWING * step["seconds"] else "nothing"


def _largest(result: Mapping[str, Any]) -> tuple[Rows, list[str]]:
    rows: Rows = [("with", "parameters", "layers", "hidden")]
    for row in result["largest"]:
        hidden = 128 * row["layers"]
        rows.append((row["kept"], _count(row["parameters"]), str(row["layers"]), f"{hidden:,}"))
    return rows, []


def _matches(placed: Mapping[str, Any], plan: Mapping[str, Any]) -> bool:
    return all(placed["options"][kind] == plan[kind] for kind in _KINDS)


def _off(placed: Mapping[str, Any]) -> str:
    """What is not on the device, in words."""
    found = []
    for kind, name in _KINDS.items():
        place = placed["options"][kind]
        if place == "mixed":
            found.append(f"{1 - placed['kept']:.0%} of the {name}")
        elif place != "device":
            found.append(f"{name} (disk)" if place == "disk" else name)
    return ", ".join(found) or "nothing"


def _table(title: str, rows: Rows) -> str:
    """With a title. Words are aligned to the left, figures to the right."""
    if sys.stdout.isatty():
        try:
            from rich.console import Console
            from rich.table import Table
        except ModuleNotFoundError:
            pass
        else:
            drawn = Table(title=title, title_justify="left", header_style="bold")
            for column, name in enumerate(rows[0]):
                words = not any(character.isdigit() for character in rows[-1][column])
                drawn.add_column(name, justify="left" if words else "right", no_wrap=True)
            for row in rows[1:]:
                drawn.add_row(*row)
            console = Console(file=sys.stdout)
            with console.capture() as capture:
                console.print(drawn)
            return capture.get().rstrip("\n")
    return f"{title}\n\n{table(rows, left=_words_of(rows))}"


def _words_of(rows: Rows) -> int:
    """How many columns of words come first."""
    return 3 if len(rows[0]) > 4 and rows[0][0] == "optimizer" else 1


def _gib(nbytes: float) -> str:
    if not nbytes:
        return "-"
    return f"{nbytes / 2**30:,.1f} GiB" if nbytes >= _LEAST_GIB else f"{nbytes / 2**20:,.2f} MiB"


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.3g} GB/s"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _figures(value: float) -> str:
    return f"{float(f'{value:.3g}'):,.0f}"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.1f} billion" if parameters >= 1e9 else f"{parameters / 1e6:.0f} million"
