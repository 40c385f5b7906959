"""The two exceptions that end a run with a sentence instead of a traceback."""


class BadInput(Exception):
    """Something the user gave cannot work. The message is one sentence: it names the option and says what to do."""


class RunStopped(Exception):
    """The run cannot go on, for a reason the message gives; everything up to its last checkpoint is intact."""
