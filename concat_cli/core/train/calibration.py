"""The offset on seen logits, chosen on dev and on seen classes set aside; never on val [ours]."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor

from concat_cli.core.build import Generator
from concat_cli.core.config import CatConfig, FinetuneConfig
from concat_cli.core.model.segmentor import Segmentor
from concat_cli.core.train.cat import Banks
from concat_cli.core.train.fold import harmonic
from concat_cli.core.train.union import UnionModule, UnionTask, statistics_for

REFIT_STEPS = 400
REFIT_LR = 1e-3
OFFSETS = 41  # candidates between 0 and 0.3 of the logit scale


def choose_offset(
    segmentor: Segmentor,
    generator: Generator | None,
    text: Tensor,
    fold: tuple[int, ...],
    banks: Banks,
    cat: CatConfig,
    cfg: FinetuneConfig,
) -> tuple[float, dict[str, float]]:
    """The offset with the best harmonic accuracy, and that accuracy with and without it.

    A fresh projector is fitted to real queries without the fold, then finetuned as the run's own,
    with pseudo queries of the fold if `generator` is given. The dev queries of the fold play the
    unseen classes. text (K, E): of the trained classes.
    """
    device = text.device
    projector = copy.deepcopy(segmentor.projector)
    classifier = copy.deepcopy(segmentor.classifier)
    torch.manual_seed(cfg.seed)
    for layer in projector.layers:
        layer.reset_parameters()
    nothing = torch.zeros(0, dtype=torch.int64, device=device)
    refit = replace(cfg, steps=REFIT_STEPS, lr=REFIT_LR, optimiser="adam", layers="all")
    _train(UnionModule(projector, classifier, None, text, nothing, refit), banks, fold, refit)
    new = torch.tensor(fold if generator is not None else (), dtype=torch.int64, device=device)
    statistics = statistics_for(cat.noise, banks, len(text), device)
    module = UnionModule(projector, classifier, generator, text, new, cfg, statistics)
    _train(module, banks, fold, cfg)
    return _sweep(module, text, fold, banks)


def _train(
    module: UnionModule, banks: Banks, without: tuple[int, ...], cfg: FinetuneConfig
) -> None:
    task = UnionTask(module, banks, without, cfg)
    optimiser, batches = task.optimiser(), task.batches(0)
    for step in range(cfg.steps):
        (batch,) = next(batches)
        loss = module(batch.to(module.text.device), step)["union"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


@torch.no_grad()
def _sweep(
    module: UnionModule, text: Tensor, fold: tuple[int, ...], banks: Banks
) -> tuple[float, dict[str, float]]:
    queries, classes = banks.dev.take(banks.dev.held())
    logits = module.classifier(module.projector(queries.to(text.device)), text).cpu()
    in_fold = torch.isin(classes, torch.tensor(fold))
    known = torch.ones(logits.shape[1])
    known[list(fold)] = 0
    known[-1] = 0  # no_object keeps its logit

    def score(offset: float) -> float:
        right = (logits - offset * known).argmax(-1) == classes
        parts = [float(right[p].float().mean()) if p.any() else 0.0 for p in (in_fold, ~in_fold)]
        return harmonic(*parts)

    offsets = torch.linspace(0, 0.3 * float(module.classifier.scale), OFFSETS).tolist()
    best = max(offsets, key=score)
    return best, {"calibrated": score(best), "uncalibrated": score(0.0)}
