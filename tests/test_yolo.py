"""YOLO polygons as `prepare-data custom --yolo data.yaml` reads them."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from drawn_labelme import SIZE, within
from drawn_own import prepared, same
from drawn_yolo import NAMES, ONE, draw_yolo, line, put
from PIL import Image

from concat_cli.core.errors import UserError
from concat_cli.core.prepare.recipes.custom import find

DOG = [("dog", within(*ONE[0][1:]))]


def notes(root: Path, **given: str) -> str:
    return "\n".join(find(root, yolo="data.yaml", **given).notes)


def test_parts_and_classes(tmp_path: Path) -> None:
    draw_yolo(tmp_path)
    source = find(tmp_path, yolo="data.yaml")
    listed = {part: [i.image for i in one.items] for part, one in source.parts.items()}
    assert listed == {"train": ["a.jpg", "b.jpg"], "val": ["c.jpg"]}
    assert source.vocabulary.names == ("cat", "dog") and source.tasks == ("instance",)
    assert source.notes == ()
    assert same(prepared(tmp_path, yolo="data.yaml")["c.jpg"], DOG)


@pytest.mark.parametrize(
    ("text", "more"),
    [
        ("train: ../train/images\nval: ../valid/images\nnames: ['cat', 'dog']\nnc: 2\n", ""),
        ("path: .\ntrain: [train/images]\nval: [valid/images]\n" + NAMES, ""),
        ("path: ../data/set\ntrain: train.txt\nval: ./valid/images/\n" + NAMES, ""),
        ("train: near.txt\nvalidation: valid/images\ntest: none\n" + NAMES, "`test` is not read"),
        ("path: /content/set\ntrain: train/images\nval: valid/images\n" + NAMES, "own folder"),
    ],
    ids=["roboflow", "lists", "names of the files", "beside the list", "another machine"],
)
def test_ways_to_say_where(tmp_path: Path, text: str, more: str) -> None:
    """Also where no part's pictures lie in a folder of its name, as Roboflow has it."""
    root = tmp_path / "data/set"
    for name in ("train/images/a", "valid/images/b"):
        put(root, f"{name}.jpg", f"{name.replace('images', 'labels')}.txt")
    (root / "data.yaml").write_text(text)
    (root / "train.txt").write_text("train/images/a.jpg\n")
    (root / "near.txt").write_text("./train/images/a.jpg\n")
    assert same(prepared(root, yolo="data.yaml")["b.jpg"], DOG)
    assert more in notes(root)
    assert [i.image for i in find(root, yolo="data.yaml").parts["train"].items] == ["a.jpg"]


def test_a_zip_is_read_in_place(tmp_path: Path) -> None:
    draw_yolo(tmp_path / "set")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as file:
        for path in sorted((tmp_path / "set").rglob("*.*")):
            file.write(path, str(path.relative_to(tmp_path / "set")))
    found = prepared(tmp_path, yolo="all.zip!data.yaml")
    assert same(found["c.jpg"], DOG)


def test_places_that_the_file_does_not_have(tmp_path: Path) -> None:
    """As of supervision: labels in any folder, and a `data.yaml` of names alone."""
    put(tmp_path, "photos/in/a.jpg", "texts/in/a.txt")
    (tmp_path / "data.yaml").write_text("nc: 2\nnames: [cat, dog]\n")
    given = {"yolo": "data.yaml", "images": "photos", "labels": "texts"}
    assert same(next(iter(prepared(tmp_path, **given).values())), DOG)
    with pytest.raises(UserError, match="where the pictures of train are"):
        find(tmp_path, yolo="data.yaml")


def test_val_that_is_train_is_one_part(tmp_path: Path) -> None:
    draw_yolo(tmp_path)
    path = tmp_path / "data.yaml"
    path.write_text(path.read_text().replace("val: images/val", "val: images/train"))
    assert list(find(tmp_path, yolo="data.yaml").parts) == ["train"]
    path.write_text(path.read_text().replace("val: images/train", "val: images"))
    assert "2 of 3 pictures of val are also in train" in notes(tmp_path)


def test_lines_that_are_not_taken_as_they_are(tmp_path: Path) -> None:
    """Boxes are left out, rows that stand twice count once, and what leads out is cut off."""
    dog, out = line(*ONE[0]), line(0, 30, 10, 90, 30)
    again, box = dog.replace("1 ", "1.0 ", 1), "0 0.5 0.5 0.1 0.1"
    rows = [dog, box, f"{box} 0.9", again, "", out]
    draw_yolo(tmp_path, "\n".join(rows))
    put(tmp_path, "images/val/without.jpg")
    (tmp_path / "labels/val/of none.txt").touch()
    found = prepared(tmp_path, yolo="data.yaml")
    assert same(found["c.jpg"], [*DOG, ("cat", within(30, 10, 60, 30))])
    assert found["without.jpg"] == []
    told = notes(tmp_path)
    for one in (
        "val: 1 of 2 pictures have no text file",
        "val: 2 labels are boxes without an outline and left out, 3 have one",
        "val: 1 labels stand twice",
        "val: 1 outlines lead out",
        "val: 1 text files are of no picture",
    ):
        assert one in told


def test_photos_that_exif_turns(tmp_path: Path) -> None:
    """Shares are of the upright picture, as ultralytics reads it."""
    draw_yolo(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = Image.new("RGB", SIZE)  # stored with its sides swapped
    lying.save(tmp_path / "images/val/c.jpg", exif=exif)
    assert same(prepared(tmp_path, yolo="data.yaml")["c.jpg"], DOG)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("2 0 0 1 0 1 1", r"a\.txt, line 1: the class 2 is none of the 2"),
        ("\n0.5 0 0 1 0 1 1", "line 2: the class 0.5"),
        ("cat 0 0 1 0 1 1", "could not convert"),
        ("0 10 10 40 10 40 30", "10 is no share"),
        ("0 nan 0 1 0 1 1", "nan is no share"),
        ("0 0 0 1 0 1 1 0.9", "7 numbers follow the class, .*a confidence"),
        ("0 0 0 1", "3 numbers follow the class"),
        ("0 0.5 0.5 0.1 0.1", "none of its 2 labels has an outline: these are boxes"),
        ("", "its text files hold no label"),
    ],
    ids=range(9),
)
def test_what_is_wrong_in_a_label_is_named(tmp_path: Path, text: str, words: str) -> None:
    draw_yolo(tmp_path, text)
    with pytest.raises(UserError, match=words) as caught:
        find(tmp_path, yolo="data.yaml")
    assert caught.value.hint


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1", "no valid YAML"),
        ("- cat", "no `names`"),
        ("train: images/train\nnc: 2", "names no classes"),
        ("train: images/train\nnc: 3\n" + NAMES, "`nc` is 3, but `names` has 2"),
        ("train: images/train\nnames: {a: cat}", "a key that is no number"),
        ("train: images/train\nnames: [cat, cat]", "two categories have the name 'cat'"),
        ("train: images/train\nkpt_shape: [17, 3]\n" + NAMES, "key points"),
        ("train: images/none\n" + NAMES, "images/none, which is neither a folder nor a list"),
        ("train: labels/train\n" + NAMES, "no picture of train is there"),
        (f"train: {'x' * 5000}\n" + NAMES, "neither a folder nor a list"),
        (f"train: {'x' * 5000}.zip!a\n" + NAMES, "neither a folder nor a list"),
    ],
    ids=range(11),
)
def test_what_is_wrong_in_the_yaml_is_named(tmp_path: Path, text: str, words: str) -> None:
    draw_yolo(tmp_path)
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        find(tmp_path, yolo="data.yaml")
    assert caught.value.hint


def test_what_does_not_fit_beside_it(tmp_path: Path) -> None:
    draw_yolo(tmp_path)
    with pytest.raises(UserError, match="brings its own classes"):
        find(tmp_path, yolo="data.yaml", classes="data.yaml")
    with pytest.raises(UserError, match="val is given"):
        find(tmp_path, yolo="data.yaml", val_share=0.5)
    (tmp_path / "labels").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"looked for .*labels/train/a\.txt"):
        find(tmp_path, yolo="data.yaml")


def test_a_picture_that_cannot_be_read_is_faulty(tmp_path: Path) -> None:
    draw_yolo(tmp_path)
    (tmp_path / "images/val/c.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"1 of 1 images is faulty: .*c\.jpg"):
        prepared(tmp_path, yolo="data.yaml")


def ellipse() -> np.ndarray:
    y, x = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
    return ((x - 30) / 20) ** 2 + ((y - 20) / 12) ** 2 < 1


def test_files_of_supervision(tmp_path: Path) -> None:
    """Its outlines go through the centres of the outer pixels, which it fills with the pixels that
    they touch; ours is within a pixel of that, a row and a column smaller."""
    supervision = pytest.importorskip("supervision")
    put(tmp_path, "photos/a.jpg")
    found = supervision.Detections(
        xyxy=np.array([[10.0, 8, 50, 32]]), mask=ellipse()[None], class_id=np.array([1])
    )
    name = str(tmp_path / "photos/a.jpg")
    made = supervision.DetectionDataset(["cat", "dog"], [name], {name: found})
    made.as_yolo(
        annotations_directory_path=str(tmp_path / "texts"),
        data_yaml_path=str(tmp_path / "data.yaml"),
        approximation_percentage=0,
    )
    given = {"yolo": "data.yaml", "images": "photos", "labels": "texts"}
    ((label, ours),) = prepared(tmp_path, **given)["a.jpg"]
    again = supervision.DetectionDataset.from_yolo(
        str(tmp_path / "photos"), str(tmp_path / "texts"), str(tmp_path / "data.yaml")
    )
    theirs = next(iter(again))[2].mask[0]
    assert label == "dog" and (theirs == ellipse()).all()
    moved = [np.roll(theirs, (dy, dx), (0, 1)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    assert ours[np.all(moved, 0)].all() and not ours[~np.any(moved, 0)].any()
    ys, xs = np.nonzero(ours)
    assert (xs.max() - xs.min(), ys.max() - ys.min()) == (38, 22)  # of 40 x 24 pixels


READ_BY_ULTRALYTICS = """
import sys
import numpy as np
from ultralytics.data import utils
there = utils.check_det_dataset(sys.argv[1], autodownload=False)
picture = there["val"] + "/c.jpg"
(text,) = utils.img2label_paths([picture])
read = utils.verify_image_label((picture, text, "", False, 2, 0, 0, False))
height, width = read[2]
outlines = [(outline * (width, height)).round(3).reshape(-1) for outline in read[3]]
masks = {
    there["names"][int(row[0])]: utils.polygon2mask((height, width), [outline])
    for row, outline in zip(read[1], outlines, strict=True)
}
np.savez(sys.argv[2], **masks)
"""


@pytest.mark.skipif(not find_spec("ultralytics"), reason="ultralytics is not installed")
def test_files_that_ultralytics_reads(tmp_path: Path) -> None:
    """Its own finding of pictures and labels, which rows it takes, and its masks: those have a row
    and a column more at the end. In a process of its own, as it replaces a function of Pillow."""
    twice = line(1, 6, 4, 24, 20)
    draw_yolo(tmp_path, "\n".join([twice, line(0, 30, 10, 55, 30), twice]))
    path = tmp_path / "data.yaml"
    path.write_text(path.read_text().replace("path: .", f"path: {tmp_path}"))
    given = [sys.executable, "-c", READ_BY_ULTRALYTICS, str(path), str(tmp_path / "masks.npz")]
    subprocess.run(given, check=True, env=os.environ | {"YOLO_OFFLINE": "1"})
    theirs = np.load(tmp_path / "masks.npz")
    ours = dict(prepared(tmp_path, yolo="data.yaml")["c.jpg"])
    assert sorted(ours) == sorted(theirs.files) == ["cat", "dog"]
    for name, mine in ours.items():
        more = mine.copy()
        more[1:, 1:] |= mine[:-1, :-1]
        more[1:] |= mine[:-1]
        more[:, 1:] |= mine[:, :-1]
        assert (theirs[name] == more).all() and more.sum() > mine.sum()


def test_files_of_datumaro(tmp_path: Path) -> None:
    """Version 1.13.12 writes boxes alone: an outline leaves no row, and that is an error here."""
    datumaro = pytest.importorskip("datumaro")
    media = datumaro.Image.from_numpy(data=np.full((*SIZE, 3), 80, np.uint8))
    for shapes, words in (([], "hold no label"), ([datumaro.Bbox(6, 4, 18, 16, label=1)], "boxes")):
        drawn = [datumaro.Polygon([6, 4, 24, 4, 24, 20, 6, 20], label=1), *shapes]
        items = [
            datumaro.DatasetItem(part, subset=part, media=media, annotations=drawn)
            for part in ("train", "val")
        ]
        made = datumaro.Dataset.from_iterable(items, categories=["cat", "dog"])
        made.export(str(tmp_path / words), "yolo_ultralytics", save_media=True)
        with pytest.raises(UserError, match=words):
            find(tmp_path / words, yolo="data.yaml")
        assert all(text.stat().st_size < 40 for text in (tmp_path / words).rglob("labels/*/*.txt"))
