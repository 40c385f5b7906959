"""Log-probabilities and entropies of tokens under a causal language model.

With hidden states h, output head W and temperature τ, the logits are z = W h / τ and

    logprob(y) = z_y − logsumexp(z)          entropy = −Σ_v p_v log p_v = logsumexp(z) − Σ_v p_v z_v

The head is applied to response tokens only: prompt and padding never become a row of V logits.
"""

import torch


def autocast(device_type, precision):
    """Context for forward passes: bf16 products over float32 weights for "bfloat16", nothing for "float32"."""
    return torch.autocast(device_type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def token_logprobs(model, inputs_BT, attention_BT, targets_BT, mask_BT, temperature, precision="float32"):
    """Log-probability of each target and entropy of the distribution it was drawn from.

    Args:
        model: a Hugging Face causal language model, whose logits are `head(backbone(inputs))`.
        inputs_BT, attention_BT, targets_BT, mask_BT: as `batching.collate` returns them; padding on either side.
        temperature: τ; the distribution is softmax(logits / τ), in sampler and trainer alike.
        precision: "float32", or "bfloat16" for autocast.

    Returns `logprobs_BT` (differentiable) and `entropy_BT` (detached), float32, exactly 0 outside the mask.
    """
    # A token's position is the number of real tokens before it, wherever the padding is.
    positions_BT = (attention_BT.cumsum(dim=1) - 1).clamp(min=0)
    with autocast(inputs_BT.device.type, precision):
        hidden_BTH = model.base_model(
            input_ids=inputs_BT, attention_mask=attention_BT, position_ids=positions_BT, use_cache=False
        ).last_hidden_state
        logits_NV = model.get_output_embeddings()(hidden_BTH[mask_BT])
    # Statistics in float32, whatever the products were computed in.
    logprobs_NV = torch.log_softmax(logits_NV.float() / temperature, dim=-1)
    logprobs_N = logprobs_NV.gather(-1, targets_BT[mask_BT].unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        # p log p → 0 as p → 0, also where a masked vocabulary entry has log p = −inf.
        entropy_N = -(logprobs_NV.exp() * logprobs_NV.clamp(min=torch.finfo(torch.float32).min)).sum(dim=-1)
    zeros_BT = torch.zeros(mask_BT.shape, dtype=torch.float32, device=mask_BT.device)
    return zeros_BT.masked_scatter(mask_BT, logprobs_N), zeros_BT.masked_scatter(mask_BT, entropy_N)
