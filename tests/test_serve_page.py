"""The page in a real browser: as a person uses it, without an error in its console."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import chromium
from PIL import Image
from serve_helpers import Served, served

try:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
except ImportError as _missing:
    pytest.skip(f"{_missing.name} is not installed", allow_module_level=True)

for _name in ("starlette", "uvicorn", "python_multipart"):
    pytest.importorskip(_name, reason="the extra `serve` is not installed")

SCENE = Path(__file__).parents[1] / "docs" / "pictures" / "scene.png"
TOKEN = "a-token-for-the-tests"


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served() as found:
        yield found


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The browser."""
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def browser(started: Any, server: Served, tmp_path: Path) -> Iterator[Any]:
    """The page, just opened; what it saves goes to `tmp_path`."""
    saved = {"behavior": "allow", "downloadPath": str(tmp_path)}
    started.execute_cdp_cmd("Browser.setDownloadBehavior", saved)
    started.get("about:blank")
    started.get(server.address)
    until(lambda: started.find_element(By.ID, "weights").text)
    yield started
    assert [line for line in started.get_log("browser") if line["level"] != "INFO"] == []


def until(found: Callable[[], Any], seconds: float = 20) -> Any:
    """What is found at last."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(0.05)
    raise AssertionError("it did not happen")


def text(browser: Any, name: str) -> str:
    return browser.find_element(By.ID, name).text


def segments(browser: Any) -> list[str]:
    """The names in the list of segments."""
    return [one.text for one in browser.find_elements(By.CSS_SELECTOR, "#found .name")]


def settled(browser: Any) -> list[str]:
    """The segments once the page has an answer to everything."""
    time.sleep(0.4)  # it waits a little for further names
    until(lambda: "segments in" in text(browser, "status"))
    return segments(browser)


def opened(browser: Any, path: Path = SCENE) -> None:
    browser.find_element(By.ID, "file").send_keys(str(path))


def shown(browser: Any) -> bytes:
    """What is drawn on the picture."""
    code = "return document.getElementById('segments').toDataURL()"
    return browser.execute_script(code)


def test_a_picture_is_named_segments_are_seen_and_saved(browser: Any, tmp_path: Path) -> None:
    opened(browser)
    assert len(settled(browser)) > 3
    name = browser.find_element(By.ID, "name")
    for typed in ("striped star", "dotted crescent, dotted ring;green water", "brick"):
        name.send_keys(typed + Keys.ENTER)
    found = settled(browser)
    assert set(found) <= {"striped star", "dotted crescent", "green water", "brick"}
    assert {"striped star", "green water"} <= set(found)
    chips = browser.find_elements(By.CSS_SELECTOR, "#chips li")
    kinds = [chip.find_element(By.CLASS_NAME, "kind") for chip in chips]
    assert [kind.text for kind in kinds] == ["thing", "thing", "stuff", "thing"]
    kinds[3].send_keys(Keys.SPACE)
    settled(browser)
    assert "brick : stuff" in text(browser, "curl")
    focused = browser.switch_to.active_element
    assert focused.get_attribute("aria-pressed") == "true" and focused.text == "stuff"

    for form, ending in (("overlay", "scene.overlay.png"), ("zip", "scene.zip")):
        browser.find_element(By.CSS_SELECTOR, f"[data-form={form}]").click()
        until((tmp_path / ending).exists)
    assert Image.open(tmp_path / "scene.overlay.png").size == Image.open(SCENE).size
    with zipfile.ZipFile(tmp_path / "scene.zip") as packed:
        listed = json.loads(packed.read("panoptic.json"))
        assert Image.open(io.BytesIO(packed.read("panoptic/scene.png"))).size == (128, 128)
    ids = {one["id"]: one["name"] for one in listed["categories"]}
    saved = [ids[one["category_id"]] for one in listed["annotations"][0]["segments_info"]]
    assert sorted(saved) == sorted(segments(browser))

    browser.find_element(By.CSS_SELECTOR, "#chips li button[aria-label='Remove brick']").click()
    assert "brick" not in settled(browser)
    for _ in range(3):
        browser.find_element(By.ID, "name").send_keys(Keys.BACKSPACE)
    settled(browser)
    assert browser.find_elements(By.CSS_SELECTOR, "#chips li") == []


def test_the_slider_hides_at_once_and_asks_anew_when_it_stops(browser: Any) -> None:
    opened(browser)
    before, drawn = settled(browser), shown(browser)
    slider = browser.find_element(By.ID, "score")
    code = "arguments[0].value = 0.97; arguments[0].dispatchEvent(new Event('input'))"
    browser.execute_script(code, slider)
    assert len(segments(browser)) < len(before) and shown(browser) != drawn
    slider.send_keys(Keys.END)
    until(lambda: text(browser, "status").startswith("0 segments"))
    assert text(browser, "score-value") == "1.00" and segments(browser) == []
    slider.send_keys(Keys.HOME)
    until(lambda: len(segments(browser)) >= len(before))


def test_a_segment_is_highlighted_by_pointer_and_by_keyboard(browser: Any) -> None:
    opened(browser)
    found, drawn = settled(browser), shown(browser)
    actions = ActionChains(browser)
    actions.move_to_element(browser.find_element(By.ID, "picture")).perform()
    until(lambda: shown(browser) != drawn)
    tip = browser.find_element(By.ID, "tip")
    lit = browser.find_element(By.CSS_SELECTOR, "#found .on .name").text
    assert tip.is_displayed() and tip.text.startswith(lit) and lit in found
    actions.move_to_element(browser.find_element(By.ID, "curl-title")).perform()
    until(lambda: shown(browser) == drawn)
    browser.execute_script("document.querySelector('#found button').focus()")
    until(lambda: shown(browser) != drawn)
    assert browser.find_element(By.CSS_SELECTOR, "#found .on .name").text == found[0]


def test_a_broken_picture_is_a_message_and_the_next_one_is_shown(
    browser: Any, tmp_path: Path
) -> None:
    broken = tmp_path / "a <b>bold<b> name.png"
    broken.write_bytes(SCENE.read_bytes()[:500])
    opened(browser, broken)
    until(lambda: "damaged" in text(browser, "what"))
    assert "a _b_bold_b_ name.png" in text(browser, "what") and text(browser, "hint")
    large = tmp_path / "large.png"
    with large.open("wb") as file:
        file.truncate(40 << 20)
    opened(browser, large)
    assert "40.0 MB, more than 32" in until(lambda: text(browser, "what"))
    opened(browser)
    assert settled(browser) and not browser.find_element(By.ID, "wrong").is_displayed()
    browser.find_element(By.ID, "name").send_keys("zebra" + Keys.ENTER)
    until(lambda: "never seen: 'zebra'" in text(browser, "what"))
    refused = [line for line in browser.get_log("browser") if line["level"] != "INFO"]
    assert len(refused) == 2 and all("status of 400" in line["message"] for line in refused)


HANDED = """
    const [kind, text] = arguments;
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const data = new DataTransfer();
    data.items.add(new File([bytes], `by-${kind}.png`, { type: 'image/png' }));
    const how = { bubbles: true, cancelable: true };
    dispatchEvent(kind === 'paste' ? new ClipboardEvent(kind, { clipboardData: data, ...how })
        : new DragEvent(kind, { dataTransfer: data, ...how }));
"""


@pytest.mark.parametrize("kind", ["paste", "drop"])
def test_a_picture_is_pasted_or_dropped(browser: Any, kind: str) -> None:
    browser.execute_script(HANDED, kind, base64.b64encode(SCENE.read_bytes()).decode())
    assert settled(browser)
    assert f"by-{kind}.png" in text(browser, "curl")


def test_the_curl_line_does_the_same(browser: Any) -> None:
    opened(browser)
    browser.find_element(By.ID, "name").send_keys(
        "striped star; it's green water : stuff" + Keys.ENTER
    )
    until(lambda: "never seen" in text(browser, "what"))
    browser.get_log("browser")
    assert "'classes=striped star; it'\\''s green water : stuff'" in text(browser, "curl")
    browser.find_element(By.CSS_SELECTOR, "#chips li:last-child button:last-child").click()
    browser.find_element(By.ID, "name").send_keys("green water" + Keys.ENTER)
    found = settled(browser)
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    line = text(browser, "curl")
    done = subprocess.run(["sh", "-c", line], cwd=SCENE.parent, capture_output=True, check=True)
    assert [one["name"] for one in json.loads(done.stdout)["segments"]] == found


@pytest.mark.parametrize("width", [400, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_can_be_read(browser: Any, width: int, scheme: str) -> None:
    """Nothing sticks out, every control has a name, and text is told from its ground (WCAG AA)."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    opened(browser)
    browser.find_element(By.ID, "name").send_keys("water : stuff; striped star" + Keys.ENTER)
    settled(browser)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    controls = browser.find_elements(By.CSS_SELECTOR, "button, input")
    assert [one.id for one in controls if one.is_displayed() and not one.accessible_name] == []
    ratios = browser.execute_script(CONTRAST)
    assert ratios and [one for one in ratios if one[1] < 4.5] == []
    if folder := os.environ.get("CONCAT_SHOTS"):  # to look at
        browser.save_screenshot(f"{folder}/page-{width}-{scheme}.png")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


CONTRAST = """
    const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    const light = (colour) => {
        const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map((c) => linear(c / 255));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = (one) => {
        const colour = getComputedStyle(one).backgroundColor;
        return /, 0\\)$/.test(colour) && one.parentElement ? ground(one.parentElement) : colour;
    };
    const hasText = (one) => [...one.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    return [...document.querySelectorAll('body :not(script, style, :disabled)')]
        .filter((one) => one.checkVisibility() && hasText(one))
        .map((one) => {
            const both = [light(getComputedStyle(one).color), light(ground(one))];
            return [one.textContent, (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05)];
        });
"""


def test_the_token_in_the_address_opens_the_page(started: Any) -> None:
    with served("--token", TOKEN) as server:
        assert server.address.endswith(f"#token={TOKEN}")
        bare = server.address.partition("#")[0]
        started.get(bare)
        until(lambda: started.find_element(By.ID, "gate").is_displayed())
        assert not started.find_element(By.TAG_NAME, "main").is_displayed()
        started.find_element(By.ID, "token").send_keys(TOKEN + Keys.ENTER)
        until(lambda: started.find_element(By.TAG_NAME, "main").is_displayed())
        started.get("about:blank")
        started.get(server.address)
        until(lambda: started.find_element(By.ID, "weights").text)
        opened(started)
        assert settled(started) and TOKEN not in text(started, "curl")
        seen = [line["message"] for line in started.get_log("browser") if line["level"] != "INFO"]
        assert len(seen) == 1 and "401" in seen[0]
