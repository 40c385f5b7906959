"""What `python -m common.compare` makes of several runs: GRPO and RED-Weight, three seeds each.

    python benchmarks/figures/several_runs.py           6 runs, two at a time; a quarter of an hour

The runs are those of the loop in common/README.md ("Several runs"), with the scripts' defaults.
Writes `comparison.png`, `.pdf` and `.csv`, as `common.compare` does, and `report.md` with what it
says. Repeat the command to continue where it was stopped.
"""

import contextlib
import io
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.helpers import reporting
from benchmarks.helpers.launcher import ROOT, Run, as_options, run_all
from common import compare

SCRIPTS = ("grpo", "red_weight")


@dataclass
class Args:
    steps: int = 150
    """training steps of each run"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds of each script"""
    jobs: int = 2
    """how many runs at a time, one thread each"""
    runs: Path = reporting.RUNS / "several_runs"
    """where the training runs go, and are looked for when the command is repeated"""
    output: Path = reporting.RESULTS / "several_runs"
    """where figure, CSV and report go"""


def main(args):
    runs = [
        Run(f"{script}-{seed}", script, as_options({"seed": seed, "threads": 1, "serial": True}))
        for script in SCRIPTS
        for seed in args.seeds
    ]
    run_all(runs, args.steps, args.runs, args.jobs)
    paths = tuple(args.runs / run.name for run in runs)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        compare.main(compare.Args(runs=paths, output=args.output / "comparison"))
    shown = said.getvalue().replace(f"{ROOT}/", "")
    report = f"""# Several runs, compared

`python benchmarks/figures/several_runs.py`: {" and ".join(f"`{name}.py`" for name in SCRIPTS)}
with one thread, otherwise with their defaults, {args.steps} steps, seeds
{", ".join(map(str, args.seeds))}. This is what
`python -m common.compare` plots and prints:

![Reward, accuracy, KL, entropy, response length and gradient norm](comparison.png)

{shown}"""
    environment = reporting.environment_of(paths[0])
    reporting.write_report(args.output / "report.md", report, environment)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
