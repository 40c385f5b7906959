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

from common.products import linear

SLICE = 4096
"""vocabulary entries in a slice; with 512 rows its 8 MB of float32 stay in a CPU's last cache between passes"""
LARGE_VOCABULARY = 8192
"""from here on the CPU walks in slices; below, the plain expression's third less arithmetic wins"""


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
    hidden_NH, weight_VH = _hidden_and_head(model, inputs_BT, attention_BT, mask_BT, precision)
    logprobs_N, entropy_N = logprobs_and_entropy(hidden_NH, weight_VH, targets_BT[mask_BT], temperature)
    return _spread(logprobs_N, mask_BT), _spread(entropy_N.detach(), mask_BT)


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
    hidden_NH, weight_VH = _hidden_and_head(model, inputs_BT, attention_BT, mask_BT, precision)
    loss, *results_N = policy_loss(
        hidden_NH,
        weight_VH,
        targets_BT[mask_BT],
        temperature,
        lambda logprobs_N: per_token_loss(_spread(logprobs_N, mask_BT))[mask_BT],
    )
    return loss, *(_spread(result_N, mask_BT) for result_N in results_N)


def _hidden_and_head(model, inputs_BT, attention_BT, mask_BT, precision):
    """The backbone's hidden states of the response tokens, and the head's weight, in the dtype of the products."""
    padding = {}  # on the right it comes after all that is read, where causal attention does not look
    if not attention_BT[:, 0].all():
        # A token's position is the number of real tokens before it.
        positions_BT = (attention_BT.cumsum(dim=1) - 1).clamp(min=0)
        padding = {"attention_mask": attention_BT, "position_ids": positions_BT}
    with autocast(inputs_BT.device.type, precision):
        hidden_BTH = model.base_model(input_ids=inputs_BT, use_cache=False, **padding).last_hidden_state
    head = model.get_output_embeddings()
    hidden_NH, weight_VH = hidden_BTH[mask_BT], head.weight
    if getattr(head, "bias", None) is not None:  # one more feature, which is always 1
        hidden_NH = torch.cat([hidden_NH, hidden_NH.new_ones(len(hidden_NH), 1)], dim=1)
        weight_VH = torch.cat([weight_VH, head.bias.unsqueeze(1)], dim=1)
    dtype = torch.bfloat16 if precision == "bfloat16" else weight_VH.dtype
    return hidden_NH.to(dtype), weight_VH.to(dtype)


def _spread(values_N, mask_BT):
    """The values at their places in [B, T], 0 elsewhere."""
    return values_N.new_zeros(mask_BT.shape).masked_scatter(mask_BT, values_N)


# For hidden states: the two forms


def logprobs_and_entropy(hidden_NH, weight_VH, targets_N, temperature):
    """The general form: log-prob of each target and entropy of its distribution, differentiable in h and W.

    Args:
        hidden_NH, weight_VH: float32 or bfloat16, both alike; products are taken in that dtype, sums in float32.
        targets_N: int64. A negative target marks a row to ignore: both its results are 0 and it has no gradient,
            whatever it holds, NaN included.
        temperature: τ > 0.

    Rows whose upstream gradients are exactly zero cost no backward work. Gradients have the dtypes of h and W; they
    cannot be differentiated again, which raises a RuntimeError (but for small vocabularies on a CPU).
    Returns `logprobs_N` and `entropy_N`, float32. Raises ValueError for shapes, dtypes and targets that do not fit.
    """
    _check(hidden_NH, weight_VH, targets_N, temperature)
    counted_N = targets_N >= 0
    if not counted_N.all():
        results = logprobs_and_entropy(hidden_NH[counted_N], weight_VH, targets_N[counted_N], temperature)
        return tuple(_spread(result_N, counted_N) for result_N in results)
    if hidden_NH.is_cuda:
        from common import logprob_kernels  # triton is for GPUs; a CPU does without

        return logprob_kernels.logprobs_and_entropy(hidden_NH, weight_VH, targets_N, temperature)
    if len(weight_VH) >= LARGE_VOCABULARY:
        return SlicedLogprobs.apply(hidden_NH, weight_VH, targets_N, temperature)
    return plain_logprobs_and_entropy(hidden_NH, weight_VH, targets_N, temperature)


def policy_loss(hidden_NH, weight_VH, targets_N, temperature, per_token_loss):
    """The policy-loss form: Σ_n per_token_loss(logprobs)_n, where a token's loss sees that token's log-prob alone.

    Args:
        per_token_loss: `logprobs_N` (float32) → losses [N], elementwise and in plain PyTorch. It may be called more
            than once, and for some log-probs before the others are known.
        Others: as for `logprobs_and_entropy`.

    Returns `loss` (a scalar, differentiable in h and W), and detached, float32 [N], log-probs, entropies and the slopes
    d loss_n / d logprob_n. Tokens with a slope of exactly zero cost no backward work. The gradient exists once:
    a second backward pass through `loss` raises a RuntimeError. Raises ValueError as `logprobs_and_entropy` does.
    """
    _check(hidden_NH, weight_VH, targets_N, temperature)
    counted_N = targets_N >= 0
    if not counted_N.all():
        loss, *results = policy_loss(
            hidden_NH[counted_N],
            weight_VH,
            targets_N[counted_N],
            temperature,
            lambda logprobs: per_token_loss(_spread(logprobs, counted_N))[counted_N],
        )
        return loss, *(_spread(result, counted_N) for result in results)
    if hidden_NH.is_cuda:
        from common import logprob_kernels

        return logprob_kernels.policy_loss(hidden_NH, weight_VH, targets_N, temperature, per_token_loss)
    # On a CPU, where slices of V are cheaper than slices of N, the gradient has to wait for the last slice anyway.
    logprobs_N, entropy_N = logprobs_and_entropy(hidden_NH, weight_VH, targets_N, temperature)
    loss = per_token_loss(logprobs_N).sum()
    return loss, logprobs_N.detach(), entropy_N.detach(), slopes(per_token_loss, logprobs_N)


def slopes(per_token_loss, logprobs_N):
    """d loss_n / d logprob_n of an elementwise loss, float32 [N]."""
    with torch.enable_grad():
        leaf_N = logprobs_N.detach().requires_grad_()
        return torch.autograd.grad(per_token_loss(leaf_N).sum(), leaf_N)[0]


def _check(hidden_NH, weight_VH, targets_N, temperature):
    if hidden_NH.ndim != 2 or weight_VH.ndim != 2 or hidden_NH.shape[1] != weight_VH.shape[1]:
        raise ValueError(f"hidden [N, H] and weight [V, H] do not fit: {hidden_NH.shape}, {weight_VH.shape}.")
    if targets_N.shape != hidden_NH.shape[:1]:
        raise ValueError(f"there must be one target for each of the {len(hidden_NH)} rows, not {targets_N.shape}.")
    if hidden_NH.dtype != weight_VH.dtype or hidden_NH.dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise ValueError(f"hidden and weight must both be float32 or bfloat16: {hidden_NH.dtype}, {weight_VH.dtype}.")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a finite number above 0, not {temperature}.")
    if len(targets_N) and targets_N.max() >= len(weight_VH):
        raise ValueError(f"target {targets_N.max().item()} is outside the vocabulary of {len(weight_VH)}.")


# On a CPU


def plain_logprobs_and_entropy(hidden_NH, weight_VH, targets_N, temperature):
    """The plain expression, which holds several N × V tensors. Arguments and results: see `logprobs_and_entropy`."""
    # bf16 has 8 bits: a logit of 20 rounded to it is off by up to 0.06. Its products are exact in float32.
    dtype = torch.promote_types(hidden_NH.dtype, torch.float32)
    logits_NV = linear(hidden_NH.to(dtype), weight_VH.to(dtype)) / temperature
    logprobs_NV = torch.log_softmax(logits_NV, dim=-1)
    logprobs_N = logprobs_NV.gather(-1, targets_N.unsqueeze(-1)).squeeze(-1)
    # p log p → 0 as p → 0, also where a masked vocabulary entry has log p = −inf.
    entropy_N = -(logprobs_NV.exp() * logprobs_NV.clamp(min=torch.finfo(dtype).min)).sum(dim=-1)
    return logprobs_N, entropy_N


class SlicedLogprobs(torch.autograd.Function):
    """The general form in slices of V: one pass for the sums, and one in the backward pass for the gradients.

    Walking over V with all rows at once, rather than over N, makes each slice of dW one product, written once.

    PyTorch on a CPU returns a bf16 product rounded to bf16, which is too coarse for a logit of 20. But what a softmax
    needs are *differences* of logits, and those that matter are small: p_v = exp(z_v − lse) is largest where z_v − lse
    is nearest to 0. So a centre c close to the row's largest logits is subtracted inside of the product
    (`addmm`, which rounds once, at its end), and rounding then costs p_v no more than 2⁻⁸ |log p_v| of itself, at most
    1.4e-3 in absolute terms. The target's logit, the one number that shows by itself, is computed in float32.
    """

    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, targets_N, temperature):
        targeted_N = (hidden_NH.float() * weight_VH[targets_N].float()).sum(dim=1)
        # The target was drawn from this distribution, as a rule, so that its logit is a good first centre.
        centre_N = targeted_N.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).to(hidden_NH.dtype)
        # In bits (base 2, which is the fastest exponential): x = (z − c) log₂e; these are Σ 2^x and Σ 2^x x.
        bits = math.log2(math.e) / temperature
        sum_N, weighted_N = torch.zeros_like(targeted_N), torch.zeros_like(targeted_N)
        # How far the largest logit may be above the centre. In bf16, 1 costs log-probs 2e-4 on average and 1e-3 at
        # most; 4 would save an eighth of this pass for four times the error. In float32 2^x must stay in range.
        limit = (1.0 if hidden_NH.dtype == torch.bfloat16 else 16.0) * temperature

        for start in range(0, len(weight_VH), SLICE):
            weight_vH = weight_VH[start : start + SLICE]
            logits_Nv = torch.addmm(-centre_N.unsqueeze(1), hidden_NH, weight_vH.T)
            peak_N = logits_Nv.amax(dim=1).float()
            # Rows that meet larger logits than before get a centre up there, and their slice of logits once more. A
            # centre that is too high, where all of 2^x underflows, can only be the first.
            too_low_N, too_high_N = peak_N > limit, (peak_N < -limit) & peak_N.isfinite() & (sum_N == 0)
            rows = (too_low_N | too_high_N).nonzero().squeeze(1)
            if len(rows):
                centre = (centre_N[rows].float() + peak_N[rows]).to(hidden_NH.dtype)
                shift = (bits * (centre_N[rows].float() - centre.float())).clamp(max=0.0)
                weighted_N[rows] = shift.exp2() * (weighted_N[rows] + shift * sum_N[rows])
                sum_N[rows] *= shift.exp2()
                centre_N[rows] = centre
                logits_Nv[rows] = torch.addmm(-centre.unsqueeze(1), hidden_NH[rows], weight_vH.T)
            # 2^−1000 is 0 in float32; a masked entry's −inf would make NaN of 2^x x.
            x_Nv = logits_Nv.float().mul_(bits).clamp_(min=-1000.0)
            rows, columns = _targets_within(targets_N, start, x_Nv.shape[1])
            x_Nv[rows, columns] = bits * (targeted_N[rows] - centre_N[rows].float()).clamp(min=-1000.0)
            powers_Nv = x_Nv.exp2()
            sum_N += powers_Nv.sum(dim=1)
            weighted_N += x_Nv.mul_(powers_Nv).sum(dim=1)

        log_sum_N = sum_N.log()
        logprobs_N = (targeted_N - centre_N.float()) / temperature - log_sum_N
        entropy_N = log_sum_N - math.log(2) * weighted_N / sum_N
        # For the backward pass: the centre that is nearest to the log-sum-exp, and what is left between the two.
        lse_centre_N = (centre_N.float() + temperature * log_sum_N).to(hidden_NH.dtype)
        rest_N = log_sum_N + (centre_N.float() - lse_centre_N.float()) / temperature
        ctx.save_for_backward(hidden_NH, weight_VH, targets_N, lse_centre_N, rest_N, logprobs_N, entropy_N)
        ctx.temperature = temperature
        return logprobs_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogprobs_N, dentropy_N):
        hidden_NH, weight_VH, *per_row = ctx.saved_tensors
        # Only rows with a gradient: the others cost nothing, and whatever they hold stays out of the products.
        rows = ((dlogprobs_N != 0) | (dentropy_N != 0)).nonzero().squeeze(1)
        all_rows = len(rows) == len(hidden_NH)
        live_nH = hidden_NH if all_rows else hidden_NH[rows]
        targets_n, centre_n, rest_n, logprobs_n, entropy_n = (t if all_rows else t[rows] for t in per_row)
        a_n, b_n = dlogprobs_N[rows] / ctx.temperature, dentropy_N[rows] / ctx.temperature
        bits = math.log2(math.e) / ctx.temperature
        # dL/dz = a (1[v = y] − p) − b p (log p + entropy), with the target's own entry from its float32 log-prob.
        at_target_n = -a_n * logprobs_n.expm1() - b_n * logprobs_n.exp() * (logprobs_n + entropy_n)
        # Of log p + entropy, the difference of two nearly equal numbers where p is flat, bf16 would leave nothing.
        has_entropy = bool((b_n != 0).any())
        product_nH, product_centre_n = (t.float() if has_entropy else t for t in (live_nH, centre_n))

        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        # The target's own entry is a row's largest: for dh it is multiplied in float32, apart from the others.
        dhidden_nH = at_target_n.unsqueeze(1) * weight_VH[targets_n].float()
        dweight_VH = torch.empty_like(weight_VH) if wants_weight and len(rows) else torch.zeros_like(weight_VH)
        for start in range(0, len(weight_VH) if len(rows) else 0, SLICE):
            weight_vH = weight_VH[start : start + SLICE]
            logits_nv = torch.addmm(-product_centre_n.unsqueeze(1), product_nH, weight_vH.to(product_nH.dtype).T)
            log2p_nv = torch.add(-math.log2(math.e) * rest_n.unsqueeze(1), logits_nv, alpha=bits)
            if has_entropy:
                log2p_nv.clamp_(min=-1000.0)  # as in the forward pass
                factor_nv = log2p_nv.mul(math.log(2)).add_(entropy_n.unsqueeze(1)).mul_(b_n.unsqueeze(1))
                grad_nv = log2p_nv.exp2_().mul_(factor_nv.add_(a_n.unsqueeze(1)).neg_())
            else:
                grad_nv = log2p_nv.exp2_().mul_(-a_n.unsqueeze(1))
            rows_within, columns = _targets_within(targets_n, start, grad_nv.shape[1])
            grad_nv[rows_within, columns] = at_target_n[rows_within]
            grad_nv = grad_nv.to(weight_VH.dtype)
            if wants_weight:
                torch.mm(grad_nv.T, live_nH, out=dweight_VH[start : start + SLICE])
            if wants_hidden:
                grad_nv[rows_within, columns] = 0.0
                dhidden_nH += grad_nv @ weight_vH

        dhidden_NH = None
        if wants_hidden:
            dhidden_NH = torch.zeros_like(hidden_NH).index_copy_(0, rows, dhidden_nH.to(hidden_NH.dtype))
        return dhidden_NH, dweight_VH if wants_weight else None, None, None


def _targets_within(targets_N, start, width):
    """Rows whose target lies in the slice of `width` entries from `start`, and the target's column in it."""
    rows = ((targets_N >= start) & (targets_N < start + width)).nonzero().squeeze(1)
    return rows, targets_N[rows] - start
