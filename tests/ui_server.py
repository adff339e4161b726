"""The page's real server in a thread of this process, and requests as anybody could send them.

with serving(talk) as port:
    assert send(port, "POST", "/ask", asked(who=[0])).status == 200
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

JSON = {"Content-Type": "application/json"}


@contextlib.contextmanager
def serving(talk: Any, *, host: str | None = "localhost", token: str | None = None) -> Iterator[int]:
    """Serve the page of a talk at 127.0.0.1, and yield the port."""
    from bellwether.ask.ui import make_server
    from bellwether.ask.ui_app import make_app
    from bellwether.ask.ui_turns import Turns

    with socket.create_server(("127.0.0.1", 0)) as listener, Turns() as turns:
        server = make_server(make_app(talk, turns, host=host, token=token))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(120)
            assert not thread.is_alive(), "the server does not end"


@dataclass(frozen=True)
class Got:
    """What a request got."""

    status: int
    headers: dict[str, str]
    text: str

    @property
    def events(self) -> list[tuple[str, Any]]:
        """What was told, one after the other."""
        lines = [event.split("\n") for event in self.text.split("\n\n")[:-1]]
        return [(kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for kind, data in lines]

    @property
    def last(self) -> tuple[str, Any]:
        """What was told last."""
        return self.events[-1]


def asked(**changes: Any) -> bytes:
    """A question as the page asks it, but for some of its parts."""
    question = {"instruction": "Task 1?", "context": "", "example": None, "who": [0], "temperature": 0, "top_p": 1}
    return json.dumps({**question, "max_new_tokens": 3, "seed": 0, **changes}).encode()


def send(port: int, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Got:
    """Send a request, and return all that comes."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    with contextlib.closing(connection):
        connection.request(method, path, body, JSON if headers is None else headers)
        answer = connection.getresponse()
        found = {name.lower(): value for name, value in answer.getheaders()}
        return Got(answer.status, found, answer.read().decode())


@contextlib.contextmanager
def asking(port: int, **changes: Any) -> Iterator[Any]:
    """Ask, and yield the answer of the server to read from; closing it is what a closed tab does."""
    body = asked(**changes)
    with socket.create_connection(("127.0.0.1", port), timeout=120) as line:
        head = f"POST /ask HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        line.sendall(f"{head}\r\n\r\n".encode() + body)
        with line.makefile("rb") as answer:
            yield answer
