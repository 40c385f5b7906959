"""Sampling beside training: the sampler in a process of its own, while the trainer trains on
earlier batches.

trainer → sampler    weights, in shared memory, and orders: sample batches, or answer prompts
greedily
sampler → trainer    the batches and answers, in the order they were asked for, each as soon as it
is complete
sampler → trainer    a heartbeat: a counter in shared memory, one up per decoded token
"""

import contextlib
import os
import queue
import re
import shutil
import signal
import threading
import traceback
from multiprocessing import parent_process
from multiprocessing.connection import wait
from unittest.mock import patch

import torch

from common.commandline import STOP_SIGNALS, BadInput, RunStopped, progress
from common.distributed import gather, gather_batch, whole
from common.sampling import Batch
from common.sampling.verify import deliver, describe, parameters_from, sampler_mismatch

START_UP_SECONDS = 600  # for loading the model; there is no heartbeat before the first token


class OverlappedRollouts:
    """Delivers the batches of `rollouts.SerialRollouts` from a process that samples while the
    trainer trains.

    A context manager: the process runs inside the context, and ends with the trainer, however that
    ends. It gets the variables in `environment`, and calls `make_sampler` (picklable), which
    returns a `Sampler` with this `temperature` and `precision`. If `verified`, that one copies the
    weights, and must pass `verify.deliver`. Methods raise `RunStopped` if the process has died, or
    decodes nothing for `timeout` seconds; `BadInput` if no sampler can start.
    """

    def __init__(
        self,
        model,
        make_sampler,
        plan,
        temperature,
        precision,
        timeout,
        verified=False,
        environment=None,
    ):
        self.model, self.make_sampler, self.plan = model, make_sampler, plan
        self.temperature, self.precision = temperature, precision
        self.timeout, self.verified, self.environment = timeout, verified, environment or {}
        # Version v is needed until its last batch, v + O + I, has been trained on. After update j,
        # those are the multiples of I above j − O − I and up to j: at most ceil(O / I) + 1. One
        # more slot is for evaluation.
        self.evaluation_slot = -(-plan.sync_offset // plan.sync_interval) + 1
        self.weights = SharedWeights(model, self.evaluation_slot + 1)
        self.slot_of = {}  # version: its slot, for the versions still needed
        self.published = -1  # the newest version the sampler has been told of
        self.last_update = -1  # that the model's weights are after
        self.last_arrived = 0
        self.waiting = {}  # batches that have arrived but not been trained on, by number

    def __enter__(self):
        context = torch.multiprocessing.get_context(
            "spawn"
        )  # a fork would inherit thread pools and locks in any state
        self.connection, its_end = context.Pipe()
        arguments = (its_end, self.weights, self.make_sampler, self.plan)
        self.process = context.Process(
            target=run_sampler, args=arguments, name="sampler", daemon=True
        )
        # No warning about semaphores that a killed engine leaves. Ctrl-C reaches both processes;
        # only the trainer acts.
        environment = {"PYTHONWARNINGS": "ignore:resource_tracker", **self.environment}
        with contextlib.ExitStack() as restored, patch.dict(os.environ, environment):
            for number in STOP_SIGNALS:
                restored.callback(signal.signal, number, signal.signal(number, signal.SIG_IGN))
            self.process.start()
        its_end.close()
        # A thread empties the pipe, so that the sampler need not wait while the trainer is busy.
        self.inbox = queue.SimpleQueue()
        threading.Thread(target=_read_into, args=(self.inbox, self.connection), daemon=True).start()
        for version in sorted(self.slot_of):  # of a resumed run
            if self.plan.batches_of(version)[-1] > self.last_arrived:
                with parameters_from(
                    self.model, self.weights.tensors(self.slot_of[version]).items()
                ):
                    self._order_batches(version)
        return self

    def __exit__(self, *exception):
        self.process.kill()  # what it is sampling now can be sampled again
        self.process.join()
        self.connection.close()

    def next(self, step):
        """The batch of step `step`, sampled with weights version(step). Blocks until it is there.
        """
        if self.published < 0:  # not before: an evaluation of the initial weights comes first
            self.publish(0)
        version = self.plan.version(step)
        if version > self.published:
            raise RuntimeError(
                f"batch {step} needs version {version}, but the newest is {self.published}"
            )
        while (
            step not in self.waiting or not self.inbox.empty()
        ):  # a failure counts even if the batch is already here
            self._accept(self._receive())
        batch = self.waiting.pop(step)
        if self.plan.shows_mismatch_only_now(step):
            with parameters_from(self.model, self.weights.tensors(self.slot_of[version]).items()):
                batch.metrics |= sampler_mismatch(
                    self.model, self.temperature, self.precision, batch
                )
        return batch

    def publish(self, update):
        """The model's weights are now those after `update`: hand them over if that is a version of
        the schedule.
        """
        self.last_update = update
        for version in [v for v in self.slot_of if self.plan.batches_of(v)[-1] <= update]:
            del self.slot_of[version]  # all its batches have been trained on
        if update % self.plan.sync_interval == 0:
            slot = min(set(range(self.evaluation_slot)) - set(self.slot_of.values()))
            self.weights.write(slot, update, self.model)
            self.slot_of[update], self.published = slot, update
            self._order_batches(update)

    def greedy(self, prompts):
        """`Sampler.greedy` with the model's present weights, after the batches that have been
        ordered.
        """
        self.weights.write(self.evaluation_slot, -1, self.model)
        self._order(self.evaluation_slot, -1, prompts=prompts)
        while isinstance(message := self._receive(), Batch):
            self._accept(message)
        return message

    def state_dict(self):
        """What a checkpoint needs besides the live weights: batches not yet trained on, weights of
        those to come.
        """
        while not self.inbox.empty():
            message = self.inbox.get()
            if not isinstance(
                message, Batch
            ):  # a failure, which a checkpoint can do without: `next` reports it
                self.inbox.put(message)
                break
            self._accept(message)
        weights = {}
        for (
            version,
            slot,
        ) in (
            self.slot_of.items()
        ):  # cloned: with a view, torch.save would write all memory it lies in
            tensors = (
                self.weights.tensors(slot) if version < self.last_update else {}
            )  # else they are the model's own
            weights[version] = {name: tensor.clone() for name, tensor in tensors.items()}
        last_arrived = min(gather(self.last_arrived))  # on all ranks
        waiting = [
            vars(gather_batch(batch)[0])
            for k, batch in sorted(self.waiting.items())
            if k <= last_arrived
        ]
        return {
            "waiting": waiting,
            "last_arrived": last_arrived,
            "published": self.published,
            "weights": weights,
        }

    def load_state_dict(self, state):
        if "published" not in state:
            raise BadInput(
                "--resume: this run sampled in turns with training and has to go on like that (--serial)."
            )
        self.waiting = self.plan.share_of(state["waiting"])
        self.last_arrived, self.published = state["last_arrived"], state["published"]
        for slot, (version, tensors) in enumerate(state["weights"].items()):
            self.weights.write(slot, version, self.model)  # which has been loaded before
            for name, tensor in tensors.items():
                self.weights.tensors(slot)[name].copy_(tensor)
            self.slot_of[version] = slot

    def _order_batches(self, version):
        numbers = [k for k in self.plan.batches_of(version) if k > self.last_arrived]
        self._order(self.slot_of[version], version, numbers=numbers)

    def _order(self, slot, version, **work):
        manifest = describe(self.model, version, self.precision) if self.verified else None
        with contextlib.suppress(OSError):  # the process has died; `_receive` will report it
            self.connection.send((slot, version, manifest, work))

    def _receive(self):
        """The sampler's next batch or answers, or the error it ended with; waits as long as the
        heart beats.
        """
        with progress(None, self._its_work()) as bar:
            message = self._next_message(bar)
        if isinstance(message, Exception):
            raise message
        if message is None:
            self.process.join(timeout=5)
            code = f"exit code {self.process.exitcode}; -9 is what running out of memory looks like"
            raise RunStopped(
                f"The sampler's process died ({code}) while {self._its_work()}: continue with --resume."
            )
        if isinstance(message, str):
            raise RunStopped(f"The sampler's process failed while {self._its_work()}: {message}")
        return message

    def _next_message(self, bar):
        beat, silent = self.weights.heartbeat.item(), 0.0
        while True:
            with contextlib.suppress(queue.Empty):
                return self.inbox.get(timeout=1.0)
            before, beat = beat, self.weights.heartbeat.item()
            bar.update(beat - before)
            silent = silent + 1.0 if beat == before else 0.0
            if silent >= (self.timeout if beat else max(self.timeout, START_UP_SECONDS)):
                what = f"The sampler's process has not decoded a token for {silent:g} s while {self._its_work()}"
                raise RunStopped(
                    f"{what}: continue with --resume, and more --sampler-timeout if it is only slow."
                )

    def _accept(self, batch):
        self.waiting[batch.number], self.last_arrived = batch, batch.number

    def _its_work(self):
        k = self.last_arrived + 1
        if self.plan.version(k) <= self.published:
            return f"sampling batch {k} with weights of version {self.plan.version(k)}"
        return f"waiting for weights of version {self.plan.version(k)} for batch {k}"


def run_sampler(connection, weights, make_sampler, plan):
    """The sampler's process: work off the trainer's orders until the trainer is gone."""
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    for name in [
        n
        for n in os.environ
        if re.match(r"TORCHELASTIC_|MASTER_|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_)", n)
    ]:
        del os.environ[name]  # this process is no rank, and its engine must not take it for one
    try:
        sampler = make_sampler()
        sampler.heartbeat = weights.heartbeat
        while True:
            slot, version, manifest, work = connection.recv()
            metrics, tensors = {}, weights.tensors(slot)
            if manifest:
                metrics = deliver(sampler, tensors, manifest)
            else:
                sampler.use_weights(tensors)
            if "prompts" in work:
                connection.send(sampler.greedy(work["prompts"]))
                continue
            for batch in plan.sample(sampler, work["numbers"]):
                if not batch.version == version == (held := weights.versions[slot].item()):
                    raise RuntimeError(
                        f"batch {batch.number} needs version {batch.version}, not {version}, {held}"
                    )
                batch.metrics |= metrics
                metrics = {}  # the sync's metrics go with the first batch of a version
                connection.send(batch)
    except (EOFError, ConnectionError):
        return  # the trainer is gone
    except (BadInput, RunStopped) as error:
        connection.send(error)
    except Exception as error:
        traceback.print_exc()
        connection.send(f"{type(error).__name__}: {error}")
    _leave_with_parent()  # not before: the trainer should find the message, not a dead process


class SharedWeights:
    """`num_slots` copies of a model's parameters, float32, in shared memory. Raises `BadInput` if
    that is too small.
    """

    def __init__(self, model, num_slots):
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        # Tensors start at multiples of 64 bytes, as PyTorch's own do: elsewhere vector code may
        # round differently.
        self.sizes = [-(-shape.numel() // 16) * 16 for shape in self.shapes.values()]
        copies = num_slots * int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # every rank has its own
        needed, free = 4 * copies * sum(self.sizes), shutil.disk_usage("/dev/shm").free
        if needed > free:  # writing to memory that is not there would end in a bus error
            sizes = f"{needed / 2**20:.0f} MiB of shared memory for weights, but /dev/shm has {free / 2**20:.0f} MiB"
            raise BadInput(
                f"The sampler's process takes {sizes}: make room (docker run --shm-size), or give --serial."
            )
        self.memory = [torch.empty(sum(self.sizes)).share_memory_() for _ in range(num_slots)]
        self.versions = torch.full((num_slots,), -1).share_memory_()  # that each slot holds
        self.heartbeat = torch.zeros(
            1, dtype=torch.int64
        ).share_memory_()  # counts what the sampler has decoded

    def tensors(self, slot):
        """The slot's tensors by parameter name: views of the shared memory."""
        parts = zip(self.shapes.items(), self.memory[slot].split(self.sizes), strict=True)
        return {name: part[: shape.numel()].view(shape) for (name, shape), part in parts}

    @torch.no_grad()
    def write(self, slot, version, model):
        """Copy the model's parameters into a slot that nobody reads."""
        tensors = self.tensors(slot)
        for name, parameter in model.named_parameters():
            tensors[name].copy_(whole(parameter))
        self.versions[slot] = version


def _read_into(inbox, connection):
    """Put every message into the queue, and None when there can be no more."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            inbox.put(connection.recv())
    inbox.put(None)


def _leave_with_parent():
    wait([parent_process().sentinel])
    os._exit(1)
