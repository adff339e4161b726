"""What one client serves, exported: of a run, against what it was trained to and scored with, and at its site."""

import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import json_lines

from bellwether.client.score import by_category, score
from bellwether.errors import CheckpointError, FederationError, RecipeError
from bellwether.exchange.adapter import adapter_files, read_adapter
from bellwether.exchange.scores import macro
from bellwether.model.base import load_base
from bellwether.model.lora import LoraLayers
from bellwether.recipe.file import load_recipe
from bellwether.report.report import report
from bellwether.runner.prepare import prepare
from bellwether.runner.run import run
from bellwether.runner.served import served_by
from bellwether.site.served import served
from bellwether.store.client_state import keep_state
from bellwether.store.finished import read_evaluations
from bellwether.store.run_folder import JOINED
from bellwether.tools.json_text import json_lines as lines_of

pytestmark = pytest.mark.integration

FIELDS = [
    "federation.rounds=2",
    "training.local_steps=2",
    "partition.client_test_fraction=0.25",
    "federation.fraction=1",
]
METHODS = {
    "ditto": ["method.name=ditto"],
    "feddpa": ["method.name=feddpa"],
    "tuned": ["method.fine_tune=true"],
    "folded": ["method.name=flora", "method.fine_tune=true", "lora.ranks=[1, 2]"],
}


@pytest.mark.parametrize("method", METHODS)
def test_what_is_exported_of_a_client_scores_its_own_rows_and_everybodys_as_the_run_did(tiny_recipe, tmp_path, method):
    recipe = load_recipe(tiny_recipe, [*FIELDS, *METHODS[method], f"output.folder={tmp_path / 'run'}"])
    run(recipe)
    prepared = prepare(recipe)
    base = load_base(recipe.model, prepared.base)
    last = read_evaluations(tmp_path / "run")[-1]
    assert last.elsewhere.keys() == last.clients.keys()
    for client in last.clients:
        adapter = served_by(tmp_path / "run", client)
        layers = LoraLayers(base.model, adapter.config)
        layers.load(0, adapter.tensors)
        for rows, told in (
            (prepared.held_out[client].rows, last.clients[client]),
            (prepared.scored.rows, last.elsewhere[client]),
        ):
            scored = by_category(rows, score(base, layers, rows, recipe.evaluation, prepared.stop))
            assert scored.keys() == told.keys()
            for category, totals in scored.items():
                # What was folded into the base is a factor of the adapter here: a sum of a few float32 products more.
                near = 1e-4 if method == "folded" else 1e-6
                assert totals.loss == pytest.approx(told[category].loss, rel=near)
        layers.detach()
    report(tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    losses = [macro(totals).loss for totals in last.elsewhere.values()]
    assert f"what clients serve has a loss of {np.mean(losses):.3f} in the mean of 4 clients" in page


def test_a_clients_adapter_is_written_in_pefts_format_and_another_one_than_all_share(bellwether, tiny_recipe, tmp_path):
    done = bellwether("run", tiny_recipe, *FIELDS, "method.name=ditto", "--out", tmp_path / "run")
    assert done.code == 0, done.err
    client = json_lines(tmp_path / "run" / "rounds.jsonl")[-1]["cohort"][0]
    out = tmp_path / "own"
    done = bellwether("export", tmp_path / "run", out, "--client", client, "--adapter")
    assert done.code == 0, done.err
    assert not (out / "README.md").exists()  # the card is of what all share
    own, shared = read_adapter(out), read_adapter(tmp_path / "run" / "adapter")
    expected = served_by(tmp_path / "run", client)
    for key, value in expected.tensors.items():
        np.testing.assert_array_equal(own.tensors[key], value)
    assert own.fingerprint() != shared.fingerprint()
    done = bellwether("export", tmp_path / "run", tmp_path / "other", "--client", "nobody")
    assert done.code == 2
    assert "There is no client 'nobody' in" in done.err


def test_a_client_without_an_adapter_of_its_own_is_refused_in_one_sentence(tiny_run):
    with pytest.raises(RecipeError, match="With the method fedavg clients serve the adapter that all share: export"):
        served_by(tiny_run[0], "client-1")


def test_what_a_client_kept_and_is_gone_is_said(tiny_recipe, tmp_path):
    path = tmp_path / "run"
    run(load_recipe(tiny_recipe, [*FIELDS, "method.name=ditto", f"output.folder={path}"]))
    client = next(iter(read_evaluations(path)[-1].clients))
    for file in path.glob("clients/*/method/0002.npz"):
        file.unlink()
    with pytest.raises(CheckpointError, match=f"What {client} kept of round 2 is gone"):
        served_by(path, client)
    (path / "clients").rename(path / "elsewhere")
    with pytest.raises(CheckpointError, match="over sites lie at the sites; there bellwether export takes the site's"):
        served_by(path, client)


@pytest.fixture
def site(tiny_recipe, tmp_path):
    """A site's folder, with the result of a federation and what its client kept."""

    def make(*fields):
        path = tmp_path / "run"
        run(load_recipe(tiny_recipe, [*FIELDS, *fields, f"output.folder={path}"]))
        client, home = next(iter(read_evaluations(path)[-1].clients)), tmp_path / "site"
        (home / "adapter").mkdir(parents=True)
        for name, content in adapter_files(read_adapter(path / "adapter")).items():
            (home / "adapter" / name).write_bytes(content)
        (home / "adapter" / JOINED).write_bytes(lines_of([{"federation": "0123456789abcdef", "rounds": 2}]))
        (home / "recipe.yaml").write_bytes((path / "recipe.yaml").read_bytes())
        (kept,) = path.glob(f"clients/*-{client}/method")
        kept.parent.rename(_made(home / "clients" / "0123456789ab") / client)
        return home, client

    return make


def _made(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def test_a_site_exports_what_it_serves_from_its_own_folder(site, tmp_path):
    home, client = site("method.name=feddpa")
    adapter = served(home, client)
    assert adapter.config.rank == 2 * read_adapter(home / "adapter").config.rank
    (tmp_path / "run" / "clients" / f"1-{client}").mkdir(parents=True, exist_ok=True)
    (home / "clients" / "0123456789ab" / client / "method").rename(
        tmp_path / "run" / "clients" / f"1-{client}" / "method"
    )
    assert adapter.fingerprint() == served_by(tmp_path / "run", client).fingerprint()
    with pytest.raises(CheckpointError, match="has trained nothing of its own, or it is gone"):
        served(home, client)
    with pytest.raises(FederationError, match="is not the site 'other': it keeps nothing of it"):
        served(home, "other")
    with pytest.raises(FederationError, match="holds no result of a federation; give a site's own folder"):
        served(tmp_path / "nowhere", client)
    keep_state(home / "clients" / "0123456789ab" / client, "method", 2, {})
    assert served(home, client).fingerprint() == read_adapter(home / "adapter").fingerprint()


def test_a_site_does_not_make_up_what_it_cannot_know(site, tmp_path):
    home, client = site("method.name=flora", "method.fine_tune=true")
    with pytest.raises(FederationError, match="the method flora folds updates into the base"):
        served(home, client)


def test_a_folder_of_neither_a_run_nor_a_site_is_told_before_the_packages_of_sites_are_wanted(
    tmp_path, bellwether, monkeypatch
):
    monkeypatch.setitem(sys.modules, "bellwether.site.served", None)  # as where cryptography is not installed
    outcome = bellwether("export", tmp_path, tmp_path / "out", "--client", "client-01")
    assert outcome.code != 0
    assert "holds neither a finished run nor a site with the result of its federation" in outcome.err
    assert not (tmp_path / "out").exists()
