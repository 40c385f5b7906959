"""What is sampled, with which weights, by whom: the schedule, the batches, and the interface of a
sampler.

Batch k, from 1, is trained on in step k, and update k is made from it. Version j of the weights is
the policy after update j. With I = `sync_interval` and O = `sync_offset`, batch k is sampled with

    version(k) = I · floor(max(0, k − 1 − O) / I)          lag(k) = (k − 1) − version(k)

(I, O) = (1, 0) is on-policy training; with (1, 1), one step off-policy, batch k + 1 can be sampled
while batch k is trained on (Pan et al., Trinity-RFT, arXiv 2505.17826).
"""

import time
from dataclasses import dataclass, field

import numpy as np
import torch

ORDER, SAMPLE = range(2)  # what a random stream is for


@dataclass
class Batch:
    """What was sampled for one step: P prompts, G responses each; B = P·G sequences in prompt
    order.
    """

    number: int  # k: the step that trains on it
    version: int  # of the weights it was sampled with
    problems: list[int]  # B indices into the training problems (a group's problem G times)
    prompts: list[list[int]]  # B lists of token ids
    responses: list[list[int]]  # B lists of token ids, EOS included where there was one
    logprobs: list[
        list[float]
    ]  # B lists: log-prob of each response token under the policy that sampled it
    truncated: list[bool]  # B: cut at the token limit
    metrics: dict[str, float] = field(
        default_factory=dict
    )  # measured on the way, to be logged with its step

    @property
    def lengths(self):
        """Tokens of each sequence, prompt and response."""
        return [
            len(prompt) + len(response)
            for prompt, response in zip(self.prompts, self.responses, strict=True)
        ]


@dataclass
class Samples:
    """Responses to prompts, in the order prompt 0's G responses, prompt 1's, …; fields as in
    `Batch`.
    """

    responses: list[list[int]]
    logprobs: list[list[float]]
    truncated: list[bool]


class Sampler:
    """Samples from softmax(logits / temperature), without top-p, top-k or penalty; records each
    token's log-prob.
    """

    heartbeat: (
        torch.Tensor
    )  # int64 [1], grows while the sampler works: tells another process slow from stuck

    def use_weights(self, tensors):
        """Sample with these weights from now on: tensors by parameter name, which may be kept and
        must not change.
        """
        raise NotImplementedError

    def sample(self, prompts, group_size, seeds):
        """Sample `group_size` responses to each prompt (token ids); with transformers, weights and
        arguments fix them.

        `seeds`: one below 2⁶³ per prompt, at least `group_size` apart. Returns `Samples`, or raises
        `RunStopped`.
        """
        raise NotImplementedError

    def sample_many(self, requests, group_size):
        """`sample` for several (prompts, seeds); yields their `Samples` in order, each as soon as
        it is complete.
        """
        for prompts, seeds in requests:
            yield self.sample(prompts, group_size, seeds)

    def greedy(self, prompts):
        """The most likely token at every position, one response per prompt. Returns `Samples`."""
        raise NotImplementedError

    def sleep(self):
        """Free the GPU until the next `use_weights`, if this sampler shares one with the trainer.
        """


def version_of_batch(k, sync_interval, sync_offset):
    """Version of the weights that batch `k` (≥ 1) is sampled with."""
    return sync_interval * (max(0, k - 1 - sync_offset) // sync_interval)


def problems_of_batch(k, num_problems, prompts_per_step, seed):
    """Indices of the P problems of batch `k` (from 1): consecutive pieces of one shuffled pass
    after another.
    """
    places = range((k - 1) * prompts_per_step, k * prompts_per_step)
    epochs = {place // num_problems for place in places}
    orders = {
        epoch: np.random.default_rng([seed, ORDER, epoch]).permutation(num_problems)
        for epoch in epochs
    }
    return [int(orders[place // num_problems][place % num_problems]) for place in places]


@dataclass
class Plan:
    """Everything about the batches but the weights: prompts, group size, schedule, seed."""

    prompts: list[list[int]]  # per training problem, its prompt as token ids
    prompts_per_step: int  # P
    group_size: int  # G
    sync_interval: int  # I
    sync_offset: int  # O
    seed: int
    mine: slice = field(
        default_factory=lambda: slice(None)
    )  # which of the P prompts this rank samples

    def version(self, k):
        return version_of_batch(k, self.sync_interval, self.sync_offset)

    def batches_of(self, version):
        """Range of the batches sampled with a version: past the last step, too, so that a run can
        be extended.
        """
        first = (
            version + self.sync_offset + 1 if version else 1
        )  # the initial weights sample the first O as well
        return range(first, version + self.sync_offset + self.sync_interval + 1)

    def shows_mismatch_only_now(self, k):
        """Whether batch k is the first of a version all of whose batches lag. (At lag 0, training
        shows a mismatch.)
        """
        return self.version(k) < k - 1 and k == self.batches_of(self.version(k))[0]

    def seeds(self, k):
        """One seed per prompt of batch k, G apart (vLLM seeds a group's i-th response with seed +
        i).
        """
        first = int(np.random.default_rng([self.seed, SAMPLE, k]).integers(2**62))
        return [first + p * self.group_size for p in range(self.prompts_per_step)]

    def share_of(self, waiting):
        """From a checkpoint's fields of whole batches, this rank's share of each `Batch`, by
        number.
        """
        start, end, _ = self.mine.indices(self.prompts_per_step)
        rows = slice(start * self.group_size, end * self.group_size)
        mine = [
            {key: v[rows] if isinstance(v, list) else v for key, v in fields.items()}
            for fields in waiting
        ]
        return {fields["number"]: Batch(**fields) for fields in mine}

    def sample(self, sampler, numbers):
        """Sample batches `numbers`, all of the version `sampler` holds; yields each when complete.
        Read to the end.
        """
        G = self.group_size
        of_batch = {
            k: problems_of_batch(k, len(self.prompts), self.prompts_per_step, self.seed)
            for k in numbers
        }
        problems_of = {k: problems[self.mine] for k, problems in of_batch.items()}
        requests = [
            ([self.prompts[problem] for problem in problems_of[k]], self.seeds(k)[self.mine])
            for k in numbers
        ]
        started, started_at = time.perf_counter(), time.time()
        for k, samples in zip(numbers, sampler.sample_many(requests, G), strict=True):
            problems = [problem for problem in problems_of[k] for _ in range(G)]
            metrics = {
                "time/sample": time.perf_counter() - started,
                "time/sample_started_at": started_at,
            }
            started, started_at = time.perf_counter(), time.time()
            prompts = [self.prompts[problem] for problem in problems]
            yield Batch(k, self.version(k), problems, prompts, **vars(samples), metrics=metrics)
