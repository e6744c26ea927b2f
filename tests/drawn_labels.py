"""Labels of every kind, drawn at random, with their truth by rules written anew."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.io import savemat

from concat_cli.core.data.coco import Item, Segment
from concat_cli.core.prepare.source import LabelFormat, SourcePart
from concat_cli.core.vocabulary import ClassEntry, Vocabulary

VOCABULARY = Vocabulary(
    (
        ClassEntry("cat", 3, kind="thing"),
        ClassEntry("cow", 7, kind="thing"),
        ClassEntry("sky", 0, kind="stuff"),
        ClassEntry("wall", 21, kind="stuff"),
    )
)
TABLE = {2: 3, 9: 7, 4: 0, 30: 21}  # raw value -> category
VOID = (0, 255)
Truth = list[tuple[int, bool, np.ndarray]]  # category, crowd, mask of each segment
Make = Callable[[np.random.Generator, tuple[int, int]], "Drawn"]


@dataclass
class Drawn:
    """One image's label files, what a JSON would list, and the truth."""

    files: dict[str, bytes]
    truth: Truth
    segments: tuple[Segment, ...] | None = None
    label: str = "label"
    second: str = ""


@dataclass(frozen=True)
class Kind:
    """How one kind of label is drawn."""

    format: LabelFormat
    make: Make
    end: str = ".png"
    more: dict[str, Any] = field(default_factory=dict)


def encode(array: np.ndarray, form: str = "PNG", palette: bool = False) -> bytes:
    image = Image.fromarray(array)
    if palette:
        image = image.convert("P") if image.mode != "L" else image
        image.putpalette([i * 7 % 256 for i in range(768)])
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


def blocks(rng: np.random.Generator, size: tuple[int, int], values: list[int]) -> np.ndarray:
    """Random patches of the values."""
    coarse = rng.choice(values, (1 + size[0] // 4, 1 + size[1] // 4))
    return coarse.repeat(4, 0).repeat(4, 1)[: size[0], : size[1]]


def by_class(raw: np.ndarray, skip: frozenset[int] = frozenset()) -> Truth:
    return [
        (category, False, raw == value)
        for value, category in TABLE.items()
        if category not in skip and (raw == value).any()
    ]


def semantic(code: Callable[[np.ndarray], bytes]) -> Make:
    def make(rng: np.random.Generator, size: tuple[int, int]) -> Drawn:
        raw = blocks(rng, size, [*TABLE, *VOID])
        return Drawn({"label": code(raw)}, by_class(raw))

    return make


def ade_rg(raw: np.ndarray) -> bytes:
    red, green = raw // 256 * 10, raw % 256
    return encode(np.stack([red + 3, green, raw * 0 + 77], -1).astype(np.uint8))


def mat(raw: np.ndarray) -> bytes:
    file = io.BytesIO()
    savemat(file, {"LabelMap": raw.astype(np.uint16), "other": {"a": "b"}}, do_compression=True)
    return file.getvalue()


def panoptic(rng: np.random.Generator, size: tuple[int, int]) -> Drawn:
    numbers = [0, 5, 300, 70_000, (1 << 24) - 1]
    ids = blocks(rng, size, numbers)
    there = [n for n in numbers[1:] if (ids == n).any()]
    rows = [(n, int(rng.choice(VOCABULARY.ids)), bool(rng.random() < 0.3)) for n in there]
    planes = np.stack([ids & 255, ids >> 8 & 255, ids >> 16], -1).astype(np.uint8)
    segments = tuple(Segment(*row) for row in reversed(rows))
    return Drawn(
        {"label": encode(planes)}, [(c, crowd, ids == n) for n, c, crowd in rows], segments
    )


def cityscapes(rng: np.random.Generator, size: tuple[int, int]) -> Drawn:
    """Groups of things are crowds; a class of stuff never has instances here."""
    values = [0, 255, 2, 2000, 2007, 9001, 9, 4, 30]
    raw = blocks(rng, size, values)
    truth: Truth = []
    for value in sorted(set(values) - {0, 255}):
        category = TABLE[value // 1000 if value >= 1000 else value]
        if (raw == value).any():
            crowd = value < 1000 and category in (3, 7)
            truth.append((category, crowd, raw == value))
    return Drawn({"label": encode(raw.astype(np.uint16))}, truth)


def things_over_stuff(rng: np.random.Generator, size: tuple[int, int]) -> Drawn:
    raw = blocks(rng, size, [*TABLE, *VOID])
    codes = blocks(rng, size, [0, 0, 0, 1 << 8 | 1, 1 << 8 | 2, 2 << 8 | 1])
    planes = np.stack([codes >> 8, codes & 255, codes * 0 + 9], -1).astype(np.uint8)
    bare = np.where(codes > 0, 0, raw)
    truth = by_class(bare, frozenset({3, 7}))
    for code in (257, 258, 513):
        if (codes == code).any():
            truth.append(({1: 3, 2: 7}[code >> 8], False, codes == code))
    return Drawn(
        {"label": encode(raw.astype(np.uint8)), "second": encode(planes)}, truth, second="second"
    )


def column_runs(mask: np.ndarray) -> dict[str, Any]:
    """COCO's uncompressed run lengths, column by column, by hand."""
    counts, current, length = [], 0, 0
    for value in mask.T.ravel().tolist():
        if value != current:
            counts.append(length)
            current, length = value, 0
        length += 1
    return {"size": list(mask.shape), "counts": [*counts, length]}


def instances(rng: np.random.Generator, size: tuple[int, int], base: Truth = ()) -> Drawn:  # pyright: ignore
    """Boxes that overlap: painted crowds first, then by falling area, then by id."""
    boxes = []
    for number in range(int(rng.integers(0, 5))):
        top, left = (int(rng.integers(0, s)) for s in size)
        mask = np.zeros(size, bool)
        mask[top : top + int(rng.integers(1, 12)), left : left + int(rng.integers(1, 12))] = True
        category = int(rng.choice([3, 7]))
        boxes.append((bool(rng.random() < 0.2), number * 10 + 3, category, mask))
    segments = tuple(
        Segment(number, category, crowd, column_runs(mask))
        for crowd, number, category, mask in boxes
    )
    owner = np.full(size, -1)
    for _, number, _, mask in sorted(boxes, key=lambda b: (not b[0], -b[3].sum(), b[1])):
        owner[mask] = number
    truth = [(c, crowd, m & (owner < 0)) for c, crowd, m in base]
    truth += [(category, crowd, owner == number) for crowd, number, category, _ in boxes]
    return Drawn({}, [t for t in truth if t[2].any()], segments, label="")


def instances_over_semantic(rng: np.random.Generator, size: tuple[int, int]) -> Drawn:
    raw = blocks(rng, size, [*TABLE, *VOID])
    drawn = instances(rng, size, by_class(raw, frozenset({3, 7})))
    drawn.files["label"], drawn.label = encode(raw.astype(np.uint8)), "label"
    return drawn


def _fmt(kind: str, pixels: str = "index", things: dict[int, int] | None = None) -> LabelFormat:
    return LabelFormat(kind, pixels, TABLE, VOID, things or {})  # pyright: ignore[reportArgumentType]


KINDS: dict[str, Kind] = {
    "panoptic": Kind(LabelFormat("panoptic"), panoptic),
    "grey": Kind(_fmt("semantic"), semantic(lambda raw: encode(raw.astype(np.uint8)))),
    "palette": Kind(
        _fmt("semantic"), semantic(lambda raw: encode(raw.astype(np.uint8), palette=True))
    ),
    "16 bit": Kind(_fmt("semantic"), semantic(lambda raw: encode(raw.astype(np.uint16)))),
    "tiff": Kind(
        _fmt("semantic"), semantic(lambda raw: encode(raw.astype(np.uint16), "TIFF")), ".tif"
    ),
    "ade": Kind(_fmt("semantic", "ade_rg"), semantic(ade_rg)),
    "mat": Kind(_fmt("semantic", "mat"), semantic(mat), ".mat"),
    "cityscapes": Kind(_fmt("cityscapes"), cityscapes),
    "things over stuff": Kind(_fmt("things_over_stuff", things={1: 3, 2: 7}), things_over_stuff),
    "instances": Kind(LabelFormat("instances"), instances),
    "instances over maps": Kind(
        _fmt("instances_over_semantic", things={3: 3, 7: 7}), instances_over_semantic
    ),
}


def draw_part(
    root: Path, kind: Kind, count: int, seed: int, zipped: bool
) -> tuple[SourcePart, dict[int, Truth]]:
    """`count` images with labels below `root`, as folders or zips; truth by image id."""
    rng = np.random.default_rng(seed)
    stores: dict[str, dict[str, bytes]] = {"images": {}, "label": {}, "second": {}}
    items, truths = [], {}
    for image_id in range(1, count + 1):
        size = (int(rng.integers(8, 20)), int(rng.integers(8, 24)))
        drawn = kind.make(rng, size)
        name = f"{image_id:04}"
        picture = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        stores["images"][f"{name}.png"] = encode(picture)
        ends = {"label": kind.end, "second": ".png"}
        names = {role: f"{name}{ends[role]}" for role in drawn.files}
        for role, data in drawn.files.items():
            stores[role][names[role]] = data
        items.append(
            Item(
                image_id,
                f"{name}.png",
                names.get("label", ""),
                names.get("second", ""),
                size,
                drawn.segments,
            )
        )
        truths[image_id] = drawn.truth
    places = {role: _store(root / role, files, zipped) for role, files in stores.items()}
    part = SourcePart(
        places["images"], places["label"], kind.format, items, places["second"], "list.json"
    )
    return part, truths


def _store(path: Path, files: dict[str, bytes], zipped: bool) -> str:
    if not files:
        return ""
    if zipped:
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path.with_suffix(".zip"), "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in files.items():
                archive.writestr(f"in/{name}", data)
        return f"{path}.zip!in"
    path.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (path / name).write_bytes(data)
    return str(path)
