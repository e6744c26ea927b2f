"""Pictures of dense labels: what is annotated, what pseudo labels add, and both together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from concat_cli.core.files import atomic_path
from concat_cli.core.infer.render import Drawing, Mark, overlay, panel

CAPTIONS = ("image", "annotation", "pseudo labels", "fused")


def label_drawing(labels: NDArray[np.integer], names: Sequence[str]) -> Drawing:
    """(H, W) class indices, -1 for none -> what to draw; indices beyond the names are pseudo
    classes, called by their number from 1 on."""
    there = [int(label) for label in np.unique(labels) if label >= 0]
    known = [Mark(label + 1, names[label], True) for label in there if label < len(names)]
    made = [label for label in there if label >= len(names)]
    pseudo = [Mark(label + 1, f"#{label - len(names) + 1}", True) for label in made]
    return Drawing(labels + 1, (*known, *pseudo))


def write_pseudo_preview(
    path: Path,
    images: Sequence[NDArray[np.uint8]],
    truth: Sequence[NDArray[np.integer]],
    fused: Sequence[NDArray[np.integer]],
    names: Sequence[str],
) -> None:
    """Writes a PNG with a row for each image: image, annotation, pseudo labels, fused.

    images (H, W, 3) RGB; truth, fused (H, W) class indices, -1 for none, where those from
    `len(names)` on are pseudo classes.
    """
    rows = []
    for image, known, both in zip(images, truth, fused, strict=True):
        made = np.where(both >= len(names), both, -1)
        drawn = [overlay(image, label_drawing(labels, names)) for labels in (known, made, both)]
        plain = overlay(image, Drawing(np.zeros_like(known), ()))
        rows.append([plain, *drawn])
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        panel(rows, captions=CAPTIONS).save(temporary, format="PNG")
