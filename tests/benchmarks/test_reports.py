"""What the reports conclude: from runs that are made up so that the conclusion is known."""

import json

import numpy as np
import pytest

from benchmarks import algorithms, reporting, sync_modes
from benchmarks.schedule_replay import MODES, replay


def run_as_published(script):
    """A run of 100 steps whose curves go straight from start to end of the published ones."""
    published = json.loads(algorithms.PUBLISHED.read_text())["curves"]
    published["reward/mean"]["red_weight"][1] += 0.1  # it was read as exactly half way between the others
    curves = {key: np.linspace(*published[key][script], 100) for key in algorithms.PANELS}
    return [{"step": k + 1, **{key: curve[k] for key, curve in curves.items()}} for k in range(100)]


def test_a_run_like_the_published_one_shows_what_that_shows():
    groups = {label: [run_as_published(script)] for label, script in algorithms.SCRIPTS.items()}
    assert [statement for statement, holds in algorithms.observations(groups) if not holds] == []


def test_exchanged_algorithms_show_what_is_not_as_published():
    grpo, rec, red = algorithms.SCRIPTS.values()
    exchanged = dict(zip(algorithms.SCRIPTS, (rec, red, grpo), strict=True))
    groups = {label: [run_as_published(script)] for label, script in exchanged.items()}
    holds = [holds for _, holds in algorithms.observations(groups)]
    assert holds[:4] == [True] * 4  # what all three have in common
    assert not any(holds[4:])


def test_a_change_smaller_than_its_spread_between_seeds_is_flat():
    def run(end):
        return [{"step": k + 1, "reward/mean": reward} for k, reward in enumerate(np.linspace(0.5, end, 50))]

    assert algorithms.direction([run(0.6), run(0.7)], "reward/mean") == "rises"
    assert algorithms.direction([run(0.4), run(0.3)], "reward/mean") == "falls"
    assert algorithms.direction([run(0.4), run(0.7)], "reward/mean") == "flat"


def test_answers_are_given_for_the_mean_and_for_each_seed():
    def observations(groups):
        return [("above 1", np.mean(groups["x"]) > 1), ("above 3", np.mean(groups["x"]) > 3)]

    rows = reporting.compare(observations, {"x": [0, 4]}, seeds=[5, 6]).splitlines()
    assert rows[0] == "| observation | mean of the seeds | seed 5 | seed 6 |"
    assert rows[2:] == [
        "| above 1 | yes | no | yes |",
        "| above 3 | no | no | yes |",
        "| **number of yes** | **1 of 2** | **0 of 2** | **2 of 2** |",
    ]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("sample", "train"), [(2.0, 3.0), (3.0, 2.0)])
def test_times_per_step_agree_with_the_schedule(mode, sample, train, tmp_path):
    interval, _ = MODES[mode]
    result = replay([sample] * 40, [train] * 40, [0.5] * 40, *MODES[mode])
    with open(tmp_path / "metrics.jsonl", "w") as file:
        end = 0.0
        for k, (start, trained) in enumerate(result.training, start=1):
            sync = 0.5 if k % interval == 0 else 0.0
            times = {"wait": start - end, "grade": 0.25, "train": train - 0.25, "sync": sync, "sample": sample}
            times |= {"step_started_at": 1e6 + end, "step": trained + sync - end}
            file.write(json.dumps({"step": k} | {f"time/{key}": seconds for key, seconds in times.items()}) + "\n")
            end = trained + sync
    records = sync_modes.read_run(tmp_path)
    assert 60 * records[-1]["minutes"] == pytest.approx(result.seconds)
    # In one-step off-policy mode, a slow sampler still works on the first batch that counts.
    unknown = max(0.0, sample - train) / 30 if mode == sync_modes.OFFSET else 0.0
    assert sync_modes.replayed(records, mode) == pytest.approx(sync_modes.seconds(records), abs=unknown + 1e-5)
