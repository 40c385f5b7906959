"""Several runs in one figure, a curve for each setting: the mean over its seeds, and their range.

Runs of one script whose options agree, but for the seed, have one curve. They may still be going
on: a curve has the steps that all of its runs have made.

    python -m common.compare runs/a-* runs/b-*
    python -m common.compare runs/a-* --metrics reward/mean entropy --x hours --output figures/a

Writes OUTPUT.png, OUTPUT.pdf, and OUTPUT.csv with what they show, of every run and before
smoothing. Prints a table of final values, and which differences are within the seeds' spread.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from common.commandline import CHANGEABLE
from common.curves import LABELS, read_metrics
from common.errors import BadInput
from common.options import RunOptions
from common.plots import (
    SMOOTHING,
    SPREAD,
    aligned,
    difference,
    new_figure,
    plot_band,
    plt,
    save_figure,
    table,
    write_csv,
)
from common.sources import first_difference, kept

# What must be the same: values of different problems, or of different models, say nothing
SAME = ("task", "model", "revision", "data", "eval_data", "eval_size", "max_prompt_tokens")
NO_SETTING = CHANGEABLE | {"seed", "name", "output"}
PLOTTED = ("reward/mean", "eval/accuracy", "kl/ref_k2", "entropy", "response_length/mean")
PLOTTED += ("grad_norm",)
FINAL_STEPS = 10  # a final value is the mean over so many steps; of evaluations, the last one
# Colours that the colour-blind can tell apart (Okabe and Ito); further curves are dashed
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLE = {"font.size": 8, "pdf.fonttype": 42}  # 42: fonts that journals accept


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """directories of runs; the first one's setting is what the others are compared with"""
    metrics: tuple[str, ...] = ()
    """names as in metrics.jsonl; empty for reward, accuracy, KL, entropy, length, gradient norm"""
    x: Literal["steps", "hours"] = "steps"
    """what curves are plotted over; hours are those of training, without evaluations"""
    smoothing: int = SMOOTHING
    """steps of the moving average; 1 for none"""
    output: Path | None = None
    """the files' path without .png; by default comparison, beside the first run"""


@dataclass
class Run:
    """One run, as far as it has come."""

    path: Path
    options: dict
    """what args.json holds, script included"""
    records: list[dict]
    """those of metrics.jsonl"""

    @property
    def setting(self):
        """The options that make its updates what they are, but for the seed, as text."""
        # A linear learning rate depends on the number of steps.
        other = {"num_steps"} if self.options.get("lr_schedule") == "linear" else set()
        names = self.options.keys() - (NO_SETTING - other)
        return {name: str(self.options[name]) for name in sorted(names)}


def read_run(path):
    """The `Run` in a directory. Raises `BadInput` where there is none."""
    try:
        options = json.loads((path / "args.json").read_text())
        options["script"], options["seed"]
        records = read_metrics(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path} holds no run ({error!r}): give directories of runs.") from error
    if not records or records[-1]["step"] == 0:
        raise BadInput(f"{path} has not made a step yet: leave it out, or wait.")
    return Run(path, options, records)


def check_comparable(runs):
    """Raise `BadInput` for runs that differ from the first in more than in how they learn."""
    first = runs[0]
    for name in SAME:
        wanted = first.options.get(name)
        others = [str(run.path) for run in runs if run.options.get(name) != wanted]
        if others:
            what = f"{', '.join(others)} cannot be compared with {first.path}"
            option = f"--{name.replace('_', '-')}"
            raise BadInput(f"{what}, which has another {option} ({wanted}): leave one kind out.")


def check_same_code(runs):
    """Raise `BadInput` where two runs have different files of one name, as script or task."""
    first = {}  # run and content, by name
    for run in runs:
        for name, content in kept(run.path).items():
            other, wanted = first.setdefault(name, (run, content))
            if content != wanted:
                line = first_difference(wanted, content)
                copies = f"{run.path}/{name} and {other.path}/{name} differ, first in line {line}"
                raise BadInput(
                    f"{copies}: leave one run out, give a changed script a name of its own, or, if "
                    "this changes no number, copy one over the other."
                )


def grouped(runs):
    """Runs by setting, {label: [run, …]}. Labels name script and the options that differ, but for
    values that are the default of `RunOptions`.

    Raises `BadInput` for two runs of one setting and seed.
    """
    settings = [run.setting for run in runs]
    names = sorted({name for setting in settings for name in setting} - {"script"})
    values = {name: {setting[name] for setting in settings if name in setting} for name in names}
    differ = [name for name in names if len(values[name]) > 1]
    usual = {name: str(value) for name, value in vars(RunOptions()).items()}
    groups = {}
    for run, setting in zip(runs, settings, strict=True):
        told = [name for name in differ if setting.get(name) not in (None, usual.get(name))]
        words = [_as_option(name, setting[name]) for name in told]
        group = groups.setdefault(" ".join([setting["script"], *words]), [])
        for other in group:
            if other.options["seed"] == run.options["seed"]:
                what = f"{other.path} and {run.path} have the same options and the same seed"
                raise BadInput(f"{what}: leave one out.")
        group.append(run)
    return groups


def _as_option(name, value):
    option = name.replace("_", "-")
    flags = {"True": f"--{option}", "False": f"--no-{option}"}
    return flags.get(value, f"--{option} {value.rpartition('/')[2]}")


def chosen_metrics(runs, wanted):
    """The metrics to plot, {name: label}. Raises `BadInput` for one that no run has."""
    known = {key for run in runs for record in run.records for key in record} - {"step"}
    for name in wanted:
        if name not in known:
            raise BadInput(
                f"--metrics {name} is in no run: give some of {', '.join(sorted(known))}."
            )
    if not wanted:
        accuracy = "eval/accuracy" if "eval/accuracy" in known else "eval/reward"
        usual = [accuracy if name == "eval/accuracy" else name for name in PLOTTED]
        wanted = [name for name in usual if name in known]
    return {name: LABELS.get(name, name) for name in wanted}


def counted(runs):
    """How many seeds a curve has, in words."""
    return "1 seed" if len(runs) == 1 else f"{len(runs)} seeds"


def plot(groups, panels, args, path):
    """Write the figure as .png and .pdf."""
    x, x_label = {
        "steps": ("step", "training steps"),
        "hours": ("time/elapsed_hours", "hours of training"),
    }[args.x]
    with plt.rc_context(STYLE):
        figure, axes = new_figure([""] * len(panels), x_label, panel=(2.7, 2.1))
        for axis, (key, title) in zip(axes, panels.items(), strict=True):
            axis.set_title(title, fontsize="medium")
            for number, (label, runs) in enumerate(groups.items()):
                turn, hue = divmod(number, len(COLOURS))
                line = {"linestyle": ("-", "--", ":", "-.")[turn % 4], "markersize": 3}
                line |= {"marker": "o"} if key.startswith("eval/") else {}
                records = [run.records for run in runs]
                named = f"{label} ({counted(runs)})"
                plot_band(axis, records, key, x, named, COLOURS[hue], args.smoothing, **line)
        longest = max(map(len, groups))
        columns = max(1, int(figure.get_figwidth() / (1.2 + 0.07 * longest)))
        figure.set_figheight(figure.get_figheight() + 0.17 * math.ceil(len(groups) / columns))
        ends = [path.with_name(f"{path.name}.{ending}") for ending in ("png", "pdf")]
        save_figure(figure, axes[0], *ends, columns=columns, dpi=200)


def write_values(groups, panels, path):
    """Write what the figure shows, before smoothing: one row per run and step."""
    keys = ["step", "time/elapsed_hours", *panels]
    rows = [
        [label, str(run.path), run.options["seed"], *(record.get(key) for key in keys)]
        for label, runs in groups.items()
        for run in runs
        for record in run.records
    ]
    write_csv(path.with_name(f"{path.name}.csv"), ["curve", "run", "seed", *keys], rows)


def final_values(groups, key):
    """The last values of a metric that all runs have: their step, and {label: [of each seed]}.

    Settings without that metric are left out.
    """
    groups = {
        label: runs
        for label, runs in groups.items()
        if all(any(key in record for record in run.records) for run in runs)
    }
    everything = [run.records for runs in groups.values() for run in runs]
    steps, values = aligned(everything, "step", key)
    if not steps.size:
        return None, {}
    last = values[:, -1] if key.startswith("eval/") else values[:, -FINAL_STEPS:].mean(axis=1)
    rest, found = list(last), {}
    for label, runs in groups.items():
        found[label], rest = rest[: len(runs)], rest[len(runs) :]
    return int(steps[0, -1]), found


def compared(values, others):
    """What the seeds say about how `values` lie to `others`."""
    if values is others:
        return ""
    if not np.isfinite([*values, *others]).all():
        return "not finite"
    return difference(values, others) if min(len(values), len(others)) > 1 else "unknown: one seed"


def final_table(groups, panels):
    """A Markdown table of `final_values`, each setting compared with the first one."""
    first = next(iter(groups))
    header, rows = ["metric", "step", "runs", "seeds", "mean", "range", f"against {first}"], []
    for key, label_of_metric in panels.items():
        step, found = final_values(groups, key)
        for label, values in found.items():
            low, high = min(values), max(values)
            numbers = [f"{np.mean(values):.4g}"]
            numbers.append(f"{low:.4g} to {high:.4g}" if len(values) > 1 else "")
            row = [label_of_metric, step, label, len(values), *numbers]
            rows.append([*row, compared(values, found.get(first, values))])
    cells = [list(map(str, row)) for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = [[f"{c:{w}}" for c, w in zip(row, widths, strict=True)] for row in cells]
    return table(padded[0], padded[1:])


def main(args):
    """Compare runs as the module's docstring says."""
    paths = [path for path in dict.fromkeys(args.runs) if not path.is_file()]  # of runs/*, say
    if not paths:
        raise BadInput("There is nothing to compare: give directories of runs.")
    if args.smoothing < 1:
        raise BadInput(f"--smoothing {args.smoothing} cannot work: give a number of at least 1.")
    runs = [read_run(path) for path in paths]
    check_comparable(runs)
    check_same_code(runs)
    groups, panels = grouped(runs), chosen_metrics(runs, args.metrics)
    path = args.output or paths[0].parent / "comparison"
    plot(groups, panels, args, path)
    write_values(groups, panels, path)

    print(final_table(groups, panels))
    print(
        f"\nOf training metrics, the mean of the {FINAL_STEPS} steps up to that step. A difference "
        f"is {SPREAD} if it is no larger than both ranges together."
    )
    print(
        "In the figure, lines are means over seeds and bands their range, after a centred moving "
        f"average over {args.smoothing} steps where there are more than {2 * args.smoothing}."
    )
    most = max(run.records[-1]["step"] for run in runs)
    for run in runs:
        if (step := run.records[-1]["step"]) < most:
            print(f"{run.path} has made {step} steps, another {most}: the table ends there.")
    print(f"The figure is in {path}.png and .pdf, what it shows in {path}.csv.")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except (BadInput, OSError) as error:
        print(f"compare.py: error: {error}", file=sys.stderr)
        sys.exit(2)
