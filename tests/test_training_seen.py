"""What is seen of training: pictures of the metrics, trackers, the line of progress."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mini import Heard, alone
from PIL import Image
from test_train_units import META, RegressionTask
from torch import nn

from concat_cli.app import main
from concat_cli.console import Console
from concat_cli.core.config import OptimConfig
from concat_cli.core.errors import UserError
from concat_cli.core.progress import SILENT, Silent, in_parts
from concat_cli.core.runs import StageDir
from concat_cli.core.train import plots
from concat_cli.core.train.live import LOGS, numbers
from concat_cli.core.train.loop import Fit
from concat_cli.core.train.plots import HOW_TO_PLOT, curves, draw_metrics

LOOP = {"steps": 5, "warmup": 0, "log_every": 1, "preview_every": 2}


def train(folder: Path, progress: Any = SILENT, task: Any = None, part: str = "") -> StageDir:
    stage = StageDir(folder, "con", part)
    task = task or RegressionTask(scores=(0.1, 0.2, 0.3))
    session = replace(alone(), progress=progress)
    Fit(task, OptimConfig(**LOOP, eval_every=2), stage, session, META).run()
    return stage


class Seen(Silent):
    """Keeps statuses and rows."""

    def __init__(self) -> None:
        self.statuses: list[str] = []
        self.rows: list[tuple[Path, dict[str, Any]]] = []

    def status(self, text: str) -> None:
        self.statuses.append(text)

    def figures(self, folder: Path, row: dict[str, Any]) -> None:
        self.rows.append((folder, row))


class Many(nn.Module):
    """Seven losses."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, batch: object, counts: object) -> dict[str, torch.Tensor]:
        return {f"l{n}": self.weight * n for n in (5, 1, 7, 3, 2, 6, 4)}


def test_the_line_of_progress_shows_five_terms_and_the_file_all(tmp_path: Path) -> None:
    task, seen = RegressionTask(), Seen()
    task.module = Many()
    stage = train(tmp_path, seen, task)
    assert seen.statuses[0].startswith("loss 28.000 (l5 5 l7 7 l3 3 l6 6 l4 4 and 2 smaller)")
    rows = stage.read_metrics()
    assert {f"l{n}" for n in range(1, 8)} <= set(rows[0])
    assert [row for _, row in seen.rows] == rows and {f for f, _ in seen.rows} == {tmp_path}


def test_the_last_preview_is_always_written(tmp_path: Path) -> None:
    names = ["step_000002.png", "step_000004.png", "step_000005.png"]
    stage = train(tmp_path)
    assert sorted(path.name for path in stage.previews.iterdir()) == names
    stage.previews.joinpath(names[0]).unlink()
    train(tmp_path)  # again: only the last one is looked for
    assert sorted(path.name for path in stage.previews.iterdir()) == names[1:]


def test_metrics_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    stage = train(tmp_path)
    for path, panels in ((stage.losses_png, 4), (stage.dev_png, 1)):
        with Image.open(path) as picture:
            assert picture.size[0] == 384 * panels and len(picture.getcolors(1 << 20) or ()) > 20
    stage.append_metrics({"step": 6, "loss": math.nan, "grad_norm": None, "dev": 3})
    assert draw_metrics(stage) == [stage.losses_png, stage.dev_png]
    assert draw_metrics(StageDir(tmp_path / "none", "con")) == []


def test_curves_hold_the_finite_numbers() -> None:
    rows = [{"step": 1, "a": 2, "seconds": 3.0}, {"step": 2, "a": math.inf, "b": 0.5, "c": None}]
    assert curves(rows) == {"a": [(1, 2)], "b": [(2, 0.5)]}


def test_without_matplotlib_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda _: None)
    heard = Heard()
    train(tmp_path, heard)
    train(tmp_path / "warmup", heard, part="warmup")
    assert heard.lines.count(HOW_TO_PLOT) == 1 and not (tmp_path / "losses.png").exists()


def test_tensorboard_holds_every_figure(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    console = Console()
    stage = StageDir(tmp_path, "con")
    with LOGS["tensorboard"]("run") as listener:
        console.progress.listener = listener
        train(tmp_path, console.progress)
    found = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    rows = stage.read_metrics()
    for name, key in (("loss", "loss"), ("lr_factor", "lr_factor")):
        expected = [(row["step"], row[key]) for row in rows if key in row]
        scalars = found.Scalars(name)
        assert [one.step for one in scalars] == [step for step, _ in expected]
        assert [one.value for one in scalars] == pytest.approx([value for _, value in expected])
    assert [(one.step, round(one.value, 5)) for one in found.Scalars("dev/score")] == [
        (2, 0.1), (4, 0.2), (5, 0.3),
    ]  # fmt: skip


def test_wandb_is_told_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in with the calls that are made."""
    told: list[Any] = []

    def init(**keys: Any) -> Any:
        told.append(keys["id"])
        return SimpleNamespace(
            log=lambda row, step: told.append((step, row)), finish=lambda: told.append("end")
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    con = tmp_path / "runs" / "demo" / "con"
    with LOGS["wandb"]("demo") as write:
        write(con / "warmup", {"step": 1, "loss": 2.0})
        write(con, {"step": 1, "loss": 1.0, "grad_norm": None})
        write(con, {"step": 1, "dev": {"score": 0.5}})
    assert told == [
        "demo-con-warmup", (1, {"loss": 2.0}), "end",
        "demo-con", (1, {"loss": 1.0}), (1, {"dev/score": 0.5}), "end",
    ]  # fmt: skip
    assert numbers({"step": 3, "a": True, "b": 1}) == {"b": 1}


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_told_first(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard.writer", raising=False)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(UserError, match=f"--log {name} needs the package"), LOGS[name]("run"):
        pass
    assert main(["train-con", "--log", name]) == 2
    assert f"pip install {name}" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "data").exists()


def test_parts_are_counted_by_their_items(capsys: pytest.CaptureFixture[str]) -> None:
    counted: list[int] = []

    class Count(Silent):
        def track(self, items: Any, what: str, total: int | None = None) -> Any:
            assert (what, total) == ("predict", 11)
            for item in items:
                counted.append(item)
                yield item

    parts = [range(0, 8), range(8, 11)]
    done = [len(counted) for _ in in_parts(Count(), parts, "predict")]
    assert done == [1, 9] and counted == list(range(11))  # an item is done where the next begins
    assert list(in_parts(SILENT, parts, "predict")) == parts
