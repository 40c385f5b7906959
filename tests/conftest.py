"""Shared by all tests: the repository on the path, no network, one thread, small random models, the
GSM8K files.
"""

import os
import sys
from pathlib import Path

# before transformers is imported: a test never reaches for the network
os.environ["HF_HUB_OFFLINE"] = "1"
# before torch is: threads that wait for work leave their core to the tests beside them
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

from common import runlog
from common.models import TINY_MODEL, load_tokenizer

torch.set_num_threads(1)  # the tests run side by side, one process per core

PLOT_CURVES = runlog.plot_curves
REPOSITORY = Path(__file__).resolve().parent.parent
GSM8K = Path(os.environ.get("GSM8K_DIR", REPOSITORY.parent / "shared" / "data" / "gsm8k"))


@pytest.fixture(scope="session")
def gsm8k():
    """The directory with GSM8K's train.jsonl and test.jsonl, which the environment variable
    GSM8K_DIR names (default: ../shared/data/gsm8k, seen from the repository); skips where it is
    absent.
    """
    if not GSM8K.is_dir():
        pytest.skip(f"there is no GSM8K data at {GSM8K}: GSM8K_DIR may name another directory")
    return GSM8K


@pytest.fixture(scope="session", autouse=True)
def _quick_runs():
    """No run plots its curves (see `curves`): that would take half of the time of a small one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runlog, "plot_curves", lambda records, title, path: None)
        yield


@pytest.fixture
def curves(monkeypatch):
    """Runs plot their curves, as they do outside of tests, and in those of `helpers.Run`."""
    monkeypatch.setattr(runlog, "plot_curves", PLOT_CURVES)


# Three families with different position encodings, norms, biases and heads. Head size 32, the
# smallest that every engine takes. The embeddings are wide enough to make the next-token
# distributions far from uniform.
_SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
FAMILIES = {
    "qwen2": (Qwen2Config, {**_SIZES, "intermediate_size": 128, "tie_word_embeddings": True}),
    "llama": (LlamaConfig, {**_SIZES, "intermediate_size": 128, "tie_word_embeddings": False}),
    "gpt2": (GPT2Config, {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 1024}),
}


def build_model(family, directory, **overrides):
    """Save a small randomly initialised model, and the bundled model's tokenizer, in Hugging Face's
    format.

    Args:
        family: "qwen2" (tied embeddings), "llama" (untied) or "gpt2" (tied).
        directory: where to; it is created.
        overrides: fields of the model's config, e.g. `tie_word_embeddings=False`; `seed` picks
            other weights.

    Returns the directory as a string, to be given to `load_model` or `--model`.
    """
    # byte-level, so that any text encodes, and with a chat template
    tokenizer = load_tokenizer(TINY_MODEL)
    config_class, sizes = FAMILIES[family]
    ids = {
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    fields = {"vocab_size": len(tokenizer), "initializer_range": 0.15, **ids, **sizes, **overrides}
    with torch.random.fork_rng():
        torch.manual_seed(fields.pop("seed", 0))
        model = AutoModelForCausalLM.from_config(config_class(**fields))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)
