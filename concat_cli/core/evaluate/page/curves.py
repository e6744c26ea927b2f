"""Curves of losses and dev scores, and the newest preview, of each stage of a run."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from concat_cli.core.data.image_io import BROKEN, open_image
from concat_cli.core.errors import UserError
from concat_cli.core.evaluate.page.pictures import webp
from concat_cli.core.runs import StageDir, curves

POINTS = 200  # of a curve: of more, each stands for the mean of its neighbours
SERIES = 24  # of a stage
PREVIEW, PREVIEW_BYTES = 1400, 160_000


@dataclass(frozen=True)
class Curve:
    """A figure over the steps."""

    name: str
    steps: list[float]
    values: list[float]


@dataclass(frozen=True)
class Training:
    """A stage, or a part of it: its curves, and its newest preview as WebP, if there is one."""

    title: str
    curves: tuple[Curve, ...]
    preview: bytes | None
    preview_name: str = ""


def training_of(run: Path) -> list[Training]:
    """Every stage below a run's folder that wrote metrics, in the order in which they ran."""
    files = sorted(
        (p for p in (*run.glob("*/metrics.jsonl"), *run.glob("*/*/metrics.jsonl"))
         if ".old-" not in str(p.relative_to(run))),
        key=lambda path: path.stat().st_mtime,
    )  # fmt: skip
    found = (_stage(run, file.parent) for file in files)
    return [one for one in found if one.curves or one.preview]


def _stage(run: Path, folder: Path) -> Training:
    rows = [row for row in StageDir(folder, folder.name).read_metrics() if "step" in row]
    series = {name.replace("dev/", "dev ", 1): points for name, points in curves(rows).items()}
    shown = [_curve(name, points) for name, points in series.items() if len(points) > 1]
    preview = max((folder / "previews").glob("*.png"), default=None)
    title = " ".join(folder.relative_to(run).parts)
    picture = None if preview is None else _opened(preview)
    return Training(title, tuple(shown[:SERIES]), picture, preview.name if preview else "")


def _curve(name: str, points: list[tuple[int, float]]) -> Curve:
    size = -(-len(points) // POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return Curve(
        name,
        [group[-1][0] for group in groups],
        [float(f"{sum(v for _, v in group) / len(group):.5g}") for group in groups],
    )


def _opened(path: Path) -> bytes | None:
    """The picture; None where it is damaged, as one is that a kill cut off."""
    try:
        with closing(open_image(path)) as image:
            return webp(image, PREVIEW, PREVIEW_BYTES)
    except (UserError, *BROKEN):
        return None
