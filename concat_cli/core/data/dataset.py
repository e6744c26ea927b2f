"""A prepared data set on disk -> decoded `Sample`s. Data-set ids end here; above: class indices."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from concat_cli.core.data.image_io import read_id_png, read_image
from concat_cli.core.errors import UserError
from concat_cli.core.vocabulary import Vocabulary

FORMAT = 1
_MAKE = "Make it: `concat prepare-data shapes {0}` or `concat prepare-data coco ROOT --out {0}`."
_AGAIN = "Prepare the data set again with `concat prepare-data`."


@dataclass(frozen=True)
class Sample:
    """One decoded image with its segments.

    image: (H, W, 3) uint8 RGB. segment_map: (H, W) int32, 0 = void, i + 1 = segment i.
    labels: (N,) int64 class indices. crowd: (N,) bool, groups that are no single segment.
    """

    image: np.ndarray
    segment_map: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    image_id: int
    file_name: str


@dataclass(frozen=True)
class Part:
    """Where the images, the panoptic JSON and the id PNGs of one part (train, dev, val) are."""

    images: Path
    json: Path
    pngs: Path


@dataclass(frozen=True)
class DatasetInfo:
    """What `dataset.json` says: where the parts are and which classes are seen."""

    root: Path
    name: str
    class_split: str
    vocabulary: Vocabulary
    parts: dict[str, Part]
    source: dict[str, Any]

    def part(self, name: str) -> Part:
        """The part of that name; UserError where the data set has none."""
        if name not in self.parts:
            have = ", ".join(self.parts) or "none"
            raise UserError(
                f"The data set {self.root} has no part {name!r} (it has: {have}).",
                _AGAIN,
            )
        return self.parts[name]


@dataclass(frozen=True)
class Record:
    """One image of a panoptic JSON: ids (N,) int64 sorted, labels (N,) int64, crowd (N,) bool."""

    image_id: int
    file_name: str
    png_name: str
    height: int
    width: int
    ids: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray


def read_dataset_info(root: Path | str) -> DatasetInfo:
    """Reads and checks `root/dataset.json`; UserError with the command that makes it if missing."""
    root = Path(root)
    path = root / "dataset.json"
    if not path.is_file():
        raise UserError(f"No prepared data set at {root} (no {path}).", _MAKE.format(root))
    raw = _read_json(path)
    try:
        if raw["format"] != FORMAT:
            raise UserError(f"{path} has format {raw['format']}, not {FORMAT}.", _MAKE.format(root))
        parts = {
            str(name): Part(*(root / part[key] for key in ("images", "json", "pngs")))
            for name, part in raw["parts"].items()
        }
        unseen = [str(name) for name in raw["unseen"]]
        name, split = str(raw["name"]), str(raw["class_split"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a data set ({error!r}).", _MAKE.format(root)) from error
    vocabulary = _vocabulary(path, parts, unseen)
    return DatasetInfo(root, name, split, vocabulary, parts, dict(raw.get("source", {})))


def _vocabulary(path: Path, parts: dict[str, Part], unseen: list[str]) -> Vocabulary:
    """Classes from the smallest of the parts' JSON files (all list the same categories)."""
    if not parts:
        raise UserError(f"{path} lists no parts.", _AGAIN)
    for part in parts.values():
        if not part.json.is_file():
            raise UserError(f"{path} points to {part.json}, which is missing.", _AGAIN)
    smallest = min((part.json for part in parts.values()), key=lambda p: p.stat().st_size)
    vocabulary = Vocabulary.from_categories(read_panoptic_json(smallest)["categories"], unseen)
    unknown = sorted(set(unseen) - set(vocabulary.names))
    if unknown:
        raise UserError(f"{path} names unseen classes that {smallest} lacks: {unknown}.", _AGAIN)
    return vocabulary


def read_panoptic_json(path: Path) -> dict[str, Any]:
    """A COCO panoptic JSON with `images`, `annotations` and `categories`; UserError otherwise."""
    raw = _read_json(path)
    missing = [key for key in ("images", "annotations", "categories") if key not in raw]
    if missing:
        what = f"{path} is not a COCO panoptic JSON: it has no {' and no '.join(missing)}."
        raise UserError(what, "Give the file whose annotations hold `segments_info`.")
    for key, needed in (("categories", ("id", "name")), ("images", ("id", "file_name"))):
        for row in raw[key]:
            if not isinstance(row, dict) or any(name not in row for name in needed):
                raise UserError(f"{path}: an entry of {key} lacks {' or '.join(needed)}.")
    for column in ("id", "name"):
        values = [category[column] for category in raw["categories"]]
        if len(set(values)) < len(values):
            twice = next(v for v in values if values.count(v) > 1)
            raise UserError(f"{path}: two categories have the {column} {twice!r}.")
    return raw


def read_records(path: Path, vocabulary: Vocabulary) -> list[Record]:
    """The images of a panoptic JSON in its order, with class indices; UserError on a bad entry."""
    raw = read_panoptic_json(path)
    images = {image["id"]: image for image in raw["images"]}
    records: list[Record] = []
    for annotation in raw["annotations"]:
        try:
            image = images[annotation["image_id"]]
            records.append(_record(path, image, annotation, vocabulary))
        except (KeyError, TypeError, ValueError) as error:
            where = annotation.get("image_id") if isinstance(annotation, dict) else annotation
            raise UserError(
                f"{path}: the annotation of image {where} is incomplete or names an image that is "
                f"not listed ({error!r}).",
                "Download or write the JSON again.",
            ) from error
    if len({record.image_id for record in records}) < len(records):
        raise UserError(f"{path}: an image is annotated twice.", "Write the JSON again.")
    return records


def _record(path: Path, image: Any, annotation: Any, vocabulary: Vocabulary) -> Record:
    segments = sorted(annotation["segments_info"], key=lambda segment: segment["id"])
    ids = np.array([segment["id"] for segment in segments], dtype=np.int64)
    if len(ids) and (ids[0] < 1 or ids[-1] >= 1 << 24 or (np.diff(ids) == 0).any()):
        raise UserError(
            f"{path}: image {image['id']} has segment ids that are repeated or outside 1..2^24-1.",
            "0 is void in a panoptic PNG; each other id stands for one segment.",
        )
    unknown = {s["category_id"] for s in segments} - vocabulary.index_of_id.keys()
    if unknown:
        raise UserError(
            f"{path}: image {image['id']} has segments of unknown category {sorted(unknown)}.",
            "Every category_id must be among the JSON's categories.",
        )
    file_name = str(image["file_name"])
    return Record(
        image_id=int(image["id"]),
        file_name=file_name,
        png_name=str(annotation.get("file_name") or Path(file_name).with_suffix(".png").name),
        height=int(image["height"]),
        width=int(image["width"]),
        ids=ids,
        labels=np.array([vocabulary.index_of_id[s["category_id"]] for s in segments], np.int64),
        crowd=np.array([bool(s.get("iscrowd", 0)) for s in segments], bool),
    )


def read_segment_map(part: Part, record: Record) -> np.ndarray:
    """(H, W) int32: 0 = void, i + 1 = the record's segment i.

    UserError naming the PNG if it is missing, damaged, of another size, or its ids are not exactly
    those of the JSON.
    """
    path = part.pngs / record.png_name
    ids = read_id_png(path)
    if ids.shape != (record.height, record.width):
        raise UserError(
            f"{path} is {ids.shape[1]} x {ids.shape[0]} pixels, but {part.json} says "
            f"{record.width} x {record.height} for image {record.image_id}.",
            "JSON, PNG and image must belong together: download or write them again.",
        )
    known = np.concatenate([[0], record.ids]).astype(np.int32)
    segment_map = np.searchsorted(known, ids).astype(np.int32).clip(max=len(known) - 1)
    strange = ids[known[segment_map] != ids]
    unused = record.ids[np.bincount(segment_map.ravel(), minlength=len(known))[1:] == 0]
    if len(strange) or len(unused):
        side, which = ("JSON", strange[0]) if len(strange) else ("PNG", unused[0])
        raise UserError(
            f"{path} and {part.json} disagree on image {record.image_id}: "
            f"segment id {which} is not in the {side}.",
            "JSON and PNG must belong together: download or write them again.",
        )
    return segment_map


def read_sample(part: Part, record: Record, keep_crowd: bool = False) -> Sample:
    """Decodes one image and its segments; crowd segments become void unless `keep_crowd`."""
    image = read_image(part.images / record.file_name)
    segment_map = read_segment_map(part, record)
    if image.shape[:2] != segment_map.shape:
        raise UserError(
            f"{part.images / record.file_name} is {image.shape[1]} x {image.shape[0]} pixels, but "
            f"its panoptic PNG is {segment_map.shape[1]} x {segment_map.shape[0]}.",
            "Image and PNG must belong together: download them again.",
        )
    sample = Sample(
        image, segment_map, record.labels, record.crowd, record.image_id, record.file_name
    )
    return sample if keep_crowd else keep_segments(sample, ~record.crowd)


def keep_segments(sample: Sample, keep: np.ndarray) -> Sample:
    """The sample with only the segments where `keep` (N,) is true; the others become void."""
    if keep.all():
        return sample
    new = np.zeros(len(keep) + 1, dtype=np.int32)
    new[1:][keep] = np.arange(1, keep.sum() + 1)
    return replace(
        sample,
        segment_map=new[sample.segment_map],
        labels=sample.labels[keep],
        crowd=sample.crowd[keep],
    )


class PanopticDataset(Dataset[Sample]):
    """The samples of one part, decoded on demand, in the order of its JSON.

    Args:
        cache: keep decoded samples in memory (about H x W x 4 bytes each).
        keep_crowd: leave crowd segments in `segment_map` (for scoring) instead of making them void.
    """

    def __init__(
        self, part: Part, vocabulary: Vocabulary, cache: bool = False, keep_crowd: bool = False
    ) -> None:
        if not part.json.is_file():
            raise UserError(f"No annotation file {part.json}.", _AGAIN)
        self.part = part
        self.vocabulary = vocabulary
        self.records = read_records(part.json, vocabulary)
        self._keep_crowd = keep_crowd
        self._cache: dict[int, Sample] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        if self._cache is None:
            return read_sample(self.part, self.records[index], self._keep_crowd)
        if index not in self._cache:
            sample = read_sample(self.part, self.records[index], self._keep_crowd)
            small = np.min_scalar_type(len(sample.labels))  # uint8 up to 255 segments
            self._cache[index] = replace(sample, segment_map=sample.segment_map.astype(small))
        sample = self._cache[index]
        return replace(sample, segment_map=sample.segment_map.astype(np.int32))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"No file {path}.", "Check the path.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}).", "Write it again.") from error
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.", "Check its rights.") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds a {type(raw).__name__}, not a JSON object.")
    return raw
