"""The built-in tiny CLIP: where its files lie, and how its unused token rows are left out.

A real open_clip model (`open_clip_config.json`) that has seen the built-in world only; `make
tiny-clip` in a checkout makes its weights. Two things keep the files small: of the 49408 rows of
the token table only those of the captions' tokens are stored, and matrices are stored as int8 with
a scale for each row.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from concat_cli.core.errors import UserError

FOLDER = Path(__file__).parent
FILES = {"tiny": FOLDER / "weights.safetensors", "tiny-weak": FOLDER / "weak.safetensors"}
TABLE, ROWS, SCALE = "token_embedding.weight", "token_embedding.rows", ".scale"


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
    table = torch.from_numpy(unit * np.float32(0.02))  # pyright: ignore[reportUnknownMemberType]
    return table.reshape(rows, width)


def _unpack(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    """A whole file's tensors in fp32: matrices are int8 there, with the scales of their rows."""
    state: dict[str, Tensor] = {}
    for name, tensor in packed.items():
        if name + SCALE in packed:
            scale = packed[name + SCALE].reshape(-1, *[1] * (tensor.ndim - 1))
            state[name] = tensor.float() * scale
        elif not name.endswith(SCALE):
            state[name] = tensor
    return state


def load_tiny(path: Path) -> TinyWeights:
    """The weights of a file, in fp32; UserError for a missing or broken one."""
    if not path.is_file():
        raise UserError(
            f"The built-in CLIP's weights are missing: {path}.",
            "Install the package again; in a checkout, `make tiny-clip` makes them (10 minutes).",
        )
    try:
        with cast("Any", safe_open(path, framework="pt")) as file:
            meta: dict[str, str] = file.metadata()
            packed: dict[str, Tensor] = {name: file.get_tensor(name) for name in [*file.keys()]}
        state = _unpack(packed)
        rows = state.pop(ROWS).long()
        table = unknown_rows(int(meta["table_rows"]), state[TABLE].shape[1])
        table[rows] = state[TABLE]
    except (SafetensorError, OSError, KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"The built-in CLIP's weights cannot be read: {path} ({error}).",
            "Install the package again.",
        ) from error
    return TinyWeights(state | {TABLE: table}, frozenset(json.loads(meta["words"])))
