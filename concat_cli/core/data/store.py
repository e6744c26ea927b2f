"""Files read where they lie: in a folder, or inside a zip as its publisher packed it.

A location is a folder, "x.zip", or "x.zip!folder/inside"; a zip inside a zip is
"x.zip!folder/y.zip!folder/inside". Names inside it use "/".
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from concat_cli.core.data.zip_member import Archive, ZipMember, directory, folders
from concat_cli.core.errors import UserError

File = Path | ZipMember  # what `image_io` reads


@dataclass(frozen=True)
class FolderStore:
    """The files below a folder."""

    folder: Path

    def __str__(self) -> str:
        return str(self.folder)

    def file(self, name: str) -> Path:
        """The file of that name; UserError where the name leads out of the folder."""
        return self.folder / _safe(self, name)

    def read(self, name: str) -> bytes:
        """The content of a file; UserError where it cannot be read."""
        path = self.file(name)
        try:
            return path.read_bytes()
        except OSError as error:
            raise UserError(f"Cannot read {path}: {error.strerror}.", "Check the path.") from error

    def has(self, name: str) -> bool:
        """Whether there is a file of that name."""
        return self.file(name).is_file()

    def has_folder(self, name: str) -> bool:
        """Whether there is a folder of that name."""
        return self.file(name).is_dir()

    def stamp(self, name: str) -> tuple[int, int] | None:
        """(bytes, time of the last change in ns), to notice changes; None where it is missing."""
        try:
            found = self.file(name).stat()
        except OSError:
            return None
        return found.st_size, found.st_mtime_ns

    def names(self) -> list[str]:
        """All files below, hidden ones left out, sorted."""
        return sorted(_walk(self.folder, ""))

    def below(self, name: str) -> FolderStore:
        """The store of a folder inside."""
        return FolderStore(self.file(name))


@dataclass(frozen=True)
class ZipStore:
    """The members of a zip below `inside` ("" or "folder/")."""

    archive: Archive
    inside: str = ""

    def __str__(self) -> str:
        return f"{self.archive}!{self.inside.rstrip('/')}" if self.inside else str(self.archive)

    def file(self, name: str) -> ZipMember:
        """The member of that name; UserError where the name leads out of the folder inside."""
        return ZipMember(self.archive, self.inside + _safe(self, name))

    def read(self, name: str) -> bytes:
        """The content of a member; UserError where it cannot be read."""
        return self.file(name).read()

    def has(self, name: str) -> bool:
        """Whether there is a member of that name."""
        return self.file(name).member in directory(self.archive)

    def has_folder(self, name: str) -> bool:
        """Whether there is a member below that name."""
        return f"{self.file(name).member}/" in folders(self.archive)

    def stamp(self, name: str) -> tuple[int, int] | None:
        """(bytes, checksum), to notice changes; None where it is missing."""
        entry = directory(self.archive).get(self.file(name).member)
        return None if entry is None else (entry.size, entry.crc)

    def names(self) -> list[str]:
        """All members below, sorted; names that lead out of the archive are not among them."""
        start = len(self.inside)
        names = (n[start:] for n in directory(self.archive) if n.startswith(self.inside))
        return sorted(name for name in names if is_safe(name))

    def below(self, name: str) -> ZipStore:
        """The store of a folder inside."""
        return replace(self, inside=self.file(name).member.rstrip("/") + "/")


Store = FolderStore | ZipStore


def open_store(location: Path | str) -> Store:
    """The files at a location; UserError where there is no such folder or readable zip."""
    text = str(location)
    if os.path.isdir(text):  # noqa: PTH112 - unlike Path's, False of impossible names
        return FolderStore(Path(text))
    outer, rest = split_location(text)
    if outer is None:
        raise UserError(f"There is no folder {text}.", "Check the path.")
    archive, inside = _archive_of(text, outer, rest)
    if not archive_exists(archive):
        raise UserError(f"There is no archive {archive}.", "Check the path.")
    directory(archive)  # says at once where it is no zip
    if not inside:
        return ZipStore(archive)
    if not is_safe(inside):
        raise UserError(f"{text} leads out of the archive.", "Name a folder inside it.")
    if f"{inside}/" not in folders(archive):
        raise UserError(f"{archive} has no folder {inside}.", "Check the archive and the name.")
    return ZipStore(archive, inside + "/")


def split_location(location: Path | str) -> tuple[Path | None, str]:
    """(zip on disk, what the location names inside it); (None, "") where it names no zip."""
    head, mark, inside = str(location).partition(".zip!")
    if mark:
        return Path(head + ".zip"), inside.strip("/")
    return (Path(head), "") if head.endswith(".zip") else (None, "")


def location_exists(location: Path | str) -> bool:
    """Whether a location is a folder, or lies in a zip that has members there."""
    if Path(location).is_dir():
        return True
    outer, rest = split_location(location)
    if outer is None:
        return False
    archive, inside = _archive_of(location, outer, rest)
    return archive_exists(archive) and (not inside or f"{inside}/" in folders(archive))


def archive_exists(archive: Archive) -> bool:
    """Whether there is a file of that name, on disk or in the zip that it should lie in."""
    if isinstance(archive, Path):
        return archive.is_file()
    return archive_exists(archive.archive) and archive.member in directory(archive.archive)


def open_file(location: Path | str) -> File:
    """The file at a path, or "x.zip!member"; whether it is there shows when it is read."""
    outer, rest = split_location(location)
    if outer is None or not rest or Path(location).is_file():
        return Path(location)
    archive, member = _inner(location, outer, rest)
    return ZipMember(archive, _safe_member(location, member))


def file_exists(location: Path | str) -> bool:
    """Whether there is a file at a path, or a member at "x.zip!member"."""
    return archive_exists(open_file(location))


def read_file(location: Path | str) -> bytes:
    """The content of the file at a path or "x.zip!member"; UserError where it cannot be read."""
    file = open_file(location)
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


def _archive_of(location: Path | str, outer: Path, rest: str) -> tuple[Archive, str]:
    """The innermost archive that a location names, and the folder inside it; "" for all of it."""
    archive, inside = _inner(location, outer, rest)
    whole = inside.endswith(".zip") and archive_exists(archive) and inside in directory(archive)
    return (ZipMember(archive, inside), "") if whole else (archive, inside)


def _inner(location: Path | str, outer: Path, rest: str) -> tuple[Archive, str]:
    """The archive that what comes after the last ".zip!" of a location lies in, and that."""
    archive: Archive = outer
    *zips, inside = rest.split(".zip!")
    for name in zips:
        archive = ZipMember(archive, _safe_member(location, name.strip("/") + ".zip"))
    return archive, inside.strip("/")


def _safe_member(location: Path | str, name: str) -> str:
    if not is_safe(name):
        raise UserError(f"{location} leads out of the archive.", "Name a member of it.")
    return name


def _safe(store: Store, name: str) -> str:
    if "\0" in name or any("\ud800" <= letter <= "\udfff" for letter in name):
        what = f"The name {name!r} in {store} is no text in UTF-8 that a file can be called."
        raise UserError(what, "Rename the file, and where it is listed.")
    if not is_safe(name):
        raise UserError(
            f"The name {name!r} leads out of {store}.",
            "Names of images and labels are relative, with / and without .. or backslashes.",
        )
    return name


def _walk(folder: Path, prefix: str) -> list[str]:
    found: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    found += _walk(Path(entry.path), f"{prefix}{entry.name}/")
                else:
                    found.append(prefix + entry.name)
    except OSError as error:
        raise UserError(f"Cannot list {folder}: {error.strerror}.", "Check its rights.") from error
    return found
