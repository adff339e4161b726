"""An OpenAI-compatible server that answers as a test wants, over real HTTP."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Headers = dict[str, str]


@dataclass(frozen=True)
class Raw:
    """Bytes to answer with; those that are held back are not sent while the server is up."""

    status: int
    body: str
    headers: Headers = field(default_factory=dict)
    held_back: bool = False


@dataclass(frozen=True)
class Asked:
    """One request for a completion, and when it came."""

    body: dict[str, Any]
    headers: Headers
    time: float

    @property
    def prompt(self) -> str:
        return str(self.body["messages"][0]["content"])

    @property
    def answers(self) -> tuple[str, str]:
        """What the request shows as answer 1 and answer 2."""
        mark = re.search(r"^BEGIN request (\w+)$", self.prompt, re.MULTILINE)[1]
        found = [re.search(rf"BEGIN answer {n} {mark}\n(.*)\nEND answer {n} {mark}", self.prompt, re.S) for n in (1, 2)]
        return found[0][1], found[1][1]


Script = Callable[[Asked, int], "str | Raw"]


@dataclass
class Server:
    """What a running server knows.

    Args:
        script: what it answers to a request and its number, counted from 0.
        models: what it answers to a request for its models.
        asked: all requests for completions.
        greeted: how often it was asked for its models.
        most: the largest number of requests at the same time.
        over: set when the server goes down.
    """

    script: Script
    models: Raw = Raw(200, '{"object": "list", "data": []}')
    usage: bool = True
    address: str = ""
    asked: list[Asked] = field(default_factory=list)
    greeted: int = 0
    now: int = 0
    most: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    over: threading.Event = field(default_factory=threading.Event)


@contextlib.contextmanager
def serving(script: Script, **settings: Any) -> Iterator[Server]:
    """A server that answers by a script, on a free port of this machine."""
    server = Server(script, **settings)
    http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(server))
    server.address = f"http://127.0.0.1:{http.server_port}/v1"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        http.shutdown()
        http.server_close()
        thread.join()


def failure(status: int, message: str, **headers: str) -> Raw:
    """An error in OpenAI's form."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return Raw(status, json.dumps({"error": {"message": message, "type": "x", "code": None}}), names)


def _completion(server: Server, model: str, text: str) -> Raw:
    message = {"role": "assistant", "content": text}
    body = {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": f"{model}-0613",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
    }
    if server.usage:
        body["usage"] = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    return Raw(200, json.dumps(body))


def _handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            with server.lock:
                server.greeted += 1
            self._send(server.models)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked = Asked(body, dict(self.headers.items()), time.monotonic())
            with server.lock:
                number = len(server.asked)
                server.asked.append(asked)
                server.now += 1
                server.most = max(server.most, server.now)
            answer = server.script(asked, number)
            if isinstance(answer, str):
                answer = _completion(server, body["model"], answer)
            if answer.held_back:
                server.over.wait()
            with server.lock:
                server.now -= 1
            with contextlib.suppress(OSError):  # the client may have given up
                self._send(answer)

        def _send(self, answer: Raw) -> None:
            data = answer.body.encode()
            self.send_response(answer.status)
            for name, value in {"Content-Type": "application/json", **answer.headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    return Handler
