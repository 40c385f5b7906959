"""The figure "sync_interval = 20": GRPO, REC-OneSide-NoIS (0.2) and RED-Weight, three seeds each.

    python benchmarks/algorithms.py             nine runs on the embedded task, two at a time, one thread each
    python benchmarks/algorithms.py --quick     the same in miniature, to see that it works

Writes `benchmarks/results/algorithms/`: `figure.png`, `curves.csv` (every logged value of every step of every run),
`environment.txt`, and `report.md`, which holds our curves against the published ones. Stopped half way, the same
command continues with what is missing.

Options it does not know go to the training scripts, so that the same command is the recipe for other models and data:
    python benchmarks/algorithms.py --steps 160 --prompts-per-step 96 --jobs 1 --runs runs/algorithms-3b \
        --output results-3b --model Qwen/Qwen2.5-3B-Instruct --task gsm8k --data openai/gsm8k:main \
        --learning-rate 1e-6 --max-response-tokens 1024 --gradient-checkpointing
"""

import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.launcher import Run, environment_of, run_all
from common.runlog import read_metrics

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SYNC_INTERVAL = 20
ALGORITHMS = {  # script: (label, colour)
    "grpo": ("GRPO", "tab:green"),
    "rec_oneside_nois": ("REC-OneSide-NoIS (0.2)", "tab:purple"),
    "red_weight": ("RED-Weight", "tab:orange"),
}
PANELS = {
    "reward/mean": "Training Reward",
    "kl/ref_k2": "KL Divergence",
    "entropy": "Entropy",
    "response_length/mean": "Response Length",
}
# Written after looking at the committed runs; printed where an observation does not hold.
_SAME_GRADIENT = (
    "hardly any token leaves the clipping range here, so GRPO and REC-OneSide-NoIS have nearly the same gradient (up "
    "to a group's standard deviation, which Adam mostly undoes), and their order is within the spread of the seeds"
)
_RED_APART = (
    "RED-Weight is the one loss without clipping; its KL overshoots after step 100 and its reward stalls until it has "
    "come back, while the other two coincide"
)
LIKELY_REASONS = {
    "GRPO ends with the highest reward": _SAME_GRADIENT,
    "REC-OneSide-NoIS ends with the lowest reward": _SAME_GRADIENT,
    "GRPO ends with the highest KL": _SAME_GRADIENT,
    "RED-Weight ends with the lowest KL": _RED_APART,
    "REC-OneSide-NoIS ends with the shortest responses": _SAME_GRADIENT,
    "REC-OneSide-NoIS has the shortest responses throughout (in every tenth of the run)": _SAME_GRADIENT,
    "GRPO and RED-Weight are alike in reward (closer to each other than to REC, mean over the run)": _RED_APART,
    "GRPO and RED-Weight are alike in entropy (likewise)": _RED_APART,
}


@dataclass
class Args:
    steps: int = 460
    """training steps of each run"""
    learning_rate: float = 5e-5
    """one for all; the scripts' default, made for fresh batches, is too high for batches up to 19 updates old"""
    prompts_per_step: int = 8
    """P; with groups of 8, 64 rollouts a step"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds of each algorithm"""
    jobs: int = 2
    """how many runs at a time, one thread each"""
    quick: bool = False
    """40 steps, one seed, 32 rollouts a step; by default into a directory of its own"""
    runs: Path = Path("runs/algorithms")
    """where the training runs go, and are looked for when the command is repeated"""
    output: Path = Path("benchmarks/results/algorithms")
    """where figure, CSV and report go"""


def main(args, script_options):
    if args.quick:
        args.steps, args.seeds, args.prompts_per_step = 40, args.seeds[:1], 4
        args.runs, args.output = (
            args.runs.with_name("algorithms-quick"),
            args.runs.with_name("algorithms-quick-results"),
        )
    runs = [
        Run(
            name=f"{script}-{seed}",
            script=script,
            options=[
                *("--seed", str(seed), "--sync-interval", str(SYNC_INTERVAL), "--threads", "1", "--serial"),
                *("--prompts-per-step", str(args.prompts_per_step), "--learning-rate", str(args.learning_rate)),
                *script_options,
            ],
        )
        for seed in args.seeds
        for script in ALGORITHMS
    ]
    directory, output = ROOT / args.runs, ROOT / args.output
    run_all(runs, args.steps, directory, args.jobs)

    records = {run.name: [r for r in read_metrics(directory / run.name) if r["step"] > 0] for run in runs}
    curves = {  # [seeds, steps] by metric and script
        key: {
            script: np.array([[r[key] for r in records[f"{script}-{seed}"]] for seed in args.seeds])
            for script in ALGORITHMS
        }
        for key in PANELS
    }
    accuracies = {
        script: [read_metrics(directory / f"{script}-{seed}")[-1]["eval/accuracy"] for seed in args.seeds]
        for script in ALGORITHMS
    }
    clipped = {
        script: np.mean([r["ratio/clip_fraction"] for seed in args.seeds for r in records[f"{script}-{seed}"]])
        for script in ALGORITHMS
    }
    output.mkdir(parents=True, exist_ok=True)
    environment = environment_of(directory / runs[0].name)
    (output / "environment.txt").write_text(environment + "\n")
    write_csv(records, output / "curves.csv")
    draw(curves, output / "figure.png")
    published = json.loads((ROOT / "benchmarks" / "published" / "algorithms_sync_interval_20.json").read_text())
    report = write_report(curves, accuracies, clipped, published, args, script_options, environment)
    (output / "report.md").write_text(report)
    print(report)


def write_csv(records, path):
    """One row per run and step; timings and memory are left to the runs' own logs."""
    keys = sorted({key for rows in records.values() for row in rows for key in row} - {"step"})
    keys = [key for key in keys if not key.startswith(("time/", "throughput/", "memory/"))]
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["script", "seed", "step", *keys])
        for name, rows in records.items():
            for row in rows:
                values = [row.get(key) for key in keys]
                cells = ["" if value is None else f"{value:.6g}" for value in values]
                writer.writerow([*name.rsplit("-", 1), row["step"], *cells])


def draw(curves, path):
    """Four panels side by side: mean over seeds as a line, their range as a band, one legend below."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(15, 3.9), layout="constrained")
    for axis, (key, label) in zip(axes, PANELS.items(), strict=True):
        for script, (name, colour) in ALGORITHMS.items():
            smooth = np.stack([moving_average(values) for values in curves[key][script]])
            steps = np.arange(1, smooth.shape[1] + 1)
            axis.plot(steps, smooth.mean(axis=0), color=colour, label=name, linewidth=1.8)
            axis.fill_between(steps, smooth.min(axis=0), smooth.max(axis=0), color=colour, alpha=0.18, linewidth=0)
        axis.set_title(f"sync_interval = {SYNC_INTERVAL}", fontsize=12)
        axis.set_xlabel("Training Steps", fontsize=12)
        axis.set_ylabel(label, fontsize=12)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=12, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def moving_average(values, width=9):
    """A centred average over `width` steps, of fewer at the ends: batches of 64 rollouts are noisy."""
    kernel = np.ones(min(width, len(values)))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def tenths(values):
    """The mean of each tenth of a run, averaged over seeds; `values` is [seeds, steps]."""
    return np.array([piece.mean() for piece in np.array_split(values, 10, axis=1)])


def direction(values):
    """ "rises", "falls" or "flat": last tenth less first tenth, seed mean, against the seeds' spread of that change."""
    width = max(1, values.shape[1] // 10)
    changes = values[:, -width:].mean(axis=1) - values[:, :width].mean(axis=1)
    if abs(changes.mean()) < changes.max() - changes.min():
        return "flat"
    return "rises" if changes.mean() > 0 else "falls"


def observations(curves):
    """What can be read off the published figure, and whether our data show it: a list of (statement, bool)."""
    last = {key: {script: tenths(values)[-1] for script, values in curves[key].items()} for key in PANELS}
    mean = {key: {script: values.mean() for script, values in curves[key].items()} for key in PANELS}

    def all_go(key, way):
        return all(direction(values) == way for values in curves[key].values())

    def alike(key, one, other, third):
        gap = abs(mean[key][one] - mean[key][other])
        return gap < abs(mean[key][one] - mean[key][third]) and gap < abs(mean[key][other] - mean[key][third])

    reward, length, entropy, kl = (last[k] for k in ("reward/mean", "response_length/mean", "entropy", "kl/ref_k2"))
    lengths = {script: tenths(values) for script, values in curves["response_length/mean"].items()}
    shortest = np.minimum(lengths["grpo"], lengths["red_weight"])
    return [
        ("Training reward rises for all three", all_go("reward/mean", "rises")),
        ("KL divergence rises for all three", all_go("kl/ref_k2", "rises")),
        ("Entropy falls for all three", all_go("entropy", "falls")),
        ("Response length falls for all three", all_go("response_length/mean", "falls")),
        ("GRPO ends with the highest reward", max(reward, key=reward.get) == "grpo"),
        ("REC-OneSide-NoIS ends with the lowest reward", min(reward, key=reward.get) == "rec_oneside_nois"),
        ("GRPO ends with the highest KL", max(kl, key=kl.get) == "grpo"),
        ("RED-Weight ends with the lowest KL", min(kl, key=kl.get) == "red_weight"),
        ("REC-OneSide-NoIS ends with the lowest entropy", min(entropy, key=entropy.get) == "rec_oneside_nois"),
        ("REC-OneSide-NoIS ends with the shortest responses", min(length, key=length.get) == "rec_oneside_nois"),
        (
            "REC-OneSide-NoIS has the shortest responses throughout (in every tenth of the run)",
            bool((lengths["rec_oneside_nois"] < shortest).all()),
        ),
        (
            "GRPO and RED-Weight are alike in reward (closer to each other than to REC, mean over the run)",
            alike("reward/mean", "grpo", "red_weight", "rec_oneside_nois"),
        ),
        (
            "GRPO and RED-Weight are alike in entropy (likewise)",
            alike("entropy", "grpo", "red_weight", "rec_oneside_nois"),
        ),
    ]


def write_report(curves, accuracies, clipped, published, args, script_options, environment):
    """The comparison as Markdown, every number and every yes or no computed from the runs."""
    lines = [
        "# Three algorithms at `sync_interval = 20`",
        "",
        "![figure](figure.png)",
        "",
        f"`python benchmarks/algorithms.py` with {len(args.seeds)} seeds, {args.steps} steps and "
        f"{args.prompts_per_step} × 8 rollouts a step, learning rate {args.learning_rate:g} for all"
        + (f", script options `{' '.join(script_options)}`" if script_options else ", the embedded model and task")
        + ". Lines are means over seeds, bands their range, both after a moving average over 9 steps. The task, the "
        "reward's scale and the model differ from the published figure's, so directions and orderings compare, values "
        "do not.",
        "",
        "## Start and end of the twelve curves",
        "",
        "Ours: means of the first and the last tenth of the run, over seeds. A curve is flat when its change is "
        "smaller than the spread of that change between seeds.",
        "",
        "| curve | algorithm | published | ours | published goes | ours goes | agree |",
        "|---|---|---|---|---|---|---|",
    ]
    for key, label in PANELS.items():
        for script, (name, _) in ALGORITHMS.items():
            start, end = published["curves"][key][script]
            values = tenths(curves[key][script])
            theirs, ours = "rises" if end > start else "falls", direction(curves[key][script])
            lines.append(
                f"| {label} | {name} | {start:g} → {end:g} | {values[0]:.3f} → {values[-1]:.3f} | {theirs} | {ours} | "
                f"{'yes' if theirs == ours else 'no'} |"
            )
    lines += [
        "",
        "## What the published figure shows, and whether ours does",
        "",
        "| observation | ours |",
        "|---|---|",
    ]
    lines += [f"| {statement} | {'yes' if holds else 'no'} |" for statement, holds in observations(curves)]
    if disagreements := [statement for statement, holds in observations(curves) if not holds]:
        shares = ", ".join(f"{name} {clipped[script]:.2%}" for script, (name, _) in ALGORITHMS.items())
        lines += ["", "Likely reasons for the disagreements, a reading rather than a measurement:", ""]
        lines += [
            f"- {statement}: {LIKELY_REASONS.get(statement, 'no explanation yet')}." for statement in disagreements
        ]
        lines += ["", f"Share of tokens whose gradient was clipped away, mean over all runs: {shares}."]
    lines += [
        "",
        "## Held-out accuracy after training (greedy)",
        "",
        "| algorithm | per seed | mean |",
        "|---|---|---|",
    ]
    for script, (name, _) in ALGORITHMS.items():
        values = accuracies[script]
        lines.append(f"| {name} | {', '.join(f'{value:.3f}' for value in values)} | {np.mean(values):.3f} |")
    lines += ["", "## Environment of the first run", "", "```", environment, "```"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(*tyro.cli(Args, description=__doc__, return_unknown_args=True))
