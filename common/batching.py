"""Padding, shifting, masks and micro-batches. This is the only module that shifts by one.

A causal language model's output at position t predicts the token at t + 1. `collate` makes that shift once: in what it
returns, column t of every tensor speaks of the same predicted token, so nothing downstream ever writes `[:, 1:]`.
"""

from dataclasses import dataclass

import torch


@dataclass
class MicroBatch:
    """Some sequences of a batch, padded on the right to one width. T counts predicted tokens: total length − 1."""

    rows: list[int]
    """which sequences of the batch these are"""
    inputs_BT: torch.Tensor
    """int64: what the model reads; padding is any token, behind all real ones, where causal attention does not look"""
    attention_BT: torch.Tensor
    """int64: 1 where `inputs_BT` is a real token"""
    targets_BT: torch.Tensor
    """int64: the token that each position predicts"""
    mask_BT: torch.Tensor
    """bool: True where the predicted token belongs to the response (EOS included), False on prompt and padding"""
    sampler_logprobs_BT: torch.Tensor
    """float32: what the sampler reported when it drew the token; 0 outside the mask"""


def collate(prompts, responses, sampler_logprobs, rows, pad_id, device="cpu"):
    """Concatenate prompt and response of the given rows, pad on the right and shift by one.

    Args:
        prompts, responses: per sequence of the whole batch, a list of token ids (a response includes its EOS, if it
            ended with one).
        sampler_logprobs: per sequence, one float per response token.
        rows: the sequences to take, in this order.
        pad_id: any token id; what stands in padding never matters.

    Returns a `MicroBatch`. Its inputs are left untouched. Raises ValueError where log-probs are not one per token.
    """
    starts = [len(prompts[row]) for row in rows]
    ends = [start + len(responses[row]) for start, row in zip(starts, rows, strict=True)]
    width = max(ends)

    def padded(lists, filling):
        return torch.tensor([values + [filling] * (width - end) for values, end in zip(lists, ends, strict=True)])

    tokens_BT = padded([prompts[row] + responses[row] for row in rows], pad_id)
    logprobs_BT = padded([[0.0] * len(prompts[row]) + sampler_logprobs[row] for row in rows], 0.0)
    if logprobs_BT.shape != tokens_BT.shape:  # (of several rows, those that differ are no tensor to begin with)
        raise ValueError(f"log-probs are not one per token: {logprobs_BT.shape}, {tokens_BT.shape}.")
    place_1T = torch.arange(width).unsqueeze(0)
    start_B1, end_B1 = (torch.tensor(numbers).unsqueeze(1) for numbers in (starts, ends))
    attention_BT = (place_1T < end_B1).long()
    mask_BT = (start_B1 <= place_1T) & (place_1T < end_B1)
    return MicroBatch(
        rows=list(rows),
        inputs_BT=tokens_BT[:, :-1].to(device),
        attention_BT=attention_BT[:, :-1].to(device),
        targets_BT=tokens_BT[:, 1:].to(device),
        mask_BT=mask_BT[:, 1:].to(device),
        sampler_logprobs_BT=logprobs_BT[:, 1:].to(device),
    )


def split_by_token_budget(lengths, max_tokens, group_by=None):
    """Split sequences into micro-batches of at most `max_tokens` tokens, padding included.

    Sequences are sorted by length, so that those of one micro-batch are nearly as long as each other and little is
    padding; the longest come first, so that running out of memory shows in the first seconds.

    Args:
        lengths: tokens of each sequence (prompt + response).
        max_tokens: budget for rows × longest row. A single longer sequence gets a micro-batch of its own.
        group_by: per sequence, any sortable value; a micro-batch holds sequences of one value only.

    Returns a list of lists of row numbers, each row in exactly one.
    """
    keys = group_by if group_by is not None else [0] * len(lengths)
    order = sorted(range(len(lengths)), key=lambda row: (keys[row], -lengths[row], row))
    splits = []
    for row in order:
        fits = (
            splits
            and keys[splits[-1][0]] == keys[row]
            and (len(splits[-1]) + 1) * lengths[splits[-1][0]] <= max_tokens  # the first row is the longest
        )
        if fits:
            splits[-1].append(row)
        else:
            splits.append([row])
    return splits


def padding_share(lengths, splits):
    """Share of the positions in all micro-batches that are padding: 0 is none."""
    padded = sum(len(rows) * max(lengths[row] for row in rows) for rows in splits)
    return 1.0 - sum(lengths) / padded
