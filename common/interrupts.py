"""Ctrl-C asks for a clean stop; a second Ctrl-C insists."""

import contextlib
import signal


class Interrupt:
    """`requested` turns True when the user has asked the run to stop."""

    requested = False


@contextlib.contextmanager
def finish_step_on_interrupt():
    """Inside this context, the first SIGINT only sets `requested`; the next one raises KeyboardInterrupt as usual."""
    interrupt = Interrupt()

    def on_interrupt(signal_number, frame):
        interrupt.requested = True
        # Not `previous`: a process that a shell started in the background was told to ignore SIGINT.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\nFinishing this step; press Ctrl-C again to stop at once.", flush=True)

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, previous)
