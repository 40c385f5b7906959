"""Grading against the real math-verify: all GSM8K test solutions, hostile answers, crashes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from common.tasks.grading import LONGEST_PART, MEMORY_LIMIT, MathGrader, graded_part
from tests.conftest import GSM8K, REPOSITORY

# Half the default, so that "less than two seconds" holds even where four processes share a core.
SECONDS_PER_ANSWER = 0.5

TOWER = r"\boxed{9^{9^9}}"  # the classical endless answer


@pytest.fixture(scope="module")
def grader():
    grader = MathGrader(seconds_per_answer=SECONDS_PER_ANSWER)
    grader.grade(["18"], ["#### 18"])  # so that no test's clock sees the start
    yield grader
    grader.close()


@pytest.fixture(scope="module")
def solutions():
    if not GSM8K.is_dir():
        pytest.skip(
            f"the 1,319 GSM8K test solutions are not at {GSM8K} (GSM8K_DIR may name another "
            "directory): grading is NOT checked on real data"
        )
    texts = [json.loads(line)["answer"] for line in (GSM8K / "test.jsonl").open()]
    assert len(texts) == 1319
    return texts


def final_number(solution):
    return solution.rpartition("####")[2].strip()


# ---- What is graded ----


@pytest.mark.parametrize(
    ("response", "part"),
    [
        (r"so \boxed{18}.", "18"),
        (r"\boxed {18}", "18"),
        (r"first \boxed{17}, no: \boxed{18}", "18"),
        (r"\boxed{\boxed{18}}", "18"),
        (r"\boxed{\frac{36}{2}}", r"\frac{36}{2}"),
        (r"\boxed{\{1, 2\}} and }", r"\{1, 2\}"),
        (r"\boxed{\{1}", r"\{1"),  # an escaped brace opens nothing
        (r"\boxed{}", ""),
        ("\\boxed{1\n8}", "1\n8"),
        ("#### 17\n\\boxed{18}", "18"),
        ("\\boxed{18}\n#### 17", "18"),  # the box counts wherever it stands
        ("#### 17\nno\n#### 18\nbecause", "18"),
        ("####18", "18"),
        ("####", ""),
        ("#### \n18", ""),
        ("18", None),
        ("", None),
        (r"\boxed 18", None),
        (r"\fbox{18}", None),
        (r"\boxed{18", None),
        (
            r"\boxed{17} no, \boxed{18",
            None,
        ),  # cut at the token limit: 18 may be 180, and 17 is withdrawn
        ("#### 17\n\\boxed{18", None),
        (r"\boxed{\boxed{18}", "18"),  # the last box is closed
    ],
)
def test_graded_part(response, part):
    assert graded_part(response) == part


# ---- Real data ----


def test_every_gold_solution_is_right(grader, solutions):
    golds = [final_number(text) for text in solutions]
    assert all(grader.grade(golds, solutions))
    boxed = [
        f"{solution}\n\\boxed{{{gold}}}" for solution, gold in zip(solutions, golds, strict=True)
    ]
    assert all(grader.grade(golds, boxed))
    assert all(grader.grade(golds, [rf"\boxed{{{gold.replace(',', '')}.00}}" for gold in golds]))


@pytest.mark.parametrize(
    "change",
    [
        lambda digits: str(int(digits) + 1),
        lambda digits: str(-int(digits)),
        lambda digits: digits + "0",
        lambda digits: digits[:-1],
        lambda digits: digits[1:],
        lambda digits: f"{digits[:-1]}.{digits[-1]}",
    ],
    ids=["plus one", "sign", "times ten", "last digit dropped", "first digit dropped", "over ten"],
)
def test_every_changed_solution_is_wrong(grader, solutions, change):
    golds, responses = [], []
    for text in solutions:
        gold = final_number(text)
        changed = change(gold.replace(",", ""))
        if changed in ("", "-") or float(changed) != float(gold.replace(",", "")):  # 0 stays 0
            golds.append(gold)
            responses.append(text.rpartition("####")[0] + "#### " + changed)
    assert len(golds) > 1300
    assert not any(grader.grade(golds, responses))


def test_a_group_of_digits_is_not_the_number(grader, solutions):
    golds = [gold for gold in map(final_number, solutions) if "," in gold]
    pairs = [(gold, group) for gold in golds for group in gold.split(",")]
    assert len(pairs) > 25
    assert not any(
        grader.grade([gold for gold, _ in pairs], [f"#### {group}" for _, group in pairs])
    )


# ---- Ways to write an answer ----


def forms(table):
    return [form.strip() for form in table.strip().replace("\n", "|").split("|")]


RIGHT = {
    "18": forms(r"""
        18 | +18 | 018 | 18.0 | 18.00 | 18. | 18, | 18; | 18...
        **18** | (18) | {18} | \left(18\right)
        $18 | $18$ | \$18 | \$18.00 | €18 | 18€ | £18 | \text{\$}18
        18 dollars | 18 USD | \(18\) | \[18\]
        x=18 | x = 18 | x = 9 + 9 = 18 | 9+9=18 | \text{18}
        \mathbf{18} | 18% | 18\% | 18° | 18^\circ
        \frac{36}{2} | \dfrac{36}{2} | 36/2 | 2\cdot9 | 2 \cdot 9 | 2 \times 9 | 2*9 | 2×9 | 3^2+9
        18cm | 18\text{cm} | 18 \text{ cm} | 18\,\text{cm}
        18\ \text{cm} | 18\mathrm{cm} | 18 in | 18 sq. ft
        18 cm^2 | 18 cm² | 18\text{ m}^2 | 18 ft^{2} | 18 km/h
        18 miles per hour | 18\text{ miles per hour}
        18 apples | 18\text{ apples} | \text{18 apples}
        x = 18\text{ apples} | 18 years old | 18 eggs/day
        18 L | 18 g | 18 h | 18 °C | 18°C | 18\,^\circ\text{C}
        18^{\circ} | 18\text{ m} | 18 months
        \boldsymbol{18} | \bm{18} | \approx 18 | ≈ 18
        x \approx 18 | 1.8e1 | 18e0 | 180e-1 | 18 percent
        18\text{ percent} | 18 pct | 17+1=18 | 018
        \bf 18 | {\bf 18} | \bf{18} | \mathbf 18 | \rm 18 | \large 18 | \displaystyle 18
        \emph{18} | \underline{18} | \color{red}18 | \color{red}{18} | \textcolor{red}{18}
        18 V | 18\text{ V} | 18\,\text{V} | 18\ \mathrm{V} | 18\,{\rm V} | 18 {\rm cm}
        18 A | 18 W | 18 N | 18 J | 18 Ω | 18\ \Omega | x = 18\text{ cm}
        USD 18 | USD18 | USD 18.00 | EUR 18 | CHF 18 | GBP 18 | CAD 18 | Rs. 18 | Rs 18 | Rs.18
        \text{USD }18 | US$18 | US\$18 | US$ 18 | C$18 | A$18 | $18 USD | 18 EUR
        \pounds 18 | \pounds18 | \euro 18 | 18\euro | 18¢ | 18\text{¢} | ₩18
    """),
    "1000000": forms(r"""
        1e6 | 1E6 | 1 million | 1\text{ million} | 1000 thousand | 0.001 billion | 10^6 | 1,000,000
    """),
    "12.5": forms(r"12.5\% | 12.5% | 25/2 | 12 1/2 | 12½ | 12\frac12 | 1.25e1"),
    "12.5%": forms(r"12.5 | 12.5\% | 0.125 | \frac{1}{8} | 12 1/2%"),
    "0.5": forms(r"½ | 1/2 | \frac12 | .5 | 50% | 50\%"),
    "1.5": forms(r"1 1/2 | 1½ | 3/2 | 150%"),
    "1/3": forms(r"0.\overline{3} | \frac13 | 0.\overline{33}"),
    "\\frac{7}{6}": forms(r"1.1\overline{6} | 1 1/6"),
    "11_2": forms(r"11_2 | 11_{2}"),
    r"\frac{1}{2^{98}}": forms(r"\frac{1}{2^{98}} | 2^{-98}"),
    "1,800": forms(r"""
        1800 | 1,800 | 1{,}800 | 1\,800 | 1\!800 | 1,\!800
        1{,}\!800 | 1~800 | 1 800 | 1, 800 | 18 * 100
        $1,800 | \$1,800.00 | 1800.0 | 1,800 dollars | 1{,}800\text{ dollars}
    """),
    "1800": ["1,800", "1\u202f800"],
    "1,234,567": forms(r"1234567 | 1,234,567 | 1\,234\,567 | 1 234 567"),
    "4.5": forms(
        r"\dfrac{9}{2} | \frac92 | 9/2 | 4.50 | 4\frac{1}{2} | \frac{9}{2} \text{ cups} | 4.5 cups"
    ),
    "-5": forms(r"-5 | −5 | –5 | x = –5 | - 5 | -5.0 | x = -5 | -$5 | -\frac{10}{2}"),
    "0.18": [r"18\%"],  # math-verify takes a percentage for the number and for the hundredth alike
}

WRONG = {
    "18": forms(r"""
        17 | 19 | 180 | 1.8 | 0.18 | 18.4 | -18 | −18 | –18 | 1800 | 81 | 1.8e2 | 18:00 | eighteen
        18x | 18k | 18i | 18! | 18^2 | 18\pi | \pm18 | 18+
        18/17 | 18\neq18 | x>18 | \geq18 | 18 = 17
        18,19 | (18,19) | \{17,18\} | 18 or 17 | 17\text{ or }18 | \text{17 or 18} | x = 18, y = 17
        10 8 | 17 1 | 10\,8 | 3 hours 18 | 18 hours and 30 minutes
        18\text{ eggs} + 3\text{ apples}
        18 million | 18\text{ thousand} | 18 hundred | 18 dozens
        18 and a half | 18\text{ and a half}
        18 tenths | 18 hundredths | 18 doubled | 18 halves | 17=18
        18=17=18 | 18_3 | 18 times 2 | 0.18% | 18 1/2
        \bf 17 | {\bf 17} | \textcolor{18}{17} | 17 V | x V | V | 18 x | 18 k | 18 M | 18 V + 2
        18 V or 17 V | x = 17\text{ V} | \Omega | 18 \pi | 18 + \Omega
        USD 17 | USD | USD 18 million | USD 18 or 17 | -USD 18 | USD -18 | US$17 | \pounds 17
        18 plus tax | 18 minus 5 | 18 pi | 18 squared | 17, no, 18 | the answer is 17, not 18
    """),
    "1,800": forms("18 | 800 | 1 | 1.800 | 1,80 | 1,8000 | 18,00 | 1 80 | 1,801 | 180,0"),
    "2.5": ["4 1/2"],  # which math-verify by itself reads as (4 + 1)/2
    "5": forms(r"-5 | 5 tenths | 5 thirds | \frac{5}{10} | 500% x"),
    "11": forms(r"11_2 | 11_{2}"),
    "12.5%": forms(r"0.125% | 1250 | 1.25"),
    r"\frac{1}{2^{98}}": forms(r"\frac{1}{2^{99}} | 0"),
    "0.0000001": forms("0.0000002 | 0 | 0.00000011"),
}


@pytest.mark.parametrize("place", [r"\boxed{%s}", "#### %s", "I say\n#### %s  \nbye"])
@pytest.mark.parametrize(
    ("table", "verdict"), [(RIGHT, True), (WRONG, False)], ids=["right", "wrong"]
)
def test_ways_to_write_an_answer(grader, table, verdict, place):
    pairs = [(gold, form) for gold, written in table.items() for form in written]
    verdicts = grader.grade(
        [gold for gold, _ in pairs], [place.replace("%s", form) for _, form in pairs]
    )
    assert [pair for pair, right in zip(pairs, verdicts, strict=True) if right != verdict] == []


def test_which_box_counts(grader):
    responses = [r"\boxed{\boxed{18}}", r"\boxed{17} or \boxed{18}", r"\boxed{18} or \boxed{17}"]
    assert grader.grade(["18"] * 3, responses) == [True, True, False]


# ---- Hostile answers ----

DEEP = "#### " + "(" * 240 + "18" + ")" * 240
ENDLESS = [TOWER, r"\boxed{99999999!}", r"\boxed{10^{10^{10}}}", "#### 9!!!!", DEEP]
HARMLESS = {
    "100,000 digits": "#### " + "9" * 100_000,
    "digits within the limit": "#### " + "9" * LONGEST_PART,
    "nested boxes": r"\boxed{" * 5_000 + "17" + "}" * 5_000,
    "many open boxes": r"\boxed{" * 50_000,
    "empty box": r"\boxed{}",
    "blank box": r"\boxed{   }",
    "closed too often": r"\boxed{}}{{",
    "closed too rarely": r"\boxed{{18}",
    "closed before opened": "#### }{18",
    "backslashes": "#### " + "\\" * 99,
    "last backslash": "#### 18\\",
    "NUL": "#### 18\0",
    "lone surrogate": "#### \ud800",
    "surrogate after a number": "#### 18\udfff",
    "emoji": "#### 💥18∀",
    "right-to-left": "#### \u202e81",
    "invisible": "#### 1\u200b8",
    "None": "#### None",
    "null": r"\boxed{null}",
    "nan": "#### nan",
    "infinity": r"\boxed{\infty}",
    "1/0": r"\boxed{\frac{1}{0}}",
    "0/0": r"\boxed{0/0}",
    "ragged matrix": r"\boxed{\begin{matrix}1&2\\3\end{matrix}}",
    "JSON": '#### "], ["18", "18',
    "Python": "#### __import__('os').abort()",
}


@pytest.mark.parametrize("response", ENDLESS, ids=lambda response: response[:20])
def test_an_endless_answer_costs_its_time_and_nothing_else(grader, response):
    timeouts, worker, started = grader.timeouts, grader._worker.pid, time.monotonic()
    assert grader.grade(["18", "18", "18"], ["#### 18", response, r"\boxed{18}"]) == [
        True,
        False,
        True,
    ]
    assert time.monotonic() - started < 6  # 1 s on an idle core; the tests share theirs
    assert grader.timeouts == timeouts + 1
    assert grader._worker.pid == worker  # only a fork of it died


@pytest.mark.parametrize("response", HARMLESS.values(), ids=HARMLESS)
def test_a_strange_answer_is_wrong(grader, response):
    timeouts, started = grader.timeouts, time.monotonic()
    assert grader.grade(["18", "18"], [response, "#### 18"]) == [False, True]
    assert time.monotonic() - started < 6
    assert grader.timeouts == timeouts


def test_a_long_answer_is_wrong(grader):
    written = ["#### " + "0" * zeros + "18" for zeros in (LONGEST_PART - 2, LONGEST_PART - 1)]
    assert grader.grade(["18", "18"], written) == [True, False]


def test_equal_answers_are_graded_once(grader):
    timeouts, started = grader.timeouts, time.monotonic()
    assert not any(grader.grade(["18"] * 16, [TOWER] * 16))
    assert time.monotonic() - started < 8
    assert grader.timeouts == timeouts + 16


@pytest.mark.parametrize("seconds_per_answer", [SECONDS_PER_ANSWER, 10])
def test_a_batch_is_bounded(seconds_per_answer):
    grader = MathGrader(seconds_per_answer, seconds_per_batch=1.2)
    endless = [rf"\boxed{{9^{{9^{{{n}}}}}}}" for n in range(9, 29)]
    grader.grade(["18"], ["#### 18"])
    started = time.monotonic()
    assert not any(grader.grade(["18"] * 20, endless))
    assert 1 < time.monotonic() - started < 8
    assert grader.timeouts == 20
    assert grader.grade(["18", "17"], ["#### 18", "#### 18"]) == [True, False]
    grader.close()


def test_ordinary_answers_are_fast(grader):
    golds = [str(n) for n in range(256)]
    started = time.monotonic()
    assert all(grader.grade(golds, [f"So it is\n#### ${gold}.00" for gold in golds]))
    # 0.3 s on an idle core; a process for each answer would take two minutes
    assert time.monotonic() - started < 10


# ---- Processes ----


def processes(group):
    """Living processes of a process group as {pid: parent's pid}."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, its_group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it ended meanwhile
            continue
        if int(its_group) == group and state != "Z":
            found[int(path.parent.name)] = int(parent)
    return found


def wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
    return value


def child_of(worker):
    return next((pid for pid, parent in processes(worker).items() if parent == worker), None)


def idle_worker(grader):
    """The pid of a worker that has started, and no longer has a child from an earlier batch."""
    assert grader.grade(["18"], ["#### 18"]) == [True]
    wait_until(lambda: child_of(grader._worker.pid) is None)
    return grader._worker.pid


@contextmanager
def meanwhile(function):
    """Run a function in a thread beside the block, and fail with it."""
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(function)
        yield
        running.result()


def test_nothing_to_grade_starts_nothing():
    grader = MathGrader()
    assert grader.grade([], []) == []
    assert grader.grade(["18"] * 3, ["18", r"\boxed{18", r"\boxed{}"]) == [False] * 3
    assert grader._worker is None
    with pytest.raises(ValueError):
        grader.grade(["18"], [])
    grader.close()


def test_close_leaves_nothing_and_grading_goes_on():
    grader = MathGrader()
    for _ in range(2):
        worker = idle_worker(grader)
        assert processes(worker)
        grader.close()
        grader.close()
        assert not processes(worker)


def test_worker_killed_between_batches(grader):
    os.kill(idle_worker(grader), signal.SIGKILL)
    assert grader.grade(["18", "18"], ["#### 18", "#### 17"]) == [True, False]


def test_worker_killed_during_a_batch(grader):
    worker, timeouts = idle_worker(grader), grader.timeouts

    def kill():
        wait_until(lambda: child_of(worker))
        os.kill(worker, signal.SIGKILL)

    with meanwhile(kill):
        assert grader.grade(["18"] * 3, ["#### 18", TOWER, r"\boxed{18}"]) == [True, False, True]
    assert grader._worker.pid != worker
    assert grader.timeouts == timeouts + 1  # the tower, in the new worker


def test_an_answer_that_kills_twice_is_wrong(grader):
    idle_worker(grader)
    timeouts, killed = grader.timeouts, []

    def a_new_child():
        worker = grader._worker  # None while it is being replaced
        child = worker and child_of(worker.pid)
        return child not in killed and child

    def kill_two_children():
        for _ in range(2):
            killed.append(wait_until(a_new_child))
            os.kill(killed[-1], signal.SIGKILL)

    with meanwhile(kill_two_children):
        assert grader.grade(["18", "18"], [TOWER, "#### 18"]) == [False, True]
    assert grader.timeouts == timeouts


def test_a_worker_that_stops_answering_does_not_hang():
    grader = MathGrader(seconds_per_batch=1.0)
    os.kill(idle_worker(grader), signal.SIGSTOP)
    long_batch = [f"#### {n:0400}" for n in range(400)]  # more than a pipe holds
    started = time.monotonic()
    assert not any(grader.grade(["18"] * 400, long_batch))
    assert time.monotonic() - started < 8
    assert grader.timeouts == 400
    assert grader.grade(["18"], ["#### 18"]) == [True]
    grader.close()


@pytest.fixture
def ctrl_c_raises():
    """As in a terminal, even where the tests run as a background job, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_raises")
def test_ctrl_c(grader):
    worker = idle_worker(grader)
    os.kill(worker, signal.SIGINT)
    assert idle_worker(grader) == worker  # the worker ignores it

    def interrupt():
        wait_until(lambda: child_of(worker))
        os.kill(os.getpid(), signal.SIGINT)

    with meanwhile(interrupt), pytest.raises(KeyboardInterrupt):
        grader.grade(["18"] * 3, [TOWER, "#### 18", "#### 18"])
    # No verdict of the interrupted batch is taken for one of these.
    assert grader.grade(["18"] * 3, ["#### 17", "#### 18", "#### 17"]) == [False, True, False]


def test_other_threads_may_grade(grader):
    def right():
        for n in range(20):
            assert grader.grade([str(n)] * 2, [f"#### {n}", f"#### {n + 1}"]) == [True, False]

    with meanwhile(right), meanwhile(right), meanwhile(right):
        right()


def test_a_child_has_a_memory_limit(grader):
    worker, limits = idle_worker(grader), []

    def look():
        child = wait_until(lambda: child_of(worker))
        time.sleep(0.1)  # for the child to set its limit
        limits.append(Path(f"/proc/{child}/limits").read_text())

    with meanwhile(look):
        grader.grade(["18"], [TOWER])
    line = next(line for line in limits[0].splitlines() if line.startswith("Max address space"))
    assert line.split()[3] == str(MEMORY_LIMIT)


def test_the_worker_imports_math_verify_alone(grader, tmp_path):
    maps = Path(f"/proc/{idle_worker(grader)}/maps").read_text()
    assert "python" in maps and "torch" not in maps

    neighbours = tmp_path / "common" / "tasks"  # a module of ours that has the name of a library
    neighbours.mkdir(parents=True)
    shutil.copy(REPOSITORY / "common" / "tasks" / "grading.py", neighbours)
    (neighbours / "sympy.py").write_text("raise SystemExit('imported by mistake')")
    script = (
        "from common.tasks.grading import MathGrader\n"
        "print(MathGrader().grade(['18'], ['#### 18']))"
    )
    command = [sys.executable, "-c", script]
    assert subprocess.check_output(command, cwd=tmp_path, text=True, timeout=60) == "[True]\n"


@pytest.mark.parametrize("end", ["kill -9", "kill -9 during a batch", "exit"])
def test_no_process_outlives_the_parent(end):
    hard = "[f'#### 9^(9^{n})' for n in range(9, 18)]"
    last_act = {
        "kill -9": "time.sleep(60)",
        "kill -9 during a batch": f"grader.grade(['18'] * 9, {hard})",
        "exit": "",
    }[end]
    script = (
        "import time\nfrom common.tasks.grading import MathGrader\ngrader = MathGrader()\n"
        "grader.grade(['18'], ['#### 18'])\nprint(grader._worker.pid, flush=True)\n" + last_act
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    worker = int(parent.stdout.readline())
    if end == "kill -9 during a batch":
        wait_until(lambda: child_of(worker))
    if end.startswith("kill"):
        assert processes(worker)
        parent.kill()
    parent.communicate()
    wait_until(lambda: not processes(worker), seconds=20)


def test_missing_library_is_said_in_words(tmp_path, monkeypatch):
    bare = tmp_path / "python"
    # Without site-packages, hence without math-verify.
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    grader = MathGrader()
    with pytest.raises(RuntimeError, match="the grading worker did not start"):
        grader.grade(["18"], ["#### 18"])
    monkeypatch.undo()
    assert grader.grade(["18"], ["#### 18"]) == [True]
    grader.close()
