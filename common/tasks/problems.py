"""The problems of a task with their prompts as token ids; grading and evaluating responses."""

import json
import math
import sys
import time
import zlib
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice

import numpy as np

from common.distributed import gather, rank, share
from common.environment import NOTES
from common.errors import BadInput, RunStopped
from common.models import check_context
from common.progress import progress
from common.tasks import Task, load_task
from common.tasks.turns import parts_of

RESERVED = {"step", "loss", "grad_norm", "lr", "update_skipped", "entropy", "lag"}
RESERVED |= {"weights_version", "response_length", "turns", "environment_tokens"}
"""the log's own metrics without a slash; a task's values need other names, without a slash or
beginning with grade/"""
ENCODED_AT_ONCE = 1024  # prompts


@dataclass
class Evaluation:
    """What the policy answered to the held-out problems, and how well."""

    metrics: dict[str, float]
    answers: list[tuple]  # per problem: the problem, the text of the response, its grade


@dataclass
class ProblemSet:
    """The problems of a split with their prompts as token ids, and what grades the responses."""

    task: Task
    tokenizer: object
    problems: list[dict]
    prompts: list[list[int]]
    told: set[str] = field(default_factory=set)  # keys of `_tell_gaps`

    def __len__(self):
        return len(self.problems)

    def graded(self, batch):
        """The `Batch` with the texts of its responses and their grades."""
        grades, texts = self.grade(batch.problems, batch.responses, batch.logprobs)
        return replace(batch, grades=grades, texts=texts)

    def grade(self, numbers, responses, logprobs=None):
        """Decode and grade `responses`, lists of token ids, to the problems of these numbers.

        `logprobs`, as in `Samples`, tell turns and replies apart, if there are any. Returns
        `(grades, texts)`: per response a dict of finite floats, "reward" and what else the task
        reports, and its text. Of a task of several turns, that is a list: the policy's turns and
        the replies between them. Raises `RunStopped` if the task gives anything else, `BadInput` if
        it uses a name of the log's own.
        """
        name = type(self.task).__name__
        problems = [self.problems[number] for number in numbers]
        texts = self._texts(responses, logprobs)
        several = self.task.max_turns > 1
        graded = [text[::2] for text in texts] if several else texts  # without replies
        try:
            results = list(self.task.rewards(problems, graded))
        except RunStopped:
            raise
        except Exception as error:
            what = f"{name}.rewards failed on {len(texts)} responses"
            raise RunStopped(f"{what}: {error!r}.") from error
        if len(results) != len(texts):
            what = f"{name}.rewards returned {len(results)} rewards"
            raise RunStopped(f"{what} for {len(texts)} responses.")
        grades = []
        for row, (result, problem, text) in enumerate(zip(results, problems, texts, strict=True)):
            grade = _as_grade(result)
            if grade is None:
                what = f"{name} gave the reward {result!r} to the response {text!r} to {problem!r}"
                how = 'it must be a finite number, or a dict of finite numbers with "reward"'
                raise RunStopped(f"{what}; {how}.")
            for key in grade:
                if key in RESERVED or ("/" in key and not key.startswith("grade/")):
                    what = f"--task {name} reports {key!r}, a name that the log itself uses"
                    raise BadInput(f"{what}: rename it.")
            if several:
                told = logprobs[row].count(None)
                grade |= {"turns": float(len(graded[row])), "environment_tokens": float(told)}
            grades.append(grade)
        self._tell_gaps(grades)
        return grades, texts

    def _tell_gaps(self, grades):
        """Say, once, which values are reported for some responses only."""
        for key in sorted({key for grade in grades for key in grade} - self.told):
            number = sum(key in grade for grade in grades)
            if number < len(grades) and rank() == 0:
                self.told.add(key)
                what = f"{type(self.task).__name__} reports {key!r} of {number} responses"
                print(f"{what} among {len(grades)}: its mean is over these.", file=sys.stderr)

    def _texts(self, responses, logprobs):
        decode = partial(self.tokenizer.batch_decode, skip_special_tokens=True)
        if not responses:
            return []
        if self.task.max_turns == 1:
            return decode(responses)
        pairs = zip(responses, logprobs, strict=True)
        return [decode([part for _, part in parts_of(*response)]) for response in pairs]

    def to_reply_to(self):
        """The problems, if replies to them need to know them; else None."""
        return self.problems if self.task.max_turns > 1 else None

    def evaluate(self, rollouts):
        """The `Evaluation` of greedy responses by the policy of `rollouts`.

        Rewards of 0 and 1 count as "accuracy" if the task itself reports none.
        """
        started = time.perf_counter()
        mine = share(len(self))  # with several ranks, each answers a part
        problems = self.to_reply_to()
        samples = rollouts.greedy(self.prompts[mine], problems and problems[mine])
        graded = self.grade(range(len(self))[mine], samples.responses, samples.logprobs)
        parts = gather((*graded, samples.lengths))
        grades, texts, lengths = ([*chain(*lists)] for lists in zip(*parts, strict=True))
        answers = list(zip(self.problems, texts, grades, strict=True))
        if all(grade["reward"] in (0, 1) for grade in grades):
            grades = [{"accuracy": grade["reward"], **grade} for grade in grades]
        metrics = {f"eval/{key}": value for key, value in means(grades).items()}
        metrics["eval/response_length"] = sum(lengths) / len(self)
        metrics["time/eval"] = time.perf_counter() - started
        return Evaluation(metrics, answers)

    def checksum(self):
        """A number that depends on the prompts' tokens and, as far as JSON goes, the problems."""
        return zlib.crc32(_as_json([self.prompts, self.problems]).encode())


def _as_json(value):
    """The value as text; of what JSON does not know, only the type."""
    return json.dumps(value, skipkeys=True, default=lambda value: str(type(value)))


def _as_grade(result):
    """A task's result as a dict of floats with "reward", or None if it is anything else."""
    values = result if isinstance(result, dict) else {"reward": result}
    try:
        # Not float() alone: it would take the text "1.0" for a number.
        finite = all(map(math.isfinite, values.values()))
        grade = {str(key): float(value) for key, value in values.items()}
    except (TypeError, ValueError, OverflowError):
        return None
    return grade if "reward" in grade and finite else None


def means(grades):
    """The mean of each value over the dicts that have it, by name."""
    found = {}
    for name in sorted({name for grade in grades for name in grade}):
        found[name] = float(np.mean([grade[name] for grade in grades if name in grade]))
    return found


def load_problem_sets(args, tokenizer):
    """The training problems and the held-out ones of `args.task`, as `ProblemSet`s.

    Raises `BadInput`, also for prompts that the model of `args` cannot read.
    """
    task = load_task(args.task, args.data, args.eval_data, args.eval_size)
    train_set = load_problems(task, "train", tokenizer, args.max_prompt_tokens)
    eval_set = load_problems(task, "eval", tokenizer, args.max_prompt_tokens)
    check_context(args, train_set.prompts + eval_set.prompts)
    first = repr(tokenizer.decode(train_set.prompts[0]))
    NOTES["first training prompt"] = first
    if rank() == 0 and not args.resume:
        print(f"The first training prompt, as the model gets it:\n    {first}")
        _tell_repeats(train_set, eval_set)
    return train_set, eval_set


def _tell_repeats(train_set, eval_set):
    """Say where problems appear more than once."""
    train, held_out = ([*map(_as_json, each.problems)] for each in (train_set, eval_set))
    different = set(train)
    if len(different) < 0.9 * len(train):
        what = f"Of {len(train)} training problems, only {len(different)} are different"
        print(f"{what}: the others repeat them.", file=sys.stderr)
    if known := sum(problem in different for problem in held_out):
        what = f"{known} of {len(held_out)} held-out problems are training problems, too"
        print(f"{what}: on these, the model may know the answer by heart.", file=sys.stderr)


def load_problems(task, split, tokenizer, max_prompt_tokens):
    """The `ProblemSet` of `split`, "train" or "eval".

    Problems of more than `max_prompt_tokens` tokens are left out. Plain text gets the special
    tokens that the tokenizer puts in front of it (a BOS, say), and none at its end. Raises
    `BadInput` if no problem is left, and for prompts that cannot be encoded.
    """
    name = f"--task {type(task).__name__}"
    try:
        problems = list(task.problems(split))[: task.eval_size if split == "eval" else None]
        token_ids = _encoded([problem["prompt"] for problem in problems], task, tokenizer)
    except Exception as error:  # the task's own, no chat template, one that refuses a message, …
        what = f"that the chat template of --model {tokenizer.name_or_path} takes, but: {error!r}"
        must = 'the "prompt" of a problem must be text, or a list of chat messages'
        raise BadInput(f"{name}: {must} {what}.") from error
    if not token_ids:
        raise BadInput(f'{name} has no {split} problem: let problems("{split}") give some.')
    if not all(token_ids):
        raise BadInput(f"{name} has an empty {split} prompt: give at least one token each.")
    kept = [number for number, ids in enumerate(token_ids) if len(ids) <= max_prompt_tokens]
    left_out = len(token_ids) - len(kept)
    too_long = f"{left_out} of {len(token_ids)} {split} prompts are longer than"
    too_long += f" --max-prompt-tokens {max_prompt_tokens}"
    if not kept:
        raise BadInput(f"{too_long}: raise it to {min(map(len, token_ids))} or more.")
    if left_out:
        print(f"{too_long} and are left out.", file=sys.stderr)
    return ProblemSet(task, tokenizer, [problems[n] for n in kept], [token_ids[n] for n in kept])


def _encoded(prompts, task, tokenizer):
    """Token ids of prompts, each text or a list of chat messages."""
    texts = (_as_text(prompt, task, tokenizer) for prompt in progress(prompts, "encoding prompts"))
    token_ids = []
    while batch := list(islice(texts, ENCODED_AT_ONCE)):
        token_ids += tokenizer(batch, add_special_tokens=False)["input_ids"]
    plain = [number for number, prompt in enumerate(prompts) if isinstance(prompt, str)]
    if plain:
        first = plain[0]
        (special,) = tokenizer([prompts[first]])["input_ids"]
        front = special[: special.index(token_ids[first][0])]
        for number in plain:
            token_ids[number] = front + token_ids[number]
    return token_ids


def _as_text(prompt, task, tokenizer):
    if isinstance(prompt, str):
        return prompt
    begun = prompt[-1]["role"] == "assistant"
    options = {"add_generation_prompt": not begun, "continue_final_message": begun}
    options |= task.template_arguments
    text = tokenizer.apply_chat_template(prompt, tokenize=False, **options)
    if begun:
        _check_continued(prompt[-1]["content"], text)
    return text


def _check_continued(content, text):
    """Raise `ValueError` unless a text ends with what the assistant's message begins with.

    Many templates trim messages, and the response would follow another text than the task gave.
    """
    said = content if isinstance(content, str) else content[-1]["text"]
    if not said.strip() or not text.endswith(said):
        what = f"the last message, {said!r}, is empty, or the template changes it"
        raise ValueError(f"{what}: leave out blanks at its ends")
