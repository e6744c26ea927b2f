"""CONCAT on a frozen published segmentor: the whole chain, its bank, and what it may not know."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mini import Heard, Interrupt, KilledError, MiniRun, flat_state, mini_config, same
from scipy.optimize import linear_sum_assignment
from swin_helpers import TOY
from test_no_leak import World

from concat_cli.core.checkpoint import load_weights
from concat_cli.core.clip.encoder import load_clip
from concat_cli.core.clip.tokens import masked_crops
from concat_cli.core.config import InferConfig
from concat_cli.core.config_file import load_config
from concat_cli.core.data.dataset import PanopticDataset, read_dataset_info
from concat_cli.core.device import choose_device
from concat_cli.core.errors import UserError
from concat_cli.core.evaluate.scores import Scoring
from concat_cli.core.evaluate.weights import evaluate_weights
from concat_cli.core.infer import predictor as predicting
from concat_cli.core.infer.predictor import Predictor
from concat_cli.core.losses import sample_at
from concat_cli.core.model.swin import SWINS
from concat_cli.core.progress import SILENT
from concat_cli.core.runs import Run
from concat_cli.core.segmentors import Proposals, PublishedSegmentor
from concat_cli.core.segmentors.source import open_segmentor
from concat_cli.core.train.distributed import Processes
from concat_cli.core.train.session import Session
from concat_cli.core.weights_from import files as weights_from
from concat_cli.methods.concat import query_bank
from concat_cli.methods.concat.borrowed_con import TaughtWriter, as_borrowed
from concat_cli.methods.concat.cat import train_cat
from concat_cli.methods.concat.con import plan, train_con
from concat_cli.methods.concat.finetune import finetune
from concat_cli.methods.concat.on_borrowed import OnBorrowed, on_top, restore
from concat_cli.methods.concat.query_bank import EMPTY, IGNORED

pytest.importorskip("transformers", reason="transformers is a development package")
import mask2former_helpers as m2f  # which needs transformers

COLUMNS = ("queries", "classes", "slots", "tokens", "images")


@pytest.fixture(scope="module", autouse=True)
def toy_swin() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SWINS, "swin_toy", TOY)
        patch.setattr(weights_from, "backbone_of", lambda _: "swin_toy")
        yield


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `transformers` writes it."""
    folder = tmp_path_factory.mktemp("published") / "toy"
    m2f.their_model(m2f.swin_config()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chain(mini_world: Path, published: Path, tmp_path_factory: pytest.TempPathFactory) -> MiniRun:
    """All three stages on it, trained once; not to be changed by tests."""
    keys = ("optim.save_every=2", "finetune.calibrate=true")
    cfg = mini_config(mini_world, f"segmentor={published}", *keys)
    run, heard = Run("borrowed", tmp_path_factory.mktemp("runs")), Heard()
    assert train_con(cfg, run, progress=heard).finished
    told = "\n".join(heard.lines)
    assert "12 queries of width 64, frozen; pictures at 64" in told
    assert "bank train: 24 pictures at " in told and "MB on disk" in told and "memory" in told
    heard = Heard()
    assert train_cat(cfg, run, progress=heard).finished
    assert finetune(cfg, run, progress=heard).finished
    assert not [line for line in heard.lines if line.startswith("bank ")]  # the bank is that of CON
    return MiniRun(cfg, run)


def test_weights_hold_what_was_learned_alone(chain: MiniRun, published: Path) -> None:
    for stage in ("con", "cat", "finetune"):
        weights = load_weights(chain.run.weights_of(stage))
        parts = {name.split(".")[0] + "." + name.split(".")[1] for name in weights.tensors}
        own = {"segmentor.projector", "segmentor.classifier"}
        assert parts >= own and all(p in own or p.startswith("generator.") for p in parts)
        facts = weights.meta["published"]
        assert facts["source"] == str(published)
        assert facts["sha256"] == open_segmentor(str(published)).sha256
        assert weights.meta["config"]["model"]["width"] == 64
    con, last = (load_weights(chain.run.weights_of(s)) for s in ("con", "finetune"))
    name = "segmentor.projector.layers.0.weight"
    assert not torch.equal(con.tensors[name], last.tensors[name])
    assert set(last.meta["trained"]) >= set(open_segmentor(str(published)).vocabulary.names)


def test_it_predicts_and_is_scored_without_clips_image_encoder(
    chain: MiniRun, published: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def texts_alone(*arguments, image_tower=True, **named):
        assert not image_tower
        return load_clip(*arguments, image_tower=False, **named)

    monkeypatch.setattr(predicting, "load_clip", texts_alone)
    monkeypatch.setenv("CONCAT_CACHE", str(tmp_path))  # or no tower would be loaded at all
    path = chain.run.weights_of("finetune")
    predictor = Predictor.load(path)
    assert not predictor.needs_clip_image
    assert predictor.parameters > 400_000  # the published ones run, too
    picture = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    found = predictor(picture)
    assert found.panoptic_map.shape == (50, 70) and found.semantic_map.shape == (50, 70)
    (raw,) = predictor.raw([picture])
    alone = open_segmentor(str(published))
    images, padding = predictor._batch([predictor_view(picture, predictor)], (64, 96))
    torch.testing.assert_close(raw.mask_logits, alone(images, padding).mask_logits)
    report = evaluate_weights(path, (), Scoring(check=False))
    assert report.images == 12 and report.panoptic["all"] is not None


def predictor_view(picture: np.ndarray, predictor: Predictor) -> np.ndarray:
    return predicting.resize_short(picture, predictor.cfg.size, predictor.cfg.max_size)


def test_the_bank_is_what_a_naive_loop_finds(chain: MiniRun, published: Path) -> None:
    """One picture, one query, one segment at a time; matched by masks alone."""
    cfg, folder = chain.cfg, chain.run.path / "bank" / "train"
    kept = {name: np.load(folder / f"{name}.npy") for name in COLUMNS}
    info = read_dataset_info(Path(cfg.data.root))
    data = PanopticDataset(info.part("train"), info.vocabulary)
    trained = [i for i, seen in enumerate(info.vocabulary.is_seen) if seen]
    segmentor, clip = open_segmentor(str(published)), load_clip(cfg.clip)
    points = query_bank.grid(cfg.loss.points, torch.device("cpu"))
    for index in range(len(data)):
        sample = data[index]
        image = torch.tensor(sample.image).permute(2, 0, 1)[None]
        with torch.no_grad():
            found = segmentor(image, None)
        masks = [torch.tensor(sample.segment_map == n + 1) for n in range(len(sample.labels))]
        costs = np.zeros((segmentor.count, len(masks)))
        for q in range(segmentor.count):
            logits = sample_at(found.mask_logits[:, q : q + 1], points)[0, 0].double()
            for n, mask in enumerate(masks):
                truth = sample_at(mask[None, None].float(), points)[0, 0].double()
                bce = F.binary_cross_entropy_with_logits(logits, truth)
                share = logits.sigmoid()
                dice = 1 - (2 * (share * truth).sum() + 1) / (share.sum() + truth.sum() + 1)
                costs[q, n] = cfg.loss.mask * bce + cfg.loss.dice * dice
        pairs = list(zip(*linear_sum_assignment(costs), strict=True))
        expected = np.full(segmentor.count, EMPTY)
        for q, n in pairs:
            expected[q] = trained.index(int(sample.labels[n]))
        held = np.where(kept["classes"][index] == IGNORED, EMPTY, kept["classes"][index])
        assert (held == expected).all()
        queries = torch.tensor(kept["queries"][index]).float()
        torch.testing.assert_close(queries, found.queries[0], atol=2e-3, rtol=2e-3)
        normalised = clip.normalise(image.float() / 255)
        largest = sorted(pairs, key=lambda pair: (-int(masks[pair[1]].sum()), pair[1]))
        for slot, (q, n) in enumerate(largest[: cfg.align.crops]):
            assert kept["slots"][index, slot] == q
            crop = masked_crops(normalised, masks[n][None], clip.image_size)
            token = clip.encode_normalised(crop)[0]
            given = torch.tensor(kept["tokens"][index, slot]).float()
            torch.testing.assert_close(given, token, atol=1e-3, rtol=0)
        assert (kept["slots"][index, len(pairs) :] == -1).all()
        whole = clip.encode_image(image.float() / 255)[0]
        given = torch.tensor(kept["images"][index]).float()
        torch.testing.assert_close(given, whole, atol=1e-3, rtol=0)
    assert (kept["classes"] >= 0).any() and (kept["classes"] == EMPTY).any()


def writer(chain: MiniRun, world: World, published: Path, seed: int = 0) -> TaughtWriter:
    cfg = as_borrowed(chain.cfg, open_segmentor(str(published)))
    info = read_dataset_info(Path(cfg.data.root))
    device = choose_device("cpu")[0]
    session = Session(cfg, info, device, None, Processes(), SILENT)
    torch.manual_seed(seed)
    segmentor = on_top(open_segmentor(str(published)), cfg.model, world.clip.embed_dim)
    return TaughtWriter(session, segmentor, world.text, "test", world.clip, 3)


def test_an_unseen_segment_is_void_and_the_class_path_is_not_asked(
    chain: MiniRun, mini_world: Path, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit the same bank, whatever an unseen segment is called, or if it is none at all."""
    monkeypatch.setattr(query_bank, "VOID_SHARE", 0.01)
    world = World(mini_world)
    bank = writer(chain, world, published)
    found = bank.described(world.batch, world.to_trained)
    for other in (world.relabelled(), world.voided()):
        assert same(found, bank.described(other, world.to_trained)) == []
    again = writer(chain, world, published, seed=1)  # with another random class path
    assert same(found, again.described(world.batch, world.to_trained)) == []
    allowed = world.to_trained.clone()
    allowed[world.never] = 0  # and the test is no empty one: a trained label does matter
    assert {"classes", "slots", "tokens"} <= set(same(found, bank.described(world.batch, allowed)))
    assert (found["classes"] == IGNORED).any() and int(found["classes"].max()) < len(world.text)


def test_a_killed_run_goes_on_bit_for_bit(
    chain: MiniRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(query_bank, "SYNC_EVERY", 1)
    run = Run("killed", tmp_path)
    for what, at in (("bank train", 2), ("con", 5)):
        with pytest.raises(KilledError):
            train_con(chain.cfg, run, progress=Interrupt(what, at))
    heard = Heard()
    assert train_con(chain.cfg, run, progress=heard).finished
    assert any(line.startswith("resumed from step 4") for line in heard.lines)
    assert same(flat_state(run.stage("con")), flat_state(chain.run.stage("con"))) == []
    for name in COLUMNS:
        ours, theirs = (r.path / "bank" / "train" / f"{name}.npy" for r in (run, chain.run))
        assert (np.load(ours) == np.load(theirs)).all()


def test_a_segmentor_that_is_gone_or_another_is_told_of(
    chain: MiniRun, published: Path, tmp_path: Path
) -> None:
    path, folder = chain.run.weights_of("finetune"), published
    aside = tmp_path / "aside"
    shutil.move(folder, aside)
    try:
        with pytest.raises(UserError, match="cannot be opened") as caught:
            Predictor.load(path)
        assert str(folder) in caught.value.what and "Put it back there" in caught.value.hint
        other = m2f.their_model(m2f.swin_config())
        with torch.no_grad():
            other.class_predictor.bias.add_(1)
        other.save_pretrained(folder)
        with pytest.raises(UserError, match="another segmentor") as caught:
            restore(load_weights(path))
        assert f"segmentor={folder} --fresh" in caught.value.hint
        with pytest.raises(UserError, match="other segmentor"):
            train_con(chain.cfg, chain.run)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.move(aside, folder)
    assert isinstance(restore(load_weights(path)), OnBorrowed)


def test_what_nobody_chose_is_the_segmentors(chain: MiniRun, published: Path) -> None:
    found = open_segmentor(str(published))
    found.size, found.max_size = 640, 1024
    plain = replace(chain.cfg, infer=InferConfig())
    cfg = as_borrowed(plain, found)
    assert (cfg.infer.size, cfg.infer.max_size, cfg.infer.batch) == (640, 1024, 1)
    assert (cfg.model.width, cfg.model.queries) == (64, 12)
    assert as_borrowed(chain.cfg, found).infer == chain.cfg.infer
    facts = plan(plain, chain.run, None, None)
    assert "12 queries of width 64" in facts["segmentor"]


class Square(PublishedSegmentor):
    """Takes pictures of one size alone, and tells where they are bright."""

    width, count, padded = 4, 2, (96, 96)

    source = "square"

    def propose(self, images: torch.Tensor, padding: torch.Tensor | None) -> Proposals:
        assert images.shape[-2:] == self.padded
        masks = F.avg_pool2d(images.float().mean(1, keepdim=True), 4).expand(-1, 2, -1, -1)
        queries = torch.ones(len(images), 2, 4)
        return Proposals(masks, queries, queries)


def test_a_segmentor_of_one_size_is_given_padded_pictures(chain: MiniRun) -> None:
    model = on_top(Square(), chain.cfg.model, 8)
    images = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    masks = model(images, None, torch.eye(8)[:3]).mask_logits[0]
    torch.testing.assert_close(masks[:, 0], F.avg_pool2d(images.float().mean(1), 4))
    with pytest.raises(UserError, match="96x96 at most"):
        model(torch.zeros(1, 3, 128, 96, dtype=torch.uint8), None, torch.eye(8)[:3])


def test_a_listed_segmentor_brings_its_clip_unless_another_is_chosen() -> None:
    published = PublishedSegmentor()
    published.source, published.width, published.count = "photos", 256, 100
    cfg = as_borrowed(load_config("shapes"), published)
    assert (cfg.clip.model, cfg.clip.templates) == ("ViT-B-16", "vild")
    assert (cfg.infer.size, cfg.infer.max_size) == (800, 1333)
    chosen = load_config("shapes", ["clip.model=RN50", "clip.pretrained=openai"])
    assert as_borrowed(chosen, published).clip.model == "RN50"
