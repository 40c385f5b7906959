"""The overhead of torchrun: one process with two threads, against two ranks with one thread each.

    python benchmarks/speed/ranks.py                  seven minutes on two idle cores

A random model of 24 million parameters trains on the same batches, at a learning rate of 1e-9, so
that every step is the same work. Each of the two ranks holds half of the weights, gradients,
moments and reference; in every pass they exchange weights and gradients with gloo. The two kinds of
runs alternate; times are medians over steps. Memory is measured with few tokens and two models, of
24 and 229 million parameters: what more the larger one takes is its state.

Writes `ranks.md`.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.helpers import reporting
from benchmarks.helpers.launcher import train
from benchmarks.helpers.random_model import save_random_model
from benchmarks.helpers.reporting import column, table
from common.models import TINY_MODEL, load_tokenizer

SIZES = (512, 8), (1152, 15)  # hidden size and layers
BYTES = {1: 20, 2: 20 / 2 + 4}  # per parameter, by number of ranks
KEYS = {"time/sample": "sampling", "time/train": "training", "time/step": "step"}


@dataclass
class Args:
    steps: int = 6
    """training steps of each run, of which the first does not count"""
    rounds: int = 2
    """how often both take their turn"""
    output: Path = reporting.RESULTS
    """where ranks.md goes"""


def make_model(directory, hidden, layers):
    """Save a random model with the bundled model's tokenizer; returns its number of parameters."""
    tokenizer = load_tokenizer(TINY_MODEL)
    sizes = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return save_random_model(directory, tokenizer, **sizes, **heads, **ids)


def run(ranks, model, name, directory, steps, prompts=8, group=4):
    """Train; returns the directory of the run. Memory is that of rank 0, at its peak."""
    options = {
        "model": model, "num_steps": steps, "prompts_per_step": prompts, "group_size": group,
        "eval_size": 2, "device": "cpu", "eval_interval": 1000, "checkpoint_interval": 1000,
        "learning_rate": 1e-9, "task": "benchmarks/helpers/turns.py:Turns",
    }  # fmt: skip
    return train("grpo", directory, name, ranks, threads=2 // ranks, **options)


def main(args):
    times, peaks = {1: [], 2: []}, {1: [], 2: []}
    with tempfile.TemporaryDirectory() as directory:
        paths = f"{directory}/small", f"{directory}/large"
        models = {make_model(path, *sizes): path for path, sizes in zip(paths, SIZES, strict=True)}
        for round_ in range(args.rounds):
            for ranks, runs in times.items():
                name = f"{ranks}-{round_}"
                runs.append(run(ranks, models[min(models)], name, directory, args.steps))
        for ranks, found in peaks.items():
            for parameters, model in models.items():
                run_dir = run(ranks, model, f"{ranks}-{parameters}", directory, 2, 2, 2)
                found.append(column(reporting.read_steps(run_dir), "memory/peak_gib").max())
        records = {
            ranks: [r for path in runs for r in reporting.read_steps(path)[1:]]
            for ranks, runs in times.items()
        }
        environment = reporting.environment_of(times[1][0]).replace(directory, "DIRECTORY")
    small, large = models
    time_rows = [
        [ranks, *(f"{np.median(column(steps, key)):.2f}" for key in KEYS)]
        for ranks, steps in records.items()
    ]
    memory_rows = []
    for ranks, found in peaks.items():
        held = BYTES[ranks] * (large - small) / 2**30
        numbers = (*found, found[1] - found[0], held)
        memory_rows.append([ranks, *(f"{number:.2f}" for number in numbers)])
    one, two = (np.median(column(records[ranks], "time/step")) for ranks in (1, 2))
    millions = [f"{number / 1e6:.0f} million" for number in models]
    report = f"""# Two ranks on two cores, against one process with two threads

`python benchmarks/speed/ranks.py`: a random model of {millions[0]} parameters, 8 × 4 responses a
step, medians over {args.rounds} runs of each. Two ranks take **{two / one:.2f}** times as long.

{table(["ranks", *(f"{name} (s)" for name in KEYS.values())], time_rows)}

Peak memory of rank 0 in GiB, with 2 × 2 responses a step. What the larger model takes more is
mostly its state: weights, gradients, two moments and the reference, 20 bytes per parameter. Of two
ranks, each holds half, and all weights while it samples: 14 bytes. The rest of a peak is Python
with its libraries, and activations.

{table(["ranks", *millions, "difference", "computed"], memory_rows)}
"""
    reporting.write_report(args.output / "ranks.md", report, environment)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
