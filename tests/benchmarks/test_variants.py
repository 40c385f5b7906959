"""Variants of `grpo.py`: what is written; losses and gradients against loops from the equations.

The loops use Python's floats only, with numbers from the papers instead of the scripts' options.
Each returns a token's loss and its derivatives with respect to the token's log-prob and entropy,
worked out by hand. (tests/test_algorithms.py checks of each variant what every script must do.)
"""

import math
import random
import re
import subprocess
import sys

import pytest
import torch
import tyro

from benchmarks import variants
from tests.helpers import REPOSITORY, dense_task, import_script, steps, train
from tests.losses import micro_batch

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
REPLY = 6  # tokens that no policy sampled, in the middle of some responses
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
    """Per response: its tokens as (log-prob, sampler's log-prob, reference's log-prob, entropy)."""
    rng = random.Random(5)
    responses = []
    for row, length in enumerate(LENGTHS):
        tokens = []
        for t in range(length):
            new = -rng.uniform(0.01, 3)
            # Every response starts elsewhere in RATIOS, and every fifth has hardly moved at all.
            moved = math.log(RATIOS[(row + t) % 8]) * (1e-4 if row % 5 == 2 else 1)
            old = new - moved if lag else new
            tokens.append((new, old, new - rng.uniform(-0.5, 0.5), rng.uniform(0, 2)))
        responses.append(tokens)
    return responses


# The equations, in floats


def centred(group):
    return [r - math.fsum(group) / len(group) for r in group]


def normalised(group):
    std = math.sqrt(math.fsum(a * a for a in centred(group)) / len(group))
    return [a / (std + 1e-6) for a in centred(group)]


def leave_one_out(group):
    others = [group[:j] + group[j + 1 :] for j in range(len(group))]
    return [r - math.fsum(rest) / len(rest) for r, rest in zip(group, others, strict=True)]


def balanced(group):
    mean = math.fsum(group) / len(group)
    good = [j for j, r in enumerate(group) if r >= mean]
    bad = [j for j, r in enumerate(group) if r < mean]
    kept = good + bad[: len(good)]
    mean_of_kept = math.fsum(group[j] for j in kept) / len(kept)
    return [r - mean_of_kept if j in kept else 0.0 for j, r in enumerate(group)]


def weighted(weight):
    """−w A log π with the weight a constant of the gradient, w = weight(ρ, A)."""

    def of_response(tokens, a):
        found = []
        for new, old, _, _ in tokens:
            w = weight(math.exp(new - old), a)
            found.append((-w * a * new, -w * a, 0.0))
        return found

    return of_response


def clipped(rho, a, low, high):
    """−min(ρ A, clip(ρ) A) and its derivative with respect to log ρ."""
    if (a > 0 and rho > high) or (a < 0 and rho < low):
        return -(high if a > 0 else low) * a, 0.0
    return -rho * a, -rho * a


def by_token(low, high, beta=0.0, c=0.0, beta_in_reward=0.0):
    """The clipped loss of each token, plus β k3, minus c times its entropy; A less a penalty."""

    def of_response(tokens, a):
        a -= beta_in_reward * math.fsum(new - ref for new, _, ref, _ in tokens)
        found = []
        for new, old, ref, entropy in tokens:
            loss, slope = clipped(math.exp(new - old), a, low, high)
            k3 = math.exp(ref - new) - (ref - new) - 1
            loss += beta * k3 - c * entropy
            found.append((loss, slope + beta * (1 - math.exp(ref - new)), -c))
        return found

    return of_response


def gspo(tokens, a):
    """The response's loss for each token; log s moves by 1/|y| with each token's log-prob."""
    s = math.exp(math.fsum(new - old for new, old, _, _ in tokens) / len(tokens))
    loss, slope = clipped(s, a, 0.9997, 1.0004)
    # Each token's weight is 1 / (P G |y|): the sum over them is 1 / (P G), and moves by it.
    return [(loss, slope, 0.0)] * len(tokens)


def ring(rho, a):
    return 1.0 if 0.8 <= rho <= 1.2 or (a > 0 and rho <= 0.4) or (a < 0 and rho >= 3) else 0.0


# What a token of row i weighs


def per_token(i):
    return 1 / sum(LENGTHS)


def per_response(i):
    return 1 / (15 * LENGTHS[i])


def constant(i):
    return 1 / (15 * 64)  # --max-response-tokens


def of_unequal_groups(i):
    return 1 / sum(LENGTHS[:10]) if i < 10 else 0.0


plain = weighted(lambda rho, a: 1.0)
EQUATIONS = {
    "reinforce": (centred, plain, per_token),
    "rloo": (leave_one_out, plain, per_token),
    "paper_grpo": (normalised, by_token(0.8, 1.2, beta=0.04), per_response),
    "dr_grpo": (centred, by_token(0.8, 1.2), constant),
    "drop_equal": (normalised, by_token(0.8, 1.2), of_unequal_groups),
    "dapo": (normalised, by_token(0.8, 1.28), of_unequal_groups),
    "entropy_bonus": (normalised, by_token(0.8, 1.2, c=0.01), per_token),
    "kl_in_reward": (normalised, by_token(0.8, 1.2, beta_in_reward=0.01), per_token),
    "gspo": (normalised, gspo, per_response),
    "cispo": (normalised, weighted(lambda rho, a: min(rho, 1.28)), per_token),
    "tis": (normalised, weighted(lambda rho, a: min(rho, 2.0)), per_token),
    "rec_twoside_is": (
        centred,
        weighted(lambda rho, a: rho if 0.8 <= rho <= 1.2 else 0.0),
        per_token,
    ),
    "rec_ring_nois": (centred, weighted(ring), per_token),
    "red_drop": (balanced, plain, per_token),
}


def places_of(row):
    """Columns of a row's own tokens. Every third row has two turns, the second after a reply."""
    first, length = 3 + row % 4, LENGTHS[row]
    turn = length // 2 if row % 3 == 0 else length
    return [*range(first, first + turn), *range(first + turn + REPLY, first + length + REPLY)]


def loss_and_gradients(script, responses, split):
    """The script's loss, and its gradients by log-probs and entropies of all tokens, in order."""
    args = script.Args()
    advantages_PG = script.advantages(torch.tensor(REWARDS, dtype=torch.float64), args)
    weights_PG = script.token_weights(advantages_PG, torch.tensor(LENGTHS).view(3, 5), args)
    total, slopes = 0.0, [None] * 15
    for rows in split:
        # Prompts, replies between turns, and padding hold numbers that must not count.
        width = 7 + max(LENGTHS[row] for row in rows) + REPLY
        columns = [torch.full((len(rows), width), x, dtype=torch.float64) for x in (7, 0, 5, 3)]
        mask_BT = torch.zeros(len(rows), width, dtype=torch.bool)
        for b, row in enumerate(rows):
            place = (b, places_of(row))
            mask_BT[place] = True
            for column_BT, values in zip(columns, zip(*responses[row], strict=True), strict=True):
                column_BT[place] = torch.tensor(values, dtype=torch.float64)
        new_BT, old_BT, reference_BT, entropy_BT = columns
        micro = micro_batch(
            new_BT.requires_grad_(),
            old_BT,
            advantages_PG.flatten()[rows].unsqueeze(1),
            mask_BT,
            reference_logprobs_BT=reference_BT,
            entropy_BT=entropy_BT.requires_grad_(),
            weights_B1=weights_PG.flatten()[rows].unsqueeze(1),
        )
        losses_BT = micro.weights_B1 * script.per_token_loss(micro, args)  # as in `gradient`
        loss = losses_BT[mask_BT].sum()
        by_logprob_BT, by_entropy_BT = torch.autograd.grad(
            loss, (new_BT, entropy_BT), allow_unused=True, materialize_grads=True
        )
        total += loss.item()
        for b, row in enumerate(rows):
            pair = (by_logprob_BT[b][mask_BT[b]], by_entropy_BT[b][mask_BT[b]])
            slopes[row] = list(zip(*(slope.tolist() for slope in pair), strict=True))
    return total, [pair for row in slopes for pair in row]


@pytest.mark.parametrize("lag", [0, 19])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_against_a_loop_from_the_equation(name, split, lag, scripts):
    advantages_of, losses_of, weight_of = EQUATIONS[name]
    responses = sampled(lag)
    advantages = []
    for group in REWARDS:
        advantages += [0.0] * 5 if len(set(group)) == 1 else advantages_of(group)
    losses, slopes = [], []
    for i, (tokens, a) in enumerate(zip(responses, advantages, strict=True)):
        for loss, by_logprob, by_entropy in losses_of(tokens, a):
            losses.append(weight_of(i) * loss)
            slopes.append((weight_of(i) * by_logprob, weight_of(i) * by_entropy))
    loss, found = loss_and_gradients(import_script(scripts[name]), responses, SPLITS[split])
    assert loss == pytest.approx(math.fsum(losses), rel=0, abs=1e-14)
    for pair, expected in zip(found, slopes, strict=True):
        assert pair == pytest.approx(expected, rel=0, abs=1e-15)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written(name, scripts):
    text = scripts[name].read_text()
    assert FENCE.sub("", text) == FENCE.sub("", GRPO)
    title, options, functions = FENCE.findall(text)
    for part in ("arXiv ", "    A = ", "    loss = ", f"python written_{name}.py"):
        assert part in title
    assert functions != FENCE.findall(GRPO)[2]
    # No option of its own without a use, and no use of one that is not there.
    own = set(re.findall(r"^    (\w+): ", options, re.MULTILINE))
    used = set(re.findall(r"\bargs\.(\w+)", functions))
    assert own <= used <= own | {"max_response_tokens"}


@pytest.mark.parametrize("name", NAMES)
def test_ruff_finds_nothing(name, scripts):
    for command in ("check", "format --check"):  # as if it lay beside common/
        ruff = [sys.executable, "-m", "ruff", *command.split(), "--stdin-filename", "mine.py", "-"]
        text = scripts[name].read_text()
        done = subprocess.run(ruff, cwd=REPOSITORY, input=text, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_written_script_trains(scripts, tmp_path):
    import_script(scripts["gspo"])
    task = dense_task(tmp_path)
    run = train(tmp_path, script="written_gspo", task=task, num_steps=2, sync_interval=2)
    first, second = steps(run)  # of which the second has lag 1
    assert first["grad_norm"] > 0
    assert first["ratio/clip_fraction"] == 0 < second["ratio/clip_fraction"]


def test_bad_input_ends_in_an_error_message(tmp_path):
    path = tmp_path / "mine.py"
    message = r"--write gsp: no such variant; give one of reinforce, .*gspo"
    with pytest.raises(SystemExit, match=message):
        variants.write("gsp", path)
    assert not path.exists()
    path.write_text("mine")
    with pytest.raises(SystemExit, match=r"--write gspo .*mine\.py: File exists; give another"):
        variants.write("gspo", path)
    assert path.read_text() == "mine"
