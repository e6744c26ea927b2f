"""labelme's folders as `prepare-data custom --json FOLDER` reads them."""

from __future__ import annotations

import base64
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from drawn_labelme import SIZE, Shape, pixels, shape, within, write_labelme
from drawn_labels import encode
from drawn_own import prepared, same

from concat_cli.app import main
from concat_cli.core.errors import UserError
from concat_cli.core.prepare.recipes.custom import find

RING = np.ones((8, 9), bool)
RING[3:5, 3:6] = False
BOX = within(2, 3, 12, 9)
RING_THERE = np.zeros(SIZE, bool)
RING_THERE[20:28, 40:49] = RING


def all_kinds() -> list[Shape]:
    """A shape of each kind that covers something, apart from each other, and one that does not."""
    return [
        shape("dog", "polygon", [[2, 3], [12, 3], [12, 9], [2, 9]]),
        shape("cat", "rectangle", [[30, 14], [20, 4]]),
        shape("cup", "oriented_rectangle", [[40, 2], [50, 2], [50, 8], [40, 8]]),
        shape("ball", "circle", [[10.0, 25.0], [16.0, 25.0]]),
        pixels("ring", RING, 40, 20),
        shape("dog", "point", [[1, 1]]),
    ]


def test_each_kind_of_shape(tmp_path: Path) -> None:
    write_labelme(tmp_path / "photos/a.json", all_kinds())
    found = dict(prepared(tmp_path, json="photos")["a.jpg"])
    y, x = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
    wanted = {
        "dog": BOX,
        "cat": within(20, 4, 30, 14),
        "cup": within(40, 2, 50, 8),
        "ring": RING_THERE,
    }
    for name, mask in wanted.items():
        assert (found[name] == mask).all(), name
    distance = np.hypot(x - 10, y - 25)
    odd = found["ball"] != (distance < 6)
    assert np.abs(distance[odd] - 6).max(initial=0) < 0.5
    assert sorted(found) == ["ball", "cat", "cup", "dog", "ring"]
    (told,) = find(tmp_path, json="photos").notes
    assert "1 shapes are left out" in told and "1 point" in told


def test_a_group_is_one_instance(tmp_path: Path) -> None:
    """Of outlines, and of outlines with pixels; a group's number counts within its label."""
    triangle = [[2, 3], [12, 3], [12, 9], [2, 9]]
    far = [[30, 30], [34, 30], [34, 36], [30, 36]]
    shapes = [
        shape("dog", "polygon", triangle, group_id=1),
        shape("cat", "polygon", [[50, 2], [58, 2], [58, 9], [50, 9]], group_id=1),
        shape("dog", "polygon", far, group_id=1),
        shape("cat", "rectangle", [[20, 20], [24, 24]], group_id=2),
        pixels("cat", RING, 40, 20, group_id=2),
    ]
    write_labelme(tmp_path / "photos/a.json", shapes)
    found = prepared(tmp_path, json="photos")["a.jpg"]
    cats = within(50, 2, 58, 9), within(20, 20, 24, 24) | RING_THERE
    dog = BOX | within(30, 30, 34, 36)
    assert same(found, [("dog", dog), ("cat", cats[0]), ("cat", cats[1])])


def test_what_is_not_read_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also a second time, when what was prepared lies in the same folder."""
    box = [[2, 3], [12, 9]]
    shapes = [shape("dog", "rectangle", box, flags={"blurred": True, "far": False})]
    shapes += [shape("__ignore__", "rectangle", box), shape("dog", "linestrip", box)]
    write_labelme(tmp_path / "a.json", shapes, flags={"night": True})
    write_labelme(tmp_path / "b.json", [])
    (tmp_path / "c.jpg").write_bytes((tmp_path / "a.jpg").read_bytes())
    for again in ("", "2 JSON files without `shapes`"):
        line = ["prepare-data", "custom", str(tmp_path), "--json", ".", "--dev", "1"]
        assert main(line) == 0
        text = " ".join((read := capsys.readouterr()).out.split() + read.err.split())
        assert "2 shapes are left out" in text and "1 __ignore__" in text and again in text
        assert "flags of 1 pictures and 1 shapes are set" in text
        assert "1 pictures have no JSON and are left out, such as c.jpg" in text
        if not again:
            (tmp_path / "other.json").write_text("{}")
    rows = (tmp_path / "concat/index/val.jsonl").read_text().splitlines()
    assert [json.loads(row)["image"] for row in rows] == ["a.jpg", "b.jpg"]


def test_pictures_elsewhere(tmp_path: Path) -> None:
    """As `labelme --output` writes, on Windows too; and, with --images, wherever they are now."""
    box = shape("dog", "rectangle", [[2, 3], [12, 9]])
    write_labelme(tmp_path / "json/a.json", [box], "../photos/deep/a.jpg")
    write_labelme(tmp_path / "json/b.json", [box], "..\\photos\\b.jpg")
    source = find(tmp_path, json="json")
    assert source.parts["train"].images == str(tmp_path / "photos")
    found = prepared(tmp_path, json="json")
    assert sorted(found) == ["b.jpg", "deep/a.jpg"]
    assert all(same(segments, [("dog", BOX)]) for segments in found.values())
    for name in ("a", "b"):
        path = tmp_path / f"json/{name}.json"
        content = json.loads(path.read_text()) | {"imagePath": f"D:\\data\\{name}.jpg"}
        path.write_text(json.dumps(content))
    assert sorted(prepared(tmp_path, json="json", images="photos")) == ["b.jpg", "deep/a.jpg"]


def test_pictures_inside_of_their_json(tmp_path: Path) -> None:
    """Those that lie nowhere else; all are then in one folder. The second time nothing is written,
    a missing one that no JSON holds is missing, and both parts of a share are served."""
    box = shape("dog", "rectangle", [[2, 3], [12, 9]])
    for name in ("sub/a", "b", "c"):
        write_labelme(tmp_path / f"json/{name}.json", [box], f"{name[-1]}.png")
        path = tmp_path / f"json/{name}.png"
        path.write_bytes(encode(np.full((*SIZE, 3), ord(name[-1]), np.uint8)))
        data = base64.b64encode(path.read_bytes()).decode() if name != "c" else None
        file = path.with_suffix(".json")
        file.write_text(json.dumps(json.loads(file.read_text()) | {"imageData": data}))
    wanted = (tmp_path / "json/sub/a.png").read_bytes()
    (tmp_path / "json/sub/a.png").unlink()
    (told,) = find(tmp_path, json="json").notes
    assert "1 pictures are in their JSON alone, so that all 3 are written" in told
    for given in ({}, {"val_share": 0.4}):
        found = prepared(tmp_path, json="json", **given)
        assert len(found) == (1 if given else 3)
        assert all(same(segments, [("dog", BOX)]) for segments in found.values())
    there = tmp_path / "out/pictures/sub/a.png"
    assert there.read_bytes() == wanted
    before = there.stat().st_mtime_ns
    prepared(tmp_path, json="json")
    assert there.stat().st_mtime_ns == before
    path = tmp_path / "json/sub/a.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"imageData": "no base64"}))
    with pytest.raises(UserError, match=r"a\.json: its `imageData` is no picture"):
        prepared(tmp_path, json="json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"imageData": None}))
    with pytest.raises(UserError, match=r"Missing: .*a\.png"):
        prepared(tmp_path, json="json")


def test_in_a_zip(tmp_path: Path) -> None:
    write_labelme(tmp_path / "a.json", [shape("dog", "rectangle", [[2, 3], [12, 9]])], "p/a.jpg")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as file:
        for name in ("a.json", "p/a.jpg"):
            file.write(tmp_path / name, f"set/{name}")
    (tmp_path / "a.json").unlink()
    assert same(prepared(tmp_path, json="all.zip!set")["a.jpg"], [("dog", BOX)])


def test_parts_have_the_same_classes(tmp_path: Path) -> None:
    """Each part knows the labels alone that it holds."""
    box = [[2, 3], [12, 9]]
    for part, labels in (("t", ("dog", "ant")), ("v", ("cat", "dog"))):
        for label in labels:
            write_labelme(tmp_path / part / f"{label}.json", [shape(label, "rectangle", box)])
    source = find(tmp_path, json="t", val_json="v")
    assert source.vocabulary.names == ("ant", "cat", "dog")
    found = prepared(tmp_path, json="t", val_json="v")
    assert same(found["cat.jpg"], [("cat", BOX)]) and same(found["dog.jpg"], [("dog", BOX)])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shapes": {}}, r"a\.json: its `shapes` is .*no list"),
        ({"shapes": [3]}, "shape 1: it is no object"),
        ({"shapes": [shape("", "polygon", [])]}, "shape 1: its `label`"),
        ({"shapes": [shape("x", "rectangle", [[1, 2]])]}, r"\('x', rectangle\): it has 1 points"),
        ({"shapes": [shape("x", "polygon", [[1, 2, 3]] * 3)]}, "too many values"),
        (
            {"shapes": [shape("x", "circle", [[1, 2], [float("nan"), 2]])]},
            "a corner is no number of pix",
        ),
        ({"shapes": [pixels("x", RING, 3, 3, mask="AAAA")]}, "no PNG in base64"),
        ({"shapes": [pixels("x", RING, 3, 3, points=[[3, 3], [4, 4]])]}, r"its box \(2, 2\)"),
        ({"shapes": [pixels("x", RING, 3, 3)], "imageHeight": None}, "no `imageHeight`"),
        ({"shapes": [pixels("x", RING, 3, 3)], "imageHeight": 10**9}, "60 x 1000000000 pixels"),
        ({"shapes": []}, "hold no shape"),
        ({"imagePath": 3}, "its `imagePath` is 3, no text"),
        ({"imageWidth": "wide"}, "its `imageWidth`"),
        ({"imageHeight": SIZE[0] + 1}, r"a\.jpg.*41"),
        ({"imagePath": "b.jpg"}, r"Missing: .*b\.jpg"),
    ],
    ids=range(15),
)
def test_what_is_wrong_is_named(tmp_path: Path, change: dict, words: str) -> None:
    write_labelme(tmp_path / "photos/a.json", all_kinds())
    path = tmp_path / "photos/a.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=words) as caught:
        prepared(tmp_path, json="photos")
    assert caught.value.hint


def test_folders_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/x.json").write_text('{"images": []}')
    with pytest.raises(UserError, match=r"holds no JSON of labelme \(1 others\)"):
        find(tmp_path, json="empty")
    for name in ("a", "b"):
        write_labelme(tmp_path / f"twice/{name}.json", all_kinds(), "a.jpg")
    with pytest.raises(UserError, match=r"a\.json and b\.json are both of the picture"):
        find(tmp_path, json="twice")


def test_files_of_labelme_itself(tmp_path: Path) -> None:
    """What `LabelFile` saves is read, as the library's own masks have it that are drawn at 16 times
    the size: at the picture's, they hold every pixel that the outline touches and are larger."""
    labelme = pytest.importorskip("labelme")
    from labelme.utils import img_arr_to_b64, shape_to_mask

    random = np.random.default_rng(0)
    star = [
        [30 + r * np.cos(t), 20 + r * np.sin(t)]
        for t, r in zip(np.linspace(0, 6, 9), random.uniform(6, 18, 9), strict=True)
    ]
    drawn = [
        shape("star", "polygon", star),
        shape("box", "rectangle", [[50.4, 30.2], [33.6, 12.9]]),
        shape("turned", "oriented_rectangle", [[20, 5], [40, 12], [36, 24], [16, 17]]),
        shape("disc", "circle", [[25.3, 20.2], [33.1, 26.4]]),
        shape("ring", "mask", [[40, 20], [48, 27]], mask=img_arr_to_b64(RING.astype(np.uint8))),
    ]
    (tmp_path / "photos").mkdir()
    for one in drawn:
        picture = tmp_path / f"photos/{one['label']}.jpg"
        picture.write_bytes(encode(np.full((*SIZE, 3), 99, np.uint8), "JPEG"))
        data = picture.read_bytes() if one["label"] == "star" else None
        labelme.LabelFile().save(
            str(picture.with_suffix(".json")), [one], picture.name, *SIZE, image_data=data
        )
    for name, ((label, mask),) in prepared(tmp_path, json="photos").items():
        one = next(one for one in drawn if one["label"] == label)
        if label == "ring":
            assert (mask == RING_THERE).all()
            continue
        assert shape_to_mask(SIZE, one["points"], one["shape_type"]).sum() > mask.sum()
        fine = [[16 * x, 16 * y] for x, y in one["points"]]
        theirs = shape_to_mask((16 * SIZE[0], 16 * SIZE[1]), fine, one["shape_type"])
        share = theirs.reshape(SIZE[0], 16, SIZE[1], 16).mean((1, 3))
        assert mask[share > 0.7].all() and not mask[share < 0.3].any(), name
