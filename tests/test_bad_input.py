"""What a user can get wrong ends with exit code 2 and one sentence on stderr that names the option.

It does so before a model is loaded, and leaves no file or directory that was not there. `refused` checks all of that;
`test_a_good_start_*` show that its checks can fail.
"""

import json
import shutil

import pytest
import torch
from conftest import build_model
from helpers import DENSE_TASK, as_options, checkpoint, command, dense_task, metrics, options, train, write_task

import grpo
from common.commandline import parse
from common.models import TINY_MODEL

LOADING = "Loading weights"  # what transformers' progress bar says when a model is loaded


@pytest.fixture
def refused(tmp_path, capsys):
    """A function that starts a run with the given options and returns the sentence it was refused with."""

    def start(*argv, names, output=None):
        output = output or tmp_path
        before = sorted(output.rglob("*"))
        capsys.readouterr()
        assert command(*argv) == 2
        error = capsys.readouterr().err
        assert LOADING not in error and "Traceback" not in error
        (line,) = error.splitlines()
        assert line.startswith("grpo.py: error: ") and line.endswith((".", ".)"))
        assert names in line.removeprefix("grpo.py: error: ")
        assert sorted(output.rglob("*")) == before
        return line

    return start


@pytest.fixture
def given(tmp_path):
    """A command line: small settings, an output directory that does not exist yet, and the settings given."""

    def command_line(**settings):
        return options(tmp_path / "output", **settings)

    return command_line


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_model("qwen2", tmp_path_factory.mktemp("model") / "model")


def good_rows(count, start=0):
    return [{"question": f"What is {n} + {n}?", "answer": f"It is {2 * n}.\n#### {2 * n}"} for n in range(start, count)]


def write_rows(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_a_good_start_loads_a_model_and_returns_zero(given, model, tmp_path, capsys):
    data = write_rows(tmp_path / "good.jsonl", good_rows(20))
    assert command(*given(num_steps=1, task="gsm8k", data=data, model=model, max_response_tokens=2)) == 0
    assert LOADING in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "output").iterdir()) == ["run"]


# Numbers


@pytest.mark.parametrize("value", [0, -3])
@pytest.mark.parametrize(
    "field",
    [
        "num_steps", "prompts_per_step", "sync_interval", "max_prompt_tokens", "max_response_tokens",
        "max_skipped_updates", "max_tokens_per_microbatch", "eval_interval", "eval_size", "checkpoint_interval",
        "keep_checkpoints", "temperature", "learning_rate", "max_grad_norm",
    ],
)  # fmt: skip
def test_a_number_that_must_be_positive(field, value, given, refused):
    line = refused(*given(**{field: value}), names=f"--{field.replace('_', '-')} ")
    assert f" {float(value) if field in ('temperature', 'learning_rate', 'max_grad_norm') else value} " in line


@pytest.mark.parametrize("field", ["clip_low", "clip_high"])
def test_an_option_of_the_algorithm_that_must_be_positive(field, given, refused):
    refused(*given(**{field: 0}), names=f"--{field.replace('_', '-')} 0.0 ")


@pytest.mark.parametrize("field", ["sync_offset", "warmup_steps", "completions_per_step"])
def test_a_number_that_must_not_be_negative(field, given, refused):
    refused(*given(**{field: -1}), names=f"--{field.replace('_', '-')} -1 ")


def test_data_of_a_task_that_has_its_own(given, refused, tmp_path):
    data = write_rows(tmp_path / "good.jsonl", good_rows(20))
    refused(*given(task="addition", data=data), names=f"--data {data}")


def test_chat_template_that_refuses_the_messages(given, refused, model, tmp_path):
    directory = shutil.copytree(model, tmp_path / "model")
    template = "{{ raise_exception('no system messages') }}"
    (directory / "chat_template.jinja").write_text(template)
    assert "no system messages" in refused(*given(task="gsm8k", model=directory), names=f"--model {directory}")


def test_tokens_that_the_model_does_not_have(given, refused, model, tmp_path):
    directory = shutil.copytree(model, tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"vocab_size": 8}))
    refused(*given(task="gsm8k", model=directory), names="--model")


@pytest.mark.parametrize("size", [1, 0, -2])
def test_group_size_below_two(size, given, refused):
    refused(*given(group_size=size), names=f"--group-size {size} ")


@pytest.mark.parametrize("field", ["temperature", "learning_rate", "max_grad_norm"])
def test_not_a_number(field, given, refused):
    refused(*given(**{field: "nan"}), names=f"--{field.replace('_', '-')} nan ")


@pytest.mark.parametrize("field", ["temperature", "learning_rate"])
def test_infinity(field, given, refused):
    refused(*given(**{field: "inf"}), names=f"--{field.replace('_', '-')} inf ")


@pytest.mark.parametrize("rate", ["1e38", "1.1e37", "1e300"])
def test_learning_rate_beyond_float32(rate, given, refused):
    line = refused(*given(learning_rate=rate), names=f"--learning-rate {float(rate)} ")
    assert "float32" in line and "1e37" in line


def test_largest_learning_rate_is_one_that_the_optimizer_takes():
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    grpo.check(grpo.Args(learning_rate=1e37))
    torch.optim.AdamW([parameter], lr=1e37, betas=(0.9, 0.999)).step()
    assert parameter.isfinite().all()


# Tasks


def test_unknown_task(given, refused):
    line = refused(*given(task="additon"), names="--task additon ")
    assert "addition" in line and "gsm8k" in line  # says which there are


def test_task_file_is_missing(given, refused, tmp_path):
    refused(*given(task=f"{tmp_path}/absent.py:Digits"), names=f"--task {tmp_path}/absent.py:Digits")


def test_task_class_is_missing(given, refused, tmp_path):
    path = write_task(tmp_path, DENSE_TASK)
    refused(*given(task=f"{path}:Digit"), names=f"--task {path}:Digit")


@pytest.mark.parametrize(
    "text, reason",
    [("import no_such_module", "no_such_module"), ("class Broken(:\n", "SyntaxError"), ("1 / 0", "Zero")],
)
def test_task_file_raises_on_import(text, reason, given, refused, tmp_path):
    path = write_task(tmp_path, text)
    assert reason in refused(*given(task=f"{path}:Broken"), names=f"--task {path}:Broken")


def test_task_has_no_problems(given, refused, tmp_path):
    path = write_task(tmp_path, DENSE_TASK.replace('"eval": (100, self.eval_size)', '"eval": (0, 0)'))
    refused(*given(task=f"{path}:Digits"), names="--task ")


@pytest.mark.parametrize(
    "text",
    [
        "class Mine:\n    def __init__(self, *args): raise ValueError('my own mistake')",
        "class Mine:\n    pass",  # takes no data options
        "import common.tasks\nclass Mine(common.tasks.Task):\n    def problems(self, split): raise KeyError('mistake')",
        "import common.tasks\nclass Mine(common.tasks.Task):\n    def problems(self, split): return [{'text': 'Why?'}]",
        "import common.tasks\nclass Mine(common.tasks.Task):\n    def problems(self, split): return [{'prompt': None}]",
        "class Mine:\n    def __init__(self, *args): pass\n    def problems(self, split): return [{'prompt': 'Why?'}]",
    ],
    ids=[
        "constructor_raises",
        "constructor_without_data",
        "problems_raises",
        "problem_without_prompt",
        "prompt_is_no_text",
        "no_task",
    ],
)
def test_task_class_is_wrong(text, given, refused, tmp_path):
    path = write_task(tmp_path, text)
    refused(*given(task=f"{path}:Mine"), names="--task ")


# Data

ROW = '{"question": "What is 1 + 1?", "answer": "#### 2"}'


@pytest.mark.parametrize(
    "bad_row",
    [
        "{'question': 1}", ROW[:-1], "not JSON", "", "   ", '{"question": "What is 1 + 1?"}',
        '{"question": "What is 1 + 1?", "answer": 2}', '{"question": "What is 1 + 1?", "answer": null}',
        '{"question": "", "answer": "#### 2"}', '{"question": "What is 1 + 1?", "answer": "2 ####"}', "[" * 100_000,
        '{"question": "What is 1 + 1?", "answer": "#### 2", "id": ' + "9" * 5000 + "}",
        '["What is 1 + 1?", "#### 2"]', "3", "null", ROW + ROW,
    ],
)  # fmt: skip
@pytest.mark.parametrize("option", ["data", "eval_data"])
def test_malformed_row_is_named_by_its_number(bad_row, option, given, refused, tmp_path):
    bad = write_rows(tmp_path / "bad.jsonl", [ROW, ROW, bad_row, ROW])
    good = write_rows(tmp_path / "good.jsonl", [ROW] * 20)
    line = refused(
        *given(task="gsm8k", **{"data": good, option: bad}), names=f"--{option.replace('_', '-')} {tmp_path}/bad.jsonl"
    )
    assert "row 3" in line


def test_trailing_blank_lines_are_no_rows(given, model, tmp_path):
    data = write_rows(tmp_path / "data.jsonl", [*good_rows(20), "", " "])
    assert command(*given(num_steps=1, task="gsm8k", data=data, model=model, max_response_tokens=2)) == 0


@pytest.mark.parametrize("name", ["absent.jsonl", "absent.parquet", "absent.json", "absent"])
@pytest.mark.parametrize("option", ["data", "eval_data"])
def test_data_is_missing(name, option, given, refused, tmp_path):
    good = write_rows(tmp_path / "good.jsonl", [ROW] * 20)
    refused(
        *given(task="gsm8k", **{"data": good, option: tmp_path / name}),
        names=f"--{option.replace('_', '-')} {tmp_path / name}",
    )


@pytest.mark.parametrize("content", ["", "\n", "\n\n \n"])
def test_data_is_empty(content, given, refused, tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    refused(*given(task="gsm8k", data=path), names=f"--data {path}")


def test_data_is_not_text(given, refused, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(ROW.encode() + b"\n\xff\xfe\x00\n")
    refused(*given(task="gsm8k", data=path), names=f"--data {path}")


def test_parquet_is_corrupted(given, refused, tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(good_rows(20)), path)
    intact = path.read_bytes()
    for content in (intact[: len(intact) // 2], b"", b"PAR1 but nothing else", intact[:-8] + b"\0\0\0\0PAR1"):
        path.write_bytes(content)
        refused(*given(task="gsm8k", data=path), names=f"--data {path}")
    # A damaged page in the middle of a file whose footer is intact.
    path.write_bytes(intact[:10] + bytes(byte ^ 0xFF for byte in intact[10:120]) + intact[120:])
    refused(*given(task="gsm8k", data=path), names=f"--data {path}")


def test_parquet_row_without_text_is_named_by_its_number(given, refused, tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "data.parquet"
    rows = good_rows(20)
    rows[6]["answer"] = None
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert "row 7" in refused(*given(task="gsm8k", data=path), names=f"--data {path}")


def test_directory_without_data(given, refused, tmp_path):
    directory = tmp_path / "no_data"
    directory.mkdir()
    refused(*given(task="gsm8k", data=directory), names=f"--data {directory}")


@pytest.mark.parametrize("rows, eval_size", [(8, 8), (8, 9), (1, 1)])
def test_eval_size_leaves_nothing_to_train_on(rows, eval_size, given, refused, tmp_path):
    data = write_rows(tmp_path / "data.jsonl", [ROW] * rows)
    refused(*given(task="gsm8k", data=data, eval_size=eval_size), names=f"--eval-size {eval_size} ")


def test_eval_size_is_more_than_the_held_out_rows(given, refused, tmp_path):
    data = write_rows(tmp_path / "data.jsonl", [ROW] * 20)
    eval_data = write_rows(tmp_path / "held_out.jsonl", [ROW] * 5)
    argv = given(task="gsm8k", data=data, eval_data=eval_data, eval_size=6)
    line = refused(*argv, names=f"--eval-data {eval_data}")
    assert "--eval-size 6 " in line and " 5 rows" in line


# Models


def test_model_directory_is_missing(given, refused, tmp_path):
    refused(*given(model=tmp_path / "absent"), names=f"--model {tmp_path / 'absent'}")


def test_model_is_not_on_this_machine(given, refused):
    refused(*given(model="no-such-user/no-such-model"), names="--model no-such-user/no-such-model")


def broken_model(model, directory, remove=(), truncate=(), write=None):
    shutil.copytree(model, directory)
    for name in remove:
        (directory / name).unlink()
    for name in truncate:
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content[: len(content) // 2])
    for name, text in (write or {}).items():
        (directory / name).write_text(text)
    return directory


@pytest.mark.parametrize(
    "damage",
    [
        {"remove": ["config.json"]},
        {"remove": ["model.safetensors"]},
        {"truncate": ["config.json"]},
        {"truncate": ["tokenizer.json"]},
        {"remove": ["tokenizer.json", "tokenizer_config.json"]},
        {"write": {"config.json": '{"model_type": "no-such-architecture"}'}},
    ],
    ids=[
        "no_config", "no_weights", "truncated_config", "truncated_tokenizer", "no_tokenizer", "unknown_architecture",
    ],
)  # fmt: skip
def test_model_directory_is_broken(damage, given, refused, model, tmp_path):
    directory = broken_model(model, tmp_path / "model", **damage)
    refused(*given(model=directory), names=f"--model {directory}")


@pytest.mark.parametrize(
    "damage",
    [{"truncate": ["model.safetensors"]}, {"write": {"model.safetensors": ""}}, "other_shapes", "missing_tensor"],
    ids=["truncated_weights", "empty_weights", "other_shapes", "missing_tensor"],
)
def test_weights_are_broken(damage, given, model, tmp_path, capsys):
    # These show only when the weights are read, so `refused`, which wants nothing loaded, asks too much.
    from safetensors.torch import load_file, save_file

    directory = broken_model(model, tmp_path / "model", **(damage if isinstance(damage, dict) else {}))
    if damage == "other_shapes":
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    if damage == "missing_tensor":  # transformers fills it with random numbers
        tensors = load_file(directory / "model.safetensors")
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    assert command(*given(model=directory, task=dense_task(tmp_path))) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and f"--model {directory}" in error.splitlines()[-1]
    assert not (tmp_path / "output" / "run").exists()


@pytest.mark.parametrize(
    "key, row, value, said",
    [
        ("model.layers.1.mlp.up_proj.weight", -1, float("nan"), "model.layers.1.mlp.up_proj.weight"),
        ("model.layers.0.self_attn.q_proj.bias", 3, float("-inf"), "model.layers.0.self_attn.q_proj.bias"),
        ("model.embed_tokens.weight", -1, float("inf"), "model.embed_tokens.weight"),
        ("model.norm.weight", slice(None), 3e38, "its logits"),  # finite, unlike what comes of it
    ],
)
def test_weights_are_not_finite(key, row, value, said, given, model, tmp_path, capsys):
    # What a run leaves behind whose last update ruined the weights.
    from safetensors.torch import load_file, save_file

    directory = broken_model(model, tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    tensors[key][row] = value
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    assert command(*given(model=directory, task=dense_task(tmp_path))) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert f"--model {directory} " in error.splitlines()[-1] and f"first in {said})" in error.splitlines()[-1]
    assert not (tmp_path / "output").exists()


def test_chat_template_is_missing_where_it_is_needed(given, refused, model, tmp_path):
    directory = broken_model(model, tmp_path / "model", remove=["chat_template.jinja"])
    data = write_rows(tmp_path / "data.jsonl", [ROW] * 20)
    line = refused(*given(model=directory, task="gsm8k", data=data), names=f"--model {directory}")
    assert "chat template" in line


def test_chat_template_is_missing_where_it_is_not_needed(given, model, tmp_path):
    directory = broken_model(model, tmp_path / "model", remove=["chat_template.jinja"])
    argv = given(model=directory, task=dense_task(tmp_path), num_steps=1, max_response_tokens=2)
    assert command(*argv) == 0


def test_revision_of_a_directory(given, refused, model):
    refused(*given(model=model, revision="v1"), names="--revision v1")


def test_sequences_longer_than_the_model_can_read(given, refused, tmp_path):
    # Learned position embeddings end somewhere; without a check that shows as an IndexError in the middle of a run.
    model = build_model("gpt2", tmp_path / "model", n_positions=20)
    refused(*given(model=model, task=dense_task(tmp_path), max_response_tokens=32), names="--max-")


# Device and output


def test_unknown_device(given, refused):
    for device in ("gpu", "cuda:first", "mps", "meta", "tpu"):
        refused(*given(device=device), names=f"--device {device} ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu(given, refused):
    refused(*given(device="cuda"), names="--device cuda ")
    refused(*given(device="cuda:1"), names="--device cuda:1 ")


def test_run_directory_exists(given, refused, tmp_path):
    run_dir = tmp_path / "output" / "run"
    run_dir.mkdir(parents=True)
    (run_dir / "metrics.jsonl").write_text("precious\n")
    line = refused(*given(), names="--name run")
    assert f"--resume {run_dir}" in line  # says what to do instead
    assert (run_dir / "metrics.jsonl").read_text() == "precious\n"


def test_run_directory_is_a_file(given, refused, tmp_path):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "run").write_text("precious\n")
    refused(*given(), names="--name run")


@pytest.mark.parametrize("below", ["", "sub", "sub/sub"])
def test_output_cannot_be_written(below, refused, tmp_path):
    # Below a regular file nothing can be created, not even by root.
    (tmp_path / "file").write_text("")
    (tmp_path / "file").chmod(0o777)
    refused(*options(tmp_path / "file" / below), names=f"--output {tmp_path / 'file' / below}")


# Prompts


def test_prompts_over_the_budget_are_refused(given, refused, tmp_path):
    task = dense_task(tmp_path)  # its prompts have 10 or 11 tokens
    argv = given(task=task, max_prompt_tokens=10, long_prompts="refuse")
    line = refused(*argv, names="--max-prompt-tokens 10")
    assert "of 40 train prompts" in line and "--long-prompts drop" in line


def test_prompts_over_the_budget_are_left_out_and_counted(given, model, tmp_path, capsys):
    data = write_rows(tmp_path / "data.jsonl", [*good_rows(6), {"question": "What? " * 300, "answer": "#### 2"}] * 2)
    argv = given(
        task="gsm8k", data=data, model=model, max_prompt_tokens=1000, eval_size=7, completions_per_step=16,
        num_steps=3, max_response_tokens=1,
    )  # fmt: skip
    assert command(*argv) == 0
    error = capsys.readouterr().err
    assert "1 of 7 train prompts are longer than --max-prompt-tokens 1000 and are left out." in error
    assert "1 of 7 eval prompts are longer than --max-prompt-tokens 1000 and are left out." in error
    completions = (tmp_path / "output" / "run" / "completions.jsonl").read_text()
    assert "What is 5 + 5?" in completions and "What? What?" not in completions


@pytest.mark.parametrize("long_prompts", ["drop", "refuse"])
def test_all_prompts_are_too_long(long_prompts, given, refused, tmp_path):
    argv = given(task=dense_task(tmp_path), max_prompt_tokens=5, long_prompts=long_prompts)
    refused(*argv, names="--max-prompt-tokens 5")


# Resuming


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, model):
    directory = tmp_path_factory.mktemp("resume")
    return train(directory, model=model, task=dense_task(directory), num_steps=1, max_response_tokens=2)


@pytest.mark.parametrize(
    "contradiction",
    [
        {"seed": 7}, {"learning_rate": 0.5}, {"group_size": 8}, {"clip_high": 0.3}, {"sync_interval": 2},
        {"task": "addition"}, {"model": TINY_MODEL}, {"temperature": 0.7}, {"reference_kl": False},
        {"max_response_tokens": 8}, {"precision": "bfloat16"}, {"eval_size": 3}, {"long_prompts": "refuse"},
    ],
    ids=str,
)  # fmt: skip
def test_resume_with_contradicting_arguments(contradiction, refused, run_dir):
    (option, *_) = as_options(contradiction)
    saved = (run_dir / "args.json").read_text()
    line = refused("--resume", run_dir, *as_options(contradiction), names=option.replace("--no-", "--"), output=run_dir)
    assert "contradicts" in line
    assert (run_dir / "args.json").read_text() == saved


def test_resume_with_arguments_repeated(run_dir):
    # The command line that began a run may be given again, in full.
    saved = json.loads((run_dir / "args.json").read_text())
    del saved["script"], saved["resume"]
    args = parse(grpo.Args, grpo.__file__, ["--resume", str(run_dir), *as_options(saved)])
    assert args == grpo.Args(**{**saved, "resume": str(run_dir)})


@pytest.mark.parametrize(
    "change",
    [
        {"num_steps": 9}, {"eval_interval": 3}, {"checkpoint_interval": 3}, {"keep_checkpoints": 9}, {"threads": 2},
        {"completions_per_step": 9}, {"track": True}, {"wandb_project": "p"}, {"wandb_mode": "offline"},
    ],
    ids=str,
)  # fmt: skip
def test_resume_may_change_how_long_and_what_is_written(change, run_dir):
    args = parse(grpo.Args, grpo.__file__, ["--resume", str(run_dir), *as_options(change)])
    saved = json.loads((run_dir / "args.json").read_text())
    del saved["script"]
    assert args == grpo.Args(**{**saved, "resume": str(run_dir), **change})


@pytest.mark.parametrize("form", ["--resume {}", "--resume={}", "--num-steps 2 --resume {} --threads 1"])
def test_resume_in_every_form_takes_the_saved_arguments(form, run_dir):
    args = parse(grpo.Args, grpo.__file__, form.format(run_dir).split())
    assert (args.group_size, args.max_response_tokens, args.resume) == (4, 2, str(run_dir))


def test_resume_of_a_missing_directory(refused, tmp_path):
    refused("--resume", tmp_path / "absent", names=f"--resume {tmp_path / 'absent'}")
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("content", [None, "", '{"script": "gr', "[]", "{}", "null", '"text"'])
def test_resume_of_a_directory_that_is_no_run(content, refused, tmp_path):
    (tmp_path / "other").mkdir()
    if content is not None:
        (tmp_path / "other" / "args.json").write_text(content)
    refused("--resume", tmp_path / "other", names=f"--resume {tmp_path / 'other'}", output=tmp_path / "other")


def test_resume_by_another_script(refused, run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "copy")
    saved = json.loads((run_dir / "args.json").read_text())
    (tmp_path / "copy" / "args.json").write_text(json.dumps({**saved, "script": "another"}))
    line = refused("--resume", tmp_path / "copy", names=f"--resume {tmp_path / 'copy'}", output=tmp_path / "copy")
    assert "another" in line


@pytest.mark.parametrize("change", ["more", "fewer"])
def test_resume_by_another_version(change, refused, run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "copy")
    saved = json.loads((run_dir / "args.json").read_text())
    saved = {**saved, "forgotten": 1} if change == "more" else {k: v for k, v in saved.items() if k != "clip_high"}
    (tmp_path / "copy" / "args.json").write_text(json.dumps(saved))
    line = refused("--resume", tmp_path / "copy", names=f"--resume {tmp_path / 'copy'}", output=tmp_path / "copy")
    assert ("forgotten" if change == "more" else "clip_high") in line


def test_resume_of_a_run_that_has_more_steps_already(refused, run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "copy")
    assert command("--resume", tmp_path / "copy", "--num-steps", 3) == 0
    assert command("--resume", tmp_path / "copy", "--num-steps", 2) in (0, 2)
    assert [record["step"] for record in metrics(tmp_path / "copy")] == [0, 1, 2, 3]
    assert checkpoint(tmp_path / "copy", 3)["step"] == 3
