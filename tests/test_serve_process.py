"""A real server: many at once, its end, and what its command refuses."""

from __future__ import annotations

import io
import signal
import socket
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from serve_helpers import served

from concat_cli.app import main

NEEDED = ("starlette", "uvicorn", "python_multipart")
installed = pytest.mark.skipif(
    any(find_spec(name) is None for name in (*NEEDED, "httpx")),
    reason="the extra `serve`, or httpx, is not installed",
)
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc tells the memory")
AT_ONCE = 50
SLOW = """
import time
from concat_cli.core.infer import predictor
predictor.Predictor._check = lambda *_: time.sleep(60)
"""


def photo(side: int, seed: int) -> bytes:
    """A PNG that is like no other."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((side, side)).save(file, "PNG")
    return file.getvalue()


@installed
@linux
def test_fifty_at_once_are_all_answered_and_memory_stays() -> None:
    """Each client comes again when it is told to; each answer is that of its own picture."""
    import httpx

    with served() as server, httpx.Client(timeout=60) as client:
        first: Counter[int] = Counter()

        def ask(number: int) -> tuple[int, int]:
            side, words = 64 + number, ("star", "blue ring", "water : stuff", "")[number % 4]
            sent = {"picture": (f"{number}.png", photo(side, number))}
            for attempt in range(100):
                response = client.post(
                    f"{server.address}predict", files=sent, data={"classes": words}
                )
                first[response.status_code] += attempt == 0
                if response.status_code != 503:
                    break
                time.sleep(int(response.headers["Retry-After"]))
            answer = response.json()
            assert (answer["width"], answer["file_name"]) == (side, f"{number}.png")
            return number, response.status_code

        def round_of_all() -> None:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                found = dict(pool.map(ask, range(AT_ONCE)))
            assert found == dict.fromkeys(range(AT_ONCE), 200)

        round_of_all()
        assert first[200] + first[503] == AT_ONCE and first[200] >= 1
        before = server.memory()
        for _ in range(2):
            round_of_all()
        assert server.memory() - before < 40e6


@installed
def test_ctrl_c_ends_it_with_connections_open() -> None:
    with served() as server:
        address = server.address.split("/")[2].split(":")
        with (
            socket.create_connection((address[0], int(address[1]))),
            socket.create_connection((address[0], int(address[1]))) as half,
        ):
            half.sendall(
                b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999\r\n\r\n--"
            )
            time.sleep(0.2)
            assert server.interrupted() < 10  # the connections would stay for ever
        assert server.process.returncode == 130


@installed
def test_a_service_manager_ends_it_without_a_word() -> None:
    with served() as server:
        server.interrupted(signal.SIGTERM)
        assert server.process.returncode == 143
        assert server.process.stdout is not None and not server.process.stdout.read()


@installed
def test_ctrl_c_ends_it_while_the_model_runs() -> None:
    import httpx

    with served(code=SLOW) as server:
        answers: list[httpx.Response] = []

        def ask() -> None:
            sent = {"picture": ("a.png", photo(64, 0))}
            answers.append(httpx.post(f"{server.address}predict", files=sent, timeout=60))

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        time.sleep(1)
        assert server.interrupted() < 4
        for thread in threads:
            thread.join()
        assert server.process.returncode == 130
        assert [one.status_code for one in answers] == [503, 503]
        assert "being ended" in answers[0].json()["error"]


@installed
def test_beyond_this_machine_it_has_a_token(capsys: pytest.CaptureFixture[str]) -> None:
    import httpx

    with served("--host", "0.0.0.0") as server:
        address, _, token = server.address.partition("#token=")
        port = address.rstrip("/").rpartition(":")[2]
        assert len(token) >= 20
        about = f"http://127.0.0.1:{port}/about"
        assert httpx.get(about).status_code == 401
        assert httpx.get(about, headers={"Authorization": f"Bearer {token}"}).status_code == 200


@installed
def test_what_the_command_refuses_before_anything_slow(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for options, what, hint in (
            (("--port", port), f"Cannot listen at 127.0.0.1, port {port}", "--port 0"),
            (("--host", "no.such.host.invalid"), "Cannot listen at no.such", "--host"),
            (("--token", "short"), "12 letters at least", "Leave it out"),
            (("--host", "0.0.0.0", "--token", "ä" * 20), "ASCII", "Leave it out"),
        ):
            assert main(["serve", *options]) == 2
            said = " ".join(capsys.readouterr().err.split())
            assert what in said and hint in said


def test_without_its_packages_it_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("concat_cli.commands.serve.find_spec", lambda name: None)
    assert main(["serve"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "needs starlette, uvicorn, python_multipart" in said
    assert "pip install 'concat-seg[serve]'" in said


def test_the_extra_and_the_command_name_the_same_packages() -> None:
    tomllib = pytest.importorskip("tomllib")
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8")
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    named = {line.split(">=")[0].replace("-", "_") for line in extras["serve"]}
    assert named == set(NEEDED) and set(extras["serve"]) <= set(extras["dev"])
