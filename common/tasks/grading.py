r"""Grade free-form maths answers with math-verify, in a worker process that no answer can hang.

math-verify evaluates what a model wrote, and a model may write `9^{9^9}`. Its own time limits are
Python signal handlers, which cannot run during a big-integer operation. So a worker, this file run
as a script (`multiprocessing` would make it import torch), imports math-verify once and forks a
child per batch. A CPU timer kills the child at an answer that takes too long. The parent counts
that answer as wrong and sends the rest of the batch again.
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

# Characters; what is longer is no final answer, and math-verify may take seconds to parse it.
LONGEST_PART = 500
MEMORY_LIMIT = 1 << 30  # bytes of address space; an ordinary worker uses 70 MB
START_SECONDS = 60.0  # for importing math-verify, which a cold network file system can make slow

RIGHT, WRONG, OUT_OF_TIME = "1", "0", "t"  # the worker's verdicts


def graded_part(response):
    r"""The content of the last `\boxed{...}`, else what follows the last `####` in its line.

    None if there is neither. A last box that never closes was cut at the token limit: its number
    may lack digits, so that is None, too.
    """
    openings = list(re.finditer(r"\\boxed\s*\{", response))
    if not openings:
        _, mark, rest = response.rpartition("####")
        return rest.split("\n", 1)[0].strip() if mark else None
    rest = response[openings[-1].end() :]
    depth = 1
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
        self.seconds_per_answer = seconds_per_answer
        self.seconds_per_batch = seconds_per_batch
        self.timeouts = 0
        self._worker = None
        self._lock = threading.Lock()

    def grade(self, golds, responses):
        """Whether the graded part of each response equals its gold answer: a list of bools.

        Raises `RuntimeError` if no worker starts.
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
            except BaseException:
                # Ctrl-C, say: verdicts under way must not be taken for the next batch's.
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
        verdicts = ""
        died_at = None  # the number of the answer at which the worker died last
        deadline = None  # set once a worker runs: starting it takes no time from the batch's
        while len(verdicts) < len(pairs):
            if self._worker is None:
                self._start()
            if deadline is None:
                deadline = time.monotonic() + self.seconds_per_batch
            remaining = pairs[len(verdicts) :]
            reply = self._ask(json.dumps(remaining) + "\n", deadline)
            verdicts += reply.rstrip("\n")
            if reply.endswith("\n"):
                continue
            self.close()
            if time.monotonic() >= deadline:
                verdicts = verdicts.ljust(len(pairs), OUT_OF_TIME)
            elif died_at == len(verdicts):
                # The worker has died twice at this answer, whatever killed it.
                verdicts += WRONG
            died_at = len(verdicts)
        return verdicts

    def _ask(self, message, deadline):
        """Send the worker a message; return the line it replies.

        The line lacks its newline if the worker dies or is late.
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
        # -P keeps this folder off the import path: a file beside this one, named like a module that
        # sympy imports, would hide that module.
        command = [sys.executable, "-P", os.path.abspath(__file__), str(self.seconds_per_answer)]
        self._worker = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,
        )
        if self._ask("", time.monotonic() + START_SECONDS) != "ready\n":
            self.close()
            raise RuntimeError(
                "the grading worker did not start: pip install 'math-verify[antlr4_13_2]'."
            )


def _kill(worker):
    # Its child, too: the worker leads a process group of its own.
    with suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)


# ---- What follows runs in the worker and its children only. ----


def _serve(seconds_per_answer):
    """Answer each line of stdin, a JSON list of pairs (gold, part), by a line of verdicts.

    The verdicts go up to the first timeout.
    """
    # What these mean is for the parent to decide.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # The timer's signal means death, even in the middle of a big-integer operation.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    # Whatever a library prints must not be taken for a verdict: it goes to stderr.
    replies = os.dup(1)
    os.dup2(2, 1)

    _try_out()
    os.write(replies, b"ready\n")
    for line in sys.stdin:
        if os.fork() == 0:
            _grade_and_exit(line, seconds_per_answer, replies)
        _, status = os.wait()
        exit_code = os.waitstatus_to_exitcode(status)
        if exit_code == 0:
            os.write(replies, b"\n")
        elif exit_code == -signal.SIGPROF:
            os.write(replies, f"{OUT_OF_TIME}\n".encode())
        else:
            return


def _try_out():
    """Check that math-verify works.

    If it is there but does not work, it must not look ready: without its ANTLR runtime, an optional
    dependency, it finds every answer wrong. And children inherit what its parser learns here.
    """
    for part in ["18", "x = 18", r"\frac{36}{2}", "18.0", r"2 \cdot (10 - 1)", "3^{2} + 9", "{18}"]:
        assert _equal("18", part), f"math-verify finds that {part} is not 18"


def _grade_and_exit(line, seconds_per_answer, replies):
    """All that a child does: write one verdict per pair, and leave without any cleaning up."""
    try:
        for gold, part in json.loads(line):
            signal.setitimer(signal.ITIMER_PROF, seconds_per_answer)
            verdict = RIGHT if _equal(gold, part) else WRONG
            os.write(replies, verdict.encode())
        os._exit(0)
    finally:
        os._exit(1)


def _equal(gold, part):
    # What cannot be read is wrong; MemoryError and RecursionError are among what may be raised.
    with suppress(Exception):
        gold = _tidy(gold)
        part = _tidy(part)
        # 11_2, which is 3, would be read as 11.
        bases = _number_bases(part)
        if bases and bases != _number_bases(gold):
            return False
        # 18% may mean 18 or 0.18.
        if _same(gold.removesuffix("%"), part.removesuffix("%")):
            return True
        if gold.endswith("%") or part.endswith("%"):
            return _same(_as_fraction(gold), _as_fraction(part))
    return False


def _number_bases(text):
    """The bases of the numbers that state one, as in 11_2 or 11_{2}."""
    return re.findall(r"(?<=\d)_\{?(\d+)", text)


def _as_fraction(text):
    """A percentage, if it is one, as a hundredth: of "x = 18%", "(18)/100"."""
    if not text.endswith("%"):
        return text
    number = text[:-1].split("=")[-1]
    return f"({number})/100"


def _same(gold, part):
    """Whether two answers without a percent sign are equal."""
    gold_values = _read(gold)
    # Of 17 = 18, math-verify would see the 18 only: numbers on either side must be right.
    if "=" in part:
        sides = [_read(side) for side in part.split("=")]
        numbers = [side for side in sides if _is_number(side) and _is_number(gold_values)]
        if not all(_equal_values(gold_values, number) for number in numbers):
            return False
    return _equal_values(gold_values, _read(part))


def _read(text):
    """What math-verify reads in a LaTeX formula: a list whose first entry is the value."""
    from math_verify import LatexExtractionConfig, parse

    # LaTeX only: math-verify's other reader picks a number out of any text, as 18 out of "18
    # million", "18!" and "17, no, 18". Its time limit is off: the worker's timer replaces it.
    only_latex = [LatexExtractionConfig(boxed_match_priority=-1)]
    return parse(f"${text}$", only_latex, parsing_timeout=None)


def _equal_values(values, others):
    from math_verify import verify

    if not verify(values, others, timeout_seconds=None):
        return False
    if not (_is_number(values) and _is_number(others)):
        return True
    # math-verify compares six decimals, in which 1e-7 and 2e-7 are the same.
    a = values[0]
    b = others[0]
    return bool(a == b or abs(a - b) <= 1e-5 * abs(a))


def _is_number(values):
    return bool(values) and getattr(values[0], "is_number", False)


# Words that change the value of the number before them, so that they are not part of a unit
VALUE_WORDS = (
    "and|or|plus|minus|times|point|pi|squared|cubed|doubled|tripled|halved|dozen|hundred|"
    "half|halves|third|quarter|"
    "(?:four|fif|six|seven|eigh|nin|ten|twelf|hundred|thousand|million)th|am|pm"
)
# Commands that change how what follows them looks
FONTS = (
    "(?:math)?(?:bf|rm|it|sf|tt)|em|bfseries|itshape|tiny|small|normalsize|large|Large|LARGE|huge|"
    "Huge|(?:text|display)style"
)


def _tidy(text):
    """Rewrite what math-verify 0.9 misreads. A comment "x: y" means that it would read x as y."""
    # €18, US$18 and \[18\]: nothing
    money = r"\b(?:US|CA|C|AU|A)\\?\$|\\?[$€£¥₹₩¢]|\\(?:pounds|euro|cent)s?(?![A-Za-z])"
    text = re.sub(rf"{money}|(?<!\\)\\[()\[\]]", "", text)
    # 18°: nothing
    text = re.sub(r"°|\^ ?\{?\\circ\}?", " ", text)
    # \textcolor{red}{18}: nothing
    text = re.sub(r"\\(?:text)?color\s*\{[^{}]*\}", "", text)
    # 18\text{ thousand}: 18
    braced = r"(?:text|math|mbox|bold)\w*|bm|emph|underline"
    text = re.sub(rf"\\(?:{braced})\s*\{{([^{{}}]*)\}}", r" \1 ", text)
    # {\bf 18} and \bf 18: nothing
    font = rf"\\(?:{FONTS})(?![A-Za-z])"
    text = re.sub(rf"\{{ *{font}([^{{}}]*)\}}", r" \1 ", text)
    text = re.sub(font, " ", text)
    # **18** and 18,: nothing
    text = re.sub(r"(?<!\\)\\[,;:! ]|[~\s]+", " ", text)
    text = text.strip("* ").rstrip(".,;:")
    # USD 18: U·S·D·18
    text = re.sub(r"^(?:USD|EUR|GBP|CHF|CAD|AUD|INR|Rs\.?) *(?=[\d.])", "", text)
    # 10\pi \approx 31.4: also 31.4
    text = re.sub(r"([\d)}]|\\pi) *(?:\\approx|≈).*", r"\1", text)
    # \approx 18: nothing
    text = re.sub(r"\\approx|≈", "=", text).lstrip("= ")
    # –18: nothing
    text = re.sub(r"(^|= *)[–—]", r"\1-", text)
    text = re.sub(r"\\?%| (?:percent|pct)$", "%", text)

    # 4 1/2, also as 4½: 5/2
    text = re.sub(r"[¼-¾⅐-⅞]", _fraction_in_ascii, text)
    text = re.sub(r"(?<![\d.,/])(\d+) +(\d+)/(\d+)(?![\d.])", r"(\1+\2/\3)", text).strip()
    # 0.1\overline{6}: 0.16
    text = re.sub(r"(\d+)\.(\d*)\\overline\{(\d+)\}", _fraction_of_repeating_decimal, text)
    # 1\,800: 1 + 800
    text = re.sub(r"(?<=\d)(?:\{,\}|[, ])+(?=\d{3}(?!\d))", "", text)
    # 10 8: 10 + 8; with a comma, a list
    text = re.sub(r"(?<=\d) +(?=\d)", ",", text)
    # 1e6: Euler's number
    text = re.sub(r"(?<=\d)[eE]([+-]?\d+)(?= |$)", r"\\cdot 10^{\1}", text)
    for word, power in (("thousand", 3), ("million", 6), ("billion", 9), ("trillion", 12)):
        text = re.sub(rf"(?i)(?<=[\d)}}]) *{word}s?\b", rf"\\cdot 10^{{{power}}}", text)

    # 18 dollars: 18·d·o·l·l·a·r·s. A unit after a number goes, unless it has words that change the
    # value.
    unit = r"(?:m|[A-Za-z]{2,})(?![A-Za-z])[A-Za-z./ -]*(?:\^ ?\{?\d\}?|[²³])?"
    text = re.sub(r"^([^A-Za-z\\]*\d) +(?:[gshLCFKVAWNJΩ]|\\Omega)$", r"\1", text)
    return re.sub(rf"(?<=[\d}}%)]) +(?!.*\b(?i:{VALUE_WORDS})s?\b){unit}$", "", text)


def _fraction_in_ascii(match):
    """Of "½", " 1/2"."""
    return " " + unicodedata.normalize("NFKC", match[0]).replace("⁄", "/")


def _fraction_of_repeating_decimal(match):
    r"""Of "0.1\overline{6}", "\frac{15}{90}".

    With a the digits before the point, b those after it, and c those that repeat, the value is
    (abc − ab) / 9…90…0, with a 9 for each digit of c and a 0 for each of b.
    """
    a, b, c = match.groups()
    numerator = int(a + b + c) - int(a + b)
    denominator = 10 ** len(b) * (10 ** len(c) - 1)
    return rf"\frac{{{numerator}}}{{{denominator}}}"


if __name__ == "__main__":
    import logging

    logging.disable(logging.CRITICAL)  # math-verify warns that its time limits are off
    with suppress(BrokenPipeError):  # the parent is gone
        _serve(float(sys.argv[1]))
