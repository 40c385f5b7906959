"""Chained additions, the default task: the bundled model was warm-started on it."""

import random
import re
import zlib

from common.tasks import Task


class Addition(Task):
    """Chained additions: "Q: 47+8+91" → " 47+8=55 55+91=146 answer 146.".

    The reward is 1 if the response ends with the right answer, else 0.
    """

    def problems(self, split):
        wanted = {"train": 8192, "eval": self.eval_size}[split]
        rng = random.Random(f"addition {split}")
        found = {}
        while len(found) < wanted:
            terms, prompt = addition_problem(rng)
            if is_held_out(prompt) == (split == "eval"):
                found[prompt] = {"prompt": prompt, "answer": sum(terms)}
        return list(found.values())

    def reward(self, problem, response):
        # A response that goes on rambling has not answered yet.
        last_words = re.search(r"answer 0*(\d+)\.\Z", response)
        return float(last_words is not None and last_words.group(1) == str(problem["answer"]))


def addition_problem(rng):
    """A random problem: its terms, and the prompt that poses it."""
    terms = [rng.randint(1, 99) for _ in range(rng.randint(3, 4))]
    sum_text = "+".join(map(str, terms))
    return terms, f"Q: {sum_text}\nA:"


def is_held_out(prompt):
    """Whether a problem is held out, as one in eight is: warm start and training never see it."""
    return zlib.crc32(prompt.encode()) % 8 == 0
