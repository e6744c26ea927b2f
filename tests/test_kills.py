"""A share of `kills.py`: a stage that is killed and typed again ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import shutil
import signal
from pathlib import Path

import pytest
from kills import LEFT, ended, finish, full_at, killed_before, random_kills, started
from mini import flat_state, same

from concat_cli.core.checkpoint import load_weights
from concat_cli.core.runs import Run

pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes are forked")
TRAIN_CAT = ("train-cat", "--name", "mini", "--device", "cpu")


@pytest.fixture
def copied(mini_run, tmp_path: Path) -> Run:
    """A finished first stage."""
    run = Run("mini", tmp_path / "runs")
    shutil.copytree(mini_run.run.stage("con").path, run.stage("con").path)
    return run


def assert_as_unbroken(run: Run, mini_run) -> None:
    for stage in (run.stage("cat"), run.stage("cat").inner("fold")):
        whole = mini_run.run.path / stage.path.relative_to(run.path)
        assert stage.last.read_bytes() == (whole / stage.last.name).read_bytes()
    a, b = run.stage("cat"), mini_run.run.stage("cat")
    assert same(flat_state(a), flat_state(b)) == []
    assert not [path for pattern in LEFT for path in run.path.rglob(pattern)]
    assert load_weights(a.last).meta["steps"] == load_weights(a.last).meta["step"]


@pytest.mark.parametrize("rename", [2, 6, 11])
def test_killed_before_a_rename(mini_run, copied, tmp_path, rename) -> None:
    code = ended(started(TRAIN_CAT, tmp_path, killed_before(rename)))
    assert code == -signal.SIGKILL, (tmp_path / "output").read_text()
    finish(TRAIN_CAT, tmp_path)
    assert_as_unbroken(copied, mini_run)


def test_killed_at_random_times(mini_run, copied, tmp_path) -> None:
    random_kills(tmp_path, TRAIN_CAT, 3, 2.0, random.Random())
    assert_as_unbroken(copied, mini_run)


@pytest.mark.parametrize("write", [3, 9])
def test_a_disk_that_fills_up_is_the_usual_message(mini_run, copied, tmp_path, write) -> None:
    """In the query bank, and while training; then it goes on."""
    assert ended(started(TRAIN_CAT, tmp_path, full_at(write))) == 2
    said = (tmp_path / "output").read_text()
    assert "error: Cannot write" in said and "free some space" in said and "Traceback" not in said
    assert not [path for pattern in LEFT[:1] for path in tmp_path.rglob(pattern)]
    finish(TRAIN_CAT, tmp_path)
    assert_as_unbroken(copied, mini_run)
