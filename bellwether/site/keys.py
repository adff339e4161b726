"""Keys and certificates of a federation, made with the ``cryptography`` library and kept where their owner alone reads.

A site has two keys, which never leave it: one by which Flower knows it (ECDSA on P-384), and one that signs what it
sends (Ed25519). Its public half is one word, both together. A coordinator has an authority of its own, which signs the
certificate of its port, and a key that signs what it sends.
"""

from __future__ import annotations

import base64
import binascii
import datetime
import errno
import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from bellwether.engine.certificate import Certificate
from bellwether.errors import FederationError
from bellwether.tools.atomic import TEMPORARY, cannot_write, make_folder, remove, sync_folder, write_atomic
from bellwether.tools.words import shown

SOON = 30  # days before its end from which on a certificate is warned of
RENEW = "put a new one of the same authority in its place, or begin a federation anew"
AUTHORITY_DAYS = 3650  # that the authority of a federation is valid, which signs new certificates for its ports
SIGNING, FLOWER = "signing.key", "flower.key"
_PREFIX, _POINT = "bw1-", 49  # bytes of a compressed point on P-384
_PEM, _RAW = serialization.Encoding.PEM, serialization.Encoding.Raw


@dataclass(frozen=True)
class SiteKeys:
    """The public half of a site's keys.

    Args:
        signing: verifies what it sends.
        flower: by which Flower knows it, as PEM.
    """

    signing: Ed25519PublicKey
    flower: bytes


def make_site_folder(folder: Path) -> Path:
    """Return a site's own folder, which its owner alone can read; it is made where it is missing.

    Raises:
        FederationError: others can read it, and it holds other things.
        CheckpointError: it cannot be made.
    """
    if folder.is_dir() and any(folder.iterdir()):
        mode = folder.stat().st_mode & 0o777
        if os.name == "posix" and mode & 0o077:
            raise FederationError(
                f"{folder} holds other things, and others than you can read it (mode {mode:o}); give a new folder with "
                f"--folder, or make it yours alone by chmod 700 {folder}."
            )
        return folder
    make_folder(folder).chmod(0o700)
    return folder


def make_site_keys(folder: Path) -> str:
    """Make a site's keys, and return their public half as one word.

    Args:
        folder: where they are written; it must exist.

    Raises:
        FederationError: there are keys already.
        CheckpointError: they cannot be written.
    """
    if (folder / SIGNING).exists():
        raise FederationError(f"{folder} holds keys already; give another folder with --folder, or use these.")
    remove(folder / FLOWER)  # of a process that was killed in between; nobody knows of it
    signing, flower = Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP384R1())
    openssh = serialization.PrivateFormat.OpenSSH
    write_private(folder / FLOWER, flower.private_bytes(_PEM, openssh, serialization.NoEncryption()))
    write_private(folder / SIGNING, _private(signing))  # the last, by which keys are there
    return public_word(folder)


def public_word(folder: Path) -> str:
    """Return the public half of a site's keys as one word.

    Raises:
        FederationError: there are none, or they cannot be read.
    """
    if not (folder / SIGNING).exists():
        raise FederationError(
            f"{folder} holds no keys of a site; name the site's own folder with --folder, or make it by bellwether "
            "site keygen."
        )
    point = serialization.PublicFormat.CompressedPoint
    own = read_signing(folder / SIGNING).public_key().public_bytes(_RAW, serialization.PublicFormat.Raw)
    flower = _flower_key(folder / FLOWER).public_key().public_bytes(serialization.Encoding.X962, point)
    return _PREFIX + base64.urlsafe_b64encode(own + flower).decode().rstrip("=")


def read_public(word: str) -> SiteKeys:
    """Return the public keys behind one word.

    Raises:
        FederationError: it is none.
    """
    try:
        if not word.startswith(_PREFIX):
            raise ValueError("it does not begin so")
        data = base64.b64decode(word[len(_PREFIX) :] + "=" * (-len(word[len(_PREFIX) :]) % 4), b"-_", validate=True)
        if len(data) != 32 + _POINT:
            raise ValueError("it is too short or too long")
        flower = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP384R1(), data[32:])
        spki = serialization.PublicFormat.SubjectPublicKeyInfo
        return SiteKeys(Ed25519PublicKey.from_public_bytes(data[:32]), flower.public_bytes(_PEM, spki))
    except (ValueError, binascii.Error) as error:
        raise FederationError(
            f"{word[:40]!r} is no public key of a site: give the word that bellwether site keygen shows, which begins "
            f"with {_PREFIX}."
        ) from error


def have_in_common(word: str, other: str) -> bool:
    """Return whether two words of public keys, which can be written in more than one way, share either key."""
    one, another = read_public(word), read_public(other)
    return one.signing == another.signing or one.flower == another.flower


def make_signing(path: Path) -> Ed25519PublicKey:
    """Make a key that signs, write it, and return its public half."""
    key = Ed25519PrivateKey.generate()
    write_private(path, _private(key))
    return key.public_key()


def read_signing(path: Path) -> Ed25519PrivateKey:
    """Return a key that signs.

    Raises:
        FederationError: there is none, or it cannot be read.
    """
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise _no_key(path, error) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise _no_key(path, TypeError("another kind of key"))
    return key


def public_hex(key: Ed25519PublicKey) -> str:
    """Return a public key as 64 hexadecimal digits."""
    return key.public_bytes(_RAW, serialization.PublicFormat.Raw).hex()


def make_authority(folder: Path, name: str, days: int) -> None:
    """Make an authority of one's own: ``ca.crt`` and ``ca.key``.

    Args:
        folder: where they are written; it must exist.
        name: whose it is.
        days: how long it is valid.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    built = (
        _begun(name, name, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )
    write_private(folder / "ca.key", _private(key))
    write_private(folder / "ca.crt", built.public_bytes(_PEM), 0o644)


def make_certificate(folder: Path, stem: str, names: Sequence[str], days: int) -> Certificate:
    """Make a certificate for a port, signed by the authority in a folder.

    Args:
        folder: of ``make_authority``; the certificate is written there.
        stem: the name of its files.
        names: host names and addresses by which it is reached.
        days: how long it is valid.

    Raises:
        FederationError: the authority cannot be read, or a name is none.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    alternative = x509.SubjectAlternativeName([_alternative(name) for name in names])
    built = _signed(folder, key.public_key(), alternative, days)
    write_private(folder / f"{stem}.key", _private(key))
    write_private(folder / f"{stem}.crt", built, 0o644)
    return Certificate(folder / f"{stem}.crt", folder / f"{stem}.key", folder / "ca.crt")


def can_renew(folder: Path, stem: str) -> bool:
    """Return whether a certificate ends soon, or has ended, and can be made anew.

    Args:
        folder: of ``make_authority``.
        stem: the name of the certificate's files.

    Returns:
        False where it is good still, or lasts as long as the authority, or where the authority or its key are not
        those that signed it.

    Raises:
        FederationError: a file cannot be read.
    """
    old, authority = _certificate(folder / f"{stem}.crt"), _certificate(folder / "ca.crt")
    left, days = days_left(folder / f"{stem}.crt"), _days_of_new(folder, old)
    ours = (folder / "ca.key").exists() and _is_of(old, authority)
    return left < min(SOON, days // 2) and left < days and ours


def renew_certificate(folder: Path, stem: str) -> None:
    """Put a new certificate for the same key and names in the place of one that can be made anew.

    Args:
        folder: of ``make_authority``.
        stem: the name of the certificate's files.

    Raises:
        FederationError: a file cannot be read.
        CheckpointError: the certificate cannot be written.
    """
    path = folder / f"{stem}.crt"
    old = _certificate(path)
    names = old.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    write_atomic(path, _signed(folder, old.public_key(), names, _days_of_new(folder, old)))


def _days_of_new(folder: Path, old: x509.Certificate) -> int:
    """Return for how many days a certificate in the place of another would be valid."""
    return min((old.not_valid_after_utc - old.not_valid_before_utc).days, days_left(folder / "ca.crt"))


def _certificate(path: Path) -> x509.Certificate:
    """Return the first certificate in a file.

    Raises:
        FederationError: the file holds none.
    """
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise _no_key(path, error) from error


def _is_of(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Return whether an authority has signed a certificate."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _signed(folder: Path, key: CertificatePublicKeyTypes, names: x509.SubjectAlternativeName, days: int) -> bytes:
    """Return a port's certificate, in PEM, signed by the authority in a folder.

    Raises:
        FederationError: the authority cannot be read.
    """
    try:
        authority = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
        signing = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    except (OSError, ValueError) as error:
        raise _no_key(folder / "ca.key", error) from error
    if not isinstance(signing, ec.EllipticCurvePrivateKey):
        raise _no_key(folder / "ca.key", TypeError("another kind of key"))
    issuer = str(authority.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)
    built = (
        _begun("bellwether coordinator", issuer, key, days)
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signing.public_key()), critical=False)
        .sign(signing, hashes.SHA384())
    )
    return built.public_bytes(_PEM)


def expires(path: Path) -> datetime.datetime:
    """Return when a certificate ends.

    Raises:
        FederationError: the file holds none.
    """
    return _certificate(path).not_valid_after_utc


def days_left(path: Path) -> int:
    """Return for how many days a certificate is valid still; negative where it is not.

    Raises:
        FederationError: the file holds none.
    """
    return (expires(path) - datetime.datetime.now(datetime.UTC)).days


def read_authority(path: Path) -> str:
    """Return an authority's certificate, or the certificates of all authorities in a file, as PEM.

    Raises:
        FederationError: the file holds none.
    """
    try:
        found = x509.load_pem_x509_certificates(path.read_bytes())
    except (OSError, ValueError) as error:
        raise _no_key(path, error) from error
    return "".join(one.public_bytes(_PEM).decode() for one in found)


def write_private(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Write a new file that its owner alone can read, whole or not at all, forced to the disk.

    Raises:
        CheckpointError: it is there already, or cannot be written.
    """
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    remove(temporary)
    try:
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        remove(temporary)
        raise cannot_write(path, error) from error


def _flower_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_ssh_private_key(path.read_bytes(), None)
    except (OSError, ValueError) as error:
        raise _no_key(path, error) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise _no_key(path, TypeError("another kind of key"))
    return key


def _private(key: Ed25519PrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _begun(name: str, issuer: str, key: CertificatePublicKeyTypes, days: int) -> x509.CertificateBuilder:
    """Return the beginning of a certificate, valid from an hour ago, for clocks that are late."""
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _alternative(name: str) -> x509.GeneralName:
    """Return a name of a host as a certificate has it.

    Raises:
        FederationError: it is none.
    """
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        if not re.fullmatch(r"(\*\.)?[A-Za-z0-9_][A-Za-z0-9_.-]{0,250}", name):
            raise FederationError(
                f"{shown(name)} is no name of a host for a certificate; give it in ASCII, such as "
                "xn--mnchen-3ya.example for münchen.example."
            ) from None
        return x509.DNSName(name)


def _no_key(path: Path, error: Exception) -> FederationError:
    reason = getattr(error, "strerror", None) or type(error).__name__
    return FederationError(f"{path} cannot be read as a key or a certificate ({reason}); restore it, or make new ones.")
