"""Writes the built-in world as a prepared data set in COCO panoptic format."""

from __future__ import annotations

import colorsys
import json
import os
import shutil
import socket
from collections.abc import Collection, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

from concat_cli.core import files
from concat_cli.core.config import ShapesConfig
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
# of a world whose dataset.json does not tell: drawn before this could be chosen, or as by default
UNTOLD = {"unseen_pixels": ShapesConfig.unseen_pixels}
_CHUNK = 25  # scenes that a process draws at a time


@dataclass(frozen=True)
class _Job:
    """Scenes of one part that one process draws."""

    folder: Path
    part: str
    seed: int
    size: int
    allowed: tuple[int, ...]  # classes that are drawn
    told: tuple[int, ...]  # of these the classes whose segments are written; others become void
    first: int  # index of the first scene
    count: int
    first_id: int  # image id of the part's scene 0


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
    header = _header(cfg, split, unseen)
    try:
        if _is_done(out, header):
            progress.say(f"{out} already holds this data set: nothing to draw.")
            return
        with _workspace(out) as folder:
            taken = _draw_parts(folder, cfg, unseen, progress, processes)
            _publish(folder, out, header, taken)
    except OSError as error:
        raise files.write_error(out, error) from error
    progress.say(
        f"Drew {cfg.train} train, {cfg.dev} dev and {cfg.val} val scenes into {out} "
        f"({len(unseen)} of {len(CLASSES)} classes unseen, split {split}, "
        f"unseen pixels: {cfg.unseen_pixels})."
    )


def differing_keys(source: dict[str, Any], cfg: ShapesConfig) -> list[str]:
    """Keys of `cfg` that are otherwise in `source`, which is what a built-in world's dataset.json
    tells of its making; keys that it does not tell are left out."""
    there = UNTOLD | source
    asked = UNTOLD | _source(cfg, *unseen_split(cfg.unseen, cfg.unseen_seed))
    return [key for key in asdict(cfg) if key in there and there[key] != asked[key]]


def _source(cfg: ShapesConfig, split: str, unseen: tuple[str, ...]) -> dict[str, Any]:
    """What the data set was drawn from."""
    source = {"world": WORLD} | asdict(cfg)
    if split == "custom":
        source["unseen"] = "; ".join(unseen)  # in class order, however it was written
    return {key: value for key, value in source.items() if value != UNTOLD.get(key)}


def _header(cfg: ShapesConfig, split: str, unseen: tuple[str, ...]) -> dict[str, Any]:
    """The content of dataset.json, but for `protocol`, which is known once all is drawn."""
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
        "source": _source(cfg, split, unseen),
    }


def _is_done(out: Path, header: dict[str, Any]) -> bool:
    """Whether `out` holds the finished data set of `header`; UserError if it holds another."""
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
    try:
        raw: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no JSON.", "Choose another folder.") from error
    found = cast("dict[str, Any]", raw) if isinstance(raw, dict) else {}
    if {**found, "protocol": None} == {**header, "protocol": None}:
        return True
    given = found.get("source")
    if not isinstance(given, dict) or found.get("name") != header["name"]:
        raise UserError(f"{out} holds another data set.", "Choose another folder.")
    source = UNTOLD | cast("dict[str, Any]", given)
    differing = [
        f"{key} {source.get(key)!r} there, {value!r} asked"
        for key, value in (UNTOLD | header["source"]).items()
        if source.get(key) != value
    ]
    raise UserError(
        f"{out} holds another data set ({'; '.join(differing)}).",
        f"Choose another folder, or remove this data set first: rm -r {out}",
    )


@contextmanager
def _workspace(out: Path) -> Generator[Path]:
    """A hidden folder inside `out` to draw in; removed at the end, as are those of dead runs."""
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    host = socket.gethostname()
    for left in out.glob(f".partial-{host}-*"):
        if not _alive(left.name.rpartition("-")[2]):
            shutil.rmtree(left, ignore_errors=True)
    folder = out / f".partial-{host}-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if made and not any(out.iterdir()):
            out.rmdir()


def _alive(pid: str) -> bool:
    """Whether a process of this machine still runs; True where that cannot be told."""
    if os.name != "posix" or not pid.isdecimal():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _publish(folder: Path, out: Path, header: dict[str, Any], taken: protocol.Taken) -> None:
    """Moves the finished parts into place; dataset.json, which makes it a data set, is last."""
    if _is_done(out, header):  # another process was faster with the same
        return
    for name in (*PARTS, "annotations"):
        (folder / name).rename(out / name)
    files.write_json(out / "dataset.json", header | {"protocol": protocol.to_json(taken)}, indent=1)


def _draw_parts(
    folder: Path,
    cfg: ShapesConfig,
    unseen: tuple[str, ...],
    progress: Progress,
    processes: int | None,
) -> protocol.Taken:
    """Draws and writes all parts; returns what is void in train and dev."""
    everything, seen = tuple(range(len(CLASSES))), seen_indices(unseen)
    drawn = seen if cfg.unseen_pixels == "drop" else everything
    counts = {"train": cfg.train, "dev": cfg.dev, "val": cfg.val}
    processes = processes_for(sum(counts.values()) // (4 * _CHUNK) + 1, processes, progress)
    first_id = 1
    listed: list[Row] = []
    with mapper(_draw_chunk, processes) as draw:
        for part, count in counts.items():
            pngs = folder / "annotations" / f"panoptic_{part}"
            pngs.mkdir(parents=True)
            (folder / part).mkdir()
            allowed, told = (everything, everything) if part == "val" else (drawn, seen)
            whole = _Job(folder, part, cfg.seed, cfg.size, allowed, told, 0, count, first_id)
            jobs = [
                replace(whole, first=i, count=min(_CHUNK, count - i))
                for i in range(0, count, _CHUNK)
            ]
            scenes = chain.from_iterable(draw(jobs))
            scenes = list(progress.track(scenes, f"drawing {part}", count))
            annotations = [annotation for annotation, _ in scenes]
            listed += [row for _, row in scenes if part != "val"]
            table = panoptic_json(part, cfg.size, annotations)
            pngs.with_suffix(".json").write_text(json.dumps(table), encoding="utf-8")
            first_id += count
    return protocol.keep_seen(listed, CLASSES.with_unseen(unseen), cfg.unseen_pixels)[1]


def _draw_chunk(job: _Job) -> list[tuple[dict[str, Any], Row]]:
    """Draws and writes a job's scenes; the COCO annotation of each, and what it truly holds."""
    rows: list[tuple[dict[str, Any], Row]] = []
    for index in range(job.first, job.first + job.count):
        scene = draw_scene(scene_seed(job.part, job.seed, index), job.size, job.allowed)
        image_id = job.first_id + index
        name = f"{image_id:012d}.png"
        row = row_of(scene, image_id, name)
        scene = without(scene, set(job.allowed) - set(job.told))
        ids = segment_ids(scene, image_id)
        code = np.append(0, ids).astype(np.uint32)[scene.segment_map]
        planes = np.stack([code & 255, code >> 8 & 255, code >> 16], axis=-1).astype(np.uint8)
        _write_png(job.folder / job.part / name, scene.image)
        _write_png(job.folder / "annotations" / f"panoptic_{job.part}" / name, planes)
        segments = list(segments_info(scene, ids))
        rows.append(({"image_id": image_id, "file_name": name, "segments_info": segments}, row))
    return rows


def _write_png(path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).save(path, "PNG", compress_level=1)


# A scene as COCO panoptic


def row_of(scene: Scene, image_id: int, name: str) -> Row:
    """All segments of a scene, numbered from 1."""
    numbers = range(1, len(scene.labels) + 1)
    counted = np.bincount(scene.segment_map.ravel(), minlength=len(numbers) + 1)[1:]
    labels: list[int] = scene.labels.tolist()
    categories = [CLASSES.ids[label] for label in labels]
    height, width = scene.segment_map.shape
    crowd = [0] * len(numbers)
    areas: list[int] = counted.tolist()
    return Row(image_id, name, name, height, width, [*numbers], categories, crowd, areas)


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
