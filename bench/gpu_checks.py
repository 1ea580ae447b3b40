"""What a GPU must do before its times count: every kernel against the reference in float64, on the device.

The interpreter has proven the arithmetic. What only a GPU can show is checked here: that the compiled code does the
same, that subnormal float16 operands survive the matrix instructions (the unpacking rests on them), and that a token's
bits do not depend on how many tokens there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dibit.bench.gpu_records import Check
from dibit.engine import draw
from dibit.engine.config import SamplingParams
from dibit.kernels.activation import silu_mul_reference
from dibit.kernels.argmax import argmax_reference
from dibit.kernels.attention import paged_attention_reference
from dibit.kernels.embedding import embedding_reference
from dibit.kernels.formats import BITS, PER_CHANNEL, Format, QTensor, dequantize, zero_points
from dibit.kernels.kv import CODES, FP8, INT4, INT8, load_rows, row_width, store_rows
from dibit.kernels.norm import add_rms_norm_reference
from dibit.kernels.qlinear import quantize_activations
from dibit.kernels.rope import rope_kv_write_reference
from dibit.kernels.triton import attention, fused, qlinear, sampling, small
from dibit.kernels.triton.layout import pack

ROUNDED = (Format(2, 128), Format(4, 128), Format(4, PER_CHANNEL), Format(8, 64), Format(8, 128), Format(2, 64))
"""Weights of the products of rounded activations: some that integer tensor cores multiply, and one they do not."""


def random_weight(n: int, k: int, format: Format, device: torch.device) -> QTensor:
    groups = format.groups(k)
    return QTensor(
        codes=torch.randint(0, format.qmax + 1, (n, k), dtype=torch.uint8, device=device),
        zeros=torch.randint(0, format.qmax + 1, (n, groups), dtype=torch.uint8, device=device),
        scales=torch.rand(n, groups, device=device).add(0.01).mul(0.05).half(),
        format=format,
    )


def run_checks(device: torch.device, *, tokens: tuple[int, ...] = (1, 3, 8, 17, 64, 200)) -> Iterator[Check]:
    """Each check as it is done. A kernel that raises is a check that failed; the others still run."""
    for bits in BITS:
        for group in (32, 64, 128, PER_CHANNEL):
            fmt = Format(bits, group)
            yield _attempt(f"qlinear {fmt.name}", lambda fmt=fmt: _product(fmt, device, tokens))  # type: ignore[misc]
    for fmt in ROUNDED:
        yield _attempt(f"rounded activations {fmt.name}", lambda fmt=fmt: _rounded(fmt, device, tokens))  # type: ignore[misc]
    yield _attempt("paged attention, decoding", lambda: _attention([700, 33, 1], [1, 1, 1], device))
    yield _attempt("paged attention, chunks", lambda: _attention([90, 70, 40], [90, 6, 1], device))
    for name, keys, values in (("fp8", FP8, FP8), ("int8", INT8, INT8), ("k8v4", INT8, INT4), ("int4", INT4, INT4)):
        yield _attempt(f"KV cache {name}", lambda keys=keys, values=values: _low_bits(keys, values, device))  # type: ignore[misc]
    yield _attempt("norm, silu, rope, embedding, argmax", lambda: _small(device))
    yield _attempt("fused ops between products", lambda: _fused(device))
    yield _attempt("draws", lambda: _draws(device))


def _attempt(name: str, check: Callable[[], str]) -> Check:
    try:
        return Check(name, True, check())
    except Exception as error:
        return Check(name, False, f"{type(error).__name__}: {str(error)[:500]}")


def _within(found: Tensor, want: Tensor, limit: Tensor | float) -> float:
    """Largest error as a share of the limit. Raises AssertionError beyond it."""
    share = float(((found.double() - want.double()).abs() / limit).max())
    if not share <= 1:
        raise AssertionError(f"an error of {share:.3g} times what is allowed")
    return share


def _product(fmt: Format, device: torch.device, tokens: tuple[int, ...]) -> str:
    n, k = 192, 1024
    w = random_weight(n, k, fmt, device)
    packed = pack(w)
    x = torch.randn(max(tokens), k, device=device)
    bias = torch.randn(n, device=device)
    dense = dequantize(w).double()
    want = x.double() @ dense.T + bias.double()
    codes = w.codes.reshape(n, fmt.groups(k), -1).double() + zero_points(w.zeros, fmt).double()[..., None]
    terms = (codes * w.scales.double()[..., None]).reshape(n, k)
    size = x.double().abs()
    limit = size @ dense.abs().T * 2.0**-11 + size @ terms.T * 2.0**-23 * (k + 8) + 1e-6
    together = qlinear.qlinear(x, packed, bias)
    worst = _within(together, want, limit)
    differing = []
    for m in tokens:
        y = torch.full((m, n), 1e30, device=device)
        qlinear.qlinear(x[:m].contiguous(), packed, bias, out=y)
        worst = max(worst, _within(y, want[:m], limit[:m]))
        if not torch.equal(y, together[:m]):
            differing.append(m)
    invariance = f"; bits differ from M {max(tokens)} at M {differing}" if differing else "; same bits at every M"
    return f"error {worst:.2f} of the bound{invariance}"


def _rounded(fmt: Format, device: torch.device, tokens: tuple[int, ...]) -> str:
    """Sums of integers are exact, so that integer and float16 products, and every M, must agree to the bit."""
    n, k = 192, 1024
    w = random_weight(n, k, fmt, device)
    packed = pack(w)
    x = torch.randn(max(tokens), k, device=device)
    together = qlinear.qlinear(x, packed, activation_bits=8)
    rounded = quantize_activations(x, bits=8).double()
    codes = w.codes.reshape(n, fmt.groups(k), -1).double() + zero_points(w.zeros, fmt).double()[..., None]
    terms = (codes * w.scales.double()[..., None]).reshape(n, k)
    limit = rounded.abs() @ terms.T * 2.0**-23 * (fmt.groups(k) + 6)
    share = _within(together, rounded @ dequantize(w).double().T, limit)
    for m in tokens:
        if not torch.equal(qlinear.qlinear(x[:m].contiguous(), packed, activation_bits=8), together[:m]):
            raise AssertionError(f"bits at M {m} are not those at M {max(tokens)}")
    counts = [m for m in tokens if qlinear.integers_of(packed, m, 8)]
    return f"error {share:.2f} of the bound; same bits at every M" + (f", M {counts} with integers" if counts else "")


def _low_bits(keys: torch.dtype, values: torch.dtype, device: torch.device) -> str:
    """What is stored, byte for byte; and attention over such rows, decoding and in chunks."""
    d, kv_heads = 64, 2
    qkv = torch.randn(5, 3 * kv_heads * d, device=device)
    slots = torch.tensor([3, 0, 7, -1, 4], device=device)
    none, positions = torch.zeros(1, 0, device=device), torch.zeros(5, dtype=torch.int64, device=device)
    caches = [
        torch.full((2, kv_heads, 4, row_width(d, kind)), 7, dtype=torch.uint8, device=device).view(kind)
        for kind in (keys, values) * 2
    ]
    small.rope_kv_write(qkv, positions, none, none, caches[0], caches[1], slots, kv_heads)
    rope_kv_write_reference(qkv, positions, none, none, caches[2], caches[3], slots, kv_heads)
    for name, found, want in (("keys", caches[0], caches[2]), ("values", caches[1], caches[3])):
        differing = int((found.view(torch.uint8) != want.view(torch.uint8)).sum())
        if differing:
            raise AssertionError(f"{differing} bytes of the {name} differ from the reference's")
    decoding = _attention([700, 33, 1], [1, 1, 1], device, types=(keys, values))
    return f"same bytes; decoding {decoding}; chunks {_attention([90, 70], [90, 6], device, types=(keys, values))}"


def _attention(
    lengths: list[int],
    tokens: list[int],
    device: torch.device,
    *,
    types: tuple[torch.dtype, torch.dtype] = (torch.float16, torch.float16),
) -> str:
    heads, kv_heads, d, block_size = 8, 2, 64, 16
    needed = [-(-length // block_size) for length in lengths]
    order = torch.randperm(sum(needed) + 1, device=device).to(torch.int32)
    tables = torch.zeros(len(lengths), max(needed), dtype=torch.int32, device=device)
    for b, count in enumerate(needed):
        tables[b, :count] = order[sum(needed[:b]) : sum(needed[:b]) + count]
    shape = (sum(needed) + 1, kv_heads, block_size, d)
    k_cache, v_cache = (store_rows(torch.randn(shape, device=device), kind) for kind in types)
    q = torch.randn(sum(tokens), heads * d, device=device).half().float()
    cu_seqlens = torch.tensor([0, *torch.tensor(tokens).cumsum(0)], dtype=torch.int32, device=device)
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    arguments = (q, k_cache, v_cache, cu_seqlens, seq_lens, tables, d**-0.5)
    want = paged_attention_reference(*arguments)
    # Codes stand for numbers that are rounded to float16 too before they are multiplied; e4m3 is float16 already.
    limit = 2.0 ** (-9 if types[0] in CODES else -10) * float(load_rows(v_cache, d).abs().max())
    return f"error {_within(attention.paged_attention(*arguments), want, limit):.2f} of the bound"


def _small(device: torch.device) -> str:
    x, residual, weight = (torch.randn(3, 576, device=device) for _ in range(3))
    want, want_sum = add_rms_norm_reference(x, residual.clone(), weight[0], 1e-5)
    got, total = small.add_rms_norm(x, residual, weight[0].contiguous(), 1e-5)
    worst = max(_within(got, want, 1e-5), _within(total, want_sum, 1e-6))
    gate_up = torch.randn(3, 300, device=device)
    worst = max(worst, _within(small.silu_mul(gate_up), silu_mul_reference(gate_up), 1e-5))
    qkv = torch.randn(3, 4 * 32, device=device)
    positions, slots = torch.tensor([5, 0, 2], device=device), torch.tensor([1, -1, 6], device=device)
    angles = torch.rand(8, 16, device=device) * 6
    caches = [torch.zeros(2, 1, 4, 32, device=device) for _ in range(4)]
    got = small.rope_kv_write(qkv, positions, angles.cos(), angles.sin(), caches[0], caches[1], slots, 2)
    want = rope_kv_write_reference(qkv, positions, angles.cos(), angles.sin(), caches[2], caches[3], slots, 2)
    worst = max(worst, _within(got, want, 1e-5), _within(caches[0], caches[2], 1e-5))
    worst = max(worst, _within(caches[1], caches[3], 1e-6))
    w = random_weight(70, 320, Format(3, 64), device)
    ids = torch.tensor([0, 69, 3], device=device)
    worst = max(worst, _within(small.embedding(ids, pack(w)), embedding_reference(ids, w), 1e-6))
    scores = torch.randn(3, 9001, device=device)
    if small.argmax(scores)[0].tolist() != argmax_reference(scores)[0].tolist():
        raise AssertionError("argmax names another place than torch")
    return f"error {worst:.2f} of the bounds"


def _draws(device: torch.device) -> str:
    """Tokens of the definition in numpy, of a row by itself and beside others. A number near a border would excuse
    another token, but these are fixed and none is."""
    columns = 128256 if device.type == "cuda" else 1100
    asked = [
        SamplingParams(temperature=0.8),
        SamplingParams(top_k=40),
        SamplingParams(temperature=1.3, top_p=0.9),
        SamplingParams(min_p=0.01, top_k=60, top_p=0.95),
    ]
    # Drawn on the CPU, the same on every machine; coarse, so that there are ties.
    scores = (torch.randn(len(asked), columns, generator=torch.Generator().manual_seed(1)) * 24).round() / 8
    numbers = [draw.uniform(row, 0) for row in range(len(asked))]
    fields = [[getattr(p, name) for p in asked] for name in ("temperature", "min_p", "top_k", "top_p")]
    settings = torch.tensor([*fields, numbers], dtype=torch.float64, device=device)
    found = sampling.draw(scores.to(device), settings, top_k=True, top_p=True).tolist()
    for row, (params, number) in enumerate(zip(asked, numbers, strict=True)):
        ids, weights = draw.kept(scores[row].numpy(), params)
        if found[row] != (expected := int(ids[draw.place(weights, number)])):
            raise AssertionError(f"{params} draws {found[row]}, not {expected}")
    alone = sampling.draw(scores[:1].to(device), settings[:, :1], top_k=False, top_p=False).tolist()
    if alone != found[:1]:
        raise AssertionError(f"a row to itself draws {alone[0]}, beside others {found[0]}")
    return f"{len(asked)} tokens of {columns}"


def _fused(device: torch.device) -> str:
    """An MLP and the norm after it, against the single ops."""
    gate_up, down = (pack(random_weight(n, k, Format(4, 64), device)) for n, k in ((384, 512), (512, 192)))
    x, residual, norm = (
        torch.randn(3, 512, device=device),
        torch.randn(3, 512, device=device),
        torch.rand(512).to(device),
    )
    stream = residual.clone()
    h, stream = small.add_rms_norm(x, stream, norm, 1e-5)
    y = qlinear.qlinear(small.silu_mul(qlinear.qlinear(h, gate_up)), down)
    h, stream = small.add_rms_norm(y, stream, norm, 1e-5)
    want = qlinear.qlinear(h, gate_up)
    prepared = fused.norm_prepared(x, residual, norm, 1e-5, gate_up)
    runs = fused.product(fused.silu_prepared(fused.product(prepared, gate_up, None), down), down, None)
    prepared = fused.norm_prepared(runs, residual, norm, 1e-5, gate_up)
    found = fused.finished(fused.product(prepared, gate_up, None))
    # An activation may round to the neighbouring float16 in three places.
    worst = _within(found, want, 2.0**-8 * float(want.abs().max()))
    worst = max(worst, _within(residual, stream, 2.0**-8 * float(stream.abs().max())))
    return f"error {worst:.2f} of the bound"
