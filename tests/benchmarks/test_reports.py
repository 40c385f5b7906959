"""What the reports conclude: from runs that are made up so that the conclusion is known."""

import json

import numpy as np
import pytest

from benchmarks.figures import against_trl, algorithms, sync_modes
from benchmarks.helpers import reporting
from benchmarks.speed.schedule_replay import MODES, replay


def run_as_published(script):
    """A run of 100 steps whose curves go straight from start to end of the published ones."""
    published = json.loads(algorithms.PUBLISHED.read_text())["curves"]
    published["reward/mean"]["red_weight"][1] += (
        0.1  # it was read as exactly half way between the others
    )
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
        return [
            {"step": k + 1, "reward/mean": reward}
            for k, reward in enumerate(np.linspace(0.5, end, 50))
        ]

    assert algorithms.direction([run(0.6), run(0.7)], "reward/mean") == "rises"
    assert algorithms.direction([run(0.4), run(0.3)], "reward/mean") == "falls"
    assert algorithms.direction([run(0.4), run(0.7)], "reward/mean") == "flat"


def test_an_answer_needs_four_in_five_seeds():
    def observations(groups):
        means = [np.mean(run) for run in groups["x"]]
        return [
            ("above 1", np.mean(means) > 1),
            ("above 3", np.mean(means) > 3),
            ("above −9", np.mean(means) > -9),
        ]

    # The last one is 0 after half of its steps.
    runs = [[2.0, 2.0, 2.0, 2.0]] * 4 + [[0.0, 0.0, 9.0, 9.0]]
    rows, summary = reporting.compare(observations, {"x": runs}, seeds=[5, 6, 7, 8, 9])
    rows = rows.splitlines()
    seeds = " | ".join(f"seed {seed}" for seed in (5, 6, 7, 8, 9))
    shorter = "after half of the steps | three quarters"
    assert rows[0] == f"| observation | answer | {seeds} | {shorter} |"
    assert rows[2] == "| above 1 | yes | yes | yes | yes | yes | yes | yes | yes |"
    assert rows[3] == "| above 3 | no | no | no | no | no | yes | no | no |"
    assert rows[5].startswith("| **number of yes** | **2 of 3** | **2 of 3** |")
    assert summary.startswith("Of 3 observations about the published figure, 2 hold here")

    runs = [[reward] * 2 for reward in (4.0, 4.0, 1.5, 1.5, 6.0)]
    rows, _ = reporting.compare(observations, {"x": runs}, seeds=range(5))
    assert f"| above 3 | {reporting.SPREAD} | yes | yes | no | no | yes |" in rows


def learned(first, last, seconds):
    """A run of 30 steps of so many seconds, with a reward that goes straight up."""
    rewards = np.linspace(first, last, 30)
    return [
        {"step": k, "reward/mean": r, "time/step": seconds, "seconds": seconds * k,
         "memory/peak_gib": 1.0}
        for k, r in enumerate(rewards, start=1)
    ]  # fmt: skip


def test_two_sides_that_learn_the_same_and_two_that_do_not():
    kind = against_trl.KINDS["default"]
    ours = [learned(0.30, 0.92, 1.0), learned(0.34, 0.96, 1.0)]
    same = {"grpo.py": ours, "TRL": [learned(0.32, 0.94, 2.5), learned(0.28, 0.90, 2.5)]}
    _, found = against_trl.compare_rewards(same, kind)
    assert found == {"steps_with_overlap": 30, "parts_apart": 0}
    lower = {"grpo.py": ours, "TRL": [learned(0.10, 0.72, 2.5), learned(0.14, 0.76, 2.5)]}
    text, found = against_trl.compare_rewards(lower, kind)
    assert found == {"steps_with_overlap": 0, "parts_apart": 6} and text.count("| above |") == 6

    text, ratios = against_trl.compare_sides(same, {"grpo.py": [0.5], "TRL": [0.75]}, kind)
    assert ratios == {"to_goal": None, "whole_run": pytest.approx(2.5)}
    # Smoothed, one of our runs ends at 0.88, the other at 0.92.
    assert "| grpo.py | 0.500 (0.500) | never (never, 29) | 30 (30, 30) | 1.00 |" in text


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("sample", "train"), [(2.0, 3.0), (3.0, 2.0)])
def test_times_per_step_agree_with_the_schedule(mode, sample, train, tmp_path):
    interval, _ = MODES[mode]
    result = replay([sample] * 40, [train] * 40, [0.5] * 40, *MODES[mode])
    with open(tmp_path / "metrics.jsonl", "w") as file:
        end = 0.0
        for k, (start, trained) in enumerate(result.training, start=1):
            sync = 0.5 if k % interval == 0 else 0.0
            times = {
                "wait": start - end,
                "grade": 0.25,
                "train": train - 0.25,
                "sync": sync,
                "sample": sample,
            }
            times |= {"step_started_at": 1e6 + end, "step": trained + sync - end}
            file.write(
                json.dumps({"step": k} | {f"time/{key}": seconds for key, seconds in times.items()})
                + "\n"
            )
            end = trained + sync
    records = sync_modes.read_run(tmp_path)
    assert 60 * records[-1]["minutes"] == pytest.approx(result.seconds)
    # In one-step off-policy mode, a slow sampler still works on the first batch that counts.
    unknown = max(0.0, sample - train) / 30 if mode == sync_modes.OFFSET else 0.0
    assert sync_modes.replayed(records, mode) == pytest.approx(
        sync_modes.seconds(records), abs=unknown + 1e-5
    )
