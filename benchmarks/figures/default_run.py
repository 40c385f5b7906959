"""What `python grpo.py` promises, measured: three seeds of the default run, one after another.

    python benchmarks/figures/default_run.py        about nine minutes on two otherwise idle cores

Writes `report.md`, `default_run.json` with its numbers, and `curves.png` with the values it shows
in `curves.csv`.
"""

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.helpers import reporting
from benchmarks.helpers.launcher import ROOT, as_options
from benchmarks.helpers.reporting import PANELS, arrow, column, table, yes
from common.curves import read_metrics


@dataclass
class Args:
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds to run"""
    output: Path = reporting.RESULTS / "default_run"
    """where report, JSON, figure and CSV go"""


def run_seed(seed, directory, script_options):
    """Run the default command with one seed; returns seconds to the first reward, seconds in all,
    and the metrics.
    """
    metrics = directory / f"seed{seed}" / "metrics.jsonl"
    started, first = time.perf_counter(), None
    options = as_options({"seed": seed, "output": directory, "name": f"seed{seed}"})
    command = [sys.executable, "grpo.py", *options, *script_options]
    process = subprocess.Popen(command, cwd=ROOT)
    while process.poll() is None:
        # Line 1 is the evaluation before training, line 2 the first step.
        if first is None and metrics.exists() and metrics.read_text().count("\n") >= 2:
            first = time.perf_counter() - started
        time.sleep(0.1)
    if process.returncode != 0:
        sys.exit(f"{' '.join(command)} failed.")
    return first, time.perf_counter() - started, read_metrics(metrics.parent)


def start_and_end(records, key):
    """A curve's first values and its last: means of 5 and of 10 steps, or single evaluations."""
    values = column(records, key)
    if key.startswith("eval/"):
        return values[0], values[-1]
    return values[:5].mean(), values[-10:].mean()


def main(args, script_options):
    with tempfile.TemporaryDirectory() as directory:
        measured = [run_seed(seed, Path(directory), script_options) for seed in args.seeds]
        environment = reporting.environment_of(Path(directory) / f"seed{args.seeds[0]}")
        environment = environment.replace(directory, "DIR")
    runs = [records for _, _, records in measured]
    first_reward = np.mean([column(records, "reward/mean")[0] for records in runs])
    group = {f"mean and range of {len(runs)} seeds": runs}
    reporting.plot_runs(args.output / "curves.png", group, dict.fromkeys(group, "tab:blue"), PANELS)
    columns = ["step", *PANELS]
    reporting.write_curves(args.output / "curves.csv", {"grpo.py": runs}, args.seeds, columns)

    # [seeds, curves, 2]
    ends = np.array([[start_and_end(records, key) for key in PANELS] for records in runs])
    seconds = np.array([[first, total] for first, total, _ in measured])

    results = [
        {"seed": seed, "seconds": total}
        for seed, (_, total) in zip(args.seeds, seconds.tolist(), strict=True)
    ]
    for row, values in zip(results, ends.tolist(), strict=True):
        for key, (start, end) in zip(PANELS, values, strict=True):
            row |= {f"{key} start": start, f"{key} end": end}
    reporting.write_json(args.output / "default_run.json", rows=results)

    def cells(label, times, values):
        return [label, *(f"{t:.0f}" for t in times), *(arrow(pair, ".3f") for pair in values)]

    rises = yes((ends[:, 0, 1] > ends[:, 0, 0]).all())
    rows = [cells(*of_seed) for of_seed in zip(args.seeds, seconds, ends, strict=True)]
    rows.append(cells("mean", seconds.mean(axis=0), ends.mean(axis=0)))
    command = " ".join(["python grpo.py --seed S", *script_options])
    report = f"""# The default run, {len(runs)} seeds

`python benchmarks/figures/default_run.py`: `{command}`, {runs[0][-1]["step"]}
steps, one seed after another. Means of the first 5 steps → means of the last
10; accuracy before training → with the final weights.

{table(["seed", "first reward after (s)", "whole run (s)", *PANELS.values()], rows)}

- Mean reward of the very first batches, sampled by the untrained policy: {first_reward:.3f}.
- The reward ends higher than it starts for every seed: {rises}.

![curves](curves.png)
"""
    reporting.write_report(args.output / "report.md", report, environment)


if __name__ == "__main__":
    main(*tyro.cli(Args, description=__doc__, return_unknown_args=True))
