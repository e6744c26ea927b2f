"""A method of somebody else's: one folder (`toy_method`) and one line, and every command knows it.

The line is that of an installed package; what runs is a process of its own, which finds it so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

HERE = Path(__file__).parent
LINE = "toy = toy_method:METHOD"
RUN = """
import contextlib, io, json, sys
from concat_cli.app import main
told = {}
for name, words in json.loads(sys.argv[1]).items():
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    told[name] = code, out.getvalue(), err.getvalue()
print(json.dumps(told))
"""
KEYS = """
data.crop=64 infer.size=64 optim.steps=2 optim.batch_size=4 optim.per_device=2 optim.warmup=0
optim.log_every=1 optim.preview_every=0 shapes.train=24 shapes.dev=8 shapes.val=12 shapes.size=64
toy.scale=30
""".split()
Told = dict[str, tuple[int, str, str]]


def install(folder: Path) -> None:
    """What `pip install` leaves of a package, for the finder of entry points."""
    facts = folder / "toy_method-1.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-method\nVersion: 1\n")
    (facts / "entry_points.txt").write_text(f"[concat.methods]\n{LINE}\n")


@pytest.fixture(scope="module")
def told(mini_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Told:
    """By command: its exit code, what it printed, and what it printed besides."""
    folder = tmp_path_factory.mktemp("toy")
    install(folder / "site")
    photo = folder / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)).save(photo)
    keys = [f"data.root={mini_world}", *KEYS]
    commands = {
        "help": ["--help"],
        "own help": ["train-toy", "--help"],
        "dry run": ["train-toy", "--name", "toy", "--dry-run", "--verbose", *keys],
        "mistake": ["train-toy", "--name", "toy", "--dry-run", "toy.scale=0"],
        "train": ["train-toy", "--name", "toy", "--device", "cpu", *keys],
        "evaluate": ["evaluate", "--name", "toy", "--device", "cpu", "--json"],
        "panoptic": ["evaluate", "--name", "toy", "--tasks", "panoptic"],
        "predict": ["predict", str(photo), "--name", "toy", "--device", "cpu", "--out", "out"],
    }
    paths = (HERE, folder / "site", HERE.parent)
    found = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(commands)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout) | {"folder": (0, str(folder), "")}


@pytest.mark.parametrize("name", ["help", "own help", "dry run", "train", "evaluate", "predict"])
def test_the_commands_know_it(told: Told, name: str) -> None:
    code, _, besides = told[name]
    assert code == 0, besides


def test_help_names_it(told: Told) -> None:
    assert "train-toy" in told["help"][1] and "colours, named one by one" in told["help"][1]
    assert "concat train-toy toy.scale=30" in told["own help"][1]


def test_its_section_and_its_plan_are_told(told: Told) -> None:
    out = told["dry run"][1]
    assert "scale: 30.0" in out and "million parameters" in out and "would write" in out
    code, _, besides = told["mistake"]
    assert code == 2 and "toy.scale" in besides


def test_what_it_leaves(told: Told) -> None:
    folder = Path(told["folder"][1])
    assert (folder / "runs/toy/toy/last.safetensors").is_file()
    scored = json.loads(told["evaluate"][1])
    assert 0 <= scored["semantic"]["all"]["miou"] <= 100 and not scored["panoptic"]["all"]
    assert (folder / "out" / "semantic.json").is_file()


def test_it_has_no_panoptic_quality(told: Told) -> None:
    code, _, besides = told["panoptic"]
    assert code == 2 and "cannot be scored for: panoptic" in besides
