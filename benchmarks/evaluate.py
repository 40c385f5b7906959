"""How good is a model at a task? Greedy accuracy and pass@k with 95 % confidence intervals; before
and after a run.

pass@k is the chance that at least one of k sampled responses to a prompt is right. If c of n ≥ k
responses are right,

    1 − C(n − c, k) / C(n, k)

estimates it without bias (Chen et al., arXiv 2107.03374). A response is right if its accuracy is 1;
where the task reports no accuracy, if its reward is 1. Intervals are about the prompts: what others
of the same kind could give. With --run, the difference after − before comes from pairs of answers
to the same prompt.

Usage:
    # Before and after a run, with the options of the run; options given here take precedence.
    python benchmarks/evaluate.py --run runs/NAME
    # Any model, on any task.
    python benchmarks/evaluate.py --model Qwen/Qwen2.5-0.5B-Instruct --task gsm8k \
        --data openai/gsm8k:main --eval-size 1319 --max-response-tokens 1024 -n 16
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

import grpo
from benchmarks.helpers import reporting
from benchmarks.helpers.reporting import OF_DIFFERENCES, OF_SHARES, mean_interval, wilson
from common import commandline
from common.environment import describe_environment
from common.errors import BadInput
from common.models import (
    check_context,
    choose_device,
    end_of_sequence_ids,
    load_model,
    load_tokenizer,
)
from common.options import option
from common.rollouts import make_rollouts
from common.sampling import Plan
from common.sampling.transformers import MOST_SEQUENCES, TransformersSampler
from common.sampling.verify import deliver, describe
from common.tasks import load_task
from common.tasks.problems import load_problems, means
from common.tasks.turns import environment_of
from common.weights import weights_of


@dataclass
class Args:
    model: str = ""
    """directory or hub name of the model to evaluate, or tiny, the bundled one"""
    run: str = ""
    """instead of a model, directory of a complete run: evaluates the model before and after it"""
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 8
    """responses sampled to each prompt"""
    k: tuple[int, ...] = ()
    """values of k for pass@k, none above n; empty for 1, 2, 4, … up to n"""
    output: Path | None = None
    """JSON file for the results; by default evaluation.json, in the run's directory or in runs/"""

    # The options below are as in the scripts.
    revision: str = grpo.Args.revision
    """of a hub model; empty for its main branch"""
    task: str = grpo.Args.task
    """addition, gsm8k, or path/to/file.py:ClassName for a task of your own"""
    data: str = grpo.Args.data
    """training data, from which some tasks hold problems out; empty for the task's own"""
    eval_data: str = grpo.Args.eval_data
    """held-out data; empty for the task's own"""
    eval_size: int = option(grpo.Args.eval_size, at_least=1)
    """number of held-out problems"""
    max_prompt_tokens: int = option(grpo.Args.max_prompt_tokens, at_least=1)
    """problems with longer prompts are left out"""
    max_response_tokens: int = option(grpo.Args.max_response_tokens, at_least=1)
    """longer responses are cut off here"""
    temperature: float = option(grpo.Args.temperature, above=0)
    """softmax temperature of the sampled responses"""
    engine: Literal["transformers", "vllm"] = grpo.Args.engine
    """what samples the responses"""
    device: str = grpo.Args.device
    """auto, cpu, cuda or cuda:N"""
    precision: Literal["auto", "float32", "bfloat16"] = grpo.Args.precision
    """of matrix products"""
    threads: int = option(grpo.Args.threads, at_least=0)
    """CPU threads; 0 means 2"""
    seed: int = option(grpo.Args.seed, at_least=0)
    """seed of sampling"""


def with_options_of_run(run):
    """The command line parsed again, with the options of a run as defaults. Raises `BadInput`."""
    path = Path(run) / "args.json"
    try:
        saved = json.loads(path.read_text())
        names = vars(Args()).keys() & vars(grpo.Args()).keys() - {"output"}
        defaults, script = Args(**{name: saved[name] for name in names}), saved["script"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"--run {run}: {path} holds no run ({error!r}); give the directory of a run."
        raise BadInput(message) from error
    if not (Path(run) / "model").exists():
        how = f"finish it with python {script}.py --resume {run}"
        raise BadInput(f"--run {run} has no trained model yet: {how}.")
    return tyro.cli(Args, default=defaults)


def pass_at_k(n, right, k):
    """Unbiased estimate of the chance that one of k responses is right, from n responses, so many
    of them right.
    """
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def answers(sampler, eval_set, group_size, seeds, label):
    """Graded responses to all prompts, `group_size` each, greedy ones if `seeds` is None: one dict
    per response.

    It has what the task reports, but accuracy is 1 or 0; and the length in tokens, and whether it
    was cut at the limit.
    """
    prompts, width, graded = eval_set.prompts, max(1, MOST_SEQUENCES // group_size), []
    parts = [slice(start, start + width) for start in range(0, len(prompts), width)]
    problems = eval_set.to_reply_to()
    asked = [problems and problems[part] for part in parts]
    if seeds is None:
        pairs = zip(parts, asked, strict=True)
        found = (sampler.greedy(prompts[part], problems) for part, problems in pairs)
    else:
        requests = [
            (prompts[part], seeds[part], problems)
            for part, problems in zip(parts, asked, strict=True)
        ]
        found = sampler.sample_many(requests, group_size)
    for part, samples in zip(parts, tqdm(found, label, len(parts), unit="batch"), strict=True):
        indices = np.arange(len(prompts))[part].repeat(group_size)
        grades, _ = eval_set.grade(indices, samples.responses, samples.logprobs)
        for grade, length, cut in zip(grades, samples.lengths, samples.truncated, strict=True):
            right = int(grade.get("accuracy", grade["reward"]) == 1)
            lengths = {"response_length": length, "response_length/truncated": cut}
            graded.append(grade | lengths | {"accuracy": right})
    return graded


def greedy_answers(models, task, how_many, max_response_tokens, precision="float32"):
    """What models (directories, with one tokenizer) answer to the first held-out problems of a
    task, for a table.

    Returns the problems, and for each model a list of (text, reward).
    """
    tokenizer, found = load_tokenizer(str(models[0])), []
    problems = load_problems(load_task(task, eval_size=how_many), "eval", tokenizer, 1024)
    for name in models:
        model = load_model(str(name), "", torch.device("cpu"))
        ends = end_of_sequence_ids(model, tokenizer)
        environment = environment_of([problems], (task, "", "", how_many), ends, 60.0)
        sampler = TransformersSampler(model, ends, max_response_tokens, 1.0, precision, environment)
        samples = sampler.greedy(problems.prompts, problems.to_reply_to())
        grades, texts = problems.grade(range(how_many), samples.responses, samples.logprobs)
        found.append([(text, grade["reward"]) for text, grade in zip(texts, grades, strict=True)])
    return problems.problems, found


def measure(greedy, sampled, n, ks):
    """What `answers` come to: {name: value of each prompt} for accuracies, {name: mean over
    responses} for the rest.
    """
    counts = np.reshape([one["accuracy"] for one in sampled], (-1, n)).sum(axis=1).tolist()
    values = {"greedy accuracy": [one["accuracy"] for one in greedy]}
    values |= {f"pass@{k}": [pass_at_k(n, right, k) for right in counts] for k in ks}
    averages = {}
    for kind, graded in (("greedy", greedy), ("sampled", sampled)):
        of_kind = {f"{kind} {key}": mean for key, mean in means(graded).items()}
        del of_kind[f"{kind} accuracy"]
        averages |= of_kind
    return values, averages


def summarise(measured):
    """From what `measure` returned for each model, {label: …}: {label: {name: (mean, low, high) or
    (mean,)}}.
    """
    results = {}
    for label, (values, averages) in measured.items():
        results[label] = {
            name: (np.mean(v), *mean_interval(v, OF_SHARES)) for name, v in values.items()
        }
        right = values["greedy accuracy"]
        results[label]["greedy accuracy"] = (np.mean(right), *wilson(sum(right), len(right)))
        results[label] |= {name: (mean,) for name, mean in averages.items()}
    if len(measured) == 2:
        before, after = (values for values, _ in measured.values())
        pairs = {name: np.subtract(after[name], before[name]) for name in after}
        results["difference"] = {
            n: (d.mean(), *mean_interval(d, OF_DIFFERENCES)) for n, d in pairs.items()
        }
    return results


def table(results):
    def cell(mean, *interval):
        return f"{mean:.3f}" + (" ({:.3f} to {:.3f})".format(*interval) if interval else "")

    names = next(iter(results.values()))  # the first model's: the difference has fewer
    rows = [
        [name, *(cell(*of[name]) if name in of else "" for of in results.values())]
        for name in names
    ]
    return reporting.table(["", *results], rows)


def main(args):
    if bool(args.model) == bool(args.run):
        raise BadInput("--model or --run is missing, or both are given: give one of the two.")
    run = args.run and Path(args.run)
    args = with_options_of_run(args.run) if run else args
    name, revision, n = args.model, args.revision, args.n
    models = {"before" if run else name: (name, revision)}
    if run:
        models["after"] = (str(run / "model"), "")
    ks = args.k or [2**i for i in range(max(0, n).bit_length())]
    if not all(1 <= k <= n for k in [n, *ks]):
        given = f"--k {' '.join(map(str, ks))} with --n {n}"
        raise BadInput(f"{given}: give numbers from 1 to n, and an n of at least 1.")
    device, precision = choose_device(args.device, args.precision, args.engine)
    tokenizer = load_tokenizer(name, revision)
    task = load_task(args.task, args.data, args.eval_data, args.eval_size)
    eval_set = load_problems(task, "eval", tokenizer, args.max_prompt_tokens)
    check_context(args, eval_set.prompts)

    plan = Plan(eval_set.prompts, len(eval_set), n, 1, 0, args.seed)  # for its seeds
    shared = vars(args).keys() & vars(grpo.Args()).keys()
    options = grpo.Args(**{name: getattr(args, name) for name in shared})
    options.serial = True  # the sampler in this process
    measured, sampler = {}, None
    for label, name_and_revision in models.items():
        model = load_model(*name_and_revision, device)
        if sampler is None:
            rollouts = make_rollouts(options, eval_set, eval_set, model, None, tokenizer, precision)
            sampler = rollouts.sampler
        tensors = {key: tensor.detach() for key, tensor in weights_of(model).items()}
        if args.engine == "vllm":  # which copies the weights, and must show that it uses them
            deliver(sampler, tensors, describe(model, 0, precision))
        else:
            sampler.use_weights(tensors)
        greedy = answers(sampler, eval_set, 1, None, f"{label}, greedy")
        sampled = answers(sampler, eval_set, n, plan.seeds(1), f"{label}, sampled")
        measured[label] = measure(greedy, sampled, n, ks)
        sampler.sleep()

    results = summarise(measured)
    work = f"{len(eval_set)} prompts, {n} sampled responses to each"
    print(f"{work}; in brackets, 95 % confidence intervals.\n")
    print(table(results))
    output = args.output or (run or reporting.RUNS) / "evaluation.json"
    described = {"options": vars(args) | {"output": str(output)}}
    described["environment"] = describe_environment().splitlines()
    values = {label: of_prompts for label, (of_prompts, _) in measured.items()}
    reporting.write_json(output, **described, results=results, prompts=values)
    print(f"\nThese numbers, and those of each prompt, are in {output}.")


if __name__ == "__main__":
    commandline.run(main, Args, __file__)
