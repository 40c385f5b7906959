"""The rollout schedule, against lists written by hand, and the drawing of batches, against the schedule.

The rollouts are driven as the scripts drive them, with a sampler that notes which weights it was called on.
"""

import copy

import pytest
import torch

from common.rollouts import RolloutPlan, SerialRollouts, problems_of_batch
from common.samplers import Sampler, Samples
from common.schedule import batches_of_version, is_due, version_of_batch

# (I, O): version and lag of batch k = 1, 2, 3, …
TABLE = {
    (1, 0): ([0, 1, 2, 3, 4, 5, 6, 7], [0, 0, 0, 0, 0, 0, 0, 0]),
    (2, 0): ([0, 0, 2, 2, 4, 4, 6, 6], [0, 1, 0, 1, 0, 1, 0, 1]),
    (10, 0): ([0] * 10 + [10] * 10 + [20], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0]),
    (20, 0): ([0] * 20 + [20] * 20 + [40], [*range(20), *range(20), 0]),
    (1, 1): ([0, 0, 1, 2, 3, 4, 5, 6], [0, 1, 1, 1, 1, 1, 1, 1]),
    (3, 2): ([0, 0, 0, 0, 0, 3, 3, 3, 6, 6, 6, 9], [0, 1, 2, 3, 4, 2, 3, 4, 2, 3, 4, 2]),
}
MODES = list(TABLE)
schedules = pytest.mark.parametrize("interval, offset", MODES)


@schedules
def test_versions_and_lags_by_hand(interval, offset):
    versions, lags = TABLE[interval, offset]
    steps = range(1, len(versions) + 1)
    assert [version_of_batch(k, interval, offset) for k in steps] == versions
    assert [(k - 1) - version_of_batch(k, interval, offset) for k in steps] == lags


@pytest.mark.parametrize("interval", range(1, 6))
@pytest.mark.parametrize("offset", range(5))
def test_last_batch_of_a_version_by_trying_all(interval, offset):
    batches = range(1, 100)
    drawn_with = {}
    for k in batches:
        drawn_with.setdefault(version_of_batch(k, interval, offset), []).append(k)
    complete = sorted(drawn_with)[:-1]  # the newest version's batches may reach beyond those tried
    assert len(complete) > 10
    for version in complete:
        assert list(batches_of_version(version, interval, offset)) == drawn_with[version]


@pytest.mark.parametrize("interval", range(1, 6))
@pytest.mark.parametrize("offset", range(5))
def test_exactly_the_versions_that_draw_are_due(interval, offset):
    used = {version_of_batch(k, interval, offset) for k in range(1, 100)}
    assert [update for update in range(1, 80) if is_due(update, interval)] == sorted(v for v in used if 0 < v < 80)


# Problems


def test_every_problem_comes_once_an_epoch():
    # 10 problems in batches of 4: five batches are two epochs, and the third batch belongs to both.
    drawn = [index for k in range(1, 6) for index in problems_of_batch(k, 10, 4, seed=1)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]  # in another order
    # Batches larger than the data set: 3 problems in batches of 7.
    drawn = [index for k in range(1, 4) for index in problems_of_batch(k, 3, 7, seed=1)]
    assert len(drawn) == 21
    assert all(sorted(drawn[i : i + 3]) == [0, 1, 2] for i in range(0, 21, 3))


def test_problems_depend_on_seed_and_batch_alone():
    forwards = {k: problems_of_batch(k, 50, 8, seed=1) for k in range(1, 20)}
    backwards = {k: problems_of_batch(k, 50, 8, seed=1) for k in range(19, 0, -1)}
    assert forwards == backwards
    assert all(len(problems) == 8 and all(type(index) is int for index in problems) for problems in forwards.values())
    others = {k: problems_of_batch(k, 50, 8, seed=2) for k in range(1, 20)}
    assert sum(forwards[k] == others[k] for k in forwards) == 0


# Rollouts


class NotingSampler(Sampler):
    """Answers every prompt with the version of the weights it was asked on; notes what it was asked."""

    def __init__(self):
        self.heartbeat = torch.zeros(1, dtype=torch.int64)
        self.weights = 0
        self.calls = []

    def sample(self, prompts, group_size, seed):
        self.calls.append((self.weights, prompts, group_size, seed))
        num_sequences = len(prompts) * group_size
        responses = [[self.weights, row] for row in range(num_sequences)]
        return Samples(responses, [[-1.0, -2.0] for _ in responses], [row % 2 == 0 for row in range(num_sequences)])


PROMPTS = [[index, 100 + index] for index in range(10)]


def make_rollouts(interval, offset, seed=3):
    sampler = NotingSampler()
    plan = RolloutPlan(PROMPTS, 4, 3, interval, offset, seed)
    return SerialRollouts(sampler, plan, lambda batch: {"measured with": sampler.weights}, 60.0), sampler


def update(rollouts, sampler, step):
    sampler.weights = step
    rollouts.publish(step)


@schedules
def test_batches_are_drawn_as_soon_as_their_version_exists(interval, offset):
    rollouts, sampler = make_rollouts(interval, offset)
    for step in range(1, 46):
        batch = rollouts.next(step)
        # So far: all batches whose version is at most step − 1, each on exactly those weights, in order.
        ready = [k for k in range(1, 100) if version_of_batch(k, interval, offset) <= step - 1]
        assert [weights for weights, *_ in sampler.calls] == [version_of_batch(k, interval, offset) for k in ready]
        assert (batch.number, batch.version) == (step, version_of_batch(step, interval, offset))
        assert batch.responses == [[batch.version, row] for row in range(12)]
        update(rollouts, sampler, step)


def test_a_batch_says_what_was_asked_and_answered():
    rollouts, sampler = make_rollouts(1, 0)
    batch = rollouts.next(1)
    _, prompts, group_size, _ = sampler.calls[0]
    assert batch.problems == problems_of_batch(1, len(PROMPTS), 4, seed=3)
    assert prompts == [PROMPTS[index] for index in batch.problems] and group_size == 3
    assert batch.prompts == [PROMPTS[index] for index in batch.problems for _ in range(3)]
    assert batch.logprobs == [[-1.0, -2.0]] * 12 and batch.truncated == [True, False] * 6


def test_the_schedule_changes_neither_problems_nor_seeds():
    # Runs with different lags see the same problems in the same order, which makes them comparable.
    asked = {}
    for mode in MODES:
        rollouts, sampler = make_rollouts(*mode)
        for step in range(1, 21):
            rollouts.next(step)
            update(rollouts, sampler, step)
        asked[mode] = [(prompts, seed) for _, prompts, _, seed in sampler.calls[:20]]
        assert asked[mode] == asked[MODES[0]]
    assert len({seed for _, seed in asked[MODES[0]]}) == 20  # no two batches from one random stream
    rollouts, sampler = make_rollouts(1, 0, seed=4)
    rollouts.next(1)
    assert sampler.calls[0][3] != asked[MODES[0]][0][1]


def test_drawing_on_the_wrong_weights_raises():
    rollouts, sampler = make_rollouts(2, 0)
    update(rollouts, sampler, 1)  # before batches 1 and 2, which need version 0, were drawn
    with pytest.raises(RuntimeError, match=r"Batch 1 .*version 0.* 1"):
        rollouts.next(2)
    assert sampler.calls == []

    rollouts, sampler = make_rollouts(1, 0)
    rollouts.next(1)
    update(rollouts, sampler, 1)
    update(rollouts, sampler, 2)  # the trainer went on without batch 2
    with pytest.raises(RuntimeError, match=r"Batch 2 .*version 1.* 2"):
        rollouts.next(3)


def test_each_batch_is_handed_out_once():
    rollouts, _ = make_rollouts(1, 1)
    rollouts.next(1)
    for step in (1, 3):  # a second time; before its version exists
        with pytest.raises(KeyError):
            rollouts.next(step)


@schedules
def test_every_version_shows_once_whether_sampler_and_trainer_agree(interval, offset):
    # A batch with lag 0 shows it in training. Where a version has none, its first batch is measured, with its weights.
    rollouts, sampler = make_rollouts(interval, offset)
    shown = {}
    for step in range(1, 40):
        batch = rollouts.next(step)
        if batch.measured:
            assert batch.measured == {"measured with": batch.version} and batch.version < step - 1
            shown.setdefault(batch.version, []).append("measured")
        elif batch.version == step - 1:
            shown.setdefault(batch.version, []).append("trained on")
        update(rollouts, sampler, step)
    assert all(len(ways) == 1 for ways in shown.values())
    assert sorted(shown) == sorted({version_of_batch(k, interval, offset) for k in range(1, 40)})


@schedules
def test_continued_rollouts_are_the_uninterrupted_ones(interval, offset):
    rollouts, sampler = make_rollouts(interval, offset)
    batches, states = {}, {0: copy.deepcopy(rollouts.state())}
    for step in range(1, 31):
        batches[step] = rollouts.next(step)
        update(rollouts, sampler, step)
        states[step] = copy.deepcopy(rollouts.state())
    for stop in range(0, 30):
        continued, sampler = make_rollouts(interval, offset)
        sampler.weights = stop
        continued.load_state(states[stop])
        for step in range(stop + 1, 31):
            found, expected = vars(continued.next(step)).copy(), vars(batches[step]).copy()
            for timing in ("sample_seconds", "sample_started_at"):
                assert found.pop(timing) >= 0 and expected.pop(timing) >= 0
            assert found == expected
            update(continued, sampler, step)
