"""Weights in memory that trainer and sampler share: the trainer copies them in, the sampler's parameters lie there.

The memory is one nameless file, mapped by both processes. It holds a page of counters and then a few *slots*, each with
room for one version of all the weights. Nothing is pickled, and nothing is left behind, however the processes end.
"""

import mmap
import os
import tempfile
import weakref
from contextlib import contextmanager
from math import prod
from multiprocessing.reduction import DupFd
from pathlib import Path

import torch

from common.errors import BadInput

ALIGNMENT = 64  # bytes, as PyTorch's own allocator aligns: on other addresses, vector code may round differently
COUNTERS_PAGE = 4096  # bytes


class SharedWeights:
    """`num_slots` copies of a model's parameters; picklable only into a process that is being started.

    Args:
        model: gives names and shapes; its parameters are float32. Tied ones are stored once.

    Raises `BadInput` where the machine has too little shared memory: without a look at it beforehand, the first write
    to a page that is not there would be a bus error.

    Attributes:
        slots: per slot, its tensors by parameter name, views of the shared memory.
        versions: int64 [num_slots], the version of the weights that each slot holds; −1 while it is written.
        heartbeat: int64 [1], counts what the sampler has decoded.
    """

    def __init__(self, model, num_slots):
        self._shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        self._num_slots = num_slots
        directory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # memory, never written to disk
        with tempfile.TemporaryFile(dir=directory) as file:
            try:
                os.ftruncate(file.fileno(), self._num_bytes())
                if hasattr(os, "posix_fallocate"):  # not on macOS
                    os.posix_fallocate(file.fileno(), 0, self._num_bytes())
            except OSError as error:
                raise BadInput(
                    f"Sampling in a process of its own takes {self._num_bytes() / 2**20:.0f} MiB of shared memory for "
                    f"the weights, which {directory or tempfile.gettempdir()} does not have ({error.strerror}): make "
                    "room (docker run --shm-size), or start a run that samples in the trainer's process, with --serial."
                ) from error
            self._map(os.dup(file.fileno()))
        self.versions.fill_(-1)

    def __getstate__(self):
        return {"_shapes": self._shapes, "_num_slots": self._num_slots, "file": DupFd(self._file)}

    def __setstate__(self, state):
        file = state.pop("file").detach()
        self.__dict__.update(state)
        self._map(file)

    def write(self, slot, version, model):
        """Copy the model's parameters into a slot that nobody reads."""
        self.versions[slot] = -1
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                self.slots[slot][name].copy_(parameter)
        self.versions[slot] = version

    def _slot_bytes(self):
        return sum(_aligned(4 * prod(shape)) for shape in self._shapes.values())

    def _num_bytes(self):
        return COUNTERS_PAGE + self._num_slots * self._slot_bytes()

    def _map(self, file):
        self._file = file
        weakref.finalize(self, os.close, file)
        memory = torch.frombuffer(mmap.mmap(file, self._num_bytes()), dtype=torch.uint8)
        counters = memory[:COUNTERS_PAGE].view(torch.int64)
        self.heartbeat, self.versions = counters[:1], counters[1 : 1 + self._num_slots]
        self.slots = []
        for slot in range(self._num_slots):
            offset, tensors = COUNTERS_PAGE + slot * self._slot_bytes(), {}
            for name, shape in self._shapes.items():
                size = 4 * prod(shape)
                tensors[name] = memory[offset : offset + size].view(torch.float32).view(shape)
                offset += _aligned(size)
            self.slots.append(tensors)


def _aligned(size):
    return -(-size // ALIGNMENT) * ALIGNMENT


def point_parameters(model, tensors):
    """Let every parameter of `model` be the tensor of its name. Returns the tensors they were.

    Nothing is copied, unless the tensors lie on another device than the model.
    """
    previous = {}
    for name, parameter in model.named_parameters():
        previous[name], parameter.data = parameter.data, tensors[name].to(parameter.device)
    return previous


@contextmanager
def parameters_from(model, tensors):
    """Inside, the parameters of `model` are these tensors; then again what they were."""
    own = point_parameters(model, tensors)
    try:
        yield
    finally:
        point_parameters(model, own)
