"""Log-probs, entropies and their gradients, against a float64 copy of the model run naively.

The truth: one sequence at a time, no padding, no masks, log-softmax and entropy written out.
float32 carries 7 digits; log-probs here reach −12 and pass through two layers, hence 1e-5 absolute.
Gradients are compared by the norm of the difference over the norm of the gradient: 1e-5 in float32
(some 1e-6 is seen).
"""

import copy
import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from common.batching import MicroBatch
from common.kernels import cpu
from common.layers import speed_up
from common.logprobs import LARGE_VOCABULARY, autocast, logprobs_and_entropy, token_logprobs
from tests.conftest import build_model

VOCABULARY, PAD = 299, 1
MODELS = {
    "qwen2, tied": ("qwen2", {}),
    "qwen2, untied": ("qwen2", {"tie_word_embeddings": False}),
    "llama, untied": ("llama", {}),
    "gpt2, tied": ("gpt2", {}),
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    base = tmp_path_factory.mktemp("models")
    return {
        name: build_model(family, base / name, vocab_size=VOCABULARY, **fields)
        for name, (family, fields) in MODELS.items()
    }


def load(directory):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    speed_up(model)
    return model.eval()


@pytest.fixture(params=MODELS)
def model(request, directories):
    return load(directories[request.param])


def make_batch(num_sequences=6, seed=0):
    """Prompts and responses of many lengths, with log-probs of a sampler and advantages, all made
    up.
    """
    rng = random.Random(seed)
    prompts = [
        [rng.randrange(VOCABULARY) for _ in range(n)]
        for n in rng.sample(range(1, 15), num_sequences)
    ]
    responses = [
        [rng.randrange(VOCABULARY) for _ in range(n)]
        for n in rng.sample(range(1, 12), num_sequences)
    ]
    sampler_logprobs = [[-rng.uniform(4, 8) for _ in response] for response in responses]
    return prompts, responses, sampler_logprobs, [rng.gauss(0, 1) for _ in prompts]


def lay_out(prompts, responses, sampler_logprobs, rows=range(6), pad_id=PAD):
    """Those rows as a micro-batch, padded on the right."""
    width = max(len(prompts[row]) + len(responses[row]) for row in rows) - 1
    tokens_BT = torch.full((len(rows), width + 1), pad_id)
    mask_BT, old_BT = torch.zeros(len(rows), width, dtype=torch.bool), torch.zeros(len(rows), width)
    for b, row in enumerate(rows):
        start, end = len(prompts[row]), len(prompts[row]) + len(responses[row])
        tokens_BT[b, :end] = torch.tensor(prompts[row] + responses[row])
        mask_BT[b, start - 1 : end - 1] = True  # a token is predicted at the place before its own
        old_BT[b, start - 1 : end - 1] = torch.tensor(sampler_logprobs[row])
    return MicroBatch(
        inputs_BT=tokens_BT[:, :-1],
        targets_BT=tokens_BT[:, 1:],
        mask_BT=mask_BT,
        sampler_logprobs_BT=old_BT,
        rows=list(range(len(tokens_BT))),
    )


def naive(model, prompts, responses, temperature):
    """Log-probs and entropies of the response tokens, differentiable, in float64: a tensor per
    sequence.
    """
    all_logprobs, all_entropies = [], []
    for prompt, response in zip(prompts, responses, strict=True):
        logits_TV = model(input_ids=torch.tensor([prompt + response])).logits[0] / temperature
        logprobs, entropies = [], []
        for i, token in enumerate(response):
            z_V = logits_TV[len(prompt) + i - 1]
            largest = z_V.max().detach()
            log_p_V = z_V - largest - torch.log(torch.exp(z_V - largest).sum())
            logprobs.append(log_p_V[token])
            entropies.append(-(torch.exp(log_p_V) * log_p_V).sum())
        all_logprobs.append(torch.stack(logprobs))
        all_entropies.append(torch.stack(entropies))
    return all_logprobs, all_entropies


def gradient_of(model):
    return torch.cat([p.grad.flatten().double() for p in model.parameters()])


def assert_close_gradients(found, expected, tolerance=1e-5):
    assert expected.norm() > 1e-2  # there is something to compare
    assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
def test_logprobs_and_entropies_against_float64(model, temperature):
    prompts, responses, sampler_logprobs, _ = make_batch()
    micro = lay_out(prompts, responses, sampler_logprobs)
    with torch.no_grad():
        logprobs_BT, entropy_BT = token_logprobs(model, micro, temperature)
        expected_logprobs, expected_entropies = naive(
            copy.deepcopy(model).double(), prompts, responses, temperature
        )
    assert logprobs_BT.dtype == entropy_BT.dtype == torch.float32
    for b in range(6):
        found = logprobs_BT[b][micro.mask_BT[b]].double(), entropy_BT[b][micro.mask_BT[b]].double()
        torch.testing.assert_close(found[0], expected_logprobs[b], rtol=0, atol=1e-5)
        torch.testing.assert_close(found[1], expected_entropies[b], rtol=0, atol=1e-5)
    # The distributions are far from uniform (ln 299 = 5.7) and from each other, or this would show
    # little.
    assert torch.cat(expected_entropies).max() < 5.6 and torch.cat(expected_logprobs).std() > 0.5


def test_outside_the_mask_everything_is_exactly_zero(model):
    prompts, responses, sampler_logprobs, _ = make_batch()
    micro = lay_out(prompts, responses, sampler_logprobs)
    logprobs_BT, entropy_BT = token_logprobs(model, micro, 1.0)
    assert (logprobs_BT[~micro.mask_BT] == 0).all() and (entropy_BT[~micro.mask_BT] == 0).all()
    assert (logprobs_BT[micro.mask_BT] < 0).all() and (entropy_BT[micro.mask_BT] > 0).all()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("sliced", [False, True], ids=["plain", "sliced"])
def test_without_response_tokens_there_are_zeros_and_gradients_of_zero(
    model, sliced, precision, monkeypatch
):
    # A rank that has no rows left makes the pass all the same, and backward as well.
    monkeypatch.setattr("common.logprobs.LARGE_VOCABULARY", 1 if sliced else VOCABULARY + 1)
    micro = lay_out(*make_batch()[:3])
    micro.mask_BT = torch.zeros_like(micro.mask_BT)
    results = token_logprobs(model, micro, 0.7, precision)
    for found_BT in results:
        assert found_BT.shape == micro.mask_BT.shape and found_BT.dtype == torch.float32
        assert (found_BT == 0).all() and found_BT.requires_grad
    logprobs_BT, entropy_BT = results
    (logprobs_BT.exp() + entropy_BT)[micro.mask_BT].sum().backward()
    for parameter in model.parameters():  # zeros, not None: the ranks sum what they have
        assert (parameter.grad == 0).all()


def test_padding_tokens_do_not_matter(model):
    prompts, responses, sampler_logprobs, _ = make_batch()
    results = []
    for pad_id in (PAD, 0, 42):
        micro = lay_out(prompts, responses, sampler_logprobs, pad_id=pad_id)
        with torch.no_grad():
            results.append(token_logprobs(model, micro, 1.0))
    for logprobs_BT, entropy_BT in results[1:]:
        assert torch.equal(logprobs_BT, results[0][0]) and torch.equal(entropy_BT, results[0][1])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_only_response_tokens_reach_the_head_and_a_temperature_of_one_no_bit(
    model, precision, monkeypatch
):
    micro = lay_out(*make_batch()[:3])
    given = []

    def spy(*arguments):
        given.append(arguments)
        return logprobs_and_entropy(*arguments)

    monkeypatch.setattr("common.logprobs.logprobs_and_entropy", spy)
    token_logprobs(model, micro, 1.0, precision)
    ((hidden_NH, weight_VH, targets_N, cap),) = given
    assert cap is None
    with autocast("cpu", precision):
        expected_BTH = model.base_model(micro.inputs_BT).last_hidden_state
    assert torch.equal(hidden_NH, expected_BTH[micro.mask_BT].to(getattr(torch, precision)))
    assert weight_VH is model.get_output_embeddings().weight and torch.equal(
        targets_N, micro.targets_BT[micro.mask_BT]
    )


def test_inputs_are_left_unchanged(model):
    micro = lay_out(*make_batch()[:3])
    before = copy.deepcopy(micro)
    token_logprobs(model, micro, 0.7)
    for name in ("inputs_BT", "targets_BT", "mask_BT", "sampler_logprobs_BT"):
        assert torch.equal(getattr(micro, name), getattr(before, name))


def test_which_way_is_taken_on_a_cpu(monkeypatch):
    taken, nothing = [], (torch.zeros(2), torch.zeros(2))
    monkeypatch.setattr(cpu.SlicedLogprobs, "apply", lambda *_: taken.append("sliced") or nothing)
    monkeypatch.setattr(
        cpu, "plain_logprobs_and_entropy", lambda *_: taken.append("plain") or nothing
    )
    for V in (LARGE_VOCABULARY - 1, LARGE_VOCABULARY):
        logprobs_and_entropy(
            torch.zeros(2, 4), torch.zeros(V, 4), torch.zeros(2, dtype=torch.int64)
        )
    assert taken == ["plain", "sliced"]


def test_what_does_not_fit_is_refused():
    hidden, weight, targets = (
        torch.zeros(5, 64),
        torch.zeros(257, 64),
        torch.zeros(5, dtype=torch.int64),
    )
    for arguments in [
        (hidden, weight[:, :-1], targets),
        (hidden, weight, targets[:-1]),
        (hidden, weight.bfloat16(), targets),
        (hidden.half(), weight.half(), targets),
    ]:
        with pytest.raises(ValueError, match="do not fit"):
            logprobs_and_entropy(*arguments)
    for dtypes in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        logprobs_and_entropy(hidden.to(dtypes[0]), weight.to(dtypes[1]), targets)


# Gradients


def loss_and_gradient(model, batch, splits, temperature=1.0, pad_id=PAD, precision="float32"):
    """GRPO's loss of a batch and its gradient by all parameters, one micro-batch after another, as
    the scripts do.
    """
    prompts, responses, sampler_logprobs, advantages = batch
    num_tokens, total = sum(map(len, responses)), 0.0
    model.zero_grad()
    for rows in splits:
        micro = lay_out(prompts, responses, sampler_logprobs, rows, pad_id)
        logprobs_BT, _ = token_logprobs(model, micro, temperature, precision)
        advantages_B1 = torch.tensor([[advantages[row]] for row in rows])
        ratio_BT = torch.exp(logprobs_BT - micro.sampler_logprobs_BT)
        loss_BT = -torch.minimum(ratio_BT * advantages_B1, ratio_BT.clamp(0.8, 1.2) * advantages_B1)
        loss = loss_BT[micro.mask_BT].sum() / num_tokens
        loss.backward()
        total += loss.item()
    return total, gradient_of(model)


def naive_loss_and_gradient(model, batch, temperature):
    prompts, responses, sampler_logprobs, advantages = batch
    model = copy.deepcopy(model).double()
    loss = 0.0
    for b, logprobs in enumerate(naive(model, prompts, responses, temperature)[0]):
        for logprob, old in zip(logprobs, sampler_logprobs[b], strict=True):
            ratio = torch.exp(logprob - old)
            loss -= torch.minimum(ratio * advantages[b], ratio.clamp(0.8, 1.2) * advantages[b])
    loss = loss / sum(map(len, responses))
    loss.backward()
    return loss.item(), gradient_of(model)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
def test_gradient_against_float64(model, temperature):
    batch = make_batch()
    found_loss, found = loss_and_gradient(model, batch, [range(6)], temperature=temperature)
    expected_loss, expected = naive_loss_and_gradient(model, batch, temperature)
    assert found_loss == pytest.approx(expected_loss, abs=1e-5)
    assert_close_gradients(found, expected)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("sliced", [False, True], ids=["plain", "sliced"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradient_of_the_entropy_against_float64(
    model, temperature, sliced, precision, monkeypatch
):
    monkeypatch.setattr("common.logprobs.LARGE_VOCABULARY", 1 if sliced else VOCABULARY + 1)
    prompts, responses, sampler_logprobs, weights = make_batch()
    micro = lay_out(prompts, responses, sampler_logprobs)
    _, entropy_BT = token_logprobs(model, micro, temperature, precision)
    assert entropy_BT.requires_grad
    (entropy_BT * torch.tensor(weights).unsqueeze(1)).sum().backward()

    twin = copy.deepcopy(model).double()
    twin.zero_grad()
    _, entropies = naive(twin, prompts, responses, temperature)
    sum(w * one.sum() for w, one in zip(weights, entropies, strict=True)).backward()
    # bf16 keeps 8 bits, and the layers lose most of what is lost (0.035 is seen).
    tolerance = 1e-5 if precision == "float32" else 0.05
    assert_close_gradients(gradient_of(model), gradient_of(twin), tolerance)


def test_how_a_batch_is_laid_out_does_not_matter(model):
    # Micro-batches, order of the rows, padding token: only roundings of float32 may differ.
    batch = make_batch()
    expected_loss, expected = loss_and_gradient(model, batch, [range(6)])
    layouts = {
        "one row at a time": {"splits": [[row] for row in range(6)]},
        "halves": {"splits": [[0, 1, 2], [3, 4, 5]]},
        "reversed": {"splits": [range(5, -1, -1)]},
        "shuffled and split": {"splits": [[4, 1], [5, 0, 3], [2]]},
        "padded with EOS": {"splits": [range(6)], "pad_id": 0},
    }
    for name, layout in layouts.items():
        loss, gradient = loss_and_gradient(model, batch, **layout)
        assert loss == pytest.approx(expected_loss, abs=1e-6), name
        assert (gradient - expected).norm() <= 1e-5 * expected.norm(), name


@pytest.mark.parametrize("name", MODELS)
def test_gradient_checkpointing_changes_nothing(name, directories):
    plain, checkpointed = load(directories[name]), load(directories[name])
    checkpointed.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    # it acts in training mode only, where GPT-2 has dropout
    for module in checkpointed.train().modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    calls = {plain: 0, checkpointed: 0}
    for model in calls:
        mlp = next(
            module for module_name, module in model.named_modules() if module_name.endswith(".mlp")
        )

        def count(module, inputs, model=model):
            calls[model] += 1

        # A hook before the module: the recomputation stops inside, at the last tensor needed.
        mlp.register_forward_pre_hook(count)
    batch = make_batch()
    loss, gradient = loss_and_gradient(plain, batch, [range(6)])
    loss_again, gradient_again = loss_and_gradient(checkpointed, batch, [range(6)])
    assert (calls[plain], calls[checkpointed]) == (1, 2)  # recomputed in the backward pass
    # the same operations in the same order
    assert loss_again == loss and torch.equal(gradient_again, gradient)


# Numbers at the edges


def test_a_head_with_a_bias_and_masked_vocabulary_entries(directories):
    model = load(directories["llama, untied"])
    head = torch.nn.Linear(64, VOCABULARY)
    head.weight.data.copy_(model.lm_head.weight.data)
    torch.manual_seed(0)
    head.bias.data.normal_()
    head.bias.data[250:] = -torch.inf  # e.g. rows of a padded vocabulary
    model.lm_head = head
    prompts, responses, sampler_logprobs, advantages = make_batch()
    responses = [[token % 250 for token in response] for response in responses]
    micro = lay_out(prompts, responses, sampler_logprobs)
    logprobs_BT, entropy_BT = token_logprobs(model, micro, 0.7)

    with torch.no_grad():
        twin = copy.deepcopy(model).double()
        for b in range(6):
            logits_TV = twin(input_ids=torch.tensor([prompts[b] + responses[b]])).logits[
                0, len(prompts[b]) - 1 : -1
            ]
            # only what is left of the vocabulary
            truth_TV = torch.log_softmax(logits_TV[:, :250] / 0.7, dim=-1)
            found = entropy_BT[b][micro.mask_BT[b]].double()
            torch.testing.assert_close(
                found, -(truth_TV.exp() * truth_TV).sum(-1), rtol=0, atol=1e-5
            )
            expected = truth_TV[torch.arange(len(responses[b])), responses[b]]
            torch.testing.assert_close(
                logprobs_BT[b][micro.mask_BT[b]].double(), expected, rtol=0, atol=1e-5
            )

    _, gradient = loss_and_gradient(
        model, (prompts, responses, sampler_logprobs, advantages), [range(6)]
    )
    assert gradient.isfinite().all() and gradient.norm() > 0


def test_bfloat16_autocast_stays_near_float32(model):
    # bf16 keeps 8 bits: 0.4 % of each product. Logits here have a size of about 2, so hundredths
    # are to be expected: at most 0.1 for any token and 0.03 on average. Weights and their gradients
    # stay float32.
    batch = make_batch()
    micro = lay_out(*batch[:3])
    with torch.no_grad():
        full = token_logprobs(model, micro, 1.0, "float32")
        half = token_logprobs(model, micro, 1.0, "bfloat16")
    for exact, rounded in zip(full, half, strict=True):
        assert rounded.dtype == torch.float32
        difference_N = (rounded - exact)[micro.mask_BT].abs()
        assert 0 < difference_N.max() < 0.1 and difference_N.mean() < 0.03
    _, expected = loss_and_gradient(model, batch, [range(6)])
    _, found = loss_and_gradient(model, batch, [range(6)], precision="bfloat16")
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    # a log-prob off by 0.1 is a ratio off by 10 %
    assert_close_gradients(found, expected, tolerance=0.1)
