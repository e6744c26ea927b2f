"""Instances: the streaming score against one COCOeval over everything; inference against a loop."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.nn import functional as F

from concat_cli.core.evaluate.instance import InstanceScore, TrueInstance, true_instances
from concat_cli.core.infer.instances import Instance, encoded, instances
from concat_cli.core.infer.postprocess import calibrated

HEIGHT, WIDTH, CLASSES, IMAGES = 130, 150, 4, 14


def blob(rng: np.random.Generator) -> np.ndarray:
    """A rectangle of any of COCO's sizes."""
    mask = np.zeros((HEIGHT, WIDTH), bool)
    y, x = rng.integers(0, HEIGHT - 5), rng.integers(0, WIDTH - 5)
    h, w = rng.choice([4, 20, 50, 125], 2)
    mask[y : y + h, x : x + w] = True
    return mask


def made_up(seed: int) -> list[tuple[int, list[Instance], list[TrueInstance]]]:
    """Images with true instances (crowds too) and detections, many on them, some of equal score;
    class 3 is detected but never true, and one image is empty of each."""
    rng = np.random.default_rng(seed)
    rows = []
    for image_id in (int(i) for i in rng.permutation(IMAGES) + 5):
        masks = [blob(rng) for _ in range(6 if image_id != 7 else 0)]
        truth = [
            TrueInstance(int(rng.integers(3)), int(m.sum()), bool(rng.random() < 0.2), rle(m))
            for m in masks
        ]
        found = []
        for n in range(25 if image_id != 9 else 0):
            near = masks and rng.random() < 0.7
            m = np.roll(masks[n % 6], rng.integers(-3, 4), 1) if near else blob(rng)
            label = truth[n % 6].class_index if near else int(rng.integers(CLASSES))
            score = float(rng.choice([0.25, 0.5, rng.random()]))
            found.append(Instance(label, score, int(m.sum()), rle(m)))
        rows.append((image_id, found, truth))
    return rows


def rle(mask: np.ndarray):
    return encoded(mask[None])[0]


def whole_coco(rows) -> COCOeval:
    """pycocotools over all images at once."""
    truths = [(i, t) for i, _, truth in rows for t in truth]
    annotations = [
        {"id": n, "image_id": i, "category_id": t.class_index + 1, "area": t.area,
         "iscrowd": int(t.crowd), "segmentation": t.rle, "bbox": coco_mask.toBbox(t.rle).tolist()}
        for n, (i, t) in enumerate(truths, 1)
    ]  # fmt: skip
    results = [
        {"image_id": i, "category_id": one.class_index + 1, "score": one.score,
         "segmentation": one.rle}
        for i, found, _ in rows
        for one in found
    ]  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": i, "height": HEIGHT, "width": WIDTH} for i, *_ in rows],
            "annotations": annotations,
            "categories": [{"id": c + 1, "name": str(c)} for c in range(CLASSES)],
        }
        truth.createIndex()
        judge = COCOeval(truth, truth.loadRes(results), "segm")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return judge


@pytest.mark.parametrize("seed", range(4))
def test_image_by_image_equals_one_cocoeval_over_all(seed: int) -> None:
    rows = made_up(seed)
    score, other = InstanceScore(), InstanceScore()
    for n, (image_id, found, truth) in enumerate(rows):
        (other if n % 3 == 0 else score).add(image_id, found, truth)
    score.merge(other)  # two processes
    judge, result = whole_coco(rows), score.result()
    assert set(result.curves) == {0, 1, 2}
    for c in range(3):
        precision, recall = result.curves[c]
        assert np.abs(precision - judge.eval["precision"][:, :, c, :, -1]).max() <= 1e-12
        assert np.abs(recall - judge.eval["recall"][:, c, :, -1]).max() <= 1e-12
    found = result.quality(range(CLASSES))
    assert found is not None and found.n == 3 and 0 < found.ap < found.ap50 < 1
    ours = [found.ap, found.ap50, found.ap_small, found.ap_medium, found.ap_large, found.ar]
    ours = [-1 if value is None else value for value in ours]  # no true instance of that size
    assert ours == pytest.approx(judge.stats[[0, 1, 3, 4, 5, 8]].tolist(), abs=1e-12)
    assert result.quality([3]) is None  # only detected
    one = result.quality([1])
    assert one is not None
    assert one.ap == pytest.approx(judge.eval["precision"][:, :, 1, 0, -1].mean(), abs=1e-12)


def test_perfect_and_absent() -> None:
    score = InstanceScore()
    mask = np.zeros((40, 40), bool)
    mask[:30] = True
    truth = TrueInstance(2, int(mask.sum()), False, rle(mask))
    score.add(1, [Instance(0, 0.9, truth.area, truth.rle)], [truth], to_truth=[2])
    found = score.result().quality([0, 1, 2])
    assert found is not None and found.n == 1
    assert (found.ap, found.ap50, found.ar, found.ap_medium) == pytest.approx((1, 1, 1, 1))
    assert found.ap_small is None
    assert InstanceScore().result().quality([0]) is None


def test_truth_is_the_things_of_a_panoptic_map() -> None:
    segment_map = np.array([[1, 1, 0, 2], [3, 3, 3, 2]])
    found = true_instances(
        segment_map, np.array([0, 1, 0]), np.array([False, False, True]), [True, False]
    )
    assert [(t.class_index, t.area, t.crowd) for t in found] == [(0, 2, False), (0, 3, True)]
    for one, number in zip(found, (1, 3), strict=True):
        assert (coco_mask.decode(one.rle).astype(bool) == (segment_map == number)).all()


@pytest.mark.parametrize("offset", [0.0, 1.5])
def test_inference_equals_a_loop_over_pairs(offset: float) -> None:
    """Mask2Former's rule, pair by pair at full size, with more pairs than are kept."""
    source = torch.Generator().manual_seed(1)
    queries, classes, size = 30, 5, (37, 50)
    class_logits = torch.randn(2, queries, classes + 1, generator=source) * 2
    mask_logits = torch.randn(2, queries, 10, 13, generator=source) * 3
    mask_logits[0, 4] = -9.0  # an empty mask
    thing = torch.tensor([True, False, True, True, False])
    seen = torch.tensor([True, True, False, False, True])
    likely = calibrated(class_logits, seen, offset).softmax(-1)
    found = instances(likely, mask_logits, [size, size], thing)
    for b, mine in enumerate(found):
        shifted = class_logits[b].clone()
        shifted[:, :-1] -= offset * seen
        scores = shifted.softmax(-1)[:, :-1]
        full = F.interpolate(mask_logits[b][None], (40, 52), mode="bilinear", align_corners=False)
        full = F.interpolate(full, size, mode="bilinear", align_corners=False)[0]
        pairs = sorted(
            ((float(scores[q, c]), q, c) for q in range(queries) for c in range(classes)),
            reverse=True,
        )[:100]
        expected = []
        for value, q, c in pairs:
            mask = full[q] > 0
            if thing[c] and mask.any():
                inside = float(full[q].sigmoid()[mask].mean())
                expected.append((value * inside, c, int(mask.sum()), mask.numpy()))
        assert len(mine) == len(expected) < 100
        for one, (value, c, area, mask) in zip(mine, expected, strict=True):
            assert (one.class_index, one.area) == (c, pytest.approx(area, abs=2))
            assert one.score == pytest.approx(value, abs=1e-4)
            assert (coco_mask.decode(one.rle).astype(bool) != mask).sum() <= 2
