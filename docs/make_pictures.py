"""Makes the pictures of the README with the tool itself, in docs/pictures/.

    python docs/make_pictures.py                           # with the built-in weights
    python docs/make_pictures.py --weights runs/shapes/finetune/last.safetensors
    python docs/make_pictures.py --seeds 5 13 29           # other scenes

The scenes are drawn for the pictures: no data set and no training of the tiny CLIP holds them. They
are larger than the scenes that the built-in segmentor learned on.
"""

from __future__ import annotations

import argparse
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from concat_cli.core.data.shapes import Scene, draw_scene
from concat_cli.core.data.shapes_split import CLASSES
from concat_cli.core.files import write_bytes
from concat_cli.core.infer.predictor import Prediction, Predictor
from concat_cli.core.infer.render import Drawing, Mark, enlargement, overlay, panel
from concat_cli.core.vocabulary import Vocabulary

SIZE = (320, 512)  # height and width of the scenes
SEEDS = (5, 13, 29)  # with unseen classes of the default split in each
WORLD = (6, 17, 24, 37, 41, 53, 62, 70)
LIMIT = 390_000  # bytes of a picture at most
UNSEEN = "* "  # stands before the names of unseen classes
NAMES = {  # other names for the same pictures, all of words that the tiny CLIP knows
    "star": "thing", "circle": "thing", "square": "thing", "heart": "thing", "ring": "thing",
    "triangle": "thing", "cross": "thing", "crescent": "thing",
    "brick": "stuff", "grass": "stuff", "water": "stuff", "wood": "stuff",
}  # fmt: skip


def truth_of(scene: Scene, seen: frozenset[str]) -> Drawing:
    """The scene's segments under their names, unseen ones marked."""
    names = [CLASSES.names[label] for label in scene.labels]
    marks = (
        Mark(i + 1, marked(name, seen), CLASSES.is_thing[label])
        for i, (name, label) in enumerate(zip(names, scene.labels, strict=True))
    )
    return Drawing(scene.segment_map, tuple(marks))


def found_in(prediction: Prediction, seen: frozenset[str]) -> Drawing:
    """The predicted segments under their names, unseen ones marked."""
    plain = Drawing.of_prediction(prediction)
    marks = (Mark(m.id, marked(m.name, seen), m.thing, m.score) for m in plain.marks)
    return Drawing(plain.segment_map, tuple(marks))


def marked(name: str, seen: frozenset[str]) -> str:
    """The name, with a sign before it if no label of the class was trained on."""
    return name if name in seen else UNSEEN + name


def with_halos(picture: Image.Image, drawing: Drawing) -> Image.Image:
    """The overlay with a white ring around every segment of an unseen class."""
    canvas = np.array(picture)
    ids = [mark.id for mark in drawing.marks if mark.name.startswith(UNSEEN)]
    for number in ids:
        mask: NDArray[np.bool_] = drawing.segment_map == number
        inner = ndimage.binary_erosion(mask, iterations=2, border_value=0)
        canvas[mask & ~inner] = 255
    return Image.fromarray(canvas)


def hero(predictor: Predictor, seeds: tuple[int, ...], seen: frozenset[str]) -> Image.Image:
    """Image, truth and prediction of a few scenes, a row each, with a legend."""
    rows = []
    for seed in seeds:
        scene = draw_scene(seed, SIZE)
        drawings = truth_of(scene, seen), found_in(predictor(scene.image), seen)
        drawn = [with_halos(overlay(scene.image, one), one) for one in drawings]
        rows.append([Image.fromarray(scene.image), *drawn])
    sheet = panel(rows, captions=["image", "truth", "prediction, with scores"])
    return with_legend(sheet, f"{UNSEEN}white edge: unseen, no label of the class in training")
