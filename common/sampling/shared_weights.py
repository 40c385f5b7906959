"""Weights in shared memory, on their way from the trainer to a sampler in another process."""

import os
import shutil

import torch

from common.distributed import whole
from common.errors import BadInput
from common.weights import weights_of


class SharedWeights:
    """`num_slots` copies of a model's weights, float32, in shared memory.

    Raises `BadInput` if there is too little of it.
    """

    def __init__(self, model, num_slots):
        self.shapes = {name: tensor.shape for name, tensor in weights_of(model).items()}
        # Tensors start at multiples of 64 bytes, as PyTorch's own do: elsewhere vector code may
        # round differently.
        self.sizes = [-(-shape.numel() // 16) * 16 for shape in self.shapes.values()]
        copies = num_slots * int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # every rank has its own
        needed = 4 * copies * sum(self.sizes)
        free = shutil.disk_usage("/dev/shm").free
        if needed > free:  # writing to memory that is not there would end in a bus error
            raise BadInput(
                f"The sampler's process takes {needed / 2**20:.0f} MiB of shared memory for "
                f"weights, but /dev/shm has {free / 2**20:.0f} MiB: make room "
                "(docker run --shm-size), or give --serial."
            )
        self.memory = [torch.empty(sum(self.sizes)).share_memory_() for _ in range(num_slots)]
        self.versions = torch.full((num_slots,), -1).share_memory_()  # that each slot holds
        # Counts what the sampler has decoded
        self.heartbeat = torch.zeros(1, dtype=torch.int64).share_memory_()

    def tensors(self, slot):
        """The slot's tensors by parameter name: views of the shared memory."""
        parts = zip(self.shapes.items(), self.memory[slot].split(self.sizes), strict=True)
        return {name: part[: shape.numel()].view(shape) for (name, shape), part in parts}

    def write(self, slot, version, model):
        """Copy the model's weights into a slot that nobody reads."""
        self.write_tensors(slot, version, weights_of(model))

    @torch.no_grad()
    def write_tensors(self, slot, version, tensors):
        """Copy tensors by parameter name, whole or sharded, into a slot that nobody reads."""
        for name, place in self.tensors(slot).items():
            place.copy_(whole(tensors[name]))
        self.versions[slot] = version
