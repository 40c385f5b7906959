"""Linear layers and attention of a model on a CPU, by the fastest ways of PyTorch; its threads."""

import inspect
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

# Not 1,024, which is a MB for each shape of a bf16 product
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
MKL_IS_SLOW = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
# Numbers in the input of a linear layer; with fewer, PyTorch does not choose oneDNN for a
# convolution.
FEWEST_NUMBERS = 20_481
# Products of two numbers in a linear layer, per thread; with fewer, MKL is faster (measured for H
# and V from 64 to 896).
FEWEST_PRODUCTS = 3_500_000
# Tokens; under autocast, longer sequences get their gradient in bf16 (measured).
LONGEST_IN_FLOAT32 = 512
# The name under which `transformers` knows `attention`
ATTENTION = "sdpa_or_one_token"


def use_threads(threads):
    """Compute with that many CPU threads."""
    # Setting the number that is set already would slow attention down.
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def speed_up(model):
    """Let a `transformers` model that is on a CPU compute its layers by `linear` and `attention`.

    Nothing outside of this model changes, and what it saves is an ordinary model. Its attention
    must not use dropout.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, AttentionMaskInterface()["sdpa"])
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = Linear
    if attention_can_be_replaced(model):
        model.set_attn_implementation(ATTENTION)


def attention_can_be_replaced(model):
    """Whether a `transformers` model computes PyTorch's attention, by whatever name."""
    # The code of a few models compares the name with "sdpa", to build masks for it. These keep it.
    by_name = '"sdpa"' in inspect.getsource(sys.modules[type(model).__module__])
    return model.config._attn_implementation in ("sdpa", ATTENTION) and not by_name


def linear(inputs, weight, bias=None):
    """x Wᵀ + b, [..., V], of x [..., H], W [V, H] and b [V] or None.

    In float32 on an AMD processor it is computed as a convolution. PyTorch leaves float32 products
    to MKL, which gets half of what an AMD processor can do, and convolutions to oneDNN. A linear
    layer is a convolution with a kernel of 1 × 1: rows are pixels, features are channels, which lie
    in memory as "channels last" wants them, so that nothing is copied.
    """
    as_convolution = (
        MKL_IS_SLOW
        and inputs.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and inputs.numel() >= FEWEST_NUMBERS
        and inputs.numel() * len(weight) >= FEWEST_PRODUCTS * torch.get_num_threads()
    )
    if not as_convolution:
        return F.linear(inputs, weight, bias)
    # [images, channels, height, width]
    pixels = inputs.reshape(1, -1, 1, inputs.shape[-1]).permute(0, 3, 1, 2)
    kernel = weight[:, :, None, None]
    # Dilation means nothing to a kernel of one pixel, but with it PyTorch chooses oneDNN on a
    # single thread as well.
    outputs = F.conv2d(pixels, kernel, bias, dilation=2)
    return outputs.permute(0, 2, 3, 1).reshape(*inputs.shape[:-1], -1)


class Linear(torch.nn.Linear):
    """`torch.nn.Linear`, computed by `linear`.

    A linear layer becomes one by assignment to its `__class__`.
    """

    def forward(self, inputs):
        return linear(inputs, self.weight, self.bias)


def attention(module, query, key, value, attention_mask, scaling=None, **options):
    """`transformers`' "sdpa" attention, but faster in two cases.

    - One new token per sequence: two plain products. PyTorch would copy each key for every head
      that shares it.
    - Gradients of a few hundred tokens under autocast: in float32. PyTorch's bf16 backward pass
      takes twice as long.

    The rest is left to PyTorch.

    The query is [B, heads, queries, D]; key and value are [B, key heads, keys, D], each for
    neighbouring heads of the query. The mask is None or bool [B, 1, queries, keys], True where
    seen. Returns [B, queries, heads, D], and None.
    """
    B, heads, queries, D = query.shape
    plain_mask = attention_mask is None or (
        attention_mask.dtype == torch.bool and attention_mask.shape[1] == 1
    )
    plain = plain_mask and options.get("position_bias") is None
    short_gradient = query.requires_grad and queries <= LONGEST_IN_FLOAT32
    if torch.is_autocast_enabled("cpu") and plain and short_gradient:
        in_float32 = (tensor.float() for tensor in (query, key, value))
        with torch.autocast("cpu", enabled=False):
            found, _ = _by_pytorch(module, *in_float32, attention_mask, scaling=scaling, **options)
        return found.to(torch.bfloat16), None
    if queries > 1 or not plain:
        return _by_pytorch(module, query, key, value, attention_mask, scaling=scaling, **options)

    # Heads that share their keys become rows of one product.
    grouped = query.reshape(B, key.shape[1], -1, D)
    # In bf16, scores would be too coarse for exp.
    exact = torch.promote_types(key.dtype, torch.float32)
    scale = D**-0.5 if scaling is None else scaling
    with torch.autocast("cpu", enabled=False):
        scores = grouped.to(exact) @ key.to(exact).transpose(2, 3) * scale
        if attention_mask is not None:
            scores.masked_fill_(~attention_mask, -torch.inf)
        weights = scores.softmax(dim=-1).to(value.dtype)
        found = weights @ value
    return found.reshape(B, queries, heads, -1), None


def _by_pytorch(*arguments, **options):
    """PyTorch's own attention, as transformers calls it."""
    # Here rather than above: it takes seconds, which a mistyped option should not wait for.
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(*arguments, **options)
