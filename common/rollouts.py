"""Batches of rollouts, drawn in the order and with the weights that the schedule names."""

import time
from dataclasses import dataclass

import numpy as np
import torch

from common.batching import collate
from common.errors import BadInput
from common.interrupts import stop_if_hung
from common.logprobs import token_logprobs
from common.randomness import derive_seed
from common.schedule import batches_of_version, version_of_batch
from common.tasks import grade
from common.weight_sync import deliver


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
    measured: dict[str, float]
    """to be logged with its step: `sampler_mismatch` where it is due, and what an engine's sync took"""
    sample_started_at: float
    """when the sampler began with it, Unix time in seconds"""
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


@dataclass
class RolloutPlan:
    """Everything about the batches but the weights: prompts, schedule, random streams. Batch k follows from k alone."""

    prompt_ids: list[list[int]]
    """per training problem, its prompt as token ids"""
    prompts_per_step: int
    """P"""
    group_size: int
    """G"""
    sync_interval: int
    """I"""
    sync_offset: int
    """O"""
    seed: int

    def version(self, k):
        return version_of_batch(k, self.sync_interval, self.sync_offset)

    def batches_of(self, version):
        """Numbers of the batches that weights `version` draw, a range; also those past the last step of this run.

        By the schedule alone: a run that is extended later must not differ from one that was long from the start.
        """
        return batches_of_version(version, self.sync_interval, self.sync_offset)

    def mismatch_is_due(self, k):
        """Whether batch k shows, and no training step will, if sampler and trainer agree on log-probs.

        They must agree where both hold the same weights. A batch with lag 0 shows it in training; where there is none,
        the first batch of each version has to be looked at with the weights that drew it.
        """
        return self.version(k) < k - 1 and k == self.batches_of(self.version(k))[0]

    def draw(self, sampler, numbers):
        """Draw the batches `numbers` with the weights that `sampler` holds, which must be those of their version.

        Yields each `Batch` as soon as it is complete; to be read to the end.
        """
        problems_of = {k: problems_of_batch(k, len(self.prompt_ids), self.prompts_per_step, self.seed) for k in numbers}
        prompts_of = {k: [self.prompt_ids[problem] for problem in problems] for k, problems in problems_of.items()}
        asked = [(prompts_of[k], derive_seed(self.seed, "sample", k)) for k in numbers]
        started, started_at = time.perf_counter(), time.time()
        for k, samples in zip(numbers, sampler.sample_many(asked, self.group_size), strict=True):
            now, now_at = time.perf_counter(), time.time()
            yield Batch(
                number=k,
                version=self.version(k),
                problems=problems_of[k],
                prompts=[prompt for prompt in prompts_of[k] for _ in range(self.group_size)],
                responses=samples.responses,
                logprobs=samples.logprobs,
                truncated=samples.truncated,
                measured={},
                sample_started_at=started_at,
                sample_seconds=now - started,
            )
            started, started_at = now, now_at


class SerialRollouts:
    """Sampling and training take turns in this process.

    Every batch must be drawn while the trainer's live weights are the version that the schedule names: `next` draws all
    batches of a new version at once, before the trainer moves on. `sampler_process.OverlappedRollouts` delivers the
    same batches, from a process of its own.

    Args:
        sampler: a `samplers.Sampler`, on the trainer's weights themselves unless `describe` is given.
        plan: a `RolloutPlan`.
        measure_mismatch: `sampler_mismatch` but for its last argument, the batch.
        timeout: seconds without a decoded token after which the sampler counts as hung.
        model: the trainer's, for an engine that holds a copy of its weights; it sleeps but while it draws.
        describe: model, version → `weight_sync.Manifest`, by which the engine proves every copy before it draws. (Here
            the probe is what proves; checksums of the same tensors, in one process, show little.)
    """

    def __init__(self, sampler, plan, measure_mismatch, timeout, model=None, describe=None):
        self.sampler = sampler
        self.plan = plan
        self.measure_mismatch = measure_mismatch
        self.timeout = timeout
        self.model = model
        self.describe = describe
        self.version = 0  # of the trainer's live weights
        self.last_drawn = 0
        self.waiting = {}  # batches drawn but not yet trained on, by number

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def next(self, step):
        """The batch of step `step`, drawn with weights of version(step). Blocks until it is there."""
        newest = self.version - self.version % self.plan.sync_interval
        if due := range(self.last_drawn + 1, self.plan.batches_of(newest)[-1] + 1):
            self._draw(due)
        return self.waiting.pop(step)

    def publish(self, update):
        """Tell the sampler that the live weights are now those after `update`."""
        self.version = update

    def state(self):
        """What a checkpoint needs besides the live weights: the batches drawn ahead."""
        waiting = [vars(batch) for batch in self.waiting.values()]
        return {"version": self.version, "last_drawn": self.last_drawn, "waiting": waiting}

    def load_state(self, state):
        if "version" not in state:
            raise BadInput(
                "--resume: this run sampled in a process of its own, on a CPU or another GPU, and has to go on there."
            )
        self.version, self.last_drawn = state["version"], state["last_drawn"]
        self.waiting = {fields["number"]: Batch(**fields) for fields in state["waiting"]}

    def _draw(self, numbers):
        """Draw batches of one version, that of the live weights."""
        if self.plan.version(numbers[0]) != self.version:
            raise RuntimeError(
                f"Batch {numbers[0]} is due from weights of version {self.plan.version(numbers[0])}, but the model "
                f"holds {self.version}."
            )
        measured = {}
        with stop_if_hung(self.sampler.heartbeat, self.timeout):
            if self.describe:
                manifest = self.describe(self.model, self.version)
                measured = deliver(self.sampler, dict(self.model.named_parameters()), manifest)
            drawn = list(self.plan.draw(self.sampler, numbers))
            if self.describe:
                self.sampler.sleep()
        drawn[0].measured = measured
        for batch in drawn:
            if self.plan.mismatch_is_due(batch.number):
                batch.measured |= self.measure_mismatch(batch)
            self.waiting[batch.number] = batch
            self.last_drawn = batch.number


@torch.no_grad()
def sampler_mismatch(model, pad_id, temperature, precision, batch, num_sequences=8):
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
