"""Which prediction belongs to which image of the truth: by id, or by file name where the ids of the
two files were given out by different programs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PureWindowsPath
from typing import Literal

from concat_cli.core.data.store import SUFFIXES
from concat_cli.core.errors import UserError
from concat_cli.core.evaluate.panoptic_json import (
    Annotation,
    PanopticFiles,
    Predictions,
    Truth,
    file_names,
)
from concat_cli.core.progress import Progress

Match = Literal["auto", "id", "name"]
Parts = tuple[str, ...]  # of a path, the last one first and without a picture's ending


@dataclass(frozen=True)
class Side:
    """One of the two files: where it is, what it holds, and its annotations by image id."""

    files: PanopticFiles
    content: Predictions | Truth
    by_image: Mapping[str, Annotation]

    def names(self, pngs: bool = False) -> dict[str, str]:
        """The file of each annotated image, or its PNG, where one is told."""
        told = file_names(self.content)
        found = {k: a.file_name if pngs else told.get(k) for k, a in self.by_image.items()}
        return {one: name for one, name in found.items() if name}


@dataclass(frozen=True)
class Pairs:
    """The prediction's image id for each image id of the truth; `key`: what matched them."""

    of_truth: dict[str, str]
    key: Literal["id", "file_name"]


def pair(truth: Side, found: Side, match: Match, progress: Progress) -> Pairs:
    """Each image of the truth with its prediction; what is assumed is said.

    Ids count where they fit: every image of the truth has a prediction of its id, and no prediction
    is named like another image. Else the file names in both `images` count, and where they leave an
    image open, or the predictions have no `images` and only their PNGs tell, UserError.
    """
    pngs = not found.names()
    names, others = truth.names(pngs), found.names(pngs)
    by_name = fitting(names, others)
    if pngs and not by_name:
        names = truth.names()
        by_name = fitting(names, others)
    named = {ours: theirs for theirs, ours in by_name.items()}
    lacking = [one for one in truth.by_image if one not in found.by_image]
    crossed = [other for other, one in by_name.items() if one != other]
    unnamed = [one for one in truth.by_image if one not in named]
    if match == "id" or (match == "auto" and not lacking and not crossed):
        if lacking:
            raise _lacking(truth, found, lacking)
        if match == "auto" and names and others and not (pngs or by_name):
            one = next(iter(truth.by_image))
            progress.say(
                f"images are matched by id, though no file name is in both files: image {one} is "
                f"{names.get(one)} in the truth and {others.get(one)} in the predictions"
            )
        return Pairs({one: one for one in truth.by_image}, "id")
    if lacking and not crossed and match == "auto":
        raise _lacking(truth, found, lacking)
    told = "images are matched by file name, as --match asks"
    if crossed:
        told = _misfit(truth, crossed[0], names, others[crossed[0]])
    if unnamed:
        raise UserError(
            f"{told}, and by file name {len(unnamed)} of the {len(truth.by_image)} images of the "
            f"truth have no prediction, such as {names.get(unnamed[0], unnamed[0])}.",
            "Predict every image, with the truth's ids or under its file names; --match id goes by "
            "the ids as they are.",
        )
    if match == "auto" and not lacking and pngs:
        raise UserError(
            f"{told}: {len(crossed)} PNGs are named like another image than their id says.",
            "--match name goes by these names, --match id by the ids.",
        )
    progress.say(f"{told}: {len(named)} images are matched by file name")
    return Pairs({one: named[one] for one in truth.by_image}, "file_name")


def _lacking(truth: Side, found: Side, lacking: list[str]) -> UserError:
    return UserError(
        f"{found.files.json} has no prediction for {len(lacking)} of the {len(truth.by_image)} "
        f"images of {truth.files.json}, such as image {lacking[0]}.",
        "Predict every image; one without segments has an empty `segments_info`.",
    )


def _misfit(truth: Side, image_id: str, names: Mapping[str, str], name: str) -> str:
    """In what way the ids do not fit, by a prediction's id and file name."""
    there = f"is {names[image_id]}" if image_id in names else "is not"
    return (
        f"image ids do not fit together (image {image_id} {there} in {truth.files.json}, but "
        f"{name} in the predictions)"
    )


def fitting(truth: Mapping[str, str], found: Mapping[str, str]) -> dict[str, str]:
    """The truth's image id for each prediction's whose file name fits one of them best, that is in
    the most folders; those that fit two equally well are left out."""
    by_stem: dict[str, list[tuple[str, Parts]]] = defaultdict(list)
    for one, name in truth.items():
        parts = _parts(name)
        by_stem[parts[0]].append((one, parts))
    best: dict[str, tuple[int, str | None]] = {}  # truth -> how well, and by which prediction
    for other, name in found.items():
        parts = _parts(name)
        ranked = sorted(
            ((_common(parts, mine), one) for one, mine in by_stem.get(parts[0], ())), reverse=True
        )
        if not ranked or (len(ranked) > 1 and ranked[0][0] == ranked[1][0]):
            continue
        score, one = ranked[0]
        held = best.get(one, (0, None))[0]
        if score >= held:
            best[one] = (score, other if score > held else None)
    return {other: one for one, (_, other) in best.items() if other is not None}


def _parts(name: str) -> Parts:
    path = PureWindowsPath(name)  # takes / and backslashes
    stem = path.stem if path.suffix.lower() in SUFFIXES else path.name
    stem = stem.replace("_gtFine", "")  # cityscapesScripts names pictures by their labels
    return (stem, *reversed(path.parts[:-1]))


def _common(one: Parts, other: Parts) -> int:
    """How many folders are the same, counted from the file."""
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
