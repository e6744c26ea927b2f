"""Labels of every kind, from folder and zip, become the segments drawn; unseen ones void."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from drawn_labels import KINDS, TABLE, VOCABULARY, Truth, draw_part, encode, mat
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from scipy.io import savemat

from concat_cli.core.data.coco import Item, Segment
from concat_cli.core.data.image_io import segment_map, write_id_png
from concat_cli.core.data.index import Row
from concat_cli.core.data.store import open_store
from concat_cli.core.errors import UserError
from concat_cli.core.prepare.labels import decode_rle, encode_rle
from concat_cli.core.prepare.protocol import hide, keep_seen
from concat_cli.core.prepare.run import Options, checker_of
from concat_cli.core.prepare.source import SourcePart
from concat_cli.core.prepare.verify import Checker

quick = settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SEEDS = st.integers(0, 10_000)


def segments(checker: Checker, row: Row) -> Truth:
    """What the labels of a row say: category, crowd and mask of each segment."""
    record = row.record(VOCABULARY)
    linked = checker.format.kind == "panoptic"
    store = open_store(checker.places[1] if linked else checker.maps)
    found = segment_map(store.file(record.label_name), record, "list.json")
    assert found.dtype == np.int32 and found.shape == (row.height, row.width)
    assert set(np.unique(found)) - {0} == set(range(1, len(record.ids) + 1))
    return [
        (VOCABULARY.ids[label], bool(crowd), found == i)
        for i, (label, crowd) in enumerate(zip(record.labels, record.crowd, strict=True), 1)
    ]


def assert_same(found: Truth, wanted: Truth) -> None:
    def key(segment: tuple[int, bool, np.ndarray]) -> tuple[int, bool, bytes]:
        return segment[0], segment[1], segment[2].tobytes()

    assert sorted(map(key, found)) == sorted(map(key, wanted))


@pytest.mark.parametrize("zipped", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize("name", KINDS)
@quick
@given(seed=SEEDS)
def test_segments_are_those_that_were_drawn(
    tmp_path_factory: pytest.TempPathFactory, name: str, zipped: bool, seed: int
) -> None:
    root = tmp_path_factory.mktemp("x")
    part, truths = draw_part(root, KINDS[name], 3, seed, zipped)
    checker = checker_of(part, VOCABULARY, root / "maps", Options(decode=seed % 2 == 0))
    for item in part.items:
        row = checker.row(item)
        assert_same(segments(checker, row), truths[item.image_id])
        areas = {(c, m.tobytes()): int(m.sum()) for c, _, m in truths[item.image_id]}
        assert sorted(row.areas) == sorted(areas.values())
        assert row.ids == sorted(row.ids)


@pytest.mark.parametrize("name", KINDS)
@quick
@given(seed=SEEDS, unseen=st.sets(st.sampled_from(VOCABULARY.names), max_size=3))
def test_unseen_segments_are_void_and_nothing_else_changes(
    tmp_path_factory: pytest.TempPathFactory, name: str, seed: int, unseen: set[str]
) -> None:
    root = tmp_path_factory.mktemp("x")
    part, truths = draw_part(root, KINDS[name], 3, seed, zipped=False)
    checker = checker_of(part, VOCABULARY, root / "maps")
    vocabulary = VOCABULARY.with_unseen(unseen)
    gone = {entry.id for entry in vocabulary.entries if not entry.seen}
    kept, taken = keep_seen([checker.row(item) for item in part.items], vocabulary, "void")
    void = 0
    for row in kept:
        assert not gone & set(row.categories)
        assert_same(segments(checker, row), [t for t in truths[row.id] if t[0] not in gone])
        void += sum(int(m.sum()) for category, _, m in truths[row.id] if category in gone)
        assert Row(**json.loads(row.line())).ids == row.ids
    assert (taken.pixels_void, taken.images_dropped) == (void, 0)
    assert taken.segments_void == sum(t[0] in gone for truth in truths.values() for t in truth)
    dropped, counts = keep_seen([checker.row(item) for item in part.items], vocabulary, "drop")
    clean = [i for i, truth in truths.items() if not gone & {t[0] for t in truth}]
    assert [row.id for row in dropped] == clean
    assert counts.images_dropped == len(truths) - len(clean)


def one(tmp_path: Path, kind: str, label: bytes, end: str = ".png", second: bytes = b"") -> Checker:
    """A checker of a part whose only image (5 x 4 pixels) has this label."""
    for role, data, name in (
        ("images", encode(np.zeros((4, 5, 3), np.uint8)), "a.png"),
        ("label", label, f"a{end}"),
        ("second", second, "a.png"),
    ):
        (tmp_path / role).mkdir(exist_ok=True)
        (tmp_path / role / name).write_bytes(data)
    part = SourcePart(
        str(tmp_path / "images"), str(tmp_path / "label"), KINDS[kind].format, [],
        str(tmp_path / "second"), "list.json",
    )  # fmt: skip
    return checker_of(part, VOCABULARY, tmp_path / "maps")


def grey(*values: int, size: tuple[int, int] = (4, 5)) -> bytes:
    return encode(np.resize(np.array(values, np.uint8), size))


SAVED_STRING = io.BytesIO()
savemat(SAVED_STRING, {"LabelMap": "text"})
SAVED_OTHER = io.BytesIO()
savemat(SAVED_OTHER, {"Other": np.zeros((4, 5))})
SAVED_FRACTION = io.BytesIO()
savemat(SAVED_FRACTION, {"LabelMap": np.full((4, 5), 0.5)})


@pytest.mark.parametrize(
    ("kind", "label", "end", "words"),
    [
        ("grey", grey(2, 99), ".png", r"a\.png has the value 99, which is neither a class nor"),
        ("grey", grey(2, 31), ".png", "value 31"),
        ("grey", grey(2, size=(5, 4)), ".png", r"a\.png is 4 x 5 pixels, but .* 5 x 4"),
        ("grey", encode(np.full((4, 5, 3), (1, 2, 3), np.uint8)), ".png", "in colour"),
        ("grey", grey(2)[:50], ".png", r"label/a\.png: it is damaged"),
        ("cityscapes", encode(np.full((4, 5), 5001, np.uint16)), ".png", "value 5,?"),
        ("ade", grey(2), ".png", "not an RGB label map"),
        ("mat", mat(np.full((4, 5), 77)), ".mat", "value 77"),
        ("mat", b"MATLAB 5.0 MAT-file nonsense", ".mat", r"a\.mat: it is damaged"),
        ("mat", SAVED_STRING.getvalue(), ".mat", "is no matrix of numbers"),
        ("mat", SAVED_OTHER.getvalue(), ".mat", "holds no LabelMap, but Other"),
        ("mat", SAVED_FRACTION.getvalue(), ".mat", "holds fractions"),
        ("panoptic", grey(2), ".png", "not an RGB PNG of ids"),
    ],
    ids=range(13),
)
def test_what_does_not_fit_names_the_file(
    tmp_path: Path, kind: str, label: bytes, end: str, words: str
) -> None:
    checker = one(tmp_path, kind, label, end)
    with pytest.raises(UserError, match=words):
        checker.row(Item(1, "a.png", f"a{end}", segments=()))


def test_a_map_of_things_must_fit(tmp_path: Path) -> None:
    item = Item(1, "a.png", "a.png", "a.png")
    unknown = encode(np.full((4, 5, 3), 3, np.uint8))
    with pytest.raises(UserError, match=r"second/a\.png has things of class 3, which is unknown"):
        one(tmp_path, "things over stuff", grey(4), second=unknown).row(item)
    small = encode(np.zeros((2, 5, 3), np.uint8))
    with pytest.raises(UserError, match=r"second/a\.png is 5 x 2 pixels, but .* 5 x 4"):
        one(tmp_path, "things over stuff", grey(4), second=small).row(item)


@pytest.mark.parametrize(
    "rle",
    [
        {"size": [4, 5], "counts": [3, 4]},
        {"size": [5, 4], "counts": [20]},
        {"size": [4, 5], "counts": "0" * 9},
        {"size": [4, 5], "counts": "~~~~~"},
        {"size": [4, 5], "counts": "P"},
        [[1.0, 2.0, 3.0]],
        [],
        "text",
    ],
)
def test_masks_that_cannot_be_are_named(tmp_path: Path, rle: object) -> None:
    item = Item(1, "a.png", segments=(Segment(77, 3, mask=rle),))
    with pytest.raises(UserError, match=r"list\.json: the mask of annotation 77 of image 1"):
        one(tmp_path, "instances", b"").row(item)


@quick
@given(seed=SEEDS)
def test_run_lengths_are_kept_in_all_their_forms(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = (int(rng.integers(1, 30)), int(rng.integers(1, 30)))
    mask = rng.random(size) < rng.random()
    packed = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    for form in (packed | {"counts": packed["counts"].decode()}, _plain(mask)):
        assert (decode_rle(encode_rle(form, size), size) == mask).all()
    box = [[0.0, 0.0, float(size[1]), 0.0, float(size[1]), float(size[0]), 0.0, float(size[0])]]
    assert decode_rle(encode_rle(box, size), size).all()


def _plain(mask: np.ndarray) -> dict:
    flat = np.concatenate([[0], mask.T.ravel().astype(int), [2]])
    edges = np.flatnonzero(np.diff(flat))
    return {"size": list(mask.shape), "counts": np.diff(np.concatenate([[0], edges])).tolist()}


def test_a_covered_instance_leaves_no_segment(tmp_path: Path) -> None:
    checker = one(tmp_path, "instances", b"")
    full = {"size": [4, 5], "counts": [0, 20]}
    row = checker.row(
        Item(1, "a.png", segments=(Segment(1, 3, mask=full), Segment(2, 7, mask=full)))
    )
    assert row.categories == [7] and row.areas == [20]  # the later id
    hidden = hide(row, [0])
    assert hidden.ids == [] and hidden.hidden == 1 and not segments(checker, hidden)


def test_more_strange_ids_than_were_hidden_are_an_error(tmp_path: Path) -> None:
    """What is hidden is counted, so that a label that was changed later is still noticed."""
    checker = one(tmp_path, "grey", grey(2, 9))
    row = hide(checker.row(Item(1, "a.png", "a.png")), [1])
    assert row.hidden == 1 and row.categories == [3]
    assert [category for category, *_ in segments(checker, row)] == [3]
    path = checker.maps / row.label
    for values, words in (([4, 8, 9], "id 8 is not in the JSON"), ([8], "id 4 is not in the PNG")):
        write_id_png(path, np.resize(values, (4, 5)))
        with pytest.raises(UserError, match=words):
            segments(checker, row)


def test_a_category_that_the_data_lack_is_named(tmp_path: Path) -> None:
    assert TABLE and VOCABULARY
    checker = one(tmp_path, "instances", b"")
    full = {"size": [4, 5], "counts": [0, 20]}
    with pytest.raises(UserError, match=r"unknown category \[5\]"):
        checker.row(Item(1, "a.png", segments=(Segment(1, 5, mask=full),)))
    with pytest.raises(UserError, match=r"a\.png is 5 x 4 pixels, but list\.json says 6 x 4"):
        checker.row(replace(Item(1, "a.png", segments=()), size=(4, 6)))
