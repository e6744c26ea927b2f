"""The layouts of Cityscapes, drawn at small scale."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from drawn_files import (
    Files,
    Meaning,
    Segments,
    Truth,
    grey,
    image_row,
    pack,
    pairs,
    panoptic_json,
    panoptic_rows,
    photo,
    raw_map,
    wide,
    write,
)

CITIES = {
    "train": [f"{city}/{city}_{n:06d}_000019" for city in ("aachen", "ulm") for n in (0, 1)],
    "val": ["lindau/lindau_000000_000019", "munster/munster_000000_000019"],
}
CITY_LABELS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
# road, sky, cars and a group of cars, persons, void of several kinds, a caravan, licence plates
CITY_RAW = (7, 23, 26, 26000, 26001, 24003, 33000, 0, 4, 10, 29, 29000)


def city_class(value: int) -> int | None:
    label = value // 1000 if value >= 1000 else value
    return label if label in CITY_LABELS else None


def city_segments(raw: np.ndarray) -> Segments:
    """Each value a segment; a thing without number is a group."""
    return [
        (label, value < 1000 and label >= 24, raw == value)
        for value in np.unique(raw).tolist()
        if (label := city_class(value)) is not None
    ]


def city_files() -> tuple[Files, Truth]:
    files: Files = {}
    truth: Truth = {}
    for part, stems in CITIES.items():
        for stem in stems:
            seed = sum(map(ord, stem))
            raw = raw_map(CITY_RAW, seed)
            image = f"leftImg8bit/{part}/{stem}_leftImg8bit.png"
            files[image] = photo(seed, "PNG")
            files[f"gtFine/{part}/{stem}_gtFine_instanceIds.png"] = wide(raw)
            files[f"gtFine/{part}/{stem}_gtFine_color.png"] = photo(seed, "PNG")
            truth.setdefault(part, {})[image.rpartition("/")[2]] = city_segments(raw)
    return files, truth


def cityscapes(root: Path) -> Truth:
    files, truth = city_files()
    write(root / "cityscapes", files)
    return truth


def cityscapes_zips(root: Path) -> Truth:
    files, truth = city_files()
    names = ("leftImg8bit", "gtFine")
    pack(root, files, {f"{name}_trainvaltest.zip": (f"{name}/", f"{name}/") for name in names})
    return truth


def city_panoptic(root: Path, suffix: str, number: Callable[[int], int]) -> Truth:
    """The JSON of cityscapesScripts: its file names of images are those of no file."""
    files, truth = city_files()
    files = {name: data for name, data in files.items() if name.startswith("left")}
    names = ("road", "sky", "person", "car", "bicycle")
    labels = (7, 23, 24, 26, 33)
    categories = [
        {"id": number(label), "name": name} for label, name in zip(labels, names, strict=True)
    ]
    for part, stems in CITIES.items():
        rows, images = [], []
        for stem in (stem.rpartition("/")[2] for stem in stems):
            segments, png = panoptic_rows(truth[part][f"{stem}_leftImg8bit.png"], number)
            name = f"{stem}_gtFine_panoptic.png"
            files[f"gtFine/cityscapes_panoptic_{part}{suffix}/{name}"] = png
            rows.append({"image_id": stem, "file_name": name, "segments_info": segments})
            images.append(image_row(stem, f"{stem}_gtFine_leftImg8bit.png"))
        json_name = f"gtFine/cityscapes_panoptic_{part}{suffix}.json"
        files[json_name] = panoptic_json(images, rows, categories)
    write(root, files)
    return truth


def cityscapes_json(root: Path) -> Truth:
    return city_panoptic(root, "", lambda label: label)


def cityscapes_json_train_ids(root: Path) -> Truth:
    return city_panoptic(root, "_trainId", CITY_LABELS.index)


def city_pairs(root: Path, end: str, pool: Iterable[int], meaning: Meaning) -> Truth:
    label, image = f"gtFine/{{part}}/{{stem}}_gtFine_{end}.png", "leftImg8bit/{part}/{stem}_left"
    files, truth = pairs(CITIES, image + "Img8bit.png", label, grey, pool, meaning)
    write(root, files)
    return truth


def cityscapes_label_ids(root: Path) -> Truth:
    return city_pairs(root, "labelIds", (0, 7, 14, 23, 26, 33), city_class)


def cityscapes_train_ids(root: Path) -> Truth:
    meaning = dict(enumerate(CITY_LABELS)).get
    return city_pairs(root, "labelTrainIds", (0, 10, 13, 18, 255), meaning)
