"""The offset on seen logits, chosen on dev and on seen classes set aside; never on val [ours]."""

from __future__ import annotations

import torch
from torch import Tensor

from concat_cli.core.build import config_of
from concat_cli.core.checkpoint import Weights, load_weights
from concat_cli.core.config import CatConfig, Config, FinetuneConfig
from concat_cli.core.model.segmentor import Segmentor
from concat_cli.core.progress import Progress
from concat_cli.core.runs import StageDir
from concat_cli.methods.concat.build import Generator, restore_generator
from concat_cli.methods.concat.fold import harmonic
from concat_cli.methods.concat.query_bank import Banks
from concat_cli.methods.concat.refit import fit_union, refitted
from concat_cli.methods.concat.union import UnionModule, statistics_for

OFFSETS = 41  # candidates between 0 and 0.3 of the logit scale; the fold, whose queries have been
# trained, cannot tell that unseen classes are named too often, so none is below 0


def choose_offset(
    segmentor: Segmentor,
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


def fold_generator(source: Weights, cfg: Config, progress: Progress) -> Generator:
    """The generator that CAT trained without the fold, or aloud the final one, which saw it.

    source: of stage `cat`; the other is looked for in `fold/` beside it, and taken only if it was
    trained without the same fold.
    """
    path = StageDir(source.path.parent / "fold", "cat").weights
    if path is not None:
        weights = load_weights(path)
        built = config_of(weights)
        if (built.cat.fold, built.cat.seed, built.bank) == (cfg.cat.fold, cfg.cat.seed, cfg.bank):
            return restore_generator(weights)
    progress.say(
        "calibrating with the final generator, as there is none without this fold beside "
        f"{source.path}: it has seen the fold, so the offset is optimistic"
    )
    return restore_generator(source)


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
    offsets = torch.linspace(0, 0.3 * scale, OFFSETS).tolist()
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
