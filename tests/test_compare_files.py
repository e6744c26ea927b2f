"""Files of several methods side by side, and folders of semantic maps, against naive loops."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from concat_cli.app import main
from concat_cli.core.data.image_io import read_id_png
from concat_cli.core.errors import UserError
from concat_cli.core.evaluate.compare_files import Against, compare_files, is_file, parse_file
from concat_cli.core.evaluate.files import PanopticFiles, evaluate_files
from concat_cli.core.evaluate.intervals import draws
from concat_cli.core.evaluate.scores import Scoring
from concat_cli.core.evaluate.semantic_files import evaluate_maps

GOLDEN = Path(__file__).parent / "golden" / "pq"
PRED, TRUTH = GOLDEN / "pred.json", GOLDEN / "gt.json"


def naive_counts(path: Path) -> tuple[list[str], np.ndarray]:
    """(M, K, 4) IoU, TP, FP, FN of each image and class, a pair of segments at a time."""
    real, found = (json.loads(p.read_text()) for p in (TRUTH, path))
    ids = [c["id"] for c in real["categories"]]
    names = {image["id"]: image["file_name"] for image in real["images"]}
    theirs = {a["image_id"]: a for a in found["annotations"]}
    rows = []
    for one in real["annotations"]:
        counts = np.zeros((len(ids), 4))
        other = theirs[one["image_id"]]
        truth = read_id_png(TRUTH.with_suffix("") / one["file_name"])
        pred = read_id_png(path.with_suffix("") / other["file_name"])
        matched = set()
        for s in one["segments_info"]:
            if s.get("iscrowd"):
                continue
            hit = False
            for p in other["segments_info"]:
                if p["category_id"] != s["category_id"]:
                    continue
                a, b = truth == s["id"], pred == p["id"]
                union = (a | b).sum() - ((truth == 0) & b).sum()
                if union and (a & b).sum() / union > 0.5:
                    counts[ids.index(s["category_id"]), 0] += (a & b).sum() / union
                    counts[ids.index(s["category_id"]), 1] += 1
                    hit = True
                    matched.add(p["id"])
            counts[ids.index(s["category_id"]), 3] += not hit
        for p in other["segments_info"]:
            b = pred == p["id"]
            crowd = [
                s["id"]
                for s in one["segments_info"]
                if s.get("iscrowd") and s["category_id"] == p["category_id"]
            ]
            ignored = (b & (truth == 0)).sum() + sum((b & (truth == c)).sum() for c in crowd[-1:])
            if p["id"] not in matched and ignored <= 0.5 * b.sum():
                counts[ids.index(p["category_id"]), 2] += 1
        rows.append(counts)
    return [names[a["image_id"]] for a in real["annotations"]], np.array(rows)


def naive_pq(counts: np.ndarray) -> list[float]:
    """PQ of each class, nan where it does not occur."""
    return [
        iou / (tp + fp / 2 + fn / 2) if tp + fp + fn else float("nan") for iou, tp, fp, fn in counts
    ]


def test_a_folder_that_save_wrote_stands_for_its_json(tmp_path: Path) -> None:
    (tmp_path / "panoptic.json").write_text("{}")
    for text, label in ((str(tmp_path), str(tmp_path)), (f"ours={tmp_path}", "ours")):
        assert is_file(text)
        assert parse_file(text) == (label, PanopticFiles(tmp_path / "panoptic.json"))


def test_differences_are_those_of_a_naive_loop(tmp_path: Path) -> None:
    repeats = 40
    entries = [("ours", PanopticFiles(PRED)), ("truth", PanopticFiles(TRUTH))]
    found = compare_files(entries, Against(PanopticFiles(TRUTH)), repeats)
    (names, a), (_, b) = naive_counts(PRED), naive_counts(TRUTH)
    one = found.differences[0]
    assert (one.label, one.minus, found.images) == ("truth", "ours", len(names))

    def gap(weights: np.ndarray, c: int | None) -> float:
        ours, theirs = (
            naive_pq(sum(w * x for w, x in zip(weights, counts, strict=True))) for counts in (b, a)
        )
        if c is not None:
            return ours[c] - theirs[c]
        return float(np.nanmean(ours) - np.nanmean(theirs))

    drawn = np.concatenate(list(draws(len(names), repeats, 0)))
    listed = [c["name"] for c in json.loads(TRUTH.read_text())["categories"]]
    rows = {row.name: row for row in one.classes}
    for c in (None, 0, 5, 10):
        interval = one.pq["all"] if c is None else rows[listed[c]].difference
        value = gap(np.ones(len(names)), c)
        if np.isnan(value):
            assert interval is None
            continue
        gaps = [g for weights in drawn if not np.isnan(g := gap(weights, c))]
        low, high = np.percentile(gaps, [2.5, 97.5])
        assert interval is not None
        assert (interval.value, interval.low, interval.high) == pytest.approx((value, low, high))
    values = [row.difference.value for row in one.classes if row.difference]
    assert values == sorted(values) and one.classes[-1].difference is None

    each = {
        name: float(np.nanmean(naive_pq(y)) - np.nanmean(naive_pq(x)))
        for name, x, y in zip(names, a, b, strict=True)
    }
    assert {image.image: image.gap for image in one.images} == pytest.approx(
        {name: value for name, value in each.items() if value}
    )
    gaps = [abs(image.gap) for image in one.images]
    assert gaps == sorted(gaps, reverse=True)


def test_arguments_are_files_or_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_file("a=x.json:pngs") == ("a", PanopticFiles(Path("x.json"), Path("pngs")))
    assert parse_file("x.json") == ("x.json", PanopticFiles(Path("x.json")))
    assert is_file("a=x.json") and not is_file("demo") and not is_file("w=x.safetensors")
    pred, truth = str(PRED), ["--truth", str(TRUTH)]
    for words, what in (
        ([pred, "demo", *truth], "is a file, and demo a run"),
        ([pred], "Nothing says what"),
        ([pred, *truth, "--limit", "3"], "--limit means nothing where files are compared"),
        (["demo", *truth], "demo is no COCO panoptic JSON, and no folder"),
        ([pred, pred, *truth], "Two files are called"),
        ([str(GOLDEN), "--classes", "x.txt", "--match", "id", *truth], "no vocabulary file"),
    ):
        assert main(["compare", *words, "--out", str(tmp_path / "no")]) == 2, words
        assert what in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "no").exists()


def test_the_command_compares_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", f"ours={PRED}", f"truth={TRUTH}", "--truth", str(TRUTH), "--per-class"]
    assert main([*words, "--bootstrap", "20", "--out", str(tmp_path)]) == 0
    shown, text = capsys.readouterr().out, (tmp_path / "compare.md").read_text()
    value = evaluate_files(PRED, TRUTH).panoptic["all"].pq
    for told in (shown, text):
        assert f"{100 * value:.1f} [" in told and "differ most" in told and "class 9" in told
    plain = json.loads((tmp_path / "compare.json").read_text())
    assert (
        plain["rows"][0]["pq"]["all"]["value"] == value and plain["rows"][0]["pq"]["seen"] is None
    )


def test_each_class_is_shown_worst_first(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", "--predictions", str(PRED), "--truth", str(TRUTH)]
    assert main([*words, "--per-class"]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = lines[next(i for i, line in enumerate(lines) if line.startswith("class ")) + 1 :]
    report = evaluate_files(PRED, TRUTH)
    expected = sorted((row.pq, row.name) for row in report.per_class if row.pq is not None)
    assert [" ".join(line.split()[:2]) for line in table] == [n for _, n in expected] + ["class 10"]


# --- semantic maps ----------------------------------------------------------------------------

CLASSES = "road\nsky, heaven\ndog\ncat\n"


def maps(root: Path, names: list[str], seed: int, classes: int = 4) -> dict[str, np.ndarray]:
    """Random maps of classes and 255, as grey PNGs."""
    rng, found = np.random.default_rng(seed), {}
    for number, name in enumerate(names):
        values = rng.integers(0, classes + 1, (9, 11 + number)).astype(np.uint8)
        values[values == classes] = 255
        found[name] = values
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(values)
        if number == 1:  # as mmsegmentation writes them
            picture = picture.convert("P")
        picture.save(root / name)
    return found


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    names = ["town/a.png", "town/b.png", "c.png"]
    maps(tmp_path / "truth", names, 0, 3)  # no cat
    maps(tmp_path / "pred", names, 1)
    (tmp_path / "classes.txt").write_text(CLASSES)
    return tmp_path / "pred", tmp_path / "truth", tmp_path / "classes.txt"


def test_semantic_maps_against_a_naive_loop(folders: tuple[Path, Path, Path]) -> None:
    pred, truth, classes = folders
    (truth.parent / "split.yaml").write_text("unseen:\n- dog\n")
    split = str(truth.parent / "split.yaml")
    report = evaluate_maps(pred, truth, classes, class_split=split)
    hits, real, named = (dict.fromkeys(range(4), 0) for _ in range(3))
    for path in truth.rglob("*.png"):
        a = np.array(Image.open(path)).ravel().tolist()
        b = np.array(Image.open(pred / path.relative_to(truth))).ravel().tolist()
        for t, p in zip(a, b, strict=True):
            if t == 255:
                continue
            real[t] += 1
            if p != 255:
                named[p] += 1
            hits[t] += t == p
    iou = {c: hits[c] / (real[c] + named[c] - hits[c]) for c in range(3)}
    whole = report.semantic["all"]
    assert whole.n == 3 and report.absent == {"semantic": ("cat",)} and report.images == 3
    assert whole.miou == pytest.approx(sum(iou.values()) / 3)
    total = sum(real.values())
    assert whole.fwiou == pytest.approx(sum(real[c] * iou[c] for c in range(3)) / total)
    assert whole.pacc == pytest.approx(sum(hits.values()) / total)
    assert report.semantic["seen"].miou == pytest.approx((iou[0] + iou[1]) / 2)
    assert report.semantic["unseen"].miou == pytest.approx(iou[2])
    assert [row.iou for row in report.per_class[:3]] == pytest.approx(list(iou.values()))


def test_semantic_maps_are_checked(folders: tuple[Path, Path, Path]) -> None:
    pred, truth, classes = folders

    def refused(match: str, **given: Scoring) -> None:
        with pytest.raises(UserError, match=match) as caught:
            evaluate_maps(pred, truth, classes, **given)
        assert caught.value.hint

    refused("mean nothing here", scoring=Scoring(calibrate=True))
    refused("--tasks semantic alone", scoring=Scoring(tasks="panoptic"))
    refused("Nobody says which classes", scoring=Scoring(split="seen"))
    (pred / "extra.png").write_bytes((pred / "c.png").read_bytes())
    evaluate_maps(pred, truth, classes)
    Image.fromarray(np.full((9, 13), 7, np.uint8)).save(pred / "c.png")
    refused(r"c\.png has the value 7")
    Image.fromarray(np.zeros((9, 12), np.uint8)).save(pred / "c.png")
    refused(r"c\.png is 12 x 9 pixels, but the truth is 13 x 9")
    (pred / "c.png").unlink()
    refused(r"no prediction for 1 of the 3 images of the truth, such as c\.png")
    for path in truth.rglob("*.png"):
        Image.fromarray(np.full((9, 11), 255, np.uint8)).save(path)
        Image.fromarray(np.zeros((9, 11), np.uint8)).save(pred / path.relative_to(truth))
    refused("Every pixel of .* is void")


def test_the_commands_take_semantic_maps(
    folders: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pred, truth, classes = map(str, folders)
    words = ["evaluate", "--predictions", pred, "--truth", truth]
    assert main([*words, "--classes", classes, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["protocol"]["tasks"] == ["semantic"] and said["panoptic"]["all"] is None
    assert main(words) == 2 and "--classes FILE" in capsys.readouterr().err
    out = tmp_path / "out"
    words = ["compare", f"a={pred}", f"b={truth}", "--truth", truth, "--classes", classes]
    assert main([*words, "--out", str(out), "--bootstrap", "10"]) == 0
    plain = json.loads((out / "compare.json").read_text())
    assert plain["rows"][0]["miou"]["all"]["value"] == said["semantic"]["all"]["miou"]
    assert plain["rows"][1]["miou"]["all"]["value"] == 1
