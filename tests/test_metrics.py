"""Logged statistics, against numpy in float64 and numbers worked out by hand.

The sums are float64 sums of a few hundred terms: 1e-13 relative. What must be exact is compared
with ==.
"""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from common.metrics import StepMetrics
from common.sampling import Batch
from tests import losses
from tests.helpers import REPOSITORY

CPU = torch.device("cpu")


def random_micro_batch(rows=9, width=30, seed=0):
    """Mask, log-probs of trainer, sampler and reference, entropies; values that must not count
    outside the mask.
    """
    generator = torch.Generator().manual_seed(seed)
    mask_BT = torch.rand(rows, width, generator=generator) < 0.5
    lp_BT = -4 * torch.rand(rows, width, generator=generator)
    sampler_BT = lp_BT + 0.3 * torch.randn(rows, width, generator=generator)
    ref_BT = lp_BT + 0.5 * torch.randn(rows, width, generator=generator)
    entropy_BT = 5 * torch.rand(rows, width, generator=generator)
    for tensor in (lp_BT, sampler_BT, ref_BT, entropy_BT):
        tensor[~mask_BT] = torch.randint(
            -50, 50, (int((~mask_BT).sum()),), generator=generator
        ).float()
    return mask_BT, lp_BT, sampler_BT, entropy_BT, ref_BT


def one_row(*columns):
    """[1, T] tensors: a mask that is all True, then the given lists."""
    return [
        torch.ones(1, len(columns[0]), dtype=torch.bool),
        *(torch.tensor([c], dtype=torch.float32) for c in columns),
    ]


TOKEN_KEYS = ("entropy", "kl/", "ratio/", "sampler_mismatch/")


def measured(mask_BT, lp_BT, sampler_BT, entropy_BT, ref_BT=None, advantages_B1=None):
    """A `MicroBatch` with these log-probs of trainer, sampler and reference, and entropies."""
    if advantages_B1 is None:
        advantages_B1 = torch.ones(len(mask_BT), 1)
    return losses.micro_batch(
        lp_BT,
        sampler_BT,
        advantages_B1,
        mask_BT,
        learns=lp_BT.requires_grad,
        entropy_BT=entropy_BT,
        reference_logprobs_BT=ref_BT,
    )


def result_of(metrics, lengths, version=0, grades=None, truncated=None, group_size=None):
    """All metrics of step 1 for responses of these lengths; the times do not matter here."""
    metrics.times |= {"time/train": 1.0}
    if not metrics.maxima:  # there is no step without tokens
        metrics.add_micro_batch(measured(*one_row([-1.0], [-1.0], [0.0])))
    B = len(lengths)
    batch = Batch(
        number=1,
        version=version,
        group_size=group_size or B,
        problems=[0] * B,
        prompts=[[1]] * B,
        responses=[[2] * n for n in lengths],
        logprobs=[[-1.0] * n for n in lengths],
        truncated=truncated or [False] * B,
        metrics={"time/sample": 1.0},
        grades=grades or [{"reward": 0.0}] * B,
    )
    return metrics.result(batch, CPU, "float32")


def statistics_of(*micro_batches, num_tokens=None, lag=0):
    """The token statistics of some micro-batches (mask, log-probs of trainer and sampler, entropy[,
    reference]).
    """
    metrics = StepMetrics()
    for values in micro_batches:
        metrics.add_micro_batch(measured(*values))
    num_tokens = num_tokens or sum(int(mask_BT.sum()) for mask_BT, *_ in micro_batches)
    result = result_of(metrics, [num_tokens], version=-lag)
    return {key: value for key, value in result.items() if key.startswith(TOKEN_KEYS)}


def test_all_of_them_by_hand():
    # Two tokens.  lp: −1, −3    reference: −2, −2.5    sampler: −1.5, −2.75    entropy: 2, 1
    # lp − ref:      1, −0.5     →  k1 = 0.25, k2 = (1/2 + 1/8) / 2,
    #                               k3 = ((1/e + 1 − 1) + (e^0.5 − 0.5 − 1)) / 2
    # lp − sampler:  0.5, −0.25  →  k3 = ((e^0.5 − 0.5 − 1) + (e^−0.25 + 0.25 − 1)) / 2;
    #                               largest ratio e^0.5
    result = statistics_of(one_row([-1, -3], [-1.5, -2.75], [2, 1], [-2, -2.5]))
    expected = {
        "entropy": 1.5,
        "kl/ref_k1": 0.25,
        "kl/ref_k2": 0.3125,
        "kl/ref_k3": (math.exp(-1) + math.exp(0.5) - 1.5) / 2,
        "kl/behaviour_k3": (math.exp(0.5) - 1.5 + math.exp(-0.25) - 0.75) / 2,
        "ratio/max": math.exp(0.5),
        "ratio/clip_fraction": 0.0,
        "ratio/clip_fraction_weighted": 0.0,
        "sampler_mismatch/mean": 0.375,
        "sampler_mismatch/max": 0.5,
    }
    assert result == pytest.approx(expected, rel=1e-13)


def test_all_of_them_against_numpy():
    micro_batch = random_micro_batch()
    mask, lp, sampler, entropy, ref = (tensor.numpy() for tensor in micro_batch)
    lp, sampler, entropy, ref = (
        array[mask].astype(np.float64) for array in (lp, sampler, entropy, ref)
    )
    expected = {
        "entropy": entropy.mean(),
        "kl/ref_k1": (lp - ref).mean(),
        "kl/ref_k2": ((lp - ref) ** 2 / 2).mean(),
        "kl/ref_k3": (np.exp(ref - lp) - (ref - lp) - 1).mean(),
        "kl/behaviour_k3": (np.exp(lp - sampler) - (lp - sampler) - 1).mean(),
        "ratio/max": np.exp(lp - sampler).max(),
        "ratio/clip_fraction": 0.0,
        "ratio/clip_fraction_weighted": 0.0,
        "sampler_mismatch/mean": np.abs(lp - sampler).mean(),
        "sampler_mismatch/max": np.abs(lp - sampler).max(),
    }
    assert statistics_of(micro_batch) == pytest.approx(expected, rel=1e-13)


def test_estimators_estimate_what_they_are_named_after():
    # Policy (1/2, 1/4, 1/4), reference (1/4, 1/4, 1/2). Four tokens sampled in exactly the policy's
    # proportions make the mean of k1 and of k3 the divergence itself:
    # KL(policy ‖ reference) = ½ ln 2 + 0 + ¼ ln ½ = ¼ ln 2.
    policy, other, tokens = [0.5, 0.25, 0.25], [0.25, 0.25, 0.5], [0, 0, 1, 2]
    lp, ref = ([math.log(probs[token]) for token in tokens] for probs in (policy, other))
    result = statistics_of(one_row(lp, lp, [0.0] * 4, ref))
    # the log-probs are float32
    assert result["kl/ref_k1"] == pytest.approx(math.log(2) / 4, rel=1e-6)
    assert result["kl/ref_k3"] == pytest.approx(math.log(2) / 4, rel=1e-6)
    # Had the reference sampled them for the policy to train on, the divergence to it is
    # KL(sampler ‖ trainer).
    tokens = [0, 1, 2, 2]
    lp, sampler = ([math.log(probs[token]) for token in tokens] for probs in (policy, other))
    truth = sum(q * math.log(q / p) for p, q in zip(policy, other, strict=True))
    assert statistics_of(one_row(lp, sampler, [0.0] * 4))["kl/behaviour_k3"] == pytest.approx(
        truth, rel=1e-6
    )


def test_equal_logprobs_have_exactly_zero_divergence():
    mask_BT, lp_BT, _, entropy_BT, _ = random_micro_batch()
    result = statistics_of((mask_BT, lp_BT, lp_BT.clone(), entropy_BT, lp_BT.clone()))
    for key in ("kl/ref_k1", "kl/ref_k2", "kl/ref_k3", "kl/behaviour_k3", "sampler_mismatch/mean"):
        assert result[key] == 0.0, key
    assert result["sampler_mismatch/max"] == 0.0 and result["ratio/max"] == 1.0


def test_small_divergences_survive():
    # After one update log-probs differ by 1e-4: k3 is 5e-9, lost if it were computed in float32.
    lp = [-1.0, -2.0]
    # exact in float32
    result = statistics_of(one_row(lp, lp, [0.0, 0.0], [-1.0 + 2**-13, -2.0 - 2**-13]))
    truth = (math.expm1(2**-13) - 2**-13 + math.expm1(-(2**-13)) + 2**-13) / 2
    assert result["kl/ref_k3"] == pytest.approx(truth, rel=1e-6)
    assert result["kl/ref_k2"] == pytest.approx(2**-27, rel=1e-13)


def split(micro_batch, pieces):
    return [[tensor[rows] for tensor in micro_batch] for rows in pieces]


def test_how_tokens_are_split_over_calls_does_not_show():
    micro_batch = random_micro_batch()
    expected = statistics_of(micro_batch)
    for pieces in (
        [[row] for row in range(9)],
        [[0, 1, 2, 3], [4, 5, 6, 7, 8]],
        [[8, 3], [5, 0, 1, 7], [2, 6, 4]],
    ):
        found = statistics_of(*split(micro_batch, pieces))
        assert found.keys() == expected.keys()
        for key in expected:  # maxima to the bit; sums up to the order of float64 additions
            assert found[key] == pytest.approx(
                expected[key], rel=0 if "max" in key else 2e-15, abs=1e-16
            ), key


def test_a_micro_batch_without_tokens_adds_nothing():
    micro_batch = random_micro_batch()
    empty = [torch.zeros_like(micro_batch[0]), *micro_batch[1:]]
    assert (
        statistics_of(micro_batch, empty)
        == statistics_of(empty, micro_batch)
        == statistics_of(micro_batch)
    )


def test_inputs_are_left_unchanged_and_no_gradient_is_kept():
    micro_batch = random_micro_batch()
    before = [tensor.clone() for tensor in micro_batch]
    micro_batch[1].requires_grad_()
    micro_batch[1].grad = torch.ones_like(micro_batch[1])
    result = statistics_of(micro_batch)
    assert all(torch.equal(now, then) for now, then in zip(micro_batch, before, strict=True))
    assert torch.equal(micro_batch[1].grad, torch.ones_like(micro_batch[1]))
    assert all(type(value) is float for value in result.values())


def test_means_are_over_the_number_of_tokens_given():
    # The whole batch's N, which may be more than the tokens added so far.
    micro_batch = random_micro_batch()
    n = int(micro_batch[0].sum())
    once, halved = statistics_of(micro_batch), statistics_of(micro_batch, num_tokens=2 * n)
    assert halved["entropy"] == pytest.approx(once["entropy"] / 2, rel=1e-15)
    assert halved["ratio/max"] == once["ratio/max"]


def test_without_a_reference_nothing_is_said_about_it():
    assert not [key for key in statistics_of(random_micro_batch()[:4]) if key.startswith("kl/ref")]


def test_a_lagging_sampler_has_no_mismatch():
    micro_batch = random_micro_batch()
    same, lagging = statistics_of(micro_batch), statistics_of(micro_batch, lag=1)
    left_out = {"sampler_mismatch/mean", "sampler_mismatch/max"}
    assert lagging == {key: value for key, value in same.items() if key not in left_out}


def with_gradient(mask, logprobs, gradient, advantages):
    """A micro-batch after its backward pass: one row, or as many as there are advantages."""
    lp_BT = torch.tensor(logprobs, requires_grad=True)
    lp_BT.grad = torch.tensor(gradient)
    return measured(
        torch.tensor(mask).bool(), lp_BT, lp_BT.detach(), torch.zeros_like(lp_BT.detach()),
        advantages_B1=torch.tensor(advantages).unsqueeze(1),
    )  # fmt: skip


def test_clip_fraction_by_hand():
    # Two micro-batches with a gradient, of 3 and 2 response tokens, of which 1 and 2 have gradient
    # 0; one without gradient, whose tokens count in N alone. A zero outside the mask counts
    # nowhere.
    metrics = StepMetrics()
    for mask, gradient in (
        ([1, 1, 1, 0], [0.0, -0.5, 0.25, 0.0]),
        ([0, 1, 1, 0], [0.0, 0.0, 0.0, 0.0]),
    ):
        logprobs = [-1.0, -2.0, -1.0, -1.0]
        metrics.add_micro_batch(with_gradient([mask], [logprobs], [gradient], [0.5]))
    ones, zeros_BT = torch.ones(1, 7).bool(), torch.zeros(1, 7)
    metrics.add_micro_batch(measured(ones, zeros_BT, zeros_BT, zeros_BT))
    result = result_of(metrics, [3, 2, 7])
    assert result["ratio/clip_fraction"] == 3 / 12
    likely, unlikely = 1 - math.exp(-1), 1 - math.exp(-2)  # the weights 1 − p
    weighted = (likely + unlikely + likely) / (3 * likely + 2 * unlikely)
    assert result["ratio/clip_fraction_weighted"] == pytest.approx(weighted, rel=1e-12)


def test_a_token_without_advantage_is_not_clipped():
    # Where the loss has another term, a KL penalty, responses without advantage learn as well. In
    # the first step it has no gradient yet: the zeros of the second row are not the clip's.
    micro = with_gradient(
        [[1, 1], [1, 1]], [[-1.0, -2.0], [-3.0, -1.0]], [[0.0, 0.5], [0.0, 0.0]], [-0.5, 0.0]
    )
    metrics = StepMetrics()
    metrics.add_micro_batch(micro)
    result = result_of(metrics, [2, 2])
    assert result["ratio/clip_fraction"] == 1 / 4
    likely, unlikely = 1 - math.exp(-1), 1 - math.exp(-2)
    weighted = likely / (likely + unlikely)
    assert result["ratio/clip_fraction_weighted"] == pytest.approx(weighted, rel=1e-12)


@pytest.mark.parametrize("nan_first", [True, False])
def test_a_nan_shows(nan_first):
    # A run that breaks tells its user to look at these numbers.
    good, bad = (
        one_row([-1.0], [-1.5], [2.0], [-1.0]),
        one_row([math.nan], [-1.0], [math.nan], [-1.0]),
    )
    result = statistics_of(*([bad, good] if nan_first else [good, bad]))
    for key in result.keys() - {"ratio/clip_fraction", "ratio/clip_fraction_weighted"}:
        assert math.isnan(result[key]), key


# Rewards


def test_reward_statistics_by_hand():
    # Six rewards: sum 4.4, squares 1 + 0 + 1 + 1 + 0.49 + 0.49 = 3.98. Groups 2 and 3 say nothing.
    rewards_PG = torch.tensor([[1, 0], [1, 1], [0.7, 0.7]], dtype=torch.float64)
    grades = [
        {"reward": r, "accuracy": a}
        for r, a in zip(rewards_PG.flatten().tolist(), [1, 0, 1, 1, 0, 0], strict=True)
    ]
    truncated = [False, True, False, False, False, True]
    result = result_of(StepMetrics(), [3, 9, 4, 4, 1, 6], 0, grades, truncated, group_size=2)
    mean = 4.4 / 6
    expected = {
        "reward/mean": mean,
        "reward/std": math.sqrt(3.98 / 6 - mean**2),
        "reward/zero_std_groups": 2 / 3,
        "accuracy": 0.5,
        "response_length/mean": 4.5,
        "response_length/max": 9.0,
        "response_length/truncated": 1 / 3,
    }
    found = {
        key: result[key]
        for key in result
        if key.startswith(("reward/", "response_length/")) or key == "accuracy"
    }
    assert found == pytest.approx(expected, rel=1e-13)


def test_any_entry_of_the_grades_is_averaged_over_those_that_have_it():
    grades = [{"reward": 0.5, "format": 1.0, "style": 0.25}, {"reward": 0.5, "format": 0.0}]
    result = result_of(StepMetrics(), [1, 1], grades=grades)
    assert (result["format"], result["style"]) == (0.5, 0.25)
    assert "accuracy" not in result and "reward" not in result


@pytest.mark.parametrize("reward", [0.7, 0.1, 1e6 + 0.1])
def test_equal_rewards_count_as_equal_at_any_value(reward):
    rewards_PG = torch.full((2, 7), reward, dtype=torch.float64)
    rewards_PG[1, 3] += 1e-6
    grades = [{"reward": r} for r in rewards_PG.flatten().tolist()]
    result = result_of(StepMetrics(), [1] * 14, grades=grades, group_size=7)
    assert result["reward/zero_std_groups"] == 0.5


@pytest.mark.parametrize(
    "gap, lag, warned",
    [(2e-3, 0, True), (5e-5, 0, False), (float("nan"), 0, False), (1.0, 2, False)],
)
def test_sampler_and_trainer_that_disagree_are_mentioned(gap, lag, warned, recwarn):
    # Only with equal weights: with a lag, the policy has learned in between. Where NaN is, the
    # update is skipped.
    statistics_of(one_row([-1.0, -2.0], [-1.0 + gap, -2.0 + gap], [0.0, 0.0]), lag=lag)
    assert any("sampler_mismatch/mean" in str(warning.message) for warning in recwarn) == warned


def test_what_an_update_of_the_same_step_has_moved_is_no_mismatch(recwarn):
    # Of several updates per batch, only the first finds the weights that sampled it.
    metrics = StepMetrics()
    metrics.add_micro_batch(measured(*one_row([-1.0, -2.0], [-1.0 - 2**-15, -2.0], [0.0, 0.0])))
    metrics.add_update(loss=0.5, grad_norm=1.0, lr=0.1, skipped=False)
    metrics.add_micro_batch(measured(*one_row([-3.0], [-3.5], [0.0])))
    metrics.add_update(loss=1.5, grad_norm=2.0, lr=0.1, skipped=True)
    result = result_of(metrics, [2, 1])
    assert result["sampler_mismatch/mean"] == 2**-16
    assert result["sampler_mismatch/max"] == 2**-15
    assert not recwarn.list
    # All else is measured in both, before the update of each.
    assert result["ratio/max"] == math.exp(0.5)
    k3 = (math.exp(0.5) - 1.5 + math.exp(2**-15) - 2**-15 - 1) / 3
    assert result["kl/behaviour_k3"] == pytest.approx(k3, rel=1e-10)
    means = {"loss": 1.0, "grad_norm": 1.5, "lr": 0.1, "update_skipped": 0.5}
    assert {name: result[name] for name in means} == means


# Times


def test_a_step_is_the_sum_of_its_phases_without_evaluation(monkeypatch):
    clock = iter([100.0, 101.0, 103.0, 107.0, 115.0, 131.0])
    monkeypatch.setattr("common.metrics.time.perf_counter", lambda: next(clock))
    metrics = StepMetrics()
    metrics.add_micro_batch(measured(*one_row([-1.0], [-1.0], [0.0])))
    for name in ("wait", "grade", "train", "eval", "sync"):
        metrics.phase(name)
    batch = Batch(
        number=7,
        version=4,
        group_size=1,
        problems=[0],
        prompts=[[1, 2, 3]],
        responses=[[4, 5]],
        logprobs=[[-1.0, -1.0]],
        truncated=[False],
        metrics={"time/sample": 0.5},
        grades=[{"reward": 0.0}],
    )
    result = metrics.result(batch, CPU, "float32")
    phases = {
        "wait": 1.0,
        "grade": 2.0,
        "train": 4.0,
        "eval": 8.0,
        "sync": 16.0,
        "step": 23.0,
        "sample": 0.5,
    }
    assert {name: result[f"time/{name}"] for name in phases} == phases
    assert (result["lag"], result["weights_version"]) == (2, 4)
    assert result["throughput/sampled_tokens_per_second"] == 2 / 0.5
    assert result["throughput/trained_tokens_per_second"] == 5 / 4


def test_memory_of_the_process_that_started_this_one_does_not_count():
    # as when a notebook or a benchmark with a model of its own starts a run
    ballast = bytearray(2**30)
    code = """
import torch
from common.metrics import peak_bytes
print(peak_bytes(torch.device("cpu")))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert 2**26 < int(done.stdout) < len(ballast)
