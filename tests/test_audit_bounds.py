"""What attacks on privacy are judged by, against hand-worked numbers, scikit-learn and published bounds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score, roc_curve

from bellwether.arms.audit.bounds import (
    Guesses,
    best_bound,
    chance,
    clopper_pearson,
    log_pmf,
    one_run_bound,
    p_value,
    two_point_bound,
)
from bellwether.arms.audit.one_shot import cosines, estimated_epsilon, gaussian_epsilon, hockey_stick, random_directions
from bellwether.arms.audit.ranks import auc, exposure, lira, mean_over, over_runs, tpr_at

SLACK = 1e-9


# Exposure -----------------------------------------------------------------------------------------


def test_exposure_is_the_logarithm_of_candidates_over_rank():
    losses = [5.0, 1.0, 3.0, 2.0, 9.0, 8.0, 7.0, 6.0]
    # Eight candidates, 3 bits: the best has all of them; the second log2(8 / 2) = 2; the last log2(8 / 8) = 0.
    assert exposure(losses, 1) == 3
    assert exposure(losses, 3) == 2
    assert exposure(losses, 4) == 0


def test_of_equal_losses_the_secret_stands_in_the_middle():
    # Ranks 1, 2 and 3 are shared, so the rank is 2.
    assert exposure([1.0, 1.0, 1.0, 2.0], 0) == 1


def test_a_secret_that_was_never_seen_has_the_exposure_of_chance():
    # Ranks 1 to 4: (2 + 1 + log2(4 / 3) + 0) / 4.
    assert chance(4) == pytest.approx((3 + math.log2(4 / 3)) / 4, abs=SLACK)
    # For many it is the integral of -log2 over 0..1, 1 / ln 2.
    assert chance(10**6) == pytest.approx(1 / math.log(2), abs=1e-4)


# Areas --------------------------------------------------------------------------------------------


def scored(rows=300, shift=0.7, seed=1, digits=1):
    draw = np.random.default_rng(seed)
    member_N = draw.random(rows) < 0.5
    return np.round(draw.normal(size=rows) + shift * member_N, digits), member_N


def test_the_area_is_scikit_learns_with_and_without_weights():
    scores_N, member_N = scored()
    weights_BN = np.random.default_rng(2).integers(0, 4, (5, len(scores_N))).astype(float)
    assert auc(scores_N, member_N)[0] == pytest.approx(roc_auc_score(member_N, scores_N), abs=SLACK)
    expected = [roc_auc_score(member_N, scores_N, sample_weight=weights_N) for weights_N in weights_BN]
    np.testing.assert_allclose(auc(scores_N, member_N, weights_BN), expected, atol=SLACK)


def test_the_area_counts_equal_scores_half():
    # Pairs of member and other: (2, 1) right, (2, 2) equal, (1, 1) equal, (1, 2) wrong: (1 + ½ + ½) / 4.
    assert auc(np.array([2.0, 1.0, 1.0, 2.0]), np.array([True, True, False, False]))[0] == 0.5


@pytest.mark.parametrize("fpr", [0.01, 0.05, 0.3])
def test_true_positives_are_those_of_scikit_learns_curve(fpr):
    scores_N, member_N = scored()
    weights_BN = np.random.default_rng(3).integers(0, 4, (4, len(scores_N))).astype(float)
    expected = []
    for weights_N in weights_BN:
        false, true, _ = roc_curve(member_N, scores_N, sample_weight=weights_N, drop_intermediate=False)
        expected.append(true[false <= fpr + SLACK].max())
    np.testing.assert_allclose(tpr_at(scores_N, member_N, weights_BN, fpr), expected, atol=SLACK)


def test_without_a_member_there_is_no_area():
    assert np.isnan(auc(np.ones(3), np.zeros(3, bool))[0])
    assert np.isnan(tpr_at(np.ones(3), np.ones(3, bool))[0])


def test_the_interval_of_one_run_has_delongs_width():
    scores_N, member_N = scored(rows=600, digits=6)
    found = over_runs(scores_N[None], member_N[None], auc, np.random.default_rng(4), samples=4000)
    # DeLong, DeLong and Clarke-Pearson 1988: the variances of placements over their numbers.
    inside, outside = scores_N[member_N], scores_N[~member_N]
    above = (inside[:, None] > outside).mean(1), (inside[:, None] > outside).mean(0)
    error = math.sqrt(above[0].var(ddof=1) / len(inside) + above[1].var(ddof=1) / len(outside))
    assert found.mean == pytest.approx(roc_auc_score(member_N, scores_N), abs=SLACK)
    # 4000 resamples leave a doubt of about 2 % of the width; percentiles differ from normal ones by about as much.
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.06)


def test_runs_share_an_interval_and_rows_that_are_left_out_do_not_count():
    scores_N, member_N = scored(rows=100)
    half = np.where(np.arange(100) < 50, scores_N, np.nan)
    found = over_runs(np.stack([scores_N, half]), np.stack([member_N, member_N]), auc, np.random.default_rng(5))
    expected = (roc_auc_score(member_N, scores_N) + roc_auc_score(member_N[:50], scores_N[:50])) / 2
    assert found.mean == pytest.approx(expected, abs=SLACK)
    assert found.low < expected < found.high


def test_a_mean_has_the_width_of_its_standard_error():
    values_N = np.random.default_rng(6).normal(size=400)
    found = mean_over(values_N, np.random.default_rng(7))
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * values_N.std() / 20, rel=0.1)


# LiRA ---------------------------------------------------------------------------------------------


def test_lira_is_the_ratio_of_two_gaussians_of_the_other_runs():
    member = np.array([[True], [True], [True], [False], [False]])
    scores = np.array([[2.0], [4.0], [3.0], [0.0], [2.0]])
    # For the first run: in, 4 and 3: mean 3.5, variance 0.5, of a new score 0.5 · 1.5; out, 0 and 2: mean 1,
    # variance 2, of a new score 2 · 1.5.
    expected = stats.norm.logpdf(2, 3.5, math.sqrt(0.75)) - stats.norm.logpdf(2, 1, math.sqrt(3))
    assert lira(scores, member)[0, 0] == pytest.approx(expected, abs=SLACK)


def test_lira_says_nothing_of_a_row_that_all_others_have_in():
    member = np.array([[True, True], [True, False], [True, True], [True, False]])
    assert np.isnan(lira(np.random.default_rng(0).normal(size=(4, 2)), member)[:, 0]).all()


def test_lira_sees_what_one_threshold_for_all_rows_does_not():
    draw = np.random.default_rng(8)
    member_SN = draw.random((16, 400)) < 0.5
    # Rows differ by far more than being trained on changes.
    scores_SN = 10 * draw.normal(size=400) + draw.normal(size=(16, 400)) + 1.5 * member_SN
    plain, judged = (
        over_runs(one, member_SN, auc, np.random.default_rng(9), samples=200).mean
        for one in (scores_SN, lira(scores_SN, member_SN))
    )
    assert plain < 0.58
    # Two Gaussians 1.5 apart: Φ(1.5 / √2) = 0.856, less what 16 shadows do not know.
    assert 0.8 < judged < 0.87


# Bounds by guesses --------------------------------------------------------------------------------


def test_ten_of_ten_guesses_refute_what_one_can_work_out_by_hand():
    # q ** 10 = 0.05 where q = 0.7411, so ε = ln(0.7411 / 0.2589).
    q = 0.05**0.1
    assert one_run_bound(Guesses(10, 10, 10), 0.0) == pytest.approx(math.log(q / (1 - q)), abs=1e-9)


def test_the_bound_is_the_one_that_the_paper_prints():
    # Steinke, Nasr and Jagielski 2023, appendix D: m 1000, r 100, v 75, δ 1e-4, at 95 %.
    assert one_run_bound(Guesses(1000, 100, 75), 1e-4) == pytest.approx(0.673, abs=5e-4)


def test_a_p_value_is_the_tail_of_a_binomial_and_what_delta_adds():
    guesses, epsilon, delta = Guesses(50, 20, 16), 0.5, 1e-3
    right = 1 / (1 + math.exp(-epsilon))
    alpha = max((stats.binom.cdf(15, 20, right) - stats.binom.cdf(15 - i, 20, right)) / i for i in range(1, 17))
    expected = stats.binom.sf(15, 20, right) + 2 * 50 * delta * alpha
    assert p_value(guesses, epsilon, delta) == pytest.approx(expected, abs=1e-9)


def test_guesses_no_better_than_a_coin_refute_nothing():
    assert one_run_bound(Guesses(100, 100, 55), 0.0) == 0
    assert one_run_bound(Guesses(0, 0, 0), 0.0) == 0


def test_more_right_than_made_is_refused():
    with pytest.raises(ValueError, match="12 right of 10 guesses"):
        Guesses(20, 10, 12)


def test_probabilities_of_counts_are_scipys():
    np.testing.assert_allclose(np.exp(log_pmf(30, 0.3)), stats.binom.pmf(np.arange(31), 30, 0.3), atol=1e-12)


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (3, 10), (10, 10), (240, 500)])
def test_clopper_and_pearson_are_quantiles_of_beta(successes, trials):
    low, high = clopper_pearson(successes, trials, 0.975)
    expected_low = stats.beta.ppf(0.025, successes, trials - successes + 1) if successes else 0.0
    expected_high = stats.beta.ppf(0.975, successes + 1, trials - successes) if successes < trials else 1.0
    assert (low, high) == pytest.approx((expected_low, expected_high), abs=1e-9)


def test_two_rates_give_the_bound_that_one_can_work_out_by_hand():
    # All of 100 and none of 100: both ends have 0.025 left, 0.025 ** 0.01 = 0.96378 and 1 - 0.96378.
    end = 0.025**0.01
    assert two_point_bound(100, 100, 0, 100, 0.0) == pytest.approx(math.log(end / (1 - end)), abs=1e-6)
    assert two_point_bound(50, 100, 50, 100, 0.0) == 0
    assert two_point_bound(0, 0, 0, 10, 0.0) == 0


@pytest.mark.parametrize("epsilon", [0.0, 1.0, 2.0])
def test_randomised_response_is_hardly_ever_said_to_be_worse_than_it_is(epsilon):
    # Each bit is told truly with e^ε / (1 + e^ε): exactly ε-private, and the worst case of the theorem.
    draw, wrong, bounds = np.random.default_rng(10), 0, []
    for _ in range(200):
        present_M = draw.random(200) < 0.5
        told_M = np.where(draw.random(200) < 1 / (1 + math.exp(-epsilon)), present_M, ~present_M)
        bound, _ = best_bound(told_M + 0.001 * draw.random(200), present_M, 0.0)
        bounds.append(bound)
        wrong += bound > epsilon
    # At most 5 % of 200 by the theorem; the count of such is above 20 with a probability of 0.001.
    assert wrong <= 20
    # Far from vacuous: 200 guesses leave about 2 · 1.96 standard errors of a logit.
    assert np.mean(bounds) > epsilon - 0.9


def test_scores_without_bits_are_refused():
    with pytest.raises(ValueError, match="give one finite score for each bit"):
        best_bound([1.0, math.nan], [True, False], 0.0)


# Bounds by directions -----------------------------------------------------------------------------


def test_the_epsilon_of_two_gaussians_is_the_gaussian_mechanisms():
    # Balle and Wang 2018: for sensitivity over deviation 1 and δ 1e-5, ε is 4.3772.
    assert gaussian_epsilon((1, 1), (0, 1), 1e-5) == pytest.approx(4.37718, abs=1e-4)


@pytest.mark.parametrize(("first", "second"), [((1, 2), (0, 1)), ((0, 1), (0.5, 3)), ((2, 0.5), (0, 1))])
def test_the_divergence_of_two_gaussians_is_the_integral(first, second):
    x = np.linspace(-40, 40, 2_000_001)
    gap = stats.norm.pdf(x, *first) - math.exp(0.7) * stats.norm.pdf(x, *second)
    assert hockey_stick(first, second, 0.7) == pytest.approx(
        float(np.clip(gap, 0, None).sum() * (x[1] - x[0])), abs=1e-6
    )


def test_cosines_are_the_largest_over_rounds_and_those_of_strangers_have_a_deviation_of_one_over_root():
    directions_KP = random_directions(200, 1000, np.random.default_rng(11))
    np.testing.assert_allclose(np.linalg.norm(directions_KP, axis=1), 1)
    sums_RP = np.stack([directions_KP[0] * 3, directions_KP[1] * 5])
    found = cosines(directions_KP, sums_RP)
    np.testing.assert_allclose(found[:2], 1)
    stranger = cosines(directions_KP[2:], sums_RP[:1])
    # 198 cosines: their deviation is within 4 · 1 / √(2 · 197) of 1 / √1000.
    assert stranger.std() * math.sqrt(1000) == pytest.approx(1, abs=4 / math.sqrt(2 * 197))
    np.testing.assert_array_equal(cosines(directions_KP, np.zeros((2, 1000))), 0)


def test_one_run_with_many_canaries_estimates_the_gaussian_mechanisms_epsilon():
    draw, size, noise, count = np.random.default_rng(12), 100_000, 1.0, 300
    directions_KP = random_directions(count, size, draw)
    total_P = directions_KP.sum(0) + noise * draw.normal(size=size)
    present_K = cosines(directions_KP, total_P)
    found = estimated_epsilon(present_K, (0.0, size**-0.5), 1e-5)
    # The sum's length is about √(count + noise² size), so that a present cosine is 1 / √(count + size) away from 0 in
    # units of which 1 / √size is the deviation: nearly 1, whose ε is 4.38. 300 cosines leave 1 / √300 of it on the
    # mean, and half of that on the deviation; ε moves by 5.5 per unit there.
    assert found == pytest.approx(4.38, abs=4 * 5.5 * 1.25 / math.sqrt(count))


def test_cosines_that_do_not_vary_are_told_apart_always_or_never():
    assert estimated_epsilon([0.5, 0.5], (0.0, 0.1), 1e-5) == math.inf
    assert estimated_epsilon([0.0, 0.0], (0.0, 0.1), 1e-5) == 0
