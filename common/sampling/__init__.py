"""What is sampled, with which weights, by whom: the schedule, the batches, a sampler's interface.

Batch k, from 1, is trained on in step k, and update k is made from it. Version j of the weights is
the policy after update j. With I = `sync_interval` and O = `sync_offset`, batch k is sampled with

    version(k) = I · floor(max(0, k − 1 − O) / I)          lag(k) = (k − 1) − version(k)

(I, O) = (1, 0) is on-policy training; with (1, 1), one step off-policy, batch k + 1 can be sampled
while batch k is trained on (Pan et al., Trinity-RFT, arXiv 2505.17826). Where a step makes several
updates, "update k" are all of step k.
"""

import time
from dataclasses import dataclass, field, replace

import numpy as np
import torch

ORDER, SAMPLE, PARTS = range(3)  # what a random stream is for


@dataclass
class Batch:
    """What was sampled for one step, and what became of it: P prompts, G responses each.

    Lists have B = P·G entries in the order prompt 0's G responses, prompt 1's, …
    """

    number: int  # k: the step that trains on it
    version: int  # of the weights it was sampled with
    group_size: int  # G
    problems: list[int]  # numbers of the training problems (a group's problem G times)
    prompts: list[list[int]]  # token ids
    responses: list[list[int]]  # token ids, EOS included where there was one
    # Of each response token, under the policy that sampled it; None for a reply's, which none did
    logprobs: list[list[float | None]]
    truncated: list[bool]  # cut at the token limit
    metrics: dict[str, float] = field(default_factory=dict)  # to be logged with its step

    # Once it has been graded
    texts: list = field(default_factory=list)  # the responses; of several turns, lists of texts
    grades: list[dict[str, float]] = field(default_factory=list)  # "reward" and further values
    advantages_PG: torch.Tensor | None = None  # float64, from the script

    part_of: tuple[int, ...] | None = None  # rows of the whole batch, where this is a part of it

    @property
    def rows(self):
        """The number of each sequence in the whole batch of the step."""
        return range(len(self.responses)) if self.part_of is None else self.part_of

    @property
    def lengths(self):
        """Tokens of each sequence, prompt and response."""
        pairs = zip(self.prompts, self.responses, strict=True)
        return [len(prompt) + len(response) for prompt, response in pairs]

    @property
    def lengths_PG(self):
        """Response tokens of each sequence that the policy sampled, int64."""
        return torch.tensor(num_sampled(self.logprobs)).view(-1, self.group_size)

    @property
    def rewards_PG(self):
        """float64: in float32, the mean of eight rewards of 0.7 is not 0.7."""
        rewards = [grade["reward"] for grade in self.grades]
        return torch.tensor(rewards, dtype=torch.float64).view(-1, self.group_size)

    def part(self, groups):
        """The `Batch` of some of its groups, given by their numbers."""
        G = self.group_size
        rows = [row for group in groups for row in range(group * G, (group + 1) * G)]
        lists = {name: value for name, value in vars(self).items() if isinstance(value, list)}
        own = {name: [value[row] for row in rows] for name, value in lists.items() if value}
        return replace(self, advantages_PG=self.advantages_PG[groups], part_of=tuple(rows), **own)


@dataclass
class Samples:
    """Responses to prompts; fields and order as in `Batch`."""

    responses: list[list[int]]
    logprobs: list[list[float | None]]
    truncated: list[bool]

    @property
    def lengths(self):
        """Sampled tokens of each response."""
        return num_sampled(self.logprobs)


def num_sampled(logprobs):
    """How many tokens of each response the policy has sampled: all but those of replies."""
    return [len(of_response) - of_response.count(None) for of_response in logprobs]


class Sampler:
    """Samples from softmax(logits / temperature), without top-p, top-k or penalty.

    Records each token's log-prob. `heartbeat`, int64 [1], grows while the sampler works, which
    tells another process slow from stuck. `checksums`, by parameter name, are those of the verified
    weights that an engine holds, or None, and `loading` is what loading them took. `environment`
    answers turns; None if there is only one.
    """

    heartbeat: torch.Tensor
    environment = None
    checksums: dict[str, int] | None = None
    loading: dict[str, float] | None = None

    def use_weights(self, tensors):
        """Sample with these weights from now on.

        `tensors` by parameter name; they may be kept, and must not change.
        """
        raise NotImplementedError

    def sample(self, prompts, group_size, seeds, problems=None):
        """Sample `group_size` responses to each prompt (token ids).

        With transformers, weights and arguments fix them. `seeds`: one below 2⁶³ per prompt, at
        least `group_size` apart. `problems`: one per prompt, for the environment if there is one.
        Returns `Samples`, or raises `RunStopped`.
        """
        raise NotImplementedError

    def sample_many(self, requests, group_size):
        """`sample` for several (prompts, seeds, problems).

        Yields their `Samples` in order, each as soon as it is complete.
        """
        for prompts, seeds, problems in requests:
            yield self.sample(prompts, group_size, seeds, problems)

    def greedy(self, prompts, problems=None):
        """The most likely token at every position, one response per prompt. Returns `Samples`."""
        raise NotImplementedError

    def sleep(self):
        """Free the GPU until the next `use_weights`, if shared with the trainer."""


def version_of_batch(k, sync_interval, sync_offset):
    """Version of the weights that batch `k` (≥ 1) is sampled with."""
    return sync_interval * (max(0, k - 1 - sync_offset) // sync_interval)


def problems_of_batch(k, num_problems, prompts_per_step, seed):
    """Numbers of the P problems of batch k ≥ 1: pieces of one shuffled pass after another."""
    places = range((k - 1) * prompts_per_step, k * prompts_per_step)
    orders = {}
    for epoch in {place // num_problems for place in places}:
        orders[epoch] = np.random.default_rng([seed, ORDER, epoch]).permutation(num_problems)
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
    mine: slice = field(default_factory=lambda: slice(None))  # of the P prompts: this rank's share
    problems: list[dict] | None = None  # the training problems, if an environment asks for them

    def version(self, k):
        return version_of_batch(k, self.sync_interval, self.sync_offset)

    def batches_of(self, version):
        """Range of the batches sampled with a version.

        It may reach past the last step, so that a run can be extended.
        """
        # The initial weights sample the first O batches as well.
        first = version + self.sync_offset + 1 if version else 1
        return range(first, version + self.sync_offset + self.sync_interval + 1)

    def shows_mismatch_only_now(self, k):
        """Whether batch k is the first of a version all of whose batches lag.

        (At lag 0, training shows a mismatch.)
        """
        return self.version(k) < k - 1 and k == self.batches_of(self.version(k))[0]

    def seeds(self, k):
        """One seed per prompt of batch k, G apart: vLLM seeds the i-th of a group with seed + i."""
        first = int(np.random.default_rng([self.seed, SAMPLE, k]).integers(2**62))
        return [first + p * self.group_size for p in range(self.prompts_per_step)]

    def share_of(self, waiting):
        """This rank's share of whole batches: a `Batch` by number, from fields in a checkpoint."""
        start, end, _ = self.mine.indices(self.prompts_per_step)
        rows = slice(start * self.group_size, end * self.group_size)
        batches = {}
        for fields in waiting:
            mine = {key: v[rows] if isinstance(v, list) else v for key, v in fields.items()}
            batches[fields["number"]] = Batch(**mine)
        return batches

    def sample(self, sampler, numbers):
        """Sample the batches `numbers`, all of the version that `sampler` holds.

        Yields each when it is complete; read it to the end.
        """
        problems_of = {}
        requests = []
        for k in numbers:
            problems = problems_of_batch(k, len(self.prompts), self.prompts_per_step, self.seed)
            problems_of[k] = problems[self.mine]
            prompts = [self.prompts[problem] for problem in problems_of[k]]
            asked = self.problems and [self.problems[problem] for problem in problems_of[k]]
            requests.append((prompts, self.seeds(k)[self.mine], asked))
        started, started_at = time.perf_counter(), time.time()
        sampled = sampler.sample_many(requests, self.group_size)
        for k, samples in zip(numbers, sampled, strict=True):
            problems = [problem for problem in problems_of[k] for _ in range(self.group_size)]
            yield Batch(
                number=k,
                version=self.version(k),
                group_size=self.group_size,
                problems=problems,
                prompts=[self.prompts[problem] for problem in problems],
                metrics={
                    "time/sample": time.perf_counter() - started,
                    "time/sample_started_at": started_at,
                },
                **vars(samples),
            )
            started, started_at = time.perf_counter(), time.time()
