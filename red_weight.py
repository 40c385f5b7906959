# --- algorithm ---
"""RED-Weight: group-relative REINFORCE on a re-weighted data distribution (Yao et al.,
"Group-Relative REINFORCE Is Secretly an Off-Policy Algorithm", arXiv 2509.24203).

For each of P prompts x_i, sample a group of G responses y_ij and grade them. Responses with a
reward above their group's mean become more likely, those below it less likely. With the reward r_ij
and the group's mean r̄_i,

    A_ij = r_ij − r̄_i                                                   the advantage, shared by
    all tokens of y_ij
    w_ij = exp(A_ij / τ)                                                the weight of a response
    loss = −1/N Σ_ijt w_ij A_ij log π_θ(y_ijt | x_i, y_ij,<t)

where N is the number of response tokens in the whole batch. What each term is for:
- The group's mean as baseline is more than variance reduction. Maximising reward minus a multiple
  of KL(π ‖ π_old) has a solution for which the reward minus that multiple of log(π/π_old) is the
  same for all responses to a prompt. A gradient step on the squared differences within a group,
  taken at π_old, is this loss with w = 1. Nothing in this asks where the responses came from, so
  there is neither a ratio to the sampling policy nor clipping.
- This leaves the data distribution to our choice. Weighting by exp(A/τ) tilts the sampled
  distribution towards good responses: imitating the good counts for more than avoiding the bad.
  Avoiding the bad is what leads REINFORCE astray on old data, since a probability can be pushed
  down without end.
- τ sets how strongly. With rewards 0 and s, a wrong response has exp(−s/τ) times the weight of a
  right one, whatever r̄ is: all of it for τ → ∞, which is plain REINFORCE with a group baseline,
  and next to nothing for small τ.

Differences from the paper and the authors' code (Trinity-RFT, `rec_policy_loss.py`):
- 1/N is a mean over the tokens of the whole batch. Their code averages within each micro-batch, so
  that a token's weight depends on how the batch happened to be split.
- The weight is not normalised over the group, as in their code: with rewards in [0, 1] and τ = 1 it
  stays within [1/e, e]. What matters is the scale of the rewards over τ.
- Each batch gives one update. No KL penalty, as in their runs.

Usage:
    # The tiny model and the default task, a few minutes on a CPU.
    python red_weight.py
    # A pretrained model on GSM8K, on a GPU.
    python red_weight.py --task gsm8k --data openai/gsm8k:main --model Qwen/Qwen2.5-0.5B-Instruct \
        --learning-rate 1e-6 --max-response-tokens 1024
"""
# --- end algorithm ---

# Suffixes of tensor names are dimensions: P prompts, G responses per prompt (the group), B
# sequences (P·G in a batch, group by group; fewer in a micro-batch), T predicted tokens of a padded
# sequence, 1 broadcast. grpo.py, rec_oneside_nois.py and red_weight.py differ in the regions marked
# "algorithm", and nowhere else. In a single process, `distributed` returns what it is given: on a
# first reading, skip it.

import math
from dataclasses import dataclass
from typing import Literal

import torch

from common import distributed
from common.batching import collate, split_by_token_budget
from common.checkpoints import load_checkpoint, save_checkpoint
from common.commandline import finish_step_on_interrupt, progress, run
from common.logprobs import token_logprobs
from common.metrics import StepMetrics
from common.models import check_context, choose_device, load_model, load_tokenizer, save_model
from common.rollouts import make_rollouts
from common.runlog import open_log
from common.sampling import Plan
from common.tasks import load_problem_sets


@dataclass
class Args:
    # --- algorithm ---
    tau: float = 1.0
    """τ: a response has weight exp(A/τ); smaller values favour good responses more, ∞ is plain
    REINFORCE
    """
    # --- end algorithm ---

    model: str = "tiny"
    """directory or hub name of a Hugging Face causal language model, or tiny, the one in
    common/tiny_model
    """
    revision: str = ""
    """revision of a hub model; empty for its main branch"""
    task: str = "addition"
    """what to train on: addition, gsm8k, or path/to/file.py:ClassName for a task of your own"""
    data: str = ""
    """training data: a .jsonl or .parquet file, or a hub dataset; empty for the task's own"""
    eval_data: str = ""
    """held-out data, in the same formats; empty for the task's own"""
    seed: int = 1
    """seed of the order of the problems and of sampling"""

    num_steps: int = 150
    """training steps; each trains on one batch, with one update"""
    prompts_per_step: int = 32
    """P: prompts in a batch"""
    group_size: int = 8
    """G: responses to each prompt"""
    sync_interval: int = 1
    """I: the sampler gets new weights every I steps"""
    sync_offset: int = 0
    """O: sampling is O batches ahead, and weights lag by up to O + I − 1 updates; I = O = 1 is
    one-step off-policy
    """
    engine: Literal["transformers", "vllm"] = "transformers"
    """what samples the responses; vLLM is installed separately (see the README)"""
    serial: bool = False
    """sample and train alternately in one process, even where a second process could sample during
    training
    """
    sampler_timeout: float = 300.0
    """stop if the sampler's process decodes no token, or a rank does not respond, for this many
    seconds
    """

    max_prompt_tokens: int = 1024
    """problems with longer prompts are left out"""
    max_response_tokens: int = 64
    """longer responses are cut off here, and graded as they are"""
    temperature: float = 1.0
    """softmax temperature in sampler, trainer, reference and entropy"""

    learning_rate: float = 2e-4
    """AdamW learning rate; the default is for the tiny model, and 1e-6 is usual for larger ones"""
    warmup_steps: int = 0
    """steps of linear warm-up; the learning rate is constant afterwards"""
    max_grad_norm: float = 1.0
    """clip the global L2 norm of the gradient to this"""
    max_tokens_per_microbatch: int = 2048
    """tokens in one forward and backward pass, padding included; affects memory and speed, not the
    gradient
    """
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, about a third slower"""
    reference_kl: bool = True
    """log the KL to the initial policy; costs a copy of the weights and a forward pass"""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N"""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """precision of matrix products; weights are always float32; auto is bfloat16 autocast on a GPU,
    float32 on a CPU
    """
    replicas: int = 1
    """with torchrun: copies of the model, each sharded over an equal share of the ranks"""
    threads: int = 0
    """CPU threads per process (affects rounding); 0 means 2 for a single process, 1 each for
    several
    """

    eval_interval: int = 25
    """evaluate on held-out problems at the start, every so many steps and at the end"""
    eval_size: int = 256
    """number of held-out problems"""
    checkpoint_interval: int = 25
    """write a checkpoint every so many steps and at the end"""
    rollouts_interval: int = 10
    """record two groups token by token every so many steps, for the page rollouts.html; 0 for never
    """
    output: str = "runs"
    """the run's directory is OUTPUT/NAME"""
    name: str = ""
    """name of the run; empty for script, task, seed and time of day"""
    resume: str = ""
    """directory of a run to continue"""
    track: bool = False
    """log to Weights & Biases as well"""
    wandb_project: str = "minimal-rlft"
    """Weights & Biases project"""


# --- algorithm ---
def advantages(rewards_PG, args):
    """A = r − r̄ with the group's mean, in float64."""
    advantages_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    # For equal rewards exactly 0, despite rounding of the mean: `main` gives them no backward pass.
    all_equal_P1 = (rewards_PG == rewards_PG[:, :1]).all(dim=1, keepdim=True)
    return advantages_PG.masked_fill(all_equal_P1, 0.0)


# --- end algorithm ---


# --- algorithm ---
def per_token_loss(logprobs_BT, sampler_logprobs_BT, advantages_B1, mask_BT, args):
    """−exp(A/τ) A log π of each token. No ratio, no clipping.

    `main` applies mask_BT; it is here for losses of whole sequences.
    """
    return -torch.exp(advantages_B1 / args.tau) * advantages_B1 * logprobs_BT


# --- end algorithm ---


def main(args):
    # Setup. The input is checked before a model is loaded.
    device, precision = choose_device(args.device, args.precision, args.engine)
    distributed.join_ranks(
        device, args.sampler_timeout
    )  # under torchrun; see common/distributed.py
    log = open_log(__file__, vars(args))
    tokenizer = load_tokenizer(args.model, args.revision)
    train_set, eval_set = load_problem_sets(
        args.task, args.data, args.eval_data, args.eval_size, tokenizer, args.max_prompt_tokens
    )
    check_context(
        args.model, args.revision, train_set.prompts + eval_set.prompts, args.max_response_tokens
    )

    model = load_model(args.model, args.revision, device, args.gradient_checkpointing)
    log.remember_inputs(model, train_set, eval_set)  # a resumed run must find them unchanged
    distributed.shard(model, device, args.replicas)
    reference = (
        load_model(args.model, args.revision, device).requires_grad_(False)
        if args.reference_kl
        else None
    )
    distributed.shard(reference, device, args.replicas)
    # No weight decay: only the reward should move the policy.
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, betas=(0.9, 0.999), weight_decay=0.0
    )
    # Which prompts each step samples, with the weights after which update; under torchrun, this
    # rank's share of them.
    plan = Plan(
        train_set.prompts, args.prompts_per_step, args.group_size, args.sync_interval, args.sync_offset, args.seed,
        distributed.share(args.prompts_per_step),
    )  # fmt: skip
    rollouts = make_rollouts(
        plan, eval_set.prompts, model, tokenizer, args.max_response_tokens, args.temperature, precision,
        engine=args.engine, serial=args.serial, timeout=args.sampler_timeout, threads=args.threads,
        model_name=args.model, revision=args.revision,
    )  # fmt: skip

    checkpointed = {"log": log, "model": model, "optimizer": optimizer, "rollouts": rollouts}
    if args.resume:
        load_checkpoint(log.dir, checkpointed)

    with rollouts, log, finish_step_on_interrupt() as interrupt:
        if log.step == 0:
            log.write(0, eval_set.evaluate(rollouts))

        for step in range(log.step + 1, args.num_steps + 1):
            metrics = StepMetrics(
                log.recorded_rows(step)
            )  # sequences for rollouts.html; none on most steps

            # Sample G responses to each of P prompts, with the log-prob of every sampled token. By
            # default, this call does it, with the current weights. Where weights may lag, sampling
            # may run beside training, in a second process (see common/README.md, "Schedule and
            # lag").
            batch = rollouts.next(step)
            metrics.lap("wait")

            # Grade each response, and turn the rewards of a group into advantages.
            grades, texts = train_set.grade(batch.problems, batch.responses)
            batch, grades, texts = distributed.gather_batch(
                batch, grades, texts
            )  # all ranks know the whole batch
            rewards_PG = torch.tensor([g["reward"] for g in grades], dtype=torch.float64).view(
                -1, args.group_size
            )
            advantages_B = advantages(rewards_PG, args).flatten()
            metrics.lap("grade")

            # Loss and gradient, in micro-batches. N counts the whole batch, so the split does not
            # change the gradient. Responses with advantage 0 have gradient 0: they form
            # micro-batches of their own, with a forward pass only, for the metrics.
            N = sum(len(response) for response in batch.responses)
            has_gradient = (advantages_B != 0).tolist()
            for (
                parameter
            ) in model.parameters():  # not None: on zeros, AdamW still follows its momentum
                parameter.grad = torch.zeros_like(parameter)
            total_loss = 0.0
            splits = split_by_token_budget(
                batch.lengths, args.max_tokens_per_microbatch, has_gradient
            )
            # In a single process: all of them, with real = True. Under torchrun: this rank's share;
            # to make as many passes as the other ranks, it may repeat rows, with real = False.
            for rows, real in progress(distributed.deal(splits, has_gradient), "micro-batches"):
                micro = collate(batch, rows, device)
                advantages_B1 = advantages_B[rows].float().unsqueeze(1).to(device)
                backward = has_gradient[rows[0]]  # equal for all rows of a micro-batch
                with torch.set_grad_enabled(backward):
                    logprobs_BT, entropy_BT = token_logprobs(
                        model, micro, args.temperature, precision
                    )
                    losses_BT = per_token_loss(
                        logprobs_BT, micro.sampler_logprobs_BT, advantages_B1, micro.mask_BT, args
                    )
                    loss = real * losses_BT[micro.mask_BT].sum() / N  # 1/N Σ over response tokens
                if backward:
                    # for the metrics: a response token with gradient 0 was clipped
                    logprobs_BT.retain_grad()
                    # gradients accumulate over micro-batches, and are summed over ranks
                    loss.backward()
                with torch.no_grad():
                    ref_logprobs_BT = (
                        reference
                        and token_logprobs(reference, micro, args.temperature, precision)[0]
                    )
                if real:
                    metrics.add_tokens(micro, logprobs_BT, entropy_BT, ref_logprobs_BT)
                total_loss += loss.item()
            total_loss = sum(distributed.gather(total_loss))

            # Update.
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            grad_norm = distributed.whole(grad_norm).item()
            lr = optimizer.param_groups[0]["lr"] = args.learning_rate * min(
                1.0, step / max(1, args.warmup_steps)
            )
            finite = math.isfinite(total_loss + grad_norm)
            if finite:  # else skip the update; log.write ends the run after several in a row
                optimizer.step()
            metrics.lap("train")

            # Evaluate, always with the newest weights; then hand them to the sampler if the
            # schedule says so.
            evaluation = {}
            if step % args.eval_interval == 0 or step == args.num_steps:
                evaluation = eval_set.evaluate(rollouts)
                metrics.lap("eval")
            rollouts.publish(step)
            metrics.lap("sync")

            # Log, and write a checkpoint.
            measured = {
                "loss": total_loss,
                "grad_norm": grad_norm,
                "lr": lr,
                "update_skipped": float(not finite),
            }
            log.write(
                step,
                measured
                | evaluation
                | metrics.result(batch, rewards_PG, grades, device, precision),
            )
            problems = [train_set.problems[number] for number in batch.problems]
            log.write_completions(
                step, batch, problems, texts, rewards_PG, advantages_B, metrics.tokens
            )
            last = step == args.num_steps or any(distributed.gather(interrupt.requested))
            if last or step % args.checkpoint_interval == 0:
                save_checkpoint(log.dir, step, checkpointed)
            if last:
                break

        if log.step == args.num_steps:
            save_model(model, tokenizer, log.dir / "model")
        log.summarise()


if __name__ == "__main__":
    run(main, Args, __file__)
