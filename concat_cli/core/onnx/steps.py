"""What stands around the model in an ONNX file.

Before it a picture is resized as `data.transforms.resize_short` does, to whole numbers after each
of its two directions as Pillow does, and padded. After it come the weights that resize masks to
the picture, as `infer.postprocess.resize_matrix` makes them.

`op(kind, *inputs, **attributes)` adds a node and gives its value; numbers and arrays among the
inputs become constants. Sizes are int64 vectors, so that nothing of a picture's size is fixed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from concat_cli.core.config import InferConfig
from concat_cli.core.infer.postprocess import MASK_STRIDE
from concat_cli.core.infer.predictor import DIVISOR

Op = Callable[..., Any]
_FLOAT, _INT64, _BOOL, _DOUBLE = 1, 7, 9, 11  # of ONNX's TensorProto.DataType


def before(op: Op, image: Any, cfg: InferConfig) -> tuple[Any, Any, Any]:
    """Picture (H, W, 3) uint8 -> images (1, 3, H', W') in 0-1, padding (1, H', W'), and the size
    (2,) that the picture has in it."""
    sides = op("Slice", op("Shape", image), _ints(0), _ints(2))
    valid = _resized(op, sides, cfg)
    blocks = op("Div", op("Add", valid, _ints(DIVISOR - 1)), _ints(DIVISOR))
    beyond = op("Sub", op("Mul", blocks, _ints(DIVISOR)), valid)
    first = op("Unsqueeze", op("Transpose", image, perm=[2, 0, 1]), _ints(0))
    pixels = op("Cast", first, to=_FLOAT)  # (1, 3, H, W)
    height, width = op("Slice", sides, _ints(0), _ints(1)), op("Slice", valid, _ints(1), _ints(2))
    for size in (op("Concat", height, width, axis=0), valid):  # columns, then rows
        whole = op("Concat", _ints(1, 3), size, axis=0)
        how = {"mode": "linear", "antialias": 1, "exclude_outside": 1}
        pixels = op("Resize", pixels, None, None, whole, **how)
        pixels = op("Floor", op("Add", pixels, _float(0.5)))
    pads = op("Concat", _ints(0, 0, 0, 0, 0, 0), beyond, axis=0)
    images = op("Pad", op("Div", pixels, _float(255)), pads, _float(0))
    inside = op("Expand", _float(0), op("Concat", _ints(1), valid, axis=0))
    pads = op("Concat", _ints(0, 0, 0, 0), beyond, axis=0)
    return images, op("Cast", op("Pad", inside, pads, _float(1)), to=_BOOL), valid


def _resized(op: Op, sides: Any, cfg: InferConfig) -> Any:
    """`data.transforms.short_size` of the sides (2,)."""
    real = op("Cast", sides, to=_DOUBLE)
    short = op("Div", np.float64(cfg.size), op("ReduceMin", real, keepdims=0))
    long = op("Div", np.float64(cfg.max_size), op("ReduceMax", real, keepdims=0))
    scaled = op("Round", op("Mul", real, op("Min", short, long)))  # half to even, as Python does
    return op("Cast", op("Max", scaled, np.float64(1)), to=_INT64)


def after(op: Op, image: Any, valid: Any, mask_logits: Any) -> tuple[Any, Any]:
    """Weights (H, h) and (W, w): rows @ mask_logits @ columns.T are the masks (Q, H, W)."""
    found: list[Any] = []
    for axis in (0, 1):
        source = op("Gather", op("Shape", mask_logits), np.int64(axis + 1))
        inner = op("Gather", valid, np.int64(axis))
        up = _linear(op, source, op("Mul", source, np.int64(MASK_STRIDE)))
        up = op("Slice", up, _ints(0), op("Unsqueeze", inner, _ints(0)))  # (inner, source)
        full = op("Gather", op("Shape", image), np.int64(axis))
        found.append(op("MatMul", _linear(op, inner, full), up))
    return found[0], found[1]


def _linear(op: Op, source: Any, target: Any) -> Any:
    """Weights (target, source) of a linear resize between centres of cells, edges repeated."""
    old, new = (op("Cast", size, to=_FLOAT) for size in (source, target))
    centres = op("Add", _counted(op, target), _float(0.5))
    places = op("Sub", op("Mul", centres, op("Div", old, new)), _float(0.5))
    places = op("Clip", places, _float(0), op("Sub", old, _float(1)))
    distance = op("Sub", op("Unsqueeze", places, _ints(1)), _counted(op, source))
    return op("Relu", op("Sub", _float(1), op("Abs", distance)))


def _counted(op: Op, count: Any) -> Any:
    """0, 1, ... (count,) as floats."""
    return op("Cast", op("Range", np.int64(0), count, np.int64(1)), to=_FLOAT)


def _ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def _float(value: float) -> np.float32:
    return np.float32(value)
