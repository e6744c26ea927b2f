"""The report page: its data, what may be in a name, how large it gets, and in a real Chromium."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from chromium import chromium
from oracle import predictor, told_world
from PIL import Image
from test_outcomes import overlap
from test_report import report_of

from concat_cli.app import main
from concat_cli.core.data.image_io import read_id_png
from concat_cli.core.errors import UserError
from concat_cli.core.evaluate.files import evaluate_files
from concat_cli.core.evaluate.page import make
from concat_cli.core.evaluate.page.comparison import IMAGES
from concat_cli.core.evaluate.page.curves import POINTS, training_of
from concat_cli.core.evaluate.page.findings import KEPT, Findings
from concat_cli.core.evaluate.page.make import page_data, page_of
from concat_cli.core.evaluate.page.pictures import picture_of
from concat_cli.core.evaluate.run import evaluate_model
from concat_cli.core.evaluate.scores import Scoring
from concat_cli.core.vocabulary import ClassEntry, Vocabulary

GOLDEN = Path(__file__).parent / "golden" / "pq"
EVIL = "</script><img src=x onerror=\"document.title='broken'\">&amp;\u2028'\"<!--"
LOOK = Scoring(look=True, bootstraps=20)


def data_in(page: str) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found
    return json.loads(found[1])


def flat_world(folder: Path) -> Path:
    """The golden files with an evil name, and a photo of each image in COCO's layout."""
    shutil.copytree(GOLDEN, folder / "annotations")
    truth = folder / "annotations" / "gt.json"
    content = json.loads(truth.read_text())
    content["categories"][0]["name"] = EVIL
    truth.write_text(json.dumps(content))
    (folder / "gt").mkdir()
    for image in content["images"]:
        size = image["width"], image["height"]
        name = Path(image.setdefault("file_name", f"{image['id']}.jpg")).name
        Image.new("RGB", size, (90, 120, 60)).save(folder / "gt" / name)
    truth.write_text(json.dumps(content))
    return folder / "annotations"


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """Of the golden files, classes divided, with the curves of a run."""
    folder = tmp_path_factory.mktemp("page")
    files = flat_world(folder)
    names = [c["name"] for c in json.loads((files / "gt.json").read_text())["categories"]]
    report = evaluate_files(files / "pred.json", files / "gt.json", LOOK, unseen=names[1:4])
    run = folder / "run"
    (run / "con").mkdir(parents=True)
    lines = [{"step": i, "loss": 9 / (i + 1), "seconds": 1.0} for i in range(1000)]
    lines += [{"step": 999, "dev": {"score": 0.5}}, {"step": 1000, "dev": {"score": 0.7}}]
    (run / "con" / "metrics.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in lines))
    make.write_page(report, folder / "page.html", f"run {EVIL}", run)
    return folder / "page.html"


def test_the_data_of_files(page):
    data = data_in(page.read_text("utf-8"))
    report = evaluate_files(GOLDEN / "pred.json", GOLDEN / "gt.json", LOOK)
    assert data["groups"][0]["pq"] == pytest.approx(report.panoptic["all"].pq, abs=1e-4)
    assert {g["name"] for g in data["groups"]} >= {"all", "seen", "unseen", "harmonic"}
    assert set(data["groups"][0]["ranges"]) == {"pq", "miou"}
    by_name = {row["name"]: row for row in data["classes"]}
    assert EVIL in by_name and sum(row["tp"] for row in by_name.values()) == sum(
        size["tp"] for size in data["sizes"]
    )
    assert sum(row["right"] for row in by_name.values()) == data["outcomes"][0]["count"]
    kept = data["worst"] + data["best"]
    assert kept and len({one["name"] for one in kept}) == len(kept)
    assert all(one["photo"].startswith("data:image/webp;base64,") for one in kept)
    assert data["worst"][0]["score"] <= data["best"][0]["score"]
    [stage] = data["training"]
    assert [c["name"] for c in stage["curves"]] == ["loss", "dev score"]
    assert len(stage["curves"][0]["values"]) <= POINTS


def test_the_maps_on_the_page_are_those_of_the_files(page):
    data = data_in(page.read_text("utf-8"))
    truth = json.loads((GOLDEN / "gt.json").read_text())
    by_image = {a["image_id"]: a for a in truth["annotations"]}
    of_name = {Path(i.get("file_name", f"{i['id']}.jpg")).name: i["id"] for i in truth["images"]}
    shown = data["worst"][0]
    listed = by_image[of_name[Path(shown["name"]).name]]
    ids = read_id_png(GOLDEN / "gt" / listed["file_name"])
    assert list(ids.shape) == shown["truth"]["size"]  # small enough to be shown pixel by pixel
    runs = np.array(shown["truth"]["runs"]).reshape(-1, 2)
    numbers = np.repeat(runs[:, 0], runs[:, 1]).reshape(ids.shape)
    for place, segment in enumerate(listed["segments_info"]):
        assert ((numbers == place + 1) == (ids == segment["id"])).all()


def test_no_name_gets_out_and_no_address_in(page):
    text = page.read_text("utf-8")
    assert "<img src=x" not in text and "\u2028" not in text and "onerror" in text
    assert data_in(text)["title"] == f"run {EVIL}"
    rest = text.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", rest)


def test_half_a_character_in_a_title_is_written(tmp_path):
    report = replace(report_of(), findings=None)
    make.write_page(report, tmp_path / "page.html", "half \ud800")
    assert "half \\ud800" in (tmp_path / "page.html").read_text("utf-8")


def test_weights_semantic_alone_and_processes(tmp_path):
    """All segments right; regions stand for segments where none are scored."""
    dataset = told_world(tmp_path)
    report = evaluate_model(predictor(dataset), dataset, Scoring(look=True))
    data = page_data(report, "weights")
    assert data["outcomes"][0]["count"] == sum(one["count"] for one in data["outcomes"])
    assert data["worst"][0]["photo"] and data["worst"][0]["found"]["segments"][0][2] is not None
    plain = evaluate_model(predictor(dataset), dataset, Scoring())
    assert plain.findings is None and plain.panoptic == report.panoptic
    assert "findings" not in report.to_json()
    regions = evaluate_model(predictor(dataset), dataset, Scoring(look=True, tasks=["semantic"]))
    data = page_data(regions, "regions")
    assert data["regions"] and data["outcomes"][0]["count"] > 0
    one = page_data(evaluate_model(
        predictor(dataset), dataset, Scoring(look=True, tasks=["instance"])
    ), "instances")  # fmt: skip
    assert "outcomes" not in one and one["classes"]


def test_noise_of_500_images_and_133_classes_stays_below_5_mb():
    vocabulary = Vocabulary(tuple(ClassEntry(f"class {i}", i) for i in range(133)))
    rng, findings = np.random.default_rng(0), Findings(vocabulary)
    photo = rng.integers(0, 256, (640, 480, 3), np.uint8)
    maps = rng.integers(0, 5, (2, 640, 480))
    picture = picture_of(photo, *maps)
    for number in range(500):
        rows = ["".join(map(str, rng.integers(0, 5, 40))) for _ in range(2)]
        labels = rng.integers(0, 133, (2, 9))
        findings.add(number, f"{number}.jpg", overlap(*rows, *labels), lambda: picture)
    report = replace(report_of(vocabulary=vocabulary), findings=findings)
    text = page_of(report, "noise")
    assert len(data_in(text)["worst"]) == KEPT and 1e5 < len(text.encode()) <= 5e6


def test_damaged_metrics_and_previews_are_passed_over(tmp_path):
    (tmp_path / "con" / "previews").mkdir(parents=True)
    (tmp_path / "con" / "previews" / "step_1.png").write_bytes(b"no picture")
    rows = '{"step": 1, "loss": 2}\n{"step": 2, "loss": null}\n{"step": 3, "loss": 1}\n{"st'
    (tmp_path / "con" / "metrics.jsonl").write_text(rows)
    (tmp_path / "con.old-1").mkdir()
    (tmp_path / "con.old-1" / "metrics.jsonl").write_text(rows)
    [stage] = training_of(tmp_path)
    assert stage.preview is None and stage.curves[0].values == [2, 1]


def test_the_command_on_files(tmp_path, capsys):
    files = flat_world(tmp_path)
    words = ["evaluate", "--predictions", str(files / "pred.json"), "--truth"]
    words += [str(files / "gt.json")]
    page = tmp_path / "new" / "page.html"
    assert main([*words, "--report", str(page), "--bootstrap", "10"]) == 0
    out = capsys.readouterr().out
    assert "page" in out and len(data_in(page.read_text("utf-8"))["classes"]) > 5
    shutil.rmtree(tmp_path / "gt")
    assert main([*words, "--report", str(page), "--bootstrap", "10"]) == 0
    assert "--pictures names the folder" in " ".join(capsys.readouterr().out.split())
    assert data_in(page.read_text("utf-8"))["worst"][0]["photo"] is None
    for wrong, hint in (
        (["--report", str(tmp_path)], "report.html"),
        (["--pictures", "x"], "--report"),
    ):
        assert main([*words, *wrong]) == 2
        assert hint in capsys.readouterr().err


def test_a_page_is_refused_before_anything_is_scored(tmp_path):
    with pytest.raises(UserError, match="not the name of a page"):
        make.check_page(tmp_path / "report.pdf")


def test_colours_can_be_read():
    """WCAG 2.1, 1.4.3: text has a contrast of 4.5 on both grounds, light and dark."""
    style = (Path(make.__file__).parent / "page.css").read_text("utf-8")
    sets = [dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in style.split("@media", 2)[:2]]
    assert all(len(one) > 8 for one in sets)
    for colours in sets:
        for ground in ("paper", "card"):
            for ink in ("ink", "dim", "seen", "unseen", "good", "bad", "focus"):
                light, dark = sorted(map(luminance, (colours[ground], colours[ink])), reverse=True)
                assert (light + 0.05) / (dark + 0.05) >= 4.5, (ground, ink)


def luminance(colour: str) -> float:
    parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.fixture
def browser(tmp_path) -> Iterator:
    with chromium(tmp_path / "profile") as started:
        yield started


def texts(browser, selector: str) -> list[str]:
    """Of the rows that are shown."""
    script = """return [...document.querySelectorAll(arguments[0])]
        .filter(one => one.offsetParent).map(one => one.textContent)"""
    return browser.execute_script(script, selector)


def test_in_a_browser(browser, page):
    """Opened at both widths, light and dark; sorted, filtered, pointed at; no error."""
    data = data_in(page.read_text("utf-8"))
    for width, scheme in ((1600, "light"), (400, "dark")):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        browser.get(page.as_uri())
        wide, dark = browser.execute_script(
            "return [document.documentElement.scrollWidth,"
            " getComputedStyle(document.body).backgroundColor]"
        )
        assert wide <= width and (dark == "rgb(20, 22, 26)") == (scheme == "dark")
    assert EVIL.split("&")[0] in browser.title and not texts(browser, "img[src=x]")

    names = "#classes tbody th .name"
    assert len(texts(browser, names)) == len(data["classes"])
    pq = [row["pq"] for row in data["classes"] if row["pq"] is not None]
    shown = [float(t) for t in texts(browser, "#classes tbody td:nth-of-type(3)") if t != "–"]
    assert shown == sorted(shown) and len(shown) == len(pq)
    for number, order in ((2, "ascending"), (0, "ascending"), (0, "descending")):
        script = "document.querySelectorAll('#classes thead button')[arguments[0]].click()"
        browser.execute_script(script, number)
        heads = "#classes thead th:nth-child({})"
        script = "return document.querySelector(arguments[0]).getAttribute('aria-sort')"
        assert browser.execute_script(script, heads.format(number + 1)) == order
    found = texts(browser, names)
    browser_order = "return arguments[0].slice().sort((a, b) => b.localeCompare(a))"
    assert found == browser.execute_script(browser_order, found)

    search = browser.find_element("id", "search")
    search.send_keys("</SCRIPT>")
    assert texts(browser, names) == [EVIL]
    assert texts(browser, "#shown") == [f"1 of {len(data['classes'])} classes"]
    search.clear()
    search.send_keys(" ")
    browser.find_element("id", "split").send_keys("unseen")
    assert len(texts(browser, names)) == 3

    pointed = browser.execute_script("""
        const canvas = document.querySelector("#images canvas");
        const box = canvas.getBoundingClientRect();
        const said = canvas.closest("figure").querySelector("[role=status]"), found = new Set();
        for (let y = 1; y < box.height; y += 2) for (let x = 1; x < box.width; x += 2) {
          const at = { clientX: box.left + x, clientY: box.top + y };
          canvas.dispatchEvent(new PointerEvent("pointermove", at));
          found.add(said.textContent);
        }
        return [...found]""")
    first = data["worst"][0]["truth"]["segments"]
    wanted = {data["names"][label] for label, _ in first}
    told = {text for text in pointed if text.startswith("truth: ")}
    assert told and {t.removeprefix("truth: ").rpartition(" (")[0] for t in told} <= wanted
    browser.execute_script("document.querySelector('#images details').open = true")
    button = browser.find_element("css selector", "#images .segments button")
    browser.execute_script("arguments[0].focus()", button)
    assert texts(browser, "#images [role=status]")[0].startswith("truth: ")
    nothing_is_wrong(browser)


def nothing_is_wrong(browser) -> None:
    """Everything has a name for those who do not see it, and the console is silent."""
    unnamed = browser.execute_script("""
        return [...document.querySelectorAll("canvas, svg, img, input, select, [role=region]")]
          .filter(e => !(e.getAttribute("aria-label") || e.hasAttribute("alt") || e.labels?.length))
          .map(e => e.outerHTML.slice(0, 80))""")
    assert unnamed == []
    assert [one for one in browser.get_log("browser") if one["level"] != "DEBUG"] == []


@pytest.fixture
def comparison(tmp_path, capsys) -> Path:
    """Two methods on the golden files, of which the second one finds everything."""
    files = flat_world(tmp_path)
    shutil.copytree(files / "gt", files / "best")
    shutil.copy(files / "gt.json", files / "best.json")
    out = tmp_path / "page.html"
    first = [f"{EVIL.replace('=', '')}={files / 'pred.json'}", f"best={files / 'best.json'}"]
    words = ["--truth", str(files / "gt.json"), "--pictures", str(tmp_path / "gt")]
    words += ["--out", str(tmp_path / "comparison"), "--bootstrap", "20", "--report", str(out)]
    assert main(["compare", *first, *words]) == 0
    assert "page.html" in capsys.readouterr().out
    return out


def test_the_data_of_a_comparison(comparison):
    data = data_in(comparison.read_text("utf-8"))
    saved = json.loads((comparison.parent / "comparison" / "compare.json").read_text())
    assert data["differences"] == saved["differences"] and data["rows"] == saved["rows"]
    (pair,) = data["differences"]
    assert 0 < len(data["shown"]) <= IMAGES
    assert set(data["shown"]) == {one["image"] for one in pair["images"][:IMAGES]}
    for image in data["shown"].values():
        assert list(image["found"]) == [pair["minus"], "best"] and image["photo"]
        real, best = image["truth"], image["found"]["best"]
        assert best["runs"] == real["runs"]
        assert {kind for _, kind, *_ in best["segments"]} <= {"right", "ignored"}
    assert "<img src=x" not in comparison.read_text("utf-8")


def test_a_comparison_in_a_browser(browser, comparison):
    browser.get(comparison.as_uri())
    data = data_in(comparison.read_text("utf-8"))
    (pair,) = data["differences"]
    rows = "#pair0 [aria-label=Classes] tbody"
    assert len(texts(browser, f"{rows} tr")) == len(pair["classes"])
    assert len(texts(browser, "#figures tbody tr")) == 3  # two methods, and their difference
    assert len(texts(browser, "#pair0 canvas")) == 3 * len(data["shown"])
    told = [text.split()[0] for text in texts(browser, f"{rows} td:last-of-type")]
    gaps = [float(text.replace("−", "-")) for text in told if text != "–"]
    assert gaps == sorted(gaps) and len(gaps) > 1
    browser.find_element("id", "search0").send_keys("no such class")
    assert texts(browser, "#shown0") == [f"0 of {len(pair['classes'])} classes"]
    nothing_is_wrong(browser)


def test_a_page_of_semantic_folders(tmp_path, capsys):
    """Of three classes side by side, the second one is found as the third."""
    for part, values in (("truth", (0, 1, 2)), ("found", (0, 2, 2))):
        (tmp_path / part).mkdir()
        stripes = np.repeat(np.array(values, np.uint8)[:, None], 20, 0) + np.zeros(
            (1, 30), np.uint8
        )
        Image.fromarray(stripes).save(tmp_path / part / "one.png")
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (30, 60)).save(tmp_path / "photos" / "one.jpg")
    (tmp_path / "classes.txt").write_text("sky\ngrass\nzebra\n")
    words = ["--predictions", str(tmp_path / "found"), "--truth", str(tmp_path / "truth")]
    words += ["--classes", str(tmp_path / "classes.txt"), "--report", str(tmp_path / "page.html")]
    assert main(["evaluate", *words, "--pictures", str(tmp_path / "photos")]) == 0
    data = data_in((tmp_path / "page.html").read_text("utf-8"))
    (image,) = data["worst"]
    assert data["regions"] and image["photo"] and data["colours"][0]
    assert [kind for _, kind, *_ in image["truth"]["segments"]] == ["right", "merged", "merged"]
    assert len(image["found"]["segments"]) == 2
