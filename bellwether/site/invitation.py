"""What a site is sent to join by, and the recipe in it, which is for sites."""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509

from bellwether.errors import FederationError, RecipeError
from bellwether.recipe.file import load_recipe
from bellwether.recipe.recipe import Data, Recipe
from bellwether.site.keys import read_public
from bellwether.tools.atomic import write_atomic
from bellwether.tools.json_text import KEPT, plain, read_json
from bellwether.tools.words import shown

INVITED = "invited.yaml"
# Of the recipe's section ``data``, how files of rows are read, which is each site's own.
OWN_DATA = ("columns", "source_columns", "encoding", "delimiter", "skip_bad_rows", "split", "config", "revision")
SITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
_PORT = re.compile(r"[0-9]{1,5}")
_REMEDY = "ask the coordinator for it again"


@dataclass(frozen=True)
class Invitation:
    """What a site needs to join, and to know what it agrees to.

    Args:
        federation: the federation's identifier.
        site: the site's name in it.
        key: the site's public keys, for which alone the invitation is.
        address: the coordinator's, as ``HOST:PORT``.
        authority: the authority's certificate, in PEM.
        coordinator: the key that verifies what the coordinator sends, in hexadecimal digits.
        recipe: what is run, as YAML.
        facts: what the site must have in common with the coordinator.
        clients: the authority of the certificates that sites have to show, in PEM; empty where they have to show none.
    """

    __pydantic_config__ = KEPT

    federation: str
    site: str
    key: str
    address: str
    authority: str
    coordinator: str
    recipe: str
    facts: Mapping[str, str]
    clients: str = ""


def for_sites(recipe: Recipe) -> Recipe:
    """Return a recipe that tells nothing of the coordinator's rows and its run, and of other files the name alone."""
    rows = {name: getattr(Data(), name) for name in ("sources", "test_sources", "validation_sources", *OWN_DATA)}
    selection = recipe.selection
    public = {
        "proxy": None if selection.proxy is None else _name_alone(selection.proxy),
        "projection_sources": tuple(map(_name_alone, selection.projection_sources)),
    }
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update=rows),
            "model": recipe.model.model_copy(update={"path": _name_alone(recipe.model.path)}),
            "selection": selection.model_copy(update=public),
            "output": recipe.output.model_copy(update={"folder": None}),
        }
    )


def _name_alone(path: str) -> str:
    """Return the name of a file of this machine, with a dot that tells it from one on the hub; other names stay."""
    return f"./{Path(path).name}" if Path(path).is_absolute() or path.startswith("~") else path


def write_invitation(path: Path, invitation: Invitation) -> None:
    """Write an invitation to a file that a site can be sent.

    Raises:
        FederationError: the file is there, and is another federation's or another site's.
        CheckpointError: it cannot be written.
    """
    if path.exists():
        there = read_invitation(path)
        if (there.federation, there.site) != (invitation.federation, invitation.site):
            raise FederationError(
                f"{path} is the invitation of {there.site} to the federation {there.federation[:12]}; name another "
                "file with --out."
            )
    write_atomic(path, (json.dumps(plain(invitation), indent=1) + "\n").encode())


def read_invitation(path: Path) -> Invitation:
    """Return an invitation, of which all but the recipe is what it must be.

    Raises:
        FederationError: there is no such file, or a field of it cannot be what it is for.
        CheckpointError: it holds something else.
    """
    if not path.is_file():
        raise FederationError(f"{path} is no file; give the invitation that the coordinator has sent.")
    invitation: Invitation = read_json(path, Invitation, _REMEDY)
    for field, is_right, wanted in (
        ("federation", _is_hexadecimal(invitation.federation, 16), "32 hexadecimal digits"),
        ("site", SITE_NAME.fullmatch(invitation.site), "a name of 1 to 64 letters, digits, dots, dashes, underscores"),
        ("key", _is_key(invitation.key), "a word of public keys"),
        ("address", _is_address(invitation.address), "HOST:PORT"),
        ("authority", _is_pem(invitation.authority), "a certificate in PEM"),
        ("coordinator", _is_hexadecimal(invitation.coordinator, 32), "64 hexadecimal digits"),
        ("clients", not invitation.clients or _is_pem(invitation.clients), "a certificate in PEM"),
    ):
        if not is_right:
            value = shown(getattr(invitation, field))
            raise FederationError(f"{path}: {field} is {value}, not {wanted}; {_REMEDY}.")
    return invitation


def _is_hexadecimal(text: str, length: int) -> bool:
    """Return whether a text is so many bytes in hexadecimal digits."""
    return re.fullmatch(rf"[0-9a-f]{{{2 * length}}}", text) is not None


def _is_key(word: str) -> bool:
    """Return whether a word is a site's public keys."""
    try:
        read_public(word)
    except FederationError:
        return False
    return True


def _is_pem(text: str) -> bool:
    """Return whether a text holds certificates, and nothing but ASCII, which is all that the ssl module takes."""
    try:
        return text.isascii() and bool(x509.load_pem_x509_certificates(text.encode()))
    except ValueError:
        return False


def invited_recipe(invitation: Invitation, place: Path, fields: Sequence[str] = ()) -> Recipe:
    """Return the recipe in an invitation, with what a site sets of its own.

    How a site's files are read is said by the site alone: what an invitation says of it does not count, since names of
    categories and groups leave the site, and columns decide which these are.

    Args:
        invitation: the invitation.
        place: a folder in which the recipe is put down, for its mistakes to have a file.
        fields: the site's, such as ``data.columns.response=reply``.

    Raises:
        RecipeError: it is none, or a field cannot be what the site sets.
    """
    path = place / INVITED
    write_atomic(path, invitation.recipe.encode())
    usual = Data().model_dump(mode="json")
    return load_recipe(path, [*(f"data.{name}={json.dumps(usual[name])}" for name in OWN_DATA), *fields])


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of an address.

    Raises:
        FederationError: it is none.
    """
    host, _, port = address.rpartition(":")
    if not _is_address(address):
        raise FederationError(f"{address[:80]!r} is no address; give HOST:PORT, such as fed.example.org:8443.")
    return host, int(port)


def _is_address(address: str) -> bool:
    """Return whether a text is a host, by its name or an IP address, and a port."""
    host, _, port = address.rpartition(":")
    return _is_host(host) and _PORT.fullmatch(port) is not None and 0 < int(port) < 65_536


def _is_host(host: str) -> bool:
    """Return whether a text names a host: labels with dots between, an IPv4 address, or an IPv6 one in brackets."""
    if host.startswith("[") and host.endswith("]"):
        try:
            return "%" not in host and ipaddress.ip_address(host[1:-1]).version == 6
        except ValueError:
            return False
    return len(host) <= 253 and all(_LABEL.fullmatch(label) for label in host.split("."))


def check_recipe_for_sites(recipe: Recipe) -> None:
    """Refuse what makes sense for simulated clients only.

    Raises:
        RecipeError: fields that have no place in a federation of sites.
    """
    federation, problems = recipe.federation, []
    if federation.availability is not None:
        problems.append("federation.availability simulates clients, and sites are real; set it to null.")
    if recipe.lora.ranks is not None and not isinstance(recipe.lora.ranks, Mapping):
        problems.append("lora.ranks draws ranks for simulated clients; name sites in it, such as {hospital: 4}.")
    if recipe.data.unseen_categories:
        problems.append(
            "data.unseen_categories holds rows of a simulation back, and sites have their own; leave it out."
        )
    if recipe.privacy.amplification:
        problems.append(
            "privacy.amplification counts on nobody's seeing who is asked, and sites see it; set it to false."
        )
    if recipe.privacy.hides_rows and recipe.privacy.epsilon is not None:
        problems.append(
            "privacy.epsilon of rows is a site's own to tell, which alone knows how many it has; give privacy.noise "
            "alone."
        )
    if recipe.compare is not None:
        problems.append("compare has no place in a federation of sites; leave it out.")
    if problems:
        raise RecipeError(problems)
