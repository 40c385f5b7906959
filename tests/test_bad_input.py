"""What a user can get wrong ends with exit code 2 and one line on stderr that names the option.

It does so before a model is loaded, and creates no file or directory. `refused` checks all of that;
`test_a_good_start_*` shows that its checks can fail. Numbers, and arguments of resumed runs:
test_commandline.py.
"""

import io
import json
import os
import shutil

import pytest
import torch
from conftest import build_model
from helpers import (
    DENSE_TASK,
    command,
    dense_task,
    options,
    resume,
    run_module,
    train,
    write_task,
)

LOADING = "Loading weights"  # what transformers' progress bar says when a model is loaded


@pytest.fixture
def refused(tmp_path, capsys):
    """A function that starts a run with the given options and returns the message it was refused
    with.
    """

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
    """A command line: small settings, an output directory that does not exist yet, and the settings
    given.
    """

    def command_line(**settings):
        return options(tmp_path / "output", **settings)

    return command_line


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_model("qwen2", tmp_path_factory.mktemp("model") / "model")


def good_rows(count, start=0):
    return [
        {"question": f"What is {n} + {n}?", "answer": f"It is {2 * n}.\n#### {2 * n}"}
        for n in range(start, count)
    ]


def write_rows(path, rows):
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return path


def test_a_good_start_loads_a_model_and_returns_zero(given, model, tmp_path, capsys):
    data = write_rows(tmp_path / "good.jsonl", good_rows(20))
    assert (
        command(*given(num_steps=1, task="gsm8k", data=data, model=model, max_response_tokens=2))
        == 0
    )
    assert LOADING in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "output").iterdir()) == ["run"]


# Tasks


def test_data_of_a_task_that_has_its_own(given, refused, tmp_path):
    data = write_rows(tmp_path / "good.jsonl", good_rows(20))
    for task in ("addition", dense_task(tmp_path)):
        refused(*given(task=task, data=data), names=f"--data {data}: the task ")
        line = refused(*given(task=task, eval_data=data), names=f"--eval-data {data}: the task ")
        assert "set reads_data = True in its class." in line


def test_unknown_task(given, refused):
    line = refused(*given(task="additon"), names="--task additon ")
    assert "addition" in line and "gsm8k" in line  # says which there are


def test_task_file_is_missing(given, refused, tmp_path):
    refused(
        *given(task=f"{tmp_path}/absent.py:Digits"), names=f"--task {tmp_path}/absent.py:Digits"
    )


def test_task_names_no_class(given, refused, tmp_path):
    path = write_task(tmp_path, DENSE_TASK)
    line = refused(*given(task=path), names=f"--task {path} names no class: ")
    assert line.endswith(f"give {path}:ClassName.")


@pytest.mark.parametrize("name", ["Plain", "function", "json"])
def test_task_class_is_no_task(name, given, refused, tmp_path):
    path = write_task(tmp_path, "import json\nclass Plain: pass\ndef function(*args): pass\n")
    line = refused(*given(task=f"{path}:{name}"), names=f"--task {path}:{name}: {name} is no task")
    assert line.endswith("let it inherit from common.tasks.Task.")


def test_task_class_is_missing(given, refused, tmp_path):
    path = write_task(tmp_path, DENSE_TASK)
    line = refused(*given(task=f"{path}:Digit"), names=f"--task {path}:Digit")
    assert line.endswith(f"there is no Digit in {path}; it has Digits.")


@pytest.mark.parametrize(
    "text, reason",
    [
        ("import no_such_module", "no_such_module"),
        ("class Broken(:\n", "SyntaxError"),
        ("1 / 0", "Zero"),
    ],
)
def test_task_file_raises_on_import(text, reason, given, refused, tmp_path):
    path = write_task(tmp_path, text)
    assert reason in refused(*given(task=f"{path}:Broken"), names=f"--task {path}:Broken")


def test_task_has_no_problems(given, refused, tmp_path):
    path = write_task(
        tmp_path, DENSE_TASK.replace('"eval": (100, self.eval_size)', '"eval": (0, 0)')
    )
    refused(*given(task=f"{path}:Digits"), names="--task Digits has no eval problem: ")


MINE = "import common.tasks\nclass Mine(common.tasks.Task):\n"


@pytest.mark.parametrize(
    "text",
    [
        f"{MINE}    def __init__(self, *args): raise ValueError('my own mistake')",
        f"{MINE}    def __init__(self): pass",
        f"{MINE}    def problems(self, split): raise KeyError('mistake')",
        f"{MINE}    def problems(self, split): return [{{'text': 'Why?'}}]",
        f"{MINE}    def problems(self, split): return [{{'prompt': None}}]",
    ],
    ids=[
        "constructor_raises",
        "constructor_without_data",
        "problems_raises",
        "problem_without_prompt",
        "prompt_is_no_text",
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
        "{'question': 1}", ROW[:-1], "not JSON", '{"question": "What is 1 + 1?"}',
        '{"question": "What is 1 + 1?", "answer": null}',
        '{"question": "1 + 1?", "answer": "The answer is 2"}',
        '{"question": "", "answer": "#### 2"}',
        '{"question": "What is 1 + 1?", "answer": "2 ####"}', "[" * 100_000,
        '["What is 1 + 1?", "#### 2"]', "3", "null",
    ],
)  # fmt: skip
@pytest.mark.parametrize("option", ["data", "eval_data"])
def test_malformed_row_is_named_by_its_number(bad_row, option, given, refused, tmp_path):
    bad = write_rows(tmp_path / "bad.jsonl", [ROW, ROW, bad_row, ROW])
    good = write_rows(tmp_path / "good.jsonl", [ROW] * 20)
    line = refused(
        *given(task="gsm8k", **{"data": good, option: bad}),
        names=f"--{option.replace('_', '-')} {tmp_path}/bad.jsonl",
    )
    assert "row 3" in line


def test_trailing_blank_lines_are_no_rows(given, model, tmp_path):
    data = write_rows(tmp_path / "data.jsonl", [*good_rows(20), "", " "])
    assert (
        command(*given(num_steps=1, task="gsm8k", data=data, model=model, max_response_tokens=2))
        == 0
    )


def test_a_bom_blank_lines_and_numbers_are_accepted(given, refused, tmp_path):
    number = '{"question": "What is 1 + 1?", "answer": 2}'
    held_out = write_rows(tmp_path / "held_out.jsonl", ["\ufeff" + ROW, "", "   ", number, ROW, ""])
    data = write_rows(tmp_path / "good.jsonl", [ROW] * 20)
    argv = given(task="gsm8k", data=data, eval_data=held_out, eval_size=6)
    assert " 3 rows" in refused(*argv, names=f"--eval-data {held_out}")


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
    for content in (
        intact[: len(intact) // 2],
        b"",
        b"PAR1 but nothing else",
        intact[:-8] + b"\0\0\0\0PAR1",
    ):
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
    line = refused(*given(model=tmp_path / "absent"), names=f"--model {tmp_path / 'absent'}")
    assert "no such directory; give a model directory" in line


def test_model_directory_is_mistyped(given, refused, tmp_path, monkeypatch):
    """Beside one that is there: no name on the hub, which would be tried for half a minute."""
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    line = refused(*given(model="models/mime"), names="--model models/mime")
    assert "no such directory; give a model directory" in line


def test_model_is_not_on_this_machine(given, refused):
    line = refused(
        *given(model="no-such-user/no-such-model"), names="--model no-such-user/no-such-model"
    )
    assert "no such directory, and on the hub: " in line


def test_model_is_a_gguf_file(given, refused, tmp_path):
    (tmp_path / "model.gguf").write_text("GGUF")
    assert "smollm2.py" in refused(*given(model=tmp_path), names=f"--model {tmp_path}")


def test_a_model_gets_no_learning_rate_by_default(given, refused, model):
    argv = given(model=model, task="gsm8k")
    place = argv.index("--learning-rate")
    line = refused(
        *argv[:place], *argv[place + 2 :], names="--learning-rate: the default, 0.0002, "
    )
    assert f"--model {model}" in line and "(1e-6, or 1e-5 if small)" in line
    argv += ["--lora-rank", "8"]
    line = refused(*argv[:place], *argv[place + 2 :], names="--learning-rate: the default, 0.002, ")
    assert "(1e-5, or 1e-4 if small)" in line


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
        "no_config", "no_weights", "truncated_config", "truncated_tokenizer", "no_tokenizer",
        "unknown_architecture",
    ],
)  # fmt: skip
def test_model_directory_is_broken(damage, given, refused, model, tmp_path):
    directory = broken_model(model, tmp_path / "model", **damage)
    refused(*given(model=directory), names=f"--model {directory}")


@pytest.mark.parametrize(
    "damage",
    [
        {"truncate": ["model.safetensors"]},
        {"write": {"model.safetensors": ""}},
        "other_shapes",
        "missing_tensor",
    ],
    ids=["truncated_weights", "empty_weights", "other_shapes", "missing_tensor"],
)
def test_weights_are_broken(damage, given, model, tmp_path, capsys):
    # These show only when the weights are read, so `refused`, which wants nothing loaded, asks too
    # much.
    from safetensors.torch import load_file, save_file

    directory = broken_model(
        model, tmp_path / "model", **(damage if isinstance(damage, dict) else {})
    )
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
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    "key, row, value",
    [
        ("model.layers.1.mlp.up_proj.weight", -1, float("nan")),
        ("model.layers.0.self_attn.q_proj.bias", 3, float("-inf")),
        ("model.embed_tokens.weight", -1, float("inf")),
        ("model.norm.weight", slice(None), 3e38),  # finite, unlike what comes of it
    ],
)
def test_weights_are_not_finite(key, row, value, given, model, tmp_path, capsys):
    # As saved after an update that ruined the weights.
    from safetensors.torch import load_file, save_file

    directory = broken_model(model, tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    tensors[key][row] = value
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    assert command(*given(model=directory, task=dense_task(tmp_path))) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert f"--model {directory}: " in error.splitlines()[-1] and "NaN" in error.splitlines()[-1]
    assert not (tmp_path / "output").exists()


def test_chat_template_that_refuses_the_messages(given, refused, model, tmp_path):
    directory = shutil.copytree(model, tmp_path / "model")
    template = "{{ raise_exception('no system messages') }}"
    (directory / "chat_template.jinja").write_text(template)
    assert "no system messages" in refused(
        *given(task="gsm8k", model=directory), names=f"--model {directory}"
    )


def test_tokens_that_the_model_does_not_have(given, refused, model, tmp_path):
    directory = shutil.copytree(model, tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"vocab_size": 8}))
    refused(*given(task="gsm8k", model=directory), names="--model")


def test_chat_template_is_missing_where_it_is_needed(given, refused, model, tmp_path):
    directory = broken_model(model, tmp_path / "model", remove=["chat_template.jinja"])
    data = write_rows(tmp_path / "data.jsonl", [ROW] * 20)
    line = refused(*given(model=directory, task="gsm8k", data=data), names=f"--model {directory}")
    assert "chat template" in line


def test_chat_template_is_missing_where_it_is_not_needed(given, model, tmp_path):
    directory = broken_model(model, tmp_path / "model", remove=["chat_template.jinja"])
    argv = given(model=directory, task=dense_task(tmp_path), num_steps=1, max_response_tokens=2)
    assert command(*argv) == 0


def test_a_models_own_code_is_never_run(given, refused, model, tmp_path, monkeypatch):
    directory = shutil.copytree(model, tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"},
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "mine.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\n"
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("yes\n" * 9))  # what transformers would ask for
    refused(*given(model=directory, task=dense_task(tmp_path)), names=f"--model {directory}")
    assert not (tmp_path / "ran").exists()


def test_positions_that_would_change_in_the_middle_of_a_response(given, refused, model, tmp_path):
    # "longrope", of Phi-3, scales all positions otherwise once a text is longer than so many
    # tokens.
    directory = shutil.copytree(model, tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    config["rope_parameters"] = {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 24,
        "short_factor": [1.0] * 16, "long_factor": [4.0] * 16, "factor": 4.0,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    # its prompts have up to 12 tokens
    settings = {"model": directory, "task": dense_task(tmp_path), "num_steps": 1}
    assert "prompt of 12" in refused(
        *given(**settings, max_response_tokens=13), names="--max-response-tokens 13"
    )
    assert command(*given(**settings, max_response_tokens=12)) == 0


def test_wandb_without_a_login(given, model, tmp_path):
    # In a process of its own: wandb keeps what it was first set up with.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    environment |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    argv = given(model=model, task=dense_task(tmp_path), track=True)
    ended = run_module("grpo", *argv, environment=environment)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "error: --track: wandb does not start" in ended.stderr.splitlines()[-1]
    assert not list((tmp_path / "output").iterdir())  # the name is free


def test_revision_of_a_directory(given, refused, model):
    refused(*given(model=model, revision="v1"), names="--revision v1")


def test_sequences_longer_than_the_model_can_read(given, refused, tmp_path):
    # Learned position embeddings end somewhere; without a check that shows as an IndexError in the
    # middle of a run.
    model = build_model("gpt2", tmp_path / "model", n_positions=20)
    refused(*given(model=model, task=dense_task(tmp_path), max_response_tokens=32), names="--max-")


# Sizes


def test_more_updates_than_groups(given, refused):
    argv = given(prompts_per_step=8, updates_per_batch=9)
    assert " 8 groups" in refused(*argv, names="--updates-per-batch 9 ")


def test_a_penalty_without_the_reference_that_it_needs(given, refused):
    argv = given(kl_coef=0.1, reference_kl=False)
    assert "leave out --no-reference-kl." in refused(*argv, names="--kl-coef 0.1 ")


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


def test_prompts_over_the_budget_are_left_out_and_counted(
    given, model, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("common.runlog.COMPLETIONS_PER_STEP", 16)
    data = write_rows(
        tmp_path / "data.jsonl",
        [*good_rows(6), {"question": "What? " * 300, "answer": "#### 2"}] * 2,
    )
    settings = {"max_prompt_tokens": 1000, "eval_size": 7, "num_steps": 3, "max_response_tokens": 1}
    assert command(*given(task="gsm8k", data=data, model=model, **settings)) == 0
    error = capsys.readouterr().err
    assert (
        "1 of 7 train prompts are longer than --max-prompt-tokens 1000 and are left out." in error
    )
    assert "1 of 7 eval prompts are longer than --max-prompt-tokens 1000 and are left out." in error
    completions = (tmp_path / "output" / "run" / "completions.jsonl").read_text()
    assert "What is 5 + 5?" in completions and "What? What?" not in completions


def test_all_prompts_are_too_long(given, refused, tmp_path):
    argv = given(task=dense_task(tmp_path), max_prompt_tokens=5)  # its prompts have 10 or 11 tokens
    line = refused(*argv, names="--max-prompt-tokens 5")
    assert "40 of 40 train prompts" in line and "raise it to 10 or more" in line


# Resuming


def test_resume_of_a_run_that_has_more_steps_already(model, tmp_path, refused):
    run_dir = train(
        tmp_path, model=model, task=dense_task(tmp_path), num_steps=3, max_response_tokens=2
    )
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    line = refused(*resume(run_dir, "--num-steps", 2), names="--num-steps 2 is less than the 3 ")
    assert line.endswith("give 3 or more, or leave it out.")
    assert before and all(path.read_bytes() == content for path, content in before.items())
