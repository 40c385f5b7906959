"""Sampling with the Hugging Face model itself: simple and exact.

On a large model it is slower than a serving engine. On a GPU, `graphs.py` does the same faster.
"""

import contextlib
import itertools
import math

import numpy as np
import torch
import transformers

from common.distributed import gathered, layers_of
from common.errors import NOT_FINITE, RunStopped
from common.logprobs import autocast
from common.lora import as_sampled
from common.progress import progress
from common.sampling import Sampler, Samples
from common.sampling.dialogue import Dialogue
from common.weights import weights_of

# Decoded at a time, to bound the cache: 256 × 1,170 tokens of a 3B model take 11 GB.
MOST_SEQUENCES = 256


def inverse_cdf(logprobs_BV, uniform_B1):
    """Sample one id per row from exp(logprobs_BV): int64 [B, 1].

    Each row has one uniform number in [0, 1), float64, of which an id's share is its probability.
    Faster than `torch.multinomial`, which needs one number per id and row.
    """
    cumulative_BV = logprobs_BV.exp().cumsum(dim=-1, dtype=torch.float64)
    total_B1 = cumulative_BV[:, -1:].contiguous()  # 1, but for rounding
    # The first id whose cumulative probability is above the number: it must have added something
    # itself.
    token_B1 = torch.searchsorted(cumulative_BV, uniform_B1 * total_B1, right=True)
    # The product may round up to the total, which nothing exceeds: then take the last id that added
    # something. With NaN nothing is found either; any valid id will do.
    last_B1 = torch.searchsorted(cumulative_BV, total_B1).clamp(max=logprobs_BV.shape[-1] - 1)
    return torch.minimum(token_B1, last_B1)


@contextlib.contextmanager
def _evaluation_mode(model):
    """Context without gradient checkpointing, which acts in training mode, and would switch the
    cache off.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    yield
    for module in training:
        module.training = True


class TransformersSampler(Sampler):
    """Batched decoding with a key-value cache.

    `model` is not copied: its weights during a call, merged with its adapter if it has one, are the
    policy. `eos_ids` end a response; one without EOS after `max_tokens` tokens is `truncated`, and
    no EOS is appended. `temperature` divides the logits; `precision` is "float32" or "bfloat16"
    (autocast). With an `environment`, EOS ids end a turn, and replies count in `max_tokens`.
    """

    def __init__(
        self, model, eos_ids, max_tokens, temperature, precision="float32", environment=None
    ):
        self.model = model
        self.environment = environment
        self.max_tokens = max_tokens
        self.temperature = temperature
        self.precision = precision
        self.eos_ids = torch.tensor(sorted(eos_ids), device=model.device)
        self.heartbeat = torch.zeros(1, dtype=torch.int64)
        self.weights_at_hand = gathered  # how the weights of a sharded model come to this rank

    def use_weights(self, tensors):
        for name, own in weights_of(self.model).items():
            own.data = tensors[name]

    def sample(self, prompts, group_size, seeds, problems=None):
        samples = self._decode_all(prompts, group_size, seeds, problems)
        # Checked once for all tokens: a check of every token would make the CPU wait for the GPU
        # each time.
        logprobs = itertools.chain.from_iterable(samples.logprobs)
        if not all(math.isfinite(lp) for lp in logprobs if lp is not None):
            raise RunStopped(NOT_FINITE)
        return samples

    def greedy(self, prompts, problems=None):
        return self._decode_all(prompts, 1, None, problems)

    def _decode_all(self, prompts, group_size, seeds, problems):
        """`Samples` of all prompts, decoded one batch of prompts after another."""
        samples = Samples([], [], [])
        prompts_at_a_time = max(1, self._most_sequences(prompts) // group_size)
        # Not inference mode, in which autocast would cast all weights again for each token.
        with (
            _evaluation_mode(self.model),
            as_sampled(self.model),
            self.weights_at_hand(self.model),
            torch.no_grad(),
            self._precision(),
        ):
            for start in range(0, len(prompts), prompts_at_a_time):
                part = slice(start, start + prompts_at_a_time)
                part_seeds = None if seeds is None else seeds[part]
                part_problems = None if problems is None else problems[part]
                decoded = self._decode(prompts[part], group_size, part_seeds, part_problems)
                samples.responses += decoded.responses
                samples.logprobs += decoded.logprobs
                samples.truncated += decoded.truncated
        return samples

    def _most_sequences(self, prompts):
        """How many sequences are decoded at a time."""
        return MOST_SEQUENCES

    @contextlib.contextmanager
    def _precision(self):
        """Context of all passes of a call. It keeps the weights that autocast has cast to bf16."""
        with autocast(self.model.device.type, self.precision):
            yield

    def _decode(self, prompts, group_size, seeds, problems):
        """`Samples` of one batch of prompts; greedy if `seeds` is None."""
        device = self.model.device
        cache, logits_PV, attention_PT, positions_PT = self._read_prompts(prompts)
        # What was read of a prompt is repeated for the G responses of its group.
        prompt_B = torch.arange(len(prompts), device=device).repeat_interleave(group_size)
        # Of a cache's ways to repeat rows, the one that every kind of layer has: attention, sliding
        # windows, recurrent states.
        cache.reorder_cache(prompt_B)
        logits_BV = logits_PV[prompt_B]
        attention_BT = attention_PT[prompt_B]
        positions_B1 = positions_PT[prompt_B, -1:]

        B = len(prompts) * group_size
        tokens_BT = torch.zeros(B, self.max_tokens, dtype=torch.int64, device=device)
        logprobs_BT = torch.zeros(B, self.max_tokens, dtype=torch.float32, device=device)
        lengths_B = torch.zeros(B, dtype=torch.int64, device=device)
        ended_B = torch.zeros(B, dtype=torch.bool, device=device)
        rows = torch.arange(B, device=device)  # the sequence that each row of the cache belongs to
        if seeds is not None:
            uniforms_BT = self._uniform_numbers(seeds, group_size)
        dialogue = Dialogue(self, problems, group_size, tokens_BT)

        for t in progress(range(self.max_tokens), "tokens sampled, at most"):
            step_logprobs_BV = torch.log_softmax(logits_BV.float() / self.temperature, dim=-1)
            if seeds is None:
                token_B1 = step_logprobs_BV.argmax(dim=-1, keepdim=True)
            else:
                token_B1 = inverse_cdf(step_logprobs_BV, uniforms_BT[rows, t, None])
            token_B1 = dialogue.told_or(token_B1, rows, t)
            tokens_BT[rows, t] = token_B1.squeeze(1)
            logprobs_BT[rows, t] = step_logprobs_BV.gather(1, token_B1).squeeze(1)
            lengths_B[rows] += ~ended_B[rows]
            ends_B = torch.isin(token_B1.squeeze(1), self.eos_ids) & ~ended_B[rows]
            ended_B[rows] |= dialogue.answer(ends_B, rows, t)
            open_B = ~ended_B[rows]
            num_open = int(open_B.sum())
            self.heartbeat += 1
            if num_open == 0 or t == self.max_tokens - 1:
                break

            # Finished sequences leave the batch. Leaving copies the whole cache, so it waits until
            # an eighth can go.
            if num_open <= 0.875 * len(rows):
                keep = open_B.nonzero().squeeze(1)
                cache.reorder_cache(keep)
                rows = rows[keep]
                token_B1 = token_B1[keep]
                attention_BT = attention_BT[keep]
                positions_B1 = positions_B1[keep]

            attention_BT = torch.cat([attention_BT, attention_BT.new_ones(len(rows), 1)], dim=1)
            positions_B1 = positions_B1 + 1
            logits_BV = self._next_logits(token_B1, attention_BT, positions_B1, cache)

        return dialogue.marked(self._samples(tokens_BT, logprobs_BT, lengths_B, ended_B))

    def _samples(self, tokens_BT, logprobs_BT, lengths_B, ended_B):
        """`Samples` of what was decoded, each response up to its length."""
        lengths = lengths_B.tolist()
        return Samples(
            responses=[row[:n] for row, n in zip(tokens_BT.tolist(), lengths, strict=True)],
            logprobs=[row[:n] for row, n in zip(logprobs_BT.tolist(), lengths, strict=True)],
            truncated=(~ended_B).tolist(),
        )

    def _read_prompts(self, prompts):
        """Read each prompt once.

        Returns the cache, the logits of the token that comes next, the attention mask and the
        positions of the prompts' tokens.
        """
        device = self.model.device
        # Prompts are padded on the left, so that the next token of every sequence goes into the
        # same column.
        width = max(len(prompt) for prompt in prompts)
        padded = [[0] * (width - len(prompt)) + prompt for prompt in prompts]
        attended = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        inputs_PT = torch.tensor(padded, device=device)
        attention_PT = torch.tensor(attended, device=device)
        positions_PT = (attention_PT.cumsum(dim=1) - 1).clamp(min=0)

        cache = transformers.DynamicCache(config=self.model.config)
        with self._layers_counted():
            logits_PV = self._next_logits(inputs_PT, attention_PT, positions_PT, cache)
        return cache, logits_PV, attention_PT, positions_PT

    @contextlib.contextmanager
    def _layers_counted(self):
        """Context of a pass that may take minutes: a bar and the heartbeat count its layers."""
        layers = layers_of(self.model)

        def count(*_):
            bar.update()
            self.heartbeat += 1

        with contextlib.ExitStack() as until_read:
            bar = until_read.enter_context(progress(None, "layers, reading prompts", len(layers)))
            for layer in layers:
                until_read.enter_context(layer.register_forward_hook(count))
            yield

    def _uniform_numbers(self, seeds, group_size):
        """Numbers in [0, 1) to sample with, one per sequence and token: float64 [B, T].

        Each prompt has a random stream of its own, so that what is sampled does not depend on how
        prompts are split into batches.
        """
        shape = (group_size, self.max_tokens)
        streams = [np.random.default_rng(seed).random(shape) for seed in seeds]
        return torch.from_numpy(np.concatenate(streams)).to(self.model.device)

    def _next_logits(self, inputs_BT, attention_BT, positions_BT, cache):
        """Logits of the token after the last column, for every row.

        The cache grows by the columns that are read.
        """
        output = self.model(
            input_ids=inputs_BT,
            attention_mask=attention_BT,
            position_ids=positions_BT,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]
