"""A page of rollouts: what an update did with every token of a few responses, in one HTML file.

A run records rollouts.jsonl, and writes the page when it ends. To write one while the run goes on,
or one that shows two runs side by side:

    python -m common.viewer RUN_DIR             RUN_DIR/rollouts.html
    python -m common.viewer A B                 A/rollouts_vs_B.html, or --output FILE
"""

import json
import sys
from pathlib import Path

import tyro

from common.curves import CURVES, read_lines, read_metrics
from common.errors import BadInput
from common.recording import rounded

SHOWN_OPTIONS = [
    "script",
    "task",
    "model",
    "seed",
    "prompts_per_step",
    "group_size",
    "updates_per_batch",
    "sync_interval",
    "sync_offset",
]


def page(run_dirs):
    """The page of some runs, as text.

    Raises `BadInput` where a directory holds no run with recorded rollouts.
    """
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    # Without a "<", nothing in the data can end the element that holds it.
    data = json.dumps([_run(Path(run_dir)) for run_dir in run_dirs])
    return template.replace("RUNS_AS_JSON", data.replace("<", "\\u003c"))


def _run(directory):
    """What the page shows of a run, as a dict of what JSON can express."""
    try:
        args = json.loads((directory / "args.json").read_text())
        metrics = read_metrics(directory)
        rollouts = read_lines(directory / "rollouts.jsonl")
    except (OSError, ValueError) as error:
        raise BadInput(
            f"{directory} has no rollouts to show ({error}): "
            "give the directory of a run that was made with a --rollouts-interval above 0."
        ) from error
    # Of paths, the last part is enough.
    options = {name: str(args.get(name)).rpartition("/")[2] for name in SHOWN_OPTIONS}
    curves = {key: [rounded(record.get(key)) for record in metrics] for key in [*CURVES, "lag"]}
    return {
        "name": directory.resolve().name,
        "options": options,
        "labels": CURVES,
        "steps": [record["step"] for record in metrics],
        "curves": curves,
        "groups": [record for record in rollouts if "responses" in record],
        "greedy": [record for record in rollouts if "greedy" in record],
    }


def main(runs: tyro.conf.Positional[tuple[Path, ...]], output: Path | None = None):
    """Write the page of one run, or of two side by side.

    It goes to `output`; without that, into the first run's directory.
    """
    if len(runs) not in (1, 2):
        what = f"{len(runs)} runs do not fit on a page"
        how = "give one run's directory, or two; python -m common.compare plots any number"
        raise BadInput(f"{what}: {how}.")
    if output is None:
        others = [run.resolve().name for run in runs[1:]]
        output = runs[0] / ("_vs_".join(["rollouts", *others]) + ".html")
    output.write_text(page(runs), encoding="utf-8")
    print(f"Open {output} in a browser.")


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except (BadInput, OSError) as error:
        print(f"viewer.py: error: {error}", file=sys.stderr)
        sys.exit(2)
