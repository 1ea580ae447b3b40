"""Rows of a quantized embedding table.

    ids  [T] int64
    w    QTensor [V, K], in the layout that the backend's qlinear `pack` made of it: a tied head and embedding are
         one weight in memory
    y    [T, K] float32

Raises IndexError for an id outside [0, V).
"""

from __future__ import annotations

from torch import Tensor

from dibit.kernels.formats import QTensor, dequantize


def embedding_reference(ids: Tensor, w: QTensor) -> Tensor:
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= w.shape[0]):
        raise IndexError(f"token ids from {int(ids.min())} to {int(ids.max())}; the table has {w.shape[0]} rows")
    return dequantize(QTensor(w.codes[ids], w.zeros[ids], w.scales[ids], w.format))
