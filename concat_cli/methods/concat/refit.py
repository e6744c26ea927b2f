"""A projector that does not know some of the trained classes: the fold, set aside [ours]."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor

from concat_cli.core.config import FinetuneConfig
from concat_cli.core.model.segmentor import Classifier, Projector, Segmentor
from concat_cli.methods.concat.query_bank import Banks
from concat_cli.methods.concat.union import UnionModule, UnionTask

STEPS = 400
LR = 1e-3


def refitted(
    segmentor: Segmentor, text: Tensor, fold: tuple[int, ...], banks: Banks, cfg: FinetuneConfig
) -> tuple[Projector, Classifier]:
    """A fresh projector fitted to real queries without the fold, and the classifier it goes with.

    text (K, E): of the trained classes; those of the fold are no candidates, so that they are not
    pushed away as negatives. The queries themselves still come from a segmentor that has trained on
    the fold.
    """
    projector = copy.deepcopy(segmentor.projector)
    classifier = copy.deepcopy(segmentor.classifier)
    torch.manual_seed(cfg.seed)
    projector.reset()
    nothing = torch.zeros(0, dtype=torch.int64, device=text.device)
    refit = replace(cfg, steps=STEPS, lr=LR, optimiser="adam", layers="all")
    module = UnionModule(projector, classifier, None, text, nothing, refit, absent=fold)
    fit_union(module, banks, fold, refit)
    return projector, classifier


def fit_union(
    module: UnionModule, banks: Banks, without: tuple[int, ...], cfg: FinetuneConfig
) -> None:
    """Union finetuning without a run folder, for what is thrown away again."""
    task = UnionTask(module, banks, without, cfg)
    optimiser, batches = task.optimiser(), task.batches(0)
    for step in range(cfg.steps):
        (batch,) = next(batches)
        loss = module(batch.to(module.text.device), step)["union"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
