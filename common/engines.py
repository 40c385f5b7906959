"""Which engine draws the responses, in which process, on which device."""

import os
from functools import partial

import torch

from common.errors import BadInput
from common.rollouts import SerialRollouts, sampler_mismatch
from common.sampler_process import OverlappedRollouts
from common.samplers import load_transformers_sampler
from common.vllm_sampler import KEEP_FREED_MEMORY, make_vllm_sampler, require_vllm
from common.weight_sync import describe


def takes_turns(engine, serial, device):
    """Whether sampling is to take turns with training: as asked for, or because both would share the only GPU.

    Args:
        engine: "transformers" or "vllm".
        serial: True if it is asked for.
        device: the trainer's, a `torch.device`.

    Raises `BadInput` for an engine that is not installed or cannot be where it would have to be.
    """
    if engine == "vllm":
        require_vllm(device.type)
    own_gpu = engine == "vllm" and torch.cuda.device_count() > 1
    serial = serial or (device.type == "cuda" and not own_gpu)
    if engine == "vllm" and serial and device.index:
        raise BadInput(
            f"--device {device} cannot work with --engine vllm --serial, whose engine takes the first GPU it sees: set "
            "CUDA_VISIBLE_DEVICES to that GPU, and leave --device out."
        )
    return serial


def make_rollouts(engine, serial, sampler, plan, model, revision, threads, timeout):
    """Where batches come from: in turns with training, or from a process of its own that draws meanwhile.

    Args:
        engine: "transformers" or "vllm".
        serial: as `takes_turns` says.
        sampler: a `TransformersSampler` on the trainer's live weights; an engine gets its settings.
        plan: a `RolloutPlan`.
        model, revision: as in `models.load_model`.
        threads: CPU threads of the sampling process.
        timeout: as in `SerialRollouts` and `OverlappedRollouts`.

    Raises `BadInput` where an engine cannot start in this process.
    """
    # Sampler and trainer must agree on log-probs where both hold the same weights.
    settings = (sampler.pad_id, sampler.temperature, sampler.precision)
    mismatch = partial(sampler_mismatch, sampler.model, *settings)
    eos_ids = set(sampler.eos_ids.tolist())
    if engine == "transformers":
        if serial:
            return SerialRollouts(sampler, plan, mismatch, timeout)
        options = (eos_ids, sampler.pad_id, sampler.max_tokens, sampler.temperature, sampler.precision)
        make_sampler = partial(load_transformers_sampler, model, revision, threads, *options)
        return OverlappedRollouts(sampler.model, make_sampler, plan, mismatch, timeout)

    longest_prompt = max(map(len, plan.prompt_ids))
    options = (eos_ids, longest_prompt, sampler.max_tokens, sampler.temperature, sampler.precision)
    make_sampler = partial(make_vllm_sampler, model, revision, threads, *options)
    verified = partial(describe, precision=sampler.precision)  # what an engine loads has to be
    if serial:
        return SerialRollouts(make_sampler(beside=sampler.model), plan, mismatch, timeout, sampler.model, verified)
    environment = KEEP_FREED_MEMORY
    if (device := sampler.model.device).type == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        environment = {"CUDA_VISIBLE_DEVICES": another_gpu(visible.split(","), device.index or 0)}
    return OverlappedRollouts(sampler.model, make_sampler, plan, mismatch, timeout, verified, environment)


def another_gpu(visible, own):
    """The first of the visible GPUs, names as in CUDA_VISIBLE_DEVICES, that is not number `own` of them."""
    return next(name for number, name in enumerate(visible) if number != own)
