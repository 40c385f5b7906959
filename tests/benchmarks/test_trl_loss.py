"""Loss and gradient against TRL's own loss function, on one batch that an older policy sampled.

Needs the packages of benchmarks/requirements.txt; skips where they are absent.
"""

import pytest
import torch
from conftest import build_model
from torch.nn.utils.rnn import pad_sequence

from benchmarks import variants
from common.metrics import StepMetrics
from common.models import load_model, load_tokenizer
from tests.helpers import REPOSITORY, import_script
from tests.test_gradient import G, logprobs_and_entropies, two_groups

trl = pytest.importorskip("trl", reason="needs benchmarks/requirements.txt")
datasets = pytest.importorskip("datasets")

LONGEST = 16  # tokens of a response, at most
CLIP = {"epsilon": 0.2, "epsilon_high": 0.2}
GSPO_CLIP = {"epsilon": 0.2, "epsilon_high": 0.3}
LOSSES = {  # our script: our options, TRL's options
    "grpo": ({}, {"loss_type": "dapo", **CLIP}),
    # The KL term as in the paper: by default, TRL multiplies it by ρ.
    "paper_grpo": (
        {"kl_coef": 0.04},
        {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": False, **CLIP},
    ),
    "dapo": ({}, {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28}),
    "dr_grpo": ({"max_response_tokens": LONGEST}, {"loss_type": "dr_grpo", **CLIP}),
    "gspo": (
        {"clip_low": 0.2, "clip_high": 0.3},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", **GSPO_CLIP},
    ),
    # TRL's bound is on the weight itself, ours on how far it is above 1.
    "cispo": ({"clip_high": 0.2}, {"loss_type": "cispo", "epsilon_high": 1.2}),
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Policy and reference: the same random weights, those of the reference somewhat larger."""
    home, ranges = tmp_path_factory.mktemp("models"), {"policy": 0.15, "reference": 0.16}
    return [build_model("qwen2", home / name, initializer_range=ranges[name]) for name in ranges]


def load(directories):
    return [load_model(path, "", torch.device("cpu")) for path in directories]


def trl_loss_and_gradient(options, directories, batch, tmp_path):
    """By `GRPOTrainer._compute_loss`, with the advantages of our batch."""
    policy, reference = load(directories)
    config = trl.GRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False,
        per_device_train_batch_size=2 * G, num_generations=G, max_completion_length=LONGEST,
        report_to="none", **options,
    )  # fmt: skip
    rows = datasets.Dataset.from_list([{"prompt": "unused"}] * 2 * G)
    trainer = trl.GRPOTrainer(
        policy, lambda completions, **_: [0.0] * len(completions), config, rows,
        processing_class=load_tokenizer(directories[0]),
    )  # fmt: skip

    def padded(lists, side="right", dtype=torch.long):
        tensors = [torch.tensor(values, dtype=dtype) for values in lists]
        return pad_sequence(tensors, batch_first=True, padding_side=side)

    pairs = list(zip(batch.prompts, batch.responses, strict=True))
    with torch.no_grad():
        of_reference = [logprobs_and_entropies(reference, *pair)[0].tolist() for pair in pairs]
    inputs = {
        "prompt_ids": padded(batch.prompts, "left"),
        "prompt_mask": padded([[1] * len(prompt) for prompt in batch.prompts], "left"),
        "completion_ids": padded(batch.responses),
        "completion_mask": padded([[1] * len(response) for response in batch.responses]),
        "advantages": batch.advantages_PG.flatten().float(),
        "old_per_token_logps": padded(batch.logprobs, dtype=torch.float32),
        "ref_per_token_logps": padded(of_reference, dtype=torch.float32),
        "num_items_in_batch": torch.tensor(float(sum(map(len, batch.responses)))),
    }
    trainer.model.eval()  # so that its micro-batch is the whole batch
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.item(), {key: value.grad for key, value in trainer.model.named_parameters()}


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_are_those_of_trl(name, directories, tmp_path):
    ours, theirs = LOSSES[name]
    path = REPOSITORY / "grpo.py"
    if name != "grpo":
        path = tmp_path / f"against_trl_{name}.py"
        variants.write(name, path)
    script = import_script(path)
    args = script.Args(temperature=1.0, **ours)
    policy, reference = load(directories)

    def logprobs_of(prompt, response):
        return logprobs_and_entropies(policy, prompt, response)[0].tolist()

    batch = two_groups(policy.config.vocab_size, logprobs_of)
    batch.advantages_PG = script.advantages(batch.rewards_PG, args)
    loss = script.gradient(batch, policy, reference, args, "float32", StepMetrics())
    expected_loss, expected = trl_loss_and_gradient(theirs, directories, batch, tmp_path / "trl")

    assert loss == pytest.approx(expected_loss, rel=0, abs=2e-6)
    found = {key: parameter.grad for key, parameter in policy.named_parameters()}
    norm = sum(tensor.square().sum() for tensor in expected.values()).sqrt()
    error = sum((found[key] - expected[key]).square().sum() for key in expected).sqrt()
    assert norm > 0
    assert (error / norm).item() < 1e-5
