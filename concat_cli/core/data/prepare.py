"""A data set as it lies on disk -> a prepared one: checked, its parts cut, the protocol applied.

Images and labels stay where they are. What is written is an index a part, and `dataset.json` last.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from concat_cli.core import files
from concat_cli.core.data.census import Census, census
from concat_cli.core.data.check import checker_of
from concat_cli.core.data.class_split import load_class_split
from concat_cli.core.data.index import Row, write_rows
from concat_cli.core.data.protocol import (
    Taken,
    UnseenPixels,
    cut_dev,
    keep_seen,
    refuse_empty,
    to_json,
)
from concat_cli.core.data.recipes import RECIPES
from concat_cli.core.data.source import Item, LabelFormat, PartName, Source, SourcePart
from concat_cli.core.data.store import split_location
from concat_cli.core.data.verify import Bad, Verified, verify
from concat_cli.core.errors import UserError
from concat_cli.core.progress import SILENT, Progress
from concat_cli.core.vocabulary import Vocabulary

FORMAT = 2
BAD = "bad.jsonl"
DEV_SHARE = 0.02


@dataclass(frozen=True)
class Report:
    """What was found and written.

    unchanged: everything was there already, and nothing was written.
    parts: train, dev, val -> what they hold. bad: source part -> images that were left out.
    """

    out: Path
    name: str
    layout: str
    class_split: str
    tasks: tuple[str, ...]
    vocabulary: Vocabulary
    taken: Taken
    parts: dict[str, Census]
    bad: dict[str, list[Bad]]
    notes: tuple[str, ...]
    unchanged: bool


@dataclass(frozen=True)
class Options:
    """How to prepare.

    class_split: a published split or a YAML file; "" for the one that the recipe suggests.
    dev: images cut from train for selection; None for 2%.
    decode: decode every image in full; slower.
    one_part: where train or val is missing, the other serves as both.
    processes: that check; by default one a CPU.
    """

    class_split: str = ""
    unseen_pixels: UnseenPixels = "drop"
    dev: int | None = None
    skip_bad: bool = False
    decode: bool = False
    one_part: bool = False
    processes: int | None = None


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
            f"Give the folder that it lies in ({root.parent}); or, where all is in this one archive, "
            "name a folder for what is written with --out DIR.",
        )
    out = out or root / "concat"
    check_writable(out)
    source = RECIPES[name](root, **given)
    progress.say(f"{source.name}: found in the layout {source.layout!r} below {root}")
    return prepare(source, root, out, options or Options(), progress)


def prepare(
    source: Source, root: Path, out: Path, options: Options, progress: Progress = SILENT
) -> Report:
    """Checks and writes what a recipe found; see `prepare_data`."""
    check_writable(out)
    for note in source.notes:
        progress.say(note)
    _refuse_another(out, source.name)
    parts = _both(source, root, options.one_part, progress)
    split = options.class_split or source.default_split
    unseen = load_class_split(split, source.vocabulary.names)
    vocabulary = source.vocabulary.with_unseen(unseen)
    verified = _verify(parts, vocabulary, out, options, progress)
    _refuse_nothing(verified, parts)
    kept, taken = keep_seen(verified["train"].rows, vocabulary, options.unseen_pixels)
    listed_in = parts["train"].listed_in or parts["train"].images
    refuse_empty(kept, taken, listed_in)
    train, dev = cut_dev(kept, DEV_SHARE, options.dev, progress)
    rows = {"train": train, "dev": dev, "val": verified["val"].rows}
    report = Report(
        out=out,
        name=source.name,
        layout=source.layout,
        class_split=Path(split).stem,
        tasks=source.tasks,
        vocabulary=vocabulary,
        taken=taken,
        parts={part: census(listed, vocabulary) for part, listed in rows.items()},
        bad={part: found.bad for part, found in verified.items()},
        notes=source.notes,
        unchanged=False,
    )
    header = _header(report, root, parts)
    return replace(report, unchanged=not _write(out, header, rows, report.bad))


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
            f"{out / 'dataset.json'} is that of the prepared data set {there!r}, which would be lost.",
            f"Prepare {name} elsewhere with --out DIR, or remove {out} first.",
        )


def _both(
    source: Source, root: Path, one_part: bool, progress: Progress
) -> dict[PartName, SourcePart]:
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
            f"Only one part is there ({part.listed_in or part.images}); it serves as train and as "
            "val, so scores on val are not those of unknown images."
        )
        return {"train": part, "val": part}
    return {"train": found["train"], "val": found["val"]}


def _verify(
    parts: dict[PartName, SourcePart],
    vocabulary: Vocabulary,
    out: Path,
    options: Options,
    progress: Progress,
) -> dict[PartName, Verified]:
    """Both parts checked; a part that serves as both only once."""
    verified: dict[PartName, Verified] = {}
    for name, part in parts.items():
        if name == "val" and part is parts["train"]:
            verified[name] = Verified(verified["train"].rows, [], 0)
            continue
        items = list(part.items)
        _check_ids(items, part)
        verified[name] = verify(
            name,
            checker_of(part, vocabulary, options.decode),
            items,
            out / "checked" / f"{name}.jsonl",
            skip_bad=options.skip_bad,
            progress=progress,
            processes=options.processes,
        )
    return verified


def _refuse_nothing(
    verified: dict[PartName, Verified], parts: dict[PartName, SourcePart]
) -> None:
    """UserError where no image of a part is left."""
    for name, found in verified.items():
        if not found.rows:
            part = parts[name]
            raise UserError(
                f"No image of {name} is left ({part.listed_in or part.images}): "
                f"{len(found.bad)} are faulty or missing.",
                f"Look at {part.images}.",
            )


def _check_ids(items: Sequence[Item], part: SourcePart) -> None:
    if len({item.image_id for item in items}) < len(items):
        where = part.listed_in or part.images
        raise UserError(f"{where}: two images have the same id.", "Each image needs an id.")


def _header(report: Report, root: Path, parts: dict[PartName, SourcePart]) -> dict[str, Any]:
    """The content of dataset.json."""
    place = _Place(root, report.out)
    sources = {"train": parts["train"], "dev": parts["train"], "val": parts["val"]}
    return {
        "format": FORMAT,
        "name": report.name,
        "layout": report.layout,
        "tasks": list(report.tasks),
        "class_split": report.class_split,
        "unseen": [entry.name for entry in report.vocabulary.entries if not entry.seen],
        "protocol": to_json(report.taken)
        | {"images_bad": sum(len(bad) for bad in report.bad.values())},
        "parts": {name: place.part(name, part) for name, part in sources.items()},
        "counts": {name: asdict(counts.totals) for name, counts in report.parts.items()},
        "source": {"root": str(root)},
        "classes": report.vocabulary.to_json(),
    }


@dataclass(frozen=True)
class _Place:
    """Says where things are: relative below the root, so that the folder can be moved."""

    root: Path
    out: Path

    def part(self, name: str, part: SourcePart) -> dict[str, Any]:
        """A part as `dataset.json` has it."""
        places = {"images": part.images, "labels": part.labels, "second_labels": part.second_labels}
        return {
            **{key: self.of(location) for key, location in places.items() if location},
            "index": f"index/{name}.jsonl",
            "format": _format_json(part.format),
        }

    def of(self, location: str) -> str:
        """A location as seen from `out`, if both are below the root."""
        archive, _ = split_location(location)
        path, root, out = Path(location), self.root.resolve(), self.out.resolve()
        if archive is not None and not path.is_dir():
            path = Path(f"{archive.resolve()}{location[len(str(archive)) :]}")
        else:
            path = path.resolve()
        inside = out.is_relative_to(root) and path.is_relative_to(root)
        return Path(os.path.relpath(path, out)).as_posix() if inside else str(path)


def _format_json(fmt: LabelFormat) -> dict[str, Any]:
    return {
        "kind": fmt.kind,
        "pixels": fmt.pixels,
        "table": {str(value): category for value, category in fmt.table.items()},
        "void": list(fmt.void),
        "things": {str(value): category for value, category in fmt.things.items()},
    }


def _write(
    out: Path, header: dict[str, Any], rows: dict[str, list[Row]], bad: dict[Any, list[Bad]]
) -> bool:
    """All files, `dataset.json` last; False where they are there already and nothing is written."""
    new = out / ".new"
    names = [f"index/{name}.jsonl" for name in rows]
    lines = [{"part": part} | vars(entry) for part, entries in bad.items() for entry in entries]
    try:
        shutil.rmtree(new, ignore_errors=True)
        for name, listed in rows.items():
            write_rows(new / "index" / f"{name}.jsonl", listed)
        if lines:
            names.append(BAD)
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            files.write_text(new / BAD, text)
        names.append("dataset.json")
        files.write_json(new / names[-1], header, indent=1)
        if all(_same(new / name, out / name) for name in names):
            return False
        for name in ("dataset.json", BAD):  # an old header must not meet new lists
            (out / name).unlink(missing_ok=True)
        (out / "index").mkdir(exist_ok=True)
        for name in names:
            os.replace(new / name, out / name)
    except OSError as error:
        raise files.write_error(out, error) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return True


def _same(one: Path, two: Path) -> bool:
    if not two.is_file() or one.stat().st_size != two.stat().st_size:
        return False
    with one.open("rb") as a, two.open("rb") as b:
        while block := a.read(1 << 20):
            if block != b.read(1 << 20):
                return False
    return True
