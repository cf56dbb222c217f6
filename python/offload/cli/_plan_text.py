"""What `offload plan` shows of a prediction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ._table import Piece, Rows, Table, facts, format_bytes

__all__ = ["pieces", "refusal"]

# Of a step, what is worth a word.
_WORTH_SHOWING = 0.005
_WORTHWHILE = 0.98  # a difference that forecasts are good for
_LEAST_GIB = 2**30 // 10  # less has two figures
_KINDS = {"optimizer": "optimizer", "gradients": "gradients", "params": "weights", "activations": "activations"}
# What becomes of activations, by the option.
_WAYS = {"device": "stay", "checkpoints": "leave", "host": "leave"}
_LANES = {
    "compute": "compute",
    "to_host": "copies to the host",
    "to_device": "copies to the device",
    "host_update": "host update",
    "disk_read": "disk reads",
    "disk_write": "disk writes",
    "network": "network",
}


def pieces(result: Mapping[str, Any]) -> list[Piece]:
    """The whole report: the verdict, what it is of, and the tables with their remarks."""
    headline, answer = _verdict(result)
    shown: list[Piece] = [headline, ""]
    if answer:
        shown += [facts(answer), ""]
    shown.append(facts(_heading(result)))
    rows, remark = _places(result)
    below = {6: "disk GiB", 5: "host GiB", 3: "weights", 2: "gradients", 4: "device GiB"}
    shown += ["", Table(rows, left=4, title="Where it can be: GiB, and the time of a step", below=below), remark]
    if result["steps"]:
        rows, remarks = _speeds(result)
        below = {9: "waits for", 8: "computes", 3: "parts", 5: "host GiB", 4: "device GiB", 2: "activations"}
        shown += ["", Table(rows, left=0, title="How fast it is", words=1, below=below), *remarks]
    one = " one GPU" if result["gpus"] > 1 else ""
    title = f"The largest models of Llama's shape that would fit{one}"
    shown += ["", Table(_largest(result), title=title)]
    if not result["hardware"]["source"].startswith("measured"):
        shown += ["", "On the machine itself, `offload plan` without --hardware measures the rates."]
    return shown


def refusal(result: Mapping[str, Any]) -> str:
    """Why it does not fit, in a sentence: of the placement that comes nearest, where memory is what is missing."""
    nearest = _nearest(result)
    if nearest is None:
        return f"it does not fit: {result['refusal']}"
    short = " and ".join(
        f"{format_bytes(needed)} of {name} memory, of which {format_bytes(capacity) if capacity else 'none'} may be "
        "used"
        for name, needed, capacity in _missing(result, nearest)
    )
    return f"it does not fit: it takes at least {short}"


def _verdict(result: Mapping[str, Any]) -> tuple[str, list[tuple[str, str]]]:
    """The first line, and what stands below it: what to write, how fast that is and what bounds it."""
    if result["refusal"] is not None:
        said = refusal(result)
        return f"{said[0].upper()}{said[1:]}.", _remedy(result)
    steps, placements, plan = result["steps"], result["placements"], result["plan"]
    fastest = [steps[number] for number in result["fastest"]]
    middle = fastest[len(fastest) // 2]
    best = placements[middle["placement"]]
    if plan is None:
        answer = [("write", "nothing yet: training in several processes is not supported"), *_pace(middle)]
        return f"It would fit, with {_off(best)} off the device.", answer
    number = next(n for n, placed in enumerate(placements) if _matches(placed, plan))
    call, faster = _call(result, placements[number], {}), _call(result, best, _given(best))
    own = [step for step in steps if step["placement"] == number and step["batch"] == middle["batch"]]
    if not own:
        note = f"{call} leaves no room for the activations of {middle['tokens']:,} tokens"
        return f"It fits, with {_off(best)} off the device.", [("write", faster), *_pace(middle), ("note", note)]
    answer = [("write", call), *_pace(own[0])]
    if middle["placement"] != number:
        answer += [("faster", faster), *_pace(middle)]
    return f"It fits, with {_off(placements[number])} off the device.", answer


def _nearest(result: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The placement whose bytes exceed what there is by the smallest factor; None where some fit, or none is known."""
    if any(placed["refusal"] is None for placed in result["placements"]):
        return None

    def excess(placed: Mapping[str, Any]) -> float:
        tiers = ("device", "host")
        return float(max(sum(placed[tier].values()) / max(1, result[f"{tier}_capacity"]) for tier in tiers))

    return min(result["placements"], key=excess, default=None)


def _missing(result: Mapping[str, Any], placed: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """Of each memory that is too small for it: its name, what is needed and what may be used."""
    found = []
    for tier, name in (("device", "GPU"), ("host", "host")):
        needed, capacity = sum(placed[tier].values()), result[f"{tier}_capacity"]
        if needed > capacity:
            found.append((name, needed, capacity))
    return found


def _remedy(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What would be enough for the placement that comes nearest, if that is memory."""
    nearest = _nearest(result)
    if nearest is None:
        return []
    enough = []
    for name, needed, capacity in _missing(result, nearest):
        whole = result["hardware"]["device_bytes" if name == "GPU" else "host_bytes"]
        gib = math.ceil(needed * (whole / max(1, capacity)) / 2**30)
        enough.append(f"--{name.lower()}-memory {gib}GiB")
    rows = [("fits", f"with {' '.join(enough)}: {_off(nearest)} off the device")]
    largest = max(result["largest"], key=lambda row: row["parameters"], default=None)
    if result["gpus"] == 1 and largest is not None and largest["parameters"]:
        parameters = f"{_count(largest['parameters'])} parameters of Llama's shape"
        rows.append(("here", f"{parameters} fit, with {largest['kept']}"))
    return rows


def _call(result: Mapping[str, Any], placed: Mapping[str, Any], options: Mapping[str, str]) -> str:
    """The call that takes this placement, with these options of its kinds."""
    given = {**options, **_formats(result)}
    if "activation_format" in given:  # which is for those that leave
        given = {"activations": placed["options"]["activations"], **given}
    words = [f", {name}={value!r}" for name, value in given.items()]
    if "disk" in placed["options"].values():
        words.append(", disk_path=DIRECTORY")
    return f"offload.wrap(model, optim{''.join(words)})"


def _given(placed: Mapping[str, Any]) -> dict[str, str]:
    """The options of `wrap` that ask for this placement: a part of the optimizer on the device is its own choice."""
    kinds = ["activations"] if placed["options"]["optimizer"] == "mixed" else list(_KINDS)
    usual = {"activations": "device"}
    return {kind: placed["options"][kind] for kind in kinds if placed["options"][kind] != usual.get(kind)}


def _formats(result: Mapping[str, Any]) -> dict[str, str]:
    """Those of the optimizer's states and of activations that are not the usual ones."""
    usual = {"moments": "fp32", "master": "auto", "activation_format": "exact"}
    return {kind: result[kind] for kind, form in usual.items() if result[kind] != form}


def _pace(step: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How fast a step is, and what bounds it: the busiest lane, and what compute waits for."""
    tokens, seconds = f"{step['tokens']:,} tokens", _seconds(step["seconds"])
    bound, share = _LANES[step["bound_by"]], step["busy"][step["bound_by"]] / step["seconds"]
    return [
        ("speed", f"about {_figures(step['tokens_per_s'])} tokens/s, a step of {tokens} in {seconds}"),
        ("bound", f"by {bound}, busy {share:.0%} of the step; compute waits for {_waits(step)}"),
    ]


def _heading(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    hardware, gpus = result["hardware"], result["gpus"]
    star = {name: "*" if name in hardware["assumed"] else "" for name in hardware}
    trainable, frozen = result["trainable_count"], result["frozen_count"]
    peak = hardware["fp32_flops" if result["dtype"] == "float32" else "flops"]
    each = result["resident_bytes"] / max(1, trainable + frozen)
    several, a_gpu = (f"{gpus} x ", " a GPU") if gpus > 1 else ("", "")
    formats = [f"{kind.replace('activation_format', 'activations')} {form}" for kind, form in _formats(result).items()]
    lines = [
        ("model", f"{result['model']}: {trainable:,} parameters{f', {frozen:,} more frozen' if frozen else ''}"),
        (
            "training",
            f"{', '.join([result['dtype'], result['optimizer_class'], *formats])}, sequences of "
            f"{result['length']:,} tokens{', checkpointing' if result['checkpointing'] else ''}",
        ),
        (
            "device",
            f"{several}{hardware['name']}: {format_bytes(hardware['device_bytes'])}, "
            f"{peak / 1e12:.3g} TFLOP/s, of which {hardware['mfu']:.0%}{star['mfu']} reached",
        ),
        ("link", f"{_rate(hardware['to_host'])} to the host, {_rate(hardware['to_device'])} to the device"),
        (
            "host",
            f"{format_bytes(hardware['host_bytes'])}{star['host_bytes']}{a_gpu}, updates at "
            f"{_rate(hardware['host_bandwidth'])}{star['host_bandwidth']}",
        ),
        (
            "disk",
            f"reads {_rate(hardware['disk_read'])}{star['disk_read']}, writes {_rate(hardware['disk_write'])}"
            f"{star['disk_write']}",
        ),
        ("source", hardware["source"]),
    ]
    if hardware["assumed"]:
        lines.append(("", "* assumed: --mfu, --host-memory, --host-bandwidth, --disk-bandwidth replace it"))
    lines += [
        (
            "needs",
            f"{format_bytes(result['resident_bytes'])} for weights, gradients and optimizer states, {each:.3g} bytes "
            f"a parameter, and about {format_bytes(result['sequence_bytes'])} for the activations of each sequence "
            f"(the rule of thumb of 40 GB a billion parameters: {format_bytes(result['rule_of_thumb_bytes'])})",
        ),
    ]
    return lines + [("note", note) for note in result["notes"]]


def _rows_of(result: Mapping[str, Any]) -> list[dict[str, int]]:
    """Placements that differ in what becomes of activations alone, as one: their numbers, by that."""
    found: dict[tuple[Any, ...], dict[str, int]] = {}
    for number, placed in enumerate(result["placements"]):
        tiers = (tuple(placed[tier].items()) for tier in ("device", "host", "disk"))
        same = (*(placed["options"][kind] for kind in _KINDS if kind != "activations"), *tiers, placed["kept"])
        found.setdefault(same, {})[placed["options"]["activations"]] = number
    return list(found.values())


def _number(result: Mapping[str, Any], placement: int) -> int:
    """Of the row that shows this placement."""
    return next(row for row, found in enumerate(_rows_of(result), 1) if placement in found.values())


def _places(result: Mapping[str, Any]) -> tuple[Rows, str]:
    steps, placements = result["steps"], result["placements"]
    batches = sorted({step["batch"] for step in steps})
    shown = batches[len(batches) // 2] if batches else None
    of_shown = {step["placement"]: step for step in steps if step["batch"] == shown}
    ways = list(dict.fromkeys(placed["options"]["activations"] for placed in placements))
    heads = [_WAYS[way] for way in ways] if len(ways) > 1 else ["step"] * len(ways)
    kinds = [name for kind, name in _KINDS.items() if kind != "activations"]
    rows: list[Sequence[str]] = [("#", *kinds, "device", "host", "disk", *heads)]
    for row, numbers in enumerate(_rows_of(result), 1):
        placed = placements[next(iter(numbers.values()))]
        optimizer, *others = (placed["options"][kind] for kind in _KINDS if kind != "activations")
        if optimizer == "mixed":
            optimizer = f"{1 - placed['kept']:.0%} host"
        tiers = (_in_gib(sum(placed[tier].values())) for tier in ("device", "host", "disk"))
        times = []
        for way in ways:
            step = of_shown.get(numbers.get(way, -1))
            times.append("no" if placed["refusal"] else "no room" if step is None else _seconds(step["seconds"]))
        rows.append((str(row), optimizer, *others, *tiers, *times))
    room = f"{_in_gib(result['device_capacity'])} GiB on the device and {_in_gib(result['host_capacity'])} GiB"
    remarks = f"Without activations: what fits is at most {room} on the host, and leaves the rest to them and others."
    if result["cheapest"] is not None:
        cheapest = placements[result["cheapest"]]
        is_chosen = result["plan"] is not None and _matches(cheapest, result["plan"])
        chosen = " and what `wrap` chooses" if is_chosen else ""
        leaving = cheapest["options"]["activations"] != "device" and len(ways) > 1
        number = f"#{_number(result, result['cheapest'])}{' with activations that leave' if leaving else ''}"
        remarks += f" {number} is the least offloading that fits{chosen}."
    if of_shown:
        tokens = f"{next(iter(of_shown.values()))['tokens']:,} tokens"
        remarks += f" A step is one of {tokens}"
        if len(ways) > 1:
            given = next(way for way in ways if way != "device")
            remarks += f", whose activations stay on the device or leave it (`activations='{given}'`)"
        elif ways[0] != "device":
            remarks += f", whose activations leave (`activations='{ways[0]}'`)"
        meanings = {"no": "it does not fit", "no room": "it does, and leaves none for so many activations"}
        said = [f"; {cell}: {meaning}" for cell, meaning in meanings.items() if any(cell in row for row in rows)]
        remarks += f"{''.join(said)}."
    return rows, remarks


def _speeds(result: Mapping[str, Any]) -> tuple[Rows, list[str]]:
    header = ("tokens", "#", "activations", "parts", "device GiB", "host GiB", "step", "tokens/s", "computes")
    rows: list[Sequence[str]] = [(*header, "waits for")]
    for number in result["fastest"]:
        step = result["steps"][number]
        placed = result["placements"][step["placement"]]
        on_host = sum(placed["host"].values()) + step["activation_host_bytes"]
        rows.append(
            (
                f"{step['tokens']:,}",
                str(_number(result, step["placement"])),
                _WAYS[placed["options"]["activations"]],
                str(step["micro_batches"]),
                _in_gib(step["device_bytes"]),
                _in_gib(on_host),
                _seconds(step["seconds"]),
                _figures(step["tokens_per_s"]),
                f"{step['busy']['compute'] / step['seconds']:.0%}",
                _waits(step),
            )
        )
    smallest = result["steps"][result["fastest"][0]]
    lanes = sorted(((lane, s) for lane, s in smallest["busy"].items() if s), key=lambda item: -item[1])
    busy = ", ".join(f"{_LANES[lane]} {_seconds(seconds)}" for lane, seconds in lanes)
    return rows, [
        "A step of so many tokens with the placement that is fastest, by its #. parts: micro-batches, as few as memory "
        "allows; device and host: with activations; computes: the share of the step; waits for: what it waits for "
        "most, and how long.",
        f"{smallest['tokens']:,} tokens need: {busy}.",
        *_ahead(result),
    ]


def _ahead(result: Mapping[str, Any]) -> list[str]:
    """Where updates that begin in backward would give a shorter step than the ones shown, in words."""
    found = []
    for number in result["fastest"]:
        shown = result["steps"][number]
        others = [s for s in result["steps"] if s["batch"] == shown["batch"] and s["ahead"] is not None]
        best = min(others, key=lambda step: step["ahead"]["seconds"], default=None)
        if best is None or best["ahead"]["seconds"] >= _WORTHWHILE * shown["seconds"]:
            continue
        ahead = best["ahead"]
        found.append(
            f"#{_number(result, best['placement'])} with `speculate='{math.ceil(ahead['backup_bytes'] / 2**30)}GiB'` "
            f"{best['tokens']:,} tokens in {_seconds(ahead['seconds'])}, and in {_seconds(ahead['clipped_seconds'])} "
            "where the norm clips"
        )
    return [f"Shorter, by updates that begin in backward: {'; '.join(found)}."] if found else []


def _waits(step: Mapping[str, Any]) -> str:
    """The lane that compute waits for longest."""
    lane = max(step["exposed"], key=step["exposed"].__getitem__)
    seconds = step["exposed"][lane]
    return f"{_LANES[lane]} {_seconds(seconds)}" if seconds > _WORTH_SHOWING * step["seconds"] else "nothing"


def _largest(result: Mapping[str, Any]) -> Rows:
    rows: list[Sequence[str]] = [("with", "parameters", "layers", "hidden")]
    for row in result["largest"]:
        hidden = 128 * row["layers"]
        rows.append((row["kept"], _count(row["parameters"]), str(row["layers"]), f"{hidden:,}"))
    return rows


def _matches(placed: Mapping[str, Any], plan: Mapping[str, Any]) -> bool:
    return all(placed["options"][kind] == plan[kind] for kind in _KINDS)


def _off(placed: Mapping[str, Any]) -> str:
    """What is not on the device, in words."""
    found = []
    for kind, name in _KINDS.items():
        place = placed["options"][kind]
        if place == "mixed":
            found.append(f"{1 - placed['kept']:.0%} of the {name}")
        elif place == "checkpoints":
            found.append(place)
        elif place != "device":
            found.append(f"{name} (disk)" if place == "disk" else name)
    return " and ".join([", ".join(found[:-1]), found[-1]] if len(found) > 1 else found) or "nothing"


def _in_gib(nbytes: float) -> str:
    """Without the unit."""
    gib = nbytes / 2**30
    return "-" if not nbytes else f"{gib:,.1f}" if nbytes >= _LEAST_GIB else f"{gib:.2g}"


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.3g} GB/s"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _figures(value: float) -> str:
    return f"{float(f'{value:.3g}'):,.0f}"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.1f} billion" if parameters >= 1e9 else f"{parameters / 1e6:.0f} million"
