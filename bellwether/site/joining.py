"""A site joins a federation: what is its own is checked, then the terms are shown, then it connects and stays.

FOLDER/signing.key, flower.key    the site's keys, see ``site.keys``
FOLDER/noise.key                  what it draws noise from, see ``site.protection``
FOLDER/peers.json                 the keys of other sites, where updates are masked, see ``site.peers``
FOLDER/policy.yaml                what it allows, see ``site.policy``; need not be there
FOLDER/ledger.jsonl               everything that came and was sent
FOLDER/clients/FEDERATION/        what its client keeps from round to round, by the federation's first digits, and in
                                  consent.json the terms that a person agreed to
FOLDER/adapter/, report.html      the result, once the federation has ended, see ``site.result``
FOLDER/comparison/                what the site's held-out rows say, see ``site.compared``
FOLDER/invited.yaml               the recipe of the invitation
"""

from __future__ import annotations

import datetime
import email.utils
import functools
import shutil
import ssl
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import httpx
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from bellwether.data.rows import TokenRow
from bellwether.engine.certificate import check_shown, show
from bellwether.engine.flower.inbox import Delivery, Inbox
from bellwether.engine.processes import Work
from bellwether.errors import FederationError, first_line
from bellwether.model.base import Base, load_base
from bellwether.model.folder import on_hub, weight_files
from bellwether.model.lora import LoraLayers, adapter_config
from bellwether.recipe.recipe import Recipe, SecureAggregation
from bellwether.runner.prepare import Prepared, prepare
from bellwether.site.answers import forget_answers
from bellwether.site.compared import NO_COMPARISON
from bellwether.site.facts import BASE, differing
from bellwether.site.invitation import Invitation, invited_recipe, read_invitation
from bellwether.site.keys import FLOWER, SIGNING, public_word, read_signing
from bellwether.site.ledger import Ledger
from bellwether.site.peers import Peers, read_peers
from bellwether.site.policy import as_check, as_limit, forbidden, forbids_spending, read_policy
from bellwether.site.protection import own_secret
from bellwether.site.resident import Resident, holdings_of
from bellwether.site.result import check_result_of, has_ended, keep_result, make_page
from bellwether.site.terms import Terms, check_own_fields, from_the_hub, model_named, own_lora, own_recipe, terms_for
from bellwether.site.trained import kept_for, note_trained
from bellwether.store.run_folder import ADAPTER
from bellwether.tell.narrate import plain_lines
from bellwether.tools.atomic import make_folder, slug, write_atomic
from bellwether.tools.json_text import json_lines, read_json
from bellwether.tools.lock import acquire, release
from bellwether.tools.progress import listening
from bellwether.tools.words import byte_size, counted

CONSENT, AUTHORITY = "consent.json", "authority.crt"
FAST, SLOW = 4.0, 300.0  # seconds that a clock may be ahead, and behind; Flower takes 5 and 305
RETRY = 10.0  # seconds between two tries to reach a coordinator
SPARE = 100e6  # bytes that must be free on the disk beside what the federation writes


def join(
    invitation: Path,
    folder: Path,
    data: Sequence[str],
    agree: Callable[[Terms], bool],
    tell: Callable[[str], None],
    *,
    test: Sequence[str] = (),
    fields: Sequence[str] = (),
    model: str | None = None,
    device: str | None = None,
    shown: Path | None = None,
) -> Path:
    """Take part in a federation until it ends, go on with one where this site has taken part before, and make its page.

    Args:
        invitation: the coordinator's file.
        folder: the site's own, with its keys.
        data: its files of rows.
        agree: shows a person the terms, and returns whether they agree; is not called where they have before.
        tell: is told of what happens, in sentences.
        test: its files of rows that are never trained on, for the comparison at the end.
        fields: of the recipe that are the site's own, see ``site.terms.OWN_FIELDS``.
        model: folder of the base model here; None takes the recipe's.
        device: where to compute; None takes the recipe's.
        shown: the file of the certificate that this site shows, where the coordinator asks for one.

    Returns:
        The page.

    Raises:
        BellwetherError: the site cannot take part, in one sentence that says why.
    """
    invited = read_invitation(invitation)
    _check_own_key(invited, folder)
    check_own_fields(fields)
    _check_shown(invited, shown)
    check_result_of(folder, invited.federation)
    lock = acquire(folder)
    try:
        with listening(plain_lines(tell)):
            recipe = own_recipe(invited_recipe(invited, folder, fields), data, test, model, device)
            peers = read_peers(folder, invited.site) if recipe.secure_aggregation.enabled else {}
            _check_policy(folder, recipe)  # before anything that the recipe names is imported or opened
            for name in from_the_hub(recipe):
                tell(
                    f"{name} comes from the Hugging Face hub, as far as it is not here yet, before the terms are shown."
                )
            prepared = _prepared(recipe, invited.site)
            for note in (*prepared.notes, *prepared.warnings):
                tell(note)
            trained = sum(len(tokenised.rows) for tokenised in prepared.clients.values())
            _refuse(folder, forbids_spending(read_policy(folder), recipe, trained))
            return _joined(invited, folder, recipe, prepared, agree, tell, shown, peers)
    finally:
        release(folder, lock)


def _joined(
    invited: Invitation,
    folder: Path,
    recipe: Recipe,
    prepared: Prepared,
    agree: Callable[[Terms], bool],
    tell: Callable[[str], None],
    shown: Path | None,
    peers: Peers,
) -> Path:
    """Take part, unless the federation has ended before, and make the page."""
    ended = has_ended(folder, invited.federation)

    @functools.cache
    def load() -> Base:
        if on_hub(recipe.model):
            size = sum(weight_files(prepared.base.folder, recipe.model).values())
            tell(f"The weights of {model_named(recipe)} have {byte_size(size)}; what of them is not here comes now.")
        base = load_base(recipe.model, prepared.base)
        if ended:  # else all facts are compared
            _check_facts({BASE: invited.facts.get(BASE, "")}, {BASE: base.fingerprint})
        return base

    if ended:
        tell(f"This federation has ended, and its adapter is in {folder / ADAPTER}.")
    else:
        _take_part(invited, folder, recipe, prepared, load(), agree, tell, shown, peers)
    return make_page(invited, folder, prepared, _agreed_terms(folder, invited.federation), load, tell)


def _prepared(recipe: Recipe, site: str) -> Prepared:
    """Read and check a site's rows; of those that it holds out beside, all are scored, as test rows."""
    evaluation = recipe.evaluation.model_copy(update={"part": "test", "categories": None})  # the coordinator's
    federation = recipe.federation.model_copy(update={"cohort_size": None})  # of clients, of which there is one here
    lora = own_lora(recipe.lora, site)
    own = recipe.model_copy(
        update={
            "evaluation": evaluation,
            "federation": federation,
            "lora": lora,
            "secure_aggregation": SecureAggregation(),  # of which there are too few to hide among
        }
    )
    return prepare(own, unscored=NO_COMPARISON)


def clock_skew(address: str, authority: str, shown: Path | None = None) -> float:
    """Return by how many seconds this machine's clock is ahead of the coordinator's, to a second.

    Args:
        address: the coordinator's, as ``HOST:PORT``.
        authority: the certificate of its authority, in PEM.
        shown: the file of the certificate that this site shows; None shows none.

    Raises:
        NotThere: nothing answers; it may later.
        FederationError: what answers is not the coordinator, or its name is not known.
    """
    try:
        known = ssl.create_default_context(cadata=authority)
        if shown is not None:
            show(known, shown)
        with httpx.Client(verify=known, timeout=20) as client:
            begun = time.time()
            answer = client.get(f"https://{address}/v1/fleet/")
            middle = (begun + time.time()) / 2
        theirs = email.utils.parsedate_to_datetime(answer.headers["date"]).timestamp()
    except ssl.SSLError as error:
        raise FederationError(f"The authority in the invitation cannot be read ({first_line(error)}).") from error
    except (KeyError, ValueError) as error:
        raise FederationError(f"What answers at {address} is no coordinator of bellwether's.") from error
    except httpx.InvalidURL as error:
        raise FederationError(
            f"{address}, or the proxy of HTTPS_PROXY, is no address ({first_line(error)}); mend it."
        ) from error
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
    if "alert" in said:
        return FederationError(f"What answers at {address} refuses this site's own certificate, or none ({said}).")
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


def _check_shown(invited: Invitation, shown: Path | None) -> None:
    """Refuse to connect without the certificate that the coordinator asks for."""
    if shown is None and invited.clients:
        raise FederationError(
            f"The coordinator at {invited.address} asks sites for a certificate of their own: give it by --certificate "
            "FILE, with its key, in PEM."
        )
    if shown is not None and not invited.clients:
        raise FederationError(
            f"The coordinator at {invited.address} asks for no certificate of a site's own; leave out --certificate."
        )
    if shown is not None:
        check_shown(shown, invited.clients)


def _check_policy(folder: Path, recipe: Recipe) -> None:
    _refuse(folder, forbidden(read_policy(folder), recipe))


def _refuse(folder: Path, found: Sequence[str]) -> None:
    """Refuse to take part where a policy forbids something."""
    if found:
        raise FederationError(f"The policy in {folder} forbids to take part: {'; '.join(found)}.")


def _check_facts(theirs: Mapping[str, str], ours: Mapping[str, str]) -> None:
    found = differing(theirs, ours)
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


def _agreed(
    folder: Path, federation: str, terms: Terms, agree: Callable[[Terms], bool], tell: Callable[[str], None]
) -> None:
    """Make sure that a person has agreed to these very terms of a federation."""
    path = kept_for(folder, federation) / CONSENT
    known = read_json(path, dict[str, str], "remove it, to be asked again") if path.exists() else {}
    if known.get("terms") == terms.hash:
        return
    if known:
        tell(f"These are other terms than those that were agreed to on {known.get('time', 'an unknown day')[:10]}.")
    if not agree(terms):
        raise FederationError("The terms are not agreed to, so nothing was sent.")
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    make_folder(path.parent)
    write_atomic(path, json_lines([{"terms": terms.hash, "time": now, "text": terms.text}]))
    tell("These terms are agreed to; other ones would be asked about anew.")


def _agreed_terms(folder: Path, federation: str) -> str:
    """Return the terms of a federation that a person agreed to, in plain words."""
    kept: dict[str, str] = read_json(kept_for(folder, federation) / CONSENT, dict[str, str], "restore it")
    return kept.get("text", "")


def _work(
    invited: Invitation,
    folder: Path,
    prepared: Prepared,
    base: Base,
    rows: Sequence[TokenRow],
    held_out: Sequence[TokenRow],
) -> Work:
    recipe, site = prepared.recipe, invited.site
    return Work(
        adapter_config(base, recipe.lora),
        1,
        {site: rows},
        {site: held_out},
        recipe.method,
        prepared.stop,
        recipe.engine.tokens,
        {site: kept_for(folder, invited.federation) / slug(site)},
        prepared.public,
        own_secret(folder),
        recipe.privacy,
    )


def _take_part(
    invited: Invitation,
    folder: Path,
    recipe: Recipe,
    prepared: Prepared,
    base: Base,
    agree: Callable[[Terms], bool],
    tell: Callable[[str], None],
    shown: Path | None,
    peers: Peers,
) -> None:
    """Agree to the terms, connect, and answer what is asked until the end."""
    (rows,) = (tokenised.rows for tokenised in prepared.clients.values())
    held_out = [row for tokenised in prepared.held_out.values() for row in tokenised.rows]
    work = _work(invited, folder, prepared, base, rows, held_out)
    layers = LoraLayers(base.model, work.config)
    holdings = holdings_of(invited.site, recipe, base, layers, work)
    _check_facts(invited.facts, holdings.facts)
    _check_disk(folder, recipe, base)
    terms = terms_for(invited, recipe, base, len(rows), held_out, len(prepared.scored.rows), peers)
    _agreed(folder, invited.federation, terms, agree, tell)
    others = note_trained(folder, invited.federation, (row.row for row in rows))
    if others:
        tell(f"This site has trained on {counted(others, 'other row')} before, and what it gives may hold them, too.")
    _wait_for_coordinator(invited, tell, shown)
    make_folder(folder)
    write_atomic(folder / AUTHORITY, invited.authority.encode())

    def keep(about: bytes, values: bytes) -> None:
        due = adapter_config(base, recipe.lora)  # of the server's rank
        keep_result(folder, invited.federation, about, values, due, holdings.shapes)
        for client in work.folders.values():
            forget_answers(client)
        tell(f"The federation has ended; its adapter is in {folder / ADAPTER}.")

    resident = Resident(
        holdings,
        read_signing(folder / SIGNING),
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(invited.coordinator)),
        invited.federation,
        Ledger(folder),
        as_check(read_policy(folder), folder),
        tell,
        keep,
        as_limit(read_policy(folder), folder),
        peers,
    )
    with Inbox(folder, folder / FLOWER, invited.address, folder / AUTHORITY, shown) as inbox:
        tell(f"{invited.site} waits for the coordinator's tasks.")
        resident.serve(_Telling(inbox, tell))
    layers.detach()


def _wait_for_coordinator(invited: Invitation, tell: Callable[[str], None], shown: Path | None = None) -> None:
    """Wait until the coordinator answers, and compare the clocks."""
    told = False
    while True:
        try:
            skew = clock_skew(invited.address, invited.authority, shown)
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
