"""What a researcher changes first costs a few lines in a copy of a script."""

import difflib

import pytest
import torch

from tests.helpers import REPOSITORY, checkpoint, dense_task, import_script, steps, train
from tests.losses import micro_batch

# The script that is copied, and lines of it with what replaces them
CHANGES = {
    "kl": (
        "red_weight.py",  # which has no KL penalty; in grpo.py it is the option --kl-coef
        {
            "    return weights_PG.masked_fill(advantages_PG == 0, 0.0)\n": (
                "    return weights_PG\n"
            ),
            "    return -weight_B1 * micro.advantages_B1 * micro.logprobs_BT\n": (
                "    d_BT = micro.logprobs_BT - micro.reference_logprobs_BT\n"
                "    k3_BT = torch.exp(-d_BT) + d_BT - 1\n"
                "    return -weight_B1 * micro.advantages_B1 * micro.logprobs_BT + 0.04 * k3_BT\n"
            ),
        },
    ),
    "entropy": (
        "grpo.py",
        {
            "        weights_PG = weights_PG.masked_fill(advantages_PG == 0, 0.0)\n": (
                "        pass\n"
            ),
            "    return loss_BT\n": "    return loss_BT - 0.01 * micro.entropy_BT\n",
        },
    ),
    "updates": (
        "grpo.py",
        {
            "    updates_per_batch: int = option(1, at_least=1)\n": (
                "    updates_per_batch: int = option(4, at_least=1)\n"
            )
        },
    ),
}


def changed(name, directory):
    """The changed copy, imported, and how many lines a diff removes or adds at most."""
    original, replacements = CHANGES[name]
    text = before = (REPOSITORY / original).read_text()
    for old, new in replacements.items():
        assert before.count(old) == 1
        text = text.replace(old, new)
    path = directory / f"changed_{name}.py"
    path.write_text(text)
    kinds = [line[0] for line in difflib.ndiff(before.splitlines(), text.splitlines())]
    return import_script(path), max(kinds.count("-"), kinds.count("+"))


@pytest.mark.parametrize("name", CHANGES)
def test_it_takes_four_lines_at_most(name, tmp_path):
    _, lines = changed(name, tmp_path)
    assert lines <= 4


@pytest.mark.parametrize("name, slope", [("kl", 0.04 * (1 - 2.0)), ("entropy", -0.01)])
def test_responses_of_equal_groups_learn_as_well(name, slope, tmp_path):
    # One token without an advantage; the reference's probability is twice the policy's.
    script, _ = changed(name, tmp_path)
    ones_PG = torch.ones(1, 2, dtype=torch.int64)
    weights_PG = script.token_weights(torch.zeros(1, 2).double(), ones_PG, script.Args())
    assert weights_PG.tolist() == [[0.5, 0.5]]
    logprob_BT = torch.full((1, 1), -2.0, dtype=torch.float64, requires_grad=True)
    entropy_BT = torch.full((1, 1), 1.5, dtype=torch.float64, requires_grad=True)
    micro = micro_batch(
        logprob_BT,
        logprob_BT.detach(),
        torch.zeros(1, 1).double(),
        reference_logprobs_BT=logprob_BT.detach() + torch.tensor(2.0).double().log(),
        entropy_BT=entropy_BT,
    )
    script.per_token_loss(micro, script.Args()).sum().backward()
    leaf = entropy_BT if name == "entropy" else logprob_BT
    assert leaf.grad.item() == pytest.approx(slope, rel=1e-12)


@pytest.mark.parametrize("name", CHANGES)
def test_the_copy_trains(name, tmp_path):
    changed(name, tmp_path)
    task = dense_task(tmp_path)
    run = train(tmp_path, script=f"changed_{name}", task=task, num_steps=2)
    assert all(record["grad_norm"] > 0 for record in steps(run))
    updates = checkpoint(run, 2)["optimizer"]["state"][0]["step"].item()
    assert updates == (8 if name == "updates" else 2)
