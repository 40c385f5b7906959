"""Log-probs, entropies and their gradients, against a float64 copy of the model run naively.

The truth: one sequence at a time, no padding, no masks, log-softmax and entropy written out. float32 carries 7 digits;
log-probs here reach −12 and pass through two layers, hence 1e-5 absolute. Gradients are compared by the norm of the
difference over the norm of the gradient: 1e-5 in float32 (some 1e-6 is seen).
"""

import copy
import random

import pytest
import torch
from conftest import build_model

from common.batching import collate, split_by_token_budget
from common.logprobs import logprobs_and_entropy, token_logprobs
from common.models import load_model
from grpo import Args, per_token_loss

CPU = torch.device("cpu")
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


@pytest.fixture(params=MODELS)
def model(request, directories):
    return load_model(directories[request.param], "", CPU, gradient_checkpointing=False)


def make_batch(num_sequences=6, seed=0):
    """Prompts and responses of many lengths, with log-probs of a sampler and advantages, all made up."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(VOCABULARY) for _ in range(n)] for n in rng.sample(range(1, 15), num_sequences)]
    responses = [[rng.randrange(VOCABULARY) for _ in range(n)] for n in rng.sample(range(1, 12), num_sequences)]
    sampler_logprobs = [[-rng.uniform(4, 8) for _ in response] for response in responses]
    return prompts, responses, sampler_logprobs, [rng.gauss(0, 1) for _ in prompts]


def tensors(micro):
    return micro.inputs_BT, micro.attention_BT, micro.targets_BT, micro.mask_BT


def pad_left(micro, extra):
    """The same rows with their padding, and `extra` columns of it, moved to the left."""
    columns = [micro.inputs_BT, micro.attention_BT, micro.targets_BT, micro.mask_BT, micro.sampler_logprobs_BT]
    width = micro.inputs_BT.shape[1] + extra
    moved = [column.new_full((len(micro.rows), width), PAD if c in (0, 2) else 0) for c, column in enumerate(columns)]
    for b, n in enumerate(micro.attention_BT.sum(dim=1).tolist()):
        # The last real token is only predicted, never read: inputs and targets of a row have the same n columns.
        n = max(n, int(micro.mask_BT[b].nonzero().max()) + 1)
        for source, target in zip(columns, moved, strict=True):
            target[b, width - n :] = source[b, :n]
    result = copy.copy(micro)
    result.inputs_BT, result.attention_BT, result.targets_BT, result.mask_BT, result.sampler_logprobs_BT = moved
    return result


def naive(model, prompts, responses, temperature):
    """Log-probs (differentiable) and entropies of the response tokens, in float64: a list of tensors per sequence."""
    all_logprobs, all_entropies = [], []
    for prompt, response in zip(prompts, responses, strict=True):
        logits_TV = model(input_ids=torch.tensor([prompt + response])).logits[0] / temperature
        logprobs, entropies = [], []
        for i, token in enumerate(response):
            z_V = logits_TV[len(prompt) + i - 1]
            largest = z_V.max().detach()
            logsumexp = largest + torch.log(torch.exp(z_V - largest).sum())
            logprobs.append(z_V[token] - logsumexp)
            entropies.append(-sum(p * lp for lp in (z_V - logsumexp).tolist() for p in [2.718281828459045**lp]))
        all_logprobs.append(torch.stack(logprobs))
        all_entropies.append(torch.tensor(entropies, dtype=torch.float64))
    return all_logprobs, all_entropies


def gradient_of(model):
    return torch.cat([p.grad.flatten().double() for p in model.parameters()])


def assert_close_gradients(found, expected, tolerance=1e-5):
    assert expected.norm() > 1e-2  # there is something to compare
    assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
@pytest.mark.parametrize("side", ["right", "left"])
def test_logprobs_and_entropies_against_float64(model, temperature, side):
    prompts, responses, sampler_logprobs, _ = make_batch()
    micro = collate(prompts, responses, sampler_logprobs, range(6), PAD)
    micro = pad_left(micro, extra=20) if side == "left" else micro
    with torch.no_grad():
        logprobs_BT, entropy_BT = token_logprobs(model, *tensors(micro), temperature)
        expected_logprobs, expected_entropies = naive(copy.deepcopy(model).double(), prompts, responses, temperature)
    assert logprobs_BT.dtype == entropy_BT.dtype == torch.float32
    for b in range(6):
        found = logprobs_BT[b][micro.mask_BT[b]].double(), entropy_BT[b][micro.mask_BT[b]].double()
        torch.testing.assert_close(found[0], expected_logprobs[b], rtol=0, atol=1e-5)
        torch.testing.assert_close(found[1], expected_entropies[b], rtol=0, atol=1e-5)
    # The distributions are far from uniform (ln 299 = 5.7) and from each other, or this would show little.
    assert torch.cat(expected_entropies).max() < 5.6 and torch.cat(expected_logprobs).std() > 0.5


def test_outside_the_mask_everything_is_exactly_zero(model):
    prompts, responses, sampler_logprobs, _ = make_batch()
    micro = collate(prompts, responses, sampler_logprobs, range(6), PAD)
    for rows in (micro, pad_left(micro, extra=3)):
        logprobs_BT, entropy_BT = token_logprobs(model, *tensors(rows), 1.0)
        assert (logprobs_BT[~rows.mask_BT] == 0).all() and (entropy_BT[~rows.mask_BT] == 0).all()
        assert (logprobs_BT[rows.mask_BT] < 0).all() and (entropy_BT[rows.mask_BT] > 0).all()


def test_entropy_is_detached(model):
    micro = collate(*make_batch()[:3], range(6), PAD)
    logprobs_BT, entropy_BT = token_logprobs(model, *tensors(micro), 1.0)
    assert logprobs_BT.requires_grad and not entropy_BT.requires_grad


def test_padding_tokens_do_not_matter(model):
    prompts, responses, sampler_logprobs, _ = make_batch()
    results = []
    for pad_id in (PAD, 0, 42):
        micro = collate(prompts, responses, sampler_logprobs, range(6), pad_id)
        with torch.no_grad():
            results.append(token_logprobs(model, *tensors(micro), 1.0))
    for logprobs_BT, entropy_BT in results[1:]:
        assert torch.equal(logprobs_BT, results[0][0]) and torch.equal(entropy_BT, results[0][1])


def test_only_response_tokens_reach_the_head(model, monkeypatch):
    micro = collate(*make_batch()[:3], range(6), PAD)
    shapes = []

    def spy(hidden_NH, weight_VH, targets_N, temperature):
        shapes.append((hidden_NH.shape, weight_VH.shape))
        return logprobs_and_entropy(hidden_NH, weight_VH, targets_N, temperature)

    monkeypatch.setattr("common.logprobs.logprobs_and_entropy", spy)
    token_logprobs(model, *tensors(micro), 1.0)
    assert shapes == [((micro.mask_BT.sum().item(), 64), (VOCABULARY, 64))]


def test_inputs_are_left_unchanged(model):
    micro = collate(*make_batch()[:3], range(6), PAD)
    before = [tensor.clone() for tensor in tensors(micro)]
    token_logprobs(model, *tensors(micro), 0.7)
    assert all(torch.equal(now, then) for now, then in zip(tensors(micro), before, strict=True))


# Gradients


def loss_and_gradient(model, batch, splits, side="right", temperature=1.0, pad_id=PAD, precision="float32"):
    """GRPO's loss of a batch and its gradient by all parameters, one micro-batch after another, as the scripts do."""
    prompts, responses, sampler_logprobs, advantages = batch
    num_tokens, total = sum(map(len, responses)), 0.0
    model.zero_grad()
    for rows in splits:
        micro = collate(prompts, responses, sampler_logprobs, rows, pad_id)
        micro = pad_left(micro, extra=5) if side == "left" else micro
        logprobs_BT, _ = token_logprobs(model, *tensors(micro), temperature, precision)
        advantages_B1 = torch.tensor([[advantages[row]] for row in rows])
        loss_BT = per_token_loss(logprobs_BT, micro.sampler_logprobs_BT, advantages_B1, Args())
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


def test_how_a_batch_is_laid_out_does_not_matter(model):
    # Micro-batches, side of the padding, order of the rows, padding token: only roundings of float32 may differ.
    batch = make_batch()
    expected_loss, expected = loss_and_gradient(model, batch, [range(6)])
    lengths = [len(p) + len(r) for p, r in zip(*batch[:2], strict=True)]
    layouts = {
        "one row at a time": {"splits": [[row] for row in range(6)]},
        "halves": {"splits": [[0, 1, 2], [3, 4, 5]]},
        "by budget": {"splits": split_by_token_budget(lengths, 40)},
        "reversed": {"splits": [range(5, -1, -1)]},
        "shuffled and split": {"splits": [[4, 1], [5, 0, 3], [2]]},
        "padded left": {"splits": [range(6)], "side": "left"},
        "padded left, split": {"splits": [[3, 0], [5, 1, 2, 4]], "side": "left"},
        "padded with EOS": {"splits": [range(6)], "pad_id": 0},
    }
    for name, layout in layouts.items():
        loss, gradient = loss_and_gradient(model, batch, **layout)
        assert loss == pytest.approx(expected_loss, abs=1e-6), name
        assert (gradient - expected).norm() <= 1e-5 * expected.norm(), name


@pytest.mark.parametrize("name", MODELS)
def test_gradient_checkpointing_changes_nothing(name, directories):
    plain = load_model(directories[name], "", CPU, gradient_checkpointing=False)
    checkpointed = load_model(directories[name], "", CPU, gradient_checkpointing=True)
    calls = {plain: 0, checkpointed: 0}
    for model in calls:
        mlp = next(module for module_name, module in model.named_modules() if module_name.endswith(".mlp"))

        def count(module, inputs, model=model):
            calls[model] += 1

        mlp.register_forward_pre_hook(count)  # before: the recomputation stops inside, at the last tensor needed
    batch = make_batch()
    loss, gradient = loss_and_gradient(plain, batch, [range(6)])
    loss_again, gradient_again = loss_and_gradient(checkpointed, batch, [range(6)])
    assert (calls[plain], calls[checkpointed]) == (1, 2)  # recomputed in the backward pass
    assert loss_again == loss and torch.equal(gradient_again, gradient)  # the same operations in the same order


# Numbers at the edges


def test_a_masked_vocabulary_entry_leaves_entropy_finite(directories):
    model = load_model(directories["llama, untied"], "", CPU, gradient_checkpointing=False)
    head = torch.nn.Linear(64, VOCABULARY)
    head.weight.data.copy_(model.lm_head.weight.data)
    head.bias.data.zero_()
    head.bias.data[250:] = -torch.inf  # e.g. rows of a padded vocabulary
    model.lm_head = head
    prompts, responses, sampler_logprobs, advantages = make_batch()
    responses = [[token % 250 for token in response] for response in responses]
    micro = collate(prompts, responses, sampler_logprobs, range(6), PAD)
    logprobs_BT, entropy_BT = token_logprobs(model, *tensors(micro), 0.7)

    with torch.no_grad():
        twin = copy.deepcopy(model).double()
        for b in range(6):
            logits_TV = twin(input_ids=torch.tensor([prompts[b] + responses[b]])).logits[0, len(prompts[b]) - 1 : -1]
            truth_TV = torch.log_softmax(logits_TV[:, :250] / 0.7, dim=-1)  # only what is left of the vocabulary
            found = entropy_BT[b][micro.mask_BT[b]].double()
            torch.testing.assert_close(found, -(truth_TV.exp() * truth_TV).sum(-1), rtol=0, atol=1e-5)
            expected = truth_TV[torch.arange(len(responses[b])), responses[b]]
            torch.testing.assert_close(logprobs_BT[b][micro.mask_BT[b]].double(), expected, rtol=0, atol=1e-5)

    _, gradient = loss_and_gradient(model, (prompts, responses, sampler_logprobs, advantages), [range(6)])
    assert gradient.isfinite().all() and gradient.norm() > 0


def test_bfloat16_autocast_stays_near_float32(model):
    # bf16 keeps 8 bits: 0.4 % of each product. Logits here have a size of about 2, so hundredths are to be expected:
    # at most 0.1 for any token and 0.03 on average. Weights and their gradients stay float32.
    batch = make_batch()
    micro = collate(*batch[:3], range(6), PAD)
    with torch.no_grad():
        full = token_logprobs(model, *tensors(micro), 1.0, "float32")
        half = token_logprobs(model, *tensors(micro), 1.0, "bfloat16")
    for exact, rounded in zip(full, half, strict=True):
        assert rounded.dtype == torch.float32
        difference_N = (rounded - exact)[micro.mask_BT].abs()
        assert 0 < difference_N.max() < 0.1 and difference_N.mean() < 0.03
    _, expected = loss_and_gradient(model, batch, [range(6)])
    _, found = loss_and_gradient(model, batch, [range(6)], precision="bfloat16")
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    assert_close_gradients(found, expected, tolerance=0.1)  # a log-prob off by 0.1 is a ratio off by 10 %
