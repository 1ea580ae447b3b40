"""From qkv to the activations of o in one launch, for steps whose sequences have one token each (device/decode.py).

It stands for rope_kv_write, attend and attended_prepared, and gives their numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dibit.kernels.kv import head_dim
from dibit.kernels.triton.attention import BLOCK_KEYS, STAGES, blocks
from dibit.kernels.triton.cache import Side, block_columns
from dibit.kernels.triton.device.decode import decode_attention_kernel
from dibit.kernels.triton.fused import room
from dibit.kernels.triton.layout import TritonQWeight
from dibit.kernels.triton.limits import SIDE_BY_SIDE_TOKENS, SPLIT_KEYS
from dibit.kernels.triton.qlinear import Prepared, Runs, constants_of, operands_of, prepare_block, qmax_of

MAX_TOKENS = SIDE_BY_SIDE_TOKENS
"""More are not launched so: their splits are summed one after another."""


@dataclass(frozen=True)
class Rows:
    """T tokens, each the last one of its own row of the tables.

    positions     [T] int64
    slots         [T] int64, where the token's key goes; -1 writes nothing
    seq_lens      [T] int32, keys of the token's sequence up to itself
    block_tables  [T, blocks] int32

    Tokens of one sequence may follow each other, in ascending order.
    """

    positions: Tensor
    slots: Tensor
    seq_lens: Tensor
    block_tables: Tensor


def counters(kv_heads: int, device: torch.device) -> Tensor:
    """What programs of a launch count themselves in; launches that may overlap need their own."""
    return torch.zeros(MAX_TOKENS, kv_heads + 1, dtype=torch.int32, device=device)


def decode_attended(
    qkv: Runs,
    rows: Rows,
    k_cache: Tensor,
    v_cache: Tensor,
    cos: Tensor,
    sin: Tensor,
    scale: float,
    w: TritonQWeight,
    *,
    arrivals: Tensor,
    activation_bits: int | None = None,
    split_keys: int = SPLIT_KEYS,
) -> Prepared:
    """Attention of qkv [T, (H + 2 KH) D] for products with `w` [.., H D], its keys and values written first. At most
    MAX_TOKENS tokens; `arrivals` are `counters`."""
    keys, values = Side.of(k_cache, "k_cache"), Side.of(v_cache, "v_cache")
    kv_heads, block_size, d = k_cache.shape[1], k_cache.shape[2], head_dim(k_cache)
    tokens, device = rows.positions.shape[0], k_cache.device
    heads = w.k // d
    made = room(w, tokens, activation_bits)
    if not tokens:
        return made
    splits = -(-rows.block_tables.shape[1] * block_size // split_keys)
    shares = weights = None
    if splits > 1:
        shares = torch.empty(tokens, heads, splits, d, dtype=torch.float32, device=device)
        weights = torch.empty(tokens, heads, splits, dtype=torch.float32, device=device)
    cut = blocks(heads // kv_heads, 1, codes=min(keys.bits, values.bits) < 16)
    decode_attention_kernel[(made.half.shape[0], kv_heads * splits)](
        *operands_of(qkv),
        rows.positions,
        cos,
        sin,
        keys.cache,
        keys.grid,
        values.cache,
        values.grid,
        rows.slots,
        rows.seq_lens,
        rows.block_tables,
        shares,
        weights,
        torch.empty(tokens, heads * d, dtype=torch.float32, device=device),
        arrivals,
        made.half,
        made.sums,
        made.factors,
        scale * math.log2(math.e),
        tokens,
        made.half.shape[0],
        w.geometry.columns,
        w.geometry.groups,
        heads,
        kv_heads,
        heads // kv_heads,
        rows.block_tables.stride(0),
        block_size,
        splits,
        split_keys,
        cos.shape[1],
        d,
        K_WIDTH=keys.width,
        V_WIDTH=values.width,
        K_BITS=keys.bits,
        V_BITS=values.bits,
        **constants_of(qkv),
        JOIN=splits > 1,
        BLOCK_D=block_columns(d, keys, values),
        BLOCK_Q=cut.tokens,
        BLOCK_G=cut.heads,
        BLOCK_N=BLOCK_KEYS,
        BITS=w.format.bits,
        GROUP=max(0, w.format.group_size),
        BLOCK=prepare_block(w.k),
        QMAX=qmax_of(activation_bits),
        num_warps=cut.warps,
        num_stages=STAGES,
    )
    return made
