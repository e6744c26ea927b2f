"""What a stage would do, found without data, weights or a GPU being touched: `--dry-run`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import open_clip
import torch
from torch import nn

from concat_cli.core.build import build_segmentor
from concat_cli.core.checkpoint import read_meta
from concat_cli.core.clip import tiny
from concat_cli.core.clip.source import is_cached
from concat_cli.core.config import ClipConfig, Config, ModelConfig
from concat_cli.core.data.dataset import read_dataset_info
from concat_cli.core.errors import UserError
from concat_cli.core.model.backbone import published_repository
from concat_cli.core.model.segmentor import Segmentor
from concat_cli.core.runs import Run
from concat_cli.core.train.session import check_world, draws_shapes
from concat_cli.core.vocabulary_file import parse_vocabulary
from concat_cli.core.weights_from import hub, start_backbone, start_segmentor
from concat_cli.methods.clip_zss.build import build_student
from concat_cli.methods.clip_zss.student import Student
from concat_cli.methods.concat.build import build_generator
from concat_cli.methods.zegformer.build import build_zegformer
from concat_cli.methods.zegformer.maskformer import MaskFormer
from concat_cli.methods.zegformer.train import check_keys

Plan = dict[str, str]


def describe(
    stage: str,
    cfg: Config,
    run: Run,
    *,
    weights: Path | None = None,
    vocabulary: Path | None = None,
) -> Plan:
    """What -> value, in reading order: data, what it starts from, sizes, downloads, outputs.

    UserError for what would stop the stage at once, except for data that is not there yet.
    """
    kind = run.stage(stage).stage
    facts = {"data": _data(cfg)}
    if kind in ("con", "zegformer"):
        facts |= _images(kind, cfg)
    elif kind == "clip_zss":
        facts |= _clip_zss(cfg)
    else:
        needed = "cat" if kind == "finetune" and cfg.finetune.pseudo else "con"
        facts["weights"] = _weights(needed, run, weights)
        facts |= _cat(cfg) if kind == "cat" else _finetune(cfg, vocabulary)
    return facts | _outputs(stage, run)


def clip_width(cfg: ClipConfig) -> int | None:
    """E of the teacher by its model configuration; None where only its files tell."""
    if cfg.model in tiny.FILES:
        raw = json.loads((tiny.FOLDER / "open_clip_config.json").read_text(encoding="utf-8"))
        return raw["model_cfg"]["embed_dim"]
    found = open_clip.get_model_config(cfg.model.replace("/", "-"))
    return None if found is None else found["embed_dim"]


def _data(cfg: Config) -> str:
    root = Path(cfg.data.root)
    if (root / "dataset.json").exists():
        info = read_dataset_info(root)
        check_world(cfg, info)
        seen, classes = len(info.vocabulary.seen_indices), len(info.vocabulary)
        parts = ", ".join(info.parts)
        return f"{root}: {info.name}, {seen} seen and {classes - seen} unseen classes; {parts}"
    if draws_shapes(cfg):
        world = cfg.shapes
        return f"{root}: would be drawn, {world.train} train, {world.dev} dev, {world.val} val"
    return f"{root}: not there; make it with `concat prepare-data coco ROOT --out {root}`"


def _images(stage: str, cfg: Config) -> Plan:
    """Of a stage that trains a segmentor on images."""
    if stage == "zegformer":
        check_keys(cfg)
    optim, model, clip = cfg.optim, cfg.model, cfg.clip
    width = clip_width(clip) or 512
    with torch.device("meta"):
        segmentor = build_segmentor(model, width) if stage == "con" else build_zegformer(cfg, width)
    queries = f"{_size(segmentor, clip)}, {model.queries} queries"
    warmup = f"{cfg.warmup.steps} of warm-up, then " if cfg.warmup.steps else ""
    return {
        "segmentor": queries if stage == "con" else f"{cfg.zegformer.segmentor}, {queries}",
        "steps": f"{warmup}{optim.steps} of {optim.batch_size} images",
        "CLIP": _clip(clip),
        "starts from": _start(model, segmentor),
    }


def _clip_zss(cfg: Config) -> Plan:
    with torch.device("meta"):
        student = build_student(cfg.clip_zss, clip_width(cfg.clip) or 512)
    parts = {
        "GLM": cfg.clip_zss.glm > 0,
        "pseudo labels": cfg.clip_zss.pseudo,
        "synthesizer": cfg.clip_zss.pseudo and cfg.clip_zss.synthesizer > 0,
    }
    start = ModelConfig(
        backbone=cfg.clip_zss.encoder, backbone_weights=cfg.clip_zss.encoder_weights
    )
    return {
        "student": f"{cfg.clip_zss.encoder}, {_size(student, cfg.clip)}",
        "parts": ", ".join(name for name, on in parts.items() if on) or "seen pixels alone",
        "steps": f"{cfg.optim.steps} of {cfg.optim.batch_size} images",
        "CLIP": _clip(cfg.clip),
        "starts from": _start(start, student),
    }


def _size(model: nn.Module, clip: ClipConfig) -> str:
    guess = "" if clip_width(clip) else " (if CLIP is 512 wide)"
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters{guess}"


def _clip(cfg: ClipConfig) -> str:
    if cfg.model in tiny.FILES:
        return f"{cfg.model}, in the package"
    if cfg.pretrained == "random":
        return f"{cfg.model} with random weights"
    if Path(cfg.pretrained).is_file() or cfg.model.startswith("local-dir:"):
        return f"{cfg.model} {cfg.pretrained}, a file"
    if is_cached(cfg):
        return f"{cfg.model} {cfg.pretrained}, in the hub's cache"
    return f"{cfg.model} {cfg.pretrained}: a download {hub.size_of(cfg.model)}"


def _start(model: ModelConfig, built: Segmentor | MaskFormer | Student) -> str:
    """What a model (on the meta device) starts from; UserError where that does not fit."""
    if model.init:
        if not hub.at_hand(model.init):
            size = hub.size_of(model.init.removeprefix(hub.PREFIX))
            return f"{model.init}: a download {size}"
        return start_segmentor(built, model.init, asdict(model)).lines()[0]
    if model.backbone_weights != "timm":
        if model.backbone_weights:
            backbone = built.encoder if isinstance(built, Student) else built.backbone
            start_backbone(backbone.body, Path(model.backbone_weights), model.backbone)
        return f"{model.backbone}, {model.backbone_weights or 'random weights'}"
    repository = published_repository(model.backbone)
    if hub.cached(repository, hub.WEIGHT_FILES) is not None:
        return f"{model.backbone}: published weights ({repository}), in the hub's cache"
    size = hub.size_of(model.backbone.partition(".")[0])
    return f"{model.backbone}: published weights ({repository}), a download {size}"


def _weights(stage: str, run: Run, given: Path | None) -> str:
    if given is None and run.stage(stage).weights is None:
        return f"none yet; `concat train-{stage} --name {run.name}` makes them"
    path = given or run.weights_of(stage)
    meta = read_meta(path)
    return f"{path}, stage {meta['stage']}, step {meta.get('step', '?')}"


def _cat(cfg: Config) -> Plan:
    with torch.device("meta"):
        generator = build_generator(cfg.cat, clip_width(cfg.clip) or 512, cfg.model.width)
    parameters = sum(p.numel() for p in generator.parameters()) / 1e6
    bank = f"{cfg.bank.images or 'all'} images, {cfg.bank.views} views of each"
    return {
        "query bank": f"{bank}; {cfg.model.queries} queries of width {cfg.model.width} each",
        "generator": f"{cfg.cat.generator}, {parameters:.1f} million parameters",
        "steps": f"{cfg.cat.steps} of {cfg.cat.batch} queries",
    }


def _finetune(cfg: Config, vocabulary: Path | None) -> Plan:
    names = "the unseen classes of the data set"
    if vocabulary is not None:
        count = len(parse_vocabulary(vocabulary))
        names = f"{count} names of {vocabulary}"
    elif cfg.protocol.mode == "inductive" and cfg.finetune.pseudo:
        raise UserError(
            "protocol.mode=inductive: no unseen name may be known before evaluation.",
            "Set finetune.pseudo=false, or teach names on purpose with --vocab.",
        )
    steps = f"{cfg.finetune.steps} of {cfg.finetune.batch} real queries"
    return {"teaches": names if cfg.finetune.pseudo else "nothing new (control)", "steps": steps}


def _outputs(stage: str, run: Run) -> Plan:
    folder = run.stage(stage)
    names = "config.yaml, metrics.jsonl, last.safetensors, last.state.pt"
    state = "would resume from its last save" if folder.state.exists() else "new"
    return {"would write": f"{folder.path}/ ({state}): {names}"}
