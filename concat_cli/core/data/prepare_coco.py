"""COCO panoptic files on disk -> a prepared data set: found, checked, the seen-only lists written.

The images and PNGs stay where they are. An image with any segment of an unseen class, crowd or not,
is dropped from training (PADing, get_zsp_json.py); val holds everything.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from concat_cli.core.data.class_split import load_class_split
from concat_cli.core.data.coco_layout import CocoPaths, find_sources
from concat_cli.core.data.dataset import (
    FORMAT,
    Part,
    Record,
    read_panoptic_json,
    read_records,
    read_segment_map,
)
from concat_cli.core.data.image_io import check_image, read_image
from concat_cli.core.errors import UserError
from concat_cli.core.files import atomic_path, write_error
from concat_cli.core.progress import SILENT, Progress
from concat_cli.core.vocabulary import Vocabulary

DEFAULT_SPLIT = "coco_panoptic_119_14"


@dataclass(frozen=True)
class PartCounts:
    """What one part holds."""

    images: int
    segments: int
    crowd: int


@dataclass(frozen=True)
class CocoReport:
    """What `prepare_coco` found and wrote.

    listed: images of the training JSON. dropped: those with an unseen segment.
    dropped_by: unseen class name -> training images that hold it.
    """

    out: Path
    class_split: str
    seen: int
    unseen: tuple[str, ...]
    listed: int
    dropped: int
    dropped_by: dict[str, int]
    parts: dict[str, PartCounts]


def prepare_coco(
    root: Path,
    out: Path | None = None,
    class_split: str = DEFAULT_SPLIT,
    train: CocoPaths | None = None,
    val: CocoPaths | None = None,
    dev_share: float = 0.02,
    dev: int | None = None,
    verify: bool = True,
    decode: bool = False,
    progress: Progress = SILENT,
) -> CocoReport:
    """Writes `dataset.json` and the seen-only train and dev lists to `out` (ROOT/concat).

    UserError, with nothing written, on a wrong layout, missing or damaged files, PNGs and JSON that
    disagree, unknown categories, or when no training image is left.

    Args:
        train, val: paths that take the place of the official ones.
        dev_share: share of the kept training images that becomes dev; `dev` gives their number.
        verify: open every image and compare every PNG with the JSON; else only look for the files.
        decode: decode every image in full, which finds truncated ones; slower.
    """
    sources = find_sources(root, train or CocoPaths(), val or CocoPaths(), progress)
    out = out or root / "concat"
    check_writable(out)
    raw = read_panoptic_json(sources["train"].json)
    unseen = load_class_split(class_split, [str(c["name"]) for c in raw["categories"]])
    vocabulary = Vocabulary.from_categories(raw["categories"], unseen)
    _check_same_categories(sources, raw)
    records = {name: read_records(part.json, vocabulary) for name, part in sources.items()}
    dropped_by = _images_by_unseen_class(records["train"], vocabulary)
    kept = [r for r in records["train"] if all(vocabulary.is_seen[c] for c in r.labels)]
    if not kept:
        raise _no_image_left(sources["train"], len(records["train"]), dropped_by)
    lists = _cut_dev(kept, dev_share, dev, progress) | {"val": records["val"]}
    _check_files(sources, kept, records["val"], verify, decode, progress)
    report = CocoReport(
        out=out,
        class_split=Path(class_split).stem,
        seen=len(vocabulary) - len(unseen),
        unseen=unseen,
        listed=len(records["train"]),
        dropped=len(records["train"]) - len(kept),
        dropped_by=dropped_by,
        parts={name: _count(part) for name, part in lists.items()},
    )
    _write(root, report, sources, raw, lists)
    return report


def check_writable(out: Path) -> None:
    """UserError if `out` cannot be written; leaves nothing behind."""
    parent = out.absolute()
    while not parent.exists():
        parent = parent.parent
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        what = write_error(out, error).what
        raise UserError(what, "Name another folder with --out DIR.") from error


def _check_same_categories(sources: dict[str, Part], raw: dict[str, Any]) -> None:
    """UserError if val lists other categories than train."""
    if sources["val"] == sources["train"]:
        return
    val = read_panoptic_json(sources["val"].json)["categories"]
    ours, theirs = ({(c["id"], c["name"]) for c in rows} for rows in (raw["categories"], val))
    if ours != theirs:
        raise UserError(
            f"{sources['train'].json} and {sources['val'].json} list different categories, "
            f"for example {sorted(ours ^ theirs)[0]}.",
            "Both parts must come from one data set.",
        )


def _images_by_unseen_class(records: list[Record], vocabulary: Vocabulary) -> dict[str, int]:
    counts = {vocabulary.names[c]: 0 for c in vocabulary.unseen_indices}
    for record in records:
        for label in {int(c) for c in record.labels}:
            if not vocabulary.is_seen[label]:
                counts[vocabulary.names[label]] += 1
    return counts


def _no_image_left(part: Part, listed: int, dropped_by: dict[str, int]) -> UserError:
    if listed == 0:
        return UserError(f"{part.json} lists no annotated image.", "Check the file.")
    names = ", ".join(f"{name} ({n})" for name, n in dropped_by.items() if n)
    return UserError(
        f"No training image is left: each of the {listed} images of {part.json} has segments of "
        f"unseen classes: {names}.",
        "Give more images, or use `--class-split all_seen` to train on every class.",
    )


def _cut_dev(
    kept: list[Record], share: float, count: int | None, progress: Progress
) -> dict[str, list[Record]]:
    """train and dev, split by a hash of the image id: the same on every machine."""
    if count is None and len(kept) < 10:
        progress.say(f"Only {len(kept)} training images: dev is a copy of train.")
        return {"train": kept, "dev": kept}
    number = max(1, round(len(kept) * share)) if count is None else count
    if not 1 <= number < len(kept):
        raise UserError(
            f"dev cannot take {number} of {len(kept)} training images.",
            f"Choose between 1 and {len(kept) - 1}.",
        )
    ranked = sorted(kept, key=lambda r: hashlib.sha256(str(r.image_id).encode()).digest())
    chosen = {record.image_id for record in ranked[:number]}
    return {
        "train": [record for record in kept if record.image_id not in chosen],
        "dev": [record for record in kept if record.image_id in chosen],
    }


def _check_files(
    sources: dict[str, Part],
    kept: list[Record],
    val: list[Record],
    verify: bool,
    decode: bool,
    progress: Progress,
) -> None:
    """Every file that the prepared data set will need; each only once."""
    work = [(sources["val"], record) for record in val]
    if sources["train"] != sources["val"]:
        work = [(sources["train"], record) for record in kept] + work
    missing = [
        path
        for part, record in work
        for path in (part.images / record.file_name, part.pngs / record.png_name)
        if not path.is_file()
    ]
    if missing:
        more = f" and {len(missing) - 1} more files" if len(missing) > 1 else ""
        raise UserError(f"Missing: {missing[0]}{more}.", "Finish the download or unpacking.")
    if not verify:
        return
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding leaves Python's lock free
        checks = pool.map(lambda item: check_record(*item, decode=decode), work)
        for _ in progress.track(checks, "checking images and PNGs", total=len(work)):
            pass


def check_record(part: Part, record: Record, decode: bool = False) -> None:
    """UserError if the image cannot be opened (or decoded) or image, PNG and JSON disagree."""
    path = part.images / record.file_name
    size = read_image(path).shape[:2] if decode else check_image(path)
    if size != (record.height, record.width):
        raise UserError(
            f"{path} is {size[1]} x {size[0]} pixels, but {part.json} says "
            f"{record.width} x {record.height}.",
            "Image and JSON must belong together: download them again.",
        )
    read_segment_map(part, record)


def _count(records: list[Record]) -> PartCounts:
    return PartCounts(
        images=len(records),
        segments=sum(len(record.ids) for record in records),
        crowd=sum(int(record.crowd.sum()) for record in records),
    )


def _write(
    root: Path,
    report: CocoReport,
    sources: dict[str, Part],
    raw: dict[str, Any],
    lists: dict[str, list[Record]],
) -> None:
    """All files, or none: written aside, then renamed, `dataset.json` last."""
    out = report.out.absolute()

    def place(path: Path) -> str:  # relative below the root, so that the folder can be moved
        inside = out.is_relative_to(root.absolute()) and path.is_relative_to(root.resolve())
        return os.path.relpath(path, out.resolve()) if inside else str(path)

    train, val = sources["train"], sources["val"]
    parts = {"val": {"images": place(val.images), "json": place(val.json), "pngs": place(val.pngs)}}
    contents: dict[str, Any] = {}
    for name in ("train", "dev"):
        file = f"annotations/panoptic_{name}_seen.json"
        contents[file] = _only(raw, lists[name])
        parts[name] = {"images": place(train.images), "json": file, "pngs": place(train.pngs)}
    info = {
        "format": FORMAT,
        "name": "coco",
        "class_split": report.class_split,
        "unseen": list(report.unseen),
        "parts": {name: parts[name] for name in ("train", "dev", "val")},
        "source": {
            "root": str(root),
            "listed": report.listed,
            "dropped": report.dropped,
            "images": {name: counts.images for name, counts in report.parts.items()},
        },
    }
    with ExitStack() as stack:  # leaves in reverse order: dataset.json is renamed last
        for name, value in ({"dataset.json": info} | contents).items():
            temp = stack.enter_context(atomic_path(out / name))
            temp.write_text(json.dumps(value, indent=2 if value is info else None), "utf-8")
        (out / "dataset.json").unlink(missing_ok=True)  # an old one must not meet new lists


def _only(raw: dict[str, Any], records: list[Record]) -> dict[str, Any]:
    """The panoptic JSON with only these images; the category list is kept whole."""
    chosen = {record.image_id for record in records}
    return raw | {
        "images": [image for image in raw["images"] if image["id"] in chosen],
        "annotations": [a for a in raw["annotations"] if a["image_id"] in chosen],
    }
