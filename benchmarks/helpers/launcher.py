"""Runs training scripts: one and wait, or several at a time, continuing where an earlier call was
stopped.
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]

# `kill -9` leaves the launcher no chance to stop its runs, which would go on and meet those of the
# next call. So each run asks Linux to be killed when its parent dies (option 1 of prctl), looks
# whether that has happened already, and only then becomes the training script. Not in Popen's
# `preexec_fn`, which may deadlock where there are threads.
LEAVE_WITH_PARENT = """
import ctypes, os, signal, sys
parent, *command = sys.argv[1:]
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != int(parent):
        sys.exit()
os.execv(command[0], command)
"""
LIMITS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")


@dataclass
class Run:
    """One run of a training script; its directory is `directory/name`."""

    name: str
    script: str
    """path without .py, as seen from the repository's root"""
    options: list[str]
    """command-line options besides --num-steps, --output and --name"""


def as_options(values):
    """A dict as command-line options; True and False switch a flag on and off."""
    words = {key.replace("_", "-"): value for key, value in values.items()}
    flags = {True: "--{}", False: "--no-{}"}
    return [
        flags[value].format(key) if isinstance(value, bool) else f"--{key}={value}"
        for key, value in words.items()
    ]


def torchrun(ranks):
    """What stands before a script on the command line of Python, to run it on several ranks;
    nothing for one.
    """
    return ["-m", "torch.distributed.run", "--nproc-per-node", ranks] if ranks > 1 else []


def run_once(command, threads=0):
    """Run Python with this command line in the repository's root. If it fails, exits with the end
    of its output.

    `threads`, unless 0, is how many every library gets that has threads of its own.
    """
    command = [sys.executable, *map(str, command)]
    limits = dict.fromkeys(LIMITS, str(threads)) if threads else {}
    environment = os.environ | limits
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def train(script, directory, name, ranks=1, threads=0, **options):
    """Run a training script from start to end, on several ranks under torchrun; returns the
    directory of its run. `threads` are those of each process; 0 for the script's default.
    """
    options |= {"output": directory, "name": name} | ({"threads": threads} if threads else {})
    run_once([*torchrun(ranks), f"{script}.py", *as_options(options)], threads)
    return Path(directory) / name


def run_all(runs, num_steps, directory, jobs):
    """Bring every run to `num_steps` steps, `jobs` at a time; finished ones are left alone, begun
    ones are resumed.

    Shows one progress bar over all steps. When a run fails, stops the others and exits with the end
    of its output.
    """
    # A plain `kill` ends Python without any `finally`; the runs would go on and meet those of
    # the next call.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Stopped; the same command continues."))
    directory = directory.resolve()  # the runs start in the repository's root
    directory.mkdir(parents=True, exist_ok=True)
    waiting = [run for run in runs if not _is_finished(directory / run.name, num_steps)]
    active = {}
    with tqdm(total=len(runs) * num_steps, unit="step", dynamic_ncols=True) as bar:
        try:
            while waiting or active:
                while waiting and len(active) < jobs:
                    run = waiting.pop(0)
                    active[run.name] = _start(run, num_steps, directory)
                bar.set_postfix_str(", ".join(active))
                bar.update(sum(_steps_done(directory / run.name) for run in runs) - bar.n)
                time.sleep(0.5)
                for name, process in list(active.items()):
                    if process.poll() is not None:
                        del active[name]
                    if process.poll():
                        end = (directory / f"{name}.log").read_text()[-3000:]
                        sys.exit(f"{name} failed:\n{end}")
            bar.update(bar.total - bar.n)
        finally:
            for process in active.values():
                process.terminate()
            for process in active.values():
                process.wait()  # for its checkpoint: it would be killed with this process


def _start(run, num_steps, directory):
    command = [sys.executable, "-c", LEAVE_WITH_PARENT, str(os.getpid())]
    command += [sys.executable, f"{run.script}.py", "--num-steps", str(num_steps), *run.options]
    if (directory / run.name / "args.json").exists():
        # The script refuses if the options are not those of that run.
        command += ["--resume", str(directory / run.name)]
    else:
        command += ["--output", str(directory), "--name", run.name]
    # Scripts elsewhere need common/.
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    to_log = {"env": {**os.environ, "PYTHONPATH": path}, "stderr": subprocess.STDOUT}
    with open(directory / f"{run.name}.log", "a") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, **to_log)


def _is_finished(run_dir, num_steps):
    return (run_dir / "model").exists() and _steps_done(run_dir) == num_steps


def _steps_done(run_dir):
    metrics = run_dir / "metrics.jsonl"
    if not metrics.exists():
        return 0
    return max(0, metrics.read_bytes().count(b"\n") - 1)  # the first line is step 0
