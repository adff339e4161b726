"""What a client does with its rows: batches, local training, scores."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from asking import evaluate_tasks, train, train_tasks
from rounding import FLOAT64, gamma
from tiny_models import tiny_base

from bellwether.client.batches import by_length, collate, local_steps
from bellwether.client.score import by_category, by_group, score
from bellwether.data.rows import Row, TokenRow
from bellwether.engine.local import LocalEngine
from bellwether.engine.resources import UnevenClients
from bellwether.exchange.scores import Totals, exact_match, macro, means, rouge_l
from bellwether.method.average import fedavg
from bellwether.method.cohort import Condition
from bellwether.model.base import weights_fingerprint
from bellwether.model.lora import LoraLayers, initial_adapter
from bellwether.recipe.recipe import Evaluation, Lora, Training
from bellwether.tools.randomness import Randomness


def token_row(ids, trained, category="x", response="", prompt=1) -> TokenRow:
    mask = np.array(trained, bool)
    return TokenRow(np.array(ids, np.int64), mask, mask, prompt, Row("i", response or "r", category=category))


def random_rows(count: int, seed: int = 0, vocabulary: int = 300) -> list[TokenRow]:
    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        length = int(draw.integers(4, 20))
        ids = draw.integers(3, vocabulary, length)
        prompt = int(draw.integers(1, length - 2))
        rows.append(token_row(ids, [number >= prompt for number in range(length)], prompt=prompt))
    return rows


# Batches ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [True, False])
@pytest.mark.parametrize(("rows", "size"), [(1, 8), (8, 8), (23, 8), (23, 1)])
def test_an_epoch_visits_every_row_once(rows, size, group):
    training = Training(batch_size=size, local_epochs=3, group_by_length=group)
    steps = local_steps(list(range(5, 5 + rows)), training, np.random.default_rng(0))
    batches = [batch for step in steps for batch in step]
    assert len(batches) == 3 * math.ceil(rows / size)
    for epoch in range(3):
        part = batches[epoch * len(batches) // 3 : (epoch + 1) * len(batches) // 3]
        assert sorted(row for batch in part for row in batch) == list(range(rows))


def test_a_number_of_steps_goes_before_epochs_and_may_repeat_rows():
    training = Training(batch_size=2, local_steps=7, local_epochs=1)
    steps = local_steps([3, 4, 5], training, np.random.default_rng(0))
    assert len(steps) == 7


def test_accumulation_puts_batches_into_one_step_and_ends_steps_with_the_epoch():
    training = Training(batch_size=2, accumulation=2, local_epochs=2)
    steps = local_steps([9] * 10, training, np.random.default_rng(0))
    assert [[len(batch) for batch in step] for step in steps] == [[2, 2], [2, 2], [2]] * 2


def test_rows_of_like_length_share_a_batch_and_batches_come_in_random_order():
    lengths = [int(length) for length in np.random.default_rng(1).permutation(64)]
    steps = local_steps(lengths, Training(batch_size=8), np.random.default_rng(0))
    spans = [(min(lengths[row] for row in batch), max(lengths[row] for row in batch)) for (batch,) in steps]
    assert all(high - low == 7 for low, high in spans)
    assert spans != sorted(spans)


def test_the_order_comes_from_the_generator_alone():
    orders = [local_steps([5] * 20, Training(), np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_the_longest_rows_come_first_when_scoring():
    assert list(by_length([3, 9, 5, 9], 2)) == [[1, 3], [2, 0]]


def test_collating_selects_the_positions_before_trained_tokens():
    # By hand: row one trains its tokens 3 and 4, so positions 1 and 2 predict them.
    rows = [token_row([1, 2, 3, 4], [0, 0, 1, 1]), token_row([5, 6], [0, 1])]
    batch = collate(rows, torch.device("cpu"))
    assert batch.lengths == [4, 2]
    assert batch.ids_M.tolist() == [1, 2, 3, 4, 5, 6]
    assert batch.position_M.tolist() == [0, 1, 2, 3, 0, 1]
    assert batch.row_M.tolist() == [0, 0, 0, 0, 1, 1]
    assert batch.select_S.tolist() == [1, 2, 4]
    assert batch.targets_S.tolist() == [3, 4, 6]


def test_a_trained_first_token_is_not_predicted_from_nothing():
    batch = collate([token_row([7, 8, 9], [1, 1, 1])], torch.device("cpu"))
    assert batch.targets_S.tolist() == [8, 9]
    assert batch.select_S.tolist() == [0, 1]


# Training -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base():
    return tiny_base("llama", torch.float32)


@pytest.fixture(scope="module")
def adapter(base):
    return initial_adapter(base, Lora(rank=4, dropout=0.1), Randomness(0).torch("test"))


@pytest.fixture
def layers(base, adapter):
    layers = LoraLayers(base.model, adapter.config)
    yield layers
    layers.detach()


@pytest.fixture(scope="module")
def exact():
    """The base in float64, for comparisons of numbers."""
    return tiny_base("llama")


@pytest.fixture
def exact_layers(exact, adapter):
    layers = LoraLayers(exact.model, adapter.config, dtype=torch.float64)
    yield layers
    layers.detach()


def mean_loss(model, ids_T, counted_T) -> float:
    """The mean cross-entropy that transformers' logits give to the tokens that count, in the model's precision."""
    ids_1T = torch.from_numpy(ids_T)[None]
    logits_TV = model(input_ids=ids_1T).logits[0, :-1]
    losses_T = torch.nn.functional.cross_entropy(logits_TV, ids_1T[0, 1:], reduction="none")
    return losses_T[torch.from_numpy(counted_T)[1:]].mean().item()


def trained(base, layers, cohort, adapter, *, round=1, seed=5, **training):
    settings = Training(learning_rate=1e-2, **training)
    return train(base, layers, cohort, adapter, settings, round=round, rounds=4, seed=seed)


def test_a_client_trains_to_the_same_bytes_alone_and_in_a_cohort(base, adapter, layers):
    rows = {name: random_rows(11, seed) for seed, name in enumerate("abc")}
    together = {reply.client: reply.update for reply in trained(base, layers, rows, adapter)}
    (alone,) = trained(base, layers, {"b": rows["b"]}, adapter)
    assert all(alone.update.tensors[key].tobytes() == together["b"].tensors[key].tobytes() for key in adapter.tensors)
    assert together["a"].rows == 11


def test_training_changes_the_adapter_and_never_the_base(base, adapter, layers):
    (reply,) = trained(base, layers, {"a": random_rows(9)}, adapter)
    assert all((reply.update.tensors[key] != adapter.tensors[key]).any() for key in adapter.tensors)
    assert weights_fingerprint(base.model) == base.fingerprint


def test_another_seed_or_round_or_client_draws_another_order_and_other_masks(base, adapter, layers):
    rows = random_rows(20)
    others = [({}, "a"), ({"seed": 6}, "a"), ({"round": 2}, "a"), ({}, "b")]
    results = set()
    for each, client in others:
        (reply,) = trained(base, layers, {client: rows}, adapter, schedule="constant", **each)
        results.add(b"".join(reply.update.tensors[key].tobytes() for key in sorted(adapter.tensors)))
    assert len(results) == 4


def test_accumulated_batches_give_the_step_of_one_large_batch(exact):
    # The mean is over all tokens of the step, however many each of its batches has.
    plain = initial_adapter(exact, Lora(rank=4, dropout=0.0), Randomness(0).torch("test"))
    rows = random_rows(8)
    changes = []
    for size, accumulation in ((8, 1), (2, 4)):
        layers = LoraLayers(exact.model, plain.config, dtype=torch.float64)
        settings = {"batch_size": size, "accumulation": accumulation, "clip_norm": None}
        (reply,) = trained(exact, layers, {"a": rows}, plain, **settings)
        changes.append(reply.update)
        layers.detach()
    # Losses are added up in float32, of the four batches in as many steps.
    assert changes[0].metrics["loss"] == pytest.approx(changes[1].metrics["loss"], rel=gamma(torch.float32, 1 + 4))
    for key in plain.tensors:
        np.testing.assert_allclose(changes[0].tensors[key], changes[1].tensors[key], rtol=0, atol=FLOAT64)
        assert np.abs(changes[0].tensors[key] - plain.tensors[key]).max() > 1e-3 or "lora_A" in key


def test_clipping_bounds_the_step_and_null_does_not(base, layers, adapter):
    plain = initial_adapter(base, Lora(rank=4, dropout=0.0), Randomness(0).torch("test"))
    norms = {}
    for limit in (1e-9, None):
        (reply,) = trained(base, layers, {"a": random_rows(8)}, plain, clip_norm=limit)
        # AdamW's first step hides a gradient's size, except near its epsilon of 1e-8.
        norms[limit] = max(np.abs(reply.update.tensors[key] - plain.tensors[key]).max() for key in plain.tensors)
    assert norms[1e-9] < 0.2 * norms[None]


def test_the_loss_that_a_client_reports_is_that_of_transformers(exact, exact_layers):
    plain = initial_adapter(exact, Lora(rank=4, dropout=0.0), Randomness(0).torch("test"))
    row = random_rows(1)[0]
    (reply,) = trained(exact, exact_layers, {"a": [row]}, plain)
    with torch.no_grad(), exact_layers.disabled():
        expected = mean_loss(exact.model, row.ids_T, row.trained_T)
    # With B = 0 the adapter does nothing before the first step; losses are added up in float32, here a single one.
    assert reply.update.metrics["loss"] == pytest.approx(expected, rel=gamma(torch.float32, 1))
    assert reply.update.metrics["tokens"] == int(row.trained_T.sum())


# Scores -------------------------------------------------------------------------------------------


def test_scores_equal_those_of_transformers_row_by_row(exact, adapter, exact_layers):
    rows = random_rows(7)
    exact_layers.load(0, adapter.tensors)
    results = score(exact, exact_layers, rows, Evaluation(batch_size=3, max_new_tokens=5))
    for row, result in zip(rows, results, strict=True):
        ids = torch.from_numpy(row.ids_T)[None]
        with torch.no_grad():
            expected = mean_loss(exact.model, row.ids_T, row.response_T)
            answer = exact.model.generate(ids[:, : row.prompt_length], max_new_tokens=5, do_sample=False)
        assert result.totals.loss / result.totals.tokens == pytest.approx(expected, rel=FLOAT64)
        text = exact.tokenizer.decode(answer[0, row.prompt_length :], skip_special_tokens=True).strip()
        assert result.answer == text


def test_without_generation_no_answer_counts(base, adapter, layers):
    results = score(base, layers, random_rows(2), Evaluation(generate=False))
    assert [result.answer for result in results] == [None, None]
    assert means(results[0].totals).rouge_l is None


def test_totals_are_kept_by_category():
    rows = [token_row([1, 2], [0, 1], category=name) for name in ("b", "a", "b")]
    from bellwether.client.score import Scored

    scored = [Scored(Totals(rows=1, tokens=n, loss=float(n)), None) for n in (1, 2, 3)]
    assert by_category(rows, scored) == {"a": Totals(1, 2, 2.0), "b": Totals(2, 4, 4.0)}


def test_totals_are_kept_by_group_also_where_rows_name_none():
    from bellwether.client.score import Scored

    plain = token_row([1, 2], [0, 1])
    rows = [replace(plain, row=replace(plain.row, group=name)) for name in ("fr", "", "fr")]
    scored = [Scored(Totals(rows=1, tokens=n, loss=float(n)), None) for n in (1, 2, 3)]
    assert by_group(rows, scored) == {"": Totals(1, 2, 2.0), "fr": Totals(2, 4, 4.0)}


def test_the_macro_mean_weighs_categories_alike():
    categories = {"a": Totals(1, 10, 10.0, 1, 1.0, 1), "b": Totals(99, 10, 30.0, 100, 20.0, 50)}
    scores = macro(categories)
    # By hand: losses 1 and 3; ROUGE-L 1 and 0.2; exact 1 and 0.5.
    assert scores.loss == pytest.approx(2.0)
    assert scores.rouge_l == pytest.approx(0.6)
    assert scores.exact == pytest.approx(0.75)
    assert scores.perplexity == pytest.approx(math.exp(2.0))


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence():
    # By hand: LCS of 'the cat sat' and 'the dog sat down' is 'the sat': P 2/3, R 2/4, F 4/7.
    assert rouge_l("the cat sat", "the dog sat down") == pytest.approx(4 / 7)
    assert rouge_l("", "something") == 0.0


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("The cats were running quickly.", "A cat runs; it is quick, isn't it?"),
        ("It costs 12.50 (USD) — or so they’d say…", "it cost 12 50 usd, they would say so"),
        ("snake_case and kebab-case", "Snake case and Kebab case"),
        ("nothing alike", "something else entirely"),
        ("", "x"),
        ("generalisations of relational conditional rationality", "general relation condition rational"),
    ],
)
def test_rouge_l_of_english_is_that_of_rouge_score_to_the_last_digit(answer, reference):
    from rouge_score.rouge_scorer import RougeScorer

    theirs = RougeScorer(["rougeL"], use_stemmer=True).score(reference, answer)["rougeL"].fmeasure
    assert rouge_l(answer, reference) == theirs


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("机器学习很有趣。", "机器学习很有趣", 1.0),
        ("机器翻译", "机器学习", 2 / 4),  # two of four characters
        ("カタカナとひらがな", "カタカナ と ひらがな", 1.0),
        ("ภาษาไทย", "ภาษาไทย", 1.0),
        ("한국어 문장", "한국어 글", 2 * (1 / 2 * 1 / 2) / (1 / 2 + 1 / 2)),  # one of two words
        ("Быстрая лиса", "быстрая лиса!", 1.0),
        ("हिन्दी में", "हिन्दी में", 1.0),
        ("مرحبا بالعالم", "مرحبا", 2 / 3),  # precision 1/2, recall 1
        ("Der Schlüssel lag", "der schlüssel", 4 / 5),
        ("cafe\u0301 noir", "caf\u00e9 noir", 1.0),
        ("café", "cafe", 0.0),
        ("GPT-4 的输出", "GPT 4 的输出", 1.0),
        ("🙂", "🙂", 0.0),  # no word at all
    ],
)
def test_rouge_l_knows_the_letters_of_every_script(answer, reference, score):
    assert rouge_l(answer, reference) == pytest.approx(score, abs=1e-12)


def test_texts_that_differ_in_unicodes_form_only_are_equal():
    assert exact_match("cafe\u0301", "caf\u00e9")
    assert not exact_match("cafe", "caf\u00e9")


@pytest.mark.parametrize(
    ("answer", "reference", "exact"),
    [
        ("<think>\nNo?\n</think>\n\nYes.", "Yes.", 1),
        ("Yes.", "<think>\nWell.\n</think>\n\nYes.", 1),
        ("<think>\nYes.", "Yes.", 0),  # it never came to its answer
    ],
)
def test_scores_leave_out_the_reasoning_before_an_answer(answer, reference, exact):
    from bellwether.client.score import _scored

    plain = token_row([1, 2], [0, 1])
    row = replace(plain, row=replace(plain.row, response=reference))
    assert _scored(row, [1.0], [0.0], answer).totals.exact == exact


def test_an_exact_match_ignores_white_space_only():
    assert exact_match(" a  b\n", "a b")
    assert not exact_match("A b", "a b")
    assert not exact_match("a b.", "a b")


# Engine -------------------------------------------------------------------------------------------


def engine(base, layers, conditions=None, **rows):
    local = LocalEngine(base, layers, rows, {"a": random_rows(3)}, fedavg())
    return UnevenClients(local.ask, rows, lambda client, round: conditions[client]) if conditions else local


def test_simulated_resources_decide_who_answers_and_how_long_it_takes(base, adapter, layers):
    conditions = {
        "a": Condition(True, 5.0, False),
        "b": Condition(False, 5.0, False),
        "c": Condition(True, 5.0, True),
        "d": Condition(True, 0.5, False),
    }
    rows = {name: random_rows(10) for name in "abcd"}
    training = Training(local_epochs=2)
    asked = train_tasks("abcd", adapter, training)
    replies = {reply.client: reply for reply in engine(base, layers, conditions, **rows).ask(asked, 10.0)}
    # By hand: 10 rows, 2 epochs, 5 rows a second.
    assert replies["a"].seconds == pytest.approx(4.0)
    assert replies["a"].update is not None
    assert "away" in replies["b"].failure
    assert "dropped out" in replies["c"].failure
    assert "would need 40.0 s" in replies["d"].failure
    assert [replies[client].reached for client in "abcd"] == [True, False, True, True]
    local = LocalEngine(base, layers, rows, {}, fedavg())
    slower = UnevenClients(local.ask, rows, lambda client, round: conditions[client], passes=lambda task: 3)
    assert [reply.seconds for reply in slower.ask({"a": asked["a"]})] == [pytest.approx(3 * 4.0)]


def test_a_client_scores_its_own_rows_and_sends_totals_only(base, adapter, layers):
    (reply,) = engine(base, layers, a=random_rows(3)).ask(
        evaluate_tasks("a", adapter, Evaluation(generate=False), round=0)
    )
    assert reply.update is None
    assert reply.totals["x"].rows == 3


def test_a_client_tells_how_many_rows_it_went_through_beside_how_many_it_has(base, adapter, layers):
    (few,) = trained(base, layers, {"a": random_rows(9)}, adapter, local_steps=1, batch_size=2)
    (twice,) = trained(base, layers, {"a": random_rows(9)}, adapter, local_epochs=2, batch_size=4)
    assert (few.update.rows, few.update.metrics["rows"]) == (9, 2)
    assert (twice.update.rows, twice.update.metrics["rows"]) == (9, 18)
