"""A device of torch in host memory; __main__.py says what for."""

import importlib


def load_card() -> None:
    """What torch calls at the end of its import."""
    importlib.import_module("torch_double.card")  # registers the device
