# --- algorithm ---
"""REC-OneSide-NoIS: group-relative REINFORCE, clipped on one side, without importance sampling
(Yao et al., "Group-Relative REINFORCE Is Secretly an Off-Policy Algorithm", arXiv 2509.24203).

For each of P prompts, the policy samples a group of G responses, and a program rewards them.
Responses with a higher reward than the mean of their group become more likely, the others less.

Advantage. With the reward r of a response, and the mean r̄ of its group,

    A = r − r̄

is the advantage of all tokens of the response. The group's mean is the baseline: there is no value
function. In a group of equal rewards, A is 0.

Loss. Each update lowers a sum over the N response tokens of a batch, EOS tokens included:

    ρ_t = π(y_t) / π_old(y_t)
    M_t = 1 if (A ≥ 0 and ρ_t ≤ 1+ε_high) or (A ≤ 0 and ρ_t ≥ 1−ε_low), else 0
    loss = −1/N Σ_t A M_t log π(y_t)        M is a constant: no gradient goes through it

π(y_t) is the probability of token y_t after those before it, under the current policy; π_old is the
policy that sampled it. A positive A raises the probabilities of a response's tokens, a negative A
lowers them. By default the two policies are the same: a batch is sampled with the newest weights,
and trained on once. Then ρ = 1 up to rounding, and M = 1: REINFORCE with the group's mean as
baseline.

The mask. π differs from π_old if the sampler gets new weights late (--sync-interval, --sync-offset)
or if a batch is split into parts with an update each (--updates-per-batch; N then counts a part).
M leaves out a token that has already been raised far enough (A > 0) or lowered far enough (A < 0).
"One side": a token that has moved against its advantage is not left out.

No importance sampling ("NoIS"). GRPO has the same mask, and multiplies each token's gradient by ρ,
since another policy sampled it. Here ρ only decides about M. The paper derives the loss without
asking where responses came from. Maximising the reward minus τ KL(π ‖ π_old) has a solution for
which r − τ log(π/π_old) is the same for all responses to a prompt. A step on the squared
differences within a group, taken at π_old, is this loss without M. The derivation holds near π_old,
and M keeps the policy there.

Differences from the paper and the authors' code (Trinity-RFT, `rec_policy_loss.py`):
- Every token weighs 1/N, with N counted over the whole batch. Their code averages within each
  micro-batch, so that a token's weight depends on how the batch happened to be split.
- log π_old is recorded when a token is sampled. The trainer does not compute it again.
- No KL penalty, as in their runs.

Usage:
    # The bundled tiny model and the default task, a few minutes on a CPU.
    python rec_oneside_nois.py
    # A pretrained model on GSM8K, on a GPU.
    python rec_oneside_nois.py --task gsm8k --data openai/gsm8k:main \
        --model Qwen/Qwen2.5-0.5B-Instruct --learning-rate 1e-6 --max-response-tokens 1024
"""
# --- end algorithm ---

# Suffixes of tensor names are their dimensions:
#   P  prompts of a batch
#   G  responses to each prompt, the group
#   B  sequences (a prompt and its response) of a micro-batch
#   T  tokens of its longest sequence, to which the others are padded
#   1  a dimension with one value for all
#
# grpo.py and the other two algorithms, rec_oneside_nois.py and red_weight.py, differ in the regions
# marked "algorithm" only.
#
# On several GPUs, torchrun starts one process per GPU, a rank, which holds a shard of the weights.
# Each rank samples and grades its share of the prompts, then gets the whole batch (`gather_batch`).
# It computes its share of the micro-batches (`micro_batches`), in lockstep with the others, since a
# pass needs all shards; gradients are summed over ranks. With a single process, skip `distributed`.

import math
from dataclasses import dataclass
from typing import Literal

import torch

from common import distributed
from common.batching import micro_batches, mini_batches
from common.checkpoints import Checkpoints
from common.commandline import run
from common.interrupt import finish_step_on_interrupt
from common.logprobs import token_logprobs
from common.lora import trainable
from common.metrics import StepMetrics
from common.models import choose_device, load_policy, load_reference, load_tokenizer, save_model
from common.options import RunOptions, option
from common.rollouts import make_rollouts
from common.runlog import make_log
from common.tasks.problems import load_problem_sets


@dataclass
class Args(RunOptions):  # which adds device, engine, output and the like; see --help
    # --- algorithm ---
    clip_low: float = option(0.2, at_least=0)
    """ε_low: a token with A < 0 is masked once its ratio is below 1 − ε_low"""
    clip_high: float = option(0.2, at_least=0)
    """ε_high: a token with A > 0 is masked once its ratio is above 1 + ε_high"""
    # --- end algorithm ---

    model: str = "tiny"
    """directory or hub name of a Hugging Face causal language model; tiny is the bundled one"""
    task: str = "addition"
    """addition, calculator, gsm8k, or path/to/file.py:ClassName for a task of your own"""
    seed: int = option(1, at_least=0)
    """seed of the order of the problems and of sampling"""
    num_steps: int = option(150, at_least=1)
    """training steps, each on one batch"""
    prompts_per_step: int = option(32, at_least=1)
    """P: prompts in a batch"""
    group_size: int = option(8, at_least=2)
    """G: responses to each prompt"""
    max_response_tokens: int = option(64, at_least=1)
    """longer responses are cut off here, and graded as they are"""
    temperature: float = option(1.0, above=0)
    """divides the logits, when sampling and when training"""

    sync_interval: int = option(1, at_least=1)
    """I: the sampler gets the newest weights after every I-th step, and keeps them in between"""
    sync_offset: int = option(0, at_least=0)
    """O: step s trains on what was sampled with the weights that step s − O began with (I = 1)"""
    updates_per_batch: int = option(1, at_least=1)
    """split a batch into that many parts of whole groups, and make one update with each"""

    learning_rate: float = option(2e-4, above=0)
    """of AdamW; the default is for the tiny model, and 1e-6 is usual for larger ones; with LoRA,
    both are ten times as large"""
    lr_schedule: Literal["constant", "linear"] = "constant"
    """linear: falls over the run, and would be 0 after the last step"""
    warmup_steps: int = option(0, at_least=0)
    """steps over which the learning rate rises linearly at the start"""
    max_grad_norm: float = option(1.0, above=0)
    """clip the global L2 norm of the gradient to this"""


# --- algorithm ---
# All of these functions get `args`, for options of the algorithm.


def advantages(rewards_PG, args):
    """A = r − r̄, float64."""
    advantages_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    # The mean of equal rewards may be rounded: make their advantages exactly 0.
    equal_P1 = (rewards_PG == rewards_PG[:, :1]).all(dim=1, keepdim=True)
    return advantages_PG.masked_fill(equal_P1, 0.0)


def token_weights(advantages_PG, lengths_PG, args):
    """What each token of a response weighs in the loss: 1/N, or 0 if it has nothing to learn."""
    N = lengths_PG.sum()  # of all responses, also those with nothing to learn
    weights_PG = torch.ones_like(advantages_PG) / N
    # This changes no gradient, but responses of weight 0 are spared the backward pass.
    return weights_PG.masked_fill(advantages_PG == 0, 0.0)


def per_token_loss(micro, args):
    """−A M log π for each token of a micro-batch. With ε = ∞, M is 1: plain REINFORCE."""
    ratio_BT = torch.exp(micro.logprobs_BT - micro.sampler_logprobs_BT).detach()  # ρ = π / π_old
    may_rise_BT = (micro.advantages_B1 >= 0) & (ratio_BT <= 1 + args.clip_high)
    may_fall_BT = (micro.advantages_B1 <= 0) & (ratio_BT >= 1 - args.clip_low)
    mask_BT = may_rise_BT | may_fall_BT  # M
    return -micro.advantages_B1 * mask_BT * micro.logprobs_BT


# --- end algorithm ---


def gradient(part, policy, reference, args, precision, metrics):
    """Leave the gradient of the loss in the policy's parameters, and return the loss.

    `part` is the batch, or a part of it with an update of its own. It is split into micro-batches,
    as many sequences as fit into memory. N counts the tokens of the whole part, so the gradients
    of micro-batches are simply added, and the split changes nothing but rounding.
    """
    weights_PG = token_weights(part.advantages_PG, part.lengths_PG, args)
    for parameter in trainable(policy):
        # Zeros rather than None: even if no token learns, AdamW should follow its momentum.
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.zero_()
    total_loss = 0.0
    for micro in micro_batches(part, weights_PG, args.max_tokens_per_microbatch, policy.device):
        if reference is not None:  # for the KL that is logged, and for --kl-coef
            with torch.no_grad():
                micro.reference_logprobs_BT, _ = token_logprobs(
                    reference, micro, args.temperature, precision
                )
        with torch.set_grad_enabled(micro.learns):  # if False, all its tokens weigh 0
            micro.logprobs_BT, micro.entropy_BT = token_logprobs(
                policy, micro, args.temperature, precision
            )
            losses_BT = micro.weights_B1 * per_token_loss(micro, args)
            loss = losses_BT[micro.mask_BT].sum()  # over response tokens: no prompt, no padding
        if micro.learns:
            micro.logprobs_BT.retain_grad()  # shows the metrics which tokens were clipped
            loss.backward()  # with several ranks, this sums their gradients
        metrics.add_micro_batch(micro)
        total_loss += loss.detach().double()  # a tensor: its value would have to be waited for
    return distributed.total(float(total_loss))


def update(policy, optimizer, loss, lr, args, metrics):
    """Make one step of AdamW, with the norm of the gradient limited."""
    grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
    grad_norm = distributed.whole(grad_norm).item()  # that of all ranks, as a number
    finite = math.isfinite(loss) and math.isfinite(grad_norm)
    if finite:  # else the update is skipped; the log ends the run after several in a row
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    metrics.add_update(loss, grad_norm, lr, skipped=not finite)


def learning_rate(step, args):
    """The learning rate of a step, counted from 1."""
    warmup = min(1.0, step / max(1, args.warmup_steps))
    decay = 1 - (step - 1) / args.num_steps if args.lr_schedule == "linear" else 1.0
    return args.learning_rate * warmup * decay


def main(args):
    # Setup. What the user gave is checked before a model is loaded.
    device, precision = choose_device(args.device, args.precision, args.engine)
    distributed.join_ranks(device, args.sampler_timeout)
    log = make_log(__file__, args)
    tokenizer = load_tokenizer(args.model, args.revision)
    train_set, eval_set = load_problem_sets(args, tokenizer)
    policy = load_policy(args, device)
    reference = load_reference(args, device, policy)  # None with --no-reference-kl
    # PyTorch's betas, 0.9 and 0.999. No weight decay: only the reward should move the policy.
    optimizer = torch.optim.AdamW(trainable(policy), weight_decay=0, fused=device.type == "cuda")
    rollouts = make_rollouts(args, train_set, eval_set, policy, optimizer, tokenizer, precision)
    checkpoints = Checkpoints(log, policy, optimizer, rollouts, train_set, eval_set)
    checkpoints.load_newest()  # with --resume: weights, moments, batches, log.step

    with rollouts, log, finish_step_on_interrupt() as interrupt:
        if log.step == 0:
            log.write(0, {}, eval_set.evaluate(rollouts))
        for step in range(log.step + 1, args.num_steps + 1):
            metrics = StepMetrics(log.recorded_rows(step))  # responses to record token by token

            # Sample G responses to each of P prompts. (That may have been done during training.)
            metrics.phase("wait")
            batch = rollouts.next(step)

            # Grade them, and compare the rewards of each group.
            metrics.phase("grade")
            batch = train_set.graded(batch)
            batch = distributed.gather_batch(batch)
            batch.advantages_PG = advantages(batch.rewards_PG, args)

            # Train: by default in one part, the whole batch.
            metrics.phase("train")
            for part in mini_batches(batch, args.updates_per_batch, args.seed):
                loss = gradient(part, policy, reference, args, precision, metrics)
                update(policy, optimizer, loss, learning_rate(step, args), args, metrics)

            # Evaluate with the newest weights. (What batches are sampled with is not affected.)
            evaluation = None
            if step % args.eval_interval == 0 or step == args.num_steps:
                metrics.phase("drain")
                rollouts.drain()  # batches under way come first, and count as time/drain
                metrics.phase("eval")
                evaluation = eval_set.evaluate(rollouts)

            metrics.phase("sync")
            rollouts.publish(step)  # the sampler gets the new weights, if the schedule says so

            # Record the step.
            log.write(step, metrics.result(batch, device, precision), evaluation)
            log.write_completions(step, batch, metrics.recorded_tokens(), train_set)
            stop = step == args.num_steps or distributed.on_any_rank(interrupt.requested)
            if stop or step % args.checkpoint_interval == 0:
                checkpoints.save()
            if stop:
                break

        if log.step == args.num_steps:
            save_model(policy, tokenizer, log.dir / "model")
        log.summarise()


if __name__ == "__main__":
    run(main, Args, __file__)
