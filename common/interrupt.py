"""Ctrl-C and other signals that ask a run to stop."""

import contextlib
import signal
import types

# Ctrl-C, a scheduler, a terminal that is closed
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def finish_step_on_interrupt():
    """Context in which `STOP_SIGNALS` only set `requested` of the yielded object.

    A second Ctrl-C stops at once.
    """
    interrupt = types.SimpleNamespace(requested=False)
    # nohup has SIGHUP ignored
    ignored = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else []
    caught = [number for number in STOP_SIGNALS if number not in ignored]

    def on_interrupt(signal_number, frame):
        interrupt.requested = True
        # Not the handler from before: a shell tells processes in the background to ignore SIGINT.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with contextlib.suppress(OSError):  # the terminal, or a pipe's other end, may be gone
            print("\nFinishing this step; press Ctrl-C again to stop at once.", flush=True)

    with contextlib.ExitStack() as before:
        for number in caught:
            before.callback(signal.signal, number, signal.signal(number, on_interrupt))
        yield interrupt
