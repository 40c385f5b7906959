"""The vLLM sampler, against the trainer's log-probs and the transformers sampler: the same policy,
the same ends.

All engines start from a checkpoint whose `generation_config` sets top-p, top-k, a penalty, a
temperature and other EOS ids: every test here would fail if any of it had an effect. Statistical
tests have bounds of five standard deviations.
"""

import math
import pickle
import re
from functools import partial

import pytest
import torch

from common.errors import BadInput, RunStopped
from common.models import load_model, load_tokenizer, location
from common.sampling.transformers import TransformersSampler
from common.sampling.vllm import VllmSampler, make_vllm_sampler
from common.tasks import load_task
from common.tasks.problems import load_problems
from common.tasks.turns import Environment, parts_of
from tests.conftest import REPOSITORY, build_model
from tests.helpers import write_task
from tests.sampling.test_transformers import (
    check_ends,
    in_float64,
    make_prompts,
    naive_logprobs_TV,
    seeds,
    trainer_logprobs,
)
from tests.sampling.vllm_engines import EOS, KINDS, LONGEST_PROMPT, MAX_TOKENS, VOCABULARY, engine
from tests.tasks.test_turns import SUMS

NO_EOS = {VOCABULARY + 5}
KEPT = []  # see `vllm_engines.start_engine`


def differences(found, expected):
    return [
        abs(x - y) for a, b in zip(found, expected, strict=True) for x, y in zip(a, b, strict=True)
    ]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
@pytest.mark.parametrize("family, precision", KINDS)
def test_sampler_and_trainer_agree(family, precision, temperature):
    model, sampler = engine(family, precision, temperature=temperature)
    prompts = make_prompts()
    samples = sampler.sample(prompts, 4, seeds(1))
    gaps = differences(
        samples.logprobs, trainer_logprobs(model, prompts, samples, 4, temperature, precision)
    )
    assert len(samples.responses) == 24 and len(gaps) > 100
    if precision == "float32":
        assert max(gaps) < 1e-4
    else:  # 8 bits of mantissa, rounded at different places here and there
        assert sum(gaps) / len(gaps) < 0.05 and max(gaps) < 0.5


@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.parametrize(
    "eos_ids, max_tokens", [(EOS, MAX_TOKENS), (EOS, 3), ({17}, 12), (NO_EOS, 7), (set(), 7)]
)
def test_greedy_ends_where_the_transformers_sampler_ends(family, eos_ids, max_tokens):
    model, sampler = engine(family, "float32", eos_ids=eos_ids, max_tokens=max_tokens)
    prompts = make_prompts(lengths=range(1, 40))
    expected = TransformersSampler(model, eos_ids, max_tokens, 1.0).greedy(prompts)
    found = sampler.greedy(prompts)
    check_ends(found, eos_ids, max_tokens)
    assert (found.responses, found.truncated) == (expected.responses, expected.truncated)
    assert max(differences(found.logprobs, expected.logprobs)) < 1e-4
    if max_tokens == 3:
        assert {True, False} == set(found.truncated)


def test_any_of_several_eos_ids_ends_a_response_and_belongs_to_it():
    _, sampler = engine("qwen2", "float32", max_tokens=12)
    samples = sampler.sample(make_prompts(), 16, seeds(3))
    check_ends(samples, EOS, 12)
    last = {response[-1] for response in samples.responses}
    assert len(last & EOS) >= 5 and {True, False} == set(samples.truncated)
    check_ends(
        engine("qwen2", "float32", max_tokens=1)[1].sample(make_prompts(), 20, seeds(3)), EOS, 1
    )


# Randomness


def test_no_two_samples_share_their_noise():
    # Equal prompts: wherever two samples had the same seed, they would be the same.
    _, sampler = engine("qwen2", "float32", eos_ids=NO_EOS, max_tokens=12)
    for first, step in ((0, 8), (7, 8), (2**63 - 1, -8)):  # as close as seeds may be
        samples = sampler.sample([[5, 6, 7]] * 12, 8, [first + step * p for p in range(12)])
        assert len({tuple(response) for response in samples.responses}) == 96
    assert (
        sampler.sample([[5, 6, 7]], 1, [1]).responses
        != sampler.sample([[5, 6, 7]], 1, [2]).responses
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_first_tokens_have_the_policys_frequencies(temperature):
    # Pearson's χ² with n − 1 degrees of freedom has mean n − 1 and variance 2 (n − 1).
    model, sampler = engine(
        "qwen2", "float32", temperature=temperature, max_tokens=1, eos_ids=NO_EOS
    )
    (prompt,), count = make_prompts(lengths=(11,)), 4000
    samples = sampler.sample([prompt] * 4, count // 4, seeds(11, 4))
    expected = (
        naive_logprobs_TV(in_float64(model), prompt, [0], temperature)[0].exp() * count
    ).tolist()
    counts = torch.bincount(
        torch.tensor(samples.responses).flatten(), minlength=VOCABULARY
    ).tolist()
    # too few to be normal: together, one cell
    rare = [v for v in range(VOCABULARY) if expected[v] < 5]
    cells = [(counts[v], expected[v]) for v in range(VOCABULARY) if expected[v] >= 5]
    cells.append((sum(counts[v] for v in rare), sum(expected[v] for v in rare)))
    chi_square = sum((found - mean) ** 2 / mean for found, mean in cells)
    freedom = len(cells) - 1
    assert freedom > 50 and abs(chi_square - freedom) < 5 * math.sqrt(2 * freedom)


# Several batches at once


def test_batches_submitted_together_come_back_in_order_and_share_engine_steps():
    model, sampler = engine("qwen2", "float32", max_tokens=40)
    batches = [
        (make_prompts(lengths=(3 + i, 20, 9), seed=i), [100 * i + 4 * p for p in range(3)], None)
        for i in range(5)
    ]
    before = sampler.heartbeat.item()
    steps, pooled = [], []
    for samples in sampler.sample_many(batches, 4):
        pooled.append(samples)
        steps.append(sampler.heartbeat.item() - before)
    # each with the log-probs of its own prompts
    for (prompts, _, _), samples in zip(batches, pooled, strict=True):
        assert (
            max(differences(samples.logprobs, trainer_logprobs(model, prompts, samples, 4, 1.0)))
            < 1e-4
        )
        check_ends(samples, EOS, 40)
    longest = [max(map(len, samples.responses)) for samples in pooled]
    # one after the other they would take as many steps as the longest responses
    assert steps[-1] < 0.6 * sum(longest)
    assert steps == sorted(steps) and steps[0] >= longest[0] > 1
    assert (
        len(
            {
                tuple(response)
                for samples in pooled
                for response in samples.responses
                if len(response) > 8
            }
        )
        > 10
    )


def test_more_prompt_tokens_than_one_engine_step_takes():
    # 9,000 of them: where a step ends within a prompt, vLLM 0.32 turns the request's generator
    # back, which on a CPU raises an error.
    model, sampler = engine("qwen2", "float32", max_tokens=4)
    prompts = make_prompts(lengths=[300] * 30)
    samples = sampler.sample(prompts, 2, seeds(1, 30))
    assert (
        max(differences(samples.logprobs, trainer_logprobs(model, prompts, samples, 2, 1.0))) < 1e-4
    )


# Starting


def test_the_factory_verifies_the_engine_against_its_own_model():
    # As a process would call it that was given nothing but a picklable function.
    directory = str(REPOSITORY / "common" / "tiny_model")
    factory = pickle.loads(
        pickle.dumps(partial(make_vllm_sampler, directory, "", 1, {0}, 16, 1.0, "float32", 16))
    )
    sampler = factory()
    KEPT.append(sampler)
    model = load_model(directory, "", torch.device("cpu"))
    samples = sampler.sample([[5, 6, 7]], 4, [1])  # with the true weights, after those of the test
    assert (
        max(differences(samples.logprobs, trainer_logprobs(model, [[5, 6, 7]], samples, 4, 1.0)))
        < 1e-4
    )


def wrong_head_size(directory, monkeypatch):
    return build_model("qwen2", directory, hidden_size=48)


def no_memory(directory, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "100000")
    return str(REPOSITORY / "common" / "tiny_model")


def unknown_architecture(directory, monkeypatch):
    from transformers import XGLMConfig, XGLMForCausalLM

    XGLMForCausalLM(
        XGLMConfig(vocab_size=99, d_model=64, num_layers=1, attention_heads=2, ffn_dim=64)
    ).save_pretrained(directory)
    return str(directory)


def test_a_prompt_that_would_cut_its_response_short_is_refused():
    # With one token more than was reserved, vLLM would stop a token before the limit and say
    # nothing.
    _, sampler = engine("qwen2", "float32", eos_ids=NO_EOS)
    assert (
        list(map(len, sampler.sample([[5] * LONGEST_PROMPT], 2, [1]).responses)) == [MAX_TOKENS] * 2
    )
    with pytest.raises(RunStopped, match=rf"refused a prompt .*{LONGEST_PROMPT + 1} tokens"):
        sampler.sample([[5] * (LONGEST_PROMPT + 1)], 2, [1])


@pytest.mark.parametrize(
    "case, words",
    [
        (wrong_head_size, "head_dim=24"),
        (no_memory, "memory"),
        (unknown_architecture, "XGLMForCausalLM"),
    ],
)
def test_an_engine_that_cannot_start_is_bad_input(case, words, tmp_path, monkeypatch):
    directory = case(tmp_path / "model", monkeypatch)
    with pytest.raises(
        BadInput, match=f"^--engine vllm cannot start .*{re.escape(words)}.*leave --engine"
    ) as caught:
        VllmSampler(directory, "", {0}, 16, 1.0, "float32", 16)
    assert len(str(caught.value)) < 700 and "\n" not in str(caught.value)


def in_turns(tmp_path, max_tokens=120):
    """Samplers with an environment, vLLM's and transformers', and what to ask them."""
    name = f"{write_task(tmp_path, SUMS, 'sums.py')}:Sums"
    tokenizer = load_tokenizer("tiny")
    problems = load_problems(load_task(name, eval_size=8), "train", tokenizer, 100)
    source = (name, "", "", 8)
    ends = {tokenizer.eos_token_id}
    environment = Environment(problems.task, source, tokenizer, ends, False, 60.0)
    generation = (ends, max_tokens, 1.0, "float32")
    model = load_model("tiny", "", torch.device("cpu"))
    plain = TransformersSampler(model, *generation, environment)
    sampler = VllmSampler(location("tiny"), "", *generation, longest_prompt=40)
    KEPT.append(sampler)
    sampler.environment = environment
    return sampler, plain, problems


def test_several_turns(tmp_path):
    sampler, plain, problems = in_turns(tmp_path)
    prompts, asked = problems.prompts[:8], problems.problems[:8]
    found, expected = sampler.greedy(prompts, asked), plain.greedy(prompts, asked)
    assert (found.responses, found.truncated) == (expected.responses, expected.truncated)
    assert [[lp is None for lp in row] for row in found.logprobs] == [
        [lp is None for lp in row] for row in expected.logprobs
    ]
    requests = [
        (prompts[:4], [0, 100, 200, 300], asked[:4]),
        (prompts[4:], [1, 2, 3, 4], asked[4:]),
    ]
    batches = list(sampler.sample_many(requests, 3))
    told = 0
    for (part, _, own), samples in zip(requests, batches, strict=True):
        assert len(samples.responses) == 12
        for row, (response, logprobs) in enumerate(
            zip(samples.responses, samples.logprobs, strict=True)
        ):
            prompt, n = part[row // 3], own[row // 3]["n"]
            with torch.no_grad():
                logits_TV = plain.model(input_ids=torch.tensor([prompt + response])).logits[0]
            plain_TV = logits_TV[len(prompt) - 1 : -1].log_softmax(-1)
            replies = []
            for is_sampled, tokens in parts_of(response, logprobs):
                if not is_sampled:
                    replies.append(problems.tokenizer.decode(tokens))
                    told += len(tokens)
            assert replies == [f"\nQ: {n + k}+{k}+9\nA:" for k in range(1, len(replies) + 1)]
            for t, (token, logprob) in enumerate(zip(response, logprobs, strict=True)):
                assert logprob is None or abs(logprob - plain_TV[t, token].item()) < 1e-4
    assert told > 50
    again = list(sampler.sample_many(requests, 3))
    assert [batch.responses for batch in again] == [batch.responses for batch in batches]
