"""Tiny random causal language models, one per head option, built from their configs."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

_SIZES = {
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 256, "vocab_size": 97}

CONFIGS = {
    "llama": _SIZES,
    "qwen3": _SIZES,
    "gemma2": _SIZES | {"final_logit_softcapping": 1.5, "query_pre_attn_scalar": 8},
    "granite": _SIZES | {"logits_scaling": 13.0},
    "cohere": _SIZES | {"logit_scale": 0.0625},
    "gpt2": _GPT2 | {"bos_token_id": 1, "eos_token_id": 2},
    "phi": _SIZES | {"partial_rotary_factor": 0.5},
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_OTHERS = {  # whose head is like one of the above
    "mixtral": _SIZES,
    "qwen2_moe": _SIZES | _EXPERTS | {"shared_expert_intermediate_size": 16},
    "qwen3_moe": _SIZES | _EXPERTS,
    "olmoe": _SIZES | _EXPERTS,
    "jetmoe": _SIZES | {"num_local_experts": 4, "kv_channels": 8},
}


def tiny_model(name, dtype=torch.float32, seed=0, **changes):
    """A random model with weights large enough for its logits to spread, without dropout."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(name, **(CONFIGS | _OTHERS)[name] | changes)
    for dropout in ("attn_pdrop", "embd_pdrop", "resid_pdrop"):
        if hasattr(config, dropout):
            setattr(config, dropout, 0.0)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tiny_batch(rows=3, length=9):
    """Right-padded token ids and their attention mask."""
    ids = torch.randint(3, 97, (rows, length))
    lengths = torch.linspace(length, length // 2, rows).long()
    mask = (torch.arange(length) < lengths[:, None]).long()
    return ids * mask, mask
