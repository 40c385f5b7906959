"""GRPO's advantages and per-token loss, against numbers worked out by hand and loops written from
the equations.

    A = (r − r̄) / (σ + 1e-6)
    loss = −min(ρ A, clip(ρ, 1−ε_low, 1+ε_high) A)
    ρ = exp(logprob − old)

In float64 the tolerance is 1e-12 relative, some thousand roundings; in float32 1e-6, some ten.
"""

import math
import random

import pytest
import torch

import grpo
from grpo import Args, advantages, per_token_loss, token_weights
from tests.losses import losses_of, micro_batch, slopes_of


def loss_of(logprobs_N, old_logprobs_N, advantages_N, args):
    """The loss of single tokens."""
    return losses_of(grpo, logprobs_N, old_logprobs_N, advantages_N, args)


def loss_and_gradient(log_ratios, advantage, args, dtype=torch.float64, old=-1.0):
    """The loss of single tokens, and its derivative by each token's log-prob, as lists."""
    old_logprobs = torch.full((len(log_ratios),), old, dtype=dtype)
    logprobs = (old_logprobs + torch.tensor(log_ratios, dtype=dtype)).requires_grad_()
    advantages_N = torch.full_like(old_logprobs, advantage)
    loss = loss_of(logprobs, old_logprobs, advantages_N, args)
    loss.sum().backward()
    return loss.tolist(), logprobs.grad.tolist()


def random_tokens(num_tokens, seed):
    """Log-probs, the sampler's log-probs and advantages of either sign; ratios on both sides of
    both bounds.
    """
    rng = random.Random(seed)
    old = [-rng.expovariate(0.5) for _ in range(num_tokens)]
    new = [o + rng.gauss(0, 0.4) for o in old]
    return new, old, [rng.gauss(0, 1.5) for _ in range(num_tokens)]


def loss_by_the_equation(new, old, advantage, low, high):
    ratio = math.exp(new - old)
    clipped = 1 - low if ratio < 1 - low else 1 + high if ratio > 1 + high else ratio
    return -min(ratio * advantage, clipped * advantage)


def mask_by_the_equation(new, old, advantage, low, high):
    """M: 1 where the token's gradient is not clipped away."""
    ratio = math.exp(new - old)
    return (advantage >= 0 and ratio <= 1 + high) or (advantage <= 0 and ratio >= 1 - low)


# Advantages


def test_advantages_by_hand():
    rewards_PG = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 1], [3, 5, 1, 3]], dtype=torch.float64)
    # Group 1: mean 1/2, deviations ±1/2,                       variance  1/4,               σ = 0.5
    # Group 2: mean 1/4, deviations −1/4 (three times) and 3/4, variance (3/16 + 9/16) / 4,
    # σ = √3/4
    # Group 3: mean 3,   deviations 0, 2, −2, 0,                variance  8/4,               σ = √2
    a, b, c = 0.5 / (0.5 + 1e-6), 0.25 / (math.sqrt(3) / 4 + 1e-6), 2 / (math.sqrt(2) + 1e-6)
    expected = [[a, -a, -a, a], [-b, -b, -b, 3 * b], [0, c, -c, 0]]
    torch.testing.assert_close(
        advantages(rewards_PG, Args()),
        torch.tensor(expected, dtype=torch.float64),
        rtol=1e-12,
        atol=1e-15,
    )


def test_advantages_against_a_loop():
    rng = random.Random(0)
    rewards = [[rng.gauss(0.3, scale) for _ in range(7)] for scale in (1, 10, 0.01, 1e-5)]
    result = advantages(torch.tensor(rewards, dtype=torch.float64), Args())
    for group, found in zip(rewards, result.tolist(), strict=True):
        mean = math.fsum(group) / len(group)
        std = math.sqrt(math.fsum((r - mean) ** 2 for r in group) / len(group))
        # The deviations of group 4 are 1e-5 of the rewards: their rounding is 1e5 times as large in
        # proportion.
        assert found == pytest.approx([(r - mean) / (std + 1e-6) for r in group], rel=1e-9)


@pytest.mark.parametrize(
    "reward", [0.0, 1.0, 0.7, 0.1, -2.3, 1 / 3, 1e6, 1e6 + 0.1, 1e-9, 1e9 + 0.3]
)
@pytest.mark.parametrize("group_size", [2, 3, 7, 8, 49])
def test_equal_rewards_have_exactly_zero_advantage(reward, group_size):
    # In float32 the mean of eight rewards of 0.7 is not 0.7; in float64 that is so of some other
    # sizes and rewards.
    rewards_PG = torch.full((2, group_size), reward, dtype=torch.float64)
    rewards_PG[1, 0] += 1.0
    result = advantages(rewards_PG, Args())
    assert result[0].tolist() == [0.0] * group_size
    assert all(result[1] != 0)  # next to it, a group that does differ


def test_large_rewards_keep_their_differences():
    # mean 1e6 + 1/2, σ = 1/2
    rewards_PG = torch.tensor([[1e6, 1e6 + 1, 1e6, 1e6 + 1]], dtype=torch.float64)
    assert advantages(rewards_PG, Args()).tolist()[0] == pytest.approx(
        [-0.999998, 0.999998] * 2, rel=1e-9
    )


def test_a_group_does_not_see_the_others():
    rewards_PG = torch.tensor(
        [[0.0, 1.0, 0.7], [0.7, 0.7, 0.7], [5.0, -3.0, 1e6]], dtype=torch.float64
    )
    together = advantages(rewards_PG, Args())
    alone = [advantages(rewards_PG[p : p + 1], Args()) for p in range(3)]
    assert torch.equal(together, torch.cat(alone))


def test_inputs_are_left_unchanged():
    rewards_PG = torch.tensor([[1.0, 0.0], [0.7, 0.7]], dtype=torch.float64)
    lengths_PG = torch.tensor([[1, 2], [3, 4]])
    micro = micro_batch(
        torch.tensor([[-1.0], [-2.0]]),
        torch.tensor([[-3.0], [-1.0]]),
        torch.tensor([[1.0], [-1.0]]),
        torch.tensor([[True], [False]]),
        reference_logprobs_BT=torch.tensor([[-2.0], [-2.5]]),
    )
    tensors = [value for value in vars(micro).values() if isinstance(value, torch.Tensor)]
    inputs = [rewards_PG, lengths_PG, *tensors]
    before = [tensor.clone() for tensor in inputs]
    advantages(rewards_PG, Args())
    token_weights(rewards_PG, lengths_PG, Args())
    per_token_loss(micro, Args(kl_coef=0.1))
    assert all(torch.equal(now, then) for now, then in zip(inputs, before, strict=True))


# Weights


def test_every_token_weighs_one_over_the_number_of_response_tokens():
    advantages_PG = torch.tensor([[1.0, -1.0], [0.0, 0.0], [0.5, -0.5]], dtype=torch.float64)
    lengths_PG = torch.tensor([[3, 1], [4, 2], [5, 5]])  # 20 tokens; those of group 2 count in N
    weights_PG = token_weights(advantages_PG, lengths_PG, Args())
    assert weights_PG.tolist() == [[0.05, 0.05], [0.0, 0.0], [0.05, 0.05]]


def test_with_a_kl_penalty_groups_of_equal_rewards_learn_too():
    advantages_PG = torch.tensor([[1.0, -1.0], [0.0, 0.0]], dtype=torch.float64)
    lengths_PG = torch.tensor([[3, 1], [4, 2]])
    weights_PG = token_weights(advantages_PG, lengths_PG, Args(kl_coef=0.04))
    assert weights_PG.tolist() == [[0.1, 0.1], [0.1, 0.1]]


# Loss and gradient


def test_clipping_bounds_are_two_tenths():
    assert (Args().clip_low, Args().clip_high) == (0.2, 0.2)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_positive_advantage_by_hand(dtype, tolerance):
    # A = 2, bounds 0.8 and 1.2.
    # ρ = 1.5: min(3.0, 1.2 · 2) = 2.4, clipped: no gradient
    # ρ = 1.1: min(2.2, 2.2) = 2.2
    # ρ = 0.9: min(1.8, 1.8) = 1.8
    # ρ = 0.5: min(1.0, 0.8 · 2) = 1.0, not clipped
    # Unclipped, the loss is −ρ A, whose derivative by the log-prob is −ρ A again.
    log_ratios = [math.log(ratio) for ratio in (1.5, 1.1, 0.9, 0.5)]
    loss, gradient = loss_and_gradient(log_ratios, 2.0, Args(), dtype)
    assert loss == pytest.approx([-2.4, -2.2, -1.8, -1.0], rel=tolerance)
    assert gradient == pytest.approx([0.0, -2.2, -1.8, -1.0], rel=tolerance)
    assert gradient[0] == 0.0


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_negative_advantage_by_hand(dtype, tolerance):
    # A = −2, bounds 0.8 and 1.2.
    # ρ = 1.5: min(−3.0, 1.2 · −2) = −3.0, not clipped
    # ρ = 1.1: min(−2.2, −2.2) = −2.2
    # ρ = 0.9: min(−1.8, −1.8) = −1.8
    # ρ = 0.5: min(−1.0, 0.8 · −2) = −1.6, clipped
    log_ratios = [math.log(ratio) for ratio in (1.5, 1.1, 0.9, 0.5)]
    loss, gradient = loss_and_gradient(log_ratios, -2.0, Args(), dtype)
    assert loss == pytest.approx([3.0, 2.2, 1.8, 1.6], rel=tolerance)
    assert gradient == pytest.approx([3.0, 2.2, 1.8, 0.0], rel=tolerance)
    assert gradient[3] == 0.0


def test_two_bounds_by_hand():
    # ε_low = 0.1, ε_high = 0.5. For A = 1, ρ = 1.4 is inside and ρ = 1.6 outside; for A = −1,
    # ρ = 0.95 is inside and ρ = 0.85 outside.
    args = Args(clip_low=0.1, clip_high=0.5)
    loss, gradient = loss_and_gradient([math.log(1.4), math.log(1.6)], 1.0, args)
    assert loss == pytest.approx([-1.4, -1.5], rel=1e-12) and gradient == pytest.approx(
        [-1.4, 0.0], rel=1e-12
    )
    loss, gradient = loss_and_gradient([math.log(0.95), math.log(0.85)], -1.0, args)
    assert loss == pytest.approx([0.95, 0.9], rel=1e-12) and gradient == pytest.approx(
        [0.95, 0.0], rel=1e-12
    )


@pytest.mark.parametrize("low, high", [(0.2, 0.2), (0.1, 0.4), (0.3, 0.05)])
def test_loss_against_a_loop(low, high):
    new, old, advantage = random_tokens(400, seed=1)
    expected = [
        loss_by_the_equation(n, o, a, low, high)
        for n, o, a in zip(new, old, advantage, strict=True)
    ]
    args = Args(clip_low=low, clip_high=high)
    # float32: log-probs of −10 are rounded
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 3e-6)):
        found = loss_of(*(torch.tensor(x, dtype=dtype) for x in (new, old, advantage)), args)
        assert found.dtype == dtype
        assert found.tolist() == pytest.approx(expected, rel=tolerance)


def test_gradient_against_differences_of_a_loop():
    new, old, advantage = random_tokens(400, seed=2)
    logprobs = torch.tensor(new, dtype=torch.float64, requires_grad=True)
    constants = [torch.tensor(x, dtype=torch.float64) for x in (old, advantage)]
    loss_of(logprobs, *constants, Args()).sum().backward()
    # central differences: error h² in the equation and 1e-16 / h in rounding, each below 1e-9
    h = 1e-6
    for n, o, a, found in zip(new, old, advantage, logprobs.grad.tolist(), strict=True):
        # there the loss has a kink
        if min(abs(math.exp(n - o) - bound) for bound in (0.8, 1.2)) > 1e-5:
            slope = loss_by_the_equation(n + h, o, a, 0.2, 0.2) - loss_by_the_equation(
                n - h, o, a, 0.2, 0.2
            )
            assert found == pytest.approx(slope / (2 * h), rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("low, high", [(0.2, 0.2), (0.1, 0.4)])
def test_gradient_is_that_of_the_masked_weighted_logprob(low, high):
    # −A · M · sg(ρ) · logprob has the derivative −A M ρ: clipping is a one-sided mask.
    new, old, advantage = random_tokens(2000, seed=3)
    logprobs = torch.tensor(new, dtype=torch.float64, requires_grad=True)
    constants = [torch.tensor(x, dtype=torch.float64) for x in (old, advantage)]
    loss_of(logprobs, *constants, Args(clip_low=low, clip_high=high)).sum().backward()
    tokens = list(zip(new, old, advantage, strict=True))
    mask = [mask_by_the_equation(n, o, a, low, high) for n, o, a in tokens]
    expected = [-a * m * math.exp(n - o) for (n, o, a), m in zip(tokens, mask, strict=True)]
    assert logprobs.grad.tolist() == pytest.approx(expected, rel=1e-12)
    # Exactly the masked tokens have exactly no gradient, and both bounds were at work.
    assert [g != 0 for g in logprobs.grad.tolist()] == mask
    assert {a > 0 for (_, _, a), m in zip(tokens, mask, strict=True) if not m} == {True, False}


def test_on_policy_gradient_is_reinforce_with_a_normalised_baseline():
    # A policy with one distribution per prompt, so that its gradient flows through a softmax.
    torch.manual_seed(4)
    logits_PV = torch.randn(3, 11, dtype=torch.float64, requires_grad=True)
    tokens_PGT = torch.randint(11, (3, 4, 6))
    rewards_PG = torch.tensor(
        [[1, 0, 0, 1], [1, 1, 1, 0], [0.7, 0.7, 0.7, 0.7]], dtype=torch.float64
    )
    logprobs_PGT = torch.log_softmax(logits_PV, dim=-1)[torch.arange(3)[:, None, None], tokens_PGT]

    logprobs_BT = logprobs_PGT.flatten(0, 1)
    advantages_B1 = advantages(rewards_PG, Args()).view(-1, 1)
    micro = micro_batch(logprobs_BT, logprobs_BT.detach(), advantages_B1)
    loss = per_token_loss(micro, Args()).sum() / tokens_PGT.numel()
    (found_PV,) = torch.autograd.grad(loss, logits_PV)

    # REINFORCE by hand: ∂ log softmax(z)_y / ∂z = onehot(y) − softmax(z), weighted by
    # (r − baseline) / scale.
    expected_PV = torch.zeros(3, 11, dtype=torch.float64)
    for p in range(3):
        baseline, scale = rewards_PG[p].mean(), rewards_PG[p].std(correction=0) + 1e-6
        for g in range(4):
            for y in tokens_PGT[p, g].tolist():
                onehot = torch.eye(11, dtype=torch.float64)[y]
                score = onehot - torch.softmax(logits_PV[p].detach(), dim=-1)
                expected_PV[p] -= (rewards_PG[p, g] - baseline) / scale * score / tokens_PGT.numel()
    expected_PV[2] = 0.0
    torch.testing.assert_close(found_PV, expected_PV, rtol=1e-12, atol=1e-15)
    assert found_PV[2].tolist() == [0.0] * 11


def test_no_advantage_no_loss_no_gradient():
    loss, gradient = loss_and_gradient(
        [math.log(ratio) for ratio in (0.1, 0.8, 1.0, 1.2, 5.0)], 0.0, Args()
    )
    assert loss == [0.0] * 5 and gradient == [0.0] * 5


def log_of(ratio, dtype):
    """A number whose exponential, as PyTorch computes it in `dtype`, is exactly `ratio`."""
    x = torch.tensor(math.log(ratio), dtype=dtype)
    candidates = [x, torch.nextafter(x, x + 1), torch.nextafter(x, x - 1)]
    return next(c for c in candidates if torch.exp(c).item() == ratio).item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_ratio_exactly_on_the_bound_is_not_clipped(dtype):
    # ε = 1/4 and the ratios 3/4 and 5/4 are exact in binary. M holds for ρ ≤ 1 + ε and ρ ≥ 1 − ε.
    args = Args(clip_low=0.25, clip_high=0.25)
    low, high = log_of(0.75, dtype), log_of(1.25, dtype)
    loss, gradient = loss_and_gradient([high], 1.0, args, dtype, old=0.0)
    assert (loss, gradient) == ([-1.25], [-1.25])
    loss, gradient = loss_and_gradient([low], -1.0, args, dtype, old=0.0)
    assert (loss, gradient) == ([0.75], [0.75])
    # A hair further out (a few roundings), the loss is the same and the gradient gone.
    loss, gradient = loss_and_gradient([high + 1e-6], 1.0, args, dtype, old=0.0)
    assert (loss, gradient) == ([-1.25], [0.0])
    loss, gradient = loss_and_gradient([low - 1e-6], -1.0, args, dtype, old=0.0)
    assert (loss, gradient) == ([0.75], [0.0])


def test_on_policy_tokens_have_a_gradient_even_without_room():
    # ε = 0 puts ρ = 1 on both bounds at once.
    for advantage in (2.0, -2.0):
        _, gradient = loss_and_gradient([0.0], advantage, Args(clip_low=0.0, clip_high=0.0))
        assert gradient == [-advantage]


@pytest.mark.parametrize(
    "dtype, size", [(torch.float64, 80), (torch.float64, 100), (torch.float32, 80)]
)
def test_extreme_ratios_are_not_clamped(dtype, size):
    # What is not clipped follows the equation however far off it is: a bound on the log-ratio would
    # show here.
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    loss, gradient = loss_and_gradient([size, -size], 1.0, Args(), dtype)
    assert loss == pytest.approx([-1.2, -math.exp(-size)], rel=tolerance, abs=0)
    assert gradient == pytest.approx([0.0, -math.exp(-size)], rel=tolerance, abs=0)
    loss, gradient = loss_and_gradient([size, -size], -1.0, Args(), dtype)
    assert loss == pytest.approx([math.exp(size), 0.8], rel=tolerance, abs=0)
    assert gradient == pytest.approx([math.exp(size), 0.0], rel=tolerance, abs=0)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_an_overflow_shows(advantage):
    # exp(100) is 2.7e43, more than float32 holds. Nothing hides that: loss or gradient stops being
    # finite, and the script then skips the update and counts it.
    loss, gradient = loss_and_gradient([100.0], advantage, Args(), torch.float32)
    assert not (math.isfinite(loss[0]) and math.isfinite(gradient[0]))


def test_one_advantage_per_row():
    # The scripts pass log-probs [B, T] with advantages [B, 1].
    new, old, _ = random_tokens(12, seed=5)
    new_BT, old_BT = (torch.tensor(x, dtype=torch.float64).view(3, 4) for x in (new, old))
    advantages_B1 = torch.tensor([[1.0], [-2.0], [0.0]], dtype=torch.float64)
    found = per_token_loss(micro_batch(new_BT, old_BT, advantages_B1), Args())
    for b, advantage in enumerate((1.0, -2.0, 0.0)):
        expected = [
            loss_by_the_equation(new[i], old[i], advantage, 0.2, 0.2)
            for i in range(4 * b, 4 * b + 4)
        ]
        assert found[b].tolist() == pytest.approx(expected, rel=1e-12)


# KL penalty


def test_kl_penalty_by_hand():
    # A = 0, so that only the penalty is left, with β = 1/2. d = log π − log π_ref: ln 2, −ln 2, 0.
    # k3 = e^−d + d − 1 = 1/2 + ln 2 − 1, 2 − ln 2 − 1, 0        slope of k3 by log π: 1 − e^−d
    old, zeros = torch.full((3,), -1.0, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    ln2 = math.log(2)
    reference = old - torch.tensor([ln2, -ln2, 0.0], dtype=torch.float64)
    args = Args(kl_coef=0.5)
    more = {"reference_logprobs_BT": reference}
    losses = losses_of(grpo, old, old, zeros, args, **more)
    assert losses.tolist() == pytest.approx([(ln2 - 0.5) / 2, (1 - ln2) / 2, 0.0], abs=1e-15)
    slopes = slopes_of(grpo, old, old, zeros, args, **more)
    assert slopes.tolist() == pytest.approx([0.25, -0.5, 0.0], abs=1e-15)


def test_kl_penalty_is_added_to_the_clipped_loss():
    new, old, advantage = (torch.tensor(x, dtype=torch.float64) for x in random_tokens(400, seed=6))
    reference = new + 0.3 * torch.randn(400, generator=torch.Generator().manual_seed(6)).double()
    args = Args(kl_coef=0.04)
    found = losses_of(grpo, new, old, advantage, args, reference_logprobs_BT=reference)
    rows = zip(*(x.tolist() for x in (new, old, advantage, reference)), strict=True)
    for loss, (n, o, a, ref) in zip(found.tolist(), rows, strict=True):
        k3 = math.exp(ref - n) - (ref - n) - 1
        assert loss == pytest.approx(loss_by_the_equation(n, o, a, 0.2, 0.2) + 0.04 * k3, rel=1e-12)


def test_what_differentiating_k3_pushes_down():
    """Averaged over samples, the penalty's gradient is that of KL(π_ref ‖ π), not KL(π ‖ π_ref).

    arXiv 2506.09477: an estimator's gradient does not estimate the gradient. The average over a
    vocabulary of seven tokens is exact: each token's share is its probability. So are the two
    gradients, by autograd through the sums that define the divergences.
    """
    generator = torch.Generator().manual_seed(7)
    logits_V = torch.randn(7, generator=generator, dtype=torch.float64, requires_grad=True)
    reference_V = torch.log_softmax(torch.randn(7, generator=generator, dtype=torch.float64), 0)
    logprobs_V = torch.log_softmax(logits_V, dim=0)
    zeros_V = torch.zeros(7, dtype=torch.float64)
    share_V = logprobs_V.exp().detach()
    losses_V = losses_of(
        grpo, logprobs_V, logprobs_V.detach(), zeros_V, Args(kl_coef=1.0),
        reference_logprobs_BT=reference_V,
    )  # fmt: skip
    (found_V,) = torch.autograd.grad((share_V * losses_V).sum(), logits_V, retain_graph=True)

    kl_from_reference = (reference_V.exp() * (reference_V - logprobs_V)).sum()
    kl_to_reference = (logprobs_V.exp() * (logprobs_V - reference_V)).sum()
    (pushed_V,) = torch.autograd.grad(kl_from_reference, logits_V, retain_graph=True)
    (estimated_V,) = torch.autograd.grad(kl_to_reference, logits_V, retain_graph=True)
    torch.testing.assert_close(found_V, pushed_V, rtol=1e-12, atol=1e-15)
    assert (found_V - estimated_V).norm() > 0.1 * estimated_V.norm()
    # The value is what one would expect.
    assert (share_V * losses_V).sum().item() == pytest.approx(kl_to_reference.item(), rel=1e-12)


def test_the_same_from_samples():
    # 200,000 tokens sampled from the policy: the average gradient is within 1 % of its exact value.
    generator = torch.Generator().manual_seed(8)
    logits_V = torch.randn(7, generator=generator, dtype=torch.float64, requires_grad=True)
    reference_V = torch.log_softmax(torch.randn(7, generator=generator, dtype=torch.float64), 0)
    logprobs_V = torch.log_softmax(logits_V, dim=0)
    tokens_N = torch.multinomial(
        logprobs_V.exp().detach(), 200_000, replacement=True, generator=generator
    )
    losses_N = losses_of(
        grpo, logprobs_V[tokens_N], logprobs_V.detach()[tokens_N], torch.zeros(len(tokens_N)),
        Args(kl_coef=1.0), reference_logprobs_BT=reference_V[tokens_N],
    )  # fmt: skip
    (found_V,) = torch.autograd.grad(losses_N.mean(), logits_V)
    exact_V = logprobs_V.exp().detach() - reference_V.exp()  # of KL(π_ref ‖ π) by the logits
    assert (found_V - exact_V).norm() < 0.01 * exact_V.norm()
