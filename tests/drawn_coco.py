"""The layouts of COCO's panoptic annotations, COCO-Stuff and COCO instances, drawn small."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from drawn_files import (
    HEIGHT,
    WIDTH,
    Files,
    Truth,
    grey,
    image_row,
    numbered,
    pack,
    pairs,
    panoptic_json,
    panoptic_rows,
    photo,
    write,
)

COCO = numbered("{n:012d}")
STUFF_RAW = (0, 10, 12, 20, 66, 89, 91, 104, 123, 171, 180, 181, 255)
STUFF_IDS = (0, 11, 19, 79, 80, 93, 112, 160, 170, 255)
NOT_IN_USE = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)  # of the raw values 0..181
IN_USE = [value for value in range(182) if value not in NOT_IN_USE]


def stuff_raw(value: int) -> int | None:
    return None if value == 255 else value + 1


def stuff_position(value: int) -> int | None:
    return None if value == 255 else IN_USE[value] + 1


def coco_stuff(root: Path) -> Truth:
    label = "stuffthingmaps/{part}2017/{stem}.png"
    files, truth = pairs(COCO, "{part}2017/{stem}.jpg", label, grey, STUFF_RAW, stuff_raw)
    write(root, files)
    return truth


def coco_stuff_zips(root: Path) -> Truth:
    label = "maps/{part}2017/{stem}.png"
    files, truth = pairs(COCO, "{part}2017/{stem}.jpg", label, grey, STUFF_RAW, stuff_raw)
    archives = {f"{part}2017.zip": (f"{part}2017/", f"{part}2017/") for part in COCO}
    pack(root, files, archives | {"stuffthingmaps_trainval2017.zip": ("maps/", "")})
    return truth


def coco_stuff_mmseg(root: Path) -> Truth:
    label = "annotations/{part}2017/{stem}_labelTrainIds.png"
    image = "images/{part}2017/{stem}.jpg"
    files, truth = pairs(COCO, image, label, grey, STUFF_IDS, stuff_position)
    write(root / "coco_stuff164k", files)
    return truth


def coco_stuff_mmseg_both(root: Path) -> Truth:
    """Raw maps beside converted ones, which are left alone."""
    coco_stuff_mmseg(root)
    label, image = "annotations/{part}2017/{stem}.png", "images/{part}2017/{stem}.jpg"
    files, truth = pairs(COCO, image, label, grey, STUFF_RAW, stuff_raw)
    write(root / "coco_stuff164k", files)
    return truth


def coco_stuff_detectron(root: Path) -> Truth:
    label = "stuffthingmaps_detectron2/{part}2017/{stem}.png"
    image = "{part}2017/{stem}.jpg"
    files, truth = pairs(COCO, image, label, grey, STUFF_IDS, stuff_position)
    write(root / "coco", files)
    return truth


# panoptic

UNSEEN = {
    21: "cow", 25: "giraffe", 33: "suitcase", 34: "frisbee", 41: "skateboard", 57: "carrot",
    87: "scissors", 100: "cardboard", 145: "playingfield", 148: "river", 149: "road",
    184: "tree-merged", 187: "sky-other-merged", 193: "grass-merged",
}  # fmt: skip
SEEN = [number for number in range(1, 201) if number not in UNSEEN][:119]
PANOPTIC_RAW = (0, 1, 2, 21, 60, 110, 187)  # 0: void
ALL = "panoptic_annotations_trainval2017.zip"


def coco_panoptic_files() -> tuple[Files, Truth]:
    """The official layout: 133 categories, of which the 14 unseen have their names and lie in every
    second image; the second category is a crowd."""
    label = "raw/{part}/{stem}.png"
    files, truth = pairs(
        COCO, "{part}2017/{stem}.jpg", label, grey, PANOPTIC_RAW, lambda value: value or None
    )
    files = {name: data for name, data in files.items() if not name.startswith("raw/")}
    categories = [
        {"id": n, "name": UNSEEN.get(n, f"kind {n}"), "isthing": int(n <= 90)}
        for n in sorted([*SEEN, *UNSEEN])
    ]
    for part, known in truth.items():
        rows, images = [], []
        for name, segments in known.items():
            stem = name.removesuffix(".jpg")
            known[name] = [
                (category, category == 2, mask)
                for category, _, mask in segments
                if int(stem) % 2 == 0 or category not in UNSEEN
            ]
            segments, png = panoptic_rows(known[name], lambda category: category)
            files[f"annotations/panoptic_{part}2017/{stem}.png"] = png
            rows.append(
                {"image_id": int(stem), "file_name": f"{stem}.png", "segments_info": segments}
            )
            images.append(image_row(int(stem), name))
        files[f"annotations/panoptic_{part}2017.json"] = panoptic_json(images, rows, categories)
    return files, truth


def coco_panoptic(root: Path) -> Truth:
    files, truth = coco_panoptic_files()
    write(root, files)
    return truth


def coco_panoptic_detectron(root: Path) -> Truth:
    """The PNGs beside the images, the JSONs in annotations."""
    files, truth = coco_panoptic_files()
    moved = {n.replace("annotations/panoptic_", "panoptic_") if n.endswith(".png") else n: data
             for n, data in files.items()}  # fmt: skip
    write(root / "coco", moved)
    return truth


def coco_panoptic_zips(root: Path, kind: int = zipfile.ZIP_DEFLATED) -> Truth:
    """As downloaded: the PNGs of each part in a zip, and these in the zip of all annotations; and
    COCO-Stuff's zip beside them."""
    files, truth = coco_panoptic_files()
    archives = {f"{part}2017.zip": (f"{part}2017/", f"{part}2017/") for part in COCO}
    for part in COCO:
        inner = f"panoptic_{part}2017"
        archives[f"annotations/{inner}.zip"] = (f"annotations/{inner}/", f"{inner}/")
    files["maps/train2017/000000000001.png"] = b"of COCO-Stuff"
    archives |= {ALL: ("annotations/", "annotations/")}
    pack(root, files, archives | {"stuffthingmaps_trainval2017.zip": ("maps/", "")}, kind)
    return truth


def coco_panoptic_zips_stored(root: Path) -> Truth:
    return coco_panoptic_zips(root, zipfile.ZIP_STORED)


# instances


def instances(root: Path, year: int) -> Files:
    """Squares, a smaller over a larger one, and a crowd; categories 1, 21 and 13 (stop sign)."""
    files: Files = {}
    for part, stems in COCO.items():
        images, rows = [], []
        for stem in stems:
            picture = f"COCO_{part}{year}_{stem}.jpg" if year == 2014 else f"{stem}.jpg"
            files[f"{part}{year}/{picture}"] = photo(int(stem))
            images.append({**image_row(int(stem), picture)})
            rows += [instance_row(len(rows) + i, int(stem), *shape) for i, shape in SHAPES.items()]
        content = {"images": images, "annotations": rows, "categories": coco_categories()}
        name = f"annotations/instances_{part}{year}.json"
        files[name] = json.dumps(content).encode()
    return files


# number -> (category, crowd, x, y, width, height)
SHAPES = {
    1: (1, 0, 4, 4, 30, 30),
    2: (21, 0, 10, 10, 8, 8),
    3: (13, 0, 40, 4, 12, 12),
    4: (1, 1, 40, 24, 20, 20),
}


def coco_categories() -> list[dict[str, Any]]:
    return [{"id": i, "name": name} for i, name in ((1, "person"), (13, "stop sign"), (21, "cow"))]


def instance_row(
    number: int, image: int, category: int, crowd: int, x: int, y: int, w: int, h: int
) -> dict[str, Any]:
    polygon: Any = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    if crowd:  # run lengths down the columns, from an empty run on
        column = [y, h, HEIGHT - y - h]
        counts = [x * HEIGHT + y, h]
        for _ in range(w - 1):
            counts += [column[2] + column[0], h]
        counts.append(column[2] + (WIDTH - x - w) * HEIGHT)
        polygon = {"size": [HEIGHT, WIDTH], "counts": counts}
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "iscrowd": crowd,
        "segmentation": polygon,
        "area": w * h,
        "bbox": [x, y, w, h],
    }


def instance_truth(year: int, but: int = 0) -> Truth:
    """The smaller square lies over the larger one."""
    masks = {}
    for number, (category, crowd, x, y, w, h) in SHAPES.items():
        mask = np.zeros((HEIGHT, WIDTH), bool)
        mask[y : y + h, x : x + w] = True
        masks[number] = (category, bool(crowd), mask)
    masks[1] = (1, False, masks[1][2] & ~masks[2][2])
    kept = [segment for segment in masks.values() if segment[0] != but]
    form = "COCO_{part}2014_{stem}.jpg" if year == 2014 else "{stem}.jpg"
    return {
        part: {form.format(part=part, stem=stem): list(kept) for stem in stems}
        for part, stems in COCO.items()
    }


def coco_instances(root: Path) -> Truth:
    write(root, instances(root, 2017))
    return instance_truth(2017)


def coco_instances_zips(root: Path) -> Truth:
    """2014 in its zips, of which the 48/17 split leaves out the stop sign."""
    archives = {f"{part}2014.zip": (f"{part}2014/", f"{part}2014/") for part in COCO}
    archives["annotations_trainval2014.zip"] = ("annotations/", "annotations/")
    pack(root, instances(root, 2014), archives)
    return instance_truth(2014, but=13)
