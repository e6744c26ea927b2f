"""Predictions on disk: COCO panoptic JSON, id PNGs and overlays.

OUT/panoptic.json        one for all pictures; `concat evaluate --predictions` reads it
OUT/panoptic/NAME.png    id PNGs, in the folder named like the JSON
OUT/NAME.overlay.png     the picture with its segments drawn in

Of weights that tell no segments apart, OUT/semantic.json and OUT/semantic/NAME.png, whose values
are category ids.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from concat_cli.core import files
from concat_cli.core.data.image_io import write_id_png, write_png
from concat_cli.core.errors import UserError
from concat_cli.core.infer.outputs import Prediction
from concat_cli.core.infer.postprocess import Segment
from concat_cli.core.vocabulary import Vocabulary

JSON_NAME = "panoptic.json"
SEMANTIC = "semantic"


@dataclass(frozen=True)
class WrittenPrediction:
    """Where one prediction was written, and its entries for the JSON."""

    png: Path
    overlay: Path | None
    image: dict[str, Any]
    annotation: dict[str, Any]


def output_names(inputs: Sequence[Path]) -> list[str]:
    """A file name without ending for each input, all different even where case does not count.

    The stem where no other input has it; else with the ending (`cat_jpg`), then with the folder
    (`holiday_cat_jpg`), then with a number.
    """
    candidates = [
        (
            path.stem,
            f"{path.stem}_{path.suffix[1:]}",
            f"{path.parent.name}_{path.stem}_{path.suffix[1:]}",
        )
        for path in inputs
    ]
    count = Counter(form.casefold() for forms in candidates for form in set(forms))
    names: list[str] = []
    taken: set[str] = set()
    for forms in candidates:
        name = next((form for form in forms if count[form.casefold()] == 1), forms[-1])
        base, number = name, 2
        while name.casefold() in taken:
            name, number = f"{base}_{number}", number + 1
        taken.add(name.casefold())
        names.append(name)
    return names


def image_ids(names: Sequence[str]) -> list[int]:
    """The numbers in COCO names (`000000142238` -> 142238) where all have one; else 1, 2, ..."""
    if all(name.isascii() and name.isdigit() for name in names):
        ids = [int(name) for name in names]
        if len(set(ids)) == len(ids):
            return ids
    return list(range(1, len(names) + 1))


def write_prediction(
    out: Path,
    name: str,
    prediction: Prediction,
    *,
    image_id: int,
    file_name: str,
    overlay: Image.Image | None = None,
) -> WrittenPrediction:
    """Writes a prediction's id PNG and, if given, its overlay; `write_index` completes them."""
    png = out / Path(index_name(prediction.is_panoptic)).stem / f"{name}.png"
    if prediction.is_panoptic:
        write_id_png(png, prediction.panoptic_map)
    else:
        write_semantic_png(png, prediction.semantic_map, prediction.vocabulary)
    drawn = None
    if overlay is not None:
        drawn = out / f"{name}.overlay.png"
        write_png(drawn, np.asarray(overlay.convert("RGB")))
    height, width = prediction.panoptic_map.shape
    image = {"id": image_id, "file_name": file_name, "height": height, "width": width}
    annotation = {
        "image_id": image_id,
        "file_name": png.name,
        "segments_info": segments_info(prediction),
    }
    return WrittenPrediction(png, drawn, image, annotation)


def index_name(is_panoptic: bool) -> str:
    """The name of the one JSON of all predictions."""
    return JSON_NAME if is_panoptic else f"{SEMANTIC}.json"


def write_semantic_png(
    path: Path, semantic_map: NDArray[np.integer], vocabulary: Vocabulary
) -> None:
    """Class indices (H, W) as a grey PNG of category ids, of 8 bits where all ids fit, else of 16;
    UserError where they need more."""
    ids = np.array(vocabulary.ids)
    if ids.min() < 0 or ids.max() >= 1 << 16:
        raise UserError(
            f"The category ids {ids.min()} to {ids.max()} do not fit into a PNG of 16 bits.",
            "Prepare the data set with ids of 0..65535, or leave --save out.",
        )
    kind = np.uint8 if ids.max() < 1 << 8 else np.uint16
    buffer = io.BytesIO()
    Image.fromarray(ids.astype(kind)[semantic_map]).save(buffer, "PNG")
    files.write_bytes(path, buffer.getvalue(), sync=False)


def segments_info(prediction: Prediction) -> list[dict[str, Any]]:
    """The segments as COCO panoptic entries, with the class's name and score besides."""
    return segment_entries(prediction.segments, prediction.vocabulary)


def segment_entries(segments: Iterable[Segment], vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """`segments_info` of segments whose classes are those of the vocabulary."""
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
    """The vocabulary as COCO panoptic categories."""
    return [
        {"id": entry.id, "name": entry.name, "isthing": int(entry.kind == "thing")}
        for entry in vocabulary.entries
    ]


def write_index(
    out: Path,
    written: Iterable[WrittenPrediction],
    vocabulary: Vocabulary,
    is_panoptic: bool = True,
) -> Path:
    """Writes the one JSON of all predictions; returns its path."""
    rows = sorted(written, key=lambda one: one.image["id"])
    path = out / index_name(is_panoptic)
    files.write_json(
        path,
        {
            "images": [one.image for one in rows],
            "annotations": [one.annotation for one in rows],
            "categories": categories(vocabulary),
        },
    )
    return path
