"""Fast ways from hidden states to log-probs and entropies.

`triton.py` computes them on a GPU, `cpu.py` on a CPU; here is what both do. With hidden states
h [N, H], output head W [V, H] and target tokens y [N], the logits are z = W h, p = softmax(z), and

    logprob = z_y − logsumexp(z)                         ∂ logprob / ∂z_v = 1[v = y] − p_v
    entropy = −Σ_v p_v log p_v                           ∂ entropy / ∂z_v = −p_v (log p_v + entropy)

N × V logits are the largest tensor of a training step (N = 8,192 response tokens and V = 151,936
make 5 GB of float32), and nothing but sums over v is wanted from them. So they are computed a slice
at a time, twice: once for the sums, and again in the backward pass, where each slice's gradient
goes straight into the products that give dh and dW.

The target is kept apart from all other entries. With s = Σ exp(z_v) over the others, its log-odds
are o = z_y − log s, and log p_y = −log(1 + exp(−o)), 1 − p_y = 1 / (1 + exp(o)). Where p_y is near
1, as most of a trained model's are, the whole gradient is 1 − p_y times something, and this keeps
all of its digits.
"""

import math

import torch
from torch.nn.functional import logsigmoid

LOG2_E = math.log2(math.e)
LN_2 = math.log(2)


def target_against_others(odds_N, entropy_of_others_N):
    """Log-prob of the target, and entropy, from the target's log-odds.

    The entropy is that of whether the token is the target, and if not, of which of the others it
    is.
    """
    p_target_N = odds_N.sigmoid()
    p_others_N = (-odds_N).sigmoid()
    entropy_N = (
        torch.special.entr(p_target_N)
        + torch.special.entr(p_others_N)
        + p_others_N * entropy_of_others_N
    )
    return logsigmoid(odds_N), entropy_N


def gradient_at_target(odds_N, entropy_N, a_N, b_N):
    """The target's entry of the gradient with respect to the logits.

    That is a (1 − p) − b p (log p + entropy), for upstream gradients a of the log-prob and b of the
    entropy.
    """
    p_target_N = odds_N.sigmoid()
    p_others_N = (-odds_N).sigmoid()
    by_entropy_N = p_target_N * entropy_N - torch.special.entr(p_target_N)
    return a_N * p_others_N - b_N * by_entropy_N


def live_rows(dlogprobs_N, dentropy_N, *tensors):
    """Indices of the rows that have an upstream gradient, and the tensors' values in those rows.

    The other rows cost nothing, and whatever they hold, NaN for instance, stays out of the
    products.
    """
    live = ((dlogprobs_N != 0) | (dentropy_N != 0)).nonzero().squeeze(1)
    if len(live) == len(dlogprobs_N):  # all of them: nothing to copy
        return live, *tensors
    return live, *(tensor[live] for tensor in tensors)
