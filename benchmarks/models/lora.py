"""Full training and LoRA: what is learned, how fast, in how much memory.

    pip install gguf accelerate
    python benchmarks/models/lora.py            about 45 minutes on two otherwise idle cores
    python benchmarks/models/lora.py --quick    in miniature, to see that it works

Two tasks: the default run, and `Extraction` of `chat_tasks.py` with SmolLM2-135M-Instruct in bf16,
which `smollm2.py` fetches and converts. Each is trained with all weights and with adapters of
several ranks. Besides, a comparison that should come out even: an adapter as wide as the layers can
reach every weight, so that its first steps should resemble those of full training.

Runs follow one another, since they are timed. Writes a figure per task, `curves.csv` and
`report.md`. Repeat the command to continue where it was stopped.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.helpers import reporting
from benchmarks.helpers.launcher import Run, as_options, run_all
from benchmarks.helpers.reporting import PANELS, arrow, column, final, table
from benchmarks.models import smollm2
from common.curves import read_metrics

FULL = "all weights"


@dataclass
class Args:
    ranks: tuple[int, ...] = (1, 8, 32)
    """ranks of the adapters"""
    seed: int = 1
    """of all runs"""
    steps: tuple[int, int] = (150, 10)
    """training steps of the default run, and of Extraction"""
    learning_rate: tuple[float, float] = (2e-3, 1e-4)
    """of the adapters, in the default run and in Extraction: ten times those of full training"""
    quick: bool = False
    """two steps of 4 × 4 responses, rank 8 only, into directories of their own"""
    model: Path = reporting.RUNS / "smollm2"
    """where the converted model is, or is put"""
    runs: Path = reporting.RUNS / "lora"
    """where the training runs go, and are looked for when the command is repeated"""
    output: Path = reporting.RESULTS / "lora"
    """where figures and report go"""


def options_of(task, args):
    """The options of a task's runs, and the learning rate of full training."""
    options = {"serial": True, "checkpoint_interval": 1000, "seed": args.seed, "threads": 2}
    rate = 2e-4  # the scripts' default
    if task == "Extraction":
        rate = 1e-5  # that of pretrained.py
        options |= {
            "model": args.model, "task": "benchmarks/models/chat_tasks.py:Extraction",
            "precision": "bfloat16", "prompts_per_step": 8, "group_size": 8,
            "max_response_tokens": 48, "eval_size": 32, "eval_interval": 2,
        }  # fmt: skip
    if args.quick:
        options |= {"prompts_per_step": 4, "group_size": 4, "eval_size": 8}
    return options, rate


def train(task, settings, steps, args):
    """Bring the runs of {label: options} to that many steps. Returns {label: [records]}."""
    shared, _ = options_of(task, args)
    names = {label: f"{task}-{label}".replace(" ", "_") for label in settings}
    runs = [Run(names[label], "grpo", as_options(shared | own)) for label, own in settings.items()]
    run_all(runs, steps, args.runs, jobs=1)
    return {label: [read_metrics(args.runs / name)] for label, name in names.items()}


def row(label, records, run_dir):
    """What a run has learned, and at what cost: cells of a table."""
    steps = [record for record in records if record["step"] > 0]
    checkpoint = max((run_dir / "checkpoints").glob("*.pt"))
    return [
        label,
        arrow(column(records, "eval/accuracy"), ".2f"),
        arrow((steps[0]["reward/mean"], final(steps, "reward/mean")), ".2f"),
        f"{final(steps, 'kl/ref_k2'):.3f}",
        f"{column(steps, 'sampler_mismatch/mean').mean():.2g}",
        *(f"{np.median(column(steps, key)):.2f}" for key in ("time/step", "time/train")),
        f"{column(steps, 'memory/peak_gib').max():.2f}",
        f"{checkpoint.stat().st_size / 1e6:.1f}",
    ]


HEADER = ["what learns", "held-out accuracy", "reward", "KL at the end", "mean mismatch (nats)"]
HEADER += ["s per step", "training", "peak memory (GiB)", "checkpoint (MB)"]


def compare(task, steps, adapter_rate, args):
    """A part of the report: full training and adapters on one task."""
    _, full_rate = options_of(task, args)
    settings = {FULL: {"learning_rate": full_rate}}
    for rank in args.ranks:
        settings[f"rank {rank}"] = {"learning_rate": adapter_rate, "lora_rank": rank}
    groups = train(task, settings, steps, args)
    colours = dict(zip(groups, ("tab:gray", "tab:blue", "tab:orange", "tab:green"), strict=False))
    name = f"{task.lower()}.png"
    reporting.plot_runs(args.output / name, groups, colours, PANELS)
    rows = [
        row(label, records, args.runs / f"{task}-{label}".replace(" ", "_"))
        for label, (records,) in groups.items()
    ]
    text = f"""## {task}: {steps} steps

Learning rate {full_rate:g} for all weights, {adapter_rate:g} for adapters, α = 32.

{table(HEADER, rows)}

![Reward, accuracy, length, entropy, KL]({name})
"""
    return text, {f"{task}, {label}": runs for label, runs in groups.items()}


def first_steps(args):
    """A part of the report: an adapter as wide as the layers, and full training."""
    steps, rate = 2 if args.quick else 8, 2e-5
    settings = {
        f"{FULL}, first steps": {"learning_rate": rate},
        "rank 256, first steps": {"learning_rate": rate, "lora_rank": 256, "lora_alpha": 256.0},
    }
    groups = train("default", settings, steps, args)
    rows = []
    for key in ("reward/mean", "response_length/mean", "kl/ref_k2"):
        for label, (records,) in groups.items():
            values = column([record for record in records if record["step"] > 0], key)
            rows.append([key, label, *(f"{value:.3g}" for value in values)])
    return f"""## An adapter as wide as the layers

The default run's first steps at a learning rate of {rate:g}, α / rank = 1. AdamW gives each number
of A, B and W updates of about that size, so that W + B A moves by other amounts than W alone: the
directions should agree, not the values.

{table(["metric", "what learns", *(f"step {k}" for k in range(1, steps + 1))], rows)}
"""


def main(args):
    smollm2.main(args.model)
    if args.quick:
        args.ranks, args.steps = (8,), (2, 2)
        reporting.use_quick_directories(args, Args.output)
    parts, curves = [], {}
    for task, steps, rate in zip(
        ("default", "Extraction"), args.steps, args.learning_rate, strict=True
    ):
        text, groups = compare(task, steps, rate, args)
        parts.append(text)
        curves |= groups
    parts.append(first_steps(args))
    reporting.write_curves(args.output / "curves.csv", curves, [args.seed], ["step", *PANELS])
    report = f"""# Full training and LoRA

`python benchmarks/models/lora.py`: GRPO, seed {args.seed}, two threads. One seed each: differences
of a few hundredths mean nothing. Rows are timed one after the other, on a machine whose speed
drifts: compare their seconds with care. A checkpoint of an adapter has its weights and
moments only. Peak memory is that of the process, with Python and PyTorch. Rewards are that of
the first step and the mean of the last tenth, KLs the latter.

{chr(10).join(parts)}"""
    environments = [
        reporting.environment_of(args.runs / f"{task}-all_weights")
        for task in ("default", "Extraction")
    ]
    reporting.write_report(args.output / "report.md", report, "\n\n".join(environments))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
