"""What ends a run from outside of it: Ctrl-C, which asks for a clean stop, and a sampler that hangs."""

import contextlib
import os
import signal
import sys
import threading
from pathlib import Path

from common.errors import RunStopped

GRACE_SECONDS = 10.0
"""for what hangs to let the exception through"""


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


@contextlib.contextmanager
def stop_if_hung(heartbeat, timeout):
    """Inside this context, `RunStopped` is raised when `heartbeat`, int64 [1], has stood still for `timeout` seconds.

    A thread watches, and a signal makes the main thread raise the exception, as soon as that runs Python again. If it
    hangs inside of a library, it never does: then the process ends, with the same sentence and exit code 1. (Nothing
    helps where a library hangs and lets no other thread run Python.)
    """
    sentence = (
        f"The sampler, in the trainer's process, has not decoded a token for {timeout:g} s: look for what blocks it; "
        "--resume continues from the last checkpoint, with more --sampler-timeout if need be."
    )
    over = threading.Event()

    def stop(signal_number, frame):
        raise RunStopped(sentence)

    def watch():
        beat, still, nap = heartbeat.item(), 0.0, min(1.0, timeout)
        while still < timeout:  # added up from naps, so that the time a stopped process (Ctrl-Z) sleeps does not count
            if over.wait(nap):
                return
            before, beat = beat, heartbeat.item()
            still = still + nap if beat == before else 0.0
        signal.pthread_kill(threading.main_thread().ident, signal.SIGALRM)
        if not over.wait(GRACE_SECONDS):
            print(f"\n{Path(sys.argv[0]).name}: error: {sentence}", file=sys.stderr, flush=True)
            os._exit(1)

    previous = signal.signal(signal.SIGALRM, stop)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()  # before the handler goes: without one, its signal would end the process
        signal.signal(signal.SIGALRM, previous)
