#!/usr/bin/env bash
# Everything in this repository that waits for a GPU, the most valuable first; about eight minutes on one H100.
#
#     bash benchmarks/on_gpu.sh                     writes to benchmarks/results/on_gpu/
#     bash benchmarks/on_gpu.sh --rehearse DIR      the same in miniature on a CPU, to see that every part runs
#
# Each part writes its result as soon as it has one. A part that fails or takes too long does not stop the others;
# summary.txt says which did. PARTS="kernels default" runs only these.
set -uo pipefail
cd "$(dirname "$0")/.."

out=benchmarks/results/on_gpu
tiny=()
kernel_sizes=(--parts gpu)
if [[ "${1:-}" == --rehearse ]]; then
    out=$2
    tiny=(--device cpu --steps 1)
    kernel_sizes=(--parts cpu --vocabulary 9000 --rows 64)
    export TRITON_INTERPRET=1
fi
mkdir -p "$out"
failed=0

part() {  # name, seconds, command
    [[ " ${PARTS:-$1} " == *" $1 "* ]] || return 0
    local name=$1 seconds=$2 started=$SECONDS code
    shift 2
    echo "== $name"
    timeout "$seconds" "$@" >"$out/$name.log" 2>&1
    code=$?
    tail -n 3 "$out/$name.log"
    echo "$name: exit code $code after $((SECONDS - started)) s" | tee -a "$out/summary.txt"
    ((code == 0)) || failed=1
}

runs=benchmarks/gpu_runs.py
part kernels 180 python -m pytest -n 0 -q tests/kernels/interpreted_kernels.py
part agreement 120 python $runs agreement "${tiny[@]}" --output "$out"
part default 180 python $runs default "${tiny[@]}" --output "$out"
part logprobs 180 python benchmarks/logprob_kernels.py "${kernel_sizes[@]}" --hidden-sizes 2048 --output "$out/logprobs"
part smollm2 180 python $runs smollm2 "${tiny[@]}" --output "$out"
part qwen 120 python $runs qwen "${tiny[@]}" --output "$out"
if python -c "import vllm" 2>/dev/null && [[ ${#tiny[@]} == 0 ]]; then
    part smollm2_vllm 300 python $runs smollm2 --engine vllm --output "$out"
    part qwen_vllm 300 python $runs qwen --engine vllm --output "$out"
fi
exit $failed
