"""Checkpoints that survive a crash at any instant.

A checkpoint is one file, `checkpoints/step_000040.pt`. It is written under another name, flushed to disk and then
renamed, which a file system does completely or not at all: a file with the final name is complete.
"""

import os
import re
from pathlib import Path

import torch

KEEP = 2  # how many of the newest checkpoints stay


def save_checkpoint(run_dir, step, state):
    """Write `state` (tensors, numbers, strings, lists, dicts) as of after `step`; delete all but the newest `KEEP`."""
    directory = Path(run_dir) / "checkpoints"
    directory.mkdir(exist_ok=True)
    final = directory / f"step_{step:06d}.pt"
    unfinished = final.with_suffix(".unfinished")
    with open(unfinished, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, final)
    directory_handle = os.open(directory, os.O_RDONLY)
    os.fsync(directory_handle)  # the renaming itself, too
    os.close(directory_handle)
    for old in _checkpoints(run_dir)[:-KEEP]:
        old.unlink()
    for leftover in directory.glob("*.unfinished"):  # of a run that was killed while it wrote
        leftover.unlink()


def load_checkpoint(run_dir):
    """The state in the newest complete checkpoint of a run, on the CPU; None where there is none."""
    paths = _checkpoints(run_dir)
    return torch.load(paths[-1], map_location="cpu", weights_only=True) if paths else None


def _checkpoints(run_dir):
    found = [path for path in Path(run_dir).glob("checkpoints/step_*.pt") if re.fullmatch(r"step_\d+\.pt", path.name)]
    return sorted(found, key=lambda path: int(path.stem.removeprefix("step_")))
