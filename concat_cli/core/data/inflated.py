"""Packed data read from any place: a window of a file, and a deflated stream with points of entry.

Deflate has no places to jump to, but its decoder can be copied (some 40 kB): a copy every megabyte
or so, made in one pass, lets any place be reached by unpacking a megabyte, a few milliseconds.
"""

from __future__ import annotations

import io
import zlib
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any, BinaryIO

SPAN = 1 << 20  # unpacked bytes from one point of entry to the next, at least
POINTS = 1024  # of a stream at most: 40 MB of copies
CHUNK = 1 << 14  # packed bytes fed at a time; they unpack to 16 MB at worst


@dataclass(frozen=True)
class Point:
    """A place to go on from: `place` in the unpacked data, `packed` in the packed, the decoder as
    it is there, and some unpacked data that ends there."""

    place: int
    packed: int
    decoder: Any  # what `zlib.decompressobj` returns has no public name
    block: bytes = b""


@dataclass
class Points:
    """The points of entry of one stream, and where its reader stopped: who reads in order goes on
    from there. Threads may share them."""

    points: list[Point]
    last: Point


class _Seekable(io.RawIOBase):
    """`size` bytes that can be read from any place."""

    def __init__(self, size: int) -> None:
        self._size, self._at = size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = _target(offset, whence, self._at, self._size)
        return self._at


class Window(_Seekable):
    """`size` bytes of a file from `start` on, as a file of their own; moves the file's position."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        super().__init__(size)
        self._file, self._start = file, start

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        data = self._file.read(max(0, min(len(buffer), self._size - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class Inflated(_Seekable):
    """The unpacked data of a raw deflate stream of `size` bytes, as a file.

    Reading raises zlib.error or EOFError where the stream is damaged.
    """

    def __init__(self, packed: BinaryIO, points: Points, size: int) -> None:
        super().__init__(size)
        self._packed, self._points = packed, points
        self._go_on_from(points.last)

    def readinto(self, buffer: Any) -> int:
        if self._at >= self._size:
            return 0
        if not self._end - len(self._block) <= self._at < self._end:
            self._unpack_to(self._at)
        skip = self._at - (self._end - len(self._block))
        piece = self._block[skip : skip + len(buffer)]
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)

    def close(self) -> None:
        if not self.closed:
            now = self._packed.tell()
            self._points.last = Point(self._end, now, self._decoder.copy(), self._block)
        super().close()

    def _unpack_to(self, place: int) -> None:
        """Unpacks on, or anew from the point before, until the block holds the place."""
        points = self._points.points
        nearest = points[bisect_right(points, place, key=lambda point: point.place) - 1]
        if not nearest.place <= self._end <= place:
            self._go_on_from(nearest)
        while self._end <= place:
            chunk = self._packed.read(CHUNK)
            if not chunk or self._decoder.eof:
                raise EOFError("it ends too early")
            self._block = self._decoder.decompress(chunk)
            self._end += len(self._block)

    def _go_on_from(self, point: Point) -> None:
        self._packed.seek(point.packed)
        self._decoder, self._block, self._end = point.decoder.copy(), point.block, point.place


def points_of(packed: BinaryIO, size: int, checksum: int) -> Points:
    """The points of entry of a raw deflate stream, found in one pass that checks all of it.

    size, checksum (CRC-32): of the unpacked data. zlib.error or EOFError where it is damaged.
    """
    decoder = zlib.decompressobj(-zlib.MAX_WBITS)
    points = [Point(0, 0, decoder.copy())]
    span = max(SPAN, size // POINTS + 1)
    place = found = 0
    while place <= size and not decoder.eof and (chunk := packed.read(CHUNK)):
        block = decoder.decompress(chunk)
        place += len(block)
        found = zlib.crc32(block, found)
        if place >= points[-1].place + span:
            points.append(Point(place, packed.tell(), decoder.copy()))
    if place != size or found != checksum:
        raise EOFError("its checksum is wrong")
    return Points(points, points[0])


def _target(offset: int, whence: int, now: int, size: int) -> int:
    """Where a seek leads; OSError before the beginning."""
    target = offset + {io.SEEK_SET: 0, io.SEEK_CUR: now, io.SEEK_END: size}[whence]
    if target < 0:
        raise OSError(22, "a place before the beginning")
    return target
