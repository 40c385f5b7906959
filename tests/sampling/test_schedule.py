"""The schedule, against lists written by hand, and the sampling of batches, against the schedule.

The rollouts are driven as the scripts drive them, with a sampler that notes which weights it was
called on.
"""

import copy
import itertools

import pytest
import torch

from common.sampling import Plan, Sampler, Samples, problems_of_batch, version_of_batch
from common.sampling import serial as module
from common.sampling.serial import SerialRollouts

# (I, O): version and lag of batch k = 1, 2, 3, …
TABLE = {
    (1, 0): ([0, 1, 2, 3, 4, 5, 6, 7], [0, 0, 0, 0, 0, 0, 0, 0]),
    (2, 0): ([0, 0, 2, 2, 4, 4, 6, 6], [0, 1, 0, 1, 0, 1, 0, 1]),
    (10, 0): (
        [0] * 10 + [10] * 10 + [20],
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0],
    ),
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
def test_batches_of_a_version_by_trying_all(interval, offset):
    sampled_with = {}
    for k in range(1, 100):
        sampled_with.setdefault(version_of_batch(k, interval, offset), []).append(k)
    # the newest version's batches may reach beyond those tried
    complete = sorted(sampled_with)[:-1]
    assert len(complete) > 10
    for version in complete:
        assert (
            list(Plan([], 1, 2, interval, offset, seed=1).batches_of(version))
            == sampled_with[version]
        )


@pytest.mark.parametrize("interval", range(1, 6))
@pytest.mark.parametrize("offset", range(5))
def test_the_versions_in_use_are_the_multiples_of_the_interval(interval, offset):
    used = {version_of_batch(k, interval, offset) for k in range(1, 100)}
    assert list(range(0, 80, interval)) == sorted(version for version in used if version < 80)


# Problems and seeds


def test_every_problem_comes_once_an_epoch():
    # 10 problems in batches of 4: five batches are two epochs, and the third batch belongs to both.
    chosen = [index for k in range(1, 6) for index in problems_of_batch(k, 10, 4, seed=1)]
    assert sorted(chosen[:10]) == sorted(chosen[10:]) == list(range(10))
    assert chosen[:10] != chosen[10:]  # in another order
    # Batches larger than the data set: 3 problems in batches of 7.
    chosen = [index for k in range(1, 4) for index in problems_of_batch(k, 3, 7, seed=1)]
    assert len(chosen) == 21
    assert all(sorted(chosen[i : i + 3]) == [0, 1, 2] for i in range(0, 21, 3))


def test_problems_depend_on_seed_and_batch_alone():
    forwards = {k: problems_of_batch(k, 50, 8, seed=1) for k in range(1, 20)}
    backwards = {k: problems_of_batch(k, 50, 8, seed=1) for k in range(19, 0, -1)}
    assert forwards == backwards
    assert all(
        len(problems) == 8 and all(type(index) is int for index in problems)
        for problems in forwards.values()
    )
    others = {k: problems_of_batch(k, 50, 8, seed=2) for k in range(1, 20)}
    assert sum(forwards[k] == others[k] for k in forwards) == 0


def test_no_two_responses_of_a_run_share_their_noise():
    # An engine may seed the i-th response of a group with seed + i, so that seeds must lie at least
    # G apart.
    plan = Plan([[0]] * 50, 8, 5, 1, 0, seed=1)
    seeds = sorted(seed for k in range(1, 200) for seed in plan.seeds(k))
    assert (
        len(seeds) == 199 * 8
        and min(later - earlier for earlier, later in itertools.pairwise(seeds)) >= 5
    )
    assert all(type(seed) is int and 0 <= seed < 2**63 - 5 for seed in seeds)


# Rollouts


class NotingSampler(Sampler):
    """Answers every prompt with the version of the weights it was asked on; notes what it was
    asked.
    """

    temperature, precision = 1.0, "float32"

    def __init__(self):
        self.heartbeat = torch.zeros(1, dtype=torch.int64)
        self.weights = 0
        self.calls = []

    def sample(self, prompts, group_size, seeds, problems=None):
        self.calls.append((self.weights, prompts, group_size, seeds))
        num_sequences = len(prompts) * group_size
        responses = [[self.weights, row] for row in range(num_sequences)]
        return Samples(
            responses,
            [[-1.0, -2.0] for _ in responses],
            [row % 2 == 0 for row in range(num_sequences)],
        )

    def greedy(self, prompts, problems=None):
        return Samples(
            [[self.weights]] * len(prompts), [[-1.0]] * len(prompts), [False] * len(prompts)
        )


PROMPTS = [[index, 100 + index] for index in range(10)]


def make_rollouts(interval, offset, seed=3):
    sampler = NotingSampler()
    # There is no model here but the sampler, whose weights are the trainer's.
    return SerialRollouts(sampler, sampler, Plan(PROMPTS, 4, 3, interval, offset, seed)), sampler


def update(rollouts, sampler, step):
    sampler.weights = step
    rollouts.publish(step)


@pytest.fixture(autouse=True)
def mismatch(monkeypatch):
    """In place of the mismatch, the weights that the trainer has when it is measured."""

    def measured(model, temperature, precision, batch):
        return {"measured with": model.weights}

    monkeypatch.setattr(module, "sampler_mismatch", measured)


@schedules
def test_batches_are_sampled_as_soon_as_their_version_exists(interval, offset):
    rollouts, sampler = make_rollouts(interval, offset)
    for step in range(1, 46):
        batch = rollouts.next(step)
        # So far: all batches whose version is at most step − 1, each on exactly those weights, in
        # order.
        ready = [k for k in range(1, 100) if version_of_batch(k, interval, offset) <= step - 1]
        assert [weights for weights, *_ in sampler.calls] == [
            version_of_batch(k, interval, offset) for k in ready
        ]
        assert (batch.number, batch.version) == (step, version_of_batch(step, interval, offset))
        assert batch.responses == [[batch.version, row] for row in range(12)]
        # with the present weights, whatever waits
        assert rollouts.greedy(PROMPTS).responses == [[step - 1]] * 10
        update(rollouts, sampler, step)


def test_a_batch_says_what_was_asked_and_answered():
    rollouts, sampler = make_rollouts(1, 0)
    batch = rollouts.next(1)
    _, prompts, group_size, _ = sampler.calls[0]
    problems = problems_of_batch(1, len(PROMPTS), 4, seed=3)
    assert batch.problems == [index for index in problems for _ in range(3)]
    assert prompts == [PROMPTS[index] for index in problems] and group_size == 3
    assert batch.prompts == [PROMPTS[index] for index in batch.problems]
    assert batch.logprobs == [[-1.0, -2.0]] * 12 and batch.truncated == [True, False] * 6
    assert batch.lengths == [4] * 12


def test_the_schedule_changes_neither_problems_nor_seeds():
    # Runs with different lags see the same problems in the same order, which makes them comparable.
    asked = {}
    for mode in MODES:
        rollouts, sampler = make_rollouts(*mode)
        for step in range(1, 21):
            rollouts.next(step)
            update(rollouts, sampler, step)
        asked[mode] = [(prompts, seeds) for _, prompts, _, seeds in sampler.calls[:20]]
        assert asked[mode] == asked[MODES[0]]
    # one random stream per prompt
    assert len({seed for _, seeds in asked[MODES[0]] for seed in seeds}) == 20 * 4
    rollouts, sampler = make_rollouts(1, 0, seed=4)
    rollouts.next(1)
    assert not set(sampler.calls[0][3]) & set(asked[MODES[0]][0][1])


def test_sampling_with_the_wrong_weights_raises():
    rollouts, sampler = make_rollouts(2, 0)
    update(rollouts, sampler, 1)  # before batches 1 and 2, which need version 0, were sampled
    with pytest.raises(RuntimeError, match=r"batch 1 needs another version than the model's, 1"):
        rollouts.next(2)
    assert sampler.calls == []

    rollouts, sampler = make_rollouts(1, 0)
    rollouts.next(1)
    update(rollouts, sampler, 1)
    update(rollouts, sampler, 2)  # the trainer went on without batch 2
    with pytest.raises(RuntimeError, match=r"batch 2 needs another version than the model's, 2"):
        rollouts.next(3)


def test_each_batch_is_handed_out_once():
    rollouts, _ = make_rollouts(1, 1)
    rollouts.next(1)
    for step in (1, 3):  # a second time; before its version exists
        with pytest.raises(KeyError):
            rollouts.next(step)


@schedules
def test_every_version_shows_once_whether_sampler_and_trainer_agree(interval, offset):
    # A batch with lag 0 shows it in training. Where a version has none, its first batch is
    # measured, with its weights.
    rollouts, sampler = make_rollouts(interval, offset)
    shown = {}
    for step in range(1, 40):
        batch = rollouts.next(step)
        if "measured with" in batch.metrics:
            assert batch.metrics["measured with"] == batch.version < step - 1
            shown.setdefault(batch.version, []).append("measured")
        elif batch.version == step - 1:
            shown.setdefault(batch.version, []).append("trained on")
        update(rollouts, sampler, step)
    assert all(len(ways) == 1 for ways in shown.values())
    assert sorted(shown) == sorted({version_of_batch(k, interval, offset) for k in range(1, 40)})


@schedules
def test_continued_rollouts_are_the_uninterrupted_ones(interval, offset):
    rollouts, sampler = make_rollouts(interval, offset)
    batches, states = {}, {0: copy.deepcopy(rollouts.state_dict())}
    for step in range(1, 31):
        batches[step] = copy.deepcopy(rollouts.next(step))
        update(rollouts, sampler, step)
        states[step] = copy.deepcopy(rollouts.state_dict())
    for stop in range(0, 30):
        continued, sampler = make_rollouts(interval, offset)
        sampler.weights = stop
        continued.load_state_dict(copy.deepcopy(states[stop]), sampler)
        for step in range(stop + 1, 31):
            found, expected = (
                copy.deepcopy(vars(continued.next(step))),
                copy.deepcopy(vars(batches[step])),
            )
            for timing in ("time/sample", "time/sample_started_at"):
                assert found["metrics"].pop(timing) >= 0 and expected["metrics"].pop(timing) >= 0
            assert found == expected
            update(continued, sampler, step)
