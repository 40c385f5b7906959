"""What a model on a CPU spends its time in, linear layers and attention, by the fastest way that PyTorch knows."""

import torch
import torch.nn.functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward

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


def attention(module, query, key, value, attention_mask, scaling=None, **options):
    """What `transformers` calls for "sdpa" attention; on a CPU, one new token per sequence takes two plain products.

    PyTorch's own walks through blocks of queries and keys, so as never to hold all scores. A single query has but one
    row of them, which is made and used in less time than the walk takes.

    Args:
        query: [B, heads, queries, D].
        key, value: [B, key heads, keys, D], each key head for as many neighbouring heads of the query.
        attention_mask: bool [B, 1, queries, keys], True where a query sees a key; or None where it sees all. (A model
            may give one of another kind, which is left to PyTorch.)
        scaling: of the scores; D^−½ if None.

    Returns [B, queries, heads, D], and None for the weights, which are not kept.
    """
    B, heads, queries, D = query.shape
    plain_mask = attention_mask is None or (attention_mask.dtype == torch.bool and attention_mask.shape[1] == 1)
    by_products = (
        queries == 1
        and query.device.type == "cpu"
        and query.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and plain_mask
        and options.get("position_bias") is None
    )
    if not by_products:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    grouped = query.reshape(B, key.shape[1], -1, D)  # heads that share their keys become rows of one product
    scores = grouped @ key.transpose(2, 3) * (D**-0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores.masked_fill_(~attention_mask, -torch.inf)
    return (scores.softmax(dim=-1) @ value).reshape(B, queries, heads, value.shape[-1]), None
