"""The kernels of `common/kernels/triton.py` against float64, on a GPU if there is one, else in
Triton's interpreter.

`test_triton.py` runs this file in a process of its own, because Triton reads TRITON_INTERPRET when
it is imported. On a machine with a GPU, `python -m pytest -n 0
tests/kernels/interpreted_kernels.py` runs it there. The interpreter computes tile by tile in numpy:
it shows wrong indices, masks and formulas, but no races and no tensor-core rounding.

Truth, bounds and seeds: `logprob_truth.py`.
"""

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from common.kernels import triton as kernels
from tests.logprob_truth import (
    BF16,
    DEVICE,
    F32,
    UPSTREAM,
    assert_close,
    leaves,
    problem,
    seed,
    truth,
)


def mend_the_interpreter():
    """Triton 3.6 to 3.9 interpret bf16 as the 16-bit integers that hold it: products are wrong, and
    rounding cuts off.

    Give both what a GPU does: products of the values, and rounding to nearest.
    """

    def floats(handle):
        if handle.dtype.scalar.name != "bf16":
            return handle.data
        return (handle.data.astype(np.uint32) << 16).view(np.float32)

    def dot(self, a, b, d, *_):
        return interpreter.TensorHandle(
            np.matmul(floats(a), floats(b), dtype=np.float32) + d.data, d.dtype.scalar
        )

    cast = interpreter.InterpreterBuilder.cast_impl

    def rounding_cast(self, source, target):
        if (source.dtype.scalar.name, target.scalar.name) != ("fp32", "bf16"):
            return cast(self, source, target)
        rounded = (
            torch.from_numpy(np.ascontiguousarray(source.data)).to(BF16).view(torch.int16).numpy()
        )
        return interpreter.TensorHandle(
            rounded.view(np.uint16).reshape(source.data.shape), target.scalar
        )

    interpreter.InterpreterBuilder.create_dot = dot
    interpreter.InterpreterBuilder.cast_impl = rounding_cast


CHOOSE_SPLIT = kernels._split

if DEVICE == "cpu":
    mend_the_interpreter()


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    seed()
    if DEVICE == "cpu":  # for vocabularies this small, all splits would be one tile
        tiles = torch.randint(1, 4, ()).item()
        monkeypatch.setattr(
            kernels, "_split", lambda N, V, blocks, device: tiles * blocks["BLOCK_V"]
        )


def run(hidden, weight, targets, dlogprobs, dentropy, cap=None):
    hidden, weight = leaves(hidden, weight)
    results = kernels.logprobs_and_entropy(hidden, weight, targets, cap)
    (results[0] @ dlogprobs + results[1] @ dentropy).backward()
    return *(r.detach() for r in results), hidden.grad, weight.grad


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("upstream", UPSTREAM)
@pytest.mark.parametrize("shape", [(127, 65, 257), (1, 130, 1000)])
def test_against_float64(shape, upstream, dtype):
    arguments = problem(*shape, dtype, 0.57)
    a, b = (on * torch.randn(shape[0], device=DEVICE) for on in UPSTREAM[upstream])
    assert_close(run(*arguments, a, b), truth(*arguments, a, b), dtype)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("cap", [2.0, 30.0])  # logits are −10 to 10
def test_capped_logits(cap, dtype):
    arguments = problem(127, 65, 257, dtype)
    a, b = torch.randn(2, 127, device=DEVICE)
    expected = truth(*arguments, a, b, cap)
    assert (expected[0] - truth(*arguments, a, b)[0]).abs().mean() > 0.02  # the cap shows
    assert_close(run(*arguments, a, b, cap), expected, dtype)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("spread", [0.02, 0.4])
def test_rows_with_and_without_gradient(spread, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "SLICE_BYTES", 1)  # one block of columns at a time
    hidden, weight, targets = problem(150, 72, 1000, dtype, spread)
    a = torch.randn(150, device=DEVICE) * (torch.rand(150, device=DEVICE) < 0.6)
    found = run(hidden, weight, targets, a, torch.zeros_like(a))
    assert_close(found, truth(hidden, weight, targets, a, torch.zeros_like(a)), dtype)
    assert (found[2][a == 0] == 0).all()


@pytest.mark.parametrize("V", [129_920, 151_936])
def test_large_vocabularies(V, monkeypatch):
    if DEVICE == "cpu":  # tiles with hardly a row of padding, for a fifth of the time
        small = {"BLOCK_N": 4, "BLOCK_V": 512, "BLOCK_H": 64}
        monkeypatch.setattr(kernels, "_blocks", lambda hidden_NH: small)
    hidden, weight, targets = problem(3, 64, V, BF16)
    a, b = torch.randn(3, device=DEVICE), torch.zeros(3, device=DEVICE)
    expected = truth(hidden, weight, targets, a, b)
    assert_close(run(hidden, weight, targets, a, b), expected, BF16)


def test_splits_fill_the_gpu():
    # A CPU counts as 132 multiprocessors.
    blocks, cpu = {"BLOCK_N": 128, "BLOCK_V": 256}, torch.device("cpu")
    for N, V, width in ((768, 151_936, 6912), (16_384, 151_936, 8192), (1, 300, 256)):
        assert CHOOSE_SPLIT(N, V, blocks, cpu) == width


def test_no_rows():
    hidden, weight, targets = problem(0, 64, 257)
    nothing = torch.zeros(0, device=DEVICE)
    found = run(hidden, weight, targets, nothing, nothing)
    assert [tuple(t.shape) for t in found] == [(0,), (0,), (0, 64), (257, 64)]
    assert (found[3] == 0).all()


@pytest.mark.parametrize("offset", [-400.0, 400.0])
def test_logits_far_from_zero(offset):
    # One feature that is always 20, with the same weight everywhere: the distribution stays what it
    # was. A float32 number of 400 ends at 3e-5, and that is what logits made of it can be off by.
    hidden, weight, targets = problem(20, 64, 1000)
    hidden[:, -1], weight[:, -1] = 20, offset / 20
    a, b = torch.randn(2, 20, device=DEVICE)
    found, expected = run(hidden, weight, targets, a, b), truth(hidden, weight, targets, a, b)
    assert_close(found[:2], expected[:2], F32, scale=30)
    # Not dh's last feature, Σ_v G_v · offset, of which nothing but rounding is left.
    for x, y in zip((found[2][:, :-1], found[3]), (expected[2][:, :-1], expected[3]), strict=True):
        assert (x.double() - y).norm() <= 1e-3 * y.norm()


@pytest.mark.parametrize("masked", [slice(0, 300), slice(700, 1000), slice(100, 900)])
def test_masked_vocabulary(masked):
    # A feature that is always 1 carries a bias of −inf. Its own gradient, 0 × −inf, is nobody's;
    # all others are finite.
    hidden, weight, _ = problem(9, 64, 1000)
    hidden[:, -1], weight[:, -1] = 1, 0
    left = torch.ones(1000, dtype=torch.bool, device=DEVICE)
    left[masked] = False
    allowed = left.nonzero().squeeze(1)
    positions = torch.randint(len(allowed), (9,), device=DEVICE)
    a, b = torch.randn(2, 9, device=DEVICE)
    expected = truth(hidden, weight[allowed], positions, a, b)
    weight[masked, -1] = -torch.inf
    found = run(hidden, weight, allowed[positions], a, b)
    assert (found[3][masked] == 0).all()
    kept = *found[:2], found[2][:, :-1], found[3][allowed][:, :-1]
    assert_close(kept, (*expected[:2], expected[2][:, :-1], expected[3][:, :-1]), F32)


def test_certain_targets():
    # p(y) = 1 − 2e-4 or so: 1 minus a p that was computed first would know those 2e-4 to 3e-4 of
    # themselves.
    hidden, weight, targets = problem(30, 64, 257, F32, 0.01)
    weight[targets] = 9.5 * torch.nn.functional.normalize(hidden, dim=1)
    hidden = torch.nn.functional.normalize(hidden, dim=1) * 1.5
    a, b = torch.randn(30, device=DEVICE), torch.zeros(30, device=DEVICE)
    expected = truth(hidden, weight, targets, a, b)
    assert expected[0].median() > -0.01
    assert_close(run(hidden, weight, targets, a, b), expected, F32)


def test_float32_weights_with_bfloat16_products():
    hidden, weight, targets = problem(127, 64, 1000, BF16)
    # less than bf16 can tell
    weights = weight.float() * (1 + 2**-10 * torch.rand(1000, 64, device=DEVICE))
    a, b = torch.randn(2, 127, device=DEVICE)
    found = run(hidden, weights, targets, a, b)
    assert found[3].dtype == F32
    assert_close(found, truth(hidden, weight, targets, a, b), BF16)


def test_memory_layouts():
    hidden, weight, targets = problem(20, 64, 257)
    a, b = torch.randn(2, 20, device=DEVICE)
    expected = run(hidden, weight, targets, a, b)
    strided = torch.stack([hidden, hidden + 1], dim=2)[..., 0]
    transposed = weight.T.contiguous().T
    assert not strided.is_contiguous() and not transposed.is_contiguous()
    for x, y in zip(run(strided, transposed, targets, a, b), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_rows_without_gradient_may_hold_anything():
    hidden, weight, targets = problem(20, 64, 257)
    a = torch.randn(20, device=DEVICE)
    a[::3] = 0
    hidden[::3] = torch.nan
    live = torch.arange(20, device=DEVICE) % 3 > 0
    found = run(hidden, weight, targets, a, torch.zeros_like(a))
    expected = truth(hidden[live], weight, targets[live], a[live], torch.zeros_like(a[live]))
    assert found[0][~live].isnan().all()  # but a NaN that is there shows
    assert_close((found[0][live], found[1][live], found[2][live], found[3]), expected, F32)
    assert (found[2][~live] == 0).all()


def test_rows_without_gradient_cost_no_backward_work(monkeypatch):
    arguments, products = problem(70, 64, 257), []
    for name in ("_write_product", "_add_product"):
        multiply = getattr(kernels, name)

        def spy(result, x, y, multiply=multiply):
            products.append((tuple(x.shape), tuple(y.shape)))
            multiply(result, x, y)

        monkeypatch.setattr(kernels, name, spy)
    a, b, nothing = (
        torch.randn(70, device=DEVICE),
        torch.randn(70, device=DEVICE),
        torch.zeros(70, device=DEVICE),
    )
    a[10:], b[:5], b[15:] = 0, 0, 0
    run(*arguments, a, b)
    assert products == [((257, 15), (15, 64)), ((15, 257), (257, 64))]
    products.clear()
    assert (
        not any(gradient.any() for gradient in run(*arguments, nothing, nothing)[2:])
        and not products
    )


def test_frozen_hidden_or_weight():
    hidden, weight, targets = problem(20, 64, 257)
    a = torch.randn(20, device=DEVICE)
    _, _, dhidden, dweight = run(hidden, weight, targets, a, torch.zeros_like(a))
    for freeze in (0, 1):
        inputs = leaves(hidden, weight)
        inputs[freeze].requires_grad_(False)
        (kernels.logprobs_and_entropy(*inputs, targets)[0] @ a).backward()
        assert inputs[freeze].grad is None and torch.equal(
            inputs[1 - freeze].grad, (dweight, dhidden)[freeze]
        )


def test_repeats_bit_for_bit_and_barely_depends_on_slices(monkeypatch):
    arguments = problem(70, 64, 600)
    a, b = torch.randn(2, 70, device=DEVICE)
    first, again = run(*arguments, a, b), run(*arguments, a, b)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    monkeypatch.setattr(kernels, "SLICE_BYTES", 1)
    monkeypatch.setattr(kernels, "GROUP", 1)
    monkeypatch.setattr(kernels, "_split", lambda N, V, blocks, device: 4 * blocks["BLOCK_V"])
    for x, y in zip(run(*arguments, a, b), first, strict=True):
        assert (x - y).norm() <= 2e-6 * y.norm()


def test_it_cannot_be_differentiated_twice():
    hidden, weight, targets = problem(5, 64, 257)
    inputs = leaves(hidden, weight)
    logprobs_N, _ = kernels.logprobs_and_entropy(*inputs, targets)
    (gradient,) = torch.autograd.grad(logprobs_N.square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


@pytest.mark.skipif(DEVICE == "cpu", reason="N × V above 2³¹ needs a GPU")
def test_offsets_beyond_31_bits(monkeypatch):
    monkeypatch.setattr(kernels, "SLICE_BYTES", 2**33)
    N, V = 16_384, 151_936
    hidden, weight = (
        torch.randn(N, 64, device=DEVICE).to(BF16),
        torch.randn(V, 64, device=DEVICE).to(BF16) * 0.3,
    )
    targets = torch.randint(V, (N,), device=DEVICE)
    a = torch.randn(N, device=DEVICE)
    found = run(hidden, weight, targets, a, torch.zeros_like(a))
    rows = slice(N - 64, N)
    expected = truth(hidden[rows], weight, targets[rows], a[rows], torch.zeros(64, device=DEVICE))
    assert_close((found[0][rows], found[1][rows], found[2][rows]), expected[:3], BF16)


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter's memory is not the kernels'")
@pytest.mark.parametrize("H", [896, 2048, 3584])
def test_peak_memory(H):
    N, V = 16_384, 151_936
    hidden, weight = (
        torch.randn(N, H, device=DEVICE).to(BF16),
        (torch.randn(V, H, device=DEVICE) * 0.05).to(BF16),
    )
    targets, ones = torch.randint(V, (N,), device=DEVICE), torch.ones(N, device=DEVICE)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    inputs = hidden.requires_grad_(), weight.requires_grad_()
    (kernels.logprobs_and_entropy(*inputs, targets)[0] @ ones).backward()
    outputs = hidden.grad.nbytes + weight.grad.nbytes
    assert torch.cuda.max_memory_allocated() - before - outputs <= 2**30
