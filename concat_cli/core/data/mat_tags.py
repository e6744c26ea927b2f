"""The tags of a MATLAB file, looked at before SciPy reads it: a damaged one ends its whole process.

Format: "MAT-File Format", version 5, MathWorks: elements of a type, a length and data.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

_HEAD = 4096  # bytes of a variable that hold its flags, shape, name and the tag of its values
_MATRIX, _COMPRESSED = 14, 15
_FLAGS, _SHAPE, _NAME = 6, 5, 1  # types of a matrix's first elements
_NUMBERS = (1, 2, 3, 4, 5, 6, 7, 9, 12, 13)  # types of values
_NUMERIC = range(6, 16)  # classes of matrices that hold numbers
_COMPLEX = 0x0800


def refuse_unsound(data: bytes) -> None:
    """ValueError or struct.error where a numeric variable of a version 5 file has tags that its
    format does not have; files of other versions pass."""
    order = {b"IM": "<", b"MI": ">"}.get(data[126:128])
    if order is None:
        return
    for variable in _variables(data, order):
        elements = _elements(variable, order)
        (flag_type, flags), (shape_type, shape), (name_type, _) = (next(elements) for _ in range(3))
        if (flag_type, shape_type, name_type) != (_FLAGS, _SHAPE, _NAME) or len(shape) < 8:
            raise ValueError("a variable without flags, shape or name")
        (bits,) = struct.unpack_from(f"{order}I", flags)
        if bits & 0xFF not in _NUMERIC:
            continue
        value_type, _ = next(elements)
        if value_type not in _NUMBERS or bits & _COMPLEX:
            raise ValueError("a variable with values of no real type")


def _variables(data: bytes, order: str) -> Iterator[bytes]:
    """The beginning of each variable's content, unpacked."""
    at = 128
    while at + 8 <= len(data):
        kind, length = struct.unpack_from(f"{order}II", data, at)
        content = data[at + 8 : at + 8 + length]
        if kind == _COMPRESSED:
            content = zlib.decompressobj().decompress(content, _HEAD)
            (kind,) = struct.unpack_from(f"{order}I", content)
            content = content[8:]
        if kind != _MATRIX:
            raise ValueError(f"an element of type {kind} instead of a variable")
        yield content[:_HEAD]
        at += 8 + length


def _elements(content: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """Type and content of each element; ValueError where they end."""
    at = 0
    while at + 8 <= len(content):
        kind, length = struct.unpack_from(f"{order}II", content, at)
        if kind >> 16:  # a short one: its length stands above its type, at most 4 bytes follow
            yield kind & 0xFFFF, content[at + 4 : at + 4 + min(4, kind >> 16)]
            at += 8
        else:
            yield kind, content[at + 8 : at + 8 + length]
            at += 8 + -(-length // 8) * 8
    raise ValueError("a variable that ends too early")
