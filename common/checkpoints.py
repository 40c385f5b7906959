"""Checkpoints that survive a crash at any instant.

A checkpoint is one file, `checkpoints/step_000040.pt`. It is written under another name, flushed to disk and then
renamed, which a file system does completely or not at all. It is a zip archive with a CRC-32 of every tensor, so that
later damage is noticed when a run is resumed.
"""

import os
import zipfile
from datetime import timedelta
from pathlib import Path

import torch

from common.commandline import BadInput, RunStopped
from common.distributed import gather, part_like, rank, whole_state

KEEP = 2  # how many of the newest checkpoints stay


def save_checkpoint(run_dir, step, parts):
    """Write the `state_dict()` of each of `parts`, a dict by name; delete all but the newest `KEEP` checkpoints.

    With several ranks, all of them call this, and rank 0 writes whole tensors, which must fit into its memory. Raises
    `RunStopped` where it cannot be written; the checkpoints before are still there.
    """
    states = {name: whole_state(part.state_dict()) for name, part in parts.items()}
    if rank() == 0:
        _write(run_dir, step, states)
    gather(None, timedelta(hours=1))  # writing may take longer than anything else


def _write(run_dir, step, states):
    directory = Path(run_dir) / "checkpoints"
    final = directory / f"step_{step:06d}.pt"
    unfinished = final.with_suffix(".unfinished")
    try:
        directory.mkdir(exist_ok=True)
        with open(unfinished, "wb") as file:
            torch.save(states, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, final)
    except (OSError, RuntimeError) as error:  # torch.save turns an OSError into a RuntimeError
        unfinished.unlink(missing_ok=True)
        what = f"{final} cannot be written ({error.__context__ or error})"
        raise RunStopped(f"{what}: make room, and go on with --resume.") from error
    directory_handle = os.open(directory, os.O_RDONLY)
    os.fsync(directory_handle)  # the renaming itself, too
    os.close(directory_handle)
    for old in [*_checkpoints(run_dir)[:-KEEP], *directory.glob("*.unfinished")]:  # the latter of a killed run
        old.unlink()


def load_checkpoint(run_dir, parts):
    """Give each of `parts` its state in the newest checkpoint of a run, if there is one. Raises `BadInput`.

    Every rank reads the file, and takes what it holds itself: it may have been written by another number of ranks.
    """
    if not (paths := _checkpoints(run_dir)):
        return
    *older, path = paths
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():
                raise zipfile.BadZipFile("a checksum is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # as varied as the kinds of damage
        where = f"from {older[-1].name}" if older else "from the start"
        how = f"if it is damaged, delete it to continue {where}"
        raise BadInput(f"--resume: {path} cannot be read ({str(error)[:200]}); {how}.") from error
    for name, part in parts.items():
        part.load_state_dict(_as_held_by(part, state[name]))


def _as_held_by(part, state):
    """A state with whole tensors, as a sharded model or its optimizer holds it."""
    if isinstance(part, torch.nn.Module):
        return {name: part_like(own, state[name]) for name, own in part.state_dict().items()}
    if isinstance(part, torch.optim.Optimizer):
        parameters = [parameter for group in part.param_groups for parameter in group["params"]]
        for number, moments in state["state"].items():
            moments |= {key: part_like(parameters[number], m) for key, m in moments.items() if m.dim()}
    return state


def _checkpoints(run_dir):
    return sorted(Path(run_dir).glob("checkpoints/step_" + "[0-9]" * 6 + ".pt"))
