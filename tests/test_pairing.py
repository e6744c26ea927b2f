"""Which prediction is of which image: by id, or by file name; never a silent PQ of 0."""

from __future__ import annotations

import json

import pytest
from drawn_panoptic import Json, scored, write_pair

from concat_cli.app import main
from concat_cli.core.errors import UserError
from concat_cli.core.evaluate.files import evaluate_files


def renumber(part: Json, new: dict[int, object]) -> None:
    for image in part["images"]:
        image["id"] = new[image["id"]]
    for row in part["annotations"]:
        row["image_id"] = new[row["image_id"]]


@pytest.fixture
def plain(tmp_path):
    report, said = scored(tmp_path / "plain")
    assert report.protocol["matched_by"] == "id" and "match" not in said
    return report


@pytest.mark.parametrize(
    "new",
    [{1: 3, 2: 2, 3: 1}, {1: 0, 2: 1, 3: 2}, {1: 71, 2: 72, 3: 73}, {1: "a", 2: "b", 3: "c"}],
    ids=["reversed", "from 0", "others", "text"],
)
def test_ids_of_another_program_are_matched_by_file_name(tmp_path, plain, new):
    """As a labelling tool numbers by upload, an exporter from 0, and others as they like."""
    report, said = scored(tmp_path / "new", lambda truth, found: renumber(truth, new))
    assert report.panoptic == plain.panoptic and report.semantic == plain.semantic
    assert report.protocol["matched_by"] == "file_name"
    assert "3 images are matched by file name" in said and ".jpg in the predictions)" in said


def test_paths_and_endings_of_a_file_name_may_differ(tmp_path, plain):
    def change(truth, found):
        renumber(truth, {1: 2, 2: 3, 3: 1})
        for image in found["images"]:
            image["file_name"] = "C:\\photos\\" + image["file_name"].replace(".jpg", ".webp")

    report, _ = scored(tmp_path / "new", change)
    assert report.panoptic == plain.panoptic


def test_of_equal_names_the_folder_decides(tmp_path, plain):
    def change(truth, found):
        for part, folder in ((truth, ""), (found, "data/")):
            for image, name in zip(part["images"], ("a/1", "b/1", "b/2"), strict=True):
                image["file_name"] = f"{folder}{name}.jpg"
        renumber(truth, {1: 2, 2: 3, 3: 1})

    report, _ = scored(tmp_path / "new", change)
    assert report.panoptic == plain.panoptic


def test_numbers_and_text_are_one_id(tmp_path, plain):
    def text(truth, found):
        found["images"] = []
        for row in found["annotations"]:
            row["image_id"] = str(row["image_id"])

    report, _ = scored(tmp_path / "new", text)
    assert report.panoptic == plain.panoptic and report.protocol["matched_by"] == "id"


def test_ids_that_fit_are_kept_where_names_tell_nothing(tmp_path, plain):
    def rename(truth, found):
        for image in found["images"]:
            image["file_name"] = f"IMG_{image['id']}.jpg"

    report, said = scored(tmp_path / "new", rename)
    assert report.panoptic == plain.panoptic
    assert "matched by id, though no file name is in both" in said


def test_a_part_that_does_not_fit_stops_with_the_cause(tmp_path):
    def change(truth, found):
        renumber(truth, {1: 2, 2: 1, 3: 3})
        found["images"][2]["file_name"] = "other.jpg"

    with pytest.raises(UserError, match=r"ids do not fit together.*1 of the 3 images.*003\.jpg"):
        scored(tmp_path, change)


def test_names_of_pngs_alone_are_a_reason_to_ask(tmp_path, plain):
    def change(truth, found):
        renumber(truth, {1: 2, 2: 1, 3: 3})
        found["images"] = []

    with pytest.raises(UserError, match="2 PNGs are named like another image") as caught:
        scored(tmp_path / "a", change)
    assert "--match name" in caught.value.hint
    report, _ = scored(tmp_path / "b", change, match="name")
    assert report.panoptic == plain.panoptic
    report, _ = scored(tmp_path / "c", change, match="id")
    assert report.panoptic["all"].pq < plain.panoptic["all"].pq


def test_names_of_pngs_count_where_ids_are_not_there(tmp_path, plain):
    def change(truth, found):
        renumber(truth, {1: "x", 2: "y", 3: "z"})
        found["images"] = []

    report, _ = scored(tmp_path, change)
    assert report.panoptic == plain.panoptic


def test_a_missing_prediction_is_still_called_that(tmp_path):
    with pytest.raises(UserError, match="has no prediction for 1 of the 3 images"):
        scored(tmp_path, lambda truth, found: (found["annotations"].pop(), found["images"].pop()))


def test_a_png_may_be_named_by_the_images_id_or_file(tmp_path, plain):
    def nameless(truth, found):
        for row in found["annotations"]:
            del row["file_name"]

    report, _ = scored(tmp_path / "file", nameless)  # 001.png, of 001.jpg
    assert report.panoptic == plain.panoptic
    files = write_pair(
        tmp_path / "id",
        lambda t, f: (nameless(t, f), renumber(t, {1: "u", 2: "v", 3: "w"}), f.update(images=[])),
    )
    for row in (content := json.loads(files[0].read_text()))["annotations"]:
        (tmp_path / f"id/found/{row['image_id']:03d}.png").rename(
            tmp_path / f"id/found/{(new := 'uvw'[row['image_id'] - 1])}.png"
        )
        row["image_id"] = new
    files[0].write_text(json.dumps(content))
    assert evaluate_files(*files).panoptic == plain.panoptic
    (tmp_path / "id/found/v.png").unlink()
    with pytest.raises(UserError, match=r"image v has no file_name, and .* holds none of"):
        evaluate_files(*files)


@pytest.mark.parametrize(
    "name", ["/etc/x.png", "../truth/001.png", "a/../../x.png", "..\\x.png", "C:\\x.png"]
)
def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path, name):
    for side in (0, 1):

        def change(*parts, side=side):
            parts[side]["annotations"][1]["file_name"] = name

        with pytest.raises(UserError, match="leads out of"):
            scored(tmp_path, change)


ODD = [None, [1], {"a": 1}, float("nan"), True, 1e400]


@pytest.mark.parametrize("value", ODD, ids=str)
@pytest.mark.parametrize("field", ["image_id", "category_id", "id", "height"])
def test_odd_values_name_the_file_and_the_field(tmp_path, capsys, field, value):
    def change(truth, found):
        row = {
            "image_id": found["annotations"][0],
            "category_id": found["annotations"][0]["segments_info"][0],
            "id": truth["annotations"][0]["segments_info"][0],
            "height": truth["images"][0],
        }[field]
        row[field] = value

    found, truth = write_pair(tmp_path, change)
    assert main(["evaluate", "--predictions", str(found), "--truth", str(truth)]) == 2
    said = capsys.readouterr().err
    assert ("found.json" if field in ("image_id", "category_id") else "truth.json") in said
    assert field in said


def test_deeply_nested_and_huge_values_end_in_one_error(tmp_path, capsys):
    found, truth = write_pair(tmp_path)
    whole = truth.read_text()
    huge = whole.replace('"id": 11,', f'"id": 1{"0" * 5000},')
    for text in ("[" * 100_000, '{"annotations": ' + "[" * 5000, huge):
        truth.write_text(text)
        assert main(["evaluate", "--predictions", str(found), "--truth", str(truth)]) == 2
        assert "truth.json" in capsys.readouterr().err
    inner = tmp_path / "annotations"
    inner.mkdir()
    (tmp_path / "truth").rename(inner / "truth")
    (inner / "truth.json").write_text(whole)
    (tmp_path / "dataset.json").write_text("[" * 100_000)
    assert evaluate_files(found, inner / "truth.json").panoptic["seen"] is None
