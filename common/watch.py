"""What stops a run that goes wrong, or says that it does not learn."""

import math
import sys

from tqdm import tqdm

from common.errors import RunStopped

MOST_SKIPPED_UPDATES = 5  # steps in a row, after which the run stops
STEPS_WITHOUT_SIGNAL = 5  # in a row, after which it says so
STEPS_WITHOUT_END = 3  # in a row, in which every response was cut, after which it says so

NO_SIGNAL = (
    "all rewards of each group were equal (see completions.jsonl): if all are wrong, raise "
    "--group-size or --max-response-tokens, or reward parts of an answer"
)
COLLAPSED = (
    "all rewards of each group were equal, and the mean is {now:.3g} where it was {before:.3g} "
    "after step {step}: the policy has collapsed; lower --learning-rate, or raise "
    "--prompts-per-step"
)


def never_learned(records):
    """Whether no step of a run had a gradient, since all rewards of each group were equal."""
    steps = [record for record in records if record["step"] > 0]
    return bool(steps) and all(
        record.get("reward/zero_std_groups") == 1 and record.get("grad_norm") == 0
        for record in steps
    )


class Watch:
    """Looks at the metrics of each step."""

    def __init__(self, run_dir):
        self.run_dir = run_dir
        self.skipped_in_a_row = 0
        self.without_signal = 0
        self.without_end = 0
        self.highest = (-math.inf, 0)  # mean reward of a step, and which step

    def look(self, step, metrics):
        """Warn of steps in a row without any signal, or without a response that ends.

        Raises `RunStopped` after skipped updates.
        """
        no_end = metrics.get("response_length/truncated") == 1
        self.without_end = self.without_end + 1 if no_end else 0
        if self.without_end == STEPS_WITHOUT_END:
            tqdm.write(
                f"For {STEPS_WITHOUT_END} steps, every response was cut at the limit (see "
                "completions.jsonl): raise --max-response-tokens, or give a chat model prompts "
                "that are lists of chat messages.",
                file=sys.stderr,
            )
        no_signal = metrics.get("reward/zero_std_groups") == 1
        self.without_signal = self.without_signal + 1 if no_signal else 0
        if self.without_signal == STEPS_WITHOUT_SIGNAL:
            why = self._why_no_signal(metrics["reward/mean"])
            tqdm.write(f"For {STEPS_WITHOUT_SIGNAL} steps, {why}.", file=sys.stderr)
        self.highest = max(self.highest, (metrics.get("reward/mean", -math.inf), step))
        skipped = metrics.get("update_skipped", 0.0) > 0
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if self.skipped_in_a_row == MOST_SKIPPED_UPDATES:
            raise RunStopped(
                f"{MOST_SKIPPED_UPDATES} updates in a row, up to step {step}, had no finite loss "
                "or gradient: scale rewards that are far from 1, or lower --learning-rate (see "
                f"{self.run_dir})."
            )

    def _why_no_signal(self, reward):
        before, step = self.highest
        if reward < before / 2:
            return COLLAPSED.format(now=reward, before=before, step=step)
        return NO_SIGNAL
