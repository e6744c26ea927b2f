"""Batches of queries, the fold, calibration and union finetuning on planted banks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mini import alone, mini_config, planted_bank
from torch import Tensor, nn

from concat_cli.core.checkpoint import load_weights
from concat_cli.core.config import CatConfig, FinetuneConfig, OptimConfig
from concat_cli.core.errors import UserError
from concat_cli.core.model.segmentor import Classifier, Projector
from concat_cli.core.runs import StageDir
from concat_cli.core.train.loop import Fit
from concat_cli.methods.concat.cat import (
    Banks,
    GeneratorModule,
    GeneratorTask,
    choose_fold,
    fold_figures,
    harmonic,
)
from concat_cli.methods.concat.generator import build_generator, cycle_loss
from concat_cli.methods.concat.query_bank import (
    EMPTY,
    IGNORED,
    QueryBank,
    check_bank,
    class_statistics,
    pseudo_queries,
    query_batches,
    residuals_of,
)
from concat_cli.methods.concat.union import (
    UnionModule,
    UnionTask,
    _sweep,
    choose_offset,
    recognition,
    refitted,
    statistics_for,
)

CPU = torch.device("cpu")
META = {
    "format": 1, "stage": "con", "config": {}, "vocabulary": [], "trained": [],
    "clip": {"model": "", "pretrained": "", "sha256": ""},
}  # fmt: skip


def test_batches_of_queries_depend_on_the_step_alone():
    bank = planted_bank()
    stream = query_batches(bank, bank.held((0,)), 12, 5, seed=3, start=0)
    first = [next(stream)[0] for _ in range(4)]
    later = next(query_batches(bank, bank.held((0,)), 12, 5, seed=3, start=3))[0]
    assert torch.equal(first[3].real, later.real) and torch.equal(first[3].empty, later.empty)
    assert not torch.equal(first[0].real, first[1].real)
    for batch in first:
        assert batch.real.shape == (12, 8) and batch.empty.shape == (5, 8)
        assert (batch.classes > 0).all()
    flat = bank.queries.reshape(-1, 8)
    empty = {tuple(row) for row in flat[bank.classes.reshape(-1) == EMPTY].tolist()}
    assert all(tuple(row) in empty for row in first[0].empty.tolist())
    assert (bank.classes == IGNORED).any()
    assert next(query_batches(bank, bank.held(), 4, 0, 0, 0))[0].empty.shape == (0, 8)


def test_class_statistics():
    bank = planted_bank()
    found = class_statistics(bank, 6, without=(2,))
    queries, classes = bank.queries.reshape(-1, 8).astype(np.float64), bank.classes.reshape(-1)
    kept = (classes >= 0) & (classes != 2)
    for c in range(6):
        rows = queries[(classes == c) & kept]
        assert found.counts[c] == len(rows)
        expected = rows.mean(0) if len(rows) else np.zeros(8)
        np.testing.assert_allclose(found.means[c], expected, atol=1e-3)
    np.testing.assert_allclose(found.mean, queries[kept].mean(0), atol=1e-3)
    np.testing.assert_allclose(found.std, queries[kept].std(0, ddof=1), rtol=1e-3)


def test_a_bank_with_nothing_to_learn_from():
    bank = planted_bank()
    check_bank(bank, mini_config(Path("x")).bank)
    nothing = QueryBank(bank.queries, np.full_like(bank.classes, EMPTY))
    with pytest.raises(UserError, match="0 queries with a segment"):
        check_bank(nothing, mini_config(Path("x")).bank)


SMALL = CatConfig(layers=1, primitives=4, heads=2, ffn=8, batch=24, negatives=6)


def generator() -> nn.Module:
    torch.manual_seed(0)
    return build_generator(SMALL, 5, 8).eval()


def test_pseudo_queries():
    made_by = generator()
    text = F.normalize(torch.randn(3, 5), dim=-1)
    source = torch.Generator().manual_seed(1)
    made = pseudo_queries(made_by, text, 7, source=source)
    again = pseudo_queries(made_by, text, 7, source=torch.Generator().manual_seed(1))
    assert made.shape == (3, 7, 8) and torch.equal(made, again)
    assert (made[:, 0] - made[:, 1]).abs().max() > 0
    residuals = torch.randn(4, 8)
    found = pseudo_queries(made_by, text, 7, residuals, torch.Generator().manual_seed(1))
    for c, n in np.ndindex(3, 7):  # by analogy: the class's mean plus a real residual
        gaps = (found[c, n] - made[c].mean(0) - residuals).abs().max(-1).values
        assert gaps.min() < 1e-5


def test_residuals_leave_the_class_means():
    bank = planted_bank()
    statistics = statistics_for("analogy", Banks(bank, bank), 6, CPU)
    assert statistics is not None and statistics_for("gaussian", Banks(bank, bank), 6, CPU) is None
    queries, classes = bank.take(np.arange(bank.classes.size))
    found = residuals_of(queries, classes, statistics)
    assert len(found) == (classes >= 0).sum()
    assert found.mean(0).abs().max() < 1e-3 and found.std() < 0.35


def test_the_fold():
    bank = planted_bank(classes=12, images=30)
    fold = choose_fold(bank, 12, 4, seed=0)
    assert len(fold) == 4 and list(fold) == sorted(set(fold)) and set(fold) <= set(range(12))
    assert fold == choose_fold(bank, 12, 4, seed=0) != choose_fold(bank, 12, 4, seed=1)
    assert len(choose_fold(bank, 12, 99, seed=0)) == 6  # never more than half
    assert choose_fold(bank, 12, 0, seed=0) == ()
    only = QueryBank(bank.queries, np.where(bank.classes < 3, bank.classes, EMPTY))
    assert set(choose_fold(only, 12, 9, seed=0)) < {0, 1, 2}  # what the bank does not hold is out
    assert harmonic(0.0, 0.0) == 0 and harmonic(0.5, 1.0) == pytest.approx(2 / 3)


class Perfect(nn.Module):
    """Makes the true class means, moved by `off`, with a little spread."""

    def __init__(self, means: Tensor, text: Tensor, off: float) -> None:
        super().__init__()
        self.means, self.text, self.off = means, text, off

    def sample_noise(self, rows: int, source: torch.Generator | None = None) -> Tensor:
        return torch.randn(rows, self.means.shape[1], generator=source)

    def forward(self, text: Tensor, noise: Tensor) -> Tensor:
        which = (text @ self.text.T).argmax(-1)
        return torch.roll(self.means, int(self.off), 0)[which] + 0.1 * noise


def test_figures_of_the_fold():
    train, dev = planted_bank(), planted_bank(seed=1)
    text = torch.eye(6)
    real = class_statistics(train, 6)
    queries, classes = dev.take(dev.held())
    good = fold_figures(Perfect(real.means, text, 0), text, (1, 4), real, queries, classes)
    assert good["score"] == good["fold_accuracy"] == good["rest_accuracy"] == 1
    assert good["nearest"] == 1 and good["distance"] < 0.1 and 0.01 < good["spread"] < 0.2
    wrong = fold_figures(Perfect(real.means, text, 1), text, (1, 4), real, queries, classes)
    assert wrong["fold_accuracy"] == wrong["nearest"] == wrong["score"] == 0
    assert wrong["distance"] > 0.5


class Planted(nn.Module):
    """A classifier for queries that are logits already."""

    scale = torch.tensor(100.0)

    def forward(self, queries: Tensor, text: Tensor) -> Tensor:
        return queries


def test_the_sweep_finds_a_planted_offset():
    """Queries of the fold lose by 7 to a seen class; seen ones win by 12 over the fold."""
    logits = np.zeros((1, 40, 6), np.float16)  # 5 classes and no_object
    classes = np.tile(np.arange(5), 8)[None].astype(np.int16)
    for q, c in enumerate(classes[0]):
        logits[0, q, c] = 20
        if c in (1, 3):  # the fold
            logits[0, q, 0] = 27
        else:
            logits[0, q, 1] = 8
    module: Any = SimpleNamespace(classifier=Planted(), projector=nn.Identity())
    banks: Any = SimpleNamespace(train=None, dev=QueryBank(logits, classes))  # dev alone is used
    offset, figures = _sweep(module, torch.zeros(5, 3), (1, 3), banks)
    assert 7 < offset < 12 and figures["uncalibrated"] == 0
    assert figures["calibrated"] == 1
    nothing, _ = _sweep(module, torch.zeros(5, 3), (), banks)
    assert nothing == 0


def test_recognition_counts_false_alarms_of_rare_classes():
    """9 queries of class 0, 1 of class 1; a third of the common ones named as the rare one."""
    classes = torch.tensor([0] * 9 + [1])
    named = torch.tensor([0] * 6 + [1] * 2 + [3] + [1])  # and one as no_object
    quality, occurs = recognition(named, classes, 3)
    assert occurs.tolist() == [True, True, False]
    torch.testing.assert_close(quality[:2], torch.tensor([6 / 7.5, 1 / 2]))


def planted_segmentor(width: int = 8) -> Any:
    torch.manual_seed(0)
    return SimpleNamespace(projector=Projector(width, 12), classifier=Classifier(12, 25.0, True))


def test_choosing_the_offset_never_learns_from_the_fold():
    """Real queries of the fold in the train bank are broken on purpose."""
    train, dev = planted_bank(classes=8), planted_bank(classes=8, seed=1)
    fold = (2, 5)
    queries = np.where(np.isin(train.classes, fold)[..., None], np.nan, train.queries)
    banks = Banks(QueryBank(queries.astype(np.float16), train.classes), dev)
    text = F.normalize(torch.randn(8, 12), dim=-1)
    for made_by in (None, build_generator(SMALL, 12, 8)):
        segmentor = planted_segmentor()
        before = [p.clone() for p in segmentor.projector.parameters()]
        cfg = FinetuneConfig(steps=20, batch=64, pseudo_per_class=4)
        offset, figures = choose_offset(segmentor, made_by, text, fold, banks, CatConfig(), cfg)
        assert 0 <= offset <= 7.5 * 1.5 and figures["calibrated"] >= figures["uncalibrated"]
        assert all(map(torch.equal, before, segmentor.projector.parameters()))


def pairs_of_classes() -> tuple[Banks, Tensor]:
    """Classes 2i and 2i + 1 look alike and are called alike: what sets an odd one apart is its own
    direction (in the queries and in the texts)."""
    text = torch.eye(12).repeat_interleave(2, 0)[:12]
    text[1::2, 6:] += 0.5 * torch.eye(6)
    looks = 3 * text.numpy()
    looks = np.concatenate((looks, np.zeros((1, 12))))  # of empty queries

    def bank(seed: int) -> QueryBank:
        rng = np.random.default_rng(seed)
        held = rng.integers(-1, 12, (80, 10))
        queries = looks[held] + 0.1 * rng.normal(size=(80, 10, 12))
        return QueryBank(queries.astype(np.float16), held.astype(np.int16))

    return Banks(bank(0), bank(1)), F.normalize(text, dim=-1)


def test_the_names_of_the_fold_are_no_negatives(monkeypatch):
    """As negatives they are pushed away, and the offset has to make up for it."""
    banks, text = pairs_of_classes()
    fold, cfg = (1, 5, 9), FinetuneConfig(steps=20, batch=64)
    other = text.clone()
    other[list(fold)] = F.normalize(torch.randn(3, 12), dim=-1)

    def segmentor() -> Any:
        return planted_segmentor(12)

    one, another = (
        refitted(segmentor(), t, fold, banks, cfg)[0].state_dict() for t in (text, other)
    )
    torch.testing.assert_close(one, another, rtol=0, atol=0)  # their texts leave no trace
    offset, figures = choose_offset(segmentor(), None, text, fold, banks, CatConfig(), cfg)
    whole = UnionModule.__init__

    def with_all(self: UnionModule, *arguments: Any, **named: Any) -> None:
        whole(self, *arguments[:7], **(named | {"absent": ()}))

    monkeypatch.setattr(UnionModule, "__init__", with_all)
    biased, worse = choose_offset(segmentor(), None, text, fold, banks, CatConfig(), cfg)
    assert offset < biased and worse["uncalibrated"] <= figures["uncalibrated"]


@pytest.mark.parametrize(
    ("layers", "no_object", "expected"),
    [
        ("last", False, {"projector.layers.1.weight", "projector.layers.1.bias"}),
        ("last", True, {"projector.layers.1.weight", "projector.layers.1.bias",
                        "classifier.no_object"}),
        ("all", False, {f"projector.layers.{i}.{p}" for i in (0, 1) for p in ("weight", "bias")}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
def test_what_finetuning_may_change(tmp_path, layers, no_object, expected, optimiser):
    torch.manual_seed(0)
    cfg = FinetuneConfig(
        steps=3, batch=16, layers=layers, no_object=no_object, optimiser=optimiser,
        unseen_per_step=2, pseudo_per_class=2,
    )  # fmt: skip
    banks = Banks(planted_bank(), planted_bank(seed=1))
    module = UnionModule(
        Projector(8, 5, 2, 8), Classifier(5, 25.0, True), generator(), torch.randn(9, 5),
        torch.arange(6, 9), cfg, statistics_for("analogy", banks, 6, CPU),
    )  # fmt: skip
    task = UnionTask(module, banks, (), cfg)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    optim = OptimConfig(steps=3, warmup=0, schedule="constant", preview_every=0)
    Fit(task, optim, StageDir(tmp_path, "finetune"), alone(), META, task.optimiser()).run()
    after = module.state_dict()
    assert {k for k in before if not torch.equal(before[k], after[k])} == expected
    saved = load_weights(tmp_path / "last.safetensors").tensors
    assert set(saved) == {f"segmentor.{key}" for key in before}


def test_the_union_loss_is_the_weighted_cross_entropy():
    torch.manual_seed(0)
    cfg = FinetuneConfig(unseen_weight=3.0, no_object_weight=0.1, pseudo_per_class=4)
    module = UnionModule(
        Projector(8, 5), Classifier(5), generator(), torch.randn(8, 5), torch.tensor([6, 7]), cfg
    )
    bank = planted_bank()
    task = UnionTask(module, Banks(bank, bank), (1,), replace(cfg, batch=30))
    (batch,) = next(task.batches(0))
    assert not (batch.classes == 1).any() and not (batch.classes == IGNORED).any()
    assert (batch.classes == EMPTY).any()
    torch.manual_seed(5)
    found = module(batch, 0)["union"]
    torch.manual_seed(5)
    made, of = module._pseudo(batch)
    total, weights = 0.0, 0.0
    for query, label in zip([*batch.real, *made], [*batch.classes, *of], strict=True):
        index = 8 if label == EMPTY else int(label)
        weight = 0.1 if index == 8 else 3.0 if index >= 6 else 1.0
        logits = module.classifier(module.projector(query), module.text)
        total += weight * float(-logits.detach().log_softmax(-1)[index])
        weights += weight
    assert found.item() == pytest.approx(total / weights, rel=1e-5)
    assert made.shape == (8, 8) and of.tolist() == [6] * 4 + [7] * 4


def test_the_generators_task_leaves_the_fold_out():
    torch.manual_seed(0)
    cfg = SMALL
    bank = planted_bank()
    segmentor: Any = nn.ModuleDict({"projector": Projector(8, 12), "classifier": Classifier(12)})
    segmentor.projector, segmentor.classifier = segmentor["projector"], segmentor["classifier"]
    module = GeneratorModule(
        build_generator(cfg, 12, 8), segmentor, F.normalize(torch.randn(6, 12), dim=-1), cfg
    )
    task = GeneratorTask(module, Banks(bank, planted_bank(seed=1)), (1, 3), (1, 3))
    stream = task.batches(0)
    for _ in range(5):
        (batch,) = next(stream)
        assert not torch.isin(batch.classes, torch.tensor([1, 3])).any()
    losses = module(batch, 0)
    assert set(losses) == {"matching", "contrast", "cycle"}
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None for p in module.generator.parameters())
    assert all(p.grad is None for p in segmentor.parameters())  # the projector is frozen
    learned = class_statistics(bank, 6, (1, 3))
    torch.testing.assert_close(module.generator.statistics.mean, learned.mean)
    module.eval()
    assert set(task.score(0)) >= {"score", "fold_accuracy", "nearest", "distance"}
    less = GeneratorModule(module.generator, segmentor, module.text, cfg, (1, 3))
    torch.manual_seed(7)
    found = less(batch, 0)["cycle"]
    torch.manual_seed(7)
    made = less.generator(less.text[batch.classes], less.generator.sample_noise(24))
    kept = [0, 2, 4, 5]  # the fold's texts are no candidates of the cycle
    labels = torch.tensor([kept.index(int(c)) for c in batch.classes])
    scale = segmentor.classifier.scale
    want = cfg.cycle * cycle_loss(segmentor.projector(made), less.text[kept], labels, scale)
    assert found.item() == pytest.approx(want.item(), rel=1e-6)
    off = GeneratorModule(
        module.generator, segmentor, module.text, replace(cfg, contrast=0.0, cycle=0.0)
    )
    assert set(off(batch, 0)) == {"matching"}
