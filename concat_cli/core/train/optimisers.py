"""torch's optimisers without its compiler."""

from __future__ import annotations

import inspect
from typing import TypeVar, cast

import torch
from torch.optim import Optimizer

Kind = TypeVar("Kind", bound=Optimizer)
_WRAPPED = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")


def eager(kind: type[Kind]) -> type[Kind]:
    """An optimiser class that steps as torch's own, equal to the bit, and imports no compiler.

    torch wraps these methods to tell `torch.compile` apart; the first call imports all of
    torch._dynamo, which takes almost as long as torch itself. Nothing here is compiled. The class
    has no `differentiable` steps.
    """
    plain = {name: inspect.unwrap(getattr(kind, name)) for name in _WRAPPED}
    plain["step"] = torch.no_grad()(inspect.unwrap(kind.step))
    return cast("type[Kind]", type(kind.__name__, (kind,), plain))
