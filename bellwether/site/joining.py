"""A site joins a federation: what is its own is checked, then the terms are shown, then it connects and stays.

FOLDER/signing.key, flower.key    the site's keys, see ``site.keys``
FOLDER/policy.yaml                what it allows, see ``site.policy``; need not be there
FOLDER/consent.json               the terms that a person agreed to
FOLDER/ledger.jsonl               everything that came and was sent
FOLDER/clients/                   what its client keeps from round to round
FOLDER/adapter/                   the result, once the federation has ended
"""

from __future__ import annotations

import datetime
import email.utils
import shutil
import ssl
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from bellwether.data.rows import TokenRow
from bellwether.engine.flower.inbox import Delivery, Inbox
from bellwether.engine.processes import Work
from bellwether.engine.remote import terms_of
from bellwether.errors import FederationError, first_line
from bellwether.exchange.adapter import CONFIG_FILE, WEIGHTS_FILE, read_adapter
from bellwether.model.base import Base, load_base
from bellwether.model.lora import adapter_config
from bellwether.recipe.consent import code_in
from bellwether.recipe.recipe import Recipe
from bellwether.runner.prepare import Prepared, prepare
from bellwether.site.facts import differing
from bellwether.site.keys import FLOWER, SIGNING, public_word, read_signing
from bellwether.site.ledger import Ledger
from bellwether.site.papers import Invitation, invited_recipe, read_invitation
from bellwether.site.policy import as_check, forbidden, read_policy
from bellwether.site.resident import Holdings, Resident, holdings_of
from bellwether.store.run_folder import client_folders
from bellwether.tools.atomic import make_folder, write_atomic, write_folder_atomic
from bellwether.tools.json_text import from_json, json_lines, read_json, typed
from bellwether.tools.lock import acquire, release
from bellwether.tools.words import byte_size, clean

CONSENT, AUTHORITY = "consent.json", "authority.crt"
FAST, SLOW = 4.0, 300.0  # seconds that a clock may be ahead, and behind; Flower takes 5 and 305
RETRY = 10.0  # seconds between two tries to reach a coordinator
SPARE = 100e6  # bytes that must be free on the disk beside what the federation writes


@dataclass(frozen=True)
class Terms:
    """What a site agrees to.

    Args:
        hash: of everything that was checked.
        text: in plain words.
    """

    hash: str
    text: str


def join(
    invitation: Path,
    folder: Path,
    data: Sequence[str],
    agree: Callable[[Terms], bool],
    tell: Callable[[str], None],
    *,
    model: str | None = None,
    device: str | None = None,
) -> None:
    """Take part in a federation until it ends; go on with one where this site has taken part before.

    Args:
        invitation: the coordinator's file.
        folder: the site's own, with its keys.
        data: its files of rows.
        agree: shows a person the terms, and returns whether they agree; is not called where they have before.
        tell: is told of what happens, in sentences.
        model: folder of the base model here; None takes the recipe's.
        device: where to compute; None takes the recipe's.

    Raises:
        BellwetherError: the site cannot take part, in one sentence that says why.
    """
    invited = read_invitation(invitation)
    _check_own_key(invited, folder)
    lock = acquire(folder)
    try:
        recipe = own_recipe(invited_recipe(invited, folder), data, model, device)
        _check_policy(folder, recipe)
        prepared = prepare(recipe)
        (rows,) = (tokenised.rows for tokenised in prepared.clients.values())
        held_out = [row for tokenised in prepared.held_out.values() for row in tokenised.rows]
        for note in (*prepared.notes, *prepared.warnings):
            tell(note)
        base = load_base(recipe.model, prepared.base)
        holdings = holdings_of(invited.site, recipe, base, _work(invited.site, folder, prepared, base, rows, held_out))
        _check_facts(invited, holdings)
        _check_disk(folder, recipe, base)
        terms = terms_for(invited, recipe, base, len(rows), len(held_out))
        _agreed(folder, terms, agree)
        _take_part(invited, folder, holdings, tell)
    finally:
        release(folder, lock)


def own_recipe(recipe: Recipe, data: Sequence[str], model: str | None, device: str | None) -> Recipe:
    """Return the recipe as a site runs it: with its own rows, all of them one client's.

    Args:
        recipe: the federation's.
        data: files of rows.
        model: folder of the base model here; None takes the recipe's.
        device: where to compute; None takes the recipe's.
    """
    rows: dict[str, Any] = {"sources": tuple(data), "test_sources": (), "validation_sources": ()}
    rows |= {"test_rows_per_category": 0, "validation_rows_per_category": 0, "max_rows": None}
    partition = {"method": "iid", "clients": 1, "clients_per_group": None}
    place = {"path": model or recipe.model.path, "device": device or recipe.model.device}
    engine = {"processes": 1, "fuse": 1}
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update=rows),
            "partition": recipe.partition.model_copy(update=partition),
            "model": recipe.model.model_copy(update=place),
            "engine": recipe.engine.model_copy(update=engine),
            "federation": recipe.federation.model_copy(update={"cohort_size": None}),
        }
    )


def terms_for(invited: Invitation, recipe: Recipe, base: Base, rows: int, held_out: int) -> Terms:
    """Return what a site agrees to, in plain words.

    Args:
        invited: its invitation.
        recipe: what it will run.
        base: the base model that it has.
        rows: how many rows it trains on.
        held_out: how many it holds out and scores.
    """
    config = adapter_config(base, recipe.lora)
    shapes = {shape.path: (shape.inputs, shape.outputs) for shape in base.facts.linears}
    numbers = sum(config.rank * sum(shapes[module]) for module in config.modules)
    federation, selection = recipe.federation, recipe.selection
    share = f"about {federation.fraction:.0%} of" if federation.cohort_size is None else "some of"
    leaves = [
        f"an update of the adapter, {byte_size(4 * numbers)}, and what the method {recipe.method.name} adds to it"
    ]
    leaves += ["the number of rows and tokens trained on, and their mean loss"]
    if selection.surveys:
        noise = f"with noise of {selection.noise:g}" if selection.noise else "without noise"
        leaves.append(f"before it, the centres of clusters of your rows' hidden states, {noise}")
    if held_out:
        leaves.append(f"sums of scores on the {held_out} rows that are held out here, at each evaluation")
    lines = [
        f"You are asked to take part in the federation {invited.federation[:12]} at {clean(invited.address)} as "
        f"{invited.site}.",
        f"Base model: {clean(recipe.model.path)}, weights {base.fingerprint[:16]}; it stays as it is.",
        f"Trained: a LoRA adapter of {numbers:,} numbers, by {recipe.method.name}, on {rows} rows of yours.",
        f"How often: {federation.rounds} rounds; you are asked in {share} them.",
        "What leaves this machine each time:",
        *(f"  - {one}" for one in leaves),
        "What never leaves it: rows, their text and tokens, the base model, your private keys.",
        "Protection: all is signed, and encrypted on the way; the coordinator sees each update of yours as it is, and "
        "an update can reveal some of the text that it was trained on.",
        f"Code: none is sent; what runs is bellwether, which is installed here{_own_code(recipe)}.",
    ]
    facts = {**invited.facts, "federation": invited.federation, "coordinator": invited.coordinator}
    return Terms(terms_of(facts), "\n".join(lines))


def _own_code(recipe: Recipe) -> str:
    """Return what else runs of what is installed here, as the end of a sentence."""
    named = [code.name for code in code_in(recipe)]
    return f", with {', '.join(map(clean, named))}, which the policy lists" if named else ""


def clock_skew(address: str, authority: str) -> float:
    """Return by how many seconds this machine's clock is ahead of the coordinator's, to a second.

    Args:
        address: the coordinator's, as ``HOST:PORT``.
        authority: the certificate of its authority, in PEM.

    Raises:
        NotThere: nothing answers; it may later.
        FederationError: what answers is not the coordinator, or its name is not known.
    """
    try:
        known = ssl.create_default_context(cadata=authority)
        with httpx.Client(verify=known, timeout=20) as client:
            begun = time.time()
            answer = client.get(f"https://{address}/v1/fleet/")
            middle = (begun + time.time()) / 2
        theirs = email.utils.parsedate_to_datetime(answer.headers["date"]).timestamp()
    except ssl.SSLError as error:
        raise FederationError(f"The authority in the invitation cannot be read ({first_line(error)}).") from error
    except (KeyError, ValueError) as error:
        raise FederationError(f"What answers at {address} is no coordinator of bellwether's.") from error
    except httpx.HTTPError as error:
        raise _unreachable(address, error) from error
    return middle - (theirs + 0.5)


class NotThere(FederationError):
    """Nothing answers at a coordinator's address; it may later."""


def _unreachable(address: str, error: httpx.HTTPError) -> FederationError:
    """Return the error for a coordinator that cannot be spoken with, by what can be done about it."""
    said = first_line(error)
    if "CERTIFICATE_VERIFY_FAILED" in said:
        why = said.partition("verify failed: ")[2].partition(" (_ssl")[0] or said
        return FederationError(
            f"What answers at {address} has a certificate that is not the federation's or is not valid ({why}): ask "
            "the coordinator for a new invitation, and look for a proxy that opens encrypted connections."
        )
    if "Name or service not known" in said or "getaddrinfo" in said or "name resolution" in said:
        return FederationError(
            f"The name in {address} is not known here ({said}): check it with the coordinator, and this machine's DNS."
        )
    if isinstance(error, httpx.ProxyError):
        return FederationError(f"The proxy of HTTPS_PROXY lets nobody through to {address} ({said}).")
    through = " through the proxy of HTTPS_PROXY" if "https" in urllib.request.getproxies() else ""
    return NotThere(f"Nothing answers at {address}{through} ({said or type(error).__name__})")


def _check_own_key(invited: Invitation, folder: Path) -> None:
    if public_word(folder) != invited.key:
        raise FederationError(
            f"The invitation of {invited.site} is for another key than the one in {folder}; name the right folder with "
            "--folder, or send the coordinator the word that bellwether site keygen shows."
        )


def _check_policy(folder: Path, recipe: Recipe) -> None:
    found = forbidden(read_policy(folder), recipe)
    if found:
        raise FederationError(f"The policy in {folder} forbids to take part: {'; '.join(found)}.")


def _check_facts(invited: Invitation, holdings: Holdings) -> None:
    found = differing(invited.facts, holdings.facts)
    if found:
        more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        raise FederationError(f"This site cannot take part: {'; '.join(found[:3])}{more}; bring it to the same.")


def _check_disk(folder: Path, recipe: Recipe, base: Base) -> None:
    """Refuse a disk that would be full before the end."""
    config = adapter_config(base, recipe.lora)
    shapes = {shape.path: (shape.inputs, shape.outputs) for shape in base.facts.linears}
    needed = SPARE + 40 * sum(config.rank * sum(shapes[module]) for module in config.modules)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise FederationError(
            f"{folder} has {byte_size(free)} of disk left, and {byte_size(needed)} are wanted; free some space."
        )


def _agreed(folder: Path, terms: Terms, agree: Callable[[Terms], bool]) -> None:
    """Make sure that a person has agreed to these very terms."""
    path = folder / CONSENT
    known = read_json(path, dict[str, str], "remove it, to be asked again") if path.exists() else {}
    if known.get("terms") == terms.hash:
        return
    if not agree(terms):
        raise FederationError("The terms are not agreed to, so nothing was sent.")
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write_atomic(path, json_lines([{"terms": terms.hash, "time": now, "text": terms.text}]))


def _work(
    site: str, folder: Path, prepared: Prepared, base: Base, rows: Sequence[TokenRow], held_out: Sequence[TokenRow]
) -> Work:
    recipe = prepared.recipe
    folders: Mapping[str, Path] = client_folders(folder, [site])
    return Work(
        adapter_config(base, recipe.lora),
        1,
        {site: rows},
        {site: held_out},
        recipe.method,
        prepared.stop,
        recipe.engine.tokens,
        folders,
        prepared.public,
    )


def _take_part(invited: Invitation, folder: Path, holdings: Holdings, tell: Callable[[str], None]) -> None:
    """Connect, and answer what is asked until the end."""
    _wait_for_coordinator(invited, tell)
    make_folder(folder)
    write_atomic(folder / AUTHORITY, invited.authority.encode())

    def keep(about: bytes, values: bytes) -> None:
        said = typed(from_json(about), dict[str, str])
        files = {CONFIG_FILE: said["config"].encode(), WEIGHTS_FILE: values, "README.md": said["card"].encode()}
        write_folder_atomic(folder / "adapter", files)
        read_adapter(folder / "adapter")
        tell(f"The federation has ended; its adapter is in {folder / 'adapter'}.")

    resident = Resident(
        holdings,
        read_signing(folder / SIGNING),
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(invited.coordinator)),
        invited.federation,
        Ledger(folder),
        as_check(read_policy(folder), folder),
        tell,
        keep,
    )
    with Inbox(folder, folder / FLOWER, invited.address, folder / AUTHORITY) as inbox:
        tell(f"{invited.site} waits for the coordinator's tasks.")
        resident.serve(_Telling(inbox, tell))


def _wait_for_coordinator(invited: Invitation, tell: Callable[[str], None]) -> None:
    """Wait until the coordinator answers, and compare the clocks."""
    told = False
    while True:
        try:
            skew = clock_skew(invited.address, invited.authority)
            break
        except NotThere as error:
            if not told:
                tell(f"{error}; this site waits until the coordinator is there.")
            told = True
            time.sleep(RETRY)
    if not -SLOW <= skew <= FAST:
        way = "ahead of" if skew > 0 else "behind"
        raise FederationError(
            f"This machine's clock is {abs(skew):.0f} s {way} the coordinator's, and Flower takes at most {FAST:.0f} s "
            f"ahead and {SLOW:.0f} s behind; set it, such as by NTP."
        )


class _Telling:
    """Flower's tasks, and a sentence for a person where its SuperNode had to be begun again since the last of them."""

    def __init__(self, inbox: Inbox, tell: Callable[[str], None]) -> None:
        self._inbox, self._tell = inbox, tell
        self._starts, self._told = inbox.starts, False

    def take(self) -> Delivery | None:
        """Return the next message, or None."""
        delivery = self._inbox.take()
        begun_again = self._inbox.starts != self._starts
        if begun_again and not self._told:
            self._tell(
                "Flower's SuperNode has ended and is begun again (see supernode.log): where it was killed, the "
                "coordinator lets it come back after 50 s; where another process uses this site's keys, end that one; "
                "where this site was revoked, ask the coordinator."
            )
        self._told = begun_again and delivery is None
        if delivery is not None:
            self._starts = self._inbox.starts
        return delivery
