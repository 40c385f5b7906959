"""A pretrained model, SmolLM2-135M-Instruct, trained on a CPU: two tasks, and a reward that is
shaped badly.

    pip install gguf accelerate
    python benchmarks/models/pretrained.py              15 runs in bf16, two at a time; 50 minutes
    python benchmarks/models/pretrained.py --quick      GRPO in miniature, to see that it works
    python benchmarks/models/pretrained.py --gsm8k DIR  besides, two steps on GSM8K, which is in DIR

`smollm2.py` fetches and converts the model (600 MB), and the tasks are those of `chat_tasks.py`.
`Sentiment` is learned in a few steps, by three algorithms: nearly all that the model lacks is the
format. The other two are trained with GRPO. `Extraction` takes longer. `FourKeys` is a lesson: its
reward rises, and what one wants does not.

Writes a figure per task, `curves.csv`, `completions.md` (answers to the first ten held-out
problems, before and after) and `report.md`. Repeat the command to continue where it was stopped.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.evaluate import greedy_answers
from benchmarks.figures.algorithms import COLOURS, SCRIPTS
from benchmarks.helpers import reporting
from benchmarks.helpers.launcher import Run, as_options, run_all
from benchmarks.helpers.reporting import PANELS, arrow, column, table
from benchmarks.models import smollm2
from common.curves import read_metrics

TASKS = {  # steps, tokens of a response at most, and which algorithms
    "Sentiment": (5, 16, list(SCRIPTS)),
    "Extraction": (10, 48, ["GRPO"]),
    "FourKeys": (8, 64, ["GRPO"]),
}
TASK_FILE = "benchmarks/models/chat_tasks.py"
SHARED = {"precision": "bfloat16", "threads": 1, "serial": True, "checkpoint_interval": 1000}


@dataclass
class Args:
    tasks: tuple[Literal["Sentiment", "Extraction", "FourKeys"], ...] = tuple(TASKS)
    """which of the tasks"""
    learning_rate: float = 1e-5
    """of all runs"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds of each algorithm on each task"""
    eval_size: int = 32
    """held-out problems"""
    jobs: int = 2
    """how many runs at a time, one thread each"""
    gsm8k: Path | None = None
    """directory with train.jsonl and test.jsonl of GSM8K, to run two steps on"""
    quick: bool = False
    """GRPO, two steps of 4 × 4 responses, one seed, into directories of their own"""
    model: Path = reporting.RUNS / "smollm2"
    """where the converted model is, or is put"""
    runs: Path = reporting.RUNS / "pretrained"
    """where the training runs go, and are looked for when the command is repeated"""
    output: Path = reporting.RESULTS / "pretrained"
    """where figures, completions and report go"""


def main(args):
    smollm2.main(args.model)
    tasks = {task: TASKS[task] for task in args.tasks}
    P = G = 8
    if args.quick:
        tasks = {task: (2, tokens, labels[:1]) for task, (_, tokens, labels) in tasks.items()}
        args.seeds, args.eval_size = args.seeds[:1], 8
        P = G = 4
        reporting.use_quick_directories(args, Args.output)
    parts, curves = [], {}
    for task, (steps, tokens, labels) in tasks.items():
        options = {
            **SHARED, "model": args.model, "task": f"{TASK_FILE}:{task}",
            "learning_rate": args.learning_rate, "prompts_per_step": P, "group_size": G,
            "max_response_tokens": tokens, "eval_size": args.eval_size, "eval_interval": 2,
        }  # fmt: skip
        groups, runs = {}, []
        for label in labels:
            names = [f"{task}-{SCRIPTS[label]}-{seed}" for seed in args.seeds]
            for name, seed in zip(names, args.seeds, strict=True):
                runs.append(Run(name, SCRIPTS[label], as_options(options | {"seed": seed})))
            groups[label] = [args.runs / name for name in names]
        run_all(runs, steps, args.runs, args.jobs)
        groups = {label: [read_metrics(path) for path in paths] for label, paths in groups.items()}
        panels = dict(PANELS)
        if task == "FourKeys":
            panels["keys_present"] = "share of the keys present"
        reporting.plot_runs(args.output / f"{task.lower()}.png", groups, COLOURS, panels)
        curves |= {f"{task}, {label}": records for label, records in groups.items()}
        parts.append(section(task, groups, steps))
    columns = ["step", *PANELS, "keys_present"]
    reporting.write_curves(args.output / "curves.csv", curves, args.seeds, columns)
    (args.output / "completions.md").write_text(completions(tasks, args))
    if args.gsm8k:
        parts.append(on_gsm8k(args))
    options = f"--tasks {' '.join(tasks)} --seeds {' '.join(map(str, args.seeds))}"
    report = f"""# SmolLM2-135M-Instruct, trained on two CPU cores

`python benchmarks/models/pretrained.py {options}`:
{P} × {G} responses a step, learning rate {args.learning_rate:g}, bf16, `sync_interval` 1,
{args.eval_size} held-out problems. Lines are means over seeds, bands their range.
[completions.md](completions.md) has answers before and after, not selected. The weights come from a
4-bit file (see `smollm2.py`).

{chr(10).join(parts)}"""
    first = f"{next(iter(tasks))}-grpo-{args.seeds[0]}"
    environment = reporting.environment_of(args.runs / first)
    reporting.write_report(args.output / "report.md", report, environment)


def section(task, groups, steps):
    """The part of the report about one task."""
    rows = []
    for label, runs in groups.items():
        reward, kl, length = (
            [column(records, key)[[0, -1]] for records in runs]
            for key in ("reward/mean", "kl/ref_k2", "response_length/mean")
        )
        accuracy = [column(records, "eval/accuracy") for records in runs]
        peak = max(column(records, "memory/peak_gib").max() for records in runs)
        after = ", ".join(f"{values[-1]:.2f}" for values in accuracy)
        rows.append([label, of_seeds(reward), f"{accuracy[0][0]:.2f}", after])
        rows[-1] += [of_seeds(length, ".1f"), f"{np.mean(kl, axis=0)[1]:.3f}", f"{peak:.1f}"]
    header = ["algorithm", "sampled reward", "held-out accuracy before", "after, by seed"]
    header += ["length", "KL at the end", "peak memory (GiB)"]
    lesson = ""
    if task == "FourKeys":
        keys, exact = (
            [column(records, key)[[0, -1]] for records in groups["GRPO"]]
            for key in ("keys_present", "eval/accuracy")
        )
        lesson = f"""
The reward is the share of right values among four: {of_seeds(reward)} sampled. Of the four keys,
{of_seeds(keys)} are present: without one, an answer cannot be right as a whole. Exact match on
held-out problems: {of_seeds(exact)}.
"""
    about = {
        "Sentiment": "One word, positive or negative.",
        "Extraction": "A sentence as JSON with three keys; only an exact match is rewarded.",
        "FourKeys": "Four keys, and a reward that is shaped badly.",
    }
    return f"""## {task}: {steps} steps

{about[task]}

![{task}]({task.lower()}.png)

{table(header, rows)}
{lesson}"""


def of_seeds(ends, form=".2f"):
    """Means over seeds of the first and the last value, as text."""
    return arrow(np.mean(ends, axis=0), form)


def completions(tasks, args):
    """A page of greedy answers to the first ten held-out problems of each task, before and after
    training (first seed).
    """
    page = [
        "# Answers before and after, to the first ten held-out problems",
        "Greedy, with the runs of the first seed.",
    ]
    for task, (_, tokens, labels) in tasks.items():
        models = {"before": args.model}
        for label in labels:
            models[label] = args.runs / f"{task}-{SCRIPTS[label]}-{args.seeds[0]}" / "model"
        paths, name = list(models.values()), f"{TASK_FILE}:{task}"
        problems, found = greedy_answers(paths, name, 10, tokens, "bfloat16")
        columns = [[problem["prompt"][0]["content"].split("\n")[0] for problem in problems]]
        columns += [[text for text, _ in answers] for answers in found]
        rows = [map(cell, row) for row in zip(*columns, strict=True)]
        page += [f"## {task}", table(["problem", *models], rows)]
    return "\n\n".join(page) + "\n"


def cell(text):
    """Text of a model in a cell of a Markdown table, whatever it contains."""
    return "`" + text.replace("`", "'").replace("|", "\\|").replace("\n", "⏎") + "`"


def on_gsm8k(args):
    """Two steps on GSM8K, and what they show."""
    options = {
        **SHARED, "model": args.model, "task": "gsm8k", "data": args.gsm8k / "train.jsonl",
        "eval_data": args.gsm8k / "test.jsonl", "learning_rate": args.learning_rate,
        "prompts_per_step": 2, "max_response_tokens": 256, "eval_size": 16, "eval_interval": 1000,
    }  # fmt: skip
    run_all([Run("gsm8k", "grpo", as_options(options))], 2, args.runs, args.jobs)
    records = read_metrics(args.runs / "gsm8k")
    accuracy = column(records, "eval/accuracy")[0]
    right = round(16 * column(records, "reward/mean").sum())
    return f"""## GSM8K (`--gsm8k`): out of reach for this model

{right} of 32 sampled answers and {accuracy:.0%} of 16 greedy ones were right. Where every reward is
0 there is nothing to learn from: it takes a larger model, easier problems first, or examples to
imitate.
"""


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
