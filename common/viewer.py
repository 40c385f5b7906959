"""A page of rollouts: what an update did with every token of a few responses, in one HTML file that
needs nothing else.

A run records rollouts.jsonl, and writes the page when it ends. Also while it runs, and for two runs
side by side:

    python -m common.viewer RUN_DIR             RUN_DIR/rollouts.html
    python -m common.viewer A B                 A/rollouts_vs_B.html, or --output FILE
"""

import json
import math
import sys
from pathlib import Path

import tyro

from common.commandline import BadInput

# of a recorded step: the first of its batch, so that runs with the same seed show the same prompts
GROUPS = 2
MOST_TOKENS = 16_384  # of a recorded step: each response may have an equal share of them
HELD_OUT = 4  # held-out problems whose answers are recorded at each evaluation
CURVES = {  # of the page; the first six are in curves.png, too
    "reward/mean": "reward",
    "kl/ref_k2": "KL to the initial policy",
    "entropy": "entropy (nats)",
    "response_length/mean": "response length (tokens)",
    "grad_norm": "gradient norm",
    "eval/reward": "held-out reward (greedy)",
    "ratio/clip_fraction": "clipped tokens (share)",
    "reward/zero_std_groups": "groups of equal rewards (share)",
}
SHOWN_OPTIONS = (
    "script",
    "task",
    "model",
    "seed",
    "prompts_per_step",
    "group_size",
    "sync_interval",
    "sync_offset",
)


def token_values(micro, rows, logprobs_BT, entropy_BT, ref_logprobs_BT):
    """Of each row of a micro-batch that is among `rows`, the values of its response's tokens: {row:
    {name: list}}.

    Call it after the backward pass. `gradient` is that of the loss with respect to the log-prob; it
    is missing where there was no backward pass, as `to_reference` is without a reference.
    """
    lp_BT = logprobs_BT.detach().double()
    values = {
        "logprob": lp_BT,
        "ratio": (lp_BT - micro.sampler_logprobs_BT.double()).exp(),
        "entropy": entropy_BT,
    }
    values |= {"gradient": logprobs_BT.grad} if logprobs_BT.requires_grad else {}
    values |= (
        {"to_reference": lp_BT - ref_logprobs_BT.double()} if ref_logprobs_BT is not None else {}
    )
    found = {}
    for place, row in enumerate(micro.rows):
        if row in rows:
            tokens = micro.mask_BT[place].nonzero().squeeze(1)[: MOST_TOKENS // len(rows)]
            found[row] = {
                name: values_BT[place, tokens].tolist() for name, values_BT in values.items()
            }
    return found


def group_records(step, batch, problems, rewards_PG, advantages, values, tokenizer):
    """The lines of rollouts.jsonl for the recorded groups of a step, as dicts; `values` are those
    of `token_values`.

    `push` is −N · gradient, with N the response tokens of the batch: in which direction, and how
    strongly, the update pushes a token's log-prob. It is 0 where the loss clipped the token, and
    None where the advantage is 0.
    """
    num_tokens, rewards, rows = sum(map(len, batch.responses)), rewards_PG.flatten(), sorted(values)
    for start in rows[:: rewards_PG.shape[1]]:
        responses = []
        for row in rows[start : start + rewards_PG.shape[1]]:
            tokens, numbers = (
                batch.responses[row],
                {"reward": rewards[row], "advantage": advantages[row]} | values[row],
            )
            numbers["push"] = [-num_tokens * value for value in numbers.pop("gradient", [])] or None
            texts = token_texts(tokenizer, tokens[: len(numbers["logprob"])])
            response = {"length": len(tokens), "truncated": batch.truncated[row], "tokens": texts}
            responses.append(response | {name: _rounded(value) for name, value in numbers.items()})
        yield {"step": step, **posed(problems[start]), "responses": responses}


def held_out_records(step, answers):
    """The lines of rollouts.jsonl for an evaluation; `answers` are triples of problem, greedy
    response and grade.
    """
    for problem, text, grade in answers[:HELD_OUT]:
        yield {"step": step, **posed(problem), "greedy": text, "reward": _rounded(grade["reward"])}


def posed(problem):
    """A problem's prompt and, if it has one, the answer that is expected, as text."""
    answer = problem.get("answer")
    return {"prompt": problem["prompt"], "answer": answer if answer is None else str(answer)}


def token_texts(tokenizer, ids):
    """The text of each token, special ones included; joined, they are the decoded response.

    Of tokens that share a character, as bytes of an emoji do, the last has it and the others are
    empty.
    """
    texts, start, read = (
        [],
        0,
        0,
    )  # ids[start:read] are decoded again, since a token's space depends on the one before
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[start:end])
        if text.endswith("\ufffd") and end < len(ids):
            texts.append("")
        else:
            texts.append(text[len(tokenizer.decode(ids[start:read])) :])
            start, read = read, end
    return texts


def _rounded(value):
    """A number, or each of a list, to three significant digits; None for what is not finite."""
    if value is None or isinstance(value, list):
        return value and [_rounded(one) for one in value]
    return float(f"{value:.3g}") + 0.0 if math.isfinite(value) else None  # (no −0)


def page(run_dirs):
    """The page of some runs, as text. Raises `BadInput` where a directory holds no run with
    recorded rollouts.
    """
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    # Without a "<", nothing in the data can end the element that holds it.
    data = json.dumps([_run(Path(run_dir)) for run_dir in run_dirs]).replace("<", "\\u003c")
    return template.replace("RUNS_AS_JSON", data)


def _run(directory):
    try:
        args = json.loads((directory / "args.json").read_text())
        metrics, rollouts = (
            _lines(directory / name) for name in ("metrics.jsonl", "rollouts.jsonl")
        )
    except (OSError, ValueError) as error:
        how = "give the directory of a run that was made with a --rollouts-interval above 0"
        raise BadInput(f"{directory} has no rollouts to show ({error}): {how}.") from error
    return {
        "name": directory.resolve().name,
        "options": {
            name: str(args.get(name)).rpartition("/")[2] for name in SHOWN_OPTIONS
        },  # not whole paths
        "labels": CURVES,
        "steps": [record["step"] for record in metrics],
        "curves": {
            key: [_rounded(record.get(key)) for record in metrics] for key in [*CURVES, "lag"]
        },
        "groups": [record for record in rollouts if "responses" in record],
        "greedy": [record for record in rollouts if "greedy" in record],
    }


def _lines(path):
    """The records of a JSONL file; a last line that the run is still writing is left out."""
    return [json.loads(line) for line in path.read_text().rpartition("\n")[0].splitlines()]


def main(runs: tyro.conf.Positional[tuple[Path, ...]], output: Path | None = None):
    """Write the page of one run, or of two side by side, to `output`; without it, into the first
    run's directory.
    """
    if len(runs) not in (1, 2):
        raise BadInput(f"{len(runs)} runs do not fit on a page: give one run's directory, or two.")
    output = output or runs[0] / (
        "_vs_".join(["rollouts", *(run.resolve().name for run in runs[1:])]) + ".html"
    )
    output.write_text(page(runs), encoding="utf-8")
    print(f"Open {output} in a browser.")


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except (BadInput, OSError) as error:
        print(f"viewer.py: error: {error}", file=sys.stderr)
        sys.exit(2)
