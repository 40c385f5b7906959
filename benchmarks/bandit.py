"""What does each loss make of data from another policy? Three arms, fixed data, the scripts' own losses.

    python benchmarks/bandit.py

The data come from a behaviour policy that pulls the arms with probabilities 0.3, 0.6 and 0.1 and are never renewed;
the arms pay 0, 0.8 and 1. The third arm is best, but the second is in the data six times as often. A softmax policy
starts at the behaviour policy and follows each loss by gradient descent. One group of ten responses holds the behaviour
policy's proportions exactly, so there is no noise: what is seen is what the loss asks for.

Writes `benchmarks/results/bandit.png` and `bandit.md`.
"""

import dataclasses
import sys
from pathlib import Path

import matplotlib
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import grpo
import rec_oneside_nois
import red_weight
from common.runlog import describe_environment

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BEHAVIOUR = torch.tensor([0.3, 0.6, 0.1], dtype=torch.float64)
REWARDS = torch.tensor([0.0, 0.8, 1.0], dtype=torch.float64)
LOSSES = {  # label: (script, changed arguments)
    "REINFORCE (REC, ε = ∞)": (rec_oneside_nois, {"clip_low": float("inf"), "clip_high": float("inf")}),
    "GRPO": (grpo, {}),
    "REC-OneSide-NoIS (0.2)": (rec_oneside_nois, {}),
    "RED-Weight": (red_weight, {}),
}


def train(script, changes, steps=4000, learning_rate=0.05):
    """Gradient descent on a script's loss over the fixed data; returns the policy after each step, [steps + 1, 3]."""
    args = dataclasses.replace(script.Args(), **changes)
    arms_N = torch.repeat_interleave(torch.arange(3), (10 * BEHAVIOUR).round().long())  # 3, 6 and 1 pulls
    advantages_N = script.advantages(REWARDS[arms_N].unsqueeze(0), args).squeeze(0)
    logits = BEHAVIOUR.log().requires_grad_()
    policies = [BEHAVIOUR]
    for _ in range(steps):
        logprobs_N = torch.log_softmax(logits, dim=0)[arms_N]
        loss = script.per_token_loss(logprobs_N, BEHAVIOUR.log()[arms_N], advantages_N, args).mean()
        (gradient,) = torch.autograd.grad(loss, logits)
        logits = (logits - learning_rate * gradient).detach().requires_grad_()
        policies.append(torch.softmax(logits.detach(), dim=0))
    return torch.stack(policies)


def main():
    policies = {label: train(*loss) for label, loss in LOSSES.items()}
    figure, axes = plt.subplots(1, len(LOSSES), figsize=(14, 3.4), sharey=True, layout="constrained")
    for axis, (label, policy) in zip(axes, policies.items(), strict=True):
        for arm, style in enumerate((":", "--", "-")):
            axis.plot(policy[:, arm], style, label=f"arm {arm + 1}, pays {REWARDS[arm]:g}")
        axis.set(title=label, xlabel="gradient steps on the same data", xscale="symlog", ylim=(-0.02, 1.02))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("probability under the policy")
    axes[0].legend(fontsize=8)
    output = ROOT / "benchmarks" / "results"
    output.mkdir(parents=True, exist_ok=True)
    figure.savefig(output / "bandit.png", dpi=120)

    rows = [
        f"| {label} | {' | '.join(f'{p:.3f}' for p in policy[-1])} | {(policy[-1] * REWARDS).sum():.3f} |"
        for label, policy in {"behaviour policy": BEHAVIOUR.unsqueeze(0), **policies}.items()
    ]
    report = f"""# Fixed data from another policy: a bandit with three arms

`python benchmarks/bandit.py`: the policy that each loss ends with after {len(policies["GRPO"]) - 1} gradient steps.

| loss | arm 1 (pays 0) | arm 2 (pays 0.8) | arm 3 (pays 1) | expected reward |
|---|---|---|---|---|
{chr(10).join(rows)}

![policies over gradient steps](bandit.png)

```
{describe_environment().strip()}
```
"""
    (output / "bandit.md").write_text(report)
    print(report)


if __name__ == "__main__":
    main()
