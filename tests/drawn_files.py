"""Pixels and files of the drawn layouts: raw label maps, pictures, zips, and their truth."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.io import savemat

HEIGHT, WIDTH = 48, 64
Files = dict[str, bytes]
Segments = list[tuple[int, bool, np.ndarray]]  # (category id, crowd, mask)
Truth = dict[str, dict[str, Segments]]  # part -> image file name -> its segments
Meaning = Callable[[int], int | None]  # raw value -> category id, None = void


def raw_map(pool: Iterable[int], seed: int) -> np.ndarray:
    """(48, 64) int64: blocks of 16 x 16 pixels and a few lone pixels, of the values of a pool."""
    rng = np.random.default_rng(seed)
    values = np.array(list(pool))
    blocks = rng.choice(values, (3, 4)).repeat(16, 0).repeat(16, 1)
    lone = rng.random(blocks.shape) < 0.01
    return np.where(lone, rng.choice(values, blocks.shape), blocks)


def naive_segments(raw: np.ndarray, meaning: Meaning) -> Segments:
    """One segment a class, found pixel by pixel."""
    masks: dict[int, np.ndarray] = {}
    for y in range(raw.shape[0]):
        for x in range(raw.shape[1]):
            category = meaning(int(raw[y, x]))
            if category is not None:
                masks.setdefault(category, np.zeros(raw.shape, bool))[y, x] = True
    return [(category, False, mask) for category, mask in masks.items()]


def image_bytes(array: np.ndarray, form: str = "PNG", mode: str = "") -> bytes:
    """An array as a picture file."""
    buffer = io.BytesIO()
    picture = Image.fromarray(array)
    if mode == "P":
        picture.putpalette([value % 256 for value in range(0, 768 * 7, 7)])
    picture.save(buffer, form)
    return buffer.getvalue()


def photo(seed: int, form: str = "JPEG") -> bytes:
    """A picture of 48 x 64."""
    rng = np.random.default_rng(1000 + seed)
    colours = rng.integers(0, 256, (6, 8, 3)).astype(np.uint8)
    return image_bytes(colours.repeat(8, 0).repeat(8, 1), form)


def grey(raw: np.ndarray) -> bytes:
    return image_bytes(raw.astype(np.uint8))


def palette(raw: np.ndarray) -> bytes:
    return image_bytes(raw.astype(np.uint8), mode="P")


def wide(raw: np.ndarray) -> bytes:
    return image_bytes(raw.astype(np.uint16))


def tiff(raw: np.ndarray) -> bytes:
    return image_bytes(raw.astype(np.uint16), "TIFF")


def red_green(raw: np.ndarray) -> bytes:
    """ADE20K-Full's coding: R = 10 times the high part, G = the low part, B = an instance."""
    planes = raw // 256 * 10, raw % 256, raw % 7
    return image_bytes(np.stack(planes, axis=-1).astype(np.uint8))


def matlab(raw: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    savemat(buffer, {"LabelMap": raw.astype(np.uint16)}, do_compression=True)
    return buffer.getvalue()


def id_png(ids: np.ndarray) -> bytes:
    """A COCO panoptic PNG."""
    planes = ids % 256, ids // 256 % 256, ids // 65536
    return image_bytes(np.stack(planes, axis=-1).astype(np.uint8))


def write(root: Path, files: Files) -> None:
    """All files below a folder."""
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def zipped(files: Files, prefix: str, inside: str, kind: int = zipfile.ZIP_DEFLATED) -> bytes:
    """The files below a prefix as a zip, in which `inside` stands for it; they are taken out of
    `files`. The zip holds what an archiver on a Mac leaves, too."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", kind) as archive:
        for name in [name for name in files if name.startswith(prefix)]:
            member = inside + name[len(prefix) :]
            archive.writestr(member, files.pop(name))
            folder, _, file = member.rpartition("/")
            archive.writestr(f"__MACOSX/{folder}/._{file}", b"\0\5\26\7")
    return buffer.getvalue()


def pack(
    root: Path,
    files: Files,
    archives: Mapping[str, tuple[str, str]],
    kind: int = zipfile.ZIP_DEFLATED,
) -> None:
    """The files below each prefix in a zip, by archive name: (prefix, what stands for it inside);
    the rest as files. An archive whose name begins with the prefix of a later one goes into it."""
    left = dict(files)
    for archive, (prefix, inside) in archives.items():
        left[archive] = zipped(left, prefix, inside, kind)
    write(root, left)


def pairs(
    stems: Mapping[str, Iterable[str]],
    image: str,
    label: str,
    save: Callable[[np.ndarray], bytes],
    pool: Iterable[int],
    meaning: Meaning,
) -> tuple[Files, Truth]:
    """Images and label maps; `image` and `label` are names with {part} and {stem}."""
    files: Files = {}
    truth: Truth = {}
    for part, names in stems.items():
        for stem in names:
            seed = sum(map(ord, part + stem))
            raw = raw_map(pool, seed)
            picture = image.format(part=part, stem=stem)
            form = "PNG" if picture.endswith(".png") else "JPEG"
            files[picture] = photo(seed, form)
            files[label.format(part=part, stem=stem)] = save(raw)
            known = truth.setdefault("train" if part.startswith(("train", "pc59_t")) else "val", {})
            known[picture.rpartition("/")[2]] = naive_segments(raw, meaning)
    return files, truth


def numbered(form: str, train: int = 4, val: int = 2) -> dict[str, list[str]]:
    """part -> stems, from a form with {part} and {n}."""
    counts = {"train": range(1, train + 1), "val": range(train + 1, train + val + 1)}
    return {part: [form.format(part=part, n=n) for n in ns] for part, ns in counts.items()}


def renamed(stems: Mapping[str, list[str]], words: Mapping[str, str]) -> dict[str, list[str]]:
    """The same stems with the layout's own words for the parts."""
    return {words[part]: names for part, names in stems.items()}


NAMED = {"train": "training", "val": "validation"}


def panoptic_rows(
    known: Segments, number: Callable[[int], int]
) -> tuple[list[dict[str, Any]], bytes]:
    """`segments_info` and the id PNG of segments."""
    ids = np.zeros((HEIGHT, WIDTH), np.int64)
    rows = []
    for i, (category, crowd, mask) in enumerate(known):
        ids[mask] = own = 300 * (i + 1)
        rows.append({"id": own, "category_id": number(category), "iscrowd": int(crowd)})
    return rows, id_png(ids)


def image_row(image_id: int | str, name: str) -> dict[str, Any]:
    return {"id": image_id, "file_name": name, "height": HEIGHT, "width": WIDTH}


def panoptic_json(images: list[Any], annotations: list[Any], categories: list[Any]) -> bytes:
    content = {"images": images, "annotations": annotations, "categories": categories}
    return json.dumps(content).encode()
