"""Stage 3: union finetuning of the semantic projector, for unseen or for any given names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from concat_cli.core.build import config_of, part_of
from concat_cli.core.checkpoint import (
    Weights,
    check_finished,
    check_stage,
    load_weights,
)
from concat_cli.core.clip.encoder import load_clip
from concat_cli.core.clip.prompts import check_names
from concat_cli.core.config import Config, OptimConfig
from concat_cli.core.device import cpu_threads
from concat_cli.core.errors import UserError
from concat_cli.core.progress import SILENT, Progress
from concat_cli.core.runs import Run, StageDir, taught
from concat_cli.core.train.loop import Fit, StageResult
from concat_cli.core.train.plan import Plan, weights_facts
from concat_cli.core.train.session import (
    Session,
    TextsOf,
    open_session,
    trained_names,
)
from concat_cli.core.vocabulary import Vocabulary, written
from concat_cli.core.vocabulary_file import doubt, parse_vocabulary
from concat_cli.methods.concat.cat import choose_fold
from concat_cli.methods.concat.generator import Generator, restore_generator
from concat_cli.methods.concat.latent_bank import (
    Evidence,
    LatentWriter,
    evidence,
    latent_bank,
)
from concat_cli.methods.concat.latent_config import LatentConfig
from concat_cli.methods.concat.on_borrowed import AnySegmentor, kept_facts, restore
from concat_cli.methods.concat.query_bank import Banks, bank_writer, open_banks
from concat_cli.methods.concat.union import UnionModule, UnionTask, choose_offset, statistics_for


class FinetuneTask(UnionTask):
    """Union finetuning that writes the whole model: what learned, and all that stayed frozen."""

    def __init__(self, module: UnionModule, banks: Banks, source: Weights) -> None:
        super().__init__(module, banks, (), module.cfg)
        self.frozen = {name: _widened(tensor) for name, tensor in source.tensors.items()}

    def weights(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The source's tensors with the finetuned ones in their place."""
        return self.frozen | super().weights(state)


def finetune(
    cfg: Config,
    run: Run,
    *,
    vocabulary: Path | None = None,
    weights: Path | None = None,
    device: str = "auto",
    fresh: bool = False,
    force: bool = False,
    progress: Progress = SILENT,
) -> StageResult:
    """Teaches the projector the unseen classes, or the names of a vocabulary file.

    The new weights are in `runs/<name>/finetune/`, or in `finetune-<file stem>/` beside it.
    """
    pseudo = cfg.finetune.pseudo
    source = _source(weights or run.weights_of("cat" if pseudo else "con"), pseudo)
    unfinished = check_finished(source, force)
    if unfinished:
        progress.say(unfinished)
    cfg = _as_built(cfg, source)
    session = open_session(cfg, device, progress, force)
    known = session.info.vocabulary
    given = None if vocabulary is None else parse_vocabulary(vocabulary, known)
    if given is not None and (doubtful := doubt(given)):
        progress.say(doubtful)
    new = new_names(known, given, cfg) if pseudo else Vocabulary(())
    texts = TextsOf(source, session)
    check_names(new if given is None else given, cfg.clip, force)
    name = "finetune" if vocabulary is None else taught(vocabulary)
    inputs = {"weights": source.sha256, "vocabulary": written(new if given is None else given)}
    stage = session.open_stage(run.stage(name), fresh=fresh, inputs=inputs)
    segmentor = session.place(restore(source))
    generator = _frozen(restore_generator(source), session) if pseudo else None
    trained = texts.embed(known.seen_only())
    banks = open_banks(session, run, _for_bank(source), segmentor, trained)
    text = trained
    if len(new):
        text = torch.cat((trained, texts.embed(new)))
        progress.say(f"teaching {len(new)} names without images: {shorten(new.names)}")
    indices = torch.arange(len(trained), len(text), device=session.device)
    statistics = statistics_for(cfg.cat.noise, banks, len(trained), session.device)
    offset, figures = _calibrate(session, source, banks, trained)
    parts = (segmentor.projector, segmentor.classifier, generator)
    module = UnionModule(*parts, text, indices, cfg.finetune, statistics)
    if len(new) and (latent := cfg.own(LatentConfig)).evidence:
        module.learn_from(_evidence(session, run, source, (segmentor, text, indices), latent))
    task = FinetuneTask(module, banks, source)
    told = replace(session, cfg=replace(cfg, infer=replace(cfg.infer, seen_offset=offset)))
    meta = told.meta(
        "finetune",
        texts.identity,
        trained=trained_names(source, known),
        taught=list(dict.fromkeys((*source.meta.get("taught", ()), *new.names))),
        **kept_facts(source),
    )
    steps, seed = cfg.finetune.steps, cfg.finetune.seed
    optim = OptimConfig(
        steps=steps, clip_norm=float("inf"), warmup=0, schedule="constant", seed=seed
    )
    with cpu_threads():
        plain = replace(session, dtype=None)
        result = Fit(task, optim, stage, plain, meta, task.optimiser()).run()
    return replace(result, figures=result.figures | figures)


def _evidence(
    session: Session,
    run: Run,
    source: Weights,
    known: tuple[AnySegmentor, Tensor, Tensor],
    latent: LatentConfig,
) -> Evidence:
    """What latent segments of the training part say of new names, which is told.

    known: the segmentor, the texts of all candidates and the indices of the new ones among them.
    """
    segmentor, text, new = known
    clip = load_clip(session.cfg.clip, session.device, progress=session.progress)
    plain = bank_writer(session, source, segmentor, text[: len(text) - len(new)])
    writer = LatentWriter.of(plain, clip, latent)
    found = evidence(*latent_bank(writer, run), text, new, latent)
    named = int((found.counts > 0).sum())
    session.progress.say(
        f"{len(found.queries)} latent segments, which CLIP names as {named} of {len(new)} new "
        f"names, stand for {latent.evidence:.0%} of these names' pseudo queries"
    )
    return found


def _source(path: Path, pseudo: bool) -> Weights:
    """The weights to go on from; UserError for those of a stage that lacks what is needed."""
    source = load_weights(path)
    check_stage(source, *(("cat", "finetune") if pseudo else ("con", "cat")))
    if pseudo:
        part_of(source, "generator")  # the control's weights hold none
    return source


def new_names(known: Vocabulary, given: Vocabulary | None, cfg: Config) -> Vocabulary:
    """The classes that need pseudo queries: unseen ones, or given names not trained on."""
    if given is not None:
        return Vocabulary(tuple(entry for entry in given.entries if not entry.seen))
    check_protocol(cfg)
    return Vocabulary(tuple(entry for entry in known.entries if not entry.seen))


def check_protocol(cfg: Config) -> None:
    """UserError where the protocol forbids unseen names in training."""
    if cfg.protocol.mode == "inductive":
        raise UserError(
            "protocol.mode=inductive: no unseen name may be known before evaluation.",
            "Set finetune.pseudo=false (real queries only), or teach names on purpose with "
            "--vocab.",
        )


def _as_built(cfg: Config, source: Weights) -> Config:
    """The configuration with the sizes of the segmentor and generator that there are."""
    built, asked = config_of(source), cfg.cat
    if source.stage != "con":
        cat = replace(built.cat, noise=asked.noise, fold=asked.fold, seed=asked.seed)
        cfg = replace(cfg, cat=cat)
    return replace(cfg, model=built.model)


def _for_bank(source: Weights) -> Weights:
    """Weights whose bank is their own where the projector, which has a say in matching, is."""
    if source.stage != "finetune" or "published" in source.meta:
        return source
    return replace(source, meta=source.meta | {"segmentor": source.sha256})


def _widened(tensor: Tensor) -> Tensor:
    """In fp32, as matrices of exported weights are not."""
    return tensor.float() if tensor.is_floating_point() else tensor


def shorten(names: tuple[str, ...], most: int = 8) -> str:
    """The first names, and how many more there are."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _calibrate(
    session: Session, source: Weights, banks: Banks, text: Tensor
) -> tuple[float, dict[str, float]]:
    """The offset on seen logits, if the config asks for one."""
    cfg = session.cfg
    if not cfg.finetune.calibrate:
        return cfg.infer.seen_offset, {}
    fold = choose_fold(banks.train, len(text), cfg.cat.fold, cfg.cat.seed)
    segmentor = session.place(restore(source))
    generator = None
    if cfg.finetune.pseudo:
        generator = _frozen(fold_generator(source, cfg, session.progress), session)
    offset, figures = choose_offset(segmentor, generator, text, fold, banks, cfg.cat, cfg.finetune)
    session.progress.say(f"seen logits are lowered by {offset:.2f} (chosen on dev and the fold)")
    return offset, figures | {"seen_offset": offset}


def _frozen(generator: Generator, session: Session) -> Generator:
    """On the device and in the run's own precision, as it learns no more."""
    generator.precision = session.dtype
    return generator.to(session.device)


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


def plan(cfg: Config, run: Run, weights: Path | None, vocabulary: Path | None) -> Plan:
    """Of the projector: what it is taught."""
    facts = weights_facts("cat" if cfg.finetune.pseudo else "con", run, weights)
    names = "the unseen classes of the data set"
    if vocabulary is not None:
        given = parse_vocabulary(vocabulary)
        names = "; ".join(filter(None, (f"{len(given)} names of {vocabulary}", doubt(given))))
    elif cfg.finetune.pseudo:
        check_protocol(cfg)
    return facts | {
        "steps": f"{cfg.finetune.steps} of {cfg.finetune.batch} real queries",
        "teaches": names if cfg.finetune.pseudo else "nothing new (control)",
    }
