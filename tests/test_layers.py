"""A CPU's linear layers as convolutions, and attention of one token as two products, against
float64; what is left to PyTorch; and that `speed_up` changes one model and no other.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV32Config,
    DynamicCache,
)
from transformers.integrations import sdpa_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from common import layers
from common.layers import linear
from tests.conftest import build_model


@pytest.fixture(autouse=True)
def products_as_on_an_amd_processor(monkeypatch):
    monkeypatch.setattr(layers, "MKL_IS_SLOW", True)  # on others, products are left to MKL


# Linear layers


def relative_error(found, true):
    return ((found - true).norm() / true.norm()).item()


@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize(
    ("shape", "V"),
    # Several leading dimensions; sizes no vector register divides; one output; fewer features than
    # outputs; and a row.
    [
        ((29, 70, 96), 256),
        ((1031, 37), 41),
        ((300, 128), 1),
        ((7, 3, 11, 96), 287),
        ((1, 30_000), 5),
    ],
)
def test_values_and_gradients_against_float64(shape, V, with_bias, monkeypatch):
    monkeypatch.setattr(F, "linear", None)  # it is the convolution that is tested
    monkeypatch.setattr(layers, "FEWEST_PRODUCTS", 0)
    generator = torch.Generator().manual_seed(len(shape) + V)
    parts = [torch.randn(size, generator=generator) for size in (shape, (V, shape[-1]), (V,))]
    inputs, weight, bias = (part.requires_grad_() for part in parts)
    wanted = (inputs, weight, bias) if with_bias else (inputs, weight)
    outputs = layers.linear(inputs, weight, bias if with_bias else None)
    upstream = torch.randn(outputs.shape, generator=generator)
    found = torch.autograd.grad(outputs, wanted, upstream)

    inputs64, weight64, bias64 = (part.detach().double().requires_grad_() for part in parts)
    outputs64 = torch.einsum("...h,vh->...v", inputs64, weight64) + (bias64 if with_bias else 0.0)
    true = torch.autograd.grad(
        outputs64, (inputs64, weight64, bias64)[: len(wanted)], upstream.double()
    )
    assert outputs.shape == outputs64.shape and outputs.dtype == torch.float32
    # Rounding errors of a sum grow with the square root of its length: of H terms, of V, or of all
    # rows.
    bound = torch.finfo(torch.float32).eps * max(V, shape[-1], inputs.numel() // shape[-1]) ** 0.5
    assert relative_error(outputs.detach(), outputs64.detach()) < bound
    for one, other in zip(found, true, strict=True):
        assert relative_error(one, other) < bound


def test_inputs_that_are_not_contiguous(monkeypatch):
    monkeypatch.setattr(layers, "FEWEST_PRODUCTS", 0)
    inputs, weight = torch.randn(96, 400).T, torch.randn(64, 192)[:, ::2]
    assert relative_error(layers.linear(inputs, weight), inputs.double() @ weight.double().T) < 1e-6


@pytest.mark.parametrize(
    ("inputs", "weight"),
    [
        (torch.randn(500, 96, dtype=torch.float64), torch.randn(8, 96, dtype=torch.float64)),
        (torch.randn(500, 96, dtype=torch.bfloat16), torch.randn(8, 96, dtype=torch.bfloat16)),
        (torch.randn(2, 96), torch.randn(8, 96)),
        (torch.randn(0, 96), torch.randn(8, 96)),
    ],
    ids=["float64", "bfloat16", "few rows", "no rows"],
)
def test_everything_else_is_left_to_pytorch(inputs, weight, monkeypatch):
    monkeypatch.setattr(layers, "FEWEST_PRODUCTS", 0)
    assert torch.equal(layers.linear(inputs, weight), F.linear(inputs, weight))


def test_where_mkl_is_fast_it_computes(monkeypatch):
    monkeypatch.setattr(layers, "MKL_IS_SLOW", False)
    monkeypatch.setattr(F, "conv2d", None)
    inputs, weight = torch.randn(500, 96), torch.randn(256, 96)
    assert torch.equal(linear(inputs, weight), F.linear(inputs, weight))


@pytest.mark.parametrize(
    ("rows", "threads", "by_convolution"), [(300, 1, False), (500, 1, True), (500, 2, False)]
)
def test_small_products_are_left_to_mkl(rows, threads, by_convolution, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    inputs, weight, asked = torch.randn(rows, 96), torch.randn(96, 96), []
    convolve = F.conv2d
    monkeypatch.setattr(
        F, "conv2d", lambda *args, **options: asked.append(1) or convolve(*args, **options)
    )
    assert relative_error(layers.linear(inputs, weight), inputs.double() @ weight.double().T) < 1e-6
    assert bool(asked) == by_convolution


def test_the_number_of_threads_is_set_where_it_is_another(monkeypatch):
    threads, changes = torch.get_num_threads(), []
    set_threads = torch.set_num_threads
    monkeypatch.setattr(
        torch, "set_num_threads", lambda number: changes.append(number) or set_threads(number)
    )
    try:
        layers.use_threads(threads)
        assert not changes  # setting it would slow attention down
        layers.use_threads(threads + 1)
        assert changes == [threads + 1] and torch.get_num_threads() == threads + 1
    finally:
        set_threads(threads)


# Attention


def heads_of(generator, heads, key_heads, queries, keys, dtype=torch.float32):
    """Query, key and value as a model makes them: heads are split off the features, then moved
    before the tokens.
    """
    shapes = [(5, queries, heads, 32), (5, keys, key_heads, 32), (5, keys, key_heads, 24)]
    return [torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for shape in shapes]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize(("heads", "key_heads"), [(3, 1), (6, 2), (4, 4)])
def test_attention_of_one_token_against_float64(heads, key_heads, scaling, masked, monkeypatch):
    # It is the two products that are tested.
    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", None)
    generator = torch.Generator().manual_seed(heads)
    query, key, value = (t.requires_grad_() for t in heads_of(generator, heads, key_heads, 1, 41))
    mask = None
    if masked:
        mask = torch.rand(5, 1, 1, 41, generator=generator) < 0.7
        mask[..., -1] = True  # a token sees itself
    found, weights = layers.attention(
        None, query, key, value, mask, scaling, dropout=0.0, use_cache=True
    )
    upstream = torch.randn(found.shape, generator=generator)
    gradients = torch.autograd.grad(found, (query, key, value), upstream)
    assert weights is None and found.shape == (5, 1, heads, 24)

    true = torch.empty(5, 1, heads, 24, dtype=torch.float64)
    leaves = [tensor.detach().double().requires_grad_() for tensor in (query, key, value)]
    for b in range(5):
        for head in range(heads):
            shared = head * key_heads // heads
            scores = (
                leaves[1][b, shared]
                @ leaves[0][b, head, 0]
                * (32**-0.5 if scaling is None else scaling)
            )
            seen = torch.ones(41, dtype=torch.bool) if mask is None else mask[b, 0, 0]
            true[b, 0, head] = scores[seen].softmax(0) @ leaves[2][b, shared][seen]
    assert relative_error(found.detach(), true.detach()) < 1e-6
    for one, other in zip(
        gradients, torch.autograd.grad(true, leaves, upstream.double()), strict=True
    ):
        assert relative_error(one, other) < 1e-6


@pytest.mark.parametrize("key_dtype", [torch.float32, torch.bfloat16])
def test_attention_of_one_token_under_autocast_is_no_coarser_than_pytorchs(key_dtype, monkeypatch):
    query, key, value = heads_of(torch.Generator().manual_seed(0), 6, 2, 1, 300, torch.bfloat16)
    query = 5 * query.float()  # so that scores reach 20
    true = F.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), enable_gqa=True
    )
    module = torch.nn.Module()
    module.num_key_value_groups = 3
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        plain, _ = sdpa_attention_forward(
            module, query, key.to(key_dtype), value, None, dropout=0.0
        )
        monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", None)
        found, _ = layers.attention(module, query, key.to(key_dtype), value, None, dropout=0.0)
    assert found.dtype == plain.dtype == torch.bfloat16
    errors = [relative_error(one, true.transpose(1, 2)) for one in (found, plain)]
    assert errors[0] < 1.1 * errors[1] and errors[1] < 2**-7


def float_mask(mask):
    return torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)


@pytest.mark.parametrize(
    "queries, kind",
    [(2, torch.clone), (1, float_mask), (1, lambda mask: mask.expand(-1, 4, -1, -1))],
    ids=["two tokens", "additive mask", "a mask per head"],
)
def test_all_other_attention_is_left_to_pytorch(queries, kind):
    query, key, value = heads_of(torch.Generator().manual_seed(0), 4, 4, queries, 41)
    mask = torch.ones(5, 1, queries, 41, dtype=torch.bool)
    mask[1, ..., :7] = False
    mask = kind(mask)
    found, _ = layers.attention(torch.nn.Module(), query, key, value, mask, None, dropout=0.0)
    assert torch.equal(
        found, F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2)
    )


@pytest.mark.parametrize("queries", [41, 300])
@pytest.mark.parametrize("key_heads", [1, 4])
def test_bf16_attention_with_gradient_is_computed_in_float32(queries, key_heads):
    tensors = heads_of(
        torch.Generator().manual_seed(0), 4, key_heads, queries, queries, torch.bfloat16
    )
    query, key, value = leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    module = torch.nn.Module()
    module.num_key_value_groups = 4 // key_heads
    with torch.autocast("cpu", torch.bfloat16):
        # Rotated queries and keys are float32, unlike values.
        found, _ = layers.attention(
            module, query.float(), key.float(), value, None, None, dropout=0.0, is_causal=True
        )
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(found, leaves, upstream.to(found.dtype))

    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    true = F.scaled_dot_product_attention(*exact, is_causal=True, enable_gqa=True).transpose(1, 2)
    truths = torch.autograd.grad(true, exact, upstream.to(found.dtype).double())
    assert found.dtype == torch.bfloat16
    for one, other in zip(
        [found, *gradients], [true, *truths], strict=True
    ):  # one rounding to bf16, at the end
        assert relative_error(one.detach(), other.detach()) < 2**-8

    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():  # then it is left to PyTorch
        found, _ = layers.attention(module, *tensors, None, None, dropout=0.0, is_causal=True)
        plain, _ = sdpa_attention_forward(module, *tensors, None, dropout=0.0, is_causal=True)
    assert torch.equal(found, plain)


# One model, and no other

# Its keys are longer than its values, both made from a common latent vector.
DEEPSEEK = dict(
    vocab_size=300, hidden_size=64, intermediate_size=128, moe_intermediate_size=32,
    num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
    n_group=1, topk_group=1, n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=1,
    kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16,
)  # fmt: skip


def twins(family, directory):
    """The same model twice, both loaded by transformers alone and then one of them sped up."""
    if family == "deepseek":
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(DeepseekV3Config(**DEEPSEEK)).save_pretrained(directory)
    else:
        build_model(family, directory, vocab_size=300)
    plain, fast = (
        AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        for _ in range(2)
    )
    layers.speed_up(fast)
    return plain, fast


@torch.no_grad()
def decode(model, padded):
    """Logits of a batch of prompts, and then of two single tokens; one of the prompts may be padded
    on the left.
    """
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(300, (3, 31), generator=generator)
    seen_BT = torch.ones_like(tokens_BT)
    seen_BT[0, :5] = 0
    cache, logits = DynamicCache(config=model.config), []
    for start, end in ((0, 29), (29, 30), (30, 31)):
        mask = {"attention_mask": seen_BT[:, :end]} if padded else {}
        logits.append(
            model(
                input_ids=tokens_BT[:, start:end], past_key_values=cache, use_cache=True, **mask
            ).logits
        )
    return torch.cat(logits, dim=1)[:, 5:]


@pytest.mark.parametrize("padded", [False, True], ids=["no padding", "padding"])
@pytest.mark.parametrize("family", ["qwen2", "llama", "gpt2", "deepseek"])
def test_speed_up_changes_one_model_and_no_other(family, padded, tmp_path, monkeypatch):
    for bound in ("FEWEST_PRODUCTS", "FEWEST_NUMBERS"):  # or such small layers would be left to MKL
        monkeypatch.setattr(layers, bound, 0)
    plain, fast = twins(family, tmp_path)
    calls = {"plain": 0, "fast": 0, "convolution": 0}

    def counted(name, function):
        def call(*args, **options):
            calls[name] += 1
            return function(*args, **options)

        return call

    # The registered functions call these two, by these names.
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", counted("plain", F.scaled_dot_product_attention)
    )
    monkeypatch.setattr(torch.Tensor, "softmax", counted("fast", torch.Tensor.softmax))
    monkeypatch.setattr(F, "conv2d", counted("convolution", F.conv2d))
    expected = decode(plain, padded)
    assert calls["plain"] == 6 and calls["convolution"] == 0  # two layers, three times
    softmaxes = calls["fast"]
    found = decode(fast, padded)
    assert (
        calls["plain"] == 6 + 2 and calls["fast"] == 2 * softmaxes + 4
    )  # only the prompts are left to PyTorch
    assert (
        calls["convolution"] == 3 if family == "gpt2" else calls["convolution"] > 3
    )  # GPT-2's head alone is `Linear`
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

    assert AttentionInterface()["sdpa"] is sdpa_attention_forward
    for model, kind in ((plain, torch.nn.Linear), (fast, layers.Linear)):
        assert {
            type(module) for module in model.modules() if isinstance(module, torch.nn.Linear)
        } == {kind}
    third = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert third.config._attn_implementation == plain.config._attn_implementation == "sdpa"
    assert torch.equal(decode(third, padded), expected)


@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": False}], ids=["tied", "untied"])
def test_a_sped_up_model_saves_an_ordinary_one(fields, tmp_path):
    build_model("qwen2", tmp_path / "given", **fields)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "given", dtype=torch.float32)
    model.save_pretrained(tmp_path / "plain")
    layers.speed_up(model)
    model.save_pretrained(tmp_path / "fast")
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        assert (tmp_path / "fast" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert layers.ATTENTION not in json.dumps(model.config.to_dict())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (not fields)


def test_a_model_that_asks_for_its_attention_by_name_keeps_it():
    # By another name, DeepSeek V3.2 leaves it to the attention to look at the chosen keys only, and
    # "sdpa" would not.
    config = DeepseekV32Config(**DEEPSEEK, index_topk=8, index_n_heads=2, index_head_dim=16)
    model = AutoModelForCausalLM.from_config(config).eval()
    before = decode(model, padded=True)
    layers.speed_up(model)
    assert model.config._attn_implementation == "sdpa" and torch.equal(
        decode(model, padded=True), before
    )
    model.set_attn_implementation(layers.ATTENTION)
    assert (decode(model, padded=True) - before).abs().max() > 1e-3  # what it is kept from


def test_other_attention_than_sdpa_is_kept(tmp_path):
    build_model("llama", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    layers.speed_up(model)
    assert model.config._attn_implementation == "eager"
