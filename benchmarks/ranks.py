"""The overhead of torchrun: step times of one process with two threads, and of two ranks with one thread each.

    python benchmarks/ranks.py                  three minutes on two idle cores

A random model of 25 million parameters trains on the same batches, at a learning rate of 1e-9, so that every step is
the same work. Each of the two ranks holds half of the weights, gradients, moments and reference; in every pass they
exchange weights and gradients with gloo. The two kinds of runs alternate; times are medians over steps.

Writes `ranks.md`.
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import reporting
from benchmarks.launcher import ROOT
from benchmarks.reporting import column, table
from common.models import TINY_MODEL, load_tokenizer

KEYS = {"time/sample": "sampling", "time/train": "training", "time/step": "step"}


@dataclass
class Args:
    steps: int = 6
    """training steps of each run, of which the first does not count"""
    rounds: int = 2
    """how often both take their turn"""
    output: Path = reporting.RESULTS
    """where ranks.md goes"""


def make_model(directory):
    """A random model with the embedded model's tokenizer; returns its number of parameters."""
    tokenizer = load_tokenizer(TINY_MODEL)
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": True}
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), **sizes, **heads, **ids))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return sum(parameter.numel() for parameter in model.parameters())


def run(ranks, model, name, directory, steps):
    """Train; returns the directory of the run. Memory is that of rank 0, at its peak."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    options = {
        "model": model, "num-steps": steps, "prompts-per-step": 8, "group-size": 4, "eval-size": 1, "device": "cpu",
        "eval-interval": 1000, "checkpoint-interval": 1000, "learning-rate": 1e-9, "threads": 2 // ranks,
        "task": f"{directory}/signal.py:Turns", "output": directory, "name": name,
    }  # fmt: skip
    command = [sys.executable, *launcher, "grpo.py", *(f"--{key}={value}" for key, value in options.items())]
    environment = os.environ | {"OMP_NUM_THREADS": str(2 // ranks)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return Path(directory) / name


TASK = '''
from common.tasks import Task


class Turns(Task):
    """Rewards in turns, so that there is always something to train on."""

    graded = 0

    def problems(self, split):
        return [{"prompt": f"Q: {number}+1\\nA:"} for number in range(64)][: None if split == "train" else 1]

    def reward(self, problem, response):
        self.graded += 1
        return float(self.graded % 2)
'''


def main(args):
    found = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as directory:
        parameters = make_model(f"{directory}/model")
        Path(directory, "signal.py").write_text(TASK)
        for round_ in range(args.rounds):
            for ranks, runs in found.items():
                runs.append(run(ranks, f"{directory}/model", f"{ranks}-{round_}", directory, args.steps))
        records = {ranks: [r for path in runs for r in reporting.read_steps(path)[1:]] for ranks, runs in found.items()}
        environment = reporting.environment_of(found[1][0]).replace(directory, "DIRECTORY")
    rows = []
    for ranks, steps in records.items():
        times = [f"{np.median(column(steps, key)):.2f}" for key in KEYS]
        held = 4 * 5 * parameters / ranks / 2**30
        rows.append([ranks, *times, f"{column(steps, 'memory/peak_gib').max():.2f}", f"{held:.2f}"])
    one, two = (np.median(column(records[ranks], "time/step")) for ranks in (1, 2))
    header = ["ranks", *(f"{name} (s)" for name in KEYS.values()), "peak memory of a rank (GiB)"]
    report = f"""# Two ranks on two cores, against one process with two threads

`python benchmarks/ranks.py`: a random model of {parameters / 1e6:.0f} million parameters, 8 × 4 responses a step,
medians over {args.rounds} runs of each. Two ranks take **{two / one:.2f}** times as long.

{table([*header, "computed for weights, gradients, moments, reference"], rows)}

The peak has much besides: Python with its libraries, activations, and while a rank samples, all weights.
"""
    reporting.write_report(args.output / "ranks.md", report, environment)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
