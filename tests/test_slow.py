"""What takes more than half a minute: whole runs at full length, on the embedded and on real data."""

import os

import pytest

from bellwether.exchange.scores import means
from bellwether.recipe.file import find_recipe, load_recipe
from bellwether.runner.run import run

pytestmark = pytest.mark.slow


def test_the_default_run_learns_every_category_of_the_embedded_world(tmp_path):
    result = run(load_recipe(find_recipe("default"), [f"output.folder={tmp_path / 'run'}"]))
    first, last = result.evaluations[0].categories, result.evaluations[-1].categories
    assert len(last) == 8
    for category in last:
        before, after = means(first[category]), means(last[category])
        assert after.loss < 0.3 * before.loss, category
        assert after.rouge_l > before.rouge_l, category
    assert result.before.exact == 0
    assert result.after.exact > 0.4


def test_on_dolly_the_federated_model_ends_below_the_base_and_below_a_client_alone(shared, tmp_path, monkeypatch):
    (tmp_path / "only.py").write_text(
        "import os\ndef only(clients, round, randomness):\n    return [clients[int(os.environ['ONLY'])]]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    fields = [
        f"model.path={shared / 'models' / 'stories260k'}",
        f"data.sources=[{shared / 'data' / 'databricks-dolly-15k.jsonl'}]",
        "data.max_rows=400",
        "training.learning_rate=3e-3",
        "evaluation.generate=false",
        "evaluation.every=0",
    ]
    # Half of the clients over ten rounds are five passes for each on average: so many has a client alone.
    whole = run(load_recipe(None, [*fields, "federation.rounds=10", f"output.folder={tmp_path / 'fedit'}"]))
    assert whole.after.loss < whole.before.loss
    for number in (0, 5):
        monkeypatch.setitem(os.environ, "ONLY", str(number))
        more = ["federation.rounds=5", "federation.sampler=only:only", f"output.folder={tmp_path / str(number)}"]
        alone = run(load_recipe(None, [*fields, *more]))
        assert whole.after.loss < alone.after.loss
