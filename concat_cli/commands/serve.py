"""`concat serve`: a page in the browser that names what is in a picture."""

from __future__ import annotations

import os
import secrets
import socket
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from ipaddress import ip_address
from typing import TYPE_CHECKING, Annotated

import typer

from concat_cli.commands.options import (
    KEY_VALUE,
    Device,
    DeviceOption,
    Force,
    RunName,
    WeightsFile,
    with_options,
)
from concat_cli.console import Console, relative
from concat_cli.core.errors import Stopped, UserError, exit_code

if TYPE_CHECKING:
    from types import FrameType

    from concat_cli.serve.worker import Worker

NEEDED = ("starlette", "uvicorn", "python_multipart")
SHORTEST = 12  # letters of a token
GRACE = 1  # seconds that open connections have at the end


@dataclass(frozen=True)
class Options:
    """What to serve, and where."""

    weights: WeightsFile = None
    name: RunName = None
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 7860
    host: Annotated[
        str, typer.Option(help="Address to listen at; others than this machine's need a token.")
    ] = "127.0.0.1"
    token: Annotated[
        str | None,
        typer.Option(envvar="CONCAT_TOKEN", help="With --host. Default: a new one, printed."),
    ] = None
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar=KEY_VALUE, help="A key of inference, e.g. infer.size=640; repeatable."
        ),
    ] = None
    device: DeviceOption = Device.auto
    force: Force = False


@with_options(Options)
def serve(asked: Options) -> None:
    """Name what is in a picture, in the browser."""
    from concat_cli.core.runs import find_weights

    console = Console()
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        what = f"`concat serve` needs {', '.join(missing)}."
        raise UserError(what, "pip install 'concat-seg[serve]'")
    token = _token(asked)
    found = find_weights(asked.name, asked.weights)
    console.say(f"weights {relative(found.path)} ({found.reason})")
    with _bound(asked.host, asked.port) as listener:
        import uvicorn

        from concat_cli.core.checkpoint import open_weights
        from concat_cli.core.clip.prompts import only_drawn
        from concat_cli.core.infer.renaming import AnyNames
        from concat_cli.serve.answers import Limits
        from concat_cli.serve.app import application
        from concat_cli.serve.worker import Worker

        names = AnyNames(
            open_weights(found.path),
            asked.device.value,
            overrides=asked.overrides or (),
            force=asked.force,
            progress=console.progress,
        )
        limits = Limits()
        worker = Worker(limits.waiting)
        about = {"weights": relative(found.path), "reason": found.reason}
        about["warning"] = only_drawn(names.cfg.clip.model)
        app = application(names, worker, limits, asked.host, token, about)

        class Server(uvicorn.Server):
            """Says where it listens, and tells those who wait that it ends."""

            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets)
                address = _address(asked.host, listener, token)
                console.result(f"open {address}   (Ctrl-C ends it)")

            def handle_exit(self, sig: int, frame: FrameType | None) -> None:
                worker.stop()
                super().handle_exit(sig, frame)

        config = uvicorn.Config(
            app, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE
        )
        try:
            Server(config).run([listener])
        except (KeyboardInterrupt, Stopped) as stop:  # as it is meant to end: nothing to resume
            raise typer.Exit(exit_code(stop)) from stop
        finally:
            _end(worker)


def _token(asked: Options) -> str:
    """ "" where only this machine can ask and no token is wanted; UserError for a poor one."""
    if asked.token is None:
        return "" if _is_loopback(asked.host) else secrets.token_urlsafe(16)
    if len(asked.token) < SHORTEST or not (asked.token.isascii() and asked.token.isprintable()):
        raise UserError(
            f"The token must have {SHORTEST} letters at least, and no others than ASCII.",
            "Leave it out: a new one is made and printed.",
        )
    return asked.token


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.casefold() == "localhost"


def _bound(host: str, port: int) -> socket.socket:
    """A socket that has the address but does not listen yet; UserError where it cannot have it."""
    try:
        kind, _, _, _, place = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(kind, socket.SOCK_STREAM)
        if os.name == "posix":  # elsewhere it would let two servers have one address
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
        return listener
    except OSError as error:
        what = f"Cannot listen at {host}, port {port}: {error.strerror or error}."
        raise UserError(what, "Choose another port, e.g. --port 0, or another --host.") from error


def _address(host: str, listener: socket.socket, token: str) -> str:
    """What to open. The token stands behind the #, which browsers never send."""
    port = listener.getsockname()[1]
    name = socket.gethostname() if host in ("0.0.0.0", "::", "") else host
    name = f"[{name}]" if ":" in name else name
    return f"http://{name}:{port}/" + (f"#token={token}" if token else "")


def _end(worker: Worker) -> None:
    """A model that runs cannot be interrupted, and Python would wait for it or fall over it."""
    worker.stop()
    if not worker.ended(GRACE):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130)
