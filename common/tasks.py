"""Tasks: problems to pose, and rewards that a program can compute from a response.

A task of your own is a `Task` with two methods, in any file: `--task path/to/file.py:ClassName`. Chained additions are
embedded; GSM8K is read from a file or the hub.
"""

import importlib.util
import itertools
import math
import os
import random
import re
import sys
import zlib
from pathlib import Path

from common.datafiles import read_rows
from common.errors import BadInput, RunStopped
from common.grading import LONGEST_PART, MathGrader

GSM8K_SAMPLE = Path(__file__).parent / "data" / "gsm8k_sample.jsonl"
GSM8K_SYSTEM_PROMPT = (
    "Solve the problem. Work step by step, write your working out, and put the final number, alone, in \\boxed{}."
)


class Task:
    """Base class. `data` and `eval_data` are the options of the same names; a task is free to ignore them."""

    def __init__(self, data="", eval_data="", eval_size=256):
        self.data, self.eval_data, self.eval_size = data, eval_data, eval_size

    def problems(self, split):
        """The problems of `split`, "train" or "eval": a list of dicts.

        `problem["prompt"]` is a string, given to the model as it stands, or a list of chat messages, which go through
        the tokenizer's chat template. Everything else in the dict is the task's own.
        """
        raise NotImplementedError

    def reward(self, problem, response):
        """The reward of one response (text without special tokens), a float.

        Or a dict with at least "reward", whose other entries are logged as means over the batch; "accuracy" is what
        evaluation reports, for tasks whose reward is more than correctness.
        """
        raise NotImplementedError

    def rewards(self, problems, responses):
        """Rewards of many responses at once; override it where that is faster than one after another."""
        results = []
        for problem, response in zip(problems, responses, strict=True):
            try:
                results.append(self.reward(problem, response))
            except Exception as error:
                raise RunStopped(
                    f"{type(self).__name__}.reward raised {error!r} on the response {response!r} to {problem!r}."
                ) from error
        return results


class Addition(Task):
    """Chained additions with running totals: "Q: 47+8+91" → " 47+8=55 55+91=146 answer 146."

    The reward is 1 for a response that ends with the right answer, else 0.

    Training and held-out problems are disjoint by construction: a checksum of the prompt decides which one it is.
    """

    def __init__(self, data="", eval_data="", eval_size=256):
        super().__init__(data, eval_data, eval_size)
        if data or eval_data:
            option = f"--data {data}" if data else f"--eval-data {eval_data}"
            raise BadInput(f"{option}: the task addition makes its own problems; give --task gsm8k, or leave it out.")

    def problems(self, split):
        wanted = {"train": 8192, "eval": self.eval_size}[split]
        rng = random.Random(f"addition {split}")
        found = {}
        while len(found) < wanted:
            terms, prompt = addition_problem(rng)
            if is_held_out(prompt) == (split == "eval"):
                found[prompt] = {"prompt": prompt, "answer": sum(terms)}
        return list(found.values())

    def reward(self, problem, response):
        last_word = re.search(r"answer 0*(\d+)\.\Z", response)  # one that goes on rambling has not answered yet
        return float(last_word is not None and last_word.group(1) == str(problem["answer"]))


def addition_problem(rng):
    """A random problem: its terms, and the prompt that poses it."""
    terms = [rng.randint(1, 99) for _ in range(rng.randint(3, 4))]
    return terms, f"Q: {'+'.join(map(str, terms))}\nA:"


def is_held_out(prompt):
    """Whether a problem belongs to the held-out set: one in eight, never seen by warm start or training."""
    return zlib.crc32(prompt.encode()) % 8 == 0


class GSM8K(Task):
    """Grade-school word problems (Cobbe et al., arXiv 2110.14168), answered in free form, graded by math-verify.

    `data` is a JSONL or Parquet file with columns `question` and `answer` (whose last line is `#### <number>`), a hub
    dataset ("openai/gsm8k"), or empty for the sample of 256 rows in this repository. Held out are `eval_data`, else
    the hub dataset's test split, else the last `eval_size` rows of `data` (of the sample: at most 64).

    The reward is 1 for a right answer and 0 otherwise. `format` (did the response box its answer?) is logged only.
    """

    def __init__(self, data="", eval_data="", eval_size=256):
        super().__init__(data, eval_data, eval_size)
        self.grader = MathGrader()
        train, test = _read_gsm8k(data or str(GSM8K_SAMPLE), "--data")
        if eval_data:
            rows, test_split = _read_gsm8k(eval_data, "--eval-data")
            test = test_split or rows
        if test and len(test) < eval_size:
            source = f"--eval-data {eval_data}" if eval_data else f"the test split of --data {data}"
            raise BadInput(
                f"--eval-size {eval_size} is more than the {len(test)} rows of {source}: give --eval-size {len(test)} "
                "or less, or more rows with --eval-data."
            )
        if not test:
            if not data and eval_size > 64:
                print(f"Of the sample's {len(train)} rows, 64 are held out, not {eval_size}.", file=sys.stderr)
                eval_size = 64
            if len(train) <= eval_size:
                raise BadInput(
                    f"--eval-size {eval_size} of the {len(train)} rows of --data {data} cannot be held "
                    "out: give a smaller --eval-size, or other rows with --eval-data."
                )
            train, test = train[:-eval_size], train[-eval_size:]
        self.rows = {"train": train, "eval": test[:eval_size]}

    def problems(self, split):
        return [
            {
                "prompt": [
                    {"role": "system", "content": GSM8K_SYSTEM_PROMPT},
                    {"role": "user", "content": row["question"]},
                ],
                "answer": _final_answer(row),
            }
            for row in self.rows[split]
        ]

    def rewards(self, problems, responses):
        correct = self.grader.grade([problem["answer"] for problem in problems], responses)
        return [
            {"reward": float(right), "accuracy": float(right), "format": float("\\boxed{" in response)}
            for right, response in zip(correct, responses, strict=True)
        ]


def _read_gsm8k(source, option):
    splits = read_rows(source, option, ("question", "answer"))
    for rows in splits:
        for number, row in enumerate(rows, start=1):
            if not 0 < len(_final_answer(row)) <= LONGEST_PART:
                raise BadInput(
                    f"{option} {source}, row {number}: there is no final answer of at most {LONGEST_PART} characters "
                    "after the last ####; no response to this row could be right."
                )
    return splits


def _final_answer(row):
    """What follows the last ####; all of the answer where there is none."""
    return row["answer"].rpartition("####")[2].strip()


TASKS = {"addition": Addition, "gsm8k": GSM8K}


def load_task(name, data="", eval_data="", eval_size=256):
    """The task called `name`: "addition", "gsm8k", or "path/to/file.py:ClassName". Raises `BadInput`."""
    if name in TASKS:
        return TASKS[name](data, eval_data, eval_size)
    path, colon, class_name = name.rpartition(":")
    if not colon or not path.endswith(".py"):
        raise BadInput(
            f"--task {name} is unknown: give one of {', '.join(TASKS)}, or path/to/file.py:ClassName for your own."
        )
    if not os.path.isfile(path):
        raise BadInput(f"--task {name}: there is no file {path}; give the path of the file that defines {class_name}.")
    spec = importlib.util.spec_from_file_location(f"task_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # as an import would: dataclasses, among others, look their module up there
    try:
        spec.loader.exec_module(module)
        if hasattr(module, class_name):
            task = getattr(module, class_name)(data, eval_data, eval_size)
            if not isinstance(task, Task):
                raise BadInput(f"--task {name}: {class_name} is no task; let it inherit from common.tasks.Task.")
            return task
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(f"--task {name}: making the task raised {error!r}; mend {path} first.") from error
    raise BadInput(f"--task {name}: {path} defines no {class_name}; give the name of the task class in that file.")


def encode_problems(task, split, tokenizer, max_prompt_tokens, long_prompts):
    """The problems of a split and their prompts as token ids; chat messages go through the chat template.

    Prompts of more than `max_prompt_tokens` tokens are left out ("drop"; their number is printed) or refused
    ("refuse"). Raises `BadInput`.
    """
    try:
        problems = task.problems(split)
        chats = [not isinstance(problem["prompt"], str) for problem in problems]
    except Exception as error:
        raise BadInput(
            f'--task {type(task).__name__}: problems("{split}") must return dicts with a "prompt", but gave {error!r}.'
        ) from error
    if not problems:
        raise BadInput(f'--task {type(task).__name__} has no {split} problems: let problems("{split}") return some.')
    if any(chats) and tokenizer.chat_template is None:
        raise BadInput(
            f"--model {tokenizer.name_or_path} has no chat template, which this task's chat messages need: give an "
            "instruction-tuned model, or a task whose prompts are plain text."
        )
    # A template writes its own special tokens; plain text gets those that the tokenizer adds by itself (a BOS, say).
    try:
        texts = [
            tokenizer.apply_chat_template(problem["prompt"], tokenize=False, add_generation_prompt=True)
            if chat
            else problem["prompt"]
            for problem, chat in zip(problems, chats, strict=True)
        ]
        prompts = tokenizer(texts, add_special_tokens=not any(chats))["input_ids"]
    except Exception as error:  # a template may refuse a system message, a prompt may be of any type
        raise BadInput(
            f"--task {type(task).__name__} has {split} prompts that --model {tokenizer.name_or_path} cannot encode "
            f"({error!r}): give prompts that are text or chat messages, and a model whose chat template takes them."
        ) from error
    if not all(prompts):
        raise BadInput(
            f"--task {type(task).__name__} has an empty {split} prompt: give every problem at least one token."
        )
    fits = [len(prompt) <= max_prompt_tokens for prompt in prompts]
    count = f"{fits.count(False)} of {len(fits)}"
    too_long = f"{count} {split} prompts are longer than --max-prompt-tokens {max_prompt_tokens}"
    if not any(fits) or (long_prompts == "refuse" and not all(fits)):
        raise BadInput(
            f"{too_long} (the longest has {max(map(len, prompts))} tokens): raise it, or leave such prompts out with "
            "--long-prompts drop."
        )
    if not all(fits):
        print(f"{too_long} and are left out.", file=sys.stderr)
    return list(itertools.compress(problems, fits)), list(itertools.compress(prompts, fits))


def grade(task, tokenizer, problems, responses):
    """Decode responses (lists of token ids, one per problem) and grade them.

    Returns a list of dicts with "reward" and whatever else the task reports, and the texts. Raises `RunStopped` when
    the task's reward function raises, or returns something that is not a finite number.
    """
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    grades = []
    for result, problem, text in zip(task.rewards(problems, texts), problems, texts, strict=True):
        values = result if isinstance(result, dict) else {"reward": result}
        try:
            grades.append({key: float(value) for key, value in values.items()})
            finite = math.isfinite(grades[-1]["reward"]) and all(map(math.isfinite, grades[-1].values()))
        except (TypeError, ValueError, KeyError, OverflowError):
            finite = False
        if not finite:
            raise RunStopped(
                f"{type(task).__name__} gave the reward {result!r}, where a finite number (or a dict of such, one of "
                f'them "reward") is due, to the response {text!r} to {problem!r}.'
            )
    return grades, texts
