"""What an evaluation counts on demand: instances, images, offsets, fewer candidates, files."""

from __future__ import annotations

import gc
import json
import threading
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from data_helpers import VOCABULARY
from jsonschema import Draft202012Validator
from oracle import CFG, SCENES, Oracle, predictor, told_world
from PIL import Image
from pycocotools import mask as coco_mask

from concat_cli.commands.report_view import show_report
from concat_cli.console import Console
from concat_cli.core.data.dataset import PanopticDataset
from concat_cli.core.device import Share
from concat_cli.core.errors import UserError
from concat_cli.core.evaluate.files import evaluate_files
from concat_cli.core.evaluate.report import load_schema
from concat_cli.core.evaluate.run import evaluate_model
from concat_cli.core.evaluate.scores import Scoring, Sweep, TruthCheck, sweep_offsets
from concat_cli.core.infer.predictor import Predictor
from concat_cli.core.vocabulary import ClassEntry, Vocabulary

EVERYTHING = ("panoptic", "semantic", "instance")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> PanopticDataset:
    return told_world(tmp_path_factory.mktemp("world"))


def valid(report) -> dict:
    plain = report.to_json()
    Draft202012Validator(load_schema()).validate(json.loads(json.dumps(plain)))
    return plain


def test_instances_of_a_perfect_predictor(dataset):
    report = evaluate_model(predictor(dataset), dataset, Scoring(tasks=EVERYTHING))
    for name in ("all", "seen", "unseen"):
        group = report.instance[name]
        assert group is not None and group.ap50 == pytest.approx(1) and group.ap > 0.85
    assert (report.instance["all"].n, report.instance["seen"].n) == (2, 1)  # things alone
    assert report.instance["harmonic"].ap50 == pytest.approx(1)
    rows = {row["name"]: row for row in valid(report)["per_class"]}
    assert rows["cow"]["ap"] > 0.85 and rows["sky"]["ap"] is None
    assert report.absent["instance"] == ()
    wrong = evaluate_model(predictor(dataset, {7: 3}), dataset, Scoring(tasks=["instance"]))
    assert wrong.instance["unseen"].ap < 0.5  # every class is a detection, with a tiny score
    assert wrong.instance["harmonic"].ap < report.instance["harmonic"].ap
    assert wrong.panoptic["all"] is None and wrong.semantic["all"] is None
    assert wrong.protocol["tasks"] == ["instance"] and set(wrong.absent) == {"instance"}
    valid(wrong)


def test_counts_of_images_and_intervals(dataset):
    plain = evaluate_model(predictor(dataset, {7: 3}), dataset)
    report = evaluate_model(
        predictor(dataset, {7: 3}), dataset, Scoring(counts=True, bootstraps=100), workers=2
    )
    assert report.counts is not None and plain.counts is None and plain.intervals is None
    counts = report.counts.panoptic
    assert counts.shape == (5, 4, 4) and report.per_class == plain.per_class
    assert [int(c) for c in counts.sum(0)[1]] == [row.tp for row in plain.per_class]
    assert counts[0, 1].tolist() == [1, 0, 1, 0]  # the first image: a cat and the sky
    for name, (low, high) in report.intervals.pq.items():
        group = report.panoptic[name]
        assert low - 1e-9 <= group.pq <= high + 1e-9
    low, high = report.intervals.miou["all"]
    assert low <= report.semantic["all"].miou <= high and high - low > 0.01
    assert valid(report)["intervals"]["repeats"] == 100
    assert "counts" not in report.to_json()
    seen = evaluate_model(
        predictor(dataset, {7: 3}), dataset, Scoring(split="seen", bootstraps=100)
    )
    expected = {"all": None, "seen": report.intervals.pq["seen"], "unseen": None, "harmonic": None}
    assert seen.intervals.pq == expected


def mixed(dataset: PanopticDataset) -> Predictor:
    """Says cat, of margin 3, where there is a cow: an offset between mends it."""

    class Unsure(Oracle):
        def forward(self, images, padding, text, last_only):
            output = super().forward(images, padding, text, last_only)
            cow = output.class_logits[..., 1] > 0
            output.class_logits[..., 0][cow] = 23.0
            return output

    oracle = Unsure(SCENES)
    vocabulary = dataset.vocabulary
    return Predictor(oracle, torch.eye(len(vocabulary)), vocabulary, CFG)


def test_a_sweep_equals_evaluations_of_their_own_and_runs_the_model_once(dataset):
    swept = mixed(dataset)
    offsets = sweep_offsets(20.0, 0.0)
    report = evaluate_model(swept, dataset, sweep=Sweep(offsets, 1.2))
    once = swept.model.calls
    again = mixed(dataset)
    plain = evaluate_model(again, dataset)
    assert once == again.model.calls
    assert report.panoptic == plain.panoptic and report.per_class == plain.per_class
    found = report.calibration
    assert found is not None and [row.offset for row in found.rows] == list(offsets)
    for row in found.rows:
        single = mixed(dataset)
        single.cfg = replace(CFG, seen_offset=row.offset)
        alone = evaluate_model(single, dataset)
        assert row.seen_pq == alone.panoptic["seen"].pq
        assert row.unseen_pq == alone.panoptic["unseen"].pq
        assert row.hpq == pytest.approx(alone.panoptic["harmonic"].pq)
        assert row.hiou == pytest.approx(alone.semantic["harmonic"].miou)
    assert found.plain == 0 and found.dev == 1.2
    by_offset = {row.offset: row.hpq for row in found.rows}
    assert by_offset[0.0] < by_offset[found.oracle_pq] == max(by_offset.values())
    assert found.oracle_pq == min(o for o in offsets if o > 3)  # of equals the smallest
    valid(report)


def test_fewer_candidates_make_the_other_truth_void(dataset):
    unseen = Vocabulary(tuple(e for e in dataset.vocabulary.entries if not e.seen))

    class UnseenOracle(Oracle):
        def forward(self, images, padding, text, last_only):
            output = super().forward(images, padding, torch.eye(4), last_only)
            output.class_logits = output.class_logits[..., [1, 3, 4]]
            return output

    def named() -> Predictor:
        return Predictor(UnseenOracle(SCENES), torch.eye(2), unseen, CFG)

    report = evaluate_model(
        named(), dataset, Scoring(split="unseen", candidates="split", tasks=EVERYTHING)
    )
    assert report.protocol["setting"] == "restricted" and report.protocol["candidates"] == 2
    assert report.panoptic["unseen"].rq == 1 and report.panoptic["all"] is None
    assert report.semantic["unseen"].pacc == 1.0  # all its pixels, and no others count
    assert report.instance["unseen"].ap50 == pytest.approx(1)
    valid(report)
    general = evaluate_model(named(), dataset, Scoring(split="unseen"))
    assert general.protocol["setting"] == "generalised"
    # pixels of seen classes are named too, as some unseen class
    assert general.semantic["unseen"].miou < report.semantic["unseen"].miou


def test_a_predictor_of_other_classes_is_refused(dataset):
    other = Vocabulary((ClassEntry("dog", 1), ClassEntry("tree", 2)))
    with pytest.raises(UserError, match="None of the 2 classes"):
        evaluate_model(Predictor(Oracle(SCENES), torch.eye(2), other, CFG), dataset)
    some = Vocabulary((*VOCABULARY.entries, ClassEntry("dog", 99)))
    with pytest.raises(UserError, match=r"Not every one of the 5 classes.*'dog'"):
        evaluate_model(Predictor(Oracle(SCENES), torch.eye(5), some, CFG), dataset)


def test_truth_that_is_void_stops_the_evaluation(dataset):
    sample = dataset[0]
    empty = replace(
        sample, segment_map=0 * sample.segment_map, labels=sample.labels[:0], crowd=sample.crowd[:0]
    )
    check = TruthCheck(("panoptic",))
    check.judge()  # a process without an image has nothing to say
    check.add(empty)
    with pytest.raises(UserError, match="of 1 images are void, with 0 segments"):
        check.judge()
    speck = np.zeros_like(sample.segment_map)
    speck[:4, :4] = 1
    small = replace(sample, segment_map=speck, labels=sample.labels[:1], crowd=sample.crowd[:1])
    check = TruthCheck(("panoptic", "semantic"))
    with pytest.raises(UserError, match=r"99\.9% of the true pixels of 32 images are void"):
        for _ in range(40):
            check.add(small)
    objects = TruthCheck(("instance",))
    objects.add(small)
    objects.judge()
    fine = TruthCheck(("panoptic",))
    for index in range(5):
        fine.add(dataset[index])
    fine.judge()


def test_an_empty_or_void_data_set_is_refused_before_a_report(dataset, tmp_path):
    void = told_world(tmp_path, {1: [], 2: []})
    with pytest.raises(UserError, match="with 0 segments"):
        evaluate_model(
            predictor(void, scenes={1: [], 2: []}), void, Scoring(check=True, save=tmp_path)
        )
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*"))
    with pytest.raises(UserError, match="no image to score"):
        evaluate_model(predictor(dataset), dataset, Scoring(check=True, limit=0))


def test_everything_is_saved_and_says_the_same(dataset, tmp_path):
    report = evaluate_model(
        predictor(dataset, {7: 3}),
        dataset,
        Scoring(tasks=EVERYTHING, save=tmp_path / "found"),
    )
    truth = dataset.part.index
    again = evaluate_files(tmp_path / "found/panoptic.json", truth, unseen=["cow", "wall"])
    assert again.panoptic == report.panoptic
    names = sorted(path.name for path in (tmp_path / "found/semantic").iterdir())
    assert names == [f"{i:012d}.png" for i in SCENES]
    image = Image.open(tmp_path / "found/semantic" / names[0])
    assert image.mode == "L" and image.size == (128, 128)
    assert set(np.unique(np.asarray(image))) <= set(VOCABULARY.ids)
    found = json.loads((tmp_path / "found/instances.json").read_text())
    assert {one["category_id"] for one in found} <= {3, 7}
    assert list(dict.fromkeys(one["image_id"] for one in found)) == [1, 2, 3, 4, 5]  # in order
    mask = coco_mask.decode(found[0]["segmentation"])
    assert mask.shape == (128, 128) and mask.sum() == found[0]["bbox"][2] * found[0]["bbox"][3]
    assert not list((tmp_path / "found").glob(".*"))


def test_large_ids_take_sixteen_bits_and_larger_ones_are_refused(dataset, tmp_path):
    for highest, mode in ((300, "I;16"), (70_000, None)):
        moved = tuple(replace(e, id=e.id if e.id < 21 else highest) for e in VOCABULARY.entries)
        named = predictor(dataset, vocabulary=Vocabulary(moved))
        out = tmp_path / str(highest)
        if mode is None:
            with pytest.raises(UserError, match="16 bits"):
                evaluate_model(named, dataset, Scoring(save=out))
            continue
        evaluate_model(named, dataset, Scoring(save=out))
        images = [Image.open(path) for path in sorted((out / "semantic").iterdir())]
        assert {image.mode for image in images} == {mode}
        assert 300 in np.asarray(images[1]) and 20 in np.asarray(images[0])


def test_two_processes_count_and_save_everything_once(dataset, tmp_path):
    """Two threads stand in for two processes; a barrier stands in for their gather."""
    parts, reports, barrier = [None, None], [None, None], threading.Barrier(2)
    sweep = Sweep((0.0, 4.0))

    def scoring(folder: str) -> Scoring:
        return Scoring(tasks=EVERYTHING, bootstraps=20, counts=True, save=tmp_path / folder)

    def work(rank: int) -> None:
        def gather(value):
            parts[rank] = value
            barrier.wait()
            return list(parts)

        reports[rank] = evaluate_model(
            mixed(dataset), dataset, scoring("two"), sweep=sweep, share=Share(rank, 2, gather)
        )

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = evaluate_model(mixed(dataset), dataset, scoring("one"), sweep=sweep)
    for report in reports:
        assert report.instance == alone.instance and report.intervals == alone.intervals
        assert report.calibration == alone.calibration
        assert (report.counts.panoptic == alone.counts.panoptic).all()
    for name in ("panoptic.json", "instances.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert not list((tmp_path / "two").glob(".*"))


def test_memory_does_not_grow_with_the_images(tmp_path):
    scene = {n: [3, 20] if n % 2 else [7, 3, 21] for n in range(50)}
    data = told_world(tmp_path / "data", {i: scene[i % 50] for i in range(1, 71)})

    def peak(count: int) -> int:
        named = predictor(data, scenes=scene)
        gc.collect()
        tracemalloc.start()
        evaluate_model(
            named,
            data,
            Scoring(tasks=EVERYTHING, counts=True, save=tmp_path / str(count), limit=count),
            sweep=Sweep((0.0,)),
        )
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    peak(10)  # caches and imports
    few, many = peak(20), peak(70)
    assert many - few < 50 * 2000  # bytes of an image: its map alone has 65,536


def test_diagnostics_are_told_on_demand(dataset, capsys):
    """A perfect predictor finds every segment and names it right; one that calls cows cats does
    not."""
    plain = valid(evaluate_model(predictor(dataset), dataset, Scoring(diagnostics=True)))
    assert set(plain["diagnostics"].values()) == {1.0} and len(plain["diagnostics"]) == 6
    wrong = evaluate_model(predictor(dataset, {7: 3}), dataset, Scoring(diagnostics=True))
    found = valid(wrong)["diagnostics"]
    assert found["mask_recall_unseen"] == 1 and found["matched_accuracy_unseen"] < 1
    show_report(Console(), wrong)
    assert "found by a mask" in capsys.readouterr().out
    assert valid(evaluate_model(predictor(dataset), dataset))["diagnostics"] is None
