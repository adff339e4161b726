"""Curves over rounds or passes: the middle of several, and means over neighbours that leave first and last alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_POINTS = 50  # of a curve, at most
_FEW = 10  # points of a curve that is drawn as it is
_SHARE = 10  # a point has at most a tenth of the curve on either side

SMOOTHED = (
    "Lines are means of a point and of as many neighbours before it as after it, at most a tenth of the curve on "
    "either side; first and last points are as measured. Faint marks are what was measured."
)


def middle_curve(
    curves: Sequence[Sequence[tuple[float, float]]],
) -> tuple[list[float], list[float], list[float], list[float]]:
    """Return the median of several curves, and the band that holds the middle 80 % of them.

    Args:
        curves: each a sequence of places and values, places rising.

    Returns:
        Places, medians, lower and upper ends of the band, which are empty for a single curve.
    """
    if len(curves) == 1:
        return [x for x, _ in curves[0]], [y for _, y in curves[0]], [], []
    first, last = max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)
    places = [[x for x, _ in curve] for curve in curves]
    if all(one == places[0] for one in places):
        x = np.array(places[0])
    else:
        points = min(_POINTS, max(len(curve) for curve in curves))
        x = np.linspace(first, last, points) if last > first else np.array([first])
    values = np.array([np.interp(x, *np.array(curve).T) for curve in curves])
    low, middle, high = np.quantile(values, [0.1, 0.5, 0.9], axis=0)
    return x.tolist(), middle.tolist(), low.tolist(), high.tolist()


def reach(points: int) -> int:
    """Return over how many neighbours on either side a curve is smoothed; 0 where it is drawn as it is."""
    return 0 if points < _FEW else max(1, points // _SHARE)


def smoothed(values: Sequence[float]) -> list[float]:
    """Return a curve smoothed by the mean of each point and its neighbours, of which near an end there are fewer.

    Args:
        values: at places that rise.
    """
    last, most = len(values) - 1, reach(len(values))
    near = [min(most, place, last - place) for place in range(len(values))]
    return [
        math.fsum(values[place - side : place + side + 1]) / (2 * side + 1) if side else values[place]
        for place, side in enumerate(near)
    ]
