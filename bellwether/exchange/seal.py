"""The seal of what travels between sites: a header that says what a message is for, and a signature over all of it.

Flower's own node authentication signs a time and nothing else, so a message that was taken down could be used again,
or for something else. Here a signature (Ed25519, RFC 8032) covers run, round, kind, sender, receiver, the number of the
task, the terms that both agreed to, and the hash of everything in the message.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Annotated, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import Field

from bellwether.errors import UpdateRejected, first_line
from bellwether.tools.json_text import KEPT, Count, from_json, plain, typed

LONGEST_HEADER = 4096  # bytes
_PURPOSE = b"bellwether message 1\0"  # what these keys sign can be taken for nothing else

AnyKind = Literal["hello", "train", "survey", "evaluate", "announce", "share", "unmask", "end"]
_Text = Annotated[str, Field(max_length=200)]


@dataclass(frozen=True)
class Parcel:
    """A message as it travels, all of it bytes.

    Args:
        header: what it is for, see ``Header``, as JSON.
        signature: the sender's, over the header.
        manifest: see ``exchange.codec``; of other kinds than tasks and replies, all there is.
        body: the values of all arrays.
    """

    header: bytes
    signature: bytes
    manifest: bytes
    body: bytes = b""

    @property
    def size(self) -> int:
        """How many bytes travel."""
        return len(self.header) + len(self.signature) + len(self.manifest) + len(self.body)


@dataclass(frozen=True)
class Header:
    """What a message is for.

    Args:
        way: ``task`` downwards, ``reply`` upwards.
        kind: what is asked.
        run: the run's identifier.
        round: the round, counted from 1; 0 before the first.
        sender: who sends it.
        receiver: for whom it is.
        client: the client that is asked.
        number: the task's own, drawn for each; its reply has the same.
        terms: the hash of what both sides have agreed to.
    """

    __pydantic_config__ = KEPT

    way: Literal["task", "reply"]
    kind: AnyKind
    run: _Text
    round: Count
    sender: _Text
    receiver: _Text
    client: _Text
    number: _Text
    terms: _Text

    def answered(self) -> Header:
        """Return the header of this task's reply."""
        return Header(
            "reply",
            self.kind,
            self.run,
            self.round,
            self.receiver,
            self.sender,
            self.client,
            self.number,
            self.terms,
        )


def sealed(header: Header, key: Ed25519PrivateKey, manifest: bytes, body: bytes = b"") -> Parcel:
    """Return a signed message.

    Args:
        header: what it is for.
        key: the sender's.
        manifest: what it says.
        body: values of its arrays.
    """
    head = json.dumps({**plain(header), "content": _content(manifest, body)}, sort_keys=True).encode()
    return Parcel(head, key.sign(_PURPOSE + head), manifest, body)


def opened(parcel: Parcel, key: Ed25519PublicKey) -> Header:
    """Return what a message is for, once its signature is the sender's and its content is what was signed.

    Args:
        parcel: what came.
        key: whose it must be.

    Raises:
        UpdateRejected: it is not, as one clause.
    """
    if len(parcel.header) > LONGEST_HEADER:
        raise UpdateRejected(f"its header has {len(parcel.header)} bytes, where {LONGEST_HEADER} are taken")
    try:
        key.verify(parcel.signature, _PURPOSE + parcel.header)
    except InvalidSignature:
        raise UpdateRejected("its signature is not that of the one it should come from") from None
    try:
        head = dict(typed(from_json(parcel.header), dict[str, str | int]))
        content = head.pop("content", "")
        header: Header = typed(head, Header)
    except ValueError as error:
        raise UpdateRejected(f"its header cannot be read ({first_line(error)})") from error
    if content != _content(parcel.manifest, parcel.body):
        raise UpdateRejected("its content is not what was signed")
    return header


def content_of(parcel: Parcel) -> str:
    """Return the hash of everything in a message, in hexadecimal digits, as its header has it once it was opened."""
    return _content(parcel.manifest, parcel.body)


def check_meant(header: Header, wanted: Header) -> None:
    """Refuse a message that is meant for something else, such as one of an earlier round.

    Args:
        header: the message's.
        wanted: what it must be.

    Raises:
        UpdateRejected: the first field that differs, as one clause.
    """
    for name, due in plain(wanted).items():
        value = getattr(header, name)
        if value != due:
            raise UpdateRejected(f"its {name} is {str(value)[:60]!r}, where {str(due)[:60]!r} is due")


def _content(manifest: bytes, body: bytes) -> str:
    """Return the hash of a message's parts, each under its length."""
    digest = hashlib.sha256(len(manifest).to_bytes(8, "big"))
    digest.update(manifest)
    digest.update(body)
    return digest.hexdigest()
