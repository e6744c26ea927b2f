"""The pictures of scored files: their PNGs read again, over the photos where these are found."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from concat_cli.core.data.image_io import read_id_png, read_image
from concat_cli.core.data.store import Store, open_store
from concat_cli.core.errors import UserError
from concat_cli.core.evaluate.map_pairs import Drawn, numbered
from concat_cli.core.evaluate.page.pictures import Picture, picture_of
from concat_cli.core.evaluate.quality import IntArray
from concat_cli.core.progress import Progress

PHOTOS = (".jpg", ".jpeg", ".png", ".JPG")  # endings that are tried


class Photos:
    """The photos of a truth: in the folder that is named, else where a panoptic truth's
    `dataset.json` or COCO's layout has them. How many are not there is told at the end."""

    def __init__(self, truth: Path | None, folder: Path | None) -> None:
        guessed = [] if truth is None or folder is not None else list(_guessed(truth))
        self.stores = guessed if folder is None else [open_store(folder)]
        self.lacking = 0

    def picture(self, truth: Drawn, found: Drawn, name: str | None) -> Picture:
        """An image with its segments, by their PNGs."""
        return self.over((_numbered(truth), _numbered(found)), [name] if name else [])

    def over(self, maps: tuple[IntArray, IntArray], names: Sequence[str]) -> Picture:
        """An image with its true and its predicted segments, by their maps (H, W): i+1 = segment i.
        The photo has one of the names."""
        photo = self._photo(names, (maps[0].shape[0], maps[0].shape[1]))
        self.lacking += photo is None
        return picture_of(photo, *maps)

    def tell(self, progress: Progress) -> None:
        """Says so where photos were not found."""
        if self.lacking:
            where = ", ".join(map(str, self.stores)) or "beside the truth"
            progress.say(
                f"{self.lacking} images of the page have no photo of their size (looked in "
                f"{where}); --pictures names the folder"
            )

    def _photo(self, names: Sequence[str], size: tuple[int, int]) -> NDArray[np.uint8] | None:
        for store in self.stores:
            for one in dict.fromkeys((*names, *(PurePosixPath(name).name for name in names))):
                with contextlib.suppress(UserError):  # a name that leads elsewhere, a broken file
                    if store.stamp(one) is None:
                        continue
                    photo = read_image(store.file(one))
                    if photo.shape[:2] == size:
                        return photo
        return None


def photo_names(png: str) -> list[str]:
    """What the photo may be called that a semantic map belongs to."""
    return [str(PurePosixPath(png).with_suffix(ending)) for ending in PHOTOS]


def _guessed(truth: Path) -> Iterator[Store]:
    """Where the photos of a truth may lie."""
    root = truth.absolute().parent.parent
    places: list[Path] = []
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        parts = json.loads((root / "dataset.json").read_text(encoding="utf-8"))["parts"].values()
        of_truth = [one for one in parts if (root / one.get("json", "")).name == truth.name]
        places += [root / one["images"] for one in of_truth]
    places.append(root / truth.stem.removeprefix("panoptic_"))
    for place in dict.fromkeys(places):
        with contextlib.suppress(UserError):
            yield open_store(place)


def _numbered(one: Drawn) -> NDArray[np.int64]:
    """The map (H, W) of a PNG: i+1 = segment i of the JSON, 0 = none of them."""
    ids = read_id_png(one.png)
    numbers, _ = numbered(ids.ravel(), one, loose=True)
    numbers[numbers > len(one.listed.segments_info)] = 0
    return numbers.reshape(ids.shape)
