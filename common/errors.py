"""The two errors that end a run with a message instead of a traceback."""

import contextlib
import re

from safetensors import SafetensorError


class BadInput(Exception):
    """Something the user gave cannot work.

    The message is one sentence: it names the option and says what to do.
    """


class RunStopped(Exception):
    """The run cannot go on, for the reason in the message.

    Everything up to the run's last checkpoint is intact.
    """


NOT_FINITE = (
    "The policy's weights or log-probs are no longer finite: look at loss and grad_norm in the "
    "run's metrics.jsonl, and start a new run with a lower --learning-rate."
)

OUT_OF_MEMORY = (
    "The GPU's memory is full: lower --max-tokens-per-microbatch, give --gradient-checkpointing or "
    "--no-reference-kl, or set PYTORCH_ALLOC_CONF=expandable_segments:True in the environment."
)


@contextlib.contextmanager
def writing(path):
    """Raises `RunStopped` where what is done inside cannot write `path`: the disk is full, say."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        what = f"{path} cannot be written ({error})"
        raise RunStopped(f"{what}: make room, and go on with --resume.") from error


def is_out_of_memory(error):
    """Whether an exception, or what caused it, is PyTorch's for a GPU that is full."""
    while error is not None:
        if type(error).__name__ == "OutOfMemoryError":
            return True
        error = error.__cause__ or error.__context__
    return False


def lost_rank(error):
    """What to say of a RuntimeError of `torch.distributed`, whose text is long and has signs that
    no terminal needs.
    """
    reason = re.sub(r"\[\S*\]|[^ -~]", " ", str(error))
    reason = " ".join(reason.split())[:300]
    return (
        f"Communication between ranks failed ({reason}): see why a rank has ended or hangs, and "
        "continue with --resume."
    )


def is_lost_rank(error):
    """Whether an exception is what `torch.distributed` raises where a rank ends or hangs."""
    signs = r"Connection (closed|reset)|Broken pipe|Timed out waiting|Application timeout|NCCL"
    return isinstance(error, RuntimeError) and bool(re.search(signs, str(error)))
