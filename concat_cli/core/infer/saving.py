"""Predictions or truth of a whole data set on disk, image by image; nothing of it stays in memory.

OUT/panoptic.json, OUT/panoptic/NAME.png    COCO panoptic: ids in R + 256 G + 65536 B
OUT/semantic/NAME.png                       grey PNG of the data set's category ids, of 8 bits where
                                            all ids fit, else of 16
OUT/instances.json                          COCO results: [{image_id, category_id, score, bbox,
                                            segmentation (compressed run lengths)}]
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from concat_cli.core import files
from concat_cli.core.data.image_io import write_id_png
from concat_cli.core.infer.files import JSON_NAME, SEMANTIC, categories, write_semantic_png
from concat_cli.core.infer.instances import Instance, bounding_box
from concat_cli.core.infer.spool import Spool, Spooled, in_order, joined
from concat_cli.core.vocabulary import Vocabulary

INSTANCES_NAME = "instances.json"


class Saver:
    """Writes what is handed over; `finish` makes the JSON files of what all processes wrote."""

    def __init__(self, out: Path, vocabulary: Vocabulary, rank: int = 0) -> None:
        self.out, self.vocabulary, self.rank = out, vocabulary, rank
        self._spools: dict[str, Spool] = {}

    def panoptic(
        self,
        image_id: int,
        file_name: str,
        panoptic_map: NDArray[np.integer],
        segments_info: list[dict[str, Any]],
    ) -> None:
        """A panoptic map (H, W) of segment ids, 0 = void, and what COCO says of its segments."""
        png = self.out / Path(JSON_NAME).stem / f"{flat_name(file_name)}.png"
        write_id_png(png, panoptic_map)
        height, width = panoptic_map.shape
        image = {"id": image_id, "file_name": file_name, "height": height, "width": width}
        self._spool("images", image_id, image)
        annotation = {"image_id": image_id, "file_name": png.name, "segments_info": segments_info}
        self._spool("annotations", image_id, annotation)

    def semantic(self, file_name: str, semantic_map: NDArray[np.integer]) -> None:
        """A semantic map (H, W) of class indices; UserError where ids need more than 16 bits."""
        path = self.out / SEMANTIC / f"{flat_name(file_name)}.png"
        write_semantic_png(path, semantic_map, self.vocabulary)

    def instances(self, image_id: int, found: Sequence[Instance]) -> None:
        """The instances of an image."""
        for one in found:
            rle = one.rle | {"counts": one.rle["counts"].decode("ascii")}
            value = {
                "image_id": image_id,
                "category_id": self.vocabulary.ids[one.class_index],
                "score": round(one.score, 6),
                "bbox": bounding_box(one.rle),
                "segmentation": rle,
            }
            self._spool("instances", image_id, value)
        if not found:  # so that the file is there
            self._open("instances")

    def state(self) -> dict[str, Spooled]:
        """What this process wrote, for `finish`; nothing is added after."""
        return {name: spool.spooled() for name, spool in self._spools.items()}

    def finish(self, states: Iterable[dict[str, Spooled]]) -> None:
        """Writes the JSON files from what all processes wrote, and deletes the temporary ones."""
        parts = list(states)
        found = {
            name: [part[name] for part in parts if name in part]
            for name in ("images", "annotations", "instances")
        }
        try:
            if found["images"]:
                _write(self.out / JSON_NAME, _panoptic_json(found, self.vocabulary))
            if found["instances"]:
                texts = joined(in_order(found["instances"]))
                _write(self.out / INSTANCES_NAME, texts)
        finally:
            for spooled in (one for some in found.values() for one in some):
                spooled.path.unlink(missing_ok=True)

    def abandon(self) -> None:
        """Deletes this process's temporary files."""
        for spool in self._spools.values():
            spool.remove()

    def _open(self, name: str) -> Spool:
        if name not in self._spools:
            self._spools[name] = Spool(self.out, name, self.rank)
        return self._spools[name]

    def _spool(self, name: str, image_id: int, value: dict[str, Any]) -> None:
        self._open(name).add(image_id, value)


def flat_name(file_name: str) -> str:
    """A file name without folders and ending: `town/0001.jpg` -> `town_0001`."""
    return Path(file_name).with_suffix("").as_posix().replace("/", "_")


def _panoptic_json(found: dict[str, list[Spooled]], vocabulary: Vocabulary) -> Iterator[str]:
    yield '{"images": '
    yield from joined(in_order(found["images"]))
    yield ', "annotations": '
    yield from joined(in_order(found["annotations"]))
    yield f', "categories": {json.dumps(categories(vocabulary), ensure_ascii=False)}}}'


def _write(path: Path, pieces: Iterator[str]) -> None:
    with files.atomic_path(path) as temp, temp.open("w", encoding="utf-8") as file:
        file.writelines(pieces)
        file.write("\n")
