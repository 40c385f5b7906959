"""Padding, shifting, masks and micro-batches. This is the only module that shifts by one.

A causal language model's output at position t predicts the token at t + 1. `collate` makes that
shift once: in what it returns, column t of every tensor belongs to the same predicted token.
"""

from dataclasses import dataclass

import torch


@dataclass
class MicroBatch:
    """Some sequences of a batch, padded on the right to one width. T counts predicted tokens: total
    length − 1.

    Padding is token 0. Any token would do: it comes after all real ones, where causal attention
    does not look.
    """

    inputs_BT: torch.Tensor  # int64: what the model reads
    targets_BT: torch.Tensor  # int64: the token that each position predicts
    mask_BT: (
        torch.Tensor
    )  # bool: the predicted token belongs to the response (EOS included), not to prompt or padding
    sampler_logprobs_BT: (
        torch.Tensor
    )  # float32: what the sampler reported for the token; 0 outside the mask
    rows: list[int]  # of the batch, which these sequences are


def collate(batch, rows, device="cpu"):
    """The `MicroBatch` of these rows: prompts and responses are concatenated, padded on the right
    and shifted by one.

    `batch` has `prompts`, `responses` and `logprobs`, as a `Batch` has. ValueError if log-probs are
    not one per token.
    """
    starts = [len(batch.prompts[row]) for row in rows]
    ends = [start + len(batch.responses[row]) for start, row in zip(starts, rows, strict=True)]
    width = max(ends)

    def padded(lists, filling):
        return torch.tensor(
            [values + [filling] * (width - end) for values, end in zip(lists, ends, strict=True)]
        )

    tokens_BT = padded([batch.prompts[row] + batch.responses[row] for row in rows], 0)
    logprobs_BT = padded(
        [[0.0] * start + batch.logprobs[row] for start, row in zip(starts, rows, strict=True)], 0.0
    )
    if logprobs_BT.shape != tokens_BT.shape:
        raise ValueError(
            f"log-probs are not one per token: {logprobs_BT.shape}, {tokens_BT.shape}."
        )
    place_1T = torch.arange(width).unsqueeze(0)
    start_B1, end_B1 = (torch.tensor(numbers).unsqueeze(1) for numbers in (starts, ends))
    mask_BT = (start_B1 <= place_1T) & (place_1T < end_B1)
    return MicroBatch(
        inputs_BT=tokens_BT[:, :-1].to(device),
        targets_BT=tokens_BT[:, 1:].to(device),
        mask_BT=mask_BT[:, 1:].to(device),
        sampler_logprobs_BT=logprobs_BT[:, 1:].to(device),
        rows=list(rows),
    )


def split_by_token_budget(lengths, max_tokens, group_by):
    """Split sequences into micro-batches of one `group_by` value each: a list of lists of row
    numbers.

    Rows × longest row is at most `max_tokens`, prompts and padding included, except for a single
    longer sequence. Sequences are sorted by length, so that those of a micro-batch are similar and
    little is padding; the longest of each `group_by` value come first, so that running out of
    memory shows early.
    """
    splits = []
    for row in sorted(range(len(lengths)), key=lambda row: (group_by[row], -lengths[row], row)):
        first = splits[-1][0] if splits else row  # the longest of its micro-batch
        if (
            splits
            and group_by[first] == group_by[row]
            and (len(splits[-1]) + 1) * lengths[first] <= max_tokens
        ):
            splits[-1].append(row)
        else:
            splits.append([row])
    return splits
