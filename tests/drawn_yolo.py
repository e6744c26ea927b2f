"""YOLO polygons in ultralytics' layout: pictures, labels and a `data.yaml`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from drawn_labelme import SIZE
from drawn_labels import encode

NAMES = "names:\n  0: cat\n  1: dog\n"
Boxes = list[tuple[int, float, float, float, float]]  # class, x0, y0, x1, y1 in pixels
ONE: Boxes = [(1, 6, 4, 24, 20)]


def line(category: int, x0: float, y0: float, x1: float, y1: float) -> str:
    """The outline of a box, its corners as shares of the sides."""
    corners = (x0, y0), (x1, y0), (x1, y1), (x0, y1)
    shares = (f"{x / SIZE[1]:.6f} {y / SIZE[0]:.6f}" for x, y in corners)
    return " ".join([str(category), *shares])


def put(root: Path, name: str, label: str = "", text: str | None = None) -> None:
    """A picture; and its label file, with that text or with the outline of `ONE`."""
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(encode(np.full((*SIZE, 3), 99, np.uint8), "JPEG"))
    if label:
        (root / label).parent.mkdir(parents=True, exist_ok=True)
        (root / label).write_text(line(*ONE[0]) + "\n" if text is None else text)


def draw_yolo(root: Path, text: str | None = None) -> None:
    """Two pictures of train and one of val, each with a dog or with that text."""
    for name in ("train/a", "train/b", "val/c"):
        put(root, f"images/{name}.jpg", f"labels/{name}.txt", text)
    (root / "data.yaml").write_text(f"path: .\ntrain: images/train\nval: images/val\n{NAMES}")
