"""The replayed schedule, against timelines worked out by hand and against a simulation in small
steps of time.
"""

import random

import pytest

from benchmarks.speed.schedule_replay import MODES, replay, shortest_step
from common.sampling import version_of_batch


def test_sync_1_takes_turns():
    result = replay([2.0] * 3, [1.0] * 3, [0.5] * 3, 1, 0)
    assert result.sampling == [(0, 2), (3.5, 5.5), (7, 9)]
    assert result.training == [(2, 3), (5.5, 6.5), (9, 10)]
    assert result.syncing == [(3, 3.5), (6.5, 7), (10, 10.5)]
    assert result.seconds == 10.5 and result.lag == [0, 0, 0]
    assert result.idle(result.sampling) == pytest.approx(1 - 6 / 10.5)
    assert result.idle(result.training, result.syncing) == pytest.approx(6 / 10.5)


def test_sync_2_samples_the_second_batch_during_the_first_step():
    result = replay([2.0] * 4, [1.0] * 4, [0.5] * 4, 2, 0)
    assert result.sampling == [(0, 2), (2, 4), (5.5, 7.5), (7.5, 9.5)]
    assert result.training == [(2, 3), (4, 5), (7.5, 8.5), (9.5, 10.5)]
    assert result.syncing == [(5, 5.5), (10.5, 11)]
    assert result.lag == [0, 1, 0, 1]


def test_one_step_off_policy_samples_the_batch_after_next():
    result = replay([1.0] * 4, [2.0] * 4, [0.5] * 4, 1, 1)
    # Batches 1 and 2 from version 0; batch 3 needs version 1, which is there when step 1 and its
    # sync have ended.
    assert result.sampling == [(0, 1), (1, 2), (3.5, 4.5), (6, 7)]
    assert result.training == [(1, 3), (3.5, 5.5), (6, 8), (8.5, 10.5)]
    assert result.lag == [0, 1, 1, 1]


@pytest.mark.parametrize(("sample", "train"), [(2.0, 1.0), (1.0, 3.0), (1.5, 1.5)])
def test_the_shortest_step_is_the_formula(sample, train):
    longer, shorter = max(sample, train), min(sample, train)
    for interval in (1, 2, 10, 20):
        expected = (interval * longer + shorter) / interval
        assert shortest_step(sample, train, interval, 0) == pytest.approx(expected)
    assert shortest_step(sample, train, 1, 1) == pytest.approx(longer)


@pytest.mark.parametrize("mode", [*MODES.values(), (3, 2), (4, 7)], ids=str)
def test_it_agrees_with_two_workers_on_a_ticking_clock(mode):
    """Whole ticks of time; at each, whoever is free looks whether the next work can begin."""
    interval, offset = mode
    seed = random.SystemRandom().randrange(10**9)
    print(f"seed: {seed}")
    rng = random.Random(seed)
    n = 40
    limits = ((1, 9), (1, 9), (0, 2))
    sample, train, sync = ([rng.randint(*limit) for _ in range(n)] for limit in limits)

    ready, published, trained = [], {0: 0}, []
    sampler_busy_until = trainer_busy_until = 0
    for now in range(10_000):
        if (
            now >= trainer_busy_until
            and len(trained) < n
            and len(trained) < len(ready)
            and ready[len(trained)] <= now
        ):
            k = len(trained) + 1
            trained.append(now)
            trainer_busy_until = now + train[k - 1]
            if k % interval == 0:
                trainer_busy_until += sync[k - 1]
                published[k] = trainer_busy_until
        while len(ready) < n and now >= sampler_busy_until:
            k = len(ready) + 1
            if published.get(version_of_batch(k, interval, offset), 10_000) > now:
                break
            sampler_busy_until = now + sample[k - 1]
            ready.append(sampler_busy_until)
    result = replay(sample, train, sync, interval, offset)
    assert [end for _, end in result.sampling] == ready
    assert [start for start, _ in result.training] == trained
    assert result.seconds == trainer_busy_until
    assert result.lag == [k - 1 - version_of_batch(k, interval, offset) for k in range(1, n + 1)]
