"""The examples at the end of each `--help`, with those that the methods bring; the README shows the
same, and a test runs them."""

from __future__ import annotations

from concat_cli.core.method import methods
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
    ),
    "doctor": (
        "concat doctor",
        "concat doctor --data data/shapes --json",
    ),
}


for _method in methods():
    for _command, _lines in _method.examples.items():
        EXAMPLES[_command] = EXAMPLES.get(_command, ()) + _lines


def epilog(command: str) -> str:
    """The examples of a command as the last block of its help."""
    lines = [f"[dim]$[/dim] {line}" for line in EXAMPLES[command]]
    return "\n".join(["[bold]Examples[/bold]", *lines])
