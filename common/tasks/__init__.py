"""Tasks: problems to pose, and rewards that a program can compute from a response.

A task of your own is a `Task` with two methods, in any file: `--task path/to/file.py:ClassName`.
"""

import importlib.util
import math
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common.commandline import BadInput, RunStopped


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


def load_task(name, data="", eval_data="", eval_size=256):
    """The task called `name`: "addition", "gsm8k", or "path/to/file.py:ClassName". Raises `BadInput`."""
    if name == "addition":
        from common.tasks.addition import Addition

        return Addition(data, eval_data, eval_size)
    if name == "gsm8k":
        from common.tasks.gsm8k import GSM8K

        return GSM8K(data, eval_data, eval_size)
    path, _, class_name = name.rpartition(":")
    if not path.endswith(".py"):
        raise BadInput(f"--task {name} is unknown: give addition, gsm8k, or path/to/file.py:ClassName for your own.")
    spec = importlib.util.spec_from_file_location(f"task_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # as an import would: dataclasses, among others, look their module up there
    try:
        spec.loader.exec_module(module)
        task = getattr(module, class_name)(data, eval_data, eval_size)
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(f"--task {name} cannot be loaded: {type(error).__name__}: {error}.") from error
    if not isinstance(task, Task):
        raise BadInput(f"--task {name}: {class_name} is no task; let it inherit from common.tasks.Task.")
    return task


@dataclass
class ProblemSet:
    """The problems of a split with their prompts as token ids, and what grades the responses."""

    task: Task
    tokenizer: object
    problems: list[dict]
    prompts: list[list[int]]

    def __len__(self):
        return len(self.problems)

    def grade(self, numbers, responses):
        """Decode and grade `responses`, lists of token ids; `numbers` are the indices of their problems.

        Returns `(grades, texts)`: per response a dict of floats with "reward" and whatever else the task reports, and
        the decoded text. Raises `RunStopped` when the reward function raises or returns something not finite.
        """
        problems = [self.problems[number] for number in numbers]
        texts = self.tokenizer.batch_decode(responses, skip_special_tokens=True)
        grades = []
        for result, problem, text in zip(self.task.rewards(problems, texts), problems, texts, strict=True):
            values = result if isinstance(result, dict) else {"reward": result}
            try:
                grade = {key: float(value) for key, value in values.items()}
            except (TypeError, ValueError, OverflowError):
                grade = {}
            if "reward" not in grade or not all(map(math.isfinite, grade.values())):
                raise RunStopped(
                    f"{type(self.task).__name__} gave the reward {result!r} to the response {text!r} to {problem!r}; "
                    'it must be a finite number, or a dict of such with "reward".'
                )
            grades.append(grade)
        return grades, texts

    def evaluate(self, rollouts):
        """Greedy accuracy and mean response length (tokens) on these problems, with the trainer's weights."""
        started = time.perf_counter()
        responses = rollouts.greedy(self.prompts).responses
        grades, _ = self.grade(range(len(self)), responses)
        return {
            "eval/accuracy": sum(grade.get("accuracy", grade["reward"]) for grade in grades) / len(self),
            "eval/response_length": sum(map(len, responses)) / len(self),
            "time/eval": time.perf_counter() - started,
        }


def load_problems(task, split, tokenizer, max_prompt_tokens):
    """The `ProblemSet` of `split`, "train" or "eval"; chat messages go through the tokenizer's chat template.

    Problems whose prompt is longer than `max_prompt_tokens` are left out, and their number is printed. Raises
    `BadInput` if none is left, or if prompts are missing, empty or cannot be encoded.
    """
    name = f"--task {type(task).__name__}"
    template = partial(tokenizer.apply_chat_template, tokenize=False, add_generation_prompt=True)
    try:
        problems = task.problems(split)
        prompts = [problem["prompt"] for problem in problems]
        texts = [prompt if isinstance(prompt, str) else template(prompt) for prompt in prompts]
        # A template writes its own special tokens; plain text gets those that the tokenizer adds (a BOS, say).
        token_ids = tokenizer(texts, add_special_tokens=texts == prompts)["input_ids"] if texts else []
    except Exception as error:  # the task's own, no chat template, one that refuses a message, …
        raise BadInput(
            f'{name}: problems("{split}") must return dicts whose "prompt" is text, or chat messages that '
            f"the chat template of --model {tokenizer.name_or_path} takes, but: {error!r}."
        ) from error
    if not token_ids or not all(token_ids):
        raise BadInput(f"{name} has {'an empty' if texts else 'no'} {split} prompt: give at least one token each.")
    kept = [number for number, prompt in enumerate(token_ids) if len(prompt) <= max_prompt_tokens]
    left_out = len(texts) - len(kept)
    too_long = f"{left_out} of {len(texts)} {split} prompts are longer than --max-prompt-tokens {max_prompt_tokens}"
    if not kept:
        raise BadInput(f"{too_long}: raise it to {min(map(len, token_ids))} or more.")
    if left_out:
        print(f"{too_long} and are left out.", file=sys.stderr)
    return ProblemSet(task, tokenizer, [problems[n] for n in kept], [token_ids[n] for n in kept])
