"""The server's API: what it answers, what it refuses, who may ask."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import re
import struct
import tempfile
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("starlette", reason="the extra `serve` is not installed")
pytest.importorskip("python_multipart", reason="the extra `serve` is not installed")
pytest.importorskip("httpx", reason="Starlette's test client needs it")

from starlette.testclient import TestClient

from concat_cli.core.checkpoint import open_weights
from concat_cli.core.data.image_io import read_id_png
from concat_cli.core.infer.files import predict_paths
from concat_cli.core.infer.predictor import Predictor
from concat_cli.core.infer.renaming import AnyNames
from concat_cli.core.runs import BUILT_IN
from concat_cli.serve.answers import SHOWN, Answers, Limits, Question
from concat_cli.serve.app import application
from concat_cli.serve.worker import Worker

SCENE = Path(__file__).parents[1] / "docs" / "pictures" / "scene.png"
CLASSES = "striped star; dotted crescent, dotted ring; green water; brick : stuff"
ADDRESS = "http://127.0.0.1:7860"
LIMITS = Limits(upload=1 << 20, pixels=100_000, names=6, letters=30, waiting=4, seconds=20)


@pytest.fixture(scope="module")
def names() -> AnyNames:
    return AnyNames(open_weights(BUILT_IN), "cpu")


@pytest.fixture
def worker() -> Iterator[Worker]:
    found = Worker(LIMITS.waiting)
    yield found
    found.stop()
    assert found.ended(10)


@pytest.fixture
def client(names: AnyNames, worker: Worker) -> TestClient:
    return TestClient(application(names, worker, LIMITS), base_url=ADDRESS)


def asked(client: TestClient, form: str = "json", data: Any = None, **changed: Any) -> Any:
    """The response to a picture with names."""
    values = {"classes": CLASSES} if data is None else data
    given = {"files": {"picture": ("scene.png", SCENE.read_bytes())}, "data": values} | changed
    return client.post(f"/predict?as={form}", **given)


def test_segments_are_those_of_the_predictor(client: TestClient, tmp_path: Path) -> None:
    answer = asked(client).json()
    listed = [part.strip() for part in CLASSES.split(";")]
    expected = Predictor.load(None, listed, "cpu")(SCENE)
    found = {one["id"]: one for one in answer["segments"]}
    assert len(found) == len(expected.segments) > 2
    for segment in expected.segments:
        one = found[segment.id]
        entry = expected.vocabulary.entries[segment.class_index]
        assert (one["name"], one["kind"]) == (entry.name, entry.kind)
        assert one["area"] == segment.area and one["bbox"] == list(segment.bbox)
        assert one["score"] == pytest.approx(segment.score, abs=1e-4)
        assert re.fullmatch("#[0-9a-f]{6}", one["colour"])
    (tmp_path / "ids.png").write_bytes(base64.b64decode(answer["panoptic_png"]))
    assert np.array_equal(read_id_png(tmp_path / "ids.png"), expected.panoptic_map)
    (tmp_path / "same.png").write_bytes(asked(client, "png").content)
    assert np.array_equal(read_id_png(tmp_path / "same.png"), expected.panoptic_map)
    assert (answer["height"], answer["width"]) == expected.panoptic_map.shape


def test_runs_hold_the_same_map_and_large_ones_are_made_smaller(
    client: TestClient, names: AnyNames, worker: Worker
) -> None:
    image = np.asarray(Image.open(SCENE).convert("RGB"))
    small = asked(client, "runs").json()["map"]
    ids = np.repeat(small["values"], small["lengths"]).reshape(small["height"], small["width"])
    png = np.asarray(Image.open(io.BytesIO(asked(client, "png").content)))
    assert ids.shape == image.shape[:2] and np.array_equal(ids, png[..., 0])
    wide = io.BytesIO()
    Image.fromarray(np.tile(image, (1, 30, 1))[:20]).save(wide, "PNG")
    whole = TestClient(application(names, worker, Limits()), base_url=ADDRESS)
    answer = asked(whole, "runs", files={"picture": ("w.png", wide.getvalue())}).json()
    shown = answer["map"]
    assert answer["width"] == 3840 and SHOWN / 2 < shown["width"] <= SHOWN
    assert sum(shown["lengths"]) == shown["width"] * shown["height"]


def test_the_zip_holds_what_predict_writes(client: TestClient, tmp_path: Path) -> None:
    listed = [part.strip() for part in CLASSES.split(";")]
    predict_paths(Predictor.load(None, listed, "cpu"), [SCENE], tmp_path / "out")
    response = asked(client, "zip")
    assert response.headers["Content-Disposition"].endswith("scene.zip")
    with zipfile.ZipFile(io.BytesIO(response.content)) as packed:
        packed.extractall(tmp_path / "zip")
    written, served = (
        {p.relative_to(tmp_path / folder): p for p in (tmp_path / folder).rglob("*.*")}
        for folder in ("out", "zip")
    )
    assert written.keys() == served.keys() and len(served) == 3
    for name, path in served.items():
        if name.suffix == ".png":
            assert path.read_bytes() == written[name].read_bytes()
    ours, theirs = (json.loads(f[Path("panoptic.json")].read_text()) for f in (served, written))
    for one in (ours, theirs):
        for image in one["images"]:
            image.pop("file_name")  # a path, or the name that was sent
        for annotation in one["annotations"]:
            assert annotation["segments_info"]
    assert ours == theirs
    assert asked(client, "overlay").content == served[Path("scene.overlay.png")].read_bytes()


def test_the_least_score_and_the_weights_own_names(client: TestClient) -> None:
    own = asked(client, data={}).json()["segments"]
    assert len(own) > 3
    strict = asked(client, data={"min_score": "0.95"}).json()["segments"]
    assert 0 < len(strict) < len(own) and min(one["score"] for one in strict) >= 0.95
    facts = client.get("/about").json()
    assert {one["name"] for one in own} <= {one["name"] for one in facts["classes"]}
    assert facts["limits"]["upload"] == LIMITS.upload


def claimed(side: int) -> bytes:
    """A PNG of a few bytes that has so many pixels on a side by its header."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def pictures(data: bytes, name: str = "photo.png") -> dict[str, Any]:
    return {"files": {"picture": (name, data)}}


REFUSED: dict[str, tuple[int, str, dict[str, Any]]] = {
    "text": (400, "photo.png: it is damaged or not an image", pictures(b"hello")),
    "cut off": (400, "photo.png: it is damaged", pictures(SCENE.read_bytes()[:2000])),
    "empty": (400, "photo.png: it is damaged or not an image", pictures(b"")),
    "HEIC": (400, "is a HEIC file", pictures(b"\0\0\0\x18ftypheic" + bytes(50))),
    "pixels": (413, "1000 x 1000 pixels, more than 0.1 million", pictures(claimed(1000))),
    "a bomb": (400, "too many pixels", pictures(claimed(20_000))),
    "bytes": (413, "larger than 1 MB", pictures(bytes(2 << 20))),
    "odd name": (400, "image a_0A_22b_c.png: it is", pictures(b"x", 'a\n"b<c.png')),
    "no picture": (400, "no picture", {"files": {"classes": (None, "star")}}),
    "no form": (400, "no form", {"files": None, "content": b"abc"}),
    "unknown field": (400, "no field 'colour'", {"data": {"colour": "red"}}),
    "score": (400, "min_score is 'high'", {"data": {"min_score": "high"}}),
    "not a number": (400, "min_score is 'nan'", {"data": {"min_score": "nan"}}),
    "unknown word": (400, "never seen: 'zebra'", {"data": {"classes": "zebra"}}),
    "twice": (400, "'star' stands twice", {"data": {"classes": "star; star"}}),
    "many names": (
        413,
        "7 names",
        {"data": {"classes": "; ".join(f"a {n * 'x'}" for n in range(7))}},
    ),
    "long name": (413, "40 letters", {"data": {"classes": "x" * 40}}),
    "long text": (400, "exceeded", {"data": {"classes": "x;" * 40_000}}),
    "form": (400, "no as=gif", {"form": "gif"}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_told_and_the_next_is_answered(client: TestClient, case: str) -> None:
    status, what, changed = REFUSED[case]
    response = asked(client, **changed)
    assert response.status_code == status, response.text
    answer = response.json()
    assert re.search(what, answer["error"]) and answer.keys() == {"error", "hint"}
    assert tempfile.gettempdir() not in response.text and "Traceback" not in response.text
    assert asked(client).status_code == 200


def test_a_request_without_a_length_is_bounded_too(client: TestClient) -> None:
    head = b'--x\r\nContent-Disposition: form-data; name="picture"; filename="a.png"\r\n\r\n'
    sent: list[int] = []

    def endless() -> Iterator[bytes]:
        yield head
        while sum(sent) < 64 << 20:
            sent.append(1 << 16)
            yield bytes(1 << 16)

    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    response = client.post("/predict", content=endless(), headers=kind)
    assert response.status_code == 413


def test_a_full_queue_says_when_to_come_back(names: AnyNames) -> None:
    worker, go = Worker(2), threading.Event()
    client = TestClient(application(names, worker, LIMITS), base_url=ADDRESS)
    begun = worker.submit(go.wait)
    statuses: list[int] = []
    waiting = [
        threading.Thread(target=lambda: statuses.append(asked(client).status_code)) for _ in "ab"
    ]
    for thread in waiting:
        thread.start()
    end = time.monotonic() + 20
    while worker.taken < 2 and time.monotonic() < end:
        time.sleep(0.01)
    assert worker.taken == 2
    refused = asked(client)
    assert refused.status_code == 503 and 1 <= int(refused.headers["Retry-After"]) <= 60
    assert "2 requests are waiting" in refused.json()["error"]
    go.set()
    for thread in waiting:
        thread.join()
    assert begun.result() and statuses == [200, 200] and worker.taken == 0
    assert asked(client).status_code == 200
    worker.stop()


def test_who_has_gone_troubles_nobody(names: AnyNames) -> None:
    """Of a browser that has asked anew, the former question is not worked on."""
    worker, go = Worker(4), threading.Event()
    app = application(names, worker, LIMITS)
    seen: list[Question] = []
    worked = Answers.__call__
    body = TestClient(app).build_request(
        "POST", "/predict", files={"picture": ("a.png", SCENE.read_bytes())}
    )
    content = body.read()
    messages = [
        {"type": "http.request", "body": content, "more_body": False}, {"type": "http.disconnect"}
    ]  # fmt: skip

    async def receive() -> Any:
        return messages.pop(0) if len(messages) > 1 else messages[0]

    answered: list[Any] = []

    async def send(message: Any) -> None:
        answered.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", body.headers["content-type"].encode())]
    scope = {
        "type": "http", "method": "POST", "path": "/predict", "raw_path": b"/predict",
        "query_string": b"", "headers": headers, "client": None, "server": None, "root_path": "",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Answers, "__call__", lambda s, q, f: seen.append(q) or worked(s, q, f))
        worker.submit(go.wait)
        asyncio.run(app(scope, receive, send))
        go.set()
        worker.submit(lambda: None).result()
    worker.stop()
    assert seen == [] and worker.taken == 0 and answered[0]["status"] == 499


GUARDED: dict[str, tuple[dict[str, str], int]] = {
    "its own page": ({"Origin": ADDRESS, "Sec-Fetch-Site": "same-origin"}, 200),
    "a tunnel": ({"Host": "localhost:8000", "Origin": "http://localhost:8000"}, 200),
    "a network address": ({"Host": "192.168.0.7"}, 200),
    "IPv6": ({"Host": "[::1]:7860"}, 200),
    "a rebound name": ({"Host": "evil.example:7860"}, 403),
    "a name that ends alike": ({"Host": "localhost.evil.example"}, 403),
    "no host": ({"Host": ""}, 403),
    "another page": ({"Origin": "https://evil.example"}, 403),
    "another port": ({"Origin": "http://127.0.0.1:80"}, 403),
    "a sandbox": ({"Origin": "null"}, 403),
    "another site": ({"Sec-Fetch-Site": "cross-site"}, 403),
}


@pytest.mark.parametrize("case", GUARDED)
def test_pages_and_names_of_others_are_refused(client: TestClient, case: str) -> None:
    headers, status = GUARDED[case]
    assert client.get("/about", headers=headers).status_code == status


def test_a_token_is_asked_for(names: AnyNames, worker: Worker) -> None:
    app = application(names, worker, LIMITS, host="0.0.0.0", token="a-long-token-of-mine")
    client = TestClient(app, base_url=ADDRESS)
    assert client.get("/").status_code == 200
    for given in ("", "Bearer", "Bearer a-long-token-of-min", "Basic a-long-token-of-mine", "ä"):
        headers = {"Authorization": given.encode()} if given else {}
        for response in (client.get("/about", headers=headers), asked(client, headers=headers)):
            assert response.status_code == 401 and "token" in response.json()["error"]
            assert response.headers["WWW-Authenticate"] == "Bearer"
    assert client.get("/about?token=a-long-token-of-mine").status_code == 401
    assert asked(client, headers={"Authorization": "bearer a-long-token-of-mine"}).is_success


def test_the_page_is_whole_and_runs_nothing_else(client: TestClient) -> None:
    response = client.get("/")
    policy = response.headers["Content-Security-Policy"]
    for tag in ("script", "style"):
        (inside,) = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", response.text, re.S)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy and not re.search(r"https?://", response.text)
    assert "unsafe" not in policy and " style=" not in response.text
    labelled = set(re.findall(r'<label[^>]* for="([^"]+)"', response.text))
    assert set(re.findall(r'<input[^>]* id="([^"]+)"', response.text)) == labelled


def test_a_fault_of_ours_is_told_without_its_inside(names: AnyNames, worker: Worker) -> None:
    app = application(names, worker, replace(LIMITS))
    client = TestClient(app, base_url=ADDRESS, raise_server_exceptions=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Answers, "_found", lambda *_: {}["secret"])
        response = asked(client)
    assert response.status_code == 500 and "secret" not in response.text
    assert asked(client).status_code == 200
