"""The two usual layouts: images beside label maps of the same stem, and COCO panoptic JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from concat_cli.core.data.coco_json import read_panoptic_json
from concat_cli.core.data.recipes.places import (
    Look,
    Piece,
    digits,
    first_file,
    first_folder,
    listed,
    stems,
)
from concat_cli.core.data.source import Item, LabelFormat, PartName, Segment, SourcePart, Task
from concat_cli.core.errors import UserError

_SAME: Mapping[PartName, str] = {"train": "train", "val": "val"}
NAMED: Mapping[PartName, str] = {"train": "training", "val": "validation"}


@dataclass(frozen=True)
class PairLayout:
    """Images and label maps that share a stem.

    Places hold "{part}", for which the layout's own word stands; the first that exists counts.

    image_end, label_end: what follows the stem in the two names. but: ends of other files there.
    second: places of a second label map of the same stem and ".png".
    lists: files that name the part's stems; without them every label map counts.
    number: stem -> image id.
    """

    name: str
    images: tuple[str, ...]
    labels: tuple[str, ...]
    format: LabelFormat
    image_end: str = ".jpg"
    label_end: str = ".png"
    but: tuple[str, ...] = ()
    second: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()
    words: Mapping[PartName, str] = field(default_factory=lambda: _SAME)
    number: Callable[[str], int] = digits
    tasks: tuple[Task, ...] = ("semantic",)

    def look(self, bases: Sequence[str], part: PartName) -> Look:
        """What there is of a part. A label without an image stays, so that checking names it; but
        where no label at all has its image, the part is not there."""
        images = self._piece(bases, "images", part, self.images)
        pieces = [images, self._piece(bases, "labels", part, self.labels)]
        if self.second:
            pieces.append(self._piece(bases, "instances", part, self.second))
        if self.lists:
            pieces.append(self._piece(bases, "list", part, self.lists))
        begun = bool(images.found) and all("{part}" in place for place in self.images)
        if not all(piece.found for piece in pieces):
            return Look(tuple(pieces), None, begun)
        found = {piece.kind: piece.found for piece in pieces}
        labelled = stems(found["labels"], self.label_end, self.but)
        names = listed(found["list"]) if self.lists else labelled
        if {*labelled}.isdisjoint(stems(found["images"], self.image_end)) or not names:
            wanted = f"*{self.label_end} with an image of that name in {found['labels']}"
            pieces[1] = Piece("labels", part, (wanted,))
            return Look(tuple(pieces), None, begun)
        return Look(tuple(pieces), self._part(found, names), begun)

    def _piece(
        self, bases: Sequence[str], kind: str, part: PartName, places: tuple[str, ...]
    ) -> Piece:
        looked = tuple(dict.fromkeys(place.format(part=self.words[part]) for place in places))
        find = first_file if kind == "list" else first_folder
        return Piece(kind, part, looked, find(bases, looked))

    def _part(self, found: dict[str, str], names: list[str]) -> SourcePart:
        items = [
            Item(
                image_id=self.number(name),
                image=name + self.image_end,
                label=name + self.label_end,
                second_label=f"{name}.png" if self.second else "",
            )
            for name in names
        ]
        return SourcePart(
            found["images"], found["labels"], self.format, items, found.get("instances", "")
        )


@dataclass(frozen=True)
class PanopticLayout:
    """A COCO panoptic JSON and its folder of id PNGs.

    category: an entry of the JSON's `categories` -> the class's id here, None if there is none.
    image: an entry of the JSON's `images` -> the image's name below `images`.
    number: the JSON's image id, as text -> image id.
    """

    name: str
    images: tuple[str, ...]
    json: tuple[str, ...]
    pngs: tuple[str, ...]
    category: Callable[[dict[str, Any]], int | None]
    image: Callable[[dict[str, Any]], str]
    words: Mapping[PartName, str] = field(default_factory=lambda: _SAME)
    number: Callable[[str], int] = digits
    tasks: tuple[Task, ...] = ("panoptic", "semantic", "instance")

    def look(self, bases: Sequence[str], part: PartName) -> Look:
        """What there is of a part; UserError where its JSON is no panoptic JSON of this data.

        In places, "{part}" is train or val, and "{word}" the layout's own word for it.
        """
        looked = {
            kind: tuple(name.format(part=part, word=self.words[part]) for name in names)
            for kind, names in (("images", self.images), ("labels", self.pngs), ("json", self.json))
        }
        pieces = tuple(
            Piece(kind, part, names, (first_file if kind == "json" else first_folder)(bases, names))
            for kind, names in looked.items()
        )
        if not all(piece.found for piece in pieces):
            return Look(pieces, None)
        images, labels, path = (piece.found for piece in pieces)
        form = LabelFormat("panoptic")
        return Look(pieces, SourcePart(images, labels, form, self._items(path), listed_in=path))

    def _items(self, path: str) -> list[Item]:
        raw = read_panoptic_json(path)
        try:
            ids = {row["id"]: self._category(path, row) for row in raw["categories"]}
            images = {row["id"]: row for row in raw["images"]}
            return [self._item(row, images[row["image_id"]], ids) for row in raw["annotations"]]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{path} is no panoptic JSON of this data set ({error!r}).",
                "Write it again with the script that made it.",
            ) from error

    def _category(self, path: str, row: dict[str, Any]) -> int:
        found = self.category(row)
        if found is None:
            raise UserError(
                f"{path} lists the category {row.get('name')!r} (id {row['id']}), which this data "
                "set does not have.",
                "Write it again with the script that made it.",
            )
        return found

    def _item(self, row: dict[str, Any], image: dict[str, Any], ids: dict[Any, int]) -> Item:
        return Item(
            image_id=self.number(str(image["id"])),
            image=self.image(image),
            label=str(row["file_name"]),
            size=(int(image["height"]), int(image["width"])),
            segments=tuple(
                Segment(int(s["id"]), ids[s["category_id"]], bool(s.get("iscrowd", 0)))
                for s in row["segments_info"]
            ),
        )
