"""What the report on variants concludes from runs."""

import numpy as np

from benchmarks.figures import compare_variants
from common import plots


def run(*rewards, skipped=0.0):
    return [{"reward/mean": r, "update_skipped": skipped} for r in np.repeat(rewards, 5)]


def test_stable_means_near_its_best_with_no_update_skipped():
    stable = compare_variants.is_stable
    assert stable([run(*np.linspace(0, 1, 10)), run(*[0.5] * 9, 0.41)])
    assert not stable([run(*np.linspace(0, 1, 10)), run(*[0.5] * 9, 0.39)])
    assert not stable([run(*np.linspace(0, 1, 10), skipped=1.0)])


def test_a_difference_within_the_ranges_over_seeds_is_none():
    # 0.3 apart, 0.2 and 0.2 wide
    assert plots.difference([0.7, 0.9], [0.4, 0.6]) == plots.SPREAD
    assert plots.difference([0.8], [0.7]) == "above"
    assert plots.difference([0.6], [0.7]) == "below"
