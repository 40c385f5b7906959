"""The figure "sync_interval = 20": GRPO, REC-OneSide-NoIS (0.2) and RED-Weight, five seeds each.

    python benchmarks/figures/algorithms.py             25 runs, two at a time; half an hour
    python benchmarks/figures/algorithms.py --quick     the same in miniature, to see that it works

A right answer earns 8 here, as the axis of the published figure suggests. That matters to
RED-Weight, which has τ = 1, as in its authors' code. A response's weight is exp(A/τ); with rewards
0 and s, a wrong response has exp(−s/τ) times the weight of a right one in its group, whatever the
group's mean: 0.0003 for s/τ = 8, where little but imitation is left, 0.018 for 4, and 0.37 for 1.
As an ablation, it is also trained with τ = 2 and 8.

Writes `figure.png`, `tau.png`, `curves.csv` and `report.md`, which compares our curves with the
published ones. The setting was chosen by `scans.py`, on other seeds. Repeat the command to continue
where it was stopped.

Options it does not know go to the training scripts, so the same command is the recipe for other
models and data:
    python benchmarks/figures/algorithms.py --steps 160 --prompts-per-step 96 --jobs 1 \
        --runs runs/algorithms-3b --output results-3b --model Qwen/Qwen2.5-3B-Instruct \
        --task gsm8k --data openai/gsm8k:main --temperature 1.0 --learning-rate 1e-6 \
        --max-response-tokens 1024 --gradient-checkpointing
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.helpers import reporting
from benchmarks.helpers.launcher import ROOT, Run, as_options, run_all
from benchmarks.helpers.reporting import arrow, column, table, yes
from common.plots import SMOOTHING
from common.tasks.addition import Addition

SYNC_INTERVAL = 20
SCRIPTS = {"GRPO": "grpo", "REC-OneSide-NoIS (0.2)": "rec_oneside_nois", "RED-Weight": "red_weight"}
RED = list(SCRIPTS)[2]
TAUS = {f"{RED}, τ = {tau:g}": tau for tau in (2, 8)}
RIGHT = 8  # the reward of a right answer
TASK = "benchmarks/figures/algorithms.py:AdditionForMore"
HUES = ("tab:green", "tab:purple", "tab:orange", "tab:brown", "tab:blue")
COLOURS = dict(zip([*SCRIPTS, *TAUS], HUES, strict=True))
PANELS = {
    "reward/mean": "Training Reward",
    "kl/ref_k2": "KL Divergence",
    "entropy": "Entropy",
    "response_length/mean": "Response Length",
}
PUBLISHED = ROOT / "benchmarks" / "published" / "algorithms_sync_interval_20.json"


@dataclass
class Args:
    steps: int = 200
    """training steps of each run"""
    learning_rate: float = 5e-5
    """of all runs; the scripts' default is for fresh batches, and too high for old ones"""
    temperature: float = 1.2
    """of all runs; above 1, responses are more varied"""
    prompts_per_step: int = 8
    """P; with groups of 8, 64 rollouts a step"""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """seeds of each algorithm"""
    jobs: int = 2
    """how many runs at a time, one thread each"""
    quick: bool = False
    """24 steps, one seed, 32 rollouts a step, into directories of their own"""
    runs: Path = reporting.RUNS / "algorithms"
    """where the training runs go, and are looked for when the command is repeated"""
    output: Path = reporting.RESULTS / "algorithms"
    """where figure, CSV and report go"""


def main(args, script_options):
    if args.quick:
        args.steps, args.seeds, args.prompts_per_step = 24, args.seeds[:1], 4
        reporting.use_quick_directories(args, Args.output)
    shared = {"sync_interval": SYNC_INTERVAL, "threads": 1, "serial": True, "task": TASK}
    same = ("prompts_per_step", "learning_rate", "temperature")
    shared |= {option: getattr(args, option) for option in same}
    curves = {label: (script, {}) for label, script in SCRIPTS.items()}
    curves |= {label: (SCRIPTS[RED], {"tau": tau}) for label, tau in TAUS.items()}

    def run(label, seed):
        script, own = curves[label]
        name = "-".join(map(str, [script, *own.values(), seed]))
        return Run(name, script, as_options({"seed": seed} | own | shared) + script_options)

    runs = [run(label, seed) for seed in args.seeds for label in curves]
    run_all(runs, args.steps, args.runs, args.jobs)

    def read(label):
        return [reporting.read_steps(args.runs / run(label, seed).name) for seed in args.seeds]

    everything = {label: read(label) for label in curves}
    groups = {label: everything[label] for label in SCRIPTS}
    published = marks(args.steps)
    reporting.plot_runs(args.output / "figure.png", groups, COLOURS, PANELS, published=published)
    ablation = {label: runs for label, runs in everything.items() if label.startswith(RED)}
    reporting.plot_runs(
        args.output / "tau.png", ablation, COLOURS, PANELS, logarithmic=["kl/ref_k2"]
    )
    reporting.write_curves(args.output / "curves.csv", everything, args.seeds, ["step", *PANELS])
    report = write_text(groups, everything, args, script_options)
    environment = reporting.environment_of(args.runs / runs[0].name)
    reporting.write_report(args.output / "report.md", report, environment)


class AdditionForMore(Addition):
    """The default task with another reward for a right answer."""

    def reward(self, problem, response):
        correct = super().reward(problem, response)
        return {"reward": RIGHT * correct, "accuracy": correct}


def marks(steps):
    """Start and end of the published curves, over so many steps, for `plot_runs`."""
    return {
        key: {
            label: list(zip((1, steps), values[script], strict=True))
            for label, script in SCRIPTS.items()
        }
        for key, values in json.loads(PUBLISHED.read_text())["curves"].items()
    }


def tenths(runs, key):
    """Means of each tenth of the runs, [seeds, 10]."""
    pieces = [np.array_split(column(records, key), 10) for records in runs]
    return np.array([[piece.mean() for piece in of_run] for of_run in pieces])


def direction(runs, key):
    """Where a curve goes: "rises", "falls", or "flat" if the mean change over seeds is smaller than
    the spread of the changes.
    """
    changes = np.diff(tenths(runs, key)[:, [0, -1]])
    if abs(changes.mean()) < changes.max() - changes.min():
        return "flat"
    return "rises" if changes.mean() > 0 else "falls"


def observations(groups):
    """What the published figure shows, and whether our runs do: a list of (statement, bool)."""
    grpo, rec, red = groups
    of_tenths = {
        key: {label: tenths(runs, key).mean(axis=0) for label, runs in groups.items()}
        for key in PANELS
    }
    mean = {
        key: {label: values.mean() for label, values in of_tenths[key].items()} for key in PANELS
    }

    def all_go(key, way):
        return all(direction(runs, key) == way for runs in groups.values())

    def ends(key, label, best):
        return best(groups, key=lambda label: of_tenths[key][label][-1]) == label

    def alike(key):
        ours, theirs, other = (mean[key][label] for label in (grpo, red, rec))
        return abs(ours - theirs) < min(abs(ours - other), abs(theirs - other))

    reward, kl, entropy, length = PANELS
    others = np.minimum(of_tenths[length][grpo], of_tenths[length][red])
    return [
        ("Training reward rises for all three", all_go(reward, "rises")),
        ("KL divergence rises for all three", all_go(kl, "rises")),
        ("Entropy falls for all three", all_go(entropy, "falls")),
        ("Response length falls for all three", all_go(length, "falls")),
        (f"{grpo} ends with the highest reward", ends(reward, grpo, max)),
        (f"{rec} ends with the lowest reward", ends(reward, rec, min)),
        (f"{grpo} ends with the highest KL", ends(kl, grpo, max)),
        (f"{red} ends with the lowest KL", ends(kl, red, min)),
        (f"{rec} ends with the lowest entropy", ends(entropy, rec, min)),
        (f"{rec} ends with the shortest responses", ends(length, rec, min)),
        (
            f"{rec} has the shortest responses in every tenth of the run",
            bool((of_tenths[length][rec] < others).all()),
        ),
        (
            f"{grpo} and {red} are alike in reward: their means over the run are the closest two",
            alike(reward),
        ),
        (f"{grpo} and {red} are alike in entropy, likewise", alike(entropy)),
    ]


def decimals(values):
    return ", ".join(f"{value:.3f}" for value in values)


def ends_of_curves(groups):
    """A table of the published curves' ends and ours."""
    published = json.loads(PUBLISHED.read_text())["curves"]
    rows = []
    for key, panel in PANELS.items():
        for label, runs in groups.items():
            start, end = published[key][SCRIPTS[label]]
            theirs, ours = "rises" if end > start else "falls", direction(runs, key)
            values = tenths(runs, key).mean(axis=0)
            rows.append([panel, label, arrow((start, end), "g"), arrow(values, ".3f")])
            rows[-1] += [theirs, ours, yes(theirs == ours)]
    return table(["curve", "algorithm", "published", "ours", "published", "ours", "agree"], rows)


def largest_behaviour_kl(runs):
    """The largest KL(sampler ‖ policy) of a batch, the mean over runs."""
    return np.mean([column(records, "kl/behaviour_k3").max() for records in runs])


def write_text(groups, everything, args, script_options):
    others = []
    for label, runs in everything.items():
        accuracies = [column(records, "eval/accuracy")[-1] for records in runs]
        others.append([label, decimals(accuracies), f"{np.mean(accuracies):.3f}"])
        others[-1] += [*reporting.clipped(runs), f"{largest_behaviour_kl(runs):.3f}"]
    rows, key = [], "kl/ref_k2"
    for label in (RED, *TAUS):
        largest = [column(records, key).max() for records in everything[label]]
        rows.append([label, decimals(tenths(everything[label], key)[:, -1]), decimals(largest)])
    answers, summary = reporting.compare(observations, groups, args.seeds)
    setting = "the bundled model"
    if script_options:
        setting = f"script options `{' '.join(script_options)}`"
    setting += f", temperature {args.temperature:g}, {RIGHT} for a right answer"
    header = ["curve", "accuracy per seed", "mean", "clipped", "clipped, weighted"]
    header += ["largest behaviour KL"]
    return f"""# Three algorithms at `sync_interval = {SYNC_INTERVAL}`

{summary}

![figure](figure.png)

`python benchmarks/figures/algorithms.py`: seeds {", ".join(map(str, args.seeds))},
{args.steps} steps of {args.prompts_per_step} × 8 rollouts, learning rate {args.learning_rate:g},
{setting}.
Lines are means over seeds and bands their range, after a moving average over
{SMOOTHING} steps; triangles are start and end of the published curves, on the right-hand
scale; its steps are scaled to ours. Model and task are not those of the published figure:
directions and orders can be compared, values cannot. [scan.md](scan.md) has all settings that were
tried.

## Start and end of the curves

Ours: means of the first and the last tenth of the run, over seeds. A curve is flat if the mean
change is smaller than the spread of the changes between seeds.

{ends_of_curves(groups)}

## Observations from the published figure, and whether they hold here

An answer is that for the means over seeds if at least four in five seeds agree. The last columns
show what one would have said had the runs been shorter.

{answers}

## Accuracy and clipping

Held-out accuracy (greedy) after training. Clipped: the share of response tokens whose gradient was
clipped in the steps just before a sync, where the lag is largest; "weighted" counts a token by
1 − p, to which its gradient is proportional. The last column is the largest KL(sampler ‖ policy) of
a batch, the mean over seeds.

{table(header, others)}

## An ablation: RED-Weight's τ

A wrong response has exp(−s/τ) times the weight of a right one in its group, where s is the reward
of a right one, here {RIGHT}: 0.0003 for τ = 1, 0.018 for 2 and 0.37 for 8. KL to the initial
policy, by seed:

![reward, KL, entropy and length for three values of τ](tau.png)

{table(["curve", "last tenth of the run", "largest of a step"], rows)}
"""


if __name__ == "__main__":
    main(*tyro.cli(Args, description=__doc__, return_unknown_args=True))
