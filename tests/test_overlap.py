"""Sampling in a process of its own: the same run as in turns, bit for bit, whatever dies on the way.

Runs are real: `python grpo.py` in a process group of its own, signals to real processes, and a look into /proc for
what is left. A failing test prints the seed of its random moments.
"""

import functools
import json
import os
import random
import re
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import build_model
from helpers import (
    Run,
    assert_same_run,
    command,
    dense_task,
    kill,
    metrics,
    num_logged,
    options,
    resume,
    train,
    wait_for,
    write_task,
)

from common.errors import BadInput, RunStopped
from common.rollouts import RolloutPlan
from common.sampler_process import OverlappedRollouts
from common.samplers import Sampler, Samples
from common.schedule import version_of_batch
from common.shared_weights import ALIGNMENT, SharedWeights, point_parameters
from common.weight_sync import Manifest, checksum

NUM_STEPS = 7


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory, and the settings that every run of this file starts from."""
    directory = tmp_path_factory.mktemp("overlap")
    settings = {
        "model": build_model("qwen2", directory / "model"), "task": dense_task(directory), "num_steps": NUM_STEPS,
        "eval_interval": 3, "checkpoint_interval": 1, "completions_per_step": 3,
    }  # fmt: skip
    return directory, settings


@pytest.fixture(scope="module")
def serial(place):
    """schedule → directory of the run whose batches were drawn in turns with training."""
    directory, settings = place

    @functools.cache
    def run(schedule):
        sync = {"sync_interval": schedule[0], "sync_offset": schedule[1]}
        return train(directory, f"serial-{schedule[0]}-{schedule[1]}", **settings, **sync)

    return run


# The same run


@pytest.mark.parametrize("schedule", [(1, 0), (2, 0), (10, 0), (1, 1), (3, 2)], ids=str)
def test_an_overlapped_run_equals_the_serial_one(schedule, place, serial, tmp_path):
    _, settings = place
    sync = {"sync_interval": schedule[0], "sync_offset": schedule[1]}
    assert_same_run(train(tmp_path, **settings, **sync, serial=False), serial(schedule))


@pytest.mark.parametrize("schedule", [(3, 2), (1, 1)], ids=str)
def test_killed_at_random_moments_it_ends_the_same(schedule, place, serial, tmp_path):
    _, settings = place
    seed = random.SystemRandom().randrange(10**9)
    print(f"seed of the moments: {seed}")
    rng = random.Random(seed)
    sync = {"sync_interval": schedule[0], "sync_offset": schedule[1], "serial": False}
    argv, run_dir = options(tmp_path, "killed", **settings, **sync), tmp_path / "killed"
    victims = ["trainer", "sampler", "both"]
    rng.shuffle(victims)
    for victim, lines in zip(victims, sorted(rng.sample(range(1, NUM_STEPS), 3)), strict=True):
        if num_logged(run_dir) > NUM_STEPS:  # the last blow came too late
            break
        run = Run(argv, tmp_path / "log")
        sampler = run.sampler()
        wait_for(lambda run=run, lines=lines: num_logged(run_dir) >= lines or run.trainer.poll() is not None)
        time.sleep(rng.uniform(0, 0.15))
        killed = [
            kill(pid)
            for pid in {"trainer": [run.trainer.pid], "sampler": [sampler]}.get(victim, [sampler, run.trainer.pid])
        ]
        code = run.end(30, grace=30)  # a sampler that is still importing PyTorch does not see its trainer die
        print(f"{victim} after line {lines}: {'killed' if all(killed) else 'too late'}, exit code {code}")
        assert code == (1 if victim == "sampler" else -signal.SIGKILL) or code == 0, run.log.read_text()
        argv = resume(run_dir)
    run = Run(argv, tmp_path / "log")
    assert run.end() == 0, run.log.read_text()
    assert_same_run(run_dir, serial(schedule))


def test_ctrl_c_stops_both_and_leaves_a_checkpoint(place, tmp_path):
    _, settings = place
    sync = {"sync_interval": 3, "sync_offset": 2, "serial": False}
    run_dir = tmp_path / "stopped"
    longer = {**settings, "checkpoint_interval": 50, "num_steps": 40}
    run = Run(options(tmp_path, "stopped", **longer, **sync), tmp_path / "log")
    wait_for(lambda: num_logged(run_dir) >= 3 or run.trainer.poll() is not None)
    os.killpg(run.trainer.pid, signal.SIGINT)  # as a terminal does: to trainer and sampler
    assert run.end() == 0, run.log.read_text()
    assert "Traceback" not in run.log.read_text() and "KeyboardInterrupt" not in run.log.read_text()
    assert len(list(run_dir.glob("checkpoints/step_*.pt"))) == 1
    assert Run(resume(run_dir), tmp_path / "log").end() == 0
    assert_same_run(run_dir, train(tmp_path, "serial", **{**longer, **sync, "serial": True}))


# Failures

SLOW_TASK = '''
import time
from common.tasks import Task


class Slow(Task):
    """Grading takes a minute from step 3 on."""
    calls = 0

    def problems(self, split):
        return [{"prompt": f"Q: {n}\\nA:"} for n in (range(40) if split == "train" else range(50, 54))]

    def reward(self, problem, response):
        self.calls += 1
        if self.calls > 4 + 2 * 16:
            time.sleep(60)
        return len(set(response)) / 16
'''


def test_a_dead_sampler_ends_the_run_within_seconds_whatever_the_trainer_does(place, tmp_path):
    _, settings = place
    task = f"{write_task(tmp_path, SLOW_TASK)}:Slow"
    run_dir = tmp_path / "run"
    argv = options(tmp_path, **{**settings, "task": task}, sync_interval=10, serial=False)
    run = Run(argv, tmp_path / "log")
    sampler = run.sampler()
    wait_for(lambda: (run_dir / "checkpoints" / "step_000002.pt").exists() or run.trainer.poll() is not None)
    time.sleep(0.5)  # it is grading step 3 now
    started = time.monotonic()
    assert kill(sampler)
    assert run.end(30) == 1
    assert time.monotonic() - started < 5
    last_line = run.log.read_text().splitlines()[-1]
    assert re.match(r"grpo\.py: error: The sampler's process died \(exit code -9.* while ", last_line)
    assert re.search(r"batch \d+ with weights of version 0|for weights of version 10 for batch 11", last_line)
    assert sorted(path.name for path in run_dir.glob("checkpoints/*")) == ["step_000001.pt", "step_000002.pt"]


def test_a_sampler_that_hangs_ends_the_run(place, tmp_path):
    _, settings = place
    argv = options(tmp_path, **{**settings, "num_steps": 1000}, serial=False, sampler_timeout=3)
    run = Run(argv, tmp_path / "log")
    sampler = run.sampler()
    wait_for(lambda: num_logged(tmp_path / "run") >= 3 or run.trainer.poll() is not None)
    os.kill(sampler, signal.SIGSTOP)
    started = time.monotonic()
    assert run.end(60) == 1, run.log.read_text()
    assert 3 <= time.monotonic() - started < 3 + 5
    last_line = run.log.read_text().splitlines()[-1]
    assert "has not decoded a token for 3 s while drawing batch" in last_line and "--sampler-timeout" in last_line


def test_the_sampler_leaves_when_the_trainer_is_killed(place, tmp_path):
    _, settings = place
    run = Run(options(tmp_path, **{**settings, "num_steps": 1000}, serial=False), tmp_path / "log")
    run.sampler()
    wait_for(lambda: num_logged(tmp_path / "run") >= 2 or run.trainer.poll() is not None)
    assert kill(run.trainer.pid)
    assert run.end() == -signal.SIGKILL  # and nobody is left


# The rollouts by themselves, with a sampler that notes its weights: what they look like tells their version


class NotingSampler(Sampler):
    """Answers with the first weight; cannot go on at weights of −13."""

    def use_weights(self, tensors):
        self.weights = tensors["weight"]

    def sample(self, prompts, group_size, seed):
        self.heartbeat += 1
        weight = int(self.weights[0, 0])
        if weight == -13:
            raise RunStopped("thirteen")
        responses = [[weight]] * (len(prompts) * group_size)
        return Samples(responses, [[-1.0]] * len(responses), [False] * len(responses))


class SlowlyStartingSampler(NotingSampler):
    """Takes as long to start as an engine does, compared with a step; its probes are always right."""

    def __init__(self):
        time.sleep(2)

    def score(self, sequences):
        return [[0.0] for _ in sequences]


def manifest_of(model, version):
    checksums = {name: checksum(parameter) for name, parameter in model.named_parameters()}
    return Manifest(version, checksums, [[0, 1]], [0.0], 1e-4, 0.0)


PROMPTS = [[index] for index in range(10)]


def make_rollouts(interval, offset, timeout=60.0):
    model = torch.nn.Linear(3, 5)
    plan = RolloutPlan(PROMPTS, 2, 2, interval, offset, seed=1)
    return model, OverlappedRollouts(
        model, NotingSampler, plan, lambda batch: {"seen": model.weight[0, 0].item()}, timeout
    )


def set_weights(model, value):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


def test_the_samplers_process_can_have_an_environment_of_its_own():
    _, rollouts = make_rollouts(1, 0)
    rollouts.environment = {"CUDA_VISIBLE_DEVICES": "1"}
    before = dict(os.environ)
    with rollouts:
        assert os.environ == before
        variables = Path(f"/proc/{rollouts.process.pid}/environ").read_bytes().split(b"\0")
    assert b"CUDA_VISIBLE_DEVICES=1" in variables


@pytest.mark.parametrize("schedule", [(1, 4), (2, 5), (4, 0), (3, 2)], ids=str)
def test_every_batch_is_drawn_from_the_weights_of_its_version(schedule):
    model, rollouts = make_rollouts(*schedule)
    set_weights(model, 0)
    with rollouts:
        for step in range(1, 41):
            batch = rollouts.next(step)
            version = version_of_batch(step, *schedule)
            assert (batch.number, batch.version) == (step, version)
            assert {response[0] for response in batch.responses} == {version}
            # What is measured with the weights of the batch is not measured with those the trainer holds by now.
            measured = {"seen": version} if rollouts.plan.mismatch_is_due(step) else {}
            assert batch.measured == measured and model.weight[0, 0] == step - 1
            set_weights(model, step)
            rollouts.publish(step)
            if step == 20:
                state = rollouts.state()
                assert len(state["weights"]) <= -(-schedule[1] // schedule[0]) + 1

    model, continued = make_rollouts(*schedule)
    set_weights(model, 20)
    continued.load_state(state)
    with continued:
        for step in range(21, 41):
            batch = continued.next(step)
            assert {response[0] for response in batch.responses} == {version_of_batch(step, *schedule)}
            set_weights(model, step)
            continued.publish(step)


def test_a_resumed_sampler_may_start_later_than_the_next_weights_come():
    # Batch 2 was drawn before the checkpoint: the sampler has no more to do with version 1, whose only slot gets
    # version 2 while the sampler is still starting.
    model, rollouts = make_rollouts(1, 0)
    set_weights(model, 0)
    with rollouts:
        rollouts.next(1)
        set_weights(model, 1)
        rollouts.publish(1)
        wait_for(lambda: rollouts.state()["last_arrived"] == 2)
        state = rollouts.state()

    _, continued = make_rollouts(1, 0)
    continued.model, continued.make_sampler, continued.describe = model, SlowlyStartingSampler, manifest_of
    continued.load_state(state)
    with continued:
        assert continued.next(2).responses[0] == [1]
        set_weights(model, 2)
        continued.publish(2)
        assert continued.next(3).responses[0] == [2]


def test_a_version_that_was_never_published_raises():
    _, rollouts = make_rollouts(2, 0)
    with rollouts:
        rollouts.next(1), rollouts.next(2)
        with pytest.raises(RuntimeError, match=r"Batch 3 .*version 2, which were never published; the newest is 0"):
            rollouts.next(3)


def test_weights_that_are_not_the_announced_ones_are_not_trained_on():
    _, rollouts = make_rollouts(1, 0)
    with rollouts:
        rollouts.next(1)
        write = rollouts.weights.write
        rollouts.weights.write = lambda slot, version, model: write(slot, version - 1, model)  # one too old
        rollouts.publish(1)
        with pytest.raises(RunStopped, match=r"batch 2 with weights of version 1: .*version 0 lies in slot 0"):
            rollouts.next(2)


def test_why_the_sampler_cannot_go_on_reaches_the_trainer():
    model, rollouts = make_rollouts(1, 0)
    set_weights(model, -13)
    with rollouts, pytest.raises(RunStopped, match="batch 1 with weights of version 0: RunStopped: thirteen"):
        rollouts.next(1)


# The shared memory


def test_parameters_are_aligned_views_of_the_slot():
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 7, bias=False))
    weights = SharedWeights(model, num_slots=3)
    for slot in range(3):
        set_weights(model, slot)
        weights.write(slot, 10 + slot, model)
    assert weights.versions.tolist() == [10, 11, 12]
    reader = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 7, bias=False))
    for slot in (2, 0, 1):
        point_parameters(reader, weights.slots[slot])
        for name, parameter in reader.named_parameters():
            assert (
                parameter.data_ptr() == weights.slots[slot][name].data_ptr() and parameter.data_ptr() % ALIGNMENT == 0
            )
            assert (parameter == slot).all()
    own = point_parameters(model, weights.slots[0])
    point_parameters(model, own)
    assert all((parameter == 2).all() for parameter in model.parameters())


def test_too_little_shared_memory_is_one_sentence(place, tmp_path, capfd):
    with pytest.raises(BadInput, match=r"takes \d{8,} MiB of shared memory .*--shm-size.*--serial"):
        SharedWeights(torch.nn.Linear(2**24, 2**22, bias=False, device="meta"), num_slots=2)
    _, settings = place
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # less than the model; counts in memory files, too
    try:
        code = command(*options(tmp_path, **settings, serial=False))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 2
    assert "MiB of shared memory" in capfd.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_the_time_a_step_began_and_its_batch_was_drawn_are_logged(serial):
    records = [record for record in map(json.loads, (serial((3, 2)) / "metrics.jsonl").open()) if record["step"]]
    assert records == sorted(records, key=lambda record: record["time/step_started_at"])
    for record in records:
        drawn = record["time/sample_started_at"] + record["time/sample"]
        assert record["time/step_started_at"] + record["time/wait"] >= drawn - 0.01
    assert len(metrics(serial((3, 2)))) == NUM_STEPS + 1
