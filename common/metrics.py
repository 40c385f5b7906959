"""Statistics of a batch, as sums over its response tokens divided once by their number N.

The sums are taken in float64, so that the way a batch is split into micro-batches does not show.
"""

import resource
import sys

import numpy as np
import torch


class TokenStatistics:
    """Collects per-token statistics over the micro-batches of one step."""

    def __init__(self):
        self.sums, self.maxima = {"ratio/clip_fraction": 0.0}, {}

    def add(self, mask_BT, logprobs_BT, sampler_logprobs_BT, entropy_BT, ref_logprobs_BT=None):
        """Add one micro-batch; all tensors [B, T], statistics over the tokens where `mask_BT` is True.

        With lp and ref the log-probs of trainer and reference, the estimators of Schulman's "Approximating KL
        Divergence" (2020) are

            k1 = lp − ref      k2 = (lp − ref)² / 2      k3 = exp(ref − lp) − (ref − lp) − 1
        They estimate KL(policy ‖ reference) when the sampler's policy is the trainer's; with a lag, tokens are slightly
        off-policy and so are the estimates.
        """
        lp = logprobs_BT.detach()[mask_BT].double()
        log_ratio = lp - sampler_logprobs_BT[mask_BT].double()
        self._sum("entropy", entropy_BT[mask_BT])
        # KL(sampler ‖ trainer) from the sampler's own tokens: how far the policy has moved since it drew them.
        self._sum("kl/behaviour_k3", log_ratio.exp() - log_ratio - 1)
        self._max("ratio/max", log_ratio.exp())
        self._sum("sampler_mismatch/mean", log_ratio.abs())
        self._max("sampler_mismatch/max", log_ratio.abs())
        if ref_logprobs_BT is not None:
            difference = lp - ref_logprobs_BT[mask_BT].double()
            self._sum("kl/ref_k1", difference)
            self._sum("kl/ref_k2", difference.square() / 2)
            self._sum("kl/ref_k3", (-difference).exp() + difference - 1)

    def add_clipped(self, clipped):
        """Count tokens (a bool tensor) that have an advantage but got no gradient: the loss clipped them away."""
        self._sum("ratio/clip_fraction", clipped)

    def result(self, num_tokens, same_weights):
        """Means over `num_tokens`, and maxima, by metric name.

        `same_weights`: whether the sampler held the weights that the trainer measured with. If not, its log-probs
        differ because the policy has learned, and the sampler mismatch (numerics, stale weights) is left out.
        """
        result = {key: value / num_tokens for key, value in self.sums.items()} | self.maxima
        return {key: v for key, v in result.items() if same_weights or not key.startswith("sampler_mismatch")}

    def _sum(self, key, values):
        self.sums[key] = self.sums.get(key, 0.0) + values.double().sum().item()

    def _max(self, key, values):
        if values.numel():  # `np.maximum` lets a NaN show, Python's `max` may lose it
            self.maxima[key] = float(np.maximum(self.maxima.get(key, 0.0), values.max().item()))


def reward_statistics(rewards_PG, grades, lengths, truncated):
    """Metrics of rewards (float64 [P, G]) and of response lengths (tokens), per sequence."""
    extra = {key for g in grades for key in g} - {"reward"}
    return {
        "reward/mean": rewards_PG.mean().item(),
        "reward/std": rewards_PG.std(correction=0).item(),
        "reward/zero_std_groups": (rewards_PG == rewards_PG[:, :1]).all(dim=1).double().mean().item(),
        **{key: float(np.mean([g[key] for g in grades if key in g])) for key in sorted(extra)},
        "response_length/mean": float(np.mean(lengths)),
        "response_length/max": float(max(lengths)),
        "response_length/truncated": float(np.mean(truncated)),
    }


def peak_memory_gib(device):
    """Most memory ever held: PyTorch's on a GPU, the process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10  # macOS counts in bytes, Linux in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
