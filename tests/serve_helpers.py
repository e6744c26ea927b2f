"""A server in a process of its own, as a user starts it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass
class Served:
    """A server that answers at an address."""

    process: subprocess.Popen[str]
    address: str

    def memory(self) -> int:
        """Bytes that the process has in memory."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def interrupted(self, number: int = signal.SIGINT) -> float:
        """Seconds from Ctrl-C, or another signal, to the end."""
        start = time.perf_counter()
        self.process.send_signal(number)
        self.process.wait(30)
        return time.perf_counter() - start


@contextmanager
def served(*options: str, code: str = "") -> Iterator[Served]:
    """`concat serve` with these options at a free port. code: run in the process before."""
    program = f"import sys\nfrom concat_cli.app import main\n{code}\nsys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", program, "serve", "--port", "0", "--device", "cpu", *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    try:
        assert process.stdout is not None
        said: list[str] = []
        for line in process.stdout:
            said.append(line)
            if found := re.match(r"open (\S+)", line):
                yield Served(process, found[1])
                return
        raise AssertionError("".join(said))
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        process.wait()
