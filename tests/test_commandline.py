"""From the command line to `main(args)`: what is refused before `main` is called, resuming, exit
codes, and Ctrl-C.
"""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import build_model
from helpers import REPOSITORY, as_options, command, dense_task, options, resume, train

import grpo
import rec_oneside_nois
import red_weight
from common import distributed
from common.commandline import check, parse, run
from common.errors import BadInput, RunStopped
from common.interrupt import finish_step_on_interrupt
from common.models import TINY_MODEL
from common.options import RunOptions, as_command, option

FLOATS = ("temperature", "learning_rate", "max_grad_norm", "sampler_timeout")


@pytest.fixture
def main(monkeypatch):
    """Replaces `grpo.main`: the list of the arguments that it was called with."""
    calls = []
    monkeypatch.setattr(grpo, "main", calls.append)
    return calls


def contents(directory):
    return {path: path.read_bytes() if path.is_file() else None for path in directory.rglob("*")}


@pytest.fixture
def refused(main, tmp_path, capsys):
    """A function that gives a command line and returns the message it was refused with, before
    `main` was called.
    """

    def give(*argv, names, directory=None):
        directory = directory or tmp_path
        before = contents(directory)
        capsys.readouterr()
        assert command(*argv) == 2
        output, error = capsys.readouterr()
        (line,) = error.splitlines()
        assert line.startswith("grpo.py: error: ") and line.endswith((".", ".)")) and not output
        assert names in line.removeprefix("grpo.py: error: ")
        assert contents(directory) == before
        assert not main
        return line

    return give


@pytest.fixture
def given(tmp_path):
    """A command line: small settings, an output directory that does not exist yet, and the settings
    given.
    """

    def command_line(**settings):
        return options(tmp_path / "output", **settings)

    return command_line


def test_a_good_command_line_calls_main(given, main):
    assert (
        command(
            *given(
                seed=0, sync_offset=0, warmup_steps=0, threads=0, group_size=2, temperature="inf"
            )
        )
        == 0
    )
    (args,) = main
    assert isinstance(args, grpo.Args)
    assert (args.seed, args.group_size, args.temperature, args.serial) == (0, 2, float("inf"), True)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_full_gpu_is_one_sentence_with_what_to_do(wrapped, monkeypatch, capsys):
    def fail(args):
        full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        if wrapped:
            raise RuntimeError("a layer failed") from full
        raise full

    monkeypatch.setattr(grpo, "main", fail)
    assert command() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("grpo.py: error: The GPU's memory is full: ")
    remedies = ("--max-tokens-per-microbatch", "--gradient-checkpointing", "--no-reference-kl")
    assert all(remedy in line for remedy in remedies)
    monkeypatch.setattr(grpo, "main", lambda args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command()


def test_what_is_said_of_a_full_gpu_where_more_is_known_is_kept(monkeypatch, capsys):
    def fail(args):
        raise BadInput("--engine vllm does not fit.") from torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(grpo, "main", fail)
    assert command() == 2
    assert capsys.readouterr().err == "grpo.py: error: --engine vllm does not fit.\n"


# Numbers


@pytest.mark.parametrize("value", [0, -3])
@pytest.mark.parametrize(
    "field",
    [
        "num_steps", "prompts_per_step", "sync_interval", "updates_per_batch", "replicas",
        "max_prompt_tokens", "max_response_tokens", "eval_interval", "eval_size",
        "checkpoint_interval", *FLOATS,
    ],
)  # fmt: skip
def test_a_number_that_must_be_positive(field, value, given, refused):
    line = refused(*given(**{field: value}), names=f"--{field.replace('_', '-')} ")
    assert f" {float(value) if field in FLOATS else value} " in line
    assert ("above 0" if field in FLOATS else "at least 1") in line


@pytest.mark.parametrize("field", ["clip_low", "clip_high", "kl_coef"])
@pytest.mark.parametrize("value", [-0.1, "nan"])
def test_an_option_of_the_algorithm_that_must_not_be_negative(field, value, given, refused):
    line = refused(*given(**{field: value}), names=f"--{field.replace('_', '-')} {value} ")
    assert "at least 0" in line


def test_the_least_and_the_default_values_pass(given, main):
    settings = {"clip_low": 0, "clip_high": 0, "kl_coef": 0, "reference_kl": False}
    assert command(*given(**settings, rollouts_interval=0)) == 0
    (args,) = main
    assert (args.clip_low, args.clip_high, args.kl_coef, args.rollouts_interval) == (0, 0, 0, 0)
    for script in (grpo, rec_oneside_nois, red_weight):
        check(script.Args())


def test_an_option_that_needs_another(given, refused, main):
    line = refused(*given(kl_coef=0.1, reference_kl=False), names="--kl-coef 0.1 ")
    assert line == "grpo.py: error: --kl-coef 0.1 cannot work: leave out --no-reference-kl."
    assert command(*given(kl_coef=0.1)) == 0 and main.pop().kl_coef == 0.1


@dataclass
class Bounds:
    free: float = -1.0
    count: int = option(3, at_least=2)
    scale: float = option(1.0, above=0.5)
    penalty: float = option(0.0, at_least=-1, needs="helper")
    helper: bool = True


@pytest.mark.parametrize(
    "values, message",
    [
        ({"count": 1}, "--count 1 cannot work: give a number of at least 2."),
        ({"scale": 0.5}, "--scale 0.5 cannot work: give a number above 0.5."),
        ({"scale": float("nan")}, "--scale nan cannot work: give a number above 0.5."),
        ({"penalty": float("nan")}, "--penalty nan cannot work: give a number of at least -1."),
        ({"penalty": -1.5}, "--penalty -1.5 cannot work: give a number of at least -1."),
        ({"penalty": -1.0, "helper": False}, "--penalty -1.0 cannot work: leave out --no-helper."),
    ],
    ids=str,
)
def test_what_an_option_declares_of_its_values(values, message):
    with pytest.raises(BadInput, match=f"^{re.escape(message)}$"):
        check(Bounds(**values))


def test_what_an_option_does_not_rule_out():
    check(Bounds())
    check(Bounds(free=float("nan"), count=2, scale=0.51, penalty=-1.0))
    check(Bounds(scale=float("inf"), penalty=0.0, helper=False))


@dataclass
class Mine(grpo.Args):
    """As a researcher writes them: without rules."""

    beta: float = 1.0
    """β: of mine"""
    shift: int = 2
    bonus: float = option(0.0)
    """with nothing declared"""


@pytest.mark.parametrize("value", [0, -1])
def test_own_options_without_rules_may_be_anything(value, monkeypatch):
    argv = ["--beta", str(value), "--shift", str(value), "--bonus", str(value), "--seed", "4"]
    args = parse(Mine, grpo.__file__, argv)
    check(args)
    assert type(args) is Mine
    assert (args.beta, args.shift, args.bonus, args.seed) == (value, value, value, 4)


@pytest.mark.parametrize("field", ["sync_offset", "warmup_steps", "threads", "seed"])
def test_a_number_that_must_not_be_negative(field, given, refused):
    assert "at least 0" in refused(*given(**{field: -1}), names=f"--{field.replace('_', '-')} -1 ")


@pytest.mark.parametrize("size", [1, 0, -2])
def test_group_size_below_two(size, given, refused):
    assert "at least 2" in refused(*given(group_size=size), names=f"--group-size {size} ")


@pytest.mark.parametrize("field", FLOATS)
def test_not_a_number(field, given, refused):
    refused(*given(**{field: "nan"}), names=f"--{field.replace('_', '-')} nan ")


# Sizes


def test_more_updates_than_groups(given, refused, main):
    line = refused(*given(prompts_per_step=8, updates_per_batch=9), names="--updates-per-batch 9 ")
    assert "more than 8 groups: lower it." in line
    assert command(*given(prompts_per_step=8, updates_per_batch=8)) == 0 and main.pop()


def test_fewer_prompts_than_ranks(monkeypatch):
    monkeypatch.setattr(distributed, "size", lambda: 5)
    with pytest.raises(BadInput, match="--prompts-per-step 4 is less than 5 ranks: raise it"):
        distributed.check_number_of_ranks(grpo.Args(prompts_per_step=4))
    distributed.check_number_of_ranks(grpo.Args(prompts_per_step=5))


def test_replicas_that_do_not_divide_the_ranks(monkeypatch):
    for ranks, refused, accepted in ((1, (2,), (1,)), (4, (3, 8), (1, 2, 4))):
        monkeypatch.setattr(distributed, "size", lambda ranks=ranks: ranks)
        for replicas in refused:
            what = f"--replicas {replicas} does not divide {ranks} ranks: give a divisor"
            with pytest.raises(BadInput, match=what):
                distributed.check_number_of_ranks(grpo.Args(replicas=replicas))
        for replicas in accepted:
            distributed.check_number_of_ranks(grpo.Args(replicas=replicas))


def test_a_resumed_run_is_checked_as_well(run_dir, refused):
    refused(*resume(run_dir, "--num-steps", 0), names="--num-steps 0 ", directory=run_dir)


# Resuming


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("resume")
    model = build_model("qwen2", directory / "model")
    return train(
        directory, model=model, task=dense_task(directory), num_steps=1, max_response_tokens=2
    )


@pytest.mark.parametrize(
    "contradiction",
    [
        {"seed": 7}, {"learning_rate": 0.5}, {"group_size": 8}, {"clip_high": 0.3},
        {"sync_interval": 2},
        {"task": "addition"}, {"model": TINY_MODEL}, {"temperature": 0.7}, {"reference_kl": False},
        {"max_response_tokens": 8}, {"precision": "bfloat16"}, {"eval_size": 3},
        {"max_prompt_tokens": 9}, {"kl_coef": 0.1}, {"updates_per_batch": 2}, {"warmup_steps": 3},
        {"lr_schedule": "linear"},
    ],
    ids=str,
)  # fmt: skip
def test_resume_with_contradicting_arguments(contradiction, refused, run_dir):
    (option, *_) = as_options(contradiction)
    argv = resume(run_dir, *as_options(contradiction))
    assert "contradicts" in refused(*argv, names=option.replace("--no-", "--"), directory=run_dir)


def test_resume_with_arguments_repeated(run_dir):
    # The command line that began a run may be given again, in full.
    saved = json.loads((run_dir / "args.json").read_text())
    del saved["script"], saved["resume"]
    args = parse(grpo.Args, grpo.__file__, resume(run_dir, *as_options(saved)))
    assert args == grpo.Args(**{**saved, "resume": str(run_dir)})


@pytest.mark.parametrize(
    "change",
    [
        {"num_steps": 9}, {"eval_interval": 3}, {"checkpoint_interval": 3}, {"threads": 2},
        {"sampler_timeout": 9.0}, {"track": True}, {"wandb_project": "p"},
    ],
    ids=str,
)  # fmt: skip
def test_resume_may_change_how_long_and_what_is_written(change, run_dir):
    args = parse(grpo.Args, grpo.__file__, resume(run_dir, *as_options(change)))
    saved = json.loads((run_dir / "args.json").read_text())
    del saved["script"]
    assert args == grpo.Args(**{**saved, "resume": str(run_dir), **change})


@pytest.mark.parametrize(
    "form", ["--resume {}", "--resume={}", "--num-steps 2 --resume {} --threads 1"]
)
def test_resume_in_every_form_takes_the_saved_arguments(form, run_dir):
    args = parse(grpo.Args, grpo.__file__, form.format(run_dir).split())
    assert (args.group_size, args.max_response_tokens, args.resume) == (4, 2, str(run_dir))


def test_resume_of_a_missing_directory(refused, tmp_path):
    refused(*resume(tmp_path / "absent"), names=f"--resume {tmp_path / 'absent'}")
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("content", [None, "", '{"script": "gr', "[]", "{}", "null", '"text"'])
def test_resume_of_a_directory_that_is_no_run(content, refused, tmp_path):
    (tmp_path / "other").mkdir()
    if content is not None:
        (tmp_path / "other" / "args.json").write_text(content)
    refused(*resume(tmp_path / "other"), names=f"--resume {tmp_path / 'other'}")


def copy_with(run_dir, copy, **changes):
    """A copy of a run, with other values in its args.json; None takes an entry out."""
    shutil.copytree(run_dir, copy)
    saved = json.loads((run_dir / "args.json").read_text()) | changes
    (copy / "args.json").write_text(
        json.dumps({key: value for key, value in saved.items() if value is not None})
    )
    return copy


def test_what_takes_long_to_import_comes_after_the_command_line():
    argv = [sys.executable, "-X", "importtime", "grpo.py", "--num-stepz", "3"]
    ended = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    imported = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()}
    assert ended.returncode == 2 and "--num-steps" in ended.stderr and "torch" in imported
    heavy = {"transformers.modeling_utils", "torch.distributed.tensor", "torch._dynamo"}
    assert not imported & (heavy | {"torch.distributed.checkpoint", "matplotlib", "pandas"})


def test_the_command_that_repeats_a_run(monkeypatch):
    named = {"name": "one", "output": "here", "resume": "here/one", "resume_if_exists": True}
    own = {"task": "my tasks/a.py:Mine", "seed": 3, "serial": True, "reference_kl": False}
    words = "--serial --no-reference-kl --task 'my tasks/a.py:Mine' --seed 3 --learning-rate 0.0002"
    assert as_command("grpo.py", grpo.Args(**named, **own)) == f"python grpo.py {words}"
    # Of files beside the script, and of others
    paths = {"task": "/here/tasks/a.py:Mine", "data": "/here too/data.csv"}
    words = "--data '/here too/data.csv' --task tasks/a.py:Mine --learning-rate 0.0002"
    assert as_command("/here/grpo.py", grpo.Args(**paths)) == f"python grpo.py {words}"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with_torchrun = "torchrun --nproc-per-node 4 grpo.py --learning-rate 0.0002"
    assert as_command("grpo.py", grpo.Args()) == with_torchrun


def test_resume_by_another_script(refused, run_dir, tmp_path):
    copy = copy_with(run_dir, tmp_path / "copy", script="another")
    assert "another.py" in refused(*resume(copy), names=f"--resume {copy}")


@pytest.mark.parametrize("change", [{"forgotten": 1}, {"clip_high": None}], ids=["more", "fewer"])
def test_resume_by_another_version(change, refused, run_dir, tmp_path):
    copy = copy_with(run_dir, tmp_path / "copy", **change)
    assert f"({next(iter(change))})" in refused(*resume(copy), names=f"--resume {copy}")


@pytest.mark.parametrize(
    "change", [{"num_steps": "many"}, {"temperature": None}, {"serial": 1}, {"model": 3}], ids=str
)
def test_resume_with_saved_arguments_of_another_type(change, refused, run_dir, tmp_path):
    copy = copy_with(run_dir, tmp_path / "copy", **change)
    assert f"({next(iter(change))})" in refused(*resume(copy), names=f"--resume {copy}")


def again(run_dir, **changes):
    """The command line that began a run, with --resume-if-exists and changes."""
    saved = json.loads((run_dir / "args.json").read_text()) | changes
    output, name = str(run_dir.parent), run_dir.name
    saved |= {"output": output, "name": name, "resume_if_exists": True}
    del saved["script"], saved["resume"]
    return as_options(saved)


def test_resume_if_exists_resumes_what_has_begun_and_begins_what_has_not(run_dir, tmp_path):
    def parsed(*argv):
        return parse(grpo.Args, grpo.__file__, argv)

    moved = shutil.copytree(run_dir, tmp_path / "moved")
    for directory in (run_dir, moved):
        assert parsed(*again(directory, num_steps=9)).resume == str(directory)
    assert parsed("--name", "new", "--output", str(tmp_path), "--resume-if-exists").resume == ""


def test_resume_if_exists_refuses_other_options(refused, run_dir):
    # also one that is left out now, and was given when the run began
    argv = again(run_dir)
    place = argv.index("--group-size")
    for changed in (again(run_dir, seed=7), [*argv[:place], *argv[place + 2 :]]):
        said = refused(*changed, names="contradicts the run's", directory=run_dir)
        assert "give the same, or another --name" in said


def test_resume_if_exists_without_a_run_to_look_for(refused, tmp_path):
    refused("--resume-if-exists", names="give its --name as well")
    (tmp_path / "other").mkdir()
    argv = ("--output", tmp_path, "--name", "other", "--resume-if-exists")
    refused(*argv, names=f"{tmp_path / 'other' / 'args.json'} holds no run")


def test_files_are_remembered_by_their_absolute_paths(tmp_path, monkeypatch):
    for name in ("task.py", "rows.jsonl", "gsm8k", "tiny"):
        (tmp_path / name).write_text("")
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    argv = [
        "--task",
        "task.py:Mine",
        "--data",
        "rows.jsonl",
        "--eval-data",
        "absent.jsonl",
        "--model",
        "model",
    ]
    argv += ["--learning-rate", "1e-5"]
    args = parse(grpo.Args, grpo.__file__, argv)
    assert (args.task, args.data) == (f"{tmp_path}/task.py:Mine", f"{tmp_path}/rows.jsonl")
    assert (args.eval_data, args.model) == ("absent.jsonl", f"{tmp_path}/model")
    args = parse(grpo.Args, grpo.__file__, ["--task", "gsm8k", "--data", "openai/gsm8k:main"])
    assert (args.task, args.data, args.model) == ("gsm8k", "openai/gsm8k:main", "tiny")


def test_help_has_a_description_and_an_example_and_no_path_of_this_machine(capsys):
    assert command("--help") == 0
    text = capsys.readouterr().out
    assert (
        "Group Relative Policy Optimization" in text
        and "--task gsm8k" in text
        and "usage: grpo.py" in text
    )
    assert str(REPOSITORY) not in text


def help_of(Args, capsys):
    """The parts of `--help` by title, each with its lines joined."""
    with pytest.raises(SystemExit):
        parse(Args, grpo.__file__, ["--help"])
    lines = [line.strip(" ─╭╮╰╯│") for line in capsys.readouterr().out.splitlines()]
    titles = ["options", "training options", "running options"]
    starts = [lines.index(title) for title in titles]
    assert starts == sorted(starts)
    ends = [*starts[1:], len(lines)]
    texts = [" ".join(" ".join(lines[a:b]).split()) for a, b in zip(starts, ends, strict=True)]
    return dict(zip(titles, texts, strict=True))


@pytest.mark.parametrize("Args", [grpo.Args, rec_oneside_nois.Args, red_weight.Args, Mine])
def test_help_has_two_groups_with_every_option_and_what_it_means(Args, capsys):
    text = help_of(Args, capsys)
    inherited = {field.name for field in dataclasses.fields(RunOptions)}
    assert {"device", "output", "resume"} < inherited and "seed" not in inherited
    for field in dataclasses.fields(Args):
        word = f"--{field.name.replace('_', '-')}"
        found = [name for name, part in text.items() if re.search(rf"(^| ){word}[ ,]", part)]
        assert found == ["running options" if field.name in inherited else "training options"]
    told = {
        "training options": ["G: responses to each prompt (default: 8)", "(default: 0.0002)"],
        "running options": ["the run's directory is OUTPUT/NAME (default: runs)"],
    }
    if Args is Mine:
        told["training options"] += ["β: of mine (default: 1.0)", "with nothing declared"]
    for name, sentences in told.items():
        assert all(sentence in text[name] for sentence in sentences)


def test_help_of_a_resumed_run_has_its_values_as_defaults(run_dir, capsys):
    assert command(*resume(run_dir, "--help")) == 0
    assert "G: responses to each prompt (default: 4)" in " ".join(
        capsys.readouterr().out.replace("│", " ").split()
    )


# How a run ends


@pytest.mark.parametrize("error, code", [(BadInput, 2), (RunStopped, 1)])
def test_an_error_of_ours_is_one_line_and_an_exit_code(error, code, monkeypatch, capsys):
    def main(args):
        raise error("--data x cannot be read (a library says:\n  no\n).")

    monkeypatch.setattr(sys, "argv", ["anything"])
    with pytest.raises(SystemExit) as ended:
        run(main, grpo.Args, "somewhere/red_weight.py")
    assert ended.value.code == code
    assert capsys.readouterr() == (
        "",
        "red_weight.py: error: --data x cannot be read (a library says: no ).\n",
    )


def test_a_system_error_is_one_line(monkeypatch, capsys):
    def main(args):
        Path("/dev/full").write_text("x" * 100_000)

    monkeypatch.setattr(sys, "argv", ["anything"])
    with pytest.raises(SystemExit) as ended:
        run(main, grpo.Args, "grpo.py")
    assert ended.value.code == 1
    assert capsys.readouterr() == ("", "grpo.py: error: [Errno 28] No space left on device\n")


def test_a_terminal_that_knows_ascii_only(run_dir):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    code = (
        "import sys, grpo\nfrom common.commandline import run\nsys.argv = ['x']\n"
        "run(lambda args: print('→ é'), grpo.Args, 'x')"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stdout) == (0, "\\u2192 \\xe9\n")


def test_any_other_error_keeps_its_traceback(monkeypatch):
    def main(args):
        raise KeyError("a bug")

    monkeypatch.setattr(sys, "argv", ["anything"])
    with pytest.raises(KeyError, match="a bug"):
        run(main, grpo.Args, "grpo.py")


# Ctrl-C; what it does to a whole run is in test_resume.py and sampling/test_process.py


def press_ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(params=[signal.default_int_handler, signal.SIG_IGN], ids=["terminal", "background"])
def before(request):
    """What SIGINT does before: raise KeyboardInterrupt, or nothing, where a shell started the run
    in the background.
    """
    handler = signal.signal(signal.SIGINT, request.param)
    yield request.param
    signal.signal(signal.SIGINT, handler)


def test_nothing_is_requested_without_ctrl_c(before, capsys):
    with finish_step_on_interrupt() as interrupt:
        assert not interrupt.requested
    assert not interrupt.requested and capsys.readouterr().out == ""
    assert signal.getsignal(signal.SIGINT) == before


def test_first_ctrl_c_only_asks(before, capsys):
    with finish_step_on_interrupt() as interrupt:
        press_ctrl_c()
        assert interrupt.requested
        assert "press Ctrl-C again to stop at once" in capsys.readouterr().out
    assert interrupt.requested
    assert signal.getsignal(signal.SIGINT) == before


def test_second_ctrl_c_is_an_interrupt_as_usual(before):
    with pytest.raises(KeyboardInterrupt), finish_step_on_interrupt():
        press_ctrl_c()
        press_ctrl_c()
    assert signal.getsignal(signal.SIGINT) == before


def test_the_handler_is_restored_after_an_error(before):
    with pytest.raises(RunStopped), finish_step_on_interrupt():
        raise RunStopped("no further.")
    assert signal.getsignal(signal.SIGINT) == before
