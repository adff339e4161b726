"""What a site finds before it connects: another clock, ended or foreign certificates, proxies; each in a sentence."""

import contextlib
import http.server
import json
import ssl
import threading
import time

import pytest

pytest.importorskip("flwr")

from proxies import proxy
from test_sites import changed, join, papers, refused  # noqa: F401

from bellwether.site import joining
from bellwether.site.keys import make_authority, make_certificate


@contextlib.contextmanager
def coordinator(folder, behind=0.0, days=1.0):
    """Yield address and authority of something that answers like a coordinator whose clock is behind by seconds."""
    folder.mkdir()
    make_authority(folder, "a test", 1)
    made = make_certificate(folder, "server", ["127.0.0.1", "localhost"], days)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made.chain, made.key)

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response_only(404)
            self.send_header("date", self.date_time_string(time.time() - behind))
            self.send_header("content-length", "0")
            self.end_headers()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        server.handle_error = lambda *_: None
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"127.0.0.1:{server.server_port}", made.authority.read_text()
        server.shutdown()


@pytest.mark.parametrize(
    ("behind", "sentence"),
    [
        (86_400.0, "This machine's clock is 8640"),
        (-86_400.0, "This machine's clock is 8640"),
        (
            6.0,
            "s ahead of the coordinator's, and Flower takes at most 4 s ahead and 300 s behind; set it, such as by NTP",
        ),
    ],
    ids=["a day ahead", "a day behind", "6 s ahead"],
)
def test_a_clock_that_is_off_is_told_before_anything_is_sent(bellwether, papers, behind, sentence):  # noqa: F811
    with coordinator(papers / "there", behind) as (address, authority):
        outcome = join(bellwether, changed(papers, address=address, authority=authority))
    refused(outcome, sentence)
    assert ("ahead of" if behind > 0 else "behind the") in outcome.err
    assert not (papers / "north" / "ledger.jsonl").exists()


@pytest.mark.parametrize("behind", [0.0, 2.0, -200.0])
def test_a_clock_that_flower_takes_is_taken(tmp_path, behind):
    with coordinator(tmp_path / "there", behind) as at:
        skew = joining.clock_skew(*at)
    assert abs(skew - behind) < 1.5
    assert -joining.SLOW <= skew <= joining.FAST


def test_a_certificate_that_has_ended_is_told(bellwether, papers):  # noqa: F811
    with coordinator(papers / "there", days=-0.01) as (address, authority):
        outcome = join(bellwether, changed(papers, address=address, authority=authority))
    refused(outcome, f"What answers at {address} has a certificate that is not the federation's or is not valid")
    assert "certificate has expired" in outcome.err


def by_name(address):
    return address.replace("127.0.0.1", "localhost")  # what is at 127.0.0.1 is spoken with past any proxy


def test_a_proxy_is_gone_through(tmp_path, monkeypatch):
    with coordinator(tmp_path / "there") as (address, authority), proxy() as (through, asked):
        monkeypatch.setenv("HTTPS_PROXY", through)
        assert abs(joining.clock_skew(by_name(address), authority)) < 2
    assert asked == [by_name(address)]


def test_a_proxy_that_lets_nobody_through_is_told(bellwether, papers, monkeypatch):  # noqa: F811
    with coordinator(papers / "there") as (address, authority), proxy(refuses=True) as (through, _):
        monkeypatch.setenv("HTTPS_PROXY", through)
        outcome = join(bellwether, changed(papers, address=by_name(address), authority=authority))
    refused(outcome, f"The proxy of HTTPS_PROXY lets nobody through to {by_name(address)} (403 Forbidden).")


def test_a_proxy_that_is_not_there_is_named_while_the_site_waits(tmp_path, monkeypatch):
    with coordinator(tmp_path / "there") as (address, authority):
        with proxy() as (through, _):
            pass
        monkeypatch.setenv("HTTPS_PROXY", through)
        with pytest.raises(joining.NotThere, match="Nothing answers at localhost:.* through the proxy of HTTPS_PROXY"):
            joining.clock_skew(by_name(address), authority)


def test_another_tokenizer_is_told(bellwether, papers):  # noqa: F811
    """The very tokenizer of the site's own folder is changed by one token, with the weights as they are."""
    import shutil

    recipe = (papers / "federation" / "recipe.yaml").read_text()
    model = next(line.split()[-1] for line in recipe.splitlines() if line.strip().startswith("path:"))
    shutil.copytree(model, papers / "own")
    path = papers / "own" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    (first, second), numbers = list(vocabulary)[-2:], list(vocabulary.values())[-2:]
    vocabulary[first], vocabulary[second] = numbers[1], numbers[0]
    path.write_text(json.dumps(tokenizer))
    outcome = join(bellwether, "north.invitation", "--model", "own")
    refused(outcome, "This site cannot take part: tokenizer is ")
    assert "base model" not in outcome.err
