"""Sampling with CUDA graphs: is it right, how fast is it, and what does a token cost?

    python benchmarks/gpu/decode.py cost      operations, waits and bytes of a token, by counting
    python benchmarks/gpu/decode.py check     log-probs against those of a forward pass
    python benchmarks/gpu/decode.py time      time and memory, with graphs and without

`cost` needs no GPU and writes `results/token_cost.md`. The others are parts of `on_gpu.sh`, and
write to `results/on_gpu/`; with `--device cpu` they run in miniature, to see that they work.
"""

import math
import sys
import tempfile
import time
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.helpers import reporting
from benchmarks.helpers.random_model import QWEN, SMOLLM2, save_random_model
from common.environment import describe_environment
from common.models import TINY_MODEL, choose_device, load_model, load_tokenizer
from common.sampling.graphs import GraphSampler, room_for
from common.sampling.transformers import TransformersSampler
from common.sampling.verify import sampler_mismatch

SHAPES = {"SmolLM2-135M": SMOLLM2, "Qwen2.5-0.5B": QWEN}
SAMPLERS = {"one launch per operation": TransformersSampler, "CUDA graphs": GraphSampler}
PROMPT = 64  # tokens
GIB = 2**30


@dataclass
class Args:
    part: tyro.conf.Positional[Literal["cost", "check", "time"]]
    """what to run"""
    device: str = "cuda"
    """as in the scripts; `cost` is always counted on a CPU"""
    output: Path = reporting.RESULTS / "on_gpu"
    """where the reports of `check` and `time` go"""


class Counter(TorchDispatchMode):
    """Counts operations that compute something, values the CPU asks for, and bytes moved."""

    MAKES_ROOM = ("empty", "new_empty", "empty_like")
    PUTS_INTO = ("index_copy_", "index_put_", "_index_put_impl_", "index_fill_")
    ASKS = ("_local_scalar_dense", "nonzero", "_unique2")

    def __init__(self):
        super().__init__()
        self.operations, self.waits, self.bytes = 0, 0, 0

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if function.is_view or name in self.MAKES_ROOM:
            return result
        if name in self.ASKS:
            self.waits += 1
            return result
        self.operations += 1
        # What is put into a tensor is moved twice; the rest of that tensor is not.
        given = 2 * list(args[1:]) if name in self.PUTS_INTO else [*args, result]
        self.bytes += sum(
            t.nbytes for t in torch.utils._pytree.tree_leaves(given) if torch.is_tensor(t)
        )
        return result


def cost(args, directory):
    """What the CPU and the memory have to do for a token, as a table; nothing is timed."""
    tokenizer = load_tokenizer(TINY_MODEL)
    save_random_model(directory, tokenizer, eos_token_id=None, pad_token_id=0, **SMOLLM2)
    # As on a GPU: `load_model` would choose other ways to compute on a CPU.
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    few, many, rows = 9, 17, 32
    lines = []
    for name, sampler_class in SAMPLERS.items():
        counters = []
        for tokens in (few, many):
            sampler = sampler_class(model, {-1}, tokens, 1.0, "bfloat16")
            with Counter() as counter:
                sampler.sample([[5] * PROMPT] * (rows // 8), 8, range(0, rows, 8))
            counters.append(counter)
        short, long = counters
        tokens = many - few
        operations = (long.operations - short.operations) / tokens
        launches = f"{operations:,.0f}"
        if sampler_class is GraphSampler:
            launches = f"1, of a graph of {operations:,.0f}"
        waits = (long.waits - short.waits) / tokens
        moved = (long.bytes - short.bytes) / tokens / 1e9
        lines.append([name, launches, f"{waits:.3g}", f"{moved:.2f}"])
    header = ["", "launches", "waits for the GPU", f"GB moved, {rows} rows"]
    text = f"""# What a token costs, computed

{reporting.table(header, lines)}

A model in the shape of SmolLM2-135M under bf16 autocast, {rows} sequences of {PROMPT} to
{PROMPT + many} tokens. Counted on a CPU, by PyTorch's operations that are no views, as the mean
over {many - few} tokens. Bytes are those of all that an operation reads and writes. Nothing here
was measured on a GPU.
"""
    reporting.write_report(reporting.RESULTS / "token_cost.md", text, describe_environment())


def mismatch(sampler, prompts, samples, group_size):
    """Mean and largest |log-prob of the sampler − that of a forward pass|."""
    repeated = [prompt for prompt in prompts for _ in range(group_size)]
    batch = types.SimpleNamespace(prompts=repeated, **vars(samples))
    found = sampler_mismatch(sampler.model, sampler.temperature, sampler.precision, batch)
    return [f"{found[f'sampler_mismatch/{key}']:.2g}" for key in ("mean", "max")]


def check(args, directory):
    """Log-probs of both ways, before and after an update of the weights in place."""
    device = choose_device(args.device, "auto", "transformers")[0]
    prompts = [[5 + n] * (3 + 9 * n) for n in range(8)]
    rows = []
    for precision in ("float32", "bfloat16"):
        for name, sampler_class in SAMPLERS.items():
            model = load_model(TINY_MODEL, "", device)
            sampler = sampler_class(model, {-1}, 32, 1.0, precision)
            for moment in ("first", "again", "after an update"):
                if moment == "after an update":
                    torch.manual_seed(0)
                    with torch.no_grad():
                        for parameter in model.parameters():
                            parameter += 0.02 * torch.randn_like(parameter)
                samples = sampler.sample(prompts, 8, range(0, 64, 8))
                gaps = mismatch(sampler, prompts, samples, 8)
                graphs = getattr(getattr(sampler, "decoding", None), "graphs", {})
                recorded = sum(graph is not None for graph in graphs.values())
                rows.append([precision, name, moment, recorded, *gaps])
    header = ["precision", "way", "call", "graphs recorded", "mean |difference| (nats)", "largest"]
    text = f"""# Sampled log-probs against a forward pass

{reporting.table(header, rows)}

The bundled model, 64 responses of 32 tokens. An update changes all weights in place, as an
optimizer does; what a graph reads must be the new ones.
"""
    reporting.write_report(args.output / "decode_check.md", text, describe_environment())


def bytes_needed(model, sampler, rows, columns):
    """The most that sampling takes beside the weights, computed: float32 parameters excluded.

    Keys and values, and as much again of one layer while it grows; copies of linear weights in
    bf16; of the logits: bf16, float32 twice, probabilities, their float64 sums.
    """
    cache = rows * room_for(columns) * sampler.bytes_per_token
    layers = model.config.num_hidden_layers
    linear = [m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear)]
    logits = rows * model.config.vocab_size * (2 + 4 + 4 + 4 + 8 + 8)
    return cache * (1 + 2 / layers) + 2 * sum(linear) + logits


def time_tokens(args, directory):
    """Milliseconds per token and peak memory, for three numbers of rows and two models."""
    device, precision = choose_device(args.device, "auto", "transformers")
    on_cpu = device.type == "cpu"
    tokenizer, lines = load_tokenizer(TINY_MODEL), []
    tokens = 12 if on_cpu else 65
    for shape_name, shape in SHAPES.items():
        own = Path(directory) / shape_name
        if on_cpu:
            shape = shape | {"num_hidden_layers": 1}
        save_random_model(own, tokenizer, eos_token_id=None, pad_token_id=0, **shape)
        model = load_model(str(own), "", device)
        weights = sum(p.nbytes for p in model.parameters())
        for rows in (16, 8) if on_cpu else (256, 64, 8):
            for name, sampler_class in SAMPLERS.items():
                sampler = sampler_class(model, {-1}, tokens, 1.0, precision)
                prompts, seeds = [[5] * PROMPT] * (rows // 8), range(0, rows, 8)
                seconds = [once(sampler, prompts, seeds, device) for _ in range(4)]
                best = min(seconds[1:])
                computed = "–"
                if sampler_class is GraphSampler:
                    needed = bytes_needed(model, sampler, rows, PROMPT + tokens)
                    computed = f"{(weights + needed) / GIB:.2f}"
                measured = "not run"
                if not on_cpu:
                    measured = f"{torch.cuda.max_memory_allocated(device) / GIB:.2f}"
                per_token = f"{1000 * best / tokens:.2f}"
                rate = f"{rows * tokens / best:,.0f}"
                first = f"{seconds[0]:.2f}"
                lines.append([shape_name, rows, name, per_token, rate, first, measured, computed])
                del sampler
        del model
    header = ["shape", "rows", "way", "ms per token", "tokens/s", "first call (s)"]
    header += ["peak (GiB)", "computed (GiB)"]
    text = f"""# Time to sample a token

{reporting.table(header, lines)}

Random weights, {precision}, prompts of {PROMPT} and responses of {tokens} tokens; the best of three
calls after a first one, which records. Peak memory is PyTorch's, weights in float32 included.
"""
    reporting.write_report(args.output / "decode_time.md", text, describe_environment())


def once(sampler, prompts, seeds, device):
    """Seconds of one call."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    samples = sampler.sample(prompts, 8, seeds)
    assert math.isfinite(samples.logprobs[0][0])
    return time.perf_counter() - started


def main(args):
    parts = {"cost": cost, "check": check, "time": time_tokens}
    with tempfile.TemporaryDirectory() as directory:
        parts[args.part](args, directory)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
