"""What a site's own policy forbids, of a recipe before it joins and of single tasks."""

import datetime
import hashlib
import importlib.metadata
from dataclasses import replace

import pytest

pytest.importorskip("flwr")

from test_federate import START

from bellwether.exchange.messages import EvaluateTask, Payload, TrainTask, client_draws
from bellwether.exchange.seal import Header
from bellwether.method.accounting import Release, epsilon
from bellwether.recipe.file import load_recipe
from bellwether.recipe.recipe import Evaluation, Training
from bellwether.site.ledger import LEDGER, Entry
from bellwether.site.policy import Policy, as_limit, forbidden, forbids_spending, forbids_task, minutes_worked
from bellwether.tools.journal import append
from bellwether.tools.randomness import Randomness

TASK = TrainTask(1, Payload(START), Training(), 1, client_draws(Randomness(0), 1, "a"))
OWN = "def fewest(logits, targets):\n    return logits\n"


def test_what_needs_no_code_of_others_is_allowed_where_nothing_is_said():
    assert forbidden(Policy(), load_recipe("fedhds")) == []
    assert forbids_task(Policy(), None, TASK) is None


def test_code_runs_only_where_its_very_file_is_listed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_loss_of_a_test.py").write_text(OWN)
    recipe = load_recipe(None, ["training.loss=own_loss_of_a_test:fewest"])
    listed = hashlib.sha256(OWN.encode()).hexdigest()
    assert "names own_loss_of_a_test:fewest" in forbidden(Policy(), recipe)[0]
    assert forbidden(Policy(code=(listed,)), recipe) == []
    (tmp_path / "own_loss_of_a_test.py").write_text(f"{OWN}# changed\n")
    assert forbidden(Policy(code=(listed,)), recipe)
    (tmp_path / "theirs").mkdir()
    trusting = load_recipe(None, ["model.path=theirs", "model.trust_remote_code=true"])
    assert "would run its own code" in forbidden(Policy(), trusting)[0]
    assert forbidden(Policy(trust_remote_code=("theirs",)), trusting) == []


def test_code_of_a_model_on_the_hub_runs_at_the_very_commit_alone_that_is_listed():
    commit, other = "0123456789" * 4, "f" * 40
    policy = Policy(trust_remote_code=("org/model", f"org/model@{commit}", "org/model@main", "org/model@v2"))

    def at(revision):
        fields = ["model.path=org/model", "model.trust_remote_code=true", f"model.revision={revision}"]
        return forbidden(policy, load_recipe(None, fields))

    assert at(f"'{commit}'") == []
    assert "does not list it as org/model@ffff" in at(other)[0]
    for revision in ("null", "main", "v2", "refs/pr/7", f"{commit[:12]}abc"):
        assert "its code can change, unless model.revision is a commit of 40 digits" in at(revision)[0]


def test_noise_has_a_floor_where_centroids_leave_the_site():
    recipe = load_recipe(None, ["selection.method=hierarchical"])
    assert forbidden(Policy(noise=0.5), recipe) == ["selection.noise is 0, where at least 0.5 is asked for"]
    assert forbidden(Policy(noise=0.5), load_recipe(None, [])) == []


def entry(time: str, way: str, number: str, day: int = 27) -> Entry:
    return Entry(f"2026-11-{day}T{time}+00:00", way, "train", "fed/1", 1, "a", number, 10, "0" * 64)


def test_what_is_spent_has_a_ceiling_and_rows_are_accounted_by_the_site_itself():
    def clauses(*fields, rows=1000):
        return forbids_spending(Policy(epsilon=8), load_recipe(None, ["federation.rounds=5", *fields]), rows)

    assert clauses() == clauses("privacy.noise=1") == ["no privacy.epsilon is spent, where at most 8 is allowed"]
    assert clauses("privacy.epsilon=8.5") == ["privacy.epsilon=8.5 is spent, where at most 8 is allowed"]
    assert clauses("privacy.epsilon=8") == []
    assert "must be below one in the 1,000 rows" in clauses("privacy.epsilon=8", "privacy.delta=0.005")[0]
    weak = clauses("privacy.unit=example", "privacy.noise=0.3")
    rate, steps = 8 / 1000, 1000 // 8
    spent = epsilon(Release(0.3, 5 * steps, rate), 1e-5)
    assert weak == [f"an epsilon of {spent:.3g} for rows is spent, where at most 8 is allowed"]
    assert clauses("privacy.unit=example", "privacy.noise=1.5") == []


def test_minutes_of_a_day_are_those_from_tasks_to_their_replies(tmp_path):
    for line in (
        entry("23:59:00.000", "task", "1"),
        entry("10:00:00.000", "task", "2"),
        entry("10:06:00.000", "reply", "2"),
        entry("11:00:00.000", "task", "3"),  # it was killed before it answered
        entry("12:00:00.000", "task", "4"),
        entry("12:01:30.000", "reply", "4"),
    ):
        append(tmp_path / LEDGER, line)
    assert minutes_worked(tmp_path, datetime.date(2026, 11, 27)) == 7.5
    assert minutes_worked(tmp_path, datetime.date(2026, 11, 28)) == 0


def test_a_task_over_midnight_counts_on_each_day_for_what_it_took_there(tmp_path):
    for line in (
        entry("23:50:00.000", "task", "1"),
        entry("20:00:00.000", "reply", "1", day=29),
        entry("20:00:30.000", "task", "2", day=29),
        entry("20:01:00.000", "reply", "2", day=29),
    ):
        append(tmp_path / LEDGER, line)
    by_day = [minutes_worked(tmp_path, datetime.date(2026, 11, day)) for day in (26, 27, 28, 29, 30)]
    assert by_day == [0, 10, 24 * 60, 20 * 60 + 0.5, 0]


def test_a_task_is_refused_when_the_day_or_the_line_is_full(tmp_path):
    now = datetime.datetime.now(datetime.UTC)
    begin = now.replace(hour=0, minute=0, second=0, microsecond=0)
    for way, time in (("task", begin), ("reply", begin + datetime.timedelta(minutes=31))):
        line = Entry(time.isoformat(), way, "train", "fed/1", 1, "a", "1", 10, "0" * 64)
        append(tmp_path / LEDGER, line)
    reason = forbids_task(Policy(minutes_per_day=30), tmp_path, TASK)
    assert reason == "it has worked 31 minutes today, where 30 are allowed"
    assert forbids_task(Policy(minutes_per_day=32), tmp_path, TASK) is None
    reason = forbids_task(Policy(megabytes_per_round=1e-5), tmp_path, TASK)
    assert reason == "an update has at least 108 B, and 10 B are allowed for a round"
    assert (
        forbids_task(Policy(megabytes_per_round=1e-5), tmp_path, EvaluateTask(0, Payload(START), Evaluation())) is None
    )


def test_what_a_client_is_sent_to_fold_is_no_part_of_its_update():
    assert forbids_task(Policy(megabytes_per_round=110e-6), None, TASK) is None
    folding = replace(TASK, payload=Payload(START, folded=START))
    assert forbids_task(Policy(megabytes_per_round=110e-6), None, folding) is None


def test_all_that_leaves_for_a_round_counts_an_answer_as_often_as_it_is_sent(tmp_path):
    def sent(kind, number, size, round=1, run="fed/1", failure=""):
        line = Entry(
            "2026-11-27T10:00:00+00:00", "reply", kind, run, round, "a", number, size, "0" * 64, "none", failure
        )
        append(tmp_path / LEDGER, line)

    limit = as_limit(Policy(megabytes_per_round=0.001), tmp_path)
    header = Header("task", "train", "fed/2", 1, "coordinator", "north", "a", "9", "0" * 64)
    assert limit(header, 1000) is None
    assert limit(header, 1001) == "an answer has 1.0 kB, and 1.0 kB are allowed for a round"
    sent("hello", "0", 5000)
    sent("survey", "1", 100)
    sent("survey", "1", 200)  # again
    sent("train", "2", 5000, round=2)
    sent("train", "3", 5000, run="another/1")
    sent("train", "4", 5000, failure="not done, so little left")
    assert limit(header, 700) is None
    reason = "an answer has 701 B, 300 B have left for this round before, and 1.0 kB are allowed for a round"
    assert limit(header, 701) == reason
    assert as_limit(Policy(), tmp_path)(header, 10**9) is None


@pytest.mark.parametrize(
    ("found", "sentence"), [(None, "is not installed here"), ("1.43.0", "1.43.0 is installed here")]
)
def test_without_the_pinned_flower_the_command_says_how_to_get_it(bellwether, monkeypatch, found, sentence):
    version = importlib.metadata.version

    def of(package):
        if package != "flwr":
            return version(package)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return found

    monkeypatch.setattr(importlib.metadata, "version", of)
    outcome = bellwether("federation", "rehearse", "default")
    assert outcome.code == 2
    assert sentence in outcome.err
    assert outcome.err.count("\n") == 1
