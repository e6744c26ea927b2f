"""Union finetuning: real queries of the bank and pseudo queries into one classifier.

And what is chosen with it on dev and on seen classes set aside, never on val: the offset on seen
logits [ours].
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from concat_cli.core.config import CatConfig, FinetuneConfig
from concat_cli.core.model.segmentor import Classifier, Projector
from concat_cli.core.train.distributed import Counts
from concat_cli.core.train.optimisers import eager
from concat_cli.core.train.session import seed_torch
from concat_cli.methods.concat.cat import harmonic
from concat_cli.methods.concat.generator import Generator
from concat_cli.methods.concat.latent_bank import Evidence
from concat_cli.methods.concat.on_borrowed import AnySegmentor
from concat_cli.methods.concat.query_bank import (
    EMPTY,
    IGNORED,
    Banks,
    BankTask,
    ClassStatistics,
    QueryBatch,
    class_statistics,
    pseudo_queries,
    query_batches,
    residuals_of,
)

STEPS, LR = 400, 1e-3  # of a projector that does not know the fold
OFFSETS = 41  # candidates between 0 and 0.3 of the logit scale; the fold, whose queries have been
# trained, cannot tell that unseen classes are named too often, so none is below 0


class UnionModule(nn.Module):
    """Projector and classifier with the weighted cross-entropy over trained, new and no_object.

    Args:
        text: (K, E) of the candidates, the trained classes first.
        new: (U,) indices into `text` of the classes that get pseudo queries; may be empty.
        statistics: of real queries, for noise by analogy (None: the generator's own noise).
        absent: indices into `text` that are no candidates of the loss; no query may be of them.
    """

    text: Tensor
    new: Tensor
    weight: Tensor
    absent: Tensor

    def __init__(
        self,
        projector: Projector,
        classifier: Classifier,
        generator: Generator | None,
        text: Tensor,
        new: Tensor,
        cfg: FinetuneConfig,
        statistics: ClassStatistics | None = None,
        absent: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        assert generator is not None or len(new) == 0
        self.projector, self.classifier, self.cfg = projector, classifier, cfg
        self.register_buffer("text", text, persistent=False)
        self.register_buffer("new", new, persistent=False)
        weight = torch.ones(len(text) + 1, device=text.device)
        weight[new] = cfg.unseen_weight
        weight[-1] = cfg.no_object_weight
        self.register_buffer("weight", weight, persistent=False)
        gone = torch.zeros(len(text) + 1, dtype=torch.bool, device=text.device)
        gone[list(absent)] = True
        self.register_buffer("absent", gone, persistent=False)
        frozen = None if generator is None else generator.requires_grad_(False).eval()
        self._generator, self._statistics = (frozen,), statistics
        self._evidence: tuple[Evidence | None] = (None,)
        self._choose_parameters()

    def learn_from(self, evidence: Evidence) -> None:
        """Takes part of the pseudo queries from latent segments."""
        self._evidence = (evidence,)

    def _choose_parameters(self) -> None:
        """Only the projector learns (its last layer by option), and no_object by option."""
        self.projector.requires_grad_(self.cfg.layers == "all")
        self.projector.last.requires_grad_(True)
        self.classifier.requires_grad_(False)
        self.classifier.no_object.requires_grad_(self.cfg.no_object)

    def forward(self, batch: QueryBatch, counts: Counts | None = None) -> dict[str, Tensor]:
        """The loss of real and pseudo queries together."""
        no_object = len(self.text)
        classes = batch.classes.masked_fill(batch.classes == EMPTY, no_object)
        queries = batch.real
        if len(self.new):
            made, of = self._pseudo(batch)
            queries, classes = torch.cat((queries, made)), torch.cat((classes, of))
        logits = self.classifier(self.projector(queries), self.text)
        logits = logits.masked_fill(self.absent, -torch.inf)
        return {"union": F.cross_entropy(logits, classes, self.weight)}

    @torch.no_grad()
    def _pseudo(self, batch: QueryBatch) -> tuple[Tensor, Tensor]:
        """Pseudo queries (N, D) of the new classes, or of some of them drawn at random."""
        (generator,), cfg = self._generator, self.cfg
        assert generator is not None
        new = self.new
        if 0 < cfg.unseen_per_step < len(new):
            new = new[torch.randperm(len(new), device=new.device)[: cfg.unseen_per_step]]
        residuals = None
        if self._statistics is not None:
            residuals = residuals_of(batch.real, batch.classes, self._statistics)
        made = pseudo_queries(generator, self.text[new], cfg.pseudo_per_class, residuals)
        made, of = made.flatten(0, 1), new.repeat_interleave(cfg.pseudo_per_class)
        (evidence,) = self._evidence
        return made if evidence is None else evidence.mixed(made, of), of


class UnionTask(BankTask):
    """A task of the loop over the query bank.

    Args:
        without: trained classes whose real queries are left out (a fold).
    """

    def __init__(
        self, module: UnionModule, banks: Banks, without: tuple[int, ...], cfg: FinetuneConfig
    ) -> None:
        super().__init__(banks)
        self.module, self.cfg = module, cfg
        classes = banks.train.classes.ravel()
        self.rows = np.flatnonzero(~np.isin(classes, without) & (classes != IGNORED))

    def batches(self, start: int) -> Iterator[list[QueryBatch]]:
        """Real queries in the bank's own proportion of segments to none."""
        return query_batches(self.banks.train, self.rows, self.cfg.batch, 0, self.cfg.seed, start)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What learns, without weight decay for Adam."""
        learning = [p for p in self.module.parameters() if p.requires_grad]
        return [{"params": learning, "lr": self.cfg.lr, "weight_decay": 0.0}]

    def optimiser(self) -> torch.optim.Optimizer:
        """SGD as PADing has it, or Adam."""
        if self.cfg.optimiser == "sgd":
            groups = [group | {"weight_decay": 5e-4} for group in self.parameter_groups()]
            return eager(torch.optim.SGD)(groups, momentum=0.9)
        return eager(torch.optim.Adam)(self.parameter_groups())

    def weights(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The finetuned parts, by their names in the segmentor."""
        return {f"segmentor.{key}": value for key, value in state.items()}

    def score(self, step: int) -> dict[str, float]:
        """Accuracy on the dev queries that hold a segment, among all candidates."""
        queries, classes = self.banks.dev.take(self.banks.dev.held())
        device = self.module.text.device
        logits = self.module.classifier(self.module.projector(queries.to(device)), self.module.text)
        right = logits[:, :-1].argmax(-1).cpu() == classes
        accuracy = float(right.float().mean())
        return {"score": accuracy, "dev_accuracy": accuracy}


def statistics_for(
    noise: str, banks: Banks, classes: int, device: torch.device
) -> ClassStatistics | None:
    """Statistics for noise by analogy, on the device; None for the generator's own noise."""
    if noise != "analogy":
        return None
    found = class_statistics(banks.train, classes)
    parts = (found.means, found.counts, found.mean, found.std)
    return ClassStatistics(*(part.to(device) for part in parts))


def refitted(
    segmentor: AnySegmentor, text: Tensor, fold: tuple[int, ...], banks: Banks, cfg: FinetuneConfig
) -> tuple[Projector, Classifier]:
    """A fresh projector fitted to real queries without the fold, and the classifier it goes with.

    text (K, E): of the trained classes; those of the fold are no candidates, so that they are not
    pushed away as negatives. The queries themselves still come from a segmentor that has trained on
    the fold.
    """
    projector = copy.deepcopy(segmentor.projector)
    classifier = copy.deepcopy(segmentor.classifier)
    seed_torch(cfg.seed)
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
    for _ in range(cfg.steps):
        (batch,) = next(batches)
        loss = module(batch.to(module.text.device))["union"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def choose_offset(
    segmentor: AnySegmentor,
    generator: Generator | None,
    text: Tensor,
    fold: tuple[int, ...],
    banks: Banks,
    cat: CatConfig,
    cfg: FinetuneConfig,
) -> tuple[float, dict[str, float]]:
    """The offset with the best harmonic RQ, and that RQ with and without it.

    RQ as in PQ: accuracy alone would not see that each seen segment that is named unseen is a false
    alarm of a class that is rare.

    A fresh projector is fitted to real queries without the fold, then finetuned as the run's own,
    with pseudo queries of the fold if `generator` is given. The dev queries of the fold play the
    unseen classes. Without pseudo queries of them, the fold's texts are candidates only when the
    dev queries are classified. text (K, E): of the trained classes.
    """
    device = text.device
    projector, classifier = refitted(segmentor, text, fold, banks, cfg)
    new = torch.tensor(fold if generator is not None else (), dtype=torch.int64, device=device)
    statistics = statistics_for(cat.noise, banks, len(text), device)
    absent = fold if generator is None else ()
    module = UnionModule(projector, classifier, generator, text, new, cfg, statistics, absent)
    fit_union(module, banks, fold, cfg)
    return _sweep(module, text, fold, banks)


@torch.no_grad()
def _sweep(
    module: UnionModule, text: Tensor, fold: tuple[int, ...], banks: Banks
) -> tuple[float, dict[str, float]]:
    queries, classes = banks.dev.take(banks.dev.held())
    logits = module.classifier(module.projector(queries.to(text.device)), text).cpu()
    in_fold = torch.zeros(len(text), dtype=torch.bool)
    in_fold[list(fold)] = True
    known = torch.ones(logits.shape[1])
    known[list(fold)] = 0
    known[-1] = 0  # no_object keeps its logit

    def score(offset: float) -> float:
        quality, occurs = recognition((logits - offset * known).argmax(-1), classes, len(text))
        parts = [quality[p & occurs] for p in (in_fold, ~in_fold)]
        return harmonic(*(float(part.mean()) if len(part) else 0.0 for part in parts))

    scale = float(module.classifier.scale)
    offsets = [float(offset) for offset in torch.linspace(0, 0.3 * scale, OFFSETS)]
    best = max(offsets, key=score)
    return best, {"calibrated": score(best), "uncalibrated": score(0.0)}


def recognition(named: Tensor, classes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """RQ = TP / (TP + FP / 2 + FN / 2) of each class over queries, and which of them occur.

    named (N,), `count` standing for no_object; classes (N,) the truth -> (count,) twice.
    """
    right = named == classes
    tp = torch.bincount(classes[right], minlength=count)
    fn = torch.bincount(classes[~right], minlength=count)
    fp = torch.bincount(named[~right], minlength=count + 1)[:count]
    total = tp + 0.5 * fp + 0.5 * fn
    return tp / total.clamp(min=0.5), total > 0
