"""Launches every kernel through cuda.core, over the libcuda of tests/host_kernels: run with that first in the loader's
path, by test_kernel_compiler.py.

What torch knows of a card is made up; what cuda.core loads and launches is not. Prints what was launched, and why not.
"""

from __future__ import annotations

import contextlib
import sys
import types

import torch

from offload._kernels import find_kernels
from test_activation_format import FORMS, normal
from test_activation_format import assert_all_agree as assert_forms_agree
from test_kernels import CASES, States, assert_all_agree
from test_kernels_small_states import assert_all_agree as assert_small_agree
from test_kernels_small_states import made

ARCHITECTURE = (9, 0)


def main() -> None:
    streams = iter(range(0, 4096, 64))  # 0 is the legacy default stream
    torch.cuda.get_device_capability = lambda device: ARCHITECTURE
    torch.cuda.device = lambda device: contextlib.nullcontext()
    torch.cuda.current_stream = lambda device: types.SimpleNamespace(cuda_stream=next(streams))
    found = find_kernels(torch.device("cuda", 0))
    if found.kernels is None:
        sys.exit(f"refused: {found.refusal}")
    for name in ("AdamW", "Lion", "Adagrad"):
        assert_all_agree(States.random(5003, torch.bfloat16, torch.float16), found.kernels, *CASES[name], 1 / 192)
    for form in ("bf16", "int8"):
        assert_small_agree(found.kernels, "adamw", "bf16", made(form, "adamw", "bf16", 5003))
    rounding = find_kernels(torch.device("cuda", 0), "activations").kernels
    assert rounding is not None
    for form in FORMS:
        assert_forms_agree(rounding, form, normal(5003, 1.0).to(torch.bfloat16))


if __name__ == "__main__":
    main()
