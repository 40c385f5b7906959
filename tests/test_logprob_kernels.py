"""Runs `interpreted_kernels.py` where its kernels can run: on a GPU, or in Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from helpers import REPOSITORY

PARTS = {"large vocabularies": "large_vocabularies", "all else": "not large_vocabularies"}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="there is no triton on this platform")
def test_kernels(part):
    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-k", PARTS[part], "tests/interpreted_kernels.py"]
    done = subprocess.run(command, cwd=REPOSITORY, env=os.environ | interpret, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    print(done.stdout)
