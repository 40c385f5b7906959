"""An author's day: an own task and an own algorithm, runs with several seeds, a figure and a table
for the paper, and the directory to publish, from which someone else gets the same numbers.

All commands are those of the READMEs, as processes of their own.
"""

import contextlib
import csv
import json
import os
import re
import signal
import statistics
import subprocess
import sys

import pytest

from tests.helpers import (
    REPOSITORY,
    SMALL,
    as_options,
    copy_to_publish,
    metrics,
    num_logged,
    wait_for,
    write_task,
)

PATIENCE = 300  # seconds, for a command on a busy machine
NUM_STEPS = 10  # as many as the table takes the mean of
OPTIONS = {**SMALL, "task": "sums.py:Sums", "num_steps": NUM_STEPS, "eval_interval": 5}
SUMS = """
from common.tasks import Task


class Sums(Task):
    def problems(self, split):
        numbers = range(10, 80) if split == "train" else range(80, 100)
        return [
            {"prompt": [{"role": "user", "content": f"Q: {n}+{n}+{n}"}], "answer": 3 * n}
            for n in numbers
        ]

    def reward(self, problem, response):
        digits = sum(character.isdigit() for character in response) / max(1, len(response))
        return {"reward": digits + (f"answer {problem['answer']}." in response), "digits": digits}
"""


def test_from_a_run_to_a_figure_in_a_paper(tmp_path):
    checkout, published = tmp_path / "checkout", tmp_path / "published"
    runs = [checkout / "runs" / name for name in ("grpo-1", "mine-1", "grpo-2", "mine-2")]

    # In the morning, the author writes a task, and an algorithm: GRPO with a bonus for entropy.
    copy_to_publish(checkout, REPOSITORY / "grpo.py", REPOSITORY / "benchmarks")
    write_task(checkout, SUMS, "sums.py")
    code, grpos = (checkout / "grpo.py").read_text(), "    return loss_BT\n"
    assert code.count(grpos) == 1
    own = code.replace(grpos, "    return loss_BT - 0.1 * micro.entropy_BT\n")
    (checkout / "mine.py").write_text(own)

    # The runs begin. During the second one, the machine is needed for something else: Ctrl-C.
    loop = documented_loop()
    with started(loop, checkout) as shell:
        wait_for(lambda: num_logged(runs[1]) >= 2, PATIENCE)
        os.killpg(shell.pid, signal.SIGINT)
        said, _ = shell.communicate(timeout=PATIENCE)
    stopped_after = metrics(runs[1])[-1]["step"]
    assert 0 < stopped_after < NUM_STEPS, said
    assert f"Stopped after step {stopped_after} of {NUM_STEPS}" in said
    assert not runs[2].exists()  # the loop has ended, too

    # Later, the same loop does the rest: nothing of the first run, the second half of the second.
    said = output_of(loop, checkout)
    assert said.count("is complete: nothing to do.") == 1
    assert said.count("first training prompt") == 2  # of the two runs that begin now
    for run in runs:
        assert [record["step"] for record in metrics(run)] == list(range(NUM_STEPS + 1))
    starts = [(run / "environment.txt").read_text().count("started: ") for run in runs]
    assert starts == [1, 2, 1, 1]

    # In the afternoon, a figure and a table; and how good the model is, with intervals.
    table = output_of("python -m common.compare runs/* --output figures/both", checkout)
    check_figure(checkout / "figures", table, runs)
    output_of("python benchmarks/evaluate.py --run runs/mine-2 -n 2", checkout)
    results = json.loads((runs[3] / "evaluation.json").read_text())["results"]
    for label, record in (("before", metrics(runs[3])[0]), ("after", metrics(runs[3])[-1])):
        assert results[label]["greedy reward"][0] == pytest.approx(record["eval/reward"])

    # In the evening, what is to be published. Elsewhere, the command that the run has noted gives
    # the same numbers, although the author's run was interrupted.
    copy_to_publish(published, checkout / "mine.py", checkout / "sums.py")
    noted = (runs[1] / "environment.txt").read_text()
    command = re.findall("^to repeat it: (.*)$", noted, re.MULTILINE)[-1]
    checkout.rename(tmp_path / "not there")
    output_of(command, published)
    (repeated,) = (published / "runs").iterdir()
    assert metrics(repeated) == metrics(tmp_path / "not there" / "runs" / "mine-1")


def documented_loop():
    """The loop of common/README.md, with this story's scripts, seeds and options."""
    readme = (REPOSITORY / "common" / "README.md").read_text()
    loop = re.search(r"A loop over seeds and scripts.*?```bash\n(.*?)```", readme, re.DOTALL)[1]
    options = " ".join(as_options(OPTIONS))
    ours = {"1 2 3": "1 2", "red_weight": "mine", "$seed --name": f"$seed {options} --name"}
    for theirs, own in ours.items():
        assert loop.count(theirs) == 1
        loop = loop.replace(theirs, own)
    return loop


@contextlib.contextmanager
def started(command, directory):
    """A shell with a command, like one in a terminal: a group of processes that Ctrl-C reaches."""
    search = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    environment = {**os.environ, "PATH": search}
    environment.pop("PYTHONPATH", None)
    shell = subprocess.Popen(
        ["bash", "-c", command], cwd=directory, env=environment, text=True, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        yield shell
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
        shell.wait()


def output_of(command, directory):
    """What a command prints, which succeeds."""
    with started(command, directory) as shell:
        said, _ = shell.communicate(timeout=PATIENCE)
    assert shell.returncode == 0, said
    return said


def check_figure(directory, table, runs):
    """The figure is there; its values, and those of the table, are those of metrics.jsonl."""
    assert (directory / "both.png").read_bytes().startswith(b"\x89PNG")
    assert (directory / "both.pdf").read_bytes().startswith(b"%PDF")
    with open(directory / "both.csv") as file:
        rows = list(csv.DictReader(file))
    rewards, held_out = {"grpo": [], "mine": []}, {"grpo": [], "mine": []}
    for run in runs:
        script, seed = run.name.split("-")
        plotted = [row for row in rows if (row["curve"], row["seed"]) == (script, seed)]
        found = [float(row["reward/mean"]) for row in plotted[1:]]
        assert found == pytest.approx([record["reward/mean"] for record in metrics(run)[1:]])
        rewards[script].append(statistics.fmean(found))
        held_out[script].append(metrics(run)[-1]["eval/reward"])
    assert rewards["grpo"] != rewards["mine"] and len(rows) == 4 * (NUM_STEPS + 1)

    lines = [[cell.strip() for cell in line.split("|")] for line in table.splitlines()]
    for metric, values in (("reward", rewards), ("held-out reward (greedy)", held_out)):
        for script, of_seeds in values.items():
            low, high = min(of_seeds), max(of_seeds)
            (cells,) = [line[3:7] for line in lines if line[1:2] == [metric] and script in line]
            mean = f"{statistics.fmean(of_seeds):.4g}"
            assert cells == [script, "2", mean, f"{low:.4g} to {high:.4g}"]
