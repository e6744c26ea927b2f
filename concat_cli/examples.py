"""The examples at the end of each `--help`; the README shows the same, and a test runs them."""

from __future__ import annotations

from concat_cli.core.prepare.recipes import RECIPES

EXAMPLES: dict[str, tuple[str, ...]] = {
    "": (
        "concat train-con",
        "concat train-cat && concat finetune && concat evaluate",
        "concat predict photo.jpg --vocab classes.txt",
    ),
    "prepare-data": (
        "concat prepare-data shapes data/shapes",
        "concat prepare-data coco data/coco",
        "concat prepare-data custom data/own --images photos --json panoptic.json --labels pngs",
    ),
    "prepare-data shapes": (
        "concat prepare-data shapes data/shapes",
        'concat prepare-data shapes data/other --unseen "striped star; green water"',
        "concat prepare-data shapes data/split-1 --unseen-seed 1 --val 1000",
        "concat prepare-data shapes data/shapes-void --unseen-pixels void",
    ),
    **{f"prepare-data {recipe.name}": recipe.examples for recipe in RECIPES.values()},
    "train-con": (
        "concat train-con",
        "concat train-con -c configs/demo.yaml",
        "concat train-con -c configs/shapes.yaml --name try optim.lr=5e-4 align.instance=0.5",
    ),
    "train-cat": (
        "concat train-cat",
        "concat train-cat --name demo",
        "concat train-cat --name demo --fresh cat.steps=3000",
    ),
    "finetune": (
        "concat finetune",
        "concat finetune --name demo --vocab classes.txt",
    ),
    "train-zegformer": (
        "concat train-zegformer",
        "concat train-zegformer -c configs/zegformer_voc_15_5.yaml --dry-run",
    ),
    "train-clip-zss": (
        "concat train-clip-zss",
        "concat train-clip-zss --preview pseudo_labels.png",
        "concat train-clip-zss -c configs/clip_zss_voc_15_5.yaml --dry-run",
    ),
    "evaluate": (
        "concat evaluate",
        "concat evaluate --name demo --split unseen --json",
        "concat evaluate --name demo --tasks panoptic,semantic,instance --bootstrap 1000",
        "concat evaluate --name demo --calibrate data.root=data/shapes",
        "concat evaluate --weights runs/demo/con/last.safetensors --save scores",
        "concat evaluate --predictions scores/panoptic.json "
        "--truth data/shapes/annotations/panoptic_val.json",
    ),
    "predict": (
        "concat predict photo.jpg --vocab classes.txt",
        "concat predict data/shapes/val --out pictures --min-score 0.3",
        'concat predict "data/shapes/val/*1.png" --json',
        "concat predict photo.jpg --name shapes_zegformer --set zegformer.branch=segment",
    ),
    "compare": (
        "concat compare demo shapes_zegformer shapes_clip_zss",
        "concat compare demo segment=shapes_zegformer:zegformer.branch=segment "
        "fusion=shapes_zegformer --limit 50",
    ),
    "doctor": (
        "concat doctor",
        "concat doctor --data data/shapes --json",
    ),
}


def epilog(command: str) -> str:
    """The examples of a command as the last block of its help."""
    lines = [f"[dim]$[/dim] {line}" for line in EXAMPLES[command]]
    return "\n".join(["[bold]Examples[/bold]", *lines])
