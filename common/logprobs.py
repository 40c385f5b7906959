"""Log-probabilities and entropies of tokens under a causal language model, without holding all logits.

With hidden states h [N, H], output head W [V, H], target tokens y [N] and temperature τ, the logits are z = W h / τ and

    logprob = z_y − logsumexp(z)                         ∂ logprob / ∂z_v = 1[v = y] − p_v
    entropy = −Σ_v p_v log p_v                           ∂ entropy / ∂z_v = −p_v (log p_v + entropy)

where p = softmax(z). N × V logits are the largest tensor of a training step (N = 8,192 response tokens and V = 151,936
make 5 GB of float32), and nothing but sums over v is wanted from them. So they are made a slice at a time, twice: once
for the sums, and again in the backward pass, where a slice's gradient is multiplied away at once.

Two functions do this, and each picks the fastest way for its device and sizes:

- `logprobs_and_entropy`: any upstream gradients; for references and for losses that see whole sequences.
- `policy_loss`: for losses where a token's gradient depends on that token's log-prob alone.

On a GPU they run the kernels of `logprob_kernels.py`. On a CPU a large vocabulary is walked in slices, below, and a
small one takes the plain expression. The head is applied to response tokens only: prompt and padding never cost a row.
"""

import math

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid

from common.products import linear

SLICE = 4096
"""vocabulary entries in a slice; with 512 rows its 8 MB of float32 stay in a CPU's last cache between passes"""
LARGE_VOCABULARY = 8192
"""from here on the CPU walks in slices; below, the plain expression is faster in float32 (measured, see the report of
`benchmarks/logprob_kernels.py`)"""


def autocast(device_type, precision):
    """Context for forward passes: bf16 products over float32 weights for "bfloat16", nothing for "float32"."""
    return torch.autocast(device_type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


# For models: from tokens to log-probs


def token_logprobs(model, inputs_BT, attention_BT, targets_BT, mask_BT, temperature, precision="float32"):
    """Log-probability of each target and entropy of the distribution it was drawn from.

    Args:
        model: a Hugging Face causal language model, whose logits are `head(backbone(inputs))`.
        inputs_BT, attention_BT, targets_BT, mask_BT: as `batching.collate` returns them; padding on either side.
        temperature: τ; the distribution is softmax(logits / τ), in sampler and trainer alike.
        precision: "float32", or "bfloat16" for autocast.

    Returns `logprobs_BT` (differentiable) and `entropy_BT` (detached), float32, exactly 0 outside the mask.
    """
    places_N = _places(mask_BT)
    hidden_NH, weight_VH = _hidden_and_head(model, inputs_BT, attention_BT, places_N, precision)
    logprobs_N, entropy_N = logprobs_and_entropy(hidden_NH, weight_VH, targets_BT.flatten()[places_N], temperature)
    return _spread(logprobs_N, places_N, mask_BT), _spread(entropy_N.detach(), places_N, mask_BT)


def token_policy_loss(
    model, inputs_BT, attention_BT, targets_BT, mask_BT, temperature, per_token_loss, precision="float32"
):
    """Sum over the response tokens of a loss of their log-probs, and what is to be logged of them.

    Args:
        per_token_loss: `logprobs_BT` → losses [B, T], elementwise.
        Others: as for `token_logprobs`.

    Returns `loss` (a scalar; its backward gives the gradients of all weights), and detached, float32 and exactly 0
    outside the mask, `logprobs_BT`, `entropy_BT`, and `slopes_BT`, the derivative of each token's loss by its log-prob.
    """
    places_N = _places(mask_BT)
    hidden_NH, weight_VH = _hidden_and_head(model, inputs_BT, attention_BT, places_N, precision)
    loss, *results_N = policy_loss(
        hidden_NH,
        weight_VH,
        targets_BT.flatten()[places_N],
        temperature,
        lambda logprobs_N: per_token_loss(_spread(logprobs_N, places_N, mask_BT)).flatten()[places_N],
    )
    return loss, *(_spread(result_N, places_N, mask_BT) for result_N in results_N)


def _hidden_and_head(model, inputs_BT, attention_BT, places_N, precision):
    """The backbone's hidden states at places of B·T, in the dtype of the products, and the head's weight."""
    padding = {}  # on the right it comes after all that is read, where causal attention does not look
    if not attention_BT[:, 0].all():
        # A token's position is the number of real tokens before it.
        positions_BT = (attention_BT.cumsum(dim=1) - 1).clamp(min=0)
        padding = {"attention_mask": attention_BT, "position_ids": positions_BT}
    with autocast(inputs_BT.device.type, precision):
        hidden_BTH = model.base_model(input_ids=inputs_BT, use_cache=False, **padding).last_hidden_state
    head = model.get_output_embeddings()
    hidden_NH, weight_VH = hidden_BTH.flatten(0, 1)[places_N], head.weight
    if getattr(head, "bias", None) is not None:  # one more feature, which is always 1
        hidden_NH = torch.cat([hidden_NH, hidden_NH.new_ones(len(hidden_NH), 1)], dim=1)
        weight_VH = torch.cat([weight_VH, head.bias.unsqueeze(1)], dim=1)
    dtype = torch.bfloat16 if precision == "bfloat16" else weight_VH.dtype
    return hidden_NH.to(dtype), weight_VH


def _places(mask):
    """Where the mask is true, as indices into the flattened mask (whose every use would have a GPU wait for it)."""
    return mask.flatten().nonzero().squeeze(1)


def _spread(values_N, places_N, mask):
    """The values at their places in the shape of the mask, 0 elsewhere."""
    return values_N.new_zeros(mask.numel()).index_copy(0, places_N, values_N).view(mask.shape)


# For hidden states: the two forms


def logprobs_and_entropy(hidden_NH, weight_VH, targets_N, temperature):
    """The general form: log-prob of each target and entropy of its distribution, differentiable in h and W.

    Args:
        hidden_NH, weight_VH: float32 or bfloat16. Products are taken in hidden's dtype, sums in float32. A float32
            weight may come with bfloat16 hidden states, as under autocast: it is rounded for the products, and its
            gradient is float32.
        targets_N: int64. A negative target marks a row to ignore: both its results are 0 and it has no gradient,
            whatever it holds, NaN included.
        temperature: τ > 0.

    Rows whose upstream gradients are exactly zero cost no backward work. Gradients have the dtypes of h and W; they
    cannot be differentiated again: a backward pass with `create_graph=True` raises a RuntimeError.
    Returns `logprobs_N` and `entropy_N`, float32. Raises ValueError for shapes, dtypes and targets that do not fit.
    """
    _check(hidden_NH, weight_VH, targets_N, temperature)
    counted_N = targets_N >= 0
    if not counted_N.all():
        places = _places(counted_N)
        results = logprobs_and_entropy(hidden_NH[places], weight_VH, targets_N[places], temperature)
        return tuple(_spread(result, places, counted_N) for result in results)
    if hidden_NH.is_cuda:
        from common import logprob_kernels  # triton is for GPUs; a CPU does without

        results = logprob_kernels.logprobs_and_entropy(hidden_NH, weight_VH, targets_N, temperature)
    elif len(weight_VH) >= LARGE_VOCABULARY:
        results = SlicedLogprobs.apply(hidden_NH, weight_VH, targets_N, temperature)
    else:
        results = plain_logprobs_and_entropy(hidden_NH, weight_VH, targets_N, temperature)
    return _differentiable_once(*results)


def policy_loss(hidden_NH, weight_VH, targets_N, temperature, per_token_loss):
    """The policy-loss form: Σ_n per_token_loss(logprobs)_n, where a token's loss sees that token's log-prob alone.

    Args:
        per_token_loss: `logprobs_N` (float32) → losses [N], elementwise and in plain PyTorch. It may be called more
            than once, and for some log-probs before the others are known.
        Others: as for `logprobs_and_entropy`.

    Returns `loss` (a scalar, differentiable in h and W), and detached, float32 [N], log-probs, entropies and the slopes
    d loss_n / d logprob_n. Tokens with a slope of exactly zero cost no backward work. The gradient exists once: a
    second backward pass through `loss`, or one with `create_graph=True`, raises a RuntimeError. Raises ValueError as
    `logprobs_and_entropy` does.
    """
    _check(hidden_NH, weight_VH, targets_N, temperature)
    counted_N = targets_N >= 0
    if not counted_N.all():
        places = _places(counted_N)
        loss, *results = policy_loss(
            hidden_NH[places],
            weight_VH,
            targets_N[places],
            temperature,
            lambda logprobs: per_token_loss(_spread(logprobs, places, counted_N))[places],
        )
        return loss, *(_spread(result, places, counted_N) for result in results)
    if hidden_NH.is_cuda:
        from common import logprob_kernels

        results = logprob_kernels.policy_loss(hidden_NH, weight_VH, targets_N, temperature, per_token_loss)
        return _differentiable_once(*results)
    # On a CPU, where slices of V are cheaper than slices of N, the gradient has to wait for the last slice anyway.
    return loss_of(*logprobs_and_entropy(hidden_NH, weight_VH, targets_N, temperature), per_token_loss)


def loss_of(logprobs_N, entropy_N, per_token_loss):
    """What `policy_loss` returns, from log-probs that carry gradients."""
    loss = per_token_loss(logprobs_N).sum()
    return loss, logprobs_N.detach(), entropy_N.detach(), slopes(per_token_loss, logprobs_N)


def slopes(per_token_loss, logprobs_N):
    """d loss_n / d logprob_n of an elementwise loss, float32 [N]."""
    with torch.enable_grad():
        leaf_N = logprobs_N.detach().requires_grad_()
        return torch.autograd.grad(per_token_loss(leaf_N).sum(), leaf_N)[0]


def _differentiable_once(*results):
    """The results, whose backward pass refuses to become differentiable itself.

    Formulas of slices and kernels end with the first derivative. Autograd would take it for a constant, and a loss that
    contains it, a penalty on the gradient's norm say, would silently train without that term.
    """
    for result in results:
        if result.requires_grad:
            result.register_hook(_refuse_create_graph)
    return results


def _refuse_create_graph(_):
    if torch.is_grad_enabled():  # which it is within a backward pass for `create_graph=True` alone
        raise RuntimeError("gradients of log-probs cannot be differentiated twice: leave out create_graph=True.")


def _check(hidden_NH, weight_VH, targets_N, temperature):
    if hidden_NH.ndim != 2 or weight_VH.ndim != 2 or hidden_NH.shape[1] != weight_VH.shape[1]:
        raise ValueError(f"hidden [N, H] and weight [V, H] do not fit: {hidden_NH.shape}, {weight_VH.shape}.")
    if targets_N.shape != hidden_NH.shape[:1]:
        raise ValueError(f"there must be one target for each of the {len(hidden_NH)} rows, not {targets_N.shape}.")
    dtypes = (hidden_NH.dtype, weight_VH.dtype)
    if hidden_NH.dtype != weight_VH.dtype and dtypes != (torch.bfloat16, torch.float32):
        raise ValueError(f"weight must have hidden's dtype, or be float32 for bfloat16 hidden states, not {dtypes}.")
    if hidden_NH.dtype not in (torch.float32, torch.bfloat16) and (
        hidden_NH.dtype != torch.float64 or hidden_NH.is_cuda
    ):
        raise ValueError(f"hidden must be float32 or bfloat16, not {hidden_NH.dtype}.")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a finite number above 0, not {temperature}.")
    if len(targets_N) and targets_N.max() >= len(weight_VH):
        raise ValueError(f"target {targets_N.max().item()} is outside the vocabulary of {len(weight_VH)}.")


# What slices and kernels share. The target is kept apart from all other entries: with s = Σ exp(z_v) over the others,
# its log-odds are o = z_y − log s, and log p_y = −log(1 + exp(−o)), 1 − p_y = 1 / (1 + exp(o)). Where p_y is near 1, as
# most of a trained model's are, the whole gradient is 1 − p_y times something, and this keeps all of its digits.


def target_against_others(odds_N, entropy_of_others_N):
    """Log-prob of the target and entropy: of whether it is the target, and if not, of which of the others it is."""
    p_target_N, p_others_N = odds_N.sigmoid(), (-odds_N).sigmoid()
    entropy_N = torch.special.entr(p_target_N) + torch.special.entr(p_others_N) + p_others_N * entropy_of_others_N
    return logsigmoid(odds_N), entropy_N


def gradient_at_target(odds_N, entropy_N, a_N, b_N):
    """The target's entry of a (1[v = y] − p) − b p (log p + entropy), for upstream gradients a and b."""
    p_target_N = odds_N.sigmoid()
    return a_N * (-odds_N).sigmoid() - b_N * (p_target_N * entropy_N - torch.special.entr(p_target_N))


def live_rows(dlogprobs_N, dentropy_N, *tensors):
    """Indices of the rows that have an upstream gradient, and the tensors' values in those rows.

    The other rows cost nothing, and whatever they hold, NaN for instance, stays out of the products.
    """
    live = ((dlogprobs_N != 0) | (dentropy_N != 0)).nonzero().squeeze(1)
    return live, *(tensors if len(live) == len(dlogprobs_N) else (tensor[live] for tensor in tensors))


# On a CPU


def plain_logprobs_and_entropy(hidden_NH, weight_VH, targets_N, temperature):
    """The plain expression, which holds several N × V tensors. Arguments and results: see `logprobs_and_entropy`."""
    # bf16 has 8 bits: a logit of 20 rounded to it is off by up to 0.06. Its products are exact in float32.
    dtype = torch.promote_types(hidden_NH.dtype, torch.float32)
    logits_NV = linear(hidden_NH.to(dtype), weight_VH.to(hidden_NH.dtype).to(dtype)) / temperature
    logprobs_NV = torch.log_softmax(logits_NV, dim=-1)
    logprobs_N = logprobs_NV.gather(-1, targets_N.unsqueeze(-1)).squeeze(-1)
    # p log p → 0 as p → 0, also where a masked vocabulary entry has log p = −inf.
    entropy_N = -(logprobs_NV.exp() * logprobs_NV.clamp(min=torch.finfo(dtype).min)).sum(dim=-1)
    return logprobs_N, entropy_N


class SlicedLogprobs(torch.autograd.Function):
    """The general form in slices of V: one pass for the sums, and one in the backward pass for the gradients.

    Walking over V with all rows at once, rather than over N, makes each slice of dW one product, written once.

    PyTorch on a CPU returns a bf16 product rounded to bf16, which is too coarse for a logit of 20. But what a softmax
    needs are *differences* of logits, and those that matter are small: among the others, entry v has the share
    exp(z_v − log s), which is largest where z_v − log s is nearest to 0. So a centre c close to the largest logits of
    the others is subtracted inside of the product (which rounds once, at its end), and rounding then costs a share q no
    more than 2⁻⁸ |log q| of itself, at most 1.4e-3 in absolute terms, and that times 1 − p_y in the gradient. The
    target's logit, the one number that shows by itself, is computed in float32.
    """

    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, targets_N, temperature):
        targeted_N = (hidden_NH.float() * weight_VH[targets_N].to(hidden_NH.dtype).float()).sum(dim=1)
        centre_N = targeted_N.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).to(hidden_NH.dtype)
        # In bits (base 2, which is the fastest exponential): x = (z − c) log₂e; these are Σ 2^x and Σ 2^x x.
        bits = math.log2(math.e) / temperature
        sum_N, weighted_N = torch.zeros_like(targeted_N), torch.zeros_like(targeted_N)
        # How far the largest logit may be above the centre. In bf16, 1 costs log-probs 2e-4 on average and 1e-3 at
        # most. In float32 2^x must stay in range.
        limit = (1.0 if hidden_NH.dtype == torch.bfloat16 else 16.0) * temperature

        for start in range(0, len(weight_VH) if len(hidden_NH) else 0, SLICE):
            weight_vH = weight_VH[start : start + SLICE].to(hidden_NH.dtype)
            logits_vN = linear(weight_vH, hidden_NH, -centre_N)
            target_places = _targets_within(targets_N, start, len(weight_vH))
            logits_vN[target_places] = -math.inf
            peak_N = logits_vN.amax(dim=0).float()
            # Rows that meet larger logits than before get a centre up there, and their slice of logits once more. The
            # first centre, the target's logit, may be too high as well.
            too_low_N, too_high_N = peak_N > limit, (peak_N < -limit) & peak_N.isfinite() & (sum_N == 0)
            rows = (too_low_N | too_high_N).nonzero().squeeze(1)
            if len(rows):
                centre = (centre_N[rows].float() + peak_N[rows]).to(hidden_NH.dtype)
                shift = (bits * (centre_N[rows].float() - centre.float())).clamp(max=0.0)
                weighted_N[rows] = shift.exp2() * (weighted_N[rows] + shift * sum_N[rows])
                sum_N[rows] *= shift.exp2()
                centre_N[rows] = centre
                logits_vN[:, rows] = linear(weight_vH, hidden_NH[rows], -centre)
                logits_vN[target_places] = -math.inf
            # 2^−1000 is 0 in float32; the −inf of targets and masked entries would make NaN of 2^x x.
            x_vN = logits_vN.float().mul_(bits).clamp_(min=-1000.0)
            powers_vN = x_vN.exp2()
            sum_N += powers_vN.sum(dim=0)
            weighted_N += x_vN.mul_(powers_vN).sum(dim=0)

        sum_N.clamp_(min=torch.finfo(torch.float32).tiny)  # where nothing but the target is allowed
        log_sum_N = sum_N.log()
        odds_N = (targeted_N - centre_N.float()) / temperature - log_sum_N
        logprobs_N, entropy_N = target_against_others(odds_N, log_sum_N - math.log(2) * weighted_N / sum_N)
        # For the backward pass: the centre that is nearest to log s, and what is left to log p_v.
        near_N = (centre_N.float() + temperature * log_sum_N).to(hidden_NH.dtype)
        rest_N = log_sum_N + (centre_N.float() - near_N.float()) / temperature - logsigmoid(-odds_N)
        ctx.save_for_backward(hidden_NH, weight_VH, targets_N, near_N, rest_N, odds_N, entropy_N)
        ctx.temperature = temperature
        return logprobs_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogprobs_N, dentropy_N):
        hidden_NH, weight_VH, *per_row = ctx.saved_tensors
        live, live_nH, targets_n, centre_n, rest_n, odds_n, entropy_n, a_n, b_n = live_rows(
            dlogprobs_N, dentropy_N, hidden_NH, *per_row, dlogprobs_N / ctx.temperature, dentropy_N / ctx.temperature
        )
        bits = math.log2(math.e) / ctx.temperature
        at_target_n = gradient_at_target(odds_n, entropy_n, a_n, b_n)
        # Of log p + entropy, the difference of two nearly equal numbers where p is flat, bf16 would leave nothing.
        has_entropy = bool((b_n != 0).any())
        dtype = torch.float32 if has_entropy else hidden_NH.dtype

        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        # The target's own entry is a row's largest: for dh it is multiplied in float32, apart from the others.
        dhidden_nH = at_target_n.unsqueeze(1) * weight_VH[targets_n].to(hidden_NH.dtype).float()
        dweight_VH = None
        if wants_weight:
            dweight_VH = torch.empty_like(weight_VH) if len(live) else torch.zeros_like(weight_VH)
        factor_nH = live_nH.detach().to(dtype).requires_grad_(wants_hidden)
        for start in range(0, len(weight_VH) if len(live) else 0, SLICE):
            weight_vH = weight_VH[start : start + SLICE].detach().to(hidden_NH.dtype).to(dtype)
            weight_vH.requires_grad_(wants_weight)
            with torch.enable_grad():
                logits_vn = linear(weight_vH, factor_nH, -centre_n.to(dtype))
            log2p_vn = logits_vn.detach().float().mul_(bits).sub_(math.log2(math.e) * rest_n)
            # dL/dz = −a p − b p (log p + entropy), and the target's own entry
            if has_entropy:
                log2p_vn.clamp_(min=-1000.0)  # as in the forward pass
                factor_vn = log2p_vn.mul(math.log(2)).add_(entropy_n).mul_(b_n)
                grad_vn = log2p_vn.exp2_().mul_(factor_vn.add_(a_n).neg_())
            else:
                grad_vn = log2p_vn.exp2_().mul_(-a_n)
            places = _targets_within(targets_n, start, len(weight_vH))
            grad_vn[places] = at_target_n[places[1]]
            grad_vn = grad_vn.to(dtype)
            if wants_weight:  # G h
                (dweight_VH[start : start + SLICE],) = torch.autograd.grad(
                    logits_vn, weight_vH, grad_vn, retain_graph=wants_hidden
                )
            if wants_hidden:  # a slice's part of Gᵀ W
                grad_vn[places] = 0.0
                dhidden_nH += torch.autograd.grad(logits_vn, factor_nH, grad_vn)[0]

        dhidden_NH = None
        if wants_hidden:
            dhidden_NH = torch.zeros_like(hidden_NH).index_copy_(0, live, dhidden_nH.to(hidden_NH.dtype))
        return dhidden_NH, dweight_VH, None, None


def _targets_within(targets_N, start, width):
    """Places of the targets in the slice of `width` entries from `start`, [v, N]: entries and rows."""
    rows = ((targets_N >= start) & (targets_N < start + width)).nonzero().squeeze(1)
    return targets_N[rows] - start, rows
