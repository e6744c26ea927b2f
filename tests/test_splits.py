"""The published splits and class lists: counts, ids and orders as papers and code have them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from concat_cli.core.data.class_split import (
    CLASSES,
    SPLITS,
    class_split_names,
    load_class_list,
    load_class_split,
)
from concat_cli.core.errors import UserError

FACTS = Path(__file__).parents[2] / "shared" / "splits"
SIZES = {  # list -> (classes, things)
    "ade20k_150": (150, 100),
    "ade20k_847": (847, None),
    "cityscapes_19": (19, 8),
    "coco_instances_65": (65, 65),
    "coco_instances_80": (80, 80),
    "coco_panoptic_133": (133, 80),
    "coco_stuff_171": (171, 80),
    "pascal_context_459": (459, None),
    "pascal_context_59": (59, None),
    "voc_20": (20, 20),
}
DIVIDED = {  # split -> (list, seen, unseen)
    "ade20k_full_572_275": ("ade20k_847", 572, 275),
    "coco_instances_48_17": ("coco_instances_65", 48, 17),
    "coco_instances_65_15": ("coco_instances_80", 65, 15),
    "coco_stuff_156_15": ("coco_stuff_171", 156, 15),
    "voc_15_5": ("voc_20", 15, 5),
} | {f"pascal_context_{n}": ("pascal_context_59", 59 - n, n) for n in (2, 4, 6, 8, 10)}


def unseen_of(split: str) -> dict[str, tuple[int, int]]:
    """Unseen name -> (id, position in the class list)."""
    vocabulary = load_class_list(DIVIDED[split][0])
    names = load_class_split(split, vocabulary.names)
    places = [vocabulary.index_of_name[name] for name in names]
    return {name: (vocabulary.ids[i], i) for name, i in zip(names, places, strict=True)}


def written(name: str) -> list[str]:
    """The unseen names in the order of the file."""
    return yaml.safe_load((SPLITS / f"{name}.yaml").read_text("utf-8"))["unseen"]


def test_these_lists_and_splits_are_there() -> None:
    assert sorted(path.stem for path in CLASSES.glob("*.yaml")) == sorted(SIZES)
    assert set(class_split_names()) == {*DIVIDED, "all_seen", "coco_panoptic_119_14"}


@pytest.mark.parametrize("path", [*CLASSES.glob("*.yaml"), *SPLITS.glob("*.yaml")], ids=str)
def test_each_file_names_its_source(path: Path) -> None:
    lines = path.read_text("utf-8").splitlines()
    assert any(line.startswith("# Source: ") for line in lines)
    assert all(len(line) <= 100 for line in lines if line.startswith("#"))


@pytest.mark.parametrize("name", SIZES)
def test_lists_are_complete_and_unambiguous(name: str) -> None:
    vocabulary = load_class_list(name)
    count, things = SIZES[name]
    assert len(vocabulary) == count == len(set(vocabulary.names)) == len(set(vocabulary.ids))
    assert things is None or sum(vocabulary.is_thing) == things
    assert all(vocabulary.is_seen)
    for entry in vocabulary.entries:
        assert entry.name == entry.name.strip() and entry.name
        assert entry.name not in entry.synonyms and "" not in entry.synonyms
        assert ", " not in entry.name or entry.synonyms == tuple(entry.name.split(", "))


@pytest.mark.parametrize("split", DIVIDED)
def test_counts(split: str) -> None:
    _, seen, unseen = DIVIDED[split]
    vocabulary = load_class_list(DIVIDED[split][0])
    assert len(unseen_of(split)) == unseen and len(vocabulary) - unseen == seen


def test_coco_stuff() -> None:
    found = unseen_of("coco_stuff_156_15")
    raw = [20, 24, 32, 33, 40, 56, 86, 99, 105, 123, 144, 147, 148, 168, 171]
    assert [number - 1 for number, _ in found.values()] == raw
    places = [19, 23, 28, 29, 36, 51, 76, 88, 94, 112, 133, 136, 137, 157, 160]
    assert [place for _, place in found.values()] == places
    assert list(found) == [
        "cow", "giraffe", "suitcase", "frisbee", "skateboard", "carrot", "scissors", "cardboard",
        "clouds", "grass", "playingfield", "river", "road", "tree", "wall-concrete",
    ]  # fmt: skip
    ids = load_class_list("coco_stuff_171").ids
    unused = {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}
    assert {number - 1 for number in ids} == set(range(182)) - unused


def test_coco_panoptic() -> None:
    """Things first, as in COCO's instances; stuff under COCO-Stuff's ids, merged classes after."""
    found, stuff = load_class_list("coco_panoptic_133"), load_class_list("coco_stuff_171")
    assert found.entries[:80] == load_class_list("coco_instances_80").entries
    assert list(found.ids) == sorted(found.ids)
    single, merged = found.entries[80:116], found.entries[116:]
    assert all(stuff.names[stuff.index_of_id[e.id]] == e.name for e in single)
    assert [e.id for e in merged] == list(range(184, 201))
    assert all(e.name.endswith("-merged") for e in merged)
    assert len(load_class_split("coco_panoptic_119_14", found.names)) == 14


def test_coco_instances() -> None:
    ids = {
        "coco_instances_48_17": (
            {5, 6, 17, 18, 21, 22, 28, 32, 36, 41, 47, 49, 61, 63, 76, 81, 87},
            {"bus", "dog", "couch", "snowboard"},
        ),
        "coco_instances_65_15": (
            {5, 7, 14, 17, 23, 33, 34, 36, 48, 54, 58, 70, 74, 80, 89},
            {"hair drier", "parking meter", "hot dog", "fork"},
        ),
    }
    for split, (numbers, some) in ids.items():
        found = unseen_of(split)
        assert {number for number, _ in found.values()} == numbers and some <= set(found)
    every, fewer = (set(load_class_list(f"coco_instances_{n}").names) for n in (80, 65))
    assert fewer < every
    left_out = every - fewer  # on neither side of 48/17
    assert len(left_out) == 15 and {"stop sign", "hot dog", "cell phone"} <= left_out
    stuff = load_class_list("coco_stuff_171")
    things = {e.name: e.id for e in stuff.entries if e.kind == "thing"}
    assert things == {e.name: e.id for e in load_class_list("coco_instances_80").entries}


def test_the_48_17_split_wants_its_65_classes() -> None:
    with pytest.raises(UserError, match="48 seen and 17 unseen"):
        load_class_split("coco_instances_48_17", load_class_list("coco_instances_80").names)


def test_voc() -> None:
    found = unseen_of("voc_15_5")
    assert [number for number, _ in found.values()] == [16, 17, 18, 19, 20]
    assert [place for _, place in found.values()] == [15, 16, 17, 18, 19]
    assert list(found) == ["potted plant", "sheep", "sofa", "train", "tvmonitor"]
    names = load_class_list("voc_20").names
    assert names[:15] == tuple(
        "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
        "person".split()
    )
    assert load_class_split("voc_15_5", [*names, "background"]) == tuple(found)


def test_pascal_context() -> None:
    ten = written("pascal_context_10")
    for n in (2, 4, 6, 8):
        assert written(f"pascal_context_{n}") == ten[:n]
    found = unseen_of("pascal_context_10")
    places = [19, 33, 48, 14, 7, 24, 6, 54, 31, 0]
    assert [found[name][1] for name in ten] == places
    assert [found[name][0] for name in ten] == [place + 1 for place in places]  # 0 is background


def test_pascal_contexts_59_are_of_its_459() -> None:
    from concat_cli.core.prepare.recipes.pascal import RAW_59

    every = load_class_list("pascal_context_459")
    few = load_class_list("pascal_context_59")
    assert every.ids == tuple(range(1, 460)) and few.ids == tuple(range(1, 60))
    assert list(RAW_59) == sorted(RAW_59)
    assert tuple(every.names[every.index_of_id[raw]] for raw in RAW_59) == few.names


def test_ade20k_150() -> None:
    vocabulary = load_class_list("ade20k_150")
    assert vocabulary.ids == tuple(range(1, 151))
    first = "wall building sky floor tree ceiling road bed windowpane grass cabinet sidewalk person"
    assert vocabulary.names[:13] == tuple(first.split())
    assert vocabulary.names[-3:] == ("glass", "clock", "flag")
    stuff = {e.name for e in vocabulary.entries if e.kind == "stuff"}
    assert {"wall", "sky", "house", "bar", "stage", "crt screen", "shower"} <= stuff
    assert {"bed", "step", "flag", "pot"}.isdisjoint(stuff)


def test_ade20k_full() -> None:
    """The nine first names that occur twice do not fall together."""
    rows = yaml.safe_load((CLASSES / "ade20k_847.yaml").read_text("utf-8"))
    vocabulary = load_class_list("ade20k_847")
    doubled = {"bag", "pot", "basket", "screen", "pier", "control panel", "pipe", "grill", "patio"}
    by_first: dict[str, list[str]] = {}
    for row, name in zip(rows, vocabulary.names, strict=True):
        by_first.setdefault(row["name"].split(", ")[0], []).append(name)
    assert {first for first, names in by_first.items() if len(names) > 1} == doubled
    assert all(names == [first] for first, names in by_first.items() if len(names) == 1)
    panels = [name for name in written("ade20k_full_572_275") if name.startswith("control panel")]
    assert len(panels) == len(set(panels)) == 2
    found = unseen_of("ade20k_full_572_275")
    assert found["catwalk"] == (432, 166) and found["gear shift"][1] == 844
    assert vocabulary.names[0] == "wall" and vocabulary.ids[0] == 2978


def test_cityscapes() -> None:
    vocabulary = load_class_list("cityscapes_19")
    assert vocabulary.ids == (7, 8, 11, 12, 13, 17, 19, 20, *range(21, 29), 31, 32, 33)
    things = [e.name for e in vocabulary.entries if e.kind == "thing"]
    assert things == "person rider car truck bus train motorcycle bicycle".split()


@pytest.mark.skipif(not FACTS.is_dir(), reason="the lists of facts are not here")
def test_against_the_lists_of_facts() -> None:
    stuff = json.loads((FACTS / "cocostuff171_split.json").read_text())
    assert {c["name"] for c in stuff["unseen"]} == set(unseen_of("coco_stuff_156_15"))
    named = {c["name"]: c["id"] + 1 for c in stuff["seen"] + stuff["unseen"]}
    vocabulary = load_class_list("coco_stuff_171")
    assert named == dict(zip(vocabulary.names, vocabulary.ids, strict=True))
    full = json.loads((FACTS / "ade847_freq.json").read_text())
    rows = yaml.safe_load((CLASSES / "ade20k_847.yaml").read_text("utf-8"))
    assert [(c["id"], c["name"]) for c in full] == [(r["id"], r["name"]) for r in rows]
    rare = [
        re.split(r"\s+", line, maxsplit=3)
        for line in (FACTS / "ade847_rare275.txt").read_text().splitlines()
        if line.strip()
    ]
    places = {place for _, place in unseen_of("ade20k_full_572_275").values()}
    assert places == {int(row[0]) for row in rare} and len(places) == 275
