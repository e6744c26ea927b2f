"""Help: without heavy packages and therefore quick, one screen, examples last."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from concat_cli.app import main
from concat_cli.commands.options import every_example

EXAMPLES = every_example()
COMMANDS = [command.split() for command in EXAMPLES]
HEAVY = """
PIL huggingface_hub matplotlib numpy open_clip pandas pycocotools safetensors scipy timm torch
torchvision tqdm transformers
"""
ORDER = """predict weights prepare-data serve train-con train-cat finetune train-zegformer
    train-clip-zss evaluate report compare export texts doctor
""".split()  # in which one comes to use them


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_each_help_ends_with_its_examples(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--help"]) == 0
    _, title, last = capsys.readouterr().out.partition(" Examples ")
    shown = " ".join(last.split()).split(" $ ")
    assert title and [line.removeprefix("$ ") for line in shown] == list(
        EXAMPLES[" ".join(command)]
    )


def test_concat_alone_is_one_screen_with_three_commands_last() -> None:
    """In a process of its own, as a user calls it."""
    done = subprocess.run(
        [sys.executable, "-m", "concat_cli"],
        capture_output=True, encoding="utf-8", check=True, env=dict(os.environ),
    )  # fmt: skip
    lines = done.stdout.strip().splitlines()
    assert len(lines) <= 26
    assert [line.strip()[:8] for line in lines[-3:]] == ["$ concat"] * 3
    listed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("│ ")]
    assert listed == ORDER and "--version" in done.stdout
    assert sorted(ORDER) == sorted({c[0] for c in COMMANDS if c})


def test_no_help_imports_a_heavy_package() -> None:
    """Which is what makes a help quick: 0.3 seconds, where torch alone takes 2 to import."""
    code = (
        "import sys, concat_cli.app as app\n"
        f"for words in {[[*command, '--help'] for command in COMMANDS]!r}: app.main(words)\n"
        "app.main([]); app.main(['prepare-data'])\n"
        f"found = set({HEAVY.split()!r}) & set(sys.modules)\n"
        "assert not found, found\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
