"""Budgets, rival rules, what may leave a client, and the measures of a choice."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from bellwether.errors import DataError, ModelError, RecipeError
from bellwether.method.select.budget import deal
from bellwether.method.select.privacy import own_noise, release, with_noise
from bellwether.method.select.rules import k_center, longest, middle_loss, random_rows
from bellwether.method.select.space import clip_rows, random_projection
from benchmarks.measure import agreement, expected_cover, topics_covered


def draw(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


# The budget.

CANDIDATES = [[7, 3, 9], [4], [8, 1]]


@pytest.mark.parametrize(("per_cluster", "taken"), [(1, [4, 7, 8]), (2, [1, 3, 4, 7, 8]), (9, [1, 3, 4, 7, 8, 9])])
def test_as_many_rows_of_each_cluster_are_taken_as_asked(per_cluster, taken):
    assert deal(CANDIDATES, None, per_cluster) == taken


@pytest.mark.parametrize(
    ("rows", "taken"), [(0, []), (2, [4, 7]), (4, [3, 4, 7, 8]), (5, [1, 3, 4, 7, 8]), (99, [1, 3, 4, 7, 8, 9])]
)
def test_a_budget_of_rows_is_dealt_to_the_clusters_in_turn(rows, taken):
    assert deal(CANDIDATES, rows, per_cluster=1) == taken


@pytest.mark.parametrize("rows", [None, 3])
def test_a_row_that_two_clusters_name_is_taken_once(rows):
    assert deal([[5, 5, 6], [5, 0]], rows, per_cluster=2) == [0, 5, 6]


def test_no_clusters_give_no_rows():
    assert deal([], None, 3) == deal([], 7, 3) == deal([[], []], 7, 3) == []


# Rival rules.


def test_every_set_of_random_rows_is_equally_likely():
    generator = draw(0)
    seen = Counter(tuple(random_rows(4, 2, generator)) for _ in range(1200))
    assert set(seen) == set(combinations(range(4), 2))
    assert all(abs(times - 200) < 60 for times in seen.values())  # more than 4 standard deviations of 12.9


def test_k_center_takes_the_farthest_row_each_time():
    points = np.array([[0.0], [1.0], [10.0], [11.0], [30.0]])
    after_first = {0: [0, 4, 3], 1: [1, 4, 3], 2: [2, 4, 0], 3: [3, 4, 0], 4: [4, 0, 3]}
    starts = set()
    for seed in range(40):
        first = int(draw(seed).integers(5))
        starts.add(first)
        for rows in (1, 2, 3):
            assert k_center(points, rows, draw(seed)) == sorted(after_first[first][:rows])
    assert starts == set(range(5))


@pytest.mark.parametrize("seed", range(10))
def test_k_center_covers_within_twice_the_best_radius(seed):
    points = draw(seed).normal(size=(12, 2))
    distances = np.linalg.norm(points[:, None] - points[None], axis=2)
    best = min(distances[:, list(centres)].min(axis=1).max() for centres in combinations(range(12), 3))
    assert distances[:, k_center(points, 3, draw(seed))].min(axis=1).max() <= 2 * best


def test_k_center_takes_no_repeated_row_twice():
    assert len(set(k_center(np.zeros((6, 2)), 4, draw(0)))) == 4


def test_the_middle_by_loss_leaves_out_both_ends():
    losses = np.array([9.0, 1.0, 2.0, 100.0, 3.0])
    assert middle_loss(losses, 1) == [4]
    assert middle_loss(losses, 3) == [0, 2, 4]
    assert middle_loss(losses, 2) == [2, 4]  # places 1 and 2 of 0 to 4
    assert middle_loss(np.exp(losses), 3) == middle_loss(losses, 3)
    assert middle_loss(np.zeros(5), 3) == [1, 2, 3]


def test_a_loss_that_is_not_finite_is_refused_with_the_row():
    with pytest.raises(DataError, match="loss of 1 of 3 rows is not finite, first of row 2"):
        middle_loss(np.array([1.0, 2.0, np.nan]), 2)
    with pytest.raises(ModelError, match="first of row 1"):
        k_center(np.array([[1.0], [np.inf]]), 1, draw(0))


def test_the_longest_responses_are_taken_and_of_equal_ones_the_earlier():
    assert longest(np.array([5, 9, 5, 7, 5]), 3) == [0, 1, 3]
    assert longest(np.array([0, 9, 5], dtype=np.uint16), 1) == [1]


@pytest.mark.parametrize("rows", [3, 50])
def test_a_budget_of_all_rows_or_more_takes_them_all(rows):
    everything = [0, 1, 2]
    assert random_rows(3, rows, draw(0)) == everything
    assert k_center(np.eye(3), rows, draw(0)) == everything
    assert middle_loss(np.arange(3.0), rows) == everything
    assert longest(np.arange(3), rows) == everything


@pytest.mark.parametrize("rows", [0, 2])
def test_rules_take_clients_without_rows_and_budgets_of_none(rows):
    assert random_rows(0, rows, draw(0)) == k_center(np.zeros((0, 3)), rows, draw(0)) == []
    assert middle_loss(np.zeros(0), rows) == longest(np.zeros(0, dtype=int), rows) == []
    assert random_rows(4, 0, draw(0)) == k_center(np.eye(4), 0, draw(0)) == middle_loss(np.ones(4), 0) == []


def test_a_permutation_of_the_rows_permutes_what_losses_and_lengths_choose():
    order = draw(1).permutation(30)
    values = draw(0).permutation(30)
    assert sorted(order[middle_loss(values[order].astype(float), 7)]) == middle_loss(values.astype(float), 7)
    assert sorted(order[longest(values[order], 7)]) == longest(values, 7)


# What may leave.

CENTROIDS = np.array([[3.0, 4.0], [0.6, 0.0], [0.0, 9.0]])


def test_centroids_of_few_rows_stay_at_home():
    released, numbers = release(CENTROIDS, [5, 4, 17], 5, norm=None)
    assert numbers == [0, 2]
    np.testing.assert_array_equal(released, CENTROIDS[[0, 2]])
    nothing, numbers = release(CENTROIDS, [1, 1, 1], 5, norm=1.0)
    assert nothing.shape == (0, 2)
    assert numbers == []
    assert with_noise(nothing, draw(0), noise=1.0, norm=1.0).shape == (0, 2)


def test_a_norm_brings_centroids_into_its_ball():
    released, _ = release(CENTROIDS, [9, 9, 9], 2, norm=1.0)
    np.testing.assert_allclose(released, [[0.6, 0.8], [0.6, 0.0], [0.0, 1.0]])


def test_noise_has_the_stated_standard_deviation():
    zeros = np.zeros((20, 1000))
    released = with_noise(zeros, draw(0), noise=0.5, norm=3.0)
    assert released.std() == pytest.approx(0.5 * 2 * 3.0, rel=0.02)
    assert abs(released.mean()) < 0.1
    again = with_noise(zeros, draw(0), noise=0.5, norm=3.0)
    np.testing.assert_array_equal(released, again)
    assert with_noise(zeros, draw(0), noise=0, norm=None) is zeros


def test_noise_without_a_norm_is_refused():
    with pytest.raises(RecipeError, match=r"Noise of 0.1 on centroids has no scale, .* set the norm"):
        with_noise(CENTROIDS, draw(0), noise=0.1, norm=None)


def test_the_very_same_centroids_get_the_same_noise_of_a_secret_and_all_others_another():
    def noise_on(centroids, secret=b"1" * 32, noise=1.0, norm=2.0):
        return with_noise(centroids, own_noise(secret, centroids, noise, norm), noise, norm) - centroids

    centroids = np.array(CENTROIDS)
    np.testing.assert_array_equal(noise_on(centroids), noise_on(centroids.copy()))
    moved, fewer = centroids.copy(), centroids[:2]
    moved[2, 1] = np.nextafter(9.0, 10)
    others = [noise_on(centroids, b"2" * 32), noise_on(moved), noise_on(centroids.T.copy()).T, noise_on(fewer)]
    # With noise of twice the size and the same draws, 2 x answer 1 - answer 2 would be the centroids.
    others.append(noise_on(centroids, noise=2.0) / 2)
    for other in others:
        assert np.abs(other[:2] - noise_on(centroids)[:2]).min() > 1e-6


def test_means_of_rows_clipped_before_the_projection_need_no_further_clipping():
    generator = draw(0)
    rows = clip_rows(generator.normal(size=(40, 32)) * 5, 2.0) @ random_projection(32, 4, generator)
    means = np.array([np.average(rows, axis=0, weights=generator.random(40)), rows[0]])
    released, _ = release(means, [40, 40], 5, norm=2.0)
    np.testing.assert_allclose(released, means, rtol=1e-12)


# Measures.


def test_the_share_of_topics_counts_each_topic_once():
    assert topics_covered(["a", "a", "b"], ["a", "b", "c", "d", "d"]) == 0.5
    assert topics_covered([], ["a"]) == 0
    with pytest.raises(ValueError, match="topics"):
        topics_covered([], [])


def test_random_cover_is_the_hypergeometric_formula():
    # Of 4 rows, 1 and 3 of two topics, 2 of the 6 pairs... 3 miss the first, none the second.
    assert expected_cover([1, 3], 2) == pytest.approx((0.5 + 1) / 2)
    assert expected_cover([1, 3], 0) == 0
    assert expected_cover([1, 3], 4) == expected_cover([1, 3], 99) == 1
    with pytest.raises(ValueError, match="every topic"):
        expected_cover([], 2)
    with pytest.raises(ValueError, match=r"\[3, 0\]"):
        expected_cover([3, 0], 2)


def test_random_cover_is_what_random_rows_cover():
    counts = [2, 5, 9, 40]
    topics = np.repeat(range(4), counts)
    generator = draw(0)
    covers = [topics_covered(topics[random_rows(56, 6, generator)], topics) for _ in range(3000)]
    assert np.mean(covers) == pytest.approx(expected_cover(counts, 6), abs=0.015)
    assert 0 < expected_cover([50, 14950], 200) < 1


def test_agreement_is_as_worked_by_hand():
    # One of 2 pairs within topics is within a group too; entropies 1.5 and 1 bit, of which 1 is shared.
    ari, nmi = agreement([0, 0, 1, 2], ["x", "x", "y", "y"])
    assert ari == pytest.approx(4 / 7)
    assert nmi == pytest.approx(1 / 1.25)
    assert agreement([1, 1, 0], ["x", "x", "y"]) == (1.0, 1.0)
