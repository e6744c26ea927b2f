"""What is said of the files of other tools, and whether they open ours; each test is passed over
where the tool is not installed. docs/data.md has the table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from drawn_panoptic import Lines, true_map, write_pair
from PIL import Image

from concat_cli.app import main
from concat_cli.core.data.image_io import write_id_png, write_png
from concat_cli.core.errors import UserError
from concat_cli.core.evaluate.files import PanopticFiles, Rules, evaluate_files


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """What `predict --layout coco` makes of two pictures of the built-in world."""
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 96, 3), dtype=np.uint8)
        write_png(tmp_path / f"photos/p{number}.png", pixels)
    out = tmp_path / "coco"
    line = ["predict", str(tmp_path / "photos"), "--out", str(out), "--layout", "coco"]
    assert main([*line, "--device", "cpu", "--min-score", "0", "--set", "infer.overlap=0.1"]) == 0
    return out


def listed(out: Path) -> dict:
    return json.loads((out / "annotations/panoptic_predictions.json").read_text())


def test_kwcoco_opens_predictions(coco: Path) -> None:
    kwcoco = pytest.importorskip("kwcoco")
    index = coco / "annotations/panoptic_predictions.json"
    found = kwcoco.CocoDataset(str(index))
    assert (found.n_images, found.n_annots) == (2, 2)
    assert found.validate(missing=False)["errors"] == []


def test_datumaro_opens_predictions(coco: Path) -> None:
    datumaro = pytest.importorskip("datumaro")
    found = datumaro.Dataset.import_from(str(coco), "coco_panoptic")
    count = {item.id: len(item.annotations) for item in found}
    rows = listed(coco)["annotations"]
    assert count == {Path(r["file_name"]).stem: len(r["segments_info"]) for r in rows}
    assert all(item.media.data.shape[:2] == (64, 96) for item in found)


def as_data_set(folder: Path) -> tuple[Path, Path]:
    """The drawn truth in COCO's folders with its pictures, and the predictions."""
    found, truth = write_pair(folder)
    (folder / "annotations").mkdir()
    truth = truth.rename(folder / "annotations/panoptic_val.json")
    (folder / "truth").rename(folder / "annotations/panoptic_val")
    (folder / "images/val").mkdir(parents=True)
    for number in range(1, 4):
        Image.new("RGB", (48, 32), (40 * number, 0, 0)).save(
            folder / f"images/val/{number:03d}.jpg"
        )
    return found, truth


def test_datumaros_panoptic_export(tmp_path: Path) -> None:
    """Version 1.13.12 writes isthing 0 for all and numbers categories anew: both are said."""
    datumaro = pytest.importorskip("datumaro")
    found, truth = as_data_set(tmp_path / "drawn")
    data = datumaro.Dataset.import_from(str(tmp_path / "drawn"), "coco_panoptic")
    data.export(str(tmp_path / "out"), "coco_panoptic", save_media=True)
    other = tmp_path / "out/annotations/panoptic_val.json"
    lines = Lines()
    match = r"1 classes have another category id .*'road': 7, and 2"
    for old in (found, truth):
        with pytest.raises(UserError, match=match):
            evaluate_files(old, other, progress=lines)
    assert "all 2 categories" in lines.text and "person in 3 images" in lines.text
    assert evaluate_files(other, other).panoptic["things"] is None


def test_cityscapesscripts_panoptic_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids are text, and pictures are named `..._gtFine_leftImg8bit.png`, which is no file: they
    still find the predictions of the real pictures."""
    pytest.importorskip("cityscapesscripts")
    from cityscapesscripts.preparation.createPanopticImgs import convert2panoptic

    monkeypatch.chdir(tmp_path)
    stems = [f"ulm_{n:06d}_000019" for n in range(3)]
    for number, stem in enumerate(stems):
        ids = np.full((32, 48), 7, np.uint16)
        ids[4:12, 4 + number : 20] = 26000
        ids[20:28, 10:40] = 26001 + number
        path = Path(f"gtFine/val/ulm/{stem}_gtFine_instanceIds.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(ids).save(path)
    convert2panoptic("gtFine", "gtFine", setNames=["val"])
    truth = Path("gtFine/cityscapes_panoptic_val.json")
    content = json.loads(truth.read_text())
    names = {image["id"]: image["file_name"] for image in content["images"]}
    assert names == {stem: f"{stem}_gtFine_leftImg8bit.png" for stem in stems}
    for number, row in enumerate(content["annotations"], 1):
        image = next(one for one in content["images"] if one["id"] == row["image_id"])
        image.update(id=4 - number, file_name=f"photos/{image['id']}_leftImg8bit.png")
        row["image_id"] = 4 - number
    Path("found.json").write_text(json.dumps(content))
    lines = Lines()
    ours = PanopticFiles(Path("found.json"), truth.with_suffix(""))
    report = evaluate_files(ours, truth, progress=lines)
    assert report.panoptic["all"].pq == 1 and report.panoptic["things"].n == 1
    assert "3 images are matched by file name" in lines.text


@pytest.mark.parametrize("tool", ["panopticapi.evaluation", "hotcoco.panoptic"])
def test_areas_are_the_jsons_in_other_scorers(tmp_path: Path, tool: str) -> None:
    """PNGs at half the size beside JSONs whose areas stayed: `--as-panopticapi` gives their PQ."""
    scorer = pytest.importorskip(tool)
    found, truth = write_pair(tmp_path)
    for path in (*(tmp_path / "truth").iterdir(), *(tmp_path / "found").iterdir()):
        ids = np.asarray(Image.open(path))[::2, ::2].astype(int)
        write_id_png(path, ids[..., 0] + 256 * ids[..., 1])
    content = json.loads(truth.read_text())
    for row in content["annotations"]:
        for segment in row["segments_info"]:
            segment["area"] //= 5  # a little less than there are pixels: PQ above 1
    truth.write_text(json.dumps(content))
    theirs = scorer.pq_compute(str(truth), str(found))
    report = evaluate_files(found, truth, rules=Rules(as_panopticapi=True))
    assert report.panoptic["all"].pq == pytest.approx(theirs["All"]["pq"])
    assert report.panoptic["all"].pq > 1
    assert report.protocol["disagreements"]["areas"] == 9


def test_instances_of_other_tools_are_prepared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The instances that datumaro and supervision write of one drawn data set: their polygons are
    read as COCO reads them, by which each is a row and a column short, and that is said."""
    datumaro = pytest.importorskip("datumaro")
    supervision = pytest.importorskip("supervision")
    as_data_set(tmp_path / "drawn")
    data = datumaro.Dataset.import_from(str(tmp_path / "drawn"), "coco_panoptic")
    data.export(str(tmp_path / "out"), "coco_instances", save_media=True)
    first = tmp_path / "out/annotations/instances_val.json"
    images = str(tmp_path / "out/images/val")
    detections = supervision.DetectionDataset.from_coco(images, str(first), force_masks=True)
    detections.as_coco(annotations_path=str(tmp_path / "out/second.json"))
    areas = []
    for name in ("annotations/instances_val.json", "second.json"):
        out = tmp_path / f"prepared-{Path(name).stem}"
        line = ["prepare-data", "custom", str(tmp_path / "out"), "--images", "images/val"]
        assert main([*line, "--json", name, "--out", str(out)]) == 0
        printed = capsys.readouterr()
        assert "outlines lost a row and a column" in " ".join((printed.out + printed.err).split())
        rows = [json.loads(row) for row in (out / "index/val.jsonl").read_text().splitlines()]
        areas.append(sum(area for row in rows for area in row["areas"]))
    drawn = sum(int((true_map(4 + 8 * number) > 0).sum()) for number in (1, 2, 3))
    assert all(0.85 * drawn < area < drawn for area in areas)
