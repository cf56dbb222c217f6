"""Ends with exit code 1 and the reason where torch has no NVIDIA device to use; names it otherwise."""

import sys

import torch

if not torch.cuda.is_available():
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU alone"
    sys.exit(
        f"torch {torch.__version__} of {sys.executable} (built for {built_for}) sees no NVIDIA device. Check "
        "nvidia-smi, CUDA_VISIBLE_DEVICES and that PYTHON has a torch with CUDA; REQUIRE_GPU=0 builds and tests "
        "without one."
    )
print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
