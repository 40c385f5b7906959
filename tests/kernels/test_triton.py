"""Runs `interpreted_kernels.py` where its kernels can run, on a GPU or in Triton's interpreter; and
compiles them.

Compiling needs no GPU. It shows what the interpreter does not: types that do not fit, shared memory
that does not suffice, loads that cannot be made ahead of time. How fast the result is, or whether
it is right, it does not show.
"""

import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import REPOSITORY

PARTS = {"large vocabularies": "large_vocabularies", "all else": "not large_vocabularies"}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="there is no triton on this platform"
)
def test_kernels(part):
    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        "0",
        "-q",
        "-k",
        PARTS[part],
        "tests/kernels/interpreted_kernels.py",
    ]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=os.environ | interpret, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    print(done.stdout)


HOPPER, AMPERE = 90, 80
SHARED_MEMORY = {HOPPER: 227 * 1024, AMPERE: 99 * 1024}  # of the smallest GPUs of each kind
TYPES = {"hidden": "*bf16", "weight": "*bf16", "grad": "*bf16", "targets": "*i64"}
ANY = {"N", "first_column"}  # compiled once for all values
INTEGERS = ANY | {"V", "H", "hidden_n", "weight_v", "SPLIT"}


@pytest.mark.parametrize("cap", [0.0, 30.0])
@pytest.mark.parametrize("architecture", SHARED_MEMORY)
@pytest.mark.parametrize("name", ["_forward_kernel", "_gradient_kernel"])
@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="there is no triton on this platform"
)
def test_kernels_compile(name, architecture, cap, monkeypatch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from common.kernels import triton as kernels

    properties = SimpleNamespace(shared_memory_per_block_optin=SHARED_MEMORY[architecture])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    blocks = kernels._blocks(SimpleNamespace(dtype=torch.bfloat16, is_cuda=True, device=None))
    kernel = getattr(kernels, name)
    # What Triton sees at a launch: contiguous rows, sizes and addresses that 16 divides, and
    # constants.
    constants = {"hidden_h": 1, "weight_h": 1, "CAP": cap, "GROUP": kernels.GROUP, **blocks}
    options = {"num_warps": blocks["num_warps"], "num_stages": blocks["num_stages"]}
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    signature, attributes = {}, {}
    for place, key in enumerate(kernel.arg_names):
        signature[key] = TYPES.get(key, "i32" if key in INTEGERS else "*fp32")
        if key in constants:
            signature[key] = "constexpr"
        elif key not in ANY:
            attributes[(place,)] = [["tt.divisibility", 16]]
    compiled = compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", architecture, 32),
        options=options,
    )
    assert compiled.metadata.shared <= SHARED_MEMORY[architecture]
    product = "wgmma.mma_async" if architecture == HOPPER else "mma.sync"
    assert product in compiled.asm["ptx"] and "cp.async" in compiled.asm["ptx"]
