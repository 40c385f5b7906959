"""Fourteen more algorithms, each of them a few lines in place of `grpo.py`'s.

    python benchmarks/variants.py --write gspo mine.py      write one as a script, mine.py
    python benchmarks/variants.py                           list them

A class below is what a variant puts into the three fenced regions of `grpo.py`: docstring, options,
and the functions `advantages`, `token_weights` and `per_token_loss`. A function that it does not
define stays as in `grpo.py`; options and the KL penalty of `grpo.py` are left out. What papers do
outside of the loss, such as sampling a group again, is left out as well.

`benchmarks/figures/compare_variants.py` trains with all of them.
"""

import ast
import inspect
import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))

from common.options import option

ROOT = Path(__file__).parents[1]
NOTATION = """
For each of P prompts, the policy π samples a group of G responses, and a program rewards them. r is
a response's reward, r̄ and σ are the mean and standard deviation of its group, and A is the
advantage of all its tokens. π_old is the policy that sampled the response, and

    ρ_t = π(y_t) / π_old(y_t)

the ratio of a token's probabilities. With the default schedule, ρ = 1. |y| is the number of tokens
of a response, N that of all responses of the batch. sg(·) lets no gradient through.
"""


class Reinforce:
    """REINFORCE: with the group's mean as baseline (Williams, 1992; as in arXiv 2509.24203).

        A = r − r̄
        loss = −1/N Σ_t A log π(y_t)

    Neither a ratio nor clipping bounds how far old data can push the policy.
    """

    def advantages(rewards_PG, args):
        """A = r − r̄ with the mean of the group, float64."""
        advantages_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
        # The mean of equal rewards may be rounded: make their advantages exactly 0.
        equal_P1 = (rewards_PG == rewards_PG[:, :1]).all(dim=1, keepdim=True)
        return advantages_PG.masked_fill(equal_P1, 0.0)

    def per_token_loss(micro, args):
        """−A log π for each token of a micro-batch."""
        return -micro.advantages_B1 * micro.logprobs_BT


class RLOO:
    """RLOO: REINFORCE Leave-One-Out (Ahmadian et al., "Back to Basics", arXiv 2402.14740).

        A = r − mean of the group's other rewards
        loss = −1/N Σ_t A log π(y_t)

    A is G/(G−1) (r − r̄). The paper divides by the number of responses, not by N.
    """

    def advantages(rewards_PG, args):
        """A = r less the mean of the group's other rewards, float64."""
        others_PG = (rewards_PG.sum(dim=1, keepdim=True) - rewards_PG) / (rewards_PG.shape[1] - 1)
        # The mean of equal rewards may be rounded: make their advantages exactly 0.
        equal_P1 = (rewards_PG == rewards_PG[:, :1]).all(dim=1, keepdim=True)
        return (rewards_PG - others_PG).masked_fill(equal_P1, 0.0)

    per_token_loss = Reinforce.per_token_loss


class PaperGRPO:
    """Paper's GRPO: averages each response first, β = 0.04 (Shao et al., arXiv 2402.03300).

        A = (r − r̄) / (σ + 1e-6)
        loss = 1/(PG) Σ_y 1/|y| Σ_t [−min(ρ_t A, clip(ρ_t, 1−ε_low, 1+ε_high) A) + β k3_t]
        k3_t = exp(−d) + d − 1   with   d = log π(y_t) − log π_ref(y_t)

    π_ref is the initial policy. A token of a long response weighs less than one of a short one.
    """

    clip_low: float = option(0.2, at_least=0)
    """ε_low: a token with A < 0 has no gradient once its ratio is below 1 − ε_low"""
    clip_high: float = option(0.2, at_least=0)
    """ε_high: a token with A > 0 has no gradient once its ratio is above 1 + ε_high"""
    kl_coef: float = option(0.04, at_least=0, needs="reference_kl")
    """β: weight of the KL penalty"""

    def token_weights(advantages_PG, lengths_PG, args):
        """1 / (P G |y|) for each token: the mean over a response, then over all responses."""
        return 1 / (lengths_PG.numel() * lengths_PG.double())

    def per_token_loss(micro, args):
        """−min(ρ A, clip(ρ, 1−ε_low, 1+ε_high) A) + β k3 for each token of a micro-batch."""
        ratio_BT = torch.exp(micro.logprobs_BT - micro.sampler_logprobs_BT)  # ρ = π / π_old
        clipped_BT = ratio_BT.clamp(1 - args.clip_low, 1 + args.clip_high)
        loss_BT = -torch.minimum(ratio_BT * micro.advantages_B1, clipped_BT * micro.advantages_B1)
        d_BT = micro.logprobs_BT - micro.reference_logprobs_BT
        return loss_BT + args.kl_coef * (torch.exp(-d_BT) + d_BT - 1)


class DrGRPO:
    """Dr. GRPO: divides by constants only (Liu et al., arXiv 2503.20783).

        A = r − r̄
        loss = −1/(PGL) Σ_t min(ρ_t A, clip(ρ_t, 1−ε_low, 1+ε_high) A)

    L is --max-response-tokens. Dividing by σ favours prompts that are solved nearly always or
    nearly never; dividing by lengths favours long wrong responses.
    """

    clip_low: float = option(0.2, at_least=0)
    """ε_low: a token with A < 0 has no gradient once its ratio is below 1 − ε_low"""
    clip_high: float = option(0.2, at_least=0)
    """ε_high: a token with A > 0 has no gradient once its ratio is above 1 + ε_high"""

    advantages = Reinforce.advantages

    def token_weights(advantages_PG, lengths_PG, args):
        """1 / (P G L) for each token, or 0 if it has nothing to learn."""
        longest = lengths_PG.numel() * args.max_response_tokens
        weights_PG = torch.ones_like(advantages_PG) / longest
        return weights_PG.masked_fill(advantages_PG == 0, 0.0)  # saves the backward pass

    def per_token_loss(micro, args):
        """−min(ρ A, clip(ρ, 1−ε_low, 1+ε_high) A) for each token of a micro-batch."""
        ratio_BT = torch.exp(micro.logprobs_BT - micro.sampler_logprobs_BT)  # ρ = π / π_old
        clipped_BT = ratio_BT.clamp(1 - args.clip_low, 1 + args.clip_high)
        return -torch.minimum(ratio_BT * micro.advantages_B1, clipped_BT * micro.advantages_B1)


class DropEqual:
    """GRPO without equal groups: they do not count in N either.

        A = (r − r̄) / (σ + 1e-6)
        loss = −1/N' Σ_t min(ρ_t A, clip(ρ_t, 1−ε_low, 1+ε_high) A)

    N' counts the tokens of groups whose rewards differ. So the step does not shrink when most
    groups have been learned. It is what sampling these groups again would do to the loss (DAPO,
    arXiv 2503.14476), without the new samples.
    """

    clip_low: float = option(0.2, at_least=0)
    """ε_low: a token with A < 0 has no gradient once its ratio is below 1 − ε_low"""
    clip_high: float = option(0.2, at_least=0)
    """ε_high: a token with A > 0 has no gradient once its ratio is above 1 + ε_high"""

    def token_weights(advantages_PG, lengths_PG, args):
        """1/N' for each token of a group with different rewards, else 0."""
        differ_P1 = (advantages_PG != 0).any(dim=1, keepdim=True)
        num_tokens = (lengths_PG * differ_P1).sum().clamp(min=1)  # N'
        return (differ_P1.double() / num_tokens).expand_as(advantages_PG)

    per_token_loss = DrGRPO.per_token_loss


class DAPO:
    """DAPO: GRPO with a higher upper bound (Yu et al., arXiv 2503.14476), as far as it is a loss.

        A = (r − r̄) / (σ + 1e-6)
        loss = −1/N' Σ_t min(ρ_t A, clip(ρ_t, 1−ε_low, 1+ε_high) A)     with ε_high > ε_low

    A higher bound leaves unlikely tokens room to rise. The paper samples groups of equal rewards
    again; here they are left out, and N' counts the tokens of the others. It also lowers the reward
    of overlong responses, which is a matter of the task.
    """

    clip_low: float = option(0.2, at_least=0)
    """ε_low: a token with A < 0 has no gradient once its ratio is below 1 − ε_low"""
    clip_high: float = option(0.28, at_least=0)
    """ε_high: a token with A > 0 has no gradient once its ratio is above 1 + ε_high"""

    token_weights = DropEqual.token_weights
    per_token_loss = DrGRPO.per_token_loss


class EntropyBonus:
    """GRPO with entropy bonus: rewards staying undecided (as in A3C, arXiv 1602.01783).

        A = (r − r̄) / (σ + 1e-6)
        loss = −1/N Σ_t [min(ρ_t A, clip(ρ_t, 1−ε_low, 1+ε_high) A) + c H_t]

    H_t is the entropy of the distribution that token t was sampled from. Tokens of groups with
    equal rewards get the bonus, too.
    """

    clip_low: float = option(0.2, at_least=0)
    """ε_low: a token with A < 0 has no gradient once its ratio is below 1 − ε_low"""
    clip_high: float = option(0.2, at_least=0)
    """ε_high: a token with A > 0 has no gradient once its ratio is above 1 + ε_high"""
    entropy_coef: float = 0.01
    """c: weight of the bonus"""

    def token_weights(advantages_PG, lengths_PG, args):
        """1/N for each token: all of them get the bonus."""
        return torch.ones_like(advantages_PG) / lengths_PG.sum()

    def per_token_loss(micro, args):
        """−min(ρ A, clip(ρ, 1−ε_low, 1+ε_high) A) − c H for each token of a micro-batch."""
        ratio_BT = torch.exp(micro.logprobs_BT - micro.sampler_logprobs_BT)  # ρ = π / π_old
        clipped_BT = ratio_BT.clamp(1 - args.clip_low, 1 + args.clip_high)
        loss_BT = -torch.minimum(ratio_BT * micro.advantages_B1, clipped_BT * micro.advantages_B1)
        return loss_BT - args.entropy_coef * micro.entropy_BT


class KLInReward:
    """GRPO with KL in the reward: each response pays for its distance (as in arXiv 1909.08593).

        A = (r − r̄) / (σ + 1e-6) − β sg(Σ_t log π(y_t) − log π_ref(y_t))
        loss = −1/N Σ_t min(ρ_t A, clip(ρ_t, 1−ε_low, 1+ε_high) A)

    π_ref is the initial policy. On fresh samples, the penalty's gradient is on average that of
    KL(π ‖ π_ref) over whole responses, which that of k3 in the loss is not (arXiv 2506.09477).
    """

    clip_low: float = option(0.2, at_least=0)
    """ε_low: a token with A < 0 has no gradient once its ratio is below 1 − ε_low"""
    clip_high: float = option(0.2, at_least=0)
    """ε_high: a token with A > 0 has no gradient once its ratio is above 1 + ε_high"""
    kl_coef: float = option(0.01, at_least=0, needs="reference_kl")
    """β: weight of the KL penalty"""

    token_weights = EntropyBonus.token_weights

    def per_token_loss(micro, args):
        """−min(ρ A, clip(ρ, 1−ε_low, 1+ε_high) A), where A includes the penalty."""
        log_ratio_BT = (micro.logprobs_BT - micro.reference_logprobs_BT) * micro.mask_BT
        penalty_B1 = log_ratio_BT.sum(dim=1, keepdim=True).detach()
        advantages_B1 = micro.advantages_B1 - args.kl_coef * penalty_B1
        ratio_BT = torch.exp(micro.logprobs_BT - micro.sampler_logprobs_BT)  # ρ = π / π_old
        clipped_BT = ratio_BT.clamp(1 - args.clip_low, 1 + args.clip_high)
        return -torch.minimum(ratio_BT * advantages_B1, clipped_BT * advantages_B1)


class GSPO:
    """GSPO: Group Sequence Policy Optimization (Zheng et al., arXiv 2507.18071).

        A = (r − r̄) / (σ + 1e-6)
        s = exp(1/|y| Σ_t log ρ_t)                                  the ratio of the whole response
        loss = −1/(PG) Σ_y min(s A, clip(s, 1−ε_low, 1+ε_high) A)

    All tokens of a response are clipped, or none.
    """

    clip_low: float = option(3e-4, at_least=0)
    """ε_low: a response with A < 0 has no gradient once its ratio is below 1 − ε_low"""
    clip_high: float = option(4e-4, at_least=0)
    """ε_high: a response with A > 0 has no gradient once its ratio is above 1 + ε_high"""

    def token_weights(advantages_PG, lengths_PG, args):
        """1 / (P G |y|) for each token, its share of the response, or 0 if it learns nothing."""
        weights_PG = 1 / (lengths_PG.numel() * lengths_PG.double())
        return weights_PG.masked_fill(advantages_PG == 0, 0.0)  # saves the backward pass

    def per_token_loss(micro, args):
        """−min(s A, clip(s, 1−ε_low, 1+ε_high) A), the same for all tokens of a response."""
        log_ratio_BT = (micro.logprobs_BT - micro.sampler_logprobs_BT) * micro.mask_BT
        length_B1 = micro.mask_BT.sum(dim=1, keepdim=True)
        ratio_B1 = torch.exp(log_ratio_BT.sum(dim=1, keepdim=True) / length_B1)  # s
        clipped_B1 = ratio_B1.clamp(1 - args.clip_low, 1 + args.clip_high)
        loss_B1 = -torch.minimum(ratio_B1 * micro.advantages_B1, clipped_B1 * micro.advantages_B1)
        return loss_B1.expand_as(micro.logprobs_BT)


class CISPO:
    """CISPO: clipped importance-sampling weights (MiniMax-M1, arXiv 2506.13585).

        A = (r − r̄) / (σ + 1e-6)
        loss = −1/N Σ_t sg(clip(ρ_t, 1−ε_low, 1+ε_high)) A log π(y_t)

    Clips a token's weight, not its gradient: unlike in GRPO, rare tokens that have risen keep
    learning. The paper averages over the tokens of each group.
    """

    clip_low: float = option(1.0, at_least=0)
    """ε_low: the weight of a token is at least 1 − ε_low; 1, as in the paper, is no bound"""
    clip_high: float = option(0.28, at_least=0)
    """ε_high: the weight of a token is at most 1 + ε_high"""

    def per_token_loss(micro, args):
        """−sg(clip(ρ, 1−ε_low, 1+ε_high)) A log π for each token of a micro-batch."""
        ratio_BT = torch.exp(micro.logprobs_BT - micro.sampler_logprobs_BT)  # ρ = π / π_old
        weight_BT = ratio_BT.clamp(1 - args.clip_low, 1 + args.clip_high).detach()
        return -weight_BT * micro.advantages_B1 * micro.logprobs_BT


class TIS:
    """TIS: truncated importance sampling (Yao et al., fengyao.notion.site/off-policy-rl, 2025).

        A = (r − r̄) / (σ + 1e-6)
        loss = −1/N Σ_t sg(min(ρ_t, C)) A log π(y_t)

    Corrects for a sampler whose weights or arithmetic are not the trainer's, with the weight of
    V-trace (arXiv 1802.01561). The authors also clip the ratio to the policy before the update:
    with one update per batch, it is 1. CISPO has C = 1+ε_high.
    """

    cap: float = option(2.0, above=0)
    """C: the weight of a token is at most C"""

    def per_token_loss(micro, args):
        """−sg(min(ρ, C)) A log π for each token of a micro-batch."""
        ratio_BT = torch.exp(micro.logprobs_BT - micro.sampler_logprobs_BT)  # ρ = π / π_old
        return -ratio_BT.clamp(max=args.cap).detach() * micro.advantages_B1 * micro.logprobs_BT


class RECTwoSideIS:
    """REC-TwoSide-IS: REINFORCE, clipped on two sides, importance-sampled (arXiv 2509.24203).

        A = r − r̄
        M_t = 1 if 1−ε_low ≤ ρ_t ≤ 1+ε_high, else 0
        loss = −1/N Σ_t M_t sg(ρ_t) A log π(y_t)

    Unlike in GRPO, a token that has moved against its advantage is masked as well, and cannot come
    back.
    """

    clip_low: float = option(0.2, at_least=0)
    """ε_low: a token has no gradient once its ratio is below 1 − ε_low"""
    clip_high: float = option(0.2, at_least=0)
    """ε_high: a token has no gradient once its ratio is above 1 + ε_high"""

    advantages = Reinforce.advantages

    def per_token_loss(micro, args):
        """−M sg(ρ) A log π for each token of a micro-batch."""
        ratio_BT = torch.exp(
            micro.logprobs_BT - micro.sampler_logprobs_BT
        ).detach()  # ρ = π / π_old
        inside_BT = (ratio_BT >= 1 - args.clip_low) & (ratio_BT <= 1 + args.clip_high)
        # Not a product: that of 0 and an infinite ρ would be NaN.
        weight_BT = ratio_BT.masked_fill(~inside_BT, 0.0)
        return -weight_BT * micro.advantages_B1 * micro.logprobs_BT


class RECRingNoIS:
    """REC-Ring-NoIS: REINFORCE, clipped on a ring, no importance sampling (arXiv 2509.24203).

        A = r − r̄
        M_t = 1 if 1−ε_low ≤ ρ_t ≤ 1+ε_high,
              or A ≥ 0 and ρ_t ≤ 1−ε'_low, or A ≤ 0 and ρ_t ≥ 1+ε'_high, else 0
        loss = −1/N Σ_t M_t A log π(y_t)

    Tokens learn where ρ is near 1, and again where it has gone far against their advantage.
    """

    clip_low: float = option(0.2, at_least=0)
    """ε_low: lower end of the inner range of ratios, 1 − ε_low"""
    clip_high: float = option(0.2, at_least=0)
    """ε_high: upper end of the inner range of ratios, 1 + ε_high"""
    far_low: float = option(0.6, at_least=0)
    """ε'_low: a token with A > 0 learns again once its ratio is below 1 − ε'_low"""
    far_high: float = option(2.0, at_least=0)
    """ε'_high: a token with A < 0 learns again once its ratio is above 1 + ε'_high"""

    advantages = Reinforce.advantages

    def per_token_loss(micro, args):
        """−M A log π for each token of a micro-batch."""
        ratio_BT = torch.exp(
            micro.logprobs_BT - micro.sampler_logprobs_BT
        ).detach()  # ρ = π / π_old
        inside_BT = (ratio_BT >= 1 - args.clip_low) & (ratio_BT <= 1 + args.clip_high)
        fell_far_BT = (micro.advantages_B1 >= 0) & (ratio_BT <= 1 - args.far_low)
        rose_far_BT = (micro.advantages_B1 <= 0) & (ratio_BT >= 1 + args.far_high)
        mask_BT = inside_BT | fell_far_BT | rose_far_BT  # M
        return -micro.advantages_B1 * mask_BT * micro.logprobs_BT


class REDDrop:
    """RED-Drop: REINFORCE without the surplus of bad responses (Yao et al., arXiv 2509.24203).

        S = the responses with r ≥ r̄, and at most as many of the others
        A = r − the mean reward in S, for responses in S; 0 for the others
        loss = −1/N Σ_t A log π(y_t)

    The authors' code (Trinity-RFT, `rec_advantage.py`) drops at random; this drops the last in the
    group, which for independent samples is as random, and repeatable. N counts all responses, as it
    does there.
    """

    def advantages(rewards_PG, args):
        """A = r − the mean over the responses that are kept, 0 for the others; float64."""
        bad_PG = rewards_PG < rewards_PG.mean(dim=1, keepdim=True)
        num_good_P1 = (~bad_PG).sum(dim=1, keepdim=True)
        kept_PG = ~bad_PG | (bad_PG.cumsum(dim=1) <= num_good_P1)
        mean_P1 = (rewards_PG * kept_PG).sum(dim=1, keepdim=True) / kept_PG.sum(dim=1, keepdim=True)
        # The mean of equal rewards may be rounded: make their advantages exactly 0.
        equal_P1 = (rewards_PG == rewards_PG[:, :1]).all(dim=1, keepdim=True)
        return (rewards_PG - mean_P1).masked_fill(~kept_PG | equal_P1, 0.0)

    per_token_loss = Reinforce.per_token_loss


VARIANTS = {
    "reinforce": Reinforce,
    "rloo": RLOO,
    "paper_grpo": PaperGRPO,
    "dr_grpo": DrGRPO,
    "drop_equal": DropEqual,
    "dapo": DAPO,
    "entropy_bonus": EntropyBonus,
    "kl_in_reward": KLInReward,
    "gspo": GSPO,
    "cispo": CISPO,
    "tis": TIS,
    "rec_twoside_is": RECTwoSideIS,
    "rec_ring_nois": RECRingNoIS,
    "red_drop": REDDrop,
}
REGION = re.compile(
    r"(?<=# --- algorithm ---\n).*?(?=^ *# --- end algorithm ---$)", re.DOTALL | re.MULTILINE
)
OPTION = re.compile(r'^    \w+: \w+ = .*\n    """.*"""\n', re.MULTILINE)


@dataclass
class Args:
    write: tuple[str, Path] | None = None
    """a variant's name, and the new file to write it to"""


def script_of(name, file):
    """The text of a variant's script, called `file`: `grpo.py` with the regions of its class."""
    variant = VARIANTS[name]
    title = f'"""{inspect.getdoc(variant)}\n{NOTATION}\nUsage:\n    python {file}\n"""\n'
    options = "".join(OPTION.findall(inspect.getsource(variant)))
    functions = functions_of("grpo.py")
    # What does not define its own has no KL penalty: its weights are those of REC-OneSide-NoIS.
    functions["token_weights"] = functions_of("rec_oneside_nois.py")["token_weights"]
    for function in functions:
        if hasattr(variant, function):
            functions[function] = textwrap.dedent(inspect.getsource(getattr(variant, function)))
    regions = iter([title, options, "\n\n".join(functions.values()) + "\n\n"])
    return REGION.sub(lambda _: next(regions), (ROOT / "grpo.py").read_text())


def functions_of(script):
    """The functions in the last fenced region of a script: {name: source}."""
    region = REGION.findall((ROOT / script).read_text())[-1]
    nodes = ast.parse(region).body
    return {node.name: ast.get_source_segment(region, node) + "\n" for node in nodes}


def write(name, path):
    """Write a variant's script to a new file."""
    if name not in VARIANTS:
        known = ", ".join(VARIANTS)
        sys.exit(f"variants.py: error: --write {name}: no such variant; give one of {known}.")
    try:
        with open(path, "x") as file:
            file.write(script_of(name, path.name))
    except OSError as error:
        sys.exit(f"variants.py: error: --write {name} {path}: {error.strerror}; give another file.")


def main(args):
    if args.write:
        write(*args.write)
        return
    for name, variant in VARIANTS.items():
        title = inspect.getdoc(variant).splitlines()[0]
        print(f"{name:16}{title}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
