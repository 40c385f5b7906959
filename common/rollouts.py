"""Where batches come from: sampled in turns with training, or beside it; by transformers or by
vLLM.
"""

import os
import types
from functools import partial

import torch
from transformers.utils.logging import disable_progress_bar

from common.commandline import BadInput
from common.distributed import gather_batch, size
from common.kernels.cpu import use_threads
from common.models import end_of_sequence_ids, load_model
from common.sampling.process import OverlappedRollouts
from common.sampling.transformers import TransformersSampler
from common.sampling.verify import TOLERANCE, deliver, describe, sampler_mismatch
from common.sampling.vllm import KEEP_FREED_MEMORY, make_vllm_sampler


def make_rollouts(
    plan, eval_prompts, model, tokenizer, max_tokens, temperature, precision,
    *, engine, serial, timeout, threads, model_name, revision,
):  # fmt: skip
    """`SerialRollouts` or `OverlappedRollouts`, and PyTorch's number of threads set to match.

    Which of them: see the table in common/README.md, Schedule and lag. Arguments named like options
    are these options. `plan` is a `Plan`, `eval_prompts` are the prompts that `greedy` will get,
    model and tokenizer are the trainer's; `model_name` and `revision` load the model once more in
    another process. Raises `BadInput` if sampling cannot work.
    """
    if plan.prompts_per_step < size():
        raise BadInput(
            f"--prompts-per-step {plan.prompts_per_step} is less than {size()} ranks: raise it."
        )
    verified, cuda = engine == "vllm", model.device.type == "cuda"
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    own_gpu = cuda and verified and torch.cuda.device_count() >= 2 * ranks_here
    in_turns = serial or (plan.sync_interval, plan.sync_offset) == (1, 0) or (cuda and not own_gpu)
    threads = threads or (2 if in_turns and size() == 1 else 1)
    use_threads(threads)
    check_decoding(
        model, plan.prompts + eval_prompts, min(8, max_tokens), temperature, precision, model_name
    )
    generation = (end_of_sequence_ids(model, tokenizer), max_tokens, temperature, precision)
    longest_prompt = max(map(len, plan.prompts + eval_prompts))
    if in_turns and not verified:
        return SerialRollouts(model, TransformersSampler(model, *generation), plan)
    if in_turns:
        if model.device.index and size() == 1:
            raise BadInput(
                f"--device {model.device}: vLLM takes the first GPU; set CUDA_VISIBLE_DEVICES instead."
            )
        sampler = make_vllm_sampler(
            model_name, revision, threads, *generation, longest_prompt, beside=model
        )
        return SerialRollouts(model, sampler, plan, verified)
    environment = KEEP_FREED_MEMORY if verified else {}
    if own_gpu:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(
            map(str, range(torch.cuda.device_count()))
        )
        trainers = range(ranks_here) if size() > 1 else [model.device.index or 0]
        others = [gpu for place, gpu in enumerate(visible.split(",")) if place not in trainers]
        environment = {"CUDA_VISIBLE_DEVICES": others[int(os.environ.get("LOCAL_RANK", 0))]}
    make_sampler = partial(load_sampler, model_name, revision, threads, *generation)
    if verified:
        make_sampler = partial(
            make_vllm_sampler, model_name, revision, threads, *generation, longest_prompt
        )
    return OverlappedRollouts(
        model, make_sampler, plan, temperature, precision, timeout, verified, environment
    )


def check_decoding(model, prompts, num_tokens, temperature, precision, name):
    """Raise `BadInput` unless decoding with a cache and one forward pass give the same log-probs.
    """
    prompts = [
        min(prompts, key=len),
        max(prompts, key=len),
    ]  # decoding pads the shorter on the left, `collate` right
    try:
        samples = TransformersSampler(model, {-1}, num_tokens, temperature, precision).greedy(
            prompts
        )
        batch = types.SimpleNamespace(prompts=prompts, **vars(samples))
        gap = sampler_mismatch(model, temperature, precision, batch)["sampler_mismatch/mean"]
    except Exception as error:  # as varied as models are
        raise BadInput(
            f"--model {name} cannot be sampled from ({error!r}): give another model."
        ) from error
    if not gap <= TOLERANCE[precision]:  # so that NaN fails as well
        what = "there is NaN in it, it changes logits after the head, or its cache does not work"
        raise BadInput(
            f"--model {name}: decoding is {gap:.2g} nats off the forward pass; {what}: give another model."
        )


def load_sampler(name, revision, threads, eos_ids, max_tokens, temperature, precision):
    """A `TransformersSampler` on a model of its own, on the CPU, for a process that samples beside
    training.
    """
    use_threads(threads)
    disable_progress_bar()  # the trainer shows its own
    model = load_model(name, revision, torch.device("cpu"))
    return TransformersSampler(model, eos_ids, max_tokens, temperature, precision)


class SerialRollouts:
    """Sampling and training take turns in this process.

    Every batch must be sampled while the trainer's model is the version that the schedule names:
    `next` samples all batches of a new version at once, before the trainer moves on. The `Sampler`
    uses the trainer's model itself or, if `verified`, is an engine with a copy of the weights,
    which are delivered and verified each time.
    """

    def __init__(self, model, sampler, plan, verified=False):
        self.model, self.sampler, self.plan, self.verified = model, sampler, plan, verified
        self.version = 0  # of the trainer's model
        self.last_sampled = 0
        self.waiting = {}  # batches sampled but not yet trained on, by number

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def next(self, step):
        """The batch of step `step`, sampled with weights version(step)."""
        newest = self.version - self.version % self.plan.sync_interval
        numbers = range(self.last_sampled + 1, self.plan.batches_of(newest)[-1] + 1)
        if numbers:
            if self.plan.version(numbers[0]) != self.version:
                raise RuntimeError(
                    f"batch {numbers[0]} needs another version than the model's, {self.version}"
                )
            metrics = self._hand_over()
            for batch in self.plan.sample(self.sampler, numbers):
                if self.plan.shows_mismatch_only_now(batch.number):
                    metrics |= sampler_mismatch(
                        self.model, self.sampler.temperature, self.sampler.precision, batch
                    )
                batch.metrics |= metrics
                metrics = {}
                self.waiting[batch.number] = batch
                self.last_sampled = batch.number
            self.sampler.sleep()
        return self.waiting.pop(step)

    def publish(self, update):
        """The model's weights are now those after `update`."""
        self.version = update

    def greedy(self, prompts):
        """`Sampler.greedy` with the model's present weights."""
        self._hand_over()
        samples = self.sampler.greedy(prompts)
        self.sampler.sleep()
        return samples

    def state_dict(self):
        """What a checkpoint needs besides the live weights: the batches sampled ahead."""
        waiting = [vars(gather_batch(batch)[0]) for _, batch in sorted(self.waiting.items())]
        return {"version": self.version, "last_sampled": self.last_sampled, "waiting": waiting}

    def load_state_dict(self, state):
        if "last_sampled" not in state:
            raise BadInput(
                "--resume: this run sampled in a process of its own and has to go on like that."
            )
        self.version, self.last_sampled = state["version"], state["last_sampled"]
        self.waiting = self.plan.share_of(state["waiting"])

    def _hand_over(self):
        """Deliver the model's weights to an engine that has a copy; metrics of the sync."""
        if not self.verified:
            return {}
        manifest = describe(self.model, self.version, self.sampler.precision)
        return deliver(self.sampler, dict(self.model.named_parameters()), manifest)
