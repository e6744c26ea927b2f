"""The ablation's cells run in one go, are not measured twice, and do not mix budgets."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from mini import KEYS

from concat_cli.core.config_file import load_config
from concat_cli.core.errors import UserError
from concat_cli.core.evaluate.intervals import mean_pq

HERE = Path(__file__).parents[1]
CELLS = """
projection con+control con+cycle global instance con projection+calibrated weak-projection weak-con
all-labels clip-on-true-masks
""".split()
OWN = ("align.image", "align.instance", "optim.steps", "warmup.steps", "finetune.steps")
WORLD = "shapes.train=24 shapes.dev=8 shapes.val=12 shapes.size=64".split()
SHORT = "cat.steps=4 cat.eval_every=2 optim.warmup=1".split()
BUDGET = [*WORLD, *(key for key in KEYS if key.split("=")[0] not in OWN), *SHORT]


def call(script: ModuleType, *cells: str, steps: int = 1, keys: tuple[str, ...] = ()) -> None:
    """What `python benchmarks/ablation.py` does with the miniature budget, default split."""
    words = [*BUDGET, *keys, "--config", "shapes", "--splits", "default"]
    words += ["--steps", str(steps), "--warmup", "1", "--device", "cpu"]
    script.main([*words, "--only", *cells])


@pytest.fixture(scope="module")
def ablation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The script as a module, after one call that measured `CELLS` in a folder of its own."""
    spec = importlib.util.spec_from_file_location("ablation", HERE / "benchmarks" / "ablation.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "ablation", module)  # dataclasses look their module up
        patch.syspath_prepend(str(HERE / "benchmarks"))
        spec.loader.exec_module(module)
        patch.setattr(module, "ROOT", tmp_path_factory.mktemp("runs") / "ablation")
        call(module, *CELLS)
        yield module


def rows(script: ModuleType) -> dict[str, dict[str, Any]]:
    """The rows of results.jsonl by cell, which are there once each."""
    kept = script.read_rows(script.ROOT)
    found = {str(row["cell"]): row for row in kept}
    assert len(found) == len(kept)
    return found


def test_every_cell_has_a_row_and_counts(ablation: ModuleType) -> None:
    found = rows(ablation)
    assert set(found) == set(CELLS)
    assert {row["split"] for row in found.values()} == {"default"}
    for name, row in found.items():
        assert all(0 <= row[key] <= 1 for key in ("seen", "unseen", "harmonic")), name
        with np.load(ablation.ROOT / "counts" / f"default-{name}.npz") as file:
            assert file["counts"].shape[:2] == (12, 4)
            assert {*file["seen"]}.isdisjoint(file["unseen"])
            assert (str(file["digest"]), str(file["budget"])) == (row["digest"], row["budget"])
    assert found["clip-on-true-masks"]["seen"] > 0


def test_digests_tell_cells_and_the_budget_is_one(ablation: ModuleType) -> None:
    found = rows(ablation)
    differ = [name for name in CELLS if name not in ("con", "clip-on-true-masks", "con+cycle")]
    assert len({found[name]["digest"] for name in differ}) == len(differ)
    assert len({row["budget"] for row in found.values()}) == 1
    assert all(len(row["digest"]) == 12 for row in found.values())


def test_warm_ups_are_shared_by_cells_that_warm_up_alike(ablation: ModuleType) -> None:
    shared = {
        "plain": ("projection", "global"),
        "aligned": ("instance", "con"),
        "weak-plain": ("weak-projection",),
        "weak-aligned": ("weak-con",),
    }
    root = ablation.ROOT / "default"
    assert {p.name for p in root.glob("warmup-*")} == {f"warmup-{kind}" for kind in shared}
    for kind, cells in shared.items():
        cfg = load_config(root / f"warmup-{kind}" / "con" / "config.yaml")
        assert (cfg.optim.steps, cfg.warmup.steps, cfg.align.image) == (0, 1, 0.0)
        assert (cfg.align.instance > 0) == kind.endswith("aligned")
        assert cfg.clip.model == ("tiny-weak" if kind.startswith("weak") else "tiny")
        states = [root / name / "con/warmup/last.state.pt" for name in (f"warmup-{kind}", *cells)]
        assert len({state.read_bytes() for state in states}) == 1, kind


def test_a_second_call_adds_nothing(
    ablation: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(*_: object) -> None:
        raise AssertionError("measured again")

    before = (ablation.ROOT / "results.jsonl").read_bytes()
    monkeypatch.setattr(ablation, "measure", measure)
    call(ablation, *CELLS)
    assert (ablation.ROOT / "results.jsonl").read_bytes() == before
    shown = capsys.readouterr().out
    assert "images alone" in shown and "seeds" in shown
    assert "| con - projection | 1 | " in shown and "| weak-con - weak-projection | 1 | " in shown


@pytest.mark.parametrize(
    "changed", [{"steps": 2}, {"keys": ("cat.steps=5",)}], ids=["steps", "keys"]
)
def test_other_arguments_stop(ablation: ModuleType, changed: dict[str, Any]) -> None:
    before = (ablation.ROOT / "results.jsonl").read_bytes()
    with pytest.raises(UserError, match="cell con of split default") as caught:
        call(ablation, "projection+matching", "con", **changed)
    assert "away" in caught.value.hint and "old arguments" in caught.value.hint
    assert (ablation.ROOT / "results.jsonl").read_bytes() == before


def test_a_row_without_a_digest_stops(
    ablation: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation, "ROOT", tmp_path)
    (tmp_path / "results.jsonl").write_text('{"split": "default", "cell": "con"}\n')
    with pytest.raises(UserError, match="cell con of split default"):
        call(ablation, "con")


def test_only_equal_budgets_are_paired(ablation: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "counts").mkdir()
    common = {"counts": np.ones((3, 4, 2)), "seen": np.array([0]), "unseen": np.array([1])}
    ours, theirs = (tmp_path / "counts" / f"default-{name}.npz" for name in ("a", "b"))
    np.savez(ours, budget=np.array("one"), **common)
    asked = (tmp_path, "a", "b", "counts", mean_pq)
    for other in ({"budget": np.array("two")}, {}):
        np.savez(theirs, **other, **common)
        assert ablation.difference(*asked) == (0, {})
    np.savez(theirs, budget=np.array("one"), **common)
    splits, found = ablation.difference(*asked)
    assert splits == 1 and found["harmonic"].value == 0


def test_a_cell_that_does_not_exist_stops(
    ablation: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        call(ablation, "conn")
    told = capsys.readouterr().err
    assert caught.value.code == 2 and "'conn'" in told and "projection+cycle" in told
