"""What whoever reaches the page's port can do: ask, and nothing else."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import socket
import threading
import time

import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed; pip install -e '.[ui]'")

from ui_server import JSON, asked, asking, send, serving

from bellwether.ask.talk import Answer, Talk, open_talk

SECRET = "what stands in a file of the server"
FIELDS = json.loads(asked())


@pytest.fixture(scope="module")
def talk(tiny_run):
    return open_talk(tiny_run[0])


@pytest.fixture(scope="module")
def port(talk):
    with serving(talk) as port:
        yield port


def refused(got, status, *words):
    """Check that a request got one sentence, with the headers of every answer."""
    assert got.status == status, got
    assert got.text.count("\n") == 1
    assert got.text.endswith("\n")
    assert 10 <= len(got.text) <= 400
    assert all(word in got.text for word in words), got.text
    headed(got)


def headed(got):
    policy = got.headers["content-security-policy"]
    assert policy == (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    )
    assert got.headers["x-content-type-options"] == "nosniff"
    assert got.headers["referrer-policy"] == "no-referrer"
    assert got.headers["cache-control"] == "no-store"
    assert "access-control-allow-origin" not in got.headers


# What is there ------------------------------------------------------------------------------------


def test_the_page_and_its_parts_are_given(port):
    kinds = {"/": "text/html", "/page.css": "text/css", "/page.js": "text/javascript"}
    for path, kind in kinds.items():
        got = send(port, "GET", path, headers={})
        headed(got)
        assert (got.status, got.headers["content-type"]) == (200, f"{kind}; charset=utf-8")
    page = send(port, "GET", "/", headers={}).text
    assert "<script>" not in page
    assert "<style" not in page
    assert " style=" not in page
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in page


def test_a_question_gets_its_answers_as_events(port, talk):
    got = send(port, "POST", "/ask", asked(who=[1, 0], max_new_tokens=4))
    headed(got)
    assert (got.status, got.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    (first, conversation), *_, (before, answers), (last, lengths) = got.events
    assert (first, before, last) == ("begin", "answers", "end")
    assert [answer["name"] for answer in answers] == ["federated", "base"]
    assert all(length.split()[0] == str(answer["tokens"]) for length, answer in zip(lengths, answers, strict=True))
    (exchange,) = conversation["exchanges"]
    assert exchange["question"] == {"instruction": "Task 1?", "context": "", "reference": ""}
    assert exchange["settings"] == {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 4, "seed": 0}
    assert conversation["base"]["sha256"] == talk.base.fingerprint


def test_a_question_that_the_base_cannot_take_gets_a_sentence(port):
    assert send(port, "POST", "/ask", asked(instruction=" ")).last[0] == "problem"
    assert "nobody is asked" in send(port, "POST", "/ask", asked(who=[])).last[1].lower()


# Files and foreign addresses ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def secret(tmp_path_factory):
    path = tmp_path_factory.mktemp("secret") / "secret.txt"
    path.write_text(SECRET)
    return str(path)


def disguised(path):
    """A path in all the forms in which servers of pages take files."""
    file = {"path": path, "url": path, "orig_name": "a.txt", "meta": {"_type": "gradio.FileData"}}
    return [file, [file], {"value": file}, {"__type__": "update", "value": file}, [[path, file]], {"file": path}]


@pytest.mark.parametrize("field", [*FIELDS, "files", "data"])
def test_a_file_in_place_of_a_value_is_refused_and_never_read(port, secret, field):
    for file in disguised(secret):
        got = send(port, "POST", "/ask", asked(**{field: file}))
        refused(got, 422, field.capitalize())
        assert SECRET not in got.text


def test_no_address_gives_a_file(port, secret):
    paths = [
        f"/gradio_api/file={secret}", f"/file={secret}", f"/gradio_api/stream/{secret}", secret, f"/{secret}",
        f"/..%2f..%2f..%2f..%2f..{secret}", f"/../../../../..{secret}", f"/%2e%2e/%2e%2e{secret}",
        f"/page.css/../../..{secret}", f"/page.css%2f..%2f..{secret}", f"/page/{secret}", f"/?file={secret}",
        "//etc/passwd", "///etc/passwd", "/page.html", "/page/page.js", "/ui.py", "/..%5c..%5cpage.html", "/%00",
        "/page.css%00.txt", "/.", "/docs", "/redoc", "/openapi.json", "/config", "/static/", "/ask/", "/favicon.ico",
        "/gradio_api/info", "/gradio_api/queue/data?session_hash=a", "/gradio_api/upload",
    ]  # fmt: skip
    for path in paths:
        got = send(port, "GET", path, headers={})
        assert SECRET not in got.text
        assert "root:" not in got.text
        if not path.startswith("/?"):
            assert got.status == 404, path
            headed(got)


def test_the_ways_of_the_page_before_are_gone(port, secret):
    file = disguised(secret)[0]
    body = json.dumps(
        {"data": [file], "fn_index": 0, "session_hash": "a", "event_data": None, "trigger_id": 1}
    ).encode()
    for path in ("/gradio_api/queue/join", "/gradio_api/run/predict", "/gradio_api/call/predict", "/gradio_api/upload"):
        assert send(port, "POST", path, body).status == 404


def test_the_server_reaches_out_to_nobody(port):
    with socket.create_server(("127.0.0.1", 0)) as trap:
        address = f"http://127.0.0.1:{trap.getsockname()[1]}/x"
        for field in [*FIELDS, "files"]:
            for file in [*disguised(address), address]:
                send(port, "POST", "/ask", asked(**{field: file}))
        for path in (f"/gradio_api/file={address}", f"/proxy={address}", f"/?file={address}", address):
            send(port, "GET", path, headers={})
        send(port, "GET", "/", headers={"X-Forwarded-Host": address, "Referer": address, "Origin": address})
        trap.settimeout(0.2)
        with pytest.raises(TimeoutError):
            trap.accept()


# Values that no page asks -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("instruction", [None, 1, True, ["a"], {"a": 1}, "a" * 20_001]),
        ("context", [None, 1, [], "a" * 100_001]),
        ("example", [-1, 10_000, "0", 0.0, 1.5, True, [0], 2**70]),
        ("who", [None, 0, "0", ["base"], ["0"], [-1], [2], [0, 0], [0] * 7, [True], [0.5], [None], {"0": 0}, [[0]]]),
        ("temperature", [-0.1, 2.1, "0", True, [0], 10**400]),
        ("top_p", [0, -1, 1.01, "1", False]),
        ("max_new_tokens", [0, -1, 1025, 3.5, "3", True, 10**4000]),
        ("seed", [-1, 2**53, 0.5, "0", False, 10**4000]),
        ("more", [1, None]),
        ("__proto__", [{}]),
    ],
)
def test_values_that_the_page_never_sends_are_refused_in_a_sentence(port, field, values):
    for value in values:
        got = send(port, "POST", "/ask", asked(**{field: value}))
        refused(got, 422)
        assert field in got.text.lower(), got.text


@pytest.mark.parametrize("field", ["temperature", "top_p", "max_new_tokens", "seed"])
def test_an_empty_setting_gets_its_own_sentence(port, field):
    refused(send(port, "POST", "/ask", asked(**{field: None})), 422, "give every one a number")


@pytest.mark.parametrize("field", list(FIELDS))
def test_a_value_that_is_missing_is_refused(port, field):
    body = {name: value for name, value in FIELDS.items() if name != field}
    refused(send(port, "POST", "/ask", json.dumps(body)), 422, field.capitalize())


@pytest.mark.parametrize(
    "body",
    [
        b"", b"null", b"[]", b"1", b'"a"', b"{", b"not JSON", b"\xff\xfe", b'{"instruction": "\xff"}', b"[" * 200_000,
        b'{"a":' * 60_000, asked().replace(b"Task 1?", b"\\ud800"), asked().replace(b'"top_p": 1', b'"top_p": NaN'),
        asked().replace(b'"top_p": 1', b'"top_p": Infinity'), asked().replace(b'"seed": 0', b'"seed": ' + b"9" * 9000),
        b"\xef\xbb\xbf" + asked(), asked() + asked(),
    ],
    ids=lambda body: repr(body[:20]),
)  # fmt: skip
def test_a_body_that_is_no_question_is_refused_in_a_sentence(port, body):
    refused(send(port, "POST", "/ask", body), 422)


@pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data; boundary=a", "application/x-www-form-urlencoded",
                                  "application/jsonp", "text/json, application/json", "", None])  # fmt: skip
def test_questions_of_another_content_type_are_refused(port, kind):
    headers = {} if kind is None else {"Content-Type": kind}
    refused(send(port, "POST", "/ask", asked(), headers), 415, "application/json")


# Bodies that are too large or too slow ------------------------------------------------------------


def test_a_body_that_says_it_is_too_large_is_refused_before_it_comes(port):
    with socket.create_connection(("127.0.0.1", port), timeout=120) as line:
        head = "POST /ask HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 999999999999"
        line.sendall(f"{head}\r\n\r\n".encode())
        assert line.recv(100).startswith(b"HTTP/1.1 413 ")


def test_a_large_body_is_refused_with_its_length(port):
    refused(send(port, "POST", "/ask", asked(context=" " * 600_000)), 413, "524288 bytes")


def test_a_large_body_without_a_length_is_refused_while_it_comes(port):
    with socket.create_connection(("127.0.0.1", port), timeout=120) as line:
        head = "POST /ask HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked"
        line.sendall(f"{head}\r\n\r\n".encode())
        for _ in range(33):
            line.sendall(b"4000\r\n" + b" " * 0x4000 + b"\r\n")
        assert line.recv(100).startswith(b"HTTP/1.1 413 ")


def test_a_question_without_a_length_is_answered(port):
    got = send(port, "POST", "/ask", iter([asked()[:20], asked()[20:]]))
    assert got.last[0] == "end"


def test_a_body_that_does_not_come_is_not_waited_for(port, monkeypatch):
    monkeypatch.setattr("bellwether.ask.ui_app.SLOWEST", 0.1)
    with socket.create_connection(("127.0.0.1", port), timeout=120) as line:
        head = "POST /ask HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100"
        line.sendall(f"{head}\r\n\r\n{{".encode())
        assert line.recv(100).startswith(b"HTTP/1.1 408 ")


# Methods, origins, names --------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND", "POST", "GET"])
def test_other_methods_are_refused(port, method):
    for path in ("/", "/page.css", "/page.js", "/ask"):
        allowed = "POST" if path == "/ask" else "GET"
        if method != allowed:
            got = send(port, method, path)
            assert (got.status, got.headers["allow"]) == (405, allowed), path
            headed(got)


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": ""},
        {"Origin": "http://localhost"},
        {"Origin": "http://localhost:1"},
        {"Origin": "http://localhost.evil.example:PORT"},
        {"Origin": "http://127.0.0.1:PORT"},
        {"Origin": "file://"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "none"},
        {"Origin": "http://localhost:PORT", "Sec-Fetch-Site": "cross-site"},
    ],
    ids=str,
)
def test_questions_of_other_pages_are_refused(port, headers):
    headers = {name: value.replace("PORT", str(port)) for name, value in headers.items()}
    refused(send(port, "POST", "/ask", asked(), JSON | {"Host": f"localhost:{port}"} | headers), 403, "itself alone")


def test_questions_of_the_page_itself_are_answered(port):
    own = {"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}", "Sec-Fetch-Site": "same-origin"}
    assert send(port, "POST", "/ask", asked(), JSON | own).last[0] == "end"
    assert send(port, "OPTIONS", "/ask", headers=own | {"Access-Control-Request-Method": "POST"}).status == 405


@pytest.mark.parametrize("name", ["evil.example", "localhost.evil.example", "192.0.2.7", "0.0.0.0", "@localhost", " "])
def test_foreign_names_get_nothing(port, name):
    for method, path in (("GET", "/"), ("GET", "/page.js"), ("POST", "/ask"), ("GET", "/nothing")):
        refused(send(port, method, path, asked(), JSON | {"Host": name}), 400, "that name")


def test_no_websocket_is_opened(port):
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
               "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="}  # fmt: skip
    found = {path: send(port, "GET", path, headers=upgrade).status for path in ("/", "/ask", "/queue/join", "/ws")}
    assert found == {"/": 200, "/ask": 405, "/queue/join": 404, "/ws": 404}


def test_a_proxys_headers_open_nothing(port):
    forwarded = {"X-Forwarded-For": "127.0.0.1", "X-Forwarded-Host": "localhost", "Forwarded": "host=localhost"}
    refused(send(port, "GET", "/", headers={"Host": "evil.example"} | forwarded), 400)


# The token ----------------------------------------------------------------------------------------

TOKEN = "a-token-that-nobody-guesses-0123456789abcdef"


@pytest.fixture(scope="module")
def guarded(talk):
    """The port of a page for other machines."""
    with serving(talk, host=None, token=TOKEN) as port:
        yield port


def cookie(port):
    """The cookie that the page sets for whoever brings the token."""
    got = send(port, "GET", f"/?token={TOKEN}", headers={})
    assert got.status == 200
    value, *rest = got.headers["set-cookie"].split("; ")
    assert sorted(rest) == ["HttpOnly", "Path=/", "SameSite=Strict"]
    return {"Cookie": value}


def test_without_the_token_every_address_is_closed(guarded):
    ways = [
        ("GET", "/"),
        ("GET", "/page.css"),
        ("GET", "/page.js"),
        ("POST", "/ask"),
        ("GET", "/nothing"),
        ("PUT", "/"),
    ]
    for method, path in ways:
        got = send(guarded, method, path, asked())
        refused(got, 403, "wants its token")
        assert "set-cookie" not in got.headers


@pytest.mark.parametrize("given", ["", "wrong", TOKEN[:-1], f"{TOKEN}x", TOKEN.upper(), "%C3%A9", "%00", f"{TOKEN}%00",
                                   f"{TOKEN}&token=wrong"])  # fmt: skip
def test_a_wrong_token_opens_nothing(guarded, given):
    name = cookie(guarded)["Cookie"].partition("=")[0]
    got = send(guarded, "GET", f"/?token={given}", headers={})
    refused(got, 403, "wants its token")
    assert "set-cookie" not in got.headers
    refused(send(guarded, "POST", "/ask", asked(), JSON | {"Cookie": f"{name}={given}"}), 403, "wants its token")


def test_the_token_counts_where_the_page_is_opened_and_nowhere_else(guarded):
    refused(send(guarded, "POST", f"/ask?token={TOKEN}", asked()), 403)
    refused(send(guarded, "GET", f"/page.js?token={TOKEN}", headers={}), 403)
    refused(send(guarded, "POST", f"/?token={TOKEN}", asked()), 403)
    refused(send(guarded, "GET", "/", headers={"Cookie": f"token={TOKEN}"}), 403)


def test_whoever_brought_the_token_can_do_what_the_page_can(guarded):
    own = cookie(guarded)
    assert {path: send(guarded, "GET", path, headers=own).status for path in ("/", "/page.css", "/page.js", "/x")} == {
        "/": 200, "/page.css": 200, "/page.js": 200, "/x": 404}  # fmt: skip
    for name in ("machine.example", "192.0.2.7:7860"):
        origin = {"Host": name, "Origin": f"http://{name}"}
        assert send(guarded, "POST", "/ask", asked(), JSON | own | origin).last[0] == "end"
    refused(send(guarded, "POST", "/ask", asked(), JSON | own | {"Origin": "http://evil.example"}), 403, "itself alone")


# One question at a time ---------------------------------------------------------------------------


class Slow:
    """Answers that take as long as a test wants, and say what became of them."""

    def __init__(self, size=1):
        self.size = size
        self.begun, self.ended, self.together, self.most = [], [], 0, 0
        self.go_on = threading.Event()

    def answer(self, question, names, _settings):
        self.begun.append(question.instruction)
        self.together += 1
        self.most = max(self.most, self.together)
        try:
            for tokens in itertools.count(1):
                yield [Answer(name, "x" * self.size, tokens) for name in names]
                if self.go_on.wait(0.01):
                    return
        finally:
            self.together -= 1
            self.ended.append(question.instruction)


@pytest.fixture
def slow(monkeypatch):
    slow = Slow()
    monkeypatch.setattr(Talk, "answer", slow.answer)
    yield slow
    slow.go_on.set()


def until(condition, what, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def test_a_tab_that_is_closed_stops_its_answers(port, slow):
    with asking(port, instruction="left") as answer:
        assert answer.readline() == b"HTTP/1.1 200 OK\r\n"
        until(lambda: slow.begun == ["left"], "it does not begin")
    until(lambda: slow.ended == ["left"], "it goes on for nobody")


def test_questions_wait_for_each_other_and_are_told_so(port, slow):
    with asking(port, instruction="first"), asking(port, instruction="second") as second:
        until(lambda: slow.begun == ["first"], "the first does not begin")
        while not (line := second.readline()).startswith(b"event: "):
            assert line
        assert (line, second.readline()) == (b"event: waiting\n", b"data: 1\n")
        slow.go_on.set()
        until(lambda: slow.ended == ["first", "second"], "the second is not answered")
    assert slow.most == 1


def test_too_many_questions_are_refused_and_one_that_left_makes_room(port, slow):
    with contextlib.ExitStack() as all_of_them:
        all_of_them.enter_context(asking(port, instruction="0"))
        until(lambda: slow.begun == ["0"], "it does not begin")
        with asking(port, instruction="leaves") as leaves:
            assert leaves.readline() == b"HTTP/1.1 200 OK\r\n"
            for number in range(1, 4):
                line = all_of_them.enter_context(asking(port, instruction=str(number)))
                assert line.readline() == b"HTTP/1.1 200 OK\r\n"
            refused(send(port, "POST", "/ask", asked()), 503, "wait already")
        late = functools.partial(asking, port, instruction="late")
        until(lambda: b" 200 " in all_of_them.enter_context(late()).readline(), "who left makes no room")
        slow.go_on.set()
        until(lambda: len(slow.ended) == 5, "those who wait are not answered")
    assert slow.ended == ["0", "1", "2", "3", "late"], "who left was answered, or others not"


def test_a_tab_that_does_not_read_holds_up_nobody(port, slow):
    slow.size = 1_000_000
    with asking(port, instruction="deaf"):
        until(lambda: slow.begun == ["deaf"], "it does not begin")
        time.sleep(0.2)  # until all buffers on the way are full
        slow.go_on.set()
        slow.size = 1
        assert send(port, "POST", "/ask", asked(instruction="next")).last[0] == "end"


def test_the_server_ends_while_it_answers(talk, slow):
    server = serving(talk)
    with asking(server.__enter__(), instruction="open") as answer:
        assert answer.readline() == b"HTTP/1.1 200 OK\r\n"
        until(lambda: slow.begun == ["open"], "it does not begin")
        server.__exit__(None, None, None)
    assert slow.ended == ["open"]


def test_errors_that_nobody_foresaw_are_told_to_who_serves_and_to_nobody_else(port, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("a detail")

    monkeypatch.setattr(Talk, "answer", fail)
    with caplog.at_level(logging.ERROR):
        got = send(port, "POST", "/ask", asked())
    ((kind, text),) = got.events
    assert (kind, "a detail" in text, "terminal" in text) == ("problem", False, True)
    assert "a detail" in caplog.text
    monkeypatch.undo()
    assert send(port, "POST", "/ask", asked()).last[0] == "end"


def test_odd_names_and_texts_stand_on_the_page_as_texts(talk):
    evil = "\"><script>alert(1)</script>\udcff\u202e'"
    federated = dataclasses.replace(talk.answerers["federated"], name=evil)
    odd = dataclasses.replace(
        talk,
        answerers={"base": talk.answerers["base"], evil: federated},
        templates={"base": talk.templates["base"], evil: talk.templates["federated"]},
        notes=[evil],
    )
    with serving(odd) as port:
        page = send(port, "GET", "/", headers={}).text
        assert "<script>" not in page
        assert page.count("&#34;&gt;&lt;script&gt;") == 2
        assert "\u202e" not in page
        assert send(port, "POST", "/ask", asked(who=[1])).last[0] == "end"
