"""Samplers draw responses from the policy and record the log-probability of every token as it was drawn.

`Sampler` is what a script sees. `TransformersSampler` decodes with the Hugging Face model itself: slower than a serving
engine on a large model, exact and without further dependencies on a small one.

Sampling is at the policy's own distribution, softmax(logits / temperature). Top-p, top-k and repetition penalties do
not exist here, and a checkpoint's `generation_config` is ignored but for its EOS ids: the log-probs of a truncated
distribution are not the policy's.
"""

import itertools
import math
from dataclasses import dataclass

import torch
from transformers import DynamicCache
from transformers.utils.logging import disable_progress_bar

from common.errors import RunStopped
from common.logprobs import autocast
from common.models import load_model
from common.products import use_threads
from common.shared_weights import point_parameters


@dataclass
class Samples:
    """Responses to P prompts, G each, in the order prompt 0's G responses, prompt 1's, …: B = P·G sequences."""

    responses: list[list[int]]
    """token ids, EOS included where the response ended with one"""
    logprobs: list[list[float]]
    """per token, log-probability under the policy that drew it, at its temperature, as it was drawn"""
    truncated: list[bool]
    """True where the response was cut at the token limit before an EOS"""


class Sampler:
    """Draws responses; what is behind it (this process, another one, a serving engine) is not the script's business.

    Attributes:
        heartbeat: int64 [1], one up per decoded position, so that another process can tell slow from stuck.
    """

    heartbeat: torch.Tensor

    def use_weights(self, tensors):
        """Draw with these weights from now on: tensors by parameter name, which may be kept and must not change."""
        raise NotImplementedError

    def sample(self, prompts, group_size, seed):
        """Draw `group_size` responses to each prompt (token ids) with random streams derived from `seed`.

        The result depends on the weights and the arguments alone. Returns `Samples`. Raises `RunStopped` where the
        policy is no distribution any more, because its weights or logits are not finite.
        """
        raise NotImplementedError

    def sample_many(self, batches, group_size):
        """Draw batches of (prompts, seed) each; yields their `Samples` in order, each as soon as it is complete."""
        for prompts, seed in batches:
            yield self.sample(prompts, group_size, seed)

    def greedy(self, prompts):
        """The most likely token at every position, one response per prompt. Returns `Samples`."""
        raise NotImplementedError


def inverse_cdf(logprobs_BV, uniform_B1):
    """The ids that uniform numbers in [0, 1), float64, stand for under exp(logprobs_BV), one per row: int64 [B, 1].

    An id's share of [0, 1) is its probability, and an id of probability 0 has none. Faster than `torch.multinomial`,
    which draws an exponential for every entry of the vocabulary, where this takes one uniform number for all of them.
    """
    cumulative_BV = logprobs_BV.exp().cumsum(dim=-1, dtype=torch.float64)
    total_B1 = cumulative_BV[:, -1:].contiguous()  # 1, but for rounding
    # The first id whose cumulative probability is above the number: it must have added something itself.
    token_B1 = torch.searchsorted(cumulative_BV, uniform_B1 * total_B1, right=True)
    # The product may round up to the total, which no id is above: then the last id that added something. Where the
    # log-probs are NaN, nothing is above or equal to anything; any id will do, as long as it is one.
    last_B1 = torch.searchsorted(cumulative_BV, total_B1).clamp(max=logprobs_BV.shape[-1] - 1)
    return torch.minimum(token_B1, last_B1)


class TransformersSampler(Sampler):
    """Batched decoding with a key-value cache, on the live weights of a Hugging Face causal language model.

    Args:
        model: its weights at the moment of the call are the policy; it is not copied.
        eos_ids: ids that end a response; several are allowed.
        pad_id: fills the left of shorter prompts; may equal an EOS id, since masks come from lengths.
        max_tokens: longest response; sequences still open then are `truncated`, and no EOS is invented for them.
        temperature: τ > 0, as in `logprobs.token_logprobs`.
        precision: "float32" or "bfloat16" (autocast).
    """

    def __init__(self, model, eos_ids, pad_id, max_tokens, temperature, precision="float32"):
        self.model = model
        self.eos_ids = torch.tensor(sorted(eos_ids), device=model.device)
        self.pad_id = pad_id
        self.max_tokens = max_tokens
        self.temperature = temperature
        self.precision = precision
        self.heartbeat = torch.zeros(1, dtype=torch.int64)

    def use_weights(self, tensors):
        point_parameters(self.model, tensors)

    def sample(self, prompts, group_size, seed):
        generator = torch.Generator(self.model.device).manual_seed(seed)

        def choose(logprobs_BV):
            uniform_B1 = torch.rand(
                len(logprobs_BV), 1, dtype=torch.float64, generator=generator, device=logprobs_BV.device
            )
            return inverse_cdf(logprobs_BV, uniform_B1)

        samples = self._decode(prompts, group_size, choose)
        # Looked at once for all tokens: a look at every token would make the CPU wait for the GPU each time.
        if not all(map(math.isfinite, itertools.chain.from_iterable(samples.logprobs))):
            raise RunStopped(
                "The policy's weights or logits are no longer finite, so no response can be drawn from it: look at "
                "loss and grad_norm in the run's metrics.jsonl, and start a new run with a lower --learning-rate."
            )
        return samples

    def greedy(self, prompts):
        return self._decode(prompts, 1, lambda logprobs_BV: logprobs_BV.argmax(dim=-1, keepdim=True))

    @torch.inference_mode()
    def _decode(self, prompts, group_size, choose):
        # One autocast context for all tokens: it keeps the weights it has cast to bf16 until it is left.
        with autocast(self.model.device.type, self.precision):
            return self._decode_batch(prompts, group_size, choose)

    def _decode_batch(self, prompts, group_size, choose):
        device, was_training = self.model.device, self.model.training
        self.model.eval()  # gradient checkpointing, active in training mode only, would switch the cache off

        # Prompts are padded on the left, so that the next token of every sequence goes into the same column.
        width = max(len(prompt) for prompt in prompts)
        inputs_PT = torch.full((len(prompts), width), self.pad_id, dtype=torch.int64)
        attention_PT = torch.zeros(len(prompts), width, dtype=torch.int64)
        for p, prompt in enumerate(prompts):
            inputs_PT[p, width - len(prompt) :] = torch.tensor(prompt)
            attention_PT[p, width - len(prompt) :] = 1
        inputs_PT, attention_PT = inputs_PT.to(device), attention_PT.to(device)
        positions_PT = (attention_PT.cumsum(dim=1) - 1).clamp(min=0)

        # Each prompt is read once; its cache is then repeated for the G responses of the group.
        cache = DynamicCache(config=self.model.config)
        logits_PV = self._next_logits(inputs_PT, attention_PT, positions_PT, cache)
        cache.batch_repeat_interleave(group_size)
        logits_BV = logits_PV.repeat_interleave(group_size, dim=0)
        attention_BT = attention_PT.repeat_interleave(group_size, dim=0)
        positions_B1 = positions_PT[:, -1:].repeat_interleave(group_size, dim=0)

        num_sequences = len(prompts) * group_size
        tokens_BT = torch.zeros(num_sequences, self.max_tokens, dtype=torch.int64, device=device)
        logprobs_BT = torch.zeros(num_sequences, self.max_tokens, dtype=torch.float32, device=device)
        lengths_B = torch.zeros(num_sequences, dtype=torch.int64, device=device)
        ended_B = torch.zeros(num_sequences, dtype=torch.bool, device=device)
        rows = torch.arange(num_sequences, device=device)  # the sequence that each row of the batch is decoding

        for t in range(self.max_tokens):
            step_logprobs_BV = torch.log_softmax(logits_BV.float() / self.temperature, dim=-1)
            token_B1 = choose(step_logprobs_BV)
            open_B = ~ended_B[rows]
            tokens_BT[rows, t] = token_B1.squeeze(1)
            logprobs_BT[rows, t] = step_logprobs_BV.gather(1, token_B1).squeeze(1)
            lengths_B[rows] += open_B
            ended_B[rows] |= torch.isin(token_B1.squeeze(1), self.eos_ids)
            open_B = ~ended_B[rows]
            num_open = int(open_B.sum())
            self.heartbeat += 1
            if num_open == 0 or t == self.max_tokens - 1:
                break
            # Finished sequences leave the batch. Leaving copies the whole cache, so it waits until an eighth can go.
            if num_open <= 0.875 * len(rows):
                keep = open_B.nonzero().squeeze(1)
                cache.batch_select_indices(keep)
                rows, token_B1 = rows[keep], token_B1[keep]
                attention_BT, positions_B1 = attention_BT[keep], positions_B1[keep]
            attention_BT = torch.cat([attention_BT, attention_BT.new_ones(len(rows), 1)], dim=1)
            positions_B1 = positions_B1 + 1
            logits_BV = self._next_logits(token_B1, attention_BT, positions_B1, cache)

        self.model.train(was_training)
        lengths = lengths_B.tolist()
        return Samples(
            responses=[row[:n] for row, n in zip(tokens_BT.tolist(), lengths, strict=True)],
            logprobs=[row[:n] for row, n in zip(logprobs_BT.tolist(), lengths, strict=True)],
            truncated=(~ended_B).tolist(),
        )

    def _next_logits(self, inputs_BT, attention_BT, positions_BT, cache):
        """Logits of the token after the last column, for every row; the cache grows by the columns read."""
        output = self.model(
            input_ids=inputs_BT,
            attention_mask=attention_BT,
            position_ids=positions_BT,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]


def load_transformers_sampler(model, revision, threads, *options):
    """What a sampler's process calls (`sampler_process`): a `TransformersSampler` on a model of its own, on the CPU.

    `model` and `revision` as in `models.load_model`, `options` as in `TransformersSampler`, after the model.
    """
    use_threads(threads)
    disable_progress_bar()  # the trainer shows its own
    device = torch.device("cpu")
    return TransformersSampler(load_model(model, revision, device, gradient_checkpointing=False), *options)
