"""A device of torch in host memory; __main__.py says what for."""


def load_card() -> None:
    """What torch calls at the end of its import."""
    import torch_double.card  # noqa: F401  # registers the device
