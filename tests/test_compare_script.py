"""`make compare` in one go: every method on the same scenes, nothing measured twice."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from mini import KEYS

from concat_cli.core.config_file import SHIPPED, load_config
from concat_cli.core.errors import UserError
from concat_cli.core.evaluate.cost import Cost
from concat_cli.core.evaluate.intervals import mean_iou, paired_differences

HERE = Path(__file__).parents[1]
CELLS = """
concat concat-half concat-joint con+latent concat+masks concat+latent
concat+latent-control concat+latent-light concat+evidence
concat+evidence-half concat+evidence-joint
zegformer-segment zegformer-image zegformer-fusion
zegformer-segment-half zegformer-image-half zegformer-fusion-half
zegformer-segment-joint zegformer-image-joint zegformer-fusion-joint
clip-zss-plain clip-zss+glm clip-zss+glm+pseudo clip-zss
""".split()
SMALL = """
shapes.train=8 shapes.dev=3 shapes.val=6 shapes.size=64 optim.steps=1 optim.warmup=1 warmup.steps=1
optim.batch_size=2 optim.per_device=2 cat.steps=2 cat.eval_every=2 finetune.steps=1 data.cache=true
""".split()
GIVEN = {key.split("=")[0] for key in SMALL}
# align.* is CON's alone, and loss.* of the denoising kind a segmentor's
MINI = [k for k in KEYS if k.split("=")[0] not in GIVEN and not k.startswith("align.")]
COST = Cost(10, False, {"semantic": 8.0, "panoptic": None}, 100.0, "cpu", 1)


def call(script: ModuleType, *cells: str, keys: tuple[str, ...] = ()) -> None:
    """What `python benchmarks/compare.py` does with the miniature budget, default split."""
    words = [*MINI, *SMALL, *keys, "--splits", "default", "--device", "cpu"]
    script.main([*words, "--only", *(cells or CELLS)])


@pytest.fixture(scope="module")
def compare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The script as a module, after one call that measured every cell in a folder of its own."""
    path = HERE / "benchmarks" / "compare.py"
    spec = importlib.util.spec_from_file_location("compare_script", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "compare_script", module)  # dataclasses look their module up
        patch.syspath_prepend(str(HERE / "benchmarks"))
        spec.loader.exec_module(module)
        patch.setattr(module, "ROOT", tmp_path_factory.mktemp("runs") / "compare")
        patch.setattr(module, "measure_cost", lambda *_: COST)  # a process each
        call(module)
        yield module


def rows(script: ModuleType) -> dict[str, dict[str, Any]]:
    """The rows of results.jsonl by cell, which are there once each."""
    found = script.read_rows(script.ROOT)
    assert len({row["cell"] for row in found}) == len(found)
    return {row["cell"]: row for row in found}


def test_every_cell_has_a_row_and_counts_of_the_same_images(compare: ModuleType) -> None:
    found = rows(compare)
    assert list(found) == CELLS == [cell.name for cell in compare.CELLS]
    for name, row in found.items():
        dense = name.startswith("clip-zss")
        assert all((row["PQ"][g] is None) == dense for g in ("seen", "unseen", "harmonic"))
        assert all(0 <= value <= 1 for value in row["mIoU"].values())
        assert row["mode"] == ("transductive" if name.startswith("con") else "inductive")
        with np.load(compare.ROOT / "counts" / f"default-{name}.npz") as file:
            assert ("panoptic" in file) != dense
            assert file["semantic"].shape == (6, 3, 48)
            assert (len(file["seen"]), len(file["unseen"])) == (38, 10)
            split = file["seen"].tolist(), file["unseen"].tolist()
            truth = file["semantic"][:, 1].sum(0)
        with np.load(compare.ROOT / "counts" / "default-concat.npz") as first:
            assert (first["semantic"][:, 1].sum(0) == truth).all() and truth.sum() > 0
            assert (first["seen"].tolist(), first["unseen"].tolist()) == split


def test_all_train_on_the_same_scenes_without_unseen_labels(compare: ModuleType) -> None:
    folder = compare.ROOT / "default"
    configs = {path.parents[1].name: load_config(path) for path in folder.glob("*/*/config.yaml")}
    assert set(configs) == {cell.run for cell in compare.CELLS}
    assert {cfg.data.root for cfg in configs.values()} == {
        str(compare.ROOT / "data" / "shapes-default")
    }
    assert {cfg.shapes.unseen_pixels for cfg in configs.values()} == {"void"}
    own = {n: cfg.sections()["clip_zss"] for n, cfg in configs.items() if "clip-zss" in n}
    parts = {name: (bool(o.glm), o.pseudo, bool(o.synthesizer)) for name, o in own.items()}
    assert parts == {
        "clip-zss-plain": (False, False, False),
        "clip-zss+glm": (True, False, False),
        "clip-zss+glm+pseudo": (True, True, False),
        "clip-zss": (True, True, True),
    }


def test_a_second_call_adds_nothing_and_prints_the_tables(
    compare: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(*_: object) -> None:
        raise AssertionError("measured again")

    before = (compare.ROOT / "results.jsonl").read_bytes()
    monkeypatch.setattr(compare, "measure", measure)
    call(compare)
    assert (compare.ROOT / "results.jsonl").read_bytes() == before
    shown = capsys.readouterr().out
    assert "images alone" in shown and "seeds" in shown and "another budget" not in shown
    figures = rows(compare)["concat"]["mIoU"]
    assert f"| {100 * figures['seen']:.1f} ± 0.0 |" in shown
    assert "| clip-zss | 1 | - | - | - |" in shown and "| 0.00 | 8 | 100 | no |" in shown
    for ours, theirs, figure, group in compare.PAIRS:
        assert f"| {ours} - {theirs} | {group} {figure} | 1 | " in shown


def test_the_shipped_configuration_is_the_cell_whose_figure_it_tells(compare: ModuleType) -> None:
    path = HERE / "docs" / "results" / "compare_long.jsonl"
    told = [json.loads(line) for line in path.read_text().splitlines()]
    root = "data.root=runs/compare/data/shapes-default"
    digest = compare.digest(load_config("shapes_void", [root]))
    found = [row for row in told if row["digest"] == digest]
    assert [(row["split"], row["cell"]) for row in found] == [("default", "concat+evidence-joint")]
    comment = (SHIPPED / "shapes_void.yaml").read_text()
    assert f"hPQ {100 * found[0]['PQ']['harmonic']:.1f}" in comment


def test_other_arguments_stop(compare: ModuleType) -> None:
    before = (compare.ROOT / "results.jsonl").read_bytes()
    with pytest.raises(UserError, match="cell concat of split default") as caught:
        call(compare, "concat", keys=("optim.lr=0.01",))
    assert "away" in caught.value.hint and "old arguments" in caught.value.hint
    assert (compare.ROOT / "results.jsonl").read_bytes() == before


def test_digests_tell_cells_and_the_budget_is_one(compare: ModuleType) -> None:
    found = rows(compare)
    assert found["con+latent"]["digest"] == found["concat+latent"]["digest"]  # of one run
    assert len({row["digest"] for row in found.values()}) == len(found) - 1
    assert len({row["budget"] for row in found.values()}) == 1


def test_differences_are_means_over_the_splits_of_one_budget(
    compare: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "counts").mkdir()
    rng = np.random.default_rng(0)
    common = {"seen": np.array([0, 1]), "unseen": np.array([2, 3])}
    counts = {}
    for split in ("default", "1", "2"):
        for name in "ab":
            hits = rng.integers(1, 9, (5, 1, 4))
            counts[split, name] = np.concatenate([hits, hits + 2, hits + 3], 1).astype(float)
            budget = "other" if (split, name) == ("2", "b") else "one"
            np.savez(
                tmp_path / "counts" / f"{split}-{name}.npz",
                semantic=counts[split, name], budget=np.array(budget), **common,
            )  # fmt: skip
    splits, found = compare.difference(tmp_path, "a", "b", "semantic", mean_iou)
    a, b = ([counts[split, name] for split in ("default", "1")] for name in "ab")
    expected = paired_differences(a, b, mean_iou, [((0, 1), (2, 3))] * 2, 1000)
    assert splits == 2 and found == expected
    assert compare.difference(tmp_path, "a", "b", "panoptic", mean_iou) == (0, {})
    assert compare.difference(tmp_path, "a", "c", "semantic", mean_iou) == (0, {})
