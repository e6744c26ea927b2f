"""Scores COCO panoptic files that anybody may have written, as the official panopticapi does: what
is wrong with them is said, not guessed."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from concat_cli.core.data.class_split import load_class_split
from concat_cli.core.errors import UserError
from concat_cli.core.evaluate.map_pairs import Counted, Drawn, count_pair, forks, in_order
from concat_cli.core.evaluate.official import ask_official, need_official
from concat_cli.core.evaluate.page.outcomes import Overlap
from concat_cli.core.evaluate.page.photos import Photos
from concat_cli.core.evaluate.pairing import Match, Side, pair
from concat_cli.core.evaluate.panoptic_json import (
    FORMAT_HINT,
    PanopticFiles,
    Predictions,
    Segment,
    Truth,
    file_names,
    read_panoptic,
)
from concat_cli.core.evaluate.report import Report, make_report
from concat_cli.core.evaluate.scores import (
    PLAIN,
    Scoring,
    Tally,
    check_divided,
    check_split,
    few_images,
)
from concat_cli.core.progress import SILENT, Progress
from concat_cli.core.vocabulary import Vocabulary
from concat_cli.core.vocabulary_file import with_kinds

TASKS = ("panoptic", "semantic")


@dataclass(frozen=True)
class Rules:
    """How two files are read together.

    match: what tells which prediction belongs to which image, see `pairing.pair`.
    kinds: a list like "dog; sky : stuff", or a file of one, that says of classes whether they are
        things or stuff; "" and of others: as `isthing` says.
    as_panopticapi: count as panopticapi does: of the area that the truth's JSON says, whatever its
        PNG holds; else the PNG counts, and where the two disagree on segments, UserError.
    """

    match: Match = "auto"
    kinds: str = ""
    as_panopticapi: bool = False


PLAIN_RULES = Rules()


def evaluate_files(
    predictions: PanopticFiles | Path | str,
    truth: PanopticFiles | Path | str,
    scoring: Scoring = PLAIN,
    *,
    unseen: Collection[str] | None = None,
    class_split: str | None = None,
    rules: Rules = PLAIN_RULES,
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
    if scoring.official:
        need_official()
    start = time.perf_counter()
    found = Side(*read_panoptic(predictions, Predictions))
    real_files, told, truths = read_panoptic(truth, Truth)
    real = Side(real_files, told, truths)
    vocabulary = _kinds(real_files, told, rules.kinds, progress)
    if unseen is None:
        class_split, unseen = unseen_of(real_files.json, class_split, vocabulary, progress)
    check_divided(scoring.split, unseen)
    missing = set(unseen or ()).difference(vocabulary.names)
    if missing:
        what = (
            f"The truth has no class {', '.join(map(repr, sorted(missing)))} that could be unseen."
        )
        raise UserError(what, "Name classes of the truth's `categories`.")
    vocabulary = vocabulary.with_unseen(unseen or ())
    check_split(scoring.split, vocabulary)
    _check_categories(found.files.json, found.content, real_files.json, told)
    pairs = pair(real, found, rules.match, progress)
    scored = set(pairs.of_truth.values())
    extra = [image_id for image_id in found.by_image if image_id not in scored]
    if extra:
        progress.say(
            f"{len(extra)} of {len(found.by_image)} predictions have no truth and were not scored, "
            f"such as image {extra[0]}"
        )
    few_images(scoring.bootstraps, len(truths), progress)
    sizes = {image.id: (image.height, image.width) for image in told.images}
    names, others = file_names(told), file_names(found.content)
    if scoring.images:
        truths = {k: one for k, one in truths.items() if (names.get(k) or k) in scoring.images}
    keep = scoring.bootstraps > 0 or scoring.counts
    tally = Tally(len(vocabulary), len(truths), TASKS, keep=keep)
    tally.each.names = tuple(names.get(one) or one for one in truths)
    odd = Disagreements()
    tally.findings = scoring.findings(vocabulary)
    photos = Photos(real_files.json, scoring.pictures) if scoring.look else None

    def drawn(image_id: str) -> tuple[Drawn, Drawn]:
        one, other = truths[image_id], found.by_image[pairs.of_truth[image_id]]
        name = names.get(image_id)
        path = found.files.png(other, others.get(other.image_id) or name)
        real_one = Drawn(real_files.png(one, name), one, real_files.json)
        return real_one, Drawn(path, other, found.files.json)

    def count(image_id: str) -> Counted:
        return count_pair(*drawn(image_id), sizes.get(image_id), rules.as_panopticapi)

    counted = progress.track(in_order(count, truths, forked=forks()), "score", len(truths))
    for number, (one, shared) in enumerate(zip(truths.values(), counted, strict=True)):
        other = found.by_image[pairs.of_truth[one.image_id]]
        labels, theirs = (
            np.array([vocabulary.index_of_id[s.category_id] for s in segments], int)
            for segments in (one.segments_info, other.segments_info)
        )
        crowd = np.array([segment.iscrowd for segment in one.segments_info], bool)
        areas = odd.count(one.segments_info, shared, rules)
        if areas is not None:  # the last one stands for the pixels that the JSON does not list
            labels, crowd = np.append(labels, -1), np.append(crowd, True)
        tally.add_shared(number, shared.pixels, theirs, (labels, crowd), areas)
        if tally.findings is not None and photos is not None:
            name = names.get(one.image_id)
            tally.findings.add(
                number,
                name or one.image_id,
                Overlap(shared.pixels, labels, crowd, theirs, areas),
                lambda key=one.image_id, name=name: photos.picture(*drawn(key), name),
            )
    if photos is not None:
        photos.tell(progress)
    for line in odd.lines(rules):
        progress.say(line)
    report = make_report(
        tally,
        vocabulary,
        scoring,
        TASKS,
        protocol={
            "setting": "generalised",
            "mode": None,
            "semantic_from": "panoptic",
            "predictions": str(found.files.json),
            "truth": str(real_files.json),
            "not_scored": len(extra),
            "matched_by": pairs.key,
            "area_from": "json" if rules.as_panopticapi else "png",
            "disagreements": odd.to_json(),
            "class_split": class_split,
        },
        seconds={"total": time.perf_counter() - start},
        divided=unseen is not None,
    )
    if scoring.official:
        same = None if pairs.key == "id" else pairs.of_truth
        progress.say(ask_official(report, found.files, real_files, same))
    return report


def _kinds(files: PanopticFiles, told: Truth, kinds: str, progress: Progress) -> Vocabulary:
    """The truth's classes as things and stuff, as `kinds` or else `isthing` says; what looks unlike
    what was meant is said."""
    vocabulary = Vocabulary.from_categories(
        {"id": one.id, "name": one.name, "isthing": one.isthing is not False}
        for one in told.categories
    )
    if kinds:
        return with_kinds(vocabulary, kinds)
    if not told.categories:
        return vocabulary
    silent = sum(one.isthing is None for one in told.categories)
    things, count = sum(vocabulary.is_thing), len(vocabulary)
    if silent:
        progress.say(
            f"{silent} of {count} categories of {files.json} have no isthing and count as things; "
            '--kinds "NAME; NAME : stuff" says which are what'
        )
    elif things in (0, count) and count > 1:
        progress.say(
            f"all {count} categories of {files.json} are {'things' if things else 'stuff'} by "
            'their isthing; --kinds "NAME; NAME : stuff" says which are what'
        )
    several = _several(told, vocabulary)
    if several:
        name = max(several, key=lambda name: several[name])
        progress.say(
            f"{len(several)} stuff classes of {files.json} have several segments in an image, "
            f"which things have: {name} in {several[name]} images"
        )
    return vocabulary


def _several(told: Truth, vocabulary: Vocabulary) -> dict[str, int]:
    """By stuff class, in how many images it has more than one segment."""
    stuff = {e.id: e.name for e in vocabulary.entries if e.kind == "stuff"}
    found: Counter[str] = Counter()
    for one in told.annotations:
        used = Counter(s.category_id for s in one.segments_info if not s.iscrowd)
        found.update(stuff[c] for c, times in used.items() if times > 1 and c in stuff)
    return dict(found)


def unseen_of(
    truth: Path, class_split: str | None, vocabulary: Vocabulary, progress: Progress
) -> tuple[str | None, Collection[str] | None]:
    """The split's name and unseen classes: as asked, else as the truth's data set says; else None.

    A `dataset.json` counts if it stands a folder above the truth and fits the truth's classes.
    """
    if class_split is not None:
        return class_split, load_class_split(class_split, list(vocabulary.names))
    path = truth.absolute().parent.parent / "dataset.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        raw = json.loads(path.read_text(encoding="utf-8"))
        name, unseen = str(raw["class_split"]), tuple(map(str, raw["unseen"]))
        if set(unseen) <= set(vocabulary.names):
            place = os.path.relpath(path)
            progress.say(f"no --class-split: classes are divided as in {place} ({name})")
            return name, unseen
    progress.say("no --class-split: classes are not divided")
    return None, None


def _check_categories(path: Path, said: Predictions | Truth, truth: Path, told: Truth) -> None:
    """UserError where the files mean different classes, or there is nothing to score."""
    names = {one.id: one.name for one in told.categories}
    if not len(told.categories) == len(names) == len(set(names.values())):
        raise UserError(f"{truth}: two categories have one id or one name.", FORMAT_HINT)
    ids = {name: number for number, name in names.items()}
    moved = [one for one in said.categories if ids.get(one.name, one.id) != one.id]
    if moved:
        one = moved[0]
        raise UserError(
            f"{len(moved)} classes have another category id in {path} than in {truth}, such as "
            f"{one.name!r}: {one.id}, and {ids[one.name]}.",
            "datumaro's panoptic export numbers categories anew, for one. Write the truth's ids.",
        )
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


@dataclass
class Disagreements:
    """In how many of the truth's segments the JSON and the PNG disagree; an example of each kind.

    areas: the JSON's `area` is not the number of pixels; listed: no pixel; drawn: ids that only the
    PNG has; sizes: PNGs of another size than the JSON says of their image.
    """

    segments: int = 0
    areas: int = 0
    listed: int = 0
    drawn: int = 0
    sizes: int = 0
    example: str = ""

    def count(
        self, segments: Sequence[Segment], counted: Counted, rules: Rules
    ) -> NDArray[np.float64] | None:
        """Adds an image. As panopticapi counts, also the areas by the JSON, that of the unlisted
        pixels last; UserError where it has none."""
        png, pixels = counted.png, counted.pixels[1:].sum(1)
        self.sizes += counted.resized
        self.drawn += counted.strange
        said: list[float] = []
        for segment, real in zip(segments, pixels, strict=False):
            area = _number(segment.area)
            if area is None and rules.as_panopticapi:
                raise UserError(
                    f"{png}: segment {segment.id} has the area {segment.area!r:.60} in the JSON, "
                    "which panopticapi would count with.",
                    "Write the numbers of pixels there, or leave --as-panopticapi out.",
                )
            said.append(float(real) if area is None else area)
            self.segments += 1
            if real and said[-1] != real and not segment.iscrowd:  # of crowds nothing is counted
                self.areas += 1
                self.example = self.example or (
                    f"segment {segment.id} of {png.name}: {said[-1]:g} in the JSON, {real} pixels"
                )
            self.listed += not real
        return np.array([*said, 0.0]) if rules.as_panopticapi else None

    def to_json(self) -> dict[str, int]:
        """The counts."""
        return {key: value for key, value in vars(self).items() if key != "example"}

    def lines(self, rules: Rules) -> list[str]:
        """What is to be said."""
        if rules.as_panopticapi:
            example = f" ({self.example})" if self.example else ""
            return [
                "as panopticapi: areas of the truth are the JSON's. JSON and PNG disagree on the "
                f"area of {self.areas} of {self.segments} true segments{example}; {self.listed} "
                f"have no pixel, {self.drawn} ids have pixels alone, {self.sizes} PNGs are of "
                "another size"
            ]
        if not self.areas:
            return []
        return [
            f"the truth's JSON has another `area` than the PNGs have pixels for {self.areas} of "
            f"{self.segments} segments ({self.example}): pixels are counted here; panopticapi and "
            "hotcoco count the JSON's, as --as-panopticapi does"
        ]


def _number(value: object) -> float | None:
    """A finite number from 0 on, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    with contextlib.suppress(OverflowError):
        if math.isfinite(value) and value >= 0:
            return float(value)
    return None
