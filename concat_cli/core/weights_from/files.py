"""Files of tensors from elsewhere, read in such a way that nothing in them can run.

Pickled files are programs. So a torch file is read with `weights_only`, and a plain pickle (the
model zoo of detectron2) by an unpickler that knows how to put NumPy arrays together, and no more.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from concat_cli.core.errors import UserError

_ZIP = b"PK\x03\x04"  # torch.save since 1.6
_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before: its magic number
_INSIDE = ("model", "state_dict", "model_state_dict", "module")  # where checkpoints keep the model
_DAMAGED = (
    pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, TypeError, AttributeError,
    RuntimeError, OSError, MemoryError, SafetensorError,
)  # fmt: skip


class RefusedError(pickle.UnpicklingError):
    """A pickle asks for something else than arrays."""


def _latin1(text: str, encoding: str) -> bytes:
    """What NumPy's pickles of protocol 2 use `_codecs.encode` for."""
    if encoding != "latin1" or not isinstance(text, str):
        raise RefusedError(f"_codecs.encode to {encoding}")
    return text.encode("latin1")


# What NumPy's own pickles call, as NumPy itself names it; modules moved from NumPy 1 to 2.
_NUMPY: dict[str, Any] = {
    "_reconstruct": np.zeros(1).__reduce__()[0],
    "scalar": np.float64(1).__reduce__()[0],
    "_frombuffer": np.zeros(1).__reduce_ex__(5)[0],
}
_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")
_MODULES += ("numpy.core.numeric", "numpy._core.numeric")
_ADMITTED: dict[tuple[str, str], Any] = {
    **{(module, name): call for module in _MODULES for name, call in _NUMPY.items()},
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _latin1,
    ("collections", "OrderedDict"): OrderedDict,
}


class ArrayUnpickler(pickle.Unpickler):
    """Reads pickles of plain values and NumPy arrays; anything else raises RefusedError."""

    def find_class(self, module: str, name: str) -> Any:
        """An admitted function or class."""
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise RefusedError(f"{module}.{name}") from None

    def persistent_load(self, pid: Any) -> Any:
        """Nothing lies outside of such a file."""
        raise RefusedError("a reference to something outside of the file")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors, torch or detectron2 file by name, on the CPU.

    The model is taken out of a training checkpoint ("model", "state_dict"), "module." prefixes go.
    UserError where the file is missing, damaged, holds no tensors, or would run code.
    """
    path = Path(path)
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "not there"
        raise UserError(f"{path} should be a file of weights, but it is {kind}.", "Check the path.")
    read = _reader(path)
    try:
        found = read(path)
    except RefusedError as error:
        raise _refused(path, str(error)) from error
    except _DAMAGED as error:
        if "weights_only" in str(error) or "Weights only" in str(error):
            raise _refused(path, _forbidden_name(str(error))) from error
        raise UserError(
            f"{path} cannot be read: {_short(error)}",
            "It must be a safetensors file, a torch file or a detectron2 pickle; copy it again if "
            "it may be incomplete.",
        ) from error
    tensors = dict(_tensors(_model_in(found)))
    if not tensors:
        raise UserError(f"{path} holds no tensors by name.", "Give a file of model weights.")
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def _reader(path: Path) -> Callable[[Path], Any]:
    """How to read a file, by its first bytes: names of such files are not to be relied on."""
    with path.open("rb") as file:
        start = file.read(len(_LEGACY))
    header = int.from_bytes(start[:8], "little")  # of safetensors, whose JSON follows
    if start[8:9] == b"{" and header < path.stat().st_size:
        return load_file
    if start.startswith(_ZIP) or start == _LEGACY:
        return _read_torch
    return _read_pickle if start[:1] == b"\x80" else load_file


def _read_torch(path: Path) -> Any:
    numpy = [*_NUMPY.values(), np.ndarray, np.dtype, np.dtypes.Float32DType]
    numpy += [np.dtypes.Float64DType, np.dtypes.Int64DType]  # counters beside the weights
    with torch.serialization.safe_globals(numpy):
        return torch.load(path, map_location="cpu", weights_only=True)


def _read_pickle(path: Path) -> Any:
    # detectron2 reads its own files as latin1 too: some were written by Python 2
    return ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()


def _model_in(found: Any) -> Any:
    while isinstance(found, Mapping):
        inner = next((found[k] for k in _INSIDE if isinstance(found.get(k), Mapping)), None)
        if inner is None:
            break
        found = inner
    return found


def _tensors(found: Any) -> Iterator[tuple[str, Tensor]]:
    for name, value in found.items() if isinstance(found, Mapping) else ():
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
            yield str(name), torch.from_numpy(np.array(value, order="C"))
        elif isinstance(value, Tensor):
            yield str(name), value.detach()


def _refused(path: Path, what: str) -> UserError:
    return UserError(
        f"{path} is refused: reading it would run code of its own ({what}). Nothing was run.",
        "Get the weights as safetensors, or save their tensors alone where you trust the source.",
    )


def _forbidden_name(message: str) -> str:
    """The name that torch did not admit, out of its long message."""
    if "TorchScript" in message:
        return "it is a TorchScript program"
    after = message.partition("GLOBAL ")[2].split()
    return after[0] if after else _short(ValueError(message))


def _short(error: BaseException, most: int = 160) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[:most] + "..."
