"""Members of a zip, read in place: by any thread or process, and never more than they say.

The archive is opened anew for each member (some 20 microseconds), so that no file position is
shared; its directory is read once a process. It may itself be the member of another zip, of which
each process makes one pass where it is packed (`inflated.py`).
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

from concat_cli.core.data.inflated import Inflated, Points, Window, points_of
from concat_cli.core.errors import UserError

LARGEST = 1 << 30  # bytes of a member when unpacked; no image or label comes near
SUSPICIOUS = 64 << 20  # from here on a member must not be packed by more than RATIO
RATIO = 1000  # deflate can do 1032, but no image of that size comes near
_HEADER = 30  # bytes of a member's own header before its name
_UTF8 = 1 << 11  # flag: the name is not of code page 437
_AGAIN = "Download the archive again."
_DAMAGED = (IndexError, EOFError, OverflowError, struct.error, zlib.error)  # also of `zipfile`


class Entry(NamedTuple):
    """What a zip's directory says of one member; `name` as it is written there."""

    name: str
    offset: int
    packed: int
    size: int
    method: int
    crc: int
    flags: int


@dataclass(frozen=True)
class ZipMember:
    """One file inside a zip; as text it reads "x.zip!member", or "x.zip!y.zip!member"."""

    archive: Archive
    member: str

    def __str__(self) -> str:
        return f"{self.archive}!{self.member}"

    def read(self) -> bytes:
        """The unpacked content; UserError where it is missing, damaged or absurdly large."""
        entry = self.entry()
        if entry.size > LARGEST:
            raise self._absurd(entry)
        try:
            with _opened(self.archive) as file:
                file.seek(_start(file, entry))
                packed = file.read(entry.packed)
            data = packed if entry.method == zipfile.ZIP_STORED else _inflate(packed, entry.size)
        except (OSError, zlib.error, EOFError) as error:
            raise UserError(f"Cannot read {self}: it is damaged ({error}).", _AGAIN) from error
        if len(data) != entry.size or zlib.crc32(data) != entry.crc:
            raise UserError(f"{self} is damaged: its checksum is wrong.", _AGAIN)
        return data

    def entry(self) -> Entry:
        """What the archive says of it; UserError where it is missing or cannot be meant."""
        entry = directory(self.archive).get(self.member)
        if entry is None:
            raise UserError(f"{self.archive} has no member {self.member}.", _AGAIN)
        if entry.flags & 1:
            raise UserError(f"{self} is encrypted.", "Unpack the archive with its password first.")
        if entry.method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UserError(
                f"{self} is packed by a method (number {entry.method}) that is not read in place.",
                "Unpack the archive and give the folder.",
            )
        if entry.size > SUSPICIOUS and entry.size > RATIO * max(1, entry.packed):
            raise self._absurd(entry)
        return entry

    def _absurd(self, entry: Entry) -> UserError:
        return UserError(
            f"{self} says that it unpacks to {entry.size:,} bytes from {entry.packed:,}: "
            "no image or label does.",
            "Do not trust this archive.",
        )


Archive = Path | ZipMember  # a zip on disk, or one that lies in another


def directory(archive: Archive) -> dict[str, Entry]:
    """Member name -> where it is; kept until the archive changes."""
    return _read_directory(archive, *_stamp(archive))


def folders(archive: Archive) -> frozenset[str]:
    """Every folder of an archive, with its closing slash."""
    return _read_folders(archive, *_stamp(archive))


def _stamp(archive: Archive) -> tuple[int, int]:
    """(bytes, time of the last change in ns) of the file on disk; UserError where it is missing."""
    while isinstance(archive, ZipMember):
        archive = archive.archive
    try:
        found = archive.stat()
    except OSError as error:
        raise UserError(f"Cannot read {archive}: {error.strerror}.", "Check the path.") from error
    return found.st_size, found.st_mtime_ns


@lru_cache(maxsize=16)
def _read_directory(archive: Archive, size: int, changed: int) -> dict[str, Entry]:
    try:
        with _opened(archive) as opened, zipfile.ZipFile(opened) as file:
            return {
                i.filename: Entry(
                    i.orig_filename, i.header_offset, i.compress_size, i.file_size,
                    i.compress_type, i.CRC, i.flag_bits,
                )
                for i in file.infolist()
                if not i.is_dir()
            }  # fmt: skip
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, *_DAMAGED) as error:
        raise UserError(
            f"{archive} is no complete zip ({error}).", "Finish or repeat its download."
        ) from error


@lru_cache(maxsize=16)
def _read_folders(archive: Archive, size: int, changed: int) -> frozenset[str]:
    found: set[str] = set()
    for name in _read_directory(archive, size, changed):
        end = name.rfind("/") + 1
        while end and name[:end] not in found:
            found.add(name[:end])
            end = name.rfind("/", 0, end - 1) + 1
    return frozenset(found)


@lru_cache(maxsize=4)
def _points(archive: ZipMember, size: int, changed: int) -> Points:
    """The points of entry of a packed archive in another; UserError where it is damaged."""
    entry = archive.entry()
    try:
        with _opened(archive.archive) as file:
            packed = Window(file, _start(file, entry), entry.packed)
            return points_of(io.BufferedReader(packed), entry.size, entry.crc)
    except (OSError, zlib.error, EOFError) as error:
        raise UserError(f"Cannot read {archive}: it is damaged ({error}).", _AGAIN) from error


@contextmanager
def _opened(archive: Archive) -> Iterator[BinaryIO]:
    """An archive as a file that can be read from any place."""
    if isinstance(archive, Path):
        with archive.open("rb") as file:
            yield file
        return
    entry = archive.entry()
    with _opened(archive.archive) as file:
        stored = Window(file, _start(file, entry), entry.packed)
        if entry.method == zipfile.ZIP_STORED:
            yield io.BufferedReader(stored)
            return
        points = _points(archive, *_stamp(archive))
        inflated = Inflated(io.BufferedReader(stored), points, entry.size)
        with io.BufferedReader(inflated) as unpacked:
            yield unpacked


def _start(file: BinaryIO, entry: Entry) -> int:
    """Where the packed bytes of a member begin: behind its own header, which names it too."""
    file.seek(entry.offset)
    header = file.read(_HEADER)
    if len(header) < _HEADER or header[:4] != b"PK\x03\x04":
        raise EOFError("no header where the directory says")
    length, extra = struct.unpack("<HH", header[26:])
    name = file.read(length).decode("utf-8" if entry.flags & _UTF8 else "cp437", "replace")
    if name != entry.name:
        raise EOFError(f"the header where the directory says is that of {name}")
    return entry.offset + _HEADER + length + extra


def _inflate(packed: bytes, size: int) -> bytes:
    """Unpacks at most one byte more than declared, so that a lying header costs no memory."""
    return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, size + 1)
