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
from tests.conftest import REPOSITORY, TINY_MODEL

SIZES = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "initializer_range": 0.15,
    "max_position_embeddings": 128,
}  # fmt: skip
EXPERTS = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 48, "shared_expert_intermediate_size": 48, "n_shared_experts": 1,
    "shared_intermediate_size": 48, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
    "linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "partial_rotary_factor": 0.5,
}  # fmt: skip
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
    "v_head_dim": 32, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
MAMBA = {
    "mamba_d_ssm": 64, "mamba_n_heads": 2, "mamba_d_head": 32, "mamba_d_state": 16,
    "mamba_n_groups": 1,
}  # fmt: skip
MAMBA_128 = MAMBA | {"mamba_n_heads": 4}  # twice the hidden size
PER_LAYER = {"vocab_size_per_layer_input": 300, "hidden_size_per_layer_input": 16}
CAP = {"final_logit_softcapping": 3.0}
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "ministral": SLIDING,
    "ministral3": {},
    "mixtral": EXPERTS,
    "qwen2": {"tie_word_embeddings": True},
    "qwen2_moe": EXPERTS | {"decoder_sparse_step": 1},
    "qwen3": {},
    "qwen3_moe": EXPERTS,
    "qwen3_next": EXPERTS | LINEAR,
    "qwen3_5_text": LINEAR,
    "qwen3_5_moe_text": EXPERTS | LINEAR,
    "gemma": {"hidden_activation": "gelu_pytorch_tanh"},
    "gemma2": SLIDING | CAP | {"attn_logit_softcapping": 5.0},
    "gemma3_text": SLIDING,
    "gemma3": {"text_config": SIZES | SLIDING},
    "gemma3n_text": SLIDING | CAP | PER_LAYER
    | {"num_kv_shared_layers": 0, "laurel_rank": 8, "altup_num_inputs": 2}
    | {"intermediate_size": [96, 96], "activation_sparsity_pattern": [0.5, 0.0]},
    "gemma4_text": SLIDING | CAP | PER_LAYER | {"num_kv_shared_layers": 0, "global_head_dim": 32},
    "phi": {},
    "phi3": {},
    "phimoe": EXPERTS,
    "gpt_oss": EXPERTS | SLIDING,
    "smollm3": {"no_rope_layers": [1, 0]},
    "olmo": {},
    "olmo2": {},
    "olmo3": SLIDING,
    "olmoe": EXPERTS,
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 2.0, "attention_multiplier": 0.1},
    "granitemoe": EXPERTS | {"logits_scaling": 4.0},
    "granitemoehybrid": EXPERTS | MAMBA_128
    | {"logits_scaling": 4.0, "layer_types": ["mamba", "attention"]},
    "cohere": {"logit_scale": 0.06},
    "cohere2": SLIDING | {"logit_scale": 0.06},
    "deepseek_v2": EXPERTS | LATENT | {"topk_method": "greedy"},
    "deepseek_v3": EXPERTS | LATENT,
    "glm": {},
    "glm4": {},
    "glm4_moe": EXPERTS,
    "ernie4_5": {},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1},
    "exaone4": SLIDING,
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": EXPERTS | {"moe_topk": 2},
    "seed_oss": {},
    "nemotron": {},
    "nemotron_h": EXPERTS
    | {"layers_block_type": ["mamba", "attention", "moe"], "mamba_num_heads": 4}
    | {"mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 1}
    | {"moe_shared_expert_intermediate_size": 48},
    "minimax_m2": EXPERTS,
    "lfm2": {"layer_types": ["conv", "full_attention"], "full_attn_idxs": [1], "block_ff_dim": 96},
    "lfm2_moe": EXPERTS | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "bamba": MAMBA_128 | {"attn_layer_indices": [1]},
    "jamba": EXPERTS | {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "falcon_h1": MAMBA | {"lm_head_multiplier": 0.5},
    "arcee": {},
    "apertus": {},
    "helium": {},
    "nanochat": CAP,
    "starcoder2": {},
    "stablelm": {},
    "gpt_neox": {},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128},
    "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 2, "rotary_dim": 16},
    "bloom": {"n_layer": 2, "n_head": 2},
    "mpt": {"d_model": 64, "n_heads": 2, "n_layers": 2},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
}  # fmt: skip
# Their routers have a bias that does not learn, a buffer.
WITH_BUFFERS = {"glm4_moe", "deepseek_v3", "ernie4_5_moe", "minimax_m2", "nemotron_h", "lfm2_moe"}
# Largest difference of a log-prob, in nats; transformers computes a recurrence token by token when
# decoding, and in chunks in a forward pass.
BOUND = 2e-5
BOUNDS = {
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), 1e-4),  # also in float64
    "nemotron_h": 2e-3,  # its steps have a lower limit in a forward pass, and none when decoding
}
CANNOT_BE_SAMPLED, DIFFERS = "cannot be sampled from", "off the forward pass"
REFUSED = {
    "minimax": (EXPERTS | LINEAR | {"block_size": 8}, CANNOT_BE_SAMPLED),  # a cache of its own
    "mamba": ({"state_size": 8}, DIFFERS),  # takes no positions, and would read the padding
    "recurrent_gemma": ({}, DIFFERS),
    "hyperclovax": ({"logits_scaling": 4.0}, DIFFERS),  # multiplies, where others divide
}
TEMPERATURE = 0.7


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
    check_decoding(model, PROMPTS, 8, TEMPERATURE, "float32", directory)
    # Every tenth token ends a response, so that rows leave the batch, and of each group at another
    # time.
    sampler = TransformersSampler(model, set(range(0, 300, 10)), 24, TEMPERATURE)
    samples = sampler.sample(PROMPTS, 3, [0, 10, 20, 30])
    prompts = [prompt for prompt in PROMPTS for _ in range(3)]
    batch = types.SimpleNamespace(prompts=prompts, **vars(samples))
    micro = collate(batch, range(len(prompts)))
    with torch.no_grad():
        logprobs_BT, _ = token_logprobs(model, micro, TEMPERATURE)
        for row, (prompt, response) in enumerate(zip(prompts, samples.responses, strict=True)):
            plain_T = plain_logprobs(model, prompt, response).tolist()
            assert samples.logprobs[row] == pytest.approx(plain_T, abs=BOUNDS.get(family, BOUND))
            trained_T = logprobs_BT[row, micro.mask_BT[row]].tolist()
            assert trained_T == pytest.approx(plain_T, abs=BOUND)

    # What an engine is sent is what a checkpoint has.
    sent = dict(as_in_files(weights_of(model), shapes_of(directory, "")))
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert sent.keys() == saved.keys()
    assert all(torch.equal(sent[name], saved[name]) for name in saved)
    buffers = sent.keys() - dict(model.named_parameters())
    if family in WITH_BUFFERS:
        assert any("bias" in name for name in buffers)


def plain_logprobs(model, prompt, response):
    """Log-probs of a response's tokens, from the model's own logits, for one sequence."""
    logits_TV = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0]
    logprobs_TV = (logits_TV[len(prompt) - 1 : -1].float() / TEMPERATURE).log_softmax(-1)
    return logprobs_TV[range(len(response)), response]


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite", "falcon_h1"])
def test_gradients_pass_through_caps_and_scales(family, tmp_path):
    model = load_model(build(family, tmp_path, FAMILIES[family]), "", torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    response = torch.randint(300, (20,), generator=generator).tolist()
    upstream_T = torch.randn(20, generator=generator)
    batch = types.SimpleNamespace(prompts=PROMPTS[:1], responses=[response], logprobs=[[0.0] * 20])
    micro = collate(batch, [0])
    logprobs_BT, _ = token_logprobs(model, micro, TEMPERATURE)
    found = torch.autograd.grad(logprobs_BT[micro.mask_BT] @ upstream_T, model.parameters())
    plain = plain_logprobs(model, PROMPTS[0], response) @ upstream_T
    for one, other in zip(found, torch.autograd.grad(plain, model.parameters()), strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize(
    "family, overrides", [("mixtral", {"router_jitter_noise": 0.3}), ("phimoe", {})]
)
def test_a_router_is_not_random_with_gradient_checkpointing(family, overrides, tmp_path):
    directory = build(family, tmp_path, FAMILIES[family] | overrides)
    found = []
    for checkpointing in (False, True):
        model = load_model(directory, "", torch.device("cpu"), checkpointing)
        check_decoding(model, PROMPTS, 8, TEMPERATURE, "float32", directory)
        logprobs_T = plain_logprobs(model, PROMPTS[1], PROMPTS[3])
        found.append([logprobs_T, *torch.autograd.grad(logprobs_T.sum(), model.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert any(module.training for module in model.modules())


def test_a_model_that_ignores_its_cache_is_refused(tmp_path):
    directory = build("llama", tmp_path / "model", {})
    model = load_model(directory, "", torch.device("cpu"))
    forward = model.forward
    model.forward = lambda past_key_values=None, attention_mask=None, **options: forward(**options)
    with pytest.raises(BadInput, match="its cache does not work"):
        check_decoding(model, PROMPTS, 8, 1.0, "float32", directory)


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_work_is_refused(family, tmp_path):
    overrides, reason = REFUSED[family]
    directory = build(family, tmp_path / "model", overrides)
    model = load_model(directory, "", torch.device("cpu"))
    with pytest.raises(BadInput, match=f"--model {directory}.* {reason}") as error:
        check_decoding(model, PROMPTS, 8, 1.0, "float32", directory)
    assert str(error.value).endswith("give another model.")


def test_the_documentation_lists_them():
    text = (REPOSITORY / "common" / "README.md").read_text()
    assert [family for family in (*FAMILIES, *REFUSED) if f"`{family}`" not in text] == []
