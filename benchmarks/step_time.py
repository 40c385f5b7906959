"""How long the training steps of the default run take, `grpo.py` against TRL's `GRPOTrainer`.

    pip install -r benchmarks/requirements.txt
    python benchmarks/step_time.py                    about 25 minutes on two idle cores

A step is: draw G responses to each of P prompts, grade them, make one update. Both sides get the same model directory,
the same prompts in the same order, the same reward function, group size, token limit, float32, device (CPU) and number
of threads. Short runs take turns, A B C D A B C D …, each in a process of its own, so that a machine that slows down
slows all of them; the first steps of each are dropped as warm-up, and medians over all rounds are compared.

The work of a step changes while a model learns: responses get shorter, and more groups have equal rewards. So the
default run is made first, and steps are timed with its policy as it stood after several of its steps, at a learning
rate of 1e-9 on both sides, which keeps the policy as it is: left to learn by themselves, the two sides would soon do
different work. The time of the whole run follows by the trapezoid rule.

What is timed:
- `grpo.py`: `time/step` in its metrics.jsonl, from before sampling to after the update.
- TRL: from the trainer's `on_step_begin` to its `on_step_end`. `GRPOTrainer` generates and grades inside its
  `training_step`, which lies between the two, so the same things are in it. Loading the data and logging lie outside,
  as they do for `grpo.py`.

How TRL is set up, to do the same work at its best:
- `loss_type="dapo"` is its token mean over the whole batch, the normalisation of `grpo.py`.
- Gradient checkpointing and bfloat16, both on by default, are off; so are logging, saving and evaluation.
- Micro-batches are the largest that pay: see `trl_batch_size`.
- It ends responses at the same EOS ids; the benchmark refuses to report if mean response lengths differ by over 5 %.
TRL's sampler reports no log-probs, so that it has less to do there; it treats the policy that drew the batch as equal
to the one being trained. `grpo.py` skips the backward pass of groups whose rewards are all equal, which have no
gradient; how many there were is in the results for both (`zero_std_groups`).
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, the repository's own modules are not yet importable

import grpo
from common.models import TINY_MODEL, load_model, load_tokenizer
from common.products import use_threads
from common.rollouts import problems_of_batch
from common.runlog import describe_environment
from common.tasks import encode_problems, load_task

DEFAULTS = grpo.Args()  # P, G, token limit, temperature, clipping, seed: whatever grpo.py does when left alone
WARM_UP_STEPS = 2  # of each run: first allocations, lazy imports
LEARNING_RATE = 1e-9
BASELINE = "TRL"
CLAIM = "grpo.py, reference KL"
VARIANTS = {  # name: (is it TRL?, does it compute the reference's log-probs?)
    CLAIM: (False, True),
    "grpo.py": (False, False),
    BASELINE: (True, False),
    "TRL, reference KL": (True, True),
}


@dataclass
class Args:
    stages: tuple[int, ...] = (0, 25, 75, 150)
    """after which steps of the default run to time steps, from 0 to its last; multiples of the checkpoint interval"""
    threads: tuple[int, ...] = (1, 2)
    """numbers of CPU threads to measure with"""
    rounds: int = 2
    """how many times all variants take their turn"""
    steps: int = 9
    """training steps of each timed run, warm-up included"""
    trl_batch_size: tuple[int, ...] = (64, 128)
    """sequences in one of TRL's micro-batches, for each number of threads; the fastest of 64, 128 and 256 with the
    policies of the first and the last stage"""
    output: Path = ROOT / "benchmarks" / "results" / "step_time"
    """where step_time.json and report.md are written"""


def make_stages(stages, directory):
    """Make the default run and save its policy as it stood after each of these steps. Returns {step: model directory}.

    Exits for steps of which there is no checkpoint, and unless the first and the last step are among them.
    """
    known = range(0, DEFAULTS.num_steps + 1, DEFAULTS.checkpoint_interval)
    if not {0, DEFAULTS.num_steps} <= set(stages) <= set(known):
        sys.exit(f"--stages {stages}: give 0 and {DEFAULTS.num_steps}, and others of {list(known)} as you like.")
    run_dir = Path(directory) / "default"
    options = ["--keep-checkpoints", str(DEFAULTS.num_steps), "--device", "cpu", "--precision", "float32"]
    run_child([sys.executable, str(ROOT / "grpo.py"), "--output", directory, "--name", "default", *options], threads=2)
    model = load_model(TINY_MODEL, "", torch.device("cpu"), gradient_checkpointing=False)
    tokenizer, directories = load_tokenizer(TINY_MODEL), {}
    for stage in stages:
        if stage:
            path = run_dir / "checkpoints" / f"step_{stage:06d}.pt"
            model.load_state_dict(torch.load(path, weights_only=True)["model"])
        directories[stage] = str(Path(directory) / f"after_{stage}")
        model.save_pretrained(directories[stage])
        tokenizer.save_pretrained(directories[stage])
    return directories


def run_grpo(model, threads, reference, steps, directory):
    """Run `grpo.py` for a few steps and read what it logged. Returns one dict per step, warm-up included."""
    options = {
        "model": model,
        "threads": threads,
        "num-steps": steps,
        "learning-rate": LEARNING_RATE,
        "device": "cpu",
        "precision": "float32",
        # Evaluation and checkpoints are outside the timed part, but not outside the whole.
        "eval-size": 1,
        "eval-interval": steps,
        "checkpoint-interval": steps,
        "output": directory,
        "name": "run",
    }
    command = [sys.executable, str(ROOT / "grpo.py"), "--serial"]  # one process, so that the threads are all there are
    command.append("--reference-kl" if reference else "--no-reference-kl")
    run_child(command + [f"--{name}={value}" for name, value in options.items()], threads)
    lines = (Path(directory) / "run" / "metrics.jsonl").read_text().splitlines()
    return [
        {
            "seconds": record["time/step"],
            "response_length": record["response_length/mean"],
            "reward": record["reward/mean"],
            "zero_std_groups": record["reward/zero_std_groups"],
        }
        for record in map(json.loads, lines)
        if "time/step" in record
    ]


def run_trl(model, threads, reference, steps, batch_size, directory):
    """Run `train_with_trl` in a process of its own. Returns one dict per step, warm-up included."""
    child = {
        "model": model,
        "threads": threads,
        "reference": reference,
        "steps": steps,
        "batch_size": batch_size,
        "directory": directory,
    }
    run_child([sys.executable, __file__, "--trl-child", json.dumps(child)], threads)
    return json.loads((Path(directory) / "steps.json").read_text())


def run_child(command, threads):
    """Run a command with that many threads in every library that has its own; its output shows only if it fails."""
    limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), str(threads))
    environment = os.environ | limits | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def train_with_trl(model, threads, reference, steps, batch_size, directory):
    """A few steps of TRL's `GRPOTrainer` on `grpo.py`'s batches of problems; writes `steps.json` into `directory`."""
    from datasets import Dataset  # the parent process needs none of this
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    use_threads(threads)
    tokenizer = load_tokenizer(model)
    task = load_task(DEFAULTS.task)
    problems, _ = encode_problems(task, "train", tokenizer, DEFAULTS.max_prompt_tokens, DEFAULTS.long_prompts)
    order = [
        index
        for step in range(1, steps + 1)
        for index in problems_of_batch(step, len(problems), DEFAULTS.prompts_per_step, DEFAULTS.seed)
    ]
    dataset = Dataset.from_list([{"prompt": problems[index]["prompt"], "problem": index} for index in order])
    records = []

    def reward(completions, completion_ids, problem, **_):
        rewards = task.rewards([problems[index] for index in problem], completions)
        groups = [rewards[i : i + DEFAULTS.group_size] for i in range(0, len(rewards), DEFAULTS.group_size)]
        records.append(
            {
                "response_length": statistics.mean(map(len, completion_ids)),
                "reward": statistics.mean(rewards),
                "zero_std_groups": statistics.mean(len(set(group)) == 1 for group in groups),
            }
        )
        return rewards

    class StepTimer(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.started = time.perf_counter()
            self.batches_before = len(records)

        def on_step_end(self, *_, **__):
            records[-1]["seconds"] = time.perf_counter() - self.started
            # What is timed must contain the drawing and grading of exactly one batch.
            assert len(records) == self.batches_before + 1, "TRL generates outside of the timed part of a step"

    batch = DEFAULTS.prompts_per_step * DEFAULTS.group_size
    config = GRPOConfig(
        output_dir=directory,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=batch // batch_size,  # micro-batches per update; one batch is drawn for all of them
        num_generations=DEFAULTS.group_size,
        max_completion_length=DEFAULTS.max_response_tokens,
        temperature=DEFAULTS.temperature,
        top_p=1.0,
        top_k=0,
        beta=1e-3 if reference else 0.0,  # any number but 0 makes it run the reference
        loss_type="dapo",
        epsilon=DEFAULTS.clip_low,
        epsilon_high=DEFAULTS.clip_high,
        max_grad_norm=DEFAULTS.max_grad_norm,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        shuffle_dataset=False,
        seed=DEFAULTS.seed,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    GRPOTrainer(model, reward, config, dataset, processing_class=tokenizer, callbacks=[StepTimer()]).train()
    (Path(directory) / "steps.json").write_text(json.dumps(records))


def whole_run(seconds_per_step):
    """Seconds of a whole run, {stage: seconds per step} → their integral over the steps, by the trapezoid rule."""
    stages = sorted(seconds_per_step)
    return sum((b - a) * (seconds_per_step[a] + seconds_per_step[b]) / 2 for a, b in itertools.pairwise(stages))


def summarise(runs, stages, rounds):
    """One row per number of threads and variant: medians by stage, the whole run, ratios to TRL without a reference."""
    steps = {}  # by threads, variant and stage, a list of steps per round
    for run in runs:
        steps.setdefault((run["threads"], run["variant"], run["stage"]), []).append(run["steps"][WARM_UP_STEPS:])

    def medians(threads, variant, chosen_rounds):
        def seconds(stage):
            return [step["seconds"] for r in chosen_rounds for step in steps[threads, variant, stage][r]]

        return {stage: statistics.median(seconds(stage)) for stage in stages}

    rows = []
    for threads, variant in dict.fromkeys((run["threads"], run["variant"]) for run in runs):
        ours, trl = (medians(threads, name, range(rounds)) for name in (variant, BASELINE))
        ours_by_round, trl_by_round = (
            [whole_run(medians(threads, name, [r])) for r in range(rounds)] for name in (variant, BASELINE)
        )
        rows.append(
            {
                "threads": threads,
                "variant": variant,
                "seconds_per_step": ours,
                "whole_run_seconds": whole_run(ours),
                "speed_relative_to_trl": whole_run(trl) / whole_run(ours),
                "speed_relative_to_trl_by_round": [b / a for a, b in zip(ours_by_round, trl_by_round, strict=True)],
                "speed_relative_to_trl_by_stage": {stage: trl[stage] / ours[stage] for stage in stages},
                "policy": {
                    stage: {
                        key: statistics.mean(step[key] for r in steps[threads, variant, stage] for step in r)
                        for key in ("response_length", "reward", "zero_std_groups")
                    }
                    for stage in stages
                },
            }
        )
    return rows


def table(rows, stages):
    """The summary as a Markdown table."""
    lines = [
        f"| threads | variant | {' | '.join(f'after {stage}' for stage in stages)} | whole run (s) "
        "| speed, TRL = 1 (by round) |",
        f"|---|---|{'---|' * len(stages)}---|---|",
    ]
    for row in rows:
        cells = [
            f"{row['seconds_per_step'][stage]:.2f} s ({row['speed_relative_to_trl_by_stage'][stage]:.2f} ×)"
            for stage in stages
        ]
        by_round = ", ".join(f"{ratio:.2f}" for ratio in row["speed_relative_to_trl_by_round"])
        lines.append(
            f"| {row['threads']} | {row['variant']} | {' | '.join(cells)} | {row['whole_run_seconds']:.0f} "
            f"| {row['speed_relative_to_trl']:.2f} ({by_round}) |"
        )
    return "\n".join(lines)


def policy_table(rows, stages):
    """What the policies of the stages are like: means over all variants, as a Markdown table."""
    lines = [
        "| policy after step | response length (tokens) | reward | groups with equal rewards |",
        "|---|---|---|---|",
    ]
    for stage in stages:
        length, reward, equal = (
            statistics.mean(row["policy"][stage][key] for row in rows)
            for key in ("response_length", "reward", "zero_std_groups")
        )
        lines.append(f"| {stage} | {length:.1f} | {reward:.2f} | {equal:.0%} |")
    return "\n".join(lines)


def report(args, rows, environment, load):
    """The text of report.md."""
    claims = [
        f"{row['speed_relative_to_trl']:.2f} × on {row['threads']} thread{'s' * (row['threads'] > 1)}"
        for row in rows
        if row["variant"] == CLAIM
    ]
    about = "\n".join(f"- {key}: {value}" for key, value in environment.items())
    return f"""# Time of training steps: grpo.py and TRL {version("trl")}

With `grpo.py` logging the KL to the reference and TRL doing without one, `grpo.py` makes the steps of the default run \
at this multiple of TRL's speed: {" and ".join(claims)}.

Median seconds of a whole step (sample, grade, update) with the policy as it stood after so many steps of the default \
run, in brackets the speed relative to TRL without a reference:

{table(rows, args.stages)}

The work of a step changes as the policy learns. Responses get shorter, for both sides; and more groups have equal \
rewards and so no gradient, for which `grpo.py` makes no backward pass, and TRL a full one:

{policy_table(rows, args.stages)}

Each time is a median over {(args.steps - WARM_UP_STEPS) * args.rounds} steps from {args.rounds} rounds of short runs \
that took turns, on the same model, prompts, reward function, token limit, precision and threads. A learning rate of \
{LEARNING_RATE:g} keeps each policy as it is. "Reference KL" means that the log-probs of a frozen reference are \
computed too. The whole run is the sum over its steps, interpolated between the policies measured.

- P = {DEFAULTS.prompts_per_step}, G = {DEFAULTS.group_size}, at most {DEFAULTS.max_response_tokens} tokens, float32; \
TRL in micro-batches of {" and ".join(map(str, args.trl_batch_size))}
- load average when started: {load:.2f} (of other work; 0 is an idle machine)
{about}

Written by `benchmarks/step_time.py`; every step's time is in `step_time.json`.
"""


def main(args):
    load = os.getloadavg()[0]
    variants = [
        (stage, threads, batch_size, name, *flags)
        for stage in args.stages
        for threads, batch_size in zip(args.threads, args.trl_batch_size, strict=True)
        for name, flags in VARIANTS.items()
    ]
    runs = []
    with tempfile.TemporaryDirectory() as home, tqdm(total=args.rounds * len(variants), unit="run") as bar:
        bar.set_postfix_str("the default run, to have its policies")
        models = make_stages(args.stages, home)
        for _ in range(args.rounds):
            for stage, threads, batch_size, name, is_trl, reference in variants:
                bar.set_postfix_str(f"{name}, {threads} thread(s), policy after step {stage}")
                with tempfile.TemporaryDirectory() as directory:
                    common = (models[stage], threads, reference, args.steps)
                    steps = run_trl(*common, batch_size, directory) if is_trl else run_grpo(*common, directory)
                runs.append({"stage": stage, "threads": threads, "variant": name, "steps": steps})
                bar.update()

    rows = summarise(runs, args.stages, args.rounds)
    print(table(rows, args.stages))
    for stage in args.stages:
        lengths = [row["policy"][stage]["response_length"] for row in rows]
        if max(lengths) > 1.05 * min(lengths):
            sys.exit(f"Nothing is written: mean response lengths differ by over 5 % ({lengths}), so the work differed.")

    environment = dict(line.split(": ", 1) for line in describe_environment().splitlines())
    del environment["threads"]  # this process's own; the children's are in the table
    environment |= {package: version(package) for package in ("trl", "accelerate")}
    results = {
        "environment": environment,
        "load_average_before": load,
        "arguments": vars(args) | {"output": str(args.output)},
        "summary": rows,
        "runs": runs,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "step_time.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.output / "report.md").write_text(report(args, rows, environment, load))
    print(f"Written to {args.output}/.")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--trl-child"]:
        train_with_trl(**json.loads(sys.argv[2]))
    else:
        main(tyro.cli(Args, description=__doc__))
