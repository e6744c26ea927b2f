"""No label, mask or image of an unseen class reaches a loss; in inductive mode no name either."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mini import draw_world, metrics, mini_config, same
from torch import Tensor

from concat_cli.core.build import build_segmentor
from concat_cli.core.checkpoint import load_weights
from concat_cli.core.clip.encoder import Clip, load_clip
from concat_cli.core.config import AlignConfig
from concat_cli.core.data.dataset import PanopticDataset, read_dataset_info
from concat_cli.core.data.loader import Batch, collate
from concat_cli.core.errors import UserError
from concat_cli.core.prepare.shapes_scene import DEFAULT_UNSEEN
from concat_cli.core.runs import Run
from concat_cli.core.train import teacher
from concat_cli.core.train.teacher import Teacher, trained_indices
from concat_cli.methods.concat import con_module, query_bank
from concat_cli.methods.concat.cat import train_cat
from concat_cli.methods.concat.con import train_con
from concat_cli.methods.concat.con_module import ConModule, WarmupModule
from concat_cli.methods.concat.finetune import finetune
from concat_cli.methods.concat.latent_bank import LatentWriter
from concat_cli.methods.concat.latent_config import LatentConfig
from concat_cli.methods.concat.query_bank import EMPTY, IGNORED, describe

QUICK = ("optim.steps=2", "warmup.steps=1", "cat.steps=2", "cat.eval_every=1", "finetune.steps=2")


# --- the data ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"unseen_seed": 101}])
def test_train_and_dev_hold_no_unseen_class(tmp_path, options):
    info = read_dataset_info(draw_world(tmp_path / "shapes", **options))
    unseen = set(info.vocabulary.unseen_indices)
    assert len(unseen) == 10
    held = {
        part: {int(label) for record in dataset.records for label in record.labels}
        for part in ("train", "dev", "val")
        for dataset in [PanopticDataset(info.part(part), info.vocabulary)]
    }
    assert not held["train"] & unseen and not held["dev"] & unseen
    assert held["val"] & unseen  # or the test says nothing
    ids = [
        {record.image_id for record in PanopticDataset(info.part(part), info.vocabulary).records}
        for part in ("train", "dev", "val")
    ]
    assert sum(map(len, ids)) == len(set.union(*ids))


# --- a batch that should not be: a segment of an unseen class in it ------------------------------


class World:
    """A batch with a segment of a class that must not be trained on, and modules to feed it to."""

    def __init__(self, root: Path) -> None:
        self.cfg = mini_config(root, "loss.denoising=6", "align.crops=3", "model.queries=12")
        info = read_dataset_info(root)
        self.names = info.vocabulary.names
        dataset = PanopticDataset(info.part("train"), info.vocabulary)
        samples = [dataset[i] for i in range(6)]
        self.batch = collate(samples, range(6))
        largest = torch.bincount(self.batch.segment_map[0].flatten())[1:].argmax()
        self.never = int(self.batch.labels[0, largest])  # this class is made unseen
        self.others = info.vocabulary.unseen_indices
        seen = torch.tensor(info.vocabulary.is_seen)
        seen[self.never] = False
        self.to_trained = trained_indices(tuple(seen.tolist()), torch.device("cpu"))
        self.clip = load_clip(self.cfg.clip)
        kept = [n for n, s in zip(self.names, seen.tolist(), strict=True) if s]
        self.text = self.clip.encode_text([f"a photo of a {name}." for name in kept])
        self.teacher = Teacher(self.clip, self.cfg.align.crops)

    @property
    def unseen_slots(self) -> Tensor:
        return (self.batch.labels >= 0) & (
            self.to_trained[self.batch.labels.clamp(min=0)] < 0
        )  # (B, N)

    def relabelled(self) -> Batch:
        """The same segments under the name of another unseen class."""
        labels = self.batch.labels.masked_fill(self.unseen_slots, self.others[3])
        return replace(self.batch, labels=labels)

    def voided(self) -> Batch:
        """The same images without those segments: their pixels are void."""
        gone = torch.cat((torch.zeros(6, 1, dtype=torch.bool), self.unseen_slots), 1)
        pixels = gone.gather(1, self.batch.segment_map.flatten(1).long())
        return replace(
            self.batch,
            segment_map=self.batch.segment_map.masked_fill(pixels.view(6, 64, 64), 0),
            labels=self.batch.labels.masked_fill(self.unseen_slots, -1),
        )

    def recut(self) -> Batch:
        """The same images with another truth under what is hidden: every second row and column."""
        gone = torch.cat((torch.zeros(6, 1, dtype=torch.bool), self.unseen_slots), 1)
        pixels = gone.gather(1, self.batch.segment_map.flatten(1).long()).view(6, 64, 64)
        pixels[:, ::2], pixels[:, :, ::2] = False, False
        assert pixels.any()
        return replace(self.batch, segment_map=self.batch.segment_map.masked_fill(pixels, 0))

    def con(
        self, align: AlignConfig | None = None, latent: LatentConfig | None = None
    ) -> ConModule:
        torch.manual_seed(0)
        segmentor = build_segmentor(self.cfg.model, self.clip.embed_dim)
        cfg = replace(self.cfg, align=align or self.cfg.align)
        cfg = cfg.with_own(latent or LatentConfig())
        return ConModule(segmentor, self.text, self.to_trained, cfg, self.teacher)

    def warmup(self, latent: LatentConfig | None = None) -> WarmupModule:
        torch.manual_seed(0)
        segmentor = build_segmentor(self.cfg.model, self.clip.embed_dim)
        cfg = self.cfg.with_own(latent or LatentConfig())
        return WarmupModule(segmentor, self.text, self.to_trained, cfg, self.teacher)


@pytest.fixture(scope="module")
def world(mini_world: Path) -> World:
    found = World(mini_world)
    assert found.unseen_slots.any() and found.unseen_slots.sum() < 12
    return found


def trained(module: ConModule | WarmupModule, batch: Batch) -> dict[str, Tensor]:
    """Losses, gradients and state after two forwards and one backward."""
    for seed in (1, 2):  # the second one meets what the first left in the token banks
        torch.manual_seed(seed)
        losses = module(batch, 0)
    torch.stack(list(losses.values())).sum().backward()
    grads = {f"grad/{n}": p.grad for n, p in module.named_parameters() if p.grad is not None}
    assert len(grads) > 40
    return losses | grads | module.state_dict()


@pytest.mark.parametrize("pooling", ["attention", "objectness", "matched"])
def test_con_takes_an_unseen_segment_for_void(world, pooling):
    """Bit for bit the same losses, gradients, statistics and token banks."""
    align = replace(world.cfg.align, pooling=pooling)
    found = trained(world.con(align), world.batch)
    assert same(found, trained(world.con(align), world.relabelled())) == []
    assert same(found, trained(world.con(align), world.voided())) == []
    whole = world.con(align)  # and the test is no empty one: a trained label does matter
    whole.to_trained = whole.to_trained.clone()
    whole.to_trained[world.never] = 0
    assert {"class", "mask", "dense", "align_instance"} <= set(
        same(found, trained(whole, world.batch))
    )


def test_the_warm_up_takes_an_unseen_segment_for_void(world):
    found = trained(world.warmup(), world.batch)
    assert same(found, trained(world.warmup(), world.relabelled())) == []
    assert same(found, trained(world.warmup(), world.voided())) == []


@pytest.mark.parametrize("stage", ["con", "warmup"])
@pytest.mark.parametrize("split", [True, False])
def test_latent_segments_come_from_void_and_not_from_what_it_hides(world, stage, split):
    """Nor does the name, the cut or the mere being there of a hidden segment reach any of them."""
    latent = LatentConfig(weight=1, split=split, least=0.001)

    def made() -> ConModule | WarmupModule:
        return world.con(latent=latent) if stage == "con" else world.warmup(latent)

    found = trained(made(), world.batch)
    assert found["again_mask"] > 0  # or the test says nothing
    for other in (world.relabelled(), world.voided(), world.recut()):
        assert same(found, trained(made(), other)) == []


def test_what_clip_is_asked_of_latent_segments_does_not_hang_on_what_void_hides(world):
    latent = LatentConfig(weight=1, evidence=1, least=0.001)
    segmentor = world.con().segmentor.eval()
    session = SimpleNamespace(cfg=world.cfg)
    plain = query_bank.BankWriter(session, segmentor, world.text, "weights")
    writer = LatentWriter.of(plain, world.clip, latent)
    found = writer.described(world.batch, world.to_trained)
    for other in (world.relabelled(), world.voided(), world.recut()):
        assert same(found, writer.described(other, world.to_trained)) == []


def test_the_query_bank_takes_an_unseen_segment_for_void(world, monkeypatch):
    segmentor, cfg = world.con().segmentor.eval(), world.cfg
    monkeypatch.setattr(query_bank, "VOID_SHARE", 0.01)
    queries, held = describe(segmentor, world.batch, world.text, world.to_trained, cfg)
    for other in (world.relabelled(), world.voided()):
        again = describe(segmentor, other, world.text, world.to_trained, cfg)
        assert torch.equal(queries, again[0]) and torch.equal(held, again[1])
    assert held.min() >= IGNORED and held.max() < len(world.text)
    assert (held >= 0).sum() == ((world.batch.labels >= 0) & ~world.unseen_slots).sum()
    assert (held == IGNORED).any() and (held == EMPTY).any()


def test_where_unseen_segments_could_have_been_used(world, monkeypatch):
    """What each part of stage 1 is really given."""
    given: dict[str, list] = {}

    def spy(module, name):
        whole = getattr(module, name)

        def noted(*arguments, **named):
            result = whole(*arguments, **named)
            given.setdefault(name, []).append((arguments, result))
            return result

        monkeypatch.setattr(module, name, noted)

    spy(con_module, "match")
    spy(con_module, "mask_losses")
    spy(con_module, "class_loss")
    spy(con_module, "token_classes")
    spy(con_module, "seed_tokens")
    spy(teacher, "segment_tokens")
    spy(Teacher, "segments")
    module = world.con()
    spy(con_module, "drawn_segments")
    whole = module._denoising
    monkeypatch.setattr(
        module, "_denoising", lambda *a: given.setdefault("denoising", []).append(whole(*a))
        or given["denoising"][-1],
    )  # fmt: skip
    torch.manual_seed(0)
    module(world.batch, 0)
    unseen = world.unseen_slots
    segments = world.batch.masks()[unseen]  # (U, H, W)
    (arguments, matched) = given["match"][0]
    assert (matched[:, unseen] == -1).all() and not arguments[3][unseen].any()
    assert (matched[:, (world.batch.labels >= 0) & ~unseen] >= 0).all()
    noised = given["denoising"][0]
    drawn = unseen.gather(1, given["drawn_segments"][0][1])  # slots of denoising queries
    for (arguments, _), hidden in zip(given["class_loss"], (unseen, drawn), strict=True):
        assert (arguments[2][hidden] == -1).all() and arguments[2].max() < len(world.text)
    for (arguments, _), hidden in zip(given["mask_losses"], (unseen, drawn), strict=True):
        assert not arguments[2][hidden].any()
    assert drawn.any() and not noised.valid[drawn].any() and not noised.masks[drawn].any()
    (arguments, classes) = given["token_classes"][0]
    size = arguments[0].shape[-2:]
    inside = torch.nn.functional.interpolate(segments[:, None].float(), size=size, mode="area")
    rows = unseen.nonzero()[:, 0]
    assert (classes[rows][inside.flatten(1) > 0.5] == -1).all()
    assert (given["seed_tokens"][0][1].sum(1) <= (~unseen & (world.batch.labels >= 0)).sum(1)).all()
    picked = given["segment_tokens"][0][0][3]
    assert len(picked) and not unseen[picked[:, 0], picked[:, 1]].any()
    groups = module.segment_bank.groups[module.segment_bank.valid]
    assert len(groups) == len(picked) and (groups >= 0).all() and (groups < len(world.text)).all()


# --- names ------------------------------------------------------------------------------------


@contextmanager
def texts_recorded(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[list[str]]:
    """Every text that CLIP encodes, whoever asks; with an empty cache none is left out."""
    heard: list[str] = []
    whole = Clip.encode_text

    def noted(self: Clip, texts: list[str]) -> Tensor:
        heard.extend(texts)
        return whole(self, texts)

    with monkeypatch.context() as patch:
        patch.setenv("CONCAT_CACHE", str(cache))
        patch.setattr(Clip, "encode_text", noted)
        yield heard


def names_in(texts: list[str], names: tuple[str, ...]) -> set[str]:
    return {name for name in names for text in texts if name in text}


@pytest.mark.parametrize("mode", ["inductive", "transductive"])
def test_which_names_enter_which_stage(mini_world, tmp_path, monkeypatch, mode):
    keys = ("finetune.calibrate=true", "latent.weight=1", "latent.evidence=0.5")
    cfg = mini_config(mini_world, *QUICK, f"protocol.mode={mode}", *keys)
    run = Run("names", tmp_path)
    seen = read_dataset_info(mini_world).vocabulary.seen_only().names
    for stage in (train_con, train_cat):  # in either mode: seen names only
        with texts_recorded(monkeypatch, tmp_path / f"cache-{stage.__name__}") as heard:
            stage(cfg, run)
        assert names_in(heard, seen) == set(seen) and not names_in(heard, DEFAULT_UNSEEN)
    real_only = replace(cfg, finetune=replace(cfg.finetune, pseudo=False))
    with texts_recorded(monkeypatch, tmp_path / "cache-real") as heard:
        finetune(real_only, run)
    assert names_in(heard, seen) == set(seen) and not names_in(heard, DEFAULT_UNSEEN)
    with texts_recorded(monkeypatch, tmp_path / "cache-pseudo") as heard:
        if mode == "inductive":
            with pytest.raises(UserError, match=r"protocol\.mode=inductive"):
                finetune(cfg, Run("other", tmp_path), weights=run.weights_of("cat"))
            assert not names_in(heard, DEFAULT_UNSEEN)
        else:
            finetune(cfg, Run("other", tmp_path), weights=run.weights_of("cat"))
            assert names_in(heard, DEFAULT_UNSEEN) == set(DEFAULT_UNSEEN)
    if mode == "inductive":  # on purpose it may be taught names all the same
        (tmp_path / "asked.txt").write_text("striped star\n")
        taught = finetune(cfg, run, vocabulary=tmp_path / "asked.txt")
        assert load_weights(taught.weights).meta["taught"] == ["striped star"]


# --- selection and calibration ------------------------------------------------------------------

OPENED: list[str] = []
LISTENING = [False]


@pytest.fixture(scope="module")
def audit() -> None:
    """An audit hook cannot be taken away again, so it is told when to listen."""

    def hook(event: str, arguments: tuple) -> None:
        if LISTENING[0] and event == "open" and isinstance(arguments[0], (str, Path)):
            OPENED.append(str(arguments[0]))

    sys.addaudithook(hook)


def test_nothing_before_evaluation_opens_val(audit, tmp_path):
    """Every file that Python opens while all stages train, choose, calibrate and draw previews.

    The names of the classes are read from the smallest of the three lists, which is dev's here.
    """
    root = draw_world(tmp_path / "shapes", dev=6, val=12)
    keys = ("optim.eval_every=1", "optim.preview_every=1", "finetune.calibrate=true")
    cfg, run = mini_config(root, *QUICK, *keys), Run("sealed", tmp_path / "runs")
    OPENED.clear()
    LISTENING[0] = True
    try:
        for stage in (train_con, train_cat, finetune):
            assert stage(cfg, run).finished
    finally:
        LISTENING[0] = False
    inside = {Path(path).relative_to(root) for path in OPENED if Path(path).is_relative_to(root)}
    parts = {path.parts[0] for path in inside}
    assert parts == {"dataset.json", "annotations", "train", "dev"}
    assert not [path for path in inside if "val" in str(path)]
    assert {Path("dev.json"), Path("train.json")} <= {
        Path(p.name.removeprefix("panoptic_")) for p in inside
    }


def test_val_can_be_missing_altogether(mini_run, tmp_path):
    """The same scores are reached when the pictures and labels of val are not even there."""
    root = Path(shutil.copytree(mini_run.cfg.data.root, tmp_path / "shapes"))
    header = json.loads((root / "dataset.json").read_text())
    for path in (root / "val", root / header["parts"]["val"]["pngs"]):
        shutil.rmtree(path)
    del header["parts"]["val"]
    (root / "annotations" / "panoptic_val.json").unlink()
    (root / "dataset.json").write_text(json.dumps(header))
    cfg = replace(mini_run.cfg, data=replace(mini_run.cfg.data, root=str(root)))
    run = Run("blind", tmp_path / "runs")
    for stage, name in ((train_con, "con"), (train_cat, "cat"), (finetune, "finetune")):
        assert stage(cfg, run).finished
        assert metrics(run.stage(name)) == metrics(mini_run.run.stage(name))


def test_a_token_that_is_not_valid_changes_no_alignment():
    """A row of no group (-1) and not valid is neither a query nor a negative."""
    tokens = torch.nn.functional.normalize(torch.randn(4, 8), dim=-1)
    valid = torch.tensor([True, True, False, True])
    groups = torch.tensor([0, 1, -1, 2])
    plain = teacher.info_nce(tokens, tokens, valid, 0.1, groups)
    other = tokens.clone()
    other[2] = torch.randn(8)
    assert torch.equal(plain, teacher.info_nce(other, other, valid, 0.1, groups))
