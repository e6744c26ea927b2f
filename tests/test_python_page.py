"""The page on Python: every snippet runs, in order, and gives what its comments say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import concat_cli
from concat_cli.core.runs import BUILT_IN

PAGE = Path(__file__).parents[1] / "docs" / "python.md"


def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def names(mini_world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the snippets leave behind, run in a folder with one drawn picture."""
    folder = tmp_path_factory.mktemp("page")
    scene = sorted((mini_world / "val").iterdir())[0]
    Image.open(scene).convert("RGB").save(folder / "scene.png")
    found: dict[str, Any] = {"weights": BUILT_IN, "data": mini_world}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for number, code in enumerate(snippets()):
            exec(compile(code, f"snippet {number}", "exec"), found)
        found["files"] = {path.as_posix() for path in Path().rglob("*.png")}
    return found


def test_every_snippet_runs(names: dict[str, Any]) -> None:
    assert names["files"] >= {"drawn.png", "predictions/scene.overlay.png"}
    assert names["written"].index.name == "panoptic.json"
    assert names["predictor"].cfg.min_score == 0.3 and names["predictor"].cfg.size == 96
    assert names["prediction"].vocabulary.names == ("striped star", "circle", "green water")
    assert names["prediction"].vocabulary.is_thing == (True, True, False)
    assert names["prediction"].semantic_map.shape == names["prediction"].panoptic_map.shape
    assert [one.panoptic_map.shape for one in names["several"]][2] == (48, 64)
    assert (names["several"][0].panoptic_map == names["several"][1].panoptic_map).all()
    assert names["report"].panoptic["all"] is not None


def test_the_public_names() -> None:
    for name in concat_cli.__all__:
        assert getattr(concat_cli, name) is not None, name
    assert concat_cli.load == concat_cli.Predictor.load
    assert set(dir(concat_cli)) >= {"Predictor", "evaluate"}
    with pytest.raises(AttributeError, match="nothing"):
        concat_cli.nothing  # noqa: B018


def test_importing_the_package_is_quick() -> None:
    code = "import concat_cli, sys; print(len({'torch', 'numpy', 'PIL'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert done.stdout == "0\n", done.stderr
