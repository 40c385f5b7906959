"""A loss over whole responses fits into the fences: GSPO (arXiv 2507.18071), written into a copy of
`grpo.py`.

Only the fenced regions are replaced. Loss and gradient come from the lines of the copy's own
training loop, and are compared with a float64 loop over sequences and tokens, on each of the CPU's
ways to log-probs and through the Triton kernels in their interpreter (in a process of its own,
since TRITON_INTERPRET is read when a kernel is decorated), for several splits into micro-batches.
"""

import importlib.util
import os
import random
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, build_model

from common import logprobs
from common.models import load_model
from common.sampling import Batch
from tests.helpers import import_script

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# From the number of tokens to the last micro-batch's loss: everything between the advantages and
# the update.
LOOP = re.compile(r"^ *N = .*?^ *total_loss = sum\(.*?\n", re.DOTALL | re.MULTILINE)
FENCE = re.compile(
    r"^ *# --- algorithm ---\n(.*?)^ *# --- end algorithm ---\n", re.DOTALL | re.MULTILINE
)

# The sequence's ratio s = exp(1/|y| Σ_t log ρ_t) replaces the tokens' ratios, and every token has
# its sequence's loss −min(s A, clip(s, 1−ε_low, 1+ε_high) A). So Σ / N is a mean over sequences,
# weighted by their lengths.
GSPO = [
    '"""GSPO, Group Sequence Policy Optimization (arXiv 2507.18071)."""\n',
    "    clip_low: float = 0.2\n    clip_high: float = 0.3\n",
    """def advantages(rewards_PG, args):
    centred_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    return centred_PG / (rewards_PG.std(dim=1, correction=0, keepdim=True) + 1e-6)
""",
    """def per_token_loss(logprobs_BT, sampler_logprobs_BT, advantages_B1, mask_BT, args):
    log_ratio_BT = (logprobs_BT - sampler_logprobs_BT) * mask_BT
    ratio_B1 = torch.exp(log_ratio_BT.sum(dim=1, keepdim=True) / mask_BT.sum(dim=1, keepdim=True))
    clipped_B1 = ratio_B1.clamp(1 - args.clip_low, 1 + args.clip_high)
    least_B1 = torch.minimum(ratio_B1 * advantages_B1, clipped_B1 * advantages_B1)
    return -least_B1.expand_as(logprobs_BT)
""",
]
G = 4
SPLITS = {
    "one micro-batch": [[0, 1, 2, 3, 4, 5, 6, 7]],
    "one row each": [[row] for row in range(8)],
    "a few": [[6, 1, 3], [0, 7], [5, 2, 4]],
}
# On the error of the loss, whose terms are of size 1, and on that of the gradient relative to its
# norm. Measured: 2e-7 and 1.3e-6 in float32 (roundings of 2⁻²⁴ through two layers), 0.002 and 0.019
# in bfloat16 (2⁻⁹).
FLOAT32, BFLOAT16 = (2e-6, 1e-5), (0.01, 0.03)
BOUNDS = {"plain": FLOAT32, "sliced": FLOAT32, "triton": FLOAT32, "bfloat16": BFLOAT16}


@pytest.fixture(scope="module")
def gspo(tmp_path_factory):
    """The copy, imported."""
    return import_script(write_gspo(tmp_path_factory.mktemp("gspo")))


def write_gspo(directory):
    """Write the copy; returns its path."""
    fences = iter(GSPO)
    text, count = FENCE.subn(lambda _: next(fences), (REPOSITORY / "grpo.py").read_text())
    assert count == len(GSPO)
    path = directory / "gspo.py"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return build_model("qwen2", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def exact(directory):
    """The model in float64."""
    return load_model(directory, "", torch.device("cpu")).double()  # in which no layer is sped up


@pytest.fixture(scope="module")
def batch(exact):
    """Two groups of four. The sampler's log-probs are off by up to 0.7 a token, so that some
    sequences are clipped.
    """
    rng = random.Random(3)
    prompts = [
        [rng.randrange(exact.config.vocab_size) for _ in range(n)] for n in (5, 9) for _ in range(G)
    ]
    responses = [
        [rng.randrange(exact.config.vocab_size) for _ in range(rng.randint(1, 12))] for _ in prompts
    ]
    policy = [logprobs_of(exact, p, r).tolist() for p, r in zip(prompts, responses, strict=True)]
    drift = [rng.uniform(-0.6, 0.6) for _ in policy]
    sampled = [
        [lp + d + rng.uniform(-0.1, 0.1) for lp in lps]
        for lps, d in zip(policy, drift, strict=True)
    ]
    return Batch(1, 0, [0] * G + [1] * G, prompts, responses, sampled, [True] * 2 * G)


REWARDS_PG = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 0.5, 0.25, 1.0]], dtype=torch.float64)


def logprobs_of(model, prompt, response):
    """Log-probs of a response, by the whole model and a softmax over its logits."""
    logits_TV = model(input_ids=torch.tensor([prompt + response])).logits[0]
    return torch.stack(
        [
            torch.log_softmax(logits_TV[len(prompt) + t - 1], dim=-1)[token]
            for t, token in enumerate(response)
        ]
    )


def truth(model, batch, args):
    """Loss, gradient by name, and per sequence whether it is clipped: in float64, by the paper's
    equations.
    """
    model.zero_grad()
    rewards = REWARDS_PG.flatten().tolist()
    num_tokens, total, clipped = sum(map(len, batch.responses)), 0.0, []
    for i, (prompt, response, old) in enumerate(
        zip(batch.prompts, batch.responses, batch.logprobs, strict=True)
    ):
        group = rewards[i // G * G : i // G * G + G]
        mean = sum(group) / G
        std = (sum((r - mean) ** 2 for r in group) / G) ** 0.5
        advantage = (rewards[i] - mean) / (std + 1e-6)
        new = logprobs_of(model, prompt, response)
        ratio = torch.exp(
            sum(lp - lp_old for lp, lp_old in zip(new, old, strict=True)) / len(response)
        )
        low, high = 1 - args.clip_low, 1 + args.clip_high
        too_high, too_low = (
            advantage > 0 and ratio.item() > high,
            advantage < 0 and ratio.item() < low,
        )
        objective = (high if too_high else low if too_low else ratio) * advantage
        total = total - len(response) * objective / num_tokens
        clipped.append("high" if too_high else "low" if too_low else "")
    total.backward()
    return (
        total.item(),
        {name: parameter.grad.clone() for name, parameter in model.named_parameters()},
        clipped,
    )


def loss_and_gradient(script, model, batch, rows_of_micro_batches, precision):
    """What the lines of the script's loop make of a batch: loss, gradient by name, and how many
    tokens were clipped.
    """
    (lines,) = LOOP.findall(Path(script.__file__).read_text())
    metrics, args = script.StepMetrics(), script.Args()
    names = vars(script) | {
        "split_by_token_budget": lambda lengths, max_tokens, group_by: rows_of_micro_batches,
        "model": model, "reference": None, "batch": batch, "metrics": metrics, "args": args,
        "precision": precision, "device": torch.device("cpu"),
        "advantages_B": script.advantages(REWARDS_PG, args).flatten(),
    }  # fmt: skip
    exec(textwrap.dedent(lines), names)
    gradient = {name: parameter.grad.double() for name, parameter in model.named_parameters()}
    return names["total_loss"], gradient, metrics.sums["ratio/clip_fraction"]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("path", ["triton"] if INTERPRETED else ["plain", "sliced", "bfloat16"])
def test_loss_and_gradient_against_a_float64_loop(
    path, split, gspo, directory, exact, batch, monkeypatch
):
    precision = "bfloat16" if path == "bfloat16" else "float32"
    if path != "plain":
        monkeypatch.setattr(logprobs, "LARGE_VOCABULARY", 1)
    if path == "triton":
        from common.kernels import triton

        monkeypatch.setattr(logprobs.cpu.SlicedLogprobs, "apply", triton.logprobs_and_entropy)
    model = load_model(directory, "", torch.device("cpu"))
    loss, gradient, num_clipped = loss_and_gradient(gspo, model, batch, SPLITS[split], precision)

    expected_loss, expected, clipped = truth(exact, batch, gspo.Args())
    assert {"", "high", "low"} == set(clipped) and clipped.count("") >= 4  # of the eight sequences
    assert num_clipped == sum(
        len(response) for response, c in zip(batch.responses, clipped, strict=True) if c
    )
    assert loss == pytest.approx(expected_loss, rel=0, abs=BOUNDS[path][0])
    norm = sum(gradient.square().sum() for gradient in expected.values()).sqrt()
    error = sum((gradient[name] - expected[name]).square().sum() for name in expected).sqrt()
    assert (error / norm).item() < BOUNDS[path][1]


@pytest.mark.skipif(INTERPRETED, reason="this is the process that the test below has started")
@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="there is no triton on this platform"
)
def test_through_the_kernels():
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "3 passed" in done.stdout, (
        done.stdout[-8000:] + done.stderr[-2000:]
    )
