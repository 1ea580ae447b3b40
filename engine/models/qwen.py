"""Qwen 2, 2.5 and 3, dense ones: Llama's shape but for biases of q, k and v, or norms of every head's q and k.

Yang et al., "Qwen2 Technical Report", 2024; Yang et al., "Qwen3 Technical Report", 2025.
"""

from __future__ import annotations

from dibit.engine.models.spec import Arch

QWEN2 = Arch(
    name="qwen2",
    hf_names=("Qwen2ForCausalLM",),
    biases="qkv",
    window="switch",
    defaults={"max_position_embeddings": 32768},
)

QWEN3 = Arch(
    name="qwen3",
    hf_names=("Qwen3ForCausalLM",),
    biases="config",
    window="switch",
    defaults={"max_position_embeddings": 32768, "head_dim": 128},
    q_norm="self_attn.q_norm",
    k_norm="self_attn.k_norm",
)
