"""A DeepSpeed config from wherever it is: a dict, a file of JSON or Hjson, base64 of such text."""

from __future__ import annotations

import base64
import binascii
import json
from collections import Counter
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from offload import InvalidArgument

__all__ = ["read"]


def read(config: Mapping[str, Any] | str | PathLike[str]) -> Mapping[str, Any]:
    """The config as a mapping, unchecked; a mapping is returned as it is.

    Text may be the path of a file, or base64 (URL alphabet) of a config. Hjson is legal wherever JSON is: comments,
    trailing commas, keys without quotes.

    Raises InvalidArgument naming the file for what is missing, unreadable or no object, and for duplicate keys;
    ModuleNotFoundError where Hjson is to be read and the package `hjson` is missing.
    """
    if isinstance(config, Mapping):
        return config
    if not isinstance(config, (str, PathLike)):
        raise InvalidArgument(f"the DeepSpeed config is a {type(config).__name__}: give a dict, a path or base64 text")
    path = Path(config)
    try:
        # utf-8-sig: some editors put a byte-order mark before the text.
        return parse(path.read_text(encoding="utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except IsADirectoryError:
        raise InvalidArgument(f"{path}: is a directory: give the path of a JSON file") from None
    except OSError as error:
        text = _from_base64(config) if isinstance(config, str) else None
        if text is None:
            shown = str(path) if len(str(path)) <= 200 else str(path)[:200] + "..."
            raise InvalidArgument(
                f"{shown}: {error.strerror}, and it is not base64 of a config: give the path of a JSON file, a dict "
                "or base64 text"
            ) from None
        return parse(text, "the base64 config")


def parse(text: str, name: str) -> Mapping[str, Any]:
    """The object that JSON or Hjson text holds; `name` says in errors where it comes from."""

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        if repeated:
            raise InvalidArgument(f"{name}: duplicate keys {repeated}: keep one of each")
        return dict(pairs)

    try:
        found = json.loads(text, object_pairs_hook=without_duplicates)
    except json.JSONDecodeError as error:
        found = _parse_hjson(text, name, error, without_duplicates)
    except RecursionError:
        raise InvalidArgument(f"{name}: holds brackets in brackets without end: a DeepSpeed config is flat") from None
    if not isinstance(found, dict):
        raise InvalidArgument(f"{name}: holds a {type(found).__name__}: a DeepSpeed config is an object, {{...}}")
    return found


def _parse_hjson(text: str, name: str, json_error: json.JSONDecodeError, pairs_hook: Any) -> Any:
    try:
        import hjson
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{name}: not strict JSON ({json_error}), and the package hjson, which reads comments, trailing commas and "
            "bare keys, is not installed: pip install hjson",
            name="hjson",
        ) from None
    try:
        return hjson.loads(text, object_pairs_hook=pairs_hook)
    except (hjson.HjsonDecodeError, RecursionError) as error:
        raise InvalidArgument(f"{name}: neither JSON ({json_error}) nor Hjson ({error})") from None


def _from_base64(text: str) -> str | None:
    try:
        return base64.b64decode(text, altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        return None
