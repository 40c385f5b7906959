"""The README's claim about `python grpo.py`, measured: three seeds of the default run, one after another.

    python benchmarks/default_run.py

Writes `benchmarks/results/default_run/`: `report.md`, `default_run.json` with the environment, and the picture of the
three runs. For each seed: seconds from start to the first reward on disk and to the end, and reward, KL, entropy,
response length and held-out accuracy at the start and at the end. A seed counts as collapsed when its last steps earn
less than its first.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.launcher import environment_of
from common.runlog import read_metrics

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PANELS = {
    "reward/mean": "reward",
    "kl/ref_k2": "KL to the initial policy",
    "entropy": "entropy (nats)",
    "response_length/mean": "response length (tokens)",
    "eval/accuracy": "held-out accuracy (greedy)",
}


@dataclass
class Args:
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds to run"""
    output: Path = ROOT / "benchmarks" / "results" / "default_run"
    """where the results go"""


def run_seed(seed, directory):
    """Run the default command with one seed; returns seconds to the first reward, seconds in all, and the metrics."""
    metrics = directory / f"seed{seed}" / "metrics.jsonl"
    started = time.perf_counter()
    command = [sys.executable, "grpo.py", "--seed", str(seed), "--output", str(directory), "--name", f"seed{seed}"]
    process = subprocess.Popen(command, cwd=ROOT)
    first = None
    while process.poll() is None:
        # Line 1 is the evaluation before training, line 2 the first step.
        if first is None and metrics.exists() and metrics.read_text().count("\n") >= 2:
            first = time.perf_counter() - started
        time.sleep(0.1)
    if process.returncode != 0:
        sys.exit(f"{' '.join(command)} failed.")
    return first, time.perf_counter() - started, read_metrics(metrics.parent)


def summarise(seed, first, total, records):
    """One row of the report: start (mean of the first 5 steps) and end (of the last 10) of each curve."""
    row = {"seed": seed, "seconds_to_first_reward": first, "seconds": total, "steps": records[-1]["step"]}
    for key in PANELS:
        values = [record[key] for record in records if key in record]
        evaluated = key.startswith("eval/")
        row[f"{key} start"] = values[0] if evaluated else float(np.mean(values[:5]))
        row[f"{key} end"] = values[-1] if evaluated else float(np.mean(values[-10:]))
    row["first_step_reward"] = records[1]["reward/mean"]
    row["collapsed"] = row["reward/mean end"] < row["reward/mean start"]
    return row


def main(args):
    with tempfile.TemporaryDirectory() as directory:
        runs = {seed: run_seed(seed, Path(directory)) for seed in args.seeds}
        environment = environment_of(Path(directory) / f"seed{args.seeds[0]}")
    rows = [summarise(seed, *run) for seed, run in runs.items()]

    args.output.mkdir(parents=True, exist_ok=True)
    results = {"environment": environment.splitlines(), "rows": rows}
    (args.output / "default_run.json").write_text(json.dumps(results, indent=1) + "\n")

    mean = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
    columns = ["first reward after (s)", "whole run (s)", *(f"{label}" for label in PANELS.values()), "collapsed"]
    lines = ["| seed | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in [*rows, {**mean, "seed": "mean", "collapsed": sum(row["collapsed"] for row in rows)}]:
        cells = [f"{row['seconds_to_first_reward']:.0f}", f"{row['seconds']:.0f}"]
        cells += [f"{row[f'{key} start']:.3f} → {row[f'{key} end']:.3f}" for key in PANELS]
        lines.append(f"| {row['seed']} | {' | '.join(cells)} | {row['collapsed']} |")
    report = f"""# The default run, {len(rows)} seeds

`python benchmarks/default_run.py` ran `python grpo.py --seed S` to the end, {rows[0]["steps"]} steps, one seed after
another. Curves: mean of the first 5 steps → mean of the last 10. Accuracy: before training → on the final weights. The
untrained policy's reward, the mean of the very first batches over seeds: {mean["first_step_reward"]:.3f}.

{chr(10).join(lines)}

![curves](curves.png)

```
{environment}
```
"""
    (args.output / "report.md").write_text(report)

    figure, axes = plt.subplots(1, len(PANELS), figsize=(17, 3.4), layout="constrained")
    for axis, (key, label) in zip(axes, PANELS.items(), strict=True):
        for seed, (_, _, records) in runs.items():
            points = [(record["step"], record[key]) for record in records if key in record]
            axis.plot(*zip(*points, strict=True), label=f"seed {seed}", linewidth=1)
        axis.set(title=label, xlabel="step")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(args.output / "curves.png", dpi=110)
    print(report)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
