"""`concat doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from concat_cli.commands.options import Json
from concat_cli.console import Console

_MARKS = {"ok": "✓", "missing": "-", "failed": "✗"}


def doctor(
    data: Annotated[
        Path | None, typer.Option(help="A prepared data set to check. Default: all in data/.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check machine, packages, weights, data and a trial batch."""
    from concat_cli.core.doctor import examine

    console = Console(json_only=as_json)
    report = examine(data)
    if as_json:
        console.json(report.to_json())
    else:
        for section, checks in report.sections.items():
            console.say(section)
            for check in checks:
                console.say(f"  {_MARKS[check.state]} {check.name}: {check.found}")
                if check.todo:
                    console.say(f"      {check.todo}")
        console.say("\nFor a bug report:\n")
        console.text(f"```\n{report.block()}\n```")
        fine = "everything needed is there" if report.ok else "something needed is missing (✗)"
        console.say(f"\n{fine}")
    if not report.ok:
        raise typer.Exit(1)
