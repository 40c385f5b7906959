"""Where batches come from: in turns with training, or beside it; by transformers or by vLLM."""

import os
import sys
import types
from functools import partial

import torch
from transformers.utils.logging import disable_progress_bar

from common.distributed import by_layers, share, size
from common.environment import NOTES
from common.errors import BadInput, is_out_of_memory
from common.layers import use_threads
from common.models import end_of_sequence_ids, load_model
from common.sampling import Plan
from common.sampling.overlapped import OverlappedRollouts
from common.sampling.serial import SerialRollouts
from common.sampling.transformers import TransformersSampler
from common.sampling.verify import TOLERANCE, sampler_mismatch
from common.sampling.vllm import KEEP_FREED_MEMORY, make_vllm_sampler
from common.tasks.turns import environment_of, warn_of_endless_responses


def make_rollouts(args, train_set, eval_set, policy, optimizer, tokenizer, precision):
    """`SerialRollouts` or `OverlappedRollouts`, and PyTorch's number of threads set to match.

    Which of them: see the table in common/README.md, Schedule and lag. `args` are the script's,
    both sets are `ProblemSet`s, `policy` is the trainer's model, `optimizer` its AdamW or None,
    `precision` "float32" or "bfloat16". Raises `BadInput` if sampling cannot work.
    """
    plan = make_plan(args, train_set)
    on_policy = (plan.sync_interval, plan.sync_offset) == (1, 0)
    own_gpu = gpu_for_the_engine(args, policy.device)
    in_turns = args.serial or on_policy or (policy.device.type == "cuda" and own_gpu is None)
    threads = args.threads or (2 if in_turns and size() == 1 else 1)
    use_threads(threads)
    prompts = train_set.prompts + eval_set.prompts
    few = min(8, args.max_response_tokens)
    check_decoding(policy, prompts, few, args.temperature, precision, args.model)

    eos_ids = end_of_sequence_ids(policy, tokenizer)
    warn_of_endless_responses([train_set, eval_set], eos_ids)
    generation = (eos_ids, args.max_response_tokens, args.temperature, precision)
    source = (args.task, args.data, args.eval_data, args.eval_size)
    environment = environment_of([train_set, eval_set], source, eos_ids, args.sampler_timeout)
    verified = args.engine == "vllm"
    start = (args.model, args.revision, threads)
    if verified:
        longest_prompt = max(len(prompt) for prompt in prompts)
        make_sampler = partial(
            make_vllm_sampler, *start, *generation, longest_prompt, environment=environment
        )
    else:
        frozen = args.lora_rank > 0 and precision == "float32"
        make_sampler = partial(load_sampler, *start, frozen, *generation, environment)
    if not in_turns:
        variables = KEEP_FREED_MEMORY if verified else {}
        if own_gpu is not None:
            variables = {"CUDA_VISIBLE_DEVICES": own_gpu}
        return OverlappedRollouts(
            policy, make_sampler, plan, args.temperature, precision, args.sampler_timeout,
            verified, variables,
        )  # fmt: skip
    if not verified:
        few_tokens = (few, args.temperature, precision)
        one_turn = environment is None  # a graph does not stop to ask
        if args.cuda_graphs and one_turn and use_graphs(policy, prompts, *few_tokens):
            from common.sampling.graphs import GraphSampler  # a CPU does without

            return SerialRollouts(policy, GraphSampler(policy, *generation), plan)
        sampler = TransformersSampler(policy, *generation, environment)
        return SerialRollouts(policy, sampler, plan)
    if policy.device.index and size() == 1:
        how = "vLLM takes the first GPU; set CUDA_VISIBLE_DEVICES instead"
        raise BadInput(f"--device {policy.device}: {how}.")
    if optimizer is not None and policy.device.type == "cuda":
        create_training_state(optimizer)  # an engine on the same GPU takes of what is left
    num_sequences = args.prompts_per_step * args.group_size
    sampler = make_sampler(beside=policy, num_sequences=num_sequences)
    return SerialRollouts(policy, sampler, plan, verified)


def make_plan(args, train_set):
    """Which prompts each batch has, and which version of the weights samples it."""
    return Plan(
        prompts=train_set.prompts,
        prompts_per_step=args.prompts_per_step,
        group_size=args.group_size,
        sync_interval=args.sync_interval,
        sync_offset=args.sync_offset,
        seed=args.seed,
        mine=share(args.prompts_per_step),
        problems=train_set.to_reply_to(),
    )


def create_training_state(optimizer):
    """Make gradients and AdamW's moments, all 0, which else appear with the first update."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
        learning_rate, group["lr"] = group["lr"], 0.0  # so that the step moves no weight
        optimizer.step()
        group["lr"] = learning_rate
    for state in optimizer.state.values():
        state["step"].zero_()


def gpu_for_the_engine(args, device):
    """The GPU that a vLLM engine can have for itself, as CUDA_VISIBLE_DEVICES names it, or None.

    There is one if this machine has two GPUs for each of its ranks.
    """
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    num_gpus = torch.cuda.device_count()
    if args.engine != "vllm" or device.type != "cuda" or num_gpus < 2 * ranks_here:
        return None
    everything = ",".join(str(gpu) for gpu in range(num_gpus))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or everything
    trainers = range(ranks_here) if size() > 1 else [device.index or 0]
    others = [gpu for place, gpu in enumerate(visible.split(",")) if place not in trainers]
    return others[int(os.environ.get("LOCAL_RANK", 0))]


def check_decoding(model, prompts, num_tokens, temperature, precision, name):
    """Raise `BadInput` unless decoding with a cache and one forward pass give equal log-probs."""
    sampler = TransformersSampler(model, {-1}, num_tokens, temperature, precision)
    try:
        gap = decoding_gap(sampler, prompts)
    except Exception as error:  # as varied as models are
        if is_out_of_memory(error):
            raise
        what = f"--model {name} cannot be sampled from ({error!r})"
        raise BadInput(f"{what}: give another model.") from error
    if not gap <= TOLERANCE[precision]:  # so that NaN fails as well
        what = f"--model {name}: decoding is {gap:.2g} nats off the forward pass"
        why = "there is NaN in it, it changes logits after the head, or its cache does not work"
        raise BadInput(f"{what}; {why}: give another model.")


def use_graphs(model, prompts, num_tokens, temperature, precision):
    """Whether this model is to be sampled from by CUDA graphs, which is noted in environment.txt.

    Not on a CPU, on several ranks, where the model cannot be recorded, or if a trial fails.
    """
    if model.device.type != "cuda":
        return False
    from common.sampling.graphs import GraphSampler, can_use_graphs

    works = size() == 1 and can_use_graphs(model)  # sharded weights move in memory
    if works:
        try:
            gap = decoding_gap(
                GraphSampler(model, {-1}, num_tokens, temperature, precision), prompts
            )
            failure = "" if gap <= TOLERANCE[precision] else f"{gap:.2g} nats off"
        except Exception as error:  # as varied as models and drivers are
            failure = repr(error)
        if failure:
            what = "Sampling goes on without CUDA graphs, and is slower"
            print(f"{what}: {failure}.", file=sys.stderr)
            works = False
    NOTES["decoding"] = "CUDA graphs" if works else "one launch per operation"
    return works


def decoding_gap(sampler, prompts):
    """Mean |log-prob of a sampler − that of one forward pass| over greedy answers.

    All ranks decode the same, so that nobody has to hold all weights of a model for it.
    """
    sampler.weights_at_hand = by_layers
    # Decoding pads the shorter prompt on the left, `collate` on the right.
    prompts = [min(prompts, key=len), max(prompts, key=len)]
    batch = types.SimpleNamespace(prompts=prompts, **vars(sampler.greedy(prompts)))
    mismatch = sampler_mismatch(sampler.model, sampler.temperature, sampler.precision, batch)
    return mismatch["sampler_mismatch/mean"]


def load_sampler(name, revision, threads, frozen, *generation):
    """A `TransformersSampler` on a model of its own, on the CPU.

    For a process that samples beside training; `generation` are its other arguments. `frozen`,
    whether the trainer's weights do not learn, decides last bits: PyTorch computes some products of
    frozen weights in another way.
    """
    use_threads(threads)
    disable_progress_bar()  # the trainer shows its own
    model = load_model(name, revision, torch.device("cpu")).requires_grad_(not frozen)
    return TransformersSampler(model, *generation)
