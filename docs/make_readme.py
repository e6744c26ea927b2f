"""Fills the generated blocks of the README and of the pages in docs/: figures, tree, examples.

    python docs/make_readme.py            # rewrites what stands between the marks
    python docs/make_readme.py --check    # exit code 1 if a block is not up to date

Figures come from the files in docs/results/, all optional; without one: "not measured yet".
    demo.json, shapes-default.json, shapes-1.json, shapes-2.json   `concat evaluate --json`
    ablation.jsonl     runs/ablation/results.jsonl, a line for each cell and split
    compare.jsonl      runs/compare/results.jsonl, a line for each method and split
    compare_long.jsonl the same with the reference's budget
    figures.json       single figures by name, as text: {"scenes": "150", ...}
The tree comes from the first line of every file, the examples from concat_cli/commands/options.py.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from concat_cli.commands.options import every_example

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PAGES = (ROOT / "README.md", *(DOCS / f"{name}.md" for name in ("results", "code", "commands")))
TREE = ("concat_cli", "benchmarks", "docs")  # and tests, in one line
COLUMN = 32  # of the tree's second column
MISSING = "not measured yet"
REFERENCE = ("shapes-default", "shapes-1", "shapes-2")
GROUPS = ("seen", "unseen", "harmonic")
STAGE1 = {
    "projection": "projection only",
    "global": "+ global alignment",
    "instance": "+ instance alignment",
    "con": "both alignments (CON)",
}
FOLLOW = {
    "control": "then finetuned on real queries only (control)",
    "matching": "then generator (moment matching) and finetuning",
    "contrast": "... with query contrast",
    "cycle": "... with query contrast and cycle (CAT)",
}
OTHERS = {
    "projection+calibrated": "projection only, calibrated on dev",
    "con+cycle+calibrated": "CONCAT, calibrated on dev",
    "weak-projection": "weak teacher: projection only",
    "weak-con": "weak teacher: CON",
    "weak-con+cycle": "weak teacher: CONCAT",
    "clip-on-true-masks": "bound: CLIP names the true masks",
    "all-labels": "bound: trained with the labels of all classes",
}
SHORT = {  # cell of benchmarks/ablation.py -> what it is
    "projection": "projection only",
    "projection+cycle": "CAT alone",
    "con": "CON alone",
    "con+cycle": "CONCAT",
    "clip-on-true-masks": OTHERS["clip-on-true-masks"],
    "all-labels": OTHERS["all-labels"],
}
METHODS = {  # cell of benchmarks/compare.py -> what it is
    "concat": "CONCAT",
    "con+latent": "CON alone with latent segments",
    "concat+latent": "CONCAT with latent segments",
    "concat+latent-control": "... finetuned on real queries alone",
    "concat+latent-light": "... with a weight of 0.3 for pseudo queries",
    "concat+evidence": "... 0.3, and evidence in their place",
    "concat+evidence-half": "... the same, scored with `infer.overlap=0.5`",
    "concat+evidence-joint": "... scored with `infer.joint_stuff=true`",
    "zegformer-segment": "ZegFormer, segment branch",
    "zegformer-image": "ZegFormer, image branch",
    "zegformer-fusion": "ZegFormer, fusion",
    "clip-zss-plain": "CLIP-ZSS's student on seen pixels alone",
    "clip-zss+glm": "... + GLM",
    "clip-zss+glm+pseudo": "... + pseudo labels",
    "clip-zss": "... + synthesizer: CLIP-ZSS",
}
FIGURES = {  # key in figures.json -> what it is, and the command
    "demo_minutes": ("`make demo`, minutes on two cores", "`make demo`"),
    "demo_cost": (
        "the chain of `make demo`, processor seconds: ours / those of the build before attention "
        "in fp32, cheap areas and one call of the optimiser",
        "`OMP_NUM_THREADS=1 python benchmarks/demo_cost.py --before CHECKOUT`",
    ),
    "r50_512": (
        "R-50 segmentor, 512x512: our forward time / `transformers`' Mask2Former",
        "`python benchmarks/segmentor_vs_transformers.py --pairs 7 --clock cpu`",
    ),
    "r50_640": ("the same at 640x640", "the same"),
    "r50_bf16": ("the same in bf16, as `predict --precision bf16` runs it", "the same"),
    "scenes": ("scenes drawn and written a second", "`python benchmarks/draw_shapes.py`"),
    "prepare": (
        "20,000 images checked and indexed by `prepare-data coco`; an index of 118,287 opened",
        "`python benchmarks/prepare_20k.py`",
    ),
    "methods_minutes": (
        "`shapes_zegformer.yaml` and `shapes_clip_zss.yaml`, minutes of training",
        "`python benchmarks/compare.py --threads 1`",
    ),
    "bootstrap": (
        "1,000 draws of 5,000 images with 133 classes, intervals of PQ and mIoU",
        "`python benchmarks/bootstrap_speed.py`",
    ),
    "teach": (
        "`finetune --vocab` of 50 names on a ready bank, their texts cached, start included: our "
        "time / that of the build before",
        "`python benchmarks/teach.py --before CHECKOUT`",
    ),
    "score_files": (
        "`evaluate --predictions` of drawn pairs of 640x480, seen/unseen, mIoU and 1,000 draws, "
        "starts included: our time / hotcoco 1.3.0's, which counts PQ alone, and / that of the "
        "build before runs and threads",
        "`python benchmarks/score_files.py --hotcoco PYTHON --before CHECKOUT`",
    ),
    "without_torch": (
        "commands that need no tensor, start included, over `python -c pass`, and whether "
        "torch is imported",
        "`python benchmarks/without_torch.py --pairs 7`",
    ),
    "start": (
        "`predict` of one small picture, built-in weights, texts cached, start included / "
        "`import torch` alone",
        "`python benchmarks/start.py --pairs 9`",
    ),
    "onnx_speed": (
        "R-50 segmentor, exported, in ONNX Runtime / our own forward in fp32",
        "`OMP_NUM_THREADS=2 python benchmarks/onnx_speed.py`",
    ),
    "photos_folder": (
        "`predict` of a folder of drawn photos of 640x427, all files written, start included: "
        "our time / that of the build before writing overlapped",
        "`python benchmarks/photos_folder.py --before CHECKOUT`",
    ),
    "inference_cost": (
        "CONCAT against ZegFormer's fusion, ViT-B/16, 640x640: how many times as fast with 5, 10, "
        "20 and 100 crops an image",
        "`python benchmarks/inference_cost.py --threads 1 --clock cpu --repeats 3`",
    ),
    "zegformer_crops": (
        "ZegFormer with the crops that matter, in batches, against every crop of every image",
        "`python benchmarks/zegformer_crops.py`",
    ),
    "dense_classes": (
        "naming the pixels of 640x640 with 20, 171 and 847 classes: peak memory",
        "`python benchmarks/dense_classes.py`",
    ),
    "cat": (
        "`train-cat` and `finetune` on a ready query bank, seconds of training",
        "`concat train-cat --name demo --fresh && concat finetune --name demo --fresh`",
    ),
    "tiny_clip": (
        "tiny CLIP, zero-shot top-1 on held-out masked crops: seen classes / unseen things",
        "`python -m benchmarks.tiny_clip.train --evaluate`",
    ),
}


def scores(folder: Path, name: str) -> tuple[float, ...] | None:
    """Seen PQ, unseen PQ and hPQ, in percent, of a saved report; None where there is none."""
    path = folder / f"{name}.json"
    if not path.exists():
        return None
    panoptic: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["panoptic"]
    return tuple(100 * panoptic[group]["pq"] for group in GROUPS)


def cells(folder: Path) -> dict[str, list[tuple[float, ...]]]:
    """Seen PQ, unseen PQ and hPQ, in percent, of every split, by cell of the ablation."""
    found: dict[str, list[tuple[float, ...]]] = {}
    path = folder / "ablation.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for row in map(json.loads, lines):
        found.setdefault(row["cell"], []).append(tuple(100 * row[group] for group in GROUPS))
    return found


def row(what: str, command: str, rows: Sequence[tuple[float, ...] | None]) -> str:
    """A line of the table: mean, and spread over several splits."""
    there = [one for one in rows if one is not None]
    if not there or len(there) < len(rows):
        return f"| {what} | {MISSING} | | | {command} |"
    shown = [_mean([value / 100 for value in values]) for values in zip(*there, strict=True)]
    return f"| {what} | {' | '.join(shown)} | {command} |"


def scores_table(folder: Path) -> str:
    """The scores on the built-in world."""
    ablation = cells(folder)
    lines = ["| run | seen PQ | unseen PQ | hPQ | command |", "|---|---|---|---|---|"]
    lines.append(row("demo budget, default split", "`make demo`", [scores(folder, "demo")]))
    found = {name: scores(folder, name) for name in REFERENCE}
    there = {name: one for name, one in found.items() if one is not None} or found
    splits = ", ".join(name.removeprefix("shapes-") for name in there)
    what = f"reference `shapes`, splits: {splits}"
    lines.append(row(what, "`make reference`", list(there.values())))
    for cell, what in SHORT.items():
        lines.append(row(f"ablation: {what}", "`make ablation`", ablation.get(cell, [None])))
    return "\n".join(lines)


def summary_table(folder: Path) -> str:
    """The few rows that the README shows."""
    kept = ("| run ", "|---", "| demo", "| reference", "| ablation: CON")
    return "\n".join(row for row in scores_table(folder).splitlines() if row.startswith(kept))


def ablation_table(folder: Path) -> str:
    """Every cell of the ablation."""
    names: dict[str, str] = {}
    for stage1, what in STAGE1.items():
        names[stage1] = f"**{what}**"
        names |= {f"{stage1}+{follow}": then for follow, then in FOLLOW.items()}
    ablation = cells(folder)
    lines = ["| what | splits | seen PQ | unseen PQ | hPQ | cell |", "|---|---|---|---|---|---|"]
    lines += [
        row(f"{what} | {len(ablation.get(cell, []))}", f"`{cell}`", ablation.get(cell, [None]))
        for cell, what in (names | OTHERS).items()
    ]
    return "\n".join(lines)


def compare_table(folder: Path, name: str = "compare") -> str:
    """Every method of the comparison: mean, and spread over its splits; "-" where undefined."""
    path = folder / f"{name}.jsonl"
    rows = (
        [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
    )
    heads = [f"{group} {figure}" for figure in ("mIoU", "PQ") for group in GROUPS]
    lines = [f"| method | splits | {' | '.join(heads)} |", "|---" * (len(heads) + 2) + "|"]
    for cell, what in METHODS.items():
        mine = [row for row in rows if row["cell"] == cell]
        shown = [MISSING, *[""] * (len(heads) - 1)]
        if mine:
            shown = [
                _mean([row[figure][group] for row in mine])
                for figure in ("mIoU", "PQ")
                for group in GROUPS
            ]
        lines.append(f"| {what} | {len(mine)} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _mean(values: Sequence[float | None]) -> str:
    """Fractions as percent: their mean, and their spread where there are several."""
    there = [100 * value for value in values if value is not None]
    if len(there) < len(values):
        return "-"
    spread = f" ± {statistics.stdev(there):.1f}" if len(there) > 1 else ""
    return f"{statistics.mean(there):.1f}{spread}"


def figures_table(folder: Path) -> str:
    """Single figures."""
    path = folder / "figures.json"
    given = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    assert set(given) <= set(FIGURES), set(given) - set(FIGURES)
    lines = ["| what | figure | command |", "|---|---|---|"]
    lines += [f"| {w} | {given.get(k, MISSING)} | {c} |" for k, (w, c) in FIGURES.items()]
    return "\n".join(lines)


def tree() -> str:
    """Every file of the folders in TREE with what its first line says."""
    lines = ["```text"]
    for name in TREE:
        lines += _branch(ROOT / name, 0)
    lines.append(f"{'tests/':<{COLUMN}} test_TOPIC.py for each topic, golden files, helpers")
    targets = "demo, test, fuzz, lint, reference, ablation, tiny-clip"
    lines += [f"{'Makefile':<{COLUMN}} {targets}", "```"]
    return "\n".join(lines)


def _branch(folder: Path, depth: int) -> list[str]:
    lines = [_line(f"{folder.name}/", _first_line(folder / "__init__.py"), depth)]
    paths = sorted(folder.iterdir(), key=lambda p: (p.is_dir(), p.name))
    for path in paths:
        if path.is_dir() and path.name not in ("__pycache__", "results", "pictures"):
            lines += _branch(path, depth + 1)
        elif path.suffix in (".py", ".yaml", ".md") and path.name != "__init__.py":
            lines.append(_line(path.name, _first_line(path), depth + 1))
    return lines


def _line(name: str, what: str, depth: int) -> str:
    return f"{'  ' * depth + name:<{COLUMN}} {what}".rstrip()


def _first_line(path: Path) -> str:
    """The first sentence of a module's docstring, or of a comment or title on top."""
    if not path.exists():
        return ""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
        text = " ".join(text.split("\n\n")[0].split())
    first = text.splitlines()[0].lstrip("# ") if text else ""
    return re.split(r"(?<=[a-z)`])[.;] ", first + " ")[0].strip().rstrip(".")


def examples() -> str:
    """The examples of every command, as in its help."""
    lines = dict.fromkeys(line for group in every_example().values() for line in group)
    return "\n".join(["```sh", *lines, "```"])


def filled(text: str, folder: Path) -> str:
    """The text with every block between its marks made anew."""
    blocks = {
        "scores": scores_table(folder),
        "summary": summary_table(folder),
        "figures": figures_table(folder),
        "ablation": ablation_table(folder),
        "compare": compare_table(folder),
        "compare-long": compare_table(folder, "compare_long"),
        "tree": tree(),
        "examples": examples(),
    }
    for name, made in blocks.items():
        block = f"<!-- {name} -->\n\n{made}\n\n<!-- /{name} -->"
        text = re.sub(f"<!-- {name} -->.*?<!-- /{name} -->", lambda _, b=block: b, text, flags=re.S)
    return text


def main() -> None:
    """Rewrites the pages, or checks them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        new = filled(text, DOCS / "results")
        if args.check and new != text:
            raise SystemExit(f"{path} is not up to date: run python docs/make_readme.py")
        path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
