"""From the command line to `main(args)`: parsing, checks, resuming, Ctrl-C, and error messages."""

import argparse
import contextlib
import dataclasses
import json
import signal
import sys
import types
from pathlib import Path

import tyro

# What a resumed run may change: none of these changes what an update is.
CHANGEABLE = {"resume", "num_steps", "eval_interval", "checkpoint_interval", "threads", "sampler_timeout"}
CHANGEABLE |= {"track", "wandb_project"}


class BadInput(Exception):
    """Something the user gave cannot work. The message is one sentence: it names the option and says what to do."""


class RunStopped(Exception):
    """The run cannot go on, for the reason in the message; everything up to its last checkpoint is intact."""


def run(main, Args, script):
    """Parse the command line into `Args` and call `main(args)`.

    `BadInput` ends in a one-line message and exit code 2, `RunStopped` in one and exit code 1.
    """
    try:
        args = parse(Args, script, sys.argv[1:])
        check(args)
        main(args)
    except (BadInput, RunStopped) as error:
        message = " ".join(str(error).split())  # messages of libraries, quoted in ours, may have several lines
        print(f"{Path(script).name}: error: {message}", file=sys.stderr)
        sys.exit(2 if isinstance(error, BadInput) else 1)


def parse(Args, script, argv):
    """Parse `argv`. With `--resume RUN_DIR`, the arguments saved there are the defaults and must not be contradicted.

    Raises `BadInput`.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--resume")
    run_dir = early.parse_known_args(argv)[0].resume
    if run_dir is None:
        return tyro.cli(Args, args=argv)
    path = Path(run_dir) / "args.json"
    try:
        saved = json.loads(path.read_text())
        started_by = saved.pop("script")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"--resume {run_dir}: {path} holds no run ({error!r}); give the directory of a run.") from error
    if started_by != Path(script).stem:
        raise BadInput(f"--resume {run_dir} is a run of {started_by}.py: resume it with that script.")
    known = {field.name for field in dataclasses.fields(Args)}
    if set(saved) != known:
        raise BadInput(
            f"--resume {run_dir} was written by another version of {Path(script).name}, whose options differ "
            f"({', '.join(sorted(set(saved) ^ known))}): resume it with that version."
        )
    args = tyro.cli(Args, args=argv, default=Args(**saved))
    for name, value in saved.items():
        if name not in CHANGEABLE and (now := getattr(args, name)) != value:
            option = _option(name)
            raise BadInput(f"{option} {now} contradicts the run's {option} {value}: leave it out, or start a new run.")
    return args


def check(args):
    """Refuse numbers that cannot work. Raises `BadInput`.

    Whole numbers are counts of at least 1, or of at least 0 where that is the default; other numbers are above 0.
    """
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if field.type is int:
            least = {"seed": 0, "group_size": 2}.get(field.name, min(field.default, 1))
            if value < least:
                raise BadInput(f"{_option(field.name)} {value} cannot work: give a number of at least {least}.")
        elif field.type is float and not value > 0:
            raise BadInput(f"{_option(field.name)} {value} cannot work: give a number above 0.")


@contextlib.contextmanager
def finish_step_on_interrupt():
    """Inside, the first Ctrl-C only sets `requested` of the object returned; the second one stops at once, as usual."""
    interrupt = types.SimpleNamespace(requested=False)

    def on_interrupt(signal_number, frame):
        interrupt.requested = True
        # Not `previous`: a shell tells processes in the background to ignore SIGINT.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\nFinishing this step; press Ctrl-C again to stop at once.", flush=True)

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, previous)


def _option(name):
    return "--" + name.replace("_", "-")
