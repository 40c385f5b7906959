"""Every setting that was tried for the figures, on seeds that the figures do not use.

    python benchmarks/figures/scans.py sync_modes --seeds 11    16 runs, two at a time; 15 minutes
    python benchmarks/figures/scans.py algorithms --seeds 11    33 runs; an hour
    python benchmarks/figures/scans.py algorithms_pretrained --seeds 11     9 runs; an hour

The four schedules, or the three algorithms, are trained with each setting of `SCANS`, and the table
says what became of the curves and how many of the observations about the published figure hold
(those about time left out: runs share the machine here). The setting of a figure was chosen from
this table, one for all curves, before its own seeds were run.

Writes `scan.md` into the figure's directory in `results/`. Repeat the command to continue where it
was stopped.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.figures import algorithms, algorithms_pretrained, sync_modes
from benchmarks.helpers import reporting
from benchmarks.helpers.launcher import Run, as_options, run_all
from benchmarks.helpers.reporting import column, table
from benchmarks.speed.schedule_replay import MODES

# options, and the share of hasty examples in the start model; without one, it is the bundled model
SCANS = {
    "sync_modes": [
        {"hasty": hasty, "learning-rate": rate, "prompts-per-step": 16, "steps": 80}
        for hasty, rate in ((0.85, 1e-4), (0.85, 5e-5), (0.55, 5e-5), (0.55, 2e-5))
    ],
    "algorithms": [
        # (Longer problems, of five or six terms, are out of reach for the bundled model: 1 of 128
        # answers was right.)
        {"learning-rate": 2e-4, "prompts-per-step": 8, "steps": 200},
        {"learning-rate": 1e-4, "prompts-per-step": 8, "steps": 200},
        {"learning-rate": 5e-5, "prompts-per-step": 8, "steps": 200},
        {"learning-rate": 2e-5, "prompts-per-step": 8, "steps": 200},
        {"learning-rate": 1e-4, "prompts-per-step": 32, "steps": 100},
        {"learning-rate": 5e-5, "prompts-per-step": 32, "steps": 100},
        {"temperature": 1.2, "learning-rate": 5e-5, "prompts-per-step": 8, "steps": 200},
        {"group-size": 32, "learning-rate": 5e-5, "prompts-per-step": 2, "steps": 200},
        {"hasty": 0.55, "learning-rate": 5e-5, "prompts-per-step": 8, "steps": 200},
        {"reward": 8, "learning-rate": 5e-5, "prompts-per-step": 8, "steps": 200},
        {
            "reward": 8,
            "temperature": 1.2,
            "learning-rate": 5e-5,
            "prompts-per-step": 8,
            "steps": 200,
        },
    ],
    # Just over one sync period: the first batches of the second one tell what it came to.
    "algorithms_pretrained": [{"learning-rate": rate, "steps": 22} for rate in (1e-5, 2e-5, 5e-6)],
}


@dataclass
class Args:
    figure: Annotated[
        Literal["sync_modes", "algorithms", "algorithms_pretrained"], tyro.conf.Positional
    ]
    """for which of them"""
    seeds: tuple[int, ...] = (11, 12)
    """seeds of each setting, none of those that the figures use"""
    jobs: int = 2
    """how many runs at a time, one thread each"""
    model: Path = reporting.RUNS / "smollm2"
    """where the pretrained model is, which smollm2.py makes"""
    runs: Path = reporting.RUNS / "scans"
    """where the training runs go, and are looked for when the command is repeated"""
    output: Path = reporting.RESULTS
    """the reports go to directories in here"""


def curves_of(figure):
    """Of each curve, by label: its script, and the options that make it."""
    if figure != "sync_modes":
        own = {"sync-interval": algorithms.SYNC_INTERVAL}
        return {label: (script, own) for label, script in algorithms.SCRIPTS.items()}
    options = {mode: {"sync-interval": i, "sync-offset": o} for mode, (i, o) in MODES.items()}
    return {mode: ("grpo", own) for mode, own in options.items()}


def run_setting(figure, setting, args):
    """Train every curve with every seed; returns {label: [records of a run, …]}."""
    options = dict(setting)
    steps, hasty = options.pop("steps"), options.pop("hasty", None)
    name = ",".join(f"{key}={value:g}" for key, value in setting.items())
    if options.pop("reward", None):
        options["task"] = algorithms.TASK
    if hasty:
        options["model"] = sync_modes.hasty_model(hasty, args.runs)
    options |= {"threads": 1, "serial": True, "eval-size": 64}
    if figure == "algorithms_pretrained":
        options |= algorithms_pretrained.OPTIONS | {"model": args.model}
    directory, groups, runs = args.runs / figure / name, {}, []
    for label, (script, own) in curves_of(figure).items():
        for seed in args.seeds:
            run_name = f"{label} {seed}".replace(" ", "-")
            runs.append(Run(run_name, script, as_options(own | options | {"seed": seed})))
            groups.setdefault(label, []).append(directory / runs[-1].name)
    run_all(runs, steps, directory, args.jobs)
    read = sync_modes.read_run if figure == "sync_modes" else reporting.read_steps
    return {label: [read(path) for path in paths] for label, paths in groups.items()}


def ends(runs, key):
    """First and last tenth of the runs, as text."""
    return reporting.arrow(algorithms.tenths(runs, key).mean(axis=0), ".3g")


def main(args):
    module = sync_modes if args.figure == "sync_modes" else algorithms
    parts = []
    for setting in SCANS[args.figure]:
        groups = run_setting(args.figure, setting, args)
        asked = getattr(module, "about_curves", module.observations)(groups)
        rows = []
        for label, runs in groups.items():
            behaviour = algorithms.largest_behaviour_kl(runs)
            rows.append([label, *(ends(runs, key) for key in module.PANELS)])
            rows[-1] += ["{} ({})".format(*reporting.clipped(runs)), f"{behaviour:.2g}"]
            accuracies = [column(records, "eval/accuracy")[-1] for records in runs]
            rows[-1].append(f"{np.mean(accuracies):.3f}")
        header = ["curve", *module.PANELS.values()]
        header += ["clipped at the largest lag (weighted)", "largest behaviour KL"]
        header.append("held-out accuracy")
        title = ", ".join(f"{key} {value}" for key, value in setting.items())
        holding = sum(holds for _, holds in asked)
        failing = "; ".join(statement for statement, holds in asked if not holds)
        parts += [f"## {title}", f"{holding} of {len(asked)} hold. Not: {failing}."]
        parts += [table(header, rows)]
        text = "\n\n".join([f"# Settings tried for `{args.figure}.py`, seeds {args.seeds}", *parts])
        last = next((args.runs / args.figure).glob("*/*/environment.txt")).parent
        environment = reporting.environment_of(last)
        reporting.write_report(args.output / args.figure / "scan.md", text, environment)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
