"""Tokens per second of `TransformersSampler` against `model.generate` of the same transformers
version, and vLLM.

    python benchmarks/speed/sampling.py               half a minute
    python benchmarks/speed/sampling.py --model runs/smollm2 --prompts 8 --max-response-tokens 48 \
        --task benchmarks/models/chat_tasks.py:Extraction --precision bfloat16 --rounds 3 \
        --output benchmarks/results/pretrained

All sample responses to the prompts of the default workload (32 prompts, 8 responses each, at most
64 tokens, temperature 1) with the bundled model, in one process, taking turns. `model.generate`
does no less: pure sampling, no top-p or top-k, the same EOS and limit, the same loaded model, whose
layers are as fast for both (`common/kernels/cpu.py`); in bf16, a copy with all weights in bf16, so
that nothing is cast. It reports log-probs only if asked to keep all scores; it is timed both ways.
vLLM takes part where it is installed (see the README). Writes `sampling.md`.
"""

import copy
import statistics
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
import tyro
from tqdm import tqdm
from transformers import GenerationConfig

sys.path.insert(0, str(Path(__file__).parents[2]))

import grpo
from benchmarks.helpers import reporting
from common.environment import describe_environment
from common.layers import use_threads
from common.models import end_of_sequence_ids, load_model, load_tokenizer
from common.rollouts import make_rollouts
from common.sampling.transformers import TransformersSampler
from common.sampling.verify import deliver, describe
from common.tasks import load_task
from common.tasks.problems import load_problems
from common.weights import weights_of

DEFAULTS = grpo.Args()


@dataclass
class Args:
    model: str = DEFAULTS.model
    """directory of the model, or tiny, the bundled one"""
    task: str = DEFAULTS.task
    """as in the scripts, like the options below"""
    prompts: int = DEFAULTS.prompts_per_step
    max_response_tokens: int = DEFAULTS.max_response_tokens
    precision: Literal["float32", "bfloat16"] = "float32"
    rounds: int = 15
    """how often each is timed, after one untimed call"""
    threads: int = 2
    """CPU threads"""
    output: Path = reporting.RESULTS
    """where sampling.md goes"""


def main(args):
    use_threads(args.threads)
    P, G, max_tokens = args.prompts, DEFAULTS.group_size, args.max_response_tokens
    tokenizer = load_tokenizer(args.model)
    model = load_model(args.model, "", torch.device("cpu"))
    problems = load_problems(load_task(args.task), "train", tokenizer, DEFAULTS.max_prompt_tokens)
    prompts = problems.prompts[:P]
    eos_ids = end_of_sequence_ids(model, tokenizer)
    generation = (max_tokens, DEFAULTS.temperature, args.precision)
    samplers = {
        "`TransformersSampler`, with log-probs": TransformersSampler(model, eos_ids, *generation)
    }
    if find_spec("vllm"):
        options = replace(
            DEFAULTS,
            model=args.model,
            engine="vllm",
            serial=True,
            threads=args.threads,
            prompts_per_step=P,
            max_response_tokens=max_tokens,
        )
        few = replace(problems, prompts=prompts)
        engine = make_rollouts(options, few, few, model, None, tokenizer, args.precision).sampler
        tensors = {key: tensor.detach() for key, tensor in weights_of(model).items()}
        deliver(engine, tensors, describe(model, 0, args.precision))
        samplers["vLLM, with log-probs"] = engine
    generating = copy.deepcopy(model).to(getattr(torch, args.precision))
    pad_id = tokenizer.pad_token_id
    tokenizer.padding_side = "left"
    repeated = [prompt for prompt in prompts for _ in range(G)]
    padded = tokenizer.pad({"input_ids": repeated}, return_tensors="pt")

    def sample_with(sampler, seed):
        seeds = [(seed * P + p) * G for p in range(P)]
        return sum(map(len, sampler.sample(prompts, G, seeds).responses))

    def generate(seed, **scores):
        torch.manual_seed(seed)
        ends = {"eos_token_id": sorted(eos_ids), "pad_token_id": pad_id}
        config = GenerationConfig(
            do_sample=True, max_new_tokens=max_tokens, top_k=0, **ends, **scores
        )
        output = generating.generate(**padded, generation_config=config)
        tokens_BT = (output.sequences if scores else output)[:, padded["input_ids"].shape[1] :]
        # What follows the first end is padding.
        ended_BT = torch.isin(tokens_BT, torch.tensor(sorted(eos_ids))).cumsum(dim=1)
        return int((ended_BT == 0).sum() + (ended_BT > 0).any(dim=1).sum())

    def generate_with_scores(seed):
        return generate(seed, output_scores=True, return_dict_in_generate=True)

    baseline = "`model.generate`"
    contestants = {
        **{name: partial(sample_with, sampler) for name, sampler in samplers.items()},
        baseline: generate,
        "`model.generate`, keeping scores": generate_with_scores,
    }
    speeds = {name: [] for name in contestants}
    for seed in tqdm(range(args.rounds + 1)):
        for name, sample in contestants.items():
            started = time.perf_counter()
            tokens = sample(seed)
            speeds[name].append(tokens / (time.perf_counter() - started))
    medians = {name: statistics.median(values[1:]) for name, values in speeds.items()}
    rows = [
        [name, f"{speed:,.0f}", f"{speed / medians[baseline]:.2f}"]
        for name, speed in medians.items()
    ]
    report = f"""# Sampling speed

{P} × {G} responses of at most {max_tokens} tokens, model {args.model}, task {args.task},
{args.precision}, {args.threads} threads: medians of {args.rounds} rounds in which all took turns.

{reporting.table(["sampler", "tokens per second", f"ratio to {baseline}"], rows)}
"""
    reporting.write_report(args.output / "sampling.md", report, describe_environment())


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
