"""--updates-per-batch: a batch in parts, with an update for each; on several ranks, see
test_distributed.py.
"""

import json
import math

import pytest
import torch
from conftest import build_model
from helpers import (
    assert_same_run,
    checkpoint,
    command,
    dense_task,
    load_weights,
    metrics,
    resume,
    rollouts,
    steps,
    train,
)
from transformers import AutoModelForCausalLM

from common import runlog
from common.batching import mini_batches
from common.sampling import Batch


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A model and a task that gives a signal at every step, with four updates for each batch."""
    directory = tmp_path_factory.mktemp("updates")
    return {
        "model": build_model("qwen2", directory / "model"),
        "task": dense_task(directory),
        "updates_per_batch": 4,
        "learning_rate": 2e-3,
    }


def updates_made(run_dir, step):
    """How often AdamW has updated each parameter, by the checkpoint of a step."""
    moments = checkpoint(run_dir, step)["optimizer"]["state"].values()
    (count,) = {int(moment["step"]) for moment in moments}
    return count


def test_a_batch_gives_four_updates_that_move_away_from_its_sampler(settings, tmp_path, recwarn):
    run_dir = train(tmp_path, "four", **settings, num_steps=3, rollouts_interval=1)
    lone = train(tmp_path, "one", **{**settings, "updates_per_batch": 1}, num_steps=3)
    assert (updates_made(run_dir, 3), updates_made(lone, 3)) == (12, 3)
    for record, other in zip(steps(run_dir), steps(lone), strict=True):
        assert record["lag"] == other["lag"] == 0
        # On-policy, the first update finds the ratios at 1, and the others those that it has moved.
        assert record["ratio/max"] > 1.05 and other["ratio/max"] < 1.0001
        assert record["kl/behaviour_k3"] > 1e-5 > 1e-9 > other["kl/behaviour_k3"]
        # That is no mismatch: it is measured before the first update.
        assert 0 < record["sampler_mismatch/mean"] <= record["sampler_mismatch/max"] < 1e-5
    assert not [str(warning.message) for warning in recwarn if "mismatch" in str(warning.message)]
    # Both began with the same batch; the page shows its groups, whichever parts they were in.
    first, second = (
        [r for group in rollouts(run) if group["step"] == 1 for r in group["responses"]]
        for run in (run_dir, lone)
    )
    assert len(first) == 8
    for name in ("tokens", "reward", "advantage"):
        assert [r[name] for r in first] == [r[name] for r in second]
    assert first != second  # one of them came after an update


def test_each_part_is_a_batch_of_its_own(settings, tmp_path, monkeypatch):
    """The updates of a step, by GRPO's equations in float64, one part after the other.

    Step 2 of schedule (2, 0) trains on a batch that waits in checkpoint 1.
    """
    monkeypatch.setattr(runlog, "COMPLETIONS_PER_STEP", 16)
    run_dir = train(
        tmp_path, **{**settings, "updates_per_batch": 2, "learning_rate": 1e-3},
        sync_interval=2, checkpoint_interval=1, max_tokens_per_microbatch=100,
    )  # fmt: skip
    before, after = checkpoint(run_dir, 1), checkpoint(run_dir, 2)
    (fields,) = before["rollouts"]["waiting"]
    completions = map(json.loads, (run_dir / "completions.jsonl").read_text().splitlines())
    advantages = [record["advantage"] for record in completions if record["step"] == 2]
    batch = Batch(**fields)
    batch.advantages_PG = torch.tensor(advantages, dtype=torch.float64).view(4, 4)

    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float64)
    load_weights(model, before["model"])
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    optimizer.load_state_dict(before["optimizer"])
    losses, norms = [], []
    for part in mini_batches(batch, 2, seed=1):
        assert len(part.rows) == 8
        num_tokens = sum(len(batch.responses[row]) for row in part.rows)
        loss = 0.0
        for row in part.rows:
            prompt, response = batch.prompts[row], batch.responses[row]
            logits_TV = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            new_T = logits_TV.log_softmax(-1)[range(len(response)), response]
            ratio_T = torch.exp(new_T - torch.tensor(batch.logprobs[row]))
            clipped_T = ratio_T.clamp(0.8, 1.2)
            loss -= torch.min(ratio_T * advantages[row], clipped_T * advantages[row]).sum()
        optimizer.zero_grad()
        (loss / num_tokens).backward()
        losses.append(loss.item() / num_tokens)
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
    logged = steps(run_dir)[1]
    assert logged["loss"] == pytest.approx(sum(losses) / 2, rel=1e-4, abs=1e-6)
    assert logged["grad_norm"] == pytest.approx(sum(norms) / 2, rel=1e-4)
    for index, (name, parameter) in enumerate(model.named_parameters()):
        # Where a gradient is all rounding, as that of the keys' biases, so is its direction.
        large = optimizer.state[parameter]["exp_avg_sq"].sqrt() > 1e-5
        found = after["model"][name].double()
        assert (found - parameter)[large].abs().max() < 0.02 * 1e-3 if large.any() else index, name
        assert (found - before["model"][name]).abs().max() > 1e-3 or name.endswith("k_proj.bias")


def test_a_resumed_run_is_the_uninterrupted_one(settings, tmp_path):
    more = {"eval_interval": 2, "rollouts_interval": 1}
    whole = train(tmp_path, "whole", **settings, **more, num_steps=4)
    parts = train(tmp_path, "parts", **settings, **more, num_steps=2)
    assert command(*resume(parts, "--num-steps", 4)) == 0
    assert updates_made(parts, 4) == 16
    assert_same_run(parts, whole)


@pytest.mark.parametrize("schedule", [(1, 1), (3, 2)], ids=str)
def test_an_overlapped_run_is_the_serial_one(schedule, settings, tmp_path):
    sync = {"sync_interval": schedule[0], "sync_offset": schedule[1], "num_steps": 6}
    serial = train(tmp_path, "serial", **settings, **sync)
    overlapped = train(tmp_path, "overlapped", **settings, **sync, serial=False)
    assert_same_run(overlapped, serial)
    # The version is the number of steps, however many updates they made.
    versions = {(1, 1): [0, 0, 1, 2, 3, 4], (3, 2): [0, 0, 0, 0, 0, 3]}[schedule]
    assert [record["weights_version"] for record in steps(serial)] == versions
    assert updates_made(serial, 6) == 24


def test_an_overlapped_run_that_is_resumed_is_the_serial_one(settings, tmp_path):
    sync = {"sync_interval": 1, "sync_offset": 2, "eval_interval": 3}
    serial = train(tmp_path, "serial", **settings, **sync, num_steps=6)
    parts = train(tmp_path, "parts", **settings, **sync, num_steps=3, serial=False)
    assert command(*resume(parts, "--num-steps", 6)) == 0
    assert_same_run(parts, serial)


def test_a_skipped_update_leaves_the_others(settings, tmp_path, monkeypatch):
    # A batch of rewards one of which is so large that its group's advantages are not numbers: of
    # its four updates, one is skipped.
    import grpo

    true = grpo.advantages

    def spoiled(rewards_PG, args):
        advantages_PG = true(rewards_PG, args)
        advantages_PG[1] = math.nan
        return advantages_PG

    monkeypatch.setattr(grpo, "advantages", spoiled)
    run_dir = train(tmp_path, **settings, num_steps=3)
    assert [record["update_skipped"] for record in steps(run_dir)] == [0.25] * 3
    assert updates_made(run_dir, 3) == 9
    assert all(record["loss"] is None for record in metrics(run_dir)[1:])
