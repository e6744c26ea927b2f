"""Pictures of a stage's `metrics.jsonl`: a panel for each loss, and for each figure on dev."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from concat_cli.core import files
from concat_cli.core.runs import StageDir, curves

HOW_TO_PLOT = "no plots of the losses: they need matplotlib (pip install 'concat-seg[plots]')"
COLUMNS = 4  # of panels
WINDOWS = 25  # into how many the steps are divided for the smooth line
Curves = Mapping[str, list[tuple[int, float]]]  # by name, (step, value)


def draw_metrics(stage: StageDir) -> list[Path]:
    """Draws what a stage has noted so far; the files, of which there are none without matplotlib,
    and only one where nothing was scored on dev."""
    if find_spec("matplotlib") is None:
        return []
    every = curves(stage.read_metrics())
    found = {
        stage.losses_png: {name: one for name, one in every.items() if not name.startswith("dev/")},
        stage.dev_png: {
            name.removeprefix("dev/"): one for name, one in every.items() if name.startswith("dev/")
        },
    }
    drawn = {path: one for path, one in found.items() if one}
    for path, one in drawn.items():
        _draw(path, one)
    return list(drawn)


def _draw(path: Path, found: Curves) -> None:
    """A panel for each curve, thin as it is and thick as the mean of a window of steps."""
    import numpy as np

    make: Any = import_module("matplotlib.figure").Figure  # not pyplot, which looks for a screen
    columns = min(COLUMNS, len(found))
    figure = make(figsize=(3.2 * columns, 2.4 * math.ceil(len(found) / columns)))
    for place, (name, points) in enumerate(found.items(), 1):
        axes = figure.add_subplot(math.ceil(len(found) / columns), columns, place)
        steps, values = (np.array(one, float) for one in zip(*points, strict=True))
        axes.plot(steps, values, color="#9ab", linewidth=0.8, marker="." if len(steps) < 3 else "")
        window = len(steps) // WINDOWS
        if window > 1:
            kernel = np.full(window, 1 / window)
            smooth = np.convolve(values, kernel, "valid")
            axes.plot(np.convolve(steps, kernel, "valid"), smooth, color="#136", linewidth=1.5)
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    figure.supxlabel("step", fontsize=8)
    figure.tight_layout()
    with files.atomic_path(path) as temp:
        figure.savefig(temp, format="png", dpi=120)
