"""The table of keys, put together: `SECTIONS` by dotted path, in the order of docs/deepspeed.md."""

from __future__ import annotations

import difflib

from . import _surface_elsewhere, _surface_services, _surface_training, _surface_zero
from ._surface import Section

__all__ = ["SECTIONS", "nearest"]

SECTIONS: dict[str, Section] = {
    section.path: section
    for module in (_surface_training, _surface_zero, _surface_services, _surface_elsewhere)
    for section in module.SECTIONS
}

# Keys that people write for others, as their own scripts or other libraries call them.
_MEANT = {
    "max_grad_norm": "gradient_clipping",
    "clip_grad_norm": "gradient_clipping",
    "gradient_checkpointing": "model.gradient_checkpointing_enable()",
}


def nearest(name: str, section: Section) -> str | None:
    """What an unknown key of this section was probably meant to be: a near spelling, or the same key elsewhere."""
    if section.path == "" and name in _MEANT:
        return _MEANT[name]
    known = [spelling for key in section.keys for spelling in (key.name, key.also) if spelling]
    words = set(name.split("_"))
    same_words = [spelling for spelling in known if words <= set(spelling.split("_"))]
    if len(same_words) == 1:  # warmup_steps, for warmup_num_steps
        return same_words[0]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    if near:
        return near[0]
    for other in SECTIONS.values():
        # The arguments of an optimizer or a schedule have names too plain to point at.
        if other.find(name) and not other.path.startswith(("optimizer.", "scheduler.")):
            return f"{other.path}.{name}" if other.path else f"{name}, at the top level"
    return None
