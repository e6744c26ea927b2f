"""Run folders: resuming, diffs, `--fresh`, and where weights are found."""

from __future__ import annotations

from pathlib import Path

import pytest

from concat_cli.core.checkpoint import save_weights
from concat_cli.core.config_file import load_config
from concat_cli.core.errors import UserError
from concat_cli.core.files import write_json
from concat_cli.core.runs import Run, StageDir, find_weights, relevant_diff, unread


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def teach(run: Run, names: str) -> Path:
    """Weights that were taught the names of some `pets.txt`."""
    stage = run.stage("finetune-pets")
    clip = {"model": "tiny", "pretrained": "", "sha256": ""}
    meta = {"format": 1, "stage": "finetune", "config": {}, "trained": [], "clip": clip}
    save_weights(stage.last, {}, meta | {"vocabulary": []})
    write_json(stage.inputs_json, {"weights": "a", "vocabulary": names})
    return stage.last


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run("some", tmp_path / "runs")


def test_the_same_config_resumes(run: Run) -> None:
    cfg = load_config(None, ["optim.lr=0.5"])
    stage = run.stage("con").open(cfg)
    touch(stage.state)
    stage.append_metrics({"step": 1})
    again = run.stage("con").open(load_config(None, ["optim.lr=0.5", "optim.log_every=3"]))
    assert again.state.exists() and again.read_metrics() == [{"step": 1}]
    assert load_config(again.config_yaml).optim.log_every == 3


def test_a_changed_config_stops_with_a_diff(run: Run) -> None:
    stage = run.stage("con").open(load_config(None))
    with pytest.raises(UserError) as caught:
        run.stage("con").open(load_config(None, ["optim.lr=0.5", "optim.steps=7"]))
    assert "optim.steps: 1000 -> 7; optim.lr: 0.001 -> 0.5" in caught.value.what
    assert "--fresh" in caught.value.hint
    assert load_config(stage.config_yaml) == load_config(None)


@pytest.mark.parametrize(
    ("stage", "override", "matters"),
    [
        ("con", "model.width=64", True),
        ("con", "data.crop=64", True),
        ("con", "data.workers=3", False),
        ("con", "optim.per_device=2", False),
        ("con", "cat.steps=3", False),
        ("con", "finetune.steps=3", False),
        ("con", "infer.min_score=0.1", True),
        ("con", "infer.batch=3", False),
        ("cat", "optim.seed=3", True),
        ("cat", "loss.points=64", True),
        ("cat", "infer.size=64", True),
        ("cat", "infer.batch=3", False),
        ("cat", "infer.min_score=0.1", False),
        ("cat", "loss.dense=1", False),
        ("cat", "optim.save_every=3", False),
        ("cat", "cat.steps=3", True),
        ("cat", "bank.views=2", True),
        ("cat", "optim.lr=0.5", False),
        ("cat", "optim.precision=fp32", True),
        ("cat", "finetune.batch=3", False),
        ("finetune", "finetune.steps=3", True),
        ("finetune", "protocol.mode=inductive", True),
        ("finetune", "bank.views=2", True),
        ("finetune", "infer.min_score=0.1", True),
        ("finetune", "loss.mask=1", True),
        ("finetune", "optim.seed=3", True),
        ("finetune", "optim.lr=0.5", False),
        ("finetune", "infer.batch=3", False),
    ],
)
def test_only_what_matters_for_the_stage_is_compared(
    stage: str, override: str, matters: bool
) -> None:
    assert bool(relevant_diff(stage, load_config(None), load_config(None, [override]))) == matters


def test_missing_weights_name_the_first_stage_that_is_missing(run: Run) -> None:
    other = Run("other", run.root).stage("con")
    other.path.mkdir(parents=True)
    other.last.touch()
    run.stage("con").path.mkdir(parents=True)
    with pytest.raises(UserError) as caught:
        run.weights_of("cat")
    assert f"train-con --name {run.name}" in caught.value.hint
    assert "Other runs have: other." in caught.value.what
    run.stage("con").last.touch()
    with pytest.raises(UserError) as caught:
        run.weights_of("cat")
    assert f"train-cat --name {run.name}" in caught.value.hint


def test_fresh_moves_the_old_folder_aside(run: Run) -> None:
    for number in range(3):
        stage = run.stage("cat").open(load_config(None, [f"cat.seed={number}"]), fresh=True)
        stage.append_metrics({"step": number})
    names = sorted(path.name for path in run.path.iterdir())
    assert names == ["cat", "cat.old-1", "cat.old-2"]
    assert StageDir(run.path / "cat.old-2", "cat").read_metrics() == [{"step": 1}]


def test_other_inputs_stop(run: Run) -> None:
    cfg = load_config(None)
    run.stage("cat").open(cfg, inputs={"weights": "a"})
    run.stage("cat").open(cfg, inputs={"weights": "a"})
    with pytest.raises(UserError, match="made from other weights"):
        run.stage("cat").open(cfg, inputs={"weights": "b"})


def test_ranks_above_zero_touch_nothing(run: Run) -> None:
    run.stage("con").open(load_config(None), main=False)
    assert not run.path.exists()


def test_metrics_survive_a_kill_and_are_rewound(run: Run) -> None:
    stage = run.stage("con").open(load_config(None))
    for step in range(5):
        stage.append_metrics({"step": step, "loss": step / 2})
    with stage.metrics.open("a") as file:
        file.write('{"step": 5, "lo')
    assert len(stage.read_metrics()) == 5
    stage.forget_metrics_after(2)
    assert [row["step"] for row in stage.read_metrics()] == [0, 1, 2]


def test_metrics_of_a_run_without_a_saved_step_are_dropped(run: Run) -> None:
    run.stage("con").open(load_config(None)).append_metrics({"step": 1})
    assert run.stage("con").open(load_config(None)).read_metrics() == []


def test_no_permission_is_a_user_error(tmp_path: Path) -> None:
    touch(tmp_path / "runs")
    with pytest.raises(UserError, match="Cannot write"):
        Run("some", tmp_path / "runs").stage("con").open(load_config(None))


@pytest.mark.parametrize("name", ["", "..", "a/b", "a\\b"])
def test_names_that_are_no_folder(name: str) -> None:
    with pytest.raises(UserError, match="name of a run"):
        Run(name)


def test_weights_are_found_in_order(run: Run, tmp_path: Path) -> None:
    vocabulary = tmp_path / "pets.txt"
    with pytest.raises(UserError, match="Run some has no weights"):
        find_weights("some", root=run.root)
    expected = [
        touch(run.stage("con").last),
        touch(run.stage("con").best),
        touch(run.stage("cat").last),
        touch(run.stage("finetune").last),
    ]
    for path in expected[::-1]:
        found = find_weights("some", root=run.root, vocabulary=vocabulary)
        assert found.path == path and "run some" in found.reason
        path.unlink()
    touch(expected[-1])
    vocabulary.write_text("cat\ndog\n")
    taught = teach(run, "cat : thing; dog : thing")
    assert find_weights("some", root=run.root, vocabulary=vocabulary).path == taught
    assert find_weights("some", root=run.root).path == expected[-1]


def test_explicit_weights_may_be_a_folder(run: Run, tmp_path: Path) -> None:
    last = touch(run.stage("con").last)
    for given in (last, run.stage("con").path, run.path):
        assert find_weights(None, given).path == last
    with pytest.raises(UserError, match="holds no weights"):
        find_weights(None, tmp_path)


def test_the_package_is_the_last_resort(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from concat_cli.core import runs

    built_in = touch(run.root / "segmentor.safetensors")
    monkeypatch.setattr(runs, "BUILT_IN", built_in)
    assert find_weights(None, root=run.root) == (
        built_in,
        f"built in; there is no run in {run.root}/shapes",
    )
    monkeypatch.setattr(runs, "BUILT_IN", run.root / "none")
    with pytest.raises(UserError, match="There are no weights"):
        find_weights(None, root=run.root)


def test_missing_stage_names_the_command(run: Run) -> None:
    with pytest.raises(UserError) as caught:
        run.weights_of("con")
    assert "`concat train-con --name some`" in caught.value.hint


def test_weights_taught_by_another_file_of_that_name_are_not_used(run: Run, tmp_path: Path) -> None:
    """Nor those taught what the file held before; and it is said."""
    other = touch(run.stage("finetune").last)
    taught = teach(run, "cat : thing; dog : thing")
    vocabulary = tmp_path / "pets.txt"
    for text, expected in (("cat\ndog\n", taught), ("cat\n", other), ("dog\ncat\n", other)):
        vocabulary.write_text(text)
        for found in (
            find_weights("some", root=run.root, vocabulary=vocabulary),
            find_weights(None, run.path, vocabulary=vocabulary),
        ):
            assert found.path == expected
            assert ("finetune-pets was taught other names" in found.reason) == (expected == other)
    run.stage("finetune-pets").inputs_json.unlink()
    vocabulary.write_text("cat\ndog\n")
    assert find_weights("some", root=run.root, vocabulary=vocabulary).path == other


@pytest.mark.parametrize("text", ["", "{", "[1]", "5", "\x00", "[" * 100_000], ids=range(6))
def test_damaged_inputs_are_named_and_what_to_do(run: Run, text: str) -> None:
    cfg = load_config(None)
    stage = run.stage("cat").open(cfg, inputs={"weights": "a"})
    stage.inputs_json.write_text(text)
    with pytest.raises(UserError, match=r"inputs\.json") as caught:
        stage.open(cfg, inputs={"weights": "a"})
    assert "--fresh" in caught.value.hint
    stage.open(cfg, fresh=True, inputs={"weights": "a"})
    stage.metrics.write_text("[" * 100_000 + '\n{"step": 1}\n')
    assert stage.read_metrics() == [{"step": 1}]


def test_keys_that_a_stage_does_not_read_are_told() -> None:
    """`relevant` of a stage says what it reads; what later stages read is no mistake."""
    told = unread("cat", ["optim.lr", "cat.steps", "data.workers", "finetune.steps", "loss.dice"])
    assert told == [
        "optim.lr: not read by train-cat",
        "finetune.steps: not read by train-cat; what is given here counts in finetune",
    ]
    (note,) = unread("con", ["optim.lr", "cat.steps", "cat.lr", "shapes.train"])
    assert note.startswith("cat.steps, cat.lr: not read by train-con; ")
    assert note.endswith(" counts in train-cat and finetune")
    assert unread("zegformer", ["zegformer.exponent", "infer.size", "model.width"]) == []
