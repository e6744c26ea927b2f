"""Files are read where they lie, in a folder or a zip; what is unsafe or damaged is refused."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import struct
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from zip_helpers import PACKED, STORED, nested, zip_of

from concat_cli.core.data import store as module
from concat_cli.core.data.image_io import read_header, read_id_png, read_image, write_id_png
from concat_cli.core.data.store import (
    Store,
    file_exists,
    is_safe,
    location_exists,
    open_file,
    open_store,
    read_bytes,
    read_file,
)
from concat_cli.core.errors import UserError

CONTENT = {f"in/{i:03}.bin": os.urandom(2000 + 37 * i) for i in range(40)} | {"in/a/b.txt": b"b"}


@pytest.fixture(
    params=["folder", (STORED,), (PACKED,), (STORED, PACKED), (PACKED, STORED), (PACKED,) * 3],
    ids=["folder", "stored", "packed", "packed in stored", "stored in packed", "packed thrice"],
)
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The same files below a folder, in a zip that stores or packs them, and in a zip in a zip."""
    if request.param == "folder":
        for name, data in CONTENT.items():
            (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "x" / name).write_bytes(data)
        return str(tmp_path / "x")
    return nested(tmp_path / "x.zip", request.param, CONTENT)


def inside(location: str, name: str) -> str:
    return f"{location}!{name}" if location.endswith(".zip") else f"{location}/{name}"


def test_the_same_files_from_folder_and_zip(location: str) -> None:
    store = open_store(location)
    assert store.names() == sorted(CONTENT)
    assert _read_all(store)
    below = open_store(inside(location, "in"))
    assert below.names() == [name.removeprefix("in/") for name in sorted(CONTENT)]
    assert read_bytes(below.file("a/b.txt")) == b"b"
    assert store.stamp("in/a/b.txt") is not None and store.stamp("none") is None
    assert location_exists(inside(location, "in/a")) and not location_exists(inside(location, "no"))
    assert file_exists(inside(location, "in/a/b.txt")) and not file_exists(inside(location, "in"))
    assert read_file(inside(location, "in/a/b.txt")) == b"b"
    with pytest.raises(UserError, match="no"):
        open_store(inside(location, "no"))
    with pytest.raises(UserError):
        read_bytes(store.file("in/none.bin"))


def _read_all(store: Store) -> bool:
    return all(read_bytes(store.file(name)) == data for name, data in CONTENT.items())


def test_threads_and_processes_share_a_store(location: str) -> None:
    """Forked processes share open files: a store that kept one would mix up their positions."""
    store = open_store(location)
    assert pickle.loads(pickle.dumps(store)) == store
    read_bytes(store.file("in/000.bin"))  # whatever may be kept open is open now
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(_read_all, [store] * 8))
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert all(pool.map(_read_all, [store] * 4, chunksize=1))


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../b", "a\\b", "C:/x", "", "a//b"])
def test_names_that_lead_out_are_refused(location: str, name: str) -> None:
    store = open_store(location)
    for call in (store.file, store.stamp):
        with pytest.raises(UserError, match="leads out"):
            call(name)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="a./\\:", max_size=8))
def test_a_safe_name_stays_below(name: str) -> None:
    if is_safe(name):
        path = os.path.normpath(os.path.join("/root/store", name))  # noqa: PTH118
        assert path == "/root/store" or path.startswith("/root/store/")


def test_members_that_lead_out_are_not_listed(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in ("good.txt", "../bad.txt", "/abs.txt", "a/../../bad.txt"):
            archive.writestr(name, name)
    assert open_store(tmp_path / "x.zip").names() == ["good.txt"]
    with pytest.raises(UserError, match="leads out"):
        open_file(f"{tmp_path}/x.zip!../bad.txt")
    with pytest.raises(UserError, match="leads out"):
        open_store(f"{tmp_path}/x.zip!..")


def declare(path: Path, size: int) -> None:
    """Writes another unpacked size of the only member into the archive's directory."""
    data = bytearray(path.read_bytes())
    place = data.index(b"PK\x01\x02") + 24
    data[place : place + 4] = struct.pack("<I", size)
    path.write_bytes(data)


def test_bombs_are_refused_before_they_are_unpacked(tmp_path: Path, monkeypatch) -> None:
    path = zip_of(tmp_path / "x.zip", {"big": bytes(3_000_000)})
    monkeypatch.setattr(module, "SUSPICIOUS", 2_000_000)
    monkeypatch.setattr(module, "RATIO", 500)
    with pytest.raises(UserError, match=r"x\.zip!big says that it unpacks to 3,000,000 bytes"):
        read_bytes(open_store(path).file("big"))
    monkeypatch.setattr(module, "RATIO", 5000)
    assert read_bytes(open_store(path).file("big")) == bytes(3_000_000)
    declare(path, (1 << 30) + 1)
    with pytest.raises(UserError, match="unpacks to 1,073,741,825"):
        read_bytes(open_store(path).file("big"))
    declare(path, 1000)  # lies: there is more, which must not be unpacked
    with pytest.raises(UserError, match="CRC"):
        read_bytes(open_store(path).file("big"))


@pytest.mark.parametrize("kind", [STORED, PACKED])
def test_damage_is_named(tmp_path: Path, kind: int) -> None:
    path = zip_of(tmp_path / "x.zip", {"a/b.png": os.urandom(5000)}, kind)
    data = bytearray(path.read_bytes())
    data[1000:1010] = bytes(10)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"x\.zip!a/b\.png"):
        read_bytes(open_store(path).file("a/b.png"))
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"x\.zip is no complete zip"):
        open_store(path)
    with pytest.raises(UserError, match="no archive"):
        open_store(tmp_path / "y.zip")
    with pytest.raises(UserError, match="no folder"):
        open_store(tmp_path / "y")


def test_what_is_packed_otherwise_is_refused(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "x.zip", {"a": b"a" * 99}, zipfile.ZIP_LZMA)
    with pytest.raises(UserError, match=r"x\.zip!a is packed by a method \(number 14\)"):
        read_bytes(open_store(path).file("a"))
    path = zip_of(tmp_path / "y.zip", {"a": b"a" * 99})
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="encrypted"):
        read_bytes(open_store(path).file("a"))


def test_a_replaced_archive_is_read_anew(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "x.zip", {"a": b"old"})
    store = open_store(path)
    before = store.stamp("a")
    assert read_bytes(store.file("a")) == b"old"
    os.utime(zip_of(path, {"a": b"new"}), ns=(1, 1))
    assert read_bytes(store.file("a")) == b"new" and store.stamp("a") != before


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 1000), packed=st.booleans())
def test_pictures_in_a_zip_are_as_in_a_folder(tmp_path: Path, seed: int, packed: bool) -> None:
    rng = np.random.default_rng(seed)
    size = tuple(rng.integers(1, 40, 2))
    Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / "a.jpg")
    write_id_png(tmp_path / "a.png", rng.integers(0, 1 << 24, size))
    kind = PACKED if packed else STORED
    with zipfile.ZipFile(tmp_path / "x.zip", "w", kind) as archive:
        for name in ("a.jpg", "a.png"):
            archive.write(tmp_path / name, f"in/{name}")
    store = open_store(f"{tmp_path}/x.zip!in")
    assert (read_image(store.file("a.jpg")) == read_image(tmp_path / "a.jpg")).all()
    assert (
        read_header(store.file("a.jpg")).shown() == read_header(tmp_path / "a.jpg").shown() == size
    )
    assert (read_id_png(store.file("a.png")) == read_id_png(tmp_path / "a.png")).all()


def test_a_broken_picture_in_a_zip_is_named(tmp_path: Path) -> None:
    zip_of(tmp_path / "x.zip", {"in/a.jpg": b"no picture"})
    file = open_store(tmp_path / "x.zip").file("in/a.jpg")
    for read in (read_image, read_header, read_id_png):
        with pytest.raises(UserError, match=r"x\.zip!in/a\.jpg: it is damaged"):
            read(file)


def lambda_of() -> object:
    return lambda: 0


def test_no_message_tells_where_an_object_lies(tmp_path: Path) -> None:
    """Pillow names what it reads by its address, which differs from run to run."""
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("a.jpg", b"no picture")
    with pytest.raises(UserError, match=r"a\.jpg.* \(cannot identify image file\)") as caught:
        read_image(open_store(tmp_path / "photos.zip").file("a.jpg"))
    assert " at 0x" not in caught.value.what
    other = UserError(f"It is {object()!r}.", f"Not {zip_of!r} or {lambda_of()!r}.")
    assert (other.what, other.hint) == ("It is.", "Not or.")
