"""LoRA: gradients of the adapter, merged weights for samplers, and what a run leaves behind.

Independent truths: W + (α/r) B A formed by hand in float64, the `peft` library's own loading, and
runs of other kinds (beside training, resumed, on several ranks) that must be the same.
"""

import copy
import types

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from common import commandline
from common.batching import collate
from common.errors import BadInput, RunStopped
from common.layers import use_threads
from common.logprobs import token_logprobs
from common.lora import Base, add_adapter, merged, trainable
from common.metrics import StepMetrics
from common.models import load_model, load_policy, load_reference
from common.sampling.transformers import TransformersSampler
from common.sampling.verify import canary, deliver, describe, logprobs_of
from common.weights import perturbed, weights_of
from tests.conftest import build_model
from tests.helpers import (
    assert_same_run,
    checkpoint,
    command,
    dense_task,
    import_script,
    metrics,
    options,
    resume,
    train,
)
from tests.sampling.test_verify import Engine
from tests.test_gradient import G, two_groups

CPU = torch.device("cpu")
RANK, ALPHA = 4, 8.0
SCRIPTS = ("grpo", "rec_oneside_nois", "red_weight")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    use_threads(1)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """{is the head tied?: a random model}"""
    directory = tmp_path_factory.mktemp("models")
    families = {True: "qwen2", False: "llama"}
    return {
        tied: build_model(family, directory / family, initializer_range=0.15)
        for tied, family in families.items()
    }


def with_adapter(directory, dtype=torch.float32):
    """A model whose adapter is not that of the start, where B is 0."""
    model = load_model(directory, "", CPU, dtype=dtype)
    add_adapter(model, RANK, ALPHA, seed=3)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in trainable(model):
            parameter.copy_(0.1 * torch.randn_like(parameter))
    return model


def base_weights(model):
    """Copies of the untouched weights, by their plain names."""
    return {
        name.replace(".base_layer", ""): tensor.detach().clone()
        for name, tensor in model.named_parameters()
        if ".lora_" not in name
    }


def merged_by_hand(model):
    """Every weight in float64, by its plain name."""
    found = {}
    layers = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        weight = parameter.detach().double()
        if name.endswith(".base_layer.weight"):
            layer = layers[name.removesuffix(".base_layer.weight")]
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            weight = weight + ALPHA / RANK * (B.detach().double() @ A.detach().double())
        found[name.replace(".base_layer", "")] = weight
    return found


@pytest.fixture(scope="module")
def batch(directories):
    model = with_adapter(directories[True])

    def scored(prompt, response):
        return logprobs_of(model, [prompt + response], "float32")[-len(response) :].tolist()

    return two_groups(model.config.vocab_size, scored)


def loss_of_token(name, new, old, advantage):
    """−A times what each script weighs a token with, by the equations in their docstrings."""
    ratio = torch.exp(new - old)
    if name == "grpo":
        return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    if name == "red_weight":
        return -torch.exp(torch.tensor(advantage).double()) * advantage * new
    in_time = ratio <= 1.2 if advantage >= 0 else ratio >= 0.8
    return -advantage * in_time.double() * new


def truth(name, directory, model, batch):
    """Gradients of A and B by their names, in float64, through a plain model with W + (α/r) B A."""
    plain = load_model(directory, "", CPU).double()
    adapter = {
        key: tensor.detach().double().requires_grad_()
        for key, tensor in model.named_parameters()
        if tensor.requires_grad
    }
    # In bfloat16, those of the base are rounded.
    weights = {key: tensor.double() for key, tensor in base_weights(model).items()}
    for key in adapter:
        if ".lora_A." in key:
            stem = key.partition(".lora_A.")[0]
            change = adapter[key.replace("lora_A", "lora_B")] @ adapter[key]
            weights[f"{stem}.weight"] = weights[f"{stem}.weight"] + ALPHA / RANK * change
    rewards = [grade["reward"] for grade in batch.grades]
    num_tokens = sum(map(len, batch.responses))
    total = 0.0
    for i, (prompt, response) in enumerate(zip(batch.prompts, batch.responses, strict=True)):
        group = rewards[i // G * G : i // G * G + G]
        mean = sum(group) / G
        std = (sum((r - mean) ** 2 for r in group) / G) ** 0.5
        advantage = rewards[i] - mean
        if name == "grpo":
            advantage /= std + 1e-6
        ids = torch.tensor([prompt + response])
        logits_TV = torch.func.functional_call(plain, weights, kwargs={"input_ids": ids}).logits[0]
        logprobs_TV = torch.log_softmax(logits_TV[len(prompt) - 1 : -1], dim=-1)
        for t, token in enumerate(response):
            new, old = logprobs_TV[t, token], batch.logprobs[i][t]
            total = total + loss_of_token(name, new, old, advantage) / num_tokens
    gradients = torch.autograd.grad(total, list(adapter.values()))
    return total.item(), dict(zip(adapter, gradients, strict=True))


# Measured: 4e-7 in float32, 0.02 in bf16, where W is rounded to 8 bits, and products are bf16.
BOUNDS = {"float32": 1e-5, "bfloat16": 0.05}


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", SCRIPTS)
def test_gradients_of_the_adapter_against_float64(name, tied, precision, directories, batch):
    script = import_script(f"{name}.py")
    args = script.Args(max_tokens_per_microbatch=45)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    model = with_adapter(directories[tied], dtype)
    batch.advantages_PG = script.advantages(batch.rewards_PG, args)
    loss = script.gradient(batch, model, Base(model), args, precision, StepMetrics())
    expected_loss, expected = truth(name, directories[tied], model, batch)
    norm = sum(tensor.square().sum() for tensor in expected.values()).sqrt()
    found = dict(model.named_parameters())
    error = sum((found[key].grad - expected[key]).square().sum() for key in expected).sqrt()
    assert (error / norm).item() < BOUNDS[precision]
    assert loss == pytest.approx(expected_loss, abs=BOUNDS[precision])
    assert all(found[key].dtype == torch.float32 for key in expected)
    assert all(tensor.grad is None for key, tensor in found.items() if key not in expected)


def test_every_linear_layer_but_the_head_has_an_adapter(directories):
    for tied, directory in directories.items():
        model = with_adapter(directory)
        linear = [
            name
            for name, module in load_model(directory, "", CPU).named_modules()
            if isinstance(module, torch.nn.Linear) and name != "lm_head"
        ]
        names = [name for name, tensor in model.named_parameters() if tensor.requires_grad]
        assert len(linear) == 14 and len(names) == 2 * len(linear)
        assert all(any(name.startswith(f"{layer}.lora_") for name in names) for layer in linear)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def place_of(name, model):
    """The name of a weight in a model with an adapter."""
    stem, _, last = name.rpartition(".")
    wrapped = f"{stem}.base_layer.{last}"
    return wrapped if wrapped in model.state_dict() else name


def policy_and_reference(directory, **settings):
    script = import_script("grpo.py")
    args = script.Args(model=directory, lora_rank=RANK, precision="float32", **settings)
    policy = load_policy(args, CPU)
    return policy, load_reference(args, CPU, policy)


def test_the_reference_is_the_base_and_takes_no_memory(directories):
    policy, reference = policy_and_reference(directories[True])
    plain = load_model(directories[True], "", CPU)
    sequences = [[5, 6, 7, 8, 9, 10]]
    base = logprobs_of(plain, sequences, "float32")
    assert torch.equal(logprobs_of(policy, sequences, "float32"), base)  # KL is 0 at the start
    with torch.no_grad():
        for parameter in trainable(policy):
            parameter.add_(0.1)
    one = types.SimpleNamespace(prompts=[[5]], responses=[[6, 7, 8, 9, 10]], logprobs=[[0.0] * 5])
    micro = collate(one, range(1))
    logprobs_BT, _ = token_logprobs(reference, micro, 1.0)
    assert torch.equal(logprobs_BT[micro.mask_BT], base)
    assert (logprobs_of(policy, sequences, "float32") - base).abs().mean() > 0.01
    assert reference.policy is policy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_samplers_get_plain_merged_weights(tied, dtype, directories):
    model = with_adapter(directories[tied], dtype)
    before = copy.deepcopy(model.state_dict())
    by_hand, found = merged_by_hand(model), dict(weights_of(model))
    plain = load_model(directories[tied], "", CPU)
    assert found.keys() == by_hand.keys() == dict(plain.named_parameters()).keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        assert torch.allclose(tensor.double(), by_hand[name], rtol=2.0**-22, atol=1e-7)
    with merged(model):
        for name, tensor in weights_of(model).items():
            rounded = found[name].to(model.state_dict()[place_of(name, model)].dtype)
            assert torch.equal(tensor, rounded.float())
        outside = {name: tensor.clone() for name, tensor in weights_of(model).items()}
        with perturbed(model, ["model.norm.weight"]):
            inside = {name: tensor.clone() for name, tensor in weights_of(model).items()}
        changed = [name for name in found if not torch.equal(inside[name], outside[name])]
        assert changed == ["model.norm.weight"]
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_gpt2_whose_weights_are_transposed(tmp_path):
    directory = build_model("gpt2", tmp_path / "gpt2")
    model = with_adapter(directory)
    plain = load_model(directory, "", CPU)
    sampler = Engine(plain)
    sampler.use_weights(weights_of(model))
    gap = logprobs_of(sampler.model, [[5, 6, 7, 8]], "float32")
    assert torch.allclose(gap, logprobs_of(model, [[5, 6, 7, 8]], "float32"), atol=1e-5)


def test_what_the_sampler_computes_is_what_the_trainer_computes(directories):
    for dtype, precision, bound in (
        (torch.float32, "float32", 1e-5),
        (torch.bfloat16, "bfloat16", 0.2),
    ):
        model = with_adapter(directories[True], dtype)
        sampler = TransformersSampler(model, {0}, 12, 1.0, precision)
        samples = sampler.sample([[5, 6, 7]], 8, [1])
        gaps = []
        for response, logprobs in zip(samples.responses, samples.logprobs, strict=True):
            found = logprobs_of(model, [[5, 6, 7, *response]], precision)[2:]
            gaps += (found - torch.tensor(logprobs)).abs().tolist()
        assert sum(gaps) / len(gaps) < bound


def spoiled(model, how):
    """Weights that a mistake would send: those of the base, or the adapter applied twice."""
    right = dict(weights_of(model))
    base = base_weights(model)
    if how == "base":
        return base
    return {name: right[name] + (right[name] - base[name]) for name in right}


@pytest.mark.parametrize("how", ["base", "twice"])
def test_wrongly_merged_weights_stop_the_run(how, directories):
    model = with_adapter(directories[True])
    plain = load_model(directories[True], "", CPU)
    canary(Engine(plain), model, "float32")
    manifest = describe(model, 1, "float32")
    deliver(Engine(plain), weights_of(model), manifest)
    wrong = spoiled(model, how)
    with pytest.raises(RunStopped, match=r"version 1 did not reach the sampler \(changed: "):
        deliver(Engine(plain), wrong, manifest)
    # On its way into the engine, behind the checksums: found by the probe, which the trainer
    # computes with its adapter, and at the start by the canary.
    engine = Engine(plain, lambda name, tensor: wrong[name])
    with pytest.raises(RunStopped, match="does not compute with weights 1 although"):
        deliver(engine, weights_of(model), manifest)
    with pytest.raises(RunStopped, match="do not follow its weights"):
        canary(engine, model, "float32")


def test_gradient_checkpointing_changes_no_gradient(directories, batch):
    script = import_script("grpo.py")
    args = script.Args()
    batch.advantages_PG = script.advantages(batch.rewards_PG, args)
    found = []
    for checkpointing in (False, True):
        policy, reference = policy_and_reference(
            directories[True], gradient_checkpointing=checkpointing
        )
        script.gradient(batch, policy, reference, args, "float32", StepMetrics())
        found.append([parameter.grad for parameter in trainable(policy)])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert any(gradient.abs().max() > 0 for gradient in found[1])


# Runs


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    directory = tmp_path_factory.mktemp("lora")
    return {
        "model": build_model("qwen2", directory / "model"),
        "task": dense_task(directory),
        "lora_rank": RANK,
        "learning_rate": 1e-2,
    }


def test_a_run_leaves_an_adapter_and_a_merged_model(settings, tmp_path):
    run_dir = train(tmp_path, num_steps=3, **settings)
    records = metrics(run_dir)
    assert records[1]["kl/ref_k2"] == 0 < records[3]["kl/ref_k2"]
    assert all(record["sampler_mismatch/max"] < 1e-4 for record in records[1:])
    base = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    untrained = base(input_ids=ids).logits
    merged_model = AutoModelForCausalLM.from_pretrained(run_dir / "model", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, run_dir / "adapter")(input_ids=ids).logits
    ours = merged_model(input_ids=ids).logits
    assert torch.allclose(ours, theirs, atol=1e-5) and (ours - untrained).abs().max() > 1e-3
    # small, and resumed bit for bit
    saved = checkpoint(run_dir, 3)
    assert saved["model"] and all(".lora_" in name for name in saved["model"])
    assert len(saved["optimizer"]["state"]) == len(saved["model"])


def test_beside_training_and_resumed_the_run_is_the_same(settings, tmp_path):
    lag = {"sync_interval": 2, "sync_offset": 1, "eval_interval": 3}
    whole = train(tmp_path, "whole", num_steps=6, **settings, **lag)
    beside = train(tmp_path, "beside", num_steps=6, serial=False, **settings, **lag)
    assert_same_run(whole, beside)
    parts = {"num_steps": 3, "checkpoint_interval": 3}
    for name, serial in (("parts", True), ("parts_beside", False)):
        words = options(tmp_path, name, **{**settings, **lag, **parts, "serial": serial})
        assert command(*words) == 0
        assert command(*resume(tmp_path / name, "--num-steps", 6)) == 0
        assert_same_run(whole, tmp_path / name)


def test_another_base_under_the_same_path_is_refused(settings, tmp_path, capfd):
    model = build_model("qwen2", tmp_path / "model")
    words = options(tmp_path, **{**settings, "model": model, "checkpoint_interval": 1})
    assert command(*words) == 0
    other = load_model(model, "", CPU)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-4
    other.save_pretrained(model)
    assert command(*resume(tmp_path / "run", "--num-steps", 3)) == 2
    assert "the model differ from those it began with" in capfd.readouterr().err


def test_an_adapter_alone_is_no_model(settings, tmp_path):
    run_dir = train(tmp_path, num_steps=1, **settings)
    with pytest.raises(BadInput, match=r"is an adapter only: give a merged model, such as model/"):
        load_model(str(run_dir / "adapter"), "", CPU)


def test_the_default_learning_rate_is_that_of_adapters():
    script = import_script("grpo.py")
    found = [
        commandline.parse(script.Args, "grpo.py", words).learning_rate
        for words in ([], ["--lora-rank", "8"], ["--lora-rank", "8", "--learning-rate", "0.1"])
    ]
    assert found == pytest.approx([2e-4, 2e-3, 0.1])
