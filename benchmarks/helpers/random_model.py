"""A model with random weights, for timing: it can have any size."""

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

# Sizes of models that are in use
SMOLLM2 = {  # SmolLM2-135M
    "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3,
}  # fmt: skip
QWEN = {  # Qwen2.5-0.5B
    "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2,
}  # fmt: skip


def save_random_model(directory, tokenizer, **shape):
    """Save a Qwen2 model of that shape, and a tokenizer; returns the number of parameters."""
    torch.manual_seed(0)
    config = Qwen2Config(bos_token_id=None, tie_word_embeddings=True, **shape)
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return sum(parameter.numel() for parameter in model.parameters())
