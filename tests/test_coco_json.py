"""COCO JSON files as people's tools write them: what is read, and which field is named as odd."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from concat_cli.core.data.coco import CocoJson, read_coco
from concat_cli.core.data.json_values import mask_of
from concat_cli.core.errors import UserError

SQUARE = [4, 4, 20, 4, 20, 16, 4, 16]


def listing() -> dict[str, Any]:
    """Two images with a square each."""
    return {
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "height": 32, "width": 48} for i in (1, 2)
        ],
        "annotations": [
            {"id": 10 * i, "image_id": i, "category_id": 7, "segmentation": [SQUARE], "iscrowd": 0}
            for i in (1, 2)
        ],
        "categories": [{"id": 7, "name": "square"}],
    }  # fmt: skip


def panoptic() -> dict[str, Any]:
    found = listing()
    found["annotations"] = [
        {"image_id": i, "file_name": f"{i}.png", "segments_info": [{"id": 5, "category_id": 7}]}
        for i in (1, 2)
    ]
    return found


def read(folder: Path, content: dict[str, Any]) -> CocoJson:
    (folder / "own.json").write_text(json.dumps(content))
    return read_coco(folder / "own.json")


@pytest.mark.parametrize(
    "form",
    [
        [SQUARE],
        SQUARE,
        [[SQUARE]],
        [[[[SQUARE]]]],
        [[4, 4], [20, 4], [20, 16], [4, 16]],
        [[[4, 4], [20, 4], [20, 16], [4, 16]]],
        [list(map(str, SQUARE))],
        [["4", "4"], ["20", "4"], ["20", "16"], ["4", "16"]],
        [{"exterior": [[4, 4], [20, 4], [20, 16], [4, 16]], "interiors": []}],
        {"exterior": [[4, 4], [20, 4], [20, 16], [4, 16]]},
        [SQUARE, [4, 4, 20, 16]],  # a box beside the outline says nothing more
    ],
    ids=range(11),
)
def test_outlines_of_every_obvious_form(form: Any) -> None:
    found = mask_of(form)
    assert isinstance(found, list) and [list(polygon) for polygon in found] == [SQUARE]


def test_several_outlines_stay_several() -> None:
    pairs = [[[4, 4], [9, 4], [9, 9]], [[1, 1], [3, 1], [3, 3]]]
    for form in (pairs, [[4, 4, 9, 4, 9, 9], [1, 1, 3, 1, 3, 3]]):
        found = mask_of(form)
        assert isinstance(found, list)
        assert [list(polygon) for polygon in found] == [[4, 4, 9, 4, 9, 9], [1, 1, 3, 1, 3, 3]]


@pytest.mark.parametrize("form", [None, [], [[]], [[4, 4, 20, 16]], [[4, 4], [20, 16]]])
def test_what_covers_nothing(form: Any) -> None:
    assert mask_of(form) is None


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("polygon", "is 'polygon'"),
        (5, "is 5"),
        ([["a", "b"]], "no outline of numbers"),
        ([[4, 4, None, 4, 20, 16]], "no outline of numbers"),
        ([[10**400, 4, 4, 4, 20, 16]], "no outline of numbers"),
        ([{"exterior": [[1, 1]], "interiors": [[[2, 2]]]}], "without holes"),
        ([{"outline": [[1, 1]]}], "no outline"),
        ([SQUARE, 5], "no outline"),
        ([[4, 4, 20, 4, 20]], "an x without a y"),
        ({"counts": [3]}, "`size` of its run lengths is null"),
        ({"size": [32, 48], "counts": None}, "`counts` of its run lengths are null"),
        ({"size": [32, 4.5], "counts": "abc"}, "`size`"),
    ],
)
def test_masks_that_cannot_be_read_say_why(form: Any, words: str) -> None:
    found = mask_of(form)
    assert isinstance(found, str) and words in found


def test_text_ids_work_everywhere(tmp_path: Path) -> None:
    content = listing()
    for image, annotation in zip(content["images"], content["annotations"], strict=True):
        image["id"] = annotation["image_id"] = f"0000001_02999_d_{image['id']:07d}"
        annotation.update(id=f"a1c{annotation['id']}-77", category_id="square-7")
    content["categories"] = [{"id": "square-7", "name": "square"}, {"id": "b", "name": "ball"}]
    found = read(tmp_path, content)
    assert [row["id"] for row in found.categories] == [2, 1]  # numbered in the order of the texts
    assert [[s.category_id for s in item.segments or ()] for item in found.items] == [[2], [2]]
    assert len(found.notes) == 2 and "'b' is 1" in found.notes[0]
    ids = [item.image_id for item in found.items]
    assert len(set(ids)) == 2 and min(ids) > 1 << 20
    content["images"].reverse()
    assert {i.image: i.image_id for i in read(tmp_path, content).items} == {
        item.image: item.image_id for item in found.items
    }


def test_numbers_may_be_written_as_text_or_with_a_point(tmp_path: Path) -> None:
    plain = read(tmp_path, listing())
    content = listing()
    content["images"][0].update(id="1", height=32.0, width="48")
    content["annotations"][0].update(id="10", image_id=1.0, category_id="7", iscrowd="0")
    content["annotations"][1].update(iscrowd=False)
    content["categories"][0]["id"] = 7.0
    found = read(tmp_path, content)
    assert found == plain
    content = panoptic()
    content["annotations"][0]["segments_info"][0].update(id="5", iscrowd=None)
    assert read(tmp_path, content) == read(tmp_path, panoptic())


ODD: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "image id null": (lambda j: j["images"][0].update(id=None), "image null: its `id` is null"),
    "image id missing": (lambda j: j["images"][0].pop("id"), "image: it has no `id`"),
    "image id a dict": (
        lambda j: j["images"][0].update(id={"$oid": "5"}),
        r"its `id` is \{'\$oid': '5'\}",
    ),
    "image id huge": (lambda j: j["images"][0].update(id=10**30), "its `id` is 1000"),
    "image an array": (lambda j: j["images"].append([1]), r"image \[1\] is no object"),
    "height text": (lambda j: j["images"][0].update(height="tall"), "image 1: its `height` is"),
    "file_name null": (lambda j: j["images"][0].update(file_name=None), "`file_name` is null"),
    "annotation id null": (
        lambda j: j["annotations"][0].update(id=None),
        "annotation null: its `id` is null",
    ),
    "annotation id missing": (lambda j: j["annotations"][0].pop("id"), "tion: it has no `id`"),
    "image_id a list": (
        lambda j: j["annotations"][1].update(image_id=[2]),
        r"annotation 20: its `image_id` is \[2\]",
    ),
    "image_id unknown": (
        lambda j: j["annotations"][1].update(image_id=5),
        "annotation 20: its `image_id` is 5, which no image has",
    ),
    "category_id NaN": (
        lambda j: j["annotations"][1].update(category_id=float("nan")),
        "annotation 20: its `category_id` is nan",
    ),
    "category_id of none": (
        lambda j: j["annotations"][1].update(category_id="dog"),
        "annotation 20: its `category_id` is 'dog', which no category has",
    ),
    "iscrowd text": (lambda j: j["annotations"][0].update(iscrowd="maybe"), "`iscrowd` is 'maybe'"),
    "isthing text": (lambda j: j["categories"][0].update(isthing="tree"), "`isthing` is 'tree'"),
    "category id list": (lambda j: j["categories"][0].update(id=[7]), r"category \[7\]: its `id`"),
    "category name null": (lambda j: j["categories"][0].update(name=None), "`name` is null"),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD)
def test_what_is_odd_names_its_field(tmp_path: Path, case: str) -> None:
    change, words = ODD[case]
    content = listing()
    change(content)
    with pytest.raises(UserError, match=words) as caught:
        read(tmp_path, content)
    assert "own.json: " in caught.value.what and "ownload" not in caught.value.hint


def test_what_is_odd_in_a_segment_names_its_image(tmp_path: Path) -> None:
    for field, value in (("id", None), ("id", "five"), ("category_id", {}), ("iscrowd", [1])):
        content = panoptic()
        content["annotations"][1]["segments_info"][0][field] = value
        with pytest.raises(UserError, match=f"segments_info of image 2, segment .*`{field}` is"):
            read(tmp_path, content)


def test_kinds_may_be_text(tmp_path: Path) -> None:
    kinds: dict[Any, int] = {"True": 1, "false": 0, 1.0: 1, False: 0, "0": 0}
    for value, number in kinds.items():
        content = panoptic()
        content["categories"][0]["isthing"] = value
        assert read(tmp_path, content).categories[0]["isthing"] == number
    content["categories"][0]["isthing"] = None
    assert "isthing" not in read(tmp_path, content).categories[0]


def test_a_missing_or_null_mask_takes_its_annotation_not_the_file(tmp_path: Path) -> None:
    content = listing()
    del content["annotations"][0]["segmentation"]
    masks = [[s.mask for s in item.segments or ()] for item in read(tmp_path, content).items]
    assert masks[0] == [None] and masks[1][0] is not None
    content["images"][0].update(height=None, width=None)  # then the photo says it
    assert read(tmp_path, content).items[0].size is None


def test_boxes_alone_and_normalised_outlines_are_named(tmp_path: Path) -> None:
    content = listing()
    for annotation in content["annotations"]:
        annotation.update(segmentation=[], bbox=[4, 4, 16, 12])
    with pytest.raises(UserError, match=r"none of its 2 annotations has an outline.*are boxes"):
        read(tmp_path, content)
    for annotation in content["annotations"]:
        annotation.update(segmentation=[[0.1, 0.1, 0.5, 0.1, 0.5, 0.5]])
    with pytest.raises(UserError, match="all 2 outlines lie within 0 and 1: they are normalised"):
        read(tmp_path, content)
    content["annotations"][0]["segmentation"] = [SQUARE]
    assert len(read(tmp_path, content).items) == 2  # a tiny one among others may well be


def test_a_json_that_nests_too_deeply_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    for depth in (500, 100_000):  # one that Python's parser takes, one that it does not
        nested = "[" * depth + "]" * depth
        path.write_text(json.dumps(listing()).replace("32", nested, 1))
        with pytest.raises(UserError, match=r"own\.json") as caught:
            read_coco(path)
        assert len(caught.value.what) < 300
    nested = json.loads("[" * 500 + "]" * 500)
    assert mask_of(nested) is None and isinstance(mask_of([nested, "a"]), str)


def test_a_json_without_classes_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"own\.json lists no category"):
        read(tmp_path, panoptic() | {"categories": []})


def test_unused_parents_are_known(tmp_path: Path) -> None:
    content = listing()
    content["categories"] = [
        {"id": 0, "name": "square", "supercategory": "none"},  # the project, named like its class
        {"id": 7, "name": "square", "supercategory": "square"},
        {"id": 8, "name": "ball", "supercategory": "ball"},  # unused, but nobody's parent
    ]
    assert read(tmp_path, content).parents == {0}
    content["annotations"][0]["category_id"] = 0
    with pytest.raises(UserError, match="two categories have the name 'square'"):
        read(tmp_path, content)
