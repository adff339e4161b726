"""What is relied upon of Flower's internals, which change between versions: a contract with the one that is pinned."""

import importlib.metadata
import re
import ssl
from pathlib import Path

import httpx
import pytest

pytest.importorskip("flwr")

from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, HEARTBEAT_PATIENCE, ErrorCode

from bellwether.engine.certificate import Certificate
from bellwether.engine.flower import records
from bellwether.engine.flower.gate import LARGEST_REQUEST
from bellwether.engine.flower.link import Link
from bellwether.errors import FederationError
from bellwether.exchange.seal import Parcel
from bellwether.site.keys import make_authority, make_certificate, make_site_keys, public_word, read_public

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def link(tmp_path_factory):
    folder = tmp_path_factory.mktemp("link")
    make_authority(folder, "a test", 1)
    inner, outer = (make_certificate(folder, stem, ["127.0.0.1"], 1) for stem in ("inner", "outer"))
    with Link(folder, inner, outer, "127.0.0.1", 0) as link:
        yield link


@pytest.fixture
def outside(link):
    """A client that knows the authority, at the outer port."""
    known = ssl.create_default_context(cadata=link._inner.authority.read_text())
    with httpx.Client(verify=known, base_url=f"https://127.0.0.1:{link.port}") as client:
        yield client


def site_keys(folder: Path, name: str):
    (folder / name).mkdir()
    make_site_keys(folder / name)
    return read_public(public_word(folder / name))


def test_the_version_is_the_one_that_the_extra_pins():
    assert importlib.metadata.version("flwr").startswith("1.42.")
    assert 'federation = ["cryptography>=46", "flwr>=1.42,<1.43"]' in (ROOT / "pyproject.toml").read_text()
    assert "\nflwr==1.42." in (ROOT / "constraints.txt").read_text()


def test_no_other_module_imports_flower():
    places = [path for path in (ROOT / "bellwether").rglob("*.py") if path.parent.name != "flower"]
    importing = [path for path in places if re.search(r"^\s*(from|import) flwr\b", path.read_text(), re.MULTILINE)]
    assert not importing


def test_nothing_is_told_to_anybody():
    from flwr.supercore import telemetry

    assert telemetry.FLWR_TELEMETRY_ENABLED == "0"


@pytest.mark.parametrize("body", [b"", b"x", bytes(6_000_000)], ids=["none", "one byte", "two chunks"])
def test_a_parcel_comes_out_of_flowers_records_as_it_went_in(body):
    from flwr.app import Message
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
    from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

    parcel = Parcel(b"header", b"signature", b"manifest", body)
    record = records.record_of(parcel)
    contents = {number: one.deflate() for number, one in get_all_nested_objects(record).items()}
    again = inflate_object_from_contents(record.object_id, contents)
    message = Message.__new__(Message)
    message.__dict__.update({"_content": again, "_metadata": None, "_error": None})
    assert records.parcel_of(message) == parcel


def test_errors_mean_what_is_said_of_them():
    names = {2: "CLIENT_APP_RAISED_EXCEPTION", 3: "MESSAGE_UNAVAILABLE", 4: "REPLY_MESSAGE_UNAVAILABLE"}
    names |= {5: "NODE_UNAVAILABLE", 8: "CLIENT_APP_CRASHED"}
    assert {code: getattr(ErrorCode, name) for code, name in names.items()} == {code: code for code in names}
    assert names.keys() == records._FAILURES.keys()


def test_a_site_that_was_killed_may_come_back_as_soon_as_the_docs_say():
    # A SuperNode counts as connected for this long after its last heartbeat.
    assert HEARTBEAT_DEFAULT_INTERVAL * HEARTBEAT_PATIENCE == 60


@pytest.mark.parametrize(
    "path", ["/", "/docs", "/openapi.json", "/health", "/v1/control/list-runs", "/v1/runtime/pull"]
)
def test_sites_reach_nothing_but_their_own_part(outside, path):
    for method in ("GET", "POST"):
        assert outside.request(method, path).status_code == 404


def test_a_request_without_a_sites_signature_is_refused(outside):
    answer = outside.post("/v1/fleet/pull-messages", content=b"", headers={"content-type": "application/protobuf"})
    assert answer.status_code == 401


def test_a_request_that_is_too_large_is_refused(outside):
    headers = {"content-type": "application/protobuf"}
    answer = outside.post("/v1/fleet/push-object", content=bytes(LARGEST_REQUEST + 1), headers=headers)
    assert answer.status_code == 413


def test_answers_tell_the_time(outside):
    assert "date" in outside.get("/v1/fleet/").headers


def test_a_site_is_registered_once_and_after_it_was_revoked_never(link, tmp_path):
    keys = site_keys(tmp_path, "north")
    link.register("north", keys.flower)
    link.register("north", keys.flower)
    assert [(node.name, node.online) for node in link.nodes()] == [("north", False)]
    link.unregister("north")
    assert link.nodes() == []
    with pytest.raises(FederationError, match="The key of site north cannot be registered"):
        link.register("north", keys.flower)


def test_a_run_begins_again_after_one_that_nobody_ended(link):
    with link.dispatch() as first:
        assert dict(first.online()) == {}
        with link.dispatch() as second:
            assert dict(second.online()) == {}


def test_a_certificate_that_is_none_is_refused(link, tmp_path):
    make_authority(tmp_path, "a test", 1)
    good = make_certificate(tmp_path, "good", ["127.0.0.1"], 1)
    with pytest.raises(FederationError, match="cannot be used"):
        Link(tmp_path, good, Certificate(tmp_path / "ca.crt", good.key, good.authority), "127.0.0.1", 0)
