"""Sampling on a GPU by CUDA graphs: one launch for a token, where there would be a thousand.

The CPU tells a GPU what to compute kernel by kernel, and a kernel of one token is done long before
the next one has been asked for. A CUDA graph is a recording of all the kernels of a token, which
one launch plays back. It plays them back exactly: same shapes, same places in memory, no questions
to the CPU in between. What that asks for is here, and a CPU can run it, too (without a recording):

- Whatever changes from token to token lies in tensors that stay where they are (`Decoding`).
- The key-value cache has room for more columns than are filled, and attention reads all of it under
  a mask. Where the room ends, it grows; where half of the rows have ended, they leave. Each size
  has a graph of its own, so there should be few sizes (`room_for`, `halved`).
- Nothing asks the GPU for a value: the number of the column is a tensor as well. Only every few
  tokens the CPU waits, to see how many rows have ended.
"""

import contextlib
import functools

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from common.layers import attention_can_be_replaced
from common.logprobs import autocast, autocast_of
from common.progress import progress
from common.sampling.transformers import TransformersSampler, inverse_cdf
from common.weights import weights_of

# After so many tokens, the CPU looks which rows have ended.
TOKENS_PER_LOOK = 8
# The share of the GPU's memory that keys and values may take, which bounds the rows at a time
CACHE_SHARE = 0.1
# What is kept from one call to the next: if it is more than this share, it is freed for training.
KEPT_SHARE = 0.2
# The name under which `transformers` knows `attention`
ATTENTION = "sdpa_grouped"


def attention(module, query, key, value, attention_mask, scaling=None, **options):
    """`transformers`' "sdpa" attention; with one token per sequence, it copies no keys.

    The query is [B, heads, 1, D]; key and value are [B, key heads, C, D]. Heads that share their
    keys become rows of one product, where PyTorch would copy the keys for each of them. Returns
    [B, 1, heads, D], and None.
    """
    B, heads, queries, D = query.shape
    if queries > 1 or options.get("position_bias") is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
    grouped = query.reshape(B, key.shape[1], -1, D)
    found = F.scaled_dot_product_attention(
        grouped, key, value, attn_mask=attention_mask, scale=scaling
    )
    return found.reshape(B, 1, heads, -1), None


def attention_mask(*, q_length, dtype=torch.float32, **options):
    """The mask for `attention`. For one token it has the numbers that attention adds to its scores.

    Made here once, they are not made again in each layer from a mask of booleans.
    """
    if q_length > 1:
        return sdpa_mask(q_length=q_length, **options)
    seen = sdpa_mask(q_length=q_length, **(options | {"allow_is_causal_skip": False}))
    device = options["device"].type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    # Not `transformers`' `eager_mask`: it makes a tensor of a Python number, which is copied to the
    # GPU, and that cannot be recorded.
    zeros = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return zeros.masked_fill_(~seen, torch.finfo(dtype).min)


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, attention_mask)


def can_use_graphs(model):
    """Whether decoding with this `transformers` model can be recorded.

    Not recorded are: sliding windows and recurrent states, which change in other ways than by a
    new column; position encodings that depend on the longest text; experts, since a router may ask
    the GPU how many tokens each of them has got; and attention other than PyTorch's, whose masks
    `transformers` makes of Python's numbers.
    """
    config = model.config.get_text_config()
    has_experts = any("expert" in name for name in config.to_dict())
    if has_experts or not attention_can_be_replaced(model):
        return False
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]
    if any(kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds):
        return False
    # `type`, not `isinstance`: sliding windows are a subclass.
    layers = cache_of_one_token(model).layers
    return all(type(layer) is DynamicLayer and layer.is_initialized for layer in layers)


def cache_of_one_token(model):
    """A `transformers` cache of the model that has read one token."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), autocast_of(model):
        one_token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        model(input_ids=one_token, past_key_values=cache, use_cache=True)
    return cache


class Layer(DynamicLayer):
    """One layer's keys and values, [rows, heads, columns, D]. A new one goes into `column`."""

    is_compileable = True  # so that masks are made without asking the GPU what is in them

    def __init__(self, keys, values, column):
        super().__init__()
        self.keys, self.values, self.column = keys, values, column
        self.is_initialized = True

    def update(self, keys, values, *_, **__):
        # Keys are float32 under autocast, since they were rotated in float32.
        self.keys.index_copy_(2, self.column, keys.to(self.keys.dtype))
        self.values.index_copy_(2, self.column, values.to(self.values.dtype))
        return self.keys, self.values

    def get_mask_sizes(self, query_length):
        return self.keys.shape[2], 0

    def get_seq_length(self):
        return self.column  # int64 [1]


def room_for(columns):
    """The size of a cache for that many columns: a multiple of 64, and few sizes when it is large.

    64, 128, …, 512, then steps of 128 up to 1,024, of 256 up to 2,048, and so on.
    """
    step = max(64, 2 ** (columns.bit_length() - 1) // 4)
    return -(-columns // step) * step


def memory_of(device):
    """Bytes of a GPU's memory."""
    return torch.cuda.get_device_properties(device).total_memory


def halved(rows, needed):
    """`rows`, halved as often as `needed` rows still find room."""
    while rows > 1 and (rows + 1) // 2 >= needed:
        rows = (rows + 1) // 2
    return rows


class Decoding:
    """What is decoded: a row for each sequence that goes on, C columns of keys and values.

    B is the number of sequences at the start. A tensor with the name of another takes its place in
    memory. One that is too large for it gets a new place, and recorded graphs are void.
    """

    def __init__(self):
        self.memory = {}
        self.graphs = {}  # by shape; None where the next pass is to be recorded

    def start(self, cache, prompt_B, attention_PT, positions_PT, uniforms_BT, dtype):
        """Begin with what was read of the prompts; row b answers prompt `prompt_B[b]`."""
        device = prompt_B.device
        B, T = uniforms_BT.shape
        width = attention_PT.shape[1]
        columns = room_for(width + 1)
        # The next column of the cache, and the next token of the responses
        self.column_1 = self._put("column", torch.tensor([width], device=device))
        self.t_1 = self._put("t", torch.tensor([0], device=device))
        self.uniforms_BT = self._put("uniforms", uniforms_BT)
        self.tokens_BT = self._put("tokens", torch.zeros(B, T, dtype=torch.int64, device=device))
        self.logprobs_BT = self._put("logprobs", torch.zeros(B, T, device=device))
        # One per row. Which sequence is it? What was its last token, at which position?
        self.sequence_R1 = self._put("sequence", torch.arange(B, device=device).unsqueeze(1))
        self.token_R1 = self._put("token", torch.zeros_like(self.sequence_R1))
        self.position_R1 = self._put("position", positions_PT[prompt_B, -1:])
        self.ended_R = self._put("ended", torch.zeros(B, dtype=torch.bool, device=device))
        more = columns - width
        self.mask_RC = self._put("mask", F.pad(attention_PT[prompt_B], (0, more)))
        self.cache = Cache(layers=[])
        for i, layer in enumerate(cache.layers):
            keys, values = (
                self._put(f"{name} {i}", F.pad(read[prompt_B].to(dtype), (0, 0, 0, more)))
                for name, read in (("keys", layer.keys), ("values", layer.values))
            )
            self.cache.layers.append(Layer(keys, values, self.column_1))

    def resize(self, rows_R, columns):
        """Only the rows with these numbers go on, and the cache has room for `columns`."""
        self.sequence_R1 = self._put("sequence", self.sequence_R1[rows_R])
        self.token_R1 = self._put("token", self.token_R1[rows_R])
        self.position_R1 = self._put("position", self.position_R1[rows_R])
        self.ended_R = self._put("ended", self.ended_R[rows_R])
        more = columns - self.mask_RC.shape[1]
        self.mask_RC = self._put("mask", F.pad(self.mask_RC[rows_R], (0, more)))
        for i, layer in enumerate(self.cache.layers):
            layer.keys = self._put(f"keys {i}", F.pad(layer.keys[rows_R], (0, 0, 0, more)))
            layer.values = self._put(f"values {i}", F.pad(layer.values[rows_R], (0, 0, 0, more)))

    def _put(self, name, tensor):
        count = tensor.numel()
        if name not in self.memory or self.memory[name].numel() < count:
            self.memory[name] = tensor.new_empty(count)
            self.graphs.clear()
        return self.memory[name][:count].view(tensor.shape).copy_(tensor)


class GraphSampler(TransformersSampler):
    """`TransformersSampler`, with one launch per token on a GPU. `can_use_graphs(model)` must hold.

    Same random numbers, same results; but in bf16, keys are rounded when they are kept and not each
    time they are read.
    """

    def __init__(self, model, eos_ids, max_tokens, temperature, precision="float32"):
        super().__init__(model, eos_ids, max_tokens, temperature, precision)
        self.decoding = Decoding()
        self.rounded = {}  # by parameter: its copy in bf16, if it belongs to a linear layer
        self.on_gpu = model.device.type == "cuda"  # else nothing is recorded
        self.attention = model.config._attn_implementation
        if attention_can_be_replaced(model):
            self.attention = ATTENTION
        self.cache_dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        layers = cache_of_one_token(model).layers
        numbers = sum(layer.keys.numel() + layer.values.numel() for layer in layers)
        self.bytes_per_token = numbers * self.cache_dtype.itemsize  # of keys and values

    def use_weights(self, tensors):
        for name, own in weights_of(self.model).items():
            own.data.copy_(tensors[name])  # to where the graphs read them

    def _most_sequences(self, prompts):
        if not self.on_gpu:
            return super()._most_sequences(prompts)
        columns = room_for(max(len(prompt) for prompt in prompts) + self.max_tokens)
        most_bytes = CACHE_SHARE * memory_of(self.model.device)
        return int(most_bytes / (columns * self.bytes_per_token))

    @contextlib.contextmanager
    def _precision(self):
        """Context of all passes of a call: `attention`, and linear layers with weights in bf16.

        What autocast casts is freed when its context ends, and graphs would go on reading it. These
        copies stay where they are, and get new values with each call.
        """
        linears = []
        if self.precision == "bfloat16":
            linears = [layer for layer in self.model.modules() if isinstance(layer, nn.Linear)]
        attention_of_training = self.model.config._attn_implementation
        try:
            for linear in linears:
                linear.forward = functools.partial(
                    F.linear,
                    weight=self._in_bf16(linear.weight),
                    bias=None if linear.bias is None else self._in_bf16(linear.bias),
                )
            self.model.set_attn_implementation(self.attention)
            with autocast(self.model.device.type, self.precision, cache=False):
                yield
        finally:
            self.model.set_attn_implementation(attention_of_training)
            for linear in linears:
                vars(linear).pop("forward", None)
            if self.on_gpu and self._num_bytes() > KEPT_SHARE * memory_of(self.model.device):
                self.decoding = Decoding()
                self.rounded = {}

    def _in_bf16(self, parameter):
        """The copy of a parameter, with its present value."""
        if parameter.dtype == torch.bfloat16:
            return parameter
        if parameter not in self.rounded:
            self.rounded[parameter] = torch.empty_like(parameter, dtype=torch.bfloat16)
        return self.rounded[parameter].copy_(parameter)

    def _num_bytes(self):
        kept = [*self.decoding.memory.values(), *self.rounded.values()]
        return sum(tensor.nbytes for tensor in kept)

    def _decode(self, prompts, group_size, seeds, problems):
        """`Samples` of one batch of prompts; greedy if `seeds` is None."""
        device, T = self.model.device, self.max_tokens
        greedy = seeds is None
        B = len(prompts) * group_size
        uniforms_BT = torch.zeros(B, T, dtype=torch.float64, device=device)
        if not greedy:
            uniforms_BT = self._uniform_numbers(seeds, group_size)
        cache, logits_PV, attention_PT, positions_PT = self._read_prompts(prompts)
        prompt_B = torch.arange(len(prompts), device=device).repeat_interleave(group_size)
        rows = self.decoding
        rows.start(cache, prompt_B, attention_PT, positions_PT, uniforms_BT, self.cache_dtype)
        self._pick(rows, logits_PV[prompt_B], greedy)
        self.heartbeat += 1

        used = attention_PT.shape[1]  # columns
        for t in progress(range(1, T), "tokens sampled, at most"):
            count, columns = rows.mask_RC.shape
            if used == columns or t % TOKENS_PER_LOOK == 0:
                open_R = ~rows.ended_R
                num_open = int(open_R.sum())
                if num_open == 0:
                    break
                fewer = halved(count, num_open)
                if used == columns or fewer < count:
                    # Those that go on come first, in their order; some that have ended may follow.
                    stay_R = rows.ended_R.int().argsort(stable=True)[:fewer]
                    rows.resize(stay_R, room_for(used + 1))
            self._next_token(rows, greedy)
            used += 1
            self.heartbeat += 1

        # What a row went on with after its end is left out.
        ends_BT = (rows.tokens_BT.unsqueeze(2) == self.eos_ids).any(dim=2)
        ended_B = ends_BT.any(dim=1)
        lengths_B = torch.where(ended_B, ends_BT.int().argmax(dim=1) + 1, T)
        return self._samples(rows.tokens_BT, rows.logprobs_BT, lengths_B, ended_B)

    def _next_token(self, rows, greedy):
        """Decode a token for each row: by its graph, if there is one for this size."""
        size = (*rows.tokens_BT.shape, *rows.mask_RC.shape, greedy)
        if not self.on_gpu or size not in rows.graphs:
            # The first time as it is, since what a kernel does to get loaded cannot be recorded.
            self._decode_token(rows, greedy)
            rows.graphs[size] = None
            return
        if rows.graphs[size] is None:
            graph = torch.cuda.CUDAGraph()
            pool = next((known.pool() for known in rows.graphs.values() if known), None)
            with torch.cuda.graph(graph, pool=pool):
                self._decode_token(rows, greedy)  # recorded, and not yet executed
            rows.graphs[size] = graph
        rows.graphs[size].replay()

    def _decode_token(self, rows, greedy):
        """Read the last token of each row, and pick the next one."""
        rows.mask_RC.index_fill_(1, rows.column_1, 1)
        logits_RV = self._next_logits(rows.token_R1, rows.mask_RC, rows.position_R1, rows.cache)
        rows.column_1 += 1
        self._pick(rows, logits_RV, greedy)

    def _pick(self, rows, logits_RV, greedy):
        """Pick a token for each row, and record it."""
        logprobs_RV = torch.log_softmax(logits_RV.float() / self.temperature, dim=-1)
        place = (rows.sequence_R1, rows.t_1)
        if greedy:
            token_R1 = logprobs_RV.argmax(dim=-1, keepdim=True)
        else:
            token_R1 = inverse_cdf(logprobs_RV, rows.uniforms_BT[place])
        rows.tokens_BT[place] = token_R1
        rows.logprobs_BT[place] = logprobs_RV.gather(1, token_R1)
        rows.token_R1.copy_(token_R1)
        # Not `isin`, which may sort, and wait for the GPU
        rows.ended_R |= (token_R1 == self.eos_ids).any(dim=1)
        rows.position_R1 += 1
        rows.t_1 += 1
