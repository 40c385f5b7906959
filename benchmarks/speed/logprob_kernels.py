"""Time, memory and error of log-probs from hidden states: this repository, other libraries, and the
plain expression.

    # The other libraries; the last line is for Liger and quack on Hopper.
    pip install -r benchmarks/requirements.txt
    pip install --no-deps liger-kernel==0.8.5 verl==0.9.1 quack-kernels==0.6.1 \
        cut-cross-entropy==25.1.1
    pip install nvidia-cutlass-dsl==4.6.0 apache-tvm-ffi torch-c-dlpack-ext einops

    # All that this machine can run, in ten minutes on two idle cores; or a part of it; or a try.
    python benchmarks/speed/logprob_kernels.py
    python benchmarks/speed/logprob_kernels.py --parts gpu --hidden-sizes 2048
    python benchmarks/speed/logprob_kernels.py --parts cpu --vocabulary 9000 --rows 64 --output DIR

Every contestant gets hidden states h [N, H], head weight W [V, H] and targets y [N], and returns
log-probs; then gradients to h and W are made from the same upstream gradient, 1 for a share f of
the rows (live ones) and 0 for the others. They take turns in one process, and a contestant's time
is the least of its rounds: disturbances only add.

- Extra memory: the peak while it runs, less what was there before, and less both gradients, which
  all must return.
- Error: of the gradients, in relative Frobenius norm, against float64 on the same rounded inputs.
- Floor: (2 + 6f)·N·H·V operations, or what else a contestant has to do, at the rate that this
  machine reaches on a plain product of bf16 matrices; next to a time stands its ratio to the floor.

Flat logits: W of the size of an initialised model's; peaked: entropies of about one nat, as trained
models have them. Capped logits, as Gemma's, are peaked ones, for those that know a cap. What needs
a GPU is marked "not run" on a machine without one. A peer that is not installed, or that does not
run here, is listed with the reason. Writes `results/logprob_kernels/`, after each part and each
size on a GPU, so that a crash loses nothing that was measured before.
"""

import ctypes
import gc
import importlib.util
import itertools
import os
import sys
import time
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch
import tyro
from transformers import AutoModelForCausalLM, Qwen2Config

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.helpers import reporting
from common.batching import MicroBatch
from common.environment import describe_environment
from common.kernels.cpu import SlicedLogprobs, plain_logprobs_and_entropy
from common.logprobs import LARGE_VOCABULARY, logprobs_and_entropy, token_logprobs
from common.metrics import peak_bytes

PEERS = ("trl", "liger-kernel", "verl", "quack-kernels", "cut-cross-entropy", "triton")
PARTS = ("gpu", "step", "cpu", "crossover")
OURS, PLAIN = "this repository", "plain"
CAP = 30.0  # that of Gemma 2


@dataclass
class Args:
    parts: tuple[Literal["gpu", "step", "cpu", "crossover"], ...] = PARTS
    """what to measure"""
    hidden_sizes: tuple[int, ...] = (896, 2048, 3584)
    """H of the GPU's part; the CPU's takes the first"""
    vocabulary: int = 151_936
    """V, that of the Qwen 2.5 and 3 families"""
    rows: int = 512
    """N of the CPU's part"""
    rounds: int = 3
    """how often each contestant takes its turn, after one untimed call"""
    threads: int = 2
    """CPU threads"""
    output: Path = reporting.RESULTS / "logprob_kernels"
    """where report.md and results.json are written"""


# Contestants: functions of h, W, y and the upstream gradient, to the product of the latter and the
# log-probs


def ours(hidden, weight, targets, upstream, cap=None):
    return logprobs_and_entropy(hidden, weight, targets, cap)[0] @ upstream


def plain_results(hidden, weight, targets, entropy, cap=None):
    """Logits in the inputs' dtype, statistics in float32, as the scripts did before."""
    logits_NV = hidden @ weight.T
    if cap is not None:
        logits_NV = cap * torch.tanh(logits_NV / cap)
    logprobs_NV = torch.log_softmax(logits_NV.float(), dim=-1)
    found_N, entropy_N = logprobs_NV.gather(-1, targets.unsqueeze(-1)).squeeze(-1), None
    if entropy:
        with torch.no_grad():
            finite_NV = logprobs_NV.clamp(min=torch.finfo(torch.float32).min)
            entropy_N = -(logprobs_NV.exp() * finite_NV).sum(dim=-1)
    return found_N, entropy_N


def plain(hidden, weight, targets, upstream, entropy=True, cap=None):
    return plain_results(hidden, weight, targets, entropy, cap)[0] @ upstream


def compiled():
    # It returns the entropy, which would be left out otherwise.
    function = torch.compile(plain_results, dynamic=False)
    return lambda h, w, y, up: function(h, w, y, True)[0] @ up


def from_file(package, path):
    """A module of an installed package, loaded by itself: its package may want much that is not
    needed here.
    """
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ImportError("not installed")
    location = Path(spec.submodule_search_locations[0]) / path
    spec = importlib.util.spec_from_file_location(f"{package}_{location.stem}", location)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def trl(cap=None):
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    options = (1.0, 8192, cap, 1.0, ("entropy",))
    return lambda h, w, y, up: ChunkedLogProbFunction.apply(h, w, None, y, *options)[0] @ up


def liger(fallback=False):
    from liger_kernel.ops import fused_linear_scaled_cross_entropy as module

    if fallback:
        function = module._FusedLinearPPOFallbackFunction
        return lambda h, w, y, up: -(function.apply(h, w, y, 1.0, -100, True)[0] @ up)
    function = module.LigerFusedLinearScaledCrossEntropyFunction
    return lambda h, w, y, up: -(function.apply(h, w, y, return_entropy=True)[0] @ up)


def verl_cpu():
    function = from_file("verl", "utils/experimental/torch_functional.py").FusedLinearForPPOFunction
    return lambda h, w, y, up: function.apply(h, w, y, 1.0)[0] @ up


def verl_gpu():
    # These are not run: they import ray and others, which the kernels do without.
    for name in ("verl", "verl.utils"):
        sys.modules[name] = importlib.util.module_from_spec(importlib.util.find_spec(name))
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return lambda h, w, y, up: linear_cross_entropy(h, w, y, 1.0, "none")[0] @ up


def quack():
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda h, w, y, up: (
        -chunked_linear_cross_entropy(h, w, y.masked_fill(up == 0, -100), reduction="sum")
    )


def cce(filter_eps, cap=None):
    from cut_cross_entropy import linear_cross_entropy

    options = {"reduction": "none", "impl": "cce", "filter_eps": filter_eps, "softcap": cap}
    return lambda h, w, y, up: -(linear_cross_entropy(h, w, y, **options).float() @ up)


BOTH = {
    OURS: lambda: ours,
    PLAIN: lambda: plain,
    "plain, no entropy": lambda: partial(plain, entropy=False),
}
ON_CPU = {**BOTH, "TRL": trl, "Liger": liger, "verl": verl_cpu}
ON_GPU = {
    **BOTH,
    "torch.compile of plain": compiled,
    "TRL": trl,
    "Liger": liger,
    "Liger, fallback": lambda: liger(fallback=True),
    "verl": verl_gpu,
    "quack (no entropy)": quack,
    "cce (no entropy)": lambda: cce("auto"),
    "cce_exact (no entropy)": lambda: cce(None),  # `impl="cce_exact"` is not in this version
}
CAPPED_ON_CPU = {
    OURS: lambda: partial(ours, cap=CAP),
    PLAIN: lambda: partial(plain, cap=CAP),
    "TRL": lambda: trl(CAP),
}
CAPPED_ON_GPU = {
    **CAPPED_ON_CPU,
    "cce (no entropy)": lambda: cce("auto", CAP),
    "cce_exact (no entropy)": lambda: cce(None, CAP),
}
OPERATIONS = {"quack (no entropy)": (6, 0)}
"""multiples of N·H·V, for all rows and for live ones; (2, 6) for all others"""


# Measuring


def make_problem(N, H, dtype, peaked, device, vocabulary, live=1.0):
    torch.manual_seed(0)
    hidden = torch.randn(N, H, device=device).to(dtype)
    scale = (4.5 if peaked else 0.5) / H**0.5
    weight = (torch.randn(vocabulary, H, device=device) * scale).to(dtype)
    with torch.no_grad():  # in pieces: N × V values are what this is about
        targets = [
            (rows.float() @ weight.float().T).softmax(-1).multinomial(1)
            for rows in hidden.split(256)
        ]
    upstream = (torch.arange(N, device=device) % 100 < 100 * live).float()
    return hidden.requires_grad_(), weight.requires_grad_(), torch.cat(targets).squeeze(1), upstream


def gradients(contestant, problem):
    hidden, weight, targets, upstream = problem
    hidden.grad = weight.grad = None
    contestant(hidden, weight, targets, upstream).backward()
    return hidden.grad, weight.grad


def timed(contestant, problem):
    """Seconds of one forward and backward pass."""
    if problem[0].is_cuda:  # after another contestant, memory has to be found anew: not timed
        gradients(contestant, problem)
    _synchronize(problem)
    started = time.perf_counter()
    gradients(contestant, problem)
    _synchronize(problem)
    return time.perf_counter() - started


def _synchronize(problem):
    if problem[0].is_cuda:
        torch.cuda.synchronize()


class PeakMemory:
    """Bytes by which the memory in use rose at most: PyTorch's on a GPU, the process's on a CPU."""

    def __init__(self, device):
        self.device = torch.device(device)

    def __enter__(self):
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            ctypes.CDLL(None).malloc_trim(0)  # Linux: memory that was freed is given back
            Path("/proc/self/clear_refs").write_text("5")
        self.before = peak_bytes(self.device)  # what is in use: the peak starts from here
        return self

    def __exit__(self, *_):
        self.bytes = peak_bytes(self.device) - self.before


def true_gradients(problem, cap):
    """dh, dW in float64, a few rows at a time."""
    hidden, weight, targets, upstream = problem
    hidden64, weight64 = hidden.detach().double(), weight.detach().double()
    dhidden, dweight = torch.zeros_like(hidden64), torch.zeros_like(weight64)
    for rows in torch.arange(len(hidden)).split(256):
        logits = hidden64[rows] @ weight64.T
        slope = 1.0
        if cap is not None:
            slope = 1 - torch.tanh(logits / cap).square()
            logits = cap * torch.tanh(logits / cap)
        p = torch.softmax(logits, dim=-1)
        p[torch.arange(len(rows)), targets[rows]] -= 1
        p *= -upstream[rows].unsqueeze(1) * slope
        dhidden[rows] = p @ weight64
        dweight.addmm_(p.T, hidden64[rows])
    return dhidden, dweight


def relative_error(found, true):
    return ((found.double() - true).norm() / true.norm()).item()


def reason(error):
    return f"{type(error).__name__}: {error}".splitlines()[0][:100]


def contest(makers, problem, rounds, cap=None):
    """Time, extra memory and gradient error of every contestant that runs: one dict for each."""
    contestants, rows, true = {}, {}, true_gradients(problem, cap)
    for name, make in makers.items():
        hidden, weight, _, _ = problem
        try:
            contestant = make()
            hidden.grad = weight.grad = None
            gradients(contestant, problem)  # compiles, tunes, imports
            hidden.grad = weight.grad = None
            with PeakMemory(hidden.device) as peak:
                found = gradients(contestant, problem)
        except Exception as error:  # peers fail in many ways; the table says how
            rows[name] = {"does_not_run": reason(error)}
            continue
        contestants[name] = contestant
        rows[name] = {
            "extra_memory_bytes": peak.bytes - sum(gradient.nbytes for gradient in found),
            "gradient_error": max(map(relative_error, found, true)),
            "seconds": [],
        }
    del true
    for _ in range(rounds):
        for name, contestant in list(contestants.items()):
            try:
                rows[name]["seconds"].append(timed(contestant, problem))
            except Exception as error:
                rows[name] = {"does_not_run": reason(error)}
                del contestants[name]
                continue
            print(f"  {name}: {rows[name]['seconds'][-1]:.3f} s", flush=True)
    return rows


def run_cpu(args):
    cases = []
    for dtype, cap in ((torch.bfloat16, None), (torch.float32, None), (torch.bfloat16, CAP)):
        problem = make_problem(args.rows, args.hidden_sizes[0], dtype, True, "cpu", args.vocabulary)
        case = {"N": args.rows, "H": args.hidden_sizes[0], "V": args.vocabulary, "cap": cap}
        case |= {"dtype": str(dtype).removeprefix("torch."), "load_average": os.getloadavg()[0]}
        print(case)
        makers = ON_CPU if cap is None else CAPPED_ON_CPU
        cases.append(case | {"contestants": contest(makers, problem, args.rounds, cap)})
    return cases


def weighted(function, hidden, weight, targets, upstream):
    return function(hidden, weight, targets)[0] @ upstream


def run_crossover(args):
    """Seconds of the two ways through a vocabulary on a CPU, by its size: `LARGE_VOCABULARY` is set
    by them.
    """
    cases, ways = [], {"sliced": SlicedLogprobs.apply, PLAIN: plain_logprobs_and_entropy}
    ways = {way: partial(weighted, function) for way, function in ways.items()}
    dtypes, sizes = (torch.float32, torch.bfloat16), [1024 * 2**i for i in range(7)]
    for dtype, N, size in itertools.product(dtypes, (64, 256, 1024), sizes):
        problem = make_problem(N, args.hidden_sizes[0], dtype, True, "cpu", size)
        seconds = {way: [] for way in ways}
        for _ in range(args.rounds + 1):
            for way, contestant in ways.items():
                seconds[way].append(timed(contestant, problem))
        dtype_name = str(dtype).removeprefix("torch.")
        cases.append({"dtype": dtype_name, "N": N, "vocabulary": size, "seconds": seconds})
    return cases


def run_gpu(args, keep):
    """All cases on a GPU; `keep` is called with the results so far."""
    matrix = torch.randn(16_384, 16_384, device="cuda", dtype=torch.bfloat16)
    rates = []
    for _ in range(10):
        torch.cuda.synchronize()
        started = time.perf_counter()
        matrix @ matrix
        torch.cuda.synchronize()
        rates.append(2 * 16_384**3 / (time.perf_counter() - started))
    del matrix
    cases, best = [], max(rates)
    N, V = 16_384, args.vocabulary
    grid = list(itertools.product(args.hidden_sizes, ("flat", "peaked"), (1.0, 0.5)))
    grid += [(H, "capped", 1.0) for H in args.hidden_sizes]
    for H, logits, live in grid:
        problem = make_problem(N, H, torch.bfloat16, logits != "flat", "cuda", V, live)
        case = {"N": N, "H": H, "logits": logits, "live": live}
        print(case)
        if logits == "capped":
            rows = contest(CAPPED_ON_GPU, problem, args.rounds, CAP)
        else:
            rows = contest(ON_GPU, problem, args.rounds)
        for name, row in rows.items():
            every, of_live = OPERATIONS.get(name, (2, 6))
            row["floor_seconds"] = (every + of_live * live) * N * H * V / best
        cases.append(case | {"contestants": rows})
        keep({"operations_per_second": best, "cases": cases})
        del problem
        torch.cuda.empty_cache()


def run_step(args, device):
    """Peak memory of a training step's forward and backward pass, by path and number of response
    tokens.

    The backbone is small (one layer, H = 64), so that what the peak is made of is the step from
    hidden states to loss.
    """
    config = Qwen2Config(
        vocab_size=args.vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(device)
    memory = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(memory["MemAvailable"].split()[0]) * 1024
    results = []
    for N in (2048, 8192):
        tokens_BT = torch.randint(args.vocabulary, (N // 512, 512), device=device)
        micro = MicroBatch(
            inputs_BT=tokens_BT,
            targets_BT=tokens_BT.roll(-1, dims=1),
            mask_BT=torch.ones_like(tokens_BT).bool(),
            sampler_logprobs_BT=torch.zeros_like(tokens_BT).float(),
            rows=[],
        )
        for path, step in ((OURS, _our_step), ("plain, no entropy", _plain_step)):
            row = {"N": N, "path": path, "peak_bytes": None}
            row["logits_bytes"] = 4 * N * args.vocabulary
            results.append(row)
            if step is _plain_step and device == "cpu" and available < 3.5 * row["logits_bytes"]:
                continue
            for _ in range(2):  # the first run is for what is only allocated once
                model.zero_grad()
                with PeakMemory(device) as peak:
                    step(model, micro)
            row["peak_bytes"] = peak.bytes
            print(row, flush=True)
    return results


def _our_step(model, micro):
    token_logprobs(model, micro, 1.0)[0].sum().backward()


def _plain_step(model, micro):
    """The least that plain PyTorch can do: logits, log-softmax and its gradient, three times N × V,
    and no entropy.
    """
    output = model.base_model(input_ids=micro.inputs_BT, use_cache=False)
    hidden_NH, targets_N = output.last_hidden_state.flatten(0, 1), micro.targets_BT.flatten()
    upstream_N, weight_VH = torch.ones_like(hidden_NH[:, 0]), model.get_output_embeddings().weight
    plain(hidden_NH, weight_VH, targets_N, upstream_N, entropy=False).backward()


# Reporting


def cpu_table(case):
    rows = case["contestants"]
    best = {name: min(row["seconds"]) for name, row in rows.items() if "seconds" in row}
    cells, base = [], rows[PLAIN]["extra_memory_bytes"]
    for name, row in rows.items():
        if name not in best:
            cells.append([name, row["does_not_run"], "", "", "", ""])
            continue
        memory = row["extra_memory_bytes"]
        cells.append([name, f"{best[name]:.2f}", f"{best[name] / best[PLAIN]:.2f}"])
        cells[-1] += [f"{memory / 2**20:,.0f}", f"{memory / base:.2f}"]
        cells[-1].append(f"{row['gradient_error']:.1e}")
    header = ["contestant", "seconds", "× plain", "extra memory, MiB", "× plain", "gradient error"]
    title = f"N = {case['N']}, H = {case['H']}, V = {case['V']:,}, {case['dtype']}, peaked logits"
    if case.get("cap"):
        title += f", capped at {case['cap']:g}"
    title += f" (load average at the start: {case['load_average']:.1f}):"
    return f"{title}\n\n{reporting.table(header, cells)}"


def crossover_table(cases):
    sizes = sorted({case["vocabulary"] for case in cases})
    ratios = {}
    for case in cases:
        ratio = min(case["seconds"]["sliced"]) / min(case["seconds"][PLAIN])
        ratios.setdefault((case["dtype"], case["N"]), []).append(f"{ratio:.2f}")
    rows = [[dtype, f"{N:,}", *row] for (dtype, N), row in ratios.items()]
    return reporting.table(["dtype", "N", *(f"{size:,}" for size in sizes)], rows)


def gpu_table(gpu):
    header = ["H", "logits", "live rows", "contestant", "ms", "× floor", "extra memory, MiB"]
    header.append("gradient error")
    if gpu is None:
        sizes = (896, 2048, 3584)
        grid = list(itertools.product(sizes, ("flat", "peaked"), ("100%", "50%")))
        grid += [(H, "capped", "100%") for H in sizes]
        return reporting.table(header, [[*place, "all", "not run", "", "", ""] for place in grid])
    cells = []
    for case in gpu["cases"]:
        for name, row in case["contestants"].items():
            cells.append([case["H"], case["logits"], f"{case['live']:.0%}", name])
            if "seconds" not in row:
                cells[-1] += [row["does_not_run"], "", "", ""]
                continue
            best = min(row["seconds"])
            cells[-1] += [f"{1e3 * best:.1f}", f"{best / row['floor_seconds']:.2f}"]
            cells[-1] += [f"{row['extra_memory_bytes'] / 2**20:,.0f}"]
            cells[-1] += [f"{row['gradient_error']:.1e}"]
    rate = gpu["operations_per_second"] / 1e12
    floors = f"Floors at {rate:.0f} TFLOP/s, for the operations that each has to do."
    return f"{reporting.table(header, cells)}\n\n{floors}"


def step_table(steps):
    cells, peaks = [], {(row["N"], row["path"]): row["peak_bytes"] for row in steps}
    for row in steps:
        peak, other = row["peak_bytes"], peaks[row["N"], "plain, no entropy"]
        cells.append([f"{row['N']:,}", row["path"]])
        cells[-1].append(f"{peak / 2**20:,.0f}" if peak else "not run")
        compared = row["path"] == OURS and other
        cells[-1].append(f"{(other - peak) / row['logits_bytes']:.1f}" if compared else "")
    header = ["N", "path", "peak, MiB", "memory saved, in multiples of the logits' size"]
    return reporting.table(header, cells)


def report(results):
    cpu = "\n\n".join(map(cpu_table, results.get("cpu", []))) or "not run"
    crossover = crossover_table(results["crossover"]) if "crossover" in results else "not run"
    step = step_table(results["step"]) if "step" in results else "not run"
    return f"""# Log-probs from hidden states: time, memory, error

Forward and backward pass, gradients to h and W; least of {results["rounds"]} interleaved rounds.
"plain" computes log-prob and entropy, as do all contestants unless it says otherwise.

## On a GPU (N = 16,384, V = {results["vocabulary"]:,}, bf16)

{gpu_table(results.get("gpu"))}

## On a CPU

{cpu}

Which way for which vocabulary: the sliced walk's time as a multiple of the plain expression's
(float32 logits and entropy, as `common/kernels/cpu.py` has it), by V, for
H = {results["hidden_size"]}. From V = {LARGE_VOCABULARY:,} on the slices are taken:

{crossover}

## Peak memory of a training step ({results["step_device"]}, float32, V = {results["vocabulary"]:,})

Forward and backward pass of a model whose backbone is small. "This repository" computes entropies
too, and "plain" the log-probs alone; "not run" where the machine's free memory is too small for it.

{step}

```
{results["environment"].strip()}
```

Written by `python benchmarks/speed/logprob_kernels.py`; every round is in `results.json`.
"""


def main(args):
    torch.set_num_threads(args.threads)
    environment = describe_environment()
    for package in PEERS:
        if f"{package}: " in environment:
            continue
        try:
            environment += f"{package}: {version(package)}\n"
        except PackageNotFoundError:
            environment += f"{package}: not installed\n"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = {"environment": environment, "rounds": args.rounds, "step_device": device}
    results |= {"vocabulary": args.vocabulary, "hidden_size": args.hidden_sizes[0]}

    def keep(part, result):
        results[part] = result
        reporting.write_json(args.output / "results.json", **results)
        (args.output / "report.md").write_text(report(results))

    if "gpu" in args.parts and device == "cuda":
        run_gpu(args, partial(keep, "gpu"))
    if "step" in args.parts:
        keep("step", run_step(args, device))
    if "cpu" in args.parts:
        keep("cpu", run_cpu(args))
    if "crossover" in args.parts:
        keep("crossover", run_crossover(args))
    print(report(results))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
