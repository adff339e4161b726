"""Intervals against closed forms, coverage on synthetic cases, Holm's adjustment by hand."""

import itertools
import math
import time

import numpy as np
import pytest
from rounding import FLOAT64
from scipy import stats

from bellwether.tools.intervals import by_category, difference, holm, interval

NORMAL_95 = 1.959964


def generator(seed=0):
    return np.random.default_rng(seed)


def half_width(found):
    return (found.high - found.low) / 2


def test_the_mean_is_that_of_seeds_over_categories_over_ratios_of_sums():
    # By hand. Seed 1: a (2 + 4) / (1 + 2) = 2, b 9 / 3 = 3, mean 2.5; seed 2: a 3 / 3 = 1, b 3 / 3 = 1, mean 1.
    found = interval([[2, 4, 9], [1, 2, 3]], ["a", "a", "b"], generator(), denominators_P=[1, 2, 3], samples=10)
    assert found.mean == pytest.approx(1.75)
    # With weights of 1: a 3, b 9, mean 6; a 1.5, b 3, mean 2.25.
    assert interval([[2, 4, 9], [1, 2, 3]], ["a", "a", "b"], generator(), samples=10).mean == pytest.approx(4.125)


def test_prompts_alone_give_the_closed_form_of_a_stratified_mean():
    # One seed; two categories of unequal size and spread, each with half of the weight.
    draw = generator(1)
    a_P, b_P = draw.normal(0, 1, 400), draw.normal(5, 3, 900)
    found = interval([np.r_[a_P, b_P]], ["a"] * 400 + ["b"] * 900, generator())
    error = 0.5 * math.sqrt(a_P.var(ddof=1) / 400 + b_P.var(ddof=1) / 900)
    assert half_width(found) == pytest.approx(NORMAL_95 * error, rel=0.03)
    assert found.mean == pytest.approx((a_P.mean() + b_P.mean()) / 2)


def test_a_ratio_of_sums_has_the_closed_form_of_a_ratio_estimator():
    draw = generator(2)
    tokens_P = draw.integers(1, 60, 800).astype(float)
    nats_P = tokens_P * draw.lognormal(0, 0.5, 800)
    found = interval([nats_P], ["a"] * 800, generator(), denominators_P=tokens_P)
    ratio = nats_P.sum() / tokens_P.sum()
    # Cochran 1977, equation 6.13, without the correction for a finite population.
    error = math.sqrt(((nats_P - ratio * tokens_P) ** 2).sum() / 799 / 800) / tokens_P.mean()
    assert found.mean == pytest.approx(ratio)
    assert half_width(found) == pytest.approx(NORMAL_95 * error, rel=0.03)


@pytest.mark.parametrize(("seeds", "student"), [(400, 1.965927), (6, 2.570582)])
def test_seeds_alone_give_students_interval(seeds, student):
    # One prompt; the quantiles are those of t with 399 and 5 degrees of freedom.
    values_S = generator(3).normal(2, 1, seeds)
    found = interval(values_S[:, None], ["a"], generator())
    error = values_S.std(ddof=1) / math.sqrt(seeds)
    # A mean of six resampled values has lighter tails than the normal curve.
    assert half_width(found) == pytest.approx(student * error, rel=0.03 if seeds > 100 else 0.08)


def test_seeds_and_prompts_that_act_apart_add_their_variances():
    draw = generator(4)
    seeds_S, prompts_P = draw.normal(0, 0.2, 60), draw.normal(0, 2, 600)
    found = interval(seeds_S[:, None] + prompts_P, ["a"] * 600, generator())
    error = math.sqrt(seeds_S.var(ddof=1) / 60 + prompts_P.var(ddof=1) / 600)
    assert half_width(found) == pytest.approx(NORMAL_95 * error, rel=0.03)


def test_noise_that_belongs_to_seed_and_prompt_together_is_counted_once():
    values_SP = generator(5).normal(0, 1, (40, 400))
    found = interval(values_SP, ["a"] * 400, generator())
    # The bootstrap alone would give 1.73 times this; the estimate of one of the parts may lie above it.
    assert half_width(found) == pytest.approx(NORMAL_95 / math.sqrt(40 * 400), rel=0.25)


# Noise of seeds, of prompts, of both together. Measured on 600 cases of 8 categories of 40 prompts:
# 0.95, 0.95 and 0.95 with 5 seeds; 0.96, 0.95 and 0.94 with 10.
MIXTURES = [(0.3, 0.0, 1.0), (0.05, 1.0, 1.0), (0.0, 1.0, 0.3)]


@pytest.mark.parametrize(("seeds", "mixture"), list(itertools.product([5, 10], MIXTURES)))
def test_nominal_95_percent_intervals_hold_the_truth_about_so_often(seeds, mixture):
    draw, cases = generator(6), 400
    strata = [f"category {number // 10}" for number in range(40)]
    held = 0
    for _ in range(cases):
        parts = [draw.normal(0, mixture[0], (seeds, 1)), draw.normal(0, mixture[1], 40)]
        values_SP = sum(parts) + draw.normal(0, mixture[2], (seeds, 40))
        found = interval(values_SP, strata, draw, samples=300)
        held += found.low <= 0 <= found.high
    # Three standard errors of a share of 400 cases are 0.033; the percentiles alone fall to 0.85 with 5 seeds.
    assert 0.91 <= held / cases <= 0.985


def test_a_difference_of_paired_arms_forgets_what_they_share():
    draw = generator(7)
    shared_SP = draw.normal(0, 3, (8, 1)) + draw.normal(0, 3, 200)
    first_SP, second_SP = (shared_SP + draw.normal(shift, 0.1, (8, 200)) for shift in (0.05, 0.0))
    strata = ["a", "b"] * 100
    found = difference(first_SP, second_SP, strata, generator())
    assert found.mean == pytest.approx((first_SP - second_SP).mean())
    assert 0.02 < found.low < found.high < 0.08
    assert found.p < 0.001
    assert half_width(interval(first_SP, strata, generator())) > 10 * half_width(found)


def test_an_arm_without_seeds_meets_every_seed_of_the_other():
    values_SP = generator(8).normal(1, 1, (5, 30))
    base_P = generator(9).normal(0, 1, 30)
    once = difference(values_SP, base_P, ["a"] * 30, generator())
    assert once == difference(values_SP, np.tile(base_P, (5, 1)), ["a"] * 30, generator())


def test_the_p_value_agrees_with_students_test_and_with_the_interval():
    values_S = np.array([0.9, -0.2, 1.4, 0.5, 1.1, 0.1, 0.8, -0.4, 1.9, 0.6])
    found = interval(values_S[:, None], ["a"], generator(), samples=50_000)
    # Student's test gives t = 2.976 with 9 degrees of freedom, p = 0.0155.
    assert found.p == pytest.approx(stats.ttest_1samp(values_S, 0).pvalue, abs=0.005)
    for level, holds in ((1 - found.p - 0.002, False), (1 - found.p + 0.002, True)):
        again = interval(values_S[:, None], ["a"], generator(), samples=50_000, level=level)
        assert (again.low <= 0 <= again.high) == holds


def test_p_values_are_even_where_nothing_differs():
    draw = generator(10)
    p_values = []
    for _ in range(400):
        prompts_P, seeds_S = draw.normal(0, 1, 40), draw.normal(0, 0.15, (5, 1))
        p_values.append(interval(prompts_P + seeds_S, ["a"] * 40, draw, samples=300).p)
    # Shares below each tenth, within four standard errors.
    shares = [np.mean(np.array(p_values) <= tenth / 10) for tenth in range(1, 10)]
    np.testing.assert_allclose(shares, np.arange(1, 10) / 10, atol=0.1)


def test_without_any_difference_the_interval_is_a_point_and_p_is_1():
    found = difference(np.ones((3, 4)), np.ones((3, 4)), ["a", "a", "b", "b"], generator(), samples=50)
    assert (found.mean, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)


def test_each_category_has_the_interval_that_it_has_alone():
    values_SP = generator(11).normal(0, 1, (4, 60)) + np.repeat([0.0, 5.0, 10.0], 20)
    strata = ["b"] * 20 + ["a"] * 20 + ["c"] * 20
    found = by_category(values_SP, strata, generator(), samples=20_000)
    assert list(found) == ["a", "b", "c"]
    alone = interval(values_SP[:, 20:40], ["a"] * 20, generator(12), samples=20_000)
    assert found["a"].mean == pytest.approx(alone.mean, rel=FLOAT64)
    assert half_width(found["a"]) == pytest.approx(half_width(alone), rel=0.05)


def test_the_same_generator_gives_the_same_interval():
    values_SP = generator(13).normal(0, 1, (3, 12))
    first, second = (interval(values_SP, ["a", "b"] * 6, generator(5), samples=100) for _ in range(2))
    assert first == second


def test_ten_thousand_resamples_of_ten_seeds_and_320_prompts_take_at_most_a_few_times_as_long_as_drawing_them():
    values_SP, strata = generator().normal(size=(10, 320)), [f"c{number % 8}" for number in range(320)]

    def seconds(work):
        start = time.process_time()
        work()
        return time.process_time() - start

    def draws():
        for _ in range(8):
            generator().multinomial(40, np.full(40, 1 / 40), 10_000)

    assert min(seconds(lambda: interval(values_SP, strata, generator())) for _ in range(3)) < 5 * seconds(draws)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (([[1.0, 2.0]], ["a"]), "shape"),
        (([[1.0, math.nan]], ["a", "a"]), "finite"),
        ((np.empty((0, 2)), ["a", "a"]), "shape"),
        ((np.ones((2, 2, 2)), ["a", "a"]), "shape"),
    ],
)
def test_scores_that_do_not_fit_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        interval(*arguments, generator())


def test_denominators_and_settings_and_arms_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="positive"):
        interval([[1.0, 2.0]], ["a", "a"], generator(), denominators_P=[1.0, 0.0])
    with pytest.raises(ValueError, match="level"):
        interval([[1.0, 2.0]], ["a", "a"], generator(), level=95)
    with pytest.raises(ValueError, match="arms"):
        difference(np.ones((3, 2)), np.ones((2, 2)), ["a", "a"], generator())


def test_holms_adjustment_equals_a_case_worked_by_hand():
    # Sorted: 0.005 · 4 = 0.02; 0.01 · 3 = 0.03; 0.03 · 2 = 0.06; 0.04 · 1 = 0.04, raised to 0.06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []
