"""A model's weights as tensors by name: their checksums, and other values for a while."""

import zlib
from contextlib import contextmanager

import torch

from common.distributed import replaced, whole
from common.lora import MergedWeights, adapted_layers, merged, plain_name


def checksum(tensor):
    """An `int` that depends on every bit of a tensor and on the order of its elements (row by row).

    The bytes, as rows of 1,024 integers, are summed along rows and columns on the tensor's own
    device; a CRC-32 is taken of the sums and of the bytes left over. A changed element changes a
    row's sum and a column's; exchanged elements change one of the two, and exchanged rows the order
    of the sums.
    """
    bytes_N = whole(tensor.detach()).contiguous().view(-1).view(torch.uint8)
    if bytes_N.data_ptr() % 8:
        # Eight bytes can be read as an integer only where eight-byte words begin.
        bytes_N = bytes_N.clone()
    end = len(bytes_N) // 8192 * 8192
    integers_RC = bytes_N[:end].view(torch.int64).view(-1, 1024)
    code = 0
    for part in (integers_RC.sum(dim=1), integers_RC.sum(dim=0), bytes_N[end:]):
        code = zlib.crc32(part.cpu().view(torch.uint8).numpy(), code)
    return code


def weights_of(model):
    """All that a checkpoint of a model holds, by name: parameters, and buffers such as the bias of
    a router, which do not learn. An engine may want them all. Of an adapter nobody is told: with
    one, these are `MergedWeights`.
    """
    tensors = _plain_tensors(model)
    layers = adapted_layers(model)
    return MergedWeights(tensors, layers) if layers else tensors


def _plain_tensors(model):
    tensors = tensors_of(model).items()
    return {plain_name(name): tensor for name, tensor in tensors if ".lora_" not in name}


def tensors_of(model):
    """The model's `state_dict`, but tied weights once."""
    persistent = model.state_dict(keep_vars=True).keys()
    buffers = {name: tensor for name, tensor in model.named_buffers() if name in persistent}
    return dict(model.named_parameters()) | buffers


@contextmanager
def parameters_from(model, values):
    """Context in which some of `weights_of(model)` have other values.

    `values` are pairs of a name and a whole tensor, taken one by one.
    """
    with merged(model), replaced(_plain_tensors(model), values):
        yield


def perturbed(model, names, strength=0.5):
    """Context with noise added to the named weights, `strength` times their RMS."""
    parameters = weights_of(model)
    generator = torch.Generator().manual_seed(1)

    def noisy(name):
        before = whole(parameters[name].detach())
        noise = torch.randn(before.shape, generator=generator).to(before)
        least = 0.1 if noise.dim() == 1 else 0.0  # some biases are 0
        return before + noise * strength * before.square().mean().sqrt().clamp(min=least)

    return parameters_from(model, ((name, noisy(name)) for name in names))
