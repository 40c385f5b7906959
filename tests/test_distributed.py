"""Several ranks do what one process does: gradients, whole runs, resuming; and end together when
one of them fails.
"""

import contextlib
import functools
import json
import os
import random
import re
import shutil
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.run import main as torchrun
from transformers import AutoModelForCausalLM

from benchmarks import variants
from common import distributed
from common.models import TINY_MODEL, load_model, load_tokenizer
from common.sampling import Batch
from tests import ranks
from tests.conftest import REPOSITORY, build_model
from tests.helpers import (
    DENSE_TASK,
    Forked,
    assert_same_run,
    checkpoint,
    dense_task,
    finish,
    metrics,
    num_logged,
    options,
    resume,
    rollouts,
    steps,
    wait_for,
    write_task,
)
from tests.tasks.test_turns import SUMS

SCRIPTS = ("grpo", "rec_oneside_nois", "red_weight")


# Dealing


def test_every_micro_batch_counts_once_and_all_ranks_make_equally_many_passes(monkeypatch):
    kinds = [True, False, True, True, False, True, True]
    splits = [[1], [4], [0, 2], [3], [5, 6]]  # two of one kind, three of the other
    for size in (1, 2, 3, 4, 7):
        monkeypatch.setattr(distributed, "size", lambda size=size: size)
        dealt = []
        for rank in range(size):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            dealt.append(distributed.deal(splits, kinds))
        counted = [rows for mine in dealt for rows, repeated in mine if not repeated]
        assert sorted(counted) == sorted(splits)
        for passes in zip(*dealt, strict=True):  # raises where one rank makes fewer
            assert len({kinds[rows[0]] for rows, _ in passes}) == 1
    monkeypatch.setattr(distributed, "size", lambda: 1)
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    assert distributed.deal(splits, kinds) == [(rows, False) for rows in splits]


# Gradients


def make_batch(vocab_size, seed, lengths, advantages):
    """Sequences with responses of these lengths and these advantages, in groups of two.

    The sampler's log-probs are near those of a uniform policy.
    """
    rng = random.Random(seed)
    prompts = [[rng.randrange(vocab_size) for _ in range(rng.randint(2, 9))] for _ in lengths]
    responses = [[rng.randrange(vocab_size) for _ in range(length)] for length in lengths]
    logprobs = [[rng.uniform(-7, -4) for _ in response] for response in responses]
    return Batch(
        number=1,
        version=0,
        group_size=2,
        problems=list(range(len(lengths))),
        prompts=prompts,
        responses=responses,
        logprobs=logprobs,
        truncated=[False] * len(lengths),
        advantages_PG=advantages.view(-1, 2),
    )


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """What must be the same on any number of ranks, by name: see `ranks.loss_and_gradients`."""
    place = tmp_path_factory.mktemp("models")
    tied, untied = (build_model(family, place / family) for family in ("qwen2", "llama"))
    uneven, few = [1, 30, 2, 17, 9, 3, 22, 5], [12, 4]
    advantages = torch.tensor([1.0, -0.5, 2.0, -1.0, 0.3, -0.7, 0.9, -2.0], dtype=torch.float64)
    half = advantages.masked_fill(torch.arange(8) % 2 == 0, 0.0)
    # one response with a gradient: one rank has it
    lone = advantages.masked_fill(torch.arange(8) != 6, 0.0)
    variants.write("gspo", place / "gspo.py")
    plain = {
        "model": tied,
        "precision": "float32",
        "checkpointing": False,
        "large": 8192,
        "budget": 64,
    }
    made = {
        **{name: {"script": name, "lengths": uneven, "advantages": advantages} for name in SCRIPTS},
        "sequence-level loss": {
            "script": str(place / "gspo.py"),
            "lengths": uneven,
            "advantages": advantages,
        },
        "no gradient for half of the rows": {"lengths": uneven, "advantages": half},
        "a gradient for one row": {"lengths": uneven, "advantages": lone},
        "no gradient at all": {
            "lengths": uneven,
            "advantages": torch.zeros(8, dtype=torch.float64),
        },
        "fewer micro-batches than ranks": {
            "lengths": few,
            "advantages": advantages[:2],
            "budget": 1,  # a row each, as several ranks would split it
        },
        "untied head": {"model": untied, "lengths": uneven, "advantages": half},
        "large vocabulary": {"lengths": uneven, "advantages": half, "large": 1},
        "large vocabulary, untied": {
            "model": untied,
            "lengths": uneven,
            "advantages": half,
            "large": 1,
        },
        "recomputed activations": {"lengths": uneven, "advantages": half, "checkpointing": True},
        "bfloat16": {"lengths": uneven, "advantages": half, "precision": "bfloat16"},
    }
    for number, case in enumerate(made.values()):
        case["batch"] = make_batch(280, number, case["lengths"], case["advantages"])
        case |= {key: value for key, value in plain.items() if key not in case}
        case.setdefault("script", "grpo")
    return made


@pytest.fixture(scope="module")
def of_one_process(cases):
    return ranks.loss_and_gradients(list(cases.values()))


@pytest.mark.parametrize("count", [2, 3])
def test_gradients_are_those_of_one_process(count, cases, of_one_process):
    found, *_ = ranks.run_ranks(count, ranks.loss_and_gradients, list(cases.values()))
    for name, (loss, gradients), (true_loss, truth) in zip(
        cases, found, of_one_process, strict=True
    ):
        # Sums are made in another order. bfloat16 rounds each rank's share of a gradient, to 2⁻⁹ of
        # it.
        bound = 2e-2 if name == "bfloat16" else 1e-6
        assert abs(loss - true_loss) <= bound * max(1, abs(true_loss)), name
        size = torch.cat([gradient.flatten() for gradient in truth.values()]).norm()
        assert (size > 0) == (name != "no gradient at all")
        for key, gradient in gradients.items():
            assert (gradient - truth[key]).norm() <= bound * max(size, 1e-30), (name, key)


def test_replicas_have_the_same_gradients(cases, of_one_process):
    """Four ranks, two copies of two shards each."""
    chosen = [{**cases["no gradient for half of the rows"], "replicas": 2}]
    ((loss, gradients),), *_ = ranks.run_ranks(4, ranks.loss_and_gradients, chosen)
    true_loss, truth = of_one_process[list(cases).index("no gradient for half of the rows")]
    assert loss == pytest.approx(true_loss, rel=1e-6)
    for key, gradient in gradients.items():
        assert (gradient - truth[key]).norm() <= 1e-6 * truth[key].norm()


def test_passes_without_gradients_leave_no_trace(tmp_path):
    """Else a reference's memory grows with every step: it never makes a backward pass, which clears
    them.
    """
    assert ranks.run_ranks(
        2, ranks.layers_remembered, build_model("qwen2", tmp_path / "model")
    ) == [0, 0]


def test_decoding_is_checked_without_gathering_all_weights(tmp_path):
    model = build_model("llama", tmp_path / "model")
    assert ranks.run_ranks(2, ranks.checked_decoding, model) == [(0, 0), (0, 0)]


def test_one_rank_reads_the_weights(tmp_path):
    """The others load neither whole weights nor another list of tokens that end a response."""
    directory = build_model(
        "llama", tmp_path / "model", hidden_size=512, intermediate_size=2048, num_hidden_layers=4
    )
    config = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    (tmp_path / "model" / "generation_config.json").write_text(
        json.dumps(config | {"eos_token_id": [7, 9]})
    )
    size = sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))
    loaded, sharded, end_ids = zip(*ranks.run_ranks(3, ranks.loaded, directory), strict=True)
    assert loaded[0] > 0.9 * size and max(loaded[1:]) < 0.1 * size and max(sharded) < 0.7 * size
    assert all({7, 9} < ids == end_ids[0] for ids in end_ids)


def test_weights_that_only_the_config_calls_tied_are_apart_on_all_ranks(tmp_path):
    directory = build_model("qwen2", tmp_path / "model", tie_word_embeddings=True)
    (path,) = (tmp_path / "model").glob("*.safetensors")
    tensors = load_file(path)
    head = tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, path, {"format": "pt"})
    for found in ranks.run_ranks(2, ranks.weights, directory):
        assert torch.equal(found["lm_head.weight"], head)


# Whole runs

# Four steps that are resumed, of six; version 3 of schedule (3, 2) is that of batch 6.
RUN = {
    "num_steps": 6,
    "eval_size": 5,
    "eval_interval": 2,
    "checkpoint_interval": 2,
    "max_tokens_per_microbatch": 60,
}
RUN |= {"learning_rate": 5e-5}  # Adam makes updates of gradients that are nothing but rounding


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A dense task, and half of the bundled model's layers: each costs time, however small."""
    place = tmp_path_factory.mktemp("settings")
    tiny = load_model(TINY_MODEL, "", torch.device("cpu"))
    layers = {"num_hidden_layers": 2, "layer_types": tiny.config.layer_types[:2]}
    half = AutoModelForCausalLM.from_config(type(tiny.config)(**tiny.config.to_dict() | layers))
    half.load_state_dict(tiny.state_dict(), strict=False)
    half.save_pretrained(place / "model")
    load_tokenizer(TINY_MODEL).save_pretrained(place / "model")
    return {"model": str(place / "model"), "task": dense_task(place)}


def run_on(count, argv, log, spawned=False):
    """A run of `grpo.py` on some ranks; fails with their output if one of them does."""
    codes = ["no answer"]
    with contextlib.suppress(AssertionError):
        codes = (
            [finish(argv, log)]
            if count == 1
            else ranks.run_ranks(count, ranks.script, argv, log, spawned)
        )
    assert not any(codes), "\n".join(
        path.read_text()[-3000:] for path in log.parent.glob(f"{log.name}*")
    )


@pytest.fixture(scope="module")
def lone_run(settings, tmp_path_factory):
    place = tmp_path_factory.mktemp("lone")
    run_on(1, options(place, **settings, **RUN), place / "log")
    return place / "run"


def leaves(value):
    """Everything in nested lists and dicts, keys included."""
    parts = [*value, *value.values()] if isinstance(value, dict) else value
    return (
        [leaf for part in parts for leaf in leaves(part)]
        if isinstance(value, dict | list)
        else [value]
    )


def assert_nearly_the_same(run_dir, other):
    """Completions, rewards and lengths are equal; other metrics up to rounding."""
    same_text = (run_dir / "completions.jsonl").read_text() == (
        other / "completions.jsonl"
    ).read_text()
    assert same_text
    found, expected = (rollouts(place) for place in (run_dir, other))
    for one, truth in zip(leaves(found), leaves(expected), strict=True):
        assert one == (
            pytest.approx(truth, rel=0.01, abs=1e-4) if isinstance(truth, float) else truth
        )
    for found, expected in zip(metrics(run_dir), metrics(other), strict=True):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            if key.startswith(("reward", "response_length", "eval", "step", "lag")):
                assert found[key] == value, key
            else:
                assert found[key] == pytest.approx(value, rel=1e-4, abs=1e-4), key


def names_in_model(run_dir):
    return load_file(run_dir / "model" / "model.safetensors").keys()


def names_in_checkpoint(run_dir):
    newest = max((run_dir / "checkpoints").glob("*.pt"))
    return torch.load(newest, weights_only=True)["model"].keys()


@pytest.mark.parametrize("count", [2, 4])
def test_a_run_on_several_ranks_is_that_of_one(count, settings, lone_run, tmp_path):
    run_on(count, options(tmp_path, **settings, **RUN), tmp_path / "log")
    assert_nearly_the_same(tmp_path / "run", lone_run)
    for names_of in (names_in_model, names_in_checkpoint):  # tied weights once
        assert names_of(tmp_path / "run") == names_of(lone_run)
        assert not any("lm_head" in name for name in names_of(lone_run))


def test_several_updates_per_batch_on_two_ranks_are_those_of_one(settings, tmp_path):
    more = {**RUN, "updates_per_batch": 4, "num_steps": 4, "rollouts_interval": 1}
    for count in (1, 2):
        argv = options(tmp_path, name=str(count), **settings, **more)
        run_on(count, argv, tmp_path / f"{count}.log")
    assert_nearly_the_same(tmp_path / "2", tmp_path / "1")
    assert all(record["ratio/max"] > 1.0001 for record in steps(tmp_path / "1"))
    for name in ("1", "2"):
        moments = checkpoint(tmp_path / name, 4)["optimizer"]["state"].values()
        assert {int(moment["step"]) for moment in moments} == {16}


@pytest.mark.parametrize("schedule", [(2, 0), (1, 1), (3, 2)])
def test_samplers_beside_the_ranks(schedule, settings, tmp_path):
    lag = {"sync_interval": schedule[0], "sync_offset": schedule[1]}
    for count, name, serial in ((1, "one", True), (2, "two", False)):
        run_on(
            count,
            options(tmp_path, name=name, **settings, **{**RUN, **lag, "serial": serial}),
            tmp_path / f"{name}.log",
            spawned=schedule == (1, 1),  # once as outside of tests
        )
    assert_nearly_the_same(tmp_path / "two", tmp_path / "one")


def test_two_ranks_resume_bit_for_bit(settings, tmp_path):
    lag = {"sync_interval": 2, "sync_offset": 1}
    run_on(2, options(tmp_path, name="whole", **settings, **{**RUN, **lag}), tmp_path / "log")
    run_on(
        2,
        options(tmp_path, name="parts", **settings, **{**RUN, **lag, "num_steps": 4}),
        tmp_path / "log",
    )
    run_on(2, resume(tmp_path / "parts", "--num-steps", 6), tmp_path / "log")
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_several_turns_on_two_ranks_are_those_of_one(settings, tmp_path):
    task = f"{write_task(tmp_path, SUMS, 'sums.py')}:Sums"
    turns = {"task": task, "model": "tiny", "max_response_tokens": 80, "num_steps": 3}
    for count in (1, 2):
        argv = options(tmp_path, name=str(count), **{**RUN, **turns})
        run_on(count, argv, tmp_path / f"{count}.log")
    assert_nearly_the_same(tmp_path / "2", tmp_path / "1")
    assert all(record["environment_tokens"] > 0 for record in steps(tmp_path / "1"))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_two_ranks_train_an_adapter_as_one_does(precision, settings, tmp_path):
    lora = {"lora_rank": 4, "learning_rate": 1e-3, "precision": precision, "num_steps": 4}
    if precision == "bfloat16":
        lora |= {"num_steps": 2, "gradient_checkpointing": True}
    for count in (1, 2):
        argv = options(tmp_path, name=str(count), **settings, **{**RUN, **lora})
        run_on(count, argv, tmp_path / f"{count}.log")
    if precision == "bfloat16":  # rounding samples other tokens
        found = [metrics(tmp_path / name)[1] for name in ("1", "2")]
        # not 0: attention of a pass with a gradient is float32, see layers.py
        assert found[0]["kl/ref_k2"] < 1e-3 > found[1]["kl/ref_k2"]
        assert found[0]["sampler_mismatch/mean"] < 0.1 > found[1]["sampler_mismatch/mean"]
    else:
        assert_nearly_the_same(tmp_path / "2", tmp_path / "1")
    files = [
        load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("1", "2")
    ]
    assert files[0].keys() == files[1].keys() and len(files[0]) == 2 * 2 * 7


def test_an_adapter_on_two_ranks_beside_training_and_resumed(settings, tmp_path):
    lag = {"sync_interval": 2, "sync_offset": 1, "lora_rank": 4, "learning_rate": 1e-3}
    argv = options(tmp_path, name="whole", **settings, **{**RUN, **lag, "serial": False})
    run_on(2, argv, tmp_path / "log")
    parts = {**RUN, **lag, "serial": True, "num_steps": 4}
    run_on(2, options(tmp_path, name="parts", **settings, **parts), tmp_path / "log")
    run_on(2, resume(tmp_path / "parts", "--num-steps", 6), tmp_path / "log")
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.fixture(scope="module")
def first_steps(settings, tmp_path_factory):
    """A function that runs the first four steps on some ranks, once, and returns a copy."""

    @functools.cache
    def run(count, task):
        place = tmp_path_factory.mktemp("first")
        argv = options(place, **{**settings, **RUN, "num_steps": 4, "task": task})
        run_on(count, argv, place / "log")
        return place / "run"

    def copied(count, directory, task=settings["task"]):
        return shutil.copytree(run(count, task), directory / "run")

    return copied


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3)])
def test_another_number_of_ranks_goes_on(before, after, first_steps, lone_run, tmp_path):
    run_dir = first_steps(before, tmp_path)
    run_on(after, resume(run_dir, "--num-steps", 6), tmp_path / "log")
    assert_nearly_the_same(run_dir, lone_run)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A task for whose readers every model is large, from the first byte on."""
    text = f"{DENSE_TASK}\n\nfrom common import checkpoints\n\ncheckpoints.ONE_FILE = 0\n"
    return f"{write_task(tmp_path_factory.mktemp('large'), text)}:Digits"


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (2, 3)])
def test_a_large_model_is_saved_in_parts(
    before, after, large, first_steps, settings, lone_run, tmp_path
):
    first_steps(before, tmp_path, large)
    made = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [path.name for path in made] == ["step_000002.shards", "step_000004.shards"]
    assert len([*made[1].glob("*.distcp")]) == before
    run_on(after, resume(tmp_path / "run", "--num-steps", 6), tmp_path / "log")
    assert_nearly_the_same(tmp_path / "run", lone_run)
    if before == after:
        whole = {**settings, **RUN, "name": "whole", "task": large}
        run_on(2, options(tmp_path, **whole), tmp_path / "log")
        assert_same_run(tmp_path / "run", tmp_path / "whole")
        (tmp_path / "run" / "checkpoints" / "step_000006.shards" / "__1_0.distcp").write_bytes(
            b"damaged"
        )
        codes, said = said_by_ranks(tmp_path, resume(tmp_path / "run", "--num-steps", 7))
        assert all(codes) and "step_000006.shards cannot be read" in said[0]


def test_an_adapter_is_saved_in_parts_without_its_base(large, settings, tmp_path):
    lora = {**settings, **RUN, "task": large, "lora_rank": 4, "learning_rate": 1e-3}
    run_on(2, options(tmp_path, **{**lora, "num_steps": 4}), tmp_path / "log")
    parts = tmp_path / "run" / "checkpoints" / "step_000004.shards"
    size = sum(path.stat().st_size for path in parts.iterdir())
    assert size < (Path(settings["model"]) / "model.safetensors").stat().st_size
    run_on(2, resume(tmp_path / "run", "--num-steps", 6), tmp_path / "log")
    run_on(2, options(tmp_path, **{**lora, "name": "whole"}), tmp_path / "log")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


# Failing together


def _torchrun(argv, log):
    """`torchrun …` in this process, its output in `log`."""
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(REPOSITORY)
    try:
        torchrun(argv)
    except Exception as error:
        traceback.print_exception(error.with_traceback(error.__traceback__.tb_next))  # without us
        sys.exit(1)


class Torchrun:
    """`torchrun grpo.py …`, forked, with whatever it starts; all of that has the log's path in its
    environment.
    """

    def __init__(self, argv, log, *more):
        self.log, self.mark = Path(log), f"STARTED_FOR={log}"
        environment = {
            **os.environ,
            "STARTED_FOR": str(log),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
        }
        words = ["--nproc-per-node", "2", *more, REPOSITORY / "grpo.py", *argv]
        self.agent = Forked(_torchrun, words, log, environment)
        Torchrun.started.append(self)

    started: ClassVar = []

    def processes(self):
        """Ids and command lines of all that are alive."""
        found = {self.agent.pid: "torchrun"} if self.agent.poll() is None else {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                state = (path / "stat").read_text().rpartition(")")[2].split()[0]
                if state != "Z" and self.mark.encode() in (path / "environ").read_bytes():
                    found[int(path.name)] = (path / "cmdline").read_text()
            except OSError:
                continue
        return found

    def find(self, *words):
        """The first process with all these words in its command line; waits until there is one."""

        def look():
            assert self.agent.poll() is None, self.log.read_text()[-4000:]
            return next(
                (
                    pid
                    for pid, line in self.processes().items()
                    if all(word in line for word in words)
                ),
                None,
            )

        return wait_for(look)

    def is_over(self, seconds=10):
        """Whether nothing of it is alive after so many seconds; `said` has its output then."""
        deadline = time.monotonic() + seconds
        while (self.agent.poll() is None or self.processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        self.said = self.log.read_text()
        return self.agent.poll() is not None and not self.processes()


@pytest.fixture(autouse=True)
def nothing_stays():
    """Of a test that failed, either."""
    yield
    while Torchrun.started:
        for pid in Torchrun.started.pop().processes():
            os.kill(pid, signal.SIGKILL)


LONG = {"num_steps": 10_000, "max_tokens_per_microbatch": 60}


def started(settings, tmp_path, *more, **lag):
    run = Torchrun(options(tmp_path, **{**settings, **LONG, **lag}), tmp_path / "log", *more)
    wait_for(lambda: num_logged(tmp_path / "run") > 2 or run.agent.poll() is not None)
    assert run.agent.poll() is None, run.log.read_text()[-4000:]
    return run


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_all(rank, settings, tmp_path):
    run = started(settings, tmp_path)
    of_rank = f"\0RANK={rank}\0".encode()
    (pid,) = (
        pid
        for pid, line in run.processes().items()
        if "grpo.py" in line and of_rank in Path(f"/proc/{pid}/environ").read_bytes()
    )
    os.kill(pid, signal.SIGKILL)
    assert run.is_over(20)
    assert "exitcode  : -9" in run.said and run.agent.returncode
    assert 'grpo.py", line' not in run.said  # no traceback but torchrun's own
    # Said at the start as well, since rank 0 may be the one that is killed.
    how = f"ontinue with:\n    python grpo.py --resume {tmp_path / 'run'}\n"
    assert run.said.count(how) == 1 + rank


def test_ranks_do_not_outlive_torchrun_nor_their_samplers(settings, tmp_path):
    run = started(settings, tmp_path, sync_interval=2, serial=False)
    assert run.find("spawn_main")
    run.agent.kill()
    assert run.is_over()


def test_a_killed_sampler_is_named_once(settings, tmp_path):
    run = started(settings, tmp_path, sync_interval=2, serial=False)
    os.kill(run.find("spawn_main"), signal.SIGKILL)
    # A rank waits for 5 s before it says why it ends, and rank 0 plots its curves when it ends.
    assert run.is_over(20)
    assert run.said.count("The sampler's process died (exit code -9") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_all_ranks_finish_the_step(number, settings, tmp_path):
    run = started(settings, tmp_path)
    run.agent.send_signal(number)
    assert run.is_over(20)
    step = num_logged(tmp_path / "run") - 1
    assert (tmp_path / "run" / "checkpoints" / f"step_{step:06d}.pt").exists()
    assert run.said.count(f"Stopped after step {step} of 10000; there is a checkpoint.") == 1
    run_on(1, resume(tmp_path / "run", "--num-steps", step + 1), tmp_path / "log-2")


def test_two_machines(settings, lone_run, tmp_path):
    """Two agents on this machine, with a rank each, meet at a port."""
    port = ranks.free_port()
    meet = [
        "--nnodes",
        "2",
        "--nproc-per-node",
        "1",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        f"127.0.0.1:{port}",
    ]
    argv = options(tmp_path, **settings, **RUN)
    agents = [
        Torchrun(argv, tmp_path / f"log-{number}", *meet, "--rdzv-id", "1") for number in range(2)
    ]
    for agent in agents:
        assert agent.agent.wait(90) == 0, agent.log.read_text()[-3000:]
    assert_nearly_the_same(tmp_path / "run", lone_run)


def failing_on_rank(rank, tmp_path, what):
    """The dense task, with a line of code that a rank runs before its rewards."""
    line = f"        if os.environ.get('RANK') == '{rank}':\n            {what}\n        return sum"
    text = "import os, time\n" + DENSE_TASK.replace("        return sum", line)
    return f"{write_task(tmp_path, text)}:Digits"


def said_by_ranks(tmp_path, argv, count=2):
    """The exit codes of a run on two ranks, and what each of them said."""
    codes = ranks.run_ranks(count, ranks.script, argv, tmp_path / "log")
    return codes, [(tmp_path / f"log-{rank}").read_text() for rank in range(count)]


def test_a_reward_that_raises_on_one_rank_names_it(tmp_path):
    task = failing_on_rank(1, tmp_path, "raise KeyError('oh')")
    _, (zero, one) = said_by_ranks(tmp_path, options(tmp_path, task=task))
    assert "rank 1: Digits.reward raised KeyError('oh')" in one
    assert "Digits.reward" not in zero and "Communication between ranks failed" in zero


@pytest.mark.parametrize("hangs", [0, 1])
def test_a_rank_that_hangs_is_named(hangs, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "FOR_RANK_0", timedelta(seconds=4))
    # Until the other rank has said so.
    said = f"'ranks failed' in open({str(tmp_path / f'log-{1 - hangs}')!r}).read()"
    task = failing_on_rank(hangs, tmp_path, f"while not {said}: time.sleep(0.1)")
    _, logs = said_by_ranks(
        tmp_path, options(tmp_path, task=task, sampler_timeout=4.0, eval_size=1)
    )
    message = rf"Communication between ranks failed \(.*[Rr]ank.? {hangs}.*--resume"
    assert re.search(message, logs[1 - hangs]), logs[1 - hangs]


def test_bad_input_is_said_once_with_exit_code_2(settings, tmp_path):
    run = Torchrun(options(tmp_path, **settings, prompts_per_step=1), tmp_path / "log")
    assert run.is_over(60)
    assert run.said.count("--prompts-per-step 1 is less than 2 ranks: raise it.") == 1
    # No traceback but torchrun's, whose files may lie below the repository, in a .venv.
    files = re.findall(rf'File "({re.escape(str(REPOSITORY))}[^"]*)"', run.said)
    packages = Path(torch.__file__).parents[1]
    assert "exitcode  : 2" in run.said and all(Path(f).is_relative_to(packages) for f in files)
