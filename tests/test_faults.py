"""What is left by killed processes, and two processes at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from concat_cli.core import files, lock
from concat_cli.core.config import ShapesConfig
from concat_cli.core.errors import UserError
from concat_cli.core.prepare import shapes
from concat_cli.core.runs import Run

pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes are forked")


def in_child(work) -> int:
    """Forks, works there, and returns the id of the ended process, which left by `os._exit`."""
    process = os.fork()
    if not process:
        try:
            work()
        finally:
            os._exit(9)
    os.waitpid(process, 0)
    return process


def test_a_second_process_is_refused_with_the_name_of_the_first(tmp_path: Path) -> None:
    run, said = Run("demo", tmp_path), []
    holding, release = os.pipe(), os.pipe()
    process = os.fork()
    if not process:
        with run.alone(said.append):
            os.write(holding[1], b"x")
            os.read(release[0], 1)
        os._exit(0)
    os.read(holding[0], 1)
    refused = pytest.raises(UserError, match=f"in use by process {process} on .*: concat")
    with refused as caught, run.alone(said.append):
        raise AssertionError
    assert "--name" in caught.value.hint
    os.write(release[1], b"x")
    os.waitpid(process, 0)
    with run.alone(said.append):
        assert f"process {os.getpid()} " in (run.path / lock.NAME).read_text()
    assert not said


def test_the_lock_of_a_killed_process_is_free_though_its_own_live_on(tmp_path: Path) -> None:
    """As of a run whose loader processes end seconds after it."""
    code = (
        "import os, signal, sys, time\n"
        "from pathlib import Path\n"
        "from concat_cli.core.lock import locked\n"
        f"with locked(Path({str(tmp_path)!r}), print):\n"
        "    child = os.fork()\n"
        "    if child:\n"
        "        print(child, flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    os.close(1)\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=False)
    child = int(done.stdout)
    try:
        assert done.returncode == -9
        with lock.locked(tmp_path, print):
            os.kill(child, 0)  # which is alive
    finally:
        os.kill(child, 9)


def test_a_lock_is_not_written_through_a_link(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.write_text("kept")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / lock.NAME).symlink_to(theirs)
    with pytest.raises(UserError, match="Cannot write"), lock.locked(tmp_path / "run", print):
        raise AssertionError
    assert theirs.read_text() == "kept"


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch) -> None:
    def none(_: int) -> None:
        raise OSError(37, "No locks available")

    said: list[str] = []
    monkeypatch.setattr(lock, "_take", none)
    with lock.locked(tmp_path, said.append):
        pass
    assert len(said) == 1 and "No locks available" in said[0]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    """Files and folders of dead processes alone; all of them where nobody else writes."""

    def leave() -> None:
        with (
            files.atomic_path(tmp_path / "deep" / "last.pt"),
            files.workspace(tmp_path, "new") as new,
        ):
            (new / "file").touch()
            os._exit(9)

    in_child(leave)
    mine = files.temporary_name(tmp_path / "mine")
    mine.touch()
    assert len(list(tmp_path.rglob(".*"))) == 3
    others = tmp_path / ".theirs.ffffffff-1-00000000.tmp"
    link = files.temporary_name(tmp_path / "link").with_suffix(".tmp")
    link.symlink_to(tmp_path / "kept")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "inside").touch()
    others.touch()
    (tmp_path / ".hidden.tmp").touch()  # somebody else's
    files.remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "deep", mine.name, others.name, link.name, "kept", ".hidden.tmp",
    }  # fmt: skip
    assert not list((tmp_path / "deep").iterdir())
    files.remove_leftovers(tmp_path, alone=True)
    assert {path.name for path in tmp_path.iterdir()} == {"deep", "kept", ".hidden.tmp"}
    assert (tmp_path / "kept" / "inside").exists()


def test_a_file_that_is_written_again_leaves_nothing_of_a_killed_process(tmp_path: Path) -> None:
    """As in a cache, which nobody opens: the next file beside it removes what was left."""

    def leave() -> None:
        with files.atomic_path(tmp_path / "text"):
            os._exit(9)

    in_child(leave)
    assert len(list(tmp_path.iterdir())) == 1
    files.write_text(tmp_path / "other", "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_run_removes_them_when_it_is_opened(tmp_path: Path) -> None:
    run = Run("some", tmp_path)
    files.temporary_name(run.path / "con" / "last.state.pt").parent.mkdir(parents=True)
    left = files.temporary_name(run.path / "con" / "last.state.pt")
    left.write_bytes(bytes(100))
    with run.alone(print):
        assert not left.exists()


@pytest.mark.parametrize("moves", range(7))
def test_a_world_whose_moves_were_broken_off_goes_on(tmp_path: Path, moves: int) -> None:
    """Killed before each rename: that of the whole, of each part, of dataset.json, and after."""
    cfg, out, whole = ShapesConfig(train=2, dev=1, val=1, size=32), tmp_path / "a", tmp_path / "b"

    def draw() -> None:
        rename, done = Path.rename, []

        def counted(path: Path, target: Path) -> Path:
            if len(done) == moves:
                os._exit(9)
            done.append(path)
            return rename(path, target)

        Path.rename = counted  # of this process alone
        shapes.prepare_shapes(out, cfg, processes=1)

    in_child(draw)
    assert moves == 6 or not (out / "dataset.json").exists()
    for folder in (out, whole):
        shapes.prepare_shapes(folder, cfg, processes=1)
    found = [
        {p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()}
        for f in (out, whole)
    ]
    assert found[0] == found[1] and len(list(out.iterdir())) == 5
