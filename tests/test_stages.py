"""What a stage refuses before it leaves anything behind, and what it notices has changed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from data_helpers import edit_json
from mini import Heard, Interrupt, KilledError, draw_world, metrics, mini_config

from concat_cli.app import main
from concat_cli.commands import train
from concat_cli.core.checkpoint import load_weights, save_weights
from concat_cli.core.config import Config, ShapesConfig
from concat_cli.core.config_file import load_config
from concat_cli.core.data.dataset import read_dataset_info
from concat_cli.core.errors import UserError
from concat_cli.core.evaluate.scores import Scoring
from concat_cli.core.evaluate.weights import evaluate_weights
from concat_cli.core.method import stages
from concat_cli.core.prepare.shapes import differing_keys
from concat_cli.core.runs import Run
from concat_cli.core.train import session as sessions
from concat_cli.core.train.distributed import Processes
from concat_cli.core.train.loop import StageResult
from concat_cli.core.train.plan import describe
from concat_cli.core.train.session import Session, check_world
from concat_cli.methods.concat.cat import train_cat
from concat_cli.methods.concat.con import train_con
from concat_cli.methods.concat.finetune import finetune


@pytest.fixture
def copied(mini_run, tmp_path: Path) -> Run:
    shutil.copytree(mini_run.run.path, tmp_path / "runs" / "mini")
    return Run("mini", tmp_path / "runs")


def changed(cfg: Config, section: str, **values: Any) -> Config:
    return replace(cfg, **{section: replace(getattr(cfg, section), **values)})


# --- nothing is left behind -------------------------------------------------------------------


def test_a_refused_stage_1_leaves_no_folder(mini_run, tmp_path):
    run, cfg = Run("bad", tmp_path), mini_run.cfg
    for bad in (
        changed(cfg, "optim", batch_size=3),
        changed(cfg, "clip", model="no-such-clip"),
        changed(cfg, "model", backbone="no-such-backbone"),
    ):
        with pytest.raises(UserError):
            train_con(bad, run, device="cpu")
        assert not run.path.exists()


def test_a_refused_later_stage_leaves_no_folder(mini_run, tmp_path):
    cfg = changed(mini_run.cfg, "clip", model="tiny-weak")
    run = Run("bad", tmp_path)
    for stage, source in ((train_cat, "con"), (finetune, "cat")):
        with pytest.raises(UserError, match="was trained with CLIP tiny"):
            stage(cfg, run, weights=mini_run.run.weights_of(source), device="cpu")
        assert not run.path.exists()


def test_a_later_stage_loads_no_clip_where_its_texts_are_cached(copied, mini_run, monkeypatch):
    again = finetune(mini_run.cfg, copied, device="cpu", fresh=True)
    monkeypatch.setattr(sessions, "text_clip", lambda *_: pytest.fail("CLIP was loaded"))
    without = finetune(mini_run.cfg, copied, device="cpu", fresh=True)
    assert without.weights and again.weights
    clips = [load_weights(one.weights).meta["clip"] for one in (again, without)]
    assert clips[0] == clips[1]


@pytest.mark.parametrize("text", ["zebra\n", "ring\nring\n", ""])
def test_a_refused_vocabulary_leaves_no_folder(mini_run, copied, tmp_path, text):
    path = tmp_path / "zoo.txt"
    path.write_text(text)
    with pytest.raises(UserError):
        finetune(mini_run.cfg, copied, vocabulary=path, device="cpu")
    assert not (copied.path / "finetune-zoo").exists()


# --- what is noticed --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "striped star\n",
        "striped star, star\nring\n",
        "striped star\nring : stuff\n",
        "ring, disc\n",
    ],
)
def test_another_content_of_a_vocabulary_file_is_noticed(mini_run, copied, tmp_path, text):
    path = tmp_path / "some.txt"
    path.write_text("striped star\nring\n")
    first = finetune(mini_run.cfg, copied, vocabulary=path, force=True, device="cpu")
    path.write_text("# the same\nstriped  star : thing\n\nring\n")
    again = finetune(mini_run.cfg, copied, vocabulary=path, force=True, device="cpu")
    assert again.finished and again.weights == first.weights
    path.write_text(text)
    with pytest.raises(UserError, match="made from other vocabulary") as caught:
        finetune(mini_run.cfg, copied, vocabulary=path, force=True, device="cpu")
    assert "--fresh" in caught.value.hint
    assert finetune(
        mini_run.cfg, copied, vocabulary=path, force=True, fresh=True, device="cpu"
    ).finished


def test_stage_1_notices_other_data(mini_run, tmp_path):
    """Also where only the warm-up was begun: nothing of it may be gone on with."""
    root = tmp_path / "shapes"
    shutil.copytree(mini_run.cfg.data.root, root)
    run = Run("data", tmp_path / "runs")
    cfg = changed(mini_run.cfg, "data", root=str(root))
    with pytest.raises(KilledError):
        train_con(cfg, run, device="cpu", progress=Interrupt("con", 1))
    header, listing = root / "dataset.json", read_dataset_info(root).part("train").index
    before = header.read_text(), listing.read_text()
    raw = json.loads(before[0])
    header.write_text(json.dumps(raw | {"unseen": raw["unseen"][1:]}))
    # a world that does not tell how it was drawn is taken as it is
    header.write_text(json.dumps(json.loads(header.read_text()) | {"source": {}}))
    with pytest.raises(UserError, match="made from other classes than") as caught:
        train_con(cfg, run, device="cpu")
    assert "--fresh" in caught.value.hint
    header.write_text(before[0])
    content = json.loads(before[1])
    listing.write_text(json.dumps(content | {"annotations": content["annotations"][:-1]}))
    with pytest.raises(UserError, match="made from other training images than"):
        train_con(cfg, run, device="cpu")
    listing.write_text(before[1])
    assert train_con(cfg, run, device="cpu").finished


def test_a_dry_run_of_the_control_looks_for_stage_1(mini_run, tmp_path):
    run = Run("plan", tmp_path)
    shutil.copytree(mini_run.run.stage("con").path, run.stage("con").path)
    cfg = mini_run.cfg
    assert "train-cat" in describe("finetune", cfg, run)["weights"]
    facts = describe("finetune", changed(cfg, "finetune", pseudo=False), run)
    assert "stage con" in facts["weights"]


def test_lines_of_a_killed_inner_loop_do_not_stay(mini_run, tmp_path):
    """Nothing is saved before the warm-up ends: its lines are written anew, each step once."""
    run = Run("broken", tmp_path)
    cfg = replace(mini_run.cfg, warmup=replace(mini_run.cfg.warmup, steps=4))
    with pytest.raises(KilledError):
        train_con(cfg, run, device="cpu", progress=Interrupt("con", 3))
    inner = run.stage("con").inner("warmup")
    assert (run.stage("con").title, inner.title) == ("con", "con warmup")
    before = metrics(inner)
    assert [row["step"] for row in before] == [1, 2, 3] and not inner.state.exists()
    assert train_con(cfg, run, device="cpu").finished
    assert [row["step"] for row in metrics(inner)] == [1, 2, 3, 4]
    assert metrics(inner)[:3] == before


def test_other_processes_wait_for_the_folder(mini_run, tmp_path, monkeypatch):
    """The first process opens it before the wait, the others touch nothing."""
    order: list[str] = []
    monkeypatch.setattr(sessions, "wait", lambda: order.append("wait"))
    info = read_dataset_info(Path(mini_run.cfg.data.root))
    for rank in (0, 1):
        run = Run(f"rank{rank}", tmp_path)
        processes = Processes(rank, 2, rank)
        surroundings: Any = (mini_run.cfg, info, None, None, processes, None)
        stage = Session(*surroundings).open_stage(run.stage("con"))
        assert stage.path.exists() == (rank == 0)
    assert order == ["wait", "wait"]


# --- the built-in world -----------------------------------------------------------------------


def test_a_world_drawn_otherwise_is_refused(mini_run, mini_world, tmp_path):
    """The message says what differs, and its hint leads to what is there."""
    run = Run("other", tmp_path)
    cfg = changed(mini_run.cfg, "shapes", train=99, unseen_seed=3)
    with pytest.raises(UserError, match=r"shapes\.train is 24, not 99") as caught:
        train_con(cfg, run, device="cpu")
    assert "shapes.unseen_seed is -1, not 3" in caught.value.what
    assert "Give shapes.train=24 shapes.unseen_seed=-1 to train" in caught.value.hint
    with pytest.raises(UserError, match=r"shapes\.train"):
        describe("con", cfg, run)
    assert not run.path.exists()
    keys = caught.value.hint.split("Give ")[1].split(" to train")[0].split()
    followed = load_config(None, [f"shapes.{k}={v}" for k, v in vars(cfg.shapes).items()] + keys)
    check_world(
        replace(followed, data=replace(followed.data, root=str(mini_world))),
        read_dataset_info(mini_world),
    )


def test_only_a_built_in_world_is_compared(mini_world, tmp_path):
    """Another folder name, or a data set that does not tell, is taken as it is."""
    info = read_dataset_info(mini_world)
    other = load_config(None, ["data.root=somewhere/else", "shapes.seed=5"])
    check_world(other, info)
    named = replace(other, data=replace(other.data, root="data/shapes"))
    check_world(named, replace(info, source={}))
    check_world(named, replace(info, source={"train": 1}))
    with pytest.raises(UserError, match=r"shapes\.seed"):
        check_world(named, info)


def test_the_order_of_unseen_names_is_no_difference(tmp_path):
    names = "striped star; green water"
    root = draw_world(tmp_path / "shapes", unseen=names, train=2, dev=1, val=1)
    source = read_dataset_info(root).source
    world = ShapesConfig(unseen="green water;striped star", train=2, dev=1, val=1, size=64)
    assert differing_keys(source, world) == {}
    assert list(differing_keys(source, replace(world, unseen="striped star"))) == ["unseen"]
    assert mini_config(root).shapes.unseen == names


# --- names, and what comes next ---------------------------------------------------------------


class Until(Heard):
    """Ends a stage once that is said, before it costs time."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def say(self, message: str) -> None:
        if self.what in message:
            raise KilledError(message)


def evaluated(cfg: Config, run: Run, *, force: bool, weights: Path, **how: Any) -> None:
    scoring = Scoring(force=force)
    evaluate_weights(weights, [f"data.root={cfg.data.root}"], scoring, **how)


@pytest.mark.parametrize(
    ("stage", "source"),
    [(train_con, ""), (train_cat, "con"), (finetune, "cat"), (evaluated, "finetune")],
)
def test_words_of_the_data_that_clip_never_saw(mini_run, tmp_path, stage, source):
    """An error of every command; with --force they are said, and it goes on."""
    root = tmp_path / "data"
    shutil.copytree(mini_run.cfg.data.root, root)
    for path in root.glob("annotations/*.json"):
        edit_json(path, lambda content: content["categories"][0].update(name="a zebra"))
    run, cfg = Run("zoo", tmp_path / "runs"), changed(mini_run.cfg, "data", root=str(root))
    given = {"weights": mini_run.run.weights_of(source)} if source else {}
    with pytest.raises(UserError, match="never seen: 'zebra'") as caught:
        stage(cfg, run, force=False, device="cpu", **given)
    assert "--force" in caught.value.hint and not run.path.exists()
    until = Until("never seen: zebra (--force)")
    with pytest.raises(KilledError):
        stage(cfg, run, force=True, device="cpu", progress=until, **given)


def test_every_training_command_takes_force():
    assert all("force" in stage.options for _, stage in stages() if stage.command)


def test_names_taught_as_one_class_are_doubted(mini_run, copied, tmp_path):
    path = tmp_path / "some.txt"
    path.write_text("ring, star, cross\n")
    with pytest.raises(KilledError, match="read as 1 class with 2 synonyms"):
        finetune(mini_run.cfg, copied, vocabulary=path, device="cpu", progress=Until("read as 1"))
    plan = describe("finetune", mini_run.cfg, copied, vocabulary=path)
    assert "read as 1 class with 2 synonyms" in plan["teaches"]


@pytest.mark.parametrize(("unseen", "following"), [(True, "train-cat"), (False, "evaluate")])
def test_the_next_step_is_that_of_the_data(
    mini_run, tmp_path, monkeypatch, capsys, unseen, following
):
    """Without unseen classes there is nothing to generate."""
    weights = load_weights(mini_run.run.weights_of("con"))
    rows = [row | {"seen": row["seen"] or not unseen} for row in weights.meta["vocabulary"]]
    path = tmp_path / "w.safetensors"
    save_weights(path, weights.tensors, weights.meta | {"vocabulary": rows})
    result = StageResult(path, 6, 1.0, True, {})
    monkeypatch.setattr(train, "loaded", lambda _: lambda *_, **__: result)
    monkeypatch.chdir(tmp_path)
    assert main(["train-con", "--name", "next"]) == 0
    assert f"concat {following} --name next" in capsys.readouterr().out
