"""The overhead of torchrun: one process with two threads, against two ranks with one thread each.

    python benchmarks/speed/ranks.py                  a quarter of an hour on two idle cores

A random model of 24 million parameters trains on the same batches, at a learning rate of 1e-9, so
that every step is the same work. Each of the two ranks holds half of the weights, gradients,
moments and reference; in every pass they exchange weights and gradients with gloo.

Where the time goes, two more kinds of runs tell, which exchange less: two ranks that each hold
everything (`--replicas 2`) and only sum gradients; and two processes that know nothing of each
other, with one thread and half of the prompts each, at the same time. The kinds take turns; times
are medians over steps.

Memory is measured with few tokens and two models, of 24 and 229 million parameters: what more the
larger one takes is its state.

Writes `ranks.md`.
"""

import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
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
KINDS = ["one process", "two strangers", "two replicas", "two ranks"]


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


def run(ranks, model, name, directory, steps, prompts=8, group=4, **more):
    """Train; returns the directory of the run. Memory is that of rank 0, at its peak."""
    options = {
        "model": model, "num_steps": steps, "prompts_per_step": prompts, "group_size": group,
        "eval_size": 2, "device": "cpu", "eval_interval": 1000, "checkpoint_interval": 1000,
        "learning_rate": 1e-9, "task": "benchmarks/helpers/turns.py:Turns",
    }  # fmt: skip
    return train("grpo", directory, name, ranks, **{"threads": 2 // ranks} | options | more)


def run_kind(kind, *where_and_what):
    """Runs of one of the `KINDS`; returns their directories."""
    model, name, directory, steps = where_and_what
    if kind == "one process":
        return [run(1, *where_and_what)]
    if kind != "two strangers":
        return [run(2, *where_and_what, replicas=2 if kind == "two replicas" else 1)]
    half = {"prompts": 4, "threads": 1}
    with ThreadPoolExecutor(2) as pool:
        names = [f"{name}-{number}" for number in range(2)]
        both = [pool.submit(run, 1, model, name, directory, steps, **half) for name in names]
        return [one.result() for one in both]


def main(args):
    times, peaks = {kind: [] for kind in KINDS}, {1: [], 2: []}
    with tempfile.TemporaryDirectory() as directory:
        paths = f"{directory}/small", f"{directory}/large"
        models = {make_model(path, *sizes): path for path, sizes in zip(paths, SIZES, strict=True)}
        for round_ in range(args.rounds):
            for kind, runs in times.items():
                name = f"{kind}-{round_}".replace(" ", "-")
                runs += run_kind(kind, models[min(models)], name, directory, args.steps)
        for ranks, found in peaks.items():
            for parameters, model in models.items():
                run_dir = run(ranks, model, f"{ranks}-{parameters}", directory, 2, 2, 2)
                found.append(column(reporting.read_steps(run_dir), "memory/peak_gib").max())
        records = {
            kind: [r for path in runs for r in reporting.read_steps(path)[1:]]
            for kind, runs in times.items()
        }
        environment = reporting.environment_of(times[KINDS[0]][0]).replace(directory, "DIRECTORY")
    report = write_text(records, peaks, models, args)
    reporting.write_report(args.output / "ranks.md", report, environment)


def write_text(records, peaks, models, args):
    small, large = models
    seconds = {
        kind: [np.median(column(steps, key)) for key in KEYS] for kind, steps in records.items()
    }
    one = seconds[KINDS[0]]
    time_rows = [
        [kind, *(f"{a:.2f} ({a / b:.2f} ×)" for a, b in zip(values, one, strict=True))]
        for kind, values in seconds.items()
    ]
    memory_rows = []
    for ranks, found in peaks.items():
        held = BYTES[ranks] * (large - small) / 2**30
        numbers = (*found, found[1] - found[0], held)
        memory_rows.append([ranks, *(f"{number:.2f}" for number in numbers)])
    ratios = {kind: values[-1] / one[-1] for kind, values in seconds.items()}
    millions = [f"{number / 1e6:.0f} million" for number in models]
    return f"""# Two ranks on two cores, against one process with two threads

`python benchmarks/speed/ranks.py`: a random model of {millions[0]} parameters, 8 × 4 responses a
step, medians over {args.rounds} runs of each. Two ranks take **{ratios["two ranks"]:.2f}** times as
long.

{table(["", *(f"{name} (s)" for name in KEYS.values())], time_rows)}

- Two strangers, with one thread and half of the prompts each, exchange nothing at all: what they
  take more than one process ({ratios["two strangers"]:.2f} ×) is work that half of the prompts does
  not halve, Python for each token for one. Two ranks cannot take less.
- Two replicas (`--replicas 2`) hold everything twice, wait for each other, and sum gradients
  ({ratios["two replicas"]:.2f} ×).
- Two ranks hold half of everything, and so gather the weights for every pass, too.

Peak memory of rank 0 in GiB, with 2 × 2 responses a step. What the larger model takes more is
mostly its state: weights, gradients, two moments and the reference, 20 bytes per parameter. Of two
ranks, each holds half, and all weights while it samples: 14 bytes. The rest of a peak is Python
with its libraries, and activations.

{table(["ranks", *millions, "difference", "computed"], memory_rows)}
"""


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
