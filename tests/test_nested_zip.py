"""A zip inside a zip is read in place, from any place, by any process; damage names both."""

from __future__ import annotations

import io
import multiprocessing
import os
import random
import zlib
from pathlib import Path

import numpy as np
import pytest
from fuzz_mutations import mutated_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from zip_helpers import PACKED, STORED, nested, zip_of

from concat_cli.core.data import inflated, zip_member
from concat_cli.core.data.inflated import points_of
from concat_cli.core.data.store import file_exists, location_exists, open_store, read_file
from concat_cli.core.errors import UserError

CONTENT = {f"in/{i:03}.bin": os.urandom(2000 + 37 * i) for i in range(20)} | {"in/a/b.txt": b"b"}


def test_a_spawned_process_reads_a_zip_in_a_zip(tmp_path: Path) -> None:
    store = open_store(nested(tmp_path / "x.zip", (PACKED, PACKED), CONTENT))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(store.read, ["in/007.bin"]) == CONTENT["in/007.bin"]


@settings(max_examples=20, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 90_000), min_size=1, max_size=8),
    packs=st.booleans(),
    data=st.data(),
)
def test_any_place_of_a_packed_archive_is_found(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], packs: bool, data: st.DataObject
) -> None:
    """In any order, on both sides of each point of entry; also what packs well."""
    rng = np.random.default_rng(sum(sizes))
    values = 2 if packs else 256
    content = {
        f"{i}.bin": rng.integers(0, values, n, dtype=np.uint8).tobytes()
        for i, n in enumerate(sizes)
    }
    path = tmp_path_factory.mktemp("nested") / "x.zip"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inflated, "SPAN", data.draw(st.sampled_from([1, 20_000, 1 << 20])))
        patch.setattr(inflated, "CHUNK", data.draw(st.sampled_from([64, 1 << 14])))
        store = open_store(nested(path, (PACKED, STORED), content))
        for name in data.draw(st.lists(st.sampled_from(sorted(content)), max_size=20)):
            assert store.read(name) == content[name]


def test_the_points_of_entry_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """However large the archive is, and never more than a span apart by more than a chunk."""
    monkeypatch.setattr(inflated, "SPAN", 1000)
    monkeypatch.setattr(inflated, "CHUNK", 64)
    plain = os.urandom(100_000)
    packer = zlib.compressobj(wbits=-15)
    packed = packer.compress(plain) + packer.flush()
    for most, apart in ((1024, 1000), (10, 10_000)):
        monkeypatch.setattr(inflated, "POINTS", most)
        found = points_of(io.BytesIO(packed), len(plain), zlib.crc32(plain)).points
        places = [point.place for point in found]
        gaps = np.diff([*places, len(plain)])
        assert len(places) <= most + 1 and gaps[:-1].min() >= apart and gaps.max() <= apart + 200
        for point in found:
            assert point.decoder.copy().decompress(packed[point.packed :]) == plain[point.place :]
    right = zlib.crc32(plain)
    cases = (packed[:-9], 100_000, right), (packed, 99_999, right), (packed, 100_001, right)
    for data, size, checksum in (*cases, (packed, 100_000, right ^ 1)):
        with pytest.raises(EOFError):
            points_of(io.BytesIO(data), size, checksum)


def test_who_reads_in_order_unpacks_each_byte_about_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = {f"{i:03}.bin": os.urandom(7000) for i in range(200)}
    store = open_store(nested(tmp_path / "x.zip", (PACKED, STORED), content))
    fed: list[int] = []
    read = inflated.Window.readinto

    def counted(window: inflated.Window, buffer: bytearray) -> int:
        fed.append(read(window, buffer))
        return fed[-1]

    monkeypatch.setattr(inflated.Window, "readinto", counted)
    assert all(store.read(name) == content[name] for name in sorted(content))
    assert sum(fed) < 4 * 200 * 7000


@pytest.mark.parametrize("kind", [STORED, PACKED])
def test_damage_within_names_both_archives(tmp_path: Path, kind: int) -> None:
    location = nested(tmp_path / "x.zip", (kind, STORED), {"c/d.png": os.urandom(5000)})
    whole = (tmp_path / "x.zip").read_bytes()
    damaged = bytearray(whole)
    damaged[2000:2010] = bytes(10)
    (tmp_path / "x.zip").write_bytes(damaged)
    with pytest.raises(UserError, match=r"x\.zip!a/in\.zip.* damaged"):
        open_store(location).read("c/d.png")
    with pytest.raises(UserError, match=r"x\.zip!a/in\.zip.* damaged"):
        read_file(f"{location}!c/d.png")
    inner = os.urandom(3000)  # no zip at all, but whole
    zip_of(tmp_path / "x.zip", {"a/in.zip": inner}, kind)
    with pytest.raises(UserError, match=r"x\.zip!a/in\.zip is no complete zip"):
        open_store(location)
    zip_of(tmp_path / "x.zip", {"a/in.zip": b""}, kind)
    with pytest.raises(UserError, match=r"x\.zip!a/in\.zip is no complete zip"):
        location_exists(f"{location}!c")


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), outer=st.sampled_from([STORED, PACKED]))
def test_any_damage_within_ends_well(
    tmp_path_factory: pytest.TempPathFactory, seed: int, outer: int
) -> None:
    """Every member is read as it was, or a UserError names the archive."""
    path = tmp_path_factory.mktemp("damaged") / "x.zip"
    content = {f"c/{i}.bin": bytes([i]) * 3000 for i in range(4)}
    location = nested(path, (outer, PACKED), content)
    path.write_bytes(mutated_bytes(path.read_bytes(), random.Random(seed)))
    try:
        store = open_store(location)
        found = {name: store.read(name) for name in store.names()}
    except UserError as error:
        assert "x.zip" in error.what
    else:
        assert all(content.get(name, data) == data for name, data in found.items())


def test_what_is_not_in_it_is_named(tmp_path: Path) -> None:
    location = nested(tmp_path / "x.zip", (PACKED, PACKED), CONTENT)
    assert not location_exists(f"{tmp_path}/x.zip!a/no.zip!in")
    assert not location_exists(f"{tmp_path}/y.zip!a/in.zip!in")
    assert not file_exists(f"{tmp_path}/x.zip!a/no.zip!in/a/b.txt")
    assert file_exists(location) and len(read_file(location)) > 1000  # the archive as a file
    with pytest.raises(UserError, match=r"no archive .*x\.zip!a/no\.zip"):
        open_store(f"{tmp_path}/x.zip!a/no.zip!in")
    with pytest.raises(UserError, match=r"x\.zip has no member a/no\.zip"):
        read_file(f"{tmp_path}/x.zip!a/no.zip!in/a/b.txt")
    for place in ("../in.zip!in", "a/in.zip!../in", "/a/../in.zip!in"):
        with pytest.raises(UserError, match="leads out"):
            open_store(f"{tmp_path}/x.zip!{place}")


def test_a_bomb_within_is_refused_before_it_is_unpacked(tmp_path: Path, monkeypatch) -> None:
    """An archive may be larger than any image, but not packed as nothing is."""
    monkeypatch.setattr(zip_member, "LARGEST", 5000)
    location = nested(tmp_path / "x.zip", (PACKED, STORED), {f"{i}": bytes(99) for i in range(99)})
    assert open_store(location).read("7") == bytes(99)
    monkeypatch.setattr(zip_member, "SUSPICIOUS", 5000)
    monkeypatch.setattr(zip_member, "RATIO", 2)
    with pytest.raises(UserError, match=r"x\.zip!a/in\.zip says that it unpacks to"):
        open_store(location).read("7")


def test_a_replaced_outer_archive_is_read_anew(tmp_path: Path) -> None:
    location = nested(tmp_path / "x.zip", (PACKED, STORED), {"a": b"old"})
    store = open_store(location)
    assert store.read("a") == b"old"
    nested(tmp_path / "x.zip", (PACKED, STORED), {"a": b"new"})
    os.utime(tmp_path / "x.zip", ns=(1, 1))
    assert store.read("a") == b"new"


def test_a_name_that_is_not_the_members_own_is_damage(tmp_path: Path) -> None:
    """A directory with two names exchanged: every checksum is right."""
    path = tmp_path / "x.zip"
    location = nested(path, (STORED, STORED), {"c/1.bin": b"one", "c/2.bin": b"two"})
    data = path.read_bytes()
    first, second = data.rindex(b"c/1.bin"), data.rindex(b"c/2.bin")
    swapped = bytearray(data)
    swapped[first : first + 7], swapped[second : second + 7] = b"c/2.bin", b"c/1.bin"
    path.write_bytes(swapped)
    with pytest.raises(UserError, match=r"x\.zip.*c/1\.bin is damaged|x\.zip.*it is damaged"):
        open_store(location).read("c/1.bin")
