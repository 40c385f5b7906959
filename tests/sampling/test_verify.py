"""Verification without vLLM: checksums, perturbation, the trainer's side of a probe, and an engine
that is simulated.

With a real engine: test_vllm_sync.py.
"""

import copy
import time

import pytest
import torch
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

from common.errors import RunStopped
from common.models import load_model
from common.sampling import Batch, Sampler
from common.sampling.transformers import TransformersSampler
from common.sampling.verify import canary, deliver, describe, logprobs_of, sampler_mismatch
from common.weights import checksum, perturbed, weights_of
from tests.conftest import build_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = build_model("qwen2", tmp_path_factory.mktemp("models") / "qwen2")
    return load_model(directory, "", torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (), (7,), (6, 6), (3, 5), (2, 3, 4)])
def test_every_bit_counts(dtype, shape):
    torch.manual_seed(0)
    tensor = torch.randn(shape).to(dtype)
    expected = checksum(tensor)
    assert checksum(tensor.clone()) == expected
    integers = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    for at in range(tensor.numel()):
        for bit in range(8 * tensor.element_size() - 1):
            other = tensor.clone()
            other.view(-1).view(integers)[at] ^= 1 << bit
            assert checksum(other) != expected


def test_order_counts():
    torch.manual_seed(0)
    square = torch.randn(6, 6)
    assert checksum(square.t()) != checksum(square) != checksum(square.flip(0))
    # of the elements in order, not of the memory
    assert checksum(square.t()) == checksum(square.t().contiguous())
    assert checksum(square[:, :3]) == checksum(square[:, :3].clone())
    assert checksum(torch.tensor([0.0])) != checksum(torch.tensor([-0.0]))


@pytest.mark.parametrize("shape", [(2048,), (96, 320), (50, 1024), (7, 1025)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_a_large_tensor_every_element_and_its_place_count(shape, dtype):
    torch.manual_seed(0)
    tensor = torch.randn(shape).to(dtype)
    expected, flat = checksum(tensor), tensor.view(-1)
    assert checksum(tensor.clone()) == expected
    # wherever it lies
    assert checksum(torch.cat([torch.zeros(1, dtype=dtype), flat])[1:].view(shape)) == expected
    integers = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    for at in torch.randperm(len(flat))[:200].tolist():
        other = flat.clone()
        other.view(integers)[at] ^= 1 << (at % 15)
        assert checksum(other) != expected
    for first, second in torch.randperm(len(flat))[:200].view(-1, 2).tolist():
        other = flat.clone()
        other[[first, second]] = flat[[second, first]]
        assert (checksum(other) == expected) == (flat[first] == flat[second])
    assert checksum(flat.flip(0)) != expected and checksum(flat.roll(1)) != expected
    # whole rows of the sums, moved
    assert len(flat) < 4096 or checksum(flat.roll(4096)) != expected
    if len(shape) == 2:
        assert checksum(tensor.t()) != expected != checksum(tensor.flip(0))


def test_checksums_are_cheap():
    # 0.1 s or less for 100 M parameters on one core of 2020: a bound that a busy core can keep.
    tensor = torch.randn(5_000_000)
    best = min(_seconds(checksum, tensor) for _ in range(5))
    assert best < 0.05


def _seconds(function, argument):
    started = time.process_time()
    function(argument)
    return time.process_time() - started


def test_a_manifest_is_of_the_live_weights(model):
    first = describe(model, 3, "float32")
    assert first.version == 3 and first.checksums.keys() == dict(model.named_parameters()).keys()
    name = "model.layers.1.mlp.up_proj.weight"
    with perturbed(model, [name]):
        other = describe(model, 4, "float32")
    changed = {key for key in first.checksums if first.checksums[key] != other.checksums[key]}
    assert changed == {name} and first.logprobs != other.logprobs


def test_probe_logprobs_are_those_of_a_plain_forward_pass(model):
    manifest = describe(model, 0, "float32")
    sequences = manifest.probe
    assert len({tuple(tokens) for tokens in sequences}) == 4
    with torch.no_grad():
        logprobs_BTV = model(input_ids=torch.tensor(sequences)).logits.log_softmax(dim=-1)
    expected = logprobs_BTV[:, :-1].gather(-1, torch.tensor(sequences)[:, 1:, None]).flatten()
    assert manifest.logprobs == pytest.approx(expected, abs=1e-5)


def test_perturbation_is_strong_everywhere_and_leaves_no_trace(model):
    before = copy.deepcopy(dict(model.named_parameters()))
    with pytest.raises(ZeroDivisionError), perturbed(model, list(before)):
        for name, parameter in model.named_parameters():
            change = (parameter - before[name]).square().mean().sqrt()
            assert change > 0.04 and change > 0.3 * before[name].square().mean().sqrt(), name
        _ = 1 / 0  # whatever happens inside
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


# The sampler's mismatch


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_mismatch_is_the_difference_of_log_probs_at_the_same_weights(temperature, model):
    prompts = [[5, 6, 7, 8], [9]]
    samples = TransformersSampler(model, {0}, 12, temperature).sample(prompts, 6, [100, 200])
    batch = Batch(
        number=1,
        version=0,
        group_size=6,
        problems=[0] * 6 + [1] * 6,
        prompts=[prompt for prompt in prompts for _ in range(6)],
        **vars(samples),
    )
    found = sampler_mismatch(model, temperature, "float32", batch)
    assert 0 <= found["sampler_mismatch/mean"] <= found["sampler_mismatch/max"] < 1e-5
    # One token of the first eight sequences that is off, against all of their tokens.
    batch.logprobs[3][1] -= 0.25
    num_tokens = sum(map(len, batch.responses[:8]))
    found = sampler_mismatch(model, temperature, "float32", batch)
    assert found["sampler_mismatch/max"] == pytest.approx(0.25, abs=1e-5)
    assert found["sampler_mismatch/mean"] == pytest.approx(0.25 / num_tokens, abs=1e-5)
    with perturbed(model, ["model.norm.weight"]):  # other weights
        assert (
            sampler_mismatch(model, temperature, "float32", batch)["sampler_mismatch/mean"] > 0.05
        )


# A simulated engine: a copy of the model, which can be told what to get wrong


class Engine(Sampler):
    def __init__(self, model, loads=lambda name, tensor: tensor):
        self.model, self.loads, self.deliveries = copy.deepcopy(model), loads, 0

    @torch.no_grad()
    def use_weights(self, tensors):
        self.deliveries += 1
        for name, parameter in self.model.named_parameters():
            if (loaded := self.loads(name, tensors[name])) is not None:
                parameter.copy_(loaded)

    def score(self, sequences):
        return logprobs_of(self.model, sequences, "float32").view(len(sequences), -1).tolist()


SQUARE = "model.layers.1.self_attn.q_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"


def changed(model):
    """Another model, each of its parameters half its size off."""
    other = copy.deepcopy(model)
    with perturbed(model, dict(model.named_parameters())), torch.no_grad():
        for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
            ours.copy_(theirs)
    return other


def test_an_honest_delivery_costs_what_it_says(model):
    engine, other = Engine(model), changed(model)
    started = time.perf_counter()
    manifest = describe(other, 7, "float32")
    costs = deliver(engine, dict(other.named_parameters()), manifest)
    elapsed = time.perf_counter() - started
    assert (
        engine.score(manifest.probe)
        == logprobs_of(other, manifest.probe, "float32").view(4, -1).tolist()
    )
    assert (
        0
        < costs["time/sync_describe"] + costs["time/sync_load"] + costs["time/sync_verify"]
        < elapsed
    )
    assert min(costs["time/sync_describe"], costs["time/sync_load"], costs["time/sync_verify"]) > 0
    gigabytes = sum(parameter.nbytes for parameter in model.parameters()) / 1e9
    assert costs["throughput/sync_gb_per_second"] * costs["time/sync_load"] == pytest.approx(
        gigabytes
    )


def flip_a_bit(tensor):
    flipped = tensor.detach().clone()
    flipped.view(-1).view(torch.int32)[-1] ^= 1
    return flipped


@pytest.mark.parametrize(
    "fault", [lambda t: t.t(), lambda t: t.t().contiguous(), flip_a_bit, lambda t: t * 0]
)
def test_a_tensor_changed_on_its_way_is_named_and_nothing_is_loaded(fault, model):
    engine, other = Engine(model), changed(model)
    tensors = dict(other.named_parameters())
    tensors[SQUARE] = fault(tensors[SQUARE])
    with pytest.raises(RunStopped, match=rf"Weights of version 7 .*\(changed: {SQUARE}; the rest"):
        deliver(engine, tensors, describe(other, 7, "float32"))
    assert engine.deliveries == 0


def test_missing_and_superfluous_tensors_are_named(model):
    tensors, manifest = dict(model.named_parameters()), describe(model, 7, "float32")
    with pytest.raises(RunStopped, match=r"\(changed: other; the rest"):
        deliver(Engine(model), tensors | {"other": torch.zeros(1)}, manifest)
    del tensors[NORM]
    with pytest.raises(RunStopped, match=rf"version 7 .*\(missing: {NORM}; the rest"):
        deliver(Engine(model), tensors, manifest)


@pytest.mark.parametrize("strength", [0.5, 1e-6])
def test_old_weights_are_noticed_however_small_the_update(strength, model):
    with perturbed(model, dict(model.named_parameters()), strength):
        manifest = describe(model, 7, "float32")
    with pytest.raises(RunStopped, match=r"version 7 .*changed: .* and \d+ more"):
        deliver(Engine(model), dict(model.named_parameters()), manifest)


FAULTS = {
    "nothing": lambda name, tensor: None,
    "all but one": lambda name, tensor: None if name == NORM else tensor,
    "one transposed": lambda name, tensor: tensor.t() if name == SQUARE else tensor,
    "one corrupted": lambda name, tensor: tensor * torch.nan if name == SQUARE else tensor,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_an_engine_loads_wrongly_is_noticed(fault, model):
    engine, other = Engine(model, FAULTS[fault]), changed(model)
    with pytest.raises(RunStopped, match="does not compute with weights 7 although"):
        deliver(engine, dict(other.named_parameters()), describe(other, 7, "float32"))


@pytest.mark.parametrize(
    "name", [SQUARE, NORM, "model.layers.0.self_attn.k_proj.bias", "model.embed_tokens.weight"]
)
def test_the_canary_names_the_tensor_that_never_arrives(name, model):
    before = copy.deepcopy(model.state_dict())
    engine = Engine(model)
    canary(engine, model, "float32")
    assert (
        engine.score([[5, 6, 7, 8]])
        == logprobs_of(model, [[5, 6, 7, 8]], "float32").view(1, -1).tolist()
    )
    with pytest.raises(RunStopped, match=rf"not followed: {name};"):
        canary(Engine(model, lambda at, tensor: None if at == name else tensor), model, "float32")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_canary_notices_an_engine_that_keeps_its_weights(model):
    class Once(Engine):
        def use_weights(self, tensors):
            if not self.deliveries:
                super().use_weights(tensors)

    with pytest.raises(RunStopped, match="does not compute with the true ones"):
        canary(Once(model), model, "float32")


ROUTER_BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


class Sleeping(Engine):
    """Sleep takes all weights, and what it is not sent afterwards stays lost."""

    def __init__(self, model, is_sent=lambda name: True):
        super().__init__(model)
        self.is_sent = is_sent

    @torch.no_grad()
    def use_weights(self, tensors):
        for name, own in weights_of(self.model).items():
            if self.is_sent(name):
                own.copy_(tensors[name])

    @torch.no_grad()
    def sleep(self):
        for tensor in weights_of(self.model).values():
            tensor.zero_()


def test_buffers_that_a_checkpoint_holds_are_handed_over_and_the_canary_lets_an_engine_sleep():
    torch.manual_seed(0)
    config = Glm4MoeConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, moe_intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
        n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=1, initializer_range=0.2,
        n_group=1, topk_group=1, attn_implementation="eager",
    )  # fmt: skip
    model = Glm4MoeForCausalLM(config).eval()
    with torch.no_grad():
        model.get_buffer(ROUTER_BIAS).uniform_(-1, 1)  # which decides between experts
    assert ROUTER_BIAS not in dict(model.named_parameters())
    assert weights_of(model).keys() == model.state_dict().keys()
    before = copy.deepcopy(model.state_dict())
    canary(Sleeping(model), model, "float32")
    with pytest.raises(RunStopped):
        canary(Sleeping(model, is_sent=lambda name: name != ROUTER_BIAS), model, "float32")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    manifest = describe(model, 3, "float32")
    assert ROUTER_BIAS in manifest.checksums
    tensors = dict(model.named_parameters())  # as it was sent before
    with pytest.raises(RunStopped, match=f"missing: {ROUTER_BIAS}"):
        deliver(Sleeping(model), tensors, manifest)


@pytest.mark.parametrize("layers", [2, 32])
def test_the_canary_uses_less_noise_in_each_of_many_layers(layers, tmp_path):
    # Found with SmolLM2-135M: with as much in each of 30 layers, rounding alone moves log-probs
    # beyond the tolerance.
    class Recording(Engine):
        def use_weights(self, tensors):
            super().use_weights(tensors)
            received.append(tensors[SQUARE].detach().clone())

    deep, received = (
        load_model(
            build_model("qwen2", tmp_path, num_hidden_layers=layers), "", torch.device("cpu")
        ),
        [],
    )
    before = dict(deep.named_parameters())[SQUARE].detach().clone()
    canary(Recording(deep), deep, "float32")
    noise = (received[0] - before).square().mean().sqrt() / before.square().mean().sqrt()
    assert noise == pytest.approx(0.7 / layers**0.5, rel=0.1)


def test_weights_that_are_not_finite_are_not_sent(model):
    ruined = copy.deepcopy(model)
    with torch.no_grad():
        ruined.model.norm.weight[3] = torch.inf
    with pytest.raises(RunStopped, match=r"no longer finite.*--learning-rate"):
        describe(ruined, 7, "float32")
