"""Vectors in few bytes: rounding that is right on average, the largest entries, and what forms they have."""

import numpy as np
import pytest

from bellwether.exchange.adapter import flat
from bellwether.exchange.packing import (
    BITMAP,
    BLOCK,
    CODES,
    INDICES,
    LARGEST,
    LEVELS,
    SCALES,
    VALUES,
    forms,
    pack,
    packed_bytes,
    positions,
    split,
    unpack,
)

FLOAT64 = np.dtype(np.float64)


def drawn(number=0):
    return np.random.default_rng(number)


def there_and_back(values_P, kind, keep=1.0, number=0):
    return unpack(pack(values_P, kind, drawn(number), keep), kind, len(values_P), values_P.dtype)


def uneven(size, dtype=np.float64):
    """Values over thirty orders of magnitude, block by block."""
    draw = drawn(5)
    return (draw.normal(size=size) * 10.0 ** draw.integers(-15, 15, -(-size // BLOCK)).repeat(BLOCK)[:size]).astype(
        dtype
    )


@pytest.mark.parametrize("kind", LEVELS)
def test_rounding_is_right_on_average(kind):
    """The mean of n draws lies within six standard errors; a rounding to one of two neighbours has at most step / 2."""
    values_P, times, draw = drawn(1).normal(size=200), 4000, drawn(2)
    total_P = sum(unpack(pack(values_P, kind, draw), kind, 200, FLOAT64) for _ in range(times))
    largest = np.abs(values_P).max()
    blocks_B = np.array([np.abs(values_P[start : start + BLOCK]).max() for start in range(0, 200, BLOCK)])
    # A scale is a float16 that was rounded up, by at most one part in 1024 above its smallest normal number.
    steps_P = np.repeat(blocks_B * (1 + 2**-10), BLOCK)[:200] / LEVELS[kind]
    assert (blocks_B / largest > 2**-14).all()
    assert (np.abs(total_P / times - values_P) <= 6 * steps_P / 2 / np.sqrt(times)).all()


def test_rounding_by_hand():
    # m = 14 stands in the first block, whose step in 4 bits is 14 / 7 = 2; that of the second block, whose largest
    # entry is 3.5 = 14 / 4, is 0.5.
    values_P = np.concatenate([[14.0, -6.0, 3.0, 0.0], np.zeros(60), [3.5, -0.5, 0.25]])
    for number in range(20):
        packed = pack(values_P, "4bit", drawn(number))
        assert packed[LARGEST].tolist() == [14.0]
        assert packed[SCALES].tolist() == [1.0, 0.25]
        found_P = unpack(packed, "4bit", 67, FLOAT64)
        assert found_P[[0, 1, 3, 64, 65]].tolist() == [14.0, -6.0, 0.0, 3.5, -0.5]
        assert found_P[2] in (2.0, 4.0)
        assert found_P[66] in (0.0, 0.5)
        # 14 is the level 7 + 7, -6 the level -3 + 7; the lower half of a byte stands first.
        assert packed[CODES][0] == 14 + (4 << 4)
        assert packed[CODES][-1] in (7, 8)  # a single code, and a half that is empty


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", LEVELS)
def test_no_value_is_off_by_more_than_a_step_however_uneven_blocks_are(kind, dtype):
    values_P = uneven(1000, dtype)
    packed = pack(values_P, kind, drawn())
    largest, scales_P = float(packed[LARGEST][0]), packed[SCALES].astype(np.float64).repeat(BLOCK)[:1000]
    assert (np.abs(values_P.astype(np.float64)) <= largest * scales_P).all()  # nothing is cut off
    off_P = np.abs(unpack(packed, kind, 1000, np.dtype(dtype)).astype(np.float64) - values_P)
    # Steps and products are computed with three roundings.
    bound_P = largest * scales_P / LEVELS[kind] + 3 * np.finfo(dtype).eps * np.abs(values_P)
    assert (off_P <= bound_P).all()


@pytest.mark.parametrize("kind", [*LEVELS, "top_k"])
@pytest.mark.parametrize("size", [1, 2, 63, 64, 65, 129, 1000])
@pytest.mark.parametrize("keep", [0.001, 0.02, 0.1, 1.0])
def test_what_is_packed_has_the_forms_that_follow_from_the_recipe(kind, size, keep):
    packed, due = pack(uneven(size, np.float32), kind, drawn(), keep), forms(kind, size, keep)
    assert {name: (value.dtype, value.shape) for name, value in packed.items()} == due
    assert sum(value.nbytes for value in packed.values()) == packed_bytes(kind, size, keep)


def test_bytes_of_a_default_adapter_by_hand():
    # 425,000 values: 6,641 blocks. A byte or a half each, two bytes a scale, four for the largest.
    assert packed_bytes("none", 425_000) == 1_700_000
    assert packed_bytes("8bit", 425_000) == 425_000 + 2 * 6_641 + 4
    assert packed_bytes("4bit", 425_000) == 212_500 + 2 * 6_641 + 4
    # 42,500 values of two bytes, and a bit for each of all.
    assert packed_bytes("top_k", 425_000, 0.1) == 85_000 + 53_125 + 4
    # 425 values of two bytes, and four for where each stands.
    assert packed_bytes("top_k", 425_000, 0.001) == 850 + 1_700 + 4


@pytest.mark.parametrize("keep", [0.001, 0.02, 0.1, 0.5, 1.0])
def test_the_largest_entries_are_those_that_sorting_finds(keep):
    values_P = drawn(3).normal(size=500)
    values_P[::7] = np.round(values_P[::7])  # equal ones, of which the first are taken
    count = max(1, int(500 * keep + 0.5))
    order = np.argsort(-np.abs(values_P), kind="stable")[:count]
    packed = pack(values_P, "top_k", drawn(), keep)
    assert positions(packed, 500).tolist() == sorted(order.tolist())
    assert len(packed[VALUES]) == count
    expected_P = np.zeros(500)
    expected_P[order] = values_P[order]
    # A float16 share of the largest is off by 2^-11 of itself, or by half of the smallest, 2^-25, of the largest.
    bound_P = np.abs(expected_P) * 2.0**-11 + np.abs(values_P).max() * (2.0**-25 + 2.0**-23)
    assert (np.abs(there_and_back(values_P, "top_k", keep) - expected_P) <= bound_P).all()


@pytest.mark.parametrize(("keep", "name"), [(0.03, INDICES), (0.032, BITMAP)])
def test_positions_take_the_smaller_form(keep, name):
    # Of 1,000 entries a bit each takes 125 bytes, as four bytes each of 31 do.
    assert set(pack(uneven(1000), "top_k", drawn(), keep)) == {LARGEST, VALUES, name}


@pytest.mark.parametrize("kind", [*LEVELS, "top_k"])
def test_zeros_stay_zero(kind):
    assert not there_and_back(np.zeros(100, np.float32), kind, 0.1).any()
    half = np.concatenate([np.zeros(70), np.ones(58)])
    for number in range(5):
        assert not there_and_back(half, kind, 0.5, number)[:70].any()


@pytest.mark.parametrize("kind", [*LEVELS, "top_k"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_seen_in_the_largest(kind, bad):
    packed = pack(np.array([1.0, bad, 2.0], np.float32), kind, drawn())
    assert not np.isfinite(packed[LARGEST]).any()


@pytest.mark.parametrize("kind", [*LEVELS, "top_k"])
@pytest.mark.parametrize("size", [1e-44, 1e-38, 3e38])
def test_the_smallest_and_the_largest_numbers_of_float32_are_packed(kind, size):
    values_P = (drawn(4).uniform(-1, 1, 200) * size).astype(np.float32)
    found_P = there_and_back(values_P, kind)
    assert np.isfinite(found_P).all()
    tiny = np.finfo(np.float32).smallest_subnormal
    # A step that is itself a subnormal number is off by up to half of the smallest, which counts up to L times.
    off_P = np.abs(found_P.astype(np.float64) - values_P)
    assert off_P.max() <= np.abs(values_P).max() / 7 * (1 + 2**-9) + 127 * float(tiny)


def test_the_same_draws_give_the_same_bytes_and_others_do_not():
    values_P = drawn(6).normal(size=300).astype(np.float32)
    one, same, other = (pack(values_P, "4bit", drawn(number))[CODES] for number in (1, 1, 2))
    assert one.tobytes() == same.tobytes() != other.tobytes()


def test_splitting_undoes_flattening():
    tensors = {"b": drawn().normal(size=(3, 2)), "a": drawn().normal(size=(2, 5))}
    found = split(flat(tensors, tensors), tensors)
    assert list(found) == ["b", "a"]
    for key, value in tensors.items():
        np.testing.assert_array_equal(found[key], value)
