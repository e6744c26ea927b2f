"""Files read where they lie: in a folder, or inside a zip as its publisher packed it.

A location is a folder, "x.zip", or "x.zip!folder/inside"; names inside it use "/". In
"x.zip!y.zip!folder" a zip lies in another: that is read, too, but in one pass from its beginning,
so it is unpacked when a data set is prepared.

Members are read by any thread or process, and never more of them than they say. Each process opens
an archive itself, as forked ones would share its position, and keeps it until the file changes.
"""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import IO

from concat_cli.core.errors import UserError

LARGEST = 1 << 30  # bytes of a member when unpacked; no image or label comes near
SUSPICIOUS = 64 << 20  # from here on a member must not be packed by more than RATIO
RATIO = 1000  # deflate can do 1032, but no image of that size comes near
_AGAIN = "Copy or fetch the archive again, or pack it again."
_DAMAGED = (  # what reading a zip raises where it is damaged
    OSError, EOFError, ValueError, IndexError, OverflowError, NotImplementedError, struct.error,
    zlib.error, zipfile.BadZipFile,
)  # fmt: skip
SUFFIXES = frozenset(  # of files that are looked for; what a file is shows when it is read
    ".jpg .jpeg .jfif .png .tif .tiff .webp .bmp .gif .jp2 .j2k .ppm .pgm .tga .avif".split()
)


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
        if entry.file_size > LARGEST:
            raise self._absurd(entry)
        try:
            with self.opened() as file:
                data = file.read(entry.file_size)  # a lying size costs no memory
            if len(data) != entry.file_size:
                raise EOFError(f"it ends after {len(data)} bytes")
        except _DAMAGED as error:
            raise UserError(f"Cannot read {self}: it is damaged ({error}).", _AGAIN) from error
        return data

    def opened(self) -> IO[bytes]:
        """The member as a file, read from its beginning and never beyond its size."""
        return _opened(self.archive).open(self.entry())

    def entry(self) -> zipfile.ZipInfo:
        """What the archive says of it; UserError where it is missing or cannot be meant."""
        entry = directory(self.archive).get(self.member)
        if entry is None:
            raise UserError(f"{self.archive} has no member {self.member}.", "Check the name.")
        if entry.flag_bits & 1:
            raise UserError(f"{self} is encrypted.", "Unpack the archive with its password first.")
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UserError(
                f"{self} is packed by a method (number {entry.compress_type}) that is not read in "
                "place.",
                "Unpack the archive and give the folder.",
            )
        if entry.file_size > max(SUSPICIOUS, RATIO * entry.compress_size):
            raise self._absurd(entry)
        return entry

    def _absurd(self, entry: zipfile.ZipInfo) -> UserError:
        return UserError(
            f"{self} says that it unpacks to {entry.file_size:,} bytes from "
            f"{entry.compress_size:,}: no image or label does.",
            "Do not trust this archive.",
        )


@dataclass(frozen=True)
class Held:
    """A file that came over the network and lies in memory; as text it reads as its name."""

    name: str
    data: bytes

    def __str__(self) -> str:
        return self.name

    def read(self) -> bytes:
        """The content."""
        return self.data

    def opened(self) -> IO[bytes]:
        """The content as a file."""
        return BytesIO(self.data)


Archive = Path | ZipMember  # a zip on disk, or one that lies in another
File = Path | ZipMember  # of data sets
Readable = File | Held  # what pictures are read from


@dataclass(frozen=True)
class Store:
    """The files below a folder, or the members of a zip below `inside` ("" or "folder/")."""

    place: Archive
    inside: str | None = None  # None: the place is a folder

    def __str__(self) -> str:
        return f"{self.place}!{self.inside.rstrip('/')}" if self.inside else str(self.place)

    def file(self, name: str) -> File:
        """The file of that name; UserError where the name leads out of the store."""
        if "\0" in name or any("\ud800" <= letter <= "\udfff" for letter in name):
            what = f"The name {name!r} in {self} is no text in UTF-8 that a file can be called."
            raise UserError(what, "Rename the file, and where it is listed.")
        if not is_safe(name):
            raise UserError(
                f"The name {name!r} leads out of {self}.",
                "Names of images and labels are relative, with / and without .. or backslashes.",
            )
        if self.inside is None and isinstance(self.place, Path):
            return self.place / name
        return ZipMember(self.place, f"{self.inside}{name}")

    def stamp(self, name: str) -> tuple[int, int] | None:
        """Two numbers that change when a file does: its bytes, and the time of its last change in ns
        or its checksum in a zip; None where it is missing."""
        file = self.file(name)
        if isinstance(file, ZipMember):
            entry = directory(file.archive).get(file.member)
            return None if entry is None else (entry.file_size, entry.CRC)
        try:
            found = file.stat()
        except OSError:
            return None
        return found.st_size, found.st_mtime_ns

    def names(self) -> list[str]:
        """All files below, sorted; what is hidden or left behind by other programs, and names that
        lead out of a zip, are not among them."""
        if self.inside is None:
            return sorted(_walk(Path(str(self.place)), ""))
        start = len(self.inside)
        names = (n[start:] for n in directory(self.place) if n.startswith(self.inside))
        return sorted(
            name for name in names if is_safe(name) and not any(map(is_litter, name.split("/")))
        )


def open_store(location: Path | str) -> Store:
    """The files at a location; UserError where there is no such folder or readable zip."""
    text = str(location)
    if os.path.isdir(text):  # noqa: PTH112 - unlike Path's, False of impossible names
        return Store(Path(text))
    archive, inside = split_location(text)
    if archive is None:
        raise UserError(f"There is no folder {text}.", "Check the path.")
    if not archive_exists(archive):
        raise UserError(f"There is no archive {archive}.", "Check the path.")
    if not _has_folder(archive, inside):
        raise UserError(f"{archive} has no folder {inside}.", "Check the archive and the name.")
    return Store(archive, f"{inside}/" if inside else "")


def split_location(location: Path | str) -> tuple[Archive | None, str]:
    """(the innermost zip that a location names, what it names inside that); (None, "") where it
    names none. UserError where a name leads out of its zip."""
    first, *rest = f"{location}!".split(".zip!")
    if not rest:
        return None, ""
    archive: Archive = Path(first + ".zip")
    *zips, inside = [name.removesuffix("!").strip("/") for name in rest]
    for name in [f"{name}.zip" for name in zips] + [inside] * bool(inside):
        if not is_safe(name):
            raise UserError(f"{location} leads out of the archive.", "Name what lies inside it.")
    for name in zips:
        archive = ZipMember(archive, f"{name}.zip")
    return archive, inside


def location_exists(location: Path | str) -> bool:
    """Whether a location is a folder, or lies in a zip that has members there."""
    if os.path.isdir(location):  # noqa: PTH112 - as above
        return True
    archive, inside = split_location(location)
    return archive is not None and archive_exists(archive) and _has_folder(archive, inside)


def archive_exists(archive: Archive) -> bool:
    """Whether there is a file of that name, on disk or in the zip that it should lie in."""
    if isinstance(archive, Path):
        return os.path.isfile(archive)  # noqa: PTH113 - as above
    return archive_exists(archive.archive) and archive.member in directory(archive.archive)


def open_file(location: Path | str) -> File:
    """The file at a path, or "x.zip!member"; whether it is there shows when it is read."""
    archive, inside = split_location(location)
    if archive is None or os.path.isfile(location):  # noqa: PTH113 - as above
        return Path(location)
    return ZipMember(archive, inside) if inside else archive


def file_exists(location: Path | str) -> bool:
    """Whether there is a file at a path, or a member at "x.zip!member"."""
    return archive_exists(open_file(location))


def read_file(location: Path | str) -> bytes:
    """The content of the file at a path or "x.zip!member"; UserError where it cannot be read."""
    return read_bytes(open_file(location))


def read_bytes(file: File) -> bytes:
    """The content of a file; UserError where it cannot be read."""
    if isinstance(file, ZipMember):
        return file.read()
    try:
        return file.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"No file {file}.", "Check the path.") from error
    except OSError as error:
        raise UserError(f"Cannot read {file}: {error.strerror}.", "Check its rights.") from error


def is_safe(name: str) -> bool:
    """Whether a name stays below where it starts: not absolute, no "..", no backslash or drive."""
    parts = name.split("/")
    return bool(name) and "\\" not in name and ":" not in parts[0] and not {"", ".."} & set(parts)


def is_litter(name: str) -> bool:
    """Whether a file or folder is hidden (".ipynb_checkpoints", "._x"), or what macOS packs besides
    files."""
    return name.startswith(".") or name == "__MACOSX"


def directory(archive: Archive) -> dict[str, zipfile.ZipInfo]:
    """Member name -> what the archive says of it; UserError where it is no zip."""
    return _opened(archive).NameToInfo


def _has_folder(archive: Archive, folder: str) -> bool:
    names = directory(archive)  # says where it is no zip
    return not folder or any(name.startswith(f"{folder}/") for name in names)


def _opened(archive: Archive) -> zipfile.ZipFile:
    """The archive, open in this process; UserError where it is missing or no zip."""
    path = archive
    while isinstance(path, ZipMember):
        path = path.archive
    try:
        found = path.stat()
        return _open(archive, os.getpid(), found.st_size, found.st_mtime_ns)
    except FileNotFoundError as error:
        raise UserError(f"There is no archive {path}.", "Check the path.") from error
    except _DAMAGED as error:
        raise UserError(
            f"{archive} is no complete zip ({error}).", "Finish copying or fetching it, or pack it again."
        ) from error


@lru_cache(maxsize=16)
def _open(archive: Archive, process: int, size: int, changed: int) -> zipfile.ZipFile:
    """Opens an archive; the other arguments tell when that must be done anew."""
    opened = zipfile.ZipFile(archive if isinstance(archive, Path) else archive.opened())
    for name in [name for name in opened.NameToInfo if name.endswith("/")]:
        del opened.NameToInfo[name]  # folders
    return opened


def _walk(folder: Path, prefix: str) -> list[str]:
    found: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_litter(entry.name):
                    continue
                if entry.is_dir():
                    found += _walk(Path(entry.path), f"{prefix}{entry.name}/")
                else:
                    found.append(prefix + entry.name)
    except OSError as error:
        raise UserError(f"Cannot list {folder}: {error.strerror}.", "Check its rights.") from error
    return found
