"""Semantic maps as segments: everything of one class is one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from concat_cli.core.infer.postprocess import PanopticResult, Segment, bounding_boxes


def regions(labels: NDArray[np.int32], sure: NDArray[np.float32]) -> PanopticResult:
    """Everything of one class as one segment, in the order of the classes.

    labels (H, W); sure (H, W) in 0-1, whose mean is a segment's score.
    """
    classes, ids = np.unique(labels, return_inverse=True)
    segment_map = ids.reshape(labels.shape).astype(np.int32) + 1
    areas = np.bincount(segment_map.ravel(), minlength=len(classes) + 1)[1:]
    sums = np.bincount(segment_map.ravel(), sure.ravel())[1:]
    boxes = bounding_boxes(segment_map, len(classes))
    rows = zip(classes, sums / areas, areas, boxes, strict=True)
    segments: Sequence[Segment] = [
        Segment(number, int(label), float(score), int(area), (int(x), int(y), int(w), int(h)))
        for number, (label, score, area, (x, y, w, h)) in enumerate(rows, 1)
    ]
    return PanopticResult(segment_map, tuple(segments))
