"""The CPU's fast paths against float64: linear layers as convolutions, attention of one token as
two products, and log-probs in slices of the vocabulary; what is left to PyTorch; and that
`speed_up` changes one model and no other.

Truth, bounds and seeds of the log-probs: `logprob_truth.py`.
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
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from common.kernels import cpu
from common.kernels.cpu import SlicedLogprobs, linear
from common.logprobs import LARGE_VOCABULARY, logprobs_and_entropy
from tests import logprob_truth
from tests.conftest import build_model
from tests.logprob_truth import BF16, F32, UPSTREAM, assert_close, leaves, problem, seed, truth


@pytest.fixture(autouse=True)
def products_as_on_an_amd_processor(monkeypatch):
    monkeypatch.setattr(cpu, "MKL_IS_SLOW", True)  # on others, products are left to MKL


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
    monkeypatch.setattr(cpu, "FEWEST_PRODUCTS", 0)
    generator = torch.Generator().manual_seed(len(shape) + V)
    parts = [torch.randn(size, generator=generator) for size in (shape, (V, shape[-1]), (V,))]
    inputs, weight, bias = (part.requires_grad_() for part in parts)
    wanted = (inputs, weight, bias) if with_bias else (inputs, weight)
    outputs = cpu.linear(inputs, weight, bias if with_bias else None)
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
    monkeypatch.setattr(cpu, "FEWEST_PRODUCTS", 0)
    inputs, weight = torch.randn(96, 400).T, torch.randn(64, 192)[:, ::2]
    assert relative_error(cpu.linear(inputs, weight), inputs.double() @ weight.double().T) < 1e-6


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
    monkeypatch.setattr(cpu, "FEWEST_PRODUCTS", 0)
    assert torch.equal(cpu.linear(inputs, weight), F.linear(inputs, weight))


def test_where_mkl_is_fast_it_computes(monkeypatch):
    monkeypatch.setattr(cpu, "MKL_IS_SLOW", False)
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
    assert relative_error(cpu.linear(inputs, weight), inputs.double() @ weight.double().T) < 1e-6
    assert bool(asked) == by_convolution


def test_the_number_of_threads_is_set_where_it_is_another(monkeypatch):
    threads, changes = torch.get_num_threads(), []
    set_threads = torch.set_num_threads
    monkeypatch.setattr(
        torch, "set_num_threads", lambda number: changes.append(number) or set_threads(number)
    )
    try:
        cpu.use_threads(threads)
        assert not changes  # setting it would slow attention down
        cpu.use_threads(threads + 1)
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
    # it is the two products that are tested
    monkeypatch.setattr(cpu, "sdpa_attention_forward", None)
    generator = torch.Generator().manual_seed(heads)
    query, key, value = (t.requires_grad_() for t in heads_of(generator, heads, key_heads, 1, 41))
    mask = None
    if masked:
        mask = torch.rand(5, 1, 1, 41, generator=generator) < 0.7
        mask[..., -1] = True  # a token sees itself
    found, weights = cpu.attention(
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
        monkeypatch.setattr(cpu, "sdpa_attention_forward", None)
        found, _ = cpu.attention(module, query, key.to(key_dtype), value, None, dropout=0.0)
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
    found, _ = cpu.attention(torch.nn.Module(), query, key, value, mask, None, dropout=0.0)
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
        found, _ = cpu.attention(
            module, query.float(), key.float(), value, None, None, dropout=0.0, is_causal=True
        )
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(found, leaves, upstream.to(found.dtype))

    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    true = F.scaled_dot_product_attention(*exact, is_causal=True, enable_gqa=True).transpose(1, 2)
    truths = torch.autograd.grad(true, exact, upstream.to(found.dtype).double())
    assert found.dtype == torch.bfloat16
    # one rounding to bf16, at the end
    for one, other in zip([found, *gradients], [true, *truths], strict=True):
        assert relative_error(one.detach(), other.detach()) < 2**-8

    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():  # then it is left to PyTorch
        found, _ = cpu.attention(module, *tensors, None, None, dropout=0.0, is_causal=True)
        plain, _ = sdpa_attention_forward(module, *tensors, None, dropout=0.0, is_causal=True)
    assert torch.equal(found, plain)


# One model, and no other

DEEPSEEK = dict(  # whose keys are longer than its values, both made from a common latent vector
    vocab_size=300, hidden_size=64, intermediate_size=128, moe_intermediate_size=32,
    num_hidden_layers=2, n_group=1, num_attention_heads=2, num_key_value_heads=2,
    n_routed_experts=4, num_experts_per_tok=2, topk_group=1, kv_lora_rank=16, q_lora_rank=16,
    qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16, first_k_dense_replace=1,
)  # fmt: skip


def twins(family, directory):
    """The same model twice, both loaded by transformers alone and then one of them sped up."""
    if family == "deepseek":
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(DeepseekV3Config(**DEEPSEEK)).save_pretrained(directory)
    else:
        build_model(family, directory, vocab_size=300)
    plain, fast = (
        AutoModelForCausalLM.from_pretrained(directory, dtype=F32).eval() for _ in range(2)
    )
    cpu.speed_up(fast)
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
        monkeypatch.setattr(cpu, bound, 0)
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
    # only the prompts are left to PyTorch
    assert calls["plain"] == 6 + 2 and calls["fast"] == 2 * softmaxes + 4
    # GPT-2's head alone is `Linear`
    assert calls["convolution"] == 3 if family == "gpt2" else calls["convolution"] > 3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

    assert AttentionInterface()["sdpa"] is sdpa_attention_forward
    for model, kind in ((plain, torch.nn.Linear), (fast, cpu.Linear)):
        assert {
            type(module) for module in model.modules() if isinstance(module, torch.nn.Linear)
        } == {kind}
    third = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=F32).eval()
    assert third.config._attn_implementation == plain.config._attn_implementation == "sdpa"
    assert torch.equal(decode(third, padded), expected)


@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": False}], ids=["tied", "untied"])
def test_a_sped_up_model_saves_an_ordinary_one(fields, tmp_path):
    build_model("qwen2", tmp_path / "given", **fields)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "given", dtype=F32)
    model.save_pretrained(tmp_path / "plain")
    cpu.speed_up(model)
    model.save_pretrained(tmp_path / "fast")
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        assert (tmp_path / "fast" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert cpu.ATTENTION not in json.dumps(model.config.to_dict())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (not fields)


def test_a_model_that_asks_for_its_attention_by_name_keeps_it():
    # By another name, DeepSeek V3.2 leaves it to the attention to look at the chosen keys only, and
    # "sdpa" would not.
    config = DeepseekV32Config(**DEEPSEEK, index_topk=8, index_n_heads=2, index_head_dim=16)
    model = AutoModelForCausalLM.from_config(config).eval()
    before = decode(model, padded=True)
    cpu.speed_up(model)
    assert model.config._attn_implementation == "sdpa" and torch.equal(
        decode(model, padded=True), before
    )
    model.set_attn_implementation(cpu.ATTENTION)
    assert (decode(model, padded=True) - before).abs().max() > 1e-3  # what it is kept from


def test_other_attention_than_sdpa_is_kept(tmp_path):
    build_model("llama", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    cpu.speed_up(model)
    assert model.config._attn_implementation == "eager"


# Log-probs in slices


@pytest.fixture(autouse=True)
def seeded_slices(monkeypatch):
    seed()
    monkeypatch.setattr(logprob_truth, "DEVICE", "cpu")
    monkeypatch.setattr(cpu, "SLICE", 300)  # of 1,000: three whole slices and the tail


def run(hidden, weight, targets, dlogprobs, dentropy):
    hidden, weight = leaves(hidden, weight)
    results = SlicedLogprobs.apply(hidden, weight, targets)
    (results[0] @ dlogprobs + results[1] @ dentropy).backward()
    return *(r.detach() for r in results), hidden.grad, weight.grad


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", [(127, 65, 1000), (1, 130, 257)])
@pytest.mark.parametrize("upstream", UPSTREAM)
@pytest.mark.parametrize("spread", [0.03, 0.57])  # flat and peaked
def test_against_float64(shape, dtype, spread, upstream):
    arguments = problem(*shape, dtype, spread)
    a, b = (on * torch.randn(shape[0]) for on in UPSTREAM[upstream])
    assert_close(run(*arguments, a, b), truth(*arguments, a, b), dtype)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("V", [129_920, 151_936])
def test_large_vocabularies(V, dtype, monkeypatch):
    monkeypatch.setattr(cpu, "SLICE", 4096)
    arguments = problem(64, 64, V, dtype)
    a, b = torch.randn(64), torch.zeros(64)
    assert_close(run(*arguments, a, b), truth(*arguments, a, b), dtype)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("offset", [-400.0, 400.0])
def test_logits_far_from_zero(offset, dtype):
    # A float32 number of 400 ends at 3e-5, which is what logits made of it can be off by. The
    # centre takes the offset out of the product before it is rounded, so that bf16 is no worse for
    # it.
    hidden, weight, targets = problem(20, 64, 1000, dtype)
    hidden[:, -1], weight[:, -1] = 16, offset / 16
    a, b = torch.randn(2, 20)
    found, expected = run(hidden, weight, targets, a, b), truth(hidden, weight, targets, a, b)
    assert_close(found[:2], expected[:2], dtype, scale=30 if dtype == F32 else 1)
    # Not dh's last feature, Σ_v G_v · offset, of which nothing but rounding is left.
    for x, y in zip((found[2][:, :-1], found[3]), (expected[2][:, :-1], expected[3]), strict=True):
        assert (x.double() - y).norm() <= (1e-3 if dtype == F32 else 4e-3) * y.norm()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_first_centre_far_too_high_or_low(dtype):
    # The target's logit is the first centre. Here it is 120 below all others or, at a temperature
    # of 0.1, 1,200; and where the first slices hold nothing but logits 120 below the target's,
    # every one of their powers is 0. (From 128 on, float32 logits are off by 8e-6 each.)
    for sign, temperature in ((-1, 1.0), (-1, 0.1), (1, 1.0)):
        hidden, weight, _ = problem(20, 64, 1000, dtype)
        targets = torch.randint(950, 1000, (20,))
        hidden[:, -1], weight[:, -1] = 16, 0
        weight[targets, -1] = sign * 120 / 16
        hidden = (hidden.float() / temperature).to(dtype)
        a, b = torch.randn(20), torch.zeros(20)
        found, expected = run(hidden, weight, targets, a, b), truth(hidden, weight, targets, a, b)
        relative = (found[0] - expected[0]).abs() / expected[0].abs().clamp(min=1)
        assert relative.max() < (1e-5 if dtype == F32 else 1e-3)
        assert (found[1] - expected[1]).abs().max() < (1e-4 if dtype == F32 else 2e-2)
        assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("masked", [slice(0, 350), slice(700, 1000), slice(100, 900)])
def test_masked_vocabulary(masked):
    # A feature that is always 1 carries a bias of −inf. Its own gradient, 0 × −inf, is nobody's;
    # all others are finite.
    hidden, weight, _ = problem(9, 64, 1000)
    hidden[:, -1], weight[:, -1] = 1, 0
    left = torch.ones(1000, dtype=torch.bool)
    left[masked] = False
    allowed = left.nonzero().squeeze(1)
    positions = torch.randint(len(allowed), (9,))
    a, b = torch.randn(2, 9)
    expected = truth(hidden, weight[allowed], positions, a, b)
    weight[masked, -1] = -torch.inf
    found = run(hidden, weight, allowed[positions], a, b)
    assert (found[3][masked] == 0).all()
    kept = *found[:2], found[2][:, :-1], found[3][allowed][:, :-1]
    assert_close(kept, (*expected[:2], expected[2][:, :-1], expected[3][:, :-1]), F32)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_certain_targets(dtype):
    # p(y) = 1 − 5e-4 in every row. All of the gradient is 1 − p, and that is a sum of probabilities
    # near exp(−8): next to a target that is rounded to bf16 nothing would be left of it, and
    # rounded next to the target's logit they would be off by 1 % each, and the gradient by 6e-3. In
    # float32, 1 minus a p that was computed first is off by 1e-4.
    hidden, weight, _ = problem(200, 64, 1000, F32, 0.01)
    targets = torch.randperm(1000)[:200]
    weight[targets] = 9.5 * torch.nn.functional.normalize(hidden, dim=1)
    arguments = (
        (torch.nn.functional.normalize(hidden, dim=1) * 1.6).to(dtype),
        weight.to(dtype),
        targets,
    )
    a, b = torch.randn(200), torch.zeros(200)
    found, expected = run(*arguments, a, b), truth(*arguments, a, b)
    assert -0.01 < expected[0].median() < 0
    assert ((found[0] - expected[0]) / expected[0]).abs().max() <= (1e-5 if dtype == F32 else 3e-3)
    assert_close(found, expected, dtype)


def test_memory_layouts():
    hidden, weight, targets = problem(20, 64, 1000)
    a, b = torch.randn(2, 20)
    expected = run(hidden, weight, targets, a, b)
    strided, transposed = torch.stack([hidden, hidden + 1], dim=2)[..., 0], weight.T.contiguous().T
    for x, y in zip(run(strided, transposed, targets, a, b), expected, strict=True):
        assert (x - y).norm() <= 2e-6 * y.norm()


def test_rows_without_gradient_may_hold_anything():
    hidden, weight, targets = problem(20, 64, 1000)
    live = torch.arange(20) % 3 > 0
    a = torch.randn(20)
    expected = truth(hidden[live], weight, targets[live], a[live], torch.zeros(int(live.sum())))
    hidden[~live] = torch.nan
    found = run(hidden, weight, targets, torch.where(live, a, 0), torch.zeros(20))
    assert found[0][~live].isnan().all()  # but a NaN that is there shows
    assert_close((found[0][live], found[1][live], found[2][live], found[3]), expected, F32)
    assert (found[2][~live] == 0).all()


def test_rows_without_gradient_cost_no_backward_work(monkeypatch):
    arguments = problem(64, 64, 1000)
    rows = []

    def spy(weight_vH, hidden_nH, bias_n):
        rows.append(len(hidden_nH))
        return linear(weight_vH, hidden_nH, bias_n)

    a = torch.randn(64)
    a[10:] = 0
    for upstream, expected in ((a, [10] * 4), (torch.zeros(64), [])):
        inputs = leaves(*arguments[:2])
        loss = SlicedLogprobs.apply(*inputs, arguments[2])[0] @ upstream
        rows.clear()
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "linear", spy)
            loss.backward()
        assert rows == expected


def test_frozen_hidden_or_weight():
    hidden, weight, targets = problem(20, 64, 1000)
    a = torch.randn(20)
    _, _, *expected = run(hidden, weight, targets, a, torch.zeros(20))
    for freeze in (0, 1):
        inputs = leaves(hidden, weight)
        inputs[freeze].requires_grad_(False)
        (SlicedLogprobs.apply(*inputs, targets)[0] @ a).backward()
        assert inputs[freeze].grad is None and torch.equal(
            inputs[1 - freeze].grad, expected[1 - freeze]
        )


@pytest.mark.parametrize("V", [1000, LARGE_VOCABULARY])
@pytest.mark.parametrize("upstream", UPSTREAM)
def test_float32_weights_with_bfloat16_products(V, upstream):
    hidden, weight, targets = problem(127, 64, V, BF16)
    noise = 1 + 2**-10 * torch.rand(V, 64)  # less than bf16 can tell
    a, b = (on * torch.randn(127) for on in UPSTREAM[upstream])
    inputs = leaves(hidden, weight.float() * noise)
    results = logprobs_and_entropy(*inputs, targets)
    (results[0] @ a + results[1] @ b).backward()
    assert inputs[1].grad.dtype == F32
    found = *(result.detach() for result in results), inputs[0].grad, inputs[1].grad
    assert_close(found, truth(hidden, weight, targets, a, b), BF16)


def test_tied_embeddings_accumulate():
    weight = torch.randn(1000, 64).mul_(0.4).requires_grad_()
    tokens, targets = torch.randint(1000, (2, 20))
    a = torch.randn(20)
    (SlicedLogprobs.apply(weight[tokens], weight, targets)[0] @ a).backward()
    twin = weight.detach().double().requires_grad_()
    (cpu.plain_logprobs_and_entropy(twin[tokens], twin, targets)[0] @ a.double()).backward()
    assert (weight.grad - twin.grad).norm() <= 1e-5 * twin.grad.norm()


def test_repeats_bit_for_bit_and_barely_depends_on_slices(monkeypatch):
    arguments = problem(40, 64, 1000)
    a, b = torch.randn(2, 40)
    first = run(*arguments, a, b)
    assert all(torch.equal(x, y) for x, y in zip(run(*arguments, a, b), first, strict=True))
    for width in (7, 128, 4096):
        monkeypatch.setattr(cpu, "SLICE", width)
        for x, y in zip(run(*arguments, a, b), first, strict=True):
            assert (x - y).norm() <= 2e-6 * y.norm()


def test_no_rows():
    hidden, weight, targets = problem(0, 64, LARGE_VOCABULARY)
    found = run(hidden, weight, targets, torch.zeros(0), torch.zeros(0))
    assert [tuple(t.shape) for t in found] == [(0,), (0,), (0, 64), (LARGE_VOCABULARY, 64)]
    assert (found[3] == 0).all()


def test_it_cannot_be_differentiated_twice():
    hidden, weight, targets = problem(5, 64, 257)
    inputs = leaves(hidden, weight)
    logprobs_N, _ = SlicedLogprobs.apply(*inputs, targets)
    (gradient,) = torch.autograd.grad(logprobs_N.square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


def test_a_masked_target_far_below_zero():
    # It has no logit to be the first centre, and 0 is too high for logits of −400: all powers would
    # underflow.
    hidden, weight, targets = problem(20, 64, 1000)
    hidden[:, -1], weight[:, -1] = 16, -25
    targets = targets % 10
    expected = truth(hidden, weight[10:], targets, torch.zeros(20), torch.zeros(20))[1]
    weight[:10, -1] = -torch.inf
    with torch.no_grad():
        found = SlicedLogprobs.apply(hidden, weight, targets)
    assert (found[0] == -torch.inf).all() and (found[1] - expected).abs().max() <= 3e-4
