"""A short description of a trained model, for `model/README.md`: what it is, and where from."""

import os
import re
from pathlib import Path

from common.models import TINY_MODEL


def model_card(run_dir, script, args, command, records):
    """The card, as Markdown, of the model that a run has trained.

    `args` is a dict of the run's options, `command` repeats it, `records` are those of
    metrics.jsonl.
    """
    evaluations = [record for record in records if "eval/reward" in record]
    before, after = evaluations[0], evaluations[-1]
    commit = re.search(r"^commit: (.*)$", (run_dir / "environment.txt").read_text(), re.MULTILINE)
    base = args["model"]
    on_the_hub = base != TINY_MODEL and not os.path.isdir(base)
    named = "the tiny model bundled with that code" if base == TINY_MODEL else f"`{base}`"
    lines = [
        "---",
        *([f"base_model: {base}"] if on_the_hub else []),
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "---",
        "",
        f"# {run_dir.name}",
        "",
        f"Trained by `{script}.py` (commit {commit[1]}) for {after['step']} steps on the task "
        f"`{Path(args['task']).name}`, from {named}.",
        "",
        f"| held-out problems, greedy | before | after step {after['step']} |",
        "|---|---|---|",
        *(
            f"| {key.removeprefix('eval/')} | {before[key]:.4g} | {after[key]:.4g} |"
            for key in before
            if key.startswith("eval/") and key in after
        ),
        "",
        "To repeat it, with the options that differ from the defaults:",
        "",
        "```bash",
        command,
        "```",
    ]
    return "\n".join(lines) + "\n"
