"""What a schedule costs: replays sampler and trainer from how long sampling, training and a sync
take.

    python benchmarks/speed/schedule_replay.py --sample 2.0 --train 1.0 --sync 0.1
    python benchmarks/speed/schedule_replay.py --sample 60 --train 45 --sync 3 \
        --slow-share 0.2 --slow-factor 4
    python benchmarks/speed/schedule_replay.py --run runs/NAME      the times of a run's own steps

Assumptions, all of them:
- One sampler and one trainer, which do not slow each other down. The sampler works on one batch at
  a time, in order.
- Batch k is sampled as soon as the sampler is free and the weights of version(k) have arrived
  (`common/sampling`). With (I, O) = (1, 0) the two take turns, whether they are one process or two.
- Step k begins when step k − 1 has ended and batch k is there. It is `train` seconds of grading and
  training and, after every I-th update, `sync` seconds in which the trainer hands over the weights;
  the sampler can use them after it.
- How long it takes to sample a batch, or to train on it, does not depend on the schedule. (In a
  real run it does, a little: an older policy may give shorter or longer responses.) Evaluation and
  checkpoints are left out.
- With `--run`, the run sampled with transformers: vLLM samples the batches of a version together,
  so that none has a time of its own.
"""

import random
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.helpers.reporting import column, read_steps, table
from common.sampling import version_of_batch

MODES = {  # label: (sync_interval, sync_offset)
    "Sync (1)": (1, 0),
    "Sync (2)": (2, 0),
    "Sync (10)": (10, 0),
    "One-Step Off-Policy": (1, 1),
}


@dataclass
class Replay:
    """Who worked when, in seconds from the start; intervals are (start, end), the k-th of a list is
    of batch k + 1.
    """

    sampling: list[tuple[float, float]]
    training: list[tuple[float, float]]
    syncing: list[tuple[float, float]]
    lag: list[int]
    seconds: float
    """from the start to the end of the last step"""

    def idle(self, *work):
        """The share of the whole time in which none of these, e.g. `replay.sampling`, goes on."""
        spans = [span for intervals in work for span in intervals]
        return 1 - sum(min(end, self.seconds) - start for start, end in spans) / self.seconds


def replay(sample, train, sync, sync_interval, sync_offset):
    """Replay one run; the three lists hold seconds per batch (a sync's where it is due). Returns a
    `Replay`.
    """
    version_ready = {0: 0.0}  # when the sampler has each version of the weights
    sampling, training, syncing = [], [], []
    sampler_free = trainer_free = 0.0
    batches = zip(sample, train, sync, strict=True)
    for k, (sample_seconds, train_seconds, sync_seconds) in enumerate(batches, start=1):
        # Batch k needs no update after k − 1, so that whatever it waits for has been replayed by
        # now.
        start = max(sampler_free, version_ready[version_of_batch(k, sync_interval, sync_offset)])
        sampler_free = start + sample_seconds
        sampling.append((start, sampler_free))

        start = max(trainer_free, sampler_free)
        trainer_free = start + train_seconds
        training.append((start, trainer_free))
        if k % sync_interval == 0:
            syncing.append((trainer_free, trainer_free + sync_seconds))
            trainer_free += sync_seconds
            version_ready[k] = trainer_free
    steps = range(1, len(training) + 1)
    lag = [k - 1 - version_of_batch(k, sync_interval, sync_offset) for k in steps]
    return Replay(sampling, training, syncing, lag, seconds=trainer_free)


def shortest_step(sample, train, sync_interval, sync_offset):
    """Seconds per step in the long run, where every batch takes S to sample and T to train on, and
    a sync nothing.

    (I max(S, T) + min(S, T)) / I for (I, 0): within an interval the slower of the two is always
    busy, and at its end the other one is waited for once, for one batch. max(S, T) for (1, 1).
    """
    steps = 100 * sync_interval
    times = ([seconds] * 2 * steps for seconds in (sample, train, 0.0))
    finished = replay(*times, sync_interval, sync_offset)
    return (finished.training[-1][1] - finished.training[steps - 1][1]) / steps


def times_of_steps(records):
    """(sample, train, sync), arrays of seconds per step, as `replay` takes them; grading counts as
    training.
    """
    train = column(records, "time/grade") + column(records, "time/train")
    return column(records, "time/sample"), train, column(records, "time/sync")


@dataclass
class Args:
    sample: float = 1.0
    """seconds to sample a batch"""
    train: float = 1.0
    """seconds to grade a batch and train on it"""
    sync: float = 0.0
    """seconds to hand over the weights"""
    slow_share: float = 0.0
    """share of the batches with a response that takes longer; random, the same for every mode"""
    slow_factor: float = 3.0
    """how much longer such a batch takes to sample"""
    steps: int = 1000
    """how many steps to replay"""
    run: str = ""
    """directory of a run; its times instead of those above"""


def main(args):
    if args.run:
        sample, train, sync = times_of_steps(read_steps(args.run))
        due = sync[sync > 1e-4]  # steps without a sync take microseconds
        sync = [float(np.median(due)) if len(due) else 0.0] * len(sync)
    else:
        chance = random.Random(1)
        slow = [chance.random() < args.slow_share for _ in range(args.steps)]
        sample = [args.sample * (args.slow_factor if is_slow else 1.0) for is_slow in slow]
        train, sync = [args.train] * args.steps, [args.sync] * args.steps
    results = {label: replay(sample, train, sync, *mode) for label, mode in MODES.items()}
    rows = []
    for label, result in results.items():
        speed_up = results["Sync (1)"].seconds / result.seconds
        rows.append([label, f"{result.seconds / len(sample):.3f}", f"{speed_up:.2f}"])
        idle = result.idle(result.sampling), result.idle(result.training, result.syncing)
        rows[-1] += [*(f"{share:.0%}" for share in idle), f"{np.mean(result.lag):.2f}"]
        rows[-1].append(max(result.lag))
    header = ["mode", "seconds per step", "speed-up", "sampler idle", "trainer idle"]
    print(table([*header, "mean lag", "largest lag"], rows))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
