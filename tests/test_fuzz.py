"""A small share of `make fuzz`, which tries fifty times as many."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz_mutations import spoilt_bytes, spoilt_json, spoilt_safetensors

SCRIPT = Path(__file__).parent / "fuzz.py"


@pytest.mark.skipif(sys.platform == "win32", reason="workers are forked")
def test_200_spoilt_inputs_end_in_success_or_in_one_error() -> None:
    """In a process of its own: it makes a toy known to the reader of published weights."""
    asked = [sys.executable, str(SCRIPT), "--inputs", "200", "--seed", "7", "--processes", "1"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "200 inputs" in done.stdout and " 0 failures" in done.stdout
    refused = sum(int(line[34:43]) for line in done.stdout.splitlines()[1:22])
    assert refused > 100, done.stdout  # most of it cannot be read


def test_an_input_depends_on_its_number_alone() -> None:
    value = {"a": [1, 2.5, "x"], "b": {"c": None}}
    whole = b"\x40" + bytes(7) + b'{"__metadata__": {"concat": "{\\"a\\": [1, 2]}"}, "t": {"x": 1}}'
    whole = whole.ljust(8 + 0x40, b" ") + bytes(range(40))
    kinds: set[str] = set()
    for number in range(300):
        one, two = random.Random(f"0:{number}"), random.Random(f"0:{number}")
        for spoil in (
            lambda rng: spoilt_json(value, rng),
            lambda rng: spoilt_bytes(b'{"a": 12}', rng, b"other", text=True),
            lambda rng: spoilt_safetensors(whole, rng, b"other"),
        ):
            found = spoil(one)
            assert found == spoil(two)
            kinds.update(found[1].split("+"))
    assert len(kinds) > 25
