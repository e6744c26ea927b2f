"""Input that is built to do harm, case by case: each is refused by name, in little memory."""

from __future__ import annotations

import json
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import edit_json, official_part, write_part
from fuzz_helpers import INSTANCES, prepare_and_read, write_instances
from PIL import Image
from scipy.io import savemat

from concat_cli.core.data.image_io import read_id_png, read_image
from concat_cli.core.errors import UserError
from concat_cli.core.prepare.labels import encode_rle, read_raw
from concat_cli.core.prepare.recipes.custom import read_classes
from concat_cli.core.vocabulary_file import parse_vocabulary

MIB = 1 << 20


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A small data set in COCO's layout."""
    write_part(official_part(tmp_path, "train"), {1: [3, 20], 2: [3, 21]})
    write_part(official_part(tmp_path, "val"), {4: [3, 7, 20]})
    return tmp_path


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """An RGB PNG that says it is so large, with `data` as its packed pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", data), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def pack_train(root: Path, place: str = "train2017") -> Path:
    """The training images in a zip instead of a folder."""
    archive = root / "train2017.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted((root / "train2017").iterdir()):
            file.write(path, f"{place}/{path.name}")
            path.unlink()
    (root / "train2017").rmdir()
    return archive


def declare_size(archive: Path, size: int) -> None:
    """Every member of the zip says that it unpacks to so many bytes."""
    data = bytearray(archive.read_bytes())
    for signature, place in ((b"PK\1\2", 24), (b"PK\3\4", 22)):
        at = data.find(signature)
        while at >= 0:
            data[at + place : at + place + 4] = struct.pack("<I", size)
            at = data.find(signature, at + 4)
    archive.write_bytes(data)


@pytest.mark.parametrize("size", [3 << 30, 100 * MIB, 10], ids=["3 GiB", "100 MiB", "10 bytes"])
def test_a_zip_member_that_lies_about_its_size(root: Path, size: int) -> None:
    archive = pack_train(root)
    declare_size(archive, size)
    with pytest.raises(UserError, match=r"train2017\.zip!train2017/000000000001\.png"):
        prepare_and_read(root)


def test_a_zip_member_is_unpacked_no_further_than_it_says(root: Path) -> None:
    archive = pack_train(root)
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("train2017/000000000001.png", bytes(64 * MIB))
        file.writestr("train2017/000000000002.png", png(32, 24))
    declare_size(archive, 1000)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"train2017\.zip!train2017/000000000001\.png"):
        prepare_and_read(root)
    assert tracemalloc.get_traced_memory()[1] < 16 * MIB
    tracemalloc.stop()


def test_names_in_a_zip_that_lead_out_of_it(root: Path) -> None:
    """Nothing is unpacked, and such members are not there: the train part is missing."""
    pack_train(root, "../train2017")
    with pytest.raises(UserError, match=r"of train were not found, also not in train2017\.zip"):
        prepare_and_read(root)
    assert not (root.parent / "train2017").exists()


@pytest.mark.parametrize("side", [100_000, 12_000])
def test_pngs_that_say_they_are_huge(tmp_path: Path, side: int) -> None:
    path = tmp_path / "huge.png"
    path.write_bytes(png(side, side, zlib.compress(bytes(9))))
    for read in (read_image, read_id_png) if side > 20_000 else (lambda p: read_id_png(p, (9, 9)),):
        tracemalloc.start()
        try:
            assert read(path).shape == (side, side)  # `unread`, for its reader to refuse
        except UserError as error:
            assert "huge.png" in error.what and side == 100_000
        assert tracemalloc.get_traced_memory()[1] < 16 * MIB
        tracemalloc.stop()


def test_a_label_of_another_size_is_not_decoded(root: Path) -> None:
    """Ten thousand pixels square, in 300 KB."""
    path = Path(official_part(root, "train").labels) / "000000000001.png"
    path.write_bytes(png(10_000, 10_000, zlib.compress(bytes(300), 1)))
    with pytest.raises(UserError, match=r"000000000001.png is 10000 x 10000 pixels"):
        prepare_and_read(root)


Change = Callable[[dict[str, Any]], object]
PANOPTIC: dict[str, tuple[Change, str]] = {
    "image twice": (lambda j: j["images"].append(j["images"][0]), "two images have the id 1"),
    "annotation twice": (lambda j: j["annotations"].append(j["annotations"][0]), "annotated twice"),
    "category twice": (lambda j: j["categories"].append(j["categories"][0]), "have the id 3"),
    "segment twice": (
        lambda j: j["annotations"][0]["segments_info"].append(
            j["annotations"][0]["segments_info"][0]
        ),
        "repeated",
    ),
    "image leads out": (lambda j: j["images"][0].update(file_name="../1.png"), "leads out"),
    "absolute image": (lambda j: j["images"][0].update(file_name="/etc/hostname"), "leads out"),
    "label leads out": (lambda j: j["annotations"][0].update(file_name="../../x.png"), "leads out"),
    "NUL in a name": (lambda j: j["images"][0].update(file_name="a\0.png"), "no text"),
    "half a character": (lambda j: j["images"][0].update(file_name="\ud800.png"), "no text"),
    "absurd height": (lambda j: j["images"][0].update(height=1 << 40), "pixels"),
    "NaN as height": (lambda j: j["images"][0].update(height=float("nan")), "`height` is nan"),
    "infinite id": (lambda j: j["images"][0].update(id=float("inf")), "`id` is inf"),
    "list as id": (lambda j: j["categories"][0].update(id=[3]), r"`id` is \[3\]"),
    "negative category": (lambda j: j["categories"][0].update(id=-3), "`id` is -3"),
    "images is a number": (lambda j: j.update(images=3), "no list"),
    "no text as name": (lambda j: j["categories"][0].update(name=["cat"]), "`name` is"),
}


@pytest.mark.parametrize("case", PANOPTIC)
def test_panoptic_json(root: Path, case: str) -> None:
    change, why = PANOPTIC[case]
    path = official_part(root, "train").index
    edit_json(path, change)
    with pytest.raises(UserError, match=why) as caught:
        prepare_and_read(root)
    text = caught.value.what
    assert path.name in text or "000000000001.png" in text or str(root) in text


def test_boxes_and_areas_are_not_looked_at(root: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        nan = float("nan")
        for segment in content["annotations"][0]["segments_info"]:
            segment |= {"bbox": [nan, -5, 1e308, 0], "area": nan}

    edit_json(official_part(root, "train").index, change)
    prepare_and_read(root)


MASKS: dict[str, Any] = {
    "NaN": [[float("nan")] * 8],
    "far out": [[0, 0, 1e9, 0, 1e9, 1e9]],
    "beyond float": [[1e308, -1e308] * 4],
    "to and fro": [[0.0, 0.0, 30.0, 20.0] * 20_000],
    "negative": {"counts": [-100, 868], "size": [24, 32]},
    "fractions": {"counts": [100.5, 667.5], "size": [24, 32]},
    "too few": {"counts": [1, 2], "size": [24, 32]},
    "too many": {"counts": [1 << 40, 2], "size": [24, 32]},
    "other size": {"counts": [1 << 60], "size": [1 << 30, 1 << 30]},
    "no letters": {"counts": "\ud800", "size": [24, 32]},
    "half a character for a size": {"counts": [768], "size": "\ud800"},
    "long number": {"counts": "P" * 40 + "0", "size": [24, 32]},
}


@pytest.mark.parametrize("case", MASKS)
def test_masks(tmp_path: Path, case: str) -> None:
    root = write_instances(tmp_path)
    path = root / INSTANCES["json"]
    edit_json(path, lambda content: content["annotations"][0].update(segmentation=MASKS[case]))
    with pytest.raises(
        UserError, match=rf"{path.name}: the mask of annotation 10 of image 1"
    ) as caught:
        prepare_and_read(root, "custom", **INSTANCES)
    assert caught.value.what.encode()  # it can be printed


def test_polygons_a_little_outside_are_drawn() -> None:
    inside = encode_rle([[0, 0, 32, 0, 32, 24, 0, 24]], (24, 32))
    assert encode_rle([[-8, -9, 40, -9, 40, 30, -8, 30]], (24, 32)) == inside


DEEP = 5000
BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
VOCABULARIES = {
    "latin.txt": "caf\xe9\n".encode("latin-1"),
    "utf16.txt": "cat\n".encode("utf-16"),
    "deep.json": b"[" * DEEP,
    "deep.yaml": b"[" * DEEP,
    "digits.json": b"[" + b"9" * 5000 + b"]",
    "half.json": rb'["\ud800"]',
    "kind.json": json.dumps([{"name": "cat", "kind": ["thing"]}]).encode(),
    "bomb.yaml": f"{BOMB}z: *i\n".encode(),
    "item.yaml": ("- " + BOMB.replace("\n", "\n  ") + "\n").encode(),
    "kind.yaml": (
        "- name: cat\n  kind: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"- &{n} [{', '.join([f'*{o}'] * 9)}]\n" for o, n in zip("abcdefg", "bcdefgh"))  # noqa: B905
    ).encode(),
}


@pytest.mark.parametrize("name", VOCABULARIES)
def test_vocabularies(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(VOCABULARIES[name])
    with pytest.raises(UserError, match=name) as caught:
        parse_vocabulary(tmp_path / name)
    text = caught.value.what + caught.value.hint
    assert len(text) < 5000 and text.encode()


@pytest.mark.parametrize("text", ["car = " + "9" * 5000, "car = 1\nvoid = 99999999", "= 3"])
def test_values_of_classes(tmp_path: Path, text: str) -> None:
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(UserError, match=r"classes\.txt"):
        read_classes(tmp_path / "classes.txt")


@pytest.mark.parametrize("kind", [0, 8, 10, 11, 16, 77, 40_000])
def test_a_mat_file_with_values_of_a_type_that_is_none(tmp_path: Path, kind: int) -> None:
    """SciPy alone ends the whole process over some of them."""
    path = tmp_path / "odd.mat"
    savemat(path, {"LabelMap": np.ones((24, 32), np.uint8)})
    assert read_raw(path, "mat", (24, 32)).sum() == 24 * 32
    data = bytearray(path.read_bytes())
    at = data.index(struct.pack("<II", 2, 24 * 32))  # the tag of the values: uint8, their number
    data[at : at + 4] = struct.pack("<I", kind)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"odd\.mat"):
        read_raw(path, "mat", (24, 32))


def test_images_of_modes_that_no_label_has(root: Path) -> None:
    path = Path(official_part(root, "train").labels) / "000000000001.png"
    for mode in ("L", "P", "I;16", "1", "LA"):
        Image.fromarray(np.ones((24, 32), np.uint8)).convert("L").save(path)
        Image.new(mode, (32, 24)).save(path)
        with pytest.raises(UserError, match=r"000000000001\.png is a PNG of mode"):
            prepare_and_read(root)
