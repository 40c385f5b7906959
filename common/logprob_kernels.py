"""Log-prob and entropy kernels in Triton, for GPUs; what they compute is in `logprobs.py`, which calls them.

The notation is that of `logprobs.py`: h [N, H], W [V, H], y [N], τ. Inside, everything is in bits, base 2, since a
GPU's exponential is 2^x: x = (log₂e / τ) h Wᵀ, and over all entries but the target m = max_v x_v, s = Σ_v 2^(x_v − m).
So p_v = 2^((x_v − m) − r) with r = log₂ s − log₂(1 − p_y). (m + r is not formed: next to an m of 1,000 it would lose r
its last three digits.) Products are taken in the
dtype of h and W, bf16 as a rule, and summed in float32, and x never leaves float32 registers: rounding a logit of 20 to
bf16 would shift its log-prob by up to 0.06.

    forward        one pass over V: Σ 2^x, Σ 2^x x and x_y per row                                   2·N·H·V
    general        backward: x again, slice by slice of V, gradients as they go by                 +6·N·H·V
    policy loss    backward within the forward pass: 2^x is still at hand when its sum is known    +4·N·H·V

Products whose factors both exist in memory (dW = Gᵀ h, dh = G W, for a slice G of the logits' gradient) are left to
cuBLAS. Triton does the products that must not be written out: those that make x.

Offsets are 64-bit wherever N × V or V × H enters: 16,384 × 151,936 is beyond 2³¹. (But a W that is stored transposed
has to have fewer than 2³¹ elements.)
"""

import math

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid

from common.logprobs import gradient_at_target, live_rows, loss_of, slopes, target_against_others

LOG2_E = math.log2(math.e)
LN_2 = math.log(2)

SPLIT = 8192
"""vocabulary entries that one program of the forward kernel walks over at most"""
GENERAL_SLICE_BYTES = 2**28
"""size of a slice of the logits' gradient in the general form; for every slice all of dh is read and written"""
POWERS_BYTES, POLICY_SLICE_BYTES = 2**29, 2**26
"""what the policy-loss form keeps of a chunk's logits, and of their gradient; for every chunk all of dW is read and
written, so that chunks should be large"""
FLOAT32_SUM_BYTES = 7 * 2**27
"""largest float32 sum of a bf16 dW in the policy-loss form: less its result, but with powers and slice, 1 GiB"""
GROUP = 16
"""row blocks that programs which run together share: with 8 places each in the vocabulary they fill a GPU, and want 16
blocks of h, which stay in its level-2 cache, and 8 of W, rather than all of h for each tile of W"""


def _blocks(hidden_NH):
    """Tile sizes and launch options by dtype of the products and by GPU.

    bf16: a tile of 128 × 256 float32 sums is 128 registers for each of 256 threads, half of what a thread can have; the
    other half is for the epilogue's powers (compiled for Hopper, the kernels take all 255 and spill next to none). It
    is made of 128 × 64 of h and 256 × 64 of W, 48 KB, of which three stages, one in use and two on their way, fit into
    Hopper's 227 KB of shared memory. Each byte that is loaded serves 43 multiplications; a level-2 cache delivers about
    enough for that. Other GPUs, whose products take their factors from registers too, get half the tile, in stages of
    16 KB. float32: true float32 products do not run on tensor cores; small tiles keep them in registers.
    """
    if hidden_NH.dtype != torch.bfloat16:
        return {"BLOCK_N": 64, "BLOCK_V": 64, "BLOCK_H": 32, "num_warps": 4, "num_stages": 2}
    properties = torch.cuda.get_device_properties(hidden_NH.device) if hidden_NH.is_cuda else None
    if properties is None or properties.shared_memory_per_block_optin > 200 * 1024:
        return {"BLOCK_N": 128, "BLOCK_V": 256, "BLOCK_H": 64, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_N": 128, "BLOCK_V": 128, "BLOCK_H": 32, "num_warps": 8, "num_stages": 3}


def _split(N, V, blocks, device):
    """Vocabulary entries per program of the forward kernel: as many programs as fill the GPU a whole number of times.

    A chunk of the policy-loss form has few rows, 6 blocks of 128 for V = 151,936. With splits of 8,192 that is 114
    programs on 132 multiprocessors, of which 18 would idle; with 22 splits of 6,912 none does.
    """
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
    row_blocks = max(1, triton.cdiv(N, blocks["BLOCK_N"]))
    times = triton.cdiv(row_blocks * triton.cdiv(V, SPLIT), multiprocessors)
    num_splits = max(1, times * multiprocessors // row_blocks)
    return triton.cdiv(triton.cdiv(V, num_splits), blocks["BLOCK_V"]) * blocks["BLOCK_V"]


@triton.jit
def _product_tile(
    hidden, weight, rows, columns, N, V, H, hidden_n, hidden_h, weight_v, weight_h,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One tile [BLOCK_N, BLOCK_V] of h Wᵀ, summed in float32 along H; 0 outside of the matrices."""
    features = tl.arange(0, BLOCK_H)
    hidden_rows = hidden + rows[:, None].to(tl.int64) * hidden_n
    weight_columns = weight + columns[None, :].to(tl.int64) * weight_v
    sums = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for start in range(0, H, BLOCK_H):
        k = start + features
        hidden_tile = tl.load(
            hidden_rows + k[None, :] * hidden_h, mask=(rows[:, None] < N) & (k[None, :] < H), other=0.0
        )
        weight_tile = tl.load(
            weight_columns + k[:, None] * weight_h, mask=(k[:, None] < H) & (columns[None, :] < V), other=0.0
        )
        sums = tl.dot(hidden_tile, weight_tile, sums, input_precision="ieee")
    return sums


@triton.jit
def _block_and_place(num_row_blocks, GROUP: tl.constexpr):
    """Which row block and which place along the vocabulary this program has: `GROUP` row blocks go first, then on."""
    program, group_programs = tl.program_id(0), GROUP * (tl.num_programs(0) // num_row_blocks)
    first = program // group_programs * GROUP
    height = tl.minimum(num_row_blocks - first, GROUP)
    within = program % group_programs
    return first + within % height, within // height


@triton.jit(do_not_specialize=["N"])  # micro-batches have any number of rows, and would be compiled for each kind
def _forward_kernel(
    hidden, weight, targets, largest, sums, weighted, targeted, powers, references,
    N, V, H, hidden_n, hidden_h, weight_v, weight_h, bits, SPLIT, KEEP_POWERS: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Row statistics over one split of the vocabulary.

    Equation: over the split's entries but the target, m = max_v x_v, s = Σ_v 2^(x_v − m) and
    t = Σ_v 2^(x_v − m) (x_v − m). When a tile raises the maximum from m to m', what was summed so far moves along:

        s ← s 2^(m − m')        t ← (t + (m − m') s) 2^(m − m')

    Tile walk: a program owns BLOCK_N rows and walks over the SPLIT entries of one split, BLOCK_V at a time. Programs
    that run together share row blocks and splits, see `GROUP`. Splits, see `_split`, give a GPU something to share if
    there are few rows. Nothing is added up across programs, so no sum depends on which one is faster; `_statistics`
    combines the splits.

    With KEEP_POWERS, 2^(x − m) of each tile is kept in bf16 (m as it stands after that tile, kept too in `references`):
    relative to their row's maximum so far, powers are at most 1 and rounded relatively to their own size.
    """
    block, split = _block_and_place(tl.cdiv(N, BLOCK_N), GROUP)
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    target = tl.load(targets + rows, mask=rows < N, other=-1).to(tl.int32)
    # −1e30 stands for −∞, of masked entries and of a maximum over nothing: 2^−1e30 = 0, and 0 · −1e30 is no NaN. If a
    # whole tile is masked its powers are 2⁰, but the first real maximum, here or in another split, scales them to 0.
    m = tl.full((BLOCK_N,), -1e30, tl.float32)
    s = tl.zeros((BLOCK_N,), tl.float32)
    t = tl.zeros((BLOCK_N,), tl.float32)
    x_target = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(split * SPLIT, tl.minimum((split + 1) * SPLIT, V), BLOCK_V):
        columns = first + tl.arange(0, BLOCK_V)
        x = bits * _product_tile(
            hidden, weight, rows, columns, N, V, H, hidden_n, hidden_h, weight_v, weight_h,
            BLOCK_N, BLOCK_V, BLOCK_H,
        )  # fmt: skip
        is_target = columns[None, :] == target[:, None]
        x_target += tl.sum(tl.where(is_target, x, 0.0), axis=1)
        x = tl.where(is_target | (columns[None, :] >= V), -1e30, x)
        x = tl.where(x < -1e30, -1e30, x)  # and not a maximum, which would lose a NaN
        raised = tl.maximum(m, tl.max(x, axis=1))
        x -= raised[:, None]
        power = tl.exp2(x)
        moved = tl.exp2(m - raised)
        t = (t + (m - raised) * s) * moved + tl.sum(power * x, axis=1)
        s = s * moved + tl.sum(power, axis=1)
        m = raised
        if KEEP_POWERS:
            places = rows[:, None].to(tl.int64) * V + columns[None, :]
            inside = (rows[:, None] < N) & (columns[None, :] < V)
            tl.store(powers + places, power.to(powers.dtype.element_ty), mask=inside)
            tl.store(references + (first // BLOCK_V) * N + rows, m, mask=rows < N)
    tl.store(largest + split * N + rows, m, mask=rows < N)
    tl.store(sums + split * N + rows, s, mask=rows < N)
    tl.store(weighted + split * N + rows, t, mask=rows < N)
    here = (rows < N) & (target >= split * SPLIT) & (target < (split + 1) * SPLIT)  # one split has a row's target
    tl.store(targeted + rows, x_target, mask=here)


@triton.jit(do_not_specialize=["N", "first_column"])
def _gradient_kernel(
    hidden, weight, targets, largest, rest, entropy, dlogprob, dentropy, at_target, grad,
    N, V, H, first_column, hidden_n, hidden_h, weight_v, weight_h, bits, GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """A slice of the logits' gradient, from logits that are computed again.

    Equation, with upstream gradients a and b (already divided by τ) of log-prob and entropy:

        p = 2^((x − m) − r)        G = −a p − b p (ln p + entropy), and at the target what was computed beforehand

    Tile walk: one tile of G per program, those of a `GROUP` of row blocks together. `weight` points at the slice, whose
    first entry is `first_column` of the vocabulary; V is the slice's width.
    """
    block, tile = _block_and_place(tl.cdiv(N, BLOCK_N), GROUP)
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    x = bits * _product_tile(
        hidden, weight, rows, columns, N, V, H, hidden_n, hidden_h, weight_v, weight_h,
        BLOCK_N, BLOCK_V, BLOCK_H,
    )  # fmt: skip
    exists = rows < N
    target = tl.load(targets + rows, mask=exists, other=-1).to(tl.int32) - first_column
    a = tl.load(dlogprob + rows, mask=exists, other=0.0)
    b = tl.load(dentropy + rows, mask=exists, other=0.0)
    log2_p = x - tl.load(largest + rows, mask=exists, other=0.0)[:, None]
    log2_p -= tl.load(rest + rows, mask=exists, other=0.0)[:, None]
    log2_p = tl.where(log2_p < -1e30, -1e30, log2_p)
    surprise = 0.6931471805599453 * log2_p + tl.load(entropy + rows, mask=exists, other=0.0)[:, None]
    g = -tl.exp2(log2_p) * (a[:, None] + b[:, None] * surprise)
    g = tl.where(columns[None, :] == target[:, None], tl.load(at_target + rows, mask=exists, other=0.0)[:, None], g)
    places = rows[:, None].to(tl.int64) * V + columns[None, :]
    tl.store(grad + places, g.to(grad.dtype.element_ty), mask=exists[:, None] & (columns[None, :] < V))


@triton.jit(do_not_specialize=["num_rows", "num_live", "first_column"])
def _finish_kernel(
    powers, references, live, targets, largest, rest, slope, at_target, grad,
    num_rows, num_live, V, width, first_column, REFERENCE_V: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A slice of the logits' gradient from kept powers, for the live rows only, packed.

    Equation: G = −a 2^(x − f) 2^((f − m) − r), where 2^(x − f) was kept and f is its tile's reference; and at the
    target what was computed beforehand.
    Tile walk: BLOCK_N live rows by one tile's REFERENCE_V columns per program, which share one reference per row. Reads
    and writes each value once: bound by memory, so that the tile only has to be wide enough for whole cache lines. The
    slice has `width` entries of the vocabulary, from `first_column` on, a multiple of REFERENCE_V.
    """
    places = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = places < num_live
    columns = tl.program_id(1) * REFERENCE_V + tl.arange(0, REFERENCE_V)
    tile = first_column // REFERENCE_V + tl.program_id(1)
    inside = exists[:, None] & (columns[None, :] < width)
    rows = tl.load(live + places, mask=exists, other=0)
    a = tl.load(slope + rows, mask=exists, other=0.0)
    target = tl.load(targets + rows, mask=exists, other=-1).to(tl.int32) - first_column
    reference = tl.load(references + tile * num_rows + rows, mask=exists, other=0.0)
    m = tl.load(largest + rows, mask=exists, other=0.0)
    scale = tl.exp2((reference - m) - tl.load(rest + rows, mask=exists, other=0.0))
    kept = powers + rows[:, None].to(tl.int64) * V + first_column + columns[None, :]
    power = tl.load(kept, mask=inside, other=0.0).to(tl.float32)
    own = tl.load(at_target + rows, mask=exists, other=0.0)
    g = tl.where(columns[None, :] == target[:, None], own[:, None], -(a * scale)[:, None] * power)
    tl.store(grad + places[:, None].to(tl.int64) * width + columns[None, :], g.to(grad.dtype.element_ty), mask=inside)


def _statistics(hidden_NH, weight_VH, targets_N, temperature, keep_powers=False):
    """Run the forward kernel and combine its splits, in a fixed order.

    Returns float32 [N]: log-prob, entropy, log-odds of the target, m, r; then the powers [N, V] and their references
    [tiles, N], or None.
    """
    (N, H), V, device = hidden_NH.shape, len(weight_VH), hidden_NH.device
    blocks, targets_N = _blocks(hidden_NH), targets_N.contiguous()
    split = _split(N, V, blocks, device)
    num_splits = triton.cdiv(V, split)
    m_SN, s_SN, t_SN = (torch.empty(num_splits, N, dtype=torch.float32, device=device) for _ in range(3))
    x_target_N = torch.empty(N, dtype=torch.float32, device=device)
    powers_NV = references_TN = None
    if keep_powers:
        powers_NV = torch.empty(N, V, dtype=hidden_NH.dtype, device=device)
        references_TN = torch.empty(triton.cdiv(V, blocks["BLOCK_V"]), N, dtype=torch.float32, device=device)
    if N:
        with torch.cuda.device_of(hidden_NH):
            _forward_kernel[(triton.cdiv(N, blocks["BLOCK_N"]) * num_splits,)](
                hidden_NH, weight_VH, targets_N, m_SN, s_SN, t_SN, x_target_N, powers_NV, references_TN,
                N, V, H, *hidden_NH.stride(), *weight_VH.stride(), LOG2_E / temperature,
                split, KEEP_POWERS=keep_powers, GROUP=GROUP, **blocks,
            )  # fmt: skip
    m_N = m_SN.amax(dim=0)
    moved_SN = torch.exp2(m_SN - m_N)
    s_N = (moved_SN * s_SN).sum(dim=0)
    t_N = (moved_SN * (t_SN + (m_SN - m_N) * s_SN)).sum(dim=0)
    log2_s_N = s_N.log2()
    # Differences first: x_y − m is small where x_y itself may be in the thousands.
    odds_N = LN_2 * ((x_target_N - m_N) - log2_s_N)
    logprobs_N, entropy_N = target_against_others(odds_N, LN_2 * (log2_s_N - t_N / s_N))
    rest_N = log2_s_N - LOG2_E * logsigmoid(-odds_N)
    return logprobs_N, entropy_N, odds_N, m_N, rest_N, powers_NV, references_TN


def logprobs_and_entropy(hidden_NH, weight_VH, targets_N, temperature):
    """The general form. See `logprobs.logprobs_and_entropy`, which checks the arguments."""
    return _LogprobsAndEntropy.apply(hidden_NH, weight_VH, targets_N, temperature)


class _LogprobsAndEntropy(torch.autograd.Function):
    """Walks over V in the backward pass, all live rows at once: a slice of dW is one product, and only dh is a sum."""

    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, targets_N, temperature):
        ctx.weight_dtype, weight_VH = weight_VH.dtype, weight_VH.to(hidden_NH.dtype)
        logprobs_N, entropy_N, odds_N, m_N, rest_N, _, _ = _statistics(hidden_NH, weight_VH, targets_N, temperature)
        ctx.save_for_backward(hidden_NH, weight_VH, targets_N.contiguous(), odds_N, m_N, rest_N, entropy_N)
        ctx.temperature = temperature
        return logprobs_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogprobs_N, dentropy_N):
        hidden_NH, weight_VH, *per_row = ctx.saved_tensors
        live, live_nH, targets_n, odds_n, m_n, rest_n, entropy_n, a_n, b_n = live_rows(
            dlogprobs_N, dentropy_N, hidden_NH, *per_row, dlogprobs_N / ctx.temperature, dentropy_N / ctx.temperature
        )
        at_target_n = gradient_at_target(odds_n, entropy_n, a_n, b_n)

        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        (n, H), V, blocks = live_nH.shape, len(weight_VH), _blocks(hidden_NH)
        dhidden_nH = torch.zeros(n, H, dtype=torch.float32, device=hidden_NH.device)
        dweight_VH = None
        if wants_weight:
            dweight_VH = (torch.empty_like if n else torch.zeros_like)(weight_VH, dtype=ctx.weight_dtype)
        width = _multiple_of(blocks["BLOCK_V"], GENERAL_SLICE_BYTES // (hidden_NH.element_size() * max(1, n)))
        for start in range(0, V if n else 0, width):
            weight_vH = weight_VH[start : start + width]
            grad_nv = None  # the last slice goes before the next one comes
            grad_nv = torch.empty(n, len(weight_vH), dtype=hidden_NH.dtype, device=hidden_NH.device)
            with torch.cuda.device_of(hidden_NH):
                _gradient_kernel[(triton.cdiv(n, blocks["BLOCK_N"]) * triton.cdiv(len(weight_vH), blocks["BLOCK_V"]),)](
                    live_nH, weight_vH, targets_n, m_n, rest_n, entropy_n, a_n, b_n, at_target_n, grad_nv,
                    n, len(weight_vH), H, start, *live_nH.stride(), *weight_vH.stride(), LOG2_E / ctx.temperature,
                    GROUP=GROUP, **blocks,
                )  # fmt: skip
            if wants_weight:
                _write_product(dweight_VH[start : start + width], grad_nv.T, live_nH)
            if wants_hidden:
                _add_product(dhidden_nH, grad_nv, weight_vH)
        dhidden_NH = None
        if wants_hidden:
            dhidden_NH = torch.zeros_like(hidden_NH).index_copy_(0, live, dhidden_nH.to(hidden_NH.dtype))
        return dhidden_NH, dweight_VH, None, None


def policy_loss(hidden_NH, weight_VH, targets_N, temperature, per_token_loss):
    """The policy-loss form. See `logprobs.policy_loss`, which checks the arguments."""
    wants_gradient = torch.is_grad_enabled() and (hidden_NH.requires_grad or weight_VH.requires_grad)
    # dW is a float32 sum. For a float32 W it is the result; next to a large bf16 one it would be the largest tensor of
    # all, and the general form, which needs no sum, is taken instead.
    sum_bytes = 4 * weight_VH.numel() if weight_VH.requires_grad and weight_VH.dtype != torch.float32 else 0
    if wants_gradient and sum_bytes <= FLOAT32_SUM_BYTES:
        return _PolicyLoss.apply(hidden_NH, weight_VH, targets_N, temperature, per_token_loss)
    return loss_of(*logprobs_and_entropy(hidden_NH, weight_VH, targets_N, temperature), per_token_loss)


class _PolicyLoss(torch.autograd.Function):
    """Walks over N in chunks of rows whose powers 2^x fit into memory.

    As soon as a chunk's sums are known, so are its log-probs, the slopes of its tokens' losses, and with them its part
    of the gradient: x is not computed a second time. dW is a sum over chunks, in float32, and stays so for a float32 W.
    """

    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, targets_N, temperature, per_token_loss):
        (N, H), V, device = hidden_NH.shape, len(weight_VH), hidden_NH.device
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        logprobs_N, entropy_N, slopes_N = torch.zeros(3, N, dtype=torch.float32, device=device)
        dhidden_NH = torch.zeros_like(hidden_NH) if wants_hidden else None
        dweight_VH = torch.zeros(V, H, dtype=torch.float32, device=device) if wants_weight else None
        blocks, weight_VH, item = _blocks(hidden_NH), weight_VH.to(hidden_NH.dtype), hidden_NH.element_size()
        height = _multiple_of(blocks["BLOCK_N"], POWERS_BYTES // (item * V))
        for start in range(0, N, height):
            chunk = slice(start, start + height)
            hidden_cH, targets_c = hidden_NH[chunk], targets_N[chunk].contiguous()
            powers_cV = None  # the last chunk's go before the next ones come
            logprobs_N[chunk], entropy_N[chunk], odds_c, m_c, rest_c, powers_cV, references_Tc = _statistics(
                hidden_cH, weight_VH, targets_c, temperature, keep_powers=True
            )
            # The loss is elementwise, so it can be asked about all tokens though only those so far have a log-prob.
            slopes_N[chunk] = slopes(per_token_loss, logprobs_N)[chunk]
            live = slopes_N[chunk].nonzero().squeeze(1)
            slopes_c, live_nH, n = slopes_N[chunk] / temperature, hidden_cH[live], len(live)
            at_target_c = slopes_c * (-odds_c).sigmoid()
            dhidden_nH = torch.zeros(n, H, dtype=torch.float32, device=device)
            width = _multiple_of(blocks["BLOCK_V"], POLICY_SLICE_BYTES // (item * max(1, n)))
            for first in range(0, V if n else 0, width):
                weight_vH = weight_VH[first : first + width]
                grad_nv = None
                grad_nv = torch.empty(n, len(weight_vH), dtype=hidden_NH.dtype, device=device)
                with torch.cuda.device_of(hidden_NH):
                    _finish_kernel[(triton.cdiv(n, 16), triton.cdiv(len(weight_vH), blocks["BLOCK_V"]))](
                        powers_cV, references_Tc, live, targets_c, m_c, rest_c, slopes_c, at_target_c, grad_nv,
                        len(hidden_cH), n, V, len(weight_vH), first, REFERENCE_V=blocks["BLOCK_V"], BLOCK_N=16,
                    )  # fmt: skip
                if wants_hidden:
                    _add_product(dhidden_nH, grad_nv, weight_vH)
                if wants_weight:
                    _add_product(dweight_VH[first : first + width], grad_nv.T, live_nH)
            if wants_hidden:
                dhidden_NH[start + live] = dhidden_nH.to(dhidden_NH.dtype)
        ctx.gradients = dhidden_NH, dweight_VH
        ctx.mark_non_differentiable(logprobs_N, entropy_N, slopes_N)
        return per_token_loss(logprobs_N).sum(), logprobs_N, entropy_N, slopes_N

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, *_):
        if ctx.gradients is None:
            raise RuntimeError("the policy loss keeps its gradient for one backward pass, and that has been made.")
        (dhidden_NH, dweight_VH), ctx.gradients = ctx.gradients, None
        # In place: a second dW would be the largest tensor of the step.
        return *(None if gradient is None else gradient.mul_(dloss) for gradient in (dhidden_NH, dweight_VH)), *[
            None
        ] * 3


def _multiple_of(block, number):
    """The largest multiple of `block` up to `number`, but at least one."""
    return max(1, number // block) * block


def _write_product(place, a, b):
    """place = a @ b, rounded once, to the dtype of `place`: that of the factors, or float32."""
    if place.dtype == a.dtype:
        torch.mm(a, b, out=place)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=torch.float32, out=place)
    else:  # Triton's interpreter, which computes on a CPU
        place.copy_(a.float() @ b.float())


def _add_product(total, a, b):
    """total += a @ b, with `total` in float32 and the factors in their own dtype."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:  # Triton's interpreter, which computes on a CPU
        total += a.float() @ b.float()
