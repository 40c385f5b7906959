"""How good is a model at a task? Greedy accuracy, pass@k, reward and what else a task reports,
with 95 % confidence intervals; before and after a run, or up to one of its checkpoints.

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
    # Of an unfinished run, the newest checkpoint, or that of a step; and its model as a directory.
    python benchmarks/evaluate.py --run runs/NAME --step 50 --write-model models/after-50
    # Any model, on any task.
    python benchmarks/evaluate.py --model Qwen/Qwen2.5-0.5B-Instruct --task gsm8k \
        --data openai/gsm8k:main --eval-size 1319 --max-response-tokens 1024 -n 16
"""

import json
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

import grpo
from benchmarks.helpers import reporting
from benchmarks.helpers.reporting import mean_interval, wilson
from common import commandline
from common.checkpoints import checkpoint_of, load_weights
from common.environment import describe_environment
from common.errors import BadInput
from common.models import (
    check_context,
    choose_device,
    end_of_sequence_ids,
    load_model,
    load_policy,
    load_tokenizer,
    save_model,
)
from common.options import option
from common.rollouts import make_rollouts
from common.runfiles import is_complete
from common.sampling import Plan
from common.sampling.transformers import MOST_SEQUENCES, TransformersSampler
from common.sampling.verify import deliver, describe
from common.tasks import load_task
from common.tasks.problems import load_problems
from common.tasks.turns import environment_of
from common.weights import weights_of


@dataclass
class Args:
    model: str = ""
    """directory or hub name of the model to evaluate, or tiny, the bundled one"""
    run: str = ""
    """instead of a model, directory of a run: evaluates the model before and after it; of an
    unfinished one, its newest checkpoint"""
    step: int | None = None
    """with --run: the checkpoint after this step instead of the trained model"""
    write_model: Path | None = None
    """with --run: write the model of the checkpoint into this directory, for transformers"""
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 8
    """responses sampled to each prompt"""
    k: tuple[int, ...] = ()
    """values of k for pass@k, none above n; empty for 1, 2, 4, … up to n"""
    output: Path | None = None
    """JSON file for the results; by default evaluation.json in the run's directory or in runs/, and
    evaluation-step-S.json with --step S"""

    # The options below are as in the scripts.
    revision: str = grpo.Args.revision
    """of a hub model; empty for its main branch"""
    task: str = grpo.Args.task
    """addition, calculator, gsm8k, or path/to/file.py:ClassName for a task of your own"""
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
    """The command line parsed again, with the options of a run as defaults; and these options.

    Raises `BadInput`.
    """
    path = Path(run) / "args.json"
    try:
        saved = json.loads(path.read_text())
        names = vars(Args()).keys() & vars(grpo.Args()).keys() - {"output"}
        defaults = Args(**{name: saved[name] for name in names})
        of_run = grpo.Args(**{name: saved[name] for name in vars(grpo.Args()) if name in saved})
        of_run.replicas, of_run.gradient_checkpointing = 1, False  # those were for training
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"--run {run}: {path} holds no run ({error!r}); give the directory of a run."
        raise BadInput(message) from error
    return tyro.cli(Args, default=defaults), of_run


def models_of_run(args, of_run):
    """The models before and after a run: {label: function that loads one}. Raises `BadInput`."""
    run = Path(args.run)
    before = partial(load_model, of_run.model, of_run.revision)
    if args.step is None and is_complete(run, of_run.num_steps):
        if args.write_model:
            raise BadInput(f"--write-model: {run}/model has that model already; leave it out.")
        return {"before": before, "after": partial(load_model, str(run / "model"), "")}
    if args.write_model and args.write_model.exists():
        raise BadInput(f"--write-model {args.write_model} exists already: give another directory.")
    step, path = checkpoint_of(run, args.step)
    if args.step is None:
        what = f"{run} has not made its {of_run.num_steps} steps"
        print(f"{what}: this is its newest checkpoint, after step {step}.", file=sys.stderr)

    def after(device):
        policy = load_policy(of_run, device)
        load_weights(policy, path)
        if args.write_model:
            save_model(policy, load_tokenizer(of_run.model, of_run.revision), args.write_model)
        return policy

    return {"before": before, f"after step {step}": after}


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
    """What `answers` come to: {name: value of each prompt}, of sampled responses the mean.

    A value that the task did not report of any response to a prompt is NaN.
    """
    counts = np.reshape([one["accuracy"] for one in sampled], (-1, n)).sum(axis=1).tolist()
    values = {"greedy accuracy": [one["accuracy"] for one in greedy]}
    values |= {f"pass@{k}": [pass_at_k(n, right, k) for right in counts] for k in ks}
    for kind, graded, of_prompt in (("greedy", greedy, 1), ("sampled", sampled, n)):
        for key in sorted({key for one in graded for key in one} - {"accuracy"}):
            found = np.reshape([one.get(key, math.nan) for one in graded], (-1, of_prompt))
            means = np.ma.masked_invalid(found).mean(axis=1).filled(math.nan)
            values[f"{kind} {key}"] = means.tolist()
    return values


def summarise(measured):
    """From what `measure` returned for each model, {label: …}: {label: {name: (mean, low, high)}}.

    Intervals count with values at both ends of the possible range. That is 0 to 1, or, for what is
    not in it, from the smallest to the largest value there is.
    """
    results = {label: {} for label in measured}
    names = dict.fromkeys(name for values in measured.values() for name in values)
    ends = {name: range_of([v.get(name, []) for v in measured.values()]) for name in names}
    for label, values in measured.items():
        for name in values:
            present = [value for value in values[name] if not math.isnan(value)]
            imagined = [*ends[name], *ends[name]]
            results[label][name] = (np.mean(present), *mean_interval(present, imagined))
        right = values["greedy accuracy"]
        results[label]["greedy accuracy"] = (np.mean(right), *wilson(sum(right), len(right)))
    if len(measured) == 2:
        before, after = measured.values()
        results["difference"] = {}
        for name in (name for name in after if name in before):
            pairs = np.subtract(after[name], before[name])
            pairs = pairs[~np.isnan(pairs)]
            width = ends[name][1] - ends[name][0]
            if pairs.size:
                interval = mean_interval(pairs, (-width, width))
                results["difference"][name] = (pairs.mean(), *interval)
    return results


def range_of(lists):
    """0 and 1, if all numbers in some lists lie between them; else the smallest and the largest."""
    low, high = np.nanmin(np.concatenate(lists)), np.nanmax(np.concatenate(lists))
    return (0.0, 1.0) if low >= 0 and high <= 1 else (float(low), float(high))


def table(results):
    def cell(*numbers):
        mean, low, high = (f"{number + 0.0:.3f}" for number in numbers)  # no −0
        return f"{mean} ({low} to {high})"

    names = dict.fromkeys(name for of in results.values() for name in of)
    rows = [
        [name, *(cell(*of[name]) if name in of else "" for of in results.values())]
        for name in names
    ]
    return reporting.table(["", *results], rows)


def main(args):
    if bool(args.model) == bool(args.run):
        raise BadInput("--model or --run is missing, or both are given: give one of the two.")
    if not args.run and (args.step is not None or args.write_model):
        raise BadInput("--step and --write-model are about a run: give --run, or leave them out.")
    if args.run:
        args, of_run = with_options_of_run(args.run)
        models = models_of_run(args, of_run)
    else:
        models = {args.model: partial(load_model, args.model, args.revision)}
    n = args.n
    ks = args.k or [2**i for i in range(max(0, n).bit_length())]
    if not all(1 <= k <= n for k in [n, *ks]):
        given = f"--k {' '.join(map(str, ks))} with --n {n}"
        raise BadInput(f"{given}: give numbers from 1 to n, and an n of at least 1.")
    eval_set, measured = evaluate(args, models, n, ks)

    results = summarise(measured)
    work = f"{len(eval_set)} prompts, {n} sampled responses to each"
    print(f"{work}; in brackets, 95 % confidence intervals.\n")
    print(table(results))
    file = "evaluation.json" if args.step is None else f"evaluation-step-{args.step}.json"
    output = args.output or (Path(args.run) if args.run else reporting.RUNS) / file
    described = {"options": {name: _as_json(value) for name, value in vars(args).items()}}
    described["options"]["output"] = str(output)
    described["environment"] = describe_environment().splitlines()
    prompts = {
        label: {name: [_as_json(value) for value in of[name]] for name in of}
        for label, of in measured.items()
    }
    reporting.write_json(output, **described, results=results, prompts=prompts)
    print(f"\nThese numbers, and those of each prompt, are in {output}.")


def _as_json(value):
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and math.isnan(value) else value


def evaluate(args, models, n, ks):
    """The held-out problems, and what each model comes to on them, {label: what `measure` returns}.

    `models` are functions that load one to a device. Raises `BadInput`.
    """
    device, precision = choose_device(args.device, args.precision, args.engine)
    tokenizer = load_tokenizer(args.model, args.revision)
    task = load_task(args.task, args.data, args.eval_data, args.eval_size)
    eval_set = load_problems(task, "eval", tokenizer, args.max_prompt_tokens)
    check_context(args, eval_set.prompts)
    plan = Plan(eval_set.prompts, len(eval_set), n, 1, 0, args.seed)  # for its seeds
    shared = vars(args).keys() & vars(grpo.Args()).keys()
    options = grpo.Args(**{name: getattr(args, name) for name in shared})
    options.serial = True  # the sampler in this process
    measured, sampler = {}, None
    for label, load in models.items():
        model = load(device=device)
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
    return eval_set, measured


if __name__ == "__main__":
    commandline.run(main, Args, __file__)
