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
import torch

from common import distributed
from common.batching import (
    collate,
    micro_batches,
    mini_batches,
    split_by_token_budget,
    split_evenly,
)
from common.sampling import Batch

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


def test_an_even_split_by_hand():
    # 32 rows of 70 tokens, at most 2,048 in a micro-batch: 29 and 3 of them, one after the other.
    lengths, keys = [70] * 32, [0] * 32
    assert [len(rows) for rows in split_evenly(lengths, 2048, keys, ranks=1)] == [29, 3]
    # Side by side, both ranks should have as much to do.
    assert [len(rows) for rows in split_evenly(lengths, 2048, keys, ranks=2)] == [16, 16]
    assert [len(rows) for rows in split_evenly(lengths, 2048, keys, ranks=3)] == [11, 11, 10]


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("seed, budget", CASES)
def test_an_even_split_has_the_smallest_micro_batches_for_its_passes(seed, budget, ranks):
    lengths, rng = random_lengths(seed)
    keys = [rng.random() < 0.4 for _ in lengths]

    def passes_and_largest(splits):
        counts = [sum(keys[rows[0]] == kind for rows in splits) for kind in (False, True)]
        largest = max(len(rows) * max(lengths[row] for row in rows) for rows in splits)
        return sum(-(-count // ranks) for count in counts), largest

    splits = split_evenly(lengths, budget, keys, ranks)
    assert sorted(row for rows in splits for row in rows) == list(range(len(lengths)))
    passes, largest = passes_and_largest(splits)
    tried = [
        passes_and_largest(split_by_token_budget(lengths, smaller, keys))
        for smaller in range(1, min(budget, 2500) + 1)  # 60 rows of 40 tokens are 2,400
    ]
    assert passes == tried[-1][0]  # no more than the whole budget takes
    assert largest == min(size for count, size in tried if count == passes)


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("rows", [[0], [0, 1]])
def test_a_response_with_more_or_fewer_log_probs_than_tokens_is_refused(rows, count):
    with pytest.raises(ValueError, match=r"expected sequence of length|log-probs are not"):
        batch = SimpleNamespace(
            prompts=[[1, 2], [3]], responses=[[4, 5], [6]], logprobs=[[-1.0] * count, [-2.0]]
        )
        collate(batch, rows)


# A batch in parts, one for each update


def graded_batch(P=7, G=4, seed=0, number=3):
    """A whole `Batch` with texts, grades and advantages, which are 0 in groups 2, 7, …"""
    sequences = random_sequences(P * G, seed)
    rng = random.Random(seed)
    advantages_PG = torch.tensor([[rng.gauss(0, 1) for _ in range(G)] for _ in range(P)])
    advantages_PG[2::5] = 0.0
    return Batch(
        number=number,
        version=1,
        group_size=G,
        problems=[10 + row // G for row in range(P * G)],
        truncated=[rng.random() < 0.3 for _ in range(P * G)],
        metrics={"time/sample": 1.0},
        texts=[f"text {row}" for row in range(P * G)],
        grades=[{"reward": row / 10} for row in range(P * G)],
        advantages_PG=advantages_PG.double(),
        **vars(sequences),
    )


LISTS = ("problems", "prompts", "responses", "logprobs", "truncated", "texts", "grades")


def check_part(part, batch):
    """Every row of a part, and every group's advantages and rewards, are those of the batch."""
    G = batch.group_size
    for name in LISTS:
        whole = getattr(batch, name)
        assert getattr(part, name) == [whole[row] for row in part.rows], name
    groups = [row // G for row in part.rows[::G]]
    assert list(part.rows) == [row for g in groups for row in range(g * G, (g + 1) * G)]
    assert torch.equal(part.advantages_PG, batch.advantages_PG[groups])
    assert torch.equal(part.rewards_PG, batch.rewards_PG[groups])
    assert torch.equal(part.lengths_PG, batch.lengths_PG[groups])
    assert part.lengths == [batch.lengths[row] for row in part.rows]
    same = ("number", "version", "group_size", "metrics")
    assert all(getattr(part, name) == getattr(batch, name) for name in same)


@pytest.mark.parametrize("groups", [[2], [0, 6], [5, 1, 3], [*range(7)]], ids=str)
def test_a_part_has_whole_groups_with_all_that_is_known_of_them(groups):
    batch = graded_batch()
    before = copy.deepcopy(vars(batch))
    part = batch.part(groups)
    assert list(part.rows) == [row for g in groups for row in range(4 * g, 4 * g + 4)]
    check_part(part, batch)
    same = torch.equal(batch.advantages_PG, before.pop("advantages_PG"))
    assert same and all(getattr(batch, name) == value for name, value in before.items())
    assert batch.rows == range(28)


def test_a_batch_that_has_not_been_graded_has_parts_too():
    batch = graded_batch()
    batch.texts, batch.grades = [], []
    part = batch.part([1])
    assert part.texts == part.grades == [] and part.responses == batch.responses[4:8]


@pytest.mark.parametrize("P", [7, 8])
@pytest.mark.parametrize("count", [2, 3, 4, 7])
def test_mini_batches_are_whole_groups_and_have_every_row_once(count, P):
    batch = graded_batch(P)
    parts = mini_batches(batch, count, seed=1)
    assert sorted(row for part in parts for row in part.rows) == list(range(4 * P))
    sizes = [len(part.rows) // 4 for part in parts]
    assert len(sizes) == count and max(sizes) - min(sizes) <= 1
    for part in parts:
        check_part(part, batch)


def test_one_mini_batch_is_the_batch_itself_in_its_order():
    batch = graded_batch()
    (part,) = mini_batches(batch, 1, seed=1)
    assert part is batch and part.rows == range(28)


def test_the_deal_of_groups_depends_on_seed_and_step_alone():
    def dealt(seed, number, **fields):
        batch = graded_batch(P=16, number=number, **fields)
        return [list(part.rows) for part in mini_batches(batch, 4, seed)]

    first = dealt(1, 3)
    assert first == dealt(1, 3)
    torch.manual_seed(5)
    random.seed(5)
    other = graded_batch(P=16, number=3, seed=9)  # other responses, rewards and advantages
    assert first == [list(part.rows) for part in mini_batches(other, 4, 1)]
    assert len({str(dealt(seed, number)) for seed in (1, 2, 3) for number in (1, 2, 3)}) == 9
    assert first != [list(range(16 * i, 16 * (i + 1))) for i in range(4)]  # in a random order


# Rows with their advantages and weights


def weights_of(batch):
    """A weight of its own for each response, and 0 where the advantage is 0."""
    weights_PG = torch.arange(1.0, 1 + batch.advantages_PG.numel(), dtype=torch.float64)
    return weights_PG.view_as(batch.advantages_PG).masked_fill(batch.advantages_PG == 0, 0.0) / 64


def part_or_whole(kind):
    batch = graded_batch(seed=4)
    return batch if kind == "whole" else batch.part([0, 2, 5])


@pytest.mark.parametrize("kind", ["whole", "part"])
@pytest.mark.parametrize("budget", [1, 40, 100, 10_000])
def test_micro_batches_against_a_loop(budget, kind):
    whole, batch = part_or_whole("whole"), part_or_whole(kind)
    whole_weights_PG = weights_of(whole)
    groups = [row // 4 for row in batch.rows[::4]]
    seen, learning = [], []
    for micro in micro_batches(batch, whole_weights_PG[groups], budget, "cpu"):
        check_against_a_loop(micro, whole, micro.rows)  # `rows` are those of the whole batch
        assert micro.advantages_B1.shape == micro.weights_B1.shape == (len(micro.rows), 1)
        assert micro.advantages_B1.dtype == micro.weights_B1.dtype == torch.float32
        for b, row in enumerate(micro.rows):
            p, g = divmod(row, 4)
            assert micro.advantages_B1[b].item() == whole.advantages_PG[p, g].float().item()
            assert micro.weights_B1[b].item() == whole_weights_PG[p, g].item()
            assert micro.learns is (whole_weights_PG[p, g].item() != 0)
        assert len(micro.rows) == 1 or micro.inputs_BT.numel() <= budget
        seen += micro.rows
        learning.append(micro.learns)
    assert sorted(seen) == list(batch.rows)
    assert learning == sorted(learning) and set(learning) == {False, True}


def test_what_learns_is_what_has_a_weight():
    # With a KL penalty, responses without advantage learn too, and need no micro-batch of their
    # own.
    batch = graded_batch(seed=4)
    (micro,) = micro_batches(batch, torch.full((7, 4), 0.5), 10_000, "cpu")
    assert micro.learns and (micro.advantages_B1 == 0).any() and (micro.weights_B1 == 0.5).all()
    (micro,) = micro_batches(batch, torch.zeros(7, 4), 10_000, "cpu")
    assert not micro.learns and (micro.weights_B1 == 0).all()


@pytest.mark.parametrize("ranks", [3, 5, 6])
@pytest.mark.parametrize("kind", ["whole", "part"])
def test_a_row_that_a_rank_repeats_counts_for_nothing(kind, ranks, monkeypatch):
    batch = part_or_whole(kind)
    weights_PG = weights_of(graded_batch(seed=4))[[row // 4 for row in batch.rows[::4]]]
    monkeypatch.setattr(distributed, "size", lambda: ranks)
    passes, seen, repeated = [], [], 0
    for rank in range(ranks):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        mine = list(micro_batches(batch, weights_PG, 40, "cpu"))
        passes.append([micro.learns for micro in mine])
        for micro in mine:
            seen += micro.rows
            assert bool(micro.rows) == bool(micro.mask_BT.any())
            if not micro.rows:
                repeated += 1
                assert micro.inputs_BT.numel() and micro.mask_BT.shape == micro.inputs_BT.shape
    # Each row counts on one rank, and all ranks make the same passes, with repetitions where there
    # are too few micro-batches for all.
    assert sorted(seen) == list(batch.rows)
    assert passes == [passes[0]] * ranks
    learns = (weights_PG.flatten() != 0).tolist()
    splits = [learns[rows[0]] for rows in split_evenly(batch.lengths, 40, learns, ranks)]
    assert repeated == sum(-splits.count(kind) % ranks for kind in (False, True)) > 0
    assert len(splits) + repeated == sum(map(len, passes))
