"""Losses, each a function of tensors; computed in at least fp32, whatever autocast is on."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor


def as_float(values: Tensor) -> Tensor:
    """The values in fp32; fp64 stays fp64."""
    return values if values.dtype == torch.float64 else values.float()


def full_precision(like: Tensor) -> AbstractContextManager[object]:
    """A context without autocast on the tensor's device."""
    return torch.autocast(like.device.type, enabled=False)
