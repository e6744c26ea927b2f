"""What `concat evaluate` shows of a report, and what it refuses to be asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from oracle import predictor, told_world

from concat_cli.app import main
from concat_cli.commands.report_view import filled, shorten, show_report
from concat_cli.console import Console
from concat_cli.core.evaluate.report import Report
from concat_cli.core.evaluate.run import evaluate_model
from concat_cli.core.evaluate.scores import Scoring, Sweep
from concat_cli.core.runs import BUILT_IN

TAKEN = {
    "unseen_pixels": "drop", "images_listed": 28, "images_dropped": 7, "segments_dropped": 9,
    "segments_void": 0, "pixels_listed": 100_000, "pixels_dropped": 1200, "images_by_class": {},
}  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    dataset = told_world(tmp_path_factory.mktemp("world"), {1: [3, 20], 2: [7, 3, 20]})
    return evaluate_model(
        predictor(dataset, {7: 3}),
        dataset,
        Scoring(tasks=("panoptic", "semantic", "instance"), bootstraps=50),
        protocol={"mode": "inductive", "filtering": TAKEN},
        sweep=Sweep((0.0, 2.5), 2.5),
    )


def shown(report: Report, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    show_report(Console(), report)
    return capsys.readouterr().out


def test_every_figure_has_its_column(report: Report, capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(report, capsys).splitlines()
    assert lines[0].split() == [
        "classes", "PQ", "SQ", "RQ", "n", "mIoU", "fwIoU", "mACC", "pACC", "n", "AP", "AP50", "AR",
        "n",
    ]  # fmt: skip
    everything = next(line.split() for line in lines if line.startswith("all"))
    group = report.panoptic["all"]
    assert everything[1] == f"{100 * group.pq:.1f}" and everything[4] == str(group.n)
    assert everything[5] == f"{100 * report.semantic['all'].miou:.1f}"
    assert everything[10] == f"{100 * report.instance['all'].ap:.1f}"


def test_intervals_offsets_and_protocol_are_said(
    report: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(report, capsys)
    assert "95% intervals over the images, drawn again 50 times" in text
    low, high = report.intervals.pq["all"]
    assert f"{100 * low:.1f} to {100 * high:.1f}" in text
    marked = [line for line in text.splitlines() if line.startswith("2.5 ")]
    assert len(marked) == 1 and "chosen on dev" in marked[0]
    assert "no result" in text and "mode inductive" in text and "4 candidates" in text
    assert "training data, unseen pixels: drop, 7 images dropped (25.0%), " in text
    assert "1,200 pixels dropped (1.2%)" in text
    assert "not in the semantic truth, so in no mean: 1 (wall)" in text


def test_the_easier_protocol_and_another_class_list_are_named(
    report: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = {
        "setting": "restricted", "split": "unseen", "candidates": 2,
        "overlap": {"count": 10, "of": 40, "names": [f"c{i}" for i in range(10)]},
    }  # fmt: skip
    text = shown(replace(report, protocol=report.protocol | facts), capsys)
    assert "the easier protocol" in text and "2 candidates" in text
    assert "labels of 10 of its 40 were trained on" in text and "c7 and 2 more" in text
    assert shorten(["a", "b"]) == "a, b"


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("--predictions p.json --truth t.json --tasks semantic", "need weights"),
        ("--predictions p.json --truth t.json --calibrate", "need weights"),
        ("--predictions p.json --truth t.json --candidates split", "need weights"),
        ("--predictions p.json --truth t.json --diagnostics", "need weights"),
        ("--official", "compares files, not weights"),
        ("--tasks panoptic,segments", "There is no task 'segments'"),
        ("--candidates split", "--split, which is all"),
    ],
)
def test_what_cannot_be_asked_for_is_said_before_any_work(
    line: str, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if not BUILT_IN.exists():
        pytest.skip("the built-in weights are not here")
    told_world(tmp_path / "zoo", {1: [3, 20]})
    (tmp_path / "zoo" / "dataset.json").write_text(
        '{"format": 1, "name": "zoo", "class_split": "own", "unseen": ["cow"], "parts": {"val": '
        '{"images": "images", "json": "panoptic.json", "pngs": "panoptic"}}}'
    )
    monkeypatch.chdir(tmp_path)
    weights = ["data.root=zoo", "--weights", str(BUILT_IN)]
    code = main(["evaluate", *([] if "--truth" in line else weights), *line.split()])
    assert code == 2 and what in capsys.readouterr().err


def test_columns_that_hold_nothing_are_not_shown() -> None:
    columns, rows = filled(
        ["classes", "PQ", "mIoU", "note"], [["a", None, 0.0, ""], ["b", None, 2.0, ""]]
    )
    assert columns == ["classes", "mIoU"] and rows == [["a", 0.0], ["b", 2.0]]
