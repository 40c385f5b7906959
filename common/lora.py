"""LoRA: the weights W of linear layers stay as they are, and a small adapter learns beside them.

A layer computes (W + (α/r) B A) x, with A [r, inputs] and B [outputs, r]; only A and B are trained
(Hu et al., LoRA, arXiv 2106.09685). B begins as 0, so that the first policy is the base model. The
layers are those of the `peft` library, which replace the model's linear layers; its adapters can be
loaded by other programs.

Nobody but the trainer knows of an adapter: samplers get ordinary weights, W + (α/r) B A, under the
names that they have in a model without one.
"""

import contextlib
from collections.abc import Mapping
from contextlib import contextmanager

import torch

from common.distributed import replaced, whole

ADAPTER = "default"  # peft's name of a model's only adapter


def add_adapter(model, rank, alpha, seed):
    """Give every linear layer of a `transformers` model an adapter of that rank, and freeze the
    rest; the embeddings and the output head get none.
    """
    from peft import LoraConfig  # takes two seconds to import

    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules="all-linear")
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # of the matrices A
        model.add_adapter(config)
    for parameter in trainable(model):
        parameter.data = parameter.data.float()  # peft gives them the dtype of the layer's weights


def trainable(model):
    """The parameters that learn: all of a model, or those of its adapter."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adapted_layers(model):
    """The layers with an adapter, by name; none where LoRA is not used."""
    return {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}


def plain_name(name):
    """The name that a parameter has in a model without adapters."""
    return name.replace(".base_layer.", ".")


class MergedWeights(Mapping):
    """Weights by plain name, computed when they are asked for; float32, whole on every rank.

    Of a layer with an adapter it is W + (α/r) B A, computed in float32 from the untouched W. Who
    computes in bf16 rounds it once.
    """

    def __init__(self, tensors, layers):
        self.tensors = tensors  # of the model, by plain name
        self.layers = {f"{name}.weight": layer for name, layer in layers.items()}

    def __getitem__(self, name):
        tensor = self.tensors[name]
        own = whole(tensor.detach())
        layer = self.layers.get(name)
        if layer is None or layer.disable_adapters:
            return own.float() if own.is_floating_point() else own
        A = whole(layer.lora_A[ADAPTER].weight.detach())
        B = whole(layer.lora_B[ADAPTER].weight.detach())
        change = layer.scaling[ADAPTER] * (B @ A)
        if layer.fan_in_fan_out:  # GPT-2's layers, whose weights are transposed
            change = change.T
        return own.float() + change

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self):
        return len(self.tensors)


@contextmanager
def without_adapter(model):
    """Context in which a model computes with the weights of its layers alone."""
    layers = adapted_layers(model).values()
    before = [layer.disable_adapters for layer in layers]
    for layer in layers:
        # Not `enable_adapters(False)`, which also says that the adapter does not learn: FSDP2 would
        # remember that from its first pass.
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, was_off in zip(layers, before, strict=True):
            layer._disable_adapters = was_off


@contextmanager
def merged(model):
    """Context in which a model computes with merged weights instead of its adapter. No gradients.

    Afterwards its own weights are back, bit for bit. Nothing happens if there is no adapter.
    """
    active = {n: layer for n, layer in adapted_layers(model).items() if not layer.disable_adapters}
    weights = {f"{name}.weight": layer.base_layer.weight for name, layer in active.items()}
    with replaced(weights, MergedWeights(weights, active).items()), without_adapter(model):
        yield


def as_sampled(model):
    """Context in which a model computes as transformers samples from it.

    In float32, with merged weights: the same bits as in a process that knows of no adapter. In
    bf16, with the adapter: W + (α/r) B A, rounded to bf16, is W where the change is small.
    """
    return merged(model) if model.dtype == torch.float32 else contextlib.nullcontext()


class Base:
    """A policy without its adapter, which is the initial policy; it takes no memory of its own."""

    def __init__(self, policy):
        self.policy = policy
