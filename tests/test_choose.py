"""A client's half of selection, against scikit-learn and cases worked by hand."""

import contextlib
import json
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from asking import survey_tasks, train_task, train_tasks
from rounding import FLOAT64, assert_rounded, gamma, unit
from sklearn.cluster import HDBSCAN
from tiny_models import random_adapter, tiny_base

from bellwether.client import choose
from bellwether.client.choose import Chooser
from bellwether.client.score import row_losses
from bellwether.client.train import train_chosen
from bellwether.data.rows import Row, TokenRow
from bellwether.engine.local import LocalEngine
from bellwether.errors import CheckpointError, RoundFailed
from bellwether.exchange.adapter import key_a, key_b
from bellwether.exchange.messages import Payload
from bellwether.method.average import fedavg
from bellwether.method.method import mean_of
from bellwether.method.select.space import random_projection
from bellwether.model.features import pooled_states
from bellwether.model.lora import LoraLayers
from bellwether.recipe import recipe
from bellwether.tools.randomness import Randomness

SEED = 5


def topic_rows(*counts: int, seed: int = 0) -> list[TokenRow]:
    """Rows of several topics, in turn: those of one end alike, so that their last hidden states lie together."""
    draw = np.random.default_rng(seed)
    rows = []
    for turn in range(max(counts)):
        for topic in (number for number, count in enumerate(counts) if turn < count):
            ids_T = np.random.default_rng(topic).integers(3, 300, 9 + topic % 3)
            ids_T[0] = draw.integers(3, 300)
            response_T = np.arange(len(ids_T)) >= 6 - turn % 4
            row = Row("i", f"r{topic}", category=f"t{topic}", place=f"rows:{len(rows) + 1}")
            rows.append(TokenRow(ids_T, response_T, response_T, int((~response_T).sum()), row))
    return rows


@pytest.fixture(scope="module")
def base():
    return tiny_base("llama", torch.float32)


@pytest.fixture(scope="module")
def adapter(base):
    return random_adapter(base, rank=2, dtype="float32", dropout=0.1)


class Client:
    """One client called ``a`` with its chooser, in a folder."""

    def __init__(self, base, layers, adapter, folder, rows, public=(), secret=None):
        self.base, self.layers, self.adapter, self.rows, self.folder = base, layers, adapter, rows, folder
        self.chooser = Chooser(base, layers, {"a": folder}, public, secret)

    def survey(self, round=1, adapter=None, held=None, seed=SEED, **selection):
        settings = recipe.Selection(**{**DEFAULTS, **selection})
        task = survey_tasks("a", adapter or self.adapter, settings, round=round, seed=seed)["a"]
        return self.chooser.survey("a", self.rows if held is None else held, task)

    def task(self, round=1, kept=(), training=None, **selection):
        settings = recipe.Selection(**{**DEFAULTS, **selection})
        asked = training or recipe.Training(batch_size=4)
        return train_task(self.adapter, asked, round=round, rounds=3, seed=SEED, selection=settings, kept=kept)

    def choose(self, round=1, kept=(), held=None, **selection):
        task = self.task(round, kept, **selection)
        return self.chooser.choose("a", self.rows if held is None else held, task)

    def states(self, rows=None, adapter=None, **how):
        self.layers.load(0, (adapter or self.adapter).tensors)
        return pooled_states(self.base, self.layers, [row.ids_T for row in rows or self.rows], **how)


DEFAULTS = {"method": "hierarchical", "space": "none", "min_cluster_rows": 4}


@pytest.fixture
def layers(base, adapter):
    found = LoraLayers(base.model, adapter.config)
    yield found
    found.detach()


@pytest.fixture
def make(base, layers, adapter, tmp_path):
    def client(rows=None, public=(), folder="a", secret=None):
        return Client(base, layers, adapter, tmp_path / folder, rows or topic_rows(8, 7, 6), public, secret)

    return client


def clusters_of(points_Nd, least):
    """Centroid and rows, nearest first, of each cluster, by scikit-learn and NumPy alone.

    The points stand in lexicographic order, since HDBSCAN breaks ties of distances by the order of its points.
    """
    order = sorted(range(len(points_Nd)), key=lambda row: tuple(points_Nd[row]))
    found = HDBSCAN(min_cluster_size=least, min_samples=least, copy=True).fit(np.asarray(points_Nd[order], np.float64))
    clusters = []
    for label in range(found.labels_.max() + 1):
        places = np.flatnonzero(found.labels_ == label)
        members, weights = np.array(order)[places], found.probabilities_[places]
        members_Rd = np.asarray(points_Nd[members], np.float64)
        centroid_d = (weights[:, None] * members_Rd).sum(0) / weights.sum()
        distances = np.linalg.norm(members_Rd - centroid_d, axis=1)
        clusters.append((centroid_d, members[distances.argsort()]))
    return clusters


def matched(centroids_Cd, clusters, points_Nd):
    """Which of the clusters of some points each centroid is, all of them once.

    In float32 a point may have been scaled, by a factor rounded itself, and kept; and its mean is sent.
    """
    gaps = np.array([[np.abs(one - other).max() for other, _ in clusters] for one in centroids_Cd])
    order = gaps.argmin(axis=1)
    assert sorted(order) == list(range(len(clusters)))
    assert gaps.min(axis=1).max() <= gamma(torch.float32, 4) * np.abs(points_Nd).max()
    return order


# Both halves of the hierarchical method -----------------------------------------------------------


@pytest.mark.parametrize(("pooling", "numbers"), [("last", "all"), ("mean", (-1,)), ("last", (1, 2))])
def test_centroids_and_rows_are_those_of_an_independent_computation(make, pooling, numbers):
    client = make(topic_rows(12, 11, 10))
    points_NF = client.states(pooling=pooling, chosen=None if numbers == "all" else numbers)
    expected = clusters_of(points_NF, 4)
    reply = client.survey(pooling=pooling, layers=numbers)
    assert len(expected) >= 2
    assert reply.survey.centroids_Cd.dtype == np.float32
    assert reply.survey.centroids_Cd.nbytes == len(expected) * points_NF.shape[1] * 4
    assert (reply.update, reply.totals, reply.failure, reply.losses) == (None, None, None, ())
    order = matched(reply.survey.centroids_Cd, expected, points_NF)
    for number in range(len(expected)):
        nearest = expected[order[number]][1]
        assert client.choose(kept=[number], pooling=pooling, layers=numbers) == [nearest[0]]
        assert client.choose(kept=[number], rows_per_cluster=3, pooling=pooling, layers=numbers) == sorted(nearest[:3])
    both = client.choose(kept=[0, 1], pooling=pooling, layers=numbers)
    assert both == sorted([expected[order[0]][1][0], expected[order[1]][1][0]])


def test_the_shared_space_is_one_orthonormal_projection_that_the_seed_draws(make):
    client = make()
    shared = {"space": "shared", "dimensions": 3}
    projection_Fd = random_projection(3 * 24, 3, Randomness(SEED).numpy("selection space"))
    points_Nd = client.states(pooling="last") @ projection_Fd
    expected = clusters_of(points_Nd, 4)
    matched(client.survey(**shared).survey.centroids_Cd, expected, points_Nd)
    # Another client, another round, the same space; another seed, another one.
    other = make(folder="b")
    one, two = client.survey(round=1, **shared), other.survey(round=2, **shared)
    np.testing.assert_array_equal(one.survey.centroids_Cd, two.survey.centroids_Cd)
    moved = client.survey(seed=SEED + 1, **shared).survey.centroids_Cd
    assert moved.shape != one.survey.centroids_Cd.shape or np.abs(moved - one.survey.centroids_Cd).max() > 0.1


def test_a_projection_fitted_on_public_rows_is_that_of_the_untuned_base_in_all_rounds(make, adapter):
    public = topic_rows(5, 5, 5, seed=9)
    client = make(public=public)
    shared = {"space": "shared", "dimensions": 2, "pooling": "mean"}
    with client.layers.disabled():
        states_PF = pooled_states(client.base, client.layers, [row.ids_T for row in public], pooling="mean")
    states_PF = states_PF.astype(np.float64)
    mean_F = states_PF.mean(axis=0)
    _, _, components_FF = np.linalg.svd(states_PF - mean_F, full_matrices=False)
    signs = []
    for round, scale in ((1, 1.0), (2, -2.0)):
        tuned = adapter.with_tensors({key: value * np.float32(scale) for key, value in adapter.tensors.items()})
        points_Nd = (client.states(adapter=tuned, pooling="mean") - mean_F) @ components_FF[:2].T
        client.survey(round, tuned, **shared)
        ours_Nd = np.load(client.folder / "survey" / f"{round:04d}.npz")["points"]
        # An axis of a decomposition may point either way, the same way for all points.
        signs_d = np.sign((ours_Nd * points_Nd).sum(axis=0))
        np.testing.assert_allclose(ours_Nd, points_Nd * signs_d, rtol=unit(torch.float32), atol=FLOAT64)
        signs.append(signs_d)
    np.testing.assert_array_equal(*signs)


@pytest.mark.parametrize("more", [{}, {"clip_norm": 3.0}])
def test_projecting_makes_no_second_array_as_large_as_the_features(make, more):
    features_NF = np.random.default_rng(0).normal(size=(20_000, 256)).astype(np.float32)
    client = make()
    settings = recipe.Selection(**DEFAULTS | {"space": "shared", "dimensions": 4} | more)
    task = survey_tasks("a", client.adapter, settings)["a"]
    client.chooser._reduced("a", features_NF[:300], task)
    tracemalloc.start()
    points_Nd = client.chooser._reduced("a", features_NF, task)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < features_NF.nbytes / 5
    projection_Fd = random_projection(256, 4, Randomness(0).numpy("selection space"))
    exact_NF = features_NF.astype(np.float64)
    exact_NF *= np.minimum(1, 3 / np.linalg.norm(exact_NF, axis=1, keepdims=True)) if more else 1
    # Clipping rounds a factor and a product in float32; the sum over 256 features is one in float64.
    precision, operations = (torch.float32, 3) if more else (torch.float64, 256)
    size_Nd = np.abs(exact_NF) @ np.abs(projection_Fd)
    assert_rounded(points_Nd, exact_NF @ projection_Fd, size_Nd, precision, operations)


def test_the_same_rows_are_chosen_in_whatever_order_they_stand(make):
    rows = topic_rows(8, 7, 6)
    client, places = make(rows), []
    orders = [list(range(len(rows))), list(range(len(rows)))[::-1], np.random.default_rng(1).permutation(len(rows))]
    for number, order in enumerate(orders):
        shuffled = [rows[index] for index in order]
        reply = client.survey(number + 1, held=shuffled)
        kept = list(range(len(reply.survey.centroids_Cd)))
        chosen = client.choose(number + 1, kept=kept, held=shuffled)
        places.append(sorted(shuffled[index].row.place for index in chosen))
    assert len(places[0]) >= 2
    assert places[0] == places[1] == places[2]


def test_the_rows_that_are_trained_are_those_that_were_chosen(make):
    client = make()
    client.survey()
    chosen = client.choose(kept=[0, 1], rows_per_cluster=2)
    task = client.task(kept=[0, 1], rows_per_cluster=2)
    [ours] = train_chosen(client.chooser.choose, client.base, client.layers, {"a": client.rows}, {"a": task}, fedavg())
    full = replace(task, selection=recipe.Selection())
    own = {"a": [client.rows[number] for number in chosen]}
    [theirs] = train_chosen(client.chooser.choose, client.base, client.layers, own, {"a": full}, fedavg())
    assert all(ours.update.tensors[key].tobytes() == value.tobytes() for key, value in theirs.update.tensors.items())
    assert (ours.update.rows, ours.update.metrics["selected"], ours.update.metrics["rows"]) == (4, 4.0, 4.0)
    kept = json.loads((client.folder / "selected" / "0001.json").read_text())
    assert kept == {"round": 1, "rows": chosen, "places": [f"rows:{number + 1}" for number in chosen]}


def test_a_client_of_fewer_rows_than_a_cluster_needs_sends_nothing(make):
    client = make(topic_rows(2, 1))
    sent_Cd = client.survey(space="shared", dimensions=2).survey.centroids_Cd
    assert (sent_Cd.shape, sent_Cd.nbytes) == ((0, 2), 0)


def test_a_small_client_of_enough_rows_is_one_cluster_of_equal_weights(make):
    client = make(topic_rows(5))
    sent_Cd = client.survey().survey.centroids_Cd
    mean_1F = client.states(pooling="last").astype(np.float64).mean(axis=0)[None]
    np.testing.assert_allclose(sent_Cd, mean_1F, rtol=unit(torch.float32), atol=FLOAT64)


def test_a_t_sne_of_each_clients_own_has_the_dimensions_and_repeats_with_the_seed(make):
    client, tsne = make(), {"space": "per_client_tsne", "dimensions": 2}
    one = client.survey(**tsne).survey.centroids_Cd
    assert one.shape[1] == 2
    assert make(folder="b").survey(**tsne).survey.centroids_Cd.tobytes() == one.tobytes()
    assert client.choose(kept=[0], **tsne)


# Clipping and noise -------------------------------------------------------------------------------


def test_rows_are_clipped_before_the_projection_and_noise_has_the_stated_size(make):
    client = make(topic_rows(*[6] * 8))
    norm = float(np.median(np.linalg.norm(client.states(pooling="last"), axis=1)))
    clipped_NF = client.states(pooling="last").astype(np.float64)
    clipped_NF *= np.minimum(1, norm / np.linalg.norm(clipped_NF, axis=1))[:, None]
    quiet_Cd = client.survey(clip_norm=norm).survey.centroids_Cd
    matched(quiet_Cd, clusters_of(clipped_NF, 4), clipped_NF)
    noise = [
        client.survey(round, clip_norm=norm, noise=0.5, refresh=0).survey.centroids_Cd - quiet_Cd for round in (1, 2)
    ]
    values = np.concatenate(noise).ravel()
    # By hand: 0.5 · 2 · norm; the error of a standard deviation of n draws is 1/sqrt(2n) of it.
    assert len(values) > 400
    assert abs(values.std() / norm - 1) < 4 / np.sqrt(2 * len(values))
    assert abs(values.mean()) < 4 * norm / np.sqrt(len(values))
    assert np.abs(noise[0] - noise[1]).max() > norm
    again = make(topic_rows(*[6] * 8), folder="b").survey(1, clip_norm=norm, noise=0.5).survey.centroids_Cd
    np.testing.assert_array_equal(again - quiet_Cd, noise[0])


def test_noise_of_a_round_repeats_byte_for_byte_and_does_not_touch_the_choice(make):
    one, two = make(), make(folder="b")
    noisy = {"clip_norm": 1.0, "noise": 2.0}
    assert one.survey(**noisy).survey.centroids_Cd.tobytes() == two.survey(**noisy).survey.centroids_Cd.tobytes()
    chosen = one.choose(kept=[0, 1], **noisy)
    two.survey(round=2, clip_norm=1.0)
    assert two.choose(round=2, kept=[0, 1], clip_norm=1.0) == chosen


SECRET = b"s" * 32
NOISY = {"clip_norm": 1.0, "noise": 2.0, "space": "shared", "dimensions": 4}


def test_noise_of_a_secret_is_on_the_very_centroids_whatever_the_question_says(make, adapter, base):
    client, quiet = make(secret=SECRET), make(folder="quiet")

    def noise(seed=SEED, adapter=adapter):
        true = quiet.survey(**{**NOISY, "noise": 0.0}, seed=seed, adapter=adapter).survey.centroids_Cd
        return client.survey(**NOISY, seed=seed, adapter=adapter).survey.centroids_Cd, true

    first, _ = noise()
    moved = adapter.with_tensors({key: value + np.float32(1e-6) for key, value in adapter.tensors.items()})
    # The remembered points answer for a moved adapter: the same centroids, so the same answer.
    np.testing.assert_array_equal(noise(adapter=moved)[0], first)
    # An update to fold in, tiny and then large, with a question about another space between: points are made anew.
    big = random_adapter(base, rank=2, seed=9, dtype="float32", dropout=0.0)
    answers = []
    for alpha in (1e-12, 1e4):
        folded = Payload(adapter, folded=replace(big, config=replace(big.config, alpha=alpha)))
        noise(seed=SEED + 1)
        answers.append(noise(adapter=folded))
    (small, small_true), (large, large_true) = answers
    assert np.abs(small_true - large_true).max() > 1e-3
    # By another noise on each, a difference of answers is no difference of centroids.
    both = min(len(small), len(large))
    assert np.abs((small[:both] - large[:both]) - (small_true[:both] - large_true[:both])).min() > 1e-3
    theirs = make(folder="theirs").survey(**NOISY).survey.centroids_Cd
    assert np.abs(theirs - first).min() > 1e-3  # nor is it that of the seed which came


# What is remembered -------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    """How often hidden states were computed."""
    calls = []

    def counting(*arguments, **more):
        calls.append(len(arguments[2]))
        return pooled_states(*arguments, **more)

    monkeypatch.setattr(choose, "pooled_states", counting)
    return calls


@pytest.mark.parametrize(("refresh", "computed"), [(1, [1, 2, 3, 4, 5, 6]), (3, [1, 4]), (0, [1])])
def test_features_are_used_for_so_many_rounds(make, counted, refresh, computed):
    client, rounds = make(), []
    for round in range(1, 7):
        before = len(counted)
        client.survey(round, refresh=refresh)
        client.choose(round, kept=[0], refresh=refresh)
        rounds += [round] * (len(counted) - before)
    assert rounds == computed


def test_features_are_computed_anew_for_other_rows_and_settings(make, counted):
    client = make()
    changes = [{}, {"pooling": "mean"}, {"layers": (1,)}, {"clip_norm": 2.0}, {"space": "shared"}, {"seed": 9}]
    for change in changes:
        client.survey(refresh=0, **change)
    client.survey(refresh=0, seed=9, held=client.rows[1:])
    client.survey(refresh=0, seed=9, held=[client.rows[2], *client.rows[2:]])
    assert len(counted) == len(changes) + 2


def test_a_round_that_is_run_again_after_a_crash_gives_the_same(make):
    client = make()
    first = client.survey(2, refresh=2)
    chosen = client.choose(2, kept=[0], refresh=2)
    again = make()  # another process over the same folder
    assert again.survey(2, refresh=2).survey.centroids_Cd.tobytes() == first.survey.centroids_Cd.tobytes()
    assert again.choose(2, kept=[0], refresh=2) == chosen


def test_what_a_later_round_remembered_is_not_used_in_an_earlier_one(make, counted):
    client = make()
    client.survey(5, refresh=0)
    client.survey(4, refresh=0)
    assert len(counted) == 2


def test_another_process_chooses_from_what_the_first_one_remembered(make, counted):
    make().survey()
    other = make()
    assert other.choose(kept=[0]) == make().choose(kept=[0])
    assert len(counted) == 1


def test_without_its_survey_a_client_chooses_nothing_and_says_so(make):
    client = make()
    for prepare in (lambda: None, lambda: client.survey(3), lambda: client.survey(4, held=client.rows[1:])):
        prepare()
        with pytest.raises(RoundFailed, match="a remembers no survey of round 4; its folder was changed meanwhile"):
            client.choose(4, kept=[0])


def test_a_damaged_memory_is_one_sentence_that_names_the_file(make):
    client = make()
    client.survey()
    path = client.folder / "survey" / "0001.npz"
    whole = path.read_bytes()
    np.savez(client.folder / "foreign.npz", other=np.ones(3))
    damaged = [b"", b"PK", whole[:-7], whole[:400], whole[:200] + b"\xff" * 9 + whole[209:], b"\x80\x04]\x94."]
    for content in [*damaged, (client.folder / "foreign.npz").read_bytes()]:
        path.write_bytes(content)
        for act in (client.survey, lambda: client.choose(kept=[0])):
            with pytest.raises(
                CheckpointError, match=r"survey.0001\.npz is not as it was written .*; remove it"
            ) as caught:
                act()
            assert "\n" not in str(caught.value)
    path.unlink()
    assert client.survey().failure is None


def test_a_flipped_byte_anywhere_is_noticed_or_harmless(make):
    client = make()
    client.survey()
    chosen = client.choose(kept=[0])
    path = client.folder / "survey" / "0001.npz"
    whole = path.read_bytes()
    for place in np.random.default_rng(0).integers(0, len(whole), 60):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        with contextlib.suppress(CheckpointError, RoundFailed):
            assert client.choose(kept=[0]) == chosen


def test_features_that_are_not_finite_leave_the_client_out_without_naming_rows(make, adapter):
    client = make()
    broken = adapter.with_tensors({key: value * np.float32(np.nan) for key, value in adapter.tensors.items()})
    reply = client.survey(adapter=broken)
    assert (reply.survey, reply.failure) == (
        None,
        "the features of some of its rows are not finite, so none can be chosen by them",
    )
    task = replace(client.task(method="perplexity", rows=2), payload=Payload(broken))
    [reply] = train_chosen(client.chooser.choose, client.base, client.layers, {"a": client.rows}, {"a": task}, fedavg())
    assert reply.failure == "the losses of some of its rows are not finite, so none can be chosen by them"


# Weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weigh_by", "weights"), [("selected", (2, 5)), ("all", (20, 10))])
def test_clients_weigh_by_their_selected_rows_or_by_all(base, layers, adapter, tmp_path, weigh_by, weights):
    chooser = Chooser(base, layers, {name: tmp_path / name for name in "ab"})
    settings = recipe.Selection(method="length", fraction=0.1, weigh_by=weigh_by)
    training = recipe.Training(batch_size=4)
    replies = []
    for name, count, fraction in (("a", 20, 0.1), ("b", 10, 0.5)):
        chosen = settings.model_copy(update={"fraction": fraction})
        tasks = train_tasks(name, adapter, training, rounds=3, seed=SEED, selection=chosen)
        replies += train_chosen(chooser.choose, base, layers, {name: topic_rows(count, seed=count)}, tasks, fedavg())
    one, two = (reply.update for reply in replies)
    assert ((one.rows, two.rows), (one.metrics["selected"], two.metrics["selected"])) == (weights, (2, 5))
    mean = mean_of([one, two], fedavg().weigh)
    share = np.float64(weights[0]) / sum(weights)
    for key, value in mean.tensors.items():
        byhand = share * one.tensors[key].astype(float) + (1 - share) * two.tensors[key].astype(float)
        np.testing.assert_allclose(value, byhand, rtol=unit(torch.float32), atol=FLOAT64)


def test_seconds_of_a_client_hold_its_choice(make, monkeypatch):
    client = make()
    monkeypatch.setattr(choose, "row_losses", lambda *arguments: (choose.time.sleep(0.2), [1.0] * 21)[1])
    task = client.task(method="perplexity", rows=2)
    [reply] = train_chosen(client.chooser.choose, client.base, client.layers, {"a": client.rows}, {"a": task}, fedavg())
    assert reply.seconds >= 0.2


# Rivals under the same budget ---------------------------------------------------------------------


RIVALS = ("random", "k_center", "perplexity", "length")


@pytest.mark.parametrize("method", RIVALS)
@pytest.mark.parametrize(
    ("budget", "count"), [({"rows": 5}, 5), ({"rows": 500}, 21), ({"fraction": 0.33}, 7), ({"fraction": 0.01}, 1)]
)
def test_rivals_choose_as_many_rows_as_they_are_told(make, method, budget, count):
    chosen = make().choose(method=method, **budget)
    assert len(set(chosen)) == count
    assert chosen == sorted(chosen)
    assert set(chosen) <= set(range(21))


@pytest.mark.parametrize("method", RIVALS)
def test_rivals_choose_as_many_rows_as_hierarchical_keeps(make, method):
    client = make()
    client.survey(rows="hierarchical", rows_per_cluster=3)
    many = client.choose(kept=[0, 1], rows_per_cluster=3)
    rival = client.choose(kept=[0, 1], rows_per_cluster=3, rows="hierarchical", method=method)
    assert len(rival) == len(many) == 6


def test_each_rival_is_what_it_says(make):
    client = make()
    lengths = np.array([row.response_T.sum() for row in client.rows])
    chosen = client.choose(method="length", rows=4)
    assert sorted(lengths[chosen]) == sorted(lengths)[-4:]

    client.layers.load(0, client.adapter.tensors)
    summed = row_losses(client.base, client.layers, client.rows, 1)
    mean_N = np.array(summed) / np.array([row.response_T[1:].sum() for row in client.rows])
    assert set(client.choose(method="perplexity", rows=5)) == set(np.argsort(mean_N)[8:13])  # 8 below, 5, 8 above

    points_NF = client.states(pooling="last").astype(float)
    for seed in range(3):
        client.adapter = random_adapter(client.base, rank=2, seed=seed, dtype="float32", dropout=0.1)
        points_NF = client.states(pooling="last").astype(float)
        centres = client.choose(round=seed + 1, method="k_center", rows=3)
        # Of three topics that lie apart, the greedy cover takes one row each, whatever row it begins with.
        assert {client.rows[number].category for number in centres} == {"t0", "t1", "t2"}
        reach = np.linalg.norm(points_NF[:, None] - points_NF[centres], axis=2).min(axis=1).max()
        assert reach < np.linalg.norm(points_NF - points_NF[centres[0]], axis=1).max()


def test_rows_are_chosen_by_the_model_with_what_is_folded_into_its_weights(make, adapter):
    folded = random_adapter(make().base, rank=2, seed=9, dtype="float32", dropout=0.0, alpha=64.0)

    def found(payload, folder):
        client = make(folder=folder)
        client.adapter = payload
        return client.survey(space="none").survey.centroids_Cd, client.choose(method="perplexity", rows=5)

    plain, ours = found(adapter, "plain"), found(Payload(adapter, folded=folded), "folded")
    weights = {path: make().base.model.get_submodule(path).weight for path in folded.config.modules}
    before = {path: weight.detach().clone() for path, weight in weights.items()}
    try:
        for path, weight in weights.items():
            a_RI, b_OR = (torch.from_numpy(folded.tensors[key(path)]).double() for key in (key_a, key_b))
            weight.data = (before[path] + folded.config.scaling * b_OR @ a_RI).to(weight.dtype)
        theirs = found(adapter, "merged")
    finally:
        for path, weight in weights.items():
            weight.data = before[path]
    np.testing.assert_array_equal(ours[0], theirs[0])
    assert ours[1] == theirs[1] != plain[1]


def test_random_rows_differ_between_rounds_and_repeat_within_one(make):
    client = make()
    drawn = [tuple(client.choose(round, method="random", rows=6)) for round in (1, 2, 3, 1)]
    assert drawn[0] == drawn[3]
    assert len(set(drawn)) == 3


@pytest.mark.parametrize("content", ["", "[", "{}", '{"rows": ["x"]}', '{"rows": 3}'])
def test_a_damaged_list_of_chosen_rows_is_one_sentence_that_names_the_file(make, content):
    client = make()
    client.choose(1, method="random", rows=3, rotate=True)
    (client.folder / "selected" / "0001.json").write_text(content)
    with pytest.raises(
        CheckpointError, match=r"0001\.json is not as it was written .*; remove it, and a no longer knows"
    ):
        client.choose(2, method="random", rows=3, rotate=True)


def test_rows_that_were_trained_least_often_come_first_also_in_a_round_that_is_run_again(make):
    client, turned = make(), {"rotate": True, "refresh": 0}
    chosen = []
    for round in (1, 2, 3, 3):
        client.survey(round, **turned)
        chosen.append(client.choose(round, kept=[0], **turned))
    # By hand: the nearest, the next one, the one after it; round 3 again does not count its first attempt.
    client.survey(4, refresh=0)
    nearest = client.choose(4, kept=[0], rows_per_cluster=3, refresh=0)
    assert sorted({number for [number] in chosen}) == nearest
    assert chosen[2] == chosen[3]
    drawn = [client.choose(round, method="random", rows=7, rotate=True) for round in (11, 12)]
    assert not set(drawn[0]) & set(drawn[1])


# A method of one's own ----------------------------------------------------------------------------

OWN = """
import numpy

def nearest(rows, points, budget, generator):
    '''The rows nearest to the mean of all.'''
    points = points()
    return numpy.argsort(((points - points.mean(0)) ** 2).sum(1))[:budget]

def seen(rows, points, budget, generator):
    return [len(rows) - 1, budget]

def nothing(rows, points, budget, generator): return []
def none(rows, points, budget, generator): return None
def number(rows, points, budget, generator): return 3
def words(rows, points, budget, generator): return ["first"]
def text(rows, points, budget, generator): return "123"
def shares(rows, points, budget, generator): return [0.5, 1.0]
def mask(rows, points, budget, generator): return [True, False, True]
def arrays(rows, points, budget, generator): return numpy.zeros((2, 2), int)
def beyond(rows, points, budget, generator): return [0, len(rows)]
def below(rows, points, budget, generator): return [-1]
def twice(rows, points, budget, generator): return [2, 2]
def many(rows, points, budget, generator): return range(budget + 1)
def broken(rows, points, budget, generator): return rows[1000]
def late(rows, points, budget, generator): return (1 // 0 for _ in range(2))
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_choice.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_choice", raising=False)


def test_a_method_of_ones_own_gets_rows_points_and_budget(make, own):
    client = make()
    points_NF = client.states(pooling="last")
    expected = np.linalg.norm(points_NF - points_NF.mean(0), axis=1).argsort()[:4]
    assert client.choose(method="own_choice:nearest", rows=4) == sorted(expected)
    assert client.choose(method="own_choice:seen", rows=4) == [4, 20]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nothing", "chose 0 rows, 0 of them different; choose from 1 to 4 of 0 to 20, each once"),
        ("none", "returned NoneType; return row numbers"),
        ("number", "returned int; return row numbers"),
        ("words", "returned 'first' among its rows; return row numbers"),
        ("text", "returned str; return row numbers"),
        ("shares", "returned 0.5 among its rows; return row numbers"),
        ("mask", "returned True among its rows; return row numbers"),
        ("arrays", "failed at"),
        ("beyond", "chose row 21 of 21; choose from 1 to 4 of 0 to 20, each once"),
        ("below", "chose row -1 of 21"),
        ("twice", "chose 2 rows, 1 of them different"),
        ("many", "chose 5 rows, 5 of them different; choose from 1 to 4"),
        ("broken", "IndexError: list index out of range"),
        ("late", "own_choice.py:25 (ZeroDivisionError"),
    ],
)
def test_what_a_method_of_ones_own_must_not_return_is_one_sentence_that_names_it(make, own, name, text):
    with pytest.raises(RoundFailed) as caught:
        make().choose(method=f"own_choice:{name}", rows=4)
    assert str(caught.value).startswith(f"selection.method own_choice:{name} ")
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


# Proxies, and clients together --------------------------------------------------------------------


class CountingProxy:
    """A proxy whose features are the lengths of texts, and how often it was asked."""

    fingerprint = "counting"

    def __init__(self):
        self.asked = []

    def features(self, texts, *, pooling, chosen):
        self.asked.append((len(texts), pooling, chosen))
        return np.array([[float(len(text)), 1.0] for text in texts], np.float32)


def test_features_of_the_tuned_model_are_not_guessed_without_its_adapter(make):
    client = make()
    with pytest.raises(ValueError, match="need the adapter that the task leaves out"):
        client.chooser.survey("a", client.rows, survey_tasks("a", None, recipe.Selection(**DEFAULTS))["a"])


def test_a_proxy_describes_texts_once_whatever_the_adapter_and_the_round(make, monkeypatch):
    proxy, loaded = CountingProxy(), []
    monkeypatch.setattr(Chooser, "_load_proxy", lambda self, name: (loaded.append(name), proxy)[1])
    client, turbo = make(), {"features": "proxy", "proxy": "p"}
    for round in (1, 2, 7):
        other = random_adapter(client.base, rank=2, seed=round, dtype="float32", dropout=0.1)
        assert client.survey(round, other, **turbo).failure is None
        client.choose(round, kept=[0], **turbo)
    assert (proxy.asked, loaded) == ([(21, "last", None)], ["p"])


def test_clients_that_are_trained_together_are_surveyed_like_one_by_one(adapter, tmp_path):
    base = tiny_base("llama")
    rows = {"a": topic_rows(8, 7), "b": topic_rows(6, 6, seed=1), "c": topic_rows(5, seed=2)}
    sent, updates = [], []
    for slots in (1, 3):
        layers = LoraLayers(base.model, adapter.config, slots, dtype=torch.float64)
        folders = {name: tmp_path / f"{slots}" / name for name in rows}
        engine = LocalEngine(base, layers, rows, {}, fedavg(), (), 1024, folders)
        settings = recipe.Selection(**DEFAULTS, rows_per_cluster=2)
        sent.append([one.survey.centroids_Cd.tobytes() for one in engine.ask(survey_tasks("abc", adapter, settings))])
        kept = {"a": [0, 1], "b": [1], "c": [0]}
        training = recipe.Training(batch_size=4)
        tasks = {
            name: train_task(adapter, training, name, rounds=3, selection=settings, kept=kept[name]) for name in kept
        }
        updates.append(list(engine.ask(tasks)))
        layers.detach()
    assert sent[0] == sent[1]
    for one, other in zip(*updates, strict=True):
        assert (one.client, one.update.rows) == (other.client, other.update.rows)
        for key, value in one.update.tensors.items():
            assert value.dtype == np.float64
            np.testing.assert_allclose(other.update.tensors[key], value, rtol=0, atol=FLOAT64)


def test_nothing_is_kept_where_all_rows_are_trained(make):
    client = make()
    assert client.choose(method="full") == list(range(21))
    assert not Path(client.folder).exists()


def test_a_client_without_two_clusters_sends_one_centroid_of_all_rows_or_none_as_in_the_paper(make):
    client = make(topic_rows(5))
    one = client.survey(min_cluster_rows=5)
    none = client.survey(min_cluster_rows=5, whole_client=False)
    assert len(one.survey.centroids_Cd) == 1
    assert len(none.survey.centroids_Cd) == 0
