"""docs/deepspeed.md, written from the table of keys: `python -m offload.deepspeed._docs > docs/deepspeed.md`."""

from __future__ import annotations

import json
from typing import Any

from ._check import joined
from ._sections import SECTIONS
from ._surface import REQUIRED, Key, Section
from ._surface_elsewhere import ENVIRONMENT
from ._surface_training import REFUSED_OPTIMIZERS
from ._values import kind_text, limits_text

__all__ = ["document"]

_OPENING = """\
# Bring your DeepSpeed config

A script and a JSON written for DeepSpeed run with one changed import:

```python
import offload.deepspeed as deepspeed

engine, optimizer, loader, scheduler = deepspeed.initialize(model=model, config="ds_config.json")
```

Ask first what your file means here; nothing is trained and no model is needed:

```
offload config check ds_config.json      # exit code 1, and every reason, if anything would be refused
offload config explain ds_config.json    # each of your keys: what it does, or why nothing; then the placement
```

## What to expect

Every key that DeepSpeed knows is in one of three classes, and this page has them all.

- **Honoured**: it means what it means in DeepSpeed.
- **No effect**: it may stay in the file, and changes nothing: it tunes machinery that is not needed here, as buckets
  for communication, or asks for ranks that one process does not have. What is trained is the same without it.
- **Refused**: it would change what is trained, and offload cannot do that. The error says what to write instead.

The machine decides how fast, the config decides what is learnt: where tensors live changes no bit of the result.

### Differences worth knowing

- **A typo is told.** DeepSpeed ignores unknown keys at the top level and in several sections, so that
  `zero_optimisation` trains without ZeRO and without a word. Here each such key is a warning that names the nearest
  known one, and an error of `offload config check`. Where DeepSpeed refuses unknown keys, so does offload.
- **All errors come at once**, each with its JSON path, the value and the rule.
- **Clipping is on unless you say otherwise**: `gradient_clipping` defaults to 1.0, as in DeepSpeed since June 2026. The
  log says so. Write `0.0` to clip nothing.
- **`Adam` decays weights as `AdamW` does** unless `adam_w_mode` is false, as in DeepSpeed.
- **One process**: the world size is 1, so `train_batch_size` is `train_micro_batch_size_per_gpu` times
  `gradient_accumulation_steps`. Give two of them, or one of the first two; the rest follows. Three that are those of
  several processes are refused, with the `gradient_accumulation_steps` that makes the same step of one.
- **`nvme`**: optimizer states and weights live in files that have a checksum for each block, are private, and go with
  the process. Host memory is a cache of the weights. Gradients are in host memory.
- **`warmup_num_steps: 0` works.**

### Files

A config is a dict, the path of a file, or base64 text. Files may be strict JSON or Hjson: comments, trailing commas
and bare keys are legal. Duplicate keys are errors. Numbers and flags convert as in DeepSpeed: `5e8` is a whole number,
`"3"` and `"true"` are what they look like; `530841.6` is not a whole number. Where DeepSpeed ignores unknown keys,
those that begin with `_`, `//`, `#` or `comment` are comments.

### `auto`

Hugging Face's Trainer and Accelerate fill in keys that say `"auto"` before DeepSpeed sees them. `offload config` knows
which they are and shows what fills them in. A script without the Trainer must write values, or pass them:
`initialize(..., auto={"optimizer.params.lr": 1e-4})`. Where DeepSpeed would take its default, offload does and warns;
elsewhere an `auto` that nothing filled in is an error.

### Hugging Face's Trainer and Accelerate

`TrainingArguments(deepspeed="ds_config.json")`, Accelerate's `DeepSpeedPlugin` and Lightning's `DeepSpeedStrategy` ask
for the package `deepspeed` itself and bring its engine. Leave them out, and let the same file say where tensors live:

```python
model, optim = offload.wrap(model, optim, **offload.deepspeed.wrap_options("ds_config.json"))
trainer = Trainer(model=model, args=arguments, train_dataset=data, optimizers=(optim, schedule))
```

Batch sizes, accumulation, clipping, optimizer, schedule and checkpoints are then Trainer's own arguments, and its
`auto` has nothing left to fill in; where the file says more than `auto` of these, a warning names what is not read.
With Accelerate give the two to `prepare`; with Lightning [wrap where the optimizer is
made](placement.md#in-frameworks). Two things differ:

- **16 bits**: DeepSpeed's `bf16` casts the model. Load it so (`from_pretrained(..., dtype=torch.bfloat16)`) and leave
  `TrainingArguments(bf16=...)` out, which is autocast: a 16-bit weight has an fp32 master here too.
- **`cpu_checkpointing`** moves what checkpoints save: `model.gradient_checkpointing_enable()` makes them.

### What else of the package a script finds

`offload.deepspeed` has the names that public scripts import, by the same paths, and what it lacks raises an error that
names what to use. Of those that reach into the engine:

- `deepspeed.utils.safe_get_full_fp32_param`, `..._grad`, `..._optimizer_state`, their `safe_set_...` and
  `..._local_...` work at every stage, and under `offload_param` and `nvme`. As DeepSpeed's, gradients are those of the
  scaled loss. A weight that is set counts in the next forward (DeepSpeed's: after the next step).
- `deepspeed.utils.zero_to_fp32` reads offload's checkpoints, and DeepSpeed's of one rank.
- Weights that come and go have `ds_id`, `ds_status`, `ds_shape` and `ds_numel`, by which scripts know what to gather.
"""
_ENVIRONMENT = """\
## Environment variables and launcher flags

None of DeepSpeed's is read, and none is needed.
"""
_STANDINGS = {"honoured": "**honoured**", "accepted": "no effect", "refused": "*refused*"}


def document() -> str:
    """The whole page."""
    parts = [_OPENING, _contents(), *map(_section, SECTIONS.values()), _refused_optimizers(), _environment()]
    return "\n".join(parts)


def _contents() -> str:
    links = ", ".join(f"[{_title(section)}](#{_anchor(section)})" for section in SECTIONS.values())
    return f"## All keys\n\nAll defaults are DeepSpeed's, of version 0.19.8. Sections: {links}.\n"


def _title(section: Section) -> str:
    kind, _, name = section.path.partition(".")
    if section.arguments or section.path in ("optimizer.Lamb", "optimizer.Muon"):
        return f"{kind}.params of {name}"
    return section.path or "Top level"


def _anchor(section: Section) -> str:
    """The anchor that Markdown renderers make of the heading."""
    return _title(section).lower().replace(".", "").replace(" ", "-")


def _section(section: Section) -> str:
    lines = [f"### {_title(section)}", ""]
    unknown = "Unknown keys are refused." if section.strict or section.arguments else ""
    text = " ".join(part for part in (section.text, unknown) if part)
    if text:
        lines += [text, ""]
    lines += ["| key | legal | default | class | here |", "| --- | --- | --- | --- | --- |"]
    lines += [_row(section, key) for key in section.keys]
    return "\n".join(lines) + "\n"


def _row(section: Section, key: Key) -> str:
    name = f"`{key.name}`" + (f" or `{key.also}`" if key.also else "")
    standing, text = _STANDINGS[key.standing], key.text
    if key.now is not None:
        now = section.find(key.now)
        assert now is not None
        instead = f"`{key.now}`" if key.now_value is None else f"`{key.now}: {json.dumps(key.now_value)}`"
        standing, text = _STANDINGS[now.standing], f"Old spelling: write {instead}."
    inside = SECTIONS.get(joined(section.path, key.name))
    if inside is not None:
        standing, text = "section", f"See [{_title(inside)}](#{_anchor(inside)})."
    if key.trainer:
        text += f" `auto`: {key.trainer}."
    legal = kind_text(key.kind) + limits_text(key)
    return "| " + " | ".join((name, legal, _default(key.default), standing, text)) + " |"


def _default(default: Any) -> str:
    if default == REQUIRED:
        return "required"
    if isinstance(default, list) and len(default) > 2:
        return f"{len(default)} names" if isinstance(default[0], str) else f"`{json.dumps(default)}`"
    return f"`{json.dumps(default)}`"


def _refused_optimizers() -> str:
    lines = ["## Optimizers that are refused", "", "| `optimizer.type` | why, and what to write |", "| --- | --- |"]
    lines += [f"| `{name}` | {text} |" for name, text in REFUSED_OPTIMIZERS.items()]
    return "\n".join(lines) + "\n"


def _environment() -> str:
    rows = "".join(f"| `{name}` | {text} |\n" for name, text in ENVIRONMENT)
    return f"{_ENVIRONMENT}\n| name | instead |\n| --- | --- |\n{rows}"


if __name__ == "__main__":
    print(document(), end="")
