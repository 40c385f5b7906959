"""Training runs on a GPU: do they agree with those on a CPU, and how long do their steps take?

    python benchmarks/gpu/gpu_runs.py agreement     the first steps of each script, on CPU and GPU
    python benchmarks/gpu/gpu_runs.py default       the default run
    python benchmarks/gpu/gpu_runs.py smollm2       SmolLM2-135M-Instruct learns two tasks
    python benchmarks/gpu/gpu_runs.py attention     sampling with and without cuDNN's attention
    python benchmarks/gpu/gpu_runs.py qwen          time and memory of Qwen2.5-0.5B's size
    python benchmarks/gpu/gpu_runs.py lora          all weights of SmolLM2, and an adapter
    python benchmarks/gpu/gpu_runs.py sharing       vLLM on the trainer's GPU
    python benchmarks/gpu/gpu_runs.py ranks         SmolLM2 on one GPU, and on two under torchrun

`on_gpu.sh` calls these. With `--device cpu` they run without a GPU, to see that they work. Each
writes a table to `results/on_gpu/`, as soon as it has the first row.
"""

import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[2]))

import grpo
from benchmarks.helpers import reporting
from benchmarks.helpers.launcher import train
from benchmarks.helpers.random_model import QWEN, save_random_model
from common.curves import read_metrics
from common.models import TINY_MODEL, choose_device, end_of_sequence_ids, load_model, load_tokenizer
from common.sampling import Plan
from common.sampling.graphs import GraphSampler
from common.sampling.transformers import TransformersSampler
from common.tasks import load_task
from common.tasks.problems import load_problems

SCRIPTS = ("grpo", "rec_oneside_nois", "red_weight")


@dataclass
class Args:
    part: tyro.conf.Positional[
        Literal["agreement", "default", "attention", "smollm2", "lora", "qwen", "sharing", "ranks"]
    ]
    """what to run"""
    device: str = "cuda"
    """as in the scripts"""
    engine: Literal["transformers", "vllm"] = "transformers"
    """as in the scripts; for smollm2 and qwen"""
    steps: int = 0
    """training steps of each run; 0 for as many as a GPU does in a minute"""
    smollm2: Path = reporting.RUNS / "smollm2"
    """the directory that smollm2.py wrote"""
    output: Path = reporting.RESULTS / "on_gpu"
    """where the reports go"""


def agreement(args, directory):
    """First steps of each script: the CPU in float32, the device in float32 and in bfloat16."""
    steps, settings = args.steps or 2, [("cpu", "float32"), (args.device, "bfloat16")]
    settings[1:1] = [(args.device, "float32")] * (args.device != "cpu")
    runs = [(script, *setting) for script in SCRIPTS for setting in settings]
    options = {"num_steps": steps, "eval_size": 64, "eval_interval": steps, "threads": 1}

    def run(script, device, precision):
        name = f"{script}-{device}-{precision}".replace(":", "")
        return train(script, directory, name, device=device, precision=precision, **options)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # nothing is timed
        found = dict(zip(runs, pool.map(lambda run_: run(*run_), runs), strict=True))
    keys = ("reward/mean", "loss", "grad_norm", "entropy")
    keys += ("sampler_mismatch/mean", "sampler_mismatch/max")
    rows = []
    for (script, device, precision), run_dir in found.items():
        record = reporting.read_steps(run_dir)[0]
        rows.append([script, device, precision, *(f"{record[key]:.4g}" for key in keys)])
        rows[-1].append(f"{read_metrics(run_dir)[0]['eval/accuracy']:.3f}")
    header = ["script", "device", "precision", "reward", "loss", "gradient norm", "entropy"]
    header += ["mean mismatch (nats)", "largest", "accuracy before training"]
    batches = {}
    for device, precision in settings:
        sampler_class = TransformersSampler if device == "cpu" else GraphSampler
        batch = first_batches(device, precision, sampler_class)(grpo.Args.seed)
        batches[device, precision] = batch
    truth = batches["cpu", "float32"]
    shares = [[*setting, *compare_batches(truth, batch)] for setting, batch in batches.items()]
    columns = ["device", "precision", "responses as on the CPU"]
    columns.append("largest difference of their log-probs")
    text = f"""# The first step on a GPU and on a CPU

{reporting.table(header, rows)}

The first batch, 256 responses, sampled with the same random numbers on both. Where such a number
falls close to the bound between two tokens, rounding decides, and the rest of the response differs.

{reporting.table(columns, shares)}
"""
    yield text, run_dir


def first_batches(device, precision, sampler_class=TransformersSampler):
    """A function from a seed to what the default run's first step samples with it."""
    defaults, tokenizer = grpo.Args(), load_tokenizer(TINY_MODEL)
    device, precision = choose_device(device, precision, "transformers")
    model = load_model(TINY_MODEL, "", device)
    task, longest = load_task(defaults.task), defaults.max_prompt_tokens
    prompts = load_problems(task, "train", tokenizer, longest).prompts
    ends = end_of_sequence_ids(model, tokenizer)
    sampler = sampler_class(model, ends, defaults.max_response_tokens, 1.0, precision)

    def first_batch(seed):
        plan = Plan(prompts, defaults.prompts_per_step, defaults.group_size, 1, 0, seed)
        return next(plan.sample(sampler, [1]))

    return first_batch


def compare_batches(truth, batch):
    """The share of equal responses, and how far the log-probs of their tokens are apart at most."""
    same = [row for row, response in enumerate(batch.responses) if response == truth.responses[row]]
    gaps = [np.subtract(batch.logprobs[row], truth.logprobs[row]) for row in same]
    return f"{len(same) / len(batch.responses):.1%}", f"{np.abs(np.concatenate(gaps)).max():.2g}"


def timings(label, run_dir):
    """A row of a table: medians over all steps but the first."""
    records = reporting.read_steps(run_dir)
    rest = records[1:] or records
    keys = ("time/step", "time/sample", "time/train", "throughput/sampled_tokens_per_second")
    cells = [f"{np.median(reporting.column(rest, key)):,.3g}" for key in keys]
    cells.append(f"{reporting.column(rest, 'response_length/mean').mean():.1f}")
    cells.append(f"{records[-1]['memory/peak_gib']:.2f}")
    for part in (records[:1], records[-3:]):
        cells.append(f"{reporting.column(part, 'reward/mean').mean():.2f}")
    accuracy = reporting.column(read_metrics(run_dir), "eval/accuracy")
    cells += [reporting.arrow(accuracy, ".2f"), f"{records[-1].get('kl/ref_k2', 0):.3g}"]
    return [label, len(records), *cells]


def timing_table(rows, *more):
    header = ["run", "steps", "s per step", "sampling", "training", "sampled tokens/s"]
    header += ["tokens per response", "peak memory (GiB)", "first reward", "last 3 rewards"]
    header += ["held-out accuracy", "KL at the end", *more]
    return reporting.table(header, rows)


def attention(args, directory):
    """Seconds to sample a batch of the default run with new random numbers each time, so that
    shapes are new, too.
    """
    run_dir = train("grpo", directory, "run", num_steps=1, device=args.device)  # its environment
    first_batch, seconds = first_batches(args.device, "auto"), {True: [], False: []}
    for k in range(1, 2 * (args.steps or 6) + 1):
        for cudnn, times in seconds.items():
            torch.backends.cuda.enable_cudnn_sdp(cudnn)
            times.append(first_batch(seed=k + 1000 * cudnn).metrics["time/sample"])
    rows = [
        ["with" if cudnn else "without", ", ".join(f"{t:.2f}" for t in times)]
        for cudnn, times in seconds.items()
    ]
    table = reporting.table(["cuDNN", "seconds"], rows)
    yield f"# Sampling with and without cuDNN's attention\n\n{table}\n", run_dir


def default(args, directory):
    """The default run to its end."""
    steps = args.steps or 150
    run_dir = train("grpo", directory, "default", num_steps=steps, device=args.device)
    table = timing_table([timings("`python grpo.py`", run_dir)])
    yield f"# The default run on a GPU\n\n{table}\n", run_dir


def train_smollm2(args, directory, name, task, steps, ranks=1, **others):
    """A run of GRPO on a task of chat_tasks.py; returns its directory."""
    options = {
        "num_steps": args.steps or steps, "device": args.device, "engine": args.engine,
        "model": args.smollm2, "task": f"benchmarks/models/chat_tasks.py:{task}",
        "learning_rate": 1e-5, "max_response_tokens": 48, "max_tokens_per_microbatch": 16384,
        "eval_size": 128, "eval_interval": 1000,
    }  # fmt: skip
    if args.device == "cpu":  # a rehearsal
        options |= {"prompts_per_step": 2, "group_size": 2, "eval_size": 2}
    return train("grpo", directory, name, ranks, **options | others)


def lora(args, directory):
    """All weights, and an adapter beside weights in bf16."""
    rows = []
    adapter = {"lora_rank": 32, "learning_rate": 1e-4}
    for label, others in (("all weights", {}), ("LoRA, rank 32", adapter)):
        run_dir = train_smollm2(args, directory, label, "Extraction", 8, **others)
        rows.append(timings(label, run_dir))
        title = (
            "# Full training and LoRA: SmolLM2-135M-Instruct, Extraction, 32 × 8 responses a step"
        )
        yield f"{title}\n\n{timing_table(rows)}\n", run_dir


def sharing(args, directory):
    """An engine that wakes and sleeps on the trainer's GPU: on fresh batches, on batches sampled
    ahead, and in float32, where it must agree to 1e-4 nats.
    """
    rows = []
    for others in ({}, {"sync_interval": 2, "sync_offset": 1}, {"precision": "float32"}):
        label = ", ".join(f"{key} {value}" for key, value in others.items()) or "default"
        run_dir = train_smollm2(args, directory, label, "Sentiment", 4, **others)
        mismatch = reporting.column(reporting.read_steps(run_dir), "sampler_mismatch/mean").max()
        rows.append([*timings(f"{label}, {args.engine}", run_dir), f"{mismatch:.2g}"])
        title = "# An engine on the trainer's GPU; in the last column, the largest mean mismatch"
        yield f"{title}\n\n{timing_table(rows, 'mismatch')}\n", run_dir


def smollm2(args, directory):
    """Two tasks that the pretrained model learns in a few steps."""
    rows = []
    for task in ("Sentiment", "Extraction"):
        run_dir = train_smollm2(args, directory, task, task, 12)
        rows.append(timings(f"{task}, {args.engine}", run_dir))
        title = "# SmolLM2-135M-Instruct on a GPU, 32 × 8 responses a step, GRPO"
        yield f"{title}\n\n{timing_table(rows)}\n", run_dir


def ranks(args, directory):
    """The same steps on one GPU and on two, which sample and train half of each batch."""
    rows, rewards = [], []
    for n in (1, 2):
        run_dir = train_smollm2(args, directory, f"{n}-ranks", "Extraction", 6, ranks=n)
        rows.append(timings(f"ranks: {n}", run_dir))
        of_steps = reporting.column(reporting.read_steps(run_dir), "reward/mean")
        rewards.append([n, *(f"{reward:.4f}" for reward in of_steps)])
        steps = [f"step {step}" for step in range(1, len(rewards[0]))]
        text = f"""# One GPU and two: SmolLM2-135M-Instruct, Extraction, 32 × 8 responses a step

{timing_table(rows)}

Rewards by step; equal, but for rounding that changes a sample:

{reporting.table(["ranks", *steps], rewards)}
"""
        yield text, run_dir


def qwen(args, directory):
    """Random weights in the shape of Qwen2.5-0.5B: nothing is learned, but every response is as
    long as it may be.
    """
    on_cpu, model = args.device == "cpu", Path(directory) / "model"
    shape = QWEN | ({"num_hidden_layers": 2} if on_cpu else {})
    tokenizer = load_tokenizer(TINY_MODEL)
    save_random_model(model, tokenizer, eos_token_id=None, pad_token_id=0, **shape)
    options = {
        "num_steps": args.steps or 4, "device": args.device, "engine": args.engine, "model": model,
        "task": "benchmarks/helpers/turns.py:LongTurns", "learning_rate": 1e-6, "eval_size": 1,
        "max_response_tokens": 8 if on_cpu else 256, "max_tokens_per_microbatch": 32768,
        "eval_interval": 1000,
    }  # fmt: skip
    if on_cpu:
        options |= {"prompts_per_step": 2, "group_size": 2}
    run_dir = train("grpo", directory, "qwen", **options)
    table = timing_table([timings(f"Qwen2.5-0.5B's size, {args.engine}", run_dir)])
    title = "# A random model of Qwen2.5-0.5B's size on a GPU, 32 × 8 responses a step"
    yield f"{title}\n\n{table}\n", run_dir


def main(args):
    parts = (agreement, default, attention, smollm2, lora, qwen, sharing, ranks)
    part = {function.__name__: function for function in parts}[args.part]
    with tempfile.TemporaryDirectory() as directory:
        name = args.part if args.engine == "transformers" else f"{args.part}_{args.engine}"
        for text, run_dir in part(args, directory):
            environment = reporting.environment_of(run_dir).replace(directory, "DIRECTORY")
            reporting.write_report(args.output / f"{name}.md", text, environment)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
