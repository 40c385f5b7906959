"""Is the sampler using the weights that the trainer sent?

Three checks of an engine (`use_weights(tensors)`, `score(sequences)`) that copies the weights:
checksums and probes at every sync, a canary at start-up. common/README.md ("Handing over weights")
says what each finds that the others miss.
"""

import time
import types
from dataclasses import dataclass

import torch

from common.batching import collate
from common.errors import NOT_FINITE, RunStopped
from common.logprobs import token_logprobs
from common.lora import as_sampled
from common.weights import checksum, perturbed, weights_of

# The largest mean difference, in nats per probe token, that is taken for rounding. Equal weights of
# small models are 3e-6 apart in float32 and 0.1 in bfloat16. A missing matrix adds 0.04 to 2, a
# missing bias 0.01: float32 reveals every tensor, bfloat16 only gross failures.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.25}


@dataclass
class Manifest:
    """What the trainer states about one version of its weights; small, and can be pickled."""

    version: int
    checksums: dict[str, int]  # by parameter name
    probe: list[list[int]]  # sequences of token ids
    logprobs: list[float]  # of their tokens but the first ones, by the trainer's own forward pass
    tolerance: float
    seconds: float  # time it took the trainer to compute this


def describe(model, version, precision):
    """The `Manifest` of the model's present weights, which are called `version`.

    Raises `RunStopped` if they are not finite.
    """
    started = time.perf_counter()
    # Random tokens, which touch more of the embeddings than real text would
    generator = torch.Generator().manual_seed(0)
    vocab_size = model.config.get_text_config().vocab_size
    probe = torch.randint(vocab_size, (4, 24), generator=generator).tolist()
    checksums = {name: checksum(tensor) for name, tensor in weights_of(model).items()}
    logprobs = logprobs_of(model, probe, precision)
    if not logprobs.isfinite().all():
        raise RunStopped(NOT_FINITE)
    return Manifest(
        version=version,
        checksums=checksums,
        probe=probe,
        logprobs=logprobs.tolist(),
        tolerance=TOLERANCE[precision],
        seconds=time.perf_counter() - started,
    )


@torch.no_grad()
def logprobs_of(model, sequences, precision):
    """The trainer's log-probs, at temperature 1, of all tokens but each sequence's first.

    One tensor [N] for all sequences.
    """
    prompts = [tokens[:1] for tokens in sequences]
    responses = [tokens[1:] for tokens in sequences]
    zeros = [[0.0] * len(response) for response in responses]
    batch = types.SimpleNamespace(prompts=prompts, responses=responses, logprobs=zeros)
    micro = collate(batch, range(len(sequences)), model.device)
    logprobs_BT, _ = token_logprobs(model, micro, 1.0, precision)
    return logprobs_BT[micro.mask_BT].cpu()


@torch.no_grad()
def sampler_mismatch(model, temperature, precision, batch, num_sequences=8):
    """|log-prob of trainer − sampler| over the first few sequences of a `Batch`.

    `model` must hold the weights that sampled it.
    """
    micro = collate(batch, range(min(num_sequences, len(batch.responses))), model.device)
    with as_sampled(model):
        logprobs_BT, _ = token_logprobs(model, micro, temperature, precision)
    difference_N = (logprobs_BT - micro.sampler_logprobs_BT)[micro.mask_BT].double().abs()
    return {
        "sampler_mismatch/mean": difference_N.mean().item(),
        "sampler_mismatch/max": difference_N.max().item(),
    }


def deliver(sampler, tensors, manifest):
    """Give `tensors`, a dict by parameter name, to the sampler and verify them.

    Called in the sampler's process. Unless the tensors match the manifest and the sampler computes
    with them, raises `RunStopped`, which names the version and, if known, the tensors. Tensors that
    it holds already, from an evaluation, are not loaded again. Returns metrics: seconds to
    describe, load and verify, and GB/s of loading.
    """
    started = time.perf_counter()
    missing = manifest.checksums.keys() - tensors.keys()
    changed = []
    num_bytes = 0
    for name, tensor in tensors.items():
        num_bytes += tensor.nbytes
        if checksum(tensor) != manifest.checksums.get(name):
            changed.append(name)
    if missing or changed:
        which = _listed("missing", missing) + _listed("changed", changed) + "the rest arrived"
        raise RunStopped(
            f"Weights of version {manifest.version} did not reach the sampler ({which}): "
            "use --resume."
        )
    checked = time.perf_counter()
    if sampler.checksums != manifest.checksums:
        sampler.use_weights(tensors)
        sampler.checksums = manifest.checksums
        seconds = time.perf_counter() - checked
        speed = num_bytes / 1e9 / seconds
        sampler.loading = {"time/sync_load": seconds, "throughput/sync_gb_per_second": speed}
    loaded = time.perf_counter()
    gap = _gap(sampler, manifest)
    if not gap <= manifest.tolerance:  # so that NaN fails as well
        raise RunStopped(
            f"The sampler does not compute with weights {manifest.version} although it received "
            f"them (its log-probs are {gap:.3g} nats per token off the trainer's, of "
            f"{manifest.tolerance:g} allowed): continue with --resume, or use "
            "--engine transformers."
        )
    return {
        "time/sync_describe": manifest.seconds,
        "time/sync_verify": time.perf_counter() - loaded + checked - started,
        **sampler.loading,
    }


def canary(sampler, model, precision):
    """Sync perturbed weights, compare log-probs, and sync the true ones back.

    Raises `RunStopped`, which names the weights that are stale.
    """
    names = list(weights_of(model))
    # Noise adds up over layers, until rounding looks like stale weights: 1.3 nats with 0.5 in
    # SmolLM2-135M's 30 layers.
    strength = 0.7 * model.config.get_text_config().num_hidden_layers ** -0.5

    def follows(changed):
        with perturbed(model, changed, strength):
            manifest = describe(model, 0, precision)
            sampler.use_weights(weights_of(model))
            return _gap(sampler, manifest) <= manifest.tolerance

    if not follows(names):
        stale = [name for name in names if not follows([name])]  # one by one, only to name them
        raise RunStopped(
            f"The sampler's log-probs do not follow its weights ({_listed('not followed', stale)}"
            f"tolerance {TOLERANCE[precision]:g} nats per token): use --engine transformers."
        )
    sampler.sleep()  # if it can, so that nothing is left of its weights
    if not follows([]):
        raise RunStopped(
            "After its start-up test, when it had slept or had changed weights, the sampler does "
            "not compute with the true ones: use --engine transformers."
        )


def _gap(sampler, manifest):
    """Mean absolute difference of the sampler's log-probs of the probe from the trainer's."""
    found = torch.tensor(sampler.score(manifest.probe), dtype=torch.float64).flatten()
    expected = torch.tensor(manifest.logprobs, dtype=torch.float64)
    return (found - expected).abs().mean().item()


def _listed(word, names):
    # Of many names, the first three will do.
    if not names:
        return ""
    names = sorted(names)
    shown = ", ".join(names[:3])
    if len(names) > 3:
        shown += f" and {len(names) - 3} more"
    return f"{word}: {shown}; "
