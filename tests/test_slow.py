"""What takes more than half a minute: whole runs at full length, on the embedded and on real data."""

import contextlib
import os
from collections import defaultdict
from statistics import mean

import pytest
import torch

from bellwether.client.batches import collate
from bellwether.exchange.scores import means
from bellwether.model.base import load_base
from bellwether.model.forward import token_losses
from bellwether.model.lora import LoraLayers
from bellwether.recipe.file import find_recipe, load_recipe
from bellwether.runner.prepare import prepare
from bellwether.runner.run import run

pytestmark = pytest.mark.slow


@torch.no_grad()
def losses_by_part(result, tuned):
    """The mean loss on each part of the answers to questions about a text, with a run's adapter or without it.

    "The chain was shown by Silo." speaks of the chain, which the question names; Silo is looked up in the text. Where a
    thing was ("The chain was in Ritton.") the base cannot look up. All else is the form of an answer.
    """
    prepared = prepare(load_recipe(result.folder / "recipe.yaml"))
    base = load_base(prepared.recipe.model)
    layers = LoraLayers(base.model, result.adapter.config)
    layers.load(0, result.adapter.tensors)
    parts = defaultdict(list)
    with contextlib.nullcontext() if tuned else layers.disabled():
        for row in (row for row in prepared.scored.rows if row.category == "closed_qa"):
            losses = token_losses(base.model, layers, collate([row], base.device, responses=True)).tolist()
            thing = row.row.response.startswith("The ")
            found = "where a thing was" if thing and " was in " in row.row.response else "looked up"
            for place, loss in enumerate(losses):  # every word is one token; the answer's last, a full stop and an end
                part = "spoken of" if place == int(thing) else found if place == len(losses) - 3 else "form"
                parts[part].append(loss)
    layers.detach()
    return {part: mean(losses) for part, losses in parts.items()}


def test_the_default_run_learns_every_category_of_the_embedded_world(tmp_path):
    shares, exact = defaultdict(list), []
    for seed in range(3):
        result = run(load_recipe(find_recipe("default"), [f"seed={seed}", f"output.folder={tmp_path / str(seed)}"]))
        first, last = result.evaluations[0].categories, result.evaluations[-1].categories
        assert len(last) == 8
        for category in last:
            before, after = means(first[category]), means(last[category])
            shares[category].append(after.loss / before.loss)
            assert after.rouge_l > before.rouge_l, category
        assert result.before.exact == 0
        exact.append(result.after.exact)
        untuned, tuned = (losses_by_part(result, with_adapter) for with_adapter in (False, True))
        assert tuned["form"] < 0.3 * untuned["form"]
        assert tuned["looked up"] < 0.3
    # What is left of closed_qa's loss stands on what answers speak of and on where a thing was: see docs/starter.md,
    # where under five seeds 0.352 of it were left, with a standard deviation of 0.135, and of any other 0.13 at most.
    left = {category: mean(values) for category, values in shares.items()}
    assert left.pop("closed_qa") < 0.352 + 3 * 0.135 / 3**0.5, shares
    assert max(left.values()) < 0.3, shares
    assert mean(exact) > 0.4


def test_on_dolly_the_federated_model_ends_below_the_base_and_below_a_client_alone(shared, tmp_path, monkeypatch):
    (tmp_path / "only.py").write_text(
        "import os\ndef only(sampling):\n    return [sampling.clients[int(os.environ['ONLY'])]]\n"
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
