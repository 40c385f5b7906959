"""Linear layers as convolutions: values and gradients against float64, and where they are left to `F.linear`."""

import pytest
import torch
import torch.nn.functional as F

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


def test_a_loaded_model_computes_its_linear_layers_this_way():
    model = load_model("tiny", "", torch.device("cpu"), gradient_checkpointing=False)
    kinds = {type(module) for module in model.modules() if isinstance(module, torch.nn.Linear)}
    assert kinds == {products.Linear}
