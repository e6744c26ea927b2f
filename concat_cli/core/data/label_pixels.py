"""Label files of every kind -> raw values, one for each pixel."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from concat_cli.core.data.image_io import BROKEN, MAX_PIXELS, broken, open_image, unread
from concat_cli.core.data.mat_tags import refuse_unsound
from concat_cli.core.data.source import Pixels
from concat_cli.core.data.store import File
from concat_cli.core.errors import UserError

MAT_NAME = "LabelMap"  # the one variable that is read from a .mat file
_GREY = ("L", "P", "1", "I", "I;16", "I;16B", "I;16L", "I;16N")
_NUMBERS = ("uint8", "uint16", "uint32", "int8", "int16", "int32", "double", "single", "logical")


def read_raw(file: File, pixels: Pixels, size: tuple[int, int]) -> np.ndarray:
    """(H, W) raw values of a label file, of an integer type; UserError naming the file.

    pixels: see `LabelFormat`. size: as of `read_id_png`.
    """
    if pixels == "mat":
        return _read_mat(file, size)
    if pixels == "ade_rg":
        red, green = _read_rg(file, size)
        return red // 10 * 256 + green if red.shape == size else red
    return _read_index(file, size)


def read_things(file: File, size: tuple[int, int]) -> np.ndarray:
    """(H, W) int32 of a map of things: 256 R + G, where R is the class; 0 where there is none.

    size: as of `read_id_png`.
    """
    red, green = _read_rg(file, size)
    if red.shape != size:
        return red
    return np.where(red > 0, red << 8 | green, 0)


def _read_index(file: File, size: tuple[int, int]) -> np.ndarray:
    try:
        with open_image(file) as image:
            if image.mode not in _GREY:
                raise UserError(
                    f"{file} is a {image.format} of mode {image.mode}, not a map of class values.",
                    "A label map is grey or of a palette, 8 or 16 bit; the value is the class.",
                )
            if (image.height, image.width) != size:
                return unread((image.height, image.width))
            values = np.asarray(image)
    except BROKEN as error:
        raise broken(file, error) from error
    return values.astype(np.uint8) if values.dtype == bool else values


def _read_rg(file: File, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The red and the green plane, (H, W) int32."""
    try:
        with open_image(file) as image:
            if image.mode not in ("RGB", "RGBA"):
                raise UserError(
                    f"{file} is a {image.format} of mode {image.mode}, not an RGB label map.",
                    "Its red and green channels hold the class.",
                )
            if (image.height, image.width) != size:
                nothing = unread((image.height, image.width))
                return nothing, nothing
            planes = np.asarray(image)
    except BROKEN as error:
        raise broken(file, error) from error
    return planes[..., 0].astype(np.int32), planes[..., 1].astype(np.int32)


def _read_mat(file: File, size: tuple[int, int]) -> np.ndarray:
    """`LabelMap` of a MATLAB file; its header is looked at before anything is unpacked."""
    from scipy.io import loadmat, whosmat
    from scipy.io.matlab import MatReadError

    if isinstance(file, Path) and not file.is_file():
        raise UserError(f"Label {file} does not exist.", "Check the path.")
    hint = f"A label file holds a matrix of numbers named {MAT_NAME}."
    try:
        data = file.read_bytes() if isinstance(file, Path) else file.read()
        refuse_unsound(data)
        held = {name: (shape, kind) for name, shape, kind in whosmat(io.BytesIO(data))}
        if MAT_NAME not in held:
            has = ", ".join(held) or "nothing"
            raise UserError(f"{file} holds no {MAT_NAME}, but {has}.", hint)
        shape, kind = held[MAT_NAME]
        if kind not in _NUMBERS or len(shape) != 2 or int(np.prod(shape)) > MAX_PIXELS:
            raise UserError(f"{MAT_NAME} of {file} is a {kind} of shape {shape}.", hint)
        if shape != size:
            return unread(shape)
        values: Any = loadmat(io.BytesIO(data), variable_names=[MAT_NAME])[MAT_NAME]
    except (MatReadError, NotImplementedError, OSError, ValueError, TypeError, KeyError) as error:
        raise broken(file, error) from error
    except (IndexError, EOFError, OverflowError, MemoryError, struct.error, zlib.error) as error:
        raise broken(file, error) from error
    except UnboundLocalError as error:  # a slip of SciPy's over some damaged files
        raise broken(file, error) from error
    if values.dtype.kind == "f":
        whole = values.astype(np.int64)
        if not np.array_equal(whole, values):
            raise UserError(f"{MAT_NAME} of {file} holds fractions.", hint)
        return whole
    return values
