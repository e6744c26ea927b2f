"""Members of a zip, read in place: by any thread or process, and never more than they say.

The archive is opened anew for each member (some 20 microseconds), so that no file position is
shared; its directory is read once a process.
"""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

from concat_cli.core.errors import UserError

LARGEST = 1 << 30  # bytes of a member when unpacked; no image or label comes near
SUSPICIOUS = 64 << 20  # from here on a member must not be packed by more than RATIO
RATIO = 1000  # deflate can do 1032, but no image of that size comes near
_HEADER = 30  # bytes of a member's own header before its name
_AGAIN = "Download the archive again."
_DAMAGED = (IndexError, EOFError, OverflowError, struct.error)  # also of `zipfile`, unannounced


class Entry(NamedTuple):
    """What a zip's directory says of one member."""

    offset: int
    packed: int
    size: int
    method: int
    crc: int
    flags: int


@dataclass(frozen=True)
class ZipMember:
    """One file inside a zip; as text it reads "x.zip!member"."""

    archive: Path
    member: str

    def __str__(self) -> str:
        return f"{self.archive}!{self.member}"

    def read(self) -> bytes:
        """The unpacked content; UserError where it is missing, damaged or absurdly large."""
        entry = directory(self.archive).get(self.member)
        if entry is None:
            raise UserError(f"{self.archive} has no member {self.member}.", _AGAIN)
        self._refuse_absurd(entry)
        try:
            with self.archive.open("rb") as file:
                packed = _packed(file, entry)
            data = packed if entry.method == zipfile.ZIP_STORED else _inflate(packed, entry.size)
        except (OSError, zlib.error, EOFError) as error:
            raise UserError(f"Cannot read {self}: it is damaged ({error}).", _AGAIN) from error
        if len(data) != entry.size or zlib.crc32(data) != entry.crc:
            raise UserError(f"{self} is damaged: its checksum is wrong.", _AGAIN)
        return data

    def _refuse_absurd(self, entry: Entry) -> None:
        if entry.flags & 1:
            raise UserError(f"{self} is encrypted.", "Unpack the archive with its password first.")
        if entry.method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UserError(
                f"{self} is packed by a method (number {entry.method}) that is not read in place.",
                "Unpack the archive and give the folder.",
            )
        bomb = entry.size > SUSPICIOUS and entry.size > RATIO * max(1, entry.packed)
        if entry.size > LARGEST or bomb:
            raise UserError(
                f"{self} says that it unpacks to {entry.size:,} bytes from {entry.packed:,}: "
                "no image or label does.",
                "Do not trust this archive.",
            )


def directory(archive: Path) -> dict[str, Entry]:
    """Member name -> where it is; kept until the archive changes."""
    try:
        found = archive.stat()
    except OSError as error:
        raise UserError(f"Cannot read {archive}: {error.strerror}.", "Check the path.") from error
    return _read_directory(archive, found.st_size, found.st_mtime_ns)


def folders(archive: Path) -> frozenset[str]:
    """Every folder of an archive, with its closing slash."""
    found = archive.stat()
    return _read_folders(archive, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=16)
def _read_directory(archive: Path, size: int, changed: int) -> dict[str, Entry]:
    try:
        with zipfile.ZipFile(archive) as file:
            return {
                i.filename: Entry(
                    i.header_offset, i.compress_size, i.file_size, i.compress_type, i.CRC,
                    i.flag_bits,
                )
                for i in file.infolist()
                if not i.is_dir()
            }  # fmt: skip
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, *_DAMAGED) as error:
        raise UserError(
            f"{archive} is no complete zip ({error}).", "Finish or repeat its download."
        ) from error


@lru_cache(maxsize=16)
def _read_folders(archive: Path, size: int, changed: int) -> frozenset[str]:
    found: set[str] = set()
    for name in _read_directory(archive, size, changed):
        end = name.rfind("/") + 1
        while end and name[:end] not in found:
            found.add(name[:end])
            end = name.rfind("/", 0, end - 1) + 1
    return frozenset(found)


def _packed(file: BinaryIO, entry: Entry) -> bytes:
    """The packed bytes of a member, which lie behind its own header."""
    file.seek(entry.offset)
    header = file.read(_HEADER)
    if len(header) < _HEADER or header[:4] != b"PK\x03\x04":
        raise EOFError("no header where the directory says")
    name, extra = struct.unpack("<HH", header[26:])
    file.seek(name + extra, os.SEEK_CUR)
    return file.read(entry.packed)


def _inflate(packed: bytes, size: int) -> bytes:
    """Unpacks at most one byte more than declared, so that a lying header costs no memory."""
    return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, size + 1)
