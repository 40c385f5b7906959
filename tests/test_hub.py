"""A hub that cannot be reached is said to be so within seconds."""

import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from tests.helpers import REPOSITORY

MODEL = "from common.models import load_tokenizer; load_tokenizer('a/b')"
DATA = "from common.tasks.rows import read_rows; read_rows('a/b', '--data', ('question',))"
PROBE = "from common.hub import reach_hub; reach_hub('a/b', 'config.json')"
NOWHERE = "http://127.0.0.1:9"  # a port at which nothing listens


def seconds_and_error(code, endpoint, cache):
    """What a process with this hub takes after its imports, and the last line that it writes."""
    code = code.replace("; ", "\nimport time\nstart = time.monotonic()\ntry:\n    ")
    code += "\nfinally:\n    print(time.monotonic() - start)"
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(cache)}
    environment.pop("HF_HUB_OFFLINE", None)
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return float(ended.stdout), "".join(ended.stderr.splitlines()[-1:])


@pytest.mark.parametrize(
    ("code", "option"), [(MODEL, "--model a/b"), (DATA, "--data a/b")], ids=["model", "data"]
)
def test_a_hub_that_cannot_be_reached(code, option, tmp_path):
    seconds, error = seconds_and_error(code, NOWHERE, tmp_path)
    assert f"{option} cannot be loaded (" in error and "the hub cannot be reached (" in error
    assert seconds < 15  # 1 s on an idle core; 23 s and more without a look at the hub


def test_what_is_in_the_cache_needs_no_hub(tmp_path):
    snapshots = tmp_path / "hub" / "models--a--b"
    (snapshots / "snapshots" / "123").mkdir(parents=True)
    (snapshots / "snapshots" / "123" / "config.json").write_text("{}")
    (snapshots / "refs").mkdir()
    (snapshots / "refs" / "main").write_text("123")
    assert seconds_and_error(PROBE, NOWHERE, tmp_path)[1] == ""
    assert "ConnectionError" in seconds_and_error(PROBE.replace("a/b", "a/c"), NOWHERE, tmp_path)[1]


def test_a_hub_that_answers_is_left_to_the_library(tmp_path):
    class Busy(BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(time.monotonic())
            self.send_error(503)

    asked = []
    server = HTTPServer(("127.0.0.1", 0), Busy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    assert seconds_and_error(PROBE, endpoint, tmp_path)[1] == "" and len(asked) == 1
    server.shutdown()
    server.server_close()
