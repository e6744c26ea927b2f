"""What a recipe finds on disk: parts of images and labels, still unread, in the data's own ids.

A recipe (`recipes/`) only looks at names and JSON files and returns a `Source`; `run.py` reads it,
checks it, writes its labels as id maps where they are none, cuts dev, and writes the index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from concat_cli.core.data.coco import Item
from concat_cli.core.vocabulary import Vocabulary

Task = Literal["panoptic", "semantic", "instance"]
EVERY: tuple[Task, ...] = ("panoptic", "semantic", "instance")
PartName = Literal["train", "val"]
PARTS: tuple[PartName, ...] = ("train", "val")
UnseenPixels = Literal["drop", "void"]
Kind = Literal[
    "panoptic",
    "semantic",
    "things_over_stuff",
    "cityscapes",
    "instances",
    "instances_over_semantic",
]
Exif = Literal["", "turn", "stored"]  # "": upright, and sizes must be those of upright images
Pixels = Literal["index", "ade_rg", "mat", "colour"]


@dataclass(frozen=True)
class LabelFormat:
    """How the labels of a part are stored.

    kind:
        "panoptic": PNGs of segment ids (R + 256 G + 65536 B), with the segments in a JSON.
        "semantic": maps of raw values, one segment a class.
        "things_over_stuff": `semantic` maps, with things from RGB PNGs laid over them
            (ADE20K's annotations_instance: R = raw thing class, G = instance, 0 = none).
        "cityscapes": 16-bit instanceIds: value // 1000 is the class from 1000 on, else the value;
            below 1000 a class of things is a group without instances: crowd.
        "instances": masks in a JSON.
        "instances_over_semantic": the same, laid over `semantic` maps.
    pixels, of raw values: "index" (grey or palette, 8 or 16 bit, PNG or TIFF), "ade_rg"
        (R // 10 * 256 + G, ADE20K-Full's _seg.png), "mat" (MATLAB's LabelMap), "colour"
        (R + 256 G + 65536 B; also of a palette).
    table: raw value -> category id; a raw value that is in neither `table` nor `void` is an error.
    void: raw values without truth.
    things: raw class of a thing map -> category id for "things_over_stuff"; category id -> itself
        for "instances_over_semantic". Where the `semantic` map has one of these categories and no
        instance lies there, it is void.
    """

    kind: Kind
    pixels: Pixels = "index"
    table: Mapping[int, int] = field(default_factory=dict[int, int])
    void: tuple[int, ...] = ()
    things: Mapping[int, int] = field(default_factory=dict[int, int])


@dataclass(frozen=True)
class SourcePart:
    """One part.

    images, labels, second_labels: locations that `store.open_store` opens: a folder, "x.zip", or
        "x.zip!folder/inside"; labels is "" for kind "instances".
    listed_in: the JSON that lists segments or sizes, as errors name it.
    categories: those of that JSON, where it brings the classes.
    packed: image -> the JSON that holds it (labelme's `imageData`), or where it lies, if there are
        some that lie in no location: all are then written once.
    """

    images: str
    labels: str
    format: LabelFormat
    items: Iterable[Item]
    second_labels: str = ""
    listed_in: str = ""
    categories: Sequence[Mapping[str, Any]] = ()
    packed: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def where(self) -> str:
        """What lists its images."""
        return self.listed_in or self.images


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


@dataclass(frozen=True)
class Recipe:
    """A known data set: how its files are found, and what its command says.

    find: the folder of the data and options -> what is there; UserError that says what is missing.
        The options are those of the command, each with its help as `Annotated[type, help]`.
    options: a dataclass of them, where `find` takes its fields.
    unseen_pixels: what becomes of unseen classes in training images by default.
    single: one part alone serves as train and as val without being asked to.
    root: help of the folder.
    """

    name: str
    find: Callable[..., Source]
    help: str
    examples: tuple[str, ...]
    unseen_pixels: UnseenPixels = "void"
    single: bool = False
    options: type | None = None
    root: str = "Folder of the data, unpacked or with its zips."
