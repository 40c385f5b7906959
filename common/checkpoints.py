"""Checkpoints that survive a crash at any instant.

A checkpoint is one file, `checkpoints/step_000040.pt`. It is written under another name, flushed to
disk and then renamed, which a file system does completely or not at all. It is a zip archive with a
CRC-32 of every tensor, so that later damage is noticed when a run is resumed. Several ranks write a
large model into a directory, `step_000040.shards`.
"""

import os
import shutil
import zipfile
from pathlib import Path

import torch

from common.distributed import broadcast, gather, part_like, rank, size, whole_state
from common.errors import BadInput, RunStopped
from common.lora import trainable
from common.weights import checksum, tensors_of

KEEP = 2  # how many of the newest checkpoints stay
# Bytes of weights and moments, 3 billion parameters; beyond, with several ranks, a directory
ONE_FILE = 2**35
OTHERS = "others.pt"  # what such a directory has besides


class Checkpoints:
    """A run's checkpoints: the state of all that changes, and checksums of what it began with.

    Made before the first update, since the policy's weights are part of what a run begins with: a
    resumed run is refused if they, or the problems, have changed. All ranks call all methods.
    """

    def __init__(self, log, policy, optimizer, rollouts, train_set, eval_set):
        self.log = log
        self.policy = policy
        self.optimizer = optimizer
        self.rollouts = rollouts
        problems = {
            "training problems": train_set.checksum(),
            "held-out problems": eval_set.checksum(),
        }
        if any(others != problems for others in gather(problems)):
            raise BadInput("The ranks have loaded different problems: give all the same --data.")
        self.inputs = {**problems, "model": [checksum(tensor) for tensor in policy.parameters()]}

    def save(self):
        """Write a checkpoint of the step that the log has recorded last; keep the newest `KEEP`.

        Rank 0 writes the file, with whole tensors. Where weights and moments would take more than
        `ONE_FILE` bytes, each rank writes its own part of them into a directory. Raises
        `RunStopped` where that fails.
        """
        import torch.distributed.checkpoint as dcp  # takes a second, as in `distributed`

        directory = broadcast(self.log.dir) / "checkpoints"  # rank 0 has named the run
        # AdamW has two moments of each parameter.
        num_bytes = 3 * sum(parameter.nbytes for parameter in trainable(self.policy))
        sharded = size() > 1 and num_bytes > ONE_FILE
        suffix = ".shards" if sharded else ".pt"
        final = directory / f"step_{self.log.step:06d}{suffix}"
        unfinished = final.with_suffix(".unfinished")
        state = {
            "inputs": self.inputs,
            "log": self.log.state_dict(),
            "rollouts": self.rollouts.state_dict(),
        }
        if not sharded:
            state["model"] = whole_state(_changing(self.policy))
            state["optimizer"] = whole_state(self.optimizer.state_dict())
        try:
            if sharded:
                dcp.save(self._sharded_state(), checkpoint_id=unfinished)
            if rank() == 0:
                directory.mkdir(exist_ok=True)
                _write(state, unfinished / OTHERS if sharded else unfinished)
                os.replace(unfinished, final)
        except (OSError, RuntimeError, dcp.CheckpointException) as error:
            if rank() == 0:
                _delete(unfinished)
            # torch.save turns an OSError into a RuntimeError.
            what = f"{final} cannot be written ({error.__context__ or error})"
            raise RunStopped(f"{what}: make room, and go on with --resume.") from error
        if rank() == 0:
            _flush_directory(directory)  # the renaming itself, too
            left_by_a_killed_run = directory.glob("*.unfinished")
            for old in [*_checkpoints(self.log.dir)[:-KEEP], *left_by_a_killed_run]:
                _delete(old)
        gather(None, "writing")  # which may take longer than anything else

    def load_newest(self):
        """Continue from the newest checkpoint of the run, if there is one. Raises `BadInput`."""
        paths = broadcast(_checkpoints(self.log.dir))  # the others know OUTPUT, not the run's name
        if not paths:
            return
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

        *older, path = paths
        try:
            state = _read(path / OTHERS if path.is_dir() else path)
            if path.is_dir():
                sharded = self._sharded_state()
                dcp.load(sharded, checkpoint_id=path)
        except (Exception, dcp.CheckpointException) as error:  # as varied as the kinds of damage
            before = older[-1].name if older else "the start"
            how = f"if it is damaged, delete it to continue from {before}"
            what = f"--resume: {path} cannot be read ({str(error)[:200]})"
            raise BadInput(f"{what}; {how}.") from error
        for name, value in state["inputs"].items():
            if self.inputs[name] != value:  # a file was edited, or a template writes today's date
                what = f"the {name} differ from those it began with"
                raise BadInput(f"--resume {self.log.dir}: {what}: restore them.")
        if path.is_dir():
            states = {
                "model_state_dict": sharded["model"],
                "optim_state_dict": sharded["optimizer"],
            }
            # Not strict: weights that do not learn are not in it.
            options = StateDictOptions(strict=False)
            set_state_dict(self.policy, self.optimizer, options=options, **states)
        else:
            own = _changing(self.policy)
            weights = {name: part_like(own[name], state["model"][name]) for name in own}
            self.policy.load_state_dict(weights, strict=False)
            self.optimizer.load_state_dict(_moments_for(self.optimizer, state["optimizer"]))
        self.rollouts.load_state_dict(state["rollouts"], self.policy)
        self.log.load_state_dict(state["log"])

    def _sharded_state(self):
        """Dict of tensors of which every rank writes its own part, or reads it."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        options = StateDictOptions(ignore_frozen_params=True)
        weights, moments = get_state_dict(self.policy, self.optimizer, options=options)
        return {"model": weights, "optimizer": moments}


def checkpoint_of(run_dir, step=None):
    """The step and the path of a run's checkpoint after `step`, by default of its newest one.

    Raises `BadInput` where there is none, and for one that several ranks have written in parts.
    """
    found = _by_step(run_dir)
    if not found:
        raise BadInput(f"--run {run_dir} has no checkpoint yet: wait, or resume it.")
    step = max(found) if step is None else step
    if step not in found:
        kept = " or ".join(map(str, found))
        raise BadInput(f"--step {step}: {run_dir} has no such checkpoint; give {kept}.")
    if found[step].is_dir():
        raise BadInput(f"{found[step]} is in parts, of several ranks: finish the run instead.")
    return step, found[step]


def load_weights(policy, path):
    """Give `policy`, as training began with it, the weights in a checkpoint. Raises `BadInput`."""
    try:
        weights = _read(path)["model"]
    except Exception as error:  # as varied as the kinds of damage
        what = f"{path} cannot be read ({str(error)[:200]})"
        raise BadInput(f"{what}: give the --step of another checkpoint.") from error
    policy.load_state_dict(weights, strict=False)


def _changing(model):
    """Of a model's state, what training changes: with LoRA, the adapter alone."""
    return {
        name: tensor.detach()
        for name, tensor in tensors_of(model).items()
        if tensor.requires_grad or not isinstance(tensor, torch.nn.Parameter)
    }


def _write(state, path):
    with open(path, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def _read(path):
    with zipfile.ZipFile(path) as archive:
        if archive.testzip():
            raise zipfile.BadZipFile("a checksum is wrong")
    # Mapped, several ranks share one copy, sooner than rank 0 could have sent it (measured).
    return torch.load(path, map_location="cpu", weights_only=True, mmap=size() > 1)


def _flush_directory(directory):
    handle = os.open(directory, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _moments_for(optimizer, state):
    """The state of AdamW with whole tensors, as an optimizer of sharded parameters holds it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {}
    for number, of_parameter in state["state"].items():
        moments[number] = {
            # The number of steps has no dimensions, and no shards.
            key: part_like(parameters[number], value) if value.dim() else value
            for key, value in of_parameter.items()
        }
    return {**state, "state": moments}


def check_steps_left(run_dir, num_steps):
    """Raise `BadInput` where a run that is resumed has done more steps than `num_steps`."""
    done = max(_by_step(run_dir), default=0)
    if done > num_steps:
        what = f"--num-steps {num_steps} is less than the {done} steps that {run_dir} has done"
        raise BadInput(f"{what}: give {done} or more, or leave it out.")


def _by_step(run_dir):
    return {int(path.stem.removeprefix("step_")): path for path in _checkpoints(run_dir)}


def _checkpoints(run_dir):
    name = "checkpoints/step_" + "[0-9]" * 6
    return sorted([*Path(run_dir).glob(f"{name}.pt"), *Path(run_dir).glob(f"{name}.shards")])


def _delete(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
