"""Ten more algorithms, each of them a few lines in place of `grpo.py`'s.

    python benchmarks/variants.py --write gspo mine.py      write one as a script, mine.py
    python benchmarks/variants.py                           train with each; 40 to 55 minutes
    python benchmarks/variants.py --quick                   in miniature, to see that it works

A class below is what a variant puts into the four fenced regions of `grpo.py`: docstring, options,
`advantages` and `per_token_loss`. What it does not define stays as in `grpo.py`, but a loss of its
own comes with its own options only. What papers add outside of the fences is left out: KL
penalties, rewards for length, sampling a group again.

Trains at `sync_interval` 1 and 20, with one setting for all, and the three scripts for comparison.
Writes `report.md`, and `strip.png` with the values it shows in `curves.csv`. Repeat the command to
continue where it was stopped.
"""

import difflib
import inspect
import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.figures import algorithms
from benchmarks.helpers import reporting
from benchmarks.helpers.launcher import ROOT, Run, run_all
from benchmarks.helpers.reporting import SPREAD, column, table, yes

NOTATION = """
For each of P prompts x_i, sample a group of G responses y_ij and grade them. r_ij is a response's
reward; r̄_i and σ_i are the mean and the standard deviation of its group. π_old is the policy that
sampled the response, and

    ρ_ijt = π_θ(y_ijt | x_i, y_ij,<t) / π_old(y_ijt | x_i, y_ij,<t)

is a token's ratio to it. N is the number of response tokens in the whole batch, |y_ij| that in one
response. Where a paper divides by a constant instead, AdamW nearly divides that out; DAPO and CISPO
divide by the tokens of each group. sg(·) lets no gradient through. Each batch gives one update, and
there is no KL penalty.
"""


class Reinforce:
    """REINFORCE: with the group's mean as baseline (Williams, 1992; the baseline as in Yao et al.,
    arXiv 2509.24203).

        A_ij = r_ij − r̄_i
        loss = −1/N Σ_ijt A_ij log π_θ(y_ijt | x_i, y_ij,<t)

    Neither a ratio nor clipping bounds how far old data can push the policy.
    """

    def advantages(rewards_PG, args):
        """A = r − r̄ with the group's mean; float64 in and out."""
        advantages_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
        # Equal rewards carry no signal: exactly 0, also after rounding.
        all_equal_P1 = (rewards_PG == rewards_PG[:, :1]).all(dim=1, keepdim=True)
        return advantages_PG.masked_fill(all_equal_P1, 0.0)

    def per_token_loss(logprobs_BT, sampler_logprobs_BT, advantages_B1, mask_BT, args):
        """−A log π of each token."""
        return -advantages_B1 * logprobs_BT


class RLOO:
    """RLOO: REINFORCE Leave-One-Out (Ahmadian et al., "Back to Basics", arXiv 2402.14740).

        A_ij = r_ij − 1/(G−1) Σ_k≠j r_ik
        loss = −1/N Σ_ijt A_ij log π_θ(y_ijt | x_i, y_ij,<t)

    A is G/(G−1) (r_ij − r̄_i). The paper divides by the number of responses, not by N.
    """

    def advantages(rewards_PG, args):
        """A = r less the mean of the group's other rewards; float64 in and out."""
        others_PG = (rewards_PG.sum(dim=1, keepdim=True) - rewards_PG) / (rewards_PG.shape[1] - 1)
        # Equal rewards carry no signal: exactly 0, also after rounding.
        all_equal_P1 = (rewards_PG == rewards_PG[:, :1]).all(dim=1, keepdim=True)
        return (rewards_PG - others_PG).masked_fill(all_equal_P1, 0.0)

    per_token_loss = Reinforce.per_token_loss


class DrGRPO:
    """Dr. GRPO: GRPO without division by σ (Liu et al., arXiv 2503.20783).

        A_ij = r_ij − r̄_i
        loss = −1/N Σ_ijt min(ρ_ijt A_ij, clip(ρ_ijt, 1−ε_low, 1+ε_high) A_ij)

    Dividing by σ favours prompts solved nearly always or nearly never. The paper divides by a
    constant, not by N.
    """

    advantages = Reinforce.advantages


class DAPO:
    """DAPO: GRPO with a higher upper bound (Yu et al., arXiv 2503.14476), as far as it is a loss.

        A_ij = (r_ij − r̄_i) / (σ_i + 1e-6)
        loss = −1/N Σ_ijt min(ρ_ijt A_ij, clip(ρ_ijt, 1−ε_low, 1+ε_high) A_ij),   ε_high > ε_low

    A higher bound leaves unlikely tokens room to rise. The paper also lowers the reward of overlong
    responses: left out, since `advantages` does not see lengths. And it samples groups with equal
    rewards again.
    """

    clip_low: float = 0.2
    """ε_low: a token with A < 0 gets no gradient once its ratio is below 1 − ε_low"""
    clip_high: float = 0.28
    """ε_high: a token with A > 0 gets no gradient once its ratio is above 1 + ε_high"""


class GSPO:
    """GSPO: Group Sequence Policy Optimization (Zheng et al., arXiv 2507.18071).

        A_ij = (r_ij − r̄_i) / (σ_i + 1e-6)
        s_ij = exp(1/|y_ij| Σ_t log ρ_ijt)                      the ratio of the whole response
        loss = −1/N Σ_ij min(s_ij A_ij, clip(s_ij, 1−ε_low, 1+ε_high) A_ij)

    All tokens of a response are clipped, or none. The paper divides by the number of responses, not
    by N.
    """

    clip_low: float = 3e-4
    """ε_low: a response with A < 0 gets no gradient once its ratio is below 1 − ε_low"""
    clip_high: float = 4e-4
    """ε_high: a response with A > 0 gets no gradient once its ratio is above 1 + ε_high"""

    def per_token_loss(logprobs_BT, sampler_logprobs_BT, advantages_B1, mask_BT, args):
        """−min(s A, clip(s, 1−ε_low, 1+ε_high) A) / |y| of each token: its share of the loss."""
        length_B1 = mask_BT.sum(dim=1, keepdim=True)
        log_ratio_BT = (logprobs_BT - sampler_logprobs_BT) * mask_BT
        ratio_B1 = torch.exp(log_ratio_BT.sum(dim=1, keepdim=True) / length_B1)
        clipped_B1 = ratio_B1.clamp(1 - args.clip_low, 1 + args.clip_high)
        losses_B1 = -torch.minimum(ratio_B1 * advantages_B1, clipped_B1 * advantages_B1)
        return (losses_B1 / length_B1).expand_as(logprobs_BT)


class CISPO:
    """CISPO: clipped importance-sampling weights (MiniMax-M1, arXiv 2506.13585).

        A_ij = (r_ij − r̄_i) / (σ_i + 1e-6)
        loss = −1/N Σ_ijt sg(clip(ρ_ijt, 1−ε_low, 1+ε_high)) A_ij log π_θ(y_ijt | x_i, y_ij,<t)

    Clips a token's weight, not its gradient: unlike in GRPO, rare tokens that have risen keep
    learning.
    """

    clip_low: float = 1.0
    """ε_low: the weight of a token is at least 1 − ε_low; 1, as in the paper, is no bound"""
    clip_high: float = 0.28
    """ε_high: the weight of a token is at most 1 + ε_high"""

    def per_token_loss(logprobs_BT, sampler_logprobs_BT, advantages_B1, mask_BT, args):
        """−sg(clip(ρ, 1−ε_low, 1+ε_high)) A log π of each token."""
        ratio_BT = torch.exp(logprobs_BT - sampler_logprobs_BT)
        weight_BT = ratio_BT.clamp(1 - args.clip_low, 1 + args.clip_high).detach()
        return -weight_BT * advantages_B1 * logprobs_BT


class TIS:
    """TIS: truncated importance sampling (Yao et al., fengyao.notion.site/off-policy-rl, 2025;
    arXiv 1802.01561).

        A_ij = (r_ij − r̄_i) / (σ_i + 1e-6)
        loss = −1/N Σ_ijt sg(min(ρ_ijt, C)) A_ij log π_θ(y_ijt | x_i, y_ij,<t)

    Corrects for a sampler whose weights or arithmetic are not the trainer's, with the weight of
    V-trace. The authors also clip the ratio to the policy before the update: with one update per
    batch, it is 1. CISPO has C = 1+ε_high.
    """

    cap: float = 2.0
    """C: the weight of a token is at most C"""

    def per_token_loss(logprobs_BT, sampler_logprobs_BT, advantages_B1, mask_BT, args):
        """−sg(min(ρ, C)) A log π of each token."""
        weight_BT = torch.exp(logprobs_BT - sampler_logprobs_BT).clamp(max=args.cap).detach()
        return -weight_BT * advantages_B1 * logprobs_BT


class RECTwoSideIS:
    """REC-TwoSide-IS: REINFORCE, clipped on both sides, with importance sampling (Yao et al.,
    arXiv 2509.24203).

        A_ij = r_ij − r̄_i
        M_ijt = 1 if 1−ε_low ≤ ρ_ijt ≤ 1+ε_high, else 0
        loss = −1/N Σ_ijt M_ijt sg(ρ_ijt) A_ij log π_θ(y_ijt | x_i, y_ij,<t)

    Unlike in GRPO, a token that has moved against its advantage is masked as well, and cannot come
    back.
    """

    clip_low: float = 0.2
    """ε_low: a token gets no gradient once its ratio is below 1 − ε_low"""
    clip_high: float = 0.2
    """ε_high: a token gets no gradient once its ratio is above 1 + ε_high"""

    advantages = Reinforce.advantages

    def per_token_loss(logprobs_BT, sampler_logprobs_BT, advantages_B1, mask_BT, args):
        """−M sg(ρ) A log π of each token."""
        ratio_BT = torch.exp(logprobs_BT - sampler_logprobs_BT).detach()
        inside_BT = (ratio_BT >= 1 - args.clip_low) & (ratio_BT <= 1 + args.clip_high)
        # Not multiplied by 0: an infinite ρ would give NaN.
        weight_BT = ratio_BT.masked_fill(~inside_BT, 0.0)
        return -weight_BT * advantages_B1 * logprobs_BT


class RECRingNoIS:
    """REC-Ring-NoIS: REINFORCE, clipped on a ring, without importance sampling (Yao et al.,
    arXiv 2509.24203).

        A_ij = r_ij − r̄_i
        M_ijt = 1 if 1−ε_low ≤ ρ_ijt ≤ 1+ε_high,
                  or A_ij ≥ 0 and ρ_ijt ≤ 1−ε'_low, or A_ij ≤ 0 and ρ_ijt ≥ 1+ε'_high; else 0
        loss = −1/N Σ_ijt M_ijt A_ij log π_θ(y_ijt | x_i, y_ij,<t)

    Tokens learn where ρ is near 1, and again where it has gone far against their advantage.
    """

    clip_low: float = 0.2
    """ε_low: lower end of the inner range of ratios, 1 − ε_low"""
    clip_high: float = 0.2
    """ε_high: upper end of the inner range of ratios, 1 + ε_high"""
    far_low: float = 0.6
    """ε'_low: a token with A > 0 learns again once its ratio is below 1 − ε'_low"""
    far_high: float = 2.0
    """ε'_high: a token with A < 0 learns again once its ratio is above 1 + ε'_high"""

    advantages = Reinforce.advantages

    def per_token_loss(logprobs_BT, sampler_logprobs_BT, advantages_B1, mask_BT, args):
        """−M A log π of each token."""
        ratio_BT = torch.exp(logprobs_BT - sampler_logprobs_BT).detach()
        inside_BT = (ratio_BT >= 1 - args.clip_low) & (ratio_BT <= 1 + args.clip_high)
        fell_far_BT = (advantages_B1 >= 0) & (ratio_BT <= 1 - args.far_low)
        rose_far_BT = (advantages_B1 <= 0) & (ratio_BT >= 1 + args.far_high)
        return -advantages_B1 * (inside_BT | fell_far_BT | rose_far_BT) * logprobs_BT


class REDDrop:
    """RED-Drop: REINFORCE without the surplus of bad responses (Yao et al., arXiv 2509.24203).

        S_i  = the responses with r_ij ≥ r̄_i, and at most as many of the others
        A_ij = r_ij − the mean reward in S_i, for responses in S_i; 0 for the others
        loss = −1/N Σ_ijt A_ij log π_θ(y_ijt | x_i, y_ij,<t)

    The authors' code (Trinity-RFT, `rec_advantage.py`) drops at random; this drops the last in the
    group, which for independent samples is as random, and repeatable. N counts all responses, as it
    does there.
    """

    def advantages(rewards_PG, args):
        """A = r − the mean of the responses that are kept, 0 for the others; float64 in and out."""
        bad_PG = rewards_PG < rewards_PG.mean(dim=1, keepdim=True)
        kept_PG = ~bad_PG | (bad_PG.cumsum(dim=1) <= (~bad_PG).sum(dim=1, keepdim=True))
        mean_P1 = (rewards_PG * kept_PG).sum(dim=1, keepdim=True) / kept_PG.sum(dim=1, keepdim=True)
        # Equal rewards carry no signal: exactly 0, also after rounding.
        all_equal_P1 = (rewards_PG == rewards_PG[:, :1]).all(dim=1, keepdim=True)
        return (rewards_PG - mean_P1).masked_fill(~kept_PG | all_equal_P1, 0.0)

    per_token_loss = Reinforce.per_token_loss


VARIANTS = {
    "reinforce": Reinforce, "rloo": RLOO, "dr_grpo": DrGRPO, "dapo": DAPO, "gspo": GSPO,
    "cispo": CISPO, "tis": TIS, "rec_twoside_is": RECTwoSideIS, "rec_ring_nois": RECRingNoIS,
    "red_drop": REDDrop,
}  # fmt: skip
REGION = re.compile(
    r"(?<=# --- algorithm ---\n).*?(?=^ *# --- end algorithm ---$)", re.DOTALL | re.MULTILINE
)
OPTION = re.compile(r'^    \w+: \w+ = .*\n    """.*"""\n', re.MULTILINE)
SETTING = "--threads 1 --serial --prompts-per-step 8 --learning-rate 5e-5"
SYNC_INTERVALS = (1, 20)


@dataclass
class Args:
    write: tuple[str, Path] | None = None
    """a variant's name, and the new file to write it to; nothing is trained"""
    steps: int = 150
    """training steps of each run"""
    seeds: tuple[int, ...] = (1, 2)
    """seeds of each curve"""
    jobs: int = 2
    """how many runs at a time, one thread each"""
    quick: bool = False
    """GRPO and two variants, 10 steps, into directories of their own"""
    runs: Path = reporting.RUNS / "variants"
    """where scripts and training runs go, and are looked for when the command is repeated"""
    output: Path = reporting.RESULTS / "variants"
    """where report, figure and CSV go"""


def script_of(name, file):
    """The text of a variant's script, called `file`: `grpo.py` with the regions of its class."""
    variant, text = VARIANTS[name], (ROOT / "grpo.py").read_text()
    _, options, *functions = REGION.findall(text)
    title = f'"""{inspect.getdoc(variant)}\n{NOTATION}\nUsage:\n    python {file}\n"""\n'
    own = "".join(OPTION.findall(inspect.getsource(variant)))
    regions = [title, own if own or hasattr(variant, "per_token_loss") else options]
    for function, region in zip(("advantages", "per_token_loss"), functions, strict=True):
        own = getattr(variant, function, None)
        regions.append(textwrap.dedent(inspect.getsource(own)) + "\n\n" if own else region)
    return REGION.sub(lambda _: regions.pop(0), text)


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
        return write(*args.write)
    names, scripts = list(VARIANTS), dict(algorithms.SCRIPTS)
    if args.quick:
        args.steps, names, scripts = 10, ["gspo", "cispo"], {"GRPO": "grpo"}
        reporting.use_quick_directories(args, Args.output)
    args.runs.mkdir(parents=True, exist_ok=True)
    for name in names:
        path = args.runs.resolve() / f"{name}.py"
        path.write_text(script_of(name, path.name))
        scripts[VARIANTS[name].__doc__.partition(":")[0]] = str(path.with_suffix(""))

    def run_of(label, interval, seed):
        options = f"--sync-interval {interval} --seed {seed} {SETTING} --eval-interval {args.steps}"
        name = f"{Path(scripts[label]).name}-{interval}-{seed}"
        return Run(name, scripts[label], options.split())

    curves = [(label, interval) for interval in SYNC_INTERVALS for label in scripts]
    runs = [run_of(*curve, seed) for seed in args.seeds for curve in curves]
    run_all(runs, args.steps, args.runs, args.jobs)
    groups = {
        curve: [reporting.read_steps(args.runs / run_of(*curve, seed).name) for seed in args.seeds]
        for curve in curves
    }
    panels = {
        label: {f"sync_interval {i}": groups[label, i] for i in SYNC_INTERVALS} for label in scripts
    }
    colours = dict(zip(panels["GRPO"], ("tab:blue", "tab:orange"), strict=True))
    what = ("reward/mean", "training reward", colours)
    reporting.plot_strip(args.output / "strip.png", panels, *what)
    columns = ["step", "reward/mean", "kl/ref_k2"]
    named = {
        f"{label}, sync_interval {interval}": runs for (label, interval), runs in groups.items()
    }
    reporting.write_curves(args.output / "curves.csv", named, args.seeds, columns)
    environment = reporting.environment_of(args.runs / run_of("GRPO", 1, args.seeds[0]).name)
    report = write_text(groups, scripts, args)
    reporting.write_report(args.output / "report.md", report, environment)


def lines_of_diff(script):
    """Lines that a diff of `grpo.py` and another script removes and adds, without the docstrings at
    the top.
    """
    texts = [path.read_text() for path in (ROOT / "grpo.py", script)]
    lines = [REGION.sub("", text, count=1).splitlines() for text in texts]
    kinds = [line[0] for line in difflib.ndiff(*lines)]
    return f"−{kinds.count('-')} +{kinds.count('+')}"


def is_stable(runs):
    """Whether in all runs the last tenth's reward is within 0.1 of the best tenth's, and no update
    was skipped.
    """
    tenths = algorithms.tenths(runs, "reward/mean")
    skipped = sum(column(records, "update_skipped").sum() for records in runs)
    return skipped == 0 and bool((tenths[:, -1] >= tenths.max(axis=1) - 0.1).all())


def write_text(groups, scripts, args):
    header = ["algorithm", "script", "lines of diff", "accuracy per seed", "mean", "against GRPO"]
    header += ["KL", "clipped", "clipped, weighted", "stable"]
    rows = {interval: [] for interval in SYNC_INTERVALS}
    accuracy = {
        curve: [column(run, "eval/accuracy")[-1] for run in runs] for curve, runs in groups.items()
    }
    for (label, interval), runs in groups.items():
        script = (ROOT / scripts[label]).with_suffix(".py")
        paper = re.search(r"arXiv (\d+\.\d+)", script.read_text())[1]
        values, grpos = accuracy[label, interval], accuracy["GRPO", interval]
        row = [f"[{label}](https://arxiv.org/abs/{paper})", f"`{script.stem}`"]
        row.append(lines_of_diff(script))
        row += [", ".join(f"{value:.3f}" for value in values), f"{np.mean(values):.3f}"]
        row.append("" if label == "GRPO" else reporting.difference(values, grpos))
        row.append(f"{algorithms.tenths(runs, 'kl/ref_k2')[:, -1].mean():.3f}")
        rows[interval].append([*row, *reporting.clipped(runs), yes(is_stable(runs))])
    sections = [f"## `sync_interval = {i}`\n\n{table(header, rows[i])}\n" for i in SYNC_INTERVALS]
    tables = "\n".join(sections)
    return f"""# Variants of the loss

`python benchmarks/variants.py`: {args.steps} steps with `{SETTING}`,
seeds {", ".join(map(str, args.seeds))}, the bundled model and task.

![reward over training steps](strip.png)

- Lines of diff: removed from `grpo.py` and added to it, without the docstrings at the top.
- Accuracy: held-out, greedy, after training. "{SPREAD}": the means differ by no more than the
  ranges over seeds, the algorithm's and GRPO's, added up. With {len(args.seeds)} seeds, chance
  alone can exceed that.
- KL: to the initial policy, mean of the last tenth of the run.
- Clipped: response tokens whose gradient was clipped, where the lag is largest; "weighted" counts a
  token by 1 − p. A loss that clips weights instead of gradients has none.
- Stable: with all seeds, the last tenth's reward is within 0.1 of the best tenth's, and no update
  was skipped.

{tables}"""


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
