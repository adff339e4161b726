"""Whole runs in which clients choose their rows: what lies where afterwards, and that a crash changes nothing."""

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import TINY_RECIPE, call, dolly_rows, json_lines, write_rows
from test_model_proxy import encoder_folder
from test_resume import RESULTS, Stopped, newest, timeless

from bellwether.client.memory import recall
from bellwether.exchange.records import ClientFinished, SurveyFinished
from bellwether.recipe.file import load_recipe
from bellwether.runner.run import run
from bellwether.store.run_folder import client_folders
from bellwether.tools.atomic import TEMPORARY

SELECT = [
    *("selection.method=hierarchical", "selection.min_cluster_rows=2", "selection.dimensions=4"),
    *("federation.rounds=3", "federation.fraction=1", "lora.dropout=0.1", "evaluation.generate=false"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_llama, dolly_like) -> Path:
    """A folder with the tiny recipe in it."""
    folder = tmp_path_factory.mktemp("selected")
    (folder / "tiny.yaml").write_text(TINY_RECIPE.format(model=tiny_llama, data=dolly_like))
    return folder


@pytest.fixture(scope="module")
def finished(place) -> Path:
    """A finished run with a survey in each round. Read only."""
    outcome = call("run", place / "tiny.yaml", *SELECT, "--out", place / "run")
    assert outcome.code == 0, outcome.err
    return place / "run"


@pytest.fixture(scope="module")
def unselected(place) -> Path:
    """A finished run whose clients are too small for any cluster. Read only."""
    words = [*SELECT, "selection.min_cluster_rows=9"]
    outcome = call("run", place / "tiny.yaml", *words, "--out", place / "none")
    assert outcome.code == 0, outcome.err
    (place / "none" / "said.txt").write_text(outcome.out)
    return place / "none"


def own_files(path: Path) -> dict[str, bytes]:
    """What the clients of a run keep for themselves of the rows they trained on."""
    return {
        str(file.relative_to(path)): file.read_bytes() for file in sorted((path / "clients").rglob("selected/*.json"))
    }


def same(one: Path, other: Path) -> None:
    """Check that two runs ended alike, in what the server has and in what clients chose."""
    for name in RESULTS:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert timeless(one) == timeless(other)
    assert own_files(one) == own_files(other)


# What lies where ----------------------------------------------------------------------------------


def test_selected_rows_stand_in_the_clients_own_part_and_nowhere_else(finished):
    chosen = {name: json.loads(content) for name, content in own_files(finished).items()}
    rounds = json_lines(finished / "rounds.jsonl")
    assert len(chosen) == sum(len(record["clients"]) for record in rounds) > 3
    places = [place for one in chosen.values() for place in one["places"]]
    assert all(re.fullmatch(r".*rows\.jsonl:\d+", place) for place in places)
    outside = [
        path
        for path in finished.rglob("*")
        if path.is_file() and "clients" not in path.relative_to(finished).parts and path.suffix != ".html"
    ]
    assert len(outside) > 15
    for path in outside:
        text = path.read_bytes().decode("utf-8", "replace")
        assert not re.search(r"rows\.jsonl:\d", text), path
        assert not any(f'"rows": {json.dumps(one["rows"])}' in text for one in chosen.values()), path
        assert '"places"' not in text, path


def test_the_servers_record_of_a_round_has_centroids_and_the_bytes_that_left_each_client(finished):
    for record in json_lines(finished / "rounds.jsonl"):
        survey = record["survey"]
        assert set(survey) == {"centroids", "groups", "kept", "bytes_down", "sent"}
        sent = [point for points in survey["centroids"].values() for point in points]
        assert {len(point) for point in sent} == {4}
        assert survey["sent"] == {client: len(points) * 4 * 4 for client, points in survey["centroids"].items()}
        for client in record["clients"]:
            assert client["rows"] == client["selected"] == len(survey["kept"][client["client"]])
        trained = {client["client"] for client in record["clients"]}
        assert trained == {client for client, kept in survey["kept"].items() if kept}


def test_rows_that_were_chosen_are_the_clients_own(finished):
    described = json.loads((finished / "clients.json").read_text())
    rows = {client["client"]: client["rows"] for client in described["clients"]}
    for name, content in own_files(finished).items():
        client = name.split("/")[1].partition("-")[2]
        chosen = json.loads(content)
        assert chosen["round"] == int(Path(name).stem)
        assert len(chosen["rows"]) == len(set(chosen["places"]))
        assert max(chosen["rows"]) < rows[client]


def test_names_of_clients_that_are_no_folders_stay_within_the_run_and_apart(tmp_path):
    names = ["../../up", "a/b", "a-b", "a\\b", "..", ".", "con", "a:b", "A:B", "\0", "", "/etc", "é\u202e"]
    folders = client_folders(tmp_path, names)
    assert list(folders) == names
    assert len({str(path).casefold() for path in folders.values()}) == len(names)
    assert {path.parent for path in folders.values()} == {tmp_path / "clients"}
    for path in folders.values():
        path.mkdir(parents=True)
        assert path.resolve().parent == tmp_path / "clients"


# Processes and crashes ----------------------------------------------------------------------------


def test_two_processes_choose_and_train_to_the_bytes_of_one(place, tmp_path):
    public = write_rows(tmp_path / "public.jsonl", dolly_rows(("qa",), 12))
    words = [*SELECT, f"selection.projection_sources=[{public}]", "federation.rounds=2"]
    for name, processes in (("one", 1), ("two", 2)):
        outcome = call("run", place / "tiny.yaml", *words, f"engine.processes={processes}", "--out", tmp_path / name)
        assert outcome.code == 0, outcome.err
    assert own_files(tmp_path / "one")
    same(tmp_path / "two", tmp_path / "one")


def crashed(place: Path, path: Path, when, *words: str, number: int = 2) -> None:
    """Begin a run and stop it, as a power cut would, at an event of one of its rounds."""

    def watch(event):
        if isinstance(event, when) and event.round == number:
            raise Stopped

    with pytest.raises(Stopped):
        run(load_recipe(place / "tiny.yaml", [*SELECT, *words, f"output.folder={path}"]), watch=watch)
    assert newest(path) == number - 1


@pytest.mark.parametrize("when", [SurveyFinished, ClientFinished])
def test_a_run_that_is_stopped_within_a_round_goes_on_to_the_same_bytes(finished, place, tmp_path, when):
    crashed(place, tmp_path / "run", when)
    leftovers = [tmp_path / "run" / "clients" / "1-client-01" / "survey" / f"{TEMPORARY}9-0002.npz"]
    leftovers.append(tmp_path / "run" / "clients" / "1-client-01" / "selected" / f"{TEMPORARY}9-0002.json")
    for leftover in leftovers:
        leftover.parent.mkdir(parents=True, exist_ok=True)
        leftover.write_bytes(b"half")
    outcome = call("run", "--resume", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    same(tmp_path / "run", finished)
    assert not any(leftover.exists() for leftover in leftovers)


def test_features_that_outlast_rounds_are_the_same_after_a_crash(place, tmp_path):
    words = ("selection.refresh=2", "selection.method=k_center", "selection.rows=2")
    outcome = call("run", place / "tiny.yaml", *SELECT, *words, "--out", tmp_path / "truth")
    assert outcome.code == 0, outcome.err
    crashed(place, tmp_path / "run", ClientFinished, *words)
    assert call("run", "--resume", tmp_path / "run").code == 0
    same(tmp_path / "run", tmp_path / "truth")


def test_a_run_that_goes_back_to_an_older_checkpoint_takes_the_features_of_then(place, tmp_path):
    words = ("selection.refresh=2", "selection.rotate=true", "federation.rounds=4")
    outcome = call("run", place / "tiny.yaml", *SELECT, *words, "--out", tmp_path / "truth")
    assert outcome.code == 0, outcome.err
    crashed(place, tmp_path / "run", SurveyFinished, *words, number=3)
    own = tmp_path / "run" / "clients" / "1-client-01" / "survey"
    assert sorted(path.name for path in own.iterdir()) == ["0001.npz", "0003.npz"]
    (tmp_path / "run" / "checkpoints" / "0002" / "state.json").write_bytes(b"half")
    outcome = call("run", "--resume", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert "0002 is corrupt and was left out" in " ".join(outcome.out.split())
    same(tmp_path / "run", tmp_path / "truth")


def test_a_damaged_memory_ends_a_run_in_one_sentence_and_can_be_removed(finished, place, tmp_path):
    crashed(place, tmp_path / "run", SurveyFinished)
    path = tmp_path / "run" / "clients" / "2-client-02" / "survey" / "0002.npz"
    path.write_bytes(path.read_bytes()[:-50])
    outcome = call("run", "--resume", tmp_path / "run")
    assert outcome.code != 0
    assert "2-client-02/survey/0002.npz is not as it was written" in " ".join(outcome.err.split())
    assert "Traceback" not in outcome.err + outcome.out
    path.unlink()
    assert call("run", "--resume", tmp_path / "run").code == 0
    same(tmp_path / "run", finished)


# What a person sees -------------------------------------------------------------------------------


def test_a_run_in_which_nothing_is_ever_selected_keeps_its_adapter_and_says_so(unselected):
    rounds = json_lines(unselected / "rounds.jsonl")
    assert [(record["clients"], record["failure"]) for record in rounds] == [([], None)] * 3
    scores = json_lines(unselected / "evaluation.jsonl")
    assert scores[0] | {"round": 3} in scores  # the mean over categories, before and after
    assert len({record["adapter"] for record in rounds}) == 1
    said = (unselected / "said.txt").read_text()
    assert said.count("no row was selected, the adapter stays as it was") == 3
    assert "4 of 4 clients have fewer than the 9 rows that selection.min_cluster_rows=9 needs (client-01," in " ".join(
        said.split()
    )
    assert "nan" not in re.sub(r"/\S+", "", said).lower()


@pytest.mark.parametrize("name", ["finished", "unselected"])
def test_the_report_of_a_run_with_a_survey_is_whole(name, request, tmp_path):
    path = Path(shutil.copytree(request.getfixturevalue(name), tmp_path / "run"))
    outcome = call("report", path)
    assert outcome.code == 0, outcome.err
    page = (path / "report.html").read_text()
    text = re.sub(r"<(script|style|svg).*?</\1>|<[^>]*>", " ", page, flags=re.DOTALL)
    assert not re.search(r"\bnan\b", text, flags=re.IGNORECASE)
    assert "seconds: survey" in text
    assert "No text of clients' rows travelled, only centroids of their clusters, and the base stayed" in text
    assert "chosen by the method hierarchical" in text
    assert "nan" not in (path / "evaluation.csv").read_text().lower()
    assert (
        "only adapters with what the method adds to them, centroids of clusters of rows and totals travel"
        in (path / "adapter" / "README.md").read_text()
    )


@pytest.mark.parametrize(("least", "warned"), [(2, True), (5, False)])
def test_centroids_of_few_rows_are_warned_of(finished, place, least, warned):
    log = (finished / "log.txt").read_text()
    assert "warning: selection.min_cluster_rows is 2: a centroid of fewer than 5 rows may reveal" in log
    outcome = call("plan", place / "tiny.yaml", *SELECT, f"selection.min_cluster_rows={least}")
    assert ("a centroid of fewer than 5 rows may reveal" in " ".join(re.sub("[│]", "", outcome.out).split())) is warned


def test_a_plan_says_that_its_figures_are_of_all_rows(place, tiny_recipe):
    said = {}
    for method, more in (("full", []), ("random", ["selection.rows=3"]), ("hierarchical", [])):
        outcome = call("plan", tiny_recipe, f"selection.method={method}", *more)
        assert outcome.code == 0, outcome.err
        said[method] = " ".join(re.sub("[│]", "", outcome.out).split())
    assert "Rows are selected" not in said["full"]
    assert all("upper bounds" in said[method] for method in ("random", "hierarchical"))
    assert "A survey comes before each round" in said["hierarchical"]
    assert "A survey" not in said["random"]


def test_the_recipe_of_a_selection_is_printed_and_read_again(place, tmp_path):
    outcome = call("recipe", place / "tiny.yaml", *SELECT, "selection.layers=[0,-1]")
    assert outcome.code == 0, outcome.err
    (tmp_path / "again.yaml").write_text(outcome.out)
    words = [*SELECT, "selection.layers=[0,-1]"]
    assert load_recipe(tmp_path / "again.yaml", []).selection == load_recipe(place / "tiny.yaml", words).selection


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("selection.dimensions=33", "selection.dimensions is 33, but a row has 32 features; give at most that"),
        ("selection.layers=[2]", "selection.layers names 2, but the model has the hidden states 0"),
        ("selection.method=no_module:f", "no_module:f: the module no_module cannot be imported"),
        ("selection.projection_sources=[nowhere.jsonl]", "nowhere.jsonl"),
    ],
)
def test_what_a_selection_cannot_have_is_said_before_the_first_round(bellwether, place, tmp_path, word, text):
    more = ["selection.rows=2"] if "no_module" in word else []
    outcome = bellwether("run", place / "tiny.yaml", *SELECT, word, *more, "--out", tmp_path / "run")
    assert outcome.code == 2
    assert text in " ".join(outcome.err.split())
    assert not (tmp_path / "run").exists()


def test_public_rows_that_fit_the_space_need_to_be_more_than_its_dimensions(bellwether, place, dolly_like, tmp_path):
    public = write_rows(tmp_path / "public.jsonl", dolly_rows(("qa",), 12))
    words = [*SELECT, "federation.rounds=1", f"selection.projection_sources=[{public}]"]
    outcome = bellwether("run", place / "tiny.yaml", *words, "--out", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    [record] = json_lines(tmp_path / "run" / "rounds.jsonl")
    assert sum(map(len, record["survey"]["centroids"].values())) > 0
    outcome = bellwether("run", place / "tiny.yaml", *words, "selection.dimensions=12", "--out", tmp_path / "few")
    assert outcome.code == 2
    assert "a space of 12 dimensions cannot be fitted on 12 rows of public text" in " ".join(outcome.err.split())
    assert not (tmp_path / "few").exists()


def test_a_resumed_run_refuses_other_public_rows(bellwether, place, tmp_path):
    public = write_rows(tmp_path / "public.jsonl", dolly_rows(("qa",), 12))
    crashed(place, tmp_path / "run", SurveyFinished, f"selection.projection_sources=[{public}]")
    write_rows(public, dolly_rows(("qa",), 13))
    outcome = bellwether("run", "--resume", tmp_path / "run")
    assert (outcome.code, "its data is another one now" in " ".join(outcome.err.split())) == (2, True)


# A proxy ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def proxies(tmp_path_factory, tiny_llama) -> dict[str, Path]:
    """A sentence encoder and a causal model."""
    return {"encoder": encoder_folder(tmp_path_factory.mktemp("proxy") / "bert"), "causal": tiny_llama}


@pytest.mark.parametrize("kind", ["encoder", "causal"])
def test_with_a_proxy_processes_and_crashes_change_nothing_and_features_are_computed_once(
    proxies, place, tmp_path, kind
):
    turbo = ("selection.features=proxy", f"selection.proxy={proxies[kind]}")
    for name, processes in (("one", 1), ("two", 2)):
        words = [*SELECT, *turbo, f"engine.processes={processes}", "--out", tmp_path / name]
        outcome = call("run", place / "tiny.yaml", *words)
        assert outcome.code == 0, outcome.err
    same(tmp_path / "one", tmp_path / "two")
    crashed(place, tmp_path / "again", SurveyFinished, *turbo)
    assert call("run", "--resume", tmp_path / "again").code == 0
    same(tmp_path / "one", tmp_path / "again")
    remembered = list((tmp_path / "one" / "clients").glob("*/survey/*"))
    assert [path.name for path in remembered] == ["0001.npz"] * 4
    for path in remembered:
        memory = recall(path.parents[1], 3)
        assert (memory.computed, memory.surveyed) == (1, 3)
    assert len(own_files(tmp_path / "one")) > 3


def test_a_run_whose_proxy_was_exchanged_does_not_go_on(proxies, place, tmp_path):
    folder = Path(shutil.copytree(proxies["encoder"], tmp_path / "proxy"))
    crashed(place, tmp_path / "run", SurveyFinished, "selection.features=proxy", f"selection.proxy={folder}")
    vocabulary = folder / "tokenizer_config.json"
    before = vocabulary.read_bytes()
    vocabulary.write_bytes(before.replace(b"{", b"{ ", 1))
    outcome = call("run", "--resume", tmp_path / "run")
    assert outcome.code == 2
    assert "cannot go on, because its proxy is another one now" in " ".join(outcome.err.split())
    vocabulary.write_bytes(before)
    assert call("run", "--resume", tmp_path / "run").code == 0


def test_a_number_of_rows_beside_full_is_said_to_have_no_effect(bellwether, place, tmp_path):
    outcome = bellwether("run", place / "tiny.yaml", "selection.rows=2", "--out", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    said = " ".join((outcome.out + outcome.err).split())
    assert "selection.rows has no effect, since selection.method is full" in said


@pytest.mark.parametrize(
    ("kind", "word", "text"),
    [
        ("encoder", "selection.layers=[0,1]", "selection.layers is [0, 1], but the proxy"),
        ("encoder", "selection.dimensions=17", "selection.dimensions is 17, but a row has 16 features"),
        ("causal", "selection.layers=[2]", "selection.layers names 2, but the model has the hidden states 0"),
        ("causal", "selection.dimensions=33", "selection.dimensions is 33, but a row has 32 features"),
    ],
)
def test_what_a_proxy_cannot_give_is_said_before_the_first_round(
    bellwether, proxies, place, tmp_path, kind, word, text
):
    turbo = ("selection.features=proxy", f"selection.proxy={proxies[kind]}")
    outcome = bellwether("run", place / "tiny.yaml", *SELECT, *turbo, word, "--out", tmp_path / "run")
    assert outcome.code == 2
    assert text in " ".join(outcome.err.split())
    assert not (tmp_path / "run").exists()
