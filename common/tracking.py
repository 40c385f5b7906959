"""Weights & Biases, with `--track` only."""

import secrets

from common.errors import BadInput
from common.runfiles import write_atomically


def start_tracking(run_dir, project, config):
    """A W&B run that takes every record with `.log(record)`. Raises `BadInput`.

    A resumed run continues the same curves: its id is in the run's directory.
    """
    id_file = run_dir / "wandb_id.txt"
    if not id_file.exists():
        write_atomically(id_file, secrets.token_hex(8))
    try:
        import wandb  # without --track it need not even be installed

        run = wandb.init(
            project=project,
            name=run_dir.name,
            id=id_file.read_text(),
            resume="allow",
            dir=run_dir,
            config=config,
        )
    except Exception as error:  # no login, no network, a project that may not be called so, …
        what = f"--track: wandb does not start ({error})"
        raise BadInput(f"{what}: log in, or give --no-track.") from error
    # wandb drops what is logged under an internal step that goes backwards.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run
