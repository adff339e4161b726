"""A site's last answers: where the same is asked again, also of a process that was begun anew, the same is sent.

So a coordinator that was killed and redoes its round, or did not get an answer as a whole, costs a site no work, and
learns nothing new of its rows.

CLIENT/answers/KIND    the hash of the question, that of the answer, and the answer
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from bellwether.errors import CheckpointError, first_line
from bellwether.tools.atomic import make_folder, write_atomic

ANSWERS = "answers"
_HASH, _LENGTH = 32, 8  # bytes


def question_of(*parts: str) -> bytes:
    """Return the hash of all that an answer depends on."""
    return hashlib.sha256("\0".join(parts).encode()).digest()


def keep_answer(client: Path, kind: str, question: bytes, manifest: bytes, body: bytes) -> None:
    """Keep an answer in place of the last one to a question of its kind.

    Args:
        client: the client's own folder.
        kind: the task's.
        question: see ``question_of``.
        manifest: what the answer says.
        body: values of its arrays.

    Raises:
        CheckpointError: it cannot be written.
    """
    answer = len(manifest).to_bytes(_LENGTH, "big") + manifest + body
    write_atomic(make_folder(client / ANSWERS) / kind, question + hashlib.sha256(answer).digest() + answer)


def forget_answers(client: Path) -> None:
    """Remove what was kept of a client's answers, which nobody asks for once the federation has ended."""
    shutil.rmtree(client / ANSWERS, ignore_errors=True)


def kept_answer(client: Path, kind: str, question: bytes) -> tuple[bytes, bytes] | None:
    """Return manifest and body of the answer that was kept to this very question; None where there is none.

    Args:
        client: the client's own folder.
        kind: the task's.
        question: see ``question_of``.

    Raises:
        CheckpointError: the file cannot be read, or is damaged.
    """
    path = client / ANSWERS / kind
    try:
        with path.open("rb") as file:
            if file.read(_HASH) != question:
                return None
            digest, answer = file.read(_HASH), file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({first_line(error)}); remove it, to do the task anew."
        ) from error
    if hashlib.sha256(answer).digest() != digest:
        raise CheckpointError(f"{path} is damaged; remove it, to do the task anew.")
    end = _LENGTH + int.from_bytes(answer[:_LENGTH], "big")
    return answer[_LENGTH:end], answer[end:]
