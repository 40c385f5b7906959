"""Log-probs and entropies in slices of the vocabulary, on a CPU, against float64.

Truth, bounds and seeds: `logprob_truth.py`.
"""

import pytest
import torch

from common import layers
from common.kernels import cpu
from common.kernels.cpu import SlicedLogprobs
from common.layers import linear
from common.logprobs import LARGE_VOCABULARY, logprobs_and_entropy
from tests import logprob_truth
from tests.logprob_truth import BF16, F32, UPSTREAM, assert_close, leaves, problem, seed, truth


@pytest.fixture(autouse=True)
def seeded_slices(monkeypatch):
    seed()
    monkeypatch.setattr(layers, "MKL_IS_SLOW", True)  # on others, products are left to MKL
    monkeypatch.setattr(logprob_truth, "DEVICE", "cpu")
    monkeypatch.setattr(cpu, "SLICE", 300)  # of 1,000: three whole slices and the tail


def run(hidden, weight, targets, dlogprobs, dentropy, cap=None):
    hidden, weight = leaves(hidden, weight)
    results = SlicedLogprobs.apply(hidden, weight, targets, cap)
    (results[0] @ dlogprobs + results[1] @ dentropy).backward()
    return *(r.detach() for r in results), hidden.grad, weight.grad


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", [(127, 65, 1000), (1, 130, 257)])
@pytest.mark.parametrize("upstream", UPSTREAM)
@pytest.mark.parametrize("spread", [0.03, 0.57])  # flat and peaked
def test_against_float64(shape, dtype, spread, upstream):
    arguments = problem(*shape, dtype, spread)
    a, b = (on * torch.randn(shape[0]) for on in UPSTREAM[upstream])
    assert_close(run(*arguments, a, b), truth(*arguments, a, b), dtype)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("upstream", UPSTREAM)
@pytest.mark.parametrize("cap", [2.0, 30.0])  # logits are −10 to 10
def test_capped_logits(cap, upstream, dtype):
    arguments = problem(127, 65, 1000, dtype)
    a, b = (on * torch.randn(127) for on in UPSTREAM[upstream])
    expected = truth(*arguments, a, b, cap)
    assert (expected[0] - truth(*arguments, a, b)[0]).abs().mean() > 0.02  # the cap shows
    assert_close(run(*arguments, a, b, cap), expected, dtype)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("V", [129_920, 151_936])
def test_large_vocabularies(V, dtype, monkeypatch):
    monkeypatch.setattr(cpu, "SLICE", 4096)
    arguments = problem(64, 64, V, dtype)
    a, b = torch.randn(64), torch.zeros(64)
    assert_close(run(*arguments, a, b), truth(*arguments, a, b), dtype)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("offset", [-400.0, 400.0])
def test_logits_far_from_zero(offset, dtype):
    # A float32 number of 400 ends at 3e-5, which is what logits made of it can be off by. The
    # centre takes the offset out of the product before it is rounded, so that bf16 is no worse for
    # it.
    hidden, weight, targets = problem(20, 64, 1000, dtype)
    hidden[:, -1], weight[:, -1] = 16, offset / 16
    a, b = torch.randn(2, 20)
    found, expected = run(hidden, weight, targets, a, b), truth(hidden, weight, targets, a, b)
    assert_close(found[:2], expected[:2], dtype, scale=30 if dtype == F32 else 1)
    # Not dh's last feature, Σ_v G_v · offset, of which nothing but rounding is left.
    for x, y in zip((found[2][:, :-1], found[3]), (expected[2][:, :-1], expected[3]), strict=True):
        assert (x.double() - y).norm() <= (1e-3 if dtype == F32 else 4e-3) * y.norm()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_first_centre_far_too_high_or_low(dtype):
    # The target's logit is the first centre. Here it is 120 below all others or, at a temperature
    # of 0.1, 1,200; and where the first slices hold nothing but logits 120 below the target's,
    # every one of their powers is 0. (From 128 on, float32 logits are off by 8e-6 each.)
    for sign, temperature in ((-1, 1.0), (-1, 0.1), (1, 1.0)):
        hidden, weight, _ = problem(20, 64, 1000, dtype)
        targets = torch.randint(950, 1000, (20,))
        hidden[:, -1], weight[:, -1] = 16, 0
        weight[targets, -1] = sign * 120 / 16
        hidden = (hidden.float() / temperature).to(dtype)
        a, b = torch.randn(20), torch.zeros(20)
        found, expected = run(hidden, weight, targets, a, b), truth(hidden, weight, targets, a, b)
        relative = (found[0] - expected[0]).abs() / expected[0].abs().clamp(min=1)
        assert relative.max() < (1e-5 if dtype == F32 else 1e-3)
        assert (found[1] - expected[1]).abs().max() < (1e-4 if dtype == F32 else 2e-2)
        assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("masked", [slice(0, 350), slice(700, 1000), slice(100, 900)])
def test_masked_vocabulary(masked):
    # A feature that is always 1 carries a bias of −inf. Its own gradient, 0 × −inf, is nobody's;
    # all others are finite.
    hidden, weight, _ = problem(9, 64, 1000)
    hidden[:, -1], weight[:, -1] = 1, 0
    left = torch.ones(1000, dtype=torch.bool)
    left[masked] = False
    allowed = left.nonzero().squeeze(1)
    positions = torch.randint(len(allowed), (9,))
    a, b = torch.randn(2, 9)
    expected = truth(hidden, weight[allowed], positions, a, b)
    weight[masked, -1] = -torch.inf
    found = run(hidden, weight, allowed[positions], a, b)
    assert (found[3][masked] == 0).all()
    kept = *found[:2], found[2][:, :-1], found[3][allowed][:, :-1]
    assert_close(kept, (*expected[:2], expected[2][:, :-1], expected[3][:, :-1]), F32)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_certain_targets(dtype):
    # p(y) = 1 − 5e-4 in every row. All of the gradient is 1 − p, and that is a sum of probabilities
    # near exp(−8): next to a target that is rounded to bf16 nothing would be left of it, and
    # rounded next to the target's logit they would be off by 1 % each, and the gradient by 6e-3. In
    # float32, 1 minus a p that was computed first is off by 1e-4.
    hidden, weight, _ = problem(200, 64, 1000, F32, 0.01)
    targets = torch.randperm(1000)[:200]
    weight[targets] = 9.5 * torch.nn.functional.normalize(hidden, dim=1)
    arguments = (
        (torch.nn.functional.normalize(hidden, dim=1) * 1.6).to(dtype),
        weight.to(dtype),
        targets,
    )
    a, b = torch.randn(200), torch.zeros(200)
    found, expected = run(*arguments, a, b), truth(*arguments, a, b)
    assert -0.01 < expected[0].median() < 0
    assert ((found[0] - expected[0]) / expected[0]).abs().max() <= (1e-5 if dtype == F32 else 3e-3)
    assert_close(found, expected, dtype)


def test_memory_layouts():
    hidden, weight, targets = problem(20, 64, 1000)
    a, b = torch.randn(2, 20)
    expected = run(hidden, weight, targets, a, b)
    strided, transposed = torch.stack([hidden, hidden + 1], dim=2)[..., 0], weight.T.contiguous().T
    for x, y in zip(run(strided, transposed, targets, a, b), expected, strict=True):
        assert (x - y).norm() <= 2e-6 * y.norm()


def test_rows_without_gradient_may_hold_anything():
    hidden, weight, targets = problem(20, 64, 1000)
    live = torch.arange(20) % 3 > 0
    a = torch.randn(20)
    expected = truth(hidden[live], weight, targets[live], a[live], torch.zeros(int(live.sum())))
    hidden[~live] = torch.nan
    found = run(hidden, weight, targets, torch.where(live, a, 0), torch.zeros(20))
    assert found[0][~live].isnan().all()  # but a NaN that is there shows
    assert_close((found[0][live], found[1][live], found[2][live], found[3]), expected, F32)
    assert (found[2][~live] == 0).all()


def test_rows_without_gradient_cost_no_backward_work(monkeypatch):
    arguments = problem(64, 64, 1000)
    rows = []

    def spy(weight_vH, hidden_nH, bias_n):
        rows.append(len(hidden_nH))
        return linear(weight_vH, hidden_nH, bias_n)

    a = torch.randn(64)
    a[10:] = 0
    for upstream, expected in ((a, [10] * 4), (torch.zeros(64), [])):
        inputs = leaves(*arguments[:2])
        loss = SlicedLogprobs.apply(*inputs, arguments[2])[0] @ upstream
        rows.clear()
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "linear", spy)
            loss.backward()
        assert rows == expected


def test_frozen_hidden_or_weight():
    hidden, weight, targets = problem(20, 64, 1000)
    a = torch.randn(20)
    _, _, *expected = run(hidden, weight, targets, a, torch.zeros(20))
    for freeze in (0, 1):
        inputs = leaves(hidden, weight)
        inputs[freeze].requires_grad_(False)
        (SlicedLogprobs.apply(*inputs, targets)[0] @ a).backward()
        assert inputs[freeze].grad is None and torch.equal(
            inputs[1 - freeze].grad, expected[1 - freeze]
        )


@pytest.mark.parametrize("V", [1000, LARGE_VOCABULARY])
@pytest.mark.parametrize("upstream", UPSTREAM)
def test_float32_weights_with_bfloat16_products(V, upstream):
    hidden, weight, targets = problem(127, 64, V, BF16)
    noise = 1 + 2**-10 * torch.rand(V, 64)  # less than bf16 can tell
    a, b = (on * torch.randn(127) for on in UPSTREAM[upstream])
    inputs = leaves(hidden, weight.float() * noise)
    results = logprobs_and_entropy(*inputs, targets)
    (results[0] @ a + results[1] @ b).backward()
    assert inputs[1].grad.dtype == F32
    found = *(result.detach() for result in results), inputs[0].grad, inputs[1].grad
    assert_close(found, truth(hidden, weight, targets, a, b), BF16)


def test_tied_embeddings_accumulate():
    weight = torch.randn(1000, 64).mul_(0.4).requires_grad_()
    tokens, targets = torch.randint(1000, (2, 20))
    a = torch.randn(20)
    (SlicedLogprobs.apply(weight[tokens], weight, targets)[0] @ a).backward()
    twin = weight.detach().double().requires_grad_()
    (cpu.plain_logprobs_and_entropy(twin[tokens], twin, targets)[0] @ a.double()).backward()
    assert (weight.grad - twin.grad).norm() <= 1e-5 * twin.grad.norm()


def test_repeats_bit_for_bit_and_barely_depends_on_slices(monkeypatch):
    arguments = problem(40, 64, 1000)
    a, b = torch.randn(2, 40)
    first = run(*arguments, a, b)
    assert all(torch.equal(x, y) for x, y in zip(run(*arguments, a, b), first, strict=True))
    for width in (7, 128, 4096):
        monkeypatch.setattr(cpu, "SLICE", width)
        for x, y in zip(run(*arguments, a, b), first, strict=True):
            assert (x - y).norm() <= 2e-6 * y.norm()


def test_no_rows():
    hidden, weight, targets = problem(0, 64, LARGE_VOCABULARY)
    found = run(hidden, weight, targets, torch.zeros(0), torch.zeros(0))
    assert [tuple(t.shape) for t in found] == [(0,), (0,), (0, 64), (LARGE_VOCABULARY, 64)]
    assert (found[3] == 0).all()


def test_it_cannot_be_differentiated_twice():
    hidden, weight, targets = problem(5, 64, 257)
    inputs = leaves(hidden, weight)
    logprobs_N, _ = SlicedLogprobs.apply(*inputs, targets)
    (gradient,) = torch.autograd.grad(logprobs_N.square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


def test_a_masked_target_far_below_zero():
    # It has no logit to be the first centre, and 0 is too high for logits of −400: all powers would
    # underflow.
    hidden, weight, targets = problem(20, 64, 1000)
    hidden[:, -1], weight[:, -1] = 16, -25
    targets = targets % 10
    expected = truth(hidden, weight[10:], targets, torch.zeros(20), torch.zeros(20))[1]
    weight[:10, -1] = -torch.inf
    with torch.no_grad():
        found = SlicedLogprobs.apply(hidden, weight, targets)
    assert (found[0] == -torch.inf).all() and (found[1] - expected).abs().max() <= 3e-4
