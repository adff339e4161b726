"""What sites may reach of the SuperLink."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

# Before anything of Flower's.
import bellwether.engine.flower.quiet  # noqa: F401

# isort: split
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER

LARGEST_REQUEST = 2**23  # bytes that a site may send at once; Flower cuts arrays into pieces of 5 MiB

SLOWEST_REQUEST = 120.0  # seconds that a site may take for a request

_PUSH_OBJECT = "/v1/fleet/push-object"


class ForSites:
    """Flower's own part for sites, bounded in size, in sum and in time: a request is passed on once it is whole.

    Args:
        app: the SuperLink, as ASGI application.
    """

    def __init__(self, app: Any) -> None:
        self._app = app
        self._most, self._taken = LARGEST_REQUEST, dict[bytes, int]()

    def expect(self, most: int) -> None:
        """Take so many bytes of objects of each site from now on."""
        self._most, self._taken = most, {}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one request, as ASGI asks for."""
        if scope["type"] != "http" or not scope["path"].startswith("/v1/fleet/"):
            await _refuse(send, 404)
            return
        site = dict(scope["headers"]).get(FLEET_HTTP_PUBLIC_KEY_HEADER.lower().encode(), b"")
        counted = scope["path"] == _PUSH_OBJECT
        most = min(LARGEST_REQUEST, self._most - self._taken.get(site, 0)) if counted else LARGEST_REQUEST
        body = await _whole(receive, most)
        if body is None:
            await _refuse(send, 413)
            return
        given = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def again() -> Any:
            return next(given, None) or await receive()

        async def noted(message: Any) -> None:
            # Counted once Flower has found that the site is the one that it claims to be.
            if counted and message["type"] == "http.response.start" and message["status"] == 200:
                self._taken[site] = self._taken.get(site, 0) + len(body)
            await send(message)

        await self._app(scope, again, noted)


async def _whole(receive: Any, most: int) -> bytes | None:
    """Return the body of a request; None where it is too large, too slow, or was broken off."""
    parts, length = [], 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(SLOWEST_REQUEST):
            while True:
                message = await receive()
                length += len(message.get("body", b""))
                if message["type"] != "http.request" or length > most:
                    return None
                parts.append(message.get("body", b""))
                if not message.get("more_body", False):
                    return b"".join(parts)
    return None


async def _refuse(send: Any, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})
