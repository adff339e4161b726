"""What a site does with what its coordinator sends it: invitations, terms, results, and the recipe's own fields."""

import contextlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import yaml
from conftest import dolly_rows, write_rows

pytest.importorskip("flwr")

from bellwether.errors import FederationError

FIELDS = ("data.test_rows_per_category=10", "federation.fraction=1")
CATEGORIES = ("open_qa", "closed_qa")


@pytest.fixture
def invited(bellwether, tiny_recipe, tiny_llama, tmp_path):
    """Return what invites the site ``north`` to a federation of the tiny recipe with some fields."""
    (tmp_path / tiny_llama.name).symlink_to(tiny_llama)

    def invite(*fields, folder="federation"):
        address = ("--address", "127.0.0.1:9", "--folder", folder)
        done = bellwether("federation", "init", tiny_recipe, *FIELDS, *fields, *address)
        assert done.code == 0, done.err
        if not Path("north").exists():
            assert bellwether("site", "keygen", "--folder", "north").code == 0
            write_rows(tmp_path / "north.jsonl", dolly_rows(CATEGORIES, 6))
        word = public_word()
        Path("north.invitation").unlink(missing_ok=True)
        done = bellwether("federation", "invite", "north", word, "--folder", folder, "--out", "north.invitation")
        assert done.code == 0, done.err
        return json.loads(Path("north.invitation").read_text())

    return invite


def public_word():
    from bellwether.site.keys import public_word as word

    return word(Path("north"))


def change(edit=lambda recipe: None, **fields):
    """Write the invitation anew with another recipe and other fields, as a hostile coordinator could."""
    path = Path("north.invitation")
    invitation = json.loads(path.read_text())
    recipe = yaml.safe_load(invitation["recipe"])
    edit(recipe)
    path.write_text(json.dumps({**invitation, "recipe": yaml.safe_dump(recipe), **fields}))


def join(bellwether, *words, data="north.jsonl"):
    return bellwether("site", "join", "north.invitation", "--data", data, "--folder", "north", "--yes", *words)


def refused(outcome, sentence):
    assert outcome.code == 2, outcome.out + outcome.err
    assert sentence in outcome.err
    assert "Traceback" not in outcome.err


@contextlib.contextmanager
def taking_part():
    """Let a site go as far as its tasks, of which none come; yields the residents that would answer them."""
    residents = []
    with (
        mock.patch("bellwether.site.joining._wait_for_coordinator"),
        mock.patch("bellwether.site.joining.Inbox"),
        mock.patch("bellwether.site.joining.make_page", return_value=Path("north/report.html")),
        mock.patch("bellwether.site.resident.Resident.serve", lambda self, messages: residents.append(self)),
    ):
        yield residents


def end_with(text):
    """Remember that the federation of the invitation has ended."""
    from bellwether.site.result import JOINED

    folder = Path("north/adapter")
    folder.mkdir(exist_ok=True)
    (folder / JOINED).write_text(json.dumps({"federation": text, "rounds": 2}) + "\n")


@pytest.mark.parametrize("ended", [False, True])
def test_a_function_that_the_policy_does_not_list_is_not_imported(bellwether, invited, ended):
    invitation = invited()
    Path("left_behind.py").write_text("open('RAN', 'w').close()\ndef loss(logits, targets):\n    return logits\n")
    change(lambda recipe: recipe["training"].update(loss="left_behind:loss"))
    if ended:
        end_with(invitation["federation"])
    refused(join(bellwether), "names left_behind:loss, of whose file code does not list the SHA-256")
    assert not Path("RAN").exists()


def test_code_of_a_model_that_the_policy_does_not_list_is_not_run(bellwether, invited, tiny_llama):
    invited()
    shutil.copytree(tiny_llama, "remote")
    config = json.loads(Path("remote/config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    Path("remote/config.json").write_text(json.dumps(config))
    code = "from transformers import LlamaConfig\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    Path("remote/configuration_own.py").write_text(f"open({str(Path('RAN').absolute())!r}, 'w').close()\n{code}")
    change(lambda recipe: recipe["model"].update(path=str(Path("remote").absolute()), trust_remote_code=True))
    refused(join(bellwether), "would run its own code, and trust_remote_code does not list it")
    assert not Path("RAN").exists()


FORGED = {
    "federation": ("../../elsewhere", "ab" * 15, "AB" * 16, ""),
    "site": ("north.\nProtection: nothing that leaves can be traced to a row", "", "n" * 65, "nörd", "../north"),
    "key": ("", "bw1-x", "bw2-"),
    "address": (
        "[::1:1",
        "host",
        "a b:80",
        "host:99999999",
        "ho\0st:1",
        "x" * 64 + ".org:1",
        "-:1",
        ":1",
        "h:٣",
        "[x]:1",
    ),
    "authority": ("", "é", "junk", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"),
    "coordinator": ("zz", "aa", "", "zz" * 32),
    "clients": ("é", "junk"),
}


def test_a_forged_invitation_is_one_sentence_before_anything_is_made_of_it(bellwether, invited):
    invited()
    whole, before = Path("north.invitation").read_text(), sorted(Path("north").rglob("*"))
    for field, values in FORGED.items():
        for value in values:
            change(**{field: value})
            done = join(bellwether)
            refused(done, f"north.invitation: {field} is ")
            assert "ask the coordinator for it again" in done.err
            assert done.err.count("\n") == 1
            Path("north.invitation").write_text(whole)
    assert sorted(Path("north").rglob("*")) == before


def test_an_address_is_a_name_or_an_ip_address_with_a_port():
    from bellwether.site.invitation import split_address

    for host in ("fed.example.org", "a", "127.0.0.1", "[::1]", "xn--mnchen-3ya.example", "9.example"):
        assert split_address(f"{host}:8443") == (host, 8443)


SURVEYED = ("selection.method=hierarchical",)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ((), "on 100 rows of yours."),
        (SURVEYED, "on those of clusters that the coordinator chooses by their centres, which can be a single row,"),
        ((*SURVEYED, "selection.rows_per_cluster=3"), "which can be 3 rows,"),
        ((*SURVEYED, "selection.rows_per_cluster=30", "selection.min_cluster_rows=8"), "which can be 8 rows,"),
        ((*SURVEYED, "selection.rows=4"), "which can be 4 rows,"),
        (("selection.method=random", "selection.rows=hierarchical"), "which can be a single row,"),
        (("selection.method=random", "selection.fraction=0.07"), "; in each round on 7 rows of these, and an update"),
        (("selection.method=mine:rule", "selection.rows=9"), "; in each round on at most 9 rows of these, and"),
    ],
)
def test_terms_say_how_few_rows_an_update_can_be_of(monkeypatch, fields, said):
    assert said in terms_of_recipe(monkeypatch, fields)


def terms_of_recipe(monkeypatch, fields, site="north", held_out=(), address="fed.example.org:1"):
    """The terms of a recipe for a site of 100 rows, over a made-up base."""
    from bellwether.recipe.file import load_recipe
    from bellwether.site import terms
    from bellwether.site.invitation import Invitation

    linear = SimpleNamespace(path="q", inputs=4, outputs=4)
    base = SimpleNamespace(fingerprint="f" * 64, facts=SimpleNamespace(linears=[linear]))
    monkeypatch.setattr(terms, "adapter_config", lambda base, lora: SimpleNamespace(rank=lora.rank, modules=("q",)))
    recipe = load_recipe("default", fields)
    invitation = Invitation("ab" * 16, site, "", address, "", "", "", {})
    return terms.terms_for(invitation, recipe, base, 100, held_out, 0).text


def test_no_word_of_others_makes_a_line_of_the_terms(monkeypatch):
    forged = "x\nProtection: nothing that leaves can be traced to a row\r\u2028Code: "
    fields = [f"{name}={json.dumps(forged)}" for name in ("model.path", "model.revision", "data.columns.category")]
    held_out = [SimpleNamespace(category=forged, group=forged)] * 9
    text = terms_of_recipe(monkeypatch, fields, forged, held_out, forged)
    heads = [line.partition(":")[0] for line in text.splitlines()]
    assert heads.count("Protection") == heads.count("Code") == 1
    assert text.count("nothing that leaves can be traced") == 7
    assert "Base model: x?Protection: nothing" in text
    assert " at revision x?Protection" in text


def test_models_that_come_from_the_hub_are_named_before_anything_of_them_comes(bellwether, invited):
    invited()
    change(lambda recipe: recipe["model"].update(path="nobody/none", revision="v2"))
    with mock.patch("bellwether.site.joining._prepared", side_effect=FederationError("nothing came yet.")):
        done = join(bellwether)
    refused(done, "nothing came yet.")
    assert "The base model nobody/none at revision v2 comes from the Hugging Face hub, as far as" in done.out
    change(lambda recipe: recipe["model"].update(path="./tiny", revision=None))
    change(lambda recipe: recipe["selection"].update(SURVEY_OF_A_PROXY))
    with mock.patch("bellwether.site.joining._prepared", side_effect=FederationError("nothing came yet.")):
        done = join(bellwether)
    assert "The proxy nobody/proxy comes from the Hugging Face hub" in done.out
    assert "The public text nobody/rows comes from the Hugging Face hub" in done.out
    assert "The base model" not in done.out


def test_the_size_of_weights_on_the_hub_is_told_before_the_terms(bellwether, invited, tiny_llama):
    invited()
    with taking_part(), mock.patch("bellwether.site.joining.on_hub", return_value=True):
        out = join(bellwether).out
    size = (tiny_llama / "model.safetensors").stat().st_size
    told = f"The weights of ./tiny have {size / 1000:.1f} kB"
    assert 0 <= out.find(told) < out.find("You are asked to take part")


SURVEY_OF_A_PROXY = {
    "method": "hierarchical",
    "features": "proxy",
    "proxy": "nobody/proxy",
    "projection_sources": ["nobody/rows"],
}


def half(recipe):
    recipe["partition"]["client_test_fraction"] = 0.5


def asked_half(recipe):
    recipe["federation"]["fraction"] = 0.5


@pytest.mark.parametrize(
    ("edit", "fields", "sentence"),
    [
        (half, {}, "sums of scores on 6 rows that you hold out of these"),
        (asked_half, {}, "you are asked in about 50% of them."),
        (lambda recipe: None, {"address": "other.example:1"}, "at other.example:1 as north"),
    ],
)
def test_whatever_the_terms_say_otherwise_is_asked_about_anew(bellwether, invited, edit, fields, sentence):
    invited()
    with taking_part() as residents:
        assert "These terms are agreed to" in join(bellwether).out
        again = join(bellwether)
        assert "What leaves this machine" not in again.out
        change(edit, **fields)
        words = ("site", "join", "north.invitation", "--data", "north.jsonl", "--folder", "north")
        done = bellwether(*words)
        refused(done, "Nobody is there to agree to these terms")
        assert len(residents) == 2
        done = join(bellwether)
        assert sentence in done.out
        assert "These are other terms than those that were agreed to on 2" in done.out
        assert "These terms are agreed to" in done.out
        assert len(residents) == 3


def test_each_federation_of_a_folder_has_terms_of_its_own(bellwether, invited):
    pages = []
    invitations = {}
    for name in ("first", "second"):
        invited(folder=name)
        invitations[name] = Path("north.invitation").read_text()
    with taking_part(), mock.patch("bellwether.site.joining.make_page") as made:
        made.side_effect = lambda invited, folder, prepared, terms, *more: pages.append(terms) or Path("page")
        said = []
        for name in ("first", "second", "first"):
            Path("north.invitation").write_text(invitations[name])
            said.append(join(bellwether).out)
    assert ["These terms are agreed to" in one for one in said] == [True, True, False]
    assert "other terms than those" not in "".join(said)
    assert pages[0] == pages[2] != pages[1]
    for name, page in zip(invitations, pages, strict=False):
        assert json.loads(invitations[name])["federation"][:12] in page


def test_a_site_whose_own_rows_have_grown_is_asked_anew(bellwether, invited):
    invited()
    with taking_part():
        join(bellwether)
        write_rows(Path("north.jsonl"), dolly_rows(CATEGORIES, 7))
        assert "on 14 rows of yours" in join(bellwether).out


COLUMNS = [
    {"columns": {"category": "response"}},
    {"columns": {"group": "instruction", "instruction": "response"}},
    {"source_columns": [{"source": "north.jsonl", "category": "response"}]},
    {"encoding": "utf-16"},
    {"delimiter": "x", "split": "test", "config": "x", "revision": "x", "skip_bad_rows": True},
    {"unseen_categories": ["open_qa"], "max_rows": 3},
]


def test_an_invitation_does_not_say_how_the_sites_files_are_read_nor_which_of_its_rows_are_taken(bellwether, invited):
    invited("partition.client_test_fraction=0.5")
    write_rows(Path("north.jsonl"), dolly_rows(CATEGORIES, 12))
    with taking_part() as residents:
        done = join(bellwether)
        # By hand: half of 12 rows of each category are held out, so both have at least 5 there.
        assert (
            "sums of scores on 12 rows that you hold out of these, at each evaluation, and for each of their "
            "categories (of column category) and groups (of column language or domain), by name where they have at "
            "least 5 rows: closed_qa, open_qa"
        ) in done.out
        for data in COLUMNS:
            change(lambda recipe, data=data: recipe["data"].update(data))
            assert "What leaves this machine" not in join(bellwether).out
        change(lambda recipe: recipe["partition"].update(rows_per_client=[1, 1]))
        assert "What leaves this machine" not in join(bellwether).out
    assert len(residents) == len(COLUMNS) + 2
    for resident in residents:
        engine = resident._holdings.engine
        assert {row.category for row in engine._held_out["north"]} == set(CATEGORIES)
        assert {row.group for row in engine._held_out["north"]} == {""}
        assert len(engine._rows["north"]) == 12


def test_terms_name_the_columns_and_the_names_that_leave(bellwether, invited):
    invited("partition.client_test_fraction=0.5")
    rows = [{**row, "ward": f"W{number % 2}", "who": f"N{number}"} for number, row in enumerate(dolly_rows(("x",), 20))]
    write_rows(Path("north.jsonl"), rows)
    with taking_part():
        done = join(bellwether, "data.columns.category=who", "data.columns.group=ward")
        assert "(of column who) and groups (of column ward), by name where they have at least 5 rows: W" in done.out
        assert "N1" not in done.out
        done = join(bellwether, "data.columns.category=who", "data.columns.group=''")
        assert "groups (of no column), without their names, since too few rows share one" in done.out


def test_a_site_trains_at_the_rank_that_the_recipe_gives_to_it(bellwether, invited):
    invited("method.name=flexlora", "lora.rank=4", "lora.ranks={north: 2, south: 4}")
    with taking_part() as residents:
        done = join(bellwether)
    assert done.code == 0, done.err
    # By hand: rank 2; q and v are 16 x 16 in one layer, so 2 x 2 x (16 + 16) numbers.
    assert "a LoRA adapter of 128 numbers" in done.out
    (resident,) = residents
    assert resident._holdings.config.rank == 2


def test_a_site_that_the_ranks_do_not_name_has_the_servers(bellwether, invited):
    invited("method.name=flexlora", "lora.rank=4", "lora.ranks={south: 2}")
    with taking_part() as residents:
        assert join(bellwether).code == 0
    assert residents[0]._holdings.config.rank == 4


def test_trackers_and_samplers_are_the_coordinators_and_keep_no_site_away(bellwether, invited):
    invited()
    # As a coordinator who has them would invite: no site has wandb's keys or the sampler's file.
    change(lambda recipe: recipe["output"].update(trackers=["wandb"]))
    with taking_part() as residents:
        done = join(bellwether)
        assert done.code == 0, done.err
        change(lambda recipe: recipe["federation"].update(sampler="not_here:pick"))
        done = join(bellwether)
        assert done.code == 0, done.err
    assert len(residents) == 2


def result_of(holdings, change=lambda config: config, dtype="float32", fill=0.5, lacks="", **about):
    """Return the end's two parts, as a coordinator would make them of an adapter for a site's modules."""
    import numpy as np

    from bellwether.exchange.adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter, adapter_files, key_a, key_b

    config, tensors = change(holdings.config), {}
    for module in config.modules:
        inputs, outputs = holdings.shapes.get(module, (16, 16))
        tensors[key_a(module)] = np.full((config.rank, inputs), fill, dtype)
        tensors[key_b(module)] = np.full((outputs, config.rank), fill, dtype)
    files = adapter_files(Adapter(config, tensors))
    said = {"card": "# A card\n", "config": files[CONFIG_FILE].decode(), "rounds": 2, **about}
    said.pop(lacks, None)
    return json.dumps(said).encode(), files[WEIGHTS_FILE]


def changed(**fields):
    from dataclasses import replace

    return {"change": lambda config: replace(config, **fields)}


BAD_RESULTS = {
    "no card": ({"lacks": "card"}, "card is missing"),
    "a card that is no text": ({"card": 7}, "card is 7, not a text"),
    "a card of half a character": ({"card": "\ud800"}, "surrogates not allowed"),
    "rounds that are no number": ({"rounds": "all"}, "rounds is 'all', input should be a valid integer"),
    "no configuration": ({"config": "{}"}, "cannot be read"),
    "another rank": (changed(rank=1, alpha=1.0), "the result has rank 1"),
    "another scaling": (changed(alpha=4000.0), "and scaling 2000"),
    "other modules": (changed(modules=("lm_head",), target_modules=()), "for other modules"),
    "half precision": ({"dtype": "float16"}, "is float16, not float32"),
    "not finite": ({"fill": float("nan")}, "holds something else than finite floats"),
}


def test_a_result_that_is_no_adapter_as_agreed_is_refused_before_anything_is_written(bellwether, invited):
    from bellwether.errors import UpdateRejected
    from bellwether.exchange.adapter import read_adapter
    from bellwether.site.result import has_ended

    invitation = invited()
    with taking_part() as residents:
        assert join(bellwether).code == 0
    (resident,) = residents
    holdings = resident._holdings
    raw = {"{}": (b"{}", b""), "[]": (b"[]", b""), "junk": (b"\xff", b"junk")}
    raw["junk as values"] = (result_of(holdings)[0], b"junk")
    raw |= {name: result_of(holdings, **case) for name, (case, _) in BAD_RESULTS.items()}
    for name, (about, values) in raw.items():
        with pytest.raises(UpdateRejected) as refusal:
            resident._keep(about, values)
        assert BAD_RESULTS.get(name, ("", "cannot be read"))[1] in str(refusal.value), name
        assert "\n" not in str(refusal.value)
        assert not Path("north/adapter").exists(), name
    assert not has_ended(Path("north"), invitation["federation"])
    about, values = result_of(holdings, **changed(base_model="/of/the/coordinator", dropout=0.9))
    resident._keep(about, values)
    kept = read_adapter(Path("north/adapter"))
    assert kept.config.base_model == holdings.config.base_model
    assert kept.config.dropout == holdings.config.dropout
    assert all((value == 0.5).all() for value in kept.tensors.values())
    assert has_ended(Path("north"), invitation["federation"])


def test_the_result_of_another_federation_is_not_replaced(bellwether, invited):
    from bellwether.site.result import check_result_of

    invitation = invited()
    end_with("another")
    refused(join(bellwether), "north has the result of the federation another, which would be replaced")
    end_with(invitation["federation"])
    check_result_of(Path("north"), invitation["federation"])  # its own may be there


def test_what_a_client_keeps_belongs_to_one_federation(bellwether, invited):
    folders = []
    for name in ("first", "second"):
        invitation = invited(folder=name)
        with taking_part() as residents:
            assert join(bellwether).code == 0
        (folder,) = residents[0]._holdings.engine._folders.values()
        assert folder == Path("north/clients") / invitation["federation"][:12] / "north"
        folders.append(folder)
    assert folders[0] != folders[1]


def trained_in_two_rounds(federation):
    from bellwether.site.ledger import LEDGER, Entry
    from bellwether.tools.journal import append

    for round in (1, 2):
        for way in ("task", "reply"):
            entry = Entry("2026-01-01T00:00:00", way, "train", f"{federation}/run", round, "north", f"{round}", 9, "0")
            append(Path("north") / LEDGER, entry)


def test_a_page_is_of_the_rows_that_were_trained_on(bellwether, invited):
    invitation = invited()
    rows = dolly_rows(CATEGORIES, 6)
    with taking_part() as residents:
        assert join(bellwether).code == 0
    trained_in_two_rounds(invitation["federation"])
    residents[0]._keep(*result_of(residents[0]._holdings))
    write_rows(Path("part.jsonl"), rows[1::2])
    write_rows(Path("seen.jsonl"), [*rows[:2], {**rows[0], "instruction": "New?"}])
    done = join(bellwether, "--test", "seen.jsonl", data="part.jsonl")
    refused(done, "--data names other rows than those that were trained on in this federation (0 rows more and 6 rows")
    assert not Path("north/report.html").exists()
    # The same rows in another order and file are the same rows.
    write_rows(Path("turned.jsonl"), rows[::-1])
    done = join(bellwether, "--test", "seen.jsonl", data="turned.jsonl")
    assert done.code == 0, done.err
    page = Path("north/report.html").read_text()
    assert "2 of 3 held-out rows stand among the rows that were trained on as well" in page


def test_rows_that_were_trained_on_before_the_files_changed_are_remembered(bellwether, invited):
    invitation = invited()
    rows = dolly_rows(CATEGORIES, 6)
    write_rows(Path("other.jsonl"), rows[4:])
    with taking_part() as residents:
        assert join(bellwether, data="other.jsonl").code == 0
        assert "has trained on" not in join(bellwether).out  # no round has come yet
        trained_in_two_rounds(invitation["federation"])
        done = join(bellwether, data="other.jsonl")
        assert "This site has trained on 4 other rows before" in done.out
    residents[-1]._keep(*result_of(residents[-1]._holdings))
    write_rows(Path("seen.jsonl"), rows[:3])
    done = join(bellwether, "--test", "seen.jsonl", data="other.jsonl")
    assert done.code == 0, done.err
    page = Path("north/report.html").read_text()
    assert "3 of 3 held-out rows stand among the rows that were trained on as well" in page
    assert "what this site learnt of 4 rows it has no more" in page


def test_twins_of_trained_rows_among_those_that_a_client_holds_out_are_told(bellwether, invited):
    invitation = invited("partition.client_test_fraction=0.3")
    write_rows(Path("north.jsonl"), dolly_rows(CATEGORIES, 1) * 10)
    with taking_part() as residents:
        assert join(bellwether).code == 0
    trained_in_two_rounds(invitation["federation"])
    residents[0]._keep(*result_of(residents[0]._holdings))
    assert join(bellwether).code == 0
    # By hand: 6 of 20 are held out, of two that stand ten times each.
    assert "6 of 6 held-out rows stand among the rows that were trained on" in Path("north/report.html").read_text()
