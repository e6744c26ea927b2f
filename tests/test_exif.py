"""Photos that EXIF turns: labels drawn on the pixels as stored, or on the upright photo."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from mini import Heard
from PIL import Image

from concat_cli.core.data.dataset import PanopticDataset, read_dataset_info
from concat_cli.core.data.image_io import read_header
from concat_cli.core.data.index import Lines
from concat_cli.core.errors import UserError
from concat_cli.core.prepare.run import Options, Report, prepare_data

RED, GREY = (220, 30, 30), (200, 200, 200)
BOX = (slice(4, 20), slice(6, 26))  # where the object is in the stored pixels
# EXIF orientation -> how it turns an array of stored pixels upright (TIFF 6.0, tag 274)
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a.swapaxes(0, 1)[::-1],
}
MAPS = {"images": "images", "labels": "maps", "classes": "classes.txt"}
JSON = {"images": "images", "json": "train.json"}


def photo(path: Path, size: tuple[int, int], orientation: int) -> np.ndarray:
    """Draws a photo; the label (H, W) of its stored pixels."""
    label = np.zeros(size, np.uint8)
    label[BOX] = 1
    exif = Image.Exif()
    exif[0x0112] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.array([GREY, RED], np.uint8)[label]
    Image.fromarray(pixels).save(path, exif=exif, quality=95)
    return label


def with_maps(root: Path, size: tuple[int, int], upright: bool, *orientations: int) -> None:
    """Photos of these orientations with label maps."""
    for number, orientation in enumerate(orientations):
        label = photo(root / f"images/p{number}.jpg", size, orientation)
        label = UPRIGHT[orientation](label) if upright else label
        (root / "maps").mkdir(exist_ok=True)
        Image.fromarray(np.ascontiguousarray(label)).save(root / f"maps/p{number}.png")
    (root / "classes.txt").write_text("background : stuff\nred square\n")


def with_json(root: Path, polygon: list[int], orientation: int) -> None:
    """Three photos with a polygon each, and the width and height of the stored pixels."""
    images, annotations = [], []
    for number in (1, 2, 3):
        photo(root / f"images/p{number}.jpg", (48, 64), orientation)
        images.append({"id": number, "file_name": f"p{number}.jpg", "width": 64, "height": 48})
        annotations.append(
            {"id": number, "image_id": number, "category_id": 1, "segmentation": [polygon]}
        )
    content = {"images": images, "annotations": annotations}
    content |= {"categories": [{"id": 1, "name": "red square"}]}
    (root / "train.json").write_text(json.dumps(content))


def prepared(root: Path, given: dict[str, str], **how: str) -> tuple[Report, list[str]]:
    heard = Heard()
    options = Options(processes=1, **how)
    return prepare_data("custom", root, None, options, heard, **given), heard.lines


def labels_fit(root: Path) -> bool:
    """Whether all that is labelled a red square is red in every sample, and nothing else is."""
    info = read_dataset_info(root / "concat")
    samples = PanopticDataset(info.part("val"), info.vocabulary)
    for sample in (samples[i] for i in range(len(samples))):
        square = list(sample.labels).index(info.vocabulary.names.index("red square")) + 1
        red = sample.image[..., 1] < 115
        if (red != (sample.segment_map == square)).mean() > 0.02:
            return False
    return True


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_both_readings_of_label_maps(tmp_path: Path, orientation: int) -> None:
    for name, upright in (("stored", False), ("upright", True)):
        with_maps(tmp_path / name, (48, 64), upright, orientation, 1)
        prepared(tmp_path / name, MAPS, exif="turn" if upright else "stored")
        assert labels_fit(tmp_path / name)


def test_it_is_said_where_sizes_fit_both_ways(tmp_path: Path) -> None:
    with_maps(tmp_path, (48, 48), False, 6, 3, 1)
    _, said = prepared(tmp_path, MAPS)
    told = [line for line in said if "EXIF" in line]
    assert len(told) == 1 and "turns 2 of 3 images" in told[0] and "--exif stored" in told[0]
    assert not labels_fit(tmp_path)
    _, said = prepared(tmp_path, MAPS, exif="stored")
    assert "2 of 3 images; their labels are taken for those of the pixels as they are" in str(said)
    assert labels_fit(tmp_path)
    rows = list(Lines(tmp_path / "concat/index/val.jsonl"))
    assert sorted(row.exif for row in rows) == ["", "stored", "stored"]
    _, said = prepared(tmp_path, MAPS, exif="stored")
    assert "EXIF turns 2 of 3" in str(said), "also where all was checked before"


@pytest.mark.parametrize("given", [MAPS, JSON], ids=["maps", "json"])
def test_swapped_sizes_name_exif(tmp_path: Path, given: dict[str, str]) -> None:
    if given is MAPS:
        with_maps(tmp_path, (48, 64), False, 6, 8)
    else:
        with_json(tmp_path, [6, 4, 26, 4, 26, 20, 6, 20], 6)
    with pytest.raises(UserError, match=r"EXIF orientation turns it.*--exif stored.*--exif turn"):
        prepared(tmp_path, given)
    prepared(tmp_path, given, exif="stored")
    assert labels_fit(tmp_path) if given is MAPS else True


def test_polygons_of_upright_photos_beside_stored_sizes(tmp_path: Path) -> None:
    with_json(tmp_path, [28, 6, 44, 6, 44, 26, 28, 26], 6)
    with pytest.raises(UserError, match="--exif turn"):
        prepared(tmp_path, JSON)
    prepared(tmp_path, JSON, exif="turn")
    assert labels_fit(tmp_path)


def test_other_wrong_sizes_do_not_blame_exif(tmp_path: Path) -> None:
    with_maps(tmp_path, (48, 64), False, 6, 1)
    Image.new("L", (10, 10)).save(tmp_path / "maps/p0.png")
    with pytest.raises(UserError) as caught:
        prepared(tmp_path, MAPS)
    assert "10 x 10" in caught.value.what and "EXIF" not in caught.value.what


def test_orientations_that_cannot_be_are_none(tmp_path: Path) -> None:
    photo(tmp_path / "a.jpg", (48, 64), 9)
    header = read_header(tmp_path / "a.jpg")
    assert header.orientation == 1 and header.shown() == header.size == (48, 64)


@pytest.mark.parametrize("bits", [10, 12])
def test_a_small_part_of_16_bits_is_told(tmp_path: Path, bits: int) -> None:
    with_maps(tmp_path, (48, 64), False, 1)
    (tmp_path / "images/p0.jpg").unlink()
    most = 2**bits - 1
    ramp = np.tile(np.linspace(0, most, 64).astype(np.uint16), (48, 1))
    Image.fromarray(ramp).save(tmp_path / "images/p0.png")
    _, said = prepared(tmp_path, MAPS)
    assert f"1 of 1 grey pictures of 16 bits hold no value above {most}" in str(said)
    _, said = prepared(tmp_path, MAPS, white=most)
    assert "16 bits" not in str(said)
    info = read_dataset_info(tmp_path / "concat")
    sample = PanopticDataset(info.part("val"), info.vocabulary)[0]
    assert sample.image.max() == 255 and 120 < sample.image[0, 32, 0] < 135
