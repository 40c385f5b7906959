"""Problems, float64 truth and error bounds for every implementation of log-probs and entropies from
hidden states.

Inputs are new each time; the seed is printed and can be given as LOGPROB_SEED. Truth is the plain
expression in float64 on the same (rounded) inputs. Bounds: float32 1e-5; bf16 1e-3 on average and
1e-2 at most for log-probs, and 3e-3 of the norm for gradients: with 8 bits, rounding the logits'
gradient and rounding the result cost 1.7e-3 each.
"""

import os
import time

import torch

from common.kernels import cpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEED = int(os.environ.get("LOGPROB_SEED", time.time_ns() % 2**31))
F32, BF16 = torch.float32, torch.bfloat16
UPSTREAM = {"log-prob only": (1, 0), "entropy only": (0, 1), "both": (1, 1)}


def seed():
    """Start the random stream of a test."""
    print(f"LOGPROB_SEED={SEED}")
    torch.manual_seed(SEED)


def problem(N, H, V, dtype=F32, spread=0.4):
    """h, W and targets sampled from the distribution that they define; spread 0.4 at H = 64 makes
    peaked logits.
    """
    hidden = torch.randn(N, H).to(dtype)
    weight = (torch.randn(V, H) * spread).to(dtype)
    logits = hidden.double() @ weight.double().T
    targets = (
        torch.distributions.Categorical(logits=logits).sample()
        if N
        else torch.zeros(0, dtype=torch.int64)
    )
    return hidden.to(DEVICE), weight.to(DEVICE), targets.to(DEVICE)


def leaves(*tensors, dtype=None):
    return [(t.to(dtype) if dtype else t).detach().clone().requires_grad_() for t in tensors]


def truth(hidden, weight, targets, dlogprobs, dentropy, cap=None):
    """Log-probs, entropies, dh and dW in float64."""
    hidden, weight = leaves(hidden, weight, dtype=torch.float64)
    results = cpu.plain_logprobs_and_entropy(hidden, weight, targets, cap)
    (results[0] @ dlogprobs.double() + results[1] @ dentropy.double()).backward()
    return *(r.detach() for r in results), hidden.grad, weight.grad


def assert_close(found, expected, dtype, scale=1.0):
    """Log-probs and entropies, then gradients; `scale` widens the first for logits that are large
    by themselves.
    """
    mean, largest, norm = (1e-3, 1e-2, 3e-3) if dtype == BF16 else (1e-5, 1e-5, 1e-5)
    # Where few numbers make up an average or a norm, roundings do not average out. (4,000 bf16
    # problems of one row, in slices: log-prob errors 2e-4 on average and 2e-3 at most, entropy
    # errors 3e-4 and 3e-3, one in twenty above 1e-3.)
    if len(found[0]) < 10:
        mean, norm = largest, 4 * norm
    for x, y in zip(found[:2], expected[:2], strict=True):
        assert x.dtype == F32
        error = (x - y).abs()
        assert error.mean() <= scale * mean and error.max() <= scale * largest
    for x, y in zip(found[2:], expected[2:], strict=True):
        if x is not None and x.numel():
            assert x.isfinite().all() and (x.double() - y).norm() <= norm * y.norm()
