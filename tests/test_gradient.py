"""`gradient` of a script against a float64 loop over sequences and tokens, from model to gradient.

The losses are those that are hardest to get right: a ratio of whole responses, averages per
response, a KL penalty in the loss and in the reward, an entropy bonus. Each is compared on all of
the CPU's ways to log-probs and through the Triton kernels in their interpreter (in a process of its
own, since TRITON_INTERPRET is read when a kernel is decorated), for several splits into
micro-batches.
"""

import importlib.util
import os
import random
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY, build_model

from benchmarks import variants
from common import logprobs
from common.metrics import StepMetrics
from common.models import load_model
from common.sampling import Batch
from tests.helpers import import_script

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
G = 4
# The variant, with options that let some responses be clipped and each penalty show
ALGORITHMS = {
    "gspo": {"clip_low": 0.2, "clip_high": 0.3},
    "paper_grpo": {"kl_coef": 0.3},
    "entropy_bonus": {"entropy_coef": 0.2},
    "kl_in_reward": {"kl_coef": 0.05},
}
SPLITS = {"one micro-batch": 10_000, "one row each": 1, "a few": 45}  # tokens in a micro-batch
# On the error of the loss, whose terms are of size 1, and on that of the gradient relative to its
# norm. Measured: 4e-7 and 2e-6 in float32 (roundings of 2⁻²⁴ through two layers), 0.004 and 0.02 in
# bfloat16 (2⁻⁹).
FLOAT32, BFLOAT16 = (2e-6, 1e-5), (0.01, 0.04)
BOUNDS = {"plain": FLOAT32, "sliced": FLOAT32, "triton": FLOAT32, "bfloat16": BFLOAT16}


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """{name: the written variant, imported}"""
    directory = tmp_path_factory.mktemp("written")
    found = {}
    for name in ALGORITHMS:
        path = directory / f"gradient_of_{name}.py"
        variants.write(name, path)
        found[name] = import_script(path)
    return found


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Policy and reference: the same random weights, those of the reference somewhat larger."""
    directory = tmp_path_factory.mktemp("models")
    ranges = {"policy": 0.15, "reference": 0.16}
    return [
        build_model("qwen2", directory / name, initializer_range=value)
        for name, value in ranges.items()
    ]


@pytest.fixture(scope="module")
def exact(directories):
    """Both in float64, in which no layer is sped up."""
    return [load_model(path, "", torch.device("cpu")).double() for path in directories]


@pytest.fixture(scope="module")
def batch(exact):
    policy, _ = exact

    def logprobs_of(prompt, response):
        return logprobs_and_entropies(policy, prompt, response)[0].tolist()

    return two_groups(policy.config.vocab_size, logprobs_of)


def two_groups(vocab_size, logprobs_of):
    """Two groups of four, graded. `logprobs_of(prompt, response)` are the policy's.

    The sampler's log-probs are off by about −0.5, 0 or 0.5 a token: some sequences are clipped, and
    rounding to bfloat16 moves no token across a bound.
    """
    rng = random.Random(3)
    prompts = [[rng.randrange(vocab_size) for _ in range(n)] for n in (5, 9) for _ in range(G)]
    responses = [[rng.randrange(vocab_size) for _ in range(rng.randint(1, 12))] for _ in prompts]
    sampled = []
    for prompt, response in zip(prompts, responses, strict=True):
        drift = (-0.5, 0.0, 0.5)[len(sampled) % 3]
        lps = logprobs_of(prompt, response)
        sampled.append([lp + drift + rng.uniform(-0.1, 0.1) for lp in lps])
    rewards = [1.0, 0.0, 0.0, 1.0, 0.0, 0.5, 0.25, 1.0]
    return Batch(
        number=1,
        version=0,
        group_size=G,
        problems=[0] * G + [1] * G,
        prompts=prompts,
        responses=responses,
        logprobs=sampled,
        truncated=[True] * 2 * G,
        grades=[{"reward": reward} for reward in rewards],
    )


def logprobs_and_entropies(model, prompt, response):
    """Of each token of a response, by the whole model and a softmax over its logits: [T], [T]."""
    logits_TV = model(input_ids=torch.tensor([prompt + response])).logits[0]
    logprobs_TV = torch.log_softmax(logits_TV[len(prompt) - 1 : -1], dim=-1)
    entropies_T = -(logprobs_TV.exp() * logprobs_TV).sum(dim=-1)
    return logprobs_TV[torch.arange(len(response)), torch.tensor(response)], entropies_T


def clipped(ratio, advantage, low, high):
    """−min(ρ A, clip(ρ) A), and whether it is the constant."""
    too_far = (advantage > 0 and ratio.item() > high) or (advantage < 0 and ratio.item() < low)
    if too_far:
        return -(high if advantage > 0 else low) * advantage, True
    return -ratio * advantage, False


def loss_of_response(name, options, new_T, old_T, ref_T, entropy_T, advantage, num_tokens):
    """A response's part of the loss, by the papers' equations, and its number of clipped tokens.

    `num_tokens` is N.
    """
    length = len(new_T)
    if name == "gspo":
        ratio = torch.exp((new_T - old_T).sum() / length)
        loss, is_clipped = clipped(ratio, advantage, 0.8, 1.3)
        return loss / (2 * G), length * is_clipped
    if name == "kl_in_reward":
        advantage = advantage - options["kl_coef"] * (new_T - ref_T).sum().item()
    total, num_clipped = 0.0, 0
    for new, old, ref, entropy in zip(new_T, old_T, ref_T, entropy_T, strict=True):
        loss, is_clipped = clipped(torch.exp(new - old), advantage, 0.8, 1.2)
        if name == "paper_grpo":
            loss = loss + options["kl_coef"] * (torch.exp(ref - new) - (ref - new) - 1)
            is_clipped = False  # the penalty's gradient is there
        if name == "entropy_bonus":
            loss = loss - options["entropy_coef"] * entropy
        num_clipped += is_clipped
        total = total + loss
    weight = 1 / (2 * G * length) if name == "paper_grpo" else 1 / num_tokens
    return weight * total, num_clipped


def truth(name, options, exact, batch):
    """Loss, gradient by parameter and number of clipped tokens: in float64."""
    policy, reference = exact
    policy.zero_grad()
    rewards = [grade["reward"] for grade in batch.grades]
    num_tokens = sum(map(len, batch.responses))
    total, num_clipped = 0.0, 0
    rows = zip(batch.prompts, batch.responses, batch.logprobs, strict=True)
    for i, (prompt, response, old) in enumerate(rows):
        group = rewards[i // G * G : i // G * G + G]
        mean = sum(group) / G
        std = (sum((r - mean) ** 2 for r in group) / G) ** 0.5
        advantage = (rewards[i] - mean) / (std + 1e-6)
        new_T, entropy_T = logprobs_and_entropies(policy, prompt, response)
        with torch.no_grad():
            ref_T, _ = logprobs_and_entropies(reference, prompt, response)
        old_T = torch.tensor(old, dtype=torch.float64)
        loss, clipped_tokens = loss_of_response(
            name, options, new_T, old_T, ref_T, entropy_T, advantage, num_tokens
        )
        total = total + loss
        num_clipped += clipped_tokens
    total.backward()
    gradient = {key: parameter.grad.clone() for key, parameter in policy.named_parameters()}
    return total.item(), gradient, num_clipped


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("path", ["triton"] if INTERPRETED else ["plain", "sliced", "bfloat16"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_loss_and_gradient_against_a_float64_loop(
    name, path, split, scripts, directories, exact, batch, monkeypatch
):
    precision = "bfloat16" if path == "bfloat16" else "float32"
    if path != "plain":
        monkeypatch.setattr(logprobs, "LARGE_VOCABULARY", 1)
    if path == "triton":
        from common.kernels import triton

        monkeypatch.setattr(logprobs.cpu.SlicedLogprobs, "apply", triton.logprobs_and_entropy)
    script, options = scripts[name], ALGORITHMS[name]
    args = script.Args(max_tokens_per_microbatch=SPLITS[split], **options)
    policy, reference = (load_model(path, "", torch.device("cpu")) for path in directories)
    metrics = StepMetrics()
    batch.advantages_PG = script.advantages(batch.rewards_PG, args)
    loss = script.gradient(batch, policy, reference, args, precision, metrics)

    expected_loss, expected, num_clipped = truth(name, options, exact, batch)
    assert loss == pytest.approx(expected_loss, rel=0, abs=BOUNDS[path][0])
    norm = sum(tensor.square().sum() for tensor in expected.values()).sqrt()
    found = {key: parameter.grad.double() for key, parameter in policy.named_parameters()}
    error = sum((found[key] - expected[key]).square().sum() for key in expected).sqrt()
    assert (error / norm).item() < BOUNDS[path][1]
    assert metrics.sums["ratio/clip_fraction"] == num_clipped
    assert (num_clipped > 0) == (name != "paper_grpo")


@pytest.mark.skipif(INTERPRETED, reason="this is the process that the test below has started")
@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="there is no triton on this platform"
)
def test_through_the_kernels():
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    passed = f"{len(ALGORITHMS) * len(SPLITS)} passed" in done.stdout
    assert done.returncode == 0 and passed, done.stdout[-8000:] + done.stderr[-2000:]
