"""What was found in one picture, and the forms that it is wanted in elsewhere."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from concat_cli.core import files
from concat_cli.core.data.image_io import looked_up, write_id_png
from concat_cli.core.errors import UserError
from concat_cli.core.infer.instances import encoded
from concat_cli.core.infer.pictures import Picture, to_array
from concat_cli.core.infer.postprocess import Segment
from concat_cli.core.infer.render import overlay
from concat_cli.core.vocabulary import Vocabulary

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


@dataclass(frozen=True)
class Prediction:
    """What was found in one picture; plain values, which may be kept, pickled and sent.

    panoptic_map (H, W) int32: 0 = nothing, else a segment's id. milliseconds: load, model, post.
    is_panoptic: False where the model tells no segments apart: then a segment is all that is of one
    class. image (H, W, 3) uint8: the picture; of an RGB array that was given, no copy.
    """

    panoptic_map: NDArray[np.int32]
    segments: tuple[Segment, ...]
    vocabulary: Vocabulary
    milliseconds: dict[str, float]
    is_panoptic: bool = True
    _semantic: NDArray[np.int32] | None = field(default=None, repr=False)
    image: NDArray[np.uint8] | None = field(default=None, repr=False)

    @property
    def semantic_map(self) -> NDArray[np.int32]:
        """(H, W) int32 class index of every pixel; UserError where it was declined."""
        if self._semantic is not None:
            return self._semantic
        if self.is_panoptic:
            raise UserError(
                "This prediction has no semantic map: it was made with semantic=False.",
                "Call predictor(picture), which makes it.",
            )
        classes = np.array([segment.class_index for segment in self.segments], np.int32)
        return looked_up(np.concatenate((classes[-1:], classes)), self.panoptic_map)

    def name(self, segment: Segment) -> str:
        """The class name of a segment."""
        return self.vocabulary.names[segment.class_index]

    @property
    def names(self) -> tuple[str, ...]:
        """The class name of each segment."""
        return tuple(self.name(segment) for segment in self.segments)

    def masks(self) -> NDArray[np.bool_]:
        """(N, H, W) bool: the pixels of each segment, in the order of `segments`."""
        ids = np.array([segment.id for segment in self.segments], np.int32)
        return self.panoptic_map == ids[:, None, None]

    def plot(self, picture: Picture | None = None, scale: int = 1) -> Image.Image:
        """The picture with its segments, names and scores, so many times as large.

        picture: another one of that size, or the same where the prediction was kept without it.
        UserError where there is none or its size differs.
        """
        image = self.image if picture is None else to_array(picture)
        if image is None:
            raise UserError(
                "This prediction was kept without its picture.", "Call plot(picture) with it."
            )
        if image.shape[:2] != self.panoptic_map.shape:
            height, width = self.panoptic_map.shape
            raise UserError(
                f"The picture is {image.shape[1]}x{image.shape[0]}, the prediction {width}x{height}"
                " (width x height).",
                "Give the picture that was predicted.",
            )
        return overlay(image, self, scale=scale)

    def save(self, path: Path | str) -> None:
        """Writes the overlay as PNG, JPEG or WebP; as .json COCO's panoptic form, with its PNG in
        the folder of that name, as `concat evaluate --predictions` reads it.

        UserError for another ending, or where it cannot be written.
        """
        path = Path(path)
        if path.suffix.lower() == ".json":
            found = self.to_coco("panoptic", file_name=f"{path.stem}.png")
            write_id_png(path.with_suffix("") / f"{path.stem}.png", self.panoptic_map)
            files.write_json(path, found)
            return
        if path.suffix.lower() not in _FORMATS:
            raise UserError(
                f"Nothing is written as {path.suffix or 'a file without ending'}: {path}.",
                f"End the name with {', '.join(_FORMATS)} (the overlay) or .json (COCO panoptic).",
            )
        files.write_bytes(path, self._packed(_FORMATS[path.suffix.lower()]))

    def to_coco(
        self,
        kind: Literal["instances", "panoptic"] = "instances",
        image_id: int = 1,
        file_name: str = "picture.png",
    ) -> dict[str, Any]:
        """The content of a COCO JSON of this picture, with masks as compressed run lengths.

        instances: an annotation for each segment of a thing, with its `score`. panoptic: one
        annotation that lists all segments, each with its `segmentation` besides; the PNG of ids
        that COCO names there is written by `save`.
        """
        masks = encoded(self.masks())
        entries = [
            entry | {"segmentation": rle | {"counts": rle["counts"].decode("ascii")}}
            for entry, rle in zip(
                segment_entries(self.segments, self.vocabulary), masks, strict=True
            )
        ]
        if kind == "panoptic":
            png = Path(file_name).with_suffix(".png").name
            rows = [{"image_id": image_id, "file_name": png, "segments_info": entries}]
        else:
            kinds = [self.vocabulary.is_thing[segment.class_index] for segment in self.segments]
            things = [entry for entry, thing in zip(entries, kinds, strict=True) if thing]
            rows = [
                entry | {"id": number, "image_id": image_id}
                for number, entry in enumerate(things, 1)
            ]
        height, width = self.panoptic_map.shape
        image = {"id": image_id, "file_name": file_name, "height": height, "width": width}
        return {"images": [image], "annotations": rows, "categories": categories(self.vocabulary)}

    def to_supervision(self) -> Any:
        """All segments as `supervision.Detections`: masks, boxes, scores, class indices, and names
        as `class_name`; UserError where supervision is not installed."""
        try:
            detections = import_module("supervision").Detections
        except ImportError as error:
            what = "The package supervision is not installed."
            raise UserError(what, "pip install supervision") from error
        boxes = np.array([segment.bbox for segment in self.segments], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]  # corners
        return detections(
            xyxy=boxes,
            mask=self.masks(),
            confidence=np.array([segment.score for segment in self.segments], np.float32),
            class_id=np.array([segment.class_index for segment in self.segments], np.int64),
            data={"class_name": np.array(self.names, str)},
        )

    def _packed(self, form: str) -> bytes:
        buffer = io.BytesIO()
        self.plot().save(buffer, form, **({"quality": 92} if form != "PNG" else {}))
        return buffer.getvalue()

    def _repr_png_(self) -> bytes | None:
        """What a notebook shows; None, and so the text, where there is no picture."""
        return None if self.image is None else self._packed("PNG")


def segment_entries(segments: Iterable[Segment], vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """The segments as COCO panoptic entries, with the class's name and score besides."""
    return [
        {
            "id": segment.id,
            "category_id": vocabulary.ids[segment.class_index],
            "name": vocabulary.names[segment.class_index],
            "score": round(segment.score, 4),
            "area": segment.area,
            "bbox": list(segment.bbox),
            "iscrowd": 0,
        }
        for segment in segments
    ]


def categories(vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """The classes as COCO lists them."""
    return [
        {"id": entry.id, "name": entry.name, "isthing": int(entry.kind == "thing")}
        for entry in vocabulary.entries
    ]
