"""Sampling and training in turns, in one process."""

from common.distributed import gather_batch
from common.errors import BadInput
from common.sampling.verify import deliver, describe, sampler_mismatch
from common.weights import weights_of


class SerialRollouts:
    """Samples when the trainer asks for a batch, with the weights that the schedule names.

    Every batch must be sampled while the trainer's model is its version: `next` samples all batches
    of a new version at once, before the trainer moves on. The `Sampler` uses the trainer's model
    itself or, if `verified`, is an engine with a copy of the weights, which are delivered and
    verified each time. An engine may share the trainer's GPU, and sleeps while the trainer works.
    A context manager, like `OverlappedRollouts`.
    """

    def __init__(self, model, sampler, plan, verified=False):
        self.model = model
        self.sampler = sampler
        self.plan = plan
        self.verified = verified
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
            self._sample(numbers)
        self.sampler.sleep()  # it may be awake after an evaluation
        return self.waiting.pop(step)

    def publish(self, update):
        """The model's weights are now those after `update`."""
        self.version = update

    def drain(self):
        """Nothing is sampled while the trainer works."""

    def greedy(self, prompts, problems=None):
        """`Sampler.greedy` with the model's present weights.

        An engine stays awake: if the next batch comes from the same weights, it has them.
        """
        self._hand_over()
        return self.sampler.greedy(prompts, problems)

    def state_dict(self):
        """What a checkpoint needs besides the live weights: the batches sampled ahead."""
        ahead = [self.waiting[k] for k in sorted(self.waiting)]
        return {
            "version": self.version,
            "last_sampled": self.last_sampled,
            "waiting": [vars(gather_batch(batch)) for batch in ahead],
        }

    def load_state_dict(self, state, model):
        """Go on from this state; `model` has the weights of the same checkpoint."""
        if "last_sampled" not in state:
            what = "this run sampled in a process of its own"
            raise BadInput(f"--resume: {what} and has to go on like that.")
        self.version = state["version"]
        self.last_sampled = state["last_sampled"]
        self.waiting = self.plan.share_of(state["waiting"])

    def _sample(self, numbers):
        if self.plan.version(numbers[0]) != self.version:
            what = f"batch {numbers[0]} needs another version than the model's"
            raise RuntimeError(f"{what}, {self.version}")
        metrics = self._hand_over()
        batches = list(self.plan.sample(self.sampler, numbers))
        self.sampler.sleep()  # before the trainer computes anything: they may share a GPU
        for batch in batches:
            if self.plan.shows_mismatch_only_now(batch.number):
                metrics |= sampler_mismatch(
                    self.model, self.sampler.temperature, self.sampler.precision, batch
                )
            batch.metrics |= metrics
            metrics = {}
            self.waiting[batch.number] = batch
            self.last_sampled = batch.number

    def _hand_over(self):
        """Deliver the model's weights to an engine that has a copy; metrics of the sync."""
        if not self.verified:
            return {}
        manifest = describe(self.model, self.version, self.sampler.precision)
        return deliver(self.sampler, weights_of(self.model), manifest)
