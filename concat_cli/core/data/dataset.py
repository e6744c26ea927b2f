"""A prepared data set on disk -> decoded `Sample`s. Data-set ids end here; above: class indices.

`dataset.json` names, for each part, where its images and its id maps are (COCO panoptic PNGs, in
folders or in zips) and what lists them: JSON lines (`index.py`), or in format 1, as which the built-in
world is drawn and which is easily written by hand, a COCO panoptic JSON.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter
from torch.utils.data import Dataset

from concat_cli.core.data.coco import read_coco, read_json
from concat_cli.core.data.image_io import read_image, segment_map, wrong_size
from concat_cli.core.data.index import AGAIN, Record, read_records
from concat_cli.core.data.store import Store, open_store
from concat_cli.core.errors import UserError
from concat_cli.core.vocabulary import ClassEntry, Vocabulary

FORMAT = 3  # what `prepare-data` writes; 2 is read where its labels were COCO panoptic PNGs
FORMATS = (1, 2, FORMAT)
_CLASSES = TypeAdapter(tuple[ClassEntry, ...])
_MAKE = (
    "Make it: `concat prepare-data shapes {0}` or `concat prepare-data coco ROOT --out {0}`; of your "
    "own photos and labels: `concat prepare-data custom ROOT --images PHOTOS --json FILE --out {0}`."
)


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
    """Where the images and the id maps of one part (train, dev, val) are, and what lists them.

    images, labels: locations: a folder, "x.zip" or "x.zip!folder/inside".
    index: a file of JSON lines (`index.py`), or a COCO panoptic JSON (.json).
    """

    images: Path
    index: Path
    labels: Path


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
    protocol: dict[str, Any] = field(default_factory=dict[str, Any])

    def part(self, name: str) -> Part:
        """The part of that name; UserError where the data set has none."""
        if name not in self.parts:
            have = ", ".join(self.parts) or "none"
            raise UserError(
                f"The data set {self.root} has no part {name!r} (it has: {have}).", AGAIN
            )
        return self.parts[name]


def read_dataset_info(root: Path | str) -> DatasetInfo:
    """Reads and checks `root/dataset.json`; UserError with the command that makes it where it is
    missing, or that prepares the data again where it was written by an earlier version."""
    root = Path(root)
    path = root / "dataset.json"
    if not path.is_file():
        raise UserError(f"No prepared data set at {root} (no {path}).", _MAKE.format(root))
    raw = read_json(path)
    try:
        json.dumps(raw, ensure_ascii=False).encode()  # ValueError where it holds half a character
        if raw["format"] not in FORMATS:
            known = ", ".join(map(str, FORMATS))
            what = f"{path} has format {raw['format']}, not one of {known}."
            raise UserError(what, _MAKE.format(root))
        coco = raw["format"] == 1
        if raw["format"] == 2 and not all(map(_is_panoptic, raw["parts"].values())):
            what = f"{path} is of an earlier version, whose labels are no longer read as they lie."
            raise UserError(what, f"Prepare it again: {_command(raw, root)}.")
        index, labels = ("json", "pngs") if coco else ("index", "labels")
        parts = {
            str(name): Part(root / part["images"], root / part[index], root / part[labels])
            for name, part in raw["parts"].items()
        }
        unseen = [str(name) for name in raw["unseen"]]
        classes = () if coco else _CLASSES.validate_json(json.dumps(raw["classes"]), strict=True)
        info = DatasetInfo(
            root,
            str(raw["name"]),
            str(raw["class_split"]),
            Vocabulary(classes),
            parts,
            dict(raw.get("source", {})),
            DatasetInfo.tasks if coco else tuple(raw["tasks"]),
            dict(raw.get("protocol", {}) if coco else raw["protocol"]),
        )
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise UserError(f"{path} is not a data set ({error!r}).", _MAKE.format(root)) from error
    if not parts:
        raise UserError(f"{path} lists no parts.", AGAIN)
    for part in parts.values():
        if not os.path.isfile(part.index):  # noqa: PTH113 - unlike Path's, False of impossible names
            raise UserError(f"{path} points to {part.index}, which is missing.", AGAIN)
    vocabulary = info.vocabulary
    if coco:  # all JSON files list the same classes
        smallest = min((part.index for part in parts.values()), key=lambda file: file.stat().st_size)
        vocabulary = Vocabulary.from_categories(read_coco(smallest, "panoptic").categories)
    if min(len(vocabulary.index_of_id), len(vocabulary.index_of_name)) < len(vocabulary):
        raise UserError(f"{path} has two classes of one id or name.", AGAIN)
    unknown = sorted(set(unseen) - set(vocabulary.names))
    if unknown:
        raise UserError(f"{path} names unseen classes that it lacks: {unknown}.", AGAIN)
    return replace(info, vocabulary=vocabulary.with_unseen(unseen))


def _is_panoptic(part: Mapping[str, Any]) -> bool:
    """Whether the labels of a part of format 2 are id maps that lie in no zip within a zip."""
    return part["format"]["kind"] == "panoptic" and str(part["labels"]).count(".zip!") < 2


def _command(raw: Mapping[str, Any], root: Path) -> str:
    """The command that prepares a data set of format 2 again."""
    name, number = re.findall(r"(?s)^(.*?)(?:-(\d+))?$", str(raw["name"]))[0]
    known = "coco coco-stuff coco-instances voc pascal-context ade20k cityscapes".split()
    words = ["concat", "prepare-data", name if name in known else "custom", str(raw["source"]["root"])]
    words += ["--classes", number] if number else []
    words += ["--class-split", str(raw["class_split"]), "--out", str(root)]
    words += ["--unseen-pixels", str(raw["protocol"]["unseen_pixels"])]
    return f"`{shlex.join(words)}`, with the other options that it was made with"


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
        self.records = read_records(part.index, vocabulary)
        self._keep_crowd = keep_crowd
        self._cache: dict[int, Sample] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.records)

    def digest(self) -> str:
        """A digest of what the index says: files, segment ids and labels."""
        return self.records.digest()

    def __getitem__(self, index: int) -> Sample:
        if self._cache is None:
            return self._read(self.records[index])
        if index not in self._cache:
            sample = self._read(self.records[index])
            small = np.min_scalar_type(len(sample.labels))  # uint8 up to 255 segments
            self._cache[index] = replace(sample, segment_map=sample.segment_map.astype(small))
        sample = self._cache[index]
        return replace(sample, segment_map=sample.segment_map.astype(np.int32))

    @cached_property
    def _stores(self) -> tuple[Store, Store]:
        """The images and the id maps."""
        return open_store(self.part.images), open_store(self.part.labels)

    def _read(self, record: Record) -> Sample:
        images, labels = self._stores
        file = images.file(record.file_name)
        image = read_image(file, record.upright, record.white)
        numbers = segment_map(labels.file(record.label_name), record, self.part.index)
        if image.shape[:2] != numbers.shape:
            raise wrong_size(file, image.shape, numbers.shape, "its label is")
        sample = Sample(
            image, numbers, record.labels, record.crowd, record.image_id, record.file_name
        )
        return sample if self._keep_crowd else keep_segments(sample, ~record.crowd)


def training_part(info: DatasetInfo, cache: bool = False) -> PanopticDataset:
    """The train part; UserError where nothing can be learnt from it. cache: of `PanopticDataset`."""
    train = PanopticDataset(info.part("train"), info.vocabulary, cache)
    if all(record.crowd.all() for record in train.records):
        crowds = sum(len(record.crowd) for record in train.records)
        only = f"its {crowds} segments are crowds" if crowds else "it has no segment"
        raise UserError(
            f"There is nothing to learn in {train.part.index}: {only}.",
            "Crowds are groups that nobody divided. If each is one object, prepare the data again "
            "with `concat prepare-data custom ... --crowds objects`."
            if crowds
            else AGAIN,
        )
    return train
