"""From a micro-batch to log-probs and entropies of response tokens.

`kernels/__init__.py` explains the fast ways.
"""

import torch

from common.distributed import is_sharded, one_pass
from common.kernels import cpu
from common.lora import Base, without_adapter

LARGE_VOCABULARY = 8192
"""from here on the CPU walks in slices; below, the plain expression is faster in float32 (measured,
see the report of `benchmarks/speed/logprob_kernels.py`)"""


def autocast(device_type, precision, cache=True):
    """Context for forward passes: bf16 products over float32 weights if precision is "bfloat16"."""
    enabled = precision == "bfloat16"
    return torch.autocast(device_type, torch.bfloat16, enabled=enabled, cache_enabled=cache)


def autocast_of(model):
    """Context for a forward pass of a model as its weights need it: autocast if they are bf16."""
    return autocast(model.device.type, "bfloat16" if model.dtype == torch.bfloat16 else "float32")


def token_logprobs(model, micro, temperature, precision="float32"):
    """Log-prob of each response token, and entropy of the distribution it was sampled from.

    Equation: logprob = log softmax(z / τ)_y and entropy = −Σ_v p_v log p_v with p = softmax(z / τ),
    z = head(backbone).

    `model` is a Hugging Face causal language model, `micro` a `MicroBatch`, `precision` "float32",
    or "bfloat16" for autocast. A model may also be a `Base`, a policy without its adapter. Returns
    `logprobs_BT` and `entropy_BT`, both differentiable and float32, exactly 0 outside the mask.
    Raises ValueError for a model of another dtype than float32 or bfloat16.
    """
    if isinstance(model, Base):
        with without_adapter(model.policy):
            return _token_logprobs(model.policy, micro, temperature, precision)
    return _token_logprobs(model, micro, temperature, precision)


@one_pass
def _token_logprobs(model, micro, temperature, precision):
    mask_BT, places_N = micro.mask_BT, micro.places_N
    # Of a sharded model, a cache of what is cast would keep all layers whole.
    with autocast(mask_BT.device.type, precision, cache=not is_sharded(model)):
        hidden_BTH = model.base_model(input_ids=micro.inputs_BT, use_cache=False).last_hidden_state
    head = model.get_output_embeddings()
    hidden_NH = hidden_BTH.flatten(0, 1)[places_N].float()
    weight_VH = head.weight
    if getattr(head, "bias", None) is not None:  # one more feature, which is always 1
        hidden_NH = torch.cat([hidden_NH, hidden_NH.new_ones(len(hidden_NH), 1)], dim=1)
        weight_VH = torch.cat([weight_VH, head.bias.unsqueeze(1)], dim=1)
    # W (h / τ) = (W h) / τ. The trainer applies the temperature here and nowhere else. A cap comes
    # before it: c tanh(z / c) / τ is the logit z / τ with the cap c / τ.
    scale, cap = scale_and_cap(model.config.get_text_config())
    dtype = torch.bfloat16 if precision == "bfloat16" else weight_VH.dtype
    hidden_NH = (hidden_NH * scale / temperature).to(dtype)
    cap = cap and cap / temperature
    targets_N = micro.targets_BT.flatten()[places_N]
    logprobs_N, entropy_N = logprobs_and_entropy(hidden_NH, weight_VH, targets_N, cap)

    def at_their_places(values_N):
        zeros_BT = values_N.new_zeros(mask_BT.shape)
        return zeros_BT.index_put(torch.unravel_index(places_N, mask_BT.shape), values_N)

    return at_their_places(logprobs_N), at_their_places(entropy_N)


def scale_and_cap(config):
    """What a model does to its logits W h, read off its configuration: a factor, and then the c of
    c tanh(z / c), or None. `rollouts.check_decoding` compares it with what the model computes.
    """
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier", "output_multiplier"):  # Cohere, Falcon-H1, …
        scale *= getattr(config, name, None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
    return scale, getattr(config, "final_logit_softcapping", None)  # Gemma


def logprobs_and_entropy(hidden_NH, weight_VH, targets_N, cap=None):
    """Log-prob of each target and entropy of its distribution, differentiable in h and W.

    Equation: logprob = log softmax(z)_y and entropy = −Σ_v p_v log p_v with p = softmax(z) and
    z = W h or, with a cap c, z = c tanh(W h / c).

    h and W are float32 or bfloat16, y int64. Products have the dtype of h, sums are float32. A
    float32 W may come with bfloat16 h, as under autocast: it is rounded for the products, and its
    gradient is float32. (On a CPU, float64 works, too; below `LARGE_VOCABULARY` it is returned.)
    With slices and kernels, rows whose upstream gradients are exactly zero cost no backward work,
    and a gradient cannot be differentiated again: that raises a RuntimeError. Returns `logprobs_N`
    and `entropy_N`, float32. Raises ValueError for shapes or dtypes that do not fit.
    """
    f64, f32, bf16 = torch.float64, torch.float32, torch.bfloat16
    known = [(f32, f32), (bf16, bf16), (bf16, f32)]
    if not weight_VH.is_cuda:
        known.append((f64, f64))
    dtypes = (hidden_NH.dtype, weight_VH.dtype)
    if dtypes not in known or hidden_NH.shape != (*targets_N.shape, weight_VH.shape[-1]):
        shapes = [list(tensor.shape) for tensor in (hidden_NH, weight_VH, targets_N)]
        raise ValueError(
            f"hidden [N, H], weight [V, H] and targets [N] do not fit: {shapes} of {dtypes}."
        )
    if hidden_NH.is_cuda:
        from common.kernels import triton  # a CPU does without

        return triton.logprobs_and_entropy(hidden_NH, weight_VH, targets_N, cap)
    if len(weight_VH) >= LARGE_VOCABULARY:
        return cpu.SlicedLogprobs.apply(hidden_NH, weight_VH, targets_N, cap)
    return cpu.plain_logprobs_and_entropy(hidden_NH, weight_VH, targets_N, cap)
