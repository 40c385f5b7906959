"""TRL's `GRPOTrainer`, set up to do the same work as `grpo.py`.

- It gets the same model directory, the same prompts in the same order, the same reward function,
  and ends responses at the same EOS ids.
- `loss_type="dapo"` is its token mean over the whole batch, the normalisation of `grpo.py`.
- Gradient checkpointing and bfloat16, both on by default, are off; so are logging, saving and
  evaluation.
- It samples with `model.generate`. Its options for vLLM and Liger are not used.

A step is timed from the trainer's `on_step_begin` to its `on_step_end`. It samples and grades
inside its `training_step`, which is between the two. So this includes what `time/step` of `grpo.py`
does; loading the data and logging are outside, as they are there.
"""

import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import grpo
from benchmarks.helpers.launcher import run_once
from common.layers import use_threads
from common.metrics import peak_bytes
from common.models import load_tokenizer
from common.sampling import problems_of_batch
from common.tasks import load_task
from common.tasks.problems import load_problems

# G, temperature, clipping: whatever grpo.py does when left alone
DEFAULTS = grpo.Args()


@dataclass
class TrlRun:
    """One run; options as in grpo.py, unless said otherwise."""

    directory: str
    """where `steps.json` goes"""
    model: str
    task: str
    num_steps: int
    batch_size: int
    """sequences in one of TRL's micro-batches"""
    threads: int
    prompts_per_step: int = DEFAULTS.prompts_per_step
    max_response_tokens: int = DEFAULTS.max_response_tokens
    learning_rate: float = DEFAULTS.learning_rate
    seed: int = DEFAULTS.seed
    device: str = "cpu"
    precision: str = "float32"
    reference: bool = False
    """compute the log-probs of a frozen reference, too"""
    save_model: bool = False
    """leave the trained model in `model/`"""


def run_trl(run):
    """Train in a process of its own. Returns `read_steps` of it."""
    run_once([__file__, json.dumps(asdict(run))], run.threads)
    return read_steps(run.directory)


def read_steps(directory):
    """A list of one record per step, with names as in metrics.jsonl: step, time/step, reward/mean,
    reward/zero_std_groups, response_length/mean, memory/peak_gib.
    """
    return json.loads(Path(directory, "steps.json").read_text())


def batches_of_prompts(run, problems):
    """The rows of a dataset that, read in order, are the batches of `grpo.py`."""
    P = run.prompts_per_step
    steps = range(1, run.num_steps + 1)
    batches = [problems_of_batch(step, len(problems), P, run.seed) for step in steps]
    return [{"prompt": problems[i]["prompt"], "problem": i} for batch in batches for i in batch]


def config_of(run):
    """TRL's options that make it do the work of `grpo.py`."""
    from trl import GRPOConfig

    sequences = run.prompts_per_step * DEFAULTS.group_size
    return GRPOConfig(
        output_dir=run.directory,
        use_cpu=run.device == "cpu",
        bf16=run.precision == "bfloat16",
        gradient_checkpointing=False,
        max_steps=run.num_steps,
        per_device_train_batch_size=run.batch_size,
        # micro-batches per update; they share one batch
        gradient_accumulation_steps=sequences // run.batch_size,
        num_generations=DEFAULTS.group_size,
        max_completion_length=run.max_response_tokens,
        temperature=DEFAULTS.temperature,
        top_p=1.0,
        top_k=0,
        beta=1e-3 if run.reference else 0.0,  # any number but 0 makes it run the reference
        loss_type="dapo",
        epsilon=DEFAULTS.clip_low,
        epsilon_high=DEFAULTS.clip_high,
        max_grad_norm=DEFAULTS.max_grad_norm,
        learning_rate=run.learning_rate,
        lr_scheduler_type="constant",
        shuffle_dataset=False,
        seed=run.seed,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def train(run):
    """Train, and write `steps.json`."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOTrainer

    use_threads(run.threads)
    tokenizer = load_tokenizer(run.model)
    task = load_task(run.task)
    problems = load_problems(task, "train", tokenizer, DEFAULTS.max_prompt_tokens).problems
    G, records = DEFAULTS.group_size, []

    def reward(completions, completion_ids, problem, **_):
        texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
        rewards = task.rewards([problems[index] for index in problem], texts)
        rewards = [reward["reward"] if isinstance(reward, dict) else reward for reward in rewards]
        equal = [len(set(rewards[i : i + G])) == 1 for i in range(0, len(rewards), G)]
        record = {
            "step": len(records) + 1,
            "response_length/mean": statistics.mean(map(len, completion_ids)),
            "reward/mean": statistics.mean(rewards),
            "reward/zero_std_groups": statistics.mean(equal),
        }
        records.append(record)
        return rewards

    class StepTimer(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.started, self.batches_before = time.perf_counter(), len(records)

        def on_step_end(self, *_, **__):
            records[-1]["time/step"] = time.perf_counter() - self.started
            records[-1]["memory/peak_gib"] = peak_bytes(torch.device(run.device)) / 2**30
            # What is timed must contain the sampling and grading of exactly one batch.
            sampled = len(records) - self.batches_before
            assert sampled == 1, "TRL generates outside of the timed part of a step"

    dataset = Dataset.from_list(batches_of_prompts(run, problems))
    others = {"processing_class": tokenizer, "callbacks": [StepTimer()]}
    trainer = GRPOTrainer(run.model, reward, config_of(run), dataset, **others)
    trainer.train()
    if run.save_model:
        trainer.save_model(str(Path(run.directory, "model")))
    Path(run.directory, "steps.json").write_text(json.dumps(records))


if __name__ == "__main__":
    train(TrlRun(**json.loads(sys.argv[1])))
