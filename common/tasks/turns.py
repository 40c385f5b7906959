"""Tasks of several turns: what a response is made of where not all of its tokens are the policy's.

    prompt | policy's tokens, EOS | reply's tokens | policy's tokens, EOS | …

A response is one list of tokens. It is never decoded and encoded again, since tokens may come out
differently. The log-prob of a token that the policy did not sample is None, and that is all that
tells the two apart: from it follow mask, N and every metric.
"""

import contextlib
import copy
import queue
import sys
import threading
import time
from itertools import groupby

from common.errors import BadInput, RunStopped
from common.tasks import load_task

# So many of a run's first replies are asked for twice, to see that they depend on nothing else.
ASKED_TWICE = 8


def parts_of(tokens, logprobs):
    """A response as pairs (is it the policy's?, token ids); the two kinds take turns."""
    pairs = zip(tokens, logprobs, strict=True)
    return [
        (sampled, [token for token, _ in part])
        for sampled, part in groupby(pairs, key=lambda pair: pair[1] is not None)
    ]


class Environment:
    """Answers turns of the policy, in tokens: a `task` of `max_turns` > 1. It can be pickled.

    `source` are the arguments that `load_task` made the task from: another process makes it again,
    since a task's own file is no module that could be imported. `chat` tells whether prompts are
    chat messages: then the chat template says what stands around a reply. Replies must come within
    `timeout` seconds. Raises `BadInput` for a template that cannot be used.
    """

    def __init__(self, task, source, tokenizer, eos_ids, chat, timeout):
        self.arguments = (source, tokenizer, eos_ids, chat, timeout)
        self.task = task
        self.name = type(task).__name__
        self.tokenizer = tokenizer
        self.timeout = timeout
        self.before, self.after = [], []
        self.to_check = ASKED_TWICE
        if chat:
            before, after = map(self._encoded, around_a_reply(tokenizer, task))
            # The policy has sampled its EOS itself.
            ends = [place for place, token in enumerate(before, start=1) if token in eos_ids]
            self.before, self.after = before[ends[0] if ends else 0 :], after

    def __reduce__(self):
        return _made_again, self.arguments

    def replies(self, problems, responses, rooms, heartbeat):
        """What follows responses that have just ended a turn.

        A response is a pair (tokens, log-probs). Returns token ids for each; [] where that was the
        last turn; None where the reply and one more token do not fit into `room` tokens.
        `heartbeat` grows while this waits. Raises `RunStopped` where the task fails.
        """
        turns = [
            [self._text(part) for sampled, part in parts_of(*response) if sampled]
            for response in responses
        ]
        found = [[] for _ in turns]
        asked = [i for i, said in enumerate(turns) if len(said) < self.task.max_turns]
        if not asked:
            return found
        texts = self._ask([problems[i] for i in asked], [turns[i] for i in asked], heartbeat)
        for i, text in zip(asked, texts, strict=True):
            if text is None:
                continue
            if not isinstance(text, str) or not text.strip():
                what = f"{self.name}.reply returned {text!r} after the turns {turns[i]}"
                raise RunStopped(f"{what}; it must be None, or a text that is not empty.")
            reply = self._encoded(text, special=False)
            if not isinstance(problems[i]["prompt"], str):
                reply = [*self.before, *reply, *self.after]
            found[i] = reply if len(reply) < rooms[i] else None
        return found

    def _ask(self, problems, turns, heartbeat):
        texts = self._in_time(problems, turns, heartbeat)
        if self.to_check > 0:
            self.to_check -= len(texts)
            if self._in_time(problems, turns, heartbeat) != texts:
                what = f"{self.name}.reply gave two answers to the same problem and turns"
                raise RunStopped(f"{what}; it must depend on nothing else.")
        return texts

    def _in_time(self, problems, turns, heartbeat):
        """The task's replies, from a thread of their own, since a tool may never answer."""
        done = queue.SimpleQueue()

        def reply():
            try:
                # Copies: nobody may change what `reward` will get.
                done.put(list(self.task.replies(*copy.deepcopy((problems, turns)))))
            except BaseException as error:  # a tool may even try to leave
                done.put(error)

        threading.Thread(target=reply, daemon=True).start()
        texts = self._wait_for(done, heartbeat)
        if isinstance(texts, RunStopped):
            raise texts
        if isinstance(texts, BaseException):
            raise RunStopped(f"{self.name}.replies failed: {texts!r}.") from texts
        if len(texts) != len(turns):
            what = f"{self.name}.replies returned {len(texts)} replies"
            raise RunStopped(f"{what} to {len(turns)} responses.")
        return texts

    def _wait_for(self, done, heartbeat):
        until = time.monotonic() + self.timeout
        while (left := until - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                return done.get(timeout=min(1.0, left))
            heartbeat += 1
        what = f"{self.name}.reply has not answered for {self.timeout:g} s"
        raise RunStopped(f"{what}: continue with --resume.")

    def _encoded(self, text, special=True):
        """Token ids. Unless `special`, what looks like a special token is text like any other."""
        options = {"add_special_tokens": False, "split_special_tokens": not special}
        return self.tokenizer(text, **options)["input_ids"]

    def _text(self, tokens):
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


def environment_of(problem_sets, source, eos_ids, timeout):
    """The `Environment` of some `ProblemSet`s of one task; None where it has only one turn.

    Raises `BadInput`.
    """
    first = problem_sets[0]
    if first.to_reply_to() is None:
        return None
    chat = list in _kinds_of_prompts(problem_sets)
    return Environment(first.task, source, first.tokenizer, eos_ids, chat, timeout)


def _kinds_of_prompts(problem_sets):
    """`str` for plain text, `list` for chat messages."""
    problems = [problem for problem_set in problem_sets for problem in problem_set.problems]
    return {str if isinstance(problem["prompt"], str) else list for problem in problems}


def _made_again(source, *others):
    return Environment(load_task(*source), source, *others)


def around_a_reply(tokenizer, task):
    """What the chat template writes between the policy's turn and a reply, and from there up to the
    policy's next turn: two texts. Raises `BadInput`.

    They are looked up in chats of one and of two replies, which must agree. What a template makes
    of earlier turns does not matter: it is not asked again.
    """
    turn, reply = "What the model says", "What it is told"
    said = [{"role": "assistant", "content": turn}, {"role": task.reply_role, "content": reply}]
    options = {"tokenize": False, "add_generation_prompt": True, **task.template_arguments}
    found = []
    try:
        for times in (1, 2):
            chat = [{"role": "user", "content": "The problem"}, *said * times]
            text = tokenizer.apply_chat_template(chat, **options)
            before, after = text.rpartition(turn)[2].split(reply)
            found.append((before, after))
        if found[0] != found[1] or not all(found[0]) or text.count(turn) != 2:
            raise ValueError(f"{found}")
    except Exception as error:  # as varied as templates are
        what = (
            f"--task {type(task).__name__}: the chat template of --model {tokenizer.name_or_path}"
        )
        how = f"give another reply_role than {task.reply_role!r}, or another model"
        raise BadInput(f"{what} has no place for replies ({error!r}): {how}.") from error
    return found[0]


def end_of_turn(tokenizer, task):
    """The token that the chat template writes after the model's turn; None if it is no one token,
    or if there is no template.
    """
    turn = "What the model says"
    chat = [{"role": "user", "content": "The problem"}, {"role": "assistant", "content": turn}]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False, **task.template_arguments)
    except Exception:  # as varied as templates are; a task that needs one has been refused before
        return None
    _, found, after = text.rpartition(turn)
    tokens = tokenizer(after.strip(), add_special_tokens=False)["input_ids"]
    return tokens[0] if found and len(tokens) == 1 else None


def warn_of_endless_responses(problem_sets, eos_ids):
    """Say so where prompts and chat template make it likely that no EOS ends a response."""
    tokenizer = problem_sets[0].tokenizer
    end = end_of_turn(tokenizer, problem_sets[0].task)
    if end is None:
        return
    kinds = _kinds_of_prompts(problem_sets)
    model = f"--model {tokenizer.name_or_path}"
    if list in kinds and end not in eos_ids:
        what = f"{model} ends a turn with {tokenizer.decode([end])!r}, which is no EOS"
        how = f'set "eos_token_id": {sorted({*eos_ids, end})} in its generation_config.json'
        print(f"The chat template of {what}, so responses may run on: {how}.", file=sys.stderr)
    if str in kinds and end in eos_ids:  # of a base model, the EOS is another token
        what = f"{model} is a chat model, and may continue plain text without an end"
        print(f"{what}: give prompts that are lists of chat messages.", file=sys.stderr)
