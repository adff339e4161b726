import json

import pytest

from bellwether.data.federated import load_federated
from bellwether.errors import DataError
from bellwether.recipe.file import load_recipe
from bellwether.recipe.recipe import Training
from bellwether.runner.init import propose
from bellwether.tools.randomness import Randomness


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def dolly(size, **more):
    return [
        {"instruction": f"i {n}", "context": "c" * n, "response": "r", "category": f"k{n % 3}", **more}
        for n in range(size)
    ]


def loaded(text, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return load_recipe(path)


def test_one_file_with_categories_is_dealt_by_category(tmp_path):
    source = write(tmp_path / "my rows.jsonl", dolly(90, note="x"))
    text = propose([source])
    recipe = loaded(text, tmp_path)
    assert recipe.name == "my-rows"
    assert recipe.data.sources == (str(source),)
    assert (recipe.partition.method, recipe.partition.clients) == ("dirichlet", 4)
    assert recipe.data.test_rows_per_category == 6
    assert "# Seen: 90 rows in 1 file(s)." in text
    assert "3 categories with their rows: k0 (30), k1 (30), k2 (30)." in text
    assert "not used: 'note'" in text
    assert "recipe.yaml" not in text
    assert recipe.training.learning_rate == Training().learning_rate
    assert len(load_federated(recipe.data, recipe.partition, Randomness(0)).clients) == 4


def test_several_files_are_clients(tmp_path):
    sources = [write(tmp_path / f"site-{n}.jsonl", dolly(30 + n)) for n in range(3)]
    text = propose(sources)
    recipe = loaded(text, tmp_path)
    assert recipe.partition.method == "files"
    assert "the smallest has 30 rows, the largest 32" in text
    federated = load_federated(recipe.data, recipe.partition, Randomness(0))
    assert list(federated.clients) == ["site-0", "site-1", "site-2"]


def test_a_folder_is_one_source(tmp_path):
    folder = tmp_path / "sites"
    folder.mkdir()
    for n in range(30):
        write(folder / f"{n}.jsonl", dolly(9))
    recipe = loaded(propose([folder]), tmp_path)
    assert recipe.data.sources == (str(folder),)
    assert recipe.federation.fraction == 0.1


def test_rows_without_categories_are_dealt_evenly(tmp_path):
    recipe = loaded(
        propose([write(tmp_path / "a.jsonl", [{"input": "x", "prompt": "a", "output": "b"}] * 50)]), tmp_path
    )
    assert (recipe.partition.method, recipe.partition.clients) == ("iid", 2)


def test_columns_of_other_names_are_mapped(tmp_path):
    rows = [{"Query": f"a {n}", "Passage": "p", "completion": "b", "Topic": "t"} for n in range(30)]
    recipe = loaded(propose([write(tmp_path / "a.jsonl", rows)]), tmp_path)
    assert recipe.data.columns.model_dump() == {
        "instruction": "Query",
        "context": "Passage",
        "response": None,  # a usual name
        "category": "Topic",
        "messages": None,
        "group": None,
    }
    assert len(load_federated(recipe.data, recipe.partition, Randomness(0)).test) == 6


def test_chats_are_recognised(tmp_path):
    chat = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    recipe = loaded(
        propose([write(tmp_path / "a.jsonl", [{"id": str(n), "conversations": chat} for n in range(30)])]), tmp_path
    )
    assert recipe.data.columns.messages is None
    rows = [{"id": str(n), "dialog": chat} for n in range(30)]
    assert loaded(propose([write(tmp_path / "b.jsonl", rows)]), tmp_path).data.columns.messages == "dialog"


def test_a_column_that_could_name_clients_is_pointed_out(tmp_path):
    rows = [{**row, "hospital": f"h{n % 4}", "id": n} for n, row in enumerate(dolly(60))]
    text = propose([write(tmp_path / "a.jsonl", rows)])
    assert "The column hospital could name 4 clients" in text
    assert "`method: column` and `column: hospital`" in text
    assert "column id could" not in text


def test_groups_are_told_with_how_to_give_them_clients(tmp_path):
    rows = [{"instruction": "a", "response": "b", "language": "en" if n % 3 else "fr"} for n in range(60)]
    source = write(tmp_path / "a.jsonl", rows)
    text = propose([source])
    assert loaded(text, tmp_path).partition.clients_per_group is None
    assert "Rows are of 2 groups: en (40), fr (20)." in text
    assert "clients_per_group" not in propose([write(tmp_path / "b.jsonl", rows[1:3] * 20)])


def test_no_text_of_the_files_leaves_its_comment(tmp_path):
    odd = "k\nseed: 7\u2028model: x"
    rows = [{"instruction": "a", "response": "b", "category": odd, "col\nseed: 8": "x"} for _ in range(30)]
    source = write(tmp_path / "a: [b] #c.jsonl", rows)
    recipe = loaded(propose([source]), tmp_path)
    assert recipe.seed == 0
    assert recipe.data.sources == (str(source),)


def test_columns_that_fit_nothing_are_named(tmp_path):
    with pytest.raises(DataError, match=r"no columns look like .* \(there are foo, bar\)"):
        propose([write(tmp_path / "a.jsonl", [{"foo": 1, "bar": 2}])])


def test_bad_rows_are_found_at_once(tmp_path):
    with pytest.raises(DataError, match=r"a\.jsonl:2: the field 'response' is empty"):
        propose([write(tmp_path / "a.jsonl", [*dolly(1), {"instruction": "a", "response": ""}])])
    with pytest.raises(DataError, match="there is no such file"):
        propose([tmp_path / "b.jsonl"])
    with pytest.raises(DataError, match="no file is named"):
        propose([])
