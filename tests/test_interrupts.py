"""A sampler that hangs in the trainer's process; what Ctrl-C does is in test_resume.py."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from common.errors import RunStopped
from common.interrupts import stop_if_hung

REPOSITORY = Path(__file__).resolve().parent.parent


def test_a_heart_that_beats_stops_nothing():
    heartbeat, threads, handler = torch.zeros(1, dtype=torch.int64), threading.active_count(), signal.SIGALRM
    before = signal.getsignal(handler)
    with stop_if_hung(heartbeat, timeout=1.0):
        for _ in range(25):
            time.sleep(0.1)
            heartbeat += 1
    time.sleep(1.5)  # afterwards it may stand still
    assert threading.active_count() == threads and signal.getsignal(handler) == before


def test_what_hangs_is_stopped_and_says_which_option():
    heartbeat, started = torch.zeros(1, dtype=torch.int64), time.monotonic()
    message = r"not decoded a token for 0\.3 s: .* --sampler-timeout"
    with pytest.raises(RunStopped, match=message), stop_if_hung(heartbeat, timeout=0.3):
        heartbeat += 1
        time.sleep(60)
    assert 0.3 <= time.monotonic() - started < 5


HANG_IN_A_LIBRARY = """
import ctypes, torch
from common import interrupts
interrupts.GRACE_SECONDS = 0.5
mutex, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
with interrupts.stop_if_hung(torch.zeros(1, dtype=torch.int64), timeout=0.5):
    print("before", flush=True)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)  # waits for itself, and no signal ends that
    print("after", flush=True)
"""


def test_what_hangs_inside_of_a_library_ends_the_process():
    command = [sys.executable, "-c", HANG_IN_A_LIBRARY]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "before\n")
    assert "error: The sampler, in the trainer's process, has not decoded a token for 0.5 s" in done.stderr
