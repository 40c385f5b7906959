"""A whole training run with `grpo.py` and with TRL's `GRPOTrainer`: do both learn the same, and how
long do they take?

    pip install -r benchmarks/requirements.txt
    python benchmarks/figures/against_trl.py            half an hour on two idle cores
    python benchmarks/figures/against_trl.py --quick    in miniature, to see that it works
    python benchmarks/figures/against_trl.py --runs-of default Extraction       an hour

Two kinds of runs: the default run, and `Extraction` of `models/chat_tasks.py` with
SmolLM2-135M-Instruct in bf16, for ten steps (`pip install gguf accelerate`; `models/smollm2.py`
fetches the model). Each is made with three seeds, and the two sides take turns: a machine that
slows down slows both.

Both sides get the same model, prompts in the same order, reward function, learning rate and so on
(`helpers/trl_trainer.py`). None computes a KL. What is left are details, which the report lists.
So if both are right, their rewards differ by chance only: the bands of the curves over steps should
overlap. Held-out accuracy is measured by the same code for both, with the models that they leave.

Writes a figure for each kind of runs, `curves.csv`, `against_trl.json` and `report.md`. Repeat the
command to continue where it was stopped; a run that was stopped itself is made again, since it is
timed.
"""

import os
import shutil
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.evaluate import greedy_answers
from benchmarks.helpers import reporting, trl_trainer
from benchmarks.helpers.launcher import train
from benchmarks.helpers.reporting import SPREAD, column, table
from benchmarks.helpers.trl_trainer import DEFAULTS, TrlRun
from benchmarks.models import smollm2
from common.models import location
from common.plots import (
    SMOOTHING,
    difference,
    moving_average,
    new_figure,
    plot_band,
    save_figure,
)

OURS, THEIRS = "grpo.py", "TRL"
COLOURS = {OURS: "tab:blue", THEIRS: "tab:orange"}
REWARD = "reward/mean"
PARTS = 6  # of a run, whose mean rewards are compared


DIFFERENCES = [
    ("mean of the loss", "over all tokens of a batch", "by default, over those of a response first",
     '`loss_type="dapo"`, as in `grpo.py`'),
    ("reference", "computed, for the KL that is logged", "computed for a KL penalty only",
     "none: `--no-reference-kl`, `beta=0`"),
    ("precision on a CPU", "float32 by default", "bf16 by default",
     "float32 in the default run, bf16 with SmolLM2"),
    ("gradient checkpointing", "off by default", "on by default", "off"),
    ("order of problems", "shuffled, by the seed", "shuffled, by the seed",
     "`shuffle_dataset=False`, with rows in our order"),
    ("π_old", "recorded when a token is sampled", "π itself, without its gradient: ρ = 1",
     "left: the same on fresh batches, up to rounding"),
    ("σ of a group", "of the population, + 1e-6", "of a sample, + 1e-4",
     "left: advantages are 0.935 times ours, a scale that AdamW all but ignores"),
    ("groups of equal rewards", "no backward pass", "a full one",
     "left: the same gradient in more time"),
    ("micro-batches", "as many tokens as fit, long responses apart from short ones",
     "a number of sequences", "left: the same gradient"),
    ("sampler", "our own", "`model.generate` of transformers",
     "left: the same distribution, but other random numbers; vLLM is an option of both sides"),
]  # fmt: skip


@dataclass
class Kind:
    """One kind of runs."""

    about: str
    options: dict
    """of both sides, as in grpo.py"""
    trl_batch_size: int
    """sequences in one of TRL's micro-batches"""
    goal: float
    """a reward; how long does it take to get there?"""
    smoothing: int
    """steps of a moving average of the reward"""
    held_out: int = 256
    """problems"""
    quick: dict = field(default_factory=dict)
    """what a run in miniature changes in the options"""


KINDS = {
    "default": Kind(
        about="the default run",
        options={
            "model": DEFAULTS.model,
            "task": DEFAULTS.task,
            "num_steps": DEFAULTS.num_steps,
            "prompts_per_step": DEFAULTS.prompts_per_step,
            "max_response_tokens": DEFAULTS.max_response_tokens,
            "learning_rate": DEFAULTS.learning_rate,
            "precision": "float32",
        },
        trl_batch_size=128,
        goal=0.9,
        smoothing=SMOOTHING,
        quick={"num_steps": 12, "prompts_per_step": 16},
    ),
    "Extraction": Kind(
        about="SmolLM2-135M-Instruct, a sentence as JSON",
        options={
            "model": "",  # where the converted model is
            "task": "benchmarks/models/chat_tasks.py:Extraction",
            "num_steps": 10,
            "prompts_per_step": 8,
            "max_response_tokens": 48,
            "learning_rate": 1e-5,
            "precision": "bfloat16",
        },
        trl_batch_size=16,
        goal=0.5,
        smoothing=3,
        held_out=64,
        quick={"num_steps": 2, "prompts_per_step": 2},
    ),
}


@dataclass
class Args:
    runs_of: tuple[Literal["default", "Extraction"], ...] = ("default",)
    """which kinds of runs"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds of each side"""
    threads: int = 2
    """CPU threads of each side"""
    quick: bool = False
    """a few steps of small batches, one seed, into directories of their own"""
    model: Path = reporting.RUNS / "smollm2"
    """where the converted SmolLM2 is, or is put"""
    runs: Path = reporting.RUNS / "against_trl"
    """where the training runs go, and are looked for when the command is repeated"""
    output: Path = reporting.RESULTS / "against_trl"
    """where figures and report go"""


def run_side(side, kind, seed, directory, args):
    """One run; returns its steps, each with the seconds since the first one began."""
    options = kind.options | {"seed": seed, "threads": args.threads}
    if not (directory / "finished").exists():
        shutil.rmtree(directory, ignore_errors=True)
        if side == OURS:
            once = dict.fromkeys(("eval_interval", "checkpoint_interval"), options["num_steps"])
            more = once | {"eval_size": 1, "device": "cpu", "reference_kl": False}
            train("grpo", directory.parent, directory.name, **options | more)
        else:
            directory.mkdir(parents=True)
            more = {"batch_size": kind.trl_batch_size, "save_model": True}
            options["model"] = location(options["model"])
            trl_trainer.run_trl(TrlRun(str(directory), **options | more))
        (directory / "finished").touch()
    read = reporting.read_steps if side == OURS else trl_trainer.read_steps
    records = read(directory)
    seconds = np.cumsum(column(records, "time/step"))
    return [record | {"seconds": s} for record, s in zip(records, seconds, strict=True)]


def plot(groups, kind, path):
    """Reward over steps and over time."""
    figure, axes = new_figure(["reward", "reward"], "training steps")
    axes[1].set_xlabel("seconds of training")
    for axis, x in zip(axes, ("step", "seconds"), strict=True):
        for side, runs in groups.items():
            plot_band(axis, runs, REWARD, x, side, COLOURS[side], kind.smoothing)
    save_figure(figure, axes[0], path)


def smoothed(runs, kind):
    """Rewards of all runs, [seeds, steps]."""
    return np.array([moving_average(column(run, REWARD), kind.smoothing) for run in runs])


def seconds_to(goal, records, kind):
    """When the smoothed reward first reaches the goal; infinity if it never does."""
    reached = smoothed([records], kind)[0] >= goal
    return min(column(records, "seconds")[reached], default=np.inf)


def compare_rewards(groups, kind):
    """Whether the two sides learn the same: text with a table, and what it comes to, as a dict."""
    ours, theirs = (smoothed(groups[side], kind) for side in (OURS, THEIRS))
    overlap = np.maximum(ours.min(axis=0), theirs.min(axis=0)) <= np.minimum(
        ours.max(axis=0), theirs.max(axis=0)
    )
    rows, apart = [], 0
    steps = np.arange(1, ours.shape[1] + 1)
    plain = [np.array([column(run, REWARD) for run in groups[side]]) for side in (OURS, THEIRS)]
    for part in np.array_split(steps, min(PARTS, len(steps) // 2)):
        means = [rewards[:, part - 1].mean(axis=1) for rewards in plain]
        verdict = difference(*means)
        apart += verdict != SPREAD
        cells = [f"{m.mean():.3f} ({', '.join(f'{value:.3f}' for value in m)})" for m in means]
        spread = sum(map(np.ptp, means))
        rows.append([f"{part[0]} to {part[-1]}", *cells, f"{spread:.3f}", verdict])
    header = ["steps", f"{OURS}, mean (by seed)", f"{THEIRS}, mean (by seed)"]
    header += ["differences count from", f"{OURS} is"]
    text = f"""The bands of the two curves overlap at {overlap.sum()} of {overlap.size} steps. Mean
rewards of parts of the run; a difference counts if it is larger than the ranges of both sides'
seeds added up:

{table(header, rows)}"""
    return text, {"steps_with_overlap": int(overlap.sum()), "parts_apart": apart}


def compare_sides(groups, accuracies, kind):
    """Accuracy, time and memory of both sides: a table, and the ratios as a dict."""
    rows, values = [], {}
    for side, runs in groups.items():
        total = np.array([run[-1]["seconds"] for run in runs])
        to_goal = np.array([seconds_to(kind.goal, run, kind) for run in runs])
        peak = max(column(run, "memory/peak_gib").max() for run in runs)
        accuracy = ", ".join(f"{share:.3f}" for share in accuracies[side])
        rows.append([side, f"{np.mean(accuracies[side]):.3f} ({accuracy})", seconds_of(to_goal)])
        rows[-1] += [seconds_of(total), f"{peak:.2f}"]
        values[side] = (to_goal, total)
    ratios = {}
    for i, name in enumerate(("to_goal", "whole_run")):
        ours, theirs = (np.mean(values[side][i]) for side in (OURS, THEIRS))
        ratios[name] = float(theirs / ours) if np.isfinite([ours, theirs]).all() else None
    cells = ["" if ratio is None else f"{ratio:.2f}" for ratio in ratios.values()]
    rows.append(["ratio", "", *cells, ""])
    header = ["", "held-out accuracy, greedy (by seed)", f"seconds to a reward of {kind.goal:.2f}"]
    return table([*header, "seconds of all steps", "peak memory (GiB)"], rows), ratios


def seconds_of(values):
    """The mean of some seconds, and each of them; infinity is "never"."""
    mean, *each = (
        "never" if np.isinf(value) else f"{value:.0f}" for value in (np.mean(values), *values)
    )
    return f"{mean} ({', '.join(each)})"


def main(args):
    os.environ["HF_HUB_OFFLINE"] = "1"  # for all processes that this one starts
    kinds = {name: KINDS[name] for name in args.runs_of}
    if args.quick:
        args.seeds = args.seeds[:1]
        reporting.use_quick_directories(args, Args.output)
    if "Extraction" in kinds:
        smollm2.main(args.model)
        kinds["Extraction"].options["model"] = str(args.model)
    for kind in kinds.values() if args.quick else ():
        kind.options |= kind.quick
        kind.trl_batch_size, kind.held_out = 16, 16
    load = os.getloadavg()[0]
    parts, curves, results = [], {}, {}
    turns = [(name, seed, side) for name in kinds for seed in args.seeds for side in COLOURS]
    groups = {name: {side: [] for side in COLOURS} for name in kinds}

    def directory(name, side, seed):
        return args.runs.resolve() / f"{name}-{side}-{seed}"

    for name, seed, side in tqdm(turns, unit="run"):
        found = run_side(side, kinds[name], seed, directory(name, side, seed), args)
        groups[name][side].append(found)
    for name, kind in kinds.items():
        models = {
            side: [directory(name, side, seed) / "model" for seed in args.seeds] for side in COLOURS
        }
        before, accuracies = held_out(kind, models)
        plot(groups[name], kind, args.output / f"{name.lower()}.png")
        section, results[name] = write_section(name, kind, groups[name], before, accuracies)
        parts.append(section)
        curves |= {f"{name}, {side}": runs for side, runs in groups[name].items()}
    keys = ["step", "seconds", REWARD, "response_length/mean", "reward/zero_std_groups"]
    reporting.write_curves(args.output / "curves.csv", curves, args.seeds, keys)
    reporting.write_json(args.output / "against_trl.json", **results)
    first = directory(next(iter(kinds)), OURS, args.seeds[0])
    environment = reporting.environment_of(first)
    environment += "".join(f"\n{name}: {version(name)}" for name in ("trl", "accelerate"))
    reporting.write_report(args.output / "report.md", write_text(parts, args, load), environment)


def held_out(kind, models):
    """Greedy accuracy on held-out problems: of the model before training, and by side of those
    after it.
    """
    start = Path(location(kind.options["model"]))
    asked = (kind.options["task"], kind.held_out, kind.options["max_response_tokens"])
    everything = [start, *models[OURS], *models[THEIRS]]
    _, found = greedy_answers(everything, *asked, kind.options["precision"])
    before, *after = (np.mean([reward for _, reward in answers]) for answers in found)
    middle = len(models[OURS])
    return before, {OURS: after[:middle], THEIRS: after[middle:]}


def write_section(name, kind, groups, before, accuracies):
    """The part of the report about one kind of runs, and its numbers as a dict."""
    rewards, same = compare_rewards(groups, kind)
    sides, ratios = compare_sides(groups, accuracies, kind)
    options = kind.options
    settings = f"""P = {options["prompts_per_step"]}, G = {DEFAULTS.group_size}, at most
{options["max_response_tokens"]} tokens, learning rate {options["learning_rate"]:g},
{options["precision"]}; TRL in micro-batches of {kind.trl_batch_size} sequences"""
    text = f"""## {name}: {kind.about}, {options["num_steps"]} steps

![reward over steps, and over time]({name.lower()}.png)

{rewards}

{sides}

Accuracy before training, on the same {kind.held_out} problems: {before:.3f}. Rewards are smoothed
over {kind.smoothing} steps before they count as reaching a goal. The ratio is TRL's mean divided by
ours. {settings}."""
    return text, same | ratios | {
        "accuracy": {k: list(map(float, v)) for k, v in accuracies.items()}
    }


def write_text(parts, args, load):
    sections = "\n\n".join(parts)
    return f"""# Whole runs: grpo.py and TRL {version("trl")}

`python benchmarks/figures/against_trl.py --runs-of {" ".join(args.runs_of)}`: seeds
{", ".join(map(str, args.seeds))}, {args.threads} threads, the two sides in turns. Lines are means
over seeds, bands their range. Seconds count the steps only: sampling, grading and training, no
loading, no evaluation. No side computes a KL.

{sections}

## What TRL does differently, and what was set to make it equal

{table(["", "`grpo.py`", "TRL", "set"], DIFFERENCES)}

Load average of the minute before the start: {load:.2f}.
"""


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
