"""The three scripts: one text outside the fences; losses against float64 loops written from the
papers' equations.
"""

import ast
import difflib
import math
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

import grpo
import rec_oneside_nois
import red_weight

ROOT = Path(grpo.__file__).parent
SCRIPTS = (grpo, rec_oneside_nois, red_weight)
FENCE = re.compile(
    r"^ *# --- algorithm ---\n(.*?)^ *# --- end algorithm ---\n", re.DOTALL | re.MULTILINE
)
REINFORCE = replace(rec_oneside_nois.Args(), clip_low=math.inf, clip_high=math.inf)


def source(script):
    return Path(script.__file__).read_text()


def gradient(script, logprobs, sampler_logprobs, advantages, args=None):
    """d loss / d logprob per token, by autograd through the script's own function."""
    leaf = logprobs.clone().requires_grad_()
    loss(script, leaf, sampler_logprobs, advantages, args).sum().backward()
    return leaf.grad


def loss(script, logprobs, sampler_logprobs, advantages, args=None):
    """The script's loss per token, all of them response tokens."""
    mask = torch.ones_like(logprobs, dtype=torch.bool)
    return script.per_token_loss(
        logprobs, sampler_logprobs, advantages, mask, args or script.Args()
    )


def random_tokens(seed, n=200, spread=0.5):
    generator = torch.Generator().manual_seed(seed)
    logprobs = -3 * torch.rand(n, generator=generator, dtype=torch.float64)
    sampler_logprobs = logprobs + spread * torch.randn(n, generator=generator, dtype=torch.float64)
    return logprobs, sampler_logprobs, torch.randn(n, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_outside_the_fences_the_scripts_are_one_text(script):
    expected, found = (FENCE.sub("<algorithm>\n", source(s)) for s in (grpo, script))
    assert found == expected, "".join(
        difflib.unified_diff(expected.splitlines(True), found.splitlines(True), n=0)
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_four_fences_hold_little_and_no_loop_over_steps(script):
    docstring, arguments, advantages, loss = FENCE.findall(source(script))
    assert docstring.startswith('"""') and docstring.rstrip().endswith('"""')
    assert "def advantages(" in advantages and "def per_token_loss(" in loss
    code = arguments + advantages + loss
    assert len(code.splitlines()) <= 40 and len(docstring.splitlines()) <= 45
    assert not re.search(r"\b(for|while) ", re.sub(r'""".*?"""', "", code, flags=re.DOTALL))


def test_no_algorithm_is_named_in_common():
    for path in (ROOT / "common").rglob("*.py"):
        assert not re.search(
            r"\b(grpo|reinforce|rec_oneside|red_weight)\b", path.read_text(), re.IGNORECASE
        ), path


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_stays_short(script):
    tree = ast.parse(source(script))
    (main,) = [
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"
    ]
    imports = [
        n
        for n in ast.walk(tree)
        if isinstance(n, ast.ImportFrom) and n.module.split(".")[0] == "common"
    ]
    assert len(source(script).splitlines()) <= 330
    assert main.end_lineno - main.lineno + 1 <= 125
    assert len(fields(script.Args)) <= 38
    assert sum(len(node.names) for node in imports) <= 19


def test_common_stays_small():
    def lines_of(paths):
        return sum(len(path.read_text().splitlines()) for path in paths)

    kernels = set((ROOT / "common" / "kernels").glob("*.py"))
    ranks, page, builder = (
        ROOT / "common" / name for name in ("distributed.py", "viewer.py", "build_tiny_model.py")
    )
    others = set((ROOT / "common").rglob("*.py")) - kernels - {ranks, page, builder}
    assert lines_of(kernels) <= 550
    assert lines_of([ranks]) <= 170
    assert lines_of([page]) <= 150
    assert lines_of(others) <= 2650


def test_hand_computed_losses_and_gradients():
    # Four tokens: log-probs ln 0.5, ratio to the sampler 1.0, 1.5 (rose), 0.5 (fell), 1.5;
    # advantages ½, ½, −½, −½.
    logprobs = torch.full((4,), math.log(0.5), dtype=torch.float64)
    sampler = logprobs - torch.tensor([1.0, 1.5, 0.5, 1.5], dtype=torch.float64).log()
    advantages = torch.tensor([0.5, 0.5, -0.5, -0.5], dtype=torch.float64)
    ln2 = math.log(2)
    # REC: token 1 rose beyond 1.2 with A > 0 and token 2 fell below 0.8 with A < 0: both masked.
    # −A ln ½ = A ln 2.
    rec = loss(rec_oneside_nois, logprobs, sampler, advantages)
    assert rec.tolist() == pytest.approx([0.5 * ln2, 0, 0, -0.5 * ln2], abs=1e-15)
    assert gradient(rec_oneside_nois, logprobs, sampler, advantages).tolist() == [-0.5, 0, 0, 0.5]
    # RED: weights e^½ = 1.6487 and e^−½ = 0.6065; nothing is masked.
    red = loss(red_weight, logprobs, sampler, advantages)
    up, down = 0.5 * math.exp(0.5), -0.5 * math.exp(-0.5)
    assert red.tolist() == pytest.approx([up * ln2, up * ln2, down * ln2, down * ln2], abs=1e-15)
    assert gradient(red_weight, logprobs, sampler, advantages).tolist() == pytest.approx(
        [-up, -up, -down, -down]
    )


@pytest.mark.parametrize("seed", range(5))
def test_rec_against_a_loop_from_the_equation(seed):
    logprobs, sampler, advantages = random_tokens(seed)
    args = replace(rec_oneside_nois.Args(), clip_low=0.1, clip_high=0.3)
    losses = loss(rec_oneside_nois, logprobs, sampler, advantages, args)
    slope = gradient(rec_oneside_nois, logprobs, sampler, advantages, args)
    for i, (lp, old, a) in enumerate(
        zip(logprobs.tolist(), sampler.tolist(), advantages.tolist(), strict=True)
    ):
        rho = math.exp(lp - old)
        m = 1.0 if (a >= 0 and rho <= 1.3) or (a <= 0 and rho >= 0.9) else 0.0
        assert losses[i].item() == pytest.approx(-a * m * lp, abs=1e-14)
        assert slope[i].item() == pytest.approx(-a * m, abs=1e-14)


@pytest.mark.parametrize("seed", range(5))
def test_red_against_a_loop_from_the_equation(seed):
    logprobs, sampler, advantages = random_tokens(seed)
    args = replace(red_weight.Args(), tau=0.7)
    losses = loss(red_weight, logprobs, sampler, advantages, args)
    slope = gradient(red_weight, logprobs, sampler, advantages, args)
    for i, (lp, a) in enumerate(zip(logprobs.tolist(), advantages.tolist(), strict=True)):
        assert losses[i].item() == pytest.approx(-math.exp(a / 0.7) * a * lp, abs=1e-14)
        assert slope[i].item() == pytest.approx(-math.exp(a / 0.7) * a, abs=1e-14)


def test_rec_with_infinite_epsilon_is_reinforce_with_a_group_baseline():
    logprobs, sampler, advantages = random_tokens(0, spread=3.0)
    assert torch.equal(
        gradient(rec_oneside_nois, logprobs, sampler, advantages, REINFORCE), -advantages
    )


def test_red_with_infinite_tau_is_reinforce_with_a_group_baseline():
    logprobs, sampler, advantages = random_tokens(0, spread=3.0)
    args = replace(red_weight.Args(), tau=math.inf)
    assert torch.equal(gradient(red_weight, logprobs, sampler, advantages, args), -advantages)


def test_on_policy_all_but_red_agree_up_to_the_standard_deviation():
    # A fresh batch: ρ = 1. GRPO divides a group's advantages by σ + 1e-6, the others do not.
    rewards_PG = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.25]], dtype=torch.float64)
    logprobs_PG = torch.tensor(
        [[-0.1, -2.0, -0.5, -1.0], [-0.3, -0.7, -4.0, -0.2]], dtype=torch.float64
    )
    slopes = {}
    for name, script, args in (
        ("grpo", grpo, grpo.Args()),
        ("rec", rec_oneside_nois, rec_oneside_nois.Args()),
        ("reinforce", rec_oneside_nois, REINFORCE),
    ):
        advantages_PG = script.advantages(rewards_PG, args)
        slopes[name] = gradient(script, logprobs_PG, logprobs_PG, advantages_PG, args)
    centred = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    std_P1 = (centred.square().mean(dim=1, keepdim=True)).sqrt() + 1e-6
    torch.testing.assert_close(slopes["rec"], -centred, rtol=0, atol=1e-15)
    assert torch.equal(slopes["rec"], slopes["reinforce"])
    torch.testing.assert_close(slopes["grpo"] * std_P1, slopes["rec"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("script", SCRIPTS)
def test_equal_rewards_give_exactly_zero_advantage(script):
    for reward in (0.7, 0.1, 1e6, -3.3):
        # three 0.7s do not have the mean 0.7, not even in float64
        for group_size in (2, 3, 6, 7, 8, 12, 49):
            rewards_PG = torch.full((1, group_size), reward, dtype=torch.float64)
            assert torch.equal(
                script.advantages(rewards_PG, script.Args()), torch.zeros_like(rewards_PG)
            )


@pytest.mark.parametrize("script", [rec_oneside_nois, red_weight])
def test_advantages_are_rewards_less_their_groups_mean(script):
    rewards_PG = torch.tensor([[1.0, 0.0, 0.5], [2.0, 2.0, 5.0]], dtype=torch.float64)
    before = rewards_PG.clone()
    found = script.advantages(rewards_PG, script.Args())
    expected = torch.tensor([[0.5, -0.5, 0.0], [-1.0, -1.0, 2.0]], dtype=torch.float64)
    assert torch.equal(found, expected) and torch.equal(rewards_PG, before)


def test_a_ratio_exactly_on_the_boundary_still_learns_under_rec():
    # ε = 0.5 and ratios 1.5 and 0.5, which are exact in binary once the exponential is: log-ratios
    # are chosen so.
    args = replace(rec_oneside_nois.Args(), clip_low=0.5, clip_high=0.5)
    for ratio, advantage in ((1.5, 1.0), (0.5, -1.0)):
        log_ratio = torch.tensor(ratio, dtype=torch.float64).log()
        exact = torch.exp(log_ratio).item()
        bound = replace(args, clip_high=exact - 1, clip_low=1 - exact)
        zero = torch.zeros((), dtype=torch.float64)
        slope = gradient(
            rec_oneside_nois, log_ratio, zero, torch.tensor(advantage, dtype=torch.float64), bound
        )
        assert slope.item() == -advantage
        inside = replace(args, clip_high=exact - 1 - 1e-9, clip_low=1 - exact - 1e-9)
        slope = gradient(
            rec_oneside_nois, log_ratio, zero, torch.tensor(advantage, dtype=torch.float64), inside
        )
        assert slope.item() == 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_zero_advantage_gives_zero_loss_and_gradient(script):
    logprobs, sampler, _ = random_tokens(1)
    zeros = torch.zeros_like(logprobs)
    assert not loss(script, logprobs, sampler, zeros).any()
    assert not gradient(script, logprobs, sampler, zeros).any()


@pytest.mark.parametrize("log_ratio", [-100.0, -80.0, 80.0, 100.0])
def test_no_clamp_is_hidden_in_the_losses(log_ratio):
    # float32, as in training: exp(80) is finite, exp(100) is not. REC uses ρ only to decide, RED
    # not at all.
    logprobs, sampler = torch.tensor([-1.0]), torch.tensor([-1.0 - log_ratio])
    for advantage in (1.0, -1.0):
        a = torch.tensor([advantage])
        moved_enough = (advantage > 0) == (log_ratio > 0)
        assert gradient(rec_oneside_nois, logprobs, sampler, a).item() == (
            0.0 if moved_enough else -advantage
        )
        assert gradient(red_weight, logprobs, sampler, a).item() == pytest.approx(
            -math.exp(advantage) * advantage
        )


# Fixed data from another policy: three arms, pulled with probability 0.3, 0.6, 0.1, paying
# 0, 0.8, 1


def bandit(label):
    from benchmarks.bandit import LOSSES, train

    policies = train(*LOSSES[label])
    torch.testing.assert_close(policies.sum(dim=1), torch.ones(len(policies), dtype=torch.float64))
    return policies[-1].tolist()


def test_plain_reinforce_goes_to_the_wrong_arm_of_the_bandit():
    # Its gradient on an arm's logit is μ(r − r̄): −0.174, 0.132, 0.042 for ever, so the second arm
    # outruns the best.
    assert bandit("REINFORCE (REC, ε = ∞)") == pytest.approx([0, 1, 0], abs=1e-3)


@pytest.mark.parametrize("label", ["GRPO", "REC-OneSide-NoIS (0.2)"])
def test_clipping_stops_where_every_arm_has_moved_by_epsilon(label):
    # The good arms may rise to 1.2 times their 0.6 and 0.1; what is left is the bad arm's, below
    # 0.8 times its 0.3.
    assert bandit(label) == pytest.approx([0.16, 0.72, 0.12], abs=2e-3)


def test_red_weight_ends_between_the_good_arms():
    # With c = μ A exp(A) per arm and C their sum, a logit's gradient is c − π C. The bad arm's
    # pushes it down for ever; the good ones rest where π₂ − π₃ = (c₂ − c₃) / C: 0.88 and 0.12.
    c1, c2, c3 = (mu * a * math.exp(a) for mu, a in ((0.3, -0.58), (0.6, 0.22), (0.1, 0.42)))
    gap = (c2 - c3) / (c1 + c2 + c3)
    assert bandit("RED-Weight") == pytest.approx([0, (1 + gap) / 2, (1 - gap) / 2], abs=2e-3)
