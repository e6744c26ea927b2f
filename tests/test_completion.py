"""What a shell is told when it asks how a command line may go on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = {
    "concat pre": {"predict", "prepare-data"},
    "concat evaluate --name de": {"demo", "deep"},
    "concat train-con -c de": {"demo"},
    "concat prepare-data coco-s": {"coco-stuff"},
    "concat doctor --qu": {"--quiet"},
}


@pytest.mark.skipif(sys.platform == "win32", reason="there is no bash")
def test_bash_completes_commands_options_and_values(tmp_path: Path) -> None:
    """In a bash that has read the script, with the function that it calls at a tab."""
    for name in ("demo", "deep", "other"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    command = tmp_path / "bin" / "concat"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m concat_cli "$@"\n')
    command.chmod(0o755)
    asked = "\n".join(
        f"COMP_WORDS=({line}); COMP_CWORD={line.count(' ')}; COMPREPLY=()\n"
        '_concat_completion concat; echo "${COMPREPLY[*]}" | tr "\\n" " "; echo'
        for line in CASES
    )
    source = Path(__file__).parents[1]
    path = os.pathsep.join([str(source), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        ["bash", "-c", f'eval "$(_CONCAT_COMPLETE=source_bash concat)"\n{asked}'],
        cwd=tmp_path,
        env=os.environ | {"PATH": f"{command.parent}:{os.environ['PATH']}", "PYTHONPATH": path},
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    found = [set(line.split()) for line in done.stdout.splitlines()]
    assert dict(zip(CASES, found, strict=True)) == CASES, done.stderr
