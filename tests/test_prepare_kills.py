"""Killed before any of its renames, `prepare-data` goes on and leaves nothing behind."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from drawn_own import draw_own
from prepare_helpers import contents

from concat_cli.core.config import ShapesConfig
from concat_cli.core.prepare.run import Options, prepare_data
from concat_cli.core.prepare.shapes import prepare_shapes

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="a kill needs a process to fork")
KILLED = 137


def own(out: Path) -> None:
    prepare_data(
        "custom",
        out.parent / "own",
        out,
        Options(processes=1),
        images="photos",
        labels="maps",
        classes="classes.txt",
    )


def world(out: Path) -> None:
    prepare_shapes(out, ShapesConfig(train=2, dev=1, val=1), processes=1)


def killed_before(rename: int, work: Callable[[Path], None], out: Path) -> bool:
    """Whether a process that does the work was killed before its so many-th rename; nothing of
    Python's runs any more in it then, as after SIGKILL. False where it came to its end."""
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == KILLED
    try:
        left, real = [rename], {name: getattr(os, name) for name in ("replace", "rename")}

        def dying(name: str) -> Callable[..., Any]:
            def call(*paths: Any, **how: Any) -> Any:
                left[0] -= 1
                if left[0] == 0:
                    os._exit(KILLED)
                return real[name](*paths, **how)

            return call

        for name in real:
            setattr(os, name, dying(name))
        work(out)
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.parametrize("work", [own, world])
@pytest.mark.parametrize("fresh", [True, False], ids=["each", "one after another"])
def test_a_kill_before_any_rename_costs_nothing(
    tmp_path: Path, work: Callable[[Path], None], fresh: bool
) -> None:
    """The same command then ends as if nothing had been: after each kill, or after all of them,
    each on what the last one left."""
    draw_own(tmp_path / "own")
    work(tmp_path / "whole")
    whole = contents(tmp_path / "whole", "checked")
    kills, out = 0, tmp_path / "out"
    while killed_before(kills + 1, work, out):
        kills += 1
        if fresh:
            ended(work, out, whole)
            out = tmp_path / f"out-{kills}"
    ended(work, out, whole)
    assert kills > 3


def ended(work: Callable[[Path], None], out: Path, whole: dict[str, bytes]) -> None:
    work(out)
    found = contents(out, "checked")
    assert found.keys() == whole.keys() and not list(out.rglob(".*"))
    assert all(found[name] == whole[name] for name in whole if name != "dataset.json")
