"""Who may speak to the page: what is refused before anything of it is read, and the headers of every answer.

A page on this machine alone answers to this machine's own names, so that no page elsewhere can reach it under a name
of its own that leads here. A page for other machines answers to whoever brings its token: once in the address, from
then on in a cookie. Either takes questions from itself alone, never from a page of another origin.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
import secrets

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Nothing comes from elsewhere, nothing is run but the page's own script, and no other page may frame this one.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
READING = ("GET", "HEAD")


class Guard:
    """An ASGI application that lets through to another what may speak to it.

    Args:
        app: the other.
        host: the name of this machine that it is served at, and that it answers to beside this machine's own
            addresses; None answers to every name, for other machines.
        token: what whoever asks must bring; None lets everybody ask who can reach it.
    """

    def __init__(self, app: ASGIApp, *, host: str | None, token: str | None) -> None:
        self._app, self._host, self._token = app, host and host.lower(), token
        # Cookies know no ports: each server's has a name of its own.
        self._cookie = f"bellwether-{hashlib.sha256((token or '').encode()).hexdigest()[:8]}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer what is refused, and hand on the rest."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        headers = dict(HEADERS)
        if self._token is not None and self._brings_token(request):
            headers["set-cookie"] = f"{self._cookie}={self._token}; Path=/; HttpOnly; SameSite=Strict"
        app = self._refusal(request) or self._app
        await app(scope, receive, _with_headers(send, headers))

    def _refusal(self, request: Request) -> Response | None:
        """Return what is said to a request that is refused; None lets it through."""
        if self._host is not None and not self._answers_to(request.headers.get("host", "")):
            return sentence("This page does not answer to that name.", 400)
        if self._token is not None and not (self._brings_token(request) or self._has_cookie(request)):
            return sentence("This page wants its token: open the whole address that bellwether ui has printed.", 403)
        if request.method not in READING and not _from_itself(request):
            return sentence("This page takes questions from itself alone.", 403)
        return None

    def _answers_to(self, header: str) -> bool:
        """Return whether a Host header names this machine; starlette's own check does not understand ``[::1]``."""
        # A name or an address, in brackets if it has colons, and perhaps a port.
        found = re.fullmatch(r"(?:\[([^\[\]]+)\]|([^:\[\]]+))(?::\d*)?", header.lower())
        name = found[1] or found[2] if found else ""
        return bool(name) and (name == self._host or of_this_machine(name))

    def _brings_token(self, request: Request) -> bool:
        """Return whether the page is opened with the token in its address."""
        opened = request.method == "GET" and request.scope["path"] == "/"
        return opened and self._is_token(request.query_params.get("token", ""))

    def _has_cookie(self, request: Request) -> bool:
        """Return whether the token comes in the cookie."""
        return self._is_token(request.cookies.get(self._cookie, ""))

    def _is_token(self, text: str) -> bool:
        """Return whether a text is the token, in a time that does not tell how much of it is right."""
        return secrets.compare_digest(text.encode("utf-8", "replace"), (self._token or "").encode())


def _from_itself(request: Request) -> bool:
    """Return whether a request comes from the page itself, or from a program that is no browser.

    Browsers say of every question where it comes from; no page can make them say otherwise.
    """
    origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site", "same-origin")
    host = request.headers.get("host", "").lower()
    return site == "same-origin" and (origin is None or origin.lower() in (f"http://{host}", f"https://{host}"))


def _with_headers(send: Send, headers: dict[str, str]) -> Send:
    """Return what sends an answer with further headers."""
    added = [(name.encode(), value.encode()) for name, value in headers.items()]

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], *added]
        await send(message)

    return send_with_headers


def of_this_machine(name: str) -> bool:
    """Return whether nothing but this machine has a name or an address.

    Args:
        name: as it stands in an address, without a port.
    """
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def sentence(text: str, status: int) -> Response:
    """Return an answer of one sentence, which the page shows as it is.

    Args:
        text: the sentence.
        status: HTTP's code.
    """
    return PlainTextResponse(f"{text}\n", status)
