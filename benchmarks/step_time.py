"""How long a whole training step takes, `grpo.py` against TRL's `GRPOTrainer`.

    pip install -r benchmarks/requirements.txt
    python benchmarks/step_time.py                    about ten minutes on two idle cores

A step is: draw G responses to each of P prompts, grade them, make one update. Both sides get the same model directory,
the same prompts in the same order, the same reward function, group size, token limit, float32, device (CPU) and number
of threads. Short runs take turns, A B C D A B C D …, each in a process of its own, so that a machine that slows down
slows all of them; the first steps of each are dropped as warm-up, and medians over all rounds are compared.

The learning rate is 1e-9 on both sides. The work of a step depends on how long the responses are, and training changes
that, differently with every random stream; at 1e-9 all steps are drawn by what is still the initial policy.

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

import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, the repository's own modules are not yet importable

import grpo
from common.models import load_tokenizer
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
    model: str = str(ROOT / "common" / "tiny_model")
    """model directory, for both sides"""
    threads: tuple[int, ...] = (1, 2)
    """numbers of CPU threads to measure with"""
    rounds: int = 3
    """how many times all variants take their turn"""
    steps: int = 10
    """training steps of each run, warm-up included"""
    trl_batch_size: int = 64
    """sequences in one of TRL's micro-batches, a divisor of P·G; the fastest of 32, 64, 128 and 256 on two CPU cores"""
    output: Path = ROOT / "benchmarks" / "results" / "step_time"
    """where step_time.json and report.md are written"""


def run_grpo(model, threads, reference, steps, directory):
    """Run `grpo.py` for a few steps and read what it logged. Returns one dict per step, warm-up included."""
    options = {
        "model": model,
        "threads": threads,
        "num-steps": steps,
        "learning-rate": LEARNING_RATE,
        "device": "cpu",
        "precision": "float32",
        # Evaluation and checkpoints are outside the timed part, but not outside the ten minutes.
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
    import torch  # the parent process needs neither, and must not load TRL's 100 modules before every run of grpo.py
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(threads)
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


def summarise(runs):
    """Medians per (threads, variant), with the ratio to TRL without a reference; `runs` as `main` collects them."""
    summary = []
    for threads in sorted({run["threads"] for run in runs}):
        of_variant = {
            name: [run["steps"][WARM_UP_STEPS:] for run in runs if (run["threads"], run["variant"]) == (threads, name)]
            for name in VARIANTS
        }
        medians = {name: statistics.median(s["seconds"] for r in rs for s in r) for name, rs in of_variant.items()}
        for name, rounds in of_variant.items():
            steps = [step for steps in rounds for step in steps]
            per_round = [
                statistics.median(s["seconds"] for s in trl) / statistics.median(s["seconds"] for s in ours)
                for trl, ours in zip(of_variant[BASELINE], rounds, strict=True)
            ]
            batch = DEFAULTS.prompts_per_step * DEFAULTS.group_size
            summary.append(
                {
                    "threads": threads,
                    "variant": name,
                    "steps_measured": len(steps),
                    "median_seconds_per_step": medians[name],
                    "median_response_tokens_per_second": statistics.median(
                        step["response_length"] * batch / step["seconds"] for step in steps
                    ),
                    "speed_relative_to_trl": medians[BASELINE] / medians[name],
                    "speed_relative_to_trl_by_round": per_round,
                    "speed_relative_to_same_in_trl": medians["TRL, reference KL" if VARIANTS[name][1] else BASELINE]
                    / medians[name],
                    "mean_response_length": statistics.mean(step["response_length"] for step in steps),
                    "mean_reward": statistics.mean(step["reward"] for step in steps),
                    "mean_zero_std_groups": statistics.mean(step["zero_std_groups"] for step in steps),
                }
            )
    return summary


def table(summary):
    """The summary as a Markdown table."""
    lines = [
        "| threads | variant | median s/step | response tokens/s | speed, TRL = 1 (by round) | mean response length |",
        "|---|---|---|---|---|---|",
    ]
    for row in summary:
        by_round = ", ".join(f"{ratio:.2f}" for ratio in row["speed_relative_to_trl_by_round"])
        lines.append(
            f"| {row['threads']} | {row['variant']} | {row['median_seconds_per_step']:.3f} "
            f"| {row['median_response_tokens_per_second']:,.0f} | {row['speed_relative_to_trl']:.2f} ({by_round}) "
            f"| {row['mean_response_length']:.1f} |"
        )
    return "\n".join(lines)


def report(args, summary, environment, load):
    """The text of report.md."""
    claims = [
        f"{row['speed_relative_to_trl']:.2f} × at {row['threads']} thread{'s' * (row['threads'] > 1)}"
        for row in summary
        if row["variant"] == CLAIM
    ]
    about = "\n".join(f"- {key}: {value}" for key, value in environment.items())
    return f"""# Time of a whole training step: grpo.py and TRL {version("trl")}

With `grpo.py` logging the KL to the reference and TRL doing without one, `grpo.py` trains at this multiple of TRL's
speed: {" and ".join(claims)}.

{table(summary)}

Each number is a median over {summary[0]["steps_measured"]} whole steps (sample, grade, update) from {args.rounds} \
rounds of short runs that took turns, on the same model, prompts, reward function, token limit, precision and threads. \
A learning rate of {LEARNING_RATE:g} keeps the policy, and so the work of a step, as it was at the start; "reference \
KL" means that the log-probs of a frozen reference are computed too, and the column of ratios compares with TRL \
without them.

- P = {DEFAULTS.prompts_per_step}, G = {DEFAULTS.group_size}, at most {DEFAULTS.max_response_tokens} tokens, float32; \
TRL in micro-batches of {args.trl_batch_size}
- load average when started: {load:.2f} (of other work; 0 is an idle machine)
{about}

Written by `benchmarks/step_time.py`; every step's time is in `step_time.json`.
"""


def main(args):
    load = os.getloadavg()[0]
    variants = [(threads, name, *flags) for threads in args.threads for name, flags in VARIANTS.items()]
    runs = []
    with tqdm(total=args.rounds * len(variants), unit="run", dynamic_ncols=True) as bar:
        for _ in range(args.rounds):
            for threads, name, is_trl, reference in variants:
                bar.set_postfix_str(f"{name}, {threads} thread(s)")
                with tempfile.TemporaryDirectory() as directory:
                    common = (args.model, threads, reference, args.steps)
                    steps = run_trl(*common, args.trl_batch_size, directory) if is_trl else run_grpo(*common, directory)
                runs.append({"threads": threads, "variant": name, "steps": steps})
                bar.update()

    summary = summarise(runs)
    print(table(summary))
    lengths = [row["mean_response_length"] for row in summary]
    if max(lengths) > 1.05 * min(lengths):
        sys.exit("Nothing is written: mean response lengths differ by over 5 %, so the two did different work.")

    environment = dict(line.split(": ", 1) for line in describe_environment().splitlines())
    del environment["threads"]  # this process's own; the children's are in the table
    environment |= {package: version(package) for package in ("trl", "accelerate")}
    results = {
        "environment": environment,
        "load_average_before": load,
        "arguments": vars(args) | {"output": str(args.output)},
        "summary": summary,
        "runs": runs,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "step_time.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.output / "report.md").write_text(report(args, summary, environment, load))
    print(f"Written to {args.output}/.")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--trl-child"]:
        train_with_trl(**json.loads(sys.argv[2]))
    else:
        main(tyro.cli(Args, description=__doc__))
