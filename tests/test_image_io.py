"""Pictures of every kind become upright 8-bit RGB; ids survive a PNG; files are whole or absent."""

from __future__ import annotations

import errno
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from concat_cli.core import files
from concat_cli.core.data import image_io
from concat_cli.core.data.image_io import read_header, read_id_png, read_image, write_id_png
from concat_cli.core.errors import UserError

RED = (200, 30, 40)
fast = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def _gradient(mode: str) -> Image.Image:
    ramp = np.tile(np.linspace(0, 255, 40).astype(np.uint8), (20, 1))
    return Image.fromarray(ramp).convert(mode)


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("L", "a.jpg"),
        ("RGB", "a.jpg"),
        ("CMYK", "a.jpg"),
        ("L", "a.png"),
        ("RGB", "a.png"),
        ("LA", "a.png"),
        ("RGBA", "a.png"),
        ("P", "a.png"),
        ("L", "a.tiff"),
        ("CMYK", "a.tiff"),
        ("RGB", "a.webp"),
        ("RGBA", "a.webp"),
        ("RGB", "a.bmp"),
        ("P", "a.gif"),
        ("RGB", "a.ppm"),
        ("RGB", "a.jp2"),
        ("RGB", "a.tga"),
        ("RGB", "a.mpo"),
    ],
)
def test_kinds_of_pictures(tmp_path: Path, mode: str, name: str) -> None:
    _gradient(mode).save(tmp_path / name)
    image = read_image(tmp_path / name)
    assert image.shape == (20, 40, 3) and image.dtype == np.uint8
    wanted = np.asarray(_gradient("RGB"))
    assert np.abs(image.astype(int) - wanted).max() <= 12  # JPEG and WebP lose a little
    assert read_header(tmp_path / name).shown() == (20, 40)


def test_every_format_is_one_that_pillow_opens() -> None:
    Image.init()
    assert set(image_io.FORMATS) <= Image.OPEN.keys()


def test_a_text_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("garbage")
    with pytest.raises(UserError, match=r"a\.png: it is damaged or not an image \(cannot identify"):
        read_image(tmp_path / "a.png")


def test_a_jpeg_that_is_cut_off_is_found_by_its_end(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "a.jpg"
    _gradient("RGB").save(path)
    content = path.read_bytes()
    path.write_bytes(content + b"a maker's notes" * 1000)  # whole, with something behind its end
    assert read_header(path).shown() == (20, 40)
    path.write_bytes(content[:-30])
    with pytest.raises(UserError, match="truncated"):
        read_header(path).shown()
    path.write_bytes(content)
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("decoded in full"))
    assert read_header(path).shown() == (20, 40)


def test_one_bit(tmp_path: Path) -> None:
    Image.fromarray(np.eye(9, dtype=bool)).save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png")[..., 0] == 255 * np.eye(9)).all()


@pytest.mark.parametrize("name", ["a.png", "a.tiff"])
def test_sixteen_bit_grey_is_scaled(tmp_path: Path, name: str) -> None:
    values = np.array([[0, 257 * 100, 65535, 128]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / name)
    assert read_image(tmp_path / name)[0, :, 0].tolist() == [0, 100, 255, 0]


def test_big_endian_sixteen_bit_tiff(tmp_path: Path) -> None:
    values = np.array([[0, 257 * 100], [65535, 257]], dtype=">u2")
    _write_tiff(tmp_path / "a.tiff", values[..., None])
    assert read_image(tmp_path / "a.tiff")[..., 0].tolist() == [[0, 100], [255, 1]]


def test_sixteen_bit_rgb_tiff(tmp_path: Path) -> None:
    values = np.array([[[257 * 10, 257 * 20, 257 * 30], [65535, 0, 257]]], dtype=">u2")
    _write_tiff(tmp_path / "a.tiff", values)
    assert read_image(tmp_path / "a.tiff").tolist() == [[[10, 20, 30], [255, 0, 1]]]


def _write_tiff(path: Path, values: np.ndarray) -> None:
    """An uncompressed big-endian TIFF of (H, W, C) 16-bit values, by hand."""
    height, width, channels = values.shape
    data = values.tobytes()
    bits_at = 8 + len(data)
    ifd_at = bits_at + 2 * channels
    bits = 16 if channels == 1 else bits_at
    entries = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, channels, bits << 16 if channels == 1 else bits),
        (259, 3, 1, 1 << 16),
        (262, 3, 1, (1 if channels == 1 else 2) << 16),
        (273, 4, 1, 8),
        (277, 3, 1, channels << 16),
        (278, 4, 1, height),
        (279, 4, 1, len(data)),
    ]
    ifd = struct.pack(">H", len(entries)) + b"".join(struct.pack(">HHII", *e) for e in entries)
    header = b"MM" + struct.pack(">HI", 42, ifd_at)
    path.write_bytes(header + data + struct.pack(">H", 16) * channels + ifd + bytes(4))


@pytest.mark.parametrize("top", [1.0, 255.0])
def test_float_tiff(tmp_path: Path, top: float) -> None:
    values = np.array([[0, 0.2 * top, top, np.nan]], dtype=np.float32)
    Image.fromarray(values).save(tmp_path / "a.tiff")
    assert read_image(tmp_path / "a.tiff")[0, :, 1].tolist() == [0, 51, 255, 0]


def test_transparent_pixels_lie_over_white(tmp_path: Path) -> None:
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0, :, 3] = [0, 255, 51]
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png")[0, :, 0].tolist() == [255, 0, 204]
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([*RED, 10, 20, 30])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png", transparency=0)
    assert read_image(tmp_path / "p.png")[0].tolist() == [[255, 255, 255], [10, 20, 30]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :8] = RED
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # what the camera did to the pixels
    stored = Image.fromarray(upright)
    if orientation > 1:
        stored = stored.transpose(Image.Transpose(turns[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.jpg", exif=exif, quality=95)
    image = read_image(tmp_path / "a.jpg")
    assert image.shape == (16, 32, 3) and read_header(tmp_path / "a.jpg").shown() == (16, 32)
    assert image[2:6, 2:6, 0].min() > 150 and image[10:, :, 0].max() < 60


def test_refused_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_image(tmp_path / "none.png")
    with pytest.raises(UserError, match="is a folder"):
        read_image(tmp_path)
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(UserError, match=r"text\.png"):
        read_image(tmp_path / "text.png")
    (tmp_path / "empty.png").touch()
    with pytest.raises(UserError, match=r"empty\.png"):
        read_image(tmp_path / "empty.png")
    monkeypatch.setattr(image_io, "MAX_PIXELS", 99)
    Image.new("L", (10, 10)).save(tmp_path / "big.png")
    with pytest.raises(UserError, match="10 x 10"):
        read_image(tmp_path / "big.png")


def test_decompression_bomb(tmp_path: Path) -> None:
    header = b"IHDR" + struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk)
    with pytest.raises(UserError, match=r"bomb\.png"):
        read_image(tmp_path / "bomb.png")


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tiff", "a.webp"])
def test_truncated_files(tmp_path: Path, name: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for share in (0.3, 0.6, 0.9):
        (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(UserError, match=name):
            read_image(tmp_path / name)


@pytest.mark.filterwarnings("ignore")  # Pillow warns of damaged metadata
@fast
@given(kind=st.sampled_from(["PNG", "JPEG", "TIFF", "GIF"]), data=st.data())
def test_damaged_bytes_give_a_picture_or_a_user_error(tmp_path: Path, kind: str, data) -> None:
    buffer = io.BytesIO()
    _gradient("RGB").save(buffer, kind)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged"
    path.write_bytes(content)
    try:
        image = read_image(path)
    except UserError as error:
        assert "damaged" in error.what
    else:
        assert image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8


@fast
@given(
    ids=hnp.arrays(
        np.int32, hnp.array_shapes(min_dims=2, max_dims=2), elements=st.integers(0, (1 << 24) - 1)
    )
)
def test_ids_survive_a_png(tmp_path: Path, ids: np.ndarray) -> None:
    write_id_png(tmp_path / "ids.png", ids)
    back = read_id_png(tmp_path / "ids.png")
    assert back.dtype == np.int32 and (back == ids).all()


def test_id_png_is_red_plus_256_green_plus_65536_blue(tmp_path: Path) -> None:
    write_id_png(tmp_path / "ids.png", np.array([[1 + 256 * 2 + 65536 * 3]]))
    assert Image.open(tmp_path / "ids.png").getpixel((0, 0)) == (1, 2, 3)
    with pytest.raises(AssertionError):
        write_id_png(tmp_path / "ids.png", np.array([[1 << 24]]))


def test_what_is_no_id_png(tmp_path: Path) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "grey.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "ids.jpg")
    for name in ("grey.png", "ids.jpg"):
        with pytest.raises(UserError, match=name):
            read_id_png(tmp_path / name)


def test_written_files_are_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    files.write_json(path, {"a": [1, "ü"]})
    assert path.read_text("utf-8") == '{"a": [1, "ü"]}\n'
    with pytest.raises(RuntimeError), files.atomic_path(path) as temp:
        temp.write_text("half")
        raise RuntimeError
    assert "ü" in path.read_text("utf-8") and list(path.parent.iterdir()) == [path]
    files.write_bytes(path, b"b")
    (tmp_path / "usual").touch()
    assert path.read_bytes() == b"b" and path.stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize(
    ("number", "word"),
    [(errno.ENOSPC, "full"), (errno.EACCES, "permission"), (errno.EROFS, "read-only")],
)
def test_refused_writes(tmp_path: Path, monkeypatch, number: int, word: str) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError) as caught:
        files.write_bytes(path, b"new")
    assert str(path) in caught.value.what and word in caught.value.hint
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_file_in_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="Cannot write"):
        files.write_text(tmp_path / "file" / "a.txt", "a")


def test_a_full_disk_for_real() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    try:
        full.write_bytes(b"x" * 10_000)
    except OSError as error:
        caught = files.write_error(Path("a.bin"), error)
    assert "a.bin" in caught.what and "free some space" in caught.hint


def test_a_file_that_another_program_would_run_is_no_image(tmp_path):
    path = tmp_path / "photo.jpg"
    Image.new("RGB", (8, 8)).save(path, "EPS")
    assert path.read_bytes().startswith(b"%!PS")
    with pytest.raises(UserError, match=r"photo\.jpg"):
        read_image(path)
