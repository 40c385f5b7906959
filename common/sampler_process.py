"""Sampling beside training: the sampler in a process of its own, one sync behind or several, as the schedule allows.

The trainer's side is `OverlappedRollouts`, the sampler's `run_sampler`. Three things pass between them:

    trainer → sampler    a version of the weights, in shared memory, and a message that says in which slot
    sampler → trainer    the batches, in order, each as soon as it is drawn
    sampler → trainer    a heartbeat: a counter in shared memory, one up per decoded token

The sampler draws all batches of one version, then waits for the next version. Which batches those are is a matter of
the schedule, so an overlapped run trains on the very batches of a serial one; only the waiting differs.
"""

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import wait

from common.errors import BadInput, RunStopped
from common.rollouts import Batch
from common.schedule import is_due
from common.shared_weights import SharedWeights, parameters_from
from common.weight_sync import deliver

START_UP_SECONDS = 600  # how long the sampler may take to load its model; there is no heartbeat before the first token


class OverlappedRollouts:
    """Delivers what `rollouts.SerialRollouts` would, drawn by a process that samples while the trainer trains.

    A context manager: the process lives inside the context, and no longer than the trainer, however that ends.

    Args:
        model: the trainer's, whose weights are published.
        make_sampler: called without arguments in the new process, returns its `samplers.Sampler`; picklable.
        plan: a `rollouts.RolloutPlan`.
        measure_mismatch: `rollouts.sampler_mismatch` but for its last argument, the batch.
        timeout: seconds without a decoded token, while the trainer waits, after which the sampler counts as hung.
        describe: model, version → `weight_sync.Manifest` of its weights, by which the sampler checks every delivery
            before it draws; None for a sampler whose parameters lie in the shared memory itself.
        environment: variables that the new process gets besides the trainer's.

    Raises `RunStopped` as soon as the process has died, wherever the trainer is at that moment, or hangs; `BadInput`
    where its sampler cannot start.
    """

    def __init__(self, model, make_sampler, plan, measure_mismatch, timeout, describe=None, environment=None):
        self.model = model
        self.make_sampler = make_sampler
        self.plan = plan
        self.measure_mismatch = measure_mismatch
        self.timeout = timeout
        self.describe = describe
        self.environment = environment or {}
        # Version v is needed until its last batch, v + O + I, has been trained on. After update j, those are the
        # multiples of I above j − O − I and up to j: at most ceil(O / I) + 1, so a slot is free whenever one is due.
        self.weights = SharedWeights(model, num_slots=-(-plan.sync_offset // plan.sync_interval) + 1)
        self.slot_of = {}  # version: its slot, for the versions still needed
        self.published = None  # the newest version the sampler has been told of
        self.last_arrived = 0
        self.waiting = {}  # batches that have arrived but not been trained on, by number

    def __enter__(self):
        context = multiprocessing.get_context("spawn")  # a fork would inherit thread pools and locks in any state
        self.connection, its_end = context.Pipe()
        arguments = (its_end, self.weights, self.make_sampler, self.plan)
        self.process = context.Process(target=run_sampler, args=arguments, name="sampler", daemon=True)
        # Ctrl-C reaches every process of the terminal. It is for the trainer: the sampler starts with it ignored.
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
        # The sampler is killed in the end; Python's tracker of shared resources then clears up after it, as it should,
        # but would warn of that below the run's last words.
        warnings = f"{os.environ.get('PYTHONWARNINGS', '')},ignore:resource_tracker".lstrip(",")
        try:
            with _environment({**self.environment, "PYTHONWARNINGS": warnings}):
                self.process.start()
        finally:
            signal.signal(signal.SIGINT, previous)
        its_end.close()
        # A thread reads, so that the trainer never waits in the middle of a message from a sampler that has stopped.
        self.inbox, self.failure = queue.SimpleQueue(), None
        threading.Thread(target=_read_into, args=(self.inbox, self.connection), daemon=True).start()
        self._trainer, self._on_child_before = os.getpid(), signal.signal(signal.SIGCHLD, self._on_child_exit)
        try:
            for version in sorted(self.slot_of):  # of a resumed run, in the order they were published
                # One whose batches have all been drawn is over for the sampler: its slot may be written at any time.
                if self.plan.batches_of(version)[-1] > self.last_arrived:
                    with parameters_from(self.model, self.weights.slots[self.slot_of[version]]):
                        manifest = self.describe and self.describe(self.model, version)
                    self._announce(version, manifest)
            if self.published is None:
                self.publish(0)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception):
        signal.signal(signal.SIGCHLD, self._on_child_before)
        self.process.kill()  # what it is drawing now can be drawn again
        self.process.join()
        self.connection.close()

    def next(self, step):
        """The batch of step `step`, drawn with weights of version(step). Blocks until it is there."""
        version = self.plan.version(step)
        if version > self.published:
            raise RuntimeError(
                f"Batch {step} is due from weights of version {version}, which were never published; the newest is "
                f"{self.published}."
            )
        self._drain()
        # A failure counts at once, though batches may be waiting: no update after weights were found not to be right.
        while step not in self.waiting or self.failure:
            if self.failure:
                raise self.failure
            self._accept(self._receive())
        batch = self.waiting.pop(step)
        if self.plan.mismatch_is_due(step):
            with parameters_from(self.model, self.weights.slots[self.slot_of[version]]):
                batch.measured |= self.measure_mismatch(batch)
        return batch

    def publish(self, update):
        """The model's weights are now those after `update`: hand them over if that is a version of the schedule."""
        for version in [v for v in self.slot_of if self.plan.batches_of(v)[-1] <= update]:
            del self.slot_of[version]  # all its batches have been trained on
        if not is_due(update, self.plan.sync_interval):
            return
        slot = min(set(range(len(self.weights.slots))) - set(self.slot_of.values()))
        self.weights.write(slot, update, self.model)
        self.slot_of[update], self.published = slot, update
        self._announce(update, self.describe and self.describe(self.model, update))

    def state(self):
        """What a checkpoint needs besides the live weights: batches drawn ahead, weights for those still to draw."""
        self._drain()
        return {
            "waiting": [vars(batch) for batch in self.waiting.values()],
            "last_arrived": self.last_arrived,
            "published": self.published,
            # Cloned one by one: of a view, torch.save would write the whole memory it lies in.
            "weights": {
                version: {name: tensor.clone() for name, tensor in self.weights.slots[slot].items()}
                for version, slot in self.slot_of.items()
            },
        }

    def load_state(self, state):
        if "published" not in state:
            raise BadInput(
                "--resume: this run sampled in turns with training, as on a lone GPU, and has to go on there; "
                "CUDA_VISIBLE_DEVICES hides other GPUs."
            )
        self.waiting = {fields["number"]: Batch(**fields) for fields in state["waiting"]}
        self.last_arrived, self.published = state["last_arrived"], state["published"]
        for slot, (version, tensors) in enumerate(state["weights"].items()):
            for name, tensor in tensors.items():
                self.weights.slots[slot][name].copy_(tensor)
            self.weights.versions[slot] = version
            self.slot_of[version] = slot

    def _announce(self, version, manifest):
        still_to_draw = [k for k in self.plan.batches_of(version) if k > self.last_arrived]
        with contextlib.suppress(OSError):  # it died just now; that is said where its batch is missed
            self.connection.send((version, self.slot_of[version], manifest, still_to_draw))

    def _drain(self):
        """Accept whatever has arrived. A failure is kept for `next`: a checkpoint is complete without the sampler."""
        while not self.inbox.empty():
            self._accept(self.inbox.get())

    def _receive(self):
        """Wait for the sampler's next message, but no longer than its heart beats."""
        beat, silent, nap = self.weights.heartbeat.item(), 0.0, min(1.0, self.timeout)
        while True:
            with contextlib.suppress(queue.Empty):
                return self.inbox.get(timeout=nap)
            before, beat = beat, self.weights.heartbeat.item()
            silent = silent + nap if beat == before else 0.0  # naps: time for which we were stopped does not count
            timeout = self.timeout if beat else max(self.timeout, START_UP_SECONDS)
            if silent >= timeout:
                raise RunStopped(
                    f"The sampler's process has not decoded a token for {timeout:g} s while {self._its_work()}: look "
                    "for what blocks it; --resume continues from the last checkpoint, with more --sampler-timeout if "
                    "need be."
                )

    def _accept(self, message):
        """Put a batch with those waiting; keep what else may come as the failure: None for the end, or a reason."""
        if isinstance(message, Batch):
            expected = self.last_arrived + 1
            if (message.number, message.version) != (expected, self.plan.version(expected)):
                raise RuntimeError(f"Batch {message.number} of version {message.version} came, but {expected} is due.")
            self.waiting[message.number] = message
            self.last_arrived = message.number
        elif not self.failure and isinstance(message, BadInput):  # it says all, and that nothing was begun
            self.failure = message
        elif not self.failure:
            reason = f"The sampler's process failed while {self._its_work()}: {message}"
            self.failure = RunStopped(reason) if message else self._death()

    def _its_work(self):
        """What the sampler was to do: its next batch, or its next version if all batches of the newest are drawn."""
        k = self.last_arrived + 1
        if self.plan.version(k) <= self.published:
            return f"drawing batch {k} with weights of version {self.plan.version(k)}"
        return f"waiting for weights of version {self.plan.version(k)} for batch {k}"

    def _on_child_exit(self, signal_number, frame):
        """SIGCHLD, in the middle of whatever the trainer does: it should not train on for minutes without a sampler."""
        if os.getpid() == self._trainer and not self.process.is_alive():  # a fork of the trainer inherits this handler
            signal.signal(signal.SIGCHLD, self._on_child_before)  # once is enough
            raise self._death()

    def _death(self):
        self.process.join(timeout=5)
        return RunStopped(
            f"The sampler's process died (exit code {self.process.exitcode}; -9 is what running out of memory looks "
            f"like) while {self._its_work()}: continue with --resume, from the last checkpoint."
        )


def run_sampler(connection, weights, make_sampler, plan):
    """The sampler's process: draw the batches of each version announced, in order, until the trainer is gone."""
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    # A batch is larger than a pipe holds, and the trainer may be busy: a thread waits for it to be read.
    outbox, sent = ThreadPoolExecutor(max_workers=1), []
    try:
        sampler = make_sampler()
        sampler.heartbeat = weights.heartbeat
        while True:
            try:
                version, slot, manifest, numbers = connection.recv()
            except (EOFError, ConnectionResetError):
                return  # the trainer is gone
            tensors, measured = weights.slots[slot], {}
            if manifest:
                measured = deliver(sampler, tensors, manifest)
            else:
                sampler.use_weights(tensors)
            for batch in plan.draw(sampler, numbers):
                if not batch.version == version == weights.versions[slot]:
                    raise RuntimeError(
                        f"batch {batch.number} is due from version {batch.version}, but version {version} was "
                        f"announced and version {weights.versions[slot]} lies in slot {slot}"
                    )
                batch.measured, measured = measured, {}  # with the first batch of its version
                sent.append(outbox.submit(connection.send, batch))
                while sent and sent[0].done():
                    sent.pop(0).result()  # raises what went wrong in that thread
    except (Exception, RunStopped) as error:
        if not isinstance(error, (BadInput, RunStopped)):  # those say it all in a sentence
            traceback.print_exc()
        outbox.submit(connection.send, error if isinstance(error, BadInput) else f"{type(error).__name__}: {error}")
        _leave_with_parent()  # not before: the trainer should read the message, not find a dead process


@contextlib.contextmanager
def _environment(variables):
    """Inside, these environment variables are set, for processes to inherit; then again what was."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _read_into(inbox, connection):
    """Put every message into the queue, and None when there can be no more."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            inbox.put(connection.recv())
    inbox.put(None)


def _leave_with_parent():
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
