"""Figures of several runs: one curve per group of runs, usually those of several seeds; and tables.

A group is a list of runs, a run the list of its records in `metrics.jsonl`. A figure shows the mean
over a group as a line and its range as a band.
"""

import csv
import math

import matplotlib
import numpy as np

matplotlib.use("Agg")  # to a file, also where there is no screen
import matplotlib.pyplot as plt

SMOOTHING = 9  # steps


def column(records, key):
    """One metric of all records that have it, as an array. What was not finite is NaN."""
    return np.array([record[key] for record in records if key in record], dtype=float)


def aligned(runs, *keys):
    """Metrics over the steps at which all runs have them, an array [keys, runs, steps]."""
    found = []
    for records in runs:
        complete = (record for record in records if all(key in record for key in keys))
        found.append({record["step"]: [record[key] for key in keys] for record in complete})
    shared = sorted(set.intersection(*map(set, found)))
    values = [[of_run[step] for step in shared] for of_run in found]
    return (
        np.array(values, dtype=float).reshape(len(runs), len(shared), len(keys)).transpose(2, 0, 1)
    )


def moving_average(values, width=SMOOTHING):
    """A centred average over `width` values, over fewer at the ends."""
    kernel = np.ones(min(width, len(values)))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def new_figure(labels, x_label, panel=(4.75, 3.6), **options):
    """A figure of panels, one per label of a y-axis, four and more of them in two rows; returns
    figure and axes. `panel` is the size of one, in inches.
    """
    rows = 1 if len(labels) < 4 else 2
    columns = math.ceil(len(labels) / rows)
    options |= {"figsize": (panel[0] * columns, panel[1] * rows), "squeeze": False}
    figure, axes = plt.subplots(rows, columns, layout="constrained", **options)
    used, empty = np.split(axes.flatten(), [len(labels)])
    for axis in empty:
        axis.set_axis_off()
    for axis, label in zip(used, labels, strict=True):
        axis.set(xlabel=x_label, ylabel=label)
        axis.locator_params(axis="x", integer=True)
        axis.grid(alpha=0.3)
    return figure, used


def plot_band(axis, runs, key, x, label, colour, smoothing=SMOOTHING, **line):
    """One curve, the mean of the runs over the steps that all of them have, and their range.

    It is smoothed if there are many values. `line` is what `axis.plot` knows of lines.
    """
    places, values = aligned(runs, x, key)
    if len(values[0]) > 2 * smoothing:
        values = [moving_average(one, smoothing) for one in values]
    places = places.mean(axis=0)
    axis.plot(places, np.mean(values, axis=0), color=colour, label=label, linewidth=1.6, **line)
    low, high = np.min(values, axis=0), np.max(values, axis=0)
    axis.fill_between(places, low, high, color=colour, alpha=0.18, linewidth=0)


def save_figure(figure, axis, *paths, columns=4, dpi=120):
    """With one legend below, of the labels in `axis`, in so many columns."""
    lines_and_labels = axis.get_legend_handles_labels()
    figure.legend(*lines_and_labels, loc="outside lower center", ncols=columns, frameon=False)
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=dpi)
    plt.close(figure)


def write_csv(path, header, rows):
    """Numbers with six digits or more; None is an empty cell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for row in rows:
            writer.writerow(f"{cell:.10g}" if isinstance(cell, float) else cell for cell in row)


def table(header, rows):
    """A Markdown table; cells are converted by `str`."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines)


SPREAD = "within the seeds' spread"


def difference(values, others):
    """How the mean of a list lies to that of another one: "above" or "below", or `SPREAD` if they
    differ by no more than both ranges added up.
    """
    gap = np.mean(values) - np.mean(others)
    if abs(gap) <= np.ptp(values) + np.ptp(others):
        return SPREAD
    return "above" if gap > 0 else "below"
