"""The two real photos of COCO: prepared, then through the R-50 model of the benchmark and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from data_helpers import PHOTOS

from concat_cli.core.build import build_segmentor
from concat_cli.core.clip.encoder import load_clip
from concat_cli.core.clip.prompts import text_embeddings
from concat_cli.core.config_file import load_config
from concat_cli.core.data.dataset import PanopticDataset, read_dataset_info
from concat_cli.core.data.loader import collate
from concat_cli.core.data.transforms import resize_short
from concat_cli.core.prepare.run import Options, prepare_data
from concat_cli.core.train.teacher import Teacher, trained_indices
from concat_cli.methods.concat.con_module import ConModule

CONFIG = Path(__file__).parents[1] / "configs" / "concat_coco_119_14.yaml"
OFFLINE = """
clip.model=tiny clip.pretrained= clip.templates=single model.backbone_weights= loss.points=512
""".split()


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the two COCO photos are not here")
def test_r50_forward_and_backward_on_two_photos(tmp_path: Path) -> None:
    """The whole segmentor of the configuration on the photos, made smaller; the built-in CLIP."""
    prepare_data("coco", PHOTOS, tmp_path / "out", Options("all_seen", processes=1))
    info = read_dataset_info(tmp_path / "out")
    dataset = PanopticDataset(info.part("train"), info.vocabulary)
    batch = collate([resize_short(dataset[i], 96, 160) for i in range(2)], range(2))
    cfg = load_config(CONFIG, [f"data.root={tmp_path / 'out'}", *OFFLINE])
    clip = load_clip(cfg.clip)
    segmentor = build_segmentor(cfg.model, clip.embed_dim)
    assert cfg.model.backbone == "resnet50" and cfg.model.queries == 100
    module = ConModule(
        segmentor,
        text_embeddings(clip, info.vocabulary, cfg.clip),
        trained_indices(info.vocabulary.is_seen, torch.device("cpu")),
        cfg,
        Teacher(clip, cfg.align.crops),
    )
    losses = module(batch, 0)
    assert {"class", "mask", "dice", "align_instance", "align_image"} <= set(losses)
    assert all(loss.isfinite() for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    untouched = [name for name, p in segmentor.named_parameters() if p.grad is None]
    moved = [name for name, p in segmentor.named_parameters() if p.grad is not None]
    assert len(moved) > 300 and any(name.startswith("backbone") for name in moved), untouched
    assert all(p.grad.isfinite().all() for p in segmentor.parameters() if p.grad is not None)
