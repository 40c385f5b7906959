"""Checkpoints that survive a crash at any instant.

A checkpoint is one file, `checkpoints/step_000040.pt`. It is written under another name, flushed to
disk and then renamed, which a file system does completely or not at all. It is a zip archive with a
CRC-32 of every tensor, so that later damage is noticed when a run is resumed. Several ranks write a
large model into a directory, `step_000040.shards`.
"""

import os
import shutil
import zipfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from common.commandline import BadInput, RunStopped
from common.distributed import gather, part_like, rank, size, whole_state

KEEP = 2  # how many of the newest checkpoints stay
ONE_FILE = (
    2**35
)  # bytes of weights and moments, 3 billion parameters; beyond, with several ranks, a directory
OTHERS = "others.pt"  # what such a directory has besides


def save_checkpoint(run_dir, step, parts):
    """Write the `state_dict()` of each of `parts`, a dict by name; delete all but the newest `KEEP`
    checkpoints.

    All ranks call this. Rank 0 writes the file, with whole tensors; where they would take more than
    `ONE_FILE` bytes, each rank writes its own part of them into a directory. Raises `RunStopped`
    where that fails.
    """
    directory = Path(gather(run_dir)[0]) / "checkpoints"  # rank 0 has named the run
    num_bytes = 3 * sum(
        parameter.nbytes for parameter in parts["model"].parameters()
    )  # with AdamW's two moments
    sharded = ("model", "optimizer") if size() > 1 and num_bytes > ONE_FILE else ()
    final = directory / f"step_{step:06d}{'.shards' if sharded else '.pt'}"
    unfinished = final.with_suffix(".unfinished")
    states = whole_state(
        {name: part.state_dict() for name, part in parts.items() if name not in sharded}
    )
    try:
        if sharded:
            dcp.save(_sharded_state(parts), checkpoint_id=unfinished)
        if rank() == 0:
            directory.mkdir(exist_ok=True)
            with open(unfinished / OTHERS if sharded else unfinished, "wb") as file:
                torch.save(states, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, final)
    except (
        OSError,
        RuntimeError,
        dcp.CheckpointException,
    ) as error:  # torch.save turns the first into the second
        if rank() == 0:
            _delete(unfinished)
        what = f"{final} cannot be written ({error.__context__ or error})"
        raise RunStopped(f"{what}: make room, and go on with --resume.") from error
    if rank() == 0:
        directory_handle = os.open(directory, os.O_RDONLY)
        os.fsync(directory_handle)  # the renaming itself, too
        os.close(directory_handle)
        for old in [
            *_checkpoints(run_dir)[:-KEEP],
            *directory.glob("*.unfinished"),
        ]:  # the latter of a killed run
            _delete(old)
    gather(None, timedelta(hours=1))  # writing may take longer than anything else


def load_checkpoint(run_dir, parts):
    """Give each of `parts` its state in the newest checkpoint of a run, if there is one. Raises
    `BadInput`.
    """
    if not (paths := _checkpoints(run_dir)):
        return
    *older, path = paths
    file = path / OTHERS if path.is_dir() else path
    try:
        with zipfile.ZipFile(file) as archive:
            if archive.testzip():
                raise zipfile.BadZipFile("a checksum is wrong")
        state = torch.load(
            file, map_location="cpu", weights_only=True, mmap=size() > 1
        )  # one copy for all ranks
        if path.is_dir():
            sharded = _sharded_state(parts)
            dcp.load(sharded, checkpoint_id=path)
            states = {
                "model_state_dict": sharded["model"],
                "optim_state_dict": sharded["optimizer"],
            }
            set_state_dict(parts["model"], parts["optimizer"], **states)
    except (Exception, dcp.CheckpointException) as error:  # as varied as the kinds of damage
        how = f"if it is damaged, delete it to continue from {older[-1].name if older else 'the start'}"
        raise BadInput(f"--resume: {path} cannot be read ({str(error)[:200]}); {how}.") from error
    for name in state:
        parts[name].load_state_dict(_as_held_by(parts[name], state[name]))


def _sharded_state(parts):
    """Dict of tensors of which every rank writes its own part, or reads it."""
    weights, moments = get_state_dict(parts["model"], parts["optimizer"])
    return {"model": weights, "optimizer": moments}


def _as_held_by(part, state):
    """A state with whole tensors, as a sharded model or its optimizer holds it."""
    if isinstance(part, torch.nn.Module):
        return {name: part_like(own, state[name]) for name, own in part.state_dict().items()}
    if isinstance(part, torch.optim.Optimizer):
        parameters = [parameter for group in part.param_groups for parameter in group["params"]]
        for number, moments in state["state"].items():
            moments |= {
                key: part_like(parameters[number], m) for key, m in moments.items() if m.dim()
            }
    return state


def _checkpoints(run_dir):
    name = "checkpoints/step_" + "[0-9]" * 6
    return sorted([*Path(run_dir).glob(f"{name}.pt"), *Path(run_dir).glob(f"{name}.shards")])


def _delete(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
