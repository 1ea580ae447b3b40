"""How the paged KV cache stores a row: the keys, or the values, that one head has of one token.

A cache is one tensor [blocks, KH, block_size, W]. Its element type says how its rows are stored, and W follows from the
head dim D:

    float32, float16, bfloat16  D elements, W = D
    float8_e4m3fn  D elements of a byte, W = D; the OCP 8-bit format E4M3 (sign, 4 bits of exponent with bias 7, 3 of
            mantissa), without a scale
    int8    D signed codes, then a float16 scale for every 32 of them; W = D + 2 * ceil(D / 32) bytes
    uint8   4-bit codes, two to a byte and the first in the low bits, then for every 32 of them a float16 scale and a
            float16 offset; W = D / 2 + 4 * ceil(D / 32) bytes

Elements and codes are rounded to nearest, halves to even. Of codes, for int8 x = code * scale, the scale a 127th of the
largest |x|; for 4 bits x = code * scale + offset, the offset the least x, the scale a 15th of the range. A row is
written and read whole, so that what is stored for a token does not depend on its neighbours. Where an element is not
finite, or beyond float16, its group of codes is NaN. e4m3 ends at 448: what is beyond becomes 448 with its sign, and
what is not finite the NaN 0x7f.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from dibit.kernels.contract import ContractError, Dims

GROUP = 32
REALS = (torch.float32, torch.float16, torch.bfloat16)
FP8 = torch.float8_e4m3fn
INT8, INT4 = torch.int8, torch.uint8
CODES = (INT8, INT4)
FP8_MAX = 448.0
MAX_QUANTIZED_DIM = 1024


def paired(keys: torch.dtype, values: torch.dtype) -> bool:
    """Whether a cache may store the two so: alike, or both in codes."""
    return keys == values or (keys in CODES and values in CODES)


def row_width(d: int, dtype: torch.dtype) -> int:
    """Elements of a row of head dim `d`. Raises ContractError for one that cannot be quantized."""
    if dtype not in CODES:
        return d
    if d % 2 or d > MAX_QUANTIZED_DIM:
        raise ContractError(
            f"a quantized KV cache needs an even head dim of at most {MAX_QUANTIZED_DIM}, not {d}; choose a float one"
        )
    groups = -(-d // GROUP)
    return d + 2 * groups if dtype == INT8 else d // 2 + 4 * groups


def check_cache(dims: Dims, k_cache: Tensor, v_cache: Tensor, d: int, *, types: frozenset[torch.dtype]) -> None:
    """Raises ContractError unless both are caches of head dim `d`, stored as `types` that go together."""
    dims.check("k_cache", k_cache, "blocks KH block_size KW", types)
    dims.check(
        "v_cache", v_cache, "blocks KH block_size VW", [other for other in types if paired(k_cache.dtype, other)]
    )
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        wanted = row_width(d, cache.dtype)
        if cache.shape[3] != wanted:
            raise ContractError(
                f"{dims.op}: {name} has rows of {cache.shape[3]}; a head dim of {d} has {wanted} of {cache.dtype}"
            )


def caches_fit(k_cache: Tensor, v_cache: Tensor, d: int, *, types: Collection[torch.dtype]) -> bool:
    """Whether `check_cache` would let them pass, and they lie in main memory: what a hot path asks."""
    return (
        k_cache.dtype in types
        and v_cache.dtype in types
        and paired(k_cache.dtype, v_cache.dtype)
        and k_cache.is_contiguous()
        and v_cache.is_contiguous()
        and v_cache.shape[:3] == k_cache.shape[:3]
        and k_cache.shape[3] == row_width(d, k_cache.dtype)
        and v_cache.shape[3] == row_width(d, v_cache.dtype)
        and k_cache.is_cpu
        and v_cache.is_cpu
    )


def head_dim(cache: Tensor) -> int:
    """D of a cache [.., W]; of a width that is none's, some number."""
    width = cache.shape[-1]
    if cache.dtype == INT8:
        return width - 2 * -(-width // (GROUP + 2))
    if cache.dtype == INT4:
        return 2 * (width - 4 * -(-width // (GROUP // 2 + 4)))
    return width


def store_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [.., D] -> [.., W] of `dtype`."""
    if dtype in REALS:
        return x.to(dtype)
    if dtype == FP8:
        # Versions of torch differ in what they make of numbers beyond 448.
        y = x.float()
        return torch.where(y.isfinite(), y.clamp(-FP8_MAX, FP8_MAX), torch.nan).to(FP8)
    groups = _groups(x.float())
    # Not finite times zero is NaN, where max and min would let some of it pass.
    poison = (groups * 0).sum(dim=-1, keepdim=True)
    if dtype == INT8:
        scale = (groups.abs().amax(dim=-1, keepdim=True) / 127 + poison).half()
        codes = _codes(groups, scale.float(), -127, 127).to(torch.int8)
        return torch.cat([codes.flatten(-2)[..., : x.shape[-1]], _bytes(scale).view(torch.int8)], dim=-1)
    # Of zeros of both signs the positive one, whichever was found.
    low = groups.amin(dim=-1, keepdim=True) + 0.0
    scale, offset = ((groups.amax(dim=-1, keepdim=True) - low) / 15 + poison).half(), low.half()
    codes = _codes(groups - offset.float(), scale.float(), 0, 15).to(torch.uint8).flatten(-2)[..., : x.shape[-1]]
    return torch.cat([codes[..., ::2] | codes[..., 1::2] << 4, _bytes(torch.cat([scale, offset], dim=-1))], dim=-1)


def load_rows(rows: Tensor, d: int) -> Tensor:
    """rows [.., W] -> float32 [.., D]."""
    if rows.dtype not in CODES:
        return rows.float()
    count = -(-d // GROUP)
    at = d if rows.dtype == INT8 else d // 2
    grid = rows[..., at:].clone(memory_format=torch.contiguous_format).view(torch.uint8).view(torch.float16).float()
    if rows.dtype == INT8:
        codes, scale, offset = rows[..., :d], grid, torch.zeros(())
    else:
        codes = torch.stack([rows[..., :at] & 15, rows[..., :at] >> 4], dim=-1).flatten(-2)
        grid = grid.view(*grid.shape[:-1], count, 2)
        scale, offset = grid[..., 0], grid[..., 1]
    return codes.float() * _spread(scale, d) + (_spread(offset, d) if offset.dim() else offset)


def _groups(x: Tensor) -> Tensor:
    """[.., D] -> [.., D/32, 32], the last element repeated to the end of its group."""
    short = -x.shape[-1] % GROUP
    whole = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], short)], dim=-1) if short else x
    return whole.reshape(*whole.shape[:-1], whole.shape[-1] // GROUP, GROUP)


def _codes(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    return (x / torch.where(scale > 0, scale, 1.0)).nan_to_num(low).clamp(low, high).round()


def _bytes(halves: Tensor) -> Tensor:
    """float16 [.., groups, n] -> uint8 [.., groups * n * 2]."""
    return halves.flatten(-2).contiguous().view(torch.uint8)


def _spread(grid: Tensor, d: int) -> Tensor:
    """A number for each group [.., groups] -> one for each element [.., D]."""
    return grid.repeat_interleave(GROUP, dim=-1)[..., :d]
