"""Tokens per second of `TransformersSampler` against `model.generate` of the same transformers version.

    python benchmarks/sampling.py

Both draw the default workload's first batch (32 prompts, 8 responses each, at most 64 tokens, temperature 1) from the
embedded model, in one process, taking turns. `model.generate` samples no less: pure sampling, no top-p or top-k, the
same EOS and limit, the same loaded model, whose layers are as fast for both (`common/products.py`). It does not report
log-probs of the tokens it drew unless asked to keep all scores; it is timed both ways. Writes
`benchmarks/results/sampling.md`.
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.models import TINY_MODEL, end_of_sequence_ids, load_model, load_tokenizer
from common.products import use_threads
from common.runlog import describe_environment
from common.samplers import TransformersSampler
from common.tasks import encode_problems, load_task


@dataclass
class Args:
    rounds: int = 15
    """how often each is timed, after one untimed call"""
    threads: int = 2
    """CPU threads"""


def main(args):
    use_threads(args.threads)
    tokenizer = load_tokenizer(TINY_MODEL)
    model = load_model(TINY_MODEL, "", torch.device("cpu"), gradient_checkpointing=False)
    _, prompts = encode_problems(load_task("addition"), "train", tokenizer, 1024, "drop")
    prompts = prompts[:32]
    eos_ids = end_of_sequence_ids(model, tokenizer)
    pad_id = tokenizer.pad_token_id  # no response holds it, by which those of `generate` are counted
    sampler = TransformersSampler(model, eos_ids, pad_id, max_tokens=64, temperature=1.0)
    tokenizer.padding_side = "left"
    padded = tokenizer.pad({"input_ids": [prompt for prompt in prompts for _ in range(8)]}, return_tensors="pt")

    def ours(seed):
        return sum(map(len, sampler.sample(prompts, 8, seed).responses))

    def generate(seed, **scores):
        torch.manual_seed(seed)
        config = GenerationConfig(
            do_sample=True, max_new_tokens=64, top_k=0, eos_token_id=sorted(eos_ids), pad_token_id=pad_id, **scores
        )
        output = model.generate(**padded, generation_config=config)
        tokens_BT = (output.sequences if scores else output)[:, padded["input_ids"].shape[1] :]
        return int((tokens_BT != pad_id).sum())

    contestants = {
        "`TransformersSampler`, with log-probs": ours,
        "`model.generate`": generate,
        "`model.generate`, keeping scores": lambda seed: generate(
            seed, output_scores=True, return_dict_in_generate=True
        ),
    }
    speeds = {name: [] for name in contestants}
    for seed in tqdm(range(args.rounds + 1)):
        for name, draw in contestants.items():
            started = time.perf_counter()
            tokens = draw(seed)
            speeds[name].append(tokens / (time.perf_counter() - started))
    medians = {name: statistics.median(values[1:]) for name, values in speeds.items()}
    baseline = medians["`model.generate`"]
    rows = [f"| {name} | {speed:,.0f} | {speed / baseline:.2f} |" for name, speed in medians.items()]
    report = f"""# Sampling speed

`python benchmarks/sampling.py --threads {args.threads}`: medians of {args.rounds} interleaved rounds.

| sampler | tokens per second | ratio to `model.generate` |
|---|---|---|
{chr(10).join(rows)}

```
{describe_environment().strip()}
```
"""
    output = ROOT / "benchmarks" / "results"
    output.mkdir(parents=True, exist_ok=True)
    (output / "sampling.md").write_text(report)
    print(report)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
