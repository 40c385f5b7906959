"""How much does the learning rate matter, and what are clipping and weighting good for?

    python benchmarks/figures/learning_rates.py         ten minutes on two otherwise idle cores

Three learning rates × four losses (GRPO, REC-OneSide-NoIS, RED-Weight, and plain REINFORCE with the
group's mean as baseline) at `sync_interval = 20`: one seed, 150 steps of 64 rollouts, task and
temperature of `algorithms.py`, where a right answer earns 8. Plain REINFORCE is not a script of its
own: it is `rec_oneside_nois.py` with ε = ∞, whose mask then keeps every token.

Writes `report.md`, and `strip.png` with the values it shows in `curves.csv`. Repeat the command to
continue where it was stopped.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.figures import algorithms
from benchmarks.helpers import reporting
from benchmarks.helpers.launcher import Run, as_options, run_all
from benchmarks.helpers.reporting import column, table

PLAIN = "REINFORCE (ε = ∞)"
LOSSES = {label: (script, {}) for label, script in algorithms.SCRIPTS.items()}
LOSSES[PLAIN] = ("rec_oneside_nois", {"clip_low": "inf", "clip_high": "inf"})
COLOURS = {**algorithms.COLOURS, PLAIN: "tab:gray"}


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
    runs: Path = reporting.RUNS / "learning_rates"
    """where the training runs go, and are looked for when the command is repeated"""
    output: Path = reporting.RESULTS / "learning_rates"
    """where report, figure and CSV go"""


def main(args):
    shared = {
        "seed": args.seed, "sync_interval": 20, "threads": 1, "serial": True, "prompts_per_step": 8,
        "temperature": algorithms.Args.temperature, "task": algorithms.TASK,
    }  # fmt: skip
    runs = {}
    for rate in args.learning_rates:
        for label, (script, own) in LOSSES.items():
            options = as_options(shared | {"learning_rate": rate} | own)
            runs[label, rate] = Run(f"{label}-{rate:g}", script, options)
    run_all(list(runs.values()), args.steps, args.runs, args.jobs)
    records = {key: reporting.read_steps(args.runs / run.name) for key, run in runs.items()}

    labels = ["Training Reward"] * len(args.learning_rates)
    figure, axes = reporting.new_figure(labels, "Training Steps", sharey=True)
    for axis, rate in zip(axes, args.learning_rates, strict=True):
        axis.set_title(f"learning rate {rate:g}")
        for label in LOSSES:
            run = [records[label, rate]]
            reporting.plot_band(axis, run, "reward/mean", "step", label, COLOURS[label])
    reporting.save_figure(figure, axes[0], args.output / "strip.png")
    groups = {f"{label}, {rate:g}": [one] for (label, rate), one in records.items()}
    reporting.write_curves(args.output / "curves.csv", groups, [args.seed], ["step", "reward/mean"])

    def accuracy(label, rate):
        values = column(records[label, rate], "eval/accuracy")
        return f"{values[-1]:.3f} (best {values.max():.3f})"

    rows = [[label, *(accuracy(label, rate) for rate in args.learning_rates)] for label in LOSSES]
    report = f"""# Learning rates, and plain REINFORCE, at `sync_interval = 20`

`python benchmarks/figures/learning_rates.py`: held-out accuracy (greedy) after {args.steps} steps
of 64 rollouts, seed {args.seed}; in brackets the best of the evaluations on the way. As in
`algorithms.py`, a right answer earns {algorithms.RIGHT}, and the temperature is
{algorithms.Args.temperature}. With a single seed, differences of a few hundredths mean nothing.

{table(["loss", *(f"learning rate {rate:g}" for rate in args.learning_rates)], rows)}

![reward over training steps](strip.png)
"""
    environment = reporting.environment_of(args.runs / next(iter(runs.values())).name)
    reporting.write_report(args.output / "report.md", report, environment)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
