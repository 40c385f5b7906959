"""Tasks without meaning, for timing: responses are rewarded in turns, so that each group has
something to train on.
"""

from common.tasks import Task


class Turns(Task):
    """Short prompts; every other response earns 1."""

    terms = 1
    graded = 0

    def problems(self, split):
        prompts = [f"Q: {'1+' * self.terms}{number}\nA:" for number in range(256)]
        return [{"prompt": prompt} for prompt in (prompts if split == "train" else prompts[:1])]

    def reward(self, problem, response):
        self.graded += 1
        return float(self.graded % 2)


class LongTurns(Turns):
    """The same with longer prompts."""

    terms = 40
