"""Makes the built-in tiny CLIP, and scores it.

    python -m benchmarks.tiny_clip.train              # about 10 minutes; `make tiny-clip`
    python -m benchmarks.tiny_clip.train --evaluate   # zero-shot top-1 on held-out scenes

It learns the whole built-in world, unseen classes included, as a web-scale CLIP has seen
everything; its scenes are no data set's scenes. Written are `weights.safetensors` and, for the
ablation's weak teacher, an early checkpoint of about 50% top-1, `weak.safetensors`.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import open_clip
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.tiny_clip.captions import Concepts, all_captions, known_words
from benchmarks.tiny_clip.views import Job, Sampler, Scenes, Views, draw_scenes, take_all
from concat_cli.core.clip import tiny
from concat_cli.core.clip.encoder import Clip, ClipIdentity, load_clip, quiet
from concat_cli.core.clip.prompts import class_texts, encode_classes
from concat_cli.core.clip.tokens import segment_tokens
from concat_cli.core.config import ClipConfig
from concat_cli.core.files import write_bytes
from concat_cli.core.prepare.shapes_scene import CLASSES, DEFAULT_UNSEEN
from concat_cli.core.progress import SILENT, Progress

T = TypeVar("T")
_MAX_SCALE = 100.0  # of the logits (CLIP paper, 2.5)
_PART = 250  # scenes that a process draws at a time


@dataclass(frozen=True)
class Recipe:
    """How the tiny CLIP is trained."""

    steps: int = 1800
    batch: int = 128
    lr: float = 2e-3
    weight_decay: float = 0.05
    warmup: int = 60
    scenes: int = 6000
    seed: int = 0
    weak_top1: float = 0.5  # the weak checkpoint is the one nearest to this
    weak_every: int = 20  # steps between looks for it
    save_every: int = 300


class Student(nn.Module):
    """The tiny CLIP while it learns: its token table holds only the captions' tokens."""

    clip: Any  # an open_clip model

    def __init__(self, seed: int) -> None:
        super().__init__()
        source = f"local-dir:{tiny.FOLDER}"
        torch.manual_seed(seed)  # pyright: ignore[reportUnknownMemberType]
        with quiet():
            self.clip = open_clip.create_model(source, load_weights=False)
        self.clip.visual.to(memory_format=torch.channels_last)  # a third faster in bf16
        self.tokenize = open_clip.get_tokenizer(source)
        captions = all_captions(Concepts.of(CLASSES))
        self.rows = torch.as_tensor(
            np.unique(self.tokenize(captions))
        )  # sorted: the end token stays the largest
        width = self.clip.token_embedding.weight.shape[1]
        self.table_rows = len(self.clip.token_embedding.weight)
        self.clip.token_embedding = nn.Embedding(len(self.rows), width)
        nn.init.normal_(self.clip.token_embedding.weight, std=0.02)

    def forward(self, crops: Tensor, texts: list[str]) -> Tensor:
        """(B, 3, s, s) crops, T texts -> (B, T) scaled cosines."""
        crops = crops.contiguous(memory_format=torch.channels_last)
        image = F.normalize(self.clip.encode_image(crops).float(), dim=-1)
        text = F.normalize(self.clip.encode_text(self._tokens(texts)).float(), dim=-1)
        return self.clip.logit_scale.exp() * image @ text.T

    def frozen(self) -> Clip:
        """A copy of it as it stands, to be scored; it reads captions only."""
        identity = ClipIdentity("tiny in training", "", "")
        return Clip(copy.deepcopy(self.clip), self._tokens, identity)

    def _tokens(self, texts: list[str]) -> Tensor:
        """Texts -> rows of the kept table."""
        return torch.searchsorted(self.rows, self.tokenize(texts))

    def save(self, path: Path) -> None:
        """Writes the weights with the full table's shape."""
        state = dict(self.clip.state_dict())
        table = tiny.unknown_rows(self.table_rows, state[tiny.TABLE].shape[1])
        table[self.rows] = state[tiny.TABLE]
        save_tiny(path, state | {tiny.TABLE: table}, self.rows, known_words(CLASSES))


def save_tiny(path: Path, state: dict[str, Tensor], rows: Tensor, words: list[str]) -> None:
    """Writes weights. `state` holds the whole token table; of it only `rows` (R,) are written."""
    packed: dict[str, Tensor] = {tiny.ROWS: rows.to(torch.int32)}
    for name, tensor in (state | {tiny.TABLE: state[tiny.TABLE][rows]}).items():
        packed |= _pack(name, tensor.detach().cpu())
    meta = {"words": json.dumps(sorted(words)), "table_rows": str(state[tiny.TABLE].shape[0])}
    write_bytes(path, save(packed, metadata=meta))


def _pack(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A matrix as int8 and the scales of its rows; anything else as it is."""
    if tensor.ndim < 2:
        return {name: tensor.contiguous()}
    flat = tensor.float().flatten(1)
    scale = flat.abs().amax(1).clamp(min=1e-12) / 127  # (rows,)
    values = (flat / scale[:, None]).round().to(torch.int8)
    return {name: values.reshape(tensor.shape).contiguous(), name + tiny.SCALE: scale}


def contrastive_loss(logits: Tensor, match: Tensor, unsure: Tensor) -> Tensor:
    """InfoNCE both ways; all true pairs share the target, unsure pairs are left out.

    logits (B, T); match (B, T) 0/1 float, at least one in each row and column; unsure (B, T) bool.
    """
    logits = logits.masked_fill(unsure, -1e4)
    losses: list[Tensor] = []
    for side, target in ((logits, match), (logits.T, match.T)):
        target = target / target.sum(1, keepdim=True)
        losses.append(-(target * side.log_softmax(1)).sum(1).mean())
    return (losses[0] + losses[1]) / 2


def train(out: Path, recipe: Recipe, progress: Progress = SILENT) -> None:
    """Trains by the recipe and writes `weights.safetensors` and `weak.safetensors` into `out`."""
    student = Student(recipe.seed)
    visual = student.clip.visual
    mean, std = visual.preprocess_cfg["mean"], visual.preprocess_cfg["std"]
    jobs = [
        Job("clip", recipe.seed, i, min(i + _PART, recipe.scenes), visual.image_size, mean, std)
        for i in range(0, recipe.scenes, _PART)
    ]
    pictures = take_all(jobs, 2, progress)
    held_out = draw_scenes("clip", recipe.seed + 1, 60)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (mean, std))
    sampler = Sampler(pictures, Concepts.of(CLASSES), mean, std, recipe.seed)
    optimiser = torch.optim.AdamW(_groups(student, recipe), lr=recipe.lr, betas=(0.9, 0.98))
    nearest, start = math.inf, time.perf_counter()
    for step in progress.track(range(recipe.steps), "training the tiny CLIP", recipe.steps):
        for group in optimiser.param_groups:
            group["lr"] = recipe.lr * _schedule(step, recipe)
        loss = _step(student, sampler.batch(recipe.batch), optimiser)
        if step % 20 == 0:
            progress.status(f"loss {loss:.3f}  {time.perf_counter() - start:.0f} s")
        if nearest > 0.02 and step and step % recipe.weak_every == 0:
            distance = abs(evaluate(student.frozen(), held_out).all - recipe.weak_top1)
            if distance < nearest:
                nearest = distance
                student.save(out / tiny.FILES["tiny-weak"].name)
        if (step + 1) % recipe.save_every == 0 or step + 1 == recipe.steps:
            student.save(out / tiny.FILES["tiny"].name)


def _step(student: Student, views: Views, optimiser: torch.optim.Optimizer) -> float:
    with torch.autocast("cpu", torch.bfloat16):
        logits = student(views.crops, views.texts)
    loss = contrastive_loss(logits.float(), views.match, views.unsure)
    optimiser.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimiser.step()
    student.clip.logit_scale.data.clamp_(0, math.log(_MAX_SCALE))
    return float(loss.detach())


def _schedule(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then half a cosine to 0."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - recipe.warmup) / (recipe.steps - recipe.warmup))


def _groups(student: Student, recipe: Recipe) -> list[dict[str, object]]:
    decayed = [p for p in student.parameters() if p.ndim > 1]
    free = [p for p in student.parameters() if p.ndim <= 1]
    return [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]


@dataclass(frozen=True)
class Top1:
    """Zero-shot top-1 among all 48 classes on masked box crops, shares in 0-1."""

    all: float
    seen: float
    unseen: float
    unseen_things: float
    segments: int


def evaluate(clip: Clip, scenes: Scenes, cfg: ClipConfig | None = None) -> Top1:
    """Names every segment of the scenes by its true mask; seen/unseen by the default split."""
    text = encode_classes(clip, class_texts(CLASSES, cfg or ClipConfig())).to(clip.device)
    right: list[np.ndarray] = []
    for part in np.array_split(np.arange(len(scenes.images)), max(1, len(scenes.images) // 64)):
        at = np.flatnonzero((scenes.scene >= part[0]) & (scenes.scene <= part[-1]))
        images = torch.as_tensor(scenes.images[part]).permute(0, 3, 1, 2)
        maps = torch.as_tensor(scenes.maps[part]).long()
        select = np.stack([scenes.scene[at] - part[0], scenes.segment[at]], 1)
        tokens = segment_tokens(clip, images, maps, torch.as_tensor(select))
        right.append((tokens @ text.T).argmax(1).cpu().numpy() == scenes.label[at])
    hit = np.concatenate(right)
    unseen = np.isin(scenes.label, [CLASSES.index_of_name[name] for name in DEFAULT_UNSEEN])
    thing = np.array(CLASSES.is_thing)[scenes.label]
    groups = (np.ones_like(hit), ~unseen, unseen, unseen & thing)
    return Top1(*(float(hit[group].mean()) for group in groups), segments=len(hit))


class _Lines:
    """Progress as plain lines on standard output."""

    def say(self, message: str) -> None:
        """A line."""
        sys.stdout.write(message + "\n")
        sys.stdout.flush()

    def track(self, items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        """A line at the start; `status` tells the rest."""
        self.say(f"{what}: {total}" if total else what)
        return iter(items)

    def status(self, text: str) -> None:
        """A line."""
        self.say(text)

    def figures(self, folder: Path, row: dict[str, object]) -> None:
        """Nothing: no stage writes any here."""


def main() -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Make or score the built-in tiny CLIP.")
    parser.add_argument("--out", type=Path, default=tiny.FOLDER, help="folder of the weights")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--scenes", type=int, default=Recipe.scenes, help="scenes to train on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--evaluate", action="store_true", help="score the shipped files only")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    progress = _Lines()
    if not args.evaluate:
        recipe = Recipe(steps=args.steps, scenes=args.scenes, seed=args.seed)
        train(args.out, recipe, progress)
    held_out = draw_scenes("clip_test", 0, 500)
    for model in tiny.FILES:
        path = args.out / tiny.FILES[model].name
        for templates in ("single", "imagenet_select"):
            cfg = ClipConfig(model=model, templates=templates)
            top1 = evaluate(load_clip(cfg, tiny_files={model: path}), held_out, cfg)
            progress.say(
                f"{model} ({path.stat().st_size / 1e6:.1f} MB), {templates}: "
                f"top-1 in % on {top1.segments} masked segments: all {100 * top1.all:.1f}, "
                f"seen {100 * top1.seen:.1f}, unseen {100 * top1.unseen:.1f}, "
                f"unseen things {100 * top1.unseen_things:.1f}"
            )


if __name__ == "__main__":
    main()
