"""What choosing rows is worth on unseen tasks: the table counts the right rows, and compares like with like."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import shlex
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from rounding import FLOAT64
from tiny_models import exact_base, in_float64
from transformers import AutoModelForCausalLM

import bellwether
from bellwether.exchange.scores import Totals
from bellwether.recipe.file import with_overrides
from bellwether.recipe.recipe import Arm, Compare, Recipe
from bellwether.store.comparison import Comparison, Outcome, read_comparison

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import choosing, report, unseen


def compared(unseen: str, scores: dict[str, list[list[tuple[str, int, float]]]]) -> Comparison:
    """Return a comparison of arms with an outcome a seed, whose rows are (category, tokens, loss)."""
    recipe = with_overrides(Recipe(compare=Compare()), {"data.unseen_categories": [unseen] if unseen else []})
    outcomes = [
        Outcome(
            arm,
            seed,
            "",
            tuple(category for category, _, _ in rows),
            tuple(Totals(1, tokens, loss, 1, loss / 10, 0) for _, tokens, loss in rows),
            tuple(None for _ in rows),
            cost={"rows": 10 * (seed + 1), "rows_of_all": 100} if arm != "base" else {},
            curve=((1.0, 9.0), (2.0, float(seed))) if arm != "base" else (),
        )
        for arm, seeds in scores.items()
        for seed, rows in enumerate(seeds)
    ]
    return Comparison(recipe, {name: Arm() for name in scores}, outcomes, [])


def test_only_rows_of_the_unseen_categories_count_and_every_category_counts_alike():
    first = compared(
        "a", {"base": [[("a", 2, 8.0), ("b", 1, 9.0)]] * 2, "random": [[("a", 2, 4.0), ("b", 1, 3.0)]] * 2}
    )
    second = compared(
        "b",
        {
            "base": [[("a", 2, 9.0), ("b", 1, 5.0), ("b", 3, 3.0)]] * 2,
            "random": [[("a", 2, 6.0), ("b", 1, 1.0), ("b", 3, 1.0)]] * 2,
        },
    )

    arms = unseen.measure([first, second], "random", {})["arms"]

    # a: 8 nats of 2 tokens; b: 5 + 3 nats of 1 + 3 tokens; their mean. Random: 4/2 and 2/4.
    assert arms["base"]["scores"]["loss"]["mean"] == pytest.approx((8 / 2 + 8 / 4) / 2)
    assert arms["random"]["scores"]["loss"]["mean"] == pytest.approx((4 / 2 + 2 / 4) / 2)
    assert arms["base"]["gaps"]["loss"]["mean"] == pytest.approx(3 - 1.25)
    # ROUGE-L is a mean over rows, a category a half: 0.8, and the mean of 0.5 and 0.3.
    assert arms["base"]["scores"]["rouge_l"]["mean"] == pytest.approx((0.8 + 0.4) / 2)
    # Seen in training: b in the first, a in the second.
    assert arms["base"]["seen_loss"] == pytest.approx((9 / 1 + 9 / 2) / 2)
    assert arms["random"]["costs"]["rows"] == pytest.approx(15)
    assert "random" not in arms["random"]["gaps"]
    assert not arms["random"]["gaps"]


def test_differences_are_paired_by_seed_and_adjusted_over_arms():
    rows = [[("a", 1, 5.0 + seed + number / 10) for number in range(8)] for seed in range(4)]
    lower = [[(category, tokens, loss - 1) for category, tokens, loss in some] for some in rows]
    scores = {"random": rows, "one": lower, "other": lower}

    found = unseen.measure([compared("a", scores)], "random", {})

    gap = found["arms"]["one"]["gaps"]["loss"]
    # Seeds differ by much more than 1, but one arm is exactly 1 lower under each of them.
    assert gap["mean"] == gap["low"] == gap["high"] == pytest.approx(-1)
    alone = unseen.measure([compared("a", {"random": rows, "one": lower})], "random", {})["arms"]["one"]["gaps"]["loss"]
    assert gap["p"] == pytest.approx(min(1, 2 * alone["p"]))
    assert found["prompts"] == 8


def test_an_arm_can_have_an_arm_of_its_own_to_be_compared_with():
    def rows(loss):
        return [[("a", 1, loss + seed), ("a", 1, loss + seed)] for seed in range(3)]

    scores = {"random": rows(5.0), "one": rows(4.0), "turbo": rows(4.5), "random like turbo": rows(3.0)}
    found = unseen.measure([compared("a", scores)], "random", {"turbo": "random like turbo"})["arms"]

    assert {name: arm["against"] for name, arm in found.items()} == {
        "random": None,
        "one": "random",
        "turbo": "random like turbo",
        "random like turbo": None,
    }
    assert found["one"]["gaps"]["loss"]["mean"] == pytest.approx(-1)
    assert found["turbo"]["gaps"]["loss"]["mean"] == pytest.approx(1.5)
    assert not found["random like turbo"]["gaps"]


@pytest.mark.parametrize("path", sorted((Path(unseen.__file__).parent / "recipes").glob("*.yaml")), ids=str)
def test_a_recipe_begins_with_a_command_that_can_be_given(path):
    head = itertools.takewhile(lambda line: line != "#", path.read_text().splitlines())
    module, *words = shlex.split(" ".join(line.removeprefix("#") for line in head).replace("python -m ", ""))
    given = unseen.parse(words)

    assert module == "benchmarks.unseen"
    assert Path(given.recipe).name == path.name
    assert given.results == Path("benchmarks/results")
    recipe = bellwether.load_recipe(path, given.overrides)
    assert unseen._checked(recipe, given.against, given.pairs) is recipe.compare


def test_without_unseen_categories_all_scored_rows_count():
    found = unseen.measure(
        [compared("", {"random": [[("a", 1, 1.0), ("b", 1, 3.0), ("b", 1, 5.0)]] * 2})], "random", {}
    )

    assert found["arms"]["random"]["scores"]["loss"]["mean"] == pytest.approx((1 + 4) / 2)
    assert found["arms"]["random"]["seen_loss"] is None


STARTER = Path(bellwether.__file__).parent / "model" / "starter"
TINY = """
name: tiny
partition: {clients: 4}
federation: {rounds: 1, cohort_size: 2}
evaluation: {every: 0, generate: false}
compare:
  seeds: [0, 1]
  arms:
    base: {trains: nobody}
    random: {set: {selection.method: random, selection.rows: 1}}
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Where two categories were unseen in turn: the folder, and what was printed."""
    folder = tmp_path_factory.mktemp("unseen")
    (folder / "tiny.yaml").write_text(TINY)
    words = ["--categories", "open_qa", "closed_qa", "--out", str(folder / "out"), "--results", str(folder / "results")]
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr("sys.argv", ["unseen", str(folder / "tiny.yaml"), *words, "--training-rows", "7"])
        unseen.main()
    return folder, out.getvalue(), err.getvalue()


def test_comparisons_run_once_for_each_unseen_category_and_are_shown(measured):
    folder, out, err = measured
    assert "4/4 random, seed 1" in err
    assert "| random | " in out
    assert "closed_qa, open_qa" in out
    found = report.read(folder / "results")["unseen-tiny"]
    assert found["strata"] == ["closed_qa", "open_qa"]
    assert found["prompts"] == 80
    for category in ("open_qa", "closed_qa"):
        assert read_comparison(folder / "out" / category).recipe.data.unseen_categories == (category,)
    assert "rouge_l" not in found["arms"]["random"]["scores"]  # nothing was generated
    assert "### Unseen tasks: tiny" in report.render({"unseen-tiny": found})


def test_the_loss_on_training_rows_is_that_of_transformers_with_the_adapter_in_peft(measured, monkeypatch):
    folder = measured[0] / "out" / "open_qa"
    load = unseen.load_base
    monkeypatch.setattr(unseen, "load_base", lambda settings: exact_base(load(settings)))
    monkeypatch.setattr(unseen, "LoraLayers", functools.partial(unseen.LoraLayers, dtype=torch.float64))
    comparison = read_comparison(folder)
    found = unseen.training_losses([comparison], [folder], 7)

    def mean_loss(adapted):
        losses = []
        for seed in (0, 1):
            rows = unseen._training_rows(comparison, seed, 7)
            assert len(rows) == 7
            assert "open_qa" not in {row.category for row in rows}
            model = in_float64(AutoModelForCausalLM.from_pretrained(STARTER, dtype=torch.float32))
            if adapted:
                adapter = folder / "random" / f"seed-{seed}" / "run" / "adapter"
                model = PeftModel.from_pretrained(model, str(adapter), autocast_adapter_dtype=False)
            nats = tokens = 0
            for row in rows:
                ids_1T, counted_T = torch.from_numpy(row.ids_T)[None], torch.from_numpy(row.response_T)[1:]
                with torch.no_grad():
                    logits_TV = model(input_ids=ids_1T).logits[0, :-1]
                nats += torch.nn.functional.cross_entropy(logits_TV, ids_1T[0, 1:], reduction="none")[counted_T].sum()
                tokens += int(counted_T.sum())
            losses.append(float(nats) / tokens)
        return sum(losses) / 2

    assert found["base"] == pytest.approx(mean_loss(adapted=False), rel=FLOAT64)
    assert found["random"] == pytest.approx(mean_loss(adapted=True), rel=FLOAT64)
    assert found["random"] != pytest.approx(found["base"], rel=1e-3)


def test_the_short_table_has_a_line_for_each_arm_and_shares_of_the_rows_that_all_would_make():
    def arm(rows, loss):
        score = {"mean": loss, "low": loss - 0.1, "high": loss + 0.1}
        costs = {"rows_seen": rows, "rows": rows / 5, "rows_of_all": 40}
        return {"scores": {"loss": score, "rouge_l": {**score, "mean": 0.25}}, "costs": costs}

    starter = {"arms": {"full": arm(200, 2.0), "few": arm(10, 1.5)}}
    dolly = {"arms": {"full": arm(400, 3.0), "other": arm(100, 3.5)}}
    del dolly["arms"]["other"]["scores"]["rouge_l"]
    epochs = {"arms": {"few": arm(10, 1.5)}, "training_loss": {"few": 0.25}}
    lines = choosing.chosen({"unseen-starter": starter, "unseen-dolly-05": dolly, "unseen-epochs": epochs}).split("\n")
    assert "| few | 1.500 (1.400 to 1.600), ROUGE-L 25.0, 5% trained, 5% used |  |" in lines
    assert "| other |  | 3.500 (3.400 to 3.600), 25% trained, 50% used |" in lines
    assert "| few | 0.250 | 1.500 (1.400 to 1.600) | 25.0 |" in lines


@pytest.mark.parametrize(
    ("arms", "text"),
    [
        ("{base: {trains: nobody}}", "compare.arms names no 'random', which is to be compared"),
        ("{random: {}, local: {trains: alone}}", "compare.arms.local trains clients alone"),
    ],
)
def test_what_cannot_be_compared_is_said_before_anything_is_trained(tmp_path, monkeypatch, arms, text):
    (tmp_path / "tiny.yaml").write_text(f"name: tiny\ncompare: {{seeds: [0], arms: {arms}}}\n")
    monkeypatch.setattr("sys.argv", ["unseen", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=text):
        unseen.main()
    assert not (tmp_path / "out").exists()
