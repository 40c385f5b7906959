"""Products of activations and weights, by the faster of the two libraries in PyTorch's CPU build."""

import torch
import torch.nn.functional as F

FEWEST_NUMBERS = 20_481
"""of inputs; with fewer, PyTorch does not choose oneDNN for a convolution"""
FEWEST_PRODUCTS = 3_500_000
"""of two numbers, for each thread; with fewer, MKL is the faster of the two (measured, for H and V from 64 to 896)"""


def use_threads(threads):
    """Compute with that many CPU threads, in PyTorch and in its libraries.

    A number that is right already is left alone. Setting it makes PyTorch tell MKL to split the products of every
    thread among threads of its own, and attention, which is many small products, takes up to twice as long.
    """
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def linear(inputs, weight, bias=None):
    """x Wᵀ + b, differentiable; on a CPU in float32 as a convolution.

    PyTorch leaves float32 matrix products to MKL, which gets half of what an AMD processor can do, and convolutions to
    oneDNN, which gets nearly all of it. And a linear layer is a convolution with a kernel of 1 × 1: rows are pixels,
    features are channels, and they lie in memory as "channels last" wants them, so that nothing is copied.

    Args:
        inputs: [..., H].
        weight: [V, H].
        bias: [V], or None.

    Returns [..., V].
    """
    as_convolution = (
        inputs.device.type == "cpu"
        and inputs.dtype == torch.float32
        and inputs.numel() >= FEWEST_NUMBERS
        and inputs.numel() * len(weight) >= FEWEST_PRODUCTS * torch.get_num_threads()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()  # oneDNN, by its former name
    )
    if not as_convolution:
        return F.linear(inputs, weight, bias)
    pixels = inputs.reshape(1, -1, 1, inputs.shape[-1]).permute(0, 3, 1, 2)  # images, channels, height, width
    # Dilation means nothing to a kernel of one pixel, but with it PyTorch chooses oneDNN on a single thread as well.
    outputs = F.conv2d(pixels, weight[:, :, None, None], bias, dilation=2)
    return outputs.permute(0, 2, 3, 1).reshape(*inputs.shape[:-1], -1)


class Linear(torch.nn.Linear):
    """`torch.nn.Linear`, computed by `linear`; a linear layer becomes one by assignment to its `__class__`."""

    def forward(self, inputs):
        return linear(inputs, self.weight, self.bias)
