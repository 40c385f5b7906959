"""Padding, shifting, masks and micro-batches. This is the only module that shifts by one.

A causal language model's output at position t predicts the token at t + 1. `collate` makes that
shift once: in what it returns, column t of every tensor belongs to the same predicted token.
"""

import bisect
import ctypes
import functools
import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from common import distributed
from common.progress import progress
from common.sampling import PARTS

# Where --max-tokens-per-microbatch is 0. A GPU has to be given much to do at a time.
TOKENS_PER_MICROBATCH = {"cpu": 2048, "cuda": 8192}


@dataclass
class MicroBatch:
    """Some sequences of a batch, padded on the right to one width.

    T counts predicted tokens: total length − 1. Padding is token 0. Any token would do: it comes
    after all real ones, where causal attention does not look. `mask_BT` is False on prompts, on
    replies in between, and on padding. What is measured of a token is float32, and 0 outside the
    mask.
    """

    inputs_BT: torch.Tensor  # int64: what the model reads
    targets_BT: torch.Tensor  # int64: the token that each position predicts
    mask_BT: torch.Tensor  # bool: whether a policy sampled that token (EOS included)
    sampler_logprobs_BT: torch.Tensor  # of each response token, as reported by the sampler
    rows: list[int]  # of the batch, which these sequences are

    advantages_B1: torch.Tensor | None = None  # float32
    weights_B1: torch.Tensor | None = None  # float32: weight of each response token in the loss
    learns: bool = True  # whether any weight is not 0; if not, a forward pass is enough

    # Filled in by the script
    reference_logprobs_BT: torch.Tensor | None = None  # under the initial policy
    logprobs_BT: torch.Tensor | None = None  # under the policy, differentiable
    entropy_BT: torch.Tensor | None = None  # of the distributions sampled from, differentiable

    @functools.cached_property
    def places_N(self):
        """Where the N response tokens are among the B·T, int64.

        Indices, found once: each use of a mask as an index makes the CPU wait for the GPU.
        """
        return self.mask_BT.flatten().nonzero().squeeze(1)


def mini_batches(batch, count, seed):
    """The batch in `count` parts of whole groups, one for each update.

    Groups are dealt out in a random order, which depends on the seed and the batch's number alone.
    """
    if count == 1:
        return [batch]
    stream = np.random.default_rng([seed, PARTS, batch.number])
    order = stream.permutation(len(batch.responses) // batch.group_size)
    return [batch.part(sorted(groups.tolist())) for groups in np.array_split(order, count)]


def micro_batches(batch, weights_PG, max_tokens, device):
    """Yield a batch as `MicroBatch`es: its rows, with their advantages and weights in the loss.

    Rows of weight 0 form micro-batches of their own. Under torchrun, these are the micro-batches of
    this rank. It may have to repeat a row to make as many passes as the other ranks; the mask of
    that row is empty, so that it counts for nothing.
    """
    if batch.number % 5 == 0:
        # Freed memory goes back. glibc would keep it, in pieces that may fit no tensor to come.
        ctypes.CDLL(None).malloc_trim(0)
    weights_B = weights_PG.flatten()
    advantages_B = batch.advantages_PG.flatten()
    learns_B = (weights_B != 0).tolist()
    max_tokens = max_tokens or TOKENS_PER_MICROBATCH[torch.device(device).type]
    splits = split_evenly(batch.lengths, max_tokens, learns_B, distributed.size())
    for rows, repeated in progress(distributed.deal(splits, learns_B), "micro-batches"):
        micro = collate(batch, rows, device)
        micro.advantages_B1 = advantages_B[rows].float().unsqueeze(1).to(device)
        micro.weights_B1 = weights_B[rows].float().unsqueeze(1).to(device)
        micro.learns = learns_B[rows[0]]
        micro.rows = [batch.rows[row] for row in rows]
        if repeated:
            micro.mask_BT = torch.zeros_like(micro.mask_BT)
            micro.rows = []
        yield micro


def collate(batch, rows, device="cpu"):
    """The `MicroBatch` of these rows: prompt + response, padded on the right, shifted by one.

    `batch` has `prompts`, `responses` and `logprobs`, as a `Batch` has. ValueError if log-probs are
    not one per token.
    """
    ends = [len(batch.prompts[row]) + len(batch.responses[row]) for row in rows]
    width = max(ends)

    def padded(lists, filling):
        pairs = zip(lists, ends, strict=True)
        return torch.tensor([values + [filling] * (width - end) for values, end in pairs])

    tokens_BT = padded([batch.prompts[row] + batch.responses[row] for row in rows], 0)
    # What was not sampled, prompt and replies, has no log-prob.
    logprobs = [[None] * len(batch.prompts[row]) + batch.logprobs[row] for row in rows]
    if [len(of_row) for of_row in logprobs] != ends:
        raise ValueError(f"log-probs are not one per token: {list(map(len, logprobs))}, {ends}.")
    mask_BT = padded([[lp is not None for lp in of_row] for of_row in logprobs], False)
    logprobs_BT = padded([[lp or 0.0 for lp in of_row] for of_row in logprobs], 0.0)
    return MicroBatch(
        inputs_BT=tokens_BT[:, :-1].to(device),
        targets_BT=tokens_BT[:, 1:].to(device),
        mask_BT=mask_BT[:, 1:].to(device),
        sampler_logprobs_BT=logprobs_BT[:, 1:].to(device),
        rows=list(rows),
    )


def split_by_token_budget(lengths, max_tokens, group_by):
    """Split sequences into micro-batches of one `group_by` value each: a list of lists of rows.

    Rows × longest row is at most `max_tokens`, prompts and padding included, except for a single
    longer sequence. Sequences are sorted by length, so that those of a micro-batch are similar and
    little is padding; the longest of each `group_by` value come first, so that running out of
    memory shows early.
    """
    splits = []
    for row in sorted(range(len(lengths)), key=lambda row: (group_by[row], -lengths[row], row)):
        if splits:
            first = splits[-1][0]  # the longest of its micro-batch
            same_kind = group_by[first] == group_by[row]
            if same_kind and (len(splits[-1]) + 1) * lengths[first] <= max_tokens:
                splits[-1].append(row)
                continue
        splits.append([row])
    return splits


def split_evenly(lengths, max_tokens, group_by, ranks):
    """`split_by_token_budget`, with a smaller budget if several ranks share the micro-batches.

    It is the smallest one with which no rank makes more passes: they make them in lockstep, so that
    all wait for the one with the largest micro-batch.
    """
    if ranks == 1:
        return split_by_token_budget(lengths, max_tokens, group_by)

    def passes(budget):
        splits = split_by_token_budget(lengths, budget, group_by)
        of_kind = Counter(group_by[rows[0]] for rows in splits)
        return sum(math.ceil(count / ranks) for count in of_kind.values())

    budgets, fewest = range(max_tokens + 1), passes(max_tokens)
    budget = bisect.bisect_left(budgets, True, key=lambda budget: passes(budget) <= fewest)
    return split_by_token_budget(lengths, budget, group_by)
