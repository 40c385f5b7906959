r"""Grade free-form maths answers with math-verify, in a worker process that no answer can hang.

math-verify evaluates what a model wrote, and a model may write `9^{9^9}`. Its own time limits are Python
signal handlers: they need the main thread, and never run while one big-integer operation is under way. Here
the *kernel* ends what takes too long. Three processes share the work:

    parent    the training script: cuts the graded part out of each response, keeps the time of the batch
    worker    this file run as a script: imports math-verify once (about 0.5 s), then does nothing but fork
    child     a fork of the worker (a few ms): grades one batch under a CPU timer whose signal kills it

When an answer kills the child, the parent marks it wrong and sends the worker the rest of the batch: this
costs a fork, not an import. The worker is started as a plain command rather than by `multiprocessing`, whose
spawned processes import the training script again, torch included.
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
from contextlib import contextmanager, suppress

LONGEST_PART = 500  # characters; longer is no final answer, and math-verify may take seconds to parse it
MEMORY_LIMIT = 1 << 30  # bytes of address space for a child; an ordinary one uses 70 MB
START_SECONDS = 60.0  # for importing math-verify, which a cold network file system can make slow

RIGHT, WRONG, OUT_OF_TIME, READY = b"1", b"0", b"t", b"r"  # what the worker says, one byte each


def graded_part(response: str) -> str | None:
    r"""Return the piece of a response that is graded, or None: then the format, and so the answer, is wrong.

    It is the content of the last `\boxed{...}`, else what follows the last `####` up to the end of its line.
    A last box that never closes was cut at the token limit. Its number may lack digits, and whatever was
    boxed before is no longer the response's last word, so there is nothing to grade.
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

    The worker starts with the first batch that needs it. It leaves when its stdin closes, hence also when
    this process is killed.

    Args:
        seconds_per_answer: CPU seconds an answer may take. CPU time, so that a busy machine changes no grade.
        seconds_per_batch: wall-clock seconds a call of `grade` may take once the worker runs.

    Attributes:
        timeouts: answers graded wrong so far because they, or their batch, ran out of time.
    """

    def __init__(self, seconds_per_answer: float = 1.0, seconds_per_batch: float = 30.0):
        self.seconds_per_answer = seconds_per_answer
        self.seconds_per_batch = seconds_per_batch
        self.timeouts = 0
        self._worker: subprocess.Popen | None = None
        self._lock = threading.Lock()

    def grade(self, golds: list[str], responses: list[str]) -> list[bool]:
        """Say for each response whether its graded part equals its gold answer.

        No content of a response raises. Raises RuntimeError if the worker cannot be started, ValueError if
        the two lists differ in length.
        """
        pairs = list(zip(golds, map(graded_part, responses), strict=True))
        # Responses to one prompt often agree, so each distinct pair is graded once.
        distinct = [(gold, part) for gold, part in dict.fromkeys(pairs) if part and len(part) <= LONGEST_PART]
        with self._lock:
            try:
                verdicts = dict(zip(distinct, self._verdicts(distinct), strict=True))
            except BaseException:  # Ctrl-C, say: verdicts under way must not be taken for the next batch's
                self._stop()
                raise
            self.timeouts += sum(verdicts.get(pair) == OUT_OF_TIME for pair in pairs)
        return [verdicts.get(pair) == RIGHT for pair in pairs]

    def close(self) -> None:
        """Stop the worker, after any batch in progress. A later `grade` starts a new one."""
        with self._lock:
            self._stop()

    def _verdicts(self, pairs: list[tuple[str, str]]) -> list[bytes]:
        verdicts: list[bytes] = []
        died_at = None
        if pairs:
            self._start()
        deadline = time.monotonic() + self.seconds_per_batch
        while len(verdicts) < len(pairs):
            verdicts += self._ask(pairs[len(verdicts) :], deadline)
            if time.monotonic() >= deadline:
                self._stop()
                verdicts += [OUT_OF_TIME] * (len(pairs) - len(verdicts))
            elif len(verdicts) < len(pairs) and verdicts[-1:] != [OUT_OF_TIME]:
                # The worker died. Whoever killed it, the answer at hand gets a second chance, but no third.
                if died_at == len(verdicts):
                    verdicts.append(WRONG)
                died_at = len(verdicts)
                self._stop()
                self._start()
        return verdicts

    def _ask(self, pairs: list[tuple[str, str]], deadline: float) -> list[bytes]:
        """Return the verdicts on `pairs` up to the first that is OUT_OF_TIME, fewer if the worker dies."""
        verdicts: list[bytes] = []
        with _killed_at(deadline, self._worker), suppress(BrokenPipeError):
            self._worker.stdin.write(json.dumps(pairs).encode() + b"\n")
            self._worker.stdin.flush()
            while len(verdicts) < len(pairs) and verdicts[-1:] != [OUT_OF_TIME]:
                if not (verdict := self._worker.stdout.read(1)):
                    break
                verdicts.append(verdict)
        return verdicts

    def _start(self) -> None:
        if self._worker is not None:
            return
        # -P keeps this folder off the import path: a neighbour named like a module of sympy's would hide it.
        command = [sys.executable, "-P", os.path.abspath(__file__), str(self.seconds_per_answer)]
        pipe = subprocess.PIPE
        self._worker = subprocess.Popen(command, stdin=pipe, stdout=pipe, process_group=0)
        with _killed_at(time.monotonic() + START_SECONDS, self._worker):
            ready = self._worker.stdout.read(1) == READY
        if not ready:
            self._stop()
            raise RuntimeError(
                "the grading worker did not start (its error is printed above): is math-verify installed for "
                f"{sys.executable}, as by pip install 'math-verify[antlr4_13_2]'?"
            )

    def _stop(self) -> None:
        if self._worker is not None:
            _kill(self._worker)
            self._worker.communicate()  # closes the pipes and waits for the end
            self._worker = None


@contextmanager
def _killed_at(deadline: float, worker: subprocess.Popen):
    """Kill the worker if the block lasts until `deadline`: who reads from it then sees an end of file."""
    timer = threading.Timer(max(0.0, deadline - time.monotonic()), _kill, [worker])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _kill(worker: subprocess.Popen) -> None:
    with suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)  # its child, too: the worker leads a process group of its own


# ---- What follows runs in the worker and its children only. ----


def _serve(seconds_per_answer: float) -> None:
    """Fork a child for each line of stdin, a JSON list of pairs (gold, part), until stdin closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    replies = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints must not be taken for a verdict
    # Children inherit what the parser has learnt by now. And a library that is there but does not work (its
    # ANTLR runtime is an optional dependency, without which it finds every answer wrong) must not look ready.
    for part in ["18", "x = 18", r"\frac{36}{2}", "18.0", r"2 \cdot (10 - 1)", "3^{2} + 9", "{18}"]:
        assert _equal("18", part), f"math-verify finds that {part} is not 18"
    os.write(replies, READY)
    for line in sys.stdin.buffer:
        child = os.fork()
        if child == 0:
            _grade_and_exit(json.loads(line), seconds_per_answer, replies)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF:
            os.write(replies, OUT_OF_TIME)
        elif status != 0:
            return


def _grade_and_exit(pairs: list[tuple[str, str]], seconds_per_answer: float, replies: int) -> None:
    exit_code = 1
    try:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
        signal.signal(signal.SIGPROF, signal.SIG_DFL)  # death, even in the middle of a big-integer operation
        for gold, part in pairs:
            signal.setitimer(signal.ITIMER_PROF, seconds_per_answer)
            os.write(replies, RIGHT if _equal(gold, part) else WRONG)
        exit_code = 0
    finally:
        os._exit(exit_code)


def _equal(gold: str, part: str) -> bool:
    from math_verify import LatexExtractionConfig, parse, verify

    # LaTeX only: math-verify's other reader picks a number out of any text, as 18 out of "18 million", "18!"
    # and "17, no, 18". Its time limits are off: the timer above replaces them.
    reader = [LatexExtractionConfig(boxed_match_priority=-1)]
    with suppress(Exception):  # MemoryError, RecursionError and the like: what cannot be read is wrong
        gold_value, value = (parse(f"${_tidy(text)}$", reader, parsing_timeout=None) for text in (gold, part))
        return verify(gold_value, value, timeout_seconds=None)
    return False


def _tidy(text: str) -> str:
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
