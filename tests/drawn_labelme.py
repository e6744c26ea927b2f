"""Files as labelme 6.3.1 writes them, and what their shapes cover by its own rules."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
from drawn_labels import encode

SIZE = (40, 60)
Shape = dict[str, Any]
Points = list[list[float]]


def shape(label: str, kind: str, points: Points, **more: Any) -> Shape:
    """A shape with the fields that labelme writes, in its order."""
    return {
        "label": label,
        "points": points,
        "group_id": None,
        "description": "",
        "shape_type": kind,
        "flags": {},
        "mask": None,
    } | more


def pixels(label: str, drawn: np.ndarray, x: int, y: int, **more: Any) -> Shape:
    """A shape of pixels in a box, of which both corners are inside."""
    box = [[x, y], [x + drawn.shape[1] - 1, y + drawn.shape[0] - 1]]
    png = base64.b64encode(encode(drawn.astype(np.uint8))).decode()
    return shape(label, "mask", box) | {"mask": png} | more


def write_labelme(path: Path, shapes: list[Shape], picture: str = "", **more: Any) -> None:
    """A JSON, and its picture unless it is there."""
    name = picture or f"{path.stem}.jpg"
    image = path.parent / name.replace("\\", "/")
    image.parent.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not image.exists():
        image.write_bytes(encode(np.full((*SIZE, 3), 99, np.uint8), "JPEG"))
    content = {
        "version": "6.3.1",
        "flags": {},
        "shapes": shapes,
        "imagePath": name,
        "imageData": None,
        "imageHeight": SIZE[0],
        "imageWidth": SIZE[1],
    }
    path.write_text(json.dumps(content | more, indent=2))


def within(x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    """(H, W) of the pixels whose centres are in a box."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
    return (x0 < x) & (x < x1) & (y0 < y) & (y < y1)
