"""A user's own data in the four forms that `prepare-data custom` takes, with parts of their own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from drawn_coco import SHAPES, coco_panoptic_files, instance_truth
from drawn_coco import instances as coco_instances
from drawn_files import Files, Segments, Truth, grey, numbered, pack, pairs, write

STEMS = numbered("room {n}")
VALUES = {0: "wall", 4: "floor", 7: "cat", 9: "stop sign"}  # of the maps; 255 is void
CLASSES = "wall : stuff = 0\nfloor : stuff = 4\ncat = 7\nstop sign = 9\n"


def _given(**form: str) -> dict[str, str]:
    """The options of both parts, from names with {part}."""
    train = {key: place.format(part="train") for key, place in form.items()}
    val = {f"val_{key}": place.format(part="val") for key, place in form.items()}
    return train | val


PANOPTIC = _given(images="{part}2017", json="annotations/panoptic_{part}2017.json")
PANOPTIC_ZIPS = _given(
    images="photos.zip!{part}2017",
    json="truth.zip!annotations/panoptic_{part}2017.json",
    labels="truth.zip!annotations/panoptic_{part}2017",
)
INSTANCES = _given(images="{part}2017", json="annotations/instances_{part}2017.json")
SEMANTIC = {"classes": "classes.txt"} | _given(images="photos/{part}", labels="maps/{part}")
SEMANTIC_ZIP = {"classes": "classes.txt"} | _given(
    images="all.zip!photos/{part}", labels="all.zip!maps/{part}"
)
MERGED = {"classes": "classes.txt"} | _given(
    images="photos/{part}", labels="maps/{part}", json="{part}.json"
)


def panoptic(root: Path) -> Truth:
    files, truth = coco_panoptic_files()
    write(root, files)
    return truth


def panoptic_zips(root: Path) -> Truth:
    """Images in folders of one zip, truth in another."""
    files, truth = coco_panoptic_files()
    files = {n if n.startswith("annotations") else f"photos/{n}": d for n, d in files.items()}
    places = {"photos.zip": ("photos/", ""), "truth.zip": ("annotations/", "annotations/")}
    pack(root, files, places)
    return truth


def instances(root: Path) -> Truth:
    write(root, coco_instances(root, 2017))
    return instance_truth(2017)


def map_files() -> tuple[Files, Truth]:
    """Photos and label maps of the same names, and the list of what the values mean."""
    files, truth = pairs(
        STEMS,
        "photos/{part}/{stem}.jpg",
        "maps/{part}/{stem}.png",
        grey,
        (*VALUES, 255),
        lambda value: None if value == 255 else value,
    )
    files["classes.txt"] = CLASSES.encode()
    return files, truth


def semantic(root: Path) -> Truth:
    files, truth = map_files()
    write(root, files)
    return truth


def semantic_zip(root: Path) -> Truth:
    files, truth = map_files()
    classes = {"classes.txt": files.pop("classes.txt")}
    pack(root, {f"all/{name}": data for name, data in files.items()}, {"all.zip": ("all/", "")})
    write(root, classes)
    return truth


def merged(root: Path) -> Truth:
    """Cats and stop signs are instances of a JSON and lie over the maps, whose own are void."""
    files, truth = map_files()
    names = {
        21: "cat",
        13: "stop sign",
    }  # category of the JSON -> name, of which the maps have 7, 9
    for part, stems in STEMS.items():
        source = json.loads(coco_instances(root, 2017)[f"annotations/instances_{part}2017.json"])
        for image, stem in zip(source["images"], stems, strict=True):
            image["file_name"] = f"{stem}.jpg"
        source["annotations"] = [a for a in source["annotations"] if a["category_id"] in names]
        source["categories"] = [{"id": i, "name": name} for i, name in names.items()]
        files[f"{part}.json"] = json.dumps(source).encode()
        for name, known in truth[part].items():
            truth[part][name] = over_stuff(known)
    write(root, files)
    return truth


def over_stuff(known: Segments) -> Segments:
    """The stuff of a map where no box lies, and the boxes of cats and stop signs."""
    boxes: Segments = []
    for category, crowd, x, y, width, height in SHAPES.values():
        if category in (13, 21):
            mask = np.zeros((48, 64), bool)
            mask[y : y + height, x : x + width] = True
            boxes.append(({21: 7, 13: 9}[category], bool(crowd), mask))
    covered = np.any([mask for *_, mask in boxes], axis=0)
    stuff = [(c, crowd, mask & ~covered) for c, crowd, mask in known if c in (0, 4)]
    return [segment for segment in [*stuff, *boxes] if segment[2].any()]
