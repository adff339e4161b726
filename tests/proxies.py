"""A proxy of the kind that enterprises put between sites and the Internet (CONNECT of HTTP/1.1), in threads."""

import contextlib
import select
import socket
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def proxy(lasts: float | None = None, refuses: bool = False) -> Iterator[tuple[str, list[str]]]:
    """Yield a proxy's address, and the list of what it was asked to connect with.

    Args:
        lasts: seconds after which it cuts a connection on which nothing comes; None cuts none.
        refuses: whether it lets nobody through.
    """
    asked: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    threading.Thread(target=_serve, args=(connection, asked, lasts, refuses), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", asked
        listening.shutdown(socket.SHUT_RDWR)


def _serve(connection: socket.socket, asked: list[str], lasts: float | None, refuses: bool) -> None:
    with connection, contextlib.suppress(OSError):
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += connection.recv(1)
        method, target, _ = head.decode().split(" ", 2)
        assert method == "CONNECT"
        asked.append(target)
        if refuses:
            connection.sendall(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n")
            return
        host, _, port = target.rpartition(":")
        with socket.create_connection((host, int(port))) as other:
            connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            _pass_on(connection, other, lasts or 600)


def _pass_on(one: socket.socket, other: socket.socket, lasts: float) -> None:
    while some := select.select([one, other], [], [], lasts)[0]:
        for ready in some:
            data = ready.recv(65536)
            if not data:
                return
            (other if ready is one else one).sendall(data)
