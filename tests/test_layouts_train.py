"""Two training steps and an evaluation on each kind of truth, however its labels lay on disk.

Once prepared, all layouts have one form; `test_recipe_layouts.py` reads each of them.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import pytest
from drawn_layouts import CASES
from mini import KEYS

from concat_cli.core.clip.encoder import Clip, load_clip
from concat_cli.core.config import ClipConfig
from concat_cli.core.config_file import load_config
from concat_cli.core.data.dataset import read_dataset_info
from concat_cli.core.evaluate.scores import Scoring
from concat_cli.core.evaluate.weights import evaluate_weights
from concat_cli.core.infer import predictor
from concat_cli.core.prepare.recipes import RECIPES
from concat_cli.core.prepare.run import Options, prepare
from concat_cli.core.runs import Run
from concat_cli.methods.concat import con

SHORT = """
optim.steps=2 optim.batch_size=2 optim.per_device=2 optim.eval_every=0 warmup.steps=0
align.image=0 align.instance=0 model.decoder_layers=1 clip.templates=single
""".split()


@pytest.fixture(autouse=True)
def one_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    """The built-in CLIP is loaded once for all layouts: half of what each would take."""
    for module in (con, predictor):
        monkeypatch.setattr(module, "load_clip", lambda cfg, *_, **__: _clip(cfg))


@cache
def _clip(cfg: ClipConfig) -> Clip:
    return load_clip(cfg, "cpu")


TRAINED = (
    "coco zips", "coco-stuff", "context mat 459 zip", "coco instances", "cityscapes",
    "custom merged",
)  # fmt: skip


@pytest.mark.parametrize("name", TRAINED)
def test_two_steps_and_scores(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    case.draw(tmp_path / "data")
    source = RECIPES[case.recipe].find(tmp_path / "data", **case.options)
    options = Options(source.default_split, "void", processes=1, one_part=True)
    report = prepare(source, tmp_path / "data", tmp_path / "out", options)
    info = read_dataset_info(tmp_path / "out")
    assert info.class_split == report.class_split and info.protocol["unseen_pixels"] == "void"
    cfg = load_config(None, [f"data.root={tmp_path / 'out'}", *KEYS, *SHORT])
    run = Run("layout", tmp_path / "runs")
    result = con.train_con(cfg, run, device="cpu", force=True)
    assert result.finished
    figure = {"panoptic": "pq", "semantic": "miou", "instance": "ap"}[case.tasks[0]]
    assert figure in result.figures and len({"pq", "miou", "ap"} & result.figures.keys()) == 1
    losses = [row["loss"] for row in run.stage("con").read_metrics() if "loss" in row]
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)
    scores = evaluate_weights(run.weights_of("con"), scoring=Scoring(force=True), device="cpu")
    assert scores.images == 2
    assert (scores.panoptic["all"] is not None) == ("panoptic" in case.tasks)
    assert scores.protocol["filtering"] == info.protocol
