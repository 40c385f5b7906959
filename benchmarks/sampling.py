"""Tokens per second of `TransformersSampler` against `model.generate` of the same transformers version.

    python benchmarks/sampling.py               half a minute

Both sample responses to the prompts of the default workload (32 prompts, 8 responses each, at most 64 tokens,
temperature 1) with the embedded model, in one process, taking turns. `model.generate` does no less: pure sampling, no
top-p or top-k, the same EOS and limit, the same loaded model, whose layers are as fast for both
(`common/kernels/cpu.py`). It reports log-probs only if asked to keep all scores; it is timed both ways. Writes
`sampling.md`.
"""

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from tqdm import tqdm
from transformers import GenerationConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import grpo
from benchmarks import reporting
from common.kernels.cpu import use_threads
from common.models import end_of_sequence_ids, load_model, load_tokenizer
from common.runlog import describe_environment
from common.sampling.transformers import TransformersSampler
from common.tasks import load_problems, load_task


@dataclass
class Args:
    rounds: int = 15
    """how often each is timed, after one untimed call"""
    threads: int = 2
    """CPU threads"""
    output: Path = reporting.RESULTS
    """where sampling.md goes"""


def main(args):
    use_threads(args.threads)
    default = grpo.Args()
    P, G, max_tokens = default.prompts_per_step, default.group_size, default.max_response_tokens
    tokenizer = load_tokenizer(default.model)
    model = load_model(default.model, "", torch.device("cpu"))
    problems = load_problems(load_task(default.task), "train", tokenizer, default.max_prompt_tokens)
    prompts = problems.prompts[:P]
    eos_ids = end_of_sequence_ids(model, tokenizer)
    pad_id = tokenizer.pad_token_id  # no response holds it, by which those of `generate` are counted
    sampler = TransformersSampler(model, eos_ids, max_tokens, default.temperature)
    tokenizer.padding_side = "left"
    padded = tokenizer.pad({"input_ids": [prompt for prompt in prompts for _ in range(G)]}, return_tensors="pt")

    def ours(seed):
        return sum(map(len, sampler.sample(prompts, G, [(seed * P + p) * G for p in range(P)]).responses))

    def generate(seed, **scores):
        torch.manual_seed(seed)
        ends = {"eos_token_id": sorted(eos_ids), "pad_token_id": pad_id}
        config = GenerationConfig(do_sample=True, max_new_tokens=max_tokens, top_k=0, **ends, **scores)
        output = model.generate(**padded, generation_config=config)
        tokens_BT = (output.sequences if scores else output)[:, padded["input_ids"].shape[1] :]
        return int((tokens_BT != pad_id).sum())

    def generate_with_scores(seed):
        return generate(seed, output_scores=True, return_dict_in_generate=True)

    baseline = "`model.generate`"
    contestants = {
        "`TransformersSampler`, with log-probs": ours,
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
    rows = [[name, f"{speed:,.0f}", f"{speed / medians[baseline]:.2f}"] for name, speed in medians.items()]
    report = f"""# Sampling speed

`python benchmarks/sampling.py`, {args.threads} threads: medians of {args.rounds} rounds in which all took turns.

{reporting.table(["sampler", "tokens per second", f"ratio to {baseline}"], rows)}
"""
    reporting.write_report(args.output / "sampling.md", report, describe_environment())


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
