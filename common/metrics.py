"""What is measured in a step. Token statistics are float64 sums divided once by N: micro-batches do
not show.
"""

import resource
import time
import warnings
from collections import Counter

import numpy as np
import torch

from common.distributed import gather
from common.sampling.verify import TOLERANCE
from common.tasks import means
from common.viewer import token_values


class StepMetrics:
    """Collects the metrics of a step from now on; `tokens` gets `viewer.token_values` of the
    `recorded_rows`.
    """

    def __init__(self, recorded_rows=range(0)):
        self.recorded_rows, self.tokens = recorded_rows, {}
        self.times = {"time/step_started_at": time.time()}
        self.sums = {
            "ratio/clip_fraction": 0.0,
            "ratio/clip_fraction_weighted": 0.0,
            "weights": 0.0,
        }
        self.maxima, self.last_lap = {}, time.perf_counter()

    def lap(self, name):
        """Count the seconds since the last lap, or since the start, as `time/<name>`."""
        now = time.perf_counter()
        self.times[f"time/{name}"], self.last_lap = now - self.last_lap, now

    @torch.no_grad()
    def add_tokens(self, micro, logprobs_BT, entropy_BT, ref_logprobs_BT=None):
        """Add one micro-batch, after its backward pass.

        A token whose log-prob has gradient 0 although its advantage is not 0 was clipped by the
        loss. (`logprobs_BT` has a `grad` where `retain_grad` was called.) With lp and ref the
        log-probs of policy and reference, the estimators of KL(policy ‖ reference) in Schulman's
        "Approximating KL Divergence" (2020) are

            k1 = lp − ref      k2 = (lp − ref)² / 2      k3 = exp(ref − lp) − (ref − lp) − 1
        """
        if self.recorded_rows:
            self.tokens |= token_values(
                micro, self.recorded_rows, logprobs_BT, entropy_BT, ref_logprobs_BT
            )
        mask_BT = micro.mask_BT
        lp = logprobs_BT.detach()[mask_BT].double()
        if logprobs_BT.requires_grad:
            clipped, weights = (logprobs_BT.grad == 0)[mask_BT], -torch.expm1(lp)  # 1 − p
            self._sum("ratio/clip_fraction", clipped)
            self._sum("ratio/clip_fraction_weighted", clipped * weights)
            self._sum("weights", weights)
        log_ratio = lp - micro.sampler_logprobs_BT[mask_BT].double()
        self._sum("entropy", entropy_BT[mask_BT])
        # KL(sampler ‖ trainer) from the sampler's own tokens: how far the policy has moved since it
        # sampled them.
        self._sum("kl/behaviour_k3", log_ratio.exp() - log_ratio - 1)
        self._max("ratio/max", log_ratio.exp())
        self._sum("sampler_mismatch/mean", log_ratio.abs())
        self._max("sampler_mismatch/max", log_ratio.abs())
        if ref_logprobs_BT is not None:
            difference = lp - ref_logprobs_BT[mask_BT].double()
            self._sum("kl/ref_k1", difference)
            self._sum("kl/ref_k2", difference.square() / 2)
            self._sum("kl/ref_k3", (-difference).exp() + difference - 1)

    def result(self, batch, rewards_PG, grades, device, precision):
        """All metrics of a step, numbers, from its `Batch`, float64 rewards and B grades. Warns
        once of a mismatch.
        """
        sums, maxima = Counter(), {}
        for more, larger, tokens in gather((self.sums, self.maxima, self.tokens)):
            sums.update(more)  # adds
            self.tokens |= tokens
            maxima |= {
                key: float(np.maximum(maxima.get(key, 0.0), value)) for key, value in larger.items()
            }
        lengths = [len(response) for response in batch.responses]
        lag = batch.number - 1 - batch.version
        weights = sums.pop("weights") or 1.0
        averages = {key: value / sum(lengths) for key, value in sums.items()} | maxima
        averages["ratio/clip_fraction_weighted"] *= sum(lengths) / weights
        if lag:  # trainer and sampler differ because the policy has learned, which is no mismatch
            averages = {
                key: value
                for key, value in averages.items()
                if not key.startswith("sampler_mismatch")
            }
        if (averages | batch.metrics).get("sampler_mismatch/mean", 0.0) > TOLERANCE[precision]:
            what = "sampler_mismatch/mean is larger than rounding explains"
            warnings.warn(f"{what}: do not trust this run before you know why.", stacklevel=2)
        peak = (
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )  # of the process: Linux counts in KiB
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
        steps = [
            value
            for key, value in self.times.items()
            if key not in ("time/step_started_at", "time/eval")
        ]
        return {
            "reward/mean": rewards_PG.mean().item(),
            "reward/std": rewards_PG.std(correction=0).item(),
            "reward/zero_std_groups": (rewards_PG == rewards_PG[:, :1])
            .all(dim=1)
            .double()
            .mean()
            .item(),
            **{key: value for key, value in means(grades).items() if key != "reward"},
            "response_length/mean": float(np.mean(lengths)),
            "response_length/max": float(max(lengths)),
            "response_length/truncated": float(np.mean(batch.truncated)),
            **averages,
            **batch.metrics,
            "lag": lag,
            "weights_version": batch.version,
            **self.times,
            "time/step": sum(steps),
            "throughput/sampled_tokens_per_second": sum(lengths) / batch.metrics["time/sample"],
            "throughput/trained_tokens_per_second": sum(batch.lengths) / self.times["time/train"],
            "memory/peak_gib": peak / 2**30,
        }

    def _sum(self, key, values):
        self.sums[key] = self.sums.get(key, 0.0) + values.double().sum().item()

    def _max(self, key, values):
        if values.numel():  # `np.maximum` keeps a NaN, Python's `max` may lose it
            self.maxima[key] = float(np.maximum(self.maxima.get(key, 0.0), values.max().item()))
