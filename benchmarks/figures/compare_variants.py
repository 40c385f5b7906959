"""Trains with each of the variants of the loss, and compares them with the three scripts.

    python benchmarks/figures/compare_variants.py           about an hour
    python benchmarks/figures/compare_variants.py --quick   in miniature, to see that it works

Trains at `sync_interval` 1 and 20, with one setting for all. Writes `report.md`, and `strip.png`
with the values it shows in `curves.csv`. Repeat the command to continue where it was stopped.
"""

import difflib
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.figures import algorithms
from benchmarks.helpers import reporting
from benchmarks.helpers.launcher import ROOT, Run, run_all
from benchmarks.helpers.reporting import SPREAD, column, table, yes
from benchmarks.variants import REGION, VARIANTS, script_of
from common.plots import difference

SETTING = "--threads 1 --serial --prompts-per-step 8 --learning-rate 5e-5"
SYNC_INTERVALS = (1, 20)


@dataclass
class Args:
    steps: int = 150
    """training steps of each run"""
    seeds: tuple[int, ...] = (1, 2)
    """seeds of each curve"""
    jobs: int = 2
    """how many runs at a time, one thread each"""
    quick: bool = False
    """GRPO and two variants, 10 steps, into directories of their own"""
    runs: Path = reporting.RUNS / "variants"
    """where scripts and training runs go, and are looked for when the command is repeated"""
    output: Path = reporting.RESULTS / "variants"
    """where report, figure and CSV go"""


def main(args):
    names, scripts = list(VARIANTS), dict(algorithms.SCRIPTS)
    if args.quick:
        args.steps, names, scripts = 10, ["gspo", "cispo"], {"GRPO": "grpo"}
        reporting.use_quick_directories(args, Args.output)
    args.runs.mkdir(parents=True, exist_ok=True)
    for name in names:
        path = args.runs.resolve() / f"{name}.py"
        path.write_text(script_of(name, path.name))
        scripts[VARIANTS[name].__doc__.partition(":")[0]] = str(path.with_suffix(""))

    def run_of(label, interval, seed):
        options = f"--sync-interval {interval} --seed {seed} {SETTING} --eval-interval {args.steps}"
        name = f"{Path(scripts[label]).name}-{interval}-{seed}"
        return Run(name, scripts[label], options.split())

    curves = [(label, interval) for interval in SYNC_INTERVALS for label in scripts]
    runs = [run_of(*curve, seed) for seed in args.seeds for curve in curves]
    run_all(runs, args.steps, args.runs, args.jobs)
    groups = {
        curve: [reporting.read_steps(args.runs / run_of(*curve, seed).name) for seed in args.seeds]
        for curve in curves
    }
    panels = {
        label: {f"sync_interval {i}": groups[label, i] for i in SYNC_INTERVALS} for label in scripts
    }
    colours = dict(zip(panels["GRPO"], ("tab:blue", "tab:orange"), strict=True))
    what = ("reward/mean", "training reward", colours)
    reporting.plot_strip(args.output / "strip.png", panels, *what)
    columns = ["step", "reward/mean", "kl/ref_k2"]
    named = {
        f"{label}, sync_interval {interval}": runs for (label, interval), runs in groups.items()
    }
    reporting.write_curves(args.output / "curves.csv", named, args.seeds, columns)
    environment = reporting.environment_of(args.runs / run_of("GRPO", 1, args.seeds[0]).name)
    report = write_text(groups, scripts, args)
    reporting.write_report(args.output / "report.md", report, environment)


def lines_of_diff(script):
    """Lines that a diff of `grpo.py` and another script removes and adds, without the docstrings at
    the top.
    """
    texts = [path.read_text() for path in (ROOT / "grpo.py", script)]
    lines = [REGION.sub("", text, count=1).splitlines() for text in texts]
    kinds = [line[0] for line in difflib.ndiff(*lines)]
    return f"−{kinds.count('-')} +{kinds.count('+')}"


def is_stable(runs):
    """Whether in all runs the last tenth's reward is within 0.1 of the best tenth's, and no update
    was skipped.
    """
    tenths = algorithms.tenths(runs, "reward/mean")
    skipped = sum(column(records, "update_skipped").sum() for records in runs)
    return skipped == 0 and bool((tenths[:, -1] >= tenths.max(axis=1) - 0.1).all())


def write_text(groups, scripts, args):
    header = ["algorithm", "script", "lines of diff"]
    for value in ("accuracy", "reward"):
        header += [f"{value} by seed", "mean", "against GRPO"]
    header += ["KL", "clipped", "clipped, weighted", "stable"]
    rows = {interval: [] for interval in SYNC_INTERVALS}
    ends = {  # by curve: accuracies and rewards of the seeds
        curve: [
            [column(run, "eval/accuracy")[-1] for run in runs],
            algorithms.tenths(runs, "reward/mean")[:, -1],
        ]
        for curve, runs in groups.items()
    }
    for (label, interval), runs in groups.items():
        script = (ROOT / scripts[label]).with_suffix(".py")
        paper = re.search(r"arXiv (\d+\.\d+)", script.read_text())[1]
        row = [f"[{label}](https://arxiv.org/abs/{paper})", f"`{script.stem}`"]
        row.append(lines_of_diff(script))
        for values, grpos in zip(ends[label, interval], ends["GRPO", interval], strict=True):
            row += [", ".join(f"{value:.3f}" for value in values), f"{np.mean(values):.3f}"]
            row.append("" if label == "GRPO" else difference(values, grpos))
        row.append(f"{algorithms.tenths(runs, 'kl/ref_k2')[:, -1].mean():.3f}")
        rows[interval].append([*row, *reporting.clipped(runs), yes(is_stable(runs))])
    sections = [f"## `sync_interval = {i}`\n\n{table(header, rows[i])}\n" for i in SYNC_INTERVALS]
    tables = "\n".join(sections)
    return f"""# Variants of the loss

`python benchmarks/figures/compare_variants.py`: {args.steps} steps with `{SETTING}`,
seeds {", ".join(map(str, args.seeds))}, the bundled model and task.

![reward over training steps](strip.png)

- Lines of diff: removed from `grpo.py` and added to it, without the docstrings at the top.
- Accuracy: held-out, greedy, after training; many are near the ceiling. Reward: of sampled
  responses, mean of the last tenth of the run. "{SPREAD}": the means differ by no more than the
  ranges over seeds, the algorithm's and GRPO's, added up. With {len(args.seeds)} seeds, chance
  alone can exceed that.
- KL: to the initial policy, mean of the last tenth of the run.
- Clipped: response tokens whose gradient was clipped, where the lag is largest; "weighted" counts a
  token by 1 − p. A loss that clips weights instead of gradients has none.
- Stable: with all seeds, the last tenth's reward is within 0.1 of the best tenth's, and no update
  was skipped.

{tables}"""


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
