"""The figure of four sync modes over time: GRPO with Sync (1), (2), (10) and One-Step Off-Policy, three seeds each.

    python benchmarks/sync_modes.py             a quarter of an hour on two otherwise idle cores
    python benchmarks/sync_modes.py --quick     the same in miniature, to see that it works

Each run has one thread for the sampler and one for the trainer, which work at the same time as far as the schedule
lets them. Modes are compared by time, so the runs go one after another, on a machine that does nothing else.

Writes `benchmarks/results/sync_modes/`: `figure.png`; `timing.png`, who worked when; `curves.csv`, every logged value
of every step of every run; `environment.txt`; and `report.md`. Stopped half way, the same command continues with what
is missing (a run that was stopped and resumed has a gap in its time: begin it anew for figures to be published).

Options it does not know go to the training scripts, so that the same command is the recipe for other models and data.
What a mode would cost with other times: `benchmarks/schedule_replay.py`.
"""

import csv
import json
import statistics
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
from benchmarks.schedule_replay import MODES, replay
from common.runlog import read_metrics

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = dict(zip(MODES, ("tab:blue", "tab:green", "tab:red", "tab:purple"), strict=True))
LEGEND = {
    **{f"Sync ({i})": f"Sync. (sync_interval={i})" for i in (1, 2, 10)},
    "One-Step Off-Policy": "One-Step Off-Policy",
}
PANELS = {
    "reward/mean": "Reward",
    "response_length/mean": "Response Length",
    "grad_norm": "Gradient Norm",
    "kl/ref_k2": "KL Divergence",
}
TWO_THREADS = "Sync (1), both cores in turn"
LONG_TAIL_TOKENS = 384


@dataclass
class Args:
    steps: int = 120
    """training steps of each run"""
    learning_rate: float = 1e-4
    """one for all; the scripts' default is for fresh batches and high for batches up to 9 updates old"""
    prompts_per_step: int = 16
    """P; with groups of 8, 128 rollouts a step"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds of each mode"""
    long_tail_steps: int = 30
    """steps of each run of the long-tailed setting"""
    quick: bool = False
    """12 steps, one seed, 32 rollouts a step; by default into a directory of its own"""
    runs: Path = Path("runs/sync_modes")
    """where the training runs go, and are looked for when the command is repeated"""
    output: Path = Path("benchmarks/results/sync_modes")
    """where figures, CSV and report go"""


@dataclass
class Measured:
    """The steps of one run. Time counts from when its first batch began to be drawn: starting up takes as long in
    every mode, and in hours of training nobody would see it."""

    records: list[dict]

    def __post_init__(self):
        self.start = self.records[0]["time/sample_started_at"]
        self.tokens = self.column("throughput/sampled_tokens_per_second") * self.column("time/sample")
        self.step_ends = self.column("time/step_started_at") + self.column("time/step") - self.start
        self.seconds = self.step_ends[-1]

    def column(self, key):
        return np.array([record[key] for record in self.records], dtype=float)

    def final(self, key):
        """Mean over the last tenth of the run."""
        return self.column(key)[-max(1, len(self.records) // 10) :].mean()

    def times(self):
        """Seconds of sampling, training (grading included) and syncing per step, for `schedule_replay.replay`.

        What the trainer does between the end of one step and the next, a few milliseconds of logging, is in none.
        """
        train = self.column("time/grade") + self.column("time/train")
        return self.column("time/sample"), train, self.column("time/sync")


def slug(mode):
    return "sync-{}-{}".format(*MODES[mode])


def main(args, script_options):
    if args.quick:
        args.steps, args.seeds, args.prompts_per_step, args.long_tail_steps = 12, args.seeds[:1], 4, 4
        args.runs, args.output = (
            args.runs.with_name("sync_modes-quick"),
            args.runs.with_name("sync_modes-quick-results"),
        )
    directory, output = ROOT / args.runs, ROOT / args.output

    def run(name, mode, seed, steps, *options):
        """One run. It evaluates and saves at its ends only, and little: meanwhile, the sampler would get ahead."""
        interval, offset = MODES[mode]
        fixed = {
            "seed": seed, "sync-interval": interval, "sync-offset": offset, "prompts-per-step": args.prompts_per_step,
            "learning-rate": args.learning_rate, "eval-interval": steps, "checkpoint-interval": steps, "eval-size": 8,
        }  # fmt: skip
        return Run(name, "grpo", [f"--{key}={value}" for key, value in fixed.items()] + [*options, *script_options])

    # Seed by seed, so that a machine that slows down slows all modes.
    runs = [run(f"{slug(mode)}-{seed}", mode, seed, args.steps, "--threads=1") for seed in args.seeds for mode in MODES]
    runs.append(run("both-cores", "Sync (1)", args.seeds[0], args.steps, "--threads=2"))
    # The untrained policy rambles: with room for it, a few answers are several times longer than the median. A learning
    # rate of 1e-9 keeps it so, and every step the same work.
    long_tail = ("--threads=1", "--learning-rate=1e-9", f"--max-response-tokens={LONG_TAIL_TOKENS}")
    tail_runs = [run(f"tail-{slug(mode)}", mode, args.seeds[0], args.long_tail_steps, *long_tail) for mode in MODES]
    run_all(runs, args.steps, directory, jobs=1)
    run_all(tail_runs, args.long_tail_steps, directory, jobs=1)

    def measured(name):
        return Measured([record for record in read_metrics(directory / name) if record["step"] > 0])

    modes = {mode: [measured(f"{slug(mode)}-{seed}") for seed in args.seeds] for mode in MODES}
    tail = {mode: measured(f"tail-{slug(mode)}") for mode in MODES}
    environment = environment_of(directory / runs[0].name)
    output.mkdir(parents=True, exist_ok=True)
    (output / "environment.txt").write_text(environment + "\n")
    write_csv(modes, args.seeds, output / "curves.csv")
    draw(modes, output / "figure.png")
    draw_timing({mode: measured_runs[0] for mode, measured_runs in modes.items()}, output / "timing.png")
    published = json.loads((ROOT / "benchmarks" / "published" / "sync_modes_over_hours.json").read_text())["final"]
    report = write_report(modes, measured("both-cores"), tail, published, args, script_options, environment)
    (output / "report.md").write_text(report)
    print(report)


def write_csv(modes, seeds, path):
    """One row per run and step, timings included."""
    keys = [key for key in modes["Sync (1)"][0].records[0] if not key.startswith("memory/")]
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["mode", "seed", "seconds", *keys])
        for mode, measured in modes.items():
            for seed, run in zip(seeds, measured, strict=True):
                for record, seconds in zip(run.records, run.step_ends, strict=True):
                    values = [record.get(key) for key in keys]
                    cells = ["" if value is None else f"{value:.10g}" for value in values]
                    writer.writerow([mode, seed, f"{seconds:.3f}", *cells])


def draw(modes, path):
    """Four panels over time: mean over seeds as a line, their range as a band; one legend on top."""
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.8), layout="constrained")
    for axis, (key, label) in zip(axes, PANELS.items(), strict=True):
        for mode, measured in modes.items():
            smooth = np.stack([moving_average(run.column(key)) for run in measured])
            minutes = np.mean([run.step_ends for run in measured], axis=0) / 60  # of the k-th step, over seeds
            axis.plot(minutes, smooth.mean(axis=0), color=COLOURS[mode], label=LEGEND[mode], linewidth=1.8)
            axis.fill_between(
                minutes, smooth.min(axis=0), smooth.max(axis=0), color=COLOURS[mode], alpha=0.15, linewidth=0
            )
        axis.set_xlabel("Time (minutes)", fontsize=12)
        axis.set_ylabel(label, fontsize=12)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=12, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_timing(runs, path, first_step=21, num_steps=12):
    """Who worked when, one panel per mode, from the timestamps that a run logged.

    A batch has the colour of the weights that drew it, in the sampler's lane and in the trainer's; what is blank is
    waiting. Under the trainer's lane is the lag, the number of updates the policy was behind when its batch was used.
    """
    figure, axes = plt.subplots(len(runs), 1, figsize=(14, 9), layout="constrained", sharex=True)
    palette = plt.get_cmap("tab10").colors
    for axis, (mode, run) in zip(axes, runs.items(), strict=True):
        first_step = min(first_step, max(1, len(run.records) - num_steps))
        interval, _ = MODES[mode]
        begin = run.records[first_step - 1]["time/step_started_at"]
        for record in run.records[max(0, first_step - 4) : first_step + 2 * num_steps]:
            colour = palette[(record["weights_version"] // interval) % len(palette)]
            drawn = record["time/sample_started_at"] - begin
            used = record["time/step_started_at"] + record["time/wait"] - begin
            work = record["time/grade"] + record["time/train"]
            for lane, start, width in ((1, drawn, record["time/sample"]), (0, used, work)):
                axis.broken_barh([(start, width)], (lane + 0.08, 0.84), facecolor=colour, edgecolor="white", alpha=0.75)
                axis.text(
                    start + width / 2,
                    lane + 0.5,
                    f"{record['step']}",
                    ha="center",
                    va="center",
                    fontsize=9,
                    clip_on=True,
                )
            axis.text(used + work / 2, -0.12, f"{record['lag']}", ha="center", va="top", fontsize=9, clip_on=True)
            if record["step"] % interval == 0:
                axis.axvline(used + work + record["time/sync"], color="black", linewidth=1, linestyle=":")
        axis.set_yticks([1.5, 0.5, -0.3], ["sampler draws", "trainer updates", "lag"])
        axis.set_ylim(-0.55, 2.1)
        axis.set_title(f"{LEGEND[mode]}", loc="left", fontsize=11)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(left=False)
    ends = [
        run.records[min(len(run.records), first_step + num_steps) - 1]["time/step_started_at"]
        - run.records[first_step - 1]["time/step_started_at"]
        for run in runs.values()
    ]
    axes[-1].set_xlim(0, max(1.0, min(ends)))
    axes[-1].set_xlabel(
        "seconds; numbers are batches, colours the version of the weights that drew them, dotted lines syncs"
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def observations(modes):
    """What can be read off the published figure, and whether our data show it: a list of (statement, bool)."""

    def over_seeds(value):
        return {mode: np.mean([value(run) for run in runs]) for mode, runs in modes.items()}

    def swing(key):
        return over_seeds(lambda run: np.abs(np.diff(moving_average(run.column(key), 15))).max())

    def seconds_to(target):
        """When the smoothed reward first reaches a value; infinity where a run never does."""
        return over_seeds(
            lambda run: min(run.step_ends[moving_average(run.column("reward/mean")) >= target], default=np.inf)
        )

    def order(values):
        return sorted(values, key=values.get, reverse=True)

    one, two, ten, offset = MODES
    start = {
        key: over_seeds(lambda run, key=key: run.column(key)[: max(1, len(run.records) // 10)].mean()) for key in PANELS
    }
    end = {key: over_seeds(lambda run, key=key: run.final(key)) for key in PANELS}
    rises = {key: [end[key][mode] > start[key][mode] for mode in modes] for key in PANELS}
    reward, length, norm, kl = (end[key] for key in PANELS)
    duration = order(over_seeds(lambda run: run.seconds))
    halfway = (min(reward.values()) + min(start["reward/mean"].values())) / 2
    return [
        (f"{one} takes the longest", duration[0] == one),
        (f"{two} takes the second longest", duration[1] == two),
        (f"{ten} takes the shortest time, {offset} a little more", duration[2:] == [offset, ten]),
        ("Reward rises in all modes", all(rises["reward/mean"])),
        ("Final rewards are alike (within 0.03)", max(reward.values()) - min(reward.values()) <= 0.03),
        (f"The others reach a reward of {halfway:.2f} in less time than {one}", order(seconds_to(halfway))[0] == one),
        ("Response length rises in all modes", all(rises["response_length/mean"])),
        (f"Final response length: {one} > {two} > {offset} > {ten}", order(length) == [one, two, offset, ten]),
        ("The gradient norm falls in all modes", not any(rises["grad_norm"])),
        (f"Final gradient norm: {offset} > {ten} > {two} > {one}", order(norm) == [offset, ten, two, one]),
        ("KL divergence rises in all modes", all(rises["kl/ref_k2"])),
        (f"Final KL: {one} > {two} > {offset} > {ten}", order(kl) == [one, two, offset, ten]),
        (f"{one} swings most in KL (largest step of the smoothed curve)", order(swing("kl/ref_k2"))[0] == one),
        (f"{one} swings most in response length (likewise)", order(swing("response_length/mean"))[0] == one),
    ]


def write_report(modes, both_cores, tail, published, args, script_options, environment):
    """The comparison as Markdown, every number and every yes or no computed from the runs."""
    seconds = {mode: statistics.mean(run.seconds for run in runs) for mode, runs in modes.items()}
    tokens = {mode: statistics.mean(run.tokens.sum() for run in runs) for mode, runs in modes.items()}
    base = modes["Sync (1)"]
    lines = [
        "# Four sync modes over time",
        "",
        "![figure](figure.png)",
        "",
        f"`python benchmarks/sync_modes.py` with {len(args.seeds)} seeds, {args.steps} steps and "
        f"{args.prompts_per_step} × 8 rollouts a step, learning rate {args.learning_rate:g}"
        + (f", script options `{' '.join(script_options)}`" if script_options else ", the embedded model and task")
        + "; one thread for the sampler, one for the trainer. Lines are means over seeds, bands their range, after a "
        "moving average over 9 steps. Time counts from the start of the first batch.",
        "",
        "## The summary table",
        "",
        "Final values are means over the last tenth of the run, then over seeds.",
        "",
        "| mode | total time, published | ours | reward, published | ours | length, published | ours | gradient norm, "
        "published | ours | KL, published | ours |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for mode, runs in modes.items():
        cells = [f"{published[mode]['hours']} h", f"{seconds[mode] / 60:.2f} min"]
        for key, digits in zip(PANELS, (2, 1, 3, 3), strict=True):
            cells += [f"{published[mode][key]:g}", f"{np.mean([run.final(key) for run in runs]):.{digits}f}"]
        lines.append(f"| {mode} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "## Speed-up over Sync (1)",
        "",
        "| mode | published | ours (per seed) | the schedule allows | per sampled token, published | ours |",
        "|---|---|---|---|---|---|",
    ]
    for mode, runs in modes.items():
        ratios = [first.seconds / run.seconds for first, run in zip(base, runs, strict=True)]
        allowed = statistics.mean(run.seconds for run in base) / statistics.mean(
            replay(*run.times(), *MODES[mode]).seconds for run in base
        )
        theirs = published["Sync (1)"]["hours"] / published[mode]["hours"]
        theirs_per_token = (
            theirs * published[mode]["response_length/mean"] / published["Sync (1)"]["response_length/mean"]
        )
        ours_per_token = (tokens[mode] / seconds[mode]) / (tokens["Sync (1)"] / seconds["Sync (1)"])
        lines.append(
            f"| {mode} | {theirs:.2f} | {statistics.mean(ratios):.2f} ({', '.join(f'{r:.2f}' for r in ratios)}) | "
            f"{allowed:.2f} | {theirs_per_token:.2f} | {ours_per_token:.2f} |"
        )
    lines += [
        "",
        "The published hours (130 : 75 : 40 : 45) do not compare like with like: answers in Sync (1) are 2,200 tokens "
        "long at the end and in Sync (10) 950, so much of the difference is that fewer tokens were drawn and trained "
        "on. Per token (the published column takes the final lengths for the whole run) what is left is below the "
        'factor of 2 that overlapping two equal halves can give. "The schedule allows" replays each mode with the '
        "sampling, training and sync times of our Sync (1) runs, step by step (`schedule_replay.py`): there each half "
        "works alone, so it leaves out that two busy cores slow each other.",
        "",
        "## Where the time goes",
        "",
        "Seconds per step, means over all runs of the mode. Sampling and training go on at the same time as far as the "
        "schedule allows; `wait` is what the trainer spent waiting for a batch.",
        "",
        "| mode | sample | wait | grade and train | sync | step |",
        "|---|---|---|---|---|---|",
    ]
    for mode, runs in [*modes.items(), (TWO_THREADS, [both_cores])]:
        cells = [
            np.mean([np.mean(run.times()[0]) for run in runs]),
            np.mean([run.column("time/wait")[1:].mean() for run in runs]),
        ]
        cells += [np.mean([np.mean(run.times()[i]) for run in runs]) for i in (1, 2)]
        cells.append(np.mean([run.seconds / args.steps for run in runs]))
        lines.append(f"| {mode} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")
    lines += [
        "",
        f'With one thread each, Sync (1) leaves a core idle at any time. "{TWO_THREADS}" gives both to each phase: '
        f"{both_cores.seconds / 60:.2f} minutes for {args.steps} steps (seed {args.seeds[0]}), against "
        f"{base[0].seconds / 60:.2f} with one thread.",
        "",
        "## The schedule as a function",
        "",
        "Total seconds of each mode, replayed from the sampling, training and sync times of its own steps, and from "
        "those of Sync (1), against the measured total; means over seeds.",
        "",
        "| mode | measured | replayed from its own times | error | replayed from Sync (1)'s times | error |",
        "|---|---|---|---|---|---|",
    ]
    for mode, runs in modes.items():
        own = statistics.mean(replay(*run.times(), *MODES[mode]).seconds for run in runs)
        other = statistics.mean(replay(*run.times(), *MODES[mode]).seconds for run in base)
        lines.append(
            f"| {mode} | {seconds[mode]:.1f} | {own:.1f} | {own / seconds[mode] - 1:+.1%} | {other:.1f} | "
            f"{other / seconds[mode] - 1:+.1%} |"
        )
    lines += [
        "",
        "## What the published figure shows, and whether ours does",
        "",
        "| observation | ours |",
        "|---|---|",
    ]
    lines += [f"| {statement} | {'yes' if holds else 'no'} |" for statement, holds in observations(modes)]
    column = tail["Sync (1)"].column
    lengths, longest, cut = (column(f"response_length/{key}").mean() for key in ("mean", "max", "truncated"))
    lines += [
        "",
        "In the published runs answers grow. Our task rewards short ones: lengths fall, and what hangs on them in the "
        "published figure, from the hours to the order of the KL curves, cannot be expected here.",
        "",
        "## A long tail",
        "",
        f"The same with answers of up to {LONG_TAIL_TOKENS} tokens from the untrained policy (learning rate 1e-9), "
        f"{args.long_tail_steps} steps, one seed: mean length {lengths:.0f}, longest of a batch {longest:.0f}, "
        f"{cut:.0%} of the answers cut at the limit. The sampler waits for the longest answer of a batch, most of "
        "its rows empty.",
        "",
        "| mode | sample | train | seconds per step | speed-up | replayed from its own times |",
        "|---|---|---|---|---|---|",
    ]
    for mode, run in tail.items():
        sample, train, _ = run.times()
        own = replay(*run.times(), *MODES[mode]).seconds
        lines.append(
            f"| {mode} | {sample.mean():.3f} | {train.mean():.3f} | {run.seconds / len(run.records):.3f} | "
            f"{tail['Sync (1)'].seconds / run.seconds:.2f} | {own / run.seconds - 1:+.1%} |"
        )
    lines += ["", "## Who works when", "", "![timing](timing.png)", ""]
    lines += ["## Environment of the first run", "", "```", environment, "```"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(*tyro.cli(Args, description=__doc__, return_unknown_args=True))
