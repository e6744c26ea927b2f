"""Small COCO panoptic files of truth and predictions, as several programs write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from concat_cli.core.data.image_io import write_id_png
from concat_cli.core.evaluate.files import Rules, evaluate_files
from concat_cli.core.evaluate.report import Report
from concat_cli.core.evaluate.scores import Scoring
from concat_cli.core.progress import Silent

CATEGORIES = [
    {"id": 1, "name": "person", "isthing": 1},
    {"id": 7, "name": "road", "isthing": 0},
]
OF = {11: 1, 12: 1, 700: 7, 1: 1, 2: 1, 3: 7}  # category of each segment id
Json = dict[str, Any]


def true_map(shift: int) -> np.ndarray:
    """Two people on a road below void; `shift` tells images apart."""
    ids = np.full((32, 48), 700)
    ids[:8] = 0
    ids[8:20, shift : shift + 16] = 11
    ids[20:30, 26:44] = 12
    return ids


def found_map(shift: int) -> np.ndarray:
    """Nearly the same."""
    ids = np.full((32, 48), 3)
    ids[:4] = 0
    ids[9:20, shift : shift + 16] = 1
    ids[20:28, 26:44] = 2
    return ids


def segments(ids: np.ndarray) -> list[Json]:
    """What a JSON says of a map."""
    return [
        {"id": int(i), "category_id": OF[int(i)], "iscrowd": 0, "area": int((ids == i).sum())}
        for i in np.unique(ids)
        if i
    ]


def write_pair(
    folder: Path,
    change: Callable[[Json, Json], object] = lambda truth, found: None,
    images: int = 3,
) -> tuple[Path, Path]:
    """The JSON of predictions and of the truth; `change` alters both before they are written."""
    truth: Json = {"images": [], "annotations": [], "categories": [dict(c) for c in CATEGORIES]}
    found: Json = {"images": [], "annotations": [], "categories": [dict(c) for c in CATEGORIES]}
    for number in range(1, images + 1):
        png = f"{number:03d}.png"
        for part, ids in (
            (truth, true_map(4 + 8 * number)), (found, found_map(4 + 8 * number))
        ):  # fmt: skip
            row = {"image_id": number, "file_name": png, "segments_info": segments(ids)}
            image = {"id": number, "file_name": f"{number:03d}.jpg", "width": 48, "height": 32}
            part["annotations"].append(row)
            part["images"].append(image)
            write_id_png(folder / ("truth" if part is truth else "found") / png, ids)
    change(truth, found)
    for name, part in (("truth", truth), ("found", found)):
        (folder / f"{name}.json").write_text(json.dumps(part))
    return folder / "found.json", folder / "truth.json"


class Lines(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        """One line."""
        self.lines.append(message)

    @property
    def text(self) -> str:
        """All that was said."""
        return "\n".join(self.lines)


def scored(
    folder: Path,
    change: Callable[[Json, Json], object] = lambda truth, found: None,
    scoring: Scoring | None = None,
    **rules: Any,
) -> tuple[Report, str]:
    """The report of changed files, and what was said."""
    lines = Lines()
    files = write_pair(folder, change)
    report = evaluate_files(*files, scoring or Scoring(), rules=Rules(**rules), progress=lines)
    return report, lines.text
