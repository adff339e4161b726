"""The certificate of a port."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from bellwether.errors import FederationError, first_line


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
        served.load_cert_chain(certificate.chain, certificate.key)
        known = ssl.create_default_context(cafile=certificate.authority)
    except (OSError, ssl.SSLError) as error:
        raise FederationError(
            f"The certificate {certificate.chain} with the key in {certificate.key} and the authority "
            f"{certificate.authority} cannot be used ({first_line(error)}); give all in PEM, and a key without a "
            "passphrase that belongs to its certificate."
        ) from error
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    site = known.wrap_bio(down, up, server_hostname=host)
    coordinator = served.wrap_bio(up, down, server_side=True)
    try:
        for _ in range(3):  # there, back, and there again
            for end in (site, coordinator):
                _shake_hands(end)
    except ssl.SSLCertVerificationError as error:
        raise FederationError(
            f"Sites would refuse the certificate {certificate.chain} at {host} ({error.verify_message}): it must be "
            f"valid, name {host} among its subject's alternative names, and lead to the authority "
            f"{certificate.authority}, with all certificates between in its file."
        ) from error


def _shake_hands(end: ssl.SSLObject) -> None:
    try:
        end.do_handshake()
    except ssl.SSLWantReadError:  # the other end has to say something first
        return
