"""What the benchmarks share: metrics of runs, figures in one style (see common/plots.py), and the
files that they write.

`plot_runs` and `write_curves` take runs in groups, {label: [records of a run, …]}: one curve per
group, one run per seed. A figure shows the mean over seeds as a line and their range as a band; its
CSV file has every seed's values.
"""

import json
import math

import numpy as np

from benchmarks.helpers.launcher import ROOT
from common.curves import LABELS, read_metrics
from common.plots import SPREAD, column, new_figure, plot_band, plt, save_figure, table, write_csv

RUNS, RESULTS = ROOT / "runs", ROOT / "benchmarks" / "results"
KEYS = ("reward/mean", "kl/ref_k2", "entropy", "response_length/mean", "eval/accuracy")
PANELS = {key: LABELS[key] for key in KEYS}


def read_steps(run_dir):
    """The records of a run's steps, without that of the evaluation before training."""
    return [record for record in read_metrics(run_dir) if record["step"] > 0]


def steps_with_largest_lag(runs):
    """The records of these steps, of all runs; they are just before a sync."""
    largest = max(record["lag"] for record in runs[0])
    return [record for records in runs for record in records if record["lag"] == largest]


def clipped(runs):
    """Clipped tokens in the steps with the largest lag: plain, and weighted by 1 − p."""
    late = steps_with_largest_lag(runs)
    keys = ("ratio/clip_fraction", "ratio/clip_fraction_weighted")
    return [f"{column(late, key).mean():.2%}" for key in keys]


def final(records, key):
    """Mean over the last tenth of a run."""
    return column(records, key)[-max(1, len(records) // 10) :].mean()


def arrow(values, form):
    """From the first of some values to the last one, as text."""
    return f"{values[0]:{form}} → {values[-1]:{form}}"


def use_quick_directories(args, default_output):
    """For a run in miniature: no result of a full one is touched."""
    args.runs = args.runs.with_name(f"{args.runs.name}-quick")
    if args.output == default_output:
        args.output = args.runs.with_name(f"{args.runs.name}-results")


# Confidence intervals, at 95 %

Z = 1.959964  # so many standard deviations to either side hold 95 % of a normal distribution

# A bootstrap and a normal interval have no width where all values agree, say at 0 or 1, however few
# there are: of a share of 0.02, 16 values show nothing three times in four. So `mean_interval` adds
# imagined values at both ends of the possible range. For values of 0 and 1, two at each end give
# the interval of Agresti and Coull (1998), which contains Wilson's. For differences, one at each
# end gives a little more than Agresti and Min (2005) recommend.
OF_SHARES, OF_DIFFERENCES = (0, 0, 1, 1), (-1, 1)


def wilson(right, total):
    """Wilson's score interval for a probability, from so many successes in so many trials: (low,
    high).
    """
    share, centre = right / total, (right + Z**2 / 2) / (total + Z**2)
    half = Z / (1 + Z**2 / total) * math.sqrt(share * (1 - share) / total + Z**2 / (4 * total**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(values, imagined):
    """Interval for the mean that independent values, and the `imagined` ones, are a sample of:
    (low, high).
    """
    values = np.array([*values, *imagined], dtype=float)
    half = Z * values.std() / math.sqrt(len(values))
    return max(min(imagined), values.mean() - half), min(max(imagined), values.mean() + half)


# Figures


def mark_published(axis, points, colours):
    """Mark start and end of published curves, {label: [(x, y), (x, y)]}, by triangles, with a
    y-axis of their own. Sizes differ: two in one place can both be seen.
    """
    theirs = axis.twinx()
    for i, (label, places) in enumerate(points.items()):
        style = {"color": colours[label], "fillstyle": "none", "clip_on": False}
        style["markersize"] = 14 - 2.5 * i
        theirs.plot(*zip(*places, strict=True), "^", **style)
    theirs.set_ylabel("published (triangles)", color="gray")
    theirs.tick_params(colors="gray")
    theirs.margins(y=0.15)


def plot_runs(
    path,
    groups,
    colours,
    panels,
    x="step",
    x_label="training steps",
    published=None,
    logarithmic=(),
):
    """One panel per metric, {key: label of the y-axis}, with a curve for each group; `colours` by
    the group's label.

    `published`, for `mark_published`, is {key: {label: [(x, y), (x, y)]}}; `logarithmic` are keys.
    """
    figure, axes = new_figure(panels.values(), x_label)
    for axis, key in zip(axes, panels, strict=True):
        for label, runs in groups.items():
            plot_band(axis, runs, key, x, label, colours[label])
        if key in logarithmic:
            # The first step's KL is 0.
            axis.set(yscale="log", ylim=(max(axis.get_ylim()[0], 1e-4), None))
        if published:
            mark_published(axis, published[key], colours)
    save_figure(figure, axes[0], path)


def plot_strip(path, panels, key, label_of_axis, colours):
    """One metric over steps in two rows of small panels, {title: {label: [run, …]}}; `colours` by
    label.
    """
    shape = (2, -(-len(panels) // 2))
    options = {"sharex": True, "sharey": True, "squeeze": False, "layout": "constrained"}
    figure, axes = plt.subplots(*shape, figsize=(2.6 * shape[1], 5), **options)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, groups) in zip(axes.flat, panels.items(), strict=False):
        for label, runs in groups.items():
            plot_band(axis, runs, key, "step", label, colours[label])
        axis.set_title(title, fontsize="medium")
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("training steps")
    figure.supylabel(label_of_axis, fontsize="medium")
    save_figure(figure, axes[0, 0], path)


# Files


def write_curves(path, groups, seeds, keys):
    """What `plot_runs` plots, before smoothing: one row per run and step, with columns `keys`."""
    rows = [
        [label, seed, *(record.get(key) for key in keys)]
        for label, runs in groups.items()
        for seed, records in zip(seeds, runs, strict=True)
        for record in records
    ]
    write_csv(path, ["curve", "seed", *keys], rows)


def write_json(path, **results):
    """What other programs read, the numbers in the READMEs for instance."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


def yes(holds):
    return "yes" if holds else "no"


def compare(observations, runs, seeds):
    """Whether observations hold: for all runs, for those of each seed, and had the runs been
    shorter.

    `observations` takes groups of runs, {label: [run, …]}, with the runs in the order of `seeds`,
    and returns (statement, bool) pairs. The answer is that for the means over seeds if at least
    four in five seeds, each looked at alone, agree with it; else the runs do not tell, and it is
    `SPREAD`. Returns a table, and a summary of it.
    """
    columns = [observations(runs)]
    for i in range(len(seeds)):
        columns.append(observations({label: [group[i]] for label, group in runs.items()}))
    for share in (0.5, 0.75):
        shorter = {
            label: [r[: int(share * len(r))] for r in group] for label, group in runs.items()
        }
        columns.append(observations(shorter))
    statements = {yes(True): [], yes(False): [], SPREAD: []}
    rows = []
    for cells in zip(*columns, strict=True):
        statement, (holds, *others) = cells[0][0], [holds for _, holds in cells]
        agreeing = others[: len(seeds)].count(holds)
        answer = yes(holds) if 5 * agreeing >= 4 * len(seeds) else SPREAD
        statements[answer].append(statement)
        rows.append([statement, answer, *map(yes, others)])
    count = ["**number of yes**", f"**{len(statements['yes'])} of {len(rows)}**"]
    count += [f"**{sum(holds for _, holds in one)} of {len(one)}**" for one in columns[1:]]
    header = ["observation", "answer", *(f"seed {seed}" for seed in seeds)]
    header += ["after half of the steps", "three quarters"]
    listed = {answer: "; ".join(found) or "nothing" for answer, found in statements.items()}
    hold, fail, unclear = (len(found) for found in statements.values())
    summary = f"""Of {len(rows)} observations about the published figure, {hold} hold here, {fail}
do not, and {unclear} are within the seeds' spread: fewer than four in five seeds agree with the
mean.

- **Reproduced:** {listed["yes"]}.
- **Not reproduced:** {listed["no"]}.
- **Within the seeds' spread:** {listed[SPREAD]}."""
    return table(header, [*rows, count]), summary


def environment_of(run_dir):
    """What `environment.txt` of a run says of its first start: command, commit, versions, hardware,
    threads.

    With paths as seen from the repository, wherever that lies.
    """
    first, *_ = (run_dir / "environment.txt").read_text().split("\n\n")
    return first.strip().replace(f"{ROOT}/", "")


def write_report(path, text, environment):
    """Write and print a report, with a description of where its numbers come from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = f"{text.strip()}\n\n## Environment\n\n```\n{environment.strip()}\n```\n"
    path.write_text(text)
    print(text)
