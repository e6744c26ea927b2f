"""COCO instances: 80 things, of 2014 or 2017, and the 65 of the 48/17 zero-shot split."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from concat_cli.core.data.class_list import load_class_list
from concat_cli.core.data.coco_json import read_instances
from concat_cli.core.data.recipes.places import (
    Offer,
    Piece,
    bases,
    first_file,
    first_folder,
    missing,
    named,
)
from concat_cli.core.data.source import PARTS, Item, LabelFormat, PartName, Source, SourcePart
from concat_cli.core.errors import UserError

_Pair = tuple[Piece, Piece]  # the images and the JSON of a part
_SPLITS: Mapping[int, str] = {80: "coco_instances_65_15", 65: "coco_instances_48_17"}


@dataclass(frozen=True)
class InstanceItems:
    """The images of an instances JSON, parsed anew at each pass: training on 118,287 images has
    860,001 objects, too many to keep for two parts at once.

    others: COCO's categories that do not count here; their objects leave no segment.
    """

    path: str
    others: frozenset[int]

    def __iter__(self) -> Iterator[Item]:
        for item in read_instances(self.path).items:
            kept = tuple(s for s in item.segments or () if s.category_id not in self.others)
            yield replace(item, segments=kept)


def find(root: Path, year: int = 2017, classes: int = 80) -> Source:
    """COCO instances from JSON and images in folders or in their zips; UserError that lists what is
    missing. `classes`: 80, or the 65 of the 48/17 split (its papers use year 2014)."""
    if year not in (2014, 2017) or classes not in _SPLITS:
        raise UserError(
            f"There are no COCO instances of {year} with {classes} classes.",
            "The year is 2014 or 2017; the classes are 80 or 65.",
        )
    vocabulary = load_class_list(f"coco_instances_{classes}")
    others = frozenset(load_class_list("coco_instances_80").ids) - frozenset(vocabulary.ids)
    places = bases(root, "coco", archives=False)
    pieces: dict[PartName, _Pair] = {part: _pieces(places, part, year) for part in PARTS}
    found: dict[PartName, _Pair] = {part: both for part, both in pieces.items() if both[0].found}
    flat = [piece for part in found or pieces for piece in pieces[part]]
    if not all(piece.found for piece in flat):
        raise missing(root, "official", flat, _offer(year))
    parts: dict[PartName, SourcePart] = {
        part: SourcePart(
            images.found,
            "",
            LabelFormat("instances"),
            InstanceItems(file.found, others),
            listed_in=file.found,
        )
        for part, (images, file) in found.items()
    }
    return Source(
        name="coco-instances",
        layout=named("official", parts.values()),
        vocabulary=vocabulary,
        tasks=("instance",),
        parts=parts,
        default_split=_SPLITS[classes],
    )


def _pieces(places: list[str], part: PartName, year: int) -> _Pair:
    stem = f"{part}{year}"
    folders = stem, f"images/{stem}", f"{stem}.zip!{stem}", f"images/{stem}.zip!{stem}"
    inside = f"annotations/instances_{stem}.json"
    files = (
        inside,
        f"annotations_trainval{year}.zip!{inside}",
        f"annotations/annotations_trainval{year}.zip!{inside}",
    )
    return (
        Piece("images", part, folders, first_folder(places, folders)),
        Piece("json", part, files, first_file(places, files)),
    )


def _offer(year: int) -> Offer:
    site = "https://cocodataset.org/#download"
    return Offer(
        f"COCO instances {year}",
        {
            "images": f"Images: train{year}.zip and val{year}.zip, {site}",
            "json": f"Annotations: annotations_trainval{year}.zip, {site}",
        },
    )
