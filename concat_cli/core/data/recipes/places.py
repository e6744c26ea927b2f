"""Where the pieces of a data set lie: each layout is looked for, and what is missing is said.

A location is a folder, "x.zip", or "x.zip!folder/inside" (`store.py`).
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from zipfile import ZIP_STORED

from concat_cli.core.data.source import PARTS, PartName, SourcePart, Task
from concat_cli.core.data.store import (
    ZipStore,
    file_exists,
    location_exists,
    open_store,
    read_file,
    split_location,
)
from concat_cli.core.data.zip_member import ZipMember
from concat_cli.core.errors import UserError

_TARS = (".tar", ".tgz", ".tar.gz")
_SHOWN = 3  # places that an error names for one piece


@dataclass(frozen=True)
class Offer:
    """What a data set is called, and where its publisher offers each kind of piece.

    pieces: kind of piece ("images", "labels", ...) -> files and page.
    """

    title: str
    pieces: Mapping[str, str]


@dataclass(frozen=True)
class Piece:
    """One thing that a part needs. `found` is "" where none of the places `looked` at has it."""

    kind: str
    part: PartName
    looked: tuple[str, ...]
    found: str = ""


@dataclass(frozen=True)
class Look:
    """What there is of one part under one layout: `part` is None unless it is complete.

    begun: images of this part alone are there, so that the rest of it counts as missing.
    """

    pieces: tuple[Piece, ...]
    part: SourcePart | None
    begun: bool = False


class Layout(Protocol):
    """A way in which a data set lies on disk."""

    @property
    def name(self) -> str: ...

    @property
    def tasks(self) -> tuple[Task, ...]: ...

    def look(self, bases: Sequence[str], part: PartName) -> Look:
        """What there is of a part below these places."""
        ...


@dataclass(frozen=True)
class Found:
    """The layout that is there, and its parts."""

    layout: Layout
    parts: Mapping[PartName, SourcePart]

    @property
    def name(self) -> str:
        """The layout's name, with a word on zips that are read in place."""
        return named(self.layout.name, self.parts.values())


def named(layout: str, parts: Iterable[SourcePart]) -> str:
    """A layout's name, with a word on zips that are read in place."""
    stores = (s for p in parts for s in (p.images, p.labels, p.second_labels, p.listed_in))
    zipped = any(split_location(store)[0] is not None for store in stores)
    return f"{layout}, zips in place" if zipped else layout


def choose(root: Path, bases: Sequence[str], layouts: Sequence[Layout], offer: Offer) -> Found:
    """The first layout with both parts, else the first with one; UserError where there is none.

    A layout with images of a part but not the rest of it is not there: better an error than
    scores on a part that was silently left out.
    """
    one: list[Found] = []
    incomplete: list[tuple[str, list[Piece]]] = []
    for layout in layouts:
        looks: dict[PartName, Look] = {part: layout.look(bases, part) for part in PARTS}
        parts: dict[PartName, SourcePart] = {
            name: look.part for name, look in looks.items() if look.part is not None
        }
        if len(parts) == len(PARTS):
            return Found(layout, parts)
        if parts and not any(look.begun and look.part is None for look in looks.values()):
            one.append(Found(layout, parts))
        incomplete.append((layout.name, [p for look in looks.values() for p in look.pieces]))
    if one:
        return one[0]
    nearest = max(
        incomplete, key=lambda one: (sum(bool(p.found) for p in one[1]), one[0] == "official")
    )
    raise missing(root, *nearest, offer)


def missing(root: Path, layout: str, pieces: Sequence[Piece], offer: Offer) -> UserError:
    """What is there and what is not, and where the publisher offers the rest."""
    lines = [f"{root} does not hold {offer.title}. Of the nearest layout ({layout}) there is:"]
    for piece in pieces:
        what = f"{piece.kind} of {piece.part}"
        places = " or ".join(piece.looked[:_SHOWN])
        if len(piece.looked) > _SHOWN:
            places += f" or {len(piece.looked) - _SHOWN} more places"
        lines.append(f"  found: {what}" if piece.found else f"  missing: {what} ({places})")
    kinds = dict.fromkeys(piece.kind for piece in pieces if not piece.found)
    offers = [offer.pieces[kind] for kind in kinds if kind in offer.pieces]
    if command := unpacking(root):
        offers.insert(0, f"Only zip files are read in place; unpack first: {command}")
    return UserError("\n".join(lines), "; ".join(dict.fromkeys(offers)))


def bases(root: Path, *names: str, archives: bool = True) -> list[str]:
    """Where a data set may begin: the root and the folders of these names below it; with `archives`
    also inside the zips that lie in the root. The root may be a zip itself."""
    if not root.exists():
        raise UserError(f"There is no folder {root}.", "Give the folder that holds the data set.")
    root = root.resolve()
    starts = [str(root)]
    if archives and root.is_dir():
        starts += [str(path) for path in sorted(root.glob("*.zip"))]
    places = [join(start, name) if name else start for start in starts for name in ("", *names)]
    return [place for place in places if location_exists(place)]


def join(base: str, name: str) -> str:
    """The location of a folder or file below another location."""
    return f"{base}!{name}" if base.endswith(".zip") else f"{base}/{name}"


def first_folder(starts: Sequence[str], names: Sequence[str]) -> str:
    """The first location that exists; "" where none does."""
    places = (join(start, name) for name in names for start in starts)
    return next((place for place in places if location_exists(place)), "")


def first_file(starts: Sequence[str], names: Sequence[str]) -> str:
    """The first file that exists; "" where none does."""
    places = (join(start, name) for name in names for start in starts)
    return next((place for place in places if file_exists(place)), "")


def stems(location: str, end: str, but: Sequence[str] = ()) -> list[str]:
    """The names of all files there that end so (and not as one of `but`), without their end.

    What archivers of other systems leave behind ("__MACOSX/", "._x") is no file.
    """
    return [
        name[: -len(end)]
        for name in open_store(location).names()
        if name.endswith(end)
        and not any(name.endswith(other) for other in but)
        and not name.rpartition("/")[2].startswith(".")
        and not name.startswith("__MACOSX/")
    ]


def listed(location: str) -> list[str]:
    """The stems that a list file names: one a line, or "/JPEGImages/x.jpg /Labels/x.png"."""
    try:
        lines = read_file(location).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{location} is no list of names ({error}).", "Get it again.") from error
    first = (line.split()[0] for line in lines if line.strip())
    return list(dict.fromkeys(re.sub(r"\.\w+$", "", name.rpartition("/")[2]) for name in first))


def digits(stem: str) -> int:
    """The image id that a file's name holds: "000000000139" -> 139, "2007_000032" -> 2007000032,
    "ADE_val_00000001" -> 1. UserError where it holds no digit."""
    found = "".join(re.findall(r"[0-9]", stem.rpartition("/")[2]))
    if not found:
        raise UserError(f"The file name {stem!r} holds no number.", "Is it of this data set?")
    return int(found)


def hashed(stem: str) -> int:
    """An image id for names whose digits are not unique: 48 bits of the file name's SHA-256."""
    name = stem.rpartition("/")[2]
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")


def unpacking(root: Path) -> str:
    """The command that unpacks the tar files in a folder and in those in it, or a tar file; "" where
    there is none."""
    files = sorted({*root.glob("*"), *root.glob("*/*")}) if root.is_dir() else [root]
    tars = [path for path in files if path.name.endswith(_TARS) and path.is_file()]
    return " && ".join(
        f"tar -xf {shlex.quote(str(path))} -C {shlex.quote(str(path.parent))}" for path in tars
    )


def packed_twice(parts: Iterable[SourcePart]) -> tuple[str, ...]:
    """What to say of zips that lie packed inside a zip: how large, and how to read them faster."""
    found: dict[ZipMember, None] = {}
    for location in (place for part in parts for place in (part.images, part.labels) if place):
        store = open_store(location)
        archive = store.archive if isinstance(store, ZipStore) else None
        if isinstance(archive, ZipMember) and archive.entry().method != ZIP_STORED:
            found[archive] = None
    if not found:
        return ()
    outer = next(iter(found)).archive
    inner = " and ".join(
        f"{archive.member} ({archive.entry().size / 1e6:,.1f} MB)" for archive in found
    )
    folder = shlex.quote(str(outer).rpartition("/")[0] or ".")
    return (
        f"{inner} packed in a zip: read in place, which takes each process one pass, and a label "
        f"some milliseconds. Faster: unzip {shlex.quote(str(outer))} -d {folder}",
    )
