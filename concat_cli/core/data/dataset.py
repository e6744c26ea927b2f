"""A prepared data set on disk -> decoded `Sample`s. Data-set ids end here; above: class indices.

`dataset.json` names, for each part, where its images and its id maps are (COCO panoptic PNGs, in
folders or in zips) and what lists them: JSON lines (`index.py`), or in format 1, as which the built-in
world is drawn and which is easily written by hand, a COCO panoptic JSON.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch.utils.data import Dataset

from concat_cli.core.data.class_split import class_split_names
from concat_cli.core.data.coco import read_coco
from concat_cli.core.data.image_io import TOGETHER, read_image, segment_map
from concat_cli.core.data.index import AGAIN, Record, Records, read_records
from concat_cli.core.data.store import Store, open_store
from concat_cli.core.errors import UserError
from concat_cli.core.vocabulary import Vocabulary

FORMAT = 3  # what `prepare-data` writes; 2 is read where its labels were COCO panoptic PNGs
FORMATS = (1, 2, FORMAT)
_MAKE = "Make it: `concat prepare-data shapes {0}` or `concat prepare-data coco ROOT --out {0}`."


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

    @cached_property
    def image_store(self) -> Store:
        """The images."""
        return open_store(self.images)

    @cached_property
    def label_store(self) -> Store:
        """The id maps."""
        return open_store(self.labels)

    def records(self, vocabulary: Vocabulary) -> Records:
        """The images in the order of the index; UserError where it is missing or damaged."""
        return read_records(self.index, vocabulary)


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
    raw = _read_json(path)
    try:
        if raw["format"] not in FORMATS:
            known = ", ".join(map(str, FORMATS))
            what = f"{path} has format {raw['format']}, not one of {known}."
            raise UserError(what, _MAKE.format(root))
        coco = raw["format"] == 1
        if raw["format"] == 2 and not all(map(_is_panoptic, raw["parts"].values())):
            what = f"{path} is of an earlier version, whose labels are no longer read as they lie."
            raise UserError(what, f"Prepare it again: `{_command(raw, root)}`.")
        index, labels = ("json", "pngs") if coco else ("index", "labels")
        parts = {
            str(name): Part(root / part["images"], root / part[index], root / part[labels])
            for name, part in raw["parts"].items()
        }
        unseen = [str(name) for name in raw["unseen"]]
        name, split = str(raw["name"]), str(raw["class_split"])
        classes = None if coco else _classes(raw["classes"])
        source = dict(raw.get("source", {}))
        tasks = DatasetInfo.tasks if coco else tuple(raw["tasks"])
        protocol = dict(raw.get("protocol", {}) if coco else raw["protocol"])
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise UserError(f"{path} is not a data set ({error!r}).", _MAKE.format(root)) from error
    _check_parts(path, parts)
    vocabulary = _categories(parts) if classes is None else classes
    unknown = sorted(set(unseen) - set(vocabulary.names))
    if unknown:
        raise UserError(f"{path} names unseen classes that it lacks: {unknown}.", AGAIN)
    divided = vocabulary.with_unseen(unseen)
    return DatasetInfo(root, name, split, divided, parts, source, tasks, protocol)


def _is_panoptic(part: Mapping[str, Any]) -> bool:
    """Whether the labels of a part of format 2 are id maps that lie in no zip within a zip."""
    return part["format"]["kind"] == "panoptic" and str(part["labels"]).count(".zip!") < 2


def _command(raw: Mapping[str, Any], root: Path) -> str:
    """The command that prepares a data set of format 2 again, with the same options."""
    protocol, split, name = raw["protocol"], str(raw["class_split"]), str(raw["name"])
    year = "2014" if "2014" in raw["parts"]["train"]["images"] else "2017"
    numbered = ["--classes", str(len(raw["classes"]))]
    semantic = ["--task", "semantic"] * (raw["tasks"] == ["semantic"])
    background = ["--background"] * any(row["name"] == "background" for row in raw["classes"])
    known = {  # name of the data set -> of its command, and its own options
        "coco": ["coco"],
        "coco-stuff": ["coco-stuff"],
        "coco-instances": ["coco-instances", "--year", year, *numbered],
        "voc": ["voc", *background],
        "pascal-context-59": ["pascal-context"],
        "pascal-context-459": ["pascal-context", *numbered],
        "ade20k-150": ["ade20k", *semantic],
        "ade20k-847": ["ade20k", *numbered],
        "cityscapes": ["cityscapes"],
    }
    name, *own = known.get(name, ["custom", "--images", "..."])
    own += ["--class-split", split if split in class_split_names() else f"{split}.yaml"]
    own += ["--unseen-pixels", protocol["unseen_pixels"]]
    train, dev = (raw["counts"][part]["images"] for part in ("train", "dev"))
    own += ["--dev", str(dev)] * (dev < train)  # else dev is a copy of a handful of images
    own += ["--skip-bad"] * bool(protocol["images_bad"])
    words = ["concat", "prepare-data", name, str(raw["source"]["root"]), *own, "--out", str(root)]
    return shlex.join(words)


def _classes(rows: list[dict[str, Any]]) -> Vocabulary:
    """The classes; TypeError or ValueError where one is not as `prepare-data` writes it."""
    vocabulary = Vocabulary.from_json(rows)
    for entry in vocabulary.entries:
        texts = entry.name, *entry.synonyms
        if type(entry.id) is not int or {type(text) for text in texts} != {str}:
            raise ValueError(f"class {entry.name!r:.80} has no sound id and names")
        if entry.kind not in ("thing", "stuff") or type(entry.seen) is not bool:
            raise ValueError(f"class {entry.name!r:.80} is of no kind, or not said to be seen")
    for column in (vocabulary.ids, vocabulary.names):
        if len(set(column)) < len(column):
            raise ValueError("two classes have one id or name")
    return vocabulary


def _check_parts(path: Path, parts: dict[str, Part]) -> None:
    if not parts:
        raise UserError(f"{path} lists no parts.", AGAIN)
    for part in parts.values():
        if not os.path.isfile(part.index):  # noqa: PTH113 - unlike Path's, False of impossible names
            raise UserError(f"{path} points to {part.index}, which is missing.", AGAIN)


def _categories(parts: dict[str, Part]) -> Vocabulary:
    """Classes from the smallest of the parts' JSON files (all list the same categories)."""
    smallest = min((part.index for part in parts.values()), key=lambda p: p.stat().st_size)
    return Vocabulary.from_categories(read_coco(smallest, "panoptic").categories)


def read_sample(part: Part, record: Record, keep_crowd: bool = False) -> Sample:
    """Decodes one image and its segments; crowd segments become void unless `keep_crowd`."""
    file = part.image_store.file(record.file_name)
    image = read_image(file)
    numbers = segment_map(part.label_store.file(record.label_name), record, part.index)
    if image.shape[:2] != numbers.shape:
        raise UserError(
            f"{file} is {image.shape[1]} x {image.shape[0]} pixels, but "
            f"its label is {numbers.shape[1]} x {numbers.shape[0]}.",
            TOGETHER,
        )
    sample = Sample(image, numbers, record.labels, record.crowd, record.image_id, record.file_name)
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
        return self.records.digest()

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
        raise UserError(
            f"{path} is not valid JSON ({error}).", "Get it, or write it, again."
        ) from error
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.", "Check its rights.") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds a {type(raw).__name__}, not a JSON object.")
    return cast("dict[str, Any]", raw)
