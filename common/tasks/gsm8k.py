"""GSM8K: grade-school word problems, from a file, the hub or the sample in this repository."""

import re
import sys
from pathlib import Path

from common.errors import BadInput
from common.tasks import Task
from common.tasks.grading import LONGEST_PART, MathGrader
from common.tasks.rows import read_rows

GSM8K_SAMPLE = Path(__file__).parent.parent / "data" / "gsm8k_sample.jsonl"
# In the user's message: some chat templates refuse system messages, and small models ignore them.
INSTRUCTION = (
    "Solve the problem. Work step by step, write your working out, "
    "and put the final number, alone, in \\boxed{}.\n\n"
)


class GSM8K(Task):
    """Grade-school word problems, answered in free form and graded by math-verify.

    The dataset is that of Cobbe et al., arXiv 2110.14168. `data` has columns `question` and
    `answer`, whose last line is `#### <number>`; see `read_rows`. Held out are `eval_data`, else
    the dataset's test split, else the last `eval_size` rows of `data` (of the sample: at most 64).
    The reward is 1 for a right answer and 0 otherwise. `format` (did the response box its answer?)
    is logged only.
    """

    reads_data = True

    def __init__(self, data="", eval_data="", eval_size=256):
        super().__init__(data, eval_data, eval_size)
        self.grader = MathGrader()
        train, test = _read(data or str(GSM8K_SAMPLE), "--data")
        source = f"the test split of --data {data}"
        if eval_data:
            rows, test_split = _read(eval_data, "--eval-data")
            test = test_split or rows
            source = f"--eval-data {eval_data}"
        elif not data and eval_size > 64:
            print(
                f"Of the sample's {len(train)} rows, 64 are held out, not {eval_size}.",
                file=sys.stderr,
            )
            eval_size = 64
        if not test:
            first = max(1, len(train) - eval_size)
            test = train[first:]
            train = train[:first]
            source = f"--data {data} that training can spare"
        if len(test) < eval_size:
            raise BadInput(
                f"--eval-size {eval_size} is more than the {len(test)} rows of {source}: lower it."
            )
        self.rows = {"train": train, "eval": test[:eval_size]}

    def problems(self, split):
        return [
            {
                "prompt": [{"role": "user", "content": INSTRUCTION + row["question"]}],
                "answer": _final_answer(row),
            }
            for row in self.rows[split]
        ]

    def rewards(self, problems, responses):
        before = self.grader.timeouts
        correct = self.grader.grade([problem["answer"] for problem in problems], responses)
        # Of the whole batch; these answers count as wrong.
        timeouts = self.grader.timeouts - before
        return [
            {
                "reward": float(right),
                "accuracy": float(right),
                "format": float("\\boxed{" in response),
                "grade/timeouts": timeouts,
            }
            for right, response in zip(correct, responses, strict=True)
        ]


def _read(source, option):
    splits = read_rows(source, option, ("question", "answer"))
    for rows in splits:
        for number, row in enumerate(rows, start=1):
            gold = _final_answer(row)
            # No response would match "The answer is 4".
            prose = re.match(r"[A-Za-z]+(:| [A-Za-z]+ ).*\d", gold)
            if prose or not 0 < len(gold) <= LONGEST_PART:
                raise BadInput(
                    f"{option} {source}, row {number}: {gold[:100]!r} is no final answer: "
                    "give a number or formula, after #### if there is more."
                )
    return splits


def _final_answer(row):
    """What follows the last ####; all of the answer where there is none."""
    return row["answer"].rpartition("####")[2].strip()
