"""The forms that a prediction is given in: masks, COCO's dicts, supervision's, pictures, files."""

from __future__ import annotations

import io
import json
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from concat_cli.core.errors import UserError
from concat_cli.core.evaluate.files import evaluate_files
from concat_cli.core.infer.postprocess import Segment, bounding_boxes
from concat_cli.core.infer.prediction import Prediction
from concat_cli.core.infer.render import overlay
from concat_cli.core.vocabulary import ClassEntry, Vocabulary

NAMES = (("cat", "thing", 17), ("sky", "stuff", 187), ("dog", "thing", 18))


def drawn(found: bool = True) -> Prediction:
    """Two overlapping-free cats of odd forms, a sky, and a gap, in a 37 x 53 picture."""
    vocabulary = Vocabulary(tuple(ClassEntry(id=i, name=n, kind=k) for n, k, i in NAMES))
    ids = np.zeros((37, 53), np.int32)
    if found:
        ids[:12] = 2
        ids[15:30, 5:20] = 1
        ids[20, 10] = 0  # a hole
        ids[25:36, 30:31] = 3
        ids[10:14, 40:50] = 3
    count = 3 if found else 0
    boxes = bounding_boxes(ids, count)
    segments = tuple(
        Segment(n, c, score, int((ids == n).sum()), tuple(map(int, boxes[n - 1])))
        for n, c, score in ((1, 0, 0.91234567), (2, 1, 0.5), (3, 0, 0.25))[:count]
    )
    image = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    return Prediction(ids, segments, vocabulary, {}, image=image)


def test_masks_are_those_of_the_map() -> None:
    found = drawn()
    masks = found.masks()
    assert masks.shape == (3, 37, 53) and masks.dtype == bool
    assert [int(mask.sum()) for mask in masks] == [segment.area for segment in found.segments]
    again = sum(mask * segment.id for mask, segment in zip(masks, found.segments, strict=True))
    assert (again == found.panoptic_map).all()
    assert drawn(found=False).masks().shape == (0, 37, 53)


def test_coco_opens_the_instances(tmp_path: Path) -> None:
    found = drawn()
    (tmp_path / "one.json").write_text(json.dumps(found.to_coco(image_id=7, file_name="a.jpg")))
    coco = COCO(str(tmp_path / "one.json"))
    rows = coco.loadAnns(coco.getAnnIds(imgIds=[7]))
    things = [0, 2]  # the sky is no instance
    assert [row["category_id"] for row in rows] == [17, 17]
    assert [row["score"] for row in rows] == [0.9123, 0.25]
    for row, place in zip(rows, things, strict=True):
        assert (coco.annToMask(row) == found.masks()[place]).all()
        assert row["area"] == coco_mask.area(row["segmentation"]) == found.segments[place].area
        assert row["bbox"] == coco_mask.toBbox(row["segmentation"]).tolist()
    assert coco.loadCats([187])[0]["isthing"] == 0 and coco.loadImgs([7])[0]["width"] == 53
    assert drawn(found=False).to_coco()["annotations"] == []


def test_saved_panoptic_files_are_scored(tmp_path: Path) -> None:
    found = drawn()
    found.save(tmp_path / "deep" / "one.json")
    content = json.loads((tmp_path / "deep/one.json").read_text())
    (row,) = content["annotations"]
    assert [one["id"] for one in row["segments_info"]] == [1, 2, 3]
    masks = [coco_mask.decode(one["segmentation"]) for one in row["segments_info"]]
    assert (np.stack(masks) == found.masks()).all()
    index = tmp_path / "deep/one.json"
    assert evaluate_files(index, index).panoptic["all"].pq == 1


def test_supervision_has_the_same_segments() -> None:
    supervision = pytest.importorskip("supervision")
    found = drawn()
    detections = found.to_supervision()
    assert (detections.mask == found.masks()).all()
    assert detections.xyxy.tolist() == [[5, 15, 20, 30], [0, 0, 53, 12], [30, 10, 50, 36]]
    assert (detections.area == [segment.area for segment in found.segments]).all()
    assert detections["class_name"].tolist() == ["cat", "sky", "cat"]
    assert detections.class_id.tolist() == [0, 1, 0]
    kept = detections[detections.confidence > 0.4]
    assert kept["class_name"].tolist() == ["cat", "sky"]
    shown = supervision.MaskAnnotator().annotate(found.image.copy(), detections)
    assert (shown != found.image).any()
    assert len(drawn(found=False).to_supervision()) == 0


def test_without_supervision_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(UserError, match="supervision is not installed"):
        drawn().to_supervision()


def test_the_overlay_is_shown_and_saved(tmp_path: Path) -> None:
    found = drawn()
    assert found.image is not None
    shown = np.asarray(overlay(found.image, found))
    assert (np.asarray(found.plot()) == shown).all()
    assert found.plot(scale=2).size == (106, 74)
    notebook = found._repr_png_()
    assert notebook is not None
    assert (np.asarray(Image.open(io.BytesIO(notebook))) == shown).all()
    for name, kind in (("a.png", "PNG"), ("b.JPG", "JPEG"), ("c.webp", "WEBP")):
        found.save(tmp_path / name)
        with Image.open(tmp_path / name) as image:
            assert (image.format, image.size) == (kind, (53, 37))
    assert (np.asarray(Image.open(tmp_path / "a.png")) == shown).all()
    with pytest.raises(UserError, match=r"Nothing is written as \.gif"):
        found.save(tmp_path / "d.gif")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.JPG", "c.webp"]


def test_a_prediction_may_be_kept_without_its_picture() -> None:
    found = drawn()
    less = pickle.loads(pickle.dumps(replace(found, image=None)))
    assert less._repr_png_() is None and "image" not in repr(less)
    with pytest.raises(UserError, match="without its picture"):
        less.plot()
    assert less.plot(found.image).tobytes() == found.plot().tobytes()
    with pytest.raises(UserError, match="53x37"):
        less.plot(np.zeros((53, 37, 3), np.uint8))
