"""Batches of rollouts, drawn in the order and with the weights that the schedule names."""

import time
from dataclasses import dataclass

import numpy as np
import torch

from common.batching import collate
from common.logprobs import token_logprobs
from common.randomness import derive_seed
from common.schedule import last_batch_of_version, version_of_batch
from common.tasks import grade


@dataclass
class Batch:
    """What the sampler drew for one step: P prompts, G responses each, B = P·G sequences in prompt order."""

    number: int
    """k: the step that trains on it"""
    version: int
    """the weights that drew it"""
    problems: list[int]
    """P indices into the task's training problems"""
    prompts: list[list[int]]
    """B lists of token ids (a group's prompt G times)"""
    responses: list[list[int]]
    """B lists of token ids, EOS included where there was one"""
    logprobs: list[list[float]]
    """B lists: log-probability of each response token under the policy that drew it"""
    truncated: list[bool]
    """B: cut at the token limit"""
    sample_seconds: float
    """time the sampler spent on it"""


def problem_order(num_problems, epoch, seed):
    """A permutation of the training problems for one pass over them."""
    return np.random.default_rng(derive_seed(seed, "order", epoch)).permutation(num_problems)


def problems_of_batch(k, num_problems, prompts_per_step, seed):
    """Indices of the P problems of batch `k` (from 1): consecutive pieces of one shuffled pass after another."""
    positions = range((k - 1) * prompts_per_step, k * prompts_per_step)
    orders = {epoch: problem_order(num_problems, epoch, seed) for epoch in {p // num_problems for p in positions}}
    return [int(orders[position // num_problems][position % num_problems]) for position in positions]


class SerialRollouts:
    """Sampling and training take turns in this process, on one and the same set of weights.

    Because the sampler reads the trainer's live weights, every batch must be drawn while those weights are the version
    that the schedule names: `next` draws all batches of a new version at once, before the trainer moves on.

    Args:
        sampler: a `samplers.Sampler` on the trainer's weights.
        prompt_ids: per training problem, its prompt as token ids.
    """

    def __init__(self, sampler, prompt_ids, prompts_per_step, group_size, sync_interval, sync_offset, seed):
        self.sampler = sampler
        self.prompt_ids = prompt_ids
        self.prompts_per_step = prompts_per_step
        self.group_size = group_size
        self.schedule = (sync_interval, sync_offset)
        self.seed = seed
        self.version = 0  # of the trainer's live weights
        self.last_drawn = 0
        self.waiting = {}  # batches drawn but not yet trained on, by number

    def next(self, step):
        """The batch of step `step`, drawn with weights of version(step). Blocks until it is there."""
        # By the schedule alone, even past the last step of this run: a run that is extended later must not differ.
        while self.last_drawn < last_batch_of_version(self._newest_version(), *self.schedule):
            self._draw(self.last_drawn + 1)
        batch = self.waiting.pop(step)
        expected = version_of_batch(step, *self.schedule)
        if batch.version != expected:
            raise RuntimeError(f"Batch {step} was drawn with weights {batch.version}; the schedule says {expected}.")
        return batch

    def drawn_with(self, version):
        """A batch that was drawn with weights `version` and is still waiting to be trained on, or None."""
        return next((batch for batch in self.waiting.values() if batch.version == version), None)

    def publish(self, update):
        """Tell the sampler that the live weights are now those after `update`."""
        self.version = update

    def state(self):
        """What a checkpoint needs besides the live weights: the batches drawn ahead."""
        waiting = [vars(batch) for batch in self.waiting.values()]
        return {"version": self.version, "last_drawn": self.last_drawn, "waiting": waiting}

    def load_state(self, state):
        self.version, self.last_drawn = state["version"], state["last_drawn"]
        self.waiting = {fields["number"]: Batch(**fields) for fields in state["waiting"]}

    def _newest_version(self):
        return self.version - self.version % self.schedule[0]

    def _draw(self, k):
        version = version_of_batch(k, *self.schedule)
        if version != self.version:
            raise RuntimeError(f"Batch {k} needs weights of version {version}, but version {self.version} is loaded.")
        start = time.perf_counter()
        problems = problems_of_batch(k, len(self.prompt_ids), self.prompts_per_step, self.seed)
        prompts = [self.prompt_ids[problem] for problem in problems]
        samples = self.sampler.sample(prompts, self.group_size, derive_seed(self.seed, "sample", k))
        self.waiting[k] = Batch(
            number=k,
            version=version,
            problems=problems,
            prompts=[prompt for prompt in prompts for _ in range(self.group_size)],
            responses=samples.responses,
            logprobs=samples.logprobs,
            truncated=samples.truncated,
            sample_seconds=time.perf_counter() - start,
        )
        self.last_drawn = k


@torch.no_grad()
def sampler_mismatch(model, batch, pad_id, temperature, precision, num_sequences=8):
    """|log-prob of the trainer − log-prob of the sampler| over the tokens of a batch's first few sequences.

    To be called while the model still holds the weights that drew the batch.
    """
    rows = range(min(num_sequences, len(batch.responses)))
    micro = collate(batch.prompts, batch.responses, batch.logprobs, rows, pad_id, model.device)
    token_args = (micro.inputs_BT, micro.attention_BT, micro.targets_BT, micro.mask_BT)
    logprobs_BT, _ = token_logprobs(model, *token_args, temperature, precision)
    difference_N = (logprobs_BT - micro.sampler_logprobs_BT)[micro.mask_BT].double().abs()
    return {"sampler_mismatch/mean": difference_N.mean().item(), "sampler_mismatch/max": difference_N.max().item()}


def evaluate(sampler, task, tokenizer, problems, prompt_ids):
    """Greedy accuracy and mean response length (tokens) on held-out problems, with the sampler's current weights."""
    started = time.perf_counter()
    samples = sampler.greedy(prompt_ids)
    grades, _ = grade(task, tokenizer, problems, samples.responses)
    return {
        "eval/accuracy": float(np.mean([g.get("accuracy", g["reward"]) for g in grades])),
        "eval/response_length": float(np.mean([len(response) for response in samples.responses])),
        "time/eval": time.perf_counter() - started,
    }
