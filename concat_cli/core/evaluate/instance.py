"""Average precision and recall of instances, streaming: pycocotools judges image by image.

Only what `COCOeval.accumulate` looks at is kept: scores, which are matched, which are ignored. The
result equals that of one COCOeval over the whole data set.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.cocoeval import COCOeval

if TYPE_CHECKING:  # it imports torch, which the scoring of files has no need of
    from concat_cli.core.infer.instances import Instance, Rle

BoolArray = NDArray[np.bool_]
Curves = tuple[NDArray[np.float64], NDArray[np.float64]]  # precision, recall
_PRINTS = Lock()  # stdout belongs to the process, not to a thread
_WITH_PIXELS = 2**24  # pixels of true masks held at once


@dataclass(frozen=True)
class TrueInstance:
    """One true instance; a crowd counts neither as found nor as missed."""

    class_index: int
    area: int
    crowd: bool
    rle: Rle


@dataclass(frozen=True)
class InstanceQuality:
    """AP over IoU 0.5-0.95, AP50, AR at 100 detections an image, in 0-1, averaged over the `n`
    classes that the truth holds; AP of small, medium and large instances (COCO's borders of 32^2
    and 96^2 pixels), None where there are none."""

    ap: float
    ap50: float
    ar: float
    ap_small: float | None
    ap_medium: float | None
    ap_large: float | None
    n: int


def true_instances(
    segment_map: NDArray[np.integer],
    labels: NDArray[np.integer],
    crowd: BoolArray,
    is_thing: Sequence[bool],
) -> list[TrueInstance]:
    """The things of a map of segments (0 = void, i+1 = segment i)."""
    from concat_cli.core.infer.instances import encoded

    chosen = [i for i, label in enumerate(labels) if is_thing[label]]
    step = max(1, _WITH_PIXELS // segment_map.size)
    found: list[TrueInstance] = []
    for start in range(0, len(chosen), step):
        some = chosen[start : start + step]
        masks = segment_map == (np.array(some) + 1)[:, None, None]  # (n, H, W)
        areas = masks.sum((1, 2))
        found += [
            TrueInstance(int(labels[i]), int(area), bool(crowd[i]), rle)
            for i, area, rle in zip(some, areas, encoded(masks), strict=True)
            if area
        ]
    return found


class InstanceScore:
    """Adds images one by one, and those of several processes merge.

    state: all there is, by class and image what COCOeval found: scores (D,), matched and ignored
    detections (A, T, D), truths that do not count (A, G).
    """

    def __init__(self) -> None:
        self.state: dict[int, dict[int, tuple[NDArray[Any], ...]]] = {}

    def add(
        self,
        image_id: int,
        found: Sequence[Instance],
        truth: Sequence[TrueInstance],
        to_truth: Sequence[int] | NDArray[np.integer] | None = None,
    ) -> None:
        """One image; to_truth: class index of what was found -> of the truth, where they differ."""
        judge: Any = COCOeval(iouType="segm")
        for number, real in enumerate(truth, 1):
            judge._gts[image_id, real.class_index].append(
                {"id": number, "area": real.area, "iscrowd": int(real.crowd),
                 "ignore": int(real.crowd), "segmentation": real.rle}
            )  # fmt: skip
        for number, one in enumerate(found, 1):
            label = one.class_index if to_truth is None else int(to_truth[one.class_index])
            judge._dts[image_id, label].append(
                {"id": number, "area": one.area, "score": one.score, "segmentation": one.rle}
            )
        params = judge.params
        for label in sorted({c for _, c in (*judge._gts, *judge._dts)}):
            key = image_id, label
            judge.ious[key] = judge.computeIoU(*key)
            areas = [judge.evaluateImg(*key, area, params.maxDets[-1]) for area in params.areaRng]
            self.state.setdefault(label, {})[image_id] = (
                np.array(areas[0]["dtScores"]),
                np.stack([a["dtMatches"] > 0 for a in areas]),
                np.stack([a["dtIgnore"] for a in areas]).astype(bool),
                np.array([a["gtIgnore"] for a in areas], bool),
            )

    def merge(self, other: InstanceScore) -> None:
        """Adds the images of another process."""
        for label, images in other.state.items():
            self.state.setdefault(label, {}).update(images)

    def result(self) -> InstanceResult:
        """The figures of every class that the truth holds."""
        found = {label: _accumulated(images) for label, images in self.state.items()}
        return InstanceResult({c: curves for c, curves in found.items() if curves is not None})


@dataclass(frozen=True)
class InstanceResult:
    """By class precision (T, R, A) and recall (T, A) at 100 detections, -1 where there is no truth
    of that size; T: IoU 0.5-0.95, R: 101 recalls, A: all, small, medium, large."""

    curves: Mapping[int, Curves]

    def quality(self, classes: Sequence[int]) -> InstanceQuality | None:
        """Averages over those of the classes that the truth holds; None if it holds none."""
        chosen = [self.curves[c] for c in classes if c in self.curves]
        if not chosen:
            return None
        precision = np.stack([p for p, _ in chosen])  # (n, T, R, A)
        recall = np.stack([r for _, r in chosen])
        ap, ap50, ar = (
            float(values.mean())
            for values in (precision[..., 0], precision[:, 0, :, 0], recall[..., 0])
        )
        sizes = [_mean_of_real(precision[..., a]) for a in (1, 2, 3)]
        return InstanceQuality(ap, ap50, ar, *sizes, n=len(chosen))


def _mean_of_real(values: NDArray[np.float64]) -> float | None:
    real = values[values > -1]
    return float(real.mean()) if len(real) else None


def _accumulated(images: Mapping[int, tuple[NDArray[Any], ...]]) -> Curves | None:
    """COCOeval's curves of one class; None where no true instance of it counts."""
    judge: Any = COCOeval(iouType="segm")
    judge.params.catIds, judge.params.imgIds = [0], list(range(len(images)))
    judge._paramsEval = judge.params
    judge.evalImgs = [
        {"dtScores": scores, "dtMatches": matched[a], "dtIgnore": ignored[a], "gtIgnore": left[a]}
        for a in range(len(judge.params.areaRng))
        for _, (scores, matched, ignored, left) in sorted(images.items())
    ]
    with _PRINTS, contextlib.redirect_stdout(io.StringIO()):
        judge.accumulate()
    precision, recall = judge.eval["precision"][:, :, 0, :, -1], judge.eval["recall"][:, 0, :, -1]
    return None if precision[0, 0, 0] < 0 else (precision, recall)
