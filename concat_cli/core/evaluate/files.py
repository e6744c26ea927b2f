"""Scores COCO panoptic files that anybody may have written, as the official panopticapi does: what
is wrong with them is said, not guessed. The official one can be asked for a second opinion."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from concat_cli.core.data.class_split import load_class_split
from concat_cli.core.data.image_io import read_id_png
from concat_cli.core.errors import UserError
from concat_cli.core.evaluate.quality import class_map
from concat_cli.core.evaluate.report import Report, make_report
from concat_cli.core.evaluate.scores import PLAIN, Scoring, Tally
from concat_cli.core.progress import SILENT, Progress
from concat_cli.core.vocabulary import Vocabulary

INSTALL = "pip install git+https://github.com/cocodataset/panopticapi.git"
TOLERANCE = 1e-9  # between panopticapi and us
FORMAT_HINT = (
    "A COCO panoptic JSON holds `annotations`: [{image_id, file_name, segments_info: "
    "[{id, category_id}]}]; that of the truth also `images` and `categories`."
)
TOGETHER = "JSON, PNG and image must belong together: download or write them again."
ImageId = int | str


class _Row(BaseModel):
    model_config = ConfigDict(coerce_numbers_to_str=True)


class _Segment(_Row):
    id: int = Field(ge=1, lt=1 << 24)  # 0 is void in a panoptic PNG
    category_id: int
    iscrowd: bool = False


class _Annotation(_Row):
    image_id: ImageId
    file_name: str | None = None
    segments_info: list[_Segment]


class _Category(_Row):
    id: int
    name: str
    isthing: bool = True


class _Image(_Row):
    id: ImageId
    height: int
    width: int


class _Predictions(_Row):
    annotations: list[_Annotation]
    categories: list[_Category] | None = None

    @property
    def names(self) -> dict[int, str]:
        """Names by category id, none where the JSON says nothing of them."""
        return {one.id: one.name for one in self.categories or ()}


class _Truth(_Predictions):
    images: list[_Image]


J = TypeVar("J", bound=_Predictions)


@dataclass(frozen=True)
class PanopticFiles:
    """A panoptic JSON and the folder of its PNGs; None: the folder that is named like it."""

    json: Path
    folder: Path | None = None

    @property
    def pngs(self) -> Path:
        """The folder of the PNGs."""
        return self.folder or self.json.with_suffix("")


@dataclass(frozen=True)
class Entry:
    """One annotation of a panoptic JSON: ids, class indices and crowd flags in its own order."""

    png_name: str
    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    crowd: NDArray[np.bool_]


def evaluate_files(
    predictions: PanopticFiles | Path | str,
    truth: PanopticFiles | Path | str,
    scoring: Scoring = PLAIN,
    *,
    unseen: Collection[str | int] | None = None,
    class_split: str | None = None,
    progress: Progress = SILENT,
) -> Report:
    """Scores a panoptic prediction JSON and its PNGs against the truth's.

    Args:
        scoring: its `split`, `bootstraps` and `official`; the others need weights.
        unseen: names or category ids of the classes that count as unseen; None: those of
            `class_split`, a split's name or file; None: as the truth's `dataset.json` says, a
            folder above it; without one, classes are not divided.
    """
    _check_asked(scoring)
    start = time.perf_counter()
    found, real = _given(predictions), _given(truth)
    said, told = _read(found, _Predictions), _read(real, _Truth)
    vocabulary = Vocabulary.from_categories(one.model_dump() for one in told.categories or ())
    if len(told.names) < len(vocabulary) or len(set(vocabulary.names)) < len(vocabulary):
        raise UserError(f"{real.json}: two categories have one id or one name.", FORMAT_HINT)
    if unseen is None:
        class_split, unseen = _unseen_of(real.json, class_split, vocabulary, progress)
    if unseen is None and scoring.split != "all":
        raise UserError(
            f"Nobody says which classes are {scoring.split}.",
            "Give --class-split, or leave --split out.",
        )
    vocabulary = vocabulary.with_unseen(_names(vocabulary, unseen or ()))
    truths = _entries(real.json, told, real.json, vocabulary)
    _check_names(found.json, said, real.json, told)
    preds = _entries(found.json, said, real.json, vocabulary)
    _check_fit(found.json, preds, real.json, truths, named=bool(said.names))
    extra = [image_id for image_id in preds if image_id not in truths]
    if extra:
        progress.say(
            f"{len(extra)} of {len(preds)} predictions have no truth and were not scored, such as "
            f"image {extra[0]}"
        )
    sizes = {image.id: (image.height, image.width) for image in told.images}
    tasks = ("panoptic", "semantic")
    tally = Tally(len(vocabulary), len(truths), tasks, keep=scoring.bootstraps > 0)
    for number, (image_id, one) in enumerate(progress.track(truths.items(), "score", len(truths))):
        if image_id not in sizes:
            what = f"{real.json} does not list image {image_id} with its height and width."
            raise UserError(what, "Download or write the JSON again.")
        truth_map = _read_map(real, one, image_id, sizes[image_id])
        labels, size = preds[image_id].labels, sizes[image_id]
        pred_map = _read_map(found, preds[image_id], image_id, size)
        shares = tally.panoptic.add(pred_map, labels, truth_map, one.labels, one.crowd)
        pixels = tally.semantic.add(class_map(pred_map, labels), class_map(truth_map, one.labels))
        if tally.each.panoptic is not None and tally.each.semantic is not None:
            tally.each.panoptic.add(number, shares)
            tally.each.semantic.add(number, pixels)
    report = make_report(
        tally,
        vocabulary,
        scoring,
        tasks,
        protocol={
            "setting": "generalised",
            "mode": None,
            "semantic_from": "panoptic",
            "predictions": str(found.json),
            "truth": str(real.json),
            "not_scored": len(extra),
            "class_split": class_split,
        },
        seconds={"total": time.perf_counter() - start},
        divided=unseen is not None,
    )
    if scoring.official:
        ask_official(report, found, real, progress)
    return report


def _check_asked(scoring: Scoring) -> None:
    weights_alone = scoring.tasks, scoring.calibrate, scoring.diagnostics
    if any(weights_alone) or scoring.candidates != "all":
        raise UserError(
            "--tasks, --candidates, --calibrate and --diagnostics need weights; files hold "
            "panoptic segments, from which PQ and mIoU are counted.",
            "Leave them out, or score --weights.",
        )
    if scoring.official:
        check_official(None)


def _given(files: PanopticFiles | Path | str) -> PanopticFiles:
    """The JSON and its PNG folder; UserError where one is missing."""
    found = files if isinstance(files, PanopticFiles) else PanopticFiles(Path(files))
    if not found.json.is_file():
        raise UserError(f"There is no file {found.json}.", "Check the path.")
    if not found.pngs.is_dir():
        raise UserError(
            f"There is no folder {found.pngs} with the PNGs of {found.json}.",
            "Name it with --predictions-dir or --truth-dir.",
        )
    return found


def _read(files: PanopticFiles, kind: type[J]) -> J:
    """A panoptic JSON; UserError where it is none."""
    try:
        return kind.model_validate_json(files.json.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        what = f"{files.json} is no COCO panoptic JSON: {place}: {first['msg']}"
        raise UserError(what, FORMAT_HINT) from error
    except OSError as error:
        what = f"Cannot read {files.json}: {error.strerror}."
        raise UserError(what, "Check its rights.") from error


def _unseen_of(
    truth: Path, class_split: str | None, vocabulary: Vocabulary, progress: Progress
) -> tuple[str | None, Collection[str] | None]:
    """The split's name and unseen classes: as asked, else as the truth's data set says; else None.

    A `dataset.json` counts if it stands a folder above the truth and fits the truth's classes.
    """
    if class_split is not None:
        return class_split, load_class_split(class_split, list(vocabulary.names))
    path = truth.absolute().parent.parent / "dataset.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        unseen, name = tuple(map(str, raw["unseen"])), str(raw["class_split"])
    except (OSError, ValueError, KeyError, TypeError):
        unseen, name = None, None
    if unseen is None or not set(unseen) <= set(vocabulary.names):
        progress.say("no --class-split: classes are not divided")
        return None, None
    place = os.path.relpath(path)
    progress.say(f"no --class-split: classes are divided as in {place} ({name})")
    return name, unseen


def _names(vocabulary: Vocabulary, unseen: Collection[str | int]) -> set[str]:
    """The names of classes told by name or id; UserError for classes that the truth lacks."""
    by_id = {entry.id: entry.name for entry in vocabulary.entries}
    named = {one: one for one in vocabulary.names}
    known: dict[str | int, str] = {**by_id, **named}
    missing = [one for one in unseen if one not in known]
    if missing:
        raise UserError(
            f"The truth has no class {', '.join(map(repr, missing))} that could be unseen.",
            "Name classes of the truth's `categories`, by name or by id.",
        )
    return {known[one] for one in unseen}


def _entries(
    path: Path, content: _Predictions, truth: Path, vocabulary: Vocabulary
) -> dict[ImageId, Entry]:
    """Annotations by image id, in file order; UserError for categories that the truth lacks."""
    said = {s.category_id for one in content.annotations for s in one.segments_info}
    unknown = said - vocabulary.index_of_id.keys()
    if unknown:
        which = "None" if unknown == said else "Not every"
        shown = ", ".join(map(str, sorted(unknown)[:5]))
        raise UserError(
            f"{which} category id of {path} is among the categories of {truth}: it lacks {shown}.",
            "Write the data set's category ids, not class indices.",
        )
    entries: dict[ImageId, Entry] = {}
    for one in content.annotations:
        if one.image_id in entries:
            raise UserError(f"{path}: an annotation has image {one.image_id} twice.", FORMAT_HINT)
        ids = [segment.id for segment in one.segments_info]
        if len(set(ids)) < len(ids):
            raise UserError(
                f"{path}: image {one.image_id} has segment ids that are repeated.",
                "0 is void in a panoptic PNG; each other id stands for one segment.",
            )
        labels = [vocabulary.index_of_id[segment.category_id] for segment in one.segments_info]
        entries[one.image_id] = Entry(
            one.file_name or f"{one.image_id:0>12}.png",
            np.array(ids, np.int64),
            np.array(labels, np.int64),
            np.array([segment.iscrowd for segment in one.segments_info], bool),
        )
    return entries


def _check_names(path: Path, said: _Predictions, truth: Path, told: _Truth) -> None:
    """UserError where the predictions name their categories and mean others than the truth."""
    hint = (
        "Predict with the truth's classes; or take `categories` out of the predictions, if the "
        "ids are right and only the names differ."
    )
    own, names = said.names, told.names
    if own and not set(own.values()) & set(names.values()):
        raise UserError(
            f"No class name of {path} is one of {truth} (such as {next(iter(own.values()))!r}): PQ "
            "would be 0.",
            hint,
        )
    for category, name in own.items():
        if names.get(category, name) != name:
            what = f"Category {category} is {name!r} in {path}, but {names[category]!r} in {truth}."
            raise UserError(what, hint)


def _check_fit(
    path: Path,
    preds: Mapping[ImageId, Entry],
    truth: Path,
    truths: Mapping[ImageId, Entry],
    named: bool,
) -> None:
    """UserError where an image lacks a prediction, or the files have nothing in common."""
    missing = [image_id for image_id in truths if image_id not in preds]
    if missing:
        raise UserError(
            f"{path} has no prediction for {len(missing)} of the {len(truths)} images of {truth}, "
            f"such as image {missing[0]}.",
            "Predict every image; one without segments has an empty `segments_info`.",
        )
    said = {int(label) for entry in preds.values() for label in entry.labels}
    real = {int(label) for entry in truths.values() for label in entry.labels}
    if not real:
        raise UserError(
            f"None of the {len(truths)} images of {truth} has a segment: there is no truth.",
            "Give the JSON of the labels; lists of test images have none.",
        )
    if said and not said & real and not named:
        raise UserError(
            f"No category id of {path} occurs in the segments of {truth}: PQ would be 0.",
            "Write the data set's category ids, not class indices; or add the `categories` that "
            "you mean to the predictions.",
        )


def _read_map(
    files: PanopticFiles, entry: Entry, image_id: ImageId, size: tuple[int, int]
) -> NDArray[np.int32]:
    """(H, W): 0 = void, i+1 = segment i of the entry; UserError where PNG and JSON disagree."""
    path = files.pngs / entry.png_name
    found = read_id_png(path)
    if found.shape != size:
        raise UserError(
            f"{path} is {found.shape[1]} x {found.shape[0]} pixels, but the truth's JSON says "
            f"{size[1]} x {size[0]} for image {image_id}.",
            TOGETHER,
        )
    order = np.argsort(entry.ids)
    known = np.concatenate([[0], entry.ids[order]])
    place = np.searchsorted(known, found).clip(max=len(known) - 1)
    strange = found[known[place] != found]
    unused = known[np.bincount(place.ravel(), minlength=len(known)) == 0]
    unused = unused[unused > 0]
    if len(strange) or len(unused):
        side, which = ("JSON", strange[0]) if len(strange) else ("PNG", unused[0])
        raise UserError(
            f"{path} and {files.json} disagree on image {image_id}: segment id {which} is not in "
            f"the {side}.",
            TOGETHER,
        )
    return np.concatenate([[0], order + 1]).astype(np.int32)[place]


def check_official(tasks: Sequence[str] | None) -> None:
    """UserError before any work if panopticapi is not installed or has nothing to score."""
    if tasks is not None and "panoptic" not in tasks:
        raise UserError("--official scores panoptic segments.", "Add panoptic to --tasks.")
    if find_spec("panopticapi") is None:
        raise UserError("--official needs panopticapi, which is not installed.", INSTALL)


def ask_official(
    report: Report, predictions: PanopticFiles, truth: PanopticFiles, progress: Progress
) -> None:
    """Says how far panopticapi is from the report of these files; UserError beyond 1e-9."""
    official = official_scores(predictions, truth)
    difference = compare_with_official(report, official)
    whole = 100 * official["All"]["pq"]
    progress.say(f"panopticapi: PQ {whole:.4f}, largest difference {difference:.1e}")


def official_scores(predictions: PanopticFiles, truth: PanopticFiles) -> dict[str, Any]:
    """What the installed panopticapi's `pq_compute` returns for the files: All, Things, Stuff
    (pq, sq, rq, n in 0-1) and per_class by category id. UserError where it is not installed."""
    try:
        evaluation = importlib.import_module("panopticapi.evaluation")
    except ImportError as error:
        raise UserError("panopticapi is not installed.", f"Install it: {INSTALL}") from error
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its own table
            return evaluation.pq_compute(
                str(truth.json),
                str(predictions.json),
                gt_folder=str(truth.pngs),
                pred_folder=str(predictions.pngs),
            )
    except ZeroDivisionError as error:  # of an empty mean
        raise UserError(
            "panopticapi cannot score files without any thing or without any stuff segment.",
            "Leave --official out.",
        ) from error


def compare_with_official(report: Report, official: Mapping[str, Any]) -> float:
    """The largest difference of any figure; UserError where it exceeds 1e-9."""
    ours = report.to_json()
    pairs: list[tuple[str, float, float]] = []
    for group, name in (("all", "All"), ("things", "Things"), ("stuff", "Stuff")):
        mine = ours["panoptic"][group]
        if mine is not None:
            pairs += [(f"{name} {k}", mine[k], official[name][k]) for k in ("pq", "sq", "rq", "n")]
    for row in ours["per_class"]:
        theirs = official["per_class"].get(row["id"])
        if theirs is not None:
            pairs += [(f"{row['name']} {k}", row[k], theirs[k]) for k in ("pq", "sq", "rq")]
    name, mine, theirs = max(pairs, key=lambda pair: abs(pair[1] - pair[2]))
    difference = abs(mine - theirs)
    if difference > TOLERANCE:
        raise UserError(
            f"panopticapi disagrees: {name} is {theirs!r} there and {mine!r} here.",
            "Please report it with the two JSON files; a truth JSON whose `area` is not the number "
            "of pixels in its PNG is a known cause.",
        )
    return difference
