"""Reading COCO panoptic files that anybody may have written: what is wrong is said, not guessed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from concat_cli.core.data.image_io import read_id_png
from concat_cli.core.errors import UserError
from concat_cli.core.vocabulary import Vocabulary

FORMAT_HINT = (
    "A COCO panoptic JSON holds `annotations`: [{image_id, file_name, segments_info: "
    "[{id, category_id}]}]; that of the truth also `images` and `categories`."
)


@dataclass(frozen=True)
class Entry:
    """One annotation of a panoptic JSON: ids, class indices and crowd flags in its own order."""

    png_name: str
    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    crowd: NDArray[np.bool_]


@dataclass(frozen=True)
class PanopticFiles:
    """A panoptic JSON and the folder of its PNGs."""

    json: Path
    pngs: Path


def panoptic_files(json_path: Path, pngs: Path | None) -> PanopticFiles:
    """The JSON and its PNG folder (by default named like it); UserError where one is missing."""
    if not json_path.is_file():
        raise UserError(f"There is no file {json_path}.", "Check the path.")
    folder = pngs or json_path.with_suffix("")
    if not folder.is_dir():
        raise UserError(
            f"There is no folder {folder} with the PNGs of {json_path}.",
            "Name it with --predictions-dir or --truth-dir.",
        )
    return PanopticFiles(json_path, folder)


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """The object of a JSON file, in which each of the keys is a list; UserError otherwise."""
    try:
        raw = json.loads(path.read_bytes())
    except ValueError as error:  # also of bytes that are no text
        raise UserError(f"{path} is not valid JSON ({error}).", FORMAT_HINT) from error
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.", "Check its rights.") from error
    for key in keys:
        if not isinstance(raw, dict) or not isinstance(raw.get(key), list):
            raise UserError(f"{path} has no list `{key}`.", FORMAT_HINT)
    return raw


def category_names(path: Path, raw: Mapping[str, Any]) -> dict[int, str]:
    """Names by category id, none where the JSON says nothing of them; UserError if incomplete."""
    try:
        return {int(c["id"]): str(c["name"]) for c in raw.get("categories") or []}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: a category has no id or name.", FORMAT_HINT) from error


def read_truth(path: Path) -> dict[str, Any]:
    """A truth JSON with images, annotations, and categories that all differ."""
    raw = read_json(path, "images", "annotations", "categories")
    names = list(category_names(path, raw).values())
    if len(names) < len(raw["categories"]) or len(set(names)) < len(names):
        raise UserError(f"{path}: two categories have one id or one name.", FORMAT_HINT)
    return raw


def segments_of(path: Path, annotation: Any) -> list[dict[str, Any]]:
    """An annotation's segments_info, each with id and category_id; UserError otherwise."""
    try:
        segments = annotation["segments_info"]
        for segment in segments:
            _ = segment["id"], segment["category_id"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: an annotation is incomplete ({error!r}).", FORMAT_HINT) from error
    return segments


def read_entries(
    path: Path, annotations: Sequence[Any], vocabulary: Vocabulary
) -> dict[int, Entry]:
    """Annotations by image id, in file order."""
    entries: dict[int, Entry] = {}
    for annotation in annotations:
        segments = segments_of(path, annotation)
        image_id = annotation.get("image_id")
        if image_id is None or image_id in entries:
            what = "no image_id" if image_id is None else f"image {image_id} twice"
            raise UserError(f"{path}: an annotation has {what}.", FORMAT_HINT)
        entries[image_id] = _entry(path, image_id, annotation, segments, vocabulary)
    return entries


def _entry(
    path: Path, image_id: int, annotation: Any, segments: list[Any], vocabulary: Vocabulary
) -> Entry:
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
    return Entry(
        str(annotation.get("file_name") or f"{image_id:012d}.png"),
        ids,
        np.array([vocabulary.index_of_id[s["category_id"]] for s in segments], np.int64),
        np.array([bool(s.get("iscrowd", 0)) for s in segments], bool),
    )


def read_map(
    files: PanopticFiles, entry: Entry, image_id: int, size: tuple[int, int]
) -> NDArray[np.int32]:
    """(H, W): 0 = void, i+1 = segment i of the entry; UserError where PNG and JSON disagree."""
    path = files.pngs / entry.png_name
    found = read_id_png(path)
    if found.shape != size:
        raise UserError(
            f"{path} is {found.shape[1]} x {found.shape[0]} pixels, but the truth's JSON says "
            f"{size[1]} x {size[0]} for image {image_id}.",
            "JSON, PNG and image must belong together: download or write them again.",
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
            "JSON and PNG must belong together: download or write them again.",
        )
    return np.concatenate([[0], order + 1]).astype(np.int32)[place]
