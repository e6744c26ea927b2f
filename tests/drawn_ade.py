"""The layouts of ADE20K, drawn at small scale."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from drawn_files import (
    HEIGHT,
    NAMED,
    WIDTH,
    Files,
    Meaning,
    Truth,
    grey,
    image_bytes,
    image_row,
    numbered,
    pack,
    pairs,
    panoptic_json,
    panoptic_rows,
    photo,
    red_green,
    renamed,
    tiff,
    write,
)

ADE = renamed(numbered("ADE_{part}_{n:08d}"), NAMED)
ADE_RAW = (0, 1, 2, 8, 13, 149, 150)  # void, wall, building (stuff); bed, person, clock, flag
ADE_THINGS = {1: 8, 4: 13, 99: 149, 100: 150}  # class of annotations_instance -> of 150
CHALLENGE = "ADEChallengeData2016/"


def ade_files(meaning: Meaning) -> tuple[Files, Truth]:
    label = CHALLENGE + "annotations/{part}/{stem}.png"
    image = CHALLENGE + "images/{part}/{stem}.jpg"
    return pairs(ADE, image, label, grey, ADE_RAW, meaning)


def ade_semantic(root: Path) -> Truth:
    files, truth = ade_files(lambda value: value or None)
    write(root, files)
    return truth


def ade_zip(root: Path) -> Truth:
    files, truth = ade_files(lambda value: value or None)
    pack(root, files, {"ADEChallengeData2016.zip": (CHALLENGE, CHALLENGE)})
    return truth


def ade_instances(root: Path) -> Truth:
    """Instances lie over the stuff; a thing of the semantic map without one is void."""
    files, truth = ade_files(lambda value: value if value in (1, 2) else None)
    for part, stems in ADE.items():
        for stem in stems:
            known = truth["train" if part == "training" else "val"][f"{stem}.jpg"]
            rng = np.random.default_rng(sum(map(ord, stem)))
            planes = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
            for number, thing in enumerate((1, 4, 4, 100), 1):
                y, x = rng.integers(0, 36), rng.integers(0, 50)
                planes[y : y + 10, x : x + 12] = thing, number, 0
            covered = planes[..., 0] > 0
            segments = [(c, crowd, mask & ~covered) for c, crowd, mask in known]
            for number, thing in enumerate((1, 4, 4, 100), 1):
                segments.append((ADE_THINGS[thing], False, planes[..., 1] == number))
            known[:] = [segment for segment in segments if segment[2].any()]
            files[f"{CHALLENGE}annotations_instance/{part}/{stem}.png"] = image_bytes(planes)
    write(root, files)
    return truth


def ade_converted(root: Path) -> Truth:
    files, truth = pairs(
        ADE,
        "images/{part}/{stem}.jpg",
        "annotations_detectron2/{part}/{stem}.png",
        grey,
        (0, 7, 149, 255),
        lambda value: None if value == 255 else value + 1,
    )
    write(root / CHALLENGE, files)
    return truth


def ade_panoptic(root: Path) -> Truth:
    """The JSON of Mask2Former's script: categories from 0, image ids that are names."""
    files, truth = ade_files(lambda value: value or None)
    names = {"train": "training", "val": "validation"}
    categories = [{"id": i, "name": f"own {i}", "isthing": 1} for i in range(150)]
    for part, word in names.items():
        rows, images = [], []
        for stem in ADE[word]:
            known = truth[part][f"{stem}.jpg"]
            segments, png = panoptic_rows(known, lambda category: category - 1)
            files[f"{CHALLENGE}ade20k_panoptic_{part}/{stem}.png"] = png
            rows.append({"image_id": stem, "file_name": f"{stem}.png", "segments_info": segments})
            images.append(image_row(stem, f"{stem}.jpg"))
        files[f"{CHALLENGE}ade20k_panoptic_{part}.json"] = panoptic_json(images, rows, categories)
    write(root, files)
    return truth


FULL = "ADE20K_2021_17_01/images/ADE/"
FULL_KNOWN = (447, 2978, 1831)


def ade_full_value(value: int) -> int | None:
    return value if value in FULL_KNOWN else None


def ade_full_files() -> tuple[Files, Truth]:
    """Label maps beside the images, in folders of scenes, with masks of parts and instances."""
    pool = (0, 1, 7, 3688, *FULL_KNOWN)
    place = FULL + "{part}/urban/street/{stem}"
    files, truth = pairs(ADE, place + ".jpg", place + "_seg.png", red_green, pool, ade_full_value)
    for name in [name for name in files if name.endswith(".jpg")]:
        files[name.replace(".jpg", "_parts_1.png")] = photo(1, "PNG")
        files[name.replace(".jpg", "/instance_000.png")] = photo(2, "PNG")
    return files, truth


def ade_full(root: Path) -> Truth:
    files, truth = ade_full_files()
    write(root, files)
    return truth


def ade_full_zip(root: Path) -> Truth:
    files, truth = ade_full_files()
    pack(root, files, {"someone_0a1b2c.zip": ("ADE20K", "ADE20K")})
    return truth


def ade_full_tiff(root: Path) -> Truth:
    files, truth = pairs(
        ADE,
        "images_detectron2/{part}/{stem}.jpg",
        "annotations_detectron2/{part}/{stem}.tif",
        tiff,
        (0, 2, 11, 65535),
        {0: 2978, 2: 2420, 11: 1831}.get,
    )
    write(root / "ADE20K_2021_17_01", files)
    return truth
