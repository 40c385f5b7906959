"""Products of activations and weights, by the faster of the two libraries in PyTorch's CPU build."""

import torch
import torch.nn.functional as F

FEWEST_NUMBERS = 20_481
"""of inputs; with fewer, PyTorch does not choose oneDNN for a convolution"""


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
