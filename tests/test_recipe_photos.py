"""The two real photos of COCO: prepared, and a step of the R-50 model of the benchmark on them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from data_helpers import PHOTOS

from concat_cli.core.config_file import load_config
from concat_cli.core.data.prepare import Options, prepare_data
from concat_cli.core.runs import Run
from concat_cli.core.train.con import train_con

CONFIG = Path(__file__).parents[1] / "configs" / "concat_coco_119_14.yaml"
# What a machine without a network, a GPU and half an hour can do; the segmentor is the whole one.
SMALL = """
clip.model=tiny clip.pretrained= model.backbone_weights= data.workers=0 data.crop=128
data.scale_min=0.3 data.scale_max=0.4 optim.steps=1 optim.batch_size=2 optim.per_device=2
optim.log_every=1 optim.eval_every=0 align.bank=16 align.crops=2 loss.points=512
""".split()


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the two COCO photos are not here")
def test_forward_and_backward_of_r50_on_two_photos(tmp_path: Path) -> None:
    prepare_data("coco", PHOTOS, tmp_path / "out", Options("all_seen", processes=1))
    cfg = load_config(CONFIG, [f"data.root={tmp_path / 'out'}", *SMALL])
    assert cfg.model.backbone == "resnet50" and cfg.model.queries == 100
    run = Run("photos", tmp_path / "runs")
    assert train_con(cfg, run, device="cpu").finished
    (row,) = [row for row in run.stage("con").read_metrics() if "loss" in row]
    assert all(math.isfinite(row[name]) and row[name] > 0 for name in ("loss", "grad_norm"))
