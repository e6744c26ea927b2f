"""A hub on this machine: as much of its protocol as the client library needs to fill its cache."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest

COMMIT = "a" * 40


@dataclass
class Repository:
    """Files by name, and what the page says."""

    files: dict[str, bytes]
    licence: str | None = "mit"
    gated: bool = False


@dataclass
class Hub:
    """Repositories by name; `cut`: after so many bytes of a file the connection ends, once a
    number; `asked`: (file, first byte) of every download."""

    repositories: dict[str, Repository]
    cut: list[int] = field(default_factory=list)
    asked: list[tuple[str, int]] = field(default_factory=list)


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, body: bool) -> None:
            path = self.path.partition("?")[0]
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
                return self._page(match[1])
            match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
            assert match is not None, path
            repository = hub.repositories.get(match[1])
            if repository is None:
                return self._fault(401, "RepoNotFound")
            if repository.gated:
                return self._fault(403, "GatedRepo")
            if match[2] not in repository.files:
                return self._fault(404, "EntryNotFound")
            self._file(match[2], repository.files[match[2]], body)

        def _page(self, name: str) -> None:
            repository = hub.repositories.get(name)
            if repository is None:
                return self._fault(401, "RepoNotFound")
            listed = [{"rfilename": n, "size": len(d)} for n, d in repository.files.items()]
            card = {} if repository.licence is None else {"license": repository.licence}
            page = {"id": name, "sha": COMMIT, "siblings": listed, "cardData": card, "tags": []}
            data = json.dumps(page).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _fault(self, code: int, what: str) -> None:
            self.send_response(code)
            self.send_header("X-Error-Code", what)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _file(self, name: str, data: bytes, body: bool) -> None:
            start = int(re.findall(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[0])
            self.send_response(206 if start else 200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("Content-Length", str(len(data) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.end_headers()
            if body:
                hub.asked.append((name, start))
                end = start + hub.cut.pop() if hub.cut and len(data) > 1000 else len(data)
                self.wfile.write(data[start:end])

    return Handler


@contextmanager
def running(hub: Hub, patch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """The hub is served, the client library asks it, and its cache is the folder."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    constants = huggingface_hub.constants
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "HTTP_PROXY", "http_proxy"):
        patch.delenv(name, raising=False)
    patch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def no_network(patch: pytest.MonkeyPatch, cache: Path) -> None:
    """The client library finds nobody; its cache is the folder."""
    patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
