"""A data set as it lies on disk -> a prepared one: checked, its parts cut, the protocol applied.

Images stay where they are, and so do labels that are COCO panoptic PNGs; labels of other kinds are
written once as such. Beside them: an index a part, and `dataset.json` last.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from concat_cli.core import files
from concat_cli.core.data.class_split import load_class_split
from concat_cli.core.data.image_io import told_dim
from concat_cli.core.data.index import STORED, WHITE, Row, write_rows
from concat_cli.core.data.store import ZipMember, read_file, split_location
from concat_cli.core.errors import UserError
from concat_cli.core.prepare.class_values import VOID
from concat_cli.core.prepare.protocol import (
    Annotations,
    Census,
    Taken,
    annotation_counts,
    census,
    cut_dev,
    keep_seen,
    refuse_empty,
    to_json,
)
from concat_cli.core.prepare.recipes import RECIPES
from concat_cli.core.prepare.recipes.labelme import picture_in
from concat_cli.core.prepare.source import (
    Exif,
    LabelFormat,
    PartName,
    Source,
    SourcePart,
    UnseenPixels,
)
from concat_cli.core.prepare.verify import Bad, Checker, verify
from concat_cli.core.progress import SILENT, Progress
from concat_cli.core.vocabulary import Vocabulary

FORMAT = 3
BAD = "bad.jsonl"
DEV_SHARE = 0.02
Parts = dict[PartName, SourcePart]


@dataclass(frozen=True)
class Report:
    """What was found and written.

    unchanged: everything was there already, and nothing was written.
    parts: train, dev, val -> what they hold. bad: source part -> images that were left out.
    annotations: source part -> what became of them, where they are masks that may overlap.
    """

    out: Path
    source: Source
    class_split: str
    vocabulary: Vocabulary
    taken: Taken
    parts: dict[str, Census]
    bad: dict[PartName, list[Bad]]
    annotations: dict[PartName, Annotations]
    unchanged: bool = False


@dataclass(frozen=True)
class Options:
    """How to prepare.

    class_split: a published split or a YAML file; "" for the one that the recipe suggests.
    dev: images cut from train for selection; None for 2%.
    decode: decode every image in full; slower.
    one_part: where train or val is missing, the other serves as both.
    processes: that check; by default one a CPU.
    exif: which pixels the labels of photos are of that EXIF turns: "stored", or of the upright
        photo; there "turn" also takes sizes of the stored pixels.
    white: the value of white in grey images of 16 bits.
    """

    class_split: str = ""
    unseen_pixels: UnseenPixels = "drop"
    dev: int | None = None
    skip_bad: bool = False
    decode: bool = False
    one_part: bool = False
    processes: int | None = None
    exif: Exif = ""
    white: int = WHITE


def prepare_data(
    name: str,
    root: Path,
    out: Path | None = None,
    options: Options | None = None,
    progress: Progress = SILENT,
    **given: Any,
) -> Report:
    """Finds the data set `name` below `root` and prepares it in `out` (by default ROOT/concat).

    given: what its recipe takes. UserError, with an existing data set left as it is, where files
    are missing or faulty, nothing is left to train on, or `out` cannot be written.
    """
    if not root.exists():
        raise UserError(f"There is no folder {root}.", "Give the folder that holds the data.")
    if out is None and not root.is_dir():
        raise UserError(
            f"{root} is a file.",
            f"Give the folder that it lies in ({root.parent}); or, where all is in this archive, "
            "name a folder for what is written with --out DIR.",
        )
    out = out or root / "concat"
    check_writable(out)
    source = RECIPES[name].find(root, **given)
    progress.say(f"{source.name}: found in the layout {source.layout!r} below {root}")
    return prepare(source, root, out, options or Options(), progress)


def prepare(
    source: Source, root: Path, out: Path, options: Options, progress: Progress = SILENT
) -> Report:
    """Checks and writes what a recipe found; see `prepare_data`."""
    check_writable(out)
    files.remove_leftovers(out)
    for note in source.notes:
        progress.say(note)
    _refuse_another(out, source.name)
    split = options.class_split or source.default_split
    split = files.below_or_here(root, split) or split
    unseen = load_class_split(split, source.vocabulary.names)
    vocabulary = source.vocabulary.with_unseen(unseen)
    parts = _unpacked(_both(source, root, options.one_part, progress), out, progress)
    checked, bad = _verify(source, parts, vocabulary, out, options, progress)
    kept, taken = keep_seen(checked["train"], vocabulary, options.unseen_pixels)
    refuse_empty(kept, taken, parts["train"].where)
    train, dev = cut_dev(kept, DEV_SHARE, options.dev, progress)
    rows = {"train": train, "dev": dev, "val": checked["val"]}
    report = Report(
        out,
        source,
        Path(split).stem,
        vocabulary,
        taken,
        parts={part: census(listed, vocabulary) for part, listed in rows.items()},
        bad=bad,
        annotations={
            name: annotation_counts(checked[name])
            for name, part in parts.items()
            if part.format.kind.startswith("instances")
        },
    )
    written = _write(out, _header(report, root, parts), rows, report.bad)
    return replace(report, unchanged=not written)


def check_writable(out: Path) -> None:
    """UserError if `out` cannot be written; leaves nothing behind."""
    parent = out.absolute()
    while not parent.exists():
        parent = parent.parent
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        what = files.write_error(out, error).what
        raise UserError(what, "Name another folder with --out DIR.") from error


def _refuse_another(out: Path, name: str) -> None:
    """UserError where `out` holds what was prepared from another data set."""
    try:
        there = json.loads((out / "dataset.json").read_text(encoding="utf-8"))["name"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # nothing, or nothing that could still be used
    if there != name:
        raise UserError(
            f"{out / 'dataset.json'} is that of the prepared data set {there!r}: it would be lost.",
            f"Prepare {name} elsewhere with --out DIR, or remove {out} first.",
        )


def _both(source: Source, root: Path, one_part: bool, progress: Progress) -> Parts:
    """train and val; one alone serves as both where that is asked for or usual."""
    found = dict(source.parts)
    if len(found) == 1:
        name, part = next(iter(found.items()))
        if not (source.single or one_part):
            lacking = "val" if name == "train" else "train"
            near = [path.relative_to(root) for path in sorted(root.glob(f"*{lacking}*"))]
            more = f", also not in {', '.join(map(str, near[:3]))}" if near else ""
            raise UserError(
                f"{root} holds {name} of {source.name} ({part.images}), but the images or labels "
                f"of {lacking} were not found{more}.",
                f"Get {lacking} as well, or say --one-part: {name} then serves as both, and scores "
                "are not those of unknown images.",
            )
        progress.say(
            f"Only one part is there ({part.where}); it serves as train and as val, so scores on "
            "val are not those of unknown images."
        )
        return {"train": part, "val": part}
    return {"train": found["train"], "val": found["val"]}


def _unpacked(parts: Parts, out: Path, progress: Progress) -> Parts:
    """The parts with the zips that lie in another zip unpacked from that, each once; and with the
    pictures that lie in JSONs."""

    def plain(location: str) -> str:
        archive, inside = split_location(location)
        if not isinstance(archive, ZipMember):
            return location
        path = _unpack(archive, out / "zips", progress)
        return f"{path}!{inside}" if inside else str(path)

    done: dict[int, SourcePart] = {}
    for part in parts.values():
        images, labels, second = map(plain, (part.images, part.labels, part.second_labels))
        images = _pictures(part, out / "pictures", progress) if part.packed else images
        done[id(part)] = replace(part, images=images, labels=labels, second_labels=second)
    return {name: done[id(part)] for name, part in parts.items()}


def _pictures(part: SourcePart, folder: Path, progress: Progress) -> str:
    """The folder with the pictures of a part that has `packed`; what is there already is left."""
    names = [item.image for item in part.items]
    for name in progress.track(names, "writing pictures", len(names)):
        place = part.packed[name]
        data = picture_in(place) if place.endswith(".json") else read_file(place)
        path = folder / name
        if not path.is_file() or path.read_bytes() != data:
            files.write_bytes(path, data, sync=False)
    return str(folder)


def _unpack(archive: ZipMember, folder: Path, progress: Progress) -> Path:
    """A zip taken out of the one that it lies in; what is there already is left as it is."""
    entry = archive.entry()
    path = folder / f"{Path(archive.member).stem}-{entry.CRC:08x}.zip"
    if path.is_file():
        return path
    progress.say(
        f"unpacking {archive.member} ({entry.file_size / 1e6:,.1f} MB) from {archive.archive}"
    )
    with files.atomic_path(path) as temp, archive.opened() as packed, temp.open("wb") as file:
        shutil.copyfileobj(packed, file, 1 << 20)
    return path


def _verify(
    source: Source,
    parts: Parts,
    vocabulary: Vocabulary,
    out: Path,
    options: Options,
    progress: Progress,
) -> tuple[dict[PartName, list[Row]], dict[PartName, list[Bad]]]:
    """The rows of both parts, and their bad images; a part that serves as both is checked once.
    UserError where no image of a part is left."""
    rows: dict[PartName, list[Row]] = {}
    bad: dict[PartName, list[Bad]] = {"train": [], "val": []}
    for name, part in parts.items():
        if name == "val" and part is parts["train"]:
            rows[name] = rows["train"]
            continue
        items = list(part.items)
        if len({item.image_id for item in items}) < len(items):
            raise UserError(
                f"{part.where}: two images have the same id.", "Each image needs an id."
            )
        checker = checker_of(part, vocabulary, out / "labels" / name, options)
        ledger = out / "checked" / f"{name}.jsonl"
        rows[name], bad[name] = verify(
            name, checker, items, ledger, progress, options.skip_bad, options.processes
        )
        if not rows[name]:
            raise UserError(
                f"No image of {name} is left ({part.where}): {len(bad[name])} are faulty or gone.",
                f"Look at {part.images}.",
            )
        _tell_reading(name, rows[name], options, progress)
        if source.single:
            _tell_void(name, rows[name], part.format, progress)
    return rows, bad


def _tell_reading(part: str, rows: list[Row], options: Options, progress: Progress) -> None:
    """How images are read that EXIF turns, or that use a small part of 16 bits."""
    if turned := [row for row in rows if row.exif]:
        stored = turned[0].exif == STORED
        pixels = "the pixels as they are stored" if stored else "the upright image"
        other = "turn" if stored else "stored"
        asked = "" if options.exif else f"; if they are not, say --exif {other}"
        progress.say(
            f"{part}: EXIF turns {len(turned)} of {len(rows)} images; their labels are taken for "
            f"those of {pixels}{asked}"
        )
    if told := told_dim([row.brightest for row in rows if row.brightest], options.white):
        progress.say(f"{part}: {told}; --white gives its value")


def _tell_void(part: str, rows: list[Row], form: LabelFormat, progress: Progress) -> None:
    """In how many label maps the values are that are void by custom; they may be a class."""
    if form.kind != "semantic" or not set(form.void) <= set(VOID) or not form.void:
        return
    count = sum(sum(row.areas) < row.height * row.width for row in rows)
    if count:
        values = " or ".join(map(str, form.void))
        progress.say(
            f"{part}: {values} counted as void in {count} of {len(rows)} maps; to take it as a "
            f"class, give every line of --classes its value, like `name = {form.void[0]}`"
        )


def checker_of(
    part: SourcePart, vocabulary: Vocabulary, maps: Path, options: Options | None = None
) -> Checker:
    """What checks the images of a part."""
    places = part.images, part.labels, part.second_labels
    how = options or Options()
    listed_in = part.listed_in or part.labels
    return Checker(
        places, part.format, listed_in, vocabulary, maps, how.decode, how.exif, how.white
    )


def _header(report: Report, root: Path, parts: Parts) -> dict[str, Any]:
    """The content of dataset.json."""
    source = report.source
    bad = sum(len(bad) for bad in report.bad.values())
    told = {name: asdict(counts) for name, counts in report.annotations.items()}
    return {
        "format": FORMAT,
        "name": source.name,
        "layout": source.layout,
        "tasks": list(source.tasks),
        "class_split": report.class_split,
        "unseen": [entry.name for entry in report.vocabulary.entries if not entry.seen],
        "protocol": to_json(report.taken) | {"images_bad": bad},
        "parts": {name: _places(name, root, report.out, parts) for name in report.parts},
        "counts": {name: asdict(counts.totals) for name, counts in report.parts.items()},
        **({"annotations": told} if told else {}),
        "source": {"root": str(root)},
        "classes": report.vocabulary.to_json(),
    }


def _places(name: str, root: Path, out: Path, parts: Parts) -> dict[str, str]:
    """Where a part of the prepared data set has its things."""
    of: PartName = "val" if name == "val" and parts["val"] is not parts["train"] else "train"
    part = parts[of]
    linked = part.format.kind == "panoptic"
    labels = _relative(part.labels, root, out) if linked else f"labels/{of}"
    images = _relative(part.images, root, out)
    return {"images": images, "labels": labels, "index": f"index/{name}.jsonl"}


def _relative(location: str, root: Path, out: Path) -> str:
    """A location as seen from `out`, if both are below the root, so that the root can be moved."""
    archive, inside = split_location(location)
    path = Path(location if archive is None else str(archive)).resolve()
    root, out = root.resolve(), out.resolve()
    near = out.is_relative_to(root) and path.is_relative_to(root)
    if near or path.is_relative_to(out):
        place = Path(os.path.relpath(path, out)).as_posix()
    else:
        place = str(path)
    return f"{place}!{inside}" if inside else place


def _write(
    out: Path,
    header: dict[str, Any],
    rows: Mapping[str, list[Row]],
    bad: Mapping[PartName, list[Bad]],
) -> bool:
    """All files, `dataset.json` last; False where they are there already and nothing is written."""
    names = [f"index/{name}.jsonl" for name in rows]
    lines = [{"part": part} | vars(entry) for part, entries in bad.items() for entry in entries]
    try:
        with files.workspace(out, "new") as new:
            for name, listed in rows.items():
                write_rows(new / "index" / f"{name}.jsonl", listed)
            if lines:
                names.append(BAD)
                text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
                files.write_text(new / BAD, text)
            names.append("dataset.json")
            files.write_json(new / names[-1], header, indent=1)
            if all(
                (out / name).is_file() and filecmp.cmp(new / name, out / name, False)
                for name in names
            ):
                return False
            for name in ("dataset.json", BAD):  # an old header must not meet new lists
                (out / name).unlink(missing_ok=True)
            (out / "index").mkdir(exist_ok=True)
            for name in names:
                os.replace(new / name, out / name)
    except OSError as error:
        raise files.write_error(out, error) from error
    return True
