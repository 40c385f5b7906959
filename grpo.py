# --- algorithm ---
"""GRPO, Group Relative Policy Optimization (Shao et al., DeepSeekMath, arXiv 2402.03300).

For each of P prompts x_i, draw a group of G responses y_ij, grade them, and make those above their group's mean more
likely and those below it less so. With the reward r_ij, the group's mean r̄_i and standard deviation σ_i,

    A_ij = (r_ij − r̄_i) / (σ_i + 1e-6)                                  the advantage, one for all tokens of y_ij
    ρ_ijt = π_θ(y_ijt | x_i, y_ij,<t) / π_old(y_ijt | x_i, y_ij,<t)     the ratio to the policy that drew the token
    loss = −1/N Σ_ijt min(ρ_ijt A_ij, clip(ρ_ijt, 1−ε_low, 1+ε_high) A_ij)

where N counts the response tokens of the whole batch. The group replaces a learned value function: its mean is the
baseline that says what was to be expected of this prompt. The ratio corrects for tokens drawn by an older policy, and
the clipping stops pushing a token once it has moved by ε in the direction its advantage asks for.

Where this deviates from the paper, and why:
- Every token weighs the same, 1/N, whichever response it is in (as in DAPO, arXiv 2503.14476): averaging within each
  response first, as the paper does, gives tokens of long wrong answers a smaller push than those of short ones.
- No KL penalty: the methods compared in this repository run without; KL to the initial policy is logged instead.
- π_old is what the sampler reported when it drew the token, not a recomputation by the trainer: that is the policy
  the tokens came from. One update is made from each batch, so that all lag comes from the schedule: by default there
  is none, ρ is 1 up to rounding and nothing is clipped.
- ε_low and ε_high are two numbers; with both equal this is the paper's clipping.

Run it:
    python grpo.py                                                          the embedded task and model, in minutes
    python grpo.py --task gsm8k --model Qwen/Qwen2.5-0.5B-Instruct \
        --data openai/gsm8k:main --learning-rate 1e-6 --max-response-tokens 1024     on a GPU
"""
# --- end algorithm ---

# Dimension key, the suffixes of tensor names: P prompts per step; G responses per prompt, a group; B = P·G sequences,
# or the rows of one micro-batch; T predicted tokens of a padded sequence; 1 a dimension that is broadcast.

import copy
import dataclasses
import math
import time
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from common.batching import collate, padding_share, split_by_token_budget
from common.checkpoints import latest_checkpoint, save_checkpoint
from common.commandline import require, run
from common.engines import make_rollouts, takes_turns
from common.errors import RunStopped
from common.interrupts import finish_step_on_interrupt
from common.logprobs import token_logprobs, token_policy_loss
from common.metrics import TokenStatistics, peak_memory_gib, reward_statistics
from common.models import (
    TINY_MODEL,
    check_context,
    choose_device,
    end_of_sequence_ids,
    load_config,
    load_model,
    load_tokenizer,
    save_model,
)
from common.products import use_threads
from common.rollouts import RolloutPlan, evaluate
from common.runlog import RunLog, new_run_directory
from common.samplers import TransformersSampler
from common.tasks import encode_problems, grade, load_task


@dataclass
class Args:
    # --- algorithm ---
    clip_low: float = 0.2
    """ε_low: a token with a negative advantage gets no gradient once its ratio is below 1 − ε_low"""
    clip_high: float = 0.2
    """ε_high: a token with a positive advantage gets no gradient once its ratio is above 1 + ε_high"""
    # --- end algorithm ---

    model: str = TINY_MODEL
    """directory or hub name of a Hugging Face causal language model; the default is the embedded tiny one"""
    revision: str = ""
    """revision of a hub model; empty for its main branch"""
    task: str = "addition"
    """what to train on: addition, gsm8k, or path/to/file.py:ClassName for a task of your own"""
    data: str = ""
    """the task's training data: a .jsonl or .parquet file, or a hub dataset; empty for the task's own"""
    eval_data: str = ""
    """held-out data, likewise; empty for the task's own choice"""
    seed: int = 1
    """seeds the order of the problems and the sampling"""

    num_steps: int = 150
    """training steps; each draws one batch and makes one update"""
    prompts_per_step: int = 32
    """P: prompts in a batch"""
    group_size: int = 8
    """G: responses drawn to each prompt"""
    sync_interval: int = 1
    """I: the sampler gets new weights every I steps"""
    sync_offset: int = 0
    """O: how many updates old a batch is at least; (I, O) = (1, 1) is one-step off-policy"""
    engine: Literal["transformers", "vllm"] = "transformers"
    """what draws the responses; vLLM is installed separately, see the README"""
    serial: bool = False
    """sample in the trainer's process, in turns with training, and get the same batches; always so on a GPU, unless
    vLLM has one of its own"""
    sampler_timeout: float = 300.0
    """stop when the sampler has not decoded a token for so many seconds"""

    max_prompt_tokens: int = 1024
    """longest prompt"""
    long_prompts: Literal["drop", "refuse"] = "drop"
    """what to do with longer prompts: leave them out and say how many, or refuse to start"""
    max_response_tokens: int = 64
    """responses are cut at this length, and graded as they stand"""
    temperature: float = 1.0
    """divides the logits everywhere: sampler, trainer, reference, entropy"""

    learning_rate: float = 2e-4
    """of AdamW; for pretrained models 1e-6 is usual"""
    warmup_steps: int = 0
    """steps over which the learning rate rises linearly to its constant value"""
    max_grad_norm: float = 1.0
    """the gradient's global L2 norm is clipped to this"""
    max_skipped_updates: int = 5
    """stop after so many updates in a row were skipped for a loss or gradient that is not finite"""
    max_tokens_per_microbatch: int = 2048
    """tokens in one forward and backward pass, padding included; changes memory and speed, not the result"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, a third more time"""
    reference_kl: bool = True
    """log the KL to the initial policy; costs its forward pass and a copy of the weights"""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N"""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """of matrix products; weights are always float32; auto is bfloat16 autocast on a GPU, float32 on a CPU"""
    threads: int = 0
    """CPU threads of PyTorch in each process, on which the last bits depend; 0 for 2, or for 1 where two processes work
    at the same time"""

    eval_interval: int = 25
    """evaluate on held-out problems before training, every so many steps, and at the end"""
    eval_size: int = 256
    """number of held-out problems"""
    checkpoint_interval: int = 25
    """write a checkpoint every so many steps, and at the end"""
    keep_checkpoints: int = 2
    """how many of the newest checkpoints to keep"""
    completions_per_step: int = 4
    """how many completions to write to completions.jsonl"""
    output: str = "runs"
    """the run's directory is OUTPUT/NAME"""
    name: str = ""
    """name of the run; empty for script, task, seed and time of day"""
    resume: str = ""
    """directory of a run to continue"""
    track: bool = False
    """log to Weights & Biases as well"""
    wandb_project: str = "minimal-rlft"
    """its project"""
    wandb_entity: str = ""
    """its entity (team or user); empty for the account's default"""
    wandb_mode: Literal["online", "offline"] = "online"
    """offline keeps the run in its directory, for `wandb sync` later"""


# --- algorithm ---
def advantages(rewards_PG, args):
    """A = (r − r̄) / (σ + 1e-6) with the group's mean and population standard deviation; float64 in and out."""
    centred_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    advantages_PG = centred_PG / (rewards_PG.std(dim=1, correction=0, keepdim=True) + 1e-6)
    # A group whose rewards are all equal says nothing about its responses. The mean of equal numbers need not be that
    # number after rounding, and dividing the residue by 1e-6 would make it an advantage: exactly zero instead.
    all_equal_P1 = (rewards_PG == rewards_PG[:, :1]).all(dim=1, keepdim=True)
    return advantages_PG.masked_fill(all_equal_P1, 0.0)


# --- end algorithm ---


# --- algorithm ---
def per_token_loss(logprobs_BT, sampler_logprobs_BT, advantages_B1, args):
    """−min(ρ A, clip(ρ, 1−ε_low, 1+ε_high) A), elementwise; the caller sums over tokens and divides by N."""
    ratio_BT = torch.exp(logprobs_BT - sampler_logprobs_BT)
    clipped_BT = ratio_BT.clamp(1 - args.clip_low, 1 + args.clip_high)
    return -torch.minimum(ratio_BT * advantages_B1, clipped_BT * advantages_B1)


# --- end algorithm ---


def check(args):
    """Refuse arguments that cannot work, before anything is loaded. Raises `BadInput`."""
    at_least_one = (
        "num_steps prompts_per_step sync_interval max_prompt_tokens max_response_tokens max_skipped_updates "
        "max_tokens_per_microbatch eval_interval eval_size checkpoint_interval keep_checkpoints"
    )
    for field in at_least_one.split():
        require(getattr(args, field) >= 1, field, getattr(args, field), "give a number of at least 1")
    for field in ("sync_offset", "threads", "warmup_steps", "completions_per_step"):
        require(getattr(args, field) >= 0, field, getattr(args, field), "give 0 or more")
    for field in ("temperature", "learning_rate", "max_grad_norm", "sampler_timeout"):
        require(0 < getattr(args, field) < math.inf, field, getattr(args, field), "give a finite number above 0")
    steepest = "AdamW's first step multiplies it by 10, and float32 ends at 3.4e38; give at most 1e37"
    require(args.learning_rate <= 1e37, "learning_rate", args.learning_rate, steepest)
    for field in dataclasses.fields(args):
        if field.type is float:  # the algorithm's own options included
            require(getattr(args, field.name) > 0, field.name, getattr(args, field.name), "give a number above 0")
    require(args.group_size >= 2, "group_size", args.group_size, "a response needs others to compare with; give 2+")


def main(args):
    # Everything that can be wrong with the input shows before a model is loaded.
    check(args)
    device, precision = choose_device(args.device, args.precision)
    serial = takes_turns(args.engine, args.serial, device)
    schedule = (args.sync_interval, args.sync_offset)
    args.threads = args.threads or (2 if serial or schedule == (1, 0) else 1)
    use_threads(args.threads)
    name = args.name or f"{Path(__file__).stem}-{Path(args.task).stem}-{args.seed}-{datetime.now():%Y%m%d-%H%M%S}"
    run_dir = Path(args.resume) if args.resume else new_run_directory(args.output, name)
    task = load_task(args.task, args.data, args.eval_data, args.eval_size)
    config = load_config(args.model, args.revision)
    tokenizer = load_tokenizer(args.model, args.revision)
    prompt_limit = (args.max_prompt_tokens, args.long_prompts)
    problems, prompts = encode_problems(task, "train", tokenizer, *prompt_limit)
    eval_problems, eval_prompts = encode_problems(task, "eval", tokenizer, *prompt_limit)
    check_context(config, prompts + eval_prompts, args.max_response_tokens)

    model = load_model(args.model, args.revision, device, args.gradient_checkpointing)
    reference = copy.deepcopy(model).requires_grad_(False) if args.reference_kl else None
    # No weight decay: nothing but the reward should move the policy.
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.999), weight_decay=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # a step without any gradient still moves by momentum
    eos_ids = end_of_sequence_ids(model, tokenizer)
    pad_id = 0  # any token will do: masks come from lengths
    sampler = TransformersSampler(model, eos_ids, pad_id, args.max_response_tokens, args.temperature, precision)
    batch_shape = (args.prompts_per_step, args.group_size)
    plan = RolloutPlan(prompts, *batch_shape, *schedule, args.seed)
    rollouts = make_rollouts(
        args.engine, serial, sampler, plan, args.model, args.revision, args.threads, args.sampler_timeout
    )

    step, elapsed_seconds, skipped_in_a_row, offsets = 0, 0.0, 0, {}
    if args.resume and (checkpoint := latest_checkpoint(run_dir)):
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        rollouts.load_state(checkpoint["rollouts"])
        step, elapsed_seconds = checkpoint["step"], checkpoint["elapsed_seconds"]
        skipped_in_a_row, offsets = checkpoint["skipped_in_a_row"], checkpoint["offsets"]
        del checkpoint  # it holds a copy of all weights

    log = RunLog(run_dir, Path(__file__).stem, dataclasses.asdict(args), step, args.num_steps, offsets)
    with log, rollouts, finish_step_on_interrupt() as interrupt:
        if args.track:
            log.track(args.wandb_project, args.wandb_entity, args.wandb_mode)
        if step == 0:
            log.write(0, evaluate(sampler, task, tokenizer, eval_problems, eval_prompts))

        while step < args.num_steps and not interrupt.requested:
            step += 1
            step_started, step_started_at = time.perf_counter(), time.time()

            # Sample: G responses to each of P prompts. Version j of the weights is what update j left; the schedule
            # (common/schedule.py) says which version draws which batch, and the lag is how many updates ago that was.
            # With the tokens come the log-probs they were drawn with (common/samplers.py).
            batch = rollouts.next(step)
            sampled = time.perf_counter()
            lag = step - 1 - batch.version

            # Grade, and turn rewards into advantages: one number per response, shared by its tokens.
            batch_problems = [problems[index] for index in batch.problems for _ in range(args.group_size)]
            grades, texts = grade(task, tokenizer, batch_problems, batch.responses)
            rewards_PG = torch.tensor([g["reward"] for g in grades], dtype=torch.float64).view(batch_shape)
            advantages_B = advantages(rewards_PG, args).flatten()
            graded = time.perf_counter()

            # One update. N is counted before the batch is split, so how it is split changes nothing but rounding.
            response_lengths = [len(response) for response in batch.responses]
            lengths = [len(p) + n for p, n in zip(batch.prompts, response_lengths, strict=True)]
            num_tokens = sum(response_lengths)
            # Responses without advantage have no gradient: in micro-batches of their own, they skip the backward pass.
            has_gradient = (advantages_B != 0).tolist()
            splits = split_by_token_budget(lengths, args.max_tokens_per_microbatch, group_by=has_gradient)
            statistics, loss_sum = TokenStatistics(), 0.0
            optimizer.zero_grad(set_to_none=False)
            for rows in splits:
                micro = collate(batch.prompts, batch.responses, batch.logprobs, rows, pad_id, device)
                token_args = (micro.inputs_BT, micro.attention_BT, micro.targets_BT, micro.mask_BT)
                advantages_B1 = advantages_B[rows].float().unsqueeze(1).to(device)
                given = {"sampler_logprobs_BT": micro.sampler_logprobs_BT, "advantages_B1": advantages_B1, "args": args}
                with torch.set_grad_enabled(has_gradient[rows[0]]):
                    loss, logprobs_BT, entropy_BT, slopes_BT = token_policy_loss(
                        model, *token_args, args.temperature, partial(per_token_loss, **given), precision
                    )
                    loss = loss / num_tokens  # a sum over these rows' tokens; micro-batches add up in the gradient
                if loss.requires_grad:
                    loss.backward()
                    statistics.add_clipped((slopes_BT == 0)[micro.mask_BT])  # the loss is flat: no gradient
                ref_logprobs_BT = None
                if reference is not None:
                    with torch.no_grad():
                        ref_logprobs_BT, _ = token_logprobs(reference, *token_args, args.temperature, precision)
                statistics.add(micro.mask_BT, logprobs_BT, micro.sampler_logprobs_BT, entropy_BT, ref_logprobs_BT)
                loss_sum += loss.item()
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm).item()
            lr = args.learning_rate * min(1.0, step / max(1, args.warmup_steps))
            optimizer.param_groups[0]["lr"] = lr
            skip = not (math.isfinite(loss_sum) and math.isfinite(grad_norm))
            skipped_in_a_row = skipped_in_a_row + 1 if skip else 0
            if not skip:
                optimizer.step()
            trained = time.perf_counter()

            # These weights are version `step`; the sampler gets them if the schedule says so.
            rollouts.publish(step)
            step_ended = time.perf_counter()
            elapsed_seconds += step_ended - step_started

            metrics = {
                **reward_statistics(rewards_PG, grades, response_lengths, batch.truncated),
                **statistics.result(num_tokens, same_weights=lag == 0),
                **batch.measured,
                "loss": loss_sum,
                "grad_norm": grad_norm,
                "lr": lr,
                "lag": lag,
                "weights_version": batch.version,
                "update_skipped": float(skip),
                "padding_share": padding_share(lengths, splits),
                "time/sample_started_at": batch.sample_started_at,
                "time/step_started_at": step_started_at,
                "time/sample": batch.sample_seconds,
                "time/wait": sampled - step_started,
                "time/grade": graded - sampled,
                "time/train": trained - graded,
                "time/sync": step_ended - trained,
                "time/step": step_ended - step_started,
                "time/elapsed_hours": elapsed_seconds / 3600,
                "throughput/sampled_tokens_per_second": num_tokens / batch.sample_seconds,
                "throughput/trained_tokens_per_second": sum(lengths) / (trained - graded),
                "memory/peak_gib": peak_memory_gib(device),
            }
            if step % args.eval_interval == 0 or step == args.num_steps:
                metrics |= evaluate(sampler, task, tokenizer, eval_problems, eval_prompts)
            log.write(step, metrics)
            log.write_completions(
                step, args.completions_per_step, batch_problems, texts, rewards_PG.flatten(), advantages_B
            )

            if skipped_in_a_row == args.max_skipped_updates:
                raise RunStopped(
                    f"{skipped_in_a_row} updates in a row had a loss or gradient that was not finite (step {step}): "
                    f"look at loss, grad_norm and ratio/max in {run_dir / 'metrics.jsonl'}, and lower --learning-rate."
                )
            if step % args.checkpoint_interval == 0 or step == args.num_steps or interrupt.requested:
                state = {
                    "step": step,
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "rollouts": rollouts.state(),
                    "elapsed_seconds": elapsed_seconds,
                    "skipped_in_a_row": skipped_in_a_row,
                    "offsets": log.offsets(),
                }
                save_checkpoint(run_dir, step, state, args.keep_checkpoints)

        if step == args.num_steps:
            save_model(model, tokenizer, run_dir / "model")
        log.summarise()


if __name__ == "__main__":
    run(main, Args, __file__)
