"""Proof that the weights a sampler draws with are those the trainer sent: a sync that is not verified is not a sync.

Three checks, because none of them sees everything:

- Every delivery carries its version and a checksum per tensor. They notice a sync that was skipped or lost a tensor, and
  bits that changed on the way, at any learning rate; not what an engine then does with the tensors.
- The canary, once at start-up: strongly perturbed weights are synced, and the sampler's log-probs must be those that
  the trainer computes with the same weights. It notices tensors that never reach the engine's arithmetic.
- Probes, at every sync: log-probs of a few fixed tokens. They notice what an engine gets wrong only now and then; but at
  a learning rate of 1e-6 one update moves them by less than bfloat16 rounds, so they could not replace the checksums.

A sampler, for this module, has `use_weights(tensors)` and `score(sequences)`.
"""

import zlib
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from common.batching import collate
from common.errors import RunStopped
from common.logprobs import token_logprobs

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}
"""largest mean absolute difference (nats per probe token) between trainer and sampler with the same weights. Small
models measured 3e-6 and 0.05 at most; one of their weight matrices that does not arrive with the canary costs 0.04 to
2, a bias a hundredth: bfloat16 hides some of it, float32 nothing"""


@dataclass
class Manifest:
    """What the trainer says about one version of its weights; small, and can be pickled."""

    version: int
    """the update that left these weights"""
    checksums: dict[str, int]
    """per parameter name"""
    probe_logprobs: torch.Tensor
    """of the tokens of `probe_sequences`, by the trainer's own forward pass"""


def probe_sequences(vocab_size, how_many=4, length=24):
    """Fixed random token ids, lists of equal length: they touch more of the embeddings than real text would."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (how_many, length), generator=generator).tolist()


def checksum(tensor):
    """CRC-32 of a tensor's bytes in row-major order, so that a transposed tensor has another one."""
    return zlib.crc32(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


@torch.no_grad()
def logprobs_of(model, sequences, precision):
    """The trainer's log-probs, at temperature 1, of every token of the sequences but the first, in one row."""
    prompts, rest = [s[:1] for s in sequences], [s[1:] for s in sequences]
    unknown = [[0.0] * len(tokens) for tokens in rest]
    micro = collate(prompts, rest, unknown, range(len(sequences)), pad_id=0, device=model.device)
    token_args = (micro.inputs_BT, micro.attention_BT, micro.targets_BT, micro.mask_BT)
    return token_logprobs(model, *token_args, 1.0, precision)[0][micro.mask_BT].cpu()


def describe(model, version, precision):
    """The `Manifest` of the model's present weights, called `version`."""
    return Manifest(
        version=version,
        checksums={name: checksum(parameter) for name, parameter in model.named_parameters()},
        probe_logprobs=logprobs_of(model, probe_sequences(model.config.vocab_size), precision),
    )


def deliver(sampler, tensors, manifest, vocab_size, precision):
    """Give `tensors`, a dict by parameter name, to the sampler; to be called where the sampler lives.

    Raises `RunStopped`, naming the version and, where they are known, the tensors, unless they are what the manifest
    says and the sampler computes with them.
    """
    version, expected = manifest.version, manifest.checksums
    missing = expected.keys() - tensors.keys()
    wrong = [name for name in tensors if checksum(tensors[name]) != expected.get(name)]
    if missing or wrong:
        raise RunStopped(
            f"Weights of version {version} did not reach the sampler as they were sent ({_listed('missing', missing)}"
            f"{_listed('changed', wrong)}the rest arrived): continue from the last checkpoint with --resume."
        )
    sampler.use_weights(tensors)
    gap = _gap(sampler, manifest.probe_logprobs, vocab_size)
    if not gap <= TOLERANCE[precision]:  # so that NaN fails as well
        raise RunStopped(
            f"The sampler does not compute with weights {version} although it received all of them: its log-probs are "
            f"{gap:.3g} nats per token off the trainer's, {TOLERANCE[precision]:g} are allowed; continue from the last "
            "checkpoint with --resume, or use --engine transformers."
        )


def canary(sampler, model, precision):
    """Sync strongly perturbed weights of `model` into the sampler, compare log-probs, and sync the true ones back.

    Raises `RunStopped` naming the tensors that the sampler computes without. The model is left as it was.
    """
    names = [name for name, _ in model.named_parameters()]

    def gap_with(changed):
        with perturbed(model, changed):
            sampler.use_weights(dict(model.named_parameters()))
            expected = logprobs_of(model, probe_sequences(model.config.vocab_size), precision)
        return _gap(sampler, expected, model.config.vocab_size)

    if not (gap := gap_with(names)) <= TOLERANCE[precision]:
        stale = [name for name in names if not gap_with([name]) <= TOLERANCE[precision]]  # one by one, to name them
        raise RunStopped(
            f"The sampler does not follow the weights it is given: with all of them changed for a test, its log-probs "
            f"are {gap:.3g} nats per token off the trainer's ({_listed('not followed', stale)}{TOLERANCE[precision]:g} "
            "are allowed); use --engine transformers for this model."
        )
    if not (gap := gap_with([])) <= TOLERANCE[precision]:
        raise RunStopped(f"After the start-up test the sampler kept changed weights: {gap:.3g} nats per token.")


@contextmanager
def perturbed(model, names, strength=0.5):
    """Inside, the named parameters are off by random numbers of `strength` times their own size; then as before."""
    parameters = dict(model.named_parameters())
    saved = {name: parameters[name].detach().clone() for name in names}
    generator = torch.Generator().manual_seed(1)
    try:
        for name in names:
            noise = torch.randn(parameters[name].shape, generator=generator).to(parameters[name])
            # Biases may be all zero; matrices are not.
            size = saved[name].square().mean().sqrt().clamp(min=0.1 if noise.dim() == 1 else 0.0)
            parameters[name].data.add_(noise * strength * size)
        yield
    finally:
        for name in names:
            parameters[name].data.copy_(saved[name])


def _gap(sampler, expected, vocab_size):
    """Mean absolute difference of the sampler's log-probs of the probe from those expected."""
    found = [logprob for row in sampler.score(probe_sequences(vocab_size)) for logprob in row]
    return (torch.tensor(found, dtype=torch.float64) - expected.double()).abs().mean().item()


def _listed(word, names):
    names = sorted(names)
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{word}: {shown}; " if names else ""
