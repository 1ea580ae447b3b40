"""BitBLAS's packed tensors, as GPTQModel and AutoGPTQ save them, to QTensor. Read only.

For a linear of N outputs and K inputs in groups of G:

    qweight           int8 [N, K * bits / 8]    codes along K
    qzeros (or zeros) int8 [K / G, N * bits / 8]  zero points as they are ("quantized" mode), lowest bits first
    scales            float [N, K / G]

At 2 and 4 bits the codes of each 32-bit word are interleaved for float16 activations: code i at bit
(i mod 2) * 16 + (i div 2) * bits, and at 2 bits the two middle bytes change places. This is undone here; it is the
order of BitBLAS's `fast_decoding`, the default for these widths. Weights of more than two dimensions were permuted for
one GPU's schedule and are refused, and so are symmetric files, which have no zero points and do not tell how their
codes are signed. Wang et al., "Ladder", OSDI 2024.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dibit.engine.checkpoint.checkpoint import Quantization, ZeroConvention
from dibit.engine.checkpoint.packing import SAMPLED_ROWS, Headers, Sample, finite_scales
from dibit.engine.checkpoint.quantization_config import parse_quantization
from dibit.engine.errors import CheckpointError
from dibit.kernels.formats import Format, QTensor, unpack_stream

BITS = (2, 4, 8)
_BYTES = (torch.int8, torch.uint8)


def parse_bitblas(raw: Mapping[str, Any], source: str) -> Quantization:
    """A GPTQ config whose checkpoint_format (or quant_method) is bitblas. Raises CheckpointError."""
    plain = {key: value for key, value in raw.items() if key not in ("checkpoint_format", "format", "method")}
    found = parse_quantization(plain | {"quant_method": "gptq", "checkpoint_format": "gptq_v2"}, source)
    formats = [found.format, *(rule.format for rule in found.dynamic if rule.format is not None)]
    for form in formats:
        if form.bits not in BITS:
            raise CheckpointError(f"{source} is BitBLAS of {form.bits} bits; supported: {', '.join(map(str, BITS))}")
    return dataclasses.replace(found, method="bitblas", checkpoint_format="bitblas")


@dataclass(frozen=True)
class BitblasPacking:
    """See packing.Packing."""

    parts: ClassVar[tuple[str, ...]] = ("qweight", "scales", "qzeros", "zeros")

    def shape(self, headers: Headers) -> tuple[int, int]:
        form = headers.require("qweight", "scales")
        if len(headers.parts["qweight"].shape) != 2:
            raise headers.error(
                f"has qweight of {list(headers.parts['qweight'].shape)}: permuted for one GPU's schedule, which the "
                "file does not describe. Use the GPTQ or EfficientQAT checkpoint that it was made from"
            )
        headers.check_type("qweight", _BYTES, 2)
        headers.check_scales("scales")
        zeros = "qzeros" if "qzeros" in headers.parts else "zeros"
        if zeros not in headers.parts or headers.parts[zeros].numel == 0:
            raise headers.error(
                "is a symmetric BitBLAS weight, without zero points; it does not tell how its codes are signed. "
                "Use the GPTQ checkpoint that it was made from"
            )
        headers.check_type(zeros, _BYTES, 2)
        n, row_bytes = headers.parts["qweight"].shape
        k = row_bytes * 8 // form.bits
        groups = headers.groups(form, k)
        if row_bytes % 4 or n * form.bits % 8:
            raise headers.error(f"has shapes that do not fill whole words at {form.bits} bits: {headers.shapes()}")
        headers.expect(form, {"scales": (n, groups), zeros: (groups, n * form.bits // 8)})
        return n, k

    def unpack(
        self, tensors: Mapping[str, Tensor], format: Format, *, zeros: ZeroConvention, module: str, source: str
    ) -> QTensor:
        fields = self.sample(tensors, format).fields
        if zeros == "v1":
            if int(fields.max()) == format.qmax:
                raise CheckpointError(f"{source}: {module} has zero points that version 1 cannot mean; read it as v2")
            fields = fields + 1
        return QTensor(
            codes=_codes(tensors["qweight"], format.bits),
            zeros=fields,
            scales=finite_scales(tensors["scales"], module=module, source=source),
            format=format,
        )

    def sample(self, tensors: Mapping[str, Tensor], format: Format) -> Sample:
        stored = tensors["qzeros"] if "qzeros" in tensors else tensors["zeros"]
        fields = _from_bytes(stored, format.bits).T.contiguous()
        return Sample(_codes(tensors["qweight"][:SAMPLED_ROWS], format.bits), fields, format)


def _codes(qweight: Tensor, bits: int) -> Tensor:
    words = qweight.contiguous().view(torch.int32)
    if bits == 8:
        return unpack_stream(words, bits)
    if bits == 2:
        middle = words & ~0x00FFFF00
        words = middle | ((words & 0x0000FF00) << 8) | ((words >> 8) & 0x0000FF00)
    order = torch.arange(32 // bits, dtype=torch.int32)
    shifts = (order % 2) * 16 + torch.div(order, 2, rounding_mode="floor") * bits
    return ((words[..., None] >> shifts) & ((1 << bits) - 1)).to(torch.uint8).flatten(-2)


def _from_bytes(stored: Tensor, bits: int) -> Tensor:
    """[..., B] bytes -> uint8 [..., B * 8 / bits], lowest bits first."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    fields = (stored.contiguous().view(torch.uint8)[..., None] >> shifts) & ((1 << bits) - 1)
    return fields.flatten(-2)
