"""Keeps generated parts of the READMEs fresh: `python -m tests.readme` rewrites them,
`test_readme.py` checks them.

- References to code, written as [file:line](link) `fragment`: the line is the first one that
  contains the fragment.
- Numbers, written as <!--=name-->12<!--/-->: `NUMBERS` computes them from the results of a
  benchmark, or from the code.
- Blocks between <!-- generated: name --> and <!-- end -->: `BLOCKS` makes them.

A result that is missing, or has another form than expected, raises an error instead of leaving the
old text in place.
"""

import difflib
import inspect
import json
import os
import re
import textwrap
from pathlib import Path

import grpo
from benchmarks.helpers.reporting import SPREAD
from benchmarks.models.chat_tasks import Guess
from benchmarks.variants import CISPO
from common import checkpoints, logprobs, recording, runlog, watch
from common.sampling import graphs, transformers

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = tuple(ROOT / name for name in ("README.md", "common/README.md", "benchmarks/README.md"))
REFERENCE = re.compile(r"\[([\w/\\]+\.py):\d+\]\([^)]*\) `([^`]+)`")
NUMBER = re.compile(r"<!--=([\w.]+)-->.*?<!--/-->")
BLOCK = re.compile(r"<!-- generated: ([^>]+) -->\n.*?<!-- end -->", re.DOTALL)
FENCE = re.compile(
    r"^ *# --- algorithm ---\n(.*?)^ *# --- end algorithm ---\n", re.DOTALL | re.MULTILINE
)


def refresh(path):
    """The text of a document with its generated parts made anew. Raises ValueError or KeyError
    where that fails.
    """
    text = REFERENCE.sub(lambda match: _reference(path, *match.groups()), path.read_text())
    text = NUMBER.sub(lambda match: f"<!--={match[1]}-->{NUMBERS[match[1]]()}<!--/-->", text)
    return BLOCK.sub(
        lambda match: f"<!-- generated: {match[1]} -->\n\n{BLOCKS[match[1]]()}\n\n<!-- end -->",
        text,
    )


def _reference(path, shown, fragment):
    name = shown.replace("\\", "")
    for number, line in enumerate((ROOT / name).read_text().splitlines(), start=1):
        if fragment in line:
            link = os.path.relpath(ROOT / name, path.parent)
            return f"[{shown}:{number}]({link}#L{number}) `{fragment}`"
    raise ValueError(f"{path.name} refers to `{fragment}` in {name}, where no line contains it.")


# Blocks


def code_of_fences(script):
    """The code between the fences of a script, as lines: without docstrings, comments of their own
    and blank lines.
    """
    _, *fences = FENCE.findall((ROOT / script).read_text())
    code = re.sub(r'^ *""".*?"""\n', "", "\n".join(fences), flags=re.DOTALL | re.MULTILINE)
    return [
        line + "\n"
        for line in code.splitlines()
        if line.strip() and not line.lstrip().startswith("#")
    ]


def code_diff(one, other):
    """What differs between two scripts, docstrings and comments aside.

    Functions that differ are shown whole, those that do not are left out.
    """
    lines = list(difflib.unified_diff(code_of_fences(one), code_of_fences(other), n=100))[3:]
    text = "".join("\n" + line if line.startswith(" def ") else line for line in lines)
    parts = [part for part in text.split("\n\n") if re.search(r"^[-+]", part, re.MULTILINE)]
    return "```diff\n" + "\n\n".join(parts).rstrip() + "\n```"


def code_of_variant(variant):
    """The body of a class in variants.py, without docstrings."""
    body = textwrap.dedent(inspect.getsource(variant).partition("\n")[2])
    code = re.sub(r'^ *""".*?"""\n+', "", body, flags=re.DOTALL | re.MULTILINE).replace(
        "\ndef ", "\n\n\ndef "
    )
    return f"```python\n{code.rstrip()}\n```"


def code_of_task(task):
    """A class of chat_tasks.py, without its docstring."""
    code = re.sub(
        r'^    """.*?"""\n\n', "", inspect.getsource(task), flags=re.DOTALL | re.MULTILINE
    )
    return f"```python\n{code.rstrip()}\n```"


def default_run():
    """The table of the default run: means over seeds."""
    rows = _json("default_run/default_run.json")["rows"]
    lines = [f"| mean of {len(rows)} seeds | first 5 steps | last 10 steps |", "|---|---|---|"]
    for label, key, digits in (
        ("reward", "reward/mean", 2),
        ("response length (tokens)", "response_length/mean", 1),
        ("entropy (nats per token)", "entropy", 3),
        ("KL to the initial policy", "kl/ref_k2", 3),
        ("held-out accuracy, greedy, before and after training", "eval/accuracy", 3),
    ):
        start, end = (_mean(row[f"{key} {when}"] for row in rows) for when in ("start", "end"))
        lines.append(f"| {label} | {start:.{digits}f} | {end:.{digits}f} |")
    return "\n".join(lines)


def worked_out():
    """Two answers of the hasty model, before and after training."""
    rows = re.findall(
        r"^\| (Q:.*?) \| (.*?) \| (.*?) \|$",
        _section("sync_modes/report.md", "work things"),
        re.MULTILINE,
    )
    answers = [
        f"{prompt}\nbefore training:  {one}\nafter training:   {other}"
        for prompt, one, other in rows[:2]
    ]
    return "\n".join(["```", *answers, "```"])


def what_fits():
    """Memory of a run on one GPU by model, and the smallest card that it fits on."""
    models = {  # billions of parameters; layers, hidden size, that of the MLP and of the keys
        "0.5B": (0.494, 24, 896, 4864, 128),
        "1.5B": (1.544, 28, 1536, 8960, 256),
        "3B": (3.086, 36, 2048, 11008, 256),
        "7B": (7.616, 28, 3584, 18944, 512),
        "14B": (14.77, 48, 5120, 13824, 1024),
    }

    def card(gigabytes):
        fitting = [f"{size} GB" for size in (24, 48, 80, 141) if gigabytes + 4 <= size]
        return fitting[0] if fitting else "none of these: several"

    lines = ["| Qwen2.5 | all weights | card | without a reference | LoRA, rank 32 | card |"]
    lines.append("|---|---|---|---|---|---|")
    for model, (billions, layers, hidden, mlp, keys) in models.items():
        whole, without = 22 * billions, 18 * billions
        # Inputs and outputs of the linear layers: queries and output; keys and values; the MLP's
        adapter = 32 * layers * (2 * 2 * hidden + 2 * (hidden + keys) + 3 * (hidden + mlp))
        lora = 2 * billions + 16 * adapter / 1e9
        cells = [f"{whole:.0f} GB", card(whole), f"{without:.0f} GB", f"{lora:.0f} GB", card(lora)]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


def token_cost():
    """What the CPU and the memory have to do for a token, on both paths."""
    return "\n".join(line for line in _text("token_cost.md").splitlines() if line.startswith("|"))


BLOCKS = {
    "diff rec_oneside_nois.py red_weight.py": lambda: code_diff(
        "rec_oneside_nois.py", "red_weight.py"
    ),
    "CISPO": lambda: code_of_variant(CISPO),
    "Guess": lambda: code_of_task(Guess),
    "default run": default_run,
    "worked out": worked_out,
    "token cost": token_cost,
    "what fits": what_fits,
}


# Numbers


def speed_against_trl(threads, directory="step_time"):
    """Of training steps with our reference KL on and TRL's off."""
    rows = _json(f"{directory}/step_time.json")["summary"]
    (speed,) = (
        row["speed_relative_to_trl"]
        for row in rows
        if (row["threads"], row["variant"]) == (threads, "grpo.py, reference KL")
    )
    return f"{speed:#.2g}"


def run_against_trl(kind):
    """TRL's time for a whole run, divided by ours."""
    return f"{_json('against_trl/against_trl.json')[kind]['whole_run']:.1f}"


def accuracy_with(engine):
    runs = [run for run in _json("engines/engines.json")["runs"] if run["engine"] == engine]
    return f"{_mean(run['accuracy at the end'] for run in runs):.3f}"


def speed_up_of_overlap():
    """Time of Sync (1) over that of One-Step Off-Policy, mean over seeds."""
    section = _section("sync_modes/report.md", "Speed-up over")
    (speed_up,) = re.findall(
        r"^\| One-Step Off-Policy \| [\d.]+ \| ([\d.]+) ", section, re.MULTILINE
    )
    return speed_up


def speed_up_over_two_threads():
    """The same, where Sync (1) has two threads as well."""
    section = _section("sync_modes/report.md", "Where the time goes")
    (speed_up,) = re.findall(r"^([\d.]+) .* times the speed of that", section, re.MULTILINE)
    return speed_up


def observations(report):
    """How many observations about the published figure hold, as "7 of 13"."""
    pattern = rf"^\| [^|]* \| (yes|no|{SPREAD}) \|"
    answers = re.findall(pattern, _section(report, "published figure"), re.MULTILINE)
    if not answers:
        raise ValueError(f"{report} does not say yes or no to anything")
    return f"{answers.count('yes')} of {len(answers)}"


def sampling_ratio():
    (ratio,) = re.findall(
        r"^\| `TransformersSampler`.*\| ([\d.]+) \|$", _text("sampling.md"), re.MULTILINE
    )
    return ratio


def peak_memory(ours):
    """Of the largest training step measured, in GiB: with this repository's log-probs, or with the
    plain expression.
    """
    (peak,) = (
        step["peak_bytes"]
        for step in _largest_step()
        if (step["path"] == "this repository") == ours
    )
    return f"{peak / 2**30:.1f}"


def _largest_step():
    steps = _json("logprob_kernels/results.json")["step"]
    return [step for step in steps if step["N"] == max(step["N"] for step in steps)]


def default(name):
    """The default of an option, which is the same in all three scripts."""
    return f"{getattr(grpo.Args(), name):g}"


def _rows():
    return _json("default_run/default_run.json")["rows"]


def on_gpu(contestant, live=1.0):
    """Milliseconds and MiB of log-probs and gradients on a GPU, peaked logits left aside."""
    cases = _json("on_gpu/logprobs/results.json")["gpu"]["cases"]
    (case,) = (case for case in cases if (case["logits"], case["live"]) == ("flat", live))
    row = case["contestants"][contestant]
    return f"{1e3 * min(row['seconds']):.0f} ms", f"{row['extra_memory_bytes'] / 2**20:,.0f} MiB"


NUMBERS = {
    "gpu.ours": lambda: " and ".join(on_gpu("this repository")),
    "gpu.plain": lambda: " and ".join(on_gpu("plain")),
    "gpu.compiled": lambda: " and ".join(on_gpu("torch.compile of plain")),
    "gpu.trl": lambda: " and ".join(on_gpu("TRL")),
    "gpu.half": lambda: (
        f"{on_gpu('this repository', 0.5)[0]} against TRL's {on_gpu('TRL', 0.5)[0]}"
    ),
    "gpu.step_time": lambda: speed_against_trl(8, "on_gpu/step_time"),
    "num_steps": lambda: default("num_steps"),
    "batch_size": lambda: str(grpo.Args.prompts_per_step * grpo.Args.group_size),
    "sampler_timeout": lambda: default("sampler_timeout"),
    "most_sequences": lambda: str(transformers.MOST_SEQUENCES),
    "cache_share": lambda: f"{graphs.CACHE_SHARE:.0%}".rstrip("%"),
    "kept_share": lambda: f"{graphs.KEPT_SHARE:.0%}".rstrip("%"),
    "large_vocabulary": lambda: f"{logprobs.LARGE_VOCABULARY:,}",
    "most_skipped": lambda: str(watch.MOST_SKIPPED_UPDATES),
    "completions": lambda: str(runlog.COMPLETIONS_PER_STEP),
    "rollouts_interval": lambda: default("rollouts_interval"),
    "rollouts.groups": lambda: str(recording.GROUPS),
    "rollouts.held_out": lambda: str(recording.HELD_OUT),
    "rollouts.most_tokens": lambda: f"{recording.MOST_TOKENS:,}",
    "rollouts.share": lambda: (
        f"{recording.MOST_TOKENS // (recording.GROUPS * grpo.Args.group_size):,}"
    ),
    "checkpoints": lambda: str(checkpoints.KEEP),
    "default_run.seconds": lambda: f"{_mean(row['seconds'] for row in _rows()):.0f}",
    "pretrained.step_time": lambda: speed_against_trl(2, "pretrained/step_time"),
    "step_time.1": lambda: speed_against_trl(1),
    "step_time.2": lambda: speed_against_trl(2),
    "against_trl.default": lambda: run_against_trl("default"),
    "against_trl.extraction": lambda: run_against_trl("Extraction"),
    "engines.transformers": lambda: accuracy_with("transformers"),
    "engines.vllm": lambda: accuracy_with("vllm"),
    "sync_modes.speed_up": speed_up_of_overlap,
    "sync_modes.two_threads": speed_up_over_two_threads,
    "sync_modes.observations": lambda: observations("sync_modes/report.md"),
    "algorithms.observations": lambda: observations("algorithms/report.md"),
    "overlap.worst": lambda: (
        f"{max(run['ratio'] for run in _json('overlap/overlap.json')['runs'].values()):.2f}"
    ),
    "sampling.ratio": sampling_ratio,
    "logprobs.rows": lambda: f"{_largest_step()[0]['N']:,}",
    "logprobs.peak": lambda: peak_memory(ours=True),
    "logprobs.plain_peak": lambda: peak_memory(ours=False),
}


def _text(name):
    return (RESULTS / name).read_text()


def _json(name):
    return json.loads(_text(name))


def _section(report, words):
    """The one section of a report with these words in its title."""
    (section,) = (
        part for part in _text(report).split("\n## ")[1:] if words in part.partition("\n")[0]
    )
    return section


def _mean(values):
    values = list(values)
    return sum(values) / len(values)


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(refresh(document))
