"""Scores existing COCO panoptic files, as the official panopticapi does."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from concat_cli.core.data.dataset import Part, Record, read_panoptic_json, read_segment_map
from concat_cli.core.errors import UserError
from concat_cli.core.evaluate.panoptic import PanopticScore
from concat_cli.core.evaluate.report import Report, Split, make_report
from concat_cli.core.evaluate.semantic import SemanticScore, class_map
from concat_cli.core.progress import SILENT, Progress
from concat_cli.core.vocabulary import Vocabulary

_FORMAT_HINT = (
    "A COCO panoptic JSON holds `annotations`: [{image_id, file_name, segments_info: "
    "[{id, category_id}]}]."
)


@dataclass(frozen=True)
class _Entry:
    """One annotation of a panoptic JSON: ids, class indices and crowd flags in its own order."""

    png_name: str
    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    crowd: NDArray[np.bool_]


def evaluate_files(
    predictions: Path,
    truth: Path,
    predictions_dir: Path | None = None,
    truth_dir: Path | None = None,
    *,
    unseen: Collection[str | int] | None = None,
    split: Split = "all",
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
        protocol: what else the report says of the predictions.
    """
    start = time.perf_counter()
    pred_part, truth_part = png_part(predictions, predictions_dir), png_part(truth, truth_dir)
    truth_json = read_panoptic_json(truth)
    if unseen is None and split != "all":
        raise UserError(
            f"Nobody says which classes are {split}.", "Give --class-split, or leave --split out."
        )
    vocabulary = _vocabulary(truth_json, unseen or ())
    images = {image["id"]: image for image in truth_json["images"]}
    truths = _entries(truth, truth_json["annotations"], vocabulary)
    preds = _predictions(predictions, truth, truth_json, truths, vocabulary)
    extra = [image_id for image_id in preds if image_id not in truths]
    if extra:
        progress.say(
            f"{len(extra)} of {len(preds)} predictions have no truth and were not scored, such as "
            f"image {extra[0]}"
        )
    panoptic, semantic = PanopticScore(len(vocabulary)), SemanticScore(len(vocabulary))
    for image_id, real in progress.track(truths.items(), "score", len(truths)):
        found = preds[image_id]
        height, width = _size(truth, images, image_id)
        truth_map = _read_map(truth_part, real, image_id, height, width)
        pred_map = _read_map(pred_part, found, image_id, height, width)
        panoptic.add(pred_map, found.labels, truth_map, real.labels, real.crowd)
        semantic.add(class_map(pred_map, found.labels), class_map(truth_map, real.labels))
    base = {"setting": "generalised", "mode": None, "semantic_from": "panoptic"}
    base |= {"predictions": str(predictions), "truth": str(truth), "not_scored": len(extra)}
    return make_report(
        vocabulary,
        panoptic,
        semantic,
        split=split,
        protocol=base | dict(protocol or {}),
        images=len(truths),
        seconds={"total": time.perf_counter() - start},
        divided=unseen is not None,
    )


def png_part(json_path: Path, pngs: Path | None) -> Part:
    """The JSON and its PNG folder; UserError where one of them is missing."""
    if not json_path.is_file():
        raise UserError(f"There is no file {json_path}.", "Check the path.")
    folder = pngs or json_path.with_suffix("")
    if not folder.is_dir():
        raise UserError(
            f"There is no folder {folder} with the PNGs of {json_path}.",
            "Name it with --predictions-dir or --truth-dir.",
        )
    return Part(images=folder, json=json_path, pngs=folder)


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
    truths: Mapping[int, _Entry],
    vocabulary: Vocabulary,
) -> dict[int, _Entry]:
    """The prediction JSON's entries, checked against the truth as a whole."""
    raw = _read_predictions(path)
    named = _check_categories(path, raw, truth_path, truth_json)
    _check_known(path, raw["annotations"], truth_path, vocabulary)
    preds = _entries(path, raw["annotations"], vocabulary)
    missing = [image_id for image_id in truths if image_id not in preds]
    if missing:
        raise UserError(
            f"{path} has no prediction for {len(missing)} of the {len(truths)} images of "
            f"{truth_path}, such as image {missing[0]}.",
            "Predict every image; one without segments has an empty `segments_info`.",
        )
    said = {int(label) for entry in preds.values() for label in entry.labels}
    real = {int(label) for entry in truths.values() for label in entry.labels}
    if said and real and not said & real and not named:
        raise UserError(
            f"No category id of {path} occurs in the segments of {truth_path}: PQ would be 0.",
            "Write the data set's category ids, not class indices; or add the `categories` that "
            "you mean to the predictions.",
        )
    return preds


def _read_predictions(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}).", _FORMAT_HINT) from error
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.", "Check its rights.") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("annotations"), list):
        raise UserError(f"{path} has no list `annotations`.", _FORMAT_HINT)
    return raw


def _check_categories(
    path: Path, raw: dict[str, Any], truth_path: Path, truth_json: dict[str, Any]
) -> bool:
    """True where the predictions name their categories and mean the same as the truth by them."""
    names = {c["id"]: c["name"] for c in truth_json["categories"]}
    try:
        own = {c["id"]: c["name"] for c in raw.get("categories") or []}
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: a category has no id or name.", _FORMAT_HINT) from error
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
        for segment in _segments(path, annotation):
            said.add(segment["category_id"])
    unknown = said - vocabulary.index_of_id.keys()
    if unknown:
        which = "None" if unknown == said else "Not every"
        shown = ", ".join(map(str, sorted(unknown, key=str)[:5]))
        raise UserError(
            f"{which} category id of {path} is known to {truth_path}: it lacks {shown}.",
            "Write the data set's category ids, not class indices.",
        )


def _segments(path: Path, annotation: Any) -> list[dict[str, Any]]:
    """An annotation's segments_info, each with id and category_id; UserError otherwise."""
    try:
        segments = annotation["segments_info"]
        for segment in segments:
            _ = segment["id"], segment["category_id"]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path}: an annotation is incomplete ({error!r}).", _FORMAT_HINT
        ) from error
    return segments


def _entries(path: Path, annotations: Sequence[Any], vocabulary: Vocabulary) -> dict[int, _Entry]:
    """Annotations by image id, in file order."""
    entries: dict[int, _Entry] = {}
    for annotation in annotations:
        segments = _segments(path, annotation)
        image_id = annotation.get("image_id")
        if image_id is None or image_id in entries:
            what = "no image_id" if image_id is None else f"image {image_id} twice"
            raise UserError(f"{path}: an annotation has {what}.", _FORMAT_HINT)
        entries[image_id] = _entry(path, image_id, annotation, segments, vocabulary)
    return entries


def _entry(
    path: Path, image_id: int, annotation: Any, segments: list[Any], vocabulary: Vocabulary
) -> _Entry:
    ids = np.array([s["id"] for s in segments], np.int64)
    if len(set(ids.tolist())) < len(ids) or (ids < 1).any() or (ids >= 1 << 24).any():
        raise UserError(
            f"{path}: image {image_id} has segment ids that are repeated or outside 1..2^24-1.",
            "0 is void in a panoptic PNG; each other id stands for one segment.",
        )
    unknown = {s["category_id"] for s in segments} - vocabulary.index_of_id.keys()
    if unknown:
        raise UserError(
            f"{path}: image {image_id} has segments of unknown category {sorted(unknown)}.",
            "Every category_id must be among the JSON's categories.",
        )
    return _Entry(
        str(annotation.get("file_name") or f"{image_id:012d}.png"),
        ids,
        np.array([vocabulary.index_of_id[s["category_id"]] for s in segments], np.int64),
        np.array([bool(s.get("iscrowd", 0)) for s in segments], bool),
    )


def _size(path: Path, images: Mapping[int, Any], image_id: int) -> tuple[int, int]:
    image = images.get(image_id)
    if image is None or "height" not in image or "width" not in image:
        raise UserError(
            f"{path} does not list image {image_id} with its height and width.",
            "Download or write the JSON again.",
        )
    return int(image["height"]), int(image["width"])


def _read_map(
    part: Part, entry: _Entry, image_id: int, height: int, width: int
) -> NDArray[np.int32]:
    """(H, W): 0 = void, i+1 = segment i of the entry; UserError where PNG and JSON disagree."""
    order = np.argsort(entry.ids)
    record = Record(
        image_id, "", entry.png_name, height, width, entry.ids[order], entry.labels, entry.crowd
    )
    sorted_map = read_segment_map(part, record)
    return np.concatenate([[0], order + 1]).astype(np.int32)[sorted_map]
