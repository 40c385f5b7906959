"""Where the time of a training step on a CPU goes: the default run, by kinds of operations.

    python benchmarks/speed/step_profile.py         about 10 minutes on two idle cores

Steps are profiled with the untrained policy and with that of the finished default run, at a
learning rate of 1e-9, which keeps it. PyTorch's profiler tells how long an operation takes itself,
without others that it calls. What two runs of different length differ by is due to the additional
steps: loading and evaluating are in both. The rest of a step is Python, and the profiler.

Writes `step_profile.md`.
"""

import sys
import tempfile
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[2]))

import grpo
from benchmarks.helpers import reporting
from benchmarks.speed.step_time import LEARNING_RATE, make_stages
from common.commandline import check
from common.environment import describe_environment

# fmt: off
KINDS = {  # of operations: words in their names; the first kind that fits counts
    "AdamW": ("_foreach", "_fused"),
    "attention": ("bmm", "attention", "softmax"),
    "linear layers and output head": ("mm", "linear", "convolution"),
    "copies and indexing": ("copy", "cat", "index", "clone", "gather", "select"),
    "element by element: norms, positions, gates": (
        "mul", "add", "sub", "div", "pow", "sqrt", "sum", "mean", "neg", "exp", "silu",
    ),
    "other operations": ("",),
}
# fmt: on
PHASES = {"wait": "sampling", "grade": "grading", "train": "training"}


@dataclass
class Args:
    stages: tuple[int, ...] = (0, 150)
    """after which steps of the default run to profile, in increasing order from 0"""
    threads: int = 2
    """CPU threads"""
    steps: int = 6
    """training steps of each profile; two more come first, for what happens only once"""
    output: Path = reporting.RESULTS
    """where the report goes"""


def run(model, args, num_steps, reference=True, profiled=True):
    """Run grpo.py in this process. Returns seconds by kind of operation, and the steps' records."""
    with tempfile.TemporaryDirectory() as directory:
        options = grpo.Args(
            model=model, device="cpu", threads=args.threads, num_steps=num_steps,
            learning_rate=LEARNING_RATE, reference_kl=reference, eval_size=1,
            eval_interval=num_steps, checkpoint_interval=num_steps, rollouts_interval=0,
            output=directory, name="run",
        )  # fmt: skip
        check(options)
        cpu = [torch.profiler.ProfilerActivity.CPU]
        profiler = torch.profiler.profile(activities=cpu) if profiled else nullcontext()
        with profiler:
            grpo.main(options)
        records = reporting.read_steps(Path(directory, "run"))
    seconds = Counter()
    for event in profiler.key_averages() if profiled else []:
        kind = next(kind for kind, words in KINDS.items() if any(w in event.key for w in words))
        seconds[kind] += event.self_cpu_time_total / 1e6
    return seconds, records


def profile(model, args):
    """Shares of the time of a step: by kind of operation, by phase, and of the reference."""
    short, _ = run(model, args, 2)
    long, records = run(model, args, 2 + args.steps)
    per_kind = {kind: (long[kind] - short[kind]) / args.steps for kind in KINDS}
    profiled = reporting.column(records, "time/step")[2:].mean()
    shares = {kind: seconds / profiled for kind, seconds in per_kind.items()}
    shares["Python, and the profiler"] = 1 - sum(shares.values())
    _, plain = run(model, args, 2 + args.steps, profiled=False)
    _, without = run(model, args, 2 + args.steps, reference=False, profiled=False)
    seconds = reporting.column(plain, "time/step")[2:].mean()
    phases = {
        f"phase: {name}": reporting.column(plain, f"time/{key}")[2:].mean() / seconds
        for key, name in PHASES.items()
    }
    reference = 1 - reporting.column(without, "time/step")[2:].mean() / seconds
    return seconds, shares, phases | {"of these, the reference's forward pass": reference}


def main(args):
    environment = describe_environment()
    with tempfile.TemporaryDirectory() as home:
        models = make_stages(grpo.Args().model, args.stages, home)
        found = [profile(models[stage], args) for stage in args.stages]
    header = ["", *(f"after {stage} steps" for stage in args.stages)]
    rows = [["seconds per step", *(f"{seconds:.2f}" for seconds, _, _ in found)]]
    for place in (2, 1):
        for name in found[0][place]:
            rows.append([name, *(f"{columns[place][name]:.0%}" for columns in found)])
    report = f"""# Where the time of a step goes on a CPU

`python benchmarks/speed/step_profile.py`: the default run with {args.threads} threads, with the
policy as it was after so many steps of it; means of {args.steps} steps. Phases and the reference
are shares of the time without the profiler, kinds of operations of the time with it. The
reference's share is what a step without it takes less.

{reporting.table(header, rows)}

Linear layers are matrix products that PyTorch leaves to MKL or oneDNN; no code of ours is between.
The reference can be switched off (`--no-reference-kl`); only a figure of the KL needs it.
"""
    reporting.write_report(args.output / "step_profile.md", report, environment)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
