"""Stage 2: the generator of pseudo vision queries (CAT), trained on the query bank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from concat_cli.core.build import config_of, restore_segmentor
from concat_cli.core.checkpoint import Weights, check_clip, check_stage, load_weights
from concat_cli.core.clip.encoder import Clip
from concat_cli.core.config import CatConfig, Config, OptimConfig
from concat_cli.core.data.dataset import PanopticDataset
from concat_cli.core.device import one_thread
from concat_cli.core.model.segmentor import Segmentor
from concat_cli.core.progress import SILENT, Progress
from concat_cli.core.runs import Run, StageDir
from concat_cli.core.train.distributed import wait
from concat_cli.core.train.loop import Fit, StageResult
from concat_cli.core.train.session import (
    Session,
    embed,
    open_session,
    text_clip,
    trained_names,
)
from concat_cli.core.train.targets import trained_indices
from concat_cli.methods.concat.build import Generator, build_generator
from concat_cli.methods.concat.cycle import cycle_loss, moment_matching, query_contrast
from concat_cli.methods.concat.fold import choose_fold, fold_figures
from concat_cli.methods.concat.queries import QueryBatch, class_statistics, query_batches
from concat_cli.methods.concat.query_bank import Banks, QueryBank, check_bank, open_bank


class GeneratorModule(nn.Module):
    """The generator with CAT's losses.

    Args:
        text: (K, E) of the trained classes. segmentor: frozen; its projector closes the cycle.
        without: classes that are no candidates of the cycle; no batch may hold them.
    """

    text: Tensor
    kept: Tensor
    place: Tensor

    def __init__(
        self,
        generator: Generator,
        segmentor: Segmentor,
        text: Tensor,
        cfg: CatConfig,
        without: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.generator, self.cfg = generator, cfg
        self.register_buffer("text", text, persistent=False)
        kept = torch.ones(len(text), dtype=torch.bool, device=text.device)
        kept[list(without)] = False
        self.register_buffer("kept", kept, persistent=False)
        self.register_buffer("place", kept.cumsum(0) - 1, persistent=False)  # among the kept
        self._segmentor = (segmentor.requires_grad_(False).eval(),)  # no part of the state

    def forward(self, batch: QueryBatch, step: int) -> dict[str, Tensor]:
        """Weighted losses by name; one pseudo query is made for every real one, of its class."""
        cfg, (segmentor,) = self.cfg, self._segmentor
        noise = self.generator.sample_noise(len(batch.classes))
        made = self.generator(self.text[batch.classes], noise)
        losses = {}
        if cfg.matching:
            losses["matching"] = cfg.matching * moment_matching(made, batch.real, cfg.bandwidths)
        if cfg.contrast:
            losses["contrast"] = cfg.contrast * query_contrast(
                made, batch.classes, batch.real, batch.classes, batch.empty, cfg.temperature
            )
        if cfg.cycle:
            scale = segmentor.classifier.scale
            losses["cycle"] = cfg.cycle * cycle_loss(
                segmentor.projector(made), self.text[self.kept], self.place[batch.classes], scale
            )
        return losses


class GeneratorTask:
    """A task of the loop over the query bank; classes in `without` are left out of training."""

    def __init__(
        self,
        module: GeneratorModule,
        banks: Banks,
        fold: tuple[int, ...],
        without: tuple[int, ...],
        cfg: CatConfig,
    ) -> None:
        self.module, self.banks, self.fold, self.cfg = module, banks, fold, cfg
        classes = len(module.text)
        self.rows = banks.train.held(without)
        self.real = class_statistics(banks.train, classes)
        learned = class_statistics(banks.train, classes, without)
        module.generator.set_statistics(learned.mean.to(module.text), learned.std.to(module.text))

    def batches(self, start: int) -> Iterator[list[QueryBatch]]:
        """Real queries with a segment, and empty ones."""
        cfg = self.cfg
        return query_batches(self.banks.train, self.rows, cfg.batch, cfg.negatives, cfg.seed, start)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """All of the generator, without weight decay [PADing]."""
        return [{"params": list(self.module.parameters()), "lr": self.cfg.lr, "weight_decay": 0.0}]

    def describe(self, batch: QueryBatch) -> str:
        """A batch of the bank has no names."""
        return f"{len(batch.real)} queries of the bank"

    def weights(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The frozen segmentor and the generator: one file is enough for what follows."""
        (segmentor,) = self.module._segmentor
        frozen = {f"segmentor.{k}": v for k, v in segmentor.state_dict().items()}
        return frozen | {k: v for k, v in state.items() if k.startswith("generator.")}

    def score(self, step: int) -> dict[str, float]:
        """How well pseudo queries of the fold stand for the real ones of dev."""
        if not self.fold:
            return {}
        queries, classes = self.banks.dev.take(self.banks.dev.held())
        return fold_figures(
            self.module.generator, self.module.text, self.fold, self.real, queries, classes
        )

    def preview(self, path: Path) -> None:
        """Nothing to show."""


def open_banks(
    session: Session, run: Run, weights: Weights, segmentor: Segmentor, text: Tensor
) -> Banks:
    """Opens the banks under `runs/<name>/bank/`, writing what is not there."""
    cfg, info = session.cfg, session.info
    to_trained = trained_indices(info.vocabulary.is_seen, session.device)

    def bank(part: str, augmented: bool) -> QueryBank:
        writes = session.processes.is_main
        if not writes:
            wait()  # until the first process has written it
        found = open_bank(
            run.path / "bank" / part,
            segmentor,
            text,
            to_trained,
            PanopticDataset(info.part(part), info.vocabulary),
            cfg,
            str(weights.meta.get("segmentor", weights.sha256)),
            augmented=augmented,
            writes=writes,
            dtype=session.dtype,
            progress=session.progress,
        )
        if writes:
            wait()
        return found

    train = bank("train", augmented=True)
    check_bank(train, cfg.bank)
    return Banks(train, bank("dev", augmented=False) if "dev" in info.parts else train)


def train_cat(
    cfg: Config,
    run: Run,
    *,
    weights: Path | None = None,
    device: str = "auto",
    fresh: bool = False,
    progress: Progress = SILENT,
) -> StageResult:
    """Trains stage 2 of a run, or resumes it; its weights are in `runs/<name>/cat/`."""
    source = load_weights(weights or run.weights_of("con"))
    check_stage(source, "con")
    cfg = replace(cfg, model=config_of(source).model)
    session = open_session(cfg, device, progress)
    clip = text_clip(cfg, session.device)
    check_clip(source, clip.identity)
    stage = session.open_stage(run.stage("cat"), fresh=fresh, inputs={"weights": source.sha256})
    segmentor = session.place(restore_segmentor(source))
    text = embed(clip, session.info.vocabulary.seen_only(), cfg, session.device)
    banks = open_banks(session, run, source, segmentor, text)
    fold = choose_fold(banks.train, len(text), cfg.cat.fold, cfg.cat.seed)
    steps, figures = cfg.cat.steps, dict[str, float]()
    if fold and cfg.cat.steps:
        names = ", ".join(session.info.vocabulary.seen_only().names[c] for c in fold)
        progress.say(f"choosing the number of steps on seen classes set aside: {names}")
        inner = stage.inner("fold")
        chosen = _fit(session, clip, source, segmentor, text, banks, fold, fold, steps, inner)
        if not chosen.finished:
            return replace(chosen, weights=stage.last, steps=0)
        steps, figures = _best_step(inner)
        progress.say(f"best after {steps} steps ({figures['score']:.3f}); training on all classes")
    result = _fit(session, clip, source, segmentor, text, banks, (), fold, steps, stage)
    return replace(result, figures=figures)


def _fit(
    session: Session,
    clip: Clip,
    source: Weights,
    segmentor: Segmentor,
    text: Tensor,
    banks: Banks,
    without: tuple[int, ...],
    fold: tuple[int, ...],
    steps: int,
    stage: StageDir,
) -> StageResult:
    cfg = session.cfg
    torch.manual_seed(cfg.cat.seed)
    generator = build_generator(cfg.cat, text.shape[1], cfg.model.width).to(session.device)
    module = GeneratorModule(generator, segmentor, text, cfg.cat, without)
    task = GeneratorTask(module, banks, fold, without, cfg.cat)
    optim = OptimConfig(
        steps=steps,
        lr=cfg.cat.lr,
        weight_decay=0.0,
        clip_norm=float("inf"),
        warmup=0,
        schedule="constant",  # a step means the same with and without the fold
        eval_every=cfg.cat.eval_every if without else 0,
        save_every=max(1, cfg.cat.eval_every),
        seed=cfg.cat.seed,
    )
    facts = session.meta(
        "cat",
        clip,
        trained=trained_names(source, session.info.vocabulary),
        segmentor=source.meta.get("segmentor", source.sha256),
    )
    fit = Fit(
        task,
        optim,
        stage,
        device=session.device,
        dtype=None,
        meta=facts,
        progress=session.progress,
        processes=session.processes,
    )
    with one_thread():
        return fit.run()


def _best_step(stage: StageDir) -> tuple[int, dict[str, float]]:
    """The step with the best score on the fold, and its figures."""
    scored = [row for row in stage.read_metrics() if "dev" in row]
    best = int(np.argmax([row["dev"]["score"] for row in scored]))
    return scored[best]["step"], scored[best]["dev"]
