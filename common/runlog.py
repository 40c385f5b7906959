"""What a run records and shows. All metrics go through `RunLog.write`, so that files, progress bar
and Weights & Biases agree.
"""

import contextlib
import json
import math
import shlex
import sys
from datetime import datetime
from pathlib import Path

from tqdm import tqdm

from common import recording, viewer
from common.checkpoints import check_steps_left
from common.curves import plot_curves, read_metrics
from common.distributed import rank
from common.errors import BadInput
from common.modelcard import model_card
from common.options import as_command
from common.runfiles import COMPLETE, RunFiles, free_directory, mark_complete, write_atomically
from common.sources import Sources
from common.tracking import start_tracking
from common.watch import NO_SIGNAL, Watch, never_learned

COMPLETIONS_PER_STEP = 4
SHOWN_FIRST = ("eval/reward", "eval/accuracy", "eval/response_length")


def make_log(script, args):
    """The log of a run, a context manager; on all ranks but the first, one that writes nothing.

    `script` is the script's path, `args` its options. The run's directory is made when the context
    is entered: a start that is refused before leaves nothing. Raises `BadInput` if it is taken, or
    if a run to be resumed is not what it was.
    """
    return SilentLog(args) if rank() else RunLog(script, args)


class RunLog:
    """A run's files and its progress bar."""

    def __init__(self, script, args):
        self.script = Path(script).stem
        self.args = vars(args)
        self.command = as_command(script, args)
        if args.resume:
            directory = Path(args.resume)
        else:
            task = Path(args.task).stem
            unnamed = f"{self.script}-{task}-{args.seed}-{datetime.now():%Y%m%d-%H%M%S}"
            directory = free_directory(args.output, args.name or unnamed)
        names = ["metrics.jsonl", "completions.jsonl"]
        if args.rollouts_interval:
            names.append("rollouts.jsonl")
        self.dir = directory
        self.files = RunFiles(directory, names, Sources(script, args.task))
        if args.resume:
            self.files.take_lock()
            self.files.sources.check_unchanged(directory)
            check_steps_left(directory, args.num_steps)
        self.watch = Watch(directory)
        self.step = 0  # the last one recorded
        self.elapsed_seconds = 0.0
        self.wandb = None
        self.bar = None

    def state_dict(self):
        """What a checkpoint needs: counters, and the length of all logs in bytes."""
        return {
            "step": self.step,
            "elapsed_seconds": self.elapsed_seconds,
            "skipped": self.watch.skipped_in_a_row,
            "offsets": self.files.flushed_offsets(),
        }

    def load_state_dict(self, state):
        """Continue a run from this state: logs will be cut back to where they were then."""
        self.step = state["step"]
        self.elapsed_seconds = state["elapsed_seconds"]
        self.watch.skipped_in_a_row = state["skipped"]
        self.files.offsets |= state["offsets"]

    def __enter__(self):
        args_json = json.dumps({"script": self.script, **self.args}, indent=2) + "\n"
        if self.args["resume"]:
            write_atomically(self.dir / "args.json", args_json)
            if self.step < self.args["num_steps"]:
                (self.dir / COMPLETE).unlink(missing_ok=True)  # model/ is that of a shorter run
        else:
            self.files.create(args_json)
        self.files.open()
        self.files.write_environment(self.args["engine"], self.command)
        if self.args["track"]:
            config = {"script": self.script, **self.args}
            try:
                self.wandb = start_tracking(self.dir, self.args["wandb_project"], config)
            except BadInput as error:
                self.__exit__(BadInput, error, None)
                raise
        if not self.args["resume"]:
            print("Watch the reward. (The loss stays near 0, also while the policy learns.)")
            # Said now, since a process that is killed says nothing.
            self._say_how_to_continue("If it is stopped or killed, continue with:")
        total = self.args["num_steps"]
        self.bar = tqdm(initial=self.step, total=total, unit="step", dynamic_ncols=True)
        return self

    def __exit__(self, kind, error, traceback):
        try:
            if self.bar is not None:
                self.bar.close()
            if kind is not None and self.step > 0:
                # Before the curves: when a rank is killed, torchrun soon ends the others.
                self._say_how_to_continue(f"Stopped after step {self.step}. Continue with:")
            self.files.close()
            records = read_metrics(self.dir)
            if records:
                plot_curves(records, self.dir.name, self.dir / "curves.png")
                if "rollouts.jsonl" in self.files.offsets:
                    write_atomically(self.dir / "rollouts.html", viewer.page([self.dir]))
                if kind is None and self.step == self.args["num_steps"]:
                    card = model_card(self.dir, self.script, self.args, self.command, records)
                    write_atomically(self.dir / "model" / "README.md", card)
            elif kind is BadInput and not self.args["resume"]:
                self.files.remove()  # a refused start leaves no directory behind
        except Exception as another:  # which must not hide the error that ended the run
            what = f"{self.dir} has no new curves.png, rollouts.html or model/README.md"
            print(f"{what}: {another}.", file=sys.stderr)
        if self.wandb:
            self.wandb.finish(exit_code=int(kind is not None))
        self.files.lock.close()

    def write(self, step, metrics, evaluation=None):
        """Record a step's metrics, numbers by name, and its `Evaluation`, if there was one.

        Raises `RunStopped` after several skipped updates in a row.
        """
        self.elapsed_seconds += metrics.get("time/step", 0.0)
        record = {"step": step, **metrics, "time/elapsed_hours": self.elapsed_seconds / 3600}
        if evaluation is not None:
            record |= evaluation.metrics
            if self.args["rollouts_interval"]:
                answers = recording.held_out_records(step, evaluation.answers)
                self.files.append("rollouts.jsonl", *answers)
        self.files.append("metrics.jsonl", {key: _finite(value) for key, value in record.items()})
        if self.wandb:
            self.wandb.log(record)
        if step > 0:
            reward, length = metrics["reward/mean"], metrics["response_length/mean"]
            self.bar.set_postfix_str(f"reward {reward:.3f}, length {length:.1f}", refresh=False)
            # Ctrl-C also kills "| tee log"; the checkpoint must still be written.
            with contextlib.suppress(OSError):
                self.bar.update()
        self.step = step
        self.watch.look(step, metrics)

    def recorded_rows(self, step):
        """The rows of this step's batch that `write_completions` records token by token."""
        interval = self.args["rollouts_interval"]
        wanted = interval and (step == 1 or step % interval == 0)
        return range(recording.GROUPS * self.args["group_size"] if wanted else 0)

    def write_completions(self, step, batch, tokens, problem_set):
        """Record a few of a step's completions, spread over the batch, and some groups per token.

        `batch` is the whole graded `Batch`, `tokens` are those of `StepMetrics.recorded_tokens`,
        `problem_set` has the problems.
        """
        rewards_B = batch.rewards_PG.flatten().tolist()
        advantages_B = batch.advantages_PG.flatten().tolist()
        B = len(batch.responses)
        how_many = min(COMPLETIONS_PER_STEP, B)
        for row in [i * B // how_many for i in range(how_many)]:
            record = {
                "step": step,
                **recording.posed(problem_set.problems[batch.problems[row]]),
                "response": batch.texts[row],
                "tokens": len(batch.responses[row]),
                "truncated": batch.truncated[row],
                "reward": _finite(rewards_B[row]),
                "advantage": _finite(advantages_B[row]),
            }
            self.files.append("completions.jsonl", record)
        groups = recording.group_records(step, batch, tokens, problem_set)
        self.files.append("rollouts.jsonl", *groups)

    def summarise(self):
        """Print the outcome of the run, and where everything is; mark it if it is complete."""
        self.bar.close()
        total = self.args["num_steps"]
        if self.step < total:
            what = f"Stopped after step {self.step} of {total}; there is a checkpoint"
            self._say_how_to_continue(f"{what}. Continue with:")
        records = read_metrics(self.dir)
        print(outcome(records), end="")
        if never_learned(records):
            print(f"Nothing was learned: at every step, {NO_SIGNAL}.")
        trained = ""
        if self.step == total:
            mark_complete(self.dir, total)
            trained = ", the trained model in its model/"
        print(f"Everything is in {self.dir}/{trained}.")

    def _say_how_to_continue(self, what):
        with contextlib.suppress(OSError):  # what read it may be gone
            print(what)
            print(f"    python {self.script}.py --resume {shlex.quote(str(self.dir))}", flush=True)


class SilentLog(contextlib.nullcontext):
    """What the other ranks have instead: it counts the steps, and writes nothing."""

    recorded_rows = RunLog.recorded_rows

    def __init__(self, args):
        super().__init__(self)
        self.args = vars(args)
        self.dir = Path(args.resume or args.output)
        self.step = 0

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        self.step = state["step"]

    def write(self, step, metrics, evaluation=None):
        self.step = step

    def write_completions(self, step, batch, tokens, problem_set):
        pass

    def summarise(self):
        pass


def outcome(records):
    """A table of what the first and the last evaluation of a run measured; "" if there was none.

    It has reward, accuracy and response length first, then the task's other values.
    """
    evaluations = [record for record in records if "eval/reward" in record]
    if not evaluations:
        return ""
    ends = evaluations[:1] + evaluations[1:][-1:]
    shared = sorted(key for key in ends[0] if key.startswith("eval/") and key in ends[-1])
    first = [key for key in SHOWN_FIRST if key in shared]
    rows = [("Held-out problems (greedy)", [f"step {record['step']}" for record in ends])]
    for key in dict.fromkeys(first + shared):
        rows.append((f"  {key.removeprefix('eval/')}", [f"{record[key]:.3f}" for record in ends]))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:{width}}" + "".join(f"{cell:>12}" for cell in cells) for name, cells in rows]
    return "\n".join(lines) + "\n"


def _finite(value):
    """The number, or None for infinity and NaN, which JSON does not know."""
    return value if math.isfinite(value) else None
