"""Makes the pictures of the README with the tool itself, in docs/pictures/.

    python docs/make_pictures.py                                  # with the built-in weights
    python docs/make_pictures.py --weights runs/shapes/finetune/last.safetensors
    python docs/make_pictures.py --seeds 145 226 105              # other scenes

The scenes are drawn for the pictures: they belong to no part of a data set, and the tiny CLIP was
not trained on them. They are larger than those that the built-in segmentor learned on.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from concat_cli.core.files import write_bytes
from concat_cli.core.infer.predictor import Predictor
from concat_cli.core.infer.render import INK, PAPER, Drawing, Mark, overlay, panel
from concat_cli.core.prepare.shapes_scene import CLASSES, draw_scene
from concat_cli.core.runs import BUILT_IN

OUT = Path(__file__).parent / "pictures"
SIZE = (384, 448)  # height and width of a scene
SEEDS = (226, 105)  # chosen for the classes they hold, before any prediction
WORLD = (180, 48, 256, 94, 191, 190, 50, 232)
SCENE = 145  # what the README's first command looks at, of the size of the built-in world
WIDTH = 1600  # of a picture at most
LIMIT = 390_000  # bytes of a picture at most
SIGN = "* "  # stands before the names of unseen classes


def marked(drawing: Drawing, seen: Collection[str]) -> Drawing:
    """The drawing with a sign before the name of every class that is not in `seen`."""
    marks = (
        Mark(m.id, m.name if m.name in seen else SIGN + m.name, m.thing, m.score)
        for m in drawing.marks
    )
    return Drawing(drawing.segment_map, tuple(marks))


def drawn(image: NDArray[np.uint8], drawing: Drawing) -> Image.Image:
    """The overlay; a light band runs inside the edge of every segment of an unseen class."""
    canvas = image.copy()
    for mark in drawing.marks:
        if mark.name.startswith(SIGN):
            mask = drawing.segment_map == mark.id
            inner = ndimage.binary_erosion(mask, iterations=max(2, len(image) // 64))
            canvas[mask & np.logical_not(inner)] = PAPER
    return overlay(canvas, drawing)


def truth_of(seed: int) -> tuple[NDArray[np.uint8], Drawing]:
    """A scene and its segments."""
    scene = draw_scene(seed, SIZE)
    marks = (
        Mark(i + 1, CLASSES.names[label], CLASSES.is_thing[label])
        for i, label in enumerate(scene.labels)
    )
    return scene.image, Drawing(scene.segment_map, tuple(marks))


def prediction_picture(predictor: Predictor, seeds: Sequence[int]) -> Image.Image:
    """Image, truth and prediction of a few scenes, a row each."""
    vocabulary = predictor.vocabulary
    seen = {vocabulary.names[i] for i in vocabulary.seen_indices}
    rows = []
    for seed in seeds:
        image, truth = truth_of(seed)
        found = Drawing.of_prediction(predictor(image))
        both = (drawn(image, marked(one, seen)) for one in (truth, found))
        rows.append([Image.fromarray(image), *both])
    sheet = panel(rows, captions=["image", "truth", "prediction"])
    return with_legend(sheet, f"{SIGN}unseen: trained without any label or image of this class")


def world_picture(seeds: Sequence[int], columns: int = 4) -> Image.Image:
    """Scenes of the built-in world."""
    scenes = [Image.fromarray(draw_scene(seed, (288, 384)).image) for seed in seeds]
    return panel([scenes[i : i + columns] for i in range(0, len(scenes), columns)])


def with_legend(sheet: Image.Image, text: str) -> Image.Image:
    """The sheet with a line of text below."""
    size = max(14, sheet.width // 80)
    font = ImageFont.load_default(size)
    height = 2 * size
    taller = Image.new("RGB", (sheet.width, sheet.height + height), PAPER)
    taller.paste(sheet, (0, 0))
    ImageDraw.Draw(taller).text((12, sheet.height), text, INK, font=font)
    return taller


def save(picture: Image.Image, path: Path) -> None:
    """Writes a WebP of at most LIMIT bytes."""
    if picture.width > WIDTH:
        height = round(picture.height * WIDTH / picture.width)
        picture = picture.resize((WIDTH, height), Image.Resampling.LANCZOS)
    for quality in (90, 85, 80, 70, 60, 45):
        buffer = BytesIO()
        picture.save(buffer, "WEBP", quality=quality, method=6)
        if buffer.tell() <= LIMIT:
            break
    write_bytes(path, buffer.getvalue())
    print(f"{path}: {picture.width}x{picture.height}, {buffer.tell() // 1000} kB, q {quality}")


def main() -> None:
    """Draws, predicts and writes the pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--weights", type=Path, default=BUILT_IN)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    Image.fromarray(draw_scene(SCENE).image).save(args.out / "scene.png")
    save(world_picture(WORLD), args.out / "world.webp")
    predictor = Predictor.load(args.weights, device="cpu")
    save(prediction_picture(predictor, args.seeds), args.out / "prediction.webp")


if __name__ == "__main__":
    main()
