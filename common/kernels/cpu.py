"""Log-probs and entropies on a CPU: all logits at once, or the vocabulary in slices."""

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid

from common.kernels import LN_2, LOG2_E, gradient_at_target, live_rows, target_against_others
from common.layers import linear

# Vocabulary entries in a slice; with 512 rows its 8 MB of float32 stay in a CPU's last-level cache
# between passes.
SLICE = 4096


def plain_logprobs_and_entropy(hidden_NH, weight_VH, targets_N, cap=None):
    """The plain expression, which holds several N × V tensors.

    Arguments and results are those of `logprobs.logprobs_and_entropy`.
    """
    # bf16 has 8 bits: a logit of 20 rounded to it is off by up to 0.06. Products of bf16 numbers
    # are exact in float32.
    dtype = torch.promote_types(hidden_NH.dtype, torch.float32)
    rounded_VH = weight_VH.to(hidden_NH.dtype)
    logits_NV = capped(linear(hidden_NH.to(dtype), rounded_VH.to(dtype)), cap)
    logprobs_NV = torch.log_softmax(logits_NV, dim=-1)
    logprobs_N = logprobs_NV.gather(-1, targets_N.unsqueeze(-1)).squeeze(-1)
    # p log p → 0 as p → 0, also where a masked vocabulary entry has log p = −inf.
    finite_NV = logprobs_NV.clamp(min=torch.finfo(dtype).min)
    entropy_N = -(logprobs_NV.exp() * finite_NV).sum(dim=-1)
    return logprobs_N, entropy_N


def capped(logits, cap):
    """c tanh(z / c), which stays between −c and c; z itself if `cap` is None."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


class SlicedLogprobs(torch.autograd.Function):
    """`logprobs.logprobs_and_entropy` in slices of V.

    There is one pass over V for the sums, and one in the backward pass for the gradients. Walking
    over V with all rows at once, rather than over N, makes each slice of dW one product, written
    once.

    PyTorch on a CPU returns a bf16 product rounded to bf16, which is too coarse for a logit of 20.
    But what a softmax needs are *differences* of logits, and those that matter are small: among the
    others, entry v has the share exp(z_v − log s), which is largest where z_v − log s is nearest to
    0. So a centre c close to the largest logits of the others is subtracted inside of the product
    (which rounds once, at its end), and rounding then costs a share q no more than 2⁻⁸ |log q| of
    itself, at most 1.4e-3 in absolute terms, and that times 1 − p_y in the gradient. The target's
    logit, the one number that shows by itself, is computed in float32. (So is everything where
    logits are capped: the centre can be subtracted only afterwards.)
    """

    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, targets_N, cap=None):
        ctx.cap = cap
        target_weight_NH = weight_VH[targets_N].to(hidden_NH.dtype)
        targeted_N = (hidden_NH.float() * target_weight_NH.float()).sum(dim=1)
        targeted_N = capped(targeted_N, cap)
        centre_N = targeted_N.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).to(hidden_NH.dtype)
        # In bits (base 2, which is the fastest exponential), with x = (z − c) log₂e
        sum_N = torch.zeros_like(targeted_N)  # Σ 2^x
        weighted_N = torch.zeros_like(targeted_N)  # Σ 2^x x
        # How far the largest logit may be above the centre. In bf16, 1 costs log-probs 2e-4 on
        # average and 1e-3 at most. In float32 2^x must stay in range.
        limit = 1.0 if hidden_NH.dtype == torch.bfloat16 else 16.0

        for start in range(0, len(weight_VH) if len(hidden_NH) else 0, SLICE):
            weight_vH = weight_VH[start : start + SLICE].to(hidden_NH.dtype)
            logits_vN = _logits_above(centre_N, weight_vH, hidden_NH, cap)
            target_places = _targets_within(targets_N, start, len(weight_vH))
            logits_vN[target_places] = -torch.inf
            peak_N = logits_vN.amax(dim=0).float()
            # Rows that meet larger logits than before get a centre up there, and their slice of
            # logits once more. The first centre, the target's logit, may be too high as well.
            too_low_N = peak_N > limit
            too_high_N = (peak_N < -limit) & peak_N.isfinite() & (sum_N == 0)
            rows = (too_low_N | too_high_N).nonzero().squeeze(1)
            if len(rows):
                centre = (centre_N[rows].float() + peak_N[rows]).to(hidden_NH.dtype)
                shift = (LOG2_E * (centre_N[rows].float() - centre.float())).clamp(max=0.0)
                weighted_N[rows] = shift.exp2() * (weighted_N[rows] + shift * sum_N[rows])
                sum_N[rows] *= shift.exp2()
                centre_N[rows] = centre
                logits_vN[:, rows] = _logits_above(centre, weight_vH, hidden_NH[rows], cap)
                logits_vN[target_places] = -torch.inf
            # 2^−1000 is 0 in float32; with the −inf of targets and masked entries, 2^x x would be
            # NaN.
            x_vN = logits_vN.float().mul_(LOG2_E).clamp_(min=-1000.0)
            powers_vN = x_vN.exp2()
            sum_N += powers_vN.sum(dim=0)
            weighted_N += x_vN.mul_(powers_vN).sum(dim=0)

        sum_N.clamp_(min=torch.finfo(torch.float32).tiny)  # where nothing but the target is allowed
        log_sum_N = sum_N.log()
        odds_N = (targeted_N - centre_N.float()) - log_sum_N
        entropy_of_others_N = log_sum_N - LN_2 * weighted_N / sum_N
        logprobs_N, entropy_N = target_against_others(odds_N, entropy_of_others_N)

        # For the backward pass: the centre that is nearest to log s, and by how much log p_v is
        # below z_v − centre.
        near_N = (centre_N.float() + log_sum_N).to(hidden_NH.dtype)
        rest_N = log_sum_N + (centre_N.float() - near_N.float()) - logsigmoid(-odds_N)
        slope_N = torch.ones_like(targeted_N)  # of the target's logit in W h
        if cap is not None:
            slope_N = 1 - (targeted_N / cap).square()
        ctx.save_for_backward(
            hidden_NH, weight_VH, targets_N, near_N, rest_N, odds_N, entropy_N, slope_N
        )
        return logprobs_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx, a_N, b_N):
        hidden_NH, weight_VH, *per_row = ctx.saved_tensors
        live, live_nH, targets_n, centre_n, rest_n, odds_n, entropy_n, slope_n, a_n, b_n = (
            live_rows(a_N, b_N, hidden_NH, *per_row, a_N, b_N)
        )
        at_target_n = gradient_at_target(odds_n, entropy_n, a_n, b_n)
        # log p + entropy is the difference of two nearly equal numbers where p is flat: in bf16
        # nothing would be left of it.
        has_entropy = bool((b_n != 0).any())
        in_float32 = has_entropy or ctx.cap is not None
        dtype = torch.float32 if in_float32 else hidden_NH.dtype

        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        # The target's own entry is a row's largest: for dh it is multiplied in float32, apart from
        # the others.
        target_weight_nH = weight_VH[targets_n].to(hidden_NH.dtype)
        dhidden_nH = (at_target_n * slope_n).unsqueeze(1) * target_weight_nH.float()
        dweight_VH = None
        if wants_weight:
            dweight_VH = torch.empty_like(weight_VH) if len(live) else torch.zeros_like(weight_VH)
        factor_nH = live_nH.detach().to(dtype).requires_grad_(wants_hidden)
        for start in range(0, len(weight_VH) if len(live) else 0, SLICE):
            weight_vH = weight_VH[start : start + SLICE].detach().to(hidden_NH.dtype).to(dtype)
            weight_vH.requires_grad_(wants_weight)
            with torch.enable_grad():
                logits_vn = _logits_above(centre_n.to(dtype), weight_vH, factor_nH, ctx.cap)
            log2p_vn = logits_vn.detach().float().mul_(LOG2_E).sub_(LOG2_E * rest_n)
            # dL/dz = −a p − b p (log p + entropy), and the target's own entry
            if has_entropy:
                log2p_vn.clamp_(min=-1000.0)  # as in the forward pass
                factor_vn = log2p_vn.mul(LN_2).add_(entropy_n).mul_(b_n)
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

        dhidden_NH = torch.zeros_like(hidden_NH)
        dhidden_NH.index_copy_(0, live, dhidden_nH.to(hidden_NH.dtype))
        return dhidden_NH, dweight_VH, None, None


def _logits_above(centre_N, weight_vH, hidden_NH, cap):
    """z − c, [v, N]: of uncapped logits in one product, which is rounded once."""
    if cap is None:
        return linear(weight_vH, hidden_NH, -centre_N)
    return capped(linear(weight_vH.float(), hidden_NH.float()), cap) - centre_N.float()


def _targets_within(targets_N, start, width):
    """Places of the targets in the slice of `width` entries from `start`.

    Two indices of a slice [v, N]: entries and rows.
    """
    rows = ((targets_N >= start) & (targets_N < start + width)).nonzero().squeeze(1)
    return targets_N[rows] - start, rows
