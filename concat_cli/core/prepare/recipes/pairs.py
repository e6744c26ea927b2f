"""Photos and label maps that belong together by their names, in two folders or in one.

A place may end in a pattern, `masks/*_mask.png`: then what stands for the * is a name.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import PurePosixPath

from concat_cli.core.data.coco import Item
from concat_cli.core.data.store import SUFFIXES, open_store
from concat_cli.core.errors import UserError
from concat_cli.core.prepare.recipes.layouts import hashed

_LABELS = (".png", ".tif", ".tiff", ".mat")
_PHOTOS = tuple(SUFFIXES)
_JPEGS = (".jpg", ".jpeg", ".jfif")
_PATTERN = re.compile(r"^(?:(.*)[/!])?([^/!]*\*[^/!]*)$")


def split_pattern(place: str) -> tuple[str, str]:
    """A place without its pattern, and the pattern, "" where there is none."""
    match = _PATTERN.match(place)
    return (match[1] or "", match[2]) if match else (place, "")


@dataclass(frozen=True)
class Pairs:
    """Where the photos and the label maps of a part are, each with its pattern or ""."""

    images: str
    image_pattern: str
    labels: str
    label_pattern: str

    def label_of(self, items: list[Item]) -> dict[str, str]:
        """Image -> its label map, of those that have one; UserError where none has, or two labels
        have one name."""
        found = self._labels()
        pairs = {
            item.image: label
            for item in items
            if (label := found.get(self._name(item.image)) or found.get(item.image))
        }
        if items and not pairs:
            raise self._nothing(items[0].image, found)
        return pairs

    def items(self) -> list[Item]:
        """The photos, with ids by `numbered_items`."""
        every = open_store(self.images).names()
        names = [n for n in every if n.lower().endswith(_PHOTOS) and _key(n, self.image_pattern)]
        if self.labels == self.images:
            labels = set(self._labels().values())
            names = [name for name in names if name not in labels]
        return numbered_items(names)

    def _name(self, image: str) -> str:
        return _key(image, self.image_pattern) or _stem(image)

    def _labels(self) -> dict[str, str]:
        """Name -> label map; beside the photos, without patterns, a PNG or TIFF is one where there
        is a photo of its name with another ending."""
        every = open_store(self.labels).names()
        names = [name for name in every if name.lower().endswith(_LABELS)]
        if self.labels == self.images and not self.label_pattern and not self.image_pattern:
            photos = {
                _stem(name)
                for name in every
                if name.lower().endswith(tuple(SUFFIXES.difference(_LABELS)))
            }
            names = [name for name in names if _stem(name) in photos]
        keyed = [(_key(name, self.label_pattern), name) for name in names]
        counts = Counter(key for key, _ in keyed)
        twice = [name for key, name in keyed if key and counts[key] > 1]
        if twice:
            raise UserError(
                f"{self.labels} has {' and '.join(twice[:2])}.", "Keep one label an image."
            )
        return {key: name for key, name in keyed if key}

    def _nothing(self, image: str, found: dict[str, str]) -> UserError:
        """What the folder holds, where no label is named like an image."""
        every = open_store(self.labels).names()
        jpegs = [name for name in every if name.lower().endswith(_JPEGS)]
        if jpegs and not found and self.labels != self.images:
            return UserError(
                f"The label maps in {self.labels} are JPEGs ({jpegs[0]} and {len(jpegs) - 1} more):"
                " JPEG changes values at every edge, so that classes cannot be read from them.",
                "Export the masks as PNG.",
            )
        names = list(found.values()) or every
        some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        what = f"No label map in {self.labels} is named like its image ({image}): it holds "
        stem = PurePosixPath(image).stem
        like = next((PurePosixPath(n).name for n in names if stem in PurePosixPath(n).name), "")
        pattern = like.replace(stem, "*", 1) if like else "*_mask.png"
        return UserError(
            f"{what}{some or 'no PNG, TIFF or MAT file'}.",
            f"Say how they are named: --labels '.../{pattern}', where * stands for the name.",
        )


def numbered_items(names: list[str]) -> list[Item]:
    """Photos of these names. Ids: the number that a name is, if all are; else a hash of it, so that
    an image keeps its id, and its part, when others are added."""
    own = [PurePosixPath(name).stem for name in names]
    if all(stem.isdecimal() for stem in own) and len({int(stem) for stem in own}) == len(own):
        return [Item(int(stem), name) for stem, name in zip(own, names, strict=True)]
    return [Item(hashed(_stem(name).replace("/", "-")), name) for name in names]


def _key(name: str, pattern: str) -> str:
    """The name that a file stands for, with its folder: what the * of the pattern stands for, by
    default all but the ending; "" of a file that does not follow the pattern."""
    if not pattern:
        return _stem(name)
    folder, slash, base = name.rpartition("/")
    before, _, after = pattern.partition("*")
    base = base if PurePosixPath(pattern).suffix else PurePosixPath(base).stem
    if len(base) <= len(before) + len(after) or not base.startswith(before):
        return ""
    return f"{folder}{slash}{base[len(before) : len(base) - len(after)]}" * base.endswith(after)


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))
