"""Sampling in a process of its own: the same run as in turns, bit for bit, whatever dies.

Runs are real: `python grpo.py` in a process group of its own, signals to real processes, and a look
into /proc for processes that remain. A failing test prints the seed of its random moments.
"""

import contextlib
import copy
import functools
import json
import multiprocessing
import os
import random
import re
import signal
import time
import types
from functools import partial
from pathlib import Path

import pytest
import torch

from common.checkpoints import Checkpoints
from common.errors import BadInput, RunStopped
from common.models import load_model
from common.rollouts import load_sampler
from common.sampling import Plan, Sampler, Samples, shared_weights, version_of_batch
from common.sampling import overlapped as module
from common.sampling.overlapped import OverlappedRollouts
from common.sampling.serial import SerialRollouts
from common.sampling.shared_weights import share_weights
from common.sampling.transformers import TransformersSampler
from common.sampling.verify import Manifest, logprobs_of
from common.weights import checksum, parameters_from
from tests.conftest import build_model
from tests.helpers import (
    Run,
    assert_same_run,
    command,
    dense_task,
    forked_samplers,
    kill,
    metrics,
    num_logged,
    options,
    resume,
    train,
    wait_for,
    write_task,
)

NUM_STEPS = 7


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory, and the settings that every run of this file starts from."""
    directory = tmp_path_factory.mktemp("overlap")
    settings = {
        "model": build_model("qwen2", directory / "model"), "task": dense_task(directory),
        "num_steps": NUM_STEPS, "eval_interval": 3, "checkpoint_interval": 1,
    }  # fmt: skip
    return directory, settings


@pytest.fixture(scope="module")
def serial(place):
    """schedule → directory of the run whose batches were sampled in turns with training."""
    directory, settings = place

    @functools.cache
    def run(schedule):
        sync = {"sync_interval": schedule[0], "sync_offset": schedule[1]}
        return train(directory, f"serial-{schedule[0]}-{schedule[1]}", **settings, **sync)

    return run


@pytest.fixture(autouse=True)
def sampler_processes(request):
    """Forked, but for those of `Run`s and of tests that ask for `spawned`."""
    with contextlib.nullcontext() if "spawned" in request.fixturenames else forked_samplers():
        yield


@pytest.fixture
def spawned():
    """The sampler's process is spawned, as it is outside of tests."""


# The same run


@pytest.mark.parametrize("schedule", [(2, 0), (10, 0), (1, 1), (3, 2)], ids=str)
def test_an_overlapped_run_equals_the_serial_one(schedule, place, serial, tmp_path):
    _, settings = place
    sync = {"sync_interval": schedule[0], "sync_offset": schedule[1]}
    assert_same_run(train(tmp_path, **settings, **sync, serial=False), serial(schedule))


@pytest.mark.parametrize("schedule", [(2, 0), (1, 1), (3, 2)], ids=str)
def test_a_long_run_of_the_embedded_model_equals_the_serial_one(schedule, tmp_path):
    # Rounding that depends on where a parameter lies in memory may show in one row of thousands:
    # few steps, of many rows each.
    settings = {
        "model": "tiny", "task": "addition", "num_steps": 20, "prompts_per_step": 12,
        "max_response_tokens": 32, "eval_size": 8, "eval_interval": 10, "reference_kl": False,
        "sync_interval": schedule[0], "sync_offset": schedule[1],
    }  # fmt: skip
    overlapped = train(tmp_path, "overlapped", **settings, serial=False)
    assert_same_run(overlapped, train(tmp_path, "serial", **settings))
    records = metrics(overlapped)
    assert [record["lag"] for record in records[1:]] == [
        k - 1 - version_of_batch(k, *schedule) for k in range(1, 21)
    ]
    assert [record["step"] for record in records if "eval/accuracy" in record] == [0, 10, 20]
    # the policy moved at every step
    assert len({record["entropy"] for record in records[1:]}) == 20


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
        wait_for(
            lambda run=run, lines=lines: (
                num_logged(run_dir) >= lines or run.trainer.poll() is not None
            )
        )
        time.sleep(rng.uniform(0, 0.15))
        killed = [
            kill(pid)
            for pid in {"trainer": [run.trainer.pid], "sampler": [sampler]}.get(
                victim, [sampler, run.trainer.pid]
            )
        ]
        # a sampler that is still importing PyTorch does not see its trainer die
        code = run.end(30, grace=30)
        came = "killed" if all(killed) else "too late"
        print(f"{victim} after line {lines}: {came}, exit code {code}")
        assert code == (1 if victim == "sampler" else -signal.SIGKILL) or code == 0, (
            run.log.read_text()
        )
        argv = resume(run_dir)
    assert command(*argv) == 0
    assert_same_run(run_dir, serial(schedule))


def test_ctrl_c_stops_both_and_leaves_a_checkpoint(place, tmp_path):
    _, settings = place
    sync = {"sync_interval": 3, "sync_offset": 2, "serial": False}
    run_dir = tmp_path / "stopped"
    longer = {**settings, "checkpoint_interval": 50, "num_steps": 20}
    run = Run(options(tmp_path, "stopped", **longer, **sync), tmp_path / "log", afresh=True)
    wait_for(lambda: num_logged(run_dir) >= 3 or run.trainer.poll() is not None)
    os.killpg(run.trainer.pid, signal.SIGINT)  # as a terminal does: to trainer and sampler
    assert run.end() == 0, run.log.read_text()
    assert "Traceback" not in run.log.read_text() and "KeyboardInterrupt" not in run.log.read_text()
    assert len(list(run_dir.glob("checkpoints/step_*.pt"))) == 1
    assert command(*resume(run_dir)) == 0
    assert_same_run(run_dir, train(tmp_path, "serial", **{**longer, **sync, "serial": True}))


# Failures

SLOW_TASK = '''
import os, time
from dense import Digits


class Slow(Digits):
    """Grading the {call}th response begins with one file and lasts until another one is there."""
    calls = 0

    def reward(self, problem, response):
        self.calls += 1
        if self.calls == {call}:
            open({begun!r}, "w").close()
            while not os.path.exists({go_on!r}):
                time.sleep(0.01)
        return super().reward(problem, response)
'''


# While step 3 is graded, at whose end is an evaluation; and step 4, which can be completed without
# a sampler.
@pytest.mark.parametrize("call, last_step", [(4 + 2 * 16 + 1, 2), (4 + 3 * 16 + 4 + 1, 4)])
def test_a_dead_sampler_ends_the_run_within_a_step(
    call, last_step, place, serial, tmp_path, monkeypatch
):
    directory, settings = place
    monkeypatch.setenv("PYTHONPATH", str(directory))  # the task's file imports another
    begun, go_on = tmp_path / "begun", tmp_path / "go_on"
    text = SLOW_TASK.format(call=call, begun=str(begun), go_on=str(go_on))
    task = f"{write_task(tmp_path, text)}:Slow"
    run_dir = tmp_path / "run"
    argv = options(tmp_path, **{**settings, "task": task}, sync_interval=10, serial=False)
    run = Run(argv, tmp_path / "log")
    sampler = run.sampler()
    wait_for(lambda: begun.exists() or run.trainer.poll() is not None)
    assert kill(sampler)
    time.sleep(0.5)  # until the trainer's end of the pipe knows
    go_on.touch()
    started = time.monotonic()
    assert run.end(30) == 1
    assert time.monotonic() - started < 5
    last_line = run.log.read_text().splitlines()[-1]
    assert re.match(
        r"grpo\.py: error: The sampler's process died \(exit code -9.* while ", last_line
    )
    assert re.search(
        r"batch \d+ with weights of version 0|for weights of version 10 for batch 11", last_line
    )
    # Batches were waiting, but no step was made from them. Every checkpoint is whole.
    assert [record["step"] for record in metrics(run_dir)] == list(range(last_step + 1))
    checkpoints = [f"step_{step:06d}.pt" for step in (last_step - 1, last_step)]
    assert sorted(path.name for path in run_dir.glob("checkpoints/*")) == checkpoints
    monkeypatch.syspath_prepend(directory)
    assert command(*resume(run_dir)) == 0
    assert_same_run(run_dir, serial((10, 0)))


def test_a_sampler_that_hangs_ends_the_run(place, tmp_path):
    _, settings = place
    argv = options(
        tmp_path, **{**settings, "num_steps": 1000}, sync_offset=1, serial=False, sampler_timeout=3
    )
    run = Run(argv, tmp_path / "log")
    sampler = run.sampler()
    wait_for(lambda: num_logged(tmp_path / "run") >= 3 or run.trainer.poll() is not None)
    os.kill(sampler, signal.SIGSTOP)
    started = time.monotonic()
    assert run.end(60) == 1, run.log.read_text()
    assert 3 <= time.monotonic() - started < 3 + 5
    last_line = run.log.read_text().splitlines()[-1]
    assert (
        "has not decoded a token for 3 s while sampling batch" in last_line
        and "--sampler-timeout" in last_line
    )


@pytest.mark.parametrize("victim, number", [("sampler", "SIGKILL"), ("trainer", "SIGTERM")])
def test_a_run_that_is_stopped_while_the_sampler_starts(victim, number, tmp_path):
    # Its prompts are more than fits into a pipe, which the sampler reads once it has started.
    settings = {"model": "tiny", "task": "addition", "sync_offset": 1, "serial": False}
    run = Run(options(tmp_path, **settings), tmp_path / "log")
    sampler = run.sampler()
    os.kill({"sampler": sampler, "trainer": run.trainer.pid}[victim], getattr(signal, number))
    code = run.end(30, grace=15)  # the sampler looks for the trainer after its imports
    if victim == "sampler":
        assert code == 1 and "The sampler's process died (exit code -9" in run.log.read_text()
    else:
        assert code == -signal.SIGTERM


def test_the_sampler_leaves_when_the_trainer_is_killed(place, tmp_path):
    _, settings = place
    argv = options(tmp_path, **{**settings, "num_steps": 1000}, sync_offset=1, serial=False)
    run = Run(argv, tmp_path / "log")
    sampler = run.sampler()
    wait_for(lambda: num_logged(tmp_path / "run") >= 2 or run.trainer.poll() is not None)
    # A named semaphore would stay behind.
    assert "/dev/shm/sem." not in Path(f"/proc/{sampler}/maps").read_text()
    assert kill(run.trainer.pid)
    assert run.end() == -signal.SIGKILL  # and nobody is left


def test_a_run_says_nothing_on_stderr_but_its_progress(place, tmp_path):
    # No warning at the end that shared memory or semaphores were lost, for instance.
    _, settings = place
    argv = options(tmp_path, **settings, sync_offset=1, serial=False)
    run = Run(argv, tmp_path / "log", afresh=True)
    assert run.end() == 0
    lines = re.split(r"[\r\n]+", run.log.read_text())
    said = r"The first training prompt, |    '|Watch the reward\. |Held-out problems|  \w+ |"
    said += r"If it is stopped or killed, |    python grpo\.py --resume |"
    said += r"Everything is in |\s*(\x1b\[A)?$"
    progress = re.compile(
        r"(Loading weights: |Writing model shards: )? *\d+%\||.*: \d+it \[|" + said
    )
    assert [line for line in lines if not progress.match(line)] == []
    assert len(lines) > NUM_STEPS


class FailingSampler(Sampler):
    """Fails as it is told with the third batch: "BadInput", "RunStopped" or another exception."""

    def __init__(self, failure, *generation):
        self.sampler, self.failure, self.calls = load_sampler(*generation), failure, 0

    def use_weights(self, tensors):
        self.sampler.heartbeat = self.heartbeat
        self.sampler.use_weights(tensors)

    def greedy(self, prompts, problems=None):
        return self.sampler.greedy(prompts)

    def sample(self, prompts, group_size, seeds, problems=None):
        self.calls += 1
        if self.calls == 3:
            raise {"BadInput": BadInput, "RunStopped": RunStopped, "ValueError": ValueError}[
                self.failure
            ]("thirteen")
        return self.sampler.sample(prompts, group_size, seeds)


FAILED = (
    "The sampler's process failed while sampling batch 3 with weights of version 1: "
    "ValueError: thirteen"
)


@pytest.mark.parametrize(
    "failure, code, words",
    [("BadInput", 2, "thirteen"), ("RunStopped", 1, "thirteen"), ("ValueError", 1, FAILED)],
)
def test_a_failure_of_the_sampler_is_the_runs(
    failure, code, words, place, serial, tmp_path, capfd, monkeypatch
):
    _, settings = place
    argv = options(tmp_path, **settings, sync_offset=1, serial=False)
    with monkeypatch.context() as patch:
        if failure == "ValueError":  # a traceback on this process's stderr: not that of the server
            patch.setattr(torch.multiprocessing, "get_context", multiprocessing.get_context)
        patch.setattr("common.rollouts.load_sampler", partial(FailingSampler, failure))
        assert command(*argv) == code
    *before, last_line = capfd.readouterr().err.splitlines()
    assert last_line == f"grpo.py: error: {words}"
    # where an unexpected failure came from
    assert ("Traceback" in "\n".join(before)) == (failure == "ValueError")
    assert [record["step"] for record in metrics(tmp_path / "run")][-1] in (0, 1, 2)
    assert command(*resume(tmp_path / "run")) == 0
    assert_same_run(tmp_path / "run", serial((1, 1)))


# The rollouts by themselves, with a sampler that notes its weights: what they look like tells their
# version


class NotingSampler(Sampler):
    """Answers with the first weight; cannot go on at weights of −13."""

    def use_weights(self, tensors):
        self.weights = tensors["weight"]

    def sample(self, prompts, group_size, seeds, problems=None):
        self.heartbeat += 1
        weight = int(self.weights[0, 0])
        if weight == -13:
            raise RunStopped("thirteen")
        responses = [[weight]] * (len(prompts) * group_size)
        return Samples(responses, [[-1.0]] * len(responses), [False] * len(responses))

    def greedy(self, prompts, problems=None):
        return self.sample(prompts, 1, None)


class SlowlyStartingSampler(NotingSampler):
    """Takes as long to start as an engine, compared with a step; its probes are always right."""

    def __init__(self):
        time.sleep(2)

    def score(self, sequences):
        return [[0.0] for _ in sequences]


class SleepingSampler(NotingSampler):
    """Never comes to its first token."""

    def sample(self, prompts, group_size, seeds, problems=None):
        time.sleep(600)


def manifest_of(model, version, precision):
    checksums = {name: checksum(parameter) for name, parameter in model.named_parameters()}
    return Manifest(version, checksums, [[0, 1]], [0.0], 1e-4, 0.0)


PROMPTS = [[index] for index in range(10)]


def make_rollouts(interval, offset, make_sampler=NotingSampler, timeout=60.0, **options):
    model = torch.nn.Linear(3, 5)
    plan = Plan(PROMPTS, 2, 2, interval, offset, seed=1)
    return model, OverlappedRollouts(model, make_sampler, plan, 1.0, "float32", timeout, **options)


def set_weights(model, value):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


@pytest.fixture(autouse=True)
def mismatch(monkeypatch):
    """In place of the mismatch, where the model is one layer: the weights it is measured with."""
    true = module.sampler_mismatch

    def measured(model, temperature, precision, batch):
        if isinstance(model, torch.nn.Linear):
            return {"seen": model.weight[0, 0].item()}
        return true(model, temperature, precision, batch)

    monkeypatch.setattr(module, "sampler_mismatch", measured)


def test_the_samplers_process_can_have_an_environment_of_its_own(spawned):
    _, rollouts = make_rollouts(1, 0, environment={"CUDA_VISIBLE_DEVICES": "1"})
    before = dict(os.environ)
    with rollouts:
        assert os.environ == before
        variables = Path(f"/proc/{rollouts.process.pid}/environ").read_bytes().split(b"\0")
    assert b"CUDA_VISIBLE_DEVICES=1" in variables


@pytest.mark.parametrize("schedule", [(1, 4), (2, 5), (4, 0), (3, 2)], ids=str)
def test_every_batch_is_sampled_with_the_weights_of_its_version(schedule):
    model, rollouts = make_rollouts(*schedule)
    set_weights(model, 0)
    with rollouts:
        for step in range(1, 41):
            batch = rollouts.next(step)
            version = version_of_batch(step, *schedule)
            assert (batch.number, batch.version) == (step, version)
            assert {response[0] for response in batch.responses} == {version}
            # What is measured with the weights of the batch is not measured with those the trainer
            # holds by now.
            seen = version if rollouts.plan.shows_mismatch_only_now(step) else None
            assert batch.metrics.get("seen") == seen and model.weight[0, 0] == step - 1
            set_weights(model, step)
            rollouts.publish(step)
            if step == 20:
                state = copy.deepcopy(rollouts.state_dict())
                assert len(state["weights"]) <= -(-schedule[1] // schedule[0]) + 1

    model, continued = make_rollouts(*schedule)
    set_weights(model, 20)
    continued.load_state_dict(state, model)
    with continued:
        for step in range(21, 41):
            batch = continued.next(step)
            assert {response[0] for response in batch.responses} == {
                version_of_batch(step, *schedule)
            }
            set_weights(model, step)
            continued.publish(step)


class Logged:
    """Of a run's log, what checkpoints need: its directory and its step."""

    def __init__(self, directory):
        self.dir, self.step = directory, 0

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        self.step = state["step"]


@pytest.mark.parametrize("schedule", [(2, 5), (3, 2)], ids=str)
def test_a_checkpoints_weights_reach_the_sampler(schedule, tmp_path):
    """Whatever is done first, loading or starting, and though the model begins with others."""
    problems = types.SimpleNamespace(checksum=lambda: 1)

    def begin():
        model, rollouts = make_rollouts(*schedule)
        set_weights(model, 0)
        optimizer = torch.optim.AdamW(model.parameters())
        parts = (Logged(tmp_path), model, optimizer, rollouts, problems, problems)
        return model, rollouts, Checkpoints(*parts)

    model, rollouts, checkpoints = begin()
    with rollouts:
        for step in range(1, 10):
            rollouts.next(step)
            set_weights(model, step)
            rollouts.publish(step)
        checkpoints.log.step = 9
        checkpoints.save()

    for loaded_first in (True, False):
        model, resumed, checkpoints = begin()
        with contextlib.ExitStack() as started:
            if not loaded_first:
                started.enter_context(resumed)
            checkpoints.load_newest()
            assert checkpoints.log.step == 9 and (model.weight == 9).all()
            if loaded_first:
                started.enter_context(resumed)
            for step in range(10, 21):
                version = version_of_batch(step, *schedule)
                assert {response[0] for response in resumed.next(step).responses} == {version}
                assert (model.weight == step - 1).all()
                set_weights(model, step)
                resumed.publish(step)


@pytest.mark.parametrize("schedule", [(1, 1), (2, 5), (4, 0), (3, 2)], ids=str)
def test_greedy_is_with_the_present_weights_and_after_the_batches_ordered(schedule):
    model, rollouts = make_rollouts(*schedule)
    set_weights(model, 0)
    with rollouts:
        for step in range(1, 21):
            assert {response[0] for response in rollouts.next(step).responses} == {
                version_of_batch(step, *schedule)
            }
            # Weights of the middle of a step, which are no version; then those after the step, not
            # yet published.
            for weight in (1000 + step, step):
                set_weights(model, weight)
                assert rollouts.greedy(PROMPTS[:3]).responses == [[weight]] * 3
                assert rollouts.last_arrived == rollouts.plan.batches_of(rollouts.published)[-1]
            rollouts.publish(step)


def test_a_resumed_sampler_may_start_later_than_the_next_weights_come(monkeypatch):
    # Batch 2 was sampled before the checkpoint: the sampler has no more to do with version 1, whose
    # only slot gets version 2 while the sampler is still starting.
    model, rollouts = make_rollouts(1, 0)
    set_weights(model, 0)
    with rollouts:
        rollouts.next(1)
        set_weights(model, 1)
        rollouts.publish(1)
        wait_for(lambda: rollouts.state_dict()["last_arrived"] == 2)
        state = rollouts.state_dict()

    monkeypatch.setattr(module, "describe", manifest_of)
    _, continued = make_rollouts(1, 0, SlowlyStartingSampler, verified=True)
    continued.model = model
    continued.load_state_dict(state, model)
    with continued:
        assert continued.next(2).responses[0] == [1]
        set_weights(model, 2)
        continued.publish(2)
        assert continued.next(3).responses[0] == [2]


def test_a_run_goes_on_in_the_way_it_began():
    model, beside = make_rollouts(2, 0)
    in_turns = SerialRollouts(model, NotingSampler(), beside.plan)
    with beside:
        beside.next(1)
        state = beside.state_dict()
    with pytest.raises(BadInput, match=r"--resume: .* in a process of its own"):
        in_turns.load_state_dict(state, model)
    with pytest.raises(BadInput, match=r"--resume: .* in turns with training .*--serial"):
        beside.load_state_dict(in_turns.state_dict(), model)


def test_a_version_that_was_never_published_raises():
    _, rollouts = make_rollouts(2, 0)
    with rollouts:
        rollouts.next(1), rollouts.next(2)
        with pytest.raises(RuntimeError, match=r"batch 3 needs version 2, but the newest is 0"):
            rollouts.next(3)


def test_weights_that_are_not_the_announced_ones_are_not_trained_on():
    _, rollouts = make_rollouts(1, 0)
    with rollouts:
        rollouts.next(1)
        write = rollouts.weights.write
        # one too old
        rollouts.weights.write = lambda slot, version, model: write(slot, version - 1, model)
        rollouts.publish(1)
        with pytest.raises(
            RunStopped,
            match=r"batch 2 with weights of version 1: .*batch 2 needs version 1, not 1, 0",
        ):
            rollouts.next(2)


def test_why_the_sampler_cannot_go_on_reaches_the_trainer():
    model, rollouts = make_rollouts(1, 0)
    set_weights(model, -13)
    with rollouts, pytest.raises(RunStopped, match=r"^thirteen$"):
        rollouts.next(1)
    with rollouts, pytest.raises(RunStopped, match=r"^thirteen$"):
        rollouts.greedy(PROMPTS)


@pytest.mark.parametrize("failure", ["killed", "failed"])
def test_a_failed_sampler_leaves_the_state_complete_and_is_reported_afterwards(failure):
    model, rollouts = make_rollouts(3, 2)
    set_weights(model, 0)
    with rollouts:
        for step in (1, 2, 3):
            assert rollouts.next(step).version == 0
            set_weights(model, -13 if step == 3 and failure == "failed" else step)
            rollouts.publish(step)
        if failure == "killed":
            wait_for(lambda: rollouts.last_arrived == 8 or rollouts._accept(rollouts._receive()))
            rollouts.process.kill()
        rollouts.process.join(2)
        wait_for(lambda: rollouts.last_arrived < 8 or not rollouts.inbox.empty())
        for _ in range(2):  # however often it is asked for
            state = copy.deepcopy(rollouts.state_dict())
        assert sorted(state["weights"]) == [0, 3]
        expected = [4, 5] if failure == "failed" else [4, 5, 6, 7, 8]
        assert [fields["number"] for fields in state["waiting"]] == expected
        with pytest.raises(
            RunStopped, match=r"^thirteen$" if failure == "failed" else "died .*exit code -9"
        ):
            rollouts.next(4)

    model, continued = make_rollouts(3, 2)
    set_weights(model, 3)
    assert state["weights"][3] is None  # they are the model's own
    continued.load_state_dict(state, model)
    with continued:
        for step in range(4, 12):
            assert {response[0] for response in continued.next(step).responses} == {
                version_of_batch(step, 3, 2)
            }
            set_weights(model, step)
            continued.publish(step)


def test_a_slow_start_is_no_failure_but_a_start_without_end_is(monkeypatch):
    model, rollouts = make_rollouts(1, 0, SlowlyStartingSampler, timeout=1.0)
    set_weights(model, 5)
    with rollouts:
        assert rollouts.next(1).responses[0] == [5]
    _, rollouts = make_rollouts(1, 0, SleepingSampler, timeout=1.0)
    monkeypatch.setattr(module, "START_UP_SECONDS", 2)
    with (
        rollouts,
        pytest.raises(
            RunStopped, match="has not decoded a token for 2 s while sampling batch 1 with"
        ),
    ):
        rollouts.next(1)


# With a model, and with an engine that copies its weights


@pytest.fixture(scope="module")
def model_name(place):
    return place[1]["model"]


def a_plan(interval, offset):
    return Plan([[5, 6, 7], [8, 9], [10] * 20, [11]], 2, 3, interval, offset, seed=1)


class CopyingSampler(TransformersSampler):
    """Has weights of its own, like an engine; deaf to a delivery of the given number, from 1."""

    def __init__(self, name, deaf_to=None):
        super().__init__(load_model(name, "", torch.device("cpu")), {0}, 12, 1.0)
        self.deaf_to, self.deliveries = deaf_to, 0

    @torch.no_grad()
    def use_weights(self, tensors):
        self.deliveries += 1
        for name, parameter in self.model.named_parameters():
            if self.deliveries != self.deaf_to:
                parameter.copy_(tensors[name])

    def score(self, sequences):
        return logprobs_of(self.model, sequences, "float32").view(len(sequences), -1).tolist()


@torch.no_grad()
def change(model):
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)


@pytest.mark.parametrize("verified", [False, True], ids=["shared", "copied"])
def test_evaluation_is_the_serial_one_bit_for_bit(verified, model_name):
    model = load_model(model_name, "", torch.device("cpu"))
    sampler = TransformersSampler(model, {0}, 12, 1.0)
    prompts = [[1, 2, 3, 4], [5], [6] * 30]
    make_sampler = partial(load_sampler, model_name, "", 1, False, {0}, 12, 1.0, "float32")
    if verified:
        make_sampler = partial(CopyingSampler, model_name)
    rollouts = OverlappedRollouts(model, make_sampler, a_plan(2, 1), 1.0, "float32", 60.0, verified)
    serial = SerialRollouts(
        model, CopyingSampler(model_name) if verified else sampler, a_plan(2, 1), verified
    )
    torch.manual_seed(0)
    answers = []
    with rollouts:
        for step in range(1, 6):
            found, expected = rollouts.next(step), serial.next(step)
            assert (found.responses, found.logprobs) == (expected.responses, expected.logprobs)
            assert ("time/sync_verify" in found.metrics) == (verified and step in (1, 4))
            assert found.metrics.keys() == expected.metrics.keys()
            change(model)
            answers.append(vars(rollouts.greedy(prompts)))
            assert answers[-1] == vars(serial.greedy(prompts)) == vars(sampler.greedy(prompts))
            rollouts.publish(step)
            serial.publish(step)
    assert len({str(answer["responses"]) for answer in answers}) == 5


def test_after_resuming_stored_weights_are_verified_though_the_trainer_has_moved_on(model_name):
    def begin():
        model = load_model(model_name, "", torch.device("cpu"))
        make_sampler = partial(CopyingSampler, model_name)
        return model, OverlappedRollouts(
            model, make_sampler, a_plan(3, 2), 1.0, "float32", 60.0, verified=True
        )

    model, rollouts = begin()
    torch.manual_seed(0)
    with rollouts:
        for step in range(1, 5):
            rollouts.next(step)
            change(model)
            rollouts.publish(step)
        wait_for(lambda: rollouts.state_dict()["last_arrived"] == 8)
        state = copy.deepcopy(rollouts.state_dict())
    expected = {fields["number"]: fields for fields in state["waiting"]}
    assert sorted(expected) == [5, 6, 7, 8]
    # As if it had been killed while the sampler was at batch 6, the first of version 3; the trainer
    # holds version 4.
    state |= {"waiting": [expected[5]], "last_arrived": 5}
    resumed, continued = begin()
    resumed.load_state_dict(model.state_dict())
    continued.load_state_dict(state, resumed)
    with continued:
        for step in (5, 6, 7, 8):
            batch = continued.next(step)
            assert (batch.responses, batch.logprobs) == (
                expected[step]["responses"],
                expected[step]["logprobs"],
            )
            continued.publish(step)
    for name, parameter in resumed.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))


@pytest.mark.parametrize("serial", [False, True])
def test_weights_for_evaluation_are_verified(serial, model_name):
    model = load_model(model_name, "", torch.device("cpu"))
    make_sampler = partial(CopyingSampler, model_name, deaf_to=2)
    if serial:
        rollouts = SerialRollouts(model, make_sampler(), a_plan(2, 1), verified=True)
    else:
        rollouts = OverlappedRollouts(
            model, make_sampler, a_plan(2, 1), 1.0, "float32", 60.0, verified=True
        )
    with rollouts:
        rollouts.next(1)
        change(model)
        with pytest.raises(RunStopped, match="does not compute with weights"):
            rollouts.greedy([[1, 2, 3]])


# The shared memory


def test_parameters_of_a_loaded_model_are_aligned(model_name):
    # As they come out of a safetensors file they may lie anywhere, and vector code may round
    # differently there.
    for name in ("tiny", model_name):
        model = load_model(name, "", torch.device("cpu"))
        assert {tensor.data_ptr() % 64 for tensor in [*model.parameters(), *model.buffers()]} == {0}
        assert {tensor.data_ptr() % 64 for tensor in copy.deepcopy(model).parameters()} == {0}
        model.load_state_dict(copy.deepcopy(model.state_dict()))  # of a checkpoint
        assert {tensor.data_ptr() % 64 for tensor in model.parameters()} == {0}
        weights = share_weights(model, num_slots=2)
        assert {t.data_ptr() % 64 for slot in (0, 1) for t in weights.tensors(slot).values()} == {0}


def test_parameters_are_aligned_views_of_the_slot():
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 7, bias=False))
    weights = share_weights(model, num_slots=3)
    for slot in range(3):
        set_weights(model, slot)
        weights.write(slot, 10 + slot, model)
    assert weights.versions.tolist() == [10, 11, 12]
    reader = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 7, bias=False))
    sampler = TransformersSampler(
        types.SimpleNamespace(
            device="cpu",
            named_parameters=reader.named_parameters,
            named_buffers=reader.named_buffers,
            named_modules=reader.named_modules,
            state_dict=reader.state_dict,
        ),
        {0},
        1,
        1,
    )
    for slot in (2, 0, 1):
        sampler.use_weights(weights.tensors(slot))
        for name, parameter in reader.named_parameters():
            assert (
                parameter.data_ptr() == weights.tensors(slot)[name].data_ptr()
                and parameter.data_ptr() % 64 == 0
            )
            assert parameter.is_shared() and (parameter == slot).all()
    weights.slots[1].fill_(7.0)  # what the trainer writes is there at once
    assert all((parameter == 7).all() for parameter in reader.parameters())


def test_parameters_are_exchanged_and_put_back_whatever_happens():
    model = torch.nn.Linear(3, 5)
    set_weights(model, 1)
    places = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    others = {name: torch.full_like(parameter, 2.0) for name, parameter in model.named_parameters()}
    with pytest.raises(ZeroDivisionError), parameters_from(model, others.items()):
        assert all((parameter == 2).all() for parameter in model.parameters())
        _ = 1 / 0
    assert all((parameter == 1).all() for parameter in model.parameters())
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == places


def test_too_little_shared_memory_is_one_line(place, tmp_path, capfd, monkeypatch):
    with pytest.raises(BadInput, match=r"takes \d{8,} MiB of shared memory .*--shm-size.*--serial"):
        share_weights(torch.nn.Linear(2**24, 2**22, bias=False, device="meta"), num_slots=2)
    _, settings = place
    shutil = shared_weights.shutil
    usage = shutil.disk_usage("/dev/shm")._replace(free=100_000)  # less than the model
    monkeypatch.setattr(shutil, "disk_usage", lambda path: {"/dev/shm": usage}[path])
    assert command(*options(tmp_path, **settings, sync_offset=1, serial=False)) == 2
    assert "MiB of shared memory" in capfd.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_the_time_a_step_began_and_its_batch_was_sampled_are_logged(serial):
    records = [
        record
        for record in map(json.loads, (serial((3, 2)) / "metrics.jsonl").open())
        if record["step"]
    ]
    assert records == sorted(records, key=lambda record: record["time/step_started_at"])
    for record in records:
        sampled = record["time/sample_started_at"] + record["time/sample"]
        assert record["time/step_started_at"] + record["time/wait"] >= sampled - 0.01
    assert len(metrics(serial((3, 2)))) == NUM_STEPS + 1
