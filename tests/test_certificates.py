"""Certificates of a coordinator: an enterprise's with an authority between, other names, ended ones, near ends."""

import datetime
import ipaddress
import ssl
import time

import httpx
import pytest

pytest.importorskip("flwr")

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from test_sites import FIELDS, free_port, papers, refused  # noqa: F401

from bellwether.engine.certificate import Certificate, check_certificate
from bellwether.engine.flower.inbox import Inbox
from bellwether.engine.flower.link import Link
from bellwether.errors import FederationError
from bellwether.site.federation_folder import CLIENTS, read_federation
from bellwether.site.invitation import read_invitation
from bellwether.site.joining import clock_skew
from bellwether.site.keys import FLOWER, make_authority, make_certificate, read_public

DAY = datetime.timedelta(days=1)


class Enterprise:
    """An enterprise's root authority, and one between that signs servers."""

    def __init__(self):
        self.root_key, self.key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
        self.root = self.signed("Enterprise Root", self.root_key, None, self.root_key, 365 * DAY, depth=1)
        self.between = self.signed("Enterprise Servers", self.key, self.root, self.root_key, 300 * DAY, depth=0)

    def signed(self, name, key, issuer, signing, until, depth=None, names=()):
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = datetime.datetime.now(datetime.UTC)
        built = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject if issuer is None else issuer.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 10 * DAY)
            .not_valid_after(now + until)
            .add_extension(x509.BasicConstraints(ca=depth is not None, path_length=depth), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signing.public_key()), critical=False)
        )
        if depth is not None:
            usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
            built = built.add_extension(usage, critical=True)
        if names:
            alternatives = [
                x509.IPAddress(ipaddress.ip_address(n)) if n[0].isdigit() else x509.DNSName(n) for n in names
            ]
            built = built.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        return built.sign(signing, hashes.SHA256())

    def issue(self, folder, names=("127.0.0.1",), until=100 * DAY, between=True):
        """Write a server's chain with its key, and the root, and return both paths."""
        key = ec.generate_private_key(ec.SECP256R1())
        server = self.signed("server", key, self.between, self.key, until, names=names)
        pem = serialization.Encoding.PEM
        parts = [server.public_bytes(pem), *([self.between.public_bytes(pem)] if between else [])]
        parts.append(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
        (folder / "chain-and-key.pem").write_bytes(b"".join(parts))
        (folder / "root.pem").write_bytes(self.root.public_bytes(pem))
        return folder / "chain-and-key.pem", folder / "root.pem"


@pytest.fixture(scope="module")
def enterprise():
    return Enterprise()


def made(bellwether, recipe, chain, root, address, *words):
    options = ("--certificate", chain, "--authority", root, "--address", address, *words)
    return bellwether("federation", "init", recipe, *FIELDS, *options)


def test_an_enterprises_certificate_with_an_authority_between_is_taken(bellwether, tiny_recipe, tmp_path, enterprise):
    chain, root = enterprise.issue(tmp_path)
    outcome = made(bellwether, tiny_recipe, chain, root, f"127.0.0.1:{free_port()}")
    assert outcome.code == 0, outcome.err
    key = bellwether("site", "keygen", "--folder", "north").out.strip()
    assert bellwether("federation", "invite", "north", key).code == 0
    # What a site knows is the root alone, by which it reaches the coordinator.
    invitation = read_invitation(tmp_path / "north.invitation")
    assert invitation.authority.encode() == root.read_bytes()
    make_authority(tmp_path, "a test", 1)
    inner = make_certificate(tmp_path, "inner", ["127.0.0.1"], 1)
    with Link(tmp_path, inner, read_federation(tmp_path / "federation").outer, "127.0.0.1", 0) as link:
        assert abs(clock_skew(f"127.0.0.1:{link.port}", invitation.authority)) < 2


@pytest.mark.parametrize(
    ("issue", "address", "reason"),
    [
        ({"names": ("fed.example.org",)}, "other.example.org:8443", "Hostname mismatch"),
        ({"names": ("fed.example.org",)}, "127.0.0.1:8443", "IP address mismatch"),
        ({"between": False}, "127.0.0.1:8443", "unable to get local issuer certificate"),
        ({"until": -DAY}, "127.0.0.1:8443", "certificate has expired"),
    ],
)
def test_a_certificate_that_sites_would_refuse_is_refused_before_anything_is_made(
    bellwether, tiny_recipe, tmp_path, enterprise, issue, address, reason
):
    chain, root = enterprise.issue(tmp_path, **issue)
    outcome = made(bellwether, tiny_recipe, chain, root, address)
    refused(outcome, f"Sites would refuse the certificate {chain} at {address.partition(':')[0]} ({reason}")
    assert not (tmp_path / "federation").exists()


@pytest.fixture
def asking(bellwether, tiny_recipe, tmp_path, enterprise):
    """Return what a site shows where a federation that asks for it has invited it, and a link that asks, too."""
    chain, root = enterprise.issue(tmp_path)
    words = ("--address", f"127.0.0.1:{free_port()}", "--client-authority", root)
    outcome = bellwether("federation", "init", tiny_recipe, *FIELDS, *words)
    assert outcome.code == 0, outcome.err
    key = bellwether("site", "keygen", "--folder", "north").out.strip()
    assert bellwether("federation", "invite", "north", key).code == 0
    return chain


def test_a_site_that_lacks_the_certificate_that_is_asked_for_is_told_before_it_connects(bellwether, asking, tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    Enterprise().issue(foreign)
    (tmp_path / "no-key.pem").write_bytes((tmp_path / "root.pem").read_bytes())

    def joined(*words):
        return bellwether("site", "join", "north.invitation", "--data", "rows.jsonl", "--folder", "north", *words)

    refused(joined(), "asks sites for a certificate of their own: give it by --certificate")
    refused(joined("--certificate", foreign / "chain-and-key.pem"), "The coordinator would refuse the certificate ")
    refused(joined("--certificate", "no-key.pem"), "no-key.pem cannot be used as this site's certificate")
    refused(joined("--certificate", "missing.pem"), "missing.pem cannot be used as this site's certificate")
    refused(joined("--certificate", asking), "rows.jsonl")  # which it comes to then


@pytest.mark.integration
def test_a_coordinator_that_asks_for_certificates_hears_only_sites_that_show_theirs(tmp_path, asking):
    folder = tmp_path / "federation"
    federation, invitation = read_federation(folder), read_invitation(tmp_path / "north.invitation")
    inner = Certificate(folder / "inner.crt", folder / "inner.key", folder / "ca.crt")
    authority = tmp_path / "authority.crt"
    authority.write_text(invitation.authority)
    with (
        Link(folder, inner, federation.outer, "127.0.0.1", 0, clients=folder / CLIENTS) as link,
        link.dispatch() as sent,
    ):
        address = f"127.0.0.1:{link.port}"
        known = ssl.create_default_context(cadata=invitation.authority)
        with pytest.raises(httpx.TransportError), httpx.Client(verify=known) as client:
            client.get(f"https://{address}/v1/fleet/")
        assert abs(clock_skew(address, invitation.authority, asking)) < 2
        link.register("north", read_public(invitation.key).flower)
        with Inbox(tmp_path / "north", tmp_path / "north" / FLOWER, address, authority, asking) as inbox:
            end = time.monotonic() + 300
            while not sent.online() and time.monotonic() < end:
                inbox.take()
                time.sleep(0.2)
            assert list(sent.online()) == ["north"]


def test_a_key_of_another_certificate_or_no_certificate_is_refused(tmp_path, enterprise):
    (tmp_path / "other").mkdir()
    chain, root = enterprise.issue(tmp_path)
    other, _ = enterprise.issue(tmp_path / "other")
    for certificate in (
        Certificate(chain, other, root),
        Certificate(chain, root, root),
        Certificate(chain, chain, tmp_path / "no"),
    ):
        with pytest.raises(FederationError, match="cannot be used"):
            check_certificate(certificate, "127.0.0.1")


def test_a_certificate_that_was_replaced_by_one_for_another_name_is_refused_at_serve(bellwether, papers):  # noqa: F811
    made = papers / "made"
    made.mkdir()
    make_authority(made, "a test", 100)
    make_certificate(made, "server", ["elsewhere"], 100)
    federation = papers / "federation"
    for name in ("server.crt", "server.key"):
        (federation / name).write_bytes((made / name).read_bytes())
    refused(bellwether("federation", "serve"), "Sites would refuse the certificate ")


def replace_with(papers, days):  # noqa: F811
    """Give a federation certificates that end in so many days."""
    federation, made = papers / "federation", papers / "made"
    made.mkdir()
    make_authority(made, "a test", days)
    make_certificate(made, "server", ["127.0.0.1"], days)
    for name in ("ca.crt", "server.crt", "server.key"):
        (federation / name).write_bytes((made / name).read_bytes())


def test_an_end_that_is_near_is_told_by_status_and_at_serve(bellwether, papers):  # noqa: F811
    from bellwether.site.coordinator import check_certificates

    assert "ENDS" not in bellwether("federation", "status").out
    assert list(check_certificates(papers / "federation", read_federation(papers / "federation"))) == []
    replace_with(papers, 12)
    out = bellwether("federation", "status").out
    assert "Its certificate ENDS in 11 days, on " in out
    assert ": put a new one of the same authority in its place, or begin a federation anew." in out
    told = list(check_certificates(papers / "federation", read_federation(papers / "federation")))
    assert [" ends in 11 days, on " in one for one in told] == [True, True]  # server and authority


def test_a_certificate_that_has_ended_is_told_by_status_and_refused_at_serve(bellwether, papers):  # noqa: F811
    replace_with(papers, -0.01)
    assert "Its certificate HAS ENDED, on " in bellwether("federation", "status").out
    refused(bellwether("federation", "serve"), "server.crt ended on ")


@pytest.mark.parametrize("name", ["münchen.example", "a b", "", "x\n.example", "-"])
def test_a_name_that_no_certificate_can_have_is_one_sentence(tmp_path, name):
    make_authority(tmp_path, "x", 10)
    with pytest.raises(FederationError, match="is no name of a host for a certificate; give it in ASCII"):
        make_certificate(tmp_path, "server", [name], 5)
    assert not (tmp_path / "server.crt").exists()
    make_certificate(tmp_path, "server", ["*.example.org", "xn--mnchen-3ya.example", "a_b", "::1"], 5)


def test_a_proxy_or_an_address_that_is_no_url_is_one_sentence(tmp_path, monkeypatch):
    make_authority(tmp_path, "x", 10)
    authority = (tmp_path / "ca.crt").read_text()
    with pytest.raises(FederationError, match="is no address"):
        clock_skew("é" * 70 + ".org:1", authority)
    monkeypatch.setenv("HTTPS_PROXY", "http://[::1:1")
    with pytest.raises(FederationError, match="or the proxy of HTTPS_PROXY, is no address"):
        clock_skew("fed.example.org:1", authority)
