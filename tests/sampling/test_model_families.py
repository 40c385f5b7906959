"""Families of models people use, built tiny from their configurations: sampler, trainer and plain
forward agree.

"Plain" reads one sequence at a time, without cache, padding or anything of ours. A model that
cannot be trained here is refused in one sentence. `transformers` writes the configurations' other
fields.
"""

import types

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from common.batching import collate
from common.errors import BadInput
from common.logprobs import token_logprobs
from common.models import check_context, load_model, load_tokenizer, shapes_of
from common.rollouts import check_decoding
from common.sampling.transformers import TransformersSampler
from common.sampling.vllm import as_in_files
from common.weights import weights_of
from tests.conftest import TINY_MODEL

SIZES = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "initializer_range": 0.15,
    "max_position_embeddings": 128,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
    "linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "partial_rotary_factor": 0.5,
}  # fmt: skip
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "gemma": {"hidden_activation": "gelu_pytorch_tanh"},
    "gemma3_text": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma3": {
        "text_config": SIZES
        | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    },
    "phi3": {},
    "smollm3": {"no_rope_layers": [1, 0]},
    "olmo2": {},
    "starcoder2": {},
    "stablelm": {},
    "gpt_neox": {},
    "glm4": {},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": EXPERTS,
    "lfm2": {"layer_types": ["conv", "full_attention"], "full_attn_idxs": [1], "block_ff_dim": 96},
    "qwen3_next": EXPERTS | LINEAR | {"shared_expert_intermediate_size": 48},
    "qwen3_5_text": LINEAR,
    "bamba": {
        "attn_layer_indices": [1],
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
        "mamba_d_state": 16,
        "mamba_n_groups": 1,
    },
    "falcon_h1": {
        "mamba_d_ssm": 64,
        "mamba_n_heads": 2,
        "mamba_d_head": 32,
        "mamba_d_state": 16,
        "mamba_n_groups": 1,
    },
}
# Their routers have a bias that does not learn, a buffer.
WITH_BUFFERS = {
    "glm4_moe": EXPERTS
    | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "deepseek_v3": EXPERTS
    | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    | {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16}
    | {"v_head_dim": 32, "num_key_value_heads": 2},
}
REFUSED = {
    "gemma2": {"final_logit_softcapping": 3.0},
    "cohere": {"logit_scale": 0.06},
    "granite": {"logits_scaling": 4.0},
    "mamba": {"state_size": 8},  # takes no positions, and would read the padding
}


def build(family, directory, overrides):
    tokenizer = load_tokenizer(TINY_MODEL)
    ids = {
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    sizes = {} if "text_config" in overrides else SIZES
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **{**sizes, **ids, **overrides})
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


PROMPTS = [[5, 6, 7], [20 + n for n in range(30)], [99], [40, 50, 60, 70, 80, 90, 100, 110, 120]]


@pytest.mark.parametrize("family", FAMILIES)
def test_sampler_trainer_and_plain_forward_agree(family, tmp_path):
    directory = build(family, tmp_path / "model", FAMILIES[family])
    args = types.SimpleNamespace(model=directory, revision="", max_response_tokens=24)
    check_context(args, PROMPTS)
    model = load_model(directory, "", torch.device("cpu"))
    check_decoding(model, PROMPTS, 8, 1.0, "float32", directory)
    # Every tenth token ends a response, so that rows leave the batch, and of each group at another
    # time.
    samples = TransformersSampler(model, set(range(0, 300, 10)), 24, 1.0).sample(
        PROMPTS, 3, [0, 10, 20, 30]
    )
    prompts = [prompt for prompt in PROMPTS for _ in range(3)]
    batch = types.SimpleNamespace(prompts=prompts, **vars(samples))
    micro = collate(batch, range(len(prompts)))
    with torch.no_grad():
        logprobs_BT, _ = token_logprobs(model, micro, 1.0)
        for row, (prompt, response) in enumerate(zip(prompts, samples.responses, strict=True)):
            logits_TV = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[
                0
            ]
            plain_T = (
                logits_TV[len(prompt) - 1 : -1]
                .float()
                .log_softmax(-1)[range(len(response)), response]
                .tolist()
            )
            assert samples.logprobs[row] == pytest.approx(plain_T, abs=2e-5)
            assert logprobs_BT[row, micro.mask_BT[row]].tolist() == pytest.approx(plain_T, abs=2e-5)


@pytest.mark.parametrize("family", [*FAMILIES, *WITH_BUFFERS])
def test_an_engine_is_sent_what_a_checkpoint_has(family, tmp_path):
    directory = build(family, tmp_path / "model", (FAMILIES | WITH_BUFFERS)[family])
    model = load_model(directory, "", torch.device("cpu"))
    sent = dict(as_in_files(weights_of(model), shapes_of(directory, "")))
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert sent.keys() == saved.keys()
    assert all(torch.equal(sent[name], saved[name]) for name in saved)
    router = [name for name in sent if name.endswith("e_score_correction_bias")]
    assert bool(router) == (family in WITH_BUFFERS)


def test_a_model_that_ignores_its_cache_is_refused(tmp_path):
    directory = build("llama", tmp_path / "model", {})
    model = load_model(directory, "", torch.device("cpu"))
    forward = model.forward
    model.forward = lambda past_key_values=None, attention_mask=None, **options: forward(**options)
    with pytest.raises(BadInput, match="its cache does not work"):
        check_decoding(model, PROMPTS, 8, 1.0, "float32", directory)


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_work_is_refused(family, tmp_path):
    directory = build(family, tmp_path / "model", REFUSED[family])
    model = load_model(directory, "", torch.device("cpu"))
    with pytest.raises(BadInput, match=f"--model {directory}") as error:
        check_decoding(model, PROMPTS, 8, 1.0, "float32", directory)
    assert str(error.value).endswith("give another model.")
