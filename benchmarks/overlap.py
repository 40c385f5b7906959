"""How close an overlapped run comes to the shortest time its schedule allows, and what handing over weights costs.

    python benchmarks/overlap.py            about eight minutes on two otherwise idle cores

1. Runs of `grpo.py` with one thread for the sampler and one for the trainer. The time from step to step is compared
   with the shortest possible one, worked out (`schedule_replay.shortest_step`) from the median times of sampling and
   training measured in the same run, plus the measured sync where it is due. The number of prompts is chosen so that
   sampling and training take about the same, which is when waiting for one another shows most. The learning rate is
   1e-9, so that all steps are the same work.
2. `SharedWeights.write` of a model of 100 million parameters against a plain copy of as many bytes from one tensor to
   another, taking turns in one process; and what the sampler does to read them, `point_parameters`.

Writes `benchmarks/results/overlap/report.md` and `overlap.json`.
"""

import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.launcher import Run, environment_of, run_all
from benchmarks.schedule_replay import shortest_step
from common.runlog import read_metrics
from common.shared_weights import SharedWeights, point_parameters

SCHEDULES = {"Sync (10)": (10, 0), "One-Step Off-Policy": (1, 1), "Sync (1)": (1, 0)}
WARM_UP_STEPS = 10
LIMIT = 1.05  # of the shortest possible time
COPY_LIMIT = 1.2  # of a plain copy


@dataclass
class Args:
    steps: int = 80
    """steps of each run; the first 10 are warm-up"""
    prompts_per_step: int = 16
    """P; 16 × 8 rollouts take about as long to draw as to train on, on the CPU of the committed results"""
    copies: int = 21
    """how often each copy is timed"""
    runs: Path = Path("runs/overlap")
    """where the training runs go, and are looked for when the command is repeated"""
    output: Path = Path("benchmarks/results/overlap")
    """where the report goes"""


def measure_run(run_dir, interval, offset):
    """Medians of a run's steps, in seconds, and the ratio of its time per step to the shortest possible one."""
    records = [record for record in read_metrics(run_dir) if record["step"] > WARM_UP_STEPS]
    begun = [record["time/step_started_at"] for record in records]
    # With (I, 0) the steps of an interval differ, and repeat every I steps: the median is over whole intervals.
    cycles = [(begun[i + interval] - begun[i]) / interval for i in range(0, len(begun) - interval, interval)]
    sample = statistics.median(record["time/sample"] for record in records)
    train = statistics.median(record["time/grade"] + record["time/train"] for record in records)
    sync = statistics.median(r["time/sync"] for r in records if r["step"] % interval == 0) / interval
    step, shortest = statistics.median(cycles), shortest_step(sample, train, interval, offset)
    return {
        "steps": len(cycles) * interval, "sample": sample, "train": train, "sync": sync, "step": step,
        "shortest": shortest, "ratio": step / (shortest + sync),
    }  # fmt: skip


def measure_copies(repeats):
    """Median seconds of handing 100 million parameters over, of a plain copy, and of the sampler's turning to them."""
    torch.set_num_threads(1)
    # The shape of a small transformer: a large embedding, many square and some long matrices, many vectors.
    shapes = [(32_000, 768)] + [(768, 768), (768, 768), (768, 768), (768, 768), (2048, 768), (768, 2048), (768,)] * 14
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.randn(shape)) for shape in shapes])
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    weights = SharedWeights(model, num_slots=2)
    source, target = torch.randn(num_parameters), torch.zeros(num_parameters)
    plain, hand_over, read = [], [], []
    for repeat in range(repeats + 2):  # the first touch of every page is warm-up
        start = time.perf_counter()
        target.copy_(source)
        copied = time.perf_counter()
        weights.write(repeat % 2, repeat, model)
        written = time.perf_counter()
        own = point_parameters(model, weights.slots[repeat % 2])
        pointed = time.perf_counter()
        point_parameters(model, own)
        if repeat >= 2:
            plain.append(copied - start)
            hand_over.append(written - copied)
            read.append(pointed - written)
    plain, hand_over, read = (statistics.median(seconds) for seconds in (plain, hand_over, read))
    return {
        "parameters": num_parameters, "plain": plain, "hand_over": hand_over, "read": read, "ratio": hand_over / plain,
    }  # fmt: skip


def main(args):
    copies = measure_copies(args.copies)  # first: it allocates 1.6 GB
    directory, output = ROOT / args.runs, ROOT / args.output
    common_options = [
        *("--threads", "1", "--learning-rate", "1e-9", "--no-reference-kl", "--eval-size", "8"),
        *("--prompts-per-step", str(args.prompts_per_step)),
        *("--eval-interval", str(args.steps), "--checkpoint-interval", str(args.steps)),
    ]
    results = {}
    for label, (interval, offset) in SCHEDULES.items():
        name = f"sync-{interval}-{offset}"
        schedule = ["--sync-interval", str(interval), "--sync-offset", str(offset)]
        run_all([Run(name, "grpo", schedule + common_options)], args.steps, directory, jobs=1)
        results[label] = measure_run(directory / name, interval, offset)
    environment = environment_of(directory / "sync-1-0")
    output.mkdir(parents=True, exist_ok=True)
    stored = {"runs": results, "hand-over": copies, "environment": environment.splitlines()}
    (output / "overlap.json").write_text(json.dumps(stored, indent=2) + "\n")
    report = write_report(results, copies, args, environment)
    (output / "report.md").write_text(report)
    print(report)


def write_report(results, copies, args, environment):
    lines = [
        "# Overlapped sampling: how close to the schedule's shortest time",
        "",
        f"`python benchmarks/overlap.py`, {args.prompts_per_step} × 8 rollouts a step, one thread for the sampler and "
        "one for the trainer. Seconds, medians over the steps after warm-up; the sync is per step.",
        "",
        f"| schedule | steps | sample | train | sync | shortest step | measured step | ratio | at most {LIMIT} |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for label, r in results.items():
        lines.append(
            f"| {label} | {r['steps']} | {r['sample']:.3f} | {r['train']:.3f} | {r['sync']:.4f} | "
            f"{r['shortest']:.3f} | {r['step']:.3f} | {r['ratio']:.3f} | {'yes' if r['ratio'] <= LIMIT else 'no'} |"
        )
    lines += [
        "",
        "Ratio: measured step / (shortest step at these sampling and training times + sync).",
        "",
        "## Handing over the weights",
        "",
        f"{copies['parameters'] / 1e6:.1f} M parameters, {4 * copies['parameters'] / 1e6:.0f} MB, one thread, median "
        f"of {args.copies}: plain copy {copies['plain'] * 1e3:.1f} ms, hand-over {copies['hand_over'] * 1e3:.1f} ms, "
        f"ratio {copies['ratio']:.2f} (at most {COPY_LIMIT}: {'yes' if copies['ratio'] <= COPY_LIMIT else 'no'}). The "
        f"sampler copies nothing: its parameters become views of the slot, {copies['read'] * 1e6:.0f} µs.",
        "",
        "## Environment",
        "",
        "```",
        environment,
        "```",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
