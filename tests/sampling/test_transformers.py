"""The sampler of `transformers` models, against the trainer's log-probs and against naive decoding.

Naive decoding reads one prompt at a time, without cache or padding. Log-probs of −12 and less agree
to 1e-5 in float32; where two runs must be the same run, they are compared bit for bit. Statistical
tests have fixed seeds, and bounds of about five standard deviations.
"""

import bisect
import copy
import itertools
import json
import math
import random
import shutil
import types

import numpy as np
import pytest
import torch

from common.batching import collate
from common.distributed import layers_of
from common.errors import RunStopped
from common.logprobs import token_logprobs
from common.models import load_model, load_tokenizer, save_model
from common.sampling import Samples
from common.sampling import transformers as module
from common.sampling.transformers import TransformersSampler, inverse_cdf
from tests.conftest import FAMILIES, build_model

CPU = torch.device("cpu")
VOCABULARY = 299
# of a random model's tokens about one in twelve ends the response
MANY_EOS = set(range(0, VOCABULARY, 12))
NO_EOS = {VOCABULARY + 5}  # never sampled


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    base = tmp_path_factory.mktemp("models")
    return {
        family: build_model(family, base / family, vocab_size=VOCABULARY) for family in FAMILIES
    }


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, directories):
    return load_model(directories[request.param], "", CPU)


@pytest.fixture(scope="module")
def qwen2(directories):
    return load_model(directories["qwen2"], "", CPU)


def make_prompts(lengths=(3, 17, 1, 9, 30, 5), seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(VOCABULARY) for _ in range(length)] for length in lengths]


def seeds(first, count=6):
    """One per prompt, as far apart as group sizes here may ask for."""
    return list(range(10_000 * first, 10_000 * (first + count), 10_000))


def same(a, b):
    return (a.responses, a.logprobs, a.truncated) == (b.responses, b.logprobs, b.truncated)


def in_float64(model):
    return copy.deepcopy(model).double()


@torch.no_grad()
def naive_logprobs_TV(twin, prompt, response, temperature):
    """Distributions that the response's tokens are sampled from, by a full forward in float64: one
    row per token.
    """
    logits_TV = (
        twin(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        / temperature
    )
    return logits_TV - logits_TV.exp().sum(dim=-1, keepdim=True).log()


def trainer_logprobs(model, prompts, samples, group_size, temperature, precision="float32"):
    """Log-probs of all responses as the trainer computes them, padded on the right: a list of
    lists.
    """
    prompts = [prompt for prompt in prompts for _ in range(group_size)]
    batch = types.SimpleNamespace(
        prompts=prompts, responses=samples.responses, logprobs=samples.logprobs
    )
    micro = collate(batch, range(len(prompts)))
    with torch.no_grad():
        logprobs_BT, _ = token_logprobs(model, micro, temperature, precision)
    return [row[mask].tolist() for row, mask in zip(logprobs_BT, micro.mask_BT, strict=True)]


def batch_sizes(model, sample):
    """Run `sample()`; returns its result and how many rows each forward pass had."""
    sizes = []
    embedding = model.get_input_embeddings()
    hook = embedding.register_forward_pre_hook(
        lambda module, inputs: sizes.append(inputs[0].shape[0])
    )
    result = sample()
    hook.remove()
    return result, sizes


# The log-probs are those of the trainer


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
def test_sampler_and_trainer_agree(model, temperature):
    # Padded on the left here, on the right there; ended at many places, so with many rows leaving
    # the batch.
    prompts = make_prompts()
    samples = TransformersSampler(model, MANY_EOS, 24, temperature).sample(prompts, 4, seeds(1))
    expected = trainer_logprobs(model, prompts, samples, 4, temperature)
    assert len(samples.responses) == 24
    for found, truth, response in zip(samples.logprobs, expected, samples.responses, strict=True):
        assert len(found) == len(truth) == len(response)
        assert found == pytest.approx(truth, abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rows_that_outlive_others_keep_their_own_past(model, temperature):
    # A sequence leaving the batch moves those behind it; mixing up rows, caches or positions would
    # show.
    prompts = make_prompts()
    sampler = TransformersSampler(model, MANY_EOS, 32, temperature)
    samples, sizes = batch_sizes(model, lambda: sampler.sample(prompts, 4, seeds(2)))
    assert sizes[0] == 6 and sizes[1] <= 24 and sizes[1:] == sorted(sizes[1:], reverse=True)
    # the batch shrank several times while its longest responses went on
    assert len(set(sizes[1:])) >= 5
    twin = in_float64(model)
    for b, response in enumerate(samples.responses):
        naive_TV = naive_logprobs_TV(twin, prompts[b // 4], response, temperature)
        expected = naive_TV[torch.arange(len(response)), response].tolist()
        assert samples.logprobs[b] == pytest.approx(expected, abs=1e-5)


def test_sampler_reads_the_live_weights(directories):
    model = load_model(directories["llama"], "", CPU)
    sampler, prompts = TransformersSampler(model, MANY_EOS, 8, 1.0), make_prompts()
    before = sampler.greedy(prompts)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    after = sampler.greedy(prompts)
    assert after.responses != before.responses
    for found, truth in zip(
        after.logprobs, trainer_logprobs(model, prompts, after, 1, 1.0), strict=True
    ):
        assert found == pytest.approx(truth, abs=1e-5)


def test_bfloat16_agrees_with_a_bfloat16_trainer(qwen2):
    # Same weights, differently shaped products of 8 bits each: hundredths of a nat (see
    # test_logprobs.py).
    prompts = make_prompts()
    samples = TransformersSampler(qwen2, MANY_EOS, 16, 1.0, "bfloat16").sample(prompts, 4, seeds(1))
    expected = trainer_logprobs(qwen2, prompts, samples, 4, 1.0, "bfloat16")
    differences = [
        abs(x - y)
        for a, b in zip(samples.logprobs, expected, strict=True)
        for x, y in zip(a, b, strict=True)
    ]
    assert max(differences) < 0.1 and sum(differences) / len(differences) < 0.03


# Ends of responses


def check_ends(samples, eos_ids, max_tokens):
    for response, logprobs, truncated in zip(
        samples.responses, samples.logprobs, samples.truncated, strict=True
    ):
        assert len(response) == len(logprobs) and 1 <= len(response) <= max_tokens
        assert all(0 <= token < VOCABULARY for token in response)
        assert not eos_ids.intersection(response[:-1])  # nothing after the first end
        assert truncated == (response[-1] not in eos_ids)
        assert len(response) == max_tokens if truncated else True


def test_any_of_several_eos_ids_ends_a_response(model):
    eos_ids = {0, 17, 42, 211, 298} | set(range(100, 115))
    samples = TransformersSampler(model, eos_ids, 12, 1.0).sample(make_prompts(), 16, seeds(3))
    check_ends(samples, eos_ids, 12)
    last = {response[-1] for response in samples.responses}
    assert len(last & eos_ids) >= 5 and {True, False} == set(samples.truncated)


def test_no_end_is_invented_for_a_truncated_response(qwen2):
    for eos_ids in (NO_EOS, set()):
        samples = TransformersSampler(qwen2, eos_ids, 7, 1.0).sample(make_prompts(), 3, seeds(4))
        assert [len(response) for response in samples.responses] == [7] * 18
        assert samples.truncated == [True] * 18
        batch = types.SimpleNamespace(
            prompts=[[5]] * 18, responses=samples.responses, logprobs=samples.logprobs
        )
        assert collate(batch, range(18)).mask_BT.sum() == 18 * 7


def test_an_end_at_the_very_limit_is_no_truncation(qwen2):
    samples = TransformersSampler(qwen2, MANY_EOS, 1, 1.0).sample(make_prompts(), 40, seeds(5))
    check_ends(samples, MANY_EOS, 1)
    assert {True, False} == set(samples.truncated)


def test_all_ending_at_once_ends_decoding(qwen2):
    sampler = TransformersSampler(qwen2, set(range(VOCABULARY)), 50, 1.0)
    samples, sizes = batch_sizes(qwen2, lambda: sampler.sample(make_prompts(), 2, seeds(6)))
    assert [len(response) for response in samples.responses] == [1] * 12
    assert samples.truncated == [False] * 12 and sizes == [6]


# Randomness


def test_the_seed_alone_decides(model):
    sampler, prompts = TransformersSampler(model, MANY_EOS, 16, 1.0), make_prompts()
    torch.manual_seed(1)
    np.random.seed(1)
    first = sampler.sample(prompts, 4, seeds(8))
    torch.manual_seed(2)
    np.random.seed(2)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()
    second = sampler.sample(prompts, 4, seeds(8))
    assert same(first, second)
    # The global streams are neither read nor moved.
    assert (
        torch.equal(torch.get_rng_state(), states[0])
        and np.random.get_state()[1].tolist() == states[1]
    )
    assert sampler.sample(prompts, 4, seeds(9)).responses != first.responses


def assert_same_up_to_rounding(found, expected):
    assert (found.responses, found.truncated) == (expected.responses, expected.truncated)
    for ours, theirs in zip(found.logprobs, expected.logprobs, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_a_prompts_samples_depend_on_its_own_seed_alone(model):
    # Whatever it is sampled beside: all of them, in another order, beside strangers, or alone.
    sampler, prompts = TransformersSampler(model, MANY_EOS, 24, 1.0), make_prompts()
    expected = sampler.sample(prompts, 4, seeds(20))
    for order in ([0, 1, 2, 3, 4, 5], [4, 1, 5, 0, 3, 2], [3, 0], [2]):
        strangers = make_prompts(lengths=(40, 2), seed=9)
        there = [prompts[p] for p in order] + strangers
        found = sampler.sample(there, 4, [seeds(20)[p] for p in order] + seeds(30, 2))
        for place, p in enumerate(order):
            one, other = slice(4 * place, 4 * place + 4), slice(4 * p, 4 * p + 4)
            assert_same_up_to_rounding(part(found, one), part(expected, other))


def part(samples, rows):
    return Samples(samples.responses[rows], samples.logprobs[rows], samples.truncated[rows])


def test_one_text_twice_in_a_batch_is_sampled_twice(qwen2):
    sampler = TransformersSampler(qwen2, NO_EOS, 8, 1.0)
    samples = sampler.sample([[5, 6, 7]] * 3, 8, [100, 200, 100])
    first, other, again = (samples.responses[start : start + 8] for start in (0, 8, 16))
    assert not {*map(tuple, first)} & {*map(tuple, other)} and first == again


@pytest.mark.parametrize("most", [1, 4, 5, 12, 23])
def test_how_many_sequences_are_decoded_at_a_time_does_not_matter(most, model, monkeypatch):
    sampler, prompts = TransformersSampler(model, MANY_EOS, 24, 1.0), make_prompts()
    expected, greedy = sampler.sample(prompts, 4, seeds(21)), sampler.greedy(prompts)
    monkeypatch.setattr(module, "MOST_SEQUENCES", most)
    found, sizes = batch_sizes(model, lambda: sampler.sample(prompts, 4, seeds(21)))
    assert 4 <= max(sizes) <= max(4, most)  # a group is never divided
    assert_same_up_to_rounding(found, expected)
    found, sizes = batch_sizes(model, lambda: sampler.greedy(prompts))
    assert max(sizes) == min(6, most)
    assert_same_up_to_rounding(found, greedy)


def test_the_heart_beats_once_per_decoded_token_and_per_layer_read(model, capsys, monkeypatch):
    monkeypatch.setattr("common.progress.SHOW_AFTER", 0)
    # In whatever counter the sampler is given: in a process of its own, one in shared memory.
    sampler = TransformersSampler(model, NO_EOS, 7, 1.0)
    sampler.heartbeat = beats = torch.zeros(1, dtype=torch.int64)
    sampler.sample(make_prompts(), 2, seeds(22))
    layers = model.config.get_text_config().num_hidden_layers
    assert beats.item() == layers + 7
    assert f"layers, reading prompts:   0%|          | 0/{layers} " in capsys.readouterr().err
    assert not any(layer._forward_hooks for layer in layers_of(model))


def test_responses_of_a_group_differ(model):
    samples = TransformersSampler(model, NO_EOS, 8, 1.0).sample(make_prompts(), 8, seeds(10))
    assert len({tuple(response) for response in samples.responses}) == 48


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
def test_first_tokens_have_the_policys_frequencies(qwen2, temperature):
    # Pearson's χ² with n − 1 degrees of freedom has mean n − 1 and variance 2 (n − 1).
    group_size = 6000
    prompts = make_prompts(lengths=(4, 11))
    samples = TransformersSampler(qwen2, NO_EOS, 1, temperature).sample(
        prompts, group_size, seeds(11, 2)
    )
    for p, prompt in enumerate(prompts):
        expected = (
            naive_logprobs_TV(in_float64(qwen2), prompt, [0], temperature)[0].exp() * group_size
        ).tolist()
        counts = [0] * VOCABULARY
        for (token,) in samples.responses[p * group_size : (p + 1) * group_size]:
            counts[token] += 1
        # too few to be normal: together, one cell
        rare = [v for v in range(VOCABULARY) if expected[v] < 5]
        cells = [(counts[v], expected[v]) for v in range(VOCABULARY) if expected[v] >= 5]
        cells.append((sum(counts[v] for v in rare), sum(expected[v] for v in rare)))
        chi_square = sum((count - mean) ** 2 / mean for count, mean in cells)
        freedom = len(cells) - 1
        assert freedom > 50 and abs(chi_square - freedom) < 5 * math.sqrt(2 * freedom)
        # The least likely tokens, of which 15 are expected, do occur: top-p or top-k would cut them
        # off.
        tail, mass = set(), 0.0
        for v in sorted(range(VOCABULARY), key=expected.__getitem__):
            tail, mass = tail | {v}, mass + expected[v]
            if mass > 15:
                break
        assert abs(sum(counts[v] for v in tail) - mass) < 3.5 * math.sqrt(mass)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_later_tokens_have_the_policys_frequencies(qwen2, temperature):
    # A token's log-prob less its mean, the negative entropy, is 0 on average, whatever came before;
    # with the variance of each position's distribution, the sum over thousands of tokens is normal.
    prompts = make_prompts(seed=1)
    samples = TransformersSampler(qwen2, MANY_EOS, 32, temperature).sample(prompts, 32, seeds(12))
    twin, excess, variance, count = in_float64(qwen2), 0.0, 0.0, 0
    for b, response in enumerate(samples.responses):
        logprobs_TV = naive_logprobs_TV(twin, prompts[b // 32], response, temperature)
        probs_TV = logprobs_TV.exp()
        mean_T = (probs_TV * logprobs_TV).sum(dim=-1)
        excess += (torch.tensor(samples.logprobs[b], dtype=torch.float64) - mean_T).sum().item()
        variance += ((probs_TV * logprobs_TV.square()).sum(dim=-1) - mean_T.square()).sum().item()
        count += len(response)
    assert count > 1500 and abs(excess) < 5 * math.sqrt(variance)


def test_greedy_equals_a_naive_loop(model):
    prompts = make_prompts()
    samples = TransformersSampler(model, MANY_EOS, 20, 0.7).greedy(prompts)
    check_ends(samples, MANY_EOS, 20)
    for prompt, response, logprobs in zip(
        prompts, samples.responses, samples.logprobs, strict=True
    ):
        tokens = list(prompt)
        while len(tokens) < len(prompt) + 20 and (
            len(tokens) == len(prompt) or tokens[-1] not in MANY_EOS
        ):
            with torch.no_grad():
                tokens.append(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax().item())
        assert response == tokens[len(prompt) :]
        naive_TV = naive_logprobs_TV(in_float64(model), prompt, response, 0.7)
        assert logprobs == pytest.approx(
            naive_TV[torch.arange(len(response)), response].tolist(), abs=1e-5
        )
    assert len(set(map(len, samples.responses))) > 1


# One token from one uniform number


def log_of(*probabilities):
    return torch.tensor(probabilities, dtype=torch.float64).log().float().unsqueeze(0)


def ids_of(logprobs_1V, *uniform):
    """The ids that the uniform numbers stand for under one distribution."""
    uniform_B1 = torch.tensor(uniform, dtype=torch.float64).unsqueeze(1)
    return inverse_cdf(logprobs_1V.repeat(len(uniform), 1), uniform_B1).squeeze(1).tolist()


BELOW_1 = math.nextafter(1, 0)


def test_an_ids_share_of_the_unit_interval_is_its_probability():
    # Quarters have no rounding: a number on the border of two shares belongs to the upper one.
    quarters = log_of(0.25, 0.5, 0.25)
    borders = (0, 0.25 - 1e-7, 0.25, 0.5, 0.75 - 1e-7, 0.75, BELOW_1)
    assert ids_of(quarters, *borders) == [0, 0, 1, 1, 1, 2, 2]


def test_no_number_stands_for_an_impossible_id():
    # The least and greatest numbers (1.0 is what rounding might make), and the borders between
    # shares, with impossible ids on every side of them.
    numbers = (0, math.ulp(0), 0.25, math.nextafter(0.25, 0), 0.5, BELOW_1, 1.0)
    assert ids_of(log_of(0, 0, 0.25, 0, 0, 0.75, 0, 0), *numbers) == [2, 2, 5, 2, 5, 5, 5]
    assert ids_of(log_of(0, 0, 1, 0), *numbers) == [2] * 7  # one id is all there is
    assert ids_of(log_of(1), *numbers) == [0] * 7
    # float32 makes it 0, although its log is finite
    assert ids_of(log_of(0.5, 0.5, 1e-60), *numbers)[-2:] == [1, 1]


def test_a_masked_vocabulary_against_a_loop():
    # Rows of one batch have distributions of their own, from flat to one-hot, and two thirds of the
    # ids are masked.
    generator = torch.Generator().manual_seed(0)
    scale_B1 = torch.logspace(-2, 2, 400).unsqueeze(1)
    logits_BV = scale_B1 * torch.randn(400, 97, generator=generator)
    logits_BV[torch.rand(400, 97, generator=generator) < 2 / 3] = -math.inf
    logprobs_BV = torch.log_softmax(logits_BV, dim=-1)
    uniform_B1 = torch.rand(400, 1, dtype=torch.float64, generator=generator)
    uniform_B1[::3], uniform_B1[1::3] = 0, BELOW_1
    found = inverse_cdf(logprobs_BV, uniform_B1).squeeze(1).tolist()
    for b, (probs, uniform) in enumerate(
        zip(logprobs_BV.exp().tolist(), uniform_B1.squeeze(1).tolist(), strict=True)
    ):
        cumulative = list(itertools.accumulate(probs))
        assert found[b] == bisect.bisect_right(cumulative, uniform * cumulative[-1])
        assert probs[found[b]] > 0


def test_sampled_ids_have_their_probabilities():
    # Pearson's χ² again, on a distribution over six orders of magnitude, with masked ids among the
    # likely ones.
    num_samples, generator = 200_000, torch.Generator().manual_seed(17)
    logits_V = torch.linspace(0, -14, 40)[torch.randperm(40, generator=generator)]
    logits_V[::7] = -math.inf
    uniform_B1 = torch.rand(num_samples, 1, dtype=torch.float64, generator=generator)
    tokens_B1 = inverse_cdf(torch.log_softmax(logits_V, dim=0).expand(num_samples, -1), uniform_B1)
    counts = torch.bincount(tokens_B1.squeeze(1), minlength=40)
    expected = torch.softmax(logits_V.double(), dim=0) * num_samples
    assert counts[::7].sum() == 0
    often = expected >= 5
    chi_square = ((counts[often] - expected[often]).square() / expected[often]).sum().item()
    freedom = int(often.sum())  # the rare ids, left out, take the place of the one that is lost
    assert freedom > 20 and abs(chi_square - freedom) < 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_stop_the_run(directories, bad):
    model = load_model(directories["llama"], "", CPU)
    with torch.no_grad():
        model.get_output_embeddings().weight[3, 5] = bad
    sampler = TransformersSampler(model, MANY_EOS, 4, 1.0)
    with pytest.raises(RunStopped, match=r"no longer finite.*--learning-rate"):
        sampler.sample(make_prompts(), 2, seeds(18))
    # an evaluation must not lose the metrics of the step that shows why
    sampler.greedy(make_prompts())


def test_bf16_weights_are_cast_once_for_all_tokens(qwen2):
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True
    ) as profile:
        TransformersSampler(qwen2, NO_EOS, 8, 1.0, "bfloat16").sample(make_prompts(), 2, seeds(19))
    shape = list(qwen2.model.layers[0].mlp.up_proj.weight.shape)
    copies = [
        event
        for event in profile.events()
        if event.name == "aten::copy_" and event.input_shapes[0] == shape
    ]
    assert len(copies) == 2 * len(qwen2.model.layers)  # of up_proj and gate_proj


# What sampling leaves alone


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_models_mode_is_restored(directories, checkpointing):
    for family in FAMILIES:
        model = load_model(directories[family], "", CPU, checkpointing)
        modes = [module.training for module in model.modules()]
        assert any(modes) == checkpointing and not all(modes)
        sampler = TransformersSampler(model, MANY_EOS, 4, 1.0)
        sampler.sample(make_prompts(), 2, seeds(13))
        sampler.greedy(make_prompts())
        assert [module.training for module in model.modules()] == modes


def test_gradient_checkpointing_does_not_change_samples(model, directories):
    # In training mode a checkpointed model keeps no cache, without which decoding would be wrong or
    # slow.
    checkpointed = load_model(
        directories[model.config.model_type], "", CPU, gradient_checkpointing=True
    )
    prompts = make_prompts()
    expected = TransformersSampler(model, MANY_EOS, 16, 1.0).sample(prompts, 4, seeds(14))
    assert same(
        TransformersSampler(checkpointed, MANY_EOS, 16, 1.0).sample(prompts, 4, seeds(14)), expected
    )


def test_generation_config_changes_nothing(model, directories, tmp_path):
    # Instruct checkpoints switch such things on; log-probs of a truncated distribution would not be
    # the policy's.
    directory = shutil.copytree(directories[model.config.model_type], tmp_path / "meddling")
    path = directory / "generation_config.json"
    settings = {
        "do_sample": True,
        "top_p": 0.1,
        "top_k": 2,
        "repetition_penalty": 3.0,
        "temperature": 0.1,
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    meddled = load_model(str(directory), "", CPU)
    assert (
        meddled.generation_config.top_k == 2 and meddled.generation_config.repetition_penalty == 3.0
    )
    plain, other = (TransformersSampler(m, MANY_EOS, 16, 1.0) for m in (model, meddled))
    # Greedy decoding with a temperature: loading warns of it, saving it would raise, after all the
    # training.
    meddled.generation_config.do_sample = False
    save_model(meddled, load_tokenizer(str(directory)), tmp_path / "saved")
    assert load_model(str(tmp_path / "saved"), "", CPU).generation_config.top_k is None
    assert same(
        other.sample(make_prompts(), 4, seeds(15)), plain.sample(make_prompts(), 4, seeds(15))
    )
    assert same(other.greedy(make_prompts()), plain.greedy(make_prompts()))


def test_prompts_and_weights_are_left_unchanged(model):
    prompts = make_prompts()
    weights = copy.deepcopy(model.state_dict())
    TransformersSampler(model, MANY_EOS, 8, 1.0).sample(prompts, 4, seeds(16))
    assert prompts == make_prompts()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(
        parameter.grad is None and parameter.requires_grad for parameter in model.parameters()
    )
