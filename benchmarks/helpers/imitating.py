"""grpo.py with a mistake, for comparison: in tasks of several turns, the tokens of replies are in
the loss, as if the policy had sampled them. `benchmarks/models/calculator.py` runs it.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import grpo
from common import batching
from common.commandline import run
from common.logprobs import token_logprobs
from common.sampling import Batch

collate = batching.collate


def collate_with_replies(batch, rows, device="cpu"):
    micro = collate(batch, rows, device)
    micro.told_BT = torch.zeros_like(micro.mask_BT)
    for place, row in enumerate(rows):
        start = len(batch.prompts[row]) - 1
        told = torch.tensor([logprob is None for logprob in batch.logprobs[row]])
        micro.told_BT[place, start : start + len(told)] = told
    micro.mask_BT = micro.mask_BT | micro.told_BT
    return micro


def token_logprobs_with_replies(model, micro, *arguments):
    """The policy that "sampled" a reply is the present one, so that ρ = 1."""
    logprobs_BT, entropy_BT = token_logprobs(model, micro, *arguments)
    present_BT = logprobs_BT.detach()
    micro.sampler_logprobs_BT = torch.where(micro.told_BT, present_BT, micro.sampler_logprobs_BT)
    return logprobs_BT, entropy_BT


def main(args):
    batching.collate = collate_with_replies
    Batch.lengths_PG = property(
        lambda batch: torch.tensor(list(map(len, batch.logprobs))).view(-1, batch.group_size)
    )
    grpo.token_logprobs = token_logprobs_with_replies
    grpo.__file__ = __file__  # the run is this script's
    grpo.main(args)


if __name__ == "__main__":
    run(main, grpo.Args, __file__)
