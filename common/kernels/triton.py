"""Log-probs and entropies in Triton kernels, for GPUs.

`__init__.py` beside this file says what they compute. Inside, everything is in bits, base 2, since
a GPU's exponential is 2^x. With x = log₂e · h Wᵀ, and over all entries but the target,

    m = max_v x_v        s = Σ_v 2^(x_v − m)        r = log₂ s − log₂(1 − p_y)

    p_v = 2^((x_v − m) − r)

(m + r is not formed: next to an m of 1,000, r would lose its last three digits.) Products are taken
in the dtype of h and W, bf16 as a rule, and summed in float32, and x never leaves float32
registers: rounding a logit of 20 to bf16 would shift its log-prob by up to 0.06.

    forward     one pass over V: Σ 2^x, Σ 2^x x and x_y per row           2·N·H·V operations
    backward    x again, slice by slice of V, gradients as they go by     6·N·H·V operations,
                                                                          for N rows with a gradient

Products whose factors both exist in memory (dW = Gᵀ h, dh = G W, for a slice G of the logits'
gradient) are left to cuBLAS. Triton does the products that must not be written out: those that make
x.

Offsets are 64-bit wherever N × V or V × H enters. (A W that is stored transposed must have fewer
than 2³¹ elements.)
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid

from common.kernels import LN_2, LOG2_E, gradient_at_target, live_rows, target_against_others

# Vocabulary entries that one program of the forward kernel walks over at most
SPLIT = 8192
# Size of a slice of the logits' gradient; for every slice all of dh is read and written.
SLICE_BYTES = 2**28
# Row blocks that neighbouring programs share, so that 16 blocks of h and 8 of W stay in the level-2
# cache
GROUP = 16


def _blocks(hidden_NH):
    """Tile sizes and launch options by dtype of the products and by GPU.

    bf16: a tile of 128 × 256 float32 sums takes half the registers of 256 threads; the other half
    is for the powers. It is made of 128 × 64 of h and 256 × 64 of W, 48 KB, of which three stages
    fit into Hopper's 227 KB of shared memory. Other GPUs, whose products take their factors from
    registers too, get half the tile, in stages of 16 KB. float32: true float32 products do not run
    on tensor cores; small tiles keep them in registers.
    """
    if hidden_NH.dtype != torch.bfloat16:
        return {"BLOCK_N": 64, "BLOCK_V": 64, "BLOCK_H": 32, "num_warps": 4, "num_stages": 2}
    large = {"BLOCK_N": 128, "BLOCK_V": 256, "BLOCK_H": 64, "num_warps": 8, "num_stages": 3}
    small = {"BLOCK_N": 128, "BLOCK_V": 128, "BLOCK_H": 32, "num_warps": 8, "num_stages": 3}
    if not hidden_NH.is_cuda:  # Triton's interpreter
        return large
    properties = torch.cuda.get_device_properties(hidden_NH.device)
    return large if properties.shared_memory_per_block_optin > 200 * 1024 else small


def _split(N, V, blocks, device):
    """Vocabulary entries per program of the forward kernel.

    They are chosen for as many programs as fill the GPU a whole number of times. For example, 768
    rows are 6 blocks of 128. Splits of 8,192 of V = 151,936 would make 114 programs, and 18 of a
    Hopper's 132 multiprocessors would idle; with 22 splits of 6,912 none does.
    """
    multiprocessors = 132
    if device.type == "cuda":
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    row_blocks = max(1, triton.cdiv(N, blocks["BLOCK_N"]))
    times = triton.cdiv(row_blocks * triton.cdiv(V, SPLIT), multiprocessors)
    num_splits = max(1, times * multiprocessors // row_blocks)
    entries = triton.cdiv(V, num_splits)
    return triton.cdiv(entries, blocks["BLOCK_V"]) * blocks["BLOCK_V"]


@triton.jit
def _bits_tile(
    hidden, weight, rows, columns, N, V, H, hidden_n, hidden_h, weight_v, weight_h,
    CAP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One tile [BLOCK_N, BLOCK_V] of x = log₂e · h Wᵀ, summed in float32 along H, or of
    log₂e · c tanh(h Wᵀ / c) if there is a CAP c.

    It is 0 outside of the matrices.
    """
    features = tl.arange(0, BLOCK_H)
    hidden_rows = hidden + rows[:, None].to(tl.int64) * hidden_n
    weight_columns = weight + columns[None, :].to(tl.int64) * weight_v
    sums = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for start in range(0, H, BLOCK_H):
        k = start + features
        hidden_tile = tl.load(
            hidden_rows + k[None, :] * hidden_h,
            mask=(rows[:, None] < N) & (k[None, :] < H),
            other=0.0,
        )
        weight_tile = tl.load(
            weight_columns + k[:, None] * weight_h,
            mask=(k[:, None] < H) & (columns[None, :] < V),
            other=0.0,
        )
        sums = tl.dot(hidden_tile, weight_tile, sums, input_precision="ieee")
    if CAP > 0:
        sums = CAP * _tanh(sums / CAP)
    return 1.4426950408889634 * sums


@triton.jit
def _tanh(x):
    """(1 − e^(−2x)) / (1 + e^(−2x)); near 0, where that loses digits, the series."""
    power = tl.exp2(-2.8853900817779268 * tl.abs(x))
    far = (1 - power) / (1 + power)
    square = x * x
    near = x * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315))))
    return tl.where(tl.abs(x) < 0.2, near, tl.where(x < 0, -far, far))


@triton.jit
def _block_and_place(num_row_blocks, GROUP: tl.constexpr):
    """Which row block and which place along the vocabulary this program has.

    The first `GROUP` row blocks are done at all places before the next ones begin.
    """
    program = tl.program_id(0)
    group_programs = GROUP * (tl.num_programs(0) // num_row_blocks)
    first = program // group_programs * GROUP
    height = tl.minimum(num_row_blocks - first, GROUP)
    within = program % group_programs
    return first + within % height, within // height


# Triton would compile the kernels once for each kind of N (1, a multiple of 16, any other), and
# micro-batches have any number of rows.
@triton.jit(do_not_specialize=["N"])
def _forward_kernel(
    hidden, weight, targets, largest, sums, weighted, targeted,
    N, V, H, hidden_n, hidden_h, weight_v, weight_h, SPLIT, CAP: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Row statistics over one split of the vocabulary.

    Equation: over the split's entries but the target, m = max_v x_v, s = Σ_v 2^(x_v − m) and
    t = Σ_v 2^(x_v − m) (x_v − m). When a tile raises the maximum from m to m', what was summed so
    far moves along:

        s ← s 2^(m − m')        t ← (t + (m − m') s) 2^(m − m')

    Tile walk: a program owns BLOCK_N rows and walks over the SPLIT entries of one split, BLOCK_V at
    a time. Programs that run together share row blocks and splits, see `GROUP`. Splits, see
    `_split`, give a GPU something to share if there are few rows. Nothing is added up across
    programs, so no sum depends on which one is faster; `_statistics` combines the splits.
    """
    block, split = _block_and_place(tl.cdiv(N, BLOCK_N), GROUP)
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    target = tl.load(targets + rows, mask=rows < N, other=-1).to(tl.int32)
    # −1e30 stands for −∞, of masked entries and of a maximum over nothing: 2^−1e30 = 0, and
    # 0 · −1e30 is no NaN. If a whole tile is masked its powers are 2⁰, but the first real maximum,
    # here or in another split, scales them to 0.
    m = tl.full((BLOCK_N,), -1e30, tl.float32)
    s = tl.zeros((BLOCK_N,), tl.float32)
    t = tl.zeros((BLOCK_N,), tl.float32)
    x_target = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(split * SPLIT, tl.minimum((split + 1) * SPLIT, V), BLOCK_V):
        columns = first + tl.arange(0, BLOCK_V)
        x = _bits_tile(
            hidden, weight, rows, columns, N, V, H, hidden_n, hidden_h, weight_v, weight_h,
            CAP, BLOCK_N, BLOCK_V, BLOCK_H,
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
    tl.store(largest + split * N + rows, m, mask=rows < N)
    tl.store(sums + split * N + rows, s, mask=rows < N)
    tl.store(weighted + split * N + rows, t, mask=rows < N)
    # One split has a row's target.
    here = (rows < N) & (target >= split * SPLIT) & (target < (split + 1) * SPLIT)
    tl.store(targeted + rows, x_target, mask=here)


@triton.jit(do_not_specialize=["N", "first_column"])
def _gradient_kernel(
    hidden, weight, targets, largest, rest, entropy, dlogprob, dentropy, at_target, grad,
    N, V, H, first_column, hidden_n, hidden_h, weight_v, weight_h, CAP: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """A slice of the logits' gradient, from logits that are computed again.

    Equation, with upstream gradients a and b of log-prob and entropy:

        p = 2^((x − m) − r)        G = −a p − b p (ln p + entropy)

    and at the target, what was computed beforehand. With a cap, G goes on to the logits before it.

    Tile walk: one tile of G per program, those of a `GROUP` of row blocks together. `weight` points
    at the slice, whose first entry is `first_column` of the vocabulary; V is the slice's width.
    """
    block, tile = _block_and_place(tl.cdiv(N, BLOCK_N), GROUP)
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    x = _bits_tile(
        hidden, weight, rows, columns, N, V, H, hidden_n, hidden_h, weight_v, weight_h,
        CAP, BLOCK_N, BLOCK_V, BLOCK_H,
    )  # fmt: skip
    exists = rows < N
    target = tl.load(targets + rows, mask=exists, other=-1).to(tl.int32) - first_column
    a = tl.load(dlogprob + rows, mask=exists, other=0.0)
    b = tl.load(dentropy + rows, mask=exists, other=0.0)
    log2_p = x - tl.load(largest + rows, mask=exists, other=0.0)[:, None]
    log2_p -= tl.load(rest + rows, mask=exists, other=0.0)[:, None]
    log2_p = tl.where(log2_p < -1e30, -1e30, log2_p)
    row_entropy = tl.load(entropy + rows, mask=exists, other=0.0)
    surprise = 0.6931471805599453 * log2_p + row_entropy[:, None]
    g = -tl.exp2(log2_p) * (a[:, None] + b[:, None] * surprise)
    g_target = tl.load(at_target + rows, mask=exists, other=0.0)
    g = tl.where(columns[None, :] == target[:, None], g_target[:, None], g)
    if CAP > 0:  # the slope of the capped logit
        tanh = x / (1.4426950408889634 * CAP)
        g *= 1 - tanh * tanh
    places = rows[:, None].to(tl.int64) * V + columns[None, :]
    within = exists[:, None] & (columns[None, :] < V)
    tl.store(grad + places, g.to(grad.dtype.element_ty), mask=within)


def _statistics(hidden_NH, weight_VH, targets_N, cap):
    """Run the forward kernel and combine its splits, in a fixed order.

    Returns float32 [N]: log-prob, entropy, log-odds of the target, m, r.
    """
    N, H = hidden_NH.shape
    V = len(weight_VH)
    device = hidden_NH.device
    blocks = _blocks(hidden_NH)
    split = _split(N, V, blocks, device)
    num_splits = triton.cdiv(V, split)
    m_SN = torch.empty(num_splits, N, dtype=torch.float32, device=device)
    s_SN = torch.empty_like(m_SN)
    t_SN = torch.empty_like(m_SN)
    x_target_N = torch.empty(N, dtype=torch.float32, device=device)
    if N:
        num_programs = triton.cdiv(N, blocks["BLOCK_N"]) * num_splits
        with torch.cuda.device_of(hidden_NH):
            _forward_kernel[(num_programs,)](
                hidden_NH, weight_VH, targets_N, m_SN, s_SN, t_SN, x_target_N,
                N, V, H, *hidden_NH.stride(), *weight_VH.stride(), split,
                cap, GROUP=GROUP, **blocks,
            )  # fmt: skip
    m_N = m_SN.amax(dim=0)
    moved_SN = torch.exp2(m_SN - m_N)
    s_N = (moved_SN * s_SN).sum(dim=0)
    t_N = (moved_SN * (t_SN + (m_SN - m_N) * s_SN)).sum(dim=0)
    log2_s_N = s_N.log2()
    # Differences first: x_y − m is small where x_y itself may be in the thousands.
    odds_N = LN_2 * ((x_target_N - m_N) - log2_s_N)
    entropy_of_others_N = LN_2 * (log2_s_N - t_N / s_N)
    logprobs_N, entropy_N = target_against_others(odds_N, entropy_of_others_N)
    r_N = log2_s_N - LOG2_E * logsigmoid(-odds_N)
    return logprobs_N, entropy_N, odds_N, m_N, r_N


def logprobs_and_entropy(hidden_NH, weight_VH, targets_N, cap=None):
    """Log-prob of each target, and entropy.

    See `logprobs.logprobs_and_entropy`, which checks the arguments.
    """
    return _LogprobsAndEntropy.apply(hidden_NH, weight_VH, targets_N, cap or 0.0)


class _LogprobsAndEntropy(torch.autograd.Function):
    """The backward pass walks over V, with all live rows at once.

    So a slice of dW is one product, and only dh is a sum.
    """

    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, targets_N, cap):
        ctx.cap = cap
        ctx.weight_dtype = weight_VH.dtype
        weight_VH = weight_VH.to(hidden_NH.dtype)
        targets_N = targets_N.contiguous()
        logprobs_N, entropy_N, *rest = _statistics(hidden_NH, weight_VH, targets_N, cap)
        ctx.save_for_backward(hidden_NH, weight_VH, targets_N, entropy_N, *rest)
        return logprobs_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx, a_N, b_N):
        hidden_NH, weight_VH, *per_row = ctx.saved_tensors
        live, live_nH, targets_n, entropy_n, odds_n, m_n, rest_n, a_n, b_n = live_rows(
            a_N, b_N, hidden_NH, *per_row, a_N, b_N
        )
        at_target_n = gradient_at_target(odds_n, entropy_n, a_n, b_n)

        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        n, H = live_nH.shape
        V = len(weight_VH)
        blocks = _blocks(hidden_NH)
        dhidden_nH = torch.zeros(n, H, dtype=torch.float32, device=hidden_NH.device)
        dweight_VH = None
        if wants_weight:
            dweight_VH = torch.empty_like(weight_VH, dtype=ctx.weight_dtype)
            if n == 0:
                dweight_VH.zero_()
        # As many entries of V as fit into SLICE_BYTES, in whole blocks, and at least one block.
        bytes_per_entry = hidden_NH.element_size() * max(1, n)
        num_blocks = max(1, SLICE_BYTES // bytes_per_entry // blocks["BLOCK_V"])
        width = num_blocks * blocks["BLOCK_V"]
        row_blocks = triton.cdiv(n, blocks["BLOCK_N"])
        for start in range(0, V if n else 0, width):
            weight_vH = weight_VH[start : start + width]
            v = len(weight_vH)
            num_programs = row_blocks * triton.cdiv(v, blocks["BLOCK_V"])
            grad_nv = None  # the last slice goes before the next one comes
            grad_nv = torch.empty(n, v, dtype=hidden_NH.dtype, device=hidden_NH.device)
            with torch.cuda.device_of(hidden_NH):
                _gradient_kernel[(num_programs,)](
                    live_nH, weight_vH, targets_n, m_n, rest_n, entropy_n, a_n, b_n,
                    at_target_n, grad_nv, n, v, H, start, *live_nH.stride(), *weight_vH.stride(),
                    ctx.cap, GROUP=GROUP, **blocks,
                )  # fmt: skip
            if wants_weight:
                _write_product(dweight_VH[start : start + width], grad_nv.T, live_nH)
            if wants_hidden:
                _add_product(dhidden_nH, grad_nv, weight_vH)
        dhidden_NH = torch.zeros_like(hidden_NH)
        dhidden_NH.index_copy_(0, live, dhidden_nH.to(hidden_NH.dtype))
        return dhidden_NH, dweight_VH, None, None


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
