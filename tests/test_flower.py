"""What is relied upon of Flower's internals, which change between versions: a contract with the one that is pinned."""

import asyncio
import base64
import contextlib
import datetime
import importlib
import importlib.metadata
import inspect
import itertools
import logging
import re
import socket
import ssl
import threading
import time
import types
from pathlib import Path

import httpx
import pytest

pytest.importorskip("flwr")

import uvicorn
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, HEARTBEAT_PATIENCE, ErrorCode
from flwr.proto.control_pb2 import StopRunRequest, UnregisterNodeRequest
from flwr.proto.error_pb2 import Error
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PushMessagesRequest
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import Metadata, ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.supercore import sql_mixin
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.corestate import sql_corestate
from flwr.supercore.date import now
from flwr.supercore.heartbeat import make_task_heartbeat_fn_http
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPushError,
    inflate_object_from_contents,
    pull_objects,
    push_objects,
)
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.fleet_http_connection import http_request_response
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from proxies import proxy

from bellwether.engine.certificate import Certificate
from bellwether.engine.flower import dispatch, gate, inbox, quiet, records
from bellwether.engine.flower.gate import LARGEST_MESSAGE, LARGEST_REQUEST
from bellwether.engine.flower.link import Link
from bellwether.errors import FederationError
from bellwether.exchange.seal import Parcel
from bellwether.site.keys import FLOWER, make_authority, make_certificate, make_site_keys, public_word, read_public

ROOT = Path(__file__).parents[1]
MOST = 2**24  # bytes of an answer


@pytest.fixture(scope="module")
def link(tmp_path_factory):
    folder = tmp_path_factory.mktemp("link")
    make_authority(folder, "a test", 1)
    names = ["127.0.0.1", "localhost"]
    inner, outer = (make_certificate(folder, stem, names, 1) for stem in ("inner", "outer"))
    with Link(folder, inner, outer, "127.0.0.1", 0) as link:
        known = ssl.create_default_context(cadata=inner.authority.read_text())
        # A SuperNode that is refused ends, so none is before it is known who may come.
        assert httpx.post(f"https://127.0.0.1:{link.port}/v1/fleet/activate-node", verify=known).status_code == 503
        with link.dispatch():
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


@pytest.mark.parametrize("code", [0, 1, 999])
def test_what_a_site_says_of_a_failure_is_told_on_one_line_and_cut(code):
    about = types.SimpleNamespace(reply_to_message_id="n1")
    error = types.SimpleNamespace(code=code, reason="a\r\nb\x1b[31m\u2028" + "x" * 8_000_000)
    came = records.arrived(types.SimpleNamespace(metadata=about, error=error, has_error=lambda: True))
    assert came == records.Arrived("n1", None, "Flower says: ab[31m" + "x" * 294)


def test_a_site_that_was_killed_may_come_back_as_soon_as_the_docs_say():
    # A SuperNode counts as connected for this long after its last heartbeat.
    assert HEARTBEAT_DEFAULT_INTERVAL * HEARTBEAT_PATIENCE == 60


@pytest.mark.parametrize(
    "path", ["/", "/docs", "/openapi.json", "/health", "/v1/control/list-runs", "/v1/runtime/pull"]
)
def test_sites_reach_nothing_but_their_own_part(outside, path):
    for method in ("GET", "POST"):
        assert outside.request(method, path).status_code == 404


CONTROL = ["list-nodes", "unregister-node", "register-node", "list-runs", "stop-run", "start-run"]
OPEN = [*(f"/v1/control/{name}" for name in CONTROL), "/v1/fleet/activate-node", "/v1/runtime/acquire-task"]


@pytest.mark.parametrize("path", [*OPEN, "/health", "/docs", "/openapi.json"])
def test_others_on_the_coordinators_machine_are_given_nothing_at_the_inner_port(link, path):
    known = ssl.create_default_context(cadata=link._inner.authority.read_text())
    with httpx.Client(verify=known, base_url=f"https://{link._address}") as other:
        for shown in ({}, {"authorization": "Bearer x"}, {"authorization": f"Bearer {link._secret.hex()}"}):
            answer = other.post(path, headers={"content-type": "application/protobuf", **shown})
            assert (answer.status_code, answer.content) == (401, b"")


def test_others_on_the_coordinators_machine_end_no_run_and_strike_off_no_site(link, tmp_path):
    link.register("stays here", site_keys(tmp_path, "stays").flower)
    (number,) = [node.number for node in link.nodes() if node.name == "stays here"]
    control = ControlHttpClient.from_server_address(link._address, False, link._inner.authority.read_bytes(), [])
    with link.dispatch() as dispatch, contextlib.closing(control):
        for ask in (
            lambda: control.UnregisterNode(UnregisterNodeRequest(node_id=number)),
            lambda: control.StopRun(StopRunRequest(run_id=dispatch._identity[1])),
        ):
            with pytest.raises(httpx.HTTPStatusError, match="401"):
                ask()
        assert "stays here" in {node.name for node in link.nodes()}
        assert dispatch.online() is not None


def test_a_body_of_somebody_else_on_the_coordinators_machine_is_not_read(link):
    known = ssl.create_default_context(cadata=link._inner.authority.read_text())
    host, port = link._address.split(":")
    plain = socket.create_connection((host, int(port)), timeout=10)
    with known.wrap_socket(plain, server_hostname=host) as slow:
        slow.sendall(b"POST /v1/control/stop-run HTTP/1.1\r\nhost: here\r\ncontent-length: 1000000\r\n\r\n")
        assert slow.recv(1000).startswith(b"HTTP/1.1 401")


def test_others_on_a_sites_machine_are_given_nothing_at_the_supernodes_port(monkeypatch):
    from flwr.supercore.object_store import ObjectStoreFactory
    from flwr.supernode import main
    from flwr.supernode.nodestate import NodeStateFactory

    from bellwether.engine.flower import supernode

    program, secret, port = (
        importlib.import_module("flwr.supernode.cli.flower_supernode"),
        bytes(32),
        inbox._free_port(),
    )
    monkeypatch.setattr(main, "create_app", supernode.for_owner(main.create_app))
    given = {"superexec_auth_secret": secret, "runtime_ssl_certfile": None, "runtime_ssl_keyfile": None}
    config = types.SimpleNamespace(host="127.0.0.1", port=port, **given)
    server, thread = program._start_supernode_http_api(config, NodeStateFactory(ObjectStoreFactory()))
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as other:
            for path in ("/health", "/docs", "/openapi.json", "/v1/runtime/acquire-task"):
                assert other.get(path).status_code == 401
            assert other.get("/health", headers={"authorization": records.owners_word(secret)}).status_code == 200
    finally:
        server.should_exit = True
        thread.join()


def test_a_request_without_a_sites_signature_is_refused(outside):
    answer = outside.post("/v1/fleet/pull-messages", content=b"", headers={"content-type": "application/protobuf"})
    assert answer.status_code == 401


def signed_head(folder, name):
    """What a SuperNode shows with a request of its own."""
    key, request = flower_key(folder, name), httpx.Request("POST", "https://here/")
    context = types.SimpleNamespace(request=request)
    NodeAuthHttpInterceptor(key, key.public_key()).intercept(context, lambda context: None)
    shown = {name: value for name, value in request.headers.items() if name not in ("host", "content-length")}
    return {**shown, "content-type": "application/protobuf"}


@pytest.mark.parametrize(
    ("path", "most"),
    [("push-object", LARGEST_REQUEST), ("push-messages", LARGEST_MESSAGE), ("get-fab", LARGEST_MESSAGE)],
)
def test_a_request_that_is_too_large_is_refused(outside, link, tmp_path, path, most):
    link.register(path, site_keys(tmp_path, path).flower)
    for size, refused in ((most + 1, True), (most, False)):
        answer = outside.post(f"/v1/fleet/{path}", content=bytes(size), headers=signed_head(tmp_path, path))
        assert (answer.status_code == 413) == refused


def test_answers_tell_the_time(outside):
    assert "date" in outside.get("/v1/fleet/").headers


def test_what_flower_writes_can_be_read_by_its_owner_alone(tmp_path):
    make_authority(tmp_path, "a test", 1)
    inner, outer = (make_certificate(tmp_path, stem, ["127.0.0.1"], 1) for stem in ("inner", "outer"))
    with Link(tmp_path, inner, outer, "127.0.0.1", 0) as link, link.dispatch():
        found = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.glob("flower.db*")}
    assert "flower.db" in found
    assert set(found.values()) == {0o600}


def test_the_database_waits_for_its_turn_longer_than_flower_lets_it(link):
    from sqlalchemy import create_engine, event

    engine = create_engine("sqlite://")
    event.listen(engine, "connect", sql_mixin._set_sqlite_pragmas)
    with engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 120_000  # milliseconds
    engine.dispose()


def test_a_site_is_registered_once_and_after_it_was_revoked_never(link, tmp_path):
    keys = site_keys(tmp_path, "north")
    link.register("north", keys.flower)
    link.register("north", keys.flower)
    assert [node.online for node in link.nodes() if node.name == "north"] == [False]
    link.unregister("north")
    assert "north" not in {node.name for node in link.nodes()}
    with pytest.raises(FederationError, match="The key of site north cannot be registered"):
        link.register("north", keys.flower)


def test_a_run_begins_again_after_one_that_nobody_ended(link):
    with link.dispatch() as first:
        assert dict(first.online()) == {}
        with link.dispatch() as second:
            assert dict(second.online()) == {}


def test_a_heartbeat_for_a_task_that_flower_gave_up_disturbs_nobody(link, monkeypatch):
    def client_of(token, address=link._address):
        return records.runtime_client(address, link._secret, token, link._inner.authority.read_bytes())

    taken = []
    monkeypatch.setattr(dispatch, "heartbeat", lambda client: taken.append(client) or records.heartbeat(client))
    with link.dispatch():
        (client,) = taken
        assert records.heartbeat(client).heartbeat_fn()
        assert records.heartbeat(client_of("of no task")).heartbeat_fn()
        with pytest.raises(httpx.HTTPStatusError, match="401"):  # which Flower's own function lets through
            make_task_heartbeat_fn_http(client_of("of no task"))()
        assert not records.heartbeat(client_of("of no task", "127.0.0.1:1")).heartbeat_fn()


def test_a_certificate_that_is_none_is_refused(link, tmp_path):
    make_authority(tmp_path, "a test", 1)
    good = make_certificate(tmp_path, "good", ["127.0.0.1"], 1)
    with pytest.raises(FederationError, match="cannot be used"):
        Link(tmp_path, good, Certificate(tmp_path / "ca.crt", good.key, good.authority), "127.0.0.1", 0)


def flower_key(folder: Path, name: str):
    return load_ssh_private_key((folder / name / "flower.key").read_bytes(), None)


def activation(link, folder: Path, name: str) -> int:
    """The status that a SuperNode with a site's keys gets where it connects; it would end its process itself."""
    key = flower_key(folder, name)
    signing = [
        RuntimeVersionHttpInterceptor(component_name="SuperNode"),
        NodeAuthHttpInterceptor(key, key.public_key()),
    ]
    address, authority = f"127.0.0.1:{link.port}", link._inner.authority.read_bytes()
    request = ActivateNodeRequest(public_key=public_key_to_bytes(key.public_key()), heartbeat_interval=30)
    with FleetHttpClient.from_server_address(address, False, authority, interceptors=signing) as client:
        try:
            client.ActivateNode(request)
        except httpx.HTTPStatusError as error:
            return error.response.status_code
    return 200


def test_a_supernode_that_ends_whenever_it_is_begun_is_begun_less_and_less_often(tmp_path, monkeypatch):
    clock, begun = [0.0], []

    class Ended:
        def poll(self):
            return 1

        def terminate(self):
            return

        def wait(self, seconds=None):
            return

    def start(self):
        begun.append(clock[0])
        self._begun, self._address = clock[0], "127.0.0.1:1"
        return Ended()

    monkeypatch.setattr(inbox.Inbox, "_start", start)
    monkeypatch.setattr(inbox, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    with inbox.Inbox(tmp_path, tmp_path, "127.0.0.1:1", tmp_path) as node:
        while clock[0] < 100:
            assert node.take() is None
            clock[0] += 1
    assert [round(later - sooner) for sooner, later in itertools.pairwise(begun)] == [6, 11, 21, 21, 21]


def test_the_secret_of_a_supernode_is_its_owners_and_is_gone_with_it(tmp_path, monkeypatch):
    begun = []

    class Program:
        def __init__(self, words, **more):
            begun.append((words, more))

        def terminate(self):
            return

        def wait(self, seconds=None):
            return

    monkeypatch.setattr(inbox.subprocess, "Popen", Program)
    with inbox.Inbox(tmp_path, tmp_path / "flower.key", "127.0.0.1:1", tmp_path):
        ((words, more),) = begun
        secret = Path(words[words.index("--superexec-auth-secret-file") + 1])
        assert (secret.parent, secret.stat().st_mode & 0o777, len(secret.read_bytes())) == (tmp_path, 0o600, 32)
        assert more["stdout"].name == str(tmp_path / "supernode.err")
    assert not secret.exists()


def test_a_log_is_of_a_bounded_size_and_keeps_what_was_said_last(tmp_path, monkeypatch):
    monkeypatch.setattr(quiet, "LARGEST_LOG", 10_000)
    (tmp_path / "flower.log").write_text("of an earlier process\n")
    handler, logger = quiet._Log(tmp_path / "flower.log"), logging.Logger("a test")
    logger.addHandler(handler)
    for number in range(1000):
        logger.info("line %d %s", number, "x" * 80)
    handler.close()
    kept = sorted(tmp_path.iterdir())
    assert [path.name for path in kept] == ["flower.log", "flower.log.1"]
    assert all(0 < path.stat().st_size <= 10_000 for path in kept)
    lines = (kept[1].read_text() + kept[0].read_text()).splitlines()
    assert [line.split()[1] for line in lines] == [str(number) for number in range(1000 - len(lines), 1000)]


def test_a_supernode_logs_to_a_file_of_a_bounded_size_what_it_would_say_to_the_terminal():
    # Flower's program gives uvicorn no settings for its log, which takes these then.
    program = inspect.getsource(importlib.import_module("flwr.supernode.cli.flower_supernode"))
    assert "log_config" not in program
    assert inspect.signature(uvicorn.Config).parameters["log_config"].default is uvicorn.config.LOGGING_CONFIG
    assert uvicorn.config.LOGGING_CONFIG["loggers"].keys() <= {"uvicorn", "uvicorn.error", "uvicorn.access"}


class Fleet:
    """A site that speaks with the SuperLink as Flower's SuperNode does."""

    def __init__(self, link, folder, name, host="127.0.0.1"):
        link.register(name, site_keys(folder, name).flower)
        key, authority = flower_key(folder, name), link._inner.authority.read_bytes()
        self._stack = contextlib.ExitStack()
        self._calls = self._stack.enter_context(
            http_request_response(f"{host}:{link.port}", False, authority, (key, key.public_key()))
        )
        self.number = self._calls[0]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._stack.close()

    def looks(self):
        """Look for a message, as a SuperNode does every three seconds."""
        return self._calls[1]()

    def answer(self, push=True, parcel=None):
        """Take a message and answer it with the same parcel or another; or begin to, and push nothing of it."""
        _, receive, send, _, _, pull_object, push_object, confirm = self._calls
        meta, tree = receive()
        run, number = meta.metadata.run_id, meta.metadata.message_id
        parts = pull_objects([one.object_id for one in iterate_object_tree(tree)], lambda one: pull_object(run, one))
        confirm(run, number)
        message = inflate_object_from_contents(number, parts)
        message.metadata.__dict__["_message_id"] = number
        reply = Message(records.record_of(parcel or records.parcel_of(message)), reply_to=message)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        wanted, session = send(reply, get_object_tree(reply), 0.1)
        if push:
            objects = get_all_nested_objects(reply)
            push_objects(objects, lambda one, data: push_object(run, session, one, data), object_ids_to_push=wanted)


def test_an_answer_that_is_never_sent_as_a_whole_holds_up_nobody(link, tmp_path):
    with Fleet(link, tmp_path, "slow") as slow, Fleet(link, tmp_path, "quick") as quick, link.dispatch() as dispatch:
        online = dispatch.online()
        sent = {
            name: dispatch.send(online[name], Parcel(b"h", b"s", name.encode()), 60, MOST) for name in ("slow", "quick")
        }
        slow.answer(push=False)
        begun = time.monotonic()
        assert dispatch.arrived(list(sent.values())) == []  # though Flower tells of an answer
        quick.answer()
        while not (come := dispatch.arrived(list(sent.values()))):
            time.sleep(0.05)
        assert [(one.message, one.parcel.manifest) for one in come] == [(sent["quick"], b"quick")]
        assert time.monotonic() - begun < 60  # Flower itself waits for 180 s


@pytest.mark.integration
def test_a_site_whose_message_a_killed_coordinator_cut_off_hears_the_next_one(link, tmp_path, monkeypatch):
    taken, cut, serve = [], threading.Event(), gate.ForSites.__call__

    async def hold_objects(self, scope, receive, send):
        while scope.get("path") == "/v1/fleet/pull-object" and not cut.is_set():
            taken.append(scope["path"])
            await asyncio.sleep(0.1)
        await serve(self, scope, receive, send)

    def until(come):
        end = time.monotonic() + 200
        while not (found := come()) and time.monotonic() < end:
            time.sleep(0.2)
        return found

    link.register("half", site_keys(tmp_path, "half").flower)
    monkeypatch.setattr(gate.ForSites, "__call__", hold_objects)
    place, authority = tmp_path / "half", link._inner.authority
    with inbox.Inbox(place, place / FLOWER, f"127.0.0.1:{link.port}", authority) as site:
        with link.dispatch() as first:
            node = until(lambda: first.online().get("half"))
            first.send(node, Parcel(b"h", b"s", b"old", bytes(1000)), 600, MOST)
            assert until(lambda: taken)
        with link.dispatch() as second:
            cut.set()
            second.send(node, Parcel(b"h", b"s", b"new", bytes(1000)), 600, MOST)
            assert until(site.take).parcel.manifest == b"new"


def test_a_supernode_waits_as_its_own_program_asks_for_and_not_longer(monkeypatch):
    from flwr.supernode import start_client_internal

    from bellwether.engine.flower import supernode

    source = Path(start_client_internal.__file__).read_text()
    assert re.findall(r"\btime\.(\w.*)", source) == ["sleep(3)", "sleep(0.5)", "sleep(0.5)"]
    waited = []
    monkeypatch.setattr(supernode.time, "sleep", waited.append)
    pauses = supernode.Waits()
    for asked in (*[3] * 40, 0.5, 3):
        pauses.sleep(asked)
    assert waited[0] == waited[-1] == 0.2
    assert waited[:40] == sorted(waited[:40])
    assert waited[39] == 3
    assert sum(waited[:16]) < 20


# Attacks ------------------------------------------------------------------------------------------


def test_an_unknown_key_and_a_second_site_with_a_key_are_refused_and_the_first_goes_on(link, tmp_path):
    site_keys(tmp_path, "stranger")
    assert activation(link, tmp_path, "stranger") == 401
    with Fleet(link, tmp_path, "first") as first, link.dispatch() as dispatch:
        assert activation(link, tmp_path, "first") == 412
        number = dispatch.send(dispatch.online()["first"], Parcel(b"h", b"s", b"m"), 60, MOST)
        first.answer()
        wait_until(lambda: [one.message for one in dispatch.arrived([number])] == [number])


def test_a_site_that_is_revoked_while_it_is_connected_is_heard_no_more(link, tmp_path):
    with Fleet(link, tmp_path, "stays") as stays, link.dispatch() as dispatch:
        link.register("out", site_keys(tmp_path, "out").flower)
        assert activation(link, tmp_path, "out") == 200
        assert {"out", "stays"} <= dispatch.online().keys()
        link.unregister("out")
        assert activation(link, tmp_path, "out") == 401
        assert "out" not in dispatch.online()
        assert stays.looks() is None


def connected(link, source="127.0.0.1"):
    """A connection to the outer port, once TLS is agreed on."""
    known = ssl.create_default_context(cadata=link._inner.authority.read_text())
    plain = socket.create_connection(("127.0.0.1", link.port), timeout=30, source_address=(source, 0))
    try:
        return known.wrap_socket(plain, server_hostname="127.0.0.1")
    except OSError:
        plain.close()
        raise


def ends(connection, drip):
    """Whether the other side hangs up on somebody who sends a byte now and then, and after how many seconds."""
    begun = time.monotonic()
    connection.settimeout(0.1)
    while time.monotonic() - begun < 30:
        try:
            connection.sendall(drip)
            if connection.recv(1000) == b"":
                break
        except TimeoutError:
            continue
        except OSError:
            break
    connection.close()
    return time.monotonic() - begun


@pytest.mark.parametrize(
    "head", ["", "POST /v1/fleet/pull-messages HTTP/1.1\r\nhost: here\r\nx: "], ids=["none", "some"]
)
def test_a_head_that_never_ends_is_hung_up_on(link, tmp_path, monkeypatch, head):
    monkeypatch.setattr(gate, "SLOWEST_HEAD", 0.5)
    with Fleet(link, tmp_path, f"beside {head[:4]}") as other:
        slow = connected(link)
        slow.sendall(head.encode())
        assert 0.5 < ends(slow, b"x" if head else b"") < 10
        assert other.looks() is None


def test_a_second_head_that_never_ends_is_hung_up_on(link, monkeypatch):
    monkeypatch.setattr(gate, "SLOWEST_HEAD", 0.5)
    slow = connected(link)
    slow.sendall(b"GET /v1/fleet/ HTTP/1.1\r\nhost: here\r\n\r\nGET /v1/fl")
    assert 0.5 < ends(slow, b"x") < 10


def test_a_body_that_never_ends_is_hung_up_on(link, tmp_path, monkeypatch):
    monkeypatch.setattr(gate, "SLOWEST_REQUEST", 0.5)
    monkeypatch.setattr(gate, "SLOWEST_HEAD", 0.5)
    link.register("drips", site_keys(tmp_path, "drips").flower)
    lines = ["POST /v1/fleet/push-object HTTP/1.1", "host: here", "content-length: 1000000"]
    lines += [*(f"{name}: {value}" for name, value in signed_head(tmp_path, "drips").items()), "", ""]
    with Fleet(link, tmp_path, "beside a body") as other:
        slow = connected(link)
        slow.sendall("\r\n".join(lines).encode())
        assert 0.5 < ends(slow, b"x") < 10
        assert other.looks() is None


def test_a_body_of_somebody_unknown_is_not_waited_for(link):
    with connected(link) as slow:
        slow.sendall(b"POST /v1/fleet/push-object HTTP/1.1\r\nhost: here\r\ncontent-length: 1000000\r\n\r\n")
        slow.settimeout(10)
        assert slow.recv(1000).startswith(b"HTTP/1.1 401")


def test_a_body_that_a_sites_key_has_not_signed_just_now_is_not_waited_for(link, tmp_path):
    link.register("claimed", site_keys(tmp_path, "claimed").flower)
    site_keys(tmp_path, "stranger")
    own, other = signed_head(tmp_path, "claimed"), signed_head(tmp_path, "stranger")
    key = flower_key(tmp_path, "claimed")

    def at(seconds):
        stamp = (now() + datetime.timedelta(seconds=seconds)).isoformat()
        return {"flwr-timestamp": stamp, "flwr-signature": base64.b64encode(sign_message(key, stamp.encode())).decode()}

    changes = [{"flwr-signature": other["flwr-signature"]}, {"flwr-signature": "x"}, {"flwr-timestamp": "x"}]
    changes += [at(-400), at(60), {"flwr-timestamp": at(-1)["flwr-timestamp"]}]
    for change in changes:
        assert own.keys() >= change.keys()
        with connected(link) as slow:
            lines = ["POST /v1/fleet/push-object HTTP/1.1", "host: here", "content-length: 1000000"]
            lines += [*(f"{name}: {value}" for name, value in {**own, **change}.items()), "", ""]
            slow.sendall("\r\n".join(lines).encode())
            slow.settimeout(10)
            assert slow.recv(1000).startswith(b"HTTP/1.1 401")


def pushed(fleet, link, folder, name, **changes):
    """The status that a site gets for a message that it pushes as an answer to one that it was sent."""
    given = {"reply_to_message_id": "1" * 64, "src_node_id": fleet.number, "dst_node_id": 1, "message_type": "train"}
    about = Metadata(**{"run_id": 1, "message_id": "0" * 64, "ttl": 60, "created_at": time.time(), **given, **changes})
    message = ProtoMessage(metadata=about, error=Error(code=1, reason="x" * 200_000))
    request = PushMessagesRequest(
        node=Node(node_id=fleet.number),
        messages_list=[message],
        message_object_trees=[ObjectTree(object_id=about.message_id)],
    )
    known = ssl.create_default_context(cadata=link._inner.authority.read_text())
    address, content = f"https://127.0.0.1:{link.port}/v1/fleet/push-messages", request.SerializeToString()
    return httpx.post(address, content=content, headers=signed_head(folder, name), verify=known).status_code


def test_a_site_passes_no_message_to_others_and_answers_for_nobody_else(link, tmp_path):
    with Fleet(link, tmp_path, "sender") as sender, Fleet(link, tmp_path, "victim") as victim, link.dispatch() as sent:
        run = sent._identity[1]
        task = {"run_id": run, "reply_to_message_id": "", "src_node_id": 1, "dst_node_id": victim.number}
        assert pushed(sender, link, tmp_path, "sender", **task) == 400
        assert victim.looks() is None
        assert pushed(sender, link, tmp_path, "sender", run_id=run, src_node_id=victim.number) == 400


def test_messages_and_objects_of_a_site_count_together_and_those_of_others_do_not(link, tmp_path):
    link.expect({"floods": 500_000, "beside": 20_000_000})
    with Fleet(link, tmp_path, "floods") as floods, Fleet(link, tmp_path, "beside") as beside, link.dispatch() as sent:
        run = sent._identity[1]
        statuses = [pushed(floods, link, tmp_path, "floods", run_id=run) for _ in range(4)]
        assert statuses == [200, 200, 413, 413]
        body = Parcel(b"h", b"s", b"m", bytes(6_000_000))
        number = sent.send(sent.online()["beside"], body, 60, MOST)
        beside.answer()
        wait_until(lambda: [one.parcel for one in sent.arrived([number])] == [body])
        link.expect({"floods": 500_000})
        assert pushed(floods, link, tmp_path, "floods", run_id=run) == 200


def test_an_answer_that_is_larger_than_it_can_be_is_not_fetched_as_a_whole(link, tmp_path, monkeypatch):
    fetched = []

    def pulling(numbers, pull, most):
        return records.pulled(numbers, lambda number: fetched.append(len(content := pull(number))) or content, most)

    monkeypatch.setattr(dispatch, "pulled", pulling)
    link.expect({"huge": 2**26})
    with Fleet(link, tmp_path, "huge") as huge, link.dispatch() as sent:
        number = sent.send(sent.online()["huge"], Parcel(b"h", b"s", b"m"), 60, 1000)
        huge.answer(parcel=Parcel(b"h", b"s", b"m", b"".join(bytes([one]) * 5_000_000 for one in range(10))))
        come = []
        wait_until(lambda: come.extend(sent.arrived([number])) or come)
        assert (come[0].message, come[0].parcel) == (number, None)
        assert "its answer has more than the 66546 bytes that are taken" in come[0].failure  # 1000 and Flower's shell
        assert sum(fetched) < 40_000_000  # some were on their way at once
        small = sent.send(sent.online()["huge"], Parcel(b"h", b"s", b"m"), 60, 1000)
        huge.answer(parcel=Parcel(b"h", b"s", b"m", bytes(990)))
        wait_until(lambda: [one.failure for one in sent.arrived([small])] == [""])


def test_a_supernode_takes_a_message_up_to_a_size():
    from flwr.supernode import start_client_internal

    from bellwether.engine.flower import supernode

    source = inspect.getsource(start_client_internal)
    assert source.count("pull_objects(") == 1
    assert re.search(r"pull_objects\(\s*obj_ids_to_pull,\s*pull_object_fn=lambda", source)
    contents = {"a": bytes(600), "b": bytes(400)}
    assert supernode.bounded(1000)(list(contents), pull_object_fn=contents.__getitem__) == contents
    with pytest.raises(records.TooLarge):
        supernode.bounded(999)(list(contents), pull_object_fn=contents.__getitem__)


def test_one_address_cannot_take_all_connections(link, monkeypatch):
    monkeypatch.setattr(gate, "MOST_CONNECTIONS", 5)
    held = []
    with contextlib.ExitStack() as stack:
        for _ in range(10):
            with contextlib.suppress(OSError):
                held.append(stack.enter_context(connected(link)))
        assert 1 <= len(held) <= 5  # some are still those of tests before
        with connected(link, source="127.0.0.2") as other:
            other.sendall(b"GET / HTTP/1.1\r\nhost: here\r\n\r\n")
            assert other.recv(1000).startswith(b"HTTP/1.1 404")
    wait_until(lambda: connects(link))  # those that were closed count no more


def connects(link):
    with contextlib.suppress(OSError), connected(link):
        return True
    return False


@pytest.mark.parametrize("lasts", [None, 0.5], ids=["that works", "that cuts what is quiet"])
def test_a_site_works_behind_a_proxy(link, tmp_path, monkeypatch, lasts):
    with proxy(lasts) as (address, through), link.dispatch() as dispatch:
        monkeypatch.setenv("HTTPS_PROXY", address)
        name = f"behind {lasts}"
        with Fleet(link, tmp_path, name, host="localhost") as site:

            def delivered():
                number = dispatch.send(dispatch.online()[name], Parcel(b"h", b"s", b"m", bytes(1000)), 60, MOST)
                time.sleep(2 * (lasts or 0))  # the connection that was kept is cut meanwhile
                with contextlib.suppress(ObjectPushError):  # cut in mid-answer: the coordinator asks again
                    site.answer()
                    wait_until(lambda: [one.failure for one in dispatch.arrived([number])] == [""])
                    return True

            wait_until(delivered)
            wait_until(delivered)
    assert set(through) == {f"localhost:{link.port}"}
    assert len(through) > (2 if lasts else 0)


def test_an_upload_that_is_cut_and_never_repeated_is_told_and_the_site_can_be_asked_again(link, tmp_path, monkeypatch):
    monkeypatch.setattr(sql_corestate, "OBJECT_PUSH_SESSION_TTL_SECONDS", 1)
    with Fleet(link, tmp_path, "cut") as site, link.dispatch() as dispatch:
        parcel = Parcel(b"h", b"s", b"m", b"body")
        number = dispatch.send(dispatch.online()["cut"], parcel, 60, MOST)
        site.answer(push=False)
        come = []
        wait_until(lambda: come.extend(dispatch.arrived([number])) or come)
        assert [(one.message, one.parcel) for one in come] == [(number, None)]
        assert "did not come whole" in come[0].failure
        again = dispatch.send(dispatch.online()["cut"], parcel, 60, MOST)
        monkeypatch.undo()
        site.answer()
        wait_until(lambda: come.extend(dispatch.arrived([again])) or len(come) == 2)
        assert come[1].parcel == parcel


def test_a_coordinator_whose_disk_is_full_says_so_and_that_it_can_go_on(tmp_path, monkeypatch):
    # SQLite says of a database that may have so many pages what it says of a full disk.
    monkeypatch.setattr(sql_mixin, "SQLITE_PRAGMAS", (*sql_mixin.SQLITE_PRAGMAS, ("max_page_count", "400")))
    monkeypatch.setattr(dispatch, "PAUSES", (0.1,))
    make_authority(tmp_path, "a test", 1)
    inner, outer = (make_certificate(tmp_path, stem, ["127.0.0.1"], 1) for stem in ("inner", "outer"))
    link = Link(tmp_path, inner, outer, "127.0.0.1", 0)
    with link, Fleet(link, tmp_path, "north"), link.dispatch() as sending:
        small, large = (Parcel(b"h", b"s", b"m", bytes(size)) for size in (1000, 6_000_000))
        node = sending.online()["north"]
        assert sending.send(node, small, 60, MOST) is not None
        with pytest.raises(FederationError, match="whether the disk is full; finished rounds are kept, and the same"):
            sending.send(node, large, 60, MOST)


def wait_until(holds):
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)
