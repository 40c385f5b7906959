"""Options for running, which every script inherits, and what an option declares of its values."""

import dataclasses
import os
import shlex
from dataclasses import dataclass
from typing import Literal


def option(default, at_least=None, above=None, needs=None):
    """A field of `Args`, with the rules that `commandline.check` holds its value to.

    `needs` names an option that must be on where this one is not 0.
    """
    rules = {"at_least": at_least, "above": above, "needs": needs}
    return dataclasses.field(default=default, metadata=rules)


def as_command(script, args):
    """The command that runs a script with these options once more, under a name of its own.

    It is to be given in the script's directory. It has the options that differ from the defaults,
    and the learning rate, whose default depends on others.
    """
    directory, file = os.path.split(os.path.abspath(script))
    words = ["python", file]
    if ranks := os.environ.get("LOCAL_WORLD_SIZE"):
        words = ["torchrun", "--nproc-per-node", ranks, file]
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        told = field.name == "learning_rate" or value != field.default
        if not told or field.name in ("resume", "resume_if_exists", "name", "output"):
            continue
        word = field.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{word}" if value else f"--no-{word}")
        else:
            # A task's file beside the script may go elsewhere together with it.
            words += [f"--{word}", str(value).removeprefix(f"{directory}/")]
    return shlex.join(words)


@dataclass
class RunOptions:
    """Where, how precisely and with what a run is carried out, and what it writes."""

    revision: str = ""
    """revision of a hub model; empty for its main branch"""
    data: str = ""
    """training data: a .jsonl, .csv or .parquet file, or a hub dataset; empty for the task's own"""
    eval_data: str = ""
    """held-out data, in the same formats; empty for the task's own"""
    eval_size: int = option(256, at_least=1)
    """number of held-out problems; a task may have fewer"""
    eval_interval: int = option(25, at_least=1)
    """evaluate on held-out problems at the start, every so many steps and at the end"""
    max_prompt_tokens: int = option(1024, at_least=1)
    """problems with longer prompts are left out"""

    engine: Literal["transformers", "vllm"] = "transformers"
    """what samples the responses; vLLM is installed separately (see the README)"""
    cuda_graphs: bool = True
    """on a GPU, transformers samples a token with one launch; if off, with one per operation"""
    serial: bool = False
    """sample and train in turns, in one process, where two could work at the same time"""
    sampler_timeout: float = option(300.0, above=0)
    """stop if the sampler's process or another rank shows no sign of life for so many seconds"""

    lora_rank: int = option(0, at_least=0)
    """train an adapter of this rank (LoRA) beside the weights; 0: train the weights themselves"""
    lora_alpha: float = option(32.0, above=0)
    """α: what the adapter computes is multiplied by α / rank"""
    max_tokens_per_microbatch: int = option(0, at_least=0)
    """tokens in one forward and backward pass, with padding; affects memory, speed and rounding;
    0: 2048 on a CPU, 8192 on a GPU"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, about a third slower"""
    reference_kl: bool = True
    """log the KL to the initial policy; costs a copy of the weights and a forward pass"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N"""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """of matrix products (weights are float32); auto: bfloat16 on a GPU, float32 on a CPU"""
    replicas: int = option(1, at_least=1)
    """with torchrun: copies of the model, each sharded over an equal share of the ranks"""
    threads: int = option(0, at_least=0)
    """CPU threads per process (affects rounding); 0: 2 for a single process, 1 each for several"""

    checkpoint_interval: int = option(25, at_least=1)
    """write a checkpoint every so many steps and at the end"""
    rollouts_interval: int = option(10, at_least=0)
    """record two groups token by token every so many steps, for rollouts.html; 0 for never"""
    output: str = "runs"
    """the run's directory is OUTPUT/NAME"""
    name: str = ""
    """name of the run; empty for script, task, seed and time of day"""
    resume: str = ""
    """directory of a run to continue"""
    resume_if_exists: bool = False
    """with --name: begin this run, continue it, or do nothing if it is complete; exits with 3 if
    stopped before its end, so that the same command serves loops and schedulers"""
    track: bool = False
    """log to Weights & Biases as well"""
    wandb_project: str = "minimal-rlft"
    """Weights & Biases project"""
