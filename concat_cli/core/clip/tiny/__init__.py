"""The built-in tiny CLIP: where its files lie, and how its unused token rows are left out.

A real open_clip model (`open_clip_config.json`) that has seen the built-in world only; `train.py`
made the weights. Of the 49408 rows of the token table only those of the captions' tokens are kept.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from concat_cli.core.errors import UserError
from concat_cli.core.files import write_bytes

FOLDER = Path(__file__).parent
FILES = {"tiny": FOLDER / "weights.safetensors", "tiny-weak": FOLDER / "weak.safetensors"}
TABLE, ROWS = "token_embedding.weight", "token_embedding.rows"


@dataclass(frozen=True)
class TinyWeights:
    """A tiny CLIP's full state and the words that its captions held."""

    state: dict[str, Tensor]
    words: frozenset[str]


def unknown_rows(rows: int, width: int) -> Tensor:
    """(rows, width) float32 in +-0.02: rows of tokens never trained, the same on every machine."""
    z = np.arange(rows * width, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    unit = (z >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1)
    return torch.from_numpy(unit * np.float32(0.02)).reshape(rows, width)


def save_tiny(path: Path, state: dict[str, Tensor], rows: Tensor, words: list[str]) -> None:
    """Writes matrices as fp16, vectors as fp32. `state` holds the whole token table; of it only
    the rows named in `rows` (R,) are written."""
    packed = {name: _narrow(tensor) for name, tensor in state.items()}
    packed[TABLE] = _narrow(state[TABLE][rows])
    packed[ROWS] = rows.to(torch.int32)
    meta = {"words": json.dumps(sorted(words)), "table_rows": str(state[TABLE].shape[0])}
    write_bytes(path, save(packed, metadata=meta))


def load_tiny(path: Path) -> TinyWeights:
    """The inverse of `save_tiny`, in fp32; UserError for a missing or broken file."""
    if not path.is_file():
        raise UserError(
            f"The built-in CLIP's weights are missing: {path}.",
            "Install the package again, or make them (about 10 minutes): "
            "python -m concat_cli.core.clip.tiny.train",
        )
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata()
            packed = {name: file.get_tensor(name) for name in file.keys()}
        rows = packed.pop(ROWS).long()
        table = unknown_rows(int(meta["table_rows"]), packed[TABLE].shape[1])
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise UserError(
            f"The built-in CLIP's weights cannot be read: {path} ({error}).",
            "Install the package again.",
        ) from error
    table[rows] = packed[TABLE].float()
    packed[TABLE] = table
    state = {k: v.float() if v.is_floating_point() else v for k, v in packed.items()}
    return TinyWeights(state, frozenset(json.loads(meta["words"])))


def _narrow(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu().contiguous()
    return tensor.half() if tensor.is_floating_point() and tensor.ndim > 1 else tensor
