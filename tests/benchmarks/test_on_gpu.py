"""`on_gpu.sh` keeps to its time limit. (`.ci/run` rehearses some of its parts.)"""

import os
import signal
import subprocess
import time
from pathlib import Path

from helpers import REPOSITORY


def test_a_part_is_stopped_at_the_limit_and_the_next_one_is_not_run(tmp_path):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    environment = os.environ | {
        "PARTS": "agreement attention misspelt",
        "LIMIT": "12",
        "TMPDIR": str(temporary),
    }
    command = ["bash", REPOSITORY / "benchmarks" / "gpu" / "on_gpu.sh", "--rehearse", tmp_path]
    started = time.monotonic()
    # What a shell starts in the background is told to ignore Ctrl-C, and so would be what this test
    # starts.
    done = subprocess.run(
        command, env=environment, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    )
    assert time.monotonic() - started < 12 + 15 + 15  # it interrupts at 12 s, and kills 15 s later
    assert done.returncode == 1
    _, agreement, attention, misspelt = (tmp_path / "summary.txt").read_text().splitlines()
    assert agreement.startswith("agreement: stopped after ")
    assert attention == "attention: not run: 12 s are over"
    assert misspelt.startswith("misspelt: not run: there is no such part")
    # No process is left that works with the part's temporary directory.
    assert not [
        path for path in Path("/proc").glob("[0-9]*/cmdline") if str(temporary) in _content(path)
    ]


def _content(path):
    try:
        return path.read_text()
    except OSError:  # the process has ended
        return ""
