"""Overlays: what is coloured, what stays plain, and that names can be read."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from concat_cli.core.infer import render
from concat_cli.core.infer.colours import PALETTE, TONES, luminance, tables, tones, usual
from concat_cli.core.infer.render import Drawing, Mark, enlargement, overlay, panel, side_by_side
from concat_cli.core.vocabulary_file import parse_names


def picture(height: int, width: int) -> np.ndarray:
    """Grey, so that every colour comes from the drawing."""
    return np.full((height, width, 3), 128, np.uint8)


def two_halves(height: int = 128, width: int = 128) -> Drawing:
    """A thing on the left, nothing in the middle, stuff on the right."""
    segment_map = np.zeros((height, width), np.int32)
    segment_map[:, : width // 3] = 1
    segment_map[:, 2 * width // 3 :] = 2
    return Drawing(segment_map, (Mark(1, "cat", True, 0.93), Mark(2, "sky", False, 0.71)))


def test_pictures_are_enlarged_where_that_is_asked_for():
    assert overlay(picture(128, 128), two_halves()).size == (128, 128)
    assert overlay(picture(128, 128), two_halves(), scale=3).size == (384, 384)
    assert overlay(picture(600, 800), two_halves(600, 800)).size == (800, 600)
    for size in ((1, 1), (40, 5000), (5000, 40), (128, 96), (3000, 4000)):
        factor = enlargement(*size)
        assert factor >= 1 and (factor == 1 or max(size) * factor <= render.MAX_SIDE)


def test_segments_are_tinted_and_the_rest_stays_plain():
    drawing = two_halves(600, 600)
    drawn = np.asarray(overlay(picture(600, 600), drawing)).astype(int)
    colour = {m.id: c for m, c in zip(drawing.marks, colours(drawing), strict=True)}
    nothing = drawn[:, 210:390]  # hatched: most of it as it was, the rest a little off
    assert (nothing == 128).mean() > 0.7 and 10 < np.abs(nothing - 128).max() < 40
    for mark, column in ((1, 20), (2, 580)):
        tint = drawn[10, column] - 128
        assert np.abs(tint).max() > 10
        towards = np.array(colour[mark]) - 128
        assert np.dot(tint, towards) / np.linalg.norm(tint) / np.linalg.norm(towards) > 0.99


def colours(drawing: Drawing) -> list[render.Colour]:
    found = render._colours(drawing, render._areas(drawing.segment_map))
    return [found[mark.id] for mark in drawing.marks]


def test_colours_are_distinct_and_stable():
    rng = np.random.default_rng(0)
    names = [f"class {i}" for i in range(12)] + ["class 0", "class 0"]
    segment_map = rng.integers(0, len(names) + 1, (40, 40))
    marks = tuple(Mark(i + 1, name, True) for i, name in enumerate(names))
    found = colours(Drawing(segment_map, marks))
    assert len(set(found)) == len(names)  # of classes, and of the three things of class 0
    assert found == colours(Drawing(segment_map, marks))
    alone = Drawing(np.where(segment_map == 3, 1, 0), (Mark(1, "class 2", True),))
    assert colours(alone)[0] in PALETTE


def test_type_contrasts_with_its_plate():
    every = (*PALETTE, *(c for table in tables().values() for c in table.values()))
    for colour in every:
        assert len({*tones(colour)}) == TONES
        for plate in tones(colour):
            light, dark = sorted((luminance(plate), luminance(render._contrast(plate))))[::-1]
            assert (light + 0.05) / (dark + 0.05) > 2.9, (colour, plate)


def test_usual_colours_of_the_data_set_that_knows_the_names():
    def known(names: str):
        return usual(parse_names(names.split(";")))

    assert (len(tables()["COCO"]), len(tables()["ADE20K"])) == (133, 150)
    assert known("person;sky;teddy bear")["person"] == (220, 20, 60)
    assert known("person;sky;pool table")["person"] == (150, 5, 61)
    found = known("puppy, Dog;sky;pool table;striped star")
    assert found["puppy"] == (0, 226, 252) and "striped star" not in found


def test_neighbours_of_a_class_differ_beyond_its_tones():
    segment_map = np.kron(np.arange(1, 26).reshape(5, 5), np.ones((40, 40), int))
    found = render.colours_of(dict.fromkeys(range(1, 26), "cat"), {}, segment_map)
    grid = np.array([found[i] for i in range(1, 26)]).reshape(5, 5, 3)
    assert (grid[1:] != grid[:-1]).any(-1).all() and (grid[:, 1:] != grid[:, :-1]).any(-1).all()
    assert len({*found.values()}) == TONES


def test_plates_lie_in_the_picture_and_do_not_overlap():
    taken: list[render.Rect] = []
    mask = np.zeros((200, 200), bool)
    mask[60:140, 60:140] = True
    for _ in range(5):
        taken.append(render._place(mask, (60, 14), taken, (200, 200)))
    assert all(r[0] >= 0 and r[1] >= 0 and r[2] <= 200 and r[3] <= 200 for r in taken)
    shared = [render._shared(a, b) for i, a in enumerate(taken) for b in taken[:i]]
    assert sum(shared) == 0


def test_the_name_is_drawn():
    drawing = two_halves(600, 600)
    unnamed = Drawing(
        drawing.segment_map, tuple(Mark(m.id, m.name, m.thing) for m in drawing.marks)
    )
    with_scores = np.asarray(overlay(picture(600, 600), drawing))
    without = np.asarray(overlay(picture(600, 600), unnamed))
    nameless = np.asarray(overlay(picture(600, 600), drawing, min_area=2.0))
    assert (with_scores != without).any() and (without != nameless).any()


@pytest.mark.parametrize("size", [(1, 1), (2, 300), (40, 900), (33, 5)])
def test_any_size_and_any_segments(size):
    for drawing in (
        Drawing(np.zeros(size, np.int32), ()),
        Drawing(np.ones(size, np.int32), (Mark(1, "a very long name indeed", True, 0.5),)),
        Drawing(np.zeros(size, np.int32), (Mark(1, "hidden", True),)),
    ):
        drawn = overlay(picture(*size), drawing)
        assert drawn.mode == "RGB" and drawn.width % size[1] == 0


def test_an_empty_prediction_is_hatched_faintly():
    image = np.random.default_rng(0).integers(0, 256, (600, 700, 3), dtype=np.uint8)
    drawn = np.asarray(overlay(image, Drawing(np.zeros((600, 700), np.int32), ())))
    changed = (drawn != image).any(-1)
    assert 0.05 < changed.mean() < 0.3
    assert np.abs(drawn.astype(int) - image).max() <= 51  # a fifth of the way to black or white


def test_panels_hold_their_pictures():
    pictures = [Image.new("RGB", (100, 80), colour) for colour in ("red", "lime", "blue")]
    sheet = np.asarray(panel([pictures, pictures[:2]], captions=["a", "b", "c"], gap=10))
    assert sheet.shape[1] == 3 * 100 + 4 * 10
    for colour, count in (((255, 0, 0), 2), ((0, 255, 0), 2), ((0, 0, 255), 1)):
        assert (sheet == colour).all(-1).sum() == count * 100 * 80
    row = side_by_side(picture(128, 128), two_halves(), two_halves())
    assert row.width > 3 * 512 and row.height > 512
