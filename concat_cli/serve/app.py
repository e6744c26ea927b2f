"""The server's addresses: the page, what it serves, and `POST /predict`.

Who may ask: names of hosts are checked, so that no foreign page reaches the server under a name of
its own (DNS rebinding); a request that a browser sends for another page is refused (CSRF); where
there is a token, everything but the bare page wants it as a bearer token.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import secrets
import socket
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib.resources import files
from ipaddress import ip_address
from typing import Any
from urllib.parse import quote, urlsplit

from starlette.applications import Starlette
from starlette.datastructures import Headers, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from concat_cli import __version__
from concat_cli.core.data.store import Held
from concat_cli.core.errors import UserError
from concat_cli.core.infer.renaming import AnyNames
from concat_cli.serve.answers import FORMS, Answer, Answers, Limits, Question, TooMuchError
from concat_cli.serve.worker import FullError, Worker

EXAMPLE = "curl -F picture=@photo.jpg ADDRESS/predict"
POLL = 0.25  # seconds between two looks at whether who asked is still there
FIELD = 64 << 10  # bytes of a field that is no file


def application(
    names: AnyNames,
    worker: Worker,
    limits: Limits,
    host: str = "127.0.0.1",
    token: str = "",
    about: dict[str, Any] | None = None,
) -> ASGIApp:
    """The ASGI application. host: what the server is bound to; token: "" where none is asked for;
    about: what the page tells of the weights."""
    page = files("concat_cli.serve").joinpath("page.html").read_text("utf-8")
    answers = Answers(names, limits)
    facts = {
        "version": __version__,
        "classes": [{"name": e.name, "kind": e.kind} for e in names.own.entries],
        "min_score": names.cfg.infer.min_score,
        "limits": asdict(limits),
        **(about or {}),
    }

    async def show_page(_: Request) -> Response:
        return Response(page, media_type="text/html")

    async def show_facts(_: Request) -> Response:
        return JSONResponse(facts)

    async def predict(request: Request) -> Response:
        form = request.query_params.get("as", "json")
        if form not in FORMS:
            raise UserError(f"There is no as={form[:40]}.", f"Take one of {', '.join(FORMS)}.")
        try:
            with worker.place():
                question = await asyncio.wait_for(_question(request, limits), limits.seconds)
                answer = await _worked(request, worker, partial(answers, question, form))
        except FullError:  # many clients look for an answer only once they have sent everything
            await asyncio.wait_for(_drained(request, limits.upload), limits.seconds)
            raise
        saved = f"attachment; filename*=UTF-8''{quote(answer.file_name)}"
        headers = {"Content-Disposition": saved} if answer.file_name else {}
        return Response(answer.body, media_type=answer.media_type, headers=headers)

    app = Starlette(
        routes=[
            Route("/", show_page),
            Route("/about", show_facts),
            Route("/predict", predict, methods=["POST"]),
        ],
        exception_handlers={
            UserError: _told,
            HTTPException: _told,
            asyncio.TimeoutError: _told,
            ClientDisconnect: _told,
            Exception: _told,
        },
    )
    return _Guard(app, host, token, _policy(page))


async def _question(request: Request, limits: Limits) -> Question:
    """The form that was sent; UserError where a part is missing or no such thing."""
    too_large = TooMuchError(
        f"The request is larger than {limits.upload / (1 << 20):g} MB.", "Scale the picture down."
    )
    if int(request.headers.get("content-length", "0")) > limits.upload:
        raise too_large
    if "multipart/form-data" not in request.headers.get("content-type", ""):
        raise UserError("This is no form.", EXAMPLE)
    read = 0

    async def counted() -> Message:
        nonlocal read
        message = await request.receive()
        read += len(message.get("body", b""))
        if read > limits.upload:
            raise too_large
        return message

    limited = Request(request.scope, counted)
    async with limited.form(max_files=1, max_fields=8, max_part_size=FIELD) as form:
        unknown = [key for key in form if key not in ("picture", "classes", "min_score")]
        if unknown:
            what = f"There is no field {unknown[0][:40]!r}."
            raise UserError(what, "Fields: picture (a file), classes, min_score.")
        picture, classes, score = (form.get(k) for k in ("picture", "classes", "min_score"))
        if not isinstance(picture, UploadFile):
            raise UserError("The request has no picture.", EXAMPLE)
        if isinstance(classes, UploadFile) or isinstance(score, UploadFile):
            raise UserError("Only the picture is a file.", "Send the others as text.")
        name = re.sub(r"[^\w .()-]", "_", (picture.filename or "")[-200:]) or "picture"
        return Question(Held(name, await picture.read()), classes or "", _score(score))


def _score(text: str | None) -> float | None:
    """0-1; None where nothing was sent."""
    if not text:
        return None
    try:
        score = float(text)
    except ValueError:
        score = -1.0
    if not 0 <= score <= 1:
        raise UserError(f"min_score is {text[:40]!r}.", "Send a number from 0 to 1.")
    return score


async def _worked(request: Request, worker: Worker, work: Callable[[], Answer]) -> Answer:
    """What the worker made; it is not troubled for who has gone meanwhile."""
    future = worker.submit(work)
    waiting = asyncio.wrap_future(future)
    try:
        while not (await asyncio.wait({waiting}, timeout=POLL))[0]:
            if worker.stopping.is_set():
                raise HTTPException(503, "The server is being ended.")
            if await request.is_disconnected():
                raise ClientDisconnect
        return waiting.result()
    finally:
        future.cancel()


async def _drained(request: Request, most: int) -> None:
    """Reads the rest of a request and forgets it, up to a number of bytes."""
    read = 0
    async for chunk in request.stream():
        read += len(chunk)
        if read > most:
            return


async def _told(_: Request, error: Exception) -> Response:
    """An error as JSON: what is wrong, and what to do."""
    headers = {"Retry-After": str(error.seconds)} if isinstance(error, FullError) else {}
    if isinstance(error, HTTPException):
        status, what, hint = (
            error.status_code,
            error.detail,
            EXAMPLE if error.status_code == 405 else "",
        )
    elif isinstance(error, UserError):
        status = (
            503 if isinstance(error, FullError) else 413 if isinstance(error, TooMuchError) else 400
        )
        what, hint = error.what, error.hint
    elif isinstance(error, asyncio.TimeoutError):
        status, what, hint = 408, "The request did not arrive in time.", "Send it again."
    elif isinstance(error, ClientDisconnect):
        status, what, hint = 499, "Nobody waits for the answer.", ""
    elif isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        status, what, hint = 507, "There is not enough memory for this.", "Scale the picture down."
    else:
        status, what = 500, f"The server failed: {type(error).__name__}."
        hint = "The terminal that it runs in shows more."
    return JSONResponse({"error": what, "hint": hint}, status, headers)


class _Guard:
    """Refuses who may not ask, and adds the headers that tell browsers what the page may do."""

    def __init__(self, app: ASGIApp, host: str, token: str, policy: str) -> None:
        self._app, self._token, self._policy = app, token, policy
        self._hosts = {"localhost", host.casefold(), socket.gethostname().casefold()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = {
                    "content-security-policy": self._policy,
                    "x-content-type-options": "nosniff",
                    "referrer-policy": "no-referrer",
                    "cross-origin-resource-policy": "same-origin",
                    "cache-control": "no-store",
                }
                message["headers"] += [(key.encode(), value.encode()) for key, value in own.items()]
            await send(message)

        refused = self._refused(scope["path"], Headers(scope=scope))
        if refused is None:
            return await self._app(scope, receive, marked)
        status, what, hint = refused
        headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
        await JSONResponse({"error": what, "hint": hint}, status, headers)(scope, receive, marked)

    def _refused(self, path: str, headers: Headers) -> tuple[int, str, str] | None:
        """Status, what and hint; None where all is well."""
        host = headers.get("host", "")
        if not self._is_ours(host):
            return (
                403,
                f"This server is not {host[:100]!r}.",
                "Use its address or its name.",
            )
        origin = headers.get("origin")
        foreign = origin is not None and urlsplit(origin).netloc.casefold() != host.casefold()
        if foreign or headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            return 403, "Another page sent this request.", "Send it from the server's own page."
        if self._token and path != "/":
            scheme, _, given = headers.get("authorization", "").partition(" ")
            right = secrets.compare_digest(given.strip().encode(), self._token.encode())
            if scheme.casefold() != "bearer" or not right:
                hint = (
                    "It is in the address that was printed; curl -H 'Authorization: Bearer TOKEN'"
                )
                return 401, "This server asks for a token.", hint
        return None

    def _is_ours(self, host: str) -> bool:
        """Whether a Host header is an address, or a name of this machine."""
        name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
        if name in self._hosts:
            return True
        try:
            return bool(ip_address(name))
        except ValueError:
            return False


def _policy(page: str) -> str:
    """A Content-Security-Policy that lets the page's own script and style run, and nothing else."""

    def digest(tag: str) -> str:
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.S)
        return f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; script-src {digest('script')}; style-src {digest('style')}; "
        "img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
