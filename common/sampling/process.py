"""The sampler's process: it works off the trainer's orders until the trainer is gone."""

import os
import re
import signal
import threading
import traceback
from multiprocessing import parent_process
from multiprocessing.connection import wait

from tqdm import tqdm

from common.errors import BadInput, RunStopped
from common.interrupt import STOP_SIGNALS
from common.sampling.shared_weights import SharedWeights
from common.sampling.verify import deliver


def run_sampler(connection, memory):
    """Sample from weights in `memory` (of `SharedWeights`), as `connection` asks.

    The first message has the shapes of the weights, a function that makes the sampler, and the
    `Plan`. Each of the others is a slot of the weights, its version, a `Manifest` or None, and the
    work: numbers of batches of the plan, or prompts to answer greedily.
    """
    for number in STOP_SIGNALS:  # the trainer acts on them
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    # The lock that tqdm would make is a named semaphore, which a killed process leaves behind.
    tqdm.set_lock(threading.RLock())
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    # This process is no rank, and its engine must not take it for one.
    ranks = re.compile(r"TORCHELASTIC_|MASTER_|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_)")
    for name in list(os.environ):
        if ranks.match(name):
            del os.environ[name]
    try:
        shapes, make_sampler, plan = connection.recv()
        weights = SharedWeights(shapes, memory)
        sampler = make_sampler()
        sampler.heartbeat = weights.heartbeat
        while True:
            _carry_out(connection.recv(), sampler, weights, plan, connection)
    except (EOFError, ConnectionError):
        return  # the trainer is gone
    except (BadInput, RunStopped) as error:
        connection.send(error)
    except Exception as error:
        traceback.print_exc()
        connection.send(f"{type(error).__name__}: {error}")
    _leave_with_parent()  # not before: the trainer should find the message, not a dead process


def _carry_out(order, sampler, weights, plan, connection):
    slot, version, manifest, work = order
    tensors = weights.tensors(slot)
    metrics = {}
    if manifest:
        metrics = deliver(sampler, tensors, manifest)
    else:
        sampler.use_weights(tensors)
    if "prompts" in work:
        connection.send(sampler.greedy(work["prompts"], work["problems"]))
        return
    for batch in plan.sample(sampler, work["numbers"]):
        held = weights.versions[slot].item()
        if not batch.version == version == held:
            needs = f"batch {batch.number} needs version {batch.version}"
            raise RuntimeError(f"{needs}, not {version}, {held}")
        batch.metrics |= metrics
        metrics = {}  # the sync's metrics go with the first batch of a version
        connection.send(batch)


def _leave_with_parent():
    wait([parent_process().sentinel])
    os._exit(1)
