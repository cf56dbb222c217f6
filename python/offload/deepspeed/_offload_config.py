"""The words for places and stages that scripts give and read, by DeepSpeed's names."""

from __future__ import annotations

import enum

__all__ = ["OffloadDeviceEnum", "OffloadStateTypeEnum", "ZeroParamStatus"]


class OffloadDeviceEnum(str, enum.Enum):
    """Where states go."""

    none = "none"
    cpu = "cpu"
    nvme = "nvme"


class OffloadStateTypeEnum(str, enum.Enum):
    """What goes there."""

    optim_states = "optim_states"
    hp_params = "hp_params"
    lp_params = "lp_params"
    lp_grads = "lp_grads"
    contiguous_grad_buffer = "contiguous_grad_buffer"


class ZeroParamStatus(enum.Enum):
    """`parameter.ds_status` of weights that come and go. They have NOT_AVAILABLE all the time: gather them."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2
    INFLIGHT = 3
