"""`benchmarks/evaluate.py`: its statistics against enumeration, numbers by hand and simulation;
real evaluations.
"""

import itertools
import json
import math
import shutil
from functools import partial

import helpers
import numpy as np
import pytest
import torch
from helpers import dense_task, metrics, train, write_task

from benchmarks import evaluate
from benchmarks.helpers.reporting import OF_DIFFERENCES, OF_SHARES, mean_interval, wilson
from common.models import end_of_sequence_ids, load_model, load_tokenizer
from common.sampling import Plan
from common.sampling.transformers import TransformersSampler
from common.tasks import load_task

# The bundled model does the sums, but does not stop: this task is content with that, and reports
# something more.
LENIENT = """
from common.tasks.addition import Addition


class Lenient(Addition):
    def reward(self, problem, response):
        right = f"answer {problem['answer']}." in response
        doubts = float("let me check" in response)
        return {"reward": 0.5 + right, "accuracy": float(right), "doubts": doubts}
"""


# Statistics


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_response(n):
    for right, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([True] * right + [False] * (n - right), k))
        assert evaluate.pass_at_k(n, right, k) == pytest.approx(
            np.mean([any(subset) for subset in subsets]), abs=1e-12
        )


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [
        (0, 10, 0.0, 0.277533),
        (10, 10, 0.722467, 1.0),
        (5, 10, 0.236593, 0.763407),
        (1, 4, 0.045587, 0.699358),
    ],
)
def test_wilsons_interval_is_as_by_hand(right, total, low, high):
    assert wilson(right, total) == pytest.approx((low, high), abs=1e-6)


def test_intervals_of_means_are_as_by_hand():
    # 16 zeros, with 0, 0, 1, 1: mean 0.1, variance 0.1 − 0.01, 20 values
    assert mean_interval([0] * 16, OF_SHARES) == pytest.approx(
        (0, 0.1 + 1.959964 * 0.3 / math.sqrt(20))
    )
    # 14 ones, with −1 and 1: mean 14 / 16, variance 1 − (14 / 16)²
    low = 0.875 - 1.959964 * math.sqrt(1 - 0.875**2) / 4
    assert mean_interval([1] * 14, OF_DIFFERENCES) == pytest.approx((low, 1.0))


def test_intervals_of_zeros_and_ones_contain_wilsons():
    for right in range(31):
        (low, high), inner = (
            mean_interval([1] * right + [0] * (30 - right), OF_SHARES),
            wilson(right, 30),
        )
        assert low - 1e-3 < inner[0] and inner[1] < high + 1e-3  # but for 2 in place of 1.96² / 2
        assert high - low < 1.25 * (inner[1] - inner[0])


def coverage(truth, intervals):
    return np.mean([low <= truth <= high for low, high in intervals])


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.97])
@pytest.mark.parametrize("prompts", [16, 200])
def test_wilsons_interval_covers_the_truth(share, prompts):
    counts = np.random.default_rng(1).binomial(prompts, share, size=2000).tolist()
    assert coverage(share, [wilson(right, prompts) for right in counts]) > 0.91


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("prompts", [16, 200])
@pytest.mark.parametrize("a, b", [(0.02, 0.98), (0.1, 0.9), (0.3, 0.3), (5, 0.2), (50, 50)])
def test_intervals_of_pass_at_k_cover_the_truth(a, b, prompts, k):
    """Prompts with success rates from a beta distribution, most of them near 0 or 1, or all about
    0.5.
    """
    rng, n = np.random.default_rng(1), 8
    counts = rng.binomial(n, rng.beta(a, b, size=(1000, prompts)))
    estimates = np.array([evaluate.pass_at_k(n, right, k) for right in range(n + 1)])[counts]
    truth = 1 - math.prod((b + i) / (a + b + i) for i in range(k))  # 1 − the mean of (1 − p)ᵏ
    assert coverage(truth, [mean_interval(values, OF_SHARES) for values in estimates]) > 0.93
    assert abs(estimates.mean() - truth) < 5 * estimates.std() / math.sqrt(estimates.size)


@pytest.mark.parametrize("prompts", [16, 200])
@pytest.mark.parametrize("worse, better", [(0, 0.02), (0, 0.9), (0.1, 0.1), (0.05, 0.3)])
def test_intervals_of_differences_cover_the_truth(worse, better, prompts):
    shares = [worse, 1 - worse - better, better]
    changes = np.random.default_rng(1).choice([-1, 0, 1], p=shares, size=(1000, prompts))
    assert (
        coverage(better - worse, [mean_interval(values, OF_DIFFERENCES) for values in changes])
        > 0.93
    )


# Evaluations


command = partial(helpers.command, module=evaluate)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a complete run, whose two updates are large."""
    directory = tmp_path_factory.mktemp("evaluate")
    task = f"{write_task(directory, LENIENT, 'lenient.py')}:Lenient"
    lengths = {"eval_size": 16, "max_response_tokens": 40}
    return train(directory, task=task, eval_interval=2, learning_rate=1e-3, **lengths)


def means_of(result):
    return {name: numbers[0] for name, numbers in result.items()}


def test_before_and_after_a_run_are_what_the_run_measured(run, capsys):
    assert command("--run", run, "-n", 4, "--k", 1, 3) == 0
    written = json.loads((run / "evaluation.json").read_text())
    first, *_, last = metrics(run)
    for label, record in (("before", first), ("after", last)):
        found = means_of(written["results"][label])
        for key in ("accuracy", "reward", "doubts", "response_length"):
            assert found[f"greedy {key}"] == pytest.approx(record[f"eval/{key}"], abs=1e-12)
        assert found["sampled reward"] == pytest.approx(0.5 + found["pass@1"])  # the task's reward
        assert 0 < found["sampled response_length/truncated"] <= 1
    assert first["eval/accuracy"] > 0.2 and first["eval/reward"] != last["eval/reward"]
    # Differences are those of the same prompts.
    before, after = (written["prompts"][label] for label in ("before", "after"))
    assert len(before["pass@3"]) == len(after["pass@3"]) == 16
    of_values = {"greedy accuracy", "pass@1", "pass@3", "greedy reward", "sampled doubts"}
    assert of_values < written["results"]["difference"].keys() == after.keys()
    for name, (mean, low, high) in written["results"]["difference"].items():
        changes = np.subtract(after[name], before[name])
        assert mean == pytest.approx(changes.mean())
        both = before[name] + after[name]
        width = np.ptp(both) if max(both) > 1 else 1  # rewards are up to 1.5
        assert (low, high) == pytest.approx(mean_interval(changes, (-width, width)))
    assert written["options"]["max_response_tokens"] == 40 and written["options"]["n"] == 4
    assert any(line.startswith("commit: ") for line in written["environment"])
    output = capsys.readouterr()
    assert "| before | after | difference |" in output.out and "after, sampled" in output.err


def test_an_unfinished_run_is_evaluated_at_its_checkpoint(run, tmp_path, capsys):
    extended = shutil.copytree(run, tmp_path / "extended")
    options = json.loads((run / "args.json").read_text()) | {"num_steps": 9}
    (extended / "args.json").write_text(json.dumps(options))
    (extended / "model" / "model.safetensors").unlink()  # of a shorter run: not to be looked at
    directory = tmp_path / "written"
    assert command("--run", extended, "-n", 1, "--write-model", directory) == 0
    results = json.loads((extended / "evaluation.json").read_text())["results"]
    for key in ("accuracy", "reward", "response_length"):
        (found, *_) = results["after step 2"][f"greedy {key}"]
        assert found == pytest.approx(metrics(run)[-1][f"eval/{key}"], abs=1e-12)
    expected = (run / "model" / "model.safetensors").read_bytes()
    assert (directory / "model.safetensors").read_bytes() == expected
    said = "has not made its 9 steps: this is its newest checkpoint, after step 2."
    assert said in capsys.readouterr().err


def test_a_checkpoint_of_an_adapter(tmp_path):
    lora = {"lora_rank": 4, "learning_rate": 3e-2}
    run = train(tmp_path, **lora, task=dense_task(tmp_path))
    assert command("--run", run, "--step", 2, "-n", 1) == 0
    # A file of its own: that of the final model stays.
    results = json.loads((run / "evaluation-step-2.json").read_text())["results"]
    (before, *_), (after, *_) = (of["greedy reward"] for of in list(results.values())[:2])
    first, _, last = metrics(run)
    assert (before, after) == pytest.approx((first["eval/reward"], last["eval/reward"]))
    assert before != after


def test_values_that_only_some_responses_have():
    greedy = [{"accuracy": 1, "reward": 2.0, "depth": 4.0}, {"accuracy": 0, "reward": -1.0}]
    before = evaluate.measure(greedy, greedy, 1, [1])
    assert before["greedy depth"] == pytest.approx([4.0, math.nan], nan_ok=True)
    more = [{**one, "depth": depth} for one, depth in zip(greedy, (7.0, 5.0), strict=True)]
    results = evaluate.summarise({"a": before, "b": evaluate.measure(more, more, 1, [1])})
    assert results["a"]["greedy depth"][0] == 4.0 and results["b"]["greedy depth"][0] == 6.0
    assert results["difference"]["greedy depth"][0] == 3.0  # of the one prompt that both have
    # 2 and −1, with two of each imagined
    assert results["a"]["greedy reward"][0] == 0.5
    assert results["a"]["greedy reward"][1:] == pytest.approx(
        mean_interval([2, -1], (-1, -1, 2, 2))
    )


def test_options_take_precedence_over_those_of_the_run(run, tmp_path):
    output = tmp_path / "evaluation.json"
    assert command("--run", run, "-n", 1, "--eval-size", 3, "--output", output) == 0
    written = json.loads(output.read_text())
    assert len(written["prompts"]["after"]["pass@1"]) == 3
    assert written["options"]["eval_size"] == 3 and written["options"]["task"].endswith(
        "lenient.py:Lenient"
    )


def test_a_model_on_a_task(tmp_path):
    output = tmp_path / "evaluation.json"
    model_and_task = ("--model", "tiny", "--task", "addition", "--eval-size", 16, "--threads", 1)
    assert command(*model_and_task, "-n", 4, "--seed", 3, "--output", output) == 0
    written = json.loads(output.read_text())
    (found,) = written["results"].values()
    # The same by other means: all prompts in one batch, graded one by one, and counted.
    tokenizer, model = load_tokenizer("tiny"), load_model("tiny", "", torch.device("cpu"))
    problems = load_task("addition", eval_size=16).problems("eval")
    prompts = [tokenizer(problem["prompt"])["input_ids"] for problem in problems]
    sampler = TransformersSampler(model, end_of_sequence_ids(model, tokenizer), 64, 1.0)
    samples = sampler.sample(prompts, 4, Plan(prompts, 16, 4, 1, 0, seed=3).seeds(1))
    texts = tokenizer.batch_decode(samples.responses, skip_special_tokens=True)
    right = [text.endswith(f"answer {problems[i // 4]['answer']}.") for i, text in enumerate(texts)]
    groups = [right[4 * p : 4 * p + 4] for p in range(16)]
    passed = {
        k: np.mean([any(c) for group in groups for c in itertools.combinations(group, k)])
        for k in (1, 2, 4)
    }
    assert {name: value for name, value in means_of(found).items() if "@" in name} == pytest.approx(
        {f"pass@{k}": value for k, value in passed.items()}
    )
    assert 0 < passed[1] < passed[2] < passed[4]
    cut = found["sampled response_length/truncated"]
    assert cut[0] == pytest.approx(np.mean(samples.truncated)) and cut[1] < cut[0] < cut[2]
    assert found["greedy accuracy"] == [0.0, 0.0, pytest.approx(wilson(0, 16)[1])]


def test_prompts_are_answered_in_their_order_however_they_are_split(monkeypatch, tmp_path):
    """With more prompts than are decoded at a time, every one is graded as what it is."""
    output = tmp_path / "evaluation.json"
    arguments = ("--model", "tiny", "--eval-size", 11, "--threads", 1, "-n", 2, "--output", output)

    def counts():
        assert command(*arguments) == 0
        (found,) = json.loads(output.read_text())["prompts"].values()
        return found["pass@1"]

    whole = counts()
    # Parts of 6 prompts, and of 3 with two responses each.
    monkeypatch.setattr(evaluate, "MOST_SEQUENCES", 6)
    assert counts() == whole and len(set(whole)) > 1


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        ([], "--model or --run"),
        (["--model", "tiny", "--run", "RUN"], "--model or --run"),
        (["--model", "tiny", "-n", 2, "--k", 1, 4], "--k 1 4 with --n 2"),
        (["--model", "tiny", "--k", 0], "--k 0"),
        (["--model", "tiny", "-n", 0], "--n 0"),
        (["--model", "/absent/model"], "--model /absent/model"),
        (["--model", "tiny", "--task", "additon"], "--task additon"),
        (["--model", "tiny", "--max-response-tokens", 100_000], "--max-response-tokens 100000"),
        (["--model", "tiny", "--temperature", 0], "--temperature 0"),
        (["--run", "/absent/run"], "--run /absent/run"),
        (["--run", "UNFINISHED"], "has no checkpoint yet: wait, or resume it"),
        (["--run", "RUN", "--step", 1], "has no such checkpoint; give 2."),
        (["--run", "RUN", "--write-model", "/tmp/m"], "model has that model already"),
        (["--run", "RUN", "--step", 2, "--write-model", "RUN"], "exists already"),
        (["--model", "tiny", "--step", 1], "--step and --write-model are about a run"),
        (["--run", "RUN", "--k", 9], "--k 9 with --n 8"),
        (["--run", "RUN", "--eval-size", 0], "--eval-size 0"),
    ],
)
def test_what_cannot_work_is_one_line_before_a_model_is_loaded(argv, names, run, tmp_path, capsys):
    (tmp_path / "args.json").write_text((run / "args.json").read_text())
    capsys.readouterr()
    assert command(*[{"RUN": run, "UNFINISHED": tmp_path}.get(word, word) for word in argv]) == 2
    error = capsys.readouterr().err
    (line,) = error.splitlines()
    assert (
        line.startswith("evaluate.py: error: ") and names in line and "Loading weights" not in error
    )
