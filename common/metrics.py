"""What is measured in a step.

Token statistics are float64 sums, divided once by N: micro-batches do not show.
"""

import math
import re
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from common.distributed import gather
from common.recording import token_values
from common.sampling.verify import TOLERANCE
from common.tasks.problems import means


class StepMetrics:
    """Collects the metrics of a step, and what is recorded of some rows of its batch, per token."""

    def __init__(self, recorded_rows=range(0)):
        self.recorded_rows = recorded_rows
        self.recorded = {}
        self.updates = []
        self.sums = {"ratio/clip_fraction": 0.0, "ratio/clip_fraction_weighted": 0.0, "1 - p": 0.0}
        self.maxima = {}
        self.times = {"time/step_started_at": time.time()}
        self.running, self.began = None, 0.0

    def phase(self, name):
        """Count the seconds from now until the next phase, or the result, as `time/<name>`."""
        now = time.perf_counter()
        if self.running is not None:
            self.times[f"time/{self.running}"] = now - self.began
        self.running, self.began = name, now

    @torch.no_grad()
    def add_micro_batch(self, micro):
        """Add the tokens of a `MicroBatch`, after its backward pass.

        A token is counted as clipped if its log-prob has gradient 0 although its response has an
        advantage. (`retain_grad` must have been called on `logprobs_BT`.) With lp and ref the
        log-probs of policy and reference, the estimators of KL(policy ‖ reference) in Schulman's
        "Approximating KL Divergence" (2020) are

            k1 = lp − ref      k2 = (lp − ref)² / 2      k3 = exp(ref − lp) − (ref − lp) − 1
        """
        if self.recorded_rows:
            self.recorded |= token_values(micro, self.recorded_rows)

        def of_tokens(values_BT):
            return values_BT.detach().flatten()[micro.places_N].double()

        lp = of_tokens(micro.logprobs_BT)
        gradient_BT = micro.logprobs_BT.grad if micro.learns else None
        if gradient_BT is not None:
            graded = of_tokens((micro.advantages_B1 != 0).expand_as(gradient_BT))
            clipped = of_tokens(gradient_BT == 0) * graded
            one_minus_p = -torch.expm1(lp) * graded
            self._sum("ratio/clip_fraction", clipped)
            self._sum("ratio/clip_fraction_weighted", clipped * one_minus_p)
            self._sum("1 - p", one_minus_p)
        log_ratio = lp - of_tokens(micro.sampler_logprobs_BT)
        self._sum("entropy", of_tokens(micro.entropy_BT))
        # KL(sampler ‖ trainer) from the sampler's own tokens: how far the policy has moved since.
        self._sum("kl/behaviour_k3", log_ratio.exp() - log_ratio - 1)
        self._max("ratio/max", log_ratio.exp())
        if not self.updates:  # after an update of this step, they differ because it has learned
            self._sum("compared", torch.ones_like(lp))
            self._sum("sampler_mismatch/mean", log_ratio.abs())
            self._max("sampler_mismatch/max", log_ratio.abs())
        if micro.reference_logprobs_BT is not None:
            difference = lp - of_tokens(micro.reference_logprobs_BT)
            self._sum("kl/ref_k1", difference)
            self._sum("kl/ref_k2", difference.square() / 2)
            self._sum("kl/ref_k3", (-difference).exp() + difference - 1)

    def add_update(self, loss, grad_norm, lr, skipped):
        """Add an update; of several per batch, the means are logged."""
        update = {"loss": loss, "grad_norm": grad_norm, "lr": lr, "update_skipped": float(skipped)}
        self.updates.append(update)

    def recorded_tokens(self):
        """What was recorded on all ranks: {row: {name: one value per token}}."""
        recorded = {}
        if self.recorded_rows:
            for part in gather(self.recorded):
                recorded |= part
        return recorded

    def result(self, batch, device, precision):
        """All metrics of a step, numbers by name, from its graded `Batch`. Ends the last phase.

        Warns if trainer and sampler disagree by more than rounding explains.
        """
        self.phase(None)
        lengths = batch.lengths_PG.flatten().tolist()
        rewards_PG = batch.rewards_PG
        equal_P = (rewards_PG == rewards_PG[:, :1]).all(dim=1)
        steps = [self.times[key] for key in self.times if key not in NOT_OF_A_STEP]
        return {
            **means(self.updates),
            "reward/mean": rewards_PG.mean().item(),
            "reward/std": rewards_PG.std(correction=0).item(),
            "reward/zero_std_groups": equal_P.double().mean().item(),
            **{key: value for key, value in means(batch.grades).items() if key != "reward"},
            "response_length/mean": float(np.mean(lengths)),
            "response_length/max": float(max(lengths)),
            "response_length/truncated": float(np.mean(batch.truncated)),
            **self._token_metrics(batch, precision),
            **batch.metrics,
            "lag": batch.number - 1 - batch.version,
            "weights_version": batch.version,
            **self.times,
            "time/step": sum(steps),
            "throughput/sampled_tokens_per_second": sum(lengths) / batch.metrics["time/sample"],
            "throughput/trained_tokens_per_second": sum(batch.lengths) / self.times["time/train"],
            "memory/peak_gib": peak_bytes(device) / 2**30,
        }

    def _token_metrics(self, batch, precision):
        """Means and maxima over all response tokens, on all ranks."""
        N = batch.lengths_PG.sum().item()
        sums, maxima = Counter(), {}
        for more, larger in gather((as_numbers(self.sums), as_numbers(self.maxima))):
            sums.update(more)  # adds
            for key, value in larger.items():
                maxima[key] = _larger(maxima.get(key, 0.0), value)
        one_minus_p = sums.pop("1 - p") or 1.0
        compared = sums.pop("compared")
        values = {key: value / N for key, value in sums.items()} | maxima
        values["ratio/clip_fraction_weighted"] *= N / one_minus_p
        values["sampler_mismatch/mean"] *= N / compared
        if batch.version < batch.number - 1:
            # With a lag, they differ because the policy has learned, which is no mismatch.
            del values["sampler_mismatch/mean"], values["sampler_mismatch/max"]
        mismatch = (values | batch.metrics).get("sampler_mismatch/mean", 0.0)
        if mismatch > TOLERANCE[precision]:
            warnings.warn(
                "sampler_mismatch/mean is larger than rounding explains: do not trust this run "
                "before you know why.",
                stacklevel=3,
            )
        return values

    # Sums and maxima stay on the device until the step is over: to ask for a number is to wait.

    def _sum(self, key, values):
        self.sums[key] = self.sums.get(key, 0.0) + values.sum()

    def _max(self, key, values):
        if values.numel():
            largest = values.max()
            self.maxima[key] = torch.maximum(self.maxima.get(key, largest), largest)


NOT_OF_A_STEP = ("time/step_started_at", "time/eval")


def as_numbers(values):
    """A dict of numbers, some of them tensors, as Python's; a GPU is waited for once."""
    tensors = {key: value for key, value in values.items() if isinstance(value, torch.Tensor)}
    if tensors:
        numbers = torch.stack(list(tensors.values())).tolist()
        values = values | dict(zip(tensors, numbers, strict=True))
    return values


def _larger(a, b):
    return float(np.maximum(a, b))  # which keeps a NaN; Python's `max` may lose it


def peak_bytes(device):
    """The most memory held so far: by PyTorch on a GPU, by this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not `ru_maxrss`: that starts with the memory of the process which started this one.
    kib = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(kib[1]) * 1024 if kib else math.nan  # some sandboxes do not tell
