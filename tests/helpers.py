"""Runs of the scripts for the end-to-end tests: in this process, or in one of their own that a test
may kill.

Importing torch and transformers takes seconds, so processes are forked from a server that has
imported them and done nothing else (`multiprocessing`'s forkserver). Each is a real process, with a
command line, signals and an exit code.
"""

import contextlib
import importlib.util
import json
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch

import grpo
from common import commandline, runlog
from common.curves import read_metrics

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

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""the chat template of many models"""

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
sampling/test_process.py
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


def copy_to_publish(directory, *own):
    """Copy what README.md says to into a new directory: files of one's own, and what all need."""
    readme = " ".join((REPOSITORY / "README.md").read_text().split())
    listed = re.search(r"copy the script, the task's file, ([^;]*); they need nothing else", readme)
    names = re.findall("`([^`]+)`", listed[1])
    assert set(names) == {"common/", "requirements.txt", "LICENSE"}
    directory.mkdir()
    for path in (*own, *(REPOSITORY / name for name in names)):
        if path.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "results")
            shutil.copytree(path, directory / path.name, ignore=ignored)
        else:
            shutil.copy(path, directory)


def load_weights(model, state):
    """The weights of a checkpoint, which has tied ones once."""
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= set(model.all_tied_weights_keys)


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
    process = _server().Process(target=function, args=arguments, daemon=daemon)
    process.start()
    return process


def _server():
    """`multiprocessing`'s context whose processes are forked from the server, which is running."""
    state = forkserver._forkserver
    if state._forkserver_address and state._forkserver_pid is None:
        state.ensure_running = lambda: None  # in a process forked from it; it would start another
        return _processes
    with pytest.MonkeyPatch.context() as patch:
        # Python 3.11 gives the server no other import path
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        _processes.set_forkserver_preload(PRELOADED)
        forkserver.ensure_running()  # the first time only
    return _processes


def run_module(module, *argv, cwd=REPOSITORY, environment=None):
    """`python -m module …` in a process of its own, forked; returns what `subprocess.run` does."""
    ours, theirs = zip(*(multiprocessing.Pipe(duplex=False) for _ in range(2)), strict=True)
    said = ["", ""]

    def read(number):
        with open(ours[number].fileno(), encoding="utf-8", closefd=False) as file:
            said[number] = file.read()

    environment = dict(os.environ if environment is None else environment)
    words = [str(word) for word in argv]
    process = forked(_module, module, words, str(cwd), environment, theirs, daemon=False)
    readers = [threading.Thread(target=read, args=(number,)) for number in range(2)]
    for end, reader in zip(theirs, readers, strict=True):
        end.close()
        reader.start()
    for each in (*readers, process):
        each.join(120)
    assert process.exitcode is not None, f"still running after two minutes: {said}"
    return types.SimpleNamespace(returncode=process.exitcode, stdout=said[0], stderr=said[1])


def _module(module, argv, cwd, environment, ends):
    for number, end in enumerate(ends, start=1):
        os.dup2(end.fileno(), number)
        end.close()
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    os.chdir(cwd)
    _take(environment)
    sys.argv = [module, *argv]
    sys.modules.pop(module, None)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


@contextlib.contextmanager
def forked_samplers():
    """Inside, the sampler's process is forked from the server, too, instead of spawned, which takes
    seconds of imports. All else about it is the same: its arguments are pickled, its memory shared.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.multiprocessing, "get_context", lambda method: _server())
        yield


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


FAMILIES = [f"transformers.models.{name}.modeling_{name}" for name in ("qwen2", "qwen3")]
PRELOADED = ["grpo", "matplotlib.pyplot", "pytest", "torch.distributed.run", *FAMILIES]
PRELOADED += ["torch.distributed.checkpoint", "torch.distributed.fsdp"]
"""modules that the server imports, for all of the processes forked from it"""

_processes = multiprocessing.get_context("forkserver")


def _script(argv, log):
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [grpo.__file__, *argv]
    runlog.plot_curves = lambda records, title, path: None  # as in the tests' own process
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


class Forked:
    """What `subprocess.Popen` is of a command, of a function in a process forked from the server.

    Its output goes to the file `log`. It has a session of its own, the environment `environment`,
    and Ctrl-C interrupts it.
    """

    def __init__(self, function, argv, log, environment):
        words = [str(word) for word in argv]
        self.process = forked(_leader, function, words, str(log), dict(environment), daemon=False)
        self.process._config["daemon"] = True  # it may have children, but ends with the tests
        self.pid = self.process.pid

    def poll(self):
        return self.returncode

    @property
    def returncode(self):
        return self.process.exitcode

    def wait(self, seconds=None):
        self.process.join(seconds)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a forked process", seconds)
        return self.returncode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def _leader(function, argv, log, environment):
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _take(environment)
    function(argv, log)


def _take(environment):
    """Give this process an environment, as far as it is not too late for that."""
    os.environ.clear()
    os.environ.update(environment)
    if paths := environment.get("PYTHONPATH"):
        sys.path[:0] = paths.split(os.pathsep)


class Run:
    """`python grpo.py …` in a process group of its own, with whatever processes it starts.

    It is forked, which saves seconds of imports; `afresh`, it is that very command. The sampler's
    process is spawned in any case.
    """

    def __init__(self, argv, log, afresh=False):
        self.log = Path(log)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if not afresh:
            self.trainer = Forked(_script, argv, log, environment)
            return
        with open(log, "ab") as file:
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
