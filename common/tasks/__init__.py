"""Tasks: problems to pose, and rewards that a program can compute. Your own: a `Task` with two
methods, in any file.
"""

import importlib.util
import json
import math
import os
import sys
import time
import zlib
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import ClassVar

import numpy as np

from common.commandline import BadInput, RunStopped
from common.distributed import gather, share

BUILT_IN = {"addition": "Addition", "gsm8k": "GSM8K"}
RESERVED = {
    "step",
    "loss",
    "grad_norm",
    "lr",
    "update_skipped",
    "entropy",
    "lag",
    "weights_version",
    "response_length",
}
"""the log's own metrics without a slash; a task's values need other names, without a slash or
beginning with grade/
"""


class Task:
    """Base class. `data` and `eval_data` are the options of the same names; a task is free to
    ignore them.
    """

    # of the chat template; Qwen3, for example, knows {"enable_thinking": False}
    template_arguments: ClassVar = {}

    def __init__(self, data="", eval_data="", eval_size=256):
        self.data, self.eval_data, self.eval_size = data, eval_data, eval_size

    def problems(self, split):
        """The problems of `split`, "train" or "eval": a list of dicts.

        `problem["prompt"]` is a string, given to the model as it stands, or a list of chat
        messages, which go through the tokenizer's chat template; if the last one is the
        assistant's, the response continues it. Everything else in the dict is the task's own.
        """
        raise NotImplementedError

    def reward(self, problem, response):
        """The reward of one response (text without special tokens), a float.

        Or a dict of "reward" and other values, which are logged as means over the batch. If the
        reward is more than correctness, include "accuracy": evaluation then reports it.
        """
        raise NotImplementedError

    def rewards(self, problems, responses):
        """Rewards of many responses at once; override it where that is faster than one after
        another.
        """
        results = []
        for problem, response in zip(problems, responses, strict=True):
            try:
                results.append(self.reward(problem, response))
            except Exception as error:
                what = f"{type(self).__name__}.reward raised {error!r}"
                raise RunStopped(f"{what} on the response {response!r} to {problem!r}.") from error
        return results


def load_task(name, data="", eval_data="", eval_size=256):
    """The task called `name`: "addition", "gsm8k", or "path/to/file.py:ClassName". Raises
    `BadInput`.
    """
    if name in BUILT_IN:
        module = importlib.import_module(
            f"common.tasks.{name}"
        )  # (only now: they import this module)
        return getattr(module, BUILT_IN[name])(data, eval_data, eval_size)
    path, _, class_name = name.rpartition(":")
    if not path.endswith(".py"):
        raise BadInput(
            f"--task {name} is unknown: give addition, gsm8k, or path/to/file.py:ClassName for your own."
        )
    sys.path.append(os.path.dirname(os.path.abspath(path)))  # a task may import its neighbours
    spec = importlib.util.spec_from_file_location(f"task_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = (
        module  # as an import would: dataclasses, among others, look their module up there
    )
    try:
        spec.loader.exec_module(module)
        task = getattr(module, class_name)(data, eval_data, eval_size)
    except BadInput:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise BadInput(
            f"--task {name} cannot be loaded ({reason}): check path, class and code."
        ) from error
    if not isinstance(task, Task):
        raise BadInput(
            f"--task {name}: {class_name} is no task; let it inherit from common.tasks.Task."
        )
    return task


@dataclass
class ProblemSet:
    """The problems of a split with their prompts as token ids, and what grades the responses."""

    task: Task
    tokenizer: object
    problems: list[dict]
    prompts: list[list[int]]
    answers: list = field(
        default_factory=list
    )  # of the last evaluation: problem, text of the response, grade

    def __len__(self):
        return len(self.problems)

    def grade(self, numbers, responses):
        """Decode and grade `responses`, lists of token ids; `numbers` are the indices of their
        problems.

        Returns `(grades, texts)`: per response a dict of finite floats, "reward" and what else the
        task reports, and its text. Raises `RunStopped` if the task gives anything else, `BadInput`
        if it uses a name of the log's own.
        """
        problems, name = [self.problems[number] for number in numbers], type(self.task).__name__
        texts = (
            self.tokenizer.batch_decode(responses, skip_special_tokens=True) if responses else []
        )
        try:
            results = list(self.task.rewards(problems, texts))
        except RunStopped:
            raise
        except Exception as error:
            raise RunStopped(
                f"{name}.rewards failed on {len(texts)} responses: {error!r}."
            ) from error
        if len(results) != len(texts):
            raise RunStopped(
                f"{name}.rewards returned {len(results)} rewards for {len(texts)} responses."
            )
        grades = []
        for result, problem, text in zip(results, problems, texts, strict=True):
            values = result if isinstance(result, dict) else {"reward": result}
            try:
                grade = {str(key): float(value) for key, value in values.items()}
            except (TypeError, ValueError, OverflowError):
                grade = {}
            if "reward" not in grade or not all(map(math.isfinite, grade.values())):
                what = f"{name} gave the reward {result!r} to the response {text!r} to {problem!r}"
                raise RunStopped(
                    f'{what}; it must be a finite number, or a dict of finite numbers with "reward".'
                )
            if taken := [
                key
                for key in grade
                if key in RESERVED or ("/" in key and not key.startswith("grade/"))
            ]:
                raise BadInput(
                    f"--task {name} reports {taken[0]!r}, a name that the log itself uses: rename it."
                )
            grades.append(grade)
        return grades, texts

    def evaluate(self, rollouts):
        """Metrics of greedy answers. Rewards of 0 and 1 count as "accuracy" if the task itself
        reports none.
        """
        started, mine = (
            time.perf_counter(),
            share(len(self)),
        )  # with several ranks, each answers a part
        responses = rollouts.greedy(self.prompts[mine]).responses
        parts = gather((*self.grade(range(len(self))[mine], responses), responses))
        grades, texts, responses = ([*chain(*lists)] for lists in zip(*parts, strict=True))
        self.answers = list(zip(self.problems, texts, grades, strict=True))
        if all(grade["reward"] in (0, 1) for grade in grades):
            grades = [{"accuracy": grade["reward"], **grade} for grade in grades]
        return {
            **{f"eval/{key}": value for key, value in means(grades).items()},
            "eval/response_length": sum(map(len, responses)) / len(self),
            "time/eval": time.perf_counter() - started,
        }

    def checksum(self):
        """A number that depends on the tokens of all prompts and on whatever else of the problems
        JSON can express.
        """
        everything = [self.prompts, self.problems]
        return zlib.crc32(
            json.dumps(everything, skipkeys=True, default=lambda value: str(type(value))).encode()
        )


def load_problem_sets(name, data, eval_data, eval_size, tokenizer, max_prompt_tokens):
    """The training problems and the held-out ones of a task, as `ProblemSet`s; see `load_task` and
    `load_problems`.
    """
    task = load_task(name, data, eval_data, eval_size)
    return tuple(
        load_problems(task, split, tokenizer, max_prompt_tokens) for split in ("train", "eval")
    )


def means(grades):
    """The mean of each value over the responses for which the task reports it, by name."""
    names = sorted({name for grade in grades for name in grade})
    return {
        name: float(np.mean([grade[name] for grade in grades if name in grade])) for name in names
    }


def load_problems(task, split, tokenizer, max_prompt_tokens):
    """The `ProblemSet` of `split`, "train" or "eval", without the problems of more than
    `max_prompt_tokens` tokens.

    Plain text gets the special tokens that the tokenizer puts in front of it (a BOS, say), and none
    at its end. Raises `BadInput` if no problem is left, and for prompts that cannot be encoded.
    """
    name = f"--task {type(task).__name__}"

    def as_text(prompt):
        if isinstance(prompt, str):
            return prompt
        begun = prompt[-1]["role"] == "assistant"
        options = {
            "add_generation_prompt": not begun,
            "continue_final_message": begun,
            **task.template_arguments,
        }
        return tokenizer.apply_chat_template(prompt, tokenize=False, **options)

    try:
        problems = list(task.problems(split))
        prompts = [problem["prompt"] for problem in problems]
        texts = [as_text(prompt) for prompt in prompts]
        token_ids = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        plain = next(
            (number for number, prompt in enumerate(prompts) if isinstance(prompt, str)), None
        )
        if plain is not None:
            (special,) = tokenizer([texts[plain]])["input_ids"]
            front = special[: special.index(token_ids[plain][0])]
            token_ids = [
                front * isinstance(p, str) + ids for p, ids in zip(prompts, token_ids, strict=True)
            ]
    except Exception as error:  # the task's own, no chat template, one that refuses a message, …
        what = f"that the chat template of --model {tokenizer.name_or_path} takes, but: {error!r}"
        raise BadInput(
            f'{name}: the "prompt" of a problem must be text, or a list of chat messages {what}.'
        ) from error
    if not token_ids or not all(token_ids):
        raise BadInput(
            f"{name} has {'an empty' if texts else 'no'} {split} prompt: give at least one token each."
        )
    kept = [number for number, prompt in enumerate(token_ids) if len(prompt) <= max_prompt_tokens]
    left_out = len(texts) - len(kept)
    too_long = f"{left_out} of {len(texts)} {split} prompts are longer than --max-prompt-tokens {max_prompt_tokens}"
    if not kept:
        raise BadInput(f"{too_long}: raise it to {min(map(len, token_ids))} or more.")
    if left_out:
        print(f"{too_long} and are left out.", file=sys.stderr)
    return ProblemSet(task, tokenizer, [problems[n] for n in kept], [token_ids[n] for n in kept])
