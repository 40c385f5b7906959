"""How long the training steps of the default run take, `grpo.py` against TRL's `GRPOTrainer`.

    pip install -r benchmarks/requirements.txt
    python benchmarks/speed/step_time.py            about 40 minutes on two idle cores

A step is: sample G responses to each of P prompts, grade them, make one update. Both sides get the
same model directory, the same prompts in the same order, the same reward function, group size,
token limit, float32, device (CPU) and number of threads. Short runs take turns, A B C D A B C D …,
each in a process of its own, so that a machine that slows down slows all of them. The first steps
of each are warm-up. Medians are compared within a round, and the rounds' ratios are averaged.

The work of a step changes while a model learns: responses get shorter, and more groups have equal
rewards. So the default run is made first, and steps are timed with its policy as it was after
several of its steps, at a learning rate of 1e-9 on both sides, which keeps that policy: left to
learn by themselves, the two sides would soon do different work. The time of the whole run follows
by the trapezoid rule.

`helpers/trl_trainer.py` says how TRL is set up and what is timed: a step from before sampling to
after the update, without evaluation. Its micro-batches have the fastest of several sizes, which are
tried first. It samples with `model.generate`; its options for vLLM and Liger are not used.
Nothing is reported if mean response lengths differ by more than 5 %.
TRL's sampler reports no log-probs, so that it has less to do there; it treats the policy that
sampled the batch as equal to the one being trained. `grpo.py` skips the backward pass of groups
whose rewards are all equal, which have no gradient; the report says how many there are.

Writes `report.md`, `step_time.json` with its numbers, and `steps.csv` with every step.
"""

import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.helpers import reporting, trl_trainer
from benchmarks.helpers.launcher import Run, run_all, train
from benchmarks.helpers.trl_trainer import DEFAULTS, TrlRun
from common.environment import describe_environment
from common.models import location

WARM_UP = 2  # steps of each run: first allocations, lazy imports
LEARNING_RATE = 1e-9
BASELINE = "TRL"
VARIANTS = {  # name: (is it TRL?, does it compute the reference's log-probs?)
    "grpo.py, reference KL": (False, True),
    "grpo.py": (False, False),
    BASELINE: (True, False),
    "TRL, reference KL": (True, True),
}
MEASURED = {  # name in metrics.jsonl: name of a column
    "time/step": "seconds",
    "response_length/mean": "response_length",
    "reward/mean": "reward",
    "reward/zero_std_groups": "zero_std_groups",
    "memory/peak_gib": "peak_gib",
}


@dataclass
class Args:
    stages: tuple[int, ...] = (0, 25, 75, 150)
    """after which steps of the default run to time steps, in increasing order from 0"""
    threads: tuple[int, ...] = (1, 2)
    """numbers of CPU threads to measure with"""
    rounds: int = 3
    """how many times all variants take their turn"""
    steps: int = 7
    """training steps of each timed run, warm-up included"""
    trl_batch_sizes: tuple[int, ...] = (64, 128, 256)
    """sequences in one of TRL's micro-batches: these are tried with the policies of the first and
    the last stage, and the fastest is used, for each number of threads"""
    model: str = DEFAULTS.model
    """as in grpo.py, like the options below; another model is timed as it is, with --stages 0"""
    task: str = DEFAULTS.task
    prompts_per_step: int = DEFAULTS.prompts_per_step
    max_response_tokens: int = DEFAULTS.max_response_tokens
    max_tokens_per_microbatch: int = DEFAULTS.max_tokens_per_microbatch
    device: Literal["cpu", "cuda"] = "cpu"
    precision: Literal["float32", "bfloat16"] = "float32"
    output: Path = reporting.RESULTS / "step_time"
    """where report, JSON and CSV go"""


WORK = ("task", "prompts_per_step", "max_response_tokens", "device", "precision")
"""options that both sides are given"""


def make_stages(model, stages, directory):
    """Make the default run up to the last stage, and keep its policy after each. Returns {stage:
    model directory}.
    """
    directories = {0: location(model)}
    run = Run("default", "grpo", ["--threads=2", "--device=cpu", "--precision=float32"])
    for stage in stages[1:]:
        run_all([run], stage, Path(directory), jobs=1)
        directories[stage] = f"{directory}/after_{stage}"
        shutil.copytree(f"{directory}/default/model", directories[stage])
    return directories


def run_grpo(work, model, threads, reference, steps, directory, microbatch):
    """Run `grpo.py` for a few steps. Returns a list of `MEASURED` per step, warm-up included."""
    options = work | {
        "model": model, "num_steps": steps, "learning_rate": LEARNING_RATE, "eval_size": 1,
        "eval_interval": steps, "checkpoint_interval": steps, "reference_kl": reference,
        "max_tokens_per_microbatch": microbatch,
    }  # fmt: skip
    run_dir = train("grpo", directory, "run", threads=threads, **options)
    return [[record[key] for key in MEASURED] for record in reporting.read_steps(run_dir)]


def run_trl(work, model, threads, reference, steps, directory, batch_size):
    """The same with TRL."""
    options = work | {"num_steps": steps, "learning_rate": LEARNING_RATE, "reference": reference}
    run = TrlRun(directory, model, batch_size=batch_size, threads=threads, **options)
    return [[record[key] for key in MEASURED] for record in trl_trainer.run_trl(run)]


def try_batch_sizes(trials, work, models, args, bar):
    """Make short runs of TRL, `trials` of (threads, size of a micro-batch, stage). Returns the
    median seconds of a step, summed over stages, as {threads: {size: seconds}}.
    """
    found = {threads: dict.fromkeys(args.trl_batch_sizes, 0.0) for threads in args.threads}
    for threads, size, stage in trials:
        bar.set_postfix_str(f"TRL, {threads} thread(s), micro-batches of {size}")
        with tempfile.TemporaryDirectory() as directory:
            arguments = (work, models[stage], threads, False, args.steps, directory, size)
            seconds = [step[0] for step in run_trl(*arguments)[WARM_UP:]]
        found[threads][size] += float(np.median(seconds))
        bar.update()
    return found


def main(args):
    os.environ["HF_HUB_OFFLINE"] = "1"  # for all processes that this one starts
    lines = describe_environment().splitlines()
    environment = [line for line in lines if not line.startswith("threads")]
    environment += [f"{name}: {version(name)}" for name in ("trl", "accelerate")]
    load = os.getloadavg()[0]
    settings = [(threads, name) for threads in args.threads for name in VARIANTS]
    measured = {}  # by threads, variant, stage and round: a list of `MEASURED` per step
    trials = []
    if len(args.trl_batch_sizes) > 1:
        first_and_last = sorted({args.stages[0], args.stages[-1]})
        trials = list(product(args.threads, args.trl_batch_sizes, first_and_last))
    total = len(trials) + args.rounds * len(args.stages) * len(settings)
    with tempfile.TemporaryDirectory() as home, tqdm(total=total, unit="run") as bar:
        bar.set_postfix_str("the default run, for its policies")
        work = {name: getattr(args, name) for name in WORK}
        models = make_stages(args.model, args.stages, home)
        tried = try_batch_sizes(trials, work, models, args, bar)
        for round in range(args.rounds):
            for stage in args.stages:
                for threads, name in settings:
                    bar.set_postfix_str(f"{name}, {threads} thread(s), policy after step {stage}")
                    is_trl, reference = VARIANTS[name]
                    microbatch = args.max_tokens_per_microbatch
                    if is_trl:
                        microbatch = min(tried[threads], key=tried[threads].get)
                    with tempfile.TemporaryDirectory() as directory:
                        arguments = (work, models[stage], threads, reference, args.steps)
                        run = run_trl if is_trl else run_grpo
                        found = run(*arguments, directory, microbatch)
                    measured[threads, name, stage, round] = found
                    bar.update()
    rows = [
        [*key, k, *values]
        for key, steps in measured.items()
        for k, values in enumerate(steps, start=1)
    ]
    columns = ["threads", "variant", "stage", "round", "step", *MEASURED.values()]
    reporting.write_csv(args.output / "steps.csv", columns, rows)
    report, results = write_text(measured, settings, tried, args, load)
    reporting.write_json(args.output / "step_time.json", summary=results)
    reporting.write_report(args.output / "report.md", report, "\n".join(environment))


def about_micro_batches(tried, args):
    """What `try_batch_sizes` found, as text."""
    sizes = args.trl_batch_sizes
    if len(sizes) == 1:
        return f"TRL has micro-batches of {sizes[0]} sequences."
    header = ["threads", *(f"{size} sequences" for size in sizes)]
    rows = [
        [threads, *(f"{found[size]:.2f}" for size in sizes)] for threads, found in tried.items()
    ]
    return f"""TRL's micro-batches have the fastest of these sizes. Seconds of its steps, without a
reference, summed over the first and the last policy:

{reporting.table(header, rows)}"""


def write_text(measured, settings, tried, args, load):
    def of_setting(setting):
        """[stages, rounds, steps, what is measured]"""
        rounds = range(args.rounds)
        return [[measured[*setting, s, r][WARM_UP:] for r in rounds] for s in args.stages]

    values = {setting: np.array(of_setting(setting)) for setting in settings}
    means = np.array([value.mean(axis=(1, 2)) for value in values.values()])
    policy = means[..., 1:4]  # [settings, stages, 3]
    lengths = policy[..., 0]
    if (lengths.max(axis=0) > 1.05 * lengths.min(axis=0)).any():
        sys.exit(
            f"No report: mean response lengths differ by more than 5 % ({lengths}), "
            "so the work was not the same."
        )
    seconds = {setting: value[..., 0] for setting, value in values.items()}

    def whole_run(per_stage):
        several = len(args.stages) > 1
        return np.trapezoid(per_stage, args.stages, axis=0) if several else per_stage[0]

    rows, results = [], []
    for threads, name in settings:
        ours, theirs = (np.median(seconds[threads, of], axis=2) for of in (name, BASELINE))
        cells = [
            f"{taken.mean():.2f} s ({ratios.mean():.2f} ×)"
            for taken, ratios in zip(ours, theirs / ours, strict=True)
        ]
        by_round = whole_run(theirs) / whole_run(ours)
        speed = by_round.mean()
        cells.append(f"{whole_run(ours).mean():.3g}")
        cells.append(f"{speed:.2f} ({', '.join(f'{ratio:.2f}' for ratio in by_round)})")
        rows.append([threads, name, *cells, f"{values[threads, name][..., 4].max():.2f}"])
        results.append({"threads": threads, "variant": name, "speed_relative_to_trl": float(speed)})
    header = ["threads", "variant", *(f"after {stage}" for stage in args.stages)]
    header += ["in all (s)", "speed (by round)", "peak memory (GiB)"]
    policy_header = ["policy after step", "response length (tokens)", "reward"]
    policy_header.append("groups with equal rewards")
    policies = [
        [stage, f"{length:.1f}", f"{reward:.2f}", f"{equal:.0%}"]
        for stage, (length, reward, equal) in zip(args.stages, policy.mean(axis=0), strict=True)
    ]
    which, whole = "of this policy", "one step"
    if args.stages[1:]:
        which = "with the policy as it was after so many steps of the default run"
        whole = f"the whole run of {args.stages[-1]} steps, interpolated between these policies"
    text = f"""# Time of training steps: grpo.py and TRL {version("trl")}

Median seconds of a whole step (sample, grade, update) {which}, the mean of the
rounds; in brackets the speed relative to TRL without a reference, with as many threads. "Reference
KL" means that the log-probs of a frozen reference are computed too. "In all" and "speed" are for
{whole}.

{reporting.table(header, rows)}

What the policies do, means over all variants. For groups with equal rewards, which have no
gradient, `grpo.py` makes no backward pass, and TRL a full one.

{reporting.table(policy_header, policies)}

{about_micro_batches(tried, args)}

{args.rounds} rounds of short runs that took turns, {args.steps - WARM_UP} steps of each after
warm-up, at a learning rate of {LEARNING_RATE:g}. Model {args.model}, task {args.task},
P = {args.prompts_per_step}, G = {DEFAULTS.group_size}, at most {args.max_response_tokens} tokens,
{args.precision} on {args.device}. TRL samples with `model.generate`; its options for vLLM and Liger
were not used. Load average of the minute before the start: {load:.2f}.
"""
    return text, results


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
