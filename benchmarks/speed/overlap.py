"""How close an overlapped run comes to the shortest time its schedule allows, and what handing over
weights costs.

    python benchmarks/speed/overlap.py            about five minutes on two otherwise idle cores

1. Runs of `grpo.py` with one thread for the sampler and one for the trainer. The time per step is
   compared with the shortest possible one, worked out (`schedule_replay.shortest_step`) from the
   median times of sampling and training in the same run, plus the measured sync where it is due.
   The number of prompts is chosen so that sampling and training take about the same, which is when
   waiting for one another shows most. The learning rate is 1e-9, so that all steps are the same
   work.
2. `SharedWeights.write` of a model of 100 million parameters against a plain copy of as many bytes
   from one tensor to another, taking turns in one process.

Writes `report.md`, and `overlap.json` with the numbers of the runs.
"""

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.helpers import reporting
from benchmarks.helpers.launcher import Run, as_options, run_all
from benchmarks.helpers.reporting import column, table, yes
from benchmarks.speed.schedule_replay import MODES, shortest_step, times_of_steps
from common.sampling.shared_weights import share_weights

# In Sync (1), there is nothing to overlap.
SCHEDULES = {label: mode for label, mode in MODES.items() if mode != (1, 0)}
# Steps, in whole intervals, until caches are warm and the schedule has reached its rhythm.
WARM_UP = 10
LIMIT = 1.05  # of the shortest possible time
COPY_LIMIT = 1.2  # of a plain copy
COLUMNS = ["sample", "train", "sync", "shortest step", "measured step", "ratio"]


@dataclass
class Args:
    steps: int = 80
    """steps of each run; the first 10 are warm-up"""
    prompts_per_step: int = 16
    """P; 16 × 8 rollouts take about as long to sample as to train on, where the results are from"""
    copies: int = 21
    """how often each copy is timed"""
    runs: Path = reporting.RUNS / "overlap"
    """where the training runs go, and are looked for when the command is repeated"""
    output: Path = reporting.RESULTS / "overlap"
    """where report and JSON go"""


def measure_run(run_dir, interval, offset):
    """`COLUMNS`: medians in seconds, and the ratio."""
    records = reporting.read_steps(run_dir)[WARM_UP:]
    samples, trains, syncs = times_of_steps(records)
    sample, train = np.median(samples), np.median(trains)
    sync = np.median(syncs[interval - 1 :: interval]) / interval
    # With (I, 0) the steps of an interval differ, and repeat every I steps: the median is over
    # whole intervals.
    step = np.median(np.diff(column(records, "time/step_started_at")[::interval])) / interval
    shortest = shortest_step(sample, train, interval, offset)
    return sample, train, sync, shortest, step, step / (shortest + sync)


def measure_copies(repeats):
    """Parameters of the model, and median seconds of a plain copy and of handing over."""
    torch.set_num_threads(1)
    # The shape of a small transformer: a large embedding, many square and some long matrices, many
    # vectors.
    layer = [(768, 768)] * 4 + [(2048, 768), (768, 2048), (768,)]
    shapes = [(32_000, 768), *layer * 14]
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.randn(shape)) for shape in shapes])
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    weights = share_weights(model, num_slots=2)
    source, target = torch.randn(num_parameters), torch.zeros(num_parameters)
    plain, hand_over = [], []
    for repeat in range(repeats + 2):
        start = time.perf_counter()
        target.copy_(source)
        copied = time.perf_counter()
        weights.write(repeat % 2, repeat, model)
        plain.append(copied - start)
        hand_over.append(time.perf_counter() - copied)
    # The first two touch memory for the first time.
    return num_parameters, statistics.median(plain[2:]), statistics.median(hand_over[2:])


def main(args):
    num_parameters, plain, hand_over = measure_copies(args.copies)  # first: it allocates 1.6 GB
    options = {
        "threads": 1, "learning_rate": 1e-9, "reference_kl": False, "eval_size": 8,
        "prompts_per_step": args.prompts_per_step, "eval_interval": args.steps,
        "checkpoint_interval": args.steps,
    }  # fmt: skip
    rows, results = [], {}
    for label, (interval, offset) in SCHEDULES.items():
        schedule = {"sync_interval": interval, "sync_offset": offset}
        run = Run(f"sync-{interval}-{offset}", "grpo", as_options(schedule | options))
        run_all([run], args.steps, args.runs, jobs=1)
        *seconds, ratio = measured = measure_run(args.runs / run.name, interval, offset)
        results[label] = dict(zip(COLUMNS, map(float, measured), strict=True))
        rows.append([label, *(f"{value:.4f}" for value in seconds)])
        rows[-1] += [f"{ratio:.3f}", yes(ratio <= LIMIT)]
    reporting.write_json(args.output / "overlap.json", runs=results)
    report = f"""# Overlapped sampling: how close to the schedule's shortest time

`python benchmarks/speed/overlap.py`: {args.steps} steps of {args.prompts_per_step} × 8 rollouts,
one thread for the sampler and one for the trainer. Seconds, medians over all steps but the first
{WARM_UP}; the sync is per step. Ratio: measured step / (shortest step at these sampling and
training times + sync).

{table(["schedule", *COLUMNS, f"at most {LIMIT}"], rows)}

## Handing over the weights

{num_parameters / 1e6:.1f} M parameters, {4 * num_parameters / 1e6:.0f} MB, one thread, median of
{args.copies}: plain copy {plain * 1e3:.1f} ms, hand-over {hand_over * 1e3:.1f} ms, ratio
{hand_over / plain:.2f} (at most {COPY_LIMIT}: {yes(hand_over <= COPY_LIMIT * plain)}). The sampler
copies nothing: its parameters become views of the shared memory.
"""
    environment = reporting.environment_of(args.runs / run.name)
    reporting.write_report(args.output / "report.md", report, environment)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
