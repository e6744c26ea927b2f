"""Scores folders of semantic maps that anybody may have written, a PNG for each image: mIoU as
mmsegmentation's `IoUMetric` counts it."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from concat_cli.core.data.image_io import read_header, wrong_size
from concat_cli.core.errors import UserError
from concat_cli.core.evaluate.files import unseen_of
from concat_cli.core.evaluate.map_pairs import in_order
from concat_cli.core.evaluate.page.findings import Findings
from concat_cli.core.evaluate.page.outcomes import Overlap, regions
from concat_cli.core.evaluate.page.photos import Photos, photo_names
from concat_cli.core.evaluate.pairing import fitting
from concat_cli.core.evaluate.quality import overlaps
from concat_cli.core.evaluate.report import Report, make_report
from concat_cli.core.evaluate.scores import (
    PLAIN,
    Scoring,
    Tally,
    check_divided,
    check_split,
    few_images,
)
from concat_cli.core.prepare.class_values import read_classes
from concat_cli.core.prepare.labels import LabelReader, read_raw
from concat_cli.core.prepare.source import LabelFormat
from concat_cli.core.progress import SILENT, Progress

Maps = tuple[NDArray[np.int32], NDArray[np.int32]]
WHAT = "PNGs of semantic maps"


def evaluate_maps(
    predictions: Path,
    truth: Path,
    classes: Path,
    scoring: Scoring = PLAIN,
    *,
    class_split: str | None = None,
    progress: Progress = SILENT,
) -> Report:
    """Scores a folder of semantic maps against the truth's, image by file name.

    Args:
        classes: what the values mean, see `read_classes`: by their order, from 0 on, unless the
            file gives values or colours. 255 (and 65535) is void in the truth and no class in a
            prediction, unless it is a class.
        class_split: a split's name or file, which says what is unseen; None: as the `dataset.json`
            beside the truth or above it says; without one, classes are not divided.

    UserError where an image has no prediction, or one of another size, or with another value.
    """
    if scoring.calibrate or scoring.diagnostics or scoring.official or scoring.candidates != "all":
        what = "--candidates, --calibrate, --diagnostics and --official mean nothing here."
        raise UserError(what, "Semantic maps hold classes of pixels: leave them out.")
    if scoring.task_names() not in (None, ("semantic",)):
        raise UserError("Semantic maps are scored for --tasks semantic alone.", "Leave it out.")
    start = time.perf_counter()
    known = read_classes(classes)
    split, unseen = unseen_of(truth / "maps", class_split, known.vocabulary, progress)
    check_divided(scoring.split, unseen)
    vocabulary = known.vocabulary.with_unseen(unseen or ())
    check_split(scoring.split, vocabulary)
    pairs = _pairs(_pngs(truth), _pngs(predictions), predictions, progress)
    if scoring.images:
        pairs = {name: pair for name, pair in pairs.items() if name in scoring.images}
    few_images(scoring.bootstraps, len(pairs), progress)
    pixels = "colour" if known.coloured else "index"
    reader = LabelReader(LabelFormat("semantic", pixels, known.table, known.void))
    index_of = np.full(max(vocabulary.ids) + 2, -1, np.int32)  # category id + 1 -> class index
    index_of[np.array(vocabulary.ids) + 1] = np.arange(len(vocabulary))

    def read(path: Path, size: tuple[int, int]) -> NDArray[np.int32]:
        raw = read_raw(path, pixels, size)
        if raw.shape != size:
            raise wrong_size(path, raw.shape, size, "the truth is")
        return index_of[reader.categories(raw, path)]

    def both(pair: tuple[Path, Path]) -> Maps:
        size = read_header(pair[0]).size
        return read(pair[1], size), read(pair[0], size)

    keep = scoring.bootstraps > 0 or scoring.counts
    tally = Tally(len(vocabulary), len(pairs), ("semantic",), keep=keep)
    tally.each.names = tuple(pairs)
    tally.findings = scoring.findings(vocabulary)
    photos = Photos(None, scoring.pictures)
    scored = progress.track(in_order(both, pairs.values()), "score", len(pairs))
    for number, (name, (found, real)) in enumerate(zip(pairs, scored, strict=True)):
        tally.add_semantic(number, found, real)
        if tally.findings is not None:
            _look(tally.findings, number, name, (real, found), photos)
    if scoring.look:
        photos.tell(progress)
    if not tally.semantic.matrix.any():
        raise UserError(f"Every pixel of {truth} is void: there is no truth.", "Check --classes.")
    return make_report(
        tally,
        vocabulary,
        scoring,
        ("semantic",),
        protocol={
            "setting": "generalised",
            "mode": None,
            "predictions": str(predictions),
            "truth": str(truth),
            "matched_by": "file_name",
            "class_split": split,
        },
        seconds={"total": time.perf_counter() - start},
        divided=unseen is not None,
    )


def _look(findings: Findings, number: int, name: str, maps: Maps, photos: Photos) -> None:
    """Adds an image to a page: all that is of one class is one segment, in the truth as well."""
    (real, labels), (found, named) = map(regions, maps)
    shared = overlaps(real, found, len(labels), len(named))
    image = Overlap(shared, labels, np.zeros(len(labels), bool), named)
    findings.add(number, name, image, lambda: photos.over((real, found), photo_names(name)))


def _pngs(folder: Path) -> dict[str, str]:
    """Every PNG below a folder, as seen from it."""
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder} with {WHAT}.", "Check the path.")
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    if not found:
        raise UserError(f"{folder} holds no PNG.", f"--predictions and --truth name {WHAT}.")
    return {str(folder / name): name for name in found}


def _pairs(
    truth: dict[str, str], found: dict[str, str], folder: Path, progress: Progress
) -> dict[str, tuple[Path, Path]]:
    """By the name of each true PNG, it and its prediction, whose name fits it best."""
    named = {ours: theirs for theirs, ours in fitting(truth, found).items()}
    lacking = [name for path, name in truth.items() if path not in named]
    if lacking:
        raise UserError(
            f"{folder} has no prediction for {len(lacking)} of the {len(truth)} images of the "
            f"truth, such as {lacking[0]}.",
            "Predict every image, and name the PNG like the truth's.",
        )
    extra = sorted(set(found) - set(named.values()))
    if extra:
        progress.say(
            f"{len(extra)} of {len(found)} predictions have no truth and were not scored, such as "
            f"{found[extra[0]]}"
        )
    return {name: (Path(path), Path(named[path])) for path, name in truth.items()}
