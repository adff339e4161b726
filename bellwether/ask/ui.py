"""A web page for talking: answers side by side while they are made.

    bellwether ui runs/default-1

The page is served on this machine alone unless another address is given; elsewhere it wants a token. It asks nothing of
other machines, and answers to nothing but what the page itself asks: ``ui_guard`` says who may speak to it, ``ui_app``
what can be said, and ``ui_turns`` lets one question after the other be answered.
"""

from __future__ import annotations

import contextlib
import importlib.util
import secrets
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bellwether.ask.talk import open_talk
from bellwether.errors import RecipeError

NEEDED = ("fastapi", "uvicorn")
# Connections at a time; more are told that the server is busy.
MOST_CONNECTIONS = 200


def serve(
    folder: Path,
    *,
    host: str,
    port: int,
    say: Callable[[str], None],
    seed: int | None = None,
    model: str | None = None,
    device: str | None = None,
) -> None:
    """Serve the page until interrupted.

    Args:
        folder: of a finished run or comparison, of an adapter, or of a model.
        host: address to listen at.
        port: port to listen at; 0 takes one that is free.
        say: takes a sentence for the person who serves it.
        seed: of a comparison, the seed whose adapters are meant.
        model: path or hub name of the base; None takes the one that the folder names.
        device: where the base shall be; None takes what the recipe says.

    Raises:
        RecipeError: what serves pages is not installed, or the address cannot be listened at.
        BellwetherError: the folder holds nothing that can be asked.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise RecipeError(
            f"bellwether ui needs {' and '.join(missing)}, not installed here; in the clone of this project, "
            "run pip install -e '.[ui]'."
        )
    from bellwether.ask.ui_app import make_app
    from bellwether.ask.ui_guard import of_this_machine
    from bellwether.ask.ui_turns import Turns

    with _listening(host, port) as listener, Turns() as turns:
        talk = open_talk(folder, seed=seed, model=model, device=device)
        address, number = listener.getsockname()[:2]
        own = of_this_machine(address)
        token = None if own else secrets.token_urlsafe(32)
        app = make_app(talk, turns, host=host if own else None, token=token)
        shown = f"http://{f'[{host}]' if ':' in host else host}:{number}"
        say(f"Talk at {shown if own else f'{shown}/?token={token}'} (Ctrl-C ends).")
        if not own:
            say(
                "warning: everybody who can reach this address and has its token can ask these models, "
                "and what travels is not encrypted."
            )
        with contextlib.suppress(KeyboardInterrupt):
            make_server(app).run(sockets=[listener])


def make_server(app: Any) -> Any:
    """Return a uvicorn server of an ASGI application, which speaks plain HTTP alone and believes no proxy's headers.

    Args:
        app: the application.
    """
    import uvicorn

    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=MOST_CONNECTIONS,
        log_level="critical",
        timeout_graceful_shutdown=1,  # a page that is still open when this ends is no error to tell about
    )
    return uvicorn.Server(config)


def _listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise RecipeError(
            f"command line: no page can be served at {host}, port {port} ({error.strerror or error}); "
            "give others by --host and --port (0 takes a free port)."
        ) from error
