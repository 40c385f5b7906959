"""How much does the learning rate matter, and why clip or weight at all?

    python benchmarks/learning_rates.py

Three learning rates × four losses (GRPO, REC-OneSide-NoIS, RED-Weight, and plain REINFORCE with the group's mean as
baseline) at `sync_interval = 20`: one seed, 150 steps of 64 rollouts, and the final held-out accuracy of each. Plain
REINFORCE is no script of its own: it is `rec_oneside_nois.py` with ε = ∞, whose mask then keeps every token.

Writes `benchmarks/results/learning_rates/`: `strip.png`, `results.json` and `report.md`. Stopped half way, the same
command continues with what is missing.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.algorithms import moving_average
from benchmarks.launcher import Run, environment_of, run_all
from common.runlog import read_metrics

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LOSSES = {  # label: (script, its options, colour)
    "GRPO": ("grpo", (), "tab:green"),
    "REC-OneSide-NoIS (0.2)": ("rec_oneside_nois", (), "tab:purple"),
    "RED-Weight": ("red_weight", (), "tab:orange"),
    "REINFORCE (ε = ∞)": ("rec_oneside_nois", ("--clip-low", "inf", "--clip-high", "inf"), "tab:gray"),
}


@dataclass
class Args:
    learning_rates: tuple[float, ...] = (5e-5, 2e-4, 8e-4)
    """one panel each: that of algorithms.py, the default of the scripts, and four times as much"""
    steps: int = 150
    """training steps of each run"""
    seed: int = 1
    """seed of all runs"""
    jobs: int = 2
    """how many runs at a time, one thread each"""
    runs: Path = Path("runs/learning_rates")
    """where the training runs go, and are looked for when the command is repeated"""
    output: Path = Path("benchmarks/results/learning_rates")
    """where picture and report go"""


def main(args):
    common = f"--seed {args.seed} --sync-interval 20 --threads 1 --serial --prompts-per-step 8".split()
    runs = {
        (label, rate): Run(f"{label}-{rate:g}", script, [*common, "--learning-rate", str(rate), *options])
        for rate in args.learning_rates
        for label, (script, options, _) in LOSSES.items()
    }
    run_all(list(runs.values()), args.steps, ROOT / args.runs, args.jobs)
    records = {key: read_metrics(ROOT / args.runs / run.name) for key, run in runs.items()}

    output = ROOT / args.output
    output.mkdir(parents=True, exist_ok=True)
    results = [
        {
            "loss": label,
            "learning_rate": rate,
            "accuracy": rows[-1]["eval/accuracy"],
            "best_accuracy": max(row["eval/accuracy"] for row in rows if "eval/accuracy" in row),
            "reward_last_tenth": float(np.mean([row["reward/mean"] for row in rows[-args.steps // 10 :]])),
        }
        for (label, rate), rows in records.items()
    ]
    environment = environment_of(ROOT / args.runs / next(iter(runs.values())).name)
    (output / "results.json").write_text(json.dumps({"environment": environment, "results": results}, indent=1) + "\n")
    draw(records, args.learning_rates, output / "strip.png")
    accuracy = {(row["loss"], row["learning_rate"]): row["accuracy"] for row in results}
    best = {(row["loss"], row["learning_rate"]): row["best_accuracy"] for row in results}
    rows = [
        f"| {label} | "
        + " | ".join(f"{accuracy[label, rate]:.3f} (best {best[label, rate]:.3f})" for rate in args.learning_rates)
        + " |"
        for label in LOSSES
    ]
    report = f"""# Learning rates, and plain REINFORCE, at `sync_interval = 20`

`python benchmarks/learning_rates.py`: held-out accuracy (greedy) after {args.steps} steps of 64 rollouts, seed
{args.seed}; in brackets the best of the evaluations on the way. One seed: differences of a few hundredths mean nothing.

| loss | {" | ".join(f"lr {rate:g}" for rate in args.learning_rates)} |
|---{"|---" * len(args.learning_rates)}|
{chr(10).join(rows)}

![reward over training steps](strip.png)

```
{environment}
```
"""
    (output / "report.md").write_text(report)
    print(report)


def draw(records, rates, path):
    """One panel per learning rate: training reward of the four losses."""
    figure, axes = plt.subplots(1, len(rates), figsize=(13, 3.6), sharey=True, layout="constrained")
    for axis, rate in zip(axes, rates, strict=True):
        for label, (_, _, colour) in LOSSES.items():
            points = [(row["step"], row["reward/mean"]) for row in records[label, rate] if row["step"] > 0]
            steps, rewards = np.array(points).T
            axis.plot(steps, moving_average(rewards), color=colour, label=label)
        axis.set(title=f"learning rate {rate:g}", xlabel="Training Steps")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("Training Reward")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
