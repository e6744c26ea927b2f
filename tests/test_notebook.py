"""The notebook of the docs runs from its first cell to its last, and holds no outputs."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebook.ipynb"


def test_the_notebook_runs() -> None:
    """Cell by cell in one namespace, as a kernel does it; the last expression is what is shown."""
    cells = [c for c in json.loads(NOTEBOOK.read_text("utf-8"))["cells"] if "outputs" in c]
    assert cells and all(c["outputs"] == [] and c["execution_count"] is None for c in cells)
    names: dict[str, Any] = {}
    shown: list[Any] = []
    for cell in cells:
        body = ast.parse("".join(cell["source"])).body
        last = body.pop() if isinstance(body[-1], ast.Expr) else None
        exec(compile(ast.Module(body, []), NOTEBOOK.name, "exec"), names)
        if last is not None:
            shown.append(eval(compile(ast.Expression(last.value), NOTEBOOK.name, "eval"), names))
    prediction, (shape, _), picture, (images, _) = shown
    assert prediction.names and shape == (len(prediction.names), *prediction.panoptic_map.shape)
    assert prediction._repr_png_().startswith(b"\x89PNG")
    assert isinstance(picture, Image.Image) and picture.height == 3 * shape[1]
    assert images[0]["file_name"] == "scene.png" and np.any(names["masks"])
