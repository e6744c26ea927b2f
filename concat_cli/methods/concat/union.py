"""Union finetuning as a module: real queries of the bank and pseudo queries into one classifier."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from concat_cli.core.config import FinetuneConfig
from concat_cli.core.model.segmentor import Classifier, Projector
from concat_cli.methods.concat.build import Generator
from concat_cli.methods.concat.queries import (
    ClassStatistics,
    QueryBatch,
    class_statistics,
    pseudo_queries,
    query_batches,
    residuals_of,
)
from concat_cli.methods.concat.query_bank import EMPTY, IGNORED, Banks


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
        self._choose_parameters()

    def _choose_parameters(self) -> None:
        """Only the projector learns (its last layer by option), and no_object by option."""
        self.projector.requires_grad_(self.cfg.layers == "all")
        self.projector.last.requires_grad_(True)
        self.classifier.requires_grad_(False)
        self.classifier.no_object.requires_grad_(self.cfg.no_object)

    def forward(self, batch: QueryBatch, step: int) -> dict[str, Tensor]:
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
        return made.flatten(0, 1), new.repeat_interleave(cfg.pseudo_per_class)


class UnionTask:
    """A task of the loop over the query bank.

    Args:
        without: trained classes whose real queries are left out (a fold).
    """

    def __init__(
        self, module: UnionModule, banks: Banks, without: tuple[int, ...], cfg: FinetuneConfig
    ) -> None:
        self.module, self.banks, self.cfg = module, banks, cfg
        classes = torch.from_numpy(banks.train.classes.reshape(-1).astype("int64"))
        left_out = torch.isin(classes, torch.tensor(without, dtype=torch.int64))
        self.rows = torch.nonzero(~left_out & (classes != IGNORED))[:, 0].numpy()

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
            return torch.optim.SGD(groups, momentum=0.9)
        return torch.optim.Adam(self.parameter_groups())

    def describe(self, batch: QueryBatch) -> str:
        """A batch of the bank has no names."""
        return f"{len(batch.real)} queries of the bank"

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

    def preview(self, path: Path) -> None:
        """Nothing to show."""


def statistics_for(
    noise: str, banks: Banks, classes: int, device: torch.device
) -> ClassStatistics | None:
    """Statistics for noise by analogy, on the device; None for the generator's own noise."""
    if noise != "analogy":
        return None
    found = class_statistics(banks.train, classes)
    parts = (found.means, found.counts, found.mean, found.std)
    return ClassStatistics(*(part.to(device) for part in parts))
