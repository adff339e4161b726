"""Secrets planted in rows are in nothing that left their site, as it was before encryption, and in nothing kept."""

import base64
import socket
from pathlib import Path

import numpy as np
import pytest
from conftest import write_rows
from forked import Forked, start
from test_rehearsal import finished

pytest.importorskip("flwr")

from transformers import AutoTokenizer

from bellwether.site.ledger import entries

FIELDS = ("partition.client_test_fraction=0.4", "federation.fraction=1", "federation.rounds=2")
FIELDS += (
    "selection.method=hierarchical",
    "selection.min_cluster_rows=2",
    "selection.keep_lone=true",
    "data.test_rows_per_category=1",
)
SECRETS = {
    "north": ("Ottokar Zwrq lives at 17 Lindenhof and takes 83719264 drops", "the password is hrvx-5521-qpl"),
    "south": ("Iban AT611904300234573201 belongs to Wjkq Brixel", "diagnosed with F20.0 on 1999-12-31"),
}


def rows_with(secrets):
    """Rows of which every one holds a secret, in its question, its context or its answer."""
    first, second = secrets
    fields = ("instruction", "context", "response")
    plain = {"instruction": "What is it?", "context": "", "response": "It is that.", "category": "open_qa"}
    told = [{**plain, field: f"{plain[field]} {number}: {first}. {second}"} for number in range(4) for field in fields]
    told += [{**plain, "response": f"{number} {second}"} for number in range(4)]
    # Names of few held-out rows, of categories and of groups, are secrets as well; those of many leave. Of four rows of
    # each name one or two are held out, and of all names together more than five, so that no others join them.
    few = [
        {**one, "category": f"{first} {number // 4}", "language": f"{second.split()[-1]}{number // 4}"}
        for number, one in enumerate(told * 2)
    ]
    many = [{**plain, "instruction": f"What is number {number}?", "language": "common"} for number in range(40)]
    return few + many


def forms(text, tokenizer):
    """Yield a text in every form in which it could have been sent."""
    plain = text.encode()
    yield from (plain, text.encode("utf-16-le"), plain.hex().encode(), plain.hex().upper().encode())
    for offset in range(3):  # where it stands in what was written in base64
        whole = base64.b64encode(b"\0" * offset + plain).rstrip(b"=")
        yield whole[4 if offset else 0 : -2]
    ids = tokenizer.encode(text, add_special_tokens=False)[1:-1]  # the outer ones depend on what stands beside them
    for dtype in ("<u2", "<u4", "<u8", "<f4", ">u2", ">u4"):
        yield np.array(ids[:8], dtype).tobytes()
    for between in (", ", ",", " "):
        yield between.join(map(str, ids[:8])).encode()


def found(secrets, tokenizer, seen):
    """Return what of secrets is in what was seen, by text and form."""
    words = [word for text in secrets for word in (text, *(one for one in text.split() if len(one) >= 8))]
    return [(word, form) for word in words for form in forms(word, tokenizer) if len(form) >= 8 and form in seen]


def listening_coordinator(heard: Path, folder: Path, *words: str) -> Forked:
    """Start a coordinator that writes down all that sites send, before Flower or bellwether reads it."""

    def serve():
        import sys

        from bellwether.cli.main import main
        from bellwether.engine.flower.gate import ForSites

        served = ForSites.__call__

        async def overheard(self, scope, receive, send):
            with heard.open("ab") as file:
                file.write(repr((scope.get("path"), scope.get("query_string"), scope.get("headers"))).encode())

            async def listening():
                message = await receive()
                with heard.open("ab") as file:
                    file.write(message.get("body", b""))
                return message

            await served(self, scope, listening, send)

        ForSites.__call__ = overheard
        sys.argv = ["bellwether", *words]
        main()

    return Forked(serve, folder=folder)


def everything_below(folder: Path) -> bytes:
    return b"\n".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


@pytest.mark.slow
def test_planted_secrets_are_in_nothing_that_leaves_a_site(bellwether, tiny_recipe, tiny_llama, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{one.getsockname()[1]}"
    assert bellwether("federation", "init", tiny_recipe, *FIELDS, "--address", address).code == 0
    for name, secrets in SECRETS.items():
        word = bellwether("site", "keygen", "--folder", name).out.strip()
        assert bellwether("federation", "invite", name, word).code == 0
        write_rows(tmp_path / f"{name}.jsonl", rows_with(secrets))
    heard = tmp_path / "heard"
    words = ("federation", "serve", "--listen", "127.0.0.1", "--quorum", "2", "--deadline", "300")
    coordinator = listening_coordinator(heard, tmp_path, *words)
    own = ("data.columns.group=language", "--model", tiny_llama, "--yes")
    joining = [(f"{name}.invitation", "--data", f"{name}.jsonl", "--folder", name, *own) for name in SECRETS]
    sites = [start("site", "join", *words, folder=tmp_path) for words in joining]
    for process in (coordinator, *sites):
        finished(process)

    seen, trained = heard.read_bytes(), 0
    kept = everything_below(tmp_path / "federation")
    for name, secrets in SECRETS.items():
        sent = [entry for entry in entries(tmp_path / name) if entry.way == "reply"]
        assert {entry.kind for entry in sent} >= {"hello", "survey", "evaluate", "end"}
        trained += sum(entry.kind == "train" for entry in sent)
        # What was overheard is whole: of every answer in the ledger, its very content's hash, and its bytes.
        assert all(entry.content.encode() in seen for entry in sent)
        assert len(seen) > sum(entry.bytes for entry in sent)
        assert found(secrets, tokenizer, (tmp_path / f"{name}.jsonl").read_bytes())  # the search finds what is there
        assert not found(secrets, tokenizer, seen)
        # Names of many rows are where to look.
        assert not [name for name in ("open_qa", "common", "other") if f'"{name}"'.encode() not in seen]
        assert not found(secrets, tokenizer, kept)
        for key in ("flower.key", "signing.key"):
            secret = (tmp_path / name / key).read_bytes()
            core = secret.splitlines()[1] if b"\n" in secret.strip() else secret.strip()
            assert len(core) >= 32
            assert core not in seen + kept
    assert trained
    both = [everything_below(tmp_path / name) for name in SECRETS]
    assert not found(SECRETS["north"], tokenizer, both[1])  # nor at the other site
    assert not found(SECRETS["south"], tokenizer, both[0])
