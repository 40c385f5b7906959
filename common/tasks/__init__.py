"""Tasks: problems to pose, and rewards that a program can compute.

A task of your own is a class derived from `Task`, with two methods, in any file. A third method
makes it a task of several turns, in which the model uses a tool, say.
"""

import asyncio
import contextlib
import functools
import importlib.util
import inspect
import os
import sys
from pathlib import Path
from typing import ClassVar

from common.errors import BadInput, RunStopped

BUILT_IN = {"addition": "Addition", "calculator": "Calculator", "gsm8k": "GSM8K"}


class Task:
    """Base class.

    `data`, `eval_data` and `eval_size` are the options of the same names. Of more held-out problems
    than `eval_size`, the first are taken.
    """

    # Whether the task reads `data` and `eval_data`; if not, these options are refused.
    reads_data = False
    # Unless the constructor sets another
    eval_size = 256
    # Arguments of the chat template; Qwen3's, for example, knows {"enable_thinking": False}.
    template_arguments: ClassVar = {}
    # How often the model may speak. Above 1, `reply` answers its turns.
    max_turns = 1
    # The role of replies in chats; "tool" is another one that some chat templates know.
    reply_role = "user"
    # How many calls of an `async def reward` (or `reply`) run at the same time.
    concurrency = 16

    def __init__(self, data="", eval_data="", eval_size=256):
        self.data = data
        self.eval_data = eval_data
        self.eval_size = eval_size

    def problems(self, split):
        """The problems of `split`, "train" or "eval" (held out): a list of dicts.

        `problem["prompt"]` is a string, given to the model as it stands, or a list of chat
        messages, which go through the tokenizer's chat template; if the last one is the
        assistant's, the response continues it. Everything else in the dict is the task's own.
        """
        raise NotImplementedError

    def reward(self, problem, response):
        """The reward of one response (text without special tokens), a float.

        Or a dict of "reward" and other values, which are logged as means over the batch. If the
        reward is more than correctness, include "accuracy": evaluation then reports it. Of a task
        of several turns, `response` is the list of the model's turns. It may be an `async def`:
        then rewards of a batch are computed at the same time, `concurrency` of them.
        """
        raise NotImplementedError

    def rewards(self, problems, responses):
        """Rewards of many responses at once.

        Override it where that is faster than one after another.
        """
        return self._one_by_one(self.reward, problems, responses)

    def reply(self, problem, turns):
        """What the model is told after its turns (a list of texts); None ends the response.

        It must depend on nothing but the problem and the turns: which turns of other responses are
        answered before, and in which process, is not determined. An EOS ends a turn.
        """
        raise NotImplementedError

    def replies(self, problems, turns):
        """Replies to many responses at once.

        Override it where that is faster than one after another.
        """
        return self._one_by_one(self.reply, problems, turns)

    def _one_by_one(self, function, problems, responses):
        pairs = list(zip(problems, responses, strict=True))
        if inspect.iscoroutinefunction(function):
            return self._event_loop.run(self._concurrently(function, pairs))
        results = []
        for pair in pairs:
            with self._errors_of(function, *pair):
                results.append(function(*pair))
        return results

    async def _concurrently(self, function, pairs):
        free = asyncio.Semaphore(self.concurrency)

        async def call(pair):
            async with free:
                with self._errors_of(function, *pair):
                    return await function(*pair)

        return await asyncio.gather(*map(call, pairs))

    @functools.cached_property
    def _event_loop(self):
        """One for all batches, since a task's connections to a server belong to a loop."""
        return asyncio.Runner()

    @contextlib.contextmanager
    def _errors_of(self, function, problem, response):
        try:
            yield
        except Exception as error:
            raise RunStopped(
                f"{type(self).__name__}.{function.__name__} raised {error!r} "
                f"on the response {response!r} to {problem!r}."
            ) from error


def load_task(name, data="", eval_data="", eval_size=256):
    """The task called `name`: one of `BUILT_IN`, or "path/to/file.py:ClassName".

    Raises `BadInput` where there is no such task, or where it does not accept the other arguments.
    """
    with _loading(name):
        task_class = _task_class(name)
        if (data or eval_data) and not task_class.reads_data:
            option = f"--data {data}" if data else f"--eval-data {eval_data}"
            raise BadInput(
                f"{option}: the task {task_class.__name__} reads no data: leave it out, or, if it "
                "is your own, set reads_data = True in its class."
            )
        return task_class(data, eval_data, eval_size)


@contextlib.contextmanager
def _loading(name):
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise BadInput(
            f"--task {name} cannot be loaded ({reason}): check path, class and code."
        ) from error


def _task_class(name):
    if name in BUILT_IN:
        # Only now: the built-in tasks' modules import this one.
        return getattr(importlib.import_module(f"common.tasks.{name}"), BUILT_IN[name])

    if name.endswith(".py"):
        raise BadInput(f"--task {name} names no class: give {name}:ClassName.")
    path, _, class_name = name.rpartition(":")
    if not path.endswith(".py"):
        raise BadInput(
            f"--task {name} is unknown: "
            f"give {', '.join(BUILT_IN)}, or path/to/file.py:ClassName for your own."
        )
    # A task may import the modules beside it.
    sys.path.append(os.path.dirname(os.path.abspath(path)))
    spec = importlib.util.spec_from_file_location(f"task_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    # As an import would: dataclasses, among others, look their module up there.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    task_class = getattr(module, class_name, None)
    if task_class is None:
        found = [name for name, value in vars(module).items() if _is_own_task(value, module)]
        has = f"it has {', '.join(found)}" if found else "it has no task"
        raise BadInput(f"--task {name}: there is no {class_name} in {path}; {has}.")
    if not (isinstance(task_class, type) and issubclass(task_class, Task)):
        raise BadInput(
            f"--task {name}: {class_name} is no task; let it inherit from common.tasks.Task."
        )
    return task_class


def _is_own_task(value, module):
    """Whether a value of a module is a task that it defines."""
    is_task = isinstance(value, type) and issubclass(value, Task)
    return is_task and value.__module__ == module.__name__
