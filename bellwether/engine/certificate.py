"""The certificate of a port, and what a site may show there."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from bellwether.errors import FederationError, first_line

NO_PASSPHRASE = ""  # else a person would be asked for one, also where nobody is there


@dataclass(frozen=True)
class Certificate:
    """A certificate with its key, and the authority by which others know it; all are files in PEM."""

    chain: Path
    key: Path
    authority: Path


def check_certificate(certificate: Certificate, host: str) -> None:
    """Refuse a certificate that sites would refuse, by doing in memory what they do: agree on TLS with it.

    Args:
        certificate: what the port has.
        host: the name or address by which sites reach it.

    Raises:
        FederationError: it is for another name, has ended, does not belong to its key, or is not the authority's.
    """
    served = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        served.load_cert_chain(certificate.chain, certificate.key, NO_PASSPHRASE)
        known = ssl.create_default_context(cafile=certificate.authority)
    except (OSError, ssl.SSLError) as error:
        raise FederationError(
            f"The certificate {certificate.chain} with the key in {certificate.key} and the authority "
            f"{certificate.authority} cannot be used ({first_line(error)}); give all in PEM, and a key without a "
            "passphrase that belongs to its certificate."
        ) from error
    try:
        agree(known, served, host)
    except ssl.SSLCertVerificationError as error:
        raise FederationError(
            f"Sites would refuse the certificate {certificate.chain} at {host} ({error.verify_message}): it must be "
            f"valid, name {host} among its subject's alternative names, and lead to the authority "
            f"{certificate.authority}, with all certificates between in its file."
        ) from error


def check_shown(shown: Path, authority: str) -> None:
    """Refuse a certificate that a coordinator would refuse where sites have to show one.

    Args:
        shown: the file of the site's certificate, those between it and the authority, and its key, in PEM.
        authority: the authority's certificate, in PEM.

    Raises:
        FederationError: it cannot be used, has ended, or is not the authority's.
    """
    coordinator, site = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    coordinator.verify_mode, site.check_hostname, site.verify_mode = ssl.CERT_REQUIRED, False, ssl.CERT_NONE
    show(site, shown)
    show(coordinator, shown)  # nobody looks at that
    try:
        coordinator.load_verify_locations(cadata=authority)
        agree(site, coordinator, None)
    except ssl.SSLCertVerificationError as error:
        raise FederationError(
            f"The coordinator would refuse the certificate {shown} ({error.verify_message}): it must be valid, made "
            "for clients, and lead to the authority that the invitation names, with all certificates between in its "
            "file."
        ) from error
    except ssl.SSLError as error:
        raise FederationError(
            f"The authority of sites' certificates in the invitation cannot be read ({first_line(error)}): ask the "
            "coordinator for the invitation again."
        ) from error


def show(context: ssl.SSLContext, shown: Path) -> None:
    """Let a certificate be shown to whoever asks for one.

    Args:
        context: of the connections.
        shown: the file of certificate and key, in PEM.

    Raises:
        FederationError: it cannot be used.
    """
    try:
        context.load_cert_chain(shown, password=NO_PASSPHRASE)
    except (OSError, ssl.SSLError) as error:
        raise FederationError(
            f"{shown} cannot be used as this site's certificate ({first_line(error)}); give one file in PEM with the "
            "certificate and a key without a passphrase that belongs to it."
        ) from error


def agree(site: ssl.SSLContext, coordinator: ssl.SSLContext, host: str | None) -> None:
    """Agree on TLS in memory.

    Args:
        site: how a site connects.
        coordinator: how it is answered.
        host: the name or address by which the coordinator is reached; None looks at no name.

    Raises:
        ssl.SSLError: an end refuses.
    """
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = site.wrap_bio(down, up, server_hostname=host), coordinator.wrap_bio(up, down, server_side=True)
    for _ in range(3):  # there, back, and there again
        for end in ends:
            _shake_hands(end)


def _shake_hands(end: ssl.SSLObject) -> None:
    try:
        end.do_handshake()
    except ssl.SSLWantReadError:  # the other end has to say something first
        return
