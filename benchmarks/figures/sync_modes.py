"""The figure of four sync modes over time: GRPO with Sync (1), (2), (10) and One-Step Off-Policy,
three seeds each.

    python benchmarks/figures/sync_modes.py             30 minutes on two otherwise idle cores
    python benchmarks/figures/sync_modes.py --quick     the same in miniature, to see that it works

The start model is built first, in less than a minute: the bundled model, trained on with examples
most of which state the answer at once, without any work (`common/build_tiny_model.py --hasty`).
Such an answer is as a rule wrong, since the model cannot add in its head, and now and then it works
a problem out, which as a rule is right. So the runs also answer a question: does reinforcement
teach it to work things out?

The modes are compared by time, so the runs go one after another, on a machine that does nothing
else. Each phase has one thread: Sync (1) samples and trains in turns in one process; the other
modes have a second process that samples, as far as the schedule lets it, while the first one
trains. With one thread, Sync (1) leaves a core idle: one more row has it with two threads for each
phase, as by default.

Writes `figure.png` and `curves.csv`; `timing.png` and `timing.csv`, who worked when;
`long_tail.png`, what a few long responses do to the modes; and `report.md`. The setting was chosen
by `scans.py`, on other seeds. Repeat the command to continue where it was stopped. (A run that was
itself stopped has a gap in its time: delete its directory first.)

Options it does not know go to the training scripts, so the same command is the recipe for other
models and data. What a mode would cost with other times: `benchmarks/speed/schedule_replay.py`.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.evaluate import greedy_answers
from benchmarks.helpers import reporting
from benchmarks.helpers.launcher import ROOT, Run, as_options, run_all, run_once
from benchmarks.helpers.reporting import column, final, plt, table
from benchmarks.speed.schedule_replay import MODES, replay, times_of_steps
from common.curves import read_lines
from common.models import TINY_MODEL
from common.plots import SMOOTHING, moving_average

ONE, TWO, TEN, OFFSET = MODES
COLOURS = dict(zip(MODES, ("tab:blue", "tab:green", "tab:red", "tab:purple"), strict=True))
PANELS = {
    "reward/mean": "Reward",
    "response_length/mean": "Response Length",
    "grad_norm": "Gradient Norm",
    "kl/ref_k2": "KL Divergence",
}
TWO_THREADS = f"{ONE}, two threads"
LONG_TAIL_TOKENS = 384
WARM_UP = 10  # steps that times leave out, whole intervals in every mode
PUBLISHED = ROOT / "benchmarks" / "published" / "sync_modes_over_hours.json"
TIMES = ["mode", "sample", "wait", "grade and train", "sync", "step"]
TIMES += [f"speed-up over {ONE}", "replayed from its own times", f"replayed from {ONE}'s times"]


@dataclass
class Args:
    steps: int = 80
    """training steps of each run"""
    learning_rate: float = 2e-5
    """of all runs; the scripts' default is for fresh batches, and high for old ones"""
    hasty: float = 0.55
    """share of answers at once in what the start model learns; 0 for the bundled model itself"""
    prompts_per_step: int = 16
    """P; with groups of 8, 128 rollouts a step"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds of each mode"""
    long_tail_steps: int = 30
    """steps of each run with long responses; of all runs, times leave out the first 10"""
    quick: bool = False
    """14 steps, one seed, 32 rollouts a step, into directories of their own"""
    runs: Path = reporting.RUNS / "sync_modes"
    """where the training runs go, and are looked for when the command is repeated"""
    output: Path = reporting.RESULTS / "sync_modes"
    """where figures, CSV files and report go"""


def main(args, script_options):
    if args.quick:
        args.steps, args.long_tail_steps = 14, 12
        args.seeds, args.prompts_per_step = args.seeds[:1], 4
        reporting.use_quick_directories(args, Args.output)

    def run(name, mode, seed, steps, **more):
        """One run. It evaluates and saves at its ends only, and little: meanwhile, the sampler
        would get ahead.
        """
        interval, offset = MODES[mode]
        options = {
            "seed": seed, "sync_interval": interval, "sync_offset": offset,
            "prompts_per_step": args.prompts_per_step, "learning_rate": args.learning_rate,
            "eval_interval": steps, "checkpoint_interval": steps, "eval_size": 8, "threads": 1,
        }  # fmt: skip
        return Run(name, "grpo", as_options(options | more) + script_options)

    def name(mode, seed):
        return "sync-{}-{}-{}".format(*MODES[mode], seed)

    # Seed by seed, so that a machine that slows down slows all modes.
    model = hasty_model(args.hasty, args.runs) if args.hasty else TINY_MODEL
    runs = []
    for seed in args.seeds:
        runs += [run(name(mode, seed), mode, seed, args.steps, model=model) for mode in MODES]
        runs.append(run(f"two-{seed}", ONE, seed, args.steps, model=model, threads=2))
    # The bundled model rambles: with room for it, a few responses are several times longer than the
    # median. A learning rate of 1e-9 keeps it so, and every step the same work.
    long = {"learning_rate": 1e-9, "max_response_tokens": LONG_TAIL_TOKENS}
    tail_runs = [
        run(f"tail-{name(mode, seed)}", mode, seed, args.long_tail_steps, **long)
        for seed in args.seeds
        for mode in MODES
    ]
    run_all(runs, args.steps, args.runs, jobs=1)
    run_all(tail_runs, args.long_tail_steps, args.runs, jobs=1)

    groups = {
        mode: [read_run(args.runs / name(mode, seed)) for seed in args.seeds] for mode in MODES
    }
    two_threads = [read_run(args.runs / f"two-{seed}") for seed in args.seeds]
    groups_and_more = {**groups, TWO_THREADS: two_threads}
    tail_directories = {
        mode: [args.runs / f"tail-{name(mode, seed)}" for seed in args.seeds] for mode in MODES
    }
    tail = {mode: [read_run(path) for path in paths] for mode, paths in tail_directories.items()}
    plot_options = {"x": "minutes", "x_label": "Time (minutes)", "published": marks(groups)}
    reporting.plot_runs(args.output / "figure.png", groups, COLOURS, PANELS, **plot_options)
    columns = ["step", "minutes", *PANELS]
    reporting.write_curves(args.output / "curves.csv", groups, args.seeds, columns)
    plot_timing({mode: runs[0] for mode, runs in groups.items()}, args.output)
    plot_long_tail(tail, recorded_lengths(tail_directories), args.output / "long_tail.png")
    trained = args.runs / name(ONE, args.seeds[0]) / "model"
    problems, (before, after) = greedy_answers([model, trained], "addition", 5, 64)
    examples = []
    for problem, *answers in zip(problems, before, after, strict=True):
        cells = [f"{text.strip()} ({reward:.0f})" for text, reward in answers]
        examples.append([problem["prompt"].splitlines()[0], *cells])
    report = write_text(groups, groups_and_more, tail, examples, args, script_options)
    environment = reporting.environment_of(args.runs / runs[0].name)
    reporting.write_report(args.output / "report.md", report, environment)


def hasty_model(share, runs):
    """A start model that answers at once in that share of cases; built in less than a minute,
    unless it is there.
    """
    directory = runs.resolve() / f"hasty-{share:g}-model"
    if not (directory / "tokenizer_config.json").exists():  # written last
        others = {"hum": 0, "doubt": 0, "recheck": 0, "steps": 150, "learning_rate": 3e-4}
        options = {"output": directory, "start": ROOT / "common" / "tiny_model", "hasty": share}
        run_once(["common/build_tiny_model.py", *as_options(options | others)])
    return directory


def marks(groups):
    """Start and end of the published curves, for `mark_published`; hours are scaled so that Sync
    (1) ends with ours.
    """
    published = json.loads(PUBLISHED.read_text())
    longest = np.mean([records[-1]["minutes"] for records in groups[ONE]])
    return {
        key: {
            mode: [
                (0.0, published["start"][mode][key]),
                (longest * end["hours"] / published["final"][ONE]["hours"], end[key]),
            ]
            for mode, end in published["final"].items()
        }
        for key in PANELS
    }


def read_run(run_dir):
    """A run's steps, with the time of each one's end since the start of step 1 as "minutes"."""
    records = reporting.read_steps(run_dir)
    start = records[0]["time/step_started_at"]
    for record in records:
        record["minutes"] = (record["time/step_started_at"] + record["time/step"] - start) / 60
    return records


def seconds(records):
    """Measured seconds per step.

    The first steps do not count: caches are cold, and the schedule needs an interval to reach its
    rhythm.
    """
    first = min(WARM_UP, len(records) // 2)
    return 60 * (records[-1]["minutes"] - records[first - 1]["minutes"]) / (len(records) - first)


def replayed(records, mode):
    """Seconds per step of a mode by `schedule_replay`, from the times of these steps."""
    sample, train, sync = times_of_steps(records[WARM_UP:])
    _, offset = MODES[mode]
    lead = sample[0] if offset else 0.0  # after the warm-up, the first batch is there already
    return (replay(sample, train, sync, *MODES[mode]).seconds - lead) / len(sample)


def ratios(runs, base):
    """Speed-up of each run over the one of the same seed in `base`."""
    return [seconds(first) / seconds(records) for records, first in zip(runs, base, strict=True)]


def speed_up(runs, base):
    """The mean of `ratios`, and all of them, as text."""
    per_seed = ratios(runs, base)
    return f"{np.mean(per_seed):.2f} ({', '.join(f'{ratio:.2f}' for ratio in per_seed)})"


def plot_timing(runs, output, first_step=21, num_steps=12):
    """Who worked when, one panel per mode, from the timestamps that a run logged.

    A batch has the colour of the weights that sampled it, in the sampler's lane and in the
    trainer's; what is blank is waiting. Under the trainer's lane is the lag, the number of updates
    the policy was behind when its batch was used.
    """
    figure, axes = plt.subplots(len(runs), 1, figsize=(14, 9), layout="constrained", sharex=True)
    palette, rows, ends = plt.get_cmap("tab10").colors, [], []
    for axis, (mode, records) in zip(axes, runs.items(), strict=True):
        first = min(first_step, max(1, len(records) - num_steps))
        begin = records[first - 1]["time/step_started_at"]
        last = min(len(records), first + num_steps)
        ends.append(records[last - 1]["time/step_started_at"] - begin)
        for record in records[max(0, first - 4) : first + 2 * num_steps]:
            sampling = record["time/sample_started_at"] - begin
            training = record["time/step_started_at"] + record["time/wait"] - begin
            work = record["time/grade"] + record["time/train"]
            rows.append([mode, record["step"], record["weights_version"], record["lag"]])
            rows[-1] += [sampling, record["time/sample"], training, work, record["time/sync"]]
            colour = palette[(record["weights_version"] // MODES[mode][0]) % len(palette)]
            bar = {"facecolor": colour, "edgecolor": "white", "alpha": 0.75}
            centred = {"ha": "center", "fontsize": 9, "clip_on": True}
            for lane, start, width in ((1, sampling, record["time/sample"]), (0, training, work)):
                axis.broken_barh([(start, width)], (lane + 0.08, 0.84), **bar)
                axis.text(start + width / 2, lane + 0.5, record["step"], va="center", **centred)
            axis.text(training + work / 2, -0.12, record["lag"], va="top", **centred)
            if record["step"] % MODES[mode][0] == 0:
                synced = training + work + record["time/sync"]
                axis.axvline(synced, color="black", linewidth=1, linestyle=":")
        axis.set_yticks([1.5, 0.5, -0.3], ["sampling", "training", "lag"])
        axis.set_ylim(-0.55, 2.1)
        axis.set_title(mode, loc="left", fontsize=11)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(left=False)
    axes[-1].set_xlim(0, max(1.0, min(ends)))
    axes[-1].set_xlabel(
        "seconds; numbers are batches, colours the weights that sampled them, dotted lines syncs"
    )
    figure.savefig(output / "timing.png", dpi=120)
    plt.close(figure)
    header = ["mode", "batch", "weights_version", "lag", "sampling_starts", "sampling_takes"]
    header += ["training_starts", "training_takes", "sync_takes"]
    reporting.write_csv(output / "timing.csv", header, rows)


def recorded_lengths(directories):
    """Lengths of all responses in `completions.jsonl` of runs, {mode: [directory, …]}."""
    paths = [path / "completions.jsonl" for of_mode in directories.values() for path in of_mode]
    return [record["tokens"] for path in paths for record in read_lines(path)]


def plot_long_tail(tail, lengths, path):
    """How long responses are, and what that makes of a step: time by what the trainer does, beside
    what the schedule would take.
    """
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(13, 4), layout="constrained", width_ratios=(1, 1.6)
    )
    left.hist(lengths, bins=24, range=(0, LONG_TAIL_TOKENS), color="tab:gray")
    left.axvline(np.mean(lengths), color="black", linewidth=1, linestyle=":")
    left.set(xlabel="response length (tokens; dotted: mean)", ylabel="responses")
    places, starts = np.arange(len(tail))[::-1], np.zeros(len(tail))
    parts = {"grade and train": "tab:blue", "wait for a batch": "tab:orange", "sync": "tab:red"}
    widths = np.array([parts_of_step(runs) for runs in tail.values()]).T
    for (part, colour), width in zip(parts.items(), widths, strict=True):
        right.barh(places, width, 0.6, starts, color=colour, alpha=0.75, label=part)
        starts += width
    bounds = {
        "the schedule, with the times of these runs": ("|", lambda mode: tail[mode]),
        f"the schedule, with the times of {ONE}": ("x", lambda mode: tail[ONE]),
    }
    for label, (marker, runs_of) in bounds.items():
        seconds_by_mode = [
            np.mean([replayed(records, mode) for records in runs_of(mode)]) for mode in tail
        ]
        style = {"color": "black", "linestyle": "", "markersize": 12, "markeredgewidth": 2}
        right.plot(seconds_by_mode, places, marker, label=label, **style)
    right.set_yticks(places, list(tail))
    right.set_xlabel("seconds of a step")
    right.set_xlim(right=1.05 * starts.max())
    figure.legend(fontsize="small", frameon=False, loc="outside lower center", ncols=5)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parts_of_step(runs):
    """Mean seconds a step that the trainer spends on grading and training, waiting, and syncing."""
    late = [record for records in runs for record in records[WARM_UP:]]
    grade, train, wait, sync = (
        column(late, f"time/{part}").mean() for part in ("grade", "train", "wait", "sync")
    )
    return grade + train, wait, sync


def observations(groups):
    """What the published figure shows, and whether our runs do: a list of (statement, bool)."""
    return about_time(groups) + about_curves(groups)


def over_seeds(groups, value, *arguments):
    """By mode: the mean over its runs of `value(records, *arguments)`."""
    return {
        mode: np.mean([value(records, *arguments) for records in runs])
        for mode, runs in groups.items()
    }


def order(values):
    return sorted(values, key=values.get, reverse=True)


def first(records, key):
    """Mean over the first tenth of a run."""
    return column(records, key)[: max(1, len(records) // 10)].mean()


def about_time(groups):
    """The observations that need runs with the machine to themselves."""
    lowest = [min(over_seeds(groups, part, "reward/mean").values()) for part in (first, final)]

    def time_to_halfway(records):
        """When the smoothed reward first reaches the middle; infinity where a run never does."""
        reached = moving_average(column(records, "reward/mean")) >= np.mean(lowest)
        return min(column(records, "minutes")[reached], default=np.inf)

    duration = order(over_seeds(groups, seconds))
    halfway = order(over_seeds(groups, time_to_halfway))
    return [
        (f"{ONE} takes the longest", duration[0] == ONE),
        (f"{TWO} takes the second longest", duration[1] == TWO),
        (f"{TEN} takes the shortest time, {OFFSET} a little more", duration[2:] == [OFFSET, TEN]),
        (f"The others are half way to the final reward in less time than {ONE}", halfway[0] == ONE),
    ]


def about_curves(groups):
    """The other observations."""

    def largest_change(records, key):
        return np.abs(np.diff(moving_average(column(records, key), 15))).max()

    def swings_most(key):
        return order(over_seeds(groups, largest_change, key))[0]

    start = {key: over_seeds(groups, first, key) for key in PANELS}
    end = {key: over_seeds(groups, final, key) for key in PANELS}
    rises = {key: [end[key][mode] > start[key][mode] for mode in groups] for key in PANELS}
    reward, length, norm, kl = PANELS
    rewards, final_order = end[reward].values(), {key: order(end[key]) for key in PANELS}
    return [
        ("Reward rises in all modes", all(rises[reward])),
        ("Final rewards are alike (within 0.03)", max(rewards) - min(rewards) <= 0.03),
        ("Response length rises in all modes", all(rises[length])),
        (
            f"Final response length: {ONE} > {TWO} > {OFFSET} > {TEN}",
            final_order[length] == [ONE, TWO, OFFSET, TEN],
        ),
        ("The gradient norm falls in all modes", not any(rises[norm])),
        (
            f"Final gradient norm: {OFFSET} > {TEN} > {TWO} > {ONE}",
            final_order[norm] == [OFFSET, TEN, TWO, ONE],
        ),
        ("KL divergence rises in all modes", all(rises[kl])),
        (f"Final KL: {ONE} > {TWO} > {OFFSET} > {TEN}", final_order[kl] == [ONE, TWO, OFFSET, TEN]),
        (
            f"{ONE} swings most in KL (largest step of the smoothed curve)",
            swings_most(kl) == ONE,
        ),
        (f"{ONE} swings most in response length (likewise)", swings_most(length) == ONE),
    ]


def cost_of_staleness(groups):
    """By mode: the reward at the same steps, and how far the policy has moved away from the
    sampler's, at its most.
    """
    rows = []
    for mode, runs in groups.items():
        late = reporting.steps_with_largest_lag(runs)
        rows.append([mode, late[0]["lag"]])
        rewards = [moving_average(column(records, "reward/mean"), 15) for records in runs]
        for share in (0.25, 0.5, 0.75, 1.0):
            rows[-1].append(f"{np.mean([r[int(share * len(r)) - 1] for r in rewards]):.3f}")
        behaviour = column(late, "kl/behaviour_k3").mean()
        rows[-1] += [*reporting.clipped(runs), f"{behaviour:.4f}"]
    header = ["mode", "largest lag", "reward after 1/4 of the steps", "1/2", "3/4", "all"]
    header += ["clipped at that lag", "weighted by 1 − p", "behaviour KL at that lag"]
    return table(header, rows)


def table_of_times(groups):
    """Seconds per step, measured and by the schedule."""
    rows = []
    for label, runs in groups.items():
        mode = label if label in MODES else ONE
        times = [times_of_steps(records[WARM_UP:]) for records in runs]
        sample, train, sync = np.mean(times, axis=(0, 2))
        wait = np.mean([column(records[WARM_UP:], "time/wait") for records in runs])
        measured = np.mean([seconds(records) for records in runs])
        own = np.mean([replayed(records, mode) for records in runs])
        cells = [f"{value:.3f}" for value in (sample, wait, train, sync, measured)]
        cells.append(f"{np.mean(ratios(runs, groups[ONE])):.2f}")
        cells.append(f"{own:.3f} ({own / measured - 1:+.1%})")
        if label in MODES:
            of_one = np.mean([replayed(records, mode) for records in groups[ONE]])
            cells.append(f"{of_one:.3f} ({of_one / measured - 1:+.1%})")
        rows.append([label, *cells] + [""] * (label not in MODES))
    return table(TIMES, rows)


def write_text(groups, groups_and_more, tail, examples, args, script_options):
    published = json.loads(PUBLISHED.read_text())["final"]
    observed, sentences = reporting.compare(observations, groups, args.seeds)
    seconds_of = over_seeds(groups, seconds)

    def tokens_per_second(mode):
        lengths = [column(records[WARM_UP:], "response_length/mean") for records in groups[mode]]
        return np.mean(lengths) / seconds_of[mode]

    summary, speed = [], []
    for mode, runs in groups.items():
        theirs = published[mode]
        minutes = np.mean([records[-1]["minutes"] for records in runs])
        summary.append([mode, f"{theirs['hours']} h", f"{minutes:.2f} min"])
        for key, digits in zip(PANELS, (2, 1, 3, 3), strict=True):
            ours = np.mean([final(records, key) for records in runs])
            summary[-1] += [f"{theirs[key]:g}", f"{ours:.{digits}f}"]
        faster = published[ONE]["hours"] / theirs["hours"]
        shorter = theirs["response_length/mean"] / published[ONE]["response_length/mean"]
        allowed = seconds_of[ONE] / np.mean([replayed(records, mode) for records in groups[ONE]])
        per_token = [faster * shorter, tokens_per_second(mode) / tokens_per_second(ONE)]
        speed.append([mode, f"{faster:.2f}", speed_up(runs, groups[ONE])])
        speed[-1] += [f"{value:.2f}" for value in (allowed, *per_token)]
    columns = ["total time", "reward", "length", "gradient norm", "KL"]
    header = ["mode", *(cell for name in columns for cell in (f"{name}, published", "ours"))]
    speed_header = ["mode", "published", "ours (per seed)", "the schedule allows"]
    speed_header += ["per token, published", "ours"]
    long = [record for records in tail[ONE] for record in records]
    mean, longest, cut = (
        column(long, f"response_length/{key}").mean() for key in ("mean", "max", "truncated")
    )
    setting = "the bundled model and task"
    if script_options:
        setting = f"script options `{' '.join(script_options)}`"
    lengths = [f"{published[mode]['response_length/mean']:,} ({mode})" for mode in MODES]
    return f"""# Four sync modes over time

{sentences}

![figure](figure.png)

`python benchmarks/figures/sync_modes.py`: seeds {", ".join(map(str, args.seeds))},
{args.steps} steps of {args.prompts_per_step} × 8 rollouts, learning rate {args.learning_rate:g},
{setting}, a start model trained with {args.hasty:.0%} of answers at once. Lines are means over
seeds and bands their range, after a moving average over {SMOOTHING} steps; triangles are
start and end of the published curves, on the right-hand scale, with hours scaled so that {ONE} ends
where ours does. Each phase has one thread: {ONE} samples and trains in turns in one process, the
other modes in two processes that work at the same time as far as the schedule lets them. Time
counts from the first step on. [scan.md](scan.md) has all settings that were tried.

## Does reinforcement teach it to work things out?

Greedy answers to the first five held-out problems, and their rewards, before training and after
that of {ONE}, seed {args.seeds[0]}:

{table(["problem", "before", "after"], examples)}

## Summary

Final values are means over the last tenth of the run, then over seeds.

{table(header, summary)}

## Speed-up over {ONE}

Ratios of the time per step after the first {WARM_UP} steps.

{table(speed_header, speed)}

"The schedule allows" replays each mode with the sampling, training and sync times of our {ONE}
runs, step by step (`schedule_replay.py`). In {ONE} each phase has the machine to itself, so this
leaves out that two busy cores slow each other. A mode that is faster than that had a faster machine
than {ONE} had.

The published modes did not do the same work: the mean response lengths at the end are
{", ".join(lengths)}. So the last two columns compare the rates of sampled tokens; the published one
takes the final lengths for the whole run.

## Where the time goes

Seconds per step, means over all runs of a mode and all steps but the first {WARM_UP}. `wait` is
what the trainer spent waiting for a batch; in {ONE} that is sampling it. The last two columns are
what a step takes by `schedule_replay.py`, and how far that is from the measured time.

{table_of_times(groups_and_more)}

With one thread, {ONE} leaves a core idle. "{TWO_THREADS}" gives two to each phase, as the scripts
do by default. {OFFSET}, with one thread each for both at once, has
{speed_up(groups[OFFSET], groups_and_more[TWO_THREADS])} times the speed of that.

## Observations from the published figure, and whether they hold here

An answer is that for the means over seeds if at least four in five seeds agree. The last columns
show what one would have said had the runs been shorter.

{observed}

## What staleness costs

At equal numbers of steps, smoothed over 15 steps; the rest in the steps with the largest lag.

{cost_of_staleness(groups)}

## Long responses

Where a few responses are much longer than the others, the sampler waits for them, and so may the
trainer. The same modes with responses of up to {LONG_TAIL_TOKENS} tokens from the bundled model,
which rambles (learning rate 1e-9, so that every step is the same work), {args.long_tail_steps}
steps, the same seeds: mean length {mean:.0f}, longest of a batch {longest:.0f}, {cut:.0%} of the
responses cut at the limit.

![Response lengths; and where the time of a step goes in four modes](long_tail.png)

On the left all responses that the runs recorded; on the right mean seconds of a step after the
first {WARM_UP}. "The schedule" is what `schedule_replay.py` makes of measured sampling and training
times if the two do not slow each other down: with the times of the mode's own runs, and with those
of {ONE}, where each phase has the machine to itself.

{table_of_times(tail)}

## Who works when

![timing](timing.png)
"""


if __name__ == "__main__":
    main(*tyro.cli(Args, description=__doc__, return_unknown_args=True))
