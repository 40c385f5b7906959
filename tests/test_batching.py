"""Padding, shifting, masks and micro-batches, against loops over tokens and numbers worked out by hand.

Everything here is integers and copied floats: no tolerance but the rounding of sampler log-probs to float32.
"""

import copy
import random
import struct

import pytest
import torch

from common.batching import collate, padding_share, split_by_token_budget

EOS = 7


def random_sequences(num_sequences, seed):
    """Prompts, responses (some ending with EOS, some cut) and log-probs; EOS occurs inside prompts too."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(10) for _ in range(rng.randint(1, 9))] for _ in range(num_sequences)]
    responses = [[rng.randrange(7) for _ in range(rng.randint(0, 8))] + [rng.choice([EOS, 3])] for _ in prompts]
    logprobs = [[-rng.expovariate(1.0) for _ in response] for response in responses]
    return prompts, responses, logprobs


def float32(x):
    return struct.unpack("f", struct.pack("f", x))[0]


def check_against_a_loop(micro, prompts, responses, logprobs, rows):
    """Every position of every row, predicted token by predicted token."""
    width = max(len(prompts[row]) + len(responses[row]) for row in rows) - 1
    for tensor in (micro.inputs_BT, micro.attention_BT, micro.targets_BT, micro.mask_BT, micro.sampler_logprobs_BT):
        assert tensor.shape == (len(rows), width)
    for b, row in enumerate(rows):
        tokens = prompts[row] + responses[row]
        seen = []
        for t in range(width):
            # Column t speaks of token t + 1, predicted from tokens 0 … t.
            is_input, is_target = t < len(tokens), t + 1 < len(tokens)
            is_response = is_target and t + 1 >= len(prompts[row])
            assert micro.attention_BT[b, t].item() == is_input
            assert micro.mask_BT[b, t].item() is is_response
            if is_input:
                assert micro.inputs_BT[b, t].item() == tokens[t]
            if is_target:
                assert micro.targets_BT[b, t].item() == tokens[t + 1]
            expected = float32(logprobs[row][t + 1 - len(prompts[row])]) if is_response else 0.0
            assert micro.sampler_logprobs_BT[b, t].item() == expected
            if is_response:
                seen.append(tokens[t + 1])
        assert seen == responses[row]  # each response token once, EOS included, nothing else
        assert micro.mask_BT[b].sum().item() == len(responses[row])


def test_collate_by_hand():
    # Tokens 1 2 3 | 4 7 and 5 | 6, where | parts prompt and response; 7 ends the first, the second was cut; pad is 9.
    micro = collate([[1, 2, 3], [5]], [[4, 7], [6]], [[-0.5, -0.25], [-2.0]], [0, 1], 9)
    assert micro.rows == [0, 1]
    assert micro.inputs_BT.tolist() == [[1, 2, 3, 4], [5, 6, 9, 9]]
    assert micro.attention_BT.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert micro.targets_BT.tolist() == [[2, 3, 4, 7], [6, 9, 9, 9]]
    assert micro.mask_BT.int().tolist() == [[0, 0, 1, 1], [1, 0, 0, 0]]
    assert micro.sampler_logprobs_BT.tolist() == [[0.0, 0.0, -0.5, -0.25], [-2.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("seed", range(5))
def test_collate_against_a_loop(seed):
    sequences = random_sequences(12, seed)
    rows = list(range(12))
    check_against_a_loop(collate(*sequences, rows, EOS), *sequences, rows)


def test_rows_come_in_the_order_asked_for():
    sequences = random_sequences(12, seed=10)
    rows = [7, 2, 11, 0]
    micro = collate(*sequences, rows, 9)
    assert micro.rows == rows
    check_against_a_loop(micro, *sequences, rows)
    # The width is that of the longest row taken, not of the whole batch.
    shortest = min(range(12), key=lambda row: len(sequences[0][row]) + len(sequences[1][row]))
    check_against_a_loop(collate(*sequences, [shortest], 9), *sequences, [shortest])


def test_which_token_pads_does_not_matter():
    # Pad equal to EOS, to a token of prompts and responses, or to one that occurs nowhere: only padding differs.
    sequences, rows = random_sequences(12, seed=11), list(range(12))
    micros = [collate(*sequences, rows, pad_id) for pad_id in (EOS, 3, 0, 99)]
    for micro in micros:
        check_against_a_loop(micro, *sequences, rows)
        for name in ("attention_BT", "mask_BT", "sampler_logprobs_BT"):
            assert torch.equal(getattr(micro, name), getattr(micros[0], name))
        real = micro.attention_BT.bool()
        assert torch.equal(micro.inputs_BT[real], micros[0].inputs_BT[real])
        assert torch.equal(micro.targets_BT[micro.mask_BT], micros[0].targets_BT[micro.mask_BT])


def test_inputs_are_left_unchanged():
    prompts, responses, logprobs = random_sequences(8, seed=12)
    rows, lengths, keys = [3, 1, 4], [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)], [0, 1] * 4
    inputs = [prompts, responses, logprobs, rows, lengths, keys]
    before = copy.deepcopy(inputs)
    micro = collate(prompts, responses, logprobs, rows, EOS)
    splits = split_by_token_budget(lengths, 20, group_by=keys)
    padding_share(lengths, splits)
    micro.rows.append(99)  # what is handed back is the caller's own
    assert inputs == before


# Micro-batches

CASES = [(seed, budget) for seed in range(4) for budget in (1, 30, 64, 200, 10_000)]


def random_lengths(seed):
    rng = random.Random(seed)
    return [rng.randint(2, 40) for _ in range(rng.randint(1, 60))], rng


@pytest.mark.parametrize("seed, budget", CASES)
def test_every_row_is_in_exactly_one_microbatch(seed, budget):
    lengths, _ = random_lengths(seed)
    splits = split_by_token_budget(lengths, budget)
    assert sorted(row for rows in splits for row in rows) == list(range(len(lengths)))
    assert all(splits)


@pytest.mark.parametrize("seed, budget", CASES)
def test_budget_holds_but_for_single_long_rows(seed, budget):
    lengths, _ = random_lengths(seed)
    for rows in split_by_token_budget(lengths, budget):
        assert len(rows) * max(lengths[row] for row in rows) <= budget or len(rows) == 1


@pytest.mark.parametrize("seed, budget", CASES)
def test_microbatches_are_full(seed, budget):
    # The next, shorter row would not have fitted: memory bought with a larger budget is used.
    lengths, _ = random_lengths(seed)
    splits = split_by_token_budget(lengths, budget)
    for rows in splits[:-1]:
        assert (len(rows) + 1) * max(lengths[row] for row in rows) > budget


@pytest.mark.parametrize("seed, budget", CASES)
def test_the_longest_come_first(seed, budget):
    lengths, _ = random_lengths(seed)
    flat = [lengths[row] for rows in split_by_token_budget(lengths, budget) for row in rows]
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
    # Up to ties: rows of one length are interchangeable, so micro-batches are compared as lists of (group, length).
    lengths, rng = random_lengths(seed)
    keys = [rng.randrange(3) for _ in lengths]
    order = rng.sample(range(len(lengths)), len(lengths))

    def shape(lengths, keys):
        splits = split_by_token_budget(lengths, budget, group_by=keys)
        return [[(keys[row], lengths[row]) for row in rows] for rows in splits]

    assert shape([lengths[row] for row in order], [keys[row] for row in order]) == shape(lengths, keys)


def test_split_by_hand():
    # Sorted: 9 (row 1), 5 (row 3), 4 (row 0), 4 (row 4), 2 (row 2). Budget 10: 9 | 5 with 4 (2 × 5) | 4 with 2.
    assert split_by_token_budget([4, 9, 2, 5, 4], 10) == [[1], [3, 0], [4, 2]]
    # Groups 0 (rows 1, 2) and 1 (rows 0, 3, 4): 9 | 2 | 5 with 4 | 4.
    assert split_by_token_budget([4, 9, 2, 5, 4], 10, group_by=[1, 0, 0, 1, 1]) == [[1], [2], [3, 0], [4]]


def test_padding_share_by_hand():
    lengths = [4, 9, 2, 5, 4]  # 24 tokens
    # [1]: 1 × 9   [3, 0]: 2 × 5   [4, 2]: 2 × 4; together 27 positions, 3 of them padding
    assert padding_share(lengths, [[1], [3, 0], [4, 2]]) == pytest.approx(3 / 27, rel=1e-14)
    # All in one: 5 × 9 = 45 positions, 21 of them padding
    assert padding_share(lengths, [[0, 1, 2, 3, 4]]) == pytest.approx(21 / 45, rel=1e-14)
    assert padding_share(lengths, [[0], [1], [2], [3], [4]]) == 0.0
    assert padding_share([6, 6, 6], [[0, 1, 2]]) == 0.0


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("rows", [[0], [0, 1]])
def test_a_response_with_more_or_fewer_log_probs_than_tokens_is_refused(rows, count):
    with pytest.raises(ValueError, match=r"expected sequence of length|log-probs are not"):
        collate([[1, 2], [3]], [[4, 5], [6]], [[-1.0] * count, [-2.0]], rows, pad_id=0)
