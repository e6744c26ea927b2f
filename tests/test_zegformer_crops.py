"""`benchmarks/zegformer_crops.py`: what CLIP is spared changes no score, or else it says so."""

from __future__ import annotations

import importlib.util
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "zegformer_crops.py"
OPTIONS = Namespace(clip="tiny", queries=6, empty=0.67, scenes=1, size=64, repeats=1)
WAYS = ("segment branch alone", "selective and batched", "batched, empty masks share a view",
        "naive")  # fmt: skip


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("zegformer_crops", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "zegformer_crops", module)  # dataclasses look their module up
        spec.loader.exec_module(module)
        yield module


def rows(shown: str) -> dict[str, list[str]]:
    """The cells of the table by way."""
    lines = [line[2:-2].split(" | ") for line in shown.splitlines() if line.startswith("| ")]
    return {name: cells for name, *cells in lines[1:]}


def test_what_is_spared_changes_no_score(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of six queries two are empty and two sure of no_object."""
    assert script.compare(script.random_ones(OPTIONS), OPTIONS)
    shown = capsys.readouterr().out
    assert "unchanged within 0.001" in shown
    table = rows(shown)
    assert set(table) == set(WAYS)
    none, selective, batched, naive = (float(table[way][0]) for way in WAYS)
    assert 0 == none < selective <= 2 < batched < naive == 6
    differences = [float(number) for way in WAYS[1:] for number in table[way][-1].split(", ")]
    assert len(differences) == 6 and max(differences) <= 1e-3


def test_a_difference_is_noticed(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    parts = script.random_ones(OPTIONS)
    parts = replace(parts, way=replace(parts.way, skip_below=0.9))
    assert not script.compare(parts, OPTIONS)
    shown = capsys.readouterr().out
    assert "CHANGED within 0.001" in shown
    assert float(rows(shown)[WAYS[1]][-1].split(", ")[0]) > 1e-3
