"""The benchmarks' launcher: no run outlives it, however it ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tyro
from helpers import REPOSITORY, wait_for

import grpo
from benchmarks.helpers.launcher import as_options, run_once

# A run that would go on for long after the test, and a launcher of two of them.
SCRIPT = """
import os, pathlib, time
pathlib.Path(f"pid-{os.getpid()}").touch()
time.sleep(600)
"""
LAUNCHER = """
import sys
from pathlib import Path
from benchmarks.helpers import launcher

launcher.ROOT = Path(sys.argv[1])
runs = [launcher.Run(name, "script", []) for name in ("one", "other")]
launcher.run_all(runs, num_steps=3, directory=launcher.ROOT / "runs", jobs=2)
"""


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"  # dead, although nobody has asked how it ended


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for it")
@pytest.mark.parametrize(
    "how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda how: how.name
)
def test_no_run_outlives_the_launcher(how, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", LAUNCHER, str(tmp_path)]
    launcher = subprocess.Popen(
        command,
        env=environment,
        stderr=subprocess.DEVNULL,
        # What a shell starts in the background is told to ignore Ctrl-C, and so would be what these
        # tests start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    runs = []
    try:
        wait_for(lambda: len(list(tmp_path.glob("pid-*"))) == 2, seconds=30)
        runs = [int(path.name.removeprefix("pid-")) for path in tmp_path.glob("pid-*")]
        assert all(map(is_running, runs))
        launcher.send_signal(how)
        assert launcher.wait(30) != 0
        wait_for(lambda: not any(map(is_running, runs)), seconds=10)
    finally:
        for pid in [launcher.pid, *runs]:
            if is_running(pid):
                os.kill(pid, signal.SIGKILL)


def test_options_of_a_dict_are_those_that_the_scripts_parse():
    options = {
        "num_steps": 3,
        "learning-rate": 1e-6,
        "serial": True,
        "reference_kl": False,
        "name": "",
    }
    args = tyro.cli(grpo.Args, args=as_options(options))
    assert (
        vars(args).items()
        >= {key.replace("-", "_"): value for key, value in options.items()}.items()
    )


def test_a_script_that_fails_ends_the_benchmark_with_its_message():
    with pytest.raises(
        SystemExit, match=r"(?s)grpo.py --num-steps=0 failed.*--num-steps 0 cannot work"
    ):
        run_once(["grpo.py", "--num-steps=0"])
