"""Micro-batches of given numbers, for tests of losses and metrics."""

import torch

from common.batching import MicroBatch


def micro_batch(logprobs_BT, sampler_logprobs_BT, advantages_B1, mask_BT=None, **more):
    """A `MicroBatch` whose tokens have these log-probs; all are response tokens without a mask."""
    if mask_BT is None:
        mask_BT = torch.ones_like(logprobs_BT, dtype=torch.bool)
    return MicroBatch(
        inputs_BT=torch.zeros_like(mask_BT, dtype=torch.int64),
        targets_BT=torch.zeros_like(mask_BT, dtype=torch.int64),
        mask_BT=mask_BT,
        sampler_logprobs_BT=sampler_logprobs_BT,
        rows=list(range(len(mask_BT))),
        advantages_B1=advantages_B1,
        logprobs_BT=logprobs_BT,
        **more,
    )


def losses_of(script, logprobs_N, sampler_logprobs_N, advantages_N, args=None, **more):
    """The script's loss of single tokens, each the only one of its response: [N] of [N]."""
    columns = [tensor.unsqueeze(1) for tensor in (logprobs_N, sampler_logprobs_N, advantages_N)]
    more = {name: tensor_N.unsqueeze(1) for name, tensor_N in more.items()}
    return script.per_token_loss(micro_batch(*columns, **more), args or script.Args()).squeeze(1)


def slopes_of(script, logprobs_N, sampler_logprobs_N, advantages_N, args=None, **more):
    """d loss / d log-prob of single tokens, by autograd through the script's own function: [N]."""
    leaf_N = logprobs_N.clone().requires_grad_()
    losses_of(script, leaf_N, sampler_logprobs_N, advantages_N, args, **more).sum().backward()
    return leaf_N.grad
