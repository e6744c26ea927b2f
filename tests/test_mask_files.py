"""Label maps as tools name and colour them: suffixes, double endings, beside photos, in zips."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
from mini import Heard
from PIL import Image

from concat_cli.core.data.dataset import PanopticDataset, read_dataset_info
from concat_cli.core.data.store import open_store
from concat_cli.core.errors import UserError
from concat_cli.core.infer.pictures import expand_inputs
from concat_cli.core.prepare.class_values import read_classes
from concat_cli.core.prepare.recipes.pairs import split_pattern
from concat_cli.core.prepare.run import Options, prepare_data

SIZE = (12, 16)
COLOURS = np.array([(0, 0, 0), (250, 50, 83), (0, 200, 0)], np.uint8)
TABLE = "background : stuff = 0,0,0\nred square = 250, 50, 83\ngrass = 0 , 200 , 0  # green\n"


def label(number: int) -> np.ndarray:
    """The map of the photo of that number."""
    values = np.zeros(SIZE, np.uint8)
    values[2 : 4 + number, 4:12], values[9:, :5] = 1, 2
    return values


def draw(root: Path, photo: str, mask: str, masks: list[Image.Image] | None = None) -> None:
    """Three photos and masks, named by their number."""
    (root / "classes.txt").write_text("background : stuff\nred square\ngrass : stuff\n")
    for number in range(3):
        made = Image.fromarray(label(number)) if masks is None else masks[number]
        pictures = {photo: Image.new("RGB", SIZE[::-1], (60 * number,) * 3), mask: made}
        for name, picture in pictures.items():
            path = root / name.format(number)
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)


def coloured(mode: str = "RGB") -> list[Image.Image]:
    made = [Image.fromarray(COLOURS[label(number)]) for number in range(3)]
    if mode == "P":
        return [picture.convert("P", palette=Image.Palette.ADAPTIVE) for picture in made]
    return [picture.convert(mode) for picture in made]


def fits(root: Path, **given: str) -> None:
    """Prepares what was drawn; each photo has the segments of its own map."""
    given = {"classes": "classes.txt"} | given
    prepare_data("custom", root, root / "out", Options(processes=1), **given)
    info = read_dataset_info(root / "out")
    assert info.vocabulary.names == ("background", "red square", "grass")
    dataset = PanopticDataset(info.part("val"), info.vocabulary)
    assert len(dataset) == 3
    for sample in (dataset[index] for index in range(3)):
        number = round(sample.image.mean() / 60)
        classes = sample.labels[sample.segment_map - 1]
        assert (sample.segment_map > 0).all() and (classes == label(number)).all()


@pytest.mark.parametrize(
    ("photo", "mask", "given"),
    [
        ("images/p{}.jpg", "masks/p{}.jpg.png", {"images": "images", "labels": "masks"}),
        ("images/p{}.jpg", "masks/p{}-m.png", {"images": "images", "labels": "masks/*-m.png"}),
        ("images/p{}.png", "masks/gt-p{}.tif", {"images": "images", "labels": "masks/gt-*"}),
        ("images/a/{}.jpg", "masks/a/{}_L.png", {"images": "images", "labels": "masks/*_L.png"}),
        ("data/p{}.jpg", "data/p{}.png", {"images": "data", "labels": "data"}),
        ("data/p{}.jpg", "data/p{}_m.png", {"images": "data", "labels": "data/*_m.png"}),
        ("data/p{}.png", "data/p{}_m.png", {"images": "data", "labels": "data/*_m.png"}),
        ("data/im{}.png", "data/gt{}.png", {"images": "data/im*", "labels": "data/gt*"}),
        ("{}.jpg", "{}_mask.png", {"images": "*.jpg", "labels": "*_mask.png"}),
    ],
    ids=["double", "suffix", "prefix", "folder", "beside", "both", "alike", "two", "root"],
)  # fmt: skip
def test_names_of_masks(tmp_path: Path, photo: str, mask: str, given: dict[str, str]) -> None:
    draw(tmp_path, photo, mask)
    fits(tmp_path, **given)


def test_what_the_folder_holds_is_said(tmp_path: Path) -> None:
    draw(tmp_path, "images/p{}.jpg", "masks/p{}_mask.png")
    given = {"images": "images", "labels": "masks", "classes": "classes.txt"}
    with pytest.raises(UserError, match=r"image \(p0\.jpg\): it holds p0_mask\.png, p1_") as caught:
        prepare_data("custom", tmp_path, **given)
    assert "'.../*_mask.png'" in caught.value.hint
    for path in (tmp_path / "masks").iterdir():
        path.unlink()
    (tmp_path / "masks" / "read.me").touch()
    with pytest.raises(UserError, match=r"it holds read\.me"):
        prepare_data("custom", tmp_path, **given)


def test_jpeg_masks_are_refused_by_name(tmp_path: Path) -> None:
    draw(tmp_path, "images/p{}.jpg", "masks/p{}.jpg")
    given = {"images": "images", "labels": "masks", "classes": "classes.txt"}
    with pytest.raises(UserError, match=r"are JPEGs \(p0\.jpg and 2 more\)") as caught:
        prepare_data("custom", tmp_path, **given)
    assert "PNG" in caught.value.hint


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
@pytest.mark.parametrize(
    "table",
    [
        TABLE,
        "# label:color_rgb:parts:actions\nbackground:0,0,0::\nred square:250,50,83::\n"
        "grass:0,200,0:leaf,stem:\n",
        "name,r,g,b\nbackground,0,0,0\nred square,250,50,83\ngrass, 0,200,0\n",
        "0 0 0\tbackground\n250 50 83\tred square\n0 200 0\tgrass\n",
    ],
    ids=["ours", "CVAT", "csv", "CamVid"],
)
def test_tables_of_colours(tmp_path: Path, table: str, mode: str) -> None:
    draw(tmp_path, "images/p{}.jpg", "masks/p{}.png", coloured(mode))
    (tmp_path / "table.txt").write_text(table)
    fits(tmp_path, images="images", labels="masks", classes="table.txt")


def test_colours_without_a_table_and_others_than_those_in_it(tmp_path: Path) -> None:
    draw(tmp_path, "images/p{}.jpg", "masks/p{}.png", coloured())
    given = {"images": "images", "labels": "masks"}
    with pytest.raises(UserError, match=r"p0\.png is in colour .*`car = 250, 50, 83`"):
        prepare_data("custom", tmp_path, classes="classes.txt", **given)
    (tmp_path / "few.txt").write_text("background = 0,0,0\nred square = 250,50,83\n")
    with pytest.raises(UserError, match=r"p0\.png has the colour \(0, 200, 0\)"):
        prepare_data("custom", tmp_path, classes="few.txt", **given)
    (tmp_path / "void.txt").write_text("void = 0,200,0\nbackground = 0,0,0\nred square = 250,50,83")
    report = prepare_data("custom", tmp_path, classes="void.txt", **given)
    assert report.vocabulary.names == ("background", "red square")
    assert report.parts["val"].totals.void == 3 * 15


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_equal_channels_are_values(tmp_path: Path, mode: str) -> None:
    masks = [Image.fromarray(label(number)).convert(mode) for number in range(3)]
    draw(tmp_path, "images/p{}.jpg", "masks/p{}.png", masks)
    fits(tmp_path, images="images", labels="masks")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("car = 1,2,3\nbus\n", r"c\.txt:2: 'bus' is no name with a colour"),
        ("car = 1,2,256\n", r"c\.txt:1: .* is no name with a colour"),
        ("car = 1,2,3\nbus = 1,2,3\n", "two lines have one colour"),
        ("car = 1,2,3\ncar = 1,2,4\n", "stands twice"),
        ("void = 1,2,3\n", "names no class"),
    ],
)
def test_tables_that_cannot_be(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "c.txt").write_text(text)
    with pytest.raises(UserError, match=words):
        read_classes(tmp_path / "c.txt")


def test_kinds_and_synonyms_of_a_table(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("sky, heaven : stuff = 1,2,3\ncar:4,5,6::\n")
    found = read_classes(tmp_path / "c.txt")
    assert found.coloured and found.table == {1 | 2 << 8 | 3 << 16: 0, 4 | 5 << 8 | 6 << 16: 1}
    assert found.vocabulary.entries[0].synonyms == ("heaven",)
    assert found.vocabulary.is_thing == (False, True)


def test_litter_is_passed_over_in_zips_as_in_folders(tmp_path: Path) -> None:
    draw(tmp_path, "all/images/p{}.jpg", "all/masks/p{}.png")
    for name in ("all/images/.ipynb_checkpoints/p0-checkpoint.jpg", "all/images/._p1.jpg",
                 "all/__MACOSX/images/p2.jpg", "all/images/__MACOSX/._p0.jpg"):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((tmp_path / "all/images/p0.jpg").read_bytes())
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for path in (tmp_path / "all").rglob("*.*"):
            if path.is_file():
                archive.write(path, path.relative_to(tmp_path / "all").as_posix())
    names = open_store(tmp_path / "all").names()
    assert names == open_store(tmp_path / "all.zip").names() and len(names) == 6
    fits(tmp_path, images="all.zip!images", labels="all.zip!masks/*.png")
    found = expand_inputs([f"{tmp_path}/all/**/*.jpg"])
    assert sorted(path.name for path in found) == ["p0.jpg", "p1.jpg", "p2.jpg"]


@pytest.mark.parametrize(
    ("place", "split"),
    [
        ("masks", ("masks", "")),
        ("a/b/*_m.png", ("a/b", "*_m.png")),
        ("*.png", ("", "*.png")),
        ("a.zip!b/x*", ("a.zip!b", "x*")),
        ("a.zip!*.png", ("a.zip", "*.png")),
    ],
)
def test_patterns(place: str, split: tuple[str, str]) -> None:
    assert split_pattern(place) == split


def test_255_as_void_is_said(tmp_path: Path) -> None:
    """Of a mask of 0 and 255 the object would else be lost with few words."""
    masks = [Image.fromarray((label(n) > 0).astype(np.uint8) * 255) for n in range(3)]
    draw(tmp_path, "images/p{}.jpg", "masks/p{}.png", masks)
    given = {"images": "images", "labels": "masks", "classes": "classes.txt"}

    def said(classes: str) -> str:
        (tmp_path / "classes.txt").write_text(classes)
        heard = Heard()
        prepare_data("custom", tmp_path, None, Options(processes=1), heard, **given)
        return "\n".join(heard.lines)

    told = said("background : stuff\nred square\n")
    assert "255 or 65535 counted as void in 3 of 3 maps" in told and "`name = 255`" in told
    assert "counted as void" not in said("background : stuff = 0\nred square = 255\n")


def test_one_class_with_many_commas_is_doubted(tmp_path: Path) -> None:
    draw(tmp_path, "images/p{}.jpg", "masks/p{}.png", [Image.new("L", SIZE[::-1])] * 3)
    (tmp_path / "classes.txt").write_text("background, red square, grass\n")
    given = {"images": "images", "labels": "masks", "classes": "classes.txt"}
    heard = Heard()
    prepare_data("custom", tmp_path, None, Options(processes=1), heard, **given)
    assert sum("read as 1 class with 2 synonyms" in line for line in heard.lines) == 1
