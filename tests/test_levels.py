"""`--quiet` and `--verbose`, of every command."""

from __future__ import annotations

import os

import pytest

from concat_cli.app import main
from concat_cli.commands.options import every_example
from concat_cli.console import LEVEL, Console

COMMANDS = [c.split() for c in every_example() if c not in ("", "prepare-data", "weights")]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_both(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert main([*command, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.count("--quiet") == 1 and "--verbose" in out
    assert main([*command, "--quiet", "--verbose"]) == 2
    capsys.readouterr()
    assert LEVEL not in os.environ


def test_mistakes_are_told_at_every_level(capsys: pytest.CaptureFixture[str]) -> None:
    for level, traceback in (("--quiet", False), ("--verbose", True)):
        assert main(["predict", "nothing.png", level]) == 2
        out, err = capsys.readouterr()
        assert out == "" and "There is no picture nothing.png" in err
        assert ("Traceback" in err, "debug: " in err) == (traceback, traceback)


def test_quiet_keeps_results_and_warnings(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LEVEL, "quiet")
    console = Console()
    console.say("device cpu")
    console.warn("dim pictures")
    console.table(["PQ"], [[50.0]])
    console.done({"report": "a.html"}, ["concat report"])
    assert list(console.progress.track([1, 2], "predict")) == [1, 2]
    out, err = capsys.readouterr()
    assert "device" not in out + err and "next" not in out
    assert "50.0" in out and "a.html" in out and err == "note: dim pictures\n"
