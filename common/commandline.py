"""From the command line to `main(args)`: defaults of a resumed run, and errors a user can mend."""

import dataclasses
import json
import sys
from pathlib import Path

import tyro

from common.errors import BadInput, RunStopped

# What a resumed run may change: none of these changes what an update is.
CHANGEABLE = {
    "resume",
    "num_steps",
    "eval_interval",
    "checkpoint_interval",
    "keep_checkpoints",
    "completions_per_step",
    "threads",
    "sampler_timeout",
    "track",
    "wandb_project",
    "wandb_entity",
    "wandb_mode",
}


def run(main, Args, script):
    """Parse the command line into `Args` and call `main(args)`.

    `BadInput` becomes one sentence and exit code 2; `RunStopped` one sentence and exit code 1.
    """
    try:
        main(parse(Args, script, sys.argv[1:]))
    except (BadInput, RunStopped) as error:
        sentence = " ".join(str(error).split())  # libraries' messages, quoted in ours, may run over several lines
        print(f"{Path(script).name}: error: {sentence}", file=sys.stderr)
        sys.exit(2 if isinstance(error, BadInput) else 1)


def require(condition, field, value, remedy):
    """Raise `BadInput` for the option of an argument unless `condition` holds."""
    if not condition:
        raise BadInput(f"--{field.replace('_', '-')} {value} cannot work: {remedy}.")


def parse(Args, script, argv):
    """Parse `argv`. With `--resume RUN_DIR`, the arguments saved there are the defaults, and must not be contradicted.

    Raises `BadInput`.
    """
    run_dir = _value_of("--resume", argv)
    if run_dir is None:
        return tyro.cli(Args, args=argv)
    path = Path(run_dir) / "args.json"
    try:
        saved = json.loads(path.read_text())
        started_by = saved.pop("script")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"--resume {run_dir}: {path} holds no run ({error!r}); give the directory of a run.") from error
    if started_by != Path(script).stem:
        raise BadInput(f"--resume {run_dir} is a run of another script: resume it with that one.")
    known = {field.name for field in dataclasses.fields(Args)}
    if set(saved) != known:
        raise BadInput(
            f"--resume {run_dir} was written by another version of {Path(script).name}, whose options differ "
            f"({', '.join(sorted(set(saved) ^ known))}): resume it with that version."
        )
    args = tyro.cli(Args, args=argv, default=Args(**saved))
    for name, value in saved.items():
        if name not in CHANGEABLE and getattr(args, name) != value:
            option = "--" + name.replace("_", "-")
            raise BadInput(
                f"{option} {getattr(args, name)} contradicts the run being resumed, which has {option} {value}: "
                "leave it out, or start a new run."
            )
    return args


def _value_of(option, argv):
    """The value of an option in `--option VALUE` or `--option=VALUE` form, before the real parser can run."""
    for i, argument in enumerate(argv):
        if argument == option and i + 1 < len(argv):
            return argv[i + 1]
        if argument.startswith(option + "="):
            return argument.removeprefix(option + "=")
    return None
