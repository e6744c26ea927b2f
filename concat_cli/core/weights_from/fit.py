"""Whether tensors are those of a module: names, shapes, kinds of number, and values."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from concat_cli.core.errors import UserError

AGAIN = "Copy the file again, or make it again with the command that wrote it."
_SPARE = 500  # parameters that a model may have while it is made, such as a backbone's own classes


@contextmanager
def on_paper(tensors: Mapping[str, Tensor]) -> Generator[None]:
    """Inside, modules are made without values (on the meta device), to be compared with tensors.

    UserError where far more parameters are made than there are tensors: many layers take their time
    even so, and nothing could fill them.
    """
    made, most = itertools.count(1), _SPARE + 2 * len(tensors)

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if next(made) > most:
            what = f"there are {len(tensors)} tensors, far fewer than its configuration needs."
            raise UserError(what, AGAIN)

    hook = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):
            yield
    finally:
        hook.remove()


def misfit(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """What is wrong with tensors that are to be a module's state, in words; empty where they fit.

    expected: the state, which may lie on the meta device. Values that are no finite numbers do not
    fit: a model with one predicts nothing, and does not say so.
    """
    for name, here in expected.items():
        there = found.get(name)
        if there is None:
            return f"{name} is missing"
        if there.shape != here.shape:
            return f"{name} is {tuple(there.shape)} there and {tuple(here.shape)} here"
        if here.is_floating_point() and not there.is_floating_point():
            return f"{name} holds {str(there.dtype).removeprefix('torch.')}, no fractions"
    extra = [name for name in found if name not in expected]
    if extra:
        return f"{extra[0]} has no place in it ({len(extra)} such tensors)"
    return not_finite(found)


def not_finite(tensors: Mapping[str, Tensor]) -> str:
    """Which tensor holds NaN or infinity, in words; empty where none does."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not _is_finite(tensor.float()):
            return f"{name} holds values that are no numbers (NaN or infinite)"
    return ""


def _is_finite(tensor: Tensor) -> bool:
    """A sum takes a tenth of the time, and is not finite where a value is not."""
    return bool(tensor.sum().isfinite()) or bool(torch.isfinite(tensor).all())
