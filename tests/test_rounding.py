"""What comparisons of numbers stand on: bounds that hold and bite, and models in float64 that are the same ones."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from rounding import assert_as_near, assert_rounded, coarse, gamma, unit
from tiny_models import ARCHITECTURES, exact_base, padded, tiny_base


def test_the_unit_is_the_most_by_which_a_number_is_rounded():
    for dtype, digits in ((torch.float64, 53), (torch.float32, 24), (torch.bfloat16, 8)):
        assert unit(dtype) == 2.0**-digits
        halfway = torch.tensor(1 + 2.0**-digits, dtype=torch.float64) if digits < 53 else torch.tensor(1.0)
        assert abs(float(halfway.to(dtype)) - float(halfway)) <= unit(dtype)
    assert gamma(torch.float32, 100) == pytest.approx(100 * 2.0**-24, rel=1e-5)
    with pytest.raises(AssertionError, match="say nothing"):
        gamma(torch.bfloat16, 200)


def test_sums_of_float32_keep_to_their_bound_in_any_order_and_one_wrong_term_does_not():
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 200, generator=draw)
    exact = float(sum(Fraction(a) * Fraction(b) for a, b in zip(x.tolist(), y.tolist(), strict=True)))
    size = math.fsum((x.double() * y.double()).abs().tolist())
    for order in (torch.arange(200), torch.arange(200).flip(0), torch.randperm(200, generator=draw)):
        total = torch.tensor(0.0)
        for a, b in zip(x[order], y[order], strict=True):
            total = total + a * b
        assert_rounded(total, exact, size, torch.float32, 200)
    with pytest.raises(AssertionError, match="times what rounding may"):
        assert_rounded(torch.tensor(exact - float(x[0] * y[0])), exact, size, torch.float32, 200)


def test_numbers_of_few_bits_are_multiplied_and_added_without_rounding():
    draw = np.random.default_rng(0)
    a, b, w = (coarse(draw.uniform(-1, 1, shape).astype(np.float32)) for shape in ((9, 4), (4, 9), (9, 9)))
    assert np.array_equal((w + 2 * a @ b).astype(np.float64), w.astype(np.float64) + 2 * a.astype(float) @ b)
    assert np.abs(a).max() > 0.5


def test_what_is_twice_as_far_from_the_exact_result_as_the_reference_is_not_as_near():
    exact = torch.ones(200, dtype=torch.float64)
    off = 1e-6 * torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_as_near(exact - 1.9 * off, exact + off, exact)
    for found, reference in ((exact + 2.1 * off, exact + off), (exact, exact), (exact, 2 * exact)):
        with pytest.raises(AssertionError):
            assert_as_near(found, reference, exact)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_in_float64_is_that_of_transformers_but_for_rounding(architecture):
    base = tiny_base(architecture, torch.float32)
    ids_NT, attention_NT = padded([12, 12])  # longer than the attention window of those that have one
    with torch.no_grad():
        ours, theirs = (
            one.model(input_ids=ids_NT, attention_mask=attention_NT).logits for one in (exact_base(base), base)
        )
    assert ours.dtype == torch.float64
    # Of two layers: sums over widths of 24, 40 and 24, over 12 positions and heads of 6, and two dozen other steps.
    operations = 2 * (4 * 24 + 40 + 12 + 6 + 24) + 3 * 24
    assert 0 < (ours - theirs).norm() < gamma(torch.float32, operations) * ours.norm()
    # Nothing in between is held in float32: rows in another batch give the same but for float64's rounding.
    with torch.no_grad():
        alone = exact_base(base).model(input_ids=ids_NT[:1, :11]).logits
    assert (alone - ours[:1, :11]).abs().max() < 1e-13
