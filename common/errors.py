"""The two errors that end a run with a message instead of a traceback."""


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


def is_out_of_memory(error):
    """Whether an exception, or what caused it, is PyTorch's for a GPU that is full."""
    while error is not None:
        if type(error).__name__ == "OutOfMemoryError":
            return True
        error = error.__cause__ or error.__context__
    return False
