"""`python -m common.compare`: what it plots and says, against numbers by hand."""

import csv
import functools
import json

import numpy as np
import pytest
from matplotlib.figure import Figure

import grpo
from common import compare
from common.errors import BadInput
from common.plots import SPREAD, aligned, plot_band
from tests.helpers import SMALL, run_module, train

compare_runs = functools.partial(run_module, "common.compare")


def write_run(directory, script="grpo", rewards=(0.25, 0.5), accuracies=(0.0, 1.0), **options):
    """A run's directory with a reward for each step, and evaluations before and after them."""
    name = "-".join(map(str, [script, *options.values()]))
    options = {"script": script, **vars(grpo.Args(**SMALL)), **options}
    records = [{"step": k, "reward/mean": r, "time/elapsed_hours": k / 8}
               for k, r in enumerate(rewards, start=1)]  # fmt: skip
    records.insert(0, {"step": 0, "time/elapsed_hours": 0.0})
    for record, accuracy in zip((records[0], records[-1]), accuracies, strict=True):
        record["eval/accuracy"] = accuracy
    (directory / name).mkdir()
    (directory / name / "args.json").write_text(json.dumps(options))
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (directory / name / "metrics.jsonl").write_text(lines)
    return directory / name


def groups_of(*paths):
    return compare.grouped([compare.read_run(path) for path in paths])


def test_runs_of_a_changed_script_or_task_are_refused(tmp_path):
    paths = [write_run(tmp_path, seed=seed) for seed in (1, 2)]
    runs = [compare.read_run(path) for path in paths]
    compare.check_same_code(runs)  # runs without copies
    for kind in ("script", "task"):
        for path in paths:
            (path / kind).mkdir()
            (path / kind / f"{kind}.py").write_text("# one\n# two\n")
        compare.check_same_code(runs)
        changed = paths[1] / kind / f"{kind}.py"
        changed.write_text("# one\n# 2\n")
        with pytest.raises(BadInput) as refusal:
            compare.check_same_code(runs)
        differ = f"{changed} and {paths[0]}/{kind}/{kind}.py differ, first in line 2: "
        assert str(refusal.value).startswith(differ)
        changed.rename(changed.with_name("other.py"))  # another script, another curve
        compare.check_same_code(runs)


def test_a_curve_has_the_runs_of_one_script_whose_options_agree_but_for_the_seed(tmp_path):
    settings = [
        ("grpo", {"learning_rate": 1e-4, "threads": 1}), ("grpo", {"learning_rate": 2e-4}),
        ("red_weight", {"learning_rate": 1e-4, "tau": 1.0}), ("grpo", {"learning_rate": 1e-4}),
        ("red_weight", {"learning_rate": 1e-4, "tau": 2.0}), ("grpo", {"reference_kl": False}),
    ]  # fmt: skip
    paths = [
        write_run(tmp_path, script, seed=seed, **options)
        for seed, (script, options) in enumerate(settings)
    ]
    found = {label: [run.path for run in runs] for label, runs in groups_of(*paths).items()}
    assert found == {
        "grpo --learning-rate 0.0001": [paths[0], paths[3]],
        "grpo --learning-rate 0.0002": [paths[1]],
        "red_weight --learning-rate 0.0001 --tau 1.0": [paths[2]],
        "red_weight --learning-rate 0.0001 --tau 2.0": [paths[4]],
        "grpo --learning-rate 0.0002 --no-reference-kl": [paths[5]],
    }
    # With a learning rate that falls over the run, the number of steps is part of the setting.
    linear = [
        write_run(tmp_path, seed=seed, num_steps=steps, lr_schedule=schedule)
        for seed, (steps, schedule) in enumerate(
            [(2, "constant"), (3, "constant"), (2, "linear"), (3, "linear")]
        )
    ]
    assert list(map(len, groups_of(*linear[:2]).values())) == [2]
    assert list(map(len, groups_of(*linear[2:]).values())) == [1, 1]


def test_a_curve_is_the_mean_over_the_steps_that_all_seeds_have_and_their_range(tmp_path):
    runs = [
        [{"step": 1, "x": 1, "y": 1.0}, {"step": 2, "x": 2}, {"step": 3, "x": 3, "y": 2.0}],
        [{"step": 1, "x": 3, "y": 5.0}, {"step": 3, "x": 5, "y": 4.0}, {"step": 4, "x": 6, "y": 9}],
    ]
    assert aligned(runs, "x", "y").tolist() == [[[1, 3], [3, 5]], [[1, 2], [5, 4]]]
    axis = Figure().subplots()
    plot_band(axis, runs, "y", "x", "", "black")
    (line,), (band,) = axis.lines, axis.collections
    assert line.get_xydata().tolist() == [[2, 3], [4, 3]]
    corners = {tuple(corner) for corner in band.get_paths()[0].vertices.tolist()}
    assert corners == {(2, 1), (2, 5), (4, 2), (4, 4)}


def test_final_values_and_what_the_seeds_say(tmp_path):
    many = np.arange(12) / 8  # the mean of the last ten is 6.5 / 8
    paths = [
        write_run(tmp_path, "grpo", many, (0.0, 0.5), seed=1),
        write_run(tmp_path, "grpo", many + 0.25, (0.0, 0.75), seed=2),
        write_run(tmp_path, "red_weight", many + 0.5, (0.0, 0.875), seed=1),
        write_run(tmp_path, "red_weight", many + 1.0, (0.0, 1.0), seed=2),
        write_run(tmp_path, "mine", [*many, 99.0], (0.0, 1.0), seed=1),  # one step ahead
    ]
    metrics = {"reward/mean": "reward", "eval/accuracy": "accuracy"}
    lines = compare.final_table(groups_of(*paths[:4]), metrics).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert rows[0][-1] == "against grpo"
    assert rows[2:] == [
        ["reward", "12", "grpo", "2", "0.9375", "0.8125 to 1.062", ""],
        ["reward", "12", "red_weight", "2", "1.562", "1.312 to 1.812", SPREAD],
        ["accuracy", "12", "grpo", "2", "0.625", "0.5 to 0.75", ""],
        ["accuracy", "12", "red_weight", "2", "0.9375", "0.875 to 1", SPREAD],
    ]
    groups = groups_of(*paths)
    step, found = compare.final_values(groups, "reward/mean")
    assert step == 12 and found["mine"] == pytest.approx([6.5 / 8])
    # Of evaluations, the last one that all have: the one before training.
    assert compare.final_values(groups, "eval/accuracy") == (0, {
        "grpo": [0, 0], "red_weight": [0, 0], "mine": [0],
    })  # fmt: skip
    assert compare.compared(found["mine"], found["grpo"]) == "unknown: one seed"
    assert compare.compared([3.0, 3.5], found["grpo"]) == "above"


def test_the_command_with_real_runs_one_of_which_goes_on(tmp_path):
    runs = [
        train(tmp_path, f"{script}-{seed}", script, seed=seed)
        for script, seed in (("grpo", 1), ("grpo", 2), ("red_weight", 1))
    ]
    text = (runs[2] / "metrics.jsonl").read_text()
    (runs[2] / "metrics.jsonl").write_text(text[: text.rindex("\n", 0, -1) + 20])
    ended = compare_runs(*runs, "--output", tmp_path / "figures" / "all")
    assert ended.returncode == 0, ended.stderr
    assert f"{runs[2]} has made 1 steps, another 2" in ended.stdout
    for ending, begins in (("png", b"\x89PNG"), ("pdf", b"%PDF")):
        assert (tmp_path / "figures" / f"all.{ending}").read_bytes().startswith(begins)
    with open(tmp_path / "figures" / "all.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["seed"], row["step"]) for row in rows[:6]] == [
        (str(run), str(seed), str(step))
        for seed, run in enumerate(runs[:2], 1)
        for step in range(3)
    ]
    assert [row["step"] for row in rows[6:]] == ["0", "1"]
    record = json.loads((runs[1] / "metrics.jsonl").read_text().splitlines()[2])
    for key in compare.PLOTTED:
        assert (rows[5][key] or None) == (key in record or None) or float(
            rows[5][key]
        ) == pytest.approx(record[key])

    # The files it writes do not disturb the next call; metrics may be any.
    (tmp_path / "all.log").touch()
    argv = (*sorted(tmp_path.glob("*[12g]")), "--metrics", "time/train", "--x", "hours")
    assert compare_runs(*argv).returncode == 0
    assert (tmp_path / "comparison.png").exists()


@pytest.mark.parametrize(
    ("options", "more", "said"),
    [
        ({"task": "gsm8k"}, [], "which has another --task (addition)"),
        ({"eval_size": 3}, [], "which has another --eval-size (4)"),
        ({"threads": 2}, [], "have the same options and the same seed: leave one out"),
        ({"seed": 2}, ["/none"], "/none holds no run"),
        ({"seed": 2, "rewards": ()}, [], "has not made a step yet"),
        ({"seed": 2}, ["--metrics", "reward"], "eval/accuracy, reward/mean, time/elapsed_hours."),
        ({"seed": 2}, ["--smoothing", 0], "--smoothing 0 cannot work"),
    ],
)
def test_what_cannot_be_compared_is_one_line(options, more, said, tmp_path):
    paths = write_run(tmp_path), write_run(tmp_path, **options)
    ended = compare_runs(*paths, *more)
    (line,) = ended.stderr.splitlines()
    assert ended.returncode == 2 and line.startswith("compare.py: error: ") and said in line
    if "which has another" in said:
        assert str(paths[1]) in line and str(paths[0]) in line
