"""What a stage would do, found without data, weights or a GPU being touched: `--dry-run`.

Each method tells its own part (`Stage.plan`) with the helpers here.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

from torch import nn

from concat_cli.core.checkpoint import read_meta
from concat_cli.core.clip import tiny
from concat_cli.core.clip.prompts import check_names
from concat_cli.core.clip.source import is_cached, library
from concat_cli.core.config import ClipConfig, Config, ModelConfig, OptimConfig
from concat_cli.core.data.dataset import read_dataset_info, training_part
from concat_cli.core.method import loaded, stage_named
from concat_cli.core.model.backbone import Backbone, published_repository
from concat_cli.core.runs import Run, StageDir
from concat_cli.core.train.session import check_world, draws_shapes
from concat_cli.core.weights_from import hub
from concat_cli.core.weights_from.files import start_backbone, start_segmentor

Plan = dict[str, str]  # what -> value, in reading order


def describe(
    stage: str,
    cfg: Config,
    run: Run,
    *,
    weights: Path | None = None,
    vocabulary: Path | None = None,
    force: bool = False,
) -> Plan:
    """Data, costs, what it starts from, outputs.

    UserError for what would stop the stage at once, except for data that is not there yet.
    """
    _, kind = stage_named(run.stage(stage).stage)
    own: Plan = loaded(kind.plan)(cfg, run, weights, vocabulary)
    return data_facts(cfg, force) | own | output_facts(run.stage(stage))


def data_facts(cfg: Config, force: bool = False) -> Plan:
    """The data set at `data.root`, or how it is made; force: as of `open_session`."""
    root = Path(cfg.data.root)
    if (root / "dataset.json").exists():
        info = read_dataset_info(root)
        check_world(cfg, info)
        check_names(info.vocabulary, cfg.clip, force)
        training_part(info)
        seen, classes = len(info.vocabulary.seen_indices), len(info.vocabulary)
        parts = ", ".join(info.parts)
        told = f"{info.name}, {seen} seen and {classes - seen} unseen classes; {parts}"
    elif draws_shapes(cfg):
        world = cfg.shapes
        told = f"would be drawn, {world.train} train, {world.dev} dev, {world.val} val"
    else:
        told = (
            f"not there; make it with `concat prepare-data coco ROOT --out {root}`, or with "
            "`custom` for data of your own"
        )
    return {"data": f"{root}: {told}"}


def training_facts(optim: OptimConfig, model: nn.Module, stage: StageDir) -> Plan:
    """Steps, and what they cost: hours where the run was measured before, memory, disk."""
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    held = sum(p.numel() for p in model.parameters())
    average = held if optim.ema else 0
    state = 4 * (held + 2 * learned + average)
    memory = 4 * (held + 3 * learned + average)
    disk = state + 4 * held * (2 if optim.eval_every else 1)
    facts = {"steps": f"{optim.steps} of {optim.batch_size} images"}
    if speed := _measured(stage):
        hours = optim.steps * optim.batch_size / speed
        facts["time"] = f"{hours:.1f} hours at {speed:.0f} images an hour, as {stage.path} ran"
    return facts | {
        "memory": f"{_size(memory)} of weights, gradients and averages, and what "
        f"{min(optim.per_device, optim.batch_size)} images take",
        "disk": f"{_size(disk)} of weights and state; {_size(_free(stage.path))} are free",
    }


def _measured(stage: StageDir) -> float | None:
    """Images an hour in the newest lines of a run's metrics, where there are any."""
    rows = [row for row in stage.read_metrics() if "seconds" in row]
    if not rows or not stage.config_yaml.exists() or not rows[-1]["seconds"]:
        return None
    from concat_cli.core.config_file import load_config

    images = rows[-1]["step"] * load_config(stage.config_yaml).optim.batch_size
    return 3600 * images / rows[-1]["seconds"]


def _free(path: Path) -> int:
    """Free bytes where a folder is, or will be."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free


def _size(count: float) -> str:
    """1_500_000 -> 1.5 MB"""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def size_facts(model: nn.Module, clip: ClipConfig) -> str:
    """How large a model is."""
    guess = "" if clip_width(clip) else " (if CLIP is 512 wide)"
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters{guess}"


def clip_width(cfg: ClipConfig) -> int | None:
    """E of the teacher by its model configuration; None where only its files tell."""
    if cfg.model in tiny.FILES:
        raw = json.loads((tiny.FOLDER / "open_clip_config.json").read_text(encoding="utf-8"))
        return raw["model_cfg"]["embed_dim"]
    found = library().get_model_config(cfg.model.replace("/", "-"))
    return None if found is None else found["embed_dim"]


def clip_facts(cfg: ClipConfig) -> Plan:
    """Which teacher, and whether it is a download."""
    name = f"{cfg.model} {cfg.pretrained}"
    if cfg.model in tiny.FILES:
        told = f"{cfg.model}, in the package"
    elif cfg.pretrained == "random":
        told = f"{cfg.model} with random weights"
    elif Path(cfg.pretrained).is_file() or cfg.model.startswith("local-dir:"):
        told = f"{name}, a file"
    elif is_cached(cfg):
        told = f"{name}, in the hub's cache"
    else:
        told = f"{name}: a download {hub.size_of(cfg.model)}"
    return {"CLIP": told}


def segmentor_facts(
    cfg: Config, segmentor: nn.Module, backbone: Backbone, stage: StageDir, kind: str = ""
) -> Plan:
    """Of a stage that trains a segmentor on images, after a warm-up if there is one."""
    facts = training_facts(cfg.optim, segmentor, stage)
    if cfg.warmup.steps:
        facts["steps"] = f"{cfg.warmup.steps} of warm-up, then {facts['steps']}"
    facts["segmentor"] = f"{kind}{size_facts(segmentor, cfg.clip)}, {cfg.model.queries} queries"
    return facts | clip_facts(cfg.clip) | start_facts(cfg.model, segmentor, backbone)


def start_facts(model: ModelConfig, built: nn.Module, backbone: Backbone) -> Plan:
    """What a built model starts from; UserError where a file does not fit it."""
    return {"starts from": _start(model, built, backbone)}


def _start(model: ModelConfig, built: nn.Module, backbone: Backbone) -> str:
    if model.init:
        if not hub.at_hand(model.init):
            size = hub.size_of(hub.located(model.init).removeprefix(hub.PREFIX))
            return f"{model.init}: a download {size}"
        return start_segmentor(built, model.init, asdict(model)).lines()[0]
    if model.backbone_weights != "timm":
        if model.backbone_weights:
            start_backbone(backbone.body, Path(model.backbone_weights), model.backbone)
        return f"{model.backbone}, {model.backbone_weights or 'random weights'}"
    repository = published_repository(model.backbone)
    if hub.cached(repository, hub.WEIGHT_FILES) is not None:
        return f"{model.backbone}: published weights ({repository}), in the hub's cache"
    size = hub.size_of(model.backbone.partition(".")[0])
    return f"{model.backbone}: published weights ({repository}), a download {size}"


def weights_facts(stage: str, run: Run, given: Path | None) -> Plan:
    """The weights of a stage before, or those given instead, or how they are made."""
    if given is None and run.stage(stage).weights is None:
        command = stage_named(stage)[1].command
        return {"weights": f"none yet; `concat {command} --name {run.name}` makes them"}
    path = given or run.weights_of(stage)
    meta = read_meta(path)
    return {"weights": f"{path}, stage {meta['stage']}, step {meta.get('step', '?')}"}


def output_facts(stage: StageDir) -> Plan:
    """The files it would write."""
    names = "config.yaml, metrics.jsonl, last.safetensors, last.state.pt"
    state = "would resume from its last save" if stage.state.exists() else "new"
    return {"would write": f"{stage.path}/ ({state}): {names}"}
