r"""Grade free-form maths answers with math-verify, in a worker process that no answer can hang.

math-verify evaluates what a model wrote, and a model may write `9^{9^9}`. Its own time limits are Python signal
handlers, which cannot run during a big-integer operation. So a worker, this file run as a script (`multiprocessing`
would make it import torch), imports math-verify once and forks a child per batch. A CPU timer kills the child at an
answer that takes too long. The parent counts that answer as wrong and sends the rest of the batch again.
"""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import unicodedata
from contextlib import suppress

LONGEST_PART = (
    500  # characters; longer is no final answer, and math-verify may take seconds to parse it
)
MEMORY_LIMIT = 1 << 30  # bytes of address space; an ordinary worker uses 70 MB
START_SECONDS = 60.0  # for importing math-verify, which a cold network file system can make slow

RIGHT, WRONG, OUT_OF_TIME = "1", "0", "t"  # the worker's verdicts


def graded_part(response):
    r"""The content of the last `\boxed{...}`, else what follows the last `####` in its line; None if there is neither.

    A last box that never closes was cut at the token limit: its number may lack digits, so that is None, too.
    """
    openings = list(re.finditer(r"\\boxed\s*\{", response))
    if not openings:
        _, mark, rest = response.rpartition("####")
        return rest.split("\n", 1)[0].strip() if mark else None
    rest, depth = response[openings[-1].end() :], 1
    for token in re.finditer(r"\\.|[{}]", rest, re.DOTALL):  # `\{` and `\}` are text, not braces
        depth += {"{": 1, "}": -1}.get(token.group(), 0)
        if depth == 0:
            return rest[: token.start()].strip()
    return None


class MathGrader:
    """Grades batches of answers; usable from any thread, one batch at a time.

    The worker starts with the first batch that needs it, and leaves when this process ends.
    `seconds_per_answer` is CPU time, so that a busy machine changes no grade, `seconds_per_batch`
    wall-clock time. `timeouts` counts the answers graded wrong so far because either ran out.
    """

    def __init__(self, seconds_per_answer=1.0, seconds_per_batch=30.0):
        self.seconds_per_answer, self.seconds_per_batch = seconds_per_answer, seconds_per_batch
        self.timeouts, self._worker, self._lock = 0, None, threading.Lock()

    def grade(self, golds, responses):
        """Whether the graded part of each response equals its gold answer: bools. RuntimeError if
        no worker starts.
        """
        pairs = list(zip(golds, map(graded_part, responses), strict=True))
        # Responses to one prompt often agree, so each distinct pair is graded once.
        distinct = [
            (gold, part)
            for gold, part in dict.fromkeys(pairs)
            if part and len(part) <= LONGEST_PART
        ]
        with self._lock:
            try:
                verdicts = dict(zip(distinct, self._verdicts(distinct), strict=True))
            except (
                BaseException
            ):  # Ctrl-C, say: verdicts under way must not be taken for the next batch's
                self.close()
                raise
            self.timeouts += sum(verdicts.get(pair) == OUT_OF_TIME for pair in pairs)
        return [verdicts.get(pair) == RIGHT for pair in pairs]

    def close(self):
        """Stop the worker. A later `grade` starts a new one."""
        if self._worker is not None:
            _kill(self._worker)
            self._worker.communicate()  # closes the pipes and waits for the end
            self._worker = None

    def _verdicts(self, pairs):
        """A string with one verdict per pair."""
        verdicts, died_at, deadline = "", None, None
        while len(verdicts) < len(pairs):
            if self._worker is None:
                self._start()
            deadline = deadline or time.monotonic() + self.seconds_per_batch
            reply = self._ask(json.dumps(pairs[len(verdicts) :]) + "\n", deadline)
            verdicts += reply.rstrip("\n")
            if reply.endswith("\n"):
                continue
            self.close()
            if time.monotonic() >= deadline:
                verdicts = verdicts.ljust(len(pairs), OUT_OF_TIME)
            elif died_at == len(
                verdicts
            ):  # the worker has died twice at this answer, whatever killed it
                verdicts += WRONG
            died_at = len(verdicts)
        return verdicts

    def _ask(self, message, deadline):
        """Send the worker a message; return the line it replies, without a newline if it dies or is
        late.
        """
        timer = threading.Timer(max(0.0, deadline - time.monotonic()), _kill, [self._worker])
        timer.daemon = True
        timer.start()
        try:
            with suppress(BrokenPipeError):
                self._worker.stdin.write(message)
                self._worker.stdin.flush()
            return self._worker.stdout.readline()
        finally:
            timer.cancel()

    def _start(self):
        # -P keeps this folder off the import path: a neighbour named like a module of sympy's would
        # hide it.
        command = [sys.executable, "-P", os.path.abspath(__file__), str(self.seconds_per_answer)]
        pipe = subprocess.PIPE
        self._worker = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, process_group=0
        )
        if self._ask("", time.monotonic() + START_SECONDS) != "ready\n":
            self.close()
            raise RuntimeError(
                "the grading worker did not start: pip install 'math-verify[antlr4_13_2]'."
            )


def _kill(worker):
    with suppress(ProcessLookupError):
        os.killpg(
            worker.pid, signal.SIGKILL
        )  # its child, too: the worker leads a process group of its own


# ---- What follows runs in the worker and its children only. ----


def _serve(seconds_per_answer):
    """Answer each line of stdin, a JSON list of pairs (gold, part), by a line of verdicts up to the
    first timeout.
    """
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGHUP,
    ):  # the parent decides what they mean
        signal.signal(number, signal.SIG_IGN)
    signal.signal(
        signal.SIGPROF, signal.SIG_DFL
    )  # the timer's: death, even in the middle of a big-integer operation
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    replies = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints must not be taken for a verdict
    # Children inherit what the parser has learnt by now. And a library that is there but does not
    # work (its ANTLR runtime is an optional dependency, without which it finds every answer wrong)
    # must not look ready.
    for part in ["18", "x = 18", r"\frac{36}{2}", "18.0", r"2 \cdot (10 - 1)", "3^{2} + 9", "{18}"]:
        assert _equal("18", part), f"math-verify finds that {part} is not 18"
    os.write(replies, b"ready\n")
    for line in sys.stdin:
        if os.fork() == 0:
            try:
                for gold, part in json.loads(line):
                    signal.setitimer(signal.ITIMER_PROF, seconds_per_answer)
                    os.write(replies, (RIGHT if _equal(gold, part) else WRONG).encode())
                os._exit(0)
            finally:
                os._exit(1)
        exit_code = os.waitstatus_to_exitcode(os.wait()[1])
        if exit_code not in (0, -signal.SIGPROF):
            return
        os.write(replies, f"{OUT_OF_TIME if exit_code else ''}\n".encode())


def _equal(gold, part):
    with suppress(
        Exception
    ):  # MemoryError, RecursionError and the like: what cannot be read is wrong
        gold, part = _tidy(gold), _tidy(part)
        bases = [re.findall(r"(?<=\d)_\{?(\d+)", text) for text in (gold, part)]
        if bases[1] not in ([], bases[0]):  # 11_2: 11
            return False
        whole = [text.removesuffix("%") for text in (gold, part)]  # 18% may mean 18 or 0.18
        hundredth = [
            f"({text[:-1].split('=')[-1]})/100" if text.endswith("%") else text
            for text in (gold, part)
        ]
        return _same(*whole) or (whole != hundredth and _same(*hundredth))
    return False


def _same(gold, part):
    from math_verify import LatexExtractionConfig, parse, verify

    def read(text):
        # LaTeX only: math-verify's other reader picks a number out of any text, as 18 out of "18
        # million", "18!" and "17, no, 18". Its time limits are off: the timer above replaces them.
        return parse(
            f"${text}$", [LatexExtractionConfig(boxed_match_priority=-1)], parsing_timeout=None
        )

    def equal(values, others):
        if not verify(values, others, timeout_seconds=None):
            return False
        a, b = (
            values[0],
            others[0],
        )  # math-verify compares six decimals, in which 1e-7 and 2e-7 are the same
        return not (is_number(values) and is_number(others)) or bool(
            a == b or abs(a - b) <= 1e-5 * abs(a)
        )

    def is_number(values):
        return bool(values) and getattr(values[0], "is_number", False)

    # Of 17 = 18, math-verify would see the 18 only.
    gold_values, sides = read(gold), [read(side) for side in part.split("=")] if "=" in part else []
    numbers = [side for side in sides if is_number(side) and is_number(gold_values)]
    return all(equal(gold_values, number) for number in numbers) and equal(gold_values, read(part))


def _tidy(text):
    """Rewrite what math-verify 0.9 misreads. A comment "x: y" means that it would read x as y."""

    def repeating(
        match,
        # 0.1\overline{6}: 0.16. Digits before the point, after it, and repeated: abc − ab over
        # 9…0….
    ):
        a, b, c = match.groups()
        return rf"\frac{{{int(a + b + c) - int(a + b)}}}{{{10 ** len(b) * (10 ** len(c) - 1)}}}"

    text = re.sub(r"\\?[$€£¥₹]|(?<!\\)\\[()\[\]]", "", text)  # €18 and \[18\]: nothing
    text = re.sub(r"°|\^ ?\{?\\circ\}?", " ", text)  # 18°: nothing
    text = re.sub(
        r"\\(?:(?:text|math|mbox|bold)\w*|bm)\s*\{([^{}]*)\}", r" \1 ", text
    )  # 18\text{ thousand}: 18
    text = (
        re.sub(r"(?<!\\)\\[,;:! ]|[~\s]+", " ", text).strip("* ").rstrip(".,;:")
    )  # **18** and 18,: nothing
    text = re.sub(r"([\d)}]|\\pi) *(?:\\approx|≈).*", r"\1", text)  # 10\pi \approx 31.4: also 31.4
    text = re.sub(r"\\approx|≈", "=", text).lstrip("= ")  # \approx 18: nothing
    text = re.sub(r"(^|= *)[–—]", r"\1-", text)  # –18: nothing
    text = re.sub(r"\\?%| (?:percent|pct)$", "%", text)
    text = re.sub(
        r"[¼-¾⅐-⅞]",
        lambda match: " " + unicodedata.normalize("NFKC", match[0]).replace("⁄", "/"),
        text,
    )
    text = re.sub(
        r"(?<![\d.,/])(\d+) +(\d+)/(\d+)(?![\d.])", r"(\1+\2/\3)", text
    ).strip()  # 4 1/2: 5/2
    text = re.sub(r"(\d+)\.(\d*)\\overline\{(\d+)\}", repeating, text)
    text = re.sub(r"(?<=\d)(?:\{,\}|[, ])+(?=\d{3}(?!\d))", "", text)  # 1\,800: 1 + 800
    text = re.sub(r"(?<=\d) +(?=\d)", ",", text)  # 10 8: 10 + 8; with a comma, a list
    text = re.sub(r"(?<=\d)[eE]([+-]?\d+)(?= |$)", r"\\cdot 10^{\1}", text)  # 1e6: Euler's number
    for word, power in (("thousand", 3), ("million", 6), ("billion", 9), ("trillion", 12)):
        text = re.sub(rf"(?i)(?<=[\d)}}]) *{word}s?\b", rf"\\cdot 10^{{{power}}}", text)
    # 18 dollars: 18·d·o·l·l·a·r·s. A unit after a number goes, unless it has words that change the
    # value.
    value = (
        "and|or|plus|minus|times|point|pi|squared|cubed|doubled|tripled|halved|dozen|hundred|half|halves|third|quarter|"
        "(?:four|fif|six|seven|eigh|nin|ten|twelf|hundred|thousand|million)th|am|pm"
    )
    unit = r"(?:m|[A-Za-z]{2,})(?![A-Za-z])[A-Za-z./ -]*(?:\^ ?\{?\d\}?|[²³])?"
    text = re.sub(r"^([^A-Za-z\\]*\d) +[gshLCFK]$", r"\1", text)
    return re.sub(rf"(?<=[\d}}%)]) +(?!.*\b(?i:{value})s?\b){unit}$", "", text)


if __name__ == "__main__":
    import logging

    logging.disable(logging.CRITICAL)  # math-verify warns that its time limits are off
    with suppress(BrokenPipeError):  # the parent is gone
        _serve(float(sys.argv[1]))
