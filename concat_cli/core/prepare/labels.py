"""Label files of every kind -> a map of segment ids.

Whatever the kind, a label becomes ids: 0 is void, each other id is one segment.

- semantic: category id + 1, one segment a class (some data sets have a category 0).
- cityscapes: the value of the PNG (26007 is the 8th car, 26 a group of cars, 7 the road).
- instances, and things that lie over semantic maps: INSTANCE + a number. Instances may overlap:
  crowds are painted first, then the larger before the smaller, then by annotation id, so that a
  pixel belongs to the smallest instance that covers it.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
from pycocotools import mask as coco_mask

from concat_cli.core.data.coco import Segment
from concat_cli.core.data.image_io import BROKEN, broken, open_image, unread, wrong_size
from concat_cli.core.data.store import File, read_bytes
from concat_cli.core.errors import UserError
from concat_cli.core.prepare.source import LabelFormat, Pixels

INSTANCE = 1 << 16  # ids from here on are instances; categories of semantic maps lie below
GROUP = 1000  # of Cityscapes: values below have no instance
MAT_NAME = "LabelMap"  # the one variable that is read from a .mat file
_GREY = ("L", "P", "1", "I", "I;16", "I;16B", "I;16L", "I;16N")
_WHICH = "Its values do not fit this layout: check which labels these are."


@dataclass(frozen=True)
class LabelReader:
    """Reads label files of one format; can be handed to other processes."""

    format: LabelFormat

    @cached_property
    def _lookup(self) -> np.ndarray:
        """Raw value -> category id + 1; 0 = void, -1 = unknown, which the last entry is."""
        fmt = self.format
        table = np.full(max((*fmt.table, *fmt.void), default=0) + 2, -1, np.int32)
        table[list(fmt.void)] = 0
        over = set(fmt.things.values()) if "over" in fmt.kind else set[int]()
        for raw, category in fmt.table.items():
            assert 0 <= category < INSTANCE - 1, "category ids of semantic maps are below 65535"
            table[raw] = 0 if category in over else category + 1
        return table

    @cached_property
    def _colours(self) -> tuple[np.ndarray, np.ndarray]:
        """Colours in order, and of each the category id + 1, 0 = void."""
        things = set(self.format.things.values())
        known = dict.fromkeys(self.format.void, 0) | {
            colour: 0 if category in things else category + 1
            for colour, category in self.format.table.items()
        }
        return np.array(sorted(known)), np.array([known[colour] for colour in sorted(known)])

    def id_map(
        self, files: Sequence[File], size: tuple[int, int], masks: Sequence[tuple[int, str]] = ()
    ) -> np.ndarray:
        """(H, W) int32 segment ids; UserError naming a file that is damaged or has strange values.

        files: none for kind "instances", else the label, and the map of things where the kind has
            one. size: of the image, (height, width). masks: (id, run lengths) in the order of
            painting.
        """
        ids = self._below(files, size) if files else np.zeros(size, np.int32)
        if self.format.kind == "things_over_stuff":
            self._paint_things(ids, *files)
        for number, counts in masks:
            ids[decode_rle(counts, size)] = number
        return ids

    def segment_of(self, number: int, things: frozenset[int]) -> tuple[int, bool]:
        """(category id, crowd) of an id that was found in pixels. things: countable categories."""
        if self.format.kind == "cityscapes":
            category = self.format.table[number // GROUP if number >= GROUP else number]
            return category, number < GROUP and category in things
        if number >= INSTANCE:
            return self.format.things[(number - INSTANCE) >> 8], False
        return number - 1, False

    def _below(self, files: Sequence[File], size: tuple[int, int]) -> np.ndarray:
        """The ids of the label map, which instances are painted on."""
        raw = read_raw(files[0], self.format.pixels, size)
        if raw.shape != size:
            raise wrong_size(files[0], raw.shape, size, "its image is")
        if self.format.kind != "cityscapes":
            return self.categories(raw, files[0])
        raw = raw.astype(np.int32)
        classes = np.where(raw >= GROUP, raw // GROUP, raw)
        return np.where(self.categories(classes, files[0]) > 0, raw, 0)

    def categories(self, raw: np.ndarray, file: File) -> np.ndarray:
        """(H, W) raw values -> int32 category id + 1, 0 = void."""
        if self.format.pixels == "colour":
            colours, categories = self._colours
            places = np.searchsorted(colours, raw).clip(max=len(colours) - 1)
            found = np.where(colours[places] == raw, categories[places], -1).astype(np.int32)
        else:
            table = self._lookup
            found = table[np.clip(raw, -1, len(table) - 1)]
        if (found < 0).any():
            value: int = raw[found < 0].tolist()[0]
            if self.format.pixels == "colour":
                rgb = value & 255, value >> 8 & 255, value >> 16
                raise UserError(
                    f"{file} has the colour {rgb}, which is neither a class's nor void.", _WHICH
                )
            raise UserError(
                f"{file} has the value {value}, which is neither a class nor void.", _WHICH
            )
        return found

    def _paint_things(self, ids: np.ndarray, label: File, file: File) -> None:
        red, green = _read_rg(file, ids.shape)
        if red.shape != ids.shape:
            raise wrong_size(file, red.shape, ids.shape, f"{label} is")
        there = red > 0
        unknown = set(np.unique(red[there]).tolist()) - self.format.things.keys()
        if unknown:
            raise UserError(f"{file} has things of class {min(unknown)}, which is unknown.", _WHICH)
        ids[there] = (red[there] << 8 | green[there]) + INSTANCE


def read_raw(file: File, pixels: Pixels, size: tuple[int, int]) -> np.ndarray:
    """(H, W) raw values of a label file, of an integer type; UserError naming the file.

    pixels: see `LabelFormat`. size: as of `read_id_png`.
    """
    if pixels == "mat":
        return _read_mat(file, size)
    if pixels == "ade_rg":
        red, green = _read_rg(file, size)
        return red // 10 * 256 + green if red.shape == size else red
    what = "a map of class values"
    hint = "A label map is grey or of a palette, 8 or 16 bit; the value is the class."
    if pixels == "colour":
        planes = _read_picture(file, size, ("RGB", "RGBA", "P", "PA"), what, hint, "RGB")
        if planes.ndim < 3:
            return planes
        return planes.astype(np.int32) @ np.array([1, 256, 65536], np.int32)
    values = _read_picture(file, size, (*_GREY, "RGB", "RGBA"), what, hint)
    if values.ndim == 3:
        if (values[..., :3] != values[..., :1]).any():
            raise UserError(
                f"{file} is in colour (RGB), not {what}: `prepare-data custom` reads it where "
                "--classes gives each class its colour, like `car = 250, 50, 83`.",
                hint,
            )
        values = values[..., 0]
    return values.astype(np.uint8) if values.dtype == bool else values


def _read_rg(file: File, size: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The red and the green plane, (H, W) int32."""
    hint = "Its red and green channels hold the class."
    planes = _read_picture(file, size, ("RGB", "RGBA"), "an RGB label map", hint)
    if planes.shape[:2] != size:
        return planes, planes
    return planes[..., 0].astype(np.int32), planes[..., 1].astype(np.int32)


def _read_picture(
    file: File, size: tuple[int, ...], modes: Sequence[str], what: str, hint: str, into: str = ""
) -> np.ndarray:
    """Pixels of a picture of one of these modes, converted where that is asked for."""
    try:
        with closing(open_image(file)) as image:
            if image.mode not in modes:
                raise UserError(
                    f"{file} is a {image.format} of mode {image.mode}, not {what}.", hint
                )
            if (image.height, image.width) != size:
                return unread((image.height, image.width))
            return np.asarray(image.convert(into) if into else image)
    except BROKEN as error:
        raise broken(file, error) from error


# MATLAB's files: "MAT-File Format", version 5, MathWorks: elements of a type, a length and data.
_MATRIX, _COMPRESSED = 14, 15
_BEGIN = (6, 5, 1)  # types of a matrix's first elements: flags, shape, name
_NUMBERS = range(6, 16)  # the kinds of arrays that hold numbers: double, ..., uint64
_COMPLEX = 0x0800
_VALUES = {
    1: "i1",
    2: "u1",
    3: "i2",
    4: "u2",
    5: "i4",
    6: "u4",
    7: "f4",
    9: "f8",
    12: "i8",
    13: "u8",
}


def _read_mat(file: File, size: tuple[int, int]) -> np.ndarray:
    """The matrix `LabelMap` of a MATLAB file, of which no more is unpacked than its image needs.

    Not by SciPy, which ends the whole process over some damaged files.
    """
    hint = f"A label file holds a matrix of numbers named {MAT_NAME}."
    data = read_bytes(file)
    others: list[str] = []
    try:
        order = {b"IM": "<", b"MI": ">"}[data[126:128]]
        for content in _variables(data, order, size[0] * size[1] * 8 + 4096):
            elements = _elements(content, order)
            begin = [next(elements) for _ in _BEGIN]
            if tuple(kind for kind, _ in begin) != _BEGIN:
                raise ValueError("a variable without flags, shape or name")
            flags, shape, name = (value for _, value in begin)
            if name.decode("ascii", "replace") != MAT_NAME:
                others.append(name.decode("ascii", "replace"))
                continue
            (bits,) = struct.unpack_from(f"{order}I", flags)
            dims = struct.unpack(f"{order}{len(shape) // 4}i", shape)
            if bits & 0xFF not in _NUMBERS or bits & _COMPLEX or len(dims) != 2:
                raise UserError(f"{MAT_NAME} of {file} is no matrix of numbers.", hint)
            if dims != size:
                return unread(dims)
            kind, content = next(elements)
            values = np.frombuffer(content, order + _VALUES[kind], size[0] * size[1])
            whole = values.astype(np.int64) if values.dtype.kind == "f" else values
            if not np.array_equal(whole, values):
                raise UserError(f"{MAT_NAME} of {file} holds fractions.", hint)
            return whole.reshape(size, order="F")
    except (ValueError, KeyError, struct.error, zlib.error) as error:
        raise broken(file, error) from error
    raise UserError(f"{file} holds no {MAT_NAME}, but {', '.join(others) or 'nothing'}.", hint)


def _variables(data: bytes, order: str, most: int) -> Iterator[bytes]:
    """Each variable's content, unpacked up to `most` bytes."""
    at = 128
    while at + 8 <= len(data):
        kind, length = struct.unpack_from(f"{order}II", data, at)
        content = data[at + 8 : at + 8 + length]
        if kind == _COMPRESSED:
            content = zlib.decompressobj().decompress(content, most)
            (kind,) = struct.unpack_from(f"{order}I", content)
            content = content[8:]
        if kind != _MATRIX:
            raise ValueError(f"an element of type {kind} instead of a variable")
        yield content
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


# Masks of instances as COCO writes them


def painted(
    segments: Mapping[int, Segment], size: tuple[int, int], image_id: int, where: str
) -> list[tuple[int, str]]:
    """Ids and run lengths of masks with pixels in the order of painting: crowds, then the larger
    before the smaller.

    where: the file that lists them, as the UserError names it where a mask cannot be.
    """
    found: list[tuple[bool, int, int, str]] = []
    for number, segment in segments.items():
        if segment.mask is None:
            continue
        try:
            counts = encode_rle(segment.mask, size)
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{where}: the mask of annotation {segment.id} of image {image_id} cannot be "
                f"read ({error}).",
                "Mend that annotation, or write the JSON again.",
            ) from error
        if area := int(coco_mask.area(_rle(counts, size))):
            found.append((not segment.crowd, -area, number, counts))
    return [(number, counts) for _, _, number, counts in sorted(found)]


def decode_rle(counts: str, size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool of compressed run lengths."""
    return coco_mask.decode(_rle(counts, size)).astype(bool)


def _rle(counts: str, size: tuple[int, int]) -> Any:
    return {"size": list(size), "counts": counts.encode()}


def encode_rle(rle: Any, size: tuple[int, int]) -> str:
    """Compressed run lengths of polygons or of run lengths as a JSON holds them.

    ValueError, TypeError or KeyError where it is neither, or of another (height, width). Text is
    the reason why it is neither.
    """
    if isinstance(rle, str):
        raise ValueError(rle)
    if isinstance(rle, list):
        polygons = cast("list[Any]", rle)
        if not rle or any(len(polygon) < 6 or len(polygon) % 2 for polygon in polygons):
            raise ValueError("a polygon has fewer than three corners")
        _refuse_absurd(polygons, size)
        merged: Any = coco_mask.merge(coco_mask.frPyObjects(polygons, *size))
        return merged["counts"].decode()
    if tuple(rle["size"]) != size:
        turned = ", with its sides swapped" if tuple(rle["size"]) == size[::-1] else ""
        raise ValueError(
            f"run lengths are of size {rle['size']}, the image is {list(size)}{turned}"
        )
    counts = rle["counts"]
    if isinstance(counts, list):
        if any(type(count) is not int or count < 0 for count in cast("list[Any]", counts)):
            raise ValueError("run lengths are no integers from 0 on")
        length = sum(cast("list[int]", counts))
    else:
        length = _length(str(counts))
    if length != size[0] * size[1]:
        raise ValueError("run lengths do not fill the image")
    if isinstance(counts, list):
        packed = cast("dict[str, bytes]", coco_mask.frPyObjects(rle, *size))
        return packed["counts"].decode()
    return str(counts)


def _refuse_absurd(polygons: list[Any], size: tuple[int, int]) -> None:
    """ValueError where an outline is no number or far longer than any in an image of that size can
    be: pycocotools would take memory for every fifth of a pixel along it."""
    longest = min(size[0] * size[1] + 10_000, 5_000_000)
    for polygon in polygons:
        corners = np.array(polygon, np.float64).reshape(-1, 2)
        near = np.abs(corners).max() <= longest  # False of NaN
        if not near or np.abs(np.diff(corners, axis=0, append=corners[:1])).sum() > 2 * longest:
            raise ValueError("a polygon leads far out of the image")


def _length(counts: str) -> int:
    """Pixels that compressed run lengths span: pycocotools itself does not look whether they fit.

    Each number is in groups of 5 bits from 48 on, bit 32 = more follow, bit 16 of the last = sign;
    from the third on it is the difference to the last but one.
    """
    lengths: list[int] = []
    value = shift = 0
    for letter in counts.encode("ascii"):
        code = letter - 48
        if not 0 <= code < 64:
            raise ValueError("run lengths hold a strange letter")
        value |= (code & 31) << shift
        shift += 5
        if shift > 60:
            raise ValueError("run lengths hold a number of more than 60 bits")
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift
        lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
        if lengths[-1] < 0:
            raise ValueError("run lengths are negative")
        value = shift = 0
    if shift:
        raise ValueError("run lengths end within a number")
    return sum(lengths)
