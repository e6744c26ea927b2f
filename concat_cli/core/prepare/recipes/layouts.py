"""Where the pieces of a data set lie: each layout is looked for, and what is missing is said.

The two usual layouts are images beside label maps of the same stem, and COCO's JSON files. A
location is a folder, "x.zip", or "x.zip!folder/inside" (`store.py`).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from concat_cli.core.data.coco import Item, read_coco
from concat_cli.core.data.json_values import numbered
from concat_cli.core.data.store import (
    file_exists,
    location_exists,
    open_store,
    read_file,
    split_location,
)
from concat_cli.core.errors import UserError
from concat_cli.core.prepare.source import (
    EVERY,
    PARTS,
    LabelFormat,
    PartName,
    Source,
    SourcePart,
    Task,
)
from concat_cli.core.vocabulary import Vocabulary

_LONG: Mapping[PartName, str] = {"train": "training", "val": "validation"}
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

    def source(
        self, name: str, vocabulary: Vocabulary, split: str, notes: tuple[str, ...] = ()
    ) -> Source:
        """What was found, under that name, with the classes and the split that it suggests."""
        layout = named(self.layout.name, self.parts.values())
        return Source(name, layout, vocabulary, self.layout.tasks, self.parts, split, notes)


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
    raise _missing(root, *nearest, offer)


def _missing(root: Path, layout: str, pieces: Sequence[Piece], offer: Offer) -> UserError:
    """What is there and what is not, and where the publisher offers the rest."""
    lines = [f"{root} does not hold {offer.title}. Of the nearest layout ({layout}) there is:"]
    for piece in pieces:
        what = f"{piece.kind} of {piece.part}"
        places = " or ".join(piece.looked[:_SHOWN])
        if len(piece.looked) > _SHOWN:
            places += f" or {len(piece.looked) - _SHOWN} more places"
        lines.append(f"  found: {what}" if piece.found else f"  missing: {what} ({places})")
    if root.is_dir():
        lines.append(
            f"It holds {', '.join(sorted(p.name for p in root.iterdir())[:8]) or 'nothing'}."
        )
    kinds = dict.fromkeys(piece.kind for piece in pieces if not piece.found)
    offers = [offer.pieces[kind] for kind in kinds if kind in offer.pieces]
    if command := unpacking(root):
        offers.insert(0, f"Only zip files are read in place; unpack first: {command}")
    offers.append("for photos and labels of your own: `concat prepare-data custom`")
    return UserError("\n".join(lines), "; ".join(dict.fromkeys(offers)))


def digits(stem: str) -> int:
    """The image id that a file's name holds: "000000000139" -> 139, "2007_000032" -> 2007000032,
    "ADE_val_00000001" -> 1. UserError where it holds no digit."""
    found = "".join(re.findall(r"[0-9]", stem.rpartition("/")[2]))
    if not found:
        raise UserError(f"The file name {stem!r} holds no number.", "Is it of this data set?")
    return int(found)


def hashed(stem: str) -> int:
    """An image id for names whose digits are not unique: 48 bits of the file name's SHA-256."""
    return numbered(stem.rpartition("/")[2])


@dataclass(frozen=True)
class PairLayout:
    """Images and label maps that share a stem.

    Places hold "{part}", which is the part's name, or the longer "training" and "validation" where
    it is `long`; the first that exists counts.

    image_end, label_end: what follows the stem in the two names. but: ends of other files there.
    second: places of a second label map of the same stem and ".png".
    lists: files that name the part's stems; without them every label map counts.
    number: stem -> image id.
    """

    name: str
    images: tuple[str, ...]
    labels: tuple[str, ...]
    format: LabelFormat
    image_end: str = ".jpg"
    label_end: str = ".png"
    but: tuple[str, ...] = ()
    second: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()
    long: bool = False
    number: Callable[[str], int] = digits
    tasks: tuple[Task, ...] = ("semantic",)

    def look(self, bases: Sequence[str], part: PartName) -> Look:
        """What there is of a part. A label without an image stays, so that checking names it; but
        where no label at all has its image, the part is not there."""
        wanted = {"images": self.images, "labels": self.labels}
        wanted |= {"instances": self.second} if self.second else {}
        wanted |= {"list": self.lists} if self.lists else {}
        word = _LONG[part] if self.long else part
        pieces, found = _pieces(bases, part, wanted, {"part": word})
        begun = bool(found["images"]) and all("{part}" in place for place in self.images)
        if not all(found.values()):
            return Look(pieces, None, begun)
        labelled = stems(found["labels"], self.label_end, self.but)
        names = listed(found["list"]) if self.lists else labelled
        if {*labelled}.isdisjoint(stems(found["images"], self.image_end)) or not names:
            missing = f"*{self.label_end} with an image of that name in {found['labels']}"
            return Look((pieces[0], Piece("labels", part, (missing,)), *pieces[2:]), None, begun)
        second = found.get("instances", "")
        items = [
            Item(
                self.number(name),
                name + self.image_end,
                name + self.label_end,
                f"{name}.png" if second else "",
            )
            for name in names
        ]
        there = SourcePart(found["images"], found["labels"], self.format, items, second)
        return Look(pieces, there, begun)


@dataclass(frozen=True)
class CocoLayout:
    """A COCO JSON, of segments with a folder of id PNGs, or of instances.

    Places hold "{part}", or "{long}" for "training" and "validation"; a JSON without is that of the
    only part.

    pngs: places of the id PNGs; none for instances.
    category: an entry of the JSON's `categories` -> the class's id here, None if there is none.
    image: an entry of the JSON's `images` -> id and name of the image, where not as in COCO's.
    but: categories whose instances leave no segment.
    """

    name: str
    images: tuple[str, ...]
    json: tuple[str, ...]
    pngs: tuple[str, ...] = ()
    category: Callable[[dict[str, Any]], int | None] | None = None
    image: Callable[[dict[str, Any]], tuple[int, str]] | None = None
    but: frozenset[int] = frozenset()
    tasks: tuple[Task, ...] = EVERY

    def look(self, bases: Sequence[str], part: PartName) -> Look:
        """What there is of a part; UserError where its JSON is none of this data."""
        single = not any("{part}" in place for place in self.json)
        if single and part != "train":
            return Look((), None)
        wanted = {"images": self.images, "json": self.json}
        wanted |= {"labels": self.pngs} if self.pngs else {}
        pieces, found = _pieces(bases, part, wanted, {"part": part, "long": _LONG[part]})
        there = self._part(found) if all(found.values()) else None
        return Look(pieces, there, bool(found["images"]) and not single)

    def _part(self, found: Mapping[str, str]) -> SourcePart:
        path = found["json"]
        if not self.pngs:
            items = Instances(path, self.but)
            form = LabelFormat("instances")
            return SourcePart(found["images"], "", form, items, listed_in=path)
        raw = read_coco(path, "panoptic", self.image)
        items = raw.items
        if self.category is not None:
            ids = {row["id"]: _category(path, row, self.category) for row in raw.categories}
            items = [
                replace(
                    item,
                    segments=tuple(
                        replace(segment, category_id=ids.get(segment.category_id, -1))
                        for segment in item.segments or ()
                    ),
                )
                for item in items
            ]
        form, places = LabelFormat("panoptic"), (found["images"], found["labels"])
        return SourcePart(*places, form, items, listed_in=path, categories=raw.categories)


@dataclass(frozen=True)
class Instances:
    """The images of an instances JSON, parsed anew at each pass: training on 118,287 images has
    860,001 objects, too many to keep for two parts at once.

    others: COCO's categories that do not count here; their objects leave no segment.
    """

    path: str
    others: frozenset[int] = frozenset()

    def __iter__(self) -> Iterator[Item]:
        for item in read_coco(self.path, "instance").items:
            kept = tuple(s for s in item.segments or () if s.category_id not in self.others)
            yield replace(item, segments=kept)


def _category(
    path: str, row: dict[str, Any], category: Callable[[dict[str, Any]], int | None]
) -> int:
    found = category(row)
    if found is None:
        raise UserError(
            f"{path} lists the category {row.get('name')!r} (id {row['id']}), which this data "
            "set does not have.",
            "Write it again with the script that made it.",
        )
    return found


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


def _pieces(
    bases: Sequence[str],
    part: PartName,
    wanted: Mapping[str, Sequence[str]],
    words: Mapping[str, str],
) -> tuple[tuple[Piece, ...], dict[str, str]]:
    """The pieces of a part by their kinds, looked for at places in which the words stand for
    "{part}" and such; and where each kind was found."""
    pieces: list[Piece] = []
    for kind, places in wanted.items():
        looked = tuple(dict.fromkeys(place.format(**words) for place in places))
        find = first_file if kind in ("list", "json") else first_folder
        pieces.append(Piece(kind, part, looked, find(bases, looked)))
    return tuple(pieces), {piece.kind: piece.found for piece in pieces}


def stems(location: str, end: str, but: Sequence[str] = ()) -> list[str]:
    """The names of all files there that end so (and not as one of `but`), without their end."""
    return [
        name[: -len(end)]
        for name in open_store(location).names()
        if name.endswith(end) and not any(name.endswith(other) for other in but)
    ]


def listed(location: str) -> list[str]:
    """The stems that a list file names: one a line, or "/JPEGImages/x.jpg /Labels/x.png"."""
    try:
        lines = read_file(location).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{location} is no list of names ({error}).", "Get it again.") from error
    first = (line.split()[0] for line in lines if line.strip())
    return list(dict.fromkeys(re.sub(r"\.\w+$", "", name.rpartition("/")[2]) for name in first))


def unpacking(root: Path) -> str:
    """The command that unpacks the tar files in a folder and in those in it, or a tar file; ""
    where there is none."""
    files = sorted({*root.glob("*"), *root.glob("*/*")}) if root.is_dir() else [root]
    tars = [path for path in files if path.name.endswith(_TARS) and path.is_file()]
    return " && ".join(
        f"tar -xf {shlex.quote(str(path))} -C {shlex.quote(str(path.parent))}" for path in tars
    )
