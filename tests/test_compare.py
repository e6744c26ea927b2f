"""Runs side by side: the same images for all, paired differences, and what a prediction costs."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from mini import draw_world
from torch import nn

from concat_cli.commands import compare as command
from concat_cli.core.build import restore_segmentor
from concat_cli.core.checkpoint import load_weights, save_weights
from concat_cli.core.clip.encoder import load_clip
from concat_cli.core.config import ClipConfig, InferConfig
from concat_cli.core.errors import UserError
from concat_cli.core.evaluate import compare as module
from concat_cli.core.evaluate import cost as costs
from concat_cli.core.evaluate.compare import Comparison, Entry, compare_runs, parse_entry
from concat_cli.core.evaluate.cost import Cost, measure_cost
from concat_cli.core.evaluate.intervals import Interval
from concat_cli.core.evaluate.scores import Scoring
from concat_cli.core.evaluate.weights import evaluate_weights
from concat_cli.core.infer.predictor import Predictor
from concat_cli.core.runs import BUILT_IN
from concat_cli.core.vocabulary import ClassEntry, Vocabulary
from concat_cli.methods.clip_zss.config import ClipZssConfig
from concat_cli.methods.clip_zss.student import build_student
from concat_cli.methods.zegformer.config import ZegFormerConfig
from concat_cli.methods.zegformer.predictor import ZegFormerPredictor

WORLD = {"train": 3, "dev": 1, "val": 8, "size": 64}
SMALL = ("infer.size=64", "infer.min_score=0.3")
CHEAP = Cost(1_234_567, False, {"semantic": 12.345, "panoptic": 10.0}, 321.4, "cpu", 1)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small worlds: as ever, unseen pixels void, another split, other scenes."""
    root = tmp_path_factory.mktemp("worlds")
    options = {"drop": {}, "void": {"unseen_pixels": "void"}, "split": {"unseen_seed": 1}}
    options["scenes"] = {"seed": 5}
    return {k: draw_world(root / f"shapes-{k}", **WORLD, **v) for k, v in options.items()}


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process is started to measure."""
    monkeypatch.setattr(module, "measure_cost", lambda *_: CHEAP)


def entry(label: str, world: Path, *keys: str, weights: Path = BUILT_IN) -> Entry:
    return Entry(label, weights, (f"data.root={world}", *SMALL, *keys))


def trained_on(world: Path, path: Path, mode: str = "transductive") -> Path:
    """The built-in weights, as if they had been trained on that world, in that mode."""
    weights = load_weights(BUILT_IN)
    config = json.loads(json.dumps(weights.meta["config"]))
    config["data"]["root"], config["protocol"]["mode"] = str(world), mode
    taught = weights.meta["taught"] if mode == "transductive" else []
    save_weights(path, weights.tensors, weights.meta | {"config": config, "taught": taught})
    return path


# --- what is compared -------------------------------------------------------------------------


def test_runs_are_read_with_labels_and_overrides(tmp_path: Path) -> None:
    for name in ("demo", "other"):
        (tmp_path / name / "con").mkdir(parents=True)
        (tmp_path / name / "con" / "last.safetensors").touch()
    con = tmp_path / "demo" / "con"
    file = con / "last.safetensors"
    seg = ("zegformer.branch=segment",)
    for text, expected in {
        "demo": Entry("demo", file),
        "A b=demo": Entry("A b", file),
        "demo:zegformer.branch=segment": Entry("demo:zegformer.branch=segment", file, seg),
        "seg=demo:zegformer.branch=segment": Entry("seg", file, seg),
        "x=demo:optim.step_at=0.5,0.9,infer.size=64": Entry(
            "x", file, ("optim.step_at=0.5,0.9", "infer.size=64")
        ),
        str(file): Entry(str(file), file),
        f"w={file}:infer.size=64": Entry("w", file, ("infer.size=64",)),
        f"stage={con}": Entry("stage", file),
        f"run={tmp_path / 'demo'}": Entry("run", file),
    }.items():
        assert parse_entry(text, tmp_path) == expected, text


@pytest.mark.parametrize(
    ("text", "what", "hint"),
    [
        ("nothing", "Run nothing has no weights", "train-con --name nothing"),
        ("x=nothing:infer.size=64", "Run nothing has no weights", "train-con"),
        ("demo:branch=segment", "does not read as a run", "RUN:section.key=value"),
        ("demo:segment", "does not read as a run", "RUN:section.key=value"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path: Path, text: str, what: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_entry(text, tmp_path)
    assert what in caught.value.what and hint in caught.value.hint


def test_what_cannot_be_compared_is_refused_before_anything_is_scored(
    worlds: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scored(*_: object, **__: object) -> None:
        raise AssertionError("scored")

    monkeypatch.setattr(module, "evaluate_weights", scored)
    first = entry("first", worlds["drop"])
    renamed = draw_world(tmp_path / "shapes-renamed", **WORLD)
    for path in (renamed / "annotations").glob("*.json"):
        path.write_text(path.read_text().replace('"striped star"', '"striped comet"'))
    header = renamed / "dataset.json"
    header.write_text(header.read_text().replace('"striped star"', '"striped comet"'))
    for other, what in (
        (entry("other", worlds["scenes"]), f"the images of {worlds['drop']}, and those of"),
        (entry("other", worlds["split"]), "class split default, and seed-1; seen in one of them: "),
        (entry("other", renamed), "48 classes of shapes, and 48 of shapes"),
    ):
        with pytest.raises(UserError) as caught:
            compare_runs([first, other])
        assert "first and other" in caught.value.what and what in caught.value.what
        assert f"data.root={worlds['drop']}" in caught.value.hint
    with pytest.raises(UserError, match="Two runs are called first"):
        compare_runs([first, entry("first", worlds["void"])])
    with pytest.raises(UserError, match=r"unknown key 'infer\.sise'"):
        compare_runs([first, entry("other", worlds["drop"], "infer.sise=64")])


# --- the table --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(worlds: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """The built-in weights, the same on the void world, and with an offset, as if trained there."""
    folder = tmp_path_factory.mktemp("weights")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "measure_cost", lambda *_: CHEAP)
        one = trained_on(worlds["drop"], folder / "one.safetensors")
        two = trained_on(worlds["void"], folder / "two.safetensors", "inductive")
        return compare_runs(
            [
                entry("first", worlds["drop"], weights=one),
                entry("same", worlds["void"], weights=one),
                entry("off|set", worlds["drop"], "infer.seen_offset=9", weights=two),
            ],
            device="cpu",
            bootstraps=50,
        )


def test_figures_are_those_of_the_evaluation(found: Comparison, worlds: dict[str, Path]) -> None:
    keys = (f"data.root={worlds['drop']}", *SMALL)
    report = evaluate_weights(BUILT_IN, keys, Scoring(bootstraps=50), device="cpu")
    row = found.rows[0]
    assert (found.images, found.seen, found.unseen, found.repeats) == (8, 38, 10, 50)
    for group in ("seen", "unseen", "harmonic"):
        assert row.pq[group] == Interval(report.panoptic[group].pq, *report.intervals.pq[group])
        value = report.semantic[group].miou
        assert row.miou[group] == Interval(value, *report.intervals.miou[group])
    assert found.rows[1].pq == row.pq  # val is the same, whatever train is
    assert json.loads(json.dumps(found.to_json()))["rows"][0]["cost"]["parameters"] == 1_234_567


def test_differences_are_to_the_first(found: Comparison) -> None:
    same, offset = found.differences
    assert (same.label, same.minus, offset.label) == ("same", "first", "off|set")
    assert {*same.pq.values(), *same.miou.values()} == {Interval(0.0, 0.0, 0.0)}
    for group, interval in offset.miou.items():
        first, other = (found.rows[i].miou[group] for i in (0, 2))
        assert first and other and interval
        assert interval.value == pytest.approx(other.value - first.value)
        assert interval.low <= interval.value <= interval.high
    assert offset.pq["seen"] and offset.pq["seen"].high < 0  # seen classes hardly stand a chance


def test_weights_that_name_pixels_have_no_pq(
    worlds: dict[str, Path], tmp_path: Path, cheap: None
) -> None:
    """An untrained student of CLIP-ZSS beside the built-in segmentor."""
    weights = load_weights(BUILT_IN)
    student = build_student(ClipZssConfig(), load_clip(ClipConfig()).embed_dim)
    tensors = {f"student.{name}": tensor for name, tensor in student.state_dict().items()}
    path = tmp_path / "student.safetensors"
    save_weights(path, tensors, weights.meta | {"stage": "clip_zss"})
    runs = [entry("student", worlds["void"], weights=path), entry("ours", worlds["void"])]
    found = compare_runs(runs, device="cpu", bootstraps=10, limit=4)
    assert found.rows[0].stage == "clip_zss"
    assert set(found.rows[0].pq.values()) == set(found.differences[0].pq.values()) == {None}
    assert found.rows[1].pq["seen"] and found.rows[0].miou["seen"]
    assert found.differences[0].miou["seen"].value > 0  # untrained
    assert "| student | - | - | - |" in command.markdown(found)


def test_unlike_training_is_noted(found: Comparison, worlds: dict[str, Path]) -> None:
    parts, names, offsets = found.notes
    assert f"first: {worlds['drop']} (unseen pixels: drop)" in parts
    assert f"off|set: {worlds['void']} (unseen pixels: void)" in parts
    assert "first: known in training" in names and "first: 0; same: 0; off|set: 9" in offsets


def test_like_training_is_not_noted(worlds: dict[str, Path], cheap: None) -> None:
    """The built-in weights name a folder that need not be here."""
    runs = [entry(name, worlds["drop"]) for name in "ab"]
    quick = compare_runs(runs, device="cpu", bootstraps=10, limit=2)
    assert quick.notes == () and quick.images == 2


def test_what_is_shown_and_written(found: Comparison) -> None:
    text = command.markdown(found)
    first = found.rows[0].pq["seen"]
    assert first is not None
    shown = f"{100 * first.value:.1f} [{100 * first.low:.1f}, {100 * first.high:.1f}]"
    assert f"| first | {shown} |" in text and "| off\\|set |" in text
    assert "| 1.23 | 12.3 | 321 | no |" in text
    assert "| same | +0.0 [0.0, 0.0] |" in text and "| minus first |" in text
    assert text.count("not alike: ") == 3 and "8 images of shapes, 38 seen" in text
    dense = replace(found.rows[0], pq=dict.fromkeys(("seen", "unseen", "harmonic")))
    without = replace(found, rows=(dense,), differences=())
    assert "| first | - | - | - |" in command.markdown(without)
    assert "no PQ: " in command.markdown(without) and "no PQ: " not in text


def test_the_command_writes_the_table(
    worlds: dict[str, Path], tmp_path: Path, cheap: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run = f"only={BUILT_IN}:data.root={worlds['drop']},infer.size=64"
    options = {"bootstrap": 10, "limit": 1, "device": command.Device.cpu}
    command.compare(runs=[run], out=tmp_path / "shown", as_json=False, **options)
    assert f"{tmp_path / 'shown' / 'compare.md'}" in capsys.readouterr().out.replace("\n", "")
    command.compare(runs=[run], out=tmp_path / "out", as_json=True, **options)
    said = json.loads(capsys.readouterr().out)
    assert said == json.loads((tmp_path / "out" / "compare.json").read_text())
    assert said["rows"][0]["label"] == "only" and said["differences"] == []
    assert (tmp_path / "out" / "compare.md").read_text().startswith("| run | seen PQ |")


# --- cost -------------------------------------------------------------------------------------


def test_the_cost_is_measured_in_a_process_of_its_own(worlds: dict[str, Path]) -> None:
    found = measure_cost(BUILT_IN, (f"data.root={worlds['drop']}", *SMALL), "cpu")
    segmentor = restore_segmentor(load_weights(BUILT_IN))
    assert found.parameters == sum(p.numel() for p in segmentor.parameters())
    assert not found.clip_image and found.device == "cpu"
    assert all(found.images_per_second[task] > 0 for task in ("semantic", "panoptic"))
    assert found.peak_mib is not None and 10 < found.peak_mib < 1000


def dies(*_: object) -> None:
    os._exit(9)


def test_mistakes_and_deaths_of_that_process_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one that is forked, as a new interpreter imports for seconds before anything happens."""
    monkeypatch.setattr(costs, "get_context", lambda _: get_context("fork"))
    with pytest.raises(UserError, match="There is no file none") as caught:
        measure_cost(Path("none"))
    assert caught.value.hint
    monkeypatch.setattr(costs, "cost_here", dies)
    with pytest.raises(UserError, match="died"):
        measure_cost(BUILT_IN)


class Countdown(Predictor):
    """Counts what it is asked for."""

    def __init__(self, tasks: tuple[str, ...]) -> None:
        self.tasks, self.calls = tasks, {"raw": 0, "semantic": 0, "panoptic": 0}

    def raw(self, images):
        self.calls["raw"] += len(images)
        return iter([None])

    def semantic(self, raw, offset=None):
        self.calls["semantic"] += 1
        return []

    def panoptic(self, raw, offset=None):
        self.calls["panoptic"] += 1
        return []


def test_every_image_is_timed_alone_and_tasks_that_are_not_there_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    both = Countdown(("panoptic", "semantic", "instance"))
    speed = costs.images_per_second(both, [0, 1, 2])
    times = costs.WARM_UP + 3 * costs.REPEATS
    assert both.calls == {"raw": times, "semantic": times, "panoptic": times}
    assert speed["semantic"] and speed["panoptic"]
    dense = Countdown(("semantic",))
    speed = costs.images_per_second(dense, [0])
    assert dense.calls["panoptic"] == 0 and speed["panoptic"] is None and speed["semantic"]
    monkeypatch.setattr(costs, "BUDGET", 0.0)
    slow = Countdown(("semantic",))
    costs.images_per_second(slow, [0, 1, 2])
    assert slow.calls["raw"] == costs.WARM_UP + 3  # each image once


def test_clips_image_encoder_counts_where_it_runs() -> None:
    clip = load_clip(ClipConfig())
    names = Vocabulary((ClassEntry("star", 1), ClassEntry("ring", 2)))
    text, model = torch.eye(2, clip.embed_dim), nn.Linear(3, 5)
    own = 3 * 5 + 5
    tower = sum(p.numel() for p in clip.model.visual.parameters())
    for branch, expected in (("segment", own), ("image", own + tower), ("fusion", own + tower)):
        way = ZegFormerConfig(branch=branch)
        predictor = ZegFormerPredictor(
            model, text, names, InferConfig(), way=way, clip=clip, image_text=text
        )
        assert predictor.parameters == expected
        assert predictor.needs_clip_image == (branch != "segment")
