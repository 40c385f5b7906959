"""Runs of the scripts for the end-to-end tests: in this process, or in one of their own that a test
may kill.

Importing torch and transformers takes seconds, so processes are forked from a server that has
imported them and done nothing else (`multiprocessing`'s forkserver). Each is a real process, with a
command line, signals and an exit code.
"""

import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch

import grpo
from common import commandline
from common.runlog import read_metrics

REPOSITORY = Path(grpo.__file__).resolve().parent

# The reward of random text is hardly ever constant within a group, so that every step has something
# to learn from.
DENSE_TASK = '''
"""Rewards the share of digits in a response."""
from common.tasks import Task


class Digits(Task):
    def problems(self, split):
        first, count = {"train": (10, 40), "eval": (100, self.eval_size)}[split]
        return [{"prompt": f"Q: {n}+{7 * n % 90}\\nA:"} for n in range(first, first + count)]

    def reward(self, problem, response):
        return sum(character.isdigit() for character in response) / max(1, len(response))
'''

SMALL = {
    "num_steps": 2,
    "prompts_per_step": 4,
    "group_size": 4,
    "max_response_tokens": 16,
    "eval_size": 4,
    "eval_interval": 100,
    "checkpoint_interval": 100,
    "serial": True,
    "threads": 1,
    "device": "cpu",
    "learning_rate": 2e-4,  # which a model other than the bundled one needs to be told
}
"""settings of a run that takes a second; the sampler's own process takes seconds to start, see
test_overlap.py
"""


def write_task(directory, text, name="task.py"):
    """Write a task file; returns its path."""
    path = Path(directory) / name
    path.write_text(text)
    return path


def dense_task(directory):
    """A task that gives a learning signal at every step, as a value of `--task`."""
    return f"{write_task(directory, DENSE_TASK, 'dense.py')}:Digits"


def train(output, name="run", script="grpo", **settings):
    """Run a script's `main` in this process, `SMALL` but for the settings given; returns the run's
    directory.
    """
    settings = {**SMALL, "output": output, "name": name, **settings}
    settings = {
        key: str(value) if isinstance(value, Path) else value for key, value in settings.items()
    }
    module = importlib.import_module(script)
    args = module.Args(**settings)
    commandline.check(args)
    module.main(args)
    return Path(output) / name


def options(output, name="run", **settings):
    """The same as a command line, a list of strings."""
    return as_options({**SMALL, "output": str(output), "name": name, **settings})


def as_options(settings):
    """{"num_steps": 3, "reference_kl": False} → ["--num-steps", "3", "--no-reference-kl"]"""
    words = []
    for field, value in settings.items():
        option = field.replace("_", "-")
        words += (
            ([f"--{option}"] if value else [f"--no-{option}"]) if isinstance(value, bool) else []
        )
        words += [] if isinstance(value, bool) else [f"--{option}", str(value)]
    return words


def resume(run_dir, *more):
    """The command line that continues a run, a list of strings."""
    return ["--resume", str(run_dir), *map(str, more)]


def command(*argv, module=grpo):
    """What `python grpo.py …`, or another command, does in this process: returns the exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__file__, *map(str, argv)])
        try:
            commandline.run(module.main, module.Args, module.__file__)
        except SystemExit as ended:
            return ended.code
    return 0


def start(argv, log):
    """Start `python grpo.py …` as a process, its output in the file `log`; returns a
    `multiprocessing.Process`.
    """
    return forked(_script, [str(word) for word in argv], str(log))


def forked(function, *arguments, daemon=True):
    """Start a process that calls a function; returns a `multiprocessing.Process`. A daemon has no
    children.
    """
    with pytest.MonkeyPatch.context() as patch:
        # Python 3.11 gives the server no other import path
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        _processes.set_forkserver_preload(["grpo", "matplotlib.pyplot", "pytest"])
        forkserver.ensure_running()  # the first time only
    process = _processes.Process(target=function, args=arguments, daemon=daemon)
    process.start()
    return process


def import_script(path):
    """A training script, by name or path, as a module."""
    path = Path(path)
    if path.suffix != ".py":
        return importlib.import_module(str(path))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # where its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


_processes = multiprocessing.get_context("forkserver")


def _script(argv, log):
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [grpo.__file__, *argv]
    commandline.run(grpo.main, grpo.Args, grpo.__file__)


def finish(argv, log, seconds=120):
    """`start`, wait for the end, and return the exit code."""
    process = start(argv, log)
    process.join(seconds)
    assert process.exitcode is not None, f"still running after {seconds} s: {Path(log).read_text()}"
    return process.exitcode


def wait_for(condition, seconds=120):
    """Wait until `condition()`; returns its value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"nothing happened in {seconds} s"
        time.sleep(0.002)
    return value


def num_logged(run_dir):
    """How many complete lines `metrics.jsonl` has: one for the first evaluation, one per step."""
    path = Path(run_dir) / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def metrics(run_dir, timings=False):
    """The records of `metrics.jsonl`; without the measured times, rates and memory, which differ
    from run to run.
    """
    measured = ("time/", "throughput/", "memory/")
    records = read_metrics(run_dir)
    return [{k: v for k, v in r.items() if timings or not k.startswith(measured)} for r in records]


def rollouts(run_dir):
    """The records of `rollouts.jsonl`."""
    return [
        json.loads(line) for line in (Path(run_dir) / "rollouts.jsonl").read_text().splitlines()
    ]


def steps(run_dir):
    """The records of `metrics.jsonl` from step 1 on."""
    return [record for record in metrics(run_dir, timings=True) if record["step"] > 0]


def checkpoint(run_dir, step):
    return torch.load(Path(run_dir) / "checkpoints" / f"step_{step:06d}.pt", weights_only=True)


def assert_same_run(run_dir, other):
    """Bit for bit: metrics, completions, recorded rollouts and final weights."""
    for record, expected in zip(metrics(run_dir), metrics(other), strict=True):
        assert record == expected
    for name in ("completions.jsonl", "rollouts.jsonl", "model/model.safetensors"):
        same = (Path(run_dir) / name).read_bytes() == (Path(other) / name).read_bytes()
        # without pytest's diff, which takes minutes
        assert same, f"{name} differs between {run_dir} and {other}"


class Run:
    """`python grpo.py …` in a process group of its own, with whatever processes it starts."""

    def __init__(self, argv, log):
        self.log = Path(log)
        with open(log, "ab") as file:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            self.trainer = subprocess.Popen(
                [sys.executable, str(REPOSITORY / "grpo.py"), *map(str, argv)], stdout=file,
                stderr=file, stdin=subprocess.DEVNULL, start_new_session=True, env=environment,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )  # fmt: skip

    def members(self):
        """Process ids of the group and their parents'; the dead that nobody has read yet are left
        out.
        """
        found = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, parent, group = path.read_text().rpartition(")")[2].split()[:3]
            except OSError:
                continue
            if int(group) == self.trainer.pid and state != "Z":
                found[int(path.parent.name)] = int(parent)
        return found

    def sampler(self):
        """The sampler's process id; waits until there is one."""

        def look():
            for pid, parent in self.members().items():
                try:
                    arguments = Path(f"/proc/{pid}/cmdline").read_bytes()
                except OSError:
                    continue
                if parent == self.trainer.pid and b"spawn_main" in arguments:
                    return pid
            assert self.trainer.poll() is None, self.log.read_text()
            return None

        return wait_for(look)

    def end(self, seconds=120, grace=5):
        """Wait for the trainer's end; returns its exit code, once its group has no process left."""
        code = self.trainer.wait(seconds)
        deadline = time.monotonic() + grace
        while self.members():
            assert time.monotonic() < deadline, f"left behind: {self.members()}"
            time.sleep(0.02)
        return code


def kill(pid):
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True
