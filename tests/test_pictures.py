"""Folders of pictures as phones leave them: what is read, what is passed over and why."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mini import Heard
from PIL import Image

from concat_cli.commands.predict import _check
from concat_cli.core.data import image_io
from concat_cli.core.data.image_io import read_image, told_dim
from concat_cli.core.errors import UserError
from concat_cli.core.infer.pictures import expand_inputs

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(400)
FOREIGN = {
    "a.HEIC": (HEIC, "HEIC"),
    "b.heif": (HEIC.replace(b"ftypheic", b"ftypmif1"), "HEIC"),
    "c.mov": (b"\0\0\0\x14ftypqt  " + bytes(40), "film"),
    "d.pdf": (b"%PDF-1.7 and so on", "PDF"),
    "e.jxl": (b"\xff\x0a" + bytes(20), "JPEG XL"),
}


def save(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 20), (200, 30, 30)).save(path)


def test_a_phones_folder(tmp_path: Path) -> None:
    names = ["a.jpg", "B.PNG", "c.gif", "d.jp2", "e.jfif"]
    names += ["f.avif"] if "AVIF" in image_io.FORMATS else []
    for name in names:
        save(tmp_path / name)
    for name, (content, _) in FOREIGN.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "more.heic").write_bytes(HEIC)
    (tmp_path / "notes.txt").write_text("of the trip")
    save(tmp_path / "a.overlay.png")
    save(tmp_path / ".hidden.jpg")
    save(tmp_path / "below/g.jpg")
    heard = Heard()
    found = expand_inputs([str(tmp_path)], heard)
    assert [path.name for path in found] == sorted(names)
    assert heard.lines == [
        f"pictures {len(names)}; passed over: "
        "2 .heic (HEIC, which is not read: convert it first), "
        "1 .heif (HEIC, which is not read: convert it first), "
        "1 .jxl (JPEG XL, which is not read: convert it first), "
        "1 .mov (a video, which is predicted alone: give it by its name), "
        "1 .pdf (PDF, which is not read: convert it first), 1 .txt"
    ]
    heard = Heard()
    assert len(expand_inputs([f"{tmp_path}/*", str(tmp_path / "a.jpg")], heard)) == len(names)
    assert len(heard.lines) == 1 and "2 .heic" in heard.lines[0]
    assert _check(found, every=True) == []
    for path in found:
        assert np.abs(read_image(path).astype(int) - (200, 30, 30)).max() <= 16


def test_nothing_is_said_of_a_folder_of_pictures_alone(tmp_path: Path) -> None:
    save(tmp_path / "a.jpg")
    save(tmp_path / "a.overlay.png")
    heard = Heard()
    assert len(expand_inputs([str(tmp_path)], heard)) == 1 and not heard.lines


def test_a_folder_without_pictures_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "a.heic").write_bytes(HEIC)
    with pytest.raises(UserError, match=r"holds no picture: only 1 \.heic \(HEIC"):
        expand_inputs([str(tmp_path)])
    with pytest.raises(UserError, match=r"No picture matches .*: only 1 \.heic"):
        expand_inputs([f"{tmp_path}/*"])


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_is_named_by_its_first_bytes(tmp_path: Path, name: str) -> None:
    """Also under the name of a JPEG."""
    content, kind = FOREIGN[name]
    for path in (tmp_path / name, tmp_path / "disguised.jpg"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"is a {kind} file by its first bytes") as caught:
            read_image(path)
        assert "Convert it" in caught.value.hint


def test_want_of_memory_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "a.jpg")

    def full(_: Image.Image) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "load", full)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", full)
    with pytest.raises(UserError, match="not enough memory to read"):
        read_image(tmp_path / "a.jpg")


def test_a_small_part_of_16_bits(tmp_path: Path) -> None:
    ramp = np.linspace(0, 4095, 40).astype(np.uint16) * np.ones((20, 1), np.uint16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    Image.fromarray(ramp * 16).save(tmp_path / "b.tiff")
    wide = _check([tmp_path / "a.png", tmp_path / "b.tiff"], every=True)
    assert wide == [4095, 4095 * 16]
    assert "1 of 2 grey pictures of 16 bits hold no value above 4095" in told_dim(wide, 65535)
    assert told_dim(wide, 4095) == "" == told_dim([], 65535)
    as_12_bits = read_image(tmp_path / "a.png", white=4095)
    assert as_12_bits.max() == 255
    assert np.abs(as_12_bits.astype(int) - read_image(tmp_path / "b.tiff")).max() <= 1
