"""Matrix products by the fastest route that PyTorch offers for a device and dtype."""

import torch.nn.functional as F
from torch import float32


def linear(inputs_NH, weight_OH, bias_O=None):
    """inputs · weightᵀ + bias, as `torch.nn.functional.linear`, differentiable.

    On a CPU, PyTorch hands float32 products to MKL and convolutions to oneDNN, which is twice as fast on some CPUs. A
    linear layer is a convolution with a kernel of 1 × 1: rows are positions, features are channels, and the memory is
    laid out as oneDNN wants it, so that nothing is copied. (Dilation means nothing for such a kernel, but makes PyTorch
    choose oneDNN with a single thread too.)
    """
    if inputs_NH.dtype != float32 or inputs_NH.device.type != "cpu":
        return F.linear(inputs_NH, weight_OH, bias_O)
    N, H = inputs_NH.shape
    image_1H1N = inputs_NH.view(1, N, 1, H).permute(0, 3, 1, 2)
    kernel_OH11 = weight_OH.view(-1, H, 1, 1)
    return F.conv2d(image_1H1N, kernel_OH11, bias_O, dilation=2).permute(0, 2, 3, 1).reshape(N, -1)
