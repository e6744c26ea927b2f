"""Writes the built-in world as a prepared data set in COCO panoptic format."""

from __future__ import annotations

import colorsys
import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

from concat_cli.core import files
from concat_cli.core.config import ShapesConfig
from concat_cli.core.data.coco import read_json
from concat_cli.core.data.index import Row
from concat_cli.core.errors import UserError
from concat_cli.core.prepare import protocol
from concat_cli.core.prepare.pool import mapper, processes_for
from concat_cli.core.prepare.shapes_paint import Random
from concat_cli.core.prepare.shapes_scene import (
    CLASSES,
    SEED_BOUND,
    Scene,
    draw_scene,
    scene_seed,
    seen_indices,
    unseen_split,
)
from concat_cli.core.progress import SILENT, Progress

WORLD = 1  # raised when the same seed draws other pixels
PARTS = ("train", "dev", "val")
DRAWN = ".drawn"  # the folder in `out` of what is drawn in full
# of a world whose dataset.json does not tell: drawn before this could be chosen, or as by default
_UNTOLD = {"unseen_pixels": ShapesConfig.unseen_pixels}
_CHUNK = 25  # scenes that a process draws at a time


def prepare_shapes(
    out: Path, cfg: ShapesConfig, progress: Progress = SILENT, processes: int | None = None
) -> None:
    """Draws the world of `cfg` into the folder `out` (train, dev, val, annotations, dataset.json).

    train and dev are drawn from seen classes alone, val from all; with `unseen_pixels="void"` all
    parts are drawn from all classes, and train and dev tell no label and no mask of an unseen one:
    its pixels are void. A complete data set of the same configuration is left as it is.
    `processes`: by default one a CPU. UserError where `out` holds something else or cannot be
    written; nothing half-written can be taken for a data set.
    """
    out = Path(out)
    if cfg.seed < 0 or cfg.seed >= SEED_BOUND:
        raise UserError(f"shapes.seed is {cfg.seed}.", f"Take one of 0..{SEED_BOUND - 1}.")
    split, unseen = unseen_split(cfg.unseen, cfg.unseen_seed)
    try:
        _finish(out)
        if _is_done(out, cfg):
            progress.say(f"{out} already holds this data set: nothing to draw.")
            return
        files.remove_leftovers(out)
        made = not out.exists()
        try:
            with files.workspace(out, "drawing") as folder:
                taken = _draw_parts(folder, cfg, unseen, progress, processes)
                header = _header(cfg) | {"protocol": protocol.to_json(taken)}
                files.write_json(folder / "dataset.json", header, indent=1)
                if not _is_done(out, cfg):  # else another process was faster with the same
                    folder.rename(out / DRAWN)  # from now on it can always be finished
                    _finish(out)
        finally:
            if made and not any(out.iterdir()):
                out.rmdir()
    except OSError as error:
        raise files.write_error(out, error) from error
    progress.say(
        f"Drew {cfg.train} train, {cfg.dev} dev and {cfg.val} val scenes into {out} "
        f"({len(unseen)} of {len(CLASSES)} classes unseen, split {split}, "
        f"unseen pixels: {cfg.unseen_pixels})."
    )


def differing_keys(source: dict[str, Any], cfg: ShapesConfig) -> dict[str, tuple[Any, Any]]:
    """Keys of `cfg` that are otherwise in `source`, which is what a built-in world's dataset.json
    tells of its making -> (value there, value asked); keys that it does not tell are left out."""
    there, asked = _UNTOLD | source, _UNTOLD | _header(cfg)["source"]
    return {
        key: (there[key], asked[key])
        for key in asdict(cfg)
        if key in there and there[key] != asked[key]
    }


def _header(cfg: ShapesConfig) -> dict[str, Any]:
    """The content of dataset.json, but for `protocol`, which is known once all is drawn."""
    split, unseen = unseen_split(cfg.unseen, cfg.unseen_seed)
    source = {"world": WORLD} | asdict(cfg)
    if split == "custom":
        source["unseen"] = "; ".join(unseen)  # in class order, however it was written
    annotations = {part: f"annotations/panoptic_{part}" for part in PARTS}
    return {
        "format": 1,
        "name": "shapes",
        "class_split": split,
        "unseen": list(unseen),
        "parts": {
            part: {"images": part, "json": f"{path}.json", "pngs": path}
            for part, path in annotations.items()
        },
        "source": {key: value for key, value in source.items() if value != _UNTOLD.get(key)},
    }


def _is_done(out: Path, cfg: ShapesConfig) -> bool:
    """Whether `out` holds the finished data set of `cfg`; UserError if it holds another."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, not a folder.", "Choose another folder.")
    path = out / "dataset.json"
    if not path.is_file():
        if out.exists() and any(not p.name.startswith(".") for p in out.iterdir()):
            raise UserError(
                f"{out} is not empty and holds no finished data set.",
                "Choose another folder, or empty this one.",
            )
        return False
    found, header = read_json(path), _header(cfg)
    if {**found, "protocol": None} == {**header, "protocol": None}:
        return True
    given = found.get("source")
    if not isinstance(given, dict) or found.get("name") != header["name"]:
        raise UserError(f"{out} holds another data set.", "Choose another folder.")
    differing = differing_keys(cast("dict[str, Any]", given), cfg)
    facts = [f"{key} {there!r} there, {asked!r} asked" for key, (there, asked) in differing.items()]
    raise UserError(
        f"{out} holds another data set ({'; '.join(facts) or 'of another version'}).",
        f"Choose another folder, or remove this data set first: rm -r {out}",
    )


def _finish(out: Path) -> None:
    """Moves what was drawn in full to where it belongs, `dataset.json` last; goes on where that
    was broken off."""
    drawn = out / DRAWN
    if not drawn.is_dir() or drawn.is_symlink():
        return
    for name in (*PARTS, "annotations", "dataset.json"):
        if (drawn / name).exists():  # else it is there already
            (drawn / name).rename(out / name)
    drawn.rmdir()


def _draw_parts(
    folder: Path,
    cfg: ShapesConfig,
    unseen: tuple[str, ...],
    progress: Progress,
    processes: int | None,
) -> protocol.Taken:
    """Draws and writes all parts; returns what is void in train and dev."""
    counts = {"train": cfg.train, "dev": cfg.dev, "val": cfg.val}
    processes = processes_for(sum(counts.values()) // (4 * _CHUNK) + 1, processes, progress)
    first_id = 1
    listed: list[Row] = []
    draw_one = partial(_draw, folder, cfg, seen_indices(unseen))
    with mapper(draw_one, processes, chunk=_CHUNK) as draw:
        for part, count in counts.items():
            pngs = folder / "annotations" / f"panoptic_{part}"
            pngs.mkdir(parents=True)
            (folder / part).mkdir()
            jobs = [(part, index, first_id + index) for index in range(count)]
            scenes = list(progress.track(draw(jobs), f"drawing {part}", count))
            listed += [row for _, row in scenes if part != "val"]
            table = panoptic_json(part, cfg.size, [annotation for annotation, _ in scenes])
            pngs.with_suffix(".json").write_text(json.dumps(table), encoding="utf-8")
            first_id += count
    return protocol.keep_seen(listed, CLASSES.with_unseen(unseen), cfg.unseen_pixels)[1]


def _draw(
    folder: Path, cfg: ShapesConfig, seen: tuple[int, ...], job: tuple[str, int, int]
) -> tuple[dict[str, Any], Row]:
    """Draws and writes the scene of a part, index and image id; its COCO annotation, and what it
    truly holds. Segments that are not of `seen` are written as void, but in val."""
    part, index, image_id = job
    everything = range(len(CLASSES))
    told = everything if part == "val" else seen
    drawn = seen if cfg.unseen_pixels == "drop" and part != "val" else everything
    scene = draw_scene(scene_seed(part, cfg.seed, index), cfg.size, drawn)
    name = f"{image_id:012d}.png"
    row = row_of(scene, image_id, name)
    scene = without(scene, set(drawn) - set(told))
    ids = segment_ids(scene, image_id)
    code = np.append(0, ids).astype(np.uint32)[scene.segment_map]
    planes = np.stack([code & 255, code >> 8 & 255, code >> 16], axis=-1).astype(np.uint8)
    _write_png(folder / part / name, scene.image)
    _write_png(folder / "annotations" / f"panoptic_{part}" / name, planes)
    segments = list(segments_info(scene, ids))
    return {"image_id": image_id, "file_name": name, "segments_info": segments}, row


def _write_png(path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).save(path, "PNG", compress_level=1)


# A scene as COCO panoptic


def row_of(scene: Scene, image_id: int, name: str) -> Row:
    """All segments of a scene, numbered from 1."""
    labels: list[int] = scene.labels.tolist()
    numbers = list(range(1, len(labels) + 1))
    areas: list[int] = np.bincount(scene.segment_map.ravel(), minlength=len(labels) + 1)[
        1:
    ].tolist()
    categories = [CLASSES.ids[label] for label in labels]
    height, width = scene.segment_map.shape
    return Row(image_id, name, name, height, width, numbers, categories, [0] * len(labels), areas)


def without(scene: Scene, hidden: Collection[int]) -> Scene:
    """The scene without the segments of these classes: their pixels are 0, void."""
    keep = np.array([label not in hidden for label in scene.labels.tolist()], bool)
    number = np.append(0, np.where(keep, keep.cumsum(), 0)).astype(scene.segment_map.dtype)
    return replace(scene, segment_map=number[scene.segment_map], labels=scene.labels[keep])


def segment_ids(scene: Scene, image_id: int) -> list[int]:
    """Ids as COCO's: near the category's colour, R + 256 G + 65536 B, different within an image."""
    rng = Random(image_id)
    ids: list[int] = []
    for label in scene.labels.tolist():
        code = 0
        while code == 0 or code in ids:
            r, g, b = (min(max(v + rng.below(41) - 20, 0), 255) for v in category_colour(label))
            code = r | g << 8 | b << 16
        ids.append(code)
    return ids


def segments_info(scene: Scene, ids: Iterable[int]) -> Iterator[dict[str, Any]]:
    """The entries of a scene's segments, in its order."""
    for i, (label, code) in enumerate(zip(scene.labels.tolist(), ids, strict=True)):
        mask = scene.segment_map == i + 1
        rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
        x, y = int(columns[0]), int(rows[0])
        yield {
            "id": code,
            "category_id": CLASSES.ids[label],
            "area": int(np.count_nonzero(mask)),
            "bbox": [x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1],
            "iscrowd": 0,
        }


def category_colour(label: int) -> tuple[int, int, int]:
    """A class's colour in COCO's categories: hues a golden section apart, three depths."""
    r, g, b = colorsys.hsv_to_rgb(label * 0.618034 % 1.0, 0.55 + 0.2 * (label % 3), 0.9)
    return int(255 * r), int(255 * g), int(255 * b)


def panoptic_json(part: str, size: int, annotations: list[dict[str, Any]]) -> dict[str, Any]:
    """The COCO panoptic JSON of one part."""
    return {
        "info": {"description": f"concat shapes, {part}", "version": str(WORLD)},
        "licenses": [],
        "images": [
            {"id": a["image_id"], "file_name": a["file_name"], "height": size, "width": size}
            for a in annotations
        ],
        "annotations": annotations,
        "categories": [
            {
                "id": entry.id,
                "name": entry.name,
                "supercategory": entry.name.split()[1],
                "isthing": int(entry.kind == "thing"),
                "color": list(category_colour(label)),
            }
            for label, entry in enumerate(CLASSES.entries)
        ],
    }
