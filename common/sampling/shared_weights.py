"""Weights in shared memory, on their way from the trainer to a sampler in another process."""

import os
import shutil

import torch

from common.distributed import whole
from common.errors import BadInput
from common.weights import weights_of


def share_weights(model, num_slots):
    """`SharedWeights` with room for a model's weights, so many times. Raises `BadInput`."""
    shapes = {name: tensor.shape for name, tensor in weights_of(model).items()}
    return SharedWeights(shapes, reserve_memory(sum(_aligned_sizes(shapes)), num_slots))


def reserve_memory(slot_size, num_slots):
    """Slots of `slot_size` float32 numbers, the version in each (−1: none yet), and a heartbeat.

    Raises `BadInput` if there is too little shared memory.
    """
    copies = num_slots * int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # every rank has its own
    needed = 4 * copies * slot_size
    free = shutil.disk_usage("/dev/shm").free
    if needed > free:  # writing to memory that is not there would end in a bus error
        raise BadInput(
            f"The sampler's process takes {needed / 2**20:.0f} MiB of shared memory for "
            f"weights, but /dev/shm has {free / 2**20:.0f} MiB: make room "
            "(docker run --shm-size), or give --serial."
        )
    slots = [torch.empty(slot_size).share_memory_() for _ in range(num_slots)]
    versions = torch.full((num_slots,), -1).share_memory_()
    heartbeat = torch.zeros(1, dtype=torch.int64).share_memory_()
    return slots, versions, heartbeat


def _aligned_sizes(shapes):
    """Numbers from the start of a tensor to that of the next.

    Tensors start at multiples of 64 bytes, as PyTorch's own do: elsewhere vector code may round
    differently.
    """
    return [-(-shape.numel() // 16) * 16 for shape in shapes.values()]


class SharedWeights:
    """Copies of a model's weights, float32, in shared memory: one in each slot.

    `shapes` by parameter name. `memory` comes from `reserve_memory`, and a process can inherit it.
    """

    def __init__(self, shapes, memory):
        self.shapes = shapes
        self.memory = memory
        # `versions`: that each slot holds; `heartbeat` grows while the sampler works
        self.slots, self.versions, self.heartbeat = memory
        self.sizes = _aligned_sizes(shapes)

    def tensors(self, slot):
        """The slot's tensors by parameter name: views of the shared memory."""
        parts = zip(self.shapes.items(), self.slots[slot].split(self.sizes), strict=True)
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
