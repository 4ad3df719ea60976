"""Curves of a page: thinning loses no extreme and no gap, and a curve goes on after a stop."""

import math

import numpy as np
import pytest

from flax_diffusion.core.report.curves import MOST, Curve


def filled(values, first=1):
    curve = Curve()
    for step, value in enumerate(values, first):
        curve.add(step, value)
    return curve


@pytest.mark.parametrize("steps", [1, MOST, MOST + 1, 10_000, 100_000])
def test_thinned_curves_keep_what_is_in_them(steps):
    values = np.random.default_rng(0).normal(size=steps)
    values[steps // 3] = 1e6
    values[steps // 2] = -1e6
    curve = filled(values.tolist())
    last, count, mean, low, high, bad = curve.rows.T
    assert len(last) <= MOST + 1
    assert len(last) > min(steps, MOST // 2) - 2
    assert (count.sum(), bad.sum(), curve.last_step) == (steps, 0, steps)
    assert (low.min(), high.max()) == (values.min(), values.max())
    assert (count * mean).sum() == pytest.approx(values.sum(), rel=1e-9, abs=1e-6)
    inside = slice(int(np.searchsorted(last, 1.0)), None)
    places = last[inside] // curve.width
    assert (np.diff(places) == 1).all()
    for place in (0, len(last) // 2, len(last) - 1):  # each bucket is of its own steps
        steps_of = np.arange(max(1, last[place] // curve.width * curve.width), last[place] + 1).astype(int)
        assert mean[place] == pytest.approx(values[steps_of - 1].mean(), rel=1e-9, abs=1e-9)
        assert (count[place], low[place]) == (len(steps_of), values[steps_of - 1].min())


def test_gaps_and_values_that_are_not_finite():
    curve = Curve()
    for step in range(1, 20_001):
        if not 5_000 <= step < 6_000:
            curve.add(step, math.inf if step % 1_000 == 7 else math.nan if step in (3, 4) else 1.0)
    last, count, mean, _, _, bad = curve.rows.T
    assert bad.sum() == 19 + 2
    assert count.sum() == 20_000 - 1_000 - 21
    assert set(mean[count > 0]) == {1.0}
    gaps = np.diff(last // curve.width)
    assert (gaps > 1).sum() == 1
    assert gaps.max() * curve.width >= 1_000 - 2 * curve.width
    alone = filled([math.nan])
    assert alone.rows[0, [0, 1, 5]].tolist() == [1, 0, 1]
    assert np.isnan(alone.rows[0, 2:5]).all()
    assert alone.mean_of_last(100) is None


def test_as_json_and_back():
    curve = filled([1.5, math.inf, -1e300, 0.25])
    again = Curve.from_json(curve.as_json())
    assert again.rows[:, 0].tolist() == [1, 2, 3, 4]
    assert again.rows[:, 2].tolist()[::3] == [1.5, 0.25]
    assert again.rows[2, 2] == -np.finfo(np.float32).max  # JSON and the page's script have 32 bits
    assert Curve.from_json(Curve().as_json()).last_step == 0
    for change in ({"width": 0}, {"last": "AAAA"}, {"values": ""}):
        with pytest.raises(ValueError, match=r"width 0|buffer size|reshape"):
            Curve.from_json(curve.as_json() | change)
    with pytest.raises(ValueError, match="whose steps do not rise"):
        Curve.from_json(Curve(1, curve.rows[::-1]).as_json())


@pytest.mark.parametrize("stop", [3, 2_000, 4_096, 5_000])
def test_a_curve_goes_on(stop):
    """What a killed start wrote of later steps is forgotten; the rest is as without the kill."""
    values = np.random.default_rng(1).integers(0, 100, 9_000).astype(float).tolist()
    saved = Curve.from_json(filled(values[:stop]).as_json())
    went_on = filled(values[: stop + 500])
    again = went_on.before(stop + 1)
    assert again.last_step <= stop
    assert again.last_step > stop - went_on.width
    for curve in (saved, again):
        for step, value in enumerate(values[stop:], stop + 1):
            curve.add(step, value)
    expected = filled(values)
    np.testing.assert_allclose(saved.rows, expected.rows, rtol=1e-6)
    assert again.width == expected.width
    lost = expected.rows[:, 1] - again.rows[:, 1]  # of the one bucket that the stop cut in two
    assert (lost > 0).sum() <= 1
    assert lost.sum() < went_on.width


def test_a_step_that_comes_late():
    """A value of an earlier step is not lost, and the steps of the file still rise."""
    curve = filled([1.0, 2.0, 3.0])
    curve.add(1, 9.0)
    again = Curve.from_json(curve.as_json())
    again.add(2, 8.0)
    again.add(4, 1.0)
    assert again.rows[:, 0].tolist() == [1, 2, 3, 4]
    assert again.rows[2, 1:5].tolist() == [3, pytest.approx(20 / 3), 3, 9]


def test_mean_of_the_last_steps():
    assert filled([0.0] * 50 + [1.0] * 50 + [3.0] * 50).mean_of_last(100) == 2
    assert filled([5.0, 1.0]).mean_of_last(1) == 1
    assert filled([1.0] * 9_998 + [5.0]).mean_of_last(1) < 5  # of the last bucket
