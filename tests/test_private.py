"""Whole clients hidden by clipping and noise: against the papers' formulas by hand, and published epsilons."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import chi2, norm
from test_federate import ROWS, START, AddingEngine, begin, federation
from test_methods import A, B, number

from bellwether.errors import RecipeError
from bellwether.exchange.adapter import Adapter, AdapterConfig
from bellwether.exchange.messages import Reply, Update
from bellwether.federate import federate
from bellwether.method.accounting import Release, affordable, epsilon, noise_for
from bellwether.method.average import fedavg
from bellwether.method.cohort import Sampling, make_sampler
from bellwether.method.examples import example_rate
from bellwether.method.method import Closing, Known, Trained, mean_of, whole_adapter
from bellwether.method.private import CLIP, SLACK, UNCLIPPED, Noise, client_level, clipped, known_noise
from bellwether.method.server_optimizers import fedavgm
from bellwether.recipe.file import load_recipe
from bellwether.recipe.privacy import Privacy
from bellwether.recipe.recipe import Federation
from bellwether.runner.guarantee import guarantee, leaving, never_again, promise, settled
from bellwether.tools.randomness import Draws, Randomness, secret_normals

PRIVACY = Privacy(noise=1.0, clip_norm=0.5)


def hidden(method=None, privacy=PRIVACY, multiplier=1e-12, expected=2.0, secret=lambda closing: b"s"):
    return client_level(method or fedavg(), privacy, Noise(multiplier, expected, secret))


def trained(payload, *changes) -> Trained:
    """What a client has whose values of A and B are off by the changes."""
    change_a, change_b = changes
    tensors = payload.adapter.tensors
    passes = [{A: tensors[A] + change_a, B: tensors[B] + change_b}]
    return Trained(payload, {}, passes, [0.1], Draws({}))


def update_of(method, state, client, *changes, rows=5) -> Update:
    finished = method.finish(trained(method.give(state, Known(client, 1), 1), *changes))
    return Update(client, 1, finished.tensors, rows, arrays=finished.arrays)


def flat(tensors):
    return np.concatenate([tensors[key].reshape(-1) for key in sorted(tensors)])


def after(method, state, updates, failure=None):
    mean = mean_of(updates, method.weigh) if updates else None
    return method.close(Closing(1, state, 10, ("a",), mean, (), failure, Randomness(0)))


# Clipping ------------------------------------------------------------------------------------------


def test_a_clients_change_is_cut_to_the_norm_over_all_its_tensors_together():
    method = hidden()
    state = method.begin(number(1.0, 2.0))
    # By hand: a change of (3, 4) has the norm 5, of which 0.5 is a tenth.
    long = update_of(method, state, "a", 3.0, 4.0)
    np.testing.assert_allclose([long.tensors[A][0, 0], long.tensors[B][0, 0]], [1.3, 2.4], rtol=1e-12)
    short = update_of(method, state, "a", 0.3, 0.4 - 1e-9)
    np.testing.assert_allclose([short.tensors[A][0, 0], short.tensors[B][0, 0]], [1.3, 2.4 - 1e-9], rtol=1e-12)


def test_what_float32_makes_of_a_cut_change_is_within_the_slack_that_the_noise_counts_with():
    draw = np.random.default_rng(0)
    for _ in range(50):
        # Values of an adapter are thousands of times larger than what a change is cut to at the most.
        sent = {"x": draw.normal(0, 1, 20_000).astype(np.float32)}
        moved = {"x": (sent["x"] + draw.normal(0, 1, 20_000)).astype(np.float32)}
        cut, short = clipped(moved, sent, 0.5)
        length = np.linalg.norm(cut["x"].astype(np.float64) - sent["x"])
        assert not short
        assert length <= 0.5 * (1 + SLACK)


def test_the_server_leaves_out_an_update_that_its_client_did_not_cut():
    class Cutting(AddingEngine):
        """Clients that keep to the norm, but for c."""

        def ask(self, tasks, deadline=None):
            for client, task in tasks.items():
                if client == "c":
                    yield from super().ask({client: task})
                    continue
                tensors = {key: value + np.float32(0.1) for key, value in task.adapter.tensors.items()}
                yield Reply(client, 1.0, update=Update(client, task.round, tensors, ROWS[client]))

    method = client_level(fedavg(), PRIVACY, Noise(1e-12, 4.0, known_noise))
    run = federation("federation.rounds=1", engine=Cutting(), method=method)
    state = method.begin(START)
    progress = federate(run, replace(begin(), state=state))
    (record,) = progress.rounds
    assert list(record.left_out) == ["c"]
    assert "its change has a norm of" in record.left_out["c"]
    # Three of four moved by 0.1, over the four that are expected.
    np.testing.assert_allclose(progress.adapter.tensors["base_model.model.q.lora_A.weight"], 0.075, rtol=1e-4)


# The noisy mean ------------------------------------------------------------------------------------


def test_without_noise_the_mean_is_over_the_expected_number_whoever_came_and_clients_count_alike():
    method = hidden(expected=4.0)
    state = method.begin(number(1.0))
    updates = [update_of(method, state, "a", 0.3, 0.0, rows=1), update_of(method, state, "b", 0.1, 0.0, rows=1000)]
    assert after(method, state, updates).adapter.tensors[A][0, 0] == pytest.approx(1.0 + 0.4 / 4, rel=1e-9)


def test_an_empty_round_is_noise_alone_and_a_failed_one_nothing():
    method = hidden(multiplier=2.0, expected=4.0)
    state = method.begin(number(1.0))
    drawn = float(secret_normals(b"s", f"update {A}".encode(), 1)[0])
    empty = after(method, state, []).adapter.tensors[A][0, 0]
    assert empty == pytest.approx(1.0 + 2.0 * 0.5 * (1 + SLACK) * drawn / 4, rel=1e-12)
    assert after(method, state, [], failure="nobody").adapter == state.adapter


def test_the_noise_has_the_standard_deviation_of_the_formula():
    size = 20_000
    adapter = Adapter(AdapterConfig(1, 1.0, 0.0, ("m",)), {A: np.zeros((1, size)), B: np.zeros((size, 1))})
    method = hidden(multiplier=3.0, expected=7.0)
    state = method.begin(adapter)
    values = flat(after(method, state, []).adapter.tensors)
    # z C / m, whose estimate from n values has a chi-square distribution: within all but a billionth of it.
    square = (values.size) * float(np.mean(values**2)) / (3.0 * 0.5 * (1 + SLACK) / 7.0) ** 2
    assert chi2.ppf(5e-10, values.size) < square < chi2.isf(5e-10, values.size)


def test_a_server_optimizer_steps_by_the_noisy_mean():
    method = hidden(fedavgm(learning_rate=2.0))
    state = method.begin(number(1.0))
    moved = after(method, state, [update_of(method, state, "a", 0.3, 0.0)])
    # By hand: the mean change is 0.3 / 2, and the first step of momentum is that, times 2.
    assert moved.adapter.tensors[A][0, 0] == pytest.approx(1.3, rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_no_client_moves_the_sum_by_more_than_the_stated_sensitivity(seed):
    draw = np.random.default_rng(seed)
    method = hidden(privacy=Privacy(noise=1.0, clip_norm=0.7), expected=1.0)
    state = method.begin(number(1.0, -2.0))
    for _ in range(100):
        updates = [
            update_of(method, state, f"{n}", *(draw.standard_cauchy(2) * 10.0 ** draw.uniform(-3, 3)))
            for n in range(draw.integers(1, 8))
        ]
        one = after(method, state, updates).adapter
        other = after(method, state, updates[1:]).adapter
        assert np.linalg.norm(flat(one.tensors) - flat(other.tensors)) <= 0.7 * (1 + SLACK) + 1e-10


# A clipping norm that follows ----------------------------------------------------------------------


def test_the_clipping_norm_follows_the_share_of_short_updates():
    privacy = Privacy(noise=1e-12, clip_norm=0.5, clip_quantile=0.5)
    method = hidden(privacy=privacy, multiplier=1e-12, expected=4.0)
    state = method.begin(number(1.0))
    updates = [update_of(method, state, name, change, 0.0) for name, change in zip("abc", (0.1, 0.2, 0.3), strict=True)]
    updates.append(update_of(method, state, "d", 5.0, 0.0))
    assert [float(update.arrays[UNCLIPPED][0]) for update in updates] == [0.5, 0.5, 0.5, -0.5]
    noise = max(4.0 / 20, 1e-12) * float(secret_normals(b"s", b"count", 1)[0])
    share = 0.5 + (1.0 + noise) / 4.0
    byhand = 0.5 * math.exp(-0.2 * (share - 0.5))
    assert after(method, state, updates).arrays[CLIP] == pytest.approx(byhand, rel=1e-6)


@pytest.mark.parametrize(
    ("multiplier", "expected", "byhand"),
    # Andrew et al.: 100 clients and z = 1 have sigma_b = 5, so (1 - 1/100) ** -0.5; 20 have 1, so (3/4) ** -0.5.
    [(1.0, 100.0, 1.00503781525921), (1.0, 20.0, 1.15470053837925), (1.0, 2.0, 1.15470053837925)],
)
def test_updates_get_more_noise_where_the_count_takes_its_share_of_the_budget(multiplier, expected, byhand):
    noise = Noise(multiplier, expected, known_noise)
    assert noise.of_updates(True) == pytest.approx(byhand, rel=1e-12)
    assert noise.of_updates(False) == multiplier


# Where noise comes from ----------------------------------------------------------------------------


def test_a_coordinators_secret_is_never_the_same_and_a_simulations_follows_from_seed_and_round():
    closing = Closing(3, None, 1, (), None, (), None, Randomness(5))
    assert never_again(closing) != never_again(closing)
    assert known_noise(closing) == known_noise(closing)
    assert known_noise(closing) != known_noise(replace(closing, round=4))


# Accounting ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "noise", "times", "delta", "rdp", "pld"),
    # As dp-accounting's own tests and documentation have them.
    [(0.1, 1.0, 20, 1e-3, 2.71569, 2.12751)],
)
def test_epsilons_are_the_published_ones(rate, noise, times, delta, rdp, pld):
    release = Release(noise, times, rate)
    assert epsilon(release, delta, accountant="rdp") == pytest.approx(rdp, rel=1e-5)
    assert epsilon(release, delta) == pytest.approx(pld, rel=1e-5)


def gaussian_delta(mu: float, eps: float) -> float:
    """Delta of a Gaussian mechanism (Balle and Wang 2018, arXiv 1805.06530, theorem 8); mu: sensitivity over sigma."""
    return float(norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * norm.cdf(-mu / 2 - eps / mu))


@pytest.mark.parametrize(("noise", "times"), [(5.0, 20), (1.2, 3)])
def test_without_sampling_epsilon_is_that_of_one_gaussian_in_closed_form(noise, times):
    for relation, mu in (("add_or_remove", math.sqrt(times) / noise), ("replace", 2 * math.sqrt(times) / noise)):
        found = epsilon(Release(noise, times), 1e-5, relation)
        assert gaussian_delta(mu, found) == pytest.approx(1e-5, rel=2e-2)
        assert found <= epsilon(Release(noise, times), 1e-5, relation, "rdp")


def test_the_noise_that_is_found_keeps_the_budget_and_hardly_less_would_not():
    noise = noise_for(4.0, 1e-5, 10)
    mu = math.sqrt(10) / noise
    assert gaussian_delta(mu, 4.0) <= 1e-5
    assert gaussian_delta(mu * 1.003, 4.0) > 1e-5


def test_a_budget_is_enough_for_as_many_rounds_as_the_closed_form_says():
    byhand = max(times for times in range(1, 60) if gaussian_delta(math.sqrt(times) / 3.0, 5.0) <= 1e-5)
    assert affordable(5.0, 1e-5, 3.0, 60) == byhand
    assert affordable(5.0, 1e-5, 3.0, byhand) == byhand
    assert affordable(0.05, 1e-5, 3.0, 60) == 0


def test_a_budget_that_no_noise_keeps_is_refused_in_a_sentence():
    with pytest.raises(RecipeError, match=r"privacy\.epsilon=0\.001 .* cannot be kept"):
        noise_for(1e-3, 1e-5, 20)


# Poisson cohorts -----------------------------------------------------------------------------------


def test_poisson_cohorts_take_every_client_by_itself_with_the_same_probability():
    clients = [f"c{n}" for n in range(50)]
    sample = make_sampler(Federation(sampler="poisson", fraction=0.1), None)
    cohorts = [sample(Sampling(round, clients, {}, None, Randomness(1))) for round in range(1, 2001)]
    sizes = np.array([len(cohort) for cohort in cohorts])
    # Sizes are binomial(50, 0.1), with mean 5 and variance 4.5; some cohorts are empty.
    assert abs(sizes.mean() - 5.0) < 5 * math.sqrt(4.5 / 2000)
    assert abs(sizes.var() - 4.5) < 5 * 4.5 * math.sqrt(2 / 2000)
    assert 0 in sizes
    pairs = np.array([[client in cohort for client in ("c3", "c4")] for cohort in cohorts])
    assert abs(np.corrcoef(pairs.T)[0, 1]) < 5 / math.sqrt(2000)


# What a run promises -------------------------------------------------------------------------------


def clients(count: int) -> dict[str, int]:
    return {f"c{number}": 10 for number in range(count)}


def recipe(*fields: str):
    return load_recipe(None, ["federation.rounds=10", *fields])


def test_a_guarantee_counts_on_sampling_only_where_the_recipe_says_so():
    poisson = ("federation.sampler=poisson", "federation.fraction=0.2", "privacy.noise=1.5")
    counted_on = guarantee(recipe(*poisson, "privacy.amplification=true"), clients(50))
    plain = guarantee(recipe(*poisson), clients(50))
    assert (counted_on.release, plain.release) == (Release(1.5, 10, 0.2), Release(1.5, 10, 1.0))
    assert counted_on.noise.expected == plain.noise.expected == pytest.approx(10.0)
    assert guarantee(recipe(), clients(50)) is None


def test_a_guarantee_of_rows_is_that_of_the_client_where_they_show_most():
    rows = {"many": 800, "few": 20, "some": 100}
    fields = ("privacy.noise=1.5", "privacy.unit=example", "training.batch_size=10", "training.local_epochs=2")
    found = guarantee(recipe(*fields), rows)
    # By hand: of 20 rows each is in a step with probability 10 / 20, and a round has 2 · 20 / 10 steps.
    assert (found.client, found.one, found.release) == ("few", Release(1.5, 4, 0.5), Release(1.5, 40, 0.5))
    twice = guarantee(recipe(*fields, "method.name=ditto"), rows)
    assert twice.one == Release(1.5, 8, 0.5)
    # A site's rows are its own business.
    assert guarantee(recipe(*fields), {"many": 0, "few": 0}) is None


def test_the_noise_for_a_budget_keeps_it_at_every_client():
    rows = {"many": 300, "few": 20}
    some = recipe("privacy.epsilon=6", "privacy.unit=example", "training.batch_size=8", "federation.rounds=5")
    found = guarantee(some, rows)
    assert settled(some, found).noise == found.one.noise
    for count in rows.values():
        rate, steps = example_rate(count, some.training)
        assert epsilon(Release(found.one.noise, 5 * steps, rate), 1e-5) <= 6.0
    assert found.client == "few"


def test_a_budget_ends_the_rounds_and_one_that_is_enough_for_none_is_refused():
    few = guarantee(recipe("privacy.noise=3", "privacy.epsilon=4"), clients(10))
    byhand = max(times for times in range(1, 11) if gaussian_delta(math.sqrt(times) / 3.0, 4.0) <= 1e-5)
    assert (few.ends, few.release.times) == (byhand, byhand)
    with pytest.raises(RecipeError, match="not enough for one round"):
        guarantee(recipe("privacy.noise=1", "privacy.epsilon=0.5"), clients(10))


def test_a_last_round_in_which_nothing_comes_back_spends_nothing():
    found = guarantee(recipe("privacy.noise=3", "method.fine_tune=true"), clients(10))
    assert found.release.times == 9


def test_a_promise_names_relation_and_accountant_of_each_epsilon():
    some = recipe("privacy.noise=2")
    found = promise(some, guarantee(some, clients(10)), 10)
    named = {(one.relation, one.accountant): one.value for one in found.epsilons}
    assert named.keys() == {(r, a) for r in ("add_or_remove", "replace") for a in ("PLD", "RDP")}
    assert found.epsilon == named["add_or_remove", "PLD"] < named["replace", "PLD"]


def test_where_a_norm_is_tiny_beside_the_values_a_change_is_cut_shorter_rather_than_left_too_long():
    draw = np.random.default_rng(3)
    for norm_ in (1e-2, 1e-3, 1e-4, 1e-6):
        sent = {"x": draw.normal(0, 1, 100_000).astype(np.float32)}
        moved = {"x": (sent["x"] + draw.normal(0, 1, 100_000)).astype(np.float32)}
        cut, _ = clipped(moved, sent, norm_)
        assert np.linalg.norm(cut["x"].astype(np.float64) - sent["x"]) <= norm_ * (1 + SLACK)


def test_a_norm_that_does_not_follow_is_the_recipes_whatever_the_server_sends():
    method = hidden()
    state = method.begin(number(1.0))
    payload = method.give(state, Known("a", 1), 1)
    told = replace(payload, arrays={CLIP: np.array([1e30], np.float32)})
    assert method.finish(trained(told, 3.0, 4.0)).tensors[A][0, 0] == pytest.approx(1.3)


def test_a_method_that_sends_clients_unlike_tensors_is_refused():
    def give(state, client, round):
        return whole_adapter(replace(state, adapter=number(len(client.client))), client, round)

    method = hidden(replace(fedavg(), give=give))
    with pytest.raises(RecipeError, match="sends clients unlike tensors"):
        method.give(method.begin(number(1.0)), Known("abc", 1), 1)


def test_the_method_inside_is_not_told_who_was_drawn_or_how_many_came():
    seen = []
    watched = replace(fedavg(), close=lambda closing: (seen.append(closing), fedavg().close(closing))[1])
    method = hidden(watched, expected=4.0)
    state = method.begin(number(1.0))
    for count in (1, 3):
        after(method, state, [update_of(method, state, f"{n}", 0.1, 0.0) for n in range(count)])
    assert [(closing.cohort, closing.mean.count) for closing in seen] == [((), 4), ((), 4)]


def test_everything_that_leaves_a_client_is_listed_and_what_nothing_protects_says_so():
    some = recipe(
        "privacy.noise=2", "partition.client_test_fraction=0.2", "selection.method=random", "selection.rows=5"
    )
    method = client_level(fedavg(), some.privacy)
    payload = method.give(method.begin(number(1.0)), Known("", 1), 1)
    leaves = {one.what: one for one in leaving(some, method, payload)}
    assert [one.what for one in leaves.values() if one.protected] == ["the update of the adapter"]
    text = " ".join(leaves)
    assert all(word in text for word in ("rows it chose", "rows it trained on", "loss", "holds out", "answered"))
    surveyed = recipe("selection.method=hierarchical")
    assert any("centroids" in one.what for one in leaving(surveyed, fedavg(), payload))
