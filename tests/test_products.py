"""Linear layers as convolutions and attention of one token as two products: values and gradients against float64, and
what is left to PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

from common import products
from common.models import load_model


def relative_error(found, true):
    return ((found - true).norm() / true.norm()).item()


@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize(
    ("shape", "V"),
    # Several leading dimensions; sizes no vector register divides; one output; fewer features than outputs; and a row.
    [((29, 70, 96), 256), ((1031, 37), 41), ((300, 128), 1), ((7, 3, 11, 96), 287), ((1, 30_000), 5)],
)
def test_values_and_gradients_against_float64(shape, V, with_bias, monkeypatch):
    monkeypatch.setattr(F, "linear", None)  # it is the convolution that is tested
    monkeypatch.setattr(products, "FEWEST_PRODUCTS", 0)
    generator = torch.Generator().manual_seed(len(shape) + V)
    parts = [torch.randn(size, generator=generator) for size in (shape, (V, shape[-1]), (V,))]
    inputs, weight, bias = (part.requires_grad_() for part in parts)
    wanted = (inputs, weight, bias) if with_bias else (inputs, weight)
    outputs = products.linear(inputs, weight, bias if with_bias else None)
    upstream = torch.randn(outputs.shape, generator=generator)
    found = torch.autograd.grad(outputs, wanted, upstream)

    inputs64, weight64, bias64 = (part.detach().double().requires_grad_() for part in parts)
    outputs64 = torch.einsum("...h,vh->...v", inputs64, weight64) + (bias64 if with_bias else 0.0)
    true = torch.autograd.grad(outputs64, (inputs64, weight64, bias64)[: len(wanted)], upstream.double())
    assert outputs.shape == outputs64.shape and outputs.dtype == torch.float32
    # Rounding errors of a sum grow with the square root of its length: of H terms, of V, or of all rows.
    bound = torch.finfo(torch.float32).eps * max(V, shape[-1], inputs.numel() // shape[-1]) ** 0.5
    assert relative_error(outputs.detach(), outputs64.detach()) < bound
    for one, other in zip(found, true, strict=True):
        assert relative_error(one, other) < bound


def test_inputs_that_are_not_contiguous(monkeypatch):
    monkeypatch.setattr(products, "FEWEST_PRODUCTS", 0)
    inputs, weight = torch.randn(96, 400).T, torch.randn(64, 192)[:, ::2]
    assert relative_error(products.linear(inputs, weight), inputs.double() @ weight.double().T) < 1e-6


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
    monkeypatch.setattr(products, "FEWEST_PRODUCTS", 0)
    assert torch.equal(products.linear(inputs, weight), F.linear(inputs, weight))


@pytest.mark.parametrize(("rows", "threads", "by_convolution"), [(300, 1, False), (500, 1, True), (500, 2, False)])
def test_small_products_are_left_to_mkl(rows, threads, by_convolution, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    inputs, weight, asked = torch.randn(rows, 96), torch.randn(96, 96), []
    convolve = F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda *args, **options: asked.append(1) or convolve(*args, **options))
    assert relative_error(products.linear(inputs, weight), inputs.double() @ weight.double().T) < 1e-6
    assert bool(asked) == by_convolution


def test_the_number_of_threads_is_set_where_it_is_another(monkeypatch):
    threads, changes = torch.get_num_threads(), []
    set_threads = torch.set_num_threads
    monkeypatch.setattr(torch, "set_num_threads", lambda number: changes.append(number) or set_threads(number))
    try:
        products.use_threads(threads)
        assert not changes  # setting it would slow attention down
        products.use_threads(threads + 1)
        assert changes == [threads + 1] and torch.get_num_threads() == threads + 1
    finally:
        set_threads(threads)


def test_autocast_still_decides_the_dtype_of_the_product():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert products.linear(torch.randn(500, 96), torch.randn(8, 96)).dtype == torch.bfloat16


def test_a_loaded_model_computes_its_layers_this_way(monkeypatch):
    model = load_model("tiny", "", torch.device("cpu"), gradient_checkpointing=False)
    kinds = {type(module) for module in model.modules() if isinstance(module, torch.nn.Linear)}
    assert kinds == {products.Linear}
    attended = []
    attend = torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda x, dim: attended.append(x.shape) or attend(x, dim))
    cache = DynamicCache(config=model.config)
    for token_B1 in torch.tensor([[[5], [6]], [[7], [8]]]):
        model(input_ids=token_B1, past_key_values=cache, use_cache=True)
    assert attended == [(2, 1, 3, 1)] * 4 + [(2, 1, 3, 2)] * 4  # sequences, key heads, heads of each, keys; 4 layers


def heads_of(generator, heads, key_heads, queries, keys, dtype=torch.float32):
    """Query, key and value as a model makes them: heads are split off the features, then moved before the tokens."""
    shapes = [(5, queries, heads, 32), (5, keys, key_heads, 32), (5, keys, key_heads, 24)]
    return [torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for shape in shapes]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize(("heads", "key_heads"), [(3, 1), (6, 2), (4, 4)])
def test_attention_of_one_token_against_float64(heads, key_heads, scaling, masked, monkeypatch):
    monkeypatch.setattr(products, "sdpa_attention_forward", None)  # it is the two products that are tested
    generator = torch.Generator().manual_seed(heads)
    query, key, value = (t.requires_grad_() for t in heads_of(generator, heads, key_heads, 1, 41))
    mask = None
    if masked:
        mask = torch.rand(5, 1, 1, 41, generator=generator) < 0.7
        mask[..., -1] = True  # a token sees itself
    found, weights = products.attention(None, query, key, value, mask, scaling, dropout=0.0, use_cache=True)
    upstream = torch.randn(found.shape, generator=generator)
    gradients = torch.autograd.grad(found, (query, key, value), upstream)
    assert weights is None and found.shape == (5, 1, heads, 24)

    true = torch.empty(5, 1, heads, 24, dtype=torch.float64)
    leaves = [tensor.detach().double().requires_grad_() for tensor in (query, key, value)]
    for b in range(5):
        for head in range(heads):
            shared = head * key_heads // heads
            scores = leaves[1][b, shared] @ leaves[0][b, head, 0] * (32**-0.5 if scaling is None else scaling)
            seen = torch.ones(41, dtype=torch.bool) if mask is None else mask[b, 0, 0]
            true[b, 0, head] = scores[seen].softmax(0) @ leaves[2][b, shared][seen]
    assert relative_error(found.detach(), true.detach()) < 1e-6
    for one, other in zip(gradients, torch.autograd.grad(true, leaves, upstream.double()), strict=True):
        assert relative_error(one, other) < 1e-6


def float_mask(mask):
    return torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)


@pytest.mark.parametrize(
    "queries, dtype, autocast, kind",
    [
        (2, "float32", False, torch.clone),
        (1, "bfloat16", False, torch.clone),
        (1, "float32", True, torch.clone),
        (1, "float32", False, float_mask),
        (1, "float32", False, lambda mask: mask.expand(-1, 4, -1, -1)),
    ],
    ids=["two tokens", "bfloat16", "autocast", "additive mask", "a mask per head"],
)
def test_all_other_attention_is_left_to_pytorch(queries, dtype, autocast, kind):
    generator = torch.Generator().manual_seed(0)
    query, key, value = heads_of(generator, 4, 4, queries, 41, getattr(torch, dtype))
    mask = torch.ones(5, 1, queries, 41, dtype=torch.bool)
    mask[1, ..., :7] = False
    mask = kind(mask)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found, _ = products.attention(torch.nn.Module(), query, key, value, mask, None, dropout=0.0)
        expected = F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2)
    assert found.dtype == expected.dtype and torch.equal(found, expected)
