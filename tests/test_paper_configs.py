"""The configuration of each published benchmark trains two steps on its layout, drawn."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import drawn_ade as ade
import drawn_coco as coco
import drawn_voc as voc
import numpy as np
import pytest
from data_helpers import official_part, write_part
from mini import KEYS

from concat_cli.core.config_file import SHIPPED, load_config
from concat_cli.core.data.dataset import read_dataset_info
from concat_cli.core.data.image_io import read_id_png, write_id_png
from concat_cli.core.evaluate.scores import Scoring
from concat_cli.core.evaluate.weights import evaluate_weights
from concat_cli.core.prepare.run import Options, prepare_data
from concat_cli.core.runs import Run
from concat_cli.core.train.distributed import Processes
from concat_cli.core.train.images import micro_batches
from concat_cli.core.train.loop import StageResult
from concat_cli.methods.clip_zss.train import train_clip_zss
from concat_cli.methods.concat.con import train_con
from concat_cli.methods.zegformer.train import train_zegformer

ROOT = Path(__file__).parents[1]
KEPT = ("align.", "warmup.", "loss.dense", "loss.denoising", "optim.ema")  # as the paper has them
REDUCED = [key for key in KEYS if not key.startswith(KEPT)]
REDUCED += """
clip.model=tiny clip.pretrained= model.backbone=small model.backbone_weights= data.workers=0
data.crop=64 infer.size=64 infer.max_size=128 infer.min_score=0.0 optim.steps=2 optim.batch_size=4
optim.per_device=2 optim.eval_every=0 optim.save_every=2 model.encoder_layers=1 align.bank=16
align.crops=2
clip_zss.encoder=small clip_zss.encoder_weights= clip_zss.head_width=16 clip_zss.heads=4
clip_zss.bank=6 clip_zss.dense_size=128 clip_zss.windows=[1,2,4]
""".split()
METHODS: dict[str, tuple[str, Callable[..., StageResult]]] = {  # of the names of configurations
    "concat": ("con", train_con),
    "zegformer": ("zegformer", train_zegformer),
    "clip_zss": ("clip_zss", train_clip_zss),
}


def draw_coco(root: Path) -> None:
    """COCO panoptic with 133 categories, the 14 unseen ones under their own names."""
    split = (ROOT / "concat_cli/core/splits/coco_panoptic_119_14.yaml").read_text()
    unseen = [line.removeprefix("  - ") for line in split.splitlines() if line.startswith("  - ")]
    names = [*unseen, *(f"kind {n}" for n in range(119))]
    scenes = {"train": {n: [20 + n, 40] for n in range(1, 5)} | {9: [3, 30]}, "val": {8: [3, 30]}}
    for name, images in scenes.items():
        part = write_part(official_part(root, name), images)
        content = json.loads(part.index.read_text())
        content["categories"] = [
            {"id": n + 1, "name": kind, "isthing": n % 2} for n, kind in enumerate(names)
        ]
        part.index.write_text(json.dumps(content))


@dataclass(frozen=True)
class Benchmark:
    """How a configuration's data are drawn and prepared."""

    recipe: str
    draw: Any
    class_split: str
    unseen_pixels: Any = "void"  # every drawn image holds something unseen
    options: tuple[tuple[str, Any], ...] = ()


SPLIT_48 = (("year", 2014), ("classes", 65))
COCO = Benchmark("coco", draw_coco, "coco_panoptic_119_14", "drop")
STUFF = Benchmark("coco-stuff", coco.coco_stuff, "coco_stuff_156_15")
VOC = Benchmark("voc", voc.voc_trainaug, "voc_15_5")
BENCHMARKS = {
    "concat_coco_119_14": COCO,
    "concat_coco_119_14_1gpu": COCO,
    "concat_coco_stuff_156_15": STUFF,
    "concat_voc_15_5": VOC,
    "concat_coco_instances_48_17": Benchmark(
        "coco-instances", coco.coco_instances_zips, "coco_instances_48_17", options=SPLIT_48
    ),
    "concat_coco_instances_65_15": Benchmark(
        "coco-instances", coco.coco_instances, "coco_instances_65_15"
    ),
    "concat_coco_to_ade20k": Benchmark("coco", draw_coco, "all_seen"),
    "zegformer_coco_stuff_156_15": STUFF,
    "zegformer_voc_15_5": VOC,
    "clip_zss_coco_stuff_156_15": STUFF,
    "clip_zss_voc_15_5": VOC,
}


def test_every_configuration_is_tried() -> None:
    files = {path.stem for name in METHODS for path in SHIPPED.glob(f"{name}_*.yaml")}
    assert files == set(BENCHMARKS)


def prepared(benchmark: Benchmark, folder: Path, without_void: bool = False) -> Path:
    """The benchmark's data, drawn and prepared."""
    benchmark.draw(folder / "data")
    if without_void:
        for path in (folder / "data").rglob("panoptic_*/*.png"):
            ids = read_id_png(path)
            write_id_png(path, np.where(ids == 0, ids.max(), ids))
    options = Options(benchmark.class_split, benchmark.unseen_pixels, processes=1)
    given = dict(benchmark.options)
    prepare_data(benchmark.recipe, folder / "data", folder / "out", options, **given)
    return folder / "out"


def trained(stem: str, out: Path, runs: Path, *keys: str) -> tuple[Path, list[dict[str, Any]]]:
    """Two steps of a configuration with a reduced model: the weights, and what is logged."""
    keys = (*REDUCED, f"data.root={out}", "optim.log_every=1", *keys)
    cfg = load_config(stem, keys)
    stage, train = next(found for name, found in METHODS.items() if stem.startswith(name))
    run = Run(stem, runs)
    result = train(cfg, run, device="cpu", force=True)
    assert result.finished
    return result.weights, [row for row in run.stage(stage).read_metrics() if "loss" in row]


@pytest.mark.parametrize("stem", BENCHMARKS)
def test_two_steps_and_an_evaluation(stem: str, tmp_path: Path) -> None:
    benchmark = BENCHMARKS[stem]
    out = prepared(benchmark, tmp_path)
    assert read_dataset_info(out).class_split == benchmark.class_split
    weights, rows = trained(stem, out, tmp_path / "runs")
    losses = [row["loss"] for row in rows]
    assert len(losses) == 2 and all(math.isfinite(loss) and loss > 0 for loss in losses)
    keys: list[str] = []
    if stem == "concat_coco_to_ade20k":  # trained on one data set, scored on another's vocabulary
        ade.ade_panoptic(tmp_path / "ade")
        prepare_data("ade20k", tmp_path / "ade", tmp_path / "150", Options("all_seen", processes=1))
        keys = [f"data.root={tmp_path / '150'}"]
    report = evaluate_weights(weights, keys, Scoring(force=True), device="cpu")
    assert report.images >= 1
    assert report.protocol["candidates"] == (
        150 if keys else len(read_dataset_info(out).vocabulary)
    )


def test_one_gpu_learns_what_eight_learn() -> None:
    """The batch is accumulated there: the two configurations differ in nothing that is learned."""
    one, eight = (load_config(f"concat_coco_119_14{ending}") for ending in ("_1gpu", ""))
    saving = {"save_every": eight.optim.save_every}
    assert replace(one, optim=replace(one.optim, **saving)) == eight
    assert micro_batches(one.optim, Processes()) == (2, 8)
    assert micro_batches(eight.optim, Processes(0, 8)) == (2, 1)


def test_accumulated_forwards_are_one_forward_of_the_whole_batch(tmp_path: Path) -> None:
    """Losses and gradients of two steps; both forms give each image its own share.

    Every image has as many segments and no void, as normalisers count those of a forward; points
    are drawn uniformly and many, as each forward draws its own; alignment is off, as its negatives
    are those of a forward.
    """
    out = prepared(COCO, tmp_path, without_void=True)
    keys = """data.flip=0 data.scale_min=1 data.scale_max=1 align.image=0 align.instance=0
        loss.importance=0 loss.points=20000""".split()
    whole, parts = (
        trained(
            "concat_coco_119_14_1gpu", out, tmp_path / f"{size}", f"optim.per_device={size}", *keys
        )[1]
        for size in (4, 1)
    )
    assert len(whole) == len(parts) == 2
    for one, four in zip(whole, parts, strict=True):
        assert set(one) == set(four) >= {"class", "mask", "dice", "grad_norm"}
        assert four["class"] == pytest.approx(one["class"], rel=1e-4)  # which needs no points
        for name in ("loss", "mask", "dice", "grad_norm"):
            assert four[name] == pytest.approx(one[name], rel=3e-3), name
