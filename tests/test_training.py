"""Whole runs of a few steps: what they learn from, log and write, and how they end when something
goes wrong.
"""

import dataclasses
import hashlib
import importlib
import json
import math
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import build_model
from helpers import (
    DENSE_TASK,
    REPOSITORY,
    assert_same_run,
    checkpoint,
    command,
    copy_to_publish,
    dense_task,
    load_weights,
    metrics,
    options,
    resume,
    steps,
    train,
    wait_for,
    write_task,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import grpo
from common import checkpoints, environment, progress, runlog, watch
from common.curves import read_metrics
from common.errors import RunStopped
from common.modelcard import model_card
from common.models import TINY_MODEL
from common.tasks.gsm8k import GSM8K_SAMPLE

FAMILIES = ["qwen2", "llama", "gpt2"]

# Random models solve no word problem, so that GSM8K's own reward would teach them nothing.
SHAPED_TASK = """
from common.tasks.gsm8k import GSM8K


class Shaped(GSM8K):
    def rewards(self, problems, responses):
        digits = [sum(c.isdigit() for c in text) / max(1, len(text)) for text in responses]
        pairs = zip(super().rewards(problems, responses), digits, strict=True)
        return [{**g, "reward": g["reward"] + d, "digits": d} for g, d in pairs]
"""

STEP_KEYS = [
    "step", "reward/mean", "reward/std", "reward/zero_std_groups", "response_length/mean",
    "response_length/max", "response_length/truncated", "kl/behaviour_k3", "ratio/clip_fraction",
    "ratio/max", "entropy", "grad_norm", "loss", "lr", "lag", "weights_version", "update_skipped",
    "time/sample", "time/grade", "time/wait", "time/train", "time/sync", "time/step",
    "time/elapsed_hours", "throughput/sampled_tokens_per_second",
    "throughput/trained_tokens_per_second", "memory/peak_gib",
]  # fmt: skip
KL_KEYS = ["kl/ref_k1", "kl/ref_k2", "kl/ref_k3"]
MISMATCH_KEYS = ["sampler_mismatch/mean", "sampler_mismatch/max"]
EVAL_KEYS = ["eval/accuracy", "eval/response_length", "time/eval"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory, and the options of a model and of a task that gives a signal at every step."""
    directory = tmp_path_factory.mktemp("training")
    return directory, {
        "model": build_model("qwen2", directory / "model"),
        "task": dense_task(directory),
    }


@pytest.fixture
def settings(place):
    return place[1]


@pytest.fixture
def keep_all(monkeypatch):
    """Keep every checkpoint, so that a test can look at those before the last two."""
    monkeypatch.setattr(checkpoints, "KEEP", 99)


@pytest.fixture
def all_completions(monkeypatch):
    """Write all 16 completions of a step into completions.jsonl."""
    monkeypatch.setattr(runlog, "COMPLETIONS_PER_STEP", 16)


def weights(directory):
    return load_file(Path(directory) / "model.safetensors")


def finite(records):
    return all(math.isfinite(value) for record in records for value in record.values())


# GSM8K, end to end


@pytest.fixture(params=["gsm8k", "sample"])
def some_rows(request, tmp_path):
    """A JSONL file with 24 rows of GSM8K's test set, or of the sample in this repository."""
    source = (
        GSM8K_SAMPLE
        if request.param == "sample"
        else request.getfixturevalue("gsm8k") / "test.jsonl"
    )
    lines = source.read_text().splitlines(keepends=True)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(lines[:24]))
    return path


@pytest.mark.parametrize(
    "script, family, some_rows",
    [
        *[("grpo", family, "gsm8k") for family in FAMILIES],
        *[
            ("grpo", "qwen2", "sample"),
            ("rec_oneside_nois", "llama", "sample"),
            ("red_weight", "gpt2", "sample"),
        ],
    ],
    indirect=["some_rows"],
)
def test_two_steps_on_gsm8k(script, family, some_rows, tmp_path):
    model = build_model(family, tmp_path / "model")
    task = f"{write_task(tmp_path, SHAPED_TASK)}:Shaped"
    run_dir = train(
        tmp_path, script=script, model=model, task=task, data=some_rows, max_prompt_tokens=900,
        max_response_tokens=24, eval_interval=1,
    )  # fmt: skip
    before, *records = metrics(run_dir, timings=True)
    others = [
        "eval/reward",
        "eval/format",
        "eval/digits",
        "eval/grade/timeouts",
        "step",
        "time/elapsed_hours",
    ]
    assert sorted(before) == sorted([*EVAL_KEYS, *others]) and before["time/elapsed_hours"] == 0
    keys = [*STEP_KEYS, *KL_KEYS, *MISMATCH_KEYS, *EVAL_KEYS, "accuracy", "format", "digits"]
    for record in records:
        assert set(keys) <= set(record)
    assert [record["step"] for record in records] == [1, 2]
    assert finite([before, *records])

    # Trainer and sampler agree on what was sampled; nothing has moved yet.
    first = records[0]
    assert [first[key] for key in KL_KEYS] == [0.0, 0.0, 0.0]
    # Two ways through the same float32 network: with and without a cache.
    assert first["ratio/max"] == pytest.approx(1, abs=1e-4)
    assert first["sampler_mismatch/max"] < 1e-4
    assert first["ratio/clip_fraction"] == 0
    assert first["accuracy"] == 0 and first["reward/mean"] == pytest.approx(first["digits"])
    # Then the policy moves away from where it started.
    assert records[0]["grad_norm"] > 0 and records[1]["kl/ref_k2"] > 1e-6

    after, initial = weights(run_dir / "model"), weights(model)
    assert after.keys() == initial.keys()
    assert all(tensor.isfinite().all() for tensor in after.values())
    # Keys of the attention have biases without a gradient: the softmax ignores them.
    assert all(
        not torch.equal(after[key], initial[key])
        for key in initial
        if not key.endswith("k_proj.bias")
    )


def test_kl_to_the_reference_can_be_switched_off(settings, tmp_path):
    with_kl = train(tmp_path, "with", **settings)
    without = train(tmp_path, "without", **settings, reference_kl=False)
    for record, other in zip(metrics(with_kl)[1:], metrics(without)[1:], strict=True):
        assert set(record) - set(other) == set(KL_KEYS)
        assert {key: value for key, value in record.items() if key not in KL_KEYS} == other


def test_files_of_a_run(settings, curves, tmp_path):
    import matplotlib.image

    run_dir = train(tmp_path, **settings, checkpoint_interval=1, seed=3)
    args = json.loads((run_dir / "args.json").read_text())
    assert args["script"] == "grpo" and args["seed"] == 3 and args["learning_rate"] == 2e-4
    assert set(args) == {
        "script",
        *(f.name for f in dataclasses.fields(importlib.import_module("grpo").Args)),
    }
    environment = (run_dir / "environment.txt").read_text()
    for line in (
        f"torch: {torch.__version__}",
        "threads: 1",
        f"python: {sys.version.split()[0]}",
        "commit: ",
        "cpu: ",
    ):
        assert line in environment
    assert (run_dir / "curves.png").read_bytes().startswith(b"\x89PNG\r\n")
    picture = matplotlib.image.imread(run_dir / "curves.png")[..., :3]
    assert min(picture.shape[:2]) > 400
    height, width = picture.shape[0] // 2, picture.shape[1] // 3
    for panel in range(6):  # none of the six is blank
        top, left = panel // 3 * height, panel % 3 * width
        assert picture[top : top + height, left : left + width].std() > 0.05
    names = {path.name for path in run_dir.iterdir()}
    assert names == {
        "args.json", "environment.txt", "metrics.jsonl", "completions.jsonl", "curves.png",
        "checkpoints", "model", "lock", "complete", "rollouts.jsonl", "rollouts.html", "script",
        "task",
    }  # fmt: skip
    assert (run_dir / "script" / "grpo.py").read_bytes() == Path(grpo.__file__).read_bytes()
    task = (run_dir / "task" / "dense.py").read_bytes()
    assert task.decode() == DENSE_TASK
    assert f"\nsha256 of task/dense.py: {hashlib.sha256(task).hexdigest()}\n" in environment


def test_a_trained_model_has_a_card_and_may_be_read_by_others(settings, tmp_path):
    before = os.umask(0o022)
    try:
        run_dir = train(tmp_path, **settings, seed=7, lora_rank=2)
    finally:
        os.umask(before)
    modes = {
        path.stat().st_mode & 0o777
        for name in ("model", "adapter")
        for path in (run_dir / name).iterdir()
    }
    assert modes == {0o644}
    card = (run_dir / "model" / "README.md").read_text()
    args = json.loads((run_dir / "args.json").read_text())
    numbers = [{"step": 0, "eval/reward": 0.25}, {"step": 1}, {"step": 2, "eval/reward": 0.5}]
    assert "\n| reward | 0.25 | 0.5 |\n" in model_card(run_dir, "grpo", args, "", numbers)
    assert "for 2 steps on the task `dense.py:Digits`" in card and str(settings["model"]) in card
    (line,) = [line for line in card.splitlines() if line.startswith("python grpo.py ")]
    assert " --seed 7 " in line and " --lora-rank 2 " in line and " --task " in line
    assert "temperature" not in card
    shutil.rmtree(run_dir / "model")
    assert command(*resume(run_dir)) == 0 and (run_dir / "model" / "README.md").read_text() == card


def test_the_command_in_environment_txt_repeats_the_run(settings, tmp_path):
    run_dir = train(tmp_path / "a place", **settings, reference_kl=False)
    last = (run_dir / "environment.txt").read_text().splitlines()[-2]
    python, script, *argv = shlex.split(last.removeprefix("to repeat it: "))
    assert (python, script) == ("python", "grpo.py")
    assert command(*argv, "--output", tmp_path, "--name", "again") == 0
    assert_same_run(tmp_path / "again", run_dir)
    assert (tmp_path / "again" / "environment.txt").read_text().splitlines()[-2] == last


def test_the_commit_is_dirty_where_python_files_are_changed_or_new(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "common" / "environment.py"))
    (tmp_path / "common").mkdir()
    (tmp_path / "grpo.py").write_text("1\n")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], cwd=tmp_path, check=True)
    clean = environment.commit()
    assert re.fullmatch("[0-9a-f]{40}", clean)
    (tmp_path / "notes.txt").write_text("no code\n")
    assert environment.commit() == clean
    (tmp_path / "mine.py").write_text("a task\n")
    assert environment.commit() == f"{clean}-dirty"
    (tmp_path / "grpo.py").write_text("2\n")
    assert environment.commit() == f"{clean}-dirty"


@pytest.mark.parametrize("prompts, group_size, num_written", [(4, 4, 4), (1, 2, 2)])
def test_a_few_completions_of_each_step_are_written(
    prompts, group_size, num_written, settings, tmp_path
):
    run_dir = train(tmp_path, **settings, prompts_per_step=prompts, group_size=group_size)
    completions = [
        json.loads(line) for line in (run_dir / "completions.jsonl").read_text().splitlines()
    ]
    assert [c["step"] for c in completions] == [1] * num_written + [2] * num_written
    for step in (1, 2):  # spread over the batch: one of every group
        assert len({c["prompt"] for c in completions if c["step"] == step}) == prompts
    for completion in completions:
        share = sum(c.isdigit() for c in completion["response"]) / max(
            1, len(completion["response"])
        )
        assert completion["reward"] == share
        assert completion["prompt"].startswith("Q: ") and math.isfinite(completion["advantage"])
        assert completion["answer"] is None and (
            not completion["truncated"] or completion["tokens"] == 16
        )


# The final model


@pytest.mark.parametrize("family", FAMILIES)
def test_final_model_is_the_trained_policy(family, settings, tmp_path):
    model = build_model(family, tmp_path / "model")
    run_dir = train(tmp_path, **{**settings, "model": model})
    saved = AutoModelForCausalLM.from_pretrained(run_dir / "model")
    policy = AutoModelForCausalLM.from_pretrained(model)
    tokens = torch.arange(60).view(3, 20)
    with torch.no_grad():
        initial = policy(tokens).logits
        load_weights(policy, checkpoint(run_dir, 2)["model"])
        trained = policy(tokens).logits
        assert torch.equal(saved(tokens).logits, trained)
        assert not torch.allclose(trained, initial, atol=1e-3)
    assert saved.config.tie_word_embeddings == policy.config.tie_word_embeddings


def test_final_model_can_be_trained_further(settings, tmp_path):
    first = train(tmp_path, "first", **settings)
    second = train(tmp_path, "second", **{**settings, "model": str(first / "model")})
    assert steps(second)[0]["kl/ref_k2"] == 0  # its reference is what it started from
    assert metrics(second)[0]["eval/reward"] == metrics(first)[-1]["eval/reward"]


# One step, recomputed from the design's equations


def masked(ratio, advantage):
    """M: 0 where clipping takes the gradient away."""
    return (advantage >= 0 and ratio <= 1.2) or (advantage <= 0 and ratio >= 0.8)


def grpo_loss(advantage, log_prob, old):
    ratio = torch.exp(log_prob - old)
    return -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)


def rec_oneside_nois_loss(advantage, log_prob, old):
    return -advantage * masked(math.exp(log_prob.item() - old), advantage) * log_prob


def red_weight_loss(advantage, log_prob, old):
    return -math.exp(advantage) * advantage * log_prob


@pytest.mark.parametrize("script", ["grpo", "rec_oneside_nois", "red_weight"])
def test_a_step_is_what_the_equations_say(script, settings, keep_all, all_completions, tmp_path):
    # Step 4 of schedule (5, 0) trains on a batch that waits, with what the sampler reported, in
    # checkpoint 3.
    run_dir = train(
        tmp_path, script=script, **settings, num_steps=4, sync_interval=5, checkpoint_interval=1,
        learning_rate=5e-3,
    )  # fmt: skip
    logged = steps(run_dir)[3]
    before, after = checkpoint(run_dir, 3), checkpoint(run_dir, 4)
    (batch,) = [batch for batch in before["rollouts"]["waiting"] if batch["number"] == 4]
    completions = [
        json.loads(line) for line in (run_dir / "completions.jsonl").read_text().splitlines()
    ][3 * 16 :]

    rewards = [
        [completion["reward"] for completion in completions[4 * i : 4 * i + 4]] for i in range(4)
    ]
    advantages = []
    for group in rewards:
        mean = sum(group) / 4
        std = math.sqrt(sum((reward - mean) ** 2 for reward in group) / 4)
        advantages += [
            (reward - mean) / (std + 1e-6 if script == "grpo" else 1) for reward in group
        ]
    assert [completion["advantage"] for completion in completions] == pytest.approx(
        advantages, rel=1e-9, abs=1e-12
    )

    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float64)
    reference = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float64)
    load_weights(model, before["model"])
    num_tokens = sum(map(len, batch["responses"]))
    loss, sums, ratios, clipped = (
        0.0,
        dict.fromkeys(["entropy", "k1", "k2", "k3", "behaviour"], 0.0),
        [],
        0,
    )
    for row, (prompt, response) in enumerate(
        zip(batch["prompts"], batch["responses"], strict=True)
    ):
        tokens = torch.tensor([prompt + response])
        log_probs_TV = model(tokens).logits[0].log_softmax(-1)
        with torch.no_grad():
            reference_TV = reference(tokens).logits[0].log_softmax(-1)
        for t, token in enumerate(response):
            position = len(prompt) - 1 + t
            log_prob, old = log_probs_TV[position, token], batch["logprobs"][row][t]
            token_loss = globals()[f"{script}_loss"](advantages[row], log_prob, old)
            loss = loss + token_loss / num_tokens
            lp, ratio = log_prob.item(), math.exp(log_prob.item() - old)
            difference = lp - reference_TV[position, token].item()
            distribution = log_probs_TV[position].detach()
            sums["entropy"] -= (distribution.exp() * distribution).sum().item()
            sums["k1"] += difference
            sums["k2"] += difference**2 / 2
            sums["k3"] += math.exp(-difference) + difference - 1
            sums["behaviour"] += ratio - math.log(ratio) - 1
            ratios.append(ratio)
            clipped += script != "red_weight" and not masked(ratio, advantages[row])
    means = {key: total / num_tokens for key, total in sums.items()}
    # far enough off-policy to tell
    assert logged["lag"] == 3 and means["k2"] > 1e-3 and max(ratios) > 1.2
    assert logged["entropy"] == pytest.approx(means["entropy"], rel=1e-5)
    for estimator in ("k1", "k2", "k3"):
        assert logged[f"kl/ref_{estimator}"] == pytest.approx(means[estimator], rel=1e-4, abs=1e-6)
    assert logged["kl/behaviour_k3"] == pytest.approx(means["behaviour"], rel=1e-4)
    assert logged["ratio/max"] == pytest.approx(max(ratios), rel=1e-4)
    assert logged["ratio/clip_fraction"] == pytest.approx(clipped / num_tokens, abs=1e-12)
    assert clipped > 0 or script == "red_weight"
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)

    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients.values()))
    assert logged["grad_norm"] == pytest.approx(norm, rel=1e-4)

    # AdamW without weight decay, its gradient clipped to norm 1, from the moments that checkpoint 3
    # holds.
    for index, (name, gradient) in enumerate(gradients.items()):
        moments = before["optimizer"]["state"][index]
        gradient = gradient * min(1, 1 / norm)
        mean = 0.9 * moments["exp_avg"].double() + 0.1 * gradient
        square = 0.999 * moments["exp_avg_sq"].double() + 0.001 * gradient**2
        step = 5e-3 * (mean / (1 - 0.9**4)) / ((square / (1 - 0.999**4)).sqrt() + 1e-8)
        # Where a gradient is all rounding, as that of the keys' biases, so is its direction.
        noise = (square / (1 - 0.999**4)).sqrt() < 1e-6
        moved = after["model"][name].double() - before["model"][name].double()
        assert (moved + step)[~noise].abs().max() < 0.01 * 5e-3 if (~noise).any() else True, name


# The same result however it is computed


def test_micro_batches_change_nothing_but_rounding(settings, tmp_path):
    # Both steps train on batches of version 0, so that they are the same batches in all runs.
    settings = {**settings, "sync_interval": 2, "learning_rate": 3e-4}
    runs = {
        budget: steps(train(tmp_path, str(budget), **settings, max_tokens_per_microbatch=budget))
        for budget in (1, 256, 100_000)
    }
    for budget in (1, 256):
        one, other = runs[budget][0], runs[100_000][0]
        # Sums of some hundred float32 terms in another order: 1e-6 of the largest; the terms of the
        # loss cancel.
        for key in ("grad_norm", "entropy", "response_length/mean", "reward/mean"):
            assert one[key] == pytest.approx(other[key], rel=1e-5), (budget, key)
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5, abs=1e-6)
        assert [one[key] for key in KL_KEYS] == [other[key] for key in KL_KEYS] == [0, 0, 0]
        # An update of Adam divides each gradient by its own size, which makes much of rounding in
        # small ones.
        one, other = runs[budget][1], runs[100_000][1]
        for key in ("loss", "grad_norm", "entropy", *KL_KEYS, "kl/behaviour_k3", "ratio/max"):
            assert one[key] == pytest.approx(other[key], rel=1e-3, abs=1e-5), (budget, key)
        assert other["kl/ref_k2"] > 1e-3


def test_gradient_of_a_step_is_the_same_however_it_is_split(settings, tmp_path):
    gradients = {}
    for budget in (1, 100, 256, 100_000):
        run_dir = train(
            tmp_path,
            str(budget),
            **settings,
            num_steps=1,
            max_tokens_per_microbatch=budget,
            max_grad_norm=math.inf,
        )
        # after one update, the mean is 0.1 of the gradient
        moments = checkpoint(run_dir, 1)["optimizer"]["state"]
        gradients[budget] = torch.cat(
            [moments[index]["exp_avg"].double().flatten() for index in sorted(moments)]
        )
    whole = gradients.pop(100_000)
    assert whole.norm() > 1e-3
    for budget, gradient in gradients.items():
        assert (gradient - whole).norm() < 1e-6 * whole.norm(), budget


def test_gradient_checkpointing_changes_nothing_but_rounding(settings, tmp_path):
    plain = steps(train(tmp_path, "plain", **settings))
    checkpointed = steps(train(tmp_path, "checkpointed", **settings, gradient_checkpointing=True))
    assert finite(checkpointed)
    for key in ("loss", "grad_norm", "entropy", "reward/mean"):
        assert checkpointed[0][key] == pytest.approx(plain[0][key], rel=1e-5, abs=1e-6)


def test_bfloat16_run_is_finite_and_keeps_float32_weights(settings, tmp_path):
    run_dir = train(tmp_path, **settings, precision="bfloat16")
    assert finite(steps(run_dir))
    # It did compute in bfloat16: log-probs with a cache and without differ by its rounding, 2^-8 of
    # a few nats.
    assert 1e-4 < steps(run_dir)[0]["sampler_mismatch/max"] < 0.5
    trained = weights(run_dir / "model")
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    moved = (trained[key] - tensor for key, tensor in weights(settings["model"]).items())
    assert max(difference.abs().max() for difference in moved) > 1e-4


def test_two_runs_of_one_seed_are_the_same_and_of_two_seeds_are_not(settings, tmp_path):
    runs = [train(tmp_path, f"run{i}", **settings, seed=seed) for i, seed in enumerate((5, 5, 6))]
    assert_same_run(runs[0], runs[1])
    assert metrics(runs[0])[1] != metrics(runs[2])[1]


# The schedule

SCHEDULES = {  # the versions and lags of batches 1 to 8, written out from the definition
    (1, 0): ([0, 1, 2, 3, 4, 5, 6, 7], [0] * 8),
    (2, 0): ([0, 0, 2, 2, 4, 4, 6, 6], [0, 1] * 4),
    (5, 0): ([0, 0, 0, 0, 0, 5, 5, 5], [0, 1, 2, 3, 4, 0, 1, 2]),
    (1, 1): ([0, 0, 1, 2, 3, 4, 5, 6], [0, 1, 1, 1, 1, 1, 1, 1]),
    (3, 2): ([0, 0, 0, 0, 0, 3, 3, 3], [0, 1, 2, 3, 4, 2, 3, 4]),
}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_batches_are_sampled_by_the_version_that_the_schedule_names(
    schedule, settings, keep_all, tmp_path
):
    interval, offset = schedule
    versions, lags = SCHEDULES[schedule]
    run_dir = train(
        tmp_path, **settings, num_steps=8, sync_interval=interval, sync_offset=offset,
        checkpoint_interval=1,
    )  # fmt: skip
    records = steps(run_dir)
    assert [record["weights_version"] for record in records] == versions
    assert [record["lag"] for record in records] == lags

    # It is measured once for every version, on its first batch, and wherever the trainer holds the
    # same weights anyway.
    fresh = [record["step"] for record in records if set(MISMATCH_KEYS) <= set(record)]
    assert fresh == [step for step in range(1, 9) if versions[step - 1] not in versions[: step - 1]]
    assert all(records[step - 1]["sampler_mismatch/max"] < 1e-4 for step in fresh)
    # A batch sampled some updates ago is off-policy, a fresh one is not.
    assert all((record["kl/behaviour_k3"] > 1e-6) == (record["lag"] > 0) for record in records)

    # Batches that wait in a checkpoint: the weights of their version sampled them, and no others.
    model = AutoModelForCausalLM.from_pretrained(settings["model"])
    initial = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    states = {0: initial, **{step: checkpoint(run_dir, step)["model"] for step in range(1, 9)}}
    for step in range(1, 9):
        waiting = checkpoint(run_dir, step)["rollouts"]["waiting"]
        # As many as the definition says: sampled, because their version exists, and not yet trained
        # on.
        newest = step - 1 - (step - 1) % interval
        assert sorted(batch["number"] for batch in waiting) == list(
            range(step + 1, newest + offset + interval + 1)
        )
        for batch in waiting:
            assert log_prob_error(model, states[batch["version"]], batch) < 1e-4
            assert log_prob_error(model, states[step], batch) > 1e-3 or batch["version"] == step


@pytest.mark.parametrize("script", ["grpo", "rec_oneside_nois", "red_weight"])
def test_sampler_and_trainer_have_the_same_temperature(script, settings, tmp_path):
    run_dir = train(
        tmp_path, script=script, **settings, num_steps=3, sync_interval=2, temperature=0.7,
        checkpoint_interval=1,
    )  # fmt: skip
    first, _, third = steps(run_dir)
    assert first["sampler_mismatch/max"] < 1e-5 and third["sampler_mismatch/max"] < 1e-5
    # Batch 4, which waits in checkpoint 3, was sampled by version 2, at that temperature and no
    # other.
    model, version_2 = (
        AutoModelForCausalLM.from_pretrained(settings["model"]),
        checkpoint(run_dir, 2)["model"],
    )
    (batch,) = checkpoint(run_dir, 3)["rollouts"]["waiting"]
    assert (batch["number"], batch["version"]) == (4, 2)
    assert log_prob_error(model, version_2, batch, temperature=0.7) < 1e-5
    assert log_prob_error(model, version_2, batch) > 0.1


@torch.no_grad()
def log_prob_error(model, state, batch, temperature=1.0):
    """Largest difference between what the sampler reported and a plain forward pass."""
    load_weights(model, state)
    errors = []
    for row in range(0, len(batch["responses"]), 4):  # one of each group
        prompt, response, reported = (
            batch[key][row] for key in ("prompts", "responses", "logprobs")
        )
        log_probs = (
            model(torch.tensor([prompt + response])).logits[0].div(temperature).log_softmax(-1)
        )
        mine = [log_probs[len(prompt) - 1 + t, token].item() for t, token in enumerate(response)]
        errors += [abs(a - b) for a, b in zip(mine, reported, strict=True)]
    return max(errors)


def test_warm_up_is_linear_then_constant(settings, tmp_path):
    run_dir = train(tmp_path, **settings, num_steps=5, warmup_steps=3, learning_rate=3e-4)
    assert [record["lr"] for record in steps(run_dir)] == pytest.approx(
        [1e-4, 2e-4, 3e-4, 3e-4, 3e-4]
    )


@pytest.mark.parametrize(
    "warmup, expected", [(0, [5.0, 4.0, 3.0, 2.0, 1.0]), (3, [5 / 3, 8 / 3, 3.0, 2.0, 1.0])]
)
def test_a_linear_learning_rate_falls_to_0_over_the_run(warmup, expected, settings, tmp_path):
    run_dir = train(
        tmp_path, **settings, num_steps=5, lr_schedule="linear", warmup_steps=warmup,
        learning_rate=5e-4, checkpoint_interval=1,
    )  # fmt: skip
    rates = [rate * 1e-4 for rate in expected]
    assert [record["lr"] for record in steps(run_dir)] == pytest.approx(rates, rel=1e-12)
    # It is what AdamW updates with: a step's largest entry is about the learning rate.
    for step in (4, 5):
        groups = checkpoint(run_dir, step)["optimizer"]["param_groups"]
        assert [group["lr"] for group in groups] == pytest.approx([rates[step - 1]], rel=1e-12)
    before, after = (checkpoint(run_dir, step)["model"] for step in (4, 5))
    largest = max((after[key] - before[key]).abs().max().item() for key in before)
    assert 0.3 * rates[-1] < largest < 3 * rates[-1]


def test_evaluations_come_before_training_at_the_interval_and_at_the_end(settings, tmp_path):
    run_dir = train(tmp_path, **{**settings, "num_steps": 5, "eval_interval": 2})
    assert [record["step"] for record in metrics(run_dir) if "eval/reward" in record] == [
        0,
        2,
        4,
        5,
    ]


# Rewards


def test_constant_reward_leaves_the_weights_and_the_run_goes_on(settings, tmp_path):
    text = DENSE_TASK.replace("return sum(", "return 0.7 if True else sum(")
    task = f"{write_task(tmp_path, text)}:Digits"
    run_dir = train(tmp_path, **{**settings, "task": task, "num_steps": 3})
    for record in steps(run_dir):
        assert record["grad_norm"] == 0 and record["loss"] == 0
        assert record["reward/zero_std_groups"] == 1 and record["reward/std"] == 0
        assert record["reward/mean"] == pytest.approx(0.7)
    assert len(steps(run_dir)) == 3
    initial = weights(settings["model"])
    assert all(
        torch.equal(tensor, initial[key]) for key, tensor in weights(run_dir / "model").items()
    )


def counting_task(directory, condition, what):
    """The dense task, whose reward function counts its `calls` and does `what` under a condition on
    their number.
    """
    text = DENSE_TASK.replace("class Digits(Task):", "class Digits(Task):\n    calls = 0")
    lines = [
        "        Digits.calls += 1",
        "        calls = Digits.calls",
        f"        if {condition}: {what}",
    ]
    text = text.replace("        return sum(", "\n".join([*lines, "        return sum("]))
    return f"{write_task(directory, text)}:Digits"


def test_step_without_a_signal_has_no_gradient_but_moves_by_momentum(settings, tmp_path):
    task = counting_task(tmp_path, "calls > 4 + 16", "return 0.7")
    run_dir = train(tmp_path, **{**settings, "task": task, "checkpoint_interval": 1})
    first, second = steps(run_dir)
    assert (
        first["grad_norm"] > 0
        and second["grad_norm"] == 0
        and second["reward/zero_std_groups"] == 1
    )
    # AdamW with the gradient 0, from the moments that checkpoint 1 holds.
    before, after = checkpoint(run_dir, 1), checkpoint(run_dir, 2)
    names = [
        name
        for name, _ in AutoModelForCausalLM.from_pretrained(settings["model"]).named_parameters()
    ]
    for index, name in enumerate(names):
        moments = before["optimizer"]["state"][index]
        mean, square = 0.9 * moments["exp_avg"].double(), 0.999 * moments["exp_avg_sq"].double()
        step = 2e-4 * (mean / (1 - 0.9**2)) / ((square / (1 - 0.999**2)).sqrt() + 1e-8)
        moved = after["model"][name].double() - before["model"][name].double()
        assert (moved + step).abs().max() < 1e-3 * 2e-4, name
        assert step.abs().max() > 1e-5 or name.endswith("k_proj.bias"), name


@pytest.fixture(scope="module")
def good_run(place):
    """Four steps with all their completions, and the settings that gave them."""
    directory, settings = place
    settings = {**settings, "num_steps": 4, "checkpoint_interval": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runlog, "COMPLETIONS_PER_STEP", 16)
        return train(directory, "good", **settings), settings


@pytest.mark.parametrize(
    "what, said",
    [
        ("raise ValueError('reward lost', response)", "reward lost"),
        ("return float('nan')", "nan"),
        ("return None", "None"),
        ("return 'good'", "good"),
        ("return {'accuracy': 1.0}", "accuracy"),
        ("return 10 ** 400", "10000000"),
    ],
)
def test_bad_reward_stops_the_run_and_names_the_completion(
    what, said, good_run, all_completions, tmp_path, capsys
):
    good, settings = good_run
    completions = [
        json.loads(line) for line in (good / "completions.jsonl").read_text().splitlines()
    ]
    # The 6th response of step 3: before it there were the first evaluation and two steps.
    task, bad_completion = (
        counting_task(tmp_path, "calls == 4 + 16 + 16 + 6", what),
        completions[16 + 16 + 5],
    )
    assert command(*options(tmp_path, "bad", **{**settings, "task": task})) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("grpo.py: error: ") and said in error
    assert repr(bad_completion["response"]) in error and repr(bad_completion["prompt"]) in error

    # What there was is intact: with the task corrected, the run ends as if nothing had happened.
    assert [record["step"] for record in metrics(tmp_path / "bad")] == [0, 1, 2]
    assert [path.name for path in (tmp_path / "bad" / "checkpoints").iterdir()] == [
        "step_000002.pt"
    ]
    if what.startswith("raise"):
        shutil.copy(write_task(tmp_path, DENSE_TASK), tmp_path / "bad" / "task")
        assert command("--resume", tmp_path / "bad") == 0
        assert_same_run(tmp_path / "bad", good)


def test_diverged_run_skips_updates_and_stops(settings, keep_all, tmp_path, capsys):
    # A learning rate that ruins the weights at once. All batches were sampled before, so that
    # sampling goes on.
    argv = options(
        tmp_path,
        **settings,
        num_steps=8,
        sync_interval=8,
        learning_rate=1e10,
        checkpoint_interval=1,
    )
    assert command(*argv) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert (
        error.startswith("grpo.py: error: 5 updates in a row")
        and "step 6" in error
        and "learning-rate" in error
    )
    records = steps(tmp_path / "run")
    assert [record["update_skipped"] for record in records] == [0, 1, 1, 1, 1, 1]
    assert (
        records[0]["loss"] is not None and [record["loss"] for record in records[1:]] == [None] * 5
    )
    after_1, after_5 = checkpoint(tmp_path / "run", 1), checkpoint(tmp_path / "run", 5)
    assert all(
        torch.equal(after_1["model"][key], after_5["model"][key]) for key in after_1["model"]
    )


def test_rewards_in_the_thousands_are_named_as_a_cause(settings, tmp_path):
    # exp(A/τ) overflows, whatever the learning rate.
    path = write_task(tmp_path, DENSE_TASK.replace("return sum(", "return 5000 * sum("))
    with pytest.raises(RunStopped, match="scale rewards that are far from 1"):
        train(tmp_path, script="red_weight", **{**settings, "task": f"{path}:Digits"}, num_steps=6)


def test_a_run_whose_last_update_ruined_the_weights_saves_no_model(settings, tmp_path, capsys):
    assert command(*options(tmp_path, **settings, num_steps=1, learning_rate=1e10)) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("grpo.py: error: The policy's weights or log-probs are no longer finite")
    assert metrics(tmp_path / "run")[-1]["step"] == 1 and not (tmp_path / "run" / "model").exists()


def test_diverged_policy_that_must_sample_stops_the_run(settings, tmp_path, capsys):
    # On-policy, the next batch has to come from the ruined weights, before any update can be
    # skipped.
    assert (
        command(*options(tmp_path, **settings, num_steps=5, learning_rate=1e10, eval_interval=1))
        == 1
    )
    error = capsys.readouterr().err
    assert "Traceback" not in error
    line = error.splitlines()[-1]
    assert line.startswith("grpo.py: error: ") and "no longer finite" in line
    assert "metrics.jsonl" in line and "--learning-rate" in line
    # what it says to look at is there
    assert [record["step"] for record in metrics(tmp_path / "run")] == [0, 1]


@pytest.mark.parametrize("learns", [False, True])
def test_a_run_without_signal_says_so_once(learns, tmp_path, capsys):
    text = DENSE_TASK if learns else DENSE_TASK.replace("return sum", "return 0.0 and sum")
    task = f"{write_task(tmp_path, text)}:Digits"
    train(tmp_path, task=task, num_steps=watch.STEPS_WITHOUT_SIGNAL + 2)
    said = capsys.readouterr()
    assert said.err.count("all rewards of each group were equal") == (0 if learns else 1)
    # once more, at its end
    assert said.out.count("Nothing was learned: at every step, ") == (0 if learns else 1)


def test_a_policy_that_has_collapsed_is_said_to_have(tmp_path, capsys):
    look = watch.Watch(tmp_path).look
    rewards = [0.25, 0.5, 0.125] + [0.0] * watch.STEPS_WITHOUT_SIGNAL
    for step, reward in enumerate(rewards, start=1):
        look(step, {"reward/mean": reward, "reward/zero_std_groups": float(reward == 0)})
    said = capsys.readouterr().err
    assert "the mean is 0 where it was 0.5 after step 2" in said and "--learning-rate" in said
    # What is solved has no signal either, and did not collapse.
    look = watch.Watch(tmp_path).look
    for step in range(1, watch.STEPS_WITHOUT_SIGNAL + 1):
        look(step, {"reward/mean": 1.0, "reward/zero_std_groups": 1.0})
    assert watch.NO_SIGNAL in capsys.readouterr().err


def test_a_run_ends_with_all_that_its_evaluations_measured(tmp_path, capsys):
    text = DENSE_TASK.replace("return sum", "return self.grade(response) | {'reward': sum")
    text = text.replace("len(response))", "len(response))}")
    text += """
    def grade(self, response):
        return {"accuracy": 0.0, "constant": 2.0, "blanks": float(response.count(" "))}
"""
    task = f"{write_task(tmp_path, text)}:Digits"
    run_dir = train(tmp_path, task=task, learning_rate=1e-2)
    first, *_, last = metrics(run_dir)
    shown = ["reward", "accuracy", "response_length", "blanks", "constant"]
    expected = [[f"{record[f'eval/{key}']:.3f}" for record in (first, last)] for key in shown]
    title, *lines = capsys.readouterr().out.splitlines()[-7:-1]
    assert title.startswith("Held-out problems") and title.endswith("step 0      step 2")
    assert [line.split() for line in lines] == [
        [key, *values] for key, values in zip(shown, expected, strict=True)
    ]
    assert expected[0][0] != expected[0][1]


@pytest.mark.parametrize(("length", "times"), [(1, 1), (64, 0)])
def test_a_run_whose_responses_never_end_says_so_once(length, times, tmp_path, capsys):
    settings = {"task": dense_task(tmp_path), "num_steps": watch.STEPS_WITHOUT_END + 2}
    train(tmp_path, **settings, max_response_tokens=length)
    assert capsys.readouterr().err.count("every response was cut at the limit") == times


def test_what_takes_long_within_a_step_shows_a_bar(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "SHOW_AFTER", 0)
    train(tmp_path, num_steps=1)
    shown = capsys.readouterr().err
    for what in ("layers, reading prompts", "tokens sampled, at most", "micro-batches"):
        assert f"{what}: " in shown


def test_skipped_updates_that_are_not_in_a_row_are_survived(
    settings, keep_all, monkeypatch, tmp_path
):
    monkeypatch.setattr(watch, "MOST_SKIPPED_UPDATES", 2)
    # Rewards so large that their sum overflows in steps 2 and 4: the advantages, and so the loss,
    # are not numbers.
    task = counting_task(tmp_path, "(calls - 5) // 16 in (1, 3) and calls % 4", "return 1.7e308")
    run_dir = train(
        tmp_path, **{**settings, "task": task, "num_steps": 5, "checkpoint_interval": 1}
    )
    assert [record["update_skipped"] for record in steps(run_dir)] == [0, 1, 0, 1, 0]
    states = [checkpoint(run_dir, step) for step in (1, 2, 3)]
    key = "model.layers.0.mlp.up_proj.weight"
    assert all(
        torch.equal(states[0]["model"][key], states[1]["model"][key]) for key in states[0]["model"]
    )
    moments = [state["optimizer"]["state"][0]["exp_avg"] for state in states]
    # nothing of the bad gradient stays in the optimizer either
    assert torch.equal(moments[0], moments[1])
    assert not torch.equal(states[1]["model"][key], states[2]["model"][key])
    assert all(tensor.isfinite().all() for tensor in weights(run_dir / "model").values())


# wandb


def read_wandb(path):
    """The history of an offline run, a list of dicts, from its log: LevelDB's format, which wandb
    has no reader for.

    After a header of 7 bytes, blocks of 32 KiB hold pieces of records: checksum (4), length (2),
    type (1), data.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    content = path.read_bytes()
    position, data, rows = 7, b"", []
    while position < len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left  # a header does not fit into the rest of a block
            continue
        length, kind = struct.unpack("<HB", content[position + 4 : position + 7])
        data += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            record = Record.FromString(data)
            data = b""
            if record.WhichOneof("record_type") == "history":
                items = {
                    item.key or item.nested_key[0]: json.loads(item.value_json)
                    for item in record.history.item
                }
                rows.append({key: value for key, value in items.items() if not key.startswith("_")})
    return rows


def test_wandb_gets_what_the_log_gets(settings, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_dir = train(tmp_path, **settings, num_steps=3, eval_interval=2, track=True)
    (segment,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    # wandb's service writes on after `finish` returns
    wait_for(lambda: len(read_wandb(segment)) == 4, seconds=30)
    assert read_wandb(segment) == read_metrics(run_dir)
    assert [row["step"] for row in read_wandb(segment)] == [0, 1, 2, 3]

    # A resumed run is a new segment of the same wandb run.
    assert command("--resume", run_dir, "--num-steps", 4) == 0
    first, second = sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"))
    assert first == segment and second.name == segment.name
    wait_for(lambda: len(read_wandb(second)) == 1, seconds=30)
    assert read_wandb(second) == read_metrics(run_dir)[4:]


# The script as a command


def test_what_the_readme_says_to_copy_runs_as_it_is_and_imports_no_wandb(tmp_path):
    directory = tmp_path / "copied"
    copy_to_publish(directory, REPOSITORY / "grpo.py")
    dense_task(directory)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    # -X importtime prints a line for every module imported.
    argv = [sys.executable, "-X", "importtime", "grpo.py", *options("out", num_steps=1)]
    argv += ["--task", "dense.py:Digits"]
    ended = subprocess.run(
        argv, cwd=directory, env=environment, capture_output=True, text=True, timeout=200
    )
    assert ended.returncode == 0, ended.stderr
    assert [record["step"] for record in metrics(directory / "out" / "run")] == [0, 1]
    assert "Held-out problems" in ended.stdout
    saved = json.loads((directory / "out" / "run" / "args.json").read_text())
    # a name, not a path: the run can be resumed from another place
    assert saved["model"] == TINY_MODEL
    assert "commit: unknown" in (directory / "out" / "run" / "environment.txt").read_text()
    copied = {"grpo.py", "dense.py", "common", "requirements.txt", "LICENSE"}
    assert {path.name for path in directory.iterdir()} - {"__pycache__"} == {*copied, "out"}
    original = train(tmp_path, task=dense_task(tmp_path), num_steps=1)
    assert_same_run(directory / "out" / "run", original)

    imported = {
        line.rpartition("|")[2].strip()
        for line in ended.stderr.splitlines()
        if line.startswith("import time:")
    }
    assert "torch" in imported and "transformers" in imported and "grpo" not in imported
    assert not [name for name in imported if name.split(".")[0] == "wandb"]
