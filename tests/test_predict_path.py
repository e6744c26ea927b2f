"""How many files a reader passes who follows one picture, and one `concat predict`."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

import concat_cli
from concat_cli import Predictor
from concat_cli.app import main
from concat_cli.core.data.image_io import write_png
from concat_cli.core.infer.files import predict_paths

ROOT = str(Path(concat_cli.__file__).parent)
HEAVY = ("timm", "open_clip", "torchvision", "transformers", "torch._dynamo", "sympy")
FUNCTION = inspect.CO_OPTIMIZED | inspect.CO_NEWLOCALS  # neither a module's body nor a class's


def entered(call: Callable[[], Any]) -> list[str]:
    """Our files of which a function is called by a second `call`, when everything is imported."""
    call()
    found: set[str] = set()

    def look(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(ROOT) and code.co_flags & FUNCTION:
            found.add(code.co_filename.removeprefix(ROOT))

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        call()
    finally:
        sys.setprofile(before)
    return sorted(found)


@pytest.fixture
def picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    write_png("picture.png", pixels)
    return Path("picture.png")


def test_a_picture_on_its_way_to_its_png(picture: Path) -> None:
    predictor = Predictor.load(device="cpu")
    files = entered(lambda: predict_paths(predictor, [picture], Path("out")))
    assert len(files) <= 16, files


def test_the_whole_command(picture: Path) -> None:
    """With finding, reading and restoring weights, names and options; it was 41 files."""
    files = entered(lambda: main(["predict", str(picture), "--device", "cpu"]))
    assert len(files) <= 32, files
    others = [file for file in files if "zegformer" in file or "clip_zss" in file]
    assert all("config" in file for file in others), files  # their sections are read with the rest
    assert not any("clip/encoder" in file for file in files), "the texts are in the cache"


def test_what_predict_imports(picture: Path) -> None:
    """Not what takes as long as torch itself, once texts are in the cache."""
    words = ["predict", str(picture), "--device", "cpu"]
    assert main(words) == 0
    code = (
        "import sys; from concat_cli.app import main\n"
        f"assert main({words!r}) == 0\n"
        f"found = set({HEAVY!r}) & set(sys.modules)\n"
        "assert not found, found\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
