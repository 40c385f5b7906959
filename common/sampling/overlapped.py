"""Sampling beside training: the sampler works in a process of its own while the trainer trains.

trainer → sampler    weights, in shared memory, and orders: sample batches, or answer prompts
sampler → trainer    batches and answers, in the order of the orders, each as soon as it is complete
sampler → trainer    a heartbeat: a counter in shared memory, which grows while it works
"""

import contextlib
import os
import queue
import signal
import threading
from multiprocessing import resource_tracker
from multiprocessing.reduction import ForkingPickler
from unittest.mock import patch

import torch

from common.distributed import gather, gather_batch
from common.errors import BadInput, RunStopped
from common.interrupt import STOP_SIGNALS
from common.progress import progress
from common.sampling import Batch
from common.sampling.process import run_sampler
from common.sampling.shared_weights import share_weights
from common.sampling.verify import describe, sampler_mismatch
from common.weights import parameters_from, weights_of

# For starting an engine and testing it; there is no heartbeat before the first batch.
START_UP_SECONDS = 600
START_UP_SECONDS_PER_GB = 60  # of float32 weights, besides: about 25 minutes more for 7B


class OverlappedRollouts:
    """Delivers the batches of `SerialRollouts`, sampled while the trainer trains.

    A context manager: the process runs inside the context, and ends with the trainer, however that
    ends. It gets the variables in `environment`, and calls `make_sampler` (picklable), which
    returns a `Sampler` with this `temperature` and `precision`. If `verified`, that one copies the
    weights, and must pass `verify.deliver`. Methods raise `RunStopped` if the process has died, or
    decodes nothing for `timeout` seconds; `BadInput` if no sampler can start.
    """

    def __init__(
        self, model, make_sampler, plan, temperature, precision, timeout,
        verified=False, environment=None,
    ):  # fmt: skip
        self.model = model
        self.make_sampler = make_sampler
        self.plan = plan
        self.temperature = temperature
        self.precision = precision
        self.timeout = timeout
        self.verified = verified
        self.environment = environment or {}
        # Version v is needed until its last batch, v + O + I, has been trained on. After update j,
        # those are the multiples of I above j − O − I and up to j: at most ceil(O / I) + 1. One
        # more slot is for evaluation.
        self.evaluation_slot = -(-plan.sync_offset // plan.sync_interval) + 1
        self.weights = share_weights(model, self.evaluation_slot + 1)
        self.slot_of = {}  # version: its slot, for the versions still needed
        self.to_order = []  # versions of a resumed run that the sampler has not been told of
        self.published = -1  # the newest version the sampler has been told of
        self.last_update = -1  # that the model's weights are after
        self.last_arrived = 0
        self.waiting = {}  # batches that have arrived but not been trained on, by number

    def __enter__(self):
        # A fork would inherit thread pools and locks in any state.
        context = torch.multiprocessing.get_context("spawn")
        self.connection, its_end = context.Pipe()
        # Little is handed over here, and the rest is sent: a start whose arguments do not fit into
        # a pipe waits for the process to read them, and for ever if it dies before.
        arguments = (its_end, self.weights.memory)
        self.process = context.Process(
            target=run_sampler, args=arguments, name="sampler", daemon=True
        )
        # No warning about semaphores that a killed engine leaves
        environment = {"PYTHONWARNINGS": "ignore:resource_tracker", **self.environment}
        with patch.dict(os.environ, environment), _signals_wait():
            self.process.start()
        its_end.close()
        # Threads fill and empty the pipe, so that neither process need wait for the other to read.
        self.inbox, self.outbox = queue.SimpleQueue(), queue.SimpleQueue()
        for work, box in ((_read_into, self.inbox), (_write_from, self.outbox)):
            threading.Thread(target=work, args=(box, self.connection), daemon=True).start()
        self._send((self.weights.shapes, self.make_sampler, self.plan))
        self._order_what_a_resumed_run_needs()
        return self

    def __exit__(self, *exception):
        self.process.kill()  # what it is sampling now can be sampled again
        self.process.join()
        self.outbox.put(None)
        self.connection.close()

    def next(self, step):
        """The batch of step `step`, sampled with weights version(step). Waits until it is there."""
        self._order_what_a_resumed_run_needs()
        if self.published < 0:  # not before: an evaluation of the initial weights comes first
            self.publish(0)
        version = self.plan.version(step)
        if version > self.published:
            newest = f"the newest is {self.published}"
            raise RuntimeError(f"batch {step} needs version {version}, but {newest}")
        # A failure counts even if the batch is already here.
        while step not in self.waiting or not self.inbox.empty():
            self._accept(self._receive())
        batch = self.waiting.pop(step)
        if self.plan.shows_mismatch_only_now(step):
            with self._model_at(version):
                batch.metrics |= sampler_mismatch(
                    self.model, self.temperature, self.precision, batch
                )
        return batch

    def publish(self, update):
        """The model's weights are now those after `update`.

        Hands them over if that is a version of the schedule.
        """
        self.last_update = update
        for version in list(self.slot_of):
            if self.plan.batches_of(version)[-1] <= update:  # all have been trained on
                del self.slot_of[version]
        if update % self.plan.sync_interval == 0:
            slot = min(set(range(self.evaluation_slot)) - set(self.slot_of.values()))
            self.weights.write(slot, update, self.model)
            self.slot_of[update] = slot
            self.published = update
            self._order_batches(update)

    def drain(self):
        """Wait for all batches ordered so far; an evaluation comes after them."""
        if self.published >= 0:
            last_ordered = self.plan.batches_of(self.published)[-1]
            while self.last_arrived < last_ordered:
                self._accept(self._receive())

    def greedy(self, prompts, problems=None):
        """`Sampler.greedy` with the model's present weights, after the batches ordered so far."""
        self.weights.write(self.evaluation_slot, -1, self.model)
        self._order(self.evaluation_slot, -1, prompts=prompts, problems=problems)
        while isinstance(message := self._receive(), Batch):
            self._accept(message)
        return message

    def state_dict(self):
        """What a checkpoint needs besides the live weights.

        These are the batches not yet trained on, and weights of batches to come.
        """
        while not self.inbox.empty():
            message = self.inbox.get()
            if not isinstance(message, Batch):
                self.inbox.put(message)  # a failure, which `next` reports
                break
            self._accept(message)
        weights = {}
        for version, slot in self.slot_of.items():
            weights[version] = None  # the model's own, or:
            if version < self.last_update:
                # Cloned: with a view, torch.save would write all memory that it lies in.
                tensors = self.weights.tensors(slot)
                weights[version] = {name: tensor.clone() for name, tensor in tensors.items()}
        last_arrived = min(gather(self.last_arrived))  # on all ranks
        arrived = [self.waiting[k] for k in sorted(self.waiting) if k <= last_arrived]
        return {
            "waiting": [vars(gather_batch(batch)) for batch in arrived],
            "last_arrived": last_arrived,
            "published": self.published,
            "weights": weights,
        }

    def load_state_dict(self, state, model):
        """Go on from this state; `model` has the weights of the same checkpoint."""
        if "published" not in state:
            what = "this run sampled in turns with training"
            raise BadInput(f"--resume: {what} and has to go on like that (--serial).")
        self.waiting = self.plan.share_of(state["waiting"])
        self.last_arrived = state["last_arrived"]
        self.published = state["published"]
        for slot, (version, tensors) in enumerate(state["weights"].items()):
            self.weights.write_tensors(slot, version, tensors or weights_of(model))
            self.slot_of[version] = slot
        self.to_order = sorted(self.slot_of)

    def _order_what_a_resumed_run_needs(self):
        while self.to_order:
            version = self.to_order.pop(0)
            if self.plan.batches_of(version)[-1] > self.last_arrived:
                with self._model_at(version):
                    self._order_batches(version)

    def _model_at(self, version):
        """Context in which the trainer's model has the weights of a version still needed."""
        tensors = self.weights.tensors(self.slot_of[version])
        return parameters_from(self.model, tensors.items())

    def _order_batches(self, version):
        numbers = [k for k in self.plan.batches_of(version) if k > self.last_arrived]
        self._order(self.slot_of[version], version, numbers=numbers)

    def _order(self, slot, version, **work):
        manifest = describe(self.model, version, self.precision) if self.verified else None
        self._send((slot, version, manifest, work))

    def _send(self, message):
        self.outbox.put(ForkingPickler.dumps(message))  # here, where it can fail

    def _receive(self):
        """The sampler's next batch or answers, or the error it ended with.

        Waits as long as the heart beats.
        """
        with progress(None, self._its_work()) as bar:
            message = self._next_message(bar)
        if isinstance(message, Exception):
            raise message
        if message is None:
            self.process.join(timeout=5)
            code = f"exit code {self.process.exitcode}; -9 is what running out of memory looks like"
            what = f"The sampler's process died ({code}) while {self._its_work()}"
            raise RunStopped(f"{what}: continue with --resume.")
        if isinstance(message, str):
            raise RunStopped(f"The sampler's process failed while {self._its_work()}: {message}")
        return message

    def _next_message(self, bar):
        beat, silent = self.weights.heartbeat.item(), 0.0
        gigabytes = 4 * sum(self.weights.sizes) // 10**9
        start_up = START_UP_SECONDS + START_UP_SECONDS_PER_GB * gigabytes
        while True:
            with contextlib.suppress(queue.Empty):
                return self.inbox.get(timeout=1.0)
            before, beat = beat, self.weights.heartbeat.item()
            bar.update(beat - before)
            silent = silent + 1.0 if beat == before else 0.0
            if silent >= (self.timeout if beat else max(self.timeout, start_up)):
                what = f"The sampler's process has not decoded a token for {silent:g} s"
                how = "continue with --resume, and more --sampler-timeout if it is only slow"
                raise RunStopped(f"{what} while {self._its_work()}: {how}.")

    def _accept(self, batch):
        self.waiting[batch.number] = batch
        self.last_arrived = batch.number

    def _its_work(self):
        k = self.last_arrived + 1
        if self.plan.version(k) <= self.published:
            return f"sampling batch {k} with weights of version {self.plan.version(k)}"
        return f"waiting for weights of version {self.plan.version(k)} for batch {k}"


@contextlib.contextmanager
def _signals_wait():
    """Context in which stop signals wait, also in processes that start in it.

    Ctrl-C reaches the trainer's process and the sampler's, and only the trainer acts.
    """
    resource_tracker.ensure_running()  # its own start would let signals through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _read_into(inbox, connection):
    """Put every message into the queue, and None when there can be no more."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            inbox.put(connection.recv())
    inbox.put(None)


def _write_from(outbox, connection):
    """Send what comes out of the queue, until that is None."""
    with contextlib.suppress(OSError):  # the process has died; `_receive` will report it
        while (message := outbox.get()) is not None:
            connection.send_bytes(message)
