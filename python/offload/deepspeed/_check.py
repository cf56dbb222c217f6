"""A config held against the table of keys, one section at a time: typed values, and a report of all that was found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from offload import InvalidArgument

from ._sections import SECTIONS, nearest
from ._surface import REQUIRED, Key, Section, Standing
from ._values import coerce, switched_on

__all__ = ["Entry", "Report", "check", "fill", "joined", "missing"]

_COMMENTS = ("_", "//", "#", "comment")  # how names of keys begin that people put into JSON for each other


@dataclass(frozen=True)
class Entry:
    """One key as it stands in the config: what becomes of it, and why. value: as written."""

    path: str
    value: Any
    standing: Standing
    text: str


@dataclass
class Report:
    """What checking found.

    for_trainer: the config is for Hugging Face's Trainer, so "auto" may stand where the Trainer fills it in.
    errors: why the config is refused. doubts: what DeepSpeed lets pass, and its author will not have meant; errors
    where checking is strict. deprecations: old spellings. notices: what is done differently, for the log.
    unfilled: paths that the Trainer will fill in. no_effect: paths whose values ask for something that has no effect.
    """

    for_trainer: bool = False
    errors: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    deprecations: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    unfilled: set[str] = field(default_factory=set)
    no_effect: list[str] = field(default_factory=list)

    def refusals(self, strict: bool) -> list[str]:
        """What the config is refused for."""
        return self.errors + self.doubts if strict else self.errors

    def raise_refusals(self, strict: bool) -> None:
        """Raises InvalidArgument with every reason, where there are any."""
        refusals = self.refusals(strict)
        if len(refusals) == 1:
            raise InvalidArgument(refusals[0])
        if refusals:
            lines = "".join(f"\n  - {refusal}" for refusal in refusals)
            raise InvalidArgument(f"the DeepSpeed config has {len(refusals)} errors:{lines}")

    def note(self, path: str, value: Any, key: Key, text: str | None = None) -> None:
        """Enters a key of the config with its standing in the table."""
        self.entries.append(Entry(path, value, key.standing, key.text if text is None else text))


def joined(path: str, name: str) -> str:
    """The path of a key in a section."""
    return f"{path}.{name}" if path else name


def fill(config: Mapping[str, Any], auto: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """`config` with "auto" replaced by `auto`'s value of the same dotted path, where it has one."""
    filled = {}
    for name, value in config.items():
        where = joined(path, str(name))
        if isinstance(value, Mapping):
            filled[name] = fill(value, auto, where)
        else:
            filled[name] = auto[where] if value == "auto" and where in auto else value
    return filled


def check(section: Section, given: Mapping[str, Any], report: Report, path: str | None = None) -> dict[str, Any]:
    """Typed values of every key of the section, sections inside it included; the default where a value is not legal.

    path: where the section stands in the config, if that is not its own path.
    """
    path = section.path if path is None else path
    values: dict[str, Any] = {key.name: key.default for key in section.keys if key.now is None}
    given = _in_new_spelling(section, given, report, path)
    for name, value in given.items():
        key = section.find(name)
        if key is None:
            _report_unknown(section, name, value, report, path)
        elif key.name != name and key.name in given:
            report.errors.append(f"{joined(path, name)}: the same key as {key.name!r}, which is given too: keep one")
        else:
            _check_value(section, key, value, values, report, joined(path, name))
    for key in section.keys:
        inside = SECTIONS.get(joined(section.path, key.name))
        if inside is not None:
            inside_given = values[key.name] if isinstance(values[key.name], Mapping) else {}
            values[key.name] = check(inside, inside_given, report)
    return values


def _check_value(section: Section, key: Key, value: Any, values: dict[str, Any], report: Report, where: str) -> None:
    if value == "auto" and key.default != "auto" and key.kind not in ("str", "str?"):
        _report_auto(section, key, report, where)
        return
    try:
        # Where DeepSpeed does not look at types, null is as good as false.
        unset_flag = value is None and key.kind == "bool" and not section.strict
        typed = coerce(False if unset_flag else value, key, any_case=not section.strict)
    except ValueError as error:
        # DeepSpeed reads a lenient section without looking at types; where it has no effect that may go on.
        lenient = not (section.strict or section.arguments) and key.standing == "accepted"
        (report.doubts if lenient else report.errors).append(f"{where}={value!r}: {error}")
        report.note(where, value, key, f"{str(error)[0].upper()}{str(error)[1:]}.")
        return
    values[key.name] = typed
    if key.standing == "refused":
        if typed in key.harmless or (isinstance(typed, Mapping) and not switched_on(typed)):
            report.entries.append(Entry(where, value, "accepted", "Asks for nothing."))
            return
        report.errors.append(f"{where}={_shown(value)}: not available. {key.text}")
    elif key.standing == "accepted":
        if key.aloud and switched_on(typed):
            report.notices.append(f"{where}={_shown(value)}: {key.text}")
        elif typed != key.default and joined(section.path, key.name) not in SECTIONS:
            report.no_effect.append(where)
    has_rows = joined(section.path, key.name) in SECTIONS or key.name == "params"  # of its own, which say more
    if not (has_rows and isinstance(typed, Mapping)):
        report.note(where, value, key)


def _report_auto(section: Section, key: Key, report: Report, where: str) -> None:
    if report.for_trainer and key.trainer:
        report.unfilled.add(where)
        report.note(where, "auto", key, f"The Trainer fills in: {key.trainer}.")
        return
    filler = f" (Hugging Face's Trainer fills in {key.trainer})" if key.trainer else ""
    if section.strict:
        report.note(where, "auto", key, f"DeepSpeed takes its default here: {key.default!r}.")
        if key.standing == "honoured":
            report.doubts.append(
                f"{where}='auto': nothing filled it in{filler}; DeepSpeed's default is taken: {key.default!r}"
            )
    else:
        report.note(where, "auto", key, "Nothing fills it in.")
        found = report.doubts if key.standing == "accepted" else report.errors
        found.append(f"{where}='auto': nothing filled it in{filler}: write a value, or pass auto={{{where!r}: ...}}")


def _report_unknown(section: Section, name: str, value: Any, report: Report, path: str) -> None:
    where = joined(path, str(name))
    if section.open:
        report.entries.append(Entry(where, value, "accepted", section.text))
        return
    near = nearest(str(name), section)
    hint = f"did you mean {near!r}?" if near else "leave it out"
    if section.strict or section.arguments:
        report.entries.append(Entry(where, value, "refused", f"Unknown key: {hint}"))
        report.errors.append(f"{where}: unknown key, which DeepSpeed refuses: {hint}")
    elif str(name).startswith(_COMMENTS):
        report.entries.append(Entry(where, value, "accepted", "A comment."))
    else:
        report.entries.append(Entry(where, value, "accepted", f"Unknown key, ignored: {hint}"))
        report.doubts.append(f"{where}: unknown key, which has no effect, and DeepSpeed says nothing about it: {hint}")


def _in_new_spelling(section: Section, given: Mapping[str, Any], report: Report, path: str) -> dict[str, Any]:
    """The keys of a section with deprecated spellings replaced."""
    spelt = dict(given)
    for key in section.keys:
        if key.now is None or key.name not in spelt:
            continue
        value = spelt.pop(key.name)
        if value == "auto" and section.strict:  # as if it were not there
            continue
        old, new = joined(path, key.name), joined(path, key.now)
        now = section.find(key.now)
        assert now is not None
        report.entries.append(Entry(old, value, now.standing, f"Old spelling of `{key.now}`."))
        if key.now in spelt or (now.also and now.also in spelt):
            # Of the lenient sections, DeepSpeed reads the new spelling alone.
            found = report.errors if section.strict else report.doubts
            found.append(f"{old}: the old spelling of {new}, which is given too: leave {key.name!r} out")
            continue
        report.deprecations.append(f"{old} is the old spelling of {new}: write that")
        if key.now_value is None:
            spelt[key.now] = value
            continue
        try:
            if coerce(value, key, any_case=True):
                spelt[key.now] = key.now_value
        except ValueError as error:
            report.errors.append(f"{old}={value!r}: {error}")
    zero = spelt.get("zero_optimization")
    if section.path == "" and isinstance(zero, bool):
        report.deprecations.append(
            f"zero_optimization={zero}: true and false are the old spelling: write {{'stage': {int(zero)}}}"
        )
        spelt["zero_optimization"] = {"stage": int(zero)}
    return spelt


def missing(section: Section, given: Mapping[str, Any], report: Report, path: str) -> list[str]:
    """Names of the required keys that neither the config nor the Trainer gives."""
    return [
        key.name
        for key in section.keys
        if key.default is REQUIRED and key.name not in given and joined(path, key.name) not in report.unfilled
    ]


def _shown(value: Any) -> str:
    return "{...}" if isinstance(value, Mapping) else repr(value)
