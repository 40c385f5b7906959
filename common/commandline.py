"""From the command line to `main(args)`: parsing, checks, resuming, error messages."""

import argparse
import ast
import dataclasses
import inspect
import json
import os
import sys
import textwrap
import time
from pathlib import Path
from typing import Annotated, get_type_hints

import tyro
from safetensors import SafetensorError

from common import tasks
from common.errors import (
    OUT_OF_MEMORY,
    BadInput,
    RunStopped,
    is_lost_rank,
    is_out_of_memory,
    lost_rank,
)
from common.options import RunOptions
from common.runfiles import is_complete
from common.sources import Sources

STOPPED_EARLY = 3  # the exit code of a run with --resume-if-exists that has more steps to make
# The usual ratio of learning rates, with LoRA and without
ADAPTERS_LEARN_FASTER = 10
# What a resumed run may change: none of these changes what an update is. (Checksums tell whether
# the data differ. With --lr-schedule linear, another number of steps does change the learning rate
# from then on.)
CHANGEABLE = {
    "resume",
    "resume_if_exists",
    "num_steps",
    "eval_interval",
    "checkpoint_interval",
    "rollouts_interval",
    "threads",
    "replicas",
    "sampler_timeout",
    "track",
    "wandb_project",
    "data",
    "eval_data",
}
# A model and two tasks, also where a file happens to be called so
BUILT_IN = ("tiny", *tasks.BUILT_IN)


def run(main, Args, script):
    """Parse the command line and call `main(args)`.

    Exits with 2 after `BadInput`, with 1 after `RunStopped` or an OSError.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A terminal that knows no arrows should not end a run.
            stream.reconfigure(errors="backslashreplace")
    try:
        args = parse(Args, script, sys.argv[1:])
        check(args)
        if getattr(args, "resume_if_exists", False):
            _unless_complete(main, args, script)
        else:
            main(args)
    except Exception as error:
        if not isinstance(error, (BadInput, RunStopped, OSError, SafetensorError)):
            if is_out_of_memory(error):
                error = RunStopped(OUT_OF_MEMORY)
            elif "RANK" in os.environ and is_lost_rank(error):
                error = RunStopped(lost_rank(error))
            else:
                raise
        # Messages of libraries, quoted in ours, may have several lines.
        message = " ".join((str(error) or repr(error)).split())
        # torchrun ends all ranks when one fails. The others wait until rank 0 has had its say.
        if rank := _rank():
            time.sleep(5)
            message = f"rank {rank}: {message}"
        print(f"{Path(script).name}: error: {message}", file=sys.stderr)
        sys.exit(2 if isinstance(error, BadInput) else 1)


def _unless_complete(main, args, script):
    """`main(args)`, unless the run is complete; exits with 3 if it was stopped before its end.

    Raises `BadInput` if the script or the task's file is not what the complete run began with.
    """
    run_dir = Path(args.output) / args.name
    if is_complete(run_dir, args.num_steps):
        Sources(script, args.task).check_unchanged(run_dir)
        if _rank() == 0:
            print(f"{run_dir} is complete: nothing to do.")
        return
    main(args)
    if _rank() == 0 and not is_complete(run_dir, args.num_steps):
        sys.exit(STOPPED_EARLY)


def _rank():
    """This process's number among those of torchrun, before and after they have joined."""
    return int(os.environ.get("RANK", 0))


def parse(Args, script, argv):
    """Parse `argv`; with `--resume RUN_DIR`, defaults are the arguments saved there.

    With `--resume-if-exists`, `args.resume` is the run of that name, if there is one. Raises
    `BadInput`.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--resume")
    run_dir = early.parse_known_args(argv)[0].resume
    if run_dir is not None:
        return _parse_resumed(Args, script, argv, run_dir)
    args = _with_absolute_paths(_parse_words(Args, script, argv, Args()))
    given = {word.replace("_", "-").partition("=")[0] for word in argv}
    if hasattr(args, "learning_rate") and "--learning-rate" not in given:
        usual = "1e-6, or 1e-5 if small"
        if args.lora_rank:
            args.learning_rate *= ADAPTERS_LEARN_FASTER
            usual = "1e-5, or 1e-4 if small"
        if args.model != "tiny":
            raise BadInput(
                f"--learning-rate: the default, {args.learning_rate:g}, is for the bundled model; "
                f"give one for --model {args.model} ({usual})."
            )
    return _as_begun(Args, script, args) if getattr(args, "resume_if_exists", False) else args


def _as_begun(Args, script, args):
    """`args`, to continue the run of that name, if there is one with the same options."""
    if not args.name:
        raise BadInput("--resume-if-exists does not know which run: give its --name as well.")
    run_dir = Path(args.output) / args.name
    if not os.path.lexists(run_dir):
        return args
    before = _saved(Args, script, run_dir)
    moved = {"output": args.output, "name": args.name}
    how = "give the same, or another --name"
    _refuse_changes(dataclasses.replace(before, **moved), args, how)
    return dataclasses.replace(args, resume=str(run_dir))


def _parse_resumed(Args, script, argv, run_dir):
    before = _saved(Args, script, run_dir)
    args = _with_absolute_paths(_parse_words(Args, script, argv, before))
    _refuse_changes(before, args, "leave it out, or start a new run")
    return args


def _saved(Args, script, run_dir):
    """The arguments of a run of this script."""
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
    names = {**saved, **defaults}
    differ = [name for name in names if type(saved.get(name)) is not type(defaults.get(name))]
    if differ:
        raise BadInput(
            f"--resume {run_dir} is of another version of this script ({', '.join(differ)}): "
            "use that one."
        )
    return _with_absolute_paths(Args(**saved))


def _refuse_changes(before, args, how):
    """Raise `BadInput`, which says how to go on, where `args` would change a run's updates."""
    for name, value in dataclasses.asdict(before).items():
        now = getattr(args, name)
        if name not in CHANGEABLE and now != value:
            option = _option(name)
            raise BadInput(f"{option} {now} contradicts the run's {option} {value}: {how}.")


def _parse_words(Args, script, argv, defaults):
    """`Args` from words of the command line. `--help` has two groups: own and inherited options."""
    about, _, usage = (sys.modules[Args.__module__].__doc__ or "").partition("Usage:")
    title = about.split("\n")[0]
    inherited = {field.name for field in dataclasses.fields(RunOptions)}
    groups = {"training": [], "running": []}
    for field in dataclasses.fields(Args):
        groups["running" if field.name in inherited else "training"].append(field)
    docs, types = _docstrings(Args), get_type_hints(Args, include_extras=True)

    def group(name):
        fields = []
        for field in groups[name]:
            described = Annotated[types[field.name], tyro.conf.arg(help=docs.get(field.name, ""))]
            default = dataclasses.field(default=getattr(defaults, field.name))
            fields.append((field.name, described, default))
        return name, tyro.conf.OmitArgPrefixes[dataclasses.make_dataclass(name, fields)]

    parsed = tyro.cli(
        dataclasses.make_dataclass("Groups", map(group, groups)),
        args=argv,
        prog=Path(script).name,
        description=f"{title}\n\nUsage:{usage}",
    )
    return Args(**vars(parsed.training), **vars(parsed.running))


def _docstrings(Args):
    """The string below each field of a dataclass and of those it inherits from, by field name."""
    found = {}
    for cls in reversed(Args.__mro__[:-1]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        for field, below in zip(definition.body, definition.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                found[field.target.id] = below.value.value
    return found


def _with_absolute_paths(args):
    """`args` with absolute paths, so that a run can be resumed from anywhere."""
    for name in ("model", "task", "data", "eval_data"):
        value = getattr(args, name)
        # A class of a task's file, or a configuration of data, may follow after a colon.
        exists = os.path.exists(value) or os.path.exists(value.rpartition(":")[0])
        if value not in BUILT_IN and exists:
            setattr(args, name, os.path.abspath(value))
    return args


def check(args):
    """Raise `BadInput` for an option that breaks a rule which it declares (`options.option`)."""
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        at_least, above, needs = map(field.metadata.get, ("at_least", "above", "needs"))
        # "not >=" rather than "<", so that NaN fails as well
        if at_least is not None and not value >= at_least:
            how = f"give a number of at least {at_least}"
        elif above is not None and not value > above:
            how = f"give a number above {above}"
        elif needs is not None and value and not getattr(args, needs):
            how = f"leave out {_option('no_' + needs)}"
        else:
            continue
        raise BadInput(f"{_option(field.name)} {value} cannot work: {how}.")
    if isinstance(args, RunOptions) and args.updates_per_batch > args.prompts_per_step:
        updates = f"--updates-per-batch {args.updates_per_batch}"
        raise BadInput(f"{updates} is more than {args.prompts_per_step} groups: lower it.")


def _option(name):
    return "--" + name.replace("_", "-")
