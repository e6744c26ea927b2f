"""Work spread over processes: results in order, errors that are handed on, nobody left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from concat_cli.core.errors import UserError
from concat_cli.core.prepare.pool import mapper, processes_for
from concat_cli.core.progress import SILENT

WORK = """
import os, time
from pathlib import Path
from concat_cli.core.prepare.pool import mapper

def work(place):
    Path(place, str(os.getpid())).touch()
    time.sleep(600)

if __name__ == "__main__":
    with mapper(work, 2) as run:
        list(run([{place!r}] * 2))
"""


def double_or_fail(number: int) -> int:
    if number < 0:
        raise UserError(f"{number} is negative.", "Give another.")
    if number > 99:
        os._exit(1)
    return 2 * number


@pytest.mark.parametrize("processes", [1, 2])
def test_results_come_in_the_order_of_the_jobs(processes: int) -> None:
    with mapper(double_or_fail, processes) as run:
        assert list(run(range(20))) == [2 * n for n in range(20)]


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_of_a_job_is_the_error_of_the_whole(processes: int) -> None:
    with pytest.raises(UserError, match="-3 is negative"), mapper(double_or_fail, processes) as run:
        list(run([1, -3, 2]))


def test_a_process_that_dies_is_told() -> None:
    with pytest.raises(UserError, match="ended from outside"), mapper(double_or_fail, 2) as run:
        list(run([1, 100, 2]))


def test_no_more_processes_than_jobs() -> None:
    assert processes_for(1, 8, SILENT) == 1 and processes_for(0, None, SILENT) == 1


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="signals of POSIX")
@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM"])
def test_no_process_outlives_the_one_that_started_it(how: str, tmp_path: Path) -> None:
    (tmp_path / "seen").mkdir()
    script = tmp_path / "script.py"
    script.write_text(WORK.format(place=str(tmp_path / "seen")))
    program = subprocess.Popen([sys.executable, str(script)], env=os.environ | {"PYTHONPATH": "."})
    try:
        assert _soon(lambda: len(list((tmp_path / "seen").iterdir())) == 2)
    finally:
        program.send_signal(getattr(signal, how))
        program.wait(60)
    workers = [int(path.name) for path in (tmp_path / "seen").iterdir()]
    assert _soon(lambda: not any(map(_runs, workers)))


def _soon(true, seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not (found := true()) and time.monotonic() < end:
        time.sleep(0.05)
    return found


def _runs(pid: int) -> bool:
    """Whether there is such a process; one that has ended and that nobody has asked for is none."""
    try:
        os.kill(pid, 0)
        status = Path(f"/proc/{pid}/stat")
        return not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
