"""A model with random weights, for timing: it can have any size."""

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM


def save_random_model(directory, tokenizer, **shape):
    """Save a Qwen2 model of that shape, and a tokenizer; returns the number of parameters."""
    torch.manual_seed(0)
    config = Qwen2Config(bos_token_id=None, tie_word_embeddings=True, **shape)
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return sum(parameter.numel() for parameter in model.parameters())
