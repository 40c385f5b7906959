"""Ranks for the tests: processes with the environment that `torchrun` would give them, forked as in
`helpers`.
"""

import contextlib
import gc
import multiprocessing
import os
import pickle
import re
import secrets
import socket
import sys
import types
from multiprocessing.connection import wait
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

import grpo
from common import commandline, distributed, logprobs, rollouts, runlog
from common.metrics import StepMetrics
from common.models import end_of_sequence_ids, load_model, load_tokenizer
from common.sampling import transformers, verify
from tests import helpers

CPU = torch.device("cpu")


def run_ranks(count, function, *arguments, seconds=120):
    """`function(*arguments)` on each of `count` ranks; returns what each returned, in the order of
    ranks.

    Where one dies, or none answers for so many seconds, all are killed, and the test fails.
    """
    port = free_port()
    processes, connections = [], []
    for rank in range(count):
        environment = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": count,
            "LOCAL_WORLD_SIZE": count,
        }
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        ours, theirs = multiprocessing.Pipe()
        process = helpers.forked(_rank, theirs, environment, function, arguments, daemon=False)
        theirs.close()
        processes.append(process)
        connections.append(ours)
    answers = {}
    with contextlib.suppress(EOFError):  # one has died
        while len(answers) < count and (ready := wait(set(connections) - set(answers), seconds)):
            answers |= {connection: pickle.loads(connection.recv_bytes()) for connection in ready}
    for process in processes:
        if len(answers) < count:
            process.kill()
        process.join()
    assert len(answers) == count, "a rank died, or does not answer"
    return [answers[connection] for connection in connections]


def free_port():
    """A free port, not one of those that the kernel gives to connections: tests beside this one
    make many.
    """
    while True:
        with socket.socket() as free, contextlib.suppress(OSError):
            port = 10_000 + secrets.randbelow(22_000)
            free.bind(("127.0.0.1", port))
            return port


def _rank(connection, environment, function, arguments):
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    # tensors themselves, not handles of shared memory
    connection.send_bytes(pickle.dumps(function(*arguments)))
    connection.close()


def script(argv, log, spawned=False):
    """`python grpo.py …` as one rank of several, its output in `log`; returns its exit code. Its
    sampler's process is forked, if not `spawned`.
    """
    with open(f"{log}-{os.environ['RANK']}", "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [grpo.__file__, *map(str, argv)]
    runlog.plot_curves = lambda records, title, path: None  # as in the tests' own process
    # A rank other than 0 waits before it says why it fails: under torchrun, it may be ended first.
    commandline.time = types.SimpleNamespace(sleep=lambda seconds: None)
    samplers = contextlib.nullcontext() if spawned else helpers.forked_samplers()
    with contextlib.suppress(SystemExit), samplers:
        commandline.run(grpo.main, grpo.Args, grpo.__file__)
        return 0
    return 1


def loss_and_gradients(cases):
    """For each case, what a script's `gradient` makes of it: loss, and whole gradients by name.

    A case has the script's module (or its path), a model directory, a batch with advantages, a
    token budget, precision, the vocabulary from which on slices are taken, and whether activations
    are recomputed.
    """
    distributed.join_ranks(CPU, 60)
    results = []
    for case in cases:
        module = helpers.import_script(case["script"])
        policy = load_model(case["model"], "", CPU, case["checkpointing"])
        distributed.shard(policy, CPU, case.get("replicas", 1))
        args = module.Args(max_tokens_per_microbatch=case["budget"])
        before, logprobs.LARGE_VOCABULARY = logprobs.LARGE_VOCABULARY, case["large"]
        metrics = StepMetrics()
        loss = module.gradient(case["batch"], policy, None, args, case["precision"], metrics)
        logprobs.LARGE_VOCABULARY = before
        gradients = {
            name: distributed.whole(parameter.grad) for name, parameter in policy.named_parameters()
        }
        results.append((loss, gradients))
    return results if distributed.rank() == 0 else None


def loaded(directory):
    """How many bytes of memory a model takes after loading, and again after sharding; ids that end
    its responses.
    """
    distributed.join_ranks(CPU, 60)
    before = _resident_bytes()
    model = load_model(directory, "", CPU)
    after = _resident_bytes()
    distributed.shard(model, CPU)
    return (
        after - before,
        _resident_bytes() - before,
        end_of_sequence_ids(model, load_tokenizer(directory)),
    )


def weights(directory):
    """All weights of a sharded model, as this rank can gather them."""
    distributed.join_ranks(CPU, 60)
    model = load_model(directory, "", CPU)
    distributed.shard(model, CPU)
    return {
        name: distributed.whole(parameter).detach() for name, parameter in model.named_parameters()
    }


def _resident_bytes():
    gc.collect()
    return 1024 * int(re.search(r"RssAnon:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def checked_decoding(directory):
    """Check decoding on a sharded model: how many layers are whole or remembered afterwards. It
    fails where all weights are gathered.
    """
    distributed.join_ranks(CPU, 60)
    model = load_model(directory, "", CPU)
    distributed.shard(model, CPU)

    def refuse(model):
        raise AssertionError("all weights were gathered")

    transformers.gathered = refuse  # of this process only
    rollouts.check_decoding(model, [[5, 6, 7], [8]], 6, 1.0, "float32", directory)
    sharded = [isinstance(parameter, DTensor) for parameter in model.parameters()]
    return sharded.count(False), len(model._get_fsdp_state()._comm_ctx.post_forward_order)


def layers_remembered(directory):
    """How many layers FSDP2 remembers to have passed, after two passes without gradients."""
    distributed.join_ranks(CPU, 60)
    model = load_model(directory, "", CPU)
    distributed.shard(model, CPU)
    for _ in range(2):
        verify.logprobs_of(model, [[5, 6, 7]], "float32")
    return len(model._get_fsdp_state()._comm_ctx.post_forward_order)
