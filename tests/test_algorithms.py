"""The scripts: the same text outside the fences; losses against float64 loops from the papers.

To have a script of your own checked, add its path to `SCRIPTS`.
"""

import ast
import difflib
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import grpo
import rec_oneside_nois
import red_weight
from benchmarks import variants
from tests.helpers import REPOSITORY, import_script
from tests.losses import losses_of as loss
from tests.losses import micro_batch
from tests.losses import slopes_of as gradient

SCRIPTS = ["grpo.py", "rec_oneside_nois.py", "red_weight.py"]
FENCE = re.compile(
    r"^ *# --- algorithm ---\n(.*?)^ *# --- end algorithm ---\n", re.DOTALL | re.MULTILINE
)
REINFORCE = replace(rec_oneside_nois.Args(), clip_low=math.inf, clip_high=math.inf)


@pytest.fixture(scope="module", params=[*SCRIPTS, *variants.VARIANTS])
def script(request, tmp_path_factory):
    """A script as a module: one of `SCRIPTS`, or a variant, written for the test."""
    if request.param in SCRIPTS:
        return import_script(REPOSITORY / request.param)
    path = tmp_path_factory.mktemp("written") / f"checked_{request.param}.py"
    variants.write(request.param, path)
    return import_script(path)


def source(script):
    return Path(script.__file__).read_text()


# What every script must do, one of your own included


def test_outside_the_fences_the_scripts_are_one_text(script):
    expected, found = (FENCE.sub("<algorithm>\n", source(s)) for s in (grpo, script))
    assert found == expected, "".join(
        difflib.unified_diff(expected.splitlines(True), found.splitlines(True), n=0)
    )


def test_three_fences_hold_docstring_options_and_functions(script):
    docstring, options, functions = FENCE.findall(source(script))
    assert docstring.startswith('"""') and docstring.rstrip().endswith('"""')
    assert not options.strip() or re.match(r" +\w+: ", options)
    names = [node.name for node in ast.parse(functions).body if isinstance(node, ast.FunctionDef)]
    assert {"advantages", "token_weights", "per_token_loss"} <= set(names)


def test_equal_rewards_give_exactly_zero_advantage(script):
    for reward in (0.7, 0.1, 1e6, -3.3):
        # Three 0.7s do not have the mean 0.7, not even in float64.
        for group_size in (2, 3, 6, 7, 8, 12, 49):
            rewards_PG = torch.full((2, group_size), reward, dtype=torch.float64)
            rewards_PG[1, 0] += 1.0
            advantages_PG = script.advantages(rewards_PG, script.Args())
            assert advantages_PG.shape == rewards_PG.shape
            assert advantages_PG.dtype == torch.float64
            assert advantages_PG[0].tolist() == [0.0] * group_size
            assert advantages_PG[1].any()  # next to it, a group that does differ


def test_weights_are_finite_and_not_negative(script):
    advantages_PG = torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    lengths_PG = torch.tensor([[3, 1, 4], [1, 5, 9]])
    weights_PG = script.token_weights(advantages_PG, lengths_PG, script.Args())
    assert weights_PG.shape == advantages_PG.shape
    assert weights_PG.isfinite().all() and (weights_PG >= 0).all()
    assert (weights_PG[0, :2] > 0).all()  # what has an advantage learns


def random_batch(seed=0, B=6, T=9):
    """A micro-batch with all that a loss may use; outside the mask, numbers that must not count."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mask_BT = torch.arange(T) < torch.randint(1, T, (B, 1), generator=generator)
    logprobs_BT = -random(B, T).abs()
    return micro_batch(
        logprobs_BT.masked_fill(~mask_BT, 3.0).requires_grad_(),
        (logprobs_BT + 0.3 * random(B, T)).masked_fill(~mask_BT, -5.0),
        random(B, 1),
        mask_BT,
        reference_logprobs_BT=(logprobs_BT + 0.2 * random(B, T)).masked_fill(~mask_BT, 7.0),
        entropy_BT=random(B, T).abs().masked_fill(~mask_BT, 9.0).requires_grad_(),
    )


def losses_and_slopes(script, micro):
    """Losses of the response tokens, and the derivatives by log-probs and entropies: 1-D each."""
    losses_BT = script.per_token_loss(micro, script.Args()).expand_as(micro.mask_BT)
    losses_N = losses_BT[micro.mask_BT]
    leaves = (micro.logprobs_BT, micro.entropy_BT)
    slopes = torch.autograd.grad(losses_N.sum(), leaves, allow_unused=True, materialize_grads=True)
    return losses_N.detach(), *(slope_BT[micro.mask_BT] for slope_BT in slopes)


def some_rows(micro, rows, padding=0):
    """The micro-batch of some rows, with more or other padding."""
    tensors = {}
    for name, value in vars(micro).items():
        if isinstance(value, torch.Tensor):
            value = value.detach()[rows]
            if padding and name.endswith("_BT"):
                filling = 0 if name == "mask_BT" else 11
                more = torch.full((len(rows), padding), filling, dtype=value.dtype)
                value = torch.cat([value, more], dim=1)
            leaf = name in ("logprobs_BT", "entropy_BT")
            tensors[name] = value.requires_grad_() if leaf else value
    return replace(micro, rows=rows, **tensors)


def test_losses_are_finite_and_have_a_gradient(script):
    losses_N, slopes_N, _ = losses_and_slopes(script, random_batch())
    assert losses_N.isfinite().all() and slopes_N.isfinite().all() and slopes_N.any()


def test_padding_does_not_show(script):
    micro = random_batch()
    padded = some_rows(micro, list(range(6)), padding=4)
    for found, expected in zip(
        losses_and_slopes(script, padded), losses_and_slopes(script, micro), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


def test_the_split_into_micro_batches_does_not_show(script):
    micro = random_batch()
    parts = [losses_and_slopes(script, some_rows(micro, rows)) for rows in ([0, 1], [2], [3, 4, 5])]
    joined = [torch.cat(pieces) for pieces in zip(*parts, strict=True)]
    for found, expected in zip(joined, losses_and_slopes(script, micro), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


def test_an_empty_mask_adds_nothing(script):
    # With several ranks, one may repeat a row with an empty mask.
    micro = random_batch()
    empty = replace(micro, mask_BT=torch.zeros_like(micro.mask_BT))
    losses_BT = script.per_token_loss(empty, script.Args()).expand_as(micro.mask_BT)
    assert losses_BT[empty.mask_BT].sum().item() == 0.0


def test_a_loss_changes_none_of_its_inputs(script):
    micro = random_batch()
    before = {k: v.clone() for k, v in vars(micro).items() if isinstance(v, torch.Tensor)}
    script.per_token_loss(micro, script.Args())
    assert all(torch.equal(vars(micro)[name], tensor) for name, tensor in before.items())


# The shape of the code


def functions_of(path):
    nodes = ast.walk(ast.parse(path.read_text()))
    return [node for node in nodes if isinstance(node, ast.FunctionDef)]


def depth(node):
    """How deep blocks are nested below a `def`; functions within it count for themselves."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            continue
        is_elif = isinstance(child, ast.If) and getattr(node, "orelse", None) == [child]
        is_block = isinstance(child, ast.If | ast.For | ast.While | ast.With | ast.Try)
        deepest = max(deepest, depth(child) + (is_block and not is_elif))
    return deepest


@pytest.mark.parametrize(
    "path", [*SCRIPTS, *sorted(str(p) for p in Path("common").rglob("*.py"))], ids=str
)
def test_functions_are_short_and_flat(path):
    for function in functions_of(REPOSITORY / path):
        assert function.end_lineno - function.lineno + 1 <= 60, function.name
        assert depth(function) <= 3, function.name


def test_no_algorithm_is_named_in_common():
    for path in (REPOSITORY / "common").rglob("*.py"):
        assert not re.search(
            r"\b(grpo|reinforce|rec_oneside|red_weight)\b", path.read_text(), re.IGNORECASE
        ), path


# Losses against numbers worked out by hand, and loops from the equations


def random_tokens(seed, n=200, spread=0.5):
    generator = torch.Generator().manual_seed(seed)
    logprobs = -3 * torch.rand(n, generator=generator, dtype=torch.float64)
    sampler_logprobs = logprobs + spread * torch.randn(n, generator=generator, dtype=torch.float64)
    return logprobs, sampler_logprobs, torch.randn(n, generator=generator, dtype=torch.float64)


def test_hand_computed_losses_and_gradients():
    # Four tokens: log-probs ln 0.5, ratio to the sampler 1.0, 1.5 (rose), 0.5 (fell), 1.5;
    # advantages ½, ½, −½, −½.
    logprobs = torch.full((4,), math.log(0.5), dtype=torch.float64)
    sampler = logprobs - torch.tensor([1.0, 1.5, 0.5, 1.5], dtype=torch.float64).log()
    advantages = torch.tensor([0.5, 0.5, -0.5, -0.5], dtype=torch.float64)
    ln2 = math.log(2)
    # REC: token 1 rose beyond 1.2 with A > 0 and token 2 fell below 0.8 with A < 0: both masked. −A
    # ln ½ = A ln 2.
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
    logprobs_B = -torch.tensor([0.1, 2.0, 0.5, 1.0, 0.3, 0.7, 4.0, 0.2], dtype=torch.float64)
    slopes_PG = {}
    for name, script, args in (
        ("grpo", grpo, grpo.Args()),
        ("rec", rec_oneside_nois, rec_oneside_nois.Args()),
        ("reinforce", rec_oneside_nois, REINFORCE),
    ):
        advantages_B = script.advantages(rewards_PG, args).flatten()
        slopes_PG[name] = gradient(script, logprobs_B, logprobs_B, advantages_B, args).view(2, 4)
    centred_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    std_P1 = (centred_PG.square().mean(dim=1, keepdim=True)).sqrt() + 1e-6
    torch.testing.assert_close(slopes_PG["rec"], -centred_PG, rtol=0, atol=1e-15)
    assert torch.equal(slopes_PG["rec"], slopes_PG["reinforce"])
    torch.testing.assert_close(slopes_PG["grpo"] * std_P1, slopes_PG["rec"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("script", [rec_oneside_nois, red_weight])
def test_advantages_are_rewards_less_their_groups_mean(script):
    rewards_PG = torch.tensor([[1.0, 0.0, 0.5], [2.0, 2.0, 5.0]], dtype=torch.float64)
    before = rewards_PG.clone()
    found = script.advantages(rewards_PG, script.Args())
    expected = torch.tensor([[0.5, -0.5, 0.0], [-1.0, -1.0, 2.0]], dtype=torch.float64)
    assert torch.equal(found, expected) and torch.equal(rewards_PG, before)


def test_a_ratio_exactly_on_the_boundary_still_learns_under_rec():
    for ratio, advantage in ((1.5, 1.0), (0.5, -1.0)):
        log_ratio = torch.tensor([ratio], dtype=torch.float64).log()
        exact = torch.exp(log_ratio).item()
        zero = torch.zeros(1, dtype=torch.float64)
        tokens = (log_ratio, zero, torch.tensor([advantage], dtype=torch.float64))
        bound = replace(rec_oneside_nois.Args(), clip_high=exact - 1, clip_low=1 - exact)
        assert gradient(rec_oneside_nois, *tokens, bound).item() == -advantage
        inside = replace(bound, clip_high=bound.clip_high - 1e-9, clip_low=bound.clip_low - 1e-9)
        assert gradient(rec_oneside_nois, *tokens, inside).item() == 0


@pytest.mark.parametrize("script", [grpo, rec_oneside_nois, red_weight])
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


# Fixed data from another policy: three arms, pulled with probability 0.3, 0.6, 0.1, paying 0, 0.8,
# 1


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
