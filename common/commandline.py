"""From the command line to `main(args)`: parsing, checks, resuming, Ctrl-C, and error messages."""

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import signal
import sys
import time
import types
from functools import partial
from pathlib import Path

import tyro
from safetensors import SafetensorError
from tqdm import tqdm

# What a resumed run may change: none of these changes what an update is.
CHANGEABLE = {
    "resume",
    "num_steps",
    "eval_interval",
    "checkpoint_interval",
    "threads",
    "sampler_timeout",
    "replicas",
}
CHANGEABLE |= {
    "track",
    "wandb_project",
    "rollouts_interval",
    "data",
    "eval_data",
}  # (checksums tell if data differs)
STOP_SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
)  # Ctrl-C, a scheduler, a terminal that is closed
SHOW_AFTER = 10  # seconds
BUILT_IN = (
    "tiny",
    "addition",
    "gsm8k",
)  # a model and two tasks, also where a file happens to be called so


class BadInput(Exception):
    """Something the user gave cannot work. The message is one sentence: it names the option and
    says what to do.
    """


NOT_FINITE = (
    "The policy's weights or log-probs are no longer finite: look at loss and grad_norm in the run's metrics.jsonl, "
    "and start a new run with a lower --learning-rate."
)


class RunStopped(Exception):
    """The run cannot go on, for the reason in the message; everything up to its last checkpoint is
    intact.
    """


def run(main, Args, script):
    """Parse the command line and call `main(args)`; exit with 2 after `BadInput`, 1 after
    `RunStopped` or OSError.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(
                errors="backslashreplace"
            )  # a terminal that knows no arrows should not end a run
    try:
        args = parse(Args, script, sys.argv[1:])
        check(args)
        main(args)
    except (BadInput, RunStopped, OSError, SafetensorError) as error:
        # Messages of libraries, quoted in ours, may have several lines.
        message = " ".join((str(error) or repr(error)).split())
        if rank := int(
            os.environ.get("RANK", 0)
        ):  # of several, started by torchrun, which ends all when one fails
            time.sleep(5)  # until then, rank 0 will have said the same, if it is the same
            message = f"rank {rank}: {message}"
        print(f"{Path(script).name}: error: {message}", file=sys.stderr)
        sys.exit(2 if isinstance(error, BadInput) else 1)


def parse(Args, script, argv):
    """Parse `argv`; with `--resume RUN_DIR`, the defaults are the arguments saved there. Raises
    `BadInput`.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--resume")
    run_dir = early.parse_known_args(argv)[0].resume
    about, _, usage = (sys.modules[Args.__module__].__doc__ or "").partition("Usage:")
    description = about.split("\n")[0] + f"\n\nUsage:{usage}"
    cli = partial(tyro.cli, Args, args=argv, prog=Path(script).name, description=description)
    if run_dir is None:
        args = _with_absolute_paths(cli())
        to_train = hasattr(args, "learning_rate") and args.model != "tiny"
        if to_train and not any(
            word.replace("_", "-").startswith("--learning-rate") for word in argv
        ):
            what = f"the default, {args.learning_rate:g}, is for the bundled model"
            raise BadInput(
                f"--learning-rate: {what}; give one for --model {args.model} (1e-6, or 1e-5 if small)."
            )
        return args
    path = Path(run_dir) / "args.json"
    try:
        saved = json.loads(path.read_text())
        started_by = saved.pop("script")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f"--resume {run_dir}: {path} holds no run ({error!r}); give the directory of a run."
        ) from error
    if started_by != Path(script).stem:
        raise BadInput(
            f"--resume {run_dir} is a run of {started_by}.py: resume it with that script."
        )
    defaults = dataclasses.asdict(Args())
    if differ := [
        name
        for name in {**saved, **defaults}
        if type(saved.get(name)) is not type(defaults.get(name))
    ]:
        raise BadInput(
            f"--resume {run_dir} is of another version of this script ({', '.join(differ)}): use that one."
        )
    saved = dataclasses.asdict(_with_absolute_paths(Args(**saved)))
    args = _with_absolute_paths(cli(default=Args(**saved)))
    for name, value in saved.items():
        if name not in CHANGEABLE and (now := getattr(args, name)) != value:
            option = _option(name)
            raise BadInput(
                f"{option} {now} contradicts the run's {option} {value}: leave it out, or start a new run."
            )
    return args


def _with_absolute_paths(args):
    """`args` with absolute paths of files and directories, so that a run can be resumed from
    anywhere.
    """
    for name in ("model", "task", "data", "eval_data"):
        value = getattr(
            args, name
        )  # a class of a task's file, or a configuration of data, may follow after a colon
        if value not in BUILT_IN and any(map(os.path.exists, (value, value.rpartition(":")[0]))):
            setattr(args, name, os.path.abspath(value))
    return args


def check(args):
    """Raise `BadInput` for integers below 1 (`group_size` 2; where 0 means something: 0), other
    numbers up to 0.
    """
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if field.type is int:
            least = {"seed": 0, "rollouts_interval": 0, "group_size": 2}.get(
                field.name, min(field.default, 1)
            )
            if value < least:
                raise BadInput(
                    f"{_option(field.name)} {value} cannot work: give a number of at least {least}."
                )
        elif field.type is float and not value > 0:
            raise BadInput(f"{_option(field.name)} {value} cannot work: give a number above 0.")


@contextlib.contextmanager
def finish_step_on_interrupt():
    """Context in which `STOP_SIGNALS` only set `requested` of the yielded object; a second Ctrl-C
    stops at once.
    """
    interrupt = types.SimpleNamespace(requested=False)
    ignored = (
        [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else []
    )  # under nohup
    caught = [number for number in STOP_SIGNALS if number not in ignored]

    def on_interrupt(signal_number, frame):
        interrupt.requested = True
        # Not the handler from before: a shell tells processes in the background to ignore SIGINT.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with contextlib.suppress(OSError):  # the terminal, or a pipe's other end, may be gone
            print("\nFinishing this step; press Ctrl-C again to stop at once.", flush=True)

    with contextlib.ExitStack() as before:
        for number in caught:
            before.callback(signal.signal, number, signal.signal(number, on_interrupt))
        yield interrupt


def progress(items, what, total=None):
    """`items`, with a bar below the run's own if they take longer than `SHOW_AFTER`; not in
    samplers or other ranks.
    """
    hidden = os.environ.get("RANK", "0") != "0" or multiprocessing.parent_process() is not None
    return tqdm(
        items, what, total, leave=False, delay=SHOW_AFTER, disable=hidden, dynamic_ncols=True
    )


def _option(name):
    return "--" + name.replace("_", "-")
