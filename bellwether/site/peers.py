"""The other sites whose keys a site knows, and the signatures by which it knows what they announce.

A coordinator relays the keys that sites announce for secure aggregation. One that put keys of its own in their place
would open every mask, so each site signs what it announces by the key of its word (``bellwether site keygen``), and
takes others' from those alone whose words a person has entered here, got from these sites and not from the coordinator.

FOLDER/peers.json    the words of other sites, by the names that they have in the federation
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from bellwether.errors import FederationError, UpdateRejected
from bellwether.exchange.messages import Announced, ShareTask
from bellwether.recipe.secure import LEAST_COHORT
from bellwether.site.invitation import SITE_NAME
from bellwether.site.keys import have_in_common, public_word, read_public
from bellwether.tools.atomic import write_atomic
from bellwether.tools.json_text import read_json

PEERS = "peers.json"
_PURPOSE = b"bellwether keys of secure aggregation 1\0"  # what these keys sign can be taken for nothing else

Peers = Mapping[str, Ed25519PublicKey]


def add_peer(folder: Path, name: str, word: str) -> bool:
    """Enter the word of another site, and return whether it takes the place of another one.

    Args:
        folder: this site's own.
        name: the other's, as it takes part under.
        word: the other's public keys, as its ``bellwether site keygen`` showed them.

    Raises:
        FederationError: it is no name or no word, or the site's own.
        CheckpointError: the file cannot be read or written.
    """
    if not SITE_NAME.fullmatch(name):
        raise FederationError(f"{name[:80]!r} is no name of a site: give 1 to 64 letters, digits, dots, dashes.")
    if have_in_common(word, public_word(folder)):
        raise FederationError(f"This word is that of {folder} itself; give the word that {name} shows.")
    words = _words(folder)
    again = words.get(name, word) != word
    write_atomic(folder / PEERS, (json.dumps({**words, name: word}, indent=1) + "\n").encode())
    return again


def read_peers(folder: Path, own: str) -> dict[str, Ed25519PublicKey]:
    """Return the keys of the sites that a site knows, its own among them, by their names.

    Args:
        folder: its own.
        own: its name.

    Raises:
        FederationError: it knows too few for a sum that hides one, or a word is none.
        CheckpointError: the file cannot be read.
    """
    words = {**_words(folder), own: public_word(folder)}
    if len(words) < LEAST_COHORT:
        raise FederationError(
            f"Updates of this federation are masked, and {folder / PEERS} knows {len(words) - 1} other sites, where "
            f"{LEAST_COHORT - 1} are needed: get the words of their keys from these sites, not from the coordinator, "
            "and enter each by bellwether site trust NAME WORD."
        )
    return {name: read_public(word).signing for name, word in words.items()}


def signed(announced: Announced, key: Ed25519PrivateKey, federation: str, round: int, client: str) -> Announced:
    """Return what a client announces, with its site's signature.

    Args:
        announced: without one.
        key: the site's.
        federation: the federation's identifier.
        round: the round.
        client: the client's name.
    """
    return replace(announced, signature=key.sign(_said(announced, federation, round, client)))


def check_signed(task: ShareTask, peers: Peers, federation: str) -> None:
    """Refuse keys that are not those of sites that a person has entered.

    Args:
        task: brings them.
        peers: the sites' keys, by the names of their clients.
        federation: the federation's identifier.

    Raises:
        UpdateRejected: the reason, as one clause.
    """
    for client, announced in task.keys.items():
        if client not in peers:
            raise UpdateRejected(f"no key of {client[:64]} was entered at this site (bellwether site trust)")
        try:
            said = _said(announced, federation, task.round, client)
            peers[client].verify(announced.signature, said)
        except (InvalidSignature, AttributeError, TypeError):
            raise UpdateRejected(f"the keys that came as those of {client[:64]} are not signed by it") from None


def _said(announced: Announced, federation: str, round: int, client: str) -> bytes:
    keys = [key.hex() for key in (announced.sealing, announced.masking, announced.pledge)]
    return _PURPOSE + json.dumps([federation, round, client, *keys]).encode()


def _words(folder: Path) -> dict[str, str]:
    path = folder / PEERS
    words: dict[str, str] = read_json(path, dict[str, str], "mend it, or remove it") if path.exists() else {}
    return words
