"""Tasks: the bundled additions, GSM8K, tasks of one's own, and their prompts."""

import asyncio
import functools
import json
import random
import re
import subprocess
import sys
from decimal import Decimal

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, build_model
from helpers import CHATML, command, dense_task, resume, steps, train, write_task

from common.errors import BadInput, RunStopped
from common.models import TINY_MODEL, load_tokenizer
from common.tasks import Task, load_task
from common.tasks.addition import Addition
from common.tasks.gsm8k import GSM8K, GSM8K_SAMPLE
from common.tasks.problems import RESERVED, ProblemSet, load_problems


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY_MODEL)


def copy_rows(source, target, first, last):
    lines = source.read_text().splitlines(keepends=True)[first:last]
    target.write_text("".join(lines))
    return [json.loads(line) for line in lines]


# Chained additions


def test_training_and_held_out_additions_are_disjoint():
    task = Addition(eval_size=2000)
    training, held_out = task.problems("train"), task.problems("eval")
    assert len(training) == 8192 and len(held_out) == 2000
    prompts = [{problem["prompt"] for problem in problems} for problems in (training, held_out)]
    assert [len(p) for p in prompts] == [8192, 2000]  # no prompt twice
    assert not prompts[0] & prompts[1]
    # a larger set contains the smaller ones
    assert Addition(eval_size=9).problems("eval") == held_out[:9]


def test_answers_of_additions_are_right():
    for split in ("train", "eval"):
        problems = Addition(eval_size=200).problems(split)[:200]
        for problem in problems:
            terms = problem["prompt"].removeprefix("Q: ").removesuffix("\nA:").split("+")
            assert len(terms) in (3, 4) and all(1 <= int(term) <= 99 for term in terms)
            assert problem["answer"] == sum(map(int, terms))
        assert {len(problem["prompt"].split("+")) for problem in problems} == {3, 4}


@pytest.mark.parametrize(
    "response, reward",
    [
        (" 47+8=55 55+91=146 answer 146.", 1),
        ("answer 146.", 1),
        (" answer 145. wait, let me check. 47+8=55 55+91=146 answer 146.", 1),
        (" answer 146. wait, let me check. answer 145.", 0),  # the last word counts
        (" answer 0146.", 1),
        (" answer 1460.", 0),
        (" answer -146.", 0),
        (" answer 14 6.", 0),
        (" 47+8=55 55+91=146", 0),
        (" 146.", 0),
        (" Answer 146.", 0),
        ("", 0),
        (" answer .", 0),
        (" answer " + "9" * 5000 + ".", 0),  # Python's int refuses more than 4300 digits
    ],
)
def test_reward_of_an_addition(response, reward):
    task = Addition()
    problem = {"prompt": "Q: 47+8+91\nA:", "answer": 146}
    assert task.rewards([problem] * 2, [response, " 47+8=55 55+91=146 answer 146."]) == [reward, 1]


# GSM8K


def test_gsm8k_files_have_the_published_numbers_of_problems(gsm8k):
    task = GSM8K(str(gsm8k / "train.jsonl"), str(gsm8k / "test.jsonl"), eval_size=1319)
    training, held_out = task.problems("train"), task.problems("eval")
    assert (len(training), len(held_out)) == (7473, 1319)
    assert (
        len(
            GSM8K(str(gsm8k / "train.jsonl"), str(gsm8k / "test.jsonl"), eval_size=100).problems(
                "eval"
            )
        )
        == 100
    )
    rows = [json.loads(line) for line in (gsm8k / "test.jsonl").read_text().splitlines()]
    for problem, row in zip(held_out, rows, strict=True):
        (message,) = problem["prompt"]
        assert message["role"] == "user" and message["content"].endswith(
            "\\boxed{}.\n\n" + row["question"]
        )
        assert (
            row["answer"].endswith(f"#### {problem['answer']}")
            and problem["answer"].replace(",", "").lstrip("-").isdigit()
        )


def test_gsm8k_solutions_are_graded_right_and_others_wrong(gsm8k):
    task = GSM8K(str(gsm8k / "train.jsonl"), str(gsm8k / "test.jsonl"))
    rows = [json.loads(line) for line in (gsm8k / "train.jsonl").read_text().splitlines()]
    chosen = random.Random(0).sample(range(len(rows)), 40)
    problems = [task.problems("train")[i] for i in chosen]
    golds = [int(problem["answer"].replace(",", "")) for problem in problems]

    def graded(responses):
        grades = task.rewards(problems, responses)
        assert all(g["reward"] == g["accuracy"] for g in grades)
        return {(g["reward"], g["format"]) for g in grades}

    # ends with "#### 18": right, without a box
    assert graded([rows[i]["answer"] for i in chosen]) == {(1, 0)}
    assert graded([f"So it is \\boxed{{{gold}}}." for gold in golds]) == {(1, 1)}
    assert graded([f"So it is \\boxed{{{gold + 1}}}." for gold in golds]) == {(0, 1)}
    # no box, no ####: there is no answer to grade
    assert graded([f"So it is {gold}." for gold in golds]) == {(0, 0)}
    assert graded([""] * len(golds)) == {(0, 0)}


def test_the_sample_is_the_default_and_part_of_gsm8k(gsm8k):
    sample = GSM8K_SAMPLE.read_text().splitlines()
    assert len(sample) == 256 and len(set(sample)) == 256
    published = (gsm8k / "train.jsonl").read_text() + (gsm8k / "test.jsonl").read_text()
    assert set(sample) <= set(published.splitlines())
    task = GSM8K(eval_size=56)
    assert len(task.problems("train")) == 200 and len(task.problems("eval")) == 56


def test_without_held_out_data_the_last_rows_are_held_out(tmp_path):
    rows = copy_rows(GSM8K_SAMPLE, tmp_path / "data.jsonl", 0, 20)
    task = GSM8K(str(tmp_path / "data.jsonl"), eval_size=6)
    questions = {
        split: [p["prompt"][0]["content"].rpartition("\n\n")[2] for p in task.problems(split)]
        for split in ("train", "eval")
    }
    assert questions == {
        "train": [r["question"] for r in rows[:14]],
        "eval": [r["question"] for r in rows[14:]],
    }


def test_of_the_sample_64_rows_are_held_out_by_default(capsys):
    # Held-out data of one's own is used in full: that bound is the sample's.
    task = GSM8K()
    assert (len(task.problems("train")), len(task.problems("eval"))) == (192, 64)
    assert "64 are held out, not 256" in capsys.readouterr().err
    assert len(GSM8K(eval_size=64).problems("eval")) == 64
    task = GSM8K(eval_data=str(GSM8K_SAMPLE), eval_size=100)
    assert (len(task.problems("train")), len(task.problems("eval"))) == (256, 100)
    assert capsys.readouterr().err == ""


def test_directory_with_a_training_and_a_test_file(tmp_path):
    directory = tmp_path / "data"
    directory.mkdir()
    training = copy_rows(GSM8K_SAMPLE, directory / "train.jsonl", 0, 12)
    test = copy_rows(GSM8K_SAMPLE, directory / "test.jsonl", 12, 20)
    assert GSM8K(str(directory), eval_size=5).rows == {"train": training, "eval": test[:5]}
    # As held-out data, a dataset gives its test split.
    other = copy_rows(GSM8K_SAMPLE, tmp_path / "other.jsonl", 20, 30)
    assert GSM8K(str(tmp_path / "other.jsonl"), str(directory), eval_size=8).rows == {
        "train": other,
        "eval": test,
    }
    # Either way it has to have as many rows as an evaluation is to have.
    with pytest.raises(
        BadInput,
        match=f"--eval-size 9 is more than the 8 rows of the test split of --data {directory}",
    ):
        GSM8K(str(directory), eval_size=9)
    with pytest.raises(
        BadInput, match=f"--eval-size 9 is more than the 8 rows of --eval-data {directory}"
    ):
        GSM8K(str(tmp_path / "other.jsonl"), str(directory), eval_size=9)


def test_parquet_equals_jsonl(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = copy_rows(GSM8K_SAMPLE, tmp_path / "data.jsonl", 0, 30)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet")
    one, other = (
        GSM8K(str(tmp_path / f"data.{kind}"), eval_size=7) for kind in ("jsonl", "parquet")
    )
    for split in ("train", "eval"):
        assert one.problems(split) == other.problems(split)
    assert len(one.problems("train")) == 23


# Tasks of one's own

OWN_TASK = """
from common.tasks import Task


class Echo(Task):
    reads_data = True

    def problems(self, split):
        return [{"prompt": f"{split} {self.data} {n}", "n": n} for n in range(self.eval_size)]

    def reward(self, problem, response):
        words = len(response.split())
        return {"reward": len(response) / 100 + problem["n"], "accuracy": 0.25, "words": words}
"""


def test_a_task_of_ones_own_in_a_file(tmp_path, tokenizer):
    path = write_task(tmp_path, OWN_TASK)
    task = load_task(f"{path}:Echo", "some data", "", 3)
    assert [problem["prompt"] for problem in task.problems("eval")] == [
        f"eval some data {n}" for n in range(3)
    ]
    problem_set = load_problems(task, "train", tokenizer, 100)
    assert len(problem_set) == 3
    responses = [tokenizer.encode(text) for text in ("one two", "", "three", "two")]
    grades, texts = problem_set.grade([0, 1, 2, 1], responses)
    assert texts == ["one two", "", "three", "two"]
    assert grades == [
        {"reward": 0.07, "accuracy": 0.25, "words": 2},
        {"reward": 1, "accuracy": 0.25, "words": 0},
        {"reward": 2.05, "accuracy": 0.25, "words": 1},
        {"reward": 1.03, "accuracy": 0.25, "words": 1},
    ]


@pytest.mark.parametrize(
    "reward",
    [
        "1 / 0", "None", "'good'", "'nan'", "'1.0'", "b'1.0'",
        "{'reward': '1.0'}", "float('nan')", "float('inf')", "10 ** 400", "[1]",
        "{}", "{'accuracy': 1}", "{'reward': None}", "{'reward': float('-inf')}",
        "{'reward': 1, 'words': float('nan')}",
    ],
)  # fmt: skip
def test_a_reward_that_is_no_finite_number_stops_the_run(reward, tmp_path, tokenizer):
    text = OWN_TASK.replace(
        '{"reward": len(response) / 100 + problem["n"], "accuracy": 0.25', reward + " #"
    )
    problem_set = load_problems(
        load_task(f"{write_task(tmp_path, text)}:Echo"), "train", tokenizer, 100
    )
    with pytest.raises(
        RunStopped, match=r"^Echo.* the response 'seven' to {'prompt': 'train  7', 'n': 7}"
    ):
        problem_set.grade([7], [tokenizer.encode("seven")])


@pytest.mark.parametrize(
    "one", [1, True, np.float32(1), np.int64(1), np.bool_(True), torch.tensor(1.0), Decimal(1)]
)
def test_numbers_of_all_kinds_are_rewards(one, tokenizer):
    class Same(Prompts):
        def reward(self, problem, response):
            return one

    (grade,), _ = load_problems(Same("?"), "train", tokenizer, 9).grade([0], [[1]])
    assert grade == {"reward": 1.0} and type(grade["reward"]) is float


@pytest.mark.parametrize(
    "rewards, said",
    [
        ("raise KeyError('mine')", "KeyError('mine')"),
        ("return None", "NoneType"),
        ("return 1.0", "float"),
        ("return [1.0]", "1 rewards for 2 responses"),
        ("return [1.0] * 3", "3 rewards for 2 responses"),
        ("return 'ab'", "the reward 'a'"),
    ],
)
def test_rewards_that_are_not_one_per_response(rewards, said, tmp_path, tokenizer):
    text = OWN_TASK + f"\n    def rewards(self, problems, responses):\n        {rewards}\n"
    problem_set = load_problems(
        load_task(f"{write_task(tmp_path, text)}:Echo"), "train", tokenizer, 100
    )
    with pytest.raises(RunStopped, match=r"^Echo") as error:
        problem_set.grade([1, 2], [[1], [2]])
    assert said in str(error.value)


class Judge(Task):
    """Its rewards take a while, in which others are asked for; `most` were at work at one time."""

    concurrency = 3
    at_work = most = 0

    def problems(self, split):
        return [{"prompt": str(n), "n": n} for n in range(10)]

    async def reward(self, problem, response):
        self.at_work += 1
        self.most = max(self.most, self.at_work)
        # Like a connection to a server, a queue that is waited for belongs to its event loop.
        async with self.connection:
            await asyncio.sleep(0.001)
        self.at_work -= 1
        return {"reward": 1 / (problem["n"] - 7), "seen": len(response)}

    @functools.cached_property
    def connection(self):
        return asyncio.Semaphore(2)


def test_rewards_of_a_batch_may_be_waited_for_together(tokenizer):
    problem_set = load_problems(Judge(), "train", tokenizer, 9)
    numbers = [0, 1, 2, 3, 4, 5, 6, 8, 9]
    responses = [tokenizer.encode("1" * number) for number in numbers]
    for _ in range(2):  # the second batch waits for the same connection
        grades, _ = problem_set.grade(numbers, responses)
        assert grades == [{"reward": 1 / (number - 7), "seen": number} for number in numbers]
    assert problem_set.task.most == 3


def test_an_error_in_a_reward_that_is_waited_for(tokenizer):
    problem_set = load_problems(Judge(), "train", tokenizer, 9)
    with pytest.raises(RunStopped, match=r"^Judge.reward raised ZeroDiv.* response 'hm' to .*7"):
        problem_set.grade(range(10), [tokenizer.encode("hm")] * 10)


@pytest.mark.parametrize("name", [*sorted(RESERVED), "reward/mean", "time/step", "my/own"])
def test_names_of_the_log_are_refused(name, tmp_path, tokenizer):
    text = OWN_TASK.replace('"words"', repr(name))
    problem_set = load_problems(
        load_task(f"{write_task(tmp_path, text)}:Echo"), "train", tokenizer, 100
    )
    with pytest.raises(BadInput, match=f"--task Echo reports '{name}'"):
        problem_set.grade([1], [[1]])


def test_all_names_of_the_log_are_reserved(tmp_path):
    # `accuracy` and `words` are the task's, all others the log's.
    task, model = f"{write_task(tmp_path, OWN_TASK)}:Echo", build_model("qwen2", tmp_path / "model")
    run_dir = train(tmp_path, task=task, model=model, num_steps=2, max_response_tokens=6)
    names = {name for record in steps(run_dir) for name in record if "/" not in name}
    # (Evaluation has the first without a slash; the others are those of several turns.)
    names |= {"response_length", "turns", "environment_tokens"}
    assert names == RESERVED | {"accuracy", "words"}


def test_a_refused_reward_does_not_take_the_runs_name(tmp_path):
    task = f"{write_task(tmp_path, OWN_TASK.replace('words', 'step'))}:Echo"
    with pytest.raises(BadInput, match="'step'"):
        train(tmp_path / "runs", task=task, model=build_model("qwen2", tmp_path / "model"))
    assert not list((tmp_path / "runs").iterdir())


def test_a_task_may_import_what_lies_beside_it(tmp_path):
    (tmp_path / "words_of_mine.py").write_text("WORDS = ['one']\n")
    task = load_task(f"{write_task(tmp_path, 'from words_of_mine import WORDS' + OWN_TASK)}:Echo")
    assert task.problems("eval")


def test_rewards_that_are_no_accuracy_are_not_called_so(tmp_path, capsys):
    text = OWN_TASK.replace('"accuracy": 0.25, ', "")
    run_dir = train(
        tmp_path,
        task=f"{write_task(tmp_path, text)}:Echo",
        model=build_model("qwen2", tmp_path / "model"),
    )
    record = steps(run_dir)[-1]
    assert (
        "eval/accuracy" not in record and record["eval/words"] >= 0 and record["eval/reward"] >= 1.5
    )
    output = capsys.readouterr().out
    (line,) = re.findall(r"^  reward .*", output, re.MULTILINE)
    assert line.split()[-1] == f"{record['eval/reward']:.3f}"
    assert "accuracy" not in output


def test_other_entries_of_a_reward_are_logged_as_means(tmp_path, monkeypatch):
    monkeypatch.setattr("common.runlog.COMPLETIONS_PER_STEP", 16)
    task, model = f"{write_task(tmp_path, OWN_TASK)}:Echo", build_model("qwen2", tmp_path / "model")
    run_dir = train(tmp_path, task=task, model=model, num_steps=1, max_response_tokens=6)
    (record,) = steps(run_dir)
    responses = [
        json.loads(line)["response"]
        for line in (run_dir / "completions.jsonl").read_text().splitlines()
    ]
    assert len(responses) == 16
    assert record["words"] == pytest.approx(
        sum(len(response.split()) for response in responses) / 16
    )
    assert record["accuracy"] == record["eval/accuracy"] == 0.25
    # Each of the 4 problems, 0 to 3, has 4 of the 16 responses.
    assert record["reward/mean"] == pytest.approx(1.5 + sum(map(len, responses)) / 1600)


def test_special_tokens_are_not_part_of_the_text(tmp_path, tokenizer):
    task = load_task(dense_task(tmp_path))
    tokens = [*tokenizer.encode("12"), tokenizer.eos_token_id, tokenizer.pad_token_id]
    grades, texts = ProblemSet(task, tokenizer, task.problems("train"), []).grade([0], [tokens])
    assert texts == ["12"] and grades == [{"reward": 1.0}]


# Prompts


def test_plain_prompts_are_encoded_as_they_stand(tmp_path, tokenizer):
    task = load_task(dense_task(tmp_path), eval_size=5)
    problem_set = load_problems(task, "eval", tokenizer, 100)
    assert problem_set.problems == task.problems("eval")
    assert [tokenizer.decode(prompt) for prompt in problem_set.prompts] == [
        p["prompt"] for p in task.problems("eval")
    ]


def test_chat_messages_go_through_the_template(tmp_path, tokenizer):
    copy_rows(GSM8K_SAMPLE, tmp_path / "data.jsonl", 0, 8)
    task = GSM8K(str(tmp_path / "data.jsonl"), eval_size=3)
    problem_set = load_problems(task, "eval", tokenizer, 5000)
    assert len(problem_set) == 3
    for problem, prompt in zip(problem_set.problems, problem_set.prompts, strict=True):
        (message,) = problem["prompt"]
        assert tokenizer.decode(prompt) == f"user: {message['content']}\nassistant:"


class WithBos:
    """The tokenizer, as if it put a BOS before every text, and an EOS after it; its chat template
    writes a BOS, too.
    """

    def __init__(self, tokenizer):
        self.wrapped, self.chat_template, self.bos = (
            tokenizer,
            tokenizer.chat_template,
            tokenizer.pad_token_id,
        )

    def __call__(self, texts, add_special_tokens=True):
        ids = self.wrapped(texts, add_special_tokens=False)["input_ids"]
        if add_special_tokens:
            ids = [[self.bos, *prompt, self.wrapped.eos_token_id] for prompt in ids]
        return {"input_ids": ids}

    def apply_chat_template(self, messages, **kwargs):
        return "<|pad|>" + self.wrapped.apply_chat_template(messages, **kwargs)


def test_a_prompt_begins_with_one_bos(tmp_path, tokenizer):
    copy_rows(GSM8K_SAMPLE, tmp_path / "data.jsonl", 0, 8)
    with_bos = WithBos(tokenizer)
    for task in (
        GSM8K(str(tmp_path / "data.jsonl"), eval_size=3),
        load_task(dense_task(tmp_path), eval_size=3),
    ):
        prompts = load_problems(task, "eval", with_bos, 5000).prompts
        assert all(
            prompt.count(with_bos.bos) == 1 and prompt[0] == with_bos.bos for prompt in prompts
        )
        assert not any(tokenizer.eos_token_id in prompt for prompt in prompts)


class Prompts(Task):
    """Its problems are these prompts."""

    def __init__(self, *prompts):
        super().__init__()
        self.prompts = prompts

    def problems(self, split):
        return ({"prompt": prompt} for prompt in self.prompts)  # a generator does as well as a list


def test_plain_and_chat_prompts_may_be_mixed(tokenizer):
    with_bos = WithBos(tokenizer)
    mixed = load_problems(
        Prompts("Q: 1+1", [{"role": "user", "content": "1+1?"}]), "train", with_bos, 99
    ).prompts
    assert [prompt.count(with_bos.bos) for prompt in mixed] == [1, 1]
    assert [tokenizer.decode(prompt[1:]) for prompt in mixed] == [
        "Q: 1+1",
        "user: 1+1?\nassistant:",
    ]


def test_a_last_message_of_the_assistant_is_continued(tokenizer):
    messages = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "It is"}]
    (prompt,) = load_problems(Prompts(messages), "train", tokenizer, 99).prompts
    assert tokenizer.decode(prompt).endswith("assistant: It is")


TRIMS = (
    "{% for m in messages %}<{{ m.role }}>\n{{ m.content | trim }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)


@pytest.mark.parametrize("trims", [False, True])
@pytest.mark.parametrize("said", ["It is ", "It is\n", " It is", "", " "])
def test_blanks_of_a_continued_message_are_kept_or_refused(said, trims, tokenizer, monkeypatch):
    if trims:
        monkeypatch.setattr(tokenizer, "chat_template", TRIMS)
    task = Prompts([{"role": "user", "content": "?"}, {"role": "assistant", "content": said}])
    if trims or not said.strip():
        with pytest.raises(BadInput, match="leave out blanks at its ends"):
            load_problems(task, "train", tokenizer, 99)
    else:
        (prompt,) = load_problems(task, "train", tokenizer, 99).prompts
        assert tokenizer.decode(prompt) == f"user: ?\nassistant: {said}"


def test_encoding_in_parts_changes_nothing_and_shows_a_bar(tokenizer, capsys, monkeypatch):
    texts = [f"Q: {n}" if n % 3 else [{"role": "user", "content": f"{n}?"}] for n in range(50)]
    expected = load_problems(Prompts(*texts), "train", tokenizer, 99).prompts
    monkeypatch.setattr("common.progress.SHOW_AFTER", 0)
    monkeypatch.setattr("common.tasks.problems.ENCODED_AT_ONCE", 7)
    assert load_problems(Prompts(*texts), "train", tokenizer, 99).prompts == expected
    assert "encoding prompts: " in capsys.readouterr().err
    assert [tokenizer.decode(prompt) for prompt in expected[:2]] == [
        "user: 0?\nassistant:",
        "Q: 1",
    ]


def test_arguments_for_the_chat_template(tokenizer, monkeypatch):
    monkeypatch.setattr(
        tokenizer, "chat_template", "{{ messages[0].content }}{% if loud %}!{% endif %}"
    )
    task = Prompts([{"role": "user", "content": "Why?"}])
    assert tokenizer.decode(load_problems(task, "train", tokenizer, 99).prompts[0]) == "Why?"
    task.template_arguments = {"loud": True}
    assert tokenizer.decode(load_problems(task, "train", tokenizer, 99).prompts[0]) == "Why?!"


@pytest.mark.parametrize(
    "prompt", [b"Why?", np.array([1, 2]), 3, None, [], [1], [{"content": "no role"}]], ids=repr
)
def test_a_prompt_that_is_none(prompt, tokenizer):
    with pytest.raises(BadInput, match="--task Prompts"):
        load_problems(Prompts("Why?", prompt), "train", tokenizer, 99)


def test_the_checksum_depends_on_prompts_and_answers(tokenizer):
    def checksum(*problems):
        return ProblemSet(None, tokenizer, list(problems), [[1, 2, 3]] * len(problems)).checksum()

    first = checksum({"answer": 1}, {"answer": 2})
    assert first == checksum({"answer": 1}, {"answer": 2})
    others = [
        checksum({"answer": 1}),
        checksum({"answer": 2}, {"answer": 1}),
        checksum({"answer": 1}, {"answer": 3}),
    ]
    assert first not in others
    a, b = ProblemSet(None, tokenizer, [{}], [[1]]), ProblemSet(None, tokenizer, [{}], [[2]])
    assert a.checksum() != b.checksum()
    # what JSON cannot express
    assert checksum({"check": object(), 3: {1}}) == checksum({"check": object(), 3: {1}})


def test_long_prompts_are_dropped_with_their_problems(tmp_path, tokenizer, capsys):
    # The long ones, of two digits, come first.
    path = write_task(
        tmp_path, OWN_TASK.replace("range(self.eval_size)", "reversed(range(self.eval_size))")
    )
    task = load_task(f"{path}:Echo", eval_size=12)
    lengths = [len(tokenizer.encode(problem["prompt"])) for problem in task.problems("train")]
    limit = min(lengths)
    assert lengths[0] > limit and lengths[-1] == limit
    problem_set = load_problems(task, "train", tokenizer, limit)
    assert [problem["n"] for problem in problem_set.problems] == [
        11 - i for i in range(12) if lengths[i] <= limit
    ]
    assert [tokenizer.decode(prompt) for prompt in problem_set.prompts] == [
        p["prompt"] for p in problem_set.problems
    ]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"{12 - len(problem_set)} of 12 train prompts are longer than --max-prompt-tokens {limit}"
    )
    with pytest.raises(
        BadInput, match=f"12 of 12 train prompts are longer than .*: raise it to {limit}"
    ):
        load_problems(task, "train", tokenizer, limit - 1)
    assert len(load_problems(task, "train", tokenizer, max(lengths))) == 12
    assert not capsys.readouterr().err


def test_of_more_held_out_problems_than_eval_size_the_first_are_taken(tokenizer):
    task = Prompts("one", "two", "three")
    task.eval_size = 2
    held_out = load_problems(task, "eval", tokenizer, 9).problems
    assert held_out == [{"prompt": "one"}, {"prompt": "two"}]
    assert len(load_problems(task, "train", tokenizer, 9)) == 3


REPEATED = """
from common.tasks import Task


class Repeated(Task):
    def problems(self, split):
        numbers = [1, 1, 2, 3] if split == "train" else [3, 4]
        return [{"prompt": f"Q: {n}"} for n in numbers]

    def reward(self, problem, response):
        return float(len(response))
"""


def test_what_repeats_is_told(tmp_path, capsys):
    train(tmp_path, task=f"{write_task(tmp_path, REPEATED)}:Repeated", num_steps=1)
    said = capsys.readouterr().err
    assert "Of 4 training problems, only 3 are different: the others repeat them.\n" in said
    assert "1 of 2 held-out problems are training problems, too: " in said
    train(tmp_path, "other", task=dense_task(tmp_path), num_steps=1)
    assert "problems" not in capsys.readouterr().err


def test_a_value_that_only_some_responses_have_is_told_once(tokenizer, capsys):
    class Some(Prompts):
        def reward(self, problem, response):
            return {"reward": 1.0} | ({"format": 1.0} if response else {})

    problem_set = load_problems(Some("?"), "train", tokenizer, 9)
    problem_set.grade([0, 0], [[], []])
    assert not capsys.readouterr().err
    for _ in range(2):
        problem_set.grade([0, 0, 0], [[], tokenizer.encode("a"), []])
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "Some reports 'format' of 1 responses among 3: its mean is over these."


CHATTY = """
from dense import Digits


class Chatty(Digits):
    def problems(self, split):
        plain = super().problems(split)
        return [{"prompt": [{"role": "user", "content": each["prompt"]}]} for each in plain]
"""


def test_the_first_prompt_is_shown_as_the_model_gets_it(tmp_path, capsys):
    dense_task(tmp_path)
    task, model = f"{write_task(tmp_path, CHATTY)}:Chatty", build_model("qwen2", tmp_path / "model")
    run_dir = train(tmp_path, task=task, model=model, num_steps=1, max_response_tokens=2)
    messages = load_task(task).problems("train")[0]["prompt"]
    options = {"tokenize": False, "add_generation_prompt": True}
    shown = repr(load_tokenizer(str(model)).apply_chat_template(messages, **options))
    assert shown != repr(messages[0]["content"]) and "Q: 10" in shown
    said = capsys.readouterr().out
    assert said.count(f"The first training prompt, as the model gets it:\n    {shown}\n") == 1
    assert f"\nfirst training prompt: {shown}\n" in (run_dir / "environment.txt").read_text()
    assert command(*resume(run_dir, "--num-steps", 2)) == 0
    assert "The first training prompt" not in capsys.readouterr().out


def test_the_first_prompt_is_shown_with_special_tokens(tmp_path, capsys):
    dense_task(tmp_path)
    task, tokenizer = f"{write_task(tmp_path, CHATTY)}:Chatty", load_tokenizer("tiny")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    model = build_model("qwen2", tmp_path / "model", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(model)
    (start,) = load_tokenizer(model)("<|im_start|>")["input_ids"]
    assert start in load_tokenizer(model).all_special_ids  # which decoding may leave out
    run_dir = train(tmp_path, task=task, model=model, num_steps=1, max_response_tokens=2)
    shown = repr("<|im_start|>user\nQ: 10+70\nA:<|im_end|>\n<|im_start|>assistant\n")
    assert f"as the model gets it:\n    {shown}\n" in capsys.readouterr().out
    assert f"\nfirst training prompt: {shown}\n" in (run_dir / "environment.txt").read_text()


def test_the_default_task_does_not_wait_for_the_import_of_datasets():
    script = (
        "import sys\nfrom common.tasks import load_task\nload_task('addition')\n"
        "print('datasets' in sys.modules)"
    )
    command = [sys.executable, "-c", script]
    assert subprocess.check_output(command, cwd=REPOSITORY, text=True, timeout=60) == "False\n"
