"""One run on several GPUs or machines: what the ranks that `torchrun` starts do together.

Every rank runs the same script. It samples and grades its share of the prompts, then gathers the
other shares, so that all have the batch, N and micro-batches of a single process. Each computes
some of the micro-batches (`deal`). Policy, reference and AdamW's moments are sharded (FSDP2);
gradients are summed. Without `torchrun`, one rank has everything.
"""

import dataclasses
import functools
import os
import socket
import threading
import time
import types
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from common.errors import BadInput, RunStopped, lost_rank

# What shards a model takes a second to import, which a mistyped option should not wait for. It is
# imported where it is used, and what is sharded is known by its methods.

LONGEST_WRITING = timedelta(hours=1)  # of a checkpoint
FOR_RANK_0 = timedelta(seconds=10)
_groups = {}  # for objects, which go between CPUs: group and patience, by purpose


def join_ranks(device, timeout):
    """Under torchrun, set up communication between the ranks.

    One waits for another for `timeout` seconds at most.
    """
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        return
    threading.Thread(target=_exit_with, args=(os.getppid(),), daemon=True).start()
    _check_torchrun()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    patience = timedelta(seconds=timeout)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=patience)
    for purpose, longest in (("", patience), ("writing", LONGEST_WRITING)):
        # Rank 0 says which rank is late. The others wait longer for rank 0, so that they hear of
        # that, and say themselves if it is rank 0 that hangs.
        group = dist.new_group(backend="gloo", timeout=longest + FOR_RANK_0)
        _groups[purpose] = (group, longest)


def check_number_of_ranks(args):
    """Raise `BadInput` for options that do not fit it."""
    if args.prompts_per_step < size():
        what = f"--prompts-per-step {args.prompts_per_step} is less than {size()} ranks"
        raise BadInput(f"{what}: raise it.")
    if size() % args.replicas:
        what = f"--replicas {args.replicas} does not divide {size()} ranks"
        raise BadInput(f"{what}: give a divisor.")


def _check_torchrun():
    """Raise `RunStopped` if torchrun has ended while this rank imported its modules.

    Then nobody listens where ranks meet, and this one would look for it until the timeout.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        try:
            socket.create_connection(address, timeout=60).close()
        except OSError as error:
            where = ":".join(map(str, address))
            raise RunStopped(f"torchrun is gone ({where}: {error}): start it again.") from error


def _exit_with(parent):
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)  # torchrun was killed; without this, the rank would run on


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def size():
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value, purpose=""):
    """Every rank's value, of any type, in the order of ranks.

    A rank is waited for as long as `join_ranks` was told, or an hour for the purpose "writing".
    Raises `RunStopped`, naming a rank that is late.
    """
    values = [value] * size()
    if size() == 1:
        return values
    group, patience = _groups[purpose]
    try:
        dist.monitored_barrier(group, patience, wait_all_ranks=True)
        dist.all_gather_object(values, value, group)
    except RuntimeError as error:
        raise RunStopped(lost_rank(error)) from error
    return values


def broadcast(value):
    """Rank 0's value, of any type, on every rank."""
    return gather(value)[0]


def total(number):
    """The sum of a number over all ranks."""
    return sum(gather(number))


def on_any_rank(flag):
    """Whether the flag is set on any rank."""
    return any(gather(flag))


def share(count):
    """The slice of `count` items that belongs to this rank."""
    return slice(count * rank() // size(), count * (rank() + 1) // size())


def gather_batch(batch):
    """The whole `Batch`, from all ranks' shares."""
    if size() == 1:
        return batch
    parts = gather(batch)
    joined = {}
    for name, value in vars(batch).items():
        if isinstance(value, list):
            joined[name] = [item for part in parts for item in getattr(part, name)]
    # The slowest rank's time, the worst rank's mismatch
    metrics = {key: max(part.metrics[key] for part in parts) for key in batch.metrics}
    return dataclasses.replace(batch, metrics=metrics, **joined)


def deal(splits, kinds):
    """This rank's micro-batches, as pairs (rows, repeated).

    They are dealt round-robin, one kind (`kinds[row]`) after the other. All ranks must make the
    same passes in the same order, since they exchange weights and gradients in each. So where the
    last round is incomplete, the remaining ranks repeat a row of it.
    """
    mine = []
    for kind in sorted({kinds[rows[0]] for rows in splits}):
        of_kind = [rows for rows in splits if kinds[rows[0]] == kind]
        for start in range(0, len(of_kind), size()):
            own = start + rank()
            if own < len(of_kind):
                mine.append((of_kind[own], False))
            else:
                mine.append((of_kind[start][-1:], True))
    return mine


def shard(model, device, replicas=1):
    """Shard rank 0's weights by layers, over all ranks or each of `replicas` groups."""
    if size() == 1:
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    state = model.state_dict() if rank() == 0 else {}  # the others have only shapes
    shape, names = (replicas, size() // replicas), ("replicate", "shard")
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    mesh = mesh if replicas > 1 else mesh["shard"]
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh)
    # Without this, the root would stay whole after a pass without gradients.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    for module in _sharded_modules(model):
        module.set_gradient_divide_factor(1.0)  # a sum, not a mean
        module.set_force_sum_reduction_for_comms(True)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, state, options=options)

    # Backbone and head are called one after the other, by `token_logprobs`; this makes both one
    # pass of the root.
    def as_one_pass(model, function, *args):
        return function(model, *args)

    model.as_one_pass = types.MethodType(as_one_pass, model)
    register_fsdp_forward_method(model, "as_one_pass")


def layers_of(model):
    """The layers of a `transformers` model, which names their classes; also once it is sharded."""
    names = set(model._no_split_modules or [])
    # Sharding gives a layer a subclass of its class.
    return [
        module
        for module in model.modules()
        if names & {cls.__name__ for cls in type(module).__mro__}
    ]


def one_pass(function):
    """Run `function(model, …)` as one pass of a sharded model.

    The head's weights are whole until it returns.
    """

    @functools.wraps(function)
    def wrapped(model, *args):
        if not is_sharded(model):
            return function(model, *args)
        result = model.as_one_pass(function, *args)
        if not torch.is_grad_enabled():
            forget_passes(model)
        return result

    return wrapped


def forget_passes(model):
    """After passes without gradients; FSDP2 would keep a list of all layers passed until the next
    backward pass.
    """
    if hasattr(model, "reset_iter_state"):  # PyTorch 2.13
        model.reset_iter_state()


@contextmanager
def by_layers(model):
    """Context in which all ranks run the model in lockstep, and gather a layer's weights for each
    pass through it. No gradients.
    """
    yield
    forget_passes(model)


@contextmanager
def gathered(model):
    """Context in which every rank holds all weights and runs the model without communication.

    No gradients.
    """
    for module in _sharded_modules(model):
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    yield
    for module in _sharded_modules(model):
        module.reshard()
        module.set_reshard_after_forward(True, recurse=False)


def whole(tensor):
    """The full tensor, on every rank; all of them must call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def whole_state(state):
    """A nested dict with full tensors, on the CPU of rank 0; None for them on other ranks."""
    if isinstance(state, dict):
        return {key: whole_state(value) for key, value in state.items()}
    full = whole(state)
    return full if full is state else full.cpu() if rank() == 0 else None


def part_like(parameter, tensor):
    """This rank's shard of a full tensor, sharded as `parameter` is, if it is."""
    if not hasattr(parameter, "to_local"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(tensor.to(parameter.device), mesh, placements, src_data_rank=None)


@contextmanager
def replaced(tensors, values):
    """Context in which some tensors of a dict, which may be sharded, have other values.

    `values` are pairs of a name and a whole tensor, taken one by one. What they replace is kept on
    the CPU, since a GPU may be full, and comes back bit for bit.
    """
    saved = {}
    try:
        for name, value in values:
            tensor = tensors[name]
            saved[name] = _own_part(tensor.detach()).to("cpu", copy=True)
            tensor.data.copy_(part_like(tensor, value.to(tensor.device, tensor.dtype)))
        yield
    finally:
        for name, own in saved.items():
            _own_part(tensors[name]).data.copy_(own)


def _own_part(tensor):
    """What this rank holds of a tensor, which may be sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def is_sharded(module):
    """Whether `shard` has sharded a model, or this part of one."""
    return hasattr(module, "unshard")


def _sharded_modules(model):
    return [module for module in model.modules() if is_sharded(module)]
