"""What a site has once its federation ended: a comparison on its own held-out rows, its page, and fields of its own."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import dolly_rows, json_lines, write_rows

pytest.importorskip("flwr")

FIELDS = ("data.test_rows_per_category=10", "federation.fraction=1")
CATEGORIES = ("open_qa", "closed_qa")
HELD_OUT = [
    {"instruction": f"Held {number}?", "context": "", "response": f"open {number}", "category": CATEGORIES[number % 2]}
    for number in range(6)
]

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


@pytest.fixture
def invited(bellwether, tiny_recipe, tiny_llama, tmp_path):
    """Return what invites the site ``north`` to a federation of the tiny recipe with some fields."""
    (tmp_path / tiny_llama.name).symlink_to(tiny_llama)

    def invite(*fields):
        done = bellwether("federation", "init", tiny_recipe, *FIELDS, *fields, "--address", "127.0.0.1:9")
        assert done.code == 0, done.err
        word = bellwether("site", "keygen", "--folder", "north").out.strip()
        assert bellwether("federation", "invite", "north", word).code == 0
        write_rows(tmp_path / "north.jsonl", dolly_rows(CATEGORIES, 6))
        write_rows(tmp_path / "held-out.jsonl", HELD_OUT)
        return json.loads((tmp_path / "north.invitation").read_text())

    return invite


def ended(invitation, run, rounds=(1, 2), trained=None, counted=None):
    """Leave with the site what a federation leaves: adapter, terms that were agreed to, ledger, and trained rows."""
    from bellwether.data.rows import Row
    from bellwether.exchange.adapter import key_a, key_b, read_adapter
    from bellwether.site.ledger import LEDGER, Entry
    from bellwether.site.result import keep_result
    from bellwether.site.trained import kept_for, note_trained
    from bellwether.tools.journal import append

    folder, federation = Path("north"), invitation["federation"]
    about = {"card": "# A card\n", "config": (run / "adapter" / "adapter_config.json").read_text()}
    about["rounds"] = len(rounds) if counted is None else counted
    weights = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    adapter = read_adapter(run / "adapter")
    sizes = {key: value.shape for key, value in adapter.tensors.items()}
    shapes = {module: (sizes[key_a(module)][1], sizes[key_b(module)][0]) for module in adapter.config.modules}
    keep_result(folder, federation, json.dumps(about).encode(), weights, adapter.config, shapes)
    trained = dolly_rows(CATEGORIES, 6) if trained is None else trained
    note_trained(folder, federation, [Row(**one) for one in trained])
    agreed = kept_for(folder, federation) / "consent.json"
    agreed.write_text(json.dumps({"terms": "0", "text": "Terms, as agreed to <here>."}) + "\n")

    def message(way, kind, round, size, federation=federation, failure=""):
        entry = Entry("2026-01-01T00:00:00", way, kind, f"{federation}/run", round, "north", f"{round}", size, "0")
        append(folder / LEDGER, Entry(**{**vars(entry), "failure": failure}))

    message("reply", "hello", 0, 100)
    for round in rounds:
        message("task", "train", round, 5000)
        message("reply", "train", round, 3000)
    message("reply", "train", 3, 50, failure="the policy of this site forbids it")
    message("reply", "train", 4, 7000, federation="another")


def join(bellwether, *words):
    return bellwether("site", "join", "north.invitation", "--data", "north.jsonl", "--folder", "north", "--yes", *words)


def outcomes(folder, seed=0):
    return json.loads((Path(folder) / f"seed-{seed}" / "outcomes.json").read_text())[0]


def test_a_site_compares_as_a_comparison_of_its_rows_alone_does(bellwether, invited, tiny_run, tiny_recipe):
    run, _ = tiny_run
    ended(invited(), run)
    done = join(bellwether, "--test", "held-out.jsonl")
    assert done.code == 0, done.err
    assert "with 2 passes over its rows, as in its 2 rounds of the federation" in done.out
    arms = "{base: {trains: nobody}, alone: {trains: together, passes: 2}}"
    rows = ("data.sources=[north.jsonl]", "data.test_sources=[held-out.jsonl]", "partition.clients=1")
    other = bellwether("compare", tiny_recipe, *rows, f"compare={{seeds: [0], arms: {arms}}}", "--out", "compared")
    assert other.code == 0, other.err
    for arm in ("base", "alone"):
        mine, theirs = (outcomes(Path(place) / arm) for place in ("north/comparison", "compared"))
        assert mine["totals"] == theirs["totals"]
        assert mine["answers"] == theirs["answers"]
    assert outcomes("north/comparison/alone")["totals"] != outcomes("north/comparison/base")["totals"]


@pytest.mark.parametrize(("counted", "passes"), [(1, "1 pass"), (99, "2 passes")])
def test_a_site_tunes_alone_for_as_many_rounds_as_counted_and_for_no_more_than_it_trained(
    bellwether, invited, tiny_run, counted, passes
):
    ended(invited(), tiny_run[0], counted=counted)
    done = join(bellwether, "--test", "held-out.jsonl")
    assert done.code == 0, done.err
    assert f"with {passes} over its rows, as in its " in done.out


def test_the_federations_loss_on_the_sites_rows_is_that_of_peft(bellwether, invited, tiny_run, tiny_llama):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, _ = tiny_run
    ended(invited(), run)
    assert join(bellwether, "--test", "held-out.jsonl").code == 0
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), "north/adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    for row, totals in zip(HELD_OUT, outcomes("north/comparison/federated")["totals"], strict=True):
        before = tokenizer(ALPACA.format(**row))["input_ids"]
        ids = [*before, *tokenizer(row["response"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        nats = -sum(float(logits[place - 1, ids[place]]) for place in range(len(before), len(ids)))
        assert totals["loss"] == pytest.approx(nats, rel=1e-4)


def test_the_page_says_what_was_scored_sent_and_agreed_to(bellwether, invited, tiny_run):
    invitation = invited()
    ended(invitation, tiny_run[0])
    done = join(bellwether, "--test", "held-out.jsonl")
    path = Path("north/report.html")
    assert f"The page of this site, which stays here: {path}" in done.out
    page = path.read_text()
    assert path.stat().st_mode & 0o077 == 0
    for text in (
        "it trained in 2 of 2 rounds, on 12 rows of its own. Here it is compared on 6 rows that it held out.",
        "Terms, as agreed to &lt;here&gt;.",
        "6.2 kB",  # by hand: 100 + 2 x 3000 + 50; another federation's are not counted
        "Held 0?",
        "Tuned alone: with 2 passes over its rows, as in its 2 rounds of the federation.",
    ):
        assert text in page, text
    assert invitation["federation"][:12] in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")


def test_a_site_that_was_killed_before_its_page_was_made_makes_the_rest_of_it(bellwether, invited, tiny_run):
    ended(invited(), tiny_run[0])
    assert join(bellwether, "--test", "held-out.jsonl").code == 0
    page, place = Path("north/report.html"), Path("north/comparison")
    whole, kept = page.read_bytes(), place / "base" / "seed-0" / "outcomes.json"
    before = kept.stat().st_mtime_ns
    page.unlink()
    shutil.rmtree(place / "alone")
    done = join(bellwether, "--test", "held-out.jsonl")
    assert done.code == 0, done.err
    assert "This federation has ended, and its adapter is in north/adapter." in done.out
    assert "untuned base is scored" not in done.out
    assert kept.stat().st_mtime_ns == before
    assert page.read_bytes() == whole
    write_rows(Path("held-out.jsonl"), HELD_OUT[:4])
    assert "is scored on 4 held-out rows" in join(bellwether, "--test", "held-out.jsonl").out
    assert page.read_bytes() != whole


def test_a_site_without_held_out_rows_is_told_so_before_it_begins_and_has_a_page(bellwether, invited, tiny_run):
    ended(invited(), tiny_run[0])
    done = join(bellwether)
    assert done.code == 0, done.err
    first = done.out.splitlines()[0]
    assert first.startswith(
        "No rows are held out here, so nothing will be compared at the end: give rows that are never"
    )
    assert "data.test_rows_per_category" not in done.out
    page = Path("north/report.html").read_text()
    assert "Nothing is compared, since no rows are held out here" in page
    assert "What left this site" in page
    assert not Path("north/comparison").exists()


def test_rows_that_a_client_holds_out_serve_where_no_others_are_given(bellwether, invited, tiny_run):
    invitation = invited("partition.client_test_fraction=0.25")
    with stopped_before_it_connects():
        join(bellwether)
    noted = next(Path("north/clients").glob("*/rows.json"))
    content = noted.read_bytes()
    ended(invitation, tiny_run[0])
    noted.write_bytes(content)
    done = join(bellwether)
    assert "No rows are held out" not in done.out
    assert "is scored on 3 held-out rows" in done.out  # by hand: a quarter of 12
    assert "on 9 rows of its own" in Path("north/report.html").read_text()
    # Others are for the site alone, and take their place.
    assert "is scored on 6 held-out rows" in join(bellwether, "--test", "held-out.jsonl").out


def test_a_site_that_never_trained_has_nothing_tuned_alone(bellwether, invited, tiny_run):
    ended(invited(), tiny_run[0], rounds=())
    done = join(bellwether, "--test", "held-out.jsonl")
    assert done.code == 0, done.err
    assert not Path("north/comparison/alone").exists()
    assert "This site trained in no round, so nothing is tuned alone." in Path("north/report.html").read_text()


def test_tuning_alone_takes_as_many_steps_where_rounds_count_steps(bellwether, invited, tiny_run):
    ended(invited("training.local_steps=3"), tiny_run[0])
    done = join(bellwether, "--test", "held-out.jsonl")
    assert "with 6 steps, as in its 2 rounds of the federation" in done.out
    # By hand: 6 steps of 4 rows.
    assert outcomes("north/comparison/alone")["cost"]["rows_seen"] == 24


def test_what_is_tuned_alone_can_be_asked_and_the_site_folder_can_be_exported(bellwether, invited, tiny_run):
    ended(invited(), tiny_run[0])
    assert join(bellwether, "--test", "held-out.jsonl").code == 0
    done = bellwether("export", "north", "merged")
    assert done.code == 0, done.err
    assert bellwether("export", "north/comparison/alone/seed-0/adapters/alone", "alone").code == 0
    from bellwether.ask.answerers import find_answerers

    assert [one.name for one in find_answerers(Path("north"))] == ["base", "federated"]


def refused(outcome, sentence):
    assert outcome.code == 2, outcome.out
    assert sentence in outcome.err
    assert "Traceback" not in outcome.err


def test_a_base_that_changed_after_the_end_is_refused(bellwether, invited, tiny_run, tmp_path):
    invitation = invited()
    ended(invitation, tiny_run[0])
    changed = {**invitation, "facts": {**invitation["facts"], "base model": "0" * 64}}
    (tmp_path / "north.invitation").write_text(json.dumps(changed))
    refused(join(bellwether, "--test", "held-out.jsonl"), "base model is ")


def test_a_site_reads_columns_and_encodings_of_its_own(bellwether, invited, tiny_run, tmp_path):
    rows = dolly_rows(CATEGORIES, 6)
    ended(
        invited(),
        tiny_run[0],
        trained=[{**one, "instruction": f"Grüße: {one['instruction']}", "context": ""} for one in rows],
    )
    for name, part in (("north.csv", rows), ("held-out.csv", rows[:2])):
        lines = [
            "frage|antwort|thema",
            *(f"Grüße: {one['instruction']}|{one['response']}|{one['category']}" for one in part),
        ]
        (tmp_path / name).write_bytes("\n".join(lines).encode("cp1252"))
    columns = [f"data.columns.{ours}={theirs}" for ours, theirs in (("instruction", "frage"), ("response", "antwort"))]
    words = ("site", "join", "north.invitation", "--data", "north.csv", "--test", "held-out.csv", "--folder", "north")
    refused(bellwether(*words, *columns), "data.encoding")
    done = bellwether(*words, *columns, "data.columns.category=thema", "data.encoding=cp1252")
    assert done.code == 0, done.err
    assert "Grüße: Task 0?" in Path("north/report.html").read_text()
    assert "2 of 2 test rows (100%) stand among the training rows as well" in done.out
    assert (
        "2 of 2 held-out rows stand among the rows that were trained on as well"
        in Path("north/report.html").read_text()
    )


@pytest.mark.parametrize(
    "field", ["training.learning_rate=1", "data.max_tokens=8", "data=null", "data.sources=[x]", "partition.clients=2"]
)
def test_a_field_that_would_change_what_is_agreed_is_refused_by_its_name(bellwether, invited, field):
    invited()
    refused(
        join(bellwether, field), f"{field.partition('=')[0]} is the same for all who take part, so a site cannot set it"
    )
    assert not [*Path("north").rglob("consent.json")]


def test_words_that_are_no_fields_are_refused(bellwether, invited):
    invited()
    refused(join(bellwether, "more.jsonl"), "'more.jsonl' is not understood; give rows with --data, and fields as")
    refused(join(bellwether, "data.columns.answer=x"), "there is no field data.columns.answer")


def test_own_fields_leave_the_terms_as_they_are_and_test_rows_are_named_in_them(bellwether, invited, tmp_path):
    invitation = invited()
    terms = []
    for words in ((), ("data.skip_bad_rows=true", "data.columns.context=''"), ("--test", "held-out.jsonl")):
        agreed = tmp_path / "north" / "clients" / invitation["federation"][:12] / "consent.json"
        agreed.unlink(missing_ok=True)
        with stopped_before_it_connects():
            join(bellwether, *words)
        (line,) = json_lines(agreed)
        terms.append(line["terms"])
    assert terms[0] == terms[1] != terms[2]
    assert "and anything of the 6 test rows." in line["text"]


class Stop(Exception):
    """Ends a site before it connects."""


def stopped_before_it_connects():
    import contextlib
    from unittest import mock

    stack = contextlib.ExitStack()
    stack.enter_context(contextlib.suppress(Stop))
    stack.enter_context(mock.patch("bellwether.site.joining._wait_for_coordinator", side_effect=Stop))
    return stack


@pytest.mark.parametrize(
    ("field", "sentence"),
    [
        ("federation.fraction=0.5", "How often: 2 rounds; you are asked in about 50% of them."),
        ("federation.fraction=1", "How often: 2 rounds; you are asked in each of them."),
        ("federation.cohort_size=1", "those for which you are drawn, 1 site at a time."),
    ],
)
def test_the_terms_say_how_often_a_site_is_asked(bellwether, invited, field, sentence):
    invited(field)
    done = bellwether("site", "join", "north.invitation", "--data", "north.jsonl", "--folder", "north")
    refused(done, "Nobody is there to agree to these terms")
    assert sentence in done.out


def test_a_federation_whose_coordinator_scores_validation_rows_can_be_joined(bellwether, invited, dolly_like):
    invited("evaluation.part=validation", f"data.validation_sources=['{dolly_like}']")
    done = bellwether("site", "join", "north.invitation", "--data", "north.jsonl", "--folder", "north")
    refused(done, "Nobody is there to agree to these terms")


def test_the_page_shows_itself_on_a_desk_and_on_a_phone_and_loads_nothing(bellwether, invited, tiny_run, chromium):
    from browser import DESKTOP, PHONE, foreign, resize

    ended(invited(), tiny_run[0])
    assert join(bellwether, "--test", "held-out.jsonl").code == 0
    for width, height in (DESKTOP, PHONE):
        resize(chromium, width, height)
        chromium.get(Path("north/report.html").absolute().as_uri())
        assert chromium.execute_script("return document.documentElement.scrollWidth") <= width
        heads = [one.text for one in chromium.find_elements("css selector", "h1, h2")]
        assert heads[:3] == ["north", "Scores", "Scores by category"]
        assert {"Answers side by side", "What left this site", "Terms"} <= set(heads)
    assert not foreign(chromium)


def test_the_ledger_shows_why_a_task_was_not_done(bellwether, invited, tiny_run, monkeypatch):
    ended(invited(), tiny_run[0])
    monkeypatch.setenv("COLUMNS", "160")
    shown = bellwether("site", "ledger", "--folder", "north").out
    assert "not done: the policy of this site forbids it" in shown


def test_a_folder_that_is_no_sites_is_told_apart_from_one_with_an_empty_ledger(bellwether, invited):
    invited()
    words = ("site", "join", "north.invitation", "--data", "north.jsonl")
    refused(bellwether(*words), "site holds no keys of a site; name the site's own folder with --folder")
    assert "north has no ledger: nothing came there" in bellwether("site", "ledger", "--folder", "north").out


def test_where_tuning_alone_diverges_the_page_says_so_and_compares_the_others(bellwether, invited, tiny_run):
    ended(invited("training.learning_rate=1e+30", "training.clip_norm=null"), tiny_run[0])
    done = join(bellwether, "--test", "held-out.jsonl")
    assert done.code == 0, done.err
    page = Path("north/report.html").read_text()
    assert "The adapter tuned here alone has no finite loss, and is left out: its training diverged." in page
    assert "The federation&#39;s adapter has" in page


def test_a_coordinator_of_whom_nothing_is_scored_is_told_how_to_change_that(tiny_recipe):
    from bellwether.recipe.file import load_recipe
    from bellwether.site.coordinator import prepare_coordinator

    notes = prepare_coordinator(load_recipe(tiny_recipe), ["north"], None).notes
    (note,) = [note for note in notes if "scored" in note]
    assert "no rows of its own (data.test_sources), and sites hold none out (partition.client_test_fraction)" in note
    fields = ["partition.client_test_fraction=0.2"]
    assert not prepare_coordinator(load_recipe(tiny_recipe, fields), ["north"], None).notes


def test_a_federation_that_writes_no_answers_is_compared_by_its_loss(bellwether, invited, tiny_run):
    ended(invited("evaluation.generate=false"), tiny_run[0])
    done = join(bellwether, "--test", "held-out.jsonl")
    assert "The federation's adapter has a mean loss of" in done.out
    assert "the adapter tuned here alone (" in done.out
    assert "the untuned base (" in done.out
    assert "arm" not in done.out.splitlines()[-2]
    page = Path("north/report.html").read_text()
    assert "Held 0?" not in page
    assert "Answers side by side" not in page
