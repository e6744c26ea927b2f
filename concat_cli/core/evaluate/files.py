"""Scores COCO panoptic files that anybody may have written, as the official panopticapi does: what
is wrong with them is said, not guessed. The official one can be asked for a second opinion."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import time
from collections.abc import Collection
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

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
    categories: list[_Category] = []

    def used(self) -> set[int]:
        """The category ids of all segments."""
        return {s.category_id for one in self.annotations for s in one.segments_info}


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


def evaluate_files(
    predictions: PanopticFiles | Path | str,
    truth: PanopticFiles | Path | str,
    scoring: Scoring = PLAIN,
    *,
    unseen: Collection[str] | None = None,
    class_split: str | None = None,
    progress: Progress = SILENT,
) -> Report:
    """Scores a panoptic prediction JSON and its PNGs against the truth's.

    Args:
        scoring: its `split`, `bootstraps` and `official`; the others need weights.
        unseen: names of the classes that count as unseen; None: those of `class_split`, a split's
            name or file; None: as the truth's `dataset.json` says, a folder above it; without one,
            classes are not divided.
    """
    if scoring.tasks or scoring.calibrate or scoring.diagnostics or scoring.candidates != "all":
        raise UserError(
            "--tasks, --candidates, --calibrate and --diagnostics need weights; files hold "
            "panoptic segments, from which PQ and mIoU are counted.",
            "Leave them out, or score --weights.",
        )
    if scoring.official and find_spec("panopticapi") is None:
        raise UserError("--official needs panopticapi, which is not installed.", INSTALL)
    start = time.perf_counter()
    found, said = _read(predictions, _Predictions)
    real, told = _read(truth, _Truth)
    vocabulary = Vocabulary.from_categories(one.model_dump() for one in told.categories)
    if unseen is None:
        class_split, unseen = _unseen_of(real.json, class_split, vocabulary, progress)
    if unseen is None and scoring.split != "all":
        what = f"Nobody says which classes are {scoring.split}."
        raise UserError(what, "Give --class-split, or leave --split out.")
    missing = set(unseen or ()).difference(vocabulary.names)
    if missing:
        what = (
            f"The truth has no class {', '.join(map(repr, sorted(missing)))} that could be unseen."
        )
        raise UserError(what, "Name classes of the truth's `categories`.")
    vocabulary = vocabulary.with_unseen(unseen or ())
    _check_categories(found.json, said, real.json, told)
    truths, preds = _by_image(real, told), _by_image(found, said)
    lacking = [image_id for image_id in truths if image_id not in preds]
    if lacking:
        raise UserError(
            f"{found.json} has no prediction for {len(lacking)} of the {len(truths)} images of "
            f"{real.json}, such as image {lacking[0]}.",
            "Predict every image; one without segments has an empty `segments_info`.",
        )
    extra = [image_id for image_id in preds if image_id not in truths]
    if extra:
        progress.say(
            f"{len(extra)} of {len(preds)} predictions have no truth and were not scored, such as "
            f"image {extra[0]}"
        )
    sizes = {image.id: (image.height, image.width) for image in told.images}
    tasks = ("panoptic", "semantic")
    tally = Tally(len(vocabulary), len(truths), tasks, keep=scoring.bootstraps > 0)
    for number, image_id in enumerate(progress.track(truths, "score", len(truths))):
        one = truths[image_id]
        crowd = np.array([segment.iscrowd for segment in one.segments_info], bool)
        of_truth, of_pred = (
            (
                _read_map(files, each, sizes.get(image_id)),
                np.array([vocabulary.index_of_id[s.category_id] for s in each.segments_info], int),
            )
            for files, each in ((real, one), (found, preds[image_id]))
        )
        tally.add_panoptic(number, of_pred, (*of_truth, crowd))
        tally.add_semantic(number, class_map(*of_pred), class_map(*of_truth))
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
        progress.say(ask_official(report, found, real))
    return report


def _read(given: PanopticFiles | Path | str, kind: type[J]) -> tuple[PanopticFiles, J]:
    """A panoptic JSON; UserError where it is none, and where it or its folder is missing."""
    files = given if isinstance(given, PanopticFiles) else PanopticFiles(Path(given))
    if not files.json.is_file():
        raise UserError(f"There is no file {files.json}.", "Check the path.")
    if not files.pngs.is_dir():
        raise UserError(
            f"There is no folder {files.pngs} with the PNGs of {files.json}.",
            "Name it with --predictions-dir or --truth-dir.",
        )
    try:
        return files, kind.model_validate_json(files.json.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        what = f"{files.json} is no COCO panoptic JSON: {place}: {first['msg']}"
        raise UserError(what, FORMAT_HINT) from error


def _unseen_of(
    truth: Path, class_split: str | None, vocabulary: Vocabulary, progress: Progress
) -> tuple[str | None, Collection[str] | None]:
    """The split's name and unseen classes: as asked, else as the truth's data set says; else None.

    A `dataset.json` counts if it stands a folder above the truth and fits the truth's classes.
    """
    if class_split is not None:
        return class_split, load_class_split(class_split, list(vocabulary.names))
    path = truth.absolute().parent.parent / "dataset.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        raw = json.loads(path.read_text(encoding="utf-8"))
        name, unseen = str(raw["class_split"]), tuple(map(str, raw["unseen"]))
        if set(unseen) <= set(vocabulary.names):
            place = os.path.relpath(path)
            progress.say(f"no --class-split: classes are divided as in {place} ({name})")
            return name, unseen
    progress.say("no --class-split: classes are not divided")
    return None, None


def _by_image(files: PanopticFiles, content: _Predictions) -> dict[ImageId, _Annotation]:
    """Annotations by image id, in file order; UserError for an image or a segment told twice."""
    found = {one.image_id: one for one in content.annotations}
    if len(found) < len(content.annotations):
        raise UserError(f"{files.json}: two annotations have one image_id.", FORMAT_HINT)
    for one in content.annotations:
        if len({segment.id for segment in one.segments_info}) < len(one.segments_info):
            raise UserError(
                f"{files.json}: image {one.image_id} has segment ids that are repeated.",
                "Each id but 0 stands for one segment of a panoptic PNG.",
            )
    return found


def _check_categories(path: Path, said: _Predictions, truth: Path, told: _Truth) -> None:
    """UserError where the files mean different classes, or there is nothing to score."""
    names = {one.id: one.name for one in told.categories}
    if not len(told.categories) == len(names) == len(set(names.values())):
        raise UserError(f"{truth}: two categories have one id or one name.", FORMAT_HINT)
    for one in said.categories:
        if names.get(one.id, one.name) != one.name:
            raise UserError(
                f"Category {one.id} is {one.name!r} in {path}, but {names[one.id]!r} in {truth}.",
                "Predict with the truth's classes; or take `categories` out of the predictions, if "
                "the ids are right and only the names differ.",
            )
    for file, ids in ((truth, told.used()), (path, said.used())):
        unknown = sorted(ids - names.keys())
        if unknown:
            raise UserError(
                f"{len(unknown)} of {len(ids)} category ids of {file} are not among the categories "
                f"of {truth}, such as {unknown[0]}.",
                "Write the data set's category ids, not class indices.",
            )
    if not told.used():
        raise UserError(
            f"None of the images of {truth} has a segment: there is no truth.",
            "Give the JSON of the labels; lists of test images have none.",
        )
    if said.used() and not said.used() & told.used() and not said.categories:
        raise UserError(
            f"No category id of {path} occurs in the segments of {truth}: PQ would be 0.",
            "Write the data set's category ids, not class indices; or add the `categories` that "
            "you mean to the predictions.",
        )


def _read_map(
    files: PanopticFiles, one: _Annotation, size: tuple[int, int] | None
) -> NDArray[np.int32]:
    """(H, W): 0 = void, i+1 = segment i of it; UserError where PNG and JSON disagree, or the truth
    does not tell the image's size."""
    if size is None:
        what = f"{files.json} does not list image {one.image_id} with its height and width."
        raise UserError(what, "Download or write the JSON again.")
    path = files.pngs / (one.file_name or f"{one.image_id:0>12}.png")
    ids = np.array([segment.id for segment in one.segments_info], np.int64)
    found = read_id_png(path, size)  # not decoded where it is of another size
    if found.shape != size:
        raise UserError(
            f"{path} is {found.shape[1]} x {found.shape[0]} pixels, but the truth's JSON says "
            f"{size[1]} x {size[0]} for image {one.image_id}.",
            TOGETHER,
        )
    order = np.argsort(ids)
    known = np.concatenate([[0], ids[order]])
    place = np.searchsorted(known, found).clip(max=len(known) - 1)
    strange = found[known[place] != found]
    unused = known[np.bincount(place.ravel(), minlength=len(known)) == 0]
    unused = unused[unused > 0]
    if len(strange) or len(unused):
        side, which = ("JSON", strange[0]) if len(strange) else ("PNG", unused[0])
        raise UserError(
            f"{path} and {files.json} disagree on image {one.image_id}: segment id {which} is not "
            f"in the {side}.",
            TOGETHER,
        )
    return np.concatenate([[0], order + 1]).astype(np.int32)[place]


def ask_official(report: Report, predictions: PanopticFiles, truth: PanopticFiles) -> str:
    """What the installed panopticapi says of these files and how far it is from the report, in one
    line; UserError where any figure differs by more than 1e-9."""
    evaluation = importlib.import_module("panopticapi.evaluation")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its own table
            official = evaluation.pq_compute(
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
    ours = report.to_json()
    pairs: list[tuple[str, float, float]] = []
    for group in ("all", "things", "stuff"):
        mine, theirs = ours["panoptic"][group], official[group.capitalize()]
        if mine is not None:
            pairs += [(f"{group} {k}", mine[k], theirs[k]) for k in ("pq", "sq", "rq", "n")]
    for row in ours["per_class"]:
        theirs = official["per_class"].get(row["id"])
        if theirs is not None:
            pairs += [(f"{row['name']} {k}", row[k], theirs[k]) for k in ("pq", "sq", "rq")]
    name, mine, theirs = max(pairs, key=lambda pair: abs(pair[1] - pair[2]))
    if abs(mine - theirs) > TOLERANCE:
        raise UserError(
            f"panopticapi disagrees: {name} is {theirs!r} there and {mine!r} here.",
            "Please report it with the two JSON files; a truth JSON whose `area` is not the number "
            "of pixels in its PNG is a known cause.",
        )
    whole, difference = 100 * official["All"]["pq"], abs(mine - theirs)
    return f"panopticapi: PQ {whole:.4f}, largest difference {difference:.1e}"
