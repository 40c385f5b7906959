"""Padding, shifting, masks and micro-batches, against loops over tokens and numbers worked out by
hand.

Everything here is integers and copied floats: no tolerance but the rounding of sampler log-probs to
float32.
"""

import copy
import random
import struct
from types import SimpleNamespace

import pytest

from common.batching import collate, split_by_token_budget

EOS = 7


def random_sequences(num_sequences, seed):
    """A batch: prompts, responses (some ending with EOS, some cut) and log-probs; EOS occurs inside
    prompts too.
    """
    rng = random.Random(seed)
    prompts = [[rng.randrange(10) for _ in range(rng.randint(1, 9))] for _ in range(num_sequences)]
    responses = [
        [rng.randrange(7) for _ in range(rng.randint(0, 8))] + [rng.choice([EOS, 3])]
        for _ in prompts
    ]
    logprobs = [[-rng.expovariate(1.0) for _ in response] for response in responses]
    return SimpleNamespace(prompts=prompts, responses=responses, logprobs=logprobs)


def float32(x):
    return struct.unpack("f", struct.pack("f", x))[0]


def check_against_a_loop(micro, batch, rows):
    """Every position of every row, predicted token by predicted token."""
    prompts, responses, logprobs = batch.prompts, batch.responses, batch.logprobs
    width = max(len(prompts[row]) + len(responses[row]) for row in rows) - 1
    for tensor in (micro.inputs_BT, micro.targets_BT, micro.mask_BT, micro.sampler_logprobs_BT):
        assert tensor.shape == (len(rows), width)
    for b, row in enumerate(rows):
        tokens = prompts[row] + responses[row]
        seen = []
        for t in range(width):
            # Column t belongs to token t + 1, predicted from tokens 0 … t.
            is_input, is_target = t < len(tokens), t + 1 < len(tokens)
            is_response = is_target and t + 1 >= len(prompts[row])
            assert micro.mask_BT[b, t].item() is is_response
            assert micro.inputs_BT[b, t].item() == (tokens[t] if is_input else 0)
            if is_target:
                assert micro.targets_BT[b, t].item() == tokens[t + 1]
            expected = float32(logprobs[row][t + 1 - len(prompts[row])]) if is_response else 0.0
            assert micro.sampler_logprobs_BT[b, t].item() == expected
            if is_response:
                seen.append(tokens[t + 1])
        assert seen == responses[row]  # each response token once, EOS included, nothing else
        assert micro.mask_BT[b].sum().item() == len(responses[row])


def test_collate_by_hand():
    # Tokens 1 2 3 | 4 7 and 5 | 6, where | parts prompt and response; 7 ends the first, the second
    # was cut; 0 pads.
    batch = SimpleNamespace(
        prompts=[[1, 2, 3], [5]], responses=[[4, 7], [6]], logprobs=[[-0.5, -0.25], [-2.0]]
    )
    micro = collate(batch, [0, 1])
    assert micro.inputs_BT.tolist() == [[1, 2, 3, 4], [5, 6, 0, 0]]
    assert micro.targets_BT.tolist() == [[2, 3, 4, 7], [6, 0, 0, 0]]
    assert micro.mask_BT.int().tolist() == [[0, 0, 1, 1], [1, 0, 0, 0]]
    assert micro.sampler_logprobs_BT.tolist() == [[0.0, 0.0, -0.5, -0.25], [-2.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("seed", range(5))
def test_collate_against_a_loop(seed):
    batch = random_sequences(12, seed)
    rows = list(range(12))
    check_against_a_loop(collate(batch, rows), batch, rows)


def test_rows_come_in_the_order_asked_for():
    batch = random_sequences(12, seed=10)
    rows = [7, 2, 11, 0]
    check_against_a_loop(collate(batch, rows), batch, rows)
    # The width is that of the longest row taken, not of the whole batch.
    shortest = min(range(12), key=lambda row: len(batch.prompts[row]) + len(batch.responses[row]))
    check_against_a_loop(collate(batch, [shortest]), batch, [shortest])


def test_inputs_are_left_unchanged():
    batch = random_sequences(8, seed=12)
    lengths = [len(p) + len(r) for p, r in zip(batch.prompts, batch.responses, strict=True)]
    inputs = [vars(batch), [3, 1, 4], lengths, [0, 1] * 4]
    before = copy.deepcopy(inputs)
    collate(batch, inputs[1])
    split_by_token_budget(lengths, 20, inputs[3])
    assert inputs == before


# Micro-batches

CASES = [(seed, budget) for seed in range(4) for budget in (1, 30, 64, 200, 10_000)]


def random_lengths(seed):
    rng = random.Random(seed)
    return [rng.randint(2, 40) for _ in range(rng.randint(1, 60))], rng


@pytest.mark.parametrize("seed, budget", CASES)
def test_every_row_is_in_exactly_one_microbatch(seed, budget):
    lengths, _ = random_lengths(seed)
    splits = split_by_token_budget(lengths, budget, [0] * len(lengths))
    assert sorted(row for rows in splits for row in rows) == list(range(len(lengths)))
    assert all(splits)


@pytest.mark.parametrize("seed, budget", CASES)
def test_budget_holds_but_for_single_long_rows(seed, budget):
    lengths, _ = random_lengths(seed)
    for rows in split_by_token_budget(lengths, budget, [0] * len(lengths)):
        assert len(rows) * max(lengths[row] for row in rows) <= budget or len(rows) == 1


@pytest.mark.parametrize("seed, budget", CASES)
def test_microbatches_are_full(seed, budget):
    # The next, shorter row would not have fitted: memory bought with a larger budget is used.
    lengths, _ = random_lengths(seed)
    splits = split_by_token_budget(lengths, budget, [0] * len(lengths))
    for rows in splits[:-1]:
        assert (len(rows) + 1) * max(lengths[row] for row in rows) > budget


@pytest.mark.parametrize("seed, budget", CASES)
def test_the_longest_come_first(seed, budget):
    lengths, _ = random_lengths(seed)
    flat = [
        lengths[row]
        for rows in split_by_token_budget(lengths, budget, [0] * len(lengths))
        for row in rows
    ]
    assert flat == sorted(lengths, reverse=True)


@pytest.mark.parametrize("seed, budget", CASES)
def test_groups_are_never_mixed(seed, budget):
    lengths, rng = random_lengths(seed)
    keys = [rng.random() < 0.4 for _ in lengths]
    splits = split_by_token_budget(lengths, budget, group_by=keys)
    assert sorted(row for rows in splits for row in rows) == list(range(len(lengths)))
    for rows in splits:
        assert len({keys[row] for row in rows}) == 1
        assert len(rows) * max(lengths[row] for row in rows) <= budget or len(rows) == 1


@pytest.mark.parametrize("seed, budget", CASES)
def test_the_order_of_rows_does_not_show(seed, budget):
    # Up to ties: rows of one length are interchangeable, so micro-batches are compared as lists of
    # (group, length).
    lengths, rng = random_lengths(seed)
    keys = [rng.randrange(3) for _ in lengths]
    order = rng.sample(range(len(lengths)), len(lengths))

    def shape(lengths, keys):
        splits = split_by_token_budget(lengths, budget, group_by=keys)
        return [[(keys[row], lengths[row]) for row in rows] for rows in splits]

    assert shape([lengths[row] for row in order], [keys[row] for row in order]) == shape(
        lengths, keys
    )


def test_split_by_hand():
    # Sorted: 9 (row 1), 5 (row 3), 4 (row 0), 4 (row 4), 2 (row 2). Budget 10: 9 | 5 with 4 (2 × 5)
    # | 4 with 2.
    assert split_by_token_budget([4, 9, 2, 5, 4], 10, group_by=[0] * 5) == [[1], [3, 0], [4, 2]]
    # Groups 0 (rows 1, 2) and 1 (rows 0, 3, 4): 9 | 2 | 5 with 4 | 4.
    assert split_by_token_budget([4, 9, 2, 5, 4], 10, group_by=[1, 0, 0, 1, 1]) == [
        [1],
        [2],
        [3, 0],
        [4],
    ]


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("rows", [[0], [0, 1]])
def test_a_response_with_more_or_fewer_log_probs_than_tokens_is_refused(rows, count):
    with pytest.raises(ValueError, match=r"expected sequence of length|log-probs are not"):
        batch = SimpleNamespace(
            prompts=[[1, 2], [3]], responses=[[4, 5], [6]], logprobs=[[-1.0] * count, [-2.0]]
        )
        collate(batch, rows)
