import json
import os
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from bellwether import load_recipe
from bellwether.data.rows import Federated, Row, Tokenised, TokenRow
from bellwether.errors import RecipeError
from bellwether.recipe.file import with_overrides
from bellwether.report.holdings import draw, table
from bellwether.runner.describe import describe, label_skew
from bellwether.runner.prepare import prepare


def rows(**sizes):
    return [Row("a", "b", category=category) for category, size in sizes.items() for _ in range(size)]


def token_rows(*lengths):
    return [TokenRow(np.zeros(n, np.int64), np.ones(n, bool), np.ones(n, bool), 0, Row("a", "b")) for n in lengths]


@pytest.fixture
def federated():
    return Federated(
        {"north": rows(x=30, y=10), "south": rows(x=10, z=10)}, {"south": rows(z=5)}, [], rows(x=3), ("n",)
    )


def test_label_skew_is_half_the_summed_difference_of_shares():
    assert label_skew({"x": 3, "y": 1}, {"x": 4, "y": 1, "z": 1}) == pytest.approx(0.5 * (1 / 12 + 1 / 12 + 1 / 6))
    assert label_skew({"x": 3}, {"x": 30}) == 0
    assert label_skew({"x": 1}, {"x": 0, "y": 5}) == 1


@pytest.mark.integration
def test_label_skew_is_the_same_in_every_process():
    script = (
        "from bellwether.runner.describe import label_skew\n"
        "pooled = {f'category {number}': 3 + number % 11 for number in range(60)}\n"
        "print([label_skew({name: 1 + place}, pooled).hex() for place, name in enumerate(pooled)])"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
        for seed in (1, 2)
    }
    assert len(said) == 1


def test_a_description_counts_what_each_client_holds(federated):
    made = describe(
        federated, {"north": Tokenised(token_rows(4, 8, 90), 2, 1, 3), "south": Tokenised(token_rows(5), 0, 0, 0)}
    )
    north, south = made.clients
    assert (north.rows, north.held_out, dict(north.categories)) == (40, 0, {"x": 30, "y": 10})
    assert (north.median_tokens, north.longest_tokens, north.shortened, north.left_out, north.cut) == (8, 90, 2, 1, 3)
    assert (south.rows, south.held_out) == (20, 5)
    # Pooled shares are 4/6, 1/6 and 1/6.
    assert north.skew == pytest.approx(1 / 6)
    assert south.skew == pytest.approx(1 / 3)
    assert made.skew == pytest.approx((40 / 6 + 20 / 3) / 60)
    assert made.categories == {"x": 40, "y": 10, "z": 10}
    assert (made.rows, made.test, made.validation) == (60, 3, 0)


def test_the_table_shows_names_as_they_are(federated):
    odd = Federated({"[red]a[/red]": rows(**{"[b]": 2})}, {}, [], [])
    console = Console(width=200, record=True)
    console.print(table(describe(odd)))
    console.print(table(describe(federated, {"north": Tokenised([]), "south": Tokenised(token_rows(5))})))
    text = console.export_text()
    assert "[red]a[/red]" in text
    assert "[b] 2" in text
    assert "x 30, y 10" in text
    assert "total variation" in text


def printed(federated, width=120):
    console = Console(width=width, record=True)
    console.print(table(describe(federated)))
    return console.export_text()


def test_the_table_shows_each_clients_group_where_there_are_several(federated):
    def grouped(**sizes):
        return [Row("a", "b", category="x", group=group) for group, size in sizes.items() for _ in range(size)]

    text = printed(Federated({"c1": grouped(en=3), "c2": grouped(fr=2), "c3": grouped(en=1, fr=4)}, {}, [], []))
    cells = {line.split()[0]: " ".join(line.split()[3:]) for line in text.splitlines() if line.strip()}
    assert (cells["c1"], cells["c2"], cells["c3"]) == ("en x 3", "fr x 2", "fr 4, en 1 x 5")
    assert cells["all"] == "fr 6, en 4 x 10"
    assert "group" not in printed(federated)
    assert "group" not in printed(Federated({"c1": grouped(en=3)}, {}, [], []))


@pytest.mark.parametrize("clients", [1, 10, 100, 500])
def test_the_picture_is_written_as_png_and_svg(tmp_path, clients):
    from matplotlib.image import imread

    names = [f"client-{n:03}" for n in range(clients)]
    made = describe(Federated({name: rows(x=n + 1, _y=3) for n, name in enumerate(names)}, {}, [], []))
    png, svg = draw(made, tmp_path)
    assert (png.name, svg.name) == ("clients.png", "clients.svg")
    height, width, _ = imread(png).shape
    assert 300 < height < 4000
    assert 500 < width < 4000
    text = svg.read_text()
    assert "<!-- training rows -->" in text
    assert text.count("<!-- client-") == min(clients, clients if clients <= 120 else 100)
    assert "<!--  _y -->" in text


def test_long_names_lie_so_that_they_can_be_read_and_many_categories_are_put_together(tmp_path):
    categories = {f"category {n:02}": 20 - n for n in range(14)}
    made = describe(Federated({"a name of some length": rows(**categories), "b $x$": rows(x=1)}, {}, [], []))
    text = draw(made, tmp_path)[1].read_text()
    assert "a name of some length" in text
    assert "6 other categories" in text
    assert "category 08" in text
    assert "category 09 " not in text
    assert "b $x$" in text


def test_equal_data_draws_equal_bytes(federated, tmp_path):
    draw(describe(federated), tmp_path)
    first = [(tmp_path / name).read_bytes() for name in ("clients.png", "clients.svg")]
    draw(describe(federated), tmp_path)
    assert [(tmp_path / name).read_bytes() for name in ("clients.png", "clients.svg")] == first


def test_notes_on_held_out_rows_count_all_of_them_and_say_how_many_are_scored(tiny_llama, tmp_path):
    texts = {"short": "yes", "long": "word " * 600}  # the model takes 512 tokens
    test = [("a", "short")] * 3 + [("a", "long")] * 2 + [("b", "short")] * 2
    train = tmp_path / "train.jsonl"
    held = tmp_path / "test.jsonl"
    row = {"instruction": "say", "context": "", "response": "yes", "category": "a"}
    train.write_text("".join(json.dumps({**row, "instruction": f"say {number}"}) + "\n" for number in range(4)))
    held.write_text(
        "".join(
            json.dumps({**row, "context": texts[kind], "category": category, "instruction": f"ask {number}"}) + "\n"
            for number, (category, kind) in enumerate(test)
        )
    )
    recipe = load_recipe(
        "default",
        [
            f"model.path={tiny_llama}",
            f"data.sources=[{train}]",
            f"data.test_sources=[{held}]",
            "partition.method=iid",
            "partition.clients=2",
            "partition.categories_per_client=2",
            "partition.rows_per_client=null",
            "lora.target_modules=[q_proj]",
            "evaluation.max_rows_per_category=2",
        ],
    )

    notes = prepare(recipe).notes

    assert any(note.startswith("Of 7 test rows, 2 had their context shortened, 0 their response cut") for note in notes)
    assert "evaluation.max_rows_per_category: 4 of 7 rows are scored." in notes
    kind = prepare(recipe).scored.rows[0].row.category
    one = prepare(with_overrides(recipe, {"evaluation.categories": [kind]}))
    assert {row.row.category for row in one.scored.rows} == {kind}
    assert len(one.clients) == 2
    assert any(note.startswith("evaluation.categories: ") and f" of {kind} are scored" in note for note in one.notes)
    with pytest.raises(RecipeError, match="evaluation.categories names 'poetry', but no test row is of that category"):
        prepare(with_overrides(recipe, {"evaluation.categories": ["poetry"]}))
    # Who has no such rows, as a site or a coordinator may have none, scores none.
    nobodys = {"evaluation.categories": [kind], "data.test_sources": [], "data.test_rows_per_category": 0}
    assert not prepare(with_overrides(recipe, nobodys)).scored.rows
    everything = prepare(with_overrides(recipe, {"evaluation.max_rows_per_category": None})).notes
    assert not any("are scored" in note for note in everything)
