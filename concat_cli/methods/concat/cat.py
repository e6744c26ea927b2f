"""Stage 2: the generator of pseudo vision queries (CAT), trained on the query bank.

Seen classes set aside as pseudo-unseen, the fold, choose its number of steps without unseen
classes. The segmentor has trained on them, so what the fold says is an approximation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from concat_cli.core.build import config_of
from concat_cli.core.checkpoint import check_finished, check_stage, load_weights
from concat_cli.core.config import CatConfig, Config, OptimConfig
from concat_cli.core.device import cpu_threads
from concat_cli.core.progress import SILENT, Progress
from concat_cli.core.runs import Run, StageDir
from concat_cli.core.train.distributed import Counts
from concat_cli.core.train.loop import Fit, StageResult
from concat_cli.core.train.plan import Plan, clip_width, size_facts, weights_facts
from concat_cli.core.train.session import (
    Session,
    TextsOf,
    open_session,
    seed_torch,
    trained_names,
)
from concat_cli.methods.concat.generator import (
    Generator,
    build_generator,
    cycle_loss,
    moment_matching,
    query_contrast,
)
from concat_cli.methods.concat.on_borrowed import AnySegmentor, kept_facts, restore
from concat_cli.methods.concat.query_bank import (
    Banks,
    BankTask,
    ClassStatistics,
    QueryBank,
    QueryBatch,
    class_statistics,
    open_banks,
    pseudo_queries,
    query_batches,
)

SAMPLES = 64  # pseudo queries behind a pseudo mean


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
        segmentor: AnySegmentor,
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

    @property
    def segmentor(self) -> AnySegmentor:
        """The frozen one."""
        return self._segmentor[0]

    def forward(self, batch: QueryBatch, counts: Counts | None = None) -> dict[str, Tensor]:
        """Weighted losses by name; one pseudo query is made for every real one, of its class."""
        cfg, segmentor = self.cfg, self.segmentor
        noise = self.generator.sample_noise(len(batch.classes))
        made = self.generator(self.text[batch.classes], noise)
        losses: dict[str, Tensor] = {}
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


class GeneratorTask(BankTask):
    """A task of the loop over the query bank.

    fold: classes that pseudo queries are judged on. without: classes left out of training.
    """

    def __init__(
        self, module: GeneratorModule, banks: Banks, fold: tuple[int, ...], without: tuple[int, ...]
    ) -> None:
        super().__init__(banks)
        self.module, self.fold, self.cfg = module, fold, module.cfg
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

    def weights(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The frozen segmentor and the generator: one file is enough for what follows."""
        frozen = {f"segmentor.{k}": v for k, v in self.module.segmentor.state_dict().items()}
        return frozen | {k: v for k, v in state.items() if k.startswith("generator.")}

    def score(self, step: int) -> dict[str, float]:
        """How well pseudo queries of the fold stand for the real ones of dev."""
        if not self.fold:
            return {}
        queries, classes = self.banks.dev.take(self.banks.dev.held())
        return fold_figures(
            self.module.generator, self.module.text, self.fold, self.real, queries, classes
        )


def train_cat(
    cfg: Config,
    run: Run,
    *,
    weights: Path | None = None,
    device: str = "auto",
    fresh: bool = False,
    force: bool = False,
    progress: Progress = SILENT,
) -> StageResult:
    """Trains stage 2 of a run, or resumes it; its weights are in `runs/<name>/cat/`."""
    source = load_weights(weights or run.weights_of("con"))
    check_stage(source, "con")
    unfinished = check_finished(source, force)
    if unfinished:
        progress.say(unfinished)
    cfg = replace(cfg, model=config_of(source).model)
    session = open_session(cfg, device, progress, force)
    texts = TextsOf(source, session)
    stage = session.open_stage(run.stage("cat"), fresh=fresh, inputs={"weights": source.sha256})
    segmentor = session.place(restore(source))
    seen = session.info.vocabulary.seen_only()
    text = texts.embed(seen)
    banks = open_banks(session, run, source, segmentor, text)
    meta = session.meta(
        "cat",
        texts.identity,
        trained=trained_names(source, session.info.vocabulary),
        **kept_facts(source),
    )
    fitter = _Fitter(replace(session, dtype=None), meta, segmentor, text, banks)
    fold = choose_fold(banks.train, len(text), cfg.cat.fold, cfg.cat.seed)
    steps, figures = cfg.cat.steps, dict[str, float]()
    if fold and cfg.cat.steps:
        names = ", ".join(seen.names[c] for c in fold)
        progress.say(f"choosing the number of steps on seen classes set aside: {names}")
        inner = stage.inner("fold")
        chosen = fitter.fit(inner, steps, fold, without=fold)
        if not chosen.finished:
            return replace(chosen, weights=stage.last, steps=0)
        steps, figures = _best_step(inner)
        progress.say(f"best after {steps} steps ({figures['score']:.3f}); training on all classes")
    return replace(fitter.fit(stage, steps, fold), figures=figures)


@dataclass(frozen=True)
class _Fitter:
    """Trains a generator, with the fold or without it."""

    session: Session
    meta: dict[str, Any]
    segmentor: AnySegmentor
    text: Tensor
    banks: Banks

    def fit(
        self, stage: StageDir, steps: int, fold: tuple[int, ...], without: tuple[int, ...] = ()
    ) -> StageResult:
        cfg = self.session.cfg
        seed_torch(cfg.cat.seed)
        generator = build_generator(cfg.cat, self.text.shape[1], cfg.model.width)
        generator.to(self.session.device)
        module = GeneratorModule(generator, self.segmentor, self.text, cfg.cat, without)
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
        task = GeneratorTask(module, self.banks, fold, without)
        with cpu_threads():
            return Fit(task, optim, stage, self.session, self.meta).run()


def _best_step(stage: StageDir) -> tuple[int, dict[str, float]]:
    """The step with the best score on the fold, and its figures."""
    scored = [row for row in stage.read_metrics() if "dev" in row]
    best = int(np.argmax([row["dev"]["score"] for row in scored]))
    return scored[best]["step"], scored[best]["dev"]


def choose_fold(bank: QueryBank, classes: int, size: int, seed: int) -> tuple[int, ...]:
    """Indices of `size` trained classes that the bank holds; never more than half of them."""
    held = bank.classes.ravel()
    present = [c for c in range(classes) if np.count_nonzero(held == c) >= 2]
    rng = np.random.Generator(np.random.PCG64([seed, classes]))
    return tuple(sorted(rng.permutation(present)[: min(size, len(present) // 2)].tolist()))


def harmonic(a: float, b: float) -> float:
    """2ab / (a + b), 0 where both are 0."""
    return 2 * a * b / (a + b) if a + b > 0 else 0.0


@torch.no_grad()
def fold_figures(
    generator: Generator,
    text: Tensor,
    fold: tuple[int, ...],
    real: ClassStatistics,
    queries: Tensor,
    classes: Tensor,
) -> dict[str, float]:
    """How well pseudo queries of the fold stand for real ones.

    text (K, E) of the trained classes; real: statistics of train queries, fold included; queries
    (N, D) with classes (N,): of dev. Real queries of dev are given the class of the nearest mean
    (cosine around the common mean), pseudo means for the fold and real ones for the rest: accuracy
    on the fold, on the rest, and `score`, their harmonic mean. `distance`: of pseudo to real means
    of the fold, in units of the mean distance between real means. `nearest`: share of pseudo means
    whose nearest real mean is that of their own class. `spread`: of pseudo to real queries.
    """
    device = text.device
    source = torch.Generator(device="cpu").manual_seed(0)
    chosen = torch.tensor(fold, device=device)
    made = pseudo_queries(generator, text[chosen], SAMPLES, source=source)  # (F, S, D)
    centre, means = real.mean.to(device), real.means.to(device)
    mixed = means.clone()
    mixed[chosen] = made.mean(1)
    there = real.counts.to(device) > 0
    similarity = _cosine(queries.to(device) - centre, mixed - centre)
    found = similarity.masked_fill(~there, -2.0).argmax(-1)
    right = found == classes.to(device)
    in_fold = torch.isin(classes.to(device), chosen)
    on_fold, on_rest = (_mean(right[part]) for part in (in_fold, ~in_fold))
    own = _cosine(made.mean(1) - centre, means - centre).masked_fill(~there, -2.0)
    gaps = torch.cdist(means[there], means[there])
    apart = gaps.sum() / max(1, gaps.numel() - len(gaps))
    far = cast(Any, made.mean(1) - means[chosen]).norm(dim=-1)
    spread = (made - made.mean(1, keepdim=True)).square().mean().sqrt()
    return {
        "score": harmonic(on_fold, on_rest),
        "fold_accuracy": on_fold,
        "rest_accuracy": on_rest,
        "distance": float(far.mean() / apart.clamp(1e-6)),
        "nearest": _mean(own.argmax(-1) == chosen),
        "spread": float(spread / real.std.to(device).square().mean().sqrt()),
    }


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T


def _mean(hits: Tensor) -> float:
    return float(hits.float().mean()) if hits.numel() else 0.0


def plan(cfg: Config, run: Run, weights: Path | None, vocabulary: Path | None) -> Plan:
    """Of the generator, and of the query bank before it."""
    with torch.device("meta"):
        generator = build_generator(cfg.cat, clip_width(cfg.clip) or 512, cfg.model.width)
    bank = f"{cfg.bank.images or 'all'} images, {cfg.bank.views} views of each"
    each = 2 * cfg.model.queries * cfg.model.width / 1e3
    return weights_facts("con", run, weights) | {
        "steps": f"{cfg.cat.steps} of {cfg.cat.batch} queries",
        "query bank": f"{bank}; {cfg.model.queries} queries of width {cfg.model.width} each, "
        f"{each:.0f} kB a view",
        "generator": size_facts(generator, cfg.clip),
    }
