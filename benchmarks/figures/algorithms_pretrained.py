"""The figure "sync_interval = 20" with a pretrained model: SmolLM2-135M-Instruct learns to write a
sentence as JSON.

    pip install gguf accelerate
    python benchmarks/figures/algorithms_pretrained.py          6 runs, two at a time; 2 hours
    python benchmarks/figures/algorithms_pretrained.py --quick  in miniature, to see that it works

The same three algorithms and observations as in `algorithms.py`, whose model has 0.4 million
parameters. A right answer earns 8 here as well. The task is `Extraction` of
`models/chat_tasks.py`: before training, about one sampled answer in ten is right. In 60 steps the
sampler gets new weights twice, so the training reward has three levels: that of the model as it
was, and those after 20 and after 40 updates. What the last 20 updates do, shows in the held-out
accuracy only.

The learning rate was chosen by `scans.py algorithms_pretrained`, on another seed: with that one,
all three had learned the most after their first 20 updates. Writes `figure.png`, `curves.csv` and
`report.md`. The runs take 22 GB. Repeat the command to continue where it was stopped.
Options it does not know go to the training scripts; on a GPU, leave out the number of threads:
    python benchmarks/figures/algorithms_pretrained.py --jobs 1 --threads 0
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.figures import algorithms
from benchmarks.figures.algorithms import COLOURS, PANELS, RIGHT, SCRIPTS, SYNC_INTERVAL
from benchmarks.helpers import reporting
from benchmarks.helpers.launcher import Run, as_options, run_all
from benchmarks.helpers.reporting import arrow, column, table
from benchmarks.models import smollm2
from benchmarks.models.chat_tasks import Extraction
from common.curves import read_metrics
from common.plots import SMOOTHING

ACCURACY = "eval/accuracy"
OPTIONS = {
    "task": "benchmarks/figures/algorithms_pretrained.py:ExtractionForMore",
    "precision": "bfloat16", "prompts_per_step": 8, "group_size": 8, "max_response_tokens": 48,
    "sync_interval": SYNC_INTERVAL, "eval_size": 64, "eval_interval": SYNC_INTERVAL,
    "checkpoint_interval": SYNC_INTERVAL, "serial": True,
}  # fmt: skip


@dataclass
class Args:
    steps: int = 60
    """training steps of each run"""
    learning_rate: float = 2e-5
    """of all runs"""
    seeds: tuple[int, ...] = (1, 2)
    """seeds of each algorithm"""
    jobs: int = 2
    """how many runs at a time"""
    threads: int = 1
    """CPU threads of each run"""
    quick: bool = False
    """ten steps of 8 responses, one seed, into directories of their own"""
    model: Path = reporting.RUNS / "smollm2"
    """where the converted model is, or is put"""
    runs: Path = reporting.RUNS / "algorithms_pretrained"
    """where the training runs go, and are looked for when the command is repeated"""
    output: Path = reporting.RESULTS / "algorithms_pretrained"
    """where figure, CSV and report go"""


class ExtractionForMore(Extraction):
    """With another reward for a right answer."""

    def reward(self, problem, response):
        values = super().reward(problem, response)
        return values | {"reward": RIGHT * values["reward"], "accuracy": values["reward"]}


def main(args, script_options):
    smollm2.main(args.model)
    shared = OPTIONS | {"learning_rate": args.learning_rate, "threads": args.threads}
    shared["model"] = args.model
    if args.quick:
        args.steps, args.seeds = 10, args.seeds[:1]
        shared |= {"prompts_per_step": 1, "eval_size": 8}
        reporting.use_quick_directories(args, Args.output)

    def name(script, seed):
        return f"{script}-{seed}"

    # Seed by seed: what is there when it is stopped is complete for the first seeds.
    runs = [
        Run(name(script, seed), script, as_options(shared | {"seed": seed}) + script_options)
        for seed in args.seeds
        for script in SCRIPTS.values()
    ]
    run_all(runs, args.steps, args.runs, args.jobs)
    everything = {
        label: [read_metrics(args.runs / name(script, seed)) for seed in args.seeds]
        for label, script in SCRIPTS.items()
    }
    groups = {
        label: [[record for record in records if record["step"] > 0] for records in runs]
        for label, runs in everything.items()
    }
    reporting.plot_runs(
        args.output / "figure.png", groups, COLOURS, PANELS, published=algorithms.marks(args.steps)
    )
    columns = ["step", *PANELS, ACCURACY]
    reporting.write_curves(args.output / "curves.csv", everything, args.seeds, columns)
    report = write_text(groups, everything, args)
    environment = reporting.environment_of(args.runs / runs[0].name)
    reporting.write_report(args.output / "report.md", report, environment)


def accuracies(everything):
    """Held-out accuracy after each sync period, by algorithm: rows of a table."""
    rows = []
    for label, runs in everything.items():
        of_seeds = np.array([column(records, ACCURACY) for records in runs])
        by_seed = ", ".join(arrow(values, ".2f") for values in of_seeds)
        rows.append([label, *(f"{mean:.3f}" for mean in of_seeds.mean(axis=0)), by_seed])
    return rows


def write_text(groups, everything, args):
    answers, summary = reporting.compare(algorithms.observations, groups, args.seeds)
    late = [
        [label, *reporting.clipped(runs), f"{algorithms.largest_behaviour_kl(runs):.4f}"]
        for label, runs in groups.items()
    ]
    evaluated = [
        f"after {record['step']} steps"
        for record in next(iter(everything.values()))[0]
        if ACCURACY in record
    ]
    peak = max(column(run, "memory/peak_gib").max() for runs in groups.values() for run in runs)
    header = ["curve", "clipped", "clipped, weighted", "largest behaviour KL"]
    return f"""# Three algorithms at `sync_interval = {SYNC_INTERVAL}`, with a pretrained model

{summary}

![figure](figure.png)

`python benchmarks/figures/algorithms_pretrained.py`: SmolLM2-135M-Instruct in bf16, `Extraction`
with {RIGHT} for a right answer, seeds {", ".join(map(str, args.seeds))}, {args.steps} steps of
8 × 8 rollouts, learning rate {args.learning_rate:g}. Lines are means over seeds and bands their
range, after a moving average over {SMOOTHING} steps; triangles are start and end of the published
curves, on the right-hand scale.
[scan.md](scan.md) has all settings that were tried. Peak memory of a run: {peak:.1f} GiB.

## Held-out accuracy, greedy

Means over seeds; in the last column, before training and at the end, by seed. It is measured with
the newest weights, while the training reward is that of weights up to {SYNC_INTERVAL} steps old.

{table(["algorithm", *evaluated, "by seed"], accuracies(everything))}

## Start and end of the curves

Ours: means of the first and the last tenth of the run, over seeds. A curve is flat if the mean
change is smaller than the spread of the changes between seeds.

{algorithms.ends_of_curves(groups)}

## Observations from the published figure, and whether they hold here

{answers}

## Clipping

Clipped: the share of response tokens whose gradient was clipped in the steps just before a sync,
where the lag is largest; "weighted" counts a token by 1 − p, to which its gradient is proportional.
The last column is the largest KL(sampler ‖ policy) of a batch, the mean over seeds.

{table(header, late)}
"""


if __name__ == "__main__":
    main(*tyro.cli(Args, description=__doc__, return_unknown_args=True))
