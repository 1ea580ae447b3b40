"""Llama 1, 2, 3 and what follows their shape (SmolLM2, TinyLlama, Vicuna); Mistral without its sliding window.

RMS norm before attention and before the MLP, rotary positions, grouped-query attention, SiLU-gated MLP (Touvron et
al. 2023, Dubey et al. 2024, Jiang et al. 2023).
"""

from __future__ import annotations

from dibit.engine.models.spec import Arch

LLAMA = Arch(
    name="llama",
    hf_names=("LlamaForCausalLM",),
    biases="config",
    defaults={"max_position_embeddings": 2048},
)

# A Mistral config without the key means a window of 4096, as its first release had.
MISTRAL = Arch(
    name="mistral",
    hf_names=("MistralForCausalLM",),
    window="refuse",
    defaults={"max_position_embeddings": 131072, "sliding_window": 4096},
)
