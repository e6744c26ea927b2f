"""The whole pipeline on a miniature world: CON, CAT, finetuning, any names, and prediction."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from jsonschema import Draft202012Validator
from mini import Heard, draw_world, metrics, mini_config
from PIL import Image

from concat_cli.core.build import part_of, restore_segmentor
from concat_cli.core.checkpoint import load_weights, save_weights
from concat_cli.core.clip.encoder import load_clip
from concat_cli.core.config import Config, ModelConfig
from concat_cli.core.config_file import from_dict
from concat_cli.core.data.dataset import PanopticDataset, read_dataset_info
from concat_cli.core.errors import UserError
from concat_cli.core.evaluate.report import load_schema
from concat_cli.core.evaluate.weights import evaluate_weights, unseen_among
from concat_cli.core.infer.predictor import Predictor
from concat_cli.core.model.segmentor import Segmentor
from concat_cli.core.runs import Run, find_weights
from concat_cli.methods.concat.cat import train_cat
from concat_cli.methods.concat.con import train_con
from concat_cli.methods.concat.finetune import finetune, fold_generator
from concat_cli.methods.concat.generator import restore_generator

PROJECTOR = {"segmentor.projector.layers.0.weight", "segmentor.projector.layers.0.bias"}


@pytest.fixture
def copied(mini_run, tmp_path) -> Run:
    """A copy of the finished run that a test may go on with."""
    shutil.copytree(mini_run.run.path, tmp_path / "runs" / "mini")
    return Run("mini", tmp_path / "runs")


def tensors(run: Run, stage: str) -> dict[str, torch.Tensor]:
    return load_weights(run.weights_of(stage)).tensors


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() <= after.keys()
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def test_every_stage_tells_what_it_is(mini_run):
    info = read_dataset_info(Path(mini_run.cfg.data.root))
    identity = load_clip(mini_run.cfg.clip, image_tower=False).identity
    seen = [e.name for e in info.vocabulary.entries if e.seen]
    unseen = [e.name for e in info.vocabulary.entries if not e.seen]
    for stage, taught in (("con", []), ("cat", []), ("finetune", unseen)):
        meta = load_weights(mini_run.run.weights_of(stage)).meta
        assert meta["stage"] == stage and meta["trained"] == seen and meta["taught"] == taught
        assert meta["clip"]["sha256"] == identity.sha256 and meta["clip"]["model"] == "tiny"
        assert [row["name"] for row in meta["vocabulary"]] == list(info.vocabulary.names)
        assert (meta["data"]["name"], meta["data"]["class_split"]) == ("shapes", "default")
        assert meta["data"]["filtering"]["unseen_pixels"] == "drop"
        assert meta["format"] == 1 and meta["step"] > 0
        assert from_dict(meta["config"]).data.root == mini_run.cfg.data.root


def test_a_later_stage_keeps_the_segmentor_and_adds_the_generator(mini_run):
    con, cat, last = (tensors(mini_run.run, s) for s in ("con", "cat", "finetune"))
    assert all(name.startswith("segmentor.") for name in con)
    assert changed(con, cat) == set()
    added = cat.keys() - con.keys()
    assert added and all(name.startswith("generator.") for name in added)
    assert last.keys() == cat.keys()


def test_only_the_projector_is_finetuned(mini_run):
    assert changed(tensors(mini_run.run, "cat"), tensors(mini_run.run, "finetune")) == PROJECTOR


def test_the_no_object_embedding_learns_by_option(mini_run, copied):
    cfg = replace(mini_run.cfg, finetune=replace(mini_run.cfg.finetune, no_object=True))
    finetune(cfg, copied, fresh=True)
    found = changed(tensors(copied, "cat"), tensors(copied, "finetune"))
    assert found == PROJECTOR | {"segmentor.classifier.no_object"}


def test_the_control_needs_no_generator(mini_run, copied):
    cfg = replace(mini_run.cfg, finetune=replace(mini_run.cfg.finetune, pseudo=False))
    finetune(cfg, copied, fresh=True)
    weights = load_weights(copied.weights_of("finetune"))
    assert changed(tensors(copied, "con"), weights.tensors) == PROJECTOR
    assert weights.meta["taught"] == [] and "segmentor" in weights.meta
    assert not any(name.startswith("generator.") for name in weights.tensors)


def test_any_names_any_number_of_times(mini_run, copied, tmp_path):
    files = {"one": "Solid  Circle\nstriped star\n", "two": "green water : stuff\ndotted ring\n"}
    before = copied.weights_of("finetune").read_bytes()
    info = read_dataset_info(Path(mini_run.cfg.data.root))
    image = PanopticDataset(info.part("val"), info.vocabulary)[0].image
    for stem, text in files.items():
        path = tmp_path / f"{stem}.txt"
        path.write_text(text)
        result = finetune(mini_run.cfg, copied, vocabulary=path)
        assert result.weights.parent == copied.path / f"finetune-{stem}"
        assert find_weights("mini", root=copied.root, vocabulary=path).path == result.weights
        prediction = Predictor.load(result.weights, path, "cpu")(image)
        assert prediction.panoptic_map.shape == image.shape[:2]
        assert len(prediction.vocabulary) == 2
    taught = {s: load_weights(copied.weights_of(f"finetune-{s}")).meta["taught"] for s in files}
    # names that were trained on, however they are written, need no pseudo queries
    assert taught == {"one": ["striped star"], "two": ["green water"]}
    assert copied.weights_of("finetune").read_bytes() == before


def test_finetuned_weights_may_be_taught_further(mini_run, tmp_path):
    """Those that were exported too: what they hold in half precision is widened."""
    source = tmp_path / "shipped.safetensors"
    found = load_weights(mini_run.run.weights_of("finetune"))
    halves = {k: t.half() if t.ndim > 1 else t for k, t in found.tensors.items()}
    save_weights(source, halves, found.meta)
    names = tmp_path / "more.txt"
    names.write_text("zebra\nsolid circle\n")
    run = Run("further", tmp_path / "runs")
    result = finetune(mini_run.cfg, run, vocabulary=names, weights=source, force=True)
    before, after = load_weights(source), load_weights(result.weights)
    assert any(t.dtype == torch.float16 for t in before.tensors.values())
    floats = [t for t in after.tensors.values() if t.is_floating_point()]
    assert floats and all(t.dtype == torch.float32 for t in floats)
    widened = {k: t.float() if t.is_floating_point() else t for k, t in before.tensors.items()}
    assert changed(widened, after.tensors) == PROJECTOR and after.tensors.keys() == widened.keys()
    assert after.meta["taught"] == [*before.meta["taught"], "zebra"]
    assert after.meta["segmentor"] == before.meta["segmentor"]


def test_the_control_cannot_be_taught_names(mini_run, copied, tmp_path):
    cfg = replace(mini_run.cfg, finetune=replace(mini_run.cfg.finetune, pseudo=False))
    control = finetune(cfg, copied, fresh=True).weights
    run = Run("further", tmp_path / "other")
    with pytest.raises(UserError, match="holds no generator"):
        finetune(mini_run.cfg, run, weights=control)
    assert not run.path.exists()


def test_names_that_clip_never_saw(mini_run, copied, tmp_path):
    path = tmp_path / "zoo.txt"
    path.write_text("zebra\n")
    with pytest.raises(UserError, match="zebra"):
        finetune(mini_run.cfg, copied, vocabulary=path)
    assert not (copied.path / "finetune-zoo").exists()
    finetune(mini_run.cfg, copied, vocabulary=path, force=True)
    assert load_weights(copied.weights_of("finetune-zoo")).meta["taught"] == ["zebra"]


def test_prediction_from_python(mini_run, tmp_path):
    weights = mini_run.run.weights_of("finetune")
    info = read_dataset_info(Path(mini_run.cfg.data.root))
    predictor = Predictor.load(weights, None, "cpu")
    assert predictor.vocabulary.names == info.vocabulary.names
    assert predictor.vocabulary.is_seen == info.vocabulary.is_seen  # told by the weights alone
    image = PanopticDataset(info.part("val"), info.vocabulary)[0].image
    Image.fromarray(image).resize((90, 50)).save(tmp_path / "photo.png")
    prediction = predictor(tmp_path / "photo.png")
    assert prediction.panoptic_map.shape == (50, 90)
    assert set(np.unique(prediction.panoptic_map)) <= {0, *(s.id for s in prediction.segments)}
    assert prediction.semantic_map.shape == (50, 90) and prediction.semantic_map.max() < 48


def test_evaluation_of_the_result(mini_run):
    report = evaluate_weights(mini_run.run.weights_of("finetune"), device="cpu")
    assert report.images == 12 and report.protocol["stage"] == "finetune"
    assert report.protocol["mode"] == "transductive" and report.protocol["setting"] == "generalised"
    assert report.panoptic["seen"] is not None and report.panoptic["unseen"] is not None
    unseen = read_dataset_info(Path(mini_run.cfg.data.root)).vocabulary.unseen_indices
    assert report.protocol["taught"] == len(unseen)


def test_the_mode_is_that_of_the_weights(mini_run, tmp_path):
    """No override changes it, and weights that were taught an unseen name are transductive."""
    con = load_weights(mini_run.run.weights_of("con"))
    config = con.meta["config"] | {"protocol": {"mode": "inductive"}}
    path = tmp_path / "own.safetensors"
    for taught, mode, count in (([], "inductive", 0), (["Striped  star", "zebra"], None, 1)):
        save_weights(path, con.tensors, con.meta | {"config": config, "taught": taught})
        told = evaluate_weights(path, ["protocol.mode=inductive"], device="cpu").protocol
        assert told["mode"] == (mode or "transductive") and told["taught"] == count
    said = evaluate_weights(mini_run.run.weights_of("finetune"), ["protocol.mode=inductive"])
    assert said.protocol["mode"] == "transductive"
    Draft202012Validator(load_schema()).validate(json.loads(json.dumps(said.to_json())))


def test_the_same_command_again_changes_nothing(mini_run, copied):
    for train, name in ((train_con, "con"), (train_cat, "cat"), (finetune, "finetune")):
        folder = copied.stage(name)
        before = {f: f.stat().st_mtime_ns for f in (folder.last, folder.state)}
        lines, said = folder.metrics.read_text(), Heard()
        result = train(mini_run.cfg, copied, progress=said)
        assert result.finished and result.steps == load_weights(folder.last).meta["step"]
        assert {f: f.stat().st_mtime_ns for f in before} == before
        assert folder.metrics.read_text() == lines and any("already done" in x for x in said.lines)
        assert result.figures


def test_training_leaves_metrics_pictures_and_a_best(mini_run):
    stage = mini_run.run.stage("con")
    rows = stage.read_metrics()
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "dev" in row] == [3, 6]
    wanted = {"class", "mask", "dice", "denoising_class", "denoising_mask", "denoising_dice"}
    wanted |= {"objectness", "dense", "align_instance", "align_image"}
    losses = [row for row in rows if "loss" in row]
    assert all(wanted <= row.keys() for row in losses)
    for row in losses:
        assert row["loss"] == pytest.approx(sum(row[name] for name in wanted), abs=1e-3)
    pictures = sorted(path.name for path in stage.previews.iterdir())
    assert pictures == ["step_000003.png", "step_000006.png"]
    assert all(np.asarray(Image.open(stage.previews / p)).std() > 0 for p in pictures)
    assert stage.best.exists() and load_weights(stage.best).meta["step"] in (3, 6)


def test_weights_of_another_stage(mini_run, tmp_path):
    con, cat, last = (mini_run.run.weights_of(s) for s in ("con", "cat", "finetune"))
    run = Run("other", tmp_path)
    for train, wrong in ((train_cat, cat), (train_cat, last), (finetune, con)):
        with pytest.raises(UserError, match="is of stage"):
            train(mini_run.cfg, run, weights=wrong)
    with pytest.raises(UserError, match="has no weights of stage con"):
        train_cat(mini_run.cfg, run)
    with pytest.raises(UserError, match="has no weights of stage cat"):
        finetune(mini_run.cfg, run)
    assert not run.path.exists()


def test_weights_of_another_clip(mini_run, copied):
    cfg = replace(mini_run.cfg, clip=replace(mini_run.cfg.clip, model="tiny-weak"))
    run = Run("other", copied.root)
    with pytest.raises(UserError, match="was trained with CLIP tiny"):
        train_cat(cfg, run, weights=copied.weights_of("con"))
    with pytest.raises(UserError, match="was trained with CLIP tiny"):
        finetune(cfg, run, weights=copied.weights_of("cat"))


def test_sizes_come_from_the_weights(mini_run, tmp_path):
    """`--weights X` works without X's configuration, and what is written can be read back."""
    wide = replace(mini_run.cfg, model=ModelConfig())
    run = Run("other", tmp_path)
    cat = train_cat(wide, run, weights=mini_run.run.weights_of("con")).weights
    assert restore_generator(load_weights(cat)).statistics.mean.shape == (32,)
    other = replace(wide, cat=Config().cat)
    last = load_weights(finetune(other, run, weights=cat).weights)
    assert restore_generator(last).statistics.mean.shape == (32,)
    assert restore_segmentor(last).query_decoder.width == 32


def test_labels_that_were_trained_on_stay_known(tmp_path):
    """Weights that saw every label, taken on with a split that calls some of them unseen."""
    everything = draw_world(tmp_path / "shapes-all", unseen="none", train=8, dev=2, val=2)
    split = draw_world(tmp_path / "shapes", train=8, dev=2, val=2)
    keys = ("optim.steps=0", "warmup.steps=0", "cat.fold=0", "cat.steps=1", "finetune.steps=1")
    first = train_con(mini_config(everything, *keys), Run("all", tmp_path / "runs")).weights
    run = Run("split", tmp_path / "runs")
    cat = train_cat(mini_config(split, *keys), run, weights=first).weights
    last = finetune(mini_config(split, *keys), run, weights=cat).weights
    for path in (cat, last):
        trained = load_weights(path).meta["trained"]
        assert len(trained) == 48 == len(set(trained))
        assert len(unseen_among(read_dataset_info(split), trained)) == 10


def test_a_missing_part_and_options_that_need_another(mini_world, tmp_path):
    run = Run("bad", tmp_path)
    for keys, word in (
        (("model.mask_pooling=false",), "mask_pooling"),
        (("model.token_queries=false", "loss.dense=0"), "token_queries"),
        (("model.token_queries=false", "loss.dense=0", "loss.denoising=0"), "warmup.masks"),
        (("model.token_queries=false", "loss.denoising=0"), "token_queries"),
    ):
        with pytest.raises(UserError, match=word):
            train_con(mini_config(mini_world, *keys), run)
    with pytest.raises(UserError, match="No prepared data set"):
        train_con(mini_config(tmp_path / "elsewhere"), run)
    assert not run.path.exists()


def first_losses(world: Path, folder: Path, *keys: str) -> list[dict[str, float]]:
    """The metrics of two steps of stage 1 without augmentation."""
    run = Run("-".join(keys) or "plain", folder)
    cfg = mini_config(world, "data.flip=0", "optim.steps=2", "warmup.steps=1", *keys)
    assert train_con(cfg, run, device="cpu").finished
    return [row for row in metrics(run.stage("con")) if "loss" in row]


def test_a_cached_teacher_says_what_the_teacher_says(tmp_path):
    def near(rows):  # sums may differ in their last digit, where a process's memory lies otherwise
        return [pytest.approx(row, rel=1e-4) for row in rows]

    world = draw_world(tmp_path / "shapes")
    online = first_losses(world, tmp_path)
    assert first_losses(world, tmp_path, "align.source=cache") == near(online)
    files = {path: path.stat().st_size for path in world.rglob("*.tokens")}
    assert files and all(files.values())
    again = first_losses(world, tmp_path, "align.source=cache", "optim.save_every=1")
    assert again == near(online)  # and nothing was encoded twice
    assert {path: path.stat().st_size for path in world.rglob("*.tokens")} == files


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_stays_near(mini_world, tmp_path, precision):
    """The same images and points; half-precision features move the losses by a few percent."""
    keys = ("warmup.steps=0", "optim.steps=1")
    exact = first_losses(mini_world, tmp_path, *keys)[0]
    lower = first_losses(mini_world, tmp_path, *keys, f"optim.precision={precision}")[0]
    assert lower["loss"] != exact["loss"] == pytest.approx(lower["loss"], rel=0.1)
    assert lower["class"] == pytest.approx(exact["class"], rel=0.1)


@pytest.mark.parametrize(
    "keys",
    [
        ("optim.channels_last=true", "align.pooling=matched", "align.detach=true"),
        ("model.detach_class_path=true", "align.pooling=objectness", "model.projector_layers=2"),
        ("loss.truth=0.5", "warmup.align=false", "warmup.masks=0", "data.scale_min=0.5",
         "data.colour=0.3"),
        ("model.pixel_decoder=deformable", "model.token_queries=false", "model.mask_pooling=false",
         "warmup.steps=0", "warmup.masks=0", "loss.dense=0", "loss.denoising=0",
         "optim.ema=0"),
    ],
)  # fmt: skip
def test_options_of_stage_1_run(mini_world, tmp_path, keys):
    rows = first_losses(mini_world, tmp_path, *keys)
    assert [row["step"] for row in rows] == [1, 2] and all(row["loss"] > 0 for row in rows)


@pytest.mark.parametrize(
    "keys",
    [
        ("cat.noise=analogy", "finetune.unseen_per_step=3"),
        ("finetune.optimiser=sgd", "finetune.layers=all"),
        ("bank.views=2", "bank.images=10", "finetune.calibrate=true", "cat.cycle=0"),
    ],
)
def test_options_of_the_later_stages_run(mini_run, tmp_path, keys):
    run = Run("options", tmp_path)
    cfg = mini_config(Path(mini_run.cfg.data.root), *keys)
    cat = train_cat(cfg, run, weights=mini_run.run.weights_of("con"))
    last = finetune(cfg, run)
    assert cat.finished and last.finished and np.isfinite(list(last.figures.values())).all()
    meta = load_weights(last.weights).meta
    if cfg.finetune.calibrate:  # the offset travels with the weights
        assert meta["config"]["infer"]["seen_offset"] == last.figures["seen_offset"]
        assert Predictor.load(last.weights).cfg.seen_offset == last.figures["seen_offset"]
    segmentor, kept = (load_weights(p).tensors for p in (run.weights_of("cat"), last.weights))
    assert changed(segmentor, kept) == PROJECTOR


def test_calibration_takes_the_generator_that_never_saw_the_fold(mini_run, tmp_path):
    """CAT's own of the fold run; where it is not there or knows this fold, that is said."""
    cat = mini_run.run.stage("cat")
    source, cfg = load_weights(mini_run.run.weights_of("cat")), mini_run.cfg
    inner = cat.inner("fold").weights
    assert inner is not None
    heard = Heard()
    found = fold_generator(source, cfg, heard).state_dict()
    wanted = part_of(load_weights(inner), "generator")
    assert not heard.lines and all(torch.equal(found[key], wanted[key]) for key in wanted)
    final = part_of(source, "generator")
    assert any(not torch.equal(final[key], wanted[key]) for key in wanted)
    copy = tmp_path / "last.safetensors"
    copy.write_bytes(source.path.read_bytes())
    other_fold = mini_config(Path(cfg.data.root), "cat.seed=1")
    for weights, asked in ((load_weights(copy), cfg), (source, other_fold)):
        heard = Heard()
        found = fold_generator(weights, asked, heard).state_dict()
        assert all(torch.equal(found[key], final[key]) for key in final)
        assert len(heard.lines) == 1 and "optimistic" in heard.lines[0]


def test_the_segmentor_of_a_file_has_its_own_type(mini_run):
    weights = load_weights(mini_run.run.weights_of("con"))
    restored = restore_segmentor(weights)
    assert isinstance(restored, Segmentor) and not restored.training
    assert restored.state_dict().keys() == part_of(weights, "segmentor").keys()
    with pytest.raises(UserError, match="holds no generator"):
        part_of(weights, "generator")
