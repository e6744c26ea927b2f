"""What a recipe finds on disk: parts of images and labels, still unread, in the data's own ids.

A recipe (`core/data/recipes/`) only looks at names and JSON files and returns a `Source`;
`prepare.py` reads it, checks it, cuts dev, and writes the index.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from concat_cli.core.vocabulary import Vocabulary

Task = Literal["panoptic", "semantic", "instance"]
PartName = Literal["train", "val"]
PARTS: tuple[PartName, ...] = ("train", "val")
Kind = Literal[
    "panoptic",
    "semantic",
    "things_over_stuff",
    "cityscapes",
    "instances",
    "instances_over_semantic",
]
Pixels = Literal["index", "ade_rg", "mat"]
KINDS, PIXELS = get_args(Kind), get_args(Pixels)


@dataclass(frozen=True)
class LabelFormat:
    """How the labels of a part are stored, as plain values that go into `dataset.json`.

    kind:
        "panoptic": PNGs of segment ids (R + 256 G + 65536 B), with the segments in the index.
        "semantic": maps of raw values, one segment a class.
        "things_over_stuff": `semantic` maps, with things from RGB PNGs laid over them
            (ADE20K's annotations_instance: R = raw thing class, G = instance, 0 = none).
        "cityscapes": 16-bit instanceIds: value // 1000 is the class from 1000 on, else the value;
            below 1000 a class of things is a group without instances: crowd.
        "instances": run-length masks in the index.
        "instances_over_semantic": the same, laid over `semantic` maps.
    pixels, of raw values: "index" (grey or palette, 8 or 16 bit, PNG or TIFF), "ade_rg"
        (R // 10 * 256 + G, ADE20K-Full's _seg.png), "mat" (MATLAB's LabelMap).
    table: raw value -> category id; a raw value that is in neither `table` nor `void` is an error.
    void: raw values without truth.
    things: raw class of a thing map -> category id for "things_over_stuff"; category id -> itself
        for "instances_over_semantic". Where the `semantic` map has one of these categories and no
        instance lies there, it is void.
    """

    kind: Kind
    pixels: Pixels = "index"
    table: Mapping[int, int] = field(default_factory=dict)
    void: tuple[int, ...] = ()
    things: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Segment:
    """One segment as a JSON lists it. `rle`: COCO run lengths or polygons, of instances alone."""

    id: int
    category_id: int
    crowd: bool = False
    rle: Any = None


@dataclass(frozen=True, slots=True)
class Item:
    """One image. Names are inside the part's stores, with "/".

    size: (height, width) where a JSON gives it; else it is read from the image.
    segments: where a JSON lists them; else they are found in the label's pixels.
    label: "" for kind "instances"; second_label: the thing map of "things_over_stuff".
    """

    image_id: int
    image: str
    label: str = ""
    second_label: str = ""
    size: tuple[int, int] | None = None
    segments: tuple[Segment, ...] | None = None


@dataclass(frozen=True)
class SourcePart:
    """One part.

    images, labels, second_labels: locations that `store.open_store` opens: a folder, "x.zip", or
        "x.zip!folder/inside"; labels is "" for kind "instances".
    listed_in: the JSON that lists segments or sizes, as errors name it.
    """

    images: str
    labels: str
    format: LabelFormat
    items: Iterable[Item]
    second_labels: str = ""
    listed_in: str = ""


@dataclass(frozen=True)
class Source:
    """A data set as it lies on disk.

    layout: the name of the layout that was found, said aloud ("official", "zips in place", ...).
    vocabulary: all classes with the data's own ids, seen and unseen not yet divided.
    tasks: what its truth can score. default_split: a name of `core/splits`.
    parts: train and val, or one of them where the other is missing.
    notes: what the user should know (missing optional files).
    single: the data may well have one part alone, which then serves as train and as val.
    """

    name: str
    layout: str
    vocabulary: Vocabulary
    tasks: tuple[Task, ...]
    parts: Mapping[PartName, SourcePart]
    default_split: str
    notes: tuple[str, ...] = ()
    single: bool = False
