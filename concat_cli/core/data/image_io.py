"""Pictures and id maps on disk <-> arrays; an id map with its record -> numbered segments."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache, reduce
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from concat_cli.core import files
from concat_cli.core.data.index import WHITE, Record
from concat_cli.core.data.store import File, Readable
from concat_cli.core.errors import UserError

MAX_PIXELS = 160_000_000  # more than any camera takes at once; 0.5 GB as RGB
# Pillow would also run other programs on some files, such as Ghostscript on EPS.
_AVIF = ("AVIF",) if find_spec("PIL.AvifImagePlugin") else ()  # Pillow 11.3
FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF", "PPM", "JPEG2000", "TGA", *_AVIF)
_FOREIGN = (  # what is not read: where its mark stands, the mark, what it is
    *((4, b"ftyp" + brand, "HEIC") for brand in (b"hei", b"hev", b"mif1", b"msf1")),
    (4, b"ftypavif", "AVIF"),  # with an older Pillow
    (4, b"ftyp", "film"),
    (4, b"JXL \r\n", "JPEG XL"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"%PDF", "PDF"),
    (0, b"8BPS", "Photoshop"),
    (0, b"<svg", "SVG"),
)
SWAPPED = 5  # EXIF orientations from here on swap the sides
DIM = 0.25  # grey pictures of 16 bits without a value above this share of white hold fewer bits
TOGETHER = "JSON, labels and images must belong together: take them from one export."
_END = b"\xff\xd9"  # of a JPEG
_PNG = b"\x89PNG\r\n\x1a\n"
LARGE = 25_000_000  # pixels from which on a picture is dealt with sparingly, in memory alone
RUNS = 1 << 16  # pixels of maps that are compared at a time
STRIP = 1 << 22  # pixels of large pictures that are worked on at a time
Z_RLE = 3  # zlib's strategy for runs, as segments are, and of what PNG filters leave of photos
_TAIL = 4096  # bytes in which that mark is looked for: some programs write a little more behind it
_WARNINGS = Lock()  # the list of warning filters belongs to the process, not to a thread
BROKEN = (
    OSError,
    SyntaxError,  # what Pillow raises for a broken PNG
    ValueError,
    EOFError,
    KeyError,
    IndexError,
    TypeError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def read_image(path: Readable | str, upright: bool = True, white: int = WHITE) -> np.ndarray:
    """A picture as (H, W, 3) uint8 RGB, upright (its EXIF orientation is applied) or as stored.

    16-bit and 1-bit greyscale are scaled to 0-255, CMYK is converted, and what is transparent
    (RGBA, LA, palette) is laid over white, the page that such pictures are drawn for. Of several
    frames the first is read. white: the value of white in 16 bits. UserError naming the file if it
    is missing, damaged or too large.
    """
    path = Path(path) if isinstance(path, str) else path
    try:
        with closing(open_image(path)) as image:
            image.load()
            if upright:
                ImageOps.exif_transpose(image, in_place=True)
            return rgb_array(image, white)
    except BROKEN as error:
        raise broken(path, error) from error


@dataclass(frozen=True)
class Header:
    """What is known of a picture before it is decoded.

    size: (height, width) of the stored pixels. orientation: of its EXIF, 1 where nothing is turned.
    wide: whether it is greyscale of 16 bits.
    """

    size: tuple[int, int]
    orientation: int
    wide: bool

    def shown(self, upright: bool = True) -> tuple[int, int]:
        """(height, width) as it is read."""
        swapped = upright and self.orientation >= SWAPPED
        height, width = self.size
        return (width, height) if swapped else self.size


def read_header(path: Readable | str) -> Header:
    """The header of a picture; errors as `read_image`.

    A JPEG that lacks the mark of its end is decoded, which finds those that are cut off.
    """
    path = Path(path) if isinstance(path, str) else path
    try:
        with closing(open_image(path)) as image:
            if not _ends(image):
                image.load()
            found: Any = image.getexif().get(0x0112, 1)
            orientation = int(found) if found in range(1, 9) else 1
            return Header((image.height, image.width), orientation, image.mode.startswith("I"))
    except BROKEN as error:
        raise broken(path, error) from error


def stored_size(path: Readable) -> tuple[int, int]:
    """(height, width) of the stored pixels, without decoding any, as `read_header` does with a PNG
    for its orientation; errors as `read_image`."""
    try:
        with closing(open_image(path)) as image:
            return image.height, image.width
    except BROKEN as error:
        raise broken(path, error) from error


def told_dim(most: Sequence[int], white: int) -> str:
    """That pictures of 16 bits come out dark, by the largest value of each; "" where they do not."""
    dim = [value for value in most if value < white * DIM]
    if not dim:
        return ""
    return (
        f"{len(dim)} of {len(most)} grey pictures of 16 bits hold no value above {max(dim)} and "
        f"come out dark, as {white} is taken for white"
    )


def brightest(path: File | str) -> int:
    """The largest value of a greyscale picture of 16 bits; errors as `read_image`."""
    path = Path(path) if isinstance(path, str) else path
    try:
        with closing(open_image(path)) as image:
            return int(np.asarray(image).max())
    except BROKEN as error:
        raise broken(path, error) from error


def read_id_png(path: File | str, size: tuple[int, int] | None = None) -> np.ndarray:
    """The segment ids of a COCO panoptic PNG as (H, W) int32: R + 256 G + 65536 B.

    size: the (height, width) that it must have; a file of another one is not decoded, see `unread`.
    """
    pixels = read_id_pixels(path, size)
    found = pixels.shape[:2]
    return ids_of(pixels) if size in (None, found) else unread(found)


def read_id_pixels(path: File | str, size: tuple[int, int] | None = None) -> np.ndarray:
    """`read_id_png` before the ids are put together: (H, W, 3) uint8."""
    path = Path(path) if isinstance(path, str) else path
    quick = _quick_pixels(path, size)
    if quick is not None:
        return quick
    try:
        with closing(open_image(path)) as image:
            if image.format != "PNG" or image.mode not in ("RGB", "RGBA"):
                raise UserError(
                    f"{path} is a {image.format} of mode {image.mode}, not an RGB PNG of ids.",
                    "A panoptic PNG holds a segment's id as R + 256 G + 65536 B in 8-bit RGB.",
                )
            if size is not None and (image.height, image.width) != size:
                return unread((image.height, image.width, 3), np.uint8)
            raw = image.tobytes("raw", "RGB")
    except BROKEN as error:
        raise broken(path, error) from error
    return np.frombuffer(raw, np.uint8).reshape(image.height, image.width, 3)


def ids_of(pixels: np.ndarray) -> np.ndarray:
    """The ids (...) int32 of contiguous RGB pixels (..., 3) uint8."""
    flat = pixels.reshape(-1)
    ids = np.empty(pixels.shape[:-1], "<u4")
    if ids.size > 1:  # four bytes at a time: a pixel and the next one's R
        fours = np.ndarray((ids.size - 1,), "<u4", flat, strides=(3,))
        np.bitwise_and(fours, 0xFFFFFF, out=ids.reshape(-1)[:-1])
    if ids.size:
        ids.reshape(-1)[-1] = int.from_bytes(flat[-3:].tobytes(), "little")
    return ids.view(np.int32)


def ids_at(pixels: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The ids (N,) int32 of pixels (H, W, 3) at places (N,) of the flattened map."""
    return ids_of(pixels.reshape(-1, 3).take(places, 0))  # four times as quick as [places]


def places_in(known: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each of the ids (N,) stands among sorted known ones, which are not there (N,) bool, and
    these without repetition."""
    places = np.searchsorted(known, ids).clip(max=len(known) - 1)
    astray = known[places] != ids
    strange = np.unique(ids[astray]) if astray.any() else ids[:0]  # unique imports numpy.ma
    return places, astray, strange


@cache
def png_decoder() -> Callable[..., np.ndarray] | None:
    """kornia_rs's (bytes, (height, width), "rgb") -> (H, W, 3) uint8, four times as fast as Pillow;
    None where it is not installed. It keeps the interpreter's lock."""
    try:
        from kornia_rs.io import (  # pyright: ignore[reportMissingImports]
            decode_image_png_u8,  # pyright: ignore[reportUnknownVariableType]
        )
    except ImportError:
        return None
    return decode_image_png_u8  # pyright: ignore[reportUnknownVariableType]


def _quick_pixels(path: File, size: tuple[int, int] | None) -> np.ndarray | None:
    """`read_id_pixels` of a sound RGB PNG of that size; None of others, which Pillow tells of.

    Checked are the sums of its chunks, not that of the unpacked bytes.
    """
    decode = png_decoder()
    if decode is None:
        return None
    try:
        raw = path.read_bytes() if isinstance(path, Path) else path.read()
        width, height = struct.unpack(">II", raw[16:24])
        found = height, width
        is_rgb = raw[:8] == _PNG and raw[12:16] == b"IHDR" and raw[24:26] == b"\x08\x02"
        if not is_rgb or size not in (None, found) or height * width > MAX_PIXELS:
            return None
        return decode(raw, found, "rgb")
    except Exception:  # its errors have no type of their own
        return None


def segment_map(label: File, record: Record, listed_in: Path | str) -> np.ndarray:
    """(H, W) int32: 0 = void, i + 1 = the record's segment i; errors as `segment_runs`."""
    numbers, lengths = segment_runs(label, record, listed_in)
    repeated: np.ndarray = np.repeat(numbers, lengths)
    return repeated.reshape(record.height, record.width)


def segment_runs(
    label: File, record: Record, listed_in: Path | str
) -> tuple[np.ndarray, np.ndarray]:
    """Values and lengths of the runs of equal neighbours in a segment map, row by row.

    UserError naming the label if it is missing, damaged, of another size, or its ids are not those
    of the record, which `listed_in` holds.
    """
    size = (record.height, record.width)
    pixels = read_id_pixels(label, size)
    if pixels.shape[:2] != size:
        raise wrong_size(label, pixels.shape, size, f"{listed_in} says", record.image_id)
    starts, lengths = joint_runs(pixels)
    known = np.concatenate([[0], record.ids]).astype(np.int32)
    places, astray, strange = places_in(known, ids_at(pixels, starts))
    numbers = places.astype(np.int32)
    if len(strange) and len(strange) == record.hidden:  # unseen classes: void, no mistake
        numbers[astray] = 0
        strange = strange[:0]
    unused = record.ids[np.bincount(numbers, lengths, len(known))[1:] == 0]
    if len(strange) or len(unused):
        side, which = ("JSON", strange[0]) if len(strange) else ("PNG", unused[0])
        raise UserError(
            f"{label} and {listed_in} disagree on image {record.image_id}: "
            f"segment id {which} is not in the {side}.",
            TOGETHER,
        )
    return numbers, lengths


def runs(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values and lengths of the runs of equal neighbours in (H, W), row by row: far fewer than
    pixels."""
    starts, lengths = joint_runs(ids[..., None])
    return ids.ravel()[starts], lengths


def joint_runs(*maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Starts, as places in the flattened map, and lengths of the runs of pixels, row by row, in
    which no channel of any map changes; maps are (H, W, C), all alike in shape."""
    height, width, channels = maps[0].shape
    whole = [one.reshape(-1) for one in maps]
    starts = [np.zeros(min(1, height * width), np.int64)]
    for part in strips(height, width, RUNS):  # of which everything stays in the processor's cache
        first = max(0, part.start * width - 1)  # the last pixel of the strip before
        flats = [one[first * channels : part.stop * width * channels] for one in whole]
        changed = reduce(np.logical_or, (flat[channels:] != flat[:-channels] for flat in flats))
        starts.append(np.flatnonzero(changed) // channels + (first + 1))
    places = np.concatenate(starts)
    places = places[np.diff(places, prepend=-1) > 0]  # where several channels change, once
    return places, np.diff(places, append=height * width)


class WrongSize(UserError):
    """Of a file whose (height, width) is not what another has; swapped: its sides are."""

    swapped = False


def wrong_size(
    file: object,
    found: tuple[int, ...],
    wanted: tuple[int, ...],
    other: str,
    image_id: int | str | None = None,
) -> WrongSize:
    """Of a file whose (height, width) is not what `other` ("x.json says") has."""
    image = "" if image_id is None else f" for image {image_id}"
    error = WrongSize(
        f"{file} is {found[1]} x {found[0]} pixels, but {other} {wanted[1]} x {wanted[0]}{image}.",
        TOGETHER,
    )
    error.swapped = found == wanted[::-1]
    return error


def unread(shape: tuple[int, ...], kind: type[np.generic] = np.int32) -> np.ndarray:
    """Zeros that take no memory in place of a map that its reader will refuse for its size: small
    files can hold maps of many gigabytes."""
    nothing: Any = kind(0)
    return np.broadcast_to(nothing, shape)


def write_id_png(path: Path | str, ids: np.ndarray) -> None:
    """Writes (H, W) ids of 0..2^24-1 as a COCO panoptic PNG, atomically."""
    write_png(path, id_picture(ids))


def id_picture(ids: np.ndarray) -> Image.Image:
    """(H, W) ids of 0..2^24-1 as R + 256 G + 65536 B."""
    assert ids.ndim == 2 and ids.min() >= 0 and ids.max() < 1 << 24, "ids must lie in 0..2^24-1"

    def packed(rows: slice) -> np.ndarray:
        some = ids[rows]
        return np.stack([some & 255, some >> 8 & 255, some >> 16], axis=-1).astype(np.uint8)

    return from_strips((ids.shape[0], ids.shape[1]), packed)


def write_png(path: Path | str, image: np.ndarray | Image.Image) -> None:
    """Writes (H, W, 3) uint8 RGB as a PNG, atomically."""
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    files.write_bytes(Path(path), png_bytes(image), sync=False)


def png_bytes(image: Image.Image) -> bytes:
    """A PNG packed by runs: in two fifths of the time that Pillow takes by itself, and no larger by
    more than a fiftieth."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1, compress_type=Z_RLE)
    return buffer.getvalue()


def from_strips(size: tuple[int, int], made: Callable[[slice], np.ndarray]) -> Image.Image:
    """An RGB picture of (height, width) from (rows, W, 3) uint8 of each strip of rows."""
    image = Image.new("RGB", (size[1], size[0]))
    for rows in strips(*size):
        image.paste(Image.fromarray(made(rows)), (0, rows.start))
    return image


def open_image(path: Readable) -> Image.Image:
    """The lazily opened picture, refused before decoding where it is too large.

    UserError, or what `BROKEN` lists: callers turn that into `broken(path, error)`.
    """
    if isinstance(path, Path) and not path.is_file():
        kind = "is a folder, not an image" if path.is_dir() else "does not exist"
        raise UserError(f"Image {path} {kind}.", "Check the path.")
    file = path if isinstance(path, Path) else io.BytesIO(path.read())
    with _WARNINGS, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of large files; the size is checked below
        image = Image.open(file, formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise UserError(
            f"Image {path} has {image.width} x {image.height} pixels, more than "
            f"{MAX_PIXELS // 1_000_000} million.",
            "Scale it down or cut it into tiles first.",
        )
    return image


def _ends(image: Image.Image) -> bool:
    """Whether the last bytes of a JPEG hold the mark of its end; True for other formats."""
    file = getattr(image, "fp", None)
    if image.format not in ("JPEG", "MPO") or file is None:
        return True
    place = file.tell()
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - _TAIL))
    tail = file.read(_TAIL)
    file.seek(place)
    return _END in tail


def rgb_array(image: Image.Image, white: int = WHITE) -> np.ndarray:
    """A picture of any mode as `read_image` has it, (H, W, 3) uint8.

    Filled strip by strip: of large pictures each copy counts.
    """
    image = to_rgb(image, white)
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for rows in strips(image.height, image.width):
        box = (0, rows.start, image.width, rows.stop)
        pixels[rows] = np.asarray(image.crop(box))
    return pixels


def strips(height: int, width: int, pixels: int = STRIP) -> Iterator[slice]:
    """Rows of a picture, from the top, so many that they hold about `pixels`."""
    step = max(1, pixels // width)
    return (slice(top, min(top + step, height)) for top in range(0, height, step))


def looked_up(table: np.ndarray, index_map: np.ndarray) -> np.ndarray:
    """`table[index_map]` of a map (H, W), by strips: NumPy takes 8 bytes an index besides."""
    found = np.empty(index_map.shape, table.dtype)
    for rows in strips(*index_map.shape):
        found[rows] = table[index_map[rows]]
    return found


def to_rgb(image: Image.Image, white: int = WHITE) -> Image.Image:
    """A picture of any mode in RGB; an RGB picture is returned as it is."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return _wide_to_rgb(image, white)
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _wide_to_rgb(image: Image.Image, white: int) -> Image.Image:
    """Greyscale of more than 8 bits: integers are 16-bit; floats are 0-1, or 0-255 where any
    exceeds 1."""
    values: Any = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        values = np.nan_to_num(values)
        values = values * 255 if values.max(initial=0) <= 1 else values
    else:
        values = values / (white / 255)
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8)).convert("RGB")


def broken(path: Readable, error: BaseException) -> UserError:
    if isinstance(error, PermissionError):
        return UserError(f"No permission to read {path}.", "Change the file's rights.")
    if isinstance(error, Image.DecompressionBombError):
        what = f"Image {path} has too many pixels to be read safely."
        return UserError(what, "Scale it down or cut it into tiles first.")
    if isinstance(error, MemoryError):
        what = f"There is not enough memory to read image {path}."
        return UserError(what, "Scale it down or cut it into tiles first.")
    if isinstance(error, UnidentifiedImageError) and (kind := foreign_kind(path)):
        what = f"{path} is a {kind} file by its first bytes, which is not read."
        return UserError(what, "Convert it to JPEG or PNG first, or take it out.")
    reason = str(error).split("\n")[0] or type(error).__name__
    return UserError(
        f"Cannot read image {path}: it is damaged or not an image ({reason}).",
        "Export, copy or fetch the file again, or take it out.",
    )


def foreign_kind(path: Readable) -> str:
    """What a file is by its first bytes, of the kinds that are known but not read; "" of others."""
    try:
        with path.open("rb") if isinstance(path, Path) else path.opened() as file:
            head = file.read(32)
    except OSError:
        return ""
    return next((kind for at, mark, kind in _FOREIGN if head.startswith(mark, at)), "")
