"""A prepared data set on disk -> decoded `Sample`s. Data-set ids end here; above: class indices."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from concat_cli.core.data.coco_json import read_panoptic_json, read_records
from concat_cli.core.data.image_io import read_image
from concat_cli.core.data.index import Record, Records
from concat_cli.core.data.labels import TOGETHER, LabelReader
from concat_cli.core.data.source import KINDS, PIXELS, LabelFormat
from concat_cli.core.data.store import Store, open_store
from concat_cli.core.errors import UserError
from concat_cli.core.vocabulary import Vocabulary

FORMATS = (1, 2)  # 1: parts are COCO panoptic files, which the built-in world is drawn as
FORMAT = 2  # what `prepare` writes
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
    """Where the images and the labels of one part (train, dev, val) are, and what lists them.

    images, labels, second_labels: locations: a folder, "x.zip" or "x.zip!folder/inside".
    index: a file of JSON lines (`index.py`), or a COCO panoptic JSON (.json).
    """

    images: Path
    index: Path
    labels: Path
    format: LabelFormat = field(default_factory=lambda: LabelFormat("panoptic"))
    second_labels: Path | None = None

    @cached_property
    def image_store(self) -> Store:
        """The images."""
        return open_store(self.images)

    @cached_property
    def reader(self) -> LabelReader:
        """What decodes the labels."""
        second = "" if self.second_labels is None else str(self.second_labels)
        return LabelReader(self.format, str(self.labels), second)

    def records(self, vocabulary: Vocabulary) -> Sequence[Record]:
        """The images in the order of the index; UserError where it is missing or damaged."""
        if not self.index.is_file():
            raise UserError(f"No annotation file {self.index}.", _AGAIN)
        if self.index.suffix == ".json":
            return read_records(self.index, vocabulary)
        return Records(self.index, vocabulary)


@dataclass(frozen=True)
class DatasetInfo:
    """What `dataset.json` says: where the parts are and which classes are seen.

    tasks: what its truth can score: "panoptic", "semantic", "instance".
    protocol: what was done to unseen pixels of train and dev ("unseen_pixels": "drop" | "void"),
        and how many images, segments and pixels that took away.
    """

    root: Path
    name: str
    class_split: str
    vocabulary: Vocabulary
    parts: dict[str, Part]
    source: dict[str, Any]
    tasks: tuple[str, ...] = ("panoptic", "semantic", "instance")
    protocol: dict[str, Any] = field(default_factory=dict)

    def part(self, name: str) -> Part:
        """The part of that name; UserError where the data set has none."""
        if name not in self.parts:
            have = ", ".join(self.parts) or "none"
            raise UserError(
                f"The data set {self.root} has no part {name!r} (it has: {have}).",
                _AGAIN,
            )
        return self.parts[name]


def read_dataset_info(root: Path | str) -> DatasetInfo:
    """Reads and checks `root/dataset.json`; UserError with the command that makes it if missing."""
    root = Path(root)
    path = root / "dataset.json"
    if not path.is_file():
        raise UserError(f"No prepared data set at {root} (no {path}).", _MAKE.format(root))
    raw = _read_json(path)
    try:
        if raw["format"] not in FORMATS:
            known = " or ".join(map(str, FORMATS))
            what = f"{path} has format {raw['format']}, not {known}."
            raise UserError(what, _MAKE.format(root))
        old = raw["format"] == 1
        parts = {
            str(name): _coco_part(root, part) if old else _read_part(root, part)
            for name, part in raw["parts"].items()
        }
        unseen = [str(name) for name in raw["unseen"]]
        name, split = str(raw["name"]), str(raw["class_split"])
        classes = None if old else _classes(raw["classes"])
        source = dict(raw.get("source", {}))
        tasks = DatasetInfo.tasks if old else tuple(raw["tasks"])
        protocol = dict(raw.get("protocol", {}) if old else raw["protocol"])
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise UserError(f"{path} is not a data set ({error!r}).", _MAKE.format(root)) from error
    _check_parts(path, parts)
    vocabulary = _categories(parts) if classes is None else classes
    unknown = sorted(set(unseen) - set(vocabulary.names))
    if unknown:
        raise UserError(f"{path} names unseen classes that it lacks: {unknown}.", _AGAIN)
    divided = vocabulary.with_unseen(unseen)
    return DatasetInfo(root, name, split, divided, parts, source, tasks, protocol)


def _classes(rows: list[dict[str, Any]]) -> Vocabulary:
    """The classes; TypeError or ValueError where one is not as `prepare` writes it."""
    vocabulary = Vocabulary.from_json(rows)
    for entry in vocabulary.entries:
        texts = entry.name, *entry.synonyms
        if type(entry.id) is not int or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"class {entry.name!r:.80} has no sound id and names")
        if entry.kind not in ("thing", "stuff") or not isinstance(entry.seen, bool):
            raise ValueError(f"class {entry.name!r:.80} is of no kind, or not said to be seen")
    for column in (vocabulary.ids, vocabulary.names):
        if len(set(column)) < len(column):
            raise ValueError("two classes have one id or name")
    return vocabulary


def _read_part(root: Path, raw: dict[str, Any]) -> Part:
    """A part as `prepare` writes it into `dataset.json`; places are relative to `root`."""
    fmt = raw["format"]
    second = raw.get("second_labels")
    values = [*map(int, fmt["table"]), *fmt["table"].values(), *fmt["void"]]
    if not all(type(value) is int and 0 <= value < 1 << 16 for value in values):
        raise ValueError("a value of its labels has more than 16 bits")
    if fmt["kind"] not in KINDS or fmt["pixels"] not in PIXELS:
        raise ValueError(f"labels of kind {fmt['kind']!r:.80} or pixels {fmt['pixels']!r:.80}")
    return Part(
        root / raw["images"],
        root / raw["index"],
        root / raw.get("labels", raw["images"]),  # kind "instances" has no label files
        LabelFormat(
            fmt["kind"],
            fmt["pixels"],
            {int(value): int(category) for value, category in fmt["table"].items()},
            tuple(int(value) for value in fmt["void"]),
            {int(value): int(category) for value, category in fmt["things"].items()},
        ),
        None if second is None else root / second,
    )


def _coco_part(root: Path, raw: dict[str, Any]) -> Part:
    return Part(root / raw["images"], root / raw["json"], root / raw["pngs"])


def _check_parts(path: Path, parts: dict[str, Part]) -> None:
    if not parts:
        raise UserError(f"{path} lists no parts.", _AGAIN)
    for part in parts.values():
        if not os.path.isfile(part.index):  # noqa: PTH113 - unlike Path's, False of impossible names
            raise UserError(f"{path} points to {part.index}, which is missing.", _AGAIN)


def _categories(parts: dict[str, Part]) -> Vocabulary:
    """Classes from the smallest of the parts' JSON files (all list the same categories)."""
    smallest = min((part.index for part in parts.values()), key=lambda p: p.stat().st_size)
    return Vocabulary.from_categories(read_panoptic_json(smallest)["categories"])


def read_segment_map(part: Part, record: Record) -> np.ndarray:
    """(H, W) int32: 0 = void, i + 1 = the record's segment i; see `LabelReader.segment_map`."""
    return part.reader.segment_map(record, part.index)


def read_sample(part: Part, record: Record, keep_crowd: bool = False) -> Sample:
    """Decodes one image and its segments; crowd segments become void unless `keep_crowd`."""
    file = part.image_store.file(record.file_name)
    image = read_image(file)
    segment_map = read_segment_map(part, record)
    if image.shape[:2] != segment_map.shape:
        raise UserError(
            f"{file} is {image.shape[1]} x {image.shape[0]} pixels, but "
            f"its label is {segment_map.shape[1]} x {segment_map.shape[0]}.",
            TOGETHER,
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
    """The samples of one part, decoded on demand, in the order of its index.

    Args:
        cache: keep decoded samples in memory (about H x W x 4 bytes each).
        keep_crowd: leave crowd segments in `segment_map` (for scoring) instead of making them void.
    """

    def __init__(
        self, part: Part, vocabulary: Vocabulary, cache: bool = False, keep_crowd: bool = False
    ) -> None:
        self.part = part
        self.vocabulary = vocabulary
        self.records = part.records(vocabulary)
        self._keep_crowd = keep_crowd
        self._cache: dict[int, Sample] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.records)

    def digest(self) -> str:
        """A digest of what the index says: files, segment ids and labels."""
        if isinstance(self.records, Records):
            return self.records.lines.digest()
        digest = hashlib.sha256()
        for record in self.records:
            digest.update(record.file_name.encode())
            digest.update(record.ids.tobytes() + record.labels.tobytes())
        return digest.hexdigest()

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
        json.dumps(raw, ensure_ascii=False).encode()  # ValueError where it holds half a character
    except FileNotFoundError as error:
        raise UserError(f"No file {path}.", "Check the path.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}).", "Get it, or write it, again.") from error
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.", "Check its rights.") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds a {type(raw).__name__}, not a JSON object.")
    return raw
