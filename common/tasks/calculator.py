"""Chained additions with a tool: a turn that ends with "44+28=" is answered by a calculator."""

import re

from common.tasks.addition import Addition


class Calculator(Addition):
    """The turn " 44+28=" is told "72", the turn " 72+59=" "131", and " answer 131." is the last.

    A response may still add by itself. The reward is that of `Addition`, for the last turn.
    """

    max_turns = 4  # up to three calls for four terms, and the answer

    def reply(self, problem, turns):
        call = re.search(r"(\d{1,4})\+(\d{1,4})=\Z", turns[-1])
        return str(int(call[1]) + int(call[2])) if call else None

    def reward(self, problem, turns):
        return super().reward(problem, turns[-1])
