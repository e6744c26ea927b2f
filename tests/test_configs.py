"""Every shipped configuration parses, builds and tells what it would do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import timm
import torch
import yaml

from concat_cli.core.build import build_segmentor
from concat_cli.core.clip import tiny
from concat_cli.core.clip.encoder import load_clip
from concat_cli.core.config import Config, ModelConfig
from concat_cli.core.config_file import SHIPPED, dump_yaml, load_config
from concat_cli.core.errors import UserError
from concat_cli.core.method import methods
from concat_cli.core.model.backbone import STRIDES
from concat_cli.core.runs import Run
from concat_cli.core.train import plan
from concat_cli.core.train.distributed import Processes
from concat_cli.core.train.images import micro_batches
from concat_cli.methods.clip_zss.student import build_student
from concat_cli.methods.concat.generator import build_generator
from concat_cli.methods.zegformer.maskformer import build_zegformer

FOLDER = SHIPPED
FILES = sorted(FOLDER.glob("*.yaml"))
COCO = FOLDER / "concat_coco_119_14.yaml"


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


def stages_of(path: Path) -> tuple[str, ...]:
    """The stages that a configuration is for, by its name."""
    of = {method.name: tuple(stage.name for stage in method.stages) for method in methods()}
    return next((names for name, names in of.items() if name in path.stem), of["concat"])


def test_the_configurations_are_there():
    assert {"shapes", "demo", "concat_coco_119_14"} <= {path.stem for path in FILES}


def test_it_is_a_short_list_of_deltas_that_says_what_for(path):
    lines = path.read_text().splitlines()
    header = [line for line in lines if line.startswith("#")]
    assert lines[: len(header)] == header and len(header) >= 3
    text = " ".join(header)
    assert "Hardware:" in text and "result" in text and ("concat " in text or "make " in text)
    assert len(lines) - len(header) <= 30
    cfg, raw = load_config(path), yaml.safe_load(path.read_text())
    assert cfg != Config()
    written = {f"{section}.{key}" for section, keys in raw.items() for key in keys}
    assert len(written) > 3


def test_it_survives_a_round_trip(path, tmp_path):
    cfg = load_config(path)
    (tmp_path / "copy.yaml").write_text(dump_yaml(cfg))
    assert load_config(tmp_path / "copy.yaml") == cfg


def test_its_models_build(path):
    """With random weights; the width is that of its CLIP, which is not downloaded for this."""
    cfg = load_config(path)
    width = plan.clip_width(cfg.clip)
    assert width is not None
    if stages_of(path) == ("clip_zss",):
        student = build_student(cfg.sections()["clip_zss"], width).eval()
        images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
        assert student.encoder.strides == STRIDES
        assert student(images).shape == (1, width, 16, 16)
        return
    build = build_zegformer(cfg, width) if stages_of(path) == ("zegformer",) else None
    segmentor = build or build_segmentor(cfg.model, width)
    assert segmentor.backbone.strides == STRIDES
    assert segmentor.classifier.no_object.shape == (width,)
    generator = build_generator(cfg.cat, width, cfg.model.width).eval()
    text = torch.nn.functional.normalize(torch.randn(3, width), dim=-1)
    assert generator(text, generator.sample_noise(3)).shape == (3, cfg.model.width)
    with torch.inference_mode():
        images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
        out = segmentor.eval()(images, None, text, last_only=True)
    assert out.class_logits.shape == (1, 1, cfg.model.queries, 4)
    assert out.mask_logits.shape == (1, 1, cfg.model.queries, 16, 16)
    frozen = sum(not p.requires_grad for p in segmentor.parameters())
    assert bool(frozen) == cfg.model.frozen_bn


def test_its_clip_exists(path):
    """A tiny one is loaded; a real one is known by name and tag, and built without memory."""
    cfg = load_config(path).clip
    if cfg.model in tiny.FILES:
        assert load_clip(cfg, image_tower=False).embed_dim == plan.clip_width(cfg)
        return
    assert cfg.pretrained in open_clip.list_pretrained_tags_by_model(cfg.model)
    with torch.device("meta"):
        model = open_clip.create_model(cfg.model, load_weights=False, device="meta")
    assert model.text_projection.shape[1] == plan.clip_width(cfg)


def test_its_options_fit_together(path):
    cfg = load_config(path)
    size, parts = micro_batches(cfg.optim, Processes())
    assert size * parts == cfg.optim.batch_size
    assert cfg.data.crop % 32 == 0 and cfg.infer.size <= cfg.infer.max_size
    assert cfg.loss.denoising < cfg.model.queries


def test_its_dry_runs(path, tmp_path):
    for stage in stages_of(path):
        facts = plan.describe(stage, load_config(path), Run(path.stem, tmp_path))
        assert str(tmp_path / path.stem / stage) in facts["would write"]
        model = "student" if stage == "clip_zss" else "segmentor"
        later = stage in ("cat", "finetune")
        assert "steps" in facts if later else "million parameters" in facts[model]
        assert not list(tmp_path.iterdir())


def test_the_researchers_start_is_mask2former_on_coco(tmp_path):
    cfg = load_config(COCO)
    facts = plan.describe("con", cfg, Run("coco", tmp_path))
    assert "ViT-B-16-quickgelu openai" in facts["CLIP"]
    assert "published weights" in facts["starts from"]
    assert "prepare-data coco" in facts["data"]
    segmentor = build_segmentor(cfg.model, 512)
    parameters = sum(p.numel() for p in segmentor.parameters()) / 1e6
    assert 40 < parameters < 48  # Mask2Former with R-50: 44 million
    assert cfg.model.queries == 100 and len(segmentor.query_decoder.layers) == 9
    assert cfg.align.image > 0 and cfg.align.instance > 0
    trained = micro_batches(cfg.optim, Processes(0, 8))
    assert trained == (2, 1)  # the header's command: 8 processes
    assert micro_batches(replace(cfg.optim, per_device=4), Processes(0, 4)) == (4, 1)


def test_the_built_in_world_is_the_default():
    cfg = load_config(FOLDER / "shapes.yaml")
    assert cfg.clip.model == "tiny" and cfg.data.root == Config().data.root
    assert cfg.shapes.val >= 500 and cfg.shapes.unseen_seed == -1 and not cfg.shapes.unseen
    assert not cfg.finetune.calibrate or cfg.cat.fold > 0


def test_a_backbone_takes_its_weights_from_a_file(tmp_path):
    """In timm's format, the classifier left out; a wrong file is named."""
    model = timm.create_model("resnet18", pretrained=False)
    torch.save(model.state_dict(), tmp_path / "r18.pth")
    cfg = replace(
        ModelConfig(), backbone="resnet18", backbone_weights=str(tmp_path / "r18.pth"),
        width=32, mask_width=32, heads=4,
    )  # fmt: skip
    body = build_segmentor(cfg, 16, pretrained=True).backbone.body.body
    assert torch.equal(body.layer2[0].conv1.weight, model.layer2[0].conv1.weight)
    random = build_segmentor(cfg, 16).backbone.body.body  # restoring never looks for the file
    assert not torch.equal(random.layer2[0].conv1.weight, model.layer2[0].conv1.weight)
    (tmp_path / "text.pth").write_text("no weights")
    for name in ("text.pth", "missing.pth"):
        with pytest.raises(UserError, match=name):
            wrong = replace(cfg, backbone_weights=str(tmp_path / name))
            build_segmentor(wrong, 16, pretrained=True)
    with pytest.raises(UserError, match="'small' backbone has no published weights"):
        build_segmentor(ModelConfig(backbone_weights="timm"), 16, pretrained=True)


def test_every_method_has_a_reference() -> None:
    references = {method.reference for method in methods() if method.stages[0].command}
    assert references <= {path.stem for path in FILES}


def test_the_folder_at_the_top_leads_to_the_package() -> None:
    link = Path(__file__).parents[1] / "configs"
    assert link.resolve() == SHIPPED.resolve()
