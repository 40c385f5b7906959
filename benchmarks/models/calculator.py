"""A model learns to use a tool: `--task calculator`, and what happens if replies are in the loss.

    python benchmarks/models/calculator.py            5 minutes on two idle cores
    python benchmarks/models/calculator.py --quick    in miniature, to see that it works

The start model is the bundled one, trained on for half a minute (`build_tiny_model.py --calls`). It
leaves a sum to the calculator one time in five; when it samples, what it adds by itself is wrong
three times in four. Reinforcement finds that calling pays. `imitating.py` makes the usual mistake:
the calculator's tokens are in the loss, although no policy sampled them.

Writes `figure.png`, `curves.csv` and `report.md`. Repeat the command to continue.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.evaluate import greedy_answers
from benchmarks.helpers import reporting
from benchmarks.helpers.launcher import ROOT, Run, as_options, run_all, run_once
from benchmarks.helpers.reporting import arrow, column, table
from common.curves import read_metrics

SCRIPTS = {"GRPO": "grpo", "replies in the loss": "benchmarks/helpers/imitating"}
COLOURS = {"GRPO": "tab:blue", "replies in the loss": "tab:red"}
PANELS = {
    "reward/mean": "reward",
    "turns": "turns per response",
    "grad_norm": "gradient norm",
    "kl/ref_k2": "KL to the initial policy",
}
START = {"calls": 0.2, "slip": 0.75, "hum": 0, "doubt": 0, "recheck": 0, "steps": 150}


@dataclass
class Args:
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds of each of the two"""
    steps: int = 50
    """training steps"""
    quick: bool = False
    """one seed, two steps"""
    runs: Path = reporting.RUNS / "calculator"
    """where start model and runs go, and are looked for when the command is repeated"""
    output: Path = reporting.RESULTS / "calculator"
    """where figure and report go"""


def main(args):
    start = START
    if args.quick:
        args.seeds, args.steps, start = args.seeds[:1], 2, {**START, "steps": 5}
        reporting.use_quick_directories(args, Args.output)
    model = args.runs.resolve() / "start"
    if not (model / "config.json").exists():
        build = {"output": model, "start": ROOT / "common/tiny_model", "learning_rate": 3e-4}
        run_once(["common/build_tiny_model.py", *as_options(build | start)])
    options = {
        "task": "calculator", "model": model, "learning_rate": 1e-4, "prompts_per_step": 16,
        "eval_interval": 10, "serial": True, "threads": 1,
    }  # fmt: skip
    groups = {}
    runs = []
    for label, script in SCRIPTS.items():
        names = [f"{Path(script).stem}-{seed}" for seed in args.seeds]
        for name, seed in zip(names, args.seeds, strict=True):
            runs.append(Run(name, script, as_options(options | {"seed": seed})))
        groups[label] = names
    run_all(runs, args.steps, args.runs, jobs=2)
    groups = {
        label: [read_metrics(args.runs / name) for name in names] for label, names in groups.items()
    }
    reporting.plot_runs(args.output / "figure.png", groups, COLOURS, PANELS)
    reporting.write_curves(args.output / "curves.csv", groups, args.seeds, ["step", *PANELS])
    report = f"""# Learning to use a calculator

`python benchmarks/models/calculator.py`: {args.steps} steps of 16 × 8 responses, learning rate
1e-4, seeds {", ".join(map(str, args.seeds))}.

![Reward, turns, gradient norm, KL](figure.png)

{table(HEADER, rows(groups, args.seeds))}

Means of the first and of the last five steps; the gradient norm over all steps. A turn more is a
call more. Two calls are needed for three terms, three for four. Where replies are in the loss, they
are in the KL as well: the policy learns to say what the calculator says.

The first held-out problems, greedy, seed {args.seeds[0]}; what the calculator replied is in
brackets:

{dialogues(model, args.runs / f"grpo-{args.seeds[0]}" / "model")}
"""
    environment = reporting.environment_of(args.runs / f"grpo-{args.seeds[0]}")
    reporting.write_report(args.output / "report.md", report, environment)


HEADER = ["", "seed", "reward", "turns", "tokens of replies", "gradient norm", "accuracy, greedy"]


def rows(groups, seeds):
    found = []
    for label, runs in groups.items():
        for seed, records in zip(seeds, runs, strict=True):
            steps = [record for record in records if record["step"] > 0]
            cells = []
            for key in ("reward/mean", "turns", "environment_tokens"):
                values = column(steps, key)
                cells.append(arrow([values[:5].mean(), values[-5:].mean()], ".2f"))
            cells.append(f"{column(steps, 'grad_norm').mean():.2f}")
            cells.append(arrow(column(records, "eval/accuracy"), ".2f"))
            found.append([label, seed, *cells])
    return found


def dialogues(before, after, how_many=3):
    """Answers of two models as a block of text."""
    problems, answers = greedy_answers([before, after], "calculator", how_many, 64)
    lines = []
    for problem, *both in zip(problems, *answers, strict=True):
        lines.append(problem["prompt"].split("\n")[0])
        for when, (parts, _) in zip(("before:", "after: "), both, strict=True):
            said = "".join(f"[{part}]" if i % 2 else part for i, part in enumerate(parts))
            lines.append(f"{when} {said}")
    return "\n".join(["```", *lines, "```"])


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
