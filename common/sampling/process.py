"""The sampler's process: it works off the trainer's orders until the trainer is gone."""

import os
import re
import threading
import traceback
from multiprocessing import parent_process
from multiprocessing.connection import wait

from common.errors import BadInput, RunStopped
from common.sampling.verify import deliver


def run_sampler(connection, weights, make_sampler, plan):
    """Sample with what `make_sampler()` returns, from `SharedWeights`, as `connection` asks.

    A message is a slot of the weights, its version, a `Manifest` or None, and the work: numbers of
    batches of the `Plan`, or prompts to answer greedily.
    """
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    # This process is no rank, and its engine must not take it for one.
    ranks = re.compile(r"TORCHELASTIC_|MASTER_|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_)")
    for name in list(os.environ):
        if ranks.match(name):
            del os.environ[name]
    try:
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
