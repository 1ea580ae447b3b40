"""A block on the Triton kernels that do what stands between two products in one launch (kernels/triton/fused.py).

It computes what Block.paged computes. Attention of a decode step is one of them; it gives the bits of the several
launches of other steps. Whether a block is fused depends on its weights alone, never on the step, so that
a token's bits do not depend on its company.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dibit.engine.batch import Batch
from dibit.engine.models.decoder import Block, PackedLinear
from dibit.kernels.triton import fused
from dibit.kernels.triton.attention import attend
from dibit.kernels.triton.decode import MAX_TOKENS, Rows, counters, decode_attended
from dibit.kernels.triton.layout import TritonQWeight
from dibit.kernels.triton.small import rope_kv_write


class FusedBlock(Block):
    """
    owes      the next block is fused too, and takes this one's last product as it is
    arrivals  `counters` (kernels/triton/decode.py), of all blocks that run one after another
    """

    def __init__(self, block: Block, *, owes: bool, arrivals: Tensor) -> None:
        super().__init__(
            block.sizes,
            linears=block.linears,
            attn_norm=block.attn_norm,
            mlp_norm=block.mlp_norm,
            ops=block.ops,
        )
        self.owes = owes
        self.arrivals = arrivals

    def paged(
        self,
        x: Any,
        residual: Tensor | None,
        batch: Batch,
        k_cache: Tensor,
        v_cache: Tensor,
        cos: Tensor,
        sin: Tensor,
        rows: Tensor | None = None,
    ) -> tuple[Any, Tensor]:
        """As Block.paged; x is [T, hidden] float32, or the Runs of the fused block before, and so is what returns."""
        eps = self.sizes.norm_eps
        qkv, o, gate_up, down = map(self._packed, ("qkv", "o", "gate_up", "down"))
        h = fused.norm_prepared(x, residual, self.attn_norm, eps, qkv.weight, activation_bits=qkv.activation_bits)
        residual = x if residual is None else residual
        runs = fused.product(h, qkv.weight, qkv.bias)
        tokens = batch.positions.shape[0]
        if rows is None and tokens == batch.seq_lens.shape[0] and tokens <= MAX_TOKENS:
            h = decode_attended(
                runs,
                Rows(batch.positions, batch.slots, batch.seq_lens, batch.block_tables),
                k_cache,
                v_cache,
                cos,
                sin,
                self.scale,
                o.weight,
                arrivals=self.arrivals,
                activation_bits=o.activation_bits,
            )
        else:
            q = rope_kv_write(
                runs, batch.positions, cos, sin, k_cache, v_cache, batch.slots, self.sizes.heads
            )  # fmt: skip
            attended = attend(q, k_cache, v_cache, batch.cu_seqlens, batch.seq_lens, batch.block_tables, self.scale)
            if rows is not None:
                attended, residual = attended.rows(rows), residual[rows]
            h = fused.attended_prepared(attended, o.weight, activation_bits=o.activation_bits)
        x = fused.product(h, o.weight, o.bias)
        h = fused.norm_prepared(
            x, residual, self.mlp_norm, eps, gate_up.weight, activation_bits=gate_up.activation_bits
        )
        x = fused.product(h, gate_up.weight, gate_up.bias)
        h = fused.silu_prepared(x, down.weight, activation_bits=down.activation_bits)
        runs = fused.product(h, down.weight, down.bias)
        return runs if self.owes else fused.finished(runs), residual

    def _packed(self, site: str) -> PackedLinear:
        linear = self.linears[site]
        assert isinstance(linear, PackedLinear)
        return linear


def fuse(blocks: Sequence[Block]) -> list[Block]:
    """The same blocks, fused where they can be."""
    able = [_fusible(block) for block in blocks]
    if not any(able):
        return list(blocks)
    arrivals = counters(blocks[0].sizes.kv_heads, blocks[0].attn_norm.device)
    return [
        FusedBlock(block, owes=following, arrivals=arrivals) if this else block
        for block, this, following in zip(blocks, able, [*able[1:], False], strict=True)
    ]


def _fusible(block: Block) -> bool:
    """Whether every product is one packed weight, with rows that fit a program, and nothing stands between the first
    one and the rotary positions."""
    return not block.head_norms and all(
        isinstance(linear, PackedLinear)
        and isinstance(linear.weight, TritonQWeight)
        and fused.row_block(linear.weight) <= fused.MAX_COLUMNS
        for linear in block.linears.values()
    )
