"""A run that was killed, interrupted or extended ends as if nothing had happened: bit for bit the
same files.

"The same" is what `helpers.assert_same_run` compares: `metrics.jsonl` without measured times,
`completions.jsonl`, `rollouts.jsonl`, and the trained weights. Kills are SIGKILL to a real process,
at random moments; a failing test prints its seed.
"""

import contextlib
import json
import os
import pty
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

import grpo
from common import checkpoints
from common.commandline import STOPPED_EARLY, parse
from common.errors import BadInput
from common.interrupt import STOP_SIGNALS
from common.runfiles import RunFiles, is_complete
from common.runlog import RunLog, SilentLog
from tests.conftest import build_model
from tests.helpers import (
    REPOSITORY,
    assert_same_run,
    checkpoint,
    command,
    dense_task,
    finish,
    import_script,
    metrics,
    num_logged,
    options,
    resume,
    run_module,
    start,
    steps,
    train,
    wait_for,
    write_task,
)

# with a sync every 3 steps, batches wait in most checkpoints and the last period is cut short
NUM_STEPS = 7


@pytest.fixture(autouse=True)
def hangups_count():
    """Runs inherit from pytest whether SIGHUP is ignored, which it is under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a model and a task, and the settings that every run of this file starts
    from.
    """
    directory = tmp_path_factory.mktemp("resume")
    model, task = build_model("qwen2", directory / "model"), dense_task(directory)
    settings = {
        "model": model, "task": task, "num_steps": NUM_STEPS, "eval_interval": 3,
        "checkpoint_interval": 1, "warmup_steps": 4, "rollouts_interval": 2,
    }  # fmt: skip
    return directory, settings


@pytest.fixture(scope="module")
def uninterrupted(place):
    """schedule → directory of a run that nothing disturbed."""
    directory, settings = place
    runs = {}

    def run(schedule):
        if schedule not in runs:
            sync = {"sync_interval": schedule[0], "sync_offset": schedule[1]}
            runs[schedule] = train(
                directory, f"uninterrupted-{schedule[0]}-{schedule[1]}", **settings, **sync
            )
        return runs[schedule]

    return run


def kill(process):
    """kill -9; returns whether it came in time."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    return process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("schedule", [(1, 0), (3, 2)], ids=str)
def test_killed_again_and_again_it_ends_the_same(schedule, place, uninterrupted, tmp_path):
    _, settings = place
    seed = random.SystemRandom().randrange(10**9)
    print(f"seed of the moments: {seed}")
    rng = random.Random(seed)
    argv = options(
        tmp_path, "killed", **settings, sync_interval=schedule[0], sync_offset=schedule[1]
    )
    run_dir, log = tmp_path / "killed", tmp_path / "log"
    # A step takes about 0.1 s, so these moments are anywhere in a step or its checkpoint; one is in
    # a start or resume.
    moments = [
        (lines, rng.uniform(0, 0.15)) for lines in sorted(rng.sample(range(1, NUM_STEPS + 1), 3))
    ]
    moments.insert(rng.randrange(4), (0, rng.uniform(0.1, 0.5)))
    kills = 0
    for lines, delay in moments:
        process = start(argv, log)
        wait_for(
            lambda process=process, lines=lines: (
                num_logged(run_dir) >= lines or not process.is_alive()
            )
        )
        time.sleep(delay)
        killed = kill(process)  # on a busy machine the last one may come too late
        kills += killed
        came = "killed" if killed else "too late"
        print(f"{came} {delay:.3f} s after line {lines} of metrics.jsonl")
        if run_dir.exists():
            argv = resume(run_dir)  # else the same command starts it again
    assert kills >= 2, log.read_text()
    assert finish(argv, log) == 0, log.read_text()
    assert_same_run(run_dir, uninterrupted(schedule))


class Killed(BaseException):
    """Ends a start at a chosen instant; nothing in the code handles it, as with SIGKILL."""


def new_log(directory):
    """The log of a run called "run", as a script makes it before it loads a model."""
    return RunLog(grpo.__file__, grpo.Args(output=str(directory), name="run"))


def begin(log):
    """Make a run's directory and its files, as a script does before its first step."""
    with log:
        pass


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "owner, function",
    [
        (Path, "mkdir"),
        (Path, "write_text"),
        (os, "rename"),
        (RunFiles, "create"),
        (RunFiles, "take_lock"),
        (RunFiles, "open"),
        (RunFiles, "write_environment"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_killed_while_it_begins_it_can_be_started_or_resumed(
    owner, function, when, tmp_path, monkeypatch
):
    original = getattr(owner, function)

    def killed(*args, **kwargs):
        if when == "after":
            original(*args, **kwargs)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, function, killed)
        begin(new_log(tmp_path / "runs"))
    run_dir = tmp_path / "runs" / "run"
    if run_dir.exists():
        assert parse(grpo.Args, grpo.__file__, resume(run_dir)).resume == str(run_dir)
    else:
        begin(new_log(tmp_path / "runs"))
        assert (run_dir / "args.json").exists()


def test_of_two_runs_with_one_name_the_second_is_refused(tmp_path):
    # Both have looked whether the name is free, and have loaded their models, before one of them
    # makes the directory.
    one, other = new_log(tmp_path / "runs"), new_log(tmp_path / "runs")
    begin(one)
    before = {path: path.read_bytes() for path in one.dir.rglob("*") if path.is_file()}
    with pytest.raises(BadInput, match="--name run"):
        begin(other)
    after = {path: path.read_bytes() for path in one.dir.rglob("*") if path.is_file()}
    assert after == before
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["run"]


def test_killed_while_it_writes_a_checkpoint_it_ends_the_same(place, uninterrupted, tmp_path):
    _, settings = place
    expected = uninterrupted((3, 2))
    run_dir, log = tmp_path / "killed", tmp_path / "log"
    argv = options(tmp_path, "killed", **settings, sync_interval=3, sync_offset=2)
    caught = 0
    for step in range(3, NUM_STEPS):
        process = start(argv, log)
        unfinished = run_dir / "checkpoints" / f"step_{step:06d}.unfinished"
        while not unfinished.exists() and process.exitcode is None:
            pass  # the file is there for some milliseconds only: look without a pause
        kill(process)
        caught += unfinished.exists()
        argv = resume(run_dir)
        if caught == 2:
            break
    assert caught, "each time the checkpoint was complete before the process was dead"
    assert finish(argv, log) == 0, log.read_text()
    assert_same_run(run_dir, expected)
    assert not list(run_dir.glob("checkpoints/*.unfinished"))


def test_unfinished_checkpoint_is_ignored_and_removed(place, uninterrupted, tmp_path):
    _, settings = place
    expected = uninterrupted((1, 0))
    run_dir = train(tmp_path, **{**settings, "num_steps": 3})
    complete = (run_dir / "checkpoints" / "step_000003.pt").read_bytes()
    for step, content in ((3, b""), (4, complete[: len(complete) // 2]), (99, b"not a checkpoint")):
        (run_dir / "checkpoints" / f"step_{step:06d}.unfinished").write_bytes(content)
    assert command(*resume(run_dir, "--num-steps", NUM_STEPS)) == 0
    assert_same_run(run_dir, expected)
    assert sorted(path.name for path in run_dir.glob("checkpoints/*")) == [
        "step_000006.pt",
        "step_000007.pt",
    ]


def test_killed_before_the_first_checkpoint_it_starts_over(place, uninterrupted, tmp_path):
    _, settings = place
    expected = uninterrupted((1, 0))
    run_dir, log = tmp_path / "killed", tmp_path / "log"
    process = start(options(tmp_path, "killed", **{**settings, "checkpoint_interval": 50}), log)
    wait_for(lambda: num_logged(run_dir) >= 3 or not process.is_alive())
    assert kill(process)
    assert not list(run_dir.glob("checkpoints/*"))
    assert finish(resume(run_dir), log) == 0, log.read_text()
    assert [record["step"] for record in metrics(run_dir)] == list(range(NUM_STEPS + 1))
    assert_same_run(run_dir, expected)


@pytest.mark.parametrize("schedule", [(1, 0), (3, 2), (1, 1)], ids=str)
def test_finished_run_extended_equals_a_longer_run(schedule, place, uninterrupted, tmp_path):
    _, settings = place
    expected = uninterrupted(schedule)
    sync = {"sync_interval": schedule[0], "sync_offset": schedule[1]}
    # Step 3 is an evaluation step of the long run, too: a run evaluates after its last step.
    run_dir = train(tmp_path, **{**settings, **sync, "num_steps": 3})
    shorter = (run_dir / "model" / "model.safetensors").read_bytes()
    assert command(*resume(run_dir, "--num-steps", NUM_STEPS)) == 0
    assert (run_dir / "model" / "model.safetensors").read_bytes() != shorter
    assert_same_run(run_dir, expected)


def test_finished_run_resumed_stays_as_it_is(place, uninterrupted, tmp_path):
    expected = uninterrupted((1, 0))
    run_dir = tmp_path / "run"
    shutil.copytree(expected, run_dir)
    assert command(*resume(run_dir)) == 0
    assert_same_run(run_dir, expected)
    assert len(metrics(run_dir)) == NUM_STEPS + 1


def test_what_was_logged_after_the_last_checkpoint_is_written_again(place, uninterrupted, tmp_path):
    _, settings = place
    expected = uninterrupted((1, 0))
    run_dir = train(tmp_path, **{**settings, "num_steps": 3})
    with open(run_dir / "metrics.jsonl", "a") as file:
        # two steps more, the second half-written
        file.write('{"step": 4, "reward/mean": 0.0}\n{"step": 5, "rew')
    for name in ("completions.jsonl", "rollouts.jsonl"):
        with open(run_dir / name, "a") as file:
            file.write('{"step": 4, "prompt": "')
    assert command(*resume(run_dir, "--num-steps", NUM_STEPS)) == 0
    assert_same_run(run_dir, expected)


SLOW_TASK = '''
import time
from dense import Digits


class Slow(Digits):
    """Takes its time, so that a signal meets a running step on a busy machine, too."""

    def reward(self, problem, response):
        time.sleep(0.08)
        return super().reward(problem, response)
'''


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_stop_signal_ends_with_a_checkpoint_and_says_how_to_go_on(
    number, place, uninterrupted, tmp_path
):
    _, settings = place
    expected = uninterrupted((3, 2))
    run_dir, log = tmp_path / "a run that's interrupted", tmp_path / "log"
    slow = f"{write_task(place[0], SLOW_TASK, 'slow.py')}:Slow"
    never = {"checkpoint_interval": 50, "sync_interval": 3, "sync_offset": 2, "task": slow}
    process = start(options(tmp_path, run_dir.name, **{**settings, **never}), log)
    wait_for(lambda: num_logged(run_dir) >= 3 or not process.is_alive())
    os.kill(process.pid, number)
    process.join(120)
    output = log.read_text()
    assert process.exitcode == 0, output
    assert "Traceback" not in output
    last_step = metrics(run_dir)[-1]["step"]
    assert 2 <= last_step < NUM_STEPS, "it came too late to interrupt anything"
    assert f"Stopped after step {last_step} of {NUM_STEPS}" in output
    # Said at the start and at the end
    first, hint = [line for line in output.splitlines() if "--resume" in line]
    assert first == hint
    # as a shell understands it
    assert shlex.split(hint) == ["python", "grpo.py", "--resume", str(run_dir)]
    assert [path.name for path in run_dir.glob("checkpoints/*")] == [f"step_{last_step:06d}.pt"]
    assert not (run_dir / "model").exists()
    assert finish(resume(run_dir), log) == 0, log.read_text()
    assert_same_run(run_dir, expected)


def test_one_command_begins_a_run_continues_it_and_leaves_it_alone(place, uninterrupted, tmp_path):
    _, settings = place
    expected = uninterrupted((1, 0))
    run_dir, log = tmp_path / "run", tmp_path / "log"
    slow = f"{write_task(place[0], SLOW_TASK, 'slow.py')}:Slow"
    own = {"checkpoint_interval": 50, "task": slow, "resume_if_exists": True}
    argv = options(tmp_path, **{**settings, **own})
    process = start(argv, log)
    wait_for(lambda: num_logged(run_dir) >= 3 or not process.is_alive())
    os.kill(process.pid, signal.SIGTERM)
    process.join(120)
    assert process.exitcode == STOPPED_EARLY, log.read_text()  # so `|| break` ends a loop
    assert metrics(run_dir)[-1]["step"] < NUM_STEPS, "it came too late to interrupt anything"
    assert finish(argv, log) == 0, log.read_text()
    assert_same_run(run_dir, expected)

    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    log.unlink()
    assert finish(argv, log) == 0
    assert log.read_text() == f"{run_dir} is complete: nothing to do.\n"
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before

    # If the task has changed, other seeds would be trained with another one now: that is said.
    copy, task = run_dir / "task" / "slow.py", (run_dir / "task" / "slow.py").read_text()
    copy.write_text(task + "# as it was\n")
    assert finish(argv, log) == 2
    assert f"slow.py differs from {copy}" in log.read_text()
    copy.write_text(task)

    # More steps are more to do; once it is stopped on the way, its model is none of the whole run.
    assert is_complete(run_dir, NUM_STEPS) and not is_complete(run_dir, NUM_STEPS + 1)
    argv = options(tmp_path, **{**settings, **own, "num_steps": 1000})
    process = start(argv, log)
    wait_for(lambda: num_logged(run_dir) >= NUM_STEPS + 3 or not process.is_alive())
    os.kill(process.pid, signal.SIGTERM)
    process.join(120)
    assert process.exitcode == STOPPED_EARLY, log.read_text()
    assert not is_complete(run_dir, NUM_STEPS) and (run_dir / "model").exists()


@pytest.mark.parametrize("reader", ["terminal", "pipe"])
def test_when_nobody_can_read_its_output_a_run_still_writes_its_checkpoint(
    reader, place, uninterrupted, tmp_path
):
    # A closed terminal sends SIGHUP, perhaps twice. Ctrl-C ends the "tee" of "2>&1 | tee log", too.
    # From then on, whatever is printed is an error.
    _, settings = place
    expected = uninterrupted((1, 0))
    run_dir = tmp_path / "run"
    slow = f"{write_task(place[0], SLOW_TASK, 'slow.py')}:Slow"
    argv = [
        sys.executable,
        grpo.__file__,
        *options(tmp_path, **{**settings, "checkpoint_interval": 50, "task": slow}),
    ]
    if reader == "terminal":
        pid, terminal = pty.fork()
        if pid == 0:
            os.execv(sys.executable, argv)
        wait_for(lambda: num_logged(run_dir) >= 3)
        os.close(terminal)
    else:
        run = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        wait_for(lambda: num_logged(run_dir) >= 3)
        pid = run.pid
        run.stdout.close()
        run.send_signal(signal.SIGINT)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) in (0, 1, 120)
    last_step = metrics(run_dir)[-1]["step"]
    assert last_step < NUM_STEPS and [path.stem for path in run_dir.glob("checkpoints/*")] == [
        f"step_{last_step:06d}"
    ]
    assert command(*resume(run_dir)) == 0
    assert_same_run(run_dir, expected)


SELF_INTERRUPTING = '''
import os, signal
from dense import Digits


class Interrupting(Digits):
    """Presses Ctrl-C while the {call}th response is graded, the first time the run gets there."""
    calls = 0

    def reward(self, problem, response):
        Interrupting.calls += 1
        if Interrupting.calls == {call} and os.path.exists({marker!r}):
            os.unlink({marker!r})
            os.kill(os.getpid(), signal.SIGINT)
        return super().reward(problem, response)
'''


@pytest.mark.parametrize(
    "step, call", [(1, 2), (2, 4 + 16 + 9)], ids=["first_evaluation", "step_2"]
)
def test_ctrl_c_at_any_stage_promises_only_what_it_did(
    step, call, place, uninterrupted, tmp_path, capsys, monkeypatch
):
    directory, settings = place
    expected = uninterrupted((1, 0))
    marker = tmp_path / "marker"
    marker.touch()
    monkeypatch.syspath_prepend(directory)
    task = write_task(tmp_path, SELF_INTERRUPTING.format(call=call, marker=str(marker)))
    run_dir = train(
        tmp_path, **{**settings, "task": f"{task}:Interrupting", "checkpoint_interval": 50}
    )
    output = capsys.readouterr().out
    assert not marker.exists()
    assert [record["step"] for record in metrics(run_dir)] == list(range(step + 1))
    assert f"python grpo.py --resume {run_dir}" in output
    assert ("there is a checkpoint" in output) == (len(list(run_dir.glob("checkpoints/*.pt"))) == 1)
    assert command(*resume(run_dir)) == 0
    assert_same_run(run_dir, expected)


def test_second_ctrl_c_stops_at_once(place, tmp_path):
    _, settings = place
    run_dir, log = tmp_path / "interrupted", tmp_path / "log"
    # Steps of some seconds each, so that it is clear what "at once" means.
    slow = {
        "num_steps": 50,
        "max_response_tokens": 400,
        "prompts_per_step": 16,
        "max_tokens_per_microbatch": 2000,
    }
    process = start(options(tmp_path, "interrupted", **{**settings, **slow}), log)
    wait_for(lambda: num_logged(run_dir) >= 1 or not process.is_alive())
    os.kill(process.pid, signal.SIGINT)
    wait_for(lambda: "press Ctrl-C again" in log.read_text() or not process.is_alive())
    os.kill(process.pid, signal.SIGINT)
    process.join(120)
    assert process.exitcode not in (0, None)
    assert num_logged(run_dir) == 1 and not list(run_dir.glob("checkpoints/*"))


# Not the run that it was


def test_a_run_that_is_alive_is_not_resumed(place, tmp_path, capsys):
    _, settings = place
    run_dir, log = tmp_path / "alive", tmp_path / "log"
    process = start(options(tmp_path, "alive", **{**settings, "num_steps": 10_000}), log)
    wait_for(lambda: num_logged(run_dir) >= 3 or not process.is_alive())
    assert command(*resume(run_dir)) == 2
    assert f"--resume {run_dir}: another process" in capsys.readouterr().err
    assert kill(process)
    assert [record["step"] for record in metrics(run_dir)] == list(range(num_logged(run_dir)))
    done = checkpoints_of(run_dir)[-1]
    assert command(*resume(run_dir, "--num-steps", done)) == 0  # kill -9 has released it


@pytest.fixture
def short_run(place, tmp_path):
    """A run of three steps, with checkpoints after the second and the third."""
    return train(tmp_path, **{**place[1], "num_steps": 3})


def flip_a_bit(content):
    place = content.index(b"PK\x03\x04", len(content) // 2) - 5000  # within a tensor
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        flip_a_bit,
    ],
    ids=["empty", "half", "last_byte", "one_bit"],
)
def test_a_damaged_checkpoint_is_named(damage, short_run, uninterrupted, capsys):
    newest = short_run / "checkpoints" / "step_000003.pt"
    newest.write_bytes(damage(newest.read_bytes()))
    before = (short_run / "metrics.jsonl").read_bytes()
    assert command(*resume(short_run, "--num-steps", NUM_STEPS)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert f"--resume: {newest} cannot be read (" in line and line.endswith(
        "to continue from step_000002.pt."
    )
    assert (short_run / "metrics.jsonl").read_bytes() == before
    newest.unlink()
    assert command(*resume(short_run, "--num-steps", NUM_STEPS)) == 0
    assert_same_run(short_run, uninterrupted((1, 0)))


@pytest.mark.parametrize("name", ["metrics.jsonl", "completions.jsonl", "rollouts.jsonl"])
@pytest.mark.parametrize("damage", ["deleted", "cut"])
def test_a_log_that_was_cut_is_not_filled_up(damage, name, short_run, capsys):
    lines = (short_run / name).read_bytes().splitlines(keepends=True)
    kept = b"" if damage == "deleted" else lines[0]
    (short_run / name).write_bytes(kept if damage == "deleted" else kept + lines[1][:-9])
    if damage == "deleted":
        (short_run / name).unlink()
    assert command(*resume(short_run, "--num-steps", 4)) == 0
    assert f"{short_run / name} is shorter than at the checkpoint" in capsys.readouterr().err
    content = (short_run / name).read_bytes()
    assert content.startswith(kept) and b"\0" not in content
    assert {json.loads(line)["step"] for line in content[len(kept) :].splitlines()} == {4}


def checkpoints_of(run_dir):
    """The steps of its checkpoints."""
    return sorted(int(path.stem[len("step_") :]) for path in run_dir.glob("checkpoints/*.pt"))


def refused_resume(run_dir, capsys):
    capsys.readouterr()
    assert command(*resume(run_dir, "--num-steps", NUM_STEPS)) == 2
    return capsys.readouterr().err.splitlines()[-1]


FROM_A_FILE = """
import json
from pathlib import Path
from dense import Digits


class FromAFile(Digits):
    def problems(self, split):
        return json.loads(Path({path!r}).read_text())[split]
"""


@pytest.mark.parametrize("change", ["fewer problems", "other prompts", "other answers"])
def test_other_problems_are_refused(change, place, tmp_path, capsys, monkeypatch):
    directory, settings = place
    monkeypatch.syspath_prepend(directory)
    path = tmp_path / "problems.json"
    problems = [{"prompt": f"Q: {n}", "answer": n} for n in range(9)]
    path.write_text(json.dumps({"train": problems, "eval": [{"prompt": "Q: 99"}]}))
    task = f"{write_task(tmp_path, FROM_A_FILE.format(path=str(path)))}:FromAFile"
    run_dir = train(tmp_path, **{**settings, "task": task, "num_steps": 3, "sync_interval": 4})
    if change == "fewer problems":
        problems.pop()
    else:
        problems[0]["prompt" if change == "other prompts" else "answer"] = "Q: 10"
    path.write_text(json.dumps({"train": problems, "eval": [{"prompt": "Q: 99"}]}))
    before = (run_dir / "metrics.jsonl").read_bytes()
    assert "the training problems differ" in refused_resume(run_dir, capsys)
    assert (run_dir / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("changed", ["task", "script"])
def test_other_code_is_refused(changed, place, tmp_path, capsys):
    _, settings = place
    task = write_task(tmp_path, (Path(settings["task"].rpartition(":")[0])).read_text())
    script = shutil.copy(REPOSITORY / "grpo.py", tmp_path / "mine.py")
    module = import_script(script)
    settings = {**settings, "task": f"{task}:Digits", "num_steps": 1}
    assert command(*options(tmp_path, **settings), module=module) == 0
    run_dir, path = tmp_path / "run", {"task": task, "script": script}[changed]
    before = path.read_text()
    edit, first = {
        "task": (("return sum(", "return -sum("), 12),
        "script": (("algorithm", "another algorithm"), 1),
    }[changed]
    path.write_text(before.replace(*edit, 1))
    files = {file: file.read_bytes() for file in run_dir.rglob("*") if file.is_file()}
    capsys.readouterr()
    assert command(*resume(run_dir, "--num-steps", 2), module=module) == 2
    (line,) = capsys.readouterr().err.splitlines()
    copy = run_dir / changed / path.name
    assert f"{path} differs from {copy}, with which the run began, first in line {first}: " in line
    assert f"restore it (cp {copy} {path}) or, to go on" in line
    assert f"accept it (cp {path} {copy})." in line
    assert {file: file.read_bytes() for file in run_dir.rglob("*") if file.is_file()} == files
    after = path.read_text()
    shutil.copy(copy, path)
    assert path.read_text() == before
    assert command(*resume(run_dir, "--num-steps", 2), module=module) == 0
    path.write_text(after)
    shutil.copy(path, copy)
    assert command(*resume(run_dir, "--num-steps", 3), module=module) == 0
    assert f"sha256 of {changed}/{path.name}: " in capsys.readouterr().err  # other conditions


def test_another_model_under_the_same_path_is_refused(place, tmp_path, capsys):
    _, settings = place
    model = build_model("qwen2", tmp_path / "model")
    run_dir = train(tmp_path, **{**settings, "model": model, "num_steps": 1})
    build_model("qwen2", tmp_path / "model", seed=1)
    assert "the model differ" in refused_resume(run_dir, capsys)
    build_model("qwen2", tmp_path / "model", intermediate_size=96)
    assert "the model differ" in refused_resume(run_dir, capsys)


def test_relative_paths_are_those_of_the_start(place, uninterrupted, tmp_path, monkeypatch):
    _, settings = place
    expected = uninterrupted((1, 0))
    task, model = Path(settings["task"].rpartition(":")[0]), Path(settings["model"])
    shutil.copy(task, tmp_path / "task.py")
    shutil.copytree(model, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    argv = options(
        "runs", **{**settings, "task": "task.py:Digits", "model": "model", "num_steps": 3}
    )
    assert command(*argv) == 0
    monkeypatch.chdir(tmp_path / "runs")
    assert command(*resume("run", "--num-steps", NUM_STEPS)) == 0
    assert_same_run("run", expected)


# Files that cannot be written

FULL_DISK = '''
import os
import resource
from dense import Digits


class Full(Digits):
    """After {calls} rewards no file may grow beyond {limit} bytes, as if the disk were full."""
    calls = 0

    def reward(self, problem, response):
        Full.calls += 1
        if Full.calls == {calls} and not os.environ.get("ROOM"):
            resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
        return super().reward(problem, response)
'''


@pytest.mark.parametrize(
    "limit, what", [(30_000, "checkpoints/step_000003.pt"), (200, "File too large")]
)
def test_a_full_disk_is_said_in_one_line(limit, what, place, uninterrupted, tmp_path, monkeypatch):
    directory, settings = place
    expected = uninterrupted((1, 0))
    monkeypatch.setenv("PYTHONPATH", f"{REPOSITORY}:{directory}")
    # within the third step
    task = write_task(tmp_path, FULL_DISK.format(calls=4 + 2 * 16 + 1, limit=limit))
    argv = options(tmp_path, **{**settings, "task": f"{task}:Full"})
    run_dir = tmp_path / "run"
    ended = run_module("grpo", *argv)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert (
        "grpo.py: error: " in ended.stderr.splitlines()[-1]
        and what in ended.stderr.splitlines()[-1]
        and ended.stderr.splitlines()[-1].endswith(": make room, and go on with --resume.")
    )
    assert {path.name for path in run_dir.glob("checkpoints/*")} == {
        "step_000001.pt",
        "step_000002.pt",
    }
    monkeypatch.setenv("ROOM", "1")
    monkeypatch.syspath_prepend(directory)
    assert command(*resume(run_dir)) == 0
    assert_same_run(run_dir, expected)


FULL_IN_THE_END = """
import os
import resource
from dense import Digits


class Full(Digits):
    def problems(self, split):
        if os.environ.get("FULL"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, 8_000))
        return super().problems(split)
"""


@pytest.mark.parametrize(("lora_rank", "name"), [(0, "model"), (4, "adapter")])
def test_a_disk_that_is_full_in_the_end(lora_rank, name, place, tmp_path, monkeypatch):
    directory, settings = place
    monkeypatch.setenv("PYTHONPATH", f"{REPOSITORY}:{directory}")
    monkeypatch.syspath_prepend(directory)
    task = f"{write_task(tmp_path, FULL_IN_THE_END)}:Full"
    run_dir = train(tmp_path, **{**settings, "task": task, "num_steps": 1, "lora_rank": lora_rank})
    expected = (run_dir / "model" / "model.safetensors").read_bytes()
    for saved in (run_dir / "model", run_dir / "adapter"):
        shutil.rmtree(saved, ignore_errors=True)
    monkeypatch.setenv("FULL", "1")
    ended = run_module("grpo", *resume(run_dir))
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    line = ended.stderr.splitlines()[-1]
    assert f"{run_dir / name} cannot be written (" in line
    assert line.endswith(": make room, and go on with --resume.")
    monkeypatch.delenv("FULL")
    assert command(*resume(run_dir)) == 0
    assert (run_dir / "model" / "model.safetensors").read_bytes() == expected


def test_moved_run_can_be_resumed(place, uninterrupted, tmp_path):
    _, settings = place
    expected = uninterrupted((1, 0))
    train(tmp_path, "before", **{**settings, "num_steps": 3})
    (tmp_path / "before").rename(tmp_path / "after")
    assert command(*resume(tmp_path / "after", "--num-steps", NUM_STEPS)) == 0
    assert not (tmp_path / "before").exists()
    assert_same_run(tmp_path / "after", expected)


def test_resume_with_another_number_of_threads_warns(place, tmp_path, capsys):
    _, settings = place
    tiny = {
        "num_steps": 1,
        "prompts_per_step": 1,
        "group_size": 2,
        "eval_size": 1,
        "max_response_tokens": 1,
    }
    run_dir = train(tmp_path, **{**settings, **tiny})
    assert command(*resume(run_dir, "--num-steps", 2)) == 0
    assert "last bits may differ" not in capsys.readouterr().err
    try:
        assert command(*resume(run_dir, "--num-steps", 3, "--threads", 2)) == 0
    finally:
        torch.set_num_threads(1)
    (line,) = [
        line for line in capsys.readouterr().err.splitlines() if "last bits may differ" in line
    ]
    assert "threads: 2" in line
    environment = (run_dir / "environment.txt").read_text()
    assert environment.count("threads: 1") == 2 and environment.count("threads: 2") == 1


@pytest.mark.parametrize("keep, kept", [(1, [5]), (2, [4, 5]), (3, [3, 4, 5])])
def test_the_newest_checkpoints_are_kept(keep, kept, place, tmp_path, monkeypatch):
    _, settings = place
    monkeypatch.setattr(checkpoints, "KEEP", keep)
    run_dir = train(tmp_path, **{**settings, "num_steps": 5, "max_response_tokens": 2})
    assert sorted(path.name for path in run_dir.glob("checkpoints/*")) == [
        f"step_{step:06d}.pt" for step in kept
    ]
    assert [checkpoint(run_dir, step)["log"]["step"] for step in kept] == kept


def test_checkpoints_come_at_the_interval_and_at_the_end(place, tmp_path, monkeypatch):
    _, settings = place
    monkeypatch.setattr(checkpoints, "KEEP", 9)
    more = {"num_steps": 5, "checkpoint_interval": 2, "max_response_tokens": 2}
    run_dir = train(tmp_path, **{**settings, **more})
    assert sorted(path.stem for path in run_dir.glob("checkpoints/*")) == [
        "step_000002",
        "step_000004",
        "step_000005",
    ]


def test_elapsed_time_goes_on_where_it_was(place, tmp_path):
    _, settings = place
    run_dir = train(tmp_path, **{**settings, "num_steps": 2, "max_response_tokens": 2})
    assert command(*resume(run_dir, "--num-steps", 4)) == 0
    hours = [record["time/elapsed_hours"] for record in steps(run_dir)]
    seconds = [record["time/step"] for record in steps(run_dir)]
    assert hours == sorted(hours)
    assert hours[-1] * 3600 == pytest.approx(sum(seconds), rel=1e-6)


def test_a_rank_loads_only_what_rank_0_loads(tmp_path, monkeypatch):
    """Even where its `--output` happens to be a run's directory, with checkpoints in it."""
    run = train(tmp_path, task=dense_task(tmp_path), num_steps=1)
    assert list((run / "checkpoints").glob("*.pt"))
    monkeypatch.setattr(checkpoints, "broadcast", lambda paths: [])  # rank 0 begins a new run
    log = SilentLog(grpo.Args(output=str(run)))
    problems = types.SimpleNamespace(checksum=lambda: 0)
    policy = torch.nn.Linear(1, 1)
    rank = checkpoints.Checkpoints(log, policy, None, None, problems, problems)
    rank.load_newest()  # what is in `run` does not fit this model
    assert log.step == 0


def test_a_fused_optimizer_as_on_a_gpu_resumes_bit_for_bit(place, tmp_path, monkeypatch):
    adamw = torch.optim.AdamW

    def fused(parameters, **options):
        return adamw(parameters, **(options | {"fused": True}))  # PyTorch has one for CPUs, too

    monkeypatch.setattr(torch.optim, "AdamW", fused)
    settings = place[1] | {"eval_interval": 1}  # also where the first part ends
    train(tmp_path, "whole", **(settings | {"num_steps": 4}))
    train(tmp_path, "part", **(settings | {"num_steps": 2}))
    assert command(*resume(tmp_path / "part", "--num-steps", 4)) == 0
    assert_same_run(tmp_path / "part", tmp_path / "whole")
