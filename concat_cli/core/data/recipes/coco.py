"""COCO panoptic, 133 classes: the official layout, unpacked or in its zips as they are offered."""

from __future__ import annotations

from pathlib import Path

from concat_cli.core.data.coco_json import CocoJson, read_panoptic
from concat_cli.core.data.recipes.places import named, packed_twice, unpacking
from concat_cli.core.data.source import PARTS, LabelFormat, PartName, Source, SourcePart
from concat_cli.core.data.store import file_exists, location_exists
from concat_cli.core.errors import UserError
from concat_cli.core.vocabulary import Vocabulary

DEFAULT_SPLIT = "coco_panoptic_119_14"
IMAGES = (  # where COCO's images of 2017 are looked for
    "{part}2017",
    "images/{part}2017",
    "{part}2017.zip!{part}2017",
    "images/{part}2017.zip!{part}2017",
)
_PAGE = "https://cocodataset.org/#download"
_ALL = "panoptic_annotations_trainval2017.zip"
_PLACES = {  # where each thing is looked for, in this order
    "images": IMAGES,
    "json": (
        "annotations/panoptic_{part}2017.json",
        "panoptic_{part}2017.json",
        f"{_ALL}!annotations/panoptic_{{part}}2017.json",
        f"annotations/{_ALL}!annotations/panoptic_{{part}}2017.json",
    ),
    "pngs": (
        "annotations/panoptic_{part}2017",
        "panoptic_{part}2017",
        "annotations/panoptic_{part}2017.zip!panoptic_{part}2017",
        "panoptic_{part}2017.zip!panoptic_{part}2017",
        f"{_ALL}!annotations/panoptic_{{part}}2017.zip!panoptic_{{part}}2017",
        f"annotations/{_ALL}!annotations/panoptic_{{part}}2017.zip!panoptic_{{part}}2017",
    ),
}
_SIMPLE = {"images": ("images",), "json": ("panoptic.json",), "pngs": ("panoptic",)}
_NEEDS = {
    "images": "the images ({part}2017.zip)",
    "json": f"the list of segments ({_ALL})",
    "pngs": f"the segments' pixels (panoptic_{{part}}2017.zip, which lies inside {_ALL})",
}
_SHOWN = 3  # places that an error names for one thing
Places = dict[str, str]  # images, json, pngs -> location


def find(root: Path) -> Source:
    """The parts below `root` or its folder coco: the official layout, or images, panoptic.json and
    panoptic.

    A part is there if its images are. UserError listing what is missing and where it is offered.
    """
    starts = [start for start in (root, root / "coco") if start.is_dir()]
    found: dict[PartName, Places] = {}
    for part in PARTS:
        places = _find_part(starts, part, _places(part))
        if places is not None:
            found[part] = places
    layout, single = "official", not found
    if single:
        simple = _find_part(starts, "train", _SIMPLE)
        if simple is None:
            raise _wrong_layout(root)
        found["train"] = simple
        layout = "images, panoptic.json, panoptic"
    lists = {part: read_panoptic(places["json"]) for part, places in found.items()}
    parts: dict[PartName, SourcePart] = {p: panoptic_part(found[p], lists[p]) for p in found}
    return Source(
        name="coco",
        layout=named(layout, parts.values()),
        vocabulary=same_categories(list(lists.values())),
        tasks=("panoptic", "semantic", "instance"),
        parts=parts,
        default_split=DEFAULT_SPLIT,
        notes=packed_twice(parts.values()),
        single=single,
    )


def panoptic_part(places: Places, listed: CocoJson) -> SourcePart:
    """A part in COCO's panoptic format."""
    return SourcePart(
        images=places["images"],
        labels=places["pngs"],
        format=LabelFormat("panoptic"),
        items=listed.items,
        listed_in=places["json"],
    )


def same_categories(lists: list[CocoJson]) -> Vocabulary:
    """The classes of JSON files that belong together; UserError where they differ."""
    first = lists[0]
    for other in lists[1:]:
        ours, theirs = ({(c["id"], c["name"]) for c in one.categories} for one in (first, other))
        if ours != theirs:
            raise UserError(
                f"{first.location} and {other.location} list different categories, for example "
                f"{sorted(ours ^ theirs)[0]}.",
                "Both parts must come from one data set.",
            )
    return Vocabulary.from_categories(first.categories)


def _places(part: str) -> dict[str, tuple[str, ...]]:
    return {key: tuple(v.format(part=part) for v in values) for key, values in _PLACES.items()}


def _find_part(starts: list[Path], part: str, places: dict[str, tuple[str, ...]]) -> Places | None:
    """The part's three places; None if its images are nowhere, UserError if only the rest is."""
    found: Places = {}
    missing: list[str] = []
    for key, names in places.items():
        there = file_exists if key == "json" else location_exists
        candidates = [str(start / name) for start in starts for name in names]
        place = next((place for place in candidates if there(place)), None)
        if place is not None:
            found[key] = place
        elif key == "images":
            return None
        else:
            looked = ", ".join(candidates[:_SHOWN])
            more = f" and {len(candidates) - _SHOWN} more places" * (len(candidates) > _SHOWN)
            missing.append(f"{_NEEDS[key].format(part=part)}, looked for {looked}{more}")
    if missing:
        raise UserError(
            f"The images of {part} are in {found['images']}, but these are missing: "
            f"{'; '.join(missing)}.",
            f"They are offered at {_PAGE}; for files elsewhere use `concat prepare-data custom`.",
        )
    return found


def _wrong_layout(root: Path) -> UserError:
    names = [*(name.replace("{part}", "train") for name in _PLACES["images"]), *_SIMPLE["images"]]
    if not root.is_dir():
        raise UserError(f"{root} is a file.", f"Give the folder that it lies in: {root.parent}.")
    has = ", ".join(sorted(p.name for p in root.iterdir())[:8]) or "nothing"
    needs = "; ".join(text.format(part="train") for text in _NEEDS.values())
    command = unpacking(root)
    first = f"Only zip files are read in place; unpack first: {command}; " if command else ""
    return UserError(
        f"{root} does not look like COCO: looked for {', '.join(names)} (and the same of val). "
        f"It holds: {has}.",
        f"{first}Needed are {needs}, and the same of val: {_PAGE}. For files elsewhere use "
        "`concat prepare-data custom`.",
    )
