"""What `predict` writes, read as anybody would, and by our own reader."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from concat_cli.core.evaluate.files import evaluate_files
from concat_cli.core.evaluate.scores import Scoring


class Found(NamedTuple):
    """The names of all categories, and how many segments there are in all pictures."""

    names: tuple[str, ...]
    segments: int


def check_panoptic_files(out: Path, pictures: Sequence[Path]) -> Found:
    """COCO's panoptic format holds: the PNGs' ids are those of the segments, with their areas, in
    the pictures' sizes; as their own truth they score 100."""
    written = json.loads((out / "panoptic.json").read_text("utf-8"))
    categories = {c["id"]: c["name"] for c in written["categories"]}
    assert len(written["images"]) == len(written["annotations"]) == len(pictures)
    count = 0
    for image, annotation, path in zip(
        written["images"], written["annotations"], pictures, strict=True
    ):
        png = np.array(Image.open(out / "panoptic" / annotation["file_name"]), int)
        ids = png[..., 0] + 256 * png[..., 1] + 65536 * png[..., 2]
        width, height = Image.open(path).size
        assert ids.shape == (height, width) == (image["height"], image["width"])
        assert image["id"] == annotation["image_id"]
        segments = annotation["segments_info"]
        assert set(np.unique(ids)) - {0} == {segment["id"] for segment in segments}
        for segment in segments:
            assert (ids == segment["id"]).sum() == segment["area"] > 0
            assert segment["category_id"] in categories and 0 < segment["score"] <= 1
        count += len(segments)
    if count:
        report = evaluate_files(out / "panoptic.json", out / "panoptic.json", Scoring(check=False))
        assert report.images == len(pictures) and report.panoptic["all"].pq == 1
    return Found(tuple(categories.values()), count)
