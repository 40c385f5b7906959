"""What does each loss make of data from another policy? Three arms, fixed data, the scripts' own
losses.

    python benchmarks/figures/bandit.py                 half a minute

The data come from a behaviour policy that pulls the arms with probabilities 0.3, 0.6 and 0.1 and
are never renewed; the arms pay 0, 0.8 and 1. The third arm is best, but the second is in the data
six times as often. A softmax policy starts at the behaviour policy and follows each loss by
gradient descent. One group of ten responses holds the behaviour policy's proportions exactly, so
there is no noise: the outcome is what the loss asks for.

Writes `bandit.md` and `bandit.png`.
"""

import dataclasses
import math
import sys
import types
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[2]))

import grpo
import rec_oneside_nois
import red_weight
from benchmarks.helpers import reporting
from common.environment import describe_environment

BEHAVIOUR = torch.tensor([0.3, 0.6, 0.1], dtype=torch.float64)
REWARDS = torch.tensor([0.0, 0.8, 1.0], dtype=torch.float64)
LOSSES = {  # label: (script, changed arguments)
    "REINFORCE (REC, ε = ∞)": (rec_oneside_nois, {"clip_low": math.inf, "clip_high": math.inf}),
    "GRPO": (grpo, {}),
    "REC-OneSide-NoIS (0.2)": (rec_oneside_nois, {}),
    "RED-Weight": (red_weight, {}),
}


@dataclasses.dataclass
class Args:
    output: Path = reporting.RESULTS
    """where bandit.md and bandit.png go"""


def train(script, changes, steps=4000, learning_rate=0.05):
    """Gradient descent on a script's loss over the fixed data; returns the policy after each step,
    [steps + 1, 3].
    """
    args = dataclasses.replace(script.Args(), **changes)
    pulls = (10 * BEHAVIOUR).round().long()  # 3, 6 and 1
    arms_B1 = torch.repeat_interleave(torch.arange(3), pulls).unsqueeze(1)
    advantages_B1 = script.advantages(REWARDS[arms_B1].T, args).T
    # Each pull is a response of one token.
    micro = types.SimpleNamespace(
        advantages_B1=advantages_B1,
        mask_BT=torch.ones_like(arms_B1, dtype=torch.bool),
        sampler_logprobs_BT=BEHAVIOUR.log()[arms_B1],
    )
    logits = BEHAVIOUR.log().requires_grad_()
    policies = [BEHAVIOUR]
    for _ in range(steps):
        micro.logprobs_BT = torch.log_softmax(logits, dim=0)[arms_B1]
        loss = script.per_token_loss(micro, args).mean()
        (gradient,) = torch.autograd.grad(loss, logits)
        logits = (logits - learning_rate * gradient).detach().requires_grad_()
        policies.append(torch.softmax(logits.detach(), dim=0))
    return torch.stack(policies)


def main(args):
    policies = {label: train(*loss) for label, loss in LOSSES.items()}
    labels = ["probability under the policy"] * len(LOSSES)
    x_label = "gradient steps on the same data"
    figure, axes = reporting.new_figure(labels, x_label, sharey=True)
    for axis, (label, policy) in zip(axes, policies.items(), strict=True):
        for arm, style in enumerate((":", "--", "-")):
            axis.plot(policy[:, arm], style, label=f"arm {arm + 1}, pays {REWARDS[arm]:g}")
        axis.set(title=label, xscale="symlog", ylim=(-0.02, 1.02))
    reporting.save_figure(figure, axes[0], args.output / "bandit.png")

    rows = [
        [label, *(f"{p:.3f}" for p in policy[-1]), f"{(policy[-1] * REWARDS).sum():.3f}"]
        for label, policy in {"behaviour policy": BEHAVIOUR.unsqueeze(0), **policies}.items()
    ]
    arms = [f"arm {arm + 1} (pays {pay:g})" for arm, pay in enumerate(REWARDS)]
    report = f"""# Fixed data from another policy: a bandit with three arms

`python benchmarks/figures/bandit.py`: the policy that each loss ends with after
{len(policies["GRPO"]) - 1} gradient steps.

{reporting.table(["loss", *arms, "expected reward"], rows)}

![policies over gradient steps](bandit.png)
"""
    reporting.write_report(args.output / "bandit.md", report, describe_environment())


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
