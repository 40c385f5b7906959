"""Variants of `grpo.py`: what is written, and losses and gradients against loops written from the
papers' equations.

The loops use Python's floats only, with numbers from the papers instead of the scripts' options.
Each returns a token's part of the loss and its derivative with respect to the token's log-prob,
worked out by hand.
"""

import math
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import tyro

from benchmarks import variants
from benchmarks.helpers import reporting
from tests.helpers import REPOSITORY, dense_task, import_script, steps, train

NAMES = list(variants.VARIANTS)
FENCE = re.compile(
    r"(?<=# --- algorithm ---\n)(.*?)^ *# --- end algorithm ---\n", re.DOTALL | re.MULTILINE
)
GRPO = (REPOSITORY / "grpo.py").read_text()
# Three groups of five. In the second, one of three bad responses is too many; the third has nothing
# to teach.
REWARDS = [[0.0, 1.0, 0.0, 0.0, 0.25], [0.5, 0.0, 1.0, 0.0, 0.0], [0.7] * 5]
LENGTHS = [9, 8, 16, 1, 8, 17, 8, 9, 3, 2, 8, 1, 2, 8, 5]
# A sampled token's ratio, in turn: between all bounds of all clipping, on both sides of 1.
RATIOS = [0.3, 0.7, 0.9, 1.05, 1.24, 1.5, 2.5, 3.5]
SPLITS = {
    "one micro-batch": [list(range(15))],
    "one row each": [[row] for row in range(15)],
    "a few": [[6, 1, 3, 14], [0, 7, 12], [5, 2, 4, 10, 8], [11, 13, 9]],
}


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """{name: the written script's path}"""
    directory = tmp_path_factory.mktemp("variants")
    paths = {name: directory / f"written_{name}.py" for name in NAMES}
    for name, path in paths.items():
        variants.main(tyro.cli(variants.Args, args=["--write", name, str(path)]))
    return paths


def sampled(lag):
    """Log-probs of 15 responses under the policy, and under the one that sampled them."""
    rng = random.Random(5)
    new = [[-rng.uniform(0.01, 3) for _ in range(length)] for length in LENGTHS]
    if not lag:
        return new, new
    # Every response starts elsewhere in RATIOS, and every fifth has hardly moved at all.
    moves = [
        [math.log(RATIOS[(row + t) % 8]) for t in range(length)]
        for row, length in enumerate(LENGTHS)
    ]
    moves = [
        [1e-4 * move for move in of_row] if row % 5 == 2 else of_row
        for row, of_row in enumerate(moves)
    ]
    return new, [
        [lp - m for lp, m in zip(*pair, strict=True)] for pair in zip(new, moves, strict=True)
    ]


# The equations, in floats


def centred(group):
    return [r - math.fsum(group) / len(group) for r in group]


def normalised(group):
    std = math.sqrt(math.fsum(a * a for a in centred(group)) / len(group))
    return [a / (std + 1e-6) for a in centred(group)]


def leave_one_out(group):
    return [
        r - math.fsum(group[:j] + group[j + 1 :]) / (len(group) - 1) for j, r in enumerate(group)
    ]


def balanced(group):
    mean = math.fsum(group) / len(group)
    good, bad = (
        [j for j, r in enumerate(group) if (r >= mean) == is_good] for is_good in (True, False)
    )
    kept = good + bad[: len(good)]
    mean_of_kept = math.fsum(group[j] for j in kept) / len(kept)
    return [r - mean_of_kept if j in kept else 0.0 for j, r in enumerate(group)]


def weighted(weight):
    """−w A log π with the weight a constant of the gradient, w = weight(ρ, A)."""

    def of_response(new, old, a):
        weights = [weight(math.exp(lp - lp_old), a) for lp, lp_old in zip(new, old, strict=True)]
        return [(-w * a * lp, -w * a) for w, lp in zip(weights, new, strict=True)]

    return of_response


def clipped(rho, a, low, high):
    """−min(ρ A, clip(ρ) A) and its derivative with respect to log ρ."""
    if (a > 0 and rho > high) or (a < 0 and rho < low):
        return -(high if a > 0 else low) * a, 0.0
    return -rho * a, -rho * a


def by_token(low, high):
    return lambda new, old, a: [
        clipped(math.exp(x - y), a, low, high) for x, y in zip(new, old, strict=True)
    ]


def gspo(new, old, a):
    """The response's loss, divided among its tokens; log s moves by 1/|y| with each token's
    log-prob.
    """
    n = len(new)
    loss, slope = clipped(
        math.exp(math.fsum(x - y for x, y in zip(new, old, strict=True)) / n), a, 0.9997, 1.0004
    )
    return [(loss / n, slope / n)] * n


def ring(rho, a):
    return 1.0 if 0.8 <= rho <= 1.2 or (a > 0 and rho <= 0.4) or (a < 0 and rho >= 3) else 0.0


plain = weighted(lambda rho, a: 1.0)
EQUATIONS = {
    "reinforce": (centred, plain),
    "rloo": (leave_one_out, plain),
    "dr_grpo": (centred, by_token(0.8, 1.2)),
    "dapo": (normalised, by_token(0.8, 1.28)),
    "gspo": (normalised, gspo),
    "cispo": (normalised, weighted(lambda rho, a: min(rho, 1.28))),
    "tis": (normalised, weighted(lambda rho, a: min(rho, 2.0))),
    "rec_twoside_is": (centred, weighted(lambda rho, a: rho if 0.8 <= rho <= 1.2 else 0.0)),
    "rec_ring_nois": (centred, weighted(ring)),
    "red_drop": (balanced, plain),
}


def loss_and_gradient(script, new, old, split):
    """What the script makes of the responses: the loss, and each token's log-prob's gradient."""
    rewards, args = torch.tensor(REWARDS, dtype=torch.float64), script.Args()
    advantages = script.advantages(rewards, args).flatten()
    total, gradient = 0.0, [None] * len(new)
    for rows in split:
        places = [(i, slice(3 + row % 4, 3 + row % 4 + LENGTHS[row])) for i, row in enumerate(rows)]
        shape = len(rows), 1 + max(place.stop for _, place in places)
        # Prompts and padding hold numbers that must not count.
        logprobs = torch.full(shape, 7.0, dtype=torch.float64)
        sampler, mask = torch.zeros_like(logprobs), torch.zeros(shape, dtype=torch.bool)
        for row, place in zip(rows, places, strict=True):
            logprobs[place] = torch.tensor(new[row], dtype=torch.float64)
            sampler[place] = torch.tensor(old[row], dtype=torch.float64)
            mask[place] = True
        logprobs.requires_grad_()
        advantages_B1 = advantages[rows].unsqueeze(1)
        losses = script.per_token_loss(logprobs, sampler, advantages_B1, mask, args)
        loss = losses[mask].sum() / sum(LENGTHS)  # as in `main`
        loss.backward()
        total += loss.item()
        for row, place in zip(rows, places, strict=True):
            gradient[row] = logprobs.grad[place].tolist()
    return total, [value for row in gradient for value in row]


@pytest.mark.parametrize("lag", [0, 19])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradient_against_a_loop_from_the_equation(name, split, lag, scripts):
    advantages_of, losses_of = EQUATIONS[name]
    new, old = sampled(lag)
    advantages = [
        0.0 if len(set(group)) == 1 else a for group in REWARDS for a in advantages_of(group)
    ]
    tokens = [token for row in zip(new, old, advantages, strict=True) for token in losses_of(*row)]
    loss, gradient = loss_and_gradient(import_script(scripts[name]), new, old, SPLITS[split])
    assert loss == pytest.approx(
        math.fsum(loss for loss, _ in tokens) / sum(LENGTHS), rel=0, abs=1e-14
    )
    assert gradient == pytest.approx(
        [slope / sum(LENGTHS) for _, slope in tokens], rel=0, abs=1e-15
    )


@pytest.mark.parametrize("name", NAMES)
def test_equal_rewards_give_exactly_zero_advantage(name, scripts):
    script = import_script(scripts[name])
    for reward, group_size in ((0.7, 3), (0.1, 6), (1e6, 7), (-3.3, 49)):
        rewards_PG = torch.full((1, group_size), reward, dtype=torch.float64)
        assert torch.equal(
            script.advantages(rewards_PG, script.Args()), torch.zeros_like(rewards_PG)
        )


@pytest.mark.parametrize("name", NAMES)
def test_only_the_fenced_regions_differ(name, scripts):
    text = scripts[name].read_text()
    assert FENCE.sub("", text) == FENCE.sub("", GRPO)
    title, options, *code = FENCE.findall(text)
    assert all(
        part in title
        for part in ("arXiv ", "    A_ij = ", "    loss = −1/N Σ", f"python written_{name}.py")
    )
    assert [title, options, *code] != FENCE.findall(GRPO) and all(
        len(own.splitlines()) <= 15 for own in code
    )
    # No option without a use.
    assert set(re.findall(r"\bargs\.(\w+)", "".join(code))) == set(
        re.findall(r"^    (\w+): ", options, re.MULTILINE)
    )


@pytest.mark.parametrize("name", NAMES)
def test_ruff_finds_nothing(name, scripts):
    for command in ("check", "format --check"):  # as if it lay beside common/
        ruff = [sys.executable, "-m", "ruff", *command.split(), "--stdin-filename", "mine.py", "-"]
        done = subprocess.run(
            ruff, cwd=REPOSITORY, input=scripts[name].read_text(), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_written_script_trains(scripts, tmp_path):
    import_script(scripts["gspo"])
    run = train(
        tmp_path, script="written_gspo", task=dense_task(tmp_path), num_steps=2, sync_interval=2
    )
    first, second = steps(run)  # of which the second has lag 1
    assert (
        first["grad_norm"] > 0 and first["ratio/clip_fraction"] == 0 < second["ratio/clip_fraction"]
    )


def test_bad_input_ends_in_an_error_message(tmp_path):
    path = tmp_path / "mine.py"
    with pytest.raises(
        SystemExit, match=r"--write gsp: no such variant; give one of reinforce, .*gspo"
    ):
        variants.write("gsp", path)
    assert not path.exists()
    path.write_text("mine")
    with pytest.raises(
        SystemExit, match=r"--write gspo .*mine\.py: File exists; give another file"
    ):
        variants.write("gspo", path)
    assert path.read_text() == "mine"


def test_what_the_report_concludes():
    def run(*rewards, skipped=0.0):
        return [
            {"reward/mean": reward, "update_skipped": skipped} for reward in np.repeat(rewards, 5)
        ]

    assert variants.is_stable([run(*np.linspace(0, 1, 10)), run(*[0.5] * 9, 0.41)])
    assert not variants.is_stable([run(*np.linspace(0, 1, 10)), run(*[0.5] * 9, 0.39)])
    assert not variants.is_stable([run(*np.linspace(0, 1, 10), skipped=1.0)])
    # 0.3 apart, 0.2 and 0.2 wide
    assert reporting.difference([0.7, 0.9], [0.4, 0.6]) == reporting.SPREAD
    assert reporting.difference([0.8], [0.7]) == "above"
    assert reporting.difference([0.6], [0.7]) == "below"
