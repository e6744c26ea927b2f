"""Truth whose JSON and PNGs disagree: named, or counted as panopticapi does."""

from __future__ import annotations

import json

import numpy as np
import pytest
from drawn_panoptic import Json, scored, write_pair
from jsonschema import Draft202012Validator

from concat_cli.core.data.image_io import read_id_png, write_id_png
from concat_cli.core.errors import UserError
from concat_cli.core.evaluate.files import Rules, evaluate_files
from concat_cli.core.evaluate.report import load_schema
from concat_cli.core.evaluate.scores import Scoring


def listed_only(truth: Json, found: Json) -> None:
    for row in truth["annotations"]:
        row["segments_info"].append({"id": 99, "category_id": 1, "iscrowd": 0, "area": 5})


def drawn_only(truth: Json, found: Json) -> None:
    for row in truth["annotations"]:
        row["segments_info"] = [s for s in row["segments_info"] if s["id"] != 12]


def other_areas(truth: Json, found: Json) -> None:
    for row in truth["annotations"]:
        for segment, factor in zip(row["segments_info"], (0.5, 1.3, 1), strict=True):
            segment["area"] = int(segment["area"] * factor)


def test_disagreement_is_named_with_the_way_on(tmp_path):
    for change, side in ((listed_only, "PNG"), (drawn_only, "JSON")):
        with pytest.raises(UserError, match=f"is not in the {side}") as caught:
            scored(tmp_path / side, change)
        assert "--as-panopticapi" in caught.value.hint


@pytest.mark.parametrize(
    ("change", "counts"),
    [
        (listed_only, {"listed": 3, "drawn": 0, "areas": 0}),
        (drawn_only, {"listed": 0, "drawn": 3, "areas": 0}),
        (other_areas, {"listed": 0, "drawn": 0, "areas": 6}),
    ],
)
def test_what_disagrees_is_counted_and_pixels_stay_the_masks(tmp_path, change, counts):
    report, said = scored(tmp_path, change, as_panopticapi=True)
    assert counts.items() <= report.protocol["disagreements"].items()
    assert "areas of the truth are the JSON's" in said
    Draft202012Validator(load_schema()).validate(report.to_json())


def test_other_areas_are_said_and_pixels_count(tmp_path):
    plain, nothing = scored(tmp_path / "plain")
    report, said = scored(tmp_path / "areas", other_areas)
    assert report.panoptic == plain.panoptic and "area" not in nothing
    assert "6 of 9 segments (segment 11 of 001.png" in said and "--as-panopticapi" in said
    other, _ = scored(tmp_path / "as", other_areas, as_panopticapi=True)
    assert other.panoptic["all"].pq != plain.panoptic["all"].pq


def resize(folder, factor: int, *, tell: bool) -> tuple:
    """Files whose PNGs of truth and predictions were scaled down beside the old truth's JSON; tell:
    images and areas of the truth's JSON are old, its sizes new."""
    found, truth = write_pair(folder)
    for path in (*(folder / "truth").iterdir(), *(folder / "found").iterdir()):
        write_id_png(path, read_id_png(path)[::factor, ::factor])
    if tell:
        content = json.loads(truth.read_text())
        for image in content["images"]:
            image.update(height=image["height"] // factor, width=image["width"] // factor)
        truth.write_text(json.dumps(content))
    return found, truth


def test_resized_pngs_beside_an_old_json(tmp_path):
    files = resize(tmp_path / "sizes", 2, tell=False)
    with pytest.raises(UserError, match=r"24 x 16 pixels, but the truth says 48 x 32"):
        evaluate_files(*files)
    small = evaluate_files(*files, rules=Rules(as_panopticapi=True))
    assert small.protocol["disagreements"]["sizes"] == 3 and small.panoptic["all"].pq == 0
    report = evaluate_files(*resize(tmp_path / "told", 2, tell=True))
    assert report.protocol["disagreements"]["areas"] == 9
    assert report.panoptic["all"].pq > 0.7  # of pixels, as they are


@pytest.mark.parametrize("area", [None, "5", -3, float("nan"), True])
def test_an_area_that_is_no_number_of_pixels(tmp_path, area):
    def change(truth: Json, found: Json) -> None:
        truth["annotations"][1]["segments_info"][0]["area"] = area

    scored(tmp_path / "plain", change)
    with pytest.raises(UserError, match=r"002\.png: segment 11 has the area"):
        scored(tmp_path / "as", change, as_panopticapi=True)


def test_things_and_stuff_that_look_unlike_what_was_meant(tmp_path):
    def without(truth: Json, found: Json) -> None:
        for category in truth["categories"]:
            del category["isthing"]

    def all_stuff(truth: Json, found: Json) -> None:
        for category in truth["categories"]:
            category["isthing"] = 0

    report, said = scored(tmp_path / "a", without)
    assert "2 of 2 categories of" in said and "have no isthing" in said
    assert report.panoptic["stuff"] is None
    report, said = scored(tmp_path / "b", all_stuff)
    assert "all 2 categories" in said and "person in 3 images" in said
    plain, nothing = scored(tmp_path / "c")
    assert "isthing" not in nothing and "stuff classes" not in nothing
    for change in (without, all_stuff):
        report, said = scored(tmp_path / "d", change, kinds="person; road : stuff")
        assert report.panoptic == plain.panoptic and "isthing" not in said
    with pytest.raises(UserError, match="names 'rod', which is no class"):
        scored(tmp_path / "e", kinds="rod : stuff")


def random_files(folder, seed: int) -> tuple:
    """Truth with crowds, void, unlisted and empty segments and areas that are not so, and
    predictions, at random."""
    rng = np.random.default_rng(seed)
    files = write_pair(folder, images=6)
    truth = json.loads(files[1].read_text())
    found = json.loads(files[0].read_text())
    for part, name in ((truth, "truth"), (found, "found")):
        for row in part["annotations"]:
            ids = np.kron(rng.integers(0, 6, (4, 6)), np.ones((8, 8), int))
            if name == "found":  # mostly as the truth
                same = read_id_png(folder / "truth" / row["file_name"])
                ids = np.where(rng.random((4, 6)).repeat(8, 0).repeat(8, 1) < 0.8, same, ids)
            write_id_png(folder / name / row["file_name"], ids)
            row["segments_info"] = [
                {"id": int(i), "category_id": (1, 7)[int(i) % 2], "iscrowd": 0,
                 "area": int((ids == i).sum())}
                for i in np.unique(ids) if i
            ]  # fmt: skip
            if name == "truth":
                for segment in row["segments_info"]:
                    segment["area"] = int(segment["area"] * rng.choice([0.4, 1, 1, 1, 2])) + 1
                    segment["iscrowd"] = int(rng.random() < 0.2)
                if rng.random() < 0.5:
                    row["segments_info"].pop()
                row["segments_info"].append({"id": 9, "category_id": 7, "iscrowd": 0, "area": 40})
    for path, part in zip(files, (found, truth), strict=True):
        path.write_text(json.dumps(part))
    return files


@pytest.mark.parametrize("seed", range(4))
def test_equals_panopticapi_where_json_and_png_disagree(tmp_path, seed):
    pytest.importorskip("panopticapi")
    files = random_files(tmp_path, seed)
    report = evaluate_files(*files, Scoring(official=True), rules=Rules(as_panopticapi=True))
    told = report.protocol["disagreements"]
    assert told["areas"] and told["listed"] and told["drawn"]  # and `official` found no difference


def test_equals_panopticapi_where_images_are_matched_by_name(tmp_path):
    pytest.importorskip("panopticapi")
    from test_pairing import renumber

    report, said = scored(
        tmp_path, lambda truth, found: renumber(truth, {1: 2, 2: 3, 3: 1}), Scoring(official=True)
    )
    assert report.protocol["matched_by"] == "file_name" and "panopticapi: PQ" in said
