"""Help: quick, without torch, one screen, examples last."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest

from concat_cli.examples import EXAMPLES

COMMANDS = [command.split() for command in EXAMPLES]
ORDER = """predict prepare-data train-con train-cat finetune train-zegformer train-clip-zss evaluate
    compare doctor""".split()  # in which one comes to use them
CPU_SECONDS = 0.3  # where Typer and Rich alone take 0.1; slower machines get as much more
TIMES_THE_LIBRARIES = 3
LIBRARIES = "import typer.rich_utils, rich.console, rich.table, rich.markdown"
TRIES = 8


def run(*arguments: str) -> tuple[str, float]:
    """What a help prints on 80 columns, and the CPU seconds that it took."""
    return python("-m", "concat_cli", *arguments)


def python(*arguments: str) -> tuple[str, float]:
    """What a new interpreter prints, and the CPU seconds that it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        encoding="utf-8",
        env=os.environ | {"COLUMNS": "80", "NO_COLOR": "1"},
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done.stdout, sum(
        getattr(after, k) - getattr(before, k) for k in ("ru_utime", "ru_stime")
    )


@pytest.fixture(scope="module")
def limit() -> float:
    """CPU seconds of a help on this machine."""
    floor = min(python("-c", LIBRARIES)[1] for _ in range(3))
    return max(CPU_SECONDS, TIMES_THE_LIBRARIES * floor)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_each_help_is_quick_and_ends_with_its_examples(command: list[str], limit: float) -> None:
    text, seconds = run(*command, "--help")
    for _ in range(TRIES):  # beside other work the same help takes half as much again
        if seconds > limit:
            seconds = min(seconds, run(*command, "--help")[1])
    assert seconds <= limit
    _, title, last = text.partition(" Examples ")
    shown = " ".join(last.split()).split(" $ ")
    assert title and [line.removeprefix("$ ") for line in shown] == list(
        EXAMPLES[" ".join(command)]
    )


def test_concat_alone_is_one_screen_with_three_commands_last(limit: float) -> None:
    text, seconds = run()
    assert seconds <= 2 * limit
    assert len(text.strip().splitlines()) <= 24
    assert [line.strip()[:8] for line in text.strip().splitlines()[-3:]] == ["$ concat"] * 3
    listed = [line.split()[1] for line in text.splitlines() if line.startswith("│ ")]
    assert listed[1:] == ORDER and "--version" in text
    assert sorted(ORDER) == sorted({c[0] for c in COMMANDS if c})


def test_the_command_line_does_not_import_heavy_packages() -> None:
    code = (
        "import sys, concat_cli.app as app\n"
        "app.main(['predict', '--help']); app.main(['prepare-data'])\n"
        "heavy = {'torch', 'numpy', 'PIL', 'timm', 'open_clip', 'scipy', 'tqdm'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
