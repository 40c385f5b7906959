r"""Grade free-form maths answers with math-verify, in a worker process that no answer can hang.

math-verify evaluates what a model wrote, and a model may write `9^{9^9}`. Its own time limits are Python signal
handlers: they need the main thread, and never run while one big-integer operation is under way. So the worker, which
is this file run as a script, imports math-verify once (about 0.5 s) and forks a child for each batch (a few ms), under
a CPU timer whose signal kills it. The parent takes that answer for wrong and sends the rest of the batch again. The
worker is a plain command, because `multiprocessing` would import the training script, torch included.
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
from contextlib import suppress

LONGEST_PART = 500  # characters; longer is no final answer, and math-verify may take seconds to parse it
MEMORY_LIMIT = 1 << 30  # bytes of address space; an ordinary worker uses 70 MB
START_SECONDS = 60.0  # for importing math-verify, which a cold network file system can make slow

RIGHT, WRONG, OUT_OF_TIME = "1", "0", "t"  # the worker's verdicts


def graded_part(response):
    r"""Return the piece of a response that is graded, or None: then the format, and so the answer, is wrong.

    It is the content of the last `\boxed{...}`, else what follows the last `####` up to the end of its line. A last
    box that never closes was cut at the token limit: its number may lack digits, so there is nothing to grade.
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

    The worker starts with the first batch that needs it, and leaves when this process ends, however it ends. Limits
    are `seconds_per_answer` of CPU time, so that a busy machine changes no grade, and `seconds_per_batch` of wall-clock
    time once the worker runs. `timeouts` counts the answers graded wrong so far because either ran out.
    """

    def __init__(self, seconds_per_answer=1.0, seconds_per_batch=30.0):
        self.seconds_per_answer, self.seconds_per_batch = seconds_per_answer, seconds_per_batch
        self.timeouts = 0
        self._worker = None
        self._lock = threading.Lock()

    def grade(self, golds, responses):
        """Say for each response whether its graded part equals its gold answer: a list of bools.

        No content of a response raises. Raises RuntimeError if the worker cannot be started, ValueError if the two
        lists differ in length.
        """
        pairs = list(zip(golds, map(graded_part, responses), strict=True))
        # Responses to one prompt often agree, so each distinct pair is graded once.
        distinct = [(gold, part) for gold, part in dict.fromkeys(pairs) if part and len(part) <= LONGEST_PART]
        with self._lock:
            try:
                verdicts = dict(zip(distinct, self._verdicts(distinct), strict=True))
            except BaseException:  # Ctrl-C, say: verdicts under way must not be taken for the next batch's
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
            elif died_at == len(verdicts):  # whoever killed the worker, an answer gets a second chance, but no third
                verdicts += WRONG
            died_at = len(verdicts)
        return verdicts

    def _ask(self, message, deadline):
        """Send the worker a message; return the line it replies, without a newline if it dies or is late."""
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
        # -P keeps this folder off the import path: a neighbour named like a module of sympy's would hide it.
        command = [sys.executable, "-P", os.path.abspath(__file__), str(self.seconds_per_answer)]
        pipe = subprocess.PIPE
        self._worker = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, process_group=0)
        if self._ask("", time.monotonic() + START_SECONDS) != "ready\n":
            self.close()
            raise RuntimeError(
                "the grading worker did not start (its error is printed above): is math-verify installed for "
                f"{sys.executable}, as by pip install 'math-verify[antlr4_13_2]'?"
            )


def _kill(worker):
    with suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)  # its child, too: the worker leads a process group of its own


# ---- What follows runs in the worker and its children only. ----


def _serve(seconds_per_answer):
    """Answer each line of stdin, a JSON list of pairs (gold, part), by a line of verdicts up to the first timeout."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # the timer's: death, even in the middle of a big-integer operation
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    replies = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints must not be taken for a verdict
    # Children inherit what the parser has learnt by now. And a library that is there but does not work (its
    # ANTLR runtime is an optional dependency, without which it finds every answer wrong) must not look ready.
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
    from math_verify import LatexExtractionConfig, parse, verify

    # LaTeX only: math-verify's other reader picks a number out of any text, as 18 out of "18 million", "18!"
    # and "17, no, 18". Its time limits are off: the timer above replaces them.
    reader = [LatexExtractionConfig(boxed_match_priority=-1)]
    with suppress(Exception):  # MemoryError, RecursionError and the like: what cannot be read is wrong
        gold_value, value = (parse(f"${_tidy(text)}$", reader, parsing_timeout=None) for text in (gold, part))
        return verify(gold_value, value, timeout_seconds=None)
    return False


def _tidy(text):
    """Rewrite what math-verify 0.9 misreads: the comments say how it would read the text as it stands."""
    text = re.sub(r"\\?[$€£¥₹°]|(?<!\\)\\[()\[\]]", "", text)  # €18, 18° and \[18\]: nothing
    text = re.sub(r"\\(?:text|math|mbox)\w*\s*\{([^{}]*)\}", r" \1 ", text)  # 18\text{ thousand}: 18
    text = re.sub(r"(?<!\\)\\[,;:! ]|[~\s]+", " ", text).strip("* ").rstrip(".,;:")  # **18** and 18,: nothing
    text = re.sub(r"(?<=\d)(?:\{,\}|[, ])+(?=\d{3}(?!\d))", "", text)  # 1\,800: 1 + 800
    text = re.sub(r"(?<=\d) +(?=\d)", ",", text)  # 10 8: 10 + 8; with a comma, a list
    # 18 dollars: 18·d·o·l·l·a·r·s. A unit after a number goes, unless it has words that change the value.
    value = r"and|or|plus|minus|point|half|pi|squared|cubed|dozen|hundred|thousand|(?:m|b|tr)illion"
    unit = r"(?:m|[A-Za-z]{2,})(?![A-Za-z])[A-Za-z./ -]*(?:\^ ?\{?\d\}?|[²³])?"
    return re.sub(rf"(?<=[\d}}%)]) +(?!.*\b(?:{value})s?\b){unit}$", "", text)


if __name__ == "__main__":
    import logging

    logging.disable(logging.CRITICAL)  # math-verify warns that its time limits are off
    with suppress(BrokenPipeError):  # the parent is gone
        _serve(float(sys.argv[1]))
