"""The two exceptions that end a run with a sentence instead of a traceback."""


class BadInput(Exception):
    """Something the user gave cannot work. The message is one sentence: it names the option and says what to do."""


class RunStopped(BaseException):
    """The run cannot go on, for a reason the message gives; everything up to its last checkpoint is intact.

    Not an `Exception`, like KeyboardInterrupt: it may come up in the middle of anything, a user's reward function with
    an `except Exception` included.
    """
