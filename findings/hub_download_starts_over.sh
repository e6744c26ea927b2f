#!/usr/bin/env bash
# huggingface_hub 2.4.0, hf_hub_download over HTTP (without Xet).
#
# Expected, as before (0.36.0 is run beside it): a download that was stopped goes on from what had
# come when the same call is made again.
# Seen: it starts again at the first byte. What came goes to a file with a random name, which is
# deleted where the download is interrupted, and where the process is killed stays in the cache,
# used by nothing, once for each attempt. Only within one call is a broken connection taken up again.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for version in 2.4.0 0.36.0; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install -q "huggingface_hub==$version"
done
cd "$work"
python3 - <<'PY'
import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SIZE, HELD_AT = 40 << 20, 25 << 20  # the client writes by 10 MiB
starts, hold = [], threading.Event()


class Hub(BaseHTTPRequestHandler):
    """One file of zeros; while `hold` is set, a download stands still at HELD_AT."""

    def do_HEAD(self):
        self.head(0)

    def do_GET(self):
        start = int((re.findall(r"bytes=(\d+)-", self.headers.get("Range", "")) or [0])[0])
        starts.append(start >> 20)
        self.head(start)
        end = HELD_AT if hold.is_set() else SIZE
        with contextlib.suppress(ConnectionError):  # whoever asked was stopped
            self.wfile.write(bytes(end - start))
        while hold.is_set():
            time.sleep(0.05)

    def head(self, start):
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("ETag", f'"{"b" * 64}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(SIZE - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{SIZE - 1}/{SIZE}")
        self.end_headers()

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
DOWNLOAD = "from huggingface_hub import hf_hub_download as d; d('some/model', 'model.safetensors')"


def partial(home):
    """MiB of each unfinished file in the cache."""
    return sorted(path.stat().st_size >> 20 for path in home.rglob("*.incomplete"))


def begin(version, home):
    own = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    own |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(home)}
    own |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0"}
    return subprocess.Popen([f"{version}/bin/python", "-c", DOWNLOAD], env=own,
                            stderr=subprocess.DEVNULL)


def run(version, how):
    """A download stopped by a signal after 20 MiB, and again: unfinished files, starts in MiB."""
    home = Path(f"{version}-{how}").absolute()
    starts.clear()
    hold.set()
    client = begin(version, home)
    until = time.monotonic() + 60
    while sum(partial(home)) < 20 and time.monotonic() < until:
        time.sleep(0.05)
    client.send_signal(how)
    client.wait(60)
    hold.clear()
    left = partial(home)
    assert begin(version, home).wait(60) == 0
    print(f"{version}, {how.name}: {left} MiB left behind, the two downloads start at {starts} MiB, "
          f"unfinished after the second {partial(home)}")
    return left, list(starts), partial(home)


seen = [run("2.4.0", how) for how in (signal.SIGINT, signal.SIGKILL)]
assert seen == [([], [0, 0], []), ([20], [0, 0], [20])], "the behaviour has changed"
assert run("0.36.0", signal.SIGINT) == ([20], [0, 20], []), "the older version is otherwise"
PY
