"""What these tests share: the small models of tests/python, and no model hub."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # every model is made from a config
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))

# timm imports torchvision, whose wheel for CUDA has no operators beside a torch without; nobody calls them.
if torch.version.cuda is None:
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
