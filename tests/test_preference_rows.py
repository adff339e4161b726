"""Rows with a chosen and a rejected answer: how they are read, rendered, cut and refused; and runs on them."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import yaml
from conftest import CATEGORIES, json_lines, write_rows
from data_tokenizers import CHATML, byte_bpe, with_chat
from test_resume import timeless
from tiny_models import tiny_tokenizer

from bellwether.data.federated import load_federated, rows_fingerprint
from bellwether.data.prompts import resolve_template, row_prompt
from bellwether.data.rows import Row, Turn
from bellwether.data.sources import read_rows
from bellwether.data.tokens import tokenise
from bellwether.errors import DataError, RecipeError
from bellwether.recipe.contradictions import check_recipe
from bellwether.recipe.file import load_recipe
from bellwether.recipe.recipe import Columns, Data, Partition
from bellwether.runner.prepare import prepare
from bellwether.tools.randomness import Randomness

ASKED = [{"role": "user", "content": "Which colour?"}]
BLUE, RED = ({"role": "assistant", "content": text} for text in ("Blue.", "Red, or so."))


def read(folder, *rows, **columns):
    """The rows of a file of these."""
    source = str(write_rows(folder / "rows.jsonl", rows))
    return read_rows([source], Data(columns=Columns(**columns)))[0]


# Reading ------------------------------------------------------------------------------------------


def test_a_prompt_and_two_texts_are_a_pair_with_context_and_category(tmp_path):
    (row,) = read(
        tmp_path, {"prompt": "Which?", "input": "A hat.", "chosen": "Blue.", "rejected": "Red.", "category": "open"}
    )
    assert (row.instruction, row.context, row.response, row.category) == ("Which?", "A hat.", "Blue.", "open")
    assert row.rejected == Turn("assistant", "Red.")
    chosen, rejected = row.answers
    assert (chosen.response, rejected.response) == ("Blue.", "Red.")
    assert chosen.rejected is None
    assert rejected.rejected is None


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": ASKED, "chosen": [BLUE], "rejected": [RED]},
        {"chosen": [*ASKED, BLUE], "rejected": [*ASKED, RED]},
        {"prompt": "Which colour?", "chosen": [*ASKED, BLUE], "rejected": [*ASKED, RED]},
    ],
    ids=["explicit prompt", "implicit prompt", "prompt said again as text"],
)
def test_chats_may_have_their_prompt_apart_or_in_both(tmp_path, record):
    (row,) = read(tmp_path, record)
    assert row.turns == (Turn("user", "Which colour?"), Turn("assistant", "Blue."))
    assert row.answers[1].turns == (Turn("user", "Which colour?"), Turn("assistant", "Red, or so."))
    assert (row.instruction, row.response, row.rejected.text) == ("Which colour?", "Blue.", "Red, or so.")


def test_what_has_one_answer_as_well_is_read_so_unless_the_two_are_named(tmp_path):
    record = {"prompt": "a?", "response": "b", "chosen": "c", "rejected": "d"}
    assert read(tmp_path, record)[0].rejected is None
    assert read(tmp_path, record, chosen="chosen")[0].rejected.text == "d"
    assert read(tmp_path, record, response="chosen")[0].response == "c", "tuning on the chosen answers comes first"
    chat = {"prompt": "a?", "messages": [*ASKED, BLUE], "chosen": [*ASKED, BLUE], "rejected": [*ASKED, RED]}
    assert read(tmp_path, chat)[0].rejected is None
    assert read(tmp_path, chat, rejected="rejected")[0].rejected.text == "Red, or so."
    renamed = read(tmp_path, {"q": "a?", "good": "c", "bad": "d"}, instruction="q", chosen="good", rejected="bad")
    assert (renamed[0].response, renamed[0].rejected.text) == ("c", "d")


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"prompt": "a?", "chosen": "b", "rejected": ""}, "the field 'rejected' is empty"),
        ({"prompt": "a?", "chosen": "b"}, "the field 'rejected' is missing"),
        ({"prompt": "a?", "chosen": "b", "rejected": "b"}, "'chosen' and 'rejected' are equal"),
        ({"prompt": "a?", "chosen": "b", "rejected": [RED]}, "one is a list of messages, and the other is not"),
        ({"chosen": [*ASKED, BLUE], "rejected": [*ASKED, BLUE]}, "'chosen' and 'rejected' are equal"),
        (
            {"chosen": [*ASKED, BLUE, *ASKED, RED], "rejected": [*ASKED, RED, *ASKED, BLUE]},
            "differ from message 2 on, but only the last answer may differ",
        ),
        ({"chosen": [*ASKED, BLUE], "rejected": ASKED}, "the chat does not end with a message of the assistant"),
        ({"chosen": [BLUE], "rejected": [RED]}, "'chosen', message 1 is of the assistant, but one of the user is due"),
    ],
)
def test_bad_pairs_are_named_by_file_and_line(tmp_path, record, said):
    good = (
        {"prompt": "a?", "chosen": "b", "rejected": "c"}
        if "prompt" in record
        else {"chosen": [*ASKED, BLUE], "rejected": [*ASKED, RED]}
    )
    with pytest.raises(DataError, match=rf"^rows.jsonl:2: .*{said}"):
        read(tmp_path, good, record)


def test_one_answer_without_the_other_and_texts_without_a_prompt_are_refused(tmp_path):
    with pytest.raises(DataError, match="no column holds the rejected answers .*data.columns.rejected"):
        read(tmp_path, {"prompt": "a?", "good": "b"}, chosen="good")
    with pytest.raises(DataError, match="the prompt must stand beside it; name its column in data.columns.instruction"):
        read(tmp_path, {"chosen": "b", "rejected": "c"})


def test_the_rejected_answer_is_part_of_what_a_run_is_of(tmp_path):
    prints = []
    for text in ("c", "d"):
        rows = [{"prompt": f"{n}?", "chosen": "b", "rejected": text} for n in range(4)]
        source = str(write_rows(tmp_path / "rows.jsonl", rows))
        data = Data(sources=(source,), test_rows_per_category=0)
        prints.append(rows_fingerprint(load_federated(data, Partition(clients=2, method="iid"), Randomness(0))))
    assert prints[0] != prints[1]


# Tokens -------------------------------------------------------------------------------------------


def pair(instruction, chosen, rejected, context="", **more):
    return Row(instruction, chosen, context, rejected=Turn("assistant", rejected), **more)


def tokens(row, tokenizer, **settings):
    data = Data(**settings)
    return tokenise([row], tokenizer, data, resolve_template(data, tokenizer))


@pytest.mark.parametrize("chat", [False, True], ids=["alpaca", "chat"])
def test_both_answers_stand_behind_the_same_prompt_and_they_alone_count(chat):
    tokenizer = with_chat(byte_bpe(), CHATML) if chat else byte_bpe()
    row = pair("Which colour?", "Blue is a colour.", "Red")
    earlier = (Turn("user", "Hello"), Turn("assistant", "Hello to you."), Turn("user", "Which colour?"))
    for one in (row, pair("Which colour?", "Blue.", "Red", turns=(*earlier, Turn("assistant", "Blue.")))):
        (made,) = tokens(one, tokenizer).rows
        template = resolve_template(Data(), tokenizer)
        alone = [tokens(answer, tokenizer).rows[0] for answer in one.answers]
        assert made.row == one
        for answer, single in zip(made.answers, alone, strict=True):
            assert answer.ids_T.tolist() == single.ids_T.tolist()
            assert answer.prompt_length == made.prompt_length
            assert answer.trained_T.tolist() == answer.response_T.tolist()
            assert answer.trained_T.tolist() == (np.arange(len(answer)) >= made.prompt_length).tolist()
        begin = tokenizer.decode(made.ids_T[: made.prompt_length])
        assert begin.endswith(row_prompt(one, template, tokenizer)[-10:])
        assert made.trained_tokens == sum(len(answer) - made.prompt_length for answer in made.answers)


def test_a_context_is_shortened_alike_for_both_answers():
    tokenizer = tiny_tokenizer()
    row = pair("Which?", "Blue.", "Red, " * 12, context="The hat lies on the table of the room. " * 3)
    whole = tokens(row, tokenizer, max_tokens=2000).rows[0]
    found = tokens(row, tokenizer, max_tokens=whole.longest - 10)
    (made,) = found.rows
    assert (found.shortened, found.cut, found.left_out) == (1, 0, 0)
    assert made.longest <= whole.longest - 10
    chosen, rejected = made.answers
    assert chosen.prompt_length == rejected.prompt_length < whole.prompt_length
    assert chosen.ids_T[: chosen.prompt_length].tolist() == rejected.ids_T[: chosen.prompt_length].tolist()
    assert chosen.ids_T[chosen.prompt_length :].tolist() == whole.ids_T[whole.prompt_length :].tolist()
    assert made.row == row


def test_a_longer_answer_is_cut_and_a_pair_of_which_one_keeps_no_token_is_left_out():
    tokenizer = tiny_tokenizer()
    row = pair("Which?", "Blue.", "Red, " * 12)
    whole = tokens(row, tokenizer).rows[0]
    found = tokens(row, tokenizer, max_tokens=len(whole) + 1)
    (made,) = found.rows
    assert (found.shortened, found.cut, found.left_out) == (0, 1, 0)
    assert found.too_long == [whole.longest]
    assert made.ids_T.tolist() == whole.ids_T.tolist()
    assert made.rejected.ids_T.tolist() == whole.rejected.ids_T[: len(whole) + 1].tolist()
    found = tokens(row, tokenizer, max_tokens=whole.prompt_length)
    assert (list(found.rows), found.left_out) == ([], 1)


def test_a_special_token_in_a_rejected_answer_is_refused():
    tokenizer = tiny_tokenizer()
    with pytest.raises(DataError, match="its text has '</s>', which the tokenizer takes for a special token"):
        tokens(pair("Which?", "Blue.", "Red</s>"), tokenizer)


# Contradictions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (["training.beta=0.2"], "training.beta is given, but training.loss is cross_entropy"),
        (["training.loss=dpo", "data.loss_on=all"], "data.loss_on is all, but training.loss dpo compares answers"),
        (
            ["training.loss=dpo", "selection.method=perplexity", "selection.rows=3"],
            "selection.method is perplexity, which looks at one answer of a row, but with",
        ),
        (["training.loss=dpo", "selection.method=own:rule", "selection.rows=3"], "selection.method is own:rule"),
        (
            ["compare={arms: {a: {}}, tune: {choose_by: preferred}}"],
            "compare.tune.choose_by is preferred, but rows have one answer unless training.loss is dpo",
        ),
    ],
)
def test_what_contradicts_a_loss_of_pairs_is_said_before_anything_is_read(fields, said):
    with pytest.raises(RecipeError, match=said):
        check_recipe(load_recipe("default", fields))


@pytest.fixture
def pairs_recipe(tiny_recipe, tmp_path):
    """The tiny recipe, on pairs: the right answer, and that of another row."""
    rows = [
        {
            "prompt": f"Task {n}?",
            "chosen": f"{kind[:4]} {n % 7}",
            "rejected": f"{kind[-4:]} {n % 5}, no",
            "category": kind,
        }
        for n in range(10)
        for kind in CATEGORIES[:4]
    ]
    values = yaml.safe_load(tiny_recipe.read_text())
    values["data"]["sources"] = [str(write_rows(tmp_path / "pairs.jsonl", rows))]
    values["training"] |= {"loss": "dpo"}
    path = tmp_path / "pairs.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_rows_that_do_not_fit_the_loss_are_refused_by_their_place(pairs_recipe, tiny_recipe):
    with pytest.raises(DataError, match=r"pairs.jsonl:\d+: this row has a chosen and a rejected answer, but training"):
        prepare(load_recipe(pairs_recipe, ["training.loss=cross_entropy"]))
    with pytest.raises(DataError, match=r"rows.jsonl:\d+: training.loss is dpo, but this row has one answer"):
        prepare(load_recipe(tiny_recipe, ["training.loss=dpo"]))
    chosen = prepare(load_recipe(pairs_recipe, ["training.loss=cross_entropy", "data.columns.response=chosen"]))
    assert all(row.rejected is None for part in chosen.clients.values() for row in part.rows)


@pytest.mark.parametrize("method", ["flora", "fedex_lora"])
def test_methods_that_change_the_reference_are_refused(pairs_recipe, method):
    with pytest.raises(
        RecipeError, match=f"{method} folds updates into the base, but training.loss dpo takes the base"
    ):
        prepare(load_recipe(pairs_recipe, [f"method.name={method}"]))


# Runs ---------------------------------------------------------------------------------------------


def same(folder, other, *names):
    for name in ("adapter/adapter_model.safetensors", "evaluation.csv", *names):
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.integration
def test_a_run_on_pairs_goes_on_to_the_same_bytes(bellwether, pairs_recipe, tmp_path):
    words = ("run", pairs_recipe, "lora.dropout=0.1", "federation.rounds=4", "output.keep_checkpoints=4")
    outcome = bellwether(*words, "--out", tmp_path / "truth")
    assert outcome.code == 0, outcome.err
    shutil.copytree(tmp_path / "truth", tmp_path / "run")
    for name in ("adapter", "checkpoints/0003", "checkpoints/0004"):
        shutil.rmtree(tmp_path / "run" / name)
    outcome = bellwether("run", "--resume", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    same(tmp_path / "run", tmp_path / "truth", "samples.jsonl")
    assert timeless(tmp_path / "run") == timeless(tmp_path / "truth")
    lines = timeless(tmp_path / "truth")
    assert all(0 <= line["preferred"] <= 1 and line["margin"] is not None for line in lines)


@pytest.mark.integration
def test_several_processes_train_on_pairs_as_one(bellwether, pairs_recipe, tmp_path):
    for processes in (1, 2):
        words = (f"engine.processes={processes}", "partition.client_test_fraction=0.2")
        outcome = bellwether("run", pairs_recipe, *words, "--out", tmp_path / f"run-{processes}")
        assert outcome.code == 0, outcome.err
    same(tmp_path / "run-1", tmp_path / "run-2")


@pytest.mark.integration
@pytest.mark.parametrize(
    "fields", [("engine.fuse=0",), ("selection.method=random", "selection.rows=3"), ("method.name=ditto",)]
)
def test_pairs_go_with_what_else_a_recipe_may_say(bellwether, pairs_recipe, fields, tmp_path):
    outcome = bellwether("run", pairs_recipe, *fields, "--out", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert "preferred" in outcome.out
    scored = json_lines(tmp_path / "run" / "evaluation.jsonl")
    assert [line["preferred"] for line in scored if line["round"] == 0] == [0.5] * 5
    assert all(0 <= line["preferred"] <= 1 for line in scored)
    assert "chosen answers preferred" in (tmp_path / "run" / "report.html").read_text().lower()


@pytest.mark.integration
def test_a_comparison_on_pairs_has_a_column_of_preferences(bellwether, pairs_recipe, tmp_path):
    arms = "compare={seeds: [0], arms: {untuned: {trains: nobody}, local: {trains: alone}, together: {}}}"
    outcome = bellwether("compare", pairs_recipe, arms, "--out", tmp_path / "compared")
    assert outcome.code == 0, outcome.err
    table = (tmp_path / "compared" / "table.md").read_text()
    assert "preferred %" in table
    untuned = next(line for line in table.splitlines() if line.startswith("| untuned"))
    assert "50.0" in untuned


@pytest.mark.integration
@pytest.mark.slow
def test_sites_train_on_pairs_as_a_simulation_byte_for_byte(bellwether, pairs_recipe, tmp_path):
    pytest.importorskip("flwr")
    from forked import start

    words = (pairs_recipe, "partition.client_test_fraction=0.2")
    simulated = bellwether("run", *words, "--out", "simulated")
    assert simulated.code == 0, simulated.err
    process = start("federation", "rehearse", *words, "--sites", "2", "--out", "rehearsed", folder=tmp_path)
    out, err = process.communicate()
    assert process.returncode == 0, err + out
    same(tmp_path / "rehearsed", tmp_path / "simulated")


@pytest.mark.integration
def test_a_first_recipe_for_pairs_is_one_for_them(bellwether, pairs_recipe, tiny_llama, tmp_path):
    outcome = bellwether("init", tmp_path / "pairs.jsonl", "--model", tiny_llama)
    assert outcome.code == 0, outcome.err
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.training.loss == "dpo"
    assert prepare(recipe).scored.rows


@pytest.mark.integration
def test_a_federation_on_pairs_of_the_embedded_world_prefers_right_answers_to_others(bellwether, tmp_path):
    """Of questions of one category; what is rejected is the answer to another one."""
    for part, source in (("train", "starter"), ("test", "starter:test")):
        rows = [row for row in read_rows([source], Data())[0] if row.category == "classification"]
        records = []
        for number, row in enumerate(rows):
            others = [other.response for other in rows[number + 1 :] + rows[:number] if other.response != row.response]
            records.append(
                {"prompt": row.instruction, "input": row.context, "chosen": row.response, "rejected": others[0]}
            )
        write_rows(tmp_path / f"{part}.jsonl", records)
    outcome = bellwether(
        "run",
        f"data.sources=[{tmp_path / 'train.jsonl'}]",
        f"data.test_sources=[{tmp_path / 'test.jsonl'}]",
        "training.loss=dpo",
        "partition.clients=3",
        "federation.fraction=1",
        "federation.rounds=3",
        "evaluation.every=0",
        "evaluation.generate=false",
        "--out",
        tmp_path / "run",
    )
    assert outcome.code == 0, outcome.err
    scored = json_lines(tmp_path / "run" / "evaluation.jsonl")
    before, after = (line["preferred"] for line in scored if line["category"] == "(macro)")
    assert before == 0.5
    assert after > 0.8
    assert json_lines(tmp_path / "run" / "rounds.jsonl")[-1]["preferred"] > 0.5


@pytest.mark.integration
def test_a_plan_counts_both_answers_and_the_reference(pairs_recipe):
    from bellwether.runner.plan import plan

    pairs = plan(load_recipe(pairs_recipe))
    chosen = plan(load_recipe(pairs_recipe, ["training.loss=cross_entropy", "data.columns.response=chosen"]))
    recipe = load_recipe(pairs_recipe)
    rows = [row for part in prepare(recipe).clients.values() for row in part.rows]
    cohort = sum(sum(map(len, row.answers)) for row in rows) / 2  # half of the clients, which hold alike many rows
    assert pairs.tokens_per_round == pytest.approx(cohort)
    assert pairs.memory["activations"] > 1.9 * chosen.memory["activations"]
    assert pairs.flops_per_round > 1.3 * 1.9 * chosen.flops_per_round


def test_a_site_tells_pairs_apart_that_differ_in_the_rejected_answer_alone():
    from bellwether.data.rows import Row, Turn
    from bellwether.site.trained import row_hash

    hashes = [
        row_hash(Row("Why?", "", "So.", rejected=said and Turn("assistant", said))) for said in (None, "No.", "Never.")
    ]
    assert len(set(hashes)) == 3
