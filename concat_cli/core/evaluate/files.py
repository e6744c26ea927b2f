"""Scores existing COCO panoptic files, as the official panopticapi does."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from concat_cli.core.errors import UserError
from concat_cli.core.evaluate.bootstrap import bootstrap
from concat_cli.core.evaluate.counts import ImageCounts, SparseCounts
from concat_cli.core.evaluate.panoptic import PanopticScore
from concat_cli.core.evaluate.panoptic_json import (
    Entry,
    category_names,
    panoptic_files,
    read_entries,
    read_json,
    read_map,
    read_truth,
    segments_of,
)
from concat_cli.core.evaluate.report import Report, Split, make_report
from concat_cli.core.evaluate.semantic import SemanticScore, class_map
from concat_cli.core.progress import SILENT, Progress
from concat_cli.core.vocabulary import Vocabulary


def evaluate_files(
    predictions: Path,
    truth: Path,
    predictions_dir: Path | None = None,
    truth_dir: Path | None = None,
    *,
    unseen: Collection[str | int] | None = None,
    split: Split = "all",
    bootstraps: int = 0,
    protocol: Mapping[str, Any] | None = None,
    progress: Progress = SILENT,
) -> Report:
    """Scores a panoptic prediction JSON and its PNGs against the truth's.

    Args:
        predictions_dir, truth_dir: the PNGs; by default in the folder named like the JSON without
            its ending.
        unseen: names or category ids of the classes that count as unseen; None: classes are not
            divided into seen and unseen.
        split: which classes are reported.
        bootstraps: how often the images are drawn again for 95% intervals; 0: no intervals.
        protocol: what else the report says of the predictions.
    """
    start = time.perf_counter()
    pred_files = panoptic_files(predictions, predictions_dir)
    truth_files = panoptic_files(truth, truth_dir)
    truth_json = read_truth(truth)
    if unseen is None and split != "all":
        raise UserError(
            f"Nobody says which classes are {split}.", "Give --class-split, or leave --split out."
        )
    vocabulary = _vocabulary(truth_json, unseen or ())
    images = {image["id"]: image for image in truth_json["images"]}
    truths = read_entries(truth, truth_json["annotations"], vocabulary)
    preds = _predictions(predictions, truth, truth_json, truths, vocabulary)
    extra = [image_id for image_id in preds if image_id not in truths]
    if extra:
        progress.say(
            f"{len(extra)} of {len(preds)} predictions have no truth and were not scored, such as "
            f"image {extra[0]}"
        )
    classes = len(vocabulary)
    panoptic, semantic = PanopticScore(classes), SemanticScore(classes)
    counts = (SparseCounts(4, classes), SparseCounts(3, classes))
    tracked = progress.track(truths.items(), "score", len(truths))
    for number, (image_id, real) in enumerate(tracked):
        found, size = preds[image_id], _size(truth, images, image_id)
        truth_map = read_map(truth_files, real, image_id, size)
        pred_map = read_map(pred_files, found, image_id, size)
        one = PanopticScore(classes)
        one.add(pred_map, found.labels, truth_map, real.labels, real.crowd)
        panoptic.merge(one)
        own = semantic.add(class_map(pred_map, found.labels), class_map(truth_map, real.labels))
        if bootstraps:
            counts[0].add(number, one.counts)
            counts[1].add(number, own)
    base = {"setting": "generalised", "mode": None, "semantic_from": "panoptic"}
    base |= {"predictions": str(predictions), "truth": str(truth), "not_scored": len(extra)}
    drawn = ImageCounts(len(truths), *counts)
    return make_report(
        vocabulary,
        panoptic,
        semantic,
        split=split,
        protocol=base | dict(protocol or {}),
        images=len(truths),
        seconds={"total": time.perf_counter() - start},
        divided=unseen is not None,
        intervals=bootstrap(drawn, vocabulary, bootstraps) if bootstraps else None,
    )


def _vocabulary(truth_json: dict[str, Any], unseen: Collection[str | int]) -> Vocabulary:
    """The truth's classes with seen/unseen by name or id; UserError for classes it lacks."""
    vocabulary = Vocabulary.from_categories(truth_json["categories"])
    names = {str(c["name"]) for c in truth_json["categories"]}
    missing = [u for u in unseen if u not in names and u not in vocabulary.index_of_id]
    if missing:
        raise UserError(
            f"The truth has no class {', '.join(map(repr, missing))} that could be unseen.",
            "Name classes of the truth's `categories`, by name or by id.",
        )
    by_name = {u for u in unseen if isinstance(u, str)}
    by_id = {vocabulary.names[vocabulary.index_of_id[u]] for u in unseen if isinstance(u, int)}
    return vocabulary.with_unseen(by_name | by_id)


def _predictions(
    path: Path,
    truth_path: Path,
    truth_json: dict[str, Any],
    truths: Mapping[int, Entry],
    vocabulary: Vocabulary,
) -> dict[int, Entry]:
    """The prediction JSON's entries, checked against the truth as a whole."""
    raw = read_json(path, "annotations")
    named = _check_categories(path, raw, truth_path, truth_json)
    _check_known(path, raw["annotations"], truth_path, vocabulary)
    preds = read_entries(path, raw["annotations"], vocabulary)
    missing = [image_id for image_id in truths if image_id not in preds]
    if missing:
        raise UserError(
            f"{path} has no prediction for {len(missing)} of the {len(truths)} images of "
            f"{truth_path}, such as image {missing[0]}.",
            "Predict every image; one without segments has an empty `segments_info`.",
        )
    said = {int(label) for entry in preds.values() for label in entry.labels}
    real = {int(label) for entry in truths.values() for label in entry.labels}
    if not real:
        raise UserError(
            f"None of the {len(truths)} images of {truth_path} has a segment: there is no truth.",
            "Give the JSON of the labels; lists of test images have none.",
        )
    if said and real and not said & real and not named:
        raise UserError(
            f"No category id of {path} occurs in the segments of {truth_path}: PQ would be 0.",
            "Write the data set's category ids, not class indices; or add the `categories` that "
            "you mean to the predictions.",
        )
    return preds


def _check_categories(
    path: Path, raw: dict[str, Any], truth_path: Path, truth_json: dict[str, Any]
) -> bool:
    """True where the predictions name their categories and mean the same as the truth by them."""
    names = category_names(truth_path, truth_json)
    own = category_names(path, raw)
    if own and not set(own.values()) & set(names.values()):
        raise UserError(
            f"No class name of {path} is one of {truth_path} (such as "
            f"{next(iter(own.values()))!r}): PQ would be 0.",
            "Predict with the truth's classes; or take `categories` out of the predictions, if the "
            "ids are right and only the names differ.",
        )
    for category, name in own.items():
        if category in names and names[category] != name:
            raise UserError(
                f"Category {category} is {name!r} in {path}, but {names[category]!r} in "
                f"{truth_path}.",
                "Predict with the truth's classes; or take `categories` out of the predictions, "
                "if the ids are right and only the names differ.",
            )
    return bool(own)


def _check_known(
    path: Path, annotations: list[Any], truth_path: Path, vocabulary: Vocabulary
) -> None:
    """UserError where a predicted category is not among the truth's."""
    said: set[Any] = set()
    for annotation in annotations:
        for segment in segments_of(path, annotation):
            said.add(segment["category_id"])
    unknown = said - vocabulary.index_of_id.keys()
    if unknown:
        which = "None" if unknown == said else "Not every"
        shown = ", ".join(map(str, sorted(unknown, key=str)[:5]))
        raise UserError(
            f"{which} category id of {path} is known to {truth_path}: it lacks {shown}.",
            "Write the data set's category ids, not class indices.",
        )


def _size(path: Path, images: Mapping[int, Any], image_id: int) -> tuple[int, int]:
    image = images.get(image_id)
    if image is None or "height" not in image or "width" not in image:
        raise UserError(
            f"{path} does not list image {image_id} with its height and width.",
            "Download or write the JSON again.",
        )
    return int(image["height"]), int(image["width"])
